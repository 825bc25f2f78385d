"""
What would keep a worker from doing its work, found before it is started.

Everything is asked of the real graph and the real destinations: an update that no row can meet is
applied to each table and undone, so that rights, columns and widths are those of the day. Nothing
is changed.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from recognition.attribution import DAY
from recognition.config import Settings, hide_password
from recognition.delivery import Channel, Destination
from recognition.errors import ConfigurationError, RecognitionError
from recognition.graph import Graph
from recognition.messages import (
    VERSION_COLUMN,
    Between,
    Criterion,
    Empty,
    Equals,
    UpdateByCriteria,
    decide_id,
)
from recognition.parts import Parts, UpdatesSource, open_kafka, open_updates, read_keys
from recognition.planner import plan_updates
from recognition.rules import Rules, Supersede
from recognition.sinks import Sink

if TYPE_CHECKING:
    from recognition.kafka import KafkaSource

#: An owner of this length has to fit: a UUID as text.
_OWNER = "00000000-0000-4000-8000-recognition0"

#: A device that no event names: its time lies before all events.
_DEVICE = "recognition check"
_BEGINNING = datetime(1, 1, 2, tzinfo=UTC)

#: Updates that wait for longer than this are nobody's.
_LONG = timedelta(hours=1)
_SKEW = timedelta(seconds=30)


class Level(StrEnum):
    """How bad it is."""

    FINE = "fine"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at (``place``), what was found, and the line that mends it."""

    level: Level
    place: str
    text: str
    fix: str = ""


