"""
The final rows equal the oracle's, whatever the order, the batches, the repetitions and the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import Oracle, batches, make_event
from recognition.attribution import AttributionRules, Policy
from recognition.events import Event
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, Supersede, TableRules
from warehouse import Warehouse

GRAPHS: dict[str, Callable[[], Graph]] = {
    "memory": MemoryGraph,
    "sqlite": lambda: SqliteGraph(":memory:"),
}

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
    "version": ({"default": TableRules(supersede=Supersede.VERSION)}, ALL),
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


def untie(batch: Sequence[Event]) -> list[Event]:
    """The same events, no two at the same instant: time 3 of message m07 becomes 3.07."""
    return [replace(e, time=e.time * 100 + int(e.message_id[1:])) for e in batch]


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

    def rows(self) -> dict[str, object]:
        target = target_of(self.rules)
        return {m: row.get(target) for m, row in self.warehouse.tables["events"].items()}


FAST = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize("graph", GRAPHS)
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
    events, arriving = delivery
    rules = rules_of(mode, policy, stamps=stamps)
    if rules.default.references is References.NONE:
        # Without references, rows of one device at the very same instant cannot be told apart.
        rules = replace(rules, attribution=replace(rules.attribution, lookback=LOOKBACK * 100))
        events, arriving = untie(events), [untie(batch) for batch in arriving]
    pipeline = Pipeline(GRAPHS[graph](), rules)
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
