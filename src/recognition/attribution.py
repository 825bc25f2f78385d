"""
Who owned a device when: from the claims of one anonymous id to spans, and what changed between two.

All rules of attribution are in this file, and nothing else is: it knows no person, no table and no
store. The owner is a pure function of the *set* of claims. `claim_at` is the rule; `spans` says the
same for all times at once; `changes` compares two answers.

Precedents of the policies:

=====================  ==================================================================
``device_split``       Adobe CJA "device split", Amplitude: the last login before stands
``first_claim``        Mixpanel (simplified), PostHog: the first login keeps the device
``last_login``         Snowplow ``stitched_user_id``, Adobe "last authentication"
``since_last_identify``  Jitsu, Customer.io: the next login takes what came before it
=====================  ==================================================================
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

#: The first and the last microsecond that a span can hold; every event lies between the two.
BEGINNING = 0
END = 2**63 - 1

DAY = 86_400_000_000


class Policy(StrEnum):
    """Which claim owns an anonymous event."""

    DEVICE_SPLIT = "device_split"
    FIRST_CLAIM = "first_claim"
    LAST_LOGIN = "last_login"
    SINCE_LAST_IDENTIFY = "since_last_identify"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributionRules:
    """
    How owners are decided.

    Args:
        policy: Which claim owns an event.
        lookback: How far a claim reaches back before its own time, in microseconds, inclusive.
            Default 30 days, as Jitsu's ``lookbackWindowDays``.
    """

    policy: Policy = Policy.DEVICE_SPLIT
    lookback: int = 30 * DAY

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy(self.policy))
        if self.lookback < 0:
            raise ValueError("lookback is not negative")


class Claim(NamedTuple):
    """
    "At this time, this anonymous id was used by this owner."

    Claims sort by (time, message id): that is the order of the timeline.
    """

    time: int
    """Microseconds since 1970-01-01 UTC."""
    message_id: str
    owner: Hashable | None
    """Whoever claimed; ``None`` once forgotten or released: nobody, but the claim still stands."""
    until: int = END
    """The last moment that this claim has any effect on; below `BEGINNING`: it has none."""
    soft: bool = False
    """The claiming event's own row holds no user id, so that it looks like an anonymous one."""


class Span(NamedTuple):
    """A half-open time interval ``[start, end)`` with one owner; ``None`` is nobody."""

    start: int
    end: int
    owner: Hashable | None


class Change(NamedTuple):
    """In ``[start, end)`` the owner was ``old`` and is ``new``."""

    start: int
    end: int
    old: Hashable | None
    new: Hashable | None


def claim_at(claims: Sequence[Claim], time: int, rules: AttributionRules) -> Claim | None:
    """
    The claim that decides about an anonymous event at ``time``; ``None``: none does.

    Only the claims that reach the event count: those not later than ``time + lookback``. Among
    equal times the message id decides.

    Args:
        claims: All claims of the timeline, sorted, without duplicates.
        time: Microseconds since 1970-01-01 UTC.
        rules: Policy and look-back.
    """
    return _decide(_standing(claims, time), time, rules)


def owner_at(claims: Sequence[Claim], time: int, rules: AttributionRules) -> Hashable | None:
    """The owner of an anonymous event at ``time``; ``None``: nobody. See `claim_at`."""
    claim = claim_at(claims, time, rules)
    return None if claim is None else claim.owner


def ask(claims: Sequence[Claim], rules: AttributionRules) -> Callable[[int], Hashable | None]:
    """`owner_at` of one timeline, to be asked for many times."""
    if any(claim.until < END for claim in claims):
        return lambda time: owner_at(claims, time, rules)
    return lambda time: _owner(claims, time, rules)


def _standing(claims: Sequence[Claim], time: int) -> Sequence[Claim]:
    if any(claim.until < time for claim in claims):
        return [claim for claim in claims if claim.until >= time]
    return claims


def _owner(claims: Sequence[Claim], time: int, rules: AttributionRules) -> Hashable | None:
    claim = _decide(claims, time, rules)
    return None if claim is None else claim.owner


def _decide(claims: Sequence[Claim], time: int, rules: AttributionRules) -> Claim | None:
    reaching = bisect_right(claims, time + rules.lookback, key=_time)
    if not reaching:
        return None
    match rules.policy:
        case Policy.FIRST_CLAIM:
            return claims[0]
        case Policy.LAST_LOGIN:
            return claims[reaching - 1]
        case Policy.DEVICE_SPLIT:
            before = bisect_right(claims, time, key=_time)
            return claims[before - 1] if before else claims[0]
        case Policy.SINCE_LAST_IDENTIFY:
            after = bisect_left(claims, time, key=_time)
            return claims[after] if after < reaching else None


def spans(claims: Sequence[Claim], rules: AttributionRules) -> list[Span]:
    """
    The owners of all times, from `BEGINNING` to `END`, without gaps; neighbours differ.

    Args:
        claims: All claims of the timeline, sorted, without duplicates.
        rules: Policy and look-back.
    """
    if not claims:
        return [Span(BEGINNING, END, None)]
    # The owner can only change where a claim starts to reach, starts, has just passed, or ends.
    borders = {BEGINNING}
    for claim in claims:
        borders.add(claim.time - rules.lookback)
        borders.add(claim.time)
        borders.add(claim.time + 1)
        if claim.until < END:
            borders.add(claim.until + 1)
    ends = sorted({claim.until for claim in claims if claim.until < END})
    found: list[Span] = []
    standing: Sequence[Claim] = claims
    for start in sorted(border for border in borders if border >= BEGINNING):
        while ends and ends[0] < start:
            ends.pop(0)
            standing = _standing(claims, start)
        owner = _owner(standing, start, rules)
        if found and found[-1].owner == owner:
            continue
        if found:
            found[-1] = found[-1]._replace(end=start)
        found.append(Span(start, END, owner))
    return found


def changes(
    old: Iterable[Span],
    new: Iterable[Span],
    value_before: Callable[[Hashable | None], Hashable | None],
    value_after: Callable[[Hashable | None], Hashable | None],
) -> Iterator[Change]:
    """
    Where two answers differ, and nothing else: in time order, neighbours that change alike joined.

    Args:
        old: Spans as they were.
        new: Spans as they are; both cover the same times.
        value_before: What an owner's rows held before, for example the person's user id.
        value_after: What an owner's rows hold from now on.
    """
    pending: Change | None = None
    for start, end, before, after in _side_by_side(list(old), list(new)):
        change = Change(start, end, value_before(before), value_after(after))
        if pending is not None and pending[2:] == change[2:] and pending.end == start:
            pending = pending._replace(end=end)
            continue
        if pending is not None and pending.old != pending.new:
            yield pending
        pending = change
    if pending is not None and pending.old != pending.new:
        yield pending


def _side_by_side(
    old: Sequence[Span], new: Sequence[Span]
) -> Iterator[tuple[int, int, Hashable | None, Hashable | None]]:
    i = j = 0
    start = BEGINNING
    while i < len(old) and j < len(new):
        end = min(old[i].end, new[j].end)
        yield start, end, old[i].owner, new[j].owner
        i += old[i].end == end
        j += new[j].end == end
        start = end


def _time(claim: Claim) -> int:
    return claim.time
