"""The sink for ClickHouse, on the embedded engine: the kit by engine and strategy, and its own."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from random import Random
from typing import Any, ClassVar, NamedTuple

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError
from hypothesis import given, settings
from hypothesis import strategies as st

from recognition.errors import (
    ConfigurationError,
    SinkError,
    SinkUnavailableError,
    TableError,
)
from recognition.messages import Between, Equals, Messages
from recognition.planner import plan_updates
from recognition.sinks import Sink, open_sink
from recognition.sinks.clickhouse import _LIVE, _lock_name
from recognition.sinks.clickhouse_statements import Name, Parameter, sql
from recognition.testing import SinkTests
from recognition.testing.sinks import (
    ReadRows,
    Row,
    WriteRows,
    at,
    between,
    device,
    row,
    unknown,
    update,
)

#: `all` runs the kit for each strategy; otherwise those are left out that differ little.
EVERY = os.environ.get("RECOGNITION_TEST_CLICKHOUSE") == "all"
every = pytest.mark.skipif(not EVERY, reason="RECOGNITION_TEST_CLICKHOUSE=all runs it")

NUMBERED = "enable_block_number_column = 1, enable_block_offset_column = 1"

TYPES = {
    "text": "Nullable(String)",
    "time": "Nullable(DateTime64(6, 'UTC'))",
    "integer": "Nullable(Int64)",
    "float": "Nullable(Float64)",
    "boolean": "Nullable(Bool)",
}


def _shard(*ports: int, host: str = "127.0.0.1") -> str:
    """https://clickhouse.com/docs/engines/table-engines/special/distributed#distributed-clusters"""
    replicas = "".join(
        f"<replica><host>{host}</host><port>{port}</port></replica>" for port in ports
    )
    return f"<shard>{replicas}</shard>"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """
    The directory of the embedded engine: a process has one at a time.

    The client that is held open keeps the engine running from test to test. Clusters are known to
    it by name alone: nothing listens on their ports, and only the host itself can be asked.
    """
    path = str(tmp_path_factory.mktemp("chdb"))
    config = tmp_path_factory.mktemp("config") / "config.xml"
    config.write_text(
        "<clickhouse><tcp_port>9000</tcp_port><remote_servers>"
        f"<one>{_shard(9000)}</one><copies>{_shard(9000, 9001)}</copies>"
        f"<two>{_shard(9000)}{_shard(9001, host='127.0.0.2')}</two>"
        f"<away>{_shard(9001, host='127.0.0.2')}</away>"
        "</remote_servers></clickhouse>"
    )
    client = clickhouse_connect.get_client(interface="chdb", path=f"{path}?config-file={config}")
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
    every_column_is_a_key: ClassVar[bool] = False

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
            key = ", ".join(map(quote, self.columns)) if self.every_column_is_a_key else ""
            client.command(
                f"CREATE TABLE IF NOT EXISTS {quote(table)} ({declared}{more}) ENGINE ="
                f" {self.engine_of} PARTITION BY toYYYYMMDD(ifNull(timestamp, toDateTime(0)))"
                f" ORDER BY ({key or 'message_id'}) SETTINGS {self.settings}"
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


@every
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


@every
class TestMovedRows(ClickhouseTests):
    """Whatever is set is in the sorting key: rows are inserted again and deleted, chosen."""

    settings = f"{NUMBERED}, allow_nullable_key = 1"
    every_column_is_a_key = True


@every
class TestReplacingMovedRows(ClickhouseTests):
    """The same in a ReplacingMergeTree, with patches applied at once."""

    engine_of = "ReplacingMergeTree(ver)"
    settings = f"{NUMBERED}, allow_nullable_key = 1"
    every_column_is_a_key = True
    options: ClassVar[Mapping[str, Any]] = {"patches": "always"}


@every
class TestReplacingUpdate(ClickhouseTests):
    """A ReplacingMergeTree that is updated in place."""

    engine_of = "ReplacingMergeTree(ver)"
    strategy = "update"


@every
class TestReplacingWithoutVersion(ClickhouseTests):
    """A ReplacingMergeTree in which the last row to be inserted stands."""

    engine_of = "ReplacingMergeTree"
    strategy = "insert"


# What a table is ----------------------------------------------------------------------------------

EVENTS = (
    "message_id String, anonymous_id Nullable(String), user_id Nullable(String),"
    " timestamp DateTime64(6, 'UTC'), recognition_version Nullable(Int64)"
)
BY_DAY = "PARTITION BY toYYYYMMDD(timestamp) ORDER BY (toDate(timestamp), message_id)"


class Opened:
    """A table and sinks on it."""

    def __init__(self, engine: str, client: Any) -> None:
        self.engine, self.client = engine, client
        self.sinks: list[Sink] = []

    def table(
        self, columns: str = EVENTS, rest: str = BY_DAY, settings: str = NUMBERED, engine: str = ""
    ) -> None:
        """Make ``events``."""
        engine = engine or "MergeTree"
        self.client.command(
            f"CREATE TABLE events ({columns}) ENGINE = {engine} {rest} SETTINGS {settings}"
        )

    def rows(self, *rows: Row, table: str = "events") -> None:
        """Insert rows that have the same columns."""
        names = list(rows[0])
        lists = [[each[name] for name in names] for each in rows]
        self.client.insert(table, lists, database="test", column_names=names)

    def sink(self, **options: Any) -> Any:
        """A sink, closed with the test."""
        strategy = options.pop("strategy", "auto")
        url = f"chdb://{self.engine}?database=test&strategy={strategy}"
        self.sinks.append(open_sink(url, **{"timeout": 5, **options}))
        return self.sinks[-1]

    def apply(self, *updates: Any, **options: Any) -> Any:
        """By a sink of its own."""
        return self.sink(**options).apply(plan_updates(updates))

    def column(self, name: str, final: str = "") -> dict[str, object]:
        """What a column holds, by message."""
        return dict(self.client.query(f"SELECT message_id, {name} FROM events {final}").result_rows)

    def parts(self) -> list[str]:
        """The names of the parts that hold rows."""
        found = self.client.query(
            "SELECT name FROM system.parts WHERE active AND database = 'test' AND table = 'events'"
            " ORDER BY name"
        )
        return [name for (name,) in found.result_rows]

    def made(self) -> list[str]:
        """What windows have left."""
        found = self.client.query(
            "SELECT name FROM system.tables WHERE database = 'test' AND name LIKE 'recognition%'"
            " AND name != 'recognition_ledger'"
        )
        return [name for (name,) in found.result_rows]


@pytest.fixture
def opened(engine: str, client: Any) -> Iterator[Opened]:
    """Sinks on an empty database."""
    opened = Opened(engine, client)
    yield opened
    for sink in opened.sinks:
        sink.close()


def owner(sequence: int, user: str, *where: Any, **more: Any) -> Any:
    """An update of ``user_id`` by version."""
    return update(sequence, {"user_id": user}, *where, unknown(), versioned=True, **more)


def refusal(applied: Any) -> str:
    """The one reason of what was refused."""
    [(_, error)] = applied.rejected
    assert isinstance(error, TableError)
    assert not error.written
    return str(error)


BY_OWNER = (
    "PARTITION BY cityHash64(ifNull(user_id, '')) % 7"
    " ORDER BY (coalesce(user_id, anonymous_id), message_id)"
)
KEYED = f"{NUMBERED}, allow_nullable_key = 1"


def test_a_column_of_a_key_is_refused_with_what_to_change(opened: Opened) -> None:
    """A column that is set and in ORDER BY needs numbered rows; the text says the command."""
    opened.table(rest=BY_OWNER, settings="allow_nullable_key = 1")
    opened.rows(row("m1", "a1", 1))

    said = refusal(opened.apply(owner(1, "u1", device("a1"))))
    command = said.partition("run: ")[2].partition(")")[0]
    opened.client.command(command)
    applied = opened.apply(owner(1, "u1", device("a1")))

    assert "update, alter, insert: 'user_id' is in a key" in said
    assert "--target-column" in said
    assert (applied.rejected, applied.rows_changed) == ((), 1)


@pytest.mark.parametrize(
    ("columns", "engine_of", "more", "said"),
    [
        (f"{EVENTS}, sign Int8", "CollapsingMergeTree(sign)", "", "a row of a CollapsingMergeTree"),
        (EVENTS, "ReplacingMergeTree", "", "in a ReplacingMergeTree with a version"),
        (EVENTS, "MergeTree", "CREATE MATERIALIZED VIEW v ENGINE = Memory AS SELECT 1", "view"),
        (f"{EVENTS}, PROJECTION p (SELECT user_id ORDER BY user_id)", "MergeTree", "", "projec"),
    ],
)
def test_rows_are_not_moved_where_that_could_be_undone(
    opened: Opened, columns: str, engine_of: str, more: str, said: str
) -> None:
    """Where rows merge into others, or are read elsewhere, a column of a key is refused."""
    opened.table(columns, BY_OWNER, KEYED, engine_of)
    if more:
        opened.client.command(f"{more} FROM events")

    reason = refusal(opened.apply(owner(1, "u1", device("a1"))))
    forced = refusal(opened.apply(owner(1, "u1", device("a1")), strategy="delete-and-insert"))

    assert "delete-and-insert: " in reason
    assert said in reason
    assert said in forced


def test_rows_are_moved_to_the_key_that_they_get(opened: Opened) -> None:
    """Each row once and whole, the same row twice stays twice, and again nothing is written."""
    opened.table(f"{EVENTS}, more JSON, map Map(String, String)", BY_OWNER, KEYED)
    more = {"more": '{"x": {"y": [1, "z"]}}', "map": {"k": "v"}}
    rows = [row(f"m{n % 15}", f"a{n % 3}", n % 15, **more) for n in range(20)]
    opened.rows(*rows)
    sink = opened.sink(patches="never")
    plan = plan_updates([owner(1, "u1", device("a1")), owner(2, "u2", device("a2"))])

    said = sink.compile(plan.steps[0])
    applied = sink.apply(plan)
    parts = opened.parts()
    again = sink.apply(plan)

    met = sum(each["anonymous_id"] != "a0" for each in rows)
    assert "DELETE FROM `test`.`events` WHERE" in said
    assert "-- update: not possible, 'user_id' is in a key" in said
    assert (applied.rows_changed, again.rows_changed, again.rows_matched) == (met, 0, met)
    assert opened.parts() == parts
    users = {"a0": None, "a1": "u1", "a2": "u2"}
    found = opened.client.query(
        "SELECT message_id, user_id, toUnixTimestamp(timestamp), toString(more), map FROM events"
    )
    expected = [
        (
            each["message_id"],
            users[str(each["anonymous_id"])],
            int(at(n % 15).timestamp()),
            '{"x":{"y":[1,"z"]}}',
            {"k": "v"},
        )
        for n, each in enumerate(rows)
    ]
    assert sorted(found.result_rows, key=str) == sorted(expected, key=str)
    assert opened.made() == []


def test_rows_that_a_constraint_forbids_hold_up_no_others(opened: Opened) -> None:
    """They stay as they were, the update is refused, and the next window applies."""
    forbids = "CONSTRAINT known CHECK user_id IS NULL OR user_id != 'u1'"
    opened.table(f"{EVENTS}, {forbids}", BY_OWNER, KEYED)
    opened.rows(*(row(f"m{n}", f"a{n % 3}", n) for n in range(9)))
    sink = opened.sink()

    with pytest.raises(TableError, match=r"a CONSTRAINT of the table.*none of them was changed"):
        sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    left = opened.made()
    applied = sink.apply(plan_updates([owner(2, "u2", device("a2"))]))

    assert (left, applied.rows_changed) == ([], 3)
    assert opened.column("user_id") == {f"m{n}": "u2" if n % 3 == 2 else None for n in range(9)}


class _Interrupted(Exception):
    """The process is gone, as far as the test goes."""


#: The statements of a move, in their order.
MOVING = (
    "INSERT INTO `test`.`recognition_stage_",
    "RENAME TABLE `test`.`recognition_stage_",
    "INSERT INTO `test`.`events`",
    "DELETE FROM",
    "DROP TABLE IF EXISTS `test`.`recognition_moved_",
)


@pytest.mark.parametrize(
    "engine_of", ["MergeTree", pytest.param("ReplacingMergeTree(ver)", marks=every)]
)
def test_a_move_that_stops_anywhere_is_completed(opened: Opened, engine_of: str) -> None:
    """
    Before or after any statement the worker is gone: the next one completes what was begun.

    Before it does, others insert rows, among them one that is there already.
    """
    rows = [row(f"m{n % 4}", f"a{n % 2}", n % 4, ver=1) for n in range(6)]
    late = [row("late", "a1", 9, ver=1), rows[1]]
    for place, after in [(place, after) for place in range(len(MOVING)) for after in (0, 1)]:
        opened.client.command("DROP TABLE IF EXISTS events SYNC")
        opened.table(f"{EVENTS}, ver UInt64", BY_OWNER, KEYED, engine_of)
        opened.rows(*rows)
        sink = opened.sink()
        _stop_at(sink, MOVING[place], after)
        with pytest.raises(_Interrupted):
            sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
        opened.rows(*late)

        opened.apply(owner(2, "u2", device("a1")))

        final = "" if engine_of == "MergeTree" else "FINAL"
        found = opened.client.query(f"SELECT message_id, user_id FROM events {final}").result_rows
        expected = [
            (each["message_id"], "u2" if each["anonymous_id"] == "a1" else None)
            for each in [*rows, *late]
        ]
        expected = expected if engine_of == "MergeTree" else list({*expected})
        assert sorted(found, key=str) == sorted(expected, key=str), (MOVING[place], after)
        assert [name for name in opened.made() if "broken" not in name] == []


def _stop_at(sink: Any, pattern: str, after: int) -> None:
    """The sink goes no further than this statement, before it or after it."""
    server = sink._server

    def run(statement: Any, *args: Any, **more: Any) -> None:
        here = statement.render()[0].startswith(pattern)
        if here and not after:
            raise _Interrupted
        type(server).run(server, statement, *args, **more)
        if here:
            raise _Interrupted

    server.run = run


def test_rows_that_come_while_others_are_moved_stay(opened: Opened) -> None:
    """After each statement somebody inserts a row: none is lost, and again moves it too."""
    opened.table(rest=BY_OWNER, settings=KEYED)
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(5)))
    sink = opened.sink()
    came = 0

    def run(statement: Any, *args: Any, **kw: Any) -> None:
        nonlocal came
        type(sink._server).run(sink._server, statement, *args, **kw)
        opened.rows(row(f"new{came}", "a1", 1))
        came += 1

    sink._server.run = run
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    del sink._server.run
    found = opened.client.query("SELECT count(), uniqExact(message_id) FROM events").result_rows
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))

    assert found == [(5 + came, 5 + came)]
    assert set(opened.column("user_id").values()) == {"u1"}


