"""
How fast events go through the recognizer into MongoDB, and what they leave there.

    python benchmarks/mongo.py [--events 1000000] [--visitors 50000] [--rounds 3]
        [--only floor,whole,references] [--long] [--json | --markdown]

The server is that of the tests (`tests/mongod.py`): one member, a replica set all the same, 1 GB of
cache (``--cache-gb``); or the one that RECOGNITION_TEST_MONGODB_URI names. Every round runs all
parts one after the other, each in a database of its own that is dropped afterwards; every second
round goes backwards. Ratios are those of one round, and their median is quoted. Most of the work is
done by another process, so wall seconds decide; CPU seconds of this one are beside them. What a
part is given is made outside its clock, in batches of 1,000; writes are acknowledged by the
majority, and so by the journal, except where it says otherwise:

``floor``
    one document for each event, 24 bytes of BSON in all, by unordered ``insert_many``:
    ``{_id: <9 bytes, counting up>}``. It holds nothing of the event, and its key comes in order;
``ids``
    one document for each event that holds 24 bytes, its message id and time: ``{_id: <24 bytes>}``;
``packed``
    the same 24 bytes of each event, one document for a whole batch: the physical limit;
``whole``, ``whole-single``
    events of 2 to 2.3 KB as Jitsu Next keeps them: a clustered collection with zstd, an index on
    the anonymous id and one on the time, ``w: 1``, no journal. They insert them one by one over up
    to 32 connections, as ``whole-single`` does; ``whole`` gives them our batches. A fifth and a
    twentieth as many events as elsewhere, because their cost is flat;
``references``, ``presence``, ``none``
    ours: parse, recognizer, graph, by what is kept of each anonymous event. 80 % of the events are
    anonymous, four visitors in ten log in. Three rates come from one run: of `Recognizer.process`
    alone, from the body as a dict (what ``whole`` starts from), and from the line of JSON;
``streams``
    ``references`` from three threads of one process that share a recognizer, each with the events
    of its own third of the visitors, as a consumer of three partitions has them;
``writes-references``, ``writes-presence``
    the graph alone: ``Graph.observe`` with prepared observations, the same events without users.

After a run of ours the outbox is leased and acknowledged, a thousand updates at a time, and then
visitors whom nobody has claimed identify, each in a call of its own; beside their median is that of
one small write that the majority acknowledges, after ``floor``.

Bytes on disk are those of all collections and indexes after two checkpoints: the files' sizes
without the blocks in them that are free for reuse. The outbox is counted apart: what is in it
leaves. *Of rows*: what is kept of the events themselves; all else is of visitors and people. Those
of ``writes-*`` are per anonymous event, those of ours per event. Bytes in memory are what the
server's cache holds of the same after the last batch; pages that were just written lie there
unpacked. The oplog is measured by its size before compression. Round trips and operations are
counted by the server.

``visitor`` is one anonymous id with ``--rows`` events that becomes known, in a process of its own.
``--long`` measures ten times as many events of ten times as many visitors in ten months too, and
compares the last tenth of both; it needs 8 GB of memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import random
import resource
import statistics
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from bson import Binary, ObjectId
from bson import encode as encode_bson
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import OperationFailure
from pymongo.write_concern import WriteConcern

from recognition import (
    Event,
    Recognizer,
    References,
    Rules,
    Supersede,
    TableRules,
    open_graph,
    parse_event,
)
from recognition.graph import Graph, Observation
from recognize import AGENT, BATCH, DAY, START, batches, make_lines

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from mongod import Client, GivenServer, MongodError, Server, given_uri

Figures = dict[str, Any]

MAJORITY = WriteConcern("majority")
OUTBOX = "outbox"
ROWS = "rows_"  # collections of what is kept of the events themselves
MONTH = 30 * 86_400  # seconds
PEAK = 10  # times the average
BUSY = 0.7  # what a worker may be loaded with at the peak


class Clock:
    """Wall seconds, and CPU seconds of this process, lap by lap."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []
        self._begun = (0.0, 0.0)

    def __enter__(self) -> Self:
        self._begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc_info: object) -> None:
        wall, cpu = self._begun
        self.laps.append((time.perf_counter() - wall, time.process_time() - cpu))

    @property
    def wall(self) -> float:
        return sum(wall for wall, _ in self.laps)

    @property
    def cpu(self) -> float:
        return sum(cpu for _, cpu in self.laps)


def rates(events: int, *clocks: Clock) -> Figures:
    return {
        "events_per_second": events / sum(clock.wall for clock in clocks),
        "events_per_cpu_second": events / sum(clock.cpu for clock in clocks),
    }


