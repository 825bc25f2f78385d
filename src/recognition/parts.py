"""
The parts that the settings name, for every command alike: rules, formats, destinations, sources.

Whether a destination stands in our own settings or in Bulker's configuration is known here and
nowhere behind. Nothing is opened before it is asked for; a source's driver is imported where the
settings want that source, and not else.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recognition.attribution import DAY
from recognition.config import (
    BulkerTable,
    DestinationTable,
    Settings,
    build_format,
    build_rules,
    hide_password,
    read_secret,
    with_identifiers,
)
from recognition.delivery import Channel, Destination
from recognition.errors import ConfigurationError, GraphError, SinkError
from recognition.events import Event, Format, Reject
from recognition.graph import Graph
from recognition.rules import Rules
from recognition.sinks import Sink, open_sink
from recognition.worker import Directory, Source, Worker

if TYPE_CHECKING:
    from recognition.bulker import Stream
    from recognition.kafka import KafkaSource, UpdatesConsumer

_HOUR = DAY // 24

#: Bulker writes its stream mode's rows one by one, but by way of Kafka: never in no time.
_LEAST_SETTLE = 60.0

#: An hour longer than `recognition.bulker.Stream.RETRIED_FOR`.
_RETRIED_HOURS = 38.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A destination that the settings name; not opened yet. Its ``repr`` holds no secret."""

    name: str
    #: As it may be shown.
    shown: str
    open: Callable[[], Sink | Channel] = field(repr=False)
    #: In seconds, see `recognition.delivery.Destination`.
    settle: float
    again: float = 0.0
    #: What to know about it, a sentence each.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Off:
    """What is off or left out because of the settings, and the line that turns it on."""

    place: str
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that the settings name, but for the graph."""

    rules: Rules
    format: Format | Mapping[str, Format]
    targets: tuple[Target, ...]
    #: Whether an event is remembered; ``None``: all are.
    remembers: Callable[[Event], bool] | None
    off: tuple[Off, ...]

    def destinations(self, settings: Settings) -> Iterator[Destination]:
        """The targets, opened one by one; whoever takes one closes its sink."""
        given = settings.delivery
        for target in self.targets:
            yield Destination(
                name=target.name,
                sink=target.open(),
                window=given.window,
                settle=target.settle,
                reapply_all=given.reapply == "all",
                again=target.again,
            )


def read_parts(settings: Settings, environ: Mapping[str, str], *, stamps: bool = False) -> Parts:
    """
    What the settings name. It reads Bulker's configuration, where they name one, and no other file.

    Args:
        settings: What was read.
        environ: Usually ``os.environ``.
        stamps: As for `recognition.config.build_rules`.

    Raises:
        ConfigurationError: Settings contradict each other or Bulker's configuration.
    """
    rules, format = build_rules(settings, stamps=stamps), build_format(settings)
    targets = [_target(settings, environ, table) for table in settings.destinations]
    off: list[Off] = []
    remembers = None
    if settings.bulker is not None:
        stream, found = _read_bulker(settings, settings.bulker, environ, off)
        targets += found
        rules, format = _follow(settings, stream, rules, stamps=stamps)
        if stream.event_types is not None:
            remembers = stream.remembers
            types = ", ".join(sorted(stream.event_types))
            off.append(
                Off(
                    place="bulker",
                    text=f"anonymous events of other types than {types} are not remembered, as"
                    " eventTypes of its user recognition says",
                )
            )
    elif not targets and settings.sink is not None:
        url, options = settings.sink, settings.sink_options
        targets.append(
            Target(
                name="default",
                shown=hide_password(url),
                open=partial(open_sink, url, **options),
                settle=settings.delivery.settle_seconds,
                again=(settings.delivery.again_hours or 0) * 3600,
            )
        )
    names = [target.name for target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"two destinations have the name {', '.join(twice)}. Nothing was written."
        )
    days = settings.retention_days
    if days is not None and rules.attribution.lookback > days * DAY:
        raise ConfigurationError(
            f"retention_days is {days}, and a claim reaches back"
            f" {rules.attribution.lookback / DAY:g} days: it could not reach the rows whose"
            " references are dropped. Nothing was written."
        )
    return Parts(
        rules=rules,
        format=format,
        targets=tuple(targets),
        remembers=remembers,
        off=(*off, *_off(settings, targets)),
    )


def _off(settings: Settings, targets: Sequence[Target]) -> Iterator[Off]:
    worker, settle = settings.worker, "settle_seconds = 600"
    if worker.metrics is None:
        yield Off(
            place="worker", text="metrics are served nowhere", fix='metrics = "127.0.0.1:9464"'
        )
    if worker.updates is not None:
        yield Off(
            place="worker.updates",
            text="no events are taken in, and updates are applied once: rows must come before them",
        )
        if worker.updates.dead_letters is None:
            yield _no_letters("worker.updates", worker.rejects, "updates-dead")
        unread = [f"delivery.{name}" for name in sorted(settings.delivery.model_fields_set)]
        unread += [
            f"worker.{x}" for x in ("future_hours", "past_days") if x in worker.model_fields_set
        ]
        unread += ["retention_days"] if settings.retention_days is not None else []
        unread += [
            f"destinations.{table.name}.settle_seconds"
            for table in settings.destinations
            if table.settle_seconds is not None
        ]
        if unread:
            yield Off(
                place="worker.updates",
                text=f"a worker of updates does not look at {', '.join(unread)}",
            )
        return
    if not targets:
        yield Off(
            place="destinations", text="none is set: updates stay in the graph's outbox",
            fix='[[destinations]] name = "warehouse" url = "postgresql://..."',
        )  # fmt: skip
    if not worker.directories:
        yield Off(place="worker", text="no directory of events is set", fix='directories = "in"')
    if worker.kafka is None:
        yield Off(
            place="worker", text="no events are taken from Kafka",
            fix='[worker.kafka] servers = "kafka:9092" topics = "events"',
        )  # fmt: skip
    elif worker.kafka.dead_letters is None:
        yield _no_letters("worker.kafka", worker.rejects, "events-dead")
    if worker.http is None:
        yield Off(
            place="worker", text="no port for events is opened",
            fix='[worker.http] keys = "env:WRITE_KEYS"',
        )  # fmt: skip
    if not worker.future_hours:
        yield Off(
            place="worker", text="events from the future are taken", fix="future_hours = 24"
        )  # fmt: skip
    if not worker.past_days:
        yield Off(place="worker", text="events of any age are taken", fix="past_days = 3650")
    if settings.retention_days is None:
        yield Off(
            place="graph", text="message references are kept for good", fix="retention_days = 400"
        )
    for target in targets:
        if not target.settle:
            yield Off(
                place=f"destination {target.name}",
                text="settling is off: rows must come before their updates",
                fix=settle,
            )
        for note in target.notes:
            yield Off(place=f"destination {target.name}", text=note)


def _no_letters(place: str, rejects: str, topic: str) -> Off:
    return Off(
        place=place,
        text=f"no topic of dead letters: they are added to {rejects}",
        fix=f'dead_letters = "{topic}"',
    )


def _target(settings: Settings, environ: Mapping[str, str], table: DestinationTable) -> Target:
    options: dict[str, Any] = {**table.options, **_read_secrets(table.secrets, environ)}
    settle = table.settle_seconds
    opening: Callable[[], Sink | Channel] = partial(open_sink, table.url, **options)
    if table.url.startswith("kafka:"):
        opening = partial(_open_topic, table.name, table.url, options)
    return Target(
        name=table.name,
        shown=hide_password(table.url),
        open=opening,
        settle=settings.delivery.settle_seconds if settle is None else settle,
        again=(settings.delivery.again_hours or 0) * 3600,
    )


def _open_topic(name: str, url: str, options: Mapping[str, Any]) -> Channel:
    from recognition.kafka import UpdatesTopic

    found = re.fullmatch(r"kafka://([^/@?]+)/([A-Za-z0-9._-]+)", url)
    if found is None:
        raise ConfigurationError(
            f"destination {name}: a topic is written kafka://host:9092/topic, with several hosts"
            " where there are commas between them; user and password are options and secrets"
        )
    return UpdatesTopic(found[1], found[2], options=options)


# Bulker -----------------------------------------------------------------------------------------


def _read_bulker(
    settings: Settings, table: BulkerTable, environ: Mapping[str, str], off: list[Off]
) -> tuple[Stream, list[Target]]:
    from recognition.bulker import Destinations, read_destinations

    source, prefix = table.source, "BULKER_DESTINATION_"
    if source.startswith("env://"):
        prefix = source.removeprefix("env://").rstrip("_") + "_"
    read = read_destinations(
        None if source.startswith("env://") else source,
        environ,
        prefix=prefix,
        skip_unsupported=table.skip_unsupported or bool(table.destinations),
    )
    known = dict(read.known)
    if table.destinations:
        missing = [name for name in table.destinations if name not in known]
        if missing:
            skipped = dict(read.skipped)
            told = [f"{name} ({skipped[name]})" if name in skipped else name for name in missing]
            raise ConfigurationError(
                f"bulker.destinations names {', '.join(told)}; those that can be updated are"
                f" {', '.join(known) or 'none'}. Nothing was written."
            )
        known = {name: known[name] for name in table.destinations}
    for name, kind in read.skipped:
        off.append(
            Off(place="bulker", text=f"{name} is left out: nothing of the type {kind} is updated")
        )
    stream = Destinations(known=known).stream()
    settle = settings.delivery.settle_seconds
    if "settle_seconds" not in settings.delivery.model_fields_set:
        # As Bulker's own batches are slow.
        settle = max(_LEAST_SETTLE, 2 * stream.batch_period)
    targets = []
    for name, each in known.items():
        notes = list(each.notes)
        hours = settings.delivery.again_hours
        if hours is None:
            hours = _RETRIED_HOURS if each.stream.deduplicate else 0.0
        elif each.stream.deduplicate and hours * 3600 <= stream.RETRIED_FOR:
            notes.append(
                f"a row that Bulker tries again up to {stream.RETRIED_FOR / 3600:.0f} hours later"
                " replaces the recognised one, and again_hours is shorter"
            )
        targets.append(
            Target(
                name=_to_name(name),
                shown=f"{name} of Bulker, {each.type}",
                open=each.open,
                settle=settle,
                again=hours * 3600,
                notes=tuple(notes),
            )
        )
    return stream, targets


def _to_name(id: str) -> str:
    """A destination of Bulker by a name that the graph takes; the same id gives the same name."""
    return re.sub(r"[^a-z0-9_-]", "_", id.lower()).lstrip("-")[:63] or "_"


def _follow(
    settings: Settings, stream: Stream, own: Rules, *, stamps: bool
) -> tuple[Rules, Mapping[str, Format] | Format]:
    """The rules and formats of the stream; what the settings say themselves stands above it."""
    said = settings.model_fields_set
    rules = replace(stream.rules(own), stamps=stamps)
    if "layout" in said:
        rules = replace(rules, layout=own.layout)
    if "lookback_days" in said:
        rules = replace(rules, attribution=own.attribution)
    read = build_format(settings)
    if "format" in said or isinstance(read, Format):
        return rules, read
    form = stream.format
    return rules, {**read, form.label: with_identifiers(form, settings)}


# Sources ----------------------------------------------------------------------------------------


def bound_times(
    format: Format | Mapping[str, Format], settings: Settings
) -> Format | Mapping[str, Format]:
    """The same formats, which refuse what a worker's settings say is too far away."""
    ahead, behind = settings.worker.future_hours, settings.worker.past_days

    def bound(form: Format) -> Format:
        return replace(
            form,
            ahead=round(ahead * _HOUR) if ahead else None,
            behind=round(behind * DAY) if behind else None,
        )

    if isinstance(format, Format):
        return bound(format)
    return {label: bound(form) for label, form in format.items()}


