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
from pathlib import Path
from typing import Any, Self, TypeVar

from recognition.attribution import DAY, END, Claim
from recognition.errors import (
    ConfigurationError,
    GraphError,
    GraphReadOnlyError,
    GraphSchemaError,
    GraphUnavailableError,
)
from recognition.events import Identifier
from recognition.graph import Delivery, GraphStats, StoredGraph
from recognition.graph.packing import (
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
from recognition.messages import UpdateByCriteria, parse_update

# "RECG": says that a file is ours (https://www.sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = 0x52454347
SCHEMA_VERSION = 2

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
    position INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL,
    leased_until REAL NOT NULL DEFAULT 0, holder TEXT, attempts INTEGER NOT NULL DEFAULT 0,
    dead TEXT
);
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
        elif version == 1:
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
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise

    def _migrate(self) -> None:
        """Bring a file of version 1 to this one, whole or not at all; readers see the old one."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._count("PRAGMA user_version") == 1:  # nobody else has done it meanwhile
                salt = connection.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()
                names = dict(connection.execute("SELECT id, name FROM names"))

                def digest(workspace: int, key: bytes | str) -> bytes:
                    return _digester(salt[0], names[workspace])(ANONYMOUS, unpack_id(key))

                connection.create_function("digest", 2, digest)
                connection.execute("ALTER TABLE timelines RENAME TO timelines_1")
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(
                    "INSERT INTO timelines SELECT digest(workspace, key), workspace, id, claimed,"
                    " released FROM timelines_1 ORDER BY 1"
                )
                connection.execute("DROP TABLE timelines_1")
                connection.execute(
                    "INSERT INTO meta SELECT 'identifier', coalesce(max(id), 0) FROM identifiers"
                    " UNION ALL SELECT 'forgotten_1', count(*) FROM forgotten"
                )
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

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
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._check_open()
            connection = self._connection
            with _translated():
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def _run(self, workspace: str, work: Callable[[Store], _Result]) -> _Result:
        with self._writing() as connection:
            store = _SqliteStore(connection, workspace, dict(self._names), dict(self._places))
            result = work(store)
            store.flush()
        # Only what was committed is remembered: a short number that was undone may be given again.
        self._names, self._places = store.names, store.places
        return result

    @contextmanager
    def _reader(self, workspace: str) -> Iterator[Store]:
        self._check_open()
        if self._path == ":memory:":
            with self._lock:
                yield _SqliteStore(self._connection, workspace, {}, {}, reads_only=True)
            return
        with closing(self._connect()) as connection, _translated():
            connection.execute("BEGIN")
            yield _SqliteStore(connection, workspace, {}, {}, reads_only=True)
            connection.execute("ROLLBACK")

    def lease_updates(self, limit: int, seconds: float) -> list[Delivery]:
        """See `Graph.lease_updates`."""
        with self._writing() as connection:
            now = time.time()
            self._end_leases_of_the_dead(connection, now)
            rows = connection.execute(
                "SELECT position, body, attempts FROM outbox"
                " WHERE dead IS NULL AND leased_until <= ? ORDER BY position LIMIT ?",
                (now, limit),
            ).fetchall()
            connection.executemany(
                "UPDATE outbox SET leased_until = ?, holder = ?, attempts = attempts + 1"
                " WHERE position = ?",
                [(now + seconds, self._holder, position) for position, _, _ in rows],
            )
        return [Delivery(position, parse_update(body), tries) for position, body, tries in rows]

    def _end_leases_of_the_dead(self, connection: sqlite3.Connection, now: float) -> None:
        """A process of this machine that is gone holds nothing, however long its lease."""
        for (holder,) in connection.execute(
            "SELECT DISTINCT holder FROM outbox WHERE leased_until > ?", (now,)
        ).fetchall():
            if _is_gone(holder):
                connection.execute("UPDATE outbox SET leased_until = 0 WHERE holder = ?", (holder,))

    def acknowledge(self, positions: Collection[int]) -> None:
        """See `Graph.acknowledge`."""
        with self._writing() as connection:
            connection.executemany(
                "DELETE FROM outbox WHERE position = ?", [(position,) for position in positions]
            )

    def return_updates(self, positions: Collection[int], reason: str, *, dead: bool) -> None:
        """See `Graph.return_updates`."""
        with self._writing() as connection:
            connection.executemany(
                "UPDATE outbox SET leased_until = 0, dead = ? WHERE position = ?",
                [(reason if dead else None, position) for position in positions],
            )

    def dead_updates(self, limit: int) -> list[tuple[Delivery, str]]:
        """See `Graph.dead_updates`."""
        with self._lock, _translated():
            rows = self._connection.execute(
                "SELECT position, body, attempts, dead FROM outbox"
                " WHERE dead IS NOT NULL ORDER BY position LIMIT ?",
                (limit,),
            ).fetchall()
        return [(Delivery(p, parse_update(body), n), reason) for p, body, n, reason in rows]

    def stats(self) -> GraphStats:
        """See `Graph.stats`."""
        with self._lock, _translated():
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
                pending_updates=count("SELECT count(*) FROM outbox WHERE dead IS NULL"),
                dead_updates=count("SELECT count(*) FROM outbox WHERE dead IS NOT NULL"),
                bytes=count("PRAGMA page_count") * count("PRAGMA page_size"),
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
        last = self._get("timeline")
        made = {value: last + n for n, value in enumerate(anonymous_ids, start=1)}
        self._set("timeline", last + len(made))
        self._connection.executemany(
            "INSERT INTO timelines VALUES (?, ?, ?, 0, NULL)",
            sorted((self._key(value), self._workspace, handle) for value, handle in made.items()),
        )
        return made

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
                "SELECT timeline FROM claimants WHERE NOT barred AND identifier IN ({})",
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
        self._connection.execute(
            "UPDATE timelines SET released = max(?, coalesce(released, -1)) WHERE digest = ?",
            (until, self._key(anonymous_id)),
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
        self._connection.executemany(
            "INSERT INTO identifiers (id, workspace, type, key, seen_as, only_previous, time,"
            " message) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    made[identifier],
                    self._workspace,
                    self._name(identifier.type),
                    pack_id(identifier.value),
                    None if value == identifier.value else value,
                    sighting.only_previous,
                    sighting.time,
                    pack_id(sighting.message_id),
                )
                for identifier, (sighting, value) in seen.items()
            ],
        )
        return made

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
            kept = value == b"\x01" if kind == "blob" else value
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
        for subject, tables, message_id, at in references:
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


def _pack_trait(value: str | int | float | bool) -> str | int | float | bytes:
    # SQLite has no boolean, and 64 bits for an integer.
    if isinstance(value, bool):
        return b"\x01" if value else b"\x00"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value


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
