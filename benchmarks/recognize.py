"""
How fast events go through the recognizer into the embedded graph, and what they leave on disk.

    python benchmarks/recognize.py [--events 200000] [--rounds 3] [--json]

Every round measures, one after the other over the same lines, in batches of 1,000:

``floor``
    parse the events and insert their minimal rows (message id, anonymous id, user id, time) into
    a SQLite table, by plain ``executemany``, one transaction a batch. The rows are keyed by device
    and time, because rows that cannot be found again by device are of no use; ``heap`` is the same
    without a key;
``ours``
    parse the events and give them to a recognizer over a SQLite graph in a new file, with
    references; ``none``: the same without references.

The ratio is that of CPU seconds of this process, round by round, and its median is quoted; wall
seconds are printed beside it. Bytes are whole pages, by SQLite's own ``dbstat``, of what is
stored for anonymous events: references, and the anonymous ids themselves. Both are also measured
for visitors that come at random over a month, which is the worst case for packing.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from recognition import (
    Recognizer,
    References,
    Rules,
    Supersede,
    TableRules,
    open_graph,
    parse_event,
)

_Result = TypeVar("_Result")

BATCH = 1_000
START = datetime(2026, 1, 1, tzinfo=UTC).timestamp() * 1000
DAY = 86_400_000
AGENT = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0"


def make_lines(events: int, visitors: int, *, scattered: bool = False, days: int = 30) -> list[str]:
    """
    Events of visitors over so many days in time order, 80 % of them anonymous.

    Sessions of 3 to 10 events; four in ten visitors log in half-way. ``scattered``: no sessions,
    each event at a random time.
    """
    draw = random.Random(20260101)
    found: list[tuple[float, str, str | None]] = []
    each = events // visitors
    for number in range(visitors):
        device = str(uuid.UUID(int=draw.getrandbits(128), version=4))
        user = f"user-{number:07}" if draw.random() < 0.4 else None
        at = START + draw.randrange(days * DAY)
        left = each
        while left:
            session = min(left, draw.randint(3, 10))
            for _ in range(session):
                at += draw.randrange(1_000, 120_000)
                when = START + draw.randrange(days * DAY) if scattered else at
                known = user if left <= each // 2 else None
                found.append((when, device, known))
                left -= 1
            at += draw.randrange(DAY // 24, 5 * DAY)
    found.sort()
    return [
        json.dumps(
            {
                "messageId": str(uuid.UUID(int=draw.getrandbits(128), version=4)),
                "type": "track",
                "event": "Product Viewed",
                "anonymousId": device,
                "userId": user,
                "timestamp": datetime.fromtimestamp(when / 1000, UTC)
                .isoformat(timespec="milliseconds")
                .replace("+00:00", "Z"),
                "properties": {"sku": "A1", "price": 9.5},
                "context": {"library": {"name": "js", "version": "1.0"}, "userAgent": AGENT},
            }
        )
        for when, device, user in found
    ]


def batches(lines: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(lines), BATCH):
        yield lines[start : start + BATCH]


def run_floor(lines: list[str], folder: Path, *, keyed: bool) -> None:
    connection = sqlite3.connect(folder / f"floor{keyed}.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    key = ", PRIMARY KEY (anonymous_id, time, message_id)) WITHOUT ROWID" if keyed else ")"
    connection.execute(f"CREATE TABLE events (anonymous_id, time INTEGER, message_id, user_id{key}")
    for batch in batches(lines):
        rows = []
        for line in batch:
            event = parse_event(json.loads(line))
            user = event.known[0].value if event.known else None
            rows.append((event.anonymous_id, event.time, event.message_id, user))
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)
        connection.execute("COMMIT")
    connection.close()


def run_ours(lines: list[str], folder: Path, references: References) -> dict[str, float]:
    path = folder / f"{references}.db"
    graph = open_graph(f"sqlite:///{path}")
    # Without references the table needs a column that says what recognition wrote.
    keep = TableRules(references=references, supersede=Supersede.VERSION)
    with_ids = references is References.IDS
    recognizer = Recognizer(graph, Rules() if with_ids else Rules(default=keep))
    anonymous = updates = 0
    for batch in batches(lines):
        done = recognizer.process([parse_event(json.loads(line)) for line in batch])
        anonymous += done.anonymous
        updates += done.updates
    graph.close()
    connection = sqlite3.connect(path)
    pages = dict(connection.execute("SELECT name, sum(pgsize) FROM dbstat GROUP BY name"))
    connection.close()
    per_event = (pages["refs"] + pages["timelines"]) / anonymous
    if references is References.NONE:
        # What is there is kept of the devices that were claimed, not of the anonymous events.
        per_event = pages["refs"] - 4096
    return {
        "anonymous": anonymous,
        "updates": updates,
        "bytes_per_anonymous_event": per_event,
        "references_alone": pages["refs"] / anonymous,
        "file_bytes": path.stat().st_size,
    }


def timed(work: Callable[[], _Result]) -> tuple[float, float, _Result]:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(devices: int) -> dict[str, float]:
    """Peak memory after a tenth and after all of so many anonymous ids, one event each."""
    draw = random.Random(7)
    with tempfile.TemporaryDirectory() as folder:
        graph = open_graph(f"sqlite:///{folder}/graph.db")
        recognizer = Recognizer(graph, Rules())
        marks = {}
        for start in range(0, devices, BATCH):
            bodies = [
                {
                    "messageId": str(uuid.UUID(int=draw.getrandbits(128), version=4)),
                    "type": "page",
                    "anonymousId": str(uuid.UUID(int=draw.getrandbits(128), version=4)),
                    "timestamp": START + start + offset,
                }
                for offset in range(BATCH)
            ]
            recognizer.process([parse_event(body) for body in bodies])
            if start + BATCH == devices // 10:
                marks["mb_at_a_tenth"] = peak_megabytes()
        marks["mb_at_all"] = peak_megabytes()
        graph.close()
    return {"anonymous_ids": devices, **marks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1_000_000, help="for the memory run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # As the command line does: what the imports made is never garbage, and is not looked at again.
    gc.collect()
    gc.freeze()
    # First, before anything else has raised the peak.
    memory = measure_memory(options.devices // BATCH // 10 * 10 * BATCH or 10 * BATCH)
    lines = make_lines(options.events, max(1, options.events // 20))
    ratios, heaps, floors, ours, walls = [], [], [], [], []
    stored: dict[str, float] = {}
    bare: dict[str, float] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            heap_cpu, _, _ = timed(partial(run_floor, lines, folder, keyed=False))
            floor_cpu, _, _ = timed(partial(run_floor, lines, folder, keyed=True))
            cpu, wall, result = timed(partial(run_ours, lines, folder, References.IDS))
            stored = result
            bare = run_ours(lines, folder, References.NONE)
            floors.append(len(lines) / floor_cpu)
            ours.append(len(lines) / cpu)
            walls.append(len(lines) / wall)
            ratios.append(floor_cpu / cpu)
            heaps.append(heap_cpu / cpu)
    with tempfile.TemporaryDirectory() as name:
        lines = make_lines(options.events, max(1, options.events // 20), scattered=True)
        scattered = run_ours(lines, Path(name), References.IDS)
    report = {
        "events": options.events,
        "anonymous_share": stored["anonymous"] / options.events,
        "floor_events_per_cpu_second": statistics.median(floors),
        "ours_events_per_cpu_second": statistics.median(ours),
        "ours_events_per_wall_second": statistics.median(walls),
        "ratio_to_floor": statistics.median(ratios),
        "ratio_to_heap": statistics.median(heaps),
        "updates": stored["updates"],
        "bytes_per_anonymous_event": stored["bytes_per_anonymous_event"],
        "bytes_per_anonymous_event_scattered": scattered["bytes_per_anonymous_event"],
        "bytes_per_anonymous_event_without_references": bare["bytes_per_anonymous_event"],
        "memory": memory,
    }
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    print(f"{'events':44}{options.events:>14,}")
    print(f"{'anonymous':44}{report['anonymous_share']:>14.1%}")
    print(f"{'floor, events per CPU second':44}{report['floor_events_per_cpu_second']:>14,.0f}")
    print(f"{'ours, events per CPU second':44}{report['ours_events_per_cpu_second']:>14,.0f}")
    print(f"{'ours, events per wall second':44}{report['ours_events_per_wall_second']:>14,.0f}")
    print(f"{'ours / floor (target: at least 0.5)':44}{report['ratio_to_floor']:>14.2f}")
    print(f"{'ours / the floor without a key':44}{report['ratio_to_heap']:>14.2f}")
    for label, key in (
        ("bytes per anonymous event (target: 32)", "bytes_per_anonymous_event"),
        ("  the same, events scattered over the month", "bytes_per_anonymous_event_scattered"),
        ("  without references (target: 0)", "bytes_per_anonymous_event_without_references"),
    ):
        print(f"{label:44}{report[key]:>14.1f}")
    print(
        f"{'peak MB at ' + format(devices // 10, ',') + ' / ' + format(devices, ',') + ' ids':44}"
        f"{memory['mb_at_a_tenth']:>7.0f}{memory['mb_at_all']:>7.0f}"
        if (devices := int(memory["anonymous_ids"]))
        else ""
    )


if __name__ == "__main__":
    main()
