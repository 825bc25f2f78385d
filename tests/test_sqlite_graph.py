"""What only a graph in a file must keep: processes, kills, foreign files, bytes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import Oracle, make_event
from recognition.attribution import DAY, END, AttributionRules, Policy
from recognition.errors import (
    ConfigurationError,
    GraphError,
    GraphReadOnlyError,
    GraphSchemaError,
    GraphUnavailableError,
)
from recognition.events import Event, Identifier
from recognition.graph import GraphStats, open_graph, sqlite
from recognition.graph.packing import digester, pack_id
from recognition.graph.sqlite import APPLICATION_ID, SCHEMA_VERSION, SqliteGraph
from recognition.graph.store import Known, Reference, Rows
from recognition.layouts import Row
from recognition.messages import VERSION_COLUMN
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, Supersede, TableRules
from warehouse import Warehouse

PROCESSES = multiprocessing.get_context("spawn")

#: Somebody else writes the rows, and the table has a version: so updates may be carried out as
#: late as the test likes.
RULES = Rules(stamps=False, default=TableRules(supersede=Supersede.VERSION))

SECOND = 1_000_000
START = 1_767_268_800_000_000


def journey_of_many(seed: int, count: int) -> list[Event]:
    """Events on few devices by few people, in random order; a third of them names somebody."""
    rng = random.Random(seed)
    events = []
    for number in range(count):
        known = rng.random() < 0.33
        events.append(
            make_event(
                str(uuid.UUID(int=rng.getrandbits(128), version=4)),
                START + rng.randrange(5 * 86_400) * SECOND + number,
                f"d{rng.randrange(12)}",
                user_id=f"u{rng.randrange(8)}" if known else None,
                email=f"{rng.randrange(6)}@example.com" if known and rng.random() < 0.3 else None,
            )
        )
    return events


def cut(events: Sequence[Event], size: int) -> list[Sequence[Event]]:
    return [events[start : start + size] for start in range(0, len(events), size)]


def final_rows(graph: SqliteGraph, events: Sequence[Event]) -> dict[str, object]:
    """What the rows hold after all updates of the outbox, as they came and in their order."""
    warehouse = Warehouse()
    rows: list[Row] = [
        {**RULES.layout.row_of(event, "events"), VERSION_COLUMN: None} for event in events
    ]
    warehouse.load("events", rows)
    while leased := graph.lease_updates(10_000, 600):
        warehouse.apply([delivery.update for delivery in leased])
        graph.acknowledge([delivery.position for delivery in leased])
    return {message_id: row["user_id"] for message_id, row in warehouse.tables["events"].items()}


def right_rows(events: Sequence[Event]) -> Mapping[str, object]:
    rules = RULES.attribution
    return Oracle(
        policy=rules.policy, lookback=rules.lookback, own_column=False, events=list(events)
    ).owners()


@contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions of files mean nothing to root; so the process is somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that an unprivileged user can reach, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="recognition-"))
    folder.chmod(0o777)
    yield folder
    folder.chmod(0o777)
    shutil.rmtree(folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.db"


# Processes ------------------------------------------------------------------------------------


def write_batches(path: Path, batches: Sequence[Sequence[Event]], together: Barrier) -> None:
    """A worker process: opens the graph, waits for the others, observes its batches."""
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, RULES)
        together.wait(60)
        for batch in batches:
            recognizer.process(batch)


def test_writers_of_one_file_end_with_the_rows_of_the_oracle(path: Path) -> None:
    """Three processes observe their own and each other's events at the same time."""
    events = journey_of_many(1, 900)
    rng = random.Random(2)
    together = PROCESSES.Barrier(3)
    writers = []
    for number in range(3):
        mine = events[number::3] + rng.sample(events, 150)
        rng.shuffle(mine)
        arguments = (path, cut(mine, 25), together)
        writers.append(PROCESSES.Process(target=write_batches, args=arguments))
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with SqliteGraph(path) as graph:
        assert graph.stats().claims == sum(bool(event.known) for event in events)
        assert final_rows(graph, events) == right_rows(events)


def fork_writers(commands: Connection, path: Path, batches: Sequence[Sequence[Event]]) -> None:
    """
    A worker process, of one thread and without a graph: forks a writer whenever it is told to.

    The writer observes some batches from a number on, adds a byte to a file after each, and waits
    to be killed.
    """
    while (command := commands.recv()) is not None:
        start, most, log = command
        writer = os.fork()
        if writer == 0:
            try:
                with SqliteGraph(path) as graph, log.open("ab", buffering=0) as done:
                    recognizer = Recognizer(graph, RULES)
                    for batch in batches[start : start + most]:
                        recognizer.process(batch)
                        done.write(b".")
                signal.pause()
            finally:
                os._exit(1)
        commands.send(writer)
        commands.send(os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]))


def presence(graph: SqliteGraph, batch: Sequence[Event]) -> set[bool]:
    explain = Recognizer(graph, RULES).explain
    return {explain(event.message_id).found for event in batch}


