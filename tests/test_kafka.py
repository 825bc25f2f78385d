"""Kafka on a real broker and on librdkafka's own: what is read, confirmed, given up, and when."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import confluent_kafka as ck
import pytest

from broker import OPTIONS, Broker, MissingBrokerError
from mongod import _free_port
from recognition.errors import (
    ConfigurationError,
    GraphSchemaError,
    GraphUnavailableError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    SourceError,
)
from recognition.events import Event, parse_event
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.kafka import KafkaSource, UpdatesConsumer, UpdatesTopic, _open, key_of
from recognition.messages import Cause, Empty, Equals, OneOf, UpdateByCriteria
from recognition.parts import UpdatesSource
from recognition.planner import Plan
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.sinks import Applied, Capabilities, open_sink
from recognition.testing.sinks import at
from warehouse import Warehouse

SOURCES = Path(__file__).parents[1] / "src"


class Cluster:
    """Where topics are; each test names its own."""

    def __init__(self, servers: str, broker: Broker | None, **options: Any) -> None:
        self.servers = servers
        self.broker = broker
        self._options = {"bootstrap.servers": servers, **_QUICK, **options}
        self._producer = ck.Producer(self._options)

    def topic(self, partitions: int = 1) -> str:
        """A new topic; librdkafka's own cluster makes it with four partitions when first asked."""
        # Without digits: in what is logged, tests look for the ids of devices and users.
        name = "t-" + uuid4().hex[:12].translate(str.maketrans("0123456789", "ghijklmnop"))
        if self.broker is not None:
            self.broker.create(name, partitions=partitions)
        return name

    def write(self, topic: str, *values: object, key: str | None = None) -> None:
        """Messages as a pipeline writes them: bytes as they are, everything else as JSON."""
        failed: list[object] = []
        for value in values:
            raw = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
            self._producer.produce(
                topic,
                raw,
                key,
                headers=[("from", b"test")],
                on_delivery=lambda error, _: error and failed.append(error),
            )
        self._producer.flush(60)
        assert failed == []

    def read(self, topic: str, count: int, seconds: float = 60.0) -> list[Any]:
        """The first messages of all partitions of a topic."""
        consumer = ck.Consumer({**self._options, "group.id": "reader"})
        try:
            known = consumer.list_topics(topic, timeout=30).topics[topic].partitions
            consumer.assign([ck.TopicPartition(topic, each, 0) for each in known])
            found: list[Any] = []
            deadline = time.monotonic() + seconds
            while len(found) < count and time.monotonic() < deadline:
                found += [each for each in consumer.consume(count, 0.2) if each.error() is None]
            return found
        finally:
            consumer.close()

    def committed(self, topic: str, group: str) -> dict[int, int]:
        """What a group has confirmed, by partition."""
        consumer = ck.Consumer({**self._options, "group.id": group})
        try:
            known = consumer.list_topics(topic, timeout=30).topics[topic].partitions
            asked = [ck.TopicPartition(topic, each) for each in known]
            return {
                each.partition: each.offset
                for each in consumer.committed(asked, timeout=30)
                if each.offset >= 0
            }
        finally:
            consumer.close()


_QUICK: dict[str, Any] = {"reconnect.backoff.max.ms": 500, "log_level": 0}


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """A real broker."""
    try:
        found = Broker()
    except MissingBrokerError as error:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))
    with found:
        yield found


@pytest.fixture(scope="module")
def tansu(broker: Broker) -> Cluster:
    """The real broker."""
    return Cluster(broker.servers, broker)


@pytest.fixture(scope="module")
def mock() -> Iterator[Cluster]:
    """Three brokers inside of librdkafka: the reference of the protocol's client side."""
    keeper = ck.Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 3, "log_level": 0})
    brokers = keeper.list_topics(timeout=30).brokers.values()
    yield Cluster(",".join(f"{each.host}:{each.port}" for each in brokers), None)
    del keeper


#: What takes as long as a member of a group may be silent is run where this is set.
LONG = pytest.mark.skipif(
    os.environ.get("RECOGNITION_TEST_KAFKA") != "all",
    reason="a quarter of a minute; RECOGNITION_TEST_KAFKA=all runs it",
)


