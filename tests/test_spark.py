"""Spark in local mode: the example's stream, and files that updates are applied to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oracle import Oracle, make_event
from recognition.events import Event
from test_end_to_end import to_segment

ROOT = Path(__file__).parents[1]
SPARK = Path(sys.prefix) / "spark"
DAY = 86_400

# As the test's events have seconds, those of the job's own are in microseconds.
ELSEWHERE = make_event("elsewhere", 50, "tablet", user_id="eve")


def _missing() -> str | None:
    if not (SPARK / "pyspark").is_dir():
        return f"there is no Spark at {SPARK}; run: make .venv/spark.stamp (`make test` does)"
    if shutil.which("java") is None:
        return "there is no java; Spark needs Java 17 or 21"
    return None


def run_spark(*command: str, timeout: float) -> str:
    """A Python process in Spark's environment; gives what it printed."""
    libraries = [ROOT / "src", ROOT / "examples", ROOT / "tests", SPARK, *SPARK.glob("lib/py4j-*")]
    submit = [
        *("--master", "local[2]"),
        *("--conf", "spark.driver.bindAddress=127.0.0.1"),
        *("--conf", "spark.driver.host=127.0.0.1"),
        *("--conf", "spark.ui.showConsoleProgress=false"),
        *("--conf", "spark.default.parallelism=1"),
        *("--conf", "spark.sql.codegen.wholeStage=false"),  # short jobs: do not compile them
        *("--driver-java-options", "'-XX:TieredStopAtLevel=1 -XX:+UseSerialGC'"),
        "pyspark-shell",
    ]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        check=False,  # below, with what it said
        text=True,
        timeout=timeout,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, libraries)),
            "SPARK_HOME": str(SPARK / "deps"),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "PYSPARK_SUBMIT_ARGS": " ".join(submit),
            "PYSPARK_PYTHON": sys.executable,
        },
    )
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-6_000:]
    return done.stdout


def events() -> list[list[Event]]:
    """Two files: a shared device over two days, a login that comes late, one from elsewhere."""
    return [
        [
            make_event("m1", 1, "kiosk"),
            make_event("m2", 10, "kiosk", user_id="ann"),
            make_event("m3", 20, "kiosk"),
            make_event("m4", 40, "tablet"),
            make_event("m5", DAY + 1, "phone"),
        ],
        [
            make_event("m6", DAY + 5, "kiosk", user_id="bob"),
            make_event("m7", DAY + 6, "kiosk"),
            make_event("m8", DAY + 9, "phone", email="cid@shop.example"),
            make_event("m9", 15, "kiosk", user_id="dan"),
        ],
    ]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `spark_job.py` saw; it runs once."""
    reason = _missing()
    if reason is not None:
        pytest.skip(f"{reason}; make test-spark runs these")
    work = tmp_path_factory.mktemp("spark")
    folder = work / "events"
    folder.mkdir()
    for number, batch in enumerate(events()):
        lines = [json.dumps(to_segment(event)) for event in batch]
        if number == 0:
            lines.append('{"type": "page"')
        file = folder / f"{number}.ndjson"
        file.write_text("\n".join(lines) + "\n")
        os.utime(file, (1_000_000_000 + number, 1_000_000_000 + number))  # the order of the stream
    answer = run_spark(str(ROOT / "tests" / "spark_job.py"), str(folder), str(work), timeout=900)
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


pytestmark = pytest.mark.timeout(1_000)


def test_the_rows_of_a_stream_are_those_of_the_oracle(seen: dict[str, Any]) -> None:
    """Stamps, updates, a worker that got in between, and a batch that came twice: all is there."""
    given = [event for batch in events() for event in batch]
    oracle = Oracle(
        policy="device_split",
        lookback=30 * DAY,
        own_column=False,
        events=[*given, ELSEWHERE],
    )
    rows = seen["stream"]["rows"]
    expected = oracle.owners()
    del expected["elsewhere"]

    assert len(rows) == len(given)
    assert {row["message_id"]: row["user_id"] for row in rows} == expected
    assert expected["m4"] == "eve"
    assert seen["stream"]["pending"] == 0


def test_a_batch_whose_job_died_comes_again(seen: dict[str, Any]) -> None:
    """The second batch was written, not finished, and taken again under the same id."""
    assert seen["stream"]["ids"] == [0, 1, 1]
    assert len(seen["stream"]["failures"]) == 1
    assert "the job dies" in seen["stream"]["failures"][0]


def test_what_is_no_event_is_kept(seen: dict[str, Any]) -> None:
    """A line that cannot be read stops nothing, and lies among the rejects with its reason."""
    assert len(seen["stream"]["rejected"]) == 1


def test_only_partitions_that_change_are_rewritten(seen: dict[str, Any]) -> None:
    """The files of another day stay where they are; so do all when nothing changes."""
    assert seen["windows"]["rewritten"] == ["2026-01-01"]
    assert seen["windows"]["later"] == {"matched": 1, "changed": 1, "rejected": {}}


def test_the_later_update_stands_and_twice_is_once(seen: dict[str, Any]) -> None:
    """An earlier update that comes after it changes nothing, nor does the same one again."""
    assert seen["windows"]["earlier"]["changed"] == 0
    assert seen["windows"]["again"] == {"matched": 1, "changed": 0, "rejected": {}}


def test_several_updates_and_days_in_one_window(seen: dict[str, Any]) -> None:
    """Each row gets what its own update says; rows of a known user stay."""
    assert seen["windows"]["both"]["changed"] == 2
    assert seen["windows"]["users"] == {"m1": "x", "m2": "known", "m3": "z", "m4": "y"}


def test_what_a_table_cannot_take_is_refused_and_the_rest_applied(seen: dict[str, Any]) -> None:
    """A missing table, a missing column, an update without a version: each with its reason."""
    refused = seen["windows"]["refused"]

    assert sorted(refused["rejected"]) == ["nowhere-1", "plain-1", "visits-1"]
    assert "no table" in refused["rejected"]["nowhere-1"]
    assert "recognition_version BIGINT" in refused["rejected"]["visits-1"]
    assert refused["changed"] == 1


def test_the_plan_is_shown_without_values(seen: dict[str, Any]) -> None:
    """`compile` gives Spark's plan of the join; no identifier stands in it."""
    assert "Join" in seen["windows"]["compiled"]
    assert "shown" not in seen["windows"]["compiled"]


@pytest.mark.skipif(
    "RECOGNITION_TEST_SPARK_KIT" not in os.environ,
    reason="some minutes of Spark jobs; RECOGNITION_TEST_SPARK_KIT=1 runs it",
)
def test_the_conformance_kit_of_sinks() -> None:
    """`SinkTests` on files: `spark_kit.py`, in Spark's environment."""
    answer = run_spark(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=900", "-W", "ignore"),
        str(ROOT / "tests" / "spark_kit.py"),
        timeout=3_600,
    )

    assert "failed" not in answer.splitlines()[-1]
