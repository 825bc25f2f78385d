"""
BigQuery's sink through the real client and dialect, on a server that runs its SQL on DuckDB.

Not run on BigQuery itself; `bigquery_server.py` says what the server refuses in its place.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import pytest
import requests
import sqlalchemy as sa
import sqlglot
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.api_core.exceptions import ServiceUnavailable
from google.auth.exceptions import RefreshError, TransportError
from google.cloud import bigquery
from google.cloud.bigquery import dbapi

from bigquery_server import Server, open_server
from golden_windows import check_golden, windows
from mongod import closed_port
from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.messages import Between, Messages
from recognition.planner import plan_updates
from recognition.sinks import Sink, open_sink
from recognition.sinks.bigquery import BigquerySink
from recognition.testing.sinks import SinkTests, at, between, device, row, update
from sinks import Rows, ServerKit, apply, refusal, spoken

Opened = Callable[..., BigquerySink]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server() as server:
        yield server


class Dataset:
    """A dataset that a test has for itself, written and read around the sink."""

    types: ClassVar[Mapping[str, str]] = {
        "text": "VARCHAR",
        "time": "TIMESTAMPTZ",
        "integer": "BIGINT",
        "float": "DOUBLE",
        "boolean": "BOOLEAN",
    }

    def __init__(self, server: Server) -> None:
        self.server = server
        self.name = f"d_{secrets.token_hex(6)}"
        self.url = f"bigquery://p1/{self.name}"
        self.run("SELECT 1")  # makes it

    def run(self, statement: str, *parameters: object) -> list[Any]:
        """One statement of DuckDB, in the dataset."""
        with self._cursor() as cursor:
            return cursor.execute(statement, list(parameters) or None).fetchall()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self.server.database.cursor()
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
def database(server: Server) -> Iterator[Dataset]:
    """An empty dataset."""
    yield Dataset(server)
    server._faults.clear()


@pytest.fixture
def opened(database: Dataset) -> Iterator[Opened]:
    """Open sinks that are closed at the end."""
    sinks: list[BigquerySink] = []

    def open_it(url: str = database.url, **options: Any) -> BigquerySink:
        sink = open_sink(url, **{"client": database.server.client(), **options})
        assert isinstance(sink, BigquerySink)
        sinks.append(sink)
        return sink

    yield open_it
    for sink in sinks:
        sink.close()


class TestBigquery(ServerKit):
    """The kit, unchanged."""

    @pytest.fixture
    def sink(self, opened: Opened) -> Sink:
        return opened()


def sent(server: Server) -> list[str]:
    """What each statement since the last call was, in short."""
    kinds = [" ".join(text.split()[:3]).split("_stage_")[0] for text, *_ in server.statements]
    server.statements.clear()
    return [kind.split("`")[0].strip() for kind in kinds]


# Sessions and transactions ----------------------------------------------------------------------


def test_a_plan_is_one_transaction_of_one_session(database: Dataset, opened: Opened) -> None:
    """The ledger is made before; then all statements of a plan stand between BEGIN and COMMIT."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    sent(database.server)

    first = apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    sessions = {session for *_, session in database.server.statements[2:]}
    labels = [labels for _, labels, _ in database.server.statements]
    texts = sent(database.server)
    second = apply(sink, update(2, {"user_id": "u2"}, device("a1"), expected_rows=1))

    assert texts == [
        "CREATE TABLE IF",
        "SELECT 1",  # makes the session
        "BEGIN TRANSACTION",
        "DELETE FROM",
        "SELECT",
        "MERGE INTO",
        "SELECT",
        "INSERT INTO",
        "COMMIT TRANSACTION",
    ]
    assert len(sessions) == 1
    assert None not in sessions
    assert all(each == {"application": "recognition"} for each in labels)
    assert sent(database.server) == [
        "BEGIN TRANSACTION",
        "SELECT",
        "MERGE INTO",
        "INSERT INTO",
        "COMMIT TRANSACTION",
    ]
    assert (first.statements, second.statements) == (6, 3)


