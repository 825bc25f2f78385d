"""The sink of PostgreSQL on a real server: the kit, and what is particular to it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from pydantic import ValidationError

from postgres import GivenServer, MissingPostgresError, Proxy, Server
from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RecognitionError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.messages import Between, Equals, Messages
from recognition.planner import plan_updates
from recognition.sinks import Applied, Sink, open_sink
from recognition.sinks.postgresql import PostgresqlSink
from recognition.testing import SinkTests
from recognition.testing.sinks import (
    HOSTILE_VALUES,
    at,
    between,
    device,
    row,
    unknown,
    update,
)
from sinks import Rows, ServerKit, apply, opening, refusal

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
    with opening(PostgresqlSink, database.url) as open_it:
        yield open_it


# The kit ----------------------------------------------------------------------------------------


class TestPostgresql(ServerKit):
    """The kit on PostgreSQL."""


class TestStaged(TestPostgresql):
    """The kit where small windows are staged as large ones are."""

    @pytest.fixture(autouse=True)
    def staged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PostgresqlSink, "inline_rows", 0)


@pytest.fixture(scope="module")
def odd_postgres(postgres: GivenServer) -> Iterator[GivenServer]:
    """A server whose every default is another than usual."""
    try:
        server = Server(
            TimeZone="Asia/Kolkata",
            DateStyle="SQL, DMY",
            default_transaction_isolation="serializable",
            standard_conforming_strings="off",
            enable_hashjoin="off",
            password_encryption="md5",
            idle_session_timeout="0",
        )
    except MissingPostgresError as error:  # there is the given server alone
        pytest.skip(str(error))
    with server:
        yield server


class TestOddPostgresql(TestStaged):
    """The kit on a server with other defaults, in a database of another encoding's sort order."""

    @pytest.fixture
    def database(self, odd_postgres: GivenServer) -> Iterator[Database]:
        declared = "ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
        with odd_postgres.database(declared) as name:
            yield Database(odd_postgres, name)


class TestCitext(TestPostgresql):
    """The kit on columns that take upper for lower case."""

    @pytest.fixture
    def write_rows(self, database: Database) -> Callable[[str, Rows], None]:
        database.run("CREATE EXTENSION citext")
        return lambda table, rows: database.write(table, rows, types={**TYPES, "text": "CITEXT"})


# What is sent -----------------------------------------------------------------------------------

BLURRED = (
    'UPDATE "Odd".events SET user_id=stage.value_0 FROM stage'
    ' WHERE "Odd".events.anonymous_id = stage.equal_0'
    ' AND (CAST("Odd".events.anonymous_id AS TEXT) COLLATE "C") ='
    ' (CAST(stage.equal_0 AS TEXT) COLLATE "C")'
    ' AND "Odd".events.user_id IS DISTINCT FROM stage.value_0\n'
    "-- no bounds; 1 staged rows"
)


def test_bytes_decide_where_a_collation_blurs(database: Database, opened: Opened) -> None:
    """`=` finds the rows, the bytes decide; in any other table the statement has no such words."""
    database.run("CREATE EXTENSION citext")
    database.run('CREATE SCHEMA "Odd"')
    database.run('CREATE TABLE "Odd".events (anonymous_id CITEXT, user_id TEXT)')
    sink = opened()
    sink.inline_rows = 0
    (step,) = plan_updates([update(1, {"user_id": "u1"}, device("a1"), table="Odd.events")]).steps

    assert re.sub(r"recognition_stage_[0-9a-f]{8}", "stage", sink.compile(step)) == BLURRED


@contextmanager
def _sent(sink: PostgresqlSink) -> Iterator[list[str]]:
    """The texts of all statements that the sink sends meanwhile."""
    texts: list[str] = []

    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        texts.append(re.sub(r"recognition_stage_[0-9a-f]{8}", "stage", statement))

    sa.event.listen(sink._engine, "before_cursor_execute", note)
    yield texts
    sa.event.remove(sink._engine, "before_cursor_execute", note)


@pytest.mark.parametrize("visitors", [1, 100, 101, 3_000])
def test_a_window_takes_a_handful_of_statements(
    database: Database, opened: Opened, visitors: int
) -> None:
    """The same statements, in this order, whatever the number of visitors; of few without stage."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(visitors)])
    sink = opened()
    apply(sink, update(1, {"user_id": "u1"}, device("nobody"), unknown()))

    with _sent(sink) as sent:
        applied = apply(
            sink,
            *(
                update(n, {"user_id": "u"}, device(f"a{n}"), unknown(), expected_rows=1)
                for n in range(visitors)
            ),
        )

    start = re.compile(r"\w+ (\w+ TABLE \w+|INTO \w+|TABLE \w+|\w+)")
    begun = [found[0] for each in sent if (found := start.match(each))]
    staged = visitors > 100
    assert applied.rows_changed == visitors
    assert begun == [
        "SELECT set_config",
        "SELECT pg_advisory_xact_lock",
        *(["CREATE TEMPORARY TABLE stage", "CREATE INDEX", "ANALYZE stage"] if staged else []),
        "SELECT stage",
        "UPDATE events",
        "INSERT INTO recognition_ledger",
        *(["DROP TABLE stage"] if staged else []),
    ]
    # COPY goes past SQLAlchemy, and what begins the transaction past our count.
    assert applied.statements == len(sent) - 1 + staged


@pytest.fixture(params=["inline", "staged"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small windows without a stage, as they are; and with one, as large ones have it."""
    if request.param == "staged":
        monkeypatch.setattr(PostgresqlSink, "inline_rows", 0)


@contextmanager
def _explained(
    sink: PostgresqlSink, *settings: str, begins: str = "UPDATE"
) -> Iterator[list[dict[str, Any]]]:
    """How the server would carry out the UPDATEs that the sink sends, by the server's own word."""
    found: list[dict[str, Any]] = []

    def explain(_: Any, cursor: Any, text: str, parameters: Any, *rest: Any) -> None:
        if text.startswith(begins):
            with cursor.connection.cursor() as another:
                for setting in settings:
                    another.execute(f"SET LOCAL {setting}")
                another.execute(f"EXPLAIN (FORMAT JSON) {text}", parameters)
                ((plans,),) = another.fetchall()
                found.extend(_nodes(plans[0]["Plan"]))

    sa.event.listen(sink._engine, "before_cursor_execute", explain)
    yield found
    sa.event.remove(sink._engine, "before_cursor_execute", explain)


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from _nodes(part)


