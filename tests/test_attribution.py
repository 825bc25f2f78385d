"""Who owned a device when: the four policies, their borders, and what changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recognition.attribution import (
    BEGINNING,
    DAY,
    END,
    AttributionRules,
    Change,
    Claim,
    Policy,
    changes,
    owner_at,
    spans,
)

HOUR = 3_600_000_000
ANN, BO = "Ann", "Bo"
# The tablet of docs/how-it-decides.md: Ann signs in at 10:00, Bo at 12:00.
TABLET = [Claim(10 * HOUR, "m1", ANN), Claim(12 * HOUR, "m2", BO)]

FAST = settings(max_examples=200, deadline=None, derandomize=True)


def rules(policy: Policy, lookback: int = 30 * DAY) -> AttributionRules:
    return AttributionRules(policy=policy, lookback=lookback)


def same(owner: Hashable | None) -> Hashable | None:
    return owner


@st.composite
def timelines(draw: st.DrawFn) -> list[Claim]:
    """A few claims at small times, with ties; some end, some are nobody's."""
    claims = []
    for number in range(draw(st.integers(0, 7))):
        time = draw(st.integers(0, 9))
        ends = draw(st.sampled_from([END, END, END, -1, 2, 5, 8]))
        owner = draw(st.sampled_from([ANN, BO, "Cy", None]))
        claims.append(Claim(time, f"m{number}", owner, ends))
    return sorted(claims, key=lambda claim: claim[:2])


POLICIES = st.sampled_from(Policy)
LOOKBACKS = st.sampled_from([0, 1, 3, 100])


def plainly(claims: Sequence[Claim], time: int, policy: Policy, lookback: int) -> Hashable | None:
    """The rule of the documentation, over a plain list."""
    reaching = [c for c in claims if c.until >= time and c.time - lookback <= time]
    before = [c for c in reaching if c.time <= time]
    after = [c for c in reaching if c.time >= time]
    if not reaching:
        return None
    chosen = {
        Policy.FIRST_CLAIM: reaching[:1],
        Policy.LAST_LOGIN: reaching[-1:],
        Policy.DEVICE_SPLIT: before[-1:] or reaching[:1],
        Policy.SINCE_LAST_IDENTIFY: after[:1],
    }[policy]
    return chosen[0].owner if chosen else None


@pytest.mark.parametrize(
    ("policy", "nine", "eleven", "thirteen"),
    [
        (Policy.DEVICE_SPLIT, ANN, ANN, BO),
        (Policy.FIRST_CLAIM, ANN, ANN, ANN),
        (Policy.LAST_LOGIN, BO, BO, BO),
        (Policy.SINCE_LAST_IDENTIFY, ANN, BO, None),
    ],
)
def test_each_policy_decides_the_shared_tablet_as_published(
    policy: Policy, nine: str, eleven: str, thirteen: str | None
) -> None:
    """The table of the documentation holds for rows before, between and after two sign-ins."""
    found = [owner_at(TABLET, hour * HOUR, rules(policy)) for hour in (9, 11, 13)]

    assert found == [nine, eleven, thirteen]


@pytest.mark.parametrize("policy", Policy)
def test_the_look_back_includes_its_last_microsecond(policy: Policy) -> None:
    """A claim owns the event exactly the look-back earlier, not the one a microsecond before."""
    claims = [Claim(100, "m1", ANN)]

    assert owner_at(claims, 60, rules(policy, 40)) == ANN
    assert owner_at(claims, 59, rules(policy, 40)) is None


@pytest.mark.parametrize("policy", [p for p in Policy if p is not Policy.SINCE_LAST_IDENTIFY])
def test_a_claim_reaches_forward_without_end(policy: Policy) -> None:
    """The look-back bounds the past of a claim only; its future is open."""
    assert owner_at([Claim(0, "m1", ANN)], END - 1, rules(policy, 0)) == ANN


@pytest.mark.parametrize(
    ("policy", "owner"),
    [
        (Policy.DEVICE_SPLIT, BO),
        (Policy.FIRST_CLAIM, ANN),
        (Policy.LAST_LOGIN, BO),
        (Policy.SINCE_LAST_IDENTIFY, ANN),
    ],
)
def test_equal_times_are_decided_by_the_message_id(policy: Policy, owner: str) -> None:
    """Of two claims at one instant the one with the smaller message id counts as the earlier."""
    tie = sorted([Claim(5, "m2", BO), Claim(5, "m1", ANN)])

    assert owner_at(tie, 5, rules(policy)) == owner


