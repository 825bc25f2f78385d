"""
The conformance kit for sinks: subclass `SinkTests`, give three fixtures, and the file is done.

It does not trust what it tests: rows go in and come out by the author's own way, around the sink.
It never looks inside, and where a sink lacks a capability it tests that the sink refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import ClassVar

import pytest

from recognition.errors import TableError, UnsupportedPolicyError
from recognition.messages import (
    VERSION_COLUMN,
    Between,
    Criterion,
    Empty,
    Equals,
    Messages,
    OneOf,
    UpdateByCriteria,
)
from recognition.planner import plan_updates
from recognition.sinks import Applied, Capabilities, Sink

Row = Mapping[str, object]
WriteRows = Callable[[str, Sequence[Row]], None]
ReadRows = Callable[[str], list[dict[str, object]]]

START = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

#: Values that have broken a quoting, a trimming, a folding or a parser somewhere.
HOSTILE_VALUES = (
    "O'Brien",
    '"quoted"',
    "Robert'); DROP TABLE events;--",
    "100%s %(name)s %%",
    ":name ::text ?1 $1",
    "back\\slash\\'",
    "two\nlines\r\n\ttab",
    "  blanks around  ",
    "NULL",
    "007",
    "1e5",
    "{}[]",
    "\u0130stanbul \u00df \u00fc u\u0308 \U0001f9ea\u200d",
    "x" * 65_536,
)

#: Names that are legal in a message and awkward in SQL.
HOSTILE_NAMES = ("select", "Order Details", "na\u00efve-$table", "group", "UPPER_case", "_1")


def at(seconds: float) -> datetime:
    """So many seconds after `START`."""
    return START + timedelta(seconds=seconds)


def update(
    sequence: int,
    set: Mapping[str, str | int | float | bool | None],
    *where: Criterion,
    table: str = "events",
    versioned: bool = False,
    expected_rows: int | None = None,
) -> UpdateByCriteria:
    """An update whose id says its sequence; ``versioned`` sets the version beside the rest."""
    values = dict(set)
    if versioned:
        values[VERSION_COLUMN] = sequence
    return UpdateByCriteria(
        id=f"{table}-{sequence}",
        workspace="w1",
        table=table,
        set=values,
        where=where,
        sequence=sequence,
        expected_rows=expected_rows,
        created_at=START,
    )


def device(anonymous_id: str) -> Equals:
    """The rows of one device."""
    return Equals(column="anonymous_id", value=anonymous_id)


def between(start: float, end: float) -> Between:
    """The rows of an interval, in seconds after `START`; the end is not included."""
    return Between(column="timestamp", start=at(start), end=at(end))


def unknown() -> Empty:
    """The rows that name no user."""
    return Empty(column="user_id")


def row(message_id: str, anonymous_id: str | None, seconds: float, **columns: object) -> Row:
    """A row of an event, so many seconds after `START`."""
    return {
        "message_id": message_id,
        "anonymous_id": anonymous_id,
        "timestamp": at(seconds),
        **columns,
    }


class SinkTests:
    """
    What every sink keeps.

    A subclass overrides the three fixtures and adds nothing else::

        class TestMySink(SinkTests):
            @pytest.fixture
            def sink(self, tmp_path): ...

            @pytest.fixture
            def write_rows(self, tmp_path): ...

            @pytest.fixture
            def read_rows(self, tmp_path): ...
    """

    #: The columns of a table that ``write_rows`` makes, each with what it holds; all but the first
    #: may be NULL.
    columns: ClassVar[Mapping[str, str]] = {
        "message_id": "text",
        "anonymous_id": "text",
        "user_id": "text",
        "timestamp": "time",
        "context_traits_email": "text",
        "context_traits_age": "integer",
        "context_traits_score": "float",
        "context_traits_subscribed": "boolean",
        "stitched_user_id": "text",
        "recognition_version": "integer",
    }

    @pytest.fixture
    def sink(self) -> Sink:
        """The sink under test, on an empty destination; the fixture closes it."""
        raise NotImplementedError("the subclass gives the sink under test")

    @pytest.fixture
    def write_rows(self) -> WriteRows:
        """
        Put rows into a table, which is made with `columns` when it is not there.

        A row is a dictionary by column; a column that is missing is NULL. Times are datetimes with
        a zone, to the microsecond.
        """
        raise NotImplementedError("the subclass says how rows are written")

    @pytest.fixture
    def read_rows(self) -> ReadRows:
        """All rows of a table, as dictionaries by column; how times are given does not matter."""
        raise NotImplementedError("the subclass says how rows are read")

    # Which rows --------------------------------------------------------------------------------

    def test_sets_the_rows_that_meet_all_criteria(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """A row is set when it meets every criterion, and stays as it is when it misses one."""
        write_rows(
            "events",
            [
                row("meets", "a1", 10),
                row("other_device", "a2", 10),
                row("no_device", None, 10),
                row("too_early", "a1", -10),
                row("too_late", "a1", 100),
                row("known", "a1", 10, user_id="u9"),
            ],
        )

        applied = _apply(
            sink, _basic(sink, 1, {"user_id": "u1"}, device("a1"), unknown(), between(0, 60))
        )

        assert _column(read_rows("events"), "user_id") == {
            "meets": "u1",
            "other_device": None,
            "no_device": None,
            "too_early": None,
            "too_late": None,
            "known": "u9",
        }
        assert applied.rejected == ()

    def test_one_of_reaches_each_of_its_values(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """`one_of` reaches the rows of all its values and of no other."""
        write_rows("events", [row(f"m{n}", f"a{n}", n) for n in range(5)])

        _apply(
            sink,
            _basic(
                sink,
                1,
                {"user_id": "u1"},
                OneOf(column="anonymous_id", values=("a1", "a3", "a7", "a1")),
                unknown(),
            ),
        )

        assert _column(read_rows("events"), "user_id") == {
            "m0": None,
            "m1": "u1",
            "m2": None,
            "m3": "u1",
            "m4": None,
        }

    def test_messages_reach_the_rows_that_they_name(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """`messages` reaches the rows of its ids, and no other row of the same device or time."""
        write_rows("events", [row(f"m{n}", "a1", n + 0.123456) for n in range(6)])
        named = Messages(
            id_column="message_id",
            time_column="timestamp",
            refs=tuple((f"m{n}", at(n + 0.123456)) for n in (0, 2, 5)),
        )
        named_too = named.model_copy(update={"refs": (("m3", at(3.123456)),)})

        _apply(
            sink,
            _basic(sink, 1, {"user_id": "u1"}, named),
            _basic(sink, 2, {"user_id": "u2"}, device("a1"), named_too),
        )

        assert _column(read_rows("events"), "user_id") == {
            "m0": "u1",
            "m1": None,
            "m2": "u1",
            "m3": "u2",
            "m4": None,
            "m5": "u1",
        }

    def test_an_interval_is_half_open_to_the_microsecond(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """The start of `between` is included and its end is not, to the microsecond."""
        start, end = at(0) + 7 * _MICROSECOND, at(1) + 9 * _MICROSECOND
        times = {
            "before": start - _MICROSECOND,
            "start": start,
            "last": end - _MICROSECOND,
            "end": end,
        }
        write_rows(
            "events",
            [{"message_id": n, "anonymous_id": "a1", "timestamp": t} for n, t in times.items()],
        )

        _apply(
            sink,
            _basic(
                sink,
                1,
                {"user_id": "u1"},
                device("a1"),
                Between(column="timestamp", start=start, end=end),
            ),
        )

        assert _column(read_rows("events"), "user_id") == {
            "before": None,
            "start": "u1",
            "last": "u1",
            "end": None,
        }

    def test_keys_are_compared_exactly(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """A key is no other that differs in case, in blanks or in how a letter is composed."""
        keys = ["Key", "key", "KEY", "Key ", " Key", "K\u00e9y", "Ke\u0301y", "Key\n", "Kex"]
        write_rows("events", [row(f"m{n}", key, n) for n, key in enumerate(keys)])

        _apply(
            sink,
            *(
                _basic(sink, n, {"user_id": f"user of {n}"}, device(key), unknown())
                for n, key in enumerate(keys, start=1)
                if key != "Kex"
            ),
        )

        assert _column(read_rows("events"), "user_id") == {
            f"m{n}": None if key == "Kex" else f"user of {n + 1}" for n, key in enumerate(keys)
        }

    def test_an_update_never_inserts(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """An update that meets no row leaves the table as it was."""
        write_rows("events", [row("m1", "a1", 1)])
        before = read_rows("events")

        applied = _apply(
            sink,
            _basic(sink, 1, {"user_id": "u1"}, device("a2"), unknown()),
            _basic(
                sink,
                2,
                {"user_id": "u2"},
                Messages(id_column="message_id", time_column="timestamp", refs=(("m2", at(1)),)),
            ),
        )

        assert read_rows("events") == before
        assert (applied.rows_matched, applied.rows_changed, applied.rejected) == (0, 0, ())

    def test_rows_of_known_users_stay(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """With `empty` on the user column no row of a known user is given away, by either way."""
        rows = [row("anonymous", "a1", 1), row("known", "a1", 2, user_id="u9")]
        for table in ("versioned", "plain"):
            write_rows(table, rows)

        _apply(
            sink,
            update(
                1, {"user_id": "u1"}, device("a1"), unknown(), table="versioned", versioned=True
            ),
            _basic(sink, 2, {"user_id": "u1"}, device("a1"), unknown(), table="plain"),
        )

        expected = {"anonymous": "u1", "known": "u9"}
        assert _column(read_rows("versioned"), "user_id") == expected
        assert _column(read_rows("plain"), "user_id") == expected

    # Again, late, and in any order --------------------------------------------------------------

    def test_applying_twice_is_applying_once(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """The second time nothing is changed, and the rows still count as matched."""
        write_rows("events", [row(f"m{n}", "a1", n) for n in range(4)])
        updates = [
            _basic(sink, 1, {"user_id": "u1"}, device("a1"), unknown(), between(0, 2)),
            _basic(sink, 2, {"stitched_user_id": "u2"}, device("a1"), between(2, 4)),
        ]
        first = _apply(sink, *updates)
        once = read_rows("events")

        second = _apply(sink, *updates)

        assert _sorted(read_rows("events")) == _sorted(once)
        assert (first.rows_matched, first.rows_changed) == (4, 4)
        assert (second.rows_matched, second.rows_changed) == (4, 0)

    def test_a_late_row_is_met_when_the_update_comes_again(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """A row that landed after the update is set when the same update is applied again."""
        write_rows("events", [row("m1", "a1", 1)])
        again = _basic(sink, 1, {"user_id": "u1"}, device("a1"), unknown(), between(0, 9))
        _apply(sink, again)
        write_rows("events", [row("late", "a1", 2)])

        _apply(sink, again)

        assert _column(read_rows("events"), "user_id") == {"m1": "u1", "late": "u1"}

    @pytest.mark.parametrize("last", ["A", None])
    def test_any_order_converges_by_version(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows, last: str | None
    ) -> None:
        """With a version in each row, the greatest sequence stands in whatever order they come."""
        for number, order in enumerate(permutations(range(3))):
            table = f"events_{number}"
            updates = _owners("user_id", last, table, unknown(), versioned=True)
            write_rows(table, _timeline_rows(known=True))

            for place in (*order, order[0]):
                applied = _apply(sink, updates[place])
                assert applied.rejected == ()

            expected = {**_owned_rows(updates, "user_id"), "known": "u9"}
            assert _column(read_rows(table), "user_id") == expected, f"order {order}"

    @pytest.mark.parametrize("last", ["A", None])
    def test_any_order_converges_by_ledger(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows, last: str | None
    ) -> None:
        """Without versions the sink remembers the order itself, or refuses such updates."""
        for number, order in enumerate(permutations(range(3))):
            table = f"events_{number}"
            updates = _owners("stitched_user_id", last, table)
            write_rows(table, _timeline_rows(known=False))
            if not sink.capabilities.ledger:
                _assert_refused(_apply(sink, *updates), updates)
                assert set(_column(read_rows(table), "stitched_user_id").values()) == {None}
                continue

            for place in (*order, order[0]):
                applied = _apply(sink, updates[place])
                assert applied.rejected == ()

            expected = _owned_rows(updates, "stitched_user_id")
            assert _column(read_rows(table), "stitched_user_id") == expected, f"order {order}"

    def test_what_a_later_update_took_is_not_missing(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Of two messages a later update has one: each time, both of the earlier one are found."""
        if not sink.capabilities.ledger:
            return
        write_rows("events", [row("m0", "a1", 0), row("m1", "a1", 1)])
        first, second = (
            update(
                number,
                {"stitched_user_id": user},
                device("a1"),
                Messages(
                    id_column="message_id",
                    time_column="timestamp",
                    refs=tuple((f"m{n}", at(n)) for n in range(count)),
                ),
                expected_rows=count,
            )
            for number, user, count in ((1, "u1", 2), (2, "u2", 1))
        )
        _apply(sink, second)

        for _ in range(3):
            applied = _apply(sink, first)

            assert applied.matched_by_update.get(first.id, 2) == 2

        assert _column(read_rows("events"), "stitched_user_id") == {"m0": "u2", "m1": "u1"}

    def test_a_later_update_takes_no_more_than_its_columns(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Without versions each column holds what the last update of it says, in any order."""
        both = {"stitched_user_id": "A", "context_traits_email": "a@example.com"}
        for number, order in enumerate([(0, 1), (1, 0)]):
            table = f"events_{number}"
            write_rows(table, [row("m1", "a1", 1), row("m2", "a1", 5)])
            updates = [
                update(1, both, device("a1"), between(0, 9), table=table),
                update(2, {"stitched_user_id": "B"}, device("a1"), between(4, 9), table=table),
            ]
            if not sink.capabilities.ledger:
                _assert_refused(_apply(sink, *updates), updates)
                continue

            for place in order:
                _apply(sink, updates[place])

            found = read_rows(table)
            assert _column(found, "stitched_user_id") == {"m1": "A", "m2": "B"}
            assert set(_column(found, "context_traits_email").values()) == {"a@example.com"}

    def test_one_plan_does_what_one_by_one_does(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """The net effect of a window is what its updates do one after the other."""
        tables = ("at_once", "one_by_one")
        updates = {
            table: [
                *_owners("user_id", "A", table, unknown(), versioned=True),
                update(
                    4,
                    {"user_id": "C"},
                    Equals(column="user_id", value="B"),
                    device("a1"),
                    table=table,
                    versioned=True,
                ),
                update(
                    5,
                    {"context_traits_email": "a@example.com"},
                    device("a1"),
                    between(30, 50),
                    table=table,
                    versioned=True,
                ),
            ]
            for table in tables
        }
        for table in tables:
            write_rows(table, _timeline_rows(known=True))

        _apply(sink, *reversed(updates["at_once"]))
        for single in updates["one_by_one"]:
            _apply(sink, single)

        found = [_sorted(read_rows(table)) for table in tables]
        assert found[0] == found[1]
        assert {"A", "C", "u9"} == set(_column(read_rows("at_once"), "user_id").values()) - {None}

    # Values and names ---------------------------------------------------------------------------

    def test_hostile_values_arrive_unchanged(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Whatever a text holds, it selects its own rows and is stored as it is."""
        write_rows("events", [row(f"m{n}", v, n) for n, v in enumerate(HOSTILE_VALUES)])
        updates = [
            _basic(sink, n, {"user_id": value[::-1]}, device(value), unknown())
            for n, value in enumerate(HOSTILE_VALUES, start=1)
        ]

        # The last is long, and others beside it may go another way than without it.
        for part in (updates[:-1], updates[-1:]):
            assert _apply(sink, *part).rejected == ()

        assert _column(read_rows("events"), "user_id") == {
            f"m{n}": value[::-1] for n, value in enumerate(HOSTILE_VALUES)
        }

    def test_hostile_names_are_names(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """A table may be called like a keyword, with blanks, capitals or letters of any script."""
        for name in HOSTILE_NAMES:
            write_rows(name, [row("m1", "a1", 1)])

        applied = _apply(
            sink,
            *(
                _basic(sink, n, {"user_id": name}, device("a1"), unknown(), table=name)
                for n, name in enumerate(HOSTILE_NAMES)
            ),
        )

        assert applied.rejected == ()
        assert [_column(read_rows(name), "user_id") for name in HOSTILE_NAMES] == [
            {"m1": name} for name in HOSTILE_NAMES
        ]

    def test_null_empties_what_recognition_wrote(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Setting a column to null leaves it empty."""
        write_rows("events", [row("m1", "a1", 1)])
        _apply(sink, _basic(sink, 1, {"stitched_user_id": "u1"}, device("a1")))
        between_times = read_rows("events")

        _apply(sink, _basic(sink, 2, {"stitched_user_id": None}, device("a1")))

        assert _column(between_times, "stitched_user_id") == {"m1": "u1"}
        assert _column(read_rows("events"), "stitched_user_id") == {"m1": None}

    def test_numbers_and_booleans_keep_their_type(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Integers, floats and booleans are stored as such, and select rows as such."""
        write_rows(
            "events",
            [row("m1", "a1", 1, context_traits_age=41), row("m2", "a1", 1, context_traits_age=42)],
        )
        traits = {"context_traits_score": 0.25, "context_traits_subscribed": True}

        applied = _apply(
            sink,
            _basic(sink, 1, traits, Equals(column="context_traits_age", value=42), device("a1")),
        )

        found = {str(found["message_id"]): found for found in read_rows("events")}
        assert applied.rejected == ()
        assert found["m1"]["context_traits_score"] is None
        assert found["m2"]["context_traits_score"] == 0.25
        assert found["m2"]["context_traits_subscribed"] in (True, 1)

    # What is refused ----------------------------------------------------------------------------

    def test_a_missing_table_is_refused(self, sink: Sink, write_rows: WriteRows) -> None:
        """An update of a table that is not there is refused by an error that names it."""
        write_rows("events", [row("m1", "a1", 1)])
        lost = _basic(sink, 1, {"user_id": "u1"}, device("a1"), table="evnts")

        applied = _apply(sink, lost)

        _assert_refused(applied, [lost], TableError, "evnts")

    def test_a_missing_column_is_refused(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """An update that sets a column that is not there is refused by an error that names it."""
        write_rows("events", [row("m1", "a1", 1)])
        lost = _basic(sink, 1, {"context_traits_shoe": "44"}, device("a1"), unknown())

        applied = _apply(sink, lost)

        _assert_refused(applied, [lost], TableError, "context_traits_shoe")
        assert set(read_rows("events")[0]) == set(self.columns)

    def test_a_refused_update_does_not_stop_the_others(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Of a plan in which some updates are refused, the others are applied."""
        write_rows("events", [row("m1", "a1", 1), row("m2", "a2", 1)])
        lost = [
            _basic(sink, 1, {"user_id": "u1"}, device("a1"), table="evnts"),
            _basic(sink, 2, {"context_traits_shoe": "44"}, device("a1"), unknown()),
            _basic(sink, 3, {"context_traits_age": "old"}, device("a1")),
        ]

        applied = _apply(
            sink,
            *lost,
            _basic(sink, 4, {"user_id": "u1"}, device("a1"), unknown()),
            _basic(sink, 5, {"user_id": "u2"}, device("a2"), unknown()),
        )

        _assert_refused(applied, lost, TableError)
        assert _column(read_rows("events"), "user_id") == {"m1": "u1", "m2": "u2"}

    def test_updates_without_a_version_need_a_ledger(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """A sink that keeps no ledger refuses updates whose order no row can tell."""
        write_rows("events", [row("m1", "a1", 1)])
        plain = update(1, {"user_id": "u1"}, device("a1"), unknown())

        applied = _apply(sink, plain)

        if sink.capabilities.ledger:
            assert applied.rejected == ()
            assert _column(read_rows("events"), "user_id") == {"m1": "u1"}
        else:
            _assert_refused(applied, [plain])
            assert _column(read_rows("events"), "user_id") == {"m1": None}

    # What is sent and said ----------------------------------------------------------------------

    def test_many_visitors_need_no_more_statements_than_few(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """How many statements are sent does not depend on how many visitors are in the window."""
        sent = {}
        for count in (2, 200):
            table = f"events_{count}"
            write_rows(table, [row(f"m{n}", f"a{n}", n) for n in range(count)])

            applied = _apply(
                sink,
                *(
                    _basic(sink, n, {"user_id": f"u{n}"}, device(f"a{n}"), unknown(), table=table)
                    for n in range(count)
                ),
            )

            sent[count] = (len(applied.steps), applied.statements)
            assert _column(read_rows(table), "user_id") == {f"m{n}": f"u{n}" for n in range(count)}
        # The first plan may open what the second finds open.
        assert sent[200][0] == sent[2][0] == 1
        assert 1 <= sent[200][1] <= sent[2][1]

    def test_compile_shows_the_statement_and_sends_nothing(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """`compile` names table and columns, holds no value of a row, and writes nothing."""
        write_rows("events", [row("m1", "a-key-of-ours", 1)])
        before = read_rows("events")
        plan = plan_updates(
            [_basic(sink, 1, {"user_id": "a-user-of-ours"}, device("a-key-of-ours"), unknown())]
        )

        statements = [sink.compile(step) for step in plan.steps]

        assert len(statements) == 1
        assert all(name in statements[0] for name in ("events", "user_id", "anonymous_id"))
        assert "of-ours" not in statements[0]
        assert read_rows("events") == before

    def test_counts_are_those_of_the_rows(
        self, sink: Sink, write_rows: WriteRows, read_rows: ReadRows
    ) -> None:
        """Changed are the rows that differ afterwards, matched those that are as they should be."""
        write_rows("events", [row(f"m{n}", f"a{n % 2}", n) for n in range(9)])
        _apply(sink, _basic(sink, 1, {"stitched_user_id": "u0"}, device("a0"), between(0, 5)))
        before = {str(found["message_id"]): found for found in read_rows("events")}

        applied = _apply(
            sink,
            _basic(sink, 1, {"stitched_user_id": "u0"}, device("a0"), between(0, 5)),
            _basic(sink, 2, {"stitched_user_id": "u0"}, device("a0"), between(5, 9)),
        )

        after = {str(found["message_id"]): found for found in read_rows("events")}
        assert applied.rows_changed == sum(after[name] != before[name] for name in after) == 2
        assert applied.rows_matched == 5
        assert applied.rows_changed == sum(step.rows_changed for step in applied.steps)
        assert applied.rows_matched == sum(step.rows_matched for step in applied.steps)

    def test_counts_of_each_update(self, sink: Sink, write_rows: WriteRows) -> None:
        """Rows are counted for each update where the sink says that it can, else for none."""
        write_rows("events", [row(f"m{n}", f"a{n % 3}", n) for n in range(7)])
        updates = [
            _basic(sink, n + 1, {"stitched_user_id": f"u{n}"}, device(f"a{n}"), between(0, 5))
            for n in range(4)
        ]

        applied = _apply(sink, *updates)

        counts = dict(zip([each.id for each in updates], [2, 2, 1, 0], strict=True))
        assert applied.matched_by_update == (counts if sink.capabilities.counts_per_update else {})

    def test_capabilities_are_constant(self, sink: Sink, write_rows: WriteRows) -> None:
        """What a sink can do is the same before it was used and after it was closed."""
        before = sink.capabilities
        write_rows("events", [row("m1", "a1", 1)])
        _apply(sink, _basic(sink, 1, {"user_id": "u1"}, device("a1"), unknown()))

        sink.close()

        assert isinstance(before, Capabilities)
        assert sink.capabilities == before

    def test_closing_twice_is_closing_once(self, sink: Sink, write_rows: WriteRows) -> None:
        """A sink may be closed before it was used, and again."""
        write_rows("events", [row("m1", "a1", 1)])
        sink.close()

        sink.close()

        assert isinstance(sink, Sink)

    def test_an_empty_plan_does_nothing(self, sink: Sink) -> None:
        """A plan without updates sends nothing and changes nothing."""
        applied = sink.apply(plan_updates([]))

        assert applied == Applied()


def _basic(
    sink: Sink,
    sequence: int,
    set: Mapping[str, str | int | float | bool | None],
    *where: Criterion,
    table: str = "events",
) -> UpdateByCriteria:
    """An update of the kind that this sink takes."""
    versioned = not sink.capabilities.ledger
    return update(sequence, set, *where, table=table, versioned=versioned)


def _apply(sink: Sink, *updates: UpdateByCriteria) -> Applied:
    return sink.apply(plan_updates(updates))


def _owners(
    column: str, last: str | None, table: str, *where: Criterion, versioned: bool = False
) -> list[UpdateByCriteria]:
    """A owns the device, then B a part of it, then ``last`` a part of that."""
    return [
        update(
            number, {column: owner}, device("a1"), span, *where, table=table, versioned=versioned
        )
        for number, owner, span in (
            (1, "A", between(0, 100)),
            (2, "B", between(20, 80)),
            (3, last, between(40, 60)),
        )
    ]


def _timeline_rows(*, known: bool) -> list[Row]:
    rows = [row(f"t{n}", "a1", n) for n in (-1, 0, 19, 20, 39, 40, 59, 60, 79, 80, 99, 100)]
    return [*rows, row("known", "a1", 50, user_id="u9")] if known else rows


def _owned_rows(updates: Iterable[UpdateByCriteria], column: str) -> dict[str, object]:
    """Who owns each anonymous row of the timeline: computed from the intervals alone."""
    owned: dict[str, object] = {}
    for each in _timeline_rows(known=False):
        owned[str(each["message_id"])] = None
        for wanted in updates:
            span = next(c for c in wanted.where if isinstance(c, Between))
            time = each["timestamp"]
            assert isinstance(time, datetime)
            if span.start <= time < span.end:
                owned[str(each["message_id"])] = wanted.set[column]
    return owned


def _column(rows: Iterable[Row], column: str) -> dict[str, object]:
    return {str(found["message_id"]): found[column] for found in rows}


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda found: str(found["message_id"]))


def _assert_refused(
    applied: Applied,
    updates: Iterable[UpdateByCriteria],
    kind: type[Exception] = UnsupportedPolicyError,
    named: str = "",
) -> None:
    refused = dict(applied.rejected)
    assert set(refused) == {each.id for each in updates}
    for error in refused.values():
        assert isinstance(error, kind)
        assert not error.written
        assert named in str(error)
