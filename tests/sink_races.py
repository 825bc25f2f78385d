"""
Windows of updates that overlap, and the rows that they leave: what tests of races and faults share.

``RECOGNITION_SINK_RACE_RUNS`` and ``RECOGNITION_SINK_FAULT_POINTS`` say how often they run; by
default a few times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

from recognition.errors import OutcomeUnknownError, RecognitionError
from recognition.planner import plan_updates
from recognition.sinks import Sink
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


def insist(sink: Sink, window: Window) -> int:
    """As a worker does: until it is applied. Gives how often the outcome was not known."""
    unknown = 0
    while True:
        try:
            applied = sink.apply(plan_updates(window))
        except RecognitionError as error:
            if not error.retryable:
                raise
            unknown += isinstance(error, OutcomeUnknownError)
        else:
            assert applied.rejected == ()
            return unknown


@contextmanager
def inserting(code: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """
    A process that inserts, as a pipeline does; it ends with its input.

    Args:
        code: Connects with the options that it gets as JSON, says ``ready``, and answers each line.
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=30) == 0