TIME_TYPES = ["TIMESTAMPTZ", "TIMESTAMP", "DATE", "TIMESTAMPTZ(3)"]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("declared", TIME_TYPES)
def test_constant_bounds_prune_partitions(
    database: Database, opened: Opened, declared: str
) -> None:
    """The planner itself leaves out the partitions in which no row of the window can be."""
    database.run(
        f"CREATE TABLE events (anonymous_id TEXT, user_id TEXT, timestamp {declared})"
        " PARTITION BY RANGE (timestamp)"
    )
    for day in range(1, 8):
        database.run(
            f"CREATE TABLE events_{day} PARTITION OF events"
            f" FOR VALUES FROM ('2026-01-0{day}') TO ('2026-01-0{day + 1}')"
        )
        database.run("INSERT INTO events VALUES ('a1', NULL, %s)", f"2026-01-0{day}")
    sink = opened()
    start, end = (datetime(2026, 1, day, tzinfo=UTC) for day in (3, 5))
    window = update(
        1, {"user_id": "u"}, device("a1"), Between(column="timestamp", start=start, end=end)
    )

    with _explained(sink) as found:
        applied = apply(sink, window)

    scanned = {each["Relation Name"] for each in found if "Relation Name" in each}
    assert applied.rows_changed == 2
    # The node of the UPDATE itself names the table above.
    assert {name for name in scanned if name.startswith("events_")} == {"events_3", "events_4"}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("declared", ["TIMESTAMPTZ", "TIMESTAMP(0)", "TIMESTAMP(3)", "DATE", "day"])
def test_messages_are_found_whatever_is_kept_of_their_times(
    database: Database, opened: Opened, declared: str
) -> None:
    """A time is rounded, a date cuts it off: the bounds of a statement leave room for that."""
    database.run("CREATE DOMAIN day AS DATE")
    database.write("events", [row("m1", "a1", 1.99996)], types={**TYPES, "time": declared})
    refs = (("m1", at(1.99996)),)
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)

    applied = apply(opened(), update(1, {"user_id": "u"}, named))

    assert applied.rows_changed == 1


@pytest.mark.parametrize("declared", TIME_TYPES)
def test_constant_bounds_are_looked_up_in_brin(
    database: Database, opened: Opened, declared: str
) -> None:
    """A BRIN index on the time is asked for the whole window's range."""
    database.run(f"CREATE TABLE events (anonymous_id TEXT, user_id TEXT, timestamp {declared})")
    database.run("CREATE INDEX by_time ON events USING brin (timestamp)")
    sink = opened()

    with _explained(sink, "enable_seqscan = off") as found:
        apply(sink, update(1, {"user_id": "u"}, device("a1"), between(0, 90)))

    (condition,) = (each["Index Cond"] for each in found if each.get("Index Name") == "by_time")
    days = declared == "DATE"  # whole ones: of a time no more is kept
    assert ("2026-01-01 00:00:00" if days else "2026-01-01 12:00:00") in condition
    assert ("2026-01-02 00:00:00" if days else "2026-01-01 12:01:30") in condition
    assert "stage" not in condition


KEYS = {
    "TEXT": [f"a{n}" for n in range(500)],
    "VARCHAR(64)": [f"a{n}" for n in range(500)],
    'TEXT COLLATE "C"': [f"a{n}" for n in range(500)],
    "CITEXT": [f"a{n}" for n in range(500)],
    "CHAR(36)": [f"{n:036}" for n in range(500)],
    "BIGINT": [*range(500)],
    "SMALLINT": [*range(500)],
    "NUMERIC(20)": [*range(500)],
    "UUID": [f"00000000-0000-0000-0000-{n:012}" for n in range(500)],
}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("declared", KEYS)
def test_rows_are_found_by_the_index_of_the_key(
    database: Database, opened: Opened, declared: str
) -> None:
    """Each staged row looks its rows up by the index, whatever the key's type and collation."""
    database.run("CREATE EXTENSION citext")
    database.run(
        f"CREATE TABLE events (anonymous_id {declared}, user_id TEXT, timestamp TIMESTAMPTZ)"
    )
    keys: list[Any] = KEYS[declared]
    with database.server.connect(database.name) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY events (anonymous_id, timestamp) FROM STDIN") as copy:
            for n in range(20_000):
                copy.write_row((keys[n % 500], at(n)))
        cursor.execute("CREATE INDEX by_device ON events (anonymous_id)")
        cursor.execute("ANALYZE events")
    sink = opened()

    # A table of 20,000 rows is read as fast as a whole.
    others = [f"enable_{each} = off" for each in ("seqscan", "hashjoin", "mergejoin")]
    with _explained(sink, *others) as found:
        applied = apply(
            sink,
            *(
                update(
                    n, {"user_id": "u"}, Equals(column="anonymous_id", value=key), between(0, 9e9)
                )
                for n, key in enumerate(keys[:30])
            ),
        )

    assert applied.rows_changed == 30 * 40
    assert "by_device" in {each.get("Index Name") for each in found}


# Names ------------------------------------------------------------------------------------------


def _make(database: Database, *names: str) -> None:
    """Tables of one device each, all of the same."""
    for name in names:
        database.run(f"CREATE TABLE {name} (message_id TEXT, anonymous_id TEXT, user_id TEXT)")
        database.run(f"INSERT INTO {name} VALUES ('m1', 'a1', NULL)")


def _owners(database: Database, *names: str) -> list[object]:
    return [database.run(f"SELECT user_id FROM {name}")[0][0] for name in names]


@pytest.mark.parametrize(
    ("names", "asked", "met"),
    [
        (['"Events"', "events"], "Events", '"Events"'),
        (['"Events"', "events"], "events", "events"),
        (['"Events"'], "EVENTS", '"Events"'),
        (["events"], "EVENTS", "events"),
        (['"Odd"."Events"', "events"], "Odd.Events", '"Odd"."Events"'),
        (['"Odd"."Events"', "events"], "odd.events", '"Odd"."Events"'),
        (['"Odd".events', "events"], "public.events", "events"),
        (["other.events", "events"], "events", "other.events"),
        (['other."Events"', "events"], "events", "events"),
        (['other."Events"', "events"], "EVENTS", 'other."Events"'),
    ],
)
def test_which_table_a_name_means(
    database: Database, opened: Opened, names: list[str], asked: str, met: str
) -> None:
    """The exact name, else the one in any case; without a schema the first of the search path."""
    database.run('CREATE SCHEMA "Odd"')
    database.run("CREATE SCHEMA other")
    _make(database, *names)
    sink = opened(f"{database.url}?options=-csearch_path%3Dother,public")

    applied = apply(sink, update(1, {"user_id": "u1"}, device("a1"), table=asked))

    assert applied.rejected == ()
    assert _owners(database, *names) == ["u1" if name == met else None for name in names]


