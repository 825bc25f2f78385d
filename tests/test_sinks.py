"""The sinks that come with the library: the kit on each, and what is particular to them."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

import recognition.sinks
from recognition.errors import (
    ConfigurationError,
    EventError,
    MissingDependencyError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
    UnknownSchemeError,
)
from recognition.events import parse_time
from recognition.messages import Between, Criterion, Empty, Equals, Messages, OneOf
from recognition.planner import plan_updates
from recognition.sinks import Applied, Sink, installed_schemes, open_sink
from recognition.sinks.duckdb import DuckdbSink, _OfDuckdb
from recognition.sinks.rows import Note
from recognition.sinks.sql import SqlSink, StageColumn, Target, Transaction
from recognition.sinks.sqlite import SqliteSink
from recognition.testing import SinkTests
from recognition.testing.sinks import START, at, between, device, row, unknown, update

Rows = Sequence[Mapping[str, object]]

TYPES = {
    "sqlite": ("TEXT", "TEXT", "INTEGER", "REAL", "BOOLEAN"),
    "duckdb": ("VARCHAR", "TIMESTAMPTZ", "BIGINT", "DOUBLE", "BOOLEAN"),
}


class Database:
    """A file, looked at by the driver itself, around the sink."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme = scheme
        self.path = folder / f"warehouse.{scheme}"
        self.url = f"{scheme}:///{self.path}"
        kinds = ("text", "time", "integer", "float", "boolean")
        self.types = dict(zip(kinds, TYPES[scheme], strict=True))

    def run(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """One statement, committed."""
        if self.scheme == "sqlite":
            with closing(sqlite3.connect(self.path)) as connection, connection:
                return connection.execute(statement, parameters).fetchall()
        with duckdb.connect(self.path) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            return connection.execute(statement, list(parameters)).fetchall()

    def write(self, table: str, rows: Rows) -> None:
        """Rows of the kit, into a table that is made when it is not there."""
        declared = ", ".join(
            f'"{name}" {self.types[kind]}{" PRIMARY KEY" if name == "message_id" else ""}'
            for name, kind in SinkTests.columns.items()
        )
        self.run(f'CREATE TABLE IF NOT EXISTS "{table}" ({declared})')
        names = [*SinkTests.columns]
        lines = [[_plain(each.get(name)) for name in names] for each in rows]
        marks = ", ".join("?" * len(names))
        insert = f'INSERT INTO "{table}" VALUES ({marks})'
        if self.scheme == "sqlite":
            with closing(sqlite3.connect(self.path)) as connection, connection:
                connection.executemany(insert, lines)
        elif lines:
            with duckdb.connect(self.path) as connection:
                connection.executemany(insert, lines)

    def read(self, table: str) -> list[dict[str, object]]:
        """All rows; DuckDB's zoned times as text, because fetching them needs another package."""
        columns = ", ".join(
            f'CAST("{name}" AS VARCHAR) AS "{name}"' if kind == "time" else f'"{name}"'
            for name, kind in SinkTests.columns.items()
        )
        found = self.run(f'SELECT {columns} FROM "{table}"')
        return [dict(zip(SinkTests.columns, line, strict=True)) for line in found]

    def column(self, column: str, table: str = "events") -> dict[object, object]:
        """One column by message id."""
        return dict(self.run(f'SELECT message_id, "{column}" FROM "{table}"'))


def _plain(value: object) -> object:
    return value.isoformat() if isinstance(value, datetime) else value


class _OnDatabase(SinkTests):
    scheme: str

    @pytest.fixture
    def at_hand(self, tmp_path: Path) -> Database:
        return Database(self.scheme, tmp_path)

    @pytest.fixture
    def sink(self, at_hand: Database) -> Iterator[Sink]:
        with closing(open_sink(at_hand.url)) as sink:
            yield sink

    @pytest.fixture
    def write_rows(self, at_hand: Database) -> Callable[[str, Rows], None]:
        return at_hand.write

    @pytest.fixture
    def read_rows(self, at_hand: Database) -> Callable[[str], list[dict[str, object]]]:
        return at_hand.read


class TestSqlite(_OnDatabase):
    """The kit on SQLite."""

    scheme = "sqlite"


class TestDuckdb(_OnDatabase):
    """The kit on DuckDB."""

    scheme = "duckdb"


class _Merging(DuckdbSink):
    merges = True


class TestMerge(_OnDatabase):
    """The kit on a sink whose statement is a MERGE."""

    scheme = "duckdb"

    @pytest.fixture
    def sink(self, at_hand: Database) -> Iterator[Sink]:
        with closing(_Merging(at_hand.url)) as sink:
            yield sink


class _Inline(DuckdbSink):
    inline_rows = 1_000  # more than any window of the kit

    def inline(
        self, name: str, columns: Sequence[StageColumn], target: Target, lists: Any
    ) -> sa.FromClause:
        """Each row is a SELECT; what a value is staged as, its column says."""
        lines = [
            sa.select(
                *(
                    _staged(column, value).label(column.name)
                    for column, value in zip(columns, line, strict=True)
                )
            )
            for line in zip(*lists, strict=True)
        ]
        return sa.union_all(*lines).subquery(name)


def _staged(column: StageColumn, value: object) -> sa.ColumnElement[Any]:
    if column.like is None:
        kind: Any = sa.Text() if column.kind == "text" else sa.BigInteger()
        return sa.cast(sa.literal(value, kind), kind)
    if column.kind == "time":
        moment = sa.cast(sa.literal(value, sa.BigInteger()), sa.BigInteger())
        return sa.func.make_timestamptz(moment)
    given = sa.literal(value, sa.types.NullType())
    return sa.cast(given, _OfDuckdb(column.like.declared))


class TestInline(_OnDatabase):
    """The kit on a sink that stages no small window."""

    scheme = "duckdb"

    @pytest.fixture
    def sink(self, at_hand: Database) -> Iterator[Sink]:
        with closing(_Inline(at_hand.url)) as sink:
            yield sink


class _StagesFirst(SqliteSink):
    ddl_commits = True
    between: Callable[[], object] | None = None

    def _apply(self, transaction: Transaction, plan: Any) -> Applied:
        between, self.between = self.between, None
        if between is not None:
            between()
        return super()._apply(transaction, plan)


class TestStagesFirst(_OnDatabase):
    """The kit on a sink that stages before the transaction."""

    scheme = "sqlite"

    @pytest.fixture
    def sink(self, at_hand: Database) -> Iterator[Sink]:
        with closing(_StagesFirst(at_hand.url)) as sink:
            yield sink


@pytest.fixture(params=["sqlite", "duckdb"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """An empty database of each kind."""
    return Database(request.param, tmp_path)


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """An empty SQLite database."""
    return Database("sqlite", tmp_path)


@pytest.fixture
def duck(tmp_path: Path) -> Database:
    """An empty DuckDB database."""
    return Database("duckdb", tmp_path)


@pytest.fixture
def opened() -> Iterator[Callable[..., SqlSink]]:
    """Open sinks that are closed at the end."""
    sinks: list[SqlSink] = []

    def open_it(database: Database, **options: object) -> SqlSink:
        sink = open_sink(database.url, **options)
        assert isinstance(sink, SqlSink)
        sinks.append(sink)
        return sink

    yield open_it
    for sink in sinks:
        sink.close()


Opened = Callable[..., SqlSink]


def apply(sink: Sink, *updates: Any) -> Applied:
    return sink.apply(plan_updates(updates))


def refusal(applied: Applied) -> str:
    """The one reason of a plan that was refused."""
    ((_, error),) = applied.rejected
    assert isinstance(error, TableError)
    return str(error)


# What is sent -----------------------------------------------------------------------------------


def _sent(sink: SqlSink) -> list[str]:
    """The texts of all statements that the sink sends from now on."""
    texts: list[str] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        texts.append(statement)

    return texts


def _plans(sink: SqlSink, *begins: str) -> list[list[str]]:
    """How SQLite goes about the statements that begin so, from now on."""
    plans: list[list[str]] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def explain(_: Any, cursor: Any, text: str, parameters: Any, *rest: Any) -> None:
        if text.startswith(begins) and "pragma" not in text:
            found = cursor.connection.execute(f"EXPLAIN QUERY PLAN {text}", parameters)
            plans.append([line[3] for line in found])

    return plans


def _windows() -> list[Any]:
    """One update of each shape."""
    refs = (("m1", at(1)), ("m2", at(2.5)))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    return [
        update(1, {"user_id": "u1"}, device("a1"), unknown(), between(0, 9)),
        update(2, {"user_id": "u2", "context_traits_email": None}, device("a2"), versioned=True),
        update(3, {"stitched_user_id": "u3"}, named),
        update(4, {"stitched_user_id": "u3"}, device("a3"), named, between(1, 3)),
        update(5, {"user_id": "u5"}, Equals(column="user_id", value="u4"), device("a4")),
        update(6, {"user_id": "u7"}, Equals(column="user_id", value="u6")),
        update(7, {"stitched_user_id": "u8"}, device("a5")),
        update(8, {"stitched_user_id": "u9"}, device("a5"), between(2, 3)),
        update(
            9, {"context_traits_age": 3}, Equals(column="context_traits_subscribed", value=True)
        ),
    ]


def test_compile_is_what_apply_sends(database: Database, opened: Opened) -> None:
    """`compile` gives the text of the statement that `apply` sends, and a comment below it."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(database)
    plan = plan_updates(_windows())
    compiled = [sink.compile(step) for step in plan.steps]
    sent = _sent(sink)

    applied = sink.apply(plan)

    updates = [text for text in sent if text.startswith("UPDATE")]
    assert applied.rejected == ()
    assert len(updates) == len(plan.steps) >= 9
    assert [text.rsplit("\n", 1)[0] for text in compiled] == updates
    assert all(text.rsplit("\n", 1)[1].startswith("-- ") for text in compiled)
    assert applied.statements == len([text for text in sent if not text.startswith("BEGIN")])


def test_a_small_window_is_part_of_its_statements(duck: Database) -> None:
    """A step of up to `inline_rows` rows makes no stage, and is compiled as it is sent."""
    duck.write("events", [row(f"m{n}", f"a{n}", n) for n in range(101)])
    windows = [
        plan_updates(
            [update(n, {"user_id": "u"}, device(f"a{n}"), unknown()) for n in range(count)]
        )
        for count in (100, 101)
    ]
    with closing(_Inline(duck.url)) as sink:
        sink.inline_rows = 100
        sent = _sent(sink)
        compiled = sink.compile(windows[0].steps[0])

        changed = [sink.apply(window).rows_changed for window in windows]

    stages = [text for text in sent if text.startswith("CREATE TEMPORARY")]
    updates = [text for text in sent if text.startswith("UPDATE")]
    assert changed == [100, 1]
    assert len(stages) == 1
    assert updates[0] == compiled.rsplit("\n", 1)[0]
    assert "UNION ALL" in updates[0]
    assert "UNION ALL" not in updates[1]


def test_merge_is_one_statement_with_all_conditions_in_on(duck: Database) -> None:
    """A MERGE names both tables, decides by ON alone, and spares rows that a later update named."""
    duck.write("events", [row("m1", "a1", 1), row("m2", "a1", 2)])
    named = Messages(id_column="message_id", time_column="timestamp", refs=(("m2", at(2)),))
    early = update(1, {"stitched_user_id": "early"}, device("a1"), between(0, 9))
    with closing(_Merging(duck.url)) as sink:
        apply(sink, update(2, {"stitched_user_id": "late"}, device("a1"), named))
        sent = _sent(sink)

        changed = apply(sink, early).rows_changed

    assert changed == 1
    assert duck.column("stitched_user_id") == {"m1": "early", "m2": "late"}
    (merge,) = [text for text in sent if text.startswith("MERGE")]
    head, _, rest = merge.partition(" ON ")
    assert re.fullmatch(r"MERGE INTO events USING recognition_stage_\w+", head)
    assert "NOT (EXISTS (SELECT 1 " in rest
    assert rest.endswith(
        f"WHEN MATCHED THEN UPDATE SET stitched_user_id = {head.split()[-1]}.value_0"
    )


def test_stages_before_the_transaction_are_made_anew_when_the_ledger_moved(
    sqlite: Database,
) -> None:
    """A later update that another sink applies after the staging is not undone."""
    sqlite.write("events", [row("m1", "a1", 1), row("m2", "a1", 5)])
    early = update(1, {"stitched_user_id": "early"}, device("a1"), between(0, 9))
    late = update(2, {"stitched_user_id": "late"}, device("a1"), between(4, 9))
    with closing(_StagesFirst(sqlite.url)) as sink, closing(open_sink(sqlite.url)) as other:
        sink.between = lambda: apply(other, late)
        sent = _sent(sink)

        applied = apply(sink, early)

    texts = [text.split(" recognition_stage")[0] for text in sent]
    assert sqlite.column("stitched_user_id") == {"m1": "early", "m2": "late"}
    assert applied.rows_changed == 1
    assert texts.count("CREATE TEMPORARY TABLE") == 3  # before, again, and the part that is left
    # The stage that was made before went with its session.
    assert texts.count("DROP TABLE") == 2


def test_a_stage_is_made_before_the_transaction_where_making_it_commits(sqlite: Database) -> None:
    """Nothing is made or dropped between the BEGIN of the UPDATE and its commit."""
    sqlite.write("events", [row("m1", "a1", 1)])
    with closing(_StagesFirst(sqlite.url)) as sink:
        seen = _sent(sink)
        sa.event.listen(sink._engine, "commit", lambda _: seen.append("COMMIT"))
        apply(sink, update(1, {"user_id": "u1"}, device("a1"), unknown()))

    units = "\n".join(seen).split("COMMIT")
    (unit,) = [unit for unit in units if "\nUPDATE" in unit]
    assert "INSERT INTO recognition_ledger" in unit
    assert "CREATE" not in unit
    assert "DROP" not in unit


def test_the_writers_lock_is_held_around_the_transaction(sqlite: Database) -> None:
    """It is taken for all tables in the order of their names, and given back after the end."""
    seen: list[object] = []

    class Locking(SqliteSink):
        @contextmanager
        def locked(self, transaction: Transaction, tables: Sequence[str]) -> Iterator[None]:
            seen.append(tables)
            yield
            seen.append("free")

    for table in ("b", "a"):
        sqlite.write(table, [row("m1", "a1", 1)])
    with closing(Locking(sqlite.url)) as sink:
        for event in ("begin", "commit", "rollback"):
            sa.event.listen(sink._engine, event, lambda _, event=event: seen.append(event))
        apply(
            sink,
            *(
                update(n, {"user_id": "u1"}, device("a1"), unknown(), table=table)
                for n, table in enumerate(("b", "a"))
            ),
        )

    assert seen == [["a", "b"], "begin", "commit", "free"]


@pytest.mark.parametrize("value", ["premium", 3])
def test_missing_columns_are_added_on_request(
    database: Database, opened: Opened, value: object
) -> None:
    """With `add_missing_columns` what is set is added once, with the type of what is set."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(database, add_missing_columns=True)
    sent = _sent(sink)
    wanted = update(1, {"Plan name": value, "user_id": "u1"}, device("a1"), versioned=True)

    applied = [apply(sink, wanted), apply(sink, wanted)]

    assert [each.rejected for each in applied] == [(), ()]
    assert [each.rows_changed for each in applied] == [1, 0]
    assert len([text for text in sent if text.startswith("ALTER")]) == 1
    assert database.column("Plan name") == {"m1": value}
    assert database.column("user_id") == {"m1": "u1"}


def test_no_column_is_added_by_which_rows_would_be_found(
    database: Database, opened: Opened
) -> None:
    """A missing criterion is refused with `add_missing_columns` too, and nothing is added."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(database, add_missing_columns=True)
    sent = _sent(sink)

    applied = apply(sink, update(1, {"plan": "p"}, Equals(column="device_id", value="a1")))

    assert "has no column 'device_id', 'plan'" in refusal(applied)
    assert not [text for text in sent if text.startswith("ALTER")]


def test_compile_shows_the_bounds(database: Database, opened: Opened) -> None:
    """The comment says between which times the rows of a step lie."""
    plan = plan_updates([update(1, {"user_id": "u1"}, device("a1"), between(0, 90))])

    text = opened(database).compile(plan.steps[0])

    assert text.endswith(
        "-- timestamp in [2026-01-01T12:00:00.000000Z, 2026-01-01T12:01:30.000000Z); 1 staged rows"
    )


def test_compile_needs_no_database(database: Database, opened: Opened) -> None:
    """Before there is a table, `compile` shows the statement for the one that `load` makes."""
    sink = opened(database)
    step = plan_updates(
        [update(1, {"user_id": "u1"}, device("a1"), unknown(), between(0, 9))]
    ).steps[0]
    before = sink.compile(step)
    existed = database.path.exists()

    sink.load(
        "events",
        [],
        key="message_id",
        columns={
            "message_id": "text",
            "anonymous_id": "text",
            "user_id": "text",
            "timestamp": "time",
        },
    )

    assert not existed
    assert sink.compile(step) == before


def test_constant_bounds_prune(duck: Database, opened: Opened) -> None:
    """On a column store every statement carries the bounds of its whole window."""
    duck.write("events", [])
    plan = plan_updates(
        [update(n, {"user_id": "u"}, device(f"a{n}"), between(n, n + 1)) for n in (3, 5)]
    )

    text = opened(duck).compile(plan.steps[0])

    assert "timestamp >= make_timestamptz(CAST(? AS BIGINT))" in text
    assert "timestamp < make_timestamptz(CAST(? AS BIGINT))" in text


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("stored", ["fixed", "iso"])
def test_rows_are_found_by_the_index_of_the_key(
    sqlite: Database, opened: Opened, analyzed: bool, stored: str
) -> None:
    """SQLite looks rows up by the index of the key, and never reads the table or the index."""
    form = "%Y-%m-%d %H:%M:%S.000000" if stored == "fixed" else "%Y-%m-%dT%H:%M:%SZ"
    sqlite.write("events", [row(f"m{n}", f"a{n % 500}", n) for n in range(2_000)])
    sqlite.run("UPDATE events SET timestamp = strftime(?, timestamp)", form)
    sqlite.run("CREATE INDEX by_device ON events (anonymous_id)")
    if analyzed:
        sqlite.run("ANALYZE")
    sink = opened(sqlite)
    plans = _plans(sink, "UPDATE")
    apply(
        sink,
        *(
            update(n, {"user_id": "u"}, device(f"a{n}"), unknown(), between(0, 9_999))
            for n in range(20)
        ),
    )

    assert plans == [[plans[0][0], "SEARCH events USING INDEX by_device (anonymous_id=?)"]]
    assert plans[0][0].startswith("SCAN recognition_stage_")


@pytest.mark.parametrize("analyzed", [False, True])
def test_notes_are_found_by_the_index_of_the_key(
    sqlite: Database, opened: Opened, analyzed: bool
) -> None:
    """SQLite went through the stage for each note: 5 s for 300 updates beside 79,000 notes."""
    sqlite.write("events", [row(f"m{n}", f"a{n % 50}", n) for n in range(100)])
    sink = opened(sqlite)

    def tell(first: int) -> None:
        devices = [device(f"a{n}") for n in range(50)]
        own = [
            Messages(
                id_column="message_id", time_column="timestamp", refs=((f"m{n}", at(n)),)
            )
            for n in range(50)
        ]  # fmt: skip
        user = {"user_id": f"u{first}"}
        apply(sink, *(update(first + n, user, one) for n, one in enumerate(devices)))
        apply(sink, *(update(first + n, user, devices[n], own[n]) for n in range(50)))

    tell(1_000)
    if analyzed:
        sqlite.run("ANALYZE")
    plans = _plans(sink, "SELECT", "INSERT INTO recognition_ledger", "UPDATE")
    tell(0)
    tell(2_000)
    ways = {line for plan in plans for line in plan if "recognition_ledger" in line}

    assert len(plans) == 10
    assert ways == {
        "SEARCH recognition_ledger USING INDEX recognition_ledger_key"
        " (key_value=? AND key_column=? AND table_name=?)"
    }


def test_rows_are_counted_only_when_some_are_missing(database: Database, opened: Opened) -> None:
    """As many changed rows as expected need no second look; fewer, or an unknown number, do."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(3)])
    sink = opened(database)
    wanted = update(1, {"user_id": "u1"}, device("a1"), expected_rows=3)

    enough = apply(sink, wanted)
    again = apply(sink, wanted)
    unknown_number = apply(sink, wanted.model_copy(update={"expected_rows": None}))

    assert (enough.rows_matched, enough.rows_changed, enough.matched_by_update) == (3, 3, {})
    assert again.matched_by_update == {"events-1": 3} == unknown_number.matched_by_update
    assert (again.rows_matched, again.rows_changed) == (3, 0)


# Exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("collation", ["NOCASE", "RTRIM"])
def test_a_collation_does_not_blur_sqlite(sqlite: Database, opened: Opened, collation: str) -> None:
    """Columns that compare without case or blanks are still compared and written exactly."""
    sqlite.run(
        f"CREATE TABLE events (message_id TEXT PRIMARY KEY, anonymous_id TEXT COLLATE {collation},"
        f" user_id TEXT COLLATE {collation})"
    )
    for n, key in enumerate(["A", "a", "A ", "a "]):
        sqlite.run("INSERT INTO events VALUES (?, ?, ?)", f"m{n}", key, "U")

    applied = apply(
        opened(sqlite),
        update(1, {"user_id": "u"}, device("A")),
        update(2, {"user_id": "U "}, device("a ")),
    )

    assert sqlite.column("user_id") == {"m0": "u", "m1": "U", "m2": "U", "m3": "U "}
    assert (applied.rows_matched, applied.rows_changed) == (2, 2)


def test_a_collation_does_not_blur_duckdb(duck: Database, opened: Opened) -> None:
    """A column that compares without case is still compared and written exactly."""
    duck.run(
        "CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR COLLATE NOCASE,"
        " user_id VARCHAR COLLATE NOCASE, n INTEGER)"
    )
    duck.run("INSERT INTO events VALUES ('m0', 'A', 'U', 1), ('m1', 'a', 'U', 1)")

    applied = apply(opened(duck), update(1, {"user_id": "u", "n": 1}, device("A")))

    assert duck.column("user_id") == {"m0": "u", "m1": "U"}
    assert (applied.rows_matched, applied.rows_changed) == (1, 1)


SHAPES = [
    "2026-01-01 12:00:05.000000",
    "2026-01-01T12:00:05.000000",
    "2026-01-01T12:00:05Z",
    "2026-01-01T12:00:05.000Z",
    "2026-01-01T14:00:05+02:00",
    "2026-01-01 12:00:05.0000009",
    "2026-01-01 12:00:05.0000Z",
    "2026-01-01 12:00:05.00000Z",
    "2026-01-01 12:00:04.99999Z",
    "2026-01-01 12:00:04.999999",
    "2026-01-01 12:00:05.000001",
    "2026-01-01 12:00:05",
    "2026-01-01",
    1767268805,
    1767268805000,
    1767268805.0,
    "1767268805",
    "1767268804.999",
    "yesterday",
    "",
    None,
]


@pytest.mark.parametrize("declared", ["TEXT", "DATETIME", "INTEGER", "", "TEXT COLLATE NOCASE"])
@pytest.mark.parametrize(("low", "high"), [(5, 6), (0, 5), (5, 5.000001)])
def test_sqlite_reads_times_of_any_form(
    sqlite: Database, opened: Opened, declared: str, low: float, high: float
) -> None:
    """Whatever a row of a foreign table holds for its time, it is compared as that very time."""
    sqlite.run(
        f"CREATE TABLE events (message_id TEXT, anonymous_id, user_id, timestamp {declared})"
    )
    for n, value in enumerate(SHAPES):
        sqlite.run("INSERT INTO events VALUES (?, 'a1', NULL, ?)", n, value)
    stored = dict(sqlite.run("SELECT message_id, timestamp FROM events"))

    applied = apply(opened(sqlite), update(1, {"user_id": "u1"}, device("a1"), between(low, high)))

    span = between(low, high)
    inside = {name: _is_inside(value, span) for name, value in stored.items()}
    found = sqlite.column("user_id")
    assert {name: value == "u1" for name, value in found.items()} == inside
    assert applied.rows_changed == sum(inside.values())
    assert 0 < sum(inside.values()) < len(SHAPES)


def _is_inside(value: object, span: Between) -> bool:
    try:
        time = parse_time(value)
    except EventError:
        return False
    zero = datetime(1970, 1, 1, tzinfo=UTC)
    return span.start <= zero + timedelta(microseconds=time) < span.end


@pytest.mark.parametrize(
    "declared",
    ["TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS", "TIMESTAMPTZ", "VARCHAR", "DATE"],
)
def test_duckdb_reads_times_of_any_type(duck: Database, opened: Opened, declared: str) -> None:
    """Times of every type are compared without loss; what has none is in no interval."""
    duck.run(
        f"CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, user_id VARCHAR, "
        f'"timestamp" {declared})'
    )
    rows = {
        "before": "2026-01-01 23:59:59",
        "start": "2026-01-02 00:00:00",
        "end": "2026-01-03 00:00:00",
    }
    if declared in ("TIMESTAMP", "TIMESTAMPTZ", "VARCHAR"):
        rows["last"] = "2026-01-02 23:59:59.999999"
    if declared == "TIMESTAMP_NS":
        rows["last"] = "2026-01-02 23:59:59.999999999"
        rows["before"] = "2026-01-01 23:59:59.999999999"
    if declared == "VARCHAR":
        rows["zoned"] = "2026-01-03T01:00:00+02:00"
        rows["unreadable"] = "yesterday"
    for name, value in rows.items():
        duck.run(f"INSERT INTO events VALUES (?, 'a1', NULL, CAST(? AS {declared}))", name, value)
    duck.run("INSERT INTO events VALUES ('none', 'a1', NULL, NULL)")
    day = Between(
        column="timestamp",
        start=datetime(2026, 1, 2, tzinfo=UTC),
        end=datetime(2026, 1, 3, tzinfo=UTC),
    )
    ever = Between(
        column="timestamp",
        start=datetime(1, 1, 1, tzinfo=UTC),
        end=datetime(9999, 1, 1, tzinfo=UTC),
    )

    apply(
        opened(duck),
        update(1, {"user_id": "early or late"}, device("a1"), ever),
        update(2, {"user_id": "inside"}, device("a1"), day),
    )

    found = duck.column("user_id")
    assert {name for name, value in found.items() if value == "inside"} == {
        "start",
        "last",
        "zoned",
    } & set(rows)
    assert {name for name, value in found.items() if value is None} == {"none", "unreadable"} & {
        "none",
        *rows,
    }


def test_rows_without_time_belong_to_the_update_of_all_rows(
    database: Database, opened: Opened
) -> None:
    """An update without interval that was cut still sets the rows that have no time."""
    database.write("events", [row("m1", "a1", 1), row("m5", "a1", 5), row("m9", "a1", 9)])
    database.run("INSERT INTO events (message_id, anonymous_id) VALUES ('none', 'a1')")

    apply(
        opened(database),
        update(1, {"stitched_user_id": "A"}, device("a1")),
        update(2, {"stitched_user_id": "B"}, device("a1"), between(4, 6)),
    )

    assert database.column("stitched_user_id") == {"m1": "A", "m5": "B", "m9": "A", "none": "A"}


def test_empty_is_null_or_the_empty_text_of_a_column_without_null(
    database: Database, opened: Opened
) -> None:
    """`''` is empty only where the column cannot be NULL; null is written there as `''`."""
    text = database.types["text"]
    database.run(
        f"CREATE TABLE events (message_id {text}, anonymous_id {text}, user_id {text},"
        f" account {text} NOT NULL)"
    )
    database.run("INSERT INTO events VALUES ('null', 'a1', NULL, ''), ('blank', 'a1', '', 'x')")
    sink = opened(database)

    apply(
        sink,
        update(1, {"user_id": "u1"}, device("a1"), Empty(column="user_id")),
        update(2, {"account": "y"}, device("a1"), Empty(column="account")),
    )
    after = (database.column("user_id"), database.column("account"))
    emptied = apply(sink, update(3, {"account": None}, device("a1")))

    assert after == ({"null": "u1", "blank": ""}, {"null": "y", "blank": "x"})
    assert emptied.rows_changed == 2
    assert database.column("account") == {"null": "", "blank": ""}


def test_a_uuid_column_is_a_key(duck: Database, opened: Opened) -> None:
    """A device in a column of type UUID is found by its text, and nothing else is accepted."""
    duck.run("CREATE TABLE events (message_id VARCHAR, anonymous_id UUID, user_id VARCHAR)")
    known = str(uuid.UUID(int=7))
    duck.run("INSERT INTO events VALUES ('m1', ?, NULL), ('m2', ?, NULL)", known, uuid.UUID(int=8))

    applied = apply(
        opened(duck),
        update(1, {"user_id": "u1"}, device(known)),
        update(2, {"user_id": "u2"}, device("no-uuid")),
    )

    assert duck.column("user_id") == {"m1": "u1", "m2": None}
    assert [update_id for update_id, _ in applied.rejected] == ["events-2"]


def test_times_may_be_set(duck: Database, opened: Opened) -> None:
    """A time in `set` is written as the column's type, whatever its zone."""
    duck.run(
        "CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, seen TIMESTAMP, day DATE)"
    )
    duck.run("INSERT INTO events (message_id, anonymous_id) VALUES ('m1', 'a1')")

    applied = apply(
        opened(duck),
        update(1, {"seen": "2026-01-01T01:30:00.5+02:00", "day": "2026-01-01"}, device("a1")),
        update(2, {"seen": "soon"}, device("a2")),
    )

    assert "seen" in refusal(applied)
    assert duck.run("SELECT CAST(seen AS VARCHAR), CAST(day AS VARCHAR) FROM events") == [
        ("2025-12-31 23:30:00.5", "2026-01-01")
    ]


# What is refused --------------------------------------------------------------------------------


def test_a_text_that_is_too_long_is_refused_alone(sqlite: Database, opened: Opened) -> None:
    """A text wider than the column's declaration refuses its update, and no other."""
    sqlite.run("CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id VARCHAR(8))")
    sqlite.run("INSERT INTO events VALUES ('m1', 'a1', NULL), ('m2', 'a2', NULL)")

    applied = apply(
        opened(sqlite),
        update(1, {"user_id": "far-too-long"}, device("a1")),
        update(2, {"user_id": "12345678"}, device("a2")),
    )

    assert sqlite.column("user_id") == {"m1": None, "m2": "12345678"}
    text = refusal(applied)
    assert all(part in text for part in ("'events'", "'user_id'", "12 characters", "VARCHAR(8)"))
    assert "far-too-long" not in text


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INTEGER", "text"),
        ("INTEGER", 1.5),
        ("INTEGER", 2**63),
        ("INTEGER", None),
        ("REAL", "text"),
        ("REAL", True),
        ("REAL", 10**400),
        ("BOOLEAN", "true"),
        ("NUMERIC", "007"),
        ("STRING", " 1e5 "),
        ("", 2**64),
    ],
)
def test_sqlite_refuses_what_a_column_cannot_hold(
    sqlite: Database, opened: Opened, declared: str, value: Any
) -> None:
    """A value that the column would change or lose refuses the update, and says both types."""
    sqlite.run(f"CREATE TABLE events (message_id TEXT, anonymous_id TEXT, x {declared} NOT NULL)")
    sqlite.run("INSERT INTO events VALUES ('m1', 'a1', 0)")

    applied = apply(opened(sqlite), update(1, {"x": value}, device("a1")))

    text = refusal(applied)
    assert "column 'x'" in text
    assert "found" in text
    assert (declared or "no declared type") in text
    assert sqlite.run("SELECT x = 0 FROM events") == [(1,)]


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INTEGER", 2.0),
        ("INTEGER", True),
        ("REAL", 3),
        ("NUMERIC", "abc"),
        ("STRING", 7),
        ("", "7"),
    ],
)
def test_sqlite_takes_what_a_column_holds(
    sqlite: Database, opened: Opened, declared: str, value: Any
) -> None:
    """A value that the column keeps as it is passes."""
    sqlite.run(f"CREATE TABLE events (message_id TEXT, anonymous_id TEXT, x {declared})")
    sqlite.run("INSERT INTO events VALUES ('m1', 'a1', NULL)")

    applied = apply(opened(sqlite), update(1, {"x": value}, device("a1")))

    assert applied.rejected == ()
    assert sqlite.column("x") == {"m1": value}


