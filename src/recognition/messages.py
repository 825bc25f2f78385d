"""
What goes out: one update message, its criteria, and how they travel as JSON.

A message says which columns to set, in which table, in the rows that meet *all* of its criteria.
It never says SQL, and it cannot say "every row". A message that exists is valid: nothing
downstream checks its shape again (whether its names exist is checked against the real table).

On the wire keys are sorted, times are ISO 8601 in UTC with a ``Z``, unknown keys are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from recognition.errors import MessageError

VERSION = 1

#: The column of the ``version`` way of superseding: holds the ``sequence`` that wrote the row.
VERSION_COLUMN = "recognition_version"

# A plain identifier: what every supported database takes, quoted. 255 is Snowflake's limit, the
# widest of them (https://docs.snowflake.com/en/sql-reference/identifiers-syntax); a narrower
# database refuses by the check against its real table.
_NAME = re.compile(r"[^\W\d][\w $-]{0,254}")


def _plain_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name is a letter or _, then letters, digits, _, $, space or -, 255 at most"
        )
    return name


def _table_name(name: str) -> str:
    for part in name.split("."):
        _plain_name(part)
    return name


def _to_utc(time: datetime) -> datetime:
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("a time is in the years 1 to 9999, in UTC too") from None


def _render_time(time: datetime) -> str:
    return _to_utc(time).isoformat().replace("+00:00", "Z")


def _no_nul(value: Any) -> Any:
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("text holds a NUL character")
    if isinstance(value, float) and value - value != 0:
        raise ValueError("a number is finite")
    return value


def _time_if_datetime(value: Any) -> Any:
    # A datetime among plain scalars needs a zone; on the wire it is text, and stays text.
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise ValueError("a time has a zone")
        return _render_time(value)
    return value


Name = Annotated[str, AfterValidator(_plain_name)]
TableName = Annotated[str, AfterValidator(_table_name)]
Time = Annotated[
    AwareDatetime,
    AfterValidator(_to_utc),
    PlainSerializer(_render_time, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Scalar = Annotated[
    bool | int | float | str, BeforeValidator(_time_if_datetime), AfterValidator(_no_nul)
]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


class Equals(_Value):
    """The column holds exactly this value (byte for byte, whatever the collation)."""

    kind: Literal["equals"] = "equals"
    column: Name
    value: Scalar


class OneOf(_Value):
    """The column holds exactly one of these values."""

    kind: Literal["one_of"] = "one_of"
    column: Name
    values: Annotated[tuple[Scalar, ...], Field(min_length=1)]


class Empty(_Value):
    """
    The column is NULL, or holds the empty value of a column that cannot be NULL.

    Where the update sets ``recognition_version``, a column that it sets may also hold what an
    update of a smaller version wrote.
    """

    kind: Literal["empty"] = "empty"
    column: Name


class Between(_Value):
    """The column's time lies in ``[start, end)``; both have a zone."""

    kind: Literal["between"] = "between"
    column: Name
    start: Time
    end: Time

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.start >= self.end:
            raise ValueError("start lies before end (the end is not included)")
        return self


class Messages(_Value):
    """
    The row is one of these messages.

    ``refs`` are pairs of message id and event time. The time only bounds the statement, so that
    partitions are pruned; which rows are meant is said by the ids.
    """

    kind: Literal["messages"] = "messages"
    id_column: Name
    time_column: Name
    refs: Annotated[
        tuple[tuple[Annotated[str, AfterValidator(_no_nul)], Time], ...], Field(min_length=1)
    ]


Criterion = Annotated[Equals | OneOf | Empty | Between | Messages, Field(discriminator="kind")]


class Cause(_Value):
    """Why the update exists: the message that decided it, and the device it is about."""

    message_id: str | None = Field(default=None, description="The message that decided it.")
    anonymous_id: str | None = Field(default=None, description="The device that it is about.")


