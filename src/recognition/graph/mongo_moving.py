"""
How a graph leaves MongoDB and enters it: between its documents and the records of `moving`.

Everything is read in one snapshot, which the server keeps for five minutes unless it is told
otherwise (``minSnapshotHistoryWindowInSeconds``): a larger graph is exported with a longer window.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pymongo import ReplaceOne, UpdateOne
from pymongo.client_session import ClientSession

from recognition.attribution import DAY, END, Claim
from recognition.errors import ConfigurationError, InputError, RecognitionError
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
from recognition.graph.packing import DIGEST, pack_id, unpack, unpack_id
from recognition.graph.store import StoredLink
from recognition.messages import parse_update

if TYPE_CHECKING:
    from recognition.graph.mongo import MongoGraph

_Document = dict[str, Any]

# Documents that are written by one command.
_BATCH = 2_000


def export(graph: MongoGraph, session: ClientSession) -> Iterator[Record]:
    """All records of a graph, in the order of `moving`, of the session's moment."""
    from recognition.graph import mongo

    def read(name: str, chosen: _Document) -> Iterator[_Document]:
        found = graph._db[name].find(chosen, session=session, batch_size=20_000)
        return iter(found.sort("_id", 1))

    sequence = next(read("meta", {"_id": "sequence"}), {"n": 0})
    yield GraphRecord(salt=graph._salt, sequence=sequence["n"])
    places: dict[int, tuple[str, tuple[str, ...], set[int]]] = {}
    for found in read("meta", {"_id": {"$regex": "^workspace "}}):
        name = found["_id"].partition(" ")[2]
        days = set(found.get("days", ()))
        for place in found.get("places", ()):
            places[place["n"]] = (name, tuple(place["tables"]), days)
        yield WorkspaceRecord(
            name=name,
            rules=found.get("rules"),
            tables=tuple(sorted(found.get("tables", ()))),
        )
    for found in read("subjects", {"t": {"$exists": True}}):
        only_previous, at, message = found["seen"]
        yield IdentifierRecord(
            workspace=found["w"],
            digest=found["_id"],
            type=found["t"],
            value=found["value"],
            seen_as=found.get("as"),
            seen=MovedSeen(only_previous, at, unpack_id(message)),
            component=found.get("c"),
            canonical=found["k"] if "k" in found else found["_id"],
            traits={
                trait: MovedTrait(*mongo._trait(rest)) for trait, *rest in found.get("traits", ())
            },
        )
    workspaces = _workspaces_of(graph, session)
    for found in read("links", {"m": {"$exists": True}}):
        component, link = mongo._link_of(found)
        a, b = (handle.to_bytes(DIGEST) for handle in (link.a, link.b))
        yield LinkRecord(
            workspace=workspaces(a),
            component=component.to_bytes(DIGEST),
            a=a,
            b=b,
            alias=link.alias,
            time=link.time,
            message_id=link.message_id,
            unlinked=link.unlinked,
            refused=link.refused,
        )
    for found in read("subjects", {"gone": {"$exists": True}}):
        yield ForgottenRecord(workspace=found.get("w"), digest=found["_id"], until=found["gone"])
    claims = groupby(
        (d for d in read("claims", {}) if not d["_id"][DIGEST - 1] & 1),
        key=lambda document: document["_id"][:DIGEST],
    )
    timeline, held = next(claims, (b"", iter(())))
    for found in read("subjects", {"a": {"$exists": True}}):
        while timeline and timeline < found["_id"]:
            timeline, held = next(claims, (b"", iter(())))
        told = held if timeline == found["_id"] else iter(())
        parts = _parts(mongo._claim_of(document) for document in told)
        for part in parts or [[]]:
            yield TimelineRecord(
                workspace=found["w"],
                digest=found["_id"],
                anonymous_id=None if found["a"] is None else unpack_id(found["a"]),
                released_until=found.get("r"),
                barred=tuple(found.get("barred", ())),
                claims=tuple(map(_moved, part)),
            )
    for name in mongo._ROWS:
        rows = (d for d in read(name, {}) if mongo._slot(d["_id"]) // 4 in places)
        for subject, documents in groupby(rows, key=lambda document: document["_id"][:DIGEST]):
            yield from _rows_of(subject, documents, places)
    waiting = ((d["_id"], d, None) for d in read("outbox", {"_id": {"$gt": 0}}))
    dead = ((d["_id"], d, d["reason"]) for d in read("dead", {}))
    for position, found, reason in heapq.merge(waiting, dead, key=lambda update: update[0]):
        yield UpdateRecord(
            position=position,
            attempts=found["n"],
            dead=reason,
            body=parse_update(found["body"]),
        )


def _workspaces_of(graph: MongoGraph, session: ClientSession) -> Any:
    """Tells the workspace of an identifier; those that were asked for last are kept."""
    known: dict[bytes, str] = {}

    def workspace_of(digest: bytes) -> str:
        if digest not in known:
            if len(known) > 100_000:
                known.clear()
            found = graph._db["subjects"].find_one({"_id": digest}, {"w": 1}, session=session)
            known[digest] = str((found or {}).get("w", ""))
        return known[digest]

    return workspace_of


def _rows_of(
    subject: bytes,
    documents: Iterable[_Document],
    places: dict[int, tuple[str, tuple[str, ...], set[int]]],
) -> Iterator[RowsRecord]:
    from recognition.graph import mongo

    held: dict[int, tuple[list[MovedReference], list[int]]] = {}

    def tell(place: int) -> RowsRecord:
        workspace, tables, _ = places[place]
        references, days = held.pop(place)
        return RowsRecord(
            workspace=workspace,
            subject=subject,
            tables=tables,
            references=tuple(references),
            days=tuple(days),
        )

    for document in documents:
        day, slot = mongo._day(document["_id"]), mongo._slot(document["_id"])
        place, kind = divmod(slot, 4)
        if day not in places[place][2]:
            continue
        if kind == mongo._DAY_KIND:
            held.setdefault(place, ([], []))[1].append(day)
        else:
            for _, packed in mongo._references_in(document, kind):
                for message_id, at in unpack(kind, packed, day * DAY):
                    references = held.setdefault(place, ([], []))[0]
                    references.append(MovedReference(message_id, at))
                    if len(references) == PART:
                        yield tell(place)
        if place in held and len(held[place][1]) == PART:
            yield tell(place)
    for place in list(held):
        yield tell(place)


def _parts(claims: Iterable[Claim]) -> list[list[Claim]] | Iterator[list[Claim]]:
    parts: list[list[Claim]] = []
    for claim in claims:
        if not parts or len(parts[-1]) == PART:
            parts.append([])
        parts[-1].append(claim)
    return parts


def _moved(claim: Claim) -> MovedClaim:
    owner = claim.owner.to_bytes(DIGEST) if isinstance(claim.owner, int) else None
    until = None if claim.until == END else claim.until
    return MovedClaim(claim.time, claim.message_id, owner, until, claim.soft)


def take_in(graph: MongoGraph, records: Iterable[Record], *, restart: bool) -> int:
    """Fill an empty graph; see `Graph.take_in`."""
    iterator = iter(records)
    head = next(iterator, None)
    if not isinstance(head, GraphRecord):
        raise InputError("an exported graph begins with its GraphRecord. Nothing was written.")
    _begin(graph, head, restart=restart)
    count = 1
    try:
        with graph._client.start_session(causal_consistency=True) as session:
            writing = _Writing(graph, session, head.sequence)
            for record in iterator:
                writing.take(record)
                count += 1
            writing.finish()
    except RecognitionError as exc:
        exc.written = True
        exc.add_note("What was taken in so far is of no use alone: begin again, with restart.")
        raise
    return count


def _begin(graph: MongoGraph, head: GraphRecord, *, restart: bool) -> None:
    from recognition.graph import mongo

    db = graph._db
    begun = (db["meta"].find_one({"_id": "schema"}) or {}).get("taking_in", False)
    if begun and not restart:
        raise ConfigurationError(
            "an earlier import into this graph did not come to its end; begin again with restart."
            " Nothing was written."
        )
    others = {"_id": {"$ne": "schema"}}
    if not begun:
        filled = [n for n in mongo.COLLECTIONS if db[n].find_one(others, {"_id": 1}) is not None]
        if filled:
            raise ConfigurationError(
                "the graph is not empty; import into a database of its own. Nothing was written."
            )
    state = {"salt": head.salt, "taking_in": True}
    db["meta"].update_one({"_id": "schema"}, {"$set": state})
    for name in mongo.COLLECTIONS:
        db[name].delete_many(others)
    graph._use_salt(head.salt)


class _Writing:
    """Records become documents, which are written many at a time."""

    def __init__(self, graph: MongoGraph, session: ClientSession, sequence: int) -> None:
        self._graph = graph
        self._session = session
        self._sequence = sequence
        self._waiting: dict[str, list[Any]] = {}
        self._timeline: _Document | None = None
        self._references: dict[str, list[tuple[bytes, tuple[str, ...], str, int]]] = {}
        self._days: dict[str, set[tuple[bytes, tuple[str, ...], int]]] = {}

    def _put(self, name: str, write: Any) -> None:
        writes = self._waiting.setdefault(name, [])
        writes.append(write)
        if len(writes) >= _BATCH:
            self._flush(name)

    def _flush(self, name: str) -> None:
        writes = self._waiting.pop(name, [])
        if writes:
            self._graph._patiently(
                lambda: self._graph._db[name].bulk_write(
                    writes, ordered=name == "subjects", session=self._session
                )
            )

    def take(self, record: Record) -> None:
        from recognition.graph import mongo

        if self._timeline is not None and (
            not isinstance(record, TimelineRecord) or record.digest != self._timeline["_id"]
        ):
            self._end_timeline()
        match record:
            case WorkspaceRecord():
                fields = {"tables": list(record.tables)}
                rules = {"rules": record.rules} if record.rules is not None else {}
                key = mongo._meta(record.name)
                self._replace("meta", {"_id": key, **fields, **rules})
            case IdentifierRecord():
                self._identifier(record)
            case LinkRecord():
                link = StoredLink(
                    int.from_bytes(record.a),
                    int.from_bytes(record.b),
                    record.alias,
                    record.time,
                    record.message_id,
                    record.unlinked,
                    record.refused,
                )
                self._replace("links", mongo._link_document(int.from_bytes(record.component), link))
            case ForgottenRecord():
                gone: _Document = {"gone": record.until}
                made: _Document = {"v": self._sequence}
                if record.workspace is not None:
                    made["w"] = record.workspace
                else:
                    self._graph._remember_earlier()
                update = {"$max": gone, "$setOnInsert": made}
                self._put("subjects", UpdateOne({"_id": record.digest}, update, upsert=True))
            case TimelineRecord():
                self._claims(record)
            case RowsRecord():
                self._rows(record)
            case UpdateRecord():
                document = {
                    "_id": record.position,
                    "w": record.body.workspace,
                    "body": record.body.model_dump_json(),
                    "n": record.attempts,
                    "until": mongo._NEVER,
                }
                if record.dead is None:
                    self._replace("outbox", document)
                else:
                    self._replace("dead", {**document, "reason": record.dead})
            case _:
                raise InputError(f"a record of kind {record.kind} comes too late")

    def _replace(self, name: str, document: _Document) -> None:
        key = {"_id": document["_id"]}
        if name == "links":
            key["c"] = document["c"]
        self._put(name, ReplaceOne(key, document, upsert=True))

    def _identifier(self, record: IdentifierRecord) -> None:
        from recognition.graph import mongo

        document: _Document = {
            "_id": record.digest,
            "w": record.workspace,
            "t": record.type,
            "value": record.value,
            "seen": [record.seen.only_previous, record.seen.time, pack_id(record.seen.message_id)],
            "v": self._sequence,
        }
        if record.seen_as is not None:
            document["as"] = record.seen_as
        if record.component is not None:
            document["c"] = record.component
        if record.canonical != record.digest:
            document["k"] = record.canonical
        if record.traits:
            document["traits"] = [
                [name, t.time, pack_id(t.message_id), mongo._packed_trait(t.value)]
                for name, t in sorted(record.traits.items())
            ]
        self._replace("subjects", document)

    def _claims(self, record: TimelineRecord) -> None:
        from recognition.graph import mongo

        if self._timeline is None:
            value = record.anonymous_id
            self._timeline = {
                "_id": record.digest,
                "w": record.workspace,
                "a": None if value is None else pack_id(value),
                "n": 0,
                "first": [],
                "v": self._sequence,
            }
            if record.released_until is not None:
                self._timeline["r"] = record.released_until
            if record.barred:
                self._timeline["barred"] = list(record.barred)
        claims = [
            Claim(
                moved.time,
                moved.message_id,
                None if moved.owner is None else int.from_bytes(moved.owner),
                END if moved.until is None else moved.until,
                moved.soft,
            )
            for moved in record.claims
        ]
        mongo._MongoStore._extend(self._timeline, claims)
        for claim in claims:
            self._replace("claims", mongo._claim_document(record.digest, claim))
        for owner in {moved.owner for moved in record.claims} - {None}:
            assert owner is not None
            self._replace("claims", {"_id": owner + record.digest + bytes(DIGEST)})

    def _end_timeline(self) -> None:
        assert self._timeline is not None
        self._replace("subjects", self._timeline)
        self._timeline = None

    def _rows(self, record: RowsRecord) -> None:
        references = self._references.setdefault(record.workspace, [])
        references.extend((record.subject, record.tables, m, at) for m, at in record.references)
        days = self._days.setdefault(record.workspace, set())
        days.update((record.subject, record.tables, day) for day in record.days)
        if len(references) + len(days) >= _BATCH:
            self._flush_rows(record.workspace)

    def _flush_rows(self, name: str) -> None:
        self._flush("meta")
        graph = self._graph
        workspace = graph._workspace(name)
        references, days = self._references.pop(name, []), self._days.pop(name, set())
        if references:
            graph._patiently(lambda: graph._write_references(workspace, references, self._session))
        if days:
            graph._patiently(lambda: graph._write_days(workspace, days, self._session))

    def finish(self) -> None:
        if self._timeline is not None:
            self._end_timeline()
        for name in list(self._waiting):
            self._flush(name)
        for name in {*self._references, *self._days}:
            self._flush_rows(name)
        meta = self._graph._db["meta"]
        key, fields = {"_id": "sequence"}, {"$max": {"n": self._sequence}}
        self._graph._patiently(lambda: meta.update_one(key, fields, upsert=True))
        done = {"$unset": {"taking_in": ""}}
        self._graph._patiently(lambda: meta.update_one({"_id": "schema"}, done))
