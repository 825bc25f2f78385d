"""
Kafka: events in, updates out, updates in.

`KafkaSource` is a source of a worker: offsets are stored for the next commit when its events are
durable in the graph, never before. `UpdatesTopic` is where updates go out, all of one visitor in
order; `UpdatesConsumer` reads such a topic into a sink, and is done with an update when the sink
is. Whatever dies in between comes again, and changes nothing the second time; so nothing here
needs a transaction of Kafka's (see ``docs/kafka.md``).

What no retry will ever mend is written to a topic of dead letters, with the reason in its headers,
before it counts as done.

Errors and logs name topics, partitions and offsets; never keys, values, or options, which may hold
passwords.
"""

from __future__ import annotations

import json
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from recognition.delivery import REFUSED_ALONE, Served, split
from recognition.errors import (
    ConfigurationError,
    EventError,
    MessageError,
    MissingDependencyError,
    OutcomeUnknownError,
    RecognitionError,
    SinkError,
    SinkUnavailableError,
    SourceError,
    tell,
    trace,
)
from recognition.events import Event, Format, Reject, expand_batch, parse_event
from recognition.graph import Graph
from recognition.messages import Equals, UpdateByCriteria, parse_update
from recognition.planner import plan_updates
from recognition.sinks import Sink

try:
    import confluent_kafka as ck
except ModuleNotFoundError as exc:
    raise MissingDependencyError(
        f"Kafka needs the package {exc.name!r}, which is not installed; "
        'run: pip install "recognition[kafka]"'
    ) from exc

_log = logging.getLogger("recognition.kafka")

#: Returns when a batch of events is durable in the graph; see `recognition.worker.Source`.
Take: TypeAlias = Callable[[Sequence[Event]], None]

#: One of the numbers of a source; see `recognition.metrics.Measure`.
Measure: TypeAlias = tuple[str, str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]

Options: TypeAlias = Mapping[str, str | int | float | bool]

# What is decided here. At least once rests on the first two.
_OURS = frozenset(("enable.auto.commit", "enable.auto.offset.store", "group.id", "on_commit"))

_DEFAULTS: Options = {
    "auto.offset.reset": "earliest",
    "auto.commit.interval.ms": 1_000,
    # Of what is fetched ahead; by default it is 64 MB.
    "queued.max.messages.kbytes": 16_384,
    "client.id": "recognition",
}

# Errors that somebody has to mend.
_REFUSED = frozenset(
    (
        ck.KafkaError._AUTHENTICATION,
        ck.KafkaError.SASL_AUTHENTICATION_FAILED,
        ck.KafkaError.UNSUPPORTED_SASL_MECHANISM,
        ck.KafkaError.TOPIC_AUTHORIZATION_FAILED,
        ck.KafkaError.GROUP_AUTHORIZATION_FAILED,
        ck.KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        ck.KafkaError.TOPIC_EXCEPTION,
        # Of who asked for an error where what was confirmed is not kept any more.
        ck.KafkaError._AUTO_OFFSET_RESET,
    )
)

# So long a batch may take before the group is told that we are alive, in seconds.
_SLOW = 10.0

# librdkafka's own (https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md).
_MAX_POLL_MS = 300_000
_GREATEST_MESSAGE = 1_000_000_000

# Characters of a reason in a header, as in Bulker's (bulkerapp/app/abstract_batch_consumer.go).
_MAX_REASON = 256


@dataclass(slots=True)
class Counts:
    """What has happened since the consumer was made; by this process."""

    #: The group that it reads in.
    group: str = ""
    #: Messages that are done with, the dead ones included.
    messages: int = 0
    #: Messages that became dead letters, by what is wrong with them: a few short texts.
    dead: Counter[str] = field(default_factory=Counter)
    #: Messages without a value, as they delete what a compacted topic holds: nothing is done.
    empty: int = 0
    #: Bytes of the values of messages that are done with.
    bytes: int = 0
    #: How often a batch was offered again.
    retries: int = 0
    #: How often partitions were given to this consumer, or taken from it.
    rebalances: int = 0
    #: By topic and partition, how many messages are not done with, as of the last time that a batch
    #: began, was offered again, or was done; of the partitions that this consumer has, or had last.
    behind: dict[tuple[str, int], int] = field(default_factory=dict)

    def measures(self) -> Iterator[Measure]:
        """The same for metrics: name, kind, meaning, names of labels, numbers by labels."""
        for name, help in (
            ("messages", "Messages of Kafka that are done with."),
            ("empty", "Messages of Kafka without a value."),
            ("bytes", "Bytes of messages of Kafka that are done with."),
            ("retries", "How often a batch of Kafka was offered again."),
            ("rebalances", "How often partitions of Kafka were given or taken away."),
        ):
            yield f"kafka_{name}", "counter", help, (), {(): getattr(self, name)}
        yield (
            "kafka_dead",
            "counter",
            "Messages of Kafka that cannot be read, by reason.",
            ("reason",),
            {(reason,): count for reason, count in list(self.dead.items())},
        )
        yield (
            "kafka_behind",
            "gauge",
            "Messages of Kafka that are not done with, as of the last batch or try.",
            ("group", "topic", "partition"),
            {
                (self.group, topic, str(number)): n
                for (topic, number), n in list(self.behind.items())
            },
        )


