"""
From a file of events to rows in a real database, with crashes and any order of delivery between.
"""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracle import Oracle, make_event
from recognition.attribution import DAY, AttributionRules, Policy
from recognition.cli import main
from recognition.delivery import deliver
from recognition.errors import TableError, ValueRefusedError
from recognition.events import Event, render_time
from recognition.graph.sqlite import SqliteGraph
from recognition.layouts import layout_named
from recognition.messages import UpdateByCriteria
from recognition.planner import plan_updates
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import References, Rules, Supersede, TableRules
from recognition.sinks import open_sink
from recognition.sinks.sql import SqlSink
from test_decisions import LOOKBACK, MODES, STEPS, deliveries, rules_of, target_of, untie

SECOND = 1_000_000
COLUMNS = ("message_id", "anonymous_id", "user_id", "timestamp")
CRASHING = Path(__file__).with_name("crashing.py")


def to_segment(event: Event) -> dict[str, Any]:
    """The event as a Segment call; times of the tests are small and become seconds."""
    traits = {i.type: i.value for i in event.known if i.type != "user_id"}
    body: dict[str, Any] = {
        "messageId": event.message_id,
        "timestamp": render_time(event.time * SECOND),
        "type": event.type,
        "anonymousId": event.anonymous_id,
        "userId": next((i.value for i in event.known if i.type == "user_id"), None),
        "context": {"traits": traits},
    }
    if event.previous_id is not None:
        body |= {"type": "alias", "previousId": event.previous_id}
    return body


def write_events(path: Path, events: Iterable[Event]) -> Path:
    path.write_text("".join(json.dumps(to_segment(event)) + "\n" for event in events))
    return path


def read_column(path: Path, column: str) -> dict[str, str | None]:
    """By message id; read by the database's own driver."""
    if path.suffix == ".duckdb":
        with duckdb.connect(str(path)) as connection:
            rows = connection.sql(f'SELECT message_id, "{column}" FROM events').fetchall()
            return dict(rows)
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute(f'SELECT message_id, "{column}" FROM events').fetchall())


def apply_anyhow(sink: Any, updates: Sequence[UpdateByCriteria], shuffle: random.Random) -> None:
    """Deliver at least once, in any order, in windows of any size."""
    arriving = [*updates, *shuffle.sample(updates, len(updates) // 2)]
    shuffle.shuffle(arriving)
    while arriving:
        size = shuffle.randint(1, len(arriving))
        applied = sink.apply(plan_updates(arriving[:size]))
        assert applied.rejected == ()
        arriving = arriving[size:]


def load_rows(sink: Any, recognizer: Recognizer, done: Recognition) -> None:
    """Write a batch's rows as `run --load` does."""
    rules = recognizer.rules
    stamps = {target_of(rules): "text"}
    if rules.default.supersede is Supersede.VERSION:
        stamps["recognition_version"] = "integer"
    own = rules.has_own_column
    stamped = {o.message_id for o in done.receipt.observations if own or not o.names_user}
    for table, rows in {"events": [], **recognizer.rows(done)}.items():
        columns = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)], "text")
        sink.load(
            table,
            rows,
            key="message_id",
            columns=columns | stamps | {"timestamp": "time"},
            stamps=tuple(stamps) if rules.stamps else (),
            stamped=stamped,
        )


def work(recognizer: Recognizer, sink: Any, batch: Sequence[Event]) -> Iterator[None]:
    """Take a batch from the events to the rows; a worker may die after any step."""
    done = recognizer.process(batch)
    yield
    load_rows(sink, recognizer, done)
    yield
    recognizer.flushed(done.receipt)


