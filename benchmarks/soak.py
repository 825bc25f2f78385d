"""
A worker for half an hour at a steady rate, while everything around it fails at random.

    python benchmarks/soak.py [--minutes 30] [--rate 200] [--settle 30] [--pause 20] [--json]

Events of made-up households go into a Kafka topic at the rate. A process of its own reads them
into a MongoDB graph of three members, and delivers to PostgreSQL and to a SQLite file, slowly.
Their rows are written beside it, as a pipeline does: one in five comes half a second late, and all
of them wait while their database is down. About every ``--pause`` seconds one of these is taken
away for some seconds: the primary of MongoDB (SIGKILL), PostgreSQL (killed, too), the connection to
the broker. Each of them at least once.

When no more events come, the backlog has to drain. Then all rows of both databases are compared to
the oracle of the tests, which computes them from the whole set of events. The table says what was
done, how much memory the worker had after a quarter of the time and at the end, the greatest
backlog, and how long it took to drain. Exit code 1: a row is wrong, or something was given up or
left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import confluent_kafka as ck
import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from broker import OPTIONS, Broker
from households import make_household, owners, to_row, to_segment
from mongod import Server as Mongod
from postgres import Server as Postgres
from recognition.delivery import Deliverer, Destination
from recognition.errors import GraphError
from recognition.events import Event
from recognition.graph import Graph, open_graph
from recognition.kafka import KafkaSource
from recognition.planner import Plan, Step
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.sinks import Applied, Sink, open_sink
from recognition.worker import Worker

TABLE = (
    "CREATE TABLE events (message_id TEXT PRIMARY KEY, anonymous_id TEXT, user_id TEXT,"
    " timestamp TIMESTAMP)"
)
INSERT = "INSERT INTO events VALUES ({0}, {0}, {0}, {0}) ON CONFLICT DO NOTHING"
TOPIC, GROUP = "events", "soak"
OPEN = 50  # households that visit at the same time
NAMES = ("postgresql", "slow")


# The worker -------------------------------------------------------------------------------------


class Slow:
    """A sink that takes its time: mostly none, sometimes up to three seconds."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._draw = random.Random(3)
        self.capabilities = sink.capabilities

    def compile(self, step: Step) -> str:
        return self._sink.compile(step)

    def apply(self, plan: Plan) -> Applied:
        if self._draw.random() < 0.2:
            time.sleep(3 * self._draw.random())
        return self._sink.apply(plan)

    def close(self) -> None:
        self._sink.close()


def work(given: dict[str, Any]) -> None:
    """The process that is watched; ends with its standard input, and says what it did."""
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    rules = Rules(stamps=False)
    with ExitStack() as stack:
        graph = stack.enter_context(closing(open_graph(given["graph"])))
        sinks = [stack.enter_context(closing(open_sink(url, timeout=5))) for url in given["sinks"]]
        sinks[1] = Slow(sinks[1])
        deliverer = Deliverer(
            graph,
            [
                Destination(name=name, sink=sink, settle=given["settle"])
                for name, sink in zip(NAMES, sinks, strict=True)
            ],
            rules=rules,
            pauses=(0.5, 5.0),
        )
        source = KafkaSource(given["servers"], [TOPIC], GROUP, pauses=(0.2, 2.0), options=OPTIONS)
        worker = Worker(Recognizer(graph, rules), [source], deliverer, pauses=(0.2, 2.0))
        worker.run(stop)
    served = {
        name: {
            key: getattr(one, key)
            for key in ("windows", "updates", "held", "reapplied", "rows_changed", "failures")
        }
        for name, one in deliverer.served.items()
    }
    told = {
        "taken": asdict(worker.taken),
        "offered_again": source.counts.retries,
        "rebalances": source.counts.rebalances,
        "destinations": served,
    }
    print(json.dumps(told), flush=True)


# What is around it ------------------------------------------------------------------------------


