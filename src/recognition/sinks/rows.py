"""
What holds for the rows of any destination, whether SQLAlchemy speaks to it or not: what a real
table is, which values its columns hold, and what the ledger's notes take from a step.

Nothing here connects or makes a statement.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from uuid import UUID

from recognition.errors import EventError
from recognition.events import parse_time, render_time
from recognition.messages import to_text
from recognition.planner import (
    Cover,
    Shape,
    Step,
    Value,
    cut_step,
    cuts,
    distinguish,
    narrows,
)

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)

#: What a value is called in an error.
KINDS: Mapping[type, str] = {str: "text", bool: "boolean", int: "integer", float: "float"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """
    A column of a real table.

    Args:
        name: As the database spells it.
        declared: Its type, as the database shows it.
        kind: What it holds: ``text``, ``integer``, ``float``, ``boolean``, ``time``, ``uuid``,
            ``numeric`` (SQLite: numbers, and texts that do not look like one), ``any``, or
            ``other``, which is nothing that an update can carry.
        nullable: It may be NULL.
        width: The most characters that it is declared to hold, if any.
        low, high: The smallest and the greatest number that it holds.
        generated: The database computes it; it cannot be set.
    """

    name: str
    declared: str
    kind: str
    nullable: bool = True
    width: int | None = None
    low: float | None = None
    high: float | None = None
    generated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """
    A real table, as it was found.

    Args:
        parts: Its name, and before it those of schema and database as far as they were given.
        columns: By their names in lower case.
        collated: Some column compares in another way than byte by byte.
        view: It is none, so that nothing can be set.
        ambiguous: By a name in lower case: as which several it is there, that differ in case.
            ``""`` is the table itself.
    """

    parts: tuple[str, ...]
    columns: Mapping[str, Column]
    collated: bool = False
    view: bool = False
    ambiguous: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        """The column of this name, in any case; the caller knows that there is one."""
        return self.columns[name.lower()]


class Spared(NamedTuple):
    """What notes of the ledger that name single messages have in common."""

    sets: frozenset[str]
    columns: str
    message_column: str
    extras: str


class Note(NamedTuple):
    """A line of the ledger, with the ``position`` of what it was found by."""

    position: int
    sequence: int
    update_id: str
    columns: str
    empty: str
    message_column: str
    message_id: str
    extras: str
    time_column: str
    starts: int | None
    ends: int | None


class Later(NamedTuple):
    """By row of a step: what later updates took of it, and which single rows they took."""

    covers: Mapping[int, Sequence[Cover]]
    spared: Mapping[int, Sequence[Spared]]


def fills(step: Step, empty: Iterable[str]) -> bool:
    """Whether each row that is met changes, because a column is empty and will not be."""
    places = [step.shape.columns.index(column) for column in empty]
    return any(all(row.values[place] not in (None, "") for row in step.rows) for place in places)


def names_of(shape: Shape) -> tuple[str, ...]:
    """All columns that a shape speaks of, each once."""
    messages = (shape.messages or ())[1:]
    return tuple(
        dict.fromkeys((*shape.equals, *shape.columns, *shape.empty, *shape.times, *messages))
    )


def lacking_of(target: Target, step: Step) -> list[str]:
    """The columns that the step speaks of and the table does not have."""
    return [name for name in names_of(step.shape) if name.lower() not in target.columns]


def refuse_value(column: Column, value: Value, holds: Mapping[str, tuple[type, ...]]) -> str | None:
    """Why a column cannot hold a value, or ``None``; the value itself is not shown."""
    kind = column.kind
    if value is None:
        if column.nullable or kind == "text":
            return None
        return f"null was found; it is {column.declared} NOT NULL"
    declared = column.declared or "of no declared type"
    needed = f"{KINDS[type(value)]} was found; it is {declared}"
    if type(value) not in holds[kind]:
        return needed
    if isinstance(value, str):
        if column.width is not None and len(value) > column.width:
            return f"a text of {len(value)} characters was found; it is {declared}"
        if (
            (kind == "numeric" and _is_number(value))
            or (kind == "uuid" and not _is_uuid(value))
            or (kind == "time" and time_or_none(value) is None)
        ):
            return f"a text that it cannot hold unchanged was found; it is {declared}"
        return None
    if kind == "integer" and isinstance(value, float) and not value.is_integer():
        return needed
    if (column.low is not None and value < column.low) or (
        column.high is not None and value > column.high
    ):
        return f"a number out of its range was found; it is {declared}"
    return None


def greatest(digits: int, scale: int) -> float:
    """The greatest number of a DECIMAL that has so many digits, and of these behind the point."""
    limit = 10.0 ** (digits - scale)
    return min(limit - 10.0**-scale, math.nextafter(limit, 0.0))


def later_of(step: Step, target: Target, notes: Iterable[Any]) -> Later:
    """
    What the ledger's notes take from a step.

    Args:
        notes: Those of the same workspace, table and key value as a row of the step, with the
            ``position`` of the row in the step and the columns of the ledger as attributes.
    """
    shape = step.shape
    spelled = {target.column(name).name: name for name in names_of(shape)}
    covers: defaultdict[int, list[Cover]] = defaultdict(list)
    spared: defaultdict[int, list[Spared]] = defaultdict(list)
    for later in notes:
        row = step.rows[later.position]
        if (later.sequence, later.update_id) < (row.sequence, row.update_id):
            continue
        extras = [(name, value) for name, value in json.loads(later.extras or "[]")]
        if later.message_column:
            extras.append((later.message_column, later.message_id))
        cover = Cover(
            frozenset(spelled.get(name, name) for name in later.columns.split(",")),
            frozenset(spelled.get(name, name) for name in later.empty.split(",") if name),
            frozenset((spelled.get(name, name), distinguish(value)) for name, value in extras),
            spelled.get(later.time_column, later.time_column) or None,
            later.starts,
            later.ends,
        )
        message_column = spelled.get(later.message_column, later.message_column)
        if cuts(cover, shape, row):
            covers[later.position].append(cover)
        elif message_column.lower() in target.columns and narrows(
            cover, shape, row, message_column
        ):
            note = Spared(cover.columns, later.columns, later.message_column, later.extras)
            spared[later.position].append(note)
    return Later(covers, spared)


def spread_notes(
    step: Step, target: Target, notes: Iterable[Note], asks: Sequence[int]
) -> Iterator[Note]:
    """
    By row of a step the notes of other updates that may take something from it.

    A note of a message is one of the row that is compared with its id. Of a row that is compared
    with none it does not matter which message is meant, and all notes of an update are one.

    Args:
        notes: With the position of what asked for them.
        asks: By row of the step, the position of what asked for it.
    """
    compared = [
        (place, target.column(name)) for place, name in enumerate(step.shape.equals) if place
    ]
    names = {column.name for _, column in compared}
    named: defaultdict[tuple[int, str, str], list[Note]] = defaultdict(list)
    others: defaultdict[int, defaultdict[str, dict[Note, None]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for note in notes:
        if note.message_column in names:
            named[note.position, note.message_column, note.message_id].append(note)
        else:
            one = note._replace(message_id="")
            others[note.position][note.update_id].setdefault(one)
    if not named and not others:
        return
    for place, (row, asked) in enumerate(zip(step.rows, asks, strict=True)):
        for update_id, found in others.get(asked, {}).items():
            if update_id != row.update_id:
                for note in found:
                    yield note._replace(position=place)
        for equal, column in compared:
            value = row.equals[equal]
            if not isinstance(value, str):
                continue  # ids of messages are texts
            for note in named.get((asked, column.name, text_of(column, value)), ()):
                if note.update_id != row.update_id:
                    yield note._replace(position=place, message_id=value)


def text_of(column: Column, message_id: str) -> str:
    """The id as the ledger has it of this column: a UUID as databases write it."""
    return str(UUID(message_id)) if column.kind == "uuid" else message_id


def cut_and_spare(
    step: Step, covers: Mapping[int, Sequence[Cover]], spared: Mapping[int, Sequence[Spared]]
) -> Iterator[tuple[Step, frozenset[Spared]]]:
    """The parts of a step that later updates leave, each with the notes of the rows to spare."""
    shape = step.shape
    parts: defaultdict[tuple[tuple[str, ...], frozenset[Spared]], list[int]] = defaultdict(list)
    for place in range(len(step.rows)):
        notes = frozenset(spared.get(place, ()))
        by_notes: defaultdict[frozenset[Spared], list[str]] = defaultdict(list)
        for column in shape.columns:
            by_notes[frozenset(note for note in notes if column in note.sets)].append(column)
        for bearing, among in by_notes.items():
            parts[tuple(among), bearing].append(place)
    # What a column that must be empty is set to comes last: the other parts still ask for it.
    for (columns, bearing), places in sorted(
        parts.items(), key=lambda item: (not set(shape.empty).isdisjoint(item[0][0]), item[0][0])
    ):
        keep = [shape.columns.index(column) for column in columns]
        rows = [step.rows[place] for place in places]
        part = Step(
            level=step.level,
            shape=replace(shape, columns=columns),
            rows=tuple(row._replace(values=tuple(row.values[k] for k in keep)) for row in rows),
        )
        again = {n: covers[place] for n, place in enumerate(places) if place in covers}
        for left in cut_step(part, again):
            yield left, bearing


def count_taken(step: Step, parts: Iterable[Step]) -> Mapping[str, int]:
    """By update the expected rows that its parts do not expect: later updates hold them."""
    taken: Counter[str] = Counter()
    for row in step.rows:
        taken[row.update_id] += row.expected_rows or 0
    for part in parts:
        for row in part.rows:
            taken[row.update_id] -= row.expected_rows or 0
    return +taken


def joined(names: Iterable[str], target: Target) -> str:
    """The names as the table spells them, as the ledger notes them."""
    return ",".join(sorted(target.column(name).name for name in names))


def note_extras(step: Step, target: Target) -> list[str | None]:
    """What the ledger notes of further equalities; ``None``: another row notes the same."""
    shape = step.shape
    message_column = None if shape.messages is None else shape.messages[0]
    places = [
        (place, target.column(name).name)
        for place, name in enumerate(shape.equals)
        if place > 0 and name != message_column
    ]
    if not places and not shape.speaks_for_interval:
        return [""] * len(step.rows)
    notes: list[str | None] = []
    noted: set[tuple[object, ...]] = set()
    for row in step.rows:
        extras = [(name, row.equals[place]) for place, name in places]
        same = (row.update_id, row.equals[0], row.intervals, *extras)
        if shape.speaks_for_interval and same in noted:
            notes.append(None)
            continue
        noted.add(same)
        notes.append(json.dumps(extras, ensure_ascii=False) if extras else "")
    return notes


def convert(column: Column, values: list[Value]) -> list[Any]:
    """The values as the column holds them, after it was found that it does."""
    if column.kind == "text":
        if {*map(type, values)} <= {str}:
            return values
        nothing = None if column.nullable else ""
        return [nothing if value is None else to_text(value) for value in values]
    if column.kind == "time":
        return [None if value is None else time_or_none(value) for value in values]
    if column.kind == "integer":
        return [None if value is None else int(value) for value in values]
    if column.kind == "float":
        return [None if value is None else float(value) for value in values]
    return values


def time_or_none(value: object) -> int | None:
    """The time of a text, in microseconds, or ``None`` where it is none."""
    try:
        return parse_time(value)
    except EventError:
        return None


def _is_number(text: str) -> bool:
    """Whether SQLite would turn the text into a number (https://sqlite.org/datatype3.html#3.2)."""
    return _NUMBER.fullmatch(text) is not None


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def show_time(time: int | None) -> str:
    """A time in microseconds as a text."""
    return "..." if time is None else render_time(time)