def open_sources(
    settings: Settings,
    environ: Mapping[str, str],
    worker: Worker,
    graph: Graph,
    *,
    format: Format | Mapping[str, Format],
    directories: Iterable[Path],
    once: bool,
    metrics: Callable[[], str] | None,
) -> Iterator[Source]:
    """
    The sources that the settings name; none of them reads or listens before it is run.

    Args:
        settings: What was read.
        environ: Where secrets are.
        worker: Whose sources they will be: it gets the rejects.
        graph: Whether it answers is whether the port is ready.
        format: How events are written.
        directories: Of event files.
        once: Only what comes to an end: directories.
        metrics: What the port shows at ``/metrics``.

    Raises:
        ConfigurationError: A directory or a secret is not there.
        MissingDependencyError: A driver is not installed.
    """
    for directory in directories:
        yield Directory(
            directory,
            format=format,
            rejects=worker.reject,
            batch_size=settings.batch_size,
            once=once,
        )
    if settings.worker.kafka is not None and not once:
        yield open_kafka(settings, environ, format=format, rejects=worker.reject)
    http = settings.worker.http
    if http is not None and not once:
        from recognition.receiver import Receiver

        def ready() -> bool:
            try:
                graph.destinations()
            except GraphError:
                return False
            return True

        yield Receiver(
            read_keys(http.keys, environ),
            host=http.host,
            port=http.port,
            origins=http.origins,
            max_body=http.max_body_bytes,
            max_waiting=http.max_waiting_bytes,
            patience=http.patience_seconds,
            batch_size=settings.batch_size,
            rejects=worker.reject,
            ready=ready,
            metrics=metrics,
        )


