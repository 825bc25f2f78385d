"""
ClickHouse, on a server or embedded: a plan's rows are staged once, then each step is a statement
that looks its values up by the key of each row.

ClickHouse has no ``UPDATE .. FROM`` and no transactions, and a table can be changed in several ways
whose costs differ by factors of a thousand. So this sink is not one of `sql.py`'s: it reads what
the table is, lets `clickhouse_cost.choose` take the cheapest strategy that is correct for it, and
sends one statement for each step, whatever the number of visitors.

**How rows are found and set.** The staged rows lie in a table; from it a second one with the Join
engine is filled, one line per key, from which ``joinGet`` takes the values for each row of the
target (https://clickhouse.com/docs/engines/table-engines/special/join). Where one key has several
intervals, a line holds arrays, and the first interval that the row's time lies in is the one.

**What keeps two workers apart.** Making a table fails where there is one: a table whose name
follows from the target's is the lock. Whoever finds a lock whose holder does nothing, neither a
query nor a mutation, takes the holder's staged rows away before anything else. So a worker that was
only asleep cannot write any more: what its statements look up is gone, and they fail. All that is
made for a window carries the window's id, which begins with the server's time.

**What a crash leaves.** The rows of a statement are written in full or in part; the guard that
excludes rows which already hold their values makes the same window safe to apply again. The ledger
(see `sql.py` for what it is for) is written *before* the rows, under the lock: what is noted and
not written is written when the window comes again, and until then earlier updates leave it alone.
Rows that are on their way to another key lie in a table of their own, which outlives the window:
whoever has the target's lock next completes what was begun, see `Moved`.

No value ever becomes part of a statement's text. Values travel in the staged rows or as parameters
of the server; names are quoted after they were found in the real table; a `Fragment` is made of
literals of this file, names and parameters, and of nothing else.

Times are compared in microseconds since 1970-01-01 UTC. ``empty`` is NULL or, in a column that
cannot be NULL, what ClickHouse puts in the place of it: ``''``, 0 or 1970-01-01.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from difflib import get_close_matches
from hashlib import blake2b
from itertools import accumulate
from math import inf
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, ProgrammingError

from recognition.errors import (
    ConfigurationError,
    MissingDependencyError,
    OutcomeUnknownError,
    RecognitionError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
    ValueRefusedError,
)
from recognition.messages import VERSION_COLUMN, to_text
from recognition.planner import Plan, Shape, StagedRow, Step, Value
from recognition.sinks import Applied, AppliedStep, Capabilities
from recognition.sinks.clickhouse_cost import (
    ALTER,
    GRANULE,
    INSERT,
    MOVE,
    ONLY_FORCED,
    OVERRIDE,
    STRATEGIES,
    SWAP,
    UPDATE,
    VISITOR_ROWS,
    Choice,
    Partition,
    Work,
    choose,
)
from recognition.sinks.clickhouse_overrides import (
    PREFIX,
    Overrides,
    count_seen,
    refuse_shape,
    refuse_table,
    view_of,
)
from recognition.sinks.clickhouse_statements import (
    CEILING,
    DAY,
    FLOOR,
    MOVED,
    PLAIN,
    SECOND,
    STAGE,
    Fragment,
    Keys,
    Moved,
    Name,
    Parameter,
    Stage,
    Statements,
    Table,
    join,
    partitions_aside,
    quote,
    read_column,
    sql,
    sql_type,
    stage_of,
    stage_values,
    time_range,
)
from recognition.sinks.clickhouse_swap import (
    DROP_LIMIT,
    KEEPS_MATERIALIZED,
    SWAPPED,
    Look,
    Outcome,
    Part,
    Swap,
    inserting,
    looks,
    outcome_of,
    unswappable,
)
from recognition.sinks.rows import (
    Column,
    Later,
    Note,
    Spared,
    count_taken,
    cut_and_spare,
    joined,
    lacking_of,
    later_of,
    names_of,
    note_extras,
    refuse_value,
    show_time,
    time_or_none,
)

_log = logging.getLogger("recognition.sinks.clickhouse")

LEDGER = "recognition_ledger"
_LOCK = "recognition_lock_"
_BROKEN = "recognition_broken_"

#: How long a lock's holder may do nothing before the lock is taken away, in seconds.
_IDLE = 10.0
_COLD = 3600  # seconds without a write, after which a partition's next merge may be far
_ORPHAN = 86_400  # seconds, after which nobody wakes up whose lock was broken

# https://clickhouse.com/docs/sql-reference/statements/update: since 25.7.
_FIRST_WITH_UPDATE = (25, 7)

# https://github.com/ClickHouse/ClickHouse/pull/93813, of 2025-11-27: indexes understand `has`.
_FIRST_WITH_HINT = (25, 12)

# The conditions of an update in the order in which they stand, the key's first: 0.5 CPU seconds
# instead of 0.7 for 100 visitors in 10 million rows.
_IN_ORDER: Mapping[str, object] = {
    "move_primary_key_columns_to_end_of_prewhere": 0,
    "allow_reorder_prewhere_conditions": 0,
}

_HOLDS: Mapping[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int, float),
    "float": (int, float),
    "boolean": (bool,),
    "time": (str,),
    "uuid": (str,),
    "other": (),
}

_GRANTS = (
    "a privilege is missing; as an administrator run: GRANT SELECT, INSERT, CREATE TABLE, DROP "
    "TABLE ON db.* TO user, GRANT ALTER UPDATE ON db.table TO user and GRANT "
    "SELECT ON system.* TO user"
)

# https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp
_SAID: Mapping[int, tuple[type[SinkError], str]] = {
    60: (TableError, "a table is missing"),
    81: (TableError, "a database is missing"),
    16: (TableError, "a column is missing"),
    47: (TableError, "a column is missing"),
    115: (
        SinkError,
        "an option is neither known to clickhouse-connect nor a setting of the server",
    ),
    158: (SinkError, "a limit of the user's profile for the rows of a query was reached"),
    164: (SinkReadOnlyError, f"the user may only read: {_GRANTS}"),
    191: (SinkError, "a limit of the user's profile for the rows of a set was reached"),
    307: (SinkError, "a limit of the user's profile for the bytes of a query was reached"),
    392: (SinkReadOnlyError, "the user may make no tables: allow_ddl is 0 in the user's profile"),
    396: (SinkError, "a limit of the user's profile for the rows of a result was reached"),
    497: (SinkReadOnlyError, _GRANTS),
    192: (SinkError, "ClickHouse refused the login: the user is not known"),
    193: (SinkError, "ClickHouse refused the login: the password is wrong"),
    516: (SinkError, "ClickHouse refused the login: the user's name or password is wrong"),
    242: (SinkUnavailableError, "the replica is read-only for now"),
    159: (SinkUnavailableError, "the server's time limit for a query is over"),
    202: (SinkUnavailableError, "too many queries run at once"),
    216: (SinkUnavailableError, "the same statement still runs"),
    209: (SinkUnavailableError, "a replica or the keeper did not answer in time"),
    210: (SinkUnavailableError, "a replica cannot be reached"),
    225: (SinkUnavailableError, "there is no keeper for replicated tables"),
    241: (SinkUnavailableError, "the server's memory limit was reached"),
    252: (SinkUnavailableError, "the table has too many parts; merges have to catch up"),
    319: (SinkUnavailableError, "whether the insert happened is not known to the server"),
    344: (SinkError, "the server has this switched off"),
    394: (SinkUnavailableError, "the query was cancelled by somebody"),
    420: (TableError, "a column of the sorting or partition key cannot be updated"),
    452: (SinkError, "the user's profile does not let a setting be changed"),
    469: (TableError, "a CONSTRAINT of the table forbids the rows"),
    473: (SinkUnavailableError, "a table is locked by somebody else"),
    692: (SinkUnavailableError, "the table has too many unfinished mutations"),
    719: (SinkError, "use_query_cache is on, with which system tables cannot be read"),
    999: (SinkUnavailableError, "the keeper does not answer"),
}
_EXISTS, _NO_TABLE = 57, 60
_PATCHED, _LARGER, _FORBIDDEN = 344, 359, 469
_CROWDED = {252, 692}

#: So many lines are squashed, however young: each is in memory, for as long as it stands.
_MOST_LINES = 1_000_000

_AS_IT_IS = sql("")

_NEEDS_QUIET = (
    f"Where nothing else writes to the partitions, strategy={SWAP} writes them anew, whole; rows"
    " that come in during the swap would be lost"
)

_MAY_BE_LOST = (
    "it was swapped or will be, and rows that others inserted into it in these moments may be"
    " lost; have such rows delivered again"
)

#: A table that was made for a window: what it is, and the window's id.
_MADE = re.compile(r"(recognition_stage_|recognition_broken_)([0-9a-f]{8}_[0-9a-f]{8})")

_SETTING = re.compile(r"(\w+) = ('(?:[^'\\]|\\.)*'|[^,\s]+)")

#: What statements here mean, whatever the user's profile or the URL makes of the same words: what
#: differs is sent with each of them. https://clickhouse.com/docs/operations/settings/settings
_MEANT: Mapping[str, str] = {
    # All rows are read, as they are now, and each as often as it is there.
    **dict.fromkeys(("apply_deleted_mask", "apply_patch_parts"), "1"),
    **dict.fromkeys(("apply_mutations_on_fly", "final", "limit", "offset"), "0"),
    **{
        f"{what}_overflow_mode": "throw"
        for what in ("read", "set", "join", "group_by", "sort", "distinct", "result", "timeout")
    },
    # What is compared, joined, counted and numbered, and how.
    "join_default_strictness": "ALL",
    "enable_positional_arguments": "1",
    "session_timezone": "",
    **dict.fromkeys(
        (
            *("aggregate_functions_null_for_empty", "data_type_default_nullable"),
            *("empty_result_for_aggregation_by_empty_set", "force_index_by_date"),
            *("force_primary_key", "join_use_nulls", "transform_null_in"),
        ),
        "0",
    ),
}

#: With what whole rows are inserted again: they may be in any number of partitions, and a block
#: that was inserted before with the same rows is none that may be left out.
_WHOLE: Mapping[str, object] = {"insert_deduplicate": 0, "max_partitions_per_insert_block": 0}

#: Whole rows are put aside in columns of the types that the target has, whoever allowed them.
_ANY_TYPE: Mapping[str, object] = {
    "allow_suspicious_fixed_string_types": 1,
    "allow_suspicious_low_cardinality_types": 1,
    "flatten_nested": 0,
}

_DISTRIBUTED = re.compile(r"Distributed\('([^']*)', '([^']*)', '([^']*)'")
_QUOTED = r"`(?:[^`\\]|\\.)*`|'(?:[^'\\]|\\.)*'"
_ARGUMENTS = re.compile(rf"\w+\(((?:{_QUOTED}|[^)`'])*)\)")
_ARGUMENT = re.compile(rf"{_QUOTED}|[^,\s()`']+")


# The sink -----------------------------------------------------------------------------------------


class ClickhouseSink:
    """
    A database of a ClickHouse server, or of the engine embedded in this process.

    ``clickhouse://user:password@host:port/database`` is HTTP on port 8123, with ``?secure=true``
    HTTPS on 8443. ``chdb:///path`` is the embedded engine (https://clickhouse.com/docs/chdb) on a
    directory, of which a process can have one; ``?database=`` names the database there. All that
    follows ``?`` may be given as an argument too; what the sink does not know is clickhouse-
    connect's, and what that does not know is a setting of the server.

    Args:
        url: See above.
        timeout: How long a lock of another worker, somebody else's mutation, or a table with too
            many parts is waited for, in seconds.
        statement_timeout: How long one statement may run, in seconds. After that it may still run
            on the server; the next call waits for it.
        ledger_days: After how many days the ledger may forget what was applied.
        strategy: ``auto``, or one of ``update``, ``alter``, ``insert``, ``delete-and-insert`` and
            ``replace-partition`` or ``override`` for all tables that can have it; the updates of
            the others are refused, with the reason. ``auto`` never takes the last two. With
            ``override`` nothing is written to a table but what cannot be published beside it;
            readers query the view ``<table>_recognized``.
        quiet: How long nothing may have written to a partition that ``replace-partition`` swaps,
            in seconds. With 0 whoever sets it answers for that nothing does.
        patches: ``auto`` applies the patches of a lightweight update where reading them would cost
            more, ``always`` at once, ``never`` leaves them to merges.
        squash_after: With ``override``: how old what is published may become until a window writes
            it in place, in seconds. 0: never, but by `squash`.
        override_counts: With ``override``: whether rows are counted, by two queries of the view.
            Otherwise no row of the table is read; no update is in `Applied.matched_by_update`.
    """

    capabilities = Capabilities(ledger=True, counts_per_update=True)

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        statement_timeout: float = 3600.0,
        ledger_days: int = 90,
        strategy: str = "auto",
        patches: str = "auto",
        quiet: float = _COLD,
        squash_after: float = 86_400.0,
        override_counts: bool = False,
        **options: object,
    ) -> None:
        given = _read_url(url)
        timeout = _number(given, "timeout", timeout)
        statement_timeout = _number(given, "statement_timeout", statement_timeout)
        ledger_days = int(_number(given, "ledger_days", ledger_days))
        strategy = given.pop("strategy", strategy)
        patches = given.pop("patches", patches)
        quiet = _number(given, "quiet", quiet)
        squash_after = _number(given, "squash_after", squash_after)
        counts = str(given.pop("override_counts", override_counts)).lower()
        if timeout < 0:
            raise ConfigurationError(f"timeout is {timeout} seconds; it is at least 0")
        if quiet < 0:
            raise ConfigurationError(f"quiet is {quiet} seconds; it is at least 0")
        if ledger_days < 1:
            raise ConfigurationError(f"ledger_days is {ledger_days}; it is at least 1")
        if strategy not in ("auto", *STRATEGIES):
            raise ConfigurationError(
                f"strategy is {strategy!r}; it is one of: auto, {', '.join(STRATEGIES)}"
            )
        if patches not in ("auto", "always", "never"):
            raise ConfigurationError(f"patches is {patches!r}; it is auto, always or never")
        if squash_after < 0:
            raise ConfigurationError(f"squash_after is {squash_after} seconds; it is at least 0")
        if counts not in ("true", "false"):
            raise ConfigurationError(f"override_counts is {counts!r}; it is true or false")
        self._timeout = timeout
        self._ledger_days = ledger_days
        self._publishes = strategy == OVERRIDE
        self._forced = None if strategy in ("auto", OVERRIDE) else strategy
        self._squash_after = squash_after
        self._override_counts = counts == "true"
        self._patches = patches
        self._quiet = quiet
        embedded = given.get("interface") == "chdb"
        self._server = _Server({**given, **options}, embedded, statement_timeout)
        self._tables: dict[str, Table] = {}
        # How the table that was found under a name was defined, and which were looked at just now.
        self._defined: dict[str, tuple[object, ...]] = {}
        self._looked: set[str] = set()
        self._ledgers: set[str] = set()
        self._unsquashed: set[tuple[str, ...]] = set()  # of which was said that they cannot be

    def compile(self, step: Step) -> str:
        """
        The statements that ``apply()`` sends for the step, with what each strategy would cost.

        It looks at the system tables, and writes nothing. A table or column that is missing is
        taken to be a MergeTree's. ``apply()`` sends further statements: those that stage the rows,
        and, where the ledger knows of later updates, the same for each shape of what these leave.

        Raises:
            SinkError: The server cannot be read.
        """
        with self._use():
            found = self._find(step.table)
            table = self._complete(found, step.shape)
            statements = Statements(table, step, stage_of(f"{STAGE}1", step, table))
            survey = self._survey(table) if found else _Survey((), 0, {})
            partitions, every = _touched(table, step, survey)
            work = self._work(table, step.shape)
            bounds = [
                f"{bound.column} in [{show_time(bound.lower)}, {show_time(bound.upper)})"
                for bound in step.bounds
            ]
            said = [f"-- {' and '.join(bounds) or 'no bounds'}; {len(step.rows)} staged rows"]
            publishes = self._publishes and OVERRIDE not in work.unavailable
            try:
                strategy = OVERRIDE if publishes else self._possible(table, work, self._forced)
            except TableError as error:
                said.append(f"-- refused: {error}")
                return "\n".join([statements.alter(None, None).render()[0], *said])
            choice = choose(work, partitions, strategy)
            keys = self._keys(step, partitions, Name(f"{STAGE}1_keys"))
            sent = self._statements(statements, choice, every, keys)
            sent = sent or [statements.update(None, keys)]
            if publishes:
                overrides = Overrides(self._server, table, _lock_name(table))
                sent = [sql("CREATE VIEW % AS %", overrides.view, overrides.define(step.shape))]
            for estimate in choice.estimates:
                said.append(
                    f"-- {estimate.strategy}: not possible, {estimate.unavailable}"
                    if estimate.unavailable
                    else f"-- {estimate.strategy}: about {estimate.cpu_seconds:.1f} CPU seconds,"
                    f" {estimate.bytes_written / 1e6:.1f} MB written"
                    + (
                        f"; {ONLY_FORCED[name]}"
                        if (name := estimate.strategy) in ONLY_FORCED
                        else ""
                    )
                )
            rows = sum(partition.rows for partition in partitions)
            matched = sum(partition.matched for partition in partitions)
            chosen = ", ".join(
                f"{name} in {len(choice.partitions(name))}"
                for name in STRATEGIES
                if choice.partitions(name)
            )
            said.append(
                f"-- {chosen or 'nothing to do in'} of {len(partitions)} partitions with {rows:,}"
                f" rows, of which about {matched:,.0f} change: {choice.reason}"
            )
            said += [f"-- {advice}" for advice in self._advice(table, step.shape)]
        return "\n".join([*(f"{each.render()[0]};" for each in sent), *said])

    def apply(self, plan: Plan) -> Applied:
        """
        Apply all steps, one after the other; see `recognition.sinks.Sink`.

        There are no transactions: where it fails, some rows may be written. The error says so, and
        applying the same plan again completes it.

        Raises:
            SinkUnavailableError: The server cannot be reached, another worker holds the lock,
                somebody else mutates a table, or a limit was reached. A retry may help.
            OutcomeUnknownError: The connection was lost while a statement ran.
            SinkReadOnlyError: It may not be written; the text says the grants.
            SinkError: It refused a statement.
        """
        if not plan.steps:
            return Applied(rejected=plan.rejected)
        with self._use():
            refused: dict[str, RecognitionError] = {}
            for step in plan.steps:
                refused.update(self._check(step))
            steps = []
            for step in plan.steps:
                rows = tuple(row for row in step.rows if row.update_id not in refused)
                if rows:
                    steps.append(replace(step, rows=rows))
            done: list[AppliedStep] = []
            matched: defaultdict[str, int] = defaultdict(int)
            if steps:
                tables = {table.parts: table for table in (self._tables[s.table] for s in steps)}
                with self._window(list(tables.values())) as window:
                    for table in tables.values():
                        self._squash_due(window, table)
                    for step in steps:
                        done += self._run(window, self._tables[step.table], step, matched)
            rejected = (*plan.rejected, *sorted(refused.items(), key=lambda pair: pair[0]))
            return Applied(
                rows_matched=sum(step.rows_matched for step in done),
                rows_changed=sum(step.rows_changed for step in done),
                steps=tuple(done),
                matched_by_update=dict(matched),
                rejected=rejected,
                statements=self._server.statements,
            )

    def rehearse(self, plan: Plan) -> Applied:
        """
        What `apply` would refuse, as far as looking tells: columns, keys, engine, strategy, values.

        Rights are not tried out: there is no statement here that could be undone.

        Raises:
            SinkError: The server cannot be read.
        """
        refused: dict[str, RecognitionError] = dict(plan.rejected)
        with self._use():
            for step in plan.steps:
                refused.update(self._check(step))
        return Applied(rejected=tuple(refused.items()))

    def advice(self, step: Step) -> list[str]:
        """What the owner of the step's table should know, a sentence each."""
        with self._use():
            table = self._find(step.table)
            return [] if table is None else list(self._advice(table, step.shape))

    def unfinished(self, table: str) -> list[tuple[str, str]]:
        """The mutations of a table that are not done: the id, and why it failed or ``""``."""
        with self._use():
            found = self._find(table)
            mutations = [] if found is None else self._unfinished(found)
            return [(mutation.id, mutation.failure) for mutation in mutations]

    def squash(self, table: str) -> int:
        """
        Write in place what is published beside a table, and forget it: how many rows changed.

        It is what a window does when something is older than ``squash_after``, and before it writes
        in place itself. A second time there is nothing to do. To leave the mode: squash, read the
        table again, and drop the view and the tables ``recognition_override_..``.

        Raises:
            TableError: There is no such table, or no strategy to write in place.
            SinkError: As `apply`.
        """
        with self._use():
            found = self._find(table)
            if found is None:
                raise TableError(self._missing(table))
            with self._window([found]) as window:
                return self._squash(window, found)

    def clock(self) -> datetime:
        """The time of the server."""
        with self._server.use():
            [[now]] = self._server.rows(sql("SELECT toUnixTimestamp64Micro(now64(6))"))
            return datetime.fromtimestamp(int(now) / 1_000_000, UTC)

    def close(self) -> None:
        """Close the connection."""
        self._server.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        """The connection. Tables are looked at again: somebody may have altered or made them."""
        with self._server.use():
            self._looked.clear()
            try:
                yield
            except SinkError:
                self._ledgers.clear()
                raise

    # A step -------------------------------------------------------------------------------------

    def _run(
        self, window: _Window, table: Table, step: Step, matched: defaultdict[str, int]
    ) -> list[AppliedStep]:
        started = time.perf_counter()
        parts: list[tuple[Step, frozenset[Spared]]] = [(step, frozenset())]
        spared: dict[tuple[object, ...], list[str]] = {}
        if not step.shape.versioned:
            self._open_ledger(table)
            later, spared = self._find_later(window, table, step)
            if any(later):
                parts = list(cut_and_spare(step, *later))
        done: list[AppliedStep] = []
        for part, notes in parts:
            if part.shape.covers and not part.shape.versioned:
                self._remember(table, part)
            spares = tuple(sorted(notes, key=lambda note: note[1:]))
            if self._publishes and self._publish(window, table, part, spares, matched, done):
                continue
            statements = Statements(table, part, window.stage(table, part, spares))
            self._fill(statements, spared)
            # It fails where the lock is another's: that one has not seen what was staged since.
            held = Name(f"w_{window.id}")
            self._server.rows(sql("SELECT count(%) FROM %", held, table.beside(_lock_name(table))))
            changed = self._change(window, statements, self._forced)
            rows = changed
            if part.needs_count(changed):
                rows = self._match(statements, matched)
            done.append(
                AppliedStep(
                    table=step.table,
                    rows_matched=rows,
                    rows_changed=changed,
                    seconds=time.perf_counter() - started,
                )
            )
            started = time.perf_counter()
        for update_id, taken in count_taken(step, [part for part, _ in parts]).items():
            if update_id in matched:
                matched[update_id] += taken
        return done

    def _match(
        self, statements: Statements, matched: defaultdict[str, int], merged: Fragment = _AS_IT_IS
    ) -> int:
        """Count the rows that each update of the step matches, and all of them."""
        rows = 0
        for update_id, count in self._server.rows(sql("%%", statements.count_matches(), merged)):
            matched[update_id] += count
            rows += count
        for row in statements.step.rows:
            matched[row.update_id] += 0
        return rows

    def _fill(
        self, statements: Statements, spared: Mapping[tuple[object, ...], Sequence[str]]
    ) -> None:
        for statement in statements.create_stage():
            self._server.run(statement)
        by_row = {
            (row, note): spared.get((_row_key(row), note), ())
            for row in statements.step.rows
            for note in statements.stage.spares
        }
        self._server.insert(
            statements.table.database,
            statements.stage.rows,
            statements.staged_columns(),
            statements.staged_lists(by_row),
        )
        for statement in statements.fill_by_key():
            self._server.run(statement)

    def _change(self, window: _Window, statements: Statements, forced: str | None) -> int:
        """Send what the choice says; how many rows changed."""
        table, step = statements.table, statements.step
        work = self._work(table, step.shape)
        forced = self._possible(table, work, forced)
        survey = self._survey(table)
        if survey.unfinished:
            self._wait_until_quiet(table)
            survey = self._survey(table)
        partitions, every = _touched(table, step, survey)
        if not partitions:
            return 0
        touched = len(partitions)
        choice = choose(work, partitions, forced)
        changed = 0
        if altered := choice.partitions(ALTER):
            # What ALTER would change is counted first: a part that it finds nothing in is cloned
            # all the same, and where few rows match the update may be cheaper after all.
            counts = self._server.pairs(statements.count_changes(altered))
            partitions = [
                replace(partition, matched=float(counts.get(partition.id, 0)))
                if partition.id in altered
                else partition
                for partition in partitions
                if partition.id not in altered or partition.id in counts
            ]
            choice = choose(work, partitions, forced)
            altered = choice.partitions(ALTER)
            changed += sum(counts.get(partition, 0) for partition in altered)
        updated = choice.partitions(UPDATE)
        keys = None
        if statements.keyed:
            keys = self._keys(step, partitions, window.name(table, "keys"))
        if keys is not None and (updated or altered):
            for statement in statements.create_keys(keys.name):
                self._server.run(statement)
        if updated:
            whole = every and len(updated) == touched
            self._mutate(
                window, table, statements.update(None if whole else updated, keys), _IN_ORDER
            )
            for name, rows in self._patch_parts(table).items():
                if name not in survey.patch_parts:
                    changed += int(rows)
        if altered:
            self._mutate(window, table, statements.alter(altered, keys))
        if choice.partitions(INSERT):
            aside = window.name(table, "whole")
            self._server.run(statements.create_whole(aside), _ANY_TYPE)
            self._server.run(statements.select_whole(aside))
            changed += self._count(table, aside)
            if changed:
                self._write(statements.insert_whole(aside), _WHOLE)
        if choice.partitions(MOVE):
            changed += self._move(window, statements)
        if swapped := choice.partitions(SWAP):
            changed += self._swap(window, statements, swapped)
        for partition in choice.apply:
            self._mutate(window, table, statements.apply_patches(partition))
        return changed

    def _keys(self, step: Step, partitions: Sequence[Partition], name: Name) -> Keys | None:
        """The keys as a table of this name, where the server's indexes understand the hint."""
        if self._server.version < _FIRST_WITH_HINT:
            return None
        granules = sum(partition.rows for partition in partitions) / GRANULE
        return Keys(name, prunes=len(step.rows) <= max(granules, 100))

    # Partitions that are written anew -----------------------------------------------------------

    def _swap(self, window: _Window, statements: Statements, partitions: Sequence[str]) -> int:
        """
        Write those of the partitions anew in which rows change, and swap them in; how many rows.

        Raises:
            SinkUnavailableError: Somebody writes to one of them, or did not long ago.
            SinkError: Rows came in during a swap and are lost; the text says how many, and where.
        """
        table = statements.table
        self._open_ledger(table)
        self._wait_until_idle(table)
        before = self._looks(table, partitions)
        counts = self._server.pairs(statements.count_changes(partitions))
        for partition in counts:
            if partition in before and before[partition].age < self._quiet:
                raise SinkUnavailableError(
                    f"table {table.parts[1]!r}: partition {partition} was written to"
                    f" {before[partition].age} seconds ago, and {SWAP} takes one to which nothing"
                    f" was written for {self._quiet:.0f} (option quiet); nothing of this step was"
                    " written"
                )
        changed = 0
        for partition, count in counts.items():
            swap = Swap(statements, partition, window.name(table, "partition"))
            try:
                changed += self._swap_one(
                    window, swap, statements, before.get(partition), int(count)
                )
            except SinkError as error:
                self._server.finished(error)  # others may be swapped by now
                raise
        return changed

    def _swap_one(
        self,
        window: _Window,
        swap: Swap,
        statements: Statements,
        before: Look | None,
        changed: int,
    ) -> int:
        """Swap one partition; how many of its rows change."""
        table, partition = swap.table, swap.partition
        where = f"table {table.parts[1]!r}, partition {partition}"
        limits = DROP_LIMIT in self._server.settings
        deadline = time.monotonic() + self._timeout
        found = before
        while True:
            if found is None or (before and self._quiet and found.block > before.block):
                raise SinkUnavailableError(
                    f"{where}: somebody wrote to it while it was copied; nothing of it was written"
                )
            self._server.run(swap.create())
            self._server.run(swap.copy(), swap.copy_settings(self._server.settings))
            [[rows, strange, digests, read, stored]] = self._server.rows(swap.copied())
            self._wait_until_idle(table)
            last = self._looks(table, [partition]).get(partition)
            if last is not None and last.same(found):
                if (rows, stored, strange) != (read, last.rows, 0):
                    raise TableError(
                        f"{where}: {last.rows} rows are stored in it, this user reads {stored} of"
                        f" them, and of {read} that are not deleted {rows} were copied; nothing of"
                        " it was written. A row policy or a setting of this user may hide rows"
                    )
                try:
                    # With the size that it has: what makes it larger makes the swap fail.
                    self._write(swap.replace(), {DROP_LIMIT: last.size} if limits else None)
                    break
                except OutcomeUnknownError as error:
                    raise OutcomeUnknownError(f"{error}. {where}: {_MAY_BE_LOST}") from error
                except SinkError as error:
                    code = getattr(error.__cause__, "code", None)
                    if code == _PATCHED:
                        self._mutate(window, table, statements.apply_patches(partition))
                    elif code != _LARGER:
                        raise
            self._server.run(swap.drop())
            if time.monotonic() > deadline:
                raise SinkUnavailableError(
                    f"{where}: it changed each time while it was copied; nothing of it was written"
                )
            found = self._looks(table, [partition]).get(partition)
            changed = int(
                self._server.pairs(statements.count_changes([partition])).get(partition, 0)
            )
        try:
            seen = self._server.rows(swap.parts(last))
        except SinkError as error:
            raise OutcomeUnknownError(f"{error}. {where}: {_MAY_BE_LOST}") from error
        outcome = outcome_of(partition, last, digests, map(Part._make, seen))
        if outcome.lost or outcome.unseen:
            sure = "is" if outcome.lost and not outcome.unseen else "may be"
            raise SinkError(
                f"{where}: while it was swapped, others inserted into it, and what they inserted"
                f" {sure} lost ({outcome.lost or 'some'} rows). Have what came into this partition"
                f" in the last minutes delivered again, and apply the same again. {_NEEDS_QUIET}",
                written=True,
            )
        self._note_swap(table, partition, outcome)
        self._server.run(swap.drop())
        return changed

    def _note_swap(self, table: Table, partition: str, outcome: Outcome) -> None:
        """Which parts a swap has brought, so that the next one does not take them for a write."""
        line = {name: ("" if kind == "String" else 0) for name, kind in _LEDGER_COLUMNS}
        line |= {"table_name": table.parts[1], "key_value": partition, "update_id": SWAPPED}
        line |= {"starts": outcome.first, "ends": outcome.last, "applied_at": int(time.time())}
        self._server.insert(
            table.database, Name(LEDGER), _LEDGER_COLUMNS, [[value] for value in line.values()]
        )

    def _looks(self, table: Table, partitions: Sequence[str]) -> dict[str, Look]:
        """The partitions at this moment, by id."""
        own = self._server.rows(
            sql(
                "SELECT key_value, starts, ends FROM % WHERE table_name = % AND key_column = ''"
                " AND update_id = % AND has(%, key_value)",
                table.beside(LEDGER),
                Parameter("String", table.parts[1]),
                Parameter("String", SWAPPED),
                Parameter("Array(String)", list(partitions)),
            )
        )
        swapped = [(str(of), int(first), int(last)) for of, first, last in own]
        found = self._server.rows(looks(table, partitions, swapped))
        return {str(id): Look._make(map(int, line)) for id, *line in found}

    def _wait_until_idle(self, table: Table) -> None:
        """
        Until nothing inserts into the table, as far as can be seen.

        Raises:
            SinkUnavailableError: Something still does, after the timeout.
        """
        deadline = time.monotonic() + self._timeout
        delay = 0.02
        while True:
            [[running, waiting]] = self._server.rows(inserting(table))
            if not running and not waiting:
                return
            if time.monotonic() + delay > deadline:
                raise SinkUnavailableError(
                    f"table {table.parts[1]!r} is being inserted into: {running} statements run and"
                    f" {waiting} asynchronous inserts wait. {_NEEDS_QUIET}; nothing of this"
                    " partition was written"
                )
            time.sleep(delay)
            delay = min(2 * delay, 0.5)

    # What is published beside a table -----------------------------------------------------------

    def _publish(
        self,
        window: _Window,
        table: Table,
        step: Step,
        spares: tuple[Spared, ...],
        matched: defaultdict[str, int],
        done: list[AppliedStep],
    ) -> bool:
        """
        Publish a step; ``False``: it has to be written in place, after what stands was.

        What cannot stand beside what does, stands alone: that is squashed first.

        Raises:
            TableError: What stands would have to be squashed, and cannot be.
        """
        started = time.perf_counter()
        overrides = Overrides(self._server, table, _lock_name(table))
        alone = "later updates took single rows of it" if spares else refuse_shape(step.shape, ())
        if reason := alone or overrides.refuse_shape(step.shape):
            try:
                if alone:
                    self._possible(table, self._work(table, step.shape), None)
                self._squash(window, table)
            except TableError as error:
                raise TableError(f"{error}; and it cannot be published: {reason}") from error
            _log.info("table %s: was squashed before an update: %s", step.table, reason)
            if alone:
                return False
            overrides = Overrides(self._server, table, _lock_name(table))
        rows = changed = 0
        # It reaches through a view, to the table under it; FINAL does not.
        merged = sql(" SETTINGS final = 1") if table.merges_rows else _AS_IT_IS
        if self._override_counts:
            stage = window.stage(table, step, ())
            before = Statements(overrides.seen(), step, stage)
            self._fill(before, {})
            [[changed]] = self._server.rows(sql("%%", count_seen(before), merged))
        overrides.publish(window, step)
        if self._override_counts:
            rows = changed
            if step.needs_count(changed):
                rows = self._match(Statements(overrides.seen(), step, stage), matched, merged)
        done.append(
            AppliedStep(
                table=step.table,
                rows_matched=rows,
                rows_changed=changed,
                seconds=time.perf_counter() - started,
            )
        )
        return True

    def _squash(self, window: _Window, table: Table) -> int:
        """Write in place what is published, and forget it; how many rows changed."""
        overrides = Overrides(self._server, table, _lock_name(table))
        statements = overrides.stage(window)
        if statements is None:
            return 0
        changed = self._change(window, statements, None)
        overrides.forget(window)
        _log.info("table %s: was squashed, %d rows changed", table.parts[1], changed)
        return changed

    def _squash_due(self, window: _Window, table: Table) -> None:
        """
        Squash what has to be: all where this window writes in place, else what is old or much.

        Raises:
            TableError: This window would write in place, and what is published cannot be.
        """
        if table.parts not in window.overridden:
            return
        if not self._publishes:
            self._squash(window, table)
            return
        if not self._squash_after:
            return
        lines, age = Overrides(self._server, table, _lock_name(table)).age()
        if age <= self._squash_after and lines <= _MOST_LINES:
            return
        try:
            self._squash(window, table)
        except TableError as error:
            if table.parts not in self._unsquashed:
                self._unsquashed.add(table.parts)
                _log.warning("%d lines are published, and cannot be squashed: %s", lines, error)

    # Rows that get another key ------------------------------------------------------------------

    def _move(self, window: _Window, statements: Statements) -> int:
        """
        Insert the rows that change under their new keys, and delete the old ones; how many.

        They are put aside first, each with what the old row is known by. When the table that holds
        them gets its lasting name, the move has begun: from then on whoever has the lock of the
        target completes it, before anything else.
        """
        table = statements.table
        aside = window.name(table, "moved")
        self._server.run(statements.create_moved(aside), _ANY_TYPE)
        self._server.run(statements.select_moved(aside))
        partitions = [str(p) for (p,) in self._server.rows(partitions_aside(table, aside))]
        moved = Moved(table, aside, table.writable, partitions)
        [[count, known]] = self._server.rows(moved.count_aside())
        if not count:
            return 0
        [[old]] = self._server.rows(moved.count_old())
        if known < count or old > count:
            raise TableError(
                f"table {table.parts[1]!r}: several rows have the same _block_number and"
                " _block_offset, so that old rows cannot be told from others; nothing of this step"
                " was written. Parts that came from another table have such numbers"
            )
        lasting = Name(aside.replace(STAGE, MOVED, 1).removesuffix("moved") + _suffix(table))
        self._server.run(
            sql("RENAME TABLE % TO %", table.beside(aside), table.beside(lasting)), writes=True
        )
        self._complete_move(window, table, lasting)
        return int(count)

    def _complete_move(self, window: _Window, table: Table, name: Name) -> None:
        """
        Insert what is not there yet, delete what is old, and forget both.

        Raises:
            TableError: A CONSTRAINT forbids the rows. If none was inserted, they are forgotten.
        """
        there = {
            str(column)
            for (column,) in self._server.rows(
                sql(
                    "SELECT name FROM system.columns WHERE database = % AND table = %",
                    Parameter("String", table.parts[0]),
                    Parameter("String", name),
                )
            )
        }
        partitions = [str(p) for (p,) in self._server.rows(partitions_aside(table, name))]
        columns = [column for column in table.writable if column in there]
        moved = Moved(table, name, columns, partitions)
        try:
            self._write(
                moved.insert(_lock_name(table), Name(f"w_{window.id}")),
                {
                    # Where a client or a proxy sends it again while it runs, the server refuses it
                    # (error 216); once it is done, it finds nothing missing.
                    "query_id": f"{name}_{secrets.token_hex(4)}",
                    **_WHOLE,
                    # Rows of one key stand in the order in which they came.
                    "max_insert_threads": 1,
                },
            )
        except SinkError as error:
            if getattr(error.__cause__, "code", None) != _FORBIDDEN:
                raise
            [[inserted]] = self._server.rows(moved.count_inserted())
            if not inserted:
                self._server.run(sql("DROP TABLE IF EXISTS % SYNC", table.beside(name)))
            said = "some of them are inserted" if inserted else "none of them was changed"
            raise TableError(
                f"table {table.parts[1]!r}, rows under another key: {error}; {said}"
            ) from error
        self._mutate(
            window, table, moved.delete(), {"lightweight_delete_mode": "lightweight_update_force"}
        )
        [[old]] = self._server.rows(moved.count_old())
        if old:
            raise SinkUnavailableError(
                f"table {table.parts[1]!r}: {old} rows that were inserted under another key are"
                " still there under the old one; applying the same again deletes them"
            )
        self._server.run(sql("DROP TABLE IF EXISTS % SYNC", table.beside(name)))

    def _complete_moves(self, window: _Window, table: Table) -> None:
        """
        Complete the moves that others have left, now that the lock is ours.

        A statement of theirs may still run: it is waited for. What they begin from now on fails,
        because the lock is not theirs, or does nothing, because it was done.

        By the way it is seen whether something is published beside the table.
        """
        deadline = time.monotonic() + self._timeout
        delay = 0.05
        while True:
            [[names, running]] = self._server.rows(
                sql(
                    "SELECT (SELECT groupArray(name) FROM system.tables WHERE database = %"
                    " AND (startsWith(name, %) OR startsWith(name, %) AND total_rows > 0)"
                    " AND endsWith(name, %)), (SELECT count()"
                    " FROM system.processes WHERE position(query, 'recognition_moved_') > 0"
                    " AND position(query, %) > 0 AND position(query, 'system.processes') = 0)",
                    Parameter("String", table.parts[0]),
                    Parameter("String", MOVED),
                    Parameter("String", PREFIX),
                    Parameter("String", _suffix(table)),
                    Parameter("String", _suffix(table)),
                )
            )
            if not running:
                break
            if time.monotonic() + delay > deadline:
                raise SinkUnavailableError(
                    f"table {table.parts[1]!r}: rows are still being moved to another key by a"
                    " statement of a worker that is gone; nothing was written"
                )
            time.sleep(delay)
            delay = min(2 * delay, 2.0)
        if any(name.startswith(PREFIX) for name in names):
            window.overridden.add(table.parts)
        for name in sorted(str(name) for name in names if name.startswith(MOVED)):
            _log.info("window %s completes what %s has left", window.id, name)
            try:
                self._complete_move(window, table, Name(name))
            except TableError as error:
                # Whose rows these were applies them again. What is half done has to be completed.
                if self._server.rows(sql("EXISTS TABLE %", table.beside(Name(name))))[0][0]:
                    raise
                _log.warning("what %s has left was not completed: %s", name, error)

    def _statements(
        self, statements: Statements, choice: Choice, every: bool, keys: Keys | None
    ) -> list[Fragment]:
        """What `_change` sends for a choice, as far as it is known before the run."""
        sent = []
        updated, altered = choice.partitions(UPDATE), choice.partitions(ALTER)
        if updated:
            whole = every and len(updated) == len(choice.by_partition)
            sent.append(statements.update(None if whole else updated, keys))
        if altered:
            sent.append(statements.alter(altered, keys))
        if choice.partitions(INSERT):
            aside = Name(f"{STAGE}1_whole")
            sent += [statements.select_whole(aside), statements.insert_whole(aside)]
        if moving := choice.partitions(MOVE):
            aside = Name(f"{STAGE}1_moved")
            moved = Moved(statements.table, aside, statements.table.writable, moving)
            lock = _lock_name(statements.table)
            sent += [statements.select_moved(aside), moved.insert(lock, Name("w_1"))]
            sent.append(moved.delete())
        for partition in choice.partitions(SWAP):
            swap = Swap(statements, partition, Name(f"{STAGE}1_partition"))
            sent += [swap.create(), swap.copy(), swap.replace()]
        return sent + [statements.apply_patches(partition) for partition in choice.apply]

    def _count(self, table: Table, name: Name) -> int:
        return int(self._server.rows(sql("SELECT count() FROM %", table.beside(name)))[0][0])

    # Sending ------------------------------------------------------------------------------------

    def _write(self, statement: Fragment, settings: Mapping[str, object] | None = None) -> None:
        """Send what writes to the target; while a table is too crowded, again until the timeout."""
        deadline = time.monotonic() + self._timeout
        delay = 0.1
        while True:
            try:
                self._server.run(statement, settings, writes=True)
                return
            except SinkError as error:
                crowded = getattr(error.__cause__, "code", None) in _CROWDED
                if not crowded or time.monotonic() + delay > deadline:
                    raise
            time.sleep(delay)
            delay = min(2 * delay, 5.0)

    def _mutate(
        self,
        window: _Window,
        table: Table,
        statement: Fragment,
        more: Mapping[str, object] | None = None,
    ) -> None:
        """Send a mutation or lightweight update and wait for it; kill it where it fails."""
        settings: dict[str, object] = {"mutations_sync": 2 if table.replicated else 1}
        settings.update(more or {})
        for name in _IN_ORDER.keys() - self._server.settings.keys():
            settings.pop(name, None)  # this server has no such setting
        for name in ("enable_lightweight_update", "allow_experimental_lightweight_update"):
            if self._server.settings.get(name) == "0":
                settings[name] = 1
        if table.replicated:
            settings["allow_nondeterministic_mutations"] = 1
        try:
            self._write(statement, settings)
        except SinkError as error:
            for stuck in self._unfinished(table):
                if window.id in stuck.command and stuck.failure:
                    self._kill(table, stuck)
                    raise SinkError(
                        f"{error}; the mutation {stuck.id} of {window.id} failed"
                        f" ({stuck.failure}) and was killed; parts that it had rewritten stay so,"
                        " and applying the same again is safe",
                        written=True,
                    ) from error
            raise

    def _unfinished(self, table: Table) -> list[_Mutation]:
        """https://clickhouse.com/docs/operations/system-tables/mutations"""
        found = self._server.rows(
            sql(
                "SELECT mutation_id, command, latest_fail_reason FROM system.mutations"
                " WHERE database = % AND table = % AND NOT is_done ORDER BY create_time",
                Parameter("String", table.parts[0]),
                Parameter("String", table.parts[1]),
            )
        )
        return [_Mutation(id, command, _code_of(reason)) for id, command, reason in found]

    def _kill(self, table: Table, mutation: _Mutation) -> None:
        self._server.run(
            sql(
                "KILL MUTATION WHERE database = % AND table = % AND mutation_id = % SYNC",
                Parameter("String", table.parts[0]),
                Parameter("String", table.parts[1]),
                Parameter("String", mutation.id),
            )
        )

    def _wait_until_quiet(self, table: Table) -> None:
        """
        Until nobody mutates the table. What a worker of ours left is waited for or killed.

        Raises:
            SinkUnavailableError: Somebody else still does, after the timeout.
        """
        deadline = time.monotonic() + self._timeout
        delay = 0.05
        while unfinished := self._unfinished(table):
            for mutation in unfinished:
                if STAGE in mutation.command and mutation.failure:
                    self._kill(table, mutation)
            if time.monotonic() + delay > deadline:
                first = unfinished[0]
                why = f"; it has failed with {first.failure}" if first.failure else ""
                whose = "a worker that is gone" if STAGE in first.command else "somebody else"
                raise SinkUnavailableError(
                    f"table {table.parts[1]!r} is being mutated by {whose}: {len(unfinished)}"
                    f" mutations are not done, the first is {first.id}{why}. Nothing was written;"
                    " look at system.mutations, and try again when it is done or was killed"
                )
            time.sleep(delay)
            delay = min(2 * delay, 2.0)

    # The window and its lock --------------------------------------------------------------------

    @contextmanager
    def _window(self, tables: Sequence[Table]) -> Iterator[_Window]:
        """The locks of the tables, always in the same order; what is staged goes with them."""
        tables = sorted(tables, key=lambda table: table.parts)
        now, left = self._left([table.database for table in tables])
        window = _Window(f"{now:08x}_{secrets.token_hex(4)}")
        locked: list[Table] = []
        _LIVE.add(window.id)
        try:
            for table in tables:
                self._lock(table, window)
                locked.append(table)
            if left:
                self._sweep(left, now)
            for table in tables:
                self._complete_moves(window, table)
            yield window
        except SinkError as error:
            if not error.retryable and any(self._holder(t) != window.id for t in locked):
                taken = SinkUnavailableError(
                    f"another worker took window {window.id} for dead, because it did nothing for"
                    f" {_IDLE:.0f} seconds, and took its staged rows away; applying the same again"
                    " is safe"
                )
                taken.written = error.written
                raise taken from error
            raise
        finally:
            try:
                self._release(window, locked)
            except SinkError as error:
                # What was applied stays so, and what was raised before says more.
                _log.warning("window %s: whoever comes next cleans up: %s", window.id, error)
            finally:
                _LIVE.discard(window.id)

    def _release(self, window: _Window, locked: Sequence[Table]) -> None:
        """
        Give the locks back, and drop what is staged.

        A lock is given its holder's own name first, as by whoever breaks it: so nobody gives back a
        lock that was taken away and is another's by now.
        """
        marks = []
        for table in locked:
            mark = table.beside(_mark(table, window.id))
            try:
                self._server.run(sql("RENAME TABLE % TO %", table.beside(_lock_name(table)), mark))
                marks.append(mark)
            except SinkError as error:
                if getattr(error.__cause__, "code", None) not in (_EXISTS, _NO_TABLE):
                    raise
        if dropped := [*window.made(), *marks]:
            self._server.run(sql("DROP TABLE IF EXISTS % SYNC", join(", ", dropped)))

    def _lock(self, table: Table, window: _Window) -> None:
        """
        Take the table's lock: a table of a name that only one can have.

        The name of its one column is the window's id, so that whoever waits sees who holds it.
        """
        name = _lock_name(table)
        column = Name(f"w_{window.id}")
        deadline = time.monotonic() + self._timeout
        delay = 0.01
        quiet_since, quiet = time.monotonic(), ""
        while True:
            try:
                self._server.run(
                    sql("CREATE TABLE % (% UInt8) ENGINE = Memory", table.beside(name), column)
                )
                return
            except SinkError as error:
                if getattr(error.__cause__, "code", None) != _EXISTS:
                    raise
            holder = self._holder(table)
            if holder is not None:
                if holder != quiet or self._acts(holder):
                    quiet, quiet_since = holder, time.monotonic()
                dead = self._server.embedded and holder not in _LIVE
                if dead or time.monotonic() - quiet_since > _IDLE:
                    self._break(table, holder)
                    continue
            if time.monotonic() + delay > deadline:
                raise SinkUnavailableError(
                    f"another worker is applying updates to table {table.parts[1]!r} (window"
                    f" {holder}); nothing was written"
                )
            time.sleep(delay)
            delay = min(2 * delay, 0.5)

    def _holder(self, table: Table) -> str | None:
        """The window that has the table's lock."""
        found = self._server.rows(
            sql(
                "SELECT name FROM system.columns WHERE database = % AND table = %",
                Parameter("String", table.parts[0]),
                Parameter("String", str(_lock_name(table))),
            )
        )
        return str(found[0][0])[2:] if found else None

    def _acts(self, holder: str) -> bool:
        """Whether some query or mutation of the window runs; one that fails does not count."""
        [[queries]] = self._server.rows(
            sql(
                "SELECT count() FROM system.processes WHERE position(query, %) > 0"
                " AND position(query, 'system.processes') = 0",
                Parameter("String", holder),
            )
        )
        [[mutations]] = self._server.rows(
            sql(
                "SELECT count() FROM system.mutations WHERE NOT is_done"
                " AND latest_fail_reason = '' AND position(command, %) > 0",
                Parameter("String", holder),
            )
        )
        return bool(queries or mutations)

    def _break(self, table: Table, holder: str) -> None:
        """
        Take the lock from a holder that is gone, and first what its statements need.

        The name that the lock gets is the holder's alone, and stays: of several who find the same
        dead holder one succeeds, and nobody takes away the lock of the one who comes next.
        """
        for mutation in self._unfinished(table):
            if holder in mutation.command:
                self._kill(table, mutation)
        for database, staged in self._left([table.database])[1]:
            if staged.startswith(f"{STAGE}{holder}_"):
                dropped = sql("%.%", Name(database), Name(staged))
                self._server.run(sql("DROP TABLE IF EXISTS % SYNC", dropped))
        mark = table.beside(_mark(table, holder))
        try:
            self._server.run(sql("RENAME TABLE % TO %", table.beside(_lock_name(table)), mark))
        except SinkError as error:
            if getattr(error.__cause__, "code", None) not in (_EXISTS, _NO_TABLE):
                raise

    def _left(self, databases: Sequence[Name]) -> tuple[int, list[tuple[str, str]]]:
        """The server's time, and what windows have made and not dropped yet: database and name."""
        [[now, names]] = self._server.rows(
            sql(
                "SELECT toUnixTimestamp(now()), groupArray((database, name)) FROM system.tables"
                " WHERE has(%, database) AND (startsWith(name, 'recognition_stage_') OR"
                " startsWith(name, 'recognition_broken_'))",
                Parameter("Array(String)", [str(name) for name in databases]),
            )
        )
        return int(now), [(str(database), str(name)) for database, name in names]

    def _sweep(self, left: Sequence[tuple[str, str]], now: int) -> None:
        """
        Drop what windows have left that hold no lock any more.

        What is staged was listed before the locks are: a window that is at work had its lock then,
        and a window that has none now was done, or was found dead.
        """
        locks = self._server.rows(
            sql(
                "SELECT name FROM system.columns WHERE has(%, database)"
                " AND startsWith(table, 'recognition_lock_')",
                Parameter("Array(String)", sorted({database for database, _ in left})),
            )
        )
        live = {str(column)[2:] for (column,) in locks}
        for database, name in left:
            found = _MADE.match(name)
            if found is None or found[2] in live:
                continue
            old = now - int(found[2][:8], 16) > _ORPHAN
            if old or found[1] == STAGE:
                dropped = sql("%.%", Name(database), Name(name))
                self._server.run(sql("DROP TABLE IF EXISTS % SYNC", dropped))

    # The ledger ---------------------------------------------------------------------------------

    def _open_ledger(self, table: Table) -> None:
        """
        Make the ledger, where there is none.

        The same note may be in it twice, until a merge or for good; that does not change what it
        says. Later updates are mostly noted later: by the days and the index on the order, a window
        looks at what was noted about when it was decided, however many notes there are.
        """
        if table.database in self._ledgers:
            return
        columns = [sql("% %", Name(name), sql_type(kind)) for name, kind in _LEDGER_COLUMNS]
        self._server.run(
            sql(
                "CREATE TABLE IF NOT EXISTS % (%, INDEX later sequence TYPE minmax GRANULARITY 1)"
                " ENGINE = ReplacingMergeTree PARTITION BY toDate(applied_at) ORDER BY (%)"
                " TTL applied_at + toIntervalDay(%) SETTINGS ttl_only_drop_parts = 1",
                table.beside(LEDGER),
                join(", ", columns),
                join(", ", [sql("%", Name(name)) for name, _ in _LEDGER_COLUMNS[:-1]]),
                Fragment((str(int(self._ledger_days)),)),
            )
        )
        self._ledgers.add(table.database)

    def _find_later(
        self, window: _Window, table: Table, step: Step
    ) -> tuple[Later, dict[tuple[object, ...], list[str]]]:
        """
        What later updates took of the step's rows, and the messages that are to be spared.

        A row that names a message is compared with the notes of this message, and with those that
        name none: with each note of its device it would be 10,000 times 10,000.
        """
        about = sql(
            "table_name = % AND key_column = % AND ledger.sequence >= %",
            Parameter("String", table.parts[1]),
            Parameter("String", table.column(step.shape.key).name),
            Parameter("Int64", min(row.sequence for row in step.rows)),
        )
        ledger = table.beside(LEDGER)
        if not self._server.rows(sql("SELECT 1 FROM % AS ledger WHERE % LIMIT 1", ledger, about)):
            return Later({}, {}), {}
        name = window.name(table, "keys")
        columns = [
            ("position", "UInt32"),
            ("sequence", "Int64"),
            ("update_id", "String"),
            ("workspace", "String"),
            ("key_value", "String"),
            ("message_id", "String"),
        ]
        message_column, message_place, message_ids = _message_texts(table, step)
        asked = [
            (position, row.sequence, row.update_id, row.workspace, key, message)
            for position, (row, key, message_id) in enumerate(
                zip(step.rows, _key_texts(table, step), message_ids, strict=True)
            )
            for message in {"", message_id}
        ]
        self._server.run(
            sql(
                "CREATE TABLE % (%) ENGINE = Memory",
                table.beside(name),
                join(", ", [sql("% %", Name(column), sql_type(kind)) for column, kind in columns]),
            )
        )
        self._server.insert(
            table.database,
            name,
            columns,
            [list(each) for each in zip(*asked, strict=True)],
        )
        found = self._server.rows(
            sql(
                "SELECT DISTINCT staged.position, ledger.sequence, ledger.update_id,"
                " ledger.columns, ledger.empty, ledger.message_column, ledger.message_id,"
                " ledger.extras, ledger.time_column, ledger.starts, ledger.ends"
                " FROM % AS ledger INNER JOIN % AS staged"
                " ON ledger.key_value = staged.key_value AND ledger.workspace = staged.workspace"
                " AND if(ledger.message_column = %, ledger.message_id, '') = staged.message_id"
                " WHERE % AND ledger.key_value IN (SELECT key_value FROM %)"
                " AND ledger.sequence >= staged.sequence AND ledger.update_id != staged.update_id"
                " ORDER BY 1, 2, 3, 10",
                ledger,
                table.beside(name),
                Parameter("String", message_column),
                about,
                table.beside(name),
            )
        )
        notes = []
        for note in map(Note._make, found):
            start, end = note.starts, note.ends
            note = note._replace(
                starts=None if start == FLOOR else start, ends=None if end == CEILING else end
            )
            if message_column and note.message_column == message_column and note.message_id:
                # As the row spells it: the ledger has a UUID as ClickHouse writes it.
                named = step.rows[note.position].equals[message_place]
                note = note._replace(message_id=cast(str, named))
            notes.append(note)
        later = later_of(step, table, notes)
        spared: defaultdict[tuple[object, ...], list[str]] = defaultdict(list)
        for note in notes:
            for among in later.spared.get(note.position, ()):
                row = step.rows[note.position]
                same = (note.columns, note.message_column, note.extras) == among[1:]
                if same and (note.sequence, note.update_id) > (row.sequence, row.update_id):
                    spared[_row_key(row), among].append(note.message_id)
        return later, dict(spared)

    def _remember(self, table: Table, step: Step) -> None:
        """Note what the step's updates take."""
        shape = step.shape
        message_column, message_ids = "", [""] * len(step.rows)
        if not shape.speaks_for_interval:
            message_column, _, message_ids = _message_texts(table, step)
        now = int(time.time())
        common = (table.parts[1], table.column(shape.key).name)
        set_columns, empty = joined(shape.columns, table), joined(shape.empty, table)
        time_column = table.column(shape.times[0]).name if shape.times else ""
        lines = []
        for row, key, message_id, extras in zip(
            step.rows, _key_texts(table, step), message_ids, note_extras(step, table), strict=True
        ):
            if extras is None:
                continue
            start, end = row.intervals[0] if shape.times else (None, None)
            lines.append(
                (
                    *common,
                    key,
                    row.workspace,
                    row.sequence,
                    row.update_id,
                    message_column,
                    message_id,
                    extras,
                    set_columns,
                    empty,
                    time_column,
                    FLOOR if start is None else start,
                    CEILING if end is None else end,
                    now,
                )
            )
        self._server.insert(
            table.database,
            Name(LEDGER),
            _LEDGER_COLUMNS,
            [list(each) for each in zip(*lines, strict=True)],
        )

    # Looking at tables --------------------------------------------------------------------------

    def _check(self, step: Step) -> dict[str, TableError]:
        """The updates of the step that this table cannot take, each with the reason."""
        table = self._find(step.table)
        try:
            if table is None:
                raise TableError(self._missing(step.table))
            self._refuse_shape(table, step)
            work = self._work(table, step.shape)
            if self._publishes and (unpublishable := refuse_table(table)):
                raise TableError(
                    f"table {step.table!r}: strategy {OVERRIDE} is not possible, because"
                    f" {unpublishable}"
                )
            if self._publishes and OVERRIDE not in work.unavailable:
                Overrides(self._server, table, _lock_name(table)).check_view()
            else:
                self._possible(table, work, self._forced)
        except TableError as error:
            whole = TableError(f"{error}; nothing of these updates was written")
            return {row.update_id: whole for row in step.rows}
        refused: dict[str, TableError] = {}
        checks = [(name, 0, place) for place, name in enumerate(step.shape.equals)]
        checks += [(name, 1, place) for place, name in enumerate(step.shape.columns)]
        for name, is_set, place in checks:
            column = table.column(name)
            values = [(row.values if is_set else row.equals)[place] for row in step.rows]
            kinds = {*map(type, values)}
            if column.kind == "text" and kinds == {str}:
                continue
            if column.kind == "integer" and kinds == {int}:
                numbers = cast(Sequence[int], values)
                low, high = column.low, column.high
                if (
                    low is not None
                    and high is not None
                    and low <= min(numbers) <= max(numbers) <= high
                ):
                    continue
            for row, value in zip(step.rows, values, strict=True):
                reason = None if value is None else _refuse(table, column, value, bool(is_set))
                if reason is not None:
                    refused[row.update_id] = ValueRefusedError(
                        f"table {step.table!r}, column {column.name!r}: {reason}; "
                        "nothing of this update was written"
                    )
        return refused

    def _missing(self, table: str) -> str:
        found = self._server.rows(
            sql(
                "SELECT name FROM system.tables WHERE database = currentDatabase()"
                " AND NOT startsWith(name, 'recognition_')"
            )
        )
        names = [str(name) for (name,) in found]
        near = get_close_matches(table.lower(), [name.lower() for name in names], n=3, cutoff=0.5)
        shown = ", ".join(sorted(name for name in names if name.lower() in near))
        hint = f"the nearest names are: {shown}" if near else f"it has {len(names)} others"
        return f"the database has no table {table!r}; {hint}"

    def _refuse_shape(self, table: Table, step: Step) -> None:
        shape = step.shape
        where = f"table {step.table!r}"
        if table.refused:
            raise TableError(f"{where}: {table.refused}")
        if not PLAIN.fullmatch(table.database):
            raise TableError(
                f"{where}: joinGet cannot name a table of the database {table.database!r}; its"
                " name needs to be of letters, digits and _"
            )
        for name in names_of(shape):
            if several := table.ambiguous.get(name.lower()):
                raise TableError(
                    f"{where}, column {name!r}: there is {several}; which is meant cannot be told"
                )
        missing = lacking_of(table, step)
        if missing:
            commands = "; ".join(
                f"ALTER TABLE {'.'.join(map(quote, table.parts))} ADD COLUMN {quote(name)}"
                f" {_wanted_type(shape, name)}"
                for name in missing
            )
            shown = ", ".join(repr(name) for name in missing)
            raise TableError(f"{where} has no column {shown}; add it with: {commands}")
        if len({table.column(name).name for name in shape.columns}) < len(shape.columns):
            raise TableError(f"{where}: two names of the update mean one column")
        for name in names_of(shape):
            column = table.column(name)
            if name in shape.columns and column.generated:
                raise TableError(f"{where}, column {name!r}: it is computed and cannot be set")
            if column.kind == "other" and (name in shape.columns or name in shape.equals):
                raise TableError(
                    f"{where}, column {name!r}: it is {column.declared}, which an update cannot"
                    " hold; keep what identifies a visitor in columns of their own"
                )
            if name in shape.columns and (reason := _merged(table, column)):
                raise TableError(f"{where}, column {name!r}: {reason}")
            if name in shape.empty and _UNTOLD.search(column.declared):
                raise TableError(
                    f"{where}, column {name!r}: it is {column.declared}, of which cannot be told"
                    " whether it is empty"
                )
        for name in (*shape.times, *(shape.messages or ())[1:]):
            column = table.column(name)
            if column.kind != "time":
                raise TableError(
                    f"{where}, column {name!r}: it is {column.declared} and no time; make it"
                    " DateTime64(6, 'UTC')"
                )

    def _find(self, name: str) -> Table | None:
        """The table or view of this name, in any case, or ``None``."""
        if name in self._looked:
            return self._tables.get(name)
        self._looked.add(name)
        parts = name.split(".")
        database = sql("currentDatabase()")
        if len(parts) > 1:
            database = sql("%", Parameter("String", parts[0]))
        found = self._server.rows(
            sql(
                "SELECT database, name, engine, engine_full, sorting_key, dependencies_table,"
                " sipHash64(create_table_query) FROM system.tables"
                " WHERE database = % AND lower(name) = lower(%)"
                " ORDER BY name != %, name",
                database,
                Parameter("String", parts[-1]),
                Parameter("String", parts[-1]),
            )
        )
        if not found or len(parts) > 2:
            self._tables.pop(name, None)
            return None
        database_name, table_name, engine, full, sorting, views, _ = found[0]
        defined = tuple(map(str, found[0]))
        if engine != "Distributed" and name in self._tables and self._defined[name] == defined:
            return self._tables[name]
        self._defined[name] = defined
        refused = ""
        if table_name != parts[-1] and len(found) > 1:
            spelled = " and ".join(repr(each) for _, each, *_ in found)
            refused = f"there is {spelled}; which is meant cannot be told"
        elif engine == "Distributed":
            local, refused = self._local(full)
            if local is not None and not refused:
                self._tables[name] = local
                return local
        where = (Parameter("String", database_name), Parameter("String", table_name))
        columns: dict[str, Column] = {}
        ambiguous: dict[str, str] = {}
        types: dict[str, str] = {}
        declared_types: dict[str, str] = {}
        keys, partitioned_by, writable, sizes, materialized = set(), set(), [], {}, {}
        for (
            column_name,
            declared,
            default_kind,
            in_sorting,
            in_partition,
            size,
            computed,
        ) in self._server.rows(
            sql(
                "SELECT name, type, default_kind, is_in_sorting_key OR is_in_primary_key,"
                " is_in_partition_key, data_compressed_bytes, if(default_kind = 'MATERIALIZED',"
                " default_expression, '') FROM system.columns"
                " WHERE database = % AND table = % ORDER BY position",
                *where,
            )
        ):
            column, bare = read_column(column_name, declared, default_kind)
            lower = column_name.lower()
            if lower in columns:
                ambiguous[lower] = f"{columns[lower].name!r} and {column_name!r}"
            columns[lower] = column
            types[column_name] = bare
            declared_types[column_name] = declared
            sizes[column_name] = int(size)
            if in_sorting:
                keys.add(column_name)
            if in_partition:
                partitioned_by.add(column_name)
            if not column.generated:
                writable.append(column_name)
            if computed:
                materialized[column_name] = computed
        for _ in materialized:  # one may be computed from another
            for name_in_key in keys & materialized.keys():
                said = materialized[name_in_key]
                keys |= {each for each in types if re.search(rf"\b{re.escape(each)}\b", said)}
        projections = self._server.pairs(
            sql(
                "SELECT name, query FROM system.projections WHERE database = % AND table = %",
                *where,
            )
        )
        arguments = _ARGUMENTS.match(full)
        listed = [
            re.sub(r"\\(.)", r"\1", each[1:-1]) if each.startswith("`") else each
            for each in (_ARGUMENT.findall(arguments[1]) if arguments else ())
            if not each.startswith("'")
        ]
        settings = full.partition(" SETTINGS ")[2]
        table = Table(
            parts=(database_name, table_name),
            columns=columns,
            ambiguous=ambiguous,
            engine=engine,
            arguments=tuple(listed),
            settings={key: value.strip("'") for key, value in _SETTING.findall(settings)},
            types=types,
            declared=declared_types,
            keys=frozenset(keys | partitioned_by | {each for each in listed[:1] if each in types}),
            partitioned_by=frozenset(partitioned_by),
            sorting=sorting,
            writable=tuple(writable),
            materialized=materialized,
            column_bytes=sizes,
            views=tuple(views),
            projections=projections,
            refused=refused or refuse_engine(engine, types),
        )
        self._tables[name] = table
        return table

    def _local(self, full: str) -> tuple[Table | None, str]:
        """
        The table that holds all rows of a Distributed one, or why it is not on this host.

        https://clickhouse.com/docs/engines/table-engines/special/distributed and
        https://clickhouse.com/docs/operations/system-tables/clusters
        """
        named = _DISTRIBUTED.match(full)
        if named is None or not named[2]:
            return None, (
                "it is Distributed and holds no rows, and its definition does not say in which"
                " database its local table is; name the local table"
            )
        cluster, database, name = named[1], named[2], named[3]
        replicas = self._server.rows(
            sql(
                "SELECT shard_num, host_name, is_local FROM system.clusters WHERE cluster = %"
                " ORDER BY shard_num, replica_num",
                Parameter("String", cluster),
            )
        )
        by_shard: defaultdict[int, list[str]] = defaultdict(list)
        for shard, host, _ in replicas:
            by_shard[int(shard)].append(str(host))
        here = any(is_local for *_, is_local in replicas)
        if len(by_shard) != 1 or not here:
            hosts = "; ".join(" or ".join(hosts) for hosts in by_shard.values())
            return None, (
                f"it is Distributed and holds no rows. Cluster {cluster!r} has {len(by_shard)}"
                f" shards ({hosts}), and a statement changes rows of one of them alone; open a sink"
                f" on one host of each shard and name {f'{database}.{name}'!r} there"
            )
        local = self._find(f"{database}.{name}") if "." not in f"{database}{name}" else None
        if local is None:
            return None, f"it is Distributed over {f'{database}.{name}'!r}, which is not there"
        if len(replicas) > 1 and not local.replicated:
            return None, (
                f"it is Distributed over {len(replicas)} replicas of {f'{database}.{name}'!r},"
                f" whose engine is {local.engine}: it does not replicate what is changed in one;"
                f" make it a Replicated{local.engine}, or apply to each replica"
            )
        return local, ""

    def _complete(self, table: Table | None, shape: Shape) -> Table:
        """The table with what it lacks for the shape, as a MergeTree would have it."""
        if table is None:
            parts = tuple(shape.table.split("."))
            whole = parts if len(parts) > 1 else (self._server.database(), *parts)
            table = Table(parts=whole, columns={})
        columns, types = dict(table.columns), dict(table.types)
        for name in names_of(shape):
            if name.lower() not in columns:
                columns[name.lower()], types[name] = read_column(
                    name, _wanted_type(shape, name), ""
                )
        return replace(table, columns=columns, types=types)

    def _survey(self, table: Table) -> _Survey:
        """
        What the system tables say of the parts and mutations of a table now.

        https://clickhouse.com/docs/operations/system-tables/parts and ../mutations

        A patch that is no newer than any part of its partition waits no more: it was applied, or
        merged in. The engine keeps it for another half a minute.
        """
        where = (Parameter("String", table.parts[0]), Parameter("String", table.parts[1]))
        found = self._server.rows(
            sql(
                "SELECT id, sumIf(rows, active AND NOT patch),"
                " sumIf(data_compressed_bytes, active AND NOT patch),"
                " sumIf(rows, active AND waits), countIf(active AND waits),"
                " minIf(toUnixTimestamp(min_time), active AND NOT patch),"
                " maxIf(toUnixTimestamp(max_time), active AND NOT patch),"
                " minIf(toInt32(toUInt16(min_date)), active AND NOT patch),"
                " maxIf(toInt32(toUInt16(max_date)), active AND NOT patch),"
                " dateDiff('second', maxIf(modification_time, NOT patch), now()),"
                " groupArrayIf((name, rows), patch AND level = 0),"
                " (SELECT count() FROM system.mutations WHERE database = % AND table = %"
                " AND NOT is_done)"
                " FROM (SELECT *, patch AND data_version >"
                " minIf(data_version, active AND NOT patch) OVER (PARTITION BY id) AS waits"
                " FROM (SELECT *, startsWith(name, 'patch-') AS patch,"
                " if(patch, substring(partition_id, 40), partition_id) AS id FROM system.parts"
                " WHERE database = % AND table = %))"
                " GROUP BY id HAVING countIf(active AND NOT patch) > 0 ORDER BY id",
                *where,
                *where,
            )
        )
        patches = {str(name): int(rows) for line in found for name, rows in line[10]}
        return _Survey(found, found[0][11] if found else 0, patches)

    def _patch_parts(self, table: Table) -> dict[str, Any]:
        """As a survey has them: the rows of those that an UPDATE wrote, whether active or not."""
        return self._server.pairs(
            sql(
                "SELECT name, rows FROM system.parts WHERE database = % AND table = %"
                " AND startsWith(name, 'patch-') AND level = 0",
                Parameter("String", table.parts[0]),
                Parameter("String", table.parts[1]),
            )
        )

    def _work(self, table: Table, shape: Shape) -> Work:
        """What the table lets the strategies do with this shape."""
        defaults = self._server.table_settings
        unavailable: dict[str, str] = {}
        names = [table.column(name).name for name in shape.columns if name.lower() in table.columns]
        in_key = sorted({*names} & table.keys)
        if in_key:
            for strategy in (UPDATE, ALTER, INSERT):
                unavailable[strategy] = (
                    f"{', '.join(map(repr, in_key))} is in a key of the table or its version"
                )
        version = self._server.version
        needed = ("enable_block_number_column", "enable_block_offset_column")
        in_place = ""
        if version < _FIRST_WITH_UPDATE:
            in_place = f"the server is {'.'.join(map(str, version))}; it is there from 25.7 on"
        elif not all(table.enabled(setting, defaults) for setting in needed):
            in_place = (
                "the table does not number its rows; run: ALTER TABLE "
                f"{'.'.join(map(quote, table.parts))} MODIFY SETTING "
                + ", ".join(f"{setting} = 1" for setting in needed)
            )
        if in_place:
            unavailable.setdefault(UPDATE, in_place)
        if unswapped := unswappable(table, names, self._server.settings):
            unavailable[SWAP] = unswapped
        # The old rows are deleted in place, so that it needs what an update does.
        if immovable := in_place or _immovable(table):
            unavailable[MOVE] = immovable
        if table.replicated:
            unavailable.setdefault(
                ALTER, "each replica would look up its own copy of the staged rows"
            )
        if not table.replacing:
            unavailable.setdefault(INSERT, "only a ReplacingMergeTree replaces rows by later ones")
        elif table.views:
            unavailable.setdefault(INSERT, "a materialized view would take the rows a second time")
        if published := refuse_table(table) or refuse_shape(shape, ()):
            unavailable[OVERRIDE] = published
        preferred = None
        if table.replacing and table.arguments:
            preferred = (
                INSERT,
                "a row that is delivered again would undo an update in place, a higher version"
                " stays",
            )
        return Work(
            columns=len(shape.columns),
            column_share=table.share(names),
            key_share=table.share(table.keys),
            unavailable=unavailable,
            preferred=preferred,
            applies=self._patches,
            v2=table.settings.get("patch_parts_version", defaults.get("patch_parts_version", "v1"))
            == "v2",
        )

    def _possible(self, table: Table, work: Work, forced: str | None) -> str | None:
        """
        The strategy in place that is forced, if any.

        Raises:
            TableError: The table cannot have it, or none at all; the text says which it can have.
        """
        possible = [n for n in STRATEGIES if n not in (*work.unavailable, *ONLY_FORCED)]
        swappable = SWAP not in work.unavailable
        if forced is not None and forced in work.unavailable:
            named = possible or [SWAP] * swappable
            others = f"possible: {', '.join(named)}" if named else "and no other is possible"
            raise TableError(
                f"table {table.parts[1]!r}: strategy {forced} is not possible, because"
                f" {work.unavailable[forced]} ({others})"
                + (f". {_NEEDS_QUIET}" if swappable and not possible else "")
            )
        if forced is None and not possible:
            by_reason: defaultdict[str, list[str]] = defaultdict(list)
            for name, why in work.unavailable.items():
                by_reason[why].append(name)
            reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
            raise TableError(
                f"table {table.parts[1]!r}: no strategy is possible ({reasons}). Let {MOVE} be"
                " possible, or set a column that is in no key: with --target-column, or by a table"
                " whose ORDER BY and PARTITION BY do not name it"
                f"{f'; or publish it, by strategy={OVERRIDE}' * (OVERRIDE not in work.unavailable)}"
                + (f". {_NEEDS_QUIET}" if swappable else "")
            )
        return forced

    def _advice(self, table: Table, shape: Shape) -> Iterator[str]:
        """What the table's owner should know; for whoever reads a plan."""
        names = {table.column(name).name for name in shape.columns}
        if self._publishes:
            yield f"readers have to query {'.'.join(map(quote, (table.parts[0], view_of(table))))}"
        if table.views:
            yield f"{len(table.views)} materialized views will not see the change"
        for name, query in table.projections.items():
            if any(re.search(rf"\b{re.escape(column)}\b", query) for column in names):
                yield f"projection {name} holds a column that is set, and is rewritten with it"
        work = self._work(table, shape)
        if work.v2 and work.key_share > 0.2 and UPDATE not in work.unavailable:
            yield (
                "patch_parts_version is v2: until patches are applied, readers also read the"
                f" sorting key, {work.key_share:.0%} of the table; ALTER TABLE .. MODIFY SETTING"
                " patch_parts_version = 'v1' spares it"
            )