def check(
    settings: Settings, parts: Parts, graph: Graph | None, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """
    Look at everything that the settings name.

    Args:
        settings: What a worker would run with.
        parts: What they name.
        graph: ``None``: there is none yet.
        environ: Where secrets are, usually ``os.environ``.
    """
    rules = parts.rules
    tables: set[str] = set()
    if settings.worker.updates is not None:
        yield _note("graph", "none is opened: a worker of updates decides nothing")
    elif graph is None:
        yield _note("graph", f"there is none yet at {hide_password(settings.graph)}")
    else:
        try:
            named = {target.name for target in parts.targets}
            yield from _check_graph(settings, rules, graph, named)
            tables = graph.tables(rules.workspace)
        except RecognitionError as exc:
            yield _wrong("graph", str(exc))
    for off in parts.off:
        yield _note(off.place, off.text, off.fix)
    yield from _check_sources(settings, environ)
    yield from _check_rejects(settings)
    for target in parts.targets:
        place = f"destination {target.name}"
        try:
            with closing(target.open()) as sink:
                if settings.worker.updates is not None:
                    served = Destination(name=target.name, sink=sink)
                    for source in open_updates(settings, environ, [served]):
                        yield from _check_topics(place, source)
                if isinstance(sink, Channel):
                    yield from _check_channel(place, sink)
                else:
                    yield from _check_sink(place, sink, rules, tables or {rules.layout.table})
        except RecognitionError as exc:
            yield _wrong(place, str(exc))


def _wrong(place: str, text: str, fix: str = "") -> Finding:
    return Finding(level=Level.WRONG, place=place, text=text, fix=fix)


def _fine(place: str, text: str) -> Finding:
    return Finding(level=Level.FINE, place=place, text=text)


def _note(place: str, text: str, fix: str = "") -> Finding:
    return Finding(level=Level.NOTE, place=place, text=text, fix=fix)


def _check_graph(
    settings: Settings, rules: Rules, graph: Graph, named: set[str]
) -> Iterator[Finding]:
    decided_with = graph.decided_with(rules.workspace)
    if decided_with is not None:
        rules.check_same(decided_with)
    yield _fine("graph", "it answers, and was decided alike")
    yield from _check_clock("graph", graph)
    days = settings.retention_days
    if days is not None:
        reach = rules.attribution.lookback / DAY
        yield _fine("graph", f"references are kept for {days} days, a claim reaches back {reach:g}")
    registered = graph.destinations()
    for name in sorted(registered.keys() - named):
        yield Finding(
            level=Level.WRONG,
            place=f"destination {name}",
            text="the outbox keeps updates for it, and it is not in the settings",
            fix=f"recognition outbox --drop {name}",
        )
    for name in sorted(registered) or [""]:
        backlog = graph.backlog(name)
        place = f"destination {name}" if name else "outbox"
        if backlog.dead:
            yield Finding(
                level=Level.WRONG,
                place=place,
                text=f"{backlog.dead:,} updates were given up",
                fix="recognition replay --list",
            )
        if backlog.oldest is not None and datetime.now(UTC) - backlog.oldest > _LONG:
            yield Finding(
                level=Level.WRONG,
                place=place,
                text=f"{backlog.waiting:,} updates wait, the oldest since"
                f" {backlog.oldest:%Y-%m-%d %H:%M} UTC: no worker delivers them",
                fix="recognition worker",
            )
        if registered.get(name) is False:
            yield _note(place, "it is not filled yet with what the graph knew before it")


def _check_clock(place: str, clocked: object) -> Iterator[Finding]:
    clock = getattr(clocked, "clock", None)
    now = None if clock is None else clock()
    if now is None:
        return
    skew = abs(now - datetime.now(UTC))
    if skew > _SKEW:
        yield _wrong(
            place,
            f"its clock and that of this machine differ by {skew.total_seconds():.0f} s",
            "timedatectl set-ntp true",
        )


# Where events come from -------------------------------------------------------------------------


def _check_sources(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    worker = settings.worker
    for name in worker.directories:
        yield from _check_directory(Path(name))
    if worker.kafka is not None:
        try:
            yield from _check_topics("worker.kafka", open_kafka(settings, environ))
        except RecognitionError as exc:
            yield _wrong("worker.kafka", str(exc))
    if worker.http is not None:
        try:
            count = len(read_keys(worker.http.keys, environ))
            yield _fine("worker.http", f"{count} write keys are let in")
            import_module("recognition.receiver")
        except RecognitionError as exc:
            yield _wrong("worker.http", str(exc))
        yield from _check_port("worker.http", worker.http.host, worker.http.port, "port = 8081")
    if worker.metrics is not None:
        host, _, port = worker.metrics.rpartition(":")
        fix = 'metrics = "127.0.0.1:9465"'
        yield from _check_port("worker.metrics", host, int(port), fix)


def _check_topics(place: str, source: KafkaSource | UpdatesSource) -> Iterator[Finding]:
    for found in source.look():
        level = Level.WRONG if found.wrong else Level.FINE
        yield Finding(level=level, place=place, text=found.text, fix=found.fix)


def _check_directory(path: Path) -> Iterator[Finding]:
    place = f"directory {path}"
    if not path.is_dir():
        yield _wrong(place, "it is not there", f"mkdir -p {path}")
        return
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield _wrong(place, "files cannot be taken from it", f"chmod u+rwx {path}")
        return
    yield _fine(place, "files can be taken from it")
    failed = path / "failed"
    count = len(list(failed.iterdir())) if failed.is_dir() else 0
    if count:
        yield _wrong(place, f"{count:,} files could not be read", f"ls {failed}")


def _check_port(place: str, host: str, port: int, fix: str) -> Iterator[Finding]:
    """Whether it can be listened on; nothing is left behind."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as exc:
        told = exc.strerror or type(exc).__name__
        if exc.errno == errno.EADDRINUSE:
            # A worker that runs is no fault; who it is, only `/healthz` or `/metrics` could tell.
            yield _note(place, f"port {port}: {told}; that is right while a worker runs", fix)
        else:
            yield _wrong(place, f"{host} port {port} cannot be listened on: {told}", fix)
        return
    yield _fine(place, f"port {port} of {host} is free")


def _check_rejects(settings: Settings) -> Iterator[Finding]:
    path = Path(settings.worker.rejects)
    place = f"rejects {path}"
    beside = path if path.exists() else path.parent
    if not os.access(beside, os.W_OK):
        yield _wrong(place, "what cannot be read could not be kept there", f"chmod u+w {beside}")
        return
    if not path.exists():
        return
    reasons: Counter[str] = Counter()
    with path.open("rb") as lines:
        for line in lines:
            try:
                reasons[str(json.loads(line)["reason"])] += 1
            except (ValueError, KeyError, TypeError):
                reasons["a line that is no reject"] += 1
    if reasons:
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
        yield _note(
            place,
            f"{reasons.total():,} events became none: {told}",
            f"mv {path} {path}.seen  # when they were looked at",
        )


# Where updates go -------------------------------------------------------------------------------


def _check_channel(place: str, channel: Channel) -> Iterator[Finding]:
    look = getattr(channel, "look", None)
    if look is None:
        yield _note(place, "this channel cannot be looked at")
        return
    found = look()
    level = Level.WRONG if found.wrong else Level.FINE
    yield Finding(level=level, place=place, text=found.text, fix=found.fix)


def _check_sink(place: str, sink: Sink, rules: Rules, tables: set[str]) -> Iterator[Finding]:
    for table in sorted(tables):
        at = f"{place}, table {table}"
        try:
            plan = plan_updates([_probe(rules, table)])
        except ConfigurationError as exc:
            yield _wrong(at, str(exc))
            continue
        rehearse = getattr(sink, "rehearse", None)
        if rehearse is None:
            sink.compile(plan.steps[0])
            yield _note(at, "this sink cannot try an update out; the table was not looked at")
            continue
        rejected = rehearse(plan).rejected
        for _, error in rejected:
            # Its text ends in what would mend it, where that is one command.
            yield _wrong(at, str(error))
        if not rejected:
            yield _fine(at, "an update of the shape that is decided can be applied")
            column = rules.layout.columns_of(table).anonymous_id
            missing_index = getattr(sink, "missing_index", None)
            if missing_index is not None and (command := missing_index(table, column)):
                yield _note(
                    at,
                    f"no index begins with {column}: every window reads the whole table",
                    command,
                )
            for advice in getattr(sink, "advice", lambda step: ())(plan.steps[0]):
                yield _note(at, advice)
        for mutation, failure in getattr(sink, "unfinished", lambda table: ())(table):
            why = f" and fails with {failure}" if failure else ""
            level = Level.WRONG if failure else Level.NOTE
            yield Finding(
                level=level,
                place=at,
                text=f"the mutation {mutation} is not done{why}; updates wait for it",
                fix=f"KILL MUTATION WHERE mutation_id = '{mutation}'" if failure else "",
            )
    yield from _check_clock(place, sink)


def _probe(rules: Rules, table: str) -> UpdateByCriteria:
    """An update of the shape that decisions make, which no row meets."""
    columns = rules.layout.columns_of(table)
    target = rules.target_of(table)
    values = rules.values_of(table, _OWNER, ["x"] * len(rules.traits))
    criteria: list[Criterion] = [
        Equals(column=columns.anonymous_id, value=_DEVICE),
        Between(column=columns.time, start=_BEGINNING, end=_BEGINNING + timedelta(microseconds=1)),
    ]
    if not rules.has_own_column or rules.supersede_of(table) is Supersede.VERSION:
        criteria.append(Empty(column=target))
    if rules.supersede_of(table) is Supersede.VERSION:
        values[VERSION_COLUMN] = 0
    return UpdateByCriteria(
        id=decide_id(rules.workspace, table, values, criteria, 0),
        workspace=rules.workspace,
        table=table,
        set=values,
        where=tuple(criteria),
        sequence=0,
        expected_rows=0,
        created_at=datetime.now(UTC),
    )
