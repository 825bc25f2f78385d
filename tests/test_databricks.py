"""
Databricks' sink through the real dialect, on a stand-in for its driver that runs its SQL on DuckDB.

Not run on Databricks itself; `databricks_driver.py` says what is refused in its place.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, ClassVar

import duckdb
import pytest
import sqlalchemy as sa
import sqlglot
from databricks.sql import exc

from databricks_driver import Connection, Warehouse
from golden_windows import check_golden, windows
from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.sinks import Sink, open_sink
from recognition.sinks import databricks as module
from recognition.sinks.databricks import DatabricksSink, _describe, _is_blurred
from recognition.testing.sinks import SinkTests, between, device, row, unknown, update
from sinks import Rows, ServerKit, apply, refusal
from test_bigquery import (  # noqa: F401 - collected here, with the fixtures of this file
    test_messages_that_a_later_update_named_are_spared,
    test_rows_and_notes_that_are_there_twice_do_no_harm,
    test_rows_can_be_loaded_and_stamped,
)

Opened = Callable[..., DatabricksSink]


@pytest.fixture(scope="module")
def warehouse() -> Iterator[Warehouse]:
    warehouse = Warehouse()
    yield warehouse
    warehouse.database.close()


class Schema:
    """A schema that a test has for itself, written and read around the sink."""

    types: ClassVar[Mapping[str, str]] = {
        "text": "VARCHAR",
        "time": "TIMESTAMPTZ",
        "integer": "BIGINT",
        "float": "DOUBLE",
        "boolean": "BOOLEAN",
    }

    def __init__(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self.name = f"s_{secrets.token_hex(6)}"
        self.url = (
            "databricks://token:s3cr3t@dbc-1.example.com"
            f"?http_path=/sql/1.0/warehouses/1&catalog=main&schema={self.name}"
        )
        self.given: list[dict[str, Any]] = []  # what each login was told
        self.run("SELECT 1")  # makes it

    def run(self, statement: str, *parameters: object) -> list[Any]:
        """One statement of DuckDB, in the schema."""
        with self._cursor() as cursor:
            return cursor.execute(statement, list(parameters) or None).fetchall()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self.warehouse.database.cursor()
        cursor.execute("SET TimeZone = 'UTC'")
        cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {self.name}")
        cursor.execute(f"SET search_path = '{self.name}'")
        return cursor

    def write(self, table: str, rows: Rows) -> None:
        """Rows of the kit, into a table that is made when it is not there."""
        declared = ", ".join(f"{n} {self.types[kind]}" for n, kind in SinkTests.columns.items())
        marks = ", ".join(["?"] * len(SinkTests.columns))
        lines = [[each.get(name) for name in SinkTests.columns] for each in rows]
        with self._cursor() as cursor:
            cursor.execute(f'CREATE TABLE IF NOT EXISTS "{table}" ({declared})')
            if lines:
                cursor.executemany(f'INSERT INTO "{table}" VALUES ({marks})', lines)

    def read(self, table: str) -> list[dict[str, object]]:
        """All rows."""
        columns = ", ".join(SinkTests.columns)
        found = self.run(f'SELECT {columns} FROM "{table}"')
        return [dict(zip(SinkTests.columns, line, strict=True)) for line in found]

    def column(self, column: str, table: str = "events") -> dict[object, object]:
        """One column by message id."""
        return dict(self.run(f'SELECT message_id, "{column}" FROM "{table}"'))


@pytest.fixture
def database(warehouse: Warehouse) -> Iterator[Schema]:
    """An empty schema."""
    yield Schema(warehouse)
    warehouse.heal()


@pytest.fixture
def opened(database: Schema) -> Iterator[Opened]:
    """Open sinks that are closed at the end."""
    sinks: list[DatabricksSink] = []

    def open_it(url: str = database.url, **options: Any) -> DatabricksSink:
        sink = open_sink(url, **options)
        assert isinstance(sink, DatabricksSink)

        @sa.event.listens_for(sink._engine, "do_connect")
        def connect(_: Any, __: Any, args: Any, given: Any) -> Connection:
            database.given.append(given)
            return Connection(database.warehouse, given["schema"])

        sinks.append(sink)
        return sink

    yield open_it
    for sink in sinks:
        sink.close()


class TestDatabricks(ServerKit):
    """The kit, unchanged."""

    @pytest.fixture
    def sink(self, opened: Opened) -> Sink:
        return opened()


def sent(warehouse: Warehouse) -> list[str]:
    """What each statement since the last call was, in short."""
    kinds = [" ".join(text.split()[:3]).split("_stage_")[0] for text, _ in warehouse.statements]
    warehouse.statements.clear()
    return kinds


def refused_as(error_class: str) -> exc.ServerOperationError:
    """What the driver raises when Databricks refuses a statement."""
    return exc.ServerOperationError(f"[{error_class}] as the test wants it SQLSTATE: XXKST")


def lost() -> exc.RequestError:
    """What the driver raises when no answer comes."""
    return exc.RequestError("no answer", {"http-code": None})


# Statements and sessions ------------------------------------------------------------------------


def test_a_table_with_versions_takes_one_statement(database: Schema, opened: Opened) -> None:
    """Neither ledger nor lease nor stage: a MERGE, whatever the number of visitors."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(300)])
    sink = opened()
    first = update(0, {"user_id": "u"}, device("a0"), versioned=True)
    apply(sink, first)
    sent(database.warehouse)

    applied = apply(
        sink,
        *(
            update(n, {"user_id": f"u{n}"}, device(f"a{n}"), versioned=True, expected_rows=1)
            for n in range(1, 300)
        ),
    )

    assert applied.rows_changed == 299
    assert (applied.statements, sent(database.warehouse)) == (1, ["MERGE INTO events"])
    assert database.run(
        "SELECT count(*) FROM information.tables WHERE table_name LIKE 'rec%' AND table_schema = ?",
        database.name,
    ) == [(0,)]


