"""
MariaDB 10.6 or later and MySQL 8.0.17 or later, through PyMySQL.

How they differ: an UPDATE with a stage is a multi-table one
(https://mariadb.com/kb/en/update/), text is compared by a collation that may blur case, accents and
trailing blanks (https://dev.mysql.com/doc/refman/8.0/en/charset-binary-collations.html), every DDL
but that of temporary tables commits (https://dev.mysql.com/doc/refman/8.0/en/implicit-commit.html),
and MySQL takes a temporary table only once in a statement
(https://dev.mysql.com/doc/refman/8.0/en/temporary-table-problems.html).

Times: a ``DATETIME`` is taken to be UTC, a ``TIMESTAMP`` is a moment.

A session sets its own time zone, ``sql_mode``, collation and isolation, so that no default of the
server decides what is compared or written: a text that is too long is an error and never cut, and
a backslash means what the driver means by it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple, cast

import pymysql
import sqlalchemy as sa
from sqlalchemy.dialects.mysql import DATETIME
from sqlalchemy.engine import make_url

from recognition.errors import (
    ConfigurationError,
    MissingDependencyError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.events import parse_time
from recognition.planner import Bound, Step, Value
from recognition.sinks.rows import Column, greatest
from recognition.sinks.sql import (
    LEDGER,
    Inline,
    Interval,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
    render_json,
)

# In seconds, as long as a lease in `recognition.delivery`: where a worker stands still, or its
# machine is gone, in the middle of a transaction, the server ends the session, and another one goes
# on. It ends what is idle between transactions as well: the pool connects again then
# (https://dev.mysql.com/doc/refman/8.0/en/server-system-variables.html#sysvar_wait_timeout).
_IDLE = 60

_EPOCH = datetime(1970, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
_DAY = 86_400 * 1_000_000
# https://dev.mysql.com/doc/refman/8.0/en/datetime.html, in microseconds since 1970-01-01.
_FIRST_TIME = (datetime.min - _EPOCH) // _MICROSECOND
_LAST_TIME = (datetime.max - _EPOCH) // _MICROSECOND
_FIRST_TIMESTAMP, _LAST_TIMESTAMP = 1_000_000, 2**31 * 1_000_000 - 1

# https://dev.mysql.com/doc/refman/8.0/en/integer-types.html, in bits.
_BITS = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "bigint": 64}
_FLOATS = {"float": 3.4028234663852886e38, "double": sys.float_info.max}
_TEXTS = {"char", "varchar", "tinytext", "text", "mediumtext", "longtext"}

# How Python writes the character sets, where both agree on every character; of greek, hebrew,
# cp1256 and koi8u they do not. Of any other set only ASCII is known to arrive unchanged.
_CODECS = {
    "utf8mb4": "utf-8",
    "utf8mb3": "utf-8",
    "utf8": "utf-8",
    "ucs2": "utf-16-be",
    "utf16": "utf-16-be",
    "utf32": "utf-32-be",
    "latin1": "cp1252",  # its five holes are C1 controls in MySQL; here they are refused
    "latin2": "iso8859-2",
    "latin5": "iso8859-9",
    "latin7": "iso8859-13",
    "cp1250": "cp1250",
    "cp1251": "cp1251",
    "cp1257": "cp1257",
    "koi8r": "koi8-r",
}
_BASIC_PLANE = {"utf8mb3", "utf8", "ucs2"}  # no character beyond U+FFFF

# STRICT_ALL_TABLES refuses what would be cut or changed. NO_BACKSLASH_ESCAPES and ANSI_QUOTES are
# off, and so are NO_ZERO_DATE and NO_ZERO_IN_DATE: rows may hold such dates already.
# https://dev.mysql.com/doc/refman/8.0/en/sql-mode.html
_SESSION = "SET time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"

# These compare code point by code point and do not pad with blanks: the one of MariaDB, the one of
# MySQL. A table that `load` makes has it, and so has everything of ours.
_EXACT = ("utf8mb4_nopad_bin", "utf8mb4_0900_bin")
_NAMES = ("mysql", "mariadb")

# An INSERT that fills a stage stays below this many bytes, and below half of what the server takes:
# https://dev.mysql.com/doc/refman/8.0/en/packet-too-large.html
_PAGE_BYTES = 1_000_000

#: Characters of each text in the index of a stage; four of them are in any server's limit of 3,072
#: bytes (https://dev.mysql.com/doc/refman/8.0/en/innodb-limits.html).
_KEY = 191

# MariaDB's and MySQL's numbers: https://mariadb.com/kb/en/mariadb-error-code-reference/
_AWAY = {1040, 1047, 1053, 1129, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1226, 1317, 1927}
_AWAY |= {2002, 2003, 2006, 2013, 2055, 3169, 4031}
_READ_ONLY = {1036, 1290, 1792, 1836}
_NO_LOGIN = {1045, 1130, 1251, 1524, 1698, 1862, 2059, 3118}
_FULL = {1021, 1037, 1041, 1114}
_GONE = {1051, 1054, 1146}
_NOT_GRANTED = {1044, 1142, 1143, 1227}
_REFUSED_ROWS = {1048, 1062, 1216, 1217, 1264, 1265, 1292, 1364, 1366, 1369, 1406, 1442, 1451, 1452}
_REFUSED_ROWS |= {1644, 1690, 3819, 4025}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column(Column):
    """
    A column of MySQL.

    Args:
        charset, collation: Of a text.
        type: What a column that holds the same is declared as, character set and collation
            included.
        octets: The most bytes that a text may have.
        precision: The finest time that it holds, in microseconds; a date is 86,400 seconds.
        moment: It is a ``TIMESTAMP``.
        padded: It loses the blanks at the end of a text.
    """

    charset: str = ""
    collation: str = ""
    type: str = ""
    octets: int | None = None
    precision: int = 1
    moment: bool = False
    padded: bool = False

    @property
    def collated(self) -> bool:
        """Different texts may be equal."""
        return self.collation not in ("", *_EXACT)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target(Target):
    """
    A table of MySQL.

    Args:
        lasting: The engine that keeps it, where that has no transactions.
    """

    lasting: str = ""


class MysqlSink(SqlSink):
    """
    A database of a MariaDB or MySQL server, ``mysql+pymysql://user:password@host/database``.

    Several processes may write to it: for each table one of them at a time, the others wait up to
    ``timeout`` seconds.
    """

    indexed = True
    ledger_first = True
    collating = ("text",)
    inline_rows = 100
    types: ClassVar[Mapping[str, str]] = {
        "text": "LONGTEXT",
        "time": "DATETIME(6)",
        "integer": "BIGINT",
        "float": "DOUBLE",
        "boolean": "BOOLEAN",
    }
    holds: ClassVar[Mapping[str, tuple[type, ...]]] = {
        **SqlSink.holds,
        "boolean": (bool, int),  # a TINYINT(1) may be either
    }

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """What follows ``?`` is PyMySQL's, such as ``ssl_ca``."""
        try:
            parsed = make_url(url)
        except (sa.exc.ArgumentError, ValueError):  # its text may hold the password
            parsed = None
        if (
            parsed is None
            or parsed.drivername not in (f"{name}{x}" for name in _NAMES for x in ("", "+pymysql"))
            or not parsed.database
        ):
            raise ConfigurationError(
                "a URL of MySQL or MariaDB is mysql+pymysql://user:password@host:port/database"
            )
        self._account = f"'{parsed.username or ''}'"
        engine = sa.create_engine(
            # Which of the two servers it is, is seen when connected.
            parsed.set(drivername="mysql+pymysql"),
            hide_parameters=True,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",  # no locks on gaps, and each statement sees the last
            connect_args={
                "charset": "utf8mb4",
                "autocommit": False,
                "init_command": _SESSION,
                "program_name": "recognition",  # in performance_schema.session_connect_attrs
            },
        )
        sa.event.listen(engine, "do_connect", _connect)
        sa.event.listen(engine, "do_execute", _execute)
        sa.event.listen(engine, "connect", self._begin_session)
        return engine

    def _begin_session(self, connection: Any, record: Any) -> None:
        """Make what is left of a session that depends on no default of the server's."""
        seconds = max(1, math.ceil(self._timeout))
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT current_user(), @@max_allowed_packet, (SELECT max(collation_name)"
                " FROM information_schema.collations WHERE collation_name IN (%s, %s))",
                _EXACT,
            )
            account, packet, collation = cursor.fetchone()
            if collation is None:
                raise ConfigurationError(
                    "the server is older than MariaDB 10.6 and MySQL 8.0.17: it has none of the "
                    f"collations {' and '.join(_EXACT)}"
                )
            cursor.execute(
                "SET innodb_lock_wait_timeout = %s, lock_wait_timeout = %s, wait_timeout = %s,"
                " collation_connection = %s",
                (seconds, seconds, _IDLE, collation),
            )
        record.info["max_allowed_packet"] = packet
        self._collation = collation
        user, _, host = account.rpartition("@")
        self._account = f"'{user}'@'{host}'"

    def exists(self) -> bool:
        """The server says when there is none."""
        return True

    # Tables -------------------------------------------------------------------------------------

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """
        By the exact name, else by the one that differs in case alone.

        Servers on Linux tell names apart by case, unless they are told otherwise:
        https://dev.mysql.com/doc/refman/8.0/en/identifier-case-sensitivity.html
        """
        if len(parts) > 2:
            return None
        schema = parts[0] if len(parts) == 2 else self._engine.url.database
        # https://dev.mysql.com/doc/refman/8.0/en/information-schema-engines-table.html
        tables = (
            "SELECT t.table_name, t.table_type, CASE e.transactions WHEN 'NO' THEN e.engine END"
            " FROM information_schema.tables AS t"
            " LEFT JOIN information_schema.engines AS e ON e.engine = t.engine"
        )
        exact = connection.exec_driver_sql(
            f"{tables} WHERE t.table_schema = %s AND t.table_name = %s", (schema, parts[-1])
        )
        # The collation of these tables is not the one by which the server tells names apart.
        found = [row for row in exact if row[0] == parts[-1]]
        if not found:
            every = connection.exec_driver_sql(f"{tables} WHERE t.table_schema = %s", (schema,))
            found = [row for row in every if row[0].lower() == parts[-1].lower()]
        if len(found) > 1:
            several = " and ".join(sorted(repr(name) for name, *_ in found))
            return Target(parts=tuple(parts), columns={}, ambiguous={"": several})
        if not found:
            self._probe(connection, parts)
            return None
        ((name, kind, lasting),) = found
        columns = self._find_columns(connection, schema, name)
        return _Target(
            parts=(name,) if schema == self._engine.url.database else (parts[0], name),
            columns={column.name.lower(): column for column in columns},
            collated=any(column.collated for column in columns),
            view=kind not in ("BASE TABLE", "SYSTEM VERSIONED"),
            lasting=lasting or "",
        )

    def _probe(self, connection: sa.Connection, parts: Sequence[str]) -> None:
        """Raise where the user may not see the table: what is hidden, is not in the catalogue."""
        try:
            connection.execute(
                sa.select(sa.literal_column("1"))
                .select_from(sa.table(parts[-1], schema=".".join(parts[:-1]) or None))
                .where(sa.literal_column("1 = 0"))
            )
        except sa.exc.DBAPIError as exc:
            if _read_error(exc.orig)[0] in _NOT_GRANTED:
                raise

    def _find_columns(
        self, connection: sa.Connection, schema: str | None, name: str
    ) -> list[_Column]:
        rows = connection.exec_driver_sql(
            "SELECT table_name, column_name, data_type, column_type, is_nullable,"
            " character_maximum_length, character_octet_length, numeric_precision, numeric_scale,"
            " datetime_precision, character_set_name, collation_name, generation_expression"
            " FROM information_schema.columns WHERE table_schema = %s AND table_name = %s"
            " ORDER BY ordinal_position",
            (schema, name),
        )
        declared = [_Declared(*row[1:]) for row in rows if row[0] == name]
        checked: set[str] = set()
        if any(each.type == "longtext" for each in declared) and _is_mariadb(connection):
            # https://mariadb.com/kb/en/json/: a LONGTEXT with a check, called like its column.
            checks = connection.exec_driver_sql(
                "SELECT table_name, constraint_name FROM information_schema.check_constraints"
                " WHERE constraint_schema = %s AND table_name = %s AND check_clause LIKE %s",
                (schema, name, "json_valid(%"),
            )
            checked = {row[1].lower() for row in checks if row[0] == name}
        return [_describe(each, each.name.lower() in checked) for each in declared]

    def takes_name(self, name: str) -> bool:
        """https://dev.mysql.com/doc/refman/8.0/en/identifier-length.html: 64 characters."""
        return len(name) <= 64

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the URL's database that this user may see."""
        rows = connection.exec_driver_sql(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()"
        )
        return [row[0] for row in rows]

    def assume(self, kind: str, name: str) -> Column:
        """Texts compare exactly in a table that `load` makes."""
        return _Column(name=name, declared=self.types[kind], kind=kind)

    def declare(self, kind: str, indexed: bool) -> str:
        """
        Texts that compare exactly.

        An index takes 3,072 bytes of a key, which are 768 characters:
        https://dev.mysql.com/doc/refman/8.0/en/innodb-limits.html
        """
        if kind != "text":
            return self.types[kind]
        declared = "VARCHAR(768)" if indexed else self.types[kind]
        return f"{declared} CHARACTER SET utf8mb4 COLLATE {self._collation}"

    def refuse_time(self, column: Column) -> str | None:
        """Texts and numbers may hold times of any form, which no index or partition serves."""
        if column.kind == "time":
            return None
        return f"times are compared with a DATETIME, TIMESTAMP or DATE; it is {column.declared}"

    # The stage ----------------------------------------------------------------------------------

    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """To the microsecond, whatever the column itself keeps of a second."""
        return DATETIME(fsp=6)

    def _make_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """
        A temporary table of columns that are declared one by one.

        ``CREATE TABLE .. AS SELECT`` would clone NOT NULL and defaults too, and make a text of
        nothing a ``CHAR(0)``. The index is for a target without one: MariaDB by its defaults, as
        MySQL before 8.0.18, joins by no hash, and went through all of the stage for each row.
        """
        transaction.stages.append(name)
        parts = [f"{column.name} {self._stage_type(column)}" for column in columns]
        keys = [key for column in columns if (key := _to_key(column))]
        if keys:
            parts.append(f"INDEX ({', '.join(keys[:4])})")
        declared = ", ".join(parts)
        # A transaction that was rolled back has left it: DDL of temporary tables is no part of one.
        left = transaction.connection.info.setdefault("recognition_stages", set())
        if name in left:
            transaction.execute_text(f"DROP TEMPORARY TABLE IF EXISTS {name}")
        left.add(name)
        transaction.execute_text(f"CREATE TEMPORARY TABLE {name} ({declared}) ENGINE=InnoDB")
        self.fill_stage(transaction, name, columns, lists)

    def _stage_type(self, column: StageColumn) -> str:
        if column.kind == "integer":
            return "BIGINT"
        exact = f"CHARACTER SET utf8mb4 COLLATE {self._collation}"
        if column.like is None:
            # Ids and workspaces have 255 characters at most, see `recognition.messages`.
            return f"{'LONGTEXT' if column.name == 'extras' else 'VARCHAR(255)'} {exact}"
        like = column.like
        assert isinstance(like, _Column)
        if column.name.startswith("value_") and like.kind == "text":
            # All VARCHARs of a table share 65,535 bytes, a TEXT needs some 10 of them:
            # https://dev.mysql.com/doc/refman/8.0/en/column-count-limit.html
            return f"LONGTEXT CHARACTER SET {like.charset} COLLATE {like.collation}"
        if column.kind == "time" and not column.name.startswith("value_"):
            return "DATETIME(6)"
        return like.type

    def _goes_inline(self, step: Step, target: Target) -> bool:
        # MariaDB has no UUID within JSON_TABLE.
        named = (*step.shape.equals, *step.shape.columns)
        return super()._goes_inline(step, target) and all(
            target.column(name).kind != "uuid" for name in named
        )

    def inline(
        self,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> sa.FromClause:
        """
        All rows as one JSON text, so that the statement is the same for any number of them.

        https://dev.mysql.com/doc/refman/8.0/en/json-table-functions.html,
        https://mariadb.com/kb/en/json_table/: what an object has no member for is NULL.
        """
        rows = render_json(columns, _store(columns, lists))
        declared = ", ".join(
            f"{column.name} {self._stage_type(column)} PATH '$.{column.name}' ERROR ON ERROR"
            for column in columns
        )
        table = Inline(
            sa.literal_column("JSON_TABLE("),
            sa.literal(rows, sa.Text()),
            sa.literal_column(f", '$[*]' COLUMNS ({declared}))"),
        )
        return table.table_valued(*(column.name for column in columns), name=name)

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """By INSERTs of many rows, each below the size that the server takes at once."""
        stored = _store(columns, lists)
        marks = f"({', '.join(['%s'] * len(columns))})"
        most = min(_PAGE_BYTES, transaction.connection.info["max_allowed_packet"] // 2)
        page: list[Any] = []
        size = 0

        def send() -> None:
            rows = ", ".join([marks] * (len(page) // len(columns)))
            transaction.execute_text(f"INSERT INTO {name} VALUES {rows}", [tuple(page)])

        for row in zip(*stored, strict=True):
            # Any byte of a text may need a second one that escapes it.
            needed = sum(2 * len(v.encode()) + 4 if isinstance(v, str) else 28 for v in row)
            if page and size + needed > most:
                send()
                page, size = [], 0
            page.extend(row)
            size += needed
        if page:
            send()

    def _drop_stages(self, transaction: Transaction) -> None:
        if transaction.stages:
            # Without TEMPORARY it would commit: https://mariadb.com/kb/en/drop-table/
            transaction.execute_text(f"DROP TEMPORARY TABLE {', '.join(transaction.stages)}")
            transaction.connection.info["recognition_stages"].clear()

    # Locks --------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, transaction: Transaction, tables: Sequence[str]) -> Iterator[None]:
        """
        By locks of the server that have a name, and belong to the session.

        Two UPDATEs of overlapping windows would each lock rows in the order of its plan, and then
        wait for each other.
        https://dev.mysql.com/doc/refman/8.0/en/locking-functions.html#function_get-lock
        """
        connection = transaction.connection
        # In an order that is the same for everybody, however the tables are spelled.
        locks = {self._name_lock(table): table for table in tables}
        transaction.statements += len(locks) + 1
        try:
            for lock, table in sorted(locks.items()):
                taken = connection.exec_driver_sql(
                    "SELECT GET_LOCK(%s, %s)", (lock, self._timeout)
                ).scalar()
                if taken != 1:
                    raise SinkUnavailableError(
                        f"another sink has been writing to table {table!r} for more than "
                        f"{self._timeout:g} seconds; nothing was written, a retry may help"
                    )
            yield
        finally:
            # The end of the transaction does not release them, that of the session does.
            if not connection.invalidated:
                try:
                    connection.exec_driver_sql("DO RELEASE_ALL_LOCKS()")
                except sa.exc.DBAPIError:
                    connection.invalidate()  # what was committed stays so

    def _name_lock(self, table: str) -> str:
        """Of 64 characters at most."""
        database, _, name = table.rpartition(".")
        whole = f"{database or self._engine.url.database}.{name}".lower()
        return f"recognition-{blake2b(whole.encode(), digest_size=16).hexdigest()}"

    # The ledger ---------------------------------------------------------------------------------

    def create_ledger(self, transaction: Transaction) -> None:
        """Ids, workspaces and names have their limits; the other texts may be of any length."""
        transaction.statements += 1
        there = transaction.connection.exec_driver_sql(
            "SELECT 1 FROM information_schema.tables"
            " WHERE table_schema = DATABASE() AND table_name = %s",
            (LEDGER.name,),
        ).scalar()
        if there:  # CREATE .. IF NOT EXISTS asks for the privilege nevertheless
            return
        kinds = {"columns": "MEDIUMTEXT", "empty": "MEDIUMTEXT"}
        kinds |= dict.fromkeys(("key_value", "message_id", "extras"), "LONGTEXT")
        kinds |= dict.fromkeys(("update_id", "workspace", "table_name"), "VARCHAR(255)")
        kinds |= dict.fromkeys(("starts", "ends", "sequence", "applied_at"), "BIGINT")
        preparer = self._engine.dialect.identifier_preparer
        declared = [
            f"{preparer.format_column(column)} {kinds.get(column.name, 'VARCHAR(64)')}"
            f"{'' if column.nullable else ' NOT NULL'}"
            for column in LEDGER.columns
        ]
        declared.append("INDEX recognition_ledger_key (table_name, key_column, key_value(255))")
        declared.append("INDEX recognition_ledger_age (applied_at)")
        transaction.execute_text(
            f"CREATE TABLE IF NOT EXISTS {LEDGER.name} ({', '.join(declared)}) ENGINE=InnoDB"
            f" CHARACTER SET utf8mb4 COLLATE {self._collation}"
        )

    def noted_name(self, target: Target) -> str:
        """With its database, unless that is the ledger's own."""
        return ".".join(target.parts)

    # Statements ---------------------------------------------------------------------------------

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Bytes have no collation."""
        return sa.cast(expression, sa.LargeBinary())

    def as_text(self, expression: sa.ColumnElement[Any], column: Column) -> sa.ColumnElement[Any]:
        """In the character set and collation of the connection, which are the ledger's."""
        return sa.cast(expression, sa.Text())

    def lies_within(
        self,
        like: Column,
        time: sa.ColumnElement[Any],
        interval: Interval,
        open_ended: bool,
    ) -> sa.ColumnElement[bool]:
        """The session's time zone is UTC, so that a TIMESTAMP compares as such a DATETIME."""
        return self.inside(time, interval.start, interval.end, open_ended)

    def bounded(
        self, like: Column, time: sa.ColumnElement[Any], bound: Bound
    ) -> Sequence[sa.ColumnElement[bool]]:
        """Partitions whose times lie outside are skipped."""
        where: list[sa.ColumnElement[bool]] = []
        if bound.lower is not None and bound.lower > _FIRST_TIME:
            where.append(time >= _constant(bound.lower))
        if bound.upper is not None and bound.upper <= _LAST_TIME:
            where.append(time < _constant(bound.upper))
        return where

    # Values -------------------------------------------------------------------------------------

    def _refuse_shape(self, target: Target, step: Step) -> str | None:
        if isinstance(target, _Target) and target.lasting and not target.view:
            named = ".".join(map(self._quote, target.parts))
            return (
                f"table {step.table!r} is kept by {target.lasting}, which has no transactions; "
                f"run: ALTER TABLE {named} ENGINE=InnoDB"
            )
        return super()._refuse_shape(target, step)

    def _holds_all(self, column: Column, values: Sequence[Value]) -> bool:
        # One look at all texts together: most are short and ASCII.
        assert isinstance(column, _Column)
        return (
            super()._holds_all(column, values)
            and not column.padded
            and column.octets is None
            and all(map(str.isascii, cast(Sequence[str], values)))
        )

    def _refuse(self, column: Column, value: Value) -> str | None:
        reason = super()._refuse(column, value)
        if reason is not None or not isinstance(value, str):
            return reason
        assert isinstance(column, _Column)
        if column.kind == "time":
            return _refuse_time(column, value)
        if column.kind != "text":
            return None
        if column.padded and value.endswith(" "):
            return (
                f"a text that ends with a blank was found; it is {column.declared}, which cuts it"
            )
        length = _measure(column, value)
        if length is None:
            return (
                f"a text with characters was found that {column.charset} does not have; "
                f"it is {column.declared}"
            )
        if column.octets is not None and length > column.octets:
            return f"a text of {length} bytes was found; it is {column.declared}"
        return None

    # Errors -------------------------------------------------------------------------------------

    def translate(self, error: BaseException | None) -> SinkError:
        """By the number, never by the text; that is read for the names in a GRANT alone."""
        code, text = _read_error(error)
        if code == 1213:
            return SinkUnavailableError(
                "another transaction waited for this one's rows and this one for its (a deadlock); "
                "all was rolled back, a retry helps"
            )
        if code == 1205:
            return SinkUnavailableError(
                f"a lock of another transaction was in the way for more than {self._timeout:g} "
                "seconds; all was rolled back, a retry helps"
            )
        if code in _AWAY:
            return SinkUnavailableError(
                f"the server cannot be reached, or went away (error {code}); nothing was written, "
                "a retry may help"
            )
        if code in _FULL:
            return SinkUnavailableError(
                f"the server has no space left (error {code}); all was rolled back"
            )
        if code in _READ_ONLY:
            return SinkReadOnlyError(
                f"the server, database or table may only be read (error {code}); "
                "nothing was written"
            )
        if code in _NO_LOGIN:
            return SinkError(
                f"the server refused the login (error {code}): user, password, host or the way to "
                "log in; nothing was written"
            )
        if code in _NOT_GRANTED:
            return SinkError(
                f"the user may not do this; nothing was written; run: {self._grant(code, text)}"
            )
        if code == 1049:
            return SinkError("the server has no database of the URL's name; nothing was written")
        if code in _GONE:
            return TableError(f"a table or column is not there (error {code}); all was rolled back")
        if code in _REFUSED_ROWS:
            return TableError(
                f"a constraint, trigger or type of a table refused the rows (error {code}); "
                "all was rolled back"
            )
        if code == 1153:
            return SinkError(
                "a value is greater than the server's max_allowed_packet; all was rolled back"
            )
        if code == 1665:
            return SinkError(
                "the server logs statements, which READ COMMITTED cannot do; it needs "
                "binlog_format = ROW or MIXED; nothing was written"
            )
        return SinkError(f"the server refused a statement (error {code}); all was rolled back")

    def _grant(self, code: int, text: str) -> str:
        """The command that gives what was missing, as far as the server says what that is."""
        what = "SELECT, UPDATE, INSERT, DELETE, CREATE, CREATE TEMPORARY TABLES"
        database = (self._engine.url.database or "").replace("`", "``")
        where = f"`{database}`.*"
        found = re.match(r"([A-Z, ]+) command denied to user .* for (?:table|column) (.*)", text)
        if found is not None:
            what = found[1]
            if re.fullmatch(r"`[^`]+`\.`[^`]+`", found[2]):
                where = found[2]
        return f"GRANT {what} ON {where} TO {self._account}"


def _connect(_: object, __: object, arguments: Any, options: Any) -> Any:
    try:
        return pymysql.connect(*arguments, **options)
    except RuntimeError as exc:
        # What MySQL 8 asks of every user who comes without TLS; PyMySQL has no class for this.
        raise MissingDependencyError(
            "the server asks for a password in a way that needs the package 'cryptography', which "
            "is not installed; run: pip install cryptography; or connect by TLS (?ssl_ca=...)"
        ) from exc


def _execute(cursor: Any, statement: str, parameters: Any, _: object) -> bool:
    """So that the list of processes and the log of slow queries say who it is."""
    cursor.execute(f"{statement} /* recognition */", parameters)
    return True


def _to_key(column: StageColumn) -> str:
    """How the stage's index has it; empty: it is none of those by which rows are found."""
    like = column.like
    if like is None or not column.name.startswith("equal_") or like.kind == "other":
        return ""
    if like.kind != "text":
        return column.name
    return f"{column.name}({min(like.width or _KEY, _KEY)})"


def _is_mariadb(connection: sa.Connection) -> bool:
    return bool(getattr(connection.dialect, "is_mariadb", False))


class _Declared(NamedTuple):
    """A column as ``information_schema.columns`` has it."""

    name: str
    type: str
    declared: str
    nullable: str
    characters: int | None
    octets: int | None
    digits: int | None
    scale: int | None
    fraction: int | None
    charset: str | None
    collation: str | None
    generated: str | None


def _describe(found: _Declared, checked: bool) -> _Column:
    kind = "other"
    width: int | None = None
    octets: int | None = None
    low: float | None = None
    high: float | None = None
    precision = 1
    unsigned = found.declared.endswith((" unsigned", " unsigned zerofill"))
    type_ = found.declared
    if found.type in _TEXTS and not checked:
        kind = "text"
        type_ = f"{found.declared} CHARACTER SET {found.charset} COLLATE {found.collation}"
        if found.type in ("char", "varchar"):
            width = found.characters
        else:
            octets = found.octets
    elif found.declared in ("tinyint(1)", "bit(1)"):
        kind = "boolean"
        low, high = (-128, 127) if found.type == "tinyint" else (0, 1)
    elif found.type in _BITS:
        kind = "integer"
        bits = _BITS[found.type]
        low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    elif found.type == "decimal":
        kind = "float"
        scale = found.scale or 0
        high = greatest(found.digits or 0, scale)
        low = 0 if unsigned else -high
    elif found.type in _FLOATS:
        kind, high = "float", _FLOATS[found.type]
        low = 0 if unsigned else -high
    elif found.type == "uuid":
        kind = "uuid"
    elif found.type in ("datetime", "timestamp"):
        kind = "time"
        precision = 10 ** (6 - (found.fraction or 0))
        type_ = f"datetime({found.fraction or 0})"  # a TIMESTAMP would bring a default of its own
    elif found.type == "date":
        kind, precision = "time", _DAY
    return _Column(
        name=found.name,
        declared=found.declared,
        kind=kind,
        nullable=found.nullable == "YES",
        width=width,
        low=low,
        high=high,
        generated=bool(found.generated),
        charset=found.charset or "",
        collation=found.collation or "",
        type=type_,
        octets=octets,
        precision=precision,
        moment=found.type == "timestamp",
        padded=found.type == "char",
    )


def _measure(column: _Column, text: str) -> int | None:
    """How many bytes the text has in the column's character set; ``None``: it is not all there."""
    if column.charset in _BASIC_PLANE and text and max(text) > "\uffff":
        return None
    try:
        return len(text.encode(_CODECS.get(column.charset, "ascii")))
    except UnicodeEncodeError:
        return None


def _refuse_time(column: _Column, value: str) -> str | None:
    """It was found before that the text is a time."""
    time = parse_time(value)
    if time % column.precision:
        return f"a time was found that is finer than what it keeps; it is {column.declared}"
    if column.moment and not _FIRST_TIMESTAMP <= time <= _LAST_TIMESTAMP:
        return f"a time out of its range was found; it is {column.declared}"
    return None


@lru_cache(maxsize=65_536)  # the intervals of a window share many of their ends
def _show_time(microseconds: int | None) -> str | None:
    if microseconds is None:
        return None
    within = max(_FIRST_TIME, min(microseconds, _LAST_TIME))
    return (_EPOCH + within * _MICROSECOND).isoformat(sep=" ", timespec="microseconds")


def _store(columns: Sequence[StageColumn], lists: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """The values as the server reads them."""
    return [
        [*map(_show_time, values)] if column.kind == "time" else values
        for column, values in zip(columns, lists, strict=True)
    ]


def _constant(microseconds: int) -> sa.ColumnElement[Any]:
    return sa.cast(sa.literal(_show_time(microseconds), sa.Text()), DATETIME(fsp=6))


def _read_error(error: BaseException | None) -> tuple[int, str]:
    if isinstance(error, pymysql.err.InterfaceError):
        return 2006, ""  # the connection was closed before: PyMySQL has no number for that
    arguments = getattr(error, "args", ())
    if arguments and isinstance(arguments[0], int):
        return arguments[0], str(arguments[1]) if len(arguments) > 1 else ""
    return 0, ""
