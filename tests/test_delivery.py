"""The loop that serves several destinations: real outboxes, real databases, real faults."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from oracle import make_event
from recognition.delivery import CIRCUIT_OPENS, Channel, Deliverer, Destination, Served
from recognition.errors import (
    GraphUnavailableError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
)
from recognition.events import Event
from recognition.graph import Graph, open_graph
from recognition.messages import UpdateByCriteria
from recognition.planner import Plan, Step, plan_updates
from recognition.recognizer import Recognizer
from recognition.rules import Rules, Supersede, TableRules
from recognition.sinks import Applied, Capabilities, Sink, open_sink

SECOND = 1_000_000
START = 1_780_000_000 * SECOND
RULES = Rules(stamps=False)
VERSIONED = Rules(stamps=False, default=TableRules(supersede=Supersede.VERSION))

TABLE = (
    "CREATE TABLE events (message_id TEXT PRIMARY KEY, anonymous_id TEXT, user_id TEXT,"
    " timestamp TIMESTAMP)"
)


def journey(visitors: int, rows: int = 3) -> list[Event]:
    """Each visitor is anonymous for some events, and then is somebody."""
    events = [
        make_event(f"m{n}-{k}", START + (10 * n + k) * SECOND, f"d{n}")
        for n in range(visitors)
        for k in range(rows)
    ]
    events += [
        make_event(f"c{n}", START + (10 * n + rows) * SECOND, f"d{n}", user_id=f"u{n}")
        for n in range(visitors)
    ]
    return events


def expected(visitors: int, rows: int = 3) -> dict[str, str]:
    found = {f"m{n}-{k}": f"u{n}" for n in range(visitors) for k in range(rows)}
    return found | {f"c{n}": f"u{n}" for n in range(visitors)}


class Warehouse:
    """A database with the rows as the pipeline writes them, read by its own driver."""

    def __init__(self, folder: Path, name: str = "warehouse", scheme: str = "sqlite") -> None:
        self.path = folder / f"{name}.{scheme}"
        self.url = f"{scheme}:///{self.path}"
        self.scheme = scheme

    @contextmanager
    def connect(self) -> Iterator[Any]:
        if self.scheme == "duckdb":
            with duckdb.connect(str(self.path)) as connection:
                yield connection
        else:
            with closing(sqlite3.connect(self.path, 30, isolation_level=None)) as connection:
                yield connection

    def make(self, *, versioned: bool = False) -> Warehouse:
        with self.connect() as connection:
            connection.execute(TABLE)
            if versioned:
                connection.execute("ALTER TABLE events ADD recognition_version BIGINT")
        return self

    def put(self, events: Sequence[Event]) -> None:
        with self.connect() as connection:
            connection.execute("BEGIN")  # one transaction: disks are slow
            connection.executemany(
                "INSERT INTO events (message_id, anonymous_id, user_id, timestamp)"
                " VALUES (?, ?, ?, ?)",
                [
                    (
                        e.message_id,
                        e.anonymous_id,
                        e.known[0].value if e.known else None,
                        time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(e.time // SECOND)),
                    )
                    for e in events
                ],
            )
            connection.execute("COMMIT")

    def users(self, table: str = "events") -> dict[str, str | None]:
        with self.connect() as connection:
            rows = connection.execute(f'SELECT message_id, user_id FROM "{table}"').fetchall()
            return dict(rows)

    def execute(self, statement: str) -> None:
        with self.connect() as connection:
            connection.execute(statement)

    def sink(self, **options: object) -> Sink:
        return open_sink(self.url, **options)


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        yield graph


class Clock:
    """The time of SQLite's graph and of deliverers; it moves when it is told to, and then alone."""

    def __init__(self) -> None:
        self._moved = 0.0
        self._begun = datetime.now(UTC)

    def move(self, seconds: float) -> None:
        """It is so much later."""
        self._moved += seconds

    def monotonic(self) -> float:
        return self._moved

    def now(self, _: object) -> datetime:
        return self._begun + timedelta(seconds=self._moved)

    def time(self) -> float:
        return self.now(UTC).timestamp()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What is held or leased for some seconds ends when the test moves it, however long that is."""
    clock = Clock()
    ours = SimpleNamespace(time=clock.time, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr("recognition.graph.sqlite.time", ours)
    monkeypatch.setattr("recognition.delivery.time", clock)
    monkeypatch.setattr("recognition.delivery.datetime", clock)
    return clock


@contextmanager
def delivering(deliverer: Deliverer) -> Iterator[threading.Event]:
    """
    A deliverer at work in a thread of its own; stopped, and joined, at the end.

    Whoever sets what this gives stops it before.
    """
    stop = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            deliverer.run(stop)
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(
            lambda: raised or deliverer._graph.destinations().keys() >= deliverer.served.keys()
        )
        yield stop
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert raised == []


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def deliverer_of(graph: Graph, *destinations: Destination, **options: Any) -> Deliverer:
    given = {"every": 0.05, "pauses": (0.05, 0.2), **options}
    return Deliverer(graph, destinations, **given)


class Around:
    """A real sink, and what a test does before it applies."""

    def __init__(self, sink: Sink, before: Callable[[Plan], object]) -> None:
        self._sink = sink
        self._before = before

    @property
    def capabilities(self) -> Capabilities:
        return self._sink.capabilities

    def compile(self, step: Step) -> str:
        return self._sink.compile(step)

    def apply(self, plan: Plan) -> Applied:
        self._before(plan)
        return self._sink.apply(plan)

    def close(self) -> None:
        self._sink.close()


# Destinations ----------------------------------------------------------------------------------


def test_destination_that_is_down_holds_nobody_else(graph: Graph, tmp_path: Path) -> None:
    """While one database is locked another one is served; the first gets all when it is back."""
    down, up = Warehouse(tmp_path, "down").make(), Warehouse(tmp_path, "up", "duckdb").make()
    events = journey(50)
    for warehouse in (down, up):
        warehouse.put(events)
    Recognizer(graph, RULES).process(events)
    deliverer = deliverer_of(
        graph,
        Destination(name="down", sink=down.sink(timeout=0.05)),
        Destination(name="up", sink=up.sink()),
    )
    with closing(sqlite3.connect(down.path, isolation_level=None)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        with delivering(deliverer):
            wait_until(lambda: not graph.backlog("up").waiting)
            wait_until(lambda: deliverer.served["down"].failing >= CIRCUIT_OPENS)
            waiting = graph.backlog("down").waiting
            lock.execute("ROLLBACK")
            wait_until(lambda: not graph.stats().pending_updates)

    assert waiting == 50
    assert up.users() == down.users() == expected(50)
    assert deliverer.served["down"].failing == 0
    assert (deliverer.served["up"].failures, deliverer.served["up"].updates) == (0, 50)


def test_new_destination_is_filled_with_what_the_graph_knows(graph: Graph, tmp_path: Path) -> None:
    """A destination that comes later gets what left the outbox before, and all that is new."""
    first, second = Warehouse(tmp_path, "first").make(), Warehouse(tmp_path, "second").make()
    events = journey(30)
    early, late = events[:-1], events[-1:]
    recognizer = Recognizer(graph, RULES)
    first.put(events)
    one = Destination(name="first", sink=first.sink(), settle=0.1)
    with delivering(deliverer_of(graph, one, rules=RULES)):
        wait_until(lambda: graph.destinations() == {"first": True})
        recognizer.process(early)
        wait_until(lambda: not graph.stats().pending_updates)
    second.put(events)
    second.execute("UPDATE events SET user_id = 'somebody' WHERE message_id = 'm3-1'")
    two = Destination(name="second", sink=second.sink(), settle=0.1)
    deliverer = deliverer_of(graph, one, two, rules=RULES)
    with delivering(deliverer):
        recognizer.process(late)
        wait_until(lambda: graph.destinations() == {"first": True, "second": True})
        wait_until(lambda: not graph.stats().pending_updates)

    assert first.users() == second.users() == expected(30)
    assert deliverer.served["second"].filled >= 29
    assert deliverer.served["first"].filled == 0


def test_refused_fill_does_not_hold_what_is_new(graph: Graph, tmp_path: Path) -> None:
    """A fill that fails begins anew later; new updates are applied meanwhile."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(10)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events[:-2])
    for item in graph.lease_updates(100, 60):
        graph.acknowledge([item.position])
    broken = True

    def refuse(plan: Plan) -> None:
        if broken and len(plan.updates) > 2:
            raise SinkError("too much at once")

    sink = Around(warehouse.sink(), refuse)
    destination = Destination(name="w", sink=sink, settle=0.0)
    deliverer = deliverer_of(graph, destination, rules=RULES)
    with delivering(deliverer):
        wait_until(lambda: deliverer.served["w"].failures)
        Recognizer(graph, RULES).process(events[-2:])
        wait_until(lambda: not graph.stats().pending_updates)
        before, filled = warehouse.users(), graph.destinations()
        broken = False
        wait_until(lambda: graph.destinations()["w"])

    assert filled == {"w": False}
    assert {m for m, user in before.items() if user and m.startswith("m")} == {
        f"m{n}-{k}" for n in (8, 9) for k in range(3)
    }
    assert warehouse.users() == expected(10)


