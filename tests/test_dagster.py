"""The example for Dagster, run in a process of its own as it stands."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from oracle import Oracle, make_event
from test_end_to_end import write_events

ROOT = Path(__file__).parents[1]


def materialise(events: Path, work: Path) -> dict[str, object]:
    """What each asset told of itself, and each check."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "dagster_recognition.py"), str(events), str(work)],
        capture_output=True,
        check=False,  # below, with what it said
        text=True,
        timeout=300,
        env={
            **{name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"},
            "PYTHONPATH": str(ROOT / "src"),
        },
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return {name: json.loads(told) if told[0] == "{" else told for name, told in lines}


def test_assets_load_decide_and_deliver(tmp_path: Path) -> None:
    """The rows are those of the oracle; materialised again with more events, they follow."""
    given = [
        make_event("m1", 1, "kiosk"),
        make_event("m2", 10, "kiosk", user_id="ann"),
        make_event("m3", 20, "kiosk"),
        make_event("m4", 30, "phone"),
    ]
    later = make_event("m5", 40, "phone", user_id="bob")
    first = materialise(write_events(tmp_path / "1.ndjson", given), tmp_path)
    second = materialise(write_events(tmp_path / "2.ndjson", [*given, later]), tmp_path)
    with closing(sqlite3.connect(tmp_path / "warehouse.db")) as connection:
        rows = dict(connection.execute("SELECT message_id, user_id FROM events"))
    oracle = Oracle(
        policy="device_split", lookback=30 * 86_400, own_column=False, events=[*given, later]
    )

    assert first["recognised_rows"] == {"changed": 2, "rejected": 0}
    assert second["recognised_rows"] == {"changed": 1, "rejected": 0}
    assert first["nothing_is_left"] == second["nothing_is_left"] == "passed"
    assert rows == oracle.owners()