def test_a_forced_strategy_that_is_not_possible_says_what_makes_it_so(opened: Opened) -> None:
    """Without numbered rows an update in place is refused, until the command was run."""
    opened.table(settings="index_granularity = 8192")
    opened.rows(row("m1", "a1", 1))

    said = refusal(opened.apply(owner(1, "u1", device("a1")), strategy="update"))
    command = said.partition("run: ")[2].partition(" (possible")[0]
    opened.client.command(command)
    applied = opened.apply(owner(1, "u1", device("a1")), strategy="update")

    assert "possible: alter" in said
    assert (applied.rejected, applied.rows_changed) == ((), 1)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("CREATE VIEW events AS SELECT 1 AS message_id", "it is a view"),
        (f"CREATE TABLE events ({EVENTS}) ENGINE = Memory", "its engine is Memory"),
        (
            f"CREATE TABLE events ({EVENTS.replace('user_id Nullable(String)', 'user_id JSON')})"
            " ENGINE = MergeTree ORDER BY message_id",
            "it is JSON",
        ),
        (
            f"CREATE TABLE events ({EVENTS.replace('DateTime64(6, ', 'String, x DateTime(')})"
            " ENGINE = MergeTree ORDER BY message_id",
            "and no time",
        ),
    ],
)
def test_what_cannot_be_updated_is_refused(opened: Opened, statement: str, said: str) -> None:
    """Views, other engines and columns that hold no value are refused, each by its reason."""
    opened.client.command(statement)

    applied = opened.apply(owner(1, "u1", device("a1"), between(0, 9)))

    assert said in refusal(applied)