class Found(NamedTuple):
    """What ``look`` has to say: whether it is wrong, what it is, the line that mends."""

    wrong: bool
    text: str
    fix: str = ""


class _Dead(NamedTuple):
    """A message that no retry will mend; neither text holds anything of it."""

    message: Any
    kind: str
    reason: str


class _Handled(NamedTuple):
    """What became of a batch: what is to be a dead letter, and what counts it once that is one."""

    dead: Sequence[_Dead]
    then: Callable[[], None] = lambda: None


_Handle: TypeAlias = Callable[[Sequence[Any]], _Handled]


class _Topics:
    """
    Reads topics as one of a group; hands batches on, and stores offsets when they are done.

    Attributes:
        counts: What has happened so far.
    """

    def __init__(
        self,
        servers: str,
        topics: Sequence[str],
        group: str,
        *,
        dead_letters: str | None,
        batch_size: int,
        linger: float,
        pauses: tuple[float, float],
        options: Options | None,
        rejects: Callable[[Reject], object] | None = None,
    ) -> None:
        if not topics or not all(topics) or not group:
            raise ConfigurationError("a consumer needs at least one topic, and a group")
        if dead_letters is not None and any(_is_read(dead_letters, topic) for topic in topics):
            # Each of them would become a dead letter again, and so on for ever.
            raise ConfigurationError("the topic of dead letters is one that is read")
        given = dict(options or {})
        taken = sorted(_OURS & given.keys())
        if taken:
            raise ConfigurationError(f"these options are not to be set: {', '.join(taken)}")
        self._config = {
            **_DEFAULTS,
            **given,
            "bootstrap.servers": servers,
            "group.id": group,
            # Stored by us when a batch is done; committed by librdkafka now and then, when a
            # partition is taken away, and at the end. A broker that is away holds nobody up.
            "enable.auto.commit": True,
            "enable.auto.offset.store": False,
            "error_cb": self._note,
        }
        self._topics = list(topics)
        self._rejects = rejects
        self._letters = dead_letters
        self._batch_size = batch_size
        self._linger = linger
        self._pauses = pauses
        # What was read is written whatever its size: the broker's limit alone counts.
        letters = {"message.max.bytes": _GREATEST_MESSAGE, **_for_producer(given)}
        self._dead = None if dead_letters is None else _Writer(servers, dead_letters, letters)
        self._slow = min(_SLOW, int(given.get("max.poll.interval.ms", _MAX_POLL_MS)) / 3_000)
        self._refused: ck.KafkaError | None = None
        self._tls: ck.KafkaError | None = None
        self._reassigned = False
        self._left = False
        self._said: set[str] = set()
        self.counts = Counts(group)

    def _run(self, handle: _Handle, stop: threading.Event) -> None:
        """
        Read until ``stop`` is set.

        Args:
            handle: Gets messages that have a value. It raises a retryable error to be called again
                with the same messages.
        """
        consumer = _open(ck.Consumer, self._config)
        self._refused = None
        pool = ThreadPoolExecutor(1, "recognition-kafka")

        def submit(messages: Sequence[Any]) -> Future[_Handled]:
            return pool.submit(handle, messages)

        try:
            consumer.subscribe(
                self._topics,
                on_assign=self._assigned,
                on_revoke=self._revoked,
                on_lost=self._revoked,
            )
            while not stop.is_set():
                messages = self._consume(consumer, self._batch_size, self._linger)
                while messages:
                    more = self._finish(consumer, messages, submit, stop)
                    if more is None:
                        return
                    messages = more
        finally:
            # First, so that what a batch is still at work with is not confirmed.
            self._left = True
            if not self._is_at_its_end():
                consumer.close()
            pool.shutdown()

    def measures(self) -> Iterator[Measure]:
        """The counts as metrics have them."""
        return self.counts.measures()

    def look(self, seconds: float = 10.0) -> list[Found]:
        """
        Whether the topics can be read, and how much waits in them. Nothing is read or confirmed.

        Args:
            seconds: For how long each answer of the cluster is waited for.

        Raises:
            SourceError: The cluster does not answer, or refuses.
        """
        self._refused = None
        consumer = _open(ck.Consumer, self._config)
        try:
            known = consumer.list_topics(timeout=seconds).topics
            found: list[Found] = []
            for asked in self._topics:
                names = [asked]
                if asked.startswith("^"):
                    names = sorted(name for name in known if re.match(asked, name))
                    if not names:
                        found.append(Found(False, f"no topic matches {asked} yet"))
                for name in names:
                    found.append(self._look_at(consumer, known, name, seconds))
            if self._letters is not None:
                found.append(self._look_at_letters(consumer, known, self._letters, seconds))
            return found
        except ck.KafkaException as exc:
            consumer.poll(0)  # what was told of the whole client, a refusal for example
            raise _to_error(self._refused or self._tls or exc.args[0]) from exc
        finally:
            consumer.close()

    def _look_at(self, consumer: Any, known: Mapping[str, Any], name: str, wait: float) -> Found:
        if (missing := self._missing(known, name)) is not None:
            return missing
        places = [ck.TopicPartition(name, number) for number in known[name].partitions]
        waiting = lost = 0
        for place in consumer.committed(places, timeout=wait):
            low, high = _bounds(consumer, place, wait)
            if place.offset >= 0:
                lost += max(0, low - place.offset)
            waiting += high - max(low, place.offset)
        if lost:
            return Found(
                True,
                f"topic {name}: {lost:,} messages were deleted before the group had read them",
                f"kafka-configs.sh --bootstrap-server {self._config['bootstrap.servers']} --alter"
                f" --entity-type topics --entity-name {name} --add-config retention.ms=604800000",
            )
        return Found(False, f"topic {name}: {len(places)} partitions, {waiting:,} messages wait")

    def _look_at_letters(
        self, consumer: Any, known: Mapping[str, Any], name: str, wait: float
    ) -> Found:
        if (missing := self._missing(known, name)) is not None:
            return missing
        count = 0
        for number in known[name].partitions:
            place = ck.TopicPartition(name, number)
            low, high = _bounds(consumer, place, wait)
            count += high - low
        return Found(False, f"topic {name}: {count:,} dead letters")

    def _missing(self, known: Mapping[str, Any], name: str) -> Found | None:
        if name in known and known[name].error is None:
            return None
        told = known[name].error.name() if name in known else "it is not there"
        return Found(
            True,
            f"topic {name}: {told}",
            f"kafka-topics.sh --bootstrap-server {self._config['bootstrap.servers']} --create"
            f" --topic {name} --partitions 8",
        )

    def _is_at_its_end(self) -> bool:
        """Then it can confirm nothing, and closing it would never return: it is let go."""
        return self._refused is not None and _is_fatal(self._refused)

    def _consume(self, consumer: Any, count: int, seconds: float) -> list[Any]:
        """Messages that hold something; what is wrong with the cluster is raised."""
        found = []
        for message in consumer.consume(count, seconds):
            error = message.error()
            if error is None:
                found.append(message)
            elif _ends(error):
                self._refused = error
            elif error.code() != ck.KafkaError._PARTITION_EOF:
                self._say(error)
        if self._refused is not None:
            raise _to_error(self._refused)
        return found

    def _finish(
        self,
        consumer: Any,
        messages: Sequence[Any],
        submit: Callable[[Sequence[Any]], Future[_Handled]],
        stop: threading.Event,
    ) -> list[Any] | None:
        """Hand over until it is done; messages that came meanwhile, ``None`` when told to stop."""
        later: list[Any] = []
        paused = False

        def poll(until: Callable[[], bool]) -> None:
            """Nothing more is fetched, and the group sees that we are alive."""
            nonlocal paused
            if not paused:
                consumer.pause(consumer.assignment())
                paused = True
            while not until():
                later.extend(self._consume(consumer, 1, 0.1))
                if self._reassigned:
                    self._reassigned = False
                    consumer.pause(consumer.assignment())

        begin: dict[tuple[str, int], int] = {}
        end: dict[tuple[str, int], int] = {}
        for message in messages:
            begin.setdefault((message.topic(), message.partition()), message.offset())
            end[message.topic(), message.partition()] = message.offset() + 1
        self._note_behind(consumer, begin)
        again = 0.0

        def rested() -> bool:
            return stop.is_set() or time.monotonic() >= again

        pause, longest = self._pauses
        while True:
            # In a thread: a graph or a destination may take longer than a member may be silent.
            job = submit([each for each in messages if each.value() is not None])
            if not wait([job], self._slow).done:
                poll(job.done)
            try:
                handled = job.result()
                self._bury(handled.dead)
                handled.then()
                break
            except RecognitionError as exc:
                if not exc.retryable:
                    raise
                told = "group %s: %d messages are offered again: %s"
                _log.warning(told, self.counts.group, len(messages), exc)
            self.counts.retries += 1
            # What is paused is not fetched: nothing else tells how much has come meanwhile.
            self._note_behind(consumer, begin, ask=True)
            again = time.monotonic() + pause * random.uniform(0.5, 1.0)
            poll(rested)
            if stop.is_set():
                return None
            pause = min(longest, 2 * pause)
        if paused:
            consumer.resume(consumer.assignment())
        for (topic, partition), offset in end.items():
            place = ck.TopicPartition(topic, partition, offset)
            try:
                consumer.store_offsets(offsets=[place])
                self._note_behind(consumer, {(topic, partition): offset})
            except ck.KafkaException as exc:
                if exc.args[0].code() != ck.KafkaError._STATE:
                    raise _to_error(exc.args[0]) from exc
                # Taken away meanwhile: whoever has it now reads these again.
        self.counts.empty += sum(each.value() is None for each in messages)
        self.counts.messages += len(messages)
        self.counts.bytes += sum(len(each.value() or b"") for each in messages)
        self._said.clear()  # all is well: what passes by itself is news, the next time
        return later

    def _note_behind(
        self, consumer: Any, begin: Mapping[tuple[str, int], int], *, ask: bool = False
    ) -> None:
        """How much there is from these offsets on: as the last fetch told it, or by asking."""
        for (topic, partition), offset in begin.items():
            place = ck.TopicPartition(topic, partition)
            try:
                bounds = consumer.get_watermark_offsets(place, timeout=1.0, cached=not ask)
            except ck.KafkaException:
                return  # the cluster is away: what is known stands
            if bounds is not None:
                self.counts.behind[topic, partition] = max(0, bounds[1] - offset)

    def _bury(self, dead: Sequence[_Dead]) -> None:
        if self._dead is not None and dead:
            self._dead.write([_to_letter(each.message, each.reason) for each in dead])
        for each in dead:
            if self._dead is None and self._rejects is not None:
                self._rejects(
                    Reject(
                        source=f"{each.message.topic()}[{each.message.partition()}]",
                        line=each.message.offset(),
                        reason=each.kind,
                        raw=each.message.value(),
                    )
                )
            self.counts.dead[each.kind] += 1
            _log.warning(
                "%s [%d] offset %d is a dead letter: %s",
                each.message.topic(),
                each.message.partition(),
                each.message.offset(),
                each.reason,
            )

    def _assigned(self, _: object, partitions: Sequence[Any]) -> None:
        self._reassigned = True
        if self._left:
            # Back in the group: what it had when it left may be others' now.
            self._left = False
            mine = {(each.topic, each.partition) for each in partitions}
            for place in self.counts.behind.keys() - mine:
                del self.counts.behind[place]
        self.counts.rebalances += 1
        _log.info("%d partitions were assigned", len(partitions))

    def _revoked(self, _: object, partitions: Sequence[Any]) -> None:
        self.counts.rebalances += 1
        for each in () if self._left else partitions:
            self.counts.behind.pop((each.topic, each.partition), None)
        _log.info("%d partitions were taken away", len(partitions))

    def _note(self, error: Any) -> None:
        """What librdkafka tells of the whole client; by whichever thread polls."""
        if _ends(error):
            self._refused = error
        else:
            if error.code() == ck.KafkaError._SSL:
                self._tls = error  # said once more by whoever gives up for it
            self._say(error)

    def _say(self, error: Any) -> None:
        """It passes by itself, and is said once, not every second."""
        if error.name() not in self._said:
            self._said.add(error.name())
            _log.warning("%s; the client goes on by itself", _name(error))