_LEDGER_COLUMNS: Sequence[tuple[str, str]] = (
    ("table_name", "String"),
    ("key_column", "String"),
    ("key_value", "String"),
    ("workspace", "String"),
    ("sequence", "Int64"),
    ("update_id", "String"),
    ("message_column", "String"),  # '': not one message alone was meant
    ("message_id", "String"),
    ("extras", "String"),  # JSON: [column, value] that must be equal too
    ("columns", "String"),  # what was set: sorted, joined by commas
    ("empty", "String"),  # what had to be empty: the same
    ("time_column", "String"),  # '': all rows of the key were meant
    ("starts", "Int64"),  # microseconds since 1970-01-01 UTC; the least: unbounded
    ("ends", "Int64"),  # the greatest: unbounded
    ("applied_at", "DateTime('UTC')"),
)


class _Survey(NamedTuple):
    """
    A table's parts and mutations.

    Args:
        partitions: What `_touched` reads of each.
        unfinished: How many mutations are not done.
        patch_parts: The rows of each patch part as it was written, merged or not, by its name.
    """

    partitions: Sequence[Sequence[Any]]
    unfinished: int
    patch_parts: Mapping[str, int]


class _Mutation(NamedTuple):
    """One that is not done; what it has failed with, if it has, without the server's own text."""

    id: str
    command: str
    failure: str


