"""
What is published beside a table of ClickHouse instead of written into it, and the view through
which readers see it.

An *override* stands for a shape: its lines, as they were staged, in a table of their own, and the
same by key in a table with the Join engine, from which a view of the target takes, for each row,
the line that stands. Of several that a row meets it is the one with the greatest sequence, column
by column, and what an update asks of a row is asked of the row as it is stored.

**What readers see at once.** A line is one value, looked up once for a row, so that no query sees
half of it. Tables and views are made under a window's name and take the place of what was there in
one step; a query that runs goes on with what it began with.

**What a crash leaves.** The lines are what was published: all else is made from them again. They
are added by a statement that fails where the lock is another's. To *squash* is to write in place
what the view says, by the expressions of the view, and then to forget the lines: the view first and
the lines last. As long as there are lines they stand, and squashing again changes nothing.

A definition cannot have parameters. The only values in one are numbers and texts of this file and
of `clickhouse_statements`, the names of types, and a shape's names: none of an update's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from typing import Any, Protocol

from recognition.errors import SinkError, TableError
from recognition.planner import Shape, StagedRow, Step
from recognition.sinks.clickhouse_cost import VISITOR_ROWS
from recognition.sinks.clickhouse_statements import (
    CEILING,
    FLOOR,
    SECOND,
    Fragment,
    Lookup,
    Name,
    Parameter,
    Stage,
    Statements,
    Table,
    _all,
    _any,
    join,
    sql,
    sql_type,
)
from recognition.sinks.rows import Column, names_of

#: What every table of an override is called, before the shape's digest.
PREFIX = "recognition_override_"

#: What a view is called: as its table, and this.
RECOGNIZED = "_recognized"

#: Of how many shapes a view looks lines up. A query of an empty table took 13 ms with one of three
#: columns, 45 with four, 115 with six: the engine analyses it each time.
MOST_SHAPES = 4

_NOT_IMPLEMENTED = 48

# How a view of ours is known: by its comment, which goes on with a digest of what it says.
_OURS = "recognition: "


class Server(Protocol):
    """What is needed of the connection."""

    def run(
        self,
        statement: Fragment,
        settings: Mapping[str, object] | None = None,
        *,
        writes: bool = False,
    ) -> None:
        """Send a statement that has no result."""
        ...

    def rows(self, statement: Fragment) -> Sequence[Sequence[Any]]:
        """The rows of a query."""
        ...

    def insert(
        self,
        database: Name,
        table: Name,
        columns: Sequence[tuple[str, str]],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """Insert rows, given as one list for each column."""
        ...


class Window(Protocol):
    """What is needed of a window: names that are its own, of what goes with it."""

    @property
    def id(self) -> str:
        """By which it is known."""
        ...

    def name(self, table: Table, what: str) -> Name:
        """A name for something that is made next, beside the table."""
        ...


# What stands for a row ----------------------------------------------------------------------------


class _Line(Lookup):
    """The same questions as to a stage, of the one line that stands for a row."""

    def __init__(self, table: Table, shape: Shape, stage: Stage, name: Name) -> None:
        super().__init__(table, shape, stage)
        self.name = name

    def looked_up(self) -> Fragment:
        """The line of the greatest sequence whose times the row lies in; an empty one else."""
        known = self.raw("line")
        places = range(len(self._shape.times))
        if not places:
            return known
        line = Name("recognition_line")
        inside = [
            self._within(
                place,
                sql("tupleElement(%, %)", line, Fragment((f"'start_{place}'",))),
                sql("tupleElement(%, %)", line, Fragment((f"'end_{place}'",))),
            )
            for place in places
        ]
        return sql("arrayFirst(% -> %, %)", line, _all(inside), known)

    def value(self, attribute: str) -> Fragment:
        return sql("tupleElement(%, %)", self.name, Fragment((f"'{attribute}'",)))

    def found(self) -> Fragment:
        return sql("% = 1", self.value("found"))


class Override(Statements):
    """
    The lines of one shape, and what they make of a row.

    Args:
        stage: Where its lines lie, and the same by key.
        place: Which of those beside a table it is, for the names that statements give things.
    """

    def __init__(self, table: Table, shape: Shape, stage: Stage, place: int) -> None:
        super().__init__(table, Step(level=0, shape=shape, rows=()), stage)
        self._place = place
        self.line_name = Name(f"recognition_line_{place}")
        self.meets_name = Name(f"recognition_meets_{place}")
        self._lookup = self._line = _Line(table, shape, stage, self.line_name)

    def at(self, stage: Stage) -> Override:
        """The same lines elsewhere."""
        return Override(self.table, self.shape, stage, self._place)

    @property
    def shape(self) -> Shape:
        """What its lines say, without their values."""
        return self.step.shape

    def line(self) -> Fragment:
        """A row's line, looked up."""
        return self._line.looked_up()

    def meets(self) -> Fragment:
        """A line stands for the row, and the row may be given its values."""
        key = self.table.column(self.shape.key)
        known = [sql("isNotNull(%)", Name(key.name))] if key.nullable else []
        return _all([*known, *self.conditions(), *self.allows()])

    def rank(self) -> Fragment:
        """Which of two lines stands: the greater one."""
        line = self._line
        return sql("(%, %)", line.value("sequence"), line.value("update_id"))

    def candidates(self) -> Fragment:
        """What the indexes understand of which rows are met."""
        return self._candidates()

    # Tables

    def create_rows(self, name: Name, comment: str = "") -> Fragment:
        """A table for lines; when each was published is in it too."""
        columns = [sql("% %", Name(n), sql_type(kind)) for n, kind in self.staged_columns()]
        return constant(
            sql(
                "CREATE TABLE IF NOT EXISTS % (%, published_at DateTime('UTC') DEFAULT now())"
                " ENGINE = MergeTree ORDER BY tuple() COMMENT %",
                self.table.beside(name),
                join(", ", columns),
                Parameter("String", comment),
            )
        )

    def add(self, name: Name, lock: Name, held: Name) -> Fragment:
        """
        The lines of ``name`` become published ones, but for those that are.

        It fails where the lock is another's, because that has no column of the name of ours.
        """
        columns = join(", ", [sql("%", Name(column)) for column, _ in self.staged_columns()])
        same = join(
            ", ",
            [
                sql("%", Name(column))
                for column, _ in self.staged_columns()
                if column == "update_id" or column.startswith(("equal_", "start_", "end_"))
            ],
        )
        rows = self.table.beside(self.stage.rows)
        return sql(
            "INSERT INTO % (%) SELECT % FROM % WHERE (%) NOT IN (SELECT % FROM %)"
            " AND (SELECT count(%) FROM %) = 0",
            *(rows, columns, columns, self.table.beside(name), same, same, rows),
            *(held, self.table.beside(lock)),
        )

    def copy(self, name: Name) -> Fragment:
        """All published lines into another table."""
        columns = join(", ", [sql("%", Name(column)) for column, _ in self.staged_columns()])
        rows = self.table.beside(self.stage.rows)
        return sql(
            "INSERT INTO % (%) SELECT % FROM %", self.table.beside(name), columns, columns, rows
        )

    def create_by_key(self, name: Name) -> Fragment:
        """https://clickhouse.com/docs/engines/table-engines/special/join"""
        line = sql("Array(%)" if self.shape.times else "%", self._line_type())
        columns = [sql("% %", key, sql_type(kind)) for key, kind in self._keyed()]
        return sql(
            "CREATE TABLE % (%, line %) ENGINE = Join(ANY, LEFT, %)",
            *(self.table.beside(name), join(", ", columns), line, self._keys()),
        )

    def fill_line_by_key(self, name: Name) -> Fragment:
        """One line for each key; of intervals all of them, the greatest sequence first."""
        elements = [sql("1"), *(sql("%", Name(n)) for n, _ in self._elements())]
        line = sql("CAST(tuple(%) AS %)", join(", ", elements), self._line_type())
        if self.shape.times:
            lines = sql(
                "arrayReverseSort(line -> (tupleElement(line, 'sequence'), tupleElement(line,"
                " 'update_id')), groupArray(%))",
                line,
            )
        else:
            lines = sql("argMax(%, (sequence, update_id))", line)
        return sql(
            "INSERT INTO % (%, line) SELECT %, % FROM % GROUP BY %",
            *(self.table.beside(name), self._keys(), self._keys(), lines),
            *(self.table.beside(self.stage.rows), self._keys()),
        )

    def _elements(self) -> list[tuple[str, str]]:
        return [
            (name, kind)
            for name, kind in self.staged_columns()
            if name != "message_time" and not name.startswith("equal_")
        ]

    def _line_type(self) -> Fragment:
        named = [sql("% %", Name(name), sql_type(kind)) for name, kind in self._elements()]
        return sql("Tuple(found UInt8, %)", join(", ", named))


