"""Partitions of ClickHouse that are written anew and swapped in, with and without a writer."""

# ruff: noqa: F811 - fixtures of another file are imported, and named as arguments

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, ClassVar, Self

import clickhouse_connect
import pytest

from recognition.errors import OutcomeUnknownError, SinkError, SinkUnavailableError, TableError
from recognition.planner import plan_updates
from recognition.sinks.clickhouse_statements import Table
from recognition.sinks.clickhouse_swap import Look, Outcome, Part, outcome_of, unswappable
from recognition.testing.sinks import between, device, row
from test_clickhouse import (  # noqa: F401 - the engine's fixtures
    DAY,
    EVENTS,
    NUMBERED,
    ClickhouseTests,
    Opened,
    client,
    engine,
    every,
    opened,
    owner,
    refusal,
)

#: Without the numbers of rows, so that nothing else is possible for a column of the key.
PLAIN = "index_granularity = 8192, allow_nullable_key = 1"
KEYED = "PARTITION BY toYYYYMMDD(timestamp) ORDER BY (coalesce(user_id, anonymous_id), message_id)"
SWAP: Mapping[str, Any] = {"strategy": "replace-partition", "quiet": 0}


@every
class TestSwapped(ClickhouseTests):
    """The kit, where whatever is set is in the sorting key and rows have no numbers."""

    settings = PLAIN
    strategy = "replace-partition"
    every_column_is_a_key = True
    options: ClassVar[Mapping[str, Any]] = {"quiet": 0}


@every
class TestSwappedReplacing(TestSwapped):
    """The same in a ReplacingMergeTree."""

    engine_of = "ReplacingMergeTree(ver)"


# What is swapped ----------------------------------------------------------------------------------


def test_a_partition_is_written_anew_where_nothing_else_is_possible(opened: Opened) -> None:
    """
    Each row once and whole under its new key; what does not change is copied as it is stored.

    A view is not fed again, a projection holds, deleted rows stay so, and other partitions are left
    alone. The second time nothing is written.
    """
    opened.table(
        f"{EVENTS}, more JSON, came DateTime64(6) MATERIALIZED now64(6), upper String MATERIALIZED"
        " upper(coalesce(user_id, '')), day Date ALIAS toDate(timestamp), temporary String"
        " EPHEMERAL, PROJECTION p (SELECT user_id, message_id ORDER BY user_id)",
        KEYED,
        f"{PLAIN}, lightweight_mutation_projection_mode = 'rebuild'",
    )
    opened.client.command("CREATE TABLE seen (n UInt64) ENGINE = MergeTree ORDER BY n")
    opened.client.command("CREATE MATERIALIZED VIEW v TO seen AS SELECT 1 AS n FROM events")
    rows = [row(f"m{n % 9}", f"a{n % 3}", n % 3 * DAY, more='{"x": [1, "z"]}') for n in range(12)]
    opened.rows(*rows, row("gone", "a1", DAY, more="{}"))
    opened.client.command("DELETE FROM events WHERE message_id = 'gone'")
    came = opened.column("came")
    parts = opened.parts()
    sink = opened.sink(**SWAP)
    plan = plan_updates([owner(1, "u1", device("a1"), between(0, 2 * DAY))])

    said = sink.compile(plan.steps[0])
    applied, swapped = sink.apply(plan), opened.parts()
    again = sink.apply(plan)

    met = sum(each["anonymous_id"] == "a1" for each in rows)
    assert (applied.rows_changed, again.rows_changed, again.rows_matched) == (met, 0, met)
    assert opened.parts() == swapped
    kept = {name for name in parts if not name.startswith("20260102")}
    assert kept == {name for name in swapped if not name.startswith("20260102")}
    found = opened.client.query(
        "SELECT message_id, user_id, upper, toString(more), day FROM events ORDER BY ALL"
    ).result_rows
    users = {f"m{n}": "u1" if n % 3 == 1 else None for n in range(9)}
    assert [line[:2] for line in found] == sorted(
        ((str(each["message_id"]), users[str(each["message_id"])]) for each in rows), key=str
    )
    assert all(line[2] == (line[1] or "").upper() for line in found)
    assert {line[3] for line in found} == {'{"x":[1,"z"]}'}
    assert opened.column("came") == came
    assert opened.client.query("SELECT sum(n) FROM seen").result_rows == [(13,)]
    by_user = "SELECT message_id FROM events WHERE user_id = 'u1' ORDER BY user_id"
    assert opened.client.query(by_user).row_count == met
    swaps = [line for line in said.splitlines() if "REPLACE PARTITION" in line]
    assert len(swaps) == 2  # as many as the times meet; a count leaves one alone
    assert "FROM `test`.`recognition_stage_1_partition`" in swaps[0]
    assert re.search(r"-- replace-partition: about .* written; only where it is forced", said)
    assert opened.made() == []


