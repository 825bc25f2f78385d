"""
Any database that SQLAlchemy speaks to: a plan's rows are staged once, then one statement per step
sets the target's rows, all in one transaction.

How databases differ is a handful of methods that `sqlite.py` and `duckdb.py` override; nothing here
asks which database it is. No value ever becomes part of a statement's text: values travel in the
staged rows, names through SQLAlchemy's quoting after they were found in the real table.

**What a row must be.** ``empty`` is NULL; in a text column that is declared NOT NULL it is ``''``,
and setting such a column to null writes ``''``. ``equals`` is exact: case, blanks and collation do
not blur it.

**Which update stands.** In a table with ``recognition_version`` each row says by which update it
was written: a row is set when its version is smaller, and ``empty`` on a column that is set also
lets pass what has a version, because recognition wrote it. (Where such an update does not ask for
any ``empty``, all columns that it sets must be empty, or the row have a version.) In other tables
the table ``recognition_ledger``, beside the rows and in the same transaction, remembers which
update took which interval of which key; what a later one took is cut out of an earlier one that
comes late. The ledger never says that something need not be done again: an update that is applied
a second time meets the rows that were not there the first time.
"""

from __future__ import annotations

import json
import re
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ClauseElement, Executable

from recognition.errors import (
    ConfigurationError,
    RecognitionError,
    SinkError,
    TableError,
)
from recognition.events import render_time
from recognition.messages import VERSION_COLUMN
from recognition.planner import (
    Cover,
    Plan,
    Shape,
    StagedRow,
    Step,
    Value,
    covers_of,
    cut_step,
    distinguish,
)
from recognition.sinks import Applied, AppliedStep, Capabilities

_DAY = 86_400 * 1_000_000
_Result = TypeVar("_Result")

