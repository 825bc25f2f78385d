"""
The conformance kit for graphs: subclass `GraphTests`, give one or two fixtures, and that is all.

Events go in through a `Recognizer` and updates come out of the outbox; they are carried out
literally on rows that the kit keeps itself. It never looks inside the graph.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations
from math import ceil, floor

import pytest

from recognition.attribution import DAY, AttributionRules, Policy
from recognition.errors import (
    ConfigurationError,
    GraphError,
    GraphUnavailableError,
    InputError,
)
from recognition.events import Event, Identifier
from recognition.graph import Delivery, Graph, GraphStats, Owner
from recognition.identity import IdentityRules
from recognition.layouts import Columns, Layout, Row, layout_named
from recognition.messages import (
    Between,
    Cause,
    Empty,
    Equals,
    Messages,
    UpdateByCriteria,
    decide_id,
)
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import References, Rules, TableRules

Scalar = str | int | float | bool

#: 2026-01-01T12:00:00Z, in microseconds since 1970-01-01 UTC.
START = 1_767_268_800_000_000
SECOND = 1_000_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

#: How long a lease lasts that a test waits for, and how long it waits at most, in seconds.
SHORT_LEASE = 0.3
PATIENCE = 30.0

#: No update may name more rows than fit into a message of this size, in characters of JSON.
MAX_UPDATE = 2_000_000

#: Ids that have broken a packing, a folding or a comparison somewhere; all are different ids.
HOSTILE_IDS = (
    "6f0c3a52-4b59-4553-b8a5-c07e2a7e5a73",
    "6F0C3A52-4B59-4553-B8A5-C07E2A7E5A73",
    "6f0c3a524b594553b8a5c07e2a7e5a73",
    "{6f0c3a52-4b59-4553-b8a5-c07e2a7e5a73}",
    "00000000-0000-0000-0000-000000000001",
    "00000000-0000-0000-0000-000000000100",
    "node-next-1795376677518-c877c787-6e20-4439-8957-4ca31780eb88",
    "1",
    "01",
    "1.0",
    "1e0",
    "a",
    "A",
    "a b",
    'o\'clock "quoted" \\ %s ; --',
    "$where",
    "a.b.c",
    "\u00e9",
    "e\u0301",
    "\U0001f9ea\U0001f469\u200d\U0001f52c",
    "tab\tand\nline",
    "\x01\x02",
    "xy" * 512,
    "\U0001f9ea\U0001f52c" * 128,
)


def at(seconds: float) -> int:
    """So many seconds after `START`, in microseconds since 1970-01-01 UTC."""
    return START + round(seconds * SECOND)


def moment(time: int) -> datetime:
    """The same instant as updates write it."""
    return _EPOCH + timedelta(microseconds=time)


def event(
    message_id: str,
    seconds: float,
    anonymous_id: str | None = None,
    *,
    user: str | None = None,
    email: str | None = None,
    phone: str | None = None,
    previous: str | None = None,
    type: str = "track",
    name: str | None = None,
    traits: Mapping[str, Scalar] | None = None,
) -> Event:
    """An event so many seconds after `START`."""
    known = (("user_id", user), ("email", email), ("phone", phone))
    return Event(
        message_id=message_id,
        time=at(seconds),
        type="alias" if previous is not None else type,
        anonymous_id=anonymous_id,
        known=tuple(Identifier(kind, value) for kind, value in known if value is not None),
        previous_id=previous,
        name=name,
        table=None,
        traits=traits or {},
        user_agent=None,
    )


class Journey:
    """
    A recognizer over a graph, and the rows of its events.

    Rows are kept as `Recognizer.rows` gives them, and updates are carried out on them literally,
    in the order of their sequences.
    """

    def __init__(self, graph: Graph, rules: Rules | None = None) -> None:
        self.graph = graph
        self.rules = Rules() if rules is None else rules
        self.recognizer = Recognizer(graph, self.rules)
        self.tables: dict[str, dict[str, Row]] = {}

    def take(self, *events: Event) -> Recognition:
        """Process a batch and make its rows visible; a row that is there already stays."""
        done = self.recognizer.process(events)
        self.keep(done)
        self.recognizer.flushed(done.receipt)
        return done

    def keep(self, done: Recognition) -> None:
        """Make the rows of a batch visible."""
        for table, rows in self.recognizer.rows(done).items():
            held = self.tables.setdefault(table, {})
            for row in rows:
                held.setdefault(str(row["message_id"]), row)

    def deliver(self) -> list[UpdateByCriteria]:
        """Carry out all that the outbox holds, and acknowledge it."""
        found = [delivery.update for delivery in drain(self.graph)]
        for update in sorted(found, key=lambda update: update.sequence):
            self.apply(update)
        return found

    def apply(self, update: UpdateByCriteria) -> None:
        """Carry out one update."""
        if update.workspace != self.rules.workspace:
            return
        for row in self.tables.get(update.table, {}).values():
            if _meets(row, update):
                row.update(update.set)

    def owners(self, table: str = "events") -> dict[str, object]:
        """What the target column holds, by message id."""
        target = self.rules.target_of(table)
        return {message_id: row[target] for message_id, row in self.tables[table].items()}


def drain(graph: Graph) -> list[Delivery]:
    """Lease and acknowledge all that the outbox holds, in its order."""
    found: list[Delivery] = []
    while leased := graph.lease_updates(1_000, 600):
        found.extend(leased)
        graph.acknowledge([delivery.position for delivery in leased])
    return found


def _meets(row: Row, update: UpdateByCriteria) -> bool:
    for criterion in update.where:
        match criterion:
            case Equals(column=column, value=value):
                met = row.get(column) == value
            case Empty(column=column):
                met = row.get(column) is None
            case Between(column=column, start=start, end=end):
                held = row.get(column)
                met = isinstance(held, int) and start <= moment(held) < end
            case Messages(id_column=column, refs=refs):
                met = row.get(column) in {message_id for message_id, _ in refs}
            case _:
                raise AssertionError(f"no recognizer sends a criterion {criterion.kind!r}")
        if not met:
            return False
    return True


def _only(updates: Sequence[UpdateByCriteria]) -> UpdateByCriteria:
    assert len(updates) == 1, f"one update was expected, there are {len(updates)}"
    return updates[0]


def _refs(updates: Iterable[UpdateByCriteria]) -> list[tuple[str, datetime]]:
    return [
        ref
        for update in updates
        for criterion in update.where
        if isinstance(criterion, Messages)
        for ref in criterion.refs
    ]


_DAYS = Rules(target_column="stitched_user_id", default=TableRules(references=References.DAYS))
_HALF_DAY = DAY / SECOND / 2


def _midday(number: int) -> float:
    """Noon of a day in seconds after `START`, which is a noon too."""
    return number * 2 * _HALF_DAY


def _days(updates: Iterable[UpdateByCriteria]) -> set[int]:
    """The days that updates name, counted from the one of `START`."""
    found: set[int] = set()
    for update in updates:
        (between,) = (c for c in update.where if isinstance(c, Between))
        first, last = (
            ((bound - _EPOCH) // timedelta(microseconds=1) - START) / DAY + 0.5
            for bound in (between.start, between.end)
        )
        found.update(range(floor(first), ceil(last)))
    return found


def _contents(graph: Graph) -> GraphStats:
    return replace(graph.stats(), bytes=0)


def _wait_for_lease(graph: Graph) -> list[Delivery]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if leased := graph.lease_updates(10, 600):
            return leased
        time.sleep(SHORT_LEASE / 10)
    return []


def _insist(recognizer: Recognizer, batch: Sequence[Event]) -> Recognition:
    """As a worker does it: what may be tried again is tried again."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return recognizer.process(batch)
        except GraphUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class _FailingColumns(Layout):
    """A layout of a user's own with a mistake in it, that shows when an update is made."""

    def columns_of(self, table: str) -> Columns:
        raise ZeroDivisionError("a mistake in a layout")