def fill_graph(graph: Graph, events: Sequence[Event]) -> None:
    """What all destinations of before have had."""
    Recognizer(graph, RULES).process(events)
    while leased := graph.lease_updates(10_000, 60):
        graph.acknowledge([item.position for item in leased])


def test_fill_does_not_hold_what_is_new_and_goes_on_where_it_was(
    graph: Graph, tmp_path: Path
) -> None:
    """A long fill has new updates in between, and an outage in its midst repeats nothing."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(701, rows=1)
    late = [event for event in events if event.anonymous_id == "d700"]
    warehouse.put(events)
    fill_graph(graph, [event for event in events if event not in late])
    parts = 0

    def slowly(plan: Plan) -> None:
        nonlocal parts
        if len(plan.updates) > 1:
            parts += 1
            if parts == 2:
                Recognizer(graph, RULES).process(late)
            if parts in (3, 4):
                raise SinkUnavailableError("away")

    order: list[int] = []
    destination = Destination(name="w", sink=Around(warehouse.sink(), slowly), settle=0.0)
    deliverer = deliverer_of(
        graph,
        destination,
        rules=RULES,
        watch=lambda name, plan, applied: order.append(len(plan.updates)),
    )
    with delivering(deliverer):
        wait_until(lambda: graph.destinations()["w"])
        wait_until(lambda: not graph.stats().pending_updates)

    assert warehouse.users() == expected(701, rows=1)
    assert deliverer.served["w"].failures == 2
    assert order.index(1) == 2
    assert deliverer.served["w"].filled + 1 == sum(order)
    assert len(order) <= 10


def test_fill_begins_again_where_the_graph_fails(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that goes away in the midst of what it knows has not told all of it."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(500, rows=1)
    warehouse.put(events)
    fill_graph(graph, events)
    restate = graph.restate
    times: list[int] = []

    def fail_once(rules: Rules, size: int = 200) -> Iterator[list[UpdateByCriteria]]:
        times.append(size)
        for number, updates in enumerate(restate(rules, size)):
            if number == 1 and len(times) == 1:
                raise GraphUnavailableError("away")
            yield updates

    monkeypatch.setattr(graph, "restate", fail_once)
    destination = Destination(name="w", sink=warehouse.sink(), settle=0.0)
    with delivering(deliverer_of(graph, destination, rules=RULES)):
        wait_until(lambda: graph.destinations()["w"])

    assert warehouse.users() == expected(500, rows=1)
    assert len(times) == 2


def test_fill_waits_for_a_table_that_is_made_later(graph: Graph, tmp_path: Path) -> None:
    """A destination is not filled while a table is missing that its owners are about."""
    warehouse = Warehouse(tmp_path)
    warehouse.execute("CREATE TABLE other (x)")
    events = journey(5)
    fill_graph(graph, events)
    deliverer = deliverer_of(
        graph, Destination(name="w", sink=warehouse.sink(), settle=0.0), rules=RULES
    )
    with delivering(deliverer):
        wait_until(lambda: "events" in deliverer.served["w"].last_error)
        time.sleep(0.3)
        before = graph.destinations()
        warehouse.make().put(events)
        wait_until(lambda: graph.destinations()["w"])

    assert before == {"w": False}
    assert warehouse.users() == expected(5)


def test_destinations_of_a_graph_of_many_machines(mongodb_url: str, tmp_path: Path) -> None:
    """On MongoDB: two deliverers of two graphs, a late row, a destination that comes later."""
    one, two = Warehouse(tmp_path, "one").make(), Warehouse(tmp_path, "two").make()
    events = journey(40)
    late = [event for event in events if event.message_id == "m7-1"]
    one.put([event for event in events if event not in late])
    seen: list[str] = []
    with closing(open_graph(mongodb_url)) as graph, closing(open_graph(mongodb_url)) as other:
        first = [
            deliverer_of(
                g,
                Destination(name="one", sink=one.sink(), window=5, settle=5.0),
                rules=RULES,
                watch=lambda name, plan, applied: seen.extend(plan.updates),
            )
            for g in (graph, other)
        ]
        with delivering(first[0]), delivering(first[1]):
            wait_until(lambda: graph.destinations() == {"one": True})
            Recognizer(graph, RULES).process(events)
            wait_until(lambda: not other.backlog("one").waiting)
            one.put(late)
            wait_until(lambda: not graph.stats().pending_updates)
        two.put(events)
        second = Destination(name="two", sink=two.sink(), settle=0.1)
        with delivering(deliverer_of(graph, second, rules=RULES)):
            wait_until(lambda: graph.destinations() == {"one": True, "two": True})
        graph.drop_destination("two")

    assert one.users() == two.users() == expected(40)
    assert (len(seen), len(set(seen))) == (41, 40)


# Rows on their way -----------------------------------------------------------------------------


def run_until_empty(graph: Graph, destination: Destination, **options: Any) -> Served:
    deliverer = deliverer_of(graph, destination, **options)
    with delivering(deliverer):
        wait_until(lambda: not graph.stats().pending_updates)
    return deliverer.served[destination.name]


@pytest.mark.parametrize("settle", [0.0, 1.0])
def test_row_that_comes_after_its_update_is_recognised(
    graph: Graph, tmp_path: Path, clock: Clock, settle: float
) -> None:
    """An update whose rows were not there is applied again; with settling off it is not."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(4)
    late = [event for event in events if event.message_id == "m2-1"]
    warehouse.put([event for event in events if event not in late])
    Recognizer(graph, RULES).process(events)
    deliverer = deliverer_of(graph, Destination(name="w", sink=warehouse.sink(), settle=settle))
    with delivering(deliverer):
        wait_until(lambda: deliverer.served["w"].windows)
        wait_until(lambda: not graph.backlog("w").waiting)
        held = graph.backlog("w").held
        before = warehouse.users()
        warehouse.put(late)
        clock.move(settle)
        wait_until(lambda: not graph.stats().pending_updates)
    right = expected(4) if settle else expected(4) | {"m2-1": None}

    assert before == {m: u for m, u in expected(4).items() if m != "m2-1"}
    assert held == (1 if settle else 0)
    assert warehouse.users() == right
    assert deliverer.served["w"].reapplied == held
    assert deliverer.served["w"].unmatched == {}


