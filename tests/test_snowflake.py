"""Snowflake's sink through the real dialect and connector, on a server that speaks to them."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa

from fakesnow_server import CONNECT_ARGS, Server, open_server
from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
    ValueRefusedError,
)
from recognition.messages import Between, Messages
from recognition.planner import plan_updates
from recognition.sinks import Sink, open_sink
from recognition.sinks import snowflake as module
from recognition.sinks.snowflake import SnowflakeSink
from recognition.testing import SinkTests
from recognition.testing.sinks import (
    HOSTILE_NAMES,
    at,
    between,
    device,
    row,
    unknown,
    update,
)
from sinks import Rows, ServerKit, apply, refusal, spoken
from test_golden import WINDOWS

Opened = Callable[..., SnowflakeSink]


class Database:
    """A database of its own, looked at by an engine of the dialect's, around the sink."""

    types: ClassVar[Mapping[str, str]] = {
        "text": "VARCHAR",
        "time": "TIMESTAMP_NTZ",
        "integer": "NUMBER(38, 0)",
        "float": "FLOAT",
        "boolean": "BOOLEAN",
    }

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = f"db_{secrets.token_hex(6)}"
        self.url = server.url(self.name)
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
        return dict(map(tuple, self.run(f"SELECT message_id, {column} FROM {table}")))


def _plain(value: object) -> object:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) else value


@pytest.fixture
def database(fakesnow: Server) -> Iterator[Database]:
    """An empty database."""
    database = Database(fakesnow)
    yield database
    fakesnow.fail()
    database.engine.dispose()


@pytest.fixture
def opened(database: Database) -> Iterator[Opened]:
    """Open sinks that are closed at the end."""
    sinks: list[SnowflakeSink] = []

    def open_it(url: str = database.url, **options: Any) -> SnowflakeSink:
        given = {**CONNECT_ARGS, **options.pop("connect_args", {})}
        sink = open_sink(url, connect_args=given, **options)
        assert isinstance(sink, SnowflakeSink)
        sinks.append(sink)
        return sink

    yield open_it
    for sink in sinks:
        sink.close()


class TestSnowflake(ServerKit):
    """The kit, unchanged."""

    @pytest.fixture
    def sink(self, opened: Opened) -> Sink:
        return opened()

    @pytest.mark.xfail(
        raises=sa.exc.ProgrammingError,
        reason="fakesnow takes $table in a quoted name for a variable; it refuses CREATE TABLE",
    )
    def test_hostile_names_are_names(self, sink: Any, write_rows: Any, read_rows: Any) -> None:
        super().test_hostile_names_are_names(sink, write_rows, read_rows)


class TestMerge(TestSnowflake):
    """The kit by MERGE, which takes its rows from a stage however few they are."""

    @pytest.fixture
    def sink(self, opened: Opened) -> Sink:
        return opened(statement="merge")


def sent(sink: SnowflakeSink) -> list[str]:
    """The texts of all statements that the sink sends from now on, COMMIT among them."""
    texts: list[str] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        texts.append(statement)

    @sa.event.listens_for(sink._engine, "commit")
    def committed(_: Any) -> None:
        texts.append("COMMIT")

    @sa.event.listens_for(sink._engine, "rollback")
    def rolled_back(_: Any) -> None:
        texts.append("ROLLBACK")

    return texts


# Sessions ---------------------------------------------------------------------------------------


def test_a_login_sets_the_session(database: Database, opened: Opened) -> None:
    """Tag, zone, limits and what is an error go with the login, as do role and warehouse."""
    database.write("events", [])
    apply(opened(timeout=90, statement_timeout=600), update(1, {"user_id": "u1"}, device("a1")))

    login = database.server.logins()[-1]

    assert (login["warehouse"], login["role"]) == ("wh", "loader")
    assert {name: login["parameters"][name] for name in SESSION} == SESSION


#: What a session of the sink is told; the connector sends texts.
SESSION = {
    "QUERY_TAG": "recognition",
    "TIMEZONE": "UTC",
    "AUTOCOMMIT": "false",
    "ERROR_ON_NONDETERMINISTIC_UPDATE": "true",
    "ERROR_ON_NONDETERMINISTIC_MERGE": "true",
    "QUOTED_IDENTIFIERS_IGNORE_CASE": "false",
    "LOCK_TIMEOUT": "90",
    "STATEMENT_TIMEOUT_IN_SECONDS": "600",
}