def test_killed_writer_leaves_whole_batches_only(path: Path, tmp_path: Path) -> None:
    """
    A process is killed again and again while it observes, at any moment.

    Every acknowledged batch is there, of the one on its way all or nothing, and sending all of
    them again gives the rows of the oracle.
    """
    events = journey_of_many(3, 1_500)
    batches = cut(events, 15)
    rng = random.Random(4)
    commands, theirs = PROCESSES.Pipe()
    nursery = PROCESSES.Process(target=fork_writers, args=(theirs, path, batches))
    nursery.start()
    done = 0
    for kill in range(15):
        log = tmp_path / f"log{kill}"
        log.touch()
        wanted = rng.randrange(6)
        # No more: where we are late, all batches could be done before it is killed.
        commands.send((done, wanted + 3, log))
        writer = commands.recv()
        deadline = time.monotonic() + 60
        while log.stat().st_size < wanted and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.005)
        os.kill(writer, signal.SIGKILL)
        ended = commands.recv()
        acknowledged = log.stat().st_size

        assert ended == -signal.SIGKILL
        assert wanted <= acknowledged <= wanted + 3 < len(batches) - done
        with SqliteGraph(path) as graph, closing(sqlite3.connect(path)) as reader:
            assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            for batch in batches[done : done + acknowledged]:
                assert presence(graph, batch) == {True}
            done += acknowledged
            assert presence(graph, batches[done]) in ({True}, {False})
            for batch in batches[done + 1 : done + 3]:
                assert presence(graph, batch) == {False}
    commands.send(None)
    nursery.join(30)
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, RULES)
        for batch in rng.sample(batches, len(batches)):
            recognizer.process(batch)

        assert nursery.exitcode == 0
        assert graph.stats().claims == sum(bool(event.known) for event in events)
        assert final_rows(graph, events) == right_rows(events)


def open_together(path: Path, together: Barrier) -> None:
    """A worker process: makes the graph at the same time as the others."""
    together.wait(60)
    with SqliteGraph(path) as graph:
        Recognizer(graph, RULES).process([make_event(str(os.getpid()), START, "d1")])


def test_processes_make_the_file_together(tmp_path: Path) -> None:
    """Processes that find no file at the same moment make one graph of it, and all go on."""
    together = PROCESSES.Barrier(4)
    path = tmp_path / "graph.db"
    makers = [PROCESSES.Process(target=open_together, args=(path, together)) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)

    assert [maker.exitcode for maker in makers] == [0] * 4
    with SqliteGraph(path) as graph:
        assert graph.stats().references == 4


def test_graph_that_is_made_meanwhile_is_no_foreign_database(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that another process makes between two looks at the file is recognised."""
    connect = SqliteGraph._connect

    def make_one_meanwhile(statement: str) -> None:
        if "sqlite_master" in statement:
            monkeypatch.setattr(SqliteGraph, "_connect", connect)
            SqliteGraph(path).close()

    def watched(graph: SqliteGraph) -> sqlite3.Connection:
        connection = connect(graph)
        connection.set_trace_callback(make_one_meanwhile)
        return connection

    monkeypatch.setattr(SqliteGraph, "_connect", watched)
    with SqliteGraph(path) as graph:
        assert graph.stats().references == 0


SEEDED = """
import sys
from oracle import make_event
from recognition.graph.sqlite import SqliteGraph
from recognition.layouts import layout_named
from recognition.recognizer import Recognizer
from recognition.rules import References, Rules, TableRules

rules = Rules(
    layout=layout_named("segment"),
    target_column="stitched_user_id",
    default=TableRules(references=References(sys.argv[1])),
)
graph = SqliteGraph(":memory:")
recognizer = Recognizer(graph, rules)
recognizer.process([make_event(f"a{n}", n, f"d{n % 5}", name=f"N{n % 4}") for n in range(20)])
for start in (40, 0):
    recognizer.process(
        [
            make_event(
                f"c{start}{n}", start + n, f"d{n}", user_id=f"u{start}{n}", email=f"{n % 2}@x.com"
            )
            for n in range(5)
        ]
    )
print(*[delivery.update.id for delivery in graph.lease_updates(1_000, 60)])
"""


@pytest.mark.parametrize("references", ["ids", "none"])
def test_ids_of_updates_are_the_same_in_every_process(references: str) -> None:
    """The same decision has the same id, whatever the seed of the interpreter's hashes."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    found = {
        subprocess.run(
            [sys.executable, "-c", SEEDED, references],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }

    assert len(found) == 1
    assert len(found.pop().split()) > 10


def test_threads_share_a_graph(path: Path) -> None:
    """Threads that use one graph at the same time end with the rows of the oracle."""
    events = journey_of_many(5, 600)
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, RULES)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(recognizer.process, cut(events, 20)))
            explained = list(pool.map(lambda e: recognizer.explain(e.message_id), events[:50]))

        assert all(explanation.found for explanation in explained)
        assert final_rows(graph, events) == right_rows(events)


