"""What is published beside a table of ClickHouse: the kit through its view, and its own."""

# ruff: noqa: F811 - fixtures of another file are imported, and named as arguments

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar, NamedTuple

import clickhouse_connect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recognition.delivery import _find_unmatched
from recognition.errors import ConfigurationError, SinkError, SinkUnavailableError, TableError
from recognition.graph import Delivery
from recognition.messages import Empty, Equals, Messages
from recognition.planner import Shape, plan_updates
from recognition.sinks import open_sink
from recognition.sinks.clickhouse import _lock_name
from recognition.sinks.clickhouse_overrides import (
    MOST_SHAPES,
    constant,
    refuse_shape,
    refuse_table,
)
from recognition.sinks.clickhouse_statements import Parameter, Table, sql
from recognition.testing.sinks import ReadRows, at, between, device, row, unknown, update
from test_clickhouse import (  # noqa: F401 - fixtures among them
    BY_OWNER,
    DAY,
    EVENTS,
    EVERY,
    EXAMPLES,
    KEYED,
    NUMBERED,
    ClickhouseTests,
    Opened,
    _any_expected,
    _any_window,
    client,
    engine,
    every,
    opened,
    owner,
    quote,
    refusal,
)

UNNUMBERED = "index_granularity = 8192"


class OverrideTests(ClickhouseTests):
    """The kit through the view; where there is none, through the table."""

    strategy = "override"
    options: ClassVar[dict[str, Any]] = {"override_counts": True}

    @pytest.fixture
    def read_rows(self, client: Any) -> ReadRows:
        def read(table: str) -> list[dict[str, object]]:
            found = client.query(
                "SELECT name FROM system.tables WHERE database = 'test' AND name = {name:String}",
                parameters={"name": f"{table}_recognized"},
            )
            seen = f"{table}_recognized" if found.result_rows else table
            names = ", ".join(map(quote, self.columns))
            # FINAL of a view is that of nothing; the setting reaches the table under it.
            result = client.query(f"SELECT {names} FROM {quote(seen)}", settings={"final": 1})
            return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]

        return read


class TestOverride(OverrideTests):
    """A MergeTree, of which only what cannot be published is written in place."""

    @pytest.fixture(autouse=True)
    def skip_what_takes_long(self, request: pytest.FixtureRequest) -> None:
        """The same is seen of random windows, below."""
        if not EVERY and "any_order" in request.node.name:
            pytest.skip("RECOGNITION_TEST_CLICKHOUSE=all runs it")


@every
class TestOverrideAlter(OverrideTests):
    """A MergeTree that does not number its rows."""

    settings = UNNUMBERED


@every
class TestOverrideReplacing(OverrideTests):
    """A ReplacingMergeTree with a version."""

    engine_of = "ReplacingMergeTree(ver)"


@every
class TestOverrideKeys(OverrideTests):
    """Whatever is set is in the sorting key."""

    settings = KEYED
    every_column_is_a_key = True


# What readers see ---------------------------------------------------------------------------------


def seen(opened: Opened, name: str = "user_id", **settings: Any) -> dict[str, object]:
    """What a column of the view says, by message."""
    found = opened.client.query(
        f"SELECT message_id, {name} FROM events_recognized", settings=settings
    )
    return dict(found.result_rows)


def lines(opened: Opened) -> int:
    """How many lines are published."""
    found = opened.client.query(
        "SELECT sum(total_rows) FROM system.tables WHERE database = 'test'"
        " AND name LIKE 'recognition_override_%_lines_%'"
    )
    return int(found.result_rows[0][0])


def left(opened: Opened) -> list[str]:
    """What windows have left, but for what stands."""
    return [name for name in opened.made() if not name.startswith("recognition_override_")]


def test_nothing_is_written_and_the_view_says_it(opened: Opened) -> None:
    """Not one part is made; the view has the table's columns, and knows rows that come later."""
    opened.table(f"{EVENTS}, n UInt8 DEFAULT 7, upper String MATERIALIZED upper(message_id)")
    opened.rows(row("m1", "a1", 1), row("m2", "a2", 1))
    opened.rows(row("known", "a1", 1, user_id="u9"))
    parts = opened.parts()

    applied = opened.apply(owner(1, "u1", device("a1"), expected_rows=1), strategy="override")
    opened.rows(row("late", "a1", 2))

    assert (applied.rejected, applied.rows_changed, applied.matched_by_update) == ((), 0, {})
    assert seen(opened) == {"m1": "u1", "m2": None, "known": "u9", "late": "u1"}
    assert seen(opened, "recognition_version") == {"m1": 1, "m2": None, "known": None, "late": 1}
    assert set(opened.column("user_id").values()) == {None, "u9"}
    assert set(parts) < set(opened.parts())
    columns = [
        opened.client.query(f"DESCRIBE (SELECT * FROM {name})").result_rows
        for name in ("events", "events_recognized")
    ]
    assert [line[:2] for line in columns[0]] == [line[:2] for line in columns[1]]
    assert left(opened) == []


