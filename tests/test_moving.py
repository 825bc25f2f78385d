"""A graph that moved answers as it would have where it was; what is not whole is never used."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import random
import signal
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphs import open_mongodb
from oracle import make_event
from recognition.attribution import DAY, Policy
from recognition.errors import (
    ConfigurationError,
    GraphError,
    GraphSchemaError,
    InputError,
    RecognitionError,
)
from recognition.events import Event, Identifier
from recognition.graph import Graph, GraphStats, open_graph, sqlite
from recognition.graph.moving import (
    MAX_LINE,
    PART,
    Record,
    read_records,
    write_records,
)
from recognition.graph.packing import earlier_digester
from recognition.graph.sqlite import SqliteGraph
from recognition.messages import VERSION_COLUMN, UpdateByCriteria
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, TableRules
from test_decisions import (
    LOOKBACK,
    SLOW,
    STEPS,
    UNDO_MODES,
    Pipeline,
    deliveries,
    rules_of,
    undone,
    untie,
)

PROCESSES = multiprocessing.get_context("spawn")

SECOND = 1_000_000
START = 1_767_268_800_000_000

Action = tuple[str, Any]


def lines_of(graph: Graph) -> list[str]:
    return list(write_records(graph.export()))


def take_in(graph: Graph, lines: Iterable[str], *, restart: bool = False) -> int:
    return graph.take_in(read_records(io.BytesIO("".join(lines).encode())), restart=restart)


def contents(graph: Graph) -> GraphStats:
    return replace(graph.stats(), bytes=0)


# The same answers -----------------------------------------------------------------------------


def in_sqlite() -> Graph:
    return SqliteGraph(":memory:")


#: From which graph to which; each is made empty.
OVER_A_NETWORK: dict[str, tuple[Callable[[], Graph], Callable[[], Graph]]] = {
    "sqlite to mongodb": (in_sqlite, open_mongodb),
    "mongodb to sqlite": (open_mongodb, in_sqlite),
}
MOVES = {"sqlite to sqlite": (in_sqlite, in_sqlite), **OVER_A_NETWORK}


class Journey(Pipeline):
    """A pipeline that keeps what it was told, so that two of them can be compared."""

    def __init__(self, graph: Graph, rules: Rules) -> None:
        super().__init__(graph, rules)
        self.owners: list[object] = []
        self.told: Counter[str] = Counter()

    def do(self, action: Action) -> None:
        what, subject = action
        recognizer = self.recognizers[0]
        match what:
            case "take":
                done = recognizer.process(subject)
                for table, rows in recognizer.rows(done).items():
                    self.warehouse.load(table, rows)
                self.owners.append(done.owners)
                recognizer.flushed(done.receipt)
            case "unlink":
                recognizer.unlink(*subject)
            case "take away":
                recognizer.unlink(Identifier("anonymous_id", subject[0]), subject[1])
            case "release":
                recognizer.release(*subject)
            case "forget":
                recognizer.forget(*subject)

    def deliver(self) -> int:
        leased = self.graph.lease_updates(10_000, 60)
        self.told.update(said(delivery.update) for delivery in leased)
        self.graph.acknowledge([delivery.position for delivery in leased])
        return self.warehouse.apply([delivery.update for delivery in leased])


def said(update: UpdateByCriteria) -> str:
    """What an update says, without its number: two graphs number in an order of their own."""
    values = {name: value for name, value in update.set.items() if name != VERSION_COLUMN}
    told = update.model_dump(mode="json", include={"table", "where", "expected_rows", "cause"})
    return json.dumps([values, told], sort_keys=True)


def stretch(actions: Sequence[Action], step: int) -> list[Action]:
    """The same where no two events are at the same instant, for rules that need it."""

    def stretched(what: str, subject: Any) -> Any:
        if step == 1:
            return subject
        if what == "take":
            return untie(subject, step)
        return (subject[0], subject[1] * step) if what in ("release", "forget") else subject

    return [(what, stretched(what, subject)) for what, subject in actions]


def check_move(move: str, mode: str, actions: list[Action], cut: int, policy: Policy) -> None:
    rules = rules_of(mode, policy, stamps=bool(cut % 2))
    step = STEPS.get(rules.default.references, 1)
    rules = replace(rules, attribution=replace(rules.attribution, lookback=LOOKBACK * step))
    actions = stretch(actions, step)
    make, make_other = MOVES[move]
    stay, go = Journey(make(), rules), Journey(make_other(), rules)
    with closing(stay), closing(go):
        for number, action in enumerate(actions[:cut]):
            stay.do(action)
            if number < cut - 1:  # what the last one emitted moves along
                stay.deliver()
        go.warehouse = copy.deepcopy(stay.warehouse)
        stay.told.clear()
        stay.graph.compact()  # devices of which nothing is known any more do not come along
        take_in(go.graph, lines_of(stay.graph))

        assert counted(move, go.graph) == counted(move, stay.graph)
        assert go.graph.check() == []
        for action in actions[cut:]:
            stay.do(action)
            go.do(action)
        stay.deliver()
        go.deliver()

        assert go.owners == stay.owners[-len(go.owners) :] or not go.owners
        assert go.warehouse.tables == _without_versions(go, stay)
        assert counted(move, go.graph) == counted(move, stay.graph)
        if move not in OVER_A_NETWORK:
            assert go.told == stay.told


def counted(move: str, graph: Graph) -> GraphStats:
    """What a move keeps; a reference that came again may be kept twice, and moves once."""
    stats = replace(contents(graph), references=0)
    return replace(stats, pending_updates=0) if move in OVER_A_NETWORK else stats  # an estimate


def _without_versions(go: Journey, stay: Journey) -> dict[str, Any]:
    """The rows of who stayed, but with the versions of who went: those are numbers of its own."""
    return {
        table: {
            m: {
                **row,
                **{c: v for c, v in go.warehouse.tables[table][m].items() if c == VERSION_COLUMN},
            }
            for m, row in rows.items()
        }
        for table, rows in stay.warehouse.tables.items()
    }


OFTEN = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize("mode", UNDO_MODES)
@given(actions=undone(), cut=st.integers(1, 8), policy=st.sampled_from(Policy))
@OFTEN
def test_moved_graph_goes_on_after_undo(
    mode: str, actions: list[Action], cut: int, policy: Policy
) -> None:
    """Half of a journey with unlink, release and forget, a move, and the rest: the same answers."""
    check_move("sqlite to sqlite", mode, actions, cut, policy)


@pytest.mark.parametrize("move", OVER_A_NETWORK)
@pytest.mark.parametrize("mode", ["references", "version with days"])
@given(actions=undone(), cut=st.integers(1, 8), policy=st.sampled_from(Policy))
@SLOW
def test_graph_goes_on_in_another_backend_after_undo(
    move: str, mode: str, actions: list[Action], cut: int, policy: Policy
) -> None:
    """The same, where one of the two is a MongoDB."""
    check_move(move, mode, actions, cut, policy)


@pytest.mark.parametrize("move", OVER_A_NETWORK)
@given(delivery=deliveries(), cut=st.integers(1, 5), policy=st.sampled_from(Policy))
@SLOW
def test_graph_goes_on_in_another_backend(
    move: str, delivery: tuple[list[Event], list[Sequence[Event]]], cut: int, policy: Policy
) -> None:
    """Aliases and conflicts, where one of the two is a MongoDB."""
    check_move(move, "references", [("take", batch) for batch in delivery[1]], cut, policy)


@pytest.mark.parametrize("mode", ["references", "own column without references"])
@given(delivery=deliveries(), cut=st.integers(1, 5), policy=st.sampled_from(Policy))
@OFTEN
def test_moved_graph_goes_on(
    mode: str,
    delivery: tuple[list[Event], list[Sequence[Event]]],
    cut: int,
    policy: Policy,
) -> None:
    """Half of a journey with aliases and conflicts, a move, and the rest: the same answers."""
    check_move("sqlite to sqlite", mode, [("take", batch) for batch in delivery[1]], cut, policy)


# Everything that there is ---------------------------------------------------------------------

ODD_DEVICE = "d\u00e9vice \U0001f9ea"
TRAITS = {"plan": "pro", "age": 2**63 - 1, "score": 1.0, "vip": True, "digits": "007", "n": 1}


@pytest.fixture
def full(tmp_path: Path) -> Iterator[SqliteGraph]:
    """A graph with some of all that a graph can hold."""
    with SqliteGraph(tmp_path / "full.db") as graph:
        fill(graph)
        yield graph


def fill(graph: Graph) -> None:
    rules = Rules(workspace="w1", traits=tuple(TRAITS))
    recognizer = Recognizer(graph, rules)
    kiosk = [make_event(str(uuid.UUID(int=n + 1)), START + n * SECOND, "kiosk") for n in range(900)]
    kiosk += [make_event(f"kiosk {n}", START + n * 10 * SECOND + 1, "kiosk") for n in range(900)]
    recognizer.process(kiosk)
    recognizer.process(
        [
            make_event(f"claim {n}", START + n, "tablet", user_id=f"u{n % 7}", traits=TRAITS)
            for n in range(2_500)
        ]
    )
    recognizer.process(
        [
            make_event("a", START + 1, "d1", email=" Ann@Example.com "),
            make_event("b", START + 2, "d1", user_id="ann", email="ann@example.com"),
            make_event("c", START + 3, "d2", user_id="bo", email="ann@example.com"),
            make_event("d", START + 4, ODD_DEVICE, user_id="cy", previous_id="bo"),
            make_event("e", START + 5, "d5", phone="5551112222"),
            make_event("f", START + 6, "d5"),
        ]
    )
    recognizer.unlink(Identifier("user_id", "u1"), Identifier("email", "never@example.com"))
    recognizer.unlink(Identifier("anonymous_id", "d1"), Identifier("user_id", "ann"))
    recognizer.unlink(Identifier("anonymous_id", "d-barred"), Identifier("user_id", "ann"))
    recognizer.release("d2", START + 9)
    recognizer.release("d-released", START + 9)
    recognizer.forget(Identifier("phone", "5551112222"), START + 9)
    leased = graph.lease_updates(3, 600)
    graph.return_updates([leased[0].position], "the column is too narrow", dead=True)
    graph.return_updates([leased[1].position], "try again", dead=False)
    days = Rules(
        workspace="w2",
        target_column="stitched_user_id",
        default=TableRules(references=References.DAYS),
    )
    Recognizer(graph, days).process(
        [make_event(f"day {n}", START + n * DAY, "d1") for n in range(1_100)]
        + [make_event("day c", START, "d2", user_id="u1")]
    )


def test_all_that_a_graph_holds_comes_along(full: SqliteGraph) -> None:
    """Statistics, dead letters, attempts, traits, values as seen and explanations are the same."""
    with SqliteGraph(":memory:") as other:
        count = take_in(other, lines := lines_of(full))
        subjects = [
            Identifier("user_id", "ann"), Identifier("email", "ann@example.com"),
            Identifier("user_id", "bo"), Identifier("phone", "5551112222"), "claim 3", "f", "a",
            Identifier("anonymous_id", "d1"), Identifier("anonymous_id", "d2"),
            Identifier("anonymous_id", "d-released"), Identifier("anonymous_id", ODD_DEVICE),
        ]  # fmt: skip
        rules = Rules(workspace="w1", traits=tuple(TRAITS))
        told = [
            [Recognizer(graph, rules).explain(subject) for subject in subjects]
            for graph in (full, other)
        ]
        stamped = [
            Recognizer(graph, rules).process([make_event("z", START + 2_499, "tablet")]).owners[0]
            for graph in (full, other)
        ]
        dead, attempts = other.dead_updates(10), other.lease_updates(2, 60)

        assert count == len(lines) - 1
        assert contents(other) == contents(full)
        assert [_ordered(one) for one in told[0]] == [_ordered(one) for one in told[1]]
        assert stamped[0] == stamped[1]
        assert stamped[0] is not None
        assert [type(value) for value in stamped[0].traits] == list(map(type, TRAITS.values()))
        assert dead == full.dead_updates(10)
        assert [delivery.attempts for delivery in attempts] == [1, 1]
        assert other.check() == full.check() == []
        for name in ("w1", "w2", "w3"):
            assert other.decided_with(name) == full.decided_with(name)


def _ordered(explanation: Any) -> Any:
    """Links and claims come in an order of the graph's own."""
    return replace(
        explanation,
        links=tuple(sorted(map(repr, explanation.links))),
        claims=tuple(sorted(map(repr, explanation.claims))),
    )


