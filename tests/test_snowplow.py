"""Events of a real tracker: the users that Snowplow's own models stitch to its sessions."""

from __future__ import annotations

import csv
import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from recognition.attribution import DAY, AttributionRules, Policy
from recognition.delivery import deliver
from recognition.events import Event, Format, parse_paths, parse_time, read_events
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.sinks.sqlite import SqliteSink
from warehouse import Warehouse

DATA = Path(__file__).with_name("data") / "snowplow_mobile"

#: As `data/snowplow_mobile/NOTE.md` says: the device id is the one of the session context.
MOBILE = Format(
    label="snowplow-mobile",
    message_id=parse_paths("event_id"),
    time=parse_paths("derived_tstamp"),
    anonymous_id=parse_paths("device_user_id"),
    known={"user_id": parse_paths("user_id")},
    name=parse_paths("event_name"),
)

#: What comes later in a session than this does not count, in microseconds.
LONGEST_SESSION = 3 * DAY

RULES = Rules(
    attribution=AttributionRules(policy=Policy.LAST_LOGIN), target_column="stitched_user_id"
)


COLUMNS = {
    name: "time" if name == "timestamp" else "text"
    for name in (
        "message_id", "anonymous_id", "user_id", "timestamp", "type", "event", "stitched_user_id",
    )
}  # fmt: skip


class Seen(NamedTuple):
    """An event with the session that it belongs to, if any."""

    session: str
    event: Event


def read_all() -> list[Seen]:
    path = DATA / "thin_events.csv"
    rejected: list[object] = []
    events = list(read_events(path, format=MOBILE, rejects=rejected.append))
    with path.open(encoding="utf-8", newline="") as file:
        sessions = [row["session_id"] for row in csv.DictReader(file)]
    assert rejected == []
    return list(map(Seen, sessions, events))


def expected_sessions() -> dict[str, dict[str, str]]:
    with (DATA / "thin_sessions_expected.csv").open(encoding="utf-8", newline="") as file:
        return {row["session_id"]: row for row in csv.DictReader(file)}


def cut(seen: Sequence[Seen]) -> list[Seen]:
    """Without events that belong to no session, or come later than a session may last."""
    starts: dict[str, int] = {}
    for session, event in seen:
        starts[session] = min(event.time, starts.get(session, event.time))
    return [
        each
        for each in seen
        if each.session and each.event.time <= starts[each.session] + LONGEST_SESSION
    ]


def stitched_users(seen: Sequence[Seen], rows: Mapping[str, object]) -> dict[str, set[object]]:
    """What the rows of each session hold that Snowplow's result has."""
    found: dict[str, set[object]] = {}
    for session, event in seen:
        if session in EXPECTED:
            found.setdefault(session, set()).add(rows[event.message_id])
    return found


def users_in(warehouse: Warehouse) -> dict[str, object]:
    rows = warehouse.tables["events"]
    return {message_id: row["stitched_user_id"] for message_id, row in rows.items()}


EXPECTED = {session: {row["stitched_user_id"]} for session, row in expected_sessions().items()}


@pytest.fixture(params=["memory", "sqlite"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Graph]:
    graph = MemoryGraph() if request.param == "memory" else SqliteGraph(tmp_path / "graph.db")
    yield graph
    graph.close()


def test_data_is_what_its_note_says() -> None:
    """130 events are read, some do not count, and the 7 sessions begin where they should."""
    seen = read_all()
    starts = {
        session: min(event.time for other, event in seen if other == session)
        for session in EXPECTED
    }

    assert len(seen) == 130
    assert len(EXPECTED) == 7
    assert 0 < len(cut(seen)) < len(seen)
    assert starts == {
        session: parse_time(row["start_tstamp"]) for session, row in expected_sessions().items()
    }


@pytest.mark.parametrize("size", [1, 7, 130])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_every_session_has_the_stitched_user(graph: Graph, size: int, seed: int | None) -> None:
    """`last_login` into a column of its own gives Snowplow's user to all rows of all sessions."""
    seen = cut(read_all())
    arriving = [event for _, event in seen]
    if seed is not None:
        random.Random(seed).shuffle(arriving)
    recognizer = Recognizer(graph, RULES)
    warehouse = Warehouse()
    for start in range(0, len(arriving), size):
        done = recognizer.process(arriving[start : start + size])
        warehouse.load("events", recognizer.rows(done)["events"])
        recognizer.flushed(done.receipt)
    warehouse.apply([delivery.update for delivery in graph.lease_updates(10_000, 60)])

    assert stitched_users(seen, users_in(warehouse)) == EXPECTED


def test_rows_of_a_real_table_have_the_stitched_user(graph: Graph, tmp_path: Path) -> None:
    """The same through a real sink: seven sessions, seven right users in an SQLite table."""
    path = tmp_path / "warehouse.db"
    seen = cut(read_all())
    recognizer = Recognizer(graph, RULES)
    sink = SqliteSink(f"sqlite:///{path}")
    for start in range(0, len(seen), 10):
        done = recognizer.process([event for _, event in seen[start : start + 10]])
        sink.load("events", recognizer.rows(done)["events"], key="message_id", columns=COLUMNS)
        recognizer.flushed(done.receipt)
    delivered = deliver(graph, sink)
    sink.close()
    with closing(sqlite3.connect(path)) as connection:
        rows = dict(connection.execute("SELECT message_id, stitched_user_id FROM events"))

    assert stitched_users(seen, rows) == EXPECTED
    assert delivered.rejected == []
    assert delivered.rows_changed > 0


def test_without_the_cut_two_sessions_differ(graph: Graph) -> None:
    """What the cut leaves out matters: with all events two of the seven get another user."""
    seen = read_all()
    recognizer = Recognizer(graph, RULES)
    warehouse = Warehouse()
    done = recognizer.process([event for _, event in seen])
    warehouse.load("events", recognizer.rows(done)["events"])
    warehouse.apply([delivery.update for delivery in graph.lease_updates(10_000, 60)])
    found = stitched_users(cut(seen), users_in(warehouse))

    assert sum(found[session] == EXPECTED[session] for session in EXPECTED) == 5