def test_an_update_that_stands_misses_nothing(opened: Opened) -> None:
    """No row is counted, so delivery takes what an update expects as met; it asks again of none."""
    opened.table()
    plan = plan_updates([owner(1, "u1", device("a1"), expected_rows=3)])
    leased = [Delivery(1, owner(1, "u1", device("a1"), expected_rows=3), 1)]

    applied = opened.sink(strategy="override").apply(plan)

    # 0: it is not known, as of any range of a device.
    assert _find_unmatched(leased, plan, applied) == {"events-1": 0}


def test_conditions_prune_through_the_view(opened: Opened) -> None:
    """Times and keys that are not set skip partitions and granules, as they do in the table."""
    opened.table(
        rest="PARTITION BY toYYYYMMDD(timestamp) ORDER BY (anonymous_id, message_id)",
        settings=f"{KEYED}, index_granularity = 8",
    )
    opened.rows(*(row(f"m{n}", f"a{n % 50}", n % 4 * DAY) for n in range(2000)))
    opened.apply(owner(1, "u1", device("a1"), between(0, 9 * DAY)), strategy="override")

    def read(condition: str, of: str) -> int:
        found = opened.client.query(f"EXPLAIN ESTIMATE SELECT user_id FROM {of} WHERE {condition}")
        return sum(line[3] for line in found.result_rows if line[1] == "events")

    for condition, most in (
        ("anonymous_id = 'a7'", 200),
        ("timestamp >= '2026-01-02 00:00:00' AND timestamp < '2026-01-03 00:00:00'", 500),
        ("anonymous_id = 'a7' AND toDate(timestamp) = '2026-01-04'", 60),
    ):
        assert read(condition, "events_recognized") == read(condition, "events") <= most
    plans = [
        str(opened.client.query(f"EXPLAIN actions = 1 SELECT {name} FROM events_recognized")
            .result_rows)
        for name in ("count(message_id)", "count(user_id)")
    ]  # fmt: skip
    assert ["joinGet" in plan for plan in plans] == [False, True]


@pytest.mark.parametrize("versioned", [True, pytest.param(False, marks=every)])
def test_of_several_shapes_the_greatest_sequence_stands(
    opened: Opened,
    versioned: bool,
) -> None:
    """Column by column, whatever order they came in; squashed it is the same."""
    opened.table(f"{EVENTS}, email Nullable(String)")
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(4)))
    opened.rows(row("known", "a1", 1, user_id="u9"))
    empty = [unknown()] if versioned else []
    both = update(
        2,
        {"user_id": "u2", "email": "e2"},
        device("a1"),
        between(0, 3),
        *empty,
        versioned=versioned,
    )
    others = [
        update(
            n, {"user_id": f"u{n}"}, device("a1"), between(n // 2, 9), *empty, versioned=versioned
        )
        for n in (1, 3)
    ]
    named = Messages(id_column="message_id", time_column="timestamp", refs=(("m0", at(0)),))
    last = update(4, {"user_id": "u4"}, device("a1"), named, *empty, versioned=versioned)

    sink = opened.sink(strategy="override")
    for each in (last, others[1], both, others[0]):
        assert sink.apply(plan_updates([each])).rejected == ()
    users, emails = seen(opened), seen(opened, "email")
    sink.squash("events")

    known = "u9" if versioned else "u3"
    assert users == {"m0": "u4", "m1": "u3", "m2": "u3", "m3": "u3", "known": known}
    also = [] if versioned else ["known"]
    assert {name for name, e in emails.items() if e == "e2"} == {"m0", "m1", "m2", *also}
    assert (seen(opened), seen(opened, "email")) == (users, emails)
    assert (opened.column("user_id"), opened.column("email")) == (users, emails)
    assert lines(opened) == 0


def test_one_update_may_stand_whole_and_in_pieces(opened: Opened) -> None:
    """A row that both meet, of different shapes and the same sequence, has its value."""
    opened.table()
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(3)))
    sink = opened.sink(strategy="override")
    whole, later = owner(1, "u1", device("a1")), owner(2, "u2", device("a1"), between(1, 2))

    sink.apply(plan_updates([whole]))
    sink.apply(plan_updates([whole, later]))

    assert seen(opened) == {"m0": "u1", "m1": "u2", "m2": "u1"}


def test_rows_without_a_time_are_met_by_what_has_no_start(opened: Opened) -> None:
    """Of an update of a whole device, a later one takes an interval; the rest is left."""
    opened.table(
        "message_id String, anonymous_id String, stitched_user_id String,"
        " timestamp Nullable(DateTime64(3, 'Asia/Tokyo'))",
        "ORDER BY message_id",
        UNNUMBERED,
    )
    opened.rows(*(row(f"m{n}", "a1", n, stitched_user_id="") for n in range(3)))
    opened.client.command("INSERT INTO events VALUES ('none', 'a1', '', NULL)")
    sink = opened.sink(strategy="override")

    sink.apply(
        plan_updates(
            [
                update(1, {"stitched_user_id": "A"}, device("a1")),
                update(2, {"stitched_user_id": "B"}, device("a1"), between(1, 2)),
            ]
        )
    )
    found = seen(opened, "stitched_user_id")
    sink.squash("events")

    assert found == {"m0": "A", "m1": "B", "m2": "A", "none": "A"}
    assert opened.column("stitched_user_id") == found