def test_a_name_may_hold_the_database(database: Database, opened: Opened) -> None:
    """`database.schema.table` is the table of this database, and of no other."""
    _make(database, "events")
    sink = opened()

    here = apply(
        sink, update(1, {"user_id": "u1"}, device("a1"), table=f"{database.name}.public.events")
    )
    elsewhere = apply(sink, update(1, {"user_id": "u2"}, device("a1"), table="other.public.events"))

    assert here.rows_changed == 1
    assert "no table 'other.public.events'" in refusal(elsewhere)


def test_names_that_differ_in_case_alone_are_refused(database: Database, opened: Opened) -> None:
    """Which of several is meant cannot be told: of tables, of columns."""
    _make(database, '"Events"', '"EVENTS"')
    database.run('CREATE TABLE visits (anonymous_id TEXT, "userId" TEXT, "userid" TEXT)')
    sink = opened()

    table = refusal(apply(sink, update(1, {"user_id": "u1"}, device("a1"))))
    column = refusal(apply(sink, update(1, {"userID": "u1"}, device("a1"), table="visits")))

    assert "'EVENTS' and 'Events'" in table
    assert "'userId' and 'userid'" in column


def test_one_name_in_two_schemas_has_two_histories(database: Database, opened: Opened) -> None:
    """A later update of one schema's table takes nothing from an earlier one of another's."""
    database.run("CREATE SCHEMA other")
    _make(database, "events", "other.events")
    sink = opened()

    apply(sink, update(9, {"user_id": "late"}, device("a1"), table="other.events"))
    early = apply(sink, update(1, {"user_id": "early"}, device("a1"), table="public.events"))
    same = apply(sink, update(2, {"user_id": "too early"}, device("a1"), table="OTHER.events"))

    assert (early.rows_changed, same.rows_changed) == (1, 0)
    assert _owners(database, "events", "other.events") == ["early", "late"]


def test_the_search_path_finds_the_ledger(database: Database, opened: Opened) -> None:
    """The ledger is made in the first schema of the search path, and found there."""
    database.run("CREATE SCHEMA other")
    _make(database, "events")
    url = f"{database.url}?options=-csearch_path%3Dother,public"
    apply(opened(url), update(2, {"user_id": "late"}, device("a1")))

    applied = apply(opened(url), update(1, {"user_id": "early"}, device("a1")))

    assert applied.rows_changed == 0
    assert database.run("SELECT count(*) FROM other.recognition_ledger") == [(1,)]


def test_percent_signs_and_quotes_in_names(postgres: GivenServer, opened: Opened) -> None:
    """A database, a schema, and a column that is not spoken of, may be called like this."""
    name = 'recognition_test_100%d"s'
    quoted = '"recognition_test_100%d""s"'
    postgres.run(f"CREATE DATABASE {quoted}")
    try:
        database = Database(postgres, name)
        database.run('CREATE SCHEMA "50%s"')
        database.run('CREATE TABLE "50%s".events ("%(x)s" INT, anonymous_id TEXT, user_id TEXT)')
        database.run("""INSERT INTO "50%s".events VALUES (1, 'a1', NULL)""")
        sink = opened(f"{database.url}?options=-csearch_path%3D%2250%25s%22")

        applied = apply(sink, update(1, {"user_id": "u"}, device("a1")))
        sink.close()

        assert (applied.rejected, applied.rows_changed) == ((), 1)
    finally:
        postgres.run(f"DROP DATABASE {quoted} WITH (FORCE)")


# What a table is --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("CREATE VIEW events AS SELECT * FROM base", "is a view"),
        ("CREATE MATERIALIZED VIEW events AS SELECT * FROM base", "is a view"),
        (
            "CREATE EXTENSION file_fdw; CREATE SERVER s FOREIGN DATA WRAPPER file_fdw;"
            "CREATE FOREIGN TABLE events (anonymous_id TEXT, user_id TEXT) SERVER s"
            " OPTIONS (filename '/dev/null')",
            "is a foreign table",
        ),
        (
            "CREATE TABLE events (anonymous_id TEXT, user_id TEXT GENERATED ALWAYS AS"
            " (anonymous_id || 'x') STORED)",
            "is computed",
        ),
        (
            "CREATE TABLE events (anonymous_id TEXT, user_id INT GENERATED ALWAYS AS IDENTITY)",
            "is computed",
        ),
        ("CREATE TEMPORARY TABLE events (anonymous_id TEXT, user_id TEXT)", "no table 'events'"),
        ("CREATE SEQUENCE events", "no table 'events'"),
    ],
)
def test_what_cannot_be_set_is_refused(
    database: Database, opened: Opened, made: str, reason: str
) -> None:
    """Views, foreign tables, computed columns and what is no table refuse their updates alone."""
    _make(database, "base")
    for each in made.split(";"):
        database.run(each)

    applied = apply(
        opened(),
        update(1, {"user_id": "u"}, device("a1")),
        update(2, {"user_id": "u"}, device("a1"), table="base"),
    )

    assert reason in refusal(applied)
    assert _owners(database, "base") == ["u"]


def test_rows_move_between_partitions(database: Database, opened: Opened) -> None:
    """The column that is set may be the one that decides where a row is."""
    database.run(
        "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT)"
        " PARTITION BY LIST (user_id)"
    )
    database.run("CREATE TABLE unknown PARTITION OF events FOR VALUES IN (NULL)")
    database.run("CREATE TABLE known PARTITION OF events DEFAULT")
    database.run("INSERT INTO events VALUES ('m1', 'a1', NULL), ('m2', 'a2', NULL)")

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), unknown()))

    assert (applied.rows_changed, applied.rows_matched) == (1, 1)
    assert database.run("SELECT message_id FROM known") == [("m1",)]
    assert database.run("SELECT message_id FROM unknown") == [("m2",)]


def test_a_table_that_was_replaced_is_looked_at_again(database: Database, opened: Opened) -> None:
    """A table that was dropped and made anew, with other columns, is met by the next plan."""
    _make(database, "events")
    sink = opened()
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    database.run("DROP TABLE events")
    database.run("CREATE TABLE events (user_id VARCHAR(2), anonymous_id VARCHAR(9))")
    database.run("INSERT INTO events VALUES (NULL, 'a1')")

    fits = apply(sink, update(2, {"user_id": "u2"}, device("a1")))
    wide = apply(sink, update(3, {"user_id": "u33"}, device("a1")))

    assert fits.rows_changed == 1
    assert "3 characters" in refusal(wide)


def test_a_column_that_is_not_null_is_emptied_by_an_empty_text(
    database: Database, opened: Opened
) -> None:
    """`TEXT NOT NULL DEFAULT ''`: empty is '', and null is written as ''."""
    database.run(
        "CREATE TABLE events (message_id TEXT, anonymous_id TEXT,"
        " user_id TEXT NOT NULL DEFAULT '', recognition_version BIGINT)"
    )
    database.run("INSERT INTO events VALUES ('m1', 'a1', ''), ('m2', 'a1', 'known')")
    sink = opened()

    apply(sink, update(1, {"user_id": "u1"}, device("a1"), unknown(), versioned=True))
    first = database.column("user_id")
    apply(sink, update(2, {"user_id": None}, device("a1"), unknown(), versioned=True))

    assert first == {"m1": "u1", "m2": "known"}
    assert database.column("user_id") == {"m1": "", "m2": "known"}