def test_row_of_an_event_that_is_not_known_yet_stands_for_no_other(
    graph: Graph, tmp_path: Path, clock: Clock
) -> None:
    """A range meets as many rows as were expected, of which one is another: none is lost."""
    warehouse = Warehouse(tmp_path).make()
    early, unknown, late, login = journey(1)
    warehouse.put([early, unknown, login])
    recognizer = Recognizer(graph, RULES)
    recognizer.process([early, late])
    recognizer.process([login])
    (update,) = [delivery.update for delivery in graph.lease_updates(10, 0)]
    deliverer = deliverer_of(graph, Destination(name="w", sink=warehouse.sink(), settle=1.0))
    with delivering(deliverer):
        wait_until(lambda: not graph.backlog("w").waiting)
        before = warehouse.users()
        recognizer.process([unknown])
        warehouse.put([late])
        clock.move(1.0)
        wait_until(lambda: not graph.stats().pending_updates)

    assert update.expected_rows == 2
    assert not any(each.kind == "messages" for each in update.where)
    assert before == {m: u for m, u in expected(1).items() if m != late.message_id}
    assert warehouse.users() == expected(1)
    assert deliverer.served["w"].unmatched == {}


def test_row_is_waited_for_when_a_later_update_takes_another_one(
    graph: Graph, tmp_path: Path, clock: Clock
) -> None:
    """Of two messages of an update the next one takes the first; the second is on its way."""
    warehouse = Warehouse(tmp_path).make()
    before = make_event("m0", START, "d0")
    after = make_event("m1", START + 4 * SECOND, "d0")
    login = make_event("c0", START + 3 * SECOND, "d0", user_id="u0")
    earlier = make_event("c1", START + 2 * SECOND, "d0", user_id="u1")
    warehouse.put([before, login, earlier])
    recognizer = Recognizer(graph, RULES)
    recognizer.process([before, after, login])
    recognizer.process([earlier])
    window = [delivery.update for delivery in graph.lease_updates(10, 0)]
    deliverer = deliverer_of(graph, Destination(name="w", sink=warehouse.sink(), settle=1.0))
    with delivering(deliverer):
        wait_until(lambda: not graph.backlog("w").waiting)
        warehouse.put([after])
        clock.move(1.0)
        wait_until(lambda: not graph.stats().pending_updates)

    assert [len(plan_updates([update]).steps[0].rows) for update in window] == [2, 1, 1]
    assert warehouse.users() == {"m0": "u1", "m1": "u0", "c0": "u0", "c1": "u1"}
    assert deliverer.served["w"].unmatched == {}