def test_moving_there_and_back_says_the_same(full: SqliteGraph) -> None:
    """The lines of a graph that moved are those that it came in, but for names of components."""
    with SqliteGraph(":memory:") as other:
        first = lines_of(full)
        take_in(other, first)
        again = lines_of(other)

    assert _comparable(first) == _comparable(again)


def _comparable(lines: Sequence[str]) -> list[str]:
    """What lines say, however it is cut into them."""
    found = set()
    for line in lines:
        record = json.loads(line)
        record.pop("component", None)
        record.pop("lines", None)
        subject = record.get("subject", record.get("digest"))
        for part in ("references", "days", "claims"):
            found.update(json.dumps([subject, part, one]) for one in record.pop(part, ()))
        found.add(json.dumps(record))
    return sorted(found)


def test_positions_and_numbers_are_not_given_twice(full: SqliteGraph) -> None:
    """Updates after a move come after all that were ever made, and leave none of them behind."""
    before = full.lease_updates(10_000, 60)
    with SqliteGraph(":memory:") as other:
        lines = lines_of(full)
        take_in(other, lines)
        moved = other.lease_updates(10_000, 60)
        other.acknowledge([delivery.position for delivery in moved])
        Recognizer(other, Rules(workspace="w1", traits=tuple(TRAITS))).process(
            [make_event("late", START, "kiosk", user_id="u99")]
        )
        fresh = other.lease_updates(10_000, 60)
        sequence = json.loads(lines[0])["sequence"]

    # Of those that move, one was leased before by somebody who has not come back.
    assert len(moved) == len(before) + 1
    assert {d.position: d.update for d in before}.items() <= {
        d.position: d.update for d in moved
    }.items()
    assert fresh
    assert min(d.position for d in fresh) > sequence
    assert min(d.update.sequence for d in fresh) > sequence


