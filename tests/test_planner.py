"""A window of updates becomes a plan: what is left of it, how it is grouped, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recognition.errors import MessageError
from recognition.messages import (
    Between,
    Criterion,
    Empty,
    Equals,
    Messages,
    OneOf,
    UpdateByCriteria,
)
from recognition.planner import (
    Bound,
    Cover,
    Plan,
    Shape,
    Step,
    covers_of,
    cut_step,
    plan_updates,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
ZERO = 1_767_225_600_000_000
SECOND = 1_000_000


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def update(
    sequence: int, set: dict[str, Any], *where: Criterion, **fields: Any
) -> UpdateByCriteria:
    values: dict[str, Any] = {
        "id": f"u{sequence}",
        "workspace": "w1",
        "table": "events",
        "created_at": START,
        **fields,
    }
    return UpdateByCriteria(set=set, where=where, sequence=sequence, **values)


def device(value: Any = "a1") -> Equals:
    return Equals(column="anonymous_id", value=value)


def between(start: float, end: float, column: str = "timestamp") -> Between:
    return Between(column=column, start=at(start), end=at(end))


def messages(*seconds: int) -> Messages:
    refs = tuple((f"m{n}", at(n)) for n in seconds)
    return Messages(id_column="message_id", time_column="timestamp", refs=refs)


def spans(plan: Plan) -> dict[str, list[tuple[float | None, float | None]]]:
    """What is left of each update, in seconds after the start."""
    found: dict[str, list[tuple[float | None, float | None]]] = {}
    for step in plan.steps:
        for row in step.rows:
            left = found.setdefault(row.update_id, [])
            for start, end in row.intervals:
                left.append(
                    (
                        None if start is None else (start - ZERO) / SECOND,
                        None if end is None else (end - ZERO) / SECOND,
                    )
                )
    return {update_id: sorted(left, key=str) for update_id, left in found.items()}


def shown(plan: Plan) -> list[tuple[int, str, tuple[str, ...]]]:
    """Level, key and updates of each step."""
    return [
        (step.level, step.shape.key, tuple(sorted({row.update_id for row in step.rows})))
        for step in plan.steps
    ]


# Which rows -------------------------------------------------------------------------------------


def test_the_key_is_the_first_column_that_is_not_set() -> None:
    """The key is the first `equals` or `one_of` on a column that the update does not set."""
    plan = plan_updates(
        [
            update(
                1,
                {"user_id": "u1"},
                Equals(column="user_id", value="old"),
                OneOf(column="anonymous_id", values=("a1",)),
                Equals(column="country", value="DE"),
            )
        ]
    )

    shape = plan.steps[0].shape
    assert (shape.key, shape.equals) == ("anonymous_id", ("anonymous_id", "country", "user_id"))
    assert shape.held == ("user_id",)
    assert plan.steps[0].rows[0].equals == ("a1", "DE", "old")


def test_messages_are_the_key_where_no_other_is() -> None:
    """Without another key each message is one; its time bounds the step, with room for rounding."""
    plan = plan_updates([update(1, {"user_id": "u1"}, messages(3, 5))])

    (step,) = plan.steps
    assert step.shape.key == "message_id"
    assert [row.equals for row in step.rows] == [("m3",), ("m5",)]
    assert step.bounds == (Bound("timestamp", ZERO + 3 * SECOND, ZERO + 7 * SECOND),)


def test_times_of_messages_are_widened_to_full_seconds() -> None:
    """A stored time may have been cut or rounded to the second: the bounds leave room for both."""
    refs = (("m1", at(1.25)), ("m2", at(7.5)))
    named = Messages(id_column="message_id", time_column="timestamp", refs=refs)

    plan = plan_updates([update(1, {"user_id": "u1"}, named)])

    assert plan.steps[0].bounds == (Bound("timestamp", ZERO + 1 * SECOND, ZERO + 9 * SECOND),)


def test_a_column_that_is_set_is_the_key_at_last() -> None:
    """An update that asks only for what a column holds that it sets has this column as its key."""
    plan = plan_updates([update(1, {"user_id": "new"}, Equals(column="user_id", value="old"))])

    assert plan.steps[0].shape.key == "user_id"
    assert plan.steps[0].shape.held == ("user_id",)


def test_each_value_of_a_key_is_one_staged_row() -> None:
    """`one_of` is staged once for each of its different values."""
    among = OneOf(column="anonymous_id", values=("a2", "a1", "a2", 1, True, "1"))

    plan = plan_updates([update(1, {"user_id": "u1"}, among)])

    assert sorted(map(repr, (row.equals[0] for row in plan.steps[0].rows))) == sorted(
        map(repr, ["a2", "a1", 1, True, "1"])
    )


def test_a_device_and_messages_are_one_row_for_each_message() -> None:
    """A device with messages is keyed by the device and staged once for each message."""
    plan = plan_updates([update(1, {"user_id": "u1"}, messages(1, 2), device())])

    assert plan.steps[0].shape.equals == ("anonymous_id", "message_id")
    assert [row.equals for row in plan.steps[0].rows] == [("a1", "m1"), ("a1", "m2")]


@pytest.mark.parametrize(
    "where",
    [
        (device("a1"), device("a2")),
        (device(1), device("1")),
        (device(), between(0, 5), between(5, 9)),
        (messages(1), Equals(column="message_id", value="m2")),
        (messages(1), OneOf(column="message_id", values=(1, 2))),
    ],
)
def test_criteria_that_contradict_each_other_meet_nothing(where: tuple[Criterion, ...]) -> None:
    """An update that no row can meet is done without a step."""
    plan = plan_updates([update(1, {"user_id": "u1"}, *where)])

    assert plan == Plan(steps=(), updates=("u1",))


def test_criteria_on_one_column_are_joined_by_and() -> None:
    """Several criteria on one column leave what meets all of them."""
    plan = plan_updates(
        [
            update(
                1,
                {"user_id": "u1"},
                OneOf(column="anonymous_id", values=("a1", "a2", "a3")),
                OneOf(column="anonymous_id", values=("a3", "a2", "a4")),
                between(0, 7),
                between(5, 9),
            )
        ]
    )

    assert sorted(row.equals[0] for row in plan.steps[0].rows) == ["a2", "a3"]
    assert spans(plan) == {"u1": [(5, 7), (5, 7)]}


# Grouping ---------------------------------------------------------------------------------------


def test_many_visitors_are_one_step() -> None:
    """Updates of one shape are one step, sorted by key, with bounds that hold for all."""
    window = [
        update(n, {"user_id": f"u{n}"}, device(f"a{n % 7}-{n}"), between(n, n + 10))
        for n in range(100)
    ]

    plan = plan_updates(window)

    (step,) = plan.steps
    keys = [row.equals[0] for row in step.rows]
    assert keys == sorted(keys, key=str)
    assert len(keys) == 100
    assert step.bounds == (Bound("timestamp", ZERO, ZERO + 109 * SECOND),)


def test_workspaces_share_a_step() -> None:
    """Grouping does not ask for the workspace, the rows know it."""
    plan = plan_updates(
        [
            update(1, {"user_id": "u1"}, device("a1"), workspace="w1"),
            update(2, {"user_id": "u2"}, device("a2"), workspace="w2"),
        ]
    )

    assert [row.workspace for row in plan.steps[0].rows] == ["w1", "w2"]


@pytest.mark.parametrize(
    "other",
    [
        update(2, {"user_id": "u2"}, device("a2"), table="pages"),
        update(2, {"user_id": "u2", "email": "e"}, device("a2")),
        update(2, {"user_id": "u2"}, Equals(column="visitor", value="a2")),
        update(2, {"user_id": "u2"}, device("a2"), between(0, 1)),
        update(2, {"user_id": "u2"}, device("a2"), Empty(column="user_id")),
        update(2, {"user_id": "u2"}, device("a2"), messages(1)),
        update(2, {"user_id": "u2"}, device("a2"), Equals(column="user_id", value="u1")),
    ],
    ids=["table", "columns", "key", "between", "empty", "messages", "held"],
)
def test_other_shapes_are_other_steps(other: UpdateByCriteria) -> None:
    """Another table, column, key or kind of criterion is another statement, of the same level."""
    plan = plan_updates([update(1, {"user_id": "u1"}, device()), other])

    assert [len(step.rows) for step in plan.steps] == [1, 1]
    assert {step.level for step in plan.steps} <= {0, 1}


def test_the_order_of_a_window_does_not_matter() -> None:
    """Shuffled and repeated, a window has the same plan."""
    window = [
        update(n, {"user_id": f"u{n}"}, device(f"a{n % 3}"), between(n % 5, n % 5 + 4))
        for n in range(30)
    ]
    shuffled = window * 2
    Random(5).shuffle(shuffled)

    assert plan_updates(shuffled) == plan_updates(window)


def test_a_plan_lists_its_updates_once() -> None:
    """Each update of the window is listed once, by sequence, those that vanish included."""
    window = [update(n, {"user_id": "u"}, device()) for n in (3, 1, 2, 1)]

    plan = plan_updates(window)

    assert plan.updates == ("u1", "u2", "u3")
    assert shown(plan) == [(0, "anonymous_id", ("u3",))]


def test_a_step_is_split_by_updates_and_by_rows() -> None:
    """No step holds more updates than asked for, nor more than 20 times as many rows."""
    many = [update(n, {"user_id": "u"}, device(f"a{n:03}")) for n in range(25)]
    wide = [update(100, {"user_id": "u"}, OneOf(column="visitor", values=tuple(range(300))))]

    by_updates = plan_updates(many, split=10)
    by_rows = plan_updates(wide, split=10)

    assert [len(step.rows) for step in by_updates.steps] == [10, 10, 5]
    assert [len(step.rows) for step in by_rows.steps] == [200, 100]


def test_expected_rows_are_summed_where_all_are_known() -> None:
    """A step expects the sum of what its updates expect, or does not know."""
    known = [
        update(
            1, {"user_id": "u"}, OneOf(column="anonymous_id", values=("a", "b")), expected_rows=5
        ),
        update(2, {"user_id": "u"}, device("c"), expected_rows=2),
    ]
    unknown = update(3, {"user_id": "u"}, device("d"))

    assert plan_updates(known).steps[0].expected_rows == 7
    assert plan_updates([*known, unknown]).steps[0].expected_rows is None


# Net effect -------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", [1, 3, None])
def test_each_message_is_expected_by_itself(taken: int | None) -> None:
    """Whichever of them a later update takes, the others are still expected of the earlier one."""
    updates = [update(1, {"user_id": "u1"}, device(), messages(1, 2, 3), expected_rows=3)]
    if taken is not None:
        updates.append(update(2, {"user_id": "u2"}, device(), messages(taken), expected_rows=1))
    (step,) = plan_updates(updates).steps
    expected = [row.expected_rows for row in step.rows]

    assert expected == [1, 1, 1]
    assert step.expected_rows == 3
    assert (step.needs_count(2), step.needs_count(3)) == (True, False)


def test_rows_that_nobody_expects_are_counted_whatever_was_changed() -> None:
    """One that is found may stand for one that is missing."""
    sure = update(1, {"user_id": "u1"}, device("a1"), messages(1, 2), expected_rows=2)
    unsure = update(2, {"user_id": "u2"}, device("a2"), messages(3, 4), expected_rows=0)
    (step,) = plan_updates([sure, unsure]).steps

    assert [row.expected_rows for row in step.rows] == [1, 1, 0, 0]
    assert step.needs_count(4)


def test_a_later_update_cuts_its_interval_out_of_an_earlier_one() -> None:
    """What a later update covers is cut out, so that the earlier one breaks into pieces."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), between(0, 10)),
            update(3, {"user_id": "C"}, device(), between(6, 7)),
            update(2, {"user_id": "B"}, device(), between(2, 4)),
        ]
    )

    assert spans(plan) == {"u1": [(0, 2), (4, 6), (7, 10)], "u2": [(2, 4)], "u3": [(6, 7)]}
    assert len(plan.steps) == 1


