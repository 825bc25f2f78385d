"""
Parquet files in object storage, by a Spark job: a table of the session's catalog, of which an
update rewrites the partitions that it changes, and no others.

Files are never changed in place. The new ones of a partition go to a folder of their own, and then
the catalog is told where the partition is (``ALTER TABLE ... PARTITION ... SET LOCATION``,
https://spark.apache.org/docs/latest/sql-ref-syntax-ddl-alter-table.html). A reader sees a partition
as it was or as it is; a job that dies leaves files that nobody names. Overwriting partitions
(``partitionOverwriteMode=dynamic``) would delete first and rename then, which object storage does
not do in one step. There is no transaction over several partitions and no ledger: what was not
rewritten is rewritten when the update comes again, and ``recognition_version`` keeps the order.

One job at a time may write to a table: of two that rewrite a partition at once, one would undo the
other. For tables of Delta or Iceberg, which have transactions, use their ``MERGE``.
"""

from __future__ import annotations

import io
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from recognition.errors import (
    RecognitionError,
    SinkError,
    TableError,
    UnsupportedPolicyError,
    ValueRefusedError,
)
from recognition.messages import VERSION_COLUMN, to_text
from recognition.planner import Plan, Shape, StagedRow, Step
from recognition.sinks import Applied, AppliedStep, Capabilities

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What a column of this type can be set to or compared with; all become text in a column of text.
_HELD: Mapping[str, tuple[type, ...]] = {
    "string": (str, int, float, bool),
    "bigint": (int,),
    "double": (int, float),
    "boolean": (bool,),
}


