"""
The way out, in one place: updates leave the graph's outbox, are planned and applied to sinks.

An update is acknowledged after a sink has applied it, never before; whoever dies in between leaves
a lease that ends, and the update comes again. Applying it again changes nothing, so delivery is at
least once and the rows are as if it were once.

`deliver` empties the outbox into some sinks and returns. `Deliverer` serves destinations with names
for as long as a process lives, and closes the gap of rows that were on their way (DESIGN 5.5): an
update whose rows may be missing is held, and applied again when they had time to come.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Protocol, TypeVar, runtime_checkable

from recognition.errors import (
    ConfigurationError,
    GraphError,
    RecognitionError,
    TableError,
    ValueRefusedError,
    tell,
    trace,
)
from recognition.graph import Delivery, Graph
from recognition.messages import UpdateByCriteria
from recognition.planner import Plan, plan_updates
from recognition.rules import Rules
from recognition.sinks import Applied, Sink
from recognition.tracing import span

_log = logging.getLogger("recognition.delivery")

T = TypeVar("T")


@dataclass(slots=True)
class Delivered:
    """What became of the updates; ``rejected`` are dead letters now, with their reasons."""

    updates: int = 0
    rows_matched: int = 0
    rows_changed: int = 0
    statements: int = 0
    windows: int = 0
    rejected: list[tuple[str, RecognitionError]] = field(default_factory=list)


def deliver(
    graph: Graph,
    sinks: Sink | Sequence[Sink],
    *,
    window: int = 10_000,
    lease: float = 600.0,
    watch: Callable[[Plan, Applied], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Delivered:
    """
    Apply what the outbox holds, window by window, until nothing is left to lease.

    Updates that another process has leased are not waited for.

    Args:
        graph: Whose outbox.
        sinks: One or several; an update is done when all of them have applied it.
        window: How many updates are coalesced into one plan.
        lease: How long a window may take before it is offered to others, in seconds.
        watch: Called with each plan and what a sink made of it, before the acknowledgement.
        stop: Asked before each window; true leaves the rest in the outbox.

    Returns:
        What was applied; over several sinks, rows and statements are summed.

    Raises:
        SinkError: A sink failed. Windows before are done; this one went back to the outbox, and
            is whole or absent in each sink that has transactions.
        TableError: A table is missing or cannot take what is set. All other updates are applied;
            those of this table are in the outbox again.
    """
    targets = list(sinks) if isinstance(sinks, Sequence) else [sinks]
    total = Delivered()
    waiting: dict[int, TableError] = {}
    while not (stop is not None and stop()) and (leased := graph.lease_updates(window, lease)):
        positions = {item.update.id: item.position for item in leased}
        plan = plan_updates([item.update for item in leased])
        refused: dict[str, RecognitionError] = dict(plan.rejected)
        try:
            for sink in targets:
                applied = sink.apply(plan)
                total.rows_matched += applied.rows_matched
                total.rows_changed += applied.rows_changed
                total.statements += applied.statements
                refused.update(applied.rejected)
                if watch is not None:
                    watch(plan, applied)
        except BaseException as exc:
            graph.return_updates(positions.values(), type(exc).__name__, dead=False)
            _log.warning("window returned: %d updates, %s", len(leased), type(exc).__name__)
            raise
        for update_id, error in refused.items():
            if isinstance(error, TableError) and not isinstance(error, ValueRefusedError):
                # Leased until the end, so that it does not come again and again.
                waiting[positions[update_id]] = error
            else:
                total.rejected.append((update_id, error))
                graph.return_updates([positions[update_id]], str(error), dead=True)
        done = [position for update_id, position in positions.items() if update_id not in refused]
        graph.acknowledge(done)
        total.updates += len(done)
        total.windows += 1
        _log.info("window done: %d updates, %d refused", len(done), len(refused))
    if waiting:
        graph.return_updates(waiting, "TableError", dead=False)
        raise TableError(
            f"{next(iter(waiting.values()))}. {len(waiting):,} updates wait for it in the outbox;"
            f" {total.updates:,} others were applied",
            written=bool(total.updates),
        )
    return total


@runtime_checkable
class Channel(Protocol):
    """Where updates are handed on as they are, for others to apply: a topic."""

    def send(self, updates: Sequence[UpdateByCriteria]) -> None:
        """
        Hand them on, in their order; they are durable there when this returns.

        Raises:
            SinkError: It failed; some may be there. The same again does no harm.
        """

    def close(self) -> None:
        """Give back what is held open; the second time nothing happens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """
    A sink or a channel with a name, and how it is served.

    Args:
        name: By it the outbox knows what was done; whoever gives the sink another one starts anew.
        sink: Used by one thread at a time. What a channel was given is done, and with
            ``reapply_all`` it is given once more after ``settle``: no rows are counted there.
        window: How many updates are coalesced into one plan, at most.
        settle: After how many seconds an update is applied again, because a row that it is about
            may have been on its way; 0: never, for a channel that brings rows and updates in order.
        reapply_all: Also those updates that name their rows by message id, all of which were found
            at once. One that names a range of time is applied again in any case: a row that the
            graph did not know yet may have been counted in the place of one that was on its way.
        again: Until so many seconds after its decision an update is kept, and then applied once
            more, whatever was found before: for a pipeline that may write an old row again, hours
            later. It is longer than the pipeline's last retry. 0: never.
    """

    name: str
    sink: Sink | Channel
    window: int = 10_000
    settle: float = 600.0
    reapply_all: bool = False
    again: float = 0.0


