"""What every test run says and shares."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import browser as chromium
    import fakesnow_server
    import mariadb as mariadb_server
    import postgres as postgres_server
    from mongod import GivenServer

# The same examples in every run, so that a change is judged by its own tests. To look for more:
# HYPOTHESIS_PROFILE=default.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

_ENGINES = (
    "pydantic",
    "sqlalchemy",
    "duckdb",
    "pyarrow",
    "pymongo",
    "psycopg",
    "pymysql",
    "databricks-sql-connector",
    "google-cloud-bigquery",
    "clickhouse-connect",
    "chdb",
    "snowflake-sqlalchemy",
    "psycopg2-binary",
    "redshift-connector",
    "sqlalchemy-redshift",
    "selenium",
    "hypothesis",
)


def pytest_report_header() -> str:
    """So that a log says what was tested."""
    found = [f"SQLite {sqlite3.sqlite_version}"]
    for package in _ENGINES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    try:
        from mongod import describe
    except ImportError:  # no pymongo; whatever needs no MongoDB is still tested
        pass
    else:
        found.append(describe())
    try:
        from mariadb import describe as describe_mariadb
    except ImportError:  # no pymysql, or no pymongo
        pass
    else:
        found.append(describe_mariadb())
    try:
        from postgres import describe as describe_postgres
    except ImportError:  # no psycopg, or no pymongo
        pass
    else:
        found.append(describe_postgres())
    try:
        from browser import describe as describe_browser
    except ImportError:  # no selenium
        pass
    else:
        found.append(describe_browser())
    return f"engines: {', '.join(found)}"


@pytest.fixture(scope="session")
def mongodb() -> GivenServer:
    """A MongoDB server; started when the first test asks, one for each worker of xdist."""
    from graphs import mongodb_server

    return mongodb_server()


@pytest.fixture(scope="session")
def mariadb() -> Iterator[mariadb_server.GivenServer]:
    """A MariaDB server; started when the first test asks, one for each worker of xdist."""
    from mariadb import MissingMariadbError, open_server

    try:
        server = open_server()
    except MissingMariadbError as error:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.GivenServer]:
    """A PostgreSQL server; started when the first test asks, one for each worker of xdist."""
    from postgres import MissingPostgresError, open_server

    try:
        server = open_server()
    except MissingPostgresError as error:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[chromium.Browser]:
    """A Chromium; started when the first test asks, one for each worker of xdist."""
    from browser import MissingBrowserError, open_browser

    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_browser())
        except MissingBrowserError as error:
            if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
                raise
            pytest.skip(str(error))
        yield opened


@pytest.fixture(scope="session")
def fakesnow() -> Iterator[fakesnow_server.Server]:
    """A server that speaks Snowflake's protocol, one for each worker of xdist."""
    from fakesnow_server import MISSING, PYTHON, open_server

    if not PYTHON.exists() and os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") != "1":
        pytest.skip(MISSING)
    with open_server() as server:
        yield server


def pytest_unconfigure() -> None:
    """End the servers that the tests started, while threads still run."""
    if "graphs" in sys.modules:
        sys.modules["graphs"].close()


@pytest.fixture
def mongodb_url(mongodb: GivenServer) -> Iterator[str]:
    """The URL of a database of the test's own, which is dropped afterwards."""
    with mongodb.database() as url:
        yield url