def test_receipt_of_before_is_rechecked_after_a_move() -> None:
    """Rows that were on their way while the graph moved are made good in its new place."""
    with SqliteGraph(":memory:") as graph, SqliteGraph(":memory:") as other:
        done = Recognizer(graph).process([make_event("a", START, "d1")])
        take_in(other, lines_of(graph))
        recognizer = Recognizer(other)
        recognizer.process([make_event("c", START + 1, "d1", user_id="u1")])
        leased = other.lease_updates(10, 60)
        other.acknowledge([delivery.position for delivery in leased])

        assert recognizer.flushed(done.receipt) == 1


def test_lines_are_short_and_memory_is_bounded(tmp_path: Path) -> None:
    """A device of 60,000 rows and one of 20,000 claims pass through in a few megabytes."""
    rng = random.Random(3)
    with SqliteGraph(tmp_path / "one.db") as graph, SqliteGraph(tmp_path / "two.db") as other:
        recognizer = Recognizer(graph)
        for start in range(0, 60_000, 10_000):
            recognizer.process(
                [
                    make_event(str(uuid.UUID(int=rng.getrandbits(128))), START + start + n, "kiosk")
                    for n in range(10_000)
                ]
            )
        recognizer.process(
            [make_event(f"c{n}", START + n, "tablet", user_id="u1") for n in range(20_000)]
        )
        longest = 0
        path = tmp_path / "graph.ndjson"
        tracemalloc.start()
        with path.open("w") as file:
            for line in write_records(graph.export()):
                longest = max(longest, len(line))
                file.write(line)
        exported = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with path.open("rb") as lines:
            other.take_in(read_records(lines))
        imported = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        equal = contents(other) == contents(graph)

    assert equal
    assert longest < PART * 100
    assert exported < 4_000_000
    assert imported < 40_000_000


