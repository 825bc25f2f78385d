"""The sink for ClickHouse over HTTP: compression, errors, cut connections, dying workers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, cast

import clickhouse_connect
import pytest
from clickhouse_connect.driver.exceptions import ClickHouseError

import recognition.sinks.clickhouse
from applying import Worker
from chdb_server import Server
from recognition.errors import (
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
)
from recognition.planner import Plan, plan_updates
from recognition.sinks import Applied, open_sink
from recognition.testing.sinks import device, row, unknown, update
from sink_races import expect, make_plans, make_rows, make_window

every = pytest.mark.skipif(
    os.environ.get("RECOGNITION_TEST_CLICKHOUSE") != "all",
    reason="RECOGNITION_TEST_CLICKHOUSE=all runs it",
)

COLUMNS = (
    "message_id String, anonymous_id Nullable(String), user_id Nullable(String),"
    " stitched_user_id Nullable(String), timestamp DateTime64(6, 'UTC'),"
    " recognition_version Nullable(Int64)"
)
SETTINGS = (
    "ENGINE = MergeTree PARTITION BY toYYYYMMDD(timestamp) ORDER BY message_id"
    " SETTINGS enable_block_number_column = 1, enable_block_offset_column = 1"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), "s3cret") as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    """A way around the sink, and a table of its own database."""
    client = clickhouse_connect.get_client(
        host="127.0.0.1", port=server.port, username="default", password=server.password,
        autogenerate_session_id=False,
    )  # fmt: skip
    client.command("DROP DATABASE IF EXISTS test SYNC")
    client.command("CREATE DATABASE test")
    client.command(f"CREATE TABLE test.events ({COLUMNS}) {SETTINGS}")
    yield client
    client.close()


KEYED = (
    "ENGINE = MergeTree PARTITION BY toYYYYMMDD(timestamp)"
    " ORDER BY (user_id, stitched_user_id, message_id)"
    " SETTINGS enable_block_number_column = 1, enable_block_offset_column = 1,"
    " allow_nullable_key = 1"
)


@pytest.fixture
def keyed(client: Any) -> Any:
    """The same, with the table sorted by what is set."""
    client.command("DROP TABLE test.events SYNC")
    client.command(f"CREATE TABLE test.events ({COLUMNS}) {KEYED}")
    return client


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that does nothing for half a second is taken for dead."""
    monkeypatch.setattr(recognition.sinks.clickhouse, "_IDLE", 0.5)


def fill(client: Any, rows: Any) -> None:
    names = ["message_id", "anonymous_id", "timestamp"]
    lists = [[each[name] for name in names] for each in rows]
    client.insert("events", lists, database="test", column_names=names)


def users(client: Any, column: str = "user_id") -> dict[str, object]:
    return dict(client.query(f"SELECT message_id, {column} FROM test.events").result_rows)


def left(client: Any) -> list[str]:
    """What windows have made and not dropped."""
    found = client.query(
        "SELECT name FROM system.tables WHERE database = 'test' AND name LIKE 'recognition%'"
        " AND name != 'recognition_ledger' AND name NOT LIKE 'recognition_broken%'"
    )
    return [name for (name,) in found.result_rows]


def owner(sequence: int, user: str, anonymous_id: str = "a1") -> Any:
    return update(sequence, {"user_id": user}, device(anonymous_id), unknown(), versioned=True)


@pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip", "false"])
def test_rows_travel_compressed_or_not(server: Server, client: Any, compress: str) -> None:
    """Values arrive by each compression of the client, and the second time nothing changes."""
    fill(client, [row("m1", "O'Brien \u00fc\n\\", 1), row("m2", "a2", 2)])
    sink = open_sink(server.url("test", compress=compress))
    plan = plan_updates([owner(1, "u'\\1\t", "O'Brien \u00fc\n\\")])

    applied, again = sink.apply(plan), sink.apply(plan)
    sink.close()

    assert users(client) == {"m1": "u'\\1\t", "m2": None}
    assert (applied.rows_changed, again.rows_changed, again.rows_matched) == (1, 0, 1)
    assert left(client) == []


@pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip", "false"])
def test_more_rows_travel_than_a_block_holds(server: Server, client: Any, compress: str) -> None:
    """The client cuts what is large into blocks; the rows of all of them are staged."""
    keys = [f"{n:0300}" for n in range(10_000)]
    fill(client, [row("m1", keys[0], 1), row("m2", keys[-1], 2)])
    sink = open_sink(server.url("test", compress=compress))
    plan = plan_updates([owner(n, f"u{n}", key) for n, key in enumerate(keys, 1)])

    applied = sink.apply(plan)
    sink.close()

    assert applied.rows_changed == 2
    assert users(client) == {"m1": "u1", "m2": "u10000"}


def test_who_may_not_write_is_told_the_grants(server: Server, client: Any) -> None:
    """A user who may only read gets an error that names the grants; nothing was written."""
    sink = open_sink(server.url("test", "reader"))

    with pytest.raises(SinkReadOnlyError, match=r"GRANT SELECT, INSERT, CREATE TABLE") as caught:
        sink.apply(plan_updates([owner(1, "u1")]))
    sink.close()

    assert (caught.value.written, caught.value.retryable) == (False, False)


def test_a_wrong_password_is_said_and_not_shown(server: Server) -> None:
    """The login's error names neither the password nor the URL, its cause neither."""
    url = server.url("test").replace("s3cret", "hunter2")

    with pytest.raises(SinkError, match="refused the login") as caught:
        open_sink(url).apply(plan_updates([owner(1, "u1")]))

    shown = f"{caught.value!r} {caught.value.__cause__!r}"
    assert "hunter2" not in shown
    assert not caught.value.retryable


def test_a_server_that_is_not_there_may_come_back(tmp_path: Path) -> None:
    """Nothing was written, and a retry may help."""
    sink = open_sink("clickhouse://127.0.0.1:9/test")

    with pytest.raises(SinkUnavailableError, match="cannot be reached") as caught:
        sink.apply(plan_updates([owner(1, "u1")]))

    assert (caught.value.written, caught.value.retryable) == (False, True)


@pytest.mark.parametrize("kind", ["drop", "cut"])
@pytest.mark.parametrize("pattern", ["UPDATE `", "CREATE TABLE"])
def test_a_cut_connection_converges(server: Server, client: Any, kind: str, pattern: str) -> None:
    """
    Cut before or after a statement was carried out, the error tells, and again is enough.

    On a connection that it had kept open the driver sends some statements again by itself.
    """
    fill(client, [row("m1", "a1", 1), row("m2", "a2", 2)])
    sink = open_sink(server.url("test"))
    server.fault(kind, pattern)

    error = None
    try:
        sink.apply(plan_updates([owner(2, "u1")]))
    except SinkError as caught:
        error = caught
    applied = sink.apply(plan_updates([owner(2, "u1")]))
    sink.close()

    assert server.faulted()
    assert error is None or error.retryable
    assert error is None or pattern != "UPDATE `" or error.written is None
    assert users(client) == {"m1": "u1", "m2": None}
    assert applied.rows_matched == 1
    assert left(client) == []


@pytest.mark.parametrize("pattern", ["INSERT INTO", "RENAME TABLE", "DROP TABLE"])
def test_what_is_cut_aside_of_the_rows_stops_nothing(
    server: Server, client: Any, pattern: str
) -> None:
    """The driver stages again what was cut; a window that cannot clean up leaves it to the next."""
    fill(client, [row("m1", "a1", 1), row("m2", "a2", 2)])
    sink = open_sink(server.url("test"), timeout=30)
    server.fault("cut" if pattern == "INSERT INTO" else "drop", pattern)

    applied = sink.apply(plan_updates([owner(2, "u1")]))
    sink.apply(plan_updates([owner(3, "u2", "a2")]))
    sink.close()

    assert server.faulted()
    assert applied.rows_changed == 1
    assert users(client) == {"m1": "u1", "m2": "u2"}
    assert left(client) == []