# What is compared and written -------------------------------------------------------------------

SIMILAR = ["A1", "a1", "\u00c11", "A 1"]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "declared", ["CITEXT", "TEXT COLLATE blurred", "VARCHAR(9) COLLATE blurred"]
)
def test_a_collation_does_not_blur(database: Database, opened: Opened, declared: str) -> None:
    """Keys and values that a type or collation takes for equal are told apart, byte by byte."""
    if "COLLATE" in declared:
        try:
            database.run(
                "CREATE COLLATION blurred (provider = icu, locale = 'und-u-ks-level1-ka-shifted',"
                " deterministic = false)"
            )
        except psycopg.errors.FeatureNotSupported:
            pytest.skip("the server was built without ICU")
    else:
        database.run("CREATE EXTENSION citext")
    database.run(
        f"CREATE TABLE events (message_id {declared}, anonymous_id {declared}, user_id {declared})"
    )
    for n, key in enumerate(SIMILAR):
        database.run("INSERT INTO events VALUES (%s, %s, 'U')", f"m{n}", key)
    sink = opened()

    applied = apply(
        sink,
        update(1, {"user_id": "u"}, device("A1")),
        update(2, {"user_id": "\u00fa"}, device("a1")),
        update(3, {"user_id": "U"}, device("\u00c11")),
    )
    late = apply(sink, update(0, {"user_id": "late"}, device("A1")))

    assert database.column("user_id") == {"m0": "u", "m1": "\u00fa", "m2": "U", "m3": "U"}
    assert (applied.rows_matched, applied.rows_changed, late.rows_changed) == (3, 2, 0)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("declared", ['TEXT COLLATE "C"', 'VARCHAR(9) COLLATE "POSIX"', "CHAR(4)"])
def test_the_ledger_knows_keys_of_any_collation(
    database: Database, opened: Opened, declared: str
) -> None:
    """The ledger compares keys under its own collation, which no two of a statement contradict."""
    database.run(
        f"CREATE TABLE events (message_id {declared}, anonymous_id {declared}, user_id {declared},"
        " timestamp TIMESTAMPTZ)"
    )
    for n in (1, 2):
        database.run("INSERT INTO events VALUES (%s, 'a1', NULL, %s)", f"m{n}", at(n))
    sink = opened()
    named = Messages(id_column="message_id", time_column="timestamp", refs=(("m1", at(1)),))

    apply(sink, update(3, {"user_id": "u3"}, device("a1"), named))
    apply(sink, update(2, {"user_id": "u2"}, device("a1")))
    late = apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    assert late.rows_changed == 0
    found = {str(k).strip(): str(v).strip() for k, v in database.column("user_id").items()}
    assert found == {"m1": "u3", "m2": "u2"}


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "declared", ["TIMESTAMPTZ", "TIMESTAMP", "TIMESTAMP(3)", "TIMESTAMPTZ(0)", "DATE"]
)
def test_times_are_compared_as_what_they_are(
    odd_postgres: GivenServer, opened: Opened, declared: str
) -> None:
    """A timestamp and a date are UTC, a timestamptz a moment, in whatever zone the server is."""
    times = ["2026-01-01 23:59:59", "2026-01-02 00:00:00", "2026-01-03 00:00:00", "infinity"]
    inside = {"2026-01-02 00:00:00"}
    if declared in ("TIMESTAMPTZ", "TIMESTAMP"):
        times.append("2026-01-02 23:59:59.999999")
        inside.add("2026-01-02 23:59:59.999999")
    with odd_postgres.database() as name:
        database = Database(odd_postgres, name)
        database.run(
            "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT,"
            f" timestamp {declared})"
        )
        for each in [*times, None]:
            database.run("INSERT INTO events VALUES (%s, 'a1', NULL, %s)", str(each), each)
        day = Between(
            column="timestamp",
            start=datetime(2026, 1, 2, tzinfo=UTC),
            end=datetime(2026, 1, 3, tzinfo=UTC),
        )
        ever = Between(
            column="timestamp",
            start=datetime(1, 1, 1, tzinfo=UTC),
            end=datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        )
        sink = opened(database.url)

        apply(
            sink,
            update(1, {"user_id": "ever"}, device("a1"), ever),
            update(2, {"user_id": "inside"}, device("a1"), day),
        )

        sink.close()
        found = database.column("user_id")
    assert {name for name, value in found.items() if value == "inside"} == inside
    assert {name for name, value in found.items() if value is None} == {"infinity", "None"}