def test_rehearsal_sees_one_moment_and_stops_no_writer(path: Path) -> None:
    """While a rehearsal is open others write, and it decides as if they had not."""
    with SqliteGraph(path, timeout=1) as graph, SqliteGraph(path, timeout=1) as other:
        Recognizer(graph).process([make_event("a", 1, "d1")])
        rehearsal = graph.rehearse()
        rehearsing = Recognizer(rehearsal)
        rehearsing.process([make_event("x", 1, "d2")])
        for writer in (graph, other):
            Recognizer(writer).process([make_event(f"c{id(writer)}", 2, "d1", user_id="u1")])
        stamped = rehearsing.process([make_event("b", 3, "d1")]).owners
        done = rehearsing.process([make_event("late", 2, "d1", user_id="u9")])
        rehearsal.close()
        after = Recognizer(graph).process([make_event("b", 3, "d1")])

        assert stamped == (None,)
        assert done.updates == 1
        assert after.owners[0] is not None
        assert after.owners[0].id == "u1"
        assert not Recognizer(graph).explain(Identifier("user_id", "u9")).found


# Files ----------------------------------------------------------------------------------------


def test_locked_database_is_said_to_be_locked(path: Path) -> None:
    """A writer that is locked out gives up after its timeout, may try again, and reads on."""
    with (
        SqliteGraph(path, timeout=0.3) as graph,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        recognizer = Recognizer(graph)
        recognizer.process([make_event("a", 1, "d1")])
        other.execute("BEGIN IMMEDIATE")
        claim = make_event("c", 2, "d1", user_id="u1")
        started = time.monotonic()
        with pytest.raises(GraphUnavailableError, match="Nothing was written") as caught:
            recognizer.process([claim])
        waited = time.monotonic() - started
        with pytest.raises(GraphUnavailableError):
            graph.lease_updates(10, 60)
        readable = recognizer.explain("a").found, graph.stats().references
        other.execute("ROLLBACK")
        after = recognizer.process([claim])

        assert caught.value.retryable
        assert caught.value.written is False
        assert 0.2 < waited < 20
        assert readable == (True, 1)
        assert (after.claims, after.updates) == (1, 1)


def test_read_only_connection_is_said_to_be_one(path: Path) -> None:
    """A database that may be read only refuses to observe, says so, and keeps what it had."""
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph)
        recognizer.process([make_event("a", 1, "d1")])
        graph._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(GraphReadOnlyError, match="may not be written") as caught:
            recognizer.process([make_event("c", 2, "d1", user_id="u1")])
        graph._connection.execute("PRAGMA query_only = OFF")

        assert not caught.value.retryable
        assert caught.value.written is False
        assert graph.stats().claims == 0
        assert recognizer.process([make_event("c", 2, "d1", user_id="u1")]).claims == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_read_only_file_or_folder_is_said_to_be_one(shared_folder: Path, what: str) -> None:
    """A file without the permission to write, or in such a folder, is refused and unchanged."""
    path = shared_folder / "graph.db"
    with SqliteGraph(path) as graph:
        Recognizer(graph).process([make_event("a", 1, "d1")])
    path.chmod(0o444 if what == "file" else 0o666)
    shared_folder.chmod(0o555 if what == "folder" else 0o777)
    before = path.read_bytes()
    with (
        unprivileged(),
        pytest.raises(GraphReadOnlyError, match="Nothing was written"),
        SqliteGraph(path) as graph,
    ):
        Recognizer(graph).process([make_event("b", 2, "d1")])

    assert path.read_bytes() == before


def test_no_file_can_be_made_in_a_read_only_folder(shared_folder: Path) -> None:
    """Where no file can be made, the error says what to look at and that a retry does not help."""
    shared_folder.chmod(0o555)
    with unprivileged(), pytest.raises(GraphUnavailableError, match="may it be written") as caught:
        SqliteGraph(shared_folder / "graph.db")

    assert not caught.value.retryable
    assert list(shared_folder.iterdir()) == []


def _foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")


def _marked(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA application_id = 77")


def _text(path: Path) -> None:
    path.write_text("message_id,anonymous_id\n" * 100)


def _newer(path: Path) -> None:
    SqliteGraph(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_foreign, "no recognition graph"),
        (_marked, "no recognition graph"),
        (_text, "no SQLite database"),
        (_newer, f"schema version {SCHEMA_VERSION + 1}, this release needs {SCHEMA_VERSION}"),
    ],
)
def test_foreign_files_are_refused_and_left_alone(
    path: Path, make: Callable[[Path], None], says: str
) -> None:
    """A file that is no graph, or one of another version, is refused, said why, and unchanged."""
    make(path)
    before = path.read_bytes()
    with pytest.raises(GraphSchemaError, match=says) as caught:
        SqliteGraph(path)

    assert "Nothing was written" in str(caught.value)
    assert (caught.value.written, caught.value.retryable) == (False, False)
    assert path.read_bytes() == before


