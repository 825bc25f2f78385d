"""
Run the command line and die by SIGKILL at a chosen step; started as a process by the tests.

    python crashing.py STEP COUNT_FILE ARGUMENTS...

A step is one SQL statement that this process begins, on the graph or on the sink, in the order in
which they come: between two of them, and inside the transactions they make up, the process can
die. ``STEP`` 0 lives. The number of steps is written to ``COUNT_FILE`` by a process that lives.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

DIE_AT = int(sys.argv[1])
steps = 0
connect = sqlite3.connect


def count(statement: str) -> None:
    global steps
    del statement
    steps += 1
    if steps == DIE_AT:
        os.kill(os.getpid(), signal.SIGKILL)


def connect_counted(*args: Any, **options: Any) -> sqlite3.Connection:
    connection: sqlite3.Connection = connect(*args, **options)
    connection.set_trace_callback(count)
    return connection


sqlite3.connect = connect_counted
sqlite3.dbapi2.connect = connect_counted  # type: ignore[attr-defined]

if __name__ == "__main__":
    from recognition.cli import main

    code = main(sys.argv[3:])
    Path(sys.argv[2]).write_text(str(steps))
    sys.exit(code)