@pytest.mark.usefixtures("both_ways")
def test_long_and_hostile_texts_are_keys_and_values(database: Database, opened: Opened) -> None:
    """They come back unchanged: as key, as value, in the ledger, however long."""
    letters = "".join(map(chr, range(0x100, 0x6000)))  # no compression makes it short
    values = [*HOSTILE_VALUES, "\\", "\\N", "\\.", "%", "%s", "\x01", letters * 3]
    database.run("CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT)")
    for n, value in enumerate(values):
        database.run("INSERT INTO events VALUES (%s, %s)", f"m{n}", value)
    sink = opened()
    apply(sink, *(update(n, {"user_id": v}, device(v)) for n, v in enumerate(values, start=100)))

    late = apply(sink, *(update(n, {"user_id": "x"}, device(v)) for n, v in enumerate(values)))

    assert late.rows_changed == 0
    assert database.column("user_id") == {f"m{n}": v for n, v in enumerate(values)}


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INT", "some text"),
        ("INT", 2**31),
        ("INT", 1.5),
        ("INT", True),
        ("SMALLINT", -(2**15) - 1),
        ("BIGINT", 2**63),
        ("NUMERIC(4,2)", 100),
        ("NUMERIC(4,2)", 99.995),
        ("NUMERIC(3,0)", -1000),
        ("NUMERIC", "1"),
        ("REAL", 1e39),
        ("DOUBLE PRECISION", True),
        ("BOOLEAN", 1),
        ("BOOLEAN", "true"),
        ("VARCHAR(3)", "\U0001f9ea" * 4),
        ("CHAR(30)", "with a space at the end "),
        ("TEXT", "\ud800"),
        ("DATE", "2026-01-01T12:00:00Z"),
        ("TIMESTAMP(3)", "2026-01-01T00:00:00.0005Z"),
        ("TIMESTAMPTZ", "soon"),
        ("UUID", "x"),
        ("JSON", "{}"),
        ("JSONB", "{}"),
        ("BYTEA", "a"),
        ("TEXT[]", "a"),
        ("INET", "::1"),
        ("INTERVAL", "1 day"),
        ("MONEY", 1),
        ("mood", "happy"),
        ("short", "\U0001f9ea" * 4),
        ("INT NOT NULL DEFAULT 0", None),
        ("filled", None),
    ],
)
def test_what_a_column_cannot_hold_is_refused(
    database: Database, opened: Opened, declared: str, value: Any
) -> None:
    """A value that the column would refuse, cut or change refuses its update; the rest goes on."""
    database.run("CREATE TYPE mood AS ENUM ('happy')")
    database.run("CREATE DOMAIN inner_short AS VARCHAR(3)")
    database.run("CREATE DOMAIN short AS inner_short")
    database.run("CREATE DOMAIN filled AS BIGINT NOT NULL DEFAULT 7")
    database.run(f"CREATE TABLE events (anonymous_id TEXT, x {declared}, y TEXT)")
    database.run("INSERT INTO events (anonymous_id) VALUES ('a1'), ('a2')")
    before = database.run("SELECT x::text FROM events")

    applied = apply(
        opened(), update(1, {"x": value}, device("a1")), update(2, {"y": "y"}, device("a2"))
    )

    text = refusal(applied)
    assert "column 'x'" in text
    assert not isinstance(value, str) or len(value) < 9 or value not in text
    assert database.run("SELECT x::text FROM events") == before
    assert database.run("SELECT y FROM events WHERE anonymous_id = 'a2'") == [("y",)]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        ("INT", 7.0, "7"),
        ("SMALLINT", -(2**15), "-32768"),
        ("BIGINT", 2**63 - 1, "9223372036854775807"),
        ("NUMERIC(4,2)", 99.5, "99.50"),
        ("NUMERIC(3,-2)", 12_300, "12300"),
        ("NUMERIC(30)", 2**63 - 1, "9223372036854775807"),
        ("NUMERIC", 0.1, "0.1"),
        ("NUMERIC", 1e300, "1" + "0" * 300),
        ("DOUBLE PRECISION", 0.1, "0.1"),
        ("DOUBLE PRECISION", 7, "7"),
        ("DOUBLE PRECISION", 1.7976931348623157e308, "1.7976931348623157e+308"),
        ("REAL", 0.25, "0.25"),
        ("BOOLEAN", True, "true"),
        ("VARCHAR(3)", "\U0001f9ea" * 3, "\U0001f9ea" * 3),
        ("CHAR(4)", "ab", "ab"),
        ("TEXT", 7, "7"),
        ("TEXT", True, "true"),
        ("short", "abc", "abc"),
        ("TIMESTAMP", "2026-01-01T01:00:00+02:00", "2025-12-31 23:00:00"),
        ("TIMESTAMP(3)", "2026-01-01T00:00:00.5Z", "2026-01-01 00:00:00.5"),
        ("TIMESTAMPTZ", "2026-01-01T00:00:00.5Z", "2026-01-01 00:00:00.5+00"),
        ("DATE", "2026-01-01", "2026-01-01"),
        ("UUID", "00000000-0000-0000-0000-000000000007", "00000000-0000-0000-0000-000000000007"),
        ("VARCHAR(9) NOT NULL DEFAULT 'x'", None, ""),
    ],
)
def test_what_a_column_holds_is_written(
    database: Database, opened: Opened, declared: str, value: Any, expected: str
) -> None:
    """A value that the column keeps as it is passes, and is not written a second time."""
    database.run("CREATE DOMAIN inner_short AS VARCHAR(3)")
    database.run("CREATE DOMAIN short AS inner_short CHECK (value <> 'zzz')")
    database.run(f"CREATE TABLE events (anonymous_id TEXT, x {declared})")
    database.run("INSERT INTO events (anonymous_id) VALUES ('a1')")
    sink = opened()

    first = apply(sink, update(1, {"x": value}, device("a1")))
    again = apply(sink, update(1, {"x": value}, device("a1")))

    assert first.rejected == ()
    assert (first.rows_changed, again.rows_changed, again.rows_matched) == (1, 0, 1)
    assert database.run("SELECT x::text FROM events") == [(expected,)]


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("declared", "keys"),
    [
        ("BOOLEAN", [True, False]),
        ("SMALLINT", [7]),
        ("BIGINT", [2**63 - 1, 0]),
        ("NUMERIC(4,2)", [0.25, 1]),
        ("NUMERIC", [2**62 + 1]),
        ("REAL", [0.25, 1]),
        ("UUID", ["00000000-0000-0000-0000-000000000007"]),
        ("TIMESTAMPTZ", ["2026-01-01T00:00:00Z"]),
        ("DATE", ["2026-01-01"]),
        ("CHAR(9)", ["a1"]),
    ],
)
def test_keys_may_be_of_any_type(
    database: Database, opened: Opened, declared: str, keys: list[Any]
) -> None:
    """Rows are found, and the ledger knows them, by a key that is no text."""
    database.run(f"CREATE TABLE events (anonymous_id {declared}, user_id TEXT)")
    for key in keys:
        database.run(f"INSERT INTO events VALUES (%s::text::{declared}, NULL)", str(key))
    sink = opened()
    found = [Equals(column="anonymous_id", value=key) for key in keys]

    first = apply(sink, *(update(9 + n, {"user_id": "u"}, key) for n, key in enumerate(found)))
    late = apply(sink, *(update(1, {"user_id": "late"}, key) for key in found[:1]))

    assert (first.rejected, late.rejected) == ((), ())
    assert late.rows_changed == 0
    assert database.run("SELECT count(*) FROM events WHERE user_id = 'u'") == [(len(keys),)]


def test_texts_hold_no_times(database: Database, opened: Opened) -> None:
    """A text or number is not compared with times; the rest of the plan goes on."""
    database.run("CREATE TABLE events (anonymous_id TEXT, user_id TEXT, timestamp TEXT)")
    _make(database, "visits")

    applied = apply(
        opened(),
        update(1, {"user_id": "u"}, device("a1"), between(0, 9)),
        update(2, {"user_id": "u"}, device("a1"), table="visits"),
    )

    assert "compared with a timestamptz" in refusal(applied)
    assert _owners(database, "visits") == ["u"]


def test_a_nul_is_no_part_of_a_message() -> None:
    """PostgreSQL has no NUL in texts; a message with one is refused before it gets here."""
    with pytest.raises(ValidationError, match="NUL"):
        update(1, {"user_id": "a\x00b"}, device("a1"))