def test_rows_that_never_came_are_reported(graph: Graph, tmp_path: Path) -> None:
    """After settling, updates whose rows are not there are done, and counted by table."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(4)
    warehouse.put([event for event in events if event.message_id not in ("m2-1", "m3-0", "m3-2")])
    Recognizer(graph, RULES).process(events)
    oldest = min(d.update.created_at for d in graph.lease_updates(10, 0))
    served = run_until_empty(graph, Destination(name="w", sink=warehouse.sink(), settle=0.3))
    (found,) = served.unmatched.values()

    assert list(served.unmatched) == ["events"]
    assert (found.updates, found.rows, found.oldest) == (2, 3, oldest)
    assert (served.updates, served.reapplied, served.held) == (4, 2, 2)


@pytest.mark.parametrize("rules", [RULES, VERSIONED], ids=["ledger", "version"])
@pytest.mark.parametrize("version", ["gone", "kept"])
@pytest.mark.parametrize("again", [True, False])
def test_original_row_that_comes_back_is_recognised_again(
    graph: Graph, tmp_path: Path, clock: Clock, rules: Rules, version: str, again: bool
) -> None:
    """
    A pipeline's retry that overwrites a recognised row is undone, where all is applied again.

    Where there are versions updates name ranges, and these are applied again in any case.

    Hours are a second here. Some pipelines replace the whole row; some set the columns of the
    event alone, and leave the version of the update that was overwritten.
    """
    warehouse = Warehouse(tmp_path).make(versioned=rules is VERSIONED)
    events = journey(4)
    warehouse.put(events)
    Recognizer(graph, rules).process(events)
    deliverer = deliverer_of(
        graph,
        Destination(name="w", sink=warehouse.sink(), settle=1.0, reapply_all=again),
    )
    with delivering(deliverer):
        wait_until(lambda: not graph.backlog("w").waiting)
        before = warehouse.users()
        emptied = ", recognition_version = NULL" if rules is VERSIONED and version == "gone" else ""
        warehouse.execute(f"UPDATE events SET user_id = NULL{emptied} WHERE message_id = 'm2-1'")
        clock.move(1.0)
        wait_until(lambda: not graph.stats().pending_updates)

    assert before == expected(4)
    undone = again or rules is VERSIONED
    assert warehouse.users() == (expected(4) if undone else expected(4) | {"m2-1": None})


def test_rows_that_settle_and_rows_that_come_back_are_both_waited_for(
    graph: Graph, tmp_path: Path, clock: Clock
) -> None:
    """
    A row on its way gets its user after `settle`, one that an old row overwrote after `again`.

    What never comes is told once. A destination without `again` has nothing left to do by then.
    """
    warehouse = Warehouse(tmp_path).make()
    events = journey(4)
    never, late = "m1-0", "m3-1"
    warehouse.put([each for each in events if each.message_id not in (never, late)])
    Recognizer(graph, RULES).process(events)
    deliverer = deliverer_of(
        graph, Destination(name="w", sink=warehouse.sink(), settle=600.0, again=7200.0)
    )
    served = deliverer.served["w"]
    with delivering(deliverer):
        wait_until(lambda: not graph.backlog("w").waiting)
        warehouse.put([each for each in events if each.message_id == late])
        clock.move(600.0)
        wait_until(lambda: warehouse.users()[late])
        wait_until(lambda: graph.backlog("w").held == 4)
        warehouse.execute("UPDATE events SET user_id = NULL WHERE message_id = 'm2-1'")
        clock.move(7200.0)
        wait_until(lambda: not graph.stats().pending_updates)

    assert warehouse.users() == {m: u for m, u in expected(4).items() if m != never}
    assert [(found.updates, found.rows) for found in served.unmatched.values()] == [(1, 1)]
    assert (served.updates, served.reapplied) == (4, 6)


class Collected:
    """A channel that keeps what it was given, and fails where it is told to."""

    def __init__(self) -> None:
        self.updates: list[UpdateByCriteria] = []
        self.errors: list[Exception] = []
        self.closed = False

    def send(self, updates: Sequence[UpdateByCriteria]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.updates += updates

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("again", [False, True])
def test_channel_is_given_updates_as_they_are(graph: Graph, tmp_path: Path, again: bool) -> None:
    """
    In their order, what the graph knew before included; after a failure once more.

    No rows are counted there, so nothing is held for them: unless all updates are applied again.
    """
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(journey(5))
    Recognizer(graph, RULES).process(journey(2))
    channel = Collected()
    channel.errors = [OutcomeUnknownError("gone")]
    deliverer = deliverer_of(
        graph,
        Destination(name="c", sink=channel, settle=0.2, reapply_all=again),
        rules=RULES,
    )
    with delivering(deliverer):
        wait_until(lambda: graph.destinations() == {"c": True})
        Recognizer(graph, RULES).process(journey(5))
        wait_until(lambda: not graph.stats().pending_updates)
    done = plan_updates(channel.updates)
    warehouse.sink().apply(done)
    served = deliverer.served["c"]

    assert isinstance(channel, Channel)
    assert warehouse.users() == expected(5)
    assert served.failures == 1
    assert served.filled >= 2
    assert (served.updates, served.held) == (7, 7 if again else 0)
    assert len(channel.updates) == served.filled + (14 if again else 7)


# What goes wrong -------------------------------------------------------------------------------


def test_updates_of_a_missing_table_wait_and_are_applied(graph: Graph, tmp_path: Path) -> None:
    """A table that is made later gets its updates; those of other tables never waited."""
    warehouse = Warehouse(tmp_path)
    events = journey(5)
    warehouse.execute("CREATE TABLE other (x)")
    Recognizer(graph, RULES).process(events)
    deliverer = deliverer_of(graph, Destination(name="w", sink=warehouse.sink()))
    with delivering(deliverer):
        wait_until(lambda: deliverer.served["w"].postponed >= 5)
        warehouse.make().put(events)
        wait_until(lambda: not graph.stats().pending_updates)

    assert warehouse.users() == expected(5)
    assert deliverer.served["w"].failures == deliverer.served["w"].dead == 0
    assert "events" in deliverer.served["w"].last_error


def test_updates_of_a_table_that_stays_missing_are_given_up(graph: Graph, tmp_path: Path) -> None:
    """After their patience they are dead letters with the reason, and can be sent again."""
    warehouse = Warehouse(tmp_path)
    warehouse.execute("CREATE TABLE other (x)")
    events = journey(2)
    Recognizer(graph, RULES).process(events)
    destination = Destination(name="w", sink=warehouse.sink())
    served = run_until_empty(graph, destination, patience=0.0)
    dead = graph.dead_updates(10, "w")
    warehouse.make().put(events)
    graph.return_updates([d.position for d, _ in dead], "", dead=False, destination="w")
    again = run_until_empty(graph, destination)

    assert served.dead == len(dead) == 2
    assert all("events" in reason for _, reason in dead)
    assert again.updates == 2
    assert warehouse.users() == expected(2)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SinkError("the statement was refused"), "the statement was refused"),
        (KeyError("d13"), "KeyError"),  # a mistake in a sink; its text is not ours
    ],
    ids=["refused", "mistake"],
)
def test_update_that_the_destination_refuses_is_given_up_alone(
    graph: Graph, tmp_path: Path, error: Exception, told: str
) -> None:
    """One that breaks its whole window is found, and the others are applied."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(20)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events)

    def refuse(plan: Plan) -> None:
        if any(row.equals[0] == "d13" for step in plan.steps for row in step.rows):
            raise error

    sink = Around(warehouse.sink(), refuse)
    served = run_until_empty(graph, Destination(name="w", sink=sink, settle=0.0))
    dead = graph.dead_updates(10, "w")

    assert [(d.update.cause.anonymous_id, reason) for d, reason in dead] == [("d13", told)]
    assert warehouse.users() == expected(20) | {f"m13-{k}": None for k in range(3)}
    assert (served.updates, served.dead) == (19, 1)


