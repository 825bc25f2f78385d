"""
What is to be seen of an identifier: its person, the links, the devices, and who owned them when.

It reads the graph as it stands, as `recognition.graph.explaining` does, and never writes. What it
gives is bounded whatever the graph holds, and says what it leaves out; how it looks is the business
of `recognition.graph.rendering`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

from recognition.attribution import BEGINNING, END, AttributionRules, Claim, spans
from recognition.errors import ConfigurationError
from recognition.events import Identifier
from recognition.graph.explaining import LinkReason, chain_between
from recognition.graph.store import Known, Store, StoredLink, Timeline
from recognition.identity import ANONYMOUS
from recognition.rules import Rules

# Timelines whose claims are read by one call.
_TOGETHER = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A known identifier of a person."""

    identifier: Identifier
    """As the graph compares it: normalised; of a hashed type, the hash."""
    seen_as: str
    """As it was first seen; of a hashed type, the hash."""
    first_seen: int | None
    """``None``: no event ever named it; it is known by an ``unlink`` only."""
    message_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Identifiers that belong together, and the links that say so, or were refused."""

    canonical: Identifier
    identifiers: tuple[Member, ...]
    """The canonical one first, then the one that was asked for, with what links the two."""
    links: tuple[LinkReason, ...]
    """By time. The time of a link that was unlinked before it was ever seen is `END`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceClaim:
    """
    A claim of a device.

    Args:
        time: Microseconds since 1970-01-01 UTC.
        message_id: The event that carried both.
        identifier: Whom it names; ``None``: it was forgotten or released.
        person: The canonical identifier of that person.
        unlinked: The device was taken from the identifier, so that the claim has no effect.
        until: A forgotten or released claim keeps rows from others up to this moment.
    """

    time: int
    message_id: str
    identifier: Identifier | None
    person: Identifier | None
    unlinked: bool
    until: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpan:
    """Who owns a device in ``[start, end)``, from `BEGINNING` to `END`; ``None`` is nobody."""

    start: int
    end: int
    owner: Identifier | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """
    A device and its timeline.

    Args:
        anonymous_id: Its name.
        released_until: It was taken from everybody up to this moment; ``None``: it never was.
        unlinked: Identifiers that can never claim it again.
        claims: In order.
        spans: In order; without gaps, unless some are left out.
    """

    anonymous_id: str
    released_until: int | None
    unlinked: tuple[Identifier, ...]
    claims: tuple[DeviceClaim, ...]
    spans: tuple[DeviceSpan, ...]


class LeftOut(NamedTuple):
    """Of ``total`` things, ``shown`` are shown: ``identifiers``, ``links``, ``devices``, ..."""

    what: str
    of: str
    """Whose they are, for people."""
    shown: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """
    What is to be seen of an identifier.

    Args:
        workspace: Where it was looked for.
        attribution: The rules that the spans follow.
        subject: What was asked for, as the graph compares it.
        found: Whether the graph knows it.
        persons: The person of the subject; of a device, all who own or claim it.
        devices: Those that the person ever claimed, the last claimed first; of a device, itself.
        person_of: The canonical identifier of the person of every identifier that occurs.
        limit: The most that is shown of each kind.
        left_out: What there is more of.
    """

    workspace: str
    attribution: AttributionRules
    subject: Identifier
    found: bool
    persons: tuple[Person, ...] = ()
    devices: tuple[Device, ...] = ()
    person_of: dict[Identifier, Identifier] = field(default_factory=dict)
    limit: int
    left_out: tuple[LeftOut, ...] = ()

    @property
    def people(self) -> tuple[Identifier, ...]:
        """Everybody who occurs, by the canonical identifier: those asked about first."""
        of_devices = (
            owner
            for device in self.devices
            for owner in (*(s.owner for s in device.spans), *(c.person for c in device.claims))
            if owner is not None
        )
        asked = (person.canonical for person in self.persons)
        return tuple(dict.fromkeys((*asked, *of_devices, *self.person_of.values())))


def show(store: Store, rules: Rules, subject: Identifier, limit: int) -> Picture:
    """
    Everything around an identifier, at most ``limit`` of each kind.

    Identifiers and links are counted over all persons that are shown, claims and spans for each
    device. Where there are more, those of the person asked about come first, then the latest.

    Args:
        store: A transaction; it is read only.
        rules: Those that the graph was decided with.
        subject: A known identifier or an anonymous id, normalised.
        limit: At least 1.

    Raises:
        ConfigurationError: The graph was decided by other rules, or the limit is less than 1.
    """
    if limit < 1:
        raise ConfigurationError(f"limit is {limit}; it must be at least 1. Nothing was written.")
    rules.check_same(store.decided_with(rules.fingerprint))
    return _Reading(store, rules, subject, limit).read()


