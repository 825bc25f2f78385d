"""
The command `recognition`: arguments in, results to stdout, talk and progress to stderr.

It decides nothing: who owns what is decided by the recognizer, which statement is sent by the sink.
Exit code 0: all done; 1: some events or updates were rejected, or what was asked for is not there;
2: wrong usage or configuration; 3: an engine failed, and what was written is said.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import import_module
from itertools import islice
from pathlib import Path
from shutil import which
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar, cast

import recognition
from recognition.attribution import BEGINNING, DAY, END, Policy
from recognition.config import (
    Settings,
    build_bots,
    hide_password,
    hide_secrets,
    load_settings,
    render_reference,
)
from recognition.delivery import Deliverer, Destination, Served, deliver
from recognition.demo import generate_events
from recognition.errors import (
    ConfigurationError,
    InputError,
    MessageError,
    MissingDependencyError,
    RecognitionError,
)
from recognition.events import Identifier, Reject, RejectsFile, read_events, render_time
from recognition.graph import Explanation, Graph, initialise_graph, open_graph
from recognition.identity import ANONYMOUS
from recognition.layouts import LAYOUTS, Row
from recognition.messages import VERSION_COLUMN, UpdateByCriteria, json_schema, read_updates
from recognition.parts import Parts, bound_times, open_sources, open_updates, read_parts
from recognition.planner import Plan, plan_updates
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import Rules, Supersede
from recognition.sinks import Applied, Sink, installed_schemes, open_sink
from recognition.worker import Worker

if TYPE_CHECKING:
    from io import BufferedReader

_log = logging.getLogger("recognition.cli")

_DONE, _REJECTED, _WRONG, _FAILED = 0, 1, 2, 3
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # 128 + the signal's number, as shells have it

#: How many rejects are listed; all of them are counted, and all are in the rejects file.
_LISTED = 20

#: What `recognition.graph.rendering` makes of a picture.
_SHOWN_AS = ("text", "json", "mermaid", "dot", "html")

#: How many updates wait in the outbox before they are applied while events still come.
_WINDOW = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, never raises for anything but a wrong usage."""
    arguments = _build_parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the results has enough; nothing more is written, at the exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        _say(arguments, "stopped; what was reported done is done, the same command goes on")
        return _INTERRUPTED
    except RecognitionError as error:
        if arguments.traceback:
            raise
        print(_tell(error), file=sys.stderr)
        wrong = isinstance(error, ConfigurationError | InputError) and not error.written
        return _WRONG if wrong else _FAILED
    except Exception as error:
        if arguments.traceback:
            raise
        # Its text is not shown: nobody knows what is in it.
        print(
            f"recognition: {type(error).__name__}: this is a fault of recognition itself;"
            " --traceback shows where. Nothing that was reported done is lost.",
            file=sys.stderr,
        )
        return _FAILED
    return code


# ------------------------------------------------------------------------------------- arguments


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recognition",
        description="Retroactive user recognition: when a visitor is identified, the earlier rows"
        " follow.",
        epilog="Exit codes: 0 all done; 1 some events or updates were rejected, or not found;"
        " 2 wrong usage or configuration; 3 an engine failed.",
    )
    parser.add_argument(
        "--version", action="version", version=f"recognition {recognition.__version__}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, *groups: str
    ) -> argparse.ArgumentParser:
        parents = [_common(), *(_GROUPS[group]() for group in groups)]
        found = commands.add_parser(name, help=help, description=help, parents=parents)
        found.set_defaults(command=run)
        return found

    demo = command("demo", _demo, "Make events, run them, and show what changed.")
    demo.add_argument(
        "--dir",
        type=Path,
        default=Path("recognition-demo"),
        metavar="DIR",
        help="where its files go",
    )
    demo.add_argument(
        "--visitors", type=_positive, default=3000, metavar="N", help="how many are made up"
    )
    demo.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same number gives the same events"
    )
    demo.add_argument(
        "--sink", choices=("sqlite", "duckdb"), default="sqlite", help="which database is made"
    )

    run = command(
        "run", _run, "Take events in, and bring the sink's rows up to date.", "graph", "events"
    )
    run.add_argument(
        "--show-sql", action="store_true", help="print the statements that were sent, too"
    )
    command(
        "plan",
        _plan,
        "The same as run, over a graph that forgets: print updates and SQL, write nothing.",
        "graph",
        "events",
    )
    apply = command("apply", _apply, "Apply update messages (NDJSON) to a sink.", "sink")
    apply.add_argument("updates", nargs="+", metavar="UPDATES", help="files; - is stdin")
    apply.add_argument("--show-sql", action="store_true", help="print the statements, too")

    worker = command(
        "worker",
        _worker,
        "Take events in and bring updates to the destinations, until it is told to stop.",
        "graph",
        "sink",
    )
    worker.add_argument(
        "--directory", action="append", type=Path, metavar="DIR", help="take event files from here"
    )
    worker.add_argument(
        "--once", action="store_true", help="end when there is nothing left that can be done now"
    )
    worker.add_argument("--format", metavar="NAME", help="how events are written")
    worker.add_argument(
        "--log", choices=("text", "json"), default="text", help="how logs are written to stderr"
    )
    worker.add_argument("--metrics", metavar="HOST:PORT", help="serve metrics to Prometheus")
    replay = command(
        "replay", _replay, "Send dead letters again, or list them with --list.", "graph"
    )
    replay.add_argument("--list", action="store_true", help="list them and send nothing")
    replay.add_argument("--destination", metavar="NAME", help="of this destination only")
    outbox = command("outbox", _outbox, "Show what each destination has not done yet.", "graph")
    outbox.add_argument("--drop", metavar="NAME", help="forget one, and what it has not done")

    command(
        "check", _check, "Look for what would keep a worker from doing its work.", "graph", "sink"
    )

    explain = command("explain", _explain, "Why does this belong to this person?", "graph")
    explain.add_argument("subject", metavar="SUBJECT", help="a message id, or TYPE:VALUE")
    forget = command("forget", _forget, "Erase a person; its rows become unknown.", "graph", "sink")
    forget.add_argument("identifier", metavar="TYPE:VALUE", help="a bare value is a user_id")
    unlink = command(
        "unlink", _unlink, "Part two identifiers, or a device and one, for good.", "graph", "sink"
    )
    unlink.add_argument("one", metavar="TYPE:VALUE", help="a device, or a known identifier")
    unlink.add_argument("other", metavar="TYPE:VALUE", help="a known identifier")
    release = command(
        "release", _release, "Take a device from everybody, up to now.", "graph", "sink"
    )
    release.add_argument("anonymous_id", metavar="ANONYMOUS_ID", help="the device")
    command("stats", _stats, "Count what the graph holds.", "graph")
    _add_graph_commands(
        commands.add_parser(
            "graph",
            help="Make, check, count, show, move or compact a graph.",
            description="Make, check, count, show, move or compact a graph. Every command takes"
            " --json and --quiet.",
        )
    )
    command("schema", _schema, "Print the JSON schema of the update message.")
    command("sinks", _sinks, "List the sinks that are installed.")
    config = command("config", _config, "Print the settings in force.", "graph", "sink")
    config.add_argument(
        "--reference", action="store_true", help="print all settings and what they mean"
    )
    return parser