#: In seconds, see `Served`.
LAG_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86_400.0)


@dataclass(slots=True)
class Unmatched:
    """Updates of one table whose expected rows never came; ``oldest``: when it was decided."""

    updates: int = 0
    rows: int = 0
    oldest: datetime | None = None


@dataclass(slots=True)
class Served:
    """What a destination was given so far, by this process; times are seconds, clocks are UTC."""

    windows: int = 0
    updates: int = 0
    """Applied and done with."""
    reapplied: int = 0
    """Applied once more after their rows had settled; among ``updates``."""
    held: int = 0
    """Applied, and held for that."""
    postponed: int = 0
    """Put off, because their table is missing or lacks a column."""
    dead: int = 0
    rows_matched: int = 0
    rows_changed: int = 0
    statements: int = 0
    filled: int = 0
    """Updates that told a new destination what the graph knew already."""
    failures: int = 0
    """Windows that failed as a whole."""
    failing: int = 0
    """How many of them in a row, up to now; from `CIRCUIT_OPENS` on the circuit is open."""
    last_error: str = ""
    seconds: float = 0.0
    """Spent by the sink."""
    last_applied: datetime | None = None
    lag_counts: list[int] = field(default_factory=lambda: [0] * (len(LAG_BOUNDS) + 1))
    """Of updates that were applied for the first time: how many took up to each of `LAG_BOUNDS`,
    and more than the one before, from their decision."""
    lag_sum: float = 0.0
    unmatched: dict[str, Unmatched] = field(default_factory=dict)
    """By table, what is left of updates that were applied again after their rows had settled."""

    def note_applied(self, applied: Applied) -> None:
        """Count what a sink made of a plan."""
        self.rows_matched += applied.rows_matched
        self.rows_changed += applied.rows_changed
        self.statements += applied.statements
        self.last_applied = datetime.now(UTC)

    def note_lag(self, update: UpdateByCriteria, now: datetime) -> None:
        """Count how long ago an update was decided that was just applied for the first time."""
        lag = max(0.0, (now - update.created_at).total_seconds())
        self.lag_counts[bisect_left(LAG_BOUNDS, lag)] += 1
        self.lag_sum += lag


#: So many updates of a table that are refused alone, one after the other and before any is applied,
#: say that it is not they that are wrong; and so often one is tried before it is given up.
REFUSED_ALONE = 3

#: After so many failures in a row a destination is only asked again after a pause.
CIRCUIT_OPENS = 3


