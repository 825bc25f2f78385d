"""
Workers that race for one graph and are killed at any step; started as a process by the tests.

    python racing.py SERVER_URI FOLDER TRIAL... [--events N] [--broken NAME]

It prints one JSON object a line: what became of each trial. A trial follows from its number: the
events, who gets them in which order, and how likely it is that somebody pauses or dies at a step.
A step is a command that a process sends to MongoDB, before it and after its answer, or a statement
to the warehouse. How the steps of several processes fall is up to the machine.

This process decides nothing and opens nothing: it forks the workers, starts those that were killed
again from the last batch that they had acknowledged, and in the end forks a referee, who compares.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

import sqlalchemy as sa
from pymongo import MongoClient, monitoring

from mongod import with_database
from oracle import Oracle, make_event
from recognition.attribution import DAY, AttributionRules, Policy
from recognition.delivery import deliver
from recognition.events import Event, Identifier
from recognition.graph import mongo, open_graph
from recognition.layouts import LAYOUTS, Row
from recognition.messages import VERSION_COLUMN, Messages, UpdateByCriteria
from recognition.planner import Plan
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, Supersede
from recognition.sinks import Applied, open_sink
from test_decisions import MODES, UNDO_MODES

#: How the gap between a row that is on its way and its update is closed; DESIGN.md 5.5.
WAYS = ("flushed", "before", "ordered")

EVENTS = 1_000
LIMIT = 300  # seconds for a trial, on a machine that has other things to do
LEASE = 1.0  # seconds
FIRST_DAY = 20_000
DAYS = 40  # more than one rows collection holds
HOUR = DAY // 24
LAST = (FIRST_DAY + DAYS) * DAY  # later than all events

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
COLUMNS = ("message_id", "anonymous_id", "user_id", "timestamp")

#: An event, or an undo: what to call on a recognizer, and with what.
Item: TypeAlias = Event | tuple[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Everything that is decided before a trial begins."""

    number: int
    events: int = EVENTS

    @property
    def way(self) -> str:
        return WAYS[self.number % len(WAYS)]

    @property
    def undoes(self) -> bool:
        return self.number % 5 == 1

    @property
    def mode(self) -> str:
        # 24 trials have every way in every mode, 96 with every policy.
        if self.undoes:
            return UNDO_MODES[self.number // 5 % len(UNDO_MODES)]
        return list(MODES)[self.number % len(MODES)]

    @property
    def policy(self) -> Policy:
        return list(Policy)[(self.number + self.number // 24) % len(Policy)]

    @cached_property
    def draw(self) -> random.Random:
        return random.Random(f"trial {self.number}")

    @cached_property
    def workers(self) -> int:
        return random.Random(f"workers {self.number}").choice([2, 2, 3, 3, 4, 5, 6, 8])

    @cached_property
    def rules(self) -> Rules:
        draw = random.Random(f"rules {self.number}")
        options, _ = MODES[self.mode]
        return Rules(
            attribution=AttributionRules(
                policy=self.policy, lookback=draw.choice([2, 12, 3 * DAYS]) * DAY
            ),
            stamps=self.way != "before",
            layout=LAYOUTS["segment" if draw.random() < 0.3 else "segment-single-table"],
            **options,
        )

    @property
    def target(self) -> str:
        return self.rules.target_column or "user_id"

    @cached_property
    def tables(self) -> set[str]:
        return {t for e in self.all_events for t in self.rules.layout.tables_of(e)}

    @cached_property
    def all_events(self) -> list[Event]:
        """Few devices and users, so that everybody is in everybody's way."""
        draw = random.Random(f"events {self.number}")
        devices = [f"device{n}" for n in range(draw.randint(3, 6))]
        users = [f"user{n}" for n in range(draw.randint(3, 6))]
        # An email belongs to a user, and now and then to another one, which is a conflict.
        emails = {f"mail{n}@example.com": draw.choice(users) for n in range(draw.randint(6, 24))}
        aliases = draw.choice(
            [[], [(users[0], users[1])], [(users[1], users[0]), ("old", "user2")]]
        )
        tied = self.rules_keep_ids
        named = draw.random() < 0.5
        found = []
        for number in range(self.events):
            user = email = previous = None
            chance = draw.random()
            if chance < 0.08:
                user = draw.choice(users)
            elif chance < 0.15:
                email = draw.choice(list(emails))
            elif chance < 0.20:
                email = draw.choice(list(emails))
                user = emails[email] if draw.random() < 0.9 else draw.choice(users)
            elif chance < 0.21 and aliases:
                previous, user = draw.choice(aliases)
            elif chance < 0.24:
                user = "lone"  # never with an email: to forget it is to forget it alone
            at = FIRST_DAY * DAY + draw.randrange(DAYS * 24) * HOUR + (0 if tied else number)
            token = uuid.UUID(int=draw.getrandbits(128), version=4)
            found.append(
                make_event(
                    str(token) if named else f"m{number:04}",
                    at,
                    None if chance < 0.24 and draw.random() < 0.1 else draw.choice(devices),
                    user_id=user,
                    email=email,
                    previous_id=previous,
                    type="alias" if previous else draw.choice(["track", "track", "page"]),
                    name=draw.choice(["Open", "Buy", "Leave"]),
                )
            )
        return found

    @property
    def rules_keep_ids(self) -> bool:
        """Elsewhere no two rows of a device at the same instant can be told apart."""
        options, _ = MODES[self.mode]
        return "default" not in options or options["default"].references is References.IDS

    @cached_property
    def undos(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What may be undone at any time, and leaves the same when all is over."""
        if not self.undoes:
            return []
        draw = random.Random(f"undo {self.number}")
        linked = [e for e in self.all_events if len(e.known) == 2]
        claims = [e for e in self.all_events if e.known and e.anonymous_id and not e.previous_id]
        claim = draw.choice(claims)
        possible: list[tuple[str, tuple[Any, ...]]] = [
            ("unlink", draw.choice(linked).known if linked else ()),
            ("unlink", (Identifier("anonymous_id", str(claim.anonymous_id)), claim.known[0])),
            ("release", ("device0", LAST)),
            ("forget", (Identifier("user_id", "lone"), LAST)),
        ]
        return draw.sample(possible, 2)

    @cached_property
    def streams(self) -> list[list[Item]]:
        """What each worker gets, in this order; some of it another one gets as well."""
        draw = random.Random(f"streams {self.number}")
        disorder = DAYS * DAY * draw.choice([0.02, 0.2, 2])
        arriving = sorted(self.all_events, key=lambda e: e.time + draw.gauss(0, disorder))
        streams: list[list[Item]] = [[] for _ in range(self.workers)]
        for event in arriving:
            for stream in draw.sample(streams, 2 if draw.random() < 0.05 else 1):
                stream.append(event)
        for undo in self.undos:
            stream = draw.choice(streams)
            stream.insert(draw.randrange(len(stream)), undo)
        return streams

    def oracle(self) -> Oracle:
        """What has to be there in the end."""
        oracle = Oracle(
            policy=self.policy,
            lookback=self.rules.attribution.lookback,
            own_column=self.rules.has_own_column,
            events=self.all_events,
        )
        for name, arguments in self.undos:
            if name == "unlink":
                oracle.unlinked.add(frozenset((i.type, i.value) for i in arguments))
            elif name == "release":
                oracle.released[arguments[0]] = arguments[1]
            else:
                oracle.forgotten[arguments[0]] = arguments[1]
        return oracle


class Chaos(monitoring.CommandListener):
    """Pauses or kills this process at a step, and counts what it sees."""

    def __init__(self, draw: random.Random, folder: Path, *, may_die: bool) -> None:
        self._draw = draw
        self._file = folder / f"counts-{os.getpid()}"
        self._pause = draw.choice([0.0, 0.01, 0.03])
        self._die_at = int(4 ** draw.uniform(0, 5)) if may_die else -1
        self._steps = 0
        self.counts: Counter[str] = Counter()

    def step(self, *_: object) -> None:
        self._steps += 1
        if self._steps == self._die_at:
            self.counts["kills"] += 1
            self.write()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._draw.random() < self._pause:
            time.sleep(min(self._draw.expovariate(100), 0.05))

    def write(self) -> None:
        """Keep the counts, for the referee."""
        self._file.write_text(json.dumps(self.counts))

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command.get("startTransaction"):
            self.counts["transactions"] += 1
        self.step()

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        if event.command_name == "commitTransaction":
            self.counts["commits"] += 1
        self.step()

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        self.counts[str(event.failure.get("codeName", "failed"))] += 1
        self.step()


class Rows:
    """The warehouse as the pipeline writes to it: a row that comes again replaces the old one."""

    def __init__(self, path: Path, trial: Trial) -> None:
        self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._columns = [*COLUMNS]
        if trial.rules.has_own_column:
            self._columns.append(trial.target)
        if trial.rules.default.supersede is Supersede.VERSION:
            self._columns.append(VERSION_COLUMN)

    def make(self, tables: set[str]) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        kinds = {VERSION_COLUMN: "BIGINT", "message_id": "TEXT PRIMARY KEY"}
        columns = ", ".join(f'"{name}" {kinds.get(name, "TEXT")}' for name in self._columns)
        for table in sorted(tables):
            self._connection.execute(f'CREATE TABLE "{table}" ({columns})')
            self._connection.execute(f'CREATE INDEX "{table} devices" ON "{table}" (anonymous_id)')

    def put(self, rows: dict[str, list[Row]]) -> None:
        marks = ", ".join("?" * len(self._columns))
        self._connection.execute("BEGIN IMMEDIATE")
        for table, found in rows.items():
            self._connection.executemany(
                f'INSERT OR REPLACE INTO "{table}" VALUES ({marks})',
                [[self._value(name, row.get(name)) for name in self._columns] for row in found],
            )
        self._connection.execute("COMMIT")

    @staticmethod
    def _value(name: str, value: Any) -> Any:
        if name != "timestamp":
            return value
        moment = EPOCH + timedelta(microseconds=value)
        return moment.replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")

    def read(self, tables: set[str], target: str) -> dict[tuple[str, str], str | None]:
        """By table and message id."""
        return {
            (table, message): value
            for table in tables
            for message, value in self._connection.execute(
                f'SELECT message_id, "{target}" FROM "{table}"'
            )
        }

    def close(self) -> None:
        self._connection.close()


class LaterSink:
    """Updates that follow their rows: applied when the batches of before are written or dead."""

    def __init__(self, sink: Any, flights: Path) -> None:
        self._sink = sink
        self._flights = flights
        self.capabilities = sink.capabilities

    def compile(self, step: Any) -> str:
        return str(self._sink.compile(step))

    def apply(self, plan: Plan) -> Applied:
        flying = set(os.listdir(self._flights))
        while flying := flying.intersection(os.listdir(self._flights)):
            time.sleep(0.002)
        applied: Applied = self._sink.apply(plan)
        return applied

    def close(self) -> None:
        self._sink.close()


@dataclass(frozen=True, kw_only=True)
class Process:
    """One that was forked, or will be."""

    role: str
    index: int
    life: int = 0

    @property
    def name(self) -> str:
        return f"{self.role}{self.index}"


class Race:
    """One trial in one folder and one database."""

    def __init__(self, trial: Trial, url: str, folder: Path, broken: str | None) -> None:
        self.trial = trial
        self.url = url
        self.folder = folder
        self.broken = broken
        self.flights = folder / "flights"
        self.warehouse = folder / "warehouse.db"
        self._children: dict[int, Process] = {}

    # ---------------------------------------------------------------- the one that forks

    def run(self) -> dict[str, Any]:
        begun = time.monotonic()
        self.flights.mkdir()
        with closing(Rows(self.warehouse, self.trial)) as rows:
            rows.make(self.trial.tables)
        signal.signal(signal.SIGALRM, self._give_up)
        signal.alarm(LIMIT)
        try:
            for index in range(1 + self.trial.workers // 4):
                self._fork(Process(role="deliverer", index=index))
            for index in range(self.trial.workers):
                self._fork(Process(role="worker", index=index))
            self._watch("worker")
            (self.folder / "over").touch()
            self._watch("deliverer")
            self._fork(Process(role="referee", index=0))
            self._watch("referee")
        finally:
            signal.alarm(0)
            for pid in self._children:
                os.kill(pid, signal.SIGKILL)
        result: dict[str, Any] = json.loads((self.folder / "result").read_text())
        return result | {"seconds": round(time.monotonic() - begun, 1)}

    def _give_up(self, *_: object) -> None:
        raise TimeoutError(f"trial {self.trial.number} took more than {LIMIT} seconds")

    def _watch(self, role: str) -> None:
        """Until all of a role have ended by themselves; who was killed is started again."""
        while any(process.role == role for process in self._children.values()):
            pid, status = os.wait()
            process = self._children.pop(pid)
            for flight in self.flights.glob(f"{process.name}-*"):
                flight.unlink()
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                self._fork(replace(process, life=process.life + 1))
            elif status:
                error = self.folder / f"error-{process.name}"
                said = error.read_text() if error.exists() else f"status {status}"
                raise RuntimeError(f"trial {self.trial.number}, {process.name}: {said}")

    def _fork(self, process: Process) -> None:
        pid = os.fork()
        if pid:
            self._children[pid] = process
            return
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(LIMIT + 20)
            if self.broken:
                BROKEN[self.broken]()
            {"worker": self._work, "deliverer": self._deliver, "referee": self._judge}[
                process.role
            ](process)
            code = 0
        except BaseException:
            (self.folder / f"error-{process.name}").write_text(traceback.format_exc())
        finally:
            os._exit(code)

    # ---------------------------------------------------------------- those that race

    def _chaos(self, process: Process) -> Chaos:
        draw = random.Random(f"{self.trial.number} {process}")
        random.seed(draw.random())
        may_die = process.life < 8 and draw.random() < (0.7, 0.4, 0.2)[min(process.life, 2)]
        chaos = Chaos(draw, self.folder, may_die=may_die)
        monitoring.register(chaos)
        return chaos

    def _work(self, process: Process) -> None:
        trial, chaos = self.trial, self._chaos(process)
        draw = random.Random(f"batches {trial.number} {process}")
        stream = trial.streams[process.index]
        acknowledged = self.folder / f"acknowledged-{process.name}"
        done = int(acknowledged.read_text()) if acknowledged.exists() else 0
        # Small batches of many workers for small races, big ones for big ones.
        largest = random.Random(f"sizes {trial.number}").choice([15, 40, 100])
        # Some find the sweeps of the dead while they work, for others the referee finds them.
        graph = open_graph(self.url, grace=draw.choice([0.2, 10.0]))
        recognizer = Recognizer(graph, trial.rules)
        with closing(graph), closing(Rows(self.warehouse, trial)) as rows:
            while done < len(stream):
                batch = _batch(stream[done : done + draw.randint(1, largest)])
                if not isinstance(batch, list):
                    name, arguments = batch
                    getattr(recognizer, name)(*arguments)
                    done += 1
                else:
                    flight = self.flights / f"{process.name}-{process.life}-{done}"
                    flight.touch()
                    self._take(recognizer, rows, batch, chaos)
                    flight.unlink()
                    done += len(batch)
                _replace(acknowledged, str(done))
                chaos.step()
        chaos.write()

    def _take(self, recognizer: Recognizer, rows: Rows, batch: list[Event], chaos: Chaos) -> None:
        if self.trial.way == "before":
            rows.put(plain_rows(self.trial.rules, batch))
            chaos.step()
            recognizer.process(batch)
            return
        done = recognizer.process(batch)
        chaos.step()
        rows.put(recognizer.rows(done))
        chaos.step()
        if self.trial.way == "flushed":
            recognizer.flushed(done.receipt)

    def _sink(self) -> Any:
        sink: Any = open_sink(f"sqlite:///{self.warehouse}")
        return LaterSink(sink, self.flights) if self.trial.way == "ordered" else sink

    def _graph_that_tells(self) -> Any:
        """A graph that writes down the updates that it leases out."""
        graph: Any = open_graph(self.url)
        lease_updates = graph.lease_updates
        told = (self.folder / f"updates-{os.getpid()}").open("a")

        def lease(limit: int, seconds: float) -> Any:
            leased = lease_updates(limit, seconds)
            told.writelines(f"{item.update.model_dump_json()}\n" for item in leased)
            told.flush()
            return leased

        graph.lease_updates = lease
        return graph

    def _deliver(self, process: Process) -> None:
        chaos = self._chaos(process)
        draw = random.Random(f"windows {self.trial.number} {process}")
        sa.event.listen(sa.Engine, "before_cursor_execute", chaos.step)
        sa.event.listen(sa.Engine, "commit", chaos.step)
        graph, sink = self._graph_that_tells(), self._sink()
        over = False
        while not over:
            over = (self.folder / "over").exists()
            done = deliver(graph, sink, window=draw.choice([10, 100, 1_000]), lease=LEASE)
            assert not done.rejected, done.rejected
            time.sleep(0.02)
        graph.close()
        sink.close()
        chaos.write()

    # ---------------------------------------------------------------- the one that compares

    def _judge(self, process: Process) -> None:
        trial, rules = self.trial, self.trial.rules
        graph, sink = self._graph_that_tells(), self._sink()
        swept = graph.recover(rules)
        self._drain(graph, sink)
        oracle: Any = trial.oracle()
        oracle.claims = cache(oracle.claims)
        owners = oracle.owners()
        want = {
            (table, e.message_id): owners[e.message_id]
            for e in trial.all_events
            for table in rules.layout.tables_of(e)
        }
        with closing(Rows(self.warehouse, trial)) as rows:
            got = rows.read(trial.tables, trial.target)
            wrong = _differences(want, got)
            # All of it once more, through one.
            recognizer = Recognizer(graph, rules)
            updates, stamps = 0, {}
            for start in range(0, len(trial.all_events), 250):
                done = recognizer.process(trial.all_events[start : start + 250])
                updates += done.updates
                for table, found in recognizer.rows(done).items():
                    stamps.update({(table, str(row["message_id"])): row for row in found})
            self._drain(graph, sink)
            again = _differences(got, rows.read(trial.tables, trial.target))
        held = {key: row[trial.target] for key, row in stamps.items()}
        counts: Counter[str] = Counter()
        for file in self.folder.glob("counts-*"):
            counts.update(json.loads(file.read_text()))
        issued = {}
        for file in self.folder.glob("updates-*"):
            for line in file.read_text().splitlines():
                issued[json.loads(line)["id"]] = line
        foreign = foreign_updates(trial, map(UpdateByCriteria.model_validate_json, issued.values()))
        result = {
            "trial": trial.number,
            "way": trial.way,
            "mode": trial.mode,
            "policy": trial.policy.value,
            "layout": rules.layout.name,
            "workers": trial.workers,
            "undo": [name for name, _ in trial.undos],
            "events": len(trial.all_events),
            "updates": len(issued),
            "swept": swept,
            "dead": len(graph.dead_updates(10)),
            "wrong": wrong,
            "again": again,
            "updates_again": updates if rules.stamps else 0,
            "stamps": _differences(want, held) if rules.stamps else [],
            "foreign": foreign,
            "counts": counts,
        }
        graph.close()
        sink.close()
        with MongoClient[dict[str, Any]](self.url) as client:
            client.drop_database(client.get_default_database().name)
        (self.folder / "result").write_text(json.dumps(result))

    def _drain(self, graph: Any, sink: Any) -> None:
        with MongoClient[dict[str, Any]](self.url) as client:
            outbox = client.get_default_database()["outbox"]
            while True:
                deliver(graph, sink)
                if not outbox.count_documents({}):  # sweeps are in there as well
                    return
                time.sleep(0.05)  # leases of the dead


def _batch(items: Sequence[Item]) -> list[Event] | tuple[str, tuple[Any, ...]]:
    """The events before the first undo, or that."""
    if not isinstance(items[0], Event):
        return items[0]
    return [*_until_undo(items)]


def _until_undo(items: Sequence[Item]) -> Iterator[Event]:
    for item in items:
        if not isinstance(item, Event):
            return
        yield item


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def _differences(want: dict[tuple[str, str], Any], got: dict[tuple[str, str], Any]) -> list[Any]:
    return [
        [*key, want.get(key, "no row"), got.get(key, "no row")]
        for key in sorted({*want, *got})
        if want.get(key, "no row") != got.get(key, "no row")
    ]


def plain_rows(rules: Rules, events: Sequence[Event]) -> dict[str, list[Row]]:
    """The rows as the events gave them; a pipeline that knows nothing of recognition."""
    found: dict[str, list[Row]] = {}
    for event in events:
        for table in rules.layout.tables_of(event):
            found.setdefault(table, []).append(rules.layout.row_of(event, table))
    return found


def foreign_updates(trial: Trial, updates: Iterator[UpdateByCriteria]) -> list[str]:
    """Updates that give a row to somebody who has never been near its device or its person."""
    near: dict[str, set[str]] = {}  # by each name those that were ever seen with it

    def join(*names: str | None) -> None:
        groups = [near.get(name, {name}) for name in names if name is not None]
        for name in (merged := set().union(*groups)):
            near[name] = merged

    for event in trial.all_events:
        named = [i.value for i in event.known]
        join(*named, event.previous_id)
    by_device: dict[str, set[str]] = {}
    by_message: dict[str, set[str]] = {}
    for event in trial.all_events:
        names = {n for i in event.known for n in near[i.value]}
        if event.known and event.previous_id:
            by_device.setdefault(event.previous_id, set()).update(names)
        if event.anonymous_id is not None:
            by_device.setdefault(event.anonymous_id, set()).update(names)
        by_message[event.message_id] = names
    for event in trial.all_events:
        if event.anonymous_id is not None:
            by_message[event.message_id] |= by_device[event.anonymous_id]
    foreign = []
    for update in updates:
        value = update.set[trial.target]
        if value is None:
            if not trial.undos:
                foreign.append(update.model_dump_json())
            continue
        allowed: set[str] | None = None
        for criterion in update.where:
            may: set[str] | None = None
            if isinstance(criterion, Messages):
                may = set.intersection(*(by_message[m] for m, _ in criterion.refs))
            elif (
                getattr(criterion, "column", None) == "anonymous_id" and criterion.kind == "equals"
            ):
                may = by_device[str(criterion.value)]
            elif getattr(criterion, "column", None) == "user_id" and criterion.kind == "equals":
                may = near[str(criterion.value)]
            if may is not None:
                allowed = may if allowed is None else allowed & may
        if allowed is None or value not in allowed:
            foreign.append(update.model_dump_json())
    return foreign


# -------------------------------------------------------------------- protocols that are wrong


def _read_first() -> None:
    """Read first, write afterwards: rows become known when all is decided; nobody looks again."""
    graph: Any = mongo.MongoGraph
    decide, announce = graph._decide, graph._announce

    def decide_first(self: Any, rules: Rules, work: Any, *, batch: Any = (), **options: Any) -> Any:
        result = decide(self, rules, work, batch=batch, **options)
        if batch:
            with self._client.start_session() as session:
                announce(self, self._workspace(rules.workspace), rules, batch, session)
        return result

    graph._decide = decide_first
    graph._announce = lambda self, workspace, rules, batch, session: (
        self._decided_with(workspace, rules.fingerprint, reads_only=False),
        set(),
    )[1]
    graph._sweep = lambda self, workspace, rules, sweep, session: (
        self._db["outbox"].delete_many({"_id": {"$in": sweep.ids}}),
        0,
    )[1]


def _no_locks() -> None:
    """What was read and not changed is not locked: two decisions that share it both stand."""
    store: Any = mongo._MongoStore
    store.lock = lambda self, timelines, identifiers: None
    flush = store.flush

    def flush_unlocked(self: Any) -> None:
        self._locked.clear()
        flush(self)

    store.flush = flush_unlocked


BROKEN: dict[str, Callable[[], None]] = {"read-first": _read_first, "no-locks": _no_locks}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trials of racing workers.")
    parser.add_argument("server")
    parser.add_argument("folder", type=Path)
    parser.add_argument("trials", type=int, nargs="+")
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--broken", choices=BROKEN)
    given = parser.parse_args()
    for number in given.trials:
        trial = Trial(number=number, events=given.events)
        url = with_database(given.server, f"recognition_race_{uuid.uuid4().hex[:12]}")
        folder = given.folder / str(number)
        folder.mkdir()
        result = Race(trial, url, folder, given.broken).run()
        sys.stdout.write(f"{json.dumps(result)}\n")
        sys.stdout.flush()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
