"""
A worker that is killed at random moments, while it serves DuckDB, PostgreSQL and ClickHouse.

Its events come from a directory, and from Kafka. How many times says ``RECOGNITION_TEST_DEATHS``;
there are 500 new events for each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import clickhouse_connect
import confluent_kafka as ck
import duckdb
import pytest

from broker import Broker, MissingBrokerError
from chdb_server import Server
from households import SIZE, make_household, owners, to_row, to_segment
from postgres import GivenServer
from recognition.events import Event
from recognition.graph import open_graph

KILLS = int(os.environ.get("RECOGNITION_TEST_DEATHS", "3"))
EVENTS = 500 * KILLS

NAMES = ("duckdb", "postgresql", "clickhouse")

# The command itself, once everything is imported. Who is killed is known to be dead to ClickHouse's
# next worker after half a second and not after ten, so that there is time for many deaths.
_WORKER = """
import sys
import recognition.sinks.clickhouse
import recognition.sinks.duckdb
import recognition.sinks.postgresql
from recognition.cli import main

recognition.sinks.clickhouse._IDLE = 0.5
print("up", flush=True)
sys.exit(main(sys.argv[1:]))
"""

_COLUMNS = "message_id TEXT PRIMARY KEY, anonymous_id TEXT, user_id TEXT, timestamp TIMESTAMP"
_CLICKHOUSE = (
    "CREATE TABLE test.events (message_id String, anonymous_id String, user_id Nullable(String),"
    " timestamp DateTime64(6, 'UTC')) ENGINE = MergeTree ORDER BY message_id"
    " SETTINGS enable_block_number_column = 1, enable_block_offset_column = 1"
)


class Destinations:
    """The three, with the rows of the pipeline, read by their own drivers."""

    def __init__(self, folder: Path, postgres: GivenServer, database: str, chdb: Server) -> None:
        self._file = folder / "warehouse.duckdb"
        self._postgres, self._database = postgres, database
        self._client: Any = clickhouse_connect.get_client(
            host="127.0.0.1", port=chdb.port, username="default", autogenerate_session_id=False
        )
        self.urls = [f"duckdb:///{self._file}", postgres.url(database), chdb.url("test")]

    def load(self, events: Sequence[Event], folder: Path) -> None:
        rows = [to_row(event) for event in events]
        text = "".join(",".join(value or "" for value in row) + "\n" for row in rows)
        (folder / "rows.csv").write_text(text)
        with duckdb.connect(self._file) as connection:
            connection.execute(f"CREATE TABLE events ({_COLUMNS})")
            connection.execute("INSERT INTO events FROM read_csv(?, header = false)", [
                str(folder / "rows.csv")
            ])  # fmt: skip
        with self._postgres.connect(self._database) as connection:
            connection.execute(f"CREATE TABLE events ({_COLUMNS})")
            with connection.cursor().copy("COPY events FROM STDIN (FORMAT csv)") as copy:
                copy.write(text)
            connection.execute("CREATE INDEX ON events (anonymous_id)")
        self._client.command("CREATE DATABASE test")
        self._client.command(_CLICKHOUSE)
        self._client.insert(
            "events",
            [[*row[:3], datetime.fromisoformat(row[3])] for row in rows],
            database="test",
            column_names=["message_id", "anonymous_id", "user_id", "timestamp"],
        )

    def users(self) -> dict[str, dict[str, str | None]]:
        select = "SELECT message_id, user_id FROM events"
        with duckdb.connect(self._file) as connection:
            one = dict(connection.execute(select).fetchall())
        with self._postgres.connect(self._database) as connection:
            two = dict(connection.execute(select).fetchall())
        three = self._client.query("SELECT message_id, user_id FROM test.events").result_rows
        return dict(zip(NAMES, (one, two, dict(three)), strict=True))

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def destinations(tmp_path: Path, postgres: GivenServer) -> Iterator[Destinations]:
    with (
        postgres.database() as database,
        Server(tmp_path / "chdb") as chdb,
        closing(Destinations(tmp_path, postgres, database, chdb)) as found,
    ):
        yield found


class Feed(Protocol):
    """Where the worker's events come from."""

    name: str
    endless: bool
    settings: str

    def put(self, events: Sequence[Event]) -> None:
        """More of them."""

    def left(self) -> int:
        """How much of it no worker has confirmed."""


class Files:
    """A directory."""

    name = "files"
    endless = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "in"
        self._folder.mkdir()
        self._parts = 0
        self.settings = f'[worker]\ndirectories = ["{self._folder}"]\n'

    def put(self, events: Sequence[Event]) -> None:
        part = self._folder / f"{self._parts:03}.part"
        self._parts += 1
        part.write_text("".join(json.dumps(to_segment(event)) + "\n" for event in events))
        part.rename(part.with_suffix(".ndjson"))

    def left(self) -> int:
        return len([*self._folder.glob("*.ndjson")])


