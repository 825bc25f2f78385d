"""The sink of Redshift through both its drivers, on a real PostgreSQL: the kit, and the rest."""

from __future__ import annotations

import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from mongod import closed_port
from postgres import GivenServer
from recognition.errors import (
    ConfigurationError,
    MissingDependencyError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    ValueRefusedError,
)
from recognition.messages import Messages, UpdateByCriteria
from recognition.sinks import Sink, open_sink
from recognition.sinks import redshift as module
from recognition.sinks.redshift import (
    _SETTINGS,
    RedshiftSink,
    _describe,
    _pages,
    _read_query,
)
from recognition.testing.sinks import HOSTILE_VALUES, at, between, device, row, unknown, update
from redshift import S3, Proxy
from sinks import ServerKit, apply, opening
from test_postgresql import Database

Opened = Callable[..., RedshiftSink]

DRIVERS = ("psycopg2", "redshift_connector")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """A server that speaks S3."""
    with S3() as s3:
        yield s3


@pytest.fixture(scope="module")
def proxy(postgres: GivenServer, s3: S3) -> Iterator[Proxy]:
    """What both drivers take for Redshift."""
    with Proxy(postgres.port, s3) as proxy:
        yield proxy


@pytest.fixture
def database(postgres: GivenServer) -> Iterator[Database]:
    """An empty database."""
    with postgres.database() as name:
        yield Database(postgres, name)


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each of the two drivers."""
    return str(request.param)


@pytest.fixture
def url(database: Database, proxy: Proxy, driver: str) -> str:
    """The URL of the database for the driver; without TLS, on loopback."""
    if driver == "psycopg2":
        return database.server.url(
            database.name, scheme="redshift+psycopg2", port=proxy.port, sslmode="disable"
        )
    return database.server.url(
        database.name, scheme="redshift+redshift_connector", port=proxy.port, ssl="false"
    )


# The kit ----------------------------------------------------------------------------------------


class TestRedshift(ServerKit):
    """The kit on Redshift's dialect, with each driver."""

    @pytest.fixture
    def sink(self, url: str) -> Iterator[Sink]:
        with closing(open_sink(url, settings={})) as sink:
            yield sink


class TestStaged(TestRedshift):
    """The kit where small windows are staged as large ones are; `TestBucket` has the other."""

    @pytest.fixture
    def driver(self) -> str:
        return "psycopg2"

    @pytest.fixture(autouse=True)
    def staged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RedshiftSink, "inline_rows", 0)


@pytest.fixture
def opened(url: str) -> Iterator[Opened]:
    """Open sinks that are closed at the end; PostgreSQL knows none of Redshift's settings."""
    with opening(RedshiftSink, url, settings={}) as open_it:
        yield open_it


# What is sent -----------------------------------------------------------------------------------