#: The question for a table, and what its answer holds.
TABLES = "SELECT table_catalog, table_schema, table_name, table_type"
NAMES = ["table_catalog", "table_schema", "table_name", "table_type"]


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in HOSTILE_NAMES if "$" not in name])
def test_awkward_names_are_names(database: Database, opened: Opened, name: str) -> None:
    """What the kit asks of names, without the one of them that fakesnow cannot hold."""
    database.write(name, [row("m1", "a1", 1)])

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), table=name))

    assert applied.rejected == ()
    assert [found["user_id"] for found in database.read(name)] == ["u1"]


def test_names_in_quotes_are_exact(database: Database, opened: Opened) -> None:
    """Tables, columns and schemas that were made in quotes are met, in lower and in mixed case."""
    database.run('CREATE SCHEMA "quoted"')
    database.run(
        'CREATE TABLE "quoted"."events" ("messageId" VARCHAR, "anonymous_id" VARCHAR, "userId"'
        " VARCHAR, USER_NAME VARCHAR)"
    )
    database.run("INSERT INTO \"quoted\".\"events\" VALUES ('m1', 'a1', NULL, NULL)")
    sink = opened()

    applied = apply(
        sink,
        update(1, {"userid": "u1", "user_name": "U"}, device("a1"), table="Quoted.Events"),
        update(2, {"userId": "u2"}, device("a1"), table=f"{database.name}.quoted.events"),
    )

    assert applied.rejected == ()
    assert database.run('SELECT * FROM "quoted"."events"') == [("m1", "a1", "u2", "U")]


def test_names_that_differ_in_case_alone_are_refused(database: Database, opened: Opened) -> None:
    """Of two tables whose names differ in case alone none is taken, and both are shown."""
    database.write("events", [row("m1", "a1", 1)])
    database.server.fail(
        {
            "begins": TABLES,
            "columns": NAMES,
            "rows": [
                ["D", "PUBLIC", "EVENTS", "BASE TABLE"],
                ["D", "PUBLIC", "events", "BASE TABLE"],
            ],
        }
    )

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1")))

    assert "'D.PUBLIC.EVENTS' and 'D.PUBLIC.events'" in refusal(applied)
    assert database.column("user_id") == {"m1": None}


def test_a_name_with_capitals_is_taken_as_it_is_spelled(database: Database, opened: Opened) -> None:
    """Of names that differ in case alone, the one with capitals that is spelled so is meant."""
    database.write("Events", [row("m1", "a1", 1)])
    database.server.fail(
        {
            "begins": TABLES,
            "columns": NAMES,
            "rows": [
                ["D", "PUBLIC", "EVENTS", "BASE TABLE"],
                ["D", "PUBLIC", "Events", "BASE TABLE"],
            ],
        }
    )

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), table="Events"))

    assert applied.rejected == ()
    assert [found["user_id"] for found in database.read("Events")] == ["u1"]


def test_columns_that_differ_in_case_alone_are_refused(database: Database, opened: Opened) -> None:
    """An update that means one of two such columns is refused; others of the table are applied."""
    database.write("events", [row("m1", "a1", 1)])
    found = [
        ["USER_ID", "TEXT", "YES", None, None, None],
        ["user_id", "TEXT", "YES", None, None, None],
        ["ANONYMOUS_ID", "TEXT", "YES", None, None, None],
        ["STITCHED_USER_ID", "TEXT", "YES", None, None, None],
    ]
    database.server.fail(
        {
            "begins": "SELECT column_name",
            "columns": [f"c{n}" for n in range(6)],
            "rows": found,
            "times": 9,
        }
    )

    applied = apply(
        opened(),
        update(1, {"user_id": "u1"}, device("a1")),
        update(2, {"stitched_user_id": "u1"}, device("a1")),
    )

    assert "column 'user_id': there is 'USER_ID' and 'user_id'" in refusal(applied)
    assert database.column("stitched_user_id") == {"m1": "u1"}


def test_a_missing_database_is_a_missing_table(database: Database, opened: Opened) -> None:
    """A table of a database or schema that is not there is refused, and the rest goes on."""
    database.write("events", [row("m1", "a1", 1)])

    applied = apply(
        opened(),
        update(1, {"user_id": "u1"}, device("a1"), table="nowhere.public.events"),
        update(2, {"user_id": "u2"}, device("a1"), table="nowhere.events"),
        update(3, {"user_id": "u3"}, device("a1")),
    )

    assert [type(error) for _, error in applied.rejected] == [TableError, TableError]
    assert database.column("user_id") == {"m1": "u3"}


def test_a_view_is_refused(database: Database, opened: Opened) -> None:
    """Nothing can be set in a view; fakesnow does not list them among the tables."""
    database.run("CREATE VIEW seen AS SELECT 'a1' AS anonymous_id, 'u' AS user_id")
    database.server.fail(
        {"begins": TABLES, "columns": NAMES, "rows": [["D", "PUBLIC", "SEEN", "VIEW"]]}
    )

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), table="seen"))

    assert "is a view" in refusal(applied)