class GraphTests:
    """
    What every graph keeps.

    A subclass overrides one fixture, and the second where the graph outlives its object::

        class TestMyGraph(GraphTests):
            @pytest.fixture
            def graph(self, server): ...

            @pytest.fixture
            def reopen(self, server): ...
    """

    @pytest.fixture
    def graph(self) -> Iterator[Graph]:
        """The graph under test, empty; the fixture closes it."""
        raise NotImplementedError("the subclass gives the graph under test")

    @pytest.fixture
    def reopen(self, graph: Graph) -> Callable[[], Graph]:
        """
        Gives a second graph object on the same storage; the fixture closes what it gave.

        The default is for graphs that live and die with their object: it gives the same one.
        """
        return lambda: graph

    # Owners ------------------------------------------------------------------------------------

    def test_stamps_events_of_a_known_device(self, graph: Graph) -> None:
        """After a claim, an anonymous event of the device comes back with its owner."""
        journey = Journey(graph)
        journey.take(event("claim", 1, "d1", user="u1"))

        done = journey.take(event("after", 2, "d1"), event("other", 2, "d2"), event("none", 2))

        assert done.owners == (Owner("u1"), None, None)
        assert (done.stamped, done.updates) == (1, 0)

    def test_claim_updates_the_rows_before_it(self, graph: Graph) -> None:
        """A claim makes one update of exactly the device's earlier rows, and says how many."""
        journey = Journey(graph)
        journey.take(
            event("a", 1, "d1"), event("b", 2, "d1"), event("x", 2, "d2"), event("c", 3, "d1")
        )
        done = journey.take(event("claim", 4, "d1", user="u1"))

        update = _only([delivery.update for delivery in drain(graph)])
        times = [criterion for criterion in update.where if isinstance(criterion, Between)]

        assert done.updates == 1
        assert (update.workspace, update.table) == ("default", "events")
        assert update.set == {"user_id": "u1"}
        assert Equals(column="anonymous_id", value="d1") in update.where
        assert Empty(column="user_id") in update.where
        assert times == [Between(column="timestamp", start=moment(at(1)), end=moment(at(3) + 1))]
        assert update.expected_rows == 3
        assert update.cause == Cause(message_id="claim", anonymous_id="d1")

    def test_updates_come_in_the_order_of_their_sequence(self, graph: Graph) -> None:
        """Positions and sequences grow together, and stamped rows lie between them."""
        journey = Journey(graph)
        sequences = []
        for number in range(5):
            journey.take(event(f"a{number}", 1, f"d{number}"))
            journey.take(event(f"c{number}", 2, f"d{number}", user=f"u{number}"))
            sequences.append(journey.take(event(f"b{number}", 3, f"d{number}")).versions[0])
        leased = graph.lease_updates(100, 60)

        assert [delivery.update.set["user_id"] for delivery in leased] == [
            f"u{number}" for number in range(5)
        ]
        assert [delivery.position for delivery in leased] == sorted(
            {delivery.position for delivery in leased}
        )
        for delivery, stamped, later in zip(leased, sequences, leased[1:], strict=False):
            assert delivery.update.sequence < stamped < later.update.sequence

    def test_ids_of_updates_follow_from_what_they_say(self, graph: Graph) -> None:
        """An update's id is the one of its content, and no two updates share one."""
        journey = Journey(graph)
        for number in range(3):
            journey.take(event(f"a{number}", 1, f"d{number}"))
            journey.take(event(f"c{number}", 2, f"d{number}", user="u1"))
        journey.take(event("late", 1.5, "d1", user="u2"))
        updates = [delivery.update for delivery in drain(graph)]

        assert len({update.id for update in updates}) == len(updates) >= 4
        for update in updates:
            assert update.id == decide_id(
                update.workspace, update.table, update.set, update.where, update.sequence
            )

    def test_same_batch_again_changes_nothing(self, graph: Graph) -> None:
        """A batch that comes twice emits nothing, changes nothing and gets the same owners."""
        journey = Journey(graph)
        batch = (
            event("a", 1, "d1"),
            event("b", 2, "d1", user="u1", email="a@example.com", traits={"plan": "pro"}),
            event("c", 3, "d1"),
            event("d", 4, "d2", email="a@example.com"),
            event("e", 5, "d2", user="u2", email="a@example.com"),
            event("f", 6, None, user="u3", previous="u2"),
        )
        first = journey.take(*batch)
        journey.deliver()
        before = _contents(graph)
        again = journey.take(*batch)

        assert again.owners == first.owners
        assert (again.updates, again.claims, again.links, again.conflicts) == (0, 0, 0, 0)
        assert drain(graph) == []
        assert _contents(graph) == before

    def test_claim_that_comes_late_supersedes(self, graph: Graph) -> None:
        """A claim that arrives out of order takes the rows that it should have had."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 5, "d1"), event("c", 8, "d1"))
        journey.take(event("last", 9, "d1", user="u2"))
        first = journey.deliver()
        taken = journey.owners()
        journey.take(event("late", 4, "d1", user="u1"))
        second = journey.deliver()

        assert {taken[m] for m in "abc"} == {"u2"}
        assert journey.owners() == {"a": "u1", "b": "u1", "c": "u1", "last": "u2", "late": "u1"}
        assert max(u.sequence for u in first) < min(u.sequence for u in second)

    def test_claim_takes_only_what_changes_hands(self, graph: Graph) -> None:
        """A new owner's update touches its own span, and not the one of the owner before."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c1", 2, "d1", user="u1"), event("b", 6, "d1"))
        journey.deliver()
        journey.take(event("c2", 5, "d1", user="u2"))
        updates = journey.deliver()

        assert journey.owners() == {"a": "u1", "c1": "u1", "b": "u2", "c2": "u2"}
        assert {message_id for message_id, _ in _refs(updates)} <= {"b"}
        assert all(
            criterion.start >= moment(at(5))
            for update in updates
            for criterion in update.where
            if isinstance(criterion, Between)
        )

    def test_cut_and_order_of_batches_do_not_matter(self, graph: Graph) -> None:
        """Every order of arrival, one by one, in halves or at once, ends with the same rows."""
        events = (
            event("a", 1, "d1"),
            event("c1", 2, "d1", user="u1"),
            event("b", 3, "d1"),
            event("c2", 4, "d1", user="u2"),
        )
        found = {}
        for number, order in enumerate(permutations(events)):
            for size in (1, 2, 4):
                journey = Journey(graph, Rules(workspace=f"w{number}-{size}"))
                for start in range(0, len(order), size):
                    journey.take(*order[start : start + size])
                journey.deliver()
                arrival = tuple(e.message_id for e in order)
                found[arrival, size] = journey.owners()

        expected = {"a": "u1", "c1": "u1", "b": "u1", "c2": "u2"}
        assert {key: owners for key, owners in found.items() if owners != expected} == {}

    def test_policies_over_a_long_timeline(self, graph: Graph) -> None:
        """Claims far away in a long timeline count for each policy as if all were read."""
        expected = {
            Policy.DEVICE_SPLIT: "u20",
            Policy.FIRST_CLAIM: "u1",
            Policy.LAST_LOGIN: "u39",
            Policy.SINCE_LAST_IDENTIFY: "u21",
        }
        found = {}
        for policy in Policy:
            rules = Rules(workspace=policy, attribution=AttributionRules(policy=policy))
            journey = Journey(graph, rules)
            journey.take(event("early", 20.5, "d1"))
            for number in (30, 1, 20, 39, 21, 10):
                journey.take(event(f"c{number}", number, "d1", user=f"u{number}"))
            late = journey.take(event("late", 20.5, "d1"))
            journey.deliver()
            owner = late.owners[0]
            found[policy] = (journey.owners()["early"], None if owner is None else owner.id)

        assert found == {policy: (owner, owner) for policy, owner in expected.items()}

    def test_two_recognizers_share_a_graph(self, graph: Graph, reopen: Callable[[], Graph]) -> None:
        """What one recognizer saw, another one knows that has a graph object of its own."""
        one, other = Journey(graph), Journey(reopen())
        one.take(event("a", 1, "d1"))
        claimed = other.take(event("claim", 2, "d1", user="u1"))
        stamped = one.take(event("b", 3, "d1"))
        one.deliver()

        assert claimed.updates == 1
        assert stamped.owners == (Owner("u1"),)
        assert one.owners() == {"a": "u1", "b": "u1"}

    def test_workers_at_the_same_time(self, graph: Graph, reopen: Callable[[], Graph]) -> None:
        """Workers that take overlapping batches at the same time end with the right rows."""
        workers, rounds = 4, 6
        journeys = [Journey(reopen()) for _ in range(workers)]

        def work(worker: int) -> list[tuple[int, Recognition]]:
            found = []
            for number in range(rounds):
                batch = [
                    event(f"a{number}-{worker}", number + worker / 10, f"d{number}"),
                    event(f"s{number}", number + 0.5, "shared"),
                    event(f"c{number}", number + 0.8, f"d{number}", user=f"u{number}"),
                    event(f"l{worker}-{number}", 20, f"d{number}", email=f"{number}@example.com"),
                ]
                found.append((worker, _insist(journeys[worker].recognizer, batch)))
            return found

        with ThreadPoolExecutor(workers) as pool:
            for found in pool.map(work, range(workers)):
                for worker, done in found:
                    journeys[0].keep(done)
                    journeys[worker].recognizer.flushed(done.receipt)
        journeys[0].take(event("claim", rounds, "shared", user="u9"))
        journeys[0].deliver()
        owners = journeys[0].owners()

        assert {m: o for m, o in owners.items() if m[0] == "a"} == {
            f"a{number}-{worker}": f"u{number}"
            for number in range(rounds)
            for worker in range(workers)
        }
        assert {o for m, o in owners.items() if m[0] == "s"} == {"u9"}
        assert (graph.stats().claims, graph.stats().persons) == (
            rounds * (1 + workers) + 1,
            2 * rounds + 1,
        )

    def test_workspaces_are_apart(self, graph: Graph) -> None:
        """The same device and user in two workspaces have nothing to do with each other."""
        one, other = (Journey(graph, Rules(workspace=name)) for name in ("w1", "w2"))
        for journey in (one, other):
            journey.take(event("a", 1, "d1"))
        other.take(event("x", 1, None, user="u1", email="a@example.com"))
        one.take(event("claim", 2, "d1", email="a@example.com"))
        updates = [delivery.update for delivery in drain(graph)]
        after = other.take(event("b", 3, "d1"))
        one.recognizer.forget(Identifier("user_id", "u1"), at(9))

        assert [update.workspace for update in updates] == ["w1"]
        assert updates[0].set == {"user_id": "a@example.com"}
        assert after.owners == (None,)
        assert other.recognizer.explain(Identifier("user_id", "u1")).found
        assert not other.recognizer.explain("claim").found
        assert not one.recognizer.explain("x").found
        assert other.recognizer.explain(Identifier("anonymous_id", "d1")).claims == ()

    # Persons -----------------------------------------------------------------------------------

    def test_alias_joins_two_users(self, graph: Graph) -> None:
        """After an alias, the rows of both users carry the id that was seen first."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c1", 2, "d1", user="u1"))
        journey.take(event("b", 3, "d2"), event("c2", 4, "d2", user="u2"))
        journey.deliver()
        apart = journey.owners()["b"]
        done = journey.take(event("alias", 5, None, user="u2", previous="u1"))
        journey.deliver()

        assert apart == "u2"
        assert (done.links, done.conflicts) == (1, 0)
        assert journey.owners()["a"] == journey.owners()["b"] == "u1"
        assert journey.take(event("d", 6, "d2")).owners == (Owner("u1"),)

    def test_alias_may_name_a_device(self, graph: Graph) -> None:
        """An alias whose previous id is an anonymous id claims that device."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"))
        journey.take(event("alias", 2, None, user="u1", previous="d1"))
        journey.deliver()

        assert journey.owners()["a"] == "u1"

    def test_links_reach_through_others(self, graph: Graph) -> None:
        """User, email and phone that were never seen on one event are one person all the same."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", phone="5551112222"))
        journey.take(event("b", 3, None, user="u1", email="A@example.com"))
        journey.take(event("d", 4, None, email="a@example.com", phone="5551112222"))
        journey.deliver()

        assert journey.owners() == {"a": "u1", "b": "u1", "c": "u1", "d": "u1"}
        assert graph.stats().persons == 1

    def test_second_user_is_a_conflict(self, graph: Graph) -> None:
        """A link that would give a person two user ids is refused and counted, never a merge."""
        journey = Journey(graph)
        journey.take(event("a", 1, None, user="u1", email="a@example.com"))
        done = journey.take(event("b", 2, "d2", user="u2", email="a@example.com"))
        journey.take(event("c", 3, "d3", email="a@example.com"))
        owners = journey.take(event("e", 4, "d2"), event("f", 4, "d3")).owners

        assert (done.conflicts, graph.stats().conflicts) == (1, 1)
        assert done.owners == (Owner("u2"),)
        assert owners == (Owner("u2"), Owner("u1"))

    def test_earlier_link_wins_when_it_comes_late(self, graph: Graph) -> None:
        """Which of two links holds is decided by their times, not by their arrival."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1", email="a@example.com"))
        journey.take(event("second", 9, None, user="u2", email="a@example.com"))
        journey.deliver()
        before = journey.owners()["a"]
        journey.take(event("first", 8, None, user="u1", email="a@example.com"))
        journey.deliver()

        assert before == "u2"
        assert (journey.owners()["a"], journey.owners()["b"]) == ("u1", "u1")

    def test_persons_have_a_limit(self, graph: Graph) -> None:
        """A link beyond the limit of a person is refused and counted, and the rest goes on."""
        rules = Rules(identity=IdentityRules(max_identifiers=2))
        journey = Journey(graph, rules)
        journey.take(event("a", 1, None, user="u1", email="a@example.com"))
        done = journey.take(event("b", 2, "d1", email="a@example.com", phone="5551112222"))
        journey.take(event("c", 3, "d2", phone="5551112222"))
        owners = journey.take(event("d", 4, "d1"), event("e", 4, "d2")).owners

        assert (done.conflicts, graph.stats().conflicts) == (1, 1)
        assert owners == (Owner("u1"), Owner("5551112222"))

    def test_new_canonical_id_updates_the_rows(self, graph: Graph) -> None:
        """When a person gets a user id, the rows that hold the email are updated to it."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1", email="a@example.com"))
        journey.deliver()
        before = journey.owners()
        done = journey.take(event("c", 3, None, user="u1", email="a@example.com"))
        journey.deliver()

        assert before == {"a": "a@example.com", "b": "a@example.com"}
        assert done.updates > 0
        assert journey.owners() == {"a": "u1", "b": "u1", "c": "u1"}

    def test_traits_of_the_owner_are_kept_by_type(self, graph: Graph) -> None:
        """The latest traits come back as they were: text, integer, float and boolean."""
        names = ("plan", "age", "score", "vip", "digits")
        journey = Journey(graph, Rules(traits=names))
        values: dict[str, Scalar] = {
            "plan": "pro", "age": 2**63 - 1, "score": 0.5, "vip": True, "digits": "007",
        }  # fmt: skip
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1", traits=values))
        journey.take(event("old", 1.5, None, user="u1", traits={"plan": "free", "vip": False}))
        journey.deliver()
        owner = journey.take(event("b", 3, "d1")).owners[0]
        row = journey.tables["events"]["a"]

        assert owner is not None
        found = dict(zip(names, owner.traits, strict=True))
        assert [(found[name], type(found[name])) for name in names] == [
            (value, type(value)) for value in values.values()
        ]
        assert {name: row[f"context_traits_{name}"] for name in names} == values

    # Undo --------------------------------------------------------------------------------------

    def test_unlink_parts_identifiers_for_good(self, graph: Graph) -> None:
        """Unlinked identifiers give their rows back and are not joined by what comes later."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1", email="a@example.com"))
        journey.take(event("link", 3, None, user="u1", email="a@example.com"))
        journey.deliver()
        before = journey.owners()["a"]
        emitted = journey.recognizer.unlink(
            Identifier("user_id", "u1"), Identifier("email", "A@example.com ")
        )
        journey.deliver()
        parted = journey.owners()["a"]
        journey.take(event("again", 4, None, user="u1", email="a@example.com"))
        journey.take(event("earlier", 0, None, user="u1", email="a@example.com"))
        later = journey.take(event("c", 5, "d1"))
        journey.deliver()

        assert (before, parted) == ("u1", "a@example.com")
        assert emitted > 0
        assert later.owners == (Owner("a@example.com"),)
        assert journey.owners()["a"] == "a@example.com"

    def test_unlink_takes_a_device_for_good(self, graph: Graph) -> None:
        """A device that is taken from a user falls back, and that user never claims it again."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"))
        journey.deliver()
        before = journey.owners()["a"]
        emitted = journey.recognizer.unlink(
            Identifier("anonymous_id", "d1"), Identifier("user_id", "u1")
        )
        journey.deliver()
        taken = journey.owners()["a"]
        journey.take(event("again", 3, "d1", user="u1"))
        later = journey.take(event("b", 4, "d1"))
        other = journey.take(event("else", 5, "d1", user="u2"), event("d", 6, "d1"))
        journey.deliver()

        assert (before, taken) == ("u1", None)
        assert emitted > 0
        assert later.owners == (None,)
        assert other.owners[1] == Owner("u2")
        assert journey.owners() == {
            "a": "u2", "c": "u1", "again": "u1", "b": "u2", "else": "u2", "d": "u2",
        }  # fmt: skip

    def test_unlink_may_come_before_what_it_parts(self, graph: Graph) -> None:
        """Identifiers and devices that are parted before they were ever seen stay apart."""
        journey = Journey(graph)
        user, email = Identifier("user_id", "u1"), Identifier("email", "a@example.com")
        emitted = journey.recognizer.unlink(user, email)
        emitted += journey.recognizer.unlink(Identifier("anonymous_id", "d1"), user)
        done = journey.take(
            event("a", 1, "d1"),
            event("b", 2, "d1", user="u1"),
            event("c", 3, "d2", user="u1", email="a@example.com"),
            event("e", 4, "d3", email="a@example.com"),
        )
        owners = journey.take(event("f", 5, "d1"), event("g", 5, "d2"), event("h", 5, "d3")).owners

        assert emitted == 0
        assert done.owners[0] is None
        assert owners == (None, Owner("u1"), Owner("a@example.com"))

    def test_release_takes_a_device_from_everybody(self, graph: Graph) -> None:
        """A released device is nobody's up to the moment, and the next login owns what follows."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"), event("b", 3, "d1"))
        journey.deliver()
        before = journey.owners()
        emitted = journey.recognizer.release("d1", at(10))
        journey.deliver()
        released = journey.owners()
        within = journey.take(event("within", 5, "d1"))
        journey.take(event("after", 15, "d1"), event("next", 20, "d1", user="u2"))
        journey.deliver()

        assert (before["a"], before["b"]) == ("u1", "u1")
        assert emitted > 0
        assert released == {"a": None, "c": "u1", "b": None}
        assert within.owners == (None,)
        assert journey.owners() == {
            "a": None, "c": "u1", "b": None, "within": None, "after": "u2", "next": "u2",
        }  # fmt: skip

    def test_released_device_stays_released(self, graph: Graph) -> None:
        """A login from before the release that arrives after it takes nothing back."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 5, "d1"), event("x", 5, "d2"))
        journey.take(event("c", 2, "d1", user="u1"))
        journey.recognizer.release("d1", at(10))
        journey.recognizer.release("d2", at(10))
        done = journey.take(event("late", 4, "d1", user="u2"), event("later", 4, "d2", user="u2"))
        stamped = journey.take(event("e", 6, "d1"), event("f", 6, "d2"))
        journey.deliver()
        owners = journey.owners()

        assert done.owners == (Owner("u2"), Owner("u2"))
        assert stamped.owners == (None, None)
        assert [owners[message_id] for message_id in "abx"] == [None, None, None]

    def test_forget_empties_the_rows(self, graph: Graph) -> None:
        """Recognised rows of a forgotten person become unknown; those that name it stay."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1", email="a@example.com"))
        journey.take(event("c", 3, "d1", user="u1", email="a@example.com"), event("e", 4, "d1"))
        journey.deliver()
        before = journey.owners()
        emitted = journey.recognizer.forget(Identifier("email", "A@example.com"), at(10))
        journey.deliver()

        assert before == {"a": "u1", "b": "u1", "c": "u1", "e": "u1"}
        assert emitted > 0
        assert journey.owners() == {"a": None, "b": None, "c": "u1", "e": None}
        assert (graph.stats().identifiers, graph.stats().links) == (0, 0)

    def test_forgotten_rows_go_to_nobody_else(self, graph: Graph) -> None:
        """The next person of the device gets what follows the forgotten one, and nothing of it."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"), event("b", 3, "d1"))
        journey.recognizer.forget(Identifier("user_id", "u1"), at(10))
        journey.take(event("late", 4, "d1"))
        journey.take(event("after", 15, "d1"), event("next", 20, "d1", user="u2"))
        journey.deliver()

        assert journey.owners() == {
            "a": None, "c": "u1", "b": None, "late": None, "after": "u2", "next": "u2",
        }  # fmt: skip

    def test_late_events_stay_forgotten(self, graph: Graph) -> None:
        """What a forgotten person did, and arrives later, brings nobody back."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"))
        journey.recognizer.forget(Identifier("user_id", "u1"), at(10))
        done = journey.take(
            event("again", 5, "d1", user="u1"),
            event("new", 6, "d2", user="u1", email="a@example.com"),
            event("b", 7, "d1"),
            event("e", 7, "d2"),
        )
        journey.deliver()

        assert done.owners == (None, None, None, None)
        assert journey.owners()["a"] is None
        assert graph.stats().identifiers == 0
        assert not journey.recognizer.explain(Identifier("user_id", "u1")).found
        assert not journey.recognizer.explain(Identifier("email", "a@example.com")).found

    def test_forgotten_person_may_come_back(self, graph: Graph) -> None:
        """Who comes back after it was forgotten is a new person like any other."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1", email="a@example.com"))
        journey.recognizer.forget(Identifier("user_id", "u1"), at(10))
        owners = []
        for number in range(20, 23):
            done = journey.take(
                event(f"a{number}", number, "d1"),
                event(f"c{number}", number + 0.5, "d1", user="u1", email="a@example.com"),
            )
            owners.append(done.owners[1])
        journey.deliver()
        rows = journey.owners()

        assert owners == [Owner("u1")] * 3
        assert (rows["a"], rows["a20"], rows["a22"]) == (None, "u1", "u1")
        assert (graph.stats().identifiers, graph.stats().persons) == (2, 1)

    def test_alias_brings_no_forgotten_id_back(self, graph: Graph) -> None:
        """An alias from before, that arrives after, makes nobody of a forgotten previous id."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"))
        journey.recognizer.forget(Identifier("user_id", "u1"), at(10))
        done = journey.take(event("alias", 5, None, user="u2", previous="u1"))
        journey.deliver()

        assert done.owners == (Owner("u2"),)
        assert journey.owners()["a"] is None
        assert graph.stats().identifiers == 1
        assert not journey.recognizer.explain(Identifier("user_id", "u1")).found

    def test_forget_before_anything_was_seen(self, graph: Graph) -> None:
        """A person that is forgotten before its first event arrives never comes to be."""
        journey = Journey(graph)
        emitted = journey.recognizer.forget(Identifier("user_id", "u1"), at(10))
        done = journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"))

        assert emitted == 0
        assert done.owners == (None, None)
        assert graph.stats().identifiers == 0

    def test_nothing_of_a_forgotten_person_is_left(self, graph: Graph) -> None:
        """No explanation holds a value of a forgotten person."""
        journey = Journey(graph)
        secrets = ("forget-me", "forget-me@example.com", "5551112222")
        user, email, phone = secrets
        journey.take(event("a", 1, "d1"), event("b", 2, "d1", user=user, email=email.title()))
        journey.take(event("c", 3, "d2", email=email, phone=phone), event("d", 4, "d2"))
        journey.take(event("e", 5, "d2", user="u2", phone=phone))
        subjects: list[Identifier | str] = [
            Identifier("anonymous_id", "d1"), Identifier("anonymous_id", "d2"),
            Identifier("user_id", user), Identifier("email", email), Identifier("phone", phone),
            Identifier("user_id", "u2"), *"abcde",
        ]  # fmt: skip
        told = [str(journey.recognizer.explain(subject)).lower() for subject in subjects]
        journey.recognizer.forget(Identifier("user_id", user), at(10))
        left = [str(journey.recognizer.explain(subject)).lower() for subject in subjects]

        for secret in secrets:
            assert any(secret in text for text in told)
            assert [text for text in left if secret in text] == []

    # References and tables ---------------------------------------------------------------------

    def test_references_say_which_rows(self, graph: Graph) -> None:
        """With references an update that supersedes names exactly the rows, with their times."""
        journey = Journey(graph)
        journey.take(event("a", 5, "d1"), event("b", 6, "d1"), event("x", 3, "d1"))
        journey.take(event("c2", 9, "d1", user="u2"))
        journey.deliver()
        journey.take(event("c1", 4, "d1", user="u1"))
        updates = journey.deliver()

        assert graph.stats().references == 3
        assert sorted(_refs(updates)) == [
            ("a", moment(at(5))), ("b", moment(at(6))), ("x", moment(at(3))),
        ]  # fmt: skip

    def test_without_references_nothing_is_kept_of_an_event(self, graph: Graph) -> None:
        """References switched off: none is kept, and updates go by device and span alone."""
        rules = Rules(
            target_column="stitched_user_id", default=TableRules(references=References.NONE)
        )
        journey = Journey(graph, rules)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1"))
        journey.take(event("c", 3, "d1", user="u1"))
        updates = journey.deliver()
        journey.take(event("late", 2, "d1", user="u2"))
        updates += journey.deliver()

        assert graph.stats().references == 0
        assert _refs(updates) == []
        assert {update.expected_rows for update in updates} == {None}
        assert journey.owners() == {"a": "u2", "b": "u2", "c": "u1", "late": "u2"}

    def test_with_days_nothing_else_is_kept_of_an_event(self, graph: Graph) -> None:
        """Days instead of references: updates go by device and by the days that have rows."""
        journey = Journey(graph, _DAYS)
        for number in (-1, 0, 1, 5):
            journey.take(*(event(f"{part}{number}", _midday(number), "d1") for part in "ab"))
        journey.take(event("last", _midday(5) + _HALF_DAY - 1e-6, "d1"))
        journey.take(event("c2", _midday(9), "d1", user="u2"))
        first = journey.deliver()
        taken = journey.owners()
        journey.take(event("c1", _midday(0) + 60, "d1", user="u1"))
        second = journey.deliver()
        owners = journey.owners()

        assert graph.stats().references == 0
        assert _refs(first + second) == []
        assert {update.expected_rows for update in first + second} == {None}
        assert all(Equals(column="anonymous_id", value="d1") in u.where for u in first + second)
        assert _days(first) == {-1, 0, 1, 5}
        assert _days(second) == {-1, 0, 1, 5}
        assert {m for m, owner in taken.items() if owner != "u2"} == set()
        assert {m for m, owner in owners.items() if owner != "u1"} == {"c2"}

    def test_with_days_only_rows_cause_updates(self, graph: Graph) -> None:
        """With days kept, a claim of a device without rows, or far from them, sends nothing."""
        journey = Journey(graph, _DAYS)
        journey.take(event("a", _midday(0), "d1"), event("x", _midday(3), "d3"))
        journey.take(event("c1", _midday(1), "d1", user="u1"))
        journey.deliver()
        empty = journey.take(event("c2", _midday(1), "d2", user="u1"))
        far = journey.take(event("c3", _midday(5), "d1", user="u2"))
        again = journey.take(event("c2", _midday(1), "d2", user="u1"), event("a", _midday(0), "d1"))
        late = journey.take(event("b", _midday(6), "d1"))

        assert (empty.claims, far.claims) == (1, 1)
        assert [done.updates for done in (empty, far, again, late)] == [0, 0, 0, 0]
        assert drain(graph) == []
        assert late.owners == (Owner("u2"),)

    def test_expire_drops_days(self, graph: Graph) -> None:
        """Days before the moment go as references do, and no update names them any more."""
        journey = Journey(graph, _DAYS)
        journey.take(*(event(f"m{n}", _midday(n), "d1") for n in range(4)))
        dropped = graph.expire(at(_midday(2)))
        again = graph.expire(at(_midday(2)))
        journey.take(event("claim", _midday(4), "d1", user="u1"))

        assert (dropped, again) == (2, 0)
        assert _days(journey.deliver()) == {2, 3}

    def test_every_table_of_an_event_is_updated(self, graph: Graph) -> None:
        """A track that lies in two tables is updated in both, a page in its own."""
        journey = Journey(graph, Rules(layout=layout_named("segment")))
        journey.take(event("a", 1, "d1", name="Signed Up"), event("b", 2, "d1", type="page"))
        journey.take(event("c", 3, "d1", user="u1", type="identify"))
        first = journey.deliver()
        journey.take(event("late", 0.5, "d1", user="u2", type="identify"))
        journey.deliver()
        owned = {table: journey.owners(table) for table in ("tracks", "Signed Up", "pages")}

        assert sorted(update.table for update in first) == ["Signed Up", "pages", "tracks"]
        assert owned == {"tracks": {"a": "u2"}, "Signed Up": {"a": "u2"}, "pages": {"b": "u2"}}

    def test_ids_of_all_shapes(self, graph: Graph) -> None:
        """Ids come back as they went in, whatever they look like: messages, devices, users."""
        journey = Journey(graph)
        journey.take(*(event(m, n, "d1") for n, m in enumerate(HOSTILE_IDS, start=1)))
        journey.take(event("last", 100, "d1", user="u1"))
        journey.deliver()
        journey.take(event("first", 0, "d1", user="u2"))
        named = _refs(journey.deliver())
        users = [f"user {m}" for m in HOSTILE_IDS]
        for n, (device, user) in enumerate(zip(HOSTILE_IDS, users, strict=True)):
            journey.take(event(f"row {n}", 1, device))
            journey.take(event(f"claim {device}", 2, device, user=user))
        journey.deliver()
        done = journey.take(*(event(f"again {n}", 3, m) for n, m in enumerate(HOSTILE_IDS)))
        owners = journey.owners()
        told = [journey.recognizer.explain(f"claim {m}").owner for m in HOSTILE_IDS]

        assert sorted(named) == sorted(
            (m, moment(at(n))) for n, m in enumerate(HOSTILE_IDS, start=1)
        )
        assert [owners[f"row {n}"] for n in range(len(users))] == users
        assert done.owners == tuple(map(Owner, users))
        assert told == users

    def test_times_are_kept_to_the_microsecond(self, graph: Graph) -> None:
        """Events one microsecond apart have different owners, and bounds are that exact."""
        journey = Journey(graph)
        step = 0.000_001
        rows = {f"m{n}": 1 + n * step for n in range(4)}
        journey.take(*(event(m, seconds, "d1") for m, seconds in rows.items()))
        journey.take(event("c2", 1 + 2 * step, "d1", user="u2"))
        journey.deliver()
        journey.take(event("c1", 1 + 1 * step, "d1", user="u1"))
        updates = journey.deliver()

        assert journey.owners() == {
            "m0": "u1", "m1": "u1", "m2": "u2", "m3": "u2", "c2": "u2", "c1": "u1",
        }  # fmt: skip
        assert sorted(_refs(updates)) == [("m0", moment(at(1))), ("m1", moment(at(1) + 1))]

    def test_references_of_many_days(self, graph: Graph) -> None:
        """Rows of one device on many days, to the last microsecond of a day, are all found."""
        journey = Journey(graph, Rules(attribution=AttributionRules(lookback=400 * DAY)))
        midnight = (DAY - START % DAY) / SECOND
        step = 1 / SECOND
        times = [midnight + day * 86_400 + part for day in range(-3, 3) for part in (-step, 0)]
        journey.take(*(event(f"m{n}", seconds, "d1") for n, seconds in enumerate(times)))
        journey.take(event("c2", midnight + 9 * 86_400, "d1", user="u2"))
        journey.deliver()
        journey.take(event("c1", midnight, "d1", user="u1"))
        updates = journey.deliver()
        owners = journey.owners()

        assert sorted(_refs(updates)) == sorted(
            (f"m{n}", moment(at(seconds))) for n, seconds in enumerate(times)
        )
        assert {owners[f"m{n}"] for n in range(len(times))} == {"u1"}

    def test_expire_drops_old_days_only(self, graph: Graph) -> None:
        """References of whole days before the moment go, all others stay; it says how many days."""
        journey = Journey(graph)
        day = 86_400
        journey.take(*(event(f"m{n}", n * day, "d1") for n in range(4)))
        journey.take(event("x", day, "d2"))
        dropped = graph.expire(at(2 * day))
        left = graph.stats().references
        again = graph.expire(at(2 * day))
        journey.take(event("claim", 4 * day, "d1", user="u1"))
        update = _only([delivery.update for delivery in drain(graph)])

        assert (dropped, left, again) == (2, 2, 0)
        assert update.expected_rows == 2

    def test_device_with_very_many_events(self, graph: Graph) -> None:
        """A device of 30,000 events is updated completely, by updates of bounded size."""
        journey = Journey(graph)
        ids = [str(uuid.UUID(int=n * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128))
               for n in range(1, 30_001)]  # fmt: skip
        for start in range(0, len(ids), 5_000):
            part = ids[start : start + 5_000]
            journey.recognizer.process(
                [event(m, 1 + n / 1_000, "kiosk") for n, m in enumerate(part, start=start)]
            )
        journey.recognizer.process([event("c2", 40, "kiosk", user="u2")])
        first = [delivery.update for delivery in drain(graph)]
        journey.recognizer.process([event("c1", 0.5, "kiosk", user="u1")])
        second = [delivery.update for delivery in drain(graph)]
        named = [message_id for message_id, _ in _refs(second)]

        assert sum(update.expected_rows or 0 for update in first) == len(ids)
        assert sorted(named) == sorted(ids)
        assert max(len(update.to_json()) for update in first + second) < MAX_UPDATE

    def test_batch_with_very_many_devices(self, graph: Graph) -> None:
        """A batch of 12,000 devices and users is one call like any other."""
        journey = Journey(graph)
        count = 12_000
        done = journey.recognizer.process(
            [event(f"c{n}", 1, f"d{n}", user=f"u{n}") for n in range(count)]
        )
        after = journey.recognizer.process([event(f"a{n}", 2, f"d{n}") for n in range(count)])

        assert done.claims == count
        assert after.owners == tuple(Owner(f"u{n}") for n in range(count))

    # The outbox --------------------------------------------------------------------------------

    def test_lease_hides_updates(self, graph: Graph, reopen: Callable[[], Graph]) -> None:
        """A leased update is offered to nobody else while the lease lasts."""
        _fill(graph, 3)
        mine = graph.lease_updates(2, 600)
        theirs = reopen().lease_updates(10, 600)

        assert [delivery.attempts for delivery in mine + theirs] == [0, 0, 0]
        assert len(mine) == 2
        assert len({delivery.position for delivery in mine + theirs}) == 3
        assert graph.lease_updates(10, 600) == []
        assert graph.stats().pending_updates == 3

    def test_lease_that_ended_brings_updates_back(self, graph: Graph) -> None:
        """An update whose lease ended without an acknowledgement comes again, and says so."""
        _fill(graph, 1)
        first = graph.lease_updates(10, SHORT_LEASE)
        second = _wait_for_lease(graph)

        assert [(d.position, d.update) for d in second] == [(d.position, d.update) for d in first]
        assert [delivery.attempts for delivery in second] == [1]

    def test_acknowledge_removes_updates(self, graph: Graph) -> None:
        """An acknowledged update is gone, whether its lease ended or not; the others stay."""
        _fill(graph, 3)
        leased = graph.lease_updates(3, SHORT_LEASE)
        graph.acknowledge([leased[0].position, leased[2].position])
        back = _wait_for_lease(graph)

        assert [delivery.position for delivery in back] == [leased[1].position]
        assert graph.stats().pending_updates == 1

    def test_unknown_positions_are_harmless(self, graph: Graph) -> None:
        """Acknowledging or returning what is gone, was never there, or nothing, does nothing."""
        _fill(graph, 2)
        leased = graph.lease_updates(1, 600)
        gone = leased[0].position
        for _ in range(2):
            graph.acknowledge([gone])
        graph.acknowledge([gone + 1_000_000, -1])
        graph.acknowledge([])
        graph.return_updates([gone, gone + 1_000_000], "no reason", dead=False)
        graph.return_updates([gone, gone + 1_000_000], "no reason", dead=True)

        assert graph.dead_updates(10) == []
        assert graph.stats().pending_updates == 1
        assert len(graph.lease_updates(10, 600)) == 1

    def test_returned_updates_come_again(self, graph: Graph) -> None:
        """A returned update is offered again at once, in its old place."""
        _fill(graph, 3)
        leased = graph.lease_updates(2, 600)
        graph.return_updates([leased[0].position], "ConnectionError", dead=False)
        again = graph.lease_updates(10, 600)

        assert [d.update.set["user_id"] for d in again] == ["u0", "u2"]
        assert [delivery.attempts for delivery in again] == [1, 0]
        assert again[0].position == leased[0].position

    def test_dead_updates_are_kept_with_their_reason(self, graph: Graph) -> None:
        """A dead update is never leased again, is listed with its reason, and can be revived."""
        _fill(graph, 3)
        leased = graph.lease_updates(3, SHORT_LEASE)
        reasons = ["the column is too narrow", "there is no table"]
        for delivery, reason in zip(leased, reasons, strict=False):
            graph.return_updates([delivery.position], reason, dead=True)
        living = _wait_for_lease(graph)
        dead = graph.dead_updates(10)
        counted = graph.stats()
        graph.return_updates([leased[1].position], "try again", dead=False)
        revived = graph.lease_updates(10, 600)

        assert [d.position for d in living] == [leased[2].position]
        assert [(d.position, d.update, reason) for d, reason in dead] == [
            (d.position, d.update, reason) for d, reason in zip(leased, reasons, strict=False)
        ]
        assert (counted.pending_updates, counted.dead_updates) == (1, 2)
        assert graph.dead_updates(1) == dead[:1]
        assert [d.position for d in revived] == [leased[1].position]
        assert [d.position for d, _ in graph.dead_updates(10)] == [leased[0].position]

    def test_updates_are_leased_oldest_first(self, graph: Graph) -> None:
        """Leases go by position, as many as were asked for."""
        _fill(graph, 5)
        parts = [graph.lease_updates(2, 600) for _ in range(4)]

        assert [[d.update.set["user_id"] for d in part] for part in parts] == [
            ["u0", "u1"],
            ["u2", "u3"],
            ["u4"],
            [],
        ]

    def test_held_updates_come_again_after_their_time(self, graph: Graph) -> None:
        """Updates that are held after they were applied come again once, and say so."""
        _fill(graph, 3)
        leased = graph.lease_updates(2, 600)
        graph.hold_updates([leased[0].position], SHORT_LEASE, applied=True)
        graph.hold_updates([leased[1].position, 1_000_000], 600, applied=True)
        others = graph.lease_updates(10, 600)
        backlog = graph.backlog()
        back = _wait_for_lease(graph)
        graph.return_updates([back[0].position], "no answer", dead=False)
        again = graph.lease_updates(10, 600)

        assert [(d.update.set["user_id"], d.applied) for d in leased + others] == [
            ("u0", False),
            ("u1", False),
            ("u2", False),
        ]
        assert (backlog.waiting, backlog.held, backlog.dead) == (1, 2, 0)
        assert backlog.oldest == others[0].update.created_at
        assert [(d.position, d.applied) for d in back + again] == [(leased[0].position, True)] * 2

    def test_held_lease_is_longer(self, graph: Graph) -> None:
        """A lease that is held anew ends later than it would have, and its update says nothing."""
        _fill(graph, 2)
        leased = graph.lease_updates(2, SHORT_LEASE)
        graph.hold_updates([leased[0].position], 600, applied=False)
        back = _wait_for_lease(graph)
        graph.hold_updates([leased[0].position], 0, applied=False)
        freed = graph.lease_updates(10, 600)

        assert [(d.position, d.applied) for d in back] == [(leased[1].position, False)]
        assert [(d.position, d.applied) for d in freed] == [(leased[0].position, False)]

    def test_dead_updates_are_not_held(self, graph: Graph) -> None:
        """What is dead or done by now is left alone by a worker that comes late to hold it."""
        _fill(graph, 2)
        leased = graph.lease_updates(2, 600)
        graph.return_updates([leased[0].position], "no such table", dead=True)
        graph.acknowledge([leased[1].position])
        graph.hold_updates([d.position for d in leased], 0, applied=True)

        assert graph.lease_updates(10, 600) == []
        assert [reason for _, reason in graph.dead_updates(10)] == ["no such table"]

    # Destinations ------------------------------------------------------------------------------

    def test_destinations_go_at_their_own_pace(self, graph: Graph) -> None:
        """Each destination gets every update, whatever the others do; then it is gone."""
        graph.add_destination("one")
        graph.add_destination("two")
        _fill(graph, 3)
        first = graph.lease_updates(10, 600, "one")
        graph.acknowledge([d.position for d in first], "one")
        behind = graph.stats().pending_updates
        second = graph.lease_updates(2, 600, "two")
        graph.acknowledge([d.position for d in second], "two")
        nearly = graph.stats().pending_updates, graph.lease_updates(10, 600, "one")
        third = graph.lease_updates(10, 600, "two")
        graph.acknowledge([d.position for d in third], "two")

        assert [d.update for d in first] == [d.update for d in second + third]
        assert len(first) == behind == 3
        assert nearly == (1, [])
        assert graph.stats().pending_updates == 0

    def test_destinations_have_their_own_leases(self, graph: Graph) -> None:
        """A lease, a return, a death and a hold of one destination are nothing to another."""
        graph.add_destination("one")
        graph.add_destination("two")
        _fill(graph, 4)
        a, b, c, d = (delivery.position for delivery in graph.lease_updates(4, 600, "one"))
        graph.return_updates([a], "refused", dead=True, destination="one")
        graph.return_updates([b], "", dead=False, destination="one")
        graph.hold_updates([c], 600, applied=True, destination="one")
        mine = graph.lease_updates(10, 600, "one")
        theirs = graph.lease_updates(10, 600, "two")
        backlogs = [graph.backlog(name) for name in ("one", "two")]
        dead = [
            [delivery.position for delivery, _ in graph.dead_updates(10, name)]
            for name in ("one", "two")
        ]
        counted = graph.stats()
        graph.return_updates([a], "", dead=False, destination="one")
        revived = graph.lease_updates(10, 600, "one")

        assert [(x.position, x.attempts) for x in mine] == [(b, 1)]
        assert [(x.position, x.attempts) for x in theirs] == [(a, 0), (b, 0), (c, 0), (d, 0)]
        assert [(x.waiting, x.held, x.dead) for x in backlogs] == [(2, 1, 1), (4, 0, 0)]
        assert dead == [[a], []]
        assert (counted.pending_updates, counted.dead_updates) == (4, 1)
        assert [x.position for x in revived] == [a]

    def test_destination_added_later_gets_what_is_there(self, graph: Graph) -> None:
        """What is in the outbox when a destination is added is for it too, leased or not."""
        _fill(graph, 3)
        before = graph.lease_updates(2, 600)
        graph.acknowledge([before[0].position])
        graph.add_destination("one")
        first = graph.lease_updates(10, 600, "one")
        graph.acknowledge([d.position for d in first[:1]], "one")
        graph.add_destination("two")
        second = graph.lease_updates(10, 600, "two")

        assert [d.update.set["user_id"] for d in first] == ["u1", "u2"]
        assert [d.update.set["user_id"] for d in second] == ["u2"]

    def test_only_destinations_that_are_registered_are_served(self, graph: Graph) -> None:
        """Nobody takes updates for a name that is not there, or for none beside those that are."""
        _fill(graph, 1)
        with pytest.raises(ConfigurationError, match="one"):
            graph.lease_updates(10, 600, "one")
        graph.add_destination("one")
        with pytest.raises(ConfigurationError, match="one"):
            graph.lease_updates(10, 600)
        with pytest.raises(ConfigurationError):
            graph.add_destination("One.two")

        assert graph.destinations() == {"one": False}
        assert len(graph.lease_updates(10, 600, "one")) == 1

    def test_destination_says_whether_it_was_filled(self, graph: Graph) -> None:
        """Adding it again changes nothing but that it is filled, which it then stays."""
        graph.add_destination("one")
        _fill(graph, 2)
        leased = graph.lease_updates(1, 600, "one")
        graph.add_destination("two", filled=True)
        before = graph.destinations()
        graph.add_destination("one", filled=True)
        graph.add_destination("one")

        assert before == {"one": False, "two": True}
        assert graph.destinations() == {"one": True, "two": True}
        assert len(leased + graph.lease_updates(10, 600, "one")) == 2

    def test_dropped_destination_holds_nothing(self, graph: Graph) -> None:
        """What waited for a destination that is dropped leaves; after the last one all is free."""
        graph.add_destination("one")
        graph.add_destination("two")
        _fill(graph, 3)
        first = graph.lease_updates(2, 600, "one")
        graph.acknowledge([d.position for d in first], "one")
        graph.drop_destination("two")
        graph.drop_destination("two")
        left = graph.stats().pending_updates
        graph.drop_destination("one")

        assert left == 1
        assert graph.destinations() == {}
        assert [d.update.set["user_id"] for d in graph.lease_updates(10, 600)] == ["u2"]

    def test_restate_says_everything_once_more(self, graph: Graph) -> None:
        """Rows that were never told anything, or something else, get the owners of now by it."""
        without = TableRules(references=References.NONE)
        told = []
        for rules in (
            Rules(workspace="w1"),
            replace(_DAYS, workspace="w2"),
            Rules(workspace="w3", target_column="stitched_user_id", default=without),
        ):
            journey = Journey(graph, rules)
            journey.take(*(event(f"a{n}", n, "d1") for n in range(6)), event("nobody", 1, "d9"))
            journey.take(event("c1", 2.5, "d1", user="u1"), event("c2", 4.5, "d1", email="e@x.com"))
            journey.take(event("link", 7, user="u2", email="e@x.com"))
            journey.take(event("gone", 1, "d2"), event("c3", 2, "d2", user="u3"))
            journey.recognizer.forget(Identifier("user_id", "u3"), at(100))
            journey.deliver()
            right = journey.owners()
            target = rules.target_of("events")
            for message_id, row in journey.tables["events"].items():
                if message_id.startswith("a"):
                    row[target] = None if message_id < "a3" else "u3"
                elif message_id == "gone":
                    row[target] = "u3"
                elif rules.has_own_column:
                    row[target] = None
            updates = [update for part in graph.restate(rules, size=2) for update in part]
            for update in updates:
                journey.apply(update)
            told.append((right, journey.owners()))
            numbers = [update.sequence for update in updates]
            later = journey.recognizer.process([event("late", 3, "d1", user="u4")])
            following = [delivery.update.sequence for delivery in drain(graph)]

            assert numbers == sorted(set(numbers))
            assert later.updates > 0
            assert min(following) > max(numbers)

        for right, found in told:
            assert found == right
            assert right["nobody"] is right["gone"] is None
            assert {right["a0"], right["a3"], right["a5"]} == {"u1", "u2"}
        assert drain(graph) == []

    # Rows on their way -------------------------------------------------------------------------

    def test_flushed_makes_good_what_happened_in_between(self, graph: Graph) -> None:
        """A claim between stamping and visibility becomes an update of exactly those rows."""
        one, other = Journey(graph), Journey(graph)
        done = one.recognizer.process([event("a", 1, "d1"), event("x", 1, "d2")])
        other.take(event("claim", 2, "d1", user="u1"))
        for update in other.deliver():
            one.apply(update)
        one.keep(done)
        too_early = one.owners()
        emitted = one.recognizer.flushed(done.receipt)
        update = _only(one.deliver())

        assert too_early == {"a": None, "x": None}
        assert emitted == 1
        assert update.set == {"user_id": "u1"}
        assert update.expected_rows == 1
        assert one.owners() == {"a": "u1", "x": None}

    def test_flushed_replaces_a_stamp_that_is_out_of_date(self, graph: Graph) -> None:
        """Rows that were stamped with one owner, and are another's by now, get an update."""
        one, other = Journey(graph), Journey(graph)
        one.take(event("c1", 1, "d1", user="u1"))
        done = one.recognizer.process([event("a", 5, "d1"), event("b", 3, "d1")])
        other.take(event("c2", 4, "d1", user="u2"))
        for update in other.deliver():
            one.apply(update)
        one.keep(done)
        stale = one.owners()
        one.recognizer.flushed(done.receipt)
        one.deliver()

        assert (stale["a"], stale["b"]) == ("u1", "u1")
        assert (one.owners()["a"], one.owners()["b"]) == ("u2", "u1")

    def test_flushed_says_nothing_when_nothing_changed(self, graph: Graph) -> None:
        """Claims of other devices, and claims that change no owner, cause no update."""
        one, other = Journey(graph), Journey(graph)
        one.take(event("c1", 1, "d1", user="u1"))
        done = one.recognizer.process(
            [event("a", 5, "d1"), event("b", 5, "d2"), event("c", 5, None, user="u2")]
        )
        quiet = one.recognizer.flushed(done.receipt)
        other.take(event("x", 2, "d3"), event("c3", 3, "d3", user="u3"))
        other.take(event("c4", 6, "d1", user="u1"))
        other.deliver()
        emitted = one.recognizer.flushed(done.receipt)

        assert (quiet, emitted) == (0, 0)
        assert drain(graph) == []

    # The whole ---------------------------------------------------------------------------------

    def test_decision_that_fails_leaves_nothing_behind(self, graph: Graph) -> None:
        """
        After an exception inside a decision nothing of it is there.

        Where its rows are may be known by then: the batch will be sent again. A graph that cannot
        undo refuses to go on instead, and says that something was written.
        """
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"))
        before = _contents(graph)
        claim = event("claim", 2, "d1", user="u1", email="a@example.com")
        mistaken = Recognizer(graph, Rules(layout=_FailingColumns(name="mistaken")))
        with pytest.raises(ZeroDivisionError):
            mistaken.process([claim, event("b", 3, "d2")])
        refusal: GraphError | None = None
        try:
            after = journey.take(claim)
        except GraphError as error:
            refusal = error

        if refusal is not None:
            assert refusal.written
            return
        counted = _contents(graph)

        assert after.claims == after.links == 1
        assert after.updates == 1
        assert len(drain(graph)) == 1
        assert (counted.claims, counted.identifiers, counted.links) == (1, 2, 1)
        assert counted.references - before.references in (0, 1)
        assert counted.anonymous_ids - before.anonymous_ids in (0, 1)

    def test_refused_call_changes_nothing(self, graph: Graph) -> None:
        """A call with wrong arguments is refused before anything is written, and work goes on."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("c", 2, "d1", user="u1"))
        before = _contents(graph)
        device = Identifier("anonymous_id", "d1")
        with pytest.raises(InputError):
            journey.recognizer.unlink(device, Identifier("anonymous_id", "d2"))
        with pytest.raises(InputError):
            journey.recognizer.unlink(Identifier("user_id", "u1"), Identifier("user_id", "u1"))
        with pytest.raises(InputError):
            journey.recognizer.forget(device)

        assert _contents(graph) == before
        assert journey.take(event("b", 3, "d1")).owners == (Owner("u1"),)

    def test_stats_count_what_is_there(self, graph: Graph) -> None:
        """Every number of the statistics is the number of such things, over all workspaces."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1"), event("x", 1, "d2"))
        journey.take(event("c", 3, "d1", user="u1", email="a@example.com"))
        journey.take(event("e", 4, "d3", user="u2", email="a@example.com"))
        Journey(graph, Rules(workspace="w2")).take(event("a", 1, "d1"), event("c", 2, user="u1"))
        position = graph.lease_updates(1, 600)[0].position
        pending = graph.stats().pending_updates
        graph.return_updates([position], "refused", dead=True)

        assert pending == 1
        assert _contents(graph) == GraphStats(
            anonymous_ids=4,
            identifiers=4,
            persons=3,
            claims=2,
            links=1,
            conflicts=1,
            references=4,
            pending_updates=0,
            dead_updates=1,
            bytes=0,
        )

    def test_explain_says_why(self, graph: Graph) -> None:
        """An explanation names the owner, the claim, the link and the spans that decided."""
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("b", 2, "d1", email="Ann@example.com"))
        journey.take(event("c", 3, None, user="u1", email="ann@example.com"))
        explain = journey.recognizer.explain
        row, mail = explain("a"), explain(Identifier("email", "ANN@example.com"))
        device, absent = explain(Identifier("anonymous_id", "d1")), explain("nothing")

        assert (row.found, row.owner, mail.owner, device.owner) == (True, "u1", "u1", "u1")
        assert any("message b" in reason for reason in row.because)
        assert [(claim.message_id, claim.time) for claim in row.claims] == [("b", at(2))]
        assert [(link.message_id, link.kind, link.refused) for link in mail.links] == [
            ("c", "seen", "")
        ]
        assert mail.identifiers == (
            (Identifier("email", "ann@example.com"), "Ann@example.com"),
            (Identifier("user_id", "u1"), "u1"),
        )
        assert {span.owner for span in device.spans} <= {None, "u1"}
        assert (absent.found, absent.owner) == (False, None)

    def test_rehearsal_decides_the_same_and_writes_nothing(self, graph: Graph) -> None:
        """A rehearsal gives the owners and updates that the graph would, which never sees them."""
        batch = (
            event("late", 0.5, "d1", user="u2"),
            event("b", 4, "d1"),
            event("x2", 4, "d2"),
            event("new", 5, "d9"),
            event("alias", 6, None, user="u3", previous="u1"),
            event("c9", 7, "d9", user="u4", email="a@example.com"),
        )
        journey = Journey(graph)
        journey.take(event("a", 1, "d1"), event("x1", 1, "d2"))
        journey.take(event("c", 2, "d1", user="u1", email="a@example.com"))
        journey.take(event("e", 3, None, user="u3"))
        drain(graph)
        before = _contents(graph)
        rehearsal = graph.rehearse()
        rehearsed = Recognizer(rehearsal).process(batch)
        planned = [delivery.update for delivery in drain(rehearsal)]
        after = _contents(graph)
        rehearsal.close()
        done = journey.recognizer.process(batch)
        real = [delivery.update for delivery in drain(graph)]

        assert after == before
        assert rehearsed.owners == done.owners
        assert [update.id for update in planned] == [update.id for update in real]
        assert len(real) > 1

    def test_close_twice(self, graph: Graph, reopen: Callable[[], Graph]) -> None:
        """Closing a graph a second time does nothing, to the graph or to another object of it."""
        other = reopen()
        Journey(other).take(event("a", 1, "d1"))
        graph.close()
        graph.close()

        if other is not graph:
            assert other.stats().references == 1


def _fill(graph: Graph, count: int) -> None:
    """Leave updates in the outbox: one for each of so many users, in their order."""
    journey = Journey(graph)
    for number in range(count):
        journey.take(event(f"a{number}", 1, f"d{number}"))
        journey.take(event(f"c{number}", 2, f"d{number}", user=f"u{number}"))
