"""The sink of MariaDB and MySQL on a real MariaDB: the kit, and what is particular to it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa

from mariadb import GivenServer, MissingMariadbError, Server
from recognition.cli import main
from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.messages import Between, Empty, Equals, Messages
from recognition.planner import plan_updates
from recognition.sinks import open_sink
from recognition.sinks.mysql import _CODECS, MysqlSink, _Column, _measure
from recognition.testing import SinkTests
from recognition.testing.sinks import HOSTILE_VALUES, at, between, device, row, update
from sinks import Rows, ServerKit, apply, opening, refusal

TYPES = {
    "text": "LONGTEXT",
    "time": "DATETIME(6)",
    "integer": "BIGINT",
    "float": "DOUBLE",
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
        found: list[tuple[Any, ...]] = self.server.run(statement, *parameters, database=self.name)
        return found

    def write(self, table: str, rows: Rows, *, types: Mapping[str, str] = TYPES) -> None:
        """Rows of the kit, into a table that is made when it is not there."""
        declared = ", ".join(
            f"`{name}` {'VARCHAR(255) PRIMARY KEY' if name == 'message_id' else types[kind]}"
            for name, kind in SinkTests.columns.items()
        )
        names = [*SinkTests.columns]
        lines = [[_plain(each.get(name)) for name in names] for each in rows]
        marks = ", ".join(["%s"] * len(names))
        with self.server.connect(self.name) as connection, connection.cursor() as cursor:
            cursor.execute(
                f"CREATE TABLE IF NOT EXISTS `{table}` ({declared}) CHARACTER SET utf8mb4"
            )
            cursor.executemany(f"INSERT INTO `{table}` VALUES ({marks})", lines)

    def read(self, table: str) -> list[dict[str, object]]:
        """All rows."""
        columns = ", ".join(f"`{name}`" for name in SinkTests.columns)
        found = self.run(f"SELECT {columns} FROM `{table}`")
        return [dict(zip(SinkTests.columns, line, strict=True)) for line in found]

    def column(self, column: str, table: str = "events") -> dict[object, object]:
        """One column by message id."""
        return dict(self.run(f"SELECT message_id, `{column}` FROM `{table}`"))


def _plain(value: object) -> object:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) else value


@pytest.fixture
def database(mariadb: GivenServer) -> Iterator[Database]:
    """An empty database, whose default character set is the one of an old server."""
    with mariadb.database("CHARACTER SET latin1") as name:
        yield Database(mariadb, name)


Opened = Callable[..., MysqlSink]


@pytest.fixture
def opened(database: Database) -> Iterator[Opened]:
    """Open sinks that are closed at the end."""
    with opening(MysqlSink, database.url) as open_it:
        yield open_it


# The kit ----------------------------------------------------------------------------------------


class TestMariadb(ServerKit):
    """The kit on MariaDB."""


@pytest.fixture(scope="module")
def odd_mariadb(mariadb: GivenServer) -> Iterator[GivenServer]:
    """A server whose every default is another than usual."""
    try:
        server = Server(
            "--sql-mode=ANSI_QUOTES,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,PAD_CHAR_TO_FULL_LENGTH",
            "--default-time-zone=+05:30",
            "--transaction-isolation=SERIALIZABLE",
            "--character-set-server=latin1",
            "--lower-case-table-names=1",
            "--max-allowed-packet=1M",
            "--autocommit=0",
        )
    except MissingMariadbError as error:  # there is the given server alone
        pytest.skip(str(error))
    with server:
        yield server


class TestOddMariadb(TestMariadb):
    """The kit on a server with other defaults, on columns that blur, and always with a stage."""

    @pytest.fixture(autouse=True)
    def staged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MysqlSink, "inline_rows", 0)

    @pytest.fixture
    def database(self, odd_mariadb: GivenServer) -> Iterator[Database]:
        with odd_mariadb.database("CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci") as name:
            yield Database(odd_mariadb, name)


# What is compared and written -------------------------------------------------------------------

BLURRED = ["A1", "a1", "A1 ", "a1 ", "\u00c11"]


@pytest.mark.parametrize(
    "collation",
    ["latin1_swedish_ci", "utf8mb4_general_ci", "utf8mb4_bin", "utf8mb3_unicode_ci", "ucs2_bin"],
)
def test_a_collation_does_not_blur(database: Database, opened: Opened, collation: str) -> None:
    """Keys and values that a collation takes for equal are told apart, byte by byte."""
    charset = collation.partition("_")[0]
    database.run(
        f"CREATE TABLE events (message_id VARCHAR(9), anonymous_id VARCHAR(9), user_id VARCHAR(9),"
        f" KEY (anonymous_id)) CHARACTER SET {charset} COLLATE {collation}"
    )
    for n, key in enumerate(BLURRED):
        database.run("INSERT INTO events VALUES (%s, %s, 'U')", f"m{n}", key)

    applied = apply(
        opened(),
        update(1, {"user_id": "u"}, device("A1")),
        update(2, {"user_id": "U "}, device("a1 ")),
        update(3, {"user_id": "U"}, device("\u00c11")),
    )

    assert database.column("user_id") == {"m0": "u", "m1": "U", "m2": "U", "m3": "U ", "m4": "U"}
    assert (applied.rows_matched, applied.rows_changed) == (3, 2)


@contextmanager
def _explained(sink: MysqlSink, how: str = "EXPLAIN") -> Iterator[list[dict[str, Any]]]:
    """How the server would carry out the UPDATEs that the sink sends, by the server's own word."""
    found: list[dict[str, Any]] = []

    def explain(_: Any, cursor: Any, text: str, parameters: Any, *rest: Any) -> None:
        if text.startswith("UPDATE"):
            with cursor.connection.cursor(pymysql.cursors.DictCursor) as another:
                another.execute(f"{how} {text}", parameters)
                found.extend(another.fetchall())

    sa.event.listen(sink._engine, "before_cursor_execute", explain)
    yield found
    sa.event.remove(sink._engine, "before_cursor_execute", explain)