def test_a_missing_column_comes_with_its_command(database: Database, opened: Opened) -> None:
    """The error shows the ALTER TABLE to run, and running it helps."""
    database.write("events", [row("m1", "a1", 1)])
    wanted = update(1, {"shoe_size": 44}, device("a1"))
    sink = opened()

    command = refusal(apply(sink, wanted)).split("add it with: ")[1].split(";")[0]
    database.run(command)

    assert command == "ALTER TABLE events ADD COLUMN shoe_size NUMBER(38, 0)"
    assert apply(sink, wanted).rows_changed == 1


def test_a_missing_column_is_added_on_request(database: Database, opened: Opened) -> None:
    """With `add_missing_columns` the column is there after the first window."""
    database.write("events", [row("m1", "a1", 1)])

    applied = apply(
        opened(add_missing_columns=True), update(1, {"shoe_size": 44}, device("a1"), unknown())
    )

    assert applied.rejected == ()
    assert database.column("shoe_size") == {"m1": 44}


# Types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "fits", "refused"),
    [
        ("VARCHAR(3)", "abc", "abcd"),
        ("NUMBER(3, 0)", 999, 1_000),
        ("NUMBER(3, 0)", -999, 0.5),
        ("NUMBER(5, 2)", 999.25, 1_000.5),
        ("FLOAT", 1e300, "1"),
        ("BOOLEAN", True, 1),
        ("TIMESTAMP_NTZ", "2026-01-01T00:00:00Z", "soon"),
        ("TIMESTAMP_LTZ", "2026-01-01T00:00:00Z", 5),
        ("TIMESTAMP_TZ", "2026-01-01T00:00:00+02:00", True),
        ("DATE", "2026-01-01T00:00:00Z", "soon"),
    ],
)
def test_a_column_takes_what_it_holds(
    database: Database, opened: Opened, declared: str, fits: Any, refused: Any
) -> None:
    """A value that a column cannot hold is refused alone, with the type; its neighbours are set."""
    database.run(f"CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, c {declared})")
    database.run("INSERT INTO events VALUES (%s, %s, NULL)", ("m1", "a1"), ("m2", "a2"))
    sink = opened()
    wanted = update(1, {"c": fits}, device("a1"))

    applied = apply(sink, wanted, update(2, {"c": refused}, device("a2")))

    ((_, error),) = applied.rejected
    assert isinstance(error, ValueRefusedError)
    assert declared.replace("LTZ", "TZ") in str(error)  # fakesnow knows no difference
    assert str(refused) not in str(error)
    assert database.run("SELECT message_id FROM events WHERE c IS NOT NULL") == [("m1",)]
    assert apply(sink, wanted).rows_changed == 0


@pytest.mark.parametrize("declared", ["VARIANT", "BINARY", "TIME"])
def test_a_column_of_another_type_takes_nothing(
    database: Database, opened: Opened, declared: str
) -> None:
    """What an update cannot carry is refused with the type of the column."""
    database.run(f"CREATE TABLE events (anonymous_id VARCHAR, c {declared})")

    applied = apply(opened(), update(1, {"c": "x"}, device("a1")))

    assert f"text was found; it is {declared}" in refusal(applied)


MOMENTS = {
    "before": "2026-01-01 11:59:59.999999",
    "start": "2026-01-01 12:00:00.000000",
    "last": "2026-01-01 12:00:59.999999",
    "end": "2026-01-01 12:01:00.000000",
}


@pytest.mark.parametrize("declared", ["TIMESTAMP_NTZ", "TIMESTAMP_LTZ", "TIMESTAMP_TZ", "VARCHAR"])
@pytest.mark.parametrize("offset", ["+00:00", "+05:30"])
def test_times_are_compared_as_moments(
    database: Database, opened: Opened, declared: str, offset: str
) -> None:
    """Zoned times by the moment, others as UTC, to the microsecond, whatever the offset."""
    database.run(
        f"CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, user_id VARCHAR, timestamp"
        f" {declared})"
    )
    zone = datetime.fromisoformat(f"2026-01-01T00:00:00{offset}").tzinfo
    for name, text in MOMENTS.items():
        moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
        shown = text if declared == "TIMESTAMP_NTZ" else moment.astimezone(zone).isoformat()
        database.run("INSERT INTO events VALUES (%s, 'a1', NULL, %s)", (name, shown))
    database.run("INSERT INTO events VALUES ('timeless', 'a1', NULL, NULL)")

    apply(opened(), update(1, {"user_id": "u1"}, device("a1"), between(0, 60)))

    assert [n for n, user in database.column("user_id").items() if user] == ["start", "last"]