class Squash(Statements):
    """
    The statements that write in place what the view of some overrides says.

    Args:
        step: What is known of the rows that change: the columns, and between which times they are.
    """

    keyed = False

    def __init__(self, table: Table, step: Step, overrides: Sequence[Override]) -> None:
        super().__init__(table, step, overrides[0].stage)
        self._overrides = overrides

    def _candidates(self) -> Fragment:
        return _any([each.candidates() for each in self._overrides])

    def conditions(self) -> list[Fragment]:
        return []

    def lacks(self) -> list[Fragment]:
        return [_any([self._differs(name) for name in self._names()])]

    def _differs(self, name: str) -> Fragment:
        held, value = Name(name), Name("recognition_value")
        differs = sql("% != %", held, value)
        if self.table.column(name).nullable:
            differs = sql("isNull(%) != isNull(%) OR ifNull(%, 0)", held, value, differs)
        return _bind(differs, {value: self._value(name)})

    def values(self) -> list[tuple[Column, Fragment]]:
        return [(self.table.column(name), self._value(name)) for name in self._names()]

    def _names(self) -> list[str]:
        return list(_seen_values(self.table, self._overrides))

    def _value(self, name: str) -> Fragment:
        """What is seen in a column: of as few overrides as set it, because it is looked up here."""
        setting = [
            each for each in self._overrides if name in [column.name for column, _ in each.values()]
        ]
        seen = _seen_values(self.table, setting)[name]
        meets = {each.meets_name: each.meets() for each in setting}
        return _bind(_bind(seen, meets), {each.line_name: each.line() for each in setting})


