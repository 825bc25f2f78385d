"""Snowflake's sink, through the real dialect and connector, on a server that speaks its protocol."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from fakesnow_server import CONNECT_ARGS, MISSING, PYTHON, Server, open_server

from recognition.sinks import Sink, open_sink
from recognition.sinks.snowflake import SnowflakeSink
from recognition.testing import SinkTests

Rows = Sequence[Mapping[str, object]]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for each worker of xdist."""
    if not PYTHON.exists() and os.environ.get("RECOGNITION_REQUIRE_SERVERS") != "1":
        pytest.skip(MISSING)
    with open_server() as server:
        yield server


class Database:
    """A database of its own, looked at by an engine of the dialect's, around the sink."""

    types = {
        "text": "VARCHAR",
        "time": "TIMESTAMP_NTZ",
        "integer": "NUMBER(38, 0)",
        "float": "FLOAT",
        "boolean": "BOOLEAN",
    }

    def __init__(self, server: Server) -> None:
        self.url = server.url(f"db_{secrets.token_hex(6)}")
        self.engine = sa.create_engine(self.url, connect_args=CONNECT_ARGS)
        self.quote = self.engine.dialect.identifier_preparer.quote

    def run(self, statement: str, *rows: tuple[object, ...]) -> list[Any]:
        """One statement, committed; with rows, for each of them."""
        with self.engine.connect() as connection:
            done = connection.exec_driver_sql(statement, list(rows) or None)
            found = [*done] if done.returns_rows else []
            connection.commit()
        return found

    def write(self, table: str, rows: Rows) -> None:
        """Rows of the kit, into a table that is made when it is not there."""
        declared = ", ".join(f"{n} {self.types[kind]}" for n, kind in SinkTests.columns.items())
        self.run(f"CREATE TABLE IF NOT EXISTS {self.quote(table)} ({declared})")
        names = [*SinkTests.columns]
        lines = [tuple(_plain(each.get(name)) for name in names) for each in rows]
        marks = ", ".join(["%s"] * len(names))
        if lines:
            self.run(f"INSERT INTO {self.quote(table)} VALUES ({marks})", *lines)

    def read(self, table: str) -> list[dict[str, object]]:
        """All rows; times as text, because the server cannot send one that is NULL."""
        columns = ", ".join(
            f"CAST({name} AS VARCHAR)" if kind == "time" else name
            for name, kind in SinkTests.columns.items()
        )
        found = self.run(f"SELECT {columns} FROM {self.quote(table)}")
        return [dict(zip(SinkTests.columns, line, strict=True)) for line in found]

    def column(self, column: str, table: str = "events") -> dict[object, object]:
        """One column by message id."""
        return {name: value for name, value in self.run(f"SELECT message_id, {column} FROM {table}")}


def _plain(value: object) -> object:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) else value


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    """An empty database."""
    yield Database(server)
    server.fail()


class TestSnowflake(SinkTests):
    """The kit, unchanged."""

    @pytest.fixture
    def sink(self, database: Database) -> Iterator[Sink]:
        with closing(open_sink(database.url, connect_args=CONNECT_ARGS)) as sink:
            yield sink

    @pytest.fixture
    def write_rows(self, database: Database) -> Callable[[str, Rows], None]:
        return database.write

    @pytest.fixture
    def read_rows(self, database: Database) -> Callable[[str], list[dict[str, object]]]:
        return database.read
