"""
A worker that is killed at random moments, while it serves DuckDB, PostgreSQL and ClickHouse.

How many times says ``RECOGNITION_TEST_DEATHS``; there are 500 new events for each.
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
from typing import Any

import clickhouse_connect
import duckdb
import pytest

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
def test_worker_that_is_killed_at_any_moment(tmp_path: Path, destinations: Destinations) -> None:
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
    inbox = tmp_path / "in"
    inbox.mkdir()
    graph = f"sqlite:///{tmp_path}/graph.db"
    config = tmp_path / "recognition.toml"
    config.write_text(
        f'graph = "{graph}"\nbatch_size = 50\n'
        + "".join(
            f'[[destinations]]\nname = "{name}"\nurl = "{url}"\n'
            for name, url in zip(NAMES, destinations.urls, strict=True)
        )
        + f'[worker]\ndirectories = ["{inbox}"]\n'
        "[delivery]\nwindow = 200\nevery_seconds = 0.02\nsettle_seconds = 0\n"
    )
    log = tmp_path / "worker.log"
    left = dict.fromkeys(("files", *NAMES), 0)
    for number in range(KILLS):
        lines = [json.dumps(to_segment(event)) for event in events[number::KILLS]]
        part = inbox / f"{number:03}.part"
        part.write_text("\n".join(lines) + "\n")
        part.rename(part.with_suffix(".ndjson"))
        began = time.monotonic()
        with working(config, log) as worker:
            # As long as it took to import everything, which a busy machine makes longer as well.
            time.sleep(1.5 * draw.random() * (time.monotonic() - began))
            assert worker.poll() is None, log.read_text()
            worker.send_signal(signal.SIGKILL)
            worker.wait(30)
        left["files"] += any(inbox.glob("*.ndjson"))
        for name, count in zip(NAMES, backlogs(graph), strict=False):
            left[name] += count > 0
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
