"""
SQLite 3.33 or later: a file, through the standard library's driver.

How it differs: https://sqlite.org/lang_transaction.html (one writer at a time),
https://sqlite.org/datatype3.html (a column's type is a preference), no type for times.

Times: `load` stores them as ``YYYY-MM-DD HH:MM:SS.ffffff`` in UTC, whose order as text is that of
the times. Whatever else a row holds (another ISO form, an offset, a number since 1970) is read by
`recognition.events.parse_time`, row by row; what that cannot read is in no interval. Constant
bounds would not skip anything here, because rows are found by the index of the key.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa

from recognition.errors import (
    ConfigurationError,
    EventError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.events import parse_time
from recognition.planner import Bound
from recognition.sinks.rows import Column
from recognition.sinks.sql import (
    Interval,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Exactly what `load` stores. Its order as text is the order of the times; no other form has it.
_STORED = "'????-??-?? ??:??:??.[0-9][0-9][0-9][0-9][0-9][0-9]'"

# The primary result codes: https://sqlite.org/rescode.html
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_AWAY = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}
_INT64 = 2**63


class SqliteSink(SqlSink):
    """
    A SQLite file, ``sqlite:///path``.

    Several processes may write to it: each waits for the lock, up to ``timeout`` seconds.
    """

    indexed = True
    types: ClassVar[Mapping[str, str]] = {
        "text": "TEXT",
        "time": "TEXT",
        "integer": "INTEGER",
        "float": "REAL",
        "boolean": "BOOLEAN",
    }
    holds: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **SqlSink.holds,
        "integer": (int, float, bool),  # SQLite has no other way to hold a boolean
    }

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """See https://docs.sqlalchemy.org/en/21/dialects/sqlite.html#sqlite-transactions."""
        try:
            engine = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": timeout})
        except sa.exc.ArgumentError as exc:
            raise ConfigurationError(
                "a SQLite URL is sqlite:///relative/path or sqlite:////absolute/path"
            ) from exc
        sa.event.listen(engine, "connect", _prepare)
        sa.event.listen(engine, "begin", _begin)
        return engine

    def exists(self) -> bool:
        """A database in memory always does."""
        database = self._engine.url.database
        if not database or database == ":memory:" or database.startswith("file:"):
            return True
        return Path(database).exists()

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """Names mean the same in any case (ASCII only, as in SQLite)."""
        schemas = [name for (_, name, _) in connection.exec_driver_sql("PRAGMA database_list")]
        schema = parts[0] if len(parts) > 1 else "main"
        if len(parts) > 2 or schema.lower() not in (name.lower() for name in schemas):
            return None
        quoted = self._engine.dialect.identifier_preparer.quote(schema)
        found = connection.exec_driver_sql(
            f"SELECT name, type, sql FROM {quoted}.sqlite_master"
            " WHERE type IN ('table', 'view') AND name = ? COLLATE NOCASE",
            (parts[-1],),
        ).one_or_none()
        if found is None:
            return None
        rows = connection.exec_driver_sql(
            'SELECT name, type, "notnull", pk, hidden FROM pragma_table_xinfo(?, ?)',
            (found.name, schema),
        )
        columns = [
            _describe(row.name, row.type or "", bool(row.notnull), row.hidden) for row in rows
        ]
        return Target(
            parts=(*parts[:-1], found.name),
            columns={column.name.lower(): column for column in columns},
            collated="collate" in (found.sql or "").lower(),
            view=found.type == "view",
        )

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the file itself."""
        rows = connection.exec_driver_sql(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
        return [row.name for row in rows]

    def assume(self, kind: str, name: str) -> Column:
        """Times are text here."""
        return _describe(name, self.types[kind], False, 0)

    def refuse_time(self, column: Column) -> str | None:
        """Any column may hold times, each row in a form of its own."""
        return None

    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """The form that `load` stores."""
        return sa.Text()

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """
        By ``executemany``: it is a loop inside the driver, not one round trip for each row.

        Without statistics of the stage, a database that was once ANALYZEd reads its whole index of
        the key first, for a Bloom filter: 50 times slower for 30 devices in 1 million rows.
        """
        stored = [
            [*map(_store_time, values)] if column.kind == "time" else values
            for column, values in zip(columns, lists, strict=True)
        ]
        marks = ", ".join("?" * len(columns))
        if lists[0]:
            rows = [*zip(*stored, strict=True)]
            transaction.execute_text(f"INSERT INTO {name} VALUES ({marks})", rows)
        transaction.execute_text(f"ANALYZE temp.{name}")

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """https://sqlite.org/datatype3.html#collation: an explicit one wins over the column's."""
        return sa.collate(expression, "BINARY")

    def lies_within(
        self,
        like: Column,
        time: sa.ColumnElement[Any],
        interval: Interval,
        open_ended: bool,
    ) -> sa.ColumnElement[bool]:
        """By text where the row holds what `load` stores, otherwise by reading the time."""
        read = sa.func.recognition_time(time)
        return sa.case(
            (
                time.op("GLOB", is_comparison=True)(sa.literal_column(_STORED)),
                self.inside(time, interval.start, interval.end, open_ended),
            ),
            else_=self.inside(read, interval.starts, interval.ends, open_ended),
        )

    def bounded(
        self, like: Column, time: sa.ColumnElement[Any], bound: Bound
    ) -> Sequence[sa.ColumnElement[bool]]:
        """None: see the top of the file."""
        return ()

    def translate(self, error: BaseException | None) -> SinkError:
        """By the result code, never by the text."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        if code in _BUSY:
            return SinkUnavailableError(
                f"the database is locked by another writer, for more than {self._timeout:g} "
                "seconds; nothing was written"
            )
        if code == sqlite3.SQLITE_READONLY:
            return SinkReadOnlyError("the database may only be read; nothing was written")
        if code == sqlite3.SQLITE_NOTADB:
            return SinkError("the file is not a SQLite database; nothing was written")
        if code in _AWAY:
            return SinkUnavailableError(
                f"the database file cannot be opened, read or written ({name}); all was rolled back"
            )
        if code == sqlite3.SQLITE_CONSTRAINT:
            return TableError(
                f"a constraint or trigger of a table refused the rows ({name}); all was rolled back"
            )
        return SinkError(f"SQLite refused a statement ({name}); all was rolled back")


def _prepare(connection: sqlite3.Connection, _: object) -> None:
    # The driver's own BEGIN comes too late and leaves DDL outside; ours is in `_begin`.
    connection.isolation_level = None
    connection.execute("PRAGMA temp_store = MEMORY")  # where the stage lives
    if connection.execute("PRAGMA page_count").fetchone()[0] == 0:
        # A file of our own making: one fsync a transaction instead of three or four, and no reader
        # waits. A database that is there keeps the mode that its owner chose.
        connection.execute("PRAGMA journal_mode = WAL")
    connection.create_function("recognition_time", 1, _read_time, deterministic=True)


def _begin(connection: sa.Connection) -> None:
    reads = connection.get_execution_options().get("reads", False)
    # A writer that begins as a reader may fail later, when two of them want to go on.
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@lru_cache(maxsize=65_536)  # the rows of a window repeat few times, but ask twice for each
def _read_time(value: object) -> int | None:
    try:
        return parse_time(value)
    except EventError:
        return None


@lru_cache(maxsize=65_536)  # the intervals of a window share many of their ends
def _store_time(time: int | None) -> str | None:
    if time is None:
        return None
    moment = _EPOCH + timedelta(microseconds=time)
    return moment.replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


def _describe(name: str, declared: str, not_null: bool, hidden: int) -> Column:
    """By the rules of https://sqlite.org/datatype3.html#determination_of_column_affinity."""
    upper = declared.upper()
    width = None
    low: float = -_INT64
    high: float = _INT64 - 1
    if "INT" in upper:
        kind = "integer"
    elif any(part in upper for part in ("CHAR", "CLOB", "TEXT")):
        kind = "text"
        found = re.search(r"\(\s*(\d+)\s*\)", declared)
        width = int(found[1]) if found else None
    elif not upper or "BLOB" in upper:
        kind = "any"
    elif any(part in upper for part in ("REAL", "FLOA", "DOUB")):
        kind, low, high = "float", -sys.float_info.max, sys.float_info.max
    elif upper in ("BOOLEAN", "BOOL"):
        kind = "boolean"
    else:
        kind = "numeric"
    return Column(
        name=name,
        declared=declared,
        kind=kind,
        nullable=not not_null,
        width=width,
        low=low,
        high=high,
        generated=hidden in (2, 3),
    )