def test_a_distributed_table_of_one_shard_is_its_local_one(opened: Opened) -> None:
    """Where all rows lie in one table of this host, that one is updated, whatever it is called."""
    opened.table()
    opened.client.command("RENAME TABLE events TO events_local")
    opened.client.command(
        f"CREATE TABLE events ({EVENTS})"
        " ENGINE = Distributed('one', 'test', 'events_local', rand())"
    )
    opened.rows(row("m1", "a1", 1), row("m2", "a2", 1))
    sink = opened.sink()
    plan = plan_updates([owner(1, "u1", device("a1"))])

    said = sink.compile(plan.steps[0])
    applied, again = sink.apply(plan), sink.apply(plan)

    assert "TABLE `test`.`events_local` UPDATE" in said or "UPDATE `test`.`events_local`" in said
    assert (applied.rows_changed, again.rows_changed, again.rows_matched) == (1, 0, 1)
    assert opened.column("user_id") == {"m1": "u1", "m2": None}


@pytest.mark.parametrize(
    ("cluster", "database", "said"),
    [
        ("two", "test", "2 shards (127.0.0.1; 127.0.0.2), and a statement changes rows of one"),
        ("away", "test", "1 shards (127.0.0.2), and"),
        ("copies", "test", "2 replicas of 'test.events_local', whose engine is MergeTree"),
        ("one", "", "does not say in which database"),
        ("one", "gone", "'gone.events_local', which is not there"),
    ],
)
def test_a_distributed_table_is_refused_where_a_host_is_not_all(
    opened: Opened, cluster: str, database: str, said: str
) -> None:
    """The text names the table that holds the rows, and the hosts of each shard."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    opened.client.command("RENAME TABLE events TO events_local")
    opened.client.command(
        f"CREATE TABLE events ({EVENTS})"
        f" ENGINE = Distributed('{cluster}', '{database}', 'events_local')"
    )

    reason = refusal(opened.apply(owner(1, "u1", device("a1"))))

    assert "it is Distributed" in reason
    assert said in reason


#: By the engine of a table that has no keeper here: the one it is made with, and its key.
COPIES = [
    ("ReplicatedMergeTree", "MergeTree", BY_DAY, "UPDATE `"),
    ("SharedMergeTree", "MergeTree", BY_DAY, "UPDATE `"),
    ("ReplicatedReplacingMergeTree", "ReplacingMergeTree(ver)", BY_DAY, "INSERT INTO `test`.`ev"),
    ("ReplicatedMergeTree", "MergeTree", BY_OWNER, "DELETE FROM `"),
]


@pytest.mark.parametrize(("engine_of", "made", "rest", "chosen"), COPIES)
def test_the_parser_knows_what_is_sent_for_replicated_tables(
    opened: Opened, engine_of: str, made: str, rest: str, chosen: str
) -> None:
    """
    Each statement for a replicated table, of every strategy that it can have, is the engine's own.

    There is no keeper here: the table is said to be replicated, and is carried out on what is not.
    """
    opened.table(f"{EVENTS}, ver UInt64", rest, KEYED, made)
    opened.rows(*(row(f"m{n}", f"a{n % 2}", n * 90_000.0, ver=1) for n in range(4)))
    sink = opened.sink(patches="always")
    sink.compile(plan_updates([owner(1, "u1", device("a1"))]).steps[0])
    table = sink._tables["events"] = replace(sink._tables["events"], engine=engine_of)
    sent: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    _record(sink, sent)

    several = [(between(10, 100_000), "u1"), (between(200_000, 300_000), "u2")]
    updates = [owner(n, u, device("a1"), time) for n, (time, u) in enumerate(several, start=1)]
    applied = sink.apply(plan_updates(updates))
    sink.apply(plan_updates([update(9, {"user_id": "u3"}, device("a0"), unknown())]))

    assert table.replicated
    assert applied.rows_changed == 2
    assert any(text.startswith(chosen) for text, _, _ in sent)
    assert not any(re.match("ALTER TABLE .* UPDATE", text) for text, _, _ in sent)
    for text, parameters, sent_with in sent:
        [[formatted]] = opened.client.query(
            "SELECT formatQuerySingleLine({text:String})", parameters={"text": text}
        ).result_rows
        again = opened.client.query(
            "SELECT formatQuerySingleLine({text:String})", parameters={"text": formatted}
        )
        assert again.result_rows == [(formatted,)]
        assert opened.client.command(f"EXPLAIN AST {text}", parameters=parameters)
        if text.startswith(("UPDATE", "DELETE", "ALTER")):
            assert sent_with["mutations_sync"] == 2
            assert sent_with["allow_nondeterministic_mutations"] == 1
    with pytest.raises(ClickHouseError, match="SYNTAX_ERROR"):
        opened.client.command(f"EXPLAIN AST {sent[-1][0]} ON SHARD")


def _record(sink: Any, sent: list[Any]) -> None:
    """Let the sink note what it sends, with parameters and settings, and send it."""
    server = sink._server

    def run(statement: Any, settings: Any = None, **more: Any) -> None:
        sent.append((*statement.render(), settings or {}))
        type(server).run(server, statement, settings, **more)

    def rows(statement: Any) -> Any:
        sent.append((*statement.render(), {}))
        return type(server).rows(server, statement)

    server.run, server.rows = run, rows


@pytest.mark.parametrize(
    ("anonymous", "user", "time"),
    [
        ("String", "String", "DateTime64(3, 'Asia/Tokyo')"),
        ("LowCardinality(Nullable(String))", "LowCardinality(Nullable(String))", "DateTime"),
        ("LowCardinality(String)", "LowCardinality(String)", "Nullable(DateTime64(9, 'UTC'))"),
    ],
)
@pytest.mark.parametrize("strategy", ["update", "alter"])
def test_columns_of_any_wrapping_are_read_and_set(
    opened: Opened, anonymous: str, user: str, time: str, strategy: str
) -> None:
    """Unknown is NULL, or '' where NULL cannot be; keys and times of any wrapping are compared."""
    opened.table(
        f"message_id String, anonymous_id {anonymous}, user_id {user}, timestamp {time},"
        " recognition_version Int64",
        "ORDER BY message_id",
    )
    empty = None if "Nullable" in user else ""
    opened.rows(
        row("m1", "a1", 1, user_id=empty),
        row("late", "a1", 60, user_id=empty),
        row("known", "a1", 2, user_id="u9"),
        row("other", "a2", 1, user_id=empty),
    )
    wanted = [owner(1, "u1", device("a1"), between(0, 60)), owner(2, "u2", device("a2"))]

    first = opened.apply(*wanted, strategy=strategy)
    second = opened.apply(*wanted, strategy=strategy)

    assert opened.column("user_id") == {"m1": "u1", "late": empty, "known": "u9", "other": "u2"}
    assert (first.rows_changed, second.rows_changed, second.rows_matched) == (2, 0, 2)


def test_a_key_may_be_a_uuid_or_a_number(opened: Opened) -> None:
    """A key is found by its value, whatever holds it."""
    opened.table(
        "message_id String, anonymous_id UUID, n UInt32, user_id Nullable(String),"
        " timestamp DateTime64(6, 'UTC'), recognition_version Nullable(Int64)",
        "ORDER BY message_id",
    )
    one, other = "6f0c5ad6-0f3c-4b58-9c58-4a2f6f8f3a11", "7f0c5ad6-0f3c-4b58-9c58-4a2f6f8f3a11"
    opened.rows(row("m1", one, 1, n=1), row("m2", other, 1, n=2), row("m3", other, 1, n=3))

    applied = opened.apply(
        owner(1, "u1", device(one.upper())),
        owner(2, "u2", Equals(column="n", value=3), device(other)),
        owner(3, "u3", device("no uuid")),
        owner(4, "u4", Equals(column="n", value=-1)),
    )

    assert opened.column("user_id") == {"m1": "u1", "m2": None, "m3": "u2"}
    assert sorted(id for id, _ in applied.rejected) == ["events-3", "events-4"]


def test_values_of_a_column_that_cannot_be_null_become_empty(opened: Opened) -> None:
    """Null, set in a column that cannot hold it, is the type's empty value."""
    opened.table(
        "message_id String, anonymous_id String, stitched_user_id String, at DateTime, n UInt8,"
        " timestamp DateTime64(6, 'UTC')",
        "ORDER BY message_id",
    )
    opened.rows(row("m1", "a1", 1, stitched_user_id="u", at=at(0), n=7))

    applied = opened.apply(
        update(1, {"stitched_user_id": None, "at": None, "n": None}, device("a1"))
    )

    assert applied.rejected == ()
    found = opened.client.query("SELECT stitched_user_id, toUnixTimestamp(at), n FROM events")
    assert found.result_rows == [("", 0, 0)]


