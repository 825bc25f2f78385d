"""
Snowflake, by ``snowflake-sqlalchemy`` 2.1 and its connector 5.

How it differs: every DDL statement commits, ``CREATE TEMPORARY TABLE`` too, so that stages are made
and filled before the transaction begins
(https://docs.snowflake.com/en/sql-reference/transactions). A statement rewrites whole
micro-partitions, and skips those whose times lie outside constant bounds
(https://docs.snowflake.com/en/user-guide/tables-clustering-micropartitions). Writers of one table
wait for each other by themselves, no key is enforced, and a name without quotes is in upper case.

What a session needs goes with its login, not as ``ALTER SESSION`` after it: that costs no
statement, and no session of the pool can lack it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import snowflake.sqlalchemy  # noqa: F401 - the extra is installed
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import quoted_name

from recognition.errors import (
    ConfigurationError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.planner import Bound
from recognition.sinks.rows import Column
from recognition.sinks.sql import (
    LEDGER,
    Inline,
    Interval,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
    render_json,
    render_try_cast,
)

_URL = "snowflake://user:password@account/database/schema?warehouse=NAME&role=NAME"

# https://docs.snowflake.com/en/user-guide/query-size-limits: 1 MB of text for a statement. A list
# of VALUES has at most 16,384 lines (error 001795), and the connector sends a page as one list.
_PAGE_ROWS = 16_000
_PAGE_BYTES = 1_000_000

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = 86_400 * 1_000_000

# What the connector says when no answer came (`ErrorKind` of its core): IO, cancelled, timeout.
_NO_ANSWER = {4, 5, 14}

# Codes of https://docs.snowflake.com/en/sql-reference/transactions: more than 20 statements wait
# for a table, or one has waited for LOCK_TIMEOUT.
_BUSY = {625, 684}

# The session is over, or none could be had; another one may do.
_NO_SESSION = {250001, 250002, 390110, 390111, 390112, 390113, 390114, 390115, 390195}

_PRIVILEGES = (
    "a privilege is missing; as the owner run: GRANT USAGE ON DATABASE .., GRANT USAGE ON SCHEMA "
    ".., GRANT SELECT, UPDATE ON TABLE .. and, for the ledger, GRANT CREATE TABLE ON SCHEMA .., "
    "each TO ROLE .."
)
_LOGIN = "Snowflake refused the login: "
_SAID: Mapping[int, tuple[type[SinkError], str]] = {
    606: (
        SinkError,
        "the session has no warehouse; add ?warehouse=NAME to the URL, or run: "
        "ALTER USER .. SET DEFAULT_WAREHOUSE = ..",
    ),
    3001: (SinkReadOnlyError, _PRIVILEGES),
    2003: (TableError, "a table is missing, or hidden from the role; look at GRANT SELECT, UPDATE"),
    2043: (
        SinkError,
        "database, schema, role or warehouse of the URL is missing, or hidden from the user; "
        "run: SHOW GRANTS TO USER ..",
    ),
    90073: (SinkError, "a resource monitor keeps the warehouse suspended; raise its quota"),
    90105: (SinkError, "the database of the URL is missing, or hidden from the role"),
    90106: (SinkError, "the schema of the URL is missing, or hidden from the role"),
    100090: (SinkError, "two updates of one statement meant the same row"),
    390100: (SinkError, f"{_LOGIN}the user's name or password is wrong"),
    390101: (SinkError, f"{_LOGIN}the user's name or password is wrong"),
    390102: (SinkError, f"{_LOGIN}the user is locked or disabled; run: DESC USER .."),
    390144: (
        SinkError,
        f"{_LOGIN}the key pair does not fit; compare RSA_PUBLIC_KEY_FP of DESC USER .. with the "
        "private key, and the clock of this machine",
    ),
    390189: (SinkError, f"{_LOGIN}the role was not granted; run: GRANT ROLE .. TO USER .."),
    390201: (SinkError, f"{_LOGIN}database, schema, role or warehouse is missing or hidden"),
    390303: (SinkError, f"{_LOGIN}the access token is not valid; get a new one"),
    390318: (SinkError, f"{_LOGIN}the access token has expired; get a new one"),
    390422: (SinkError, f"{_LOGIN}a network policy does not let this address in"),
}


class SnowflakeSink(SqlSink):
    """
    A schema of a Snowflake database.

    ``snowflake://user:password@account/database/schema?warehouse=..&role=..``, or
    ``snowflake:///database/schema?connection_name=..``, which takes account and credentials from a
    profile of the connector's ``connections.toml``. What else follows ``?`` is the connector's own.

    Args:
        statement: ``update`` sets rows by UPDATE .. FROM, ``merge`` by MERGE, which means the same
            and costs about as much.
        statement_timeout: How long one statement may run, in seconds.
        connect_args: More for the connector, above all what must not stand in a URL, such as
            ``private_key_file``. Its ``session_parameters`` win over those of this sink.
    """

    indexed = False
    ddl_commits = True
    collating = ("text",)
    inline_rows = 100
    types: ClassVar[Mapping[str, str]] = {
        "text": "VARCHAR",
        "time": "TIMESTAMP_NTZ",
        "integer": "NUMBER(38, 0)",
        "float": "FLOAT",
        "boolean": "BOOLEAN",
    }

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        ledger_days: int = 90,
        add_missing_columns: bool = False,
        statement: str = "update",
        statement_timeout: int = 3_600,
        connect_args: Mapping[str, Any] | None = None,
    ) -> None:
        if statement not in ("update", "merge"):
            raise ConfigurationError(f"statement is {statement!r}; it is 'update' or 'merge'")
        if statement_timeout < 1:
            raise ConfigurationError(
                f"statement_timeout is {statement_timeout} seconds; it is at least 1"
            )
        self.merges = statement == "merge"
        if self.merges:
            self.inline_rows = 0  # no emulator runs a MERGE of rows that are JSON
        self._statement_timeout = statement_timeout
        self._connect_args = dict(connect_args or {})
        super().__init__(
            url,
            timeout=timeout,
            ledger_days=ledger_days,
            add_missing_columns=add_missing_columns,
        )
        del self._connect_args  # it may hold a key

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """What each session is told: https://docs.snowflake.com/en/sql-reference/parameters."""
        parameters = {
            "QUERY_TAG": "recognition",  # who ran it, in QUERY_HISTORY
            "TIMEZONE": "UTC",
            "TIMESTAMP_INPUT_FORMAT": "AUTO",
            # An account may have turned this on; then no name in quotes would be exact.
            "QUOTED_IDENTIFIERS_IGNORE_CASE": False,
            # No two staged rows mean one row of the table; if ever they do, nothing is written.
            "ERROR_ON_NONDETERMINISTIC_UPDATE": True,
            "ERROR_ON_NONDETERMINISTIC_MERGE": True,
            "LOCK_TIMEOUT": int(timeout),  # by default 12 hours
            "STATEMENT_TIMEOUT_IN_SECONDS": self._statement_timeout,  # by default 2 days
            # A worker that died does not go on.
            "ABORT_DETACHED_QUERY": True,
            **self._connect_args.get("session_parameters", {}),
        }
        try:
            parsed = make_url(url)
            named = "connection_name" in {*parsed.query, *self._connect_args}
            if not named and "/" not in (parsed.database or "").strip("/"):
                raise ConfigurationError(f"the URL names no database and schema; it is {_URL}")
            engine = sa.create_engine(
                parsed,
                hide_parameters=True,
                connect_args={**self._connect_args, "session_parameters": parameters},
            )
        except (sa.exc.ArgumentError, ValueError) as exc:
            # What SQLAlchemy says is not shown: it may hold the password.
            raise ConfigurationError(
                f"a Snowflake URL is {_URL}; a key, the file of a token, the host and the protocol "
                "are given as connect_args, or in a profile of connections.toml that the URL "
                "names: snowflake:///database/schema?connection_name=NAME"
            ) from exc
        sa.event.listen(engine, "handle_error", _note_lost_connection)
        return engine

    def exists(self) -> bool:
        """Connecting makes none; one that is missing is an error."""
        return True

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """
        By questions to INFORMATION_SCHEMA, not by reflection, which reads the whole schema.

        A name means the one that is spelled so in any case. Where there are several, it means the
        one with capitals that is spelled exactly so, and otherwise none.
        """
        if len(parts) > 3:
            return None
        catalogue = "information_schema"
        if len(parts) == 3:
            databases = connection.exec_driver_sql(
                "SELECT database_name FROM information_schema.databases"
                " WHERE upper(database_name) = upper(%s)",
                (parts[0],),
            )
            found = _choose(parts[:1], [(name,) for (name,) in databases])
            if len(found) != 1:
                return _several(parts, found)
            catalogue = f"{self._quote(quoted_name(found[0][0], True))}.{catalogue}"
        within = "upper(table_schema) = upper(%s)"
        if len(parts) == 1:
            within = "table_schema = current_schema()"
        tables = connection.exec_driver_sql(
            "SELECT table_catalog, table_schema, table_name, table_type"
            f" FROM {catalogue}.tables"
            f" WHERE {within} AND upper(table_name) = upper(%s)",
            tuple(parts[-2:]),
        )
        kinds: dict[tuple[str, ...], str] = {tuple(names): kind for *names, kind in tables}
        found = _choose(parts[-2:], [*kinds])
        if len(found) != 1:
            return _several(parts, found)
        ((database, schema, table),) = found
        rows = connection.exec_driver_sql(
            "SELECT column_name, data_type, is_nullable, character_maximum_length,"
            f" numeric_precision, numeric_scale FROM {catalogue}.columns"
            " WHERE table_schema = %s AND table_name = %s ORDER BY ordinal_position",
            (schema, table),
        )
        columns: dict[str, Column] = {}
        spelled: defaultdict[str, list[str]] = defaultdict(list)
        for name, declared, nullable, *limits in rows:
            column = _describe(self._spell(name), declared, nullable == "YES", *limits)
            columns[name.lower()] = column
            spelled[name.lower()].append(repr(name))
        holders = (quoted_name(database, True), quoted_name(schema, True))
        return _Target(
            parts=(*holders[3 - len(parts) :], self._spell(table)),
            columns=columns,
            # INFORMATION_SCHEMA does not tell which columns have a collation.
            collated=True,
            view=kinds[found[0]] != "BASE TABLE",
            noted=f"{database}.{schema}.{table}",
            ambiguous={n: " and ".join(each) for n, each in spelled.items() if len(each) > 1},
        )

    def noted_name(self, target: Target) -> str:
        """The ledger is one for all schemas and databases, which may have tables of one name."""
        return target.noted if isinstance(target, _Target) else super().noted_name(target)

    def create_ledger(self, transaction: Transaction) -> None:
        """IF NOT EXISTS alone would ask for the privilege even where there is one."""
        transaction.statements += 1
        found = transaction.connection.exec_driver_sql(
            "SELECT table_name FROM information_schema.tables"
            " WHERE table_schema = current_schema() AND table_name = %s",
            (LEDGER.name.upper(),),
        )
        if found.first() is None:
            super().create_ledger(transaction)

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the URL's schema."""
        rows = connection.exec_driver_sql(
            "SELECT table_name FROM information_schema.tables"
            " WHERE table_schema = current_schema() AND table_type = 'BASE TABLE'"
        )
        return [self._spell(name) for (name,) in rows]

    def assume(self, kind: str, name: str) -> Column:
        """As `load` makes it."""
        declared = {"text": "TEXT", "integer": "NUMBER"}.get(kind, self.types[kind])
        return _describe(name, declared, True, None, 38, 0)

    def refuse_time(self, column: Column) -> str | None:
        """Numbers have no unit that the database could know."""
        if column.kind in ("time", "text"):
            return None
        return f"it is {column.declared}; a time column is a TIMESTAMP, a DATE or a text"

    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """The type whose comparison with the column loses nothing."""
        return _OfSnowflake(_time_type(like))

    def inline(
        self,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> sa.FromClause:
        """
        All rows as one JSON text.

        https://docs.snowflake.com/en/sql-reference/functions/flatten: a member that an object does
        not have is NULL.
        """
        selected = ", ".join(f"{_read_member(c)} AS {self._quote(c.name)}" for c in columns)
        table = Inline(
            sa.literal_column(f"(SELECT {selected} FROM TABLE(FLATTEN(INPUT => PARSE_JSON("),
            sa.literal(render_json(columns, _store(columns, lists)), sa.String()),
            sa.literal_column("))))"),
        )
        return table.table_valued(*(column.name for column in columns), name=name)

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """
        In pages, each of which the connector sends as one INSERT of many lines.

        Files that are PUT and copied would serve larger windows; no emulator runs these through
        this connector, so that it could not be shown that they work.
        """
        given = _store(columns, lists)
        marks = ", ".join(["%s"] * len(columns))
        for page in _pages(zip(*given, strict=True)):
            transaction.execute_text(f"INSERT INTO {name} VALUES ({marks})", page)

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Bytes have no collation: https://docs.snowflake.com/en/sql-reference/collation."""
        return sa.func.to_binary(expression, sa.literal_column("'UTF-8'"))

    def lies_within(
        self,
        like: Column,
        time: sa.ColumnElement[Any],
        interval: Interval,
        open_ended: bool,
    ) -> sa.ColumnElement[bool]:
        """A text that is no time is in no interval."""
        if like.kind == "text":
            time = sa.try_cast(time, _OfSnowflake("TIMESTAMP_TZ"))
        return self.inside(time, interval.start, interval.end, open_ended)

    def bounded(
        self, like: Column, time: sa.ColumnElement[Any], bound: Bound
    ) -> Sequence[sa.ColumnElement[bool]]:
        """Micro-partitions whose times lie outside are skipped; those of texts are not known."""
        if like.kind == "text":
            return ()
        where: list[sa.ColumnElement[bool]] = []
        if bound.lower is not None:
            where.append(time >= _constant(like, bound.lower))
        if bound.upper is not None:
            where.append(time < _constant(like, bound.upper))
        return where

    def translate(self, error: BaseException | None) -> SinkError:
        """By Snowflake's code, never by the text."""
        code = _code(error)
        state = getattr(error, "sqlstate", None) or "no state"
        shown = f"{code:06d}, {state}"
        if code in _NO_ANSWER:
            return SinkUnavailableError(
                f"Snowflake does not answer ({shown}); nothing was committed"
            )
        if code in _BUSY:
            return SinkUnavailableError(
                f"the table is locked by others, for more than {self._timeout:g} seconds or by too "
                f"many ({shown}); all was rolled back"
            )
        if code in _NO_SESSION:
            return SinkUnavailableError(
                f"the session has ended, or could not begin ({shown}); nothing was committed"
            )
        if code in (604, 630):
            return SinkError(
                f"a statement was ended after statement_timeout, {self._statement_timeout} "
                f"seconds, or by somebody ({shown}); all was rolled back"
            )
        if code in _SAID:
            kind, text = _SAID[code]
            return kind(f"{text} ({shown}); nothing was written")
        if state[:2] in ("22", "23"):
            return TableError(f"a table refused the rows ({shown}); all was rolled back")
        return SinkError(f"Snowflake refused a statement ({shown}); all was rolled back")

    def _spell(self, name: str) -> str:
        """A catalogue's name as SQLAlchemy wants it: in lower case where it needs no quotes."""
        return self._engine.dialect.normalize_name(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(Target):
    """
    A table whose schema is named exactly, whatever its case.

    Args:
        noted: Its name with schema and database, however it was asked for.
    """

    noted: str

    def clause(self) -> sa.TableClause:
        names: list[sa.ColumnClause[Any]] = [sa.column(c.name) for c in self.columns.values()]
        schema = quoted_name(".".join(self.parts[:-1]), True) if len(self.parts) > 1 else None
        return sa.table(self.parts[-1], *names, schema=schema)


class _OfSnowflake(sa.types.UserDefinedType[Any]):
    """A type by the name that Snowflake gives it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """As it is written in a cast."""
        return self.name


def _note_lost_connection(context: sa.engine.ExceptionContext) -> None:
    """One that does not answer is not asked to roll back, nor kept for the next who asks."""
    if _code(context.original_exception) in _NO_ANSWER:
        context.is_disconnect = True


def _code(error: BaseException | None) -> int:
    """What Snowflake or the connector calls the error; -1 where it has no name."""
    code = getattr(error, "errno", None)
    return code if isinstance(code, int) else -1


def _choose(asked: Sequence[str], found: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """Those that are meant; see `SnowflakeSink.find_table`."""
    spelled = [names for names in found if names[-len(asked) :] == tuple(asked)]
    return spelled if spelled and any(name != name.lower() for name in asked) else found


def _several(parts: Sequence[str], found: Sequence[tuple[str, ...]]) -> Target | None:
    """Nothing, or what cannot be told apart."""
    if not found:
        return None
    shown = " and ".join(repr(".".join(names)) for names in sorted(found))
    return Target(parts=tuple(parts), columns={}, ambiguous={"": shown})


def _describe(
    name: str,
    declared: str,
    nullable: bool,
    width: int | None,
    precision: int | None,
    scale: int | None,
) -> Column:
    """By https://docs.snowflake.com/en/sql-reference/intro-summary-data-types."""
    kind = "other"
    high: float | None = None
    if declared == "TEXT":
        kind, declared = "text", "VARCHAR" if width is None else f"VARCHAR({width})"
    elif declared == "NUMBER" and precision is not None:
        scale = scale or 0
        kind = "float" if scale else "integer"
        high = (10**precision - 1) / 10**scale if scale else 10**precision - 1
        declared = f"NUMBER({precision}, {scale})"
    elif declared == "FLOAT":
        kind, high = "float", sys.float_info.max
    elif declared == "BOOLEAN":
        kind = "boolean"
    elif declared == "DATE" or declared.startswith("TIMESTAMP"):
        kind = "time"
    return Column(
        name=name,
        declared=declared,
        kind=kind,
        nullable=nullable,
        width=width if kind == "text" else None,
        low=None if high is None else -high,
        high=high,
    )


def _time_type(like: Column | None) -> str:
    """Zoned types are compared as moments, the others as they stand, which is UTC."""
    declared = "TIMESTAMP_TZ" if like is None or like.kind == "text" else like.declared
    return "TIMESTAMP_NTZ" if declared == "DATE" else declared


def _read_member(column: StageColumn) -> str:
    """What reads a column from an object: as a text first where a text becomes a time."""
    member = f"value['{column.name}']"
    if column.kind == "time":
        return f"{member}::VARCHAR::{_time_type(column.like)}"
    if column.like is not None:
        return f"{member}::{column.like.declared}"
    return f"{member}::{'BIGINT' if column.kind == 'integer' else 'VARCHAR'}"


def _store(columns: Sequence[StageColumn], lists: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The values as Snowflake reads them."""
    return [
        [_show_time(column.like, time) for time in values] if column.kind == "time" else values
        for column, values in zip(columns, lists, strict=True)
    ]


def _show_time(like: Column | None, microseconds: int | None) -> str | None:
    """https://docs.snowflake.com/en/sql-reference/date-time-input-output: ISO, with its offset."""
    if microseconds is None:
        return None
    moment = _EPOCH + timedelta(microseconds=microseconds)
    if _time_type(like) == "TIMESTAMP_NTZ":
        moment = moment.replace(tzinfo=None)
    return moment.isoformat(timespec="microseconds")


def _constant(like: Column, microseconds: int) -> sa.ColumnElement[Any]:
    """A bound in the column's own type, so that no value of the column has to be converted."""
    if like.declared == "DATE":
        # A date is its midnight: on the one or the other side of the next midnight.
        days = -(-microseconds // _DAY)
        return sa.cast(sa.literal(_show_date(days), sa.String()), _OfSnowflake("DATE"))
    moment = sa.literal(_show_time(like, microseconds), sa.String())
    return sa.cast(moment, _OfSnowflake(_time_type(like)))


def _show_date(days: int) -> str:
    return (_EPOCH + timedelta(days=days)).date().isoformat()


def _pages(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """Rows in their order, so many that a statement of them is within Snowflake's limits."""
    page: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        added = len("()") + sum(map(_size, row))
        if page and (size + added > _PAGE_BYTES or len(page) == _PAGE_ROWS):
            yield page
            page, size = [], 0
        page.append(row)
        size += added
    if page:
        yield page


def _size(value: object) -> int:
    """How many bytes the connector makes of a value, with what stands between it and the next."""
    if value is None:
        return len("NULL, ")
    if not isinstance(value, str):
        return len(f"{value}, ")
    escaped = sum(map(value.count, "\\'\n\r"))
    return len("'', ") + escaped + (len(value) if value.isascii() else len(value.encode()))


compiles(sa.TryCast, "snowflake")(render_try_cast)
