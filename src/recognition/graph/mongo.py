"""
MongoDB, for many workers on many machines: a replica set or a sharded cluster, 6.0 or newer.

The protocol. Everybody who writes here keeps these rules, in this order:

1. **Rows first.** Before a batch is decided, what is known of its anonymous rows (`rows_*`, and the
   tables they lie in) is written, on its own and with ``w: majority``. It is insert-only, its keys
   follow from its content, and writing it again changes nothing.
2. **Then read and decide**, in a transaction with a snapshot that begins after rule 1. A batch that
   has no known identifier writes nothing more: it reads by ``majority`` and needs no transaction.
3. **Lock what was read.** A decision writes a new version into every timeline, identifier and
   component of links that it decided about, changed or not. Two decisions that share one are two
   writes to one document: MongoDB lets one of them commit, the other begins again with what the
   first one did. Who has lost twice takes these locks before it reads, so that it is the others
   who begin again. New ones are told apart by their unique ``_id`` in the same way.
4. **Number late.** The sequence of an update is taken after the snapshot is fixed. Of two decisions
   that share a lock the later one began its last attempt after the earlier one had committed, so
   its numbers are greater. (Two that share none are about different rows.)
5. **One commit.** Claims, persons, updates and a *sweep*, the windows of time whose rows have
   changed hands, become durable together, with ``w: majority``.
6. **Look again.** After the commit the rows in those windows are read once more. Those that the
   decision did not see get an update of their own, by the same rules, and the sweep is deleted.
   Whoever finds a sweep that was left behind by a dead worker does it in its stead.

Why no row is lost between a worker A, that takes an anonymous event in, and a worker B, that claims
its device: A writes the row (1) before it reads the claims (2). B commits the claim (5) before it
reads the rows (6). If A did not see the claim, then the claim was not yet durable when A read, so B
read later than A had written, and sees the row. If B did not see the row, A read after B's commit,
and stamps it. A majority write is seen by every majority read that begins after it was
acknowledged, also after another member was elected, which is what the argument needs.

Why no decision is taken on what is not true any more: a decision depends on claims, on persons and
on nothing else. Claims of a timeline change only under its lock; the person of an identifier, and
the set of timelines that it claims, only under the identifier's; links only under their
component's. Hot devices that are merely anonymous take no lock at all.

Collections; a *digest* is a 12-byte name of an anonymous id or a known identifier, in its
workspace, made with the salt of this graph. It is the beginning of every key, and the shard key.

=============  =================================  ===============================================
``subjects``   digest                             a claimed or released anonymous id, or a known
                                                  identifier: first sighting, person, traits
``claims``     timeline, time, message            insert-only but for undo
               identifier, timeline               which timelines an identifier ever claimed
``links``      component, a, b                    with where each was seen, refused ones too
``rows_0*``    subject, day, place, reference     message references and days, 32 days each
``outbox``     sequence                           updates that wait; leases by the server's clock,
                                                  and how far each named destination is
               minus a sequence                   sweeps, for as long as they are not done
``dead``       sequence                           updates that were given up, with the reason
``meta``       text                               schema and salt, sequence, workspaces,
                                                  destinations
=============  =================================  ===============================================

``rows_*`` and ``claims`` are clustered by their key and have no index. They are only read by ranges
of it, joined by ``$unionWith``: a list (``$in``, ``$or``) on a clustered collection is a scan from
its least to its greatest value on MongoDB 6.0, as `explain` shows. All keys of a collection have
the same length, because BSON compares the lengths of binaries first.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import logging
import random
import secrets
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar, cast

import bson
from bson import Int64
from pymongo import (
    DeleteOne,
    MongoClient,
    ReadPreference,
    ReplaceOne,
    UpdateMany,
    UpdateOne,
    uri_parser,
)
from pymongo.client_session import ClientSession
from pymongo.collection import Collection as MongoCollection
from pymongo.database import Database
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConnectionFailure,
    DuplicateKeyError,
    InvalidName,
    InvalidURI,
    OperationFailure,
    PyMongoError,
)
from pymongo.errors import ConfigurationError as DriverConfigurationError
from pymongo.read_concern import ReadConcern
from pymongo.write_concern import WriteConcern

from recognition.attribution import BEGINNING, DAY, END, Claim
from recognition.errors import (
    ConfigurationError,
    GraphError,
    GraphReadOnlyError,
    GraphSchemaError,
    GraphUnavailableError,
)
from recognition.events import Identifier
from recognition.graph import (
    Backlog,
    Delivery,
    GraphStats,
    Observation,
    Outcome,
    Receipt,
    StoredGraph,
    check_destination,
    check_name,
    decisions,
)
from recognition.graph.moving import Record
from recognition.graph.packing import (
    DIGEST,
    TEXT,
    UUID_MS,
    UUID_US,
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
from recognition.rules import Rules

_log = logging.getLogger("recognition.graph.mongo")

_Document = dict[str, Any]
_Result = TypeVar("_Result")

SCHEMA_VERSION = 1

# Days of one rows collection, and how many of them: what is kept for less than 160 days is dropped
# by whole collections. What is kept longer shares them, and is dropped by `compact`.
PERIOD = 32
SLOTS = 6

_ROWS = tuple(f"rows_{slot:02}" for slot in range(SLOTS))
_CLUSTERED = ("claims", *_ROWS)
_PLAIN = ("subjects", "links", "outbox", "dead", "meta")
COLLECTIONS = (*_PLAIN, *_CLUSTERED)

# Bytes of the shard key of collections other than rows.
_KEY_SIZES = {"subjects": DIGEST, "links": DIGEST, "claims": DIGEST + 24}

# Message references of one document, and their bytes, so that none comes near the 16 MB that BSON
# allows.
_CHUNK = 2_000
_CHUNK_BYTES = 2**18

# Windows of one sweep, for the same reason.
_WINDOWS = 50_000

# Parts of one aggregation; MongoDB allows 1,000 stages in it.
_UNION = 500

# Claims at the first and the last instant of a timeline that its own document holds.
_ENDS = 16

# Numbers that one decision takes from the sequence at first; each time after that four times more.
_NUMBERS = 256

# Attempts that a decision loses to others before it locks first and reads afterwards; and the field
# of a subject that this writes.
_PATIENCE = 2
_GRABBED = "l"

_DAY_KIND = 3
_REST = 20  # bytes of a row's key after digest, day and place
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

# How far a destination with a name is with an update: a part of the update's document, absent until
# it is leased first. Who names none has the same fields in the document itself, and `dead` apart.
_PROGRESS = "to"
# Ends of leases that never come: applied, and given up.
_DONE = datetime(9999, 1, 1, tzinfo=UTC)
_DEAD = datetime(9998, 1, 1, tzinfo=UTC)
_DESTINATIONS = "destinations"

_MAJORITY = WriteConcern("majority")


class MongoGraph(StoredGraph):
    """
    A graph in one MongoDB database. Safe for several threads; any number of processes share it.

    Args:
        url: ``mongodb://`` or ``mongodb+srv://``, with the database in its path (``recognition``,
            where it has none) and the driver's options.
        timeout: How long a call goes on trying while no primary can be reached, in seconds.
        grace: After how long the sweep of a worker is taken to be left behind, in seconds since
            this graph saw it first. Doing it twice does no harm.

    Raises:
        GraphUnavailableError: No server was reached; nothing was written.
        GraphSchemaError: The database holds a foreign or another version's schema.
        GraphReadOnlyError: The user may not do what is needed.
        ConfigurationError: The URL is none, its user or password is refused, or the server is too
            old or no replica set.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, grace: float = 10.0) -> None:
        self._timeout = timeout
        self._grace = grace
        self._closed = False
        self._lock = threading.Lock()
        self._workspaces: dict[str, _Workspace] = {}
        self._known_days = _Recent(200_000)
        self._client = _connect(url, timeout)
        try:
            with _translated():
                self._db = _database(self._client, _name_in(url))
                self._is_cluster = _check_server(self._client)
                schema = _prepare(self._db)
                self._salt = bytes(schema["salt"])
                self._has_earlier = bool(schema.get("earlier"))
                self._unfinished = bool(schema.get("taking_in"))
        except BaseException:
            self._client.close()
            raise

    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """``mongodb://host:port/database?replicaSet=name``, as the driver reads it."""
        return cls(url, **options)

    @classmethod
    def initialise(cls, url: str, *, sharded: bool = False, run: bool = True) -> list[str]:
        """
        Make what is missing in the database; the second time it changes nothing.

        Args:
            url: As for the class.
            sharded: Distribute the collections too: the commands are returned, and carried out
                where the URL leads to a sharded cluster (role ``clusterManager``).
            run: ``False``: nothing is made, the commands are returned.

        Returns:
            What was done, or is to be done in mongosh, a line each.
        """
        if run:
            with _connect(url, 30.0) as client, _translated():
                _check_server(client)
                _initialise(_database(client, _name_in(url)))
            with cls(url) as graph:
                lines = [f"database {graph._db.name}: {len(COLLECTIONS)} collections are there"]
                if sharded and graph._is_cluster:
                    lines.append(_shard(graph._client, graph._db.name))
                elif sharded:
                    lines.append("this is no sharded cluster; on one, these are the commands:")
                    lines.extend(map(_as_typed, _sharding(graph._db.name)))
            return lines
        name = _name_in(url)
        return [_as_typed(command) for command in _sharding(name)] if sharded else []

    def export(self) -> Iterator[Record]:
        """See `Graph.export`. The server keeps its moment for five minutes, where nothing else is
        set (``minSnapshotHistoryWindowInSeconds``)."""
        from recognition.graph import mongo_moving

        self._check_open()
        with _translated(), self._client.start_session(snapshot=True) as session:
            yield from mongo_moving.export(self, session)

    def take_in(self, records: Iterable[Record], *, restart: bool = False) -> int:
        """See `Graph.take_in`."""
        from recognition.graph import mongo_moving

        unfinished, self._unfinished = self._unfinished, False
        self._check_open()
        try:
            with _translated():
                return mongo_moving.take_in(self, records, restart=restart)
        except ConfigurationError:  # refused: it is as it was
            self._unfinished = unfinished
            raise
        except BaseException:
            self._unfinished = True
            raise

    def _use_salt(self, salt: bytes) -> None:
        self._salt = salt
        self._workspaces = {}
        self._known_days.clear()

    def _remember_earlier(self) -> None:
        """Somebody was forgotten under an earlier kind of name; see `packing.earlier_digester`."""
        if not self._has_earlier:
            self._db["meta"].update_one({"_id": "schema"}, {"$set": {"earlier": True}})
            self._has_earlier = True

    def check(self) -> list[str]:
        """See `Graph.check`."""
        with _translated():
            found = _differences(self._db)
            left = self._db["outbox"].count_documents({"_id": {"$lt": 0}})
        if left:
            found.append(
                f"{left} decisions wait for their second look; workers that are alive take them"
                f" over after {self._grace:g} s"
            )
        return found

    def compact(self) -> int:
        """See `Graph.compact`: the rows of days that `expire` dropped go."""
        kept = self._patiently(self._kept_days)
        freed = 0
        for name in _ROWS:
            old: list[_Document] = []
            for document in self._db[name].find({}, batch_size=20_000):
                if not _is_kept(document["_id"], kept):
                    old.append(document)
                if len(old) == _CHUNK:
                    freed += self._remove(name, old)
                    old = []
            freed += self._remove(name, old)
        return freed

    def _remove(self, name: str, old: Sequence[_Document]) -> int:
        """Those that are not kept now either: a day is noted before its first row is there."""
        kept = self._patiently(self._kept_days) if old else {}
        gone = [document for document in old if not _is_kept(document["_id"], kept)]
        if gone:
            writes = [DeleteOne({"_id": document["_id"]}) for document in gone]
            self._patiently(lambda: self._db[name].bulk_write(writes, ordered=False))
        return sum(len(bson.encode(document)) for document in gone)

    def _kept_days(self) -> dict[int, set[int]]:
        """The days that have rows, by the number of their place."""
        return {
            place["n"]: set(found.get("days", ()))
            for found in self._db["meta"].find({"places": {"$exists": True}})
            for place in found["places"]
        }

    def close(self) -> None:
        """See `Graph.close`."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._client.close()

    # ---------------------------------------------------------------- decisions

    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        """See `Graph.observe`."""
        self.recover(rules, older_than=self._grace, every=self._grace / 2)
        outcome, late = self._decide(
            rules,
            lambda store: decisions.observe(store, rules, observations, rows_first=True),
            batch=observations,
            light=not any(o.known for o in observations),
        )
        outcome.counts.updates += late
        return outcome

    def recheck(self, rules: Rules, receipt: Receipt) -> int:
        """See `Graph.recheck`."""
        updates, late = self._decide(
            rules, lambda store: decisions.recheck(store, rules, receipt), light=True
        )
        return updates + late

    def _run(self, rules: Rules, work: Callable[[Store], _Result]) -> _Result:
        result, late = self._decide(rules, work)
        return cast(_Result, result + late) if isinstance(result, int) else result

    def recover(self, rules: Rules, *, older_than: float = 0.0, every: float = 0.0) -> int:
        """
        Do the sweeps (rule 6) that dead workers left behind in the workspace of the rules.

        `observe` does so by itself.

        Args:
            rules: How the workspace is decided.
            older_than: Only those that were there so many seconds ago, when this graph looked.
            every: Not again within so many seconds of the last time.

        Returns:
            The number of updates emitted.
        """
        now = time.monotonic()
        workspace = self._workspace(rules.workspace)
        with self._lock:
            if every and now < workspace.next_look:
                return 0
            workspace.next_look = now + every
        chosen = {"_id": {"$lt": 0}, "w": rules.workspace}
        emitted = 0
        with self._client.start_session(causal_consistency=True) as session:
            # Also days that another worker has dropped: their rows are noted again if they come.
            self._patiently(lambda: self._refresh(workspace, session))
            found = self._patiently(lambda: list(self._db["outbox"].find(chosen, session=session)))
            workspace.sweeps = {d["_id"]: workspace.sweeps.get(d["_id"], now) for d in found}
            for document in found:
                if now - workspace.sweeps[document["_id"]] >= older_than:
                    windows = {
                        _handle(key): (start, end) for key, start, end in document["windows"]
                    }
                    sweep = _Sweep([document["_id"]], windows, (), {}, set())
                    emitted += self._sweep(workspace, rules, sweep, session)
        return emitted

    def _decide(
        self,
        rules: Rules,
        work: Callable[[Store], _Result],
        *,
        batch: Sequence[Observation] = (),
        light: bool = False,
    ) -> tuple[_Result, int]:
        """
        Do the work by the rules; gives its result, and the number of updates that rule 6 added.

        ``light``: it is likely that nothing is to be written.

        All of it in one causally consistent session: whatever member answers, it has what was
        written in the session before.
        """
        self._check_open()
        workspace = self._workspace(rules.workspace)
        late = 0
        since = workspace.last
        with self._client.start_session(causal_consistency=True) as session:
            announced = self._patiently(
                lambda: self._announce(workspace, rules, batch, session) if batch else set()
            )
            subjects = workspace.subjects(batch)
            if light:

                def lightly() -> tuple[_MongoStore, _Result]:
                    # A new one each time: what was asked for and not answered is not "not there".
                    store = _MongoStore(self, workspace, session, announced, since, subjects)
                    return store, work(store)

                # Somebody who was forgotten between two reads is missed: then in a transaction.
                with suppress(LookupError):
                    store, result = self._patiently(lightly)
                    if not store.has_changes:
                        return result, 0
            deadline = time.monotonic() + self._timeout
            attempt = 0
            contended: set[bytes] = set()
            while True:
                attempt += 1
                try:
                    with _translated():
                        store, result = self._attempt(
                            workspace,
                            work,
                            announced,
                            since,
                            subjects,
                            session,
                            contended,
                            at_once=attempt > _PATIENCE,
                        )
                    break
                except _AgainError as exc:
                    if time.monotonic() > deadline:
                        raise GraphUnavailableError(
                            f"no decision came about within {self._timeout:g} s, in {attempt}"
                            f" attempts ({exc}). Nothing of it was written; the same call again is"
                            " safe."
                        ) from exc.__cause__
                time.sleep(random.uniform(0, min(0.002 * 2 ** min(attempt, 7), 0.25)))
            if store.windows and store.has_changes:
                sweep = _Sweep(
                    store.sweep_ids, store.windows, announced, store.rows_seen, store.tables_seen
                )
                try:
                    late = self._sweep(workspace, rules, sweep, session)
                except GraphUnavailableError:
                    # The decision stands, and so does the sweep: it is done by whoever comes next.
                    _log.warning(
                        "the graph went away after a decision; its sweep is left to others"
                    )
        return result, late

    def _attempt(
        self,
        workspace: _Workspace,
        work: Callable[[Store], _Result],
        announced: Collection[bytes],
        since: int,
        subjects: Collection[bytes],
        session: ClientSession,
        contended: set[bytes],
        *,
        at_once: bool,
    ) -> tuple[_MongoStore, _Result]:
        """
        Decide once; ``contended`` gathers what it locks.

        ``at_once``: lock that before anything is read. Locks that are taken in the end alone are
        lost to whoever is quicker, and a long decision loses them to short ones again and again.
        """
        try:
            session.start_transaction(ReadConcern("snapshot"), _MAJORITY)
            store = _MongoStore(self, workspace, session, announced, since, subjects)
            try:
                if at_once and contended:
                    # Another value each time: a write that changes nothing locks nothing.
                    self._db["subjects"].update_many(
                        {"_id": {"$in": list(contended)}},
                        {"$set": {_GRABBED: secrets.token_bytes(6)}},
                        session=session,
                    )
                result = work(store)
                if store.has_changes:
                    contended |= store.to_be_locked
                    store.flush()
                else:
                    session.abort_transaction()
                    return store, result
            except BaseException:
                if session.in_transaction:
                    session.abort_transaction()
                raise
            self._commit(session)
            return store, result
        except DuplicateKeyError as exc:
            raise _AgainError("another worker made the same thing") from exc
        except BulkWriteError as exc:
            errors = (exc.details or {}).get("writeErrors", [])
            if errors and all(error.get("code") in (11000, 112) for error in errors):
                raise _AgainError("another worker made the same thing") from exc
            raise
        except PyMongoError as exc:
            if exc.has_error_label("TransientTransactionError") or isinstance(exc, AutoReconnect):
                raise _AgainError(_describe(exc)) from exc
            raise

    def _commit(self, session: ClientSession) -> None:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                session.commit_transaction()
                return
            except PyMongoError as exc:
                if not exc.has_error_label("UnknownTransactionCommitResult"):
                    raise
                if time.monotonic() > deadline:
                    raise GraphUnavailableError(
                        "the connection went away during the commit; the batch was written whole"
                        " or not at all. The same call again is safe.",
                        written=None,
                    ) from exc
                time.sleep(0.05)

    def _sweep(
        self, workspace: _Workspace, rules: Rules, sweep: _Sweep, session: ClientSession
    ) -> int:
        """Rule 6: rows that the decision did not see get an update of their own."""
        devices = {h: window for h, window in sweep.windows.items() if h > 0}

        def look() -> tuple[dict[int, tuple[Rows, tuple[int, int]]], set[str]]:
            missed = {}
            for subject, rows in self._read_rows(devices, workspace, session, sweep.own).items():
                late = _beside(rows, sweep.rows_seen.get(subject, _NO_ROWS))
                if late.references or late.days:
                    missed[subject] = (late, devices[subject])
            tables = workspace.tables - sweep.tables_seen
            if tables:
                missed = {
                    h: missed.get(h, (_NO_ROWS, window)) for h, window in sweep.windows.items()
                }
            return missed, tables

        missed, tables = self._patiently(look)
        emitted = 0
        if missed:
            emitted = self._run(
                rules, lambda store: decisions.catch_up(store, rules, missed, tables)
            )
            _log.debug("rows of %d subjects came while they were decided", len(missed))
        # Nobody waits for the answer: a sweep that stays is done again, which changes nothing.
        outbox = self._db["outbox"].with_options(write_concern=WriteConcern(0))
        self._patiently(lambda: outbox.delete_many({"_id": {"$in": sweep.ids}}))
        return emitted

    @contextmanager
    def _reader(self, workspace: str) -> Iterator[Store]:
        self._check_open()
        with _translated(), self._client.start_session(snapshot=True) as session:
            yield _MongoStore(self, self._workspace(workspace), session, (), 0, (), reads_only=True)

    def _check_open(self) -> None:
        if self._closed:
            raise GraphError("the graph is closed")
        if self._unfinished:
            raise GraphSchemaError(
                "an import into this graph did not come to its end; what is in it is of no use"
                " alone. Import again, with --restart. Nothing was written."
            )

    def _patiently(self, work: Callable[[], _Result]) -> _Result:
        """Do what may be done again while no primary can be reached, for as long as is allowed."""
        self._check_open()
        deadline = time.monotonic() + self._timeout
        attempt = 0
        while True:
            attempt += 1
            try:
                with _translated(again=True):
                    return work()
            except _AgainError as exc:
                if time.monotonic() > deadline:
                    raise GraphUnavailableError(
                        f"the graph could not be reached for {self._timeout:g} s: {exc}."
                        " No decision was written; the same call again is safe."
                    ) from exc.__cause__
            time.sleep(random.uniform(0.01, min(0.02 * attempt, 0.25)))

    # ---------------------------------------------------------------- names

    def _workspace(self, name: str) -> _Workspace:
        if name not in self._workspaces:
            self._workspaces[name] = _Workspace(name, digester(self._salt, name))
        return self._workspaces[name]

    def _decided_with(self, workspace: _Workspace, rules: str, *, reads_only: bool) -> str:
        if not workspace.rules:
            found = self._db["meta"].find_one({"_id": _meta(workspace.name)}) or {}
            if not found.get("rules") and not reads_only:
                key = {"_id": _meta(workspace.name), "rules": {"$exists": False}}
                with suppress(DuplicateKeyError):  # another worker was first
                    self._db["meta"].update_one(key, {"$set": {"rules": rules}}, upsert=True)
                found = self._db["meta"].find_one({"_id": _meta(workspace.name)}) or {}
            workspace.rules = found.get("rules", "")
        return workspace.rules or rules

    def _refresh(self, workspace: _Workspace, session: ClientSession | None = None) -> None:
        """Read what is known of a workspace."""
        found = self._db["meta"].find_one({"_id": _meta(workspace.name)}, session=session)
        self._learn(workspace, found or {})

    def _learn(self, workspace: _Workspace, found: Mapping[str, Any]) -> None:
        """What the database holds of a workspace now; days may be gone, that somebody dropped."""
        workspace.take_in(found)
        if not workspace.noted_days <= (workspace.days or set()):
            workspace.noted_days &= workspace.days or set()
            self._known_days.clear()

    def _note(self, workspace: _Workspace, tables: Collection[str], days: Collection[int]) -> None:
        """Remember tables and days that have rows, before the rows are written."""
        new_tables = set(tables) - workspace.noted_tables
        new_days = set(days) - workspace.noted_days
        if new_tables or new_days:
            new = {"tables": sorted(new_tables), "days": sorted(new_days)}
            self._db["meta"].update_one(
                {"_id": _meta(workspace.name)},
                {"$addToSet": {name: {"$each": found} for name, found in new.items()}},
                upsert=True,
            )
            workspace.noted_tables |= new_tables
            workspace.tables |= new_tables
            workspace.noted_days |= new_days
            if workspace.days is not None:
                workspace.days = workspace.days | new_days

    def _add_places(self, workspace: _Workspace, wanted: set[tuple[str, ...]]) -> None:
        """Give a number to each combination of tables that has none."""
        if wanted <= workspace.places.keys():
            return
        self._refresh(workspace)
        meta = self._db["meta"]
        while missing := sorted(wanted - workspace.places.keys()):
            first = self._count_up("places", len(missing), meta) - len(missing) + 1
            meta.bulk_write(
                [
                    UpdateOne(
                        {"_id": _meta(workspace.name), "places.tables": {"$ne": list(tables)}},
                        {"$push": {"places": {"n": number, "tables": list(tables)}}},
                    )
                    for number, tables in enumerate(missing, first)
                ]
            )
            self._refresh(workspace)

    def _take_numbers(self, count: int) -> int:
        """The first of so many new numbers, greater than all that were ever taken."""
        # Not majority: what commits after this is in the log after it, so that it cannot be there
        # without this being there. Shards have a log each.
        concern = _MAJORITY if self._is_cluster else WriteConcern(1)
        meta = self._db["meta"].with_options(write_concern=concern)
        return self._count_up("sequence", count, meta) - count + 1

    @staticmethod
    def _count_up(name: str, by: int, meta: MongoCollection[_Document]) -> int:
        found: Any = meta.find_one_and_update(
            {"_id": name}, {"$inc": {"n": by}}, upsert=True, return_document=True
        )
        return int(found["n"])

    # ---------------------------------------------------------------- rows

    def _announce(
        self,
        workspace: _Workspace,
        rules: Rules,
        observations: Sequence[Observation],
        session: ClientSession,
    ) -> set[bytes]:
        """
        Rule 1. Gives the keys of the documents that nobody else has rows in.

        A reference that was not there before is of a row of this batch. A day is never only ours:
        whoever found it marked has a row on it too, and may not have seen what we decide.
        """
        places = {o.tables for o in observations}
        # A place is a part of the document that the rules make.
        self._decided_with(workspace, rules.fingerprint, reads_only=False)
        self._note(workspace, {table for tables in places for table in tables}, ())
        ids, days = decisions.device_rows(rules, observations)
        name = {value: workspace.device(value) for rows in (ids, days) for value, _ in rows}
        fresh = self._write_references(
            workspace, [(name[value], o.tables, o.message_id, o.time) for value, o in ids], session
        )
        if days:
            marks = {(name[value], o.tables, o.time // DAY) for value, o in days}
            self._write_days(workspace, marks, session)
        return fresh

    def _write_references(
        self,
        workspace: _Workspace,
        references: Collection[tuple[bytes, tuple[str, ...], str, int]],
        session: ClientSession,
    ) -> set[bytes]:
        """Insert what is not there; gives the keys of the documents that were not."""
        self._add_places(workspace, {reference[1] for reference in references})
        # By the beginning of the key, the reference, or several by what ends a key.
        chunks: dict[bytes, bytes | dict[bytes, bytes]] = {}
        places: dict[tuple[tuple[str, ...], int, int], bytes] = {}
        for subject, tables, message_id, at in references:
            day, kind, packed = pack(message_id, at)
            place = places.get((tables, kind, day))
            if place is None:
                slot = workspace.places[tables] * 4 + kind
                place = places[tables, kind, day] = day.to_bytes(3) + slot.to_bytes(3)
            prefix = subject + place
            held = chunks.get(prefix)
            if kind == UUID_MS:
                if held is None:
                    chunks[prefix] = packed
                elif isinstance(held, bytes):
                    chunks[prefix] = {held: held, packed: packed}
                else:
                    held[packed] = packed
            elif isinstance(held, dict):
                held[_short(packed, kind)] = packed
            else:
                chunks[prefix] = {_short(packed, kind): packed}
        if not chunks:
            return set()
        self._note(workspace, (), {day for _, _, day in places})
        by_slot: dict[str, list[_Document]] = {}
        names = {place: _rows_of(bytes(DIGEST) + place) for place in places.values()}
        for prefix, chunk in chunks.items():
            documents = by_slot.setdefault(names[prefix[DIGEST:]], [])
            if isinstance(chunk, bytes):
                documents.append({"_id": prefix + chunk})
                continue
            documents.extend(_chunk(prefix, part, chunk) for part in _parts(chunk))
        fresh: set[bytes] = set()
        for name, documents in by_slot.items():
            fresh.update(d["_id"] for d in documents)
            taken = set(self._insert(name, documents, session))
            if taken:
                fresh -= taken
                refused = [d for d in documents if d["_id"] in taken]
                fresh.update(self._insert_rest(name, refused, session))
        return fresh

    def _insert_rest(
        self, name: str, refused: Sequence[_Document], session: ClientSession
    ) -> list[bytes]:
        """Others with the same first references are there: insert what those do not hold."""
        missing: dict[bytes, dict[bytes, bytes]] = {}
        ranges = []
        for document in refused:
            key = document["_id"]
            references = dict(_references_in(document, key[-_REST - 1] & 3))
            if len(references) > 1:
                missing.setdefault(key[:-_REST], {}).update(references)
                ranges.append((name, key, key))
        for held in self._union(ranges, session):
            prefix = held["_id"][:-_REST]
            for rest, _ in _references_in(held, prefix[-1] & 3):
                missing[prefix].pop(rest, None)
        # One by one: where the key of such a one is taken, it is there.
        singles = [
            _chunk(prefix, [rest], left) for prefix, left in missing.items() for rest in left
        ]
        again = set(self._insert(name, singles, session))
        return [d["_id"] for d in singles if d["_id"] not in again]

    def _insert(
        self, name: str, documents: Sequence[_Document], session: ClientSession
    ) -> list[bytes]:
        """Insert; gives the keys that were there already."""
        if not documents:
            return []
        if session.in_transaction:
            # An error would end the transaction: look first.
            ranges = [(name, d["_id"], d["_id"]) for d in documents]
            held = {d["_id"] for d in self._union(ranges, session)}
            new = [d for d in documents if d["_id"] not in held]
            if new:
                self._db[name].insert_many(new, ordered=False, session=session)
            return list(held)
        try:
            self._db[name].insert_many(documents, ordered=False, session=session)
        except BulkWriteError as exc:
            details = exc.details or {}
            errors = details.get("writeErrors", [])
            if any(error.get("code") != 11000 for error in errors):
                raise
            if details.get("writeConcernErrors"):
                raise _AgainError("the members did not confirm in time") from exc
            return [documents[error["index"]]["_id"] for error in errors]
        return []

    def _write_days(
        self,
        workspace: _Workspace,
        days: Collection[tuple[bytes, tuple[str, ...], int]],
        session: ClientSession,
    ) -> None:
        self._add_places(workspace, {tables for _, tables, _ in days})
        keys: dict[str, list[bytes]] = {}
        for subject, tables, day in days:
            slot = (workspace.places[tables] * 4 + _DAY_KIND).to_bytes(3)
            key = subject + day.to_bytes(3) + slot + bytes(_REST)
            if key not in self._known_days:
                keys.setdefault(_rows_of(key[:-_REST]), []).append(key)
        self._note(workspace, (), {day for _, _, day in days})
        for name, new in keys.items():
            self._insert(name, [{"_id": key} for key in new], session)
            self._known_days.add(new)

    def _read_rows(
        self,
        windows: Mapping[int, tuple[int, int]],
        workspace: _Workspace,
        session: ClientSession,
        own: Collection[bytes],
    ) -> dict[int, Rows]:
        """What is known of rows, but for what the documents of these keys say."""
        meta = _meta(workspace.name)
        documents: Iterable[_Document]
        # Rows of a device that another worker noted in the meantime are not missed in a decision:
        # rule 6 looks again. Those of an identified person are read here alone.
        if (
            workspace.days is None
            or not session.in_transaction
            or any(handle < 0 for handle in windows)
        ):
            used = set(workspace.days or ())
            ranges = [("meta", meta, meta), *_row_ranges(windows, used)]
            first, *documents = [*self._union(ranges, session), {}]
            self._learn(workspace, first if first.get("_id") == meta else {})
            new = (workspace.days or set()) - used
            documents = [d for d in (first, *documents) if isinstance(d.get("_id"), bytes)]
            documents.extend(self._union(_row_ranges(windows, new), session))
        else:
            documents = self._union(_row_ranges(windows, workspace.days), session)
        kept = workspace.days or set()
        signs = {_key(abs(handle)): handle for handle in windows}
        found: dict[int, tuple[dict[Any, dict[str, int]], dict[Any, set[int]]]] = {}
        for document in documents:
            key = document["_id"]
            if key in own:
                continue
            day, slot = _day(key), _slot(key)
            place = workspace.place_names.get(slot // 4)
            if day not in kept or place is None:
                continue
            handle = signs[key[:DIGEST]]
            start, end = windows[handle]
            references, touched = found.setdefault(handle, ({}, {}))
            if slot % 4 == _DAY_KIND:
                touched.setdefault(place, set()).add(day)
                continue
            held = references.setdefault(place, {})
            for _, packed in _references_in(document, slot % 4):
                for message_id, at in unpack(slot % 4, packed, day * DAY):
                    if start <= at < end:
                        held[message_id] = at
        rows = {
            handle: Rows({place: refs for place, refs in references.items() if refs}, touched)
            for handle, (references, touched) in found.items()
        }
        return {h: found for h, found in rows.items() if found.references or found.days}

    def _union(
        self, ranges: Sequence[tuple[str, Any, Any]], session: ClientSession | None
    ) -> Iterator[_Document]:
        """
        Documents of ranges of keys, both ends included, in few round trips.

        A transaction has no ``$unionWith``: what is read for one is read beside it, and later than
        its snapshot, which includes what the primary holds and the majority does not confirm yet.
        What is newer than the snapshot was written under a lock (rule 3) that this transaction
        takes too, so that it will be done again; where it takes none, `_MongoStore` asks whether
        the timeline is still what it was.
        """
        concern = ReadConcern("majority")
        if session is not None and session.in_transaction:
            session, concern = None, ReadConcern("local")
        for start in range(0, len(ranges), _UNION):
            part = ranges[start : start + _UNION]
            name, low, high = part[0]
            pipeline: list[_Document] = [{"$match": {"_id": {"$gte": low, "$lte": high}}}]
            for other, low, high in part[1:]:
                match = {"$match": {"_id": {"$gte": low, "$lte": high}}}
                pipeline.append({"$unionWith": {"coll": other, "pipeline": [match]}})
            source = self._db[name].with_options(read_concern=concern)
            yield from source.aggregate(pipeline, session=session, batchSize=20_000)

    def _first(
        self, name: str, low: bytes, high: bytes, direction: int, session: ClientSession | None
    ) -> _Document | None:
        """The first or last document of a range of keys; read as `_union` reads."""
        concern = ReadConcern("majority")
        if session is not None and session.in_transaction:
            session, concern = None, ReadConcern("local")
        source = self._db[name].with_options(read_concern=concern)
        key = {"_id": {"$gte": low, "$lte": high}}
        return source.find_one(key, sort=[("_id", direction)], session=session)

    # ---------------------------------------------------------------- outbox

    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        """See `Graph.lease_updates`."""
        if limit < 1:  # which MongoDB takes for "all"
            return []
        holder = secrets.token_bytes(DIGEST)
        outbox = self._db["outbox"]
        at = _progress(destination)
        free = {
            "_id": {"$gt": 0},
            "$expr": {"$lte": [{"$ifNull": [f"${at}until", _NEVER]}, "$$NOW"]},
        }
        until = {"$add": ["$$NOW", round(seconds * 1000)]}
        count = {"$add": [{"$ifNull": [f"${at}n", 0]}, 1]}
        leased_by = {f"{at}until": until, f"{at}holder": holder, f"{at}n": count}
        check_destination(destination, self.destinations())
        tried: set[int] = set()

        def mine() -> list[_Document]:
            chosen = {"_id": {"$in": [*tried]}, f"{at}holder": holder}
            return list(outbox.find(chosen).sort("_id", 1)) if tried else []

        def lease() -> list[_Document]:
            while True:
                # Some of them may have been leased by another worker in between: if all, go on.
                # And where the connection broke, they may be ours already.
                if leased := mine():
                    return leased
                if destination:
                    ids = self._free(f"{at}until", limit)
                else:
                    ids = [
                        d["_id"] for d in outbox.find(free, {"_id": 1}).sort("_id", 1).limit(limit)
                    ]
                if not ids:
                    # What is free no more may have become ours since: what a primary had written
                    # before it died is seen by majority reads only when its successor has.
                    return mine()
                tried.update(ids)
                outbox.update_many({**free, "_id": {"$in": ids}}, [{"$set": leased_by}])

        return [_delivery(document, destination, 1) for document in self._patiently(lease)]

    def _free(self, until: str, limit: int) -> list[int]:
        """What may be leased for a destination with a name, by its index."""
        outbox, order = self._db["outbox"], [(until, 1), ("_id", 1)]
        now = self._db.command("hello")["localTime"]
        again = outbox.find({until: {"$lte": now}}, {"_id": 1}).sort(order).limit(limit)
        new = outbox.find({until: None, "_id": {"$gt": 0}}, {"_id": 1}).sort(order).limit(limit)
        return sorted(d["_id"] for found in (again, new) for d in found)[:limit]

    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        """See `Graph.acknowledge`."""
        keys = list(positions)
        if destination:
            at = _progress(destination)
            done: _Document = {"$set": {f"{at}until": _DONE}, "$unset": {f"{at}holder": ""}}
            self._patiently(
                lambda: self._db["outbox"].update_many({"_id": {"$in": keys, "$gt": 0}}, done)
            )
            self._drop_done({"$in": keys, "$gt": 0})
            return
        for name in ("outbox", "dead"):
            self._patiently(partial(self._db[name].delete_many, {"_id": {"$in": keys}}))

    def _drop_done(self, chosen: _Document) -> None:
        """Take updates out of the outbox that every destination has applied."""
        names = self.destinations()
        done = {f"{_progress(name)}until": _DONE for name in names}
        if names:
            self._patiently(lambda: self._db["outbox"].delete_many({"_id": chosen, **done}))

    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        """See `Graph.hold_updates`."""
        at = _progress(destination)
        chosen = {"_id": {"$in": list(positions), "$gt": 0}, f"{at}until": {"$lt": _DEAD}}
        fields: _Document = {f"{at}until": {"$add": ["$$NOW", round(seconds * 1000)]}}
        if applied:
            fields[f"{at}applied"] = True
        self._patiently(lambda: self._db["outbox"].update_many(chosen, [{"$set": fields}]))

    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        """See `Graph.return_updates`."""
        keys = list(positions)
        chosen: _Document = {"_id": {"$in": keys}}
        if destination:
            at = _progress(destination)
            fields: _Document = {f"{at}until": _DEAD if dead else _NEVER, f"{at}reason": reason}
            # What was done, and what was never leased, is left alone.
            chosen = {"_id": {"$in": keys, "$gt": 0}, f"{at}until": {"$lt": _DONE}}
            self._patiently(lambda: self._db["outbox"].update_many(chosen, {"$set": fields}))
            return
        # There before it is gone here: whoever dies in between leaves it in both, and it comes
        # again.
        if dead:
            self._patiently(lambda: self._move("outbox", "dead", chosen, {"reason": reason}))
        else:
            self._patiently(lambda: self._move("dead", "outbox", chosen, {"until": _NEVER}))
            self._patiently(
                lambda: self._db["outbox"].update_many(chosen, {"$set": {"until": _NEVER}})
            )

    def _move(self, source: str, target: str, chosen: _Document, fields: _Document) -> None:
        found = list(self._db[source].find(chosen))
        if found:
            self._db[target].bulk_write(
                [ReplaceOne({"_id": d["_id"]}, {**d, **fields}, upsert=True) for d in found],
                ordered=False,
            )
            self._db[source].delete_many({"_id": {"$in": [d["_id"] for d in found]}})

    def dead_updates(self, limit: int, destination: str = "") -> list[tuple[Delivery, str]]:
        """See `Graph.dead_updates`."""
        if limit < 1:
            return []
        name, chosen = ("outbox", _dead_of(destination)) if destination else ("dead", {})
        found = self._patiently(
            lambda: list(self._db[name].find(chosen).sort("_id", 1).limit(limit))
        )
        return [
            (_delivery(d, destination, 0), _part(d, destination).get("reason", "")) for d in found
        ]

    def destinations(self) -> dict[str, bool]:
        """See `Graph.destinations`."""
        found = self._patiently(lambda: self._db["meta"].find_one({"_id": _DESTINATIONS}))
        names: dict[str, bool] = {} if found is None else found["names"]
        return names

    def add_destination(self, name: str, *, filled: bool = False) -> None:
        """See `Graph.add_destination`."""
        check_name(name)
        field = f"names.{name}"
        order = [(f"{_progress(name)}until", 1), ("_id", 1)]
        self._patiently(
            lambda: self._db["outbox"].create_index(order, name=f"{_DESTINATIONS} {name}")
        )
        if not self.destinations():  # what had died for nobody by name is tried anew
            self._patiently(lambda: self._move("dead", "outbox", {}, {"until": _NEVER}))
        self._patiently(
            lambda: self._db["meta"].update_one(
                {"_id": _DESTINATIONS}, {"$max": {field: filled}}, upsert=True
            )
        )
        # What a worker that died between its two steps has left.
        self._drop_done({"$gt": 0})

    def drop_destination(self, name: str) -> None:
        """See `Graph.drop_destination`."""
        check_name(name)
        if name not in self.destinations():
            return
        meta, outbox = self._db["meta"], self._db["outbox"]
        gone = {"$unset": {f"names.{name}": ""}}
        self._patiently(lambda: meta.update_one({"_id": _DESTINATIONS}, gone))
        self._drop_done({"$gt": 0})
        field = f"{_PROGRESS}.{name}"
        self._patiently(
            lambda: outbox.update_many({field: {"$exists": True}}, {"$unset": {field: ""}})
        )
        index = f"{_DESTINATIONS} {name}"
        if index in self._patiently(outbox.index_information):
            self._patiently(lambda: outbox.drop_index(index))

    def backlog(self, destination: str = "") -> Backlog:
        """See `Graph.backlog`."""
        check_destination(destination, self.destinations())
        outbox, at = self._db["outbox"], _progress(destination)
        living = {"_id": {"$gt": 0}, f"{at}until": {"$not": {"$gte": _DEAD}}}
        waiting = {**living, f"{at}applied": None}
        held = {**living, f"{at}applied": True}

        def count() -> Backlog:
            first = outbox.find_one(waiting, sort=[("_id", 1)])
            if destination:
                dead = outbox.count_documents(_dead_of(destination))
            else:
                dead = self._db["dead"].estimated_document_count()
            return Backlog(
                waiting=outbox.count_documents(waiting),
                held=outbox.count_documents(held),
                dead=dead,
                oldest=None if first is None else parse_update(first["body"]).created_at,
            )

        return self._patiently(count)

    # ---------------------------------------------------------------- the whole graph

    def clock(self) -> datetime:
        """The time of the server, by which leases end."""
        now: datetime = self._patiently(lambda: self._client.admin.command("hello")["localTime"])
        return now.replace(tzinfo=UTC)  # answers of commands come without a zone

    def stats(self) -> GraphStats:
        """See `Graph.stats`. Updates are counted without reading them."""
        return self._patiently(self._stats)

    def _stats(self) -> GraphStats:
        db = self._db
        kept = self._kept_days()
        references = devices = 0
        last = b""
        # All in the order of their digests, so that each is counted once.
        for key, size in heapq.merge(
            *(self._row_sizes(name) for name in _ROWS),
            ((d["_id"], 0) for d in db["subjects"].find({"a": {"$exists": True}}).sort("_id", 1)),
        ):
            visible = len(key) == DIGEST or _day(key) in kept.get(_slot(key) // 4, ())
            if visible and key[:DIGEST] != last and not key[DIGEST - 1] & 1:
                devices += 1
                last = key[:DIGEST]
            if visible:
                references += size
        count: Any = {"$group": {"_id": {"$ifNull": ["$k", "$_id"]}, "n": {"$sum": 1}}}
        total: Any = {"$group": {"_id": None, "persons": {"$sum": 1}, "n": {"$sum": "$n"}}}
        persons: list[_Document] = [{"$match": {"t": {"$exists": True}}}, count, total]
        claims: list[_Document] = [
            {"$match": {"a": {"$exists": True}}},
            {"$group": {"_id": None, "n": {"$sum": "$n"}}},
        ]
        known = next(iter(db["subjects"].aggregate(persons, allowDiskUse=True)), {})
        claimed = next(iter(db["subjects"].aggregate(claims)), {})
        sweeps = db["outbox"].count_documents({"_id": {"$lt": 0}})
        pending = max(0, db["outbox"].estimated_document_count() - sweeps)
        dead = db["dead"].estimated_document_count()
        if names := self.destinations():
            open_for = [{f"{_progress(n)}until": {"$not": {"$gte": _DEAD}}} for n in names]
            pending = db["outbox"].count_documents({"_id": {"$gt": 0}, "$or": open_for})
            dead += sum(db["outbox"].count_documents(_dead_of(name)) for name in names)
        disk = db.command("dbStats")
        return GraphStats(
            anonymous_ids=devices,
            identifiers=known.get("n", 0),
            persons=known.get("persons", 0),
            claims=claimed.get("n", 0),
            links=db["links"].count_documents({"r": ""}),
            conflicts=db["links"].count_documents({"r": {"$in": ["unique", "limit"]}}),
            references=references,
            pending_updates=pending,
            dead_updates=dead,
            bytes=int(disk["storageSize"] + disk["indexSize"]),
        )

    def _row_sizes(self, name: str) -> Iterator[tuple[bytes, int]]:
        """
        Keys in their order, with the number of references that each holds.

        A batch that came again in other parts has left some of them twice; they count once.
        """
        prefix = b""
        held: set[bytes] = set()  # by documents before, and behind the key of the last one
        for document in self._db[name].find({}, {"r": 1}, batch_size=20_000):
            key: bytes = document["_id"]
            kind = key[DIGEST + 5] & 3
            if key[:-_REST] != prefix:
                prefix, held = key[:-_REST], set()
            if kind == _DAY_KIND:
                yield key, 0
            elif "r" not in document and not held:
                yield key, 1
            else:
                rests = {rest for rest, _ in _references_in(document, kind)}
                yield key, len(rests - held)
                held = {rest for rest in rests | held if rest > key[-_REST:]}

    def expire(self, before: int) -> int:
        """
        See `Graph.expire`.

        Rows of those days are not seen any more from now on. Collections that hold nothing else
        are replaced by empty ones at once, where none of the days from ``before`` until tomorrow
        belongs to them; the rest goes with `compact`.
        """
        horizon = before // DAY

        def forget_days() -> tuple[set[int], set[int]]:
            old: set[int] = set()
            kept: set[int] = set()
            for found in self._db["meta"].find({"days": {"$exists": True}}, {"days": 1}):
                gone = [day for day in found["days"] if day < horizon]
                old.update(gone)
                kept.update(set(found["days"]) - set(gone))
                if gone:
                    self._db["meta"].update_one(
                        {"_id": found["_id"]}, {"$pull": {"days": {"$in": gone}}}
                    )
            return old, kept

        old, kept = self._patiently(forget_days)
        for workspace in self._workspaces.values():
            workspace.noted_days -= old
            workspace.days = None
        self._known_days.clear()
        if old:
            # A day that another worker notes at this very moment is one of these as well.
            now = self._patiently(lambda: self._client.admin.command("hello")["localTime"])
            today = int(now.timestamp()) // 86_400
            kept.update(range(horizon, today + 2))
            for slot in set(range(SLOTS)) - {day // PERIOD % SLOTS for day in kept}:
                self._patiently(partial(self._empty, _ROWS[slot]))
        return len(old)

    def _empty(self, name: str) -> None:
        if self._db[name].find_one({}, {"_id": 1}) is None:
            return
        if self._is_cluster:
            # An empty collection in its place would not be distributed any more.
            self._db[name].delete_many({})
            return
        spare = f"{name}_new"
        self._db.drop_collection(spare)
        _create(self._db, spare, clustered=True)
        self._db[spare].rename(name, dropTarget=True)


@dataclass(slots=True)
class _Workspace:
    """What this process knows of a workspace: it only grows."""

    name: str
    digest: Callable[[str, str], bytes]
    rules: str = ""
    tables: set[str] = field(default_factory=set)
    noted_tables: set[str] = field(default_factory=set)
    noted_days: set[int] = field(default_factory=set)
    days: set[int] | None = None
    devices: dict[str, bytes] = field(default_factory=dict)
    identifiers: dict[Identifier, bytes] = field(default_factory=dict)
    sweeps: dict[int, float] = field(default_factory=dict)
    next_look: float = 0.0
    last: int = 0  # the greatest number of the sequence that was ever met

    def take_in(self, found: Mapping[str, Any]) -> None:
        """What the database holds of it now."""
        self.tables = set(found.get("tables", ()))
        self.days = set(found.get("days", ()))
        for place in found.get("places", ()):
            self.places[tuple(place["tables"])] = place["n"]
            self.place_names[place["n"]] = tuple(place["tables"])

    def device(self, anonymous_id: str) -> bytes:
        """The digest of an anonymous id; those that were asked for last are kept."""
        found = self.devices.get(anonymous_id)
        if found is None:
            if len(self.devices) > 50_000:
                self.devices = {}
            found = self.devices[anonymous_id] = self.digest(ANONYMOUS, anonymous_id)
        return found

    def known(self, identifier: Identifier) -> bytes:
        """The digest of a known identifier; those that were asked for last are kept."""
        found = self.identifiers.get(identifier)
        if found is None:
            if len(self.identifiers) > 50_000:
                self.identifiers = {}
            found = self.identifiers[identifier] = self.digest(*identifier)
        return found

    def subjects(self, batch: Iterable[Observation]) -> set[bytes]:
        """Everybody whom a batch names: what a decision about it asks for first."""
        devices = {o.anonymous_id for o in batch if o.anonymous_id is not None}
        known = {identifier for o in batch for identifier in o.known}
        previous = {o.previous_id for o in batch if o.previous_id is not None}
        known |= {Identifier(decisions.USER_ID, value) for value in previous}
        return {*map(self.device, devices | previous), *map(self.known, known)}

    places: dict[tuple[str, ...], int] = field(default_factory=dict)
    place_names: dict[int, tuple[str, ...]] = field(default_factory=dict)


class _Recent:
    """The last so many keys that are known to be in the database."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys: dict[bytes, None] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[bytes]) -> None:
        self._keys.update(dict.fromkeys(keys))
        while len(self._keys) > self._limit:
            self._keys.pop(next(iter(self._keys)), None)

    def clear(self) -> None:
        self._keys = {}