def test_numbers_become_texts_where_texts_are(database: Database, opened: Opened) -> None:
    """A number or truth value is set in a column of text as JSON writes it; as a key it is none."""
    database.write("events", [row("m1", "5", 1), row("m2", "a2", 1), row("m3", "a3", 1)])

    applied = apply(
        opened(database),
        update(1, {"user_id": 5, "stitched_user_id": None}, device("a2")),
        update(2, {"user_id": True, "stitched_user_id": 0.5}, device("a3")),
        update(3, {"user_id": "u", "stitched_user_id": "u"}, device(5)),
    )

    assert database.column("user_id") == {"m1": None, "m2": "5", "m3": "true"}
    assert database.column("stitched_user_id") == {"m1": None, "m2": None, "m3": "0.5"}
    assert "integer was found" in refusal(applied)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INTEGER", "text"),
        ("INTEGER", 2**31),
        ("UTINYINT", -1),
        ("BIGINT", 2**63),
        ("BIGINT", True),
        ("FLOAT", 1e39),
        ("DECIMAL(4,2)", 100),
        ("BOOLEAN", 1),
        ("UUID", "x"),
        ("DATE", "x"),
        ("ENUM('a', 'b')", "a"),
        ("INTEGER[]", 1),
    ],
)
def test_duckdb_refuses_what_a_column_cannot_hold(
    duck: Database, opened: Opened, declared: str, value: Any
) -> None:
    """A value that the column cannot hold refuses its update before anything is sent."""
    duck.run(f"CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, x {declared})")
    duck.run("INSERT INTO events VALUES ('m1', 'a1', NULL)")

    applied = apply(
        opened(duck), update(1, {"x": value}, device("a1")), update(2, {"x": None}, device("a2"))
    )

    assert "column 'x'" in refusal(applied)
    assert duck.column("x") == {"m1": None}