class UpdateByCriteria(_Value):
    """
    Set these columns in the rows that meet all of these criteria.

    ``id`` is deterministic (`decide_id`). What each key means stands beside it, and from there in
    the JSON schema and in ``docs/messages.md``.
    """

    kind: Literal["update_by_criteria"] = Field(
        default="update_by_criteria", description="What the message is."
    )
    version: Literal[1] = Field(
        default=1, description="Another version is refused, and nothing is written."
    )
    id: str = Field(
        min_length=1,
        max_length=255,
        description="The same decision has the same id; a sink applies an id once.",
    )
    workspace: str = Field(min_length=1, max_length=255, description="The isolation key.")
    table: TableName = Field(
        description="The table, with its schema where it has one (`analytics.events`)."
    )
    set: dict[Name, Scalar | None] = Field(
        min_length=1, description="The columns that are set, and to what; null empties a column."
    )
    where: tuple[Criterion, ...] = Field(
        min_length=1,
        description="Criteria, joined by AND; at least one `equals`, `one_of` or `messages`, and"
        " of `messages` one at most.",
    )
    sequence: int = Field(
        ge=0,
        description="Of two updates that meet the same row, the one with the greater number"
        " stands, in whatever order they arrive.",
    )
    expected_rows: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="How many rows the sender knows to meet the criteria; null: not known.",
    )
    cause: Cause = Field(default=Cause(), description="Why the update exists. It decides nothing.")
    created_at: Time = Field(description="When it was decided. It decides nothing.")

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if not any(isinstance(c, Equals | OneOf | Messages) for c in self.where):
            raise ValueError(
                "where would touch every row: it needs at least one of equals, one_of, messages"
            )
        if sum(isinstance(c, Messages) for c in self.where) > 1:
            raise ValueError("where holds messages at most once")
        return self

    def to_json(self) -> str:
        """One line, keys sorted, no spaces: equal messages give equal text."""
        return json.dumps(
            self.model_dump(mode="json"),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )


def to_text(value: bool | int | float | str) -> str:
    """How a value is written into a column of text: as JSON writes it, texts as they are."""
    return value if isinstance(value, str) else json.dumps(value)


def decide_id(
    workspace: str,
    table: str,
    set: Mapping[str, object],
    where: Iterable[Criterion],
    sequence: int,
) -> str:
    """The id of an update: the same decision gives the same 32 hexadecimal digits."""
    decision = [
        workspace,
        table,
        dict(set),
        [vars(criterion) for criterion in where],
        sequence,
    ]
    text = json.dumps(decision, sort_keys=True, default=_render_time)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_UPDATE = TypeAdapter(UpdateByCriteria)


def parse_update(text: str | bytes) -> UpdateByCriteria:
    """
    Read one message.

    Raises:
        MessageError: not JSON, another kind or version, an unknown key, no bound. The text names
            the place and the rule, never a value.
    """
    try:
        head = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise MessageError(f"not a JSON object: {_where_json_broke(exc)}") from None
    if not isinstance(head, dict):
        raise MessageError(f"an update message is a JSON object, found {type(head).__name__}")
    if head.get("kind") != "update_by_criteria":
        raise MessageError(
            'kind is not "update_by_criteria"; nothing else is understood, nothing was written'
        )
    if head.get("version") != VERSION:
        found = head.get("version")
        shown = found if isinstance(found, int) else type(found).__name__
        raise MessageError(
            f"version {shown} of update_by_criteria is unknown; this release reads {VERSION}"
            " (a newer release of recognition may read it)"
        )
    try:
        return _UPDATE.validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "message"
        raise MessageError(f"{place}: {first['msg']}") from None


def read_updates(
    lines: Iterable[str | bytes],
) -> Iterator[tuple[int, UpdateByCriteria | MessageError]]:
    """Read NDJSON: (line number from 1, message or the reason why it is none). Blank lines pass."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_update(line)
        except MessageError as error:
            yield number, error


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the message, as it travels."""
    schema = _UPDATE.json_schema(mode="serialization")
    for object in (schema, *schema["$defs"].values()):
        # They say what the rest means, so that nobody may leave them out.
        tags = [key for key in ("kind", "version") if key in object["properties"]]
        if tags:
            object["required"] = [*tags, *object["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _where_json_broke(exc: Exception) -> str:
    if isinstance(exc, json.JSONDecodeError):
        return f"{exc.msg} at character {exc.pos}"
    return "nested too deep" if isinstance(exc, RecursionError) else type(exc).__name__