def test_a_date_is_its_midnight(database: Database, opened: Opened) -> None:
    """A DATE lies in an interval when its midnight in UTC does; the bounds are dates too."""
    database.run("CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, day DATE)")
    days = [f"2026-01-0{n}" for n in range(1, 6)]
    database.run("ALTER TABLE events ADD COLUMN user_id VARCHAR")
    database.run("INSERT INTO events VALUES (%s, 'a1', %s, NULL)", *((d, d) for d in days))
    noon = Between(
        column="day",
        start=datetime(2026, 1, 2, 0, 0, tzinfo=UTC),
        end=datetime(2026, 1, 4, 0, 0, 1, tzinfo=UTC),
    )
    later = Between(
        column="day",
        start=datetime(2026, 1, 4, 0, 0, 0, 1, tzinfo=UTC),
        end=datetime(2026, 1, 5, tzinfo=UTC),
    )
    sink = opened()
    text = sink.compile(plan_updates([update(1, {"user_id": "u"}, device("a1"), noon)]).steps[0])

    apply(sink, update(1, {"user_id": "u1"}, device("a1"), noon))
    apply(sink, update(2, {"user_id": "u2"}, device("a1"), later))

    assert re.search(r"day >= CAST\(%\(param_\d\)s AS DATE\)", text)
    assert database.column("user_id") == dict(
        zip(days, [None, "u1", "u1", "u1", None], strict=True)
    )


def test_a_collation_does_not_blur(database: Database, opened: Opened) -> None:
    """Texts are compared byte by byte, because the catalogue does not tell which are collated."""
    database.write("events", [])

    text = opened().compile(
        plan_updates([update(1, {"user_id": "u"}, device("a1"), unknown())]).steps[0]
    )

    assert "to_binary(events.anonymous_id, 'UTF-8')" in text


# Statements -------------------------------------------------------------------------------------


def test_compile_is_what_apply_sends(database: Database, opened: Opened) -> None:
    """`compile` gives the text of the statement that `apply` sends."""
    for statement in ("UPDATE", "MERGE"):
        database.write(f"by_{statement}", [row("m1", "a1", 1)])
        sink = opened(statement=statement.lower())
        table = {"table": f"by_{statement}"}
        updates = [each for window in WINDOWS.values() for each in window]
        plan = plan_updates([each.model_copy(update=table) for each in updates])
        compiled = [sink.compile(step).rsplit("\n", 1)[0] for step in plan.steps]
        texts = sent(sink)

        applied = sink.apply(plan)

        assert applied.rejected == ()
        # One plan may have two stages of a shape; then they are numbered.
        named = [re.sub(r"(stage_[0-9a-f]{8})_\d+", r"\1", text) for text in texts]
        assert [text for text in named if text.startswith(statement)] == compiled
        assert applied.statements == len([t for t in texts if t not in ("COMMIT", "ROLLBACK")])


def test_merge_does_what_update_does(database: Database, opened: Opened) -> None:
    """By MERGE the same rows get the same values and are counted the same."""
    rows = [row(f"m{n}", f"a{n % 3}", n, user_id="u9" if n == 5 else None) for n in range(9)]
    owner = {"user_id": "u1", "context_traits_email": "a@example.com"}
    counted, found = [], []
    for statement in ("update", "merge"):
        database.write(statement, rows)
        sink = opened(statement=statement)
        for _ in range(2):
            applied = apply(
                sink,
                update(1, owner, device("a0"), unknown(), between(0, 9), table=statement),
                update(2, owner, device("a2"), unknown(), table=statement, versioned=True),
                update(3, {"stitched_user_id": "s"}, device("a1"), table=statement),
            )
            counted.append((applied.rows_matched, applied.rows_changed))
        found.append(database.read(statement))

    assert counted == [(8, 8), (8, 0)] * 2
    assert found[0] == found[1]


def test_stages_are_made_before_the_transaction(database: Database, opened: Opened) -> None:
    """No statement that commits stands between the first UPDATE and the COMMIT."""
    database.write("events", [row("m1", "a1", 1)])
    database.write("others", [row("m1", "a1", 1)])
    sink = opened()
    sink.inline_rows = 0
    texts = sent(sink)

    apply(
        sink,
        update(1, {"user_id": "u1"}, device("a1")),
        update(2, {"user_id": "u1"}, device("a1"), between(0, 9), table="others"),
    )

    kinds = [" ".join(text.split()[:3]).split("_stage_")[0] for text in texts]
    first = kinds.index("COMMIT")
    assert [kind for kind in kinds[:first] if not kind.startswith("SELECT")] == [
        "CREATE TABLE IF",
        "DELETE FROM recognition_ledger",
        *["CREATE TEMPORARY TABLE", "INSERT INTO recognition"] * 2,
    ]
    assert [kind.split()[0] for kind in kinds[first:]] == [
        "COMMIT",
        *["UPDATE", "SELECT"] * 2,
        *["SELECT"] * 2,
        *["INSERT"] * 2,
        "COMMIT",
        *["DROP"] * 2,
        "ROLLBACK",  # of nothing, as SQLAlchemy gives the connection back
    ]