def test_a_ledger_needs_a_lease(database: Schema, opened: Opened) -> None:
    """Without versions the table is taken before the ledger is read, and given back after it."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    sent(database.warehouse)

    applied = apply(sink, update(2, {"user_id": "u2"}, device("a1"), expected_rows=1))

    assert sent(database.warehouse) == [
        "MERGE INTO recognition_lock",
        "SELECT recognition",
        "MERGE INTO events",
        "INSERT INTO recognition_ledger",
        "UPDATE recognition_lock SET",
    ]
    assert applied.statements == 5


def test_a_session_says_who_it_is(database: Schema, opened: Opened) -> None:
    """Tags, zone and time limit go with the login; the settings of the caller win."""
    database.write("events", [])
    sink = opened(statement_timeout=90, connect_args={"session_configuration": {"X": "y"}})
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    given = database.given[-1]

    assert given["query_tags"] == {"application": "recognition"}
    assert "recognition" in given["user_agent_entry"]
    assert given["session_configuration"] == {
        "TIMEZONE": "UTC",
        "ANSI_MODE": "true",
        "STATEMENT_TIMEOUT": "90",
        "X": "y",
    }


def test_many_rows_fill_a_stage_in_pages(
    database: Schema, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a statement carries go into a temporary table, page by page."""
    monkeypatch.setattr(DatabricksSink, "inline_rows", 3)
    monkeypatch.setattr(DatabricksSink, "page_bytes", 1_000)
    keys = [f"ü{n}" * 20 for n in range(20)]
    database.write("events", [row(key, key, n) for n, key in enumerate(keys)])
    sent(database.warehouse)

    applied = apply(
        opened(), *(update(n, {"user_id": f"u{n}"}, device(k)) for n, k in enumerate(keys))
    )

    assert applied.rows_changed == 20
    assert database.column("user_id") == {key: f"u{n}" for n, key in enumerate(keys)}
    values = [str(value) for _, given in database.warehouse.statements for value in given.values()]
    assert max(map(len, values)) < 1_010  # a page, in brackets
    texts = sent(database.warehouse)
    assert texts.count("CREATE TEMPORARY TABLE") == texts.count("DROP TABLE recognition") == 1
    assert texts.count("INSERT INTO recognition") == 3