class Deliverer:
    """
    Brings the updates of an outbox to several destinations, until it is told to stop.

    Each destination has a thread, and one window in flight; what is slow or down holds nobody else.
    Any number of processes may do this on one outbox: leases keep their windows apart, and are
    renewed while a window is in flight. Where a lease ends nevertheless, because a process stood
    still, another one applies the same updates, and the rows are the same.

    Args:
        graph: Whose outbox; must be safe for several threads.
        destinations: Those of the configuration. Each is registered in the outbox when `run`
            begins; one that the outbox serves and that is not among them is left alone.
        rules: For filling a destination that is new with what the graph knows already; without
            them it gets new updates only.
        every: How long a window collects, in seconds, from the beginning of the one before, if that
            was not full; where applying that one took longer, the next begins at once.
        lease: In seconds; a window in flight is renewed three times within it.
        longest: For how long a window in flight is renewed at most, in seconds.
        patience: How long an update waits for its table to be mended before it is given up.
        pauses: The first and the longest pause after a failure, in seconds; each doubles the one
            before, less a random part of up to a half.
        watch: Called with the destination, each plan and what the sink made of it.
    """

    def __init__(
        self,
        graph: Graph,
        destinations: Sequence[Destination],
        *,
        rules: Rules | None = None,
        every: float = 1.0,
        lease: float = 60.0,
        longest: float = 3600.0,
        patience: float = 86_400.0,
        pauses: tuple[float, float] = (1.0, 300.0),
        watch: Callable[[str, Plan, Applied], None] | None = None,
    ) -> None:
        names = [destination.name for destination in destinations]
        if len(set(names)) < len(names):
            raise ConfigurationError("two destinations have the same name")
        self._graph = graph
        self._rules = rules
        self._every = every
        self._lease = lease
        self._patience = patience
        self._longest = longest
        self._pauses = pauses
        self._watch = watch
        self._lines = [_Line(self, destination) for destination in destinations]

    @property
    def served(self) -> dict[str, Served]:
        """By destination, what it was given so far."""
        return {line.destination.name: line.served for line in self._lines}

    def register(self) -> None:
        """
        Make the outbox serve the destinations; the second time nothing happens.

        Where the graph is empty they have nothing to be filled with. So it is called before the
        first event comes in.
        """
        empty = self._rules is not None and self._graph.decided_with(self._rules.workspace) is None
        for line in self._lines:
            name = line.destination.name
            self._graph.add_destination(name, filled=self._rules is None or empty)
            line.unfilled = not self._graph.destinations()[name]

    @property
    def idle(self) -> bool:
        """Every destination was asked since `wake`, and has nothing to be applied now, or fails."""
        return all(line.idle for line in self._lines)

    def wake(self) -> None:
        """There may be something to do: `idle` is to be found out anew."""
        for line in self._lines:
            line.idle = False

    def run(self, stop: threading.Event, *, fill_now: bool = False) -> None:
        """
        Deliver until ``stop`` is set; windows in flight are finished first.

        Args:
            stop: Ends it.
            fill_now: A new destination is filled at once, and not only after rows of before it was
                registered have settled.

        Raises:
            RecognitionError: The outbox serves no such names; nothing was applied. What fails later
                is waited for, never raised.
        """
        self.register()
        threads = [
            threading.Thread(
                target=line.run, args=(stop, fill_now), name=f"to {line.destination.name}"
            )
            for line in self._lines
        ]
        for thread in threads:
            thread.start()
        over = threading.Event()
        renewal = threading.Thread(target=self._renew, args=(over,), name="leases")
        renewal.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            # Also where this thread was interrupted: the others come to their ends.
            stop.set()
            for thread in threads:
                thread.join()
            over.set()
            renewal.join()

    def _renew(self, over: threading.Event) -> None:
        while not over.wait(self._lease / 3):
            for line in self._lines:
                line.renew()