def test_export_is_of_one_moment(tmp_path: Path) -> None:
    """What is written while a graph is exported is not in it, and waits for nobody."""
    with SqliteGraph(tmp_path / "graph.db", timeout=1) as graph:
        recognizer = Recognizer(graph)
        recognizer.process([make_event(f"a{n}", START + n, f"d{n}") for n in range(50)])
        before = contents(graph)
        records = graph.export()
        begun = list(islice(records, 3))
        recognizer.process([make_event("x", START, "d-x"), make_event("c", START, user_id="u1")])
        with SqliteGraph(":memory:") as other:
            other.take_in(iter([*begun, *records]))

            assert contents(other) == before
        assert contents(graph) != before


def test_what_version_1_has_forgotten_stays_forgotten(tmp_path: Path) -> None:
    """Names that version 1 gave to the forgotten move along, and are understood."""
    with SqliteGraph(tmp_path / "one.db") as graph, SqliteGraph(":memory:") as other:
        salt = next(iter(graph.export())).salt  # type: ignore[union-attr]
        digest = earlier_digester(salt, "default")("user_id", "u1")
        graph._connection.execute("INSERT INTO forgotten VALUES (?, ?)", (digest, START + 9))
        graph._connection.execute("UPDATE meta SET value = 1 WHERE name = 'forgotten_1'")
        take_in(other, lines_of(graph))
        claim, later = (make_event(f"c{n}", START + n, "d1", user_id="u1") for n in (5, 15))
        owners = [Recognizer(one).process([claim, later]).owners for one in (graph, other)]

    assert owners[0] == owners[1]
    assert owners[1][0] is None
    assert owners[1][1] is not None


