"""
PostgreSQL 12 or later, through psycopg 3.

How it differs: rows are staged by ``COPY`` in its binary form
(https://www.postgresql.org/docs/current/sql-copy.html), two statements that meet the same rows in
another order can deadlock (https://www.postgresql.org/docs/current/explicit-locking.html), so that
one sink at a time writes to a table, and a collation may take different texts for equal
(https://www.postgresql.org/docs/current/collation.html#COLLATION-NONDETERMINISTIC).

Times: a ``timestamp`` or ``date`` is taken to be UTC, a ``timestamptz`` is a moment.

A transaction sets its own isolation, time zone and timeouts (of locks, and of standing still), and
nothing is prepared or kept in a session beyond it, so that a pooler between us and the server does
no harm (https://www.pgbouncer.org/features.html).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, ClassVar, cast
from uuid import UUID

import psycopg
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.engine import make_url
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.functions import Function

from recognition.errors import (
    ConfigurationError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.events import parse_time
from recognition.planner import Step, Value
from recognition.sinks.postgres_like import (
    EPOCH,
    FIRST_TIME,
    LAST_TIME,
    MICROSECOND,
    CatalogueColumn,
    CatalogueTarget,
    Found,
    PostgresLikeSink,
    is_moment,
    read_type,
    show_clock,
)
from recognition.sinks.rows import Column
from recognition.sinks.sql import (
    LEDGER,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
)

# A timestamp in binary is an int8: microseconds since 2000-01-01.
_EPOCH_2000 = (datetime(2000, 1, 1, tzinfo=UTC) - EPOCH) // MICROSECOND

# How Python writes the encodings of a database
# (https://www.postgresql.org/docs/current/multibyte.html). SQL_ASCII takes any bytes, and ours are
# UTF-8. Of any other only ASCII is known to arrive.
_CODECS = {
    "UTF8": "utf-8",
    "SQL_ASCII": "utf-8",
    "LATIN1": "iso8859-1",
    "LATIN2": "iso8859-2",
    "LATIN5": "iso8859-9",
    "LATIN9": "iso8859-15",
    "WIN1250": "cp1250",
    "WIN1251": "cp1251",
    "WIN1252": "cp1252",
    "KOI8R": "koi8-r",
    "EUC_JP": "euc_jp",
}

# In seconds, as long as a lease in `recognition.delivery`: where a worker stands still, or its
# machine is gone, in the middle of a transaction, the server ends the session, and another one goes
# on (https://www.postgresql.org/docs/current/runtime-config-client.html).
_IDLE = 60.0

# The first half of the advisory locks' key, the second is the table's oid. Any number that others
# do not use: "reco".
_LOCKS = 0x7265636F

# A column of which more rows hold one value gets no index: a hash index goes through all of these
# for each of them. 200,000 take 17 s, so many 0.1.
_MOST_EQUAL = 10_000

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_RETRIED = {"40001", "40P01"}
_MADE_TWICE = {"42P07", "42701", "42710"}  # by two sessions at the same moment
_TIMED_OUT = {"25P03", "25P04"}  # an idle or a long transaction, whose session is ended
_GONE = {"42P01", "42703", "3F000", "3D000"}
_REFUSED = ("22", "23", "27", "44", "54", "P0")  # classes: values, constraints, triggers, limits

# What a server says to those whom it does not let in, in PostgreSQL's own words: src/backend/libpq,
# src/backend/utils/init/postinit.c, src/backend/tcop/backend_startup.c. By SQLSTATE.
_REFUSALS = {
    "28P01": r"password authentication failed|no password supplied",
    "28000": r"pg_hba\.conf|role .* does not exist|not permitted to log in|authentication failed",
    "3D000": r"database .* does not exist",
    "42501": r"permission denied for database",
    "53300": r"too many (clients|connections)|connection slots",
    "57P03": r"the database system is",
}

_TABLE = """
SELECT c.oid, n.nspname, c.relname, c.relkind
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND c.relpersistence <> 't'
  AND (c.relname = %(table)s OR lower(c.relname) = lower(%(table)s))
  AND CASE WHEN %(schema)s::text IS NULL THEN n.nspname = ANY (current_schemas(false))
      ELSE n.nspname = %(schema)s OR lower(n.nspname) = lower(%(schema)s) END