def test_intervals_that_only_touch_are_left_alone() -> None:
    """An end is not included: intervals that touch do not cut each other."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), between(0, 5)),
            update(2, {"user_id": "B"}, device(), between(5, 9)),
        ]
    )

    assert spans(plan) == {"u1": [(0, 5)], "u2": [(5, 9)]}


def test_an_update_without_interval_is_cut_into_open_pieces() -> None:
    """What is left of all rows of a key lies before or after; rows without time lie before."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device()),
            update(2, {"user_id": "B"}, device(), between(5, 9)),
        ]
    )

    assert spans(plan) == {"u1": [(9, None), (None, 5)], "u2": [(5, 9)]}
    assert {step.shape.open: step.bounds for step in plan.steps} == {
        True: (),
        False: (Bound("timestamp", ZERO + 5 * SECOND, ZERO + 9 * SECOND),),
    }
    assert {step.level for step in plan.steps} == {0}


def test_equal_sequences_are_told_apart_by_id() -> None:
    """Of two updates of equal sequence the greater id stands."""
    plan = plan_updates(
        [
            update(1, {"user_id": "B"}, device(), id="b"),
            update(1, {"user_id": "A"}, device(), id="a"),
        ]
    )

    assert [row.values for row in plan.steps[0].rows] == [("B",)]