@pytest.mark.parametrize("place", ["value", "key"])
def test_a_lone_surrogate_refuses_its_update_alone(
    database: Database, opened: Opened, place: str
) -> None:
    """Half a surrogate pair is no character of any encoding; the other updates are applied."""
    _make(database, "events")
    broken = (
        update(1, {"user_id": "\ud800"}, device("a9"))
        if place == "value"
        else update(1, {"user_id": "u"}, device("\udfff"))
    )

    applied = apply(opened(), broken, update(2, {"user_id": "u2"}, device("a1")))

    assert "encoding" in refusal(applied)
    assert _owners(database, "events") == ["u2"]


@pytest.mark.parametrize(
    ("encoding", "fits", "foreign"),
    [("LATIN1", "\u00e9", "\u20ac"), ("WIN1252", "\u20ac", "\u0394"), ("EUC_KR", "e", "\u00e9")],
)
def test_what_the_encoding_lacks_is_refused(
    postgres: GivenServer, opened: Opened, encoding: str, fits: str, foreign: str
) -> None:
    """A database of another encoding takes the characters it has, and refuses the others' rows."""
    with postgres.database(f"ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0") as name:
        database = Database(postgres, name)
        _make(database, "events")
        sink = opened(database.url)

        applied = apply(
            sink,
            update(1, {"user_id": fits}, device("a1")),
            update(2, {"user_id": foreign}, device("a2")),
        )

        sink.close()
        assert "encoding" in refusal(applied)
        assert _owners(database, "events") == [fits]


def test_load_makes_the_table(database: Database, opened: Opened) -> None:
    """`load` inserts what is not there yet, and updates find it by an index on the device."""
    sink = opened()
    columns = {"message_id": "text", "anonymous_id": "text", "timestamp": "time", "n": "integer"}
    columns |= {"x": "float", "b": "boolean"}
    rows = [
        {"message_id": f"m{n}", "anonymous_id": "a1", "timestamp": n, "n": n, "x": n, "b": True}
        for n in range(3)
    ]

    counts = [sink.load("Events", rows, key="message_id", columns=columns) for _ in range(2)]

    assert counts == [3, 0]
    assert database.run('SELECT message_id, timestamp, n, x, b FROM "Events" WHERE n = 1') == [
        ("m1", datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC), 1, 1.0, True)
    ]
    assert database.run("SELECT count(*) FROM pg_indexes WHERE tablename = 'Events'") == [(2,)]


def test_names_may_be_as_long_as_the_server_takes_them(database: Database, opened: Opened) -> None:
    """The index has a shorter name then; of what is too long nothing is added under another."""
    columns = {"message_id": "text", "anonymous_id": "text"}
    rows = [{"message_id": "m1", "anonymous_id": "a1"}]
    table, column = "\u00e9" * 31 + "t", "trait_" + "\u00e9" * 29
    sink = opened(add_missing_columns=True, timeout=1)
    sink.load(table, rows, key="message_id", columns=columns)

    applied = [
        apply(
            sink,
            update(1, {column: "x"}, device("a1"), table=table),
            update(2, {column[:-1]: "x"}, device("a1"), table=table),
        )
        for _ in range(2)
    ]

    assert [each.rows_matched for each in applied] == [1, 1]
    assert "no names of this length" in refusal(applied[0])
    assert refusal(applied[1]) == refusal(applied[0])
    assert database.run(f'SELECT "{column[:-1]}" FROM "{table}"') == [("x",)]
    assert sink.missing_index(table, "anonymous_id") is None
    database.run(f"{sink.missing_index(table, column[:-1])}")


def test_sinks_that_load_at_once_make_one_table(database: Database) -> None:
    """Several loaders that find no table make one, and each row is inserted once."""
    counts: list[int] = []
    ready = threading.Barrier(4)

    def load() -> None:
        with closing(open_sink(database.url)) as sink:
            assert isinstance(sink, PostgresqlSink)
            rows = [{"message_id": f"m{n}", "anonymous_id": "a"} for n in range(50)]
            columns = {"message_id": "text", "anonymous_id": "text"}
            ready.wait()
            counts.append(sink.load("events", rows, key="message_id", columns=columns))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(counts) == [0, 0, 0, 50]
    assert database.run("SELECT count(*) FROM events") == [(50,)]


# Errors -----------------------------------------------------------------------------------------


def _fails(sink: Sink, *updates: Any, error: type[RecognitionError]) -> str:
    """The text of the error; nothing secret and no value is in it."""
    window = updates or (update(1, {"user_id": "secret-value"}, device("a1")),)
    with pytest.raises(error) as caught:
        apply(sink, *window)
    assert type(caught.value) is error
    text = str(caught.value)
    assert "secret" not in text
    return text


def test_refused_credentials(database: Database, opened: Opened) -> None:
    """A wrong password, an unknown role or none at all is said so, without names; no retry."""
    server = database.server
    for user, password in [
        ("secret_role", "secret-word"),
        (server.user, "secret-word"),
        (server.user, ""),
    ]:
        sink = opened(server.url(database.name, user=user, password=password))

        started = time.monotonic()
        text = _fails(sink, error=SinkError)

        assert "refused the credentials (28" in text
        assert server.user not in text
        assert time.monotonic() - started < 10
        assert password not in repr(sink._engine) or not password


def test_a_database_that_is_not_there(database: Database, opened: Opened) -> None:
    """The URL's database is missing: somebody has to mend it, no retry helps."""
    text = _fails(opened(database.server.url("secret_database")), error=TableError)

    assert "(3D000)" in text


def test_a_server_that_is_not_there(database: Database, opened: Opened) -> None:
    """Nobody listens: it is tried again until the timeout, then said so; a retry may help."""
    sink = opened(database.server.url(database.name, port=1), timeout=0.3)

    assert "cannot be reached" in _fails(sink, error=SinkUnavailableError)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://localhost/db",
        "postgresql+asyncpg://localhost/db",
        "postgresql:db",
        "postgresql://localhost:port/db",
    ],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    """Another driver, or what is no URL, is refused with the form that is needed."""
    with pytest.raises(ConfigurationError, match=r"postgresql\+psycopg://"):
        open_sink(url)


def test_an_unknown_option_is_refused(database: Database, opened: Opened) -> None:
    """What libpq does not know behind `?` is a mistake in the URL."""
    assert "option" in _fails(opened(f"{database.url}?secret=1"), error=ConfigurationError)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_scheme_opens_psycopg_3(database: Database, opened: Opened, scheme: str) -> None:
    """The short schemes mean psycopg 3 too; their names may be PostgreSQL's old one."""
    _make(database, "events")
    sink = opened(database.server.url(database.name, scheme=scheme))

    apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    assert sink._engine.driver == "psycopg"
    assert _owners(database, "events") == ["u1"]


NEEDED = ("SELECT, UPDATE ON events", "CREATE ON SCHEMA public")