class _Line:
    """What one thread does for one destination."""

    def __init__(self, deliverer: Deliverer, destination: Destination) -> None:
        self.destination = destination
        self.served = Served()
        self.unfilled = False
        self.idle = False
        self._of = deliverer
        self._graph = deliverer._graph
        self._lock = threading.Lock()  # whoever holds it decides about the leases of the window
        self._flying: list[int] = []
        self._began = 0.0
        #: When the lease of the window in flight ends, if it is not renewed; by our own clock.
        self._until = 0.0
        #: By position, how often an update was refused alone; and of these, since which others
        #: were applied.
        self._refused: dict[int, int] = {}
        self._applied_since: set[int] = set()
        #: Whether the last failure was the graph's own.
        self._unanswered = False
        #: What is left to be told to a new destination, and the part that is being told.
        self._restating: Iterator[list[UpdateByCriteria]] | None = None
        self._part: list[UpdateByCriteria] = []
        self._lacks = False
        self._fill_at = self._fill_began = self._fill_first = 0.0

    def run(self, stop: threading.Event, fill_now: bool) -> None:
        """Serve the destination until the end."""
        # What was on its way when the destination was registered has arrived by then.
        self._fill_first = time.monotonic()
        self._fill_at = self._fill_first + (0 if fill_now else self.destination.settle)
        while not stop.is_set():
            pause = 0.0
            woken = not self.idle
            if self._is_filling():
                try:
                    self._fill_on()
                except Exception as exc:
                    # What is new does not wait for it.
                    again = self._failed(exc)
                    if not getattr(exc, "retryable", False):
                        self._restating, again = None, self._of._pauses[1]
                    elif not self._part:
                        self._restating = None  # the graph failed: nothing more comes from it
                    self._fill_at = time.monotonic() + again
            began = time.monotonic()
            self._until = began + self._of._lease
            try:
                leased = self._graph.lease_updates(
                    self.destination.window, self._of._lease, self.destination.name
                )
                if leased:
                    self._carry(leased)
                elif self._unanswered:
                    self._recovered()  # it answers, and there is nothing else to find that out by
                if len(leased) < self.destination.window and not self._is_filling():
                    pause = self._of._every
                    if leased:
                        # What came while this window was applied has waited as long already.
                        pause = max(0.0, pause - (time.monotonic() - began))
                if woken and not leased and not self._is_filling():
                    self.idle = True
            except Exception as exc:
                pause = self._failed(exc)
                if woken and self.served.failing >= CIRCUIT_OPENS:
                    self.idle = True
            stop.wait(pause)

    def _failed(self, exc: Exception) -> float:
        """Note a failure; gives the pause that follows."""
        served = self.served
        served.failures += 1
        served.failing += 1
        self._unanswered = isinstance(exc, GraphError)
        told = served.last_error = tell(exc)
        first, longest = self._of._pauses
        pause = min(longest, first * 2.0 ** min(served.failing - 1, 30))
        pause *= random.uniform(0.5, 1.0)
        level = logging.ERROR if served.failing == CIRCUIT_OPENS else logging.WARNING
        _log.log(
            level,
            "%s: %s, %d in a row, next in %.1f s: %s",
            self.destination.name,
            "circuit open" if served.failing >= CIRCUIT_OPENS else "window failed",
            served.failing,
            pause,
            told,
            exc_info=trace(exc),
        )
        return pause

    def _recovered(self) -> None:
        """Whatever failed before does not any more."""
        self.served.failing = 0
        self._unanswered = False

    def renew(self) -> None:
        """Make the lease of the window in flight longer, unless it has ended or flies too long."""
        with self._lock:
            now = time.monotonic()
            if self._flying and now < self._until and now - self._began < self._of._longest:
                try:
                    self._hold(self._flying, self._of._lease, applied=False)
                    self._until = now + self._of._lease
                except Exception as exc:  # the next time may be better
                    _log.warning(
                        "%s: a lease was not renewed: %s", self.destination.name, tell(exc)
                    )

    def _hold(self, positions: Sequence[int], seconds: float, *, applied: bool) -> None:
        self._graph.hold_updates(
            positions, seconds, applied=applied, destination=self.destination.name
        )

    def _carry(self, leased: Sequence[Delivery]) -> None:
        """
        Apply a window, and say to the outbox what became of each of its updates.

        Where the destination refuses it, and would again, smaller ones find out what it is about:
        each of one table, then the halves of these. Nothing waits for that but the window itself.
        """
        self._began = time.monotonic()
        parts: list[Sequence[Delivery]] = [leased]
        alone: list[tuple[Delivery, Exception]] = []
        tries: Counter[str] = Counter()
        tables: set[str] = set()  # of which something was applied
        aside: list[Delivery] = []
        failure: Exception | None = None

        def rest() -> list[Delivery]:
            return [*(item for item, _ in alone), *aside, *chain.from_iterable(parts)]

        try:
            while parts:
                self._fly(rest())
                part = parts.pop()
                try:
                    plan, applied = self._apply([item.update for item in part])
                except Exception as exc:
                    failure = exc
                    if time.monotonic() >= self._until:
                        # We stood still, or the graph was away: another worker may be at work.
                        _log.warning("%s: the lease of a window has ended", self.destination.name)
                        raise
                    if getattr(exc, "retryable", False):
                        parts.append(part)
                        self._fly([])
                        self._return(rest(), exc)
                        raise
                    smaller = split(part, lambda item: item.update.table)
                    parts += smaller
                    if not smaller:
                        table = part[0].update.table
                        alone.append((part[0], exc))
                        tries[table] += 1
                        if table not in tables and tries[table] >= REFUSED_ALONE:
                            # It is the table that may not be written.
                            for each in [p for p in parts if p[0].update.table == table]:
                                parts.remove(each)
                                aside += each
                else:
                    self._fly(rest())
                    self._settle(part, plan, applied)
                    tables |= {item.update.table for item in part}
        finally:
            self._fly([])
        if failure is not None:
            self._refuse(alone, aside, bool(tables))
        if not tables:
            assert failure is not None
            raise failure
        self.served.windows += 1
        self._recovered()
        self._applied_since.update(self._refused)

    def _fly(self, items: Iterable[Delivery]) -> None:
        """These are in flight, and no others: their lease is renewed."""
        with self._lock:
            self._flying = [item.position for item in items]

    def _apply(self, updates: Sequence[UpdateByCriteria]) -> tuple[Plan, Applied]:
        started = time.monotonic()
        name, sink = self.destination.name, self.destination.sink
        try:
            with span("recognition.apply", destination=name, updates=len(updates)) as told:
                if isinstance(sink, Channel):
                    sink.send(updates)
                    plan, applied = Plan(steps=(), updates=tuple(u.id for u in updates)), Applied()
                else:
                    plan = plan_updates(updates)
                    applied = sink.apply(plan)
                told["rows_matched"] = applied.rows_matched
                told["rows_changed"] = applied.rows_changed
                told["statements"] = applied.statements
        finally:
            self.served.seconds += time.monotonic() - started
        self.served.note_applied(applied)
        if self._of._watch is not None:
            self._of._watch(self.destination.name, plan, applied)
        return plan, applied

    def _return(self, leased: Sequence[Delivery], exc: Exception) -> None:
        self._graph.return_updates(
            [item.position for item in leased],
            type(exc).__name__,
            dead=False,
            destination=self.destination.name,
        )

    def _refuse(
        self, alone: Sequence[tuple[Delivery, Exception]], aside: Sequence[Delivery], others: bool
    ) -> None:
        """
        What the destination refused, and would again, comes later.

        An update that was refused alone, three times, and others were applied since the first of
        these, is given up. Where nothing can be applied at all, nobody is. A table of which nothing
        can be applied, while others can, is put off as a missing one is.
        """
        reasons = {item.update.table: tell(exc) for item, exc in alone}
        barred = {item.update.table for item in aside} if others else set()
        put_off = [item for item in aside if others]
        for item, exc in alone:
            told = self.served.last_error = tell(exc)
            _log.warning(
                "%s: update %s is refused: %s",
                self.destination.name,
                item.update.id,
                told,
                exc_info=trace(exc),
            )
            if item.update.table in barred:
                put_off.append(item)
                continue
            self._refused[item.position] = count = self._refused.get(item.position, 0) + 1
            if count >= REFUSED_ALONE and item.position in self._applied_since:
                self._refused.pop(item.position)
                self._applied_since.discard(item.position)
                self._bury([(item, told)])
            else:
                seconds = _delay(item.attempts, self._of._pauses[1])
                self._hold([item.position], seconds, applied=False)
        if put_off:
            rejected = [
                (item.update.id, TableError(reasons[item.update.table])) for item in put_off
            ]
            self._settle(put_off, Plan(steps=(), updates=()), Applied(rejected=tuple(rejected)))
        elif aside:
            # Whoever comes after them has his turn.
            seconds = _delay(min(item.attempts for item in aside), self._of._pauses[1])
            self._hold([item.position for item in aside], seconds, applied=False)

    def _bury(self, dead: Sequence[tuple[Delivery, str]]) -> None:
        for item, reason in dead:
            self._graph.return_updates(
                [item.position], reason, dead=True, destination=self.destination.name
            )
            _log.error(
                "%s: update %s is given up: %s", self.destination.name, item.update.id, reason
            )
        self.served.dead += len(dead)

    def _settle(self, leased: Sequence[Delivery], plan: Plan, applied: Applied) -> None:
        """
        Every update of the window is done, held, put off or dead.

        Where the graph fails half-way the rest comes again when its lease has ended, not before:
        it is applied, so nobody waits for it. What is counted, is counted when all is told.
        """
        refused: dict[str, RecognitionError] = {**dict(plan.rejected), **dict(applied.rejected)}
        destination = self.destination
        sink = destination.sink
        counted = isinstance(sink, Channel) or sink.capabilities.counts_per_update
        missing = _find_unmatched(leased, plan, applied, counted=counted)
        done: list[Delivery] = []
        held: list[int] = []
        kept: list[int] = []
        dead: list[tuple[Delivery, str]] = []
        put_off: dict[int, list[int]] = {}
        lost: list[tuple[UpdateByCriteria, int]] = []
        now = datetime.now(UTC)
        for item in leased:
            update = item.update
            error = refused.get(update.id)
            if isinstance(error, TableError) and not isinstance(error, ValueRefusedError):
                age = (now - update.created_at).total_seconds()
                if age > self._of._patience and item.attempts >= 5:
                    dead.append((item, str(error)))
                else:
                    put_off.setdefault(item.attempts, []).append(item.position)
                    self.served.last_error = str(error)
            elif error is not None:
                dead.append((item, str(error)))
            elif (
                destination.settle
                and not item.applied
                and (destination.reapply_all or update.id in missing)
            ):
                held.append(item.position)
            else:
                settled = item.applied and destination.settle
                age = (now - update.created_at).total_seconds()
                if destination.again and age < destination.again:
                    kept.append(item.position)
                else:
                    done.append(item)
                    settled = settled and not destination.again  # else it was told before
                if settled and (rows := missing.get(update.id)):
                    lost.append((update, rows))
        for attempts, positions in put_off.items():
            self._hold(positions, _delay(attempts, self._of._pauses[1]), applied=False)
        if held:
            self._hold(held, destination.settle, applied=True)
        if kept:
            self._hold(kept, destination.again, applied=True)
        self._bury(dead)
        if done:
            self._graph.acknowledge([item.position for item in done], destination.name)
        for item in done:
            self._refused.pop(item.position, None)
            self._applied_since.discard(item.position)
        for item in leased:
            if item.update.id not in refused:
                if item.applied:
                    self.served.reapplied += 1
                else:
                    self.served.note_lag(item.update, now)
        for update, rows in lost:
            self._report(update, rows)
        self.served.updates += len(done)
        self.served.held += len(held) + len(kept)
        self.served.postponed += sum(map(len, put_off.values()))
        _log.info(
            "%s: window of %d updates: %d done, %d held, %d put off, %d dead; %d rows matched,"
            " %d changed, %d statements",
            destination.name,
            len(leased),
            len(done),
            len(held) + len(kept),
            sum(map(len, put_off.values())),
            len(dead),
            applied.rows_matched,
            applied.rows_changed,
            applied.statements,
        )

    def _report(self, update: UpdateByCriteria, rows: int) -> None:
        """Rows that an update expected never came."""
        found = self.served.unmatched.setdefault(update.table, Unmatched())
        found.updates += 1
        found.rows += rows
        found.oldest = min(found.oldest or update.created_at, update.created_at)
        _log.info(
            "%s: update %s of table %s expected %d rows more than came",
            self.destination.name,
            update.id,
            update.table,
            rows,
        )

    def _is_filling(self) -> bool:
        """Whether something is to be told now of what the graph knew before."""
        return self.unfilled and time.monotonic() >= self._fill_at

    def _fill_on(self) -> None:
        """Tell a new destination one part more of what the graph knew before it was registered."""
        assert self._of._rules is not None
        name = self.destination.name
        if self._restating is None:
            _log.info("%s: is filled with what the graph knows", name)
            self._restating = self._graph.restate(self._of._rules)
            self._part, self._lacks = [], False
            self._fill_began = time.monotonic()
        if not self._part:
            self._part = next(self._restating, [])
        if not self._part:
            self._end_fill()
            return
        plan, applied = self._apply(self._part)
        refused = [*plan.rejected, *applied.rejected]
        self._recovered()
        self.served.filled += len(self._part) - len(refused)
        self._part = []
        if refused:
            self._lacks = self._lacks or any(_can_be_mended(e) for _, e in refused)
            self.served.last_error = str(refused[0][1])
            _log.warning(
                "%s: %d updates of what the graph knows were refused, the first: %s",
                name,
                len(refused),
                refused[0][1],
            )

    def _end_fill(self) -> None:
        """All was told; what a table could not take is told again, while somebody may mend it."""
        self._restating = None
        now = time.monotonic()
        name = self.destination.name
        if self._lacks and now - self._fill_first < self._of._patience:
            # At most half of the time is spent with it.
            self._fill_at = now + max(self._of._pauses[1], now - self._fill_began)
            return
        self._graph.add_destination(name, filled=True)
        self.unfilled = False
        _log.info("%s: was filled, %d updates", name, self.served.filled)