def test_columns_that_the_later_one_does_not_set_stay() -> None:
    """Of an earlier update the columns remain that the later one does not set."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A", "email": "a@example.com"}, device(), between(0, 9)),
            update(2, {"user_id": "B"}, device(), between(5, 9)),
        ]
    )

    found = {
        (step.shape.columns, row.values): row.intervals for step in plan.steps for row in step.rows
    }
    assert found == {
        (("email", "user_id"), ("a@example.com", "A")): ((ZERO, ZERO + 5 * SECOND),),
        (("email",), ("a@example.com",)): ((ZERO + 5 * SECOND, ZERO + 9 * SECOND),),
        (("user_id",), ("B",)): ((ZERO + 5 * SECOND, ZERO + 9 * SECOND),),
    }
    assert {step.level for step in plan.steps} == {0}


def test_versioned_updates_are_covered_as_a_whole_or_not_at_all() -> None:
    """A row has one version: an update that sets more than the later one stays and goes first."""
    both = {"user_id": "A", "email": "a@example.com", "recognition_version": 1}

    less = plan_updates(
        [update(1, both, device()), update(2, {"user_id": "B", "recognition_version": 2}, device())]
    )
    same = plan_updates(
        [update(1, both, device()), update(2, {**both, "recognition_version": 2}, device())]
    )

    assert shown(less) == [(0, "anonymous_id", ("u1",)), (1, "anonymous_id", ("u2",))]
    assert shown(same) == [(0, "anonymous_id", ("u2",))]


def test_a_narrower_condition_covers_nothing_wider() -> None:
    """A later update with a condition that the earlier one lacks goes to a later level."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device()),
            update(2, {"user_id": "B"}, device(), Empty(column="user_id")),
            update(3, {"user_id": "C"}, device(), Equals(column="country", value="DE")),
        ]
    )

    assert shown(plan) == [
        (0, "anonymous_id", ("u1",)),
        (1, "anonymous_id", ("u2",)),
        (2, "anonymous_id", ("u3",)),
    ]