#: The windows that are at work in this process: with the embedded engine there are no others.
_LIVE: set[str] = set()


class _Window:
    """What is staged for one call of `apply`, all of it named after the window."""

    def __init__(self, id: str) -> None:
        self.id = id
        #: The tables beside which something is published.
        self.overridden: set[tuple[str, ...]] = set()
        self._made: list[Fragment] = []
        self._count = 0

    def name(self, table: Table, what: str) -> Name:
        """
        A name for something that is made next, beside the table.

        It is dropped with the window at the latest.
        """
        self._count += 1
        name = Name(f"{STAGE}{self.id}_{self._count}_{what}")
        self._made.append(table.beside(name))
        return name

    def stage(self, table: Table, step: Step, spares: tuple[Spared, ...]) -> Stage:
        """The names of a step's stage."""
        self._count += 1
        stage = stage_of(f"{STAGE}{self.id}_{self._count}", step, table, spares)
        self._made += [table.beside(name) for name in dict.fromkeys((stage.by_key, stage.rows))]
        return stage

    def made(self) -> list[Fragment]:
        """All that was named, whether it was made or not."""
        return self._made


class _Server:
    """The connection: it sends statements, counts them, and says errors in our words."""

    def __init__(
        self, options: Mapping[str, object], embedded: bool, statement_timeout: float
    ) -> None:
        self.embedded = embedded
        self.statements = 0
        # An error's text is kept as the cause: without the URL.
        more = {"show_clickhouse_errors": "scrub", **options}
        if not embedded:
            more.setdefault("send_receive_timeout", statement_timeout)
            # A session of HTTP has one query at a time, and nothing here needs one.
            more.setdefault("autogenerate_session_id", False)
        self._options = {name: more.pop(name) for name in _TARGET if name in more}
        # What is no option of the client is a setting of the server, as in the client's own URLs.
        self._more = more
        self._client: Client | None = None
        self._lock = threading.Lock()
        self._wrote = False
        self.version: tuple[int, int] = (0, 0)
        #: What the session has set, of what matters here.
        self.settings: Mapping[str, str] = {}
        #: What a table has that sets nothing itself.
        self.table_settings: Mapping[str, str] = {}

    @contextmanager
    def use(self) -> Iterator[None]:
        """One at a time; counts begin anew."""
        with self._lock:
            self.statements = 0
            self._wrote = False
            if self._client is None:
                try:
                    self._connect()
                except RecognitionError:
                    self._forget()  # half of it is not known
                    raise
            yield

    def _connect(self) -> None:
        try:
            self._client = clickhouse_connect.get_client(
                **cast(Any, self._options), generic_args=dict(self._more)
            )
        except ImportError as exc:
            raise MissingDependencyError(
                "the embedded engine needs the package 'chdb', which is not installed; run: "
                'pip install "recognition[chdb]"'
            ) from exc
        except ProgrammingError as exc:
            if self.embedded:  # it has another directory open
                raise self._translate(exc, False) from exc
            raise ConfigurationError(
                "clickhouse-connect does not take an option, or the value that it has"
            ) from exc
        except ClickHouseError as exc:
            raise self._translate(exc, False) from exc
        major, minor = str(self._client.server_version).split(".")[:2]
        self.version = int(major), int(minor)
        # As one line: a setting may limit the lines of a result.
        found = self.rows(
            sql(
                "SELECT groupArray((name, value)) FROM system.settings WHERE has(%, name) OR name"
                " IN ('enable_lightweight_update', 'allow_experimental_lightweight_update',"
                " 'move_primary_key_columns_to_end_of_prewhere',"
                " 'allow_reorder_prewhere_conditions', %, %)",
                Parameter("Array(String)", [*_MEANT]),
                Parameter("String", KEEPS_MATERIALIZED),
                Parameter("String", DROP_LIMIT),
            )
        )
        self.settings = dict(found[0][0]) if found else {"limit": "1", "offset": "1"}
        for name, meant in _MEANT.items():
            if self.settings.get(name, meant) != meant:
                try:
                    self._client.set_client_setting(name, meant)
                except ClickHouseError as exc:
                    raise SinkError(
                        f"the user's profile fixes the setting {name}, with which rows could be"
                        f" lost; let the user set it to {meant!r}"
                    ) from exc
        self.table_settings = self.pairs(
            sql(
                "SELECT name, value FROM system.merge_tree_settings WHERE name IN"
                " ('enable_block_number_column', 'enable_block_offset_column',"
                " 'patch_parts_version')"
            )
        )

    def database(self) -> str:
        """The one that a table without a database is in."""
        [[name]] = self.rows(sql("SELECT currentDatabase()"))
        return str(name)

    def run(
        self,
        statement: Fragment,
        settings: Mapping[str, object] | None = None,
        *,
        writes: bool = False,
    ) -> None:
        """Send a statement that has no result."""
        text, parameters = statement.render()
        assert self._client is not None
        self.statements += 1
        try:
            self._client.command(
                text, parameters=parameters or None, settings=cast(Any, dict(settings or {}))
            )
        except ClickHouseError as exc:
            raise self._translate(exc, writes) from exc
        self._wrote = self._wrote or writes

    def rows(self, statement: Fragment) -> Sequence[Sequence[Any]]:
        """The rows of a query."""
        text, parameters = statement.render()
        assert self._client is not None
        self.statements += 1
        try:
            return self._client.query(text, parameters=parameters or None).result_rows
        except ClickHouseError as exc:
            raise self._translate(exc, False) from exc

    def pairs(self, statement: Fragment) -> dict[str, Any]:
        """The rows of a query with two columns, the second by the first."""
        return {str(key): value for key, value in self.rows(statement)}

    def insert(
        self,
        database: Name,
        table: Name,
        columns: Sequence[tuple[str, str]],
        lists: Sequence[Sequence[Any]],
    ) -> None:
        """Insert rows in bulk, given as one list for each column."""
        assert self._client is not None
        self.statements += 1
        try:
            self._client.insert(
                table=table,
                database=database,
                data=cast(Any, list(lists)),
                column_names=[name for name, _ in columns],
                column_type_names=[kind for _, kind in columns],
                column_oriented=True,
                settings={"async_insert": 0},  # the next statement looks for it
            )
        except ClickHouseError as exc:
            raise self._translate(exc, False) from exc

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _translate(self, error: ClickHouseError, writes: bool) -> SinkError:
        """The most specific error of ours; the server's text may hold values and is left out."""
        code = getattr(error, "code", None)
        if code is None and (answered := _STATUS.match(str(error))) is not None:
            return self._answered(int(answered[1]), writes)
        if code is None:
            if writes:
                return OutcomeUnknownError(
                    "the connection was lost while a statement ran; its rows were written, will"
                    " be, or not; applying the same again is safe"
                )
            return self.finished(
                SinkUnavailableError(
                    "the embedded engine could not be opened; one process can have a directory,"
                    " and a process one directory"
                    if self.embedded
                    else "the ClickHouse server cannot be reached, or the connection was lost"
                )
            )
        kind, said = _SAID.get(code, (SinkError, "ClickHouse refused a statement"))
        name = getattr(error, "name", None)
        found = kind(f"{said} (ClickHouse's error {code}{f', {name}' if name else ''})")
        if writes and code not in _BEFORE_WRITING:
            found.written = None
            return found
        return self.finished(found)

    def _answered(self, status: int, writes: bool) -> SinkError:
        """An HTTP error without a code of ClickHouse: it comes from what stands before it."""
        said = _ANSWERED.get(status, "it is no answer of a ClickHouse server; look at the URL")
        text = f"a proxy, or what else is at the server's address, answered HTTP {status}: {said}"
        if status < 500 and status not in (408, 429):
            return self.finished(SinkError(text))
        if writes and status != 429:
            return OutcomeUnknownError(
                f"{text}; the statement's rows were written, will be, or not; applying the same"
                " again is safe"
            )
        return self.finished(SinkUnavailableError(text))

    def finished(self, error: SinkError) -> SinkError:
        error.written = True if self._wrote else error.written
        return error