def test_the_documented_grants_are_enough(database: Database, opened: Opened) -> None:
    """With these grants a role applies updates, by ledger and by version."""
    database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
    with database.server.new_role(database.name, *NEEDED) as (name, password):
        sink = opened(database.server.url(database.name, user=name, password=password))

        first = apply(sink, update(1, {"user_id": "u1"}, device("a1"), unknown()))
        second = apply(sink, update(2, {"user_id": "u2"}, device("a2"), versioned=True))

        sink.close()
        assert (first.rows_changed, second.rows_changed) == (1, 1)


def test_columns_alone_may_be_granted(database: Database, opened: Opened) -> None:
    """UPDATE of the columns that are set is enough; of another column it is refused."""
    database.write("events", [row("m1", "a1", 1)])
    grants = ("SELECT, UPDATE (user_id, recognition_version) ON events",)
    with database.server.new_role(database.name, *grants) as (name, password):
        sink = opened(database.server.url(database.name, user=name, password=password))

        applied = apply(sink, update(1, {"user_id": "u"}, device("a1"), versioned=True))
        other = update(2, {"stitched_user_id": "secret"}, device("a1"), versioned=True)
        text = _fails(sink, other, error=SinkReadOnlyError)

        sink.close()
        assert applied.rows_changed == 1
        assert "UPDATE on the columns" in text


@pytest.mark.parametrize(
    ("grants", "shown"),
    [
        ((), "GRANT SELECT, UPDATE ON events TO"),
        (("SELECT ON events",), "GRANT UPDATE ON events TO"),
        (("UPDATE ON events",), "GRANT SELECT ON events TO"),
        (("SELECT, UPDATE ON events",), "GRANT CREATE ON SCHEMA public TO"),
    ],
)
def test_a_missing_grant_is_shown(
    database: Database, opened: Opened, grants: tuple[str, ...], shown: str
) -> None:
    """The error shows the command that helps, and the sink goes on after it was run."""
    database.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    database.write("events", [row("m1", "a1", 1)])
    with database.server.new_role(database.name, *grants) as (name, password):
        sink = opened(database.server.url(database.name, user=name, password=password))

        text = _fails(sink, error=SinkReadOnlyError)
        database.run(f"GRANT SELECT, UPDATE ON events TO {name}")
        database.run(f"GRANT CREATE ON SCHEMA public TO {name}")
        applied = apply(sink, update(1, {"user_id": "u"}, device("a1")))

        sink.close()
        assert shown in text
        assert name not in text
        assert applied.rows_changed == 1


def test_a_ledger_of_somebody_else_names_its_grant(database: Database, opened: Opened) -> None:
    """Where the ledger is there already, its own grants are what is missing."""
    database.write("events", [row("m1", "a1", 1)])
    apply(opened(), update(1, {"user_id": "u"}, device("a1")))
    grants = ("SELECT, UPDATE ON events", "SELECT ON recognition_ledger")
    with database.server.new_role(database.name, *grants) as (name, password):
        sink = opened(database.server.url(database.name, user=name, password=password))

        text = _fails(sink, error=SinkReadOnlyError)

        sink.close()
        assert "GRANT INSERT, DELETE ON recognition_ledger TO" in text


def test_a_server_that_may_only_read(database: Database, opened: Opened) -> None:
    """A standby, or a session that only reads, is said so; nothing was written."""
    _make(database, "events")
    url = f"{database.url}?options=-cdefault_transaction_read_only%3Don"

    text = _fails(opened(url), error=SinkReadOnlyError)

    assert "may only read" in text
    assert _owners(database, "events") == [None]


def test_a_lock_that_stays_is_an_error_that_may_be_retried(
    database: Database, opened: Opened
) -> None:
    """Whoever locks the rows for longer than the timeout is said; the same sink goes on later."""
    _make(database, "events")
    sink = opened(timeout=0.2)
    with database.server.connect(database.name, autocommit=False) as other:
        other.execute("SELECT * FROM events FOR UPDATE")

        text = _fails(sink, error=SinkUnavailableError)

        other.rollback()
    assert "more than 0.2 seconds" in text
    assert apply(sink, update(1, {"user_id": "u"}, device("a1"))).rows_changed == 1


def test_a_lock_is_waited_for(database: Database, opened: Opened) -> None:
    """A lock that goes away within the timeout is nobody's error."""
    _make(database, "events")
    sink = opened()
    with database.server.connect(database.name, autocommit=False) as other:
        other.execute("SELECT * FROM events FOR UPDATE")
        results: list[Applied] = []
        thread = threading.Thread(
            target=lambda: results.append(apply(sink, update(1, {"user_id": "u"}, device("a1"))))
        )
        thread.start()
        _await(database, "wait_event_type = 'Lock' AND application_name = 'recognition'")

        other.rollback()
        thread.join()

    assert [each.rows_changed for each in results] == [1]


def _await(database: Database, condition: str) -> None:
    """Until some session of this database is like that."""
    deadline = time.monotonic() + 30
    while not database.run(
        f"SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND {condition}"
    ):
        assert time.monotonic() < deadline, condition
        time.sleep(0.01)


def test_a_statement_that_takes_too_long(database: Database, opened: Opened) -> None:
    """The server's own statement_timeout is an error that may be retried; all is rolled back."""
    _make(database, "events")
    database.run(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(30); RETURN NEW; END'"
    )
    database.run("CREATE TRIGGER slow BEFORE UPDATE ON events FOR EACH ROW EXECUTE FUNCTION slow()")
    sink = opened(f"{database.url}?options=-cstatement_timeout%3D200", timeout=0.1)

    text = _fails(sink, error=SinkUnavailableError)

    assert "cancelled" in text
    assert _owners(database, "events") == [None]


def _raise(database: Database, *states: str) -> None:
    """The first updates of events fail like this, the next one is carried out."""
    database.run("CREATE SEQUENCE tries")  # no rollback undoes what a sequence gave
    cases = " ".join(
        f"WHEN {n} THEN RAISE EXCEPTION USING ERRCODE = '{state}', MESSAGE = 'secret';"
        for n, state in enumerate(states, start=1)
    )
    database.run(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN CASE nextval('tries') {cases} ELSE END CASE; RETURN NULL; END $$"
    )
    database.run(
        "CREATE TRIGGER fail AFTER UPDATE ON events FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    )


def test_what_passes_is_tried_again(database: Database, opened: Opened) -> None:
    """Deadlocks, serialization failures, locks and full disks are tried again until the timeout."""
    _make(database, "events")
    _raise(database, "40001", "40P01", "55P03", "57014", "53100", "08006")

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1")))

    assert applied.rows_changed == 1
    assert database.run("SELECT last_value FROM tries") == [(7,)]


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("23514", TableError),
        ("23505", TableError),
        ("22003", TableError),
        ("54000", TableError),
        ("P0001", TableError),
        ("42883", SinkError),
        ("XX000", SinkError),
    ],
)
def test_what_stays_is_not_tried_again(
    database: Database, opened: Opened, state: str, error: type[RecognitionError]
) -> None:
    """A constraint or trigger that refuses rows undoes the plan; the code is shown, no value."""
    _make(database, "events")
    _raise(database, state, state, state)

    text = _fails(opened(), error=error)

    assert f"({state})" in text
    assert "rolled back" in text
    assert _owners(database, "events") == [None]
    assert database.run("SELECT last_value FROM tries") == [(1,)]