def test_update_that_is_refused_holds_the_others_for_a_moment(graph: Graph, tmp_path: Path) -> None:
    """
    Finding the one that breaks a window takes no pauses: the destination does answer.

    It is the oldest, so that every window begins with it, each time it comes again.
    """
    warehouse = Warehouse(tmp_path).make()
    events = journey(300)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events)
    first = graph.lease_updates(1, 0)[0].update.cause.anonymous_id

    def refuse(plan: Plan) -> None:
        if any(row.equals[0] == first for step in plan.steps for row in step.rows):
            raise SinkError("the statement was refused")

    sink = Around(warehouse.sink(), refuse)
    deliverer = deliverer_of(
        graph, Destination(name="w", sink=sink, settle=0.0), pauses=(0.1, 300.0)
    )
    with delivering(deliverer):
        wait_until(lambda: deliverer.served["w"].updates == 299)
        failures = deliverer.served["w"].failures

    assert failures == 0  # each is a pause
    assert deliverer.served["w"].dead == 0


def test_nothing_is_given_up_where_nothing_can_be_applied(graph: Graph, tmp_path: Path) -> None:
    """A destination that refuses everything, such as for want of a right, loses nothing."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(4)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events)
    broken = True

    def refuse(plan: Plan) -> None:
        if broken:
            raise SinkError("permission denied; everything was rolled back")

    sink = Around(warehouse.sink(), refuse)
    deliverer = deliverer_of(graph, Destination(name="w", sink=sink, settle=0.0))
    with delivering(deliverer):
        wait_until(lambda: deliverer.served["w"].failures >= 20)
        dead = graph.stats().dead_updates
        broken = False
        wait_until(lambda: not graph.stats().pending_updates)

    assert dead == 0
    assert warehouse.users() == expected(4)


# Leases ----------------------------------------------------------------------------------------


def test_window_that_takes_longer_than_its_lease_keeps_it(
    graph: Graph, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases of a window in flight are renewed, so that nobody else applies it meanwhile."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(10)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events)
    flying: list[str] = []
    seen: list[tuple[str, ...]] = []
    held: list[int] = []
    hold_updates = graph.hold_updates

    def hold(*arguments: Any, **options: Any) -> None:
        hold_updates(*arguments, **options)
        held.append(len(held))

    monkeypatch.setattr(graph, "hold_updates", hold)

    def slowly(plan: Plan) -> None:
        flying.append("one")
        for _ in range(8):
            # A renewal may have looked at the clock before it moved the last time: two moves are
            # less than a lease.
            before = len(held)
            wait_until(lambda: len(held) > before)  # noqa: B023 - called at once
            clock.move(0.25)

    one = deliverer_of(
        graph, Destination(name="w", sink=Around(warehouse.sink(), slowly)), lease=0.6
    )
    two = deliverer_of(
        graph,
        Destination(name="w", sink=warehouse.sink()),
        lease=0.6,
        watch=lambda name, plan, applied: seen.append(plan.updates),
    )
    with delivering(one):
        wait_until(lambda: flying)
        with delivering(two):
            wait_until(lambda: not graph.stats().pending_updates)

    assert seen == []
    assert flying == ["one"]
    assert warehouse.users() == expected(10)


def test_window_that_flies_for_too_long_is_offered_to_others(graph: Graph, tmp_path: Path) -> None:
    """A call that never comes back does not keep its updates for ever; when it does, no harm."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(10)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events)
    flying = threading.Event()
    go_on = threading.Event()

    def hang(plan: Plan) -> None:
        flying.set()
        go_on.wait(60)

    one = deliverer_of(
        graph, Destination(name="w", sink=Around(warehouse.sink(), hang)), lease=0.3, longest=0.5
    )
    two = deliverer_of(graph, Destination(name="w", sink=warehouse.sink()), lease=0.3)
    with delivering(one):
        assert flying.wait(60)
        with delivering(two):
            wait_until(lambda: not graph.stats().pending_updates)
            right = warehouse.users()
            go_on.set()
            wait_until(lambda: one.served["w"].windows)

    assert right == warehouse.users() == expected(10)
    assert graph.stats().pending_updates == graph.stats().dead_updates == 0