ORDER BY array_position(current_schemas(false), n.nspname), n.nspname, c.relname
"""

# A domain is what it is made of; domains of domains too.
_COLUMNS = """
WITH RECURSIVE base AS (
  SELECT a.attnum, a.atttypid AS type, a.atttypmod AS modifier, a.attnotnull AS filled
  FROM pg_catalog.pg_attribute a
  WHERE a.attrelid = %(table)s::oid AND a.attnum > 0 AND NOT a.attisdropped
  UNION ALL
  SELECT b.attnum, t.typbasetype, t.typtypmod, b.filled OR t.typnotnull
  FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.type AND t.typtype = 'd'
)
SELECT a.attname AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS declared,
  t.typname AS type, pg_catalog.format_type(t.oid, b.modifier) AS plain,
  b.modifier, b.filled AS filled,
  a.attgenerated <> '' OR a.attidentity = 'a' AS generated,
  c.oid IS NOT NULL AND c.collname <> 'default' AS collated,
  c.collisdeterministic IS FALSE OR t.typname = 'citext' AS blurred
FROM pg_catalog.pg_attribute a
JOIN base b ON b.attnum = a.attnum
JOIN pg_catalog.pg_type t ON t.oid = b.type AND t.typtype <> 'd'
LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = %(table)s::oid
ORDER BY a.attnum
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column(CatalogueColumn):
    """
    A column of PostgreSQL; the type of a domain is the one it is made of.

    Args:
        plain: This type as a declaration has it, with its width or precision.
        collated: It has a collation of its own.
        blurred: Different texts may be equal.
    """

    plain: str
    collated: bool = False
    blurred: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(CatalogueTarget):
    """
    A table of PostgreSQL.

    Args:
        oid: By which the server knows it.
        foreign: Its rows are on another server.
    """

    oid: int
    foreign: bool = False


