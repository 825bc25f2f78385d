"""
Spark Structured Streaming: events come in micro-batches, rows go to Parquet files, updates follow.

    spark-submit examples/spark_foreach_batch.py EVENTS_FOLDER WORK_FOLDER

Each file of EVENTS_FOLDER holds events as NDJSON; Kafka's ``value`` would do as well. The driver
takes them to the graph: only identifiers, times and traits pass through it. ``docs/embed.md`` says
when partitions should do that instead.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recognition import (
    EventError,
    Graph,
    Recognizer,
    Rules,
    Supersede,
    TableRules,
    deliver,
    open_graph,
    parse_event,
)
from recognition.sinks.spark import SparkSink

RULES = Rules(default=TableRules(supersede=Supersede.VERSION))

COLUMNS = """
    message_id STRING, type STRING, event STRING, anonymous_id STRING, user_id STRING,
    timestamp BIGINT, context_traits_email STRING, recognition_version BIGINT
"""


def start_session() -> SparkSession:
    """A session for a small job; the catalog of a real one is Hive's or Glue's."""
    return (
        SparkSession.builder.appName("recognition")
        .config("spark.sql.session.timeZone", "UTC")
        .config("spark.sql.shuffle.partitions", 2)
        .config("spark.ui.enabled", False)
        .getOrCreate()
    )


def create_table(spark: SparkSession) -> None:
    """One partition for each day and micro-batch, so that a batch that comes again replaces it."""
    spark.sql(
        f"CREATE TABLE IF NOT EXISTS events ({COLUMNS}, day STRING, batch STRING)"
        " USING parquet PARTITIONED BY (day, batch)"
    )


def batch_taker(
    recognizer: Recognizer, graph: Graph, sink: SparkSink, rejects: str
) -> Callable[[DataFrame, int], None]:
    """What ``foreachBatch`` calls. The same batch again leaves the same rows."""

    def take(batch: DataFrame, batch_id: int) -> None:
        spark = batch.sparkSession
        events, rejected = [], []
        for line in batch.toLocalIterator():
            try:
                events.append(parse_event(json.loads(line.value)))
            except (ValueError, EventError) as error:
                rejected.append((line.value, str(error)))
        if rejected:
            frame = spark.createDataFrame(rejected, "value STRING, reason STRING")
            frame.write.mode("overwrite").json(f"{rejects}/batch={batch_id}")
        recognition = recognizer.process(events)
        # A message that is there twice has one row, the later one.
        rows = {r["message_id"]: r for r in recognizer.rows(recognition).get("events", [])}
        if rows:
            frame = spark.createDataFrame([*rows.values()], COLUMNS)
            day = F.date_format(F.timestamp_micros("timestamp"), "yyyy-MM-dd")
            sink.write("events", frame.withColumns({"day": day, "batch": F.lit(str(batch_id))}))
        recognizer.flushed(recognition.receipt)  # the rows are visible now
        deliver(graph, sink)

    return take


def main(events: str, work: str) -> None:
    """Take all files that are there, one in each micro-batch, and end."""
    spark = start_session()
    create_table(spark)
    graph = open_graph(f"sqlite:///{work}/graph.db")
    sink = SparkSink(spark, f"{work}/files")
    take = batch_taker(Recognizer(graph, RULES), graph, sink, f"{work}/rejects")
    query = (
        spark.readStream.option("maxFilesPerTrigger", 1)
        .text(events)
        .writeStream.foreachBatch(take)
        .option("checkpointLocation", f"{work}/checkpoint")
        .trigger(availableNow=True)
        .start()
    )
    query.awaitTermination()
    spark.table("events").orderBy("message_id").show()
    graph.close()
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
