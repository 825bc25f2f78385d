"""
Databricks SQL, by ``databricks-sqlalchemy`` and its connector, on tables of Unity Catalog.

How it differs: there is no transaction of several statements over any tables, each statement
commits by itself (https://docs.databricks.com/lakehouse/acid.html). UPDATE has no FROM, so that
rows are set by MERGE (https://docs.databricks.com/sql/language-manual/delta-merge-into.html), which
is atomic, and of two that touch the same files at a time one fails
(https://docs.databricks.com/optimizations/isolation-level.html).

**What a crash leaves.** In a table with ``recognition_version`` one MERGE is all there is to an
update: each row says by which it was written, two statements in any order leave the same rows, and
nothing is locked. In other tables the ledger is a second statement. It comes after the MERGE: what
was set and not noted is set again, and noted, when the update comes again, which delivery sees to.
An earlier update that comes in between does not see the note and may set rows in its way; the
later one then sets them back. With the note first it would be the other way round, rows that nobody
set until then; both ends are the same. That no *other worker* comes in between is seen to by a
lease: one row of ``recognition_lock`` for each table, taken by a MERGE of its own, of which two at
a time cannot both succeed. It ends by itself, later than any statement that began under it can run.
"""

from __future__ import annotations

import math
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, NamedTuple, TypeVar

import databricks.sqlalchemy  # noqa: F401 - the extra is installed
import sqlalchemy as sa
from databricks.sql import exc as driver
from sqlalchemy.engine import make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import quoted_name

from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.sinks.merging import MergingSink
from recognition.sinks.rows import Column, greatest
from recognition.sinks.sql import LEDGER, Target, Transaction, render_try_cast

_Prepared = TypeVar("_Prepared")
_Result = TypeVar("_Result")

_URL = "databricks://token:TOKEN@host?http_path=/sql/1.0/warehouses/ID&catalog=NAME&schema=NAME"
_LOCK = "recognition_lock"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)

# How much longer a lease is than a statement may run, and be sent again until it does: within it
# the next one has begun.
_SPARE_SECONDS = 60

# https://docs.databricks.com/sql/language-manual/sql-ref-datatypes.html, in bits.
_BITS = {"tinyint": 8, "smallint": 16, "int": 32, "bigint": 64}
_FLOATS = {"float": 3.4028234663852886e38, "double": sys.float_info.max}

# Error classes of https://docs.databricks.com/error-messages/error-classes.html.
_CONFLICTS = ("DELTA_CONCURRENT_", "DELTA_METADATA_CHANGED", "DELTA_PROTOCOL_CHANGED")
# A catalog that is missing, or hidden, has no INFORMATION_SCHEMA either.
_NO_CATALOG = ("NO_SUCH_CATALOG_EXCEPTION", "SCHEMA_NOT_FOUND", "TABLE_OR_VIEW_NOT_FOUND")
_GRANTS = (
    "a privilege is missing; as the owner run: GRANT USE CATALOG ON CATALOG .., GRANT USE SCHEMA "
    "ON SCHEMA .., GRANT SELECT, MODIFY ON TABLE .. and, for the ledger, GRANT CREATE TABLE ON "
    "SCHEMA .., each TO the user or service principal"
)
_AGAIN = "what ran before it in the plan stays written; applying the same again is safe"
_SAID: Mapping[str, tuple[type[SinkError], str]] = {
    "CANNOT_CREATE_TABLE": (SinkReadOnlyError, _GRANTS),
    "DELTA_MULTIPLE_SOURCE_ROW_MATCHING_TARGET_ROW_IN_MERGE": (
        SinkError,
        "two updates of one statement meant the same row",
    ),
    "EXPECT_TABLE_NOT_VIEW": (TableError, "it is a view; name the table under it"),
    "INSUFFICIENT_PERMISSIONS": (SinkReadOnlyError, _GRANTS),
    "NO_SUCH_CATALOG_EXCEPTION": (SinkError, "the catalog of the URL is missing, or hidden"),
    "PERMISSION_DENIED": (SinkReadOnlyError, _GRANTS),
    "SCHEMA_NOT_FOUND": (SinkError, "the schema of the URL is missing, or hidden"),
    "TABLE_OR_VIEW_NOT_FOUND": (TableError, "a table is missing, or hidden from the user"),
    "UNAUTHORIZED_ACCESS": (SinkReadOnlyError, _GRANTS),
}


