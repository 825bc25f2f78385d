"""What a worker shows to Prometheus, read by Prometheus's own parser over HTTP."""

from __future__ import annotations

import re
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mongod import _free_port
from recognition.delivery import Deliverer, Destination
from recognition.errors import ConfigurationError
from recognition.graph import open_graph
from recognition.kafka import KafkaSource
from recognition.metrics import Metrics
from recognition.receiver import Receiver
from recognition.recognizer import Recognizer
from recognition.worker import Worker
from test_delivery import RULES, Warehouse, delivering, journey, wait_until

DOCS = Path(__file__).parents[1] / "docs"
DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"


def read(text: str) -> dict[tuple[str, ...], float]:
    """By name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_say_what_came_in_went_out_and_waits(tmp_path: Path) -> None:
    """Counters of both sides, the outbox of each destination, lag, and rows that never came."""
    events = journey(5)
    up, missing = Warehouse(tmp_path, "up").make(), Warehouse(tmp_path, "missing")
    up.put([event for event in events if event.message_id != "m2-1"])
    missing.execute("CREATE TABLE other (x)")
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        deliverer = Deliverer(
            graph,
            [
                Destination(name="up", sink=up.sink(), settle=0.2),
                Destination(name="missing", sink=missing.sink()),
            ],
            every=0.05,
        )
        worker = Worker(Recognizer(graph, RULES), [], deliverer)
        metrics = Metrics(graph, worker, deliverer.served, every=0.0)
        address = f"127.0.0.1:{_free_port(())}"
        server = metrics.serve(address)
        with delivering(deliverer):
            worker.take([*events, {"no": "event"}])
            wait_until(lambda: deliverer.served["up"].unmatched)
            wait_until(lambda: deliverer.served["missing"].postponed)
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        with pytest.raises(ConfigurationError, match="metrics cannot be served"):
            metrics.serve(address)
        server.shutdown()
        server.server_close()
    found = read(text)

    assert found["recognition_events_total",] == 20
    assert found["recognition_rejected_total",] == 1
    assert found["recognition_anonymous_total",] == 15
    assert found["recognition_claims_total",] == 5
    assert found["recognition_delivered_updates_total", "up"] == 5
    assert found["recognition_delivered_reapplied_total", "up"] == 1
    assert found["recognition_delivered_rows_changed_total", "up"] == 14
    assert found["recognition_unmatched_rows_total", "up", "events"] == 1
    assert found["recognition_lag_seconds_count", "up"] == 5
    assert found["recognition_lag_seconds_bucket", "up", "+Inf"] == 5
    assert found["recognition_outbox_waiting", "up"] == 0
    assert found["recognition_outbox_waiting", "missing"] == 5
    assert 0 < found["recognition_outbox_oldest_seconds", "missing"] < 100
    assert found["recognition_circuit_open", "missing"] == 0
    assert found["recognition_graph_up",] == 1
    assert "u1" not in text
    assert "d1" not in text


def test_dashboard_and_page_name_metrics_that_exist(tmp_path: Path) -> None:
    """Every metric of dashboard, alerts and docs/delivery.md is one that is served."""
    sink = Warehouse(tmp_path).make().sink()
    with closing(open_graph(f"sqlite:///{tmp_path}/graph.db")) as graph:
        deliverer = Deliverer(graph, [Destination(name="w", sink=sink)])
        # Neither is run.
        sources = [KafkaSource("nowhere:1", ["t"], "g"), Receiver(["an example key"])]
        worker = Worker(Recognizer(graph), sources, None)
        served = {family.name for family in Metrics(graph, worker, deliverer.served).collect()}
    deployed = "".join(
        (DEPLOY / name).read_text("utf-8") for name in ("grafana.json", "alerts.yaml")
    )
    named = set(re.findall(r"recognition_[a-z_]+", deployed))
    page = (DOCS / "delivery.md").read_text("utf-8")
    listed = page[page.index("| metric |") : page.index("Worth an alarm")]
    for first, more in re.findall(r"^\| (`recognition_\w+`)((?:, `_\w+`)*) \|", listed, re.M):
        base = re.sub(
            r"(recognition_(?:delivered_|outbox_|kafka_|receiver_)?).*", r"\1", first.strip("`")
        )
        named.add(first.strip("`"))
        named |= {base + name.strip("_") for name in re.findall(r"`_(\w+)`", more)}
    known = served | {
        f"{name}_{ending}" for name in served for ending in ("total", "bucket", "count", "sum")
    }

    assert len(named) > 30
    assert named - known == set()
    assert {name for name in served if not any(one.startswith(name) for one in named)} == set()
