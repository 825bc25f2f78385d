"""
Windows of updates that overlap, and the rows that they leave: what tests of races and faults share.

``RECOGNITION_SINK_RACE_RUNS`` and ``RECOGNITION_SINK_FAULT_POINTS`` say how often they run; by
default a few times.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from recognition.testing.sinks import between, device, row, unknown, update

RUNS = int(os.environ.get("RECOGNITION_SINK_RACE_RUNS", "4"))
POINTS = int(os.environ.get("RECOGNITION_SINK_FAULT_POINTS", "8"))

DEVICES = 30
TIMES = 20

Window = Sequence[Any]


def make_window(random: Random, table: str, versioned: bool, size: int = 120) -> list[Any]:
    """Many updates of few devices, whose intervals overlap."""
    window = []
    for sequence in range(1, size + 1):
        start = random.randrange(TIMES)
        span = between(start, start + random.randint(1, TIMES))
        values = {"user_id" if versioned else "stitched_user_id": f"u{sequence}"}
        criteria = [device(f"a{random.randrange(DEVICES)}"), span]
        criteria += [unknown()] if versioned else []
        window.append(update(sequence, values, *criteria, table=table, versioned=versioned))
    return window


def make_rows() -> list[Mapping[str, object]]:
    """One row of each device at each time."""
    return [row(f"{n}-{t}", f"a{n}", t) for n in range(DEVICES) for t in range(TIMES)]


def expect(window: Window) -> dict[object, object]:
    """By row, what the greatest sequence says that meets it."""
    expected: dict[object, object] = {}
    for each in make_rows():
        meeting = [
            u
            for u in window
            if u.where[0].value == each["anonymous_id"]
            and u.where[1].start <= each["timestamp"] < u.where[1].end
        ]
        last = max(meeting, key=lambda u: u.sequence, default=None)
        owner = None if last is None else next(v for k, v in last.set.items() if "user_id" in k)
        expected[each["message_id"]] = owner
    return expected


def make_plans(random: Random, window: Window) -> list[list[Any]]:
    """The window in any order, in plans of any size."""
    shuffled = random.sample(window, len(window))
    plans = []
    while shuffled:
        size = random.randint(1, 40)
        plans.append(shuffled[:size])
        shuffled = shuffled[size:]
    return plans