def test_a_claim_that_ended_has_no_effect_after_its_last_moment() -> None:
    """A forgotten claim makes the device nobody's up to ``until``, and then it is as if never."""
    claims = [Claim(1, "m1", ANN), Claim(5, "m2", None, until=8)]
    decide = rules(Policy.DEVICE_SPLIT)

    assert owner_at(claims, 8, decide) is None
    assert owner_at(claims, 9, decide) == ANN


def test_a_forgotten_claim_is_not_handed_to_the_next_person() -> None:
    """Rows before a forgotten first claim stay nobody's, though somebody claims later."""
    claims = [Claim(5, "m1", None, until=9), Claim(7, "m2", BO)]

    assert owner_at(claims, 3, rules(Policy.DEVICE_SPLIT)) is None


def test_no_claims_are_one_span_of_nobody() -> None:
    """A device without claims is nobody's at all times."""
    assert spans([], rules(Policy.DEVICE_SPLIT)) == [(BEGINNING, END, None)]


def test_a_negative_look_back_is_refused() -> None:
    """A look-back cannot reach into the future."""
    with pytest.raises(ValueError, match="not negative"):
        AttributionRules(lookback=-1)


def test_an_unknown_policy_is_refused() -> None:
    """A policy is one of the four."""
    with pytest.raises(ValueError, match="last_touch"):
        AttributionRules(policy="last_touch")  # type: ignore[arg-type]


@given(claims=timelines(), time=st.integers(0, 12), policy=POLICIES, lookback=LOOKBACKS)
@FAST
def test_the_owner_is_the_one_of_the_plain_rule(
    claims: list[Claim], time: int, policy: Policy, lookback: int
) -> None:
    """The search by bisection gives what reading the whole list gives."""
    found = owner_at(claims, time, rules(policy, lookback))

    assert found == plainly(claims, time, policy, lookback)


@given(claims=timelines(), policy=POLICIES, lookback=LOOKBACKS)
@FAST
def test_spans_say_at_every_time_what_owner_at_says(
    claims: list[Claim], policy: Policy, lookback: int
) -> None:
    """The spans and the rule agree at every microsecond of a small timeline, and at the end."""
    decide = rules(policy, lookback)
    found = spans(claims, decide)

    for time in [*range(14), END - 1]:
        (span,) = [span for span in found if span.start <= time < span.end]
        assert span.owner == owner_at(claims, time, decide)


@given(claims=timelines(), policy=POLICIES, lookback=LOOKBACKS)
@FAST
def test_spans_cover_all_times_and_neighbours_differ(
    claims: list[Claim], policy: Policy, lookback: int
) -> None:
    """There is no gap, no overlap and no border without a reason."""
    found = spans(claims, rules(policy, lookback))

    assert (found[0].start, found[-1].end) == (BEGINNING, END)
    for left, right in pairwise(found):
        assert left.end == right.start
        assert left.owner != right.owner


@given(old=timelines(), new=timelines(), policy=POLICIES, lookback=LOOKBACKS)
@FAST
def test_changes_are_exactly_where_two_answers_differ(
    old: list[Claim], new: list[Claim], policy: Policy, lookback: int
) -> None:
    """At every time there is one change where the owner differs, and none where it does not."""
    decide = rules(policy, lookback)
    found = list(changes(spans(old, decide), spans(new, decide), same, same))

    for time in [*range(14), END - 1]:
        before, after = owner_at(old, time, decide), owner_at(new, time, decide)
        here = [(c.old, c.new) for c in found if c.start <= time < c.end]
        assert here == ([] if before == after else [(before, after)])


@given(old=timelines(), new=timelines(), policy=POLICIES, lookback=LOOKBACKS)
@FAST
def test_changes_are_in_order_and_joined(
    old: list[Claim], new: list[Claim], policy: Policy, lookback: int
) -> None:
    """Neighbours that change alike are one change."""
    decide = rules(policy, lookback)
    found = list(changes(spans(old, decide), spans(new, decide), same, same))

    for left, right in pairwise(found):
        assert left.end <= right.start
        assert left.end < right.start or left[2:] != right[2:]


def test_changes_compare_what_the_rows_hold() -> None:
    """Two owners with the same value are no change; one owner with a new value is."""
    claims = [Claim(5, "m1", 1), Claim(8, "m2", 2)]
    answer = spans(claims, rules(Policy.DEVICE_SPLIT))
    before = {None: None, 1: "a@x.com", 2: "u1"}
    after = {None: None, 1: "u1", 2: "u1"}

    assert list(changes(answer, answer, before.get, after.get)) == [
        Change(BEGINNING, 8, "a@x.com", "u1")
    ]