def test_a_failed_plan_leaves_no_stage(
    database: Schema, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session of a stage that was not dropped is not used again."""
    monkeypatch.setattr(DatabricksSink, "inline_rows", 0)
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    database.warehouse.fail(begins="MERGE INTO events", error=refused_as("SOME_ERROR"), times=2)
    wanted = update(1, {"user_id": "u1"}, device("a1"), versioned=True)
    with pytest.raises(SinkError):
        apply(sink, wanted)
    database.warehouse.heal()

    assert apply(sink, wanted).rows_changed == 1


def test_tables_of_another_schema_are_named(database: Schema, opened: Opened) -> None:
    """By schema, or by catalog and schema, in any case; the ledger knows them by one name."""
    other = Schema(database.warehouse)
    other.write("events", [row("m1", "a1", 1)])
    sink = opened()

    first = apply(
        sink, update(2, {"stitched_user_id": "B"}, device("a1"), table=f"{other.name}.Events")
    )
    second = apply(
        sink,
        update(1, {"stitched_user_id": "A"}, device("a1"), table=f"main.{other.name}.events"),
    )

    assert (first.rejected, second.rejected) == ((), ())
    assert other.column("stitched_user_id") == {"m1": "B"}


# Crashes ----------------------------------------------------------------------------------------

#: A later and an earlier update of one device, in whatever way they meet.
PAIRS = {
    "overwrites": (
        update(2, {"stitched_user_id": "B"}, device("a1"), between(2, 9)),
        update(1, {"stitched_user_id": "A"}, device("a1"), between(0, 9)),
    ),
    "fills": (
        update(2, {"user_id": "B"}, device("a1"), between(2, 9), unknown()),
        update(1, {"user_id": "A"}, device("a1"), between(0, 2), unknown()),
    ),
    "takes back": (
        update(2, {"stitched_user_id": None}, device("a1"), between(2, 9)),
        update(1, {"stitched_user_id": "A"}, device("a1"), between(0, 9)),
    ),
}


@pytest.mark.parametrize("after", [False, True], ids=["unsent", "unanswered"])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_crash_at_any_statement_converges(
    warehouse: Warehouse, opened: Opened, database: Schema, pair: str, after: bool
) -> None:
    """
    The later update dies at each of its statements in turn, the earlier one comes, then the later.

    The rows are those of the two without a crash. The lease that a dead worker left is waited for:
    here it is ended by hand.
    """
    later, earlier = PAIRS[pair]
    rows = [row(f"m{n}", "a1", n) for n in range(4)]
    database.write("undisturbed", rows)
    calm = opened()
    for each in (earlier, later):
        apply(calm, each.model_copy(update={"table": "undisturbed"}))
    column = next(iter(later.set))
    expected = database.column(column, "undisturbed")
    warehouse.statements.clear()
    apply(calm, later.model_copy(update={"table": "undisturbed"}))
    count = len(warehouse.statements)
    crashed = 0

    for place in range(count):
        table = f"events_{place}"
        database.write(table, rows)
        dying, other, again = opened(timeout=0), opened(), opened()
        mine, first = (each.model_copy(update={"table": table}) for each in (later, earlier))
        warehouse.fail(begins="", error=lost(), times=99, let=place, after=after)
        try:
            apply(dying, mine)
        except SinkError:
            crashed += 1
        warehouse.heal()
        database.run("UPDATE recognition_lock SET until = 0")

        apply(other, first)
        apply(again, mine)

        assert database.column(column, table) == expected, f"statement {place}"
    assert crashed >= count - 1  # the last one only gives the lease back


# The lease --------------------------------------------------------------------------------------


def test_another_worker_is_waited_for(database: Schema, opened: Opened) -> None:
    """Who finds the table taken tries until the timeout, and says why; tables apart are free."""
    database.write("events", [row("m1", "a1", 1)])
    database.write("others", [row("m1", "a1", 1)])
    holder, other = opened(), opened(timeout=0.3)
    caught: list[SinkError] = []

    @sa.event.listens_for(holder._engine, "before_cursor_execute")
    def interfere(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("MERGE INTO events"):
            apply(other, update(2, {"user_id": "u2"}, device("a1"), table="others"))
            with pytest.raises(SinkUnavailableError, match="another worker") as error:
                apply(other, update(2, {"user_id": "u2"}, device("a1")))
            caught.append(error.value)

    apply(holder, update(1, {"user_id": "u1"}, device("a1")))
    free = apply(other, update(2, {"user_id": "u2"}, device("a1")))

    assert [error.retryable for error in caught] == [True]
    assert (free.rows_changed, database.column("user_id")) == (1, {"m1": "u2"})
    assert database.column("user_id", "others") == {"m1": "u2"}


def test_a_lease_is_longer_than_a_statement_is_retried_and_runs(
    database: Schema, opened: Opened
) -> None:
    """What the driver sends again until the end of its time still runs under the lease."""
    database.write("events", [row("m1", "a1", 1)])
    sinks = opened(timeout=50), opened(connect_args={"_retry_stop_after_attempts_duration": 900})
    leases: list[int] = []

    for n, sink in enumerate(sinks):

        @sa.event.listens_for(sink._engine, "before_cursor_execute")
        def look(_: Any, __: Any, statement: str, *rest: Any) -> None:
            if statement.startswith("MERGE INTO events"):
                ((until,),) = database.run("SELECT until - epoch_us(now()) FROM recognition_lock")
                leases.append(round(until / 1_000_000))

        apply(sink, update(n, {"user_id": f"u{n}"}, device("a1")))

    retried = [given["_retry_stop_after_attempts_duration"] for given in database.given]
    assert retried == [50, 900]
    for lease, most in zip(leases, retried, strict=True):
        assert lease == pytest.approx(600 + most + 60, abs=30)


def test_the_lease_of_a_dead_worker_ends(database: Schema, opened: Opened) -> None:
    """A line that is past its time is taken over."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=0.2)
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    far = 4_000_000_000_000_000
    database.run("UPDATE recognition_lock SET holder = 'dead', until = ?", far)
    with pytest.raises(SinkUnavailableError, match="died less than"):
        apply(sink, update(2, {"user_id": "u2"}, device("a1")))
    database.run("UPDATE recognition_lock SET until = 1")

    apply(sink, update(2, {"user_id": "u2"}, device("a1")))

    assert database.column("user_id") == {"m1": "u2"}


def test_a_lease_is_renewed_and_its_loss_seen(
    database: Schema, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that takes long renews it; who stood still for so long that it ended writes not."""
    monkeypatch.setattr(module, "_SPARE_SECONDS", 0)
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    renewed = sent(database.warehouse).count("UPDATE recognition_lock SET")

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def stand_still(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT recognition_stage"):
            database.run("UPDATE recognition_lock SET holder = 'another'")

    with pytest.raises(SinkUnavailableError, match="stood still") as caught:
        apply(sink, update(2, {"user_id": "u2"}, device("a1")))

    assert renewed > 2
    assert caught.value.written is None
    assert database.column("user_id") == {"m1": "u1"}


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error_class",
    ["DELTA_CONCURRENT_APPEND", "DELTA_CONCURRENT_DELETE_READ", "DELTA_METADATA_CHANGED"],
)
def test_conflicts_are_tried_again(database: Schema, opened: Opened, error_class: str) -> None:
    """Of two statements on the same files one fails; it is sent again, the lease's as well."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1")))
    for begins in ("MERGE INTO recognition_lock", "MERGE INTO events", "UPDATE recognition_lock"):
        database.warehouse.fail(begins=begins, error=refused_as(f"{error_class}.WHOLE_TABLE_READ"))

    applied = apply(sink, update(2, {"stitched_user_id": "B"}, device("a1")))

    assert applied.rows_changed == 1
    assert database.run("SELECT until FROM recognition_lock") == [(0,)]


@pytest.mark.parametrize(
    ("error", "kind", "named"),
    [
        (refused_as("INSUFFICIENT_PERMISSIONS"), SinkReadOnlyError, "GRANT SELECT, MODIFY"),
        (refused_as("TABLE_OR_VIEW_NOT_FOUND"), TableError, "missing"),
        (refused_as("SCHEMA_NOT_FOUND"), SinkError, "schema of the URL"),
        (refused_as("CAST_OVERFLOW"), TableError, "refused the rows"),
        (
            refused_as("DELTA_MULTIPLE_SOURCE_ROW_MATCHING_TARGET_ROW_IN_MERGE"),
            SinkError,
            "meant the same row",
        ),
        (exc.RequestError("secret", {"http-code": 401}), SinkError, "get a new one"),
        (exc.RequestError("secret", {"http-code": 503}), OutcomeUnknownError, "answer"),
        (exc.DatabaseError("Invalid SessionHandle"), OutcomeUnknownError, "session"),
        (exc.ServerOperationError("secret-key"), SinkError, "refused a statement"),
    ],
)
def test_errors_say_what_to_do(
    database: Schema,
    opened: Opened,
    error: exc.Error,
    kind: type[SinkError],
    named: str,
) -> None:
    """Each of the driver's errors becomes one of ours that says what to run, and no value."""
    database.write("events", [row("m1", "a1", 1)])
    database.warehouse.fail(begins="MERGE INTO events", error=error, times=99)

    with pytest.raises(kind) as caught:
        apply(opened(timeout=0), update(1, {"user_id": "u1"}, device("a1"), versioned=True))

    assert type(caught.value) is kind
    assert named in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.written is None


def test_a_view_is_refused(database: Schema, opened: Opened) -> None:
    """Nothing can be set in a view."""
    database.write("events", [])
    database.run("CREATE VIEW shown AS SELECT * FROM events")

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), table="shown"))

    assert "is a view" in refusal(applied)


