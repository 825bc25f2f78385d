"""
A replica set of three members that loses its primary, or two of them, while the graph is in use.

How many times the primary is killed says ``RECOGNITION_FAILOVER_RUNS``.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mongod import Server
from oracle import Oracle, make_event
from recognition.attribution import DAY, AttributionRules
from recognition.errors import GraphUnavailableError
from recognition.events import Event
from recognition.graph import Graph, GraphStats, open_graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.mongo import MongoGraph
from recognition.messages import UpdateByCriteria
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from warehouse import Warehouse

RUNS = int(os.environ.get("RECOGNITION_FAILOVER_RUNS", "2"))
RULES = Rules(attribution=AttributionRules(lookback=30 * DAY))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = ("--setParameter", "enableTestCommands=1")
    with Server(members=3, cache_gb=0.25, options=options) as server:
        yield server


def make_batches(seed: int, count: int) -> list[list[Event]]:
    """Batches of a shop: shared devices, emails that become users, claims that come late."""
    draw = random.Random(seed)
    batches = []
    for number in range(count):
        batch = []
        for position in range(draw.randint(1, 12)):
            user = draw.choice([None] * 7 + ["ann", "bob", "cid"])
            email = draw.choice([None] * 6 + ["ann@x.example", "bob@x.example"])
            batch.append(
                make_event(
                    f"{seed}-{number:04}-{position:02}",
                    draw.randrange(20 * DAY),
                    draw.choice(["kiosk", "phone", "tablet", "laptop"]),
                    user_id=user,
                    email=email if user is None or email == f"{user}@x.example" else None,
                )
            )
        batches.append(batch)
    return batches


class Pipeline:
    """One that takes batches in and one that delivers, at the same time."""

    def __init__(self, open: Callable[[], Graph], batches: Sequence[list[Event]]) -> None:
        self.graph, self._outgoing = open(), open()
        self._batches = batches
        self.warehouse = Warehouse()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.taken = 0
        self.counts: Counter[str] = Counter()
        self.leased: list[UpdateByCriteria] = []
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guard, args=[work])
            for work in (self._take, self._deliver)
        ]

    def run(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        for thread in self._threads:
            thread.start()
        try:
            meanwhile()
        finally:
            for thread in self._threads:
                thread.join()
            if self._outgoing is not self.graph:
                self._outgoing.close()
        if self._errors:
            raise self._errors[0]

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:
            self._errors.append(exc)
        finally:
            self._over.set()

    def _take(self) -> None:
        recognizer = Recognizer(self.graph, RULES)
        for batch in self._batches:
            done = recognizer.process(batch)
            with self._lock:
                for table, rows in recognizer.rows(done).items():
                    found = {str(row["message_id"]): row for row in rows}
                    self.warehouse.tables.setdefault(table, {}).update(found)
            recognizer.flushed(done.receipt)
            self.taken += 1
            self.counts.update(
                claims=done.claims, links=done.links, stamped=done.stamped, updates=done.updates
            )

    def _deliver(self) -> None:
        over = False
        while not over:
            over = self._over.is_set()
            while leased := self._outgoing.lease_updates(50, 600):
                with self._lock:
                    self.warehouse.apply([item.update for item in leased])
                self.leased += [item.update for item in leased]
                self._outgoing.acknowledge([item.position for item in leased])
            time.sleep(0.005)

    def rows(self) -> dict[str, object]:
        return {m: row["user_id"] for m, row in self.warehouse.tables["events"].items()}

    def decided(self) -> Counter[str]:
        """What was told to the warehouse, and how often, but for numbers and times of telling."""
        return Counter(repr((u.table, u.set, u.where, u.cause)) for u in self.leased)


def counted(stats: GraphStats) -> GraphStats:
    return replace(stats, bytes=0)


@pytest.mark.parametrize("run", range(RUNS))
def test_nothing_is_lost_or_doubled_when_the_primary_is_killed(run: int, server: Server) -> None:
    """Ingest and delivery go on with another primary, and leave what an undisturbed run leaves."""
    batches = make_batches(run, 80)
    memory = MemoryGraph()
    undisturbed = Pipeline(lambda: memory, batches)
    undisturbed.run()
    draw = random.Random(run)
    with server.database() as url:
        # Whoever finds a sweep that went with its primary looks again, and tells the warehouse once
        # more what it knows: after this time, which is never in the test.
        disturbed = Pipeline(lambda: open_graph(url, grace=3_600.0), batches)

        def kill() -> None:
            at = draw.randrange(len(batches))
            while disturbed.taken < at and not disturbed._over.is_set():
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
            primary = server.primary()
            server.kill(primary)
            server.restart(primary)

        disturbed.run(kill)
        stats = disturbed.graph.stats()
        again = sum(Recognizer(disturbed.graph, RULES).process(b).updates for b in batches)
        disturbed.graph.close()
    events = [event for batch in batches for event in batch]
    oracle = Oracle(policy="device_split", lookback=30 * DAY, own_column=False, events=events)

    assert disturbed.rows() == undisturbed.rows() == oracle.owners()
    assert counted(stats) == counted(memory.stats())
    assert disturbed.counts == undisturbed.counts
    assert disturbed.decided() == undisturbed.decided()
    assert len({update.id for update in disturbed.leased}) == len(disturbed.leased)
    assert again == 0


def stop_two(server: Server) -> list[Any]:
    """Leaves one member, which is then no primary: there is no majority."""
    primary = server.primary()
    gone = [primary, *[member for member in server.members if member is not primary][:1]]
    for member in gone:
        server.kill(member)
    return gone


@pytest.mark.parametrize("known", [False, True], ids=["anonymous", "identified"])
def test_an_outage_that_lasts(known: bool, server: Server) -> None:
    """Within its timeout a call says that there is no primary; later it succeeds as ever."""
    first = [make_event("1", 1, "d"), make_event("2", 2, "d", user_id="u1")]
    second = [make_event("3", 3, "d", user_id="u2" if known else None), make_event("4", 4, "d")]
    with server.database() as url, MongoGraph(url) as graph:
        recognizer = Recognizer(graph, RULES)
        recognizer.process(first)
        gone = stop_two(server)
        patience, graph._timeout = graph._timeout, 2.0
        begun = time.monotonic()
        with pytest.raises(GraphUnavailableError) as caught:
            recognizer.process(second)
        took = time.monotonic() - begun
        with pytest.raises(GraphUnavailableError) as leasing:
            graph.lease_updates(10, 60)
        for member in gone:
            server.restart(member)
        server.primary()
        graph._timeout = patience
        done = recognizer.process(second)
        owners = [owner and owner.id for owner in done.owners]
        stats = graph.stats()

    assert took < 20
    for error in (caught.value, leasing.value):
        assert error.retryable
        assert error.written is False
        assert "could not be reached for 2 s" in str(error)
        assert "the same call again is safe" in str(error)
        assert url not in str(error)
    assert owners == (["u2", "u2"] if known else ["u1", "u1"])
    assert stats.claims == (2 if known else 1)
    assert stats.references == (2 if known else 3)
    assert stats.pending_updates == 0


def test_an_outage_between_a_decision_and_its_second_look(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """What is durable is not called a failure; the second look is left to whoever comes next."""
    from pymongo import monitoring

    class Kills(monitoring.CommandListener):
        armed = False
        gone: list[Any] = []  # noqa: RUF012

        def started(self, event: monitoring.CommandStartedEvent) -> None:
            pass

        def failed(self, event: monitoring.CommandFailedEvent) -> None:
            pass

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
            if self.armed and event.command_name == "commitTransaction":
                self.armed = False
                self.gone += stop_two(server)
                graph._timeout = 2.0

    kills = Kills()
    monitoring.register(kills)
    with server.database() as url, MongoGraph(url) as graph:
        patience = graph._timeout
        recognizer = Recognizer(graph, RULES)
        recognizer.process([make_event("1", 1, "d")])
        kills.armed = True
        done = recognizer.process([make_event("2", 2, "d", user_id="u1")])
        for member in kills.gone:
            server.restart(member)
        server.primary()
        graph._timeout = patience
        left = graph._db["outbox"].count_documents({"_id": {"$lt": 0}})
        emitted = graph.recover(RULES)
        deadline = time.monotonic() + 60
        while (  # a majority of the members hears of it a little later
            swept := graph._db["outbox"].count_documents({"_id": {"$lt": 0}})
        ) and time.monotonic() < deadline:
            time.sleep(0.01)
        stats = graph.stats()

    assert done.claims == done.updates == 1
    assert "its sweep is left to others" in caplog.text
    assert (left, swept) == (1, 0)
    # What that decision had seen is not known to who looks again.
    assert emitted <= 1
    assert stats.claims == 1


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("command", ["find", "aggregate", "insert", "update", "commitTransaction"])
def test_connections_that_break(command: str, times: int, server: Server) -> None:
    """A command whose connection breaks, and breaks again, is not taken for an empty answer."""
    with server.database() as url, open_graph(url) as graph, server.client() as client:
        recognizer = Recognizer(graph, RULES)
        recognizer.process([make_event("1", 1, "d"), make_event("2", 2, "d", user_id="u1")])
        recognizer.process([make_event("0", 0, "d2", user_id="u9")])
        batches = [
            [make_event("3", 3, "d"), make_event("4", 4, "d2")],
            [make_event("5", 5, "d"), make_event("6", 6, "d3", user_id="u2")],
        ]
        owners = []
        for batch in batches:
            client.admin.command(
                {
                    "configureFailPoint": "failCommand",
                    "mode": {"times": times},
                    "data": {
                        "failCommands": [command],
                        "closeConnection": True,
                        "appName": "recognition",
                    },
                }
            )
            try:
                done = recognizer.process(batch)
            finally:
                client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
            owners.append([owner and owner.id for owner in done.owners])
        stats = graph.stats()

    assert owners == [["u1", "u9"], ["u1", "u2"]]
    assert (stats.claims, stats.references) == (3, 4)