def test_a_missing_table_names_the_nearest(database: Database, opened: Opened) -> None:
    """The error about a missing table lists the names that are like it."""
    database.write("events", [])
    database.write("events_2025", [])
    database.write("pages", [])

    text = refusal(apply(opened(database), update(1, {"user_id": "u"}, device("a"), table="Evens")))

    assert "'Evens'" in text
    assert "events, events_2025" in text
    assert "pages" not in text


def test_a_missing_column_comes_with_the_command_that_adds_it(
    database: Database, opened: Opened
) -> None:
    """The `ALTER TABLE` in the error works, and the same sink then applies the update."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(database)
    wanted = [
        update(1, {"user_id": "u1"}, device("a1")),
        update(2, {"shoe size": 44, "user id": "u1"}, device("a1"), versioned=True),
    ]

    text = refusal(apply(sink, *wanted))
    for command in text.split("add it with: ")[1].split("; ")[:2]:
        database.run(command)
    applied = apply(sink, *wanted)

    assert "'shoe size', 'user id'" in text
    assert "there is 'user_id'" in text
    assert applied.rejected == ()
    assert database.run('SELECT "shoe size", "user id" FROM events') == [(44, "u1")]


def test_a_view_is_refused(database: Database, opened: Opened) -> None:
    """Nothing is set through a view."""
    database.write("events", [row("m1", "a1", 1)])
    database.run("CREATE VIEW seen AS SELECT * FROM events")

    text = refusal(apply(opened(database), update(1, {"user_id": "u"}, device("a1"), table="seen")))

    assert "'seen' is a view" in text


def test_a_computed_column_is_refused(database: Database, opened: Opened) -> None:
    """A column that the database computes is not set."""
    text = database.types["text"]
    database.run(
        f"CREATE TABLE events (anonymous_id {text},"
        f" user_id {text} GENERATED ALWAYS AS (upper(anonymous_id)))"
    )

    found = refusal(apply(opened(database), update(1, {"user_id": "u"}, device("a1"))))

    assert "computed" in found


def test_two_names_of_one_column_are_refused(database: Database, opened: Opened) -> None:
    """Names mean the same in any case, so that two of them cannot be set to two values."""
    database.write("events", [row("m1", "a1", 1)])

    text = refusal(
        apply(opened(database), update(1, {"user_id": "u", "USER_ID": "v"}, device("a")))
    )

    assert "two names" in text
    assert database.column("user_id") == {"m1": None}


def test_numbers_are_no_times_in_duckdb(duck: Database, opened: Opened) -> None:
    """A column of numbers has no unit, and is refused as a time column."""
    duck.run('CREATE TABLE events (anonymous_id VARCHAR, user_id VARCHAR, "timestamp" BIGINT)')

    text = refusal(apply(opened(duck), update(1, {"user_id": "u"}, device("a1"), between(0, 1))))

    assert "BIGINT" in text
    assert "TIMESTAMP" in text


def test_names_mean_the_same_in_any_case(database: Database, opened: Opened) -> None:
    """A table may be written in another case, or with its schema; the ledger knows it as one."""
    database.write("Events", [row("m1", "a1", 1)])
    sink = opened(database)

    apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), table="main.EVENTS"))
    applied = apply(sink, update(1, {"STITCHED_user_id": "A"}, device("a1"), table="events"))

    assert applied.rejected == ()
    assert database.column("stitched_user_id") == {"m1": "B"}


# When the destination fails ---------------------------------------------------------------------


def test_a_missing_database_is_not_made(database: Database, opened: Opened) -> None:
    """Applying updates to a database that is not there refuses them and leaves no file behind."""
    text = refusal(apply(opened(database), update(1, {"user_id": "u"}, device("a1"))))

    assert "not even a database" in text
    assert not database.path.exists()


@pytest.mark.parametrize(
    ("scheme", "suffix"), [("sqlite", "?mode=ro&uri=true"), ("duckdb", "?access_mode=read_only")]
)
def test_a_read_only_database_is_named_so(
    tmp_path: Path, opened: Opened, scheme: str, suffix: str
) -> None:
    """A database that may only be read is an error of its own, that no retry helps."""
    database = Database(scheme, tmp_path)
    database.write("events", [row("m1", "a1", 1)])
    name = f"file:{database.path}" if scheme == "sqlite" else str(database.path)
    database.url = f"{scheme}:///{name}{suffix}"
    sink = opened(database)

    with pytest.raises(SinkReadOnlyError) as caught:
        apply(sink, update(1, {"user_id": "u"}, device("a1")))

    assert (caught.value.written, caught.value.retryable) == (False, False)


def test_a_file_that_is_no_database_is_named_so(database: Database, opened: Opened) -> None:
    """A file of something else is an error that says so."""
    database.path.write_text("this is a text " * 500)

    wanted = update(1, {"user_id": "u"}, device("a1"))
    with pytest.raises(SinkError, match=r"is not a (SQLite|DuckDB) database"):
        opened(database).compile(plan_updates([wanted]).steps[0])

    with pytest.raises(SinkError, match=r"is not a (SQLite|DuckDB) database") as caught:
        apply(opened(database), wanted)

    assert (caught.value.written, caught.value.retryable) == (False, False)


def test_a_folder_that_is_missing_is_named_so(database: Database, opened: Opened) -> None:
    """Loading into a path that cannot be opened says so."""
    database.url = f"{database.scheme}:///{database.path.parent}/nowhere/file"

    with pytest.raises(SinkUnavailableError, match="cannot be opened"):
        opened(database, timeout=0).load("events", [], key="id", columns={"id": "text"})


def test_a_lock_is_waited_for(sqlite: Database, opened: Opened) -> None:
    """A lock of another writer that is released in time is waited for."""
    sqlite.write("events", [row("m1", "a1", 1)])
    other = sqlite3.connect(sqlite.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    release.start()

    applied = apply(opened(sqlite, timeout=20), update(1, {"user_id": "u"}, device("a1")))

    release.join()
    other.close()
    assert applied.rows_changed == 1


def test_a_lock_that_stays_is_an_error_that_may_be_retried(
    sqlite: Database, opened: Opened
) -> None:
    """After the timeout a locked database is unavailable, and nothing was written."""
    sqlite.write("events", [row("m1", "a1", 1)])
    sink = opened(sqlite, timeout=0.1)
    with closing(sqlite3.connect(sqlite.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(SinkUnavailableError, match="locked") as caught:
            apply(sink, update(1, {"user_id": "u"}, device("a1")))

    assert (caught.value.written, caught.value.retryable) == (False, True)
    assert sqlite.column("user_id") == {"m1": None}
    assert apply(sink, update(1, {"user_id": "u"}, device("a1"))).rows_changed == 1


def test_duckdb_belongs_to_one_process(duck: Database, opened: Opened) -> None:
    """While another process has the file it is unavailable, which may be retried."""
    duck.write("events", [row("m1", "a1", 1)])
    code = (
        "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True);"
        " sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(duck.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()

        with pytest.raises(SinkUnavailableError, match="another process") as caught:
            apply(opened(duck, timeout=0.1), update(1, {"user_id": "u"}, device("a1")))

        holder.communicate()
    assert caught.value.retryable
    assert apply(opened(duck), update(1, {"user_id": "u"}, device("a1"))).rows_changed == 1


def test_a_conflict_in_duckdb_is_tried_again(duck: Database, opened: Opened) -> None:
    """A row that another transaction of this process is changing is met when that is over."""
    duck.write("events", [row("m1", "a1", 1)])
    other = duckdb.connect(duck.path)
    other.begin()
    other.execute("UPDATE events SET context_traits_age = 1")
    release = threading.Timer(0.2, other.commit)
    release.start()

    applied = apply(opened(duck, timeout=20), update(1, {"user_id": "u"}, device("a1")))

    release.join()
    other.close()
    assert applied.rows_changed == 1
    assert duck.run("SELECT user_id, context_traits_age FROM events") == [("u", 1)]


def test_a_failing_statement_undoes_the_plan(sqlite: Database, opened: Opened) -> None:
    """When the engine fails in the middle, all of the plan is undone, the ledger too."""
    sqlite.write("events", [row("m1", "a1", 1)])
    sqlite.write("pages", [row("m1", "a1", 1)])
    sqlite.run("CREATE TRIGGER no BEFORE UPDATE ON pages BEGIN SELECT RAISE(ABORT, 'secret'); END")

    with pytest.raises(TableError) as caught:
        apply(
            opened(sqlite),
            update(1, {"user_id": "secret-user"}, device("a1")),
            update(2, {"user_id": "secret-user"}, device("a1"), table="pages"),
        )

    assert caught.value.written is False
    assert "secret" not in str(caught.value)
    assert sqlite.column("user_id") == {"m1": None}
    assert sqlite.run("SELECT name FROM sqlite_master WHERE name LIKE 'recognition%'") == []


def test_a_constraint_undoes_the_plan_in_duckdb(duck: Database, opened: Opened) -> None:
    """A constraint that refuses the rows undoes all of the plan, and no value is shown."""
    duck.write("events", [row("m1", "a1", 1)])
    duck.run("CREATE TABLE pages (anonymous_id VARCHAR, user_id VARCHAR CHECK (user_id <> 'bad'))")
    duck.run("INSERT INTO pages VALUES ('a1', NULL)")

    with pytest.raises(TableError) as caught:
        apply(
            opened(duck),
            update(1, {"user_id": "u"}, device("a1")),
            update(2, {"user_id": "bad"}, device("a1"), table="pages"),
        )

    assert "bad" not in str(caught.value)
    assert duck.column("user_id") == {"m1": None}


def test_a_table_that_changed_is_looked_at_again(database: Database, opened: Opened) -> None:
    """A sink that knew the table applies to what it has become meanwhile."""
    text = database.types["text"]
    database.run(f"CREATE TABLE events (anonymous_id {text}, user_id {text}, spare {text})")
    database.run("INSERT INTO events VALUES ('a1', NULL, 'x')")
    sink = opened(database)
    apply(sink, update(1, {"user_id": "u1"}, device("a1"), Empty(column="user_id")))
    database.run("DROP TABLE recognition_ledger")
    database.run("DROP TABLE events")
    database.run(f"CREATE TABLE events (anonymous_id {text}, user_id {text} NOT NULL)")
    database.run("INSERT INTO events VALUES ('a1', ''), ('a2', '')")

    applied = apply(
        sink,
        update(2, {"user_id": None}, device("a1")),
        update(3, {"user_id": "u2"}, device("a2")),
    )

    assert applied.rejected == ()
    assert sorted(database.run("SELECT anonymous_id, user_id FROM events")) == [
        ("a1", ""),
        ("a2", "u2"),
    ]


def test_a_closed_sink_lets_go_of_the_file(duck: Database) -> None:
    """After `close` another process may have the DuckDB file."""
    duck.write("events", [row("m1", "a1", 1)])
    sink = open_sink(duck.url)
    apply(sink, update(1, {"user_id": "u"}, device("a1")))

    sink.close()

    code = (
        "import duckdb, sys; connection = duckdb.connect(sys.argv[1]);"
        " print(connection.execute('SELECT user_id FROM events').fetchall())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(duck.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{"timeout": -1}, {"ledger_days": 0}])
def test_settings_have_a_range(database: Database, options: dict[str, Any]) -> None:
    """A timeout or an age of the ledger that makes no sense is refused."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        open_sink(database.url, **options)


