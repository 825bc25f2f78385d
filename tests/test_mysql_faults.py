"""
Several processes and a MariaDB at once, and what is left when some of them are killed.

How often says `sink_races`.
"""

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

import recognition.sinks.mysql
from applying import Worker
from mariadb import GivenServer
from postgres import Proxy
from recognition.planner import plan_updates
from recognition.sinks import open_sink
from recognition.sinks.mysql import MysqlSink
from sink_races import (
    POINTS,
    RUNS,
    expect,
    inserting,
    insist,
    make_plans,
    make_rows,
    make_window,
)
from test_mysql import Database, _await_gone

# Each row is a transaction of its own, as a pipeline's would be.
_INSERTER = """
import json, sys, pymysql
connection = pymysql.connect(**json.loads(sys.argv[1]), autocommit=True)
print("ready", flush=True)
for line in sys.stdin:
    statement, rows = json.loads(line)
    with connection.cursor() as cursor:
        for row in rows:
            cursor.execute(statement, row)
    print(len(rows), flush=True)
"""


def _make_table(database: Database, table: str, rows: Sequence[Mapping[str, object]]) -> None:
    types = {
        "text": "VARCHAR(64)",
        "time": "DATETIME(6)",
        "integer": "BIGINT",
        "float": "DOUBLE",
        "boolean": "BOOLEAN",
    }
    database.write(table, rows, types=types)
    database.run(f"ALTER TABLE {table} ADD INDEX (anonymous_id)")


def _inserter(database: Database) -> AbstractContextManager[subprocess.Popen[str]]:
    server = database.server
    return inserting(
        _INSERTER,
        host=server.host,
        port=server.port,
        user=server.user,
        password=server.password,
        database=database.name,
    )


@pytest.fixture
def database(mariadb: GivenServer) -> Iterator[Database]:
    """An empty database."""
    with mariadb.database("CHARACTER SET utf8mb4") as name:
        yield Database(mariadb, name)


def _deadlocks(database: Database) -> int:
    ((_, count),) = database.run("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'")
    return int(count)


@pytest.mark.timeout(300 + 10 * RUNS)
def test_processes_with_overlapping_windows_and_a_pipeline_that_inserts(
    database: Database,
) -> None:
    """Two sinks or four, and a process that inserts: no deadlock, no lost update, in any run."""
    before = _deadlocks(database)
    with ExitStack() as open_things:
        workers = [open_things.enter_context(Worker(database.url)) for _ in range(4)]
        inserter = open_things.enter_context(_inserter(database))
        assert inserter.stdin is not None
        assert inserter.stdout is not None
        for run in range(RUNS):
            random = Random(run)
            table = f"events_{run}"
            versioned = run % 2 == 1
            column = "user_id" if versioned else "stitched_user_id"
            window = make_window(random, table, versioned)
            rows = make_rows()
            random.shuffle(rows)
            there, later = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            _make_table(database, table, there)
            insert = (
                f"INSERT INTO {table} (message_id, anonymous_id, timestamp) VALUES (%s, %s, %s)"
            )
            lines = [
                [r["message_id"], r["anonymous_id"], f"{r['timestamp']:%Y-%m-%d %H:%M:%S}"]
                for r in later
            ]

            busy = workers[: 2 if run % 4 < 2 else 4]
            for worker in busy:  # all of the window, and half of it twice
                worker.begin(make_plans(random, window))
            inserter.stdin.write(json.dumps([insert, lines]) + "\n")
            inserter.stdin.flush()
            for worker in busy:
                worker.end()
            assert int(inserter.stdout.readline()) == len(later)

            expected = expect(window)
            found = database.column(column, table)
            missed = {r["message_id"] for r in later}
            assert len(found) == len(expected)
            assert {k: v for k, v in found.items() if k not in missed} == {
                k: v for k, v in expected.items() if k not in missed
            }, f"run {run}"
            # What was inserted meanwhile is met when the window is applied again.
            workers[run % 2].begin([window])
            workers[run % 2].end()
            assert database.column(column, table) == expected, f"run {run}"
    assert _deadlocks(database) == before