def test_a_wider_condition_covers_what_is_narrower() -> None:
    """A later update covers an earlier one that has more conditions than itself."""
    plan = plan_updates(
        [
            update(
                1,
                {"user_id": "A"},
                device(),
                Empty(column="user_id"),
                Equals(column="country", value="DE"),
                between(0, 5),
            ),
            update(2, {"user_id": "B"}, device()),
        ]
    )

    assert shown(plan) == [(0, "anonymous_id", ("u2",))]


def test_other_values_of_a_further_column_are_other_rows() -> None:
    """Updates of one key that ask for different values of another column never meet."""
    window = [
        update(n, {"user_id": "A"}, Equals(column="site", value="s"), device(f"a{n}"))
        for n in range(50)
    ]

    plan = plan_updates(window)

    assert [(step.level, len(step.rows)) for step in plan.steps] == [(0, 50)]


def test_a_message_is_dropped_where_a_later_interval_takes_it() -> None:
    """Of earlier messages of a device, those go whose time lies in a later update's interval."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), messages(1, 5, 9)),
            update(2, {"user_id": "B"}, device(), between(4, 9)),
        ]
    )

    left = {row.equals[1] for step in plan.steps for row in step.rows if row.update_id == "u1"}
    assert left == {"m1", "m9"}
    assert {step.level for step in plan.steps} == {0}


def test_messages_alone_take_their_own_rows() -> None:
    """Later messages take their own rows from earlier messages, and nothing from an interval."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), between(0, 9)),
            update(2, {"user_id": "B"}, device(), messages(1, 2, 3)),
            update(3, {"user_id": "C"}, device(), messages(2)),
        ]
    )

    assert spans(plan)["u1"] == [(0, 9)]
    rows = {(step.level, row.update_id, row.equals[1:]) for step in plan.steps for row in step.rows}
    assert rows == {(0, "u1", ()), (1, "u2", ("m1",)), (1, "u2", ("m3",)), (1, "u3", ("m2",))}


