"""The kit on the built-in sinks."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from recognition.sinks import Sink, open_sink
from recognition.testing import SinkTests

Rows = Sequence[Mapping[str, object]]

SQLITE_TYPES = {
    "text": "TEXT",
    "time": "TEXT",
    "integer": "INTEGER",
    "float": "REAL",
    "boolean": "BOOLEAN",
}
DUCKDB_TYPES = {
    "text": "VARCHAR",
    "time": "TIMESTAMPTZ",
    "integer": "BIGINT",
    "float": "DOUBLE",
    "boolean": "BOOLEAN",
}


def _declare(types: Mapping[str, str]) -> str:
    return ", ".join(
        f'"{n}" {types[k]}{" PRIMARY KEY" if n == "message_id" else ""}'
        for n, k in SinkTests.columns.items()
    )


class TestSqlite(SinkTests):
    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[Sink]:
        sink = open_sink(f"sqlite:///{tmp_path}/warehouse.db")
        yield sink
        sink.close()

    @pytest.fixture
    def write_rows(self, tmp_path: Path) -> Callable[[str, Rows], None]:
        def write(table: str, rows: Rows) -> None:
            with closing(sqlite3.connect(tmp_path / "warehouse.db")) as connection, connection:
                connection.execute(
                    f'CREATE TABLE IF NOT EXISTS "{table}" ({_declare(SQLITE_TYPES)})'
                )
                for row in rows:
                    values = {**row, "timestamp": row["timestamp"].isoformat()}
                    names = ", ".join(f'"{n}"' for n in values)
                    connection.execute(
                        f'INSERT INTO "{table}" ({names}) VALUES ({", ".join("?" * len(values))})',
                        list(values.values()),
                    )

        return write

    @pytest.fixture
    def read_rows(self, tmp_path: Path) -> Callable[[str], list[dict[str, object]]]:
        def read(table: str) -> list[dict[str, object]]:
            with closing(sqlite3.connect(tmp_path / "warehouse.db")) as connection:
                connection.row_factory = sqlite3.Row
                return [dict(row) for row in connection.execute(f'SELECT * FROM "{table}"')]

        return read


class TestDuckdb(SinkTests):
    @pytest.fixture
    def sink(self, tmp_path: Path) -> Iterator[Sink]:
        sink = open_sink(f"duckdb:///{tmp_path}/warehouse.duckdb")
        yield sink
        sink.close()

    @pytest.fixture
    def write_rows(self, tmp_path: Path) -> Callable[[str, Rows], None]:
        def write(table: str, rows: Rows) -> None:
            with duckdb.connect(tmp_path / "warehouse.duckdb") as connection:
                connection.execute("SET TimeZone = 'UTC'")
                connection.execute(
                    f'CREATE TABLE IF NOT EXISTS "{table}" ({_declare(DUCKDB_TYPES)})'
                )
                for row in rows:
                    values = {**row, "timestamp": row["timestamp"].isoformat()}
                    names = ", ".join(f'"{n}"' for n in values)
                    connection.execute(
                        f'INSERT INTO "{table}" ({names}) VALUES ({", ".join("?" * len(values))})',
                        list(values.values()),
                    )

        return write

    @pytest.fixture
    def read_rows(self, tmp_path: Path) -> Callable[[str], list[dict[str, object]]]:
        def read(table: str) -> list[dict[str, object]]:
            with duckdb.connect(tmp_path / "warehouse.duckdb") as connection:
                found = connection.execute(
                    f'SELECT * REPLACE (epoch_us("timestamp") AS "timestamp") FROM "{table}"'
                )
                names = [d[0] for d in found.description]
                return [dict(zip(names, row)) for row in found.fetchall()]

        return read
