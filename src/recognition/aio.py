"""
The same calls for programs that run on an event loop: each runs in a thread, and is awaited.

Nothing is decided here, and no part of the library is written a second time: graphs and sinks wait
in threads, a bounded number of them, while the loop goes on.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Self, TypeVar

from recognition.delivery import Delivered, deliver
from recognition.events import BOTS, Event
from recognition.graph import Graph, Receipt
from recognition.layouts import Row
from recognition.planner import Plan
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import Rules
from recognition.sinks import Applied, Sink

_Result = TypeVar("_Result")


class AsyncRecognizer:
    """
    A `Recognizer` and its delivery, to be awaited. An asynchronous context manager.

    Any number of calls may be awaited at once; they overlap as calls of several workers do. What is
    rare has no twin here: ``await asyncio.to_thread(worker.recognizer.forget, identifier)``.

    **Cancelled** (or timed out), a call that waits for a thread is never begun. One that runs goes
    on to its end, and only then the cancellation is raised: no thread is left behind that still
    uses the graph. So it may have been done, and its result is gone; doing it again is right:
    `process` and `flushed` change nothing the second time, and what `deliver` has not acknowledged
    comes again. A batch whose `process` was cancelled has no receipt, so it is not done: it comes
    again, as after a crash.

    Args:
        graph: What is remembered; must be safe for several threads, as all that are built in. It
            stays open when this closes.
        rules: As for `Recognizer`.
        threads: How many calls run at once; others wait. For MongoDB about what its pool of
            connections and its server bear; a SQLite graph has one writer, whatever the number.
        bots: As for `Recognizer`.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Rules | None = None,
        *,
        threads: int = 4,
        bots: re.Pattern[str] | None = BOTS,
    ) -> None:
        self._graph = graph
        self._recognizer = Recognizer(graph, rules, bots=bots)
        self._threads = ThreadPoolExecutor(threads, "recognition")
        # Apart, so that a long delivery takes no thread from the events. Its own deliveries take
        # turns: two of them would only wait for each other's locks.
        self._delivery = ThreadPoolExecutor(1, "recognition-delivery")
        self._closing = threading.Event()

    @property
    def recognizer(self) -> Recognizer:
        """The one that does the work; safe beside this one."""
        return self._recognizer

    async def process(self, events: Sequence[Event]) -> Recognition:
        """See `Recognizer.process`. The same events twice at once are the same events twice."""
        return await _run(self._threads, self._recognizer.process, events)

    async def rows(self, recognition: Recognition) -> dict[str, list[Row]]:
        """See `Recognizer.rows`."""
        return await _run(self._threads, self._recognizer.rows, recognition)

    async def flushed(self, receipt: Receipt) -> int:
        """See `Recognizer.flushed`."""
        return await _run(self._threads, self._recognizer.flushed, receipt)

    async def deliver(
        self,
        sinks: Sink | Sequence[Sink],
        *,
        window: int = 10_000,
        lease: float = 600.0,
        watch: Callable[[Plan, Applied], None] | None = None,
    ) -> Delivered:
        """
        See `recognition.deliver`. One delivery runs at a time; cancelled, it ends after its window.

        ``watch`` is called in the thread, not on the loop.
        """
        cancelled = threading.Event()
        work = partial(
            deliver,
            self._graph,
            sinks,
            window=window,
            lease=lease,
            watch=watch,
            stop=lambda: cancelled.is_set() or self._closing.is_set(),
        )
        return await _run(self._delivery, work, on_cancel=cancelled.set)

    async def close(self) -> None:
        """
        Wait for what was called before, a delivery until the end of its window; end the threads.

        The graph and the sinks stay open. The second time does nothing. What is called afterwards
        raises a ``RuntimeError``, and does nothing.
        """
        self._closing.set()
        for executor in (self._threads, self._delivery):
            await asyncio.to_thread(executor.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


async def _run(
    executor: Executor,
    function: Callable[..., _Result],
    *arguments: object,
    on_cancel: Callable[[], None] = lambda: None,
) -> _Result:
    """
    Await a call in a thread, which sees the caller's context variables.

    A cancellation waits for the end of a call that runs, also when it comes again. What the call
    raised meanwhile is its cause.
    """
    job = executor.submit(copy_context().run, function, *arguments)
    ended = asyncio.wrap_future(job)
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError as exc:
            if job.cancel():  # it had not begun
                raise
            on_cancel()
            cancelled = exc
    if cancelled is not None:
        raise cancelled from ended.exception()
    return ended.result()