def test_a_window_of_many_visitors_takes_a_handful(opened: Opened, database: Database) -> None:
    """1,000 visitors take 15 statements at most, and nothing that Redshift does not have."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(1_000)])
    sink = opened()
    sent: list[str] = []
    sa.event.listen(
        sink._engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: sent.append(statement),
    )
    updates = [
        update(n, {"stitched_user_id": f"u{n}"}, device(f"a{n}"), between(0, 2_000))
        for n in range(1_000)
    ]
    apply(sink, update(0, {"stitched_user_id": "u"}, device("other")))
    sent.clear()

    applied = apply(sink, *updates)

    assert applied.rows_changed == 1_000
    assert len(sent) == applied.statements <= 15
    assert [each.split()[0] for each in sent if "events" in each.split()[:3]] == ["UPDATE"]
    assert [each.split()[0] for each in sent[:3]] == ["SET", "LOCK", "SET"]
    for unknown_word in ("RETURNING", "SAVEPOINT", "DISTINCT", "unnest", "EXISTS", "MERGE"):
        assert not any(unknown_word in each for each in sent)


def test_rows_are_staged_in_pages() -> None:
    """A page has at most 32,767 values and 15 MB, escaped; no row is lost or comes twice."""
    rows = [(n, *("x",) * 9) for n in range(7_000)]
    long = [("\\" * 65_535,) * 5 for _ in range(50)]

    pages = [*_pages(rows)]
    sizes = [sum(2 * len(text) for line in page for text in line) for page in _pages(long)]

    assert [len(page) for page in pages] == [3_276, 3_276, 448]
    assert [line for page in pages for line in page] == rows
    assert [*_pages([])] == []
    assert max(sizes) < 15_000_000
    assert sum(sizes) == 50 * 5 * 2 * 65_535


def test_a_session_says_who_it_is(opened: Opened, database: Database) -> None:
    """The settings and the application's name are set in each session; Redshift's are two more."""
    sink = opened(settings={"search_path": "public"})
    database.write("events", [row("m1", "a1", 1)])

    apply(sink, update(1, {"stitched_user_id": "u1"}, device("a1")))

    assert database.run(
        "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name <> 'recognition-test'"
    ) == [("recognition",)]
    assert _SETTINGS == {"query_group": "recognition", "error_on_nondeterministic_update": "true"}


@pytest.mark.parametrize("settings", [{"a": "b'; DROP TABLE x"}, {"A b": "c"}, {"a": "\\"}])
def test_a_setting_is_no_statement(opened: Opened, settings: dict[str, str]) -> None:
    """What could be more than a setting is refused before anything is opened."""
    with pytest.raises(ConfigurationError, match="settings are names"):
        opened(settings=settings)


# Tables and values ------------------------------------------------------------------------------


def test_widths_are_bytes(opened: Opened, database: Database) -> None:
    """A text of more bytes than its column's width is refused; the rest of the plan goes on."""
    database.run("CREATE TABLE events (anonymous_id VARCHAR(20), user_id VARCHAR(10))")
    database.run("INSERT INTO events VALUES ('a1'), ('a2'), ('a3')")

    applied = apply(
        opened(),
        update(1, {"user_id": "\u00e9" * 6}, device("a1"), unknown()),
        update(2, {"user_id": "\u00e9" * 5}, device("a2"), unknown()),
        update(3, {"user_id": "u3"}, device("a3"), unknown()),
    )

    ((refused, error),) = applied.rejected
    assert refused == "events-1"
    assert isinstance(error, ValueRefusedError)
    assert "a text of 12 bytes was found; it is character varying(10), in bytes" in str(error)
    assert dict(database.run("SELECT * FROM events")) == {
        "a1": None,
        "a2": "\u00e9" * 5,
        "a3": "u3",
    }


def test_rows_that_are_there_twice_are_both_set(opened: Opened, database: Database) -> None:
    """No key is enforced, so that a message may have two rows: both are set, and counted."""
    database.run(
        "CREATE TABLE events (message_id VARCHAR(20), anonymous_id VARCHAR(20),"
        " user_id VARCHAR(20), timestamp TIMESTAMPTZ)"
    )
    database.run(
        "INSERT INTO events VALUES ('m1', 'a1', NULL, %s), ('m1', 'a1', NULL, %s)", at(1), at(1)
    )
    refs = Messages(id_column="message_id", time_column="timestamp", refs=(("m1", at(1)),))

    applied = apply(opened(), update(1, {"user_id": "u1"}, refs, unknown(), expected_rows=1))

    assert (applied.rows_matched, applied.rows_changed) == (2, 2)
    assert database.run("SELECT user_id FROM events") == [("u1",)] * 2


def test_types_of_redshift() -> None:
    """An identity column cannot be set; SUPER and GEOMETRY hold nothing that an update carries."""
    identity = _describe("id", "bigint", "int8", -1, preset="\"identity\"(1234, 0, '1,1'::text)")
    other = [_describe("x", name, name, -1).kind for name in ("super", "geometry", "varbyte")]

    assert identity.generated
    assert not _describe("id", "bigint", "int8", -1, preset="nextval('x')").generated
    assert other == ["other"] * 3
    assert _describe("t", "character varying(256)", "varchar", 260).width == 256


def test_numbers_are_kept_unchanged(opened: Opened, database: Database) -> None:
    """A number with more decimals than its column keeps is refused, others arrive."""
    database.run("CREATE TABLE events (anonymous_id TEXT, score NUMERIC(6, 2), day DATE)")
    database.run("INSERT INTO events VALUES ('a1'), ('a2')")

    applied = apply(
        opened(),
        update(1, {"score": 0.125}, device("a1")),
        update(2, {"score": 0.25, "day": "2026-01-02"}, device("a2")),
    )

    assert [refused for refused, _ in applied.rejected] == ["events-1"]
    assert "more decimals than it keeps" in str(applied.rejected[0][1])
    assert database.run("SELECT score, day::text FROM events ORDER BY anonymous_id") == [
        (None, None),
        (Decimal("0.25"), "2026-01-02"),
    ]


