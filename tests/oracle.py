"""
The answer computed a second time, from the whole set of events, in the plainest way there is.

Nothing here is shared with the library but the event type: lists and loops over everything, no
batches, no spans, no differences, no order of arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from recognition.events import Event, Identifier

PRIORITY = ("user_id", "email", "phone")


@dataclass
class Oracle:
    """Everything that happened, in no order."""

    policy: str
    lookback: int
    own_column: bool
    events: list[Event] = field(default_factory=list)
    unlinked: set[frozenset[tuple[str, str]]] = field(default_factory=set)
    forgotten: dict[tuple[str, str], int] = field(default_factory=dict)
    released: dict[str, int] = field(default_factory=dict)

    def named(self, event: Event) -> list[tuple[str, str]]:
        """The event's identifiers, strongest first."""
        return [
            (i.type, i.value.lower() if i.type == "email" else i.value)
            for i in sorted(event.known, key=lambda i: PRIORITY.index(i.type))
        ]

    def known(self, event: Event) -> list[tuple[str, str]]:
        """The same without those that were forgotten; none where the strongest one was."""
        found = self.named(event)
        left = [i for i in found if self.forgotten.get(i, -1) < event.time]
        return left if left[:1] == found[:1] else []

    def is_forgotten(self, event: Event) -> bool:
        return bool(event.known) and not self.known(event)

    def persons(self) -> dict[tuple[str, str], tuple[str, str]]:
        """The canonical identifier of each identifier's person."""
        first: dict[tuple[str, str], tuple[bool, int, str]] = {}
        edges: dict[tuple[bool, frozenset[tuple[str, str]]], tuple[int, str]] = {}
        for event in self.events:
            known = self.known(event)
            for identifier in known:
                seen = (False, event.time, event.message_id)
                first[identifier] = min(first.get(identifier, seen), seen)
            pairs = [(False, frozenset((known[0], other))) for other in known[1:]]
            # A previous id that is the event's own device names no second person.
            previous_id = event.previous_id if event.previous_id != event.anonymous_id else None
            if known and previous_id and ("user_id", previous_id) != known[0]:
                previous = ("user_id", previous_id)
                if self.forgotten.get(previous, -1) < event.time:
                    seen = (True, event.time, event.message_id)
                    first[previous] = min(first.get(previous, seen), seen)
                    pairs.append((True, frozenset((known[0], previous))))
            for pair in pairs:
                evidence = (event.time, event.message_id)
                edges[pair] = min(edges.get(pair, evidence), evidence)
        groups: list[set[tuple[str, str]]] = [{identifier} for identifier in first]
        joined_by_alias: list[set[tuple[str, str]]] = []

        def order(item: tuple[tuple[bool, frozenset[tuple[str, str]]], tuple[int, str]]) -> object:
            (alias, pair), (time, message_id) = item
            weakest = max(PRIORITY.index(type) for type, _ in pair)
            return (not alias, time, message_id, weakest, sorted(pair))

        for (alias, pair), _ in sorted(edges.items(), key=order):
            if pair in self.unlinked:
                continue
            one, other = (next(g for g in groups if identifier in g) for identifier in pair)
            if one is other:
                continue
            if not alias:
                users = {i for i in one | other if i[0] == "user_id"}
                if len(users) > 1 and not any(users <= group for group in joined_by_alias):
                    continue
            groups = [g for g in groups if g is not one and g is not other]
            groups.append(one | other)
            if alias:
                joined_by_alias = [set(group) for group in groups]
        canonical = {}
        for group in groups:
            best = min(group, key=lambda i: (PRIORITY.index(i[0]), first[i], i[1]))
            canonical.update(dict.fromkeys(group, best))
        return canonical

    def forget(self, identifier: tuple[str, str], at: int) -> None:
        """Everything that the person has done so far is forgotten, and all that it did by then."""
        canonical = self.persons()
        theirs = {i for i in canonical if canonical[i] == canonical.get(tuple(identifier))}
        theirs.add(tuple(identifier))
        until = max(
            [at, *(event.time for event in self.events if theirs.intersection(self.known(event)))]
        )
        for one in theirs:
            self.forgotten[one] = max(until, self.forgotten.get(one, -1))

    def claims(self, device: str) -> list[tuple[int, str, tuple[str, str] | None, int | None]]:
        """(time, message id, who, until): nobody claims for a forgotten person, up to a moment."""
        found = []
        for event in self.events:
            known = self.known(event)
            on_device = event.anonymous_id == device or (known and event.previous_id == device)
            if not on_device or not event.known:
                continue
            who: tuple[str, str] | None = known[0] if known else None
            until = None
            if who is None:
                until = self.forgotten[self.named(event)[0]]
            elif event.time <= self.released.get(device, -1):
                who, until = None, self.released[device]
            elif frozenset((("anonymous_id", device), who)) in self.unlinked:
                continue
            found.append((event.time, event.message_id, who, until))
        return sorted(found, key=lambda claim: claim[:2])

    def device_owner(self, device: str, time: int) -> tuple[str, str] | None:
        """Who owns an anonymous event of the device."""
        reaching = [
            claim
            for claim in self.claims(device)
            if claim[0] - self.lookback <= time and (claim[3] is None or time <= claim[3])
        ]
        if not reaching:
            return None
        before = [claim for claim in reaching if claim[0] <= time]
        after = [claim for claim in reaching if claim[0] >= time]
        if self.policy == "first_claim":
            return reaching[0][2]
        if self.policy == "last_login":
            return reaching[-1][2]
        if self.policy == "device_split":
            return before[-1][2] if before else reaching[0][2]
        return after[0][2] if after else None

    def owners(self) -> dict[str, str | None]:
        """What the target column of each message's row must hold in the end."""
        canonical = self.persons()
        result: dict[str, str | None] = {}
        for event in self.events:
            known = self.known(event)
            named = next((i.value for i in event.known if i.type == "user_id"), None)
            if not self.own_column and named is not None:
                result[event.message_id] = named
                continue
            who: tuple[str, str] | None = None
            follow = self.policy == "last_login" and self.own_column and event.anonymous_id
            if self.is_forgotten(event) and not follow:
                who = None
            elif known and not follow:
                who = known[0]
            elif event.anonymous_id:
                who = self.device_owner(event.anonymous_id, event.time)
            result[event.message_id] = None if who is None else canonical[who][1]
        return result


def make_event(
    message_id: str,
    time: int,
    anonymous_id: str | None = None,
    *,
    user_id: str | None = None,
    email: str | None = None,
    phone: str | None = None,
    previous_id: str | None = None,
    type: str = "track",
    name: str | None = None,
    traits: dict[str, str | int | float | bool] | None = None,
) -> Event:
    """An event of a test; ``time`` in microseconds since 1970-01-01 UTC."""
    known = [("user_id", user_id), ("email", email), ("phone", phone)]
    return Event(
        message_id=message_id,
        time=time,
        type=type,
        anonymous_id=anonymous_id,
        known=tuple(Identifier(kind, value) for kind, value in known if value is not None),
        previous_id=previous_id,
        name=name,
        table=None,
        traits=traits or {},
        user_agent=None,
    )


def once(events: Iterable[Event]) -> list[Event]:
    """Without repetitions of a message id."""
    return list({event.message_id: event for event in events}.values())


def batches(events: Sequence[Event], borders: Collection[int]) -> list[Sequence[Event]]:
    """The events cut at these positions."""
    cuts = [0, *sorted({border for border in borders if 0 < border < len(events)}), len(events)]
    return [events[low:high] for low, high in pairwise(cuts)]
