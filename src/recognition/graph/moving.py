"""
How a graph leaves one backend and enters another: records, and how they travel as lines.

An exported graph is NDJSON in UTF-8, one JSON object a line, version 1:

==============  ====================================================================================
kind            further keys
==============  ====================================================================================
``graph``       ``version``: 1; ``salt``: hexadecimal; ``sequence``: the greatest number that was
                given to an update or to a stamped row so far
``workspace``   ``name``; ``rules``: `Rules.fingerprint` of its first decision, null before it;
                ``tables``: all that rows were ever seen for
``identifier``  ``workspace``; ``digest``; ``type``; ``value``: normalised; ``seen_as``: the value
                as it was seen first, null where it is the same; ``seen``: [only as a previous id,
                time, message id] of the first sighting; ``component``: a name of the set of links
                that it is part of, null for none; ``canonical``: the digest of its person's
                canonical identifier, its own where it stands alone; ``traits``: {name: [time,
                message id, value]}
``link``        ``workspace``; ``component``; ``a``, ``b``: digests; ``alias``; ``time``;
                ``message_id``; ``unlinked``; ``refused``: why it does not hold, or empty
``forgotten``   ``workspace``: null where it is not known; ``digest``: of an identifier;
                ``until``: the last moment that this is about
``timeline``    ``workspace``; ``digest``; ``anonymous_id``: may be null where it was never claimed;
                ``released_until``: null where it was never released; ``barred``: digests of
                identifiers that never claim it again; ``claims``: [time, message id, digest of the
                owner or null, until or null, soft], as `attribution.Claim`
``rows``        ``workspace``; ``subject``: digest of an anonymous id or a known identifier;
                ``tables``; ``references``: [message id, time]; ``days``: days since 1970-01-01
``update``      ``position``; ``attempts``; ``dead``: the reason, null while it waits; ``body``: the
                message
``end``         ``lines``: how many there are before this one
==============  ====================================================================================

* The first line is the ``graph``, the last one the ``end``; a file without it is not whole. The
  others come in the order of the table: what a record names is said before it, but for
  ``canonical``.
* A digest is made by `packing.digester` with the salt of the first line, and written as 24
  hexadecimal digits; its last bit is 0 for an anonymous id, 1 for a known identifier. The salt
  moves along, so that digests stay what they are. One of 32 digits, of somebody forgotten, was made
  by `packing.earlier_digester`.
* A component is 24 hexadecimal digits that mean nothing but "the same set of links".
* Times are microseconds since 1970-01-01 UTC. Only who was unlinked before it was seen has the
  greatest of 64 bits, and an empty message id.
* A timeline is told if it was claimed, released or barred; any other is known by its rows alone.
  Who is barred, and is no identifier of this file, was forgotten: that means nothing any more.
  An ``until`` of -1 is that of a claim without any effect.
* A timeline of many claims, and a subject of many rows, take several lines; each names a part of at
  most `PART` claims or rows, and repeats the rest. So only an update makes a line long, and that is
  bounded by `MAX_LINE`.
* Updates come by position, which grows with their sequence; no position is greater than the
  ``sequence`` of the first line.
* What is leased is told as waiting: whoever moves a graph has stopped those who deliver from it.

The lines hold everything that identifies people, and the salt: they are as secret as the graph.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from recognition.errors import InputError
from recognition.graph.packing import DIGEST, EARLIER_DIGEST, digester
from recognition.identity import ANONYMOUS
from recognition.messages import UpdateByCriteria

VERSION = 1

#: How far the numbers of a restored graph go on. More than any graph gives between two backups, and
#: 8,000 times it is still exact where numbers are doubles (2^53).
RESTORED_AHEAD = 2**40

#: The most claims or rows that one line names.
PART = 1_000

#: Bytes of the longest line that is read. An update names 10,000 messages, more where many are of
#: the same microsecond.
MAX_LINE = 64 * 1024 * 1024


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError("hexadecimal digits are text")
    try:
        return bytes.fromhex(value)
    except ValueError:
        raise ValueError("these are no hexadecimal digits") from None


def _digest_of(value: Any) -> bytes:
    found = _bytes_of(value)
    if len(found) != DIGEST:
        raise ValueError(f"a digest has {2 * DIGEST} hexadecimal digits")
    return found


def _any_digest_of(value: Any) -> bytes:
    found = _bytes_of(value)
    if len(found) not in (DIGEST, EARLIER_DIGEST):
        raise ValueError(f"a digest has {2 * DIGEST} or {2 * EARLIER_DIGEST} hexadecimal digits")
    return found


_hex = PlainSerializer(bytes.hex, return_type=str)
Salt = Annotated[bytes, PlainValidator(_bytes_of), _hex]
Digest = Annotated[bytes, PlainValidator(_digest_of), _hex]
AnyDigest = Annotated[bytes, PlainValidator(_any_digest_of), _hex]
_Name = Annotated[str, Field(min_length=1, max_length=255)]
_Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)
    order: ClassVar[int]


class GraphRecord(_Record):
    """The first line: what everything else depends on."""

    order = 0
    kind: Literal["graph"] = "graph"
    version: int = VERSION
    salt: Annotated[Salt, Field(min_length=16, max_length=64)]
    sequence: _Count


class WorkspaceRecord(_Record):
    """A workspace; everything that is in one comes after it."""

    order = 1
    kind: Literal["workspace"] = "workspace"
    name: _Name
    rules: str | None
    tables: tuple[str, ...]


class MovedSeen(NamedTuple):
    """As `identity.Seen`."""

    only_previous: bool
    time: int
    message_id: str


class MovedTrait(NamedTuple):
    """As `store.Trait`."""

    time: int
    message_id: str
    value: bool | int | float | str


class IdentifierRecord(_Record):
    """A known identifier, with the person that it belongs to."""

    order = 2
    kind: Literal["identifier"] = "identifier"
    workspace: _Name
    digest: Digest
    type: str
    value: str
    seen_as: str | None
    seen: MovedSeen
    component: Digest | None
    canonical: Digest
    traits: dict[str, MovedTrait]


class LinkRecord(_Record):
    """A link between two known identifiers, refused and unlinked ones included."""

    order = 3
    kind: Literal["link"] = "link"
    workspace: _Name
    component: Digest
    a: Digest
    b: Digest
    alias: bool
    time: int
    message_id: str
    unlinked: bool
    refused: str


class ForgottenRecord(_Record):
    """That an identifier was forgotten; its value is not known any more."""

    order = 4
    kind: Literal["forgotten"] = "forgotten"
    workspace: _Name | None
    digest: AnyDigest
    until: int


class MovedClaim(NamedTuple):
    """As `attribution.Claim`; the owner is a digest, and ``until`` is ``None`` for good."""

    time: int
    message_id: str
    owner: Digest | None
    until: int | None
    soft: bool


class TimelineRecord(_Record):
    """A timeline that was claimed, released or barred, or a part of it."""

    order = 5
    kind: Literal["timeline"] = "timeline"
    workspace: _Name
    digest: Digest
    anonymous_id: str | None
    released_until: int | None
    barred: tuple[Digest, ...]
    claims: tuple[MovedClaim, ...]


class MovedReference(NamedTuple):
    """Where a row is."""

    message_id: str
    time: int


class RowsRecord(_Record):
    """What is known of the rows of a subject in some tables, or a part of it."""

    order = 6
    kind: Literal["rows"] = "rows"
    workspace: _Name
    subject: Digest
    tables: tuple[str, ...]
    references: tuple[MovedReference, ...]
    days: tuple[int, ...]


class UpdateRecord(_Record):
    """An update that waits in the outbox, or was given up (``dead``)."""

    order = 7
    kind: Literal["update"] = "update"
    position: _Count
    attempts: _Count
    dead: str | None
    body: UpdateByCriteria


class EndRecord(_Record):
    """The last line, which says that nothing is missing; no graph ever sees it."""

    order = 8
    kind: Literal["end"] = "end"
    lines: _Count


Record = (
    GraphRecord
    | WorkspaceRecord
    | IdentifierRecord
    | LinkRecord
    | ForgottenRecord
    | TimelineRecord
    | RowsRecord
    | UpdateRecord
)

_LINE: TypeAdapter[Record | EndRecord] = TypeAdapter(
    Annotated[Record | EndRecord, Field(discriminator="kind")]
)


def write_records(records: Iterable[Record]) -> Iterator[str]:
    """The lines of an exported graph, each with its newline, from what `Graph.export` gives."""
    count = 0
    for record in records:
        yield record.model_dump_json() + "\n"
        count += 1
    yield EndRecord(lines=count).model_dump_json() + "\n"


class Lines(Protocol):
    """A binary file, as far as it is needed."""

    def readline(self, size: int, /) -> bytes:
        """The next line, not more than ``size`` bytes of it; nothing at the end."""


def read_records(file: Lines) -> Iterator[Record]:
    """
    Read an exported graph, one line at a time.

    Raises:
        InputError: It is none, is of another version, is damaged or is not whole; the text names
            the line, never a value. What came before was right as far as it goes.
    """
    reading = _Reading()
    while line := _read_line(file, reading.lines + 1):
        record = reading.take(line)
        if isinstance(record, EndRecord):
            if _read_line(file, reading.lines + 1):
                raise InputError(f"line {reading.lines + 1}: nothing comes after the end")
            return
        yield record
    if not reading.lines:
        raise InputError("the file is empty: this is no exported graph")
    raise InputError(
        f"the file ends after line {reading.lines}, without its end: it is not whole."
        " Export it again"
    )


def restored(records: Iterable[Record]) -> Iterator[Record]:
    """
    The records of a backup that is older than what was delivered since.

    Its graph would give numbers again that it had given since, and destinations, which hold them,
    would take new updates for old ones. So they go on far beyond.
    """
    for record in records:
        if isinstance(record, GraphRecord):
            record = record.model_copy(update={"sequence": record.sequence + RESTORED_AHEAD})
        yield record


def _read_line(file: Lines, number: int) -> bytes:
    try:
        line = file.readline(MAX_LINE + 1)
    except (OSError, EOFError, zlib.error) as exc:
        raise InputError(f"line {number} cannot be read: {type(exc).__name__}") from exc
    if len(line) > MAX_LINE:
        raise InputError(f"line {number} is longer than {MAX_LINE:,} bytes")
    return line


class _Reading:
    """What is known of the lines before."""

    def __init__(self) -> None:
        self.lines = 0
        self._order = -1
        self._salt = b""
        self._workspaces: dict[str, Any] = {}

    def take(self, line: bytes) -> Record | EndRecord:
        self.lines += 1
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line ends in the middle: the file is not whole")
            try:
                record = _LINE.validate_json(line)
            except ValidationError as exc:
                raise ValueError(self._tell(exc)) from None
            self._check(record)
        except ValueError as exc:
            raise InputError(f"line {self.lines}: {exc}") from None
        return record

    def _tell(self, error: ValidationError) -> str:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        if self.lines == 1:
            return 'this is no exported graph: one begins with {"kind":"graph","version":1,...}'
        if first["type"].startswith("union_tag"):
            return "its kind is missing, or unknown to this release"
        # The kind and its key are said, and nothing deeper: a trait's name is somebody's own.
        place = ".".join(map(str, first["loc"][:2]))
        said = first["msg"].removeprefix("Value error, ")
        return f"{place}: {said}" if place else said

    def _check(self, record: Record | EndRecord) -> None:
        """What no single line can say of itself."""
        if (self.lines == 1) != isinstance(record, GraphRecord):
            raise ValueError(
                "this is no exported graph: one begins with its kind graph, and has it once"
            )
        if record.order < self._order:
            raise ValueError(f"a line of kind {record.kind} comes too late")
        self._order = record.order
        match record:
            case GraphRecord(version=version):
                if version != VERSION:
                    raise ValueError(
                        f"the file is of version {version}, this release reads {VERSION};"
                        " a newer release may read it"
                    )
                self._salt = record.salt
            case WorkspaceRecord(name=name):
                if name in self._workspaces:
                    raise ValueError("the workspace has come before")
                self._workspaces[name] = digester(self._salt, name)
            case EndRecord(lines=lines):
                if lines != self.lines - 1:
                    raise ValueError(
                        f"there are {self.lines - 1:,} lines before the end, which speaks of"
                        f" {lines:,}: the file is not whole"
                    )
            case IdentifierRecord(type=type, value=value):
                self._check_digest(record.workspace, type, value, record.digest)
            case TimelineRecord(anonymous_id=value):
                self._check_digest(record.workspace, ANONYMOUS, value, record.digest)
                if record.claims and value is None:
                    raise ValueError("the timeline is claimed, and its anonymous id is missing")
            case LinkRecord() | RowsRecord():
                self._digester_of(record.workspace)

    def _check_digest(self, workspace: str, type: str, value: str | None, digest: bytes) -> None:
        made = self._digester_of(workspace)
        if value is not None and made(type, value) != digest:
            raise ValueError("the digest belongs to another value, or to another salt")

    def _digester_of(self, workspace: str) -> Any:
        if workspace not in self._workspaces:
            raise ValueError("there is no line of kind workspace for its workspace before it")
        return self._workspaces[workspace]