class Warehouse:
    """Rows as a pipeline writes them, again until they are there."""

    def __init__(self, name: str, connect: Callable[[], Any], mark: str) -> None:
        self.name = name
        self._connect = connect
        self._insert = INSERT.format(mark)
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, Event]] = []
        self._over = False
        self.latest = 0.0  # seconds from an event to its row
        self.thread = threading.Thread(target=self._run, name=f"rows of {name}")

    def make(self) -> None:
        with closing(self._connect()) as connection:
            connection.execute(TABLE)
            connection.execute("CREATE INDEX device ON events (anonymous_id)")
            connection.commit()
        self.thread.start()

    def put(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        with self._lock:
            self._waiting += [(now, event) for event in events]

    def finish(self) -> None:
        self._over = True
        self.thread.join()

    def _run(self) -> None:
        draw = random.Random(self.name)
        rows: list[tuple[float, Event]] = []
        while not self._over or rows or self._waiting:
            time.sleep(0.5)
            with self._lock:
                late = [] if self._over else [p for p in self._waiting if draw.random() < 0.2]
                held = {event.message_id for _, event in late}
                rows += [pair for pair in self._waiting if pair[1].message_id not in held]
                self._waiting = late
            try:
                with closing(self._connect()) as connection:
                    connection.cursor().executemany(
                        self._insert, [to_row(event) for _, event in rows]
                    )
                    connection.commit()
            except (psycopg.OperationalError, sqlite3.OperationalError):
                continue  # it is down: the same rows again
            self.latest = max([self.latest, *(time.monotonic() - at for at, _ in rows)])
            rows = []

    def users(self) -> dict[str, str | None]:
        with closing(self._connect()) as connection:
            return dict(connection.execute("SELECT message_id, user_id FROM events").fetchall())


def visits(draw: random.Random, households: list[int]) -> Iterator[Event]:
    """Events of households in turn; for ever. ``households``: those that have begun."""

    def begin() -> list[Event]:
        households.append(len(households))
        return make_household(households[-1])[::-1]

    present = [begin() for _ in range(OPEN)]
    while True:
        place = draw.randrange(OPEN)
        yield present[place].pop()
        if not present[place]:
            present[place] = begin()


def produce(
    servers: str,
    warehouses: Sequence[Warehouse],
    rate: int,
    seconds: float,
    sent: list[str],
) -> list[int]:
    """Events at the rate; gives the households that have begun."""
    producer = ck.Producer(
        {"bootstrap.servers": servers, "reconnect.backoff.max.ms": 500, "log_level": 0}
    )
    households: list[int] = []
    coming = visits(random.Random(1), households)
    begin = time.monotonic()
    size = max(1, rate // 10)
    for number in range(int(seconds * rate / size)):
        time.sleep(max(0.0, begin + number * size / rate - time.monotonic()))
        events = [next(coming) for _ in range(size)]
        for event in events:
            producer.produce(TOPIC, json.dumps(to_segment(event)), event.anonymous_id)
        producer.poll(0)
        for warehouse in warehouses:
            warehouse.put(events)
        sent += [event.message_id for event in events]
    if producer.flush(60):
        raise RuntimeError("the broker did not take all events")
    return households


class Faults:
    """Takes something away, and gives it back after some seconds; one after the other."""

    def __init__(self, mongod: Mongod, postgres: Postgres, broker: Broker, pause: float) -> None:
        self._mongod, self._postgres, self._broker = mongod, postgres, broker
        self._pause = pause
        self._draw = random.Random(2)
        self._over = threading.Event()
        self.counts: Counter[str] = Counter()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="faults")

    def finish(self) -> None:
        self._over.set()
        self.thread.join()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        kinds = [self._lose_primary, self._lose_destination, self._lose_broker]
        try:
            while True:
                for fault in self._draw.sample(kinds, len(kinds)):
                    if self._over.wait(self._pause * self._draw.uniform(0.5, 1.5)):
                        return
                    fault(self._draw.uniform(1, 5))
        except BaseException as exc:
            self.error = exc

    def _lose_primary(self, seconds: float) -> None:
        member = self._mongod.primary()
        self._mongod.kill(member)
        time.sleep(seconds)
        self._mongod.restart(member)
        self.counts["primary killed"] += 1

    def _lose_destination(self, seconds: float) -> None:
        self._postgres.kill()
        time.sleep(seconds)
        self._postgres.restart()
        self.counts["destination down"] += 1

    def _lose_broker(self, seconds: float) -> None:
        self._broker.cut()
        time.sleep(seconds)
        self._broker.mend()
        self.counts["broker away"] += 1


def memory(pid: int) -> float:
    """Resident, in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def unread(servers: str) -> int:
    """How many messages the group has not confirmed."""
    consumer = ck.Consumer({"bootstrap.servers": servers, "group.id": GROUP, "log_level": 0})
    try:
        known = consumer.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions
        asked = [ck.TopicPartition(TOPIC, each) for each in known]
        confirmed = consumer.committed(asked, timeout=10)
        ends = [consumer.get_watermark_offsets(each, timeout=10)[1] for each in asked]
        # After a cut the broker of the tests tells an end that lies before what it has handed out.
        return sum(max(0, e - max(0, c.offset)) for e, c in zip(ends, confirmed, strict=True))
    finally:
        consumer.close()


def waiting(graph: Graph) -> int:
    """Updates that wait for their first application, of all destinations."""
    return sum(graph.backlog(name).waiting for name in graph.destinations())


def watch(graph: Graph, pid: int, over: threading.Event, found: list[tuple[float, int]]) -> None:
    """Memory and backlog, each second."""
    while not over.wait(1.0):
        with suppress(GraphError):
            found.append((memory(pid), waiting(graph)))


def run(minutes: float, rate: int, settle: float, pause: float) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mongod = stack.enter_context(Mongod(members=3, cache_gb=0.25))
        graph_url = stack.enter_context(mongod.database())
        postgres = stack.enter_context(Postgres())
        database = stack.enter_context(postgres.database())
        broker = stack.enter_context(Broker())
        broker.create(TOPIC, partitions=4)
        path = folder / "slow.sqlite"
        warehouses = [
            Warehouse("postgresql", lambda: postgres.connect(database, autocommit=False), "%s"),
            Warehouse("slow", lambda: sqlite3.connect(path, timeout=60), "?"),
        ]
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        for warehouse in warehouses:
            warehouse.make()
        given = {
            "graph": graph_url,
            "servers": broker.servers,
            "sinks": [postgres.url(database), f"sqlite:///{path}"],
            "settle": settle,
        }
        log = stack.enter_context((folder / "worker.log").open("w+"))
        worker = stack.enter_context(
            subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        )
        stack.callback(worker.kill)
        graph = stack.enter_context(closing(open_graph(graph_url)))
        while len(graph.destinations()) < len(NAMES):
            time.sleep(0.1)
        over = threading.Event()
        seen: list[tuple[float, int]] = []
        watching = threading.Thread(target=watch, args=(graph, worker.pid, over, seen))
        faults = Faults(mongod, postgres, broker, pause)
        sent: list[str] = []
        watching.start()
        faults.thread.start()
        try:
            households = produce(broker.servers, warehouses, rate, 60 * minutes, sent)
            faults.finish()
            began = time.monotonic()
            for warehouse in warehouses:
                warehouse.finish()
            left = {"unread": 1}
            while any(left.values()):
                left = {"unread": unread(broker.servers), "waiting": waiting(graph)}
                _check(worker, log, began, left)
                time.sleep(0.2)
            drained = time.monotonic() - began
            while pending := graph.stats().pending_updates:
                _check(worker, log, began, {"pending": pending})
                time.sleep(0.2)
        finally:
            over.set()
            watching.join()
            faults.finish()
            for warehouse in warehouses:
                warehouse.finish()
        said, _ = worker.communicate(timeout=60)
        stats = graph.stats()
        right: dict[str, str | None] = {}
        known = set(sent)
        for number in households:
            right |= owners([e for e in make_household(number) if e.message_id in known])
        found = {warehouse.name: warehouse.users() for warehouse in warehouses}
    # Events are made up: what is wrong may be shown.
    wrong = {
        name: [
            f"{key}: {users.get(key, 'missing')}, not {right.get(key, 'there')}"
            for key in sorted(right.keys() | users.keys())
            if key not in right or users.get(key, "missing") != right[key]
        ]
        for name, users in found.items()
    }
    return {
        "minutes": minutes,
        "events": len(sent),
        "faults": dict(faults.counts),
        **json.loads(said),
        "latest_row_seconds": {w.name: round(w.latest, 1) for w in warehouses},
        "memory_mb": [round(seen[len(seen) // 4][0]), round(seen[-1][0])],
        "greatest_backlog": max(backlog for _, backlog in seen),
        "drained_after_seconds": round(drained, 1),
        "left": stats.pending_updates,
        "dead": stats.dead_updates,
        "rows": len(right),
        "wrong_rows": {name: len(each) for name, each in wrong.items()},
        "wrong": {name: each[:20] for name, each in wrong.items()},
    }


def _check(worker: subprocess.Popen[str], log: IO[str], began: float, left: dict[str, int]) -> None:
    if worker.poll() is not None or time.monotonic() - began > 600:
        log.seek(0)
        raise RuntimeError(
            f"the worker ended ({worker.poll()}), or does not come to an end ({left}):"
            f" {log.read()[-3_000:]}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--settle", type=float, default=30)
    parser.add_argument("--pause", type=float, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(json.loads(arguments.worker))
        return 0
    found = run(arguments.minutes, arguments.rate, arguments.settle, arguments.pause)
    found["load_average"] = os.getloadavg()[0]
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for key, value in found.items():
            print(f"{key:<24}{value}")
    return int(any(found["wrong_rows"].values()) or found["dead"] > 0 or found["left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