@pytest.mark.parametrize(
    ("anonymous", "user", "time", "key"),
    [
        ("String", "String", "DateTime64(3, 'Asia/Tokyo')", "a1"),
        ("LowCardinality(Nullable(String))", "LowCardinality(Nullable(String))", "DateTime", "a1"),
        ("UUID", "LowCardinality(String)", "Nullable(DateTime64(9, 'UTC'))", f"{'6f' * 16}"),
        ("UInt16", "UUID", "DateTime", 7),
    ],
)
def test_columns_of_any_wrapping_are_seen_as_they_are(
    opened: Opened,
    anonymous: str,
    user: str,
    time: str,
    key: str | int,
) -> None:
    """The view's types are the table's, and what it says is what a squash writes."""
    opened.table(
        f"message_id String, anonymous_id {anonymous}, user_id {user}, timestamp {time},"
        " recognition_version UInt64",
        "ORDER BY message_id",
        UNNUMBERED,
    )
    wanted = "0" * 31 + "1" if user == "UUID" else "u1"
    names = "message_id, anonymous_id, timestamp"
    for name, seconds in (("m1", 1), ("late", 60)):
        stamp = int(at(seconds).timestamp())
        opened.client.command(
            f"INSERT INTO events ({names}) SELECT {{n:String}}, {{k:String}}, toDateTime({stamp})",
            parameters={"n": name, "k": str(key)},
        )
    sink = opened.sink(strategy="override")
    where = Equals(column="anonymous_id", value=key)

    sink.apply(plan_updates([owner(1, wanted, where, between(0, 60))]))
    found = seen(opened, "toString(user_id)")
    types = [
        opened.client.query(f"SELECT DISTINCT toTypeName(user_id) FROM {name}").result_rows
        for name in ("events", "events_recognized")
    ]
    sink.squash("events")

    assert [str(found["m1"]).replace("-", ""), found["m1"] == found["late"]] == [wanted, False]
    assert types[0] == types[1]
    assert opened.column("toString(user_id)") == found


def test_what_is_published_outlives_the_engine(opened: Opened) -> None:
    """Tables by key are loaded again from the disk, whatever was published one after the other."""
    opened.table()
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(12)))
    sink = opened.sink(strategy="override")
    for n in range(12):
        sink.apply(plan_updates([owner(n, f"u{n}", device("a1"), between(n, 99))]))
    found = opened.client.query(
        "SELECT name FROM system.tables WHERE database = 'test' AND engine = 'Join'"
    )
    for (name,) in found.result_rows:
        opened.client.command(f"DETACH TABLE {name}")
        opened.client.command(f"ATTACH TABLE {name}")

    assert len(found.result_rows) == 1
    assert seen(opened) == {f"m{n}": f"u{n}" for n in range(12)}


def test_a_merged_table_is_seen_merged_by_the_setting(opened: Opened) -> None:
    """A row that is delivered again is recognised too; `final = 1` reaches through the view."""
    opened.table(f"{EVENTS}, ver UInt64", engine="ReplacingMergeTree(ver)")
    opened.client.command("SYSTEM STOP MERGES events")
    opened.rows(row("m1", "a1", 1, ver=1))
    sink = opened.sink(strategy="override", override_counts=True)

    applied = sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    opened.rows(row("m1", "a1", 1, ver=1))
    again = sink.apply(plan_updates([owner(1, "u1", device("a1"))]))

    count = "SELECT user_id, count() FROM events_recognized GROUP BY 1"
    assert opened.client.query(count).result_rows == [("u1", 2)]
    assert opened.client.query(count, settings={"final": 1}).result_rows == [("u1", 1)]
    assert (applied.rows_changed, again.rows_changed, again.rows_matched) == (1, 0, 1)


# Squashing ----------------------------------------------------------------------------------------

TABLES = {
    "update": ("MergeTree", "ORDER BY message_id", NUMBERED),
    "alter": ("MergeTree", "ORDER BY message_id", UNNUMBERED),
    "insert": ("ReplacingMergeTree(ver)", "ORDER BY message_id", UNNUMBERED),
    "delete-and-insert": ("MergeTree", BY_OWNER, KEYED),
}