def load_and_deliver(
    rules: Rules,
    arriving: Sequence[Sequence[Event]],
    folder: Path,
    scheme: str,
    shuffle: random.Random,
) -> dict[str, str | None]:
    """
    The rows of a real sink after a pipeline of several workers, with unordered delivery.

    A batch whose worker dies comes again, until one comes to the end with it. One that was only
    slow goes on meanwhile.
    """
    graph = SqliteGraph(":memory:")
    sink: Any = open_sink(f"{scheme}:///{folder}/warehouse.{scheme}")
    held: list[UpdateByCriteria] = []
    recognizer = Recognizer(graph, rules)
    load_rows(sink, recognizer, recognizer.process([]))

    def attempt(batch: Sequence[Event], steps: int) -> Iterator[None]:
        return islice(work(Recognizer(graph, rules), sink, batch), steps)

    def carry(batch: Sequence[Event]) -> Iterator[None]:
        while shuffle.random() < 0.4:
            yield from attempt(batch, shuffle.randint(1, 2))
        yield from attempt(batch, 3)

    waiting = [
        worker
        for batch in arriving
        for worker in [carry(batch), attempt(batch, 3)][: 1 + (shuffle.random() < 0.3)]
    ]
    running: list[Iterator[None]] = []
    while waiting or running:
        if waiting and len(running) < 3:
            running.append(waiting.pop(0))
        worker = shuffle.choice(running)
        if next(worker, running) is running:
            running.remove(worker)
        leased = graph.lease_updates(10_000, 60)
        graph.acknowledge([item.position for item in leased])
        held += [item.update for item in leased]
        if shuffle.random() < 0.4:
            apply_anyhow(sink, held, shuffle)
            held = shuffle.sample(held, len(held) // 2)
    apply_anyhow(sink, held, shuffle)
    sink.close()
    graph.close()
    return read_column(folder / f"warehouse.{scheme}", target_of(rules))


@pytest.mark.parametrize(("scheme", "examples"), [("sqlite", 60), ("duckdb", 15)])
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_real_sink_are_those_of_the_oracle(
    mode: str, scheme: str, examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """
    Workers that die or are slow, and updates in any order, repeated, leave the oracle's rows.
    """

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(
        delivery=deliveries(),
        policy=st.sampled_from(Policy),
        stamps=st.booleans(),
        seed=st.integers(0, 999),
    )
    def check(
        delivery: tuple[list[Event], list[Sequence[Event]]],
        policy: Policy,
        stamps: bool,
        seed: int,
    ) -> None:
        events, arriving = delivery
        rules = rules_of(mode, policy, stamps=stamps)
        if step := STEPS.get(rules.default.references):
            rules = replace(rules, attribution=replace(rules.attribution, lookback=LOOKBACK * step))
            events, arriving = untie(events, step), [untie(batch, step) for batch in arriving]
        folder = tmp_path_factory.mktemp("sink")
        rows = load_and_deliver(rules, arriving, folder, scheme, random.Random(seed))
        oracle = Oracle(
            policy=rules.attribution.policy,
            lookback=rules.attribution.lookback,
            own_column=rules.has_own_column,
            events=events,
        )

        assert rows == oracle.owners()

    check()


def busy_events(count: int) -> list[Event]:
    """Shared devices, emails first, late claims, an alias: much that changes its owner."""
    draw = random.Random(42)
    events = []
    for number in range(count):
        user = draw.choice([None] * 6 + ["ann", "bob", "cid"])
        email = draw.choice([None] * 8 + ["ann@shop.example", "bob@shop.example"])
        events.append(
            make_event(
                f"{number:05}",
                draw.randrange(100_000),
                draw.choice(["kiosk", "phone", "tablet", "laptop"]),
                user_id=user,
                email=email if user is None else None,
                previous_id="cid" if user == "bob" and draw.random() < 0.05 else None,
            )
        )
    return events


@pytest.mark.parametrize(
    ("target", "policy"), [("user_id", "device_split"), ("stitched_user_id", "last_login")]
)
def test_a_crash_at_any_step_leaves_the_rows_of_an_undisturbed_run(
    target: str, policy: str, tmp_path: Path
) -> None:
    """SIGKILL between any two statements, then the same command again: nothing lost or doubled."""
    events = busy_events(240)
    write_events(tmp_path / "events.ndjson", events)

    def run(name: str, die_at: int) -> int:
        command = [
            *("run", str(tmp_path / "events.ndjson"), "--load", "--batch-size", "60"),
            *("--graph", f"sqlite:///{tmp_path}/{name}.graph"),
            *("--sink", f"sqlite:///{tmp_path}/{name}.db"),
            *("--policy", policy, "--target-column", target, "--quiet"),
            *("--rejects", f"{tmp_path}/{name}.rejects"),
        ]
        done = subprocess.run(
            [sys.executable, str(CRASHING), str(die_at), str(tmp_path / "count"), *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode in (0, -9), done.stderr
        return done.returncode

    assert run("undisturbed", 0) == 0
    steps = int((tmp_path / "count").read_text())
    expected = read_column(tmp_path / "undisturbed.db", target)
    oracle = Oracle(
        policy=policy,
        lookback=30 * DAY // SECOND,
        own_column=target != "user_id",
        events=events,
    )
    assert expected == oracle.owners()

    draw = random.Random(7)
    points = sorted({1, steps, *(draw.randrange(1, steps) for _ in range(14))})
    for point in points:
        name = f"killed{point}"
        deaths = [point, draw.randrange(1, steps)]
        for die_at in deaths:
            run(name, die_at)
        while run(name, 0):
            pass

        assert read_column(tmp_path / f"{name}.db", target) == expected, (point, steps)


@pytest.mark.parametrize("target", ["user_id", "stitched_user_id"])
def test_processes_that_share_graph_and_sink_leave_the_rows_of_one(
    target: str, tmp_path: Path
) -> None:
    """Three processes with a part of the events each, at once: claims race with rows in flight."""
    events = busy_events(600)
    parts = [write_events(tmp_path / f"{n}.ndjson", events[n::3]) for n in range(3)]
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-W", "error", "-m", "recognition", "run", str(part), "--load"),
                *("--graph", f"sqlite:///{tmp_path}/graph.db", "--batch-size", "7"),
                *("--sink", f"sqlite:///{tmp_path}/warehouse.db", "--target-column", target),
                *("--quiet", "--rejects", f"{part}.rejects"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in parts
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    oracle = Oracle(
        policy="device_split",
        lookback=30 * DAY // SECOND,
        own_column=target != "user_id",
        events=events,
    )

    assert [process.returncode for process in running] == [0, 0, 0], errors
    assert read_column(tmp_path / "warehouse.db", target) == oracle.owners()


@pytest.mark.parametrize("references", References)
@pytest.mark.parametrize("late", [(0, 1), (0,), (1,)])
def test_a_window_that_was_held_up_does_not_undo_a_later_one(
    late: tuple[int, ...], references: References, tmp_path: Path
) -> None:
    """
    The row of an email is the email's person's, also when older updates of its device come last.

    A worker that holds leased updates for longer than its lease applies them after another one has
    applied them and what followed.
    """
    rules = Rules(
        attribution=AttributionRules(policy=Policy.FIRST_CLAIM),
        target_column="stitched",
        default=TableRules(references=references),
    )
    graph = SqliteGraph(":memory:")
    sink: Any = open_sink(f"sqlite:///{tmp_path}/warehouse.sqlite")
    recognizer = Recognizer(graph, rules)
    updates: list[list[UpdateByCriteria]] = []
    for batch in (
        [make_event("seen", 2 * DAY, "d"), make_event("seen later", 4 * DAY, "d")],
        [make_event("claim", 1 * DAY, "d", user_id="u5")],  # the range from day 2 to day 4, or more
        [make_event("email", 3 * DAY, "d", email="a@x.com")],  # and this row is in it
        [make_event("link", 9 * DAY, None, user_id="u3", email="a@x.com")],
    ):
        load_rows(sink, recognizer, recognizer.process(batch))
        leased = graph.lease_updates(100, 60)
        graph.acknowledge([item.position for item in leased])
        if leased:
            updates.append([item.update for item in leased])
    for window in (*updates, [update for place in late for update in updates[place]]):
        assert sink.apply(plan_updates(window)).rejected == ()
    sink.close()
    rows = read_column(tmp_path / "warehouse.sqlite", "stitched")

    assert len(updates) == 2 + (references is not References.IDS)
    assert rows == {"seen": "u5", "seen later": "u5", "claim": "u5", "email": "u3", "link": "u3"}


#: What happened before, in a worker's batch, while its row was not visible, and the row at the end.
IN_BETWEEN = {
    "a claim": ([], {"userId": "u1"}, None, ("u1", "pro")),
    "a better claim": ([{"userId": "u0"}], {"userId": "u1"}, None, ("u1", "pro")),
    "a trait": ([{"userId": "u1"}], {"userId": "u1"}, None, ("u1", "pro")),
    "a forget": ([{"userId": "u1"}], {}, ("forget", "u1"), (None, None)),
    "a release": ([{"userId": "u1"}], {}, ("release", "d"), (None, None)),
}


@pytest.mark.parametrize("between", IN_BETWEEN)
@pytest.mark.parametrize("mode", ["user_id", "stitched_user_id", "version"])
@pytest.mark.parametrize("scheme", ["sqlite", "duckdb"])
def test_a_row_that_is_loaded_again_gets_the_stamp_of_now(
    scheme: str, mode: str, between: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker dies after its row became visible, too late for an update applied before."""
    monkeypatch.chdir(tmp_path)
    target = "user_id" if mode == "version" else mode
    place = ["--graph", "sqlite:///graph.db", "--sink", f"{scheme}:///warehouse.{scheme}"]
    settings = f'target_column = "{target}"\ntraits = ["plan"]\n'
    if mode == "version":
        settings += 'supersede = "version"\n'
    Path("recognition.toml").write_text(settings)

    def run(name: str, *given: dict[str, Any]) -> int:
        body = {"type": "track", "anonymousId": "d"}
        lines = [
            {**body, "messageId": f"{name}{n}", "timestamp": "2026-01-01T00:00:00Z", **each}
            for n, each in enumerate(given)
        ]
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return main(["run", name, *place, "--load", "--quiet"])

    before, claim, undo, expected = IN_BETWEEN[between]
    before = [{**each, "context": {"traits": {"plan": "basic"}}} for each in before]
    late = {"timestamp": "2026-01-01T01:00:00Z", "context": {"traits": {"plan": "free"}}}
    load = SqlSink.load

    def load_late(sink: SqlSink, *given: Any, **options: Any) -> int:
        monkeypatch.setattr(SqlSink, "load", load)
        if claim:
            traits = {"context": {"traits": {"plan": "pro"}}}
            assert run("claim", {**claim, **traits, "timestamp": "2026-01-01T00:30:00Z"}) == 0
        if undo is not None:
            assert main([*undo, *place, "--quiet"]) == 0
        load(sink, *given, **options)
        raise SystemExit

    assert run("before", *before) == 0
    monkeypatch.setattr(SqlSink, "load", load_late)
    with pytest.raises(SystemExit):
        run("late", late)
    codes = [run("late", late), run("late", late)]
    path = tmp_path / f"warehouse.{scheme}"

    assert codes == [0, 0]
    assert read_column(path, target)["late0"] == expected[0]
    assert read_column(path, "context_traits_plan")["late0"] == expected[1]


def test_delivery_resumes_what_another_process_left(tmp_path: Path) -> None:
    """A leased window whose holder died comes back, and is applied once more without harm."""
    graph = SqliteGraph(tmp_path / "graph.db")
    recognizer = Recognizer(graph, Rules())
    sink: Any = open_sink(f"sqlite:///{tmp_path}/warehouse.db")
    for event in [make_event("1", DAY, "d"), make_event("2", DAY + 5, "d", user_id="u")]:
        done = recognizer.process([event])
        rows = recognizer.rows(done)["events"]
        columns = {"message_id": "text", "anonymous_id": "text", "user_id": "text"}
        sink.load("events", rows, key="message_id", columns=columns | {"timestamp": "time"})
    died = graph.lease_updates(10, 0.0)
    sink.apply(plan_updates([item.update for item in died]))

    delivered = deliver(graph, sink)
    sink.close()

    assert len(died) == delivered.updates == 1
    assert delivered.rows_changed == 0
    assert delivered.rows_matched == 1
    assert graph.stats().pending_updates == 0
    assert read_column(tmp_path / "warehouse.db", "user_id") == {"1": "u", "2": "u"}
    graph.close()


def test_updates_of_a_missing_table_wait_for_it(tmp_path: Path) -> None:
    """They go back to the outbox, others are applied, and are applied once the table is there."""
    graph = SqliteGraph(tmp_path / "graph.db")
    rules = Rules(layout=layout_named("segment"), stamps=False)
    Recognizer(graph, rules).process(
        [
            make_event("1", DAY, "d", type="page"),
            make_event("2", DAY + 5, "d", name="Buy"),
            make_event("3", DAY + 9, "d", user_id="u", type="identify"),
        ]
    )
    path = tmp_path / "warehouse.db"
    columns = "message_id TEXT, anonymous_id TEXT, user_id TEXT, timestamp TEXT"

    def make(table: str, message_id: str, time: int) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(f'CREATE TABLE "{table}" ({columns})')
            connection.execute(
                f'INSERT INTO "{table}" VALUES (?, ?, NULL, ?)',
                (message_id, "d", render_time(time)),
            )

    make("pages", "1", DAY)
    make("tracks", "2", DAY + 5)
    sink = open_sink(f"sqlite:///{path}")

    with pytest.raises(TableError, match=r"no table 'Buy'.* 1 updates wait .* 2 others") as caught:
        deliver(graph, sink)
    waiting = graph.stats()
    make("Buy", "2", DAY + 5)
    delivered = deliver(graph, sink)
    sink.close()
    graph.close()

    assert caught.value.written
    assert (waiting.pending_updates, waiting.dead_updates) == (1, 0)
    assert (delivered.updates, delivered.rows_changed) == (1, 1)
    with closing(sqlite3.connect(path)) as connection:
        for table in ("pages", "tracks", "Buy"):
            assert connection.execute(f'SELECT user_id FROM "{table}"').fetchall() == [("u",)]


@pytest.mark.parametrize("scheme", ["sqlite", "duckdb"])
def test_numbers_become_text_in_columns_of_text(scheme: str, tmp_path: Path) -> None:
    """Loaded rows and updates write a trait alike: as JSON would."""
    graph = SqliteGraph(":memory:")
    rules = Rules(traits=("age", "vip"))
    recognizer = Recognizer(graph, rules)
    sink: Any = open_sink(f"{scheme}:///{tmp_path}/warehouse.{scheme}")
    columns = {"message_id": "text", "anonymous_id": "text", "user_id": "text", "timestamp": "time"}
    columns |= {"context_traits_age": "text", "context_traits_vip": "text"}
    traits: dict[str, str | int | float | bool] = {"age": 33, "vip": True}
    events = [make_event("1", DAY, "d"), make_event("2", DAY, "d", user_id="u", traits=traits)]
    for event in [*events, make_event("3", DAY, "d")]:
        rows = recognizer.rows(recognizer.process([event]))["events"]
        sink.load("events", rows, key="message_id", columns=columns)

    delivered = deliver(graph, sink)
    sink.close()
    graph.close()
    path = tmp_path / f"warehouse.{scheme}"

    assert delivered.rejected == []
    assert read_column(path, "context_traits_age") == {"1": "33", "2": "33", "3": "33"}
    assert read_column(path, "context_traits_vip") == {"1": "true", "2": "true", "3": "true"}


def test_a_value_that_does_not_fit_is_a_dead_letter(tmp_path: Path) -> None:
    """The one update is given up with its reason, the others of its table are applied."""
    graph = SqliteGraph(tmp_path / "graph.db")
    events = [make_event("1", DAY, "d"), make_event("2", DAY, "e")]
    events += [
        make_event("3", DAY, "d", user_id="long" * 9),
        make_event("4", DAY, "e", user_id="u"),
    ]
    Recognizer(graph, Rules(stamps=False)).process(events)
    path = tmp_path / "warehouse.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id VARCHAR(20),"
            " timestamp TEXT)"
        )
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, NULL, ?)",
            [("1", "d", render_time(DAY)), ("2", "e", render_time(DAY))],
        )
    sink = open_sink(f"sqlite:///{path}")

    delivered = deliver(graph, sink)
    sink.close()
    dead = graph.dead_updates(10)
    graph.close()

    assert [type(error) for _, error in delivered.rejected] == [ValueRefusedError]
    assert "36 characters" in dead[0][1]
    assert "long" not in dead[0][1]
    assert read_column(path, "user_id") == {"1": None, "2": "u"}