def test_it_is_never_chosen_and_named_where_nothing_else_is_possible(opened: Opened) -> None:
    """By itself nothing is swapped: the reason says what may be forced, and what must hold then."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m1", "a1", 1))

    chosen = refusal(opened.apply(owner(1, "u1", device("a1"))))
    moved = refusal(opened.apply(owner(1, "u1", device("a1")), strategy="delete-and-insert"))
    applied = opened.apply(owner(1, "u1", device("a1")), **SWAP)

    for said in (chosen, moved):
        assert "nothing else writes to the partitions, strategy=replace-partition" in said
    assert "no strategy is possible" in chosen
    assert "possible: replace-partition" in moved
    assert (applied.rejected, applied.rows_changed) == ((), 1)


@pytest.mark.parametrize(
    ("table", "names", "settings", "said"),
    [
        ({"engine": "ReplicatedMergeTree"}, ["u"], {}, "another replica"),
        ({"engine": "SharedMergeTree"}, ["u"], {}, "another replica"),
        ({"engine": "SummingMergeTree"}, ["u"], {}, "a SummingMergeTree merges rows"),
        ({"partitioned_by": frozenset("u")}, ["u"], {}, "'u' is in PARTITION BY"),
        (
            {"partitioned_by": frozenset("z"), "materialized": {"y": "upper(u)", "z": "lower(y)"}},
            ["u"],
            {"insert_allow_materialized_columns": "0"},
            "'z' is in PARTITION BY",
        ),
        (
            {"engine": "ReplacingMergeTree", "arguments": ("v",)},
            ["v"],
            {},
            "'v' is the version of a row",
        ),
        ({"materialized": {"y": "upper(u)", "z": "now()"}}, ["u"], {}, "'z' is MATERIALIZED"),
        ({"materialized": {"y": "upper(u)"}}, ["u"], {}, ""),
        ({"engine": "ReplacingMergeTree", "arguments": ("v",)}, ["u"], {}, ""),
    ],
)
def test_where_no_partition_can_be_swapped(
    table: dict[str, Any], names: list[str], settings: dict[str, str], said: str
) -> None:
    """What would move, merge, be computed anew or come in elsewhere is refused by its reason."""
    reason = unswappable(Table(parts=("db", "t"), columns={}, **table), names, settings)

    assert said in reason
    assert bool(said) == bool(reason)


def test_of_rows_with_one_key_and_version_the_last_one_still_stands(opened: Opened) -> None:
    """A ReplacingMergeTree keeps the order of its rows, over parts and within one."""
    opened.table(
        f"{EVENTS}, n UInt32, ver UInt8",
        KEYED,
        PLAIN,
        "ReplacingMergeTree(ver)",
    )
    opened.client.command("SYSTEM STOP MERGES events")
    for part in range(4):
        opened.client.insert(
            "events",
            [[f"m{n}", "a1", None, row("m", "a", 1)["timestamp"], None, part, 1] for n in range(50)]
            * 2,
            column_names=["message_id", "anonymous_id", "user_id", "timestamp",
                          "recognition_version", "n", "ver"],
            database="test",
            settings={"optimize_on_insert": 0},
        )  # fmt: skip

    applied = opened.apply(owner(1, "u1", device("a1")), **SWAP)

    assert applied.rows_changed == 400
    opened.client.command("SYSTEM START MERGES events")
    opened.client.command("OPTIMIZE TABLE events FINAL")
    found = opened.client.query("SELECT DISTINCT n, user_id, count() OVER () FROM events")
    assert found.result_rows == [(3, "u1", 50)]


@pytest.mark.parametrize("patches", ["never", "always"])
def test_what_was_swapped_is_updated_in_place_later(opened: Opened, patches: str) -> None:
    """Rows of a swapped partition have numbers of their own: they are patched, moved and merged."""
    opened.table(f"{EVENTS}, stitched Nullable(String)", KEYED, f"{NUMBERED}, {PLAIN}")
    opened.rows(*(row(f"m{n}", f"a{n % 2}", 1) for n in range(8)))
    opened.apply(owner(1, "p", device("a0")), strategy="delete-and-insert", patches="never")

    first = opened.apply(owner(2, "u", device("a1")), **SWAP)
    opened.rows(*(row(f"n{n}", f"a{n % 2}", 1) for n in range(8)))
    moved = opened.apply(owner(3, "w", device("a1")), strategy="delete-and-insert", patches=patches)
    opened.client.command("OPTIMIZE TABLE events FINAL")
    again = opened.apply(owner(4, "x", device("a1")), **SWAP)
    last = opened.apply(owner(5, "y", device("a0")), strategy="delete-and-insert", patches=patches)

    changed = [each.rows_changed for each in (first, moved, again, last)]
    assert changed == [4, 8, 8, 8]
    users = {0: "y", 1: "x"}
    expected = {f"{kind}{n}": users[n % 2] for kind in "mn" for n in range(8)}
    assert opened.column("user_id") == expected
    assert opened.client.query("SELECT count() FROM events").result_rows == [(16,)]


def test_rows_that_this_user_cannot_read_are_not_dropped(opened: Opened) -> None:
    """Where a filter hides rows of a partition, a copy lacks them: it is not swapped in."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m1", "a1", 1), row("hidden", "a1", 1))
    hides = {"additional_table_filters": "{'test.events': 'message_id != ''hidden'''}"}

    with pytest.raises(TableError, match="2 rows are stored in it, this user reads 1") as caught:
        opened.apply(owner(1, "u1", device("a1")), settings=hides, **SWAP)

    assert not caught.value.written
    assert opened.column("user_id") == {"m1": None, "hidden": None}
    assert opened.made() == []