def open_kafka(
    settings: Settings,
    environ: Mapping[str, str],
    *,
    format: Format | Mapping[str, Format] | None = None,
    rejects: Callable[[Reject], object] | None = None,
) -> KafkaSource:
    """The source of `[worker.kafka]`, which must be there."""
    from recognition.kafka import KafkaSource

    table = settings.worker.kafka
    assert table is not None
    return KafkaSource(
        table.servers,
        table.topics,
        table.group,
        format=format,
        inside=table.inside,
        dead_letters=table.dead_letters,
        batch_size=table.batch_size,
        linger=table.linger_seconds,
        options={**table.options, **_read_secrets(table.secrets, environ)},
        rejects=rejects,
    )


class UpdatesSource:
    """
    The updates of topics, as a source of a worker: what one destination does not take holds no
    other up, and is tried again, with pauses, until somebody has mended it.
    """

    def __init__(self, name: str, consumer: UpdatesConsumer) -> None:
        self.name = name
        self.consumer = consumer
        self.measures = consumer.measures
        self.look = consumer.look

    def run(self, take: object, stop: threading.Event) -> None:
        """See `recognition.worker.Source`; no events are taken."""
        del take
        try:
            self.consumer.run(stop)
        except SinkError as exc:
            raise SinkError(f"destination {self.name}: {exc}", retryable=True) from exc