#: Options that say which server it is and who asks; `settings` are for every statement.
_TARGET = ("interface", "host", "port", "username", "password", "database", "path", "settings")

# How clickhouse-connect says an HTTP status that came without a code of ClickHouse.
_STATUS = re.compile(r"HTTP driver received HTTP status (\d+)")

# https://www.rfc-editor.org/rfc/rfc9110#name-status-codes
_ANSWERED: Mapping[int, str] = {
    401: "it wants another login",
    403: "it lets nobody through, or not this user",
    407: "the proxy wants a login",
    408: "it waited too long for the request",
    413: "the request is too large for it; raise its limit, or let windows be smaller",
    429: "it takes no more requests for now",
    500: "it failed",
    502: "it could not reach the server, or lost it",
    503: "it or the server is not there for now",
    504: "it waited too long for the server",
}

# What the server finds before a statement writes anything.
_BEFORE_WRITING = {
    *(16, 36, 43, 47, 48, 53, 57, 60, 62, 81, 115, 164, 242, 252, 344, 359, 392, 420, 452),
    *(497, 692),
}


def _read_url(url: str) -> dict[str, Any]:
    """What a URL says, as arguments of ours and of clickhouse-connect."""
    parts = urlsplit(url)
    given: dict[str, Any] = dict(parse_qsl(parts.query))
    if parts.scheme == "chdb":
        path = unquote(f"{parts.netloc}{parts.path}")
        if not path:
            raise ConfigurationError("the URL names no directory; it is chdb:///path")
        return {"interface": "chdb", "path": path, **given}
    try:
        port = parts.port
    except ValueError:
        raise ConfigurationError("the URL's port is no number") from None
    if parts.hostname is None:
        raise ConfigurationError(
            "the URL names no host; it is clickhouse://user:password@host:port/database"
        )
    if port is not None:
        given["port"] = port
    if parts.username is not None:
        given["username"] = unquote(parts.username)
    if parts.password is not None:
        given["password"] = unquote(parts.password)
    if database := unquote(parts.path.strip("/")):
        given["database"] = database
    secure = given.pop("secure", "false").lower() in ("true", "1")
    return {"interface": "https" if secure else "http", "host": parts.hostname, **given}