# The ledger -------------------------------------------------------------------------------------


def test_the_ledger_does_not_grow_by_repetition(database: Database, opened: Opened) -> None:
    """What was noted is not noted again, by this sink or the next."""
    database.write("events", [row("m1", "a1", 1)])
    named = Messages(
        id_column="message_id",
        time_column="timestamp",
        refs=tuple((f"m{n}", at(n)) for n in range(5)),
    )
    window = [
        update(1, {"stitched_user_id": "A"}, device("a1")),
        update(2, {"stitched_user_id": "B"}, device("a1"), between(4, 6)),
        update(3, {"stitched_user_id": "C"}, device("a2"), named),
        update(4, {"stitched_user_id": "D"}, device("a3"), named, between(0, 5)),
        update(5, {"stitched_user_id": "E"}, device("a4"), Equals(column="user_id", value="u")),
    ]

    apply(opened(database), *window)
    noted = database.run("SELECT count(*) FROM recognition_ledger")
    apply(opened(database), *window)

    assert noted == [(2 + 1 + 5 + 1 + 1,)]
    assert database.run("SELECT count(*) FROM recognition_ledger") == noted


def test_notes_that_are_there_are_not_looked_for(database: Database, opened: Opened) -> None:
    """Where a half is noted, a device of 5,000 messages took MariaDB minutes to note the other."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(9)])
    sink = opened(database)
    named = [
        Messages(
            id_column="message_id",
            time_column="timestamp",
            refs=tuple((f"m{n}", at(n)) for n in ns),
        )
        for ns in (range(3), range(3, 6))
    ]
    half = update(5, {"user_id": "A"}, device("a1"), named[0])
    late = update(1, {"user_id": "L"}, device("a1"), unknown(), between(0, 9))
    cutting = update(6, {"user_id": "C"}, device("a1"), between(2, 4))
    apply(sink, half, cutting)
    apply(sink, late)
    sent = _sent(sink)

    apply(sink, half, update(7, {"user_id": "B"}, device("a1"), named[1]))
    apply(sink, late)
    noted = database.run("SELECT update_id, count(*) FROM recognition_ledger GROUP BY 1 ORDER BY 1")
    apply(sink, late, half, cutting)

    found = database.run("SELECT update_id, count(*) FROM recognition_ledger GROUP BY 1 ORDER BY 1")
    inserts = [text for text in sent if text.startswith("INSERT INTO recognition_ledger")]
    assert found == noted == [("events-1", 2), ("events-5", 2), ("events-6", 1), ("events-7", 3)]
    assert len(inserts) == 1
    assert "EXISTS" not in inserts[0]
    assert list(database.column("user_id").values()) == [*"AA", "C", *"BBB", *"LLL"]


def test_versions_need_no_ledger(database: Database, opened: Opened) -> None:
    """Where each row has its version, no table is made."""
    database.write("events", [row("m1", "a1", 1)])

    apply(opened(database), update(1, {"user_id": "u"}, device("a1"), versioned=True))

    tables = (
        database.run("SELECT table_name FROM information_schema.tables")
        if (database.scheme == "duckdb")
        else database.run("SELECT name FROM sqlite_master WHERE type = 'table'")
    )
    assert tables == [("events",)]


def test_the_ledger_forgets_after_its_days(database: Database, opened: Opened) -> None:
    """Notes that are older than the limit go, once a day for each sink."""
    database.write("events", [row("m1", "a1", 1)])
    apply(opened(database), update(1, {"stitched_user_id": "A"}, device("a1")))
    apply(opened(database), update(2, {"stitched_user_id": "A"}, device("a2")))
    aged = "UPDATE recognition_ledger SET applied_at = applied_at - ? WHERE update_id = 'events-1'"
    database.run(aged, 10 * 86_400 * 1_000_000 + 1)

    apply(opened(database, ledger_days=11), update(3, {"stitched_user_id": "A"}, device("a3")))
    kept = database.run("SELECT count(*) FROM recognition_ledger")
    sink = opened(database, ledger_days=10)
    apply(sink, update(3, {"stitched_user_id": "A"}, device("a3")))
    forgot = database.run("SELECT update_id FROM recognition_ledger")
    database.run(aged.replace("-1'", "-2'"), 10 * 86_400 * 1_000_000 + 1)
    apply(sink, update(4, {"stitched_user_id": "A"}, device("a4")))
    within_a_day = database.run("SELECT count(*) FROM recognition_ledger")
    assert sink._pruned is not None
    sink._pruned -= 86_401
    apply(sink, update(5, {"stitched_user_id": "A"}, device("a5")))

    assert kept == within_a_day == [(3,)]
    assert sorted(forgot) == [("events-2",), ("events-3",)]
    assert sorted(database.run("SELECT update_id FROM recognition_ledger")) == [
        ("events-3",),
        ("events-4",),
        ("events-5",),
    ]


def test_what_another_thread_forgets_of_the_tables_is_looked_up(
    database: Database, opened: Opened
) -> None:
    """A thread whose plan fails forgets all tables; a plan that is on its way looks again."""
    tables = ("events", "pages")
    for table in tables:
        database.write(table, [row("m1", "a1", 1)])
    sink = opened(database)

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def forget(_: Any, __: Any, text: str, *rest: Any) -> None:
        if "SELECT recognition_stage" in text:
            sink._targets.clear()

    updates = [update(n, {"user_id": "u"}, device("a1"), table=t) for n, t in enumerate(tables)]

    assert apply(sink, *updates).rows_changed == 2


def test_what_was_applied_before_is_read_once(database: Database, opened: Opened) -> None:
    """A window that comes again reads the table once; it is written to where a row has come."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(3)])
    sink = opened(database)
    window = [
        update(1, {"user_id": "A"}, device("a1"), unknown(), between(0, 2)),
        update(2, {"user_id": "B"}, device("a1"), unknown(), between(2, 9)),
    ]
    first = apply(sink, *window)
    sent: list[str] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def note(_: Any, __: Any, text: str, *rest: Any) -> None:
        if re.search(r"(FROM|JOIN|UPDATE|INTO) (events|recognition_ledger)\b", text):
            sent.append(text.partition(" ")[0])

    again = apply(sink, *window)
    once = [*sent]
    database.write("events", [row("m3", "a1", 3)])
    sent.clear()
    late = apply(sink, *window)
    overtaken = apply(sink, update(3, {"user_id": "C"}, device("a1"), between(0, 1)), *window)

    assert first.rows_changed == 3
    assert (again.rows_changed, again.rows_matched) == (0, 3)
    assert again.matched_by_update == {"events-1": 2, "events-2": 1}
    assert [text for text in once if text != "CREATE"] == ["SELECT", "SELECT"]  # ledger, events
    assert (late.rows_changed, late.matched_by_update) == (1, {"events-1": 2, "events-2": 2})
    assert overtaken.rows_changed == 1
    assert database.column("user_id") == {"m0": "C", "m1": "A", "m2": "B", "m3": "B"}