def test_graphs_that_keep_nothing_cannot_move() -> None:
    """A graph in memory, and a rehearsal, say that they neither export nor take in."""
    with closing(open_graph("memory:")) as graph:
        with pytest.raises(GraphError, match="cannot be exported"):
            graph.export()
        with pytest.raises(GraphError, match="takes no other graph in"):
            graph.take_in([])

        assert (graph.check(), graph.compact()) == ([], 0)


# What is not whole ----------------------------------------------------------------------------


def damage(lines: list[str], what: str) -> list[str]:
    """The lines of a graph, wrong in one way, and the line that is to blame."""
    number = next(n for n, line in enumerate(lines) if '"kind":"identifier"' in line)
    one = json.loads(lines[number])
    match what:
        case "cut between lines":
            return lines[: len(lines) // 2]
        case "cut in a line":
            return [*lines[:-1], lines[-1][:-3]]
        case "line lost":
            return [*lines[:number], *lines[number + 1 :]]
        case "line twice":
            return [
                *lines[: number + 1],
                *lines[number:-1],
                json.dumps({"kind": "end", "lines": len(lines)}) + "\n",
            ]
        case "not JSON":
            return [*lines[:number], "oops\n", *lines[number + 1 :]]
        case "unknown kind":
            return [*lines[:number], '{"kind":"secret"}\n', *lines[number + 1 :]]
        case "unknown key":
            one["more"] = "secret"
        case "other value":
            one["value"] = "secret"
        case "wrong type":
            one["seen"][1] = "secret"
        case "unknown workspace":
            one["workspace"] = "secret"
        case "wrong order":
            return [*lines[:number], lines[-2], *lines[number:-2], lines[-1]]
        case "after the end":
            return [*lines, lines[-1]]
    return [*lines[:number], json.dumps(one) + "\n", *lines[number + 1 :]]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("cut between lines", r"ends after line \d+, without its end: it is not whole"),
        ("cut in a line", r"line \d+: the line ends in the middle"),
        ("line lost", r"not whole|are not among the records"),
        ("not JSON", r"line 4: Invalid JSON"),
        ("unknown kind", r"line 4: its kind is missing, or unknown"),
        ("unknown key", r"line 4: identifier"),
        ("other value", r"line 4: the digest belongs to another value"),
        ("wrong type", r"line 4: identifier\.seen"),
        ("unknown workspace", r"line 4: there is no line of kind workspace"),
        ("wrong order", r"line 5: a line of kind identifier comes too late"),
        ("after the end", r"line \d+: nothing comes after the end"),
    ],
)
def test_damaged_export_is_refused_and_never_used(
    full: SqliteGraph, tmp_path: Path, what: str, says: str
) -> None:
    """The error names the line and no value; the graph refuses all until it is begun again."""
    lines = lines_of(full)
    with SqliteGraph(tmp_path / "new.db") as graph:
        with pytest.raises(InputError, match=says) as caught:
            take_in(graph, damage(lines, what))
        with pytest.raises(ConfigurationError, match="--restart"):
            take_in(graph, lines)
        for refused in (
            lambda: Recognizer(graph).process([make_event("a", 1, "d1")]),
            lambda: Recognizer(graph).explain("a"),
            lambda: graph.lease_updates(1, 1),
            lambda: graph.dead_updates(1),
            graph.stats,
            lambda: list(graph.export()),
            lambda: graph.expire(1),
            graph.compact,
        ):
            with pytest.raises(GraphSchemaError, match=r"not finished.*Nothing was written"):
                refused()
        problems = graph.check()
        take_in(graph, lines, restart=True)

        assert "secret" not in str(caught.value)
        assert caught.value.written
        assert len(problems) == 1
        assert "not finished" in problems[0]
        assert contents(graph) == contents(full)
        assert graph.check() == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ('{"messageId": "m1"}\n', "line 1: this is no exported graph"),
        ("id,name\n", "line 1: this is no exported graph"),
        (
            '{"kind":"graph","version":7,"salt":"%s","sequence":0}\n' % ("00" * 32),
            "line 1: the file is of version 7, this release reads 1",
        ),
    ],
)
def test_foreign_file_leaves_the_graph_as_it_was(tmp_path: Path, text: str, says: str) -> None:
    """A file that is no exported graph is refused before anything is written."""
    with SqliteGraph(tmp_path / "graph.db") as graph:
        with pytest.raises(InputError, match=says) as caught:
            take_in(graph, [text])

        assert not caught.value.written
        assert Recognizer(graph).process([make_event("c", 1, "d1", user_id="u1")]).claims == 1


