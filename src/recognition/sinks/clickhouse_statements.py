"""
The statements of the ClickHouse sink, and what a table of ClickHouse is: texts, names and values
that cannot be mistaken for each other. Nothing here connects.

A `Fragment` is made of literals of this file, of names that were found in the real table, and of
parameters, which the server puts in their places after it has parsed the statement. So no value
can become a part of a statement's text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from uuid import UUID

from recognition.messages import VERSION_COLUMN
from recognition.planner import Bound, Shape, StagedRow, Step, Value
from recognition.sinks.rows import Column, Spared, Target, convert, fills

#: What every table that is made for one window is called, before the window's id.
STAGE = "recognition_stage_"

#: Rows on their way to another key, before the window's id: they outlive the window if need be.
MOVED = "recognition_moved_"

#: Microseconds of an interval's missing start, and of its missing end.
FLOOR, CEILING = -(2**63), 2**63 - 1

SECOND = 1_000_000
DAY = 86_400 * SECOND

# What the types hold, in microseconds: https://clickhouse.com/docs/sql-reference/data-types
_RANGES: Mapping[str, tuple[int, int]] = {
    "Date": (0, 65_536 * DAY),
    "DateTime": (0, 2**32 * SECOND),
    "Date32": (-25_567 * DAY, 120_530 * DAY),
    "DateTime64": (-25_567 * DAY, 120_530 * DAY),
    "DateTime64(9)": (-25_567 * DAY, 2**63 // 1000),
}


# Statements ---------------------------------------------------------------------------------------


class Name(str):
    """The name of something in the database, as the database spells it; never a value."""

    __slots__ = ()


class Parameter(NamedTuple):
    """A value and its type; the server puts it in its place, after the statement was parsed."""

    type: str
    value: object


class Fragment(NamedTuple):
    """A piece of a statement: texts of this file, names that were quoted, and parameters."""

    parts: tuple[str | Parameter, ...]

    def render(self) -> tuple[str, dict[str, object]]:
        """The statement's text, and the parameters by the names that it gives them."""
        text: list[str] = []
        values: dict[str, object] = {}
        for part in self.parts:
            if isinstance(part, Parameter):
                name = f"p{len(values)}"
                values[name] = part.value
                text.append(f"{{{name}:{part.type}}}")
            else:
                text.append(part)
        return "".join(text), values


def sql(template: str, *fills: Fragment | Name | Parameter) -> Fragment:
    """
    The template with each ``%`` replaced by the next of the fills.

    Args:
        template: A literal of this file. Nothing else may stand here, least of all a value.
        fills: A fragment, a name, which is quoted, or a parameter.
    """
    pieces = template.split("%")
    if len(pieces) != len(fills) + 1:
        raise TypeError(f"{len(pieces) - 1} places for {len(fills)} fragments")
    parts: list[str | Parameter] = [pieces[0]]
    for fill, piece in zip(fills, pieces[1:], strict=True):
        if isinstance(fill, Fragment):
            parts.extend(fill.parts)
        elif isinstance(fill, Parameter):
            parts.append(fill)
        elif isinstance(fill, Name):
            parts.append(quote(fill))
        else:
            raise TypeError("a bare text is no part of a statement")
        parts.append(piece)
    return Fragment(tuple(parts))


def join(separator: str, fragments: Sequence[Fragment]) -> Fragment:
    """The fragments one after the other."""
    parts: list[str | Parameter] = []
    for place, fragment in enumerate(fragments):
        if place:
            parts.append(separator)
        parts.extend(fragment.parts)
    return Fragment(tuple(parts))


def quote(name: str) -> str:
    """https://clickhouse.com/docs/sql-reference/syntax#identifiers"""
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def sql_type(text: str) -> Fragment:
    """A type, as the database itself has shown it."""
    return Fragment((text,))


def _all(conditions: Sequence[Fragment]) -> Fragment:
    return join(" AND ", [sql("(%)", condition) for condition in conditions] or [sql("1")])


def _any(conditions: Sequence[Fragment]) -> Fragment:
    return join(" OR ", [sql("(%)", condition) for condition in conditions])


# Tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Target):
    """
    A table of ClickHouse, as the system tables describe it.

    Args:
        engine: With ``Replicated`` or ``Shared`` before it, where it is that.
        arguments: Those of the engine: a ReplacingMergeTree's version and mark of deleted rows.
        settings: What the table itself sets.
        types: By column, its type without LowCardinality and Nullable.
        declared: By column, its type as the database shows it.
        keys: The columns of sorting and partition key, which cannot be updated; a
            ReplacingMergeTree's version too.
        partitioned_by: The columns of the partition key.
        sorting: The sorting key, as it was declared.
        writable: The columns that an INSERT may name, in their order.
        materialized: How each MATERIALIZED column is computed.
        column_bytes: Compressed, by column.
        views: The materialized views that read the table's inserts.
        projections: Which columns each projection reads, by its name.
        refused: Why nothing in it can be set, or ``""``.
    """

    engine: str = "MergeTree"
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    declared: Mapping[str, str] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    partitioned_by: frozenset[str] = frozenset()
    sorting: str = ""
    writable: tuple[str, ...] = ()
    materialized: Mapping[str, str] = field(default_factory=dict)
    column_bytes: Mapping[str, int] = field(default_factory=dict)
    views: tuple[str, ...] = ()
    projections: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def database(self) -> Name:
        """The database it is in; what is made for a window is made there too."""
        return Name(self.parts[0])

    @property
    def replicated(self) -> bool:
        """Other hosts hold the same rows."""
        return self.engine.startswith(("Replicated", "Shared"))

    @property
    def replacing(self) -> bool:
        """Of the rows with one sorting key the last one stands, once they are merged."""
        return self.engine.endswith("ReplacingMergeTree")

    @property
    def merges_rows(self) -> bool:
        """What a reader sees is more than the rows as they are stored: it has to say FINAL."""
        return not self.engine.endswith(("ReplicatedMergeTree", "SharedMergeTree")) and (
            self.engine != "MergeTree"
        )

    def share(self, names: Collection[str]) -> float:
        """Which part of the table's compressed bytes these columns hold."""
        total = sum(self.column_bytes.values())
        if total:
            return sum(self.column_bytes.get(name, 0) for name in names) / total
        # A small part is in one file, and nobody says what is whose.
        return len(names) / max(len(self.types), 1)

    def named(self) -> Fragment:
        """The table in a statement."""
        return sql("%.%", Name(self.parts[0]), Name(self.parts[1]))

    def beside(self, name: str) -> Fragment:
        """Something that is made in the same database."""
        return sql("%.%", self.database, Name(name))

    def enabled(self, setting: str, defaults: Mapping[str, str]) -> bool:
        """Whether a setting of the table is on."""
        return self.settings.get(setting, defaults.get(setting, "0")) not in ("0", "false")


_WRAPPERS = re.compile(r"(LowCardinality|Nullable)\((.*)\)")
_INTEGER = re.compile(r"(U?)Int(8|16|32|64|128|256)")
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _bare(declared: str) -> tuple[str, bool]:
    """The type without LowCardinality and Nullable, and whether it may be NULL."""
    nullable = False
    while found := _WRAPPERS.fullmatch(declared):
        nullable = nullable or found[1] == "Nullable"
        declared = found[2]
    return declared, nullable