# Who else writes ----------------------------------------------------------------------------------


def test_a_partition_that_was_written_to_is_refused(opened: Opened) -> None:
    """Only where nothing was written for so long; what a swap of ours brought is no write."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m1", "a1", 1), row("m2", "a2", 1))

    with pytest.raises(SinkUnavailableError) as caught:
        opened.apply(owner(1, "u1", device("a1")), strategy="replace-partition")
    nothing = opened.apply(owner(1, "u1", device("a9")), strategy="replace-partition")
    time.sleep(2.1)
    quiet = {**SWAP, "quiet": 2}
    first = opened.apply(owner(1, "u1", device("a1")), **quiet)
    second = opened.apply(owner(2, "u2", device("a2")), **quiet)
    opened.rows(row("m3", "a3", 1))
    with pytest.raises(SinkUnavailableError, match=r"for 2 \(option quiet"):
        opened.apply(owner(3, "u3", device("a3")), **quiet)

    assert re.search(r"partition 20260101 was written to \d seconds ago", str(caught.value))
    assert "for 3600 (option quiet); nothing of this step was written" in str(caught.value)
    assert not caught.value.written
    assert (nothing.rows_changed, first.rows_changed, second.rows_changed) == (0, 1, 1)
    assert opened.column("user_id") == {"m1": "u1", "m2": "u2", "m3": None}
    assert opened.made() == []


def test_inserts_that_run_or_wait_are_waited_for(opened: Opened, engine: str) -> None:
    """
    A statement that inserts, and an asynchronous insert that was taken, is waited for or named.

    The embedded engine writes asynchronous inserts at once: what waits is put into its answer.
    """
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m1", "a1", 1))
    plan = plan_updates([owner(1, "u1", device("a1"))])
    slow = (
        "INSERT INTO test.events (message_id, anonymous_id, timestamp)"
        " SELECT 'slow', 'a1', '2026-01-01 00:00:00' WHERE sleep(1.5) = 0"
    )
    writer = clickhouse_connect.get_client(interface="chdb", path=engine)
    thread = threading.Thread(target=writer.command, args=(slow,))
    thread.start()
    time.sleep(0.3)

    with pytest.raises(SinkUnavailableError, match="1 statements run and 0 asynchr") as running:
        opened.sink(**SWAP, timeout=0.1).apply(plan)
    sink = opened.sink(**SWAP, timeout=0.1)
    server = sink._server
    server.rows = lambda statement: (
        [[0, 1]]
        if "asynchronous_inserts" in statement.render()[0]
        else type(server).rows(server, statement)
    )
    thread.join()
    with pytest.raises(SinkUnavailableError, match="0 statements run and 1 asynchr") as waiting:
        sink.apply(plan)
    applied = opened.apply(owner(1, "u1", device("a1")), **SWAP)
    writer.close()

    assert not running.value.written
    assert not waiting.value.written
    assert applied.rows_changed == 2
    assert opened.column("user_id") == {"m1": "u1", "slow": "u1"}


def _before(sink: Any, pattern: str, act: Callable[[], None], times: int = 1) -> None:
    """Something happens right before a statement of the sink."""
    server = sink._server

    def run(statement: Any, *args: Any, **more: Any) -> None:
        nonlocal times
        if times and re.match(pattern, statement.render()[0]):
            times -= 1
            act()
        type(server).run(server, statement, *args, **more)

    server.run = run


ASIDE = "`test`.`recognition_stage_.*_partition`"
POINTS = (f"CREATE TABLE {ASIDE}", f"INSERT INTO {ASIDE}", "ALTER TABLE .* REPLACE")


def test_rows_that_come_while_a_partition_is_copied_stay(opened: Opened) -> None:
    """At each point a row comes in: the swap does not happen, and the copy is made again."""
    for point in POINTS:
        opened.client.command("DROP TABLE IF EXISTS events SYNC")
        opened.table(rest=KEYED, settings=PLAIN)
        opened.rows(*(row(f"m{n}", "a1", 1) for n in range(5)))
        sink = opened.sink(**SWAP)
        _before(sink, point, lambda: opened.rows(row("late", "a1", 1)))

        applied = sink.apply(plan_updates([owner(1, "u1", device("a1"))]))

        expected = dict.fromkeys([*(f"m{n}" for n in range(5)), "late"], "u1")
        assert opened.column("user_id") == expected, point
        assert applied.rows_changed == 6, point
        assert opened.made() == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE events SET note = 'new' WHERE message_id = 'm2'",
        "ALTER TABLE events UPDATE note = 'new' WHERE message_id = 'm2'",
        "DELETE FROM events WHERE message_id = 'm2'",
        "ALTER TABLE events DROP PARTITION ID '20260101'",
    ],
)
def test_what_others_change_while_a_partition_is_copied_stays_changed(
    opened: Opened, change: str
) -> None:
    """Neither an update nor a deletion by others is undone by a copy that was made before."""
    opened.table(f"{EVENTS}, note String", KEYED, f"{NUMBERED}, {PLAIN}")
    opened.rows(row("m1", "a1", 1, note=""), row("m2", "a2", 1, note=""))
    sink = opened.sink(**SWAP)
    server = sink._server
    done = []

    def rows(statement: Any) -> Any:
        found = type(server).rows(server, statement)
        if "hash_of_all_files" in statement.render()[0] and not done:
            done.append(opened.client.command(change, settings={"mutations_sync": 1}))
        return found

    server.rows = rows
    plan = plan_updates([owner(1, "u1", device("a1"))])

    if "DROP PARTITION" in change:
        with pytest.raises(SinkUnavailableError, match="somebody wrote to it"):
            sink.apply(plan)
        assert opened.column("note") == {}
    else:
        assert sink.apply(plan).rows_changed == 1
        notes = {"m1": "", **({} if "DELETE" in change else {"m2": "new"})}
        assert opened.column("note") == notes
        assert opened.column("user_id")["m1"] == "u1"


def test_a_partition_that_changes_each_time_is_given_up(opened: Opened) -> None:
    """Who writes all the time is not locked out; with `quiet` the first row that comes ends it."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m0", "a1", 1))
    came = 0

    def write() -> None:
        nonlocal came
        came += 1
        opened.rows(row(f"late{came}", "a1", 1))

    sink = opened.sink(**SWAP, timeout=0.5)
    _before(sink, f"INSERT INTO {ASIDE}", write, 999)
    with pytest.raises(SinkUnavailableError, match="it changed each time") as caught:
        sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    time.sleep(1.1)
    sink = opened.sink(**{**SWAP, "quiet": 1})
    _before(sink, f"INSERT INTO {ASIDE}", write)
    with pytest.raises(SinkUnavailableError, match="somebody wrote to it while it was copied"):
        sink.apply(plan_updates([owner(1, "u1", device("a1"))]))

    assert not caught.value.written
    assert set(opened.column("user_id").values()) == {None}
    assert len(opened.column("user_id")) == 1 + came
    assert opened.made() == []