def test_line_without_end_is_not_read_into_memory() -> None:
    """A line that is longer than any of ours is refused, and not read to its end."""

    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(InputError, match="line 1 is longer than"):
        next(read_records(io.BufferedReader(endless)))

    assert endless.given < 2 * MAX_LINE


def test_graph_that_holds_something_takes_nothing_in(full: SqliteGraph, tmp_path: Path) -> None:
    """A graph that is not empty is left as it is, whether restart is asked for or not."""
    lines = lines_of(full)
    with SqliteGraph(tmp_path / "graph.db") as graph:
        Recognizer(graph).process([make_event("a", 1, "d1")])
        before = contents(graph)
        for restart in (False, True):
            with pytest.raises(ConfigurationError, match="not empty") as caught:
                take_in(graph, lines, restart=restart)

            assert not caught.value.written
        assert contents(graph) == before


def test_others_wait_until_an_import_is_finished(full: SqliteGraph, tmp_path: Path) -> None:
    """Who had the empty graph open before is refused meanwhile, and goes on with the new one."""
    path = tmp_path / "graph.db"
    with SqliteGraph(path) as graph, SqliteGraph(path) as other:
        recognizer = Recognizer(other, Rules(workspace="w1", traits=tuple(TRAITS)))
        event = make_event("z", START + 2_499, "tablet")

        def watched() -> Iterator[Record]:
            for number, record in enumerate(full.export()):
                if number == 5:
                    with pytest.raises(GraphSchemaError, match="not finished"):
                        recognizer.process([event])
                    with pytest.raises(ConfigurationError, match="not finished"):
                        other.take_in(full.export())
                yield record

        graph.take_in(watched())
        owner = recognizer.process([event]).owners[0]

        assert owner is not None
        assert other.stats().claims == full.stats().claims


def test_second_import_that_begins_anew_stops_the_first(full: SqliteGraph, tmp_path: Path) -> None:
    """Of two imports into one graph at the same time the later one alone is carried out."""
    path = tmp_path / "graph.db"
    with SqliteGraph(path) as graph, SqliteGraph(path) as other:

        def overtaken() -> Iterator[Record]:
            for number, record in enumerate(full.export()):
                if number == 5:
                    other.take_in(full.export(), restart=True)
                yield record

        with pytest.raises(GraphError, match="has begun anew"):
            graph.take_in(overtaken())

        assert contents(graph) == contents(full)
        assert graph.check() == []