class KafkaSource(_Topics):
    """
    Events from topics, at least once.

    A message is one event, an array of events, or a batch of Segment's, in JSON. What is none of
    these, or cannot be read as an event, is a dead letter, and the rest goes on. While the graph is
    away the same batch is offered again, and the group keeps its members.

    Args:
        servers: ``bootstrap.servers``: ``host:port``, several with commas.
        topics: Their names; ``^in\\.id\\..*`` is a regular expression.
        group: All workers of one graph share it; each partition is read by one of them.
        format: How events are written, as for `parse_event`.
        inside: The key under which a message holds its event: ``httpPayload`` in Jitsu's topic
            ``destination-messages``. ``None``: the message is the event.
        dead_letters: The topic for what cannot be read. It must exist, or be made by the broker.
            ``None``: it is counted and logged with its offset, and handed to ``rejects``.
        batch_size: Messages that are handed over at once, at most.
        linger: How long a batch gathers, in seconds.
        pauses: The first and the longest pause before a batch is offered again, in seconds.
        options: Of librdkafka, such as ``security.protocol``.
        rejects: Called with what cannot be read, where no topic of dead letters is named: the
            source is ``topic[partition]``, the line the offset.

    Raises:
        ConfigurationError: An option is wrong, or is decided here.
    """

    def __init__(
        self,
        servers: str,
        topics: Sequence[str],
        group: str,
        *,
        format: Format | Mapping[str, Format] | None = None,
        inside: str | None = None,
        dead_letters: str | None = None,
        batch_size: int = 1_000,
        linger: float = 0.5,
        pauses: tuple[float, float] = (0.5, 30.0),
        options: Options | None = None,
        rejects: Callable[[Reject], object] | None = None,
    ) -> None:
        super().__init__(
            servers,
            topics,
            group,
            dead_letters=dead_letters,
            batch_size=batch_size,
            linger=linger,
            pauses=pauses,
            options=options,
            rejects=rejects,
        )
        self._format = format
        self._inside = inside

    def run(self, take: Take, stop: threading.Event) -> None:
        """
        Read until ``stop`` is set; see `recognition.worker.Source`.

        Raises:
            SourceError: The cluster refuses the credentials, the topic or the group, or the client
                cannot go on. A cluster that is away is waited for.
            GraphError: One that no retry mends; nothing of the batch is confirmed.
        """

        def handle(messages: Sequence[Any]) -> _Handled:
            events: list[Event] = []
            dead: list[_Dead] = []
            for message in messages:
                read, kind, place = self._read(message.value())
                events += read
                if kind is not None:
                    dead.append(_Dead(message, kind, place + kind))
            if events:
                take(events)
            return _Handled(dead)

        self._run(handle, stop)

    def _read(self, value: bytes) -> tuple[list[Event], str | None, str]:
        """The events of a message; why it is a dead letter all the same, and where in it."""
        try:
            body = json.loads(value.decode(), parse_constant=_refuse_constant)
        except UnicodeDecodeError:
            return [], "not UTF-8", ""
        except ValueError:
            return [], "not JSON", ""
        except RecursionError:
            return [], "nested too deeply", ""
        if self._inside is not None:
            if not isinstance(body, dict) or self._inside not in body:
                return [], f"the message has no {self._inside}", ""
            body = body[self._inside]
        batch = isinstance(body, list) or (isinstance(body, dict) and "batch" in body)
        members = expand_batch(body) if batch else None
        events: list[Event] = []
        kind, place = None, ""
        for index, member in enumerate([body] if members is None else members):
            try:
                events.append(parse_event(member, self._format))
            except EventError as exc:
                # The others are taken; found again in the dead letter, they change nothing.
                if kind is None:
                    kind, place = str(exc), "" if members is None else f"member {index}: "
        return events, kind, place