def test_refused_file_is_let_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection to a file that is refused is closed, not left to the garbage collector."""
    closed: list[sqlite3.Connection] = []

    class Watched(sqlite3.Connection):
        def close(self) -> None:
            closed.append(self)
            super().close()

    _foreign(path)
    connect = partial(sqlite3.connect, factory=Watched)
    monkeypatch.setattr("recognition.graph.sqlite.sqlite3.connect", connect)
    with pytest.raises(GraphSchemaError):
        SqliteGraph(path)

    assert len(closed) == 1


def test_missing_folder_is_named(tmp_path: Path) -> None:
    """A path in a folder that is not there is refused, and the folder is not made."""
    with pytest.raises(GraphUnavailableError, match=r"there is no folder .*nowhere") as caught:
        SqliteGraph(tmp_path / "nowhere" / "graph.db")

    assert not caught.value.retryable
    assert list(tmp_path.iterdir()) == []


def test_folder_is_no_graph(tmp_path: Path) -> None:
    """A folder in the place of the file is refused, and a retry is not advised."""
    with pytest.raises(GraphUnavailableError, match="cannot be opened") as caught:
        SqliteGraph(tmp_path)

    assert not caught.value.retryable


def test_damaged_file_is_an_error_of_the_graph(path: Path) -> None:
    """A damaged database is reported as a graph error that names what SQLite found."""
    with SqliteGraph(path) as graph:
        Recognizer(graph).process([make_event(f"a{n}", n, f"d{n}") for n in range(2_000)])
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\x5a" * (len(damaged) - 4096)
    path.write_bytes(damaged)

    with SqliteGraph(path) as graph, pytest.raises(GraphError, match="SQLITE_CORRUPT"):
        Recognizer(graph).process([make_event("c", 1, "d1", user_id="u1")])


@pytest.mark.parametrize("url", ["sqlite:graph.db", "sqlite://graph.db", "sqlite:///"])
def test_urls_that_name_no_file_are_refused(url: str) -> None:
    """A URL without a path is refused with the right way to write it."""
    with pytest.raises(ConfigurationError, match="sqlite:///path"):
        open_graph(url)


def test_urls_are_relative_and_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are relative to the working directory, four begin an absolute path."""
    monkeypatch.chdir(tmp_path)
    open_graph("sqlite:///one.db").close()
    open_graph(f"sqlite:///{tmp_path}/two.db", timeout=1, synchronous="FULL").close()

    assert {entry.name for entry in tmp_path.iterdir()} == {"one.db", "two.db"}


def test_synchronous_is_set(path: Path) -> None:
    """`synchronous` reaches the database; anything but NORMAL and FULL is refused."""
    found = {}
    for name in ("NORMAL", "FULL"):
        with SqliteGraph(path, synchronous=name) as graph:
            found[name] = graph._connection.execute("PRAGMA synchronous").fetchone()[0]
    with pytest.raises(ConfigurationError, match="NORMAL or FULL"):
        SqliteGraph(path, synchronous="OFF")

    assert found == {"NORMAL": 1, "FULL": 2}


def test_closed_graph_says_so(path: Path) -> None:
    """A closed graph takes nothing in any more."""
    graph = SqliteGraph(path)
    graph.close()

    with pytest.raises(GraphError, match="closed"):
        Recognizer(graph).process([make_event("a", 1, "d1")])


def test_nothing_of_a_forgotten_person_is_in_the_file(path: Path) -> None:
    """After forgetting and delivering, the bytes of the file hold none of the person's values."""
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, Rules(traits=("email",)))
        for number in range(150):
            email = f"secret{number}@example.com"
            recognizer.process(
                [
                    make_event(f"a{number}", START + number, f"d{number % 7}"),
                    make_event(
                        f"c{number}", START + number + 1, f"d{number % 7}",
                        user_id=f"secret-user-{number}", email=email, traits={"email": email},
                    ),
                ]
            )  # fmt: skip
        leased = graph.lease_updates(10_000, 60)
        graph.acknowledge([delivery.position for delivery in leased])
        graph._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = path.read_bytes()
        for number in range(150):
            recognizer.forget(Identifier("user_id", f"secret-user-{number}"))
        leased = graph.lease_updates(10_000, 60)
        graph.acknowledge([delivery.position for delivery in leased])

    assert before.count(b"secret") > 150
    assert path.read_bytes().count(b"secret") == 0


# Version 1 ------------------------------------------------------------------------------------