def open_updates(
    settings: Settings,
    environ: Mapping[str, str],
    destinations: Iterable[Destination],
    *,
    rejects: Callable[[Reject], object] | None = None,
) -> Iterator[UpdatesSource]:
    """
    A source of `[worker.updates]`, which must be there, for each of the destinations.

    Raises:
        ConfigurationError: A destination is a topic itself, or a secret is not there.
        MissingDependencyError: A driver is not installed.
    """
    from recognition.kafka import UpdatesConsumer

    table = settings.worker.updates
    assert table is not None
    options = {**table.options, **_read_secrets(table.secrets, environ)}
    for destination in destinations:
        if isinstance(destination.sink, Channel):
            raise ConfigurationError(
                f"destination {destination.name} is a topic: a worker of updates applies them to"
                " databases"
            )
        yield UpdatesSource(
            destination.name,
            UpdatesConsumer(
                table.servers,
                table.topics,
                f"{table.group}-{destination.name}",
                destination.sink,
                dead_letters=table.dead_letters,
                batch_size=table.batch_size,
                linger=table.linger_seconds,
                options=options,
                rejects=rejects,
            ),
        )


def _read_secrets(places: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: read_secret(place, environ) for name, place in places.items()}


def read_keys(place: str, environ: Mapping[str, str]) -> list[str]:
    """The write keys at a place: words with blanks, commas or line ends between them."""
    return [key for key in re.split(r"[\s,]+", read_secret(place, environ)) if key]
