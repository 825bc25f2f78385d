"""
Warehouses whose one statement is MERGE and whose rows travel as one text: BigQuery and Databricks.

Both take a few hundred or a few thousand parameters in a statement, of scalar types. The rows of a
step are therefore one parameter, a JSON array of arrays of texts, which the statement takes apart
again and gives the types of the target. So the text of a statement does not depend on how many
visitors there are, and up to `inline_rows` need no stage at all. More of them fill one, in pages.

Neither takes a subquery that looks at both sides in the ``ON`` of a MERGE
(https://docs.databricks.com/error-messages/error-classes.html, DELTA_UNSUPPORTED_SUBQUERY;
https://cloud.google.com/bigquery/docs/reference/standard-sql/dml-syntax#merge_statement). Where the
ledger knows messages that are to be spared, the source of the MERGE carries them in an array beside
each of its rows, and ``ON`` looks into that.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import sqlalchemy as sa

from recognition.planner import Bound, Step
from recognition.sinks.rows import Column, Spared
from recognition.sinks.sql import (
    LEDGER,
    Interval,
    Merge,
    SqlSink,
    StageColumn,
    Target,
    Transaction,
    sort_notes,
)

_DAY = 86_400 * 1_000_000


class MergingSink(SqlSink):
    """Sets rows by MERGE, from one parameter that holds them all; see the module."""

    merges = True
    indexed = False
    collating = ("text",)

    #: How many bytes of JSON one statement may carry.
    page_bytes: ClassVar[int]

    #: What makes a stage, up to its name.
    makes_stage: ClassVar[str]

    #: The type of a whole number.
    integer: ClassVar[str]

    # What the two say differently ---------------------------------------------------------------

    @abstractmethod
    def unfold(self, columns: Sequence[tuple[str, str | None]]) -> str:
        """
        A SELECT of the rows that the parameter ``:lines`` holds.

        Args:
            columns: Name and type of each, in the order of the cells; ``None``: the text itself.
        """

    @abstractmethod
    def type_of(self, column: Column) -> str | None:
        """What its cells are cast to; ``None``: nothing, it holds texts."""

    @abstractmethod
    def time_type(self, like: Column) -> str:
        """The type of a staged end of an interval: compared with this column nothing is lost."""

    @abstractmethod
    def as_time(self, like: Column, time: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """The column as `time_type` says."""

    @abstractmethod
    def show_time(self, type_: str, microseconds: int) -> str:
        """How a time is written that is cast to this type."""

    @abstractmethod
    def gather(self, texts: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """All texts of a group as an array."""

    @abstractmethod
    def among(
        self, text: sa.ColumnElement[Any], texts: sa.ColumnElement[Any]
    ) -> sa.ColumnElement[bool]:
        """The text is one of the array; neither is NULL."""

    @abstractmethod
    def constant(self, type_: str, text: str) -> sa.ColumnElement[Any]:
        """A bound value of this type."""

    # Rows ---------------------------------------------------------------------------------------

    def inline(
        self,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> sa.FromClause:
        """As the one parameter of the statement."""
        return self._select(columns, [*self._lines(columns, lists)]).subquery(name)

    def _goes_inline(self, step: Step, target: Target) -> bool:
        """By bytes and not by characters: escaped, one character is up to 12 of them."""
        # The lines say twice what the rows say, at most: what must be equal is noted beside it.
        return (
            len(step.rows) <= self.inline_rows and len(json.dumps(step.rows)) <= self.page_bytes / 2
        )

    def stage_time(self, like: Column) -> sa.types.TypeEngine[Any]:
        """Stages are not made of a SELECT from the target, which is what this is for."""
        raise NotImplementedError

    def _make_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        target: Target,
        lists: Sequence[Sequence[Any]],
    ) -> None:
        transaction.stages.append(name)
        self.fill_stage(transaction, name, columns, lists)

    def fill_stage(
        self,
        transaction: Transaction,
        name: str,
        columns: Sequence[StageColumn],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """In pages of bounded size; the first one makes it."""
        quoted = self._quote(name)
        put = f"{self.makes_stage} {quoted} AS"
        for page in _pages(self._lines(columns, lists), self.page_bytes):
            rows = self._select(columns, page, put)
            transaction.execute(rows.element)
            put = f"INSERT INTO {quoted}"

    def _select(
        self, columns: Sequence[StageColumn], lines: Sequence[str], put: str = ""
    ) -> sa.TextualSelect:
        """The rows of these lines, typed; with ``put``, a statement that does something to them."""
        typed = [(column.name, self._cell_type(column)) for column in columns]
        text = sa.text(f"{put} {self.unfold(typed)}".lstrip())
        value = sa.bindparam("lines", f"[{','.join(lines)}]", sa.String())
        return text.bindparams(value).columns(*(sa.column(column.name) for column in columns))

    def _cell_type(self, column: StageColumn) -> str | None:
        if column.kind == "integer":
            return self.integer
        if column.like is None:
            return None
        if column.kind == "time" and not column.name.startswith("value_"):
            return self.time_type(column.like)
        return self.type_of(column.like)

    def _lines(
        self, columns: Sequence[StageColumn], lists: Sequence[Sequence[Any]]
    ) -> Iterator[str]:
        """Each row as a JSON array of texts, NULL as null."""
        cells = [
            [self._show(column, value) for value in values]
            for column, values in zip(columns, lists, strict=True)
        ]
        for row in zip(*cells, strict=True):
            # ASCII alone, so that a page has as many bytes as it has characters.
            yield json.dumps(row, separators=(",", ":"))

    def _show(self, column: StageColumn, value: Any) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if column.kind == "time":
            return self.show_time(self._cell_type(column) or "", value)
        if isinstance(value, bool):
            return "true" if value else "false"
        return repr(value)

    # Statements ---------------------------------------------------------------------------------

    def lies_within(
        self,
        like: Column,
        time: sa.ColumnElement[Any],
        interval: Interval,
        open_ended: bool,
    ) -> sa.ColumnElement[bool]:
        """A text that is no time is in no interval; a date is its midnight."""
        return self.inside(self.as_time(like, time), interval.start, interval.end, open_ended)

    def bounded(
        self, like: Column, time: sa.ColumnElement[Any], bound: Bound
    ) -> Sequence[sa.ColumnElement[bool]]:
        """In the column's own type, so that partitions and files outside are not read."""
        type_ = self.type_of(like)
        if type_ is None:
            return ()
        where: list[sa.ColumnElement[bool]] = []
        for end, limit in ((bound.lower, time.__ge__), (bound.upper, time.__lt__)):
            if end is not None:
                # A date is before or after an end as it is before or after the next midnight.
                end = -(-end // _DAY) * _DAY if type_ == "DATE" else end
                where.append(limit(self.constant(type_, self.show_time(type_, end))))
        return where

    def _set_rows(
        self,
        step: Step,
        target: Target,
        stage: sa.FromClause,
        spare: frozenset[Spared] = frozenset(),
    ) -> sa.Update | Merge:
        if spare:
            stage = self._with_spared(step, target, stage, sort_notes(spare))
        return super()._set_rows(step, target, stage, spare)

    def _with_spared(
        self, step: Step, target: Target, stage: sa.FromClause, notes: Sequence[Spared]
    ) -> sa.FromClause:
        """The stage, with the ids of the messages that are spared beside each row."""
        carried: list[sa.ColumnElement[Any]] = [*stage.c]
        joined: sa.FromClause = stage
        for place, note in enumerate(notes):
            again = self._again(stage)
            ids = (
                sa.select(again.c.position, self.gather(LEDGER.c.message_id).label("ids"))
                .select_from(
                    again.join(LEDGER, sa.and_(*self._noted_as(again, step, target, note)))
                )
                .group_by(again.c.position)
                .subquery(f"spared_{place}")
            )
            joined = joined.outerjoin(ids, ids.c.position == stage.c.position)
            carried.append(ids.c.ids.label(f"spared_{place}"))
        return sa.select(*carried).select_from(joined).subquery(_name(stage))

    @staticmethod
    def _again(stage: sa.FromClause) -> sa.FromClause:
        """The same rows under another name."""
        if isinstance(stage, sa.Subquery):
            select = stage.element
            assert isinstance(select, sa.TextualSelect)
            return select.subquery("noted")
        return stage.alias("noted")

    def _spare(
        self,
        table: sa.TableClause,
        stage: sa.FromClause,
        step: Step,
        target: Target,
        spare: Sequence[Spared],
    ) -> list[sa.ColumnElement[bool]]:
        where: list[sa.ColumnElement[bool]] = []
        for place, note in enumerate(spare):
            column = target.column(note.message_column)
            message, ids = table.c[column.name], stage.c[f"spared_{place}"]
            named = self.among(self.as_text(message, column), ids)
            where.append(sa.or_(message.is_(None), ids.is_(None), ~named))
        return where


def _name(stage: sa.FromClause) -> str:
    assert isinstance(stage, (sa.TableClause, sa.Subquery))
    return str(stage.name)


def _pages(lines: Iterator[str], most: int) -> Iterator[list[str]]:
    """In their order, so many that they are no longer than this; a longer one stands alone."""
    page: list[str] = []
    size = 0
    for line in lines:
        if page and size + len(line) > most:
            yield page
            page, size = [], 0
        page.append(line)
        size += len(line) + 1
    if page:
        yield page
