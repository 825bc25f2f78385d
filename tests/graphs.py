"""Every graph there is, empty, for tests that must hold on all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

from mongod import GivenServer, open_server
from recognition.graph import Graph
from recognition.graph.memory import MemoryGraph
from recognition.graph.mongo import COLLECTIONS, MongoGraph
from recognition.graph.sqlite import SqliteGraph

_open = ExitStack()
#: Ends what was started here; the second time it does nothing.
close = _open.close


@cache
def mongodb_server() -> GivenServer:
    """The server of this process, started when it is first asked for."""
    return _open.enter_context(open_server())


@cache
def _scratch_url() -> str:
    return _open.enter_context(mongodb_server().database())


def open_mongodb() -> MongoGraph:
    """An empty graph; all that are opened by this share one database, one after the other."""
    graph = MongoGraph(_scratch_url())
    database = graph._db
    for name in COLLECTIONS:
        database[name].delete_many({"_id": {"$ne": "schema"}})
    return graph


EMBEDDED: dict[str, Callable[[], Graph]] = {
    "memory": MemoryGraph,
    "sqlite": lambda: SqliteGraph(":memory:"),
}
GRAPHS: dict[str, Callable[[], Graph]] = {**EMBEDDED, "mongodb": open_mongodb}