#: What release 0.1.0 began with; its timelines and what it had forgotten were named otherwise.
SCHEMA_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE places (
    workspace INTEGER, tables TEXT, id INTEGER NOT NULL, PRIMARY KEY (workspace, tables)
) WITHOUT ROWID;
-- key: the anonymous id, 16 bytes where it is a UUID
CREATE TABLE timelines (
    workspace INTEGER, key, id INTEGER NOT NULL, claimed INTEGER NOT NULL, released INTEGER,
    PRIMARY KEY (workspace, key)
) WITHOUT ROWID;
-- ended: some of its claims were forgotten or released
CREATE TABLE claimed (
    id INTEGER PRIMARY KEY, workspace INTEGER, key, ended INTEGER NOT NULL DEFAULT 0
);
-- until: NULL, or the last moment that a forgotten claim has any effect on
CREATE TABLE claims (
    timeline INTEGER, time INTEGER, message, identifier INTEGER, until INTEGER, soft INTEGER,
    PRIMARY KEY (timeline, time, message)
) WITHOUT ROWID;
CREATE TABLE claimants (
    identifier INTEGER, timeline INTEGER, barred INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (identifier, timeline)
) WITHOUT ROWID;
CREATE TABLE identifiers (
    id INTEGER PRIMARY KEY, workspace INTEGER, type INTEGER, key, seen_as TEXT,
    only_previous INTEGER, time INTEGER, message,
    component INTEGER NOT NULL DEFAULT 0, canonical INTEGER NOT NULL DEFAULT 0,
    UNIQUE (workspace, type, key)
);
CREATE TABLE links (
    component INTEGER, a INTEGER, b INTEGER, alias INTEGER, time INTEGER, message,
    unlinked INTEGER, refused TEXT,
    PRIMARY KEY (component, a, b, alias)
) WITHOUT ROWID;
CREATE TABLE traits (
    identifier INTEGER, trait TEXT, time INTEGER, message, value,
    PRIMARY KEY (identifier, trait)
) WITHOUT ROWID;
CREATE TABLE forgotten (digest BLOB PRIMARY KEY, until INTEGER) WITHOUT ROWID;
-- slot: 3 * place + how it is packed, chunk 0 is the open one
CREATE TABLE refs (
    subject INTEGER, day INTEGER, slot INTEGER, chunk INTEGER, packed BLOB,
    PRIMARY KEY (subject, day, slot, chunk)
) WITHOUT ROWID;
CREATE TABLE outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL,
    leased_until REAL NOT NULL DEFAULT 0, holder TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    dead TEXT
);
"""

#: Tables that version 1 has as well, with the same rows.
SAME_IN_1 = (
    "names", "places", "claimed", "claims", "claimants", "identifiers", "links", "traits", "refs",
)  # fmt: skip

DEVICES = {*(f"d{number}" for number in range(12)), "d-new", str(uuid.UUID(int=5))}


def copy_old_outbox(connection: sqlite3.Connection) -> None:
    """Fill an outbox as versions 1 and 2 had it with the one of the attached file."""
    connection.execute(
        "INSERT INTO outbox SELECT position, body, coalesce(until, 0), holder,"
        " coalesce(attempts, 0), dead FROM new.outbox LEFT JOIN new.deliveries USING (position)"
    )
    connection.execute("DELETE FROM sqlite_sequence")
    connection.execute("INSERT INTO sqlite_sequence SELECT * FROM new.sqlite_sequence")


def write_version_2(path: Path) -> None:
    """Write the graph of a file over it as version 2 would have written it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(
            "ALTER TABLE outbox RENAME TO outbox_3;"
            + SCHEMA_1[SCHEMA_1.index("CREATE TABLE outb") :]
        )
        connection.execute(
            "INSERT INTO outbox SELECT position, body, coalesce(until, 0), holder,"
            " coalesce(attempts, 0), dead FROM outbox_3 LEFT JOIN deliveries USING (position)"
        )
        connection.execute("DELETE FROM sqlite_sequence WHERE name = 'outbox'")
        connection.execute(
            "INSERT INTO sqlite_sequence SELECT 'outbox', seq FROM sqlite_sequence"
            " WHERE name = 'outbox_3'"
        )
        for table in ("outbox_3", "deliveries", "destinations"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("PRAGMA user_version = 2")


def write_version_1(path: Path, forgotten: Mapping[Identifier, int]) -> None:
    """Write the graph of a file, of one workspace, over it as version 1 would have written it."""
    with SqliteGraph(path) as graph:
        salt = graph._connection.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()[0]
        digest = digester(salt, "default")
        ids = {digest("anonymous_id", value): value for value in DEVICES}
    old = path.with_name("old.db")
    with closing(sqlite3.connect(old, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA_1)
        connection.execute("ATTACH ? AS new", (str(path),))
        for table in SAME_IN_1:
            connection.execute(f"INSERT INTO {table} SELECT * FROM new.{table}")
        copy_old_outbox(connection)
        connection.execute(
            "INSERT INTO meta SELECT * FROM new.meta WHERE name IN"
            " ('sequence', 'decision', 'timeline', 'salt') OR name LIKE 'rules %'"
        )
        for key, *rest in connection.execute(
            "SELECT digest, workspace, id, claimed, released FROM new.timelines"
        ).fetchall():
            connection.execute(
                "INSERT INTO timelines (key, workspace, id, claimed, released)"
                " VALUES (?, ?, ?, ?, ?)",
                (pack_id(ids[key]), *rest),
            )
        for (type, value), until in forgotten.items():
            text = f"default\0{type}\0{value}".encode()
            named = hashlib.blake2b(text, key=salt, digest_size=16).digest()
            connection.execute("INSERT INTO forgotten VALUES (?, ?)", (named, until))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
    old.replace(path)


@pytest.fixture
def half_way(path: Path) -> tuple[list[Event], Path]:
    """A file of version 1 in which half of some events are, and one of this version beside it."""
    events = journey_of_many(8, 900)
    uuid_device = [replace(event, anonymous_id=str(uuid.UUID(int=5))) for event in events[:40]]
    events[:40] = uuid_device
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, RULES)
        for batch in cut(events[:600], 50):
            recognizer.process(batch)
        moment = START + 3 * 86_400 * SECOND
        recognizer.forget(Identifier("user_id", "u3"), moment)
        recognizer.unlink(Identifier("anonymous_id", "d5"), Identifier("user_id", "u1"))
        recognizer.release("d4", moment)
        recognizer.release("d-new", moment)
        forgotten = {
            Identifier(*name): until
            for name, until in (
                (("user_id", "u3"), 0),
                *((("email", f"{n}@example.com"), 0) for n in range(6)),
            )
        }
        found = graph._run(Rules(), lambda store: store.forgotten(forgotten))
    kept = path.with_name("kept.db")
    shutil.copy(path, kept)
    write_version_1(path, found)
    assert Identifier("user_id", "u3") in found
    return events, kept


def go_on(path: Path, events: Sequence[Event]) -> tuple[dict[str, object], GraphStats]:
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, RULES)
        for batch in cut(events[600:], 50):
            recognizer.process(batch)
        stats = replace(graph.stats(), bytes=0)
        return final_rows(graph, events), stats


