"""What the MongoDB graph sends and stores: how many commands, which keys, how many bytes."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from typing import Any

import bson
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient, monitoring

from oracle import make_event
from recognition.attribution import DAY, END, AttributionRules, Policy
from recognition.events import Event, Identifier
from recognition.graph import mongo
from recognition.graph.mongo import COLLECTIONS, MongoGraph
from recognition.graph.store import Rows
from recognition.layouts import LAYOUTS
from recognition.messages import Between, Messages
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, TableRules

SECOND = 1_000_000
START = 1_767_268_800_000_000

Command = tuple[str, Mapping[str, Any]]

#: Bytes of a key. A clustered collection needs one length: BSON compares lengths of binaries first.
DIGEST = 12
KEY_SIZES = {"subjects": DIGEST, "claims": DIGEST + 24, "links": 3 * DIGEST + 1}
ROW_KEY_SIZE = DIGEST + 26
CLUSTERED = {"claims", *(name for name in COLLECTIONS if name.startswith("rows_"))}
DISTRIBUTED = {"subjects", "links", *CLUSTERED}


class Commands(monitoring.CommandListener):
    """What a client sends, as the driver tells it: a name and the whole command."""

    def __init__(self) -> None:
        self.sent: list[Command] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        # A copy: the driver goes on with its own.
        self.sent.append((event.command_name, dict(event.command)))

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        pass

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass

    def take(self) -> list[Command]:
        """What was sent since the last time."""
        sent, self.sent = self.sent, []
        return sent


@contextmanager
def overheard(
    url: str, listener: monitoring.CommandListener, **options: Any
) -> Iterator[MongoGraph]:
    """A graph whose commands are told to the listener."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mongo, "MongoClient", partial(MongoClient, event_listeners=[listener]))
        graph = MongoGraph(url, **options)
    with graph:
        yield graph


def new_id() -> str:
    return str(uuid.uuid4())


def later(seconds: float) -> int:
    return START + round(seconds * SECOND)


# How many commands ----------------------------------------------------------------------------


def anonymous(count: int) -> list[list[Event]]:
    return [[make_event(new_id(), later(n), f"d{count}-{n % 50}") for n in range(count)]]


def devices(count: int, user: str | None = None, start: float = 0, **known: str) -> list[Event]:
    """One event of each device, of a user of its own; in ``known`` a ``#`` is the number."""
    return [
        make_event(
            new_id(),
            later(start + n / 100),
            f"d{count}-{n}",
            user_id=None if user is None else f"{user}{count}-{n}",
            **{name: value.replace("#", f"{count}-{n}") for name, value in known.items()},
        )
        for n in range(count)
    ]


def many_days(count: int) -> list[list[Event]]:
    """Anonymous events of half a year, so that every collection of rows is written."""
    return [[make_event(new_id(), START - n * 19 % 191 * DAY, f"d{n % 50}") for n in range(count)]]


def many_tables(count: int) -> list[list[Event]]:
    """Each event in a table of its own, which nobody has seen before."""
    return [
        [
            make_event(new_id(), later(n), f"d{count}", name=f"event {count} {n}", type="track")
            for n in range(count)
        ]
    ]


def pairs(count: int) -> list[list[Event]]:
    """Persons of two identifiers each; then a third one joins each with the next."""
    together = [
        event
        for n in range(count)
        for event in [make_event(new_id(), later(20), f"d{count}-{n}", email=f"{count}-{n}@x.com")]
    ]
    linked = devices(count, "u", 10, email="#@x.com")
    joining = [
        make_event(
            new_id(),
            later(30),
            f"d{count}-{n}",
            email=f"{count}-{n}@x.com",
            phone=f"+1 {count} {n // 2}",
        )
        for n in range(count)
    ]
    return [linked, together, joining]


#: By kind of batch: how to make it after what came before, and the commands that ten of it cost.
KINDS: dict[str, tuple[Callable[[int], list[list[Event]]], int]] = {
    "anonymous": (anonymous, 2),
    "anonymous, of known days": (lambda n: [devices(n), devices(n, start=50)], 1),
    "anonymous, of half a year": (many_days, 2 + mongo.SLOTS),
    "anonymous, with new tables": (many_tables, 8),
    "anonymous, of claimed devices": (lambda n: [devices(n, "u"), devices(n, start=50)], 3),
    "new persons on new devices": (lambda n: [devices(n, "u")], 9),
    "new persons on devices with rows": (lambda n: [devices(n), devices(n, "u", 50)], 10),
    "a second claim": (lambda n: [devices(n, "u"), devices(n, "v", 50)], 12),
    "a link": (lambda n: [devices(n, "u"), devices(n, "u", 50, email="#@x.com")], 12),
    "merged persons": (pairs, 18),
}