class UpdatesTopic:
    """
    A topic that updates go out to, in JSON; all of one visitor to one partition, in order.

    The key is the JSON array of workspace and anonymous id. Threads may share it.

    Args:
        servers: ``bootstrap.servers``.
        topic: Its name.
        options: Of librdkafka.

    Raises:
        ConfigurationError: An option is wrong.
    """

    def __init__(self, servers: str, topic: str, *, options: Options | None = None) -> None:
        self._writer = _Writer(servers, topic, dict(options or {}))

    def send(self, updates: Sequence[UpdateByCriteria]) -> None:
        """
        Write updates; when this returns, the cluster has them.

        The second time they are there twice, which changes no row.

        Raises:
            OutcomeUnknownError: The cluster did not take all of them in time; send them again.
            SinkError: It never will: one is too large, or the topic is refused.
        """
        self._writer.write(
            [
                (key_of(update), update.to_json().encode(), [("kind", update.kind.encode())])
                for update in updates
            ]
        )

    def look(self, seconds: float = 10.0) -> Found:
        """
        Whether the topic is there.

        Raises:
            SinkError: The cluster does not answer, or refuses.
        """
        return self._writer.look(seconds)

    def close(self) -> None:
        """Nothing waits here between two calls; the second time nothing happens."""

    def relay(
        self, graph: Graph, *, window: int = 10_000, lease: float = 60.0, destination: str = ""
    ) -> int:
        """
        Send what the outbox of a graph holds, until nothing is left to lease.

        Args:
            graph: Whose outbox.
            window: Updates that are sent at once.
            lease: How long that may take, in seconds.
            destination: For which of those that the outbox serves; where it serves one by name,
                a worker whose ``[[destinations]]`` name this topic does it all the time.

        Returns:
            The number of updates sent.

        Raises:
            SinkError: Those of `send`; the window went back to the outbox.
        """
        sent = 0
        while leased := graph.lease_updates(window, lease, destination):
            positions = [delivery.position for delivery in leased]
            try:
                self.send([delivery.update for delivery in leased])
            except BaseException as exc:
                graph.return_updates(
                    positions, type(exc).__name__, dead=False, destination=destination
                )
                raise
            graph.acknowledge(positions, destination)
            sent += len(leased)
        return sent


