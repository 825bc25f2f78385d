"""
DuckDB 2: a file or memory, through its own driver.

How it differs: one process at a time (https://duckdb.org/docs/stable/connect/concurrency), rows are
found by scanning, so that constant time bounds skip row groups, and a row that two transactions
change is a conflict at once. Its types are strict: a text column has no width.

The dialect is a small one of ours on SQLAlchemy's PostgreSQL compiler, whose SQL DuckDB takes. The
package ``duckdb-engine`` was left out: its last release is older than DuckDB 2 and SQLAlchemy 2.1,
it caches no statements, and it brings the reflection of PostgreSQL along, which is not needed here.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, cast

import duckdb
import sqlalchemy as sa
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.base import PGDialect, PGIdentifierPreparer
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.ext.compiler import compiles

from recognition.errors import (
    ConfigurationError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.planner import Bound
from recognition.sinks.rows import Column, greatest
from recognition.sinks.sql import (
    Interval,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
    render_try_cast,
)

# https://duckdb.org/docs/stable/sql/data_types/numeric
_BITS = {"TINYINT": 8, "SMALLINT": 16, "INTEGER": 32, "BIGINT": 64, "HUGEINT": 128}
_FLOAT_MAX = 3.4028234663852886e38
# TIMESTAMP_NS counts nanoseconds in 64 bits; a bound beyond them is as good as none.
_NS_LIMIT = (2**63 - 1) // 1_000 - 1

# What answers with a count.
_COUNTED = ("INSERT", "UPDATE", "DELETE", "MERGE")


class DuckdbSink(SqlSink):
    """
    A DuckDB database, ``duckdb:///path``.

    It belongs to one process at a time; in this one, plans for the same file wait for each other.
    """

    indexed = False
    types: ClassVar[Mapping[str, str]] = {
        "text": "VARCHAR",
        "time": "TIMESTAMP",
        "integer": "BIGINT",
        "float": "DOUBLE",
        "boolean": "BOOLEAN",
    }

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """What follows ``?`` is DuckDB's own configuration, such as ``access_mode``."""
        try:
            parsed = make_url(url)
        except sa.exc.ArgumentError as exc:
            raise ConfigurationError(
                "a DuckDB URL is duckdb:///relative/path or duckdb:////absolute/path"
            ) from exc
        return sa.create_engine(parsed.set(drivername=DuckdbDialect.name), hide_parameters=True)

    def exists(self) -> bool:
        """A database in memory always does."""
        database = self._engine.url.database
        return database in (None, "", ":memory:") or Path(str(database)).exists()

    def serialized(self) -> AbstractContextManager[object]:
        """Optimistic transactions would not see each other's ledger."""
        return _hold(_LOCKS[_path(self._engine.url)], self._timeout)

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """Names mean the same in any case, quoted or not."""
        if len(parts) > 3:
            return None
        asked = [None] * (3 - len(parts)) + [part.lower() for part in parts]
        found = connection.exec_driver_sql(
            "SELECT database_name, schema_name, table_name, sql, is_view,"
            " current_database() AS own_database, current_schema() AS own_schema FROM ("
            "  SELECT database_name, schema_name, table_name, sql, false AS is_view, temporary"
            "    FROM duckdb_tables()"
            "  UNION ALL SELECT database_name, schema_name, view_name, sql, true, temporary"
            "    FROM duckdb_views() WHERE NOT internal)"
            " WHERE lower(database_name) = coalesce(?, lower(current_database()))"
            " AND lower(schema_name) = coalesce(?, lower(current_schema()))"
            " AND lower(table_name) = ? AND NOT temporary",
            tuple(asked),
        ).one_or_none()
        if found is None:
            return None
        rows = connection.exec_driver_sql(
            "SELECT column_name, data_type, is_nullable, is_generated FROM duckdb_columns()"
            " WHERE database_name = ? AND schema_name = ? AND table_name = ?"
            " ORDER BY column_index",
            (found.database_name, found.schema_name, found.table_name),
        )
        columns = [
            _describe(row.column_name, row.data_type, not row.is_nullable, row.is_generated)
            for row in rows
        ]
        real = (found.database_name, found.schema_name, found.table_name)
        own = (found.own_database, found.own_schema)
        short = 2 if real[:2] == own else 1 if real[0] == own[0] else 0
        return _Target(
            parts=real[3 - len(parts) :],
            columns={column.name.lower(): column for column in columns},
            collated="collate" in (found.sql or "").lower(),
            view=found.is_view,
            noted=".".join(real[short:]),
        )

    def noted_name(self, target: Target) -> str:
        """With schema and database as far as they are not the ledger's own."""
        return target.noted if isinstance(target, _Target) else super().noted_name(target)

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the current schema."""
        rows = connection.exec_driver_sql(
            "SELECT table_name FROM duckdb_tables()"
            " WHERE database_name = current_database() AND schema_name = current_schema()"
        )
        return [row.table_name for row in rows]

    def assume(self, kind: str, name: str) -> Column:
        """As `load` makes it."""
        return _describe(name, self.types[kind], False, False)

    def refuse_time(self, column: Column) -> str | None:
        """Numbers have no unit that the database could know."""
        if column.kind in ("time", "text"):
            return None
        return f"it is {column.declared}; a time column is a TIMESTAMP, a DATE or a text"

    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """The type whose comparison with the column loses nothing."""
        return _OfDuckdb(_time_type(like))

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """
        As one table of Arrow where ``pyarrow`` is installed, otherwise as one list for each column.

        Never by ``executemany``, which takes 3 seconds for 10,000 rows; lists take 0.07, Arrow
        0.01.
        """
        if not lists[0]:
            return
        types = [_given_type(column) for column in columns]
        selected = ", ".join(_loaded(f"c{place}", column) for place, column in enumerate(columns))
        insert = f"INSERT INTO {name} SELECT {selected} FROM"
        try:
            import pyarrow
        except ModuleNotFoundError:
            unnested = ", ".join(
                f"unnest(CAST(? AS {given}[])) AS c{place}" for place, given in enumerate(types)
            )
            transaction.statements += 1
            transaction.connection.exec_driver_sql(
                f"{insert} (SELECT {unnested})", tuple(list(values) for values in lists)
            )
            return
        arrow = {
            "VARCHAR": pyarrow.string(),
            "BIGINT": pyarrow.int64(),
            "DOUBLE": pyarrow.float64(),
            "BOOLEAN": pyarrow.bool_(),
        }
        table = pyarrow.table(
            {
                f"c{place}": pyarrow.array(values, type=arrow[given])
                for place, (values, given) in enumerate(zip(lists, types, strict=True))
            }
        )
        session = cast(_Session, transaction.connection.connection.dbapi_connection)
        session.duckdb.register("recognition_rows", table)
        try:
            transaction.execute_text(f"{insert} recognition_rows")
        finally:
            session.duckdb.unregister("recognition_rows")

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Only texts have a collation; their bytes have none."""
        return sa.func.encode(sa.cast(expression, _OfDuckdb("VARCHAR")))

    def lies_within(
        self,
        like: Column,
        time: sa.ColumnElement[Any],
        interval: Interval,
        open_ended: bool,
    ) -> sa.ColumnElement[bool]:
        """A text that is no time is in no interval."""
        return self.inside(_as_time(like, time), interval.start, interval.end, open_ended)

    def bounded(
        self, like: Column, time: sa.ColumnElement[Any], bound: Bound
    ) -> Sequence[sa.ColumnElement[bool]]:
        """Row groups whose times lie outside are skipped."""
        where: list[sa.ColumnElement[bool]] = []
        if bound.lower is not None:
            where.append(_as_time(like, time) >= _constant(like, bound.lower))
        if bound.upper is not None:
            where.append(_as_time(like, time) < _constant(like, bound.upper))
        return where

    def translate(self, error: BaseException | None) -> SinkError:
        """By class, and by the text where one class means several things."""
        text = str(error)
        name = type(error).__name__
        if isinstance(error, duckdb.TransactionException) and "onflict" in text:
            return SinkUnavailableError(
                "another transaction of this process changed the same rows; all was rolled back"
            )
        if isinstance(error, duckdb.IOException) and "lock" in text:
            return SinkUnavailableError(
                "another process holds the database file; DuckDB belongs to one process at a time; "
                "nothing was written"
            )
        if "read-only" in text:
            return SinkReadOnlyError("the database may only be read; nothing was written")
        if "not a valid DuckDB database" in text:
            return SinkError("the file is not a DuckDB database; nothing was written")
        if isinstance(error, duckdb.IOException):
            return SinkUnavailableError(
                "the database file cannot be opened, read or written; all was rolled back"
            )
        if isinstance(error, duckdb.ConstraintException):
            return TableError("a constraint of a table refused the rows; all was rolled back")
        return SinkError(f"DuckDB refused a statement ({name}); all was rolled back")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(Target):
    """
    A table of DuckDB.

    Args:
        noted: By which the ledger knows it, however it was asked for.
    """

    noted: str