def test_a_catalog_that_is_missing_refuses_its_updates_alone(
    database: Schema, opened: Opened
) -> None:
    """What names a catalog that is not there does not keep the rest of the window."""
    database.write("events", [row("m1", "a1", 1)])
    missing = refused_as("NO_SUCH_CATALOG_EXCEPTION")
    database.warehouse.fail(begins="SELECT table_type FROM `nowhere`", error=missing, times=9)

    applied = apply(
        opened(),
        update(1, {"user_id": "u1"}, device("a1")),
        update(2, {"user_id": "u1"}, device("a1"), table="nowhere.web.events"),
    )

    assert "no table 'nowhere.web.events'" in refusal(applied)
    assert database.column("user_id") == {"m1": "u1"}


def test_the_token_is_nowhere(
    database: Schema, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in what a sink shows of itself, nor in logs and errors."""
    caplog.set_level(logging.DEBUG)
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=0, connect_args={"access_token": "t0ken"})
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    database.warehouse.fail(begins="MERGE", error=exc.RequestError("s3cr3t"), times=9)
    with pytest.raises(OutcomeUnknownError) as caught:
        apply(sink, update(2, {"user_id": "u2"}, device("a1")))

    shown = [repr(sink), repr(sink._engine), caplog.text, str(caught.value), str(vars(sink))]

    assert database.given[0]["access_token"] == "t0ken"
    assert not any(secret in each for secret in ("s3cr3t", "t0ken") for each in shown)


def test_types_are_read_from_the_catalogue(database: Schema, opened: Opened) -> None:
    """A text that is too wide, a number out of range and an array are refused, each alone."""
    connection = Connection(database.warehouse, database.name)
    connection.cursor().execute(
        "CREATE TABLE events (message_id STRING, anonymous_id STRING, user_id VARCHAR(3),"
        " age TINYINT, score DECIMAL(4, 2), tags ARRAY<STRING>)"
    )
    connection.close()
    database.run("INSERT INTO events (message_id, anonymous_id) VALUES ('m1', 'a1'), ('m2', 'a2')")

    applied = apply(
        opened(),
        update(1, {"user_id": "long"}, device("a1")),
        update(2, {"age": 128}, device("a1")),
        update(3, {"tags": "t"}, device("a1")),
        update(4, {"user_id": "u", "age": -128, "score": 12.25}, device("a2")),
    )

    reasons = {name: str(error) for name, error in applied.rejected}
    assert "4 characters was found; it is varchar(3)" in reasons["events-1"]
    assert "out of its range was found; it is tinyint" in reasons["events-2"]
    assert "it is array<string>" in reasons["events-3"]
    assert len(reasons) == 3
    assert database.run("SELECT user_id, age, score FROM events ORDER BY message_id") == [
        (None, None, None),
        ("u", -128, Decimal("12.25")),
    ]


def test_collations_do_not_blur(opened: Opened) -> None:
    """A text under a collation, and one that blanks fill up, are compared as bytes."""
    blurred = [
        _is_blurred(_describe("x", declared, True))
        for declared in ("STRING", "varchar(3)", "CHAR(3)", "STRING COLLATE UTF8_LCASE")
    ]

    assert blurred == [False, False, True, True]


@pytest.mark.parametrize(
    "url",
    [
        "databricks://token:s3cr3t@host",
        "databricks://token:s3cr3t@host?http_path=x&catalog=main",
        "databricks://token:s3cr3t@host:x?http_path=x&catalog=main&schema=s",
    ],
)
def test_urls_without_warehouse_and_schema_are_refused(url: str) -> None:
    """The error shows how a URL looks, and no token."""
    with pytest.raises(ConfigurationError, match="http_path") as caught:
        open_sink(url)

    assert "s3cr3t" not in str(caught.value)


# Statements -------------------------------------------------------------------------------------


def test_statements_are_those_of_the_file(database: Schema, opened: Opened) -> None:
    """A change of SQL is seen in a diff; each statement is Databricks' SQL to `sqlglot`."""
    shown = []
    for about, prepared, wanted in windows():
        for table in ("events", "recognition_ledger", "recognition_lock"):
            database.run(f"DROP TABLE IF EXISTS {table}")
        database.write("events", [row("m1", "a1", 1)])
        sink = opened()
        if prepared:
            apply(sink, *prepared)
        database.warehouse.statements.clear()
        apply(sink, *wanted)
        shown.append(f"-- {about}\n")
        for text, _ in database.warehouse.statements:
            sqlglot.parse_one(text, read="databricks")
            shown.append(f"{text};\n")
        shown.append("\n")

    check_golden("databricks", "".join(shown))
