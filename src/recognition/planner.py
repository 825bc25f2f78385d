"""
A window of updates becomes a plan: its net effect, grouped so that one statement does many.

Nothing here connects, knows a dialect, or makes SQL: plans are values, equal input gives an equal
plan, and the rules that cut updates of one plan are the ones that cut them against a sink's ledger.

**Which rows.** An update selects rows by its *key*: the first ``equals`` or ``one_of`` on a column
that it does not set; else its ``messages``; else an ``equals`` on a column that it sets. Each value
of a key is one staged row. What else must be equal is staged beside it.

**Which update stands.** Of two updates of one workspace and table the greater ``sequence`` stands
(the greater id, where these are equal). A later update *covers* an earlier one when it meets every
row that the earlier one meets, over some interval: the same key value, and no condition that the
earlier one does not have too. What is covered is cut out of the earlier one, column by column, so
that it falls into pieces or vanishes. An update with ``recognition_version`` loses all of its
columns or none, because a row has one version. Where a later update touches rows of an earlier one
without covering it, both stay, and the later one goes to a later *level*.

``messages`` together with ``between`` on their time speak for the whole interval: the sender knows
that no other row of the key in it is meant. ``messages`` alone speak for their rows.

An update that looks for a value which updates write (``equals`` on a column that one of them sets)
depends on what was written before: it takes its turn after the earlier updates that write the
value, whatever their keys, and these are not cut. It covers no other update where it sets the
column itself.

Otherwise updates that reach the same row by different key columns (one by the device, one by
message ids) are not seen as touching; only ``recognition_version`` keeps order among them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from itertools import groupby, product
from typing import NamedTuple, cast

from recognition.errors import MessageError
from recognition.messages import VERSION_COLUMN, Messages, UpdateByCriteria

Value = str | int | float | bool | None
"""What a column can be set to. A key is never ``None``."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000
_GREATEST = 2**63 - 1

# A staged row that names a message stands for one row of the target, one that names a device for
# all of the device's rows: about 20 in the event files that we measured with.
_MESSAGES_PER_UPDATE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """
    What a statement looks like, without its values; updates of one shape share a statement.

    Args:
        table: Its name, as the messages spell it.
        columns: What is set, in alphabetical order.
        equals: The columns that must hold a staged value exactly; the first is the key.
        empty: The columns that must be empty.
        times: The columns whose time must lie in a staged interval.
        open: The interval of the one time column may lack its start or its end. One that lacks its
            start includes the rows that have no time.
        messages: The id column and the time column of ``messages``. The id column is among
            ``equals``; the times bound the statement, nothing else.
    """

    table: str
    columns: tuple[str, ...]
    equals: tuple[str, ...]
    empty: tuple[str, ...] = ()
    times: tuple[str, ...] = ()
    open: bool = False
    messages: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """The column by which rows are found."""
        return self.equals[0]

    @property
    def versioned(self) -> bool:
        """The version in each row keeps the order; otherwise a ledger has to."""
        return VERSION_COLUMN in self.columns

    @property
    def covers(self) -> bool:
        """It can take rows from earlier updates."""
        return len(self.times) < 2 and not self.held

    @property
    def speaks_for_interval(self) -> bool:
        """Its messages are all that is meant in their interval, of the rows of the key."""
        return (
            self.messages is not None
            and self.times == self.messages[1:]
            and self.key != self.messages[0]
        )

    @property
    def held(self) -> tuple[str, ...]:
        """The columns that are compared and set: what they hold depends on earlier writes."""
        return tuple(column for column in self.equals if column in self.columns)


class StagedRow(NamedTuple):
    """
    One row of the table that is joined with the target: one value of the key of one update.

    ``equals``, ``intervals`` and ``values`` stand in the order of the shape's ``equals``, ``times``
    and ``columns``. Times are microseconds since 1970-01-01 UTC; ends are not included.
    ``expected_rows`` is 1 for each of the messages that an update expects all of. Of other updates
    the first of the rows carries it, the others have 0; an interval that was cut has 0 too.
    """

    update_id: str
    workspace: str
    equals: tuple[Value, ...]
    intervals: tuple[tuple[int | None, int | None], ...]
    message_time: int | None
    values: tuple[Value, ...]
    sequence: int
    expected_rows: int | None


