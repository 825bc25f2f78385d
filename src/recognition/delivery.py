"""
The way out, in one place: updates leave the graph's outbox, are planned and applied to sinks.

An update is acknowledged after every sink has applied it, never before; whoever dies in between
leaves a lease that ends, and the update comes again. Applying it again changes nothing, so delivery
is at least once and the rows are as if it were once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from recognition.errors import RecognitionError, TableError, ValueRefusedError
from recognition.graph import Graph
from recognition.planner import Plan, plan_updates
from recognition.sinks import Applied, Sink

_log = logging.getLogger("recognition.delivery")


@dataclass(slots=True)
class Delivered:
    """What became of the updates; ``rejected`` are dead letters now, with their reasons."""

    updates: int = 0
    rows_matched: int = 0
    rows_changed: int = 0
    statements: int = 0
    windows: int = 0
    rejected: list[tuple[str, RecognitionError]] = field(default_factory=list)


def deliver(
    graph: Graph,
    sinks: Sink | Sequence[Sink],
    *,
    window: int = 10_000,
    lease: float = 600.0,
    watch: Callable[[Plan, Applied], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Delivered:
    """
    Apply what the outbox holds, window by window, until nothing is left to lease.

    Updates that another process has leased are not waited for.

    Args:
        graph: Whose outbox.
        sinks: One or several; an update is done when all of them have applied it.
        window: How many updates are coalesced into one plan.
        lease: How long a window may take before it is offered to others, in seconds.
        watch: Called with each plan and what a sink made of it, before the acknowledgement.
        stop: Asked before each window; true leaves the rest in the outbox.

    Returns:
        What was applied; over several sinks, rows and statements are summed.

    Raises:
        SinkError: A sink failed. Windows before are done; this one went back to the outbox, and
            is whole or absent in each sink that has transactions.
        TableError: A table is missing or cannot take what is set. All other updates are applied;
            those of this table are in the outbox again.
    """
    targets = list(sinks) if isinstance(sinks, Sequence) else [sinks]
    total = Delivered()
    waiting: dict[int, TableError] = {}
    while not (stop is not None and stop()) and (leased := graph.lease_updates(window, lease)):
        positions = {item.update.id: item.position for item in leased}
        plan = plan_updates([item.update for item in leased])
        refused: dict[str, RecognitionError] = dict(plan.rejected)
        try:
            for sink in targets:
                applied = sink.apply(plan)
                total.rows_matched += applied.rows_matched
                total.rows_changed += applied.rows_changed
                total.statements += applied.statements
                refused.update(applied.rejected)
                if watch is not None:
                    watch(plan, applied)
        except BaseException as exc:
            graph.return_updates(positions.values(), type(exc).__name__, dead=False)
            _log.warning("window returned: %d updates, %s", len(leased), type(exc).__name__)
            raise
        for update_id, error in refused.items():
            if isinstance(error, TableError) and not isinstance(error, ValueRefusedError):
                # Leased until the end, so that it does not come again and again.
                waiting[positions[update_id]] = error
            else:
                total.rejected.append((update_id, error))
                graph.return_updates([positions[update_id]], str(error), dead=True)
        done = [position for update_id, position in positions.items() if update_id not in refused]
        graph.acknowledge(done)
        total.updates += len(done)
        total.windows += 1
        _log.info("window done: %d updates, %d refused", len(done), len(refused))
    if waiting:
        graph.return_updates(waiting, "TableError", dead=False)
        raise TableError(
            f"{next(iter(waiting.values()))}. {len(waiting):,} updates wait for it in the outbox;"
            f" {total.updates:,} others were applied",
            written=bool(total.updates),
        )
    return total
