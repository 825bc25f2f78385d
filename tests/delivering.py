"""
Deliver an outbox and note what is applied when; started as a process by the tests.

    python delivering.py GRAPH SINK LOG [--stall FILE] [--window N] [--lease SECONDS]

It ends when its standard input does. Each line of ``LOG`` is a JSON object: begin, end, updates.
With ``--stall`` it makes the file before its first window is applied, and stops itself by SIGSTOP.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from recognition.delivery import Deliverer, Destination
from recognition.graph import open_graph
from recognition.planner import Plan, Step
from recognition.sinks import Applied, open_sink


class Noted:
    """A real sink, and notes of when it applied what."""

    def __init__(self, sink: Any, log: Path, stall: Path | None) -> None:
        self._sink = sink
        self._log = log
        self._stall = stall
        self.leases = threading.Lock()
        self.capabilities = sink.capabilities

    def compile(self, step: Step) -> str:
        return str(self._sink.compile(step))

    def apply(self, plan: Plan) -> Applied:
        begin = time.time()
        if self._stall is not None:
            stall, self._stall = self._stall, None
            # Not while the lease is renewed: stopped in a transaction, it would lock the graph. And
            # to this very thread: where the process is told, any thread may take the signal, and on
            # a busy machine this one has begun its transaction before another one has woken up.
            with self.leases:
                stall.touch()
                signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        applied: Applied = self._sink.apply(plan)
        note = {"begin": begin, "end": time.time(), "updates": plan.updates}
        with self._log.open("a") as file:
            file.write(json.dumps(note) + "\n")
        return applied

    def close(self) -> None:
        self._sink.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("graph")
    parser.add_argument("sink")
    parser.add_argument("log", type=Path)
    parser.add_argument("--stall", type=Path)
    parser.add_argument("--window", type=int, default=10)
    # Longer than a busy machine stands still.
    parser.add_argument("--lease", type=float, default=60.0)
    given = parser.parse_args()
    sink = Noted(open_sink(given.sink), given.log, given.stall)
    deliverer = Deliverer(
        open_graph(given.graph),
        [Destination(name="w", sink=sink, window=given.window, settle=0.0)],
        every=0.02,
        lease=given.lease,
    )
    sink.leases = deliverer._lines[0]._lock
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    deliverer.run(stop)