def _bind(fragment: Fragment, named: Mapping[Name, Fragment]) -> Fragment:
    """
    The fragment where these names mean these fragments.

    A statement that writes has no place for what its expressions have in common but a lambda. With
    everything spelled out, that of six shapes was longer than ClickHouse takes (256 KiB).
    """
    return sql(
        "arrayMap((%) -> %, %)[1]",
        join(", ", [sql("%", name) for name in named]),
        fragment,
        join(", ", [sql("[%]", each) for each in named.values()]),
    )


def _seen_values(table: Table, overrides: Sequence[Override]) -> dict[str, Fragment]:
    """
    By column, as the table spells it, what a reader sees in it.

    Each override's line, and whether it stands for the row, is there under its name.
    """
    setting: dict[str, list[tuple[Override, Fragment]]] = {}
    for override in overrides:
        for column, value in override.values():
            cast = sql("CAST(% AS %)", value, sql_type(column.declared))
            setting.setdefault(column.name, []).append((override, cast))
    seen = {}
    for name, several in setting.items():
        branches = []
        for override, value in several:
            stands = [sql("%", override.meets_name)]
            before = "NOT % OR % < %"
            for other, _ in several:
                if other is override:
                    # Of one update, whole and in pieces, both ranks are the same: the first stands.
                    before = "NOT % OR % <= %"
                else:
                    ranks = other.rank(), override.rank()
                    stands.append(sql(before, other.meets_name, *ranks))
            branches += [_all(stands), value]
        seen[name] = sql("multiIf(%, %)", join(", ", branches), Name(name))
    return seen


def define_view(table: Table, overrides: Sequence[Override]) -> Fragment:
    """
    What the view says.

    Each level names what the next one takes. A name that stood for a new value would be taken for
    it in the conditions beside it; so these get the columns' names at last.
    """
    columns = [Name(column) for column in table.writable]
    needed = dict.fromkeys(columns)
    for override in overrides:
        needed.update((Name(table.column(n).name), None) for n in names_of(override.shape))
    kept = [sql("%", name) for name in needed]
    lines = [sql("%", each.line_name) for each in overrides]
    found = [sql("% AS %", each.line(), each.line_name) for each in overrides]
    meets = [sql("% AS %", each.meets(), each.meets_name) for each in overrides]
    seen = _seen_values(table, overrides)
    new = {name: Name(f"recognition_value_{place}") for place, name in enumerate(seen)}
    # A choice between columns of LowCardinality is none.
    values = [
        sql("CAST(% AS %) AS %", value, sql_type(table.column(name).declared), new[name])
        for name, value in seen.items()
    ]
    level = sql("SELECT % FROM %", join(", ", [*kept, *found]), table.named())
    level = sql("SELECT % FROM (%)", join(", ", [*kept, *lines, *meets]), level)
    level = sql("SELECT % FROM (%)", join(", ", [*kept, *values]), level)
    named = [sql("% AS %", new[name], name) if name in new else sql("%", name) for name in columns]
    return constant(sql("SELECT % FROM (%)", join(", ", named), level))