def test_one_statement_needs_no_transaction(
    database: Dataset, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """With versions a MERGE is all that writes: a worker that dies leaves nothing open."""
    caplog.set_level("DEBUG", "recognition.sinks.bigquery")
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(20)])
    sink = opened()
    wanted = [
        update(n, {"user_id": f"u{n}"}, device(f"a{n}"), versioned=True, expected_rows=1)
        for n in range(20)
    ]
    sent(database.server)

    applied = apply(sink, *wanted)
    first = sent(database.server)
    sink.rehearse(plan_updates(wanted))

    assert (applied.rows_changed, applied.statements) == (20, 1)
    assert first == ["SELECT 1", "MERGE INTO"]
    assert "COMMIT; 10485760 bytes were processed" in caplog.text
    assert applied.bytes_read == 10_485_760
    assert sent(database.server)[-1] == "ROLLBACK TRANSACTION"


@pytest.mark.parametrize("begins", ["MERGE", "SELECT `recognition"])
def test_a_statement_without_an_answer_is_said(
    database: Dataset, opened: Opened, begins: str
) -> None:
    """What commits by itself may have been written, when no answer came or the count failed."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=1)
    database.server.fail(begins=begins, reason="cut", times=99, after=True)
    wanted = update(1, {"user_id": "u1"}, device("a1"), versioned=True, expected_rows=2)

    with pytest.raises(OutcomeUnknownError) as caught:
        apply(sink, wanted)

    database.server._faults.clear()
    assert (caught.value.written, caught.value.retryable) == (None, True)
    assert apply(sink, wanted).rows_matched == 1
    assert database.column("user_id") == {"m1": "u1"}


def test_a_session_is_where_the_dataset_is(database: Dataset, opened: Opened) -> None:
    """Its first statement names no table; a URL that says where is believed."""
    database.write("events", [row("m1", "a1", 1)])
    wanted = update(1, {"user_id": "u1"}, device("a1"))

    found = apply(opened(), wanted)
    with pytest.raises(TableError, match="not in the location"):
        apply(opened(f"{database.url}?location=US"), wanted)

    assert found.rows_changed == 1


def test_a_session_that_could_not_be_ended_is_ended_later(
    database: Dataset, opened: Opened
) -> None:
    """Its transaction would else abort all others on the table until the session's day is over."""
    database.write("events", [row("m1", "a1", 1)])
    before = database.server.sessions
    database.server.fail(begins="INSERT", reason="internalError", message="died after the MERGE")
    database.server.fail(begins="CALL", reason="cut")

    applied = apply(opened(timeout=2), update(1, {"user_id": "u1"}, device("a1")))

    assert applied.rows_changed == 1
    assert database.server.sessions == before + 1


def test_a_session_ends_with_the_sink(database: Dataset, opened: Opened) -> None:
    """None is left that would live for a day."""
    database.write("events", [row("m1", "a1", 1)])
    before = database.server.sessions
    sink = opened()
    apply(sink, update(1, {"user_id": "u1"}, device("a1")))
    during = database.server.sessions

    sink.close()

    assert (during, database.server.sessions) == (before + 1, before)