def test_file_of_version_1_goes_on_as_if_it_were_of_this_one(
    half_way: tuple[list[Event], Path], path: Path
) -> None:
    """A file of version 1 is brought to this one when it is opened, and decides the same."""
    events, kept = half_way
    rows, stats = go_on(path, events)
    right, counted = go_on(kept, events)
    with closing(sqlite3.connect(path)) as migrated, closing(sqlite3.connect(kept)) as other:
        schemas = [
            connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
            for connection in (migrated, other)
        ]
        version = migrated.execute("PRAGMA user_version").fetchone()[0]
        sound = migrated.execute("PRAGMA integrity_check").fetchall()

    assert rows == right
    assert stats == counted
    assert (version, sound) == (SCHEMA_VERSION, [("ok",)])
    assert schemas[0] == schemas[1]


def test_outbox_of_version_2_is_taken_over(path: Path) -> None:
    """What waited, was leased or had died under version 2 does so in this one, in its place."""
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, RULES)
        for number in range(4):
            recognizer.process(
                [
                    make_event(f"a{number}", START, f"d{number}"),
                    make_event(f"b{number}", START + SECOND, f"d{number}", user_id=f"u{number}"),
                ]
            )
        first, second, third = graph.lease_updates(3, 600)
        graph.return_updates([second.position], "no such table", dead=True)
        graph.return_updates([third.position], "", dead=False)
        before = graph.stats()
    write_version_2(path)
    with SqliteGraph(path) as graph:
        after, problems = graph.stats(), graph.check()
        dead = graph.dead_updates(10)
        leased = graph.lease_updates(10, 600)
        graph.acknowledge([delivery.position for delivery in (first, *leased)])
        graph.return_updates([second.position], "", dead=False)
        (revived,) = graph.lease_updates(10, 600)
        graph.acknowledge([revived.position])
        recognizer = Recognizer(graph, RULES)
        recognizer.process(
            [make_event("x", START, "d9"), make_event("y", START + SECOND, "d9", user_id="u9")]
        )
        (new,) = graph.lease_updates(10, 600)

    assert problems == []
    assert replace(after, bytes=0) == replace(before, bytes=0)
    assert [(d.position, d.attempts, reason) for d, reason in dead] == [
        (second.position, 1, "no such table")
    ]
    assert [(d.position, d.attempts) for d in leased] == [
        (third.position, 1),
        (third.position + 1, 0),
    ]
    assert revived.position == second.position
    assert new.position == third.position + 2


def test_release_that_knew_version_1_cannot_write_into_a_newer_file(
    half_way: tuple[list[Event], Path], path: Path
) -> None:
    """What a process of before still has open fails, and does not write keys of before."""
    with closing(sqlite3.connect(path, isolation_level=None)) as before:
        before.execute("SELECT key FROM timelines").fetchall()
        SqliteGraph(path).close()
        for statement in (
            "SELECT key, id, claimed, released FROM timelines WHERE workspace = 1 AND key IN ('a')",
            "UPDATE timelines SET claimed = 1 WHERE workspace = 1 AND key = 'a' AND NOT claimed",
        ):
            with pytest.raises(sqlite3.OperationalError, match="no such column: key"):
                before.execute(statement)


