"""
The final rows equal the oracle's, whatever the order, the batches, the repetitions and the policy.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs import EMBEDDED, open_mongodb
from oracle import Oracle, batches, make_event
from recognition.attribution import DAY, AttributionRules, Policy
from recognition.events import Event, Identifier
from recognition.graph import Graph, decisions
from recognition.graph.memory import MemoryGraph
from recognition.graph.store import Rows, Store
from recognition.messages import UpdateByCriteria
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, Supersede, TableRules
from warehouse import Warehouse

#: The ways to tell recognised rows; the policies that each of them can keep.
ALL = tuple(Policy)
MODES: dict[str, tuple[dict[str, Any], tuple[Policy, ...]]] = {
    "references": ({}, ALL),
    "own column": ({"target_column": "stitched_user_id"}, ALL),
    "own column without references": (
        {
            "target_column": "stitched_user_id",
            "default": TableRules(references=References.NONE),
        },
        ALL,
    ),
    "own column with days": (
        {"target_column": "stitched_user_id", "default": TableRules(references=References.DAYS)},
        ALL,
    ),
    "version": ({"default": TableRules(supersede=Supersede.VERSION)}, ALL),
    "version with days": (
        {"default": TableRules(supersede=Supersede.VERSION, references=References.DAYS)},
        ALL,
    ),
    "version without references": (
        {"default": TableRules(supersede=Supersede.VERSION, references=References.NONE)},
        ALL,
    ),
    "own column and version": (
        {
            "target_column": "stitched_user_id",
            "default": TableRules(supersede=Supersede.VERSION),
        },
        ALL,
    ),
}

TIMES = st.integers(0, 12)
DEVICES = st.sampled_from(["d1", "d2", None])
USERS = st.sampled_from([None, None, None, "u1", "u2", "u3"])
EMAILS = st.sampled_from([None, None, None, "a@x.com", "A@X.com", "b@x.com"])
PREVIOUS = st.sampled_from([None, None, None, None, "u1", "u2", "d2"])
LOOKBACK = 7


@st.composite
def journeys(draw: st.DrawFn) -> list[Event]:
    """A few events on a few devices, with ties in time."""
    events = []
    for number in range(draw(st.integers(1, 12))):
        user, email = draw(USERS), draw(EMAILS)
        known = user is not None or email is not None
        events.append(
            make_event(
                f"m{number:02}",
                draw(TIMES),
                draw(DEVICES),
                user_id=user,
                email=email,
                previous_id=draw(PREVIOUS) if known and user else None,
            )
        )
    return events


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[Event], list[Sequence[Event]]]:
    """A set of events, and one way in which it arrives: shuffled, repeated, cut into batches."""
    events = draw(journeys())
    repeated = draw(st.lists(st.sampled_from(events), max_size=4))
    arriving = draw(st.permutations(events + repeated))
    cuts = draw(st.sets(st.integers(1, max(len(arriving), 2)), max_size=5))
    return events, batches(arriving, cuts)


def rules_of(mode: str, policy: Policy, *, stamps: bool) -> Rules:
    options, policies = MODES[mode]
    if policy not in policies:
        policy = policies[0]
    return Rules(
        attribution=AttributionRules(policy=policy, lookback=LOOKBACK), stamps=stamps, **options
    )


#: What one step of `TIMES` is where no two events may be at the same instant: there are at most 99.
#: Where days are kept, a journey takes some days, and some of its events are just after midnight.
STEPS = {References.NONE: 100, References.DAYS: DAY // 4}


def untie(batch: Sequence[Event], step: int) -> list[Event]:
    """The same events, no two at the same instant: time 3 of message m07 becomes 3.07."""
    return [replace(e, time=e.time * step + int(e.message_id[1:])) for e in batch]


def target_of(rules: Rules) -> str:
    return rules.target_column or "user_id"


class Pipeline:
    """Recognizers over one graph, a warehouse, and updates that are applied when told to."""

    def __init__(self, graph: Graph, rules: Rules) -> None:
        self.graph = graph
        self.rules = rules
        self.recognizers = [Recognizer(graph, rules), Recognizer(graph, rules)]
        self.warehouse = Warehouse()
        self.turn = 0

    def take(self, batch: Sequence[Event]) -> None:
        recognizer = self.recognizers[self.turn % 2]
        self.turn += 1
        done = recognizer.process(batch)
        for table, rows in recognizer.rows(done).items():
            self.warehouse.load(table, rows)
        recognizer.flushed(done.receipt)

    def deliver(self) -> int:
        leased = self.graph.lease_updates(10_000, 60)
        changed = self.warehouse.apply([item.update for item in leased])
        self.graph.acknowledge([item.position for item in leased])
        return changed

    def close(self) -> None:
        self.graph.close()

    def rows(self) -> dict[str, object]:
        target = target_of(self.rules)
        return {m: row.get(target) for m, row in self.warehouse.tables["events"].items()}


FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


SLOW = settings(FAST, max_examples=int(os.environ.get("RECOGNITION_TEST_EXAMPLES", "20")))


@pytest.mark.parametrize("graph", EMBEDDED)
@pytest.mark.parametrize("mode", MODES)
@given(delivery=deliveries(), policy=st.sampled_from(Policy), stamps=st.booleans())
@FAST
def test_final_rows_are_those_of_the_oracle(
    graph: str,
    mode: str,
    delivery: tuple[list[Event], list[Sequence[Event]]],
    policy: Policy,
    stamps: bool,
) -> None:
    """Order, batches, repetitions and two recognizers do not change the final rows."""
    check_delivery(EMBEDDED[graph](), mode, delivery, policy, stamps)


@pytest.mark.parametrize("mode", MODES)
@given(delivery=deliveries(), policy=st.sampled_from(Policy), stamps=st.booleans())
@SLOW
def test_final_rows_in_mongodb(
    mode: str, delivery: tuple[list[Event], list[Sequence[Event]]], policy: Policy, stamps: bool
) -> None:
    """The same, where every batch crosses a network."""
    check_delivery(open_mongodb(), mode, delivery, policy, stamps)


def check_delivery(
    graph: Graph,
    mode: str,
    delivery: tuple[list[Event], list[Sequence[Event]]],
    policy: Policy,
    stamps: bool,
) -> None:
    events, arriving = delivery
    rules = rules_of(mode, policy, stamps=stamps)
    if step := STEPS.get(rules.default.references):
        # Without references, rows of one device at the very same instant cannot be told apart.
        rules = replace(rules, attribution=replace(rules.attribution, lookback=LOOKBACK * step))
        events, arriving = untie(events, step), [untie(batch, step) for batch in arriving]
    pipeline = Pipeline(graph, rules)
    with closing(pipeline):
        for batch in arriving:
            pipeline.take(batch)
            pipeline.deliver()
    oracle = Oracle(
        policy=rules.attribution.policy,
        lookback=rules.attribution.lookback,
        own_column=rules.has_own_column,
        events=events,
    )

    assert pipeline.rows() == oracle.owners()


#: One email a user, so that no link is refused: what `forget` promises is about such persons.
OWN_EMAIL = {"u1": [None, "a@x.com", "A@X.com"], "u2": [None, "b@x.com"], "u3": [None]}
NOW = 12  # not earlier than any event that has happened
UNDONE = [Identifier("user_id", "u1"), Identifier("user_id", "u2"), Identifier("email", "a@x.com")]


@st.composite
def undone(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Batches of events, with unlink, release and forget anywhere between them."""
    events = []
    for number in range(draw(st.integers(1, 10))):
        user = draw(USERS)
        email = draw(EMAILS) if user is None else draw(st.sampled_from(OWN_EMAIL[user]))
        name = f"m{number:02}"
        events.append(make_event(name, draw(TIMES), draw(DEVICES), user_id=user, email=email))
    arriving = draw(st.permutations(events))
    cuts = draw(st.sets(st.integers(1, max(len(arriving), 2)), max_size=5))
    actions: list[tuple[str, Any]] = [("take", batch) for batch in batches(arriving, cuts)]
    device = st.sampled_from(["d1", "d2"])
    known = st.sampled_from(UNDONE)
    undo = st.one_of(
        st.tuples(st.just("unlink"), st.tuples(known, known).filter(lambda two: two[0] != two[1])),
        st.tuples(st.just("take away"), st.tuples(device, known)),
        st.tuples(st.just("release"), st.tuples(device, TIMES)),
        st.tuples(st.just("forget"), st.tuples(known, st.just(NOW))),
    )
    for action in draw(st.lists(undo, min_size=1, max_size=3)):
        actions.insert(draw(st.integers(0, len(actions))), action)
    return actions