def _fill(database: Database, declared: str, more: str = "") -> list[Any]:
    """A table of 500 devices with eight rows each, whose ids are of the type; gives these."""
    database.run(
        f"CREATE TABLE events (anonymous_id {declared}, user_id TEXT, timestamp DATETIME(6){more})"
    )
    keys: list[Any] = [f"00000000-0000-0000-0000-{n:012}" for n in range(500)]
    keys = [*range(500)] if declared == "BIGINT" else keys
    with database.server.connect(database.name) as connection, connection.cursor() as cursor:
        rows = [(keys[n % 500], _plain(at(n))) for n in range(4_000)]
        cursor.executemany("INSERT INTO events VALUES (%s, NULL, %s)", rows)
    return keys


@pytest.mark.parametrize(
    "declared",
    [
        "VARCHAR(64) CHARACTER SET latin1",
        "TINYTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin",
        "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
        "CHAR(36) CHARACTER SET ascii",
        "BIGINT",
        "UUID",
    ],
)
def test_a_stage_is_not_gone_through_for_each_row(
    database: Database, opened: Opened, declared: str
) -> None:
    """Without an index on the device: 500 updates of 30,000 rows took 13 s."""
    keys = _fill(database, declared)
    sink = opened()

    with _explained(sink) as found:
        applied = apply(
            sink,
            *(
                update(
                    n, {"user_id": "u"}, Equals(column="anonymous_id", value=key), between(0, 9e9)
                )
                for n, key in enumerate(keys[:200])
            ),
        )

    assert applied.rows_changed == 200 * 8
    assert [(each["table"], each["key"]) for each in found] == [
        ("events", None),
        (found[1]["table"], "equal_0"),
    ]


@pytest.mark.parametrize(
    "declared",
    [
        "VARCHAR(64) CHARACTER SET latin1",
        "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
        "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin",
        "CHAR(36) CHARACTER SET ascii",
        "BIGINT",
        "UUID",
    ],
)
@pytest.mark.parametrize("staged", [False, True])
def test_rows_are_found_by_the_index_of_the_key(
    database: Database, opened: Opened, declared: str, staged: bool
) -> None:
    """Each staged row looks its rows up by the index, whatever the key's type and collation."""
    keys = _fill(database, declared, ", KEY by_device (anonymous_id)")
    sink = opened()
    if staged:
        sink.inline_rows = 0

    with _explained(sink) as found:
        applied = apply(
            sink,
            *(
                update(
                    n, {"user_id": "u"}, Equals(column="anonymous_id", value=key), between(0, 9e9)
                )
                for n, key in enumerate(keys[:30])
            ),
        )

    stage, target = found
    assert applied.rows_changed == 30 * 8
    # Of the rows inside a statement MariaDB knows no number, and takes 40; UUIDs are staged.
    counted = staged or declared == "UUID"
    assert (stage["type"], stage["rows"]) == ("ALL", "30" if counted else "40")
    assert stage["table"].startswith("recognition_stage_")
    assert (target["table"], target["type"], target["key"]) == ("events", "ref", "by_device")


@pytest.mark.parametrize(
    ("declared", "by"),
    [
        ("DATETIME(6) NOT NULL", "RANGE COLUMNS (timestamp) ({})"),
        ("DATETIME NOT NULL", "RANGE (TO_DAYS(timestamp)) ({})"),
        ("TIMESTAMP NOT NULL", "RANGE (UNIX_TIMESTAMP(timestamp)) ({})"),
        ("DATE NOT NULL", "RANGE COLUMNS (timestamp) ({})"),
    ],
)
def test_constant_bounds_prune_partitions(
    database: Database, opened: Opened, declared: str, by: str
) -> None:
    """The server looks into the partitions of the window's times alone."""
    function = re.search(r"\w+(?=\(timestamp\))", by)
    parts = ", ".join(
        f"PARTITION p{day} VALUES LESS THAN "
        + (f"({function[0]}('2026-01-{day:02}'))" if function else f"('2026-01-{day:02}')")
        for day in range(1, 9)
    )
    database.run(
        f"CREATE TABLE events (anonymous_id VARCHAR(64), user_id TEXT, timestamp {declared},"
        f" KEY (anonymous_id)) PARTITION BY {by.format(parts)}"
    )
    start, end = (datetime(2026, 1, day, tzinfo=UTC) for day in (3, 5))
    for day in range(1, 8):
        database.run("INSERT INTO events VALUES ('a1', NULL, %s)", f"2026-01-0{day}")
    sink = opened()

    with _explained(sink, "EXPLAIN PARTITIONS") as found:
        window = Between(column="timestamp", start=start, end=end)
        applied = apply(sink, update(1, {"user_id": "u"}, device("a1"), window))

    assert applied.rows_changed == 2
    assert [each["partitions"] for each in found if each["table"] == "events"] == ["p4,p5"]


@pytest.mark.parametrize(
    ("declared", "stored"),
    [
        ("DATETIME", "2026-01-01 12:00:01"),  # as MariaDB cuts it
        ("DATETIME", "2026-01-01 12:00:02"),  # as MySQL rounds it
        ("DATE", "2026-01-01"),
    ],
)
def test_messages_are_found_whatever_is_kept_of_their_times(
    database: Database, opened: Opened, declared: str, stored: str
) -> None:
    """The bounds of a statement leave room for what a column does to a time."""
    database.write("events", [row("m1", "a1", 1)], types={**TYPES, "time": declared})
    database.run("UPDATE events SET timestamp = %s", stored)
    refs = (("m1", at(1.99996)),)
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)

    applied = apply(opened(), update(1, {"user_id": "u"}, named))

    assert applied.rows_changed == 1


