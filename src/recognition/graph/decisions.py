"""
What one batch changes: from observations to claims, links, spans and the updates they cause.

Everything happens in the one transaction that a `Store` is: what is decided and the updates that
follow become durable together, or not at all. Nothing here knows how a store keeps anything, and
nothing is remembered between two calls.

The order of work, the same for every decision:

1. read what the batch touches: identifiers, links, claims;
2. decide the persons anew where a link is new or earlier (`recognition.identity`);
3. note what the rows of everybody concerned hold *before*;
4. write; note what they hold *after*;
5. compare the spans of every touched timeline (`recognition.attribution`): each difference becomes
   updates, bounded by the references of the rows that are known to be there.

Which update is right to send is said once, in `_emit_device` and `_emit_range`:

* A row that names a user itself is never written, but into a column of recognition's own.
* A row of an identified event that names no user (an email alone) looks anonymous to the table. A
  range never includes the instant of such a row of somebody else; rows at that very instant are
  named by message id.
* A range holds for every anonymous row of the device in it, those that are still on their way
  included: the span has one owner.
* Where updates are told apart by a column of recognition's own, all that may meet the same row ask
  for it by the same key, so that a sink can keep their order: a row of an identified event that
  names no user is asked for by its device, as the ranges do that may have met it before.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from recognition.attribution import (
    BEGINNING,
    DAY,
    END,
    Change,
    Claim,
    Policy,
    ask,
    changes,
    owner_at,
    spans,
)
from recognition.errors import InputError
from recognition.events import Identifier
from recognition.graph.store import Day, Known, Reference, Rows, Store, StoredLink, Trait
from recognition.identity import Link, Seen, link_of, links_of, resolve
from recognition.messages import (
    VERSION_COLUMN,
    Between,
    Cause,
    Criterion,
    Empty,
    Equals,
    Messages,
    UpdateByCriteria,
    decide_id,
)
from recognition.rules import References, Rules, Supersede

USER_ID = "user_id"

# One update names at most this many messages (about 1 MB as JSON), and ids of so many bytes: a
# device of a million events makes many messages of bounded size instead of one without bound.
# MongoDB keeps no document above 16 MB.
MAX_REFS = 10_000
MAX_REF_BYTES = 2_000_000

# The end of a claim that has no effect at all, but whose row is still there.
_NEVER = BEGINNING - 1

# Refused links keep identifiers in one component without making them one person; deciding a person
# reads its whole component, so a component has a limit as well. A multiple of the person's.
COMPONENT_FACTOR = 10

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST = datetime(2262, 4, 11, tzinfo=UTC)
_LAST_TIME = (_LAST - _EPOCH) // timedelta(microseconds=1)


class Owner(NamedTuple):
    """Whose row it is: the canonical id of the person, and the traits that the rules name."""

    id: str
    traits: tuple[str | int | float | bool | None, ...] = ()


class Observation(NamedTuple):
    """
    One event, reduced to what the graph needs.

    ``known`` is normalised, without blocked values, highest priority first; ``as_seen`` runs
    beside it. ``names_user``: the event's own row holds a user id, so that it is never empty.
    """

    message_id: str
    time: int
    anonymous_id: str | None
    known: tuple[Identifier, ...]
    as_seen: tuple[str, ...]
    names_user: bool
    previous_id: str | None
    tables: tuple[str, ...]
    traits: Mapping[str, str | int | float | bool]


@dataclass(slots=True)
class Counts:
    """What a batch did to the graph; all are numbers of things, none is a rate."""

    claims: int = 0
    links: int = 0
    conflicts: int = 0
    """Links refused: two values of a unique type, or a limit."""
    updates: int = 0


class Receipt(NamedTuple):
    """What was stamped on the rows of a batch; to be given back once they are visible."""

    decision: int
    observations: tuple[Observation, ...]
    stamped: tuple[Owner | None, ...]


@dataclass(slots=True)
class Outcome:
    """The owners of a batch's events, in their order, and what became of the graph."""

    owners: list[Owner | None]
    versions: list[int]
    """What each event's row holds as its version when it is stamped: not less than the sequence of
    any update about it before, less than that of all after. 0 where nobody is stamped."""
    receipt: Receipt
    counts: Counts


@dataclass(slots=True)
class _Device:
    """A timeline of the batch: its handle, and the claims around the batch's events."""

    handle: int
    released_until: int = -1
    claims: list[Claim] = field(default_factory=list)
    fresh: bool = False


class _Rewrite(NamedTuple):
    """The rows of a timeline in a span that changed."""

    timeline: int
    anonymous_id: str
    change: Change
    message_id: str | None


_NO_ROWS = Rows({}, {})

# What a row may hold of which nothing is known: nothing that an owner could be is equal to it.
_ANOTHER = Owner("", ("",))


def observe(
    store: Store, rules: Rules, observations: Sequence[Observation], *, rows_first: bool = False
) -> Outcome:
    """
    Take a batch in: remember it, decide, and emit the updates of what changed.

    The same batch again changes nothing and emits nothing, but gives the same owners.

    Args:
        store: One transaction.
        rules: How the workspace is decided.
        observations: The batch.
        rows_first: What `device_rows` names was written before the transaction began.
    """
    batch = _Decision(store, rules)
    return batch.observe(observations, rows_first=rows_first)


def recheck(store: Store, rules: Rules, receipt: Receipt) -> int:
    """
    Emit updates for rows whose owner changed between stamping and becoming visible.

    Returns:
        The number of updates.
    """
    if receipt.decision == store.decision():
        return 0
    batch = _Decision(store, rules)
    return batch.recheck(receipt)


def catch_up(
    store: Store, rules: Rules, missed: Mapping[int, tuple[Rows, tuple[int, int]]], tables: set[str]
) -> int:
    """
    Emit updates for rows that a decision could not see, because they came while it was taken.

    Args:
        store: One transaction, begun after that decision was durable.
        rules: How the workspace is decided.
        missed: By subject, the rows that it did not see, and the window that it changed.
        tables: Tables that were first seen in between.

    Returns:
        The number of updates.
    """
    return _Decision(store, rules).catch_up(missed, tables)


def restate(
    store: Store, rules: Rules, timelines: Collection[int], identifiers: Collection[int]
) -> list[UpdateByCriteria]:
    """
    The updates that say who owns the rows of these timelines and known identifiers now.

    They are for rows of which nothing is known: those that hold another owner change too. They are
    given, and not put into the outbox; later decisions have greater numbers.
    """
    return _Decision(store, rules).restate(timelines, identifiers)


def device_rows(
    rules: Rules, observations: Sequence[Observation]
) -> tuple[list[tuple[str, Observation]], list[tuple[str, Observation]]]:
    """
    The rows of a batch that belong to their device, with its anonymous id.

    Returns:
        Those whose references are kept, and those of which the day is kept.
    """
    follow = rules.identified_follow_device
    by_tables: dict[tuple[str, ...], tuple[bool, bool]] = {}
    ids: list[tuple[str, Observation]] = []
    days: list[tuple[str, Observation]] = []
    for o in observations:
        if o.anonymous_id is None or (o.known and not follow):
            continue
        kept = by_tables.get(o.tables)
        if kept is None:
            modes = {rules.references_of(table) for table in o.tables}
            kept = by_tables[o.tables] = (References.IDS in modes, References.DAYS in modes)
        if kept[0]:
            ids.append((o.anonymous_id, o))
        if kept[1]:
            days.append((o.anonymous_id, o))
    return ids, days


def unlink(store: Store, rules: Rules, one: Identifier, other: Identifier) -> int:
    """
    Part two identifiers for good: neither what was seen nor what will be seen links them again.

    They stay one person where a third identifier links both.

    With an anonymous id and a known identifier, the device is taken from that identifier.

    Returns:
        The number of updates.
    """
    return _Decision(store, rules).unlink(one, other)


