"""
What would keep a worker from doing its work, found before it is started.

Everything is asked of the real graph and the real destinations: an update that no row can meet is
applied to each table and undone, so that rights, columns and widths are those of the day. Nothing
is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from recognition.config import Settings, hide_password
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
from recognition.planner import plan_updates
from recognition.rules import Rules, Supersede
from recognition.sinks import Sink, open_sink

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


def check(settings: Settings, rules: Rules, graph: Graph | None) -> Iterator[Finding]:
    """
    Look at everything that the settings name.

    Args:
        settings: What a worker would run with.
        rules: What it would decide with.
        graph: ``None``: there is none yet.
    """
    named = {destination.name: destination.url for destination in settings.destinations}
    if not named and settings.sink is not None:
        named = {"default": settings.sink}
    tables: set[str] = set()
    if graph is None:
        yield _note("graph", f"there is none yet at {hide_password(settings.graph)}")
    else:
        try:
            yield from _check_graph(settings, rules, graph, set(named))
            tables = graph.tables(rules.workspace)
        except RecognitionError as exc:
            yield Finding(level=Level.WRONG, place="graph", text=str(exc))
    if not named:
        yield _note("destinations", "none is set: updates stay in the graph's outbox")
    if not settings.worker.directories:
        yield _note("worker", "no directory of events is set")
    if settings.worker.metrics is None:
        yield _note("worker", "metrics are served nowhere", 'metrics = "127.0.0.1:9464"')
    if settings.retention_days is None:
        yield _note("graph", "message references are kept for good", "retention_days = 400")
    if named and not settings.delivery.settle_seconds:
        yield _note("delivery", "settling is off: rows must come before their updates")
    for name, url in named.items():
        place = f"destination {name}"
        try:
            with closing(open_sink(url)) as sink:
                yield from _check_sink(place, sink, rules, tables or {rules.layout.table})
        except RecognitionError as exc:
            yield Finding(level=Level.WRONG, place=place, text=str(exc))


def _note(place: str, text: str, fix: str = "") -> Finding:
    return Finding(level=Level.NOTE, place=place, text=text, fix=fix)


def _check_graph(
    settings: Settings, rules: Rules, graph: Graph, named: set[str]
) -> Iterator[Finding]:
    decided_with = graph.decided_with(rules.workspace)
    if decided_with is not None:
        rules.check_same(decided_with)
    yield Finding(level=Level.FINE, place="graph", text="it answers, and was decided alike")
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


def _check_sink(place: str, sink: Sink, rules: Rules, tables: set[str]) -> Iterator[Finding]:
    for table in sorted(tables):
        at = f"{place}, table {table}"
        try:
            plan = plan_updates([_probe(rules, table)])
        except ConfigurationError as exc:
            yield Finding(level=Level.WRONG, place=at, text=str(exc))
            continue
        rehearse = getattr(sink, "rehearse", None)
        if rehearse is None:
            sink.compile(plan.steps[0])
            yield _note(at, "this sink cannot try an update out; the table was not looked at")
            continue
        rejected = rehearse(plan).rejected
        for _, error in rejected:
            # Its text ends in what would mend it, where that is one command.
            yield Finding(level=Level.WRONG, place=at, text=str(error))
        if not rejected:
            yield Finding(level=Level.FINE, place=at, text="an update was applied and undone")
            column = rules.layout.columns_of(table).anonymous_id
            if command := sink.missing_index(table, column):  # type: ignore[attr-defined]
                yield Finding(
                    level=Level.NOTE,
                    place=at,
                    text=f"no index begins with {column}: every window reads the whole table",
                    fix=command,
                )
    clock = getattr(sink, "clock", None)
    if clock is not None and (now := clock()) is not None:
        skew = abs(now - datetime.now(UTC))
        if skew > _SKEW:
            yield Finding(
                level=Level.WRONG,
                place=place,
                text=f"its clock and that of this machine differ by {skew.total_seconds():.0f} s",
                fix="timedatectl set-ntp true",
            )


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