class Bound(NamedTuple):
    """No row that the step is about has its time outside ``[lower, upper)``, in microseconds."""

    column: str
    lower: int | None
    upper: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """
    What one statement does: a shape and the rows to stage for it.

    No two rows of a step select the same row of the target. They are sorted by key, so that two
    writers take their locks in the same order.
    """

    level: int
    shape: Shape
    rows: tuple[StagedRow, ...] = field(repr=False)

    @property
    def table(self) -> str:
        """The table's name, as the messages spell it."""
        return self.shape.table

    @property
    def expected_rows(self) -> int | None:
        """How many rows its updates are known to meet; ``None`` when it is not known of all."""
        total = 0
        for row in self.rows:
            if row.expected_rows is None:
                return None
            total += row.expected_rows
        return total

    def needs_count(self, changed: int) -> bool:
        """
        Whether the matched rows of each update are to be counted, after so many were changed.

        Not where as many changed as were expected: of intervals that proves nothing, but neither
        does a count (see `recognition.delivery`). It does of messages that are all expected, as
        none of them can be matched in the place of another one. Where the key itself was set,
        nothing is left to find the rows by.
        """
        if self.shape.key in self.shape.held:
            return False
        expected = self.expected_rows
        if expected is None or changed < expected:
            return True
        return self.shape.messages is not None and any(r.expected_rows != 1 for r in self.rows)

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """
        What holds for the time columns of every row.

        The times of messages in full seconds, and one more: what is stored of them may be rounded.
        """
        found = []
        for place, column in enumerate(self.shape.times):
            starts = {row.intervals[place][0] for row in self.rows}
            ends = {row.intervals[place][1] for row in self.rows}
            lower = None if None in starts else min(cast(set[int], starts))
            upper = None if None in ends else max(cast(set[int], ends))
            found.append(Bound(column, lower, upper))
        if self.shape.messages is not None:
            times = [row.message_time for row in self.rows if row.message_time is not None]
            lower = min(times) // _SECOND * _SECOND
            upper = (max(times) // _SECOND + 2) * _SECOND
            found.append(Bound(self.shape.messages[1], lower, upper))
        return tuple(bound for bound in found if (bound.lower, bound.upper) != (None, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """
    How a window of updates is applied to one sink.

    Args:
        steps: What to do, in this order.
        updates: The ids of all updates that the plan stands for, by sequence. Those of which
            nothing is left, because later ones cover them, are among them.
        rejected: The ids of updates that cannot be planned, with the reason; not in ``updates``.
    """

    steps: tuple[Step, ...]
    updates: tuple[str, ...]
    rejected: tuple[tuple[str, MessageError], ...] = ()


class Cover(NamedTuple):
    """
    What a later update takes from the earlier ones of its workspace, table and key value.

    Args:
        columns: What it sets.
        empty: The columns that it wants empty.
        extras: What it wants to be equal beside the key, see `distinguish`.
        time_column: ``None`` when it takes all rows of the key; ``start`` and ``end`` are then
            ``None`` too. Otherwise a missing start takes what lies before the end and the rows that
            have no time; a missing end takes what lies after the start.
    """

    columns: frozenset[str]
    empty: frozenset[str]
    extras: frozenset[tuple[str, object]]
    time_column: str | None
    start: int | None
    end: int | None


def plan_updates(updates: Iterable[UpdateByCriteria], *, split: int = 10_000) -> Plan:
    """
    The net effect of a window of updates, in as few statements as their shapes allow.

    The order of ``updates`` does not matter, and the same id twice counts once.

    Args:
        split: A step holds at most so many updates, and at most 20 times as many staged rows, so
            that locks, logs and memory stay bounded whatever the window.
    """
    known: dict[str, UpdateByCriteria] = {}
    for update in updates:
        known.setdefault(update.id, update)
    planned: list[tuple[int, str]] = []
    rejected: list[tuple[str, MessageError]] = []
    by_table: dict[str, list[_Piece]] = defaultdict(list)
    for update in known.values():
        try:
            by_table[update.table] += _read(update)
        except MessageError as error:
            rejected.append((update.id, error))
        else:
            planned.append((update.sequence, update.id))
    # A window has few shapes: they are told apart as objects first, and then by what they say.
    same: dict[tuple[int, int], tuple[Shape, list[StagedRow]]] = {}
    for pieces in by_table.values():
        for level, (shape, row) in _arrange(pieces):
            group = same.get((level, id(shape)))
            if group is None:
                same[level, id(shape)] = (shape, [row])
            else:
                group[1].append(row)
    grouped: dict[tuple[int, Shape], list[StagedRow]] = defaultdict(list)
    for (level, _), (shape, rows) in same.items():
        grouped[level, shape] += rows
    return Plan(
        steps=tuple(_steps(grouped, split)),
        updates=tuple(update_id for _, update_id in sorted(planned)),
        rejected=tuple(sorted(rejected, key=lambda pair: pair[0])),
    )


def cut_step(step: Step, covers: Mapping[int, Sequence[Cover]]) -> tuple[Step, ...]:
    """
    The step without what later updates cover.

    Args:
        covers: By the position of a row in ``step.rows``, what covers it: later than the row, and
            of its workspace, table and key value.

    Returns:
        Steps of the same level. What is left of a row may have another shape: a piece may set
        fewer columns, or have an interval where the whole had none.
    """
    grouped: dict[tuple[int, Shape], list[StagedRow]] = defaultdict(list)
    for place, row in enumerate(step.rows):
        pieces = [_Piece(step.shape, row)]
        for cover in covers.get(place, ()):
            pieces = [left for piece in pieces for left in _cut(piece, cover)]
        for piece in pieces:
            grouped[step.level, piece.shape].append(piece.row)
    # Cutting never adds updates, so the step's own size is the limit that it was made with.
    return tuple(_steps(grouped, len(step.rows)))


def cuts(cover: Cover, shape: Shape, row: StagedRow) -> bool:
    """Whether the cover takes something of the row's."""
    piece = _Piece(shape, row)
    return _cut(piece, cover) != [piece]


def narrows(cover: Cover, shape: Shape, row: StagedRow, column: str) -> bool:
    """Whether the cover takes single rows of the row's, told by this one column more."""
    wanted = dict(_compared(_Piece(shape, row)))
    return (
        cover.time_column is None
        and column not in wanted
        and not cover.columns.isdisjoint(shape.columns)
        and cover.empty.issubset(shape.empty)
        and all(wanted.get(name) == value for name, value in cover.extras if name != column)
    )


def distinguish(value: Value) -> object:
    """The value as an identity: ``"1"``, ``1`` and ``True`` are three, 1 and 1.0 are one."""
    if isinstance(value, str):
        return value
    return (isinstance(value, bool), value)


class _Piece(NamedTuple):
    """One staged row to be, with its shape; cutting replaces it by smaller ones."""

    shape: Shape
    row: StagedRow


def _read(update: UpdateByCriteria) -> list[_Piece]:
    """One piece per key value and message; none when the criteria contradict each other."""
    columns = tuple(sorted(update.set))
    if update.sequence > _GREATEST:
        raise MessageError("sequence is greater than a column of 64 bits can hold")
    if VERSION_COLUMN in update.set:
        version = update.set[VERSION_COLUMN]
        if type(version) is not int or version != update.sequence:
            raise MessageError(
                f"set.{VERSION_COLUMN} differs from the update's sequence; they are always equal"
            )
        if len(columns) == 1:
            raise MessageError(f"the update sets nothing but {VERSION_COLUMN}")
    allowed: dict[str, tuple[Value, ...]] = {}
    intervals: dict[str, tuple[int, int]] = {}
    empty: list[str] = []
    messages: Messages | None = None
    for criterion in update.where:
        if criterion.kind == "equals":
            _narrow(allowed, criterion.column, (criterion.value,))
        elif criterion.kind == "one_of":
            _narrow(allowed, criterion.column, criterion.values)
        elif criterion.kind == "empty":
            empty.append(criterion.column)
        elif criterion.kind == "between":
            start, end = _microseconds(criterion.start), _microseconds(criterion.end)
            if criterion.column in intervals:
                earlier = intervals[criterion.column]
                start, end = max(start, earlier[0]), min(end, earlier[1])
                if start >= end:
                    return []
            intervals[criterion.column] = (start, end)
        else:
            messages = criterion
    named = None
    refs: dict[str, int] = {}
    if messages is not None:
        named = (messages.id_column, messages.time_column)
        refs = {ref: _microseconds(time) for ref, time in messages.refs}
        _narrow(allowed, messages.id_column, tuple(refs))
    equals = tuple(allowed)
    if len(equals) > 1:
        # The key is a column that the update does not write, and a device rather than a message.
        id_column = named and named[0]
        equals = tuple(sorted(equals, key=lambda c: (c in update.set, c == id_column)))
    times = tuple(sorted(intervals))
    shape = _shape(update.table, columns, equals, tuple(sorted(empty)), times, named)
    staged = tuple([intervals[column] for column in times])
    values = tuple([update.set[column] for column in columns])
    expected = update.expected_rows
    pieces = []
    keys = list(product(*[allowed[column] for column in equals]))
    each_one = named is not None and expected == len(refs) == len(keys)
    for wanted in keys:
        time = None if named is None else refs[str(wanted[equals.index(named[0])])]
        row = StagedRow(
            update.id,
            update.workspace,
            wanted,
            staged,
            time,
            values,
            update.sequence,
            1 if each_one else expected,
        )
        pieces.append(_Piece(shape, row))
        expected = None if expected is None else 0
    return pieces


@lru_cache(maxsize=1024)  # a window has few shapes and many updates
def _shape(
    table: str,
    columns: tuple[str, ...],
    equals: tuple[str, ...],
    empty: tuple[str, ...],
    times: tuple[str, ...],
    messages: tuple[str, str] | None,
) -> Shape:
    return Shape(
        table=table,
        columns=columns,
        equals=equals,
        empty=tuple(dict.fromkeys(empty)),
        times=times,
        messages=messages,
    )


def _narrow(allowed: dict[str, tuple[Value, ...]], column: str, values: tuple[Value, ...]) -> None:
    """A column must hold one of these values, and one of those asked for before."""
    if len(values) == 1 and column not in allowed:
        allowed[column] = values
        return
    by_identity = {distinguish(value): value for value in values}
    if column in allowed:
        before = {distinguish(value) for value in allowed[column]}
        by_identity = {same: value for same, value in by_identity.items() if same in before}
    allowed[column] = tuple(by_identity.values())


def _microseconds(time: datetime) -> int:
    since = time - _EPOCH  # to divide it by a microsecond takes three times as long
    return (since.days * 86_400 + since.seconds) * _SECOND + since.microseconds


class _Kind(NamedTuple):
    """Covers that differ only in their values; looked up together."""

    workspace: str
    columns: frozenset[str]
    empty: frozenset[str]
    extras: tuple[str, ...]
    time_column: str | None


# By column and value, the last update that looks for the value.
_Readers = Mapping[tuple[str, object], tuple[int, str]]


def _arrange(pieces: list[_Piece]) -> Iterator[tuple[int, _Piece]]:
    """What is left of the pieces of one table, each with its level."""
    by_key: dict[tuple[str, object], list[_Piece]] = {}
    for piece in pieces:
        shape, row = piece
        value = row.equals[0]
        key = (shape.equals[0], value if isinstance(value, str) else distinguish(value))
        if key in by_key:
            by_key[key].append(piece)
        else:
            by_key[key] = [piece]
    shapes = list({id(piece.shape): piece.shape for piece in pieces}.values())
    written = {column for shape in shapes for column in shape.columns}
    if any(not written.isdisjoint(shape.equals) for shape in shapes):
        readers: dict[tuple[str, object], tuple[int, str]] = {}
        for piece in pieces:
            for pair in _compared(piece):
                if pair[0] in written:
                    readers[pair] = max(_rank(piece), readers.get(pair, (-1, "")))
        settled = [left for group in by_key.values() for left in _settle(group, readers)]
        yield from _level(settled, readers)
        return
    for group in by_key.values():
        if len(group) == 1:
            yield 0, group[0]
        else:
            yield from _level(_settle(group, {}), {})


def _settle(pieces: list[_Piece], readers: _Readers) -> list[_Piece]:
    """
    What the later pieces of one key value leave of the earlier ones.

    Where some update looks for what an earlier one writes, the earlier one is left whole: it would
    not be found otherwise.
    """
    pieces.sort(key=_rank, reverse=True)
    taken: dict[_Kind, dict[tuple[object, ...], _Spans]] = {}
    left: list[_Piece] = []
    for rank, group in groupby(pieces, key=_rank):
        # The pieces of one update differ in what must be equal: they never meet each other.
        same_update = list(group)
        for piece in same_update:
            read = any(readers.get(pair, rank) > rank for pair in _written(piece))
            left.extend([piece] if read else _cut_by(piece, taken))
        for piece in same_update:
            for cover in covers_of(piece.shape, piece.row):
                _take(piece.row.workspace, cover, taken)
    return left


def _compared(piece: _Piece) -> Iterator[tuple[str, object]]:
    return zip(piece.shape.equals, map(distinguish, piece.row.equals), strict=True)


def _written(piece: _Piece) -> Iterator[tuple[str, object]]:
    return zip(piece.shape.columns, map(distinguish, piece.row.values), strict=True)


def _rank(piece: _Piece) -> tuple[int, str]:
    return (piece.row.sequence, piece.row.update_id)


def _cut_by(
    whole: _Piece, taken: Mapping[_Kind, Mapping[tuple[object, ...], _Spans]]
) -> list[_Piece]:
    pieces = [whole]
    wanted = dict(zip(whole.shape.equals, whole.row.equals, strict=True))
    start, end = _reach(whole)
    for kind, by_extras in taken.items():
        if not pieces:
            break
        if kind.workspace != whole.row.workspace or not wanted.keys() >= set(kind.extras):
            continue
        values = tuple(distinguish(wanted[column]) for column in kind.extras)
        spans = by_extras.get(values)
        if spans is None:
            continue
        extras = frozenset(zip(kind.extras, values, strict=True))
        for span in spans.overlapping(start, end):
            cover = Cover(kind.columns, kind.empty, extras, kind.time_column, *span)
            pieces = [smaller for piece in pieces for smaller in _cut(piece, cover)]
    return pieces


def _take(
    workspace: str, cover: Cover, taken: dict[_Kind, dict[tuple[object, ...], _Spans]]
) -> None:
    extras = sorted(cover.extras, key=lambda extra: extra[0])
    names = tuple(column for column, _ in extras)
    kind = _Kind(workspace, cover.columns, cover.empty, names, cover.time_column)
    values = tuple(value for _, value in extras)
    taken.setdefault(kind, {}).setdefault(values, _Spans()).add(cover.start, cover.end)


def covers_of(shape: Shape, row: StagedRow) -> tuple[Cover, ...]:
    """
    What this row takes from earlier updates, the widest first.

    Messages that speak for an interval take it, and their own rows wherever these are.
    """
    if not shape.covers:
        return ()
    columns, empty = frozenset(shape.columns), frozenset(shape.empty)
    extras = {
        column: distinguish(value)
        for column, value in zip(shape.equals[1:], row.equals[1:], strict=True)
    }
    start, end = row.intervals[0] if shape.times else (None, None)
    time_column = shape.times[0] if shape.times else None
    own = Cover(columns, empty, frozenset(extras.items()), time_column, start, end)
    if not shape.speaks_for_interval:
        return (own,)
    assert shape.messages is not None
    extras.pop(shape.messages[0], None)
    return (
        own._replace(extras=frozenset(extras.items())),
        own._replace(time_column=None, start=None, end=None),
    )


def _reach(piece: _Piece) -> tuple[int | None, int | None]:
    """The interval outside of which nothing needs to be looked up for the piece."""
    if piece.row.message_time is not None:
        return (piece.row.message_time, piece.row.message_time + 1)
    if len(piece.shape.times) == 1:
        return piece.row.intervals[0]
    return (None, None)


def _meets_all_of(cover: Cover, piece: _Piece) -> bool:
    """Does the cover, over its interval, meet every row that the piece meets?"""
    shape, row = piece
    if shape.versioned and not cover.columns.issuperset(shape.columns):
        return False
    if not cover.empty.issubset(shape.empty):
        return False
    if cover.extras and not cover.extras.issubset(
        (column, distinguish(value)) for column, value in zip(shape.equals, row.equals, strict=True)
    ):
        return False
    if cover.time_column is None:
        return True
    if shape.messages is not None:
        return cover.time_column == shape.messages[1]
    return shape.times in ((), (cover.time_column,))


def _cut(piece: _Piece, cover: Cover) -> list[_Piece]:
    """What the cover leaves of the piece."""
    shape, row = piece
    if not cover.columns.intersection(shape.columns) or not _meets_all_of(cover, piece):
        return [piece]
    if shape.messages is not None:
        if cover.time_column is None or _contains(cover, row.message_time):
            return _fewer_columns(shape, row, cover)
        return [piece]
    row = row._replace(expected_rows=0)
    if cover.time_column is None:
        return _fewer_columns(shape, row, cover)
    start, end = row.intervals[0] if shape.times else (None, None)
    if (cover.end is not None and start is not None and cover.end <= start) or (
        cover.start is not None and end is not None and end <= cover.start
    ):
        return [piece]
    pieces = []
    inner_start, inner_end = start, end
    if cover.start is not None and (start is None or start < cover.start):
        pieces.append(_within(shape, row, cover.time_column, start, cover.start))
        inner_start = cover.start
    if cover.end is not None and (end is None or cover.end < end):
        pieces.append(_within(shape, row, cover.time_column, cover.end, end))
        inner_end = cover.end
    inner = _within(shape, row, cover.time_column, inner_start, inner_end)
    return pieces + _fewer_columns(inner.shape, inner.row, cover)


def _contains(cover: Cover, time: int | None) -> bool:
    return (
        time is not None
        and (cover.start is None or cover.start <= time)
        and (cover.end is None or time < cover.end)
    )


def _within(
    shape: Shape, row: StagedRow, column: str, start: int | None, end: int | None
) -> _Piece:
    return _Piece(
        replace(shape, times=(column,), open=start is None or end is None),
        row._replace(intervals=((start, end),)),
    )


def _fewer_columns(shape: Shape, row: StagedRow, cover: Cover) -> list[_Piece]:
    keep = [column not in cover.columns for column in shape.columns]
    if not any(keep):
        return []
    columns = tuple(c for c, kept in zip(shape.columns, keep, strict=True) if kept)
    values = tuple(v for v, kept in zip(row.values, keep, strict=True) if kept)
    return [_Piece(replace(shape, columns=columns), row._replace(values=values))]


def _level(pieces: Sequence[_Piece], readers: _Readers) -> Iterator[tuple[int, _Piece]]:
    """Number the pieces, so that those whose order matters run one after another."""
    done: dict[object, dict[tuple[str, Shape], list[tuple[int, _Piece]]]] = {}
    # By column and value, the highest level that writes it, and that looks for it.
    writes: dict[tuple[str, object], int] = {}
    reads: dict[tuple[str, object], int] = {}
    for piece in sorted(pieces, key=_rank):
        shape, row = piece
        level = 0
        own = (row.workspace, shape)
        same_key = done.setdefault((shape.key, distinguish(row.equals[0])), defaultdict(list))
        for kind, earlier in same_key.items():
            if kind == own and shape.covers and not readers:
                continue  # this one covered those: nothing of them is left where they met
            if not _interferes(kind[1], shape):
                continue
            for below, other in earlier:
                if below >= level and _touch(other, piece):
                    level = below + 1
        if readers:
            looked_for = [pair for pair in _compared(piece) if pair in readers]
            written = [pair for pair in _written(piece) if pair in readers]
            for pair in looked_for:
                level = max(level, writes.get(pair, -1) + 1, reads.get(pair, -1) + 1)
            for pair in written:
                level = max(level, reads.get(pair, -1) + 1)
            for pair in looked_for:
                reads[pair] = max(level, reads.get(pair, 0))
            for pair in written:
                writes[pair] = max(level, writes.get(pair, 0))
        same_key[own].append((level, piece))
        yield level, piece


def _interferes(one: Shape, other: Shape) -> bool:
    """Does it matter which of the two runs first, should they meet the same row?"""
    return bool(
        {*one.columns} & {*other.columns, *other.empty, *other.equals}
        or {*other.columns} & {*one.empty, *one.equals}
    )


def _touch(one: _Piece, other: _Piece) -> bool:
    """May a row meet both? Both have the same key value."""
    wanted = dict(zip(one.shape.equals, one.row.equals, strict=True))
    # What a column holds that one of them sets may change in between.
    fixed = wanted.keys() - {*one.shape.columns, *other.shape.columns}
    for column, value in zip(other.shape.equals, other.row.equals, strict=True):
        if column in fixed and distinguish(wanted[column]) != distinguish(value):
            return False
    intervals = _intervals(one)
    for column, (start, end) in _intervals(other).items():
        if column in intervals and not _overlap(*intervals[column], start, end):
            return False
    return True


def _intervals(piece: _Piece) -> dict[str, tuple[int | None, int | None]]:
    """In which interval the times of a piece's rows lie, by column."""
    intervals = dict(zip(piece.shape.times, piece.row.intervals, strict=True))
    if piece.shape.messages is not None and piece.row.message_time is not None:
        time = piece.row.message_time
        intervals[piece.shape.messages[1]] = (time, time + 1)
    return intervals


def _overlap(
    start: int | None, end: int | None, other_start: int | None, other_end: int | None
) -> bool:
    return (end is None or other_start is None or other_start < end) and (
        other_end is None or start is None or start < other_end
    )


class _Spans:
    """A set of times, kept as sorted intervals that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._all = False

    def add(self, start: int | None, end: int | None) -> None:
        """Both ends are given, or neither: that is all times."""
        if start is None or end is None:
            self._all = True
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def overlapping(
        self, start: int | None, end: int | None
    ) -> Sequence[tuple[int | None, int | None]]:
        """Those intervals that have a time in common with ``[start, end)``."""
        if self._all:
            return [(None, None)]
        first = 0 if start is None else bisect_right(self._ends, start)
        last = len(self._starts) if end is None else bisect_left(self._starts, end)
        return list(zip(self._starts[first:last], self._ends[first:last], strict=True))


def _steps(grouped: Mapping[tuple[int, Shape], list[StagedRow]], split: int) -> Iterator[Step]:
    for level, shape in sorted(grouped, key=_step_order):
        rows = sorted(grouped[level, shape], key=_row_order)
        first = 0
        updates: set[str] = set()
        for place, row in enumerate(rows):
            updates.add(row.update_id)
            if len(updates) > split or place - first >= split * _MESSAGES_PER_UPDATE:
                yield Step(level=level, shape=shape, rows=tuple(rows[first:place]))
                first, updates = place, {row.update_id}
        yield Step(level=level, shape=shape, rows=tuple(rows[first:]))


def _step_order(key: tuple[int, Shape]) -> tuple[object, ...]:
    level, shape = key
    return (
        level,
        shape.table,
        shape.equals,
        shape.columns,
        shape.empty,
        shape.times,
        shape.open,
        shape.messages or (),
    )


def _row_order(row: StagedRow) -> tuple[object, ...]:
    key = row.equals[0]
    return (isinstance(key, str), key, row.workspace, row.sequence, row.update_id)