@pytest.mark.timeout(300 + 20 * POINTS)  # two processes are started for each point
def test_a_client_that_is_killed_at_any_point(database: Database) -> None:
    """SIGKILL at random points, then the same window by another process: rows as if undisturbed."""
    random = Random(1)
    survived = 0
    for point in range(POINTS):
        table = f"events_{point}"
        versioned = point % 2 == 1
        window = make_window(random, table, versioned)
        plans = make_plans(random, window)
        _make_table(database, table, make_rows())
        with Worker(database.url) as worker:
            worker.begin(plans)
            ended = threading.Thread(target=worker.process.stdout.readline)  # type: ignore[union-attr]
            ended.start()
            ended.join(random.random() * 0.15 * len(plans))
            survived += not ended.is_alive()
            worker.kill()
            ended.join(30)

        with Worker(database.url) as worker:
            worker.begin(plans)
            worker.end()

        column = "user_id" if versioned else "stitched_user_id"
        assert database.column(column, table) == expect(window), f"point {point}"
    assert survived < POINTS


@pytest.mark.timeout(300 + 10 * POINTS)
def test_a_connection_that_is_cut_at_any_point(database: Database) -> None:
    """KILL CONNECTION before or after any statement or at the commit: rows as if undisturbed."""
    random = Random(2)
    cut: list[str] = []
    with closing(open_sink(database.url, timeout=60)) as sink:
        assert isinstance(sink, MysqlSink)
        left: dict[str, int] = {}

        def strike(connection: sa.Connection, where: str) -> None:
            """Count down to the point, then have the server end this session."""
            left["statements"] = left.get("statements", 0) - 1
            if left["statements"] == 0:
                thread = connection.connection.dbapi_connection.thread_id()  # type: ignore[union-attr]
                database.run(f"KILL CONNECTION {thread}")
                _await_gone(database, thread)
                cut.append(where)

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
            sink.inline_rows = point // 2 % 2 * 100  # with a stage and without
            left["statements"] = random.randint(1, 16 if versioned else 28)
            insist(sink, window)

            column = "user_id" if versioned else "stitched_user_id"
            assert database.column(column, table) == expect(window), f"point {point}"
    assert len(cut) > POINTS // 2


@pytest.mark.timeout(300 + 10 * POINTS)
def test_a_network_that_breaks_at_any_point(database: Database) -> None:
    """A connection that is cut at any message, before or after it arrived: rows as if never."""
    random = Random(3)
    unknown = 0
    with Proxy(database.server) as proxy:
        url = database.server.url(database.name, port=proxy.port)
        with closing(open_sink(url, timeout=60)) as sink:
            assert isinstance(sink, MysqlSink)
            for point in range(POINTS):
                table = f"events_{point}"
                versioned = point % 2 == 1
                window = make_window(random, table, versioned, size=40)
                _make_table(database, table, make_rows())
                sink.inline_rows = point // 4 % 2 * 100  # with a stage and without
                if point % 4 < 2:
                    proxy.cut_at(b"\x03COMMIT", answered=random.random() < 0.5)
                else:
                    proxy.cut_after(random.randint(1, 20), answered=random.random() < 0.5)
                unknown += insist(sink, window)

                column = "user_id" if versioned else "stitched_user_id"
                assert database.column(column, table) == expect(window), f"point {point}"
    assert proxy.cuts > POINTS // 2
    assert unknown > POINTS // 4


def test_a_client_that_stands_still_in_a_transaction(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its locks end with its session, after a minute (a second here), and another one goes on.

    When it wakes it is told that a retry helps, and the rows are as if it had never stopped.
    """
    monkeypatch.setattr(recognition.sinks.mysql, "_IDLE", 1)
    window = make_window(Random(7), "events", False, size=40)
    plan = plan_updates(window)
    _make_table(database, "events", make_rows())
    stopped, wake = threading.Event(), threading.Event()
    began: list[float] = []
    with closing(open_sink(database.url)) as one, closing(open_sink(database.url)) as other:
        assert isinstance(one, MysqlSink)

        @sa.event.listens_for(one._engine, "after_cursor_execute")
        def stand_still(connection: sa.Connection, _: Any, statement: str, *rest: Any) -> None:
            if statement.startswith("UPDATE") and not stopped.is_set():
                began.append(time.monotonic())
                stopped.set()
                wake.wait(60)

        thread = threading.Thread(target=one.apply, args=(plan,))
        thread.start()
        assert stopped.wait(30)
        other.apply(plan)
        waited = time.monotonic() - began[0]
        found = database.column("stitched_user_id", "events")
        wake.set()
        thread.join(60)

    assert not thread.is_alive()
    assert 0.5 < waited < 40
    assert found == database.column("stitched_user_id", "events") == expect(window)