def test_window_in_flight_is_finished_when_stopped(graph: Graph, tmp_path: Path) -> None:
    """`run` returns after the window that was begun, and leaves the rest leased by nobody."""
    warehouse = Warehouse(tmp_path).make()
    events = journey(10)
    warehouse.put(events)
    Recognizer(graph, RULES).process(events)
    begun = threading.Event()
    go_on = threading.Event()

    def slowly(plan: Plan) -> None:
        begun.set()
        assert go_on.wait(60)

    sink = Around(warehouse.sink(), slowly)
    deliverer = deliverer_of(graph, Destination(name="w", sink=sink, window=4, settle=0.0))
    with delivering(deliverer) as stop:
        assert begun.wait(60)
        stop.set()
        go_on.set()
    users = warehouse.users()
    left = graph.lease_updates(100, 60, "w")

    assert deliverer.served["w"].updates == 4
    assert sum(user is not None for user in users.values()) == 10 + 4 * 3
    assert len(left) == 6


def test_old_updates_are_not_given_up_for_their_age(graph: Graph, tmp_path: Path) -> None:
    """Patience is for tries, not for time: who comes back after days tries before giving up."""
    warehouse = Warehouse(tmp_path)
    warehouse.execute("CREATE TABLE other (x)")
    events = journey(1)
    Recognizer(graph, RULES).process(events)
    (item,) = graph.lease_updates(10, 0)
    deliverer = deliverer_of(
        graph, Destination(name="w", sink=warehouse.sink()), patience=0.0, pauses=(0.05, 60.0)
    )
    with delivering(deliverer):
        wait_until(lambda: deliverer.served["w"].postponed)
        counted = graph.backlog("w")

    assert (counted.waiting, counted.dead) == (1, 0)
    assert counted.oldest == item.update.created_at


