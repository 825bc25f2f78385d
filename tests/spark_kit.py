"""The kit of sinks on Parquet files; `test_spark.py` runs it in Spark's environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

import spark_foreach_batch as example
from recognition.sinks.spark import SparkSink
from recognition.testing import SinkTests
from recognition.testing.sinks import ReadRows, Row, WriteRows

TYPES = {
    "text": "STRING",
    "time": "TIMESTAMP",
    "integer": "BIGINT",
    "float": "DOUBLE",
    "boolean": "BOOLEAN",
}


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """One session for all tests."""
    session = example.start_session()
    yield session
    session.stop()


class TestSparkSink(SinkTests):
    """Tables that are partitioned by day."""

    @pytest.fixture(autouse=True)
    def _names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Spark's own catalog takes letters, digits and _ only."""
        names = ("select", "group", "UPPER_case", "_1")
        monkeypatch.setattr("recognition.testing.sinks.HOSTILE_NAMES", names)

    @pytest.fixture
    def sink(self, spark: SparkSession, tmp_path: Path) -> SparkSink:
        """A sink on a catalog without tables."""
        for table in spark.catalog.listTables():
            spark.sql(f"DROP TABLE `{table.name}`")
        return SparkSink(spark, str(tmp_path))

    @pytest.fixture
    def write_rows(self, spark: SparkSession, tmp_path: Path) -> WriteRows:
        """Rows are appended by Spark itself, to where the catalog keeps tables."""
        schema = ", ".join(f"{name} {TYPES[kind]}" for name, kind in self.columns.items())

        def write(table: str, rows: Sequence[Row]) -> None:
            spark.sql(
                f"CREATE TABLE IF NOT EXISTS `{table}` ({schema}, day STRING) USING parquet"
                f" PARTITIONED BY (day) LOCATION '{tmp_path}/{table.lower()}'"
            )
            dated = [{**row, "day": str(row["timestamp"])[:10]} for row in rows]
            frame = spark.createDataFrame(dated, f"{schema}, day STRING")
            frame.coalesce(1).write.insertInto(table)

        return write

    @pytest.fixture
    def read_rows(self, spark: SparkSession) -> ReadRows:
        """By Spark itself; the partition's column is not one of the kit's."""

        def read(table: str) -> list[dict[str, object]]:
            return [row.asDict() for row in spark.table(f"`{table}`").drop("day").collect()]

        return read