class UpdatesConsumer(_Topics):
    """
    Updates from topics into a sink, at least once: a worker of a destination.

    Args:
        sink: Where to.
        dead_letters: The topic for what is no update, and for updates that the sink refuses: those
            of a table that is not there, too. Send them again when it is.
        servers, topics, group, batch_size, linger, pauses, options, rejects: As of `KafkaSource`.

    Attributes:
        served: What the sink was given, as of a `recognition.delivery.Deliverer`.

    Raises:
        ConfigurationError: An option is wrong, or is decided here.
    """

    def __init__(
        self,
        servers: str,
        topics: Sequence[str],
        group: str,
        sink: Sink,
        *,
        dead_letters: str | None = None,
        batch_size: int = 10_000,
        linger: float = 1.0,
        pauses: tuple[float, float] = (1.0, 60.0),
        options: Options | None = None,
        rejects: Callable[[Reject], object] | None = None,
    ) -> None:
        super().__init__(
            servers,
            topics,
            group,
            dead_letters=dead_letters,
            batch_size=batch_size,
            linger=linger,
            pauses=pauses,
            options=options,
            rejects=rejects,
        )
        self._sink = sink
        self.served = Served()

    def run(self, stop: threading.Event) -> None:
        """
        Apply until ``stop`` is set. While the destination is away its updates wait in Kafka.

        Raises:
            SourceError: As of `KafkaSource.run`.
            SinkError: One that no retry mends, or in the place of what the sink raised that is none
                of ours; nothing of the batch is confirmed.
        """

        def handle(messages: Sequence[Any]) -> _Handled:
            updates: list[UpdateByCriteria] = []
            messages_of: dict[str, list[Any]] = {}
            dead: list[_Dead] = []
            for message in messages:
                try:
                    update = parse_update(message.value())
                except MessageError as exc:
                    dead.append(_Dead(message, "no update message", str(exc)))
                else:
                    updates.append(update)
                    messages_of.setdefault(update.id, []).append(message)
            refused = self._serve(updates) if updates else {}
            for update_id, error in refused.items():
                for message in messages_of[update_id]:
                    dead.append(_Dead(message, type(error).__name__, tell(error)))
            return _Handled(dead, partial(self._count, updates, refused))

        self._run(handle, stop)

    def _serve(self, updates: Sequence[UpdateByCriteria]) -> dict[str, Exception]:
        """Apply, and note whether the sink can."""
        served = self.served
        started = time.monotonic()
        try:
            refused = self._apply(updates)
        except Exception as exc:
            served.failures += 1
            served.failing += 1
            served.last_error = tell(exc)
            if isinstance(exc, SinkError):
                raise
            retryable = bool(getattr(exc, "retryable", False))
            raise SinkError(tell(exc), retryable=retryable) from exc
        finally:
            served.seconds += time.monotonic() - started
        served.failing = 0
        return refused

    def _count(self, updates: Sequence[UpdateByCriteria], refused: Mapping[str, Exception]) -> None:
        """A batch is done with, its dead letters written."""
        served = self.served
        served.windows += bool(updates)
        served.dead += len(refused)
        now = datetime.now(UTC)
        for update in updates:
            if update.id not in refused:
                served.updates += 1
                served.note_lag(update, now)

    def _apply(self, updates: Sequence[UpdateByCriteria]) -> dict[str, Exception]:
        """
        What is refused, and why; all others are applied.

        Of a window that the sink refuses as a whole, and would again, smaller ones find out what it
        is about: each of one table, then the halves of these. Where nothing at all can be applied,
        for want of a right for example, the error is let out and nobody is given up.
        """
        refused: dict[str, Exception] = {}
        alone: dict[str, Exception] = {}
        tries: Counter[str] = Counter()
        applied = False
        parts = [updates]
        #: Of tables of which nothing could be applied yet: for when it is known that others can.
        aside: list[Sequence[UpdateByCriteria]] = []
        while parts or (applied and aside):
            part = parts.pop() if parts else aside.pop()
            plan = plan_updates(part)
            refused |= plan.rejected
            if not plan.steps:
                continue
            try:
                done = self._sink.apply(plan)
                self.served.note_applied(done)
                refused |= done.rejected
                applied = True
            except Exception as exc:
                if getattr(exc, "retryable", False):
                    raise
                if smaller := split(part, lambda update: update.table):
                    parts += smaller
                    continue
                table = part[0].table
                alone[part[0].id] = exc
                if (lines := trace(exc)) is not None:
                    told = "group %s: an update is refused: %s"
                    _log.error(told, self.counts.group, tell(exc), exc_info=lines)
                tries[table] += 1
                if not applied and tries[table] >= REFUSED_ALONE:
                    aside += [each for each in parts if each[0].table == table]
                    parts = [each for each in parts if each[0].table != table]
        if alone and not applied:
            raise next(iter(alone.values()))
        return refused | alone