def test_times_are_set_and_have_a_range(opened: Opened) -> None:
    """A time is set as the column holds it; one that it cannot hold is refused."""
    opened.table(f"{EVENTS}, seen Nullable(DateTime64(3, 'UTC')), day Nullable(Date)", BY_DAY)
    opened.rows(row("m1", "a1", 1))

    times = {"seen": "2026-01-02T03:04:05.678Z", "day": "2026-01-02"}
    opened.apply(update(1, times, device("a1")))
    applied = opened.apply(update(2, {"day": "2200-01-01T00:00:00Z"}, device("a1")))

    found = opened.client.query("SELECT toString(seen), toString(day) FROM events")
    assert found.result_rows == [("2026-01-02 03:04:05.678", "2026-01-02")]
    assert [id for id, _ in applied.rejected] == ["events-2"]


# What is touched ----------------------------------------------------------------------------------

DAY = 86_400


@pytest.mark.parametrize("strategy", ["update", "alter"])
def test_partitions_without_matches_are_not_touched(opened: Opened, strategy: str) -> None:
    """Only the partitions that the times meet, and that hold such rows, get new parts."""
    opened.table()
    opened.rows(*(row(f"m{n}", f"a{n % 2}", n * DAY) for n in range(6)))
    before = set(opened.parts())

    applied = opened.apply(
        owner(1, "u1", device("a1"), between(0, 4 * DAY)), strategy=strategy, patches="never"
    )

    added = {name for name in opened.parts() if name not in before}
    days = {re.sub(r"^patch-\w+-", "", name).partition("_")[0] for name in added}
    assert applied.rows_changed == 2
    assert opened.column("user_id") == {f"m{n}": "u1" if n in (1, 3) else None for n in range(6)}
    if strategy == "update":
        assert days == {"20260102", "20260104"}
    else:
        # A MergeTree clones the parts of the others, by a link; a mutation says what it rewrote.
        assert days >= {"20260102", "20260104"}


def test_a_mutation_has_one_command_for_all_partitions(opened: Opened) -> None:
    """Each command of an ALTER is one more pass over every part; there is one, of a step."""
    opened.table()
    opened.rows(*(row(f"m{n}", f"a{n % 3 == 2}", n * DAY) for n in range(6)))

    applied = opened.apply(owner(1, "u1", device("aFalse"), between(0, 9 * DAY)), strategy="alter")

    mutations = opened.client.query(
        "SELECT is_done FROM system.mutations WHERE database = 'test' AND table = 'events'"
    )
    assert applied.rows_changed == 4
    assert opened.column("user_id") == {f"m{n}": None if n % 3 == 2 else "u1" for n in range(6)}
    assert mutations.result_rows == [(1,)]


def test_applying_again_writes_no_part(opened: Opened) -> None:
    """The second time not one part is made, by either way."""
    opened.table()
    opened.rows(*(row(f"m{n}", f"a{n % 3}", n) for n in range(30)))
    wanted = [owner(n, f"u{n}", device(f"a{n}")) for n in range(3)]
    parts = {}
    for strategy in ("update", "alter"):
        opened.apply(*wanted, strategy=strategy)
        parts[strategy] = opened.parts()

        again = opened.apply(*wanted, strategy=strategy)

        assert opened.parts() == parts[strategy]
        assert (again.rows_changed, again.rows_matched) == (0, 30)


def test_patches_are_applied_by_policy(opened: Opened) -> None:
    """`always` leaves no patch part behind, `never` leaves it to merges."""
    opened.table()
    opened.rows(*(row(f"m{n}", f"a{n}", n) for n in range(30)))

    opened.apply(owner(1, "u1", device("a1")), strategy="update", patches="never")
    waiting = [name for name in opened.parts() if name.startswith("patch-")]
    opened.apply(owner(2, "u2", device("a2")), strategy="update", patches="always")

    assert len(waiting) == 1
    assert [name for name in opened.parts() if not name.startswith("patch-")]
    assert opened.column("user_id")["m2"] == "u2"
    pending = opened.client.query(
        "SELECT sum(has_pending) FROM (SELECT name LIKE 'patch-%' AS has_pending FROM system.parts"
        " WHERE active AND database = 'test' AND table = 'events' AND rows > 0)"
    )
    assert pending.result_rows[0][0] <= 2  # parts that are applied go with the next merge


def test_patches_that_were_applied_are_not_counted(opened: Opened) -> None:
    """
    The engine keeps applied patch parts for half a minute; they wait for nothing.

    A row that comes after them has to stay out of that, and a patch that comes later counts.
    """
    opened.table()
    opened.rows(*(row(f"m{n}", f"a{n}", 1) for n in range(5)), row("other", "a0", 3 * 86_400))
    sink = opened.sink(strategy="update", patches="never")
    sink.apply(plan_updates([owner(1, "u0", device("a0"))]))

    def waiting() -> list[tuple[int, int]]:
        with sink._server.use():
            return [tuple(line[3:5]) for line in sink._survey(sink._find("events")).partitions]

    written = waiting()
    opened.client.command("ALTER TABLE events APPLY PATCHES")
    applied, there = waiting(), [name for name in opened.parts() if name.startswith("patch-")]
    opened.rows(row("late", "a9", 1))
    late = waiting()
    sink.apply(plan_updates([owner(2, "u9", device("a9"))]))

    assert written == [(1, 1), (1, 1)]
    assert there
    assert applied == late == [(0, 0), (0, 0)]
    assert waiting() == [(1, 1), (0, 0)]


def test_a_window_reads_few_of_many_notes(opened: Opened) -> None:
    """What was noted before a window was decided is not read for it; of the rest its keys are."""
    opened.table()
    opened.rows(row("m1", "a1", 1), row("m2", "a77", 1))
    sink = opened.sink()
    sink.apply(plan_updates([update(1, {"user_id": "u"}, device("other"), unknown())]))
    opened.client.command(
        "INSERT INTO recognition_ledger SELECT 'events', 'anonymous_id', concat('a', number),"
        " 'w1', number + 2, toString(number), '', '', '[]', 'user_id', '', '', 0, 9,"
        " now() - toIntervalDay(29) + toIntervalDay(intDiv(number, 20000)) FROM numbers(600000)"
    )
    server, looked = sink._server, []

    def rows(statement: Any) -> Any:
        text, parameters = statement.render()
        if "recognition_ledger` AS ledger" in text:
            told = opened.client.query(f"EXPLAIN ESTIMATE {text}", parameters=parameters)
            looked.append(sum(line[3] for line in told.result_rows if "ledger" in line[1]))
        return type(server).rows(server, statement)

    server.rows = rows

    def read(sequence: int) -> list[int]:
        looked.clear()
        plan = plan_updates([update(sequence, {"user_id": "u1"}, device("a1"), unknown())])
        assert sink.apply(plan).rows_changed == (sequence == 700_000)
        return list(looked)

    assert read(700_000) == [0]
    [among, of_key] = read(595_000)
    assert among <= 20_000
    assert of_key <= 8_192 * 2