def test_of_two_transactions_the_second_tries_again(database: Dataset, opened: Opened) -> None:
    """A later update that another worker applies meanwhile is met by the ledger, and stands."""
    database.write("events", [row(f"m{n}", "a1", n) for n in range(4)])
    mine, other = opened(), opened()
    merges = []

    @sa.event.listens_for(mine._engine, "before_cursor_execute")
    def interfere(_: Any, __: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("MERGE"):
            merges.append(statement)
            if len(merges) == 1:
                apply(other, update(2, {"stitched_user_id": "B"}, device("a1"), between(2, 9)))

    apply(mine, update(1, {"stitched_user_id": "A"}, device("a1"), between(0, 9)))

    expected = {"m0": "A", "m1": "A", "m2": "B", "m3": "B"}
    assert database.column("stitched_user_id") == expected
    assert len(merges) == 2


def test_what_a_failed_statement_leaves_is_dropped(database: Dataset, opened: Opened) -> None:
    """After an error the session is not used again, and nothing of the plan is written."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1")))
    database.server.fail(begins="INSERT", reason="invalidQuery", times=2)
    sent(database.server)

    with pytest.raises(SinkError) as caught:
        apply(sink, update(2, {"stitched_user_id": "B"}, device("a1")))

    texts = sent(database.server)
    assert caught.value.written is False
    assert database.column("stitched_user_id") == {"m1": "A"}
    assert "ROLLBACK TRANSACTION" not in texts
    assert texts[-1] == "CALL BQ.ABORT_SESSION()"
    assert apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"))).rows_changed == 1


def test_a_lost_commit_is_said(database: Dataset, opened: Opened) -> None:
    """When no answer comes to COMMIT, whether it happened is not known."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(timeout=1)
    database.server.fail(begins="COMMIT", reason="cut", times=99, after=True)

    with pytest.raises(OutcomeUnknownError):
        apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    assert database.column("user_id") == {"m1": "u1"}


# Rows -------------------------------------------------------------------------------------------


def test_many_rows_fill_a_stage_in_pages(
    database: Dataset, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than a statement carries go into a temporary table, page by page."""
    monkeypatch.setattr(BigquerySink, "inline_rows", 3)
    monkeypatch.setattr(BigquerySink, "page_bytes", 1_000)
    keys = [f"ü{n}" * 20 for n in range(20)]
    database.write("events", [row(key, key, n) for n, key in enumerate(keys)])
    database.server.sizes.clear()
    sent(database.server)

    applied = apply(
        opened(), *(update(n, {"user_id": f"u{n}"}, device(k)) for n, k in enumerate(keys))
    )

    texts = sent(database.server)
    assert applied.rows_changed == 20
    assert database.column("user_id") == {key: f"u{n}" for n, key in enumerate(keys)}
    assert texts.count("CREATE TEMP TABLE") == 1
    assert texts.count("INSERT INTO") > 3
    assert texts.index("CREATE TEMP TABLE") > texts.index("BEGIN TRANSACTION")
    assert max(database.server.sizes) < 5_000


def test_no_request_is_larger_than_the_limit(database: Dataset, opened: Opened) -> None:
    """Escaped twice, one character is 14 bytes; a window is staged by its bytes."""
    texts = {f"m{n}": "\N{GRINNING FACE}" * 64_000 for n in range(12)}
    texts |= {f"n{n}": '"\\' * 32_000 for n in range(40)}
    database.write("events", [row(key, key, n) for n, key in enumerate(texts)])
    database.server.sizes.clear()

    applied = apply(
        opened(),
        *(update(n, {"user_id": text}, device(k)) for n, (k, text) in enumerate(texts.items())),
    )

    assert applied.rows_changed == len(texts)
    assert database.column("user_id") == texts
    assert max(database.server.sizes) < 10_485_760


def test_numbers_are_what_the_column_makes_of_them(database: Dataset, opened: Opened) -> None:
    """Rounded as it rounds them, so that they are not set again; one that it cannot hold alone."""
    database.server.client().query_and_wait(
        "CREATE TABLE events (message_id STRING, anonymous_id STRING, price NUMERIC(4, 2),"
        " total INT64, recognition_version INT64)",
        job_config=bigquery.QueryJobConfig(default_dataset=f"p1.{database.name}"),
    )
    database.run("INSERT INTO events (message_id, anonymous_id) VALUES ('m1', 'a1'), ('m2', 'a2')")
    wanted = [
        update(1, {"price": 12.345, "total": 2**63 - 1}, device("a1")),
        update(2, {"price": 100.0}, device("a3")),
        update(3, {"price": 99.999}, device("a2")),
        update(4, {"total": 2**63}, device("a2")),
    ]
    sink = opened()

    first, again = apply(sink, *wanted), apply(sink, *wanted)

    assert [name for name, _ in first.rejected] == ["events-2", "events-3", "events-4"]
    assert (first.rows_changed, again.rows_changed, again.rows_matched) == (1, 0, 1)
    assert database.column("price") == {"m1": Decimal("12.35"), "m2": None}


def test_messages_that_a_later_update_named_are_spared(database: Dataset, opened: Opened) -> None:
    """An update of an interval that comes late leaves alone what a later one named by message."""
    database.write("events", [*(row(f"m{n}", "a1", n) for n in range(4)), row("m9", "a2", 1)])
    database.run("UPDATE events SET message_id = NULL WHERE message_id = 'm2'")
    refs = (("m1", at(1)), ("m3", at(3)))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    sink = opened()
    apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), named))
    both = {"stitched_user_id": "A", "context_traits_email": "a"}

    late = apply(sink, update(1, both, device("a1"), between(0, 9)))

    found = database.column("stitched_user_id")
    assert found == {"m0": "A", "m1": "B", None: "A", "m3": "B", "m9": None}
    assert late.rows_changed == 6
    assert late.rejected == ()


def test_rows_and_notes_that_are_there_twice_do_no_harm(database: Dataset, opened: Opened) -> None:
    """No key is enforced: each row of a message is set, and a line of the ledger counts once."""
    database.write("events", [row("m1", "a1", 1), row("m1", "a1", 1), row("m2", "a1", 5)])
    refs = (("m2", at(5)),)
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)
    sink = opened()
    later = apply(sink, update(3, {"stitched_user_id": "C"}, device("a1"), between(0, 2)))
    apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), named))
    database.run("INSERT INTO recognition_ledger SELECT * FROM recognition_ledger")

    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1"), between(0, 9)))

    assert later.rows_changed == 2
    found = sorted(database.run("SELECT message_id, stitched_user_id FROM events"))
    assert found == [("m1", "C"), ("m1", "C"), ("m2", "B")]


def test_a_table_is_the_same_however_it_is_named(database: Dataset, opened: Opened) -> None:
    """With its dataset or without, a table has one order of its updates."""
    database.write("events", [row("m1", "a1", 1)])
    whole = f"{database.name}.events"
    sink = opened()
    apply(sink, update(2, {"stitched_user_id": "B"}, device("a1"), table=whole))

    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1")))

    assert database.column("stitched_user_id") == {"m1": "B"}


def test_rows_can_be_loaded_and_stamped(database: Dataset, opened: Opened) -> None:
    """`load` makes the table, inserts a key once, and puts a newer stamp in the place of one."""
    columns = {"message_id": "text", "anonymous_id": "text", "user_id": "text", "timestamp": "time"}
    rows = [
        {"message_id": f"m{n}", "anonymous_id": "a1", "user_id": None, "timestamp": n * 1_000_000}
        for n in range(3)
    ]
    sink = opened()

    first = sink.load("fresh", rows, key="message_id", columns=columns)
    again = sink.load(
        "fresh",
        [{**each, "user_id": "u1"} for each in rows],
        key="message_id",
        columns=columns,
        stamps=["user_id"],
        stamped={"m1"},
    )

    assert (first, again) == (3, 0)
    assert database.column("user_id", "fresh") == {"m0": None, "m1": "u1", "m2": None}


@pytest.mark.parametrize("declared", ["TIMESTAMP", "DATETIME", "DATE", "STRING"])
def test_times_of_every_type_are_compared(database: Dataset, opened: Opened, declared: str) -> None:
    """Zoned times, those of a clock, dates and texts; what has no time is in no interval."""
    stored = {"TIMESTAMP": "TIMESTAMPTZ", "DATETIME": "TIMESTAMP", "STRING": "VARCHAR"}
    type_ = stored.get(declared, declared)
    database.run(
        f"CREATE TABLE events (message_id VARCHAR, anonymous_id VARCHAR, user_id VARCHAR,"
        f" timestamp {type_})"
    )
    for name, value in (("before", "2026-01-01"), ("inside", "2026-01-02"), ("end", "2026-01-03")):
        given = f"{value}T00:00:00Z" if declared == "STRING" else value
        database.run(f"INSERT INTO events VALUES (?, 'a1', NULL, CAST(? AS {type_}))", name, given)
    database.run("INSERT INTO events VALUES ('none', 'a1', NULL, NULL)")
    day = Between(
        column="timestamp",
        start=datetime(2026, 1, 1, 12, tzinfo=UTC),
        end=datetime(2026, 1, 3, tzinfo=UTC),
    )

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), day))

    assert applied.rejected == ()
    expected = {"before": None, "inside": "u1", "end": None, "none": None}
    assert database.column("user_id") == expected


# What is refused --------------------------------------------------------------------------------


def test_a_view_is_refused(database: Dataset, opened: Opened) -> None:
    """Nothing can be set in a view."""
    database.write("events", [])
    database.run("CREATE VIEW shown AS SELECT * FROM events")

    applied = apply(opened(), update(1, {"user_id": "u1"}, device("a1"), table="shown"))

    assert "is a view" in refusal(applied)


def test_a_text_that_is_too_wide_is_refused_alone(database: Dataset, opened: Opened) -> None:
    """Of a window only the update whose value does not fit its STRING(3) is refused."""
    client = database.server.client()
    config = bigquery.QueryJobConfig(default_dataset=f"p1.{database.name}")
    client.query_and_wait(
        "CREATE TABLE events (message_id STRING, anonymous_id STRING, user_id STRING(3))",
        job_config=config,
    )
    database.run("INSERT INTO events VALUES ('m1', 'a1', NULL), ('m2', 'a2', NULL)")

    applied = apply(
        opened(),
        update(1, {"user_id": "long"}, device("a1")),
        update(2, {"user_id": "u"}, device("a2")),
    )

    assert "a text of 4 characters was found; it is STRING(3)" in refusal(applied)
    assert database.column("user_id") == {"m1": None, "m2": "u"}


def test_a_missing_column_can_be_added(database: Dataset, opened: Opened) -> None:
    """The error shows what to run; with `add_missing_columns` it is run, outside of BEGIN."""
    database.write("events", [row("m1", "a1", 1)])
    wanted = update(1, {"shoe": "44"}, device("a1"))

    refused = apply(opened(), wanted)
    applied = apply(opened(add_missing_columns=True), wanted)

    assert "ALTER TABLE `events` ADD COLUMN `shoe` STRING" in refusal(refused)
    assert applied.rows_changed == 1
    assert database.column("shoe") == {"m1": "44"}


@pytest.mark.parametrize(
    ("fault", "kind", "named"),
    [
        ({"reason": "accessDenied", "code": 403}, SinkReadOnlyError, "roles/bigquery.dataEditor"),
        ({"reason": "authError", "code": 401}, SinkError, "renew them"),
        ({"reason": "bytesBilledLimitExceeded"}, SinkError, "maximum_bytes_billed"),
        ({"reason": "quotaExceeded", "code": 403}, SinkUnavailableError, "quota"),
        ({"reason": "resourcesExceeded"}, SinkError, "more than BigQuery gives"),
        (
            {"reason": "invalidQuery", "message": "Cannot query without a filter over partition x"},
            TableError,
            "require_partition_filter",
        ),
        (
            {"reason": "invalidQuery", "message": "rows in the streaming buffer"},
            SinkUnavailableError,
            "Storage Write API",
        ),
        ({"reason": "invalidQuery", "message": "secret-key"}, SinkError, "refused a statement"),
    ],
)
def test_errors_say_what_to_do(
    database: Dataset, opened: Opened, fault: dict[str, Any], kind: type[SinkError], named: str
) -> None:
    """Each answer of BigQuery becomes an error of ours that says what to run, and no value."""
    database.write("events", [row("m1", "a1", 1)])
    database.server.fail(begins="MERGE", times=99, **fault)

    with pytest.raises(kind) as caught:
        apply(opened(timeout=0), update(1, {"user_id": "u1"}, device("a1")))

    assert type(caught.value) is kind
    assert named in str(caught.value)
    assert "secret-key" not in str(caught.value)
    assert caught.value.written is False
    assert caught.value.retryable == (kind is SinkUnavailableError)
    assert database.column("user_id") == {"m1": None}


def test_conflicts_and_dead_sessions_are_tried_again(database: Dataset, opened: Opened) -> None:
    """An aborted transaction and a session that is over are no error, but for the time."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    apply(sink, update(1, {"stitched_user_id": "A"}, device("a1")))
    text = "Transaction is aborted due to concurrent update against table p1:d.events"
    database.server.fail(begins="MERGE", reason="invalidQuery", message=text)
    database.server.fail(begins="INSERT", reason="invalid", message="Session x is terminated")

    applied = apply(sink, update(2, {"stitched_user_id": "B"}, device("a1")))

    assert applied.rows_changed == 1
    assert database.column("stitched_user_id") == {"m1": "B"}


def test_expired_credentials_are_told_from_a_server_that_is_away(opened: Opened) -> None:
    """Google's own classes: those that a new login mends, and those that time does."""
    sink = opened()

    expired = sink.translate(dbapi.OperationalError(RefreshError("invalid_grant")))
    away = sink.translate(dbapi.OperationalError(TransportError("no route")))
    cut = sink.translate(dbapi.OperationalError(requests.ConnectionError()))
    busy = sink.translate(
        dbapi.DatabaseError(ServiceUnavailable("-", errors=[{"reason": "backendError"}]))
    )

    assert (type(expired), expired.retryable) == (SinkError, False)
    assert "gcloud auth" in str(expired)
    assert {type(each) for each in (away, cut, busy)} == {SinkUnavailableError}


def test_a_missing_dataset_is_said(database: Dataset, opened: Opened) -> None:
    """No dataset of this name, or none in this location."""
    with pytest.raises(TableError, match="not in the location"):
        apply(opened("bigquery://p1/nowhere"), update(1, {"user_id": "u1"}, device("a1")))


def test_another_dataset_that_is_missing_refuses_its_updates_alone(
    database: Dataset, opened: Opened
) -> None:
    """What names a dataset that is not there does not keep the rest of the window."""
    database.write("events", [row("m1", "a1", 1)])

    applied = apply(
        opened(),
        update(1, {"user_id": "u1"}, device("a1")),
        update(2, {"user_id": "u1"}, device("a1"), table="nowhere.events"),
    )

    assert "no table 'nowhere.events'" in refusal(applied)
    assert database.column("user_id") == {"m1": "u1"}


@pytest.mark.parametrize(
    "url",
    [
        "bigquery://",
        "bigquery://p1",
        "bigquery://p1/d?credentials_base64=c2VjcmV0",
    ],
)
def test_urls_without_a_dataset_or_with_a_secret_are_refused(url: str) -> None:
    """The error shows how a URL looks, and nothing of this one."""
    with pytest.raises(ConfigurationError, match="bigquery://project/dataset") as caught:
        open_sink(url)

    assert "c2VjcmV0" not in spoken(caught.value)


def test_credentials_are_looked_for_when_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening needs none; the first question says that there are none, and what to do."""
    wrong = tmp_path / "key.json"
    wrong.write_text('{"private_key": "s3cr3t"}')
    sink = open_sink(f"bigquery://p1/d1?credentials_path={wrong}")

    with pytest.raises(ConfigurationError, match="gcloud auth") as caught:
        sink.apply(plan_updates([update(1, {"user_id": "u1"}, device("a1"))]))

    assert "s3cr3t" not in spoken(caught.value)


def test_the_key_is_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not in what a sink shows of itself, nor in logs, nor in an error and its causes."""
    caplog.set_level(logging.DEBUG)
    key = generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    account = {"type": "service_account", "client_email": "loader@p1.example.com"}
    account |= {"private_key": key.decode(), "private_key_id": "s3cr3t"}
    file = tmp_path / "key.json"
    with closed_port() as port:
        file.write_text(json.dumps({**account, "token_uri": f"http://127.0.0.1:{port}/token"}))
        sink = open_sink(f"bigquery://p1/d1?credentials_path={file}", timeout=0)
        began = time.monotonic()

        with pytest.raises(SinkUnavailableError) as caught:
            apply(sink, update(1, {"user_id": "u1"}, device("a1")))

    shown = [repr(sink), repr(vars(sink)), caplog.text, spoken(caught.value)]
    lines = key.decode().splitlines()[1:-1]
    assert caught.value.__cause__ is not None
    assert not any(secret in each for secret in ("s3cr3t", *lines) for each in shown)
    assert time.monotonic() - began < 30  # the client would try for ten minutes


# Statements -------------------------------------------------------------------------------------


def test_statements_are_those_of_the_file(database: Dataset, opened: Opened) -> None:
    """A change of SQL is seen in a diff; each statement is GoogleSQL to `sqlglot`."""
    sink = opened()
    shown = []
    for about, prepared, wanted in windows():
        database.run("DROP TABLE IF EXISTS events")
        database.run("DROP TABLE IF EXISTS recognition_ledger")
        database.write("events", [row("m1", "a1", 1)])
        sink.close()
        sink = opened()
        if prepared:
            apply(sink, *prepared)
        database.server.statements.clear()
        apply(sink, *wanted)
        shown.append(f"-- {about}\n")
        for text, *_ in database.server.statements:
            if not text.startswith("CALL"):
                sqlglot.parse_one(text, read="bigquery")
            shown.append(f"{text.replace(database.name, 'dataset')};\n")
        shown.append("\n")

    check_golden("bigquery", "".join(shown))


def test_statements_of_other_dialects_with_unnest_are_cached() -> None:
    """The dialect puts a function of its own in the place of everybody's; SQLAlchemy warned."""
    statement = sa.select(sa.func.unnest(sa.column("numbers", sa.ARRAY(sa.Integer))))

    assert statement._generate_cache_key() is not None