@pytest.mark.parametrize(
    "declared", ["DATETIME", "DATETIME(3)", "DATETIME(6)", "TIMESTAMP", "TIMESTAMP(6)", "DATE"]
)
def test_times_are_compared_as_what_they_are(
    odd_mariadb: GivenServer, opened: Opened, declared: str
) -> None:
    """A DATETIME is UTC and a TIMESTAMP a moment, in whatever time zone the server is."""
    times = ["2026-01-01 23:59:59", "2026-01-02 00:00:00", "2026-01-03 00:00:00"]
    inside = {"2026-01-02 00:00:00"}
    if declared.endswith("(6)"):
        times.append("2026-01-02 23:59:59.999999")
        inside.add("2026-01-02 23:59:59.999999")
    with odd_mariadb.database() as name:
        database = Database(odd_mariadb, name)
        database.run(
            "CREATE TABLE events (message_id VARCHAR(64), anonymous_id VARCHAR(64),"
            f" user_id VARCHAR(64), timestamp {declared} NULL)"
        )
        for time in [*times, "0000-00-00 00:00:00", None]:
            database.run("INSERT INTO events VALUES (%s, 'a1', NULL, %s)", str(time), time)
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

        apply(
            opened(database.url),
            update(1, {"user_id": "ever"}, device("a1"), ever),
            update(2, {"user_id": "inside"}, device("a1"), day),
        )

        found = database.column("user_id")
    assert {name for name, value in found.items() if value == "inside"} == inside
    assert {name for name, value in found.items() if value is None} == {
        "0000-00-00 00:00:00",
        "None",
    }


def test_backslash_and_percent_arrive(database: Database, opened: Opened) -> None:
    """What the driver escapes comes back unchanged: as key, as value, in the ledger."""
    values = [*HOSTILE_VALUES, "\\", "%", "%s", "%%", "\x1a", "\U0001f9ea" * 300]
    database.write("events", [row(f"m{n}", v, n) for n, v in enumerate(values)])
    sink = opened()
    later = [update(n, {"user_id": v}, device(v)) for n, v in enumerate(values, start=100)]
    apply(sink, *later)

    applied = apply(sink, *(update(n, {"user_id": "x"}, device(v)) for n, v in enumerate(values)))

    assert applied.rows_changed == 0
    assert database.column("user_id") == {f"m{n}": v for n, v in enumerate(values)}


def test_percent_in_names(mariadb: GivenServer, opened: Opened) -> None:
    """A database, and a column that is not spoken of, may have a percent sign in its name."""
    name = "recognition_test_100%d`s"
    mariadb.run("CREATE DATABASE `recognition_test_100%%d``s`")
    try:
        database = Database(mariadb, name)
        database.run("CREATE TABLE events (`50%%s` INT, anonymous_id TEXT, user_id TEXT)")
        database.run("INSERT INTO events VALUES (1, 'a1', NULL)")

        applied = apply(
            opened(database.url), update(1, {"user_id": "u"}, device("a1"), table="events")
        )

        assert (applied.rejected, applied.rows_changed) == ((), 1)
    finally:
        mariadb.run("DROP DATABASE `recognition_test_100%%d``s`")


# What a column holds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INT", "some text"),
        ("INT", 2**31),
        ("INT", 1.5),
        ("INT", True),
        ("TINYINT UNSIGNED", -1),
        ("TINYINT UNSIGNED", 256),
        ("BIGINT UNSIGNED", 2**64),
        ("TINYINT(1)", 128),
        ("BIT(1)", 2),
        ("DECIMAL(4,2)", 100),
        ("DECIMAL(4,2) UNSIGNED", -1),
        ("FLOAT", 1e39),
        ("DOUBLE", True),
        ("VARCHAR(3)", "\U0001f9ea" * 4),
        ("TINYTEXT", "\u00e9" * 128),
        ("CHAR(30)", "with a space at the end "),
        ("VARCHAR(9) CHARACTER SET latin1", "\u0394"),
        ("VARCHAR(9) CHARACTER SET utf8mb3", "\U0001f9ea"),
        ("VARCHAR(9) CHARACTER SET sjis", "\u00e9"),
        ("DATETIME", "2026-01-01T00:00:00.5Z"),
        ("DATETIME(3)", "2026-01-01T00:00:00.0005Z"),
        ("DATETIME(6)", "soon"),
        ("TIMESTAMP NULL", "2040-01-01T00:00:00Z"),
        ("DATE", "2026-01-01T12:00:00Z"),
        ("ENUM('a', 'b')", "a"),
        ("SET('a', 'b')", "a"),
        ("JSON", "{}"),
        ("BLOB", "a"),
        ("VARBINARY(16)", "a"),
        ("YEAR", 2026),
        ("TIME", "12:00:00"),
        ("INET6", "::1"),
        ("UUID", "x"),
        ("INT NOT NULL DEFAULT 0", None),
        ("TEXT AS (upper(anonymous_id))", "u"),
        ("INT AS (1) STORED", 1),
    ],
)
def test_what_a_column_cannot_hold_is_refused(
    database: Database, opened: Opened, declared: str, value: Any
) -> None:
    """A value that the column would refuse, cut or change refuses its update; the rest goes on."""
    database.run(
        f"CREATE TABLE events (anonymous_id VARCHAR(9), x {declared}, y TEXT) CHARACTER SET utf8mb4"
    )
    database.run("INSERT INTO events (anonymous_id) VALUES ('a1'), ('a2')")
    (before,) = database.run("SELECT x FROM events WHERE anonymous_id = 'a1'")

    applied = apply(
        opened(), update(1, {"x": value}, device("a1")), update(2, {"y": "y"}, device("a2"))
    )

    text = refusal(applied)
    assert "column 'x'" in text
    assert not isinstance(value, str) or len(value) < 9 or value not in text
    assert database.run("SELECT x FROM events WHERE anonymous_id = 'a1'") == [before]
    assert database.run("SELECT y FROM events WHERE anonymous_id = 'a2'") == [("y",)]