def _number(given: dict[str, Any], name: str, default: float) -> float:
    """A number that may stand in the URL."""
    said = given.pop(name, default)
    try:
        return float(said)
    except ValueError:
        raise ConfigurationError(f"{name} is {said!r}; it is a number") from None


def refuse_engine(engine: str, columns: Iterable[str] = ()) -> str:
    """Why nothing in a table of this engine can be set, or ``""``."""
    if "_partition_id" in columns:
        return "it has a column '_partition_id' of its own, which hides the engine's"
    if engine.endswith("View"):
        return "it is a view; updates need the table under it"
    if not engine.endswith("MergeTree"):
        return f"its engine is {engine}; only tables of the MergeTree family can be updated"
    return ""


#: Types without a value that means "nothing is there" as ``''`` or NULL does.
_UNTOLD = re.compile(r"^(Dynamic|Variant|SimpleAggregateFunction|AggregateFunction)\b|EPHEMERAL$")

#: What rows that are moved have beside their columns.
_MOVING = re.compile(r"recognition_(partition|block|offset|floor|row|nth|there)")


def _merged(table: Table, column: Column) -> str:
    """Why what is set in a row may not be what a reader sees, once it is merged, or ``""``."""
    engine = table.engine.removeprefix("Replicated").removeprefix("Shared")
    if engine == "CoalescingMergeTree":
        return (
            "in a CoalescingMergeTree a row may lack what another row of its key has, so that what"
            " is set in it would take the place of that"
        )
    summed = engine == "SummingMergeTree" and column.kind in ("integer", "float", "boolean")
    if summed and (not table.arguments or column.name in table.arguments):
        return "a SummingMergeTree would add up what is set in several rows of one key"
    return ""