@pytest.mark.parametrize("others", [False, True], ids=["its own", "a later one's"])
def test_messages_of_one_device_meet_each_note_once(
    database: Database, opened: Opened, others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the messages brought all notes of its device: 7 s for 1,000 that came again."""
    count = 1_000
    database.write("events", [row(f"m{n}", "a1", n) for n in range(count)])
    refs = tuple((f"m{n}", at(n)) for n in range(count))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    sink = opened(database)
    last = update(2, {"stitched_user_id": "B"}, device("a1"), named, expected_rows=count)
    apply(sink, last)
    database.run("UPDATE events SET stitched_user_id = NULL WHERE message_id = 'm7'")
    again = last
    if others:
        rest = named.model_copy(update={"refs": (*refs, ("m8b", at(8)))})
        again = update(1, {"stitched_user_id": "A"}, device("a1"), rest, expected_rows=count + 1)
        database.write("events", [row("m8b", "a1", 8)])
    read: list[Note] = []

    def note(*line: Any) -> Note:
        read.append(Note(*line))
        return read[-1]

    monkeypatch.setattr("recognition.sinks.sql.Note", note)

    applied = apply(sink, again)

    found = database.column("stitched_user_id")
    assert applied.rows_changed == 1
    if others:
        assert [name for name, user in found.items() if user != "B"] == ["m7", "m8b"]
        assert (found["m7"], found["m8b"]) == (None, "A")
    else:
        assert set(found.values()) == {"B"}
        assert applied.matched_by_update == {"events-2": count}
    assert len(read) == count


def test_ids_that_are_uuids_are_the_same_in_any_spelling(duck: Database, opened: Opened) -> None:
    """What a later update named by a UUID in capitals, as iOS writes them, an older one leaves."""
    duck.run("CREATE TABLE events (message_id UUID, anonymous_id TEXT, t TIMESTAMP, user_id TEXT)")
    name = "00000000-0000-0ABC-0000-000000000000"
    duck.run("INSERT INTO events VALUES (?, 'a1', ?, NULL)", name, at(0).replace(tzinfo=None))
    named = Messages(id_column="message_id", time_column="t", refs=((name, at(0)),))
    sink = opened(duck)
    later = update(2, {"user_id": "B"}, device("a1"), named)

    apply(sink, later)
    apply(sink, update(1, {"user_id": "A"}, device("a1"), named))
    kept = duck.run("SELECT user_id FROM events")
    apply(sink, later)

    assert kept == [("B",)]
    assert duck.run("SELECT update_id FROM recognition_ledger") == [("events-2",)]


def test_schemas_have_tables_of_one_name(duck: Database, opened: Opened) -> None:
    """What a later update took of a schema's table is not taken of another schema's."""
    for schema in ("a", "b"):
        duck.run(f"CREATE SCHEMA {schema}")
        duck.run(f"CREATE TABLE {schema}.events (anonymous_id TEXT, user_id TEXT)")
        duck.run(f"INSERT INTO {schema}.events VALUES ('a1', NULL)")
    sink = opened(duck)
    apply(sink, update(2, {"user_id": "B"}, device("a1"), table="a.events"))

    apply(sink, update(1, {"user_id": "A"}, device("a1"), table="b.events"))

    found = [duck.run(f"SELECT user_id FROM {schema}.events") for schema in ("a", "b")]
    assert found == [[("B",)], [("A",)]]


def test_a_table_is_the_same_however_it_is_named(duck: Database, opened: Opened) -> None:
    """With its schema and database or without, a table has one order of its updates."""
    duck.run("CREATE SCHEMA a")
    for table in ("a.events", "pages"):
        duck.run(f"CREATE TABLE {table} (anonymous_id TEXT, user_id TEXT)")
        duck.run(f"INSERT INTO {table} VALUES ('a1', NULL)")
    sink = opened(duck)
    apply(sink, update(2, {"user_id": "B"}, device("a1"), table="a.events"))
    apply(sink, update(4, {"user_id": "D"}, device("a1"), table="main.pages"))

    apply(sink, update(1, {"user_id": "A"}, device("a1"), table="warehouse.a.events"))
    apply(sink, update(3, {"user_id": "C"}, device("a1"), table="pages"))

    found = [duck.run(f"SELECT user_id FROM {table}") for table in ("a.events", "pages")]
    assert found == [[("B",)], [("D",)]]


def test_rows_that_a_later_update_named_are_spared(database: Database, opened: Opened) -> None:
    """An update of an interval that comes late leaves alone what a later one named by message."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(4)])
    sink = opened(database)
    refs = (("m1", at(1)), ("m3", at(3)))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), named))

    late = apply(
        sink,
        update(
            1, {"stitched_user_id": "A", "context_traits_email": "a"}, device("a1"), between(0, 9)
        ),
    )

    assert database.column("stitched_user_id") == {"m0": "A", "m1": "B", "m2": "A", "m3": "B"}
    assert set(database.column("context_traits_email").values()) == {"a"}
    assert late.rows_changed == 6