def test_messages_with_an_interval_speak_for_it() -> None:
    """Messages and `between` on their time take the whole interval from earlier updates."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), between(0, 9)),
            update(2, {"user_id": "B"}, device(), messages(2, 5), between(2, 6)),
        ]
    )

    assert spans(plan)["u1"] == [(0, 2), (6, 9)]
    assert {step.level for step in plan.steps} == {0}


def test_messages_are_found_again_by_their_ids() -> None:
    """Updates by message alone cover each other message by message."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, messages(1, 2, 3)),
            update(2, {"user_id": "B"}, messages(2, 4)),
        ]
    )

    (step,) = plan.steps
    assert {row.equals[0]: row.values[0] for row in step.rows} == {
        "m1": "A",
        "m2": "B",
        "m3": "A",
        "m4": "B",
    }


def test_workspaces_do_not_cover_each_other() -> None:
    """Updates of two workspaces are put in order where they touch, and neither is cut."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), between(0, 9), workspace="w1"),
            update(2, {"user_id": "B"}, device(), between(0, 9), workspace="w2"),
        ]
    )

    assert shown(plan) == [(0, "anonymous_id", ("u1",)), (1, "anonymous_id", ("u2",))]


def test_two_time_columns_are_put_in_order() -> None:
    """Updates with intervals of two columns do not cover each other, but touch."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device(), between(0, 9), between(0, 9, "received_at")),
            update(2, {"user_id": "B"}, device(), between(4, 9), between(4, 9, "received_at")),
            update(3, {"user_id": "C"}, device("a2"), between(4, 9), between(1, 2, "received_at")),
        ]
    )

    assert shown(plan) == [(0, "anonymous_id", ("u1", "u3")), (1, "anonymous_id", ("u2",))]
    assert plan.steps[0].bounds == (
        Bound("received_at", ZERO, ZERO + 9 * SECOND),
        Bound("timestamp", ZERO, ZERO + 9 * SECOND),
    )


def test_what_is_looked_for_is_written_first() -> None:
    """An update that looks for a value comes after the earlier one that writes it, by any key."""
    plan = plan_updates(
        [
            update(1, {"user_id": "old"}, device("z9"), between(0, 9)),
            update(2, {"user_id": "new"}, Equals(column="user_id", value="old")),
            update(3, {"user_id": "old"}, device("b1"), between(0, 9)),
            update(4, {"user_id": "other"}, device("c1"), between(0, 9)),
        ]
    )

    levels = {row.update_id: step.level for step in plan.steps for row in step.rows}
    assert levels == {"u1": 0, "u2": 1, "u3": 2, "u4": 0}