class SparkSink:
    """
    Tables of Parquet files that are partitioned, in the catalog of a Spark session.

    Every table has a column ``recognition_version BIGINT``; of tables without it updates are
    refused. Times are ``TIMESTAMP``, or ``BIGINT`` in microseconds since 1970-01-01 UTC.

    Args:
        spark: The session, 3.4 or later. It stays open when this closes.
        folder: Where new files go: a path or URL that the session can write to.
        day: The partition column that holds the day of ``time`` in UTC, as ``YYYY-MM-DD``. Where a
            table has it, only the days that an update speaks of are read.
        time: The event's own time.
    """

    capabilities = Capabilities()

    def __init__(
        self, spark: SparkSession, folder: str, *, day: str = "day", time: str = "timestamp"
    ) -> None:
        self._spark = spark
        self._folder = folder.rstrip("/")
        self._day = day
        self._time = time

    def write(self, table: str, frame: DataFrame) -> None:
        """
        Put rows into a table; every partition that they have a row in holds nothing else then.

        So rows of a micro-batch, in a partition of its own, are there once however often it comes.

        Args:
            table: It is there, and partitioned.
            frame: All columns of the table, those of the partitions among them.

        Raises:
            SinkError: Partitions that are named by now are whole, the others as before.
        """
        with self._translated():
            columns = self._spark.table(_named(table)).columns
            self._publish(table, frame.select(*map(_quote, columns)), self._partitions_of(table))

    def compile(self, step: Step) -> str:
        """The plan of Spark by which ``apply()`` would compute the new rows, as `explain` shows."""
        shown = io.StringIO()
        with self._translated(), redirect_stdout(shown):
            self._set(self._read(step.table, [step]), step).explain(extended=True)
        return shown.getvalue()

    def apply(self, plan: Plan) -> Applied:
        """
        See `recognition.sinks.Sink`. All steps of a table are one job that counts, and, where rows
        change, a second one that writes; the staged rows are sent to every executor.

        Raises:
            SinkError: Partitions that were rewritten are whole, the others as before; applying the
                plan again does the rest.
        """
        rejected: dict[str, RecognitionError] = dict(plan.rejected)
        done: list[AppliedStep] = []
        jobs = 0
        with self._translated():
            # All of them first: of an update that is refused no other piece is applied either.
            for step in plan.steps:
                rejected.update(self._refuse(step))
            accepted: defaultdict[str, list[Step]] = defaultdict(list)
            for step in plan.steps:
                rows = tuple(row for row in step.rows if row.update_id not in rejected)
                if rows:
                    accepted[step.table].append(replace(step, rows=rows))
            for table, steps in accepted.items():
                started = time.perf_counter()
                matched, changed, ran = self._run(table, steps)
                jobs += ran
                done.append(
                    AppliedStep(
                        table=table,
                        rows_matched=matched,
                        rows_changed=changed,
                        seconds=time.perf_counter() - started,
                    )
                )
        return Applied(
            rows_matched=sum(step.rows_matched for step in done),
            rows_changed=sum(step.rows_changed for step in done),
            steps=tuple(done),
            rejected=tuple(rejected.items()),
            statements=jobs,
        )

    def close(self) -> None:
        """Nothing is held open; the session is the caller's."""

    # What is refused ----------------------------------------------------------------------------

    def _refuse(self, step: Step) -> dict[str, RecognitionError]:
        """The updates of a step that the table cannot take."""
        shape, table = step.shape, step.table
        if not self._spark.catalog.tableExists(_named(table)):
            return _all(step, TableError(f"the catalog has no table {table!r}"))
        types = self._types(table)
        partitions = self._partitions_of(table)
        if not partitions:
            return _all(step, TableError(f"table {table!r} is not partitioned"))
        wanted = {*shape.columns, *shape.equals, *shape.empty, *shape.times}
        missing = sorted(name for name in wanted if name.lower() not in types)
        if missing:
            return _all(step, TableError(f"table {table!r} has no column {', '.join(missing)}"))
        if not shape.versioned:
            return _all(
                step,
                UnsupportedPolicyError(
                    f"table {table!r}: only updates that set {VERSION_COLUMN} can be ordered here."
                    f" ALTER TABLE {table} ADD COLUMNS ({VERSION_COLUMN} BIGINT), and set supersede"
                    " = version"
                ),
            )
        for name in shape.columns:
            if name.lower() in (column.lower() for column in partitions):
                return _all(step, TableError(f"table {table!r} is partitioned by {name!r}"))
        for name in (*shape.columns, *shape.equals):
            if types[name.lower()] not in _HELD:
                found = types[name.lower()]
                return _all(step, TableError(f"table {table!r}, column {name!r}: it is {found}"))
        for name in shape.times:
            if types[name.lower()] not in ("timestamp", "bigint"):
                return _all(step, TableError(f"table {table!r}, column {name!r}: it is no time"))
        refused: dict[str, RecognitionError] = {}
        for row in step.rows:
            pairs = [*zip(shape.columns, row.values, strict=True)]
            pairs += zip(shape.equals, row.equals, strict=True)
            for name, value in pairs:
                kind = types[name.lower()]
                fits = value is None or type(value) in _HELD[kind]
                if fits and kind == "bigint" and isinstance(value, int):
                    fits = -(2**63) <= value < 2**63
                if not fits:
                    refused[row.update_id] = ValueRefusedError(
                        f"table {table!r}, column {name!r}: it is {kind}, which does not hold this"
                        f" value of type {type(value).__name__}"
                    )
        return refused

    # New rows -----------------------------------------------------------------------------------

    def _run(self, table: str, steps: Sequence[Step]) -> tuple[int, int, int]:
        """Apply the steps; gives rows matched, rows changed, and how many jobs ran."""
        from pyspark.sql import functions as F

        partitions = self._partitions_of(table)
        keys = [F.col(_quote(name)) for name in partitions]
        frame = self._read(table, steps)
        columns = frame.columns
        frame = frame.withColumns({_MATCHED: F.lit(0), _CHANGED: F.lit(False)})
        for step in steps:
            frame = self._set(frame, step)
        counts = (
            frame.groupBy(*keys).agg(F.sum(_MATCHED), F.sum(F.col(_CHANGED).cast("int"))).collect()
        )
        matched = sum(row[-2] for row in counts)
        touched = [row for row in counts if row[-1]]
        if not touched:
            return matched, 0, 1
        chosen = self._spark.createDataFrame(
            [tuple(row[:-2]) for row in touched], frame.select(*keys).schema
        )
        rewritten = frame.join(F.broadcast(chosen), partitions, "left_semi")
        self._publish(table, rewritten.select(*map(_quote, columns)), partitions)
        return matched, sum(row[-1] for row in touched), 2

    def _read(self, table: str, steps: Iterable[Step]) -> DataFrame:
        """The table, as far as the steps may speak of it: whole partitions."""
        from pyspark.sql import functions as F

        frame = self._spark.table(_named(table))
        bounds = [
            next((bound for bound in step.bounds if bound.column == self._time), None)
            for step in steps
        ]
        if self._day in self._partitions_of(table):
            lower = [bound.lower for bound in bounds if bound and bound.lower is not None]
            upper = [bound.upper for bound in bounds if bound and bound.upper is not None]
            if len(lower) == len(bounds):
                frame = frame.where(F.col(_quote(self._day)) >= _show_day(min(lower)))
            if len(upper) == len(bounds):
                frame = frame.where(F.col(_quote(self._day)) <= _show_day(max(upper) - 1))
        return frame

    def _set(self, frame: DataFrame, step: Step) -> DataFrame:
        """The rows after a step. No two staged rows of a step select the same row of the table."""
        from pyspark.sql import functions as F

        shape = step.shape
        types = {name.lower(): kind for name, kind in frame.dtypes}
        own = {name.lower(): name for name in frame.columns}

        def column(name: str) -> Column:
            return F.col(_quote(own[name.lower()]))

        def staged(name: str, place: int) -> Column:
            return F.col(f"{_STAGE}{name}_{place}")

        schema = ", ".join(
            [
                f"{_STAGE}sequence bigint",
                *(f"{_STAGE}equal_{n} {types[c.lower()]}" for n, c in enumerate(shape.equals)),
                *(
                    f"{_STAGE}start_{n} bigint, {_STAGE}end_{n} bigint"
                    for n in range(len(shape.times))
                ),
                *(f"{_STAGE}value_{n} {types[c.lower()]}" for n, c in enumerate(shape.columns)),
            ]
        )
        stage = self._spark.createDataFrame(
            [_stage_row(row, shape, types) for row in step.rows], schema
        )
        where = [column(name) == staged("equal", n) for n, name in enumerate(shape.equals)]
        where += [column(name).isNull() for name in shape.empty if name not in shape.columns]
        for place, name in enumerate(shape.times):
            moment = column(name)
            if types[name.lower()] == "timestamp":
                moment = F.unix_micros(moment)
            start, end = staged("start", place), staged("end", place)
            inside = (start.isNull() | (moment >= start)) & (end.isNull() | (moment < end))
            where.append(inside | (moment.isNull() & start.isNull()))
        version, sequence = column(VERSION_COLUMN), F.col(f"{_STAGE}sequence")
        written = [name for name in shape.columns if name != VERSION_COLUMN]
        empty = [name for name in shape.empty if name in shape.columns] or written
        unclaimed = reduce(and_, [column(name).isNull() for name in empty])
        takes = F.coalesce(
            sequence.isNotNull() & ((version.isNull() & unclaimed) | (version < sequence)),
            F.lit(False),
        )
        holds = takes | F.coalesce(version >= sequence, F.lit(False))
        joined = frame.join(F.broadcast(stage), reduce(and_, where), "left")
        new = {own[name.lower()]: staged("value", n) for n, name in enumerate(shape.columns)}
        found = []
        for name in frame.columns:
            kept = F.col(_quote(name))
            if name in new:
                kept = F.when(takes, new[name]).otherwise(kept).alias(name)
            elif name == _MATCHED:
                kept = (kept + holds.cast("int")).alias(name)
            elif name == _CHANGED:
                kept = (kept | takes).alias(name)
            found.append(kept)
        return joined.select(*found)

    # The catalog --------------------------------------------------------------------------------

    def _publish(self, table: str, frame: DataFrame, partitions: Sequence[str]) -> None:
        """Write whole partitions to a new folder, then tell the catalog of each."""
        folder = f"{self._folder}/{table}/{uuid4().hex}"
        frame.write.partitionBy(*partitions).parquet(folder)
        named = _named(table)
        written = self._spark.read.schema(frame.schema).parquet(folder)
        found = written.select(*map(_quote, partitions)).distinct().collect()
        # Of other values the names of the folders are made in another way.
        if not all(
            _PLAIN.fullmatch(str(value)) and value is not None for row in found for value in row
        ):
            raise TableError(
                f"table {table!r}: a partition's value is empty, or has other characters than"
                " letters, digits, _, - and the point; nothing was written"
            )
        for row in found:
            pairs = [*zip(partitions, row, strict=True)]
            partition = ", ".join(f"{_quote(name)} = {_literal(value)}" for name, value in pairs)
            location = _literal("/".join([folder, *(f"{name}={value}" for name, value in pairs)]))
            self._spark.sql(
                f"ALTER TABLE {named} ADD IF NOT EXISTS PARTITION ({partition}) LOCATION {location}"
            )
            self._spark.sql(f"ALTER TABLE {named} PARTITION ({partition}) SET LOCATION {location}")
        self._spark.catalog.refreshTable(named)

    def _partitions_of(self, table: str) -> list[str]:
        return [c.name for c in self._spark.catalog.listColumns(_named(table)) if c.isPartition]

    def _types(self, table: str) -> dict[str, str]:
        return {name.lower(): kind for name, kind in self._spark.table(_named(table)).dtypes}

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from py4j.protocol import Py4JError
        from pyspark.errors import AnalysisException, PySparkException

        try:
            yield
        except AnalysisException as exc:
            raise SinkError(f"Spark refused the plan ({exc.getCondition()})", written=None) from exc
        except (PySparkException, Py4JError) as exc:
            raise SinkError(
                f"Spark failed ({type(exc).__name__}). Partitions that were rewritten before are"
                " whole, the others as they were; do the same again.",
                written=None,
                retryable=True,
            ) from exc


_PLAIN = re.compile(r"[\w.-]+")
_STAGE = "recognition_stage_"
_MATCHED = "recognition_stage_matched"
_CHANGED = "recognition_stage_changed"


def _all(step: Step, error: RecognitionError) -> dict[str, RecognitionError]:
    return {row.update_id: error for row in step.rows}


def _stage_row(row: StagedRow, shape: Shape, types: Mapping[str, str]) -> tuple[Any, ...]:
    def held(name: str, value: Any) -> Any:
        if value is None:
            return None
        kind = types[name.lower()]
        return to_text(value) if kind == "string" else float(value) if kind == "double" else value

    return (
        row.sequence,
        *(held(name, value) for name, value in zip(shape.equals, row.equals, strict=True)),
        *(start for start, _ in row.intervals),
        *(end for _, end in row.intervals),
        *(held(name, value) for name, value in zip(shape.columns, row.values, strict=True)),
    )


def _quote(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _named(table: str) -> str:
    return ".".join(map(_quote, table.split(".")))


def _literal(value: object) -> str:
    """A text of Spark SQL, where no marker for a value can stand: a path or a partition's value."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _show_day(time: int) -> str:
    return (_EPOCH + timedelta(microseconds=time)).date().isoformat()