# -------------------------------------------------------------------- what the server knows


class Meter:
    """What happens in one database of the server, and what is in it."""

    def __init__(self, server: GivenServer, name: str) -> None:
        self.url = server.url(name)
        self._client: Client = server.client()
        self._client.drop_database(name)
        self.database: Database[dict[str, Any]] = self._client[name]
        self._before: Figures = {}

    def begin(self) -> None:
        """What happens counts from now on."""
        self._before = self._counters()

    def close(self) -> None:
        self._client.drop_database(self.database.name)
        self._client.close()

    def _counters(self) -> Figures:
        status = self._client.admin.command("serverStatus")
        counters = status["opcounters"]
        found = {
            "requests": status["network"]["numRequests"],
            "operations": sum(counters[name] for name in ("insert", "query", "update", "delete")),
            "oplog": None,
        }
        with suppress(OperationFailure, StopIteration):  # a router of shards has none
            oplog = self._client.local["oplog.rs"]
            found["oplog"] = _storage(oplog)["size"]
            found["oldest"] = next(oplog.find().sort("$natural", 1).limit(1))["ts"]
        return found

    def happened(self, events: int) -> Figures:
        """Per event (``per_batch``: per batch) since `begin`."""
        before, after = self._before, self._counters()
        grown = None
        if after["oplog"] is not None and before.get("oldest") == after["oldest"]:
            grown = (after["oplog"] - before["oplog"]) / events
        return {
            "requests_per_batch": (after["requests"] - before["requests"]) / events * BATCH,
            "operations_per_event": (after["operations"] - before["operations"]) / events,
            "oplog_bytes_per_event": grown,
        }

    def in_cache(self) -> int:
        """Bytes that the server's cache holds of all but the outbox."""
        return sum(
            part["cache"]["bytes currently in the cache"]
            for name in self.database.list_collection_names()
            if name != OUTBOX
            for stats in [_storage(self.database[name])]
            for part in [stats["wiredTiger"], *stats["indexDetails"].values()]
        )

    def on_disk(self) -> dict[str, int]:
        """Bytes by collection, with its indexes, without what is free for reuse."""
        for _ in range(2):  # the second one frees the blocks that the one before had held
            self._client.admin.command("fsync")
        found = {}
        for name in self.database.list_collection_names():
            stats = _storage(self.database[name])
            free = stats["freeStorageSize"] + sum(
                index["block-manager"]["file bytes available for reuse"]
                for index in stats["indexDetails"].values()
            )
            found[name] = stats["storageSize"] + stats["totalIndexSize"] - free
        return found

    def sizes(self, events: int) -> Figures:
        """Per event."""
        cached, disk = self.in_cache(), self.on_disk()
        outbox = disk.pop(OUTBOX, 0)
        rows = sum(size for name, size in disk.items() if name.startswith(ROWS))
        return {
            "disk_bytes_per_event": sum(disk.values()) / events,
            "disk_bytes_per_event_of_rows": rows / events,
            "disk_bytes_per_event_by_collection": {
                name: size / events for name, size in sorted(disk.items()) if size >= events / 100
            },
            "outbox_bytes": outbox,
            "cache_bytes_per_event": cached / events,
        }


def _storage(collection: Collection[dict[str, Any]]) -> Figures:
    found: Figures = next(collection.aggregate([{"$collStats": {"storageStats": {}}}]))
    stats: Figures = found["storageStats"]
    return stats


# -------------------------------------------------------------------- floors


def run_inserts(
    meter: Meter,
    collection: Collection[Any],
    batches_of_documents: Iterator[list[Figures]],
    *,
    single: bool = False,
) -> Figures:
    """Insert and measure; all documents count as one event each."""
    clock, events = Clock(), 0
    pool = ThreadPoolExecutor(32)
    meter.begin()
    for documents in batches_of_documents:
        with clock:
            if single:
                list(pool.map(collection.insert_one, documents))
            else:
                collection.insert_many(documents, ordered=False)
        events += len(documents)
    pool.shutdown()
    happened = meter.happened(events)
    # So that the checkpoint has all that was acknowledged by less than the majority.
    collection.with_options(write_concern=MAJORITY).insert_one({"_id": ObjectId()})
    return {**rates(events, clock), **happened, **meter.sizes(events)}


def run_floor(meter: Meter, events: int) -> Figures:
    def documents() -> Iterator[list[Figures]]:
        for start in range(0, events, BATCH):
            numbers = range(start, min(start + BATCH, events))
            made = [{"_id": Binary(b"\0" + struct.pack(">q", n))} for n in numbers]
            assert len(encode_bson(made[0])) == 24
            yield made

    collection = meter.database.get_collection("floor", write_concern=MAJORITY)
    figures = run_inserts(meter, collection, documents())
    times = Clock()
    for _ in range(200):
        with times:
            collection.insert_one({})
    return {**figures, "one_write_ms": statistics.median(wall for wall, _ in times.laps) * 1e3}


