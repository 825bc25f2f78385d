"""
A Spark job of the tests: ``python spark_job.py EVENTS_FOLDER WORK_FOLDER``, in Spark's environment.

It runs the example's stream, in which another worker gets in between and the job dies once, and
then some windows on a table; it prints what it saw as JSON.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession

import spark_foreach_batch as example
from oracle import make_event
from recognition import Event, Receipt, Recognizer, deliver, open_graph, plan_updates
from recognition.sinks import Applied
from recognition.sinks.spark import SparkSink
from recognition.testing.sinks import between, device, row, unknown, update

#: The login of the other worker, after the visits of its device.
ELSEWHERE = {"message_id": "elsewhere", "time": 50_000_000, "anonymous_id": "tablet"}


def elsewhere() -> Event:
    return make_event(**ELSEWHERE, user_id="eve")  # type: ignore[arg-type]


class Dying(Recognizer):
    """Dies once, after the rows of its second batch are written and before it is done."""

    calls = 0

    def flushed(self, receipt: Receipt) -> int:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("the job dies")
        return super().flushed(receipt)


class Overtaken(SparkSink):
    """Another worker claims a device, and its updates are applied, before the first rows come."""

    graph: Any
    written: int = 0

    def write(self, table: str, frame: DataFrame) -> None:
        self.written += 1
        if self.written == 1:
            Recognizer(self.graph, example.RULES).process([elsewhere()])
            assert deliver(self.graph, self).updates > 0
        super().write(table, frame)


def stream(spark: SparkSession, events: str, work: str) -> dict[str, Any]:
    """The example's query; it is started again as often as it fails."""
    example.create_table(spark)
    sink = Overtaken(spark, f"{work}/files")
    ids, failures = [], []
    with closing(open_graph(f"sqlite:///{work}/graph.db")) as graph:
        sink.graph = graph
        take = example.batch_taker(Dying(graph, example.RULES), graph, sink, f"{work}/rejects")

        def watch(batch: DataFrame, batch_id: int) -> None:
            ids.append(batch_id)
            take(batch, batch_id)

        while True:
            query = (
                spark.readStream.option("maxFilesPerTrigger", 1)
                .text(events)
                .writeStream.foreachBatch(watch)
                .option("checkpointLocation", f"{work}/checkpoint")
                .trigger(availableNow=True)
                .start()
            )
            try:
                query.awaitTermination()
                break
            except StreamingQueryException as exc:
                failures.append(str(exc))
        rejected = spark.read.json(f"{work}/rejects").collect()
        return {
            "ids": ids,
            "failures": failures,
            "rows": [r.asDict() for r in spark.table("events").collect()],
            "rejected": [r.reason for r in rejected],
            "pending": graph.stats().pending_updates,
        }


def show(applied: Applied) -> dict[str, Any]:
    rejected = {key: f"{type(error).__name__}: {error}" for key, error in applied.rejected}
    return {
        "matched": applied.rows_matched,
        "changed": applied.rows_changed,
        "rejected": rejected,
    }


def windows(spark: SparkSession, work: str) -> dict[str, Any]:
    """Windows on a table of two days, in a bad order and twice."""
    schema = (
        "message_id STRING, anonymous_id STRING, user_id STRING, timestamp TIMESTAMP,"
        " recognition_version BIGINT, day STRING"
    )
    spark.sql(f"CREATE TABLE visits ({schema}) USING parquet PARTITIONED BY (day)")
    sink = SparkSink(spark, f"{work}/files")
    rows = [
        dict(row("m1", "a1", 0)),
        dict(row("m2", "a1", 10, user_id="known")),
        dict(row("m3", "a2", 20)),
        dict(row("m4", "a1", 86_400)),
    ]
    frame = spark.createDataFrame([{**r, "day": str(r["timestamp"])[:10]} for r in rows], schema)
    sink.write("visits", frame)

    def owner(sequence: int, user: str, start: float = -10, end: float = 100) -> Any:
        return update(
            sequence,
            {"user_id": user},
            device("a1"),
            between(start, end),
            unknown(),
            table="visits",
            versioned=True,
        )

    def locations() -> dict[str, str]:
        found = spark.sql("SELECT DISTINCT day, input_file_name() AS file FROM visits").collect()
        return {r.day: str(Path(r.file).parent) for r in found}

    before = locations()
    later = show(sink.apply(plan_updates([owner(7, "later")])))
    after = locations()
    earlier = show(sink.apply(plan_updates([owner(3, "earlier")])))
    again = show(sink.apply(plan_updates([owner(7, "later")])))
    both = show(sink.apply(plan_updates([owner(8, "x"), owner(9, "y", 86_000, 87_000)])))
    spark.sql(
        "CREATE TABLE plain (message_id STRING, day STRING) USING parquet PARTITIONED BY (day)"
    )
    refused = show(
        sink.apply(
            plan_updates(
                [
                    update(1, {"user_id": "u"}, device("a1"), table="plain", versioned=True),
                    update(1, {"user_id": "u"}, device("a1"), table="nowhere", versioned=True),
                    update(1, {"user_id": "u"}, device("a1"), table="visits"),
                    update(10, {"user_id": "z"}, device("a2"), table="visits", versioned=True),
                ]
            )
        )
    )
    (step,) = plan_updates([owner(11, "shown")]).steps
    return {
        "rewritten": [day for day in before if before[day] != after[day]],
        "later": later,
        "earlier": earlier,
        "again": again,
        "both": both,
        "refused": refused,
        "compiled": sink.compile(step),
        "users": {r.message_id: r.user_id for r in spark.table("visits").collect()},
    }


def main(events: str, work: str) -> None:
    spark = example.start_session()
    seen = {"stream": stream(spark, events, work), "windows": windows(spark, work)}
    spark.stop()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
