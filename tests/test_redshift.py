"""The sink of Redshift through both its drivers, on a real PostgreSQL: the kit, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from postgres import GivenServer
from recognition.sinks import Sink, open_sink
from recognition.sinks.redshift import RedshiftSink
from recognition.testing import SinkTests
from redshift import Proxy
from test_postgresql import Database, Rows

DRIVERS = ("psycopg2", "redshift_connector")


@pytest.fixture(scope="module")
def proxy(postgres: GivenServer) -> Iterator[Proxy]:
    """What redshift_connector takes for Redshift."""
    with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def database(postgres: GivenServer) -> Iterator[Database]:
    """An empty database."""
    with postgres.database() as name:
        yield Database(postgres, name)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each of the two drivers."""
    return str(request.param)


@pytest.fixture
def url(database: Database, proxy: Proxy, driver: str) -> str:
    """The URL of the database for the driver; without TLS, on loopback."""
    if driver == "psycopg2":
        return database.server.url(database.name, scheme="redshift+psycopg2", sslmode="disable")
    return database.server.url(
        database.name, scheme="redshift+redshift_connector", port=proxy.port, ssl="false"
    )


# The kit ----------------------------------------------------------------------------------------


class TestRedshift(SinkTests):
    """The kit on Redshift's dialect, with each driver."""

    @pytest.fixture
    def sink(self, url: str) -> Iterator[Sink]:
        with closing(open_sink(url, settings={})) as sink:
            yield sink

    @pytest.fixture
    def write_rows(self, database: Database) -> Callable[[str, Rows], None]:
        return database.write

    @pytest.fixture
    def read_rows(self, database: Database) -> Callable[[str], list[dict[str, object]]]:
        return database.read


def test_it_is_found(url: str) -> None:
    """The sink is found by its scheme, with each driver."""
    with closing(open_sink(url)) as sink:
        assert isinstance(sink, RedshiftSink)
