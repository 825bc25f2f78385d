"""Hashed identifiers: the plain value stays in the process, and every decision stays the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import make_event
from recognition.attribution import AttributionRules, Policy
from recognition.cli import main
from recognition.delivery import deliver
from recognition.errors import ConfigurationError, RecognitionError
from recognition.events import Event, Identifier
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from recognition.identity import IdentityRules, normalise
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.sinks import open_sink
from warehouse import Warehouse

KEY = b"an example key of 28 letters"
OTHER_KEY = b"another key of some length"
EMAIL, PHONE = "Ann.Lee+Private@Example.COM", "+41 79 555 01 23"
GONE = "bo.ray.private@example.com"
HASHING = IdentityRules(hashed=frozenset({"email", "phone"}), hash_key=KEY)
RULES = Rules(identity=HASHING, traits=("plan",))
ANN = Identifier("email", EMAIL)
ANN_HASH = normalise(ANN, HASHING)

GRAPHS: dict[str, Callable[[], Graph]] = {
    "memory": MemoryGraph,
    "sqlite": lambda: SqliteGraph(":memory:"),
}


@pytest.fixture(params=GRAPHS)
def graph(request: pytest.FixtureRequest) -> Iterator[Graph]:
    """Each embedded graph, empty."""
    opened = GRAPHS[request.param]()
    yield opened
    opened.close()


def rows_after(graph: Graph, rules: Rules, *batches: list[Event]) -> dict[str, Any]:
    """The rows of all batches in the end, by message id."""
    recognizer, warehouse = Recognizer(graph, rules), Warehouse()
    for batch in batches:
        done = recognizer.process(batch)
        for table, rows in recognizer.rows(done).items():
            warehouse.load(table, rows)
        recognizer.flushed(done.receipt)
    warehouse.apply([item.update for item in graph.lease_updates(10_000, 60)])
    return warehouse.tables["events"]


# ---------------------------------------------------------------- nothing leaves the process


def traces(data: bytes, *secrets: str) -> list[str]:
    """The forms of a secret that are found in the data: any case, UTF-16, or a hash with no key."""
    lower, found = data.lower(), []
    for secret in secrets:
        plain = secret.lower()
        bare = hashlib.sha256(plain.encode())
        forms = {
            "plain": plain.encode(),
            "UTF-16": plain.encode("utf-16-le"),
            "hexadecimal": plain.encode().hex().encode(),
            "SHA-256": bare.hexdigest().encode(),
            "SHA-256 in bytes": bare.digest().lower(),
        }
        found += [f"{form} of {secret}" for form, needle in forms.items() if needle in lower]
    return found


SECRETS = (EMAIL, "ann.lee", PHONE, "79 555 01 23", GONE, "bo.ray", "never.seen", KEY.decode())


class Overheard:
    """A graph of which everything that it is handed and answers is written down."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.talk: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._graph, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.talk.append(repr((args, kwargs)))
            answer = method(*args, **kwargs)
            self.talk.append(repr(answer))
            return answer

        return call