def read_column(name: str, declared: str, default_kind: str) -> tuple[Column, str]:
    bare, nullable = _bare(declared)
    kind, low, high = "other", None, None
    if bare == "String":
        kind = "text"
    elif found := _INTEGER.fullmatch(bare):
        bits = int(found[2])
        kind = "integer"
        low, high = (0, 2**bits - 1) if found[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    elif bare in ("Float32", "Float64"):
        kind = "float"
    elif bare == "Bool":
        kind = "boolean"
    elif bare == "UUID":
        kind = "uuid"
    elif time_range(bare) is not None:
        kind = "time"
    if default_kind == "EPHEMERAL":
        kind, declared = "other", f"{declared} EPHEMERAL"
    column = Column(
        name=name,
        declared=declared,
        kind=kind,
        nullable=nullable,
        low=low,
        high=high,
        generated=default_kind in ("MATERIALIZED", "ALIAS", "EPHEMERAL"),
    )
    return column, bare


def time_range(bare: str) -> tuple[int, int] | None:
    kind = bare.partition("(")[0]
    if kind == "DateTime64" and int(bare[11]) > 6:
        return _RANGES["DateTime64(9)"]
    return _RANGES.get(kind)


# What a table's columns are in a statement --------------------------------------------------------


def _staged_type(table: Table, column: Column) -> str:
    """As what a value of the column is staged."""
    if column.kind in ("text", "uuid"):
        return "String"
    if column.kind == "time":
        return "Int64"
    return table.types[column.name]


def stage_values(column: Column, values: list[Value]) -> list[Any]:
    """The values as they are staged, after it was found that the column holds them."""
    if column.kind == "uuid":
        return [None if value is None else str(UUID(str(value))) for value in values]
    return [
        None if value is None else converted
        for value, converted in zip(values, convert(column, values), strict=True)
    ]


def _staged(table: Table, column: Column) -> Fragment:
    """The column of the target as what is staged; never NULL."""
    name = Name(column.name)
    if column.kind == "time":
        micros = _micros(table, column)
        return sql("assumeNotNull(%)", micros) if column.nullable else micros
    bare = sql("assumeNotNull(%)", sql("%", name)) if column.nullable else sql("%", name)
    return sql("toString(%)", bare) if column.kind == "uuid" else bare


def _unstaged(table: Table, column: Column, staged: Fragment) -> Fragment:
    """What was staged for the column, which may be NULL, as the column holds it."""
    bare = sql_type(table.types[column.name])
    if column.kind == "uuid":
        staged = sql("toUUID(%)", staged)
    if column.kind == "time":
        moment = sql("fromUnixTimestamp64Micro(%, 'UTC')", staged)
        staged = sql("CAST(% AS Nullable(%))", moment, bare)
    if column.nullable:
        return staged
    return sql("ifNull(%, %)", staged, _default(table, column))


def _default(table: Table, column: Column) -> Fragment:
    if column.kind == "text":
        return sql("''")
    return sql("defaultValueOfTypeName(%)", Parameter("String", table.types[column.name]))


def _micros(table: Table, column: Column) -> Fragment:
    """A time column in microseconds; NULL where it is."""
    name, kind = Name(column.name), table.types[column.name].partition("(")[0]
    if kind == "DateTime64":
        return sql("toUnixTimestamp64Micro(toDateTime64(%, 6))", name)
    if kind == "DateTime":
        return sql("toInt64(toUnixTimestamp(%)) * 1000000", name)
    return sql("toInt64(toInt32(%)) * 86400000000", name)


def _empty(table: Table, name: str) -> Fragment:
    column = table.column(name)
    if column.nullable:
        return sql("% IS NULL", Name(column.name))
    return sql("% = %", Name(column.name), _default(table, column))


def _bounded(table: Table, bound: Bound) -> list[Fragment]:
    """The constant conditions by which partitions and granules are skipped."""
    column = table.column(bound.column)
    name, bare = Name(column.name), table.types[column.name]
    first, last = cast(tuple[int, int], time_range(bare))
    kind = bare.partition("(")[0]
    unit = {"DateTime": SECOND, "Date": DAY, "Date32": DAY}.get(kind, 1)
    template = {
        "DateTime": "toDateTime(%, 'UTC')",
        "Date": "toDate(toUInt16(%))",
        "Date32": "toDate32(toInt32(%))",
    }.get(kind, "fromUnixTimestamp64Micro(%, 'UTC')")

    def constant(units: int) -> Fragment:
        return sql(template, Parameter("Int64", units))

    where = []
    if bound.lower is not None and bound.lower > first:
        where.append(sql("% >= %", name, constant(min(bound.lower, last - unit) // unit)))
    if bound.upper is not None and bound.upper < last:
        upper = sql("% < %", name, constant(-(-max(bound.upper, first) // unit)))
        if bound.lower is None and column.nullable:
            # An open interval without a start includes the rows that have no time.
            upper = sql("% OR % IS NULL", upper, name)
        where.append(upper)
    return where


class Stage(NamedTuple):
    """
    The staged rows of one step.

    Args:
        rows: The table that holds one line for each row.
        by_key: The table that finds them by key, with one line for each key. It is the same table
            where each key has one row, and is one column from which its table can be read again.
        several: Some key has several rows: a line of ``by_key`` holds arrays.
        spares: The notes of messages that rows leave alone.
    """

    rows: Name
    by_key: Name
    several: bool
    spares: tuple[Spared, ...] = ()

    @property
    def direct(self) -> bool:
        """There is one table for both."""
        return self.rows == self.by_key


def stage_of(name: str, step: Step, table: Table, spares: tuple[Spared, ...] = ()) -> Stage:
    """The stage of a step, its tables called by this name and more."""
    several = len({row.equals for row in step.rows}) < len(step.rows)
    by_key = Name(f"{name}_by_key")
    # A Join table of several keys keeps only their hashes, and cannot be read as a table.
    direct = not several and len(step.shape.equals) == 1
    direct = direct and table.column(step.shape.key).kind in ("text", "uuid")
    return Stage(by_key if direct else Name(f"{name}_rows"), by_key, several, spares)


class Keys(NamedTuple):
    """
    The keys of a step's stage in a table of their own, see `Statements.create_keys`.

    Args:
        prunes: They are so few that the indexes may leave out a part of the table.
    """

    name: Name
    prunes: bool


def _argument(name: str) -> Name:
    """The name of a lambda's argument; no column can have it, because no message can name it."""
    return Name(f".{name}")


class Lookup:
    """How the statements of a step find what was staged for a row of the target."""

    def __init__(self, table: Table, shape: Shape, stage: Stage) -> None:
        self._table, self._shape, self._stage = table, shape, stage
        self._keys = join(", ", [_staged(table, table.column(name)) for name in shape.equals])

    def raw(self, attribute: str) -> Fragment:
        """What is staged under the key of a row: a value, or all values of the key."""
        # A function takes the table as a text; both names were checked to be plain.
        known = f"'{self._table.database}.{self._stage.by_key}', '{attribute}'"
        return sql("joinGet(%, %)", Fragment((known,)), self._keys)

    def value(self, attribute: str) -> Fragment:
        """What is staged for a row; anything where nothing is."""
        if self._stage.several:
            return sql("%[%]", self.raw(attribute), self._place())
        return self.raw(attribute)

    def found(self) -> Fragment:
        """Something is staged under the row's key, and the row's times lie in its intervals."""
        if self._stage.several:
            return sql("% > 0", self._place())
        times = [
            self._within(place, self.raw(f"start_{place}"), self.raw(f"end_{place}"))
            for place in range(len(self._shape.times))
        ]
        if self._stage.direct:
            return _all(times)  # that the key is there was asked of the same table
        return _all([sql("% = 1", self.raw("staged")), *times])

    def _within(self, place: int, start: Fragment, end: Fragment) -> Fragment:
        column = self._table.column(self._shape.times[place])
        micros = _micros(self._table, column)
        inside = sql("% >= % AND % < %", micros, start, micros, end)
        if not column.nullable:
            return inside
        floor = Parameter("Int64", FLOOR)
        timeless = sql("isNull(%) AND % = %", Name(column.name), start, floor)
        return (
            sql("ifNull(%, 0) OR (%)", inside, timeless)
            if self._shape.open
            else sql("ifNull(%, 0)", inside)
        )

    def _place(self) -> Fragment:
        """Which of the key's rows the row of the target belongs to; 0: none."""
        places = range(len(self._shape.times))
        names = [f"{end}_{place}" for place in places for end in ("start", "end")]
        # The function's arguments hide columns of their names.
        return sql(
            "arrayFirstIndex((%) -> %, %)",
            join(", ", [sql("%", _argument(name)) for name in names]),
            _all(
                [
                    self._within(
                        place,
                        sql("%", _argument(f"start_{place}")),
                        sql("%", _argument(f"end_{place}")),
                    )
                    for place in places
                ]
            ),
            join(", ", [self.raw(name) for name in names]),
        )


class Statements:
    """What is sent for one step, as fragments; nothing here connects."""

    #: The rows of the step have keys of one kind, which can be asked for: see `create_keys`.
    keyed = True

    def __init__(self, table: Table, step: Step, stage: Stage) -> None:
        self.table, self.step, self.stage = table, step, stage
        self._lookup = Lookup(table, step.shape, stage)

    # The stage

    def staged_columns(self) -> list[tuple[str, str]]:
        """Name and type of what is staged for a row."""
        shape, table = self.step.shape, self.table
        columns = [("update_id", "String"), ("sequence", "Int64")]
        for place, name in enumerate(shape.equals):
            columns.append((f"equal_{place}", _staged_type(table, table.column(name))))
        for place in range(len(shape.times)):
            columns += [(f"start_{place}", "Int64"), (f"end_{place}", "Int64")]
        if shape.messages is not None:
            columns.append(("message_time", "Int64"))
        for place, name in enumerate(shape.columns):
            if name != VERSION_COLUMN:
                bare = _staged_type(table, table.column(name))
                columns.append((f"value_{place}", f"Nullable({bare})"))
        columns += [
            (f"spared_{place}", "Array(String)") for place, _ in enumerate(self.stage.spares)
        ]
        return columns

    def staged_lists(
        self, spared: Mapping[tuple[StagedRow, Spared], Sequence[str]]
    ) -> list[list[Any]]:
        """The rows, as one list for each of `staged_columns`."""
        shape, rows, table = self.step.shape, self.step.rows, self.table
        lists: list[list[Any]] = [[row.update_id for row in rows], [row.sequence for row in rows]]
        for place, name in enumerate(shape.equals):
            lists.append(stage_values(table.column(name), [row.equals[place] for row in rows]))
        for place in range(len(shape.times)):
            intervals = [row.intervals[place] for row in rows]
            lists.append([FLOOR if start is None else start for start, _ in intervals])
            lists.append([CEILING if end is None else end for _, end in intervals])
        if shape.messages is not None:
            lists.append([row.message_time for row in rows])
        for place, name in enumerate(shape.columns):
            if name != VERSION_COLUMN:
                lists.append(stage_values(table.column(name), [row.values[place] for row in rows]))
        for note in self.stage.spares:
            lists.append([list(spared.get((row, note), ())) for row in rows])
        return lists

    def create_stage(self) -> list[Fragment]:
        """https://clickhouse.com/docs/engines/table-engines/special/join#creating-a-table"""
        columns = [sql("% %", Name(name), sql_type(kind)) for name, kind in self.staged_columns()]
        made = []
        if not self.stage.direct:
            made.append(
                sql(
                    "CREATE TABLE % (%) ENGINE = MergeTree ORDER BY tuple()",
                    self.table.beside(self.stage.rows),
                    join(", ", columns),
                )
            )
            template = "% Array(%)" if self.stage.several else "% %"
            columns = [sql("% %", name, sql_type(kind)) for name, kind in self._keyed()]
            columns += [sql(template, name, sql_type(kind)) for name, kind in self._values()]
            columns.append(sql("staged UInt8"))
        made.append(
            sql(
                "CREATE TABLE % (%) ENGINE = Join(ANY, LEFT, %)",
                self.table.beside(self.stage.by_key),
                join(", ", columns),
                self._keys(),
            )
        )
        return made

    def fill_by_key(self) -> list[Fragment]:
        """How the second table is made from the first, where there are two."""
        if self.stage.direct:
            return []
        keys = self._keys()
        values = join(", ", [sql("%", name) for name, _ in self._values()])
        into, rows = self.table.beside(self.stage.by_key), self.table.beside(self.stage.rows)
        if not self.stage.several:
            return [
                sql(
                    "INSERT INTO % (%, %, staged) SELECT %, %, 1 FROM %",
                    *(into, keys, values, keys, values, rows),
                )
            ]
        # All columns of a row as one tuple: groupArray of each column would leave NULL out.
        arrays = [
            sql("arrayMap(row -> row.%, rows)", Fragment((str(place),)))
            for place in range(1, len(self._values()) + 1)
        ]
        return [
            sql(
                "INSERT INTO % (%, %, staged) SELECT %, %, 1"
                " FROM (SELECT %, groupArray(tuple(%)) AS rows FROM % GROUP BY %)",
                *(into, keys, values, keys, join(", ", arrays), keys, values, rows, keys),
            )
        ]

    def _keyed(self) -> list[tuple[Name, str]]:
        return [(Name(n), kind) for n, kind in self.staged_columns() if n.startswith("equal_")]

    def _values(self) -> list[tuple[Name, str]]:
        return [
            (Name(name), kind)
            for name, kind in self.staged_columns()
            if name != "message_time" and not name.startswith("equal_")
        ]

    def _keys(self) -> Fragment:
        return join(", ", [sql("%", name) for name, _ in self._keyed()])

    # Which rows

    def selects(self) -> list[Fragment]:
        """What makes a row one of the step's, whatever the columns hold that are set."""
        return [*self._bounds(), self._candidates(), *self.conditions()]

    def _bounds(self) -> list[Fragment]:
        return [each for bound in self.step.bounds for each in _bounded(self.table, bound)]

    def _candidates(self) -> Fragment:
        found, staged = self._known()
        return sql("% IN (SELECT % FROM %)", found, join(", ", staged), self._rows())

    def _rows(self) -> Fragment:
        return self.table.beside(self.stage.rows)

    def conditions(self) -> list[Fragment]:
        """What is left to ask of a row whose key is staged."""
        shape, table = self.step.shape, self.table
        where = [
            sql("isNotNull(%)", Name(table.column(name).name))
            for name in shape.equals[1:]
            if table.column(name).nullable
        ]
        where += [_empty(table, name) for name in shape.empty if name not in shape.columns]
        where.append(self._lookup.found())
        where += [
            sql(
                "NOT has(%, %)",
                self._lookup.value(f"spared_{place}"),
                _staged_text(table, table.column(note.message_column)),
            )
            for place, note in enumerate(self.stage.spares)
        ]
        return where

    def _known(self) -> tuple[Fragment, list[Fragment]]:
        """
        What the indexes understand: the key, of messages with the day, of a row and as staged.

        It never lets go a row that `selects` wants: message times bound a row's time to the second.
        """
        shape, table = self.step.shape, self.table
        key = table.column(shape.key)
        name, staged = sql("%", Name(key.name)), sql("equal_0")
        if key.kind == "uuid":
            staged = sql("toUUID(equal_0)")
        elif key.kind == "time":
            name = _micros(table, key)
        if shape.messages is not None:
            time_column = table.column(shape.messages[1])
            if time_column.name in table.keys and not time_column.nullable:
                zone = _zone(table.types[time_column.name])
                # A time may have been rounded up to the next second, and that be of the next day.
                day = sql(
                    "arrayJoin(arrayDistinct([toDate(fromUnixTimestamp64Micro(message_time%)),"
                    " toDate(fromUnixTimestamp64Micro(message_time + 1000000%))]))",
                    *(zone, zone),
                )
                return sql("(toDate(%), %)", Name(time_column.name), name), [day, staged]
        return name, [staged]

    def lacks(self) -> list[Fragment]:
        """The row does not hold the values yet, and may be given them."""
        shape = self.step.shape
        where = self.allows()
        own_empty = [column for column in shape.empty if column in shape.columns]
        if not shape.versioned and not fills(self.step, own_empty):
            where.append(_any([self._differs(name) for name in shape.columns]))
        return where

    def allows(self) -> list[Fragment]:
        """The row may be given the values: what it holds is nobody's, or an earlier update's."""
        shape, table = self.step.shape, self.table
        own_empty = [column for column in shape.empty if column in shape.columns]
        if shape.versioned:
            version = table.column(VERSION_COLUMN)
            own_empty = own_empty or [name for name in shape.columns if name != VERSION_COLUMN]
            unset = _empty(table, VERSION_COLUMN)
            older = sql("% < %", Name(version.name), self._lookup.value("sequence"))
            return [
                sql("% OR ifNull(%, 0)", unset, older),
                sql("(%) OR NOT (%)", _all([_empty(table, name) for name in own_empty]), unset),
            ]
        return [_empty(table, name) for name in own_empty]

    def _differs(self, name: str) -> Fragment:
        column = self.table.column(name)
        place = self.step.shape.columns.index(name)
        held = sql("%", Name(column.name))
        wanted = _unstaged(self.table, column, self._lookup.value(f"value_{place}"))
        if not column.nullable:
            return sql("% != %", held, wanted)
        return sql("isNull(%) != isNull(%) OR ifNull(% != %, 0)", held, wanted, held, wanted)

    def holds(self) -> list[Fragment]:
        """The row is as its update wants it, or as a later one does."""
        shape = self.step.shape
        if shape.versioned:
            version = Name(self.table.column(VERSION_COLUMN).name)
            return [sql("ifNull(% >= %, 0)", version, self._lookup.value("sequence"))]
        return [sql("NOT (%)", self._differs(name)) for name in shape.columns]

    def values(self) -> list[tuple[Column, Fragment]]:
        """The columns that are set, each with what it is set to."""
        set_to = []
        for place, name in enumerate(self.step.shape.columns):
            column = self.table.column(name)
            if name == VERSION_COLUMN:
                wanted = self._lookup.value("sequence")
            else:
                wanted = _unstaged(self.table, column, self._lookup.value(f"value_{place}"))
            set_to.append((column, wanted))
        return set_to

    # The statements

    def _assignments(self) -> Fragment:
        return join(", ", [sql("% = %", Name(column.name), to) for column, to in self.values()])

    def create_keys(self, name: Name) -> list[Fragment]:
        """
        What an update asks whether it knows a row's key, as a table of the engine Set.

        ``IN (SELECT ..)`` in an update makes the engine read all of its columns for all rows; with
        a Set, which is no query, each condition reads the rows that the one before it has left.
        https://clickhouse.com/docs/engines/table-engines/special/set
        """
        _, staged = self._known()
        key = self.table.column(self.step.shape.key)
        kinds = ["UUID" if key.kind == "uuid" else _staged_type(self.table, key)]
        kinds = ["Date"] * (len(staged) - 1) + kinds
        columns = [Name(f"key_{place}") for place in range(len(kinds))]
        return [
            sql(
                "CREATE TABLE % (%) ENGINE = Set",
                self.table.beside(name),
                join(
                    ", ", [sql("% %", c, sql_type(k)) for c, k in zip(columns, kinds, strict=True)]
                ),
            ),
            sql(
                "INSERT INTO % SELECT DISTINCT % FROM %",
                self.table.beside(name),
                join(", ", staged),
                self._rows(),
            ),
        ]

    def _among(self, keys: Keys) -> list[Fragment]:
        """The row's key is in the Set, asked before all else, and the indexes are asked too."""
        found, staged = self._known()
        where = [sql("% IN %", found, self.table.beside(keys.name))]
        if keys.prunes:
            # A Set is of no use to an index. The hint is: the engine evaluates it for no row.
            each = staged[0] if len(staged) == 1 else sql("(%)", join(", ", staged))
            every = sql("(SELECT groupArray(%) FROM %)", each, self._rows())
            where.append(sql("indexHint(has(%, %))", every, found))
        return where

    def update(self, partitions: Sequence[str] | None, keys: Keys | None) -> Fragment:
        """https://clickhouse.com/docs/sql-reference/statements/update"""
        where = [*self.selects(), *self.lacks()]
        if keys is not None:
            where = [*self._among(keys), *self._bounds(), *self.conditions(), *self.lacks()]
        within = sql("")
        if partitions is not None and len(partitions) == 1:
            within = sql(" IN PARTITION ID %", Parameter("String", partitions[0]))
        elif partitions is not None:
            where.insert(0, self.inside(partitions))
        return sql(
            "UPDATE % SET %% WHERE %", self.table.named(), self._assignments(), within, _all(where)
        )

    def alter(self, partitions: Sequence[str] | None, keys: Keys | None) -> Fragment:
        """
        https://clickhouse.com/docs/sql-reference/statements/alter/update

        One command for all partitions: twelve of them, with ``IN PARTITION`` each, took 1.1 to 1.7
        CPU seconds in 300,000 rows where one takes 0.7 to 0.8. A mutation asks first whether a part
        has such rows, and leaves out the granules without a key; then it evaluates the condition
        for all rows of the part, and behind an ``if`` looks up the values of those that it knows.
        """
        where = [*self.selects(), *self.lacks()]
        if keys is not None:
            known, *_ = self._among(keys)
            details = _all([*self.conditions(), *self.lacks()])
            where = [known, sql("if(%, %, 0)", known, details)]
        within = sql("")
        if partitions is not None and len(partitions) == 1:
            within = sql(" IN PARTITION ID %", Parameter("String", partitions[0]))
        elif partitions is not None:
            where.insert(0, self.inside(partitions))
        return sql(
            "ALTER TABLE % UPDATE %% WHERE %",
            self.table.named(),
            self._assignments(),
            within,
            _all(where),
        )

    def apply_patches(self, partition: str) -> Fragment:
        """https://clickhouse.com/docs/sql-reference/statements/alter/apply-patches"""
        return sql(
            "ALTER TABLE % APPLY PATCHES IN PARTITION ID %",
            self.table.named(),
            Parameter("String", partition),
        )

    def inside(self, partitions: Sequence[str]) -> Fragment:
        """The row is in one of these partitions."""
        return sql("_partition_id IN %", Parameter("Array(String)", list(partitions)))

    def _seen(self) -> Fragment:
        """The table as a reader sees it."""
        return sql("% FINAL" if self.table.merges_rows else "%", self.table.named())

    def count_changes(self, partitions: Sequence[str] | None) -> Fragment:
        """How many rows of each partition would change."""
        where = [*self.selects(), *self.lacks()]
        if partitions is not None:
            where.insert(0, self.inside(partitions))
        return sql(
            "SELECT _partition_id, count() FROM % WHERE % GROUP BY 1",
            self.table.named(),
            _all(where),
        )

    def count_matches(self) -> Fragment:
        """How many rows are as each update wants them."""
        where = _all([*self.selects(), *self.holds()])
        return sql(
            "SELECT %, count() FROM % WHERE % GROUP BY 1",
            self._lookup.value("update_id"),
            self._seen(),
            where,
        )

    def create_whole(self, name: Name, more: Sequence[tuple[Name, str]] = ()) -> Fragment:
        """A table for whole rows, each with ``more`` columns, given by name and type."""
        columns = [
            sql("% %", Name(column), sql_type(self.table.declared[column]))
            for column in self.table.writable
        ]
        columns += [sql("% %", column, sql_type(kind)) for column, kind in more]
        return sql(
            "CREATE TABLE % (%) ENGINE = MergeTree ORDER BY tuple()",
            self.table.beside(name),
            join(", ", columns),
        )

    def select_whole(self, name: Name) -> Fragment:
        """The rows that change, whole and as they will be, put aside."""
        wanted = {column.name: to for column, to in self.values()}
        if self.table.replacing and self.table.arguments:
            version = self.table.column(self.table.arguments[0])
            wanted[version.name] = _next_version(self.table, version)
        # No result has an alias: a condition would mean the new value by the column's name.
        return sql(
            "INSERT INTO % (%) SELECT % FROM % WHERE %",
            self.table.beside(name),
            join(", ", [sql("%", Name(column)) for column in self.table.writable]),
            join(", ", [wanted.get(c, sql("%", Name(c))) for c in self.table.writable]),
            self._seen(),
            _all([*self.selects(), *self.lacks()]),
        )

    def insert_whole(self, name: Name) -> Fragment:
        columns = join(", ", [sql("%", Name(column)) for column in self.table.writable])
        return sql(
            "INSERT INTO % (%) SELECT % FROM %",
            self.table.named(),
            columns,
            columns,
            self.table.beside(name),
        )

    def create_moved(self, name: Name) -> Fragment:
        """A table for whole rows, each with what the old one is known by."""
        return self.create_whole(name, _MOVED_COLUMNS)

    def select_moved(self, name: Name) -> Fragment:
        """The rows that change, as they are stored and as they will be, put aside."""
        wanted = {column.name: to for column, to in self.values()}
        columns = [wanted.get(c, sql("%", Name(c))) for c in self.table.writable]
        # From this block number on, by partition, the rows came later than what is put aside.
        floors = sql(
            "(SELECT mapFromArrays(groupArray(id), groupArray(last + 1)) FROM (SELECT partition_id"
            " AS id, toUInt64(max(max_block_number)) AS last FROM system.parts"
            " WHERE database = % AND table = % GROUP BY id))",
            Parameter("String", self.table.parts[0]),
            Parameter("String", self.table.parts[1]),
        )
        return sql(
            "INSERT INTO % (%, %) SELECT %, %, % FROM % WHERE %",
            self.table.beside(name),
            join(", ", [sql("%", Name(column)) for column in self.table.writable]),
            join(", ", [sql("%", name) for name, _ in _MOVED_COLUMNS]),
            join(", ", columns),
            _NUMBERS,
            floors,
            self.table.named(),
            _all([*self.selects(), *self.lacks()]),
        )


#: What a row is known by: https://clickhouse.com/docs/engines/table-engines#table_engines-virtual_columns
_NUMBERS = sql("_partition_id, _block_number, _block_offset")

_MOVED_COLUMNS: Sequence[tuple[Name, str]] = (
    (Name("recognition_partition"), "String"),
    (Name("recognition_block"), "UInt64"),
    (Name("recognition_offset"), "UInt64"),
    (Name("recognition_floor"), "Map(String, UInt64)"),
)


class Moved:
    """
    How rows that were put aside are moved: inserted where they are not yet, then the old deleted.

    Either statement may be sent any number of times, after a crash by another worker too. A row
    whose old one is gone is not inserted: it was, before the old one was deleted, or somebody
    deleted it. Of rows that are the same in all columns so many are inserted as are missing.

    Args:
        name: Where they were put aside.
        columns: Those of the table that were put aside too.
        partitions: In which the old ones are.
    """

    def __init__(
        self, table: Table, name: Name, columns: Sequence[str], partitions: Sequence[str]
    ) -> None:
        self._table, self._aside = table, table.beside(name)
        self._columns = join(", ", [sql("%", Name(column)) for column in columns])
        self._partitions = Parameter("Array(String)", list(partitions))
        self._old = join(", ", [sql("%", name) for name, _ in _MOVED_COLUMNS[:3]])

    def insert(self, lock: Name, held: Name) -> Fragment:
        """
        Insert what is missing.

        It fails where the lock is another's, because that has no column of the name of ours.
        """
        row = self._row()
        return sql(
            "INSERT INTO % (%) SELECT % FROM (SELECT *, row_number() OVER (PARTITION BY"
            " recognition_row ORDER BY %) AS recognition_nth FROM (SELECT *, % AS recognition_row"
            " FROM %) WHERE (%) IN (SELECT % FROM % WHERE _partition_id IN %)) AS aside"
            " LEFT JOIN (SELECT % AS recognition_row, count() AS recognition_there FROM %"
            " PREWHERE _block_number >= (SELECT any(recognition_floor) FROM %)[_partition_id]"
            " GROUP BY recognition_row) AS there ON aside.recognition_row = there.recognition_row"
            " WHERE recognition_nth > recognition_there AND (SELECT count(%) FROM %) = 0"
            " ORDER BY %",
            *(self._table.named(), self._columns, self._columns, self._old, row, self._aside),
            *(self._old, _NUMBERS, self._table.named(), self._partitions),
            *(row, self._table.named(), self._aside, held, self._table.beside(lock), self._old),
        )

    def _row(self) -> Fragment:
        """By what a row is the same as another one in all columns."""
        return sql("sipHash128(formatRow('RowBinary', %))", self._columns)

    def count_inserted(self) -> Fragment:
        """How many of the rows that came since are such as were put aside."""
        return sql(
            "SELECT count() FROM % PREWHERE _block_number >= (SELECT any(recognition_floor) FROM %)"
            "[_partition_id] WHERE % IN (SELECT % FROM %)",
            *(self._table.named(), self._aside, self._row(), self._row(), self._aside),
        )

    def _is_old(self) -> Fragment:
        return sql(
            "_partition_id IN % AND (%) IN (SELECT % FROM %)",
            *(self._partitions, _NUMBERS, self._old, self._aside),
        )

    def delete(self) -> Fragment:
        """https://clickhouse.com/docs/sql-reference/statements/delete"""
        return sql("DELETE FROM % WHERE %", self._table.named(), self._is_old())

    def count_old(self) -> Fragment:
        """How many of the old rows are still there."""
        return sql("SELECT count() FROM % WHERE %", self._table.named(), self._is_old())

    def count_aside(self) -> Fragment:
        """How many rows were put aside, and how many of them differ in what they are known by."""
        return sql("SELECT count(), uniqExact(%) FROM %", self._old, self._aside)


def partitions_aside(table: Table, name: Name) -> Fragment:
    """From which partitions rows were put aside."""
    return sql("SELECT DISTINCT recognition_partition FROM %", table.beside(name))


def _staged_text(table: Table, column: Column) -> Fragment:
    """A column as the ledger's texts hold it."""
    staged = _staged(table, column)
    return staged if column.kind in ("text", "uuid") else sql("toString(%)", staged)


def _zone(bare: str) -> Fragment:
    """The time zone of a type as one more argument; without one both have the session's."""
    found = re.search(r"'([^']+)'", bare)
    return sql(", %", Parameter("String", found[1])) if found else sql("")


def _next_version(table: Table, column: Column) -> Fragment:
    name, bare = Name(column.name), table.types[column.name]
    if bare.startswith("DateTime64"):
        precision = int(bare[11])
        unit = {3: "Milliseconds", 6: "Microseconds", 9: "Nanoseconds"}.get(precision, "Seconds")
        return sql("%(%, 1)", Fragment((f"add{unit}",)), name)
    return sql("% + 1", name)