def test_a_small_window_has_no_stage(database: Database, opened: Opened) -> None:
    """Up to 100 updates are inside the statements; of long texts one is staged."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(100)])
    sink = opened()
    apply(sink, update(0, {"user_id": "u"}, device("nobody")))
    texts = sent(sink)

    applied = apply(
        sink,
        *(
            update(n, {"user_id": f"{n}'\\\n"}, device(f"a{n}"), expected_rows=1)
            for n in range(100)
        ),
    )
    small = [text.split()[0] for text in texts]
    texts.clear()
    apply(sink, update(200, {"user_id": "u" * 100_000}, device("a1"), expected_rows=1))

    assert small[:6] == ["SELECT", "COMMIT", "UPDATE", "SELECT", "INSERT", "COMMIT"]
    assert applied.statements == 4
    assert database.column("user_id")["m1"] == "u" * 100_000
    assert {key: value for key, value in database.column("user_id").items() if key != "m1"} == {
        f"m{n}": f"{n}'\\\n" for n in range(100) if n != 1
    }
    assert texts[0].startswith("CREATE TEMPORARY TABLE")


def test_later_updates_of_another_worker_are_not_undone(database: Database, opened: Opened) -> None:
    """A worker whose rows were taken between its look at the ledger and its UPDATE looks again."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(4)])
    mine, other = opened(), opened()
    texts = sent(mine)

    @sa.event.listens_for(mine._engine, "before_cursor_execute")
    def interfere(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("UPDATE") and len([t for t in texts if t == statement]) == 1:
            apply(other, update(2, {"stitched_user_id": "B"}, device("a1"), between(2, 9)))

    apply(mine, update(1, {"stitched_user_id": "A"}, device("a1"), between(0, 9)))

    expected = {"m0": "A", "m1": "A", "m2": "B", "m3": "B"}
    assert "ROLLBACK" in texts
    assert database.column("stitched_user_id") == expected


def test_nothing_is_left_of_a_plan(database: Database, opened: Opened) -> None:
    """Stages are dropped after the plan, and go with the session when it failed."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    sink.inline_rows = 0
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    database.server.fail({"begins": "UPDATE", "code": "001003", "times": 2})
    before = len(database.server.logins())
    with pytest.raises(SinkError):
        apply(sink, update(2, {"user_id": "u2"}, device("a1"), table="EVENTS"))

    applied = apply(sink, update(2, {"user_id": "u2"}, device("a1"), table="EVENTS"))

    with sink._engine.connect() as connection:
        tables = connection.exec_driver_sql("SELECT table_name FROM information_schema.tables")
        assert sorted(name for (name,) in tables) == ["EVENTS", "RECOGNITION_LEDGER"]
    assert applied.rows_changed == 1
    assert len(database.server.logins()) > before


# Pages ------------------------------------------------------------------------------------------


def _texts_on_the_wire(sink: SnowflakeSink) -> list[str]:
    """What the connector makes of the statements that the sink sends from now on."""
    texts: list[str] = []

    @sa.event.listens_for(sink._engine, "after_cursor_execute")
    def note(_: Any, cursor: Any, *rest: Any) -> None:
        texts.append(cursor.query)

    return texts


def test_stages_are_filled_in_pages_of_bounded_rows(
    database: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is one INSERT of so many lines, and the pages together are all rows."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(10)])
    monkeypatch.setattr(module, "_PAGE_ROWS", 4)
    sink = opened()
    sink.inline_rows = 0
    texts = _texts_on_the_wire(sink)

    apply(sink, *(update(n, {"user_id": f"u{n}"}, device(f"a{n}")) for n in range(10)))

    inserts = [text for text in texts if text.startswith("INSERT INTO recognition_stage")]
    assert [text.count("'events-") for text in inserts] == [4, 4, 2]
    assert database.column("user_id") == {f"m{n}": f"u{n}" for n in range(10)}


def test_stages_are_filled_in_pages_of_bounded_size(
    database: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text that is sent is longer than a page may be, whatever has to be escaped in it."""
    values = ["\\" * 300, "'" * 300, "\n\r" * 150, "\u00fc" * 300, "\U0001f9ea" * 300, "x" * 300]
    keys = [value + str(n) for n in range(4) for value in values]
    database.write("events", [row(f"m{n}", key, n) for n, key in enumerate(keys)])
    monkeypatch.setattr(module, "_PAGE_BYTES", 5_000)
    sink = opened()
    sink.inline_rows = 0
    texts = _texts_on_the_wire(sink)

    apply(sink, *(update(n, {"user_id": key}, device(key)) for n, key in enumerate(keys)))

    inserts = [text for text in texts if text.startswith("INSERT INTO recognition_stage")]
    sizes = [len(text.split(" VALUES ", 1)[1].encode()) for text in inserts]
    assert max(sizes) <= 5_000
    assert max(sizes) > 4_000
    assert len(inserts) > 1
    assert database.column("user_id") == {f"m{n}": key for n, key in enumerate(keys)}


# Errors -----------------------------------------------------------------------------------------

STATEMENT_ERRORS = [
    ("000606", "57P03", SinkError, "?warehouse=NAME"),
    ("003001", "42501", SinkReadOnlyError, "GRANT SELECT, UPDATE ON TABLE"),
    ("002003", "42S02", TableError, "missing, or hidden from the role"),
    ("002043", "02000", SinkError, "SHOW GRANTS TO USER"),
    ("090073", "57014", SinkError, "resource monitor"),
    ("090105", "22000", SinkError, "database of the URL"),
    ("090106", "22000", SinkError, "schema of the URL"),
    ("000630", "57014", SinkError, "statement_timeout, 3600 seconds"),
    ("000604", "57014", SinkError, "statement_timeout, 3600 seconds"),
    ("100090", "42P18", SinkError, "the same row"),
    ("100072", "22000", TableError, "refused the rows"),
    ("100078", "22000", TableError, "refused the rows"),
    ("390318", "08001", SinkError, "access token has expired"),
    ("000625", "57014", SinkUnavailableError, "locked by others"),
    ("000684", "57014", SinkUnavailableError, "locked by others"),
    ("001003", "42000", SinkError, "refused a statement (001003, 42000)"),
]


@pytest.mark.parametrize(("code", "state", "kind", "text"), STATEMENT_ERRORS)
def test_an_error_of_a_statement_is_ours(
    database: Database, opened: Opened, code: str, state: str, kind: type, text: str
) -> None:
    """Snowflake's code becomes our error with what to do; nothing was written, and it says so."""
    database.write("events", [row("m1", "a1", 1)])
    failing = {"begins": "UPDATE", "code": code, "sqlstate": state, "times": 99}
    database.server.fail(failing)

    with pytest.raises(kind) as caught:
        apply(opened(timeout=0), update(1, {"user_id": "u1"}, device("a1")))

    assert text in str(caught.value)
    assert type(caught.value) is kind
    assert caught.value.written is False
    assert caught.value.retryable is (kind is SinkUnavailableError)
    assert "s3cr3t" not in str(caught.value)
    assert database.column("user_id") == {"m1": None}


LOGIN_ERRORS = [
    ("390100", SinkError, "name or password is wrong"),
    ("390102", SinkError, "DESC USER"),
    ("390144", SinkError, "RSA_PUBLIC_KEY_FP"),
    ("390189", SinkError, "GRANT ROLE .. TO USER .."),
    ("390201", SinkError, "missing or hidden"),
    ("390303", SinkError, "access token is not valid"),
    ("390318", SinkError, "access token has expired"),
    ("390422", SinkError, "network policy"),
]


@pytest.mark.parametrize(("code", "kind", "text"), LOGIN_ERRORS)
def test_an_error_of_the_login_is_ours(
    database: Database, opened: Opened, code: str, kind: type, text: str
) -> None:
    """What is wrong with the credentials is said at once, with what to run, and never retried."""
    database.server.fail({"begins": "login", "code": code, "times": 99})
    before = len(database.server.logins())

    with pytest.raises(kind) as caught:
        apply(opened(), update(1, {"user_id": "u1"}, device("a1")))

    assert text in str(caught.value)
    assert not caught.value.retryable
    assert len(database.server.logins()) == before + 1


@pytest.mark.parametrize("code", ["000625", "000684"])
def test_a_lock_is_waited_for(database: Database, opened: Opened, code: str) -> None:
    """A plan that met a lock is applied again, whole, until the lock is gone."""
    database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
    failing = {"begins": "UPDATE", "code": code, "sqlstate": "57014", "times": 2, "after": 1}
    database.server.fail(failing)
    sink = opened()
    texts = sent(sink)

    applied = apply(
        sink,
        update(1, {"user_id": "u1"}, device("a1")),
        update(2, {"stitched_user_id": "u2"}, device("a2")),
    )

    assert applied.rows_changed == 2
    assert len([text for text in texts if text.startswith("UPDATE")]) > 2
    assert database.column("user_id") == {"m1": "u1", "m2": None}
    assert database.column("stitched_user_id") == {"m1": None, "m2": "u2"}


@pytest.mark.filterwarnings("ignore:.ReauthenticationRequest:FutureWarning")
def test_a_session_that_ended_is_begun_again(database: Database, opened: Opened) -> None:
    """After hours without a plan the session is gone; the next plan logs in again by itself."""
    database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
    sink = opened()
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    database.server.fail({"begins": "SELECT", "code": "390114"})
    before = len(database.server.logins())

    applied = apply(sink, update(2, {"user_id": "u2"}, device("a2"), table="EVENTS"))

    assert applied.rows_changed == 1
    assert len(database.server.logins()) == before + 1


def test_a_server_that_went_away_is_named_so(database: Database, opened: Opened) -> None:
    """Without an answer the error says that nothing was committed, and that a retry helps."""
    with open_server() as server:
        sink = opened(
            server.url("gone"),
            timeout=0,
            connect_args={"retry_max_attempts": 1, "retry_backoff_base_ms": 1},
        )
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    with pytest.raises(SinkUnavailableError, match="does not answer") as caught:
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    with pytest.raises(SinkUnavailableError, match="could not begin") as again:
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    assert caught.value.retryable
    assert again.value.retryable


@pytest.mark.parametrize("which", [1, 2])
def test_a_commit_without_an_answer_may_have_happened(opened: Opened, which: int) -> None:
    """A server lost at the plan's COMMIT leaves it open; at that of the stages it is not."""
    kind = {1: SinkUnavailableError, 2: OutcomeUnknownError}[which]
    with open_server() as server:
        database = Database(server)
        database.write("events", [row("m1", "a1", 1)])
        sink = opened(
            database.url,
            timeout=0,
            connect_args={"retry_max_attempts": 1, "retry_backoff_base_ms": 1},
        )
        database.engine.dispose()
        server.fail({"begins": "COMMIT", "after": which - 1, "after_running": True, "ends": True})

        with pytest.raises(kind) as caught:
            apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    assert type(caught.value) is kind
    assert caught.value.written is {1: False, 2: None}[which]
    assert caught.value.retryable


@pytest.mark.parametrize(
    "url",
    [
        "snowflake://tester:s3cr3t@account",
        "snowflake://tester:s3cr3t@account/database",
        "snowflake://tester:s3cr3t@account/database/",
        "snowflake://tester:s3cr3t@account/database/schema/more",
        "snowflake://tester:s3cr3t@account:port/database/schema",
        "snowflake://tester:s3cr3t@account/database/schema?private_key_file=s3cr3t",
    ],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    """The error shows the right form, and nothing of the one that was given."""
    with pytest.raises(ConfigurationError, match="account/database/schema") as caught:
        open_sink(url)

    assert "s3cr3t" not in str(caught.value)


def test_a_profile_holds_the_credentials(
    database: Database, opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL that names a profile of the connector's own file needs no account and no password."""
    database.write("events", [row("m1", "a1", 1)])
    profiles = tmp_path / "connections.toml"
    profiles.touch(mode=0o600)
    profiles.write_text(
        f"""
        [prod]
        account = "fake"
        user = "tester"
        password = "s3cr3t"
        host = "127.0.0.1"
        port = {database.server.port}
        warehouse = "from_profile"
        """
    )
    monkeypatch.setenv("SNOWFLAKE_HOME", str(tmp_path))

    applied = apply(
        opened(f"snowflake:///{database.name}/public?connection_name=prod"),
        update(1, {"user_id": "u1"}, device("a1")),
    )

    assert applied.rows_changed == 1
    assert database.server.logins()[-1]["warehouse"] == "from_profile"


@pytest.mark.parametrize("options", [{"timeout": -1}, {"ledger_days": 0}, {"statement_timeout": 0}])
def test_settings_have_a_range(database: Database, options: dict[str, Any]) -> None:
    """A setting outside its range is refused before anything is opened."""
    with pytest.raises(ConfigurationError, match="at least"):
        open_sink(database.url, **options)


def test_the_password_is_nowhere(
    database: Database, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the sink, nor what is logged, nor the causes of an error show the password."""
    caplog.set_level(logging.DEBUG)
    database.write("events", [])
    sink = opened(connect_args={"passcode": "s3cr3t"})
    database.server.fail({"begins": "login", "code": "390100"})

    with pytest.raises(SinkError) as caught:
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    shown = [repr(sink), repr(vars(sink)), caplog.text, spoken(caught.value)]
    assert caught.value.__cause__ is not None
    assert "s3cr3t" not in "".join(shown)


# The ledger -------------------------------------------------------------------------------------


def test_rows_of_one_primary_key_are_all_set(database: Database, opened: Opened) -> None:
    """Snowflake does not enforce what is declared unique: each row that has a key is a row."""
    # Not declared here, because the emulator does enforce it; the sink asks for no keys.
    database.write("events", [row("m1", "a1", 1), row("m1", "a1", 1), row("m2", "a1", 1)])
    named = Messages(id_column="message_id", time_column="timestamp", refs=(("m1", at(1)),))
    sink = opened()

    by_message = apply(sink, update(1, {"stitched_user_id": "A"}, named, expected_rows=1))
    by_device = apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), between(0, 9)))
    again = apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), between(0, 9)))

    assert (by_message.rows_changed, by_device.rows_changed) == (2, 3)
    assert (again.rows_changed, again.matched_by_update) == (0, {"events-2": 3})
    assert {user for (user,) in database.run("SELECT stitched_user_id FROM events")} == {"B"}


def test_a_ledger_with_lines_twice_does_no_harm(database: Database, opened: Opened) -> None:
    """No key is enforced here: lines that two workers wrote at once change no decision."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(4)])
    sink = opened()
    later = update(2, {"stitched_user_id": "B"}, device("a1"), between(2, 9))
    apply(sink, later)
    database.run("INSERT INTO recognition_ledger SELECT * FROM recognition_ledger")
    database.run("INSERT INTO recognition_ledger SELECT * FROM recognition_ledger")

    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1"), between(0, 9)))
    again = apply(sink, later)

    expected = {"m0": "A", "m1": "A", "m2": "B", "m3": "B"}
    assert database.column("stitched_user_id") == expected
    assert (again.rows_matched, again.rows_changed) == (2, 0)


def test_a_ledger_that_is_there_needs_no_privilege(database: Database, opened: Opened) -> None:
    """Once somebody has made the ledger, a role that may not create tables gets on with it."""
    database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
    first = update(1, {"user_id": "u1"}, device("a1"))
    refusing = {"begins": "CREATE TABLE", "code": "003001", "sqlstate": "42501", "times": 9}
    database.server.fail(refusing)
    with pytest.raises(SinkReadOnlyError, match="GRANT CREATE TABLE"):
        apply(opened(), first)
    database.server.fail()
    apply(opened(), first)
    database.server.fail(refusing)

    applied = apply(opened(), update(2, {"user_id": "u2"}, device("a2")))

    assert applied.rows_changed == 1
    assert database.column("user_id") == {"m1": "u1", "m2": "u2"}


def test_the_ledger_knows_tables_of_one_name_apart(database: Database, opened: Opened) -> None:
    """A later update of another schema's table takes nothing; one that spells more does."""
    database.run("CREATE SCHEMA other")
    for schema in ("public", "other"):
        database.run(
            f"CREATE TABLE {schema}.events AS SELECT 'm1' AS message_id, 'a1' AS anonymous_id,"
            " CAST(NULL AS VARCHAR) AS stitched_user_id"
        )
    sink = opened()
    late = update(1, {"stitched_user_id": "A"}, device("a1"))

    for table, sequence in (("other.events", 3), ("events", 2)):
        apply(
            sink, update(sequence, {"stitched_user_id": f"u{sequence}"}, device("a1"), table=table)
        )
    apply(sink, late, late.model_copy(update={"id": "x", "table": f"{database.name}.other.events"}))

    found = [
        database.column("stitched_user_id", f"{schema}.events") for schema in ("public", "other")
    ]
    apply(sink, late.model_copy(update={"table": "other.events", "sequence": 4, "id": "y"}))
    apply(sink, late.model_copy(update={"table": "public.events", "sequence": 3, "id": "z"}))

    assert found == [{"m1": "u2"}, {"m1": "u3"}]
    assert database.column("stitched_user_id", "public.events") == {"m1": "A"}


# Loading ----------------------------------------------------------------------------------------


def test_load_makes_what_is_missing(database: Database, opened: Opened) -> None:
    """The table and a later column are made, rows are inserted once, times are kept."""
    sink = opened()
    columns = {"message_id": "text", "timestamp": "time", "n": "integer", "b": "boolean"}
    rows = [{"message_id": f"m{n}", "timestamp": 1_767_225_600_000_001 + n} for n in range(3)]

    first = sink.load("events", rows, key="message_id", columns=columns)
    again = sink.load("events", rows, key="message_id", columns={**columns, "x": "float"})

    assert (first, again) == (3, 0)
    assert database.run("SELECT message_id, timestamp, n, b, x FROM events ORDER BY 1")[0] == (
        "m0",
        datetime(2026, 1, 1, 0, 0, 0, 1),
        None,
        None,
        None,
    )