class Topic:
    """A topic of two partitions; all of a visitor are in one."""

    name = "kafka"
    endless = True

    def __init__(self, broker: Broker) -> None:
        broker.create("events", partitions=2)
        options = {"bootstrap.servers": broker.servers, "log_level": 0}
        self._producer = ck.Producer(options)
        self._reader = ck.Consumer({**options, "group.id": "recognition"})
        # As the broker confirmed them: its high watermark is where the last batch begins.
        self._ends = [0, 0]
        # So long a member that was killed is missed before the next one gets its partitions.
        self.settings = (
            f'[worker.kafka]\nservers = "{broker.servers}"\ntopics = ["events"]\n'
            "batch_size = 50\nlinger_seconds = 0.05\n"
            "[worker.kafka.options]\n"
            '"session.timeout.ms" = 2000\n"heartbeat.interval.ms" = 300\n'
            '"auto.commit.interval.ms" = 100\n'
        )

    def put(self, events: Sequence[Event]) -> None:
        failed: list[object] = []

        def told(error: object, message: Any) -> None:
            if error is not None:
                failed.append(error)
            else:
                place = message.partition()
                self._ends[place] = max(self._ends[place], message.offset() + 1)

        for event in events:
            self._producer.produce(
                "events", json.dumps(to_segment(event)), event.anonymous_id, on_delivery=told
            )
        assert self._producer.flush(30) == 0
        assert failed == []

    def left(self) -> int:
        places = [ck.TopicPartition("events", number) for number in range(2)]
        found = self._reader.committed(places, timeout=20)
        return sum(self._ends) - sum(max(0, place.offset) for place in found)

    def close(self) -> None:
        self._reader.close()


@pytest.fixture(params=["files", "kafka"])
def feed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Feed]:
    if request.param == "files":
        yield Files(tmp_path)
        return
    try:
        broker = Broker()
    except MissingBrokerError as error:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise
        pytest.skip(str(error))
    with broker, closing(Topic(broker)) as topic:
        yield topic


@contextmanager
def working(config: Path, log: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command, when it is about to begin."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, "worker", "--config", str(config), "--json", *more],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as worker,
    ):
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "up\n", log.read_text()
            yield worker
        finally:
            worker.kill()


def backlogs(url: str) -> list[int]:
    """How many updates each destination waits for."""
    with closing(open_graph(url)) as graph:
        return [graph.backlog(name).waiting for name in graph.destinations()]


@pytest.mark.timeout(300 + 20 * KILLS)
def test_worker_that_is_killed_at_any_moment(
    tmp_path: Path, destinations: Destinations, feed: Feed
) -> None:
    """
    SIGKILL again and again while new events come; in the end all rows are those of the oracle.

    Nothing is settled: what was applied is not applied again for the sake of late rows, so that
    each update counts.
    """
    draw = random.Random(KILLS)
    households = [make_household(number) for number in range(EVENTS // SIZE)]
    arriving = [
        (position + 30 * draw.random(), event)
        for household in households
        for position, event in enumerate(household)
    ]
    events = [event for _, event in sorted(arriving, key=lambda pair: pair[0])]
    destinations.load(events, tmp_path)
    graph = f"sqlite:///{tmp_path}/graph.db"
    config = tmp_path / "recognition.toml"
    config.write_text(
        f'graph = "{graph}"\nbatch_size = 50\n'
        + "".join(
            f'[[destinations]]\nname = "{name}"\nurl = "{url}"\n'
            for name, url in zip(NAMES, destinations.urls, strict=True)
        )
        + feed.settings
        + "[delivery]\nwindow = 200\nevery_seconds = 0.02\nsettle_seconds = 0\n"
    )
    log = tmp_path / "worker.log"
    left = dict.fromkeys((feed.name, *NAMES), 0)
    for number in range(KILLS):
        feed.put(events[number::KILLS])
        before = feed.left()
        began = time.monotonic()
        with working(config, log) as worker:
            # As long as it took to import everything, which a busy machine makes longer as well.
            longest = 1.5 * (time.monotonic() - began)
            if feed.endless and draw.random() < 0.8:  # mostly when it is one of the group
                while feed.left() == before:
                    assert worker.poll() is None, log.read_text()
                    time.sleep(0.01)
                longest /= 6  # it is at work by now, and soon is not
            time.sleep(longest * draw.random())
            assert worker.poll() is None, log.read_text()
            worker.send_signal(signal.SIGKILL)
            worker.wait(30)
        # Of a topic, where it was read in part; a file is taken as a whole.
        left[feed.name] += 0 < feed.left() < before + (not feed.endless)
        for name, count in zip(NAMES, backlogs(graph), strict=False):
            left[name] += count > 0
    if feed.endless:
        with working(config, log) as worker:
            while feed.left():
                assert worker.poll() is None, log.read_text()
                time.sleep(0.1)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(60) == 0, log.read_text()
    with working(config, log, "--once") as worker:
        said, _ = worker.communicate(timeout=200 + 10 * KILLS)
    right = {key: who for household in households for key, who in owners(household).items()}
    (tmp_path / "left.json").write_text(json.dumps(left))

    assert worker.returncode == 0, log.read_text()
    assert json.loads(said)["updates_waiting"] == json.loads(said)["updates_rejected"] == 0
    for name, users in destinations.users().items():
        assert users == right, name
    # It did not only die idle.
    assert sum(left.values()) >= KILLS