def live(graph: Graph, rules: Rules) -> None:
    """Everything that can happen to a person."""
    recognizer = Recognizer(graph, rules)
    traits = {"email": EMAIL, "phone": PHONE, "Email": EMAIL, "plan": "pro"}
    padded = f"  {EMAIL.upper()}\t"
    receipts = [
        recognizer.process(batch).receipt
        for batch in (
            [make_event("m1", 1, "d1"), make_event("m2", 2, "d2")],
            [make_event("m3", 3, "d1", email=padded, traits=traits)],
            [make_event("m4", 4, "d1", email=EMAIL, phone=PHONE, traits=traits)],
            [make_event("m5", 5, "d2", user_id="u1", phone=f" {PHONE}", traits=traits)],
            [make_event("m6", 6, "d2", user_id="u2", email=EMAIL, traits=traits)],
            [make_event("m7", 7, "d2", user_id="u3", previous_id="u2", type="alias")],
            [make_event("m8", 8, "d3", email=EMAIL, traits={**traits, "plan": "free"})],
            [make_event("m9", 9, traits=traits)],
        )
    ]
    for receipt in receipts:
        recognizer.flushed(receipt)
    for subject in (ANN, Identifier("phone", PHONE), Identifier("anonymous_id", "d1"), "m3"):
        recognizer.explain(subject)
    Recognizer(graph.rehearse(), rules).forget(ANN)
    recognizer.unlink(ANN, Identifier("phone", PHONE))
    recognizer.unlink(Identifier("email", "never.seen@example.com"), Identifier("user_id", "u1"))
    recognizer.unlink(ANN, Identifier("anonymous_id", "d3"))
    recognizer.release("d1")
    # The update of a forgotten person waits in the outbox beside those that named it.
    recognizer.process([make_event("m10", 10, "d9"), make_event("m11", 11, "d9", email=GONE)])
    recognizer.forget(Identifier("email", GONE), 12)
    recognizer.process([make_event("m12", 12, "d9", email=GONE)])


def err(graph: Graph, rules: Rules) -> list[str]:
    """What can be done wrong with a person; gives all that the errors say."""
    recognizer, errors = Recognizer(graph, rules), []
    unhashed = Recognizer(graph, replace(rules, identity=IdentityRules()))
    for wrong in (
        lambda: recognizer.unlink(ANN, ANN),
        lambda: recognizer.forget(Identifier("mail", EMAIL)),
        lambda: unhashed.process([make_event("m13", 13, email=EMAIL)]),
        lambda: unhashed.explain(ANN),
        lambda: unhashed.forget(ANN),
    ):
        try:
            wrong()
        except RecognitionError as error:
            errors.append("".join(traceback.format_exception(error)))
    return errors


def files_of(folder: Path) -> bytes:
    """All bytes of all files, the write-ahead log among them."""
    return b"\0".join(path.read_bytes() for path in sorted(folder.iterdir()))


