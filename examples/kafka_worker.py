"""
A Kafka consumer of your own with recognition inside: process, deliver, commit.

    GRAPH=sqlite:///graph.db SINK=postgresql+psycopg://... KAFKA=broker:9092 TOPIC=events \
        python kafka_worker.py

The rows are written by your pipeline. Events are JSON, one to a message. What dies between two of
the three calls is done again after the start, and changes nothing the second time.
`recognition.kafka.KafkaSource` does more: dead letters, retries, batches inside of messages.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from typing import Any

from confluent_kafka import Consumer, KafkaException

from recognition import EventError, Recognizer, Rules, deliver, open_graph, open_sink, parse_event

_log = logging.getLogger("kafka_worker")


def read_events(messages: list[Any]) -> list[Any]:
    """The events of messages; what is none is logged by its place, and left."""
    events = []
    for message in messages:
        if message.error() is not None:
            _log.warning("%s", message.error().name())
            continue
        try:
            events.append(parse_event(json.loads(message.value())))
        except (TypeError, ValueError, RecursionError, EventError) as exc:  # no value at all, too
            _log.warning("offset %d is no event: %s", message.offset(), type(exc).__name__)
    return events


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    running = True

    def stop(*_: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    graph = open_graph(os.environ.get("GRAPH", "sqlite:///graph.db"))
    sink = open_sink(os.environ["SINK"])
    # Somebody else writes the rows, as they came.
    recognizer = Recognizer(graph, Rules(stamps=False))
    consumer = Consumer(
        {
            "bootstrap.servers": os.environ["KAFKA"],
            "group.id": os.environ.get("GROUP", "recognition"),
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([os.environ["TOPIC"]])
    try:
        while running:
            messages = consumer.consume(1_000, timeout=0.5)
            events = read_events(messages)
            if events:
                recognizer.process(events)  # durable, with the updates that follow
            deliver(graph, sink)  # what is left from before, too
            if any(message.error() is None for message in messages):
                try:
                    consumer.commit(asynchronous=False)
                except KafkaException as exc:
                    # The broker is away, or others have the partitions: these come again.
                    _log.warning("not committed: %s", exc.args[0].name())
    finally:
        consumer.close()
        sink.close()
        graph.close()


if __name__ == "__main__":
    main()
