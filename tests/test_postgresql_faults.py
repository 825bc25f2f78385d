"""Several processes and a PostgreSQL at once, and what is left when some of them are killed."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

import recognition.sinks.postgresql
from applying import Worker
from postgres import GivenServer, Proxy
from recognition.sinks import open_sink
from recognition.sinks.postgresql import PostgresqlSink
from recognition.testing.sinks import update
from sink_races import POINTS, RUNS, expect, inserting, insist, make_plans, make_rows, make_window
from test_postgresql import Database

# Each row is a transaction of its own, as a pipeline's would be.
_INSERTER = """
import json, sys, psycopg
connection = psycopg.connect(**json.loads(sys.argv[1]), autocommit=True)
print("ready", flush=True)
for line in sys.stdin:
    statement, rows = json.loads(line)
    for row in rows:
        connection.execute(statement, row)
    print(len(rows), flush=True)
"""


@pytest.fixture
def database(postgres: GivenServer) -> Iterator[Database]:
    """An empty database."""
    with postgres.database() as name:
        yield Database(postgres, name)


def _make_table(database: Database, table: str, rows: Sequence[Mapping[str, object]]) -> None:
    database.write(table, rows)
    database.run(f"CREATE INDEX ON {table} (anonymous_id)")


def _inserter(database: Database) -> AbstractContextManager[subprocess.Popen[str]]:
    server = database.server
    return inserting(
        _INSERTER,
        host=server.host,
        port=server.port,
        user=server.user,
        password=server.password,
        dbname=database.name,
    )


def _deadlocks(database: Database) -> int:
    with database.server.connect(database.name) as connection:
        connection.execute("SELECT pg_stat_clear_snapshot()")
        ((count,),) = connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchall()
    return int(count)


def _column(versioned: bool) -> str:
    return "user_id" if versioned else "stitched_user_id"


@pytest.mark.timeout(300 + 10 * RUNS)
def test_processes_with_overlapping_windows_and_a_pipeline_that_inserts(
    database: Database,
) -> None:
    """Two sinks or four, and a process that inserts: no deadlock, no lost update, in any run."""
    with ExitStack() as open_things:
        workers = [open_things.enter_context(Worker(database.url)) for _ in range(4)]
        inserter = open_things.enter_context(_inserter(database))
        assert inserter.stdin is not None
        assert inserter.stdout is not None
        for run in range(RUNS):
            random = Random(run)
            table = f"events_{run}"
            versioned = run % 2 == 1
            window = make_window(random, table, versioned)
            rows = make_rows()
            random.shuffle(rows)
            there, later = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            _make_table(database, table, there)
            insert = (
                f"INSERT INTO {table} (message_id, anonymous_id, timestamp) VALUES (%s, %s, %s)"
            )
            lines = [[r["message_id"], r["anonymous_id"], str(r["timestamp"])] for r in later]

            busy = workers[: 2 if run % 4 < 2 else 4]
            for worker in busy:  # all of the window, each in an order of its own
                worker.begin(make_plans(random, window))
            inserter.stdin.write(json.dumps([insert, lines]) + "\n")
            inserter.stdin.flush()
            for worker in busy:
                worker.end()
            assert int(inserter.stdout.readline()) == len(later)

            expected = expect(window)
            found = database.column(_column(versioned), table)
            missed = {r["message_id"] for r in later}
            assert len(found) == len(expected)
            assert {k: v for k, v in found.items() if k not in missed} == {
                k: v for k, v in expected.items() if k not in missed
            }, f"run {run}"
            # What was inserted meanwhile is met when the window is applied again.
            workers[run % 2].begin([window])
            workers[run % 2].end()
            assert database.column(_column(versioned), table) == expected, f"run {run}"
    assert _deadlocks(database) == 0


def test_plans_of_several_tables_do_not_deadlock(database: Database) -> None:
    """Two processes whose plans name the same tables in opposite orders take their turns."""
    tables = ["events", "public.Visits", "visits_2"]
    for table in ("events", "Visits", "visits_2"):
        _make_table(database, table, make_rows()) if table != "Visits" else database.write(
            table, make_rows()
        )
    window = [
        update(n, {"stitched_user_id": f"u{n}"}, each.where[0], table=tables[n % 3])
        for n, each in enumerate(make_window(Random(1), "events", False), start=1)
    ]
    with Worker(database.url) as one, Worker(database.url) as other:
        one.begin([window[n : n + 10] for n in range(0, 120, 10)])
        other.begin([window[n : n + 15][::-1] for n in range(105, -1, -15)])
        one.end()
        other.end()

    for table, asked in zip(("events", '"Visits"', "visits_2"), tables, strict=True):
        last = {u.where[0].value: u for u in window if u.table == asked}
        assert database.run(
            f"SELECT DISTINCT anonymous_id, stitched_user_id FROM {table}"
            " WHERE stitched_user_id IS NOT NULL ORDER BY 1"
        ) == [(key, u.set["stitched_user_id"]) for key, u in sorted(last.items())]
    assert _deadlocks(database) == 0


@pytest.mark.timeout(300 + 5 * POINTS)
def test_a_client_that_is_killed_at_any_point(database: Database) -> None:
    """SIGKILL at random points, then the same window by another process: rows as if undisturbed."""
    random = Random(1)
    survived = 0
    worker = Worker(database.url)
    try:
        for point in range(POINTS):
            table = f"events_{point}"
            versioned = point % 2 == 1
            window = make_window(random, table, versioned)
            plans = make_plans(random, window)
            _make_table(database, table, make_rows())
            worker.begin(plans)
            ended = threading.Thread(target=worker.process.stdout.readline)  # type: ignore[union-attr]
            ended.start()
            ended.join(random.random() * 0.08 * len(plans))
            survived += not ended.is_alive()
            worker.kill()
            ended.join(30)
            worker.__exit__()

            worker = Worker(database.url)
            worker.begin(plans)
            worker.end()

            found = database.column(_column(versioned), table)
            assert found == expect(window), f"point {point}"
    finally:
        worker.__exit__()
    assert survived < POINTS


@pytest.mark.timeout(300 + 5 * POINTS)
def test_a_session_that_is_ended_at_any_point(database: Database) -> None:
    """`pg_terminate_backend` before, in, after any statement or at the commit: rows as if never."""
    random = Random(2)
    ended: list[str] = []
    with closing(open_sink(database.url, timeout=60)) as sink:
        assert isinstance(sink, PostgresqlSink)
        left = {"events": 0}
        threads: list[threading.Thread] = []

        def strike(connection: sa.Connection, where: str) -> None:
            """Count down to the point, then have the server end this session."""
            left["events"] -= 1
            if left["events"] == 0:
                pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
                ended.append(where)
                if where.startswith("before UPDATE") and random.random() < 0.8:
                    threads.append(threading.Thread(target=_end_when_active, args=(database, pid)))
                    threads[-1].start()
                else:
                    database.run("SELECT pg_terminate_backend(%s, 30000)", pid)

        @sa.event.listens_for(sink._engine, "before_cursor_execute")
        def before(connection: sa.Connection, _: Any, statement: str, *rest: Any) -> None:
            strike(connection, f"before {statement[:6]}")

        @sa.event.listens_for(sink._engine, "after_cursor_execute")
        def after(connection: sa.Connection, _: Any, statement: str, *rest: Any) -> None:
            strike(connection, f"after {statement[:6]}")

        @sa.event.listens_for(sink._engine, "commit")
        def commit(connection: sa.Connection) -> None:
            strike(connection, "commit")

        for point in range(POINTS):
            table = f"events_{point}"
            versioned = point % 2 == 1
            window = make_window(random, table, versioned, size=40)
            _make_table(database, table, make_rows())
            # So that an UPDATE takes long enough to be met in it.
            database.run(
                "CREATE OR REPLACE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS"
                " 'BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END'"
            )
            database.run(
                f"CREATE TRIGGER slow AFTER UPDATE ON {table}"
                " FOR EACH STATEMENT EXECUTE FUNCTION slow()"
            )
            sink.inline_rows = point // 2 % 2 * 100  # with a stage and without
            left["events"] = random.randint(1, 14 if versioned else 20)
            insist(sink, window)
            for thread in threads:
                thread.join(30)

            found = database.column(_column(versioned), table)
            assert found == expect(window), f"point {point}"
    assert len(ended) > POINTS // 2


def test_a_client_that_stands_still_in_a_transaction(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its locks end with its session, after a minute (a second here), and another one goes on.

    When it wakes it is told that a retry helps, and the rows are as if it had never stopped.
    """
    monkeypatch.setattr(recognition.sinks.postgresql, "_IDLE", 1.0)
    window = make_window(Random(7), "events", False, size=40)
    _make_table(database, "events", make_rows())
    stopped, wake = threading.Event(), threading.Event()
    began: list[float] = []
    with closing(open_sink(database.url)) as one, closing(open_sink(database.url)) as other:
        assert isinstance(one, PostgresqlSink)

        @sa.event.listens_for(one._engine, "after_cursor_execute")
        def stand_still(connection: sa.Connection, _: Any, statement: str, *rest: Any) -> None:
            if statement.startswith("UPDATE") and not stopped.is_set():
                began.append(time.monotonic())
                stopped.set()
                wake.wait(60)

        thread = threading.Thread(target=insist, args=(one, window))
        thread.start()
        assert stopped.wait(30)
        insist(other, window)
        waited = time.monotonic() - began[0]
        found = database.column(_column(False), "events")
        wake.set()
        thread.join(60)

    assert not thread.is_alive()
    assert 0.5 < waited < 40
    assert found == database.column(_column(False), "events") == expect(window)