def key_of(update: UpdateByCriteria) -> bytes:
    """What all updates of one visitor have in common: the workspace and the anonymous id."""
    device = update.cause.anonymous_id
    if device is None:
        named = [each.value for each in update.where if isinstance(each, Equals)]
        # Those of nobody in particular keep their order among themselves.
        device = str(named[0]) if named else ""
    return json.dumps([update.workspace, device], separators=(",", ":")).encode()


# Writing ------------------------------------------------------------------------------------------

_Letter: TypeAlias = tuple[bytes | None, bytes | None, Sequence[tuple[str, bytes | None]]]


class _Writer:
    """Writes to one topic, and returns when the cluster has it all."""

    def __init__(self, servers: str, topic: str, options: Options) -> None:
        self._topic = topic
        self._config = {
            "client.id": "recognition",
            # As Java's clients choose a partition, so that whoever joins topics finds the same.
            "partitioner": "murmur2_random",
            "delivery.timeout.ms": 30_000,
            **options,
            "bootstrap.servers": servers,
            "enable.idempotence": True,  # in order, and once, whatever is sent again
            "error_cb": self._note,
        }
        #: What the cluster refused since it was last asked something; it is retried for ever.
        self._refused: ck.KafkaError | None = None
        self._producer = _open(ck.Producer, self._config)
        self._lock = threading.Lock()

    def _note(self, error: Any) -> None:
        _log.debug("%s", error.name())
        if error.code() in _REFUSED or error.code() == ck.KafkaError._SSL:
            self._refused = error

    def look(self, seconds: float) -> Found:
        self._refused = None
        try:
            known = self._producer.list_topics(timeout=seconds).topics
        except ck.KafkaException as exc:
            self._producer.poll(0)  # what was told of the whole client
            error = self._refused or exc.args[0]
            told = f"the cluster does not answer: {_name(error)}"
            raise (SinkUnavailableError if _passes(error) else SinkError)(told) from exc
        if self._topic in known and known[self._topic].error is None:
            number = len(known[self._topic].partitions)
            return Found(False, f"topic {self._topic}: {number} partitions")
        return Found(
            True,
            f"topic {self._topic} is not there",
            f"kafka-topics.sh --bootstrap-server {self._config['bootstrap.servers']} --create"
            f" --topic {self._topic} --partitions 8",
        )

    def write(self, letters: Sequence[_Letter]) -> None:
        taken = 0
        failed: list[Any] = []
        self._refused = None

        def delivered(error: Any, _: object) -> None:
            nonlocal taken
            if error is None:
                taken += 1
            else:
                failed.append(error)

        with self._lock:
            try:
                for key, value, headers in letters:
                    while True:
                        try:
                            self._producer.produce(
                                self._topic,
                                value,
                                key,
                                headers=list(headers),
                                on_delivery=delivered,
                            )
                            break
                        except BufferError:
                            self._producer.poll(0.1)
                        except ck.KafkaException as exc:
                            failed.append(exc.args[0])
                            break
                    self._producer.poll(0)
                # Each is delivered or given up within delivery.timeout.ms.
                self._producer.flush()
            except ck.KafkaException as exc:
                failed.append(exc.args[0])  # a fatal one: no callback is told of it
            if any(map(_is_fatal, failed)):
                # What an idempotent producer has given up, it cannot go on from.
                self._producer = _open(ck.Producer, self._config)
        if taken < len(letters):
            first = next((error for error in failed if not _passes(error)), failed[0])
            told = (
                f"{len(letters) - taken:,} of {len(letters):,} messages were not taken by Kafka:"
                f" {_name(self._refused or first)}; the others were"
            )
            if _passes(first):
                raise OutcomeUnknownError(told)
            raise SinkError(told, written=taken > 0)


