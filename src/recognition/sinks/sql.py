"""
Any database that SQLAlchemy speaks to: a plan's rows are staged once, then one statement per step
sets the target's rows, all in one transaction.

How databases differ is a handful of methods that `sqlite.py` and `duckdb.py` override; nothing here
asks which database it is. No value ever becomes part of a statement's text: values travel in the
staged rows, names through SQLAlchemy's quoting after they were found in the real table.

**What a row must be.** ``empty`` is NULL; in a text column that is declared NOT NULL it is ``''``,
and setting such a column to null writes ``''``. A number or truth value that is set in a text
column becomes text. ``equals`` is exact: case, blanks and collation do not blur it.

**Which update stands.** In a table with ``recognition_version`` each row says by which update it
was written: a row is set when its version is smaller (or is the update's own, and the row was
overwritten by something else), and ``empty`` on a column that is set also lets pass what has a
version, because recognition wrote it. (Where such an update asks for no
``empty`` of what it sets, all columns that it sets must be empty, or the row have a version.) For
other tables ``recognition_ledger``, beside the rows and in the same transaction, remembers which
update took which interval of which key; what a later one took is cut out of an earlier one that
comes late, and rows that a later one named by message are spared. The ledger never says that
something need not be done again: an update that is applied a second time meets the rows that were
not there the first time. But where it knows a whole step already, the rows are looked at first, and
nothing is written where none would change.

The ledger does not tell the order of a later update that asks for more in another way (a further
``equals``, an ``empty`` of its own) than an earlier one that comes after it; versions do.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ClauseElement, Executable

from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    RecognitionError,
    SinkError,
    SinkUnavailableError,
    TableError,
    ValueRefusedError,
)
from recognition.messages import VERSION_COLUMN, to_text
from recognition.planner import (
    Bound,
    Plan,
    Shape,
    StagedRow,
    Step,
    Value,
    distinguish,
)
from recognition.sinks import Applied, AppliedStep, Capabilities
from recognition.sinks.rows import (
    KINDS,
    Column,
    Later,
    Note,
    Spared,
    convert,
    count_taken,
    cut_and_spare,
    fills,
    joined,
    lacking_of,
    later_of,
    names_of,
    note_extras,
    refuse_value,
    show_time,
    spread_notes,
    text_of,
)
from recognition.sinks.rows import Target as _Target

_DAY = 86_400 * 1_000_000
_PRUNING = 86_400.0  # seconds: a worker may run for months

# So many rows ask the ledger each for themselves: their notes are not worth a stage more.
_FEW = 100

_Expression = sa.ColumnElement[Any]
_Condition = sa.ColumnElement[bool]
_Prepared = TypeVar("_Prepared")
_Result = TypeVar("_Result")

LEDGER = sa.Table(
    "recognition_ledger",
    sa.MetaData(),
    sa.Column("update_id", sa.Text, nullable=False),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("table_name", sa.Text, nullable=False),
    sa.Column("key_column", sa.Text, nullable=False),
    sa.Column("key_value", sa.Text, nullable=False),
    sa.Column("message_column", sa.Text, nullable=False),  # '': not one message alone was meant
    sa.Column("message_id", sa.Text, nullable=False),
    sa.Column("extras", sa.Text, nullable=False),  # JSON: [column, value] that must be equal too
    sa.Column("columns", sa.Text, nullable=False),  # what was set: sorted, joined by commas
    sa.Column("empty", sa.Text, nullable=False),  # what had to be empty: the same
    sa.Column("time_column", sa.Text, nullable=False),  # '': all rows of the key were meant
    sa.Column("starts", sa.BigInteger),  # microseconds since 1970-01-01 UTC; NULL: unbounded
    sa.Column("ends", sa.BigInteger),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("applied_at", sa.BigInteger, nullable=False),
)
# The key first: SQLite takes an equal table and column, of which it has no statistics, for ten
# rows, begins with these, which are all, and goes through the stage for each of them.
_LEDGER_INDEX = sa.Index(
    "recognition_ledger_key", LEDGER.c.key_value, LEDGER.c.key_column, LEDGER.c.table_name
)


class Target(_Target):
    """A real table, and what it is in a statement."""

    __slots__ = ()

    def clause(self) -> sa.TableClause:
        """The table in a statement."""
        names: list[sa.ColumnClause[Any]] = [sa.column(c.name) for c in self.columns.values()]
        return sa.table(self.parts[-1], *names, schema=".".join(self.parts[:-1]) or None)


class StageColumn(NamedTuple):
    """
    A column of a stage.

    ``clone`` has the type of ``like``. ``time`` is given in microseconds and becomes what can be
    compared with ``like``. ``text`` and ``integer`` are what they say.
    """

    name: str
    kind: str
    like: Column | None = None


class Interval(NamedTuple):
    """A staged interval in two forms: comparable with a time column, and in microseconds."""

    start: _Expression
    end: _Expression
    starts: _Expression
    ends: _Expression


@dataclass(slots=True)
class Transaction:
    """
    A connection, how many statements went through it, and the stages that they made.

    ``alone``: one statement writes, once, so that a database may let it commit by itself.
    """

    connection: sa.Connection
    alone: bool = False
    statements: int = 0
    stages: list[str] = field(default_factory=list)

    def execute(
        self, statement: Executable, parameters: Mapping[str, object] | None = None
    ) -> sa.CursorResult[Any]:
        """Send one statement."""
        self.statements += 1
        return self.connection.execute(statement, dict(parameters or {}))

    def execute_text(self, statement: str, rows: Sequence[tuple[Any, ...]] | None = None) -> None:
        """Send a text that is the driver's own; with rows, once for each of them."""
        self.statements += 1
        self.connection.exec_driver_sql(statement, rows if rows is None else list(rows))


class _CreateStage(Executable, ClauseElement):
    """``CREATE TEMPORARY TABLE .. AS SELECT ..``; SQLAlchemy has one of its own from 2.1 on."""

    inherit_cache = False

    def __init__(self, name: str, select: sa.Select[Any]) -> None:
        self.name = name
        self.select = select


@compiles(_CreateStage)
def _render_create_stage(element: _CreateStage, compiler: SQLCompiler, **kw: Any) -> str:
    name = compiler.preparer.quote(element.name)
    return f"CREATE TEMPORARY TABLE {name} AS {compiler.process(element.select, **kw)}"


class Merge(Executable, ClauseElement):
    """
    ``MERGE INTO .. USING .. ON .. WHEN MATCHED THEN UPDATE``; SQLAlchemy has none of its own.

    All conditions stand in ``ON``, none behind ``WHEN MATCHED AND``: a database that refuses two
    source rows for one target row then looks only at those that would set it, and of these there
    are never two. No two rows of a step select the same row of the target: what a later update
    covers is cut out of the earlier one, and what it meets without covering it is in a later level,
    which is another statement. What is cut by the ledger only gets smaller. The constant bounds are
    in ``ON`` too, where they prune.
    """

    inherit_cache = False

    def __init__(
        self,
        table: sa.TableClause,
        stage: sa.FromClause,
        values: Mapping[sa.ColumnClause[Any], _Expression],
        where: Sequence[_Condition],
    ) -> None:
        self.table = table
        self.stage = stage
        self.values = values
        self.where = sa.and_(*where)


@compiles(Merge)
def _render_merge(element: Merge, compiler: SQLCompiler, **kw: Any) -> str:
    # As an UPDATE of SQLAlchemy's has it: a subquery of a condition finds both tables outside.
    froms = {element.table, element.stage}
    compiler.stack.append(
        {"correlate_froms": froms, "asfrom_froms": froms, "selectable": cast(Any, element)}
    )
    into = compiler.process(element.table, asfrom=True, **kw)
    using = compiler.process(element.stage, asfrom=True, **kw)
    values = ", ".join(
        f"{compiler.preparer.quote(column.name)} = {compiler.process(value, **kw)}"
        for column, value in element.values.items()
    )
    on = compiler.process(element.where, **kw)
    compiler.stack.pop()
    return f"MERGE INTO {into} USING {using} ON {on} WHEN MATCHED THEN UPDATE SET {values}"