def test_rows_that_a_swap_drops_are_said(opened: Opened) -> None:
    """Where no limit of a dropped size is known, a row of the last moment is lost and said."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(*(row(f"m{n}", "a1", 1) for n in range(5)))
    plan = plan_updates([owner(1, "u1", device("a1"))])
    sink = opened.sink(**SWAP)
    sink.compile(plan.steps[0])
    limit = sink._server.settings.pop("max_partition_size_to_drop")
    late = [row("late", "a1", 1), row("late2", "a2", 1)]
    _before(sink, POINTS[-1], lambda: opened.rows(*late))

    with pytest.raises(SinkError, match=r"inserted is lost \(2 rows\). Have what came") as caught:
        sink.apply(plan)
    kept = opened.column("user_id")
    opened.rows(*late)
    again = sink.apply(plan)

    assert int(limit) > 0
    assert "partition 20260101: while it was swapped, others inserted" in str(caught.value)
    assert (caught.value.written, caught.value.retryable) == (True, False)
    assert kept == {f"m{n}": "u1" for n in range(5)}
    assert again.rows_changed == 1
    assert opened.column("user_id") == {**kept, "late": "u1", "late2": None}
    assert opened.made() == []


def test_what_was_swapped_before_another_partition_is_refused_is_said(opened: Opened) -> None:
    """The error of the second partition says that something was written; again completes it."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m1", "a1", 1), row("m2", "a1", DAY))
    plan = plan_updates([owner(1, "u1", device("a1"))])
    sink = opened.sink(**SWAP, timeout=0.2)
    came = 0

    def write() -> None:
        nonlocal came
        came += 1
        if came > 1:
            opened.rows(row(f"late{came}", "a2", DAY if opened.column("user_id")["m1"] else 1))

    _before(sink, f"INSERT INTO {ASIDE}", write, 999)
    with pytest.raises(SinkUnavailableError, match="it changed each time") as caught:
        sink.apply(plan)
    del sink._server.run
    between_two = opened.column("user_id")
    again = sink.apply(plan)

    assert caught.value.written
    assert sorted((between_two["m1"] or "", between_two["m2"] or "")) == ["", "u1"]
    assert again.rows_changed == 1
    assert opened.made() == []