# A bucket ---------------------------------------------------------------------------------------

ROLE = "arn:aws:iam::123456789012:role/reader"


@pytest.fixture
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket, in which nothing is left, and what boto3 finds in the environment."""
    told = {
        "AWS_ENDPOINT_URL": s3.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_CONFIG_FILE": os.devnull,
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with s3.bucket("stages") as name:
        yield name


class TestBucket(TestRedshift):
    """The kit where every stage goes by way of the bucket, whichever driver says so."""

    @pytest.fixture
    def driver(self) -> str:
        return "redshift_connector"

    @pytest.fixture
    def sink(self, url: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sink]:
        monkeypatch.setattr(RedshiftSink, "inline_rows", 0)
        monkeypatch.setattr(RedshiftSink, "insert_pages", 0)
        with closing(open_sink(f"{url}&s3=s3://{bucket}/kit&iam_role={ROLE}", settings={})) as sink:
            yield sink


def many(count: int) -> list[UpdateByCriteria]:
    """Updates of so many visitors, whose values are all that a text may be."""
    return [
        update(
            n,
            {"stitched_user_id": f"{HOSTILE_VALUES[n % len(HOSTILE_VALUES)]}{n}"},
            device(f"a{n}"),
            between(0, 9_000),
        )
        for n in range(count)
    ]


def test_large_stages_go_by_way_of_the_bucket(
    opened: Opened, url: str, database: Database, s3: S3, bucket: str
) -> None:
    """What one INSERT does not hold is put, copied and removed; any text arrives unchanged."""
    updates = many(4_000)
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(4_000)])
    sink = opened(f"{url}&s3=s3://{bucket}/a/b/&iam_role={ROLE}&s3_region=us-east-1")
    sent: list[str] = []
    seen: list[str] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def note(_: object, __: object, statement: str, *rest: object) -> None:
        sent.append(statement)
        if statement.startswith("COPY"):
            seen.extend(s3.keys(bucket))

    apply(sink, update(0, {"stitched_user_id": "u"}, device("other")))
    sent.clear()
    applied = apply(sink, *updates)

    found = database.column("stitched_user_id")
    (copy,) = [each for each in sent if each.startswith("COPY")]
    assert applied.rows_changed == 4_000
    assert len(sent) == applied.statements <= 13
    assert found == {f"m{n}": each.set["stitched_user_id"] for n, each in enumerate(updates)}
    assert re.sub(r"stage_\w+|[0-9a-f-]{36}", "?", copy) == (
        "COPY recognition_? (update_id, sequence, workspace, position, extras, equal_0, start_0, "
        "end_0, starts_0, ends_0, value_0) FROM 's3://stages/a/b/?.csv.gz' "
        f"IAM_ROLE '{ROLE}' REGION 'us-east-1' FORMAT AS CSV GZIP NULL AS '@null' "
        "TIMEFORMAT 'auto' COMPUPDATE OFF STATUPDATE OFF"
    )
    assert [each.startswith("a/b/") for each in seen] == [True]
    assert s3.keys(bucket) == []


def test_small_stages_need_no_bucket(
    opened: Opened, url: str, database: Database, bucket: str
) -> None:
    """What one INSERT holds is not put there: of a bucket that is not there nobody hears."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(200)])

    applied = apply(opened(f"{url}&s3=s3://missing"), *many(200))

    assert applied.rows_changed == 200