def _payload(draw: random.Random, number: int) -> bytes:
    """Message id and time of an event, 24 bytes."""
    return draw.randbytes(16) + struct.pack(">q", int(START) * 1000 + number * 2_592_000)


def run_ids(meter: Meter, events: int) -> Figures:
    draw = random.Random(1)

    def documents() -> Iterator[list[Figures]]:
        for start in range(0, events, BATCH):
            numbers = range(start, min(start + BATCH, events))
            yield [{"_id": Binary(_payload(draw, n))} for n in numbers]

    return run_inserts(
        meter, meter.database.get_collection("ids", write_concern=MAJORITY), documents()
    )


def run_packed(meter: Meter, events: int) -> Figures:
    draw, clock = random.Random(1), Clock()
    collection = meter.database.get_collection("packed", write_concern=MAJORITY)
    meter.begin()
    for start in range(0, events, BATCH):
        numbers = range(start, min(start + BATCH, events))
        document = {"_id": start, "d": b"".join(_payload(draw, n) for n in numbers)}
        with clock:
            collection.insert_one(document)
    return {**rates(events, clock), **meter.happened(events), **meter.sizes(events)}


# -------------------------------------------------------------------- whole events

_CITIES = (
    ("Berlin", "BE", "Land Berlin", "DE", "Germany", 52.52, 13.405, "10115", "Europe/Berlin"),
    ("Lyon", "ARA", "Auvergne-Rhone-Alpes", "FR", "France", 45.76, 4.83, "69001", "Europe/Paris"),
    ("Austin", "TX", "Texas", "US", "United States", 30.27, -97.74, "73301", "America/Chicago"),
    ("Osaka", "27", "Osaka", "JP", "Japan", 34.69, 135.5, "530-0001", "Asia/Tokyo"),
    ("Porto Alegre", "RS", "Rio Grande do Sul", "BR", "Brazil", -30.03, -51.22, "90010", "x"),
)
_AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko)"
    " Chrome/{}.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_{} like Mac OS X) AppleWebKit/605.1.15"
    " (KHTML, like Gecko) Version/17.4 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:{}.0) Gecko/20100101 Firefox/125.0",
)
_WORDS = (
    "linen", "summer", "dress", "oak", "table", "lamp", "walnut", "desk", "merino", "sweater",
    "trail", "running", "shoe", "ceramic", "mug", "garden", "chair", "wool", "blanket", "steel",
    "bottle", "canvas", "bag", "silk", "scarf", "cotton", "shirt", "leather", "belt",
)  # fmt: skip