def _immovable(table: Table) -> str:
    """Why rows of the table cannot be inserted again and deleted, or ``""``."""
    engine = table.engine.removeprefix("Replicated").removeprefix("Shared")
    if engine != "MergeTree" and not (table.replacing and table.arguments):
        return (
            f"a row of a {engine} may be merged with others before a crash is mended; only in a"
            " MergeTree, and in a ReplacingMergeTree with a version, can be told whether a row was"
            " inserted"
        )
    if taken := next((name for name in table.types if _MOVING.fullmatch(name)), None):
        return f"it has a column {taken!r}, and so have rows that are moved"
    if table.views:
        return "a materialized view would take the rows a second time"
    if table.projections:
        return "rows of a table with projections cannot be deleted in place"
    return ""


def _wanted_type(shape: Shape, name: str) -> str:
    """As what a column that is missing should be made."""
    if name in shape.times or name in (shape.messages or ())[1:]:
        return "DateTime64(6, 'UTC')"
    return "Nullable(Int64)" if name == VERSION_COLUMN else "Nullable(String)"


def _refuse(table: Table, column: Column, value: Value, is_set: bool) -> str | None:
    """Why a column cannot hold a value, or ``None``; the value itself is not shown."""
    if is_set and column.kind == "text":
        value = to_text(cast(str, value))
    reason = refuse_value(column, value, _HOLDS)
    if reason is None and column.kind == "time":
        first, last = cast(tuple[int, int], time_range(table.types[column.name]))
        if not first <= cast(int, time_or_none(value)) < last:
            return f"a time out of its range was found; it is {column.declared}"
    return reason