@pytest.mark.parametrize("seen", [True, False])
def test_a_connection_that_is_lost_after_a_swap_says_what_may_be_lost(
    opened: Opened, seen: bool
) -> None:
    """Whoever could not look must not be silent: rows of those moments may be lost."""
    opened.table(rest=KEYED, settings=PLAIN)
    opened.rows(row("m1", "a1", 1))
    plan = plan_updates([owner(1, "u1", device("a1"))])
    sink = opened.sink(**SWAP)
    server = sink._server

    def rows(statement: Any) -> Any:
        if "refcount" in statement.render()[0]:
            raise SinkUnavailableError("it is gone")
        return type(server).rows(server, statement)

    def run(statement: Any, *args: Any, **more: Any) -> None:
        type(server).run(server, statement, *args, **more)
        if "REPLACE PARTITION" in statement.render()[0]:
            raise OutcomeUnknownError("it is gone")

    if seen:
        server.rows = rows
    else:
        server.run = run

    with pytest.raises(OutcomeUnknownError, match="partition 20260101: it was swapped or will be"):
        sink.apply(plan)
    again = opened.apply(owner(1, "u1", device("a1")), **SWAP)

    assert again.rows_changed == 0
    assert opened.column("user_id") == {"m1": "u1"}


TRIALS = int(os.environ.get("RECOGNITION_RACE_TRIALS", "1"))


