"""The sink for ClickHouse, on the embedded engine: the kit by engine and strategy, and its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import clickhouse_connect
import pytest

from recognition.sinks import Sink, open_sink
from recognition.testing import SinkTests
from recognition.testing.sinks import ReadRows, Row, WriteRows

NUMBERED = "enable_block_number_column = 1, enable_block_offset_column = 1"

TYPES = {
    "text": "Nullable(String)",
    "time": "Nullable(DateTime64(6, 'UTC'))",
    "integer": "Nullable(Int64)",
    "float": "Nullable(Float64)",
    "boolean": "Nullable(Bool)",
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """
    The directory of the embedded engine: a process has one at a time.

    The client that is held open keeps the engine running from test to test.
    """
    path = str(tmp_path_factory.mktemp("chdb"))
    client = clickhouse_connect.get_client(interface="chdb", path=path)
    yield path
    client.close()


@pytest.fixture
def client(engine: str) -> Iterator[Any]:
    """A way around the sink, in an empty database."""
    client = clickhouse_connect.get_client(interface="chdb", path=engine)
    client.command("DROP DATABASE IF EXISTS test SYNC")
    client.command("CREATE DATABASE test")
    client.command("USE test")
    yield client
    client.close()


def quote(name: str) -> str:
    return "`" + name.replace("`", "\\`") + "`"


class ClickhouseTests(SinkTests):
    """The kit; a subclass says which table and which strategy."""

    engine_of: ClassVar[str] = "MergeTree"
    settings: ClassVar[str] = NUMBERED
    strategy: ClassVar[str] = "auto"
    types: ClassVar[Mapping[str, str]] = TYPES
    options: ClassVar[Mapping[str, Any]] = {}

    @pytest.fixture
    def sink(self, client: Any, engine: str) -> Iterator[Sink]:
        sink = open_sink(
            f"chdb://{engine}?database=test&strategy={self.strategy}", timeout=5, **self.options
        )
        yield sink
        sink.close()

    @pytest.fixture
    def write_rows(self, client: Any) -> WriteRows:
        def write(table: str, rows: Sequence[Row]) -> None:
            declared = ", ".join(
                f"{quote(name)} {'String' if name == 'message_id' else self.types[kind]}"
                for name, kind in self.columns.items()
            )
            more = ", ver UInt64" if "(ver)" in self.engine_of else ""
            client.command(
                f"CREATE TABLE IF NOT EXISTS {quote(table)} ({declared}{more}) ENGINE ="
                f" {self.engine_of} PARTITION BY toYYYYMMDD(ifNull(timestamp, toDateTime(0)))"
                f" ORDER BY message_id SETTINGS {self.settings}"
            )
            names = list(self.columns)
            client.insert(
                table,
                [[row.get(name) for name in names] for row in rows],
                database="test",
                column_names=names,
            )

        return write

    @pytest.fixture
    def read_rows(self, client: Any) -> ReadRows:
        def read(table: str) -> list[dict[str, object]]:
            final = " FINAL" if self.engine_of != "MergeTree" else ""
            names = ", ".join(map(quote, self.columns))
            result = client.query(f"SELECT {names} FROM {quote(table)}{final}")
            return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]

        return read


class TestMergeTree(ClickhouseTests):
    """A MergeTree that numbers its rows: what is cheapest, chosen."""


class TestMergeTreeUpdate(ClickhouseTests):
    """Lightweight updates, with their patches applied at once."""

    strategy = "update"
    options: ClassVar[Mapping[str, Any]] = {"patches": "always"}


class TestMergeTreeAlter(ClickhouseTests):
    """ALTER TABLE .. UPDATE, on a table that does not number its rows."""

    settings = "index_granularity = 8192"
    strategy = "alter"


class TestReplacing(ClickhouseTests):
    """A ReplacingMergeTree with a version: whole rows with a higher one, chosen."""

    engine_of = "ReplacingMergeTree(ver)"


class TestReplacingUpdate(ClickhouseTests):
    """A ReplacingMergeTree that is updated in place."""

    engine_of = "ReplacingMergeTree(ver)"
    strategy = "update"


class TestReplacingWithoutVersion(ClickhouseTests):
    """A ReplacingMergeTree in which the last row to be inserted stands."""

    engine_of = "ReplacingMergeTree"
    strategy = "insert"