def _add_graph_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        help: str,
        graph: Callable[[], argparse.ArgumentParser] = _graph_url,
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=help, description=help, parents=[_common(), graph()])
        found.set_defaults(command=run)
        return found

    init = command("init", _graph_init, "Make what the graph needs; what is there is left alone.")
    init.add_argument("--sharded", action="store_true", help="spread it over a cluster's shards")
    init.add_argument("--print", action="store_true", help="say what would be done, and do nothing")
    command("check", _graph_check, "Read all of the graph, and list what is wrong with it.")
    command("stats", _stats, "Count what the graph holds.")
    show = command(
        "show",
        _graph_show,
        "Show an identifier: its person, the links, the devices, and who owned them when.",
        _graph_arguments,
    )
    show.add_argument("identifier", metavar="TYPE:VALUE", help="a bare value is a user_id")
    show.add_argument(
        "--format",
        choices=_SHOWN_AS,
        dest="shown_as",
        help="default: text; html is a page of its own; --json is the same as json",
    )
    show.add_argument(
        "--limit",
        type=_positive,
        default=50,
        metavar="N",
        help="the most that is shown of each kind, default 50; what is left out is told",
    )
    show.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="- is stdout, the default"
    )
    export = command("export", _graph_export, "Write all that the graph holds as NDJSON.")
    export.add_argument(
        "-o", "--output", metavar="FILE", default="-", help="compressed if it ends in .gz; - is"
        " stdout, the default",
    )  # fmt: skip
    import_ = command("import", _graph_import, "Fill an empty graph with an exported one.")
    import_.add_argument("file", metavar="FILE", help="NDJSON, also gzip; - is stdin")
    import_.add_argument(
        "--restart", action="store_true", help="begin anew where an import was not finished"
    )
    import_.add_argument(
        "--restored",
        action="store_true",
        help="it is a backup, and updates were delivered since: numbers go on far beyond theirs",
    )
    command("compact", _graph_compact, "Drop what nothing needs any more; give its space back.")


def _common() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", action="store_true", help="one JSON document to stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress, no talk")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings, default: recognition.toml"
    )
    return parser


def _graph_url() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--graph", metavar="URL", help="what is remembered, default: sqlite:///recognition.db"
    )
    return parser


def _graph_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_graph_url()])
    parser.add_argument("--workspace", metavar="NAME", help="the isolation key")
    parser.add_argument(
        "--policy",
        choices=[policy.value for policy in Policy],
        help="who owns the events of a shared device",
    )
    parser.add_argument("--layout", metavar="NAME", help=f"where rows live: {', '.join(LAYOUTS)}")
    parser.add_argument(
        "--target-column", metavar="COLUMN", help="receives the owner; default: the user column"
    )
    parser.add_argument(
        "--lookback-days", type=int, metavar="N", help="how far back a claim reaches"
    )
    return parser


def _sink_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--sink", metavar="URL", help="where the rows are: sqlite:///warehouse.db")
    return parser


def _event_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, parents=[_sink_arguments()])
    parser.add_argument(
        "events", nargs="+", metavar="EVENTS", help="NDJSON or CSV files, also gzip; - is stdin"
    )
    parser.add_argument(
        "--load", action="store_true", help="create the tables and write the rows, too"
    )
    parser.add_argument("--format", metavar="NAME", help="how events are written")
    parser.add_argument("--traits", metavar="NAMES", help="traits to write beside the user: a,b")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="events in one step of the graph"
    )
    parser.add_argument(
        "--rejects",
        type=Path,
        metavar="FILE",
        help="what cannot be read; run's default: rejects.ndjson",
    )
    return parser


_GROUPS = {"graph": _graph_arguments, "sink": _sink_arguments, "events": _event_arguments}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {key: value for key, value in vars(arguments).items() if key in Settings.model_fields}
    return load_settings(given, os.environ, arguments.config)


# ---------------------------------------------------------------------------------- run and plan


@dataclass(slots=True)
class _Tally:
    """What happened so far; numbers of things."""

    events: int = 0
    rejected: int = 0
    bots: int = 0
    anonymous: int = 0
    identified: int = 0
    blocked: int = 0
    claims: int = 0
    links: int = 0
    conflicts: int = 0
    stamped: int = 0
    rows_loaded: int = 0
    updates: int = 0
    updates_applied: int = 0
    updates_rejected: int = 0
    rows_matched: int = 0
    rows_changed: int = 0
    statements: int = 0

    def count(self, batch: Recognition, *, stamps: bool) -> None:
        self.events += len(batch.events)
        self.bots += batch.bots
        self.anonymous += batch.anonymous
        self.identified += batch.identified
        self.blocked += batch.blocked
        self.claims += batch.claims
        self.links += batch.links
        self.conflicts += batch.conflicts
        self.stamped += batch.stamped if stamps else 0
        self.updates += batch.updates