@pytest.fixture
def by_bucket(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The bucket, by way of which every stage goes."""
    monkeypatch.setattr(RedshiftSink, "inline_rows", 0)
    monkeypatch.setattr(RedshiftSink, "insert_pages", 0)
    return bucket


@pytest.mark.parametrize(
    ("granted", "told"),
    [
        ((), "it was refused; s3:PutObject is needed (AccessDenied)"),
        (None, "the credentials that boto3 found were refused or have expired"),
    ],
)
def test_a_bucket_that_refuses_is_said(
    opened: Opened,
    url: str,
    database: Database,
    s3: S3,
    by_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    granted: tuple[str, ...] | None,
    told: str,
) -> None:
    """Without a grant, or with credentials that are none, nothing is written and all is said."""
    database.write("events", [row("m1", "a1", 1)])

    with s3.guarded(*(granted or ("s3:ListBucket",))) as user:
        secret = user["AWS_SECRET_ACCESS_KEY"] if granted is not None else "wrong-secret"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", user["AWS_ACCESS_KEY_ID"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        with pytest.raises(SinkError, match="nothing was written") as caught:
            apply(opened(f"{url}&s3=s3://{by_bucket}"), *many(3))

    assert told in str(caught.value)
    assert "bucket 'stages'" in str(caught.value)
    assert "a retry does not help" in str(caught.value)
    assert not caught.value.retryable
    assert caught.value.written is False
    assert secret not in str(caught.value) + repr(caught.value)
    assert database.column("stitched_user_id") == {"m1": None}


def test_a_missing_bucket_is_said(
    opened: Opened, url: str, database: Database, by_bucket: str
) -> None:
    """A bucket that is not there is named, and nothing is written."""
    database.write("events", [row("m1", "a1", 1)])

    with pytest.raises(SinkError, match=r"'missing': there is none of this name") as caught:
        apply(opened(f"{url}&s3=s3://missing"), *many(3))

    assert not caught.value.retryable
    assert database.column("stitched_user_id") == {"m1": None}


def test_an_s3_that_does_not_answer_is_said(
    opened: Opened, url: str, database: Database, by_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where S3 cannot be reached a retry may help."""
    database.write("events", [row("m1", "a1", 1)])
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with closed_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")

        with pytest.raises(SinkUnavailableError, match="S3 cannot be reached") as caught:
            apply(opened(f"{url}&s3=s3://{by_bucket}"), *many(3))

    assert caught.value.retryable
    assert database.column("stitched_user_id") == {"m1": None}


def test_a_role_that_may_not_read_is_said(
    opened: Opened, url: str, database: Database, s3: S3, by_bucket: str
) -> None:
    """The cluster's own refusal of the object is no secret, and the object is removed."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(f"{url}&s3=s3://{by_bucket}")

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def remove(_: object, __: object, statement: str, *rest: object) -> None:
        if statement.startswith("COPY"):
            s3.remove(by_bucket)

    with pytest.raises(SinkError, match="iam_role needs s3:GetObject") as caught:
        apply(sink, *many(3))

    assert not caught.value.retryable
    assert "secret" not in str(caught.value)
    assert s3.keys(by_bucket) == []
    assert database.column("stitched_user_id") == {"m1": None}


def test_a_stage_that_may_not_be_removed_is_logged(
    opened: Opened,
    url: str,
    database: Database,
    s3: S3,
    by_bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever may put objects and not delete them is told; the window is applied."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(3)])

    with s3.guarded("s3:PutObject") as user:
        for name, value in user.items():
            monkeypatch.setenv(name, value)
        applied = apply(opened(f"{url}&s3=s3://{by_bucket}"), *many(3))

    assert applied.rows_changed == 3
    assert [each.levelname for each in caplog.records if "recognition" in each.name] == ["WARNING"]
    assert "s3:DeleteObject is needed" in caplog.text
    assert len(s3.keys(by_bucket)) == 1
    s3.remove(by_bucket)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("s3=bucket", "s3 is a bucket"),
        ("s3=s3://a", "s3 is a bucket"),
        ("s3=s3://bucket/x'y", "s3 is a bucket"),
        ("s3=s3://bucket&iam_role=x'", "iam_role is default, or the ARN"),
        ("s3=s3://bucket&s3_region=x'", "s3_region is a region"),
        ("s3=s3://bucket&s3=s3://other", "s3 is a bucket"),
    ],
)
def test_a_bucket_is_no_statement(url: str, options: str, told: str) -> None:
    """What could end a text of the statement is refused before anything is opened."""
    with pytest.raises(ConfigurationError, match=told):
        open_sink(f"{url}&{options}")


def test_an_object_is_csv_whose_null_is_no_text() -> None:
    """Texts are within quotes, NULL is what no text is, numbers and times are plain."""
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    rows = [
        (None, "", "@null", 'a,"b"\n', True, 1, 0.5, Decimal("1E+2"), moment),
        (None, "@null@", " ", "\\", False, -1, 1e300, Decimal("0.1"), moment.replace(tzinfo=None)),
    ]

    null = module._choose_null(rows)

    assert null == "@null@@"
    assert [module._write_line(line, null) for line in rows] == [
        b'@null@@,"","@null","a,""b""\n",true,1,0.5,100,2026-01-02 03:04:05.000006+00\n',
        b'@null@@,"@null@"," ","\\",false,-1,1e+300,0.1,2026-01-02 03:04:05.000006\n',
    ]


# Errors -----------------------------------------------------------------------------------------


def test_a_violation_is_retried(opened: Opened, database: Database) -> None:
    """Error 1023 is known by its number, in both drivers, and the plan is applied again."""
    database.write("events", [row("m1", "a1", 1)])
    database.run("CREATE SEQUENCE tries")
    database.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('tries') < 3 THEN RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = '1023',"
        " DETAIL = 'Serializable isolation violation on table - 108263'; END IF;"
        " RETURN NEW; END $$"
    )
    database.run("CREATE TRIGGER refuse BEFORE UPDATE ON events EXECUTE FUNCTION refuse()")

    applied = apply(opened(), update(1, {"stitched_user_id": "u1"}, device("a1")))

    assert applied.rows_changed == 1
    assert database.run("SELECT last_value FROM tries") == [(3,)]


def test_another_internal_error_is_not_retried(opened: Opened, database: Database) -> None:
    """The SQLSTATE of error 1023 alone means nothing: other errors with it end at once."""
    database.write("events", [row("m1", "a1", 1)])
    database.run(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE EXCEPTION USING ERRCODE = 'XX000', MESSAGE = 'Assert secret'; END $$"
    )
    database.run("CREATE TRIGGER refuse BEFORE UPDATE ON events EXECUTE FUNCTION refuse()")

    with pytest.raises(SinkError, match="XX000") as caught:
        apply(opened(), update(1, {"stitched_user_id": "u1"}, device("a1")))

    assert not caught.value.retryable
    assert "secret" not in str(caught.value)


def test_one_writer_at_a_time(opened: Opened, database: Database) -> None:
    """Whoever finds the ledger locked waits no longer than the timeout, and may try again."""
    database.write("events", [row("m1", "a1", 1)])
    first = opened()
    apply(first, update(1, {"stitched_user_id": "u1"}, device("a1")))
    with database.server.connect(database.name, autocommit=False) as other:
        other.execute("LOCK TABLE recognition_ledger")

        with pytest.raises(SinkUnavailableError, match="a lock was held") as caught:
            apply(opened(timeout=0.2), update(2, {"stitched_user_id": "u2"}, device("a1")))

        assert caught.value.retryable
        assert not caught.value.written
        # Who reads the table does not wait for us.
        assert database.column("stitched_user_id") == {"m1": "u1"}


def test_tables_are_locked_on_request(opened: Opened, database: Database) -> None:
    """With `lock_tables` the tables of the plan are locked with the ledger, in one statement."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened(lock_tables=True)
    sent: list[str] = []
    sa.event.listen(
        sink._engine,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: sent.append(statement),
    )

    apply(sink, update(1, {"stitched_user_id": "u1"}, device("a1")))

    assert [each for each in sent if each.startswith("LOCK")] == [
        "LOCK TABLE recognition_ledger, events"
    ]


def test_a_cut_connection_is_replaced(opened: Opened, database: Database) -> None:
    """A connection that went away while nobody used it costs nothing but a new one."""
    database.write("events", [row("m1", "a1", 1)])
    sink = opened()
    apply(sink, update(1, {"stitched_user_id": "u1"}, device("a1")))
    database.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    applied = apply(sink, update(2, {"stitched_user_id": "u2"}, device("a1")))

    assert applied.rows_changed == 1


def test_a_statement_that_is_cut_is_done_again(opened: Opened, database: Database) -> None:
    """A connection that goes away within a transaction: all is rolled back and applied again."""
    database.write("events", [row("m1", "a1", 1)])
    database.run("CREATE SEQUENCE tries")
    database.run(
        "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('tries') < 2 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
        " RETURN NEW; END $$"
    )
    database.run("CREATE TRIGGER cut BEFORE UPDATE ON events EXECUTE FUNCTION cut()")

    applied = apply(opened(), update(1, {"stitched_user_id": "u1"}, device("a1")))

    assert applied.rows_changed == 1
    assert database.column("stitched_user_id") == {"m1": "u1"}


def test_a_lost_commit_is_unknown(opened: Opened, database: Database) -> None:
    """A connection that goes away at the commit: nobody knows, and applying again is safe."""
    database.write("events", [row("m1", "a1", 1)])
    database.run(
        "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$"
    )
    database.run(
        "CREATE CONSTRAINT TRIGGER cut AFTER UPDATE ON events DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION cut()"
    )
    sink = opened()
    wanted = update(1, {"stitched_user_id": "u1"}, device("a1"))

    with pytest.raises(OutcomeUnknownError) as caught:
        apply(sink, wanted)
    database.run("DROP TRIGGER cut ON events")
    applied = apply(sink, wanted)

    assert caught.value.written is None
    assert applied.rows_changed == 1


def test_two_sinks_at_once(opened: Opened, database: Database) -> None:
    """Two sinks with updates of the same rows wait for each other, and the latest one stands."""
    database.write("events", [row(f"m{n}", f"a{n}", n) for n in range(20)])
    updates = [
        update(
            sequence, {"stitched_user_id": f"u{sequence}"}, device(f"a{n}"), expected_rows=1
        ).model_copy(update={"id": f"{sequence}-{n}"})
        for sequence in range(8)
        for n in range(20)
    ]

    def work(first: int) -> None:
        sink = opened()
        for sequence in (6 + first, 2 + first, 4 + first, first):
            apply(sink, *updates[sequence * 20 : sequence * 20 + 20])

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work, first) for first in (0, 1)]:
            done.result()

    assert set(database.column("stitched_user_id").values()) == {"u7"}