class Pauses(threading.Event):
    """It is never waited for, only noted for how long; it ends after so many pauses."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.noted: list[float] = []
        self._count = count

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.noted.append(timeout)
        if len(self.noted) >= self._count:
            self.set()
        return self.is_set()


def test_window_collects_from_the_beginning_of_the_one_before(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came while a window was applied has waited already: not for a whole time once more."""
    clock = [1_000.0]  # it moves while something is applied, and not by itself
    monkeypatch.setattr("recognition.delivery.time", SimpleNamespace(monotonic=lambda: clock[0]))
    lasts = iter((20.0, 90.0))
    first = [event for event in journey(2) if event.anonymous_id == "d0"]
    second = [event for event in journey(2) if event.anonymous_id == "d1"]
    journeys = iter((second, []))
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(journey(2))

    recognizer = Recognizer(graph, RULES)

    def slow(_: Plan) -> None:
        if events := next(journeys):
            recognizer.process(events)
        clock[0] += next(lasts)

    recognizer.process(first)
    with closing(warehouse.sink()) as sink:
        deliverer = deliverer_of(
            graph, Destination(name="w", sink=Around(sink, before=slow), settle=0.0), every=60.0
        )
        stop = Pauses(3)
        deliverer.run(stop)

    assert deliverer.served["w"].windows == 2
    # The rest of a time; nothing, where more than that has passed; all of it, where nothing came.
    assert stop.noted == [40.0, 0.0, 60.0]