def _row_key(row: StagedRow) -> tuple[object, ...]:
    """By what a row is known again after a part of it was cut away."""
    return (row.update_id, row.equals)


def _key_texts(table: Table, step: Step) -> list[str]:
    """The keys as the ledger has them."""
    column = table.column(step.shape.key)
    return [_key_text(column, row.equals[0]) for row in step.rows]


def _message_texts(table: Table, step: Step) -> tuple[str, int, list[str]]:
    """Where the step's rows name messages beside their key: the column, its place, and the ids."""
    if step.shape.messages is not None:
        place = step.shape.equals.index(step.shape.messages[0])
        if place > 0:
            column = table.column(step.shape.messages[0])
            ids = [_key_text(column, row.equals[place]) for row in step.rows]
            return column.name, place, ids
    return "", 0, [""] * len(step.rows)


def _key_text(column: Column, value: Value) -> str:
    [staged] = stage_values(column, [value])
    return staged if isinstance(staged, str) else to_text(staged)


def _lock_name(table: Table) -> Name:
    """One for each table; what the lock is called when it is broken follows from its holder."""
    content = "\0".join(table.parts)
    return Name(f"{_LOCK}{blake2b(content.encode(), digest_size=8).hexdigest()}")


def _suffix(table: Table) -> str:
    """By what the lock of a table, and rows of it that are being moved, are known."""
    return _lock_name(table).removeprefix(_LOCK)