def test_ways_of_one_key_are_kept_apart(database: Database, opened: Opened) -> None:
    """Another workspace, another further value or other columns take nothing from an update."""
    database.write("events", [row("m1", "a1", 1, user_id="x"), row("m2", "a1", 1, user_id="y")])
    sink = opened(database)
    user_x, user_y = (Equals(column="user_id", value=value) for value in "xy")
    later = [
        update(5, {"stitched_user_id": "B"}, device("a1"), user_x),
        update(6, {"context_traits_email": "b"}, device("a1")),
        update(7, {"stitched_user_id": "B"}, device("a1")).model_copy(update={"workspace": "w2"}),
    ]
    apply(sink, later[0], later[1])

    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1"), user_y))
    apply(sink, update(2, {"stitched_user_id": "late"}, device("a1"), user_x))
    kept = database.column("stitched_user_id")
    apply(sink, later[2])
    apply(sink, update(8, {"stitched_user_id": "C"}, device("a1")))

    assert kept == {"m1": "B", "m2": "A"}
    assert database.column("stitched_user_id") == {"m1": "C", "m2": "C"}


def test_a_value_is_looked_for_and_replaced(database: Database, opened: Opened) -> None:
    """An update by what a column holds replaces it, after what was written in the same plan."""
    database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1, user_id="old")])

    applied = apply(
        opened(database),
        update(1, {"user_id": "old"}, device("a1"), unknown()),
        update(2, {"user_id": "new"}, Equals(column="user_id", value="old")),
    )

    assert database.column("user_id") == {"m1": "new", "m2": "new"}
    assert [step.rows_changed for step in applied.steps] == [1, 2]