_Item = TypeVar("_Item")


class _Reading:
    """One question to one store."""

    def __init__(self, store: Store, rules: Rules, subject: Identifier, limit: int) -> None:
        self._store = store
        self._rules = rules
        self._subject = subject
        self._limit = limit
        self._person_of: dict[Identifier, Identifier] = {}
        self._left_out: list[LeftOut] = []
        # How many more identifiers and links may be shown.
        self._identifiers = self._links = limit

    def read(self) -> Picture:
        known = self._subject.type != ANONYMOUS
        found = self._of_known() if known else self._of_device()
        persons, devices = found or ((), ())
        return Picture(
            workspace=self._rules.workspace,
            attribution=self._rules.attribution,
            subject=self._subject,
            found=found is not None,
            persons=tuple(persons),
            devices=tuple(devices),
            person_of=self._person_of,
            limit=self._limit,
            left_out=tuple(self._left_out),
        )

    def _of_known(self) -> tuple[Sequence[Person], Sequence[Device]] | None:
        known = self._store.identifiers({self._subject}).get(self._subject)
        if known is None:
            return None
        person, theirs = self._person(known)
        return [person], self._devices(theirs)

    def _of_device(self) -> tuple[Sequence[Person], Sequence[Device]] | None:
        value = self._subject.value
        timeline = self._store.timelines({value}).get(value)
        if timeline is None:
            return None
        whole = {timeline.handle: (BEGINNING, END)}
        claims = self._store.claims(whole).get(timeline.handle, [])
        if not claims and timeline.released_until < 0 and not self._store.rows(whole):
            return None
        device = self._device(value, timeline, claims, set())
        # The latest owner first; whoever claims without ever owning comes last.
        owners = dict.fromkeys(span.owner for span in reversed(device.spans))
        owners |= dict.fromkeys(claim.person for claim in reversed(device.claims))
        wanted = [owner for owner in owners if owner is not None]
        shown = self._cut("persons", f"device {value}", wanted, len(wanted))
        held = self._store.identifiers(shown)
        return [self._person(held[owner])[0] for owner in shown], [device]

    # ---------------------------------------------------------------- persons

    def _person(self, known: Known) -> tuple[Person, set[int]]:
        """A person, and the handles of all of its identifiers."""
        stored: list[StoredLink] = []
        if known.component:
            stored = self._store.links({known.component}).get(known.component, [])
        ends = {end for link in stored for end in (link.a, link.b)}
        held = self._store.held(ends | {known.handle, known.canonical})
        theirs = {h for h, (_, other) in held.items() if other.canonical == known.canonical}
        links = [x for x in _distinct(stored) if x.a in theirs or x.b in theirs]
        chain = chain_between(known.handle, known.canonical, links)
        priority = self._rules.identity.priority
        rest = sorted(theirs, key=lambda h: (priority(held[h][0].type), held[h][1].seen, held[h]))
        first = [known.canonical, known.handle, *(end for x in chain for end in (x.a, x.b))]
        canonical = held[known.canonical][0]
        name = ":".join(canonical)
        # The canonical identifier of every person is shown, whatever was shown before it.
        most = max(self._identifiers, 1)
        members = list(dict.fromkeys([*first, *rest]))[:most]
        self._note("identifiers", name, len(members), len(theirs))
        self._identifiers -= len(members)

        shown, linking = set(members), set(chain)
        near = [
            x
            for x in links
            if (x.a in shown or x.b in shown) and (x.refused or {x.a, x.b} <= shown)
        ]
        near.sort(key=lambda x: (x not in linking, x.time, x.message_id, x.a, x.b))
        near = near[: max(self._links, 0)]
        self._note("links", name, len(near), len(links))
        self._links -= len(near)

        seen_as = self._store.seen_as(shown)
        names = self._name(shown.union(*((x.a, x.b) for x in near)))
        return Person(
            canonical=canonical,
            identifiers=tuple(_member(*held[h], seen_as) for h in members),
            links=tuple(
                LinkReason(
                    a=names[x.a],
                    b=names[x.b],
                    kind="alias" if x.alias else "seen",
                    time=x.time,
                    message_id=x.message_id,
                    refused=x.refused,
                )
                for x in sorted(near, key=lambda x: (x.time, x.message_id, x.a, x.b))
            ),
        ), theirs

    def _name(self, handles: Collection[int]) -> dict[int, Identifier]:
        """The identifiers of handles; whose they are is remembered."""
        held = self._store.held(handles)
        best = self._store.held({known.canonical for _, known in held.values()})
        for identifier, known in held.values():
            self._person_of[identifier] = best[known.canonical][0]
        return {handle: identifier for handle, (identifier, _) in held.items()}

    # ---------------------------------------------------------------- devices

    def _devices(self, theirs: Collection[int]) -> list[Device]:
        """The devices of these identifiers that they claimed last."""
        latest: list[tuple[int, str, int, list[Claim]]] = []
        handles = iter(sorted(self._store.claimed_by(theirs)))
        total = 0
        while part := list(islice(handles, _TOGETHER)):
            total += len(part)
            values = self._store.anonymous_ids(part)
            claims = self._store.claims(dict.fromkeys(part, (BEGINNING, END)))
            for handle, value in values.items():
                found = claims.get(handle, [])
                last = max((c.time for c in found if c.owner in theirs), default=BEGINNING)
                latest.append((-last, value, handle, found))
            latest = sorted(latest, key=lambda device: device[:3])[: self._limit]
        self._note("devices", ":".join(self._subject), len(latest), total)
        timelines = self._store.timelines([value for _, value, _, _ in latest])
        return [
            self._device(value, timelines[value], claims, theirs) for _, value, _, claims in latest
        ]

    def _device(
        self, value: str, timeline: Timeline, claims: list[Claim], theirs: Collection[int]
    ) -> Device:
        claimants = {claim.owner for claim in claims if isinstance(claim.owner, int)}
        held = self._store.held(claimants)
        # Who owned it is told by persons: two identifiers of one are one owner.
        person = {handle: known.canonical for handle, (_, known) in held.items()}
        owned: list[tuple[int, int, int | None]] = []
        if claims:
            for start, end, owner in spans(claims, self._rules.attribution):
                who = person[owner] if isinstance(owner, int) else None
                if owned and owned[-1][2] == who:
                    start = owned.pop()[0]
                owned.append((start, end, who))
        ours = {person[handle] for handle in claimants.intersection(theirs)}
        of = f"device {value}"
        shown_claims = self._cut_latest("claims", of, claims, lambda c: c.owner in theirs)
        shown_spans = self._cut_latest("spans", of, owned, lambda span: span[2] in ours)
        pairs = {(timeline.handle, handle) for handle in claimants.union(theirs)}
        barred = {handle for _, handle in self._store.barred(pairs)}
        barred_shown = self._cut("unlinked", of, sorted(barred), len(barred))
        names = self._name(
            {c.owner for c in shown_claims if isinstance(c.owner, int)}.union(
                barred_shown, (who for _, _, who in shown_spans if who is not None)
            )
        )
        return Device(
            anonymous_id=value,
            released_until=None if timeline.released_until < 0 else timeline.released_until,
            unlinked=tuple(sorted(names[handle] for handle in barred_shown)),
            claims=tuple(self._claim(claim, names) for claim in shown_claims),
            spans=tuple(
                DeviceSpan(start=start, end=end, owner=None if who is None else names[who])
                for start, end, who in shown_spans
            ),
        )

    def _claim(self, claim: Claim, names: dict[int, Identifier]) -> DeviceClaim:
        identifier = names[claim.owner] if isinstance(claim.owner, int) else None
        unlinked = claim.until < BEGINNING
        return DeviceClaim(
            time=claim.time,
            message_id=claim.message_id,
            identifier=identifier,
            person=None if identifier is None else self._person_of[identifier],
            unlinked=unlinked,
            until=None if unlinked or claim.until == END else claim.until,
        )

    # ---------------------------------------------------------------- limits

    def _cut_latest(
        self, what: str, of: str, items: Sequence[_Item], ours: Callable[[_Item], bool]
    ) -> list[_Item]:
        """In their order, those of the person asked about and then the latest."""
        places = sorted(range(len(items)), key=lambda place: (not ours(items[place]), -place))
        chosen = self._cut(what, of, places, len(places))
        return [items[place] for place in sorted(chosen)]

    def _cut(self, what: str, of: str, items: Iterable[_Item], total: int) -> list[_Item]:
        shown = list(islice(items, self._limit))
        self._note(what, of, len(shown), total)
        return shown

    def _note(self, what: str, of: str, shown: int, total: int) -> None:
        if shown < total:
            self._left_out.append(LeftOut(what, of, shown, total))


def _member(identifier: Identifier, known: Known, seen_as: dict[int, str]) -> Member:
    named = known.seen.time < END
    return Member(
        identifier=identifier,
        seen_as=seen_as.get(known.handle, identifier.value),
        first_seen=known.seen.time if named else None,
        message_id=known.seen.message_id,
    )


def _distinct(links: Iterable[StoredLink]) -> list[StoredLink]:
    """Without those that `unlink` added beside, against a link of the other kind, never seen."""
    links = list(links)
    seen = {(link.a, link.b) for link in links if link.time < END}
    kept: list[StoredLink] = []
    for link in links:
        if link.time < END or (link.a, link.b) not in seen:
            seen.add((link.a, link.b))
            kept.append(link)
    return kept