@pytest.mark.parametrize(
    "strategy",
    ["update", "delete-and-insert", *(pytest.param(n, marks=every) for n in ("alter", "insert"))],
)
def test_squashing_writes_what_the_view_says(opened: Opened, strategy: str) -> None:
    """By whatever is possible in place; then nothing stands, and again there is nothing to do."""
    engine_of, rest, by = TABLES[strategy]
    opened.table(f"{EVENTS}, ver UInt64", rest, by, engine_of)
    opened.rows(*(row(f"m{n}", f"a{n % 3}", n, ver=1) for n in range(9)))
    sink = opened.sink(strategy="override")
    sink.apply(plan_updates([owner(n, f"u{n}", device(f"a{n}"), between(0, 7)) for n in (1, 2)]))
    before = seen(opened, final=1)

    changed, again = sink.squash("events"), sink.squash("events")

    final = "FINAL" if strategy == "insert" else ""
    assert (changed, again) == (4, 0)
    assert opened.column("user_id", final) == before == seen(opened, final=1)
    assert sorted(map(str, before.values())) == ["None"] * 5 + ["u1"] * 2 + ["u2"] * 2
    assert lines(opened) == 0
    definition = opened.client.query(
        "SELECT as_select FROM system.tables WHERE name = 'events_recognized'"
    ).result_rows
    assert "joinGet" not in definition[0][0]
    assert left(opened) == []
    sink.apply(plan_updates([owner(9, "u9", device("a0"))]))
    assert seen(opened, final=1)["m0"] == "u9"


def _grow_older(opened: Opened) -> None:
    found = opened.client.query(
        "SELECT name FROM system.tables WHERE database = 'test'"
        " AND name LIKE 'recognition_override_%_lines_%'"
    )
    for (name,) in found.result_rows:
        opened.client.command(
            f"ALTER TABLE {name} UPDATE published_at = published_at - 1000 WHERE 1",
            settings={"mutations_sync": 1},
        )


def test_a_window_squashes_what_is_old(opened: Opened) -> None:
    """When the oldest line is older than the setting all is written in place; 0 is never."""
    opened.table()
    opened.rows(row("m1", "a1", 1), row("m2", "a2", 1))
    sinks = [opened.sink(strategy="override", squash_after=after) for after in (0, 2000, 900)]
    sinks[0].apply(plan_updates([owner(1, "u1", device("a1"))]))
    _grow_older(opened)

    stored = []
    for sink in sinks:
        sink.apply(plan_updates([owner(2, "u2", device("a2"))]))
        stored.append(opened.column("user_id"))

    assert stored == [{"m1": None, "m2": None}] * 2 + [{"m1": "u1", "m2": "u2"}]
    assert seen(opened) == {"m1": "u1", "m2": "u2"}
    assert lines(opened) == 1