def test_messages_of_one_device_meet_each_note_once(opened: Opened) -> None:
    """Many messages that come late are compared with as many notes, and not each with all."""
    opened.table()
    count = 300
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(count + 1)))
    refs = tuple((f"m{n}", at(n)) for n in range(count + 1))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    fewer = named.model_copy(update={"refs": refs[:-1]})
    sink = opened.sink()
    sink.apply(plan_updates([update(2, {"user_id": "B"}, device("a1"), fewer)]))
    sent: list[int] = []

    def rows(statement: Any) -> Any:
        found = type(sink._server).rows(sink._server, statement)
        if "DISTINCT staged.position" in statement.render()[0]:
            sent.append(len(found))
        return found

    sink._server.rows = rows

    sink.apply(plan_updates([update(1, {"user_id": "A"}, device("a1"), named)]))

    users = opened.column("user_id")
    assert sent == [count]
    assert {name for name, user in users.items() if user != "B"} == {f"m{count}"}
    assert users[f"m{count}"] == "A"


def test_ids_that_are_uuids_are_the_same_in_any_spelling(opened: Opened) -> None:
    """What a later update named by a UUID in capitals, as iOS writes them, an older one leaves."""
    opened.table(EVENTS.replace("message_id String", "message_id UUID"))
    name = "00000000-0000-0ABC-0000-000000000000"
    opened.rows(row(name, "a1", 1))
    named = Messages(id_column="message_id", time_column="timestamp", refs=((name, at(1)),))

    opened.apply(update(2, {"user_id": "B"}, device("a1"), named))
    opened.apply(update(1, {"user_id": "A"}, device("a1"), named))

    assert [*opened.column("user_id").values()] == ["B"]


def test_messages_prune_by_their_days(opened: Opened) -> None:
    """Messages reach their rows in a table that is sorted by day, across zones and midnights."""
    opened.table(EVENTS.replace("'UTC'", "'America/New_York'"))
    seconds = [n * 7200.25 for n in range(24)]
    opened.rows(*(row(f"m{n}", "a1", second) for n, second in enumerate(seconds)))
    refs = tuple((f"m{n}", at(second)) for n, second in enumerate(seconds) if n % 5 == 0)
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)

    one = opened.apply(owner(1, "u1", named))
    two = opened.apply(
        owner(2, "u2", device("a1"), named.model_copy(update={"refs": (("m1", at(seconds[1])),)}))
    )

    expected = {f"m{n}": "u1" if n % 5 == 0 else None for n in range(24)}
    assert opened.column("user_id") == {**expected, "m1": "u2"}
    assert (one.rows_changed, two.rows_changed) == (5, 1)


def _counted(opened: Opened, work: Callable[[], object]) -> dict[str, int]:
    """By how much the engine's counters rose: https://clickhouse.com/docs/operations/system-tables/events"""

    def read() -> dict[str, int]:
        return dict(opened.client.query("SELECT event, value FROM system.events").result_rows)

    before = read()
    work()
    return {name: value - before.get(name, 0) for name, value in read().items()}


@pytest.mark.parametrize("version", [(26, 9), (25, 7)])
@pytest.mark.parametrize(
    ("rest", "wanted", "granules"),
    [
        ("ORDER BY (anonymous_id, timestamp)", [device("a3000")], 3),
        ("ORDER BY (toDate(timestamp), anonymous_id)", [device("a3000")], 12),
        (
            "ORDER BY (toDate(timestamp), message_id)",
            [
                Messages(
                    id_column="message_id", time_column="timestamp", refs=(("m3000", at(3000)),)
                )
            ],
            3,
        ),
    ],
)
def test_an_update_reads_the_granules_of_its_keys(
    opened: Opened, version: tuple[int, int], rest: str, wanted: list[Any], granules: int
) -> None:
    """A key leaves out most of a table that is sorted by it, whatever the server's version."""
    opened.table(rest=rest, settings=f"{NUMBERED}, index_granularity = 64, allow_nullable_key = 1")
    opened.rows(*(row(f"m{n:04}", f"a{n:04}", n) for n in range(6400)))
    sink = opened.sink(strategy="update")
    plan = plan_updates([owner(1, "u1", *wanted)])
    sink.compile(plan.steps[0])
    sink._server.version = version

    changed: list[int] = []
    counted = _counted(opened, lambda: changed.append(sink.apply(plan).rows_changed))

    assert changed == [1]
    assert opened.column("user_id")["m3000"] == "u1"
    left_out = counted["SelectedMarksTotal"] - counted["SelectedMarks"]
    assert left_out >= 2 * (100 - granules)  # by the update, and where it counts what it met


def test_a_message_whose_time_was_rounded_into_the_next_day_is_found(opened: Opened) -> None:
    """The last half second of a day may be stored as the first of the next one."""
    opened.table(EVENTS.replace("DateTime64(6, 'UTC')", "DateTime('UTC')"))
    opened.rows(row("m1", "a1", DAY / 2))
    named = Messages(
        id_column="message_id", time_column="timestamp", refs=(("m1", at(DAY / 2 - 0.1)),)
    )

    assert opened.apply(owner(1, "u1", named)).rows_changed == 1


def test_one_device_may_have_many_intervals(opened: Opened) -> None:
    """Many intervals of one device are one statement, values and nulls in their places."""
    opened.table(f"{EVENTS}, stitched_user_id Nullable(String)")
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(40)))
    wanted = [
        update(n, {"stitched_user_id": f"u{n}" if n % 3 else None}, device("a1"), between(n, n + 1))
        for n in range(30)
    ]

    applied = opened.apply(*wanted)

    expected = {f"m{n}": f"u{n}" if n < 30 and n % 3 else None for n in range(40)}
    assert opened.column("stitched_user_id") == expected
    assert len(applied.steps) == 1


# Rows that are replaced ---------------------------------------------------------------------------


def test_a_row_that_is_delivered_again_does_not_undo_a_higher_version(opened: Opened) -> None:
    """In a ReplacingMergeTree the row with the user stays, and key and partition are the same."""
    columns = f"{EVENTS}, ver UInt64, deleted UInt8"
    opened.table(columns, engine="ReplacingMergeTree(ver, deleted)")
    before = [row("m1", "a1", 1, ver=5, deleted=0), row("m2", "a1", 2, ver=5, deleted=1)]
    opened.rows(*before)
    applied = opened.apply(owner(1, "u1", device("a1")))

    opened.rows(*before)

    assert (applied.rows_changed, applied.rows_matched) == (1, 1)
    assert opened.column("user_id", "FINAL") == {"m1": "u1"}
    assert opened.client.query("SELECT DISTINCT _partition_id FROM events").result_rows == [
        ("20260101",)
    ]


def test_a_materialized_view_does_not_take_rows_twice(opened: Opened) -> None:
    """Where a view would count a replaced row again, the table is updated in place."""
    opened.table(f"{EVENTS}, ver UInt64", engine="ReplacingMergeTree(ver)")
    opened.client.command("CREATE TABLE counts (n UInt64) ENGINE = MergeTree ORDER BY tuple()")
    opened.client.command("CREATE MATERIALIZED VIEW seen TO counts AS SELECT 1 AS n FROM events")
    opened.rows(row("m1", "a1", 1, ver=5))
    sink = opened.sink()
    plan = plan_updates([owner(1, "u1", device("a1"))])

    said = sink.compile(plan.steps[0])
    sink.apply(plan)

    assert "insert: not possible, a materialized view" in said
    assert "1 materialized views will not see the change" in said
    assert opened.column("user_id") == {"m1": "u1"}
    assert opened.client.query("SELECT sum(n) FROM counts").result_rows == [(1,)]


