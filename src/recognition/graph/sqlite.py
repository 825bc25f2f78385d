"""
The embedded default: a graph in one SQLite file, shared by the processes of one machine.

Each call is one transaction, begun as a writer (``BEGIN IMMEDIATE``), so that decisions are taken
one after the other whatever the number of processes. The file is in WAL mode: readers never wait.
With ``synchronous=NORMAL`` a killed process loses nothing that was acknowledged; a power cut may
lose the last transactions, whole ones only (https://www.sqlite.org/pragma.html#pragma_synchronous),
which ``synchronous=FULL`` prevents at the price of an fsync per batch.

How it is kept small: an anonymous id is known by its digest and has a short number; the id itself
is kept of claimed devices alone. Message references are packed, one row per device, day and place,
20 bytes a reference where the message id is a UUID and the time has whole milliseconds.
"""

from __future__ import annotations

import os
import secrets
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Self, TypeVar

from recognition.attribution import DAY, END, Claim
from recognition.errors import (
    ConfigurationError,
    GraphError,
    GraphReadOnlyError,
    GraphSchemaError,
    GraphUnavailableError,
    InputError,
    RecognitionError,
)
from recognition.events import Identifier
from recognition.graph import (
    Backlog,
    Delivery,
    GraphStats,
    StoredGraph,
    check_destination,
    check_name,
)
from recognition.graph.moving import (
    PART,
    ForgottenRecord,
    GraphRecord,
    IdentifierRecord,
    LinkRecord,
    MovedClaim,
    MovedReference,
    MovedSeen,
    MovedTrait,
    Record,
    RowsRecord,
    TimelineRecord,
    UpdateRecord,
    WorkspaceRecord,
)
from recognition.graph.packing import (
    DIGEST,
    EARLIER_DIGEST,
    TEXT,
    digester,
    earlier_digester,
    pack,
    pack_id,
    unpack,
    unpack_id,
)
from recognition.graph.store import (
    Day,
    Known,
    Reference,
    Rows,
    Sighting,
    Store,
    StoredLink,
    Timeline,
    Trait,
)
from recognition.identity import ANONYMOUS, Seen
from recognition.messages import Messages, UpdateByCriteria, parse_update
from recognition.rules import Rules