class _OfDuckdb(sa.types.UserDefinedType[Any]):
    """A type by the name that DuckDB gives it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """As it is written in a cast."""
        return self.name


def _describe(name: str, declared: str, not_null: bool, generated: bool) -> Column:
    upper = declared.upper()
    kind = "other"
    low: float | None = None
    high: float | None = None
    decimal = re.fullmatch(r"DECIMAL\((\d+),(\d+)\)", upper)
    if upper == "VARCHAR":
        kind = "text"
    elif upper.removeprefix("U") in _BITS:
        kind = "integer"
        bits = _BITS[upper.removeprefix("U")]
        # What does not fit 64 bits cannot be staged.
        low = 0 if upper.startswith("U") else -(2 ** (min(bits, 64) - 1))
        high = 2 ** min(bits if upper.startswith("U") else bits - 1, 63) - 1
    elif decimal is not None:
        kind = "float"
        high = greatest(int(decimal[1]), int(decimal[2]))
        low = -high
    elif upper in ("FLOAT", "DOUBLE"):
        kind = "float"
        high = _FLOAT_MAX if upper == "FLOAT" else sys.float_info.max
        low = -high
    elif upper == "BOOLEAN":
        kind = "boolean"
    elif upper == "UUID":
        kind = "uuid"
    elif upper == "DATE" or upper.startswith("TIMESTAMP"):
        kind = "time"
    return Column(
        name=name,
        declared=declared,
        kind=kind,
        nullable=not not_null,
        low=low,
        high=high,
        generated=generated,
    )


def _time_type(like: Column) -> str:
    declared = like.declared.upper()
    if like.kind == "text" or declared == "TIMESTAMP WITH TIME ZONE":
        return "TIMESTAMPTZ"
    return "TIMESTAMP_NS" if declared == "TIMESTAMP_NS" else "TIMESTAMP"


def _as_time(like: Column, time: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.try_cast(time, _OfDuckdb("TIMESTAMPTZ")) if like.kind == "text" else time


def _constant(like: Column, microseconds: int) -> sa.ColumnElement[Any]:
    kind = _time_type(like)
    if kind == "TIMESTAMP_NS":
        microseconds = max(-_NS_LIMIT, min(microseconds, _NS_LIMIT))
    number = sa.cast(sa.literal(microseconds, sa.BigInteger()), sa.BigInteger())
    if kind == "TIMESTAMPTZ":
        return sa.func.make_timestamptz(number)
    moment = sa.func.make_timestamp(number)
    return sa.cast(moment, _OfDuckdb(kind)) if kind == "TIMESTAMP_NS" else moment


def _given_type(column: StageColumn) -> str:
    """In which type the values of a stage's column are handed over."""
    if column.kind == "clone" and column.like is not None:
        kind = column.like.kind
        return {"integer": "BIGINT", "float": "DOUBLE", "boolean": "BOOLEAN"}.get(kind, "VARCHAR")
    return "VARCHAR" if column.kind == "text" else "BIGINT"


