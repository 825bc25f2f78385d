"""
Amazon Redshift, through ``redshift_connector`` or psycopg2.

How it differs: blanks at a text's end do not count when texts are compared
(https://docs.aws.amazon.com/redshift/latest/dg/r_Examples_with_character_types.html), widths are
bytes and ``TEXT`` is ``VARCHAR(256)``
(https://docs.aws.amazon.com/redshift/latest/dg/r_Character_types.html), a transaction may end in a
serializable isolation violation
(https://docs.aws.amazon.com/redshift/latest/dg/c_serial_isolation.html), and there are no
savepoints, no ``RETURNING``, no indexes, no tables of ``VALUES``
(https://docs.aws.amazon.com/redshift/latest/dg/c_unsupported-postgresql-features.html). A
correlated subquery may not compare for NULL
(https://docs.aws.amazon.com/redshift/latest/dg/r_correlated_subqueries.html), so that a row is
looked for by an outer join.

The dialect is that of ``sqlalchemy-redshift``, but for its reflection, which asks for columns of
the catalogue that newer patches and SQLAlchemy do not agree on. Tables are looked up in the part of
``pg_catalog`` that Redshift has in common with PostgreSQL 8.

Large stages go by way of an S3 bucket, where one is named: there is no ``COPY FROM STDIN``.

Times: a ``timestamp`` or ``date`` is taken to be UTC, a ``timestamptz`` is a moment.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar, cast
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import registry
from sqlalchemy.engine import URL, make_url
from sqlalchemy.schema import CreateTable
from sqlalchemy_redshift.dialect import RedshiftDialect_redshift_connector

from recognition.errors import (
    ConfigurationError,
    MissingDependencyError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
    ValueRefusedError,
)
from recognition.events import parse_time
from recognition.planner import Step, Value
from recognition.sinks.postgres_like import (
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
    Inline,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
)

_log = logging.getLogger("recognition.sinks.redshift")

# The widest VARCHAR, in bytes: https://docs.aws.amazon.com/redshift/latest/dg/r_Character_types.html
_WIDEST = 65_535

# One statement has 16 MB at most (https://docs.aws.amazon.com/redshift/latest/dg/r_INSERT_30.html),
# psycopg2 writes values into its text, and redshift_connector binds 32,767 at most.
_PAGE_BYTES = 15_000_000
_PAGE_VALUES = 32_767

# What COPY takes as one row: https://docs.aws.amazon.com/redshift/latest/dg/r_COPY.html.
_COPY_ROW_BYTES = 4 * 1024 * 1024

# A bucket and a prefix (https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html,
# ..object-keys.html, of whose safe characters no quote is one), a role or several in a chain
# (https://docs.aws.amazon.com/redshift/latest/dg/copy-parameters-authorization.html), a region.
_S3_OPTIONS = {
    "s3": (
        r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w!.*/-]*))?",
        "is a bucket and, if wanted, a prefix: s3://bucket/prefix",
    ),
    "iam_role": (
        r"default|arn:[\w:/+=.@-]+(,arn:[\w:/+=.@-]+)*",
        "is default, or the ARN of a role",
    ),
    "s3_region": (r"[a-z0-9-]+", "is a region, such as eu-west-1"),
}

# What S3 says to those whom it does not let in, or whose bucket is not there:
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_S3_LOGIN = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}

# For how long a connection is used. redshift_connector keeps every text that it ever sent.
_RECYCLED = 1_800  # seconds

# A value that the driver itself knows how to send.
_AS_IT_IS = sa.types.NullType()

# What every session sets. A group shows in SYS_QUERY_HISTORY and may route to a queue:
# https://docs.aws.amazon.com/redshift/latest/dg/r_query_group.html. That one row is set by two is
# an error: https://docs.aws.amazon.com/redshift/latest/dg/r_error_on_nondeterministic_update.html.
_SETTINGS = {"query_group": "recognition", "error_on_nondeterministic_update": "true"}

_URLS = (
    "a URL of Redshift is redshift+redshift_connector://user:password@host:port/database or "
    "redshift+psycopg2://..."
)
_PLAIN = r"[\w .,:;/@+=-]*"
_NUMBERS = {
    "client_protocol_version",
    "idp_response_timeout",
    "listen_port",
    "max_prepared_statements",
    "tcp_keepalive_count",
    "tcp_keepalive_idle",
    "tcp_keepalive_interval",
    "timeout",
}

# https://docs.aws.amazon.com/redshift/latest/dg/c_serial_isolation-serializable-isolation-troubleshooting.html
_VIOLATIONS = {
    "1018": "a table was made after the transaction began",
    "1023": "another transaction was in the way",
}
_RETRIED = {"40001", "40P01"}
_MADE_TWICE = {"42P07", "42701", "42710"}  # by two sessions at the same moment
_GONE = {"42P01", "42703", "3F000", "3D000"}
_REFUSED = ("22", "23", "27", "44", "54", "P0")  # classes: values, constraints, limits

# What a server says to those whom it does not let in; psycopg2 keeps this text alone.
_REFUSALS = {
    "28P01": r"password authentication failed|no password supplied",
    "28000": r"pg_hba\.conf|(role|user) .* does not exist|not permitted to log in",
    "3D000": r"database .* does not exist",
    "53300": r"too many (clients|connections)|connection slots|connection limit",
    "57P03": r"the database system is",
}

_TABLE = """
SELECT c.oid, n.nspname, c.relname, c.relkind
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname NOT LIKE 'pg_temp%%'
  AND (c.relname = %s OR lower(c.relname) = %s)