def test_processes_that_write_at_once_converge(sqlite: Database) -> None:
    """Two processes that apply the same updates in opposite orders leave the right rows."""
    sqlite.write("events", [row(f"m{n}-{k}", f"a{k}", n) for n in range(10) for k in range(3)])
    code = (
        "import sys\n"
        "from recognition.messages import read_updates\n"
        "from recognition.planner import plan_updates\n"
        "from recognition.sinks import open_sink\n"
        "updates = [u for _, u in read_updates(sys.stdin)]\n"
        "sink = open_sink(sys.argv[1], timeout=60)\n"
        "for u in updates: sink.apply(plan_updates([u]))\n"
    )
    updates = [
        update(n, {"stitched_user_id": f"u{n}"}, device(f"a{n % 3}"), between(n % 7, n % 7 + 4))
        for n in range(1, 25)
    ]
    lines = [each.to_json() for each in updates]
    workers = [
        subprocess.Popen([sys.executable, "-c", code, sqlite.url], stdin=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker, order in zip(workers, (lines, lines[::-1]), strict=True):
        assert worker.stdin is not None
        worker.stdin.write("\n".join(order))
        worker.stdin.close()

    codes = [worker.wait(timeout=60) for worker in workers]

    assert codes == [0, 0]
    expected = {
        f"m{n}-{k}": max(
            (
                each.sequence
                for each in updates
                if each.sequence % 3 == k and each.sequence % 7 <= n < each.sequence % 7 + 4
            ),
            default=None,
        )
        for n in range(10)
        for k in range(3)
    }
    assert sqlite.column("stitched_user_id") == {
        name: None if last is None else f"u{last}" for name, last in expected.items()
    }


def test_threads_share_a_sink(database: Database, opened: Opened) -> None:
    """One sink may be used by several threads; their plans come one after the other."""
    database.write("events", [row(f"m{n}", f"a{n % 4}", n) for n in range(40)])
    sink = opened(database)
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for n in range(4):
                owner = {"stitched_user_id": f"u{worker}"}
                apply(sink, update(10 * n + worker, owner, device(f"a{n}")))
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert set(database.column("stitched_user_id").values()) == {"u3"}


# Any order --------------------------------------------------------------------------------------

_SPANS = st.tuples(st.integers(0, 9), st.integers(1, 8)).map(
    lambda pair: between(pair[0], sum(pair))
)
_REFS = st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(
    lambda seconds: Messages(
        id_column="message_id",
        time_column="timestamp",
        refs=tuple((f"m{n}", at(n)) for n in seconds),
    )
)
_DEVICES = st.sampled_from(
    [device("a0"), device("a1"), OneOf(column="anonymous_id", values=("a0", "a1"))]
)
_OWNERS = st.none() | st.sampled_from(["A", "B", "C"])


@st.composite
def _windows_by_ledger(draw: st.DrawFn) -> list[Any]:
    """Any columns, devices, and intervals or messages; no condition on what is written."""
    sets = st.dictionaries(
        st.sampled_from(["stitched_user_id", "context_traits_email"]), _OWNERS, min_size=1
    )
    parts = draw(st.lists(st.tuples(sets, _DEVICES, st.none() | _SPANS | _REFS), max_size=7))
    return [
        update(n, values, key, *([] if further is None else [further]))
        for n, (values, key, further) in enumerate(parts)
    ]


@st.composite
def _windows_by_version(draw: st.DrawFn) -> list[Any]:
    """Two columns that are always set together, in rows of unknown users."""
    parts = draw(st.lists(st.tuples(_OWNERS, _DEVICES, st.none() | _SPANS | _REFS), max_size=7))
    return [
        update(
            n,
            {"user_id": owner, "context_traits_email": owner},
            key,
            unknown(),
            *([] if further is None else [further]),
            versioned=True,
        )
        for n, (owner, key, further) in enumerate(parts)
    ]


def _rows_of_two_devices() -> list[Mapping[str, object]]:
    anonymous = [row(f"m{n}", f"a{n % 2}", n) for n in range(10)]
    return [*anonymous, row("known", "a0", 4, user_id="K", recognition_version=None)]


def _meets(found: Mapping[str, object], criteria: Sequence[Criterion]) -> bool:
    """By the criteria alone, of a row as it was before any update."""
    for each in criteria:
        if isinstance(each, Equals) and found.get(each.column) != each.value:
            return False
        if isinstance(each, OneOf) and found.get(each.column) not in each.values:
            return False
        if isinstance(each, Empty) and found.get(each.column) is not None:
            return False
        if isinstance(each, Messages) and found["message_id"] not in dict(each.refs):
            return False
        if isinstance(each, Between):
            time = found["timestamp"]
            assert isinstance(time, datetime)
            if not each.start <= time < each.end:
                return False
    return True


def _expected(window: Sequence[Any], column: str) -> dict[object, object]:
    """The greatest sequence that sets the column and meets the row stands."""
    expected = {}
    for found in _rows_of_two_devices():
        setting = [u for u in window if column in u.set and _meets(found, u.where)]
        last = max(setting, key=lambda each: each.sequence, default=None)
        expected[found["message_id"]] = found.get(column) if last is None else last.set[column]
    return expected


def _apply_in_any_order(database: Database, window: Sequence[Any], random: Random) -> None:
    """Shuffled, with repetition, in plans of any size, by sinks that know nothing of each other."""
    database.write("events", _rows_of_two_devices())
    again = [*window, *random.sample(window, len(window) // 2)]
    random.shuffle(again)
    sink = open_sink(database.url)
    while again:
        size = random.randint(1, 4)
        applied = apply(sink, *again[:size])
        assert applied.rejected == ()
        again = again[size:]
        if random.random() < 0.2:
            sink.close()
            sink = open_sink(database.url)
    sink.close()


@pytest.mark.parametrize(("scheme", "examples"), [("sqlite", 60), ("duckdb", 12)])
@pytest.mark.parametrize("way", ["ledger", "version"])
def test_any_order_and_any_plans_converge(
    tmp_path_factory: pytest.TempPathFactory, scheme: str, examples: int, way: str
) -> None:
    """Shuffled, repeated and cut into plans at random, updates leave what the last one says."""
    windows = _windows_by_ledger() if way == "ledger" else _windows_by_version()
    columns = ("stitched_user_id", "context_traits_email", "user_id")

    @settings(max_examples=examples, deadline=None, database=None)
    @given(windows, st.integers(0, 10**6))
    def check(window: list[Any], seed: int) -> None:
        database = Database(scheme, tmp_path_factory.mktemp("any"))

        _apply_in_any_order(database, window, Random(seed))

        for column in columns:
            assert database.column(column) == _expected(window, column)

    check()


# Loading rows -----------------------------------------------------------------------------------

COLUMNS = {
    "message_id": "text",
    "anonymous_id": "text",
    "user_id": "text",
    "timestamp": "time",
    "age": "integer",
    "score": "float",
    "subscribed": "boolean",
}


def _microseconds(seconds: float) -> int:
    zero = datetime(1970, 1, 1, tzinfo=UTC)
    return (START + timedelta(seconds=seconds) - zero) // timedelta(microseconds=1)


def test_load_makes_the_table_and_inserts(database: Database, opened: Opened) -> None:
    """Loading creates the table with typed columns, and rows that updates find."""
    sink = opened(database)
    rows = [
        {
            "message_id": f"m{n}",
            "anonymous_id": "a1",
            "timestamp": _microseconds(n + 0.000001),
            "age": n,
            "score": n / 2,
            "subscribed": n % 2 == 0,
        }
        for n in range(3)
    ]

    inserted = sink.load("events", rows, key="message_id", columns=COLUMNS)
    applied = apply(sink, update(1, {"user_id": "u"}, device("a1"), unknown(), between(1, 2)))

    assert (inserted, applied.rows_changed) == (3, 1)
    assert database.column("user_id") == {"m0": None, "m1": "u", "m2": None}
    found = database.run(
        "SELECT message_id, CAST(timestamp AS VARCHAR), age, score, subscribed FROM events"
    )
    assert sorted(found)[1] == ("m1", "2026-01-01 12:00:01.000001", 1, 0.5, False)


def test_load_is_found_by_index_in_sqlite(sqlite: Database, opened: Opened) -> None:
    """The key is unique, and the device has an index, whatever it is called."""
    sink = opened(sqlite)
    sink.load("events", [], key="message_id", columns=COLUMNS)
    sink.load("Hits", [], key="id", columns={"id": "text", "My Id": "text"}, index=["My Id", "x"])

    indexes = "SELECT name FROM pragma_index_list(?) ORDER BY name"
    assert sqlite.run(indexes, "events") == [
        ("events_anonymous_id",),
        ("sqlite_autoindex_events_1",),
    ]
    assert sqlite.run(indexes, "Hits") == [("Hits_My Id",), ("sqlite_autoindex_Hits_1",)]


def test_load_keeps_the_first_of_a_key(database: Database, opened: Opened) -> None:
    """Of rows with one key the first stands, within a batch and between batches."""
    sink = opened(database)
    batch = [{"message_id": "m1", "user_id": "first"}, {"message_id": "m1", "user_id": "second"}]

    counts = [
        sink.load("events", rows, key="message_id", columns=COLUMNS)
        for rows in (batch, [{"message_id": "m1", "user_id": "third"}, {"message_id": "m2"}], batch)
    ]

    assert counts == [1, 1, 0]
    assert database.column("user_id") == {"m1": "first", "m2": None}


STAMPS = ("user_id", "age", "recognition_version")

#: What a row holds, what is loaded for it, and what it holds then, by `STAMPS`.
STAMPED: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]] = {
    "nobody's": ((None, 1, None), ("u", 2, 5), ("u", 2, 5)),
    "another's": (("v", 1, 3), ("u", None, 5), ("u", None, 5)),
    "the same owner's": (("u", 1, 3), ("u", 2, 3), ("u", 2, 3)),
    "of an older version": (("u", 1, 3), ("u", 1, 5), ("u", 1, 5)),
    "of a newer version": (("v", 1, 7), ("u", 2, 5), ("v", 1, 7)),
    "of no version": (("v", 1, None), ("u", 2, 5), ("u", 2, 5)),
    "nobody's any more": (("v", 1, 7), (None, 2, None), (None, None, 7)),
    "nobody's still": ((None, 1, None), (None, 2, None), (None, 1, None)),
}


@pytest.mark.parametrize("case", STAMPED)
def test_load_replaces_the_stamp(database: Database, opened: Opened, case: str) -> None:
    """A row that is there gets the stamp that is loaded, and keeps all else; others keep theirs."""
    sink = opened(database)
    columns = COLUMNS | {"recognition_version": "integer"}
    held, loaded, expected = STAMPED[case]

    def load(stamp: tuple[Any, ...], score: float) -> int:
        row = {**dict(zip(STAMPS, stamp, strict=True)), "score": score}
        rows = [{"message_id": name, **row} for name in ("m1", "own")]
        return sink.load(
            "events", rows, key="message_id", columns=columns, stamps=STAMPS, stamped={"m1"}
        )

    inserted = [load(held, 0.5), load(loaded, 1.5), load(loaded, 1.5)]
    found = database.run(
        "SELECT user_id, age, recognition_version, score FROM events ORDER BY message_id"
    )

    assert inserted == [2, 0, 0]
    assert found == [(*expected, 0.5), (*held, 0.5)]


def test_load_replaces_the_stamp_where_it_may_not_be_null(
    database: Database, opened: Opened
) -> None:
    """In a text column that is NOT NULL nobody is '', whatever the collation of the table."""
    collation = "NOCASE"
    database.run(
        "CREATE TABLE events (message_id VARCHAR PRIMARY KEY,"
        f" user_id VARCHAR COLLATE {collation} NOT NULL, plan VARCHAR NOT NULL)"
    )
    columns = {"message_id": "text", "user_id": "text", "plan": "text"}
    sink = opened(database)
    found = []
    for user, plan in [("u", "pro"), ("U", "pro"), (None, "free"), (None, "free"), ("u", None)]:
        rows = [{"message_id": "m1", "user_id": user, "plan": plan}]
        stamps = ("user_id", "plan")
        sink.load("events", rows, key="message_id", columns=columns, stamps=stamps, stamped={"m1"})
        found += database.run("SELECT user_id, plan FROM events")

    assert found == [("u", "pro"), ("U", "pro"), ("", ""), ("", ""), ("u", "")]


def test_load_that_changes_nothing_writes_no_row(sqlite: Database, opened: Opened) -> None:
    """Rows whose stamp is the same are not touched."""
    sink = opened(sqlite)
    rows = [{"message_id": "m1", "user_id": "u", "age": 1}, {"message_id": "m2", "age": 2}]
    stamped = {"stamps": ("user_id", "age"), "stamped": {"m1", "m2"}}
    sink.load("events", rows, key="message_id", columns=COLUMNS, **stamped)
    sqlite.run(
        "CREATE TRIGGER never BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'written'); END"
    )

    inserted = sink.load("events", rows, key="message_id", columns=COLUMNS, **stamped)

    assert inserted == 0


def test_load_adds_columns(database: Database, opened: Opened) -> None:
    """A column that the table lacks is added, and stays."""
    sink = opened(database)
    sink.load("Order Details", [{"id": "1"}], key="id", columns={"id": "text"})

    sink.load(
        "Order Details",
        [{"id": "2", "Shoe Size": 44}],
        key="id",
        columns={"id": "text", "Shoe Size": "integer"},
    )

    assert sorted(database.run('SELECT id, "Shoe Size" FROM "Order Details"')) == [
        ("1", None),
        ("2", 44),
    ]


def test_load_refuses_a_view(database: Database, opened: Opened) -> None:
    """Rows are not loaded into a view."""
    database.write("events", [])
    database.run("CREATE VIEW seen AS SELECT * FROM events")

    with pytest.raises(TableError, match="'seen' is a view"):
        opened(database).load("seen", [], key="message_id", columns={"message_id": "text"})


def test_duckdb_loads_without_arrow(
    duck: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pyarrow the same rows are staged as lists, of every type, nulls included."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    rows = [
        {"message_id": "m1", "anonymous_id": "a1", "timestamp": _microseconds(1), "score": 0.5},
        {"message_id": "m2", "anonymous_id": "a1", "age": 2, "subscribed": True},
    ]
    sink = opened(duck)

    inserted = sink.load("events", rows, key="message_id", columns=COLUMNS)
    applied = apply(sink, update(1, {"user_id": "u"}, device("a1"), between(0, 2)))

    assert (inserted, applied.rows_changed) == (2, 1)
    assert sorted(duck.run("SELECT message_id, user_id, age, score, subscribed FROM events")) == [
        ("m1", "u", None, 0.5, None),
        ("m2", None, 2, None, True),
    ]


# Finding a sink ---------------------------------------------------------------------------------


def test_importing_sinks_loads_no_driver() -> None:
    """`import recognition.sinks` loads neither SQLAlchemy nor a driver."""
    code = "import sys, recognition.sinks; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"sqlalchemy", "duckdb", "sqlite3", "pyarrow"} & set(done.stdout.split())


def test_an_unknown_scheme_lists_the_installed() -> None:
    """A scheme without a sink says which there are, and the nearest, and shows no password."""
    with pytest.raises(UnknownSchemeError) as caught:
        open_sink("sqlit://user:hunter2@host/db")

    text = str(caught.value)
    assert "did you mean 'sqlite'?" in text
    assert ", ".join(installed_schemes()) in text
    assert "hunter2" not in text


@pytest.mark.parametrize("url", ["warehouse.db", "", "://x", "C\\warehouse.db"])
def test_what_is_no_url_is_refused(url: str) -> None:
    """A path is no URL."""
    with pytest.raises(ConfigurationError, match="sqlite:///"):
        open_sink(url)


@pytest.mark.parametrize("url", ["sqlite://host/x", "sqlite:x", "duckdb:x"])
def test_a_url_of_another_form_is_refused(url: str) -> None:
    """The form of the URL is shown when it is another one."""
    with pytest.raises(ConfigurationError, match="relative/path"):
        open_sink(url)


def test_a_missing_driver_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its driver a sink says what to install."""
    monkeypatch.delitem(sys.modules, "recognition.sinks.duckdb", raising=False)
    monkeypatch.setitem(sys.modules, "duckdb", None)

    with pytest.raises(MissingDependencyError, match=r'pip install "recognition\[duckdb\]"'):
        open_sink("duckdb:///x")


def _plugins(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = EntryPoints(
        EntryPoint(name, value, "recognition.sinks") for name, value in points.items()
    )
    monkeypatch.setattr(recognition.sinks, "entry_points", found.select)


def test_a_plugin_is_found_by_its_scheme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A sink of a third party is opened by its entry point, with the URL and the options."""
    _plugins(monkeypatch, ours=f"{__name__}:_Plugin")

    sink = open_sink("ours+driver://host", size=3)

    assert isinstance(sink, _Plugin)
    assert (sink.url, sink.size) == ("ours+driver://host", 3)
    assert {"duckdb", "ours", "sqlite"} <= set(installed_schemes())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tmeout": 3}, "takes no option 'tmeout'; did you mean 'timeout'?"),
        ({"url": "x"}, "takes no option 'url'; it takes timeout, ledger_days, add_missing_columns"),
        ({"timeout": "hunter2"}, "option 'timeout': Input should be a valid number"),
        ({"add_missing_columns": "hunter2"}, "option 'add_missing_columns': Input should be a"),
        ({"timeout": -1}, "timeout is -1.0 seconds; it is at least 0"),
    ],
)
def test_an_option_that_a_sink_does_not_take_is_refused(
    options: dict[str, object], told: str
) -> None:
    """A wrong name names the nearest, a wrong value its type; no value is shown that may be one."""
    with pytest.raises(ConfigurationError) as caught:
        open_sink("sqlite:///x.db", **options)

    assert told in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_options_may_be_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they come from the environment: a text becomes the number that the sink takes."""
    _plugins(monkeypatch, ours=f"{__name__}:_Plugin")

    sink = open_sink("ours://host", size="3")

    assert isinstance(sink, _Plugin)
    assert sink.size == 3


def test_a_plugin_without_its_driver_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin whose driver is missing says which package that is."""
    _plugins(monkeypatch, broken="no_such_driver_of_ours:Sink")

    with pytest.raises(MissingDependencyError, match="no_such_driver_of_ours"):
        open_sink("broken://host")


class _Plugin:
    def __init__(self, url: str, size: int) -> None:
        self.url = url
        self.size = size