def test_what_is_looked_for_is_not_cut() -> None:
    """An update whose value another one looks for stays whole, though a third covers it."""
    plan = plan_updates(
        [
            update(1, {"user_id": "old", "email": "o"}, device(), between(0, 9)),
            update(2, {"user_id": "new", "email": "n"}, Equals(column="user_id", value="old")),
            update(3, {"user_id": "last"}, device(), between(0, 9)),
        ]
    )

    levels = {
        (row.update_id, step.shape.columns): step.level for step in plan.steps for row in step.rows
    }
    assert levels[("u1", ("email", "user_id"))] == 0
    assert levels[("u2", ("email", "user_id"))] == 1
    assert levels[("u3", ("user_id",))] == 1


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, True, "1", None, 1.0])
def test_a_version_is_the_sequence(version: Any) -> None:
    """An update whose version differs from its sequence is refused, the others are planned."""
    plan = plan_updates(
        [
            update(1, {"user_id": "u1", "recognition_version": version}, device()),
            update(5, {"user_id": "u5", "recognition_version": 5}, device("a2")),
        ]
    )

    assert plan.updates == ("u5",)
    ((update_id, error),) = plan.rejected
    assert update_id == "u1"
    assert isinstance(error, MessageError)
    assert "recognition_version" in str(error)


def test_a_sequence_has_64_bits() -> None:
    """A sequence that no column can hold is refused."""
    plan = plan_updates(
        [update(2**63, {"user_id": "u"}, device()), update(2**63 - 1, {"user_id": "u"}, device())]
    )

    assert [update_id for update_id, _ in plan.rejected] == [f"u{2**63}"]
    assert plan.updates == (f"u{2**63 - 1}",)


def test_a_version_alone_is_refused() -> None:
    """An update that sets nothing beside the version is refused."""
    plan = plan_updates([update(1, {"recognition_version": 1}, device())])

    assert [update_id for update_id, _ in plan.rejected] == ["u1"]
    assert plan.steps == ()


# The ledger's cut -------------------------------------------------------------------------------


def _step(*where: Criterion) -> Step:
    return plan_updates([update(1, {"email": "e", "user_id": "A"}, device(), *where)]).steps[0]


def _cover(columns: str, start: int | None, end: int | None, **fields: Any) -> Cover:
    values: dict[str, Any] = {
        "columns": frozenset(columns.split()),
        "empty": frozenset(),
        "extras": frozenset(),
        "time_column": "timestamp",
        "start": None if start is None else ZERO + start * SECOND,
        "end": None if end is None else ZERO + end * SECOND,
        **fields,
    }
    return Cover(**values)


def test_a_step_that_nothing_covers_is_itself() -> None:
    """Without covers the step comes back equal."""
    step = _step(between(0, 9))

    assert cut_step(step, {}) == (step,)
    assert cut_step(step, {0: [_cover("user_id email", 9, 12)]}) == (step,)


def test_a_step_is_cut_like_a_plan() -> None:
    """What was applied later is cut out of a step, also where it was unbounded itself."""
    covers = [_cover("user_id email", None, 2), _cover("user_id email", 4, 5)]

    parts = cut_step(_step(between(0, 9)), {0: covers})

    left = [row.intervals[0] for part in parts for row in part.rows]
    assert sorted((start - ZERO, end - ZERO) for start, end in left if start and end) == [
        (2 * SECOND, 4 * SECOND),
        (5 * SECOND, 9 * SECOND),
    ]


def test_a_step_may_vanish_or_change_its_shape() -> None:
    """A covered step has no parts; one of which columns are left has another shape."""
    whole = _cover("user_id email", None, None, time_column=None)
    one_column = _cover("user_id", None, None, time_column=None)

    assert cut_step(_step(), {0: [whole]}) == ()
    assert [part.shape.columns for part in cut_step(_step(), {0: [one_column]})] == [("email",)]


@pytest.mark.parametrize(
    "cover",
    [
        _cover("user_id email", 0, 9, empty=frozenset({"user_id"})),
        _cover("user_id email", 0, 9, extras=frozenset({("country", "DE")})),
        _cover("user_id email", 0, 9, time_column="received_at"),
        _cover("phone", 0, 9),
    ],
    ids=["empty", "extras", "time", "columns"],
)
def test_what_does_not_cover_does_not_cut(cover: Cover) -> None:
    """A narrower condition, another time column or other columns take nothing."""
    step = _step(between(0, 9))

    assert cut_step(step, {0: [cover]}) == (step,)