# "RECG": says that a file is ours (https://www.sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x52454347
SCHEMA_VERSION = 3

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS places (
    workspace INTEGER, tables TEXT, id INTEGER NOT NULL, PRIMARY KEY (workspace, tables)
) WITHOUT ROWID;
-- digest: of the anonymous id, in its workspace
CREATE TABLE IF NOT EXISTS timelines (
    digest BLOB PRIMARY KEY, workspace INTEGER NOT NULL, id INTEGER NOT NULL,
    claimed INTEGER NOT NULL, released INTEGER
) WITHOUT ROWID;
-- key: the anonymous id, 16 bytes where it is a UUID
-- ended: some of its claims were forgotten or released
CREATE TABLE IF NOT EXISTS claimed (
    id INTEGER PRIMARY KEY, workspace INTEGER, key, ended INTEGER NOT NULL DEFAULT 0
);
-- until: NULL, or the last moment that a forgotten claim has any effect on
CREATE TABLE IF NOT EXISTS claims (
    timeline INTEGER, time INTEGER, message, identifier INTEGER, until INTEGER, soft INTEGER,
    PRIMARY KEY (timeline, time, message)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claimants (
    identifier INTEGER, timeline INTEGER, barred INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (identifier, timeline)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS identifiers (
    id INTEGER PRIMARY KEY, workspace INTEGER, type INTEGER, key, seen_as TEXT,
    only_previous INTEGER, time INTEGER, message,
    component INTEGER NOT NULL DEFAULT 0, canonical INTEGER NOT NULL DEFAULT 0,
    UNIQUE (workspace, type, key)
);
CREATE TABLE IF NOT EXISTS links (
    component INTEGER, a INTEGER, b INTEGER, alias INTEGER, time INTEGER, message,
    unlinked INTEGER, refused TEXT,
    PRIMARY KEY (component, a, b, alias)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traits (
    identifier INTEGER, trait TEXT, time INTEGER, message, value,
    PRIMARY KEY (identifier, trait)
) WITHOUT ROWID;
-- forgotten_1 of meta: how many of them schema version 1 has named, by 16 bytes
CREATE TABLE IF NOT EXISTS forgotten (digest BLOB PRIMARY KEY, until INTEGER) WITHOUT ROWID;
-- slot: 3 * place + how it is packed, chunk 0 is the open one
CREATE TABLE IF NOT EXISTS refs (
    subject INTEGER, day INTEGER, slot INTEGER, chunk INTEGER, packed BLOB,
    PRIMARY KEY (subject, day, slot, chunk)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS days (
    subject INTEGER, day INTEGER, place INTEGER, PRIMARY KEY (subject, day, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS outbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL
);
-- name: empty for whoever names none, for as long as no other is there
-- given: the last position that it ever got (writers take turns, so none below it comes later)
CREATE TABLE IF NOT EXISTS destinations (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, given INTEGER NOT NULL,
    filled INTEGER NOT NULL
);
-- what a destination was given and has not done
CREATE TABLE IF NOT EXISTS deliveries (
    destination INTEGER, position INTEGER, until REAL NOT NULL, holder TEXT,
    attempts INTEGER NOT NULL, applied INTEGER NOT NULL DEFAULT 0, dead TEXT,
    PRIMARY KEY (destination, position)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deliveries_until ON deliveries (destination, until) WHERE dead IS NULL;
"""

# A row of a WITHOUT ROWID table spills to overflow pages above about a quarter of a page
# (https://www.sqlite.org/fileformat2.html#b_tree_pages): 1,002 bytes of 4,096, key included.
_CHUNK = 900

# Below SQLite's default limit of 32,766 parameters a statement, far enough for any batch.
_PARAMETERS = 10_000


_Result = TypeVar("_Result")


class SqliteGraph(StoredGraph):
    """
    A graph in one file. Safe for several threads and several processes of one machine.

    Args:
        path: The file; it is made where there is none. ``:memory:`` for a test.
        timeout: How long to wait for another writer, in seconds.
        synchronous: ``NORMAL`` or ``FULL``, see the module.

    Raises:
        GraphSchemaError: The file is no graph, or of another version of this library.
        GraphUnavailableError: It cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: float = 30.0, synchronous: str = "NORMAL"
    ) -> None:
        if synchronous not in ("NORMAL", "FULL"):
            raise ConfigurationError("synchronous is NORMAL or FULL")
        self._path = os.fspath(path)
        self._timeout = timeout
        self._synchronous = synchronous
        self._lock = threading.RLock()
        self._names: dict[str, int] = {}
        self._places: dict[tuple[int, str], int] = {}
        self._closed = False
        self._holder = f"{os.getpid()} {socket.gethostname()}"
        folder = Path(self._path).parent
        if self._path != ":memory:" and not folder.is_dir():
            raise GraphUnavailableError(
                f"cannot open the graph: there is no folder {str(folder)!r}. Nothing was written.",
                retryable=False,
            )
        self._connection = self._connect()
        try:
            with _translated():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """``sqlite:///relative/path`` or ``sqlite:////absolute/path``."""
        prefix = "sqlite:///"
        path = url[len(prefix) :]
        if not url.startswith(prefix) or not path:
            raise ConfigurationError(
                "a SQLite graph is sqlite:///path (four slashes for an absolute path)"
            )
        return cls(path, **options)

    def _connect(self) -> sqlite3.Connection:
        with _translated():
            connection = sqlite3.connect(
                self._path,
                timeout=self._timeout,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=512,
            )
            try:
                connection.execute("PRAGMA cache_size = -65536")
                # 16 MB of log before it is folded back: a page that many batches write is copied
                # once then (https://www.sqlite.org/wal.html#performance_considerations).
                connection.execute("PRAGMA wal_autocheckpoint = 4000")
            except BaseException:
                connection.close()
                raise
            return connection

    def _prepare(self) -> None:
        connection = self._connection
        # One look at one moment: another process may be making the graph just now.
        connection.execute("BEGIN")
        tables = self._count("SELECT count(*) FROM sqlite_master")
        application = self._count("PRAGMA application_id")
        version = self._count("PRAGMA user_version")
        connection.execute("COMMIT")
        if application != APPLICATION_ID:
            if tables or application:
                raise GraphSchemaError(
                    "the file is a SQLite database, but no recognition graph; name another file."
                    " Nothing was written."
                )
            self._create()
        elif version in (1, 2):
            self._migrate()
        elif version != SCHEMA_VERSION:
            raise GraphSchemaError(
                f"the graph has schema version {version}, this release needs {SCHEMA_VERSION}."
                " Nothing was written."
            )
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        connection.execute("PRAGMA secure_delete = FAST")

    def _create(self) -> None:
        connection = self._connection
        self._switch_to_wal()
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                _make(connection)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _migrate(self) -> None:
        """Bring an older file to this version, whole or not at all; readers see the old one."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = self._count("PRAGMA user_version")
            if version < SCHEMA_VERSION:  # nobody else has done it meanwhile
                if version == 1:
                    connection.execute("ALTER TABLE timelines RENAME TO timelines_1")
                connection.execute("ALTER TABLE outbox RENAME TO outbox_2")
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                if version == 1:
                    self._migrate_1()
                self._migrate_2()
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _migrate_1(self) -> None:
        """Timelines by the digests of their ids."""
        connection = self._connection
        salt = connection.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()
        names = dict(connection.execute("SELECT id, name FROM names"))

        def digest(workspace: int, key: bytes | str) -> bytes:
            return _digester(salt[0], names[workspace])(ANONYMOUS, unpack_id(key))

        connection.create_function("digest", 2, digest)
        connection.execute(
            "INSERT INTO timelines SELECT digest(workspace, key), workspace, id, claimed,"
            " released FROM timelines_1 ORDER BY 1"
        )
        connection.execute("DROP TABLE timelines_1")
        connection.execute(
            "INSERT INTO meta SELECT 'identifier', coalesce(max(id), 0) FROM identifiers"
            " UNION ALL SELECT 'forgotten_1', count(*) FROM forgotten"
        )

    def _migrate_2(self) -> None:
        """What is done with an update, apart from the update."""
        execute = self._connection.execute
        execute("INSERT INTO outbox SELECT position, body FROM outbox_2")
        # No position of before is given again, also where nothing waits.
        last = execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox_2'").fetchone()
        execute("DELETE FROM sqlite_sequence WHERE name = 'outbox'")
        execute("INSERT INTO sqlite_sequence VALUES ('outbox', ?)", last or (0,))
        _make_destination(self._connection)
        execute(
            "INSERT INTO deliveries (destination, position, until, holder, attempts, dead)"
            " SELECT id, position, leased_until, holder, attempts, outbox_2.dead"
            " FROM outbox_2, destinations"
        )
        execute("UPDATE destinations SET given = (SELECT coalesce(max(position), 0) FROM outbox)")
        execute("DROP TABLE outbox_2")

    def _switch_to_wal(self) -> None:
        """The one step that SQLite does not wait for while another process takes it too."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _check_open(self) -> None:
        if self._closed:
            raise GraphError("the graph is closed")

    @contextmanager
    def _writing(self, *, whole: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._check_open()
            connection = self._connection
            with _translated():
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if whole:
                        _check_whole(connection)
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def _run(self, rules: Rules, work: Callable[[Store], _Result]) -> _Result:
        with self._writing() as connection:
            store = _SqliteStore(connection, rules.workspace, dict(self._names), dict(self._places))
            result = work(store)
            store.flush()
        # Only what was committed is remembered: a short number that was undone may be given again.
        self._names, self._places = store.names, store.places
        return result

    @contextmanager
    def _reader(self, workspace: str) -> Iterator[Store]:
        with self._reading() as connection:
            yield _SqliteStore(connection, workspace, {}, {}, reads_only=True)

    @contextmanager
    def _reading(self, *, whole: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection that sees one moment."""
        self._check_open()
        if self._path == ":memory:":
            with self._lock, _translated():
                if whole:
                    _check_whole(self._connection)
                yield self._connection
            return
        with closing(self._connect()) as connection, _translated():
            connection.execute("BEGIN")
            if whole:
                _check_whole(connection)
            yield connection
            connection.execute("ROLLBACK")

    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        """See `Graph.lease_updates`."""
        with self._writing() as connection:
            number, given = self._destination(connection, destination)
            now = time.time()
            self._end_leases_of_the_dead(connection, now)
            rows = connection.execute(
                "SELECT position, body, attempts, applied FROM (SELECT * FROM deliveries"
                " WHERE destination = ? AND dead IS NULL AND until <= ? ORDER BY position LIMIT ?)"
                " JOIN outbox USING (position) ORDER BY position",
                (number, now, limit),
            ).fetchall()
            new = connection.execute(
                "SELECT position, body, 0, 0 FROM outbox WHERE position > ? ORDER BY position"
                " LIMIT ?",
                (given, limit - len(rows)),
            ).fetchall()
            connection.executemany(
                "INSERT INTO deliveries (destination, position, until, holder, attempts)"
                " VALUES (?, ?, ?, ?, 1) ON CONFLICT DO UPDATE SET until = excluded.until,"
                " holder = excluded.holder, attempts = attempts + 1",
                [(number, row[0], now + seconds, self._holder) for row in (*rows, *new)],
            )
            if new:
                connection.execute(
                    "UPDATE destinations SET given = ? WHERE id = ?", (new[-1][0], number)
                )
        return [Delivery(p, parse_update(body), n, bool(a)) for p, body, n, a in (*rows, *new)]

    def _destination(self, connection: sqlite3.Connection, name: str) -> tuple[int, int]:
        """The number of a destination, and the last position that it got."""
        found = {
            row[0]: row[1:]
            for row in connection.execute("SELECT name, id, given FROM destinations")
        }
        check_destination(name, found.keys() - {""})
        number, given = found[name]
        return number, given

    def _end_leases_of_the_dead(self, connection: sqlite3.Connection, now: float) -> None:
        """A process of this machine that is gone holds nothing, however long its lease."""
        for (holder,) in connection.execute(
            "SELECT DISTINCT holder FROM deliveries WHERE until > ? AND holder IS NOT NULL", (now,)
        ).fetchall():
            if _is_gone(holder):
                connection.execute("UPDATE deliveries SET until = 0 WHERE holder = ?", (holder,))

    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        """See `Graph.acknowledge`."""
        with self._writing() as connection:
            connection.executemany(
                "DELETE FROM deliveries WHERE position = ?"
                " AND destination = (SELECT id FROM destinations WHERE name = ?)",
                [(position, destination) for position in positions],
            )
            connection.executemany(
                f"DELETE FROM outbox WHERE position = ? AND {_DONE}",
                [(position,) for position in positions],
            )

    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        """See `Graph.hold_updates`."""
        until = time.time() + seconds
        # What is held because it was applied is nobody's lease, and waits longer than its process.
        holder = None if applied else self._holder
        with self._writing() as connection:
            connection.executemany(
                "UPDATE deliveries SET until = ?, holder = ?, applied = max(applied, ?)"
                " WHERE dead IS NULL AND position = ?"
                " AND destination = (SELECT id FROM destinations WHERE name = ?)",
                [(until, holder, applied, position, destination) for position in positions],
            )

    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        """See `Graph.return_updates`."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE deliveries SET until = 0, dead = ? WHERE position = ?"
                " AND destination = (SELECT id FROM destinations WHERE name = ?)",
                [(reason if dead else None, position, destination) for position in positions],
            )

    def dead_updates(self, limit: int, destination: str = "") -> list[tuple[Delivery, str]]:
        """See `Graph.dead_updates`."""
        with self._lock, _translated():
            _check_whole(self._connection)
            rows = self._connection.execute(
                "SELECT position, body, attempts, applied, dead FROM deliveries"
                " JOIN outbox USING (position) WHERE dead IS NOT NULL"
                " AND destination = (SELECT id FROM destinations WHERE name = ?)"
                " ORDER BY position LIMIT ?",
                (destination, limit),
            ).fetchall()
        return [
            (Delivery(p, parse_update(body), n, bool(applied)), reason)
            for p, body, n, applied, reason in rows
        ]

    def destinations(self) -> dict[str, bool]:
        """See `Graph.destinations`."""
        with self._lock, _translated():
            _check_whole(self._connection)
            rows = self._connection.execute("SELECT name, filled FROM destinations WHERE name > ''")
            return {name: bool(filled) for name, filled in rows}

    def add_destination(self, name: str, *, filled: bool = False) -> None:
        """See `Graph.add_destination`."""
        check_name(name)
        with self._writing() as connection:
            connection.execute(
                "DELETE FROM deliveries WHERE destination ="
                " (SELECT id FROM destinations WHERE name = '')"
            )
            connection.execute("DELETE FROM destinations WHERE name = ''")
            connection.execute(
                "INSERT INTO destinations (name, given, filled) VALUES (?, 0, ?)"
                " ON CONFLICT DO UPDATE SET filled = max(filled, excluded.filled)",
                (name, filled),
            )

    def drop_destination(self, name: str) -> None:
        """See `Graph.drop_destination`."""
        check_name(name)
        with self._writing() as connection:
            connection.execute(
                "DELETE FROM deliveries WHERE destination ="
                " (SELECT id FROM destinations WHERE name = ?)",
                (name,),
            )
            connection.execute("DELETE FROM destinations WHERE name = ?", (name,))
            _make_destination(connection)
            connection.execute(f"DELETE FROM outbox WHERE {_DONE}")

    def backlog(self, destination: str = "") -> Backlog:
        """See `Graph.backlog`."""
        with self._reading() as connection:
            number, given = self._destination(connection, destination)
            counts = connection.execute(
                "SELECT count(*) FILTER (WHERE dead IS NULL AND NOT applied),"
                " count(*) FILTER (WHERE dead IS NULL AND applied),"
                " count(*) FILTER (WHERE dead IS NOT NULL),"
                " min(position) FILTER (WHERE dead IS NULL AND NOT applied)"
                " FROM deliveries WHERE destination = ?",
                (number,),
            ).fetchone()
            new, first = connection.execute(
                "SELECT count(*), min(position) FROM outbox WHERE position > ?", (given,)
            ).fetchone()
            oldest = connection.execute(
                "SELECT body FROM outbox WHERE position = ?", (counts[3] or first,)
            ).fetchone()
        return Backlog(
            waiting=counts[0] + new,
            held=counts[1],
            dead=counts[2],
            oldest=None if oldest is None else parse_update(oldest[0]).created_at,
        )

    def stats(self) -> GraphStats:
        """See `Graph.stats`."""
        with self._lock, _translated():
            _check_whole(self._connection)
            count = self._count
            references = count(
                "SELECT coalesce(sum(length(packed) / iif(slot % 3 = 0, 20, 21)), 0)"
                " FROM refs WHERE slot % 3 < 2"
            )
            for (packed,) in self._connection.execute("SELECT packed FROM refs WHERE slot % 3 = 2"):
                references += sum(1 for _ in unpack(TEXT, packed, 0))
            return GraphStats(
                anonymous_ids=count("SELECT count(*) FROM timelines"),
                identifiers=count("SELECT count(*) FROM identifiers"),
                persons=count(
                    "SELECT count(DISTINCT iif(canonical, canonical, id)) FROM identifiers"
                ),
                claims=count("SELECT count(*) FROM claims"),
                links=count("SELECT count(*) FROM links WHERE refused = ''"),
                conflicts=count("SELECT count(*) FROM links WHERE refused IN ('unique', 'limit')"),
                references=references,
                pending_updates=count(f"SELECT count(*) FROM outbox WHERE {_PENDING}"),
                dead_updates=count("SELECT count(*) FROM deliveries WHERE dead IS NOT NULL"),
                bytes=self._size(),
            )

    def _count(self, statement: str) -> int:
        found: int = self._connection.execute(statement).fetchone()[0]
        return found

    def expire(self, before: int) -> int:
        """See `Graph.expire`."""
        with self._writing() as connection:
            day = before // DAY
            days: int = connection.execute(
                "SELECT count(*) FROM (SELECT day FROM refs WHERE day < ?1"
                " UNION SELECT day FROM days WHERE day < ?1)",
                (day,),
            ).fetchone()[0]
            if days:
                connection.execute("DELETE FROM refs WHERE day < ?", (day,))
                connection.execute("DELETE FROM days WHERE day < ?", (day,))
        return days

    def export(self) -> Iterator[Record]:
        """See `Graph.export`."""
        with self._reading() as connection:
            yield from _Export(connection).records()

    def take_in(self, records: Iterable[Record], *, restart: bool = False) -> int:
        """See `Graph.take_in`."""
        iterator = iter(records)
        head = next(iterator, None)
        if not isinstance(head, GraphRecord):
            raise InputError("an exported graph begins with its GraphRecord. Nothing was written.")
        taking = _TakingIn(head)
        with self._writing(whole=False) as connection:
            taking.begin(connection, restart=restart)
        count = 1
        try:
            for part in _parts(iterator):
                with self._writing(whole=False) as connection:
                    taking.write(connection, part)
                count += len(part)
            with self._writing(whole=False) as connection:
                taking.finish(connection)
        except RecognitionError as exc:
            exc.written = True
            exc.add_note("What was taken in so far is of no use: import again, with --restart.")
            raise
        return count

    def check(self) -> list[str]:
        """See `Graph.check`."""
        try:
            with self._reading(whole=False) as connection:
                return list(_problems(connection))
        except GraphError as exc:
            if isinstance(exc.__cause__, sqlite3.DatabaseError) and not exc.retryable:
                return [f"SQLite cannot read it: {exc.__cause__}"]
            raise

    def compact(self) -> int:
        """See `Graph.compact`. Needs as much free space as the file has, for as long as it runs."""
        with self._writing() as connection:
            before = self._size()
            connection.execute(
                "DELETE FROM timelines WHERE NOT claimed AND released IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM refs WHERE subject = timelines.id)"
                " AND NOT EXISTS (SELECT 1 FROM days WHERE subject = timelines.id)"
                " AND id NOT IN (SELECT timeline FROM claimants WHERE barred)"
            )
        with self._lock, _translated():
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return max(0, before - self._size())

    def _size(self) -> int:
        return self._count("PRAGMA page_count") * self._count("PRAGMA page_size")

    def close(self) -> None:
        """See `Graph.close`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._connection.close()


class _SqliteStore:
    """One transaction on one connection."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        workspace: str,
        names: dict[str, int],
        places: dict[tuple[int, str], int],
        *,
        reads_only: bool = False,
    ) -> None:
        self._connection = connection
        self._reads_only = reads_only
        self.names = names
        self.places = places
        self._meta: dict[str, Any] = {}
        self._dirty: set[str] = set()
        self._workspace_name = workspace
        self._digest = _digester(self._get("salt"), workspace)
        self._keys: dict[str, bytes] = {}
        self._workspace = self._name(workspace)
        self._place_names: dict[int, tuple[str, ...]] = {}
        self._place_ids: dict[tuple[str, ...], int] = {}

    def flush(self) -> None:
        self._connection.executemany(
            "UPDATE meta SET value = ? WHERE name = ?",
            [(self._meta[name], name) for name in sorted(self._dirty)],
        )

    def _name(self, name: str) -> int:
        """A short number for a workspace or a type; 0 where a reader finds none."""
        if name not in self.names:
            row = self._connection.execute(
                "SELECT id FROM names WHERE name = ?", (name,)
            ).fetchone()
            if row is not None:
                self.names[name] = row[0]
            elif self._reads_only:
                return 0
            else:
                cursor = self._connection.execute("INSERT INTO names (name) VALUES (?)", (name,))
                self.names[name] = int(cursor.lastrowid or 0)
        return self.names[name]

    def _get(self, name: str) -> Any:
        if name not in self._meta:
            row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,))
            self._meta[name] = row.fetchone()[0]
        return self._meta[name]

    def _set(self, name: str, value: int) -> None:
        self._meta[name] = value
        self._dirty.add(name)

    def _select_in(
        self, statement: str, before: Sequence[Any], values: Iterable[Any]
    ) -> Iterator[tuple[Any, ...]]:
        """Run a statement that ends in ``IN (..)`` over all values, in as few rounds as may be."""
        wanted = list(values)
        for start in range(0, len(wanted), _PARAMETERS):
            part = wanted[start : start + _PARAMETERS]
            marks = ",".join("?" * len(part))
            yield from self._connection.execute(statement.format(marks), (*before, *part))

    def decided_with(self, rules: str) -> str:
        row = self._connection.execute(
            "SELECT value FROM meta WHERE name = ?", (f"rules {self._workspace_name}",)
        ).fetchone()
        if row is not None:
            return str(row[0])
        if not self._reads_only:
            self._connection.execute(
                "INSERT INTO meta VALUES (?, ?)", (f"rules {self._workspace_name}", rules)
            )
        return rules

    # ---------------------------------------------------------------- timelines

    def _key(self, anonymous_id: str) -> bytes:
        key = self._keys.get(anonymous_id)
        if key is None:
            key = self._keys[anonymous_id] = self._digest(ANONYMOUS, anonymous_id)
        return key

    def timelines(self, anonymous_ids: Collection[str]) -> dict[str, Timeline]:
        values = {self._key(value): value for value in anonymous_ids}
        return {
            values[key]: Timeline(handle, bool(claimed), -1 if released is None else released)
            for key, handle, claimed, released in self._select_in(
                "SELECT digest, id, claimed, released FROM timelines WHERE digest IN ({})",
                (),
                values,
            )
        }

    def add_timelines(self, anonymous_ids: Collection[str]) -> dict[str, int]:
        made = self._make_timelines([self._key(value) for value in anonymous_ids])
        return {value: made[self._key(value)] for value in anonymous_ids}

    def _make_timelines(self, digests: Collection[bytes]) -> dict[bytes, int]:
        last = self._get("timeline")
        made = {digest: last + n for n, digest in enumerate(digests, start=1)}
        self._set("timeline", last + len(made))
        self._connection.executemany(
            "INSERT INTO timelines VALUES (?, ?, ?, 0, NULL)",
            sorted((digest, self._workspace, handle) for digest, handle in made.items()),
        )
        return made

    def handles_of(self, digests: Collection[bytes]) -> dict[bytes, int]:
        """The timelines of these digests; those that are missing are made."""
        found: dict[bytes, int] = dict(
            self._select_in("SELECT digest, id FROM timelines WHERE digest IN ({})", (), digests)
        )
        return {**found, **self._make_timelines(sorted(digests - found.keys()))}

    def anonymous_ids(self, timelines: Collection[int]) -> dict[int, str]:
        return {
            handle: unpack_id(key)
            for handle, key in self._select_in(
                "SELECT id, key FROM claimed WHERE id IN ({})", (), timelines
            )
        }

    def claims(
        self, windows: Mapping[int, tuple[int, int]], *, first: bool = False
    ) -> dict[int, list[Claim]]:
        ended = {
            timeline
            for (timeline,) in self._select_in(
                "SELECT id FROM claimed WHERE ended AND id IN ({})", (), windows
            )
        }
        found: dict[int, list[Claim]] = {}
        execute = self._connection.execute
        window = _WINDOW_AND_FIRST if first else _WINDOW
        for timeline, (low, high) in windows.items():
            if timeline in ended or (low <= 0 and high >= END):
                rows = execute(
                    "SELECT time, message, identifier, until, soft FROM claims WHERE timeline = ?",
                    (timeline,),
                )
            else:
                rows = execute(window, (timeline, low, high))
            claims = sorted({_claim(row) for row in rows})
            if claims:
                found[timeline] = claims
        return found

    def add_claims(self, claims: Mapping[str, tuple[int, Collection[Claim]]]) -> None:
        rows = [
            (timeline, *_claim_row(claim)) for timeline, new in claims.values() for claim in new
        ]
        self._connection.executemany("INSERT OR IGNORE INTO claims VALUES (?, ?, ?, ?, ?, ?)", rows)
        self._connection.executemany(
            "INSERT OR IGNORE INTO claimants (identifier, timeline) VALUES (?, ?)",
            {
                (claim.owner, timeline)
                for timeline, new in claims.values()
                for claim in new
                if claim.owner is not None
            },
        )
        self._connection.executemany(
            "INSERT OR IGNORE INTO claimed (id, workspace, key) VALUES (?, ?, ?)",
            [(handle, self._workspace, pack_id(value)) for value, (handle, _) in claims.items()],
        )
        self._connection.executemany(
            "UPDATE timelines SET claimed = 1 WHERE digest = ? AND NOT claimed",
            [(self._key(value),) for value in claims],
        )
        for timeline, new in claims.values():
            if any(claim.until < END for claim in new):
                self._mark_ended(timeline)

    def _mark_ended(self, timeline: int) -> None:
        self._connection.execute("UPDATE claimed SET ended = 1 WHERE id = ?", (timeline,))

    def replace_claims(
        self, timeline: int, gone: Collection[Claim], new: Collection[Claim]
    ) -> None:
        self._connection.executemany(
            "DELETE FROM claims WHERE timeline = ? AND time = ? AND message = ?",
            [(timeline, claim.time, pack_id(claim.message_id)) for claim in gone],
        )
        self._connection.executemany(
            "INSERT INTO claims VALUES (?, ?, ?, ?, ?, ?)",
            [(timeline, *_claim_row(claim)) for claim in new],
        )
        if any(claim.until < END for claim in new):
            self._mark_ended(timeline)

    def soft_claims(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, list[Claim]]:
        return {
            timeline: sorted(
                _claim(row)
                for row in self._connection.execute(
                    "SELECT time, message, identifier, until, soft FROM claims"
                    " WHERE timeline = ? AND time BETWEEN ? AND ? AND soft",
                    (timeline, low, high),
                )
            )
            for timeline, (low, high) in windows.items()
        }

    def claimed_by(self, identifiers: Collection[int]) -> set[int]:
        return {
            timeline
            for (timeline,) in self._select_in(
                "SELECT timeline FROM claimants AS c WHERE (NOT barred OR EXISTS"
                " (SELECT 1 FROM claims WHERE claims.timeline = c.timeline"
                " AND claims.identifier = c.identifier)) AND identifier IN ({})",
                (),
                identifiers,
            )
        }

    def barred(self, pairs: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        wanted = set(pairs)
        return {
            pair
            for pair in self._select_in(
                "SELECT timeline, identifier FROM claimants WHERE barred AND identifier IN ({})",
                (),
                {identifier for _, identifier in wanted},
            )
            if pair in wanted
        }

    def bar(self, timeline: int, identifier: int) -> None:
        self._connection.execute(
            "INSERT INTO claimants VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET barred = 1",
            (identifier, timeline),
        )

    def release(self, anonymous_id: str, until: int) -> None:
        self.release_until(self._key(anonymous_id), until)

    def release_until(self, digest: bytes, until: int) -> None:
        """As `release`, by the digest."""
        self._connection.execute(
            "UPDATE timelines SET released = max(?, coalesce(released, -1)) WHERE digest = ?",
            (until, digest),
        )

    # ---------------------------------------------------------------- identifiers

    def identifiers(self, identifiers: Collection[Identifier]) -> dict[Identifier, Known]:
        by_type: dict[str, dict[bytes | str, Identifier]] = {}
        for identifier in identifiers:
            by_type.setdefault(identifier.type, {})[pack_id(identifier.value)] = identifier
        return {
            packed[key]: _known(row)
            for type, packed in by_type.items()
            for key, *row in self._select_in(
                "SELECT key, id, only_previous, time, message, component, canonical"
                " FROM identifiers WHERE workspace = ? AND type = ? AND key IN ({})",
                (self._workspace, self._name(type)),
                packed,
            )
        }

    def held(self, handles: Collection[int]) -> dict[int, tuple[Identifier, Known]]:
        return {
            row[0]: (Identifier(type, unpack_id(key)), _known(row))
            for type, key, *row in self._select_in(
                "SELECT n.name, i.key, i.id, i.only_previous, i.time, i.message, i.component,"
                " i.canonical FROM identifiers i JOIN names n ON n.id = i.type"
                " WHERE i.id IN ({})",
                (),
                handles,
            )
        }

    def seen_as(self, identifiers: Collection[int]) -> dict[int, str]:
        return {
            handle: unpack_id(key) if value is None else value
            for handle, key, value in self._select_in(
                "SELECT id, key, seen_as FROM identifiers WHERE id IN ({})", (), identifiers
            )
        }

    def add_identifiers(self, seen: Mapping[Identifier, tuple[Seen, str]]) -> dict[Identifier, int]:
        last = self._get("identifier")
        made = {identifier: last + n for n, identifier in enumerate(seen, start=1)}
        self._set("identifier", last + len(made))
        self.put_identifiers({made[i]: (i, *sighting) for i, sighting in seen.items()})
        return made

    def put_identifiers(self, identifiers: Mapping[int, tuple[Identifier, Seen, str]]) -> None:
        """Insert identifiers whose handles are known already."""
        self._connection.executemany(
            "INSERT INTO identifiers (id, workspace, type, key, seen_as, only_previous, time,"
            " message) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    handle,
                    self._workspace,
                    self._name(identifier.type),
                    pack_id(identifier.value),
                    None if value == identifier.value else value,
                    sighting.only_previous,
                    sighting.time,
                    pack_id(sighting.message_id),
                )
                for handle, (identifier, sighting, value) in identifiers.items()
            ],
        )

    def ids_of(self, names: Collection[bytes], *, make: bool = True) -> dict[bytes, int]:
        """The numbers by which an import knows digests and components; ``make``: or will."""
        found = dict(
            self._select_in("SELECT name, id FROM taking_in WHERE name IN ({})", (), names)
        )
        new = sorted(name for name in names if make and name not in found)
        last = self._get("identifier")
        made = {name: last + n for n, name in enumerate(new, start=1)}
        self._set("identifier", last + len(made))
        self._connection.executemany("INSERT INTO taking_in VALUES (?, ?)", made.items())
        return {**found, **made}

    def see(self, seen: Mapping[int, tuple[Seen, str]]) -> None:
        self._connection.executemany(
            "UPDATE identifiers SET only_previous = ?, time = ?, message = ?, seen_as = ?"
            " WHERE id = ?",
            [
                (s.only_previous, s.time, pack_id(s.message_id), value, handle)
                for handle, (s, value) in seen.items()
            ],
        )

    def set_persons(self, persons: Mapping[int, tuple[int, int]]) -> None:
        self._connection.executemany(
            "UPDATE identifiers SET component = ?, canonical = ? WHERE id = ?",
            [(component, best, handle) for handle, (component, best) in persons.items()],
        )

    def links(self, components: Collection[int]) -> dict[int, list[StoredLink]]:
        found: dict[int, list[StoredLink]] = {}
        for component, a, b, alias, at, message, unlinked, refused in self._select_in(
            "SELECT * FROM links WHERE component IN ({})", (), components
        ):
            found.setdefault(component, []).append(
                StoredLink(a, b, bool(alias), at, unpack_id(message), bool(unlinked), refused)
            )
        return found

    def put_links(
        self, component: int, absorbed: Collection[int], links: Iterable[StoredLink]
    ) -> None:
        self._connection.executemany(
            "UPDATE links SET component = ? WHERE component = ?",
            [(component, other) for other in absorbed],
        )
        self._connection.executemany(
            "INSERT OR REPLACE INTO links VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    component,
                    x.a,
                    x.b,
                    x.alias,
                    x.time,
                    pack_id(x.message_id),
                    x.unlinked,
                    x.refused,
                )
                for x in links
            ],
        )

    def traits(self, identifiers: Collection[int]) -> dict[int, dict[str, Trait]]:
        found: dict[int, dict[str, Trait]] = {}
        for identifier, trait, at, message, kind, value in self._select_in(
            "SELECT identifier, trait, time, message, typeof(value), value FROM traits"
            " WHERE identifier IN ({})",
            (),
            identifiers,
        ):
            kept = _unpack_trait(kind, value)
            found.setdefault(identifier, {})[trait] = Trait(at, unpack_id(message), kept)
        return found

    def put_traits(self, traits: Mapping[int, Mapping[str, Trait]]) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO traits VALUES (?, ?, ?, ?, ?)",
            [
                (identifier, name, t.time, pack_id(t.message_id), _pack_trait(t.value))
                for identifier, found in traits.items()
                for name, t in found.items()
            ],
        )

    def forgotten(self, identifiers: Collection[Identifier]) -> dict[Identifier, int]:
        if self._connection.execute("SELECT 1 FROM forgotten LIMIT 1").fetchone() is None:
            return {}
        digests = {self._digest(*identifier): identifier for identifier in identifiers}
        if self._get("forgotten_1"):
            earlier = earlier_digester(self._get("salt"), self._workspace_name)
            digests.update({earlier(*identifier): identifier for identifier in identifiers})
        found: dict[Identifier, int] = {}
        for digest, until in self._select_in(
            "SELECT digest, until FROM forgotten WHERE digest IN ({})", (), digests
        ):
            identifier = digests[digest]
            found[identifier] = max(until, found.get(identifier, until))
        return found

    def forget(self, identifiers: Mapping[Identifier, int], until: int) -> None:
        handles = [handle for handle in identifiers.values() if handle]
        components = {known.component for _, known in self.held(handles).values()} - {0}
        gone = set(handles)
        links = [
            (component, link.a, link.b)
            for component, found in self.links(components).items()
            for link in found
            if link.a in gone or link.b in gone
        ]
        executemany = self._connection.executemany
        executemany("DELETE FROM links WHERE component = ? AND a = ? AND b = ?", links)
        one = [(handle,) for handle in handles]
        executemany("DELETE FROM identifiers WHERE id = ?", one)
        executemany("DELETE FROM traits WHERE identifier = ?", one)
        executemany("DELETE FROM claimants WHERE identifier = ?", one)
        executemany("DELETE FROM refs WHERE subject = -?", one)
        executemany("DELETE FROM days WHERE subject = -?", one)
        executemany(
            "INSERT INTO forgotten VALUES (?, ?)"
            " ON CONFLICT DO UPDATE SET until = max(until, excluded.until)",
            [(self._digest(*identifier), until) for identifier in identifiers],
        )

    # ---------------------------------------------------------------- references

    def rows(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, Rows]:
        found: dict[int, Rows] = {}
        for subject, (start, end) in windows.items():
            references: dict[tuple[str, ...], dict[str, int]] = {}
            days: dict[tuple[str, ...], set[int]] = {}
            span = (subject, start // DAY, (min(end, END) - 1) // DAY)
            for day, slot, packed in self._connection.execute(
                "SELECT day, slot, packed FROM refs WHERE subject = ? AND day BETWEEN ? AND ?", span
            ):
                for message_id, at in unpack(slot % 3, packed, day * DAY):
                    if start <= at < end:
                        references.setdefault(self._place(slot // 3), {})[message_id] = at
            for day, place in self._connection.execute(
                "SELECT day, place FROM days WHERE subject = ? AND day BETWEEN ? AND ?", span
            ):
                days.setdefault(self._place(place), set()).add(day)
            if references or days:
                found[subject] = Rows(references, days)
        return found

    def add_days(self, days: Iterable[Day]) -> None:
        self._connection.executemany(
            "INSERT OR IGNORE INTO days VALUES (?, ?, ?)",
            [(subject, day, self._place_id(tables)) for subject, tables, day in days],
        )

    def add_references(self, references: Iterable[Reference]) -> None:
        joined: dict[tuple[int, int, int], bytes] = {}
        places = self._place_ids
        # A message may come twice in a batch; what is open already is looked at below.
        for subject, tables, message_id, at in dict.fromkeys(references):
            day, kind, packed = pack(message_id, at)
            place = places[tables] if tables in places else self._place_id(tables)
            key = (subject, day, 3 * place + kind)
            before = joined.get(key)
            if before is None:
                joined[key] = packed
            elif len(before) + len(packed) <= _CHUNK:
                joined[key] = before + packed
            else:
                self._seal(key, before)
                joined[key] = packed
        rows = [(*key, packed) for key, packed in joined.items()]
        # A part of which every row was taken needs no closer look; nearly all are such parts.
        for start in range(0, len(rows), 50):
            part = rows[start : start + 50]
            if self._connection.executemany(_APPEND, part).rowcount < len(part):
                self._start_chunks(part)

    def _start_chunks(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        """Put what the open chunks did not take, because they are full, into new ones."""
        for subject, day, slot, packed in rows:
            open_chunk = self._connection.execute(
                "SELECT packed FROM refs WHERE subject = ? AND day = ? AND slot = ? AND chunk = 0",
                (subject, day, slot),
            ).fetchone()[0]
            # Bytes that look alike prove nothing: they may begin in the middle of a reference.
            held = set(unpack(slot % 3, open_chunk, day * DAY))
            new = [ref for ref in unpack(slot % 3, packed, day * DAY) if ref not in held]
            if not new:
                continue
            rest = b"".join(pack(message_id, at)[2] for message_id, at in new)
            if len(open_chunk) + len(rest) > _CHUNK:
                self._seal((subject, day, slot), open_chunk)
                open_chunk = b""
            self._connection.execute(
                "UPDATE refs SET packed = ? WHERE subject = ? AND day = ? AND slot = ?"
                " AND chunk = 0",
                (open_chunk + rest, subject, day, slot),
            )

    def _seal(self, key: tuple[int, int, int], packed: bytes) -> None:
        self._connection.execute(
            "INSERT INTO refs SELECT ?1, ?2, ?3, 1 + coalesce((SELECT max(chunk) FROM refs"
            " WHERE subject = ?1 AND day = ?2 AND slot = ?3), 0), ?4 WHERE NOT EXISTS (SELECT 1"
            " FROM refs WHERE subject = ?1 AND day = ?2 AND slot = ?3 AND chunk > 0"
            " AND packed = ?4)",
            (*key, packed),
        )

    def find(self, message_id: str) -> list[Sighting]:
        found: list[Sighting] = []
        key = pack_id(message_id)
        needle = key if isinstance(key, bytes) else key.encode()
        for subject, day, slot, packed in self._connection.execute(
            "SELECT subject, day, slot, packed FROM refs WHERE instr(packed, ?) > 0"
            " AND slot / 3 IN (SELECT id FROM places WHERE workspace = ?)",
            (needle, self._workspace),
        ):
            found.extend(
                Sighting(subject, at, self._place(slot // 3))
                for ref, at in unpack(slot % 3, packed, day * DAY)
                if ref == message_id
            )
        found.extend(
            Sighting(timeline, at, ())
            for timeline, at in self._connection.execute(
                "SELECT timeline, time FROM claims WHERE message = ? AND timeline IN"
                " (SELECT id FROM claimed WHERE workspace = ?)",
                (key, self._workspace),
            )
        )
        return found

    def _place_id(self, tables: tuple[str, ...]) -> int:
        if tables in self._place_ids:
            return self._place_ids[tables]
        key = (self._workspace, "\x00".join(tables))
        if key not in self.places:
            row = self._connection.execute(
                "SELECT id FROM places WHERE workspace = ? AND tables = ?", key
            ).fetchone()
            if row is None:
                row = self._connection.execute(
                    "SELECT 1 + coalesce(max(id), 0) FROM places"
                ).fetchone()
                self._connection.execute("INSERT INTO places VALUES (?, ?, ?)", (*key, row[0]))
            self.places[key] = row[0]
        self._place_ids[tables] = self.places[key]
        return self._place_ids[tables]

    def _place(self, place: int) -> tuple[str, ...]:
        if place not in self._place_names:
            self._place_names.update(
                (number, tuple(tables.split("\x00")))
                for number, tables in self._connection.execute("SELECT id, tables FROM places")
            )
        return self._place_names[place]

    def tables(self) -> set[str]:
        rows = self._connection.execute(
            "SELECT tables FROM places WHERE workspace = ?", (self._workspace,)
        )
        return {table for (tables,) in rows for table in tables.split("\x00")}

    def note_tables(self, tables: Iterable[str]) -> None:
        for table in tables:
            self._place_id((table,))

    # ---------------------------------------------------------------- outbox

    def last_sequence(self) -> int:
        sequence: int = self._get("sequence")
        return sequence

    def next_sequence(self) -> int:
        sequence = self.last_sequence() + 1
        self._set("sequence", sequence)
        return sequence

    def page(self, after: int, limit: int, *, known: bool) -> list[int]:
        table = "identifiers" if known else "claimed"
        found = self._connection.execute(
            f"SELECT id FROM {table} WHERE id > ? AND workspace = ? ORDER BY id LIMIT ?",
            (after, self._workspace, limit),
        )
        return [handle for (handle,) in found]

    def lock(self, timelines: Collection[int], identifiers: Collection[int]) -> None:
        pass  # writers take turns

    def versions(self, subjects: Collection[int]) -> dict[int, int]:
        return dict.fromkeys(subjects, self.next_sequence())

    def emit(self, updates: Iterable[UpdateByCriteria]) -> None:
        self._connection.executemany(
            "INSERT INTO outbox (body) VALUES (?)",
            [(update.model_dump_json(),) for update in updates],
        )

    def decision(self) -> int:
        decision: int = self._get("decision")
        return decision

    def decided(self) -> None:
        self._set("decision", self.decision() + 1)


# Every destination got the update, and has nothing left to do about it.
_DONE = """
position <= (SELECT min(given) FROM destinations)
AND NOT EXISTS (SELECT 1 FROM destinations d CROSS JOIN deliveries p
    WHERE p.destination = d.id AND p.position = outbox.position)
"""
_PENDING = """
EXISTS (SELECT 1 FROM destinations d WHERE outbox.position > d.given)
OR EXISTS (SELECT 1 FROM destinations d CROSS JOIN deliveries p
    WHERE p.destination = d.id AND p.position = outbox.position AND p.dead IS NULL)
"""

# Everything at the same instant comes along.
_WINDOW = """
SELECT time, message, identifier, until, soft FROM claims WHERE timeline = ?1 AND time BETWEEN
    coalesce((SELECT max(time) FROM claims WHERE timeline = ?1 AND time < ?2), ?2) AND
    coalesce((SELECT min(time) FROM claims WHERE timeline = ?1 AND time > ?3), ?3)
"""
_WINDOW_AND_FIRST = (
    _WINDOW
    + """
UNION ALL SELECT time, message, identifier, until, soft FROM claims WHERE timeline = ?1
    AND time = (SELECT min(time) FROM claims WHERE timeline = ?1)
"""
)

# What may be there already, or does not fit, is left for a closer look.
_APPEND = f"""
INSERT INTO refs VALUES (?, ?, ?, 0, ?)
ON CONFLICT DO UPDATE SET packed = CAST(packed || excluded.packed AS BLOB)
WHERE length(packed) + length(excluded.packed) <= {_CHUNK} AND instr(packed, excluded.packed) = 0
"""


def _claim(row: Sequence[Any]) -> Claim:
    at, message, identifier, until, soft = row
    return Claim(at, unpack_id(message), identifier, END if until is None else until, bool(soft))


def _claim_row(claim: Claim) -> tuple[Any, ...]:
    until = None if claim.until == END else claim.until
    return claim.time, pack_id(claim.message_id), claim.owner, until, claim.soft


def _known(row: Sequence[Any]) -> Known:
    handle, only_previous, at, message, component, canonical = row
    sighting = Seen(bool(only_previous), at, unpack_id(message))
    return Known(handle, sighting, component, canonical or handle)


def _make(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA.split(";"):
        connection.execute(statement)
    connection.executemany(
        "INSERT INTO meta VALUES (?, ?)",
        [
            ("sequence", 0),
            ("decision", 0),
            ("timeline", 0),
            ("identifier", 0),
            ("forgotten_1", 0),
            ("salt", secrets.token_bytes(32)),
        ],
    )
    _make_destination(connection)


def _make_destination(connection: sqlite3.Connection) -> None:
    """Where no destination is there: the one of whoever names none."""
    connection.execute(
        "INSERT INTO destinations (name, given, filled)"
        " SELECT '', 0, 1 WHERE NOT EXISTS (SELECT 1 FROM destinations)"
    )


def _check_whole(connection: sqlite3.Connection) -> None:
    if connection.execute("SELECT 1 FROM meta WHERE name = 'taking in'").fetchone() is not None:
        raise GraphSchemaError(f"{_UNFINISHED}. Nothing was written.")


_UNFINISHED = (
    "another graph is being imported into this one, or that was begun and not finished; if nobody"
    " is at it, begin again: recognition graph import --restart"
)


def _pack_trait(value: str | int | float | bool) -> str | int | float | bytes:
    # SQLite has no boolean, and 64 bits for an integer.
    if isinstance(value, bool):
        return b"\x01" if value else b"\x00"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value


def _unpack_trait(kind: str, value: Any) -> Any:
    """What was packed; ``kind`` is SQLite's own type of it."""
    return value == b"\x01" if kind == "blob" else value


def _is_gone(holder: str) -> bool:
    """
    Whether the process of a lease is surely dead; one of another machine never is.

    Windows has no way to ask (its ``os.kill`` ends the process): there the lease has to end.
    """
    process, _, host = holder.partition(" ")
    if host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


class _Export:
    """One moment of a graph as records; the connection has a transaction of its own."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self._meta = dict(self._execute("SELECT name, value FROM meta"))
        self._names: dict[int, str] = dict(self._execute("SELECT id, name FROM names"))
        self._places: dict[int, tuple[str, ...]] = {
            place: tuple(tables.split("\x00"))
            for place, tables in self._execute("SELECT id, tables FROM places")
        }

    def records(self) -> Iterator[Record]:
        """All of them, in the order of `recognition.graph.moving`."""
        yield GraphRecord(salt=self._meta["salt"], sequence=self._meta["sequence"])
        yield from self._workspaces()
        yield from self._identifiers()
        yield from self._links()
        for digest, until in self._execute("SELECT digest, until FROM forgotten"):
            yield ForgottenRecord(workspace=None, digest=digest, until=until)
        # Barred pairs are few, and found by identifier only.
        self._execute("DROP TABLE IF EXISTS temp.barred")
        self._execute(
            "CREATE TEMP TABLE barred AS SELECT timeline, identifier FROM claimants WHERE barred"
        )
        self._execute("CREATE INDEX temp.barred_timeline ON barred (timeline)")
        yield from self._timelines()
        self._execute("DROP TABLE temp.barred")
        for digest, workspace, handle in self._execute(
            "SELECT digest, workspace, id FROM timelines"
        ):
            yield from self._rows(workspace, digest, handle)
        for handle, workspace, type, key in self._execute(
            "SELECT id, workspace, type, key FROM identifiers"
            " WHERE -id IN (SELECT subject FROM refs WHERE subject < 0)"
        ):
            yield from self._rows(workspace, self._digest(workspace, type, key), -handle)
        for position, body, attempts, dead in self._execute(
            "SELECT position, body, coalesce(attempts, 0), dead FROM outbox LEFT JOIN deliveries"
            " USING (position) WHERE destination IS NULL OR destination ="
            " (SELECT id FROM destinations WHERE name = '') ORDER BY position"
        ):
            update = parse_update(body)
            yield UpdateRecord(position=position, attempts=attempts, dead=dead, body=update)

    def _digest(self, workspace: int, type: int | None, key: bytes | str) -> bytes:
        name = ANONYMOUS if type is None else self._names[type]
        return _digester(self._meta["salt"], self._names[workspace])(name, unpack_id(key))

    def _component(self, workspace: int, component: int) -> bytes:
        """A name that is nobody's digest: no identifier is without a type."""
        return _digester(self._meta["salt"], self._names[workspace])("", str(component))

    def _workspaces(self) -> Iterator[Record]:
        tables: dict[str, set[str]] = {
            name.removeprefix("rules "): set() for name in self._meta if name.startswith("rules ")
        }
        for table in ("timelines", "identifiers", "places"):
            for (workspace,) in self._execute(f"SELECT DISTINCT workspace FROM {table}"):
                tables.setdefault(self._names[workspace], set())
        for workspace, place in self._execute("SELECT workspace, id FROM places"):
            tables[self._names[workspace]].update(self._places[place])
        for name, found in sorted(tables.items()):
            rules = self._meta.get(f"rules {name}")
            yield WorkspaceRecord(name=name, rules=rules, tables=tuple(sorted(found)))

    def _identifiers(self) -> Iterator[Record]:
        for (
            handle,
            workspace,
            type,
            key,
            seen_as,
            component,
            best_type,
            best_key,
            *seen,
        ) in self._execute(
            "SELECT i.id, i.workspace, i.type, i.key, i.seen_as, i.component, b.type, b.key,"
            " i.only_previous, i.time, i.message FROM identifiers i"
            " LEFT JOIN identifiers b ON b.id = i.canonical"
        ):
            only_previous, at, message = seen
            digest = self._digest(workspace, type, key)
            alone = best_type is None
            yield IdentifierRecord(
                workspace=self._names[workspace],
                digest=digest,
                type=self._names[type],
                value=unpack_id(key),
                seen_as=seen_as,
                seen=MovedSeen(bool(only_previous), at, unpack_id(message)),
                component=self._component(workspace, component) if component else None,
                canonical=digest if alone else self._digest(workspace, best_type, best_key),
                traits={
                    name: MovedTrait(at, unpack_id(message), _unpack_trait(kind, value))
                    for name, at, message, kind, value in self._execute(
                        "SELECT trait, time, message, typeof(value), value FROM traits"
                        " WHERE identifier = ?",
                        (handle,),
                    )
                },
            )

    def _links(self) -> Iterator[Record]:
        for workspace, component, a_type, a_key, b_type, b_key, *link in self._execute(
            "SELECT a.workspace, l.component, a.type, a.key, b.type, b.key, l.alias, l.time,"
            " l.message, l.unlinked, l.refused FROM links l"
            " JOIN identifiers a ON a.id = l.a JOIN identifiers b ON b.id = l.b"
        ):
            alias, at, message, unlinked, refused = link
            yield LinkRecord(
                workspace=self._names[workspace],
                component=self._component(workspace, component),
                a=self._digest(workspace, a_type, a_key),
                b=self._digest(workspace, b_type, b_key),
                alias=bool(alias),
                time=at,
                message_id=unpack_id(message),
                unlinked=bool(unlinked),
                refused=refused,
            )

    def _timelines(self) -> Iterator[Record]:
        for digest, workspace, handle, released, key in self._execute(
            "SELECT t.digest, t.workspace, t.id, t.released, c.key FROM timelines t"
            " LEFT JOIN claimed c ON c.id = t.id WHERE t.claimed OR t.released IS NOT NULL"
            " OR t.id IN (SELECT timeline FROM temp.barred)"
        ):
            barred = self._execute(
                "SELECT i.type, i.key FROM temp.barred b JOIN identifiers i ON i.id = b.identifier"
                " WHERE b.timeline = ?",
                (handle,),
            )
            claims = self._execute(
                "SELECT c.time, c.message, c.until, c.soft, i.type, i.key FROM claims c"
                " LEFT JOIN identifiers i ON i.id = c.identifier WHERE c.timeline = ?",
                (handle,),
            )
            more = True
            while more:
                part, taken = barred.fetchmany(PART), claims.fetchmany(PART)
                yield TimelineRecord(
                    workspace=self._names[workspace],
                    digest=digest,
                    anonymous_id=None if key is None else unpack_id(key),
                    released_until=released,
                    barred=tuple(self._digest(workspace, *found) for found in part),
                    claims=tuple(
                        MovedClaim(
                            time=at,
                            message_id=unpack_id(message),
                            owner=None if owner_type is None
                            else self._digest(workspace, owner_type, owner_key),
                            until=until,
                            soft=bool(soft),
                        )
                        for at, message, until, soft, owner_type, owner_key in taken
                    ),
                )  # fmt: skip
                more = len(part) == PART or len(taken) == PART

    def _rows(self, workspace: int, digest: bytes, subject: int) -> Iterator[Record]:
        references: dict[int, list[MovedReference]] = {}
        days: dict[int, list[int]] = {}
        count = 0

        def told() -> Iterator[Record]:
            for place in sorted({*references, *days}):
                yield RowsRecord(
                    workspace=self._names[workspace],
                    subject=digest,
                    tables=self._places[place],
                    references=tuple(references.get(place, ())),
                    days=tuple(days.get(place, ())),
                )
            references.clear()
            days.clear()

        for day, slot, packed in self._execute(
            "SELECT day, slot, packed FROM refs WHERE subject = ?", (subject,)
        ):
            found = [MovedReference(*one) for one in unpack(slot % 3, packed, day * DAY)]
            if count + len(found) > PART:
                yield from told()
                count = 0
            references.setdefault(slot // 3, []).extend(found)
            count += len(found)
        for day, place in self._execute(
            "SELECT day, place FROM days WHERE subject = ?", (subject,)
        ):
            if count == PART:
                yield from told()
                count = 0
            days.setdefault(place, []).append(day)
            count += 1
        yield from told()


class _TakingIn:
    """
    Fills an empty graph with records, a part in each transaction.

    ``taking_in`` is a table for as long as it lasts: the short numbers of digests that were named,
    and of components (after a ``c``). ``taking in`` of meta says that it is not finished, and who
    is at it.
    """

    def __init__(self, head: GraphRecord) -> None:
        self._head = head
        self._token = secrets.token_bytes(16)
        self._names: dict[str, int] = {}
        self._places: dict[tuple[int, str], int] = {}

    def begin(self, connection: sqlite3.Connection, *, restart: bool) -> None:
        """Take the graph for this purpose, and put the head there."""
        execute = connection.execute
        if execute("SELECT 1 FROM meta WHERE name = 'taking in'").fetchone() is not None:
            if not restart:
                raise ConfigurationError(f"{_UNFINISHED}. Nothing was written.")
            # The numbers of workspaces and types stay: other processes may know them by now.
            execute("DROP TABLE taking_in")
            for table in _tables(connection):
                if table not in ("names", "destinations"):
                    execute(f"DELETE FROM {table}")
            _make(connection)
        filled = [
            table
            for table in _tables(connection)
            if table not in ("meta", "names", "destinations")
            and execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None
        ]
        if filled or execute("SELECT 1 FROM meta WHERE name LIKE 'rules %'").fetchone() is not None:
            raise ConfigurationError(
                "the graph is not empty; a graph is imported into a new one. Nothing was written."
            )
        execute("CREATE TABLE taking_in (name BLOB PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID")
        # No receipt of before may look as if nothing had been decided since, and no position of
        # before may be given again.
        execute("DELETE FROM sqlite_sequence")
        execute("INSERT INTO sqlite_sequence VALUES ('outbox', ?)", (self._head.sequence,))
        execute("UPDATE destinations SET given = 0")
        connection.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)",
            [
                ("salt", self._head.salt),
                ("sequence", self._head.sequence),
                ("decision", secrets.randbits(48)),
                ("taking in", self._token),
            ],
        )

    def write(self, connection: sqlite3.Connection, part: Sequence[Record]) -> None:
        """Take some records in, in their order."""
        self._check_mine(connection)
        names, places = dict(self._names), dict(self._places)
        for (kind, workspace), group in groupby(part, lambda record: (type(record), _home(record))):
            store = _SqliteStore(
                connection, workspace or "", names, places, reads_only=not workspace
            )
            self._write_group(connection, store, kind, list(group))
            store.flush()
        self._names, self._places = names, places

    def _write_group(
        self, connection: sqlite3.Connection, store: _SqliteStore, kind: type[Record], group: Any
    ) -> None:
        if kind is WorkspaceRecord:
            for record in group:
                store.note_tables(record.tables)
                if record.rules is not None:
                    store.decided_with(record.rules)
        elif kind is IdentifierRecord:
            self._write_identifiers(store, group)
        elif kind is LinkRecord:
            names = {name for r in group for name in (r.a, r.b, _COMPONENT + r.component)}
            ids = store.ids_of(names)
            for r in group:
                ends = (ids[r.a], ids[r.b], r.alias, r.time, r.message_id, r.unlinked, r.refused)
                store.put_links(ids[_COMPONENT + r.component], (), [StoredLink(*ends)])
        elif kind is ForgottenRecord:
            connection.executemany(
                "INSERT INTO forgotten VALUES (?, ?)", [(r.digest, r.until) for r in group]
            )
            earlier = sum(len(r.digest) == EARLIER_DIGEST for r in group)
            connection.execute(
                "UPDATE meta SET value = value + ? WHERE name = 'forgotten_1'", (earlier,)
            )
        elif kind is TimelineRecord:
            self._write_timelines(store, group)
        elif kind is RowsRecord:
            self._write_rows(store, group)
        elif kind is UpdateRecord:
            connection.executemany(
                "INSERT INTO outbox VALUES (?, ?)",
                [(r.position, r.body.model_dump_json()) for r in group],
            )
            # To a destination that has a name already, all of it is new.
            connection.executemany(
                "INSERT INTO deliveries (destination, position, until, attempts, dead)"
                " SELECT id, ?, 0, ?, ? FROM destinations WHERE name = ''",
                [(r.position, r.attempts, r.dead) for r in group],
            )
            connection.execute(
                "UPDATE destinations SET given = ? WHERE name = ''", (group[-1].position,)
            )
        else:
            raise InputError(f"a {kind.__name__} has no place here")

    def _write_identifiers(self, store: _SqliteStore, group: Sequence[IdentifierRecord]) -> None:
        names = {name for r in group for name in (r.digest, r.canonical)}
        names |= {_COMPONENT + r.component for r in group if r.component is not None}
        ids = store.ids_of(names)
        store.put_identifiers(
            {
                ids[r.digest]: (Identifier(r.type, r.value), Seen(*r.seen), r.seen_as or r.value)
                for r in group
            }
        )
        store.set_persons(
            {
                ids[r.digest]: (
                    0 if r.component is None else ids[_COMPONENT + r.component],
                    # Nobody's own handle is stored as that of its person: it is 0 until it has one.
                    0 if r.component is None else ids[r.canonical],
                )
                for r in group
            }
        )
        store.put_traits(
            {
                ids[r.digest]: {name: Trait(*trait) for name, trait in r.traits.items()}
                for r in group
                if r.traits
            }
        )

    def _write_timelines(self, store: _SqliteStore, group: Sequence[TimelineRecord]) -> None:
        handles = store.handles_of({r.digest for r in group})
        barred = store.ids_of({name for r in group for name in r.barred}, make=False)
        ids = store.ids_of({c.owner for r in group for c in r.claims if c.owner is not None})
        claims: dict[str, tuple[int, list[Claim]]] = {}
        for r in group:
            if r.released_until is not None:
                store.release_until(r.digest, r.released_until)
            for name in r.barred:
                if name in barred:
                    store.bar(handles[r.digest], barred[name])
            for at, message_id, owner, until, soft in r.claims:
                assert r.anonymous_id is not None
                claims.setdefault(r.anonymous_id, (handles[r.digest], []))[1].append(
                    Claim(
                        at,
                        message_id,
                        None if owner is None else ids[owner],
                        END if until is None else until,
                        soft,
                    )
                )
        store.add_claims(claims)

    def _write_rows(self, store: _SqliteStore, group: Sequence[RowsRecord]) -> None:
        known = {r.subject for r in group if r.subject[-1] & 1}
        subjects = {name: -handle for name, handle in store.ids_of(known).items()}
        subjects.update(store.handles_of({r.subject for r in group} - known))
        store.add_references(
            Reference(subjects[r.subject], r.tables, message_id, at)
            for r in group
            for message_id, at in r.references
        )
        store.add_days(Day(subjects[r.subject], r.tables, day) for r in group for day in r.days)

    def finish(self, connection: sqlite3.Connection) -> None:
        """Make a graph of it that anybody may use."""
        self._check_mine(connection)
        missing = connection.execute(
            "SELECT count(*) FROM taking_in WHERE length(name) = ?"
            " AND id NOT IN (SELECT id FROM identifiers)",
            (DIGEST,),
        ).fetchone()[0]
        if missing:
            raise InputError(f"{missing:,} identifiers are named, and are not among the records")
        connection.execute("DROP TABLE taking_in")
        connection.execute("DELETE FROM meta WHERE name = 'taking in'")

    def _check_mine(self, connection: sqlite3.Connection) -> None:
        row = connection.execute("SELECT value FROM meta WHERE name = 'taking in'").fetchone()
        if row is None or row[0] != self._token:
            raise GraphError("another import into this graph has begun anew, and goes on instead")


_COMPONENT = b"c"

#: Claims, rows and the like that one transaction of an import writes, about.
_IMPORT = 20_000


def _home(record: Record) -> str | None:
    """The workspace that a record is taken into."""
    if isinstance(record, WorkspaceRecord):
        return record.name
    if isinstance(record, GraphRecord | ForgottenRecord | UpdateRecord):
        return None
    return record.workspace


def _parts(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records in lists of bounded size."""
    part: list[Record] = []
    weight = 0
    for record in records:
        part.append(record)
        match record:
            case TimelineRecord():
                weight += len(record.claims) + len(record.barred)
            case RowsRecord():
                weight += len(record.references) + len(record.days)
            case UpdateRecord():
                weight += sum(len(c.refs) for c in record.body.where if isinstance(c, Messages))
        weight += 1
        if weight >= _IMPORT:
            yield part
            part, weight = [], 0
    if part:
        yield part


def _tables(connection: sqlite3.Connection) -> list[str]:
    return [
        name
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
    ]


# What each number in one table names in another.
_NAMED = (
    ("claims", "timeline", "claimed", "id", ""),
    ("claims", "identifier", "identifiers", "id", "identifier IS NOT NULL AND"),
    ("claimants", "identifier", "identifiers", "id", ""),
    ("claimed", "id", "timelines", "id", ""),
    ("identifiers", "canonical", "identifiers", "id", "canonical AND"),
    ("links", "a", "identifiers", "id", ""),
    ("links", "b", "identifiers", "id", ""),
    ("traits", "identifier", "identifiers", "id", ""),
    ("refs", "subject", "timelines", "id", "subject > 0 AND"),
    ("refs", "-subject", "identifiers", "id", "subject < 0 AND"),
    ("refs", "slot / 3", "places", "id", ""),
    ("days", "subject", "timelines", "id", ""),
    ("days", "place", "places", "id", ""),
    ("timelines", "workspace", "names", "id", ""),
    ("identifiers", "workspace", "names", "id", ""),
    ("identifiers", "type", "names", "id", ""),
)


def _problems(connection: sqlite3.Connection) -> Iterator[str]:
    """What is wrong with a file."""
    for (line,) in connection.execute("PRAGMA integrity_check(20)").fetchall():
        if line != "ok":
            yield f"SQLite finds: {line}"
    told = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    with closing(sqlite3.connect(":memory:")) as fresh:
        _make(fresh)
        wanted = dict(fresh.execute(told))
    found = dict(connection.execute(told))
    if connection.execute("SELECT 1 FROM meta WHERE name = 'taking in'").fetchone() is not None:
        yield _UNFINISHED
        return
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name):
            state = "another one" if name in found and name in wanted else "one too many"
            yield f"table {name} is {state if name in found else 'missing'}"
    for table, number, other, key, only in _NAMED:
        if table in found and other in found:
            count = connection.execute(
                f"SELECT count(*) FROM {table} WHERE {only} {number} NOT IN"
                f" (SELECT {key} FROM {other})"
            ).fetchone()[0]
            if count:
                yield f"{count:,} rows of {table} name {other} that are not there"


_digester = lru_cache(maxsize=256)(digester)


@contextmanager
def _translated() -> Iterator[None]:
    """Give the driver's errors their place in our tree."""
    try:
        yield
    except sqlite3.Error as exc:
        name = getattr(exc, "sqlite_errorname", "") or ""
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise GraphUnavailableError(
                "the graph is locked by another writer for longer than its timeout."
                " Nothing was written; a retry may help."
            ) from exc
        if name.startswith("SQLITE_READONLY"):
            raise GraphReadOnlyError(
                "the graph's file, or its folder, may not be written. Nothing was written."
            ) from exc
        if name.startswith("SQLITE_NOTADB"):
            raise GraphSchemaError(
                "the file is no SQLite database; name another file. Nothing was written."
            ) from exc
        if name.startswith("SQLITE_CANTOPEN"):
            raise GraphUnavailableError(
                "the graph's file cannot be opened: does its folder exist, may it be written?"
                " Nothing was written.",
                retryable=False,
            ) from exc
        if name.startswith("SQLITE_FULL"):
            raise GraphUnavailableError("the disk is full. Nothing was written.") from exc
        raise GraphError(
            f"SQLite failed ({name or type(exc).__name__}). Nothing was written."
        ) from exc