def whole_event(draw: random.Random, device: str) -> Figures:
    """A page view or a track call as analytics.js sends it and Jitsu enriches it."""
    city, region, region_name, country, country_name, lat, lon, zone, timezone = draw.choice(
        _CITIES
    )
    words = draw.sample(_WORDS, 6)
    path = f"/shop/{words[0]}-{words[1]}/{words[2]}-{draw.randrange(10**6)}"
    source = draw.choice(("google", "newsletter", "meta"))
    search = f"?utm_source={source}&gclid={draw.getrandbits(160):x}"
    now = datetime.now(UTC)  # the server drops what is older than the look-back
    at = now.isoformat(timespec="milliseconds")
    address = ".".join(str(draw.randrange(1, 255)) for _ in range(4))
    return {
        "_id": ObjectId(),
        "_jitsu_anonymous_id_": device,
        "messageId": f"{draw.getrandbits(128):032x}",
        "type": "track",
        "event": draw.choice(("Product Viewed", "Product Added", "Product List Viewed")),
        "anonymousId": device,
        "timestamp": now,
        "sentAt": at,
        "receivedAt": at,
        "requestIp": address,
        "writeKey": "GfA0tQzVnJ8uLm3kPq5rXyB7cDeH1iSw:***",
        "properties": {
            "path": path,
            "url": f"https://shop.example.com{path}{search}",
            "title": " ".join(words[:4]).title() + " | Example Shop",
            "sku": f"{words[0][:3].upper()}-{draw.randrange(10**6):06}",
            "name": " ".join(words[1:4]).title(),
            "price": draw.randrange(500, 50_000) / 100,
            "currency": "EUR",
            "category": words[4],
            "quantity": draw.randint(1, 4),
            "position": draw.randint(1, 60),
            "list_id": f"search-{words[5]}",
            "variant": draw.choice(("red", "green", "blue", "black")),
            "in_stock": draw.random() < 0.9,
        },
        "context": {
            "library": {"name": "@jitsu/js", "version": "2.0.0", "env": "browser"},
            "ip": address,
            "userAgent": draw.choice(_AGENTS).format(draw.randint(90, 125)),
            "userAgentVendor": "desktop",
            "locale": draw.choice(("de-DE", "en-US", "fr-FR", "ja-JP", "pt-BR")),
            "timezone": timezone,
            "screen": {
                "width": draw.choice((1920, 1440, 390, 2560)),
                "height": draw.choice((1080, 900, 844, 1440)),
                "innerWidth": draw.randint(300, 2560),
                "innerHeight": draw.randint(300, 1440),
                "density": draw.choice((1, 2, 3)),
            },
            "page": {
                "path": path,
                "referrer": f"https://www.google.com/{draw.getrandbits(64):x}",
                "referring_domain": "www.google.com",
                "host": "shop.example.com",
                "search": search,
                "title": " ".join(words[:4]).title() + " | Example Shop",
                "url": f"https://shop.example.com{path}{search}",
                "encoding": "UTF-8",
            },
            "campaign": {"source": source, "medium": "cpc", "name": f"{words[5]}-2026"},
            "clientIds": {
                "fbp": f"fb.1.{draw.getrandbits(41)}.{draw.getrandbits(31)}",
                "ga4": {
                    "clientId": f"{draw.getrandbits(31)}.{draw.getrandbits(31)}",
                    "sessionIds": {f"G{draw.getrandbits(32):X}": str(draw.getrandbits(31))},
                },
            },
            "geo": {
                "continent": {"code": "EU"},
                "country": {"code": country, "name": country_name, "isEU": country in ("DE", "FR")},
                "region": {"code": region, "name": region_name},
                "city": {"name": city},
                "postalCode": {"code": zone},
                "location": {
                    "latitude": lat + draw.random() / 10,
                    "longitude": lon + draw.random() / 10,
                    "accuracyRadius": draw.choice((1, 5, 10, 20)),
                },
                "provider": {"as": {"num": draw.getrandbits(16), "name": "Example Telecom"}},
            },
        },
    }


def run_whole(meter: Meter, events: int, visitors: int, *, single: bool = False) -> Figures:
    draw = random.Random(2)
    devices = [str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in range(visitors)]
    collection = meter.database.create_collection(
        "UR_1",
        write_concern=WriteConcern(w=1, j=False),
        clusteredIndex={"key": {"_id": 1}, "unique": True},
        storageEngine={"wiredTiger": {"configString": "block_compressor=zstd"}},
    )
    collection.create_index("timestamp", expireAfterSeconds=MONTH)
    collection.create_index("_jitsu_anonymous_id_")
    sizes: list[int] = []

    def documents() -> Iterator[list[Figures]]:
        for start in range(0, events, BATCH):
            numbers = range(start, min(start + BATCH, events))
            made = [whole_event(draw, draw.choice(devices)) for _ in numbers]
            sizes.extend(len(encode_bson(event)) for event in made[:20])
            yield made

    figures = run_inserts(meter, collection, documents(), single=single)
    return {**figures, "bson_bytes": statistics.mean(sizes)}


# -------------------------------------------------------------------- ours


def rules_of(part: str) -> Rules | None:
    """How the events are decided; ``None``: this version of recognition keeps no such thing."""
    if part == "references":
        return Rules()
    kept = References.NONE if part == "none" else getattr(References, "DAYS", None)
    if kept is None:
        return None
    # Without message ids the table needs a column that says what recognition wrote.
    return Rules(default=TableRules(references=kept, supersede=Supersede.VERSION))


def strangers(lines: list[str], count: int) -> list[tuple[str, int]]:
    """Anonymous ids that nobody claims, with the time of their last event in microseconds."""
    last: dict[str, int] = {}
    claimed = set()
    for line in lines:
        event = parse_event(json.loads(line))
        assert event.anonymous_id is not None
        last[event.anonymous_id] = event.time
        if event.known:
            claimed.add(event.anonymous_id)
    found = [(device, at) for device, at in last.items() if device not in claimed]
    return random.Random(3).sample(found, min(count, len(found)))


def identify(device: str, user: str, at: int) -> Event:
    return parse_event(
        {
            "messageId": str(uuid.uuid4()),
            "type": "identify",
            "anonymousId": device,
            "userId": user,
            "timestamp": at // 1000,
            "context": {"userAgent": AGENT},
        }
    )