def test_a_table_that_was_altered_is_looked_at_again(opened: Opened) -> None:
    """Types, keys and views are those of now, and not of when the sink first saw the table."""
    sink = opened.sink(patches="never")
    one = "6f0c5ad6-0f3c-4b58-9c58-4a2f6f8f3a11"
    opened.table()
    opened.rows(row("m1", "a1", 1))
    first = sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    # What is unknown is not NULL any more.
    opened.client.command("ALTER TABLE events MODIFY COLUMN user_id String DEFAULT ''")
    opened.rows(row("m2", "a2", 1, user_id=""))
    second = sink.apply(plan_updates([owner(2, "u2", device("a2"))]))
    # Partitions are by another time.
    opened.client.command("DROP TABLE events SYNC")
    columns = EVENTS.replace("anonymous_id Nullable(String)", "anonymous_id UUID")
    opened.table(f"{columns}, came DateTime", "PARTITION BY toYYYYMM(came) ORDER BY message_id")
    opened.rows(row("m3", one, 1, came=at(90 * DAY)))
    third = sink.apply(plan_updates([owner(3, "u3", device(one), between(0, 60))]))
    # A view takes what is inserted.
    opened.client.command("DROP TABLE events SYNC")
    opened.table(f"{EVENTS}, ver UInt8", engine="ReplacingMergeTree(ver)")
    opened.rows(row("m4", "a4", 1, ver=1))
    fourth = sink.apply(plan_updates([owner(4, "u4", device("a4"))]))
    opened.client.command("CREATE TABLE counts (n UInt64) ENGINE = MergeTree ORDER BY n")
    opened.client.command("CREATE MATERIALIZED VIEW seen TO counts AS SELECT 1 AS n FROM events")
    sink.apply(plan_updates([owner(5, "u5", device("a4"))]))

    assert [each.rows_changed for each in (first, second, third, fourth)] == [1] * 4
    assert opened.client.query("SELECT count() FROM counts").result_rows == [(0,)]
    assert opened.column("user_id", "FINAL") == {"m4": "u5"}


def test_a_window_may_meet_any_number_of_partitions(opened: Opened) -> None:
    """Whole rows go into more than 100 partitions at once; the version may have any name."""
    opened.table(f"{EVENTS}, `my ver` UInt64", engine="ReplacingMergeTree(`my ver`)")
    days = [row(f"m{n}", "a1", n * DAY) for n in range(110)]
    opened.rows(*days[:90])
    opened.rows(*days[90:])

    assert opened.apply(owner(1, "u1", device("a1"))).rows_changed == 110


def test_a_key_that_is_computed_from_what_is_set_moves_rows(opened: Opened) -> None:
    """A MATERIALIZED column of ORDER BY follows the user: its rows cannot be set in place."""
    computed = "owner String MATERIALIZED coalesce(user_id, anonymous_id, '')"
    opened.table(f"{EVENTS}, {computed}", "ORDER BY (owner, message_id)")
    opened.rows(row("m1", "a1", 1))

    assert opened.apply(owner(1, "u1", device("a1"))).rows_changed == 1
    assert opened.column("owner") == {"m1": "u1"}


@pytest.mark.parametrize("name", ["start_0", "end_0"])
def test_a_time_column_may_have_any_name(opened: Opened, name: str) -> None:
    """Intervals are compared with the column, whatever the statement calls their ends."""
    opened.table(EVENTS.replace("timestamp", name), BY_DAY.replace("timestamp", name))
    rows = [row(f"m{n}", "a1", n) for n in range(4)]
    opened.rows(*({name if k == "timestamp" else k: v for k, v in r.items()} for r in rows))
    times = [between(n, n + 1).model_copy(update={"column": name}) for n in range(2)]

    opened.apply(*(owner(n, f"u{n}", device("a1"), time) for n, time in enumerate(times)))

    assert opened.column("user_id") == {"m0": "u0", "m1": "u1", "m2": None, "m3": None}


def test_times_that_32_bits_cannot_hold_are_found(opened: Opened) -> None:
    """Of partitions before 1970 and after 2106 the system table tells other times."""
    opened.table()
    years = (1901, 1969, 2026, 2107, 2290)
    for year in years:
        opened.rows({**row(f"m{year}", "a1", 0), "timestamp": at(0).replace(year=year)})
    times = [
        between(0, 1).model_copy(
            update={"start": at(-1).replace(year=year), "end": at(1).replace(year=year)}
        )
        for year in years
    ]

    for n, time_of in enumerate(times):
        opened.apply(owner(n + 1, f"u{n}", device("a1"), time_of))

    assert opened.column("user_id") == {f"m{year}": f"u{n}" for n, year in enumerate(years)}


def test_what_is_merged_into_other_rows_is_refused(opened: Opened) -> None:
    """A sum of versions is none, and a row of a CoalescingMergeTree may be half of one."""
    said = []
    for engine in ("SummingMergeTree", "CoalescingMergeTree"):
        opened.client.command("DROP TABLE IF EXISTS events SYNC")
        opened.table(engine=engine)
        said.append(refusal(opened.apply(owner(1, "u1", device("a1")))))

    assert "add up" in said[0]
    assert "may lack what another" in said[1]


def test_a_table_in_several_spellings_is_refused(opened: Opened) -> None:
    """Of two tables that differ in case alone, neither is taken for the one that was named."""
    for name in ("EVENTS", "Events"):
        opened.client.command(f"CREATE TABLE {name} ({EVENTS}) ENGINE = MergeTree {BY_DAY}")

    said = refusal(opened.apply(owner(1, "u1", device("a1"))))
    exact = opened.apply(update(1, {"user_id": "u1"}, device("a1"), table="Events"))

    assert "there is 'EVENTS' and 'Events'" in said
    assert exact.rejected == ()


# What is in the way -------------------------------------------------------------------------------


#: Settings of a user that would lose, double or hide rows, each with a strategy that it would hit.
MISLEADING = [
    ("delete-and-insert", {"join_use_nulls": 1}),
    ("delete-and-insert", {"apply_patch_parts": 0}),
    ("delete-and-insert", {"apply_deleted_mask": 0}),
    ("insert", {"apply_patch_parts": 0}),
    ("alter", {"enable_positional_arguments": 0}),
    ("update", {"join_default_strictness": "ANY"}),
    ("update", {"limit": 1, "offset": 1}),
    ("update", {"data_type_default_nullable": 1}),
    ("update", {"aggregate_functions_null_for_empty": 1}),
]


@pytest.mark.parametrize(("strategy", "given_to_user"), MISLEADING)
def test_settings_of_the_user_change_nothing(
    opened: Opened, strategy: str, given_to_user: Mapping[str, Any]
) -> None:
    """What a profile or the URL makes of joins, limits and reads is not what is sent with."""
    replacing = strategy == "insert"
    opened.table(
        f"{EVENTS}, ver UInt8, seen UInt8",
        BY_OWNER if strategy == "delete-and-insert" else BY_DAY,
        KEYED,
        "ReplacingMergeTree(ver)" if replacing else "MergeTree",
    )
    opened.rows(*(row(f"m{n}", f"a{n % 3}", n * 30_000, ver=1, seen=0) for n in range(12)))
    opened.client.command("UPDATE events SET seen = 1 WHERE message_id = 'm1'")
    opened.client.command("DELETE FROM events WHERE message_id = 'm2'")
    sink = opened.sink(strategy=strategy, settings=dict(given_to_user))
    later = [update(n, {"user_id": "late"}, device("a1"), between(n, n + 1)) for n in (0, 30_000)]
    window = [update(n, {"user_id": f"u{n}"}, device(f"a{n}"), unknown()) for n in (1, 2)]

    sink.apply(plan_updates(later))
    applied, again = sink.apply(plan_updates(window)), sink.apply(plan_updates(window))

    final = "FINAL" if replacing else ""
    found = opened.client.query(f"SELECT message_id, user_id, seen FROM events {final}").result_rows
    users = {**{n: (None, "u1", "u2")[n % 3] for n in range(12) if n != 2}, 1: "late"}
    expected = [(f"m{n}", user, int(n == 1)) for n, user in users.items()]
    assert sorted(found) == sorted(expected)
    assert (applied.rows_changed, again.rows_changed) == (6, 0)
    assert opened.made() == []


def test_a_limit_that_would_cut_rows_off_is_an_error(opened: Opened) -> None:
    """What a profile cuts silently, because its overflow mode is `break`, stops the window."""
    opened.table()
    opened.rows(*(row(f"m{n}", "a1", n * 30_000) for n in range(12)))
    cut = {"max_result_rows": 1, "result_overflow_mode": "break", "max_block_size": 1}

    with pytest.raises(SinkError, match="a limit of the user's profile for the rows of a result"):
        opened.apply(owner(1, "u1", device("a1")), settings=cut)

    assert set(opened.column("user_id").values()) == {None}