def test_a_statement_that_takes_too_long_may_have_happened(server: Server, client: Any) -> None:
    """After the time for a statement its outcome is not known, and again is enough."""
    fill(client, [row("m1", "a1", 1), row("m2", "a2", 1)])
    sink = open_sink(server.url("test"), statement_timeout=8.0)
    server.fault("hang", "UPDATE `")

    with pytest.raises(OutcomeUnknownError) as caught:
        sink.apply(plan_updates([owner(2, "u1")]))
    sink.apply(plan_updates([owner(2, "u1")]))
    sink.close()

    assert caught.value.written is None
    assert server.faulted()
    assert users(client) == {"m1": "u1", "m2": None}


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        ("401", SinkError, "HTTP 401: it wants another login"),
        ("404", SinkError, "HTTP 404: it is no answer of a ClickHouse server"),
        ("413", SinkError, "HTTP 413: the request is too large for it"),
        ("502", OutcomeUnknownError, "HTTP 502: it could not reach the server, or lost it"),
    ],
)
def test_an_answer_of_a_proxy_is_no_lost_connection(
    server: Server, client: Any, status: str, kind: type[SinkError], said: str
) -> None:
    """The error names the status and what it means, and whether again can help; no page."""
    fill(client, [row("m1", "a1", 1)])
    sink = open_sink(server.url("test"))
    server.fault(status, "UPDATE `")

    with pytest.raises(kind, match=said) as caught:
        sink.apply(plan_updates([owner(2, "u1")]))
    sink.apply(plan_updates([owner(2, "u1")]))
    sink.close()

    unknown_outcome = kind is OutcomeUnknownError
    assert server.faulted()
    assert type(caught.value) is kind
    assert caught.value.retryable is unknown_outcome
    assert caught.value.written is (None if unknown_outcome else False)
    assert "a1" not in str(caught.value)
    assert users(client) == {"m1": "u1"}
    assert left(client) == []


def test_a_fault_is_over_when_it_has_happened(server: Server, client: Any) -> None:
    """Of the stand-in: a statement that hung, and ends, is not taken for the next fault."""
    server.fault("hang", "SELECT 1", seconds=1.0)
    hanging = threading.Thread(target=_ask_in_vain, args=(server,))
    hanging.start()
    while not server.faulted():
        time.sleep(0.02)

    server.fault("drop", "SELECT 2 that nobody asks")
    hanging.join()
    time.sleep(0.2)

    assert not server.faulted()


def _ask_in_vain(server: Server) -> None:
    client = clickhouse_connect.get_client(
        host="127.0.0.1", port=server.port, username="default", password=server.password,
    )  # fmt: skip
    with suppress(ClickHouseError):
        client.command("CREATE TABLE test.one ENGINE = Memory AS SELECT 1")
    client.close()


def apply_as_a_worker(sink: Any, plan: Plan) -> Applied:
    """Whoever delivers tries again what may be tried again."""
    for _ in range(4):
        try:
            applied: Applied = sink.apply(plan)
        except SinkError as exc:
            if not exc.retryable:
                raise
            continue
        return applied
    return cast(Applied, sink.apply(plan))


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("pattern", ["CREATE TABLE", "INSERT INTO", "UPDATE `", "DROP TABLE"])
def test_a_worker_that_dies_is_cleaned_up_after(
    server: Server, client: Any, pattern: str, versioned: bool
) -> None:
    """SIGKILL after any statement: the next worker takes the lock, and nothing is left."""
    random = Random(7)
    window = make_window(random, "events", versioned, size=30)
    fill(client, make_rows())
    with Worker(server.url("test")) as worker:
        # What writes to the target, and what cleans up, is one statement each.
        often = pattern in ("CREATE TABLE", "INSERT INTO")
        server.fault("hang", pattern, skip=random.randrange(2) if often else 0)
        worker.begin([window])
        while not server.faulted():
            time.sleep(0.02)
        worker.kill()

    sink = open_sink(server.url("test"), timeout=30)
    applied = sink.apply(plan_updates(window))
    sink.close()

    column = "user_id" if versioned else "stitched_user_id"
    assert applied.rejected == ()
    assert users(client, column) == expect(window)
    assert left(client) == []


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("INSERT INTO `test`.`events`", "drop"),
        ("INSERT INTO `test`.`events`", "cut"),
        ("DELETE FROM", "cut"),
        pytest.param("DELETE FROM", "drop", marks=every),
        pytest.param("RENAME TABLE", "drop", marks=every),
        pytest.param("RENAME TABLE", "cut", marks=every),
    ],
)
def test_a_connection_that_is_cut_while_rows_are_moved(
    server: Server, keyed: Any, pattern: str, kind: str
) -> None:
    """Whether the driver sends a statement again or not: each row is there once."""
    fill(keyed, [row("m1", "a1", 1), row("m2", "a2", 2), row("m1", "a1", 1)])
    sink = open_sink(server.url("test"), timeout=30)
    server.fault(kind, pattern)

    applied = apply_as_a_worker(sink, plan_updates([owner(2, "u1")]))
    again = sink.apply(plan_updates([owner(2, "u1")]))
    sink.close()

    found = keyed.query("SELECT message_id, user_id FROM test.events ORDER BY 1").result_rows
    assert server.faulted()
    assert found == [("m1", "u1"), ("m1", "u1"), ("m2", None)]
    assert (applied.rejected, again.rows_changed, again.rows_matched) == ((), 0, 2)
    assert left(keyed) == []


