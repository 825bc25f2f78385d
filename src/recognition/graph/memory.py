"""
A graph in dictionaries: for tests, and laid over another graph for rehearsals.

A rehearsal reads through to the graph below and keeps everything that it writes to itself, so
that ``plan`` decides exactly what ``run`` would decide and nobody ever sees it. Nothing of it is
durable, and it is as large as what it touched.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from recognition.attribution import BEGINNING, DAY, END, Claim
from recognition.errors import ConfigurationError, GraphError, InputError
from recognition.events import Identifier
from recognition.graph import (
    Backlog,
    Delivery,
    GraphStats,
    StoredGraph,
    check_destination,
    check_name,
)
from recognition.graph.store import (
    Day,
    Known,
    Reference,
    Rows,
    Sighting,
    Store,
    StoredLink,
    Timeline,
    Trait,
)
from recognition.identity import Seen
from recognition.messages import UpdateByCriteria
from recognition.rules import Rules

# Handles made in a rehearsal never meet those of the graph below, which may be one itself.
_APART = 1 << 128


_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Progress:
    """How far a destination is with an update."""

    attempts: int = 0
    until: float = 0.0
    applied: bool = False
    dead: str | None = None


class MemoryGraph(StoredGraph):
    """
    A graph in this process, gone when it is closed. Safe for several threads.

    Args:
        below: Opens the store to be read through to, for a rehearsal.
    """

    def __init__(
        self, *, below: Callable[[str], AbstractContextManager[Store]] | None = None
    ) -> None:
        self._lock = threading.RLock()
        self._below = below
        self._open = ExitStack()
        self._stores: dict[str, _MemoryStore] = {}
        self._outbox: dict[int, UpdateByCriteria] = {}
        #: By destination, what it has not done; ``""`` is whoever names none.
        self._progress: dict[str, dict[int, _Progress]] = {"": {}}
        self._filled: dict[str, bool] = {}
        self._position = 0
        self._failed: str | None = None

    @classmethod
    def from_url(cls, url: str) -> MemoryGraph:
        """``memory:`` has nothing to configure."""
        del url
        return cls()

    @contextmanager
    def _transaction(self, workspace: str, *, write: bool = True) -> Iterator[Store]:
        with self._lock:
            if self._failed is not None:
                raise GraphError(
                    f"this graph stopped in the middle of a decision ({self._failed});"
                    " a memory graph cannot undo, open a new one",
                    written=True,
                )
            if workspace not in self._stores:
                below = None
                if self._below is not None:
                    below = self._open.enter_context(self._below(workspace))
                self._stores[workspace] = _MemoryStore(below)
            store = self._stores[workspace]
            try:
                yield store
            except (InputError, ConfigurationError):
                # Refused before anything was written.
                raise
            except BaseException as exc:
                if write:
                    self._failed = type(exc).__name__
                raise
            for update in store.take_emitted():
                self._position += 1
                self._outbox[self._position] = update
                for progress in self._progress.values():
                    progress[self._position] = _Progress()

    def _run(self, rules: Rules, work: Callable[[Store], _Result]) -> _Result:
        with self._transaction(rules.workspace) as store:
            return work(store)

    def _reader(self, workspace: str) -> AbstractContextManager[Store]:
        return self._transaction(workspace, write=False)

    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        """See `Graph.lease_updates`."""
        now = time.monotonic()
        with self._lock:
            check_destination(destination, self._filled)
            found: list[Delivery] = []
            for position, mine in self._progress[destination].items():
                if len(found) == limit:
                    break
                if mine.dead is None and mine.until <= now:
                    update = self._outbox[position]
                    found.append(Delivery(position, update, mine.attempts, mine.applied))
                    mine.attempts += 1
                    mine.until = now + seconds
            return found

    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        """See `Graph.acknowledge`."""
        with self._lock:
            for position in positions:
                self._progress.get(destination, {}).pop(position, None)
                if not any(position in mine for mine in self._progress.values()):
                    self._outbox.pop(position, None)

    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        """See `Graph.hold_updates`."""
        with self._lock:
            for position in positions:
                mine = self._progress.get(destination, {}).get(position)
                if mine is not None and mine.dead is None:
                    mine.until = time.monotonic() + seconds
                    mine.applied = mine.applied or applied

    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        """See `Graph.return_updates`."""
        with self._lock:
            for position in positions:
                mine = self._progress.get(destination, {}).get(position)
                if mine is not None:
                    mine.until = 0.0
                    mine.dead = reason if dead else None

    def dead_updates(self, limit: int, destination: str = "") -> list[tuple[Delivery, str]]:
        """See `Graph.dead_updates`."""
        with self._lock:
            return [
                (Delivery(position, self._outbox[position], p.attempts, p.applied), p.dead)
                for position, p in self._progress.get(destination, {}).items()
                if p.dead is not None
            ][:limit]

    def destinations(self) -> dict[str, bool]:
        """See `Graph.destinations`."""
        with self._lock:
            return dict(self._filled)

    def add_destination(self, name: str, *, filled: bool = False) -> None:
        """See `Graph.add_destination`."""
        check_name(name)
        with self._lock:
            if name not in self._filled:
                self._progress.pop("", None)
                self._progress[name] = {position: _Progress() for position in self._outbox}
                self._filled[name] = filled
            self._filled[name] = self._filled[name] or filled

    def drop_destination(self, name: str) -> None:
        """See `Graph.drop_destination`."""
        with self._lock:
            if self._filled.pop(name, None) is None:
                return
            gone = self._progress.pop(name)
            if not self._progress:
                self._progress[""] = {position: _Progress() for position in self._outbox}
            for position in gone:
                if not any(position in mine for mine in self._progress.values()):
                    del self._outbox[position]

    def backlog(self, destination: str = "") -> Backlog:
        """See `Graph.backlog`."""
        with self._lock:
            check_destination(destination, self._filled)
            mine = self._progress[destination]
            living = [(position, p) for position, p in mine.items() if p.dead is None]
            waiting = [self._outbox[position].created_at for position, p in living if not p.applied]
            return Backlog(
                waiting=len(waiting),
                held=len(living) - len(waiting),
                dead=len(mine) - len(living),
                oldest=min(waiting, default=None),
            )

    def stats(self) -> GraphStats:
        """See `Graph.stats`; of a rehearsal, what it touched. ``bytes`` is 0."""
        with self._lock:
            stores = self._stores.values()
            given = [one for mine in self._progress.values() for one in mine.items()]
            pending = {position for position, p in given if p.dead is None}
            links = [link for s in stores for found in s.all_links() for link in found]
            return GraphStats(
                anonymous_ids=sum(len(s.handles_by_device) for s in stores),
                identifiers=sum(len(s.by_handle) for s in stores),
                persons=sum(
                    len({known.canonical for _, known, _ in s.by_handle.values()}) for s in stores
                ),
                claims=sum(len(c) for s in stores for c in s.claims_by_timeline.values()),
                links=sum(not link.refused for link in links),
                conflicts=sum(link.refused in ("unique", "limit") for link in links),
                references=sum(
                    len(refs)
                    for s in stores
                    for by_tables, _ in s.rows_by_subject.values()
                    for refs in by_tables.values()
                ),
                pending_updates=len(pending),
                dead_updates=sum(p.dead is not None for _, p in given),
                bytes=0,
            )

    def expire(self, before: int) -> int:
        """See `Graph.expire`."""
        horizon = before // DAY * DAY
        days: set[int] = set()
        with self._lock:
            for store in self._stores.values():
                for by_tables, by_day in store.rows_by_subject.values():
                    for kept in by_day.values():
                        days.update(d for d in kept if d < horizon // DAY)
                        kept.difference_update(days)
                    for refs in by_tables.values():
                        old = {m: t for m, t in refs.items() if t < horizon}
                        days.update(t // DAY for t in old.values())
                        for message_id in old:
                            del refs[message_id]
        return len(days)

    def close(self) -> None:
        """See `Graph.close`."""
        with self._lock:
            self._open.close()
            self._stores.clear()
            self._outbox.clear()
            self._progress = {"": {}}
            self._filled.clear()


# Of one subject, by tables: message ids with their times, and the days that have rows.
_Rows = tuple[dict[tuple[str, ...], dict[str, int]], dict[tuple[str, ...], set[int]]]


@dataclass(slots=True, eq=False)
class _MemoryStore:
    """
    One workspace in dictionaries, each key read from the store below when first touched.

    A key with an empty value was looked up below and is not there.
    """

    below: Store | None
    handles_by_device: dict[str, int] = field(default_factory=dict)
    devices: dict[int, str] = field(default_factory=dict)
    claimed: set[int] = field(default_factory=set)
    claims_by_timeline: dict[int, list[Claim]] = field(default_factory=dict)
    timelines_of: dict[int, set[int]] = field(default_factory=dict)
    barred_pairs: set[tuple[int, int]] = field(default_factory=set)
    released_until: dict[int, int] = field(default_factory=dict)
    handles: dict[Identifier, int] = field(default_factory=dict)
    by_handle: dict[int, tuple[Identifier, Known, str]] = field(default_factory=dict)
    links_by_component: dict[int, dict[tuple[int, int, bool], StoredLink]] = field(
        default_factory=dict
    )
    traits_by_handle: dict[int, dict[str, Trait]] = field(default_factory=dict)
    gone: dict[Identifier, int] = field(default_factory=dict)
    rows_by_subject: dict[int, _Rows] = field(default_factory=dict)
    known_tables: set[str] = field(default_factory=set)
    first: int = field(init=False)
    handle: int = field(init=False)
    rules: str = ""
    sequence: int = -1
    decisions: int = 0
    emitted: list[UpdateByCriteria] = field(default_factory=list)

    def __post_init__(self) -> None:
        below = self.below
        self.first = 0 if below is None else _APART
        if isinstance(below, _MemoryStore):
            self.first += below.first
        self.handle = self.first

    def take_emitted(self) -> list[UpdateByCriteria]:
        taken, self.emitted = self.emitted, []
        return taken

    def all_links(self) -> list[list[StoredLink]]:
        return [list(links.values()) for links in self.links_by_component.values()]

    def _new_handle(self) -> int:
        self.handle += 1
        return self.handle

    def decided_with(self, rules: str) -> str:
        if not self.rules:
            self.rules = rules if self.below is None else self.below.decided_with(rules)
        return self.rules

    # ---------------------------------------------------------------- timelines

    def timelines(self, anonymous_ids: Collection[str]) -> dict[str, Timeline]:
        unread = [value for value in anonymous_ids if value not in self.handles_by_device]
        if self.below is not None and unread:
            for value, found in self.below.timelines(unread).items():
                self.handles_by_device[value] = found.handle
                self.devices[found.handle] = value
                self.released_until[found.handle] = found.released_until
                if found.claimed:
                    self.claimed.add(found.handle)
        return {
            value: Timeline(handle, handle in self.claimed, self.released_until.get(handle, -1))
            for value in anonymous_ids
            if (handle := self.handles_by_device.get(value)) is not None
        }

    def add_timelines(self, anonymous_ids: Collection[str]) -> dict[str, int]:
        made = {value: self._new_handle() for value in anonymous_ids}
        self.handles_by_device.update(made)
        self.devices.update({handle: value for value, handle in made.items()})
        return made

    def anonymous_ids(self, timelines: Collection[int]) -> dict[int, str]:
        unread = [handle for handle in timelines if handle not in self.devices]
        if self.below is not None and unread:
            for handle, value in self.below.anonymous_ids(unread).items():
                self.devices[handle] = value
                self.handles_by_device[value] = handle
                self.claimed.add(handle)
        return {handle: self.devices[handle] for handle in timelines if handle in self.devices}

    def _claims_of(self, timeline: int) -> list[Claim]:
        if timeline not in self.claims_by_timeline:
            read = []
            if self.below is not None and timeline < self.first:
                read = self.below.claims({timeline: (BEGINNING, END)}).get(timeline, [])
            self.claims_by_timeline[timeline] = list(read)
        return self.claims_by_timeline[timeline]

    def claims(
        self, windows: Mapping[int, tuple[int, int]], *, first: bool = False
    ) -> dict[int, list[Claim]]:
        found = {}
        for timeline, (low, high) in windows.items():
            claims = self._claims_of(timeline)
            if any(claim.until < END for claim in claims):
                found[timeline] = list(claims)
            elif claims:
                start = max(bisect_left(claims, low, key=_time) - 1, 0)
                start = bisect_left(claims, claims[start].time, key=_time)
                end = min(bisect_right(claims, high, key=_time), len(claims) - 1)
                end = bisect_right(claims, claims[end].time, key=_time)
                before = []
                if first:
                    before = claims[: min(start, bisect_right(claims, claims[0].time, key=_time))]
                found[timeline] = [*before, *claims[start:end]]
        return found

    def add_claims(self, claims: Mapping[str, tuple[int, Collection[Claim]]]) -> None:
        for timeline, new in claims.values():
            held = self._claims_of(timeline)
            present = {claim[:2] for claim in held}
            self.claimed.add(timeline)
            for claim in new:
                if claim[:2] not in present:
                    insort(held, claim)
                if isinstance(claim.owner, int):
                    self._timelines_of(claim.owner).add(timeline)

    def replace_claims(
        self, timeline: int, gone: Collection[Claim], new: Collection[Claim]
    ) -> None:
        taken = set(gone)
        held = [claim for claim in self._claims_of(timeline) if claim not in taken]
        self.claims_by_timeline[timeline] = sorted([*held, *new])

    def soft_claims(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, list[Claim]]:
        return {
            timeline: [c for c in self._claims_of(timeline) if c.soft and low <= c.time <= high]
            for timeline, (low, high) in windows.items()
        }

    def _timelines_of(self, identifier: int) -> set[int]:
        if identifier not in self.timelines_of:
            read: set[int] = set()
            if self.below is not None and identifier < self.first:
                read = self.below.claimed_by([identifier])
            self.timelines_of[identifier] = set(read)
        return self.timelines_of[identifier]

    def claimed_by(self, identifiers: Collection[int]) -> set[int]:
        return {t for identifier in identifiers for t in self._timelines_of(identifier)}

    def barred(self, pairs: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        found = {pair for pair in pairs if pair in self.barred_pairs}
        if self.below is not None:
            found |= self.below.barred([pair for pair in pairs if max(pair) < self.first])
        return found

    def bar(self, timeline: int, identifier: int) -> None:
        self.barred_pairs.add((timeline, identifier))

    def release(self, anonymous_id: str, until: int) -> None:
        timeline = self.handles_by_device[anonymous_id]
        self.released_until[timeline] = max(until, self.released_until.get(timeline, -1))

    # ---------------------------------------------------------------- identifiers

    def identifiers(self, identifiers: Collection[Identifier]) -> dict[Identifier, Known]:
        unread = [i for i in identifiers if i not in self.handles and i not in self.gone]
        if self.below is not None and unread:
            self._take_in({held.handle for held in self.below.identifiers(unread).values()})
        return {
            identifier: self.by_handle[handle][1]
            for identifier in identifiers
            if (handle := self.handles.get(identifier)) is not None
        }

    def _take_in(self, handles: Collection[int]) -> None:
        if self.below is None:
            return
        unread = [h for h in handles if h < self.first and h not in self.by_handle]
        seen_as = self.below.seen_as(unread)
        for handle, (identifier, known) in self.below.held(unread).items():
            if identifier not in self.gone:
                self.handles[identifier] = handle
                self.by_handle[handle] = (identifier, known, seen_as[handle])

    def held(self, handles: Collection[int]) -> dict[int, tuple[Identifier, Known]]:
        self._take_in(handles)
        return {h: self.by_handle[h][:2] for h in handles if h in self.by_handle}

    def seen_as(self, identifiers: Collection[int]) -> dict[int, str]:
        self._take_in(identifiers)
        return {h: self.by_handle[h][2] for h in identifiers if h in self.by_handle}

    def add_identifiers(self, seen: Mapping[Identifier, tuple[Seen, str]]) -> dict[Identifier, int]:
        made = {}
        for identifier, (sighting, value) in seen.items():
            handle = made[identifier] = self.handles[identifier] = self._new_handle()
            self.by_handle[handle] = (identifier, Known(handle, sighting, 0, handle), value)
        return made

    def see(self, seen: Mapping[int, tuple[Seen, str]]) -> None:
        for handle, (sighting, value) in seen.items():
            identifier, known, _ = self.by_handle[handle]
            self.by_handle[handle] = (identifier, known._replace(seen=sighting), value)

    def set_persons(self, persons: Mapping[int, tuple[int, int]]) -> None:
        self._take_in(persons)
        for handle, (component, canonical) in persons.items():
            identifier, known, value = self.by_handle[handle]
            known = known._replace(component=component, canonical=canonical)
            self.by_handle[handle] = (identifier, known, value)

    def _links_of(self, component: int) -> dict[tuple[int, int, bool], StoredLink]:
        if component not in self.links_by_component:
            read: list[StoredLink] = []
            if self.below is not None and component < self.first:
                read = self.below.links([component]).get(component, [])
            self.links_by_component[component] = {(x.a, x.b, x.alias): x for x in read}
        return self.links_by_component[component]

    def links(self, components: Collection[int]) -> dict[int, list[StoredLink]]:
        return {component: list(self._links_of(component).values()) for component in components}

    def put_links(
        self, component: int, absorbed: Collection[int], links: Iterable[StoredLink]
    ) -> None:
        held = self._links_of(component)
        for other in absorbed:
            held.update(self._links_of(other))
            self.links_by_component[other] = {}
        held.update({(link.a, link.b, link.alias): link for link in links})

    def _traits_of(self, identifier: int) -> dict[str, Trait]:
        if identifier not in self.traits_by_handle:
            read: dict[str, Trait] = {}
            if self.below is not None and identifier < self.first:
                read = self.below.traits([identifier]).get(identifier, {})
            self.traits_by_handle[identifier] = dict(read)
        return self.traits_by_handle[identifier]

    def traits(self, identifiers: Collection[int]) -> dict[int, dict[str, Trait]]:
        return {i: dict(found) for i in identifiers if (found := self._traits_of(i))}

    def put_traits(self, traits: Mapping[int, Mapping[str, Trait]]) -> None:
        for identifier, found in traits.items():
            self.traits_by_handle[identifier] = dict(found)

    def forgotten(self, identifiers: Collection[Identifier]) -> dict[Identifier, int]:
        found = {} if self.below is None else self.below.forgotten(identifiers)
        for identifier in identifiers:
            if identifier in self.gone:
                found[identifier] = max(found.get(identifier, 0), self.gone[identifier])
        return found

    def forget(self, identifiers: Mapping[Identifier, int], until: int) -> None:
        handles = set(identifiers.values()) - {0}
        components = {known.component for _, known in self.held(handles).values()} - {0}
        for component in components:
            self.links_by_component[component] = {
                key: link
                for key, link in self._links_of(component).items()
                if link.a not in handles and link.b not in handles
            }
        for identifier, handle in identifiers.items():
            self.gone[identifier] = max(until, self.gone.get(identifier, 0))
            self.handles.pop(identifier, None)
            self.by_handle.pop(handle, None)
            self.traits_by_handle[handle] = {}
            self.timelines_of[handle] = set()
            self.rows_by_subject[-handle] = ({}, {})

    # ---------------------------------------------------------------- references

    def _rows_of(self, subject: int) -> _Rows:
        if subject not in self.rows_by_subject:
            read = Rows({}, {})
            if self.below is not None and abs(subject) < self.first:
                window = {subject: (BEGINNING, END)}
                read = self.below.rows(window).get(subject, read)
            self.rows_by_subject[subject] = (
                {tables: dict(refs) for tables, refs in read.references.items()},
                {tables: set(days) for tables, days in read.days.items()},
            )
        return self.rows_by_subject[subject]

    def rows(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, Rows]:
        found = {}
        for subject, (start, end) in windows.items():
            references, days = self._rows_of(subject)
            inside = {
                tables: {m: time for m, time in refs.items() if start <= time < end}
                for tables, refs in references.items()
            }
            touching = {
                tables: {d for d in held if d * DAY < end and (d + 1) * DAY > start}
                for tables, held in days.items()
            }
            rows = Rows(
                {tables: refs for tables, refs in inside.items() if refs},
                {tables: held for tables, held in touching.items() if held},
            )
            if rows.references or rows.days:
                found[subject] = rows
        return found

    def add_references(self, references: Iterable[Reference]) -> None:
        for subject, tables, message_id, at in references:
            self._rows_of(subject)[0].setdefault(tables, {})[message_id] = at

    def add_days(self, days: Iterable[Day]) -> None:
        for subject, tables, day in days:
            self._rows_of(subject)[1].setdefault(tables, set()).add(day)

    def find(self, message_id: str) -> list[Sighting]:
        found = [] if self.below is None else self.below.find(message_id)
        for subject, (by_tables, _) in self.rows_by_subject.items():
            for tables, refs in by_tables.items():
                if message_id in refs:
                    found.append(Sighting(subject, refs[message_id], tables))
        for timeline, claims in self.claims_by_timeline.items():
            for claim in claims:
                if claim.message_id == message_id:
                    found.append(Sighting(timeline, claim.time, ()))
        return found

    def tables(self) -> set[str]:
        below = set() if self.below is None else self.below.tables()
        return below | self.known_tables

    def note_tables(self, tables: Iterable[str]) -> None:
        self.known_tables.update(tables)

    # ---------------------------------------------------------------- outbox

    def last_sequence(self) -> int:
        if self.sequence < 0:
            self.sequence = 0 if self.below is None else self.below.last_sequence()
        return self.sequence

    def next_sequence(self) -> int:
        self.sequence = self.last_sequence() + 1
        return self.sequence

    def page(self, after: int, limit: int, *, known: bool) -> list[int]:
        mine = self.by_handle if known else self.claimed
        below: list[int] = []
        if self.below is not None and after < self.first:
            below = self.below.page(after, limit, known=known)
        found = {*below, *(handle for handle in mine if handle > after)}
        return sorted(found)[:limit]

    def lock(self, timelines: Collection[int], identifiers: Collection[int]) -> None:
        pass  # writers take turns

    def versions(self, subjects: Collection[int]) -> dict[int, int]:
        return dict.fromkeys(subjects, self.next_sequence())

    def emit(self, updates: Iterable[UpdateByCriteria]) -> None:
        self.emitted.extend(updates)

    def decision(self) -> int:
        return self.decisions

    def decided(self) -> None:
        self.decisions += 1


def _time(claim: Claim) -> int:
    return claim.time
