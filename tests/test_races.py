"""
Workers that share a graph, and are in each other's way at every step.

Twice: once with real processes that are killed, where chance decides who is when at which step
(`racing.py`); and once with two clients, where the one does its work exactly between two commands
of the other, for every command there is. How many trials there are of the first kind says
``RECOGNITION_RACE_TRIALS``.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pymongo import monitoring

from mongod import GivenServer
from oracle import Oracle, make_event
from racing import BROKEN, LIMIT
from recognition.attribution import DAY, AttributionRules
from recognition.errors import GraphUnavailableError
from recognition.events import Event, Identifier
from recognition.graph import mongo, open_graph
from recognition.graph.mongo import MongoGraph
from recognition.layouts import layout_named
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from test_decisions import MODES
from warehouse import Warehouse

TRIALS = int(os.environ.get("RECOGNITION_RACE_TRIALS", "4"))
#: Trials of one process.
GROUP = max(1, TRIALS // 20)
#: Every scene in every mode that it has, not in its first one alone.
FULL = TRIALS > 4
RACING = Path(__file__).with_name("racing.py")


# -------------------------------------------------------------------- processes that are killed


@pytest.fixture
def arena(mongodb: GivenServer) -> Iterator[GivenServer]:
    """A server that gives up the transactions of the dead soon; as it is, after a minute."""
    name = "transactionLifetimeLimitSeconds"
    with mongodb.client() as client:
        before = client.admin.command({"getParameter": 1, name: 1})[name]
        client.admin.command({"setParameter": 1, name: 1})
        yield mongodb
        client.admin.command({"setParameter": 1, name: before})


def race(
    arena: GivenServer, folder: Path, numbers: Sequence[int], *options: str
) -> list[dict[str, Any]]:
    """The outcomes of these trials, one after the other."""
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error", str(RACING)),
            *(arena.uri, str(folder), *map(str, numbers), *options),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT * len(numbers),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(LIMIT * GROUP + 60)
@pytest.mark.parametrize("first", range(0, TRIALS, GROUP))
def test_rows_are_the_oracles_whatever_dies_and_waits(
    first: int,
    arena: GivenServer,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """Workers that race and die leave the rows of one that was alone, and nothing to do."""
    numbers = range(first, min(first + GROUP, TRIALS))
    outcomes = race(arena, tmp_path, numbers)
    for outcome in outcomes:
        record_property("trial", json.dumps(outcome))

    assert [outcome["trial"] for outcome in outcomes] == [*numbers]
    for outcome in outcomes:
        shown = {name: value for name, value in outcome.items() if value}
        assert outcome["events"] >= 1_000
        assert outcome["wrong"] == [], shown
        assert outcome["again"] == [], shown
        assert outcome["stamps"] == [], shown
        assert outcome["foreign"] == [], shown
        assert outcome["dead"] == 0, shown
        # A row that is nobody's, because that was taken back, is guarded whenever it comes.
        assert outcome["updates_again"] == 0 or outcome["undo"], shown


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_race_can_be_lost(broken: str, arena: GivenServer, tmp_path: Path) -> None:
    """A protocol that is wrong leaves wrong rows: who reads first, and who does not lock."""
    for number in (8, 11, 5, 7, 14, 17, 20, 23, 26, 29):
        (outcome,) = race(arena, tmp_path, [number], "--broken", broken)
        if outcome["wrong"]:
            return

    pytest.fail(f"ten trials of a protocol that is {broken} were right")


# -------------------------------------------------------------------- between any two commands


class Interloper(monitoring.CommandListener):
    """Has another client's work done exactly when this thread begins its n-th command."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._other: threading.Thread | None = None
        self._work: Callable[[], None] | None = None
        self._left = 0
        self._waits = threading.Event()
        self._errors: list[BaseException] = []

    def during(self, nth: int, mine: Callable[[], None], theirs: Callable[[], None]) -> bool:
        """Do mine, with theirs in its n-th command; False: it has no so many, theirs was not."""
        self._thread, self._left, self._work = threading.current_thread(), nth, theirs
        self._other = None
        try:
            mine()
        finally:
            self._thread = None
            if self._other is not None:
                self._other.join()
        if self._errors:
            raise self._errors.pop()
        return self._other is not None

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if threading.current_thread() is not self._thread:
            return
        self._left -= 1
        if self._left == 0:
            self._waits.clear()
            self._other = threading.Thread(target=self._run)
            self._other.start()
            # It is done, or it cannot go on before this one does.
            self._waits.wait(10)

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except BaseException as exc:
            self._errors.append(exc)
        finally:
            self._waits.set()

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Nothing depends on it."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        if threading.current_thread() is self._other:
            self._waits.set()


