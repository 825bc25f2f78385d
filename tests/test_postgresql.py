"""The sink of PostgreSQL on a real server: the kit, and what is particular to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import pytest
from psycopg import sql

from postgres import GivenServer
from recognition.errors import TableError
from recognition.planner import plan_updates
from recognition.sinks import Applied, Sink, open_sink
from recognition.sinks.postgresql import PostgresqlSink
from recognition.testing import SinkTests

Rows = Sequence[Mapping[str, object]]

TYPES = {
    "text": "TEXT",
    "time": "TIMESTAMPTZ",
    "integer": "BIGINT",
    "float": "DOUBLE PRECISION",
    "boolean": "BOOLEAN",
}


class Database:
    """A database of the test's own, looked at by the driver itself, around the sink."""

    def __init__(self, server: GivenServer, name: str) -> None:
        self.server = server
        self.name = name
        self.url = server.url(name)

    def run(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """One statement, committed."""
        return self.server.run(statement, parameters, database=self.name)

    def write(self, table: str, rows: Rows, *, types: Mapping[str, str] = TYPES) -> None:
        """Rows of the kit, into a table that is made when it is not there."""
        declared = ", ".join(
            f"{name} {types[kind]}{' PRIMARY KEY' if name == 'message_id' else ''}"
            for name, kind in SinkTests.columns.items()
        )
        quoted = sql.Identifier(*table.split("."))
        with self.server.connect(self.name) as connection, connection.cursor() as cursor:
            cursor.execute(
                sql.SQL("CREATE TABLE IF NOT EXISTS {} ({})").format(quoted, sql.SQL(declared))
            )
            marks = sql.SQL(", ").join([sql.Placeholder()] * len(SinkTests.columns))
            cursor.executemany(
                sql.SQL("INSERT INTO {} VALUES ({})").format(quoted, marks),
                [[each.get(name) for name in SinkTests.columns] for each in rows],
            )

    def read(self, table: str) -> list[dict[str, object]]:
        """All rows."""
        names = sql.SQL(", ").join(map(sql.Identifier, SinkTests.columns))
        with self.server.connect(self.name) as connection:
            found = connection.execute(
                sql.SQL("SELECT {} FROM {}").format(names, sql.Identifier(*table.split(".")))
            ).fetchall()
        return [dict(zip(SinkTests.columns, line, strict=True)) for line in found]

    def column(self, column: str, table: str = "events") -> dict[object, object]:
        """One column by message id."""
        return dict(self.run(f'SELECT message_id, "{column}" FROM {table}'))


@pytest.fixture
def database(postgres: GivenServer) -> Iterator[Database]:
    """An empty database."""
    with postgres.database() as name:
        yield Database(postgres, name)


Opened = Callable[..., PostgresqlSink]


@pytest.fixture
def opened(database: Database) -> Iterator[Opened]:
    """Open sinks that are closed at the end."""
    sinks: list[PostgresqlSink] = []

    def open_it(url: str = "", **options: object) -> PostgresqlSink:
        sink = open_sink(url or database.url, **options)
        assert isinstance(sink, PostgresqlSink)
        sinks.append(sink)
        return sink

    yield open_it
    for sink in sinks:
        sink.close()


def apply(sink: Sink, *updates: Any) -> Applied:
    return sink.apply(plan_updates(updates))


def refusal(applied: Applied) -> str:
    """The one reason of a plan that was refused."""
    ((_, error),) = applied.rejected
    assert isinstance(error, TableError)
    return str(error)


# The kit ----------------------------------------------------------------------------------------


class TestPostgresql(SinkTests):
    """The kit on PostgreSQL."""

    @pytest.fixture
    def sink(self, database: Database) -> Iterator[Sink]:
        with closing(open_sink(database.url)) as sink:
            yield sink

    @pytest.fixture
    def write_rows(self, database: Database) -> Callable[[str, Rows], None]:
        return database.write

    @pytest.fixture
    def read_rows(self, database: Database) -> Callable[[str], list[dict[str, object]]]:
        return database.read
