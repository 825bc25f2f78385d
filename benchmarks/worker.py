"""
A worker at a steady rate: how long it takes from an identify to changed rows, and what it costs.

    python benchmarks/worker.py [--rate 1000] [--seconds 60] [--every 1.0] [--json]
        [--sinks sqlite,duckdb,postgresql,clickhouse]

Events of made-up visitors come at the rate, in batches of a tenth of a second, to a worker with a
SQLite graph and one destination for each sink. Their rows are in the tables from the start, so that
what is measured is the way of the updates: from the decision about the batch with the identify, in
the graph's transaction, to the end of the window that changed the rows (the sink had committed).
Lag is that, over all updates; the median and the 99th percentile per destination. Settling is off:
it would apply a second time what is there. The target for the 99th percentile is what an update
cannot do without, with one window in flight: the time that a window collects (``--every``) or that
the one before takes, whichever is longer, and its own; of both the 99th percentile. ClickHouse is
the embedded engine in a process of its own, behind HTTP.

Also: the backlog at the end, and the resident memory of the process after a quarter of the time
and at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from recognition.delivery import Deliverer, Destination
from recognition.demo import generate_events
from recognition.events import parse_event
from recognition.graph import open_graph
from recognition.planner import Plan, Step
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.sinks import Applied, Sink, open_sink
from recognition.worker import RawEvents, Worker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Steady:
    """A source that hands over so many events a second."""

    def __init__(self, events: list[dict[str, Any]], rate: int) -> None:
        self._events = events
        self._rate = rate
        self.late = 0.0

    def run(self, take: Callable[[RawEvents], None], stop: threading.Event) -> None:
        size = max(1, self._rate // 10)
        begin = time.monotonic()
        for number, start in enumerate(range(0, len(self._events), size)):
            due = begin + number * size / self._rate
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            take(self._events[start : start + size])
            self.late = max(self.late, time.monotonic() - due)


class Timed:
    """A sink, and how long it took for each window, in seconds."""

    def __init__(self, sink: Sink, times: list[float]) -> None:
        self._sink = sink
        self._times = times
        self.capabilities = sink.capabilities

    def compile(self, step: Step) -> str:
        return self._sink.compile(step)

    def apply(self, plan: Plan) -> Applied:
        begin = time.monotonic()
        applied = self._sink.apply(plan)
        self._times.append(time.monotonic() - begin)
        return applied

    def close(self) -> None:
        self._sink.close()


def memory() -> float:
    """Resident, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def fill(port: int, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The table of docs/clickhouse.md, and its rows, in a ClickHouse."""
    import clickhouse_connect

    with closing(
        clickhouse_connect.get_client(host="127.0.0.1", port=port, autogenerate_session_id=False)
    ) as client:
        declared = {name: f"`{name}` Nullable(String)" for name in columns}
        declared |= {
            "message_id": "message_id String",
            "anonymous_id": "anonymous_id String",
            "timestamp": "timestamp DateTime64(6, 'UTC')",
        }
        client.command(
            f"CREATE TABLE events ({', '.join(declared.values())}) ENGINE = MergeTree"
            " PARTITION BY toYYYYMM(timestamp)"
            " ORDER BY (toDate(timestamp), anonymous_id, message_id)"
            " SETTINGS enable_block_number_column = 1, enable_block_offset_column = 1"
        )
        lists = [[row.get(name) for name in declared] for row in rows]
        at, device = list(declared).index("timestamp"), list(declared).index("anonymous_id")
        for row in lists:
            row[at] = EPOCH + timedelta(microseconds=row[at])
            row[device] = row[device] or ""
        client.insert("events", lists, column_names=list(declared))
        [[count]] = client.query("SELECT count() FROM events").result_rows
        assert count == len(rows), f"{count} of {len(rows)} rows arrived"


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))] if values else 0.0


def run(rate: int, seconds: int, names: list[str], every: float, folder: Path) -> dict[str, Any]:
    bodies = list(generate_events(max(100, rate * seconds // 12), seed=1))[: rate * seconds]
    rules = Rules(stamps=False)
    events = [parse_event(body) for body in bodies]
    rows = [rules.layout.row_of(event, "events") for event in events]
    columns = dict.fromkeys([name for row in rows for name in row], "text")
    columns["timestamp"] = "time"
    lags: dict[str, list[float]] = {name: [] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        sinks = {}
        for name in names:
            url = f"{name}:///{folder}/warehouse.{name}"
            if name == "postgresql":
                from postgres import open_server

                server = stack.enter_context(open_server())
                url = server.url(stack.enter_context(server.database()))
            elif name == "clickhouse":
                from chdb_server import Server

                clickhouse = stack.enter_context(Server(folder / "chdb"))
                url = clickhouse.url("default")
                fill(clickhouse.port, rows, [*columns])
            sinks[name] = stack.enter_context(closing(open_sink(url)))
            if name != "clickhouse":
                sinks[name].load("events", rows, key="message_id", columns=columns)  # type: ignore[attr-defined]
        graph = stack.enter_context(closing(open_graph(f"sqlite:///{folder}/graph.db")))
        decided: dict[str, datetime] = {}
        emit = graph.lease_updates

        def lease(limit: int, length: float, destination: str = "") -> Any:
            found = emit(limit, length, destination)
            decided.update((item.update.id, item.update.created_at) for item in found)
            return found

        graph.lease_updates = lease  # type: ignore[method-assign]

        def note(name: str, plan: Plan, applied: Applied) -> None:
            now = datetime.now(UTC)
            lags[name] += [(now - decided[u]) / timedelta(seconds=1) for u in plan.updates]

        deliverer = Deliverer(
            graph,
            [
                Destination(name=name, sink=Timed(sink, times[name]), settle=0.0)
                for name, sink in sinks.items()
            ],
            every=every,
            watch=note,
        )
        source = Steady(bodies, rate)
        worker = Worker(Recognizer(graph, rules), [source], deliverer)
        begin, cpu = time.monotonic(), time.process_time()
        early = threading.Timer(seconds / 4, lambda: sizes.append(memory()))
        sizes: list[float] = []
        early.start()
        worker.run(threading.Event(), once=True)
        took, cpu = time.monotonic() - begin, time.process_time() - cpu
        sizes.append(memory())
        return {
            "events": worker.taken.events,
            "updates": worker.taken.updates,
            "seconds": round(took, 1),
            "cpu_seconds": round(cpu, 1),
            "latest_batch_seconds": round(source.late, 2),
            "memory_mb": [round(size) for size in sizes],
            "left": graph.stats().pending_updates,
            "destinations": {
                name: {
                    "windows": deliverer.served[name].windows,
                    "rows_changed": deliverer.served[name].rows_changed,
                    "lag_median": round(percentile(lags[name], 0.5), 2),
                    "lag_p99": round(percentile(lags[name], 0.99), 2),
                    "apply_p99": round(apply, 2),
                    "target": round(max(every, apply) + apply, 2),
                    "sink_seconds": round(deliverer.served[name].seconds, 1),
                }
                for name in names
                for apply in [percentile(times[name], 0.99)]
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--sinks", default="sqlite,duckdb,postgresql,clickhouse")
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.rate, given.seconds, given.sinks.split(","), given.every, Path(folder))
    found["load_average"] = os.getloadavg()[0]
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        if key != "destinations":
            print(f"{key:<22}{value}")
    for name, one in found["destinations"].items():
        print(f"{name:<12}" + "  ".join(f"{key} {value}" for key, value in one.items()))


if __name__ == "__main__":
    main()