UNDO_MODES = ["references", "version", "own column", "own column with days", "version with days"]


@pytest.mark.parametrize("graph", EMBEDDED)
@pytest.mark.parametrize("mode", UNDO_MODES)
@given(actions=undone(), policy=st.sampled_from(Policy), stamps=st.booleans())
@FAST
def test_what_was_undone_stays_undone(
    graph: str, mode: str, actions: list[tuple[str, Any]], policy: Policy, stamps: bool
) -> None:
    """Unlink, release and forget hold for what came before them and for what comes late."""
    check_undone(EMBEDDED[graph](), mode, actions, policy, stamps)


@pytest.mark.parametrize("mode", UNDO_MODES)
@given(actions=undone(), policy=st.sampled_from(Policy), stamps=st.booleans())
@SLOW
def test_what_was_undone_in_mongodb(
    mode: str, actions: list[tuple[str, Any]], policy: Policy, stamps: bool
) -> None:
    """The same, where every call crosses a network."""
    check_undone(open_mongodb(), mode, actions, policy, stamps)


def check_undone(
    graph: Graph, mode: str, actions: list[tuple[str, Any]], policy: Policy, stamps: bool
) -> None:
    rules = rules_of(mode, policy, stamps=stamps)
    step = STEPS.get(rules.default.references, 1)
    rules = replace(rules, attribution=replace(rules.attribution, lookback=LOOKBACK * step))
    pipeline = Pipeline(graph, rules)
    recognizer = pipeline.recognizers[0]
    oracle = Oracle(
        policy=rules.attribution.policy, lookback=LOOKBACK * step, own_column=rules.has_own_column
    )
    with closing(pipeline):
        for action, subject in actions:
            match action:
                case "take":
                    batch = subject if step == 1 else untie(subject, step)
                    pipeline.take(batch)
                    oracle.events.extend(batch)
                case "unlink":
                    recognizer.unlink(*subject)
                    oracle.unlinked.add(frozenset(subject))
                case "take away":
                    device, identifier = subject
                    recognizer.unlink(Identifier("anonymous_id", device), identifier)
                    oracle.unlinked.add(frozenset((("anonymous_id", device), identifier)))
                case "release":
                    device, at = subject[0], subject[1] * step
                    recognizer.release(device, at)
                    until = max([at, *(claim[0] for claim in oracle.claims(device))])
                    oracle.released[device] = max(until, oracle.released.get(device, -1))
                case "forget":
                    identifier, at = subject[0], subject[1] * step + step - 1
                    recognizer.forget(identifier, at)
                    oracle.forget(identifier, at)
            pipeline.deliver()

    assert pipeline.warehouse.tables.get("events", {}).keys() == {
        event.message_id for event in oracle.events
    }
    assert not oracle.events or pipeline.rows() == oracle.owners()