def _end_when_active(database: Database, pid: int) -> None:
    """End a session while it carries out an UPDATE."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not database.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid = %s AND state = 'active' AND query LIKE 'UPDATE%%'",
        pid,
    ):
        pass


@pytest.mark.timeout(300 + 5 * POINTS)
def test_a_network_that_breaks_at_any_point(database: Database) -> None:
    """A connection that is cut at any message, before or after it arrived: rows as if never."""
    random = Random(3)
    unknown = 0
    with Proxy(database.server) as proxy:
        url = database.server.url(database.name, port=proxy.port, sslmode="disable")
        with closing(open_sink(url, timeout=60)) as sink:
            assert isinstance(sink, PostgresqlSink)
            for point in range(POINTS):
                table = f"events_{point}"
                versioned = point % 2 == 1
                window = make_window(random, table, versioned, size=40)
                _make_table(database, table, make_rows())
                sink.inline_rows = point // 4 % 2 * 100  # with a stage and without
                if point % 4 < 2:
                    proxy.cut_at(b"COMMIT\0", answered=random.random() < 0.5)
                else:
                    proxy.cut_after(random.randint(1, 20), answered=random.random() < 0.5)
                unknown += insist(sink, window)

                found = database.column(_column(versioned), table)
                assert found == expect(window), f"point {point}"
    assert proxy.cuts > POINTS // 2
    assert unknown > POINTS // 4