def test_an_option_that_nobody_knows_is_said(opened: Opened) -> None:
    """What is no option of the client is a setting of the server, or an error that says so."""
    opened.table()

    with pytest.raises(SinkError, match="neither known to clickhouse-connect nor a setting"):
        opened.apply(owner(1, "u1", device("a1")), tiemout=3)
    with pytest.raises(ConfigurationError, match="does not take an option"):
        open_sink("clickhouse://host/db?connect_timeout=soon").clock()


def test_a_mutation_of_somebody_else_is_waited_for_and_named(opened: Opened) -> None:
    """A failing mutation of others is not killed; the error says its id and code."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    opened.client.command(
        "ALTER TABLE events UPDATE recognition_version = toInt64(throwIf(1, 'secret')) WHERE 1",
        settings={"mutations_sync": 0},
    )
    while not _failing(opened):
        time.sleep(0.05)

    with pytest.raises(SinkUnavailableError) as caught:
        opened.apply(owner(1, "u1", device("a1")), timeout=0.3)

    assert re.search(
        r"by somebody else: 1 mutations .* mutation_\d+.txt; .* 395", str(caught.value)
    )
    assert "secret" not in str(caught.value)
    assert not caught.value.written
    assert _failing(opened)
    assert opened.made() == []
    # `recognition check` shows it.
    [(mutation, failure)] = opened.sink().unfinished("events")
    assert (mutation.startswith("mutation_"), bool(failure)) == (True, True)
    opened.client.command("KILL MUTATION WHERE database = 'test' SYNC")
    assert opened.sink().unfinished("events") == opened.sink().unfinished("nowhere") == []
    assert opened.apply(owner(1, "u1", device("a1"))).rows_changed == 1


@pytest.mark.parametrize(
    ("strategy", "rest", "statement"),
    [
        ("update", BY_DAY, "UPDATE `"),
        ("delete-and-insert", BY_OWNER, "INSERT INTO `test`.`events`"),
    ],
)
def test_a_table_with_too_many_parts_is_waited_for(
    opened: Opened, strategy: str, rest: str, statement: str
) -> None:
    """With error 252 a statement is sent again until merges have caught up, or time is over."""
    opened.table(rest=rest, settings=f"{KEYED}, parts_to_throw_insert = 3")
    opened.client.command("SYSTEM STOP MERGES events")
    for n in range(3):
        opened.rows(row(f"m{n}", "a1", 0))
    plan = plan_updates([owner(1, "u1", device("a1"))])

    with pytest.raises(SinkUnavailableError, match="252") as caught:
        opened.sink(strategy=strategy, timeout=0.3).apply(plan)
    sent = []

    def run(text: Any, *args: Any, **more: Any) -> None:
        if text.render()[0].startswith(statement):
            sent.append(time.monotonic())
            if len(sent) == 3:  # and so merges have caught up
                opened.client.command(
                    "ALTER TABLE events MODIFY SETTING parts_to_throw_insert = 99"
                )
        type(sink._server).run(sink._server, text, *args, **more)

    sink = opened.sink(strategy=strategy)
    sink._server.run = run
    sink.apply(plan)

    assert caught.value.retryable
    assert len(sent) == 3
    assert sent[2] - sent[1] > 1.5 * 0.1  # each pause is longer
    assert opened.column("user_id") == {f"m{n}": "u1" for n in range(3)}
    assert opened.made() == []


def test_a_table_with_too_many_mutations_is_waited_for(opened: Opened) -> None:
    """With error 692, which others have caused in the meantime, it is sent again with pauses."""
    opened.table(settings="number_of_mutations_to_throw = 1, number_of_mutations_to_delay = 1")
    opened.rows(row("m1", "a1", 1))
    sink = opened.sink(strategy="alter")
    sent = 0

    def run(statement: Any, *args: Any, **more: Any) -> None:
        nonlocal sent
        if statement.render()[0].startswith("ALTER TABLE"):
            sent += 1
            if sent == 1:
                opened.client.command(
                    "ALTER TABLE events UPDATE recognition_version = sleepEachRow(1) WHERE 1",
                    settings={"mutations_sync": 0},
                )
        type(sink._server).run(sink._server, statement, *args, **more)

    sink._server.run = run
    sink.apply(plan_updates([update(1, {"user_id": "u1"}, device("a1"))]))

    assert sent > 1
    assert opened.column("user_id") == {"m1": "u1"}


def test_a_mutation_of_ours_that_fails_is_killed_and_reported(opened: Opened) -> None:
    """The error says which one and with which code; nothing of it is left to block others."""
    opened.table(f"{EVENTS}, secret UInt8 MATERIALIZED throwIf(ifNull(user_id = 'u1', 0))")
    opened.rows(row("m1", "a1", 1))

    said = r"mutation_\d+.txt of .* failed \(395 .* was killed"
    with pytest.raises(SinkError, match=said) as caught:
        opened.apply(owner(1, "u1", device("a1")), strategy="alter")

    assert caught.value.written
    found = opened.client.query("SELECT count() FROM system.mutations WHERE NOT is_done")
    assert found.result_rows == [(0,)]
    assert opened.made() == []
    assert opened.apply(owner(2, "u2", device("a1")), strategy="alter").rows_changed == 1


def test_a_stuck_mutation_of_a_dead_worker_is_killed(opened: Opened) -> None:
    """A mutation that looks up rows which a worker left, and fails, is ours to kill."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    name = "recognition_stage_00000001_0000000a_1_by_key"
    opened.client.command(f"CREATE TABLE {name} (k String, v String) ENGINE = Join(ANY, LEFT, k)")
    opened.client.command(
        f"ALTER TABLE events UPDATE user_id = joinGet('test.{name}', 'v', message_id),"
        " recognition_version = toInt64(throwIf(1)) WHERE 1",
        settings={"mutations_sync": 0},
    )
    while not _failing(opened):
        time.sleep(0.05)

    applied = opened.apply(owner(1, "u1", device("a1")))

    assert applied.rows_changed == 1
    assert not _failing(opened)
    assert opened.made() == []


def _failing(opened: Opened) -> bool:
    found = opened.client.query(
        "SELECT count() FROM system.mutations WHERE database = 'test' AND NOT is_done"
        " AND latest_fail_reason != ''"
    )
    return bool(found.result_rows[0][0])