def test_the_file_of_a_graph_holds_no_plain_value(tmp_path: Path) -> None:
    """Neither the database nor its log, before and after the checkpoint, has a byte of it."""
    folder = tmp_path / "graph"
    folder.mkdir()
    graph = SqliteGraph(folder / "graph.db")
    live(graph, RULES)
    err(graph, RULES)

    names = [path.name for path in folder.iterdir()]
    open_, kept = files_of(folder), ANN_HASH.value.encode()
    graph.close()
    with closing(sqlite3.connect(folder / "graph.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("VACUUM")
    closed = files_of(folder)

    assert "graph.db-wal" in names
    assert kept in open_
    assert kept in closed
    assert traces(open_, *SECRETS) == []
    assert traces(closed, *SECRETS) == []


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """The same life without hashes leaves e-mail and phone in the file: the search can fail."""
    graph = SqliteGraph(tmp_path / "graph.db")
    live(graph, Rules(traits=("plan",)))
    graph.close()

    assert {f"plain of {EMAIL}", f"plain of {PHONE}"} <= {*traces(files_of(tmp_path), *SECRETS)}


def test_a_graph_is_handed_no_plain_value(graph: Graph) -> None:
    """No call to a graph, and no answer of it, holds the value: observations, traits, receipts."""
    overheard = Overheard(graph)
    live(overheard, RULES)  # type: ignore[arg-type]
    talk = "\n".join(overheard.talk)

    assert ANN_HASH.value in talk
    assert traces(talk.encode(), *SECRETS) == []


def test_updates_hold_no_plain_value(graph: Graph) -> None:
    """The messages of the outbox name the person by its hash."""
    live(graph, RULES)
    messages = "\n".join(item.update.to_json() for item in graph.lease_updates(10_000, 60))

    assert ANN_HASH.value in messages
    assert traces(messages.encode(), *SECRETS) == []


def test_neither_logs_nor_errors_hold_a_plain_value(
    graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is logged down to DEBUG, and every error with its causes, is free of it."""
    caplog.set_level(logging.DEBUG)
    live(graph, RULES)
    errors = err(graph, RULES)
    with (
        closing(open_sink(f"sqlite:///{tmp_path / 'warehouse.db'}")) as sink,
        pytest.raises(RecognitionError) as caught,
    ):
        deliver(graph, sink)
    errors += traceback.format_exception(caught.value)

    assert len(errors) > 5
    assert all("Nothing was written" in error for error in errors[:5])
    assert caplog.records
    assert traces("\n".join([*errors, caplog.text]).encode(), *SECRETS) == []


def test_the_command_line_leaves_no_plain_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, plan, explain, stats, config and forget write it nowhere: no file, no output."""
    for name in [name for name in os.environ if name.startswith("RECOGNITION_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RECOGNITION_HASHED", "email,phone")
    monkeypatch.setenv("RECOGNITION_HASH_KEY", KEY.decode())
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "graph"
    folder.mkdir()
    events = tmp_path / "events.ndjson"
    traits = {"traits": {"email": EMAIL, "phone": PHONE}}
    bodies = [
        {"messageId": "m1", "type": "page", "timestamp": "2026-01-01T00:00:01Z"},
        {"messageId": "m2", "type": "identify", "timestamp": "2026-01-01T00:00:02Z", **traits},
        {"messageId": "m3", "type": "page", "timestamp": "2026-01-01T00:00:03Z"},
    ]
    events.write_text("\n".join(json.dumps({**body, "anonymousId": "d1"}) for body in bodies))
    graph = ("--graph", f"sqlite:///{folder / 'graph.db'}")

    codes = [
        main(arguments)
        for arguments in (
            ["plan", *graph, str(events)],
            ["run", *graph, str(events)],
            ["explain", *graph, "--json", f"email:{EMAIL}"],
            ["explain", *graph, "m3"],
            ["stats", *graph],
            ["config"],
            ["config", "--json"],
            ["forget", *graph, f"phone:{PHONE}"],
        )
    ]
    shown = capsys.readouterr()

    assert codes == [0] * len(codes)
    assert ANN_HASH.value in shown.out
    assert traces((shown.out + shown.err).encode() + files_of(folder), *SECRETS) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.ndjson", "graph"]


def test_rules_print_without_the_key() -> None:
    """Neither rules nor their fingerprint show the key."""
    shown = repr(RULES) + str(RULES) + RULES.fingerprint + HASHING.hashing

    assert traces(shown.encode(), KEY.decode()) == []
    assert traces(shown.encode(), KEY.hex()) == []


# ---------------------------------------------------------------- the decisions stay


def test_a_person_of_hashes_has_a_hash_as_its_id_until_it_has_a_user_id(graph: Graph) -> None:
    """Rows hold the hash of the e-mail address, and the user id once it is linked."""
    first = [make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=EMAIL)]
    before = rows_after(graph, RULES, first)
    after = rows_after(graph, RULES, first, [make_event("m3", 3, user_id="u1", email=EMAIL)])

    assert {row["user_id"] for row in before.values()} == {ANN_HASH.value}
    assert {row["user_id"] for row in after.values()} == {"u1"}


EMAILS, PHONES = ("A@x.com", "a@x.com ", "b@x.com", "null"), ("+1 555", "+1 556")


@st.composite
def histories(draw: st.DrawFn) -> list[list[Event]]:
    """Batches of events of few devices and persons."""
    events = [
        make_event(
            f"m{number}",
            draw(st.integers(1, 8)),
            draw(st.sampled_from([None, "d1", "d2"])),
            user_id=draw(st.sampled_from([None, None, "u1", "u2"])),
            email=draw(st.sampled_from([None, None, *EMAILS])),
            phone=draw(st.sampled_from([None, None, *PHONES])),
            previous_id=draw(st.sampled_from([None, None, None, "u1", "u2"])),
            traits={"plan": draw(st.sampled_from(["free", "pro"]))},
        )
        for number in range(draw(st.integers(1, 8)))
    ]
    border = draw(st.integers(0, len(events)))
    return [batch for batch in (events[:border], events[border:]) if batch]


@given(batches=histories(), policy=st.sampled_from(Policy))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_hashing_changes_no_decision(batches: list[list[Event]], policy: Policy) -> None:
    """Every row has the owner that it has without hashes, under every policy."""
    plain = Rules(attribution=AttributionRules(policy=policy), traits=("plan",))
    hashed = replace(plain, identity=HASHING)
    names = {
        normalise(identifier, plain.identity).value: normalise(identifier, HASHING).value
        for type, values in (("email", EMAILS), ("phone", PHONES))
        for identifier in (Identifier(type, value) for value in values)
    }

    expected = rows_after(MemoryGraph(), plain, *batches)
    for row in expected.values():
        row["user_id"] = names.get(row["user_id"], row["user_id"])

    assert rows_after(MemoryGraph(), hashed, *batches) == expected


def test_placeholders_are_refused_before_they_are_hashed(graph: Graph) -> None:
    """Blocked values, one's own and patterns among them, identify nobody when hashed, too."""
    identity = replace(
        HASHING, blocked=frozenset({"test@example.com"}), blocked_patterns=(r"qa-\d+@.*",)
    )
    recognizer = Recognizer(graph, Rules(identity=identity))
    done = recognizer.process(
        [
            make_event(f"m{number}", number, "d1", email=value)
            for number, value in enumerate(("null", " Test@Example.com", "qa-7@example.com"), 1)
        ]
    )

    assert (done.blocked, done.identified, done.claims) == (3, 0, 0)


def test_sending_a_hash_makes_nobody_another_person(graph: Graph) -> None:
    """Who reads a hash in a row and sends it as an e-mail address is somebody else."""
    recognizer = Recognizer(graph, RULES)
    ann, thief = recognizer.process(
        [make_event("m1", 1, email=EMAIL), make_event("m2", 2, email=ANN_HASH.value)]
    ).owners

    assert ann is not None
    assert thief is not None
    assert ann.id == ANN_HASH.value != thief.id


# ---------------------------------------------------------------- explain and undo


def test_what_rows_show_can_be_asked_for(graph: Graph) -> None:
    """A person is found by its plain value, however it is written, and by its hash."""
    recognizer = Recognizer(graph, RULES)
    recognizer.process([make_event("m1", 1, "d1", user_id="u1", email=EMAIL)])
    answers = [
        recognizer.explain(Identifier("email", value))
        for value in (EMAIL, f" {EMAIL.lower()} ", ANN_HASH.value, f" {ANN_HASH.value} ")
    ]

    assert answers[0].owner == "u1"
    assert answers[0].identifiers == (
        (ANN_HASH, ANN_HASH.value),
        (Identifier("user_id", "u1"), "u1"),
    )
    assert answers == [answers[0]] * 4


@pytest.mark.parametrize("named", [ANN, ANN_HASH], ids=["plain", "hash"])
def test_a_link_of_a_hash_is_parted(graph: Graph, named: Identifier) -> None:
    """`unlink` takes the e-mail address from the user, for good."""
    recognizer = Recognizer(graph, RULES)
    event = make_event("m1", 1, "d1", user_id="u1", email=EMAIL)
    recognizer.process([event])
    recognizer.unlink(named, Identifier("user_id", "u1"))
    recognizer.process([replace(event, message_id="m2")])

    assert recognizer.explain(ANN).owner == ANN_HASH.value


@pytest.mark.parametrize("named", [ANN, ANN_HASH], ids=["plain", "hash"])
def test_who_is_forgotten_by_a_hash_stays_forgotten(graph: Graph, named: Identifier) -> None:
    """`forget` finds the person, and late events with the plain value stay nobody's."""
    recognizer = Recognizer(graph, RULES)
    recognizer.process([make_event("m1", 1, "d1"), make_event("m2", 2, "d1", email=EMAIL)])
    updates = recognizer.forget(named, 10)
    late = recognizer.process([make_event("m3", 3, "d1", email=EMAIL)])

    assert updates > 0
    assert late.owners == (None,)
    assert not recognizer.explain(ANN).found


# ---------------------------------------------------------------- one graph, one key


@pytest.mark.parametrize(
    ("identity", "told"),
    [
        (replace(HASHING, hash_key=OTHER_KEY), "asked for is hashed email + phone (key"),
        (replace(HASHING, hashed=frozenset({"email"})), "asked for is hashed email (key"),
        (IdentityRules(), "asked for is hashed nothing"),
    ],
    ids=["another key", "other types", "no key"],
)
def test_a_worker_that_hashes_otherwise_is_refused(
    graph: Graph, identity: IdentityRules, told: str
) -> None:
    """Another key, other types or no hashes would split every person: nothing is written."""
    Recognizer(graph, RULES).process([make_event("m1", 1, "d1", email=EMAIL)])
    before = graph.stats()
    other = Recognizer(graph, replace(RULES, identity=identity))
    for refused in (
        lambda: other.process([make_event("m2", 2, "d2", email=EMAIL)]),
        lambda: other.explain(ANN),
        lambda: other.forget(ANN),
        lambda: other.unlink(ANN, Identifier("user_id", "u1")),
    ):
        with pytest.raises(ConfigurationError) as caught:
            refused()

        assert told in str(caught.value)
        assert f"decided with hashed {HASHING.hashing}" in str(caught.value)
        assert "Nothing was written" in str(caught.value)
        assert traces(str(caught.value).encode(), KEY.decode(), OTHER_KEY.decode()) == []
    # A server writes what came before to disk when it likes.
    assert replace(graph.stats(), bytes=before.bytes) == before


def test_the_same_key_in_another_process_decides_on(tmp_path: Path) -> None:
    """A second worker with the same key and types sees the same persons."""
    for number in (1, 2):
        with SqliteGraph(tmp_path / "graph.db") as graph:
            rules = replace(RULES, identity=replace(HASHING, hash_key=bytes(KEY)))
            done = Recognizer(graph, rules).process([make_event(f"m{number}", number, email=EMAIL)])
            persons = graph.stats().persons

    assert done.owners[0] is not None
    assert (done.owners[0].id, persons) == (ANN_HASH.value, 1)


def test_a_graph_of_before_there_were_hashes_opens_without_them(tmp_path: Path) -> None:
    """Its fingerprint says nothing of hashes: it goes on as it is, and is refused with hashes."""
    path = tmp_path / "graph.db"
    with SqliteGraph(path) as graph:
        Recognizer(graph).process([make_event("m1", 1, "d1", email=EMAIL)])
    with closing(sqlite3.connect(path)) as connection, connection:
        (text,) = connection.execute(
            "SELECT value FROM meta WHERE name = 'rules default'"
        ).fetchone()
        older = {name: value for name, value in json.loads(text).items() if name != "hashed"}
        connection.execute(
            "UPDATE meta SET value = ? WHERE name = 'rules default'", (json.dumps(older),)
        )

    with SqliteGraph(path) as graph:
        done = Recognizer(graph).process([make_event("m2", 2, "d1", email=EMAIL)])
        with pytest.raises(ConfigurationError, match="decided with hashed nothing"):
            Recognizer(graph, Rules(identity=HASHING)).process([])

    assert len(older) == len(json.loads(text)) - 1
    assert done.owners[0] is not None
    assert done.owners[0].id == EMAIL.lower()