RULES_OF_KINDS = {
    "anonymous, with new tables": Rules(layout=LAYOUTS["segment"]),
    "anonymous, of known days": Rules(
        target_column="stitched_user_id", default=TableRules(references=References.DAYS)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_commands_of_a_batch_do_not_depend_on_its_size(kind: str, mongodb_url: str) -> None:
    """
    Ten events and a thousand cost the same number of commands, but for two that grow slowly.

    What is read of many subjects comes in parts of 500 ranges, and numbers of updates are taken in
    blocks that grow by four.
    """
    make, limit = KINDS[kind]
    rules = RULES_OF_KINDS.get(kind, Rules())
    commands = Commands()
    counted: dict[int, Counter[str]] = {}
    with overheard(mongodb_url, commands, grace=3_600) as graph:
        recognizer = Recognizer(graph, rules)
        warm = 191 if kind == "anonymous, of half a year" else 1
        recognizer.process([make_event(new_id(), START - n * DAY, "before") for n in range(warm)])
        for size in (10, 100, 1_000):
            *before, batch = make(size)
            for earlier in before:
                recognizer.process(earlier)
            commands.take()
            recognizer.process(batch)
            counted[size] = Counter(
                name if name in ("aggregate", "findAndModify") else f"{name} {command[name]}"
                for name, command in commands.take()
            )

    said = "\n".join(f"{size}: {found.total()} {found}" for size, found in counted.items())
    assert counted[10].total() <= limit, said
    growing = ("aggregate", "findAndModify")
    steady = [
        {name: n for name, n in found.items() if name not in growing} for found in counted.values()
    ]
    assert steady[0] == steady[1] == steady[2], said
    for size, found in counted.items():
        # A device and its person in each of two looks, and links and claims of the same people.
        parts = -(-2 * size // mongo._UNION)
        assert found["aggregate"] <= counted[10]["aggregate"] + 3 * (parts - 1), said
        assert found["findAndModify"] <= counted[10]["findAndModify"] + 2, said


def test_anonymous_events_cost_four_commands_at_most(mongodb_url: str) -> None:
    """Also where a device has more claims than its document repeats, and its rows come late."""
    commands = Commands()
    rng = random.Random(3)
    with overheard(mongodb_url, commands, grace=3_600) as graph:
        recognizer = Recognizer(graph)
        recognizer.process([make_event(new_id(), START, "d1")])
        for n in range(60):
            user = f"u{rng.randrange(3)}"
            recognizer.process([make_event(new_id(), later(10 * n), "d1", user_id=user)])
        counted = []
        for size in (10, 100, 1_000):
            batch = [make_event(new_id(), later(rng.uniform(0, 700)), "d1") for _ in range(size)]
            commands.take()
            recognizer.process(batch)
            counted.append([name for name, _ in commands.take()])

    assert all(len(found) <= 4 for found in counted), counted


def test_a_device_is_read_in_one_go_by_a_new_process(mongodb_url: str) -> None:
    """Who has just opened the graph claims rows of days that it never heard of in one update."""
    with MongoGraph(mongodb_url) as graph:
        Recognizer(graph).process([make_event(new_id(), START + n * DAY, "d1") for n in range(5)])
    with MongoGraph(mongodb_url) as graph:
        done = Recognizer(graph).process(
            [
                make_event(new_id(), START + 9 * DAY, "d1"),
                make_event(new_id(), START + 10 * DAY, "d1", user_id="u1"),
            ]
        )
        (update,) = [delivery.update for delivery in graph.lease_updates(10, 60)]

    assert done.updates == 1
    assert update.expected_rows == 5
    assert [c for c in update.where if isinstance(c, Messages)] == []


# Which keys ------------------------------------------------------------------------------------


def is_targeted(collection: str, condition: Mapping[str, Any]) -> bool:
    """
    Whether a condition says by the shard key which few keys it is about.

    That is an equality, a list of equalities, or a range inside one digest. On a clustered
    collection a list is none: MongoDB 6.0 scans from its least to its greatest value.
    """
    size = KEY_SIZES.get(collection, ROW_KEY_SIZE)
    match condition.get("c" if collection == "links" else "_id"):
        case bytes():
            return True
        case {"$in": values, **rest} if not rest:
            return collection not in CLUSTERED and all(isinstance(v, bytes) for v in values)
        case {"$gte": bytes(low), "$lte": bytes(high), **rest} if not rest:
            return len(low) == len(high) == size and low[:DIGEST] == high[:DIGEST]
        case _:
            return False


def conditions_of(name: str, command: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What a command asks of which collection; a document that is inserted asks for itself."""
    match name:
        case "find":
            yield command["find"], command.get("filter", {})
        case "aggregate":
            yield from _of_pipeline(command["aggregate"], command["pipeline"])
        case "update":
            yield from ((command["update"], one["q"]) for one in command["updates"])
        case "delete":
            yield from ((command["delete"], one["q"]) for one in command["deletes"])
        case "insert":
            yield from ((command["insert"], document) for document in command["documents"])
        case "findAndModify":
            yield command["findAndModify"], command.get("query", {})
        case "getMore" | "commitTransaction" | "abortTransaction" | "endSessions":
            pass
        case _:
            raise AssertionError(f"this test does not know what {name} touches")


def _of_pipeline(
    collection: str, pipeline: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    first: Mapping[str, Any] = pipeline[0] if pipeline else {}
    yield collection, first.get("$match", {})
    for stage in pipeline:
        if "$unionWith" in stage:
            joined = stage["$unionWith"]
            if isinstance(joined, str):  # the whole collection
                joined = {"coll": joined, "pipeline": []}
            yield from _of_pipeline(joined["coll"], joined.get("pipeline", []))
        assert not {"$lookup", "$graphLookup", "$facet"} & stage.keys()


def scans(commands: Sequence[Command]) -> list[str]:
    """The commands that do not say which shard they are for."""
    return [
        f"{name} {collection} {condition}"
        for name, command in commands
        for collection, condition in conditions_of(name, command)
        if collection in DISTRIBUTED and not is_targeted(collection, condition)
    ]


LOW, HIGH = bytes(ROW_KEY_SIZE), bytes(DIGEST) + b"\xff" * (ROW_KEY_SIZE - DIGEST)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("find", {"find": "subjects"}),
        ("find", {"find": "subjects", "filter": {"a": "d1"}}),
        ("find", {"find": "subjects", "filter": {"_id": {"$gte": bytes(12)}}}),
        ("find", {"find": "subjects", "filter": {"_id": {"$ne": bytes(12)}}}),
        ("find", {"find": "subjects", "filter": {"$or": [{"_id": bytes(12)}]}}),
        ("find", {"find": "links", "filter": {"_id": bytes(37)}}),
        ("find", {"find": "rows_00", "filter": {"_id": {"$in": [LOW, HIGH]}}}),
        ("find", {"find": "rows_00", "filter": {"_id": {"$gte": LOW}}}),
        ("find", {"find": "rows_00", "filter": {"_id": {"$gte": LOW, "$lte": b"\xff" * 38}}}),
        ("find", {"find": "rows_00", "filter": {"_id": {"$gte": LOW[:12], "$lte": HIGH}}}),
        ("aggregate", {"aggregate": "claims", "pipeline": []}),
        ("aggregate", {"aggregate": "claims", "pipeline": [{"$match": {"o": b""}}]}),
        (
            "aggregate",
            {
                "aggregate": "meta",
                "pipeline": [{"$match": {"_id": "x"}}, {"$unionWith": "rows_00"}],
            },
        ),
        (
            "aggregate",
            {
                "aggregate": "rows_00",
                "pipeline": [
                    {"$match": {"_id": {"$gte": LOW, "$lte": HIGH}}},
                    {"$unionWith": {"coll": "rows_00", "pipeline": [{"$match": {"r": 1}}]}},
                ],
            },
        ),
        ("update", {"update": "subjects", "updates": [{"q": {"v": 1}, "u": {}}]}),
        ("delete", {"delete": "links", "deletes": [{"q": {"_id": bytes(37)}, "limit": 1}]}),
        ("insert", {"insert": "links", "documents": [{"_id": bytes(37)}]}),
        ("findAndModify", {"findAndModify": "subjects", "query": {}}),
    ],
)
def test_a_scan_is_found(name: str, command: Mapping[str, Any]) -> None:
    """A command that does not name its shard does not pass: the test below can fail."""
    assert len(scans([(name, command)])) == 1


def hard_life(seed: int, count: int = 100) -> list[Event]:
    """Events of few devices and persons: claims, late ones, links, merges, aliases, every id."""
    rng = random.Random(seed)
    events = []
    for number in range(count):
        roll = rng.random()
        at = later(rng.randrange(20) if roll < 0.2 else rng.randrange(40 * 86_400))
        device = f"d{rng.randrange(6)}" if rng.random() < 0.9 else None
        user = f"u{rng.randrange(5)}" if roll < 0.5 else None
        email = f"{rng.randrange(5)}@x.com" if rng.random() < 0.3 else None
        phone = f"+1 {rng.randrange(4)}" if rng.random() < 0.15 else None
        known = user or email or phone
        previous = f"u{rng.randrange(5)}" if known and rng.random() < 0.05 else None
        uuids = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        events.append(
            make_event(
                uuids if rng.random() < 0.7 else f"text {number}",
                at + (number if rng.random() < 0.3 else 0),
                device,
                user_id=user,
                email=email,
                phone=phone,
                previous_id=previous,
                type="track" if previous is None else "alias",
                traits={"plan": rng.choice(["free", "pro"])},
            )
        )
    # A device that is claimed by many at one instant, and one that is claimed all the time.
    events += [make_event(f"one {n}", later(5), "d0", user_id=f"u{n % 5}") for n in range(20)]
    events += [make_event(f"two {n}", later(n), "d1", user_id=f"u{n % 3}") for n in range(60)]
    rng.shuffle(events)
    return events


RULES_OF_ALL_KINDS = [
    *(
        Rules(workspace=policy, attribution=AttributionRules(policy=policy), traits=("plan",))
        for policy in Policy
    ),
    *(
        Rules(
            workspace=f"own column, {kept}",
            target_column="stitched_user_id",
            default=TableRules(references=kept),
            stamps=kept is not References.DAYS,
        )
        for kept in References
    ),
]


@pytest.mark.parametrize("rules", RULES_OF_ALL_KINDS, ids=lambda rules: rules.workspace)
def test_every_command_names_its_shard(rules: Rules, mongodb_url: str) -> None:
    """Nothing that is distributed is read or written without its shard key, whatever happens."""
    commands = Commands()
    events = hard_life(1)
    rng = random.Random(2)
    with overheard(mongodb_url, commands) as graph:
        recognizer = Recognizer(graph, rules)
        commands.take()
        for start in range(0, len(events), 40):
            batch = events[start : start + 40]
            done = recognizer.process(batch)
            recognizer.process(rng.sample(batch, 10))
            recognizer.flushed(done.receipt)
        recognizer.flushed(recognizer.process(events).receipt)
        hot = commands.take()
        recognizer.unlink(Identifier("user_id", "u1"), Identifier("email", "1@x.com"))
        recognizer.unlink(Identifier("user_id", "u2"), Identifier("anonymous_id", "d1"))
        recognizer.release("d0", later(30 * 86_400))
        recognizer.forget(Identifier("user_id", "u3"), later(30 * 86_400))
        recognizer.process(events)
        undo = commands.take()

    touched = {
        (name, collection.partition("_")[0])
        for name, command in (*hot, *undo)
        for collection, _ in conditions_of(name, command)
    }
    expected = {
        *(("find", name) for name in ("subjects", "links", "outbox")),
        *(("aggregate", name) for name in ("claims", "meta")),
        *(("insert", name) for name in ("subjects", "claims", "outbox")),
        *(("update", name) for name in ("subjects", "links", "claims", "meta")),
        *(("delete", name) for name in ("links", "claims", "outbox")),
    }
    if rules.default.references is not References.NONE:
        expected |= {("insert", "rows"), ("aggregate", "rows")}

    assert expected <= touched, expected - touched
    assert scans(hot) == []
    assert scans(undo) == []


def examined(explanation: Any) -> Iterator[tuple[int, int]]:
    """Of each part of a command: documents examined and returned."""
    if isinstance(explanation, Mapping):
        if "totalDocsExamined" in explanation:
            yield explanation["totalDocsExamined"], explanation["nReturned"]
        for value in explanation.values():
            yield from examined(value)
    elif isinstance(explanation, list):
        for value in explanation:
            yield from examined(value)


def cost(graph: MongoGraph, command: Mapping[str, Any]) -> tuple[int, int]:
    """Documents examined and returned, as the server explains it."""
    asked = {
        key: command[key] for key in ("find", "filter", "aggregate", "pipeline") if key in command
    }
    if "pipeline" in command:
        asked["cursor"] = {}
    explained = graph._db.command("explain", asked, verbosity="executionStats")
    found = list(examined(explained))
    assert found, explained
    return sum(one for one, _ in found), sum(other for _, other in found)


def test_a_visitor_is_read_without_its_neighbours(mongodb_url: str) -> None:
    """Of thousands of devices a claim examines the rows and claims of one, and two more a range."""
    commands = Commands()
    rng = random.Random(4)
    with overheard(mongodb_url, commands) as graph:
        recognizer = Recognizer(graph)
        for _ in range(10):
            recognizer.process(
                [
                    make_event(new_id(), START + rng.randrange(20 * DAY), f"d{rng.randrange(500)}")
                    for _ in range(500)
                ]
            )
        for n in range(40):
            recognizer.process(
                [
                    make_event(new_id(), START + n * DAY, f"d{n}", user_id=f"u{n}")
                    for n in range(n * 10, n * 10 + 10)
                ]
            )
            recognizer.process(
                [make_event(new_id(), START + n * DAY // 2, "d0", user_id=f"u{n % 3}")]
            )
        recognizer.process(
            [make_event(new_id(), START + 5 * DAY + n * SECOND, "d0") for n in range(50)]
        )
        commands.take()
        claim = make_event(new_id(), START + 5 * DAY + SECOND, "d0", user_id="new")
        done = recognizer.process([claim])
        found = {
            f"{name} {command[name]} {number}": (
                *cost(graph, command),
                len(str(command).split("$gte")),
            )
            for number, (name, command) in enumerate(commands.take())
            if name in ("find", "aggregate")
        }
        whole = {"find": "claims", "filter": {"_id": {"$gte": bytes(36)}}}
        control, _ = cost(graph, whole)

    returned = sum(one for _, one, _ in found.values())

    assert done.updates > 0
    assert control > 400
    assert returned > 10, found
    for name, (read, given_back, ranges) in found.items():
        assert read <= given_back + 2 * ranges, (name, found)


# How many bytes --------------------------------------------------------------------------------


def documents(graph: MongoGraph) -> dict[str, list[dict[str, Any]]]:
    return {name: list(graph._db[name].find()) for name in graph._db.list_collection_names()}


def largest(graph: MongoGraph) -> dict[str, int]:
    """Bytes of the largest document of each collection that has any."""
    size = [{"$group": {"_id": None, "n": {"$max": {"$bsonSize": "$$ROOT"}}}}]
    return {name: found["n"] for name in COLLECTIONS for found in graph._db[name].aggregate(size)}


def check_keys(graph: MongoGraph) -> None:
    """All keys of a distributed collection have one length."""
    for name in DISTRIBUTED:
        sizes = {len(document["_id"]) for document in graph._db[name].find({}, {"_id": 1})}
        assert sizes <= {KEY_SIZES.get(name, ROW_KEY_SIZE)}, name


def test_an_event_leaves_its_row_and_nothing_else(mongodb_url: str) -> None:
    """
    Documents do not grow in number with events, but for those that are the event.

    Of anonymous ones of a device there is one for each batch and day, of identified ones their
    claim.
    """
    counted = []
    with closing(MongoGraph(mongodb_url)) as graph:
        recognizer = Recognizer(graph)
        recognizer.process(
            [make_event(new_id(), START, "d"), make_event("c", START, "d", user_id="u")]
        )
        for count in (10, 1_000):
            numbers = [Counter({name: len(found) for name, found in documents(graph).items()})]
            for user in (None, f"u{count}"):
                recognizer.process(
                    [
                        make_event(new_id(), later(n), f"d{count}", user_id=user)
                        for n in range(count)
                    ]
                )
                found = {name: len(found) for name, found in documents(graph).items()}
                numbers.append(Counter(found))
            before, rows, claimed = numbers
            counted.append((rows - before, claimed - rows))

    for count, (rows, claimed) in zip((10, 1_000), counted, strict=True):
        assert rows == {"rows_03": 1}, counted
        # And one that says that the user claimed the device.
        assert claimed.pop("claims") == count + 1, counted
        # Device and user, an update; a sweep, where its end is not confirmed by a majority yet.
        assert claimed["subjects"] == 2, counted
        assert claimed.pop("outbox") <= 2, counted
        assert set(claimed) == {"subjects"}, counted


def test_a_batch_that_comes_again_leaves_nothing_new(mongodb_url: str) -> None:
    """Also where its references do not fit into one document."""
    rng = random.Random(7)
    batch = [
        make_event(str(uuid.UUID(int=rng.getrandbits(128), version=4)), later(n), "d1")
        for n in range(5_000)
    ]
    long = [make_event(f"{n} {'long ' * 400}", later(n), "d2") for n in range(500)]
    with closing(MongoGraph(mongodb_url)) as graph:
        recognizer = Recognizer(graph)
        recognizer.process(batch)
        recognizer.process(long)
        before = graph._db["rows_03"].count_documents({})
        for _ in range(2):
            recognizer.process([*long, *batch])
        after, references = graph._db["rows_03"].count_documents({}), graph.stats().references

    assert references == 5_500
    assert 3 < before < 20
    assert after == before


def test_a_batch_of_one_busy_device_makes_no_large_document(mongodb_url: str) -> None:
    """50,000 events of one device are claimed twice, and the largest document is below 1 MB."""
    rng = random.Random(5)
    ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(50_000)]
    with closing(MongoGraph(mongodb_url)) as graph:
        recognizer = Recognizer(graph)
        recognizer.process([make_event(one, START + n * 1_000, "bot") for n, one in enumerate(ids)])
        references = graph.stats().references
        recognizer.process([make_event(new_id(), later(100), "bot", user_id="u1")])
        recognizer.process([make_event(new_id(), later(25), "bot", user_id="u2")])
        sizes = largest(graph)
        named = Counter[type]()
        while leased := graph.lease_updates(10, 60):
            for delivery in leased:
                for criterion in delivery.update.where:
                    if isinstance(criterion, Messages):
                        named[Messages] += len(criterion.refs)
                    elif isinstance(criterion, Between):
                        named[Between] += delivery.update.expected_rows or 0

    assert references == 50_000
    assert named[Between] == 50_000
    assert named[Messages] > 20_000
    assert max(sizes.values()) < 1_000_000, sizes


def test_ids_of_any_length_make_short_keys(mongodb_url: str) -> None:
    """Ids of 10,000 characters are kept whole, outside of the keys and in documents below 1 MB."""
    long = {name: f"{name} " + "\N{SNOWMAN}" * 10_000 for name in ("device", "user", "mail", "row")}
    with closing(MongoGraph(mongodb_url)) as graph:
        recognizer = Recognizer(graph, Rules(traits=("plan",)))
        rows = [make_event(f"{long['row']} {n}", later(n), long["device"]) for n in range(60)]
        claim = make_event(
            f"{long['row']} claim",
            later(300),
            long["device"],
            user_id=long["user"],
            email=long["mail"],
            traits={"plan": long["mail"]},
        )
        for _ in range(2):
            recognizer.process(rows)
            done = recognizer.process([claim])
        sizes = largest(graph)
        references = graph.stats().references
        chain = recognizer.explain(Identifier("email", long["mail"].lower()))
        (update,) = [delivery.update for delivery in graph.lease_updates(10, 60)]
        check_keys(graph)
        kept = {document.get("a") for document in graph._db["subjects"].find()}

    assert done.owners[0] is not None
    assert done.owners[0].id == long["user"]
    assert chain.found
    assert update.set["user_id"] == long["user"]
    assert update.expected_rows == references == 60
    assert long["device"] in kept
    assert max(sizes.values()) < 1_000_000, sizes


def test_keys_have_one_length(mongodb_url: str) -> None:
    """Whatever the ids and times are."""
    with closing(MongoGraph(mongodb_url)) as graph:
        for rules in RULES_OF_ALL_KINDS:
            events = hard_life(6)
            events.append(make_event("", 0, "", user_id=" "))
            events.append(make_event("last", 9_214_646_399_999_999, "x" * 500))
            Recognizer(graph, rules).process(events)
        check_keys(graph)
        filled = {name for name in DISTRIBUTED if graph._db[name].find_one() is not None}
        written = bson.encode({"all": [*graph._db["claims"].find()]})

    assert {"subjects", "claims", "links"} < filled
    assert len(written) > 10_000


# Batches that come again -----------------------------------------------------------------------


def written_ids(kind: str, number: int) -> tuple[str, int]:
    """The id and the time of a message; few instants, two days, two devices."""
    moment = START + (number % 2) * DAY + (number // 4) * SECOND
    name = str(uuid.UUID(int=number * 7919 % 31, version=4))
    match kind:
        case "UUID, milliseconds":
            return name, moment
        case "UUID, microseconds":
            return name, moment + 1
        case "either":
            return name, moment + number % 3
        case _:
            return f"text {'x' * (number % 5)} {number}", moment


KINDS_OF_IDS = ("UUID, milliseconds", "UUID, microseconds", "either", "text", "of persons")
GROUPS = st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=16), min_size=1, max_size=8)
# Not made smaller when it fails: each one is small, and costs commands.
FEW = settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))


def rows_of(graph: MongoGraph, rules: Rules, names: Sequence[str]) -> dict[str, Rows]:
    """What the graph hands to a decision about these devices, or the persons of these addresses."""
    with graph._reader(rules.workspace) as store:
        handles = {held.handle: name for name, held in store.timelines(names).items()}
        persons = store.identifiers([Identifier("email", name) for name in names])
        handles |= {-held.handle: identifier.value for identifier, held in persons.items()}
        rows = store.rows(dict.fromkeys(handles, (0, END)))
    return {handles[handle]: found for handle, found in rows.items()}


@pytest.mark.parametrize("kind", KINDS_OF_IDS)
def test_batches_that_come_again_in_other_parts_count_once(kind: str, mongodb_url: str) -> None:
    """Parts, wholes and shuffles of earlier batches lose no reference and count none twice."""
    workspaces = count()
    total = 0

    @FEW
    @given(groups=GROUPS)
    def check(groups: list[list[int]]) -> None:
        nonlocal total
        rules = Rules(workspace=f"w{next(workspaces)}")
        recognizer = Recognizer(graph, rules)
        expected: dict[str, dict[str, int]] = {}
        for group in groups:
            batch = []
            for number in group:
                name = f"d{number % 3 // 2}"
                message_id, at = written_ids(kind, number)
                if kind == "of persons":  # written in a transaction
                    batch.append(make_event(message_id, at, email=name))
                else:
                    batch.append(make_event(message_id, at, name))
                expected.setdefault(name, {})[message_id] = at
            recognizer.process(batch)
        stored = rows_of(graph, rules, ["d0", "d1"])
        held = {name: dict(found.references["events",]) for name, found in stored.items()}
        before, total = total, graph.stats().references

        assert held == expected
        assert total - before == sum(map(len, expected.values()))

    with closing(MongoGraph(mongodb_url)) as graph:
        check()


def test_days_that_come_again_count_once(mongodb_url: str) -> None:
    """Days are kept once, whoever saw them: this process, or another one."""
    workspaces = count()

    @FEW
    @given(groups=GROUPS, others=st.sets(st.integers(0, 8)))
    def check(groups: list[list[int]], others: set[int]) -> None:
        rules = Rules(
            workspace=f"w{next(workspaces)}",
            target_column="stitched_user_id",
            default=TableRules(references=References.DAYS),
        )
        recognizers = Recognizer(graph, rules), Recognizer(other, rules)
        expected: dict[str, set[int]] = {}
        before = documents_of_rows(graph)
        for position, group in enumerate(groups):
            batch = [make_event(f"m{n}", START + n * DAY, f"d{n % 2}") for n in group]
            for event in batch:
                expected.setdefault(event.anonymous_id or "", set()).add(event.time // DAY)
            recognizers[position in others].process(batch)
        stored = rows_of(graph, rules, ["d0", "d1"])
        held = {device: set(found.days["events",]) for device, found in stored.items()}

        assert held == expected
        assert documents_of_rows(graph) - before == sum(map(len, expected.values()))

    with closing(MongoGraph(mongodb_url)) as graph, closing(MongoGraph(mongodb_url)) as other:
        check()


def documents_of_rows(graph: MongoGraph) -> int:
    return sum(graph._db[name].count_documents({}) for name in CLUSTERED - {"claims"})