class Inline(sa.sql.functions.FunctionElement[Any]):
    """Rows that stand inside a statement: texts, as literal columns, and values between them."""

    inherit_cache = True


@compiles(Inline)
def _render_inline(element: Inline, compiler: SQLCompiler, **kw: Any) -> str:
    return "".join(compiler.process(each, **kw) for each in element.clauses)


def render_json(columns: Sequence[StageColumn], lists: Sequence[Sequence[Any]]) -> str:
    """The rows as an array of objects; what is NULL is not there."""
    rows: list[dict[str, Any]] = [{} for _ in lists[0]]
    for column, values in zip(columns, lists, strict=True):
        for row, value in zip(rows, values, strict=True):
            if value is not None:
                row[column.name] = value
    return json.dumps(rows, ensure_ascii=False)


def render_try_cast(element: sa.TryCast[Any], compiler: SQLCompiler, **kw: Any) -> str:
    """``TRY_CAST(.. AS ..)``, for `compiles` with the name of a dialect that does not know it."""
    expression = compiler.process(element.clause, **kw)
    return f"TRY_CAST({expression} AS {compiler.process(element.typeclause, **kw)})"


class SqlSink(ABC):
    """
    A sink on an SQLAlchemy engine; a subclass is one database.

    Args:
        url: The database, as SQLAlchemy writes it.
        timeout: How long a lock of somebody else is waited for, in seconds.
        ledger_days: After how many days the ledger may forget what was applied. An update that
            comes later than this may undo what later updates did.
        add_missing_columns: A column that is set and missing is added to its table, before the
            transaction and for good. Otherwise the updates are refused, with the ALTER TABLE to
            run.
    """

    capabilities = Capabilities(ledger=True, counts_per_update=True)

    #: What `load` declares a column of each kind as.
    types: ClassVar[Mapping[str, str]]

    #: What `load` adds to the declaration of the key.
    primary_key: ClassVar[str] = " PRIMARY KEY"

    #: Which Python types a column of each kind holds.
    holds: ClassVar[Mapping[str, tuple[type, ...]]] = {
        "text": (str,),
        "integer": (int, float),
        "float": (int, float),
        "boolean": (bool,),
        "numeric": (int, float, bool, str),
        "any": (int, float, bool, str),
        "time": (str,),
        "uuid": (str,),
        "other": (),
    }

    #: As what a text of our own is staged and noted.
    text: ClassVar[sa.types.TypeEngine[Any]] = sa.Text()

    #: The kinds of columns that hold texts, which a collation may blur.
    collating: ClassVar[Collection[str]] = ("text", "any", "numeric", "uuid", "time")

    #: Rows are found by indexes, so that `load` makes one on the device.
    indexed: ClassVar[bool]

    #: Making a table commits, a temporary one too. Stages are then made and filled before the
    #: transaction, and what the ledger said by then is asked again in it.
    ddl_commits: ClassVar[bool] = False

    #: Making a table that stays commits, a temporary one does not: the ledger alone is made before.
    ledger_first: ClassVar[bool] = False

    #: The one statement is a `Merge`, because there is no UPDATE with a FROM, or on request.
    merges: bool = False

    #: A step of up to so many rows is a part of its own statements (see `inline`), so that no stage
    #: is made, filled and dropped: that saves round trips where there are such. Long texts are
    #: staged nevertheless.
    inline_rows: int = 0
    #: Rows whose texts have more characters together are staged: a statement is sent, and read by
    #: the server, several times, and servers limit what they read at once.
    inline_characters: int = 100_000

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        ledger_days: int = 90,
        add_missing_columns: bool = False,
    ) -> None:
        if timeout < 0:
            raise ConfigurationError(f"timeout is {timeout} seconds; it is at least 0")
        if ledger_days < 1:
            raise ConfigurationError(f"ledger_days is {ledger_days}; it is at least 1")
        self._timeout = timeout
        self._ledger_days = ledger_days
        self._adds_columns = add_missing_columns
        self._engine = self.make_engine(url, timeout)
        self._targets: dict[str, Target] = {}
        self._has_ledger = False
        self._pruned: float | None = None  # by the clock of this machine, in seconds

    # What a database says about itself ----------------------------------------------------------

    @abstractmethod
    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """
        An engine whose transactions really begin, and hold the writer's lock from then on.

        Under the execution option ``reads`` they hold no more than a reader's lock.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is a database; connecting to a missing one may create it."""

    @abstractmethod
    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """The table or view of this name, in any case, or ``None``."""

    @abstractmethod
    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """The names of the tables that need no schema."""

    @abstractmethod
    def assume(self, kind: str, name: str) -> Column:
        """What a column of this kind will be when `load` makes it."""

    @abstractmethod
    def refuse_time(self, column: Column) -> str | None:
        """Why a column cannot be compared with times, or ``None``."""

    @abstractmethod
    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """The type of a staged time that is compared with this column."""

    @abstractmethod
    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """Put rows into the stage, in bulk; they are given as one list for each column."""

    @abstractmethod
    def bytewise(self, expression: _Expression) -> _Expression:
        """What compares byte by byte where the text itself might not."""

    @abstractmethod
    def lies_within(
        self, like: Column, time: _Expression, interval: Interval, open_ended: bool
    ) -> _Condition:
        """The time lies in the staged interval (see `inside`)."""

    @abstractmethod
    def bounded(self, like: Column, time: _Expression, bound: Bound) -> Sequence[_Condition]:
        """The constant conditions by which the database skips what cannot match, if it does."""

    @abstractmethod
    def translate(self, error: BaseException | None) -> SinkError:
        """The most specific error of ours; its text holds no value."""

    def keeps_days(self, column: Column) -> bool:
        """Of a time the column keeps the day alone."""
        return column.declared.upper() == "DATE"

    def same(self, one: _Expression, other: _Expression, kind: str) -> _Condition:
        """Values of this kind are equal, to the byte where ``=`` is not; NULL equals nothing."""
        return one == other

    def differ(self, one: _Expression, other: _Expression, kind: str) -> _Condition:
        """The opposite, but that NULL equals NULL and nothing else; never unknown."""
        return one.is_distinct_from(other)

    def lacking(
        self,
        rows: sa.Select[Any],
        stage: sa.FromClause,
        column: sa.ColumnClause[Any],
        same: Sequence[_Condition],
    ) -> sa.Select[Any]:
        """
        Of rows of the stage those to which another table has none that is the same.

        Args:
            column: Of that table; one that is not NULL in a row that is the same.
        """
        table = cast(sa.FromClause, column.table)
        there: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(table).where(*same)
        return rows.where(~sa.exists(there))

    def set_rows(
        self,
        table: sa.TableClause,
        stage: sa.FromClause,
        values: Mapping[sa.ColumnClause[Any], _Expression],
        where: Sequence[_Condition],
    ) -> sa.Update | Merge:
        """The statement that sets the values in the rows of the table that meet the conditions."""
        if self.merges:
            return Merge(table, stage, values, where)
        return sa.update(table).values(dict(values)).where(*where)

    def changed_rows(self, result: sa.CursorResult[Any]) -> int:
        """How many rows a statement wrote."""
        return result.rowcount

    def bytes_read(self, connection: sa.Connection) -> int | None:
        """What the engine went through in the transaction so far, where it says so."""
        return None

    def create_ledger(self, transaction: Transaction) -> None:
        """Make the ledger, where there is none."""
        transaction.execute(CreateTable(LEDGER, if_not_exists=True))
        if self.indexed:
            transaction.execute(CreateIndex(_LEDGER_INDEX, if_not_exists=True))

    def declare(self, kind: str, indexed: bool) -> str:
        """What `load` declares a column as; a key is indexed too."""
        return self.types[kind]

    def takes_name(self, name: str) -> bool:
        """Whether a column or an index may have a name of this length."""
        return True

    def noted_name(self, target: Target) -> str:
        """By which the ledger knows the table, however an update spelled it."""
        return target.parts[-1]

    def serialized(self) -> AbstractContextManager[object]:
        """Held while a plan is applied, where the database's own locks are not enough."""
        return nullcontext()

    def inline(
        self,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> sa.FromClause:
        """
        The rows as a table of this name that is a part of a statement, as bound values.

        Its columns have the types that those of a stage would have. See `inline_rows`.
        """
        raise NotImplementedError("a sink that sets inline_rows says how rows become a table")

    def locked(
        self, transaction: Transaction, tables: Sequence[str]
    ) -> AbstractContextManager[object]:
        """
        Keeps other sinks from writing to these tables, where the database's locks are not enough.

        Entered first in a transaction, left when that has ended.

        Args:
            tables: As the plan spells them, in alphabetical order.
        """
        return nullcontext()

    # The sink -----------------------------------------------------------------------------------

    def compile(self, step: Step) -> str:
        """
        The statement that ``apply()`` sends for the step, and a comment with the step's bounds.

        It looks at the table's columns, and writes nothing. A table or column that is missing is
        taken to be as `load` would make it. ``apply()`` sends further statements: those that stage
        the rows, and, where the ledger knows of later updates, the same one for each shape of what
        these leave.

        Raises:
            SinkError: The database cannot be read.
        """
        target = None
        if self.exists():
            with self._reading() as connection:
                target = self._find(connection, step.table)
        target = self._complete(target, step.shape)
        statement = self._set_rows(step, target, self._stage_clause(step, target))
        text = str(statement.compile(dialect=self._engine.dialect))
        bounds = [
            f"{bound.column} in [{show_time(bound.lower)}, {show_time(bound.upper)})"
            for bound in step.bounds
        ]
        return f"{text}\n-- {' and '.join(bounds) or 'no bounds'}; {len(step.rows)} staged rows"

    def apply(self, plan: Plan) -> Applied:
        """
        Apply all steps in one transaction; see `recognition.sinks.Sink`.

        A step is not cut into chunks. A window of delivery has 10,000 updates at most, which bounds
        locks and log; the rows are loaded in bulk, so that no statement grows with them. What has
        a limit of its own for one load (see `fill_stage`) keeps it there, in pages.

        Raises:
            SinkUnavailableError: The database is locked, or cannot be reached. Nothing was written.
            OutcomeUnknownError: The connection was lost at the commit.
            SinkReadOnlyError: It may not be written.
            SinkError: It refused a statement. Everything was rolled back.
        """
        if not plan.steps:
            return Applied(rejected=plan.rejected)
        if not self.exists():
            missing = {
                row.update_id: TableError(
                    f"there is no table {step.table!r}: there is not even a database at this URL"
                )
                for step in plan.steps
                for row in step.rows
            }
            return Applied(rejected=(*plan.rejected, *missing.items()))
        tables = [step.table for step in plan.steps]
        needs_ledger = not all(step.shape.versioned for step in plan.steps)
        if self._adds_columns and any(map(self._may_lack_columns, plan.steps)):
            self._transact(
                tables, lambda _: None, lambda transaction, _: self._add_missing(transaction, plan)
            )
        applied, statements = self._transact(
            tables,
            lambda transaction: self._prepare(transaction, plan),
            self._apply,
            needs_ledger=needs_ledger,
            alone=len(plan.steps) == 1 and not needs_ledger,
        )
        return replace(applied, statements=statements)

    def rehearse(self, plan: Plan) -> Applied:
        """
        As `apply`, and then everything is rolled back.

        What a database makes outside of transactions stays: the empty ledger, where there is none.

        Raises:
            SinkError: As `apply`; nothing was written.
        """
        if not plan.steps or not self.exists():
            return self.apply(plan)

        def work(transaction: Transaction, prepared: _PreparedPlan) -> None:
            raise _UndoneError(self._apply(transaction, prepared))

        try:
            self._transact(
                [step.table for step in plan.steps],
                lambda transaction: self._prepare(transaction, plan),
                work,
                needs_ledger=not all(step.shape.versioned for step in plan.steps),
            )
        except _UndoneError as undone:
            # What was looked up may have been made by this very transaction.
            self._targets.clear()
            self._has_ledger = False
            self._pruned = None
            return undone.applied
        raise AssertionError("the work always raises")

    def missing_index(self, table: str, column: str) -> str | None:
        """The command that makes the index by which updates find rows, where it is wanted."""
        if not self.indexed or not self.exists():
            return None
        with self._reading() as connection:
            target = self._find(connection, table)
            if target is None:
                return None
            *schema, name = target.parts
            look = sa.inspect(connection)
            where = schema[-1] if schema else None
            found = look.get_indexes(name, schema=where)
            indexes: list[Sequence[str | None]] = [index["column_names"] for index in found]
            indexes.append(look.get_pk_constraint(name, schema=where)["constrained_columns"])
        wanted = target.column(column).name
        if any(names and names[0] == wanted for names in indexes):
            return None
        parts = ".".join(map(self._quote, target.parts))
        index = self._quote(self._name_index(name, wanted))
        return f"CREATE INDEX {index} ON {parts} ({self._quote(wanted)})"

    def _name_index(self, table: str, column: str) -> str:
        """Of the table and the column; of a digest of both where that would be too long."""
        name = f"{table}_{column}".replace(".", "_")
        if self.takes_name(name):
            return name
        return f"recognition_{blake2b(name.encode(), digest_size=8).hexdigest()}"

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect().execution_options(reads=True) as connection:
                yield connection
        except sa.exc.DBAPIError as exc:
            raise self.translate(exc.orig) from exc

    def clock(self) -> datetime | None:
        """The time of the database, where it says in which zone it is."""
        if not self.exists():
            return None
        with self._reading() as connection:
            now = connection.execute(sa.select(sa.func.current_timestamp())).scalar_one()
        return now if isinstance(now, datetime) and now.tzinfo is not None else None

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def load(
        self,
        table: str,
        rows: Sequence[Mapping[str, object]],
        *,
        key: str,
        columns: Mapping[str, str],
        index: Sequence[str] = ("anonymous_id",),
        stamps: Sequence[str] = (),
        stamped: Collection[object] = (),
    ) -> int:
        """
        Insert the rows whose key is not there yet, in one transaction.

        The table and columns that are missing are created. Of rows with the same key the first
        stands, but for what recognition has stamped on it: a row that is there already gets the
        stamp of the row that is loaded. Without that, a row that became visible after an update
        about it was applied, and whose worker died then, would hold the old stamp for good: when
        its message comes again, `Recognizer.flushed` trusts the stamp of now. A worker that was
        held up may put an older stamp in the place of a newer one. Its own `flushed` follows,
        compares that stamp with the owner of then, and emits an update where they differ; only if
        it dies before, after another worker has finished the same batch, does the older one stay.

        Loading the same rows again changes nothing.

        Args:
            rows: By column name; what is missing is NULL. Times are microseconds since 1970-01-01
                UTC.
            key: The column that is unique.
            columns: Name and kind: ``text``, ``time``, ``integer``, ``float`` or ``boolean``.
            index: The columns by which updates find rows; a table that is made gets an index on
                each of them that it has, where the database finds rows by indexes.
            stamps: The columns that recognition writes, that of the owner first. Where nobody is
                stamped and the row that is there has an owner, all are emptied, as an update would
                do it. Of two that hold ``recognition_version`` the greater one stands.
            stamped: The keys of the rows whose stamp replaces the one that is there; never those of
                rows whose event itself wrote what is in these columns.

        Returns:
            How many rows were inserted.
        """
        inserted, _ = self._transact(
            [table],
            lambda transaction: self._prepare_load(
                transaction, table, rows, key, columns, index, stamped
            ),
            lambda transaction, prepared: self._load(transaction, prepared, stamps),
        )
        return inserted

    def _transact(
        self,
        tables: Iterable[str],
        prepare: Callable[[Transaction], _Prepared],
        work: Callable[[Transaction, _Prepared], _Result],
        *,
        needs_ledger: bool = False,
        alone: bool = False,
    ) -> tuple[_Result, int]:
        """
        Do the work in one transaction; where a lock is in the way, again until the timeout.

        Args:
            tables: What is written to.
            prepare: Makes what the work needs, in the same transaction where that can be, otherwise
                before it.
            work: Makes no table where that would commit.
            needs_ledger: The work notes something in it.
            alone: See `Transaction`.

        Returns:
            What the work gave, and how many statements were sent for it.
        """
        deadline = time.monotonic() + self._timeout
        delay = 0.01
        stale = bool(self._targets or self._has_ledger)
        names = sorted(set(tables))
        while True:
            try:
                with self.serialized(), self._engine.connect() as connection:
                    transaction = Transaction(connection, alone)
                    return self._do(transaction, names, prepare, work, needs_ledger)
            except (sa.exc.DBAPIError, _LedgerMovedError) as exc:
                # What was known of the tables may have changed since: look again, once.
                self._targets.clear()
                self._has_ledger = False
                self._pruned = None
                error = exc if isinstance(exc, SinkError) else self.translate(exc.orig)
                if error.retryable:
                    if time.monotonic() + delay > deadline:
                        raise error from exc
                    time.sleep(delay)
                    delay = min(2 * delay, 0.5)
                elif stale:
                    stale = False
                else:
                    raise error from exc

    def _do(
        self,
        transaction: Transaction,
        tables: Sequence[str],
        prepare: Callable[[Transaction], _Prepared],
        work: Callable[[Transaction, _Prepared], _Result],
        needs_ledger: bool,
    ) -> tuple[_Result, int]:
        """
        Once, under the writer's lock.

        Where making a stage commits, all stages are made and filled before the transaction, those
        of the parts that later updates leave too. That asks the ledger outside the transaction, so
        that `_apply` asks it again under the locks of the rows, and all begins anew where another
        answer comes. To fill empty stages inside the transaction instead would need one for each
        cut that the ledger might ask for, and these are known only when it has been asked.
        """
        connection = transaction.connection
        if needs_ledger and self.ledger_first and not self._has_ledger:
            self.create_ledger(transaction)
            connection.commit()
            self._has_ledger = True
        with self.locked(transaction, tables):
            try:
                prepared = prepare(transaction)
                if self.ddl_commits:
                    connection.commit()  # the next statement begins a transaction
                result = work(transaction, prepared)
                if not self.ddl_commits:
                    self._drop_stages(transaction)
                self._commit(connection)
            except BaseException:
                if self.ddl_commits:
                    # Its stages are in no transaction that could be rolled back: they go with it.
                    connection.invalidate()
                else:
                    connection.rollback()
                raise
        if self.ddl_commits:
            try:
                self._drop_stages(transaction)
            except sa.exc.DBAPIError:
                connection.invalidate()  # what was committed stays so
        return result, transaction.statements

    def _drop_stages(self, transaction: Transaction) -> None:
        for stage in transaction.stages:
            transaction.execute_text(f"DROP TABLE {self._quote(stage)}")

    @staticmethod
    def _commit(connection: sa.Connection) -> None:
        try:
            connection.commit()
        except sa.exc.DBAPIError as exc:
            if exc.connection_invalidated:
                raise OutcomeUnknownError(
                    "the connection was lost while the transaction was committed; all of it "
                    "was written, or nothing; applying the same again is safe"
                ) from exc
            raise

    def _quote(self, name: str) -> str:
        return self._engine.dialect.identifier_preparer.quote(name)

    # Applying a plan ----------------------------------------------------------------------------

    def _prepare(self, transaction: Transaction, plan: Plan) -> _PreparedPlan:
        """Look at the tables, stage what they can take, cut what later updates took of it."""
        refused: dict[str, TableError] = {}
        targets: list[Target | None] = []
        for step in plan.steps:
            target, errors = self._check(transaction.connection, step)
            targets.append(target)
            refused.update(errors)
        steps: list[_PreparedStep] = []
        for step, target in zip(plan.steps, targets, strict=True):
            if refused:
                kept = tuple(row for row in step.rows if row.update_id not in refused)
                step = replace(step, rows=kept)
            if step.rows and target is not None:  # of a table that is missing all were refused
                steps.append(self._prepare_step(transaction, step, target))
        rejected = (*plan.rejected, *sorted(refused.items(), key=lambda pair: pair[0]))
        return _PreparedPlan(steps, rejected)

    def _prepare_step(self, transaction: Transaction, step: Step, target: Target) -> _PreparedStep:
        started = time.perf_counter()
        if not step.shape.versioned:
            self._open_ledger(transaction)
        stage = self._stage(transaction, step, target)
        asked = _Asked(stage, step.rows, range(len(step.rows)))
        later, noted = None, frozenset[_Line]()
        parts = [_Part(step, stage)]
        if not step.shape.versioned:
            asked = self._ask(transaction, asked, step, target)
            later, noted = self._find_later(transaction, asked, step, target)
            if any(later):
                parts = [
                    _Part(part, self._stage(transaction, part, target), spare)
                    for part, spare in cut_and_spare(step, *later)
                ]
            known = bool(noted) and _find_new(step, target, noted) == []
            parts = [self._look_up(transaction, part, target, known, noted) for part in parts]
        seconds = time.perf_counter() - started
        return _PreparedStep(step, target, asked, later, noted, parts, seconds)

    def _look_up(
        self,
        transaction: Transaction,
        part: _Part,
        target: Target,
        known: bool,
        noted: frozenset[_Line],
    ) -> _Part:
        """
        The part with what is to be noted of it; ``known``: all of its step is noted.

        What is there already is not looked for in the statement that notes: of a young ledger, or
        one that grew since it was analysed, PostgreSQL expects one note, and looks for each row
        through all of them, and MariaDB through all notes of the key.
        """
        if known or not part.step.shape.covers:
            return part._replace(known=known)
        new = _find_new(part.step, target, noted) if noted else None
        if new is None:
            return part._replace(notes=part.stage)
        if not new:
            return part._replace(known=True)
        rows = tuple(part.step.rows[place] for place in new)
        return part._replace(notes=self._stage(transaction, replace(part.step, rows=rows), target))

    def _apply(self, transaction: Transaction, plan: _PreparedPlan) -> Applied:
        done: list[AppliedStep] = []
        matched: defaultdict[str, int] = defaultdict(int)
        for prepared in plan.steps:
            for part in prepared.parts:
                seconds = prepared.seconds if part is prepared.parts[0] else 0.0
                done.append(self._run(transaction, prepared.target, part, matched, seconds))
            if prepared.later is not None and any(prepared.later):
                parts = [part.step for part in prepared.parts]
                for update_id, taken in count_taken(prepared.step, parts).items():
                    if update_id in matched:
                        matched[update_id] += taken
        if self.ddl_commits:
            # From here on writers of these rows wait for us; those before have noted what they did.
            for prepared in plan.steps:
                if prepared.later is None:
                    continue
                found = self._find_later(
                    transaction, prepared.asked, prepared.step, prepared.target
                )
                if found != (prepared.later, prepared.noted):
                    raise _LedgerMovedError(
                        "another worker applied later updates of the same rows meanwhile, or the "
                        "same ones; all was rolled back"
                    )
        for prepared in plan.steps:
            for part in prepared.parts:
                if part.notes is not None:
                    self._remember(transaction, part.step.shape, part.notes, prepared.target)
        return Applied(
            rows_matched=sum(step.rows_matched for step in done),
            rows_changed=sum(step.rows_changed for step in done),
            steps=tuple(done),
            matched_by_update=dict(matched),
            rejected=plan.rejected,
            bytes_read=self.bytes_read(transaction.connection),
        )

    def _run(
        self,
        transaction: Transaction,
        target: Target,
        part: _Part,
        matched: defaultdict[str, int],
        seconds: float,
    ) -> AppliedStep:
        started = time.perf_counter()
        step, stage, spare, known, _ = part
        counts: dict[str, int] | None = None
        changed = wanting = 0
        # What was applied before mostly changes nothing: it is looked at first, and read once.
        if known and not spare and step.needs_count(0):
            look = self._count_rows(stage, step, target, first=True)
            found = cast(Sequence[Any], transaction.execute(look).all())
            counts = {update_id: rows + wanted for update_id, rows, wanted in found}
            wanting = sum(wanted for _, _, wanted in found)
        if counts is None or wanting:
            done = transaction.execute(self._set_rows(step, target, stage, spare))
            changed = self.changed_rows(done)
        rows = changed
        if step.needs_count(changed) if counts is None else changed != wanting:
            look = self._count_rows(stage, step, target)
            counts = dict(cast(Sequence[Any], transaction.execute(look).all()))
        if counts is not None:
            rows = sum(counts.values())
            for update_id in {row.update_id for row in step.rows}:
                matched[update_id] += counts.get(update_id, 0)
        return AppliedStep(
            table=step.table,
            rows_matched=rows,
            rows_changed=changed,
            seconds=seconds + time.perf_counter() - started,
        )

    # Statements ---------------------------------------------------------------------------------

    def _set_rows(
        self,
        step: Step,
        target: Target,
        stage: sa.FromClause,
        spare: frozenset[Spared] = frozenset(),
    ) -> sa.Update | Merge:
        """The one statement that writes to the target."""
        table = target.clause()
        values, wanting = self._sets(table, stage, step, target)
        where = self._selects(table, stage, step.shape, target) + wanting
        where += self._bounds(table, step, target)
        where += self._spare(table, stage, step, target, sort_notes(spare))
        return self.set_rows(table, stage, values, where)

    def _sets(
        self, table: sa.TableClause, stage: sa.FromClause, step: Step, target: Target
    ) -> tuple[Mapping[sa.ColumnClause[Any], _Expression], list[_Condition]]:
        """What is set, and what makes a row that is selected one that is written."""
        shape = step.shape
        where = [
            self._equal(table, stage, shape, target, place)
            for place, column in enumerate(shape.equals)
            if column in shape.columns
        ]
        values: dict[sa.ColumnClause[Any], _Expression] = {
            table.c[target.column(column).name]: stage.c[f"value_{place}"]
            for place, column in enumerate(shape.columns)
            if column != VERSION_COLUMN
        }
        differs = [
            self._differ(column, staged, target.column(column.name), target)
            for column, staged in values.items()
        ]
        own_empty = [column for column in shape.empty if column in shape.columns]
        if shape.versioned:
            version = table.c[target.column(VERSION_COLUMN).name]
            values[version] = stage.c.sequence
            own_empty = own_empty or [c for c in shape.columns if c != VERSION_COLUMN]
            empty = sa.and_(*(self._empty(table, target, column) for column in own_empty))
            # A pipeline that writes a row again may set the event's own columns alone, and leave
            # the version of the update that it overwrites: that update may set the row once more.
            overwritten = sa.and_(version == stage.c.sequence, sa.or_(*differs))
            where.append(sa.or_(version.is_(None), version < stage.c.sequence, overwritten))
            where.append(sa.or_(empty, version.is_not(None)))
        else:
            where += [self._empty(table, target, column) for column in own_empty]
            if not fills(step, own_empty):
                where.append(sa.or_(*differs))
        return values, where

    def _bounds(self, table: sa.TableClause, step: Step, target: Target) -> list[_Condition]:
        where: list[_Condition] = []
        for bound in step.bounds:
            like = target.column(bound.column)
            if self.keeps_days(like):
                bound = _whole_days(bound)
            where += self.bounded(like, table.c[like.name], bound)
        return where

    def _selects(
        self, table: sa.TableClause, stage: sa.FromClause, shape: Shape, target: Target
    ) -> list[_Condition]:
        """What makes a row one of the update's, whatever the columns hold that are set."""
        where = [
            self._equal(table, stage, shape, target, place)
            for place, column in enumerate(shape.equals)
            if column not in shape.columns
        ]
        where += [
            self._empty(table, target, column)
            for column in shape.empty
            if column not in shape.columns
        ]
        for place, name in enumerate(shape.times):
            like = target.column(name)
            interval = Interval(
                *(stage.c[f"{end}_{place}"] for end in ("start", "end", "starts", "ends"))
            )
            time_of = table.c[like.name]
            condition = self.lies_within(like, time_of, interval, shape.open)
            if shape.open:
                timeless = sa.and_(time_of.is_(None), interval.starts.is_(None))
                condition = sa.or_(condition, timeless)
            where.append(condition)
        return where

    def _count_rows(
        self, stage: sa.FromClause, step: Step, target: Target, *, first: bool = False
    ) -> sa.Select[Any]:
        """
        Rows by update that are now as the update wants them.

        ``first``: and beside them those that the statement would write, if it was sent now.
        """
        shape = step.shape
        table = target.clause()
        where = self._selects(table, stage, shape, target)
        if shape.versioned:
            holds = [table.c[target.column(VERSION_COLUMN).name] >= stage.c.sequence]
        else:
            holds = [
                ~self._differ(table.c[column.name], stage.c[f"value_{place}"], column, target)
                for place, column in enumerate(map(target.column, shape.columns))
            ]
        counts = [sa.func.count().label("rows")]
        if first:
            _, wanting = self._sets(table, stage, step, target)
            counts = [_count_if(holds).label("rows"), _count_if(wanting).label("wanting")]
        else:
            where += holds
        where += self._bounds(table, step, target)
        return (
            sa.select(stage.c.update_id, *counts)
            .select_from(stage.join(table, sa.and_(*where)))
            .group_by(stage.c.update_id)
        )

    def _equal(
        self,
        table: sa.TableClause,
        stage: sa.FromClause,
        shape: Shape,
        target: Target,
        place: int,
    ) -> _Condition:
        column = target.column(shape.equals[place])
        one, other = table.c[column.name], stage.c[f"equal_{place}"]
        if self._blurs(column, target):
            # The first lets an index be used, the second is the exact one.
            return sa.and_(one == other, self.bytewise(one) == self.bytewise(other))
        return self.same(one, other, column.kind)

    def _differ(
        self, one: _Expression, other: _Expression, column: Column, target: Target
    ) -> _Condition:
        """They are not the same, to the byte; NULL is the same as NULL."""
        if self._blurs(column, target):
            one, other = self.bytewise(one), self.bytewise(other)
        return self.differ(one, other, column.kind)

    def _blurs(self, column: Column, target: Target) -> bool:
        return target.collated and column.kind in self.collating

    def _empty(self, table: sa.TableClause, target: Target, name: str) -> _Condition:
        column = target.column(name)
        found, nothing = table.c[column.name], _nothing(column)
        if self._blurs(column, target) and not isinstance(nothing, sa.Null):
            return self.bytewise(found) == self.bytewise(nothing)  # blanks are not nothing
        return _is_empty(found, column)

    @staticmethod
    def inside(
        time: _Expression, start: _Expression, end: _Expression, open_ended: bool
    ) -> _Condition:
        """``start <= time < end``; where the interval may be open, a NULL end does not count."""
        if open_ended:
            return sa.and_(
                sa.or_(start.is_(None), time >= start), sa.or_(end.is_(None), time < end)
            )
        return sa.and_(time >= start, time < end)

    # The stage ----------------------------------------------------------------------------------

    def _stage_columns(self, shape: Shape, target: Target) -> list[StageColumn]:
        columns = [StageColumn("update_id", "text"), StageColumn("sequence", "integer")]
        if not shape.versioned:
            columns += [
                StageColumn("workspace", "text"),
                StageColumn("position", "integer"),
                StageColumn("extras", "text"),
            ]
        for place, name in enumerate(shape.equals):
            columns.append(_like(f"equal_{place}", target.column(name)))
        for place, name in enumerate(shape.times):
            like = target.column(name)
            columns += [
                StageColumn(f"start_{place}", "time", like),
                StageColumn(f"end_{place}", "time", like),
                StageColumn(f"starts_{place}", "integer"),
                StageColumn(f"ends_{place}", "integer"),
            ]
        for place, name in enumerate(shape.columns):
            if name != VERSION_COLUMN:
                columns.append(_like(f"value_{place}", target.column(name)))
        return columns

    def _stage_clause(self, step: Step, target: Target) -> sa.FromClause:
        """What the statements know the rows by, without their values."""
        columns = self._stage_columns(step.shape, target)
        stage = _named_stage(repr(step.shape), columns)
        if self._goes_inline(step, target):
            return self.inline(
                stage.name, columns, target, [[None] * len(step.rows)] * len(columns)
            )
        return stage

    def _goes_inline(self, step: Step, target: Target) -> bool:
        texts = (
            value
            for row in step.rows
            for value in (*row.equals, *row.values)
            if isinstance(value, str)
        )
        return len(step.rows) <= self.inline_rows and sum(map(len, texts)) <= self.inline_characters

    def _stage(self, transaction: Transaction, step: Step, target: Target) -> sa.FromClause:
        columns = self._stage_columns(step.shape, target)
        stage = _named_stage(repr(step.shape), columns, transaction.stages)
        lists = _stage_lists(step, target)
        if self._goes_inline(step, target):
            return self.inline(stage.name, columns, target, lists)
        self._make_stage(transaction, stage.name, columns, target, lists)
        return stage

    def _make_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> None:
        transaction.stages.append(name)
        table = target.clause()
        selected: list[_Expression] = []
        for column in columns:
            expression: _Expression
            if column.like is not None and column.kind == "clone":
                expression = table.c[column.like.name]
            elif column.like is not None:
                expression = sa.cast(sa.null(), self.stage_time(column.like))
            elif column.kind == "text":
                expression = sa.cast(sa.null(), self.text)
            else:
                expression = sa.cast(sa.null(), sa.BigInteger())
            selected.append(expression.label(column.name))
        # The types are the target's own, so that no comparison has to convert a column.
        nothing = sa.select(*selected).select_from(table).where(sa.literal_column("1 = 0"))
        transaction.execute(_CreateStage(name, nothing))
        self.fill_stage(transaction, name, columns, lists)

    # The ledger ---------------------------------------------------------------------------------

    def _open_ledger(self, transaction: Transaction) -> None:
        if not self._has_ledger:
            self.create_ledger(transaction)
            self._has_ledger = True
        now = time.monotonic()
        if self._pruned is None or now - self._pruned > _PRUNING:
            before = _now() - self._ledger_days * _DAY
            transaction.execute(sa.delete(LEDGER).where(LEDGER.c.applied_at < before))
            self._pruned = now

    def as_text(self, expression: _Expression, column: Column) -> _Expression:
        """What the column holds, as the ledger's texts hold it."""
        return expression if column.kind == "text" else sa.cast(expression, self.text)

    def as_key(self, expression: _Expression, column: Column) -> _Expression:
        """By what the ledger finds a key; whatever differs where keys do."""
        return self.as_text(expression, column)

    def _constant_text(self, text: str) -> _Expression:
        return sa.cast(sa.literal(text, self.text), self.text)

    def _ask(self, transaction: Transaction, whole: _Asked, step: Step, target: Target) -> _Asked:
        """
        By which rows of the step the ledger is asked: by one for each key, where they share few.

        All notes of a key come with each row that asks for them: of an update that names 10,000
        messages of a device, and was noted before, that would be 10,000 times 10,000.
        """
        if len(step.rows) <= _FEW:
            return whole
        first: dict[tuple[str, object], StagedRow] = {}
        for row in step.rows:
            least = first.setdefault(_key_of(row), row)
            if row.sequence < least.sequence:
                first[_key_of(row)] = row
        if 2 * len(first) > len(step.rows):
            return whole
        number = {key: n for n, key in enumerate(first)}
        rows = tuple(first.values())
        stage = self._stage(transaction, replace(step, rows=rows), target)
        return _Asked(stage, rows, [number[_key_of(row)] for row in step.rows])

    def _find_later(
        self, transaction: Transaction, asked: _Asked, step: Step, target: Target
    ) -> tuple[Later, frozenset[_Line]]:
        """What later updates took of the step's rows, and the lines of the step's own updates."""
        stage, rows, asks = asked
        found: Sequence[Any] = transaction.execute(
            sa.select(
                stage.c.position,
                LEDGER.c.sequence,
                LEDGER.c.update_id,
                *(LEDGER.c[name] for name in _NOTED),
            )
            .select_from(
                stage.join(
                    LEDGER,
                    sa.and_(
                        *self._same_key(stage, step, target),
                        LEDGER.c.sequence >= stage.c.sequence,
                    ),
                )
            )
            .order_by(stage.c.position, LEDGER.c.sequence, LEDGER.c.update_id, LEDGER.c.starts)
        ).all()
        notes = [Note(*note) for note in found]
        own = {row.update_id for row in step.rows}
        noted = frozenset(
            (*_key_of(rows[note.position]), *note[2:]) for note in notes if note.update_id in own
        )
        return later_of(step, target, spread_notes(step, target, notes, asks)), noted

    def _same_key(self, stage: sa.FromClause, step: Step, target: Target) -> tuple[_Condition, ...]:
        return (
            LEDGER.c.table_name == self.noted_name(target),
            LEDGER.c.key_column == target.column(step.shape.key).name,
            LEDGER.c.key_value == self.as_key(stage.c.equal_0, target.column(step.shape.key)),
            self.same(LEDGER.c.workspace, stage.c.workspace, "text"),
        )

    def _spare(
        self,
        table: sa.TableClause,
        stage: sa.FromClause,
        step: Step,
        target: Target,
        spare: Sequence[Spared],
    ) -> list[_Condition]:
        """No row that a later update named by message."""
        where = []
        for note in spare:
            column = target.column(note.message_column)
            named: sa.Select[Any] = (
                sa.select(sa.literal_column("1"))
                .select_from(LEDGER)
                .where(
                    *self._noted_as(stage, step, target, note),
                    self.same(
                        LEDGER.c.message_id, self.as_text(table.c[column.name], column), "text"
                    ),
                )
            )
            where.append(~sa.exists(named.correlate(table, stage)))
        return where

    def _noted_as(
        self, stage: sa.FromClause, step: Step, target: Target, note: Spared
    ) -> tuple[_Condition, ...]:
        """Lines of the ledger in which a later update than the staged one named messages."""
        later = sa.or_(
            LEDGER.c.sequence > stage.c.sequence,
            sa.and_(LEDGER.c.sequence == stage.c.sequence, LEDGER.c.update_id > stage.c.update_id),
        )
        return (
            *self._same_key(stage, step, target),
            LEDGER.c.message_column == note.message_column,
            LEDGER.c.columns == note.columns,
            LEDGER.c.extras == note.extras,
            later,
        )

    def _remember(
        self, transaction: Transaction, shape: Shape, stage: sa.FromClause, target: Target
    ) -> None:
        """Note what the staged updates took."""
        timed = bool(shape.times)
        nothing = sa.cast(sa.null(), sa.BigInteger())
        message: tuple[str, _Expression] = ("", self._constant_text(""))
        if place := _named_by(shape):
            column = target.column(shape.equals[place])
            message = (column.name, self.as_text(stage.c[f"equal_{place}"], column))
        key = target.column(shape.key)
        line: dict[str, _Expression] = {
            "update_id": stage.c.update_id,
            "workspace": stage.c.workspace,
            "table_name": self._constant_text(self.noted_name(target)),
            "key_column": self._constant_text(key.name),
            "key_value": self.as_key(stage.c.equal_0, key),
            "message_column": self._constant_text(message[0]),
            "message_id": message[1],
            "extras": stage.c.extras,
            "columns": self._constant_text(joined(shape.columns, target)),
            "empty": self._constant_text(joined(shape.empty, target)),
            "time_column": self._constant_text(target.column(shape.times[0]).name if timed else ""),
            "starts": stage.c.starts_0 if timed else nothing,
            "ends": stage.c.ends_0 if timed else nothing,
            "sequence": stage.c.sequence,
            "applied_at": sa.cast(sa.literal(_now(), sa.BigInteger()), sa.BigInteger()),
        }
        lines = sa.select(*line.values()).where(stage.c.extras.is_not(None))
        transaction.execute(sa.insert(LEDGER).from_select(list(line), lines))

    # Looking at tables --------------------------------------------------------------------------

    def _find(self, connection: sa.Connection, table: str) -> Target | None:
        target = self._targets.get(table) or self.find_table(connection, table.split("."))
        if target is not None:
            self._targets[table] = target
        return target

    def _complete(self, target: Target | None, shape: Shape) -> Target:
        """The target with what it lacks for the shape, as `load` would make it."""
        columns = {} if target is None else dict(target.columns)
        times = {*shape.times, *(shape.messages or ())[1:]}
        for name in names_of(shape):
            kind = "time" if name in times else "integer" if name == VERSION_COLUMN else "text"
            columns.setdefault(name.lower(), self.assume(kind, name))
        if target is None:
            return Target(parts=tuple(shape.table.split(".")), columns=columns)
        return replace(target, columns=columns)

    def _check(
        self, connection: sa.Connection, step: Step
    ) -> tuple[Target | None, dict[str, TableError]]:
        """The table, and the updates of the step that it cannot take, each with the reason."""
        known = step.table in self._targets
        target = self._find(connection, step.table)
        refused = self._check_against(connection, target, step)
        if refused and known:
            # The table may have been mended since it was looked at.
            self._targets.pop(step.table, None)
            target = self._find(connection, step.table)
            refused = self._check_against(connection, target, step)
        return target, refused

    def _check_against(
        self, connection: sa.Connection, target: Target | None, step: Step
    ) -> dict[str, TableError]:
        shape = step.shape
        reason = (
            self._refuse_missing(connection, step.table)
            if target is None
            else self._refuse_shape(target, step)
        )
        if target is None or reason is not None:
            error = TableError(f"{reason}; nothing of these updates was written")
            return {row.update_id: error for row in step.rows}
        refused: dict[str, TableError] = {}
        checks = [(name, 0, place) for place, name in enumerate(shape.equals)]
        checks += [(name, 1, place) for place, name in enumerate(shape.columns)]
        for name, is_set, place in checks:
            column = target.column(name)
            values = [(row.values if is_set else row.equals)[place] for row in step.rows]
            if self._holds_all(column, values):
                continue
            for row, value in zip(step.rows, values, strict=True):
                if is_set and column.kind == "text" and value is not None:
                    reason = self._refuse(column, to_text(value))
                else:
                    reason = self._refuse(column, value)
                if reason is not None:
                    refused[row.update_id] = ValueRefusedError(
                        f"table {step.table!r}, column {column.name!r}: {reason}; "
                        "nothing of this update was written"
                    )
        return refused

    def _refuse_missing(self, connection: sa.Connection, table: str) -> str:
        names = self.list_tables(connection)
        near = get_close_matches(table.lower(), [name.lower() for name in names], n=3, cutoff=0.5)
        shown = ", ".join(sorted(name for name in names if name.lower() in near))
        hint = f"the nearest names are: {shown}" if near else f"it has {len(names)} others"
        return f"the database has no table {table!r}; {hint}"

    def _refuse_shape(self, target: Target, step: Step) -> str | None:
        shape = step.shape
        where = f"table {step.table!r}"
        for name in ("", *names_of(shape)):
            if several := target.ambiguous.get(name.lower()):
                what = f"{where}, column {name!r}" if name else where
                return f"{what}: there is {several}; which is meant cannot be told"
        if target.view:
            return f"{step.table!r} is a view; updates need the table under it"
        missing = lacking_of(target, step)
        for name in missing:
            if not self.takes_name(name):
                return f"{where} has no column {name!r}; the database has no names of this length"
        if missing:
            return f"{where} has no column {self._add_columns(target, step, missing)}"
        names = [target.column(name).name for name in shape.columns]
        if len(set(names)) < len(names):
            return f"{where}: two names of the update mean one column"
        for name in shape.columns:
            if target.column(name).generated:
                return f"{where}, column {name!r}: it is computed and cannot be set"
        for name in (*shape.times, *(shape.messages or ())[1:]):
            reason = self.refuse_time(target.column(name))
            if reason is not None:
                return f"{where}, column {name!r}: {reason}"
        return None

    def _alterations(self, target: Target, step: Step, missing: Sequence[str]) -> list[str]:
        """The commands that add the columns."""
        named = ".".join(self._quote(part) for part in target.parts)
        shape = step.shape
        commands = []
        for name in missing:
            kind = "text"
            if name in shape.times or name in (shape.messages or ())[1:]:
                kind = "time"
            elif name in shape.columns:
                values = [row.values[shape.columns.index(name)] for row in step.rows]
                kind = next((KINDS[type(value)] for value in values if value is not None), "text")
            declared = self.declare(kind, False)
            commands.append(f"ALTER TABLE {named} ADD COLUMN {self._quote(name)} {declared}")
        return commands

    def _may_lack_columns(self, step: Step) -> bool:
        """Whether the table was not seen yet, or lacked what the step sets."""
        target = self._targets.get(step.table)
        return target is None or bool(lacking_of(target, step))

    def _add_missing(self, transaction: Transaction, plan: Plan) -> None:
        """
        Add the columns that are set and missing; where other columns are missing too, none.

        A column that rows are found by is never added: it would be empty, and find nothing.
        """
        for step in plan.steps:
            if not self._may_lack_columns(step):
                continue
            self._targets.pop(step.table, None)  # another worker may have added them
            target = self._find(transaction.connection, step.table)
            if target is None or target.view:
                continue
            missing = lacking_of(target, step)
            if missing and all(
                name in step.shape.columns and self.takes_name(name) for name in missing
            ):
                for command in self._alterations(target, step, missing):
                    transaction.execute_text(command)
                self._targets.pop(step.table, None)

    def _add_columns(self, target: Target, step: Step, missing: Sequence[str]) -> str:
        commands = self._alterations(target, step, missing)
        near = {
            name
            for missed in missing
            for name in get_close_matches(missed.lower(), target.columns, n=1, cutoff=0.7)
        }
        like = ", ".join(repr(target.column(name).name) for name in sorted(near))
        hint = f" (there is {like})" if like else ""
        shown = ", ".join(repr(name) for name in missing)
        return f"{shown}{hint}; add it with: {'; '.join(commands)}"

    def _holds_all(self, column: Column, values: Sequence[Value]) -> bool:
        """Whether no value needs to be looked at on its own."""
        if column.kind != "text" or {*map(type, values)} != {str}:
            return False
        return column.width is None or max(map(len, cast(Sequence[str], values))) <= column.width

    def _refuse(self, column: Column, value: Value) -> str | None:
        """Why a column cannot hold a value, or ``None``; the value itself is not shown."""
        return refuse_value(column, value, self.holds)

    # Loading rows -------------------------------------------------------------------------------

    def _prepare_load(
        self,
        transaction: Transaction,
        table: str,
        rows: Sequence[Mapping[str, object]],
        key: str,
        columns: Mapping[str, str],
        index: Sequence[str],
        stamped: Collection[object],
    ) -> _PreparedLoad:
        self._targets.pop(table, None)
        target = self._create(transaction, table, key, columns, index)
        stage_columns = [
            StageColumn(f"value_{place}", "time", target.column(name))
            if kind == "time"
            else _like(f"value_{place}", target.column(name))
            for place, (name, kind) in enumerate(columns.items())
        ]
        stage_columns.append(StageColumn("stamped", "integer"))
        content = repr((table, tuple(columns.items())))
        stage = _named_stage(content, stage_columns, transaction.stages)
        first: dict[object, Mapping[str, object]] = {}
        for row in rows:
            first.setdefault(row[key], row)
        lists: list[list[Any]] = []
        for name, kind in columns.items():
            values: list[Any] = [row.get(name) for row in first.values()]
            column = target.column(name)
            as_text = kind != "time" and column.kind == "text"
            lists.append(convert(column, values) if as_text else values)
        lists.append([int(value in stamped) for value in first])
        self._make_stage(transaction, stage.name, stage_columns, target, lists)
        staged = {name: stage.c[f"value_{place}"] for place, name in enumerate(columns)}
        return _PreparedLoad(target, stage, key, staged, any(lists[-1]))

    def _load(
        self, transaction: Transaction, prepared: _PreparedLoad, stamps: Sequence[str]
    ) -> int:
        target, stage, key, staged, any_stamped = prepared
        clause = target.clause()
        column = target.column(key)
        keys = clause.c[column.name]
        same = self.same(keys, staged[key], column.kind)
        if stamps and any_stamped:
            where = [same, stage.c.stamped == 1]
            transaction.execute(self._restamp(clause, stage, staged, target, stamps, where))
        rows = self.lacking(sa.select(*staged.values()), stage, keys, [same])
        names = [target.column(name).name for name in staged]
        return self.changed_rows(transaction.execute(sa.insert(clause).from_select(names, rows)))

    def _restamp(
        self,
        table: sa.TableClause,
        stage: sa.FromClause,
        staged: Mapping[str, _Expression],
        target: Target,
        stamps: Sequence[str],
        where: Sequence[_Condition],
    ) -> sa.Update | Merge:
        """Rows that are there get the stamp that is loaded, where it differs; see `load`."""
        owner = stamps[0]
        nobody = _is_empty(staged[owner], target.column(owner))
        values: dict[sa.ColumnClause[Any], _Expression] = {}
        differs = []
        newer: sa.ColumnElement[bool] = sa.true()
        for name in stamps:
            column = table.c[target.column(name).name]
            differs.append(self._differ(column, staged[name], target.column(name), target))
            emptied = _nothing(target.column(name))
            if name == VERSION_COLUMN:
                newer = sa.or_(column.is_(None), column <= staged[name])
                emptied = column  # it goes on to say that recognition wrote the row
            values[column] = sa.case((nobody, emptied), else_=staged[name])
        changes = sa.case(
            (nobody, ~self._empty(table, target, owner)), else_=sa.and_(newer, sa.or_(*differs))
        )
        return self.set_rows(table, stage, values, [changes, *where])

    def _create(
        self,
        transaction: Transaction,
        table: str,
        key: str,
        columns: Mapping[str, str],
        index: Sequence[str],
    ) -> Target:
        quote = self._quote
        named = ".".join(quote(part) for part in table.split("."))
        target = self._find(transaction.connection, table)
        if target is None:
            declared = ", ".join(
                f"{quote(name)} {self.declare(kind, name == key or name in index)}"
                f"{self.primary_key if name == key else ''}"
                for name, kind in columns.items()
            )
            transaction.execute_text(f"CREATE TABLE {named} ({declared})")
            for column in index:
                if self.indexed and column in columns:
                    name = quote(self._name_index(table, column))
                    transaction.execute_text(f"CREATE INDEX {name} ON {named} ({quote(column)})")
        else:
            if target.view:
                raise TableError(f"{table!r} is a view; rows cannot be loaded into it")
            for name, kind in columns.items():
                if name.lower() not in target.columns:
                    transaction.execute_text(
                        f"ALTER TABLE {named} ADD COLUMN {quote(name)} {self.declare(kind, False)}"
                    )
        self._targets.pop(table, None)
        found = self._find(transaction.connection, table)
        assert found is not None, "a table that was created is there"
        return found


class _UndoneError(Exception):
    """Carries what a rehearsal did out of its transaction."""

    def __init__(self, applied: Applied) -> None:
        super().__init__("rehearsed")
        self.applied = applied


class _LedgerMovedError(SinkUnavailableError):
    """Between a plan's preparation and its transaction somebody noted later updates."""


class _Part(NamedTuple):
    """
    What is left of a step, staged, and the notes of the rows to spare.

    ``known``: it was applied before, all of it. ``notes``: the stage of what is to be noted.
    """

    step: Step
    stage: sa.FromClause
    spare: frozenset[Spared] = frozenset()
    known: bool = False
    notes: sa.FromClause | None = None


#: A line of the ledger: workspace and key as the step has them, the update's id, `_NOTED`.
_Line = tuple[object, ...]


class _Asked(NamedTuple):
    """The stage that the ledger is asked by, its rows, and which of them asks for each row."""

    stage: sa.FromClause
    rows: Sequence[StagedRow]
    asks: Sequence[int]


class _PreparedStep(NamedTuple):
    """A step with what the ledger is asked by, and what is to be carried out of it."""

    step: Step
    target: Target
    asked: _Asked
    later: Later | None
    noted: frozenset[_Line]
    parts: Sequence[_Part]
    seconds: float


class _PreparedPlan(NamedTuple):
    """The steps that are staged, and what was refused."""

    steps: Sequence[_PreparedStep]
    rejected: tuple[tuple[str, RecognitionError], ...]


class _PreparedLoad(NamedTuple):
    """Rows that are staged: their columns by name, and whether some replace a stamp."""

    target: Target
    stage: sa.FromClause
    key: str
    staged: Mapping[str, _Expression]
    any_stamped: bool


def sort_notes(notes: Iterable[Spared]) -> list[Spared]:
    """In an order that is always the same."""
    return sorted(notes, key=lambda note: note[1:])


def _is_empty(expression: _Expression, column: Column) -> _Condition:
    nothing = _nothing(column)
    return expression.is_(None) if isinstance(nothing, sa.Null) else expression == nothing


def _count_if(conditions: Sequence[_Condition]) -> _Expression:
    one: _Expression = sa.literal_column("1")
    return sa.func.count(sa.case((sa.and_(*conditions), one)))


def _whole_days(bound: Bound) -> Bound:
    """The message's time is somewhere in the day that such a column keeps of it."""
    lower = None if bound.lower is None else bound.lower // _DAY * _DAY
    upper = None if bound.upper is None else -(-bound.upper // _DAY) * _DAY
    return bound._replace(lower=lower, upper=upper)


def _nothing(column: Column) -> _Expression:
    """What a column that is empty holds."""
    if column.kind == "text" and not column.nullable:
        return sa.literal_column("''")
    return sa.null()


def _like(name: str, column: Column) -> StageColumn:
    return StageColumn(name, "time" if column.kind == "time" else "clone", column)


def _named_by(shape: Shape) -> int:
    """The place in ``equals`` of the id by which single rows are meant; 0: there is none beside."""
    if shape.messages is None or shape.speaks_for_interval:
        return 0
    return shape.equals.index(shape.messages[0])


#: What of a note says which rows it took, beside its key.
_NOTED = (
    "columns",
    "empty",
    "message_column",
    "message_id",
    "extras",
    "time_column",
    "starts",
    "ends",
)


def _key_of(row: StagedRow) -> tuple[str, object]:
    return row.workspace, distinguish(row.equals[0])


def _find_new(step: Step, target: Target, noted: frozenset[_Line]) -> list[int] | None:
    """The positions of the rows that are to be noted and are not; ``None``: these are all."""
    lines = [*_lines(step, target)]
    new = [place for place, line in lines if line not in noted]
    return None if len(new) == len(lines) else new


def _lines(step: Step, target: Target) -> Iterator[tuple[int, _Line]]:
    """What the ledger holds of the step when it was applied, with the position in it."""
    shape = step.shape
    place = _named_by(shape)
    named = target.column(shape.equals[place]).name if place else ""
    sets, empty = joined(shape.columns, target), joined(shape.empty, target)
    time_column = target.column(shape.times[0]).name if shape.times else ""
    noted = zip(step.rows, note_extras(step, target), strict=True)
    for position, (row, extras) in enumerate(noted):
        if extras is not None:
            message = text_of(target.column(named), str(row.equals[place])) if place else ""
            ends = row.intervals[0] if shape.times else (None, None)
            said = (sets, empty, named, message, extras, time_column, *ends)
            yield position, (*_key_of(row), row.update_id, *said)


def _named_stage(
    content: str, columns: Sequence[StageColumn], taken: Collection[str] = ()
) -> sa.TableClause:
    # Temporary tables belong to one session, so that equal content may have an equal name.
    first = name = f"recognition_stage_{blake2b(content.encode(), digest_size=4).hexdigest()}"
    while name in taken:
        name = f"{first}_{len(taken)}"
    return sa.table(name, *(sa.column(column.name) for column in columns))


def _stage_lists(step: Step, target: Target) -> list[list[Any]]:
    """The rows of the step, as one list for each of the stage's columns, in their order."""
    shape, rows = step.shape, step.rows
    lists: list[list[Any]] = [[row.update_id for row in rows], [row.sequence for row in rows]]
    if not shape.versioned:
        lists += [
            [row.workspace for row in rows],
            list(range(len(rows))),
            note_extras(step, target),
        ]
    for place, name in enumerate(shape.equals):
        lists.append(convert(target.column(name), [row.equals[place] for row in rows]))
    for place in range(len(shape.times)):
        intervals = [row.intervals[place] for row in rows]
        ends = [[interval[0] for interval in intervals], [interval[1] for interval in intervals]]
        lists += ends + ends
    for place, name in enumerate(shape.columns):
        if name != VERSION_COLUMN:
            lists.append(convert(target.column(name), [row.values[place] for row in rows]))
    return lists


def _now() -> int:
    return time.time_ns() // 1_000