def constant(fragment: Fragment) -> Fragment:
    """The same without parameters, for a definition: numbers and texts as such."""
    parts = []
    for part in fragment.parts:
        if isinstance(part, Parameter):
            if part.type == "Int64":
                part = f"toInt64({int(str(part.value))})"
            elif part.type == "String":
                escaped = str(part.value).replace("\\", "\\\\").replace("'", "\\'")
                part = f"'{escaped}'"
            else:
                raise TypeError(f"a {part.type} is no part of a definition")
        parts.append(part)
    return Fragment(tuple(parts))


# Which shapes -------------------------------------------------------------------------------------


def refuse_shape(shape: Shape, standing: Sequence[Shape]) -> str:
    """
    Why lines of this shape cannot stand beside those, or ``""``.

    What an update asks of a row is asked of the row as it is stored. So nothing may be asked of a
    column that another shape sets.
    """
    if shape.held:
        return f"it looks for a value of {shape.held[0]!r} and sets it"
    others = [each for each in standing if each != shape]
    if len(others) >= MOST_SHAPES:
        return f"lines of {len(others)} shapes stand, and a query looks for each of them"
    for other in others:
        for one, two in ((shape, other), (other, shape)):
            sets = {name.lower() for name in one.columns}
            asked = {name.lower() for name in names_of(one)} - sets
            if both := [name for name in two.columns if name.lower() in asked]:
                return f"one update sets {both[0]!r}, and another asks what it holds"
    return ""


def refuse_table(table: Table) -> str:
    """Why nothing can be published beside a table, or ``""``."""
    if table.replicated:
        return "each replica would need its own copy of what is published"
    return ""


def view_of(table: Table) -> Name:
    """What the view of a table is called; it is in the same database."""
    return Name(f"{table.parts[1]}{RECOGNIZED}")


# What stands --------------------------------------------------------------------------------------