def _can_be_mended(error: RecognitionError) -> bool:
    """The table, or what is set for it, and not the update is wrong."""
    return isinstance(error, (TableError, ConfigurationError)) and not isinstance(
        error, ValueRefusedError
    )


def _find_unmatched(
    leased: Sequence[Delivery], plan: Plan, applied: Applied, *, counted: bool = True
) -> dict[str, int]:
    """
    The updates of a window of which rows may be missing: how many, by the update's id.

    0 stands for "not known": the update does not say how many rows it expects, or a row that it did
    not expect may have been counted: a range meets that of an event which the graph does not know
    yet, and it stands for one that is still on its way. Of a sink that does not count by update
    (``counted``) all may be missing where fewer came than the window expects.
    """
    expected: dict[str, int] = {}
    unsure: set[str] = set()
    for step in plan.steps:
        for row in step.rows:
            # What a later update of the plan covers is expected of that one.
            expected[row.update_id] = expected.get(row.update_id, 0) + (row.expected_rows or 0)
            if row.expected_rows != 1 or step.shape.messages is None:
                unsure.add(row.update_id)
    other = counted or applied.rows_matched >= sum(expected.values())
    missing: dict[str, int] = {}
    for item in leased:
        update = item.update
        wanted = expected.get(update.id)
        if wanted is None:
            continue  # nothing is left of it
        found = applied.matched_by_update.get(update.id, wanted if other else 0)
        if update.expected_rows is None:
            missing[update.id] = 0
        elif found < wanted or update.id in unsure:
            missing[update.id] = max(0, wanted - found)
    return missing


def split(part: Sequence[T], table: Callable[[T], str]) -> list[Sequence[T]]:
    """What is smaller than a part of a window: by table, else its halves, the first one last."""
    by_table: dict[str, list[T]] = {}
    for each in part:
        by_table.setdefault(table(each), []).append(each)
    if len(by_table) > 1:
        return list(by_table.values())
    half = len(part) // 2
    return [part[half:], part[:half]] if half else []


def _delay(attempts: int, longest: float) -> float:
    """When something that failed so often before is tried again, in seconds."""
    return min(longest, 5.0 * 2.0 ** min(attempts, 30)) * random.uniform(0.5, 1.0)