@pytest.mark.parametrize(
    ("declared", "value", "expected"),
    [
        ("INT", 7.0, "7"),
        ("INT UNSIGNED", 2**32 - 1, "4294967295"),
        ("BIGINT UNSIGNED", 2**64 - 1, "18446744073709551615"),
        ("BOOLEAN", True, "1"),
        ("TINYINT(1)", -5, "-5"),
        ("BIT(1)", True, "1"),
        ("DECIMAL(4,2)", 99.5, "99.50"),
        ("DOUBLE", 0.1, "0.1"),
        ("DOUBLE", 1.7976931348623157e308, "1.7976931348623157e308"),
        ("FLOAT", 0.25, "0.25"),
        ("VARCHAR(3)", "\U0001f9ea" * 3, "\U0001f9ea" * 3),
        ("TINYTEXT", "\u00e9" * 127, "\u00e9" * 127),
        ("VARCHAR(9) CHARACTER SET latin1", "\u20ac\u00e9", "\u20ac\u00e9"),
        ("VARCHAR(9) CHARACTER SET utf16", "\U0001f9ea", "\U0001f9ea"),
        ("VARCHAR(9) CHARACTER SET sjis", "ascii", "ascii"),
        ("TEXT", 7, "7"),
        ("DATETIME", "2026-01-01T01:00:00+02:00", "2025-12-31 23:00:00"),
        ("DATETIME(3)", "2026-01-01T00:00:00.5Z", "2026-01-01 00:00:00.500"),
        ("TIMESTAMP(6) NULL", "2026-01-01T00:00:00.5Z", "2026-01-01 00:00:00.500000"),
        ("DATE", "2026-01-01", "2026-01-01"),
        ("UUID", "00000000-0000-0000-0000-000000000007", "00000000-0000-0000-0000-000000000007"),
        ("VARCHAR(9) NOT NULL DEFAULT ''", None, ""),
    ],
)
def test_what_a_column_holds_is_written(
    database: Database, opened: Opened, declared: str, value: Any, expected: str
) -> None:
    """A value that the column keeps as it is passes, and is not written a second time."""
    database.run(
        f"CREATE TABLE events (anonymous_id VARCHAR(9), x {declared}) CHARACTER SET utf8mb4"
    )
    before = "x" if "NOT NULL" in declared else None
    database.run("INSERT INTO events VALUES ('a1', %s)", before)
    sink = opened()

    first = apply(sink, update(1, {"x": value}, device("a1")))
    again = apply(sink, update(1, {"x": value}, device("a1")))

    shown = "x + 0" if declared.startswith("BIT") else "x"
    assert first.rejected == ()
    assert (first.rows_changed, again.rows_changed, again.rows_matched) == (1, 0, 1)
    assert database.run(f"SELECT CAST({shown} AS CHAR) FROM events") == [(expected,)]


@pytest.mark.parametrize("charset", _CODECS)
def test_what_fits_a_character_set_is_held(database: Database, charset: str) -> None:
    """The server takes, and gives back, each character of a set that the sink would send."""
    wide = [chr(n) for n in [*range(1, 0x800), *range(0x2000, 0x2200), 0xFFFD, 0x1F9EA]]
    column = _Column(name="x", declared="", kind="text", charset=charset)
    fitting = [character for character in wide if _measure(column, character) is not None]
    database.run(f"CREATE TABLE held (n INT, x VARCHAR(1) CHARACTER SET {charset})")
    with database.server.connect(database.name) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO held VALUES (%s, %s)", list(enumerate(fitting)))

    found = dict(database.run("SELECT n, x FROM held"))

    assert len(fitting) > 127
    assert found == dict(enumerate(fitting))


@pytest.mark.parametrize(
    ("declared", "keys"),
    [
        ("TINYINT(1)", [0, 1, 7]),
        ("BIGINT UNSIGNED", [2**64 - 1, 0]),
        ("DECIMAL(4,2)", [0.25, 1]),
        ("FLOAT", [0.25, 1]),
        ("UUID", ["00000000-0000-0000-0000-000000000007"]),
        ("DATETIME", ["2026-01-01T00:00:00Z"]),
    ],
)
def test_keys_may_be_of_any_type(
    database: Database, opened: Opened, declared: str, keys: list[Any]
) -> None:
    """Rows are found, and the ledger knows them, by a key that is no text."""
    database.run(f"CREATE TABLE events (anonymous_id {declared}, user_id TEXT)")
    for key in keys:
        stored = key.replace("T", " ").rstrip("Z") if isinstance(key, str) else key
        database.run("INSERT INTO events VALUES (%s, NULL)", stored)
    sink = opened()
    found = [Equals(column="anonymous_id", value=key) for key in keys]

    first = apply(sink, *(update(9, {"user_id": "u"}, key) for key in found))
    late = apply(sink, *(update(1, {"user_id": "late"}, key) for key in found[:1]))

    assert (first.rejected, late.rejected) == ((), ())
    assert late.rows_changed == 0
    assert database.run("SELECT count(*) FROM events WHERE user_id = 'u'") == [(1,)]


def test_many_wide_columns_are_staged(database: Database, opened: Opened) -> None:
    """A stage has room for as many texts as the target has, and for a second time its key."""
    names = [f"t{n}" for n in range(60)]
    columns = ", ".join(f"{name} VARCHAR(255)" for name in names)
    database.run(
        f"CREATE TABLE events (anonymous_id VARCHAR(255), {columns}) CHARACTER SET utf8mb4"
    )
    database.run("INSERT INTO events (anonymous_id) VALUES ('a1')")

    sink = opened()
    sink.inline_rows = 0

    applied = apply(sink, update(1, dict.fromkeys(names, "\U0001f9ea" * 255), device("a1")))

    assert (applied.rejected, applied.rows_changed) == ((), 1)
    assert database.run("SELECT count(*) FROM events WHERE t0 = t59") == [(1,)]


def test_a_window_larger_than_the_packet_is_staged_in_pages(
    odd_mariadb: GivenServer, opened: Opened
) -> None:
    """No statement exceeds what the server takes at once; each is counted."""
    with odd_mariadb.database("CHARACTER SET utf8mb4") as name:
        database = Database(odd_mariadb, name)
        database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(100)])
        sink = opened(database.url)
        lengths: list[int] = []
        texts: list[str] = []

        @sa.event.listens_for(sink._engine, "before_cursor_execute")
        def note(_: Any, cursor: Any, text: str, parameters: Any, *rest: Any) -> None:
            lengths.append(len(cursor.mogrify(text, parameters).encode()))
            texts.append(text)

        window = [
            update(n, {"user_id": f"{n}'" * 10_000}, device(f"a{n}"), versioned=True)
            for n in range(100)
        ]
        applied = apply(sink, *window)

        lasting = database.column("user_id")
    assert max(lengths) < 1_000_000 < sum(lengths)
    assert applied.statements == len([text for text in texts if "information_schema" not in text])
    assert lasting == {f"m{n}": f"{n}'" * 10_000 for n in range(100)}


