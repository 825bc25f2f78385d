"""The worker: files in, rows of several databases out, whatever happens to its processes."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from oracle import make_event
from recognition.cli import main
from recognition.delivery import Deliverer, Destination
from recognition.errors import GraphUnavailableError
from recognition.events import Event, Reject, render_time
from recognition.graph import open_graph
from recognition.recognizer import Recognizer
from recognition.worker import Directory, RawEvents, Source, Worker
from test_delivery import (
    RULES,
    SECOND,
    START,
    Pauses,
    Warehouse,
    expected,
    journey,
    wait_until,
)

HERE = Path(__file__).parent

#: How often a worker is killed in a trial; more by the environment.
KILLS = int(os.environ.get("RECOGNITION_TEST_KILLS", "5"))


def to_segment(event: Event) -> dict[str, Any]:
    body: dict[str, Any] = {
        "userId": event.known[0].value if event.known else None,
        "messageId": event.message_id,
        "timestamp": render_time(event.time),
        "type": "track",
        "event": "Seen",
        "anonymousId": event.anonymous_id,
    }
    return body


def write_files(folder: Path, events: Sequence[Event], count: int) -> None:
    """In an order of no meaning, with some events in two files."""
    folder.mkdir(exist_ok=True)
    shuffled = random.Random(1).sample([*events, *events[::7]], len(events) + len(events[::7]))
    for number in range(count):
        lines = [json.dumps(to_segment(event)) for event in shuffled[number::count]]
        (folder / f"{number:02}.ndjson").write_text("\n".join(lines) + "\n")


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGCONT)
                started.kill()


def configure(folder: Path, destinations: Sequence[Warehouse], more: str = "") -> Path:
    tables = "".join(
        f'[[destinations]]\nname = "{w.path.stem}"\nurl = "{w.url}"\n' for w in destinations
    )
    path = folder / "recognition.toml"
    path.write_text(
        f'graph = "sqlite:///{folder}/graph.db"\nbatch_size = 50\n{tables}'
        f'[worker]\ndirectories = "{folder}/in"\nrejects = "{folder}/rejects.ndjson"\n'
        f"[delivery]\nwindow = 40\nevery_seconds = 0.01\n{more}"
    )
    return path


# Files -----------------------------------------------------------------------------------------


def test_directory_is_taken_and_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of all kinds are taken once each, and moved; what is no event is kept apart."""
    events = journey(6)
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(events)
    folder = tmp_path / "in"
    folder.mkdir()
    first, second, third = events[:8], events[8:16], events[16:]
    (folder / "1.ndjson").write_text(
        "".join(json.dumps(to_segment(e)) + "\n" for e in first) + "not JSON\n"
    )
    with gzip.open(folder / "2.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(to_segment(e)) + "\n" for e in second))
    (folder / "3.csv").write_text(
        "messageId,timestamp,type,event,anonymousId,userId\n"
        + "".join(
            f"{e.message_id},{render_time(e.time)},track,Seen,{e.anonymous_id},"
            f"{e.known[0].value if e.known else ''}\n"
            for e in third
        )
    )
    (folder / "4.ndjson.part").write_text("half of a li")
    (folder / "5.csv").write_text("a,a\n1,2\n")
    config = configure(tmp_path, [warehouse])
    code = main(["worker", "--config", str(config), "--once", "--json", "--quiet"])
    result = json.loads(capsys.readouterr().out)
    again = main(["worker", "--config", str(config), "--once", "--json", "--quiet"])
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    rejects = [json.loads(line) for line in (tmp_path / "rejects.ndjson").read_text().splitlines()]

    assert (code, again) == (1, 0)
    assert (result["events"], result["rejected"], result["updates_waiting"]) == (24, 1, 0)
    assert result["destinations"]["warehouse"]["rows_changed"] == 18
    assert left == {
        "done/1.ndjson",
        "done/2.jsonl.gz",
        "done/3.csv",
        "failed/5.csv",
        "4.ndjson.part",
    }
    assert [(Path(r["source"]).name, r["line"]) for r in rejects] == [("1.ndjson", 9)]
    assert warehouse.users() == expected(6)


def test_same_name_twice_keeps_both_files(tmp_path: Path) -> None:
    """A file that is named like one of before does not take its place."""
    for text in ("", "\n", "\n\n"):
        (tmp_path / "a.ndjson").write_text(text)
        Directory(tmp_path, once=True).run(lambda events: None, threading.Event())

    assert {p.name: len(p.read_text()) for p in (tmp_path / "done").iterdir()} == {
        "a.ndjson": 0,
        "2-a.ndjson": 1,
        "3-a.ndjson": 2,
    }


def test_file_of_which_the_graph_took_a_part_stays(tmp_path: Path) -> None:
    """Where the graph fails in the middle of a file it is not moved, and is taken again whole."""
    write_files(tmp_path, journey(5), 1)
    sizes: list[int] = []

    def take(events: RawEvents) -> None:
        sizes.append(len(events))
        if len(sizes) == 2:
            raise GraphUnavailableError("gone")

    directory = Directory(tmp_path, batch_size=10, once=True)
    with pytest.raises(GraphUnavailableError):
        directory.run(take, threading.Event())
    kept = (tmp_path / "00.ndjson").exists()
    directory.run(take, threading.Event())

    assert kept
    assert sum(sizes[2:]) == 23
    assert not (tmp_path / "00.ndjson").exists()


def test_two_workers_take_each_file_once(tmp_path: Path) -> None:
    """A file that one is at is left alone by another."""
    write_files(tmp_path, journey(20), 8)
    taken: list[int] = []
    lock = threading.Lock()

    def take(events: RawEvents) -> None:
        time.sleep(0.01)
        with lock:
            taken.append(len(events))

    threads = [
        threading.Thread(
            target=Directory(tmp_path, once=True, every=0.01).run, args=(take, threading.Event())
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sum(taken) == 92
    assert len(list((tmp_path / "done").iterdir())) == 8


# Sources ---------------------------------------------------------------------------------------


class Given:
    """A source of batches, which may fail before one."""

    def __init__(self, *batches: Sequence[Any] | Exception) -> None:
        self._batches = list(batches)

    def run(self, take: Any, stop: threading.Event) -> None:
        while self._batches:
            batch = self._batches.pop(0)
            if isinstance(batch, Exception):
                raise batch
            take(batch)


def test_source_that_may_succeed_later_is_started_again(tmp_path: Path) -> None:
    """What fails and says that a retry helps goes on; what can be no event is rejected."""
    rejects: list[Reject] = []
    events = [to_segment(event) for event in journey(3)]
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        source = Given(events[:5], GraphUnavailableError("gone"), [*events[5:], {"type": "x"}])
        worker = Worker(
            Recognizer(graph, RULES), [source], None, rejects=rejects.append, pauses=(0.01, 0.02)
        )
        worker.run(threading.Event(), once=True)
        pending = graph.stats().pending_updates

    assert isinstance(source, Source)
    assert (worker.taken.events, worker.taken.restarts, worker.taken.rejected) == (12, 1, 1)
    assert [(r.line, json.loads(r.raw)) for r in rejects] == [(8, {"type": "x"})]
    assert pending == worker.taken.updates > 0


def test_what_is_no_event_is_kept_once_however_often_it_is_offered() -> None:
    """While the graph is away the same batch comes again and again; its rejects are kept once."""
    rejects: list[Reject] = []
    with closing(open_graph("memory:")) as graph:
        recognizer = Recognizer(graph, RULES)
        worker = Worker(recognizer, [], None, rejects=rejects.append)
        batch = [to_segment(journey(1)[0]), {"no": "event"}]
        process = recognizer.process
        recognizer.process = lambda events: raise_away()  # type: ignore[method-assign]
        for _ in range(5):
            with pytest.raises(GraphUnavailableError):
                worker.take(batch)
        recognizer.process = process  # type: ignore[method-assign]
        worker.take(batch)

    assert (len(rejects), worker.taken.rejected) == (1, 1)


def raise_away() -> Any:
    raise GraphUnavailableError("away")


def test_source_that_cannot_go_on_ends_the_worker(tmp_path: Path) -> None:
    """Its error comes out, after all others have come to their ends."""
    with closing(open_graph("memory:")) as graph:
        worker = Worker(Recognizer(graph, RULES), [Given(ValueError("a mistake"))], None)
        with pytest.raises(ValueError, match="a mistake"):
            worker.run(threading.Event())


@pytest.mark.parametrize("well", ["took events", "lived long"])
def test_source_that_was_well_in_between_begins_with_the_short_pause(
    monkeypatch: pytest.MonkeyPatch, well: str
) -> None:
    """Each pause doubles the one before, up to the longest, unless something came in between."""
    clock = [1_000.0]
    monkeypatch.setattr("recognition.worker.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("recognition.worker.random", SimpleNamespace(uniform=lambda _, most: most))
    runs = 0

    class Failing:
        def run(self, take: Any, stop: threading.Event) -> None:
            nonlocal runs
            runs += 1
            if runs == 5 and well == "took events":
                take([to_segment(event) for event in journey(1)])
            elif runs == 5:
                clock[0] += 8.5
            else:
                clock[0] += 7.5  # no longer than the longest pause
            raise GraphUnavailableError("away")

    with closing(open_graph("memory:")) as graph:
        worker = Worker(Recognizer(graph, RULES), [], None, pauses=(1.0, 8.0))
        stop = Pauses(7)
        worker._feed(Failing(), stop)

    assert stop.noted == [1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0]
    assert worker.taken.restarts == 7


def test_what_is_too_old_is_dropped_after_an_error_of_any_sort(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is tried again, and its text is not told: nothing would be dropped for good, else."""
    tries: list[object] = []

    def expire() -> None:
        tries.append(None)
        if len(tries) == 1:
            raise ValueError(text)

    text = "u0@example.com"
    stop = Pauses(4)
    Worker(None, [], None)._keep_young(expire, stop)

    assert (stop.noted, len(tries)) == ([0.0, 600.0, 86_400.0, 86_400.0], 3)
    assert "ValueError" in caplog.text
    assert text not in caplog.text


# Processes -------------------------------------------------------------------------------------


def test_worker_that_is_killed_again_and_again_leaves_the_rows_of_one_that_lived(
    tmp_path: Path,
) -> None:
    """Killed at random steps while three databases are served, it goes on where it was."""
    draw = random.Random(KILLS)
    events = journey(120)
    destinations = [
        Warehouse(tmp_path, "one").make(),
        Warehouse(tmp_path, "two", "duckdb").make(),
        Warehouse(tmp_path, "three").make(versioned=True),
    ]
    for warehouse in destinations:
        warehouse.put(events)
    write_files(tmp_path / "in", events, 4)
    config = configure(tmp_path, destinations, "settle_seconds = 0.5\n")
    killed = 0
    arguments = (tmp_path / "steps", "worker", "--once", "--quiet", "--config", config)
    for number in range(KILLS * 3):
        # Steps are SQL statements on the graph and on the sinks, in the order of their beginning.
        step = int(4 ** draw.uniform(0, 5.2)) if killed < KILLS else 0
        with process(HERE / "crashing.py", step, *arguments) as worker:
            _, said = worker.communicate(timeout=250)
        killed += worker.returncode == -signal.SIGKILL
        assert worker.returncode in (0, -signal.SIGKILL), said
        if not step:
            break
        if worker.returncode == 0:  # it was faster: there is new work
            more = journey(10, rows=2)
            write_files(tmp_path / "in", [e for e in more if number % 2 or not e.known], 1)
    time.sleep(0.6)
    with process(HERE / "crashing.py", 0, *arguments) as worker:
        _, said = worker.communicate(timeout=250)
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        stats = graph.stats()

    assert worker.returncode == 0, said
    assert killed >= KILLS // 2
    for warehouse in destinations:
        assert warehouse.users() == expected(120), warehouse.path.name
    assert (stats.pending_updates, stats.dead_updates) == (0, 0)


def test_sigterm_lets_the_worker_come_to_its_end(tmp_path: Path) -> None:
    """It says what it did, exits with 0, and nothing is leased by it any more."""
    events = journey(40)
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(events)
    write_files(tmp_path / "in", events, 3)
    config = configure(tmp_path, [warehouse], "settle_seconds = 0\n")
    with process("-m", "recognition", "worker", "--json", "--config", config) as worker:
        wait_until(lambda: None not in warehouse.users().values())
        worker.send_signal(signal.SIGTERM)
        out, said = worker.communicate(timeout=60)
    result = json.loads(out)

    assert worker.returncode == 0, said
    assert result["updates_waiting"] == 0
    assert result["destinations"]["warehouse"]["updates"] >= 40
    assert "d7" not in said
    assert "u7" not in said


def fill_outbox(folder: Path, visitors: int) -> Warehouse:
    events = journey(visitors)
    warehouse = Warehouse(folder).make()
    warehouse.execute("PRAGMA journal_mode = WAL")
    warehouse.put(events)
    with closing(open_graph(f"sqlite:///{folder}/graph.db")) as graph:
        graph.add_destination("w", filled=True)
        Recognizer(graph, RULES).process(events)
    return warehouse


def pending(folder: Path) -> int:
    with closing(open_graph(f"sqlite:///{folder}/graph.db")) as graph:
        return graph.stats().pending_updates


def test_two_workers_apply_each_update_once(tmp_path: Path) -> None:
    """Two processes on one outbox share it: nothing is applied by both, nothing is skipped."""
    warehouse = fill_outbox(tmp_path, 300)
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    graph = f"sqlite:///{tmp_path}/graph.db"
    with (
        process(HERE / "delivering.py", graph, warehouse.url, logs[0]) as one,
        process(HERE / "delivering.py", graph, warehouse.url, logs[1]) as two,
    ):
        wait_until(lambda: not pending(tmp_path))
        for worker in (one, two):
            _, said = worker.communicate(timeout=60)
            assert worker.returncode == 0, said
    lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    applied = [update for line in lines for update in json.loads(line)["updates"]]

    assert len(applied) == len(set(applied)) == 300
    assert warehouse.users() == expected(300)


def test_worker_that_stood_still_does_no_harm(tmp_path: Path) -> None:
    """Its lease ends, another one applies its window, later ones too; then it goes on itself."""
    warehouse = fill_outbox(tmp_path, 30)
    logs, stalled = [tmp_path / "one.log", tmp_path / "two.log"], tmp_path / "stalled"
    graph_url = f"sqlite:///{tmp_path}/graph.db"
    stalling = ("--stall", stalled, "--lease", "1")
    with process(HERE / "delivering.py", graph_url, warehouse.url, logs[0], *stalling) as one:
        wait_until(stalled.exists)
        with process(HERE / "delivering.py", graph_url, warehouse.url, logs[1]) as two:
            wait_until(lambda: not pending(tmp_path))
            with closing(open_graph(graph_url)) as graph:
                # The devices of its window change hands before it wakes.
                Recognizer(graph, RULES).process(
                    [
                        make_event(f"x{n}", START + (10 * n - 1) * SECOND, f"d{n}", user_id=f"x{n}")
                        for n in range(5)
                    ]
                )
            wait_until(lambda: not pending(tmp_path))
            right = warehouse.users()
            one.send_signal(signal.SIGCONT)
            wait_until(logs[0].exists)
            for worker in (one, two):
                _, said = worker.communicate(timeout=60)
                assert worker.returncode == 0, said

    assert {right[f"m{n}-0"] for n in range(5)} == {f"x{n}" for n in range(5)}
    assert warehouse.users() == right
    assert pending(tmp_path) == 0


# The command line ------------------------------------------------------------------------------


def test_dead_letters_are_listed_and_sent_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`replay --list` tells them by reason, without values; `replay` brings them back."""
    events = journey(3)
    warehouse = Warehouse(tmp_path)
    warehouse.execute("CREATE TABLE other (x)")
    url = f"sqlite:///{tmp_path}/graph.db"
    with closing(open_graph(url)) as graph:
        graph.add_destination("w", filled=True)
        Recognizer(graph, RULES).process(events)
        leased = graph.lease_updates(2, 60, "w")
        graph.return_updates([d.position for d in leased], "no table", dead=True, destination="w")
    listed = main(["replay", "--graph", url, "--list"])
    told = capsys.readouterr().out
    main(["outbox", "--graph", url, "--json"])
    (backlog,) = json.loads(capsys.readouterr().out)
    sent = main(["replay", "--graph", url, "--destination", "w", "--json"])
    count = json.loads(capsys.readouterr().out)
    wrong = main(["replay", "--graph", url, "--destination", "v"])
    with closing(open_graph(url)) as graph:
        again = graph.lease_updates(10, 60, "w")

    assert (listed, sent, wrong) == (1, 0, 2)
    assert told.split() == ["2", "w", "events", "no", "table"]
    assert (backlog["waiting"], backlog["dead"], backlog["filled"]) == (1, 2, True)
    assert count["updates_sent_again"] == 2
    assert len(again) == 3


def test_run_does_not_serve_a_sink_beside_the_destinations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a worker serves destinations, `run --sink` is refused and takes nothing from them."""
    warehouse = fill_outbox(tmp_path, 3)
    write_files(tmp_path / "in", journey(3), 1)
    url = f"sqlite:///{tmp_path}/graph.db"
    code = main(
        ["run", str(tmp_path / "in" / "00.ndjson"), "--graph", url, "--sink", warehouse.url]
    )
    said = capsys.readouterr().err
    dropped = main(["outbox", "--graph", url, "--drop", "w"])

    assert code != 0
    assert "recognition worker" in said
    assert dropped == 0
    assert None in warehouse.users().values()
    assert pending(tmp_path) >= 3


def test_deliverer_wants_different_names(tmp_path: Path) -> None:
    """Two destinations of one name would take each other's updates for their own."""
    sink = Warehouse(tmp_path).make().sink()
    with closing(open_graph("memory:")) as graph, pytest.raises(Exception, match="same name"):
        Deliverer(graph, [Destination(name="w", sink=sink), Destination(name="w", sink=sink)])


def found(config: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    code = main(["check", "--config", str(config), "--json"])
    return code, json.loads(capsys.readouterr().out)


def wrong(findings: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(f["place"], f["fix"]) for f in findings if f["level"] == "wrong"]


def test_check_finds_nothing_wrong_where_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first event and after a life, and what it tries out is undone."""
    events = journey(3)
    warehouses = [Warehouse(tmp_path, "one").make(), Warehouse(tmp_path, "two", "duckdb").make()]
    config = configure(tmp_path, warehouses, "settle_seconds = 0\n")
    write_files(tmp_path / "in", events, 1)
    for warehouse in warehouses:
        warehouse.put(events)
    before, early = found(config, capsys)
    main(["worker", "--config", str(config), "--once", "--quiet"])
    capsys.readouterr()
    with warehouses[0].connect() as connection:
        noted = connection.execute("SELECT count(*) FROM recognition_ledger").fetchall()
    after, late = found(config, capsys)
    with warehouses[0].connect() as connection:
        same = connection.execute("SELECT count(*) FROM recognition_ledger").fetchall()
    notes = {f["fix"] for f in late if f["level"] == "note"}

    assert (before, after, wrong(early), wrong(late)) == (0, 0, [], [])
    assert [f["place"] for f in late if f["level"] == "fine"] == [
        "graph",
        f"directory {tmp_path}/in",
        "destination one, table events",
        "destination two, table events",
    ]
    assert "CREATE INDEX events_anonymous_id ON events (anonymous_id)" in notes
    assert noted == same != [(0,)]
    assert warehouses[0].users() == warehouses[1].users() == expected(3)


def test_check_says_what_is_wrong_and_what_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each finding has its place, and the line that mends it where there is one."""
    narrow = Warehouse(tmp_path, "narrow")
    narrow.execute(
        "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id VARCHAR(20),"
        " timestamp TIMESTAMP)"
    )
    lacking = Warehouse(tmp_path, "lacking")
    lacking.execute("CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT)")
    empty = Warehouse(tmp_path, "empty", "duckdb")
    empty.execute("CREATE TABLE evnts (x INTEGER)")
    nowhere = Warehouse(tmp_path / "no folder", "nowhere")
    config = configure(tmp_path, [narrow, lacking, empty, nowhere])
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        graph.add_destination("forgotten")
        graph.add_destination("narrow")
        Recognizer(graph, RULES).process(journey(2))
        (first, _) = graph.lease_updates(10, 60, "narrow")
        graph.return_updates([first.position], "why", dead=True, destination="narrow")
    code, findings = found(config, capsys)
    texts = {f["place"]: f["text"] for f in findings if f["level"] == "wrong"}

    assert code == 1
    assert ("destination forgotten", "recognition outbox --drop forgotten") in wrong(findings)
    assert ("destination narrow", "recognition replay --list") in wrong(findings)
    assert "ALTER TABLE events ADD COLUMN timestamp" in texts["destination lacking, table events"]
    assert "evnts" in texts["destination empty, table events"]
    assert "destination nowhere, table events" in texts


def test_check_of_a_graph_that_was_decided_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that do not agree with the graph's first decision are found before the worker is."""
    config = configure(tmp_path, [Warehouse(tmp_path).make()])
    (tmp_path / "in").mkdir()
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        Recognizer(graph, RULES).process(journey(1))
    config.write_text('policy = "last_login"\n' + config.read_text())
    code, findings = found(config, capsys)

    assert code == 1
    assert [place for place, _ in wrong(findings)] == ["graph"]


def test_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source of docs/delivery.md hands its event over, and the worker ends."""
    page = (HERE.parent / "docs" / "delivery.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(compile(example, "delivery.md", "exec"), names)
    names["graph"].close()

    assert names["worker"].taken.events == 1
    assert isinstance(names["MySource"](), Source)
