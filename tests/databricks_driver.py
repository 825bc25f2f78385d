"""
A stand-in for a connection of Databricks' driver, for tests: its SQL runs on DuckDB.

What arrives is what the real dialect makes; `sqlglot` reads it as Databricks' SQL and writes it as
DuckDB's. Errors are of the real driver's classes, with Databricks' error classes in their texts.
What Databricks is known to refuse and DuckDB would take is refused here too: an UPDATE with a FROM,
a subquery in the ON of a MERGE, more parameters than the driver sends. There are no transactions.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import duckdb
import sqlglot
from databricks.sql import exc
from sqlglot import exp

MOST_PARAMETERS = 255  # what is reported

_COLUMNS = """
CREATE VIEW information.columns AS SELECT lower(table_schema) AS table_schema,
  lower(table_name) AS table_name, column_name, ordinal_position, is_nullable,
  coalesce((SELECT declared FROM information.declared AS d WHERE d.table_schema = c.table_schema
    AND d.table_name = c.table_name AND d.column_name = c.column_name),
  CASE data_type WHEN 'VARCHAR' THEN 'string' WHEN 'TIMESTAMP' THEN 'timestamp_ntz'
    WHEN 'TIMESTAMP WITH TIME ZONE' THEN 'timestamp' WHEN 'INTEGER' THEN 'int'
    WHEN 'VARCHAR[]' THEN 'array<string>' ELSE lower(data_type) END) AS full_data_type
FROM main.information_schema_columns AS c
"""


class Warehouse:
    """
    What the connections have in common: the tables, and what was sent.

    Args:
        statements: Text and parameters of each, in order.
    """

    def __init__(self) -> None:
        self.database = duckdb.connect()
        self.lock = threading.Lock()
        self.statements: list[tuple[str, Mapping[str, Any]]] = []
        self._faults: list[dict[str, Any]] = []
        run = self.database.execute
        run("SET TimeZone = 'UTC'")
        run("CREATE SCHEMA information")
        run(
            "CREATE TABLE information.declared (table_schema VARCHAR, table_name VARCHAR,"
            " column_name VARCHAR, declared VARCHAR)"
        )
        run(
            "CREATE VIEW main.information_schema_columns AS"
            " SELECT * FROM information_schema.columns"
        )
        run(_COLUMNS)
        run(
            "CREATE VIEW information.tables AS SELECT lower(table_schema) AS table_schema,"
            " lower(table_name) AS table_name, CASE table_type WHEN 'VIEW' THEN 'VIEW'"
            " ELSE 'MANAGED' END AS table_type FROM information_schema.tables"
        )

    def fail(self, **fault: Any) -> None:
        """
        Refuse statements that begin with a text from now on.

        Args:
            fault: ``begins``, ``error``; ``times`` (1), ``after``: it is carried out before, and
                ``let`` so many that are let pass.
        """
        self._faults.append({"times": 1, "after": False, "let": 0, **fault})

    def fault(self, what: str, *, after: bool) -> None:
        for fault in self._faults:
            if fault["after"] == after and what.startswith(fault["begins"]):
                fault["let"] -= 1
                if fault["let"] < 0 < fault["times"]:
                    fault["times"] -= 1
                    raise fault["error"]

    def heal(self) -> None:
        """No fault any more."""
        self._faults.clear()


class Connection:
    """One session."""

    def __init__(self, warehouse: Warehouse, schema: str) -> None:
        self.warehouse = warehouse
        self.schema = schema
        self.session = warehouse.database.cursor()
        self.session.execute("SET TimeZone = 'UTC'")
        self.session.execute(f"SET search_path = '{schema}'")

    def cursor(self) -> Cursor:
        return Cursor(self)

    def commit(self) -> None:
        """Each statement has committed."""

    rollback = commit

    def close(self) -> None:
        self.session.close()


class Cursor:
    """One statement at a time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.description: list[tuple[Any, ...]] | None = None
        self.rowcount = -1
        self.arraysize = 1_000
        self._rows: Iterator[tuple[Any, ...]] = iter(())

    def execute(self, statement: str, parameters: Mapping[str, Any] | None = None) -> Cursor:
        given = dict(parameters or {})
        warehouse = self._connection.warehouse
        warehouse.statements.append((statement, given))
        warehouse.fault(statement, after=False)
        if len(given) > MOST_PARAMETERS:
            raise exc.ServerOperationError("[TOO_MANY_PARAMETERS] refused")
        parsed = sqlglot.parse_one(statement, read="databricks")
        _look_at(parsed)
        counted = isinstance(parsed, (exp.Merge, exp.Update, exp.Insert, exp.Delete))
        text = _as_duckdb(parsed)
        try:
            # A statement is one commit here: of two only the second can fail.
            with warehouse.lock:
                done = self._connection.session.execute(text, given or None)
                rows = done.fetchall()
        except duckdb.TransactionException as error:
            raise exc.ServerOperationError("[DELTA_CONCURRENT_APPEND] refused") from error
        except duckdb.CatalogException as error:
            raise exc.ServerOperationError(
                f"[TABLE_OR_VIEW_NOT_FOUND] {error} SQLSTATE: 42P01"
            ) from error
        except duckdb.Error as error:
            raise exc.ServerOperationError(f"[REFUSED_BY_DUCKDB] {error} in {text}") from error
        if isinstance(parsed, exp.Create):
            self._note(parsed)
        names = [name for name, *_ in done.description or ()]
        names = ["num_affected_rows"] if counted else names
        self.description = [(name, *[None] * 6) for name in names]
        self.rowcount = rows[0][0] if counted else -1
        self._rows = iter(rows)
        warehouse.fault(statement, after=True)
        return self

    def _note(self, parsed: exp.Create) -> None:
        """DuckDB forgets the width of a text."""
        if isinstance(parsed.this, exp.Schema):
            table = parsed.this.this
            for column in parsed.this.find_all(exp.ColumnDef):
                declared = column.args["kind"].sql("databricks").lower()
                self._connection.session.execute(
                    "INSERT INTO information.declared VALUES (?, ?, ?, ?)",
                    [table.db or self._connection.schema, table.name, column.name, declared],
                )

    def fetchone(self) -> tuple[Any, ...] | None:
        return next(self._rows, None)

    def fetchmany(self, size: int = 1_000) -> Sequence[tuple[Any, ...]]:
        return [row for row, _ in zip(self._rows, range(size), strict=False)]

    def fetchall(self) -> Sequence[tuple[Any, ...]]:
        return list(self._rows)

    def close(self) -> None:
        self._rows = iter(())


def _look_at(parsed: exp.Expr) -> None:
    if isinstance(parsed, exp.Merge) and parsed.args["on"].find(exp.Select):
        raise exc.ServerOperationError("[DELTA_UNSUPPORTED_SUBQUERY] in the MERGE condition")
    if isinstance(parsed, exp.Update) and parsed.args.get("from_"):
        raise exc.ServerOperationError("[PARSE_SYNTAX_ERROR] at or near 'FROM'")


def _as_duckdb(parsed: exp.Expr) -> str:
    for table in parsed.find_all(exp.Table):
        if table.db == "information_schema":
            table.set("db", exp.to_identifier("information"))
            table.set("catalog", None)
        elif table.catalog:
            table.set("catalog", None)
    for column in parsed.find_all(exp.Column):
        if column.args.get("catalog"):
            column.set("catalog", None)
    text = parsed.sql("duckdb")
    text = text.replace("'ARRAY<ARRAY<STRING>>'", "'[[\"VARCHAR\"]]'")
    return re.sub(r'\$"(\w+)"', r"$\1", text)