"""
_VISIBLE = "AND pg_catalog.pg_table_is_visible(c.oid)"
_IN_SCHEMA = "AND (n.nspname = %s OR lower(n.nspname) = %s)"
_ORDER = " ORDER BY n.nspname, c.relname"

_COLUMNS = """
SELECT a.attname AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS declared,
  t.typname AS type, a.atttypmod AS modifier, a.attnotnull AS filled,
  pg_catalog.pg_get_expr(d.adbin, d.adrelid) AS preset
FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""

# Explicit widths, in bytes, because memory is taken by the declared width. A name has 127 bytes, an
# id of an update 255 characters of up to 4 bytes, a key is noted as its hash.
_WIDTHS = {
    "update_id": 1_020,
    "workspace": 1_020,
    "table_name": 1_024,
    "key_column": 512,
    "key_value": 32,
    "message_column": 512,
    "time_column": 512,
}
_LEDGER = sa.Table(
    LEDGER.name,
    sa.MetaData(),
    *(
        sa.Column(
            column.name,
            sa.String(_WIDTHS.get(column.name, _WIDEST))
            if isinstance(column.type, sa.Text)
            else column.type,
            nullable=column.nullable,
            primary_key=False,
        )
        for column in LEDGER.columns
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column(CatalogueColumn):
    """A column of Redshift; its width is in bytes, and it keeps so many decimals."""

    scale: int | None = None


class RedshiftSink(PostgresLikeSink):
    """
    A database of Amazon Redshift.

    ``redshift+redshift_connector://`` (also ``redshift://``) or ``redshift+psycopg2://``, then
    ``user:password@host:5439/database``; what follows ``?`` is the driver's.

    Several processes may write to it: one at a time, the others wait up to ``timeout`` seconds.

    Args:
        settings: What a session sets, by name. The default is ``query_group``, by which a DBA sees
            who asked, and ``error_on_nondeterministic_update``.
        statement_timeout: After how many seconds the server ends a statement.
        lock_tables: Lock the tables of a plan too, for databases whose isolation is SERIALIZABLE
            and whose loaders would be in the way again and again. Whoever reads them waits then.
        s3: ``s3://bucket/prefix``: stages that one INSERT does not hold are put there, copied and
            removed. The credentials are those that boto3 finds; ``boto3`` comes with
            ``redshift_connector``. This and the next two may also stand in the URL.
        iam_role: With which role the cluster reads the bucket, by its ARN, or ``default``.
        s3_region: Where the bucket is, if not where the cluster is.
    """

    indexed = False
    ledger_first = True  # it is the lock
    text = sa.String(_WIDEST)
    collating = ()
    inline_rows = 100

    #: A stage of more INSERTs goes by way of the bucket, where one was named.
    insert_pages: ClassVar[int] = 1

    types: ClassVar[Mapping[str, str]] = {
        "text": f"VARCHAR({_WIDEST})",
        "time": "TIMESTAMPTZ",
        "integer": "BIGINT",
        "float": "DOUBLE PRECISION",
        "boolean": "BOOLEAN",
    }
    holds: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **SqlSink.holds,
        "decimal": (int, float),
    }

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        ledger_days: int = 90,
        add_missing_columns: bool = False,
        settings: Mapping[str, str] = _SETTINGS,
        statement_timeout: float = 3_600.0,
        lock_tables: bool = False,
        s3: str | None = None,
        iam_role: str = "default",
        s3_region: str | None = None,
    ) -> None:
        for name, value in settings.items():
            if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", name) or not re.fullmatch(_PLAIN, value):
                raise ConfigurationError(
                    "settings are names of small letters and underscores, each with a plain text"
                )
        if statement_timeout <= 0:
            raise ConfigurationError("statement_timeout is in seconds, and more than 0")
        self._settings = {
            "timezone": "UTC",
            # How the ledger's texts of keys that are times are written.
            "datestyle": "ISO, YMD",
            **settings,
        }
        self._statement_timeout = statement_timeout
        self._locks_tables = lock_tables
        self._s3_options = {"s3": s3, "iam_role": iam_role, "s3_region": s3_region}
        super().__init__(
            url,
            timeout=timeout,
            ledger_days=ledger_days,
            add_missing_columns=add_missing_columns,
        )

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """Both drivers look for a server's certificate unless the URL says otherwise."""
        try:
            parsed = make_url(url)
        except (sa.exc.ArgumentError, ValueError) as exc:
            raise ConfigurationError(_URLS) from exc
        self._bucket = _open_bucket({**self._s3_options, **parsed.query}, timeout)
        parsed = parsed.difference_update_query(_S3_OPTIONS)
        if parsed.drivername == "redshift+psycopg2":
            options: dict[str, Any] = {
                "application_name": "recognition",
                "connect_timeout": max(2, math.ceil(timeout)),
                "keepalives_idle": 60,
                "keepalives_interval": 10,
                "keepalives_count": 6,
            }
            options = {k: v for k, v in options.items() if k not in parsed.query}
        elif parsed.drivername in ("redshift", "redshift+redshift_connector"):
            options = {
                "application_name": "recognition",
                # An unnamed statement for each: a named one stays in the server and here.
                "max_prepared_statements": 0,
                "tcp_keepalive_idle": 60,
                "tcp_keepalive_interval": 10,
                "tcp_keepalive_count": 6,
                **_read_query(parsed),
            }
            parsed = parsed.set(drivername=_Dialect.registered, query={})
        else:
            raise ConfigurationError(_URLS)
        try:
            engine = sa.create_engine(
                parsed,
                hide_parameters=True,
                pool_pre_ping=True,
                pool_recycle=_RECYCLED,
                execution_options={"preserve_rowcount": True},  # of an INSERT too
                connect_args=options,
            )
        except ImportError as exc:
            package = "psycopg2-binary" if "psycopg2" in parsed.drivername else "redshift-connector"
            raise MissingDependencyError(
                f"the driver of this URL is not installed; run: pip install {package}"
            ) from exc
        sa.event.listen(engine, "connect", self._prepare_session)
        return engine

    def _prepare_session(self, connection: Any, _: object) -> None:
        cursor = connection.cursor()
        for name, value in self._settings.items():
            cursor.execute(
                f"SET {name} TO '{value}'"
            )  # checked to hold neither quote nor backslash
        cursor.close()
        connection.commit()

    def close(self) -> None:
        """Close all connections, those to the bucket too."""
        super().close()
        if self._bucket is not None:
            self._bucket.close()

    # Tables -------------------------------------------------------------------------------------

    def list_named(
        self, connection: sa.Connection, table: str, schema: str | None
    ) -> Sequence[Found]:
        """Without a schema those that are visible in the ``search_path``."""
        asked: tuple[str, ...] = (table, table.lower())
        if schema is not None:
            asked += (schema, schema.lower())
        statement = _TABLE + (_VISIBLE if schema is None else _IN_SCHEMA) + _ORDER
        return [Found(*row) for row in connection.exec_driver_sql(statement, asked)]

    def list_columns(self, connection: sa.Connection, oid: int) -> Iterator[CatalogueColumn]:
        """In their order."""
        for each in connection.exec_driver_sql(_COLUMNS, (oid,)):
            yield _describe(
                each.name,
                each.declared,
                each.type,
                each.modifier,
                nullable=not each.filled,
                preset=each.preset or "",
            )

    def make_target(
        self,
        found: Found,
        parts: tuple[str, ...],
        columns: Mapping[str, Column],
        ambiguous: Mapping[str, str],
    ) -> CatalogueTarget:
        """External tables are no tables to an UPDATE."""
        return CatalogueTarget(
            parts=parts,
            columns=columns,
            view=found.relkind in ("v", "m", "f"),
            ambiguous=ambiguous,
            schema=found.nspname,
        )

    def takes_name(self, name: str) -> bool:
        """https://docs.aws.amazon.com/redshift/latest/dg/r_names.html: 127 bytes."""
        return len(name.encode()) <= 127

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the schemas in the ``search_path``."""
        rows = connection.exec_driver_sql(
            "SELECT c.relname FROM pg_catalog.pg_class c"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.relkind IN ('r', 'p') AND pg_catalog.pg_table_is_visible(c.oid)"
            " AND n.nspname <> 'pg_catalog' AND n.nspname <> 'information_schema'"
        )
        return [row.relname for row in rows]

    def assume(self, kind: str, name: str) -> Column:
        """As `load` makes it."""
        types = {
            "text": ("varchar", _WIDEST + 4),
            "time": ("timestamptz", -1),
            "integer": ("int8", -1),
            "float": ("float8", -1),
        }
        return _describe(name, self.types[kind], *types.get(kind, ("bool", -1)))

    # Transactions -------------------------------------------------------------------------------

    def _do(
        self,
        transaction: Transaction,
        tables: Sequence[str],
        prepare: Callable[[Transaction], Any],
        work: Callable[[Transaction, Any], Any],
        needs_ledger: bool,
    ) -> tuple[Any, int]:
        # The ledger is what is locked, whether something is noted in it or not.
        if self._locks_tables and any(table not in self._targets for table in tables):
            # Before the transaction: what looks at tables takes its snapshot.
            for table in tables:
                self._find(transaction.connection, table)
            transaction.connection.commit()
        return super()._do(transaction, tables, prepare, work, True)

    def locked(
        self, transaction: Transaction, tables: Sequence[str]
    ) -> AbstractContextManager[object]:
        """
        Lock the ledger, first of all: the snapshot is taken by what comes next.

        https://docs.aws.amazon.com/redshift/latest/dg/r_LOCK.html: whoever reads a table that is
        locked waits too, so that the tables of the plan are locked on request only. Two sinks wait
        for each other here. Somebody else who writes to the same rows meanwhile makes it end in a
        violation, which is retried. There is no time limit for locks, so that the statement has it.
        """
        locked = [LEDGER.name]
        if self._locks_tables:
            found = [each for each in map(self._targets.get, tables) if each is not None]
            names = {".".join(map(self._quote, each.parts)) for each in found if not each.view}
            locked += sorted(names)
        self._limit(transaction, self._timeout)
        transaction.execute_text(f"LOCK TABLE {', '.join(locked)}")
        self._limit(transaction, self._statement_timeout)
        return nullcontext()

    @staticmethod
    def _limit(transaction: Transaction, seconds: float) -> None:
        """https://docs.aws.amazon.com/redshift/latest/dg/r_statement_timeout.html."""
        milliseconds = max(100, round(seconds * 1_000))  # 0 would be for ever
        transaction.execute_text(f"SET LOCAL statement_timeout TO {milliseconds}")

    # The stage ----------------------------------------------------------------------------------

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """
        By INSERTs of many rows; where one is not enough and a bucket was named, by COPY from there.

        One row at a time would be a round trip for each of them, and SQLAlchemy's own way to insert
        many compiles anew each time, because the dialect caches no statements. One INSERT takes
        less time than an object that is put, read and removed.
        """
        converted = _convert_lists(columns, lists)
        named = ", ".join(self._quote(column.name) for column in columns)
        rows = [*zip(*converted, strict=True)]
        pages = [*_pages(rows)]
        if self._bucket is not None and len(pages) > self.insert_pages:
            null = _choose_null(rows)
            lines = [_write_line(row, null) for row in rows]
            if max(map(len, lines)) <= _COPY_ROW_BYTES:
                with self._bucket.holding(gzip.compress(b"".join(lines), 1)) as source:
                    transaction.execute_text(
                        f"COPY {self._quote(name)} ({named}) {source} FORMAT AS CSV GZIP"
                        f" NULL AS '{null}' TIMEFORMAT 'auto' COMPUPDATE OFF STATUPDATE OFF"
                    )
                return
        marks = f"({', '.join(['%s'] * len(columns))})"
        for page in pages:
            transaction.statements += 1
            all_marks = ", ".join([marks] * len(page))
            transaction.connection.exec_driver_sql(
                f"INSERT INTO {self._quote(name)} ({named}) VALUES {all_marks}",
                tuple(value for row in page for value in row),
            )

    def inline(
        self,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> sa.FromClause:
        """A SELECT for each row: there is no table of VALUES, and no array to bind."""
        ends: list[sa.ColumnElement[Any]] = [
            sa.literal_column(f" AS {_name_type(c)}) AS {c.name}") for c in columns
        ]
        begin: sa.ColumnElement[Any] = sa.literal_column("(SELECT CAST(")
        pieces: list[sa.ColumnElement[Any]] = []
        for row in zip(*_convert_lists(columns, lists), strict=True):
            for value, end in zip(row, ends, strict=True):
                pieces += (begin, sa.bindparam(None, value, _AS_IT_IS), end)
                begin = sa.literal_column(", CAST(")
            begin = sa.literal_column(" UNION ALL SELECT CAST(")
        table = Inline(*pieces, sa.literal_column(")"))
        return table.table_valued(*(column.name for column in columns), name=name)

    # The ledger ---------------------------------------------------------------------------------

    def create_ledger(self, transaction: Transaction) -> None:
        """Where there is none in the ``search_path``; who may make none needs not, where it is."""
        transaction.statements += 1
        there = transaction.connection.exec_driver_sql(
            "SELECT 1 FROM pg_catalog.pg_class c"
            f" WHERE c.relname = '{LEDGER.name}' AND pg_catalog.pg_table_is_visible(c.oid)"
        ).first()
        if there is None:
            transaction.execute(CreateTable(_LEDGER, if_not_exists=True))

    def as_text(self, expression: sa.ColumnElement[Any], column: Column) -> sa.ColumnElement[Any]:
        """
        A truth value has no cast to a text.

        https://docs.aws.amazon.com/redshift/latest/dg/r_Boolean_type.html
        """
        if column.kind == "boolean":
            true: sa.ColumnElement[Any] = sa.literal_column("'true'")
            return sa.case((expression, true), (~expression, sa.literal_column("'false'")))
        return super().as_text(expression, column)

    def as_key(self, expression: sa.ColumnElement[Any], column: Column) -> sa.ColumnElement[Any]:
        """Its hash, in which a blank at the end counts, and which is narrow."""
        return sa.func.md5(self.as_text(expression, column))

    # Statements ---------------------------------------------------------------------------------

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """What `same` adds is enough."""
        return expression

    def same(
        self, one: sa.ColumnElement[Any], other: sa.ColumnElement[Any], kind: str
    ) -> sa.ColumnElement[bool]:
        """
        Texts that are equal but for blanks at their ends differ in length.

        https://docs.aws.amazon.com/redshift/latest/dg/r_Examples_with_character_types.html. The
        equality joins, the lengths are compared of what it found.
        """
        if kind == "text":
            return sa.and_(one == other, sa.func.length(one) == sa.func.length(other))
        return one == other

    def differ(
        self, one: sa.ColumnElement[Any], other: sa.ColumnElement[Any], kind: str
    ) -> sa.ColumnElement[bool]:
        """There is no IS DISTINCT FROM; see `same` for texts."""
        no: sa.ColumnElement[Any] = sa.literal_column("0")
        yes: sa.ColumnElement[Any] = sa.literal_column("1")
        differs = sa.case(
            (self.same(one, other, kind), no),
            (sa.and_(one.is_(None), other.is_(None)), no),
            else_=yes,
        )
        return differs == yes

    def lacking(
        self,
        rows: sa.Select[Any],
        stage: sa.FromClause,
        column: sa.ColumnClause[Any],
        same: Sequence[sa.ColumnElement[bool]],
    ) -> sa.Select[Any]:
        """By an outer join: a correlated subquery may not compare for NULL."""
        there = stage.outerjoin(cast(sa.FromClause, column.table), sa.and_(*same))
        return rows.select_from(there).where(column.is_(None))

    def _empty(self, table: sa.TableClause, target: Target, name: str) -> sa.ColumnElement[bool]:
        # Blanks alone equal '', but are something.
        column = target.column(name)
        if column.kind == "text" and not column.nullable:
            return sa.func.length(table.c[column.name]) == 0
        return super()._empty(table, target, name)

    # Values -------------------------------------------------------------------------------------

    def _check_against(
        self, connection: sa.Connection, target: Target | None, step: Step
    ) -> dict[str, TableError]:
        refused = super()._check_against(connection, target, step)
        if len(step.shape.equals) > 1 and not step.shape.versioned:
            for row in step.rows:
                # Further equalities are noted together, in one text.
                noted = len(json.dumps(row.equals[1:], ensure_ascii=False).encode())
                if noted > _WIDEST // 2:
                    refused[row.update_id] = ValueRefusedError(
                        f"table {step.table!r}: the further values that a row must equal have "
                        f"{noted} bytes together, which the ledger does not hold; nothing of this "
                        "update was written"
                    )
        return refused

    def _holds_all(self, column: Column, values: Sequence[Value]) -> bool:
        # One look at all texts together: most are ASCII, of which characters are bytes.
        return (
            super()._holds_all(column, values)
            and cast(_Column, column).type != "bpchar"
            and all(map(str.isascii, cast(Sequence[str], values)))
        )

    def _refuse(self, column: Column, value: Value) -> str | None:
        reason = super()._refuse(column, value)
        if reason is not None or value is None:
            return reason
        assert isinstance(column, _Column)
        if isinstance(value, float) and column.scale is not None:
            exact = Decimal(repr(value))
            if exact != round(exact, column.scale):
                return (
                    f"a number with more decimals than it keeps was found; it is {column.declared}"
                )
        if not isinstance(value, str):
            return None
        if column.kind == "time" and parse_time(value) % column.precision:
            return f"a time was found that is finer than what it keeps; it is {column.declared}"
        if column.kind == "text":
            try:
                size = len(value.encode())
            except UnicodeEncodeError:
                return "a text with half a character was found, which UTF-8 does not have"
            if column.width is not None and size > column.width:
                return f"a text of {size} bytes was found; it is {column.declared}, in bytes"
            if column.type == "bpchar" and not value.isascii():
                return f"a text that is not ASCII was found; it is {column.declared}"
            if column.type == "bpchar" and value.endswith(" "):
                return (
                    f"a text that ends with a blank was found; it is {column.declared}, "
                    "which cuts it"
                )
        return None

    # Errors -------------------------------------------------------------------------------------

    def translate(self, error: BaseException | None) -> SinkError:
        """By the SQLSTATE, and by Redshift's own numbers where that is ``XX000``."""
        state, said = _read(error)
        if state == "XX000" and said.startswith("S3ServiceException"):
            # https://docs.aws.amazon.com/redshift/latest/dg/s3serviceexception-error.html
            return SinkError(
                "the cluster could not read the stage from the bucket of s3; all was rolled back, "
                "a retry does not help; the role of iam_role needs s3:GetObject and s3:ListBucket "
                "there, and to be attached to the cluster; a bucket of another region needs "
                "s3_region"
            )
        number = said[:4] if state == "XX000" else "1023" if state in _RETRIED else ""
        if number in _VIOLATIONS:
            return SinkUnavailableError(
                f"{_VIOLATIONS[number]} ({state}, {number}); all was rolled back, a retry helps"
            )
        if state in _MADE_TWICE or (state == "23505" and "pg_" in said):
            return SinkUnavailableError(
                f"another session made the same table at the same moment ({state}); all was "
                "rolled back, a retry helps"
            )
        if state == "57014":
            return SinkUnavailableError(
                f"the statement was cancelled: a lock was held for more than {self._timeout:g} "
                f"seconds, it took more than {self._statement_timeout:g}, or somebody or a rule of "
                "the workload management ended it; all was rolled back, a retry may help"
            )
        if state[:3] in ("57P", "25P") and state != "25P02":
            return SinkUnavailableError(
                f"the server ended the connection ({state}); nothing was written, a retry may help"
            )
        if state[:2] == "08":
            return SinkUnavailableError(
                f"the server cannot be reached, went away or refused ({state}); nothing was "
                "written, a retry may help"
            )
        if state[:2] == "53":
            return SinkUnavailableError(
                f"the server has no more space, memory or connections ({state}); all was rolled "
                "back, a retry may help"
            )
        if state == "42501":
            return SinkReadOnlyError(
                "the user may not do this; all was rolled back; run: "
                "GRANT SELECT, UPDATE ON <table> TO <user>; "
                f"GRANT SELECT, INSERT, DELETE ON {LEDGER.name} TO <user>, or, where there is none "
                "yet, GRANT CREATE ON SCHEMA <schema> TO <user>; "
                "GRANT TEMP ON DATABASE <database> TO <user>"
            )
        if state == "25006":
            return SinkReadOnlyError(
                "the server or the transaction may only read; nothing was written"
            )
        if state[:2] == "28":
            return SinkError(
                f"the credentials were refused or have expired ({state}); nothing was written"
            )
        if state in _GONE:
            return TableError(
                f"a database, schema, table or column is not there ({state}); all was rolled back"
            )
        if state[:2] in _REFUSED:
            return TableError(
                f"a type, a width or a constraint of a table refused the rows ({state}); all was "
                "rolled back"
            )
        name = state or type(error).__name__
        return SinkError(f"the server refused a statement ({name}); all was rolled back")


class _Dialect(RedshiftDialect_redshift_connector):  # type: ignore[misc] # it has no types
    """
    The dialect of redshift_connector, where errors of connections are such.

    The driver lets errors of sockets through as they are, and the dialect does not know which of
    its errors mean that the connection is gone.
    """

    registered = "redshift.recognition"
    supports_statement_cache = False

    def connect(self, *arguments: Any, **options: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with self._reading():
                return super().connect(*arguments, **options)
        except (BotoCoreError, ClientError) as exc:
            raise self.loaded_dbapi.InterfaceError({"C": "28000", "M": type(exc).__name__}) from exc

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        state, _ = _read(e)
        return state[:2] == "08" or state[:3] == "57P"

    def do_execute(self, cursor: Any, *arguments: Any, **options: Any) -> None:
        with self._reading():
            super().do_execute(cursor, *arguments, **options)

    def do_execute_no_params(self, cursor: Any, *arguments: Any, **options: Any) -> None:
        with self._reading():
            super().do_execute_no_params(cursor, *arguments, **options)

    def do_commit(self, dbapi_connection: Any) -> None:
        with self._reading():
            super().do_commit(dbapi_connection)

    def do_rollback(self, dbapi_connection: Any) -> None:
        with self._reading():
            super().do_rollback(dbapi_connection)

    def do_ping(self, dbapi_connection: Any) -> bool:
        # Outside a transaction, which would go on, with a snapshot from before the lock.
        dbapi_connection.autocommit = True
        try:
            with self._reading():
                return bool(super().do_ping(dbapi_connection))
        finally:
            dbapi_connection.autocommit = False

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, struct.error) as exc:
            gone = {"C": "08006", "M": type(exc).__name__}
            raise self.loaded_dbapi.OperationalError(gone) from exc


registry.register(_Dialect.registered, __name__, _Dialect.__name__)


def _read(error: BaseException | None) -> tuple[str, str]:
    """The SQLSTATE of a driver's error, and what the server said in the first place."""
    told = error.args[0] if error is not None and error.args else ""
    if isinstance(told, dict):  # redshift_connector
        return str(told.get("C", "")), str(told.get("M", "")).strip()
    state = getattr(error, "pgcode", None) or ""
    if state:
        return state, str(cast(Any, error).diag.message_primary or "").strip()
    if type(error).__name__ in ("InterfaceError", "OperationalError"):
        # Nothing of the server's: there was or is no connection, or it was not let in.
        for refusal, pattern in _REFUSALS.items():
            if re.search(pattern, str(told)):
                return refusal, ""
        return "08006", ""
    return "", ""


def _read_query(url: URL) -> dict[str, Any]:
    """
    What follows ``?`` as redshift_connector wants it.

    Its own ``ssl`` is taken for false unless it is the constant: the text "true" would turn
    encryption off.
    """
    truths = {"true": True, "false": False}
    read: dict[str, Any] = {}
    for name, value in url.query.items():
        if not isinstance(value, str):
            raise ConfigurationError(f"the URL names the option {name!r} more than once")
        if name in _NUMBERS and value.isdecimal():
            read[name] = int(value)
        else:
            read[name] = truths.get(value.lower(), value)
    return read


def _describe(
    name: str,
    declared: str,
    type_: str,
    modifier: int,
    *,
    nullable: bool = True,
    preset: str = "",
) -> _Column:
    # SUPER, GEOMETRY, VARBYTE and what else there is hold nothing of ours.
    held = read_type(type_, modifier, signed_scale=False)
    return _Column(
        name=name,
        declared=declared,
        kind=held.kind,
        nullable=nullable,
        width=held.width,
        low=held.low,
        high=held.high,
        # https://docs.aws.amazon.com/redshift/latest/dg/r_CREATE_TABLE_NEW.html: IDENTITY. Its
        # default is one of these functions.
        generated=re.match(r'"?(default_)?identity"?\(', preset) is not None,
        type=type_,
        precision=held.precision,
        scale=held.scale,
    )


def _name_type(column: StageColumn) -> str:
    if column.like is None:
        return "BIGINT" if column.kind == "integer" else f"VARCHAR({_WIDEST})"
    if column.kind == "time":
        return "TIMESTAMPTZ" if is_moment(column.like) else "TIMESTAMP"
    return column.like.declared


def _convert_lists(
    columns: Sequence[StageColumn], lists: Sequence[Sequence[Any]]
) -> list[Sequence[Any]]:
    """The values as the drivers know them."""
    converted: list[Sequence[Any]] = []
    for column, values in zip(columns, lists, strict=True):
        change = _wire(column)
        if change is not None:
            values = [None if value is None else change(value) for value in values]
        converted.append(values)
    return converted


def _wire(column: StageColumn) -> Callable[[Any], Any] | None:
    """What makes a value one that the drivers know."""
    like = column.like
    if like is None:
        return None
    if column.kind == "time":
        return lambda microseconds: show_clock(like, microseconds)
    if like.kind == "decimal":
        return lambda number: Decimal(repr(number))
    return float if like.kind == "float" else None


class _Bucket:
    """
    Where large stages are put, to be copied from there.

    Args:
        name, prefix: As the URL has them.
        source: What COPY says behind the object's name: who reads it, and where it is.
        timeout: How long S3 may take to answer, in seconds.
    """

    def __init__(self, name: str, prefix: str, source: str, timeout: float) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ModuleNotFoundError as exc:
            raise MissingDependencyError(
                f"a bucket needs the package {exc.name!r}, which is not installed; "
                "run: pip install boto3"
            ) from exc
        self._name = name
        self._prefix = prefix
        self._source = source
        seconds = max(2.0, timeout)
        self._session = boto3.session.Session()
        self._config = Config(
            connect_timeout=seconds, read_timeout=seconds, retries={"mode": "standard"}
        )
        self._client: Any = None

    @contextmanager
    def holding(self, data: bytes) -> Iterator[str]:
        """
        Put the data there for as long as the block takes; gives what COPY names it by.

        Raises:
            SinkError: S3 does not take it. Nothing was written; whether a retry helps is said.
        """
        key = f"{self._prefix}{uuid4()}.csv.gz"
        self._ask("s3:PutObject", "put_object", Key=key, Body=data)
        try:
            yield f"FROM 's3://{self._name}/{key}' {self._source}"
        finally:
            try:
                self._ask("s3:DeleteObject", "delete_object", Key=key)
            except SinkError as error:
                # It was read, or never will be. A rule of the bucket may remove it.
                _log.warning("a stage was left in the bucket: %s", error)

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _ask(self, needed: str, call: str, **arguments: object) -> None:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            HTTPClientError,
        )
        from botocore.exceptions import (
            ConnectionError as NoConnectionError,
        )

        where = f"bucket {self._name!r}"
        try:
            if self._client is None:
                self._client = self._session.client("s3", config=self._config)
            getattr(self._client, call)(Bucket=self._name, **arguments)
        except ClientError as exc:
            code = str(exc.response.get("Error", {}).get("Code", ""))
            status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if status >= 500 or status == 429:
                raise SinkUnavailableError(
                    f"{where} is not available ({code}); nothing was written, a retry may help"
                ) from exc
            if code in _S3_LOGIN:
                reason = "the credentials that boto3 found were refused or have expired"
            elif code == "NoSuchBucket":
                reason = "there is none of this name"
            else:
                reason = f"it was refused; {needed} is needed"
            raise SinkError(
                f"{where}: {reason} ({code}); nothing was written, a retry does not help"
            ) from exc
        except (HTTPClientError, NoConnectionError) as exc:
            raise SinkUnavailableError(
                f"{where}: S3 cannot be reached ({type(exc).__name__}); nothing was written, a "
                "retry may help"
            ) from exc
        except BotoCoreError as exc:
            raise SinkError(
                f"{where}: boto3 finds no credentials or no region for it "
                f"({type(exc).__name__}); nothing was written, a retry does not help"
            ) from exc


