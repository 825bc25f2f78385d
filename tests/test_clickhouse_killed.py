"""
The engine in a process that is killed: SIGKILL before and after each statement, then once more.

Each case is two processes, ``python test_clickhouse_killed.py DIRECTORY STRATEGY [STATEMENT
WHEN]``: the first one makes a table, applies a window and dies; the second one opens the same
directory, applies the window again, and prints what the table holds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recognition.planner import plan_updates
from recognition.sinks import open_sink
from recognition.testing.sinks import at, device, unknown, update

EVERY = os.environ.get("RECOGNITION_TEST_CLICKHOUSE") == "all"

STATEMENTS = {
    "update": ["CREATE TABLE", "UPDATE ", "ALTER TABLE", "RENAME TABLE", "DROP TABLE"],
    "alter": ["CREATE TABLE", "ALTER TABLE", "RENAME TABLE", "DROP TABLE"],
    "insert": ["CREATE TABLE", "INSERT INTO `test`.`recognition", "INSERT INTO `test`.`events`",
               "RENAME TABLE", "DROP TABLE"],
    "delete-and-insert": ["CREATE TABLE", "INSERT INTO `test`.`recognition", "RENAME TABLE",
                          "INSERT INTO `test`.`events`", "DELETE FROM", "ALTER TABLE",
                          "DROP TABLE"],
    "replace-partition": ["CREATE TABLE", "INSERT INTO `test`.`recognition", "ALTER TABLE",
                          "RENAME TABLE", "DROP TABLE"],
}  # fmt: skip

#: Between the new rows and the old ones, and after a statement that nobody was told of.
FEW = {
    ("update", "UPDATE ", "after"),
    ("delete-and-insert", "INSERT INTO `test`.`events`", "after"),
    ("replace-partition", "ALTER TABLE", "after"),
}

ROWS = [(f"m{n % 8}", f"a{n % 3}", at(n % 8)) for n in range(20)]


def main() -> None:
    """One of the two processes."""
    import clickhouse_connect

    directory, strategy, *dies = sys.argv[1:]
    client: Any = clickhouse_connect.get_client(interface="chdb", path=directory)
    versioned = strategy == "insert"
    if dies:
        client.command("CREATE DATABASE test")
        engine = "ReplacingMergeTree(ver)" if versioned else "MergeTree"
        moves = strategy in ("delete-and-insert", "replace-partition")
        key = "user_id, message_id" if moves else "message_id"
        client.command(
            "CREATE TABLE test.events (message_id String, anonymous_id String, user_id String,"
            " timestamp DateTime64(6, 'UTC'), recognition_version Nullable(Int64), ver UInt8)"
            f" ENGINE = {engine} PARTITION BY toSecond(timestamp) % 2 ORDER BY ({key})"
            " SETTINGS enable_block_number_column = 1, enable_block_offset_column = 1"
        )
        names = ["message_id", "anonymous_id", "timestamp"]
        client.insert("events", ROWS, database="test", column_names=names)
    # Nothing else keeps an engine open whose directory the sink has.
    sink: Any = open_sink(
        f"chdb://{directory}?database=test", strategy=strategy, patches="always", timeout=20,
        quiet=0,
    )  # fmt: skip
    if dies:
        statement, when = dies

        def run(text: Any, *args: Any, **more: Any) -> None:
            here = text.render()[0].startswith(statement)
            if here and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            type(sink._server).run(sink._server, text, *args, **more)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

        sink._server.run = run
    window = [
        update(n, {"user_id": f"u{n}"}, device(f"a{n}"), unknown(), versioned=True) for n in (1, 2)
    ]
    sink.apply(plan_updates(window))
    again = sink.apply(plan_updates(window))
    final = "FINAL" if versioned else ""
    found = client.query(f"SELECT message_id, anonymous_id, user_id FROM test.events {final}")
    made = client.query(
        "SELECT name FROM system.tables WHERE database = 'test' AND name LIKE 'recognition_%'"
        " AND name NOT LIKE 'recognition_broken%' AND name != 'recognition_ledger'"
    )
    told = [sorted(found.result_rows), made.result_rows, again.rows_changed]
    sys.stdout.write(json.dumps(told))
    sink.close()
    client.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("strategy", "statement", "when"),
    [
        pytest.param(
            *case,
            marks=[]
            if EVERY or case in FEW
            else pytest.mark.skip(reason="needs .._CLICKHOUSE=all"),
        )
        for case in (
            (strategy, statement, when)
            for strategy, statements in STATEMENTS.items()
            for statement in statements
            for when in ("before", "after")
        )
    ],
)
def test_a_process_that_is_killed_leaves_what_again_completes(
    tmp_path: Path, strategy: str, statement: str, when: str
) -> None:
    """With the process the engine dies; the next one leaves each row once, with its owner."""
    script = [sys.executable, __file__, str(tmp_path / "engine"), strategy]

    killed = subprocess.run(
        [*script, statement, when], check=False, capture_output=True, timeout=180
    )
    again = subprocess.run(script, check=False, capture_output=True, timeout=180, text=True)

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert again.returncode == 0, again.stderr
    owners = {"a0": "", "a1": "u1", "a2": "u2"}
    expected = sorted([message, device, owners[device]] for message, device, _ in ROWS)
    if strategy == "insert":  # of the rows with one key one stands
        last = {message: [message, device, owners[device]] for message, device, _ in ROWS}
        expected = sorted(last.values())
    assert json.loads(again.stdout) == [expected, [], 0]


if __name__ == "__main__":
    main()