# Names, and what is there -----------------------------------------------------------------------


def test_names_that_differ_in_case_are_told_apart(database: Database, opened: Opened) -> None:
    """The table that is spelled so is meant, else the only one in another case, else none."""
    for name in ("Events", "events", "Pages"):
        database.write(name, [row("m1", "a1", 1)])
    sink = opened()
    names = ("events", "Events", "pages", "EVENTS")

    applied = apply(
        sink, *(update(1, {"user_id": f"by {n}"}, device("a1"), table=n) for n in names)
    )

    found = {name: database.column("user_id", name)["m1"] for name in ("Events", "events", "Pages")}
    assert found == {"Events": "by Events", "events": "by events", "Pages": "by pages"}
    assert "'Events' and 'events'" in refusal(applied)


def test_the_database_may_be_named(
    mariadb: GivenServer, database: Database, opened: Opened
) -> None:
    """A table of another database is another one for the ledger, one of the own is the same."""
    with mariadb.database() as other:
        elsewhere = Database(mariadb, other)
        for each in (database, elsewhere):
            each.write("events", [row("m1", "a1", 1)])
        sink = opened()
        apply(sink, update(2, {"user_id": "B"}, device("a1"), table=f"{database.name}.events"))

        apply(sink, update(1, {"user_id": "A"}, device("a1"), table="events"))
        apply(sink, update(1, {"user_id": "A"}, device("a1"), table=f"{other}.events"))

        assert database.column("user_id") == {"m1": "B"}
        assert elsewhere.column("user_id") == {"m1": "A"}


def test_a_view_is_refused(database: Database, opened: Opened) -> None:
    """Nothing is set through a view."""
    database.write("events", [row("m1", "a1", 1)])
    database.run("CREATE VIEW seen AS SELECT * FROM events")

    text = refusal(apply(opened(), update(1, {"user_id": "u"}, device("a1"), table="seen")))

    assert "'seen' is a view" in text


@pytest.mark.parametrize("engine", ["MyISAM", "Aria"])
def test_a_table_without_transactions_is_refused(
    database: Database, opened: Opened, engine: str
) -> None:
    """What is written there cannot be undone with the plan, and stays when the ledger does not."""
    for table in ("events", "pages"):
        database.write(table, [row("m1", "a1", 1)])
    database.run(f"ALTER TABLE events DROP PRIMARY KEY, ENGINE = {engine}")  # too long for one

    applied = apply(
        opened(),
        update(1, {"user_id": "u"}, device("a1")),
        update(2, {"user_id": "u"}, device("a1"), table="pages"),
    )

    assert engine in refusal(applied)
    assert "ENGINE=InnoDB" in refusal(applied)
    assert database.column("user_id") == {"m1": None}
    assert database.column("user_id", "pages") == {"m1": "u"}


def test_a_text_is_no_time(database: Database, opened: Opened) -> None:
    """A time column of text or numbers is refused, with what it has to be."""
    database.run("CREATE TABLE events (anonymous_id TEXT, user_id TEXT, timestamp VARCHAR(30))")

    text = refusal(apply(opened(), update(1, {"user_id": "u"}, device("a1"), between(0, 1))))

    assert "varchar(30)" in text
    assert "DATETIME" in text


def test_empty_is_blank_where_it_may_not_be_null(database: Database, opened: Opened) -> None:
    """In a NOT NULL column of text, as jitsu makes them, '' is empty; NULL is elsewhere."""
    database.run(
        "CREATE TABLE events (message_id VARCHAR(9), anonymous_id VARCHAR(9),"
        " user_id VARCHAR(9) NOT NULL DEFAULT '', plan VARCHAR(9)) COLLATE utf8mb4_general_ci"
    )
    database.run(
        "INSERT INTO events VALUES"
        " ('m1', 'a1', '', ''), ('m2', 'a1', 'known', NULL), ('m3', 'a1', '  ', NULL)"
    )
    sink = opened()

    apply(
        sink,
        update(1, {"user_id": "u1"}, device("a1"), Empty(column="user_id")),
        update(2, {"plan": "pro"}, device("a1"), Empty(column="plan")),
    )
    filled = database.column("user_id")
    emptied = apply(sink, update(3, {"user_id": None}, device("a1")))

    assert database.column("plan") == {"m1": "", "m2": "pro", "m3": "pro"}
    assert filled == {"m1": "u1", "m2": "known", "m3": "  "}  # equal to '' by the collation
    assert database.column("user_id") == {"m1": "", "m2": "", "m3": ""}
    assert emptied.rows_changed == 3


# When the server fails --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "mysql://host",
        "mysql+pymysql://u:hunter2@host",
        "mysql+mysqldb://u:hunter2@host/db",
        "mysql+pymysql://u:hunter2@host:port/db",
    ],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    """A URL without a database, or for another driver, shows what is needed, and no password."""
    with pytest.raises(ConfigurationError, match="mysql\\+pymysql://user") as caught:
        open_sink(url)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["mysql", "mysql+pymysql", "mariadb", "mariadb+pymysql"])
def test_each_scheme_opens_the_same(database: Database, opened: Opened, scheme: str) -> None:
    """Four schemes open PyMySQL, whichever of the two the server is."""
    database.write("events", [row("m1", "a1", 1)])
    url = database.server.url(database.name, scheme=scheme)

    applied = apply(opened(url), update(1, {"user_id": "u"}, device("a1")))

    assert applied.rows_changed == 1


WHOLE = "SELECT, UPDATE, INSERT, DELETE, CREATE, CREATE TEMPORARY TABLES"


