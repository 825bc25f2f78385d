"""
A FastStream application with recognition inside (https://faststream.ag2.ai).

    GRAPH=sqlite:///graph.db SINK=postgresql+psycopg://... KAFKA=broker:9092 TOPIC=events \
        python faststream_worker.py

The rows are written by your pipeline. A batch whose handler fails is read again, and changes
nothing the second time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from faststream import AckPolicy, FastStream, StreamMessage
from faststream.confluent import KafkaBroker

from recognition import EventError, Recognizer, Rules, deliver, open_graph, open_sink, parse_event

_log = logging.getLogger("faststream_worker")

graph = open_graph(os.environ.get("GRAPH", "sqlite:///graph.db"))
sink = open_sink(os.environ["SINK"])
recognizer = Recognizer(graph, Rules(stamps=False))

broker = KafkaBroker(os.environ["KAFKA"], allow_auto_create_topics=False)
app = FastStream(broker)


async def leave(message: StreamMessage[Any]) -> Sequence[bytes]:
    """The bodies as they came: one that FastStream cannot decode would hold its whole batch."""
    bodies: Sequence[bytes] = message.body
    return bodies


@broker.subscriber(
    os.environ["TOPIC"],
    group_id=os.environ.get("GROUP", "recognition"),
    batch=True,
    max_records=1_000,
    polling_interval=0.5,
    auto_offset_reset="earliest",
    ack_policy=AckPolicy.NACK_ON_ERROR,
    decoder=leave,
)
async def recognize(bodies: list[bytes]) -> None:
    """A batch of events; what is none is logged, and left."""
    events = []
    for body in bodies:
        try:
            events.append(parse_event(json.loads(body)))
        except EventError as exc:
            _log.warning("no event: %s", exc)
        except (ValueError, RecursionError):
            _log.warning("no event: not JSON")
    # Graph and sink wait for their servers: not in the thread that everything else runs in.
    await asyncio.to_thread(recognizer.process, events)
    await asyncio.to_thread(deliver, graph, sink)


@app.after_shutdown
def close() -> None:
    """Give back what is open."""
    sink.close()
    graph.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(app.run())