@pytest.fixture(params=["tansu", "mock"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Each of both."""
    found: Cluster = request.getfixturevalue(request.param)
    return found


def event(message_id: str, anonymous_id: str = "a1", **members: object) -> dict[str, object]:
    return {
        "messageId": message_id,
        "type": "page",
        "anonymousId": anonymous_id,
        "timestamp": "2026-01-01T00:00:00Z",
        **members,
    }


class Taken:
    """What a worker does with events, seen from outside."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.errors: list[Exception] = []
        self.calls = 0

    def __call__(self, events: Sequence[Event]) -> None:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.events += events

    @property
    def ids(self) -> list[str]:
        return [each.message_id for each in self.events]


def wait(until: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something to be so; the test fails when it is not."""
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def running(run: Callable[[threading.Event], None]) -> Iterator[list[BaseException]]:
    """Something that runs until it is stopped; its errors."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def body() -> None:
        try:
            run(stop)
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def source_of(cluster: Cluster, topic: str, group: str = "g", **options: Any) -> KafkaSource:
    given = {"linger": 0.1, "pauses": (0.05, 0.2), "options": OPTIONS, **options}
    return KafkaSource(cluster.servers, [topic], f"{group}-{topic}", **given)


def test_a_broker_finds_its_port_taken(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the stand-in: if another broker has the port by then, it takes another, and its own."""
    ports = [broker._port, _free_port(())]
    expected = ports[-1]
    monkeypatch.setattr("broker._free_port", lambda taken: ports.pop(0))
    topic = "t-of-one-alone"
    with Broker() as other:
        other.create(topic)
        topics = broker.admin.list_topics(timeout=30).topics

    assert other._port == expected
    assert topic not in topics


# Events in --------------------------------------------------------------------------------------


def test_events_are_read_once_and_poison_is_set_aside(cluster: Cluster) -> None:
    """
    Events, batches and arrays are taken; what is none of them is a dead letter with its reason.

    The dead letter is the message as it was, and says where it stood. The same group reads nothing
    a second time.
    """
    topic, dead = cluster.topic(), cluster.topic()
    cluster.write(topic, event("m1"), b"{poison", [event("m2"), {"no": "event"}], None, key="k")
    cluster.write(topic, {"batch": [event("m3")], "sentAt": "x"}, b"\xff", 7, {"a": float("nan")})
    taken, again = Taken(), Taken()
    source = source_of(cluster, topic, dead_letters=dead)
    with running(lambda stop: source.run(taken, stop)) as errors:
        wait(lambda: source.counts.messages == 8)
    other = source_of(cluster, topic)
    with running(lambda stop: other.run(again, stop)) as errors_again:
        cluster.write(topic, event("m4"))
        wait(lambda: again.ids == ["m4"])
    letters = cluster.read(dead, 5)
    headers = [dict(each.headers()) for each in letters]
    first = headers[[each.value() for each in letters].index(b"{poison")]

    assert errors + errors_again == []
    assert sorted(taken.ids) == ["m1", "m2", "m3"]
    assert sorted(each["error"].decode() for each in headers) == [
        "member 1: no message id",
        "not JSON",
        "not JSON",
        "not UTF-8",
        "the event is not an object",
    ]
    assert first["original_topic"] == topic.encode()
    assert first["from"] == b"test"
    assert {"original_partition", "original_offset", "original_timestamp"} <= first.keys()
    assert {each.key() for each in letters} == {b"k", None}
    assert source.counts.empty == 1
    assert sum(source.counts.dead.values()) == 5


def test_nothing_is_confirmed_before_it_is_durable(cluster: Cluster) -> None:
    """
    While the graph is away the same events are offered again, and the group has confirmed nothing.

    An error that no retry mends comes out, and the next worker reads the same events.
    """
    topic = cluster.topic()
    group = f"g-{topic}"
    cluster.write(topic, event("m1"), event("m2"), key="one partition")
    away = Taken()
    away.errors = [GraphUnavailableError("away")] * 10_000
    source = source_of(cluster, topic)
    with running(lambda stop: source.run(away, stop)) as errors:
        wait(lambda: away.calls >= 5)
        during = cluster.committed(topic, group)
        away.errors = [GraphSchemaError("of another version")]
        wait(lambda: bool(errors))
    after = cluster.committed(topic, group)
    taken = Taken()
    with running(lambda stop: source_of(cluster, topic).run(taken, stop)):
        wait(lambda: len(taken.ids) == 2)
    confirmed = cluster.committed(topic, group)

    assert (during, after) == ({}, {})
    assert [type(error) for error in errors] == [GraphSchemaError]
    assert taken.ids == ["m1", "m2"]
    assert list(confirmed.values()) == [2]
    assert source.counts.retries >= 5


def test_a_graph_that_comes_back_is_given_everything(cluster: Cluster) -> None:
    """After a pause all goes on, in order, and with what came meanwhile."""
    topic = cluster.topic()
    taken = Taken()
    taken.errors = [GraphUnavailableError("away")] * 3
    cluster.write(topic, event("m1"), key="one partition")
    source = source_of(cluster, topic)
    with running(lambda stop: source.run(taken, stop)) as errors:
        wait(lambda: taken.calls >= 1)
        cluster.write(topic, event("m2"), event("m3"), key="one partition")
        wait(lambda: len(taken.ids) == 3)

    assert errors == []
    assert taken.ids == ["m1", "m2", "m3"]


def test_stopping_does_not_wait_for_the_graph(mock: Cluster) -> None:
    """Told to stop while the graph is away: it ends at once, and nothing is confirmed."""
    topic = mock.topic()
    mock.write(topic, event("m1"))
    taken = Taken()
    taken.errors = [GraphUnavailableError("away")] * 10_000
    source = source_of(mock, topic, pauses=(60.0, 60.0))
    with running(lambda stop: source.run(taken, stop)) as errors:
        wait(lambda: taken.calls == 1)
        began = time.monotonic()

    assert time.monotonic() - began < 10
    assert errors == []
    assert mock.committed(topic, f"g-{topic}") == {}


def test_a_batch_that_takes_long_does_not_leave_the_group(mock: Cluster) -> None:
    """
    A graph that takes longer than a member may be silent is waited for, and the batch confirmed.

    Put out of the group, the worker would read the same batch again, and again.
    """
    topic = mock.topic()
    mock.write(topic, event("m1"), key="one partition")
    taken = Taken()
    options = {**OPTIONS, "max.poll.interval.ms": 6_000}
    source = source_of(mock, topic, options=options)

    def slowly(events: Sequence[Event]) -> None:
        taken(events)
        time.sleep(9)

    with running(lambda stop: source.run(slowly, stop)) as errors:
        wait(lambda: source.counts.messages == 1)
        time.sleep(1)

    assert errors == []
    assert taken.ids == ["m1"]
    assert list(mock.committed(topic, f"g-{topic}").values()) == [1]


def test_what_ends_a_consumer_comes_out(mock: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put out by another member of its name, it does not wait for nothing for ever."""
    clients: list[Any] = []

    def open_noted(kind: Any, config: Any) -> Any:
        clients.append(_open(kind, config))
        return clients[-1]

    monkeypatch.setattr("recognition.kafka._open", open_noted)
    topic = mock.topic()
    mock.write(topic, event("m1"))
    taken = Taken()
    source = source_of(mock, topic)
    with running(lambda stop: source.run(taken, stop)) as errors:
        wait(lambda: taken.ids == ["m1"])
        end(clients[0], ck.KafkaError.FENCED_INSTANCE_ID)
        wait(lambda: bool(errors))

    assert isinstance(errors[0], SourceError)
    assert errors[0].retryable


def end(client: Any, code: int) -> None:
    """Raise a fatal error inside of librdkafka, by its own function for tests."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    library = ctypes.CDLL(next(line.split()[-1] for line in lines if "librdkafka" in line))
    # Behind the head of every Python object, the client's handle begins with that of librdkafka.
    handle = ctypes.c_void_p.from_address(id(client) + object.__basicsize__)
    library.rd_kafka_test_fatal_error.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    library.rd_kafka_test_fatal_error(handle, code, b"test")


def test_two_workers_share_and_take_over(cluster: Cluster) -> None:
    """A second worker gets a part of the partitions; when it leaves, the first has all again."""
    topic = cluster.topic(partitions=4)
    first, second = Taken(), Taken()
    one = source_of(cluster, topic)
    other = source_of(cluster, topic)
    sent: list[str] = []

    def write() -> None:
        for number in range(8):
            sent.append(f"m{len(sent)}")
            cluster.write(topic, event(sent[-1]), key=f"k{number}")

    with running(lambda stop: one.run(first, stop)) as errors:
        write()
        wait(lambda: len(set(first.ids)) == 8)
        with running(lambda stop: other.run(second, stop)) as other_errors:
            wait(lambda: other.counts.rebalances > 0)

            def shared() -> bool:
                write()
                time.sleep(0.2)
                return bool(second.ids)

            wait(shared)
            wait(lambda: set(sent) <= {*first.ids, *second.ids})
        write()
        wait(lambda: set(sent) <= {*first.ids, *second.ids})

    assert errors + other_errors == []
    assert one.counts.rebalances >= 2


def test_a_broker_that_goes_away_is_waited_for(broker: Broker, tansu: Cluster) -> None:
    """Cut off in the middle: no error comes out, and all events arrive when it is back."""
    topic = tansu.topic()
    taken = Taken()
    source = source_of(tansu, topic)
    tansu.write(topic, event("m1"))
    with running(lambda stop: source.run(taken, stop)) as errors:
        wait(lambda: taken.ids == ["m1"])
        broker.cut()
        try:
            time.sleep(2)
            assert errors == []
        finally:
            broker.mend()
        tansu.write(topic, event("m2"))
        wait(lambda: "m2" in taken.ids)

    assert errors == []
    assert set(taken.ids) == {"m1", "m2"}


def test_stopping_does_not_wait_for_a_broker_that_is_away(broker: Broker, tansu: Cluster) -> None:
    """A worker ends although it can confirm nothing any more; what it took comes again."""
    topic = tansu.topic()
    taken = Taken()
    source = source_of(tansu, topic, options={**OPTIONS, "auto.commit.interval.ms": 60_000})
    tansu.write(topic, event("m1"))
    try:
        with running(lambda stop: source.run(taken, stop)):
            wait(lambda: taken.ids == ["m1"])
            broker.cut()
            began = time.monotonic()
        took = time.monotonic() - began
    finally:
        broker.mend()

    assert took < 30


_WORKER = """
import sys, threading
from recognition.graph.sqlite import SqliteGraph
from recognition.kafka import KafkaSource
from recognition.recognizer import Recognizer
from recognition.rules import Rules

servers, topic, graph = sys.argv[1:]
options = {"session.timeout.ms": 6_000, "heartbeat.interval.ms": 500}

def take(events):
    with SqliteGraph(graph) as opened:
        Recognizer(opened, Rules(stamps=False)).process(events)
    print("taken", len(events), flush=True)

source = KafkaSource(servers, [topic], "killed", batch_size=40, linger=0.05, options=options)
source.run(take, threading.Event())
"""


def test_a_worker_that_is_killed_loses_nothing(tansu: Cluster, tmp_path: Path) -> None:
    """SIGKILL once the first batch is in the graph: the next worker goes on, nothing is missing."""
    topic = tansu.topic()
    path = tmp_path / "graph.db"
    bodies = [
        body
        for device in range(20)
        for body in (
            *(event(f"m{device}-{n}", f"a{device}") for n in range(10)),
            event(f"i{device}", f"a{device}", type="identify", userId=f"u{device}"),
        )
    ]
    tansu.write(topic, *bodies)
    with subprocess.Popen(
        [sys.executable, "-c", _WORKER, tansu.servers, topic, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    ) as worker:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        worker.send_signal(signal.SIGKILL)
    rest = Taken()

    def take(events: Sequence[Event]) -> None:
        with SqliteGraph(path) as graph:
            Recognizer(graph, Rules(stamps=False)).process(events)
        rest(events)

    last = KafkaSource(tansu.servers, [topic], "killed", linger=0.1, options=OPTIONS)
    with running(lambda stop: last.run(take, stop)) as errors:
        wait(lambda: "i19" in rest.ids)
    warehouse, layout = Warehouse(), Rules().layout
    warehouse.load("events", [layout.row_of(parse_event(body), "events") for body in bodies])
    with SqliteGraph(path) as graph:
        warehouse.apply([leased.update for leased in graph.lease_updates(10_000, 60)])
    users = {key: row["user_id"] for key, row in warehouse.tables["events"].items()}

    assert errors == []
    assert line.startswith("taken")
    assert users == {str(body["messageId"]): f"u{str(body['anonymousId'])[1:]}" for body in bodies}


def test_events_may_stand_inside_of_a_message(mock: Cluster) -> None:
    """Jitsu's topic ``destination-messages`` holds each event under a key."""
    topic, dead = mock.topic(), mock.topic()
    mock.write(topic, {"httpPayload": event("m1"), "type": "page"}, event("m2"), key="k")
    taken = Taken()
    source = source_of(mock, topic, inside="httpPayload", dead_letters=dead)
    with running(lambda stop: source.run(taken, stop)):
        wait(lambda: source.counts.messages == 2)

    assert taken.ids == ["m1"]
    assert source.counts.dead == {"the message has no httpPayload": 1}
    assert len(mock.read(dead, 1)) == 1


def test_dead_letters_without_a_topic_are_told_by_their_place(
    mock: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """Partition, offset and reason are logged; the value is not."""
    topic = mock.topic()
    mock.write(topic, b"{secret value")
    source = source_of(mock, topic)
    with running(lambda stop: source.run(Taken(), stop)):
        wait(lambda: source.counts.messages == 1)

    assert "offset 0 is a dead letter: not JSON" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"enable.auto.commit": False}, "not to be set: enable.auto.commit"),
        ({"enable.auto.offset.store": True, "group.id": "x"}, "auto.offset.store, group.id"),
        ({"sesion.timeout.ms": 1}, "sesion.timeout.ms is unknown or wrong"),
        ({"session.timeout.ms": "secret"}, "session.timeout.ms is unknown or wrong"),
    ],
)
def test_wrong_options_are_refused(mock: Cluster, options: dict[str, Any], told: str) -> None:
    """What is decided here, unknown or wrong is named, without its value."""
    with pytest.raises(ConfigurationError, match=told) as caught:
        source_of(mock, "t", options=options).run(Taken(), threading.Event())

    assert "secret" not in str(caught.value)


def test_a_consumer_needs_topics_and_a_group() -> None:
    """Nothing to read, nobody to read for, and letters that would be read again are refused."""
    for topics, group, dead in (
        ([], "g", None),
        (["t"], "", None),
        (["t"], "g", "t"),
        (["a", "^events.*"], "g", "events-dead"),
    ):
        with pytest.raises(ConfigurationError):
            KafkaSource("127.0.0.1:9", topics, group, dead_letters=dead)


def test_a_topic_that_cannot_be_is_an_error(tansu: Cluster) -> None:
    """A name that Kafka has no topic for does not wait for ever, where the cluster says so."""
    source = KafkaSource(tansu.servers, ["no such/topic"], "g", options=OPTIONS)
    source._note(ck.KafkaError(ck.KafkaError.TOPIC_AUTHORIZATION_FAILED))
    with pytest.raises(SourceError, match="TOPIC_AUTHORIZATION_FAILED") as caught:
        source._consume(_Nothing(), 1, 0.0)

    assert not caught.value.retryable


class _Nothing:
    def consume(self, *_: object) -> list[object]:
        return []


# Updates out and in -----------------------------------------------------------------------------


def update_of(device: str, user: str, sequence: int, table: str = "events") -> UpdateByCriteria:
    return UpdateByCriteria(
        id=f"{device}-{sequence}-{table}",
        workspace="w",
        table=table,
        set={"user_id": user, "recognition_version": sequence},
        where=(Equals(column="anonymous_id", value=device), Empty(column="user_id")),
        sequence=sequence,
        cause=Cause(message_id=f"m{sequence}", anonymous_id=device),
        created_at=at(0),
    )


def test_the_key_is_the_visitors() -> None:
    """All updates of a visitor have one key, whichever way they name it; workspaces differ."""
    named = update_of("a1", "u1", 1)
    unnamed = named.model_copy(update={"cause": Cause()})
    several = named.model_copy(
        update={"cause": Cause(), "where": (OneOf(column="user_id", values=("a", "b")),)}
    )
    other = named.model_copy(update={"workspace": "v"})

    assert key_of(named) == key_of(unnamed) == b'["w","a1"]'
    assert key_of(several) == b'["w",""]'
    assert key_of(other) == b'["v","a1"]'


def test_updates_of_a_visitor_stay_in_order(cluster: Cluster) -> None:
    """Each visitor's updates are in one partition, in the order in which they were sent."""
    topic = cluster.topic(partitions=4)
    updates = [update_of(f"a{n % 7}", f"u{n}", n) for n in range(70)]
    UpdatesTopic(cluster.servers, topic).send(updates)
    partitions: dict[bytes, set[int]] = {}
    order: dict[bytes, list[int]] = {}
    for message in cluster.read(topic, 70):
        partitions.setdefault(message.key(), set()).add(message.partition())
        order.setdefault(message.key(), []).append(json.loads(message.value())["sequence"])

    assert len(order) == 7
    assert {len(each) for each in partitions.values()} == {1}
    assert all(each == sorted(each) for each in order.values())
    assert sum(map(len, order.values())) == 70


def test_the_outbox_is_relayed(cluster: Cluster) -> None:
    """Updates of a graph go out once; those that were not taken are in the outbox again."""
    topic = cluster.topic()
    graph = MemoryGraph()
    recognizer = Recognizer(graph, Rules(workspace="w"))
    recognizer.process([parse_event(event("m1", "a1")), parse_event(event("m2", "a2"))])
    recognizer.process(
        [parse_event(event(f"i{n}", f"a{n}", type="identify", userId=f"u{n}")) for n in (1, 2)]
    )
    nowhere = UpdatesTopic("127.0.0.1:9", topic, options={"delivery.timeout.ms": 300, **_QUICK})
    with pytest.raises(OutcomeUnknownError, match="2 of 2 messages"):
        nowhere.relay(graph)
    out = UpdatesTopic(cluster.servers, topic)
    sent = (out.relay(graph, window=1), out.relay(graph))
    found = [json.loads(each.value()) for each in cluster.read(topic, 2)]

    assert sent == (2, 0)
    assert {each["set"]["user_id"] for each in found} == {"u1", "u2"}


def test_an_update_that_is_too_large_is_told(mock: Cluster) -> None:
    """What no retry sends is an error that says so; the others are there."""
    topic = mock.topic()
    large = update_of("a1", "u" * 2_000_000, 1)
    with pytest.raises(SinkError, match=r"1 of 2 messages .* MSG_SIZE_TOO_LARGE") as caught:
        UpdatesTopic(mock.servers, topic).send([update_of("a2", "u2", 2), large])

    assert not caught.value.retryable
    assert caught.value.written is True
    assert len(mock.read(topic, 1)) == 1


class Rows:
    """A table of SQLite, as a destination."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute(
            "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT,"
            " recognition_version INTEGER)"
        )
        self.url = f"sqlite:///{path}"

    def add(self, *devices: str) -> None:
        self._connection.executemany(
            "INSERT INTO events (message_id, anonymous_id) VALUES (?, ?)",
            [(f"m-{device}", device) for device in devices],
        )

    def users(self) -> dict[str, str | None]:
        return dict(self._connection.execute("SELECT anonymous_id, user_id FROM events"))

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Rows]:
    with closing(Rows(tmp_path / "warehouse.db")) as found:
        yield found


class Fragile:
    """A sink that is away at first."""

    def __init__(self, sink: Any, errors: list[Exception]) -> None:
        self._sink = sink
        self.errors = errors

    @property
    def capabilities(self) -> Capabilities:
        return self._sink.capabilities  # type: ignore[no-any-return]

    def compile(self, step: Any) -> str:
        return str(self._sink.compile(step))

    def apply(self, plan: Plan) -> Applied:
        if self.errors:
            raise self.errors.pop(0)
        applied: Applied = self._sink.apply(plan)
        return applied

    def close(self) -> None:
        self._sink.close()


class Refusing(Fragile):
    """A sink that refuses every plan with a device of this name, and would again."""

    def __init__(self, sink: Any, device: str) -> None:
        super().__init__(sink, [])
        self._device = device

    def apply(self, plan: Plan) -> Applied:
        for step in plan.steps:
            if any(str(row.equals[0]).startswith(self._device) for row in step.rows):
                raise SinkError("denied; everything was rolled back")
        return super().apply(plan)


def test_updates_reach_the_rows_of_a_destination(cluster: Cluster, rows: Rows) -> None:
    """
    From one topic into a table: later updates stand, poison and refused ones are dead letters.

    A destination that is away is waited for. The second time the same updates change nothing.
    """
    topic, dead = cluster.topic(), cluster.topic()
    rows.add("a1", "a2", "a3")
    out = UpdatesTopic(cluster.servers, topic)
    out.send([update_of("a1", "u1", 1), update_of("a2", "u2", 2), update_of("a1", "u9", 3)])
    out.send([update_of("a3", "u3", 4, table="missing")])
    cluster.write(topic, b"{poison", None, key="k")
    with closing(open_sink(rows.url)) as opened:
        sink = Fragile(opened, [SinkUnavailableError("away")] * 2)
        consumer = UpdatesConsumer(
            cluster.servers,
            [topic],
            f"g-{topic}",
            sink,
            dead_letters=dead,
            linger=0.1,
            pauses=(0.05, 0.1),
            options=OPTIONS,
        )
        with running(consumer.run) as errors:
            wait(lambda: consumer.counts.messages == 6)
            once = rows.users()
            out.send([update_of("a1", "u1", 1), update_of("a2", "u2", 2)])
            wait(lambda: consumer.counts.messages == 8)
    letters = cluster.read(dead, 2)

    assert errors == []
    assert once == {"a1": "u9", "a2": "u2", "a3": None}
    assert rows.users() == once
    assert consumer.counts.retries == 2
    assert consumer.counts.empty == 1
    reasons = {dict(each.headers())["error"].decode()[:27] for each in letters}
    assert reasons == {"not a JSON object: Expectin", "the database has no table '"}
    assert consumer.counts.dead == {"no update message": 1, "TableError": 1}


def test_updates_that_break_a_window_are_found(mock: Cluster, rows: Rows) -> None:
    """One that the sink refuses each time is a dead letter, and all others are applied."""
    topic, dead = mock.topic(), mock.topic()
    rows.add(*(f"a{n}" for n in range(9)))
    updates = [update_of(f"a{n}", f"u{n}", n) for n in range(9)]
    # They are fetched together: in a window of its own, the one would be as if nothing could be
    # applied.
    mock.write(topic, *(update.to_json().encode() for update in updates), key="one partition")
    with closing(open_sink(rows.url)) as opened:
        consumer = UpdatesConsumer(
            mock.servers,
            [topic],
            f"g-{topic}",
            Refusing(opened, "a4"),
            dead_letters=dead,
            batch_size=9,
            linger=2.0,
            options=OPTIONS,
        )
        with running(consumer.run) as errors:
            wait(lambda: bool(errors) or consumer.counts.messages == 9)

    assert errors == []
    assert consumer.counts.dead == {"SinkError": 1}
    assert rows.users() == {f"a{n}": None if n == 4 else f"u{n}" for n in range(9)}
    assert json.loads(mock.read(dead, 1)[0].value())["set"]["user_id"] == "u4"


class Locked(Fragile):
    """A sink that may not write into one of its tables, as a role without the right."""

    def apply(self, plan: Plan) -> Applied:
        if any(step.shape.table == "locked" for step in plan.steps):
            raise SinkReadOnlyError("the role may not UPDATE here; nothing was written")
        return super().apply(plan)


def test_a_table_that_may_not_be_written_holds_no_other(mock: Cluster, rows: Rows) -> None:
    """Wherever its updates stand in a window: they are dead letters, all others are applied."""
    topic, dead = mock.topic(), mock.topic()
    rows.add(*(f"a{n}" for n in range(9)))
    updates = [update_of(f"a{n}", f"u{n}", n, "locked" if n < 5 else "events") for n in range(9)]
    mock.write(topic, *(each.to_json().encode() for each in updates), key="one partition")
    with closing(open_sink(rows.url)) as opened:
        consumer = consumer_of(mock, topic, Locked(opened, []), dead_letters=dead, linger=0.5)
        with running(consumer.run) as errors:
            wait(lambda: bool(errors) or consumer.counts.messages == 9)

    assert errors == []
    assert consumer.counts.dead == {"SinkReadOnlyError": 5}
    assert rows.users() == {f"a{n}": None if n < 5 else f"u{n}" for n in range(9)}


def test_a_sink_that_refuses_everything_loses_nothing(mock: Cluster, rows: Rows) -> None:
    """Where nothing can be applied the error comes out; no update is given up or confirmed."""
    topic = mock.topic()
    UpdatesTopic(mock.servers, topic).send([update_of(f"a{n}", f"u{n}", n) for n in range(9)])
    with closing(open_sink(rows.url)) as opened:
        consumer = UpdatesConsumer(
            mock.servers, [topic], f"g-{topic}", Refusing(opened, "a"), options=OPTIONS
        )
        with running(consumer.run) as errors:
            wait(lambda: bool(errors))

    assert "denied" in str(errors[0])
    assert consumer.counts.dead == {}
    assert mock.committed(topic, f"g-{topic}") == {}


def consumer_of(cluster: Cluster, topic: str, sink: Any, **options: Any) -> UpdatesConsumer:
    given = {"linger": 0.1, "pauses": (0.05, 0.2), "options": OPTIONS, **options}
    return UpdatesConsumer(cluster.servers, [topic], f"g-{topic}", sink, **given)


def test_updates_are_counted_when_their_letters_are_written(mock: Cluster, rows: Rows) -> None:
    """A batch that will come again, for a letter that Kafka does not take, is not counted yet."""
    topic, dead = mock.topic(), mock.topic()
    rows.add("a1")
    good = update_of("a1", "u1", 1).to_json().encode()
    mock.write(topic, good, b"{poison" * 1_000, key="one partition")
    with closing(open_sink(rows.url)) as sink:
        # They are one batch: it gathers until both are there.
        consumer = consumer_of(
            mock,
            topic,
            sink,
            dead_letters=dead,
            batch_size=2,
            linger=30.0,
            options={**OPTIONS, "message.max.bytes": 1_000},
        )
        with running(consumer.run) as errors:
            wait(lambda: bool(errors))
    served = consumer.served

    assert "MSG_SIZE_TOO_LARGE" in str(errors[0])
    assert rows.users() == {"a1": "u1"}
    assert (served.updates, served.windows, sum(served.lag_counts)) == (0, 0, 0)


def test_what_a_destination_that_is_away_has_not_done_is_told(mock: Cluster, rows: Rows) -> None:
    """How far it is behind grows with what comes, and is known when it has ended."""
    topic = mock.topic()
    out = UpdatesTopic(mock.servers, topic)
    out.send([update_of("a1", f"u{n}", n) for n in range(5)])
    with closing(open_sink(rows.url)) as opened:
        sink = Fragile(opened, [SinkUnavailableError("away")] * 10_000)
        consumer = consumer_of(mock, topic, sink)
        with running(consumer.run) as errors:
            wait(lambda: sum(consumer.counts.behind.values()) == 5)
            out.send([update_of("a1", f"u{n}", n) for n in range(5, 8)])
            wait(lambda: sum(consumer.counts.behind.values()) == 8)
        left = sum(consumer.counts.behind.values())

    assert errors == []
    assert left == 8


def test_a_foreign_error_of_a_sink_holds_no_other_destination(
    mock: Cluster, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """A sink with a mistake in it is a destination that fails; its text is told nowhere."""
    topic, text = mock.topic(), "the row of u1@example.com"
    UpdatesTopic(mock.servers, topic).send([update_of("a1", "u1", 1)])
    with closing(open_sink(rows.url)) as opened:
        source = UpdatesSource("w", consumer_of(mock, topic, Fragile(opened, [ValueError(text)])))
        with running(lambda stop: source.run(None, stop)) as errors:
            wait(lambda: bool(errors))

    assert isinstance(errors[0], SinkError)
    assert errors[0].retryable
    assert str(errors[0]) == "destination w: ValueError"
    assert "in apply" in caplog.text
    assert text not in source.consumer.served.last_error + caplog.text
    assert mock.committed(topic, f"g-{topic}") == {}


class Held(Fragile):
    """A sink that waits, at its first plan, until it is let go on."""

    def __init__(self, sink: Any) -> None:
        super().__init__(sink, [])
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.plans = 0

    def apply(self, plan: Plan) -> Applied:
        self.plans += 1
        self.begun.set()
        assert self.go_on.wait(60)
        return super().apply(plan)


def test_a_window_that_was_begun_is_finished_when_told_to_stop(mock: Cluster, rows: Rows) -> None:
    """It is applied once and confirmed; nothing new is begun."""
    topic = mock.topic()
    rows.add("a1", "a2")
    out = UpdatesTopic(mock.servers, topic)
    out.send([update_of("a1", "u1", 1)])
    with closing(open_sink(rows.url)) as opened:
        sink = Held(opened)
        consumer = consumer_of(mock, topic, sink)
        letting_go = threading.Timer(0.5, sink.go_on.set)
        with running(consumer.run) as errors:
            assert sink.begun.wait(60)
            out.send([update_of("a1", "u2", 2)])
            letting_go.start()
        letting_go.join()

    assert errors == []
    assert sink.plans == 1
    assert rows.users() == {"a1": "u1", "a2": None}
    assert list(mock.committed(topic, f"g-{topic}").values()) == [1]


@LONG
def test_partitions_that_are_taken_away_in_the_middle_of_a_window_lose_nothing(
    cluster: Cluster, rows: Rows
) -> None:
    """Who has them then applies what was under way too; neither confirms what was not applied."""
    topic = cluster.topic(partitions=4)
    devices = [f"a{n}" for n in range(40)]
    rows.add(*devices)
    UpdatesTopic(cluster.servers, topic).send([update_of(d, f"u-{d}", 1) for d in devices])
    options = {**OPTIONS, "max.poll.interval.ms": 6_000}
    with closing(open_sink(rows.url)) as first, closing(open_sink(rows.url)) as second:
        sink = Held(first)
        one = consumer_of(cluster, topic, sink, options=options)
        other = consumer_of(cluster, topic, second, options=options)
        with running(one.run) as errors:
            assert sink.begun.wait(60)
            with running(other.run) as other_errors:
                wait(lambda: other.counts.messages > 0)
                early = rows.users()
                committed = cluster.committed(topic, f"g-{topic}")
                sink.go_on.set()
                wait(lambda: sum(cluster.committed(topic, f"g-{topic}").values()) == 40)
    users = rows.users()

    assert errors + other_errors == []
    assert sum(user is not None for user in early.values()) >= sum(committed.values())
    assert one.counts.messages + other.counts.messages > 40  # some by both
    assert users == {device: f"u-{device}" for device in devices}


def test_a_dead_letter_is_as_large_as_what_was_read(mock: Cluster) -> None:
    """Poison that is larger than producers write by default is no reason to stop for ever."""
    topic, dead = mock.topic(), mock.topic()
    producer = ck.Producer({"bootstrap.servers": mock.servers, "message.max.bytes": 4_000_000})
    producer.produce(topic, b"{" * 3_000_000)
    producer.flush(30)
    source = source_of(mock, topic, dead_letters=dead)
    with running(lambda stop: source.run(Taken(), stop)) as errors:
        wait(lambda: bool(errors) or source.counts.messages == 1)

    assert errors == []
    assert len(mock.read(dead, 1)[0].value()) == 3_000_000


def test_a_producer_that_is_at_its_end_is_made_anew(mock: Cluster) -> None:
    """What it was given then is an error that a retry mends, and the retry is done by another."""
    topic = mock.topic()
    out = UpdatesTopic(mock.servers, topic)
    out.send([update_of("a1", "u1", 1)])
    end(out._writer._producer, ck.KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER)
    with pytest.raises(OutcomeUnknownError):
        out.send([update_of("a1", "u2", 2)])
    out.send([update_of("a1", "u2", 2)])

    assert len(mock.read(topic, 2)) == 2


def test_letters_that_cannot_be_written_hold_the_batch(mock: Cluster) -> None:
    """A dead letter that Kafka does not take is no reason to forget the message."""
    topic, dead = mock.topic(), mock.topic()
    mock.write(topic, b"{poison" * 1_000)
    source = source_of(
        mock, topic, dead_letters=dead, options={**OPTIONS, "message.max.bytes": 1_000}
    )
    with running(lambda stop: source.run(Taken(), stop)) as errors:
        wait(lambda: bool(errors))

    assert "MSG_SIZE_TOO_LARGE" in str(errors[0])
    assert mock.committed(topic, f"g-{topic}") == {}
    assert (source.counts.messages, source.counts.dead) == (0, {})


def test_the_examples_of_the_page_run(mock: Cluster, rows: Rows) -> None:
    """docs/kafka.md: each example does what it says, told to stop at once."""
    page = (Path(__file__).parents[1] / "docs" / "kafka.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("kafka:9092", mock.servers)
    text = text.replace("mongodb://host/identity", "memory:").replace("threading.Event()", "stop")
    text = text.replace("postgresql+psycopg://loader@host/analytics", rows.url)
    stop = threading.Event()
    stop.set()
    names: dict[str, Any] = {"stop": stop, "graph": MemoryGraph()}
    exec(compile(text, "kafka.md", "exec"), names)
    names["sink"].close()

    assert len(blocks) == 3
    assert names["source"].counts.messages == 0
