"""Where an event lives: Jitsu's data layouts, table by table and column by column."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import make_event
from recognition.errors import ConfigurationError
from recognition.layouts import (
    LAYOUTS,
    Columns,
    layout_named,
    single_table,
    snake_case,
    table_name,
)
from recognition.messages import Equals, UpdateByCriteria

SINGLE, SEGMENT = layout_named("segment-single-table"), layout_named("segment")
LEGACY, PASSTHROUGH = layout_named("jitsu-legacy"), layout_named("passthrough")


@pytest.mark.parametrize("type", ["track", "identify", "page", "screen", "group", "alias", "odd"])
@pytest.mark.parametrize("layout", ["segment-single-table", "jitsu-legacy", "passthrough"])
def test_everything_is_in_one_table(layout: str, type: str) -> None:
    """Three of the layouts keep all events in ``events``, whatever their type and name."""
    event = make_event("m1", 1, "d1", type=type, name="Buy Now")

    assert layout_named(layout).tables_of(event) == ("events",)


@pytest.mark.parametrize(
    ("type", "table"),
    [
        ("identify", "identifies"),
        ("page", "pages"),
        ("track", "tracks"),
        ("group", "groups"),
        ("screen", "screen"),
        ("alias", "alias"),
        ("odd", "odd"),
    ],
)
def test_segment_has_a_table_for_each_type(type: str, table: str) -> None:
    """Four types have their plural as a table, all others their own name."""
    assert SEGMENT.tables_of(make_event("m1", 1, "d1", type=type)) == (table,)


def test_a_named_track_is_in_two_tables() -> None:
    """A track lands in ``tracks`` and in the table of its name."""
    event = make_event("m1", 1, "d1", type="track", name="Buy Now")

    assert SEGMENT.tables_of(event) == ("tracks", "Buy Now")


def test_a_track_named_like_its_table_is_there_once() -> None:
    """A track called ``tracks`` has one row in that table."""
    event = make_event("m1", 1, "d1", type="track", name="tracks")

    assert SEGMENT.tables_of(event) == ("tracks",)


def test_the_name_of_a_page_makes_no_table() -> None:
    """Only tracks have a table of their own name."""
    event = make_event("m1", 1, "d1", type="page", name="Home")

    assert SEGMENT.tables_of(event) == ("pages",)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_that_a_function_chose_wins(layout: str) -> None:
    """A chosen table takes the place of all others."""
    event = replace(make_event("m1", 1, "d1", name="Buy Now"), table="chosen")

    assert layout_named(layout).tables_of(event) == ("chosen",)


def test_an_unknown_layout_is_refused_with_a_list() -> None:
    """The error says which layouts there are."""
    with pytest.raises(ConfigurationError, match="segment-single-table, segment, jitsu-legacy"):
        layout_named("snowplow")


def test_a_configured_layout_has_its_own_table_and_columns() -> None:
    """A layout of the settings keeps all events in one table with columns of its own."""
    layout = single_table("mine", "hits", Columns(id="hit_id"))

    assert layout.tables_of(make_event("m1", 1, "d1", type="page")) == ("hits",)
    assert layout.columns_of("hits").id == "hit_id"


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (SINGLE, ("message_id", "anonymous_id", "user_id", "timestamp")),
        (SEGMENT, ("message_id", "anonymous_id", "user_id", "timestamp")),
        (LEGACY, ("eventn_ctx_event_id", "user_anonymous_id", "user_id", "_timestamp")),
        (PASSTHROUGH, ("messageId", "anonymousId", "userId", "timestamp")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_columns_are_called_as_jitsu_calls_them(layout: object, names: tuple[str, ...]) -> None:
    """The four columns that an update needs, by layout."""
    columns = layout.columns  # type: ignore[attr-defined]

    assert (columns.id, columns.anonymous_id, columns.user_id, columns.time) == names


@pytest.mark.parametrize(
    ("layout", "table", "column"),
    [
        ("segment-single-table", "events", "context_traits_first_name"),
        ("segment", "identifies", "first_name"),
        ("segment", "pages", "context_traits_first_name"),
        ("segment", "tracks", "context_traits_first_name"),
        ("segment", "Buy Now", "context_traits_first_name"),
        ("segment", "groups", None),
        ("jitsu-legacy", "events", "user_first_name"),
    ],
)
def test_a_trait_is_where_the_layout_puts_it(layout: str, table: str, column: str | None) -> None:
    """Traits are under the context, at the top of ``identifies``, and not in ``groups``."""
    assert layout_named(layout).columns_of(table).trait_column("firstName") == column


# ``test_strings`` of Jitsu's core functions has the same pairs.
@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("plain", "plain"),
        ("_plain__string", "_plain__string"),
        ("camelCase", "camel_case"),
        ("camelCaseA", "camel_case_a"),
        ("cCase", "c_case"),
        ("Camel", "camel"),
        ("CCamelCase", "c_camel_case"),
        ("camelUSCase", "camel_u_s_case"),
        ("camelCaseEU", "camel_case_e_u"),
        ("_CamelCase", "_camel_case"),
        ("__CamelCase", "__camel_case"),
        ("Camel_Case", "camel_case"),
        ("Camel__Case", "camel__case"),
        ("camelCase__", "camel_case__"),
        ("plan2Level", "plan2_level"),
        ("first name", "first_name"),
        ("First Name", "first_name"),
        ("", ""),
    ],
)
def test_names_are_snake_cased_as_jitsu_does(name: str, column: str) -> None:
    """An underscore before a capital after a letter or digit; spaces become underscores."""
    assert snake_case(name) == column


def test_only_latin_capitals_are_lowered() -> None:
    """Jitsu looks at A to Z; a capital of another alphabet stays as it is."""
    assert snake_case("\u00c4nderungArt") == "\u00c4nderung_art"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("clicks", "clicks"),
        ("Buy Now", "Buy Now"),
        ("a-b$c", "a-b$c"),
        ("  padded ", "padded"),
        ("what?!", "what_"),
        ("a.b", "a_b"),
        ('x"; drop table y', "x_ drop table y"),
        ("2nd", "_2nd"),
        ("-", "_-"),
        ("", "_unnamed"),
        ("   ", "_unnamed"),
        ("\u00e9tat", "\u00e9tat"),
    ],
)
def test_a_table_name_is_cleaned(name: str, table: str) -> None:
    """What is no letter, digit, ``_``, space, ``$`` or ``-`` becomes one ``_``."""
    assert table_name(name) == table


@given(
    name=st.one_of(st.text(max_size=300), st.none()),
    chosen=st.one_of(st.none(), st.text(max_size=300)),
    type=st.sampled_from(["track", "page", "\u00b2odd", "\u0663x", "", "a\nb"]),
    layout=st.sampled_from(list(LAYOUTS)),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_event_has_tables_that_an_update_can_name(
    name: str | None, chosen: str | None, type: str, layout: str
) -> None:
    """No name of an event, no type and no chosen table makes a table that a message refuses."""
    event = replace(make_event("m1", 1, "d1", type=type, name=name), table=chosen)
    tables = layout_named(layout).tables_of(event)

    assert tables
    for table in tables:
        made = UpdateByCriteria(
            id="1",
            workspace="w1",
            table=table,
            set={"user_id": "u1"},
            where=(Equals(column="anonymous_id", value="d1"),),
            sequence=1,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )
        assert made.table == table


# ---------------------------------------------------------------- rows


def test_a_row_holds_what_the_event_gave() -> None:
    """Ids, time, type, name and traits are in their columns; a user that is not named is empty."""
    event = make_event("m1", 5, "d1", name="Buy", traits={"firstName": "Ann", "age": 30})

    assert SINGLE.row_of(event, "events") == {
        "message_id": "m1",
        "anonymous_id": "d1",
        "user_id": None,
        "timestamp": 5,
        "type": "track",
        "event": "Buy",
        "context_traits_first_name": "Ann",
        "context_traits_age": "30",
    }


def test_a_row_keeps_the_user_as_seen() -> None:
    """The user id is written as the event gave it; an email is no user id."""
    event = make_event("m1", 5, "d1", user_id=" U1", email="a@x.com")

    assert SINGLE.row_of(event, "events")["user_id"] == " U1"


def test_a_trait_never_replaces_a_column() -> None:
    """A trait that is called like a column at the top level is left out."""
    event = make_event("m1", 5, "d1", type="identify", traits={"userId": "x", "messageId": "y"})
    row = SEGMENT.row_of(event, "identifies")

    assert (row["user_id"], row["message_id"]) == (None, "m1")


def test_a_trait_with_an_impossible_name_is_left_out() -> None:
    """No column is made of a name that no database takes."""
    event = make_event("m1", 5, "d1", traits={'a"b': 1, "x" * 100: 2})

    assert not [name for name in SINGLE.row_of(event, "events") if name.startswith("context")]


def test_groups_hold_no_traits_of_the_user() -> None:
    """The account's traits of a group call are nobody's."""
    event = make_event("m1", 5, "d1", type="group", traits={"plan": "p"})

    assert "plan" not in SEGMENT.row_of(event, "groups")
