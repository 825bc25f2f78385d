"""The kit on the MongoDB graph, and what only a graph on a server must keep."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import bson
import pytest
from pymongo import monitoring
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import AutoReconnect
from pymongo.read_concern import ReadConcern

import mongod
from mongod import Client, GivenServer, Server, closed_port
from oracle import make_event
from recognition.attribution import DAY, AttributionRules, Policy
from recognition.errors import (
    ConfigurationError,
    GraphReadOnlyError,
    GraphSchemaError,
    GraphUnavailableError,
)
from recognition.events import Event, Identifier
from recognition.graph import Graph, decisions, open_graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.mongo import COLLECTIONS, PERIOD, SCHEMA_VERSION, SLOTS, MongoGraph
from recognition.layouts import LAYOUTS, Row
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, Supersede, TableRules
from recognition.testing import GraphTests
from test_hashing import ANN_HASH, SECRETS, err, live, traces
from test_hashing import RULES as HASHED
from test_mongo_rules import Commands, overheard
from warehouse import Warehouse

SECOND = 1_000_000
START = 1_767_268_800_000_000
ROWS = [name for name in COLLECTIONS if name.startswith("rows_")]
TODAY = int(time.time()) // 86_400
SECRET = "s3cr3t-of-the-url"

DAYS = Rules(target_column="stitched_user_id", default=TableRules(references=References.DAYS))


def later(seconds: float) -> int:
    return START + round(seconds * SECOND)


class TestMongo(GraphTests):
    @pytest.fixture
    def graph(self, mongodb_url: str) -> Iterator[Graph]:
        graph = open_graph(mongodb_url)
        yield graph
        graph.close()

    @pytest.fixture
    def reopen(self, mongodb_url: str) -> Iterator[Callable[[], Graph]]:
        opened: list[Graph] = []

        def reopen() -> Graph:
            opened.append(open_graph(mongodb_url))
            return opened[-1]

        yield reopen
        for graph in opened:
            graph.close()


@pytest.fixture
def graph(mongodb_url: str) -> Iterator[MongoGraph]:
    """An empty graph."""
    with MongoGraph(mongodb_url) as graph:
        yield graph


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server whose users log in, and that writes to its files as it is told, uncompressed."""
    plain = ("--wiredTigerJournalCompressor", "none", "--wiredTigerCollectionBlockCompressor")
    with Server(auth=True, cache_gb=0.25, options=(*plain, "none")) as server:
        yield server


def contents(client: Client, name: str) -> dict[str, Any]:
    """Everything in a database: options and documents of each collection."""
    database = client.get_database(name)
    return {
        found["name"]: (found["options"], sorted(map(repr, database[found["name"]].find())))
        for found in database.list_collections()
    }


def full_text(error: BaseException) -> str:
    """What a traceback shows, with all causes."""
    return "".join(traceback.format_exception(error))


# What is no graph ------------------------------------------------------------------------------


def test_a_server_alone_is_refused_with_the_command() -> None:
    """Without a replica set nothing is written; the text says why it is needed, and what to do."""
    with Server(replica_set=False, cache_gb=0.25) as server:
        with pytest.raises(ConfigurationError) as caught:
            MongoGraph(server.url("graph"))
        with server.client() as client:
            names = client.list_database_names()

    assert "no transactions" in str(caught.value)
    assert "--replSet" in str(caught.value)
    assert "rs.initiate()" in str(caught.value)
    assert "Nothing was written" in str(caught.value)
    assert "graph" not in names


