"""
Dagster: rows are loaded, then their events are decided on, then the updates are delivered.

    python examples/dagster_recognition.py EVENTS.ndjson WORK_FOLDER

The loading is the pipeline's own, here into SQLite. Each asset may run again at any time, alone or
with the others: events that were there, and updates that were applied, change nothing.
"""

import json
import sqlite3
import sys
from contextlib import closing
from itertools import islice

import dagster as dg

from recognition import Recognizer, Rules, deliver, open_graph, open_sink, read_events

#: The rows are written by the pipeline, as they came, before the graph is asked.
RULES = Rules(stamps=False)

BATCH = 5_000


class Workspace(dg.ConfigurableResource):
    """Where things are."""

    events: str
    graph: str
    warehouse: str


#: For what a retry helps with: a database that is locked or away.
PATIENTLY = dg.RetryPolicy(max_retries=5, delay=2, backoff=dg.Backoff.EXPONENTIAL)


@dg.asset
def events_table(workspace: Workspace) -> dg.MaterializeResult:
    """The rows as they came; one that is there stays as it is."""
    with open(workspace.events) as lines:
        events = [json.loads(line) for line in lines]
    rows = [
        (e["messageId"], e["type"], e.get("anonymousId"), e.get("userId"), e["timestamp"])
        for e in events
    ]
    with closing(sqlite3.connect(workspace.warehouse)) as connection, connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS events (message_id TEXT PRIMARY KEY, type TEXT,"
            " anonymous_id TEXT, user_id TEXT, timestamp TEXT)"
        )
        connection.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)", rows)
    return dg.MaterializeResult(metadata={"rows": len(rows)})


@dg.asset(deps=[events_table], retry_policy=PATIENTLY)
def decisions(workspace: Workspace) -> dg.MaterializeResult:
    """What the graph knows of the events, and the updates that follow, durable."""
    identified = updates = 0
    with closing(open_graph(workspace.graph)) as graph:
        recognizer = Recognizer(graph, RULES)
        events = iter(read_events(workspace.events))
        while batch := list(islice(events, BATCH)):
            done = recognizer.process(batch)
            identified += done.identified
            updates += done.updates
    return dg.MaterializeResult(metadata={"identified": identified, "updates": updates})


@dg.asset(deps=[decisions], retry_policy=PATIENTLY)
def recognised_rows(workspace: Workspace) -> dg.MaterializeResult:
    """Earlier rows have their user; what cannot be applied is kept with its reason."""
    with closing(open_graph(workspace.graph)) as graph:
        sink = open_sink(f"sqlite:///{workspace.warehouse}")
        with closing(sink):
            delivered = deliver(graph, sink)
    return dg.MaterializeResult(
        metadata={"changed": delivered.rows_changed, "rejected": len(delivered.rejected)}
    )


@dg.asset_check(asset=recognised_rows)
def nothing_is_left(workspace: Workspace) -> dg.AssetCheckResult:
    """No update waits, and none was given up."""
    with closing(open_graph(workspace.graph)) as graph:
        left = graph.stats()
    return dg.AssetCheckResult(
        passed=left.pending_updates == 0 and left.dead_updates == 0,
        metadata={"pending": left.pending_updates, "dead": left.dead_updates},
    )


ASSETS = [events_table, decisions, recognised_rows, nothing_is_left]


def main(events: str, work: str) -> None:
    """Materialise all of it once, in this process."""
    workspace = Workspace(
        events=events, graph=f"sqlite:///{work}/graph.db", warehouse=f"{work}/warehouse.db"
    )
    result = dg.materialize(ASSETS, resources={"workspace": workspace})
    for event in result.get_asset_materialization_events():
        shown = {name: value.value for name, value in event.materialization.metadata.items()}
        print(event.asset_key.to_user_string(), json.dumps(shown))
    for check in result.get_asset_check_evaluations():
        print(check.check_name, "passed" if check.passed else "failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