def test_a_dba_sees_who_it_is(database: Database, opened: Opened) -> None:
    """`pg_stat_activity` names the application, and its statement the table and the stage."""
    _make(database, "events")
    named = opened(f"{database.url}?application_name=shop")
    plain = opened()
    for sink in (named, plain):
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    names = database.run(
        "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() ORDER BY 1"
    )

    assert names == [("recognition",), ("shop",)]


# Connections that go ----------------------------------------------------------------------------


def _end_sessions(database: Database) -> int:
    """End every session of the database but this one, and wait until they are gone."""
    ended = database.run(
        "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return len(ended)


def test_a_pooled_connection_that_died_is_replaced(database: Database, opened: Opened) -> None:
    """Neither `apply` nor `compile` notices that the server ended an idle session."""
    _make(database, "events")
    sink = opened()
    plan = plan_updates([update(1, {"user_id": "u1"}, device("a1"))])
    text = sink.compile(plan.steps[0])

    first = _end_sessions(database)
    compiled = sink.compile(plan.steps[0])
    second = _end_sessions(database)
    applied = sink.apply(plan)

    assert (first, second) == (1, 1)
    assert compiled == text
    assert applied.rows_changed == 1


def test_a_server_that_starts_again_is_waited_for(
    odd_postgres: GivenServer, opened: Opened
) -> None:
    """A restart within the timeout is bridged: the plan is applied when the server is back."""
    assert isinstance(odd_postgres, Server)
    with odd_postgres.database() as name:
        database = Database(odd_postgres, name)
        _make(database, "events")
        sink = opened(database.url)
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))
        odd_postgres.kill()
        results: list[Applied] = []
        thread = threading.Thread(
            target=lambda: results.append(apply(sink, update(2, {"user_id": "u2"}, device("a1"))))
        )
        thread.start()

        odd_postgres.restart()
        thread.join()
        sink.close()

        assert [each.rows_changed for each in results] == [1]
        assert _owners(database, "events") == ["u2"]


@pytest.mark.parametrize("committed", [False, True])
def test_a_connection_that_breaks_at_the_commit(
    database: Database, committed: bool, opened: Opened
) -> None:
    """Whether it was written is not known, and said so; applying again leaves the right rows."""
    _make(database, "events")
    window = update(1, {"user_id": "u1"}, device("a1"))
    with Proxy(database.server) as proxy:
        sink = opened(database.server.url(database.name, port=proxy.port, sslmode="disable"))
        apply(sink, update(0, {"user_id": "u0"}, device("a1")))
        proxy.cut_at(b"COMMIT\0", answered=committed)

        with pytest.raises(OutcomeUnknownError) as caught:
            apply(sink, window)

        _await_quiet(database)
        between_them = _owners(database, "events")
        again = apply(sink, window)
        sink.close()

    assert (caught.value.written, caught.value.retryable) == (None, True)
    assert between_them == ["u1" if committed else "u0"]
    assert again.rows_changed == (0 if committed else 1)
    assert _owners(database, "events") == ["u1"]


def _await_quiet(database: Database) -> None:
    """Until every session of a client that is gone has ended."""
    deadline = time.monotonic() + 30
    while database.run(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid()"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_connection_that_breaks_before_the_commit_is_healed(
    database: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written then, so that the sink tries again itself."""
    monkeypatch.setattr(PostgresqlSink, "inline_rows", 0)
    _make(database, "events")
    with Proxy(database.server) as proxy:
        sink = opened(database.server.url(database.name, port=proxy.port, sslmode="disable"))
        applied = []
        for sequence, text in enumerate([b"COPY", b"ANALYZE", b"UPDATE events", b"DROP TABLE"]):
            proxy.cut_at(text, answered=sequence % 2 == 0)
            applied.append(apply(sink, update(sequence, {"user_id": f"u{sequence}"}, device("a1"))))
        sink.close()

    assert [each.rows_changed for each in applied] == [1, 1, 1, 1]
    assert proxy.cuts == 4
    assert _owners(database, "events") == ["u3"]


def test_a_stage_is_not_gone_through_for_each_row(database: Database, opened: Opened) -> None:
    """
    The planner expects one row of a table without statistics, or of times younger than they are.

    It went through the whole stage for each row that was there: 9 s for 500 updates, 90,000 rows.
    """
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(2_000)])
    sink = opened()
    with _explained(sink, "enable_hashjoin = off", "enable_mergejoin = off") as plans:
        apply(
            sink,
            *(
                update(n, {"user_id": "u"}, device(f"a{n}"), unknown(), between(0, 9_999))
                for n in range(500)
            ),
        )
    loops = [node["Plans"] for node in plans if node["Node Type"] == "Nested Loop"]
    assert [inner["Node Type"] for _, inner in loops] == ["Index Scan"]


def test_a_value_of_all_rows_gets_no_index(database: Database, opened: Opened) -> None:
    """A hash index goes through all rows of one value for each of them: 200,000 took 17 s."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    sent: list[str] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def note(_: Any, __: Any, text: str, *rest: Any) -> None:
        if text.startswith("CREATE INDEX ON"):
            sent.append(text.rpartition(" ")[2])

    refs = tuple((f"m{n}", at(n)) for n in range(10_001))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)

    applied = apply(sink, update(1, {"user_id": "u"}, device("a1"), named))

    assert applied.rows_changed == 1
    assert sent == ["(equal_1)"]


def test_notes_that_are_there_are_not_looked_for(database: Database, opened: Opened) -> None:
    """For each staged row the planner, or MariaDB, looked through all: minutes for a window."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(200)])
    sink = opened()

    def tell(*sequences: int) -> None:
        apply(
            sink,
            *(
                update(
                    sequence,
                    {"user_id": "u"},
                    device(f"a{n}"),
                    Equals(column="message_id", value=f"m{n}"),
                )
                for n, sequence in enumerate(sequences)
            ),
        )

    tell(*range(200))
    with _explained(sink, begins="INSERT INTO recognition_ledger") as plans:
        tell(*range(100), *range(2_100, 2_200))  # the half of it

    assert [
        node["Alias"] for node in plans if "Alias" in node and "stage" not in node["Alias"]
    ] == ["recognition_ledger"]
    assert database.run("SELECT count(*) FROM recognition_ledger") == [(300,)]