class Overrides:
    """
    What is published beside one table; all but reading needs the table's lock.

    Args:
        lock: What the table's lock is called. It ends as the names of all that is the table's.
    """

    def __init__(self, server: Server, table: Table, lock: Name) -> None:
        self._server, self._table, self._lock = server, table, lock
        self._suffix = lock.rpartition("_")[2]
        #: The view as a statement names it.
        self.view = table.beside(view_of(table))
        #: By the names of our tables, what is in their comments; those that hold rows are full.
        self._there: dict[str, str] = {}
        self._full: set[str] = set()
        self._comment: str | None = None
        self._look()

    def _look(self) -> None:
        """https://clickhouse.com/docs/operations/system-tables/tables"""
        for name, engine, comment, rows in self._server.rows(
            sql(
                "SELECT name, engine, comment, ifNull(total_rows, 0) FROM system.tables"
                " WHERE database = % AND (name = % OR startsWith(name, %) AND endsWith(name, %))"
                " ORDER BY name",
                Parameter("String", self._table.parts[0]),
                Parameter("String", view_of(self._table)),
                Parameter("String", PREFIX),
                Parameter("String", self._suffix),
            )
        ):
            if name == view_of(self._table):
                ours = engine == "View" and comment.startswith(_OURS)
                self._comment = comment if ours else "?"
            else:
                self._there[name] = comment
                if rows:
                    self._full.add(name)

    def check_view(self) -> None:
        """
        See that the view's name is free, or the view's.

        Raises:
            TableError: It is not.
        """
        if self._comment == "?":
            raise TableError(
                f"table {self._table.parts[1]!r}: there is something else than its view that is"
                f" called {str(view_of(self._table))!r}; rename it, or drop it"
            )

    def standing(self) -> list[Override]:
        """
        The overrides that have lines, the columns of their rows' lines numbered.

        Raises:
            TableError: The table lacks a column now of which lines speak.
        """
        found: list[Override] = []
        for name in sorted(self._full):
            if not name.endswith(f"_lines_{self._suffix}"):
                continue
            shape = _read_shape(self._table, self._there[name])
            if lost := [n for n in names_of(shape) if n.lower() not in self._table.columns]:
                raise TableError(
                    f"table {self._table.parts[1]!r} has no column {lost[0]!r}, of which published"
                    f" values speak; add it again, or drop {name!r} and with it these values"
                )
            found.append(self._override(shape, len(found)))
        return found

    def refuse_shape(self, shape: Shape) -> str:
        """Why lines of this shape cannot stand beside those that do, or ``""``."""
        return refuse_shape(
            replace(shape, table=".".join(self._table.parts)),
            [override.shape for override in self.standing()],
        )

    def _override(self, shape: Shape, place: int = 0) -> Override:
        shape = replace(shape, table=".".join(self._table.parts))
        bare = Override(self._table, shape, Stage(Name(""), Name(""), True), place)
        content = _shape_text(shape) + repr(bare.staged_columns())
        digest = blake2b(content.encode(), digest_size=6).hexdigest()
        rows = Name(f"{PREFIX}{digest}_lines_{self._suffix}")
        by_key = Name(f"{PREFIX}{digest}_by_key_{self._suffix}")
        return bare.at(Stage(rows, by_key, True))

    def define(self, shape: Shape) -> Fragment:
        """What the view would say with lines of this shape too."""
        standing = self.standing()
        added = self._override(shape, len(standing))
        if added.shape not in [override.shape for override in standing]:
            standing.append(added)
        return define_view(self._table, standing)

    def age(self) -> tuple[int, int]:
        """How many lines there are, and how many seconds ago the oldest was published."""
        counts = [
            sql(
                "SELECT count() AS lines, min(published_at) AS oldest FROM %",
                self._table.beside(override.stage.rows),
            )
            for override in self.standing()
        ]
        if not counts:
            return 0, 0
        [[lines, age]] = self._server.rows(
            sql(
                "SELECT sum(lines), dateDiff('second', min(oldest), now()) FROM (%)",
                join(" UNION ALL ", counts),
            )
        )
        return int(lines), int(age)

    def seen(self) -> Table:
        """The table as readers see it: the view, as far as there is one."""
        if self._comment is None:
            return self._table
        return replace(
            self._table, parts=(self._table.parts[0], view_of(self._table)), engine="MergeTree"
        )

    # Publish, squash, forget

    def publish(self, window: Window, step: Step) -> None:
        """
        Let the rows of a step stand, and readers see them.

        The same rows a second time change nothing; what an interruption has left undone is done.
        """
        override = self._override(step.shape)
        rows = window.name(self._table, "lines")
        self._server.run(override.create_rows(rows))
        staged = Statements(self._table, step, override.stage)
        self._server.insert(
            self._table.database, rows, staged.staged_columns(), staged.staged_lists({})
        )
        lasting = override.stage.rows
        if lasting not in self._there:
            self._server.run(override.create_rows(lasting, _shape_text(override.shape)))
            self._there[lasting] = _shape_text(override.shape)
        self._server.run(override.add(rows, self._lock, _column(window)), writes=True)
        self._full.add(lasting)
        standing = self.standing()
        for each in standing:
            if each.stage.rows == lasting or each.stage.by_key not in self._there:
                self._put(window, self._by_key(window, each), each.stage.by_key)
        self._show(window, standing)

    def stage(self, window: Window) -> Squash | None:
        """
        The statements that write in place what stands; ``None``: nothing does.

        Lines are copied for them, under the window's name: who takes the window for dead takes them
        away, and sees whether a statement runs which needs them.
        """
        copies = []
        for override in self.standing():
            rows = window.name(self._table, "lines")
            self._server.run(override.create_rows(rows))
            self._server.run(override.copy(rows))
            by_key = self._by_key(window, override.at(Stage(rows, Name(""), True)))
            copies.append(override.at(Stage(rows, by_key, True)))
        if not copies:
            return None
        self._hold(window)
        return Squash(self._table, self._known(copies), copies)

    def forget(self, window: Window) -> None:
        """What stands was written in place: readers need it no more, and then it is gone."""
        standing = self.standing()
        self._show(window, [])
        for override in standing:
            rows = window.name(self._table, "lines")
            self._server.run(override.create_rows(rows, self._there[override.stage.rows]))
            self._put(window, rows, override.stage.rows)
            self._full.discard(override.stage.rows)
        for override in standing:
            by_key = window.name(self._table, "line_by_key")
            self._server.run(override.create_by_key(by_key))
            self._put(window, by_key, override.stage.by_key)

    def _by_key(self, window: Window, override: Override) -> Name:
        name = window.name(self._table, "line_by_key")
        self._server.run(override.create_by_key(name))
        self._server.run(override.fill_line_by_key(name))
        return name

    def _known(self, copies: Sequence[Override]) -> Step:
        """What is known of the rows that lines speak of: about how many, and of which times."""
        shapes = [override.shape for override in copies]
        times = {_time_of(self._table, shape) for shape in shapes}
        column = times.pop() if len(times) == 1 else None
        counts = []
        for override in copies:
            names = ("start_0", "end_0") if override.shape.times else ("message_time",) * 2
            reach = sql("min(%) AS first, max(%) AS last", Name(names[0]), Name(names[1]))
            if column is None:
                reach = sql("0 AS first, 0 AS last")
            counts.append(
                sql(
                    "SELECT count() AS lines, % FROM %",
                    reach,
                    self._table.beside(override.stage.rows),
                )
            )
        [[lines, first, last]] = self._server.rows(
            sql("SELECT sum(lines), min(first), max(last) FROM (%)", join(" UNION ALL ", counts))
        )
        if column is not None and any(shape.messages for shape in shapes):
            # What is stored of a message's time may be rounded.
            first, last = first // SECOND * SECOND, min((last // SECOND + 2) * SECOND, CEILING)
        shape = Shape(
            table=shapes[0].table,
            columns=tuple(sorted({column for shape in shapes for column in shape.columns})),
            equals=(shapes[0].key,),
            times=() if column is None else (column,),
        )
        start, end = None if first <= FLOOR else first, None if last >= CEILING else last
        row = StagedRow(
            update_id="",
            workspace="",
            equals=(None,),
            intervals=((start, end),) * len(shape.times),
            message_time=None,
            values=(),
            sequence=0,
            expected_rows=VISITOR_ROWS * int(lines),
        )
        return Step(level=0, shape=shape, rows=(row,))

    def _put(self, window: Window, made: Name, lasting: Name) -> None:
        """
        Let what was made take the place of what lasts, at once.

        Who takes the window for dead drops what was made; so it fails, if that one is late.
        """
        self._hold(window)
        template = "EXCHANGE TABLES % AND %" if lasting in self._there else "RENAME TABLE % TO %"
        try:
            self._server.run(
                sql(template, self._table.beside(made), self._table.beside(lasting)), writes=True
            )
        except SinkError as error:
            if getattr(error.__cause__, "code", None) != _NOT_IMPLEMENTED:
                raise
            raise TableError(
                f"the engine of database {self._table.parts[0]!r} cannot exchange tables; values"
                " can be published where it is Atomic, as it is by default"
            ) from error
        self._there.setdefault(lasting, "")

    def _hold(self, window: Window) -> None:
        """
        See that the lock is still the window's, for all that was made until now.

        It fails where the lock is another's. Who takes it away later drops what was made before.
        """
        self._server.rows(
            sql("SELECT count(%) FROM %", _column(window), self._table.beside(self._lock))
        )

    def _show(self, window: Window, overrides: Sequence[Override]) -> None:
        """Let readers see these, where they do not yet."""
        definition = define_view(self._table, overrides)
        digest = blake2b(definition.render()[0].encode(), digest_size=8).hexdigest()
        comment = f"{_OURS}{self._table.parts[1]} as it was recognized, {digest}"
        if self._comment == comment:
            return
        made = window.name(self._table, "view")
        self._server.run(
            constant(
                sql(
                    "CREATE VIEW % AS % COMMENT %",
                    self._table.beside(made),
                    definition,
                    Parameter("String", comment),
                )
            )
        )
        view = view_of(self._table)
        if self._comment is not None:
            self._there[view] = self._comment
        self._put(window, made, view)
        self._comment = comment


def count_seen(statements: Statements) -> Fragment:
    """How many rows, as readers see them, would change."""
    return sql(
        "SELECT count() FROM % WHERE %",
        statements.table.named(),
        _all([*statements.selects(), *statements.lacks()]),
    )


def _column(window: Window) -> Name:
    """The column of a lock that this window has; one of another window has none of this name."""
    return Name(f"w_{window.id}")


def _time_of(table: Table, shape: Shape) -> str | None:
    """The time column by which all rows of a shape are bounded."""
    if shape.times:
        return table.column(shape.times[0]).name
    if shape.messages is None or table.column(shape.messages[1]).nullable:
        return None
    return table.column(shape.messages[1]).name


def _shape_text(shape: Shape) -> str:
    said = {key: value for key, value in asdict(shape).items() if key != "table"}
    return json.dumps({"recognition": 1, **said}, ensure_ascii=False)


def _read_shape(table: Table, text: str) -> Shape:
    said: dict[str, Any] = json.loads(text)
    if said.pop("recognition") != 1:
        raise TableError(
            f"table {table.parts[1]!r}: values were published beside it by a later version of"
            " recognition"
        )
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
    return Shape(table=".".join(table.parts), **lists)