def test_grants_are_named_one_by_one(
    mariadb: GivenServer, database: Database, opened: Opened
) -> None:
    """Whoever runs the GRANT of each error comes to an end, with the least that is needed."""
    database.write("events", [row("m1", "a1", 1)])
    granted: list[str] = []
    with mariadb.new_user() as (user, password):
        url = mariadb.url(database.name, user=user, password=password)
        for _ in range(7):
            with pytest.raises(SinkError, match="may not do this") as caught:
                apply(opened(url), update(1, {"user_id": "u"}, device("a1")))

            grant = re.fullmatch(r".*; run: (GRANT (.*) ON `(.*?)`\..* TO .*)", str(caught.value))
            assert grant is not None
            assert (caught.value.written, caught.value.retryable) == (False, False)
            assert grant[3] == database.name
            granted.append(grant[2])
            # The first names all that is needed at once. Here as little of it as can be is given.
            least = grant[1].replace(WHOLE, "CREATE TEMPORARY TABLES")
            mariadb.run(least.replace("%", "%%"))
        applied = apply(opened(url), update(1, {"user_id": "u"}, device("a1")))

    assert applied.rows_changed == 1
    assert granted[0] == WHOLE
    assert sorted(granted[1:]) == ["CREATE", "DELETE", "INSERT", "SELECT", "SELECT", "UPDATE"]


def test_a_refused_login_is_named_so(
    mariadb: GivenServer, database: Database, opened: Opened
) -> None:
    """A wrong password is no outage, and is not shown."""
    with mariadb.new_user() as (user, _):
        url = mariadb.url(database.name, user=user, password="hunter2")

        with pytest.raises(SinkError, match="refused the login") as caught:
            apply(opened(url), update(1, {"user_id": "u"}, device("a1")))

    assert not isinstance(caught.value, SinkUnavailableError)
    assert (caught.value.written, caught.value.retryable) == (False, False)
    assert "hunter2" not in f"{caught.value} {caught.value!r} {caught.value.__cause__}"


def test_a_missing_database_is_named_so(mariadb: GivenServer, opened: Opened) -> None:
    """A database that is not there is an error that says so; none is made."""
    with pytest.raises(SinkError, match="no database of the URL's name") as caught:
        apply(opened(mariadb.url("not_there")), update(1, {"user_id": "u"}, device("a1")))

    assert (caught.value.written, caught.value.retryable) == (False, False)


def test_a_server_that_is_not_there_may_come_back(opened: Opened) -> None:
    """Nobody listens: nothing was written, a retry may help."""
    sink = opened("mysql://u:hunter2@127.0.0.1:1/db", timeout=0)
    wanted = update(1, {"user_id": "u"}, device("a1"))

    with pytest.raises(SinkUnavailableError, match="cannot be reached") as caught:
        apply(sink, wanted)
    with pytest.raises(SinkUnavailableError):
        sink.compile(plan_updates([wanted]).steps[0])

    assert (caught.value.written, caught.value.retryable) == (False, True)
    assert "hunter2" not in f"{caught.value!r} {sink._engine!r}"


def test_a_read_only_server_is_named_so(
    mariadb: GivenServer, database: Database, opened: Opened
) -> None:
    """A replica may be read but not written."""
    database.write("events", [row("m1", "a1", 1)])
    with mariadb.new_user(f"ALL ON `{database.name}`.*") as (user, password):
        url = mariadb.url(database.name, user=user, password=password)
        mariadb.run("SET GLOBAL read_only = 1")
        try:
            with pytest.raises(SinkReadOnlyError) as caught:
                apply(opened(url), update(1, {"user_id": "u"}, device("a1")))
        finally:
            mariadb.run("SET GLOBAL read_only = 0")

    assert (caught.value.written, caught.value.retryable) == (False, False)


@contextmanager
def _holding(database: Database, *statements: str) -> Iterator[Any]:
    """A session of somebody else, in a transaction that has sent these statements."""
    with database.server.connect(database.name, autocommit=False) as other:
        with other.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
        yield other


def _await(database: Database, condition: str) -> None:
    """Until some transaction of the server meets the condition."""
    for _ in range(500):
        question = f"SELECT count(*) FROM information_schema.{condition}"
        if database.run(question) != [(0,)]:
            return
        # The server looks anew only when it was not asked for 0.1 seconds:
        # https://mariadb.com/kb/en/information-schema-innodb_trx-table/
        threading.Event().wait(0.12)
    raise AssertionError(f"nothing came to meet: {condition}")


# Of this database, and of a session that lives: what is shown may be 0.1 s old.
_WAITING = (
    "innodb_trx JOIN information_schema.processlist ON id = trx_mysql_thread_id"
    " WHERE trx_state = 'LOCK WAIT' AND db = DATABASE()"
)


def _in_thread(work: Callable[[], object]) -> Callable[[], Any]:
    """Begin the work; gives what waits for it, and returns or raises what it did."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> Any:
        thread.join(60)
        ((result, error),) = outcome
        if error is not None:
            raise error
        return result

    return join


def test_who_asks_is_seen(
    database: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Whoever looks at the list of processes sees whose statement it is.

    Where rows are staged, the UPDATE has no value in it.
    """
    monkeypatch.setattr(MysqlSink, "inline_rows", 0)
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=30)
    with _holding(database, "UPDATE events SET context_traits_age = 1") as other:
        join = _in_thread(lambda: apply(sink, update(1, {"user_id": "secret"}, device("a1"))))
        _await(database, _WAITING)
        shown = database.run(
            "SELECT info FROM information_schema.processlist"
            " WHERE info LIKE 'UPDATE%%' AND db = DATABASE()"
        )
        other.commit()

    assert join().rows_changed == 1
    assert len(shown) == 1
    assert shown[0][0].endswith(" /* recognition */")
    assert "secret" not in shown[0][0]


def test_a_lock_is_waited_for(database: Database, opened: Opened) -> None:
    """Rows that somebody else is writing are written when that is over."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=30)
    with _holding(database, "UPDATE events SET context_traits_age = 1") as other:
        join = _in_thread(lambda: apply(sink, update(1, {"user_id": "u"}, device("a1"))))
        _await(database, _WAITING)
        other.commit()

    assert join().rows_changed == 1
    assert database.run("SELECT user_id, context_traits_age FROM events") == [("u", 1)]


@pytest.mark.parametrize(
    "held",
    [
        ("UPDATE events SET context_traits_age = 1",),
        ("LOCK TABLES events WRITE",),
    ],
)
def test_a_lock_that_stays_is_an_error_that_may_be_retried(
    database: Database, opened: Opened, held: tuple[str, ...]
) -> None:
    """After the timeout rows or a table that are locked are unavailable; nothing was written."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=1)
    wanted = update(1, {"user_id": "u"}, device("a1"))
    with (
        _holding(database, *held),
        pytest.raises(SinkUnavailableError, match="more than 1 seconds") as caught,
    ):
        apply(sink, wanted)

    assert (caught.value.written, caught.value.retryable) == (False, True)
    assert database.column("user_id") == {"m1": None}
    assert apply(sink, wanted).rows_changed == 1