class _Sweep(NamedTuple):
    """What changed hands in a decision, and what it saw of the rows in there."""

    ids: Sequence[int]
    windows: Mapping[int, tuple[int, int]]
    own: Collection[bytes]
    rows_seen: Mapping[int, Rows]
    tables_seen: set[str]


class _AgainError(Exception):
    """The same work may succeed when it is done again. Nothing of it was written."""


# -------------------------------------------------------------------- a transaction


class _MongoStore:
    """
    One transaction of one workspace; where none was begun, majority reads and no writes.

    What is read is kept, and what is written is written at the end, by one command for each
    collection, so that the number of round trips does not depend on the size of the batch.
    """

    def __init__(
        self,
        graph: MongoGraph,
        workspace: _Workspace,
        session: ClientSession,
        announced: Collection[bytes],
        since: int,
        subjects: Collection[bytes],
        *,
        reads_only: bool = False,
    ) -> None:
        self._graph = graph
        self._db = graph._db
        self._workspace = workspace
        self._session = session
        self._announced = announced
        self._since = since
        self._unread = subjects
        self._reads_only = reads_only
        self.windows: dict[int, tuple[int, int]] = {}
        self.sweep_ids: list[int] = []
        self.rows_seen: dict[int, Rows] = {}
        self.tables_seen: set[str] = set()
        self._tables: set[str] | None = None
        self._documents: dict[bytes, _Document | None] = {}
        self._values: dict[bytes, str] = {}
        self._whole: dict[bytes, list[Claim]] = {}
        self._owners: dict[bytes, set[bytes]] = {}
        self._links: dict[int, dict[tuple[int, int, bool], StoredLink]] = {}
        self._put_links: dict[int, dict[tuple[int, int, bool], StoredLink]] = {}
        self._changed: set[bytes] = set()
        self._locked: set[bytes] = set()
        self._claim_writes: list[Any] = []
        self._new_claims: list[_Document] = []
        self._claimant_writes: dict[bytes, bool] = {}
        self._link_writes: dict[bytes, Any] = {}
        self._components: set[int] = set()
        self._references: list[tuple[bytes, tuple[str, ...], str, int]] = []
        self._gone_subjects: set[bytes] = set()
        self._updates: list[UpdateByCriteria] = []
        self._numbers: tuple[int, int] = (0, 0)
        self._block = _NUMBERS
        self._version = 0

    @property
    def has_changes(self) -> bool:
        """Whether there is anything to be written."""
        return bool(
            self._changed
            or self._claim_writes
            or self._new_claims
            or self._claimant_writes
            or self._link_writes
            or self._components
            or self._references
            or self._gone_subjects
            or self._updates
        )

    @property
    def to_be_locked(self) -> set[bytes]:
        """The timelines and identifiers that get a new version."""
        return self._changed | self._locked

    def flush(self) -> None:
        """Write everything, in the transaction."""
        session, db = self._session, self._db
        version = self.version
        subjects: list[Any] = []
        new_subjects: list[_Document] = []
        for key in self._changed:
            document = self._documents[key]
            assert document is not None
            made = {**document, "v": version}
            if "v" in document:
                subjects.append(ReplaceOne({"_id": key}, made))
            else:  # nobody may have made it in the meantime
                new_subjects.append(made)
        locked = list(self._locked - self._changed)
        if locked:
            locking = {"$set": {"v": version}, "$unset": {_GRABBED: ""}}
            subjects.append(UpdateMany({"_id": {"$in": locked}}, locking))
        links = list(self._link_writes.values())
        for component in self._components:
            key = _link_key(component, 0, 0, False)
            links.append(
                UpdateOne({"_id": key, "c": _key(component)}, {"$set": {"v": version}}, upsert=True)
            )
        claims, new_claims = list(self._claim_writes), list(self._new_claims)
        for pair, there in self._claimant_writes.items():
            key = pair + bytes(DIGEST)
            if not there:
                claims.append(DeleteOne({"_id": key}))
            elif "v" in (self._documents[pair[DIGEST:]] or {}):
                claims.append(UpdateOne({"_id": key}, {"$setOnInsert": {"_id": key}}, upsert=True))
            else:
                new_claims.append({"_id": key})
        for name, writes, added in (
            ("subjects", subjects, new_subjects),
            ("links", links, []),
            ("claims", claims, new_claims),
        ):
            if writes:
                db[name].bulk_write(writes, ordered=False, session=session)
            if added:
                db[name].insert_many(added, ordered=False, session=session)
        for subject in self._gone_subjects:
            low, high = subject + bytes(6 + _REST), subject + b"\xff" * (6 + _REST)
            for name in sorted({_ROWS[day // PERIOD % SLOTS] for day in self._days()}):
                db[name].delete_many({"_id": {"$gte": low, "$lte": high}}, session=session)
        if self._references:
            self._graph._write_references(self._workspace, self._references, session)
        outgoing: list[_Document] = [
            {
                "_id": update.sequence,
                "w": self._workspace.name,
                "body": update.model_dump_json(),
                "n": 0,
                "until": _NEVER,
            }
            for update in self._updates
        ]
        windows = [[_key(abs(h)), start, end] for h, (start, end) in self.windows.items()]
        for start in range(0, len(windows), _WINDOWS):
            self.sweep_ids.append(-self.next_sequence())
            part = windows[start : start + _WINDOWS]
            outgoing.append({"_id": self.sweep_ids[-1], "w": self._workspace.name, "windows": part})
        if outgoing:
            db["outbox"].insert_many(outgoing, session=session)

    def decided_with(self, rules: str) -> str:
        return self._graph._decided_with(self._workspace, rules, reads_only=self._reads_only)

    # ---------------------------------------------------------------- timelines

    def _load(self, keys: Iterable[bytes]) -> None:
        """Read documents of subjects; the first time all that the batch names."""
        missing = [key for key in keys if key not in self._documents]
        if missing:
            if self._unread:
                missing = list({*missing, *self._unread})
                self._unread = ()
            self._documents.update(dict.fromkeys(missing))
            for document in self._db["subjects"].find(
                {"_id": {"$in": missing}}, session=self._session, batch_size=20_000
            ):
                document.pop(_GRABBED, None)
                self._documents[document["_id"]] = document
                self._workspace.last = max(self._workspace.last, document.get("v", 0))

    def timelines(self, anonymous_ids: Collection[str]) -> dict[str, Timeline]:
        device = self._workspace.device
        keys = {value: device(value) for value in anonymous_ids}
        self._load(keys.values())
        found = {}
        for value, key in keys.items():
            self._values[key] = value
            document = self._documents[key]
            # Whether it was ever seen is not known, and nobody has to know.
            if document is None:
                found[value] = Timeline(int.from_bytes(key), False)
            else:
                handle = int.from_bytes(key)
                found[value] = Timeline(handle, document["n"] > 0, document.get("r", -1))
        return found

    def add_timelines(self, anonymous_ids: Collection[str]) -> dict[str, int]:
        return {value: held.handle for value, held in self.timelines(anonymous_ids).items()}

    def anonymous_ids(self, timelines: Collection[int]) -> dict[int, str]:
        keys = {_key(handle): handle for handle in timelines}
        self._load(keys)
        return {
            handle: unpack_id(document["a"])
            for key, handle in keys.items()
            if (document := self._documents[key]) is not None and document["a"] is not None
        }

    def _timeline(self, key: bytes) -> _Document:
        """The document of a timeline, to be changed."""
        self._load([key])
        document = self._documents[key]
        if document is None:
            document = self._documents[key] = {
                "_id": key,
                "w": self._workspace.name,
                "a": pack_id(self._values[key]),
                "n": 0,
                "first": [],
            }
        elif document["a"] is None:  # it came from a graph that did not know it
            document["a"] = pack_id(self._values[key])
        self._changed.add(key)
        return document

    def claims(
        self, windows: Mapping[int, tuple[int, int]], *, first: bool = False
    ) -> dict[int, list[Claim]]:
        keys = {_key(handle): handle for handle in windows}
        self._load(keys)
        found: dict[int, list[Claim]] = {}
        wanted: dict[bytes, tuple[int, int]] = {}
        for key, handle in keys.items():
            document = self._documents[key]
            if document is None or not document["n"]:
                continue
            low, high = windows[handle]
            whole = document.get("ended") or (low <= BEGINNING and high >= END)
            if not whole and low > (last := _last(document))[0][0] and "many" not in document:
                found[handle] = [_claim(c) for c in last]  # the usual case
                continue
            ends = sorted({_claim(c) for c in (*document["first"], *_last(document))})
            if key in self._whole:
                found[handle] = self._whole[key]
            elif document["n"] == len(ends) and "many" not in document:
                found[handle] = ends
                if whole:
                    self._whole[key] = ends
            elif whole:
                wanted[key] = (BEGINNING, END)
            else:
                wanted[key] = (low, high)
        read = self._read_claims(wanted)
        self._check_unchanged(wanted)
        for key, claims in read.items():
            found[keys[key]] = claims
            if wanted[key] == (BEGINNING, END):
                self._whole[key] = claims
        for handle, claims in found.items():
            key = _key(handle)
            self._owners.setdefault(key, set()).update(
                _key(c.owner) for c in claims if isinstance(c.owner, int)
            )
            if first and key not in self._whole:
                document = self._documents[key]
                assert document is not None
                beginning = {_claim(c) for c in document["first"]}
                found[handle] = sorted({*beginning, *claims})
        return found

    def _check_unchanged(self, keys: Collection[bytes]) -> None:
        """
        What was read beside the snapshot is of the snapshot: nobody has changed the timeline since.

        Rows are stamped by claims of timelines that this transaction does not lock. A claim that is
        newer than the persons of the snapshot would stamp them with what they never held, and no
        update would know of it.
        """
        if not keys or not self._session.in_transaction:
            return
        timelines = self._db["subjects"].with_options(read_concern=ReadConcern("local"))
        now = {d["_id"]: d["v"] for d in timelines.find({"_id": {"$in": list(keys)}}, {"v": 1})}
        for key in keys:
            document = self._documents[key]
            if document is None or now.get(key) != document.get("v"):
                raise _AgainError("another worker claimed a device")

    def _read_claims(self, windows: Mapping[bytes, tuple[int, int]]) -> dict[bytes, list[Claim]]:
        """
        Claims of windows and at least one beyond each of their ends.

        How far beyond is guessed from how densely the timeline is claimed; where claims lie
        unevenly, the guess may find none, and they are looked for one by one.
        """
        reach: dict[bytes, tuple[int, int]] = {}
        for key, (low, high) in windows.items():
            document = self._documents[key]
            assert document is not None
            length = _last(document)[0][0] - document["first"][0][0]
            width = 1 + 8 * length // document["n"]
            reach[key] = (max(low - width, BEGINNING), min(high + width, END))
        ranges = [("claims", *_claim_range(key, *bounds)) for key, bounds in reach.items()]
        found: dict[bytes, list[Claim]] = {key: [] for key in windows}
        for document in self._graph._union(ranges, self._session):
            found[document["_id"][:DIGEST]].append(_claim_of(document))
        for key, claims in found.items():
            document = self._documents[key]
            assert document is not None
            low, high = windows[key]
            claims.sort()
            if low > document["first"][0][0] and not (claims and claims[0].time < low):
                claims[:0] = self._nearest(key, BEGINNING, reach[key][0] - 1, -1)
            if high < _last(document)[0][0] and not (claims and claims[-1].time > high):
                claims.extend(self._nearest(key, reach[key][1] + 1, END, 1))
        return found

    def _nearest(self, key: bytes, low: int, high: int, direction: int) -> list[Claim]:
        """The first or last claims of a stretch; of equal times all."""
        least, greatest = _claim_range(key, low, high)
        nearest = self._graph._first("claims", least, greatest, direction, self._session)
        if nearest is None:
            return []
        at = _claim_of(nearest).time
        ranges = [("claims", *_claim_range(key, at, at))]
        return sorted(map(_claim_of, self._graph._union(ranges, self._session)))

    def add_claims(self, claims: Mapping[str, tuple[int, Collection[Claim]]]) -> None:
        for value, (handle, new) in claims.items():
            key = _key(handle)
            self._values[key] = value
            document = self._timeline(key)
            owners = self._owners.setdefault(key, set())
            for claim in new:
                self._new_claims.append(_claim_document(key, claim))
                if not isinstance(claim.owner, int):
                    continue
                owner = _key(claim.owner)
                if owner not in owners:
                    owners.add(owner)
                    self._claimant_writes[owner + key] = True
                    # Whoever decides about this person must know of this timeline.
                    self._locked.add(owner)
            self._extend(document, new)
            if key in self._whole:
                self._whole[key] = sorted({*self._whole[key], *new})

    @staticmethod
    def _extend(document: _Document, new: Collection[Claim]) -> None:
        """Keep what a timeline's document says of its claims."""
        if not new:
            return
        if len(new) == 1 and document["n"]:
            (claim,) = new
            if claim.time > _last(document)[0][0]:  # the usual case
                document["n"] += 1
                document["last"] = [_listed(claim)]
                if claim.soft:
                    document["soft"] = True
                if claim.until < END:
                    document["ended"] = True
                return
        first = {_claim(c) for c in document["first"]}
        last = {_claim(c) for c in _last(document)}
        start = min(c.time for c in (*first, *new))
        end = max(c.time for c in (*last, *new))
        firsts = sorted(c for c in (*first, *new) if c.time == start)
        lasts = sorted(c for c in (*last, *new) if c.time == end)
        document["n"] += len(new)
        document["first"] = [_listed(c) for c in firsts[:_ENDS]]
        if firsts != lasts:
            document["last"] = [_listed(c) for c in lasts[:_ENDS]]
        for name, holds in (
            ("soft", any(c.soft for c in new)),
            ("ended", any(c.until < END for c in new)),
            ("many", max(len(firsts), len(lasts)) > _ENDS),
        ):
            if holds:
                document[name] = True

    def replace_claims(
        self, timeline: int, gone: Collection[Claim], new: Collection[Claim]
    ) -> None:
        key = _key(timeline)
        document = self._timeline(key)
        taken = set(gone)
        held = self.claims({timeline: (BEGINNING, END)}).get(timeline, ())
        left = sorted([*(claim for claim in held if claim not in taken), *new])
        kept = {_claim_key(key, claim) for claim in new}
        self._claim_writes.extend(
            DeleteOne({"_id": old}) for c in gone if (old := _claim_key(key, c)) not in kept
        )
        for claim in new:
            made = _claim_document(key, claim)
            self._claim_writes.append(ReplaceOne({"_id": made["_id"]}, made, upsert=True))
        document.update(n=0, first=[])
        document.pop("last", None)
        self._extend(document, left)
        self._whole[key] = left

    def soft_claims(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, list[Claim]]:
        keys = {_key(handle): handle for handle in windows}
        self._load(keys)
        found: dict[int, list[Claim]] = {}
        unread: dict[bytes, tuple[int, int]] = {}
        for key, handle in keys.items():
            document = self._documents[key]
            if document is None or not document.get("soft"):
                continue
            if key in self._whole:
                found[handle] = self._whole[key]
            else:
                unread[key] = windows[handle]
        pending: dict[bytes, list[Claim]] = {}
        if unread:
            for made in self._new_claims:
                pending.setdefault(made["_id"][:DIGEST], []).append(_claim_of(made))
            ranges = [("claims", *_claim_range(key, *window)) for key, window in unread.items()]
            for key in unread:
                found[keys[key]] = list(pending.get(key, ()))
            for document in self._graph._union(ranges, self._session):
                found[keys[document["_id"][:DIGEST]]].append(_claim_of(document))
        return {
            handle: sorted(
                {c for c in claims if c.soft and windows[handle][0] <= c.time <= windows[handle][1]}
            )
            for handle, claims in found.items()
        }

    def claimed_by(self, identifiers: Collection[int]) -> set[int]:
        ranges = []
        for identifier in identifiers:
            key = _key(identifier)
            low, high = key + bytes(2 * DIGEST), key + b"\xff" * (2 * DIGEST)
            ranges.append(("claims", low, high))
        found = {d["_id"][DIGEST : 2 * DIGEST] for d in self._graph._union(ranges, self._session)}
        self._load(found)
        if any(self._documents[key] is None for key in found):
            # It was claimed after the snapshot: see `MongoGraph._union`.
            raise _AgainError("another worker claimed a device")
        return set(map(int.from_bytes, found))

    def barred(self, pairs: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        self._load({_key(timeline) for timeline, _ in pairs})
        found = set()
        for timeline, identifier in pairs:
            document = self._documents[_key(timeline)]
            if document is not None and _key(identifier) in document.get("barred", ()):
                found.add((timeline, identifier))
        return found

    def bar(self, timeline: int, identifier: int) -> None:
        document = self._timeline(_key(timeline))
        owner = _key(identifier)
        if owner not in document.get("barred", ()):
            document["barred"] = [*document.get("barred", ()), owner]

    def release(self, anonymous_id: str, until: int) -> None:
        document = self._timeline(self._workspace.digest(ANONYMOUS, anonymous_id))
        document["r"] = max(until, document.get("r", -1))

    # ---------------------------------------------------------------- identifiers

    def _digests(self, identifiers: Iterable[Identifier]) -> dict[Identifier, bytes]:
        known = self._workspace.known
        return {identifier: known(identifier) for identifier in identifiers}

    def identifiers(self, identifiers: Collection[Identifier]) -> dict[Identifier, Known]:
        keys = self._digests(identifiers)
        self._load(keys.values())
        return {
            identifier: _known(document)
            for identifier, key in keys.items()
            if (document := self._documents[key]) is not None and "t" in document
        }

    def held(self, handles: Collection[int]) -> dict[int, tuple[Identifier, Known]]:
        keys = {_key(handle): handle for handle in handles}
        self._load(keys)
        return {
            handle: (Identifier(document["t"], document["value"]), _known(document))
            for key, handle in keys.items()
            if (document := self._documents[key]) is not None and "t" in document
        }

    def seen_as(self, identifiers: Collection[int]) -> dict[int, str]:
        keys = {_key(handle): handle for handle in identifiers}
        self._load(keys)
        return {
            handle: str(document.get("as", document["value"]))
            for key, handle in keys.items()
            if (document := self._documents[key]) is not None and "t" in document
        }

    def add_identifiers(self, seen: Mapping[Identifier, tuple[Seen, str]]) -> dict[Identifier, int]:
        made = {}
        keys = self._digests(seen)
        self._load(keys.values())
        for identifier, (sighting, value) in seen.items():
            key = keys[identifier]
            before = self._documents[key] or {}
            document = {
                "_id": key,
                "w": self._workspace.name,
                "t": identifier.type,
                "value": identifier.value,
            }
            document.update({name: before[name] for name in ("gone", "v") if name in before})
            self._documents[key] = document
            made[identifier] = int.from_bytes(key)
            self._set_seen(key, sighting, value)
        return made

    def _identifier(self, key: bytes) -> _Document:
        """The document of a known identifier, to be changed."""
        self._load([key])
        document = self._documents[key]
        assert document is not None
        self._changed.add(key)
        return document

    def _set_seen(self, key: bytes, sighting: Seen, value: str) -> None:
        document = self._identifier(key)
        document["seen"] = [
            sighting.only_previous, sighting.time, pack_id(sighting.message_id),
        ]  # fmt: skip
        if value == document["value"]:
            document.pop("as", None)
        else:
            document["as"] = value

    def see(self, seen: Mapping[int, tuple[Seen, str]]) -> None:
        for handle, (sighting, value) in seen.items():
            self._set_seen(_key(handle), sighting, value)

    def set_persons(self, persons: Mapping[int, tuple[int, int]]) -> None:
        self._load(map(_key, persons))
        for handle, (component, canonical) in persons.items():
            document = self._identifier(_key(handle))
            document["c"] = _key(component)
            document["k"] = _key(canonical)

    def links(self, components: Collection[int]) -> dict[int, list[StoredLink]]:
        unread = [component for component in components if component not in self._links]
        if unread:
            self._links.update({component: {} for component in unread})
            for document in self._db["links"].find(
                {"c": {"$in": list(map(_key, unread))}}, session=self._session, batch_size=20_000
            ):
                if "m" in document:
                    component, link = _link_of(document)
                    self._links[component][link.a, link.b, link.alias] = link
            for component in unread:
                self._links[component].update(self._put_links.pop(component, {}))
            # All at once: whoever decides about a component asks for each of its members.
            held = [link for component in unread for link in self._links[component].values()]
            self._load({_key(handle) for link in held for handle in (link.a, link.b)})
        return {component: list(self._links[component].values()) for component in components}

    def put_links(
        self, component: int, absorbed: Collection[int], links: Iterable[StoredLink]
    ) -> None:
        self.links(absorbed)
        held = self._links.get(component)
        if held is None:  # a new one: not worth a round trip for each
            held = self._put_links.setdefault(component, {})
        moved: list[StoredLink] = []
        for other in absorbed:
            for link in self._links[other].values():
                key = _link_key(other, *link[:3])
                self._link_writes[key] = DeleteOne({"_id": key, "c": key[:DIGEST]})
                moved.append(link)
            self._links[other] = {}
        self._components.update((component, *absorbed))
        for link in (*moved, *links):
            held[link.a, link.b, link.alias] = link
            key = _link_key(component, *link[:3])
            self._link_writes[key] = ReplaceOne(
                {"_id": key, "c": _key(component)}, _link_document(component, link), upsert=True
            )

    def traits(self, identifiers: Collection[int]) -> dict[int, dict[str, Trait]]:
        keys = {_key(handle): handle for handle in identifiers}
        self._load(keys)
        return {
            handle: {name: _trait(rest) for name, *rest in document["traits"]}
            for key, handle in keys.items()
            if (document := self._documents[key]) is not None and document.get("traits")
        }

    def put_traits(self, traits: Mapping[int, Mapping[str, Trait]]) -> None:
        for handle, found in traits.items():
            self._identifier(_key(handle))["traits"] = [
                [name, t.time, pack_id(t.message_id), _packed_trait(t.value)]
                for name, t in sorted(found.items())
            ]

    def forgotten(self, identifiers: Collection[Identifier]) -> dict[Identifier, int]:
        names = [self._digests(identifiers)]
        if self._graph._has_earlier:
            earlier = earlier_digester(self._graph._salt, self._workspace.name)
            names.append({identifier: earlier(*identifier) for identifier in identifiers})
        self._load(key for keys in names for key in keys.values())
        found: dict[Identifier, int] = {}
        for keys in names:
            for identifier, key in keys.items():
                document = self._documents[key]
                if document is not None and "gone" in document:
                    found[identifier] = max(document["gone"], found.get(identifier, -1))
        return found

    def forget(self, identifiers: Mapping[Identifier, int], until: int) -> None:
        handles = {handle for handle in identifiers.values() if handle}
        components = {known.component for _, known in self.held(handles).values()} - {0}
        for component, links in self.links(components).items():
            for link in links:
                if link.a in handles or link.b in handles:
                    key = _link_key(component, *link[:3])
                    self._link_writes[key] = DeleteOne({"_id": key, "c": key[:DIGEST]})
                    del self._links[component][link.a, link.b, link.alias]
            self._components.add(component)
        for handle in handles:
            key = _key(handle)
            for timeline in self.claimed_by([handle]):
                self._claimant_writes[key + _key(timeline)] = False
            self._gone_subjects.add(key)
        keys = self._digests(identifiers)
        self._load(keys.values())
        for key in keys.values():
            before = self._documents[key] or {}
            self._documents[key] = {
                "_id": key,
                "w": self._workspace.name,
                "gone": max(until, before.get("gone", until)),
                **({"v": before["v"]} if before else {}),
            }
            self._changed.add(key)

    # ---------------------------------------------------------------- rows

    def rows(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, Rows]:
        # The rows of this batch are not there yet: they come as they are stamped. But where a
        # device was decided about since they are known, an update may be on its way to them.
        self._load(_key(abs(handle)) for handle in windows)
        own = {key for key in self._announced if self._version_of(key[:DIGEST]) <= self._since}
        found = self._graph._read_rows(windows, self._workspace, self._session, own)
        if any(handle > 0 for handle in windows):
            self._numbers = (0, 0)  # whoever has seen rows takes numbers later than they are known
        if self._tables is None:
            self._tables = set(self._workspace.tables)
        self.tables_seen |= self._tables
        for subject, (start, end) in windows.items():
            low, high = self.windows.get(subject, (start, end))
            self.windows[subject] = (min(low, start), max(high, end))
        for subject, rows in found.items():
            self.rows_seen[subject] = _joined(self.rows_seen.get(subject, _NO_ROWS), rows)
        return found

    def _version_of(self, key: bytes) -> int:
        document = self._documents.get(key)
        return 0 if document is None else int(document.get("v", 0))

    def add_references(self, references: Iterable[Reference]) -> None:
        # Those of identified rows alone; those of devices came first: rule 1.
        self._references.extend(
            (_key(-subject), tables, message_id, at)
            for subject, tables, message_id, at in references
        )

    def add_days(self, days: Iterable[Day]) -> None:
        raise NotImplementedError("days are written before a transaction begins: rule 1")

    def find(self, message_id: str) -> list[Sighting]:
        found: list[Sighting] = []
        workspace = self._workspace
        kept = self._days()
        for name in _ROWS:
            for document in self._db[name].find({}, session=self._session, batch_size=20_000):
                key = document["_id"]
                day, slot = _day(key), _slot(key)
                place = workspace.place_names.get(slot // 4)
                if slot % 4 == _DAY_KIND or day not in kept or place is None:
                    continue
                for _, packed in _references_in(document, slot % 4):
                    for other, at in unpack(slot % 4, packed, day * DAY):
                        if other == message_id:
                            sign = -1 if key[DIGEST - 1] & 1 else 1
                            subject = sign * int.from_bytes(key[:DIGEST])
                            found.append(Sighting(subject, at, place))
        packed_id = pack_id(message_id)
        tail = packed_id if isinstance(packed_id, bytes) else _hashed(message_id)
        for document in self._db["claims"].find({}, {"m": 1}, session=self._session):
            key = document["_id"][:DIGEST]
            if document["_id"].endswith(tail) and not key[-1] & 1:
                self._load([key])
                timeline = self._documents[key]
                if timeline is not None and timeline["w"] == workspace.name:
                    at = int.from_bytes(document["_id"][DIGEST : DIGEST + 8])
                    found.append(Sighting(int.from_bytes(key), at, ()))
        return found

    def tables(self) -> set[str]:
        if self._tables is None:
            self._days()
            self._tables = set(self._workspace.tables)
        return self._tables

    def _days(self) -> set[int]:
        session = None if self._session.in_transaction else self._session
        self._graph._refresh(self._workspace, session)
        return self._workspace.days or set()

    def note_tables(self, tables: Iterable[str]) -> None:
        if not self._reads_only:
            self._graph._note(self._workspace, set(tables), ())

    # ---------------------------------------------------------------- order

    def page(self, after: int, limit: int, *, known: bool) -> list[int]:
        chosen: _Document = {"_id": {"$gt": _key(after)}, "w": self._workspace.name}
        chosen |= {"t": {"$exists": True}} if known else {"n": {"$gt": 0}}
        found = self._db["subjects"].find(
            chosen, {"_id": 1}, session=self._session, sort=[("_id", 1)], limit=limit
        )
        return [int.from_bytes(document["_id"]) for document in found]

    def lock(self, timelines: Collection[int], identifiers: Collection[int]) -> None:
        self._locked.update(map(_key, timelines))
        self._locked.update(map(_key, identifiers))

    def last_sequence(self) -> int:
        found = self._db["meta"].find_one({"_id": "sequence"}) or {}
        return int(found.get("n", 0))

    def next_sequence(self) -> int:
        number, left = self._numbers
        if not left:
            number, left = self._graph._take_numbers(self._block), self._block
            self._block *= 4
        self._numbers = (number + 1, left - 1)
        self._workspace.last = max(self._workspace.last, number)
        return number

    @property
    def version(self) -> int:
        """What this transaction writes into all that it locks: later than its updates."""
        if not self._version:
            self._version = self.next_sequence()
        return self._version

    def versions(self, subjects: Collection[int]) -> dict[int, int]:
        found = {}
        changed = self._locked | self._changed
        for subject in subjects:
            key = _key(abs(subject))
            if key in changed:
                found[subject] = self.version
                continue
            found[subject] = (self._documents.get(key) or {}).get("v", 0)
        return found

    def emit(self, updates: Iterable[UpdateByCriteria]) -> None:
        self._updates.extend(updates)

    def decision(self) -> int:
        # A count would be one document that all workers write. Nobody's is equal to another's.
        return secrets.randbits(62)

    def decided(self) -> None:
        pass


_NO_ROWS = Rows({}, {})


# -------------------------------------------------------------------- keys and documents


def _key(handle: int) -> bytes:
    return handle.to_bytes(DIGEST)


def _handle(key: bytes) -> int:
    """The subject that a digest stands for: negative, where it is a known identifier."""
    return -int.from_bytes(key) if key[-1] & 1 else int.from_bytes(key)


def _meta(workspace: str) -> str:
    return f"workspace {workspace}"


def _hashed(message_id: str) -> bytes:
    return hashlib.blake2b(message_id.encode(), digest_size=16).digest()


def _day(key: bytes) -> int:
    return int.from_bytes(key[DIGEST : DIGEST + 3])


def _slot(key: bytes) -> int:
    """Of a row: four times its place, and how it is packed."""
    return int.from_bytes(key[DIGEST + 3 : DIGEST + 6])


def _is_kept(key: bytes, kept: Mapping[int, Collection[int]]) -> bool:
    """Whether a row is of a day that is kept, by the number of its place."""
    return _day(key) in kept.get(_slot(key) // 4, ())


def _rows_of(prefix: bytes) -> str:
    """The collection of a row, by the beginning of its key."""
    return _ROWS[_day(prefix) // PERIOD % SLOTS]


def _short(packed: bytes, kind: int) -> bytes:
    """20 bytes that stand for a reference that has another length."""
    moment = (int.from_bytes(packed[:5]) // 1000).to_bytes(4)
    if kind == UUID_US:
        return moment + packed[5:]
    return moment + hashlib.blake2b(packed, digest_size=16).digest()


def _row_ranges(
    windows: Mapping[int, tuple[int, int]], days: Iterable[int]
) -> list[tuple[str, Any, Any]]:
    """Where the rows of subjects in their windows are, of these days: collections and keys."""
    by_name: dict[str, list[int]] = {}
    for day in sorted(days):
        by_name.setdefault(_ROWS[day // PERIOD % SLOTS], []).append(day)
    ranges: list[tuple[str, Any, Any]] = []
    for handle, (start, end) in windows.items():
        subject = _key(abs(handle))
        for name, held in by_name.items():
            i, j = bisect_left(held, start // DAY), bisect_right(held, (end - 1) // DAY)
            if i < j:
                low = subject + held[i].to_bytes(3) + bytes(3 + _REST)
                high = subject + held[j - 1].to_bytes(3) + b"\xff" * (3 + _REST)
                ranges.append((name, low, high))
    return ranges


def _parts(chunk: Mapping[bytes, bytes]) -> Iterator[list[bytes]]:
    """References in their order, in parts that a document may hold."""
    part: list[bytes] = []
    size = 0
    for rest in sorted(chunk):
        if len(part) == _CHUNK or (part and size + len(chunk[rest]) > _CHUNK_BYTES):
            yield part
            part, size = [], 0
        part.append(rest)
        size += len(chunk[rest])
    yield part


def _chunk(prefix: bytes, rests: Sequence[bytes], chunk: Mapping[bytes, bytes]) -> _Document:
    """References of one subject, day and place: the first is in the key, if it fits there."""
    document: _Document = {"_id": prefix + rests[0]}
    inside = rests[1:] if prefix[-1] & 3 == UUID_MS else rests
    if inside:
        document["r"] = b"".join([chunk[rest] for rest in inside])
    return document


def _references_in(document: _Document, kind: int) -> Iterator[tuple[bytes, bytes]]:
    """The references of a chunk: as they end a key, and as they are packed."""
    packed: bytes = document.get("r", b"")
    if kind == UUID_MS:
        first = document["_id"][-_REST:]
        yield first, first
        for start in range(0, len(packed), _REST):
            yield packed[start : start + _REST], packed[start : start + _REST]
        return
    position = 0
    while position < len(packed):
        size = 21
        if kind == TEXT:
            size = 7 + int.from_bytes(packed[position + 5 : position + 7])
        one = packed[position : position + size]
        yield _short(one, kind), one
        position += size


def _joined(a: Rows, b: Rows) -> Rows:
    return Rows(
        {t: {**a.references.get(t, {}), **b.references.get(t, {})} for t in {**a[0], **b[0]}},
        {t: {*a.days.get(t, ()), *b.days.get(t, ())} for t in {**a[1], **b[1]}},
    )


def _beside(rows: Rows, known: Rows) -> Rows:
    """What is in rows, and not in what was known."""
    references = {
        tables: {m: at for m, at in refs.items() if m not in known.references.get(tables, ())}
        for tables, refs in rows.references.items()
    }
    days = {
        tables: set(found) - set(known.days.get(tables, ())) for tables, found in rows.days.items()
    }
    return Rows(
        {tables: refs for tables, refs in references.items() if refs},
        {tables: found for tables, found in days.items() if found},
    )


def _claim_key(timeline: bytes, claim: Claim, packed: bytes | str | None = None) -> bytes:
    if packed is None:
        packed = pack_id(claim.message_id)
    tail = packed if isinstance(packed, bytes) else _hashed(packed)
    return timeline + claim.time.to_bytes(8) + tail


def _claim_range(timeline: bytes, low: int, high: int) -> tuple[bytes, bytes]:
    start, end = max(low, BEGINNING), max(min(high, END), BEGINNING)
    return timeline + start.to_bytes(8) + bytes(16), timeline + end.to_bytes(8) + b"\xff" * 16


def _claim_document(timeline: bytes, claim: Claim) -> _Document:
    packed = pack_id(claim.message_id)
    document: _Document = {"_id": _claim_key(timeline, claim, packed)}
    if isinstance(packed, str):
        document["m"] = packed
    if isinstance(claim.owner, int):
        document["o"] = _key(claim.owner)
    if claim.until < END:
        document["until"] = claim.until
    if claim.soft:
        document["soft"] = True
    return document


def _claim_of(document: _Document) -> Claim:
    key: bytes = document["_id"]
    owner = document.get("o")
    return Claim(
        int.from_bytes(key[DIGEST : DIGEST + 8]),
        document["m"] if "m" in document else unpack_id(key[DIGEST + 8 :]),
        None if owner is None else int.from_bytes(owner),
        document.get("until", END),
        document.get("soft", False),
    )


def _last(document: _Document) -> list[Any]:
    """The claims at the last instant of a timeline; where it has one instant, it is the first."""
    found: list[Any] = document["last" if "last" in document else "first"]
    return found


def _listed(claim: Claim) -> list[Any]:
    """A claim as the document of its timeline repeats it."""
    owner = _key(claim.owner) if isinstance(claim.owner, int) else None
    until = claim.until if claim.until < END else None
    return [claim.time, pack_id(claim.message_id), owner, until, claim.soft]


def _claim(listed: Sequence[Any]) -> Claim:
    at, message, owner, until, soft = listed
    return Claim(
        at,
        unpack_id(message),
        None if owner is None else int.from_bytes(owner),
        END if until is None else until,
        soft,
    )


def _known(document: _Document) -> Known:
    handle = int.from_bytes(document["_id"])
    only_previous, at, message = document["seen"]
    component = int.from_bytes(document["c"]) if "c" in document else 0
    canonical = int.from_bytes(document["k"]) if "k" in document else handle
    return Known(handle, Seen(only_previous, at, unpack_id(message)), component, canonical)


def _link_key(component: int, a: int, b: int, alias: bool) -> bytes:
    return _key(component) + _key(a) + _key(b) + (b"\x01" if alias else b"\x00")


def _link_document(component: int, link: StoredLink) -> _Document:
    return {
        "_id": _link_key(component, *link[:3]),
        "c": _key(component),
        "at": link.time,
        "m": pack_id(link.message_id),
        "unlinked": link.unlinked,
        "r": link.refused,
    }


def _link_of(document: _Document) -> tuple[int, StoredLink]:
    key: bytes = document["_id"]
    component, a, b = (
        int.from_bytes(key[start : start + DIGEST]) for start in range(0, 3 * DIGEST, DIGEST)
    )
    return component, StoredLink(
        a,
        b,
        bool(key[-1]),
        document["at"],
        unpack_id(document["m"]),
        document["unlinked"],
        document["r"],
    )


def _packed_trait(value: str | int | float | bool) -> Any:
    # BSON has 64 bits for an integer.
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return {"integer": str(value)}
    return value


def _trait(stored: Sequence[Any]) -> Trait:
    at, message, value = stored
    if isinstance(value, dict):
        value = int(value["integer"])
    elif isinstance(value, Int64):
        value = int(value)
    return Trait(at, unpack_id(message), value)


# -------------------------------------------------------------------- the server


def _progress(destination: str) -> str:
    """What comes before the names of the fields that say how far a destination is."""
    return f"{_PROGRESS}.{destination}." if destination else ""


def _part(document: _Document, destination: str) -> _Document:
    part: _Document = document
    if destination:
        part = document.get(_PROGRESS, {}).get(destination, {})
    return part


def _dead_of(destination: str) -> _Document:
    return {f"{_progress(destination)}until": _DEAD}


def _delivery(document: _Document, destination: str, this: int) -> Delivery:
    """``this``: the leases that are counted and do not lie before."""
    part = _part(document, destination)
    body = parse_update(document["body"])
    return Delivery(document["_id"], body, part["n"] - this, part.get("applied", False))


def _connect(url: str, timeout: float) -> MongoClient[_Document]:
    given = {option.lower() for option in _options(url)}
    wanted: dict[str, Any] = {
        "appname": "recognition",
        # One try of choosing a server; a call tries again until its own time is over.
        "serverSelectionTimeoutMS": round(min(timeout, 10) * 1000),
        "connectTimeoutMS": 5_000,
        "socketTimeoutMS": 60_000,
        "wTimeoutMS": round(timeout * 1000),
    }
    extra = {k: v for k, v in wanted.items() if k.lower() not in given}
    with _only_urls():
        # Whatever the URL says, nothing less than this keeps the protocol.
        return MongoClient(url, retryWrites=True, retryReads=True, tz_aware=True, **extra)


def _name_in(url: str) -> str:
    """The database that a URL names."""
    with _only_urls():
        return uri_parser.parse_uri(url, warn=False)["database"] or "recognition"


@contextmanager
def _only_urls() -> Iterator[None]:
    try:
        yield
    except (InvalidURI, InvalidName, DriverConfigurationError, ValueError) as exc:
        raise ConfigurationError(
            "this is no URL of a MongoDB database:"
            " mongodb://user:password@host:port/database?replicaSet=name"
            f" ({type(exc).__name__}). Nothing was written."
        ) from None


def _options(url: str) -> Iterable[str]:
    query = url.partition("?")[2]
    return [part.partition("=")[0] for part in query.split("&") if part]


def _database(client: MongoClient[_Document], name: str) -> Database[_Document]:
    return client.get_database(
        name,
        read_preference=ReadPreference.PRIMARY,
        write_concern=_MAJORITY,
        read_concern=ReadConcern("majority"),
    )


def _check_server(client: MongoClient[_Document]) -> bool:
    """Whether it is a sharded cluster."""
    hello = client.admin.command("hello")
    version = hello.get("maxWireVersion", 0)
    if version < 17:  # 6.0
        found = client.server_info()["version"]
        raise ConfigurationError(
            f"the server is MongoDB {found}; 6.0 or newer is needed. Nothing was written."
        )
    if "setName" not in hello and hello.get("msg") != "isdbgrid":
        raise ConfigurationError(
            "the server is no member of a replica set, and without one MongoDB has no transactions"
            " and no majority. Start it with --replSet rs0 and run once, in mongosh:"
            " rs.initiate(); one member is enough. Nothing was written."
        )
    return bool(hello.get("msg") == "isdbgrid")


def _prepare(database: Database[_Document]) -> _Document:
    """Make what is missing, check what is there; gives the schema."""
    schema = database["meta"].find_one({"_id": "schema"})
    if schema is None:
        _initialise(database)
        schema = database["meta"].find_one({"_id": "schema"}) or {}
    _check_schema(schema)
    if wrong := _differences(database):
        raise GraphSchemaError(
            f"the database is not as a graph needs it: {'; '.join(wrong)}."
            " Run `recognition graph init`. Nothing was written."
        )
    return schema


def _differences(database: Database[_Document]) -> list[str]:
    """What `_initialise` would have made otherwise."""
    there = {found["name"]: found.get("options", {}) for found in database.list_collections()}
    missing = [f"collection {name} is missing" for name in COLLECTIONS if name not in there]
    return missing + _of_another_kind(there)


def _of_another_kind(there: Mapping[str, Mapping[str, Any]]) -> list[str]:
    wrong = []
    for name in COLLECTIONS:
        if name in there and (name in _CLUSTERED) != ("clusteredIndex" in there[name]):
            wanted = "clustered by _id" if name in _CLUSTERED else "an ordinary one"
            wrong.append(f"collection {name} is not {wanted}")
    return wrong


def _sharding(name: str, chunks: int = 16) -> list[dict[str, Any]]:
    """
    The commands that distribute a graph: ranges of digests, which are random from the first byte.

    Whatever is read or written in the hot path names a digest, and so one shard. `outbox`, `dead`
    and `meta` stay on the first shard: they are small, and read in order.
    """
    commands: list[dict[str, Any]] = []
    for collection in ("subjects", "links", "claims", *_ROWS):
        key = "c" if collection == "links" else "_id"
        commands.append({"shardCollection": f"{name}.{collection}", "key": {key: 1}})
        size = _KEY_SIZES.get(collection, DIGEST + 6 + _REST)
        for part in range(1, chunks):
            middle = bytes((part * 256 // chunks,)) + bytes(size - 1)
            commands.append({"split": f"{name}.{collection}", "middle": {key: middle}})
    return commands


def _shard(client: MongoClient[_Document], name: str) -> str:
    commands = _sharding(name)
    with _translated():
        for command in commands:
            try:
                client.admin.command(command)
            except OperationFailure as exc:
                # Sharded with this key before, or split at this key: what the second time finds.
                if exc.code not in (20, 23, 72):
                    raise
    return f"{len(commands)} commands to distribute the collections were carried out"


def _as_typed(command: Mapping[str, Any]) -> str:
    """A command as mongosh takes it."""

    def typed(value: Any) -> str:
        if isinstance(value, bytes):
            return f'BinData(0, "{base64.b64encode(value).decode()}")'
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{k}: {typed(v)}" for k, v in value.items()) + "}"
        return json.dumps(value)

    return f"db.adminCommand({typed(command)})"


def _check_schema(schema: Mapping[str, Any]) -> None:
    version = schema.get("version")
    if schema.get("application") != "recognition":
        raise GraphSchemaError(
            "the database has a collection `meta` of somebody else; name another database."
            " Nothing was written."
        )
    if version != SCHEMA_VERSION:
        raise GraphSchemaError(
            f"the graph has schema version {version}, this release needs {SCHEMA_VERSION}."
            " Nothing was written."
        )


def _initialise(database: Database[_Document]) -> None:
    """Make all collections; whoever is there first gives the salt. Again it changes nothing."""
    there = {found["name"]: found.get("options", {}) for found in database.list_collections()}
    if "meta" in there and database["meta"].find_one() is not None:
        schema = database["meta"].find_one({"_id": "schema"})
        if schema is None:
            foreign = sorted(set(there) & set(COLLECTIONS))
            raise GraphSchemaError(
                "the database holds no recognition graph, but collections with the names of one"
                f" ({', '.join(foreign)}); name another database. Nothing was written."
            )
    elif set(there) & set(COLLECTIONS):
        filled = [
            name
            for name in sorted(set(there) & set(COLLECTIONS))
            if database[name].find_one({}, {"_id": 1}) is not None
        ]
        if database["meta"].find_one({"_id": "schema"}) is not None:
            return  # another process was first, and has begun to work
        if filled:
            raise GraphSchemaError(
                "the database holds no recognition graph, but collections with the names of one"
                f" ({', '.join(filled)}); name another database. Nothing was written."
            )
    if wrong := _of_another_kind(there):
        raise GraphSchemaError(
            "the database holds no recognition graph, but collections with the names of one"
            f" ({'; '.join(wrong)}); name another database. Nothing was written."
        )
    for name in COLLECTIONS:
        if name not in there:
            _create(database, name, clustered=name in _CLUSTERED)
    database["links"].create_index([("c", 1)], name="component")
    made = {
        "application": "recognition",
        "version": SCHEMA_VERSION,
        "salt": secrets.token_bytes(32),
        "period": PERIOD,
        "slots": SLOTS,
    }
    with suppress(DuplicateKeyError):  # another process was first
        database["meta"].update_one({"_id": "schema"}, {"$setOnInsert": made}, upsert=True)


def _create(database: Database[_Document], name: str, *, clustered: bool) -> None:
    options: dict[str, Any] = {}
    if clustered:
        options["clusteredIndex"] = {"key": {"_id": 1}, "unique": True}
    if name not in ("outbox", "meta"):
        # A quarter less than snappy on random ids; see docs/benchmarks.md.
        options["storageEngine"] = {"wiredTiger": {"configString": "block_compressor=zstd"}}
    try:
        database.create_collection(name, check_exists=False, **options)
    except OperationFailure as exc:
        if exc.code != 48:  # NamespaceExists: another process was first
            raise


_DENIED = (13, 8000)  # Unauthorized, Atlas' own
_REFUSED = 18  # AuthenticationFailed


@contextmanager
def _translated(*, again: bool = False) -> Iterator[None]:
    """Give the driver's errors their place in our tree."""
    try:
        yield
    except (_AgainError, GraphError, ConfigurationError):
        raise
    except PyMongoError as exc:
        code = getattr(exc, "code", None)
        if isinstance(exc, OperationFailure) and code == _REFUSED:
            raise ConfigurationError(
                "the server refused the user or the password of the URL; where the user is not kept"
                " in the database that the URL names, it needs authSource. Nothing was written."
            ) from exc
        if isinstance(exc, OperationFailure) and code in _DENIED:
            raise GraphReadOnlyError(
                "the user may not do what the graph needs: it reads and writes its database, and"
                " makes its collections the first time (role readWrite). Nothing was written."
            ) from exc
        if code in (20, 263) and "replica set" in str(exc):
            raise ConfigurationError(
                "transactions need a replica set: start mongod with --replSet, then rs.initiate()."
                " Nothing was written."
            ) from exc
        if code in (239, 246):
            raise GraphError(
                "a reader was open for longer than the server keeps its moment (5 minutes);"
                " read a smaller part. Nothing was written."
            ) from exc
        if (
            isinstance(exc, ConnectionFailure)
            or exc.has_error_label("RetryableWriteError")
            or (exc.has_error_label("TransientTransactionError"))
            or getattr(exc, "timeout", False)
        ):
            if again:
                raise _AgainError(_describe(exc)) from exc
            raise GraphUnavailableError(
                f"no primary of the graph could be reached ({_describe(exc)})."
                " Nothing was written; the same call again is safe."
            ) from exc
        raise GraphError(
            f"MongoDB failed ({_describe(exc)}). Nothing of the decision was written."
        ) from exc


def _describe(exc: PyMongoError) -> str:
    """What failed, without values or addresses."""
    name = None
    if isinstance(exc, OperationFailure) and isinstance(exc.details, Mapping):
        name = exc.details.get("codeName")
        errors = exc.details.get("writeErrors")
        if name is None and errors:
            name = f"code {errors[0].get('code')}"
    return f"{type(exc).__name__}{f' {name}' if name else ''}"