INTERLOPER = Interloper()

#: What a worker does: a batch of events, or something that takes back, by its name.
Step = list[Event] | tuple[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What happened before, and what two workers do at the same time."""

    before: Sequence[Step] = ()
    mine: Sequence[Step]
    theirs: Sequence[Step]
    layout: str = "segment-single-table"
    modes: Sequence[str] = ("references",)
    forgotten: dict[tuple[str, str], int] = field(default_factory=dict)
    released: dict[str, int] = field(default_factory=dict)
    unlinked: frozenset[frozenset[tuple[str, str]]] = frozenset()


LATE = 1_000 * DAY
KNOWN_BY_DEVICE = ("references", "own column", "version", "own column with days")


def event(message_id: str, day: int, device: str | None = None, **options: Any) -> Event:
    """Each at an instant of its own, whatever the day."""
    return make_event(message_id, day * DAY + sum(message_id.encode()), device, **options)


SCENES = {
    "somebody claims the device for the first time": Scene(
        mine=[[event("m", 5, "d"), event("o", 6, "other")]],
        theirs=[[event("c", 7, "d", user_id="u1")]],
        modes=[*MODES],
    ),
    "somebody else claims the device": Scene(
        before=[[event("p", 1, "d", user_id="u9"), event("q", 5, "d")]],
        mine=[[event("m", 5, "d")]],
        theirs=[[event("c", 4, "d", user_id="u1")]],
        modes=[*MODES],
    ),
    "both claim the device, and one brings rows": Scene(
        before=[[event("p", 1, "d", user_id="u9")]],
        mine=[[event("m", 4, "d"), event("a", 3, "d", user_id="u0")]],
        theirs=[[event("b", 2, "d", user_id="u1")]],
        modes=KNOWN_BY_DEVICE,
    ),
    "a person is linked while it claims another device": Scene(
        before=[[event("c1", 3, "d1", email="e@x")], [event("r", 3, "d1"), event("s", 4, "d2")]],
        mine=[[event("l", 5, user_id="u1", email="e@x")]],
        theirs=[[event("c2", 4, "d2", email="e@x")]],
        modes=KNOWN_BY_DEVICE,
    ),
    "a person is linked and claims while its rows are stamped": Scene(
        before=[
            [event("s0", 70, "d", user_id="u9"), event("s1", 50, "d", user_id="u9")],
            [event("s2", 100, "d", user_id="u9"), event("s3", 20, "d3", email="e@x")],
        ],
        mine=[[event("m", 5, "d"), event("k", 5, "d9", user_id="u7")]],
        theirs=[
            [event("l", 21, user_id="u1", email="e@x")],
            [event("c", 8, "d", email="e@x")],
        ],
    ),
    "two users take the same email": Scene(
        before=[[event("p", 2, "d", email="e@x"), event("q", 2, "d")]],
        mine=[[event("a", 4, "d", user_id="u1", email="e@x")]],
        theirs=[[event("b", 3, user_id="u2", email="e@x")]],
        modes=KNOWN_BY_DEVICE,
    ),
    "both bring the same rows": Scene(
        before=[[event("p", 1, "d", user_id="u9")]],
        mine=[[event("m", 4, "d"), event("a", 3, "d", user_id="u0")]],
        theirs=[[event("m", 4, "d"), event("b", 5, "d", user_id="u1")]],
    ),
    "a table is new while a person changes": Scene(
        before=[
            [event("a", 1, user_id="u1", name="Old"), event("b", 2, user_id="u2", name="Old")],
        ],
        mine=[[event("l", 4, user_id="u2", previous_id="u1", type="alias")]],
        theirs=[[event("x", 3, user_id="u2", name="Fresh")]],
        layout="segment",
        modes=["own column", "own column with days"],
    ),
    "a person is forgotten while its device is seen": Scene(
        before=[
            [event("s", 5, "d", email="e@x")],
            [event("t", 6, user_id="u1", email="e@x"), event("r", 5, "d")],
        ],
        mine=[[event("m", 4, "d")]],
        theirs=[("forget", (Identifier("user_id", "u1"), LATE))],
        forgotten={("user_id", "u1"): LATE, ("email", "e@x"): LATE},
        modes=KNOWN_BY_DEVICE,
    ),
    "a device is seen while it is released": Scene(
        before=[[event("s", 5, "d", user_id="u1"), event("r", 5, "d"), event("z", 7, "d")]],
        mine=[("release", ("d", LATE))],
        theirs=[[event("m", 4, "d")], [event("c", 6, "d", user_id="u2")]],
        released={"d": LATE},
        modes=KNOWN_BY_DEVICE,
    ),
    "a link is taken away while it claims": Scene(
        before=[
            [event("s", 5, "d", user_id="u1", email="e@x")],
            [event("r", 5, "d2"), event("t", 6, "d2", email="e@x")],
        ],
        mine=[("unlink", (Identifier("user_id", "u1"), Identifier("email", "e@x")))],
        theirs=[[event("c", 4, "d", email="e@x")], [event("m", 3, "d")]],
        unlinked=frozenset({frozenset({("user_id", "u1"), ("email", "e@x")})}),
        modes=KNOWN_BY_DEVICE,
    ),
}


@pytest.fixture(scope="module")
def graphs(mongodb: GivenServer) -> Iterator[tuple[MongoGraph, MongoGraph]]:
    """Two clients of one graph."""
    monitoring.register(INTERLOPER)
    with mongodb.database() as url, MongoGraph(url) as mine, MongoGraph(url) as theirs:
        yield mine, theirs


class Stage:
    """Two recognizers in a workspace of their own, and a warehouse in which rows come first."""

    def __init__(self, graphs: tuple[MongoGraph, MongoGraph], scene: Scene, rules: Rules) -> None:
        self.graph = graphs[0]
        self.scene = scene
        self.rules = rules
        self.mine, self.theirs = (Recognizer(graph, rules) for graph in graphs)
        self.warehouse = Warehouse()
        self.events: dict[str, Event] = {}

    def play(self, recognizer: Recognizer, steps: Sequence[Step]) -> None:
        for step in steps:
            if isinstance(step, tuple):
                getattr(recognizer, step[0])(*step[1])
                continue
            self.events.update({e.message_id: e for e in step})
            for table, rows in recognizer.rows(recognizer.process(step)).items():
                found = {str(row["message_id"]): row for row in rows}
                self.warehouse.tables.setdefault(table, {}).update(found)

    def deliver(self) -> None:
        leased = self.graph.lease_updates(10_000, 60)
        self.warehouse.apply([item.update for item in leased])
        self.graph.acknowledge([item.position for item in leased])

    def differences(self) -> dict[tuple[str, str], tuple[object, object]]:
        """By table and message, what the row ought to hold and what it holds."""
        rules = self.rules
        events = list(self.events.values())
        oracle = Oracle(
            policy=rules.attribution.policy,
            lookback=rules.attribution.lookback,
            own_column=rules.has_own_column,
            events=events,
            forgotten=dict(self.scene.forgotten),
            released=dict(self.scene.released),
            unlinked=set(self.scene.unlinked),
        )
        owners = oracle.owners()
        return {
            (table, message): (owners[message], row[rules.target_of(table)])
            for table, rows in self.warehouse.tables.items()
            for message, row in rows.items()
            if row[rules.target_of(table)] != owners[message]
        }


def rules_of(scene: Scene, mode: str) -> Rules:
    options, _ = MODES[mode]
    return Rules(
        workspace=secrets.token_hex(8),
        attribution=AttributionRules(lookback=1_000 * DAY),
        layout=layout_named(scene.layout),
        **options,
    )


def meet(graphs: tuple[MongoGraph, MongoGraph], name: str, mode: str) -> dict[int, Any]:
    """What is wrong in the end, by the command between which and the one before they met."""
    scene = SCENES[name]
    wrong: dict[int, Any] = {}
    for nth in range(1, 200):
        rules = rules_of(scene, mode)
        stage = Stage(graphs, scene, rules)
        stage.play(stage.theirs, scene.before)
        met = INTERLOPER.during(
            nth,
            lambda stage=stage: stage.play(stage.mine, scene.mine),  # type: ignore[misc]
            lambda stage=stage: stage.play(stage.theirs, scene.theirs),  # type: ignore[misc]
        )
        stage.deliver()
        if not met:
            return wrong
        if differences := stage.differences():
            wrong[nth] = differences
    raise AssertionError("there is no end of commands")


@pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n, s in SCENES.items() for m in s.modes[: None if FULL else 1]]
)
def test_another_worker_between_any_two_commands(
    name: str, mode: str, graphs: tuple[MongoGraph, MongoGraph]
) -> None:
    """Wherever two decisions meet, the rows are those of the oracle, without a second look."""
    assert meet(graphs, name, mode) == {}


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ("read-first", "somebody claims the device for the first time"),
        ("no-locks", "a person is linked while it claims another device"),
    ],
)
def test_a_meeting_can_be_lost(
    broken: str,
    name: str,
    graphs: tuple[MongoGraph, MongoGraph],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same meetings leave wrong rows where a worker reads first, or does not lock."""
    for part, attributes in (
        (mongo.MongoGraph, ("_decide", "_announce", "_sweep")),
        (mongo._MongoStore, ("lock", "flush")),
    ):
        for attribute in attributes:
            monkeypatch.setattr(part, attribute, getattr(part, attribute))
    BROKEN[broken]()

    assert meet(graphs, name, "references") != {}


def test_a_worker_does_not_know_what_another_one_notes(
    graphs: tuple[MongoGraph, MongoGraph],
) -> None:
    """Rows of days that another worker was the first to see are found by a person's change."""
    scene = Scene(mine=(), theirs=())
    stage = Stage(graphs, scene, rules_of(scene, "references"))
    stage.play(stage.mine, [[event("a", 1, "d0", user_id="u9"), event("b", 1, "d0")]])
    stage.play(stage.theirs, [[event("c", 80, "d2", email="e@x")]])
    stage.play(stage.mine, [[event("l", 1, user_id="u1", email="e@x")]])
    stage.deliver()

    assert stage.differences() == {}


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_graph_is_made_while_another_worker_makes_it(
    nth: int, graphs: tuple[MongoGraph, MongoGraph], mongodb: GivenServer
) -> None:
    """Two workers that open a new graph at once get the same one, also if one works already."""
    del graphs  # the listener is registered
    opened: list[MongoGraph] = []
    batch = [event("m", 1, "d"), event("c", 2, "d", user_id="u1")]
    with mongodb.database() as url:

        def theirs() -> None:
            with closing(open_graph(url)) as graph:
                Recognizer(graph).process(batch)

        met = INTERLOPER.during(nth, lambda: opened.append(MongoGraph(url)), theirs)
        with opened[0] as graph:
            again = Recognizer(graph).process(batch)

            assert met
            assert again.claims == again.updates == 0
            assert graph.stats().references == 1


class Quicker(monitoring.CommandListener):
    """Claims the same device whenever a decision is about to write, which then begins again."""

    def __init__(self, graph: MongoGraph) -> None:
        self._graph = graph
        self._rival = Recognizer(graph)
        self.won = self.lost = 0

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name != "update" or event.command["update"] != "subjects":
            return
        if mongo._GRABBED in str(event.command["updates"][0]["u"].get("$set", {})):
            self._graph._timeout = 0.3  # from now on it waits in vain
            return  # it takes its locks, before it has read anything
        number = self.won + self.lost
        claim = make_event(f"rival-{number}", 100 + number, "d1", user_id=f"rival-{number}")
        try:
            self._rival.process([claim])
            self.won += 1
        except GraphUnavailableError:
            self.lost += 1

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Nothing depends on it."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Nothing depends on it."""


def test_a_decision_is_not_beaten_forever_by_quicker_ones(
    mongodb: GivenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has begun again twice locks first: then it is the others who begin again."""
    with mongodb.database() as url, MongoGraph(url) as other:
        Recognizer(other).process([make_event("first", 1, "d1", user_id="u0")])
        quicker = Quicker(other)
        client = partial(mongo.MongoClient, event_listeners=[quicker])
        monkeypatch.setattr(mongo, "MongoClient", client)
        with MongoGraph(url, timeout=60) as graph:
            done = Recognizer(graph).process([make_event("mine", 50, "d1", user_id="u1")])
            kept = graph._db["subjects"].count_documents({mongo._GRABBED: {"$exists": True}})

    assert done.claims == 1
    assert (quicker.won, quicker.lost) == (mongo._PATIENCE, 1)
    assert kept == 0