def test_pieces_take_what_they_select() -> None:
    """A piece that is open covers its side of the time, so that the ledger can note it."""
    plan = plan_updates(
        [
            update(1, {"user_id": "A"}, device()),
            update(2, {"user_id": "B"}, device(), between(5, 9)),
        ]
    )

    opened = [
        cover[1:] and (cover.start, cover.end)
        for step in plan.steps
        if step.shape.open
        for row in step.rows
        for cover in covers_of(step.shape, row)
    ]
    assert sorted(opened, key=str) == [(ZERO + 9 * SECOND, None), (None, ZERO + 5 * SECOND)]


# Properties -------------------------------------------------------------------------------------

Rows = dict[str, dict[str, Any]]

KEYS = ("a1", "a2")
_SPAN = st.tuples(st.integers(0, 11), st.integers(1, 8)).map(
    lambda pair: between(pair[0], sum(pair))
)
_REFS = st.lists(st.integers(0, 10), min_size=1, max_size=4, unique=True).map(
    lambda ns: messages(*ns)
)
_COUNTRY = st.sampled_from(["DE", "FR"]).map(lambda value: Equals(column="country", value=value))
_DEVICE = st.sampled_from([device("a1"), device("a2"), OneOf(column="anonymous_id", values=KEYS)])


@st.composite
def _where(draw: st.DrawFn) -> tuple[Criterion, ...]:
    """A device, perhaps with a country; messages or an interval, not both: together they claim."""
    further = draw(st.sampled_from([st.none(), _SPAN, _REFS]).flatmap(lambda each: each))
    country = draw(st.none() | _COUNTRY)
    return tuple(each for each in (country, draw(_DEVICE), further) if each is not None)


_SET = st.dictionaries(
    st.sampled_from(["x", "y"]), st.none() | st.sampled_from(["p", "q"]), min_size=1
)


_PLAIN = st.tuples(_DEVICE, st.none() | _SPAN).map(lambda pair: tuple(filter(None, pair)))


@st.composite
def _window(
    draw: st.DrawFn, where: st.SearchStrategy[tuple[Criterion, ...]] | None = None
) -> list[UpdateByCriteria]:
    parts = draw(
        st.lists(st.tuples(_SET, _where() if where is None else where), min_size=1, max_size=8)
    )
    # The key must be the device, whatever comes first: it is what keeps order.
    return [
        update(n, values, *sorted(where, key=lambda each: getattr(each, "column", "z")))
        for n, (values, where) in enumerate(parts)
    ]


def _rows() -> Rows:
    return {
        f"m{n}": {
            "message_id": f"m{n}",
            "anonymous_id": KEYS[n % 2],
            "country": ("DE", "FR", None)[n % 3],
            "time": None if n == 11 else n,
            "x": None,
            "y": None,
        }
        for n in range(12)
    }


def _meets(row: dict[str, Any], wanted: UpdateByCriteria) -> bool:
    """By the criteria alone, as they read."""
    for each in wanted.where:
        if isinstance(each, Equals) and row[each.column] != each.value:
            return False
        if isinstance(each, OneOf) and row[each.column] not in each.values:
            return False
        if isinstance(each, Messages) and row["message_id"] not in dict(each.refs):
            return False
        if isinstance(each, Between) and (
            row["time"] is None or not each.start <= at(row["time"]) < each.end
        ):
            return False
    return True


def _carry_out(plan: Plan, rows: Rows) -> None:
    """Do what the steps say, row by row; two staged rows must never meet one row."""
    for step in plan.steps:
        shape = step.shape
        hits: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for row in rows.values():
            staged = [each for each in step.rows if _selects(shape, each, row)]
            assert len(staged) <= 1, "two staged rows of a step select the same row"
            if staged:
                hits.append((row, dict(zip(shape.columns, staged[0].values, strict=True))))
        for row, values in hits:
            row.update(values)