def test_what_a_dead_worker_of_this_process_left_is_taken_away(opened: Opened) -> None:
    """Neither a lock nor staged rows of a window that is gone stay, and nobody waits for it."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    sink = opened.sink()
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    table = sink._tables["events"]
    lock = _lock_name(table)
    opened.client.command(f"CREATE TABLE {lock} (w_00000001_0000000a UInt8) ENGINE = Memory")
    opened.client.command(
        "CREATE TABLE recognition_stage_00000001_0000000a_1_rows (x UInt8) ENGINE = Memory"
    )

    sink.apply(plan_updates([owner(2, "u2", device("a1"))]))
    once = opened.made()
    sink.apply(plan_updates([owner(3, "u3", device("a1"))]))

    mark = f"recognition_broken_00000001_0000000a_{lock.removeprefix('recognition_lock_')}"
    assert once == [mark]  # it says who was broken, until that one cannot wake up any more
    assert opened.made() == []


def test_a_worker_that_was_asleep_before_it_staged_writes_nothing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who took its lock away had nothing to drop yet, and wrote a later update meanwhile."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    asleep, other = opened.sink(), opened.sink()
    fill = asleep._fill

    def wake_up_late(*arguments: Any) -> None:
        _LIVE.clear()
        other.apply(plan_updates([owner(2, "u2", device("a1"))]))
        fill(*arguments)

    monkeypatch.setattr(asleep, "_fill", wake_up_late)
    with pytest.raises(SinkUnavailableError, match="took window"):
        asleep.apply(plan_updates([owner(1, "u1", device("a1"))]))

    assert opened.column("user_id") == {"m1": "u2"}


# Statements ---------------------------------------------------------------------------------------


def test_a_statement_takes_no_bare_text() -> None:
    """Only names, parameters and fragments have a place in a statement."""
    with pytest.raises(TypeError, match="bare text"):
        sql("SELECT %", "1; DROP TABLE events")  # type: ignore[arg-type]

    assert sql("SELECT %", Name("a`b\\c")).render() == ("SELECT `a\\`b\\\\c`", {})
    assert sql("SELECT %", Parameter("String", "x")).render() == (
        "SELECT {p0:String}",
        {"p0": "x"},
    )


def test_a_plan_says_what_each_strategy_costs_and_why_one_was_chosen(opened: Opened) -> None:
    """`compile` ends with an estimate of each strategy, the choice and its reason."""
    opened.table(settings=f"{NUMBERED}, patch_parts_version = 'v2'")
    opened.rows(*(row(f"m{n}", f"a{n}", n % 3 * DAY) for n in range(90)))
    plan = plan_updates([owner(1, "u1", device("a1"), between(0, DAY), expected_rows=1)])

    said = opened.sink(patches="never").compile(plan.steps[0])
    forced = opened.sink(strategy="alter").compile(plan.steps[0])

    assert "UPDATE `test`.`events` SET" in said.partition("\n")[0]
    assert re.search(r"-- update: about \d+\.\d CPU seconds, \d+\.\d MB written", said)
    assert "-- insert: not possible, only a ReplacingMergeTree" in said
    assert "-- update in 1 of 1 partitions with 30 rows, of which about 1 change" in said
    assert "patch_parts_version is v2" in said
    assert forced.startswith("ALTER TABLE `test`.`events` UPDATE")
    assert "the settings force it" in forced


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("chdb://", {}, "names no directory"),
        ("clickhouse:///db", {}, "names no host"),
        ("clickhouse://host:port/db", {}, "port"),
        ("clickhouse://host/db?strategy=best", {}, "strategy is 'best'"),
        ("clickhouse://host/db?timeout=soon", {}, "timeout is 'soon'"),
        ("clickhouse://host/db?ledger_days=0", {}, "ledger_days"),
        ("clickhouse://host/db", {"patches": "now"}, "patches is 'now'"),
        ("clickhouse://host/db", {"timeout": -1}, "timeout"),
        ("clickhouse://host/db?quiet=-1", {}, "quiet is -1.0 seconds"),
        ("clickhouse://host/db", {"ledger_days": 0}, "ledger_days"),
    ],
)
def test_settings_are_checked(url: str, options: dict[str, Any], said: str) -> None:
    """A URL or a setting that means nothing is refused before anything is connected."""
    with pytest.raises(ConfigurationError, match=said):
        open_sink(url, **options)


# Any table, any window ----------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("RECOGNITION_TEST_EXAMPLES", "6"))


class _Case(NamedTuple):
    """A table and what is done to it."""

    engine: str
    settings: str
    user: str
    key: str
    strategy: str
    versioned: bool
    twice: bool
    seed: int


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
    engine = draw(
        st.sampled_from(["MergeTree", "ReplacingMergeTree(ver)", "CollapsingMergeTree(sign)"])
    )
    numbered = draw(st.booleans())
    versioned = draw(st.booleans())
    movable = numbered and not engine.startswith("Collapsing")
    key = draw(st.sampled_from(["message_id", "toDate(timestamp), message_id"]))
    if movable and draw(st.booleans()):
        key = f"{'user_id' if versioned else 'stitched_user_id'}, {key}"
        strategies = ["auto", "delete-and-insert", "replace-partition"]
    else:
        strategies = ["auto", "alter", *(["update"] if numbered else [])]
        strategies += ["delete-and-insert"] if movable else []
        strategies += [] if engine.startswith("Collapsing") else ["replace-partition"]
        if engine.startswith("Replacing"):
            strategies.append("insert")
    return _Case(
        engine,
        KEYED if numbered else "index_granularity = 8192",
        draw(st.sampled_from(["Nullable(String)", "String", "LowCardinality(Nullable(String))"])),
        key,
        draw(st.sampled_from(strategies)),
        versioned,
        draw(st.booleans()) and engine == "MergeTree",
        draw(st.integers(0, 10**6)),
    )


def test_any_table_holds_what_the_last_updates_say(engine: str) -> None:
    """Random tables, windows in any order with repeats, and rows that come in between."""

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(_cases())
    def check(case: _Case) -> None:
        client = clickhouse_connect.get_client(interface="chdb", path=engine)
        opened = Opened(engine, client)
        try:
            _check_case(opened, case)
        finally:
            for sink in opened.sinks:
                sink.close()
            client.close()

    check()


def _check_case(opened: Opened, case: _Case) -> None:
    random = Random(case.seed)
    opened.client.command("DROP DATABASE IF EXISTS test SYNC")
    opened.client.command("CREATE DATABASE test")
    opened.client.command("USE test")
    column = "user_id" if case.versioned else "stitched_user_id"
    opened.table(
        f"message_id String, anonymous_id LowCardinality(String), user_id {case.user},"
        f" stitched_user_id {case.user}, timestamp DateTime64(6, 'UTC'),"
        " recognition_version Nullable(Int64), ver UInt32, sign Int8",
        f"PARTITION BY toYYYYMMDD(timestamp) ORDER BY ({case.key})",
        case.settings,
        case.engine,
    )
    empty = None if "Nullable" in case.user else ""
    rows = [
        row(f"{n}-{t}", f"a{n}", t * DAY / 4, user_id=empty, stitched_user_id=empty, ver=1, sign=1)
        for n in range(4)
        for t in range(8)
    ]
    if case.twice:
        rows += random.sample(rows, 6)
    random.shuffle(rows)
    window = _any_window(random, case.versioned)
    opened.rows(*rows[:20])
    patches = random.choice(["auto", "always", "never"])
    sink = opened.sink(strategy=case.strategy, patches=patches, quiet=0)
    again = [*random.sample(window, len(window)), *random.sample(window, 2)]
    arrives = random.randrange(len(again))
    while again:
        size = random.randint(1, 4)
        if arrives is not None and len(again) <= arrives:
            opened.rows(*rows[20:])
            arrives = None
        assert sink.apply(plan_updates(again[:size])).rejected == ()
        again = again[size:]
    if arrives is not None:
        opened.rows(*rows[20:])
    # What came late is met when the updates come again.
    sink.apply(plan_updates(window))

    final = "" if case.engine == "MergeTree" else "FINAL"
    expected = _any_expected(rows, window, column, empty)
    found = opened.client.query(f"SELECT message_id, {column} FROM events {final}").result_rows
    wanted = [(each["message_id"], expected[each["message_id"]]) for each in rows]
    assert sorted(found, key=str) == sorted(wanted, key=str), case
    assert sink.apply(plan_updates(window)).rows_changed == 0
    assert opened.made() == []


def _any_window(random: Random, versioned: bool) -> list[Any]:
    """Updates by device, by device and interval, and by messages with a device."""
    window = []
    for n in range(1, 9):
        values = {"user_id" if versioned else "stitched_user_id": f"u{n}"}
        key = f"a{random.randrange(4)}"
        first = random.randrange(8)
        times = range(first, random.randint(first, 8))
        criteria: list[Any] = [device(key)]
        if random.random() < 0.3:
            refs = tuple((f"{key[1:]}-{t}", at(t * DAY / 4)) for t in (times or [first]))
            criteria.append(Messages(id_column="message_id", time_column="timestamp", refs=refs))
        elif times:
            criteria.append(between(times.start * DAY / 4, times.stop * DAY / 4))
        criteria += [unknown()] if versioned else []
        window.append(update(n, values, *criteria, versioned=versioned))
    return window


def _any_expected(
    rows: Sequence[Row], window: Sequence[Any], column: str, empty: str | None
) -> dict[object, object]:
    """By row, what the greatest sequence says that meets it; computed from the criteria alone."""
    expected: dict[object, object] = {}
    for each in rows:
        expected[each["message_id"]] = empty
        for wanted in window:  # in the order of their sequences
            meets = wanted.where[0].value == each["anonymous_id"]
            for criterion in wanted.where[1:]:
                if isinstance(criterion, Messages):
                    meets = meets and each["message_id"] in dict(criterion.refs)
                elif isinstance(criterion, Between):
                    time_of = each["timestamp"]
                    assert isinstance(time_of, datetime)
                    meets = meets and criterion.start <= time_of < criterion.end
            if meets:
                expected[each["message_id"]] = wanted.set[column]
    return expected