def _open_bucket(options: Mapping[str, object], timeout: float) -> _Bucket | None:
    """What the options mean together; ``None`` where no bucket is named."""
    if options.get("s3") is None:
        return None
    told: dict[str, re.Match[str]] = {}
    for name, (pattern, meant) in _S3_OPTIONS.items():
        value = options.get(name)
        if value is not None:
            found = re.fullmatch(pattern, value, re.ASCII) if isinstance(value, str) else None
            if found is None:
                raise ConfigurationError(f"{name} {meant}")
            told[name] = found
    role = told["iam_role"][0]
    source = f"IAM_ROLE {role}" if role == "default" else f"IAM_ROLE '{role}'"
    if "s3_region" in told:
        source += f" REGION '{told['s3_region'][0]}'"
    prefix = (told["s3"][2] or "").strip("/")
    return _Bucket(told["s3"][1], f"{prefix}/" if prefix else "", source, timeout)


def _choose_null(rows: Sequence[tuple[Any, ...]]) -> str:
    """What no text of the rows is: whether quotes tell it from a text is written nowhere."""
    texts = {value for row in rows for value in row if isinstance(value, str)}
    null = "@null"
    while null in texts:
        null += "@"
    return null


def _write_line(row: tuple[Any, ...], null: str) -> bytes:
    """
    A line of CSV.

    https://docs.aws.amazon.com/redshift/latest/dg/copy-parameters-data-format.html: within quotes
    a delimiter and the end of a line are text, and a quote is two.
    """
    cells = []
    for value in row:
        if value is None:
            cells.append(null)
        elif isinstance(value, str):
            cells.append(f'"{value.replace(chr(34), chr(34) * 2)}"')
        elif isinstance(value, datetime):
            # https://docs.aws.amazon.com/redshift/latest/dg/automatic-recognition.html
            zone = "" if value.tzinfo is None else "+00"
            cells.append(f"{value.replace(tzinfo=None).isoformat(sep=' ')}{zone}")
        elif isinstance(value, Decimal):
            cells.append(f"{value:f}")
        else:
            cells.append(str(value).lower() if isinstance(value, bool) else str(value))
    return f"{','.join(cells)}\n".encode()


def _pages(rows: Sequence[tuple[Any, ...]]) -> Iterator[Sequence[tuple[Any, ...]]]:
    """As many rows at a time as one statement holds."""
    start = size = 0
    for place, row in enumerate(rows):
        # Every byte of a text may have to be escaped.
        more = sum(2 * len(v.encode()) + 4 if isinstance(v, str) else 44 for v in row)
        full = (place + 1 - start) * len(row) > _PAGE_VALUES or size + more > _PAGE_BYTES
        if full and place > start:
            yield rows[start:place]
            start, size = place, 0
        size += more
    if start < len(rows):
        yield rows[start:]