def run_ours(
    meter: Meter, lines: list[str], rules: Rules, unknown: Sequence[tuple[str, int]]
) -> Figures:
    load, parse, process = Clock(), Clock(), Clock()
    graph = open_graph(meter.url)
    recognizer = Recognizer(graph, rules)
    meter.begin()
    updates = 0
    for batch in batches(lines):
        with load:
            bodies = [json.loads(line) for line in batch]
        with parse:
            events = [parse_event(body) for body in bodies]
        with process:
            done = recognizer.process(events)
        updates += done.updates
    tenth = max(1, len(process.laps) // 10)
    last = process.laps[-tenth:]
    in_last = len(lines) - (len(process.laps) - tenth) * BATCH
    figures = {
        **rates(len(lines), process),
        "from_dict": rates(len(lines), parse, process),
        "from_json": rates(len(lines), load, parse, process),
        "last_tenth_microseconds": sum(wall for wall, _ in last) / in_last * 1e6,
        "last_tenth_cpu_microseconds": sum(cpu for _, cpu in last) / in_last * 1e6,
        **meter.happened(len(lines)),
        **meter.sizes(len(lines)),
        "updates": updates,
        **drain(graph),
    }
    times = Clock()
    for number, (device, at) in enumerate(unknown):
        event = identify(device, f"late-{number}", at + 60_000_000)
        with times:
            recognizer.process([event])
    laps = sorted(wall for wall, _ in times.laps)
    figures["identify_ms"] = statistics.median(laps) * 1e3
    figures["identify_p95_ms"] = laps[int(len(laps) * 0.95)] * 1e3
    graph.close()
    return figures


def run_streams(meter: Meter, lines: list[str], rules: Rules, streams: int = 3) -> Figures:
    parted: list[list[Event]] = [[] for _ in range(streams)]
    for line in lines:
        event = parse_event(json.loads(line))
        parted[zlib.crc32((event.anonymous_id or "").encode()) % streams].append(event)
    gc.collect()
    gc.freeze()
    clock = Clock()
    graph = open_graph(meter.url)
    recognizer = Recognizer(graph, rules)

    def work(events: list[Event]) -> None:
        for start in range(0, len(events), BATCH):
            recognizer.process(events[start : start + BATCH])

    meter.begin()
    with clock, ThreadPoolExecutor(streams) as pool:
        for done in [pool.submit(work, events) for events in parted]:
            done.result()
    figures = {**rates(len(lines), clock), **meter.happened(len(lines)), **meter.sizes(len(lines))}
    graph.close()
    return figures


def drain(graph: Graph) -> Figures:
    """Lease and acknowledge what the outbox holds, a thousand at a time."""
    clock, leased, biggest = Clock(), 0, 0
    while True:
        with clock:
            window = graph.lease_updates(BATCH, 60.0)
            graph.acknowledge([item.position for item in window])
        if not window:
            break
        leased += len(window)
        biggest = max(biggest, *(len(item.update.to_json()) for item in window))
    return {
        "delivered": leased,
        "delivered_per_second": leased / clock.wall,
        "biggest_message_bytes": biggest,
    }


def run_writes(meter: Meter, lines: list[str], rules: Rules) -> Figures:
    clock = Clock()
    graph = open_graph(meter.url)
    meter.begin()
    for batch in batches(lines):
        observations = []
        for line in batch:
            event = parse_event(json.loads(line))
            observations.append(
                Observation(
                    message_id=event.message_id,
                    time=event.time,
                    anonymous_id=event.anonymous_id,
                    known=(),
                    as_seen=(),
                    names_user=False,
                    previous_id=None,
                    tables=rules.layout.tables_of(event),
                    traits={},
                )
            )
        with clock:
            graph.observe(rules, observations)
    figures = {**rates(len(lines), clock), **meter.happened(len(lines)), **meter.sizes(len(lines))}
    graph.close()
    return figures


# -------------------------------------------------------------------- one visitor


def peak_megabytes() -> float:
    """Of this program alone: ``ru_maxrss`` begins with what the starting process had."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def visit(url: str, part: str, rows: int) -> Figures:
    """One anonymous id with so many events over the month becomes known."""
    rules = rules_of(part)
    assert rules is not None
    device, at, ingest, known = str(uuid.uuid4()), int(START) * 1000, Clock(), Clock()
    step = 29 * DAY * 1000 // rows
    graph = open_graph(url)
    recognizer = Recognizer(graph, rules)
    for start in range(0, rows, BATCH):
        events = [
            parse_event(
                {
                    "messageId": str(uuid.uuid4()),
                    "type": "page",
                    "anonymousId": device,
                    "timestamp": (at + number * step) // 1000,
                }
            )
            for number in range(start, min(start + BATCH, rows))
        ]
        with ingest:
            recognizer.process(events)
    before = peak_megabytes()
    event = identify(device, "u1", at + rows * step)
    with known:
        done = recognizer.process([event])
    figures = {
        "rows": rows,
        "ingest_events_per_second": rows / ingest.wall,
        "identify_seconds": known.wall,
        "identify_cpu_seconds": known.cpu,
        "peak_mb_before": before,
        "peak_mb_grown": peak_megabytes() - before,
        "updates": done.updates,
        "biggest_message_bytes": 0,
    }
    while window := graph.lease_updates(5, 60.0):
        graph.acknowledge([item.position for item in window])
        sizes = [len(item.update.to_json()) for item in window]
        figures["biggest_message_bytes"] = max(figures["biggest_message_bytes"], *sizes)
    graph.close()
    return figures


def run_visitor(server: GivenServer, parts: Sequence[str], rows: int) -> Figures:
    found = {}
    for part in parts:
        meter = Meter(server, f"bench_visitor_{part}")
        try:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[part] = pool.apply(visit, (meter.url, part, rows))
        finally:
            meter.close()
    return found


# -------------------------------------------------------------------- all of it

OURS = ("references", "presence", "none")
WRITES = ("writes-references", "writes-presence")
WHOLE = ("whole", "whole-single")
# What is compared runs next to each other, as far as that goes.
PARTS = ("floor", *WRITES, "ids", "packed", *WHOLE, *OURS, "streams", "visitor")


def run_rounds(
    server: GivenServer, lines: list[str], options: argparse.Namespace, parts: Sequence[str]
) -> dict[str, list[Figures]]:
    """The figures of every part, round by round."""
    bare = options.events
    works: dict[str, Callable[[Meter], Figures]] = {
        "floor": partial(run_floor, events=bare),
        "ids": partial(run_ids, events=bare),
        "packed": partial(run_packed, events=bare),
        "whole": partial(
            run_whole, events=max(BATCH, bare // 5), visitors=max(1, options.visitors // 5)
        ),
        "whole-single": partial(
            run_whole,
            events=max(BATCH, bare // 20),
            visitors=max(1, options.visitors // 20),
            single=True,
        ),
    }
    works["streams"] = partial(run_streams, lines=lines, rules=Rules())
    unknown = strangers(lines, options.identifies)
    for part in OURS:
        rules = rules_of(part)
        if rules is not None:
            works[part] = partial(run_ours, lines=lines, rules=rules, unknown=unknown)
            works[f"writes-{part}"] = partial(run_writes, lines=lines, rules=rules)
    chosen = [part for part in parts if part in works]
    found: dict[str, list[Figures]] = {part: [] for part in chosen}
    for number in range(options.rounds):
        for part in chosen if number % 2 == 0 else reversed(chosen):
            say(f"round {number + 1} of {options.rounds}: {part}")
            gc.collect()
            meter = Meter(server, f"bench_{part.replace('-', '_')}")
            try:
                found[part].append(works[part](meter))
            finally:
                meter.close()
    return found


def middle(rounds: Sequence[Figures]) -> Figures:
    """The median of every figure over the rounds."""
    first = rounds[0]
    return {
        name: middle([found[name] for found in rounds])
        if isinstance(value, dict)
        else None
        if any(found[name] is None for found in rounds)
        else statistics.median(found[name] for found in rounds)
        for name, value in first.items()
    }


def ratio(
    rounds: dict[str, list[Figures]], one: str, other: str, pick: Callable[[Figures], float]
) -> float | None:
    """The median of one part's figure over the other's, round by round."""
    if not rounds.get(one) or not rounds.get(other):
        return None
    return statistics.median(
        pick(a) / pick(b) for a, b in zip(rounds[one], rounds[other], strict=True)
    )


def compare(rounds: dict[str, list[Figures]]) -> Figures:
    """What the targets are about."""

    def rate(figures: Figures) -> float:
        # Whole events are given as dicts, so that ours parse them too.
        value: float = figures.get("from_dict", figures)["events_per_second"]
        return value

    def disk(figures: Figures) -> float:
        value: float = figures["disk_bytes_per_event"]
        return value

    found = {
        f"{part} / {floor}": ratio(rounds, part, floor, lambda f: f["events_per_second"])
        for part in WRITES
        for floor in ("floor", "ids", "packed")
    }
    for whole in WHOLE:
        for part in (*OURS, *WRITES):
            found[f"{part} / {whole}, rate"] = ratio(rounds, part, whole, rate)
    for part in OURS:
        found[f"{part} / whole, disk"] = ratio(rounds, part, "whole", disk)
    for part in OURS:
        if rounds.get(part) and rounds.get("floor"):
            # An identify against one small write that the majority acknowledges.
            found[f"{part} / floor, identify"] = statistics.median(
                a["identify_ms"] / b["one_write_ms"]
                for a, b in zip(rounds[part], rounds["floor"], strict=True)
            )
    return {name: value for name, value in found.items() if value is not None}


def compare_long(
    server: GivenServer, options: argparse.Namespace, rounds: dict[str, list[Figures]]
) -> Figures:
    """The last tenth of ten times as many events over that of so many, once for each part."""
    say("ten times as many events")
    lines = make_lines(options.events * 10, options.visitors * 10, days=300)
    gc.collect()
    gc.freeze()
    unknown = strangers(lines, options.identifies)
    found = {}
    for part in OURS:
        rules = rules_of(part)
        if not rounds.get(part) or rules is None:
            continue
        say(f"ten times as many events: {part}")
        meter = Meter(server, "bench_long")
        try:
            figures = run_ours(meter, lines, rules, unknown)
        finally:
            meter.close()
        short = middle(rounds[part])
        for name in ("last_tenth_microseconds", "last_tenth_cpu_microseconds"):
            figures[f"{name}_ratio"] = figures[name] / short[name]
        found[part] = figures
    return found


def plan_capacity(figures: dict[str, Figures]) -> list[Figures]:
    """What a month of so many events needs, from what was measured."""
    found = []
    for part in OURS:
        if part not in figures:
            continue
        seen = figures[part]
        rate = seen["from_json"]["events_per_second"]
        oplog = seen["oplog_bytes_per_event"]
        for events in (100_000_000, 1_000_000_000, 10_000_000_000):
            average = events / MONTH
            found.append(
                {
                    "kept": part,
                    "events_a_month": events,
                    "events_per_second": average,
                    "events_per_second_at_peak": average * PEAK,
                    "disk_gb": events * seen["disk_bytes_per_event"] / 1e9,
                    "oplog_gb_a_day": None if oplog is None else average * 86_400 * oplog / 1e9,
                    "operations_per_second": average * seen["operations_per_event"],
                    "operations_per_second_at_peak": average * PEAK * seen["operations_per_event"],
                    "requests_per_second_at_peak": average
                    * PEAK
                    * seen["requests_per_batch"]
                    / BATCH,
                    "workers": math.ceil(average * PEAK / (rate * BUSY)),
                }
            )
    return found


# -------------------------------------------------------------------- printing

Table = tuple[str, list[str], list[list[str]]]


def show(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def tabulate(report: Figures) -> list[Table]:
    """The report as tables: title, heads, rows."""
    parts: dict[str, Figures] = report["parts"]
    tables: list[Table] = [
        (
            f"{report['events']:,} events of {report['visitors']:,} visitors,"
            f" MongoDB {report['server']}",
            [
                *("", "events/s", "per CPU second", "B on disk", "of rows", "B in cache"),
                *("B of oplog", "operations", "round trips a batch"),
            ],
            [
                [
                    part,
                    show(seen["events_per_second"]),
                    show(seen["events_per_cpu_second"]),
                    show(seen["disk_bytes_per_event"], 1),
                    show(seen["disk_bytes_per_event_of_rows"] or None, 1),
                    show(seen["cache_bytes_per_event"], 0),
                    show(seen["oplog_bytes_per_event"], 0),
                    show(seen["operations_per_event"], 2),
                    show(seen["requests_per_batch"], 1),
                ]
                for part, seen in parts.items()
            ],
        )
    ]
    ours = {part: seen for part, seen in parts.items() if part in OURS}
    if ours:
        tables.append(
            (
                "The whole recognizer",
                [
                    *("", "process()", "from a dict", "from JSON", "identify, ms", "95 %, ms"),
                    *("last tenth, us", "updates", "delivered/s"),
                ],
                [
                    [
                        part,
                        show(seen["events_per_second"]),
                        show(seen["from_dict"]["events_per_second"]),
                        show(seen["from_json"]["events_per_second"]),
                        show(seen["identify_ms"], 1),
                        show(seen["identify_p95_ms"], 1),
                        show(seen["last_tenth_microseconds"], 1),
                        show(seen["updates"]),
                        show(seen["delivered_per_second"]),
                    ]
                    for part, seen in ours.items()
                ],
            )
        )
    if report["ratios"]:
        rows = [[name, show(value, 3)] for name, value in report["ratios"].items()]
        tables.append(("Ratios, median of the rounds", ["", "ratio"], rows))
    if report["visitor"]:
        tables.append(
            (
                "One visitor becomes known",
                ["", "rows", "s", "CPU s", "MB more", "messages", "biggest, B", "rows/s before"],
                [
                    [
                        part,
                        show(seen["rows"]),
                        show(seen["identify_seconds"], 2),
                        show(seen["identify_cpu_seconds"], 2),
                        show(seen["peak_mb_grown"], 1),
                        show(seen["updates"]),
                        show(seen["biggest_message_bytes"]),
                        show(seen["ingest_events_per_second"]),
                    ]
                    for part, seen in report["visitor"].items()
                ],
            )
        )
    if report["long"]:
        tables.append(
            (
                f"{report['events'] * 10:,} events",
                ["", "events/s", "B on disk", "last tenth, us", "to the shorter run", "CPU"],
                [
                    [
                        part,
                        show(seen["events_per_second"]),
                        show(seen["disk_bytes_per_event"], 1),
                        show(seen["last_tenth_microseconds"], 1),
                        show(seen["last_tenth_microseconds_ratio"], 2),
                        show(seen["last_tenth_cpu_microseconds_ratio"], 2),
                    ]
                    for part, seen in report["long"].items()
                ],
            )
        )
    if report["capacity"]:
        tables.append(
            (
                f"Capacity: a month of events, peak {PEAK} times the average, workers {BUSY:.0%}"
                " busy at the peak",
                [
                    *("kept", "events a month", "events/s", "at peak", "disk, GB", "oplog, GB/day"),
                    *("operations/s", "at peak", "round trips/s at peak", "workers"),
                ],
                [
                    [
                        row["kept"],
                        show(row["events_a_month"]),
                        show(row["events_per_second"]),
                        show(row["events_per_second_at_peak"]),
                        show(row["disk_gb"], 1),
                        show(row["oplog_gb_a_day"], 1),
                        show(row["operations_per_second"]),
                        show(row["operations_per_second_at_peak"]),
                        show(row["requests_per_second_at_peak"]),
                        show(row["workers"]),
                    ]
                    for row in report["capacity"]
                ],
            )
        )
    return tables


def print_tables(tables: list[Table], *, markdown: bool) -> None:
    for title, heads, rows in tables:
        if markdown:
            print(f"{title}:\n\n| {' | '.join(heads)} |")
            print(f"| --- |{' --: |' * (len(heads) - 1)}")
            for row in rows:
                print(f"| {' | '.join(row)} |")
        else:
            widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
            print(title)
            for row in [heads, *rows]:
                first, *others = (
                    cell.ljust(width) if not at else cell.rjust(width)
                    for at, (cell, width) in enumerate(zip(row, widths, strict=True))
                )
                print("  ".join([first, *others]))
        print()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def choose(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(PARTS):
        raise argparse.ArgumentTypeError(
            f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}"
        )
    return [part for part in PARTS if part in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--visitors", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--identifies", type=int, default=500, help="visitors for the latency")
    parser.add_argument("--rows", type=int, default=100_000, help="of the one visitor")
    parser.add_argument("--only", type=choose, default=list(PARTS), help="parts, by commas")
    parser.add_argument("--long", action="store_true", help="ten times as many events too")
    parser.add_argument("--cache-gb", type=float, default=1, help="of a server of its own")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true")
    shape.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    uri = given_uri()
    try:
        server = Server(cache_gb=options.cache_gb) if uri is None else GivenServer(uri)
    except MongodError as exc:
        sys.exit(str(exc))
    with server:
        if isinstance(server, Server):  # so that a run of whole events is in the oplog as a whole
            with server.client() as client:
                client.admin.command("replSetResizeOplog", 1, size=16_000.0)
        visitor = {}
        if "visitor" in options.only:
            say("one visitor")
            kept = [part for part in OURS if rules_of(part) is not None]
            visitor = run_visitor(server, kept, options.rows)
        needs_lines = {*OURS, *WRITES} & set(options.only)
        lines = make_lines(options.events, options.visitors) if needs_lines else []
        # As the command line does: what the imports made is never garbage, and is not looked at
        # again.
        gc.collect()
        gc.freeze()
        rounds = run_rounds(server, lines, options, options.only)
        del lines
        long = compare_long(server, options, rounds) if options.long else {}
        figures = {part: middle(found) for part, found in rounds.items()}
        report = {
            "server": server.version,
            "events": options.events,
            "visitors": options.visitors,
            "rounds": options.rounds,
            "parts": figures,
            "ratios": compare(rounds),
            "visitor": visitor,
            "long": long,
            "capacity": plan_capacity(figures),
        }
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return
    print_tables(tabulate(report), markdown=options.markdown)


if __name__ == "__main__":
    main()