@pytest.mark.parametrize("lost", [False, True], ids=["held", "lost"])
def test_window_whose_lease_has_ended_is_not_given_back(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Whoever stood still does not free what another worker may be at work with by now."""
    clock = [1_000.0]
    monkeypatch.setattr("recognition.delivery.time", SimpleNamespace(monotonic=lambda: clock[0]))
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(journey(1))
    Recognizer(graph, RULES).process(journey(1))

    def fails(_: Plan) -> None:
        if lost:
            clock[0] += 60.0  # as long as it is leased
            deliverer._lines[0].renew()
        raise SinkUnavailableError("it is away")

    with closing(warehouse.sink()) as sink:
        deliverer = deliverer_of(
            graph, Destination(name="w", sink=Around(sink, before=fails)), lease=60.0
        )
        deliverer.run(Pauses(1))

    assert bool(graph.lease_updates(10, 60.0, "w")) == (not lost)


@pytest.mark.parametrize("answers", ["outbox", "fill"])
def test_circuit_closes_when_what_had_failed_answers(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    """Also where nothing waits to be applied: else an alarm would last until the next update."""
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(journey(1))
    fill_graph(graph, journey(1))
    failures = [SinkUnavailableError("away")] * CIRCUIT_OPENS if answers == "fill" else []
    lease = graph.lease_updates
    away = [GraphUnavailableError("away")] * CIRCUIT_OPENS if answers == "outbox" else []
    opened: list[int] = []

    def fail(_: Plan) -> None:
        if failures:
            raise failures.pop()

    def lease_updates(*given: Any) -> Any:
        opened.append(deliverer.served["w"].failing)
        if away:
            raise away.pop()
        return lease(*given)

    monkeypatch.setattr(graph, "lease_updates", lease_updates)
    with closing(warehouse.sink()) as sink:
        deliverer = deliverer_of(
            graph,
            Destination(name="w", sink=Around(sink, fail), settle=0.0),
            rules=RULES if answers == "fill" else None,
        )
        with delivering(deliverer):
            wait_until(lambda: max(opened, default=0) == CIRCUIT_OPENS)
            wait_until(lambda: deliverer.served["w"].failing == 0)

    assert deliverer.served["w"].failures == CIRCUIT_OPENS


def test_outbox_that_answers_slowly_is_not_asked_without_a_pause(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing came nothing has waited: the pause is whole, however long the answer took."""
    clock = [1_000.0]
    monkeypatch.setattr("recognition.delivery.time", SimpleNamespace(monotonic=lambda: clock[0]))
    lease = graph.lease_updates

    def slowly(*given: Any) -> Any:
        clock[0] += 90.0
        return lease(*given)

    monkeypatch.setattr(graph, "lease_updates", slowly)
    with closing(Warehouse(tmp_path).make().sink()) as sink:
        stop = Pauses(2)
        deliverer_of(graph, Destination(name="w", sink=sink), every=60.0).run(stop)

    assert stop.noted == [60.0, 60.0]


def test_log_of_a_foreign_error_says_where_it_came_from_and_not_its_text(
    graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver's text may hold the row; its class and the lines of code are enough."""
    Recognizer(graph, RULES).process(journey(1))

    def stumble(_: Plan) -> None:
        raise ValueError(text) from KeyError(text)

    text = "row contains u0@example.com"

    with closing(Warehouse(tmp_path).make().sink()) as sink:
        deliverer = deliverer_of(graph, Destination(name="w", sink=Around(sink, stumble)))
        with delivering(deliverer):
            wait_until(lambda: deliverer.served["w"].failures)

    assert "ValueError" in caplog.text
    assert "in stumble" in caplog.text
    assert text not in caplog.text


def test_window_of_which_the_graph_was_not_told_is_counted_once(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was applied, and comes again when its lease has ended; only then it is done with."""
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(journey(1))
    Recognizer(graph, RULES).process(journey(1))
    acknowledge, applied = graph.acknowledge, []

    def fail_once(*given: Any) -> None:
        monkeypatch.setattr(graph, "acknowledge", acknowledge)
        raise GraphUnavailableError("away")

    monkeypatch.setattr(graph, "acknowledge", fail_once)
    with closing(warehouse.sink()) as sink:
        deliverer = deliverer_of(
            graph,
            Destination(name="w", sink=Around(sink, applied.append), settle=0.0),
            lease=0.5,
        )
        with delivering(deliverer):
            wait_until(lambda: deliverer.served["w"].updates)
    served = deliverer.served["w"]

    assert len(applied) == 2
    assert (served.updates, served.failures, sum(served.lag_counts)) == (1, 1, 1)
    assert warehouse.users() == expected(1)


def test_table_that_may_not_be_written_holds_no_other(graph: Graph, tmp_path: Path) -> None:
    """Its updates, the oldest ones, are put off together; all others are applied."""
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(journey(60))
    locked = {f"d{n}" for n in range(50)}
    first = [event for event in journey(60) if event.anonymous_id in locked]
    layout = replace(RULES.layout, table="locked")
    Recognizer(graph, replace(RULES, layout=layout)).process(first)
    Recognizer(graph, RULES).process([e for e in journey(60) if e.anonymous_id not in locked])

    def refuse(plan: Plan) -> None:
        if may_not and any(step.shape.table == "locked" for step in plan.steps):
            raise SinkReadOnlyError("the role may not UPDATE here; nothing was written")

    may_not = True
    with closing(Around(warehouse.sink(), refuse)) as sink:
        deliverer = deliverer_of(graph, Destination(name="w", sink=sink, settle=0.0))
        with delivering(deliverer):
            wait_until(lambda: deliverer.served["w"].postponed >= 50)
            assert deliverer.served["w"].updates == 10
            may_not = False
            warehouse.execute("ALTER TABLE events RENAME TO locked")
            wait_until(lambda: deliverer.served["w"].updates == 60)

    assert warehouse.users("locked") == expected(60)
    assert deliverer.served["w"].dead == 0
