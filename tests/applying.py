"""
A process that applies plans: ``python applying.py URL``.

It reads one line for each job, a list of plans, each a list of updates; and answers each job with a
line: how many rows changed. What may be retried it retries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from recognition.errors import RecognitionError
from recognition.messages import UpdateByCriteria
from recognition.planner import plan_updates
from recognition.sinks import open_sink


def main() -> None:
    """Until the input ends."""
    sink = open_sink(sys.argv[1], timeout=60)
    print("ready", flush=True)
    for line in sys.stdin:
        changed = 0
        for plan in json.loads(line):
            updates = [UpdateByCriteria.model_validate(each) for each in plan]
            while True:
                try:
                    applied = sink.apply(plan_updates(updates))
                except RecognitionError as error:
                    if not error.retryable:
                        raise
                else:
                    break
            assert applied.rejected == ()
            changed += applied.rows_changed
        print(changed, flush=True)


class Worker:
    """Such a process, seen from outside. A context manager, which ends it."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"

    def begin(self, plans: Sequence[Sequence[UpdateByCriteria]]) -> None:
        """Hand it a job."""
        job = [[each.model_dump(mode="json") for each in plan] for plan in plans]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Wait for the answer: how many rows changed."""
        return int(self._read())

    def kill(self) -> None:
        """SIGKILL, at whatever point it is."""
        self.process.kill()
        self.process.wait(timeout=30)

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the worker has ended with code {self.process.wait(timeout=30)}"
        return line.strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


if __name__ == "__main__":
    main()