class PostgresqlSink(PostgresLikeSink):
    """
    A database of a PostgreSQL server, ``postgresql+psycopg://user:password@host/database``.

    Several processes may write to it: for each table one of them at a time, the others wait up to
    ``timeout`` seconds.
    """

    indexed = True
    collating = ("text",)
    # A temporary table is some milliseconds, and 0.2 MB of log for the system's own tables.
    inline_rows = 100
    types: ClassVar[Mapping[str, str]] = {
        "text": "TEXT",
        "time": "TIMESTAMPTZ",
        "integer": "BIGINT",
        "float": "DOUBLE PRECISION",
        "boolean": "BOOLEAN",
    }
    holds: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **SqlSink.holds,
        "decimal": (int, float),  # every digit of it, where a float would round
    }

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """What follows ``?`` is libpq's, such as ``sslmode`` and ``target_session_attrs``."""
        try:
            # The name that libpq knows too; SQLAlchemy has dropped it.
            parsed = make_url(re.sub(r"\Apostgres(?=[+:])", "postgresql", url))
        except (sa.exc.ArgumentError, ValueError):
            parsed = None
        if parsed is None or parsed.drivername not in ("postgresql", "postgresql+psycopg"):
            raise ConfigurationError(
                "a URL of PostgreSQL is postgresql+psycopg://user:password@host:port/database; "
                "the driver is psycopg 3"
            )
        self._codec = "utf-8"
        options: dict[str, Any] = {
            "fallback_application_name": "recognition",
            "client_encoding": "utf8",
            "connect_timeout": max(2, math.ceil(timeout)),  # libpq takes no less
            # A plan for the window before is none for this one: its stage was another.
            "prepare_threshold": None,
        }
        engine = sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",  # each statement sees what others have committed
            execution_options={"preserve_rowcount": True},  # of an INSERT too
            connect_args={k: v for k, v in options.items() if k not in parsed.query},
        )
        sa.event.listen(engine, "do_connect", _connect)
        sa.event.listen(engine, "connect", self._look_at_server)
        sa.event.listen(engine, "begin", self._begin)
        return engine

    def _look_at_server(self, connection: psycopg.Connection[Any], _: object) -> None:
        if connection.info.server_version < 120_000:
            raise ConfigurationError("the server is older than PostgreSQL 12")
        encoding = connection.info.parameter_status("server_encoding") or ""
        self._codec = _CODECS.get(encoding, "ascii")

    def _begin(self, connection: sa.Connection) -> None:
        """Make what is left of a transaction that depends on no default of the server's."""
        milliseconds = max(1, round(self._timeout * 1_000))  # 0 would be for ever
        connection.exec_driver_sql(
            "SELECT set_config('lock_timeout', %s, true), set_config('TimeZone', 'UTC', true),"
            # How the ledger's texts of keys that are times or floats are written.
            " set_config('DateStyle', 'ISO, YMD', true),"
            " set_config('extra_float_digits', '1', true),"
            " set_config('idle_in_transaction_session_timeout', %s, true)",
            (str(milliseconds), str(round(_IDLE * 1_000))),
        )

    # Tables -------------------------------------------------------------------------------------

    def list_named(
        self, connection: sa.Connection, table: str, schema: str | None
    ) -> Sequence[Found]:
        """Without a schema those of the first in the ``search_path``, the exact one before all."""
        asked = {"table": table, "schema": schema}
        found = [Found(*row) for row in connection.exec_driver_sql(_TABLE, asked)]
        if schema is not None or not found:
            return found
        exact = [each for each in found if each.relname == table]
        return exact[:1] or [each for each in found if each.nspname == found[0].nspname]

    def list_columns(self, connection: sa.Connection, oid: int) -> Iterator[CatalogueColumn]:
        """In their order."""
        for each in connection.exec_driver_sql(_COLUMNS, {"table": oid}):
            yield _describe(
                each.name,
                each.declared,
                each.type,
                each.plain,
                each.modifier,
                nullable=not each.filled,
                generated=each.generated,
                collated=each.collated,
                blurred=each.blurred,
            )

    def make_target(
        self,
        found: Found,
        parts: tuple[str, ...],
        columns: Mapping[str, Column],
        ambiguous: Mapping[str, str],
    ) -> CatalogueTarget:
        """With what the locks and the refusals need."""
        return _Target(
            parts=parts,
            columns=columns,
            collated=any(cast(_Column, column).blurred for column in columns.values()),
            view=found.relkind in ("v", "m"),
            ambiguous=ambiguous,
            oid=found.oid,
            schema=found.nspname,
            foreign=found.relkind == "f",
        )

    def takes_name(self, name: str) -> bool:
        """
        What is longer is cut, by 63 bytes.

        https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS
        """
        return len(name.encode()) <= 63

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the schemas in the ``search_path``."""
        rows = connection.exec_driver_sql(
            "SELECT c.relname FROM pg_catalog.pg_class c"
            " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition"
            " AND c.relnamespace = ANY (current_schemas(false)::regnamespace[])"
        )
        return [row.relname for row in rows]

    def assume(self, kind: str, name: str) -> Column:
        """As `load` makes it."""
        types = {"text": "text", "time": "timestamptz", "integer": "int8", "float": "float8"}
        return _describe(name, self.types[kind], types.get(kind, "bool"), self.types[kind], -1)

    def locked(
        self, transaction: Transaction, tables: Sequence[str]
    ) -> AbstractContextManager[object]:
        """
        Wait for the turn at each table, by advisory locks that end with the transaction.

        They are taken in the order of the oids, which is the same for everybody, however the
        tables are spelled. Nothing of the ledger has been read before.

        Raises:
            SinkReadOnlyError: A table may not be read or updated; nothing was written.
        """
        targets: dict[int, tuple[str, _Target]] = {}
        for table in tables:
            found = self._find(transaction.connection, table)
            if isinstance(found, _Target):
                targets.setdefault(found.oid, (table, found))
        for oid, (table, target) in sorted(targets.items()):
            transaction.statements += 1
            ((_, reads, updates),) = transaction.connection.exec_driver_sql(
                "SELECT pg_advisory_xact_lock(%s::int, (%s::bigint - 2147483648)::int),"
                " has_any_column_privilege(%s::oid, 'SELECT'),"
                " has_any_column_privilege(%s::oid, 'UPDATE')",
                (_LOCKS, oid, oid, oid),
            )
            if reads is None:  # it was dropped since it was looked at: now there may be another
                self._targets.pop(table, None)
                return self.locked(transaction, tables)
            missing = [name for name, has in (("SELECT", reads), ("UPDATE", updates)) if not has]
            if missing and not target.view and not target.foreign:
                name = ".".join(map(self._quote, target.parts))
                raise SinkReadOnlyError(
                    f"the role may not {' and '.join(missing)} here; nothing was written; "
                    f"run: GRANT {', '.join(missing)} ON {name} TO <role>"
                )
        return nullcontext()

    # The stage ----------------------------------------------------------------------------------

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """
        By ``COPY`` in its binary form, then an index for each column of ``=``, then its statistics.

        10,000 rows of 5 columns take 20 ms, by INSERTs of many rows 600; an index of them, 5 ms.
        Without statistics the planner takes a stage for small, and its joins for short.
        """
        wire = [_wire(column) for column in columns]
        converted = [
            values if change is None else [None if v is None else change(v) for v in values]
            for (_, change), values in zip(wire, lists, strict=True)
        ]
        statement = sql.SQL("COPY {} FROM STDIN (FORMAT BINARY)").format(sql.Identifier(name))
        driver = transaction.connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        transaction.statements += 1
        try:
            with driver.cursor() as cursor, cursor.copy(statement) as copy:
                copy.set_types([type_ for type_, _ in wire])
                for row in zip(*converted, strict=True):
                    copy.write_row(row)
        except psycopg.Error as exc:
            if driver.closed:
                transaction.connection.invalidate(exc)
            raise sa.exc.DBAPIError(
                "COPY", None, exc, hide_parameters=True, connection_invalidated=driver.closed
            ) from exc
        # Of a table without statistics, or of times that are younger than they are, the planner
        # expects one row, and goes through the stage for each that is there.
        for column, values in zip(columns, lists, strict=True):
            like = column.like
            if not column.name.startswith("equal_") or like is None or like.kind == "other":
                continue
            if max(Counter(values).values(), default=0) <= _MOST_EQUAL:
                by = f"{self._quote(name)} USING hash ({column.name})"
                transaction.execute_text(f"CREATE INDEX ON {by}")
        # By these rows are joined; of other columns the planner makes no use.
        joined = [c.name for c in columns if c.name.startswith("equal_") or c.name == "workspace"]
        listed = f" ({', '.join(joined)})" if joined else ""
        transaction.execute_text(f"ANALYZE {self._quote(name)}{listed}")

    def inline(
        self,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> sa.FromClause:
        """
        One array for each column, so that the text is the same for any number of rows.

        Of these arrays the planner knows the length.
        """
        arrays = [
            sa.cast(sa.literal([*map(_as_bound(column), values)], type_), type_)
            for column, values in zip(columns, lists, strict=True)
            for type_ in [_ArrayOf(_name_type(column))]
        ]
        # Not `func.unnest`: the dialect of BigQuery, once imported, puts one of its own there.
        rows = Function("unnest", *arrays).table_valued(*(column.name for column in columns))
        return rows.render_derived(name=name)

    # The ledger ---------------------------------------------------------------------------------

    def create_ledger(self, transaction: Transaction) -> None:
        """
        Where there is none in the ``search_path``.

        Keys may be longer than a B-tree takes (https://www.postgresql.org/docs/current/btree.html),
        so that they are found by their hashes.
        """
        ((schema, creates, *granted),) = transaction.connection.exec_driver_sql(
            "SELECT current_schema(), has_schema_privilege(current_schema(), 'CREATE'), "
            + ", ".join(
                f"has_table_privilege(to_regclass('{LEDGER.name}'), '{each}')" for each in _NEEDED
            )
        )
        transaction.statements += 1
        if granted[0] is None:
            if not creates:
                raise SinkReadOnlyError(
                    f"there is no table {LEDGER.name!r} and the role may not make it; nothing was "
                    f"written; run: GRANT CREATE ON SCHEMA {self._quote(schema or 'public')} "
                    "TO <role>"
                )
            transaction.execute(CreateTable(LEDGER, if_not_exists=True))
            for name, by in (("key", "hash (key_value)"), ("age", "brin (applied_at)")):
                transaction.execute_text(
                    f"CREATE INDEX IF NOT EXISTS {LEDGER.name}_{name} ON {LEDGER.name} USING {by}"
                )
            return
        missing = [name for name, has in zip(_NEEDED, granted, strict=True) if not has]
        if missing:
            raise SinkReadOnlyError(
                f"the role may not {' and '.join(missing)} in the ledger; nothing was written; "
                f"run: GRANT {', '.join(missing)} ON {LEDGER.name} TO <role>"
            )

    def as_text(self, expression: sa.ColumnElement[Any], column: Column) -> sa.ColumnElement[Any]:
        """Under the ledger's own collation: two that differ cannot be compared."""
        assert isinstance(column, _Column)
        if column.kind == "text" and not column.collated and not column.blurred:
            return expression
        text = sa.cast(expression, sa.Text())
        return text.collate("default") if column.collated else text

    # Statements ---------------------------------------------------------------------------------

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """The collation of the C language compares bytes."""
        return sa.cast(expression, sa.Text()).collate("C")

    def _blurs(self, column: Column, target: Target) -> bool:
        return isinstance(column, _Column) and column.blurred

    # Values -------------------------------------------------------------------------------------

    def _refuse_shape(self, target: Target, step: Step) -> str | None:
        if isinstance(target, _Target) and target.foreign:
            return f"{step.table!r} is a foreign table; updates need the server that has its rows"
        return super()._refuse_shape(target, step)

    def _holds_all(self, column: Column, values: Sequence[Value]) -> bool:
        # One look at all texts together: most are ASCII.
        return (
            super()._holds_all(column, values)
            and cast(_Column, column).type != "bpchar"
            and all(map(str.isascii, cast(Sequence[str], values)))
        )

    def _refuse(self, column: Column, value: Value) -> str | None:
        reason = super()._refuse(column, value)
        if reason is not None or not isinstance(value, str):
            return reason
        assert isinstance(column, _Column)
        if column.kind == "time" and parse_time(value) % column.precision:
            return f"a time was found that is finer than what it keeps; it is {column.declared}"
        if column.type == "bpchar" and value.endswith(" "):
            return (
                f"a text that ends with a blank was found; it is {column.declared}, which cuts it"
            )
        if column.kind == "text" and not self._encodes(value):
            return "a text with characters was found that the database's encoding does not have"
        return None

    def _encodes(self, text: str) -> bool:
        try:
            text.encode(self._codec)
        except UnicodeEncodeError:
            return False
        return True

    # Errors -------------------------------------------------------------------------------------

    def translate(self, error: BaseException | None) -> SinkError:
        """By the SQLSTATE, never by the text, which is in the server's language."""
        state = getattr(error, "sqlstate", None) or ""
        if state in _RETRIED:
            return SinkUnavailableError(
                f"another transaction was in the way ({state}); all was rolled back, a retry helps"
            )
        if state == "55P03":
            return SinkUnavailableError(
                f"a lock of another transaction was in the way for more than {self._timeout:g} "
                "seconds; all was rolled back, a retry helps"
            )
        if state in _MADE_TWICE or (state == "23505" and _is_in_catalogue(error)):
            return SinkUnavailableError(
                f"another session made the same table at the same moment ({state}); all was "
                "rolled back, a retry helps"
            )
        if state == "57014":
            return SinkUnavailableError(
                "the statement was cancelled, by somebody or by the server's statement_timeout; "
                "all was rolled back, a retry may help"
            )
        if state[:3] == "57P" or state in _TIMED_OUT:
            return SinkUnavailableError(
                f"the server ended the connection ({state}); nothing was written, a retry may help"
            )
        if state[:2] == "08" or (not state and isinstance(error, psycopg.OperationalError)):
            return SinkUnavailableError(
                f"the server cannot be reached, went away or refused ({state or 'no code'}); "
                "nothing was written, a retry may help"
            )
        if state[:2] == "53":
            return SinkUnavailableError(
                f"the server has no more space, memory or connections ({state}); all was rolled "
                "back, a retry may help"
            )
        if state == "42501":
            return SinkReadOnlyError(
                "the role may not do this; all was rolled back; it needs SELECT on the table, "
                "UPDATE on the columns that are set, SELECT, INSERT and DELETE on "
                f"{LEDGER.name}, and TEMPORARY on the database"
            )
        if state == "25006":
            return SinkReadOnlyError(
                "the server or the transaction may only read, as a standby does; nothing was "
                "written"
            )
        if state[:2] == "28":
            return SinkError(
                f"the server refused the credentials ({state}): user, password, or the way to log "
                "in; nothing was written"
            )
        if state in _GONE:
            return TableError(
                f"a database, schema, table or column is not there ({state}); all was rolled back"
            )
        if state[:2] in _REFUSED:
            return TableError(
                f"a constraint, trigger, index or type of a table refused the rows ({state}); all "
                "was rolled back"
            )
        name = state or type(error).__name__
        return SinkError(f"the server refused a statement ({name}); all was rolled back")


_NEEDED = ("SELECT", "INSERT", "DELETE")


def _describe(
    name: str,
    declared: str,
    type_: str,
    plain: str,
    modifier: int,
    *,
    nullable: bool = True,
    generated: bool = False,
    collated: bool = False,
    blurred: bool = False,
) -> _Column:
    held = read_type(type_, modifier, signed_scale=True)
    return _Column(
        name=name,
        declared=declared,
        kind=held.kind,
        nullable=nullable,
        width=held.width,
        low=held.low,
        high=held.high,
        generated=generated,
        type=type_,
        plain=plain,
        collated=collated,
        blurred=blurred,
        precision=held.precision,
    )


class _ArrayOf(sa.types.UserDefinedType[Any]):
    """An array of a type by the name that PostgreSQL gives it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """As it is written in a cast."""
        return f"{self.name}[]"


def _name_type(column: StageColumn) -> str:
    if column.like is None:
        return "bigint" if column.kind == "integer" else "text"
    if column.kind == "time":
        return "timestamptz" if is_moment(column.like) else "timestamp"
    return cast(_Column, column.like).plain


def _as_bound(column: StageColumn) -> Callable[[Any], Any]:
    """What makes of a value what psycopg binds as an element of such an array."""
    change: Callable[[Any], Any] | None
    if column.like is not None and column.kind == "time":
        like = column.like

        def change(microseconds: int) -> datetime:
            return show_clock(like, max(FIRST_TIME, min(microseconds, LAST_TIME)))
    else:
        _, change = _wire(column)
    return lambda value: value if value is None or change is None else change(value)


def _wire(column: StageColumn) -> tuple[str, Callable[[Any], Any] | None]:
    """As which type a stage's column is written, and what makes a value one of its values."""
    if column.like is not None and column.kind == "time":
        # Written as the number that it is, which no datetime has to be made for.
        return "int8", lambda microseconds: microseconds - _EPOCH_2000
    if column.like is None:
        return ("int8", None) if column.kind == "integer" else ("text", None)
    like = cast(_Column, column.like)
    if like.kind == "text":
        return "text", None
    if like.kind == "decimal":
        return "numeric", lambda number: Decimal(repr(number))
    if like.kind == "uuid":
        return "uuid", UUID
    return like.type, float if like.kind == "float" else None


def _is_in_catalogue(error: BaseException | None) -> bool:
    return isinstance(error, psycopg.Error) and error.diag.schema_name == "pg_catalog"


def _connect(_: object, __: object, arguments: Any, options: Any) -> Any:
    """Connect; where the server refuses, the error has a SQLSTATE."""
    try:
        return psycopg.connect(*arguments, **options)
    except psycopg.ProgrammingError as exc:
        raise ConfigurationError(
            "the URL has an option that libpq does not know; it knows those of "
            "https://www.postgresql.org/docs/current/libpq-connect.html"
        ) from exc
    except psycopg.OperationalError as exc:
        state = exc.sqlstate or _read_refusal(exc)
        if state is None:
            raise
        raise psycopg.errors.lookup(state)("the server refused the connection") from exc


def _read_refusal(error: psycopg.OperationalError) -> str | None:
    """
    The SQLSTATE of an error at connecting, of which libpq keeps the text alone.

    A server that speaks another language than English is understood as far as libpq knows itself
    that a password was missing.
    """
    text = str(error)
    for state, pattern in _REFUSALS.items():
        if re.search(pattern, text):
            return state
    return "28P01" if error.pgconn is not None and error.pgconn.needs_password else None
