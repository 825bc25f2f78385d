"""
A window beside an old ledger: what it costs to look up, and to note, among many notes.

    python benchmarks/ledger.py [--windows 100] [--size 1000] [--json]
        [--engines sqlite,duckdb,postgresql,mariadb,chdb]

Windows of updates are applied one after the other to a table without versions, each to devices of
its own with three rows each; the rows are there from the beginning. So all that differs from one
window to the next is what the ledger holds already. The floor is the first tenth of the windows,
beside an empty ledger; the ratio is that of the last tenth to it, by the median window. ClickHouse
has no row of theirs: what a change leaves for its merges would be seen instead of the ledger.

``new devices``
    names a device and a range of time
``known devices``
    the same devices again, as the windows before named them, by later updates: each finds a note
``by message``
    names the device and the messages
``late``
    updates of the first pass, applied again after all that came later: they change nothing

What the engine's planner takes the notes for decides whether a window stays what it was: twice it
went through all notes for each update, and a worker that was behind fell further behind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import clickhouse_connect

import mariadb
import postgres
from recognition.messages import Between, Criterion, Empty, Equals, Messages, UpdateByCriteria
from recognition.planner import plan_updates
from recognition.sinks import open_sink

ENGINES = ("sqlite", "duckdb", "postgresql", "mariadb", "chdb")
START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
ROWS = 3  # of each device


def _url(engine: str, folder: Path, stack: ExitStack) -> str:
    if engine in ("sqlite", "duckdb"):
        return f"{engine}:///{folder / engine}"
    if engine == "chdb":
        return f"chdb://{folder / engine}"
    server: Any = stack.enter_context(
        (postgres if engine == "postgresql" else mariadb).open_server()
    )
    url: str = server.url(stack.enter_context(server.database()))
    return url


def _load(sink: Any, devices: int) -> None:
    micros = round(START.timestamp() * 1_000_000)
    for first in range(0, devices, 5_000):
        sink.load(
            "events",
            [
                {
                    "message_id": f"m{device}-{n}",
                    "anonymous_id": f"d{device}",
                    "timestamp": micros + 60_000_000 * n,
                }
                for device in range(first, min(devices, first + 5_000))
                for n in range(ROWS)
            ],
            key="message_id",
            columns={
                "message_id": "text",
                "anonymous_id": "text",
                "user_id": "text",
                "timestamp": "time",
            },
        )


def _make(path: Path) -> None:
    with closing(clickhouse_connect.get_client(interface="chdb", path=str(path))) as client:
        client.command(
            "CREATE TABLE events (message_id String, anonymous_id String, user_id Nullable(String),"
            " timestamp DateTime64(6, 'UTC')) ENGINE = MergeTree ORDER BY anonymous_id SETTINGS"
            " enable_block_number_column = 1, enable_block_offset_column = 1"
        )
        client.insert("events", [["m", "other", None, START]])


def _window(line: str, number: int, size: int, sequence: int) -> list[UpdateByCriteria]:
    """One update for each of the window's own devices."""
    updates = []
    for device in range(number * size, (number + 1) * size):
        where: list[Criterion] = [Equals(column="anonymous_id", value=f"d{device}")]
        if line == "by message":
            refs = tuple((f"m{device}-{n}", START + n * MINUTE) for n in range(ROWS))
            where.append(Messages(id_column="message_id", time_column="timestamp", refs=refs))
        else:
            where += [
                Empty(column="user_id"),
                Between(column="timestamp", start=START - MINUTE, end=START + ROWS * MINUTE),
            ]
        updates.append(
            UpdateByCriteria(
                id=f"{sequence:032x}",
                workspace="w1",
                table="events",
                set={"user_id": f"u{sequence}"},
                where=tuple(where),
                sequence=sequence,
                expected_rows=ROWS,
                created_at=START,
            )
        )
        sequence += 1
    return updates


def measure(engine: str, windows: int, size: int) -> Iterator[dict[str, Any]]:
    """A result for each line, in the order of the list at the top."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sink: Any = open_sink(_url(engine, folder, stack))
        stack.enter_context(closing(sink))
        total = windows * size
        if engine == "chdb":
            _make(folder / engine)
        else:
            _load(sink, total)
        for line, first in (
            ("new devices", 1),
            ("known devices", 1 + total),
            ("by message", 1 + 2 * total),
            ("late", 1),
        ):
            seconds, changed = [], 0
            for number in range(windows):
                plan = plan_updates(_window(line, number, size, first + number * size))
                began = perf_counter()
                changed += sink.apply(plan).rows_changed
                seconds.append(perf_counter() - began)
            nothing = engine == "chdb" or line in ("known devices", "late")
            expected = 0 if nothing else total * ROWS
            if changed != expected:
                raise SystemExit(f"{engine}, {line}: {changed:,} rows changed, not {expected:,}")
            tenth = max(1, windows // 10)
            yield {
                "engine": engine,
                "line": line,
                "notes_before": {"new devices": 0, "known devices": total}.get(line, 2 * total),
                "window": size,
                "first_seconds": median(seconds[:tenth]),
                "last_seconds": median(seconds[-tenth:]),
                "ratio": median(seconds[-tenth:]) / median(seconds[:tenth]),
            }


def main() -> int:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description="A window beside an old ledger.")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--size", type=int, default=1_000, help="how many updates are in one")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for engine in options.engines.split(","):
        for result in measure(engine, options.windows, options.size):
            results.append(result)
            if not options.json:
                print(
                    "{engine:<12}{line:<15}beside {notes_before:>8,} notes and more:"
                    " {first_seconds:>8.4f} s, then {last_seconds:>8.4f} s"
                    " {ratio:>6.2f} x".format(**result),
                    flush=True,
                )
    if options.json:
        print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
