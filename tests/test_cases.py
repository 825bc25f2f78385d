"""
Published behaviour of well-known systems, in every order of arrival, through every graph.

A case is a list of events and, for each message, its final owner; or the groups of messages that
are one person. More cases of the same format can be put beside the file and just run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import count, permutations
from math import factorial
from pathlib import Path
from typing import Any

import pytest

from graphs import open_mongodb
from recognition.attribution import AttributionRules, Policy
from recognition.events import Event, parse_event, parse_time, render_time
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from warehouse import Warehouse

Case = dict[str, Any]

FILES = sorted(Path(__file__).with_name("cases").glob("*.json"))
OWN_COLUMN = "stitched_user_id"
MOST_ORDERS = 120
SHUFFLES = 60


def cases_of(kind: str) -> list[Any]:
    found = []
    for path in FILES:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["format"] == "recognition-cases/1", path.name
        found += [pytest.param(case, id=case["name"]) for case in content[kind]]
    return found


def events_of(case: Case) -> list[Event]:
    """
    The events of a case, by way of the format of flat rows.

    A whole number as time is seconds since 1970-01-01 UTC; events without one follow each other.
    """
    events = []
    for second, given in enumerate(case["events"], start=1):
        body = dict(given)
        at = body.pop("time", second)
        body["timestamp"] = render_time(at * 1_000_000 if isinstance(at, int) else parse_time(at))
        events.append(parse_event(body))
    return events


def orders_of(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    """All orders of few events, sixty random ones of many."""
    if factorial(len(events)) <= MOST_ORDERS:
        yield from permutations(events)
        return
    rng = random.Random(len(events))
    for _ in range(SHUFFLES):
        yield rng.sample(events, len(events))


class Run:
    """Arrivals of one case, each in a workspace of its own of the same graph."""

    def __init__(self, graph: Graph, policy: Policy, target_column: str | None) -> None:
        self._graph = graph
        self._policy = policy
        self._target_column = target_column
        self._numbers = count()

    def rows(self, batches: Sequence[Sequence[Event]], *, at_once: bool) -> dict[str, object]:
        """What the target column holds in the end; updates are delivered by batch or at the end."""
        rules = Rules(
            workspace=f"w{next(self._numbers)}",
            attribution=AttributionRules(policy=self._policy),
            target_column=self._target_column,
        )
        recognizer = Recognizer(self._graph, rules)
        warehouse = Warehouse()
        for number, batch in enumerate(batches, start=1):
            done = recognizer.process(batch)
            for table, rows in recognizer.rows(done).items():
                warehouse.load(table, rows)
            recognizer.flushed(done.receipt)
            if at_once or number == len(batches):
                leased = self._graph.lease_updates(10_000, 600)
                warehouse.apply([delivery.update for delivery in leased])
                self._graph.acknowledge([delivery.position for delivery in leased])
        target = rules.target_of("events")
        return {message: row[target] for message, row in warehouse.tables["events"].items()}

    def all_rows(self, events: Sequence[Event]) -> Iterator[tuple[list[str], dict[str, object]]]:
        """Each order of arrival, one by one and all at once, with the rows it ends with."""
        for order in orders_of(events):
            arrival = [event.message_id for event in order]
            one_by_one = [[event] for event in order]
            yield arrival, self.rows(one_by_one, at_once=True)
            yield arrival, self.rows(one_by_one, at_once=False)
            yield arrival, self.rows([order], at_once=True)


@pytest.fixture(params=["memory", "sqlite", "rehearsal", "mongodb"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Graph]:
    """Every graph there is."""
    opened: list[Graph] = []
    if request.param == "memory":
        opened.append(MemoryGraph())
    elif request.param == "mongodb":
        opened.append(open_mongodb())
    else:
        opened.append(SqliteGraph(tmp_path / "graph.db"))
    if request.param == "rehearsal":
        opened.append(opened[0].rehearse())
    yield opened[-1]
    for each in reversed(opened):
        each.close()


@pytest.mark.parametrize("case", cases_of("attribution"))
def test_owner_is_the_published_one(case: Case, graph: Graph) -> None:
    """In a column of its own every row of the case holds its owner, whatever the arrival."""
    run = Run(graph, Policy(case["policy"]), OWN_COLUMN)
    wrong = [
        (arrival, rows) for arrival, rows in run.all_rows(events_of(case)) if rows != case["owner"]
    ]

    assert wrong == []


@pytest.mark.parametrize("case", cases_of("attribution"))
def test_user_column_holds_the_published_owner(case: Case, graph: Graph) -> None:
    """In the user column anonymous rows hold their owner; a row that names a user keeps it."""
    policy = Policy(case["policy"])
    expected = dict(case["owner"])
    for event in events_of(case):
        user = next((i.value for i in event.known if i.type == "user_id"), None)
        if user is not None:
            expected[event.message_id] = user
        elif event.known and policy is Policy.LAST_LOGIN:
            # In its own column the row follows its device; here it belongs to whom it names.
            del expected[event.message_id]
    run = Run(graph, policy, None)
    wrong = [
        (arrival, rows)
        for arrival, rows in run.all_rows(events_of(case))
        if {message_id: rows[message_id] for message_id in expected} != expected
    ]

    assert wrong == []


@pytest.mark.parametrize("case", cases_of("identity"))
def test_persons_are_the_published_ones(case: Case, graph: Graph) -> None:
    """Messages of one person end with the same value, those of different ones never do."""
    run = Run(graph, Policy.DEVICE_SPLIT, OWN_COLUMN)
    wrong = []
    for arrival, rows in run.all_rows(events_of(case)):
        values = [{rows[message_id] for message_id in group} for group in case["persons"]]
        if any(len(found) != 1 or None in found for found in values) or len(
            set().union(*values)
        ) != len(values):
            wrong.append((arrival, rows))

    assert wrong == []


def test_there_are_cases_of_each_kind() -> None:
    """The file of published cases is there and was read."""
    names = {kind: len(cases_of(kind)) for kind in ("attribution", "identity")}

    assert names["attribution"] >= 6
    assert names["identity"] >= 3
