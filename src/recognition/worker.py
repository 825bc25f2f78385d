"""
A process that takes events in from its sources and carries updates out, until it is told to stop.

What it knows of a source is one call: `Source.run`. How events travel (files, Kafka, HTTP) is the
source's own affair; that they are in the graph, durably, before the source confirms them to
whoever sent them, is decided here.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from recognition.delivery import Deliverer
from recognition.errors import (
    ConfigurationError,
    EventError,
    InputError,
    tell,
    trace,
)
from recognition.events import Event, Format, Reject, parse_event, read_events
from recognition.recognizer import Recognition, Recognizer
from recognition.tracing import span

_log = logging.getLogger("recognition.worker")

#: Events as they were sent, parsed from JSON or CSV and not looked at: one mapping each; or as
#: `recognition.events.read_events` gives them.
RawEvents = Sequence[dict[str, Any] | Event]


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


@dataclass(slots=True)
class Taken:
    """What came in so far, in numbers; by this process."""

    events: int = 0
    rejected: int = 0
    bots: int = 0
    ignored: int = 0
    """Anonymous events of types that are not remembered."""
    anonymous: int = 0
    identified: int = 0
    blocked: int = 0
    claims: int = 0
    links: int = 0
    conflicts: int = 0
    updates: int = 0
    restarts: int = 0
    """How often a source failed and was started again."""


class Worker:
    """
    Sources on one side, a deliverer on the other, a recognizer between them.

    Args:
        recognizer: Decides; its graph must be safe for several threads. ``None``: its sources hand
            over no events.
        sources: Each gets a thread. Without any, the worker only delivers.
        deliverer: Without one, updates stay in the outbox.
        format: How events are written, as for `parse_event`.
        batch_size: How many events go into one transaction of the graph, at most.
        rejects: Called with what cannot be read as an event, by one thread at a time.
        pauses: The first and the longest pause before a source is started again, in seconds.
        expire: Called when `run` begins and once a day: drops what is older than is kept.
    """

    def __init__(
        self,
        recognizer: Recognizer | None,
        sources: Sequence[Source],
        deliverer: Deliverer | None,
        *,
        format: Format | Mapping[str, Format] | None = None,
        batch_size: int = 1000,
        rejects: Callable[[Reject], object] | None = None,
        pauses: tuple[float, float] = (1.0, 60.0),
        expire: Callable[[], object] | None = None,
    ) -> None:
        self._expire = expire
        self._recognizer = recognizer
        self.sources = list(sources)
        self._deliverer = deliverer
        self._format = format
        self._batch_size = batch_size
        self._rejects = rejects
        self._pauses = pauses
        self._lock = threading.Lock()
        self._failed: BaseException | None = None
        self.taken = Taken()
        #: Of what was rejected, how much by each reason: a few short texts.
        self.reasons: Counter[str] = Counter()

    def take(self, events: RawEvents) -> None:
        """
        Put events into the graph, with the updates that follow; see `Source.run`.

        Raises:
            GraphError: Batches before may be in the graph. The same call again is safe.
        """
        if self._recognizer is None:
            raise ConfigurationError("this worker takes no events in. Nothing was written.")
        read: list[Event] = []
        rejects: list[Reject] = []
        for position, body in enumerate(events):
            if isinstance(body, Event):
                read.append(body)
                continue
            try:
                read.append(parse_event(body, self._format))
            except EventError as exc:
                rejects.append(
                    Reject(source="<source>", line=position + 1, reason=str(exc), raw=_raw(body))
                )
        batches = iter(read)
        while batch := list(islice(batches, self._batch_size)):
            with span("recognition.take", events=len(batch)) as told:
                done = self._recognizer.process(batch)
                told["claims"] = done.claims
                told["updates"] = done.updates
            self._count(done)
        # Last: while the graph is away the same batch comes again and again.
        for reject in rejects:
            self.reject(reject)

    def reject(self, reject: Reject) -> None:
        """Count and keep what became no event; by any thread."""
        with self._lock:
            self.taken.rejected += 1
            self.reasons[reject.reason] += 1
            if self._rejects is not None:
                self._rejects(reject)

    def _count(self, done: Recognition) -> None:
        with self._lock:
            taken = self.taken
            taken.events += len(done.events)
            for name in (
                "bots", "ignored", "anonymous", "identified", "blocked", "claims", "links",
                "conflicts", "updates",
            ):  # fmt: skip
                setattr(taken, name, getattr(taken, name) + getattr(done, name))

    def run(self, stop: threading.Event, *, once: bool = False) -> None:
        """
        Work until ``stop`` is set, or a source cannot go on; then finish what was begun.

        Where all sources have come to their end by themselves, delivery goes on until ``stop``.

        Args:
            stop: Ends it; it is set when this returns.
            once: End when all sources have come to their end, and no destination has anything left
                that can be applied now. What is held until its rows have settled stays held.

        Raises:
            Exception: What the source raised that cannot go on.
        """
        threads = [
            threading.Thread(target=self._feed, args=(source, stop), name=_name(source))
            for source in self.sources
        ]
        if self._deliverer is not None:
            self._deliverer.register()
        feeding = list(threads)
        if self._expire is not None:
            threads.append(
                threading.Thread(target=self._keep_young, args=(self._expire, stop), name="expiry")
            )
        if once:
            threads.append(threading.Thread(target=self._end, args=(feeding, stop), name="the end"))
        for thread in threads:
            thread.start()
        try:
            if self._deliverer is not None:
                self._deliverer.run(stop, fill_now=once)
            else:
                stop.wait()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if self._failed is not None:
            raise self._failed

    def _keep_young(self, expire: Callable[[], object], stop: threading.Event) -> None:
        pause = 0.0
        while not stop.wait(pause):
            try:
                expire()
                pause = 86_400.0
            except Exception as exc:
                told = "what is too old was not dropped: %s"
                _log.warning(told, tell(exc), exc_info=trace(exc))
                pause = 600.0

    def _end(self, feeding: Sequence[threading.Thread], stop: threading.Event) -> None:
        """Stop when there is nothing left to do."""
        for thread in feeding:
            thread.join()
        if self._deliverer is not None:
            self._deliverer.wake()
            while not self._deliverer.idle and not stop.wait(0.05):
                pass
        stop.set()

    def _feed(self, source: Source, stop: threading.Event) -> None:
        """Run a source to its end; start it again where that helps."""
        first, longest = self._pauses
        pause = first
        name = _name(source)
        while not stop.is_set():
            before, began = self.taken.events, time.monotonic()
            try:
                source.run(self.take, stop)
                return
            except Exception as exc:
                if not getattr(exc, "retryable", False):
                    _log.error("%s cannot go on: %s", name, type(exc).__name__)
                    self._failed = exc
                    stop.set()
                    return
                if self.taken.events > before or time.monotonic() - began > longest:
                    pause = first  # it was well in between
                _log.warning("%s is started again in %.1f s: %s", name, pause, tell(exc))
                with self._lock:
                    self.taken.restarts += 1
            stop.wait(pause * random.uniform(0.5, 1.0))
            pause = min(longest, 2 * pause)


def _name(source: Source) -> str:
    """In logs: of what sort it is, and its own name where it has one."""
    return f"{type(source).__name__} {getattr(source, 'name', '')}".rstrip()


def _raw(body: object) -> bytes:
    try:
        return json.dumps(body, default=str).encode()
    except (ValueError, RecursionError):
        return b"(cannot be written as JSON)"


_EVENTS = re.compile(r"[^.].*\.(ndjson|jsonl|json|csv)(\.gz)?", re.IGNORECASE)


class Directory:
    """
    A directory of event files (NDJSON, CSV, also gzip), each taken once and then moved.

    Files come in the order of their names. One that is taken whole goes to ``done`` inside; that
    happens after all of its events are durable, so a file of which the process died half-way is
    taken again from its beginning, which changes nothing. One that cannot be opened or read goes to
    ``failed``. Whoever puts files there writes them under another ending, or beside, and renames
    them. Several workers may watch one directory of one machine: a file is locked while it is
    taken.

    Args:
        path: The directory.
        format: As for `read_events`.
        rejects: As for `read_events`.
        every: How often it is looked at when nothing was found, in seconds.
        batch_size: How many events are handed over at once.
        once: End when no file is left.
    """

    def __init__(
        self,
        path: Path,
        *,
        format: Format | Mapping[str, Format] | None = None,
        rejects: Callable[[Reject], object] | None = None,
        every: float = 1.0,
        batch_size: int = 1000,
        once: bool = False,
    ) -> None:
        if not path.is_dir():
            raise ConfigurationError(f"there is no directory {path}")
        self._path = path
        self._format = format
        self._rejects = rejects
        self._every = every
        self._batch_size = batch_size
        self._once = once

    def run(self, take: Callable[[RawEvents], None], stop: threading.Event) -> None:
        """See `Source.run`."""
        while not stop.is_set():
            for path in self._files():
                if not self._take(path, take, stop):
                    return
            if self._once and not self._files():
                return
            stop.wait(self._every)

    def _files(self) -> list[Path]:
        return sorted(
            path for path in self._path.iterdir() if _EVENTS.fullmatch(path.name) and path.is_file()
        )

    def _take(self, path: Path, take: Callable[[RawEvents], None], stop: threading.Event) -> bool:
        """Take a file, unless somebody else is at it; ``False``: stopped in the middle."""
        try:
            with _locked(path) as file:
                if file is None:
                    return True
                events = read_events(file, format=self._format, rejects=self._rejects)
                while batch := list(islice(events, self._batch_size)):
                    if stop.is_set():
                        return False
                    take(batch)
                self._move(path, "done")
        except InputError as exc:
            _log.error("%s was not taken: %s", path.name, exc)
            self._move(path, "failed")
        return True

    def _move(self, path: Path, into: str) -> None:
        folder = self._path / into
        folder.mkdir(exist_ok=True)
        target = folder / path.name
        number = 1
        while target.exists():  # another file of this name came before
            number += 1
            target = folder / f"{number}-{path.name}"
        path.rename(target)


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes] | None]:
    """The open file, if it is nobody else's and still there."""
    try:
        import fcntl
    except ImportError:  # Windows: one worker for a directory
        fcntl = None  # type: ignore[assignment]
    try:
        file = path.open("rb")
    except FileNotFoundError:  # another worker has moved it
        yield None
        return
    except OSError as exc:
        raise InputError(f"it cannot be opened: {exc.strerror}") from exc
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Moved between the two, by whoever had the lock before.
            if not _is_still(path, file):
                yield None
                return
        yield file


def _is_still(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