@pytest.mark.parametrize("guarded", [True, False])
def test_a_writer_at_the_same_time_loses_nothing_in_silence(
    opened: Opened,
    engine: str,
    guarded: bool,
) -> None:
    """
    A thread inserts all the time: each of its rows is there, or an error said how many are not.

    Unguarded, as on an older server, the size of what is dropped is not limited.
    """
    swaps = lost = 0
    for trial in range(TRIALS):
        opened.client.command("DROP TABLE IF EXISTS events SYNC")
        opened.table(rest=KEYED, settings=PLAIN)
        opened.rows(*(row(f"m{n}", f"a{n}", 1) for n in range(8)))
        plans = [plan_updates([owner(n, f"u{n}", device(f"a{n}"))]) for n in range(8)]
        sink = opened.sink(**SWAP, timeout=2)
        sink.compile(plans[0].steps[0])
        if not guarded:
            del sink._server.settings["max_partition_size_to_drop"]
        told = 0
        with _Writer(engine, trial) as writer:
            for plan in plans:
                try:
                    sink.apply(plan)
                except SinkUnavailableError:
                    continue
                except SinkError as error:
                    told += sum(map(int, re.findall(r"is lost \((\d+) rows\)", str(error))))
                swaps += 1
        there = opened.client.query(
            "SELECT uniqExact(message_id), count(), countIf(anonymous_id != 'b') FROM events"
        ).result_rows
        assert there == [(8 + writer.written - told, 8 + writer.written - told, 8)]
        lost += told

    sys.stdout.write(f"\n{guarded=}: {swaps} of {8 * TRIALS} swapped, {lost} rows lost and said\n")
    assert swaps


class _Writer:
    """A thread that inserts a row at a time, in the partition that is swapped and in another."""

    def __init__(self, path: str, seed: int) -> None:
        self.written = 0
        self._path, self._random, self._stop = path, Random(seed), threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        writer = clickhouse_connect.get_client(interface="chdb", path=self._path)
        while not self._stop.wait(self._random.choice([0.001, 0.02, 0.1, 0.2])):
            writer.command(
                "INSERT INTO test.events (message_id, anonymous_id, timestamp) VALUES"
                f" ('w{self.written}', 'b', '2026-01-0{self.written % 2 + 1} 00:00:00')"
            )
            self.written += 1
        writer.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


# What is told after a swap ------------------------------------------------------------------------


def _part(first: int, partition: str = "p", **more: Any) -> Part:
    values = {"active": False, "rows": 10, "last": first, "level": 0, "holders": 1, "content": ""}
    return Part(partition=partition, first=first, **{**values, **more})


NEW = _part(9, active=True, content="new")
OLD = _part(4)


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        # The swap itself takes number 8.
        ([OLD, NEW], Outcome(9, 9, 0, unseen=False)),
        ([OLD, NEW, _part(7), _part(6, rows=2)], Outcome(9, 9, 12, unseen=False)),
        # It was merged before it was dropped, with an old one.
        ([OLD, NEW, _part(7), _part(4, last=7, level=1)], Outcome(9, 9, 10, unseen=False)),
        # What comes after is no loss, and neither is what goes elsewhere.
        ([OLD, NEW, _part(10), _part(7, "q", active=True)], Outcome(9, 9, 0, unseen=False)),
        # The engine has cleaned up, and number 7 is nobody's.
        ([NEW, _part(6, "q")], Outcome(9, 9, 0, unseen=True)),
        ([OLD._replace(holders=2), NEW, _part(6, "q")], Outcome(9, 9, 0, unseen=True)),
        ([NEW, _part(6, "q"), _part(7, "q")], Outcome(9, 9, 0, unseen=False)),
        # Parts that were swapped in are not found.
        ([OLD], Outcome(0, 0, 0, unseen=True)),
    ],
)
def test_what_a_swap_did_is_told_by_the_numbers(parts: list[Part], outcome: Outcome) -> None:
    """Numbers between the last look and the new parts are others' rows, or are accounted for."""
    look = Look(rows=10, size=10, block=4, version=5, age=9, last=5)

    assert outcome_of("p", look, ["new"], parts) == outcome