def _selects(shape: Shape, staged: Any, row: dict[str, Any]) -> bool:
    if any(row[c] != v for c, v in zip(shape.equals, staged.equals, strict=True)):
        return False
    for start, end in staged.intervals:
        time = None if row["time"] is None else ZERO + row["time"] * SECOND
        if time is None:
            if not shape.open or start is not None:
                return False
        elif (start is not None and time < start) or (end is not None and time >= end):
            return False
    return True


@settings(max_examples=200, deadline=None)
@given(_window())
def test_the_greatest_sequence_stands_in_each_row_and_column(
    window: list[UpdateByCriteria],
) -> None:
    """A plan leaves in each column of each row what the last update that meets the row says."""
    expected = _rows()
    for row in expected.values():
        for column in ("x", "y"):
            setting = [each for each in window if column in each.set and _meets(row, each)]
            if setting:
                row[column] = max(setting, key=lambda each: each.sequence).set[column]
    found = _rows()

    _carry_out(plan_updates(window), found)

    assert found == expected


@settings(max_examples=100, deadline=None)
@given(_window(_PLAIN), st.integers(1, 7))
def test_a_ledger_makes_any_order_the_same(window: list[UpdateByCriteria], seed: int) -> None:
    """One by one in any order, cut by what was applied before, is the same as all at once."""
    at_once, one_by_one = _rows(), _rows()
    _carry_out(plan_updates(window), at_once)
    ledger: list[tuple[UpdateByCriteria, Any, Cover]] = []
    shuffled = list(window)
    Random(seed).shuffle(shuffled)

    for single in shuffled:
        for step in plan_updates([single]).steps:
            covers = {
                place: [
                    cover
                    for later, key, cover in ledger
                    if later.sequence > single.sequence and key == row.equals[0]
                ]
                for place, row in enumerate(step.rows)
            }
            for part in cut_step(step, covers):
                _carry_out(Plan(steps=(part,), updates=()), one_by_one)
                ledger += [
                    (single, row.equals[0], cover)
                    for row in part.rows
                    for cover in covers_of(part.shape, row)
                ]

    assert one_by_one == at_once


_HELD = st.tuples(
    st.sampled_from(["p", "q"]),
    st.none() | _DEVICE,
    st.none() | _SPAN,
    st.none() | st.sampled_from(["p", "q", "r"]),
)


@st.composite
def _window_with_lookups(draw: st.DrawFn) -> list[UpdateByCriteria]:
    """Updates of devices, and some that look for a value of x, by device or wherever it is."""
    window = draw(_window())
    for n, (value, key, span, new) in enumerate(draw(st.lists(_HELD, max_size=3))):
        where = (
            Equals(column="x", value=value),
            *(each for each in (key, span) if each is not None),
        )
        place = draw(st.integers(0, len(window)))
        window.insert(place, update(100 + n, {"x": new}, *where))
    return [each.model_copy(update={"sequence": n, "id": f"u{n}"}) for n, each in enumerate(window)]


@settings(max_examples=200, deadline=None)
@given(_window_with_lookups())
def test_a_plan_does_what_its_updates_do_one_by_one(window: list[UpdateByCriteria]) -> None:
    """Updates that look for values have the effect that they have one after the other."""
    expected, found = _rows(), _rows()
    for each in window:
        for row in expected.values():
            if _meets(row, each):
                row.update(each.set)

    _carry_out(plan_updates(window), found)

    assert found == expected


def _names(updates: Iterable[UpdateByCriteria]) -> Sequence[str]:
    return [each.id for each in updates]


def test_a_hot_key_is_planned_in_time() -> None:
    """Thousands of updates of one device are planned without comparing each with each."""
    window = [
        update(n, {"user_id": f"u{n}"}, device(), between(n % 997, n % 997 + 2))
        for n in range(5000)
    ]

    plan = plan_updates(window)

    covered = sorted(left for each in spans(plan).values() for left in each)
    assert len(plan.steps) == 1
    assert covered[0][0] == 0
    assert all(one[1] == other[0] for one, other in pairwise(covered))
    assert _names(window)[-1] in plan.updates
