"""
What a worker did and has left to do, as Prometheus reads it.

Numbers only: no identifier, table names where rows are missing. All counters are those of this
process and begin with it; the gauges of the outbox are asked of the graph, not more often than
every few seconds, and are the same for all workers of one graph.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from recognition.delivery import CIRCUIT_OPENS, LAG_BOUNDS, Served
from recognition.errors import ConfigurationError, GraphError, MissingDependencyError
from recognition.graph import Graph
from recognition.worker import Worker

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
except ModuleNotFoundError as exc:
    raise MissingDependencyError(
        'metrics need the package prometheus-client; run: pip install "recognition[metrics]"'
    ) from exc

#: One of the numbers of a source, which a method ``measures`` gives: name, ``counter`` or
#: ``gauge``, meaning, names of labels, and the numbers by the values of these labels.
Measure: TypeAlias = tuple[str, str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]

_TAKEN = {
    "events": "Events that the graph has taken in.",
    "rejected": "What could not be read as an event.",
    "bots": "Events of bots, which are not remembered.",
    "ignored": "Anonymous events of types that are not remembered.",
    "anonymous": "Events without a known identifier.",
    "identified": "Events with a known identifier that identifies somebody.",
    "blocked": "Identifiers that never identify anybody.",
    "claims": "Claims of devices by persons.",
    "links": "Links between known identifiers.",
    "conflicts": "Links that were refused.",
    "updates": "Updates that were decided.",
    "restarts": "How often a source failed and was started again.",
}
_SERVED = {
    "windows": "Windows that were applied.",
    "updates": "Updates that are applied and done with.",
    "reapplied": "Updates that were applied again after their rows had settled.",
    "held": "Updates that were held for that.",
    "postponed": "Tries of updates that were put off, because of their table.",
    "dead": "Updates that were given up.",
    "rows_matched": "Rows that are as their updates want them.",
    "rows_changed": "Rows that were written.",
    "statements": "Statements that were sent.",
    "filled": "Updates that told a new destination what the graph knew.",
    "failures": "Windows that failed as a whole, and were or will be tried again.",
    "seconds": "Time that the sink took, in seconds.",
}


class Metrics:
    """
    The metrics of one process.

    Args:
        graph: Whose outbox; ``None``: there is none.
        worker: What came in; ``None``: nothing does.
        served: What goes out, by destination, as `Deliverer.served` gives it.
        every: For how long an answer of the graph is used again, in seconds.
    """

    def __init__(
        self,
        graph: Graph | None,
        worker: Worker | None,
        served: Mapping[str, Served],
        *,
        every: float = 10.0,
    ) -> None:
        self._graph = graph
        self._worker = worker
        self._served = served
        self._every = every
        self._lock = threading.Lock()
        self._asked = 0.0
        self._backlogs: list[Metric] = []
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def describe(self) -> list[Metric]:
        """Nothing is asked when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of them, as prometheus-client wants it."""
        if self._worker is not None:
            for name, help in _TAKEN.items():
                taken = CounterMetricFamily(f"recognition_{name}", help)
                taken.add_metric([], getattr(self._worker.taken, name))
                yield taken
            reasons = CounterMetricFamily(
                "recognition_rejected_reasons", "What was rejected, by reason.", labels=["reason"]
            )
            for reason, count in list(self._worker.reasons.items()):
                reasons.add_metric([reason], count)
            yield reasons
            yield from self._of_sources(self._worker.sources)
        if self._served:
            yield from self._delivered(self._served)
        if self._graph is None:
            return
        with self._lock:
            if time.monotonic() - self._asked >= self._every or not self._backlogs:
                self._backlogs = list(self._ask(self._graph))
                self._asked = time.monotonic()
            yield from self._backlogs

    def _of_sources(self, sources: Sequence[object]) -> Iterator[Metric]:
        """What sources count themselves; of two of a kind, the sum."""
        found: dict[str, tuple[str, str, tuple[str, ...], dict[tuple[str, ...], float]]] = {}
        for source in sources:
            measures: Callable[[], Iterable[Measure]] | None = getattr(source, "measures", None)
            for name, kind, help, labels, values in () if measures is None else measures():
                _, _, _, total = found.setdefault(name, (kind, help, labels, {}))
                for texts, value in values.items():
                    total[texts] = total.get(texts, 0) + value
        for name, (kind, help, labels, total) in found.items():
            make = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            family = make(f"recognition_{name}", help, labels=labels)
            for texts, value in total.items():
                family.add_metric(texts, value)
            yield family

    def _delivered(self, served: Mapping[str, Served]) -> Iterator[Metric]:
        for name, help in _SERVED.items():
            family = CounterMetricFamily(
                f"recognition_delivered_{name}", help, labels=["destination"]
            )
            for destination, one in served.items():
                family.add_metric([destination], getattr(one, name))
            yield family
        unmatched = CounterMetricFamily(
            "recognition_unmatched_rows",
            "Rows that updates expected and that never came.",
            labels=["destination", "table"],
        )
        circuit = GaugeMetricFamily(
            "recognition_circuit_open",
            "1 while a destination is only asked now and then, because it fails.",
            labels=["destination"],
        )
        lag = HistogramMetricFamily(
            "recognition_lag_seconds",
            "From the decision to the first time that its update was applied.",
            labels=["destination"],
        )
        for destination, one in served.items():
            for table, missing in list(one.unmatched.items()):
                unmatched.add_metric([destination, table], missing.rows)
            circuit.add_metric([destination], one.failing >= CIRCUIT_OPENS)
            counts = list(one.lag_counts)
            bounds = [*map(str, LAG_BOUNDS), "+Inf"]
            below = [sum(counts[: place + 1]) for place in range(len(counts))]
            lag.add_metric([destination], list(zip(bounds, below, strict=True)), one.lag_sum)
        yield from (unmatched, circuit, lag)

    def _ask(self, graph: Graph) -> Iterator[Metric]:
        up = GaugeMetricFamily("recognition_graph_up", "1 where the graph answers.")
        families = {
            name: GaugeMetricFamily(f"recognition_outbox_{name}", help, labels=["destination"])
            for name, help in (
                ("waiting", "Updates that a destination was not given yet."),
                ("held", "Updates that were applied, and wait for their rows to settle."),
                ("dead", "Updates that were given up, and can be replayed."),
                ("oldest_seconds", "Age of the oldest update that waits."),
            )
        }
        try:
            for name in graph.destinations() or [""]:
                backlog = graph.backlog(name)
                for key in ("waiting", "held", "dead"):
                    families[key].add_metric([name], getattr(backlog, key))
                age = 0.0
                if backlog.oldest is not None:
                    age = (datetime.now(UTC) - backlog.oldest).total_seconds()
                families["oldest_seconds"].add_metric([name], age)
        except GraphError:
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        yield from families.values()

    def render(self) -> str:
        """The text of ``/metrics``, in Prometheus's format."""
        text: str = generate_latest(self._registry).decode()
        return text

    def serve(self, address: str) -> Any:
        """
        Serve ``/metrics`` over HTTP, in a thread, until ``shutdown()`` of what is returned.

        Args:
            address: ``host:port``.

        Raises:
            ConfigurationError: The address is none, or is taken.
        """
        host, _, port = address.rpartition(":")
        try:
            server, _ = start_http_server(int(port), host or "127.0.0.1", self._registry)
        except (OSError, ValueError, OverflowError) as exc:
            raise ConfigurationError(f"metrics cannot be served at {address}: {exc}") from exc
        return server