class DatabricksSink(MergingSink):
    """
    A schema of Unity Catalog, through a SQL warehouse.

    ``databricks://token:TOKEN@host?http_path=/sql/1.0/warehouses/ID&catalog=NAME&schema=NAME``

    Args:
        timeout: How long conflicts and other workers are waited for, in seconds, and how long the
            driver sends again what a warehouse does not take yet.
        statement_timeout: How long one statement may run, in seconds. A worker that dies while it
            notes something in the ledger keeps others from its tables for this and ``timeout`` and
            a minute.
        connect_args: More for the connector, above all what must not stand in a URL
            (``access_token``, ``credentials_provider``).
    """

    primary_key = " NOT NULL"  # what is not enforced but trusted by the optimizer is no help
    inline_rows = 10_000
    # A statement may have 16 MiB:
    # https://docs.databricks.com/api/workspace/statementexecution/executestatement
    page_bytes = 8_000_000
    # https://docs.databricks.com/tables/temporary-tables.html: of one session, on SQL warehouses.
    makes_stage = "CREATE TEMPORARY TABLE"
    integer = "BIGINT"
    types: ClassVar[Mapping[str, str]] = {
        "text": "STRING",
        "time": "TIMESTAMP",
        "integer": "BIGINT",
        "float": "DOUBLE",
        "boolean": "BOOLEAN",
    }

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        ledger_days: int = 90,
        add_missing_columns: bool = False,
        statement_timeout: int = 600,
        connect_args: Mapping[str, Any] | None = None,
    ) -> None:
        if statement_timeout < 1:
            raise ConfigurationError(
                f"statement_timeout is {statement_timeout} seconds; it is at least 1"
            )
        self._statement_timeout = statement_timeout
        self._connect_args = dict(connect_args or {})
        super().__init__(
            url,
            timeout=timeout,
            ledger_days=ledger_days,
            add_missing_columns=add_missing_columns,
        )
        del self._connect_args  # it may hold a token

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """https://docs.databricks.com/sql/language-manual/sql-ref-parameters.html."""
        self._retrying = float(
            self._connect_args.get("_retry_stop_after_attempts_duration", max(1.0, timeout))
        )
        session = {
            "TIMEZONE": "UTC",
            "ANSI_MODE": "true",  # what overflows or cannot be cast is an error, and never NULL
            "STATEMENT_TIMEOUT": str(self._statement_timeout),  # by default 2 days
            **self._connect_args.get("session_configuration", {}),
        }
        try:
            parsed = make_url(url)
        except (sa.exc.ArgumentError, ValueError):  # its text may hold the token
            parsed = None
        named = {} if parsed is None else parsed.query
        if parsed is None or not parsed.host or not {"http_path", "catalog", "schema"} <= {*named}:
            raise ConfigurationError(f"a URL of Databricks is {_URL}")
        self._catalog, self._schema = str(named["catalog"]), str(named["schema"])
        engine = sa.create_engine(
            parsed,
            hide_parameters=True,
            connect_args={
                "user_agent_entry": "recognition",
                "query_tags": {"application": "recognition"},  # who ran it, in system.query.history
                # While a warehouse starts, or has no room, what is asked is sent again and again.
                "_retry_stop_after_attempts_duration": self._retrying,
                **self._connect_args,
                "session_configuration": session,
            },
        )
        sa.event.listen(engine, "before_cursor_execute", _keep_the_lease)
        sa.event.listen(engine, "handle_error", _note_lost_session)
        return engine

    def exists(self) -> bool:
        """Connecting makes none; one that is missing is an error."""
        return True

    # Tables -------------------------------------------------------------------------------------

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """
        By INFORMATION_SCHEMA; names tell no case apart, and those of tables are in lower case.

        https://docs.databricks.com/sql/language-manual/sql-ref-names.html
        """
        if len(parts) > 3:
            return None
        whole = (self._catalog, self._schema, *parts)[-3:]
        if len(parts) == 2:
            whole = (self._catalog, *parts)
        catalog, schema, name = (each.lower() for each in whole)
        where = "table_schema = :schema AND table_name = :name"
        given = {"schema": schema, "name": name}
        held = f"{self._engine.dialect.identifier_preparer.quote_identifier(catalog)}."
        look = sa.text(f"SELECT table_type FROM {held}information_schema.tables WHERE {where}")
        try:
            kind = connection.execute(look, given).scalar()
        except sa.exc.DBAPIError as exc:
            if catalog == self._catalog.lower() or _class_of(exc.orig) not in _NO_CATALOG:
                raise
            kind = None  # an update named it: only its own table is missing
        if kind is None:
            return None
        rows = connection.execute(
            sa.text(
                "SELECT column_name, full_data_type, is_nullable"
                f" FROM {held}information_schema.columns WHERE {where} ORDER BY ordinal_position"
            ),
            given,
        )
        columns = [_describe(name, declared, able == "YES") for name, declared, able in rows]
        return _Target(
            parts=(*parts[:-1], name),
            columns={column.name.lower(): column for column in columns},
            collated=any(_is_blurred(column) for column in columns),
            view=kind.removesuffix("_SHALLOW_CLONE") not in ("MANAGED", "EXTERNAL", "BASE TABLE"),
        )

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the URL's schema."""
        held = self._engine.dialect.identifier_preparer.quote_identifier(self._catalog)
        rows = connection.execute(
            sa.text(
                f"SELECT table_name FROM {held}.information_schema.tables"
                " WHERE table_schema = :schema"
            ),
            {"schema": self._schema.lower()},
        )
        return [name for (name,) in rows]

    def noted_name(self, target: Target) -> str:
        """With catalog and schema, however they were given."""
        whole = (self._catalog, self._schema, *target.parts)[-3:]
        return ".".join(whole if len(target.parts) != 2 else (self._catalog, *target.parts)).lower()

    def assume(self, kind: str, name: str) -> Column:
        """As `load` makes it."""
        return _describe(name, self.types[kind].lower(), True)

    def refuse_time(self, column: Column) -> str | None:
        """Numbers have no unit that the database could know."""
        if column.kind in ("time", "text"):
            return None
        return f"it is {column.declared}; a time column is a TIMESTAMP, a DATE or a text"

    def create_ledger(self, transaction: Transaction) -> None:
        """And the lock; nothing is asked for where they are."""
        tables = {*self.list_tables(transaction.connection)}
        transaction.statements += 1
        numbers = ("starts", "ends", "sequence", "applied_at")
        declared = ", ".join(
            f"{self._quote(column.name)} {'BIGINT' if column.name in numbers else 'STRING'}"
            f"{'' if column.nullable else ' NOT NULL'}"
            for column in LEDGER.columns
        )
        if LEDGER.name not in tables:
            transaction.execute_text(
                f"CREATE TABLE IF NOT EXISTS {LEDGER.name} ({declared})"
                " USING DELTA CLUSTER BY (table_name, key_column, key_value)"
            )
        if _LOCK not in tables:
            # Of two that insert the first line of a table at a time one fails.
            transaction.execute_text(
                f"CREATE TABLE IF NOT EXISTS {_LOCK} (table_name STRING NOT NULL, holder STRING,"
                " until BIGINT) USING DELTA"
                " TBLPROPERTIES ('delta.isolationLevel' = 'Serializable')"
            )

    # The lease ----------------------------------------------------------------------------------

    def _do(
        self,
        transaction: Transaction,
        tables: Sequence[str],
        prepare: Callable[[Transaction], _Prepared],
        work: Callable[[Transaction, _Prepared], _Result],
        needs_ledger: bool,
    ) -> tuple[_Result, int]:
        try:
            if not needs_ledger:
                return super()._do(transaction, tables, prepare, work, needs_ledger)
            if not self._has_ledger:
                self.create_ledger(transaction)
                self._has_ledger = True
            with self._leased(transaction, tables):
                result, _ = super()._do(transaction, tables, prepare, work, needs_ledger)
            return result, transaction.statements  # with those of the lease
        except BaseException:
            if transaction.stages:
                transaction.connection.invalidate()  # they go with the session
            raise

    @contextmanager
    def _leased(self, transaction: Transaction, tables: Sequence[str]) -> Iterator[None]:
        """
        Nobody else writes to these tables and the ledger meanwhile; see the module.

        Taken in alphabetical order. What is waited for is not held for longer than a lease.
        """
        connection = transaction.connection
        holder = secrets.token_hex(8)
        whole = sorted(
            {self.noted_name(Target(parts=tuple(name.split(".")), columns={})) for name in tables}
        )
        deadline = time.monotonic() + self._timeout
        try:
            for name in whole:
                self._take(transaction, name, holder, deadline)
            yield
        finally:
            if not connection.invalidated:
                connection.info.pop("recognition_lease", None)
                self._release(transaction, holder)

    def _release(self, transaction: Transaction, holder: str) -> None:
        """What cannot be given back ends by itself."""
        connection = transaction.connection
        for delay in (0.05, 0.1, 0.2, 0.4, 0.8, 0.0):
            transaction.statements += 1
            try:
                connection.execute(_RELEASE, {"holder": holder})
                return
            except sa.exc.DBAPIError as exc:
                if not delay or not _class_of(exc.orig).startswith(_CONFLICTS):
                    connection.invalidate()
                    return
                time.sleep(delay)  # another worker changed the line of another table

    def _take(self, transaction: Transaction, name: str, holder: str, deadline: float) -> None:
        seconds = math.ceil(self._statement_timeout + self._retrying + _SPARE_SECONDS)
        delay = 0.1
        while True:
            began = time.monotonic()
            transaction.statements += 1
            try:
                taken = self.changed_rows(
                    transaction.connection.execute(
                        _TAKE, {"name": name, "holder": holder, "lease": seconds * 1_000_000}
                    )
                )
            except sa.exc.DBAPIError as exc:
                if not _class_of(exc.orig).startswith(_CONFLICTS):
                    raise
                taken = 0  # another worker was taking it at the same time
            if taken:
                info = transaction.connection.info
                # Of several the one that was taken first ends first.
                first = info.get("recognition_lease", _Lease(holder, seconds, began))
                info["recognition_lease"] = first
                return
            if time.monotonic() + delay > deadline:
                raise SinkUnavailableError(
                    f"another worker has been writing to table {name!r} for more than "
                    f"{self._timeout:g} seconds, or died less than {seconds} seconds ago; nothing "
                    "was written, a retry may help"
                )
            time.sleep(delay)
            delay = min(2 * delay, 2.0)

    def changed_rows(self, result: sa.CursorResult[Any]) -> int:
        """By the line of counts that a statement answers with; an INSERT's is not kept."""
        line = result.first()
        return result.rowcount if line is None else int(line.num_affected_rows)

    # Rows ---------------------------------------------------------------------------------------

    def unfold(self, columns: Sequence[tuple[str, str | None]]) -> str:
        """https://docs.databricks.com/sql/language-manual/functions/from_json.html."""
        cells = []
        for place, (name, type_) in enumerate(columns):
            cell = f"line[{place}]"
            cells.append(f"{cell if type_ is None else f'CAST({cell} AS {type_})'} AS {name}")
        return (
            f"SELECT {', '.join(cells)} FROM"
            " (SELECT explode(from_json(:lines, 'ARRAY<ARRAY<STRING>>')) AS line)"
        )

    def type_of(self, column: Column) -> str | None:
        return None if column.kind == "text" else column.declared.upper()

    def time_type(self, like: Column) -> str:
        """A date is compared as the midnight that begins it; a text is a moment."""
        return "TIMESTAMP" if like.kind == "text" or like.declared == "timestamp" else _LOCAL

    def as_time(self, like: Column, time: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        if like.kind == "text":
            return sa.try_cast(time, _OfDatabricks("TIMESTAMP"))
        return sa.cast(time, _OfDatabricks(_LOCAL)) if like.declared == "date" else time

    def show_time(self, type_: str, microseconds: int) -> str:
        """Within what the types hold; the session's zone is UTC."""
        moment = _EPOCH + timedelta(microseconds=max(_FIRST, min(microseconds, _LAST)))
        if type_ == "DATE":
            return moment.date().isoformat()
        if type_ == _LOCAL:
            moment = moment.replace(tzinfo=None)
        return moment.isoformat(sep=" ", timespec="microseconds")

    def gather(self, texts: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """https://docs.databricks.com/sql/language-manual/functions/collect_list.html."""
        return sa.func.collect_list(texts)

    def among(
        self, text: sa.ColumnElement[Any], texts: sa.ColumnElement[Any]
    ) -> sa.ColumnElement[bool]:
        """https://docs.databricks.com/sql/language-manual/functions/array_contains.html."""
        return sa.func.array_contains(texts, text, type_=sa.Boolean())

    def constant(self, type_: str, text: str) -> sa.ColumnElement[Any]:
        """Known before the files are listed, so that those outside are skipped."""
        return sa.cast(sa.literal(text, sa.String()), _OfDatabricks(type_))

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Bytes have no collation."""
        return sa.cast(expression, _OfDatabricks("BINARY"))

    # Errors -------------------------------------------------------------------------------------

    def translate(self, error: BaseException | None) -> SinkError:
        """By the error class that Databricks puts before its text, and the status of HTTP."""
        name = _class_of(error)
        status = (getattr(error, "context", None) or {}).get("http-code")
        shown = name or (f"HTTP {status}" if status else type(error).__name__)
        kind: type[SinkError]
        if name.startswith(_CONFLICTS):
            kind, said = SinkUnavailableError, "another statement was changing the same files"
        elif status in (401, 403):
            kind, said = SinkError, "the token has expired, or was refused; get a new one"
        elif _is_lost(error):
            kind, said = OutcomeUnknownError, "no answer came, or the session has ended"
        elif name in _SAID:
            kind, said = _SAID[name]
        elif name.startswith(("CAST_", "DELTA_EXCEED_CHAR", "DELTA_NOT_NULL", "DELTA_VIOLATE")):
            kind, said = TableError, "a table refused the rows"
        else:
            kind, said = SinkError, "Databricks refused a statement"
        return _partly(kind(f"{said} ({shown}); {_AGAIN}"))


_LOCAL = "TIMESTAMP_NTZ"

_TAKE = sa.text(
    f"MERGE INTO {_LOCK} USING (SELECT :name AS name, :holder AS holder,"
    " unix_micros(current_timestamp()) AS moment) AS wanted"
    f" ON {_LOCK}.table_name = wanted.name"
    f" WHEN MATCHED AND {_LOCK}.until < wanted.moment THEN UPDATE"
    " SET holder = wanted.holder, until = wanted.moment + :lease"
    " WHEN NOT MATCHED THEN INSERT (table_name, holder, until)"
    " VALUES (wanted.name, wanted.holder, wanted.moment + :lease)"
)

_RENEW = sa.text(
    f"UPDATE {_LOCK} SET until = unix_micros(current_timestamp()) + :lease"
    " WHERE holder = :holder AND until > unix_micros(current_timestamp())"
)
_RELEASE = sa.text(f"UPDATE {_LOCK} SET until = 0 WHERE holder = :holder")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(Target):
    """A table whose schema and catalog are quoted each by itself."""

    def clause(self) -> sa.TableClause:
        names: list[sa.ColumnClause[Any]] = [sa.column(c.name) for c in self.columns.values()]
        held = ".".join(f"`{part.replace('`', '``')}`" for part in self.parts[:-1])
        return sa.table(self.parts[-1], *names, schema=quoted_name(held, False) if held else None)


class _OfDatabricks(sa.types.UserDefinedType[Any]):
    """A type by the name that Databricks gives it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """As it is written in a cast."""
        return self.name


class _Lease(NamedTuple):
    """Who has it, for how many seconds, and the time of this machine before it was asked for."""

    holder: str
    seconds: int
    began: float


def _keep_the_lease(connection: sa.Connection, *_: Any) -> None:
    """
    No statement begins that might still run when the lease has ended; before that it is renewed.

    It is sent within the time that the driver retries, and half a minute, after this was looked at.
    """
    lease = connection.info.get("recognition_lease")
    if lease is None or time.monotonic() < lease.began + _SPARE_SECONDS / 2:
        return
    del connection.info["recognition_lease"]  # the renewal comes by here too
    began = time.monotonic()
    given = {"holder": lease.holder, "lease": lease.seconds * 1_000_000}
    if not connection.execute(_RENEW, given).one().num_affected_rows:
        raise _partly(
            SinkUnavailableError(
                f"this worker stood still, and may no longer write to its tables; {_AGAIN}"
            )
        )
    connection.info["recognition_lease"] = lease._replace(began=began)


def _partly(error: SinkError) -> SinkError:
    """Statements commit one by one: what was written before one failed is not known here."""
    error.written = None
    return error


def _class_of(error: BaseException | None) -> str:
    """``DELTA_CONCURRENT_APPEND`` of ``[DELTA_CONCURRENT_APPEND.WHOLE_TABLE_READ] ..``."""
    found = re.search(r"\[([A-Z][A-Z0-9_]+)[A-Z0-9_.]*\]", str(getattr(error, "message", "") or ""))
    return "" if found is None else found[1]


def _is_lost(error: BaseException | None) -> bool:
    lost = (driver.RequestError, driver.InterfaceError, driver.SessionAlreadyClosedError)
    text = str(getattr(error, "message", "") or "")
    return isinstance(error, lost) or "SessionHandle" in text


def _note_lost_session(context: sa.engine.ExceptionContext) -> None:
    if _is_lost(context.original_exception):
        context.is_disconnect = True


def _is_blurred(column: Column) -> bool:
    """Different texts may be equal: by a collation, or because blanks fill a CHAR."""
    return column.kind == "text" and (
        column.declared.startswith("char")
        or ("collate" in column.declared and "utf8_binary" not in column.declared)
    )


def _describe(name: str, declared: str, nullable: bool) -> Column:
    """By https://docs.databricks.com/sql/language-manual/sql-ref-datatypes.html."""
    declared = declared.lower()
    base, *limits = re.findall(r"\w+", declared)
    kind = "other"
    low: float | None = None
    high: float | None = None
    width = None
    if base in ("string", "varchar", "char"):
        kind = "text"
        width = int(limits[0]) if base != "string" else None
    elif base in _BITS:
        kind, high = "integer", 2 ** (_BITS[base] - 1) - 1
        low = -high - 1
    elif base in _FLOATS:
        kind, high = "float", _FLOATS[base]
        low = -high
    elif base == "decimal":
        kind, high = "float", greatest(int(limits[0]), int(limits[1]))
        low = -high
    elif base == "boolean":
        kind = "boolean"
    elif base in ("timestamp", "timestamp_ntz", "date"):
        kind = "time"
    return Column(
        name=name,
        declared=declared,
        kind=kind,
        nullable=nullable,
        width=width,
        low=low,
        high=high,
    )


compiles(sa.TryCast, "databricks")(render_try_cast)