class _Way:
    """One way from files to rows, with its count: `run`, `plan` and `demo` take it."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        settings: Settings,
        stack: ExitStack,
        open_graph: Callable[[], Graph],
    ) -> None:
        self.tally = _Tally()
        #: The statements that were sent, each with how often.
        self.sql: Counter[str] = Counter()
        #: The first `_LISTED` rejects, as they are told.
        self.rejects: list[str] = []
        self._arguments = arguments
        self._settings = settings
        self._delivered = 0
        # What can be wrong is looked at before the graph is opened, which may make a file.
        parts = read_parts(settings, os.environ, stamps=arguments.load)
        self._format, bots = parts.format, build_bots(settings)
        self.sink = _open_sink(settings, stack)
        self.graph = stack.enter_context(closing(open_graph()))
        self.recognizer = Recognizer(self.graph, parts.rules, bots=bots, remembers=parts.remembers)

    @property
    def code(self) -> int:
        return _REJECTED if self.tally.rejected or self.tally.updates_rejected else _DONE

    def take_in(self, rejects: Callable[[Reject], object] | None) -> Iterator[Recognition]:
        """Read all sources and yield each batch as the graph has decided it."""

        def reject(found: Reject) -> None:
            self.tally.rejected += 1
            member = "" if found.index is None else f"[{found.index}]"
            self._list(f"{found.source}:{found.line}{member}: {found.reason}")
            if rejects is not None:
                rejects(found)

        with _Progress(self._arguments, self._arguments.events, "events") as progress:
            events = progress.read(
                lambda source: read_events(source, format=self._format, rejects=reject)
            )
            while batch := list(islice(events, self._settings.batch_size)):
                decided = self.recognizer.process(batch)
                self.tally.count(decided, stamps=self.recognizer.rules.stamps)
                progress.show(self.tally.events)
                yield decided

    def carry(self, rejects: Callable[[Reject], object]) -> None:
        """Everything from the files to the rows; an error on the way says how far it came."""
        try:
            for decided in self.take_in(rejects):
                self.write(decided)
            self.deliver()
        except RecognitionError as error:
            tally = self.tally
            if tally.events:
                error.add_note(
                    f"Before it, {tally.events:,} events went into the graph, {tally.rows_loaded:,}"
                    f" rows were loaded and {tally.updates_applied:,} updates applied, which"
                    f" changed {tally.rows_changed:,} rows. That is durable. The same command goes"
                    " on from there and does nothing twice."
                )
            raise

    def write(self, decided: Recognition) -> None:
        """Load a batch's rows, where that is asked for, and apply updates when many wait."""
        if self._arguments.load and self.sink is not None:
            # What `flushed` is going to compare: no bots, and no rows that name their user where
            # that is the column to be written.
            own = self.recognizer.rules.has_own_column
            seen = decided.receipt.observations
            stamped = {o.message_id for o in seen if own or not o.names_user}
            for table, rows in self.recognizer.rows(decided).items():
                self.tally.rows_loaded += self._load(table, rows, stamped)
            self.tally.updates += self.recognizer.flushed(decided.receipt)
        if self.tally.updates - self._delivered >= _WINDOW:
            self.deliver()

    def _load(self, table: str, rows: Sequence[Row], stamped: Collection[str]) -> int:
        from recognition.sinks.sql import SqlSink

        if not isinstance(self.sink, SqlSink):
            raise ConfigurationError("this sink cannot load rows; leave --load away")
        rules = self.recognizer.rules
        named = rules.layout.columns_of(table)
        stamps = dict.fromkeys(rules.values_of(table, None, ()), "text")
        if rules.supersede_of(table) is Supersede.VERSION:
            stamps[VERSION_COLUMN] = "integer"
        # What recognition writes is there from the start.
        columns = dict.fromkeys([name for row in rows for name in row], "text") | stamps
        columns[named.time] = "time"
        return self.sink.load(
            table,
            rows,
            key=named.id,
            columns=columns,
            index=(named.anonymous_id,),
            stamps=tuple(stamps),
            stamped=stamped,
        )

    def deliver(self) -> None:
        """Apply all that waits in the outbox, what other runs have left there included."""
        self._delivered = self.tally.updates
        if self.sink is None:
            return
        done = deliver(self.graph, self.sink, watch=self._watch)
        self.tally.updates_applied += done.updates
        self.tally.rows_matched += done.rows_matched
        self.tally.rows_changed += done.rows_changed
        self.tally.statements += done.statements
        self.tally.updates_rejected += len(done.rejected)
        for update_id, error in done.rejected:
            self._list(f"update {update_id}: {error}")

    def _watch(self, plan: Plan, applied: Applied) -> None:
        del applied
        if self.sink is not None and self._arguments.show_sql:
            self.sql.update(map(self.sink.compile, plan.steps))

    def _list(self, line: str) -> None:
        if len(self.rejects) < _LISTED:
            self.rejects.append(line)