def test_what_cannot_be_squashed_stands_on(
    opened: Opened,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A table in which nothing can be written in place says so once, and goes on publishing."""
    opened.table(rest=BY_OWNER, settings="allow_nullable_key = 1")
    opened.rows(row("m1", "a1", 1), row("m2", "a2", 1))
    sink = opened.sink(strategy="override", squash_after=900)
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    for n in (2, 3):
        _grow_older(opened)
        assert sink.apply(plan_updates([owner(n, f"u{n}", device("a2"))])).rejected == ()

    with pytest.raises(TableError, match="no strategy is possible"):
        sink.squash("events")
    with pytest.raises(TableError, match="has no table 'evnts'"):
        sink.squash("evnts")

    assert seen(opened) == {"m1": "u1", "m2": "u3"}
    warned = [each for each in caplog.records if each.levelname == "WARNING"]
    assert len(warned) == 1
    assert "cannot be squashed" in warned[0].message
    assert left(opened) == []


@pytest.mark.parametrize("versioned", [pytest.param(True, marks=every), False])
def test_another_strategy_squashes_first(opened: Opened, versioned: bool) -> None:
    """A window that writes in place does so after what was published, so that the order stays."""
    opened.table()
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(3)))
    made = [
        update(n, {"user_id": f"u{n}"}, device("a1"), between(first, 9), versioned=versioned)
        for n, first in ((1, 0), (2, 1), (3, 2))
    ]

    opened.apply(made[1], strategy="override")
    opened.apply(made[2], strategy="alter")
    opened.apply(made[0], strategy="update")

    expected = {"m0": "u1", "m1": "u2", "m2": "u3"}
    assert opened.column("user_id") == expected == seen(opened)
    assert lines(opened) == 0


# What is not published ----------------------------------------------------------------------------


def _shape(*columns: str, **more: Any) -> Shape:
    return Shape(table="events", columns=columns, equals=("anonymous_id",), **more)


def test_a_shape_stands_beside_those_that_ask_nothing_of_it() -> None:
    """What an update asks of a row is asked of it as it is stored: no other may set it."""
    user = _shape("user_id", empty=("user_id",))
    both = _shape("email", "user_id", empty=("user_id",))
    email = _shape("email", empty=("user_id",))

    assert refuse_shape(user, [user, both]) == ""
    assert "sets 'User_ID', and another asks" in refuse_shape(email, [_shape("User_ID")])
    assert "sets 'user_id', and another asks" in refuse_shape(email, [user])
    assert "sets 'user_id', and another asks" in refuse_shape(user, [email])
    assert "looks for a value" in refuse_shape(
        Shape(table="events", columns=("user_id",), equals=("anonymous_id", "user_id")), []
    )
    many = [_shape(f"c{n}") for n in range(MOST_SHAPES)]
    assert refuse_shape(many[0], many) == ""
    assert f"{MOST_SHAPES} shapes stand" in refuse_shape(user, many)
    assert "each replica" in refuse_table(
        Table(parts=("d", "t"), columns={}, engine="SharedMergeTree")
    )


def test_what_cannot_be_published_is_written_after_what_was(opened: Opened) -> None:
    """An update that looks for what another wrote finds it; then publishing goes on."""
    opened.table(f"{EVENTS}, email Nullable(String)")
    opened.rows(*(row(f"m{n}", f"a{n}", n) for n in range(3)))
    sink = opened.sink(strategy="override")
    sink.apply(plan_updates([owner(n, f"u{n}", device(f"a{n}")) for n in (1, 2)]))

    applied = sink.apply(
        plan_updates(
            [
                update(
                    3,
                    {"user_id": "u3"},
                    Equals(column="user_id", value="u1"),
                    device("a1"),
                    versioned=True,
                )
            ]
        )
    )
    stored = opened.column("user_id")
    sink.apply(plan_updates([owner(4, "u4", device("a0"))]))
    published = opened.column("user_id")
    asks = update(5, {"email": "e"}, device("a0"), Empty(column="user_id"), versioned=True)
    sink.apply(plan_updates([asks]))

    assert applied.rows_changed == 1
    assert stored == {"m0": None, "m1": "u3", "m2": "u2"} == published
    assert opened.column("user_id") == {"m0": "u4", "m1": "u3", "m2": "u2"} == seen(opened)
    assert set(seen(opened, "email").values()) == {None}


def test_as_many_shapes_stand_as_a_query_can_look_for(opened: Opened) -> None:
    """One more has those that stand squashed, in one statement, and is published alone."""
    names = [f"c{n}" for n in range(MOST_SHAPES + 1)]
    opened.table(", ".join([EVENTS, *(f"{name} Nullable(String)" for name in names)]))
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(MOST_SHAPES + 2)))
    sink = opened.sink(strategy="override")
    stood = []
    for n, name in enumerate(names, start=1):
        values = {"user_id": f"u{n}", name: name}
        made = update(n, values, device("a1"), between(n, 99), unknown(), versioned=True)
        assert sink.apply(plan_updates([made])).rejected == ()
        stood.append(lines(opened))

    users = {f"m{n}": f"u{n}" if n else None for n in range(MOST_SHAPES + 2)}
    assert stood == [*range(1, MOST_SHAPES + 1), 1]
    assert opened.column("user_id") == users | {f"m{MOST_SHAPES + 1}": f"u{MOST_SHAPES}"}
    assert seen(opened) == users
    assert list(seen(opened, "c2").values()).count("c2") == MOST_SHAPES - 1
    assert sink.squash("events") == 1
    assert opened.column("user_id") == users


def test_single_rows_that_later_updates_took_are_spared(opened: Opened) -> None:
    """An earlier update of a device comes after a later one of a message: it is written around."""
    opened.table()
    opened.rows(*(row(f"m{n}", "a1", n) for n in range(3)))
    sink = opened.sink(strategy="override")
    named = Messages(id_column="message_id", time_column="timestamp", refs=(("m1", at(1)),))

    sink.apply(plan_updates([update(2, {"user_id": "B"}, device("a1"), named)]))
    sink.apply(plan_updates([update(1, {"user_id": "A"}, device("a1"))]))

    assert seen(opened) == {"m0": "A", "m1": "B", "m2": "A"} == opened.column("user_id")


def test_what_can_neither_be_published_nor_written_is_refused(opened: Opened) -> None:
    """The text says why not the one, and what to add for the other; what stands, stands on."""
    opened.table(
        f"{EVENTS}, email Nullable(String)", rest=BY_OWNER, settings="allow_nullable_key = 1"
    )
    opened.rows(row("m1", "a1", 1))
    sink = opened.sink(strategy="override")
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))

    held = update(
        2, {"user_id": "u2"}, Equals(column="user_id", value="u1"), device("a1"), versioned=True
    )
    said = refusal(sink.apply(plan_updates([held])))
    asks = update(3, {"email": "e"}, device("a1"), Empty(column="user_id"), versioned=True)
    with pytest.raises(
        TableError, match="cannot be published: one update sets 'user_id'"
    ) as caught:
        sink.apply(plan_updates([asks]))
    in_place = refusal(opened.apply(owner(4, "u4", device("a1")), strategy="auto"))

    assert "looks for a value of 'user_id'" in said
    assert "MODIFY SETTING" in said
    assert "MODIFY SETTING" in str(caught.value)
    assert "or publish it, by strategy=override" in in_place
    assert seen(opened) == {"m1": "u1"}
    assert left(opened) == []


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE events_recognized (x UInt8) ENGINE = Memory",
        "CREATE VIEW events_recognized AS SELECT 1 AS x",
    ],
)
def test_what_is_not_ours_is_left_alone(opened: Opened, statement: str) -> None:
    """A table or view that has the view's name is somebody's: nothing is published."""
    opened.table()
    opened.client.command(statement)
    made = opened.client.query("SHOW CREATE events_recognized").result_rows
    sink = opened.sink(strategy="override")
    plan = plan_updates([owner(1, "u1", device("a1"))])

    said = refusal(sink.apply(plan))
    rehearsed = refusal(sink.rehearse(plan))

    assert said == rehearsed
    assert "something else than its view that is called 'events_recognized'" in said
    assert opened.client.query("SHOW CREATE events_recognized").result_rows == made
    assert opened.made() == []


def test_a_replicated_table_is_refused(opened: Opened) -> None:
    """What is published is on one host alone."""
    opened.table()
    sink = opened.sink(strategy="override")
    plan = plan_updates([owner(1, "u1", device("a1"))])
    sink.compile(plan.steps[0])
    sink._tables["events"] = replace(sink._tables["events"], engine="ReplicatedMergeTree")

    [(_, refused)] = sink.rehearse(plan).rejected

    assert "override is not possible, because each replica" in str(refused)


def test_a_view_has_the_columns_that_the_table_has_now(opened: Opened) -> None:
    """A column that is added appears with the next window; one that lines speak of is missed."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    sink = opened.sink(strategy="override")
    plan = plan_updates([owner(1, "u1", device("a1"))])
    sink.apply(plan)
    uuid = "SELECT uuid FROM system.tables WHERE name = 'events_recognized'"
    views = [opened.client.query(uuid).result_rows]
    sink.apply(plan)
    views.append(opened.client.query(uuid).result_rows)
    opened.client.command("ALTER TABLE events ADD COLUMN more UInt8 DEFAULT 3")
    sink.apply(plan)

    assert views[0] == views[1]  # it was not made again
    assert seen(opened, "more") == {"m1": 3}
    opened.client.command("ALTER TABLE events DROP COLUMN recognition_version")
    with pytest.raises(TableError, match="no column 'recognition_version', of which published"):
        sink.squash("events")


# What a crash leaves ------------------------------------------------------------------------------


class _Interrupted(Exception):
    """The process is gone, as far as the test goes."""


def _stop_after(sink: Any, count: int) -> list[int]:
    """The sink sends so many statements that change something, and no more; how many it sent."""
    server, sent = sink._server, [0]

    def counted(send: Callable[..., Any]) -> Callable[..., Any]:
        def sends(*args: Any, **more: Any) -> Any:
            if sent[0] == count:
                raise _Interrupted
            sent[0] += 1
            return send(server, *args, **more)

        return sends

    server.run, server.insert = counted(type(server).run), counted(type(server).insert)
    return sent


def _recover(sink: Any) -> None:
    del sink._server.run, sink._server.insert


def _interrupt(
    opened: Opened,
    work: Callable[[Any], Any],
    then: Callable[[Any, int], None],
    step: int,
) -> int:
    """Do ``work`` on a new table, stop after so many statements and more; how many it sends."""
    place = 0
    while True:
        for name in ("events", "events_recognized", "recognition_ledger", *opened.made()):
            opened.client.command(f"DROP TABLE IF EXISTS {name} SYNC")
        opened.table(rest="ORDER BY message_id")
        opened.rows(*(row(f"m{n}", f"a{n % 2}", n) for n in range(4)))
        sink = opened.sink(strategy="override")
        sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
        sent = _stop_after(sink, place)
        try:
            work(sink)
        except _Interrupted:
            then(sink, place)
        else:
            return sent[0]
        place += 1 if EVERY else step


@pytest.mark.parametrize("strategy", ["override", pytest.param("alter", marks=every)])
def test_publishing_that_stops_anywhere_is_completed(
    opened: Opened,
    strategy: str,
) -> None:
    """After each statement the worker is gone: who comes next completes it, by any strategy."""
    more = [
        owner(2, "u2", device("a1"), between(2, 9)),
        update(3, {"user_id": "u3", "recognition_version": 3}, device("a0"), between(2, 9)),
    ]
    expected = {"m0": None, "m1": "u1", "m2": "u3", "m3": "u2"}

    def then(sink: Any, place: int) -> None:
        before = seen(opened)
        _recover(sink)

        opened.apply(*more, strategy=strategy)

        assert before["m1"] == "u1", place
        assert seen(opened) == expected, place
        if strategy == "alter":
            assert opened.column("user_id") == expected, place
            assert lines(opened) == 0
        assert [name for name in left(opened) if "broken" not in name] == []

    assert _interrupt(opened, lambda sink: sink.apply(plan_updates(more)), then, 8) > 15


def test_squashing_that_stops_anywhere_is_completed(opened: Opened) -> None:
    """Before, in between and after readers see the same; another squash finishes it."""
    expected = {"m0": None, "m1": "u1", "m2": None, "m3": "u1"}

    def then(sink: Any, place: int) -> None:
        between_times = seen(opened)
        _recover(sink)

        sink.squash("events")

        assert between_times == expected == seen(opened) == opened.column("user_id"), place
        assert lines(opened) == 0
        assert [name for name in left(opened) if "broken" not in name] == []
        sink.apply(plan_updates([owner(2, "u2", device("a0"))]))
        assert seen(opened) == {**expected, "m0": "u2", "m2": "u2"}, place

    assert _interrupt(opened, lambda sink: sink.squash("events"), then, 6) > 12


@pytest.mark.parametrize("begin", ["INSERT INTO `test`.`recognition_override_", "EXCHANGE TABLES"])
def test_a_worker_that_was_taken_for_dead_publishes_nothing(
    opened: Opened,
    begin: str,
) -> None:
    """It sleeps before a statement, another one applies what is later: it fails, and may retry."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    sink = opened.sink(strategy="override")
    sink.apply(plan_updates([update(1, {"user_id": "u1"}, device("a1"))]))
    other = opened.sink(strategy="update")

    def run(statement: Any, *args: Any, **more: Any) -> None:
        if statement.render()[0].startswith(begin) and sink._server.run is run:
            del sink._server.run
            table = sink._tables["events"]
            [[held]] = opened.client.query(
                f"SELECT name FROM system.columns WHERE table = '{_lock_name(table)}'"
            ).result_rows
            with other._server.use():
                other._break(table, held[2:])
            other.apply(plan_updates([update(3, {"user_id": "u3"}, device("a1"))]))
        type(sink._server).run(sink._server, statement, *args, **more)

    sink._server.run = run
    with pytest.raises(SinkUnavailableError, match="took window"):
        sink.apply(plan_updates([update(2, {"user_id": "u2"}, device("a1"))]))

    assert seen(opened) == {"m1": "u3"} == opened.column("user_id")
    assert lines(opened) == 0
    sink.apply(plan_updates([update(2, {"user_id": "u2"}, device("a1"))]))
    assert seen(opened) == {"m1": "u3"}


@pytest.mark.parametrize(
    "begin", ["CREATE VIEW", "CREATE TABLE IF NOT EXISTS `test`.`recognition_s"]
)
def test_a_worker_that_was_taken_for_dead_squashes_nothing(
    opened: Opened,
    begin: str,
) -> None:
    """It sleeps before it copies or forgets what stands, another one publishes: that stands."""
    opened.table()
    opened.rows(row("m1", "a1", 1), row("m2", "a2", 1))
    sink, other = opened.sink(strategy="override"), opened.sink(strategy="override")
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))

    def run(statement: Any, *args: Any, **more: Any) -> None:
        if statement.render()[0].startswith(begin) and sink._server.run is run:
            del sink._server.run
            table = sink._tables["events"]
            [[held]] = opened.client.query(
                f"SELECT name FROM system.columns WHERE table = '{_lock_name(table)}'"
            ).result_rows
            with other._server.use():
                other._find("events")
                other._break(table, held[2:])
            other.apply(plan_updates([owner(2, "u2", device("a2"))]))
        type(sink._server).run(sink._server, statement, *args, **more)

    sink._server.run = run
    with pytest.raises(SinkUnavailableError, match="took window"):
        sink.squash("events")

    assert seen(opened) == {"m1": "u1", "m2": "u2"}
    squashed = "u1" if begin == "CREATE VIEW" else None
    assert opened.column("user_id") == {"m1": squashed, "m2": None}
    sink.squash("events")
    assert opened.column("user_id") == {"m1": "u1", "m2": "u2"} == seen(opened)


# Statements ---------------------------------------------------------------------------------------


def test_a_definition_holds_numbers_and_names_of_types_alone() -> None:
    """Parameters become constants: numbers as such, texts quoted, and nothing else."""
    made = constant(sql("% %", Parameter("Int64", -(2**63)), Parameter("String", "a'b\\")))

    assert made.render() == ("toInt64(-9223372036854775808) 'a\\'b\\\\'", {})
    with pytest.raises(TypeError, match=r"Array\(String\)"):
        constant(sql("%", Parameter("Array(String)", [])))


def test_a_plan_names_the_view_and_what_it_costs(opened: Opened) -> None:
    """`compile` shows the view, says who has to query it, and lists it where others are taken."""
    opened.table(f"{EVENTS}, `it's` Nullable(String)")
    opened.rows(*(row(f"m{n}", f"a{n}", n) for n in range(9)))
    plan = plan_updates([owner(1, "secret", device("a1"))])

    said = opened.sink(strategy="override").compile(plan.steps[0])
    usual = opened.sink().compile(plan.steps[0])

    assert said.startswith("CREATE VIEW `test`.`events_recognized` AS SELECT `message_id`")
    assert "readers have to query `test`.`events_recognized`" in said
    assert "-- override in 1 of 1 partitions" in said
    assert "secret" not in said
    assert opened.made() == []
    assert "MB written; only where it is forced" in usual
    assert "readers have to" not in usual
    assert opened.client.command(f"EXPLAIN AST {said.partition(';')[0]}")


def test_what_a_table_of_lines_says_can_be_read(opened: Opened) -> None:
    """Its comment is the shape; one of a later version is refused, and nothing is written."""
    opened.table()
    opened.rows(row("m1", "a1", 1))
    sink = opened.sink(strategy="override")
    sink.apply(plan_updates([owner(1, "u1", device("a1"))]))
    [[name, comment]] = opened.client.query(
        "SELECT name, comment FROM system.tables WHERE name LIKE 'recognition_override_%_lines_%'"
    ).result_rows

    assert json.loads(comment)["columns"] == ["recognition_version", "user_id"]
    later = comment.replace('"recognition": 1', '"recognition": 2')
    opened.client.command(f"ALTER TABLE {name} MODIFY COMMENT '{later}'")
    with pytest.raises(SinkError, match="by a later version"):
        opened.apply(owner(2, "u2", device("a1")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("squash_after=-1", "squash_after is -1.0"),
        ("squash_after=soon", "squash_after is 'soon'"),
        ("override_counts=maybe", "override_counts is 'maybe'"),
    ],
)
def test_settings_are_checked(options: str, said: str) -> None:
    """A setting that means nothing is refused before anything is connected."""
    with pytest.raises(ConfigurationError, match=said):
        open_sink(f"clickhouse://host/db?strategy=override&{options}")


# Any table, any window ----------------------------------------------------------------------------


class _Case(NamedTuple):
    """A table and what is done to it."""

    engine: str
    settings: str
    user: str
    key: str
    versioned: bool
    seed: int


@st.composite
def _cases(draw: st.DrawFn) -> _Case:
    numbered = draw(st.booleans())
    versioned = draw(st.booleans())
    key = draw(st.sampled_from(["message_id", "toDate(timestamp), message_id"]))
    if numbered and draw(st.booleans()):
        key = f"{'user_id' if versioned else 'stitched_user_id'}, {key}"
    return _Case(
        draw(st.sampled_from(["MergeTree", "ReplacingMergeTree(ver)"])),
        KEYED if numbered else UNNUMBERED,
        draw(st.sampled_from(["Nullable(String)", "String", "LowCardinality(Nullable(String))"])),
        key,
        versioned,
        draw(st.integers(0, 10**6)),
    )


def test_any_view_says_what_the_last_updates_say(engine: str) -> None:
    """Random tables and windows in any order, squashes, other strategies and rows in between."""

    @settings(max_examples=max(1, EXAMPLES // 6), deadline=None, database=None)
    @given(_cases())
    def check(case: _Case) -> None:
        client = clickhouse_connect.get_client(interface="chdb", path=engine)
        opened = Opened(engine, client)
        try:
            _check_case(opened, case)
        finally:
            for sink in opened.sinks:
                sink.close()
            client.close()

    check()


def _check_case(opened: Opened, case: _Case) -> None:
    random = Random(case.seed)
    opened.client.command("DROP DATABASE IF EXISTS test SYNC")
    opened.client.command("CREATE DATABASE test")
    opened.client.command("USE test")
    column = "user_id" if case.versioned else "stitched_user_id"
    opened.table(
        f"message_id String, anonymous_id LowCardinality(String), user_id {case.user},"
        f" stitched_user_id {case.user}, timestamp DateTime64(6, 'UTC'),"
        " recognition_version Nullable(Int64), ver UInt32",
        f"PARTITION BY toYYYYMMDD(timestamp) ORDER BY ({case.key})",
        case.settings,
        case.engine,
    )
    empty = None if "Nullable" in case.user else ""
    rows = [
        row(f"{n}-{t}", f"a{n}", t * DAY / 4, user_id=empty, stitched_user_id=empty, ver=1)
        for n in range(4)
        for t in range(8)
    ]
    random.shuffle(rows)
    window = _any_window(random, case.versioned)
    opened.rows(*rows[:20])
    sink, in_place = opened.sink(strategy="override"), opened.sink()
    again: Sequence[Any] = [*random.sample(window, len(window)), *random.sample(window, 2)]
    arrives = random.randrange(len(again))
    came = False
    while again:
        size = random.randint(1, 4)
        if not came and len(again) <= arrives:
            opened.rows(*rows[20:])
            came = True
        by = in_place if random.random() < 0.15 else sink
        assert by.apply(plan_updates(again[:size])).rejected == ()
        if random.random() < 0.25:
            sink.squash("events")
        again = again[size:]
    if not came:
        opened.rows(*rows[20:])
    # What came after it was squashed is met when the updates come again.
    sink.apply(plan_updates(window))

    expected = _any_expected(rows, window, column, empty)
    assert seen(opened, column, final=1) == expected, case
    sink.squash("events")
    assert seen(opened, column, final=1) == expected, case
    final = "" if case.engine == "MergeTree" else "FINAL"
    assert opened.column(column, final) == expected, case
    assert left(opened) == []