def migrate_and_die(path: Path, after: int) -> None:
    """A worker process: opens a file of version 1, and is killed after so many timelines."""
    left = iter(range(after))

    def digest(type: str, value: str) -> bytes:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return hashlib.blake2b(value.encode(), digest_size=12).digest()

    sqlite._digester = lambda salt, workspace: digest  # type: ignore[assignment]
    SqliteGraph(path)


@pytest.mark.parametrize("after", [0, 6, 12])
def test_killed_migration_leaves_version_1(
    half_way: tuple[list[Event], Path], path: Path, after: int
) -> None:
    """A process that is killed while it migrates leaves the file as it was, for the next one."""
    events, kept = half_way
    dying = PROCESSES.Process(target=migrate_and_die, args=(path, after))
    dying.start()
    dying.join(60)
    with closing(sqlite3.connect(path)) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        timelines = connection.execute("SELECT count(key) FROM timelines").fetchone()[0]

    assert dying.exitcode == -signal.SIGKILL
    assert (version, timelines) == (1, 14)
    assert "timelines_1" not in tables
    assert "days" not in tables
    assert go_on(path, events) == go_on(kept, events)


def test_processes_migrate_a_file_once(half_way: tuple[list[Event], Path], path: Path) -> None:
    """Processes that open a file of version 1 at the same moment all go on with the new one."""
    together = PROCESSES.Barrier(4)
    makers = [PROCESSES.Process(target=open_together, args=(path, together)) for _ in range(4)]
    before = 14
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)

    assert [maker.exitcode for maker in makers] == [0] * 4
    with SqliteGraph(path) as graph:
        assert graph.stats().anonymous_ids == before


def test_number_of_somebody_forgotten_is_given_to_nobody_else(path: Path) -> None:
    """The next new identifier does not get the handle of one that was forgotten, nor any other."""

    def handle(graph: SqliteGraph, user: str) -> int:
        name = Identifier("user_id", user)
        known: Known = graph._run(Rules(), lambda store: store.identifiers({name})[name])
        return known.handle

    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph)
        recognizer.process([make_event("a", 1, "d1", user_id="u1")])
        before = handle(graph, "u1")
        recognizer.forget(Identifier("user_id", "u1"))
    with SqliteGraph(path) as graph:
        Recognizer(graph).process([make_event("b", 2, "d2", user_id="u2")])

        assert handle(graph, "u2") > before


# Bytes ----------------------------------------------------------------------------------------


def add(graph: SqliteGraph, references: Sequence[Reference]) -> None:
    graph._run(Rules(workspace="w1"), lambda store: store.add_references(references))


def rows_of(
    graph: SqliteGraph, subjects: Iterable[int], low: int = 0, high: int = END
) -> dict[int, Rows]:
    windows = dict.fromkeys(subjects, (low, high))
    return graph._run(Rules(workspace="w1"), lambda store: store.rows(windows))


MESSAGE_IDS = st.one_of(
    st.uuids().map(str),
    st.uuids().map(lambda u: str(u).upper()),
    st.uuids().map(lambda u: u.hex),
    st.integers(0, 2**20).map(lambda n: str(uuid.UUID(int=n))),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40),
    st.integers(1, 1024).map(lambda n: "ab" * (n // 2) + "c" * (n % 2)),
)
TIMES = st.one_of(
    st.integers(0, 3 * DAY),
    st.integers(0, 3 * 86_400_000).map(lambda n: n * 1000),
    st.sampled_from([0, 1, 999, 1000, DAY - 1, DAY, DAY + 1, 9_223_286_399_999_999]),
)
TABLES = st.sampled_from([("events",), ("tracks", "Signed Up"), ("pages",)])


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(-2, 3), TABLES, MESSAGE_IDS, TIMES), max_size=60),
        min_size=1,
        max_size=4,
    ),
    bounds=st.tuples(TIMES, TIMES),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_references_come_back_as_they_went_in(
    batches: list[list[tuple[int, tuple[str, ...], str, int]]], bounds: tuple[int, int]
) -> None:
    """Packed references come back exactly: by subject, tables and half-open range of times."""
    low, high = min(bounds), max(bounds)
    given: set[tuple[int, tuple[str, ...], str, int]] = set()
    with SqliteGraph(":memory:") as graph:
        for batch in batches:
            # A message has one time: references are by message id.
            fresh = {(s, t, m): time for s, t, m, time in batch if s}
            fresh = {
                key: time
                for key, time in fresh.items()
                if not any(key == (s, t, m) for s, t, m, _ in given)
            }
            given |= {(*key, time) for key, time in fresh.items()}
            add(graph, [Reference(s, t, m, time) for (s, t, m), time in fresh.items()])
        found, inside = (
            {
                (subject, tables, m, time)
                for subject, rows in rows_of(graph, range(-2, 4), *window).items()
                for tables, refs in rows.references.items()
                for m, time in refs.items()
            }
            for window in ((0, END), (low, high))
        )

        assert found == given
        assert inside == {ref for ref in given if low <= ref[3] < high}
        assert graph.stats().references == len(given)


