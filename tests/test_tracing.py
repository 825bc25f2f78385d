"""Spans, as OpenTelemetry's SDK receives them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from recognition.delivery import Deliverer, Destination
from recognition.errors import SinkUnavailableError
from recognition.graph import open_graph
from recognition.planner import Plan
from recognition.recognizer import Recognizer
from recognition.worker import Worker
from test_delivery import RULES, Around, Warehouse, delivering, journey, wait_until


def test_batches_and_windows_are_spans(tmp_path: Path) -> None:
    """With the numbers of both, and the class of an error; no identifier is in them."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    events = journey(3)
    warehouse = Warehouse(tmp_path).make()
    warehouse.put(events)
    failures = iter([SinkUnavailableError("u1 is not there")])

    def fail_once(plan: Plan) -> None:
        for failure in failures:
            raise failure

    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        sink = Around(warehouse.sink(), fail_once)
        deliverer = Deliverer(
            graph, [Destination(name="w", sink=sink)], every=0.05, pauses=(0.05, 0.1)
        )
        with delivering(deliverer):
            Worker(Recognizer(graph, RULES), [], None).take(events)
            wait_until(lambda: not graph.stats().pending_updates)
    spans = exporter.get_finished_spans()
    taken, failed, applied = [dict(span.attributes or {}) for span in spans]

    assert [span.name for span in spans] == ["recognition.take", *["recognition.apply"] * 2]
    assert taken == {
        "recognition.events": 12,
        "recognition.claims": 3,
        "recognition.updates": 3,
    }
    assert failed["error.type"] == "SinkUnavailableError"
    assert (applied["recognition.destination"], applied["recognition.rows_changed"]) == ("w", 9)
    assert "u1" not in str([span.to_json() for span in spans])


@pytest.mark.parametrize("hidden", [True, False])
def test_nothing_is_needed_for_no_spans(hidden: bool) -> None:
    """Without the package, and with the API alone, the block is run and nothing else happens."""
    code = (
        ("import sys; sys.modules['opentelemetry'] = None; " if hidden else "")
        + "from recognition.tracing import span\n"
        "with span('x', number=1) as told: told['more'] = 2\n"
        "print(told)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout == "{'more': 2}\n"