def test_one_sink_at_a_time_writes_to_a_table(database: Database, opened: Opened) -> None:
    """A second sink waits for the first, however it spells the table; another table is free."""
    for table in ("events", "pages"):
        database.write(table, [row("m1", "a1", 1), row("m2", "a2", 1)])
    first, second = opened(timeout=30), opened(timeout=0.5)
    blocked = _holding(database, "SELECT 1 FROM events WHERE message_id = 'm1' FOR UPDATE")
    with blocked as other:
        join = _in_thread(lambda: apply(first, update(1, {"user_id": "u"}, device("a1"))))
        _await(database, _WAITING)

        free = apply(second, update(1, {"user_id": "u"}, device("a2"), table="pages"))
        with pytest.raises(SinkUnavailableError, match="another sink") as caught:
            apply(
                second,
                update(2, {"user_id": "u"}, device("a2"), table=f"{database.name}.EVENTS"),
            )
        other.commit()

    assert free.rows_changed == join().rows_changed == 1
    assert (caught.value.written, caught.value.retryable) == (False, True)
    assert apply(second, update(2, {"user_id": "u"}, device("a2"))).rows_changed == 1


def test_locks_are_taken_in_one_order(database: Database, opened: Opened) -> None:
    """However the tables of two plans are spelled, nobody waits for somebody who waits for him."""
    for table in ("events", "pages"):
        database.write(table, [row("m1", "a1", 1)])
    taken: list[list[str]] = []
    for spelled in ([f"{database.name}.EVENTS", "pages"], ["events", f"{database.name}.pages"]):
        sink = opened()
        locks: list[str] = []

        @sa.event.listens_for(sink._engine, "before_cursor_execute")
        def note(_: Any, __: Any, text: str, given: Any, *rest: Any, to: Any = locks) -> None:
            if "GET_LOCK" in text:
                to.append(given[0])

        apply(
            sink,
            *(update(n, {"user_id": "u"}, device("a1"), table=t) for n, t in enumerate(spelled)),
        )
        taken.append(locks)

    assert len(set(taken[0])) == 2
    assert taken[0] == taken[1]


def test_a_deadlock_is_tried_again(database: Database, opened: Opened) -> None:
    """When the server ends this transaction for another one's sake, it is done once more."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(400)])
    database.run("ALTER TABLE events MODIFY anonymous_id VARCHAR(64), ADD INDEX (anonymous_id)")
    sink = opened(timeout=30)
    deadlocks: list[int] = []

    @sa.event.listens_for(sink._engine, "handle_error")
    def note(context: sa.engine.ExceptionContext) -> None:
        deadlocks.append(context.original_exception.args[0])

    # The server ends the one that has written less.
    mine = "UPDATE events SET context_traits_age = 1 WHERE anonymous_id NOT IN ('a1', 'a2')"
    with _holding(
        database, mine, "UPDATE events SET context_traits_age = 1 WHERE anonymous_id = 'a2'"
    ) as other:
        join = _in_thread(
            lambda: apply(
                sink,
                update(1, {"user_id": "u"}, device("a1")),
                update(2, {"user_id": "u"}, device("a2")),
            )
        )
        _await(database, _WAITING)
        with other.cursor() as cursor:
            cursor.execute("UPDATE events SET context_traits_age = 2 WHERE anonymous_id = 'a1'")
        other.commit()

    assert join().rows_changed == 2
    assert deadlocks == [1213]
    assert database.run("SELECT count(*) FROM events WHERE user_id = 'u'") == [(2,)]


def _kill_waiting(database: Database, what: str) -> None:
    ((thread,),) = database.run(f"SELECT trx_mysql_thread_id FROM information_schema.{_WAITING}")
    database.run(f"KILL {what} {thread}")


@pytest.mark.parametrize("what", ["QUERY", "CONNECTION"])
def test_a_killed_statement_is_tried_again(database: Database, opened: Opened, what: str) -> None:
    """A session that is killed while it waits has written nothing, and its plan is done anew."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=30)
    with _holding(database, "UPDATE events SET context_traits_age = 1") as other:
        join = _in_thread(lambda: apply(sink, update(1, {"user_id": "u"}, device("a1"))))
        _await(database, _WAITING)
        _kill_waiting(database, what)
        other.commit()

    assert join().rows_changed == 1
    assert database.column("user_id") == {"m1": "u"}