def test_references_with_few_distinct_bytes_are_kept() -> None:
    """Ids and times of few distinct bytes, such as counters at midnight, are all kept."""
    ids = [str(uuid.UUID(int=number)) for number in (1, 2, 256, 257)]
    with SqliteGraph(":memory:") as graph:
        for message_id in ids:
            add(graph, [Reference(1, ("events",), message_id, DAY)])
        found = rows_of(graph, [1])[1].references["events",]

        assert sorted(found) == sorted(ids)


def test_full_chunks_are_sealed(path: Path) -> None:
    """Rows of packed references stay small, one of them is open, and all are read."""
    ids = [str(uuid.UUID(int=random.Random(6).getrandbits(128) + n)) for n in range(2_000)]
    with SqliteGraph(path) as graph:
        for start in range(0, len(ids), 7):
            add(
                graph,
                [
                    Reference(1, ("events",), message_id, START + n * 1_000)
                    for n, message_id in enumerate(ids[start : start + 7], start)
                ],
            )
        found = rows_of(graph, [1])[1].references["events",]
        largest, opened, chunks = graph._connection.execute(
            "SELECT max(length(packed)), sum(chunk = 0), count(*) FROM refs"
        ).fetchone()

        assert found == {m: START + n * 1_000 for n, m in enumerate(ids)}
        assert largest <= 1_000
        assert opened == 1
        assert chunks <= 20 * len(ids) / 200
        assert graph.stats().references == len(ids)


def test_batch_of_a_hot_device_that_comes_again_takes_no_space(path: Path) -> None:
    """References that are there already are not stored a second time, however many there are."""
    batch = [
        make_event(str(uuid.UUID(int=n * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128)), n, "kiosk")
        for n in range(1, 1_001)
    ]
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph)
        recognizer.process(batch)
        before = graph.stats()
        for _ in range(5):
            recognizer.process(batch)

        assert graph.stats() == before


def test_reference_takes_few_bytes(path: Path) -> None:
    """100,000 anonymous events of 5,000 visitors take at most 32 bytes each in the whole file."""
    rng = random.Random(7)
    events = []
    for _ in range(5_000):
        visitor = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        at = START + rng.randrange(3 * 86_400_000) * 1_000
        for _ in range(20):
            at += rng.randrange(60_000) * 1_000
            message_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
            events.append(make_event(message_id, at, visitor))
    events.sort(key=lambda event: event.time)
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph)
        for batch in cut(events, 1_000):
            recognizer.process(batch)
        stats = graph.stats()

    assert (stats.references, stats.anonymous_ids) == (100_000, 5_000)
    assert stats.bytes / stats.references <= 32
    assert path.stat().st_size / stats.references <= 32


def test_without_references_an_anonymous_event_takes_no_bytes(path: Path) -> None:
    """With references switched off, anonymous events leave the file as large as it was."""
    rules = Rules(target_column="stitched_user_id", default=TableRules(references=References.NONE))
    with SqliteGraph(path) as graph:
        recognizer = Recognizer(graph, rules)
        recognizer.process([make_event("first", START, "d")])
        before = graph.stats()
        for start in range(0, 10_000, 1_000):
            recognizer.process(
                [make_event(f"m{start + n}", START + n, f"d{start + n}") for n in range(1_000)]
            )

        assert graph.stats() == before


def test_lookback_may_be_without_end(path: Path) -> None:
    """The longest look-back that a span can hold works under every policy."""
    found = {}
    for policy in Policy:
        rules = Rules(workspace=policy, attribution=AttributionRules(policy=policy, lookback=END))
        with SqliteGraph(path) as graph:
            recognizer = Recognizer(graph, rules)
            recognizer.process([make_event("c", START + DAY, "d1", user_id="u1")])
            owner = recognizer.process([make_event("a", START, "d1")]).owners[0]
            found[policy] = None if owner is None else owner.id

    assert found == dict.fromkeys(Policy, "u1")


def test_writer_waits_for_another_writer(path: Path) -> None:
    """A writer waits, within its timeout, until another one has committed."""
    with (
        SqliteGraph(path, timeout=20) as graph,
        closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.3, other.execute, ["COMMIT"])
        started = time.monotonic()
        release.start()
        done = Recognizer(graph).process([make_event("c", 1, "d1", user_id="u1")])
        waited = time.monotonic() - started
        release.join()

        assert done.claims == 1
        assert waited >= 0.2
