"""
Why: the chain of messages and rules that made somebody the owner.

It reads the graph as it stands and repeats the decision with the reasons kept; it never writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recognition.attribution import BEGINNING, END, Claim, claim_at, spans
from recognition.events import Identifier
from recognition.graph.store import Known, Store, StoredLink
from recognition.identity import ANONYMOUS
from recognition.rules import Rules


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReason:
    """Why two identifiers belong together, or why they do not (``refused``)."""

    a: Identifier
    b: Identifier
    kind: str
    """``seen`` on one event, or an explicit ``alias``."""
    time: int
    message_id: str
    refused: str
    """Empty where the link holds; else ``unique``, ``limit`` or ``unlinked``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimReason:
    """A claim of a device: the message that carried both, and whom it names."""

    anonymous_id: str
    time: int
    message_id: str
    identifier: Identifier | None
    """``None``: forgotten or released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanReason:
    """Who owns a device in ``[start, end)``; ``None`` is nobody."""

    start: int
    end: int
    owner: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """
    The answer to *why*.

    Args:
        found: Whether the graph knows the subject at all.
        owner: The canonical id of the person, ``None``: nobody.
        because: The decision in words, one step a line.
        identifiers: All known identifiers of the person, with the value as first seen.
        links: The links among them, and the refused ones that touch them.
        claims: The claims that were looked at.
        spans: Who owns the device when, where the subject is a device.
    """

    found: bool
    owner: str | None
    because: tuple[str, ...]
    identifiers: tuple[tuple[Identifier, str], ...] = ()
    links: tuple[LinkReason, ...] = ()
    claims: tuple[ClaimReason, ...] = ()
    spans: tuple[SpanReason, ...] = ()


def explain(store: Store, rules: Rules, subject: Identifier | str) -> Explanation:
    """
    Why an identifier, or a message given by its id, belongs to its person.

    Raises:
        ConfigurationError: The graph was decided by other rules.
    """
    rules.check_same(store.decided_with(rules.fingerprint))
    if isinstance(subject, str):
        return _explain_message(store, rules, subject)
    if subject.type == ANONYMOUS:
        return _explain_device(store, rules, subject.value)
    held = store.identifiers({subject}).get(subject)
    if held is None:
        return Explanation(
            found=False, owner=None, because=(f"this {subject.type} was never seen",)
        )
    return _explain_known(store, held, ())


def _explain_known(store: Store, known: Known, before: tuple[str, ...]) -> Explanation:
    links = store.links({known.component}).get(known.component, []) if known.component else []
    ends = {end for link in links for end in (link.a, link.b)} | {known.handle, known.canonical}
    held = store.held(ends)
    person = {h for h, (_, other) in held.items() if other.canonical == known.canonical}
    names = {handle: identifier for handle, (identifier, _) in held.items()}
    seen_as = store.seen_as(person)
    best = names[known.canonical]
    because = [*before]
    if len(person) == 1:
        because.append("no link joins it with another known identifier")
    for link in chain_between(known.handle, known.canonical, links):
        kind = "an alias" if link.alias else "one event"
        because.append(
            f"{names[link.a].type} and {names[link.b].type} are linked by {kind}:"
            f" message {link.message_id}"
        )
    because.append(
        f"the person's canonical id is its {best.type}: the highest priority, seen first"
    )
    timelines = store.claimed_by(person)
    return Explanation(
        found=True,
        owner=best.value,
        because=tuple(because),
        identifiers=tuple(sorted((names[h], seen_as.get(h, names[h].value)) for h in person)),
        links=tuple(
            LinkReason(
                a=names[link.a],
                b=names[link.b],
                kind="alias" if link.alias else "seen",
                time=link.time,
                message_id=link.message_id,
                refused=link.refused,
            )
            for link in links
            if link.a in person or link.b in person
        ),
        claims=tuple(
            ClaimReason(
                anonymous_id=value,
                time=claim.time,
                message_id=claim.message_id,
                identifier=names[claim.owner],
            )
            for handle, value in store.anonymous_ids(timelines).items()
            for claim in store.claims({handle: (BEGINNING, END)}).get(handle, [])
            if isinstance(claim.owner, int) and claim.owner in person
        ),
    )


def _explain_device(store: Store, rules: Rules, value: str) -> Explanation:
    timeline = store.timelines({value}).get(value)
    if timeline is None or not timeline.claimed:
        rows = timeline and store.rows({timeline.handle: (BEGINNING, END)})
        return Explanation(
            found=bool(rows) or (timeline is not None and timeline.released_until >= 0),
            owner=None,
            because=("nobody was ever seen on this device",),
        )
    claims = store.claims({timeline.handle: (BEGINNING, END)}).get(timeline.handle, [])
    owners = _canonical(store, claims)
    owned: list[tuple[int, int, Identifier | None]] = []
    for start, end, owner in spans(claims, rules.attribution):
        # Persons are told by type and value: a user may be called like the mail of another one.
        who = owners[owner] if isinstance(owner, int) else None
        if owned and owned[-1][2] == who:
            start = owned.pop()[0]
        owned.append((start, end, who))
    names = {who for _, _, who in owned if who is not None}
    return Explanation(
        found=True,
        owner=next(iter(names)).value if len(names) == 1 else None,
        because=(
            f"policy {rules.attribution.policy} over {len(claims)} claims:"
            f" {len(names)} owner{'s' if len(names) != 1 else ''} over time",
        ),
        claims=_reasons(store, value, claims),
        spans=tuple(
            SpanReason(start=start, end=end, owner=None if who is None else who.value)
            for start, end, who in owned
        ),
    )


def _explain_message(store: Store, rules: Rules, message_id: str) -> Explanation:
    sightings = store.find(message_id)
    if not sightings:
        return Explanation(
            found=False,
            owner=None,
            because=(
                "no reference and no claim of this message is kept: it was never seen, its row"
                " names its own user, or its references have expired",
            ),
        )
    sighting = sightings[0]
    if sighting.subject < 0:
        known = store.held({-sighting.subject})[-sighting.subject][1]
        return _explain_known(store, known, ("the event itself carried a known identifier",))
    claims = store.claims({sighting.subject: (BEGINNING, END)}).get(sighting.subject, [])
    value = store.anonymous_ids({sighting.subject}).get(sighting.subject)
    own = [c for c in claims if c.message_id == message_id and isinstance(c.owner, int)]
    if own and not rules.identified_follow_device:
        claim: Claim | None = own[0]
        why = "the event itself carried a known identifier"
    else:
        claim = claim_at(claims, sighting.time, rules.attribution)
        why = f"policy {rules.attribution.policy} gives the event to a claim of its device"
    if claim is None or not isinstance(claim.owner, int):
        return Explanation(
            found=True,
            owner=None,
            because=("the event is anonymous, and no claim of its device reaches it",),
            claims=() if value is None else _reasons(store, value, claims),
        )
    known = store.held({claim.owner})[claim.owner][1]
    return _explain_known(
        store, known, (why, f"the device was claimed by message {claim.message_id}")
    )


def _canonical(store: Store, claims: list[Claim]) -> Mapping[int, Identifier]:
    held = store.held({c.owner for c in claims if isinstance(c.owner, int)})
    best = store.held({known.canonical for _, known in held.values()})
    return {handle: best[known.canonical][0] for handle, (_, known) in held.items()}


def _reasons(store: Store, value: str, claims: list[Claim]) -> tuple[ClaimReason, ...]:
    held = store.held({c.owner for c in claims if isinstance(c.owner, int)})
    return tuple(
        ClaimReason(
            anonymous_id=value,
            time=claim.time,
            message_id=claim.message_id,
            identifier=held[claim.owner][0] if isinstance(claim.owner, int) else None,
        )
        for claim in claims
    )


def chain_between(start: int, goal: int, links: Iterable[StoredLink]) -> list[StoredLink]:
    """The shortest chain of links that hold, from one identifier to another; or nothing."""
    at: dict[int, list[tuple[int, StoredLink]]] = {}
    for link in links:
        if not link.refused:
            at.setdefault(link.a, []).append((link.b, link))
            at.setdefault(link.b, []).append((link.a, link))
    reached: dict[int, StoredLink | None] = {start: None}
    queue = [start]
    for node in queue:
        for other, link in at.get(node, ()):
            if other not in reached:
                reached[other] = link
                queue.append(other)
    chain = []
    node = goal
    while (step := reached.get(node)) is not None:
        chain.append(step)
        node = step.b if node == step.a else step.a
    return chain[::-1]