def _mark(table: Table, holder: str) -> Name:
    """What the table's lock is called when this window has it no more."""
    return Name(f"{_BROKEN}{holder}_{_suffix(table)}")


def _code_of(reason: str) -> str:
    """The code and the name of an error, out of a text that may hold values."""
    code, name = re.search(r"Code: (\d+)", reason), re.search(r"\(([A-Z][A-Z0-9_]+)\)", reason)
    return " ".join(found[1] for found in (code, name) if found) or ("an error" if reason else "")


def _touched(table: Table, step: Step, survey: _Survey) -> tuple[list[Partition], bool]:
    """
    The partitions that the step's times may lie in, and whether these are all.

    What is expected to change is spread over the partitions that each row's interval meets.
    """
    lines = survey.partitions
    column = _partition_time(table, step)
    shares = _spread(table, column, step, [_span(table, column, line) for line in lines])
    partitions = [
        Partition(
            id=line[0],
            rows=line[1],
            bytes=line[2],
            matched=share,
            patched=line[3],
            patch_parts=line[4],
            cold=line[9] > _COLD,
        )
        for line, share in zip(lines, shares, strict=True)
        if share is not None
    ]
    return partitions, len(partitions) == len(lines)


_Span = tuple[int, int]

# A DateTime64 is of the years 1900 to 2299. The seconds that no year before 1970 looks like in 32
# bits, and of the years after 2106 none that a clock is likely to be wrong by: 1990 to 2036.
_HONEST = (631_152_000, 2_085_978_495)
_WRAP = 2**32 * SECOND


def _partition_time(table: Table, step: Step) -> Column | None:
    """
    The one column of the partition key that is a time, where the step is bounded by it.

    ``system.parts`` says from when to when the rows of a part are by this column.
    """
    times = [name for name in table.partitioned_by if table.columns[name.lower()].kind == "time"]
    bounded = {table.column(bound.column).name for bound in step.bounds}
    if len(times) != 1 or times[0] not in bounded or table.column(times[0]).nullable:
        return None
    return table.column(times[0])


def _span(table: Table, column: Column | None, line: Sequence[Any]) -> _Span | None:
    """Between which times the rows of a partition lie, in microseconds, as far as it is known."""
    if column is None:
        return None
    first_time, last_time, first_day, last_day = line[5:9]
    # They are a DateTime, which ends in 2106, and 0 is also what is not known. Of a DateTime64 they
    # are what is left of it in 32 bits: years before 1970 look like 2036 and later, those after
    # 2106 like 1970 and later.
    wide = table.types[column.name].startswith("DateTime64")
    least, most = _HONEST if wide else (1, 2**32 - 2)
    if table.types[column.name].startswith("DateTime") and least <= first_time <= last_time <= most:
        return (first_time * SECOND, (last_time + 1) * SECOND)
    if table.types[column.name] == "Date" and 0 < first_day <= last_day:
        return (first_day * DAY, (last_day + 1) * DAY)
    return None


def _spread(
    table: Table, column: Column | None, step: Step, spans: Sequence[_Span | None]
) -> list[float | None]:
    """How many rows of each partition may change; ``None``: no row's interval meets it."""
    shape = step.shape
    expected = step.expected_rows
    each = VISITOR_ROWS if expected is None else expected / len(step.rows)
    if shape.messages is not None:
        each = min(each, 1.0)
    if column is None:
        return [each * len(step.rows) / len(spans) for _ in spans]
    known = sorted((*span, place) for place, span in enumerate(spans) if span is not None)
    # Those of which nothing is known are always met.
    unknown, among_unknown = len(spans) - len(known), 0.0
    # Partitions by time do not overlap, so that those which an interval meets are neighbours. Where
    # some do, a few more are taken than are met.
    starts, ends = [first for first, *_ in known], list(accumulate((e for _, e, _ in known), max))
    begins, shared = [0.0] * (len(known) + 1), [0] * (len(known) + 1)
    places = [place for place, name in enumerate(shape.times) if table.column(name) == column]
    by_message = shape.messages is not None and table.column(shape.messages[1]) == column
    for row in step.rows:
        start, end = _reach(row, places, by_message)
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if start > _WRAP or _WRAP < end < inf:
            first, last = 0, len(known)
        if met := max(last - first, 0) + unknown:
            among_unknown += each / met
        if first < last:
            share = each / met
            begins[first] += share
            begins[last] -= share
            shared[first] += 1
            shared[last] -= 1
    shares: list[float | None] = [among_unknown] * len(spans)
    for (*_, place), share, met in zip(known, accumulate(begins), accumulate(shared), strict=False):
        shares[place] = max(share, 0.0) if met else None
    return shares


def _second(time: int) -> _Span:
    """The full second that a time lies in, and one more: what is stored may be rounded."""
    start = time // SECOND * SECOND
    return start, start + 2 * SECOND


def _reach(row: StagedRow, places: Sequence[int], by_message: bool) -> tuple[float, float]:
    """The times that a row may be about, by those intervals and by its message's time or not."""
    start, end = -inf, inf
    if by_message and row.message_time is not None:
        start, end = _second(row.message_time)
    for place in places:
        lower, upper = row.intervals[place]
        if lower is not None and lower > start:
            start = lower
        if upper is not None and upper < end:
            end = upper
    return start, end
