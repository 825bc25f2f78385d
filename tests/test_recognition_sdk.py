"""
What real SDKs put on the wire, recognised: Segment's, RudderStack's and Jitsu's, Python and Node.

Each of the five captures plays the same story, as far as its SDK allows:

* *anon-1*, *anon-js1* and Jitsu's own id: four anonymous events, then user u-1 identifies;
* *anon-2*: a second device of u-1;
* *kiosk-1*: an anonymous event, u-2 identifies, one more anonymous event, u-3 identifies;
* an alias that says that u-3 was u-2's previous id; a group call of u-1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from recognition.events import Event, Identifier, read_events
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from warehouse import Warehouse

CAPTURE = Path(__file__).with_name("data") / "segment_spec_sdk_capture.ndjson"

KIOSK = Identifier("anonymous_id", "kiosk-1")
OWN_COLUMN = "stitched_user_id"


def read_all() -> list[Event]:
    rejected: list[object] = []
    events = list(read_events(CAPTURE, rejects=rejected.append))
    assert rejected == []
    return events


def user_of(event: Event) -> str | None:
    return next((value for type, value in event.known if type == "user_id"), None)


def is_of_second_person(event: Event) -> bool:
    """The kiosk and the alias are about u-2 and u-3; everything else is about u-1."""
    return event.anonymous_id == "kiosk-1" or event.type == "alias"


def arrivals(events: Sequence[Event]) -> Iterator[tuple[str, list[Sequence[Event]]]]:
    """Ways in which the events may come: as captured, backwards, shuffled; in batches or not."""
    orders = {
        "as captured": list(events),
        "backwards": list(events)[::-1],
        "shuffled": random.Random(1).sample(events, len(events)),
    }
    for name, order in orders.items():
        for size in (1, 10, len(order)):
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            yield f"{name} by {size}", batches


@pytest.fixture(params=["memory", "sqlite"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Graph]:
    graph = MemoryGraph() if request.param == "memory" else SqliteGraph(tmp_path / "graph.db")
    yield graph
    graph.close()


def rows_after(graph: Graph, rules: Rules, batches: Sequence[Sequence[Event]]) -> dict[str, object]:
    """What the target column holds when all updates were carried out."""
    recognizer = Recognizer(graph, rules)
    warehouse = Warehouse()
    for batch in batches:
        done = recognizer.process(batch)
        for table, rows in recognizer.rows(done).items():
            warehouse.load(table, rows)
        recognizer.flushed(done.receipt)
    leased = graph.lease_updates(10_000, 60)
    warehouse.apply([delivery.update for delivery in leased])
    graph.acknowledge([delivery.position for delivery in leased])
    target = rules.target_of("events")
    return {message: row[target] for message, row in warehouse.tables["events"].items()}


def test_capture_is_read_whole() -> None:
    """All 49 events are read, with the parts that recognition needs."""
    events = read_all()
    by_type = {type: sum(event.type == type for event in events) for type in ("alias", "group")}

    assert len(events) == len({event.message_id for event in events}) == 49
    assert by_type == {"alias": 4, "group": 5}
    assert {event.previous_id for event in events if event.type == "alias"} == {"u-3"}
    assert {user_of(event) for event in events} == {None, "u-1", "u-2", "u-3"}


def test_rows_without_a_user_get_the_right_one(graph: Graph) -> None:
    """
    In the user column every row ends with a user, whatever the order of arrival.

    All devices but the kiosk were only ever used by u-1, so its anonymous rows are u-1's. On the
    kiosk u-2 identified first: what came before reaches back to u-2, what came between u-2 and u-3
    is u-2's too. Where a capture has one millisecond for all of it, the message id decides: u-2's
    identify is the later one. A row that names a user keeps it, so that u-3's identifies stay.
    """
    events = read_all()
    expected = {
        event.message_id: user_of(event) or ("u-2" if is_of_second_person(event) else "u-1")
        for event in events
    }
    found = {
        name: rows_after(graph, Rules(workspace=name), batches)
        for name, batches in arrivals(events)
    }

    assert [name for name, rows in found.items() if rows != expected] == []


def test_own_column_holds_the_person(graph: Graph) -> None:
    """
    In a column of its own every row holds its person, u-3 being u-2 since the alias.

    Both were seen as users; u-2's alias call is the first sighting of the two by (time, message
    id), so u-2 names the person.
    """
    events = read_all()
    expected = {
        event.message_id: "u-2" if is_of_second_person(event) else "u-1" for event in events
    }
    found = {
        name: rows_after(graph, Rules(workspace=name, target_column=OWN_COLUMN), batches)
        for name, batches in arrivals(events)
    }

    assert [name for name, rows in found.items() if rows != expected] == []


def test_persons_are_two(graph: Graph) -> None:
    """Two devices and five SDKs make one person of u-1; the alias makes one of u-2 and u-3."""
    recognizer = Recognizer(graph)
    recognizer.process(read_all())
    first = recognizer.explain(Identifier("email", "ann@example.com"))
    second = recognizer.explain(Identifier("email", "cy@example.com"))

    assert (graph.stats().persons, graph.stats().conflicts) == (2, 0)
    assert first.owner == "u-1"
    assert [identifier for identifier, _ in first.identifiers] == [
        Identifier("email", "ann@example.com"),
        Identifier("user_id", "u-1"),
    ]
    assert {claim.anonymous_id for claim in first.claims} == {
        "anon-1", "anon-2", "anon-js1", "5d44f503-92c1-4a54-b597-6304a180df1c",
    }  # fmt: skip
    assert second.owner == "u-2"
    assert [identifier.value for identifier, _ in second.identifiers] == [
        "bob@example.com", "cy@example.com", "u-2", "u-3",
    ]  # fmt: skip
    assert {link.kind for link in second.links} == {"alias", "seen"}


def test_kiosk_is_split_between_its_users(graph: Graph) -> None:
    """
    Without the alias u-2 and u-3 are two persons, and each has its time at the kiosk.

    Its claims by (time, message id): u-3, u-2 (first capture, one millisecond), u-2, u-3 (second).
    The first one reaches back before itself, then the latest one stands.
    """
    events = [event for event in read_all() if event.type != "alias"]
    rows = rows_after(graph, Rules(), [events])
    recognizer = Recognizer(graph)
    kiosk = recognizer.explain(KIOSK)
    names = {event.message_id: event.name for event in events}
    claims = [event for event in events if event.anonymous_id == "kiosk-1" and event.known]
    times = sorted(event.time for event in claims)

    assert graph.stats().persons == 3
    assert [span.owner for span in kiosk.spans] == [None, "u-3", "u-2", "u-3"]
    assert [span.start for span in kiosk.spans[2:]] == [times[0], times[-1]]
    assert {
        (names[message_id], owner)
        for message_id, owner in rows.items()
        if str(names[message_id]).startswith("Browse")
    } == {("Browse", "u-2"), ("Browse again", "u-2")}
    assert recognizer.process([_next_event_of_the_kiosk()]).owners[0].id == "u-3"  # type: ignore[union-attr]


def test_kiosk_is_one_persons_after_the_alias(graph: Graph) -> None:
    """With the alias the kiosk belongs to one person all the time, and to it the next event."""
    recognizer = Recognizer(graph)
    recognizer.process(read_all())

    assert {span.owner for span in recognizer.explain(KIOSK).spans[1:]} == {"u-2"}
    assert recognizer.process([_next_event_of_the_kiosk()]).owners[0].id == "u-2"  # type: ignore[union-attr]


def test_group_ids_link_nobody(graph: Graph) -> None:
    """Two users of one group stay two persons, and its traits are nobody's."""
    events = read_all()
    groups = [event for event in events if event.type == "group"]
    recognizer = Recognizer(graph, Rules(traits=("name",)))
    recognizer.process([event for event in events if event.type != "alias"])
    before = graph.stats().persons
    other = Event(
        message_id="group of u-2",
        time=groups[0].time,
        type="group",
        anonymous_id=None,
        known=(Identifier("user_id", "u-2"),),
        previous_id=None,
        name=None,
        table=None,
        traits=groups[0].traits,
        user_agent=None,
    )
    done = recognizer.process([other, *groups])

    assert {user_of(event) for event in groups} == {"u-1"}
    assert [event.traits for event in groups if "name" in event.traits] == []
    assert {type for event in groups for type, _ in event.known} <= {"user_id", "email"}
    assert done.links == 0
    assert [owner.id for owner in done.owners if owner is not None] == ["u-2"] + ["u-1"] * 5
    assert graph.stats().persons == before == 3
    assert not recognizer.explain(Identifier("group_id", "g-1")).found


def _next_event_of_the_kiosk() -> Event:
    last = max(event.time for event in read_all())
    return Event(
        message_id="next",
        time=last + 1,
        type="track",
        anonymous_id="kiosk-1",
        known=(),
        previous_id=None,
        name="Browse",
        table=None,
        traits={},
        user_agent=None,
    )