def take_in_and_die(path: Path, lines: list[str], at: int) -> None:
    """A worker process: is killed while it takes a graph in, after so many records."""

    def dying() -> Iterator[Record]:
        for number, record in enumerate(read_records(io.BytesIO("".join(lines).encode()))):
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield record

    sqlite._IMPORT = 500
    SqliteGraph(path).take_in(dying())


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_killed_import_is_known_and_can_be_begun_again(
    full: SqliteGraph, tmp_path: Path, share: float
) -> None:
    """A process that is killed while it imports leaves a graph that says so, and a restart ends."""
    lines = lines_of(full)
    path = tmp_path / "new.db"
    at = 1 + int(share * (len(lines) - 2))
    dying = PROCESSES.Process(target=take_in_and_die, args=(path, lines, at))
    dying.start()
    dying.join(60)
    with SqliteGraph(path) as graph:
        with pytest.raises(GraphSchemaError, match="not finished"):
            graph.stats()
        take_in(graph, lines, restart=True)

        assert dying.exitcode == -signal.SIGKILL
        assert contents(graph) == contents(full)
        assert graph.check() == []


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_wrong_byte_is_taken_for_a_graph(data: st.DataObject) -> None:
    """Whatever byte of an export is changed or lost: an error of ours, or the same graph."""
    with ExitStack() as stack:
        graph = stack.enter_context(SqliteGraph(":memory:"))
        Recognizer(graph).process(
            [
                make_event("a", START, "d1"),
                make_event("b", START + 1, "d1", user_id="u1", email="a@example.com"),
            ]
        )
        whole = "".join(lines_of(graph)).encode()
        place = data.draw(st.integers(0, len(whole) - 1))
        byte = data.draw(st.sampled_from([b"", b"x", b"0", b'"', b"\n", b"\xff", b"}"]))
        wrong = whole[:place] + byte + whole[place + 1 :]
        other = stack.enter_context(SqliteGraph(":memory:"))
        try:
            other.take_in(read_records(io.BytesIO(wrong)))
        except RecognitionError:
            return

        assert contents(other) == contents(graph)
        assert other.check() == []


# Check and compact ----------------------------------------------------------------------------


def test_check_finds_what_is_wrong(full: SqliteGraph) -> None:
    """Each table that names something of another one is looked at, and what is missing counted."""
    connection = full._connection
    sound = full.check()
    connection.execute("DELETE FROM identifiers WHERE key = 'ann'")
    connection.execute("DROP TABLE days")
    connection.execute("CREATE TABLE mine (id INTEGER)")
    problems = full.check()

    assert sound == []
    assert "table days is missing" in problems
    assert "table mine is one too many" in problems
    assert any("rows of claims name identifiers that are not there" in line for line in problems)
    assert any("rows of links name identifiers that are not there" in line for line in problems)


def test_check_finds_damage(tmp_path: Path) -> None:
    """A file with damaged pages is reported, and nothing is written."""
    path = tmp_path / "graph.db"
    with SqliteGraph(path) as graph:
        Recognizer(graph).process([make_event(f"a{n}", n, f"d{n}") for n in range(2_000)])
    damaged = bytearray(path.read_bytes())
    damaged[40_000:60_000] = b"\x5a" * 20_000
    path.write_bytes(damaged)
    with SqliteGraph(path) as graph:
        problems = graph.check()

    assert problems
    assert all("SQLite" in line for line in problems)
    assert path.read_bytes() == damaged


def test_compact_gives_space_back_and_changes_no_answer(tmp_path: Path) -> None:
    """What expired is gone from the disk, devices that nothing is known of too; the rest stays."""
    path = tmp_path / "graph.db"
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph)
        for day in range(4):
            recognizer.process(
                [
                    make_event(str(uuid.uuid4()), START + day * DAY + n, f"d{day} {n}")
                    for n in range(3_000)
                ]
            )
        recognizer.process([make_event("c", START, "d0 1", user_id="u1")])
        recognizer.release("d0 2", START)
        recognizer.unlink(Identifier("anonymous_id", "d0 3"), Identifier("user_id", "u1"))
        graph.expire(START + 3 * DAY)
        before, size = graph.stats(), path.stat().st_size
        freed = graph.compact()
        after = graph.stats()
        again = graph.compact()
        owners = recognizer.process(
            [
                make_event("x", START + 1, "d0 1"),
                make_event("y", START, "d0 2", user_id="u2"),
                make_event("z", START + 1, "d0 2"),
                make_event("v", START, "d0 3", user_id="u1"),
                make_event("w", START + 1, "d0 3"),
            ]
        ).owners

        assert freed == before.bytes - after.bytes > size / 2
        assert path.stat().st_size == after.bytes
        assert again == 0
        assert (before.anonymous_ids, after.anonymous_ids) == (12_000, 3_003)
        assert replace(after, bytes=0, anonymous_ids=0) == replace(before, bytes=0, anonymous_ids=0)
        assert [owner and owner.id for owner in owners] == ["u1", "u2", None, "u1", None]
        assert graph.check() == []