LEDGER = sa.Table(
    "recognition_ledger",
    sa.MetaData(),
    sa.Column("update_id", sa.Text, nullable=False),
    sa.Column("workspace", sa.Text, nullable=False),
    sa.Column("table_name", sa.Text, nullable=False),
    sa.Column("key_column", sa.Text, nullable=False),
    sa.Column("key_value", sa.Text, nullable=False),
    sa.Column("extras", sa.Text, nullable=False),  # JSON: further columns and what they must hold
    sa.Column("columns", sa.Text, nullable=False),  # what was set: sorted, joined by commas
    sa.Column("empty", sa.Text, nullable=False),  # what had to be empty: the same
    sa.Column("time_column", sa.Text, nullable=False),  # '' when all rows of the key were meant
    sa.Column("starts", sa.BigInteger),  # microseconds since 1970-01-01 UTC; NULL: unbounded
    sa.Column("ends", sa.BigInteger),
    sa.Column("sequence", sa.BigInteger, nullable=False),
    sa.Column("applied_at", sa.BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """
    A column of a real table.

    Args:
        name: As the database spells it.
        declared: Its type, as the database shows it.
        kind: What it can hold: ``text``, ``integer``, ``float``, ``boolean``, ``time``, ``uuid``,
            ``numeric`` (numbers, and texts that are none), ``any``, or ``other``: nothing of ours.
        nullable: It may be NULL.
        width: The most characters that it is declared to hold, if any.
        low, high: The range of its numbers.
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
        parts: Its name and before it those of schema and database, as far as they were given.
        columns: By their names in lower case.
        collated: Some column compares in another way than byte by byte.
        view: It is none: nothing can be set in it.
    """

    parts: tuple[str, ...]
    columns: Mapping[str, Column]
    collated: bool = False
    view: bool = False

    def column(self, name: str) -> Column:
        """The column of this name, in any case; the caller knows that there is one."""
        return self.columns[name.lower()]

    def clause(self) -> sa.TableClause:
        """The table in a statement."""
        schema = ".".join(self.parts[:-1]) or None
        names = [sa.column(column.name) for column in self.columns.values()]
        return sa.table(self.parts[-1], *names, schema=schema)


class StageColumn(NamedTuple):
    """
    A column of a stage: ``clone`` is of the type of ``like``; ``time`` holds microseconds until it
    is loaded and is then comparable with ``like``; ``text`` and ``integer`` are what they say.
    """

    name: str
    kind: str
    like: Column | None = None


@dataclass(slots=True)
class Transaction:
    """A connection inside a transaction, and the number of statements that went through it."""

    connection: sa.Connection
    statements: int = 0

    def execute(
        self, statement: sa.Executable, parameters: Mapping[str, object] | None = None
    ) -> sa.CursorResult[Any]:
        """Send one statement."""
        self.statements += 1
        return self.connection.execute(statement, dict(parameters or {}))


class _CreateStage(Executable, ClauseElement):
    """``CREATE TEMPORARY TABLE .. AS SELECT ..``; SQLAlchemy has its own from 2.1 on."""

    inherit_cache = False

    def __init__(self, name: str, select: sa.Select[Any]) -> None:
        self.name = name
        self.select = select


@compiles(_CreateStage)
def _render_create_stage(element: _CreateStage, compiler: SQLCompiler, **kw: Any) -> str:
    kw["literal_binds"] = True
    name = compiler.preparer.quote(element.name)
    return f"CREATE TEMPORARY TABLE {name} AS {compiler.process(element.select, **kw)}"


class SqlSink(ABC):
    """
    A sink on an SQLAlchemy engine; a subclass is one database.

    Args:
        url: The database, as SQLAlchemy writes it.
        timeout: How long a lock of somebody else is waited for, in seconds.
        ledger_days: After how many days what was applied may be forgotten. An update that comes
            later than this may undo what later updates did.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(ledger=True, counts_per_update=True)

    #: What a column of each kind is created as.
    types: ClassVar[Mapping[str, str]]

    #: What a column is taken for while its table does not exist: by kind, as `load` makes it.
    assumed: ClassVar[Mapping[str, Column]]

    def __init__(self, url: str, *, timeout: float = 30.0, ledger_days: int = 90) -> None:
        if timeout < 0:
            raise ConfigurationError(f"timeout is {timeout} seconds; it is 0 or more")
        if ledger_days < 1:
            raise ConfigurationError(f"ledger_days is {ledger_days}; it is at least 1")
        self._timeout = timeout
        self._ledger_days = ledger_days
        self._engine = self.make_engine(url)
        self._targets: dict[str, Target] = {}
        self._has_ledger = False
        self._pruned = False

    # -- What a database overrides ---------------------------------------------------------------

    @abstractmethod
    def make_engine(self, url: str) -> sa.Engine:
        """An engine whose transactions begin with ``BEGIN`` and take the lock of a writer."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is a database; connecting to one that is missing may create it."""

    @abstractmethod
    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """The table or view of this name, in any case, or ``None``."""

    @abstractmethod
    def list_tables(self, connection: sa.Connection) -> list[str]:
        """The names of all tables that can be named without a schema."""

    @abstractmethod
    def refuse_text(self, column: Column, value: str) -> str | None:
        """Why a text cannot be held by a column that is not of kind ``text``, or ``None``."""

    @abstractmethod
    def refuse_time(self, column: Column) -> str | None:
        """Why a column cannot be compared with times, or ``None``."""

    @abstractmethod
    def stage_type(self, like: Column) -> sa.types.TypeEngine[Any]:
        """The type of a staged time that is compared with this column."""

    @abstractmethod
    def load_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        rows: Sequence[tuple[Any, ...]],
    ) -> None:
        """Put the rows into the stage, in bulk."""

    @abstractmethod
    def equal(self, one: sa.ColumnElement[Any], other: sa.ColumnElement[Any], *, text: bool,
              collated: bool) -> sa.ColumnElement[bool]:
        """Both hold exactly the same, or neither column is NULL."""

    @abstractmethod
    def reaches(
        self,
        like: Column,
        column: sa.ColumnElement[Any],
        time: sa.ColumnElement[Any],
        microseconds: sa.ColumnElement[Any],
    ) -> sa.ColumnElement[bool]:
        """The column's time is at or after the staged one, which is given in both forms."""

    @abstractmethod
    def translate(self, error: BaseException) -> SinkError:
        """The most specific error of ours; its text holds no value."""
