"""
A process that takes events in from its sources and carries updates out, until it is told to stop.

What it knows of a source is one call: `Source.run`. How events travel (files, Kafka, HTTP) is the
source's own affair; that they are in the graph, durably, before the source confirms them to
whoever sent them, is decided here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

#: Events as they were sent, parsed from JSON or CSV and not looked at: one mapping each.
RawEvents = Sequence[dict[str, Any]]


@runtime_checkable
class Source(Protocol):
    """Where events come from; a worker runs each of its sources in a thread of its own."""

    def run(self, take: Callable[[RawEvents], None], stop: threading.Event) -> None:
        """
        Hand batches of events to ``take`` until ``stop`` is set, or until there are no more.

        Args:
            take: Returns when the whole batch is durable in the graph, what cannot be read as an
                event included (it is kept among the rejects). Only then may the source confirm it
                (commit an offset, answer a request, move a file). May be called by several threads
                of the source at once; the same events a second time change nothing. Raises
                `recognition.errors.GraphError` when the graph failed, and nothing was written: the
                source confirms nothing then, and offers the batch again or lets the error out.
            stop: Set when the process shall end. What was handed to ``take`` before is finished,
                nothing new is begun, and the call returns.

        Raises:
            Exception: The source cannot go on. The worker starts it again after a pause that grows
                where the error says that a retry helps, and ends otherwise.
        """