def test_an_unreachable_server_is_said(url: str, opened: Opened) -> None:
    """A server that does not answer is an error that a retry may mend, without the password."""
    with closed_port() as port:
        lost = make_url(url).set(port=port).render_as_string(hide_password=False)

        with pytest.raises(SinkUnavailableError, match="cannot be reached") as caught:
            apply(opened(lost, timeout=0.0), update(1, {"user_id": "u1"}, device("a1")))

    assert caught.value.retryable
    assert str(make_url(url).password) not in str(caught.value)


def test_wrong_credentials_are_said(url: str, opened: Opened) -> None:
    """A password that is wrong, or has expired, is an error that no retry mends."""
    wrong = make_url(url).set(password="wrong-secret").render_as_string(hide_password=False)

    with pytest.raises(SinkError, match="credentials were refused") as caught:
        apply(opened(wrong), update(1, {"user_id": "u1"}, device("a1")))

    assert not caught.value.retryable
    assert "wrong-secret" not in str(caught.value) + repr(caught.value)
    # redshift_connector leaves the socket of a login that was refused to the collector.
    del caught
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_what_may_not_be_done_names_the_grant(url: str, opened: Opened, database: Database) -> None:
    """Without UPDATE on the table nothing is written, and the error has the GRANT to run."""
    database.write("events", [row("m1", "a1", 1)])
    grants = ("SELECT ON events", "CREATE ON SCHEMA public")
    with database.server.new_role(database.name, *grants) as (user, password):
        as_user = make_url(url).set(username=user, password=password)
        sink = opened(as_user.render_as_string(hide_password=False))

        with pytest.raises(SinkReadOnlyError, match="GRANT SELECT, UPDATE ON") as caught:
            apply(sink, update(1, {"stitched_user_id": "u1"}, device("a1")))
        sink.close()

    assert not caught.value.written
    assert database.column("stitched_user_id") == {"m1": None}


def test_truths_in_a_url_are_truths() -> None:
    """`ssl=true` is no text: the driver would take it for no encryption."""
    read = _read_query(make_url("redshift://h/d?ssl=true&iam=True&timeout=5&region=eu-west-1"))

    assert read == {"ssl": True, "iam": True, "timeout": 5, "region": "eu-west-1"}


@pytest.mark.parametrize(
    ("name", "package"),
    [("psycopg2", "psycopg2-binary"), ("redshift_connector", "redshift-connector")],
)
def test_a_missing_driver_is_said(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    """A driver that is not installed is an error with the command that installs it."""
    monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(MissingDependencyError, match=f"pip install {package}"):
        open_sink(f"redshift+{name}://h/d")


@pytest.mark.parametrize("url", ["redshift+psycopg://h/d", "redshift+x://h/d", "redshift:x"])
def test_another_driver_is_refused(url: str) -> None:
    """A URL with another driver is refused, by an error that shows the two."""
    with pytest.raises(ConfigurationError, match="redshift\\+psycopg2"):
        open_sink(url)