def _to_letter(message: Any, reason: str) -> _Letter:
    """A message as it was, and where and why: the first two names are Bulker's."""
    headers: list[tuple[str, bytes | None]] = list(message.headers() or ())
    _, stamp = message.timestamp()
    for name, value in (
        ("error", reason[:_MAX_REASON]),
        ("original_topic", message.topic()),
        ("original_partition", message.partition()),
        ("original_offset", message.offset()),
        ("original_timestamp", stamp),
    ):
        headers.append((name, str(value).encode()))
    return message.key(), message.value(), headers


# What it all rests on -----------------------------------------------------------------------------


def _open(kind: Callable[..., Any], config: Mapping[str, Any]) -> Any:
    try:
        return kind(dict(config), logger=_log)
    except (ck.KafkaException, TypeError, ValueError) as exc:
        # Its text may hold the value.
        named = re.search(r'property:? "([\w.]+)"', str(exc))
        which = named[1] if named else "one of them"
        raise ConfigurationError(
            f"librdkafka does not take the options of Kafka: {which} is unknown or wrong; see"
            " https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md"
        ) from None


def _bounds(consumer: Any, place: Any, wait: float) -> tuple[int, int]:
    """The first offset that is there, and the one that comes next."""
    found: tuple[int, int] | None = consumer.get_watermark_offsets(place, timeout=wait)
    if found is None:
        raise ck.KafkaException(ck.KafkaError(ck.KafkaError._TIMED_OUT))
    return found