def _loaded(name: str, column: StageColumn) -> str:
    """What makes of the value that is handed over the one that is staged."""
    if column.like is None or column.kind != "time":
        return name
    kind = _time_type(column.like)
    if kind == "TIMESTAMPTZ":
        return f"make_timestamptz({name})"
    if kind == "TIMESTAMP_NS":
        name = f"greatest(-{_NS_LIMIT}, least({name}, {_NS_LIMIT}))"
    return f"CAST(make_timestamp({name}) AS {kind})"


_LOCKS: defaultdict[str, Lock] = defaultdict(Lock)


def _path(url: URL) -> str:
    database = url.database
    return str(Path(database).resolve()) if database and database != ":memory:" else ":memory:"


@contextmanager
def _hold(lock: Lock, timeout: float) -> Iterator[None]:
    if not lock.acquire(timeout=timeout):
        raise SinkUnavailableError(
            f"another thread has been applying a plan for more than {timeout:g} seconds; "
            "nothing was written"
        )
    try:
        yield
    finally:
        lock.release()


class _Session:
    """
    A connection as SQLAlchemy wants it.

    DuckDB's own ``cursor()`` is another session, with other temporary tables and transactions.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.duckdb = connection
        self._in_transaction = False

    def cursor(self) -> _Cursor:
        return _Cursor(self.duckdb)

    def begin(self) -> None:
        self.duckdb.begin()
        self._in_transaction = True

    def commit(self) -> None:
        if self._in_transaction:
            self._in_transaction = False
            self.duckdb.commit()

    def rollback(self) -> None:
        if self._in_transaction:
            self._in_transaction = False
            # A failed COMMIT has ended the transaction already.
            with suppress(duckdb.TransactionException):
                self.duckdb.rollback()

    def close(self) -> None:
        self.duckdb.close()


class _Cursor:
    """
    The session itself.

    DuckDB answers a statement that writes by a row with the count; here it is ``rowcount``, and
    there is no description.
    """

    arraysize = 1

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._gives_rows = False
        self.rowcount = -1

    @property
    def description(self) -> Sequence[Any] | None:
        return self._connection.description if self._gives_rows else None

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> None:
        verb = statement.split(maxsplit=1)[0].upper()
        self._gives_rows = verb == "SELECT"
        self._connection.execute(statement, list(parameters))
        counted = self._connection.fetchone() if verb in _COUNTED else None
        self.rowcount = -1 if counted is None else counted[0]

    def fetchone(self) -> Any:
        return self._connection.fetchone()

    def fetchmany(self, size: int = arraysize) -> list[Any]:
        return self._connection.fetchmany(size)

    def fetchall(self) -> list[Any]:
        return self._connection.fetchall()

    def close(self) -> None:
        self._gives_rows = False


class _Preparer(PGIdentifierPreparer):
    def quote_schema(self, schema: str, force: Any = None) -> str:
        """A schema may have its database before it; no name has a point in it."""
        return ".".join(map(self.quote, schema.split(".")))


class DuckdbDialect(PGDialect):
    """How SQLAlchemy talks to DuckDB: PostgreSQL's SQL, DuckDB's driver."""

    name = "recognition_duckdb"
    driver = "duckdb"
    default_paramstyle = "qmark"
    preparer = _Preparer
    supports_statement_cache = True

    @classmethod
    def import_dbapi(cls) -> Any:
        """The module whose errors are translated."""
        return duckdb

    @classmethod
    def get_pool_class(cls, url: URL) -> type[sa.Pool]:
        """A database in memory is as old as its one connection."""
        in_memory = url.database in (None, "", ":memory:")
        return sa.StaticPool if in_memory else sa.QueuePool

    def create_connect_args(self, url: URL) -> Any:
        """The path, and what follows ``?`` as DuckDB's configuration."""
        return (url.database or ":memory:",), {"config": dict(url.query)}

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """A session whose times are UTC."""
        connection = duckdb.connect(*args, **kwargs)
        connection.execute("SET TimeZone = 'UTC'")
        return _Session(connection)

    def on_connect(self) -> None:
        """Nothing: PostgreSQL's own would ask for what DuckDB does not have."""

    def initialize(self, connection: sa.Connection) -> None:
        """Without the questions that only PostgreSQL answers."""
        DefaultDialect.initialize(self, connection)

    def _get_server_version_info(self, connection: Any) -> tuple[int, int]:
        return (16, 0)

    def _get_default_schema_name(self, connection: Any) -> str:
        return "main"

    def get_default_isolation_level(self, dbapi_connection: Any) -> Any:
        """Snapshot isolation, which is called serializable here."""
        return "SERIALIZABLE"

    def do_begin(self, dbapi_connection: Any) -> None:
        """DuckDB commits each statement unless it is told to begin."""
        dbapi_connection.begin()


compiles(sa.TryCast, DuckdbDialect.name)(render_try_cast)
registry.register(DuckdbDialect.name, __name__, DuckdbDialect.__name__)