@pytest.mark.parametrize("pattern", ["INSERT INTO `test`.`events`", "DELETE FROM"])
def test_a_worker_that_dies_while_it_moves_rows(server: Server, keyed: Any, pattern: str) -> None:
    """SIGKILL between the new rows and the old ones: the next worker completes the move."""
    random = Random(5)
    window = make_window(random, "events", True, size=30)
    fill(keyed, make_rows())
    with Worker(server.url("test")) as worker:
        server.fault("hang", pattern)
        worker.begin([window])
        while not server.faulted():
            time.sleep(0.02)
        worker.kill()

    sink = open_sink(server.url("test"), timeout=30)
    apply_as_a_worker(sink, plan_updates(window))
    sink.close()

    assert keyed.query("SELECT count() FROM test.events").result_rows == [(len(make_rows()),)]
    assert users(keyed) == expect(window)
    assert left(keyed) == []


def test_a_worker_that_only_slept_cannot_write_any_more(server: Server, client: Any) -> None:
    """Its lock was broken and its staged rows are gone: its statement fails, and may be retried."""
    fill(client, [row("m1", "a1", 1), row("m2", "a2", 1)])
    with Worker(server.url("test")) as sleeper:
        server.fault("pause", "INSERT INTO")
        sleeper.begin([[owner(1, "u1"), owner(2, "u2", "a2")]])
        while not server.faulted():
            time.sleep(0.02)
        sleeper.process.send_signal(signal.SIGSTOP)
        server.resume()

        sink = open_sink(server.url("test"), timeout=30)
        sink.apply(plan_updates([owner(3, "u3")]))
        between_times = users(client)
        sleeper.process.send_signal(signal.SIGCONT)
        sleeper.end()
        sink.close()

    assert between_times == {"m1": "u3", "m2": None}
    assert users(client) == {"m1": "u3", "m2": "u2"}
    assert left(client) == []


@pytest.mark.parametrize(
    ("versioned", "settings"),
    [(True, SETTINGS), (False, SETTINGS), pytest.param(True, KEYED, marks=every)],
)
def test_workers_that_race_leave_what_the_last_update_says(
    server: Server, client: Any, versioned: bool, settings: str
) -> None:
    """Two workers with a part of the updates each, in any order and plans of any size."""
    random = Random(11)
    client.command("DROP TABLE test.events SYNC")
    client.command(f"CREATE TABLE test.events ({COLUMNS}) {settings}")
    window = make_window(random, "events", versioned, size=40)
    fill(client, make_rows())
    halves = [make_plans(random, window[n::2]) for n in range(2)]

    with Worker(server.url("test")) as one, Worker(server.url("test")) as other:
        one.begin(halves[0])
        other.begin(halves[1])
        one.end()
        other.end()

    column = "user_id" if versioned else "stitched_user_id"
    assert client.query("SELECT count() FROM test.events").result_rows == [(len(make_rows()),)]
    assert users(client, column) == expect(window)
    assert left(client) == []


def test_threads_share_a_sink(server: Server, client: Any) -> None:
    """Plans of several threads are applied one after the other."""
    fill(client, [row(f"m{n}", f"a{n}", n) for n in range(6)])
    sink = open_sink(server.url("test"), timeout=60)
    threads = [
        threading.Thread(target=sink.apply, args=(plan_updates([owner(n, f"u{n}", f"a{n}")]),))
        for n in range(6)
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()

    assert users(client) == {f"m{n}": f"u{n}" for n in range(6)}