# Those of a consumer that a producer would warn of.
_CONSUMERS = re.compile(
    r"auto\.|session\.|heartbeat\.|max\.poll|fetch\.|queued\.|isolation\.|check\.crcs|group\."
    r"|partition\.assignment|enable\.partition\.eof|offset\."
)


def _for_producer(options: Options) -> Options:
    return {name: value for name, value in options.items() if not _CONSUMERS.match(name)}


def _is_read(name: str, topic: str) -> bool:
    """Whether a topic of this name is one that is subscribed to; ``^...`` is an expression."""
    try:
        return name == topic or (topic.startswith("^") and re.match(topic, name) is not None)
    except re.error:
        return False  # not one of ours; librdkafka says so, if it is none of its own


def _is_fatal(error: Any) -> bool:
    """The client is at its end; of an error that comes with a message only the code says so."""
    return bool(error.fatal()) or error.code() == ck.KafkaError._FATAL


def _ends(error: Any) -> bool:
    return error.code() in _REFUSED or _is_fatal(error)


def _passes(error: Any) -> bool:
    return error.code() not in _REFUSED and error.code() not in (
        ck.KafkaError.MSG_SIZE_TOO_LARGE,
        ck.KafkaError.INVALID_CONFIG,
    )


def _to_error(error: Any) -> SourceError:
    """Our own error for one of Kafka's: its name, which holds no value."""
    return SourceError(
        f"the consumer cannot go on: {_name(error)}; nothing that was not taken is confirmed",
        retryable=_passes(error),
    )


def _name(error: Any) -> str:
    """As librdkafka calls it, and what else is to be said; no value of anything."""
    name: str = error.name()
    if error.code() == ck.KafkaError._SSL:
        name += " (TLS is not spoken there, or a certificate was not accepted: ssl.ca.location)"
    return name


def _refuse_constant(name: str) -> Any:
    raise ValueError("NaN and Infinity are not JSON")