def _run(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    if arguments.load and settings.sink is None:
        raise ConfigurationError("--load writes rows into a sink: name one with --sink URL")
    _look_for(arguments.events)
    started = time.monotonic()
    with ExitStack() as stack:
        # What the imports made is never garbage: not looking at it again saves a fifth of the time.
        gc.freeze()
        stack.callback(gc.unfreeze)
        way = _Way(arguments, settings, stack, lambda: open_graph(settings.graph))
        path = arguments.rejects or Path("rejects.ndjson")
        rejects = stack.enter_context(RejectsFile(path))
        way.carry(rejects)
        if settings.retention_days is not None:
            way.graph.expire(time.time_ns() // 1000 - settings.retention_days * DAY)
        waiting = way.graph.stats().pending_updates if way.sink is None else 0
    result = {**asdict(way.tally), "seconds": round(time.monotonic() - started, 3)}
    if rejects.count:
        result["rejects_file"] = str(path)
    _print_result(arguments, result, way.rejects, way.sql)
    if waiting:
        _say(
            arguments,
            f"no sink was named: {waiting:,} updates are in the outbox of"
            f" {hide_password(settings.graph)};"
            f" {'a worker' if settings.destinations else 'a run with --sink'} applies them",
        )
    return way.code


def _plan(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _look_for(arguments.events)
    with ExitStack() as stack:

        def rehearse() -> Graph:
            graph = _open_existing(settings.graph) or open_graph("memory:")
            return stack.enter_context(closing(graph)).rehearse()

        way = _Way(arguments, settings, stack, rehearse)
        rejects = None
        if arguments.rejects is not None:
            rejects = stack.enter_context(RejectsFile(arguments.rejects))
        for _ in way.take_in(rejects):
            pass
        updates = [item.update for item in way.graph.lease_updates(sys.maxsize, 60.0)]
        steps = plan_updates(updates).steps
        sql = [] if way.sink is None else [way.sink.compile(step) for step in steps]
    if arguments.json:
        messages = [json.loads(update.to_json()) for update in updates]
        result = {**asdict(way.tally), "update_messages": messages, "sql": sql}
        _print_json({**result, "rejects": way.rejects})
    else:
        for update in updates:
            print(update.to_json())
        _print_sql(Counter(sql))
        _list_rejects(arguments, way.rejects, way.tally.rejected)
    loaded = (
        f" rows would be loaded, {way.tally.stamped:,} of them stamped;" if arguments.load else ""
    )
    _say(
        arguments,
        f"{way.tally.events:,} events{loaded} {len(updates):,} updates in {len(sql):,} statements;"
        " nothing was written",
    )
    return way.code


def _apply(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    if settings.sink is None:
        raise ConfigurationError("updates are applied to a sink: name one with --sink URL")
    _look_for(arguments.updates)
    rejects: list[str] = []
    sql: Counter[str] = Counter()
    matched: dict[str, int] = {}
    result = {"updates_applied": 0, "updates_rejected": 0, "rows_matched": 0, "rows_changed": 0}

    def read(source: str | IO[bytes]) -> Iterator[UpdateByCriteria]:
        name, lines = ("-", sys.stdin.buffer) if isinstance(source, str) else (source.name, source)
        for number, update in read_updates(lines):
            if isinstance(update, MessageError):
                rejects.append(f"{name}:{number}: {update}")
            else:
                yield update

    with ExitStack() as stack:
        sink = stack.enter_context(closing(open_sink(settings.sink, **settings.sink_options)))
        progress = stack.enter_context(_Progress(arguments, arguments.updates, "updates"))
        updates = progress.read(read)
        while window := list(islice(updates, _WINDOW)):
            plan = plan_updates(window)
            try:
                done = sink.apply(plan)
            except RecognitionError as error:
                error.add_note(f"Before it, {result['updates_applied']:,} updates were applied.")
                raise
            refused = [*plan.rejected, *done.rejected]
            rejects += [f"update {update_id}: {error}" for update_id, error in refused]
            result["updates_applied"] += len(plan.updates) - len(done.rejected)
            result["rows_matched"] += done.rows_matched
            result["rows_changed"] += done.rows_changed
            matched.update(done.matched_by_update)
            if arguments.show_sql:
                sql.update(map(sink.compile, plan.steps))
            progress.show(result["updates_applied"])
    result["updates_rejected"] = len(rejects)
    more = {"matched_by_update": matched} if arguments.json else {}
    _print_result(arguments, {**result, **more}, rejects, sql)
    return _REJECTED if rejects else _DONE


def _look_for(sources: Sequence[str]) -> None:
    """Refuse a file that is missing before anything is opened for writing."""
    for source in sources:
        if source != "-" and not os.path.exists(source):
            raise InputError(f"{source} is not there")


def _open_sink(settings: Settings, stack: ExitStack) -> Sink | None:
    if settings.sink is None:
        return None
    return stack.enter_context(closing(open_sink(settings.sink, **settings.sink_options)))


def _open_existing(url: str) -> Graph | None:
    """The graph, or ``None`` where it is a file that is not there yet: opening would make it."""
    path = url.removeprefix("sqlite:///")
    return None if path != url and not Path(path).exists() else open_graph(url)


# ----------------------------------------------------------------------------- the other commands


def _explain(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    with closing(_graph(settings)) as graph:
        recognizer = Recognizer(graph, _decided_rules(arguments, settings, graph))
        found = recognizer.explain(_subject(arguments.subject, recognizer))
    if arguments.json:
        _print_json(_plain(found))
    else:
        _print_explanation(arguments.subject, found)
    return _DONE if found.found else _REJECTED


def _decided_rules(arguments: argparse.Namespace, settings: Settings, graph: Graph) -> Rules:
    """The rules that the graph was decided with, where the command line does not name others."""
    rules = read_parts(settings, os.environ, stamps=True).rules
    decided_with = graph.decided_with(rules.workspace)
    if decided_with is None:
        return rules
    return rules.as_decided(
        decided_with,
        attribution=arguments.policy is None and arguments.lookback_days is None,
        target=arguments.target_column is None,
    )


def _forget(arguments: argparse.Namespace) -> int:
    return _undo(
        arguments,
        lambda recognizer: recognizer.forget(_identifier(arguments.identifier, recognizer)),
    )


def _unlink(arguments: argparse.Namespace) -> int:
    return _undo(
        arguments,
        lambda recognizer: recognizer.unlink(
            _identifier(arguments.one, recognizer), _identifier(arguments.other, recognizer)
        ),
    )


def _release(arguments: argparse.Namespace) -> int:
    return _undo(arguments, lambda recognizer: recognizer.release(arguments.anonymous_id))


def _undo(arguments: argparse.Namespace, undo: Callable[[Recognizer], int]) -> int:
    """Change the graph, then bring the sink's rows up to date, where one is named."""
    settings = _settings(arguments)
    with ExitStack() as stack:
        graph = stack.enter_context(closing(_graph(settings)))
        sink = _open_sink(settings, stack)
        rules = _decided_rules(arguments, settings, graph)
        result = {"updates": undo(Recognizer(graph, rules))}
        rejects: list[str] = []
        if sink is not None:
            done = deliver(graph, sink)
            result["updates_applied"] = done.updates
            result["rows_changed"] = done.rows_changed
            rejects = [f"update {update_id}: {error}" for update_id, error in done.rejected]
    _print_result(arguments, result, rejects, Counter())
    if sink is None and result["updates"]:
        _say(arguments, "no sink was named: the updates are in the graph's outbox")
    return _REJECTED if rejects else _DONE


# ---------------------------------------------------------------------------------------- worker


def _worker(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    parts = read_parts(settings, os.environ)
    stop = threading.Event()
    graph: Graph | None = None
    with ExitStack() as stack:
        stack.enter_context(_logs_on_stderr(arguments))
        for off in parts.off:
            _log.info("%s: %s%s", off.place, off.text, f" ({off.fix})" if off.fix else "")
        rejects = stack.enter_context(RejectsFile(settings.worker.rejects, append=True))
        if settings.worker.updates is None:
            graph = stack.enter_context(closing(open_graph(settings.graph)))
            worker, served = _build_worker(arguments, settings, parts, graph, rejects, stack)
        else:
            worker, served = _build_applier(arguments, settings, parts, rejects, stack)
        with _stopped_by_signals(stop):
            worker.run(stop, once=arguments.once)
        unfilled: list[str] = []
        pending = _sum_of(worker, "kafka_behind")
        if graph is not None:
            unfilled = [name for name, filled in graph.destinations().items() if not filled]
            pending = sum(graph.backlog(name).waiting for name in served)
    letters = _sum_of(worker, "kafka_dead")
    result: dict[str, object] = {
        **asdict(worker.taken),
        "dead_letters": letters,
        "updates_applied": sum(one.updates for one in served.values()),
        "updates_held": sum(one.held for one in served.values()),
        "updates_rejected": sum(one.dead for one in served.values()),
        "rows_changed": sum(one.rows_changed for one in served.values()),
        "updates_waiting": pending,
    }
    if arguments.json:
        result["destinations"] = {name: _plain_times(asdict(s)) for name, s in served.items()}
    _print_result(arguments, result, [], Counter())
    for name, one in served.items():
        for table, missing in one.unmatched.items():
            _say(
                arguments,
                f"{name}, {table}: {missing.rows:,} rows of {missing.updates:,} updates never came,"
                f" the oldest was decided at {missing.oldest:%Y-%m-%d %H:%M:%S} UTC",
            )
    failing = [name for name, one in served.items() if one.failing]
    for name in failing:
        print(f"recognition: {name} fails: {served[name].last_error}", file=sys.stderr)
    for name in unfilled:
        _say(arguments, f"{name} is not filled yet with what the graph knew before it")
    if failing and arguments.once:
        return _FAILED
    refused = worker.taken.rejected or letters or result["updates_rejected"]
    return _REJECTED if refused else _DONE


def _sum_of(worker: Worker, name: str) -> int:
    """Of one of the numbers that sources count themselves."""
    return sum(
        int(value)
        for source in worker.sources
        for one, *_, values in getattr(source, "measures", list)()
        if one == name
        for value in values.values()
    )


def _build_worker(
    arguments: argparse.Namespace,
    settings: Settings,
    parts: Parts,
    graph: Graph,
    rejects: RejectsFile,
    stack: ExitStack,
) -> tuple[Worker, Mapping[str, Served]]:
    """What takes events in, and serves the destinations; all is closed by the stack."""
    destinations = _open_destinations(settings, parts, stack)
    deliverer = None
    if destinations:
        deliverer = Deliverer(
            graph,
            destinations,
            rules=parts.rules,
            every=settings.delivery.every_seconds,
            patience=settings.delivery.patience_hours * 3600,
        )
    worker = Worker(
        Recognizer(graph, parts.rules, bots=build_bots(settings), remembers=parts.remembers),
        [],
        deliverer,
        format=(format := bound_times(parts.format, settings)),
        batch_size=settings.batch_size,
        rejects=rejects,
        expire=_expiry(settings, graph),
    )
    served = {} if deliverer is None else deliverer.served
    worker.sources += open_sources(
        settings,
        os.environ,
        worker,
        graph,
        format=format,
        directories=arguments.directory or [Path(d) for d in settings.worker.directories],
        once=arguments.once,
        metrics=_serve_metrics(arguments, settings, graph, worker, served, stack),
    )
    if not worker.sources:
        _say(arguments, "no source of events is set: updates that wait are delivered, no more")
    if arguments.once and (settings.worker.kafka or settings.worker.http):
        _say(arguments, "Kafka and HTTP have no end: with --once they are left alone")
    if deliverer is None:
        _say(arguments, "no destination is set: updates stay in the graph's outbox")
    return worker, served


def _build_applier(
    arguments: argparse.Namespace,
    settings: Settings,
    parts: Parts,
    rejects: RejectsFile,
    stack: ExitStack,
) -> tuple[Worker, Mapping[str, Served]]:
    """What applies the updates of topics to the destinations; all is closed by the stack."""
    if arguments.once or arguments.directory:
        raise ConfigurationError(
            "[worker.updates] has no end and takes no events: leave --once and --directory out."
            " Nothing was written."
        )
    destinations = _open_destinations(settings, parts, stack)
    if not destinations:
        raise ConfigurationError(
            "[worker.updates] needs destinations: [[destinations]], [bulker], or --sink URL."
            " Nothing was written."
        )
    worker = Worker(None, [], None, rejects=rejects)
    sources = list(open_updates(settings, os.environ, destinations, rejects=worker.reject))
    worker.sources += sources
    served = {source.name: source.consumer.served for source in sources}
    _serve_metrics(arguments, settings, None, worker, served, stack)
    return worker, served


def _open_destinations(settings: Settings, parts: Parts, stack: ExitStack) -> list[Destination]:
    destinations = []
    for destination in parts.destinations(settings):
        stack.enter_context(closing(destination.sink))
        destinations.append(destination)
    return destinations


def _serve_metrics(
    arguments: argparse.Namespace,
    settings: Settings,
    graph: Graph | None,
    worker: Worker,
    served: Mapping[str, Served],
    stack: ExitStack,
) -> Callable[[], str] | None:
    """Serve them where that is wanted; what renders them."""
    address = arguments.metrics or settings.worker.metrics
    if address is None:
        return None
    from recognition.metrics import Metrics

    metrics = Metrics(graph, worker, served)
    server = metrics.serve(address)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return metrics.render


def _expiry(settings: Settings, graph: Graph) -> Callable[[], object] | None:
    days = settings.retention_days
    if days is None:
        return None
    return lambda: graph.expire(time.time_ns() // 1000 - days * DAY)


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT lets everything come to its end; the second one ends it."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def ask(number: int, frame: object) -> None:
        del frame
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in signals:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _JsonLines(logging.Formatter):
    """A log record as one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": render_time(int(record.created * 1_000_000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


@contextmanager
def _logs_on_stderr(arguments: argparse.Namespace) -> Iterator[None]:
    handler = logging.StreamHandler()
    if arguments.log == "json":
        handler.setFormatter(_JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("recognition")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if arguments.quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _replay(arguments: argparse.Namespace) -> int:
    with closing(_graph(_settings(arguments))) as graph:
        known = list(graph.destinations()) or [""]
        if arguments.destination is not None and arguments.destination not in known:
            raise ConfigurationError(
                f"the outbox serves no destination {arguments.destination!r}; there are:"
                f" {', '.join(filter(None, known)) or 'none with a name'}"
            )
        names = known if arguments.destination is None else [arguments.destination]
        dead = {name: graph.dead_updates(sys.maxsize, name) for name in names}
        if not arguments.list:
            for name, found in dead.items():
                positions = [item.position for item, _ in found]
                graph.return_updates(positions, "replayed", dead=False, destination=name)
    letters: list[dict[str, object]] = [
        {
            "destination": name,
            "update": item.update.id,
            "table": item.update.table,
            "attempts": item.attempts,
            "decided_at": item.update.created_at.isoformat(),
            "reason": reason,
        }
        for name, found in dead.items()
        for item, reason in found
    ]
    if arguments.list and arguments.json:
        _print_json(letters)
    elif arguments.list:
        reasons = Counter((x["destination"], x["table"], x["reason"]) for x in letters)
        for (destination, table, reason), count in reasons.most_common():
            print(f"{count:>8,}  {destination or '-'}  {table}  {reason}")
    else:
        _print_result(arguments, {"updates_sent_again": len(letters)}, [], Counter())
    return _REJECTED if arguments.list and letters else _DONE


def _check(arguments: argparse.Namespace) -> int:
    from recognition.check import Level, check

    settings = _settings(arguments)
    parts = read_parts(settings, os.environ)
    with ExitStack() as stack:
        graph = None if settings.worker.updates else _open_existing(settings.graph)
        if graph is not None:
            stack.enter_context(closing(graph))
        findings = list(check(settings, parts, graph, os.environ))
    if arguments.json:
        _print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            if finding.level is Level.WRONG or not arguments.quiet:
                print(f"{finding.level:<6} {finding.place}: {finding.text}")
                if finding.fix:
                    print(f"       {finding.fix}")
    return _REJECTED if any(finding.level is Level.WRONG for finding in findings) else _DONE


def _outbox(arguments: argparse.Namespace) -> int:
    with closing(_graph(_settings(arguments))) as graph:
        registered = graph.destinations()
        if arguments.drop is not None:
            if arguments.drop not in registered:
                raise ConfigurationError(f"there is no destination {arguments.drop!r}")
            graph.drop_destination(arguments.drop)
            registered = graph.destinations()
        lines = [
            {"name": name, "filled": filled, **_plain_times(asdict(graph.backlog(name)))}
            for name, filled in registered.items()
        ]
    if arguments.json:
        _print_json(lines)
    else:
        for line in lines:
            print(
                "{name}: {waiting:,} wait, the oldest since {oldest}; {held:,} held;"
                " {dead:,} dead".format(**{**line, "oldest": line["oldest"] or "-"}),
                "" if line["filled"] else "; not filled yet",
                sep="",
            )
        if not lines:
            _say(arguments, "no destination is registered; a worker registers those it serves")
    return _DONE


def _plain_times(value: Any) -> Any:
    """As JSON has it: times as text."""
    if isinstance(value, dict):
        return {key: _plain_times(part) for key, part in value.items()}
    return value.isoformat() if isinstance(value, datetime) else value


def _stats(arguments: argparse.Namespace) -> int:
    with closing(_graph(_settings(arguments))) as graph:
        _print_result(arguments, asdict(graph.stats()), [], Counter())
    return _DONE


def _graph_init(arguments: argparse.Namespace) -> int:
    url = _settings(arguments).graph
    lines = initialise_graph(url, sharded=arguments.sharded, run=not arguments.print)
    if arguments.json:
        _print_json({"graph": hide_password(url), "lines": lines})
    else:
        for line in lines:
            print(line)
    return _DONE


def _graph_check(arguments: argparse.Namespace) -> int:
    with closing(_graph(_settings(arguments))) as graph:
        problems = graph.check()
    if arguments.json:
        _print_json({"sound": not problems, "problems": problems})
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print("nothing is wrong with the graph")
    return _REJECTED if problems else _DONE


def _graph_show(arguments: argparse.Namespace) -> int:
    from recognition.graph.rendering import render

    asked = arguments.shown_as or ("json" if arguments.json else "text")
    if arguments.json and asked != "json":
        raise ConfigurationError(f"--json and --format {asked} are two things; leave one away")
    settings = _settings(arguments)
    with closing(_graph(settings)) as graph:
        recognizer = Recognizer(graph, _decided_rules(arguments, settings, graph))
        identifier = _identifier(arguments.identifier, recognizer)
        picture = recognizer.show(identifier, arguments.limit)
    document = render(picture, asked)
    with _open_output(arguments.output) as file:
        file.write(document.encode())
    if arguments.output != "-":
        _say(arguments, f"{arguments.output}: as secret as the graph itself")
    return _DONE if picture.found else _REJECTED


def _graph_export(arguments: argparse.Namespace) -> int:
    from recognition.graph.moving import write_records

    lines = size = 0
    with ExitStack() as stack:
        graph = stack.enter_context(closing(_graph(_settings(arguments))))
        file = stack.enter_context(_open_output(arguments.output))
        progress = stack.enter_context(_Progress(arguments, ["-"], "records"))
        for line in write_records(graph.export()):
            encoded = line.encode()
            file.write(encoded)
            lines += 1
            size += len(encoded)
            progress.show(lines)
    result = {"lines": lines, "bytes": size}
    if arguments.output == "-":
        _say(arguments, f"{lines:,} lines, {size:,} bytes: as secret as the graph itself")
    else:
        _print_result(arguments, {**result, "file": arguments.output}, [], Counter())
    return _DONE


@contextmanager
def _open_output(path: str) -> Iterator[IO[bytes]]:
    """
    Stdout for ``-``; else a file that is there under its name once it is whole, and not before.

    It is readable by its owner alone.
    """
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    part = f"{path}.part"
    try:
        with ExitStack() as stack:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            file: IO[bytes] = stack.enter_context(open(descriptor, "wb"))
            if path.endswith(".gz"):
                # No name and no time inside: the same graph gives the same bytes.
                packed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
                file = cast("IO[bytes]", packed)
            yield file
        os.replace(part, path)
    except OSError as exc:
        raise InputError(f"{path} cannot be written: {exc.strerror}") from exc
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)


def _graph_import(arguments: argparse.Namespace) -> int:
    from recognition.graph.moving import Record, read_records, restored

    settings = _settings(arguments)
    _look_for([arguments.file])
    with ExitStack() as stack:
        progress = stack.enter_context(_Progress(arguments, [arguments.file], "records"))
        graph = stack.enter_context(closing(open_graph(settings.graph)))

        def read(source: str | IO[bytes]) -> Iterator[Record]:
            name, file = (
                ("-", sys.stdin.buffer) if isinstance(source, str) else (source.name, source)
            )
            zipped = cast("BufferedReader", file).peek(2)[:2] == b"\x1f\x8b"
            records = read_records(gzip.GzipFile(fileobj=file) if zipped else file)
            if arguments.restored:
                records = restored(records)
            try:
                for number, record in enumerate(records, start=1):
                    yield record
                    progress.show(number)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error

        try:
            count = graph.take_in(progress.read(read), restart=arguments.restart)
        except KeyboardInterrupt:
            _say(arguments, "stopped half-way: import again, with --restart")
            return _INTERRUPTED
        result = {"records": count, **asdict(graph.stats())}
    _print_result(arguments, result, [], Counter())
    return _DONE


def _graph_compact(arguments: argparse.Namespace) -> int:
    with closing(_graph(_settings(arguments))) as graph:
        freed = graph.compact()
        result = {"bytes_freed": freed, "bytes": graph.stats().bytes}
    _print_result(arguments, result, [], Counter())
    return _DONE


def _schema(arguments: argparse.Namespace) -> int:
    del arguments
    _print_json(json_schema())
    return _DONE


def _sinks(arguments: argparse.Namespace) -> int:
    missing: dict[str, str] = {}
    for scheme in installed_schemes():
        try:
            open_sink(f"{scheme}://").close()
        except MissingDependencyError as error:
            missing[scheme] = str(error)
        except RecognitionError:
            pass  # It is there, and wants a better URL.
    if arguments.json:
        _print_json([{"scheme": s, "missing": missing.get(s)} for s in installed_schemes()])
    else:
        for scheme in installed_schemes():
            print(f"{scheme:<16}{missing.get(scheme, 'ready')}")
    return _DONE


def _config(arguments: argparse.Namespace) -> int:
    if arguments.reference:
        print(render_reference(), end="")
        return _DONE
    settings = _settings(arguments).model_dump(mode="json")
    for key in ("graph", "sink"):
        settings[key] = settings[key] and hide_password(settings[key])
    for destination in settings["destinations"]:
        destination["url"] = hide_password(destination["url"])
        destination["options"] = hide_secrets(destination["options"])
    settings["sink_options"] = hide_secrets(settings["sink_options"])
    if arguments.json:
        _print_json(settings)
    else:
        for key, value in settings.items():
            print(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return _DONE


def _graph(settings: Settings) -> Graph:
    graph = _open_existing(settings.graph)
    if graph is None:
        raise ConfigurationError(
            f"there is no graph at {hide_password(settings.graph)}; name another one with --graph"
        )
    return graph


def _subject(text: str, recognizer: Recognizer) -> Identifier | str:
    """``TYPE:VALUE`` of a known type, or the id of a message."""
    type, colon, value = text.partition(":")
    known = {ANONYMOUS, *recognizer.rules.identity.known}
    return Identifier(type, value) if colon and type in known else text


def _identifier(text: str, recognizer: Recognizer) -> Identifier:
    subject = _subject(text, recognizer)
    return subject if isinstance(subject, Identifier) else Identifier("user_id", subject)


# ------------------------------------------------------------------------------------------ demo

# The first line of the settings that a demo leaves behind; by it the next one knows its directory.
_DEMO_MARK = "# Written by `recognition demo`; the next demo writes this directory anew."


def _demo(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.dir
    _clear_demo(directory)
    suffix = "db" if arguments.sink == "sqlite" else "duckdb"
    settings = Settings(
        graph=f"sqlite:///{directory / 'graph.db'}",
        sink=f"{arguments.sink}:///{directory / f'warehouse.{suffix}'}",
        traits=("email",),
    )
    (directory / "recognition.toml").write_text(
        f"{_DEMO_MARK}\n"
        'graph = "sqlite:///graph.db"\n'
        f'sink = "{arguments.sink}:///warehouse.{suffix}"\n'
        'traits = ["email"]\n',
        encoding="utf-8",
    )
    events = directory / "events.ndjson"
    story = _Story()
    started = time.monotonic()
    with events.open("w", encoding="utf-8") as file:
        for event in generate_events(arguments.visitors, seed=arguments.seed):
            file.write(json.dumps(event) + "\n")
            story.events[str(event["messageId"])] = event
    arguments.load, arguments.show_sql, arguments.events = True, True, [str(events)]
    with ExitStack() as stack:
        way = _Way(arguments, settings, stack, lambda: open_graph(settings.graph))
        for decided in way.take_in(None):
            way.write(decided)
            story.note(way.recognizer.rows(decided))
        way.deliver()
    story.look(str(settings.sink))
    (directory / "statements.sql").write_text(
        "\n\n".join(map(_terminate, way.sql)) + "\n", encoding="utf-8"
    )
    seconds = time.monotonic() - started
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    if arguments.json:
        result = {**story.count(), **asdict(way.tally), "seconds": round(seconds, 3)}
        _print_json({**result, "directory": str(directory), "files": files})
    else:
        _print_story(story, way, directory, files, seconds)
    return way.code


def _clear_demo(directory: Path) -> None:
    """Make the directory, or empty one that an earlier demo has made; never touch another."""
    settings = directory / "recognition.toml"
    if directory.exists():
        if not directory.is_dir():
            raise ConfigurationError(f"{directory} is no directory; name another with --dir")
        marked = settings.is_file() and settings.read_text("utf-8").startswith(_DEMO_MARK)
        if not marked and any(directory.iterdir()):
            raise ConfigurationError(
                f"{directory} holds files that no demo has written, so it is left alone;"
                " name another directory with --dir"
            )
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in ("events.ndjson", "graph.db*", "warehouse.*", "statements.sql"):
        for path in directory.glob(pattern):
            path.unlink()


class _Story:
    """What the demo tells: the same rows as their events came, as they were written, and now."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        #: By message id: the user in the row when it was written, and in the row now.
        self.written: dict[str, str | None] = {}
        self.now: dict[str, str | None] = {}

    def note(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        for row in rows["events"]:
            self.written.setdefault(row["message_id"], row["user_id"])

    def look(self, url: str) -> None:
        """Ask the warehouse itself, through its bare driver, what its rows hold now."""
        scheme, _, path = url.partition(":///")
        driver = import_module({"sqlite": "sqlite3"}.get(scheme, scheme))
        with closing(driver.connect(path)) as connection:
            rows = connection.execute("SELECT message_id, user_id FROM events").fetchall()
        self.now = dict(rows)

    def count(self) -> dict[str, int]:
        rewritten = sum(self.written[m] != user for m, user in self.now.items())
        return {
            "rows": len(self.now),
            "with_user_in_event": sum("userId" in event for event in self.events.values()),
            "with_user_when_written": sum(user is not None for user in self.written.values()),
            "with_user_now": sum(user is not None for user in self.now.values()),
            "rewritten": rewritten,
        }

    def choose(self) -> list[str]:
        """The rows of a user with few of them, some of which were anonymous until later."""
        rows: dict[str, list[str]] = {}
        for message_id, user in self.now.items():
            if user is not None:
                rows.setdefault(user, []).append(message_id)

        def telling(user: str) -> tuple[bool, bool, int, str]:
            own = rows[user]
            devices = {self.events[m].get("anonymousId") for m in own} - {None}
            stamped = any("userId" not in self.events[m] and self.written[m] for m in own)
            rewritten = sum(self.written[m] is None for m in own)
            return len(own) <= 12, len(devices) > 1 and stamped, min(rewritten, 4), user

        best = max(rows, key=telling, default=None)
        return sorted(rows.get(best or "", ()), key=lambda m: str(self.events[m]["timestamp"]))


def _print_story(
    story: _Story, way: _Way, directory: Path, files: Mapping[str, int], seconds: float
) -> None:
    counts = story.count()
    rows = counts["rows"]

    def line(text: str, number: int) -> None:
        print(f"  {text:<44}{number:>10,}   {number / rows:>5.0%}")

    print(f"{way.tally.events:,} events of 30 days in {seconds:.1f} s\n")
    line("rows in the warehouse", rows)
    line("with a user, as the events came", counts["with_user_in_event"])
    line("with a user, when the rows were written", counts["with_user_when_written"])
    line("with a user now", counts["with_user_now"])
    own = story.choose()
    if own:
        print(f"\nThe rows of {story.now[own[0]]}:\n")
        print("  time              row                  device    in the event written with  now")
    for message_id in own:
        event = story.events[message_id]
        what = " ".join(str(event[key]) for key in ("type", "name", "event") if key in event)
        print(
            f"  {str(event['timestamp'])[:16].replace('T', ' '):<17} {what[:20]:<20}"
            f" {str(event.get('anonymousId', '-'))[:8]:<9} {event.get('userId', '-')!s:<12}"
            f" {story.written[message_id] or '-':<13} {story.now[message_id]}"
        )
    print(
        f"\n{way.tally.updates_applied:,} updates changed {way.tally.rows_changed:,} rows, with"
        f" {way.tally.statements:,} statements in all, those that stage and look up included."
    )
    for statement in list(way.sql)[:1]:
        lines = re.sub(r" (SET|(?<!DISTINCT )FROM|WHERE|AND) ", r"\n  \1 ", statement)
        print(f"The first that changed rows, broken into lines:\n\n{_terminate(lines)}")
    print()
    for name, size in files.items():
        print(f"  {directory / name!s:<44}{size:>12,} bytes")
    asked = next((m for m in own if "userId" not in story.events[m]), "--help")
    command = "recognition" if which("recognition") else f"{sys.executable} -m recognition"
    print(f"\nGo on: cd {directory} && {command} explain {asked}")


# ---------------------------------------------------------------------------------------- output


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=2))


def _print_result(
    arguments: argparse.Namespace,
    result: Mapping[str, object],
    rejects: Sequence[str],
    sql: Counter[str],
) -> None:
    """Numbers by name, then the statements where they were asked for; rejects go to stderr."""
    if arguments.json:
        shown = {"sql": list(sql)} if getattr(arguments, "show_sql", False) else {}
        _print_json({**result, "rejects": rejects, **shown})
        return
    width = max(map(len, result))
    for name, value in result.items():
        text = f"{value:,}" if isinstance(value, int | float) else str(value)
        print(f"{name.replace('_', ' '):<{width}}  {text:>12}")
    _print_sql(sql)
    total = sum(int(str(result.get(key, 0))) for key in ("rejected", "updates_rejected"))
    _list_rejects(arguments, rejects, total)


def _print_sql(sql: Counter[str]) -> None:
    for statement, times in sql.items():
        print(f"\n-- {times} times" if times > 1 else "")
        print(_terminate(statement))


def _terminate(statement: str) -> str:
    """With a semicolon at its end, before the remarks that follow it."""
    text, *remarks = statement.rstrip().rstrip(";").split("\n--")
    return "\n--".join([f"{text.rstrip()};", *remarks])


def _list_rejects(arguments: argparse.Namespace, rejects: Sequence[str], total: int) -> None:
    for line in rejects[:_LISTED]:
        print(f"rejected: {line}", file=sys.stderr)
    if total > _LISTED:
        print(f"rejected: {total - _LISTED:,} more", file=sys.stderr)


def _print_explanation(subject: str, found: Explanation) -> None:
    print(f"{subject}: {found.owner if found.owner is not None else 'nobody'}")
    for line in found.because:
        print(f"  because {line}")
    for identifier, seen_as in found.identifiers:
        print(f"  identifier {identifier.type}:{seen_as}")
    for link in found.links:
        state = f"refused ({link.refused})" if link.refused else "holds"
        pair = f"{link.a.type}:{link.a.value} = {link.b.type}:{link.b.value}"
        print(f"  link {pair}, {link.kind}, message {link.message_id}, {state}")
    for claim in found.claims:
        who = "forgotten" if claim.identifier is None else ":".join(claim.identifier)
        print(f"  claim {render_time(claim.time)} {claim.anonymous_id} by {who}")
    for span in found.spans:
        start = "" if span.start == BEGINNING else f"from {render_time(span.start)} "
        end = "" if span.end == END else f"until {render_time(span.end)} "
        who = span.owner if span.owner is not None else "nobody"
        print(f"  span {start}{end}{who}" if start or end else f"  span at all times {who}")


def _plain(found: Explanation) -> dict[str, object]:
    """As JSON has it: identifiers as objects, times as text, no bound as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Identifier):
            return value._asdict()
        if isinstance(value, dict):
            return {
                key: when(part) if key in ("time", "start", "end") else plain(part)
                for key, part in value.items()
            }
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    def when(time: int) -> str | None:
        return None if time in (BEGINNING, END) else render_time(time)

    return {
        key: [{"identifier": one._asdict(), "seen_as": seen} for one, seen in found.identifiers]
        if key == "identifiers"
        else plain(value)
        for key, value in asdict(found).items()
    }


def _say(arguments: argparse.Namespace, text: str) -> None:
    if not arguments.quiet:
        print(f"recognition: {text}", file=sys.stderr)


def _tell(error: RecognitionError) -> str:
    """One paragraph: what was found, what is needed, what was written, whether a retry helps."""
    notes = getattr(error, "__notes__", [])
    told = [f"{str(error).rstrip('.')}."]
    if "was written" not in told[0]:
        told.append(
            {
                False: "Nothing of this step was written." if notes else "Nothing was written.",
                True: "A part of it was written.",
                None: "Whether it was written is not known; doing it again is safe.",
            }[error.written]
        )
    if error.retryable:
        told.append("The same command may succeed later.")
    return f"recognition: {' '.join([*told, *notes])}"


_Item = TypeVar("_Item")


class _Progress:
    """A bar with the rate on a terminal, a line now and then elsewhere; or nothing at all."""

    _EVERY = 5.0  # seconds between two lines

    def __init__(self, arguments: argparse.Namespace, sources: Sequence[str], noun: str) -> None:
        self._sources = sources
        self._noun = noun
        self._quiet = arguments.quiet
        self._started = self._told = time.monotonic()
        self._file: IO[bytes] | None = None
        self._before = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            except ImportError:
                return self
            self._bar = Progress(
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            sizes = [os.path.getsize(s) if os.path.isfile(s) else None for s in self._sources]
            total = None if None in sizes else sum(size or 0 for size in sizes)
            self._task = self._bar.add_task(self._noun, total=total)
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def read(self, read: Callable[[str | IO[bytes]], Iterable[_Item]]) -> Iterator[_Item]:
        """Everything in all sources; ``read`` gets ``-``, or a file that is open."""
        for source in self._sources:
            if source == "-":
                yield from read(source)
                continue
            with ExitStack() as stack:
                try:
                    self._file = stack.enter_context(open(source, "rb"))
                except OSError as exc:
                    raise InputError(f"{source} cannot be opened: {exc.strerror}") from exc
                yield from read(self._file)
                self._before += self._file.tell()
                self._file = None

    def show(self, done: int) -> None:
        """So many are done."""
        now = time.monotonic()
        text = f"{done:,} {self._noun}, {done / max(now - self._started, 1e-3):,.0f}/s"
        if self._bar is not None:
            position = self._before + (self._file.tell() if self._file is not None else 0)
            self._bar.update(self._task, completed=position, description=text)
        elif not self._quiet and now - self._told >= self._EVERY:
            self._told = now
            print(f"recognition: {text}", file=sys.stderr)
