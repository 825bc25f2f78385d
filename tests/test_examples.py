"""The examples run as they are, against real parts, and end when they are told to."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import confluent_kafka as ck
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    """The brokers inside of librdkafka, which other processes reach too."""
    keeper = ck.Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
    yield ",".join(
        f"{each.host}:{each.port}" for each in keeper.list_topics(timeout=30).brokers.values()
    )
    del keeper


def event(message_id: str, **members: object) -> bytes:
    body = {
        "messageId": message_id,
        "type": "page",
        "anonymousId": "a1",
        "timestamp": "2026-01-01T00:00:00Z",
        **members,
    }
    return json.dumps(body).encode()


@pytest.mark.timeout(420)  # FastStream is long in coming up
@pytest.mark.parametrize("name", ["kafka_worker.py", "faststream_worker.py"])
def test_a_worker_of_ones_own_recognises(kafka: str, tmp_path: Path, name: str) -> None:
    """Events from Kafka, rows in a table: after the identify the earlier rows have the user."""
    warehouse = sqlite3.connect(tmp_path / "warehouse.db", isolation_level=None)
    warehouse.execute(
        "CREATE TABLE events (message_id TEXT PRIMARY KEY, anonymous_id TEXT, user_id TEXT,"
        " timestamp TEXT)"
    )
    warehouse.executemany(
        "INSERT INTO events VALUES (?, 'a1', ?, '2026-01-01T00:00:00Z')",
        [("m1", None), ("m2", None), ("m3", "u1")],
    )
    topic = f"t-{uuid4().hex[:12]}"
    producer = ck.Producer({"bootstrap.servers": kafka})
    poison = (b'{"no": "event"}', None, b"[" * 100_000, b"\xff")
    for value in (event("m1"), *poison, event("m2")):
        producer.produce(topic, value, "a1")
    producer.produce(topic, event("m3", type="identify", userId="u1"), "a1")
    assert producer.flush(20) == 0
    log = tmp_path / "log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, str(EXAMPLES / name)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "src"),
                "GRAPH": f"sqlite:///{tmp_path / 'graph.db'}",
                "SINK": f"sqlite:///{tmp_path / 'warehouse.db'}",
                "KAFKA": kafka,
                "TOPIC": topic,
                # Of its own: in the brokers of librdkafka one that died holds others up.
                "GROUP": topic,
            },
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + 300
        users: dict[str, str | None] = {}
        while set(users.values()) != {"u1"}:
            assert worker.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
            users = dict(warehouse.execute("SELECT message_id, user_id FROM events"))
        worker.send_signal(signal.SIGTERM)
        code = worker.wait(60)
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait(20)
        warehouse.close()

    assert code == 0, log.read_text()
    assert users == {"m1": "u1", "m2": "u1", "m3": "u1"}
    assert "no event" in log.read_text()