def test_a_connection_that_is_lost_at_the_commit_leaves_the_outcome_unknown(
    database: Database, opened: Opened
) -> None:
    """The error says that nobody knows; the same plan again ends it."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    wanted = update(1, {"user_id": "u"}, device("a1"))

    def kill(connection: sa.Connection) -> None:
        if killed:
            return
        thread = connection.connection.dbapi_connection.thread_id()  # type: ignore[union-attr]
        database.run(f"KILL CONNECTION {thread}")
        _await_gone(database, thread)
        killed.append(thread)

    killed: list[int] = []
    apply(sink, update(0, {"user_id": "u"}, device("a0")))  # so that the ledger is there
    sa.event.listen(sink._engine, "commit", kill)
    with pytest.raises(OutcomeUnknownError, match="applying the same again is safe") as caught:
        apply(sink, wanted)
    again = apply(sink, wanted)

    assert (caught.value.written, caught.value.retryable) == (None, True)
    assert (again.rows_changed, again.rows_matched) == (1, 1)


def _await_gone(database: Database, thread: int) -> None:
    while database.run("SELECT 1 FROM information_schema.processlist WHERE id = %s", thread):
        threading.Event().wait(0.01)


def test_a_refused_row_undoes_the_plan(database: Database, opened: Opened) -> None:
    """When a trigger fails in the middle, tables and ledger are as before; then it works."""
    for table in ("events", "pages"):
        database.write(table, [row("m1", "a1", 1)])
    database.run(
        "CREATE TRIGGER no BEFORE UPDATE ON pages FOR EACH ROW"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'secret'"
    )
    sink = opened()
    window = [
        update(1, {"user_id": "secret-user"}, device("a1")),
        update(2, {"user_id": "secret-user"}, device("a1"), versioned=True),
        update(3, {"user_id": "secret-user"}, device("a1"), table="pages"),
    ]

    with pytest.raises(TableError) as caught:
        apply(sink, *window)
    after = (database.column("user_id"), database.run("SELECT count(*) FROM recognition_ledger"))
    database.run("DROP TRIGGER no")
    applied = apply(sink, *window)

    assert caught.value.written is False
    assert "secret" not in str(caught.value)
    assert after == ({"m1": None}, [(0,)])
    assert applied.rejected == ()
    assert database.column("user_id", "pages") == {"m1": "secret-user"}


def test_a_plan_with_a_ledger_is_one_transaction(database: Database, opened: Opened) -> None:
    """Making the ledger commits nothing of the plan: it comes before."""
    database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
    database.run("CREATE TABLE pages (anonymous_id TEXT, user_id TEXT CHECK (user_id <> 'bad'))")
    database.run("INSERT INTO pages VALUES ('a1', NULL)")
    window = [
        update(1, {"user_id": "u"}, device("a1"), versioned=True),
        update(2, {"user_id": "bad"}, device("a1"), table="pages"),
    ]

    with pytest.raises(TableError):
        apply(opened(), *window)

    assert [step.table for step in plan_updates(window).steps] == ["events", "pages"]
    assert database.column("user_id") == {"m1": None, "m2": None}


def test_a_server_that_restarts_is_found_again(opened: Opened) -> None:
    """A sink goes on after its server has crashed and come back."""
    try:
        server = Server()
    except MissingMariadbError as error:
        pytest.skip(str(error))
    with server, server.database() as name:
        database = Database(server, name)
        database.write("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
        sink = opened(database.url, timeout=30)
        apply(sink, update(1, {"user_id": "u"}, device("a1")))
        server.kill()
        join = _in_thread(lambda: apply(sink, update(2, {"user_id": "u"}, device("a2"))))
        server.restart()

        assert join().rows_changed == 1
        assert database.column("user_id") == {"m1": "u", "m2": "u"}


# Loading ----------------------------------------------------------------------------------------


def test_load_makes_a_table_that_compares_exactly(
    database: Database, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that differ in case or blanks are several; what rows are found by has an index."""
    monkeypatch.setattr(MysqlSink, "inline_rows", 0)
    sink = opened()
    columns = {"message_id": "text", "anonymous_id": "text", "user_id": "text", "timestamp": "time"}
    keys = ["M1", "m1", "m1 ", "m\u00e9", "m\U0001f9ea"]
    rows = [{"message_id": key, "anonymous_id": key, "timestamp": 0} for key in keys]
    step = plan_updates([update(1, {"user_id": "u"}, device("m1"), between(0, 9))]).steps[0]
    before = sink.compile(step)

    counts = [sink.load("events", rows, key="message_id", columns=columns) for _ in range(2)]
    applied = apply(sink, *(update(n, {"user_id": f"u{n}"}, device(k)) for n, k in enumerate(keys)))

    indexes = database.run(
        "SELECT index_name FROM information_schema.statistics WHERE table_schema = DATABASE()"
        " AND table_name = 'events' ORDER BY 1"
    )
    assert counts == [5, 0]
    assert applied.rows_changed == 5
    assert database.column("user_id") == {key: f"u{n}" for n, key in enumerate(keys)}
    assert [name.lower() for (name,) in indexes] == ["events_anonymous_id", "primary"]
    assert sink.compile(step) == before
    assert "CAST" not in before.partition(" WHERE ")[2].partition(" AND ")[0]


def test_names_may_be_as_long_as_the_server_takes_them(database: Database, opened: Opened) -> None:
    """The index has a shorter name then; a column that is too long refuses its update alone."""
    columns = {"message_id": "text", "anonymous_id": "text"}
    rows = [{"message_id": "m1", "anonymous_id": "a1"}]
    table, column = "t" * 64, "trait_" + "\u00e9" * 58
    sink = opened(add_missing_columns=True)
    sink.load(table, rows, key="message_id", columns=columns)

    applied = apply(
        sink,
        update(1, {f"{column}x": "x"}, device("a1"), table=table),
        update(2, {column: "x"}, device("a1"), table=table),
    )

    assert applied.rows_changed == 1
    assert "no names of this length" in refusal(applied)
    assert database.column(column, table) == {"m1": "x"}
    assert sink.missing_index(table, "anonymous_id") is None


def test_missing_columns_are_added_on_request(database: Database, opened: Opened) -> None:
    """With `add_missing_columns` a column is added with the type of what is set."""
    database.write("events", [row("m1", "a1", 1)])
    values = {"plan": "pro", "seats": 3, "score": 0.5, "paid": True}

    applied = apply(opened(add_missing_columns=True), update(1, values, device("a1")))

    assert applied.rejected == ()
    assert database.run("SELECT plan, seats, score, paid FROM events") == [("pro", 3, 0.5, 1)]


def test_the_command_line_loads_and_applies(database: Database, tmp_path: Path) -> None:
    """`recognition run --load` on MariaDB: the earlier rows of a visitor get the user."""
    events = [
        {
            "messageId": "m1",
            "type": "page",
            "anonymousId": "a1",
            "timestamp": "2026-01-01T10:00:00Z",
        },
        {
            "messageId": "m2",
            "type": "identify",
            "anonymousId": "a1",
            "userId": "u1",
            "traits": {"email": "a@example.com"},
            "timestamp": "2026-01-01T10:05:00Z",
        },
    ]
    file = tmp_path / "events.ndjson"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    graph = f"sqlite:///{tmp_path}/graph.db"

    codes = [
        main(["run", str(file), "--graph", graph, "--sink", database.url, "--load"])
        for _ in range(2)
    ]

    assert codes == [0, 0]
    assert database.column("user_id") == {"m1": "u1", "m2": "u1"}
