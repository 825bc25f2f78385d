"""A worker at a steady rate, with random faults: nothing is lost, and the backlog drains."""

from __future__ import annotations

import os
import random
import resource
import sqlite3
import sys
import threading
import time
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from oracle import make_event
from recognition.delivery import Deliverer, Destination
from recognition.errors import GraphUnavailableError, SinkError
from recognition.events import Event
from recognition.graph import open_graph
from recognition.planner import Plan
from recognition.recognizer import Recognizer
from recognition.worker import Worker
from test_delivery import RULES, SECOND, START, Around, Warehouse, wait_until

#: How long events come, in seconds; two minutes and more by the environment.
SECONDS = float(os.environ.get("RECOGNITION_TEST_SOAK", "6"))
RATE = 400  # events a second
SETTLE = 10.0  # seconds; rows come sooner even on a busy machine


def memory() -> int:
    """Resident, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def visits(number: int) -> list[Event]:
    """A visitor: eight anonymous events, then a login."""
    at = START + 10 * number * SECOND
    device = f"d{number}"
    events = [make_event(f"m{number}-{k}", at + k * SECOND, device) for k in range(8)]
    return [*events, make_event(f"c{number}", at + 8 * SECOND, device, user_id=f"u{number}")]


class Faulty:
    """Events at a rate; the rows of some come to the databases after their updates."""

    def __init__(self, draw: random.Random, warehouses: list[Warehouse]) -> None:
        self._draw = draw
        self._warehouses = warehouses
        self._waiting: list[tuple[float, Event]] = []
        self._batch: list[Event] = []  # what is offered again where the graph fails
        self._end = 0.0
        self.count = 0
        self.done = False
        self.latest = 0.0  # seconds from a row's event to the row

    def run(self, take: Any, stop: threading.Event) -> None:
        size = RATE // 20
        self._end = self._end or time.monotonic() + SECONDS
        while time.monotonic() < self._end or self._batch:
            begin = time.monotonic()
            while len(self._batch) < size:
                self._batch += visits(self.count)
                self.count += 1
            take(self._batch)
            batch, self._batch = self._batch, []
            self._write(batch, 0.2)
            if self._draw.random() < 0.05:
                raise GraphUnavailableError("the connection of the source broke")
            stop.wait(max(0.0, size / RATE - (time.monotonic() - begin)))
        self._write([], 0.0)
        self.done = True

    def _write(self, batch: list[Event], late: float) -> None:
        """Some rows are kept back until the next batch."""
        now = time.monotonic()
        rows = self._waiting
        self._waiting = []
        for event in batch:
            (self._waiting if self._draw.random() < late else rows).append((now, event))
        for warehouse in self._warehouses:
            warehouse.put([event for _, event in rows])
        self.latest = max([self.latest, *(time.monotonic() - begin for begin, _ in rows)])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.timeout(600 + 2 * SECONDS)
def test_worker_lives_with_faults(tmp_path: Path) -> None:
    """Locks, refusals and broken sources at random; all rows are right when they are over."""
    draw = random.Random(5)
    warehouses = [Warehouse(tmp_path, name).make() for name in ("one", "two")]
    for warehouse in warehouses:
        warehouse.execute("PRAGMA journal_mode = WAL")
        warehouse.execute("CREATE INDEX device ON events (anonymous_id)")
    source = Faulty(draw, warehouses)
    over = threading.Event()

    windows = count(1)
    refused = count()

    def refuse(plan: Plan) -> None:
        if next(windows) == 2 or (not over.is_set() and draw.random() < 0.1):
            next(refused)
            raise SinkError("refused for no reason")
        time.sleep(draw.random() / 10)

    def lock() -> None:
        wait_until(lambda: deliverer.served["two"].windows)
        while True:
            failures = deliverer.served["two"].failures
            path = warehouses[1].path
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                until = time.monotonic() + 5 * draw.random()
                while time.monotonic() < until and deliverer.served["two"].failures == failures:
                    time.sleep(0.01)
                connection.execute("ROLLBACK")
            if over.wait(draw.random()):
                return

    sizes: list[int] = []
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        deliverer = Deliverer(
            graph,
            [
                Destination(name="one", sink=Around(warehouses[0].sink(), refuse), settle=SETTLE),
                Destination(name="two", sink=warehouses[1].sink(timeout=0.2), settle=SETTLE),
            ],
            every=0.1,
            pauses=(0.05, 0.5),
        )
        worker = Worker(Recognizer(graph, RULES), [source], deliverer, pauses=(0.01, 0.1))
        stop = threading.Event()
        running = threading.Thread(target=worker.run, args=(stop,))
        faults = threading.Thread(target=lock)
        running.start()
        faults.start()
        try:
            time.sleep(SECONDS / 3)
            sizes.append(memory())
            time.sleep(SECONDS * 2 / 3)
            wait_until(lambda: source.done, 120)
            sizes.append(memory())
            over.set()
            faults.join()
            wait_until(lambda: not graph.stats().pending_updates, 300)
            dead = graph.stats().dead_updates
        finally:
            over.set()
            stop.set()
            running.join()
    right = {f"m{n}-{k}": f"u{n}" for n in range(source.count) for k in range(8)}
    right |= {f"c{n}": f"u{n}" for n in range(source.count)}

    assert source.latest < SETTLE
    for warehouse in warehouses:
        assert warehouse.users() == right
    assert source.count > SECONDS
    assert next(refused)
    assert deliverer.served["two"].failures
    assert dead == 0
    # What grows with the events is in the databases; a third of the time against all of it.
    assert sizes[1] - sizes[0] < 60_000_000, sizes
