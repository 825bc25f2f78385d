"""
What PostgreSQL and Redshift have in common: a catalogue, types, and how times are compared.

Times: a ``timestamp`` or ``date`` is taken to be UTC, a ``timestamptz`` is a moment.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import TIMESTAMP

from recognition.planner import Bound
from recognition.sinks.rows import Column, greatest
from recognition.sinks.sql import Interval, SqlSink, Target

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
FIRST_TIME = (datetime.min.replace(tzinfo=UTC) - EPOCH) // MICROSECOND
LAST_TIME = (datetime.max.replace(tzinfo=UTC) - EPOCH) // MICROSECOND
_DAY = 86_400 * 1_000_000

# https://www.postgresql.org/docs/current/datatype-numeric.html,
# https://docs.aws.amazon.com/redshift/latest/dg/r_Numeric_types201.html
_BITS = {"int2": 16, "int4": 32, "int8": 64}
_FLOATS = {"float4": 3.4028234663852886e38, "float8": sys.float_info.max}
_TEXTS = {"text", "varchar", "bpchar", "citext"}
_TIMES = {"date", "timestamp", "timestamptz"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueColumn(Column):
    """
    A column of the catalogue.

    Args:
        type: The type's name in ``pg_type``.
        precision: The finest time that it holds, in microseconds; a date is 86,400 seconds.
    """

    type: str
    precision: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueTarget(Target):
    """A table of the catalogue, with the schema where it is."""

    schema: str


class Found(NamedTuple):
    """A table as the catalogue has it."""

    oid: int
    nspname: str
    relname: str
    relkind: str


class Held(NamedTuple):
    """What a column of a type holds; see `Column`."""

    kind: str
    width: int | None = None
    low: float | None = None
    high: float | None = None
    precision: int = 1
    scale: int | None = None


def read_type(type_: str, modifier: int, *, signed_scale: bool) -> Held:
    """
    What a type holds, by its name and its modifier in ``pg_attribute``.

    Args:
        type_: As ``pg_type`` has it.
        modifier: -1, or what the declaration adds: a width, a precision.
        signed_scale: The scale of a ``numeric`` has 11 bits and a sign, since PostgreSQL 15
            (https://www.postgresql.org/docs/current/catalog-pg-attribute.html).
    """
    if type_ in _TEXTS:
        return Held("text", width=modifier - 4 if modifier > 4 else None)
    if type_ in _BITS:
        most = 2 ** (_BITS[type_] - 1)
        return Held("integer", low=-most, high=most - 1)
    if type_ == "numeric":
        if modifier <= 4:
            return Held("decimal")
        digits, scale = (modifier - 4) >> 16, (modifier - 4) & 0xFFFF
        if signed_scale:
            scale = ((scale & 0x7FF) ^ 1024) - 1024
        high = greatest(digits, scale)
        return Held("decimal", low=-high, high=high, scale=scale)
    if type_ in _FLOATS:
        return Held("float", low=-_FLOATS[type_], high=_FLOATS[type_])
    if type_ in _TIMES:
        precision = _DAY if type_ == "date" else 10 ** (6 - (modifier if modifier >= 0 else 6))
        return Held("time", precision=precision)
    return Held({"bool": "boolean", "uuid": "uuid"}.get(type_, "other"))


def is_moment(like: Column) -> bool:
    """It is compared with moments, not with what a clock of UTC shows."""
    return cast(CatalogueColumn, like).type not in ("date", "timestamp")


def show_clock(like: Column, microseconds: int) -> datetime:
    """The time as such a column is compared with it."""
    moment = EPOCH + microseconds * MICROSECOND
    return moment if is_moment(like) else moment.replace(tzinfo=None)


class PostgresLikeSink(SqlSink):
    """A sink of a database that looks like PostgreSQL; a subclass is one of them."""

    def exists(self) -> bool:
        """The server says when there is none."""
        return True

    @abstractmethod
    def list_named(
        self, connection: sa.Connection, table: str, schema: str | None
    ) -> Sequence[Found]:
        """The tables and views of this name, in any case; those that need no schema without one."""

    @abstractmethod
    def list_columns(self, connection: sa.Connection, oid: int) -> Iterable[CatalogueColumn]:
        """The columns of a table."""

    @abstractmethod
    def make_target(
        self,
        found: Found,
        parts: tuple[str, ...],
        columns: Mapping[str, Column],
        ambiguous: Mapping[str, str],
    ) -> CatalogueTarget:
        """The table that was found, with its columns."""

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """
        By the exact name, else by the one that differs in case alone.

        Without a schema, the first of the ``search_path`` that has such a table is meant.
        """
        if len(parts) > 3:
            return None
        if len(parts) == 3:
            ((database,),) = connection.exec_driver_sql("SELECT current_database()")
            if database.lower() != parts[0].lower():
                return None
            parts = parts[1:]
        schema = parts[0] if len(parts) == 2 else None
        found = self.list_named(connection, parts[-1], schema)
        exact = [each for each in found if _name(each, parts) == tuple(parts)]
        found = exact or found
        if not found:
            return None
        if len(found) > 1:
            several = " and ".join(repr(".".join(_name(each, parts))) for each in found)
            return Target(parts=tuple(parts), columns={}, ambiguous={"": several})
        columns: dict[str, Column] = {}
        spelled: defaultdict[str, list[str]] = defaultdict(list)
        for column in self.list_columns(connection, found[0].oid):
            columns[column.name.lower()] = column
            spelled[column.name.lower()].append(repr(column.name))
        ambiguous = {n: " and ".join(each) for n, each in spelled.items() if len(each) > 1}
        return self.make_target(found[0], _name(found[0], parts), columns, ambiguous)

    def refuse_time(self, column: Column) -> str | None:
        """Texts and numbers may hold times of any form, which nothing that skips rows serves."""
        if column.kind == "time":
            return None
        return f"times are compared with a timestamptz, timestamp or date; it is {column.declared}"

    def keeps_days(self, column: Column) -> bool:
        """Whatever the name of a domain."""
        return cast(CatalogueColumn, column).precision == _DAY

    def noted_name(self, target: Target) -> str:
        """With its schema: two schemas may have tables of one name."""
        assert isinstance(target, CatalogueTarget)
        return f"{target.schema}.{target.parts[-1]}"

    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """A date is compared with a timestamp of the same clock."""
        return TIMESTAMP(timezone=is_moment(like))

    def lies_within(
        self,
        like: Column,
        time: sa.ColumnElement[Any],
        interval: Interval,
        open_ended: bool,
    ) -> sa.ColumnElement[bool]:
        """The stage has the column's clock."""
        return self.inside(time, interval.start, interval.end, open_ended)

    def bounded(
        self, like: Column, time: sa.ColumnElement[Any], bound: Bound
    ) -> Sequence[sa.ColumnElement[bool]]:
        """
        Of the column's own type: partitions, BRIN ranges and zone maps are skipped by such alone.

        https://www.postgresql.org/docs/current/brin.html,
        https://docs.aws.amazon.com/redshift/latest/dg/t_Sorting_data.html
        """
        kind = TIMESTAMP(timezone=is_moment(like))
        where: list[sa.ColumnElement[bool]] = []
        if bound.lower is not None and bound.lower > FIRST_TIME:
            where.append(time >= sa.literal(show_clock(like, bound.lower), kind))
        if bound.upper is not None and bound.upper <= LAST_TIME:
            where.append(time < sa.literal(show_clock(like, bound.upper), kind))
        return where


def _name(found: Found, parts: Sequence[str]) -> tuple[str, ...]:
    """As far as it was asked for: with its schema or without."""
    return (found.nspname, found.relname)[2 - len(parts) :]