@pytest.mark.parametrize("mode", ["references", "own column with days", "version"])
def test_a_row_that_came_meanwhile_is_emptied_only_where_something_was_taken_back(
    mode: str,
) -> None:
    """Claims give rows to somebody, never to nobody: only what undoes them can empty a row."""
    rules = rules_of(mode, Policy.SINCE_LAST_IDENTIFY, stamps=True)
    late = Rows({("events",): {"late": 9 * DAY}}, {("events",): {9}})
    graph = MemoryGraph()
    recognizer = Recognizer(graph, rules)
    recognizer.process([make_event("claim", 5 * DAY, "d1", user_id="u1")])

    def catch_up() -> int:
        def work(store: Store) -> int:
            handle = store.timelines({"d1"})["d1"].handle
            window = (0, 20 * DAY)
            return decisions.catch_up(store, rules, {handle: (late, window)}, set())

        return graph._run(rules, work)

    before = catch_up()
    recognizer.release("d1", 30 * DAY)
    after = catch_up()

    assert before == 0
    assert after > 0


def test_an_update_names_no_day_without_rows() -> None:
    """What takes a device back goes by its days: an older update between them would stay."""
    rules = rules_of("own column with days", Policy.LAST_LOGIN, stamps=False)
    rules = replace(rules, attribution=replace(rules.attribution, lookback=30 * DAY))
    pipeline = Pipeline(MemoryGraph(), rules)
    with closing(pipeline):
        pipeline.take([make_event("claim", 9 * DAY, "d", user_id="u1")])
        pipeline.take([make_event("early", 3 * DAY, "d"), make_event("late", 7 * DAY, "d")])
        pipeline.recognizers[0].release("d", 20 * DAY)
        pipeline.take([make_event("between", 5 * DAY, "d")])
        pipeline.deliver()

    assert set(pipeline.rows().values()) == {None}


@pytest.mark.parametrize("stamps", [True, False])
@pytest.mark.parametrize("mode", ["version", "version with days", "version without references"])
@pytest.mark.parametrize("seen", ["before the release", "after it"])
def test_a_version_outlasts_an_update_that_comes_after_it_was_taken_back(
    seen: str, mode: str, stamps: bool
) -> None:
    """
    A row that becomes visible when its device was released already is nobody's for good.

    The version of the update that took the device back is not in it, and the one that gave the
    device to somebody may still be on its way.
    """
    rules = rules_of(mode, Policy.LAST_LOGIN, stamps=stamps)
    rules = replace(rules, attribution=replace(rules.attribution, lookback=30 * DAY))
    pipeline = Pipeline(MemoryGraph(), rules)
    recognizer = pipeline.recognizers[0]

    def decided() -> list[UpdateByCriteria]:
        leased = pipeline.graph.lease_updates(1_000, 60)
        pipeline.graph.acknowledge([item.position for item in leased])
        return [item.update for item in leased]

    with closing(pipeline):
        late = [make_event("late", 3 * DAY + 1, "d")]
        pipeline.take([make_event("early", 3 * DAY, "d"), make_event("end", 4 * DAY, "d")])
        done = recognizer.process(late) if seen == "before the release" else None
        pipeline.take([make_event("claim", 9 * DAY, "d", user_id="u1")])
        held_up = decided()
        recognizer.release("d", 20 * DAY)
        pipeline.warehouse.apply(decided())
        done = done or recognizer.process(late)
        pipeline.warehouse.load("events", recognizer.rows(done)["events"])
        recognizer.flushed(done.receipt)
        pipeline.warehouse.apply(decided())
        pipeline.warehouse.apply(held_up)

    assert held_up
    assert pipeline.rows() == {"early": None, "end": None, "claim": "u1", "late": None}