def release(store: Store, rules: Rules, anonymous_id: str, at: int) -> int:
    """
    Take a device from everybody: what it did until ``at`` (or its last claim) is nobody's for good.

    Returns:
        The number of updates.
    """
    return _Decision(store, rules).release(anonymous_id, at)


def forget(store: Store, rules: Rules, identifier: Identifier, at: int) -> int:
    """
    Erase a person. Its recognised rows become unknown and are never given to anybody else.

    What arrives later, but happened until ``at`` (or the person's last claim), stays forgotten.

    Returns:
        The number of updates.
    """
    return _Decision(store, rules).forget(identifier, at)


class _Decision:
    """One decision in one transaction."""

    def __init__(self, store: Store, rules: Rules) -> None:
        rules.check_same(store.decided_with(rules.fingerprint))
        self._store = store
        self._rules = rules
        self._counts = Counts()
        self._updates: list[UpdateByCriteria] = []
        self._tables: set[str] | None = None
        self._after: dict[int, Owner] = {}
        self._links: list[tuple[int, set[int], list[StoredLink]]] = []
        # What the traits of a person (by its canonical handle) were, where this batch changed them.
        self._old_traits: dict[int, tuple[str | int | float | bool | None, ...]] = {}
        # Claims whose rows look anonymous, by timeline, in all windows that are written.
        self._soft: dict[int, Sequence[Claim]] = {}
        # Timelines of which something was taken back: an update that empties their rows may be on
        # its way, so that rows of nobody need not be empty yet.
        self._taken_back: set[int] = set()
        self._now = datetime.now(UTC)

    # ---------------------------------------------------------------- a batch of events

    def observe(self, observations: Sequence[Observation], *, rows_first: bool) -> Outcome:
        store, rules = self._store, self._rules
        identifiers = {i for o in observations for i in o.known}
        identifiers.update(
            Identifier(USER_ID, o.previous_id) for o in observations if o.previous_id is not None
        )
        forgotten = store.forgotten(identifiers) if identifiers else {}

        seen: dict[Identifier, tuple[Seen, str]] = {}
        links: dict[tuple[Identifier, Identifier, bool], Link] = {}
        traits: dict[Identifier, dict[str, Trait]] = {}
        claims: dict[str, list[tuple[int, str, Identifier | None, int, bool]]] = defaultdict(list)
        ranges: dict[str, tuple[int, int]] = {}
        living: list[Observation] = []

        for given in observations:
            o = given
            if forgotten and o.known:
                if (until := forgotten.get(o.known[0], -1)) >= o.time:
                    if o.anonymous_id is not None:
                        _widen(ranges, o.anonymous_id, o.time)
                        claims[o.anonymous_id].append(
                            (o.time, o.message_id, None, until, not o.names_user)
                        )
                    # Its row is its device's under some rules, and nobody's under all others.
                    device = o.anonymous_id if rules.identified_follow_device else None
                    o = o._replace(anonymous_id=device, known=(), as_seen=(), previous_id=None)
                else:
                    o = _without(o, forgotten)
            living.append(o)
            device = o.anonymous_id
            if device is not None:
                span = ranges.get(device)
                if span is None:
                    ranges[device] = (o.time, o.time)
                elif not span[0] <= o.time <= span[1]:
                    _widen(ranges, device, o.time)
            if not o.known:
                continue
            sighting = Seen(False, o.time, o.message_id)
            for identifier, value in zip(o.known, o.as_seen, strict=True):
                if identifier not in seen or sighting < seen[identifier][0]:
                    seen[identifier] = (sighting, value)
            first = o.known[0]
            for link in links_of(o.known, o.time, o.message_id):
                _keep_earliest(links, link)
            if o.previous_id is not None:
                previous = Identifier(USER_ID, o.previous_id)
                if previous != first:
                    alias = link_of(
                        first, previous, alias=True, time=o.time, message_id=o.message_id
                    )
                    _keep_earliest(links, alias)
                    before = (Seen(True, o.time, o.message_id), o.previous_id)
                    if previous not in seen or before[0] < seen[previous][0]:
                        seen[previous] = before
                    # The previous id may have been a device's; if it was none, nothing is lost.
                    claims[o.previous_id].append((o.time, o.message_id, first, END, False))
                    _widen(ranges, o.previous_id, o.time)
            if o.anonymous_id is not None:
                claims[o.anonymous_id].append((o.time, o.message_id, first, END, not o.names_user))
            for trait in rules.traits:
                if trait in o.traits:
                    latest = Trait(o.time, o.message_id, o.traits[trait])
                    held = traits.setdefault(first, {})
                    held[trait] = max(held.get(trait, latest), latest, key=_rank)

        known = store.identifiers(identifiers) if identifiers else {}
        handles, lowered = self._remember(seen, known)
        persons = self._join(handles, known, lowered, links.values())
        devices = self._devices(ranges, claims, living)
        new_claims = self._new_claims(devices, claims, handles)
        told = self._learn_traits(traits, handles)
        fallback = next((o.message_id for o in living if o.known), None)
        self._carry_out(devices, new_claims, persons, told, fallback)

        owners, subjects = self._owners(living, devices, handles)
        if not rules.stamps:
            self._write_rows(living, [None] * len(living), owners, devices, handles)
        self._outlast(living, owners, devices, new_claims, rows_first=rows_first)
        self._keep_references(living, {} if rows_first else devices, handles)
        self._finish()
        if rules.stamps:
            receipt = Receipt(store.decision(), tuple(living), tuple(owners))
        else:
            # The rows carry nobody, whatever was decided: all of them are looked at again.
            receipt = Receipt(-1, tuple(living), (None,) * len(living))
        stamped = {s for s, owner in zip(subjects, owners, strict=True) if owner is not None}
        versions = store.versions(stamped)
        return Outcome(owners, [versions.get(s, 0) for s in subjects], receipt, self._counts)

    def recheck(self, receipt: Receipt) -> int:
        self._rewrite(receipt.observations, receipt.stamped)
        self._finish()
        return self._counts.updates

    def _rewrite(
        self, observations: Sequence[Observation], stamped: Sequence[Owner | None] | None
    ) -> None:
        """These rows get the owners of now; ``None``: what they hold is not known."""
        identifiers = {i for o in observations for i in o.known}
        known = self._store.identifiers(identifiers) if identifiers else {}
        handles = {identifier: held.handle for identifier, held in known.items()}
        ranges: dict[str, tuple[int, int]] = {}
        for o in observations:
            if o.anonymous_id is not None:
                _widen(ranges, o.anonymous_id, o.time)
        devices = self._devices(ranges, {}, [])
        owners, _ = self._owners(observations, devices, handles)
        # A row that is nobody's now was never anybody's, unless something was taken back.
        taken = {v for v, device in devices.items() if _ends(device.claims)}
        if stamped is None:
            stamped = [
                None if owner is None and o.anonymous_id not in taken else _ANOTHER
                for o, owner in zip(observations, owners, strict=True)
            ]
        elif taken:
            # The row may have come after what emptied its device, and what gave it away may come
            # after the row: where only the row itself knows the order, it has to be told.
            stamped = [
                _ANOTHER
                if owner is None and o.anonymous_id in taken and self._versioned(o)
                else hold
                for o, owner, hold in zip(observations, owners, stamped, strict=True)
            ]
        self._write_rows(observations, stamped, owners, devices, handles)

    # ---------------------------------------------------------------- persons

    def _remember(
        self, seen: Mapping[Identifier, tuple[Seen, str]], known: Mapping[Identifier, Known]
    ) -> tuple[dict[Identifier, int], dict[int, Seen]]:
        """Handles of all identifiers of the batch, and the sightings that became earlier."""
        new = {i: sighting for i, sighting in seen.items() if i not in known}
        earlier = {
            known[i].handle: sighting
            for i, sighting in seen.items()
            if i in known and sighting[0] < known[i].seen
        }
        handles = {identifier: held.handle for identifier, held in known.items()}
        if new:
            handles.update(self._store.add_identifiers(new))
        if earlier:
            self._store.see(earlier)
        return handles, {handle: sighting for handle, (sighting, _) in earlier.items()}

    def _join(
        self,
        handles: Mapping[Identifier, int],
        known: Mapping[Identifier, Known],
        lowered: Mapping[int, Seen],
        links: Iterable[Link],
    ) -> dict[int, tuple[int, int]]:
        """Persons to be changed by the batch's links: handle -> (component, canonical)."""
        component_of = {held.handle: held.component for held in known.values()}
        offered = [
            StoredLink(
                handles[link.a], handles[link.b], link.alias, link.time, link.message_id, False, ""
            )
            for link in links
        ]
        touched = {component_of.get(h, 0) for link in offered for h in (link.a, link.b)}
        touched |= {component_of[handle] for handle in lowered}
        touched.discard(0)
        if not offered and not touched:
            return {}
        stored = self._store.links(touched) if touched else {}
        present = {(s.a, s.b, s.alias): s for found in stored.values() for s in found}
        fresh = []
        for link in offered:
            old = present.get((link.a, link.b, link.alias))
            if old is None or (link.time, link.message_id) < (old.time, old.message_id):
                fresh.append(link if old is None else link._replace(unlinked=old.unlinked))
        resee = {component_of[handle] for handle in lowered} - {0}
        if not fresh and not resee:
            return {}
        self._counts.links += sum((s.a, s.b, s.alias) not in present for s in fresh)
        return self._regroup(stored, fresh, component_of, resee)

    def _regroup(
        self,
        stored: Mapping[int, list[StoredLink]],
        fresh: Sequence[StoredLink],
        component_of: Mapping[int, int],
        also: Collection[int] = (),
    ) -> dict[int, tuple[int, int]]:
        """Decide the components anew that fresh links touch, join or start."""
        groups = _group(fresh, component_of, also)
        persons: dict[int, tuple[int, int]] = {}
        limit = COMPONENT_FACTOR * self._rules.identity.max_identifiers
        for components, new in groups:
            merged = {
                (link.a, link.b, link.alias): link
                for component in components
                for link in stored.get(component, ())
            }
            before = dict(merged)
            members = {handle for link in merged.values() for handle in (link.a, link.b)}
            for link in sorted(new, key=lambda link: (not link.alias, link.time, link.message_id)):
                if len(members | {link.a, link.b}) > limit:
                    self._counts.conflicts += 1
                    continue
                members |= {link.a, link.b}
                merged[link.a, link.b, link.alias] = link
            if merged == before and not also:
                continue
            held = self._store.held(members)
            names = {handle: identifier for handle, (identifier, _) in held.items()}
            handle_of = {identifier: handle for handle, identifier in names.items()}
            by_name = {_named(link, names): key for key, link in merged.items()}
            result = resolve(
                {identifier: known.seen for identifier, known in held.values()},
                by_name,
                self._rules.identity,
            )
            component = min(components, default=0) or min(members)
            put = []
            for named, key in by_name.items():
                decided = merged[key]._replace(refused=result.refused.get(named, ""))
                if decided != before.get(key):
                    put.append(decided)
                    was = before.get(key)
                    if decided.refused in ("unique", "limit") and (was is None or not was.refused):
                        self._counts.conflicts += 1
            self._links.append((component, components - {component}, put))
            for identifier, best in result.canonical.items():
                handle = handle_of[identifier]
                decision = (component, handle_of[best])
                if decision != (held[handle][1].component, held[handle][1].canonical):
                    persons[handle] = decision
        return persons

    def _learn_traits(
        self, traits: Mapping[Identifier, Mapping[str, Trait]], handles: Mapping[Identifier, int]
    ) -> set[int]:
        """Write what is later than the traits held; gives the identifiers whose person changed."""
        if not traits:
            return set()
        store = self._store
        held = store.traits([handles[identifier] for identifier in traits])
        newer: dict[int, dict[str, Trait]] = {}
        for identifier, found in traits.items():
            before = held.get(handles[identifier], {})
            later = {
                name: trait
                for name, trait in found.items()
                if name not in before or trait.rank > before[name].rank
            }
            if later:
                newer[handles[identifier]] = {**before, **later}
        old = self._owners_of(newer)
        store.put_traits(newer)
        told = {h for h, owner in self._owners_of(newer).items() if owner != old[h]}
        for handle, (_, known) in store.held(told).items():
            self._old_traits[known.canonical] = old[handle].traits
        return told

    def _owners_before(self, handles: Collection[int]) -> dict[int, Owner]:
        """What the rows of these identifiers held before this batch."""
        before = self._owners_of(handles)
        if self._old_traits:
            for handle, (_, known) in self._store.held(handles).items():
                if known.canonical in self._old_traits:
                    traits = self._old_traits[known.canonical]
                    before[handle] = before[handle]._replace(traits=traits)
        return before

    def _owners_of(self, handles: Iterable[int]) -> dict[int, Owner]:
        """What the rows of these identifiers hold, as the store stands now."""
        wanted = set(handles)
        if not wanted:
            return {}
        held = self._store.held(wanted)
        missing = {known.canonical for _, known in held.values()} - held.keys()
        best = {**held, **self._store.held(missing)} if missing else held
        traits = self._traits_of(held) if self._rules.traits else {}
        return {
            handle: Owner(best[known.canonical][0].value, traits.get(handle, ()))
            for handle, (_, known) in held.items()
        }

    def _traits_of(
        self, held: Mapping[int, tuple[Identifier, Known]]
    ) -> dict[int, tuple[str | int | float | bool | None, ...]]:
        """Of each person's traits the latest, over all of its identifiers."""
        persons = {known.canonical for _, known in held.values()}
        members: dict[int, set[int]] = {person: {person} for person in persons}
        components = {known.component for _, known in held.values()} - {0}
        if components:
            ends = {
                handle
                for links in self._store.links(components).values()
                for link in links
                for handle in (link.a, link.b)
            }
            for handle, (_, known) in self._store.held(ends).items():
                if known.canonical in members:
                    members[known.canonical].add(handle)
        traits = self._store.traits({h for group in members.values() for h in group})
        latest: dict[int, tuple[str | int | float | bool | None, ...]] = {}
        for person, group in members.items():
            found = []
            for name in self._rules.traits:
                candidates = [traits[h][name] for h in group if name in traits.get(h, {})]
                found.append(max(candidates, key=_rank).value if candidates else None)
            latest[person] = tuple(found)
        return {handle: latest[known.canonical] for handle, (_, known) in held.items()}

    # ---------------------------------------------------------------- timelines

    def _devices(
        self,
        ranges: Mapping[str, tuple[int, int]],
        claims: Mapping[str, Collection[object]],
        observations: Sequence[Observation],
    ) -> dict[str, _Device]:
        """
        The timelines of a batch with the claims around its events.

        New ones are made for anonymous ids that are claimed, or whose references are kept.
        """
        if not ranges:
            return {}
        known = self._store.timelines(ranges)
        missing: list[str] = []
        if len(known) < len(ranges):
            kept = device_rows(self._rules, observations)
            wanted = {*claims, *(value for rows in kept for value, _ in rows)}
            missing = [value for value in wanted if value not in known]
        devices = {
            value: _Device(held.handle, held.released_until) for value, held in known.items()
        }
        if missing:
            for value, handle in self._store.add_timelines(missing).items():
                devices[value] = _Device(handle, fresh=True)
        reach = (
            self._rules.attribution.lookback
            if self._rules.attribution.policy is Policy.LAST_LOGIN
            else 0
        )
        windows = {
            held.handle: (ranges[value][0], min(ranges[value][1] + reach, END))
            for value, held in known.items()
            if held.claimed
        }
        if windows:
            first = self._rules.attribution.policy is Policy.FIRST_CLAIM
            found = self._store.claims(windows, first=first)
            for device in devices.values():
                device.claims = found.get(device.handle, [])
        return devices

    def _new_claims(
        self,
        devices: Mapping[str, _Device],
        claims: Mapping[str, Iterable[tuple[int, str, Identifier | None, int, bool]]],
        handles: Mapping[Identifier, int],
    ) -> dict[str, list[Claim]]:
        """The claims of the batch that are not there yet."""
        pairs = {
            (devices[value].handle, handles[owner])
            for value, offered in claims.items()
            for _, _, owner, _, _ in offered
            if owner is not None and not devices[value].fresh
        }
        barred = self._store.barred(pairs) if pairs else set()
        new: dict[str, list[Claim]] = {}
        for value, offered in claims.items():
            device = devices[value]
            present = {claim[:2] for claim in device.claims}
            for time, message_id, identifier, until, soft in offered:
                owner = None if identifier is None else handles[identifier]
                if (time, message_id) in present:
                    continue
                present.add((time, message_id))
                claim = Claim(time, message_id, owner, until, soft)
                if owner is not None and time <= device.released_until:
                    claim = claim._replace(owner=None, until=device.released_until)
                elif (device.handle, owner) in barred:
                    claim = claim._replace(until=_NEVER)
                new.setdefault(value, []).append(claim)
        self._counts.claims += sum(map(len, new.values()))
        return new

    def _carry_out(
        self,
        devices: dict[str, _Device],
        new_claims: Mapping[str, list[Claim]],
        persons: Mapping[int, tuple[int, int]],
        told: Collection[int],
        fallback: str | None,
    ) -> None:
        """Write claims and persons, and emit what their rows need."""
        store = self._store
        moved = self._moved(persons, told)
        elsewhere = store.claimed_by(moved) if moved else set()
        whole = store.claims(dict.fromkeys(elsewhere, (BEGINNING, END))) if elsewhere else {}
        touched: dict[int, tuple[str, list[Claim], list[Claim]]] = {}
        names = store.anonymous_ids(elsewhere) if elsewhere else {}
        by_handle = {device.handle: value for value, device in devices.items()}
        for handle in elsewhere:
            value = by_handle.get(handle) or names[handle]
            claims = whole.get(handle, [])
            if value in devices:
                devices[value].claims = claims
            touched[handle] = (value, claims, list(claims))
        fresh = set()
        for value, added in new_claims.items():
            device = devices[value]
            if device.fresh:
                fresh.add(device.handle)
            old = touched[device.handle][1] if device.handle in touched else device.claims
            merged = list(old)
            for claim in added:
                insort(merged, claim)
            if device.handle in touched or not self._settled(old, added):
                touched[device.handle] = (value, old, merged)
            device.claims = merged
        concerned = {
            claim.owner
            for _, old, new in touched.values()
            for claim in (*old, *new)
            if isinstance(claim.owner, int)
        }
        concerned |= moved
        before = self._owners_before(concerned)
        for component, absorbed, links in self._links:
            store.put_links(component, absorbed, links)
        if persons:
            store.set_persons(persons)
        if new_claims:
            store.add_claims({v: (devices[v].handle, claims) for v, claims in new_claims.items()})
        if moved or touched:
            store.decided()
            store.lock(touched, moved)
        self._after = self._owners_of(concerned) if moved else dict(before)
        changed: list[_Rewrite] = []
        for handle, (value, old, new) in touched.items():
            if handle not in fresh or self._has_unreferenced():
                cause = new_claims[value][0].message_id if value in new_claims else fallback
                changed.extend(self._compare(handle, value, old, new, before, cause))
        self._rewrite_spans(changed)
        self._rewrite_identified(
            {h: self._after[h] for h in moved if before.get(h) != self._after.get(h)}, fallback
        )

    def _moved(self, persons: Mapping[int, tuple[int, int]], traits: Collection[int]) -> set[int]:
        """The identifiers whose rows may hold something else: other persons, or other traits."""
        if not persons and not traits:
            return set()
        held = self._store.held({*persons, *traits})
        moved = {h for h, (_, best) in persons.items() if held[h][1].canonical != best}
        if self._rules.traits and (moved or traits):
            components = {held[h][1].component for h in (*moved, *traits) if h in held}
            components |= {persons[h][0] for h in persons}
            ends = {
                end
                for links in self._store.links(components - {0}).values()
                for link in links
                for end in (link.a, link.b)
            }
            moved |= ends | set(traits) | set(persons)
        return moved

    def _settled(self, old: Sequence[Claim], new: Sequence[Claim]) -> bool:
        """Whether new claims surely change no owner: most claims repeat the one before them."""
        policy = self._rules.attribution.policy
        if not old or _ends(old) or _ends(new):
            return False
        if policy is Policy.FIRST_CLAIM:
            return all(old[0] < claim for claim in new)
        if policy is Policy.SINCE_LAST_IDENTIFY:
            return False
        for claim in new:
            position = bisect_right(old, claim[:2], key=lambda c: c[:2])
            if not position or old[position - 1].owner != claim.owner:
                return False
        return True

    def _compare(
        self,
        handle: int,
        value: str,
        old: Sequence[Claim],
        new: Sequence[Claim],
        before: Mapping[int, Owner],
        cause: str | None,
    ) -> Iterable[_Rewrite]:
        rules = self._rules.attribution
        if _ends(old):
            self._taken_back.add(handle)
        for change in changes(
            spans(old, rules),
            spans(new, rules),
            lambda owner: None if owner is None else before.get(owner),  # type: ignore[call-overload]
            lambda owner: None if owner is None else self._after.get(owner),  # type: ignore[call-overload]
        ):
            yield _Rewrite(handle, value, change, cause)

    # ---------------------------------------------------------------- owners of a batch

    def _follows_device(self, o: Observation) -> bool:
        """Whether the row belongs to the owner of its device, not to whom it names."""
        return o.anonymous_id is not None and (not o.known or self._rules.identified_follow_device)

    def _owners(
        self,
        observations: Sequence[Observation],
        devices: Mapping[str, _Device],
        handles: Mapping[Identifier, int],
    ) -> tuple[list[Owner | None], list[int]]:
        """The owner of each row, and whose row it is: the subject; 0 where nobody is known."""
        attribution, follow = self._rules.attribution, self._rules.identified_follow_device
        asked = {
            value: ask(device.claims, attribution)
            for value, device in devices.items()
            if device.claims
        }
        found: list[int | None] = []
        subjects: list[int] = []
        for o in observations:
            owner: Hashable | None = None
            subject = 0
            if o.known and not (follow and o.anonymous_id is not None):
                owner = handles.get(o.known[0])
                subject = -handles.get(o.known[0], 0)
            elif o.anonymous_id in asked:
                owner = asked[o.anonymous_id](o.time)
                subject = devices[o.anonymous_id].handle
            found.append(owner if isinstance(owner, int) else None)
            subjects.append(subject)
        missing = {owner for owner in found if owner is not None} - self._after.keys()
        if missing:
            self._after.update(self._owners_of(missing))
        owners = [None if owner is None else self._after.get(owner) for owner in found]
        return owners, subjects

    def _write_rows(
        self,
        observations: Sequence[Observation],
        hold: Sequence[Owner | None],
        owners: Sequence[Owner | None],
        devices: Mapping[str, _Device],
        handles: Mapping[Identifier, int],
    ) -> None:
        """Emit updates for the rows of these very events, where they hold something else."""
        by_device: dict[str, list[tuple[Observation, Owner | None, Owner | None]]] = {}
        by_id: dict[tuple[str, Owner | None], dict[str, int]] = {}
        device_of: dict[str, str] = {}
        by_user: dict[tuple[str, str, Owner | None], list[int]] = {}
        identified: set[int] = set()
        for o, old, new in zip(observations, hold, owners, strict=True):
            if old == new:
                continue
            if self._follows_device(o):
                by_device.setdefault(o.anonymous_id or "", []).append((o, old, new))
                continue
            if o.known and o.known[0] in handles:
                identified.add(handles[o.known[0]])
            if self._rules.has_own_column and o.known and o.known[0].type == USER_ID:
                for table in o.tables:
                    by_user.setdefault((table, o.known[0].value, new), []).append(o.time)
            elif self._rules.has_own_column or not o.names_user:
                if o.anonymous_id is not None:
                    device_of[o.message_id] = o.anonymous_id
                for table in o.tables:
                    by_id.setdefault((table, new), {})[o.message_id] = o.time
        self._store.lock({devices[value].handle for value in by_device}, identified)
        when = {v: [o.time for o, _, _ in rows] for v, rows in by_device.items()}
        self._read_soft({devices[v].handle: (min(t), max(t)) for v, t in when.items()})
        for value, rows in by_device.items():
            self._write_device_rows(value, devices[value], rows)
        for (table, new), refs in by_id.items():
            self._emit_messages(table, refs, device_of, new, Cause())
        for (table, user, new), times in by_user.items():
            criteria: list[Criterion] = [
                Equals(column=self._rules.layout.columns_of(table).user_id, value=user),
                self._between(table, min(times), max(times) + 1),
            ]
            if self._rules.identified_follow_device:
                criteria.append(Empty(column=self._rules.layout.columns_of(table).anonymous_id))
            self._emit(table, new, criteria, len(times), Cause())

    def _write_device_rows(
        self,
        value: str,
        device: _Device,
        rows: Sequence[tuple[Observation, Owner | None, Owner | None]],
    ) -> None:
        starts = [span.start for span in spans(device.claims, self._rules.attribution)]
        groups: dict[tuple[str, int, Owner | None, Owner | None], dict[str, int]] = {}
        for o, old, new in rows:
            span = bisect_right(starts, o.time)
            for table in o.tables:
                groups.setdefault((table, span, old, new), {})[o.message_id] = o.time
        for (table, _, old, new), refs in groups.items():
            self._emit_device(
                table, device.handle, value, refs, old, new, Cause(anonymous_id=value), whole=False
            )

    def _outlast(
        self,
        observations: Sequence[Observation],
        owners: Sequence[Owner | None],
        devices: Mapping[str, _Device],
        new_claims: Mapping[str, Sequence[Claim]],
        *,
        rows_first: bool,
    ) -> None:
        """
        Protect rows of this batch from older updates of their device that are still on their way.

        A row that is stamped is not empty and says so itself. Two kinds of rows do not: one that is
        nobody's, on a device that was somebody's until that was taken back; and one that looks
        anonymous to the table where whole spans are written. Both are rare and late. (Where there
        are no references and no versions the sink's ledger knows what was taken back.)
        """
        suspects: list[tuple[str, Observation, Owner | None, _Device, bool]] = []
        soft = {
            (value, claim.time, claim.message_id)
            for value, claims in new_claims.items()
            for claim in claims
            if claim.soft
        }
        ended = {v for v, device in devices.items() if _ends(device.claims)}
        if not soft and not ended:
            return
        for o, owner in zip(observations, owners, strict=True):
            device = None if o.anonymous_id is None else devices.get(o.anonymous_id)
            if device is None or o.anonymous_id is None or not device.claims:
                continue
            if owner is None and not o.known and o.anonymous_id in ended:
                suspects.append((o.anonymous_id, o, owner, device, False))
            elif (o.anonymous_id, o.time, o.message_id) in soft:
                suspects.append((o.anonymous_id, o, owner, device, True))
        if not suspects:
            return
        earliest: dict[int, int] = {}
        for _, o, _, device, looks_anonymous in suspects:
            if not looks_anonymous:
                earliest[device.handle] = min(o.time, earliest.get(device.handle, END))
        rows = self._store.rows({handle: (time, END) for handle, time in earliest.items()})
        for value, o, owner, device, looks_anonymous in suspects:
            if not looks_anonymous:
                found = rows[device.handle].references.values() if device.handle in rows else ()
                others = [t for refs in found for m, t in refs.items() if m != o.message_id]
                kept = any(t >= o.time for t in others)
                # Where rows come first, one that is known may not have been decided about.
                kept = kept and (rows_first or not any(o.message_id in refs for refs in found))
                tables = [
                    t
                    for t in o.tables
                    if (kept if self._rules.keeps_references(t) else t in self._versioned(o))
                ]
            else:
                at = owner_at(device.claims, o.time, self._rules.attribution)
                foreign = self._values({at}).get(at) != owner
                tables = [
                    t
                    for t in o.tables
                    if foreign and self._rules.supersede_of(t) is Supersede.COLUMN
                ]
            if tables:
                self._store.lock({device.handle}, ())
            for table in tables:
                # As all updates of a device ask: a later one takes the place of this one.
                criteria = self._of_device(table, value)
                criteria.append(self._messages(table, [(o.message_id, o.time)]))
                self._emit(table, owner, criteria, 1, Cause(anonymous_id=value))

    def _versioned(self, o: Observation) -> list[str]:
        """The tables of an event in which rows know alone by which update they were written."""
        return [t for t in o.tables if self._rules.supersede_of(t) is Supersede.VERSION]

    def _keep_references(
        self,
        observations: Sequence[Observation],
        devices: Mapping[str, _Device],
        handles: Mapping[Identifier, int],
    ) -> None:
        """Remember where the rows are that may have to be found again."""
        store, own = self._store, self._rules.has_own_column
        store.note_tables(
            {table for tables in {o.tables for o in observations} for table in tables}
        )
        ids, days = device_rows(self._rules, observations) if devices else ([], [])
        references = [
            Reference(devices[value].handle, o.tables, o.message_id, o.time) for value, o in ids
        ]
        for o in observations:
            if self._follows_device(o) or not o.known:
                continue
            if o.known[0].type != USER_ID if own else not o.names_user:
                # Nothing in the row names whom it belongs to: whatever the settings, it is kept.
                subject = -handles[o.known[0]]
                references.append(Reference(subject, o.tables, o.message_id, o.time))
        identified = {-ref.subject for ref in references if ref.subject < 0}
        if identified:
            store.lock((), identified)
        if references:
            store.add_references(references)
        if days:
            store.add_days(
                {Day(devices[value].handle, o.tables, o.time // DAY) for value, o in days}
            )

    # ---------------------------------------------------------------- late rows

    def catch_up(self, missed: Mapping[int, tuple[Rows, tuple[int, int]]], tables: set[str]) -> int:
        names = self._store.anonymous_ids([handle for handle in missed if handle > 0])
        observations = [
            Observation(message_id, time, names[handle], (), (), False, None, where, {})
            for handle, (rows, _) in missed.items()
            if handle in names
            for where, refs in rows.references.items()
            for message_id, time in refs.items()
        ]
        if observations:
            self._rewrite(observations, None)
        windows: dict[int, dict[str, list[tuple[int, int]]]] = {}
        for handle, (rows, window) in missed.items():
            if handle not in names:
                continue
            found: dict[str, set[int]] = {}
            for where, days in rows.days.items():
                for table in where:
                    found.setdefault(table, set()).update(days)
            ranges = {table: list(_runs(days)) for table, days in found.items()}
            spanned = {t for t in tables if self._rules.references_of(t) is References.NONE}
            ranges.update({table: [window] for table in spanned})
            if ranges:
                windows[handle] = {
                    table: [(max(low, window[0]), min(high, window[1])) for low, high in parts]
                    for table, parts in ranges.items()
                    if not self._rules.keeps_references(table)
                }
        if windows:
            self._rewrite_windows(windows, names)
        if tables and self._rules.has_own_column:
            self._known_tables()
            self._tables = tables
            owners = self._owners_of({-handle for handle in missed if handle < 0})
            self._store.lock((), owners)
            self._rewrite_identified(owners, None)
        self._finish()
        return self._counts.updates

    def _rewrite_windows(
        self,
        windows: Mapping[int, Mapping[str, Sequence[tuple[int, int]]]],
        names: Mapping[int, str],
    ) -> None:
        """All rows in these ranges, of tables without references, get the owners of now."""
        store = self._store
        claims = store.claims(dict.fromkeys(windows, (BEGINNING, END)))
        owners = {c.owner for found in claims.values() for c in found}
        self._after.update(self._owners_of({o for o in owners if isinstance(o, int)}))
        store.lock(claims, ())
        self._read_soft(dict.fromkeys(claims, (BEGINNING, END)))
        for handle, found in claims.items():
            cause = Cause(anonymous_id=names[handle])
            for start, end, owner in spans(found, self._rules.attribution):
                new = self._after.get(owner) if isinstance(owner, int) else None
                if new is None and not _ends(found):
                    continue  # nothing was taken back: what is nobody's never was anybody's
                for table, ranges in windows[handle].items():
                    for low, high in ranges:
                        part = Change(max(start, low), min(end, high), None, new)
                        if part.start < part.end:
                            self._emit_range(table, handle, names[handle], part, new, cause)

    # ---------------------------------------------------------------- what is, once more

    def restate(
        self, timelines: Collection[int], identifiers: Collection[int]
    ) -> list[UpdateByCriteria]:
        store = self._store
        windows = dict.fromkeys(timelines, (BEGINNING, END))
        names = store.anonymous_ids(timelines)
        claims = store.claims(windows)
        owners = self._owners_of(
            {c.owner for found in claims.values() for c in found if isinstance(c.owner, int)}
        )
        self._after.update(owners)
        persons = self._owners_of(set(identifiers))
        store.lock(claims, {*owners, *persons})
        rows = store.rows(windows)
        self._read_soft(windows)
        for timeline, found in claims.items():
            cause = Cause(anonymous_id=names[timeline])
            taken_back = _ends(found)
            for start, end, owner in spans(found, self._rules.attribution):
                new = self._after.get(owner) if isinstance(owner, int) else None
                if new is None and not taken_back:
                    continue  # what is nobody's never was anybody's
                change = Change(start, end, _ANOTHER, new)
                held = rows.get(timeline, _NO_ROWS)
                self._rewrite_span(timeline, names[timeline], change, held, cause)
        self._rewrite_identified(persons, None)
        return self._updates

    # ---------------------------------------------------------------- undo

    def unlink(self, one: Identifier, other: Identifier) -> int:
        anonymous = [i for i in (one, other) if i.type not in self._rules.identity.known]
        if len(anonymous) == 2 or one == other:
            raise InputError(
                "unlink parts two known identifiers, or an anonymous id and a known identifier;"
                f" found {one.type} and {other.type}. Nothing was written."
            )
        if anonymous:
            self._unlink_device(anonymous[0].value, other if one in anonymous else one)
        else:
            self._unlink_known(one, other)
        self._finish()
        return self._counts.updates

    def _unlink_known(self, one: Identifier, other: Identifier) -> None:
        known = self._store.identifiers({one, other})
        absent = Seen(True, END, "")
        missing = {i: (absent, i.value) for i in (one, other) if i not in known}
        if missing:
            self._store.add_identifiers(missing)
            known = self._store.identifiers({one, other})
        a, b = sorted((one, other))
        component_of = {held.handle: held.component for held in known.values()}
        components = {c for c in component_of.values() if c}
        stored = self._store.links(components) if components else {}
        present = {(s.a, s.b, s.alias): s for found in stored.values() for s in found}
        parted = []
        for alias in (False, True):
            key = (known[a].handle, known[b].handle, alias)
            old = present.get(key, StoredLink(*key, END, "", True, ""))
            parted.append(old._replace(unlinked=True))
        persons = self._regroup(stored, parted, component_of)
        self._carry_out({}, {}, persons, (), None)

    def _unlink_device(self, anonymous_id: str, identifier: Identifier) -> None:
        known = self._store.identifiers({identifier})
        if identifier not in known:
            sighting = {identifier: (Seen(True, END, ""), identifier.value)}
            owner = self._store.add_identifiers(sighting)[identifier]
        else:
            owner = known[identifier].handle
        timeline = self._timeline(anonymous_id)
        old = self._store.claims({timeline: (BEGINNING, END)}).get(timeline, [])
        gone = [claim for claim in old if claim.owner == owner]
        self._store.lock({timeline}, {owner})
        self._store.bar(timeline, owner)
        void = [claim._replace(until=_NEVER) for claim in gone]
        self._replace(timeline, anonymous_id, old, gone, void)

    def _timeline(self, anonymous_id: str) -> int:
        held = self._store.timelines({anonymous_id}).get(anonymous_id)
        if held is not None:
            return held.handle
        return self._store.add_timelines({anonymous_id})[anonymous_id]

    def release(self, anonymous_id: str, at: int) -> int:
        timeline = self._timeline(anonymous_id)
        old = self._store.claims({timeline: (BEGINNING, END)}).get(timeline, [])
        until = max([at, *(claim.time for claim in old)])
        gone = [claim for claim in old if claim.owner is not None]
        # Barred ones too: the same claim, arriving after the release, would be nobody's as well.
        nobody = [claim._replace(owner=None, until=until) for claim in gone]
        self._store.release(anonymous_id, until)
        self._replace(timeline, anonymous_id, old, gone, nobody)
        self._finish()
        return self._counts.updates

    def forget(self, identifier: Identifier, at: int) -> int:
        known = self._store.identifiers({identifier})
        if identifier not in known:
            self._store.forget({identifier: 0}, at)
            return 0
        person = self._person(known[identifier])
        handles = {name: held.handle for name, held in person.items()}
        timelines = self._store.claimed_by(set(handles.values()))
        values = self._store.anonymous_ids(timelines)
        claims = self._store.claims(dict.fromkeys(timelines, (BEGINNING, END)))
        theirs = set(handles.values())
        until = max(
            [
                at,
                *(c.time for found in claims.values() for c in found if c.owner in theirs),
                *(h.seen.time for h in person.values() if h.seen.time < END),
                *(
                    t
                    for rows in self._store.rows({-h: (BEGINNING, END) for h in theirs}).values()
                    for refs in rows.references.values()
                    for t in refs.values()
                ),
            ]
        )
        for timeline, old in claims.items():
            gone = [claim for claim in old if claim.owner in theirs]
            # Barred ones too: nothing is left to tell them by when they arrive later.
            nobody = [claim._replace(owner=None, until=until) for claim in gone]
            self._replace(timeline, values[timeline], old, gone, nobody)
        self._store.lock(timelines, theirs)
        self._rewrite_identified(dict.fromkeys(theirs), None, until)
        self._store.forget(handles, until)
        self._store.decided()
        self._finish()
        return self._counts.updates

    def _person(self, known: Known) -> dict[Identifier, Known]:
        """All identifiers of a person."""
        ends = {known.handle}  # its links may have gone with somebody who was forgotten
        if known.component:
            for link in self._store.links({known.component}).get(known.component, ()):
                ends |= {link.a, link.b}
        return {
            identifier: held
            for identifier, held in self._store.held(ends).values()
            if held.canonical == known.canonical
        }

    def _replace(
        self,
        timeline: int,
        anonymous_id: str,
        old: Sequence[Claim],
        gone: Collection[Claim],
        new: Sequence[Claim],
    ) -> None:
        """Take claims from a timeline, put others there, and emit what its rows need."""
        if not gone:
            return
        taken = set(gone)
        left = sorted([*(claim for claim in old if claim not in taken), *new])
        owners = {c.owner for c in (*old, *left) if isinstance(c.owner, int)}
        before = self._owners_of(owners)
        self._after.update(before)
        self._store.lock({timeline}, ())
        self._rewrite_spans(list(self._compare(timeline, anonymous_id, old, left, before, None)))
        self._store.replace_claims(timeline, gone, new)
        self._store.decided()

    # ---------------------------------------------------------------- updates

    def _known_tables(self) -> set[str]:
        if self._tables is None:
            self._tables = self._store.tables()
        return self._tables

    def _has_unreferenced(self) -> bool:
        return not all(map(self._rules.keeps_references, self._known_tables()))

    def _rewrite_spans(self, rewrites: Sequence[_Rewrite]) -> None:
        """Rows of timelines change from one owner to another, each in its span."""
        if not rewrites:
            return
        windows: dict[int, tuple[int, int]] = {}
        for handle, _, change, _ in rewrites:
            start, end = windows.get(handle, change[:2])
            windows[handle] = (min(start, change.start), max(end, change.end))
        rows = self._store.rows(windows)
        self._read_soft(windows)
        for handle, value, change, message_id in rewrites:
            cause = Cause(message_id=message_id, anonymous_id=value)
            self._rewrite_span(handle, value, change, rows.get(handle, _NO_ROWS), cause)

    def _rewrite_span(
        self, timeline: int, anonymous_id: str, change: Change, rows: Rows, cause: Cause
    ) -> None:
        """The rows of a timeline in ``[start, end)`` change from one owner to another."""
        old, new = _owner(change.old), _owner(change.new)
        start, end = change.start, change.end
        referenced: dict[str, dict[str, int]] = {}
        for tables, refs in rows.references.items():
            inside = {m: time for m, time in refs.items() if start <= time < end}
            for table in tables:
                if inside and self._rules.keeps_references(table):
                    referenced.setdefault(table, {}).update(inside)
        for table, found in sorted(referenced.items()):
            self._emit_device(table, timeline, anonymous_id, found, old, new, cause, whole=True)
        for table in sorted(self._known_tables()):
            if self._rules.keeps_references(table):
                continue
            if self._rules.references_of(table) is References.NONE:
                self._emit_range(table, timeline, anonymous_id, change, new, cause)
                continue
            days = {d for tables, found in rows.days.items() if table in tables for d in found}
            # The days that have rows only grow, and no other is named: where an older update of
            # this device writes, this one does too.
            for low, high in _runs(days):
                part = change._replace(start=max(start, low), end=min(end, high))
                if part.start < part.end:
                    self._emit_range(table, timeline, anonymous_id, part, new, cause)

    def _rewrite_identified(
        self,
        owners: Mapping[int, Owner | None],
        message_id: str | None,
        until: int = _LAST_TIME - 1,
    ) -> None:
        """The rows of identified events, by identifier, change with their persons."""
        if not owners:
            return
        held = self._store.held(owners)
        rows = self._store.rows({-handle: (BEGINNING, END) for handle in owners})
        device_of = self._devices_of({-subject: found for subject, found in rows.items()})
        cause = Cause(message_id=message_id)
        for handle, new in owners.items():
            identifier, known = held[handle]
            referenced: dict[str, dict[str, int]] = {}
            for tables, refs in rows.get(-handle, _NO_ROWS).references.items():
                for table in tables:
                    referenced.setdefault(table, {}).update(refs)
            for table, found in sorted(referenced.items()):
                self._emit_messages(table, found, device_of, new, cause)
            if not self._rules.has_own_column or identifier.type != USER_ID:
                continue
            if known.seen.only_previous:
                continue
            for table in sorted(self._known_tables()):
                columns = self._rules.layout.columns_of(table)
                criteria: list[Criterion] = [
                    Equals(column=columns.user_id, value=identifier.value),
                    self._between(table, known.seen.time, until + 1),
                ]
                if self._rules.identified_follow_device:
                    criteria.append(Empty(column=columns.anonymous_id))
                self._emit(table, new, criteria, None, cause)

    def _devices_of(self, rows: Mapping[int, Rows]) -> dict[str, str]:
        """By message id, the devices of identified rows, where these are asked for by them."""
        if not rows or not self._named_by_device:
            return {}
        times = [t for r in rows.values() for refs in r.references.values() for t in refs.values()]
        timelines = self._store.claimed_by(rows) if times else set()
        if not timelines:
            return {}
        names = self._store.anonymous_ids(timelines)
        soft = self._store.soft_claims(dict.fromkeys(timelines, (min(times), max(times))))
        found: dict[str, str] = {}
        several = set()  # a message that came again, from another device
        for timeline, claims in soft.items():
            for claim in claims:
                if found.setdefault(claim.message_id, names[timeline]) != names[timeline]:
                    several.add(claim.message_id)
        return {message_id: d for message_id, d in found.items() if message_id not in several}

    @property
    def _named_by_device(self) -> bool:
        """Whether rows of identified events that name no user are asked for by their device."""
        return self._rules.has_own_column and not self._rules.identified_follow_device

    def _read_soft(self, windows: Mapping[int, tuple[int, int]]) -> None:
        """What `_holes` will ask for."""
        if windows and not self._rules.identified_follow_device:
            self._soft.update(dict.fromkeys(windows, ()))
            self._soft.update(self._store.soft_claims(windows))

    def _emit_device(
        self,
        table: str,
        timeline: int,
        anonymous_id: str,
        refs: Mapping[str, int],
        old: Owner | None,
        new: Owner | None,
        cause: Cause,
        *,
        whole: bool,
    ) -> None:
        """
        Update rows of a device that are known by message id.

        They are named by ranges of time, which is cheaper than by ids and keeps order with other
        updates of the device. Rows that recognition wrote before are named by id, where nothing
        else tells them from those of an identified person; a range then follows for rows that are
        still empty, and takes the place of older updates that have not arrived yet.

        ``whole``: these are all rows of the device that the graph knows in their range.
        """
        target = self._rules.target_of(table)
        first = old is None and timeline not in self._taken_back
        criteria = self._of_device(table, anonymous_id)
        expected = True
        if self._rules.supersede_of(table) is Supersede.REFERENCES:
            if not first or not whole:
                for part in _parts(refs):
                    named = [*criteria, self._messages(table, part)]
                    self._emit(table, new, named, len(part), cause, first=first)
                if not whole:
                    return
                expected = False
            criteria.append(Empty.model_construct(column=target))
        holes = self._holes(timeline, min(refs.values()), max(refs.values()), new)
        pieces: dict[int, list[int]] = {}
        alone: dict[str, int] = {}
        for message_id, time in refs.items():
            if time in holes:
                alone[message_id] = time
            else:
                pieces.setdefault(bisect_right(holes, time), []).append(time)
        days = self._rules.references_of(table) is References.DAYS
        for piece in pieces.values():
            # Of days that are kept none is named between them: what takes back names no other.
            for times in _by_run(piece) if days else [piece]:
                between = self._between(table, min(times), max(times) + 1)
                count = len(times) if expected else 0
                self._emit(table, new, [*criteria, between], count, cause, first=first)
        for part in _parts(alone):
            named = [*criteria, self._messages(table, part)]
            self._emit(table, new, named, len(part) if expected else 0, cause, first=first)

    def _emit_messages(
        self,
        table: str,
        refs: Mapping[str, int],
        device_of: Mapping[str, str],
        new: Owner | None,
        cause: Cause,
    ) -> None:
        """
        Update the rows of these messages.

        ``device_of``: by message id, the devices of those that have one and name no user.
        """
        by_device: dict[str | None, dict[str, int]] = {}
        for message_id, time in refs.items():
            device = device_of.get(message_id) if self._named_by_device else None
            by_device.setdefault(device, {})[message_id] = time
        for device, found in by_device.items():
            criteria = [] if device is None else self._of_device(table, device)
            for part in _parts(found):
                named = [*criteria, self._messages(table, part)]
                self._emit(table, new, named, len(part), cause)

    def _of_device(self, table: str, anonymous_id: str) -> list[Criterion]:
        """What selects the rows of a device; whose rows name a user are not its own."""
        columns = self._rules.layout.columns_of(table)
        device = Equals.model_construct(column=columns.anonymous_id, value=anonymous_id)
        if not self._named_by_device:
            return [device]
        return [device, Empty.model_construct(column=columns.user_id)]

    def _emit_range(
        self,
        table: str,
        timeline: int,
        anonymous_id: str,
        change: Change,
        new: Owner | None,
        cause: Cause,
    ) -> None:
        """
        Update all rows of a device in a span, where no reference is kept.

        The whole span is named, not only where rows are known to be: so the update takes the
        place of every older one there, also for rows that were stamped in between.
        """
        device = self._of_device(table, anonymous_id)
        start, end = max(change.start, BEGINNING), min(change.end, _LAST_TIME)
        first = _owner(change.old) is None and timeline not in self._taken_back
        for low, high in _around(start, end, self._holes(timeline, start, end, new)):
            between = self._between(table, low, high)
            self._emit(table, new, [*device, between], None, cause, first=first)

    def _holes(self, timeline: int, low: int, high: int, new: Owner | None) -> list[int]:
        """The times at which a row of somebody else lies that looks anonymous to the table."""
        if self._rules.identified_follow_device:
            return []
        soft = [claim for claim in self._soft[timeline] if low <= claim.time <= high]
        values = self._values({claim.owner for claim in soft})
        return sorted({c.time for c in soft if c.owner is None or values.get(c.owner) != new})

    def _values(self, owners: Collection[Hashable | None]) -> dict[Hashable | None, Owner]:
        missing = {o for o in owners if isinstance(o, int)} - self._after.keys()
        if missing:
            self._after.update(self._owners_of(missing))
        return {o: self._after[o] for o in owners if isinstance(o, int) and o in self._after}

    def _between(self, table: str, start: int, end: int) -> Between:
        column = self._rules.layout.columns_of(table).time
        return Between.model_construct(column=column, start=_when(start), end=_when(end))

    def _messages(self, table: str, refs: Sequence[tuple[str, int]]) -> Messages:
        columns = self._rules.layout.columns_of(table)
        return Messages.model_construct(
            id_column=columns.id,
            time_column=columns.time,
            refs=tuple((message_id, _when(time)) for message_id, time in refs),
        )

    def _emit(
        self,
        table: str,
        new: Owner | None,
        where: Sequence[Criterion],
        expected: int | None,
        cause: Cause,
        *,
        first: bool = False,
    ) -> None:
        values = (
            self._rules.values_of(table, None, ())
            if new is None
            else self._rules.values_of(table, new.id, new.traits, first=first)
        )
        sequence = self._store.next_sequence()
        criteria = list(where)
        if self._rules.supersede_of(table) is Supersede.VERSION:
            # "Empty, or written by recognition": that is what it means beside a version.
            criteria.append(Empty(column=self._rules.target_of(table)))
            values[VERSION_COLUMN] = sequence
        self._updates.append(
            UpdateByCriteria(
                id=decide_id(self._rules.workspace, table, values, criteria, sequence),
                workspace=self._rules.workspace,
                table=table,
                set=values,
                where=tuple(criteria),
                sequence=sequence,
                expected_rows=expected,
                cause=cause,
                created_at=self._now,
            )
        )

    def _finish(self) -> None:
        self._counts.updates = len(self._updates)
        if self._updates:
            self._store.emit(self._updates)


def _ends(claims: Iterable[Claim]) -> bool:
    """Whether some of them were taken back: by `unlink`, `release` or `forget`."""
    return any(claim.until < END for claim in claims)


def _keep_earliest(links: dict[tuple[Identifier, Identifier, bool], Link], link: Link) -> None:
    key = (link.a, link.b, link.alias)
    if key not in links or (link.time, link.message_id) < (links[key].time, links[key].message_id):
        links[key] = link


def _group(
    links: Sequence[StoredLink], component_of: Mapping[int, int], also: Collection[int]
) -> list[tuple[set[int], list[StoredLink]]]:
    """Which components and links belong together; a new identifier is a component of its own."""
    parent: dict[int, int] = {}

    def find(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    # Components are positive; an identifier without one stands as its negative handle.
    def node_of(handle: int) -> int:
        return component_of.get(handle, 0) or -handle

    for link in links:
        a, b = find(node_of(link.a)), find(node_of(link.b))
        parent[a] = b
    groups: dict[int, tuple[set[int], list[StoredLink]]] = {}
    for component in also:
        groups.setdefault(find(component), (set(), []))
    for link in links:
        groups.setdefault(find(node_of(link.a)), (set(), []))[1].append(link)
    for node in list(parent):
        if node > 0:
            groups[find(node)][0].add(node)
    return list(groups.values())


def _without(o: Observation, forgotten: Mapping[Identifier, int]) -> Observation:
    """The observation without what was forgotten of it; its strongest identifier was not."""
    left = [
        (identifier, value)
        for identifier, value in zip(o.known, o.as_seen, strict=True)
        if forgotten.get(identifier, -1) < o.time
    ]
    previous = o.previous_id
    if previous is not None and forgotten.get(Identifier(USER_ID, previous), -1) >= o.time:
        previous = None
    return o._replace(
        known=tuple(identifier for identifier, _ in left),
        as_seen=tuple(value for _, value in left),
        previous_id=previous,
    )


def _widen(ranges: dict[str, tuple[int, int]], key: str, time: int) -> None:
    low, high = ranges.get(key, (time, time))
    ranges[key] = (time if time < low else low, time if time > high else high)


def _named(link: StoredLink, names: Mapping[int, Identifier]) -> Link:
    return Link(names[link.a], names[link.b], link.alias, link.time, link.message_id, link.unlinked)


def _parts(refs: Mapping[str, int]) -> Iterable[list[tuple[str, int]]]:
    """References in time order, in parts of bounded size; equal times stay together if they can."""
    part: list[tuple[str, int]] = []
    size = 0
    for message_id, time in sorted(refs.items(), key=lambda ref: (ref[1], ref[0])):
        length = len(message_id.encode())
        full = len(part) >= MAX_REFS and part[-1][1] != time
        if part and (full or size + length > MAX_REF_BYTES):
            yield part
            part, size = [], 0
        part.append((message_id, time))
        size += length
    if part:
        yield part


def _runs(days: Collection[int]) -> Iterable[tuple[int, int]]:
    """Consecutive days as half-open ranges of microseconds, in order."""
    start = end = None
    for day in sorted(days):
        if day != end:
            if start is not None and end is not None:
                yield start * DAY, end * DAY
            start = day
        end = day + 1
    if start is not None and end is not None:
        yield start * DAY, end * DAY


def _by_run(times: Iterable[int]) -> Iterable[list[int]]:
    """Times, apart where a day between them has none."""
    run: list[int] = []
    for time in sorted(times):
        if run and time // DAY > run[-1] // DAY + 1:
            yield run
            run = []
        run.append(time)
    yield run


def _around(start: int, end: int, holes: Sequence[int]) -> Iterable[tuple[int, int]]:
    for hole in holes:
        if start < hole:
            yield start, min(hole, end)
        start = max(start, hole + 1)
    if start < end:
        yield start, end


def _rank(trait: Trait) -> tuple[int, str, str, str]:
    return trait.rank


def _owner(value: Hashable | None) -> Owner | None:
    return value if isinstance(value, Owner) else None


def _when(time: int) -> datetime:
    return _EPOCH + timedelta(microseconds=max(BEGINNING, min(time, _LAST_TIME)))