def test_an_older_server_is_refused(mongodb_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A server before 6.0 is named with its version, and with the version that is needed.

    There is no such server here: a real one answers, but for what it says of its version.
    """
    command = Database.command

    def older(self: Any, asked: Any, *args: Any, **kwargs: Any) -> Any:
        answer = command(self, asked, *args, **kwargs)
        if asked == "hello":
            answer["maxWireVersion"] = 13
        if asked == "buildinfo":
            answer["version"] = "5.0.26"
        return answer

    monkeypatch.setattr(Database, "command", older)
    with pytest.raises(ConfigurationError, match=r"is MongoDB 5\.0\.26; 6\.0 or newer is needed"):
        MongoGraph(mongodb_url)
    monkeypatch.undo()
    with MongoGraph(mongodb_url) as graph:
        found = graph.stats()

    assert found.references == 0


@pytest.mark.parametrize("options", ["", "?replicaSet=rs0", "?directConnection=true"])
def test_a_server_that_is_not_there_is_unavailable_in_time(options: str) -> None:
    """Within its timeout, and without the user, the password or the address in the text."""
    began = time.monotonic()
    with closed_port() as port, pytest.raises(GraphUnavailableError) as caught:
        MongoGraph(f"mongodb://somebody:{SECRET}@127.0.0.1:{port}/graph{options}", timeout=0.5)
    took = time.monotonic() - began

    assert 0.4 < took < 10
    assert caught.value.retryable
    assert caught.value.written is False
    assert "Nothing was written" in str(caught.value)
    assert SECRET not in full_text(caught.value)
    for part in ("somebody", "127.0.0.1", str(port)):
        assert part not in str(caught.value)


def test_a_server_that_goes_away_is_unavailable_in_time() -> None:
    """Every call ends within its timeout, and the same call succeeds when the server is back."""
    row, claim = make_event("a", 1, "d1"), make_event("c", 2, "d1", user_id="u1")
    with (
        Server(cache_gb=0.25) as server,
        MongoGraph(f"{server.url('graph')}&serverSelectionTimeoutMS=500") as graph,
    ):
        recognizer = Recognizer(graph)
        recognizer.process([row])
        server.kill(server.members[0])
        graph._timeout = 0.5
        calls: list[Callable[[], object]] = [
            lambda: recognizer.process([claim]),
            lambda: recognizer.explain("a"),
            lambda: graph.lease_updates(1, 60),
            lambda: graph.expire(START),
        ]
        errors, times = [], []
        for call in calls:
            began = time.monotonic()
            with pytest.raises(GraphUnavailableError) as caught:
                call()
            times.append(time.monotonic() - began)
            errors.append(caught.value)
        server.restart(server.members[0])
        server.primary()
        graph._timeout = 30
        done = recognizer.process([claim])
        references = graph.stats().references

    assert max(times) < 10, times
    assert all(error.retryable and error.written is False for error in errors)
    assert not any("127.0.0.1" in str(error) for error in errors)
    assert (done.updates, references) == (1, 1)


NONSENSE = [
    "mongodb://",
    f"mongodb://somebody:{SECRET}@",
    f"mongodb://somebody:{SECRET}@h@st/graph",
    f"mongodb://somebody:{SECRET}/half@host/graph",
    f"mongodb://somebody:{SECRET}@host:port/graph",
    f"mongodb://somebody:{SECRET}@host:99999/graph",
    f"mongodb://somebody:{SECRET}@host/a graph",
    f"mongodb://somebody:{SECRET}@host/a$graph",
    f"mongodb://somebody:{SECRET}@host/graph?replicaSet",
    f"mongodb://somebody:{SECRET}@one,two/graph?directConnection=true",
    f"mongodb://somebody:{SECRET}@[::1/graph",
    f"mongodb+srv://somebody:{SECRET}@host:1/graph",
    f"mongodb+srv://somebody:{SECRET}@one.example.com,two.example.com/graph",
]


@pytest.mark.parametrize("number", range(len(NONSENSE)))
def test_what_is_no_url_is_refused_without_its_password(number: int) -> None:
    """Whether it is opened or initialised, the text says what a URL looks like."""
    opening: list[Callable[[], object]] = [
        lambda: open_graph(NONSENSE[number]),
        lambda: MongoGraph.initialise(NONSENSE[number], sharded=True, run=False),
    ]
    for attempt in opening:
        with pytest.raises(ConfigurationError) as caught:
            attempt()

        assert "mongodb://user:password@host:port/database" in str(caught.value)
        assert "Nothing was written" in str(caught.value)
        assert SECRET not in full_text(caught.value)


WITHOUT_DRIVER = """
import sys
from importlib.abc import MetaPathFinder
class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pymongo", "bson", "gridfs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from recognition.errors import MissingDependencyError
from recognition.graph import open_graph
try:
    open_graph("mongodb://somebody:s3cr3t-of-the-url@127.0.0.1/graph")
except MissingDependencyError as exc:
    print(exc)
"""


def test_a_missing_driver_is_named_with_its_command() -> None:
    """Without pymongo the text says what to install."""
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert 'pip install "recognition[mongo]"' in said.stdout
    assert SECRET not in said.stdout + said.stderr


# What somebody else put there ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collection", "document"),
    [
        ("meta", {"title": "somebody's own"}),
        ("meta", {"_id": "schema", "title": "somebody's own"}),
        ("subjects", {"name": "physics"}),
        ("claims", {"insurance": 1}),
        ("links", {"href": "https://example.com"}),
        ("outbox", {"to": "ann@example.com"}),
        ("rows_00", {"cells": []}),
    ],
)
def test_a_foreign_database_is_left_alone(
    mongodb: GivenServer, mongodb_url: str, collection: str, document: dict[str, Any]
) -> None:
    """Collections of somebody else with our names: refused, and not a byte is written."""
    with mongodb.client() as client:
        name = mongodb_url.rpartition("/")[2].partition("?")[0]
        client[name][collection].insert_one(document)
        before = contents(client, name)
        for _ in range(2):
            with pytest.raises(GraphSchemaError, match="Nothing was written") as caught:
                MongoGraph(mongodb_url)
        after = contents(client, name)

    assert "name another database" in str(caught.value)
    assert "ann@" not in str(caught.value)
    assert after == before


def test_an_empty_collection_of_another_kind_is_refused(
    mongodb: GivenServer, mongodb_url: str
) -> None:
    """A collection that is not clustered would be slow for good; nothing is made beside it."""
    with mongodb.client() as client:
        name = mongodb_url.rpartition("/")[2].partition("?")[0]
        client[name].create_collection("rows_03")
        with pytest.raises(GraphSchemaError, match="rows_03 is not clustered"):
            MongoGraph(mongodb_url)
        names = client[name].list_collection_names()

    assert names == ["rows_03"]


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, None])
def test_another_version_of_the_schema_is_refused(
    mongodb: GivenServer, mongodb_url: str, version: int | None
) -> None:
    """Older or newer: the text names both versions, and nothing is written."""
    with MongoGraph(mongodb_url) as graph:
        Recognizer(graph).process([make_event("a", 1, "d1")])
        graph._db["meta"].update_one({"_id": "schema"}, {"$set": {"version": version}})
    with mongodb.client() as client:
        before = contents(client, graph._db.name)
        with pytest.raises(GraphSchemaError, match="Nothing was written") as caught:
            MongoGraph(mongodb_url)
        after = contents(client, graph._db.name)

    assert f"version {version}, this release needs {SCHEMA_VERSION}" in str(caught.value)
    assert after == before


def test_many_processes_may_open_an_empty_database_at_once(mongodb_url: str) -> None:
    """Whoever is first makes the salt; all of them find the same graph."""
    with ExitStack() as opened:
        graphs = list(map(opened.enter_context, _at_once([lambda: MongoGraph(mongodb_url)] * 6)))
        for number, graph in enumerate(graphs):
            Recognizer(graph).process([make_event(f"m{number}", number + 1, "d1")])
        done = Recognizer(graphs[0]).process([make_event("c", 9, "d1", user_id="u1")])
        (update,) = [delivery.update for delivery in graphs[1].lease_updates(10, 60)]

    assert done.updates == 1
    assert update.expected_rows == 6


def _at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


# Users and their rights ------------------------------------------------------------------------


def every_write(graph: Graph) -> dict[str, Callable[[], object]]:
    """Every call that writes, on a graph with the device d1, its owner u1, and one update."""
    recognizer = Recognizer(graph)
    one, other = Identifier("user_id", "u1"), Identifier("email", "a@x.com")
    return {
        "anonymous": lambda: recognizer.process([make_event("x", 5, "d7")]),
        "another day": lambda: recognizer.process([make_event("x", DAY * 3, "d1")]),
        "identified": lambda: recognizer.process([make_event("y", 6, "d8", user_id="u8")]),
        "unlink": lambda: recognizer.unlink(one, other),
        "release": lambda: recognizer.release("d1"),
        "forget": lambda: recognizer.forget(one),
        "lease": lambda: graph.lease_updates(10, 60),
        "acknowledge": lambda: graph.acknowledge([1]),
        "return": lambda: graph.return_updates([1], "why", dead=False),
        "expire": lambda: graph.expire(DAY),
    }


def fill(graph: Graph) -> None:
    Recognizer(graph).process([make_event("a", 1, "d1")])
    Recognizer(graph).process([make_event("c", 2, "d1", user_id="u1", email="a@x.com")])


def test_who_may_only_read_is_told_so(locked: Server) -> None:
    """He sees what is there; every call that writes is refused, and writes nothing."""
    with MongoGraph(locked.url("read")) as graph:
        fill(graph)
    with locked.client() as client, MongoGraph(locked.create_user("read", "read")) as graph:
        before = contents(client, "read")
        seen = graph.stats(), Recognizer(graph).explain(Identifier("user_id", "u1")).found
        refused = {}
        for name, call in every_write(graph).items():
            with pytest.raises(GraphReadOnlyError, match="Nothing was written") as caught:
                call()
            refused[name] = caught.value
        after = contents(client, "read")

    assert (seen[0].references, seen[0].pending_updates, seen[1]) == (1, 1, True)
    assert all("readWrite" in str(error) and not error.retryable for error in refused.values())
    assert after == before


@pytest.mark.parametrize(("database", "role"), [("empty", "read"), ("elsewhere", "readWrite")])
def test_who_may_not_make_a_graph_is_told_so(locked: Server, database: str, role: str) -> None:
    """On an empty database, or on one that is not his: refused, and nothing is made."""
    url = mongod.with_database(locked.create_user(database, role), "empty")
    with pytest.raises(
        GraphReadOnlyError, match=r"role readWrite\)\. Nothing was written"
    ) as caught:
        MongoGraph(url)
    with locked.client() as client:
        names = client.list_database_names()

    assert "empty" not in names
    assert url.partition(":")[2].partition("@")[0] not in str(caught.value)


def test_a_refused_password_is_not_shown(locked: Server) -> None:
    """A wrong password is a mistake in the URL: it is said, and no part of the URL is."""
    url = locked.create_user("graph", "readWrite")
    scheme, _, rest = url.partition("://")
    user = rest.partition(":")[0]
    wrong = f"{scheme}://{user}:{SECRET}@{rest.partition('@')[2]}"
    with pytest.raises(ConfigurationError, match="refused the user or the password") as caught:
        MongoGraph(wrong)

    assert "Nothing was written" in str(caught.value)
    for part in (SECRET, user, "127.0.0.1"):
        assert part not in str(caught.value)
    assert SECRET not in full_text(caught.value)


def test_the_role_that_is_asked_for_is_enough(locked: Server) -> None:
    """Whoever has readWrite on the database makes the graph and does all that there is."""
    with MongoGraph(locked.create_user("enough", "readWrite")) as graph:
        fill(graph)
        for call in every_write(graph).values():
            call()
        found = graph.stats()

    assert found.identifiers > 0


# Workspaces ------------------------------------------------------------------------------------


def test_workspaces_share_nothing(graph: MongoGraph) -> None:
    """The same ids in two workspaces: each is as it would be alone, whatever the other one does."""
    ours = Rules(workspace="ours", traits=("plan",))
    theirs = replace(DAYS, workspace="theirs")
    batches = [
        [make_event(f"m{n}", later(n), f"d{n % 2}") for n in range(6)],
        [make_event("c1", later(7), "d1", user_id="u1", email="a@x.com", traits={"plan": "pro"})],
        [make_event("c2", later(8), "d0", user_id="u2"), make_event("m8", later(9), "d0")],
        [make_event("c3", later(9), "d1", user_id="u3", previous_id="u1", type="alias")],
    ]
    alone = {}
    for rules in (ours, theirs):
        with MemoryGraph() as memory:
            alone[rules.workspace] = [follow(Recognizer(memory, rules), batches) for _ in range(2)]
    first = follow(Recognizer(graph, ours), batches)
    # Everything that leaves something behind, in the one, before and after the other is there.
    undone = Recognizer(graph, replace(ours, workspace="undone"))
    follow(undone, batches)
    undone.forget(Identifier("user_id", "u2"), later(100))
    undone.release("d1", later(100))
    undone.unlink(Identifier("user_id", "u1"), Identifier("email", "a@x.com"))
    second = follow(Recognizer(graph, theirs), batches)
    Recognizer(graph, theirs).forget(Identifier("user_id", "u3"), later(100))
    again = follow(Recognizer(graph, ours), batches)
    seen = [Recognizer(graph, ours).explain(Identifier("user_id", u)).found for u in ("u2", "u3")]
    other = Recognizer(graph, replace(ours, workspace="nobody's"))
    known = [other.explain(subject).found for subject in (Identifier("user_id", "u1"), "m1")]
    empty = other.process([make_event("m1", later(20), "d1")])

    assert [first, again] == alone["ours"]
    assert second == alone["theirs"][0]
    assert len(first.updates) > 1
    assert seen == [True, True]
    assert known == [False, False]
    assert empty.owners == (None,)


@dataclass
class Followed:
    """What came of batches: owners, and updates but for when and in which order they were made."""

    owners: list[object] = field(default_factory=list)
    updates: list[str] = field(default_factory=list)


def follow(recognizer: Recognizer, batches: Sequence[Sequence[Event]]) -> Followed:
    found = Followed()
    graph = recognizer._graph
    for batch in batches:
        found.owners.extend(recognizer.process(batch).owners)
    for delivery in graph.lease_updates(1_000, 60):
        update = delivery.update
        if update.workspace == recognizer.rules.workspace:
            told = update.model_dump(exclude={"id", "sequence", "created_at", "workspace"})
            found.updates.append(repr(told))
        graph.acknowledge([delivery.position])
    found.updates.sort()
    return found


# The outbox ------------------------------------------------------------------------------------


@contextmanager
def clock_shifted(days: float) -> Iterator[None]:
    """This process takes it to be so many days later, wherever it asks for the time of day."""
    shift = days * 86_400
    now, now_ns = time.time, time.time_ns

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=shift)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + shift)
        patch.setattr(time, "time_ns", lambda: now_ns() + round(shift * 1e9))
        patch.setattr(decisions, "datetime", Shifted)
        yield


def put_updates(graph: Graph, count: int) -> None:
    """So many updates into the outbox."""
    recognizer = Recognizer(graph)
    recognizer.process([make_event(f"m{n}", 1, f"d{n}") for n in range(count)])
    done = recognizer.process([make_event(f"c{n}", 2, f"d{n}", user_id="u") for n in range(count)])
    assert done.updates == count


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until the condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


@pytest.mark.parametrize("days", [-1, 1])
def test_leases_go_by_the_clock_of_the_server(graph: MongoGraph, days: float) -> None:
    """A client whose clock is a day off neither takes what is leased nor leases for a day."""
    put_updates(graph, 2)
    graph.lease_updates(1, 600)
    began = time.monotonic()
    with clock_shifted(days):
        mine = graph.lease_updates(10, 3.0)
        hidden = graph.lease_updates(10, 600)
    wait_for(lambda: graph.lease_updates(10, 600))
    took = time.monotonic() - began

    assert len(mine) == 1
    assert hidden == []
    assert took > 2.5


LEASING = """
import sys
from recognition.graph.mongo import MongoGraph
with MongoGraph(sys.argv[1]) as graph:
    for _ in sys.stdin:
        print(*[delivery.position for delivery in graph.lease_updates(5, 600)], flush=True)
"""


def test_processes_lease_different_updates(graph: MongoGraph, mongodb_url: str) -> None:
    """Two that lease at the same moment, 20 times, get some each time, and never the same."""
    put_updates(graph, 200)
    found: list[list[int]] = []
    with ExitStack() as opened:
        workers = [
            opened.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", LEASING, mongodb_url],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        for _ in range(20):
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
            for worker in workers:
                assert worker.stdout is not None
                found.append([int(position) for position in worker.stdout.readline().split()])
        for worker in workers:
            worker.communicate(timeout=60)
    left = graph.lease_updates(1_000, 600)
    positions = [position for part in found for position in part]

    assert all(found), found
    assert len(positions) == len(set(positions)) == 200 - len(left)
    assert set(positions).isdisjoint(delivery.position for delivery in left)


def test_a_lease_that_a_lost_primary_had_written_is_found(
    graph: MongoGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its successor shows it to majority reads a moment later: between two looks of the next try.

    Nobody would have known of the lease, and no worker got its updates until it was over.
    """
    put_updates(graph, 3)
    written: list[Callable[[], object]] = []
    looks: list[object] = []
    find, update_many = Collection.find, Collection.update_many

    def lose_connection(collection: Any, *arguments: Any) -> object:
        if not written:
            written.append(lambda: update_many(collection, *arguments))
            raise AutoReconnect("connection closed")
        return update_many(collection, *arguments)

    def see_it_late(collection: Any, *arguments: Any) -> object:
        if collection.name == "outbox":
            looks.append(arguments)
            if len(looks) == 3:  # what is free; before it, whether some are ours
                written[0]()
        return find(collection, *arguments)

    monkeypatch.setattr(Collection, "update_many", lose_connection)
    monkeypatch.setattr(Collection, "find", see_it_late)
    leased = graph.lease_updates(10, 600)

    assert len(leased) == 3
    assert len(looks) == 4


def test_destination_that_is_behind_costs_the_others_nothing(mongodb_url: str) -> None:
    """What one has done, and another has not, is not looked at again by the one."""
    commands = Commands()
    with overheard(mongodb_url, commands) as graph:
        for name in ("fast", "slow"):
            graph.add_destination(name)
        put_updates(graph, 300)
        leased = graph.lease_updates(290, 600, "fast")
        graph.acknowledge([d.position for d in leased[:280]], "fast")
        graph.hold_updates(
            [d.position for d in leased[280:]], 600, applied=True, destination="fast"
        )
        commands.take()
        last = graph.lease_updates(20, 600, "fast")
        asked = [command for name, command in commands.take() if name == "find"]
        looks = [command for command in asked if command.get("projection") == {"_id": 1}]
        cost = []
        for command in looks:
            command = {key: command[key] for key in ("find", "filter", "sort", "limit")}
            found = graph._db.command("explain", command, verbosity="executionStats")
            cost.append(found["executionStats"]["totalDocsExamined"])
        waiting = [graph.backlog(name).waiting for name in ("fast", "slow")]

    assert len(last) == 10
    assert len(looks) == 2
    assert sum(cost) <= 10, cost
    assert waiting == [10, 300]


def test_what_a_dead_worker_left_done_leaves_with_the_next(mongodb_url: str) -> None:
    """Updates that all have applied, and nobody took out, are taken out when a worker starts."""
    with MongoGraph(mongodb_url) as graph:
        graph.add_destination("one")
        put_updates(graph, 3)
        leased = graph.lease_updates(2, 600, "one")
        graph._drop_done = lambda chosen: None  # type: ignore[method-assign]
        graph.acknowledge([d.position for d in leased], "one")
    with MongoGraph(mongodb_url) as graph:
        before = graph._db["outbox"].count_documents({"_id": {"$gt": 0}})
        free = graph.lease_updates(10, 0, "one")
        graph.add_destination("one")
        after = graph._db["outbox"].count_documents({"_id": {"$gt": 0}})

    assert (before, len(free), after) == (3, 1, 1)


def test_updates_are_counted_without_being_read(mongodb_url: str) -> None:
    """What waits is counted by the metadata of the collection; only sweeps are looked up."""
    commands = Commands()
    with overheard(mongodb_url, commands) as graph:
        put_updates(graph, 30)
        for delivery in graph.lease_updates(4, 600):
            graph.return_updates([delivery.position], "no such table", dead=True)
        commands.take()
        found = graph.stats()
        asked = [
            (name, command)
            for name, command in commands.take()
            if command.get(name) in ("outbox", "dead")
        ]

    assert (found.pending_updates, found.dead_updates) == (26, 4)
    assert {(name, command[name]) for name, command in asked} >= {
        ("count", "outbox"),
        ("count", "dead"),
    }
    for name, command in asked:
        if name == "count":  # without a condition it is a number that the server keeps
            assert not command.get("query")
        else:
            assert (name, command["pipeline"][0]) == ("aggregate", {"$match": {"_id": {"$lt": 0}}})


def test_dead_updates_come_back_when_they_are_returned(graph: MongoGraph) -> None:
    """They are listed with the reason, leased again once returned, and gone when acknowledged."""
    put_updates(graph, 3)
    first, second, third = graph.lease_updates(10, 600)
    graph.return_updates([first.position, second.position], "no such table", dead=True)
    listed = [(delivery.position, why) for delivery, why in graph.dead_updates(10)]
    oldest = [delivery.position for delivery, _ in graph.dead_updates(1)]
    hidden = graph.lease_updates(10, 600)
    graph.return_updates([first.position], "", dead=False)
    again = graph.lease_updates(10, 600)
    left = [delivery.position for delivery, _ in graph.dead_updates(10)]
    graph.acknowledge([first.position, second.position, third.position])
    found = graph.stats()

    assert listed == [(first.position, "no such table"), (second.position, "no such table")]
    assert oldest == [first.position]
    assert hidden == []
    assert [(d.position, d.update, d.attempts) for d in again] == [
        (first.position, first.update, 1)
    ]
    assert left == [second.position]
    assert (found.pending_updates, found.dead_updates) == (0, 0)


def test_nothing_is_leased_when_nothing_is_asked_for(graph: MongoGraph) -> None:
    """A limit of none is none, which MongoDB would take for all."""
    put_updates(graph, 2)
    nothing = graph.lease_updates(0, 600)
    (first, _) = graph.lease_updates(10, 600)
    graph.return_updates([first.position], "why", dead=True)

    assert nothing == []
    assert graph.dead_updates(0) == []
    assert len(graph.dead_updates(1)) == 1


def test_clocks_of_clients_decide_nothing(mongodb_url: str) -> None:
    """Two workers whose clocks are two days apart leave the rows that one right one would leave."""
    rng = random.Random(8)
    rules = Rules(stamps=False, default=TableRules(supersede=Supersede.VERSION))
    events = [
        make_event(
            f"m{n}",
            later(rng.randrange(50 * 86_400)),
            f"d{rng.randrange(4)}",
            user_id=f"u{rng.randrange(4)}" if rng.random() < 0.4 else None,
        )
        for n in range(120)
    ]
    batches = [events[start : start + 10] for start in range(0, len(events), 10)]

    def rows(graphs: Sequence[Graph], days: Sequence[float]) -> dict[str, Any]:
        warehouse = Warehouse()
        loaded: list[Row] = [rules.layout.row_of(event, "events") for event in events]
        warehouse.load("events", loaded)
        for number, batch in enumerate(batches):
            with clock_shifted(days[number % len(days)]):
                Recognizer(graphs[number % len(graphs)], rules).process(batch)
        warehouse.apply([delivery.update for delivery in graphs[0].lease_updates(10_000, 60)])
        return {name: row["user_id"] for name, row in warehouse.tables["events"].items()}

    with MongoGraph(mongodb_url) as one, MongoGraph(mongodb_url) as other, MemoryGraph() as memory:
        skewed = rows([one, other], [-1, 1])
        right = rows([memory], [0])

    assert skewed == right
    assert len({value for value in right.values() if value is not None}) == 4


# Sweeps that were left behind ------------------------------------------------------------------

KILLED = """
import os, signal, sys
from functools import partial
from pymongo import MongoClient, monitoring
from oracle import make_event
from recognition.graph import mongo
from recognition.recognizer import Recognizer

class Killer(monitoring.CommandListener):
    def started(self, event):
        if event.command_name == "commitTransaction":
            # Another worker takes a row in, that this decision has not seen.
            Recognizer(other).process([make_event("between", 3, "d1")])
    def succeeded(self, event):
        if event.command_name == "commitTransaction":
            os.kill(os.getpid(), signal.SIGKILL)
    def failed(self, event):
        pass

other = mongo.MongoGraph(sys.argv[1])
Recognizer(other).process([make_event("before", 1, "d1")])
mongo.MongoClient = partial(MongoClient, event_listeners=[Killer()])
Recognizer(mongo.MongoGraph(sys.argv[1])).process([make_event("claim", 9, "d1", user_id="u1")])
"""


def die_after_commit(url: str) -> None:
    """A worker claims d1 and is killed after its commit; a row came while it decided."""
    env = {**os.environ, "PYTHONPATH": str(Path(mongod.__file__).parent)}
    died = subprocess.run(
        [sys.executable, "-c", KILLED, url], env=env, capture_output=True, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr


def owners(graph: Graph) -> Mapping[str, object]:
    """Rows of d1 after all updates that wait, which stay there."""
    warehouse = Warehouse()
    events = [make_event("before", 1, "d1"), make_event("between", 3, "d1")]
    warehouse.load("events", [Rules().layout.row_of(event, "events") for event in events])
    leased = graph.lease_updates(100, 600)
    warehouse.apply([delivery.update for delivery in leased])
    graph.return_updates([delivery.position for delivery in leased], "", dead=False)
    return {name: row["user_id"] for name, row in warehouse.tables["events"].items()}


def sweeps(graph: MongoGraph) -> int:
    """Also when a majority does not know yet that one is gone."""
    outbox = graph._db["outbox"].with_options(read_concern=ReadConcern("local"))
    return outbox.count_documents({"_id": {"$lt": 0}})


def test_a_sweep_that_was_left_behind_is_done_at_once_when_asked(mongodb_url: str) -> None:
    """`recover` does what a killed worker did not come to, in its own workspace only, and once."""
    die_after_commit(mongodb_url)
    with MongoGraph(mongodb_url) as graph:
        Recognizer(graph).process([make_event("other", 1, "d2")])  # it has looked just now
        before, left = owners(graph), sweeps(graph)
        elsewhere = graph.recover(Rules(workspace="another"))
        still = sweeps(graph)
        emitted = graph.recover(Rules())
        after = owners(graph)
        gone = not sweeps(graph)
        again = graph.recover(Rules())

    assert before == {"before": "u1", "between": None}
    assert (left, elsewhere, still) == (1, 0, 1)
    assert emitted > 0
    assert gone
    assert after == {"before": "u1", "between": "u1"}
    assert again == 0


@pytest.mark.parametrize("days", [-1, 1])
def test_a_sweep_that_was_left_behind_is_done_by_whoever_works(
    mongodb_url: str, days: float
) -> None:
    """The next batches do it, some time after they saw it first, even if the clock is set back."""
    die_after_commit(mongodb_url)
    with MongoGraph(mongodb_url, grace=0.6) as graph:

        def work() -> bool:
            Recognizer(graph).process([make_event("other", 1, "d2")])
            return owners(graph)["between"] is not None

        began = time.monotonic()
        with clock_shifted(days):
            early = work()
        wait_for(work)
        took = time.monotonic() - began
        left = sweeps(graph)
        after = owners(graph)

    assert not early
    assert took > 0.5
    assert left == 0
    assert after == {"before": "u1", "between": "u1"}


# Values that are hashed ------------------------------------------------------------------------


def everything_of(server: Server, url: str, rules: Rules) -> tuple[bytes, bytes, bytes]:
    """A whole life; then all documents of the server, all of its files, and all that was sent."""
    commands = Commands()
    with overheard(url, commands) as graph:
        live(graph, rules)
        err(graph, rules)
        for delivery in graph.lease_updates(3, 60):
            graph.return_updates([delivery.position], "why", dead=True)
        graph.stats()
    sent = b"".join(bson.encode({name: command}) for name, command in commands.take())
    documents = []
    with server.client() as client:
        client.admin.command("fsync")
        ours = client[url.partition("?")[0].rpartition("/")[2]]
        places = [ours[name] for name in ours.list_collection_names()]
        for place in (*places, client.local["oplog.rs"], client.config["transactions"]):
            documents += list(place.find())
    stored = b"".join(bson.encode({"document": document}) for document in documents)
    files = b"".join(
        path.read_bytes().rstrip(b"\0")
        for path in sorted(server.folder.rglob("*"))
        if path.is_file() and "Preplog" not in path.name  # 100 MB of zeros each
    )
    return stored, files, sent


def test_a_hashed_value_is_nowhere_on_the_server(locked: Server) -> None:
    """
    Not in a document, not in the log of operations, not in a file, not in a command sent.

    Without hashes all of these places have it afterwards: the search can fail.
    """
    hashed = everything_of(locked, locked.url("hashed"), HASHED)
    plain = everything_of(locked, locked.url("plain"), Rules(traits=("plan",)))

    for place, data, control in zip(("documents", "files", "sent"), hashed, plain, strict=True):
        assert ANN_HASH.value.encode() in data, place
        assert traces(data, *SECRETS) == [], place
        assert any(trace.startswith("plain of") for trace in traces(control, *SECRETS)), place


# Retention -------------------------------------------------------------------------------------


def slot_of(day: int) -> str:
    return f"rows_{day // PERIOD % SLOTS:02}"


def on_day(day: int, name: str, device: str = "d1", user: str | None = None) -> Event:
    return make_event(name, day * DAY + SECOND, device, user_id=user)


def identity_of(graph: MongoGraph, name: str) -> tuple[Any, Mapping[str, Any]]:
    """Which collection it is, whatever its name, and its options."""
    (found,) = graph._db.list_collections(filter={"name": name})
    return found["info"]["uuid"], found["options"]


@pytest.mark.parametrize("rules", [Rules(), DAYS], ids=["ids", "days"])
def test_old_collections_are_replaced_by_empty_ones(graph: MongoGraph, rules: Rules) -> None:
    """Nothing is deleted row by row; the new ones are clustered and compressed as the old ones."""
    recognizer = Recognizer(graph, rules)
    old, kept = TODAY - 100, TODAY - 3
    recognizer.process([on_day(old, "old"), on_day(kept, "kept"), on_day(old + 1, "older")])
    before = {
        name: identity_of(graph, slot_of(day)) for name, day in (("old", old), ("kept", kept))
    }
    dropped = graph.expire((TODAY - 30) * DAY)
    after = {name: identity_of(graph, slot_of(day)) for name, day in (("old", old), ("kept", kept))}
    left = graph._db[slot_of(old)].count_documents({})
    again = graph.expire((TODAY - 30) * DAY)
    done = recognizer.process([on_day(TODAY, "claim", user="u1")])
    (update,) = [delivery.update for delivery in graph.lease_updates(10, 60)]
    days = {
        (bound - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(days=1)
        for criterion in update.where
        for bound in (getattr(criterion, "start", None), getattr(criterion, "end", None))
        if bound is not None
    }

    assert dropped == 2
    assert again == 0
    assert left == 0
    assert after["old"][0] != before["old"][0]
    assert after["old"][1] == before["old"][1]
    assert after["old"][1]["clusteredIndex"]["unique"]
    assert "zstd" in str(after["old"][1])
    assert after["kept"] == before["kept"]
    assert graph._db.list_collection_names().count(f"{slot_of(old)}_new") == 0
    assert done.updates == 1
    assert min(days) == kept


def test_a_collection_that_is_partly_old_only_hides_its_rows(graph: MongoGraph) -> None:
    """What is in it stays until `compact`, and is not seen from then on."""
    recognizer = Recognizer(graph)
    first = (TODAY // PERIOD - 1) * PERIOD
    recognizer.process([on_day(first + 1, "old"), on_day(first + 20, "kept")])
    before = identity_of(graph, slot_of(first))
    dropped = graph.expire((first + 10) * DAY)
    hidden = graph._db[slot_of(first)].count_documents({})
    references = graph.stats().references
    found = recognizer.explain("old").found, recognizer.explain("kept").found
    recognizer.process([on_day(first + 21, "claim", user="u1")])
    (update,) = [delivery.update for delivery in graph.lease_updates(10, 60)]
    graph.compact()
    compacted = graph._db[slot_of(first)].count_documents({})

    assert dropped == 1
    assert identity_of(graph, slot_of(first)) == before
    assert (hidden, compacted, references) == (2, 1, 1)
    assert found == (False, True)
    assert update.expected_rows == 1


@pytest.mark.parametrize("other", [False, True], ids=["same process", "other process"])
@pytest.mark.parametrize("rules", [Rules(), DAYS], ids=["ids", "days"])
def test_rows_of_a_dropped_day_that_come_late_are_seen(
    mongodb_url: str, rules: Rules, other: bool
) -> None:
    """They are noted again, also by a process that learns from the database what was dropped."""
    old = TODAY - 100
    with MongoGraph(mongodb_url, grace=0.2) as graph, MongoGraph(mongodb_url) as cleaner:
        recognizer = Recognizer(graph, rules)
        batch = [on_day(old, "early 1", "d1"), on_day(old, "early 2", "d2")]
        recognizer.process([*batch, on_day(TODAY, "today", "d3")])
        (cleaner if other else graph).expire((TODAY - 30) * DAY)
        if other:
            time.sleep(0.2)  # from then on it has looked
        for number in (1, 2):  # the second one finds the day noted
            recognizer.process([on_day(old, f"late {number}", f"d{number}")])
        documents = graph._db[slot_of(old)].count_documents({})
        counts = [
            recognizer.process([on_day(old + 1, f"claim {device}", device, "u1")]).updates
            for device in ("d1", "d2")
        ]
        updates = [delivery.update for delivery in graph.lease_updates(10, 60)]

    assert documents == 2
    assert counts == [1, 1]
    assert [update.expected_rows for update in updates] == [None if rules is DAYS else 1] * 2


class Between(monitoring.CommandListener):
    """Does something once, after the first command of a kind that is sent when it is armed."""

    def __init__(self, name: str, collection: str, do: Callable[[], object]) -> None:
        self._wanted = (name, collection)
        self._do: Callable[[], object] | None = do
        self.errors: list[BaseException] = []
        self.is_armed = False
        self._names: dict[int, object] = {}

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self._names[event.request_id] = event.command.get(event.command_name)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        sent = event.command_name, self._names.pop(event.request_id, None)
        if self.is_armed and sent == self._wanted:
            do, self._do = self._do, None
            try:
                if do is not None:
                    do()
            except BaseException as exc:  # the driver would only print it
                self.errors.append(exc)

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass

    @property
    def is_done(self) -> bool:
        return self._do is None and not self.errors


def test_a_day_that_is_noted_while_others_are_dropped_loses_no_row(mongodb_url: str) -> None:
    """A worker begins a day that shares its collection with old ones, as they are dropped."""
    new = TODAY - 1
    old = new - SLOTS * PERIOD
    with MongoGraph(mongodb_url) as worker:
        recognizer = Recognizer(worker)
        recognizer.process([on_day(old, "old")])
        listener = Between("update", "meta", lambda: recognizer.process([on_day(new, "new")]))
        with overheard(mongodb_url, listener) as cleaner:
            listener.is_armed = True
            dropped = cleaner.expire((TODAY - 30) * DAY)
        done = recognizer.process([on_day(TODAY, "claim", user="u1")])

    assert slot_of(old) == slot_of(new)
    assert listener.is_done
    assert dropped == 1
    assert done.updates == 1


def test_a_day_that_is_noted_while_compact_looks_loses_no_row(mongodb_url: str) -> None:
    """A worker begins a day, and a table, after `compact` has asked which days are kept."""
    with MongoGraph(mongodb_url) as worker:
        recognizer = Recognizer(worker)
        recognizer.process([on_day(TODAY - 9, "old"), on_day(TODAY - 2, "kept")])
        worker.expire((TODAY - 5) * DAY)
        other = Recognizer(worker, Rules(layout=LAYOUTS["segment"]))

        def begin() -> None:
            recognizer.process([on_day(TODAY - 1, "new")])
            other.process([replace(on_day(TODAY - 2, "new table"), name="Signed up")])

        listener = Between("find", "meta", begin)
        with overheard(mongodb_url, listener) as cleaner:
            listener.is_armed = True
            freed = cleaner.compact()
        references = worker.stats().references
        documents = sum(worker._db[name].count_documents({}) for name in ROWS)

    assert listener.is_done
    assert freed > 0
    assert documents == references == 3


@pytest.mark.parametrize("stamps", [True, False])
def test_a_day_that_two_workers_mark_has_rows_of_both(stamps: bool, mongodb_url: str) -> None:
    """
    A claim names the day that its own batch has marked, too: another row may lie on it by then.

    One worker marks the day; another one finds it marked, sees no claim yet and is done; then the
    first one decides about the claim of its batch.
    """
    rules = Rules(
        attribution=AttributionRules(policy=Policy.FIRST_CLAIM),
        target_column="stitched",
        default=TableRules(references=References.DAYS),
        stamps=stamps,
    )
    warehouse = Warehouse()
    with MongoGraph(mongodb_url) as first, MongoGraph(mongodb_url) as second:
        announce = first._announce
        other = [make_event("other", 5 * DAY + 1, "d")]

        def announce_and_wait(*arguments: Any) -> Any:
            announced = announce(*arguments)
            take(second, other)
            return announced

        def take(graph: MongoGraph, batch: list[Event]) -> None:
            recognizer = Recognizer(graph, rules)
            for table, rows in recognizer.rows(recognizer.process(batch)).items():
                warehouse.load(table, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(first, "_announce", announce_and_wait)
            take(
                first,
                [
                    make_event("mine", 5 * DAY, "d"),
                    make_event("claim", 6 * DAY, "d", user_id="u1"),
                ],
            )
        warehouse.apply(item.update for item in first.lease_updates(100, 60))
    rows = warehouse.tables["events"]

    assert {name: row.get("stitched") for name, row in rows.items()} == {
        "mine": "u1",
        "other": "u1",
        "claim": "u1",
    }
