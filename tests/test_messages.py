"""What goes out: a message that exists is valid, and travels unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recognition.errors import MessageError
from recognition.messages import (
    Between,
    Cause,
    Empty,
    Equals,
    Messages,
    OneOf,
    UpdateByCriteria,
    decide_id,
    json_schema,
    parse_update,
    read_updates,
)

DOCS = Path(__file__).parents[1] / "docs"
DAY = datetime(2026, 1, 1, tzinfo=UTC)

# The example of DESIGN 5.1, with an id and a time in the places of its dots.
EXAMPLE: dict[str, Any] = {
    "kind": "update_by_criteria",
    "version": 1,
    "id": "6f0c5b9a41d3e8720f1b7c6d5e4a3928",
    "workspace": "w1",
    "table": "events",
    "set": {"user_id": "u1", "context_traits_email": "a@example.com"},
    "where": [
        {"kind": "equals", "column": "anonymous_id", "value": "a1"},
        {"kind": "empty", "column": "user_id"},
        {
            "kind": "between",
            "column": "timestamp",
            "start": "2026-01-01T00:00:00Z",
            "end": "2026-01-31T00:00:00Z",
        },
    ],
    "sequence": 7,
    "expected_rows": 12,
    "cause": {"message_id": "m9", "anonymous_id": "a1"},
    "created_at": "2026-02-01T10:00:00Z",
}
SECRET = "secret-value"


def text_of(**changes: Any) -> str:
    """The example as JSON, with some keys replaced; ``...`` takes a key away."""
    changed = {k: v for k, v in {**EXAMPLE, **changes}.items() if v is not ...}
    return json.dumps(changed)


def where(*criteria: dict[str, Any]) -> str:
    """The example with other criteria."""
    return text_of(where=list(criteria))


EQUALS = {"kind": "equals", "column": "anonymous_id", "value": "a1"}
BETWEEN = EXAMPLE["where"][2]
MESSAGES = {
    "kind": "messages",
    "id_column": "message_id",
    "time_column": "timestamp",
    "refs": [["m1", "2026-01-01T00:00:00Z"]],
}
ONE_OF = {"kind": "one_of", "column": "user_id", "values": ["u1", 2, 0.5, True]}


def update(**changes: Any) -> UpdateByCriteria:
    """A small valid update made in Python."""
    given_keys: dict[str, Any] = {
        "id": "1",
        "workspace": "w1",
        "table": "events",
        "set": {"user_id": "u1"},
        "where": (Equals(column="anonymous_id", value="a1"),),
        "sequence": 1,
        "created_at": DAY,
    }
    return UpdateByCriteria(**{**given_keys, **changes})


@contextmanager
def refused(match: str | None = None) -> Iterator[None]:
    """The parser refuses, and its text never repeats the secret value."""
    with pytest.raises(MessageError, match=match) as caught:
        yield

    assert SECRET not in str(caught.value)


# ---------------------------------------------------------------- round trip


def test_the_example_comes_back_byte_for_byte() -> None:
    """The published example is read and written as the same text, keys sorted, no spaces."""
    wire = json.dumps(EXAMPLE, sort_keys=True, separators=(",", ":"))

    assert parse_update(wire).to_json() == wire


def test_bytes_are_read_like_text() -> None:
    """A message may come as UTF-8 bytes."""
    assert parse_update(text_of().encode()) == parse_update(text_of())


def test_letters_travel_as_they_are() -> None:
    """A message is UTF-8 without escapes."""
    assert "\u674e\u00f6" in update(set={"user_id": "\u674e\u00f6"}).to_json()


def test_times_travel_in_utc() -> None:
    """A zoned time of another zone is the same moment, written with a Z."""
    there = DAY.astimezone(timezone(timedelta(hours=5, minutes=30)))
    sent = update(created_at=there, where=(Equals(column="a", value=there),))

    assert json.loads(sent.to_json())["created_at"] == "2026-01-01T00:00:00Z"
    assert json.loads(sent.to_json())["where"][0]["value"] == "2026-01-01T00:00:00Z"


def test_microseconds_survive() -> None:
    """A time keeps its last microsecond."""
    moment = DAY + timedelta(microseconds=1)

    assert parse_update(update(created_at=moment).to_json()).created_at == moment


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"])),
)


@given(value=SCALARS, other=SCALARS)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_scalar_comes_back_as_itself(value: object, other: object) -> None:
    """Values keep their type: 1, 1.0, true and "1" stay four different values."""
    sent = update(set={"user_id": value}, where=(OneOf(column="a", values=(value, other)),))
    back = parse_update(sent.to_json())

    assert back == sent
    assert type(back.set["user_id"]) is type(value)


def test_a_message_cannot_be_changed() -> None:
    """What was decided stays."""
    with pytest.raises(ValidationError, match="frozen"):
        update().sequence = 2  # type: ignore[misc]


# ---------------------------------------------------------------- refused

REFUSED: dict[str, tuple[str, str]] = {
    "unknown key": (text_of(extra=SECRET), "extra"),
    "unknown key of a criterion": (where({**EQUALS, "or": SECRET}), "where.0"),
    "unknown key of the cause": (text_of(cause={"why": SECRET}), "cause"),
    "unknown criterion": (where({"kind": "sql", "text": SECRET}), "where.0"),
    "no criterion": (where(), "where"),
    "empty alone": (where({"kind": "empty", "column": "user_id"}), "every row"),
    "between alone": (where(BETWEEN), "every row"),
    "empty and between": (where({"kind": "empty", "column": "user_id"}, BETWEEN), "every row"),
    "messages twice": (where(MESSAGES, MESSAGES), "at most once"),
    "no refs": (where({**MESSAGES, "refs": []}), "refs"),
    "no values": (where({**ONE_OF, "values": []}), "values"),
    "a list as a value": (where({**EQUALS, "value": [SECRET]}), "value"),
    "null to compare with": (where({**EQUALS, "value": None}), "value"),
    "nothing set": (text_of(set={}), "set"),
    "a list set": (text_of(set={"user_id": [SECRET]}), "set"),
    "NUL in a value": (where({**EQUALS, "value": SECRET + "\x00"}), "NUL"),
    "NUL in a ref": (
        where({**MESSAGES, "refs": [[SECRET + "\x00", "2026-01-01T00:00:00Z"]]}),
        "NUL",
    ),
    "NUL set": (text_of(set={"user_id": SECRET + "\x00"}), "NUL"),
    "NaN": (text_of(set={"user_id": float("nan")}), "set"),
    "Infinity": (where({**EQUALS, "value": float("inf")}), "where.0"),
    "naive start": (where(EQUALS, {**BETWEEN, "start": "2026-01-01T00:00:00"}), "start"),
    "naive ref": (where({**MESSAGES, "refs": [["m1", "2026-01-01T00:00:00"]]}), "refs"),
    "naive created_at": (text_of(created_at="2026-01-01T00:00:00"), "created_at"),
    "start equals end": (where(EQUALS, {**BETWEEN, "end": BETWEEN["start"]}), "start"),
    "start after end": (where(EQUALS, {**BETWEEN, "end": "2025-01-01T00:00:00Z"}), "start"),
    "a time before the year 1": (
        where(EQUALS, {**BETWEEN, "start": "0001-01-01T00:00:00+01:00"}),
        "start.*years 1 to 9999",
    ),
    "a time after the year 9999": (
        text_of(created_at="9999-12-31T23:59:59-01:00"),
        "created_at.*years 1 to 9999",
    ),
    "quote in a column": (where({**EQUALS, "column": 'a"b'}), "column"),
    "quote in a column set": (text_of(set={"a'b": 1}), "set"),
    "quote in a table": (text_of(table='events"; drop table x'), "table"),
    "semicolon in a table": (text_of(table="events;"), "table"),
    "empty part of a table": (text_of(table="a..b"), "table"),
    "line break in a table": (text_of(table="events\n"), "table"),
    "digit first": (where({**EQUALS, "column": "1a"}), "column"),
    "a name too long": (where({**EQUALS, "column": "a" * 256}), "column"),
    "empty id": (text_of(id=""), "id"),
    "negative sequence": (text_of(sequence=-1), "sequence"),
    "negative rows": (text_of(expected_rows=-1), "expected_rows"),
    "no table": (text_of(table=...), "table"),
    "another kind": (text_of(kind="delete"), "kind"),
    "no kind": (text_of(kind=...), "kind"),
    "version 2": (text_of(version=2), "version 2 .* unknown"),
    "version as text": (text_of(version=SECRET), "version str"),
    "no version": (text_of(version=...), "version"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_malformed_message_is_refused_by_place_and_rule(case: str) -> None:
    """The text of the error names the place and never holds a value of the message."""
    text, match = REFUSED[case]

    with refused(match):
        parse_update(text)


@pytest.mark.parametrize(
    "text", ["", SECRET, "[]", '"' + SECRET + '"', "null", "{", "7", "\ufeff{}", "{}"]
)
def test_what_is_no_message_is_refused(text: str) -> None:
    """Everything but a JSON object of our kind is refused without repeating it."""
    with refused():
        parse_update(text)


@pytest.mark.parametrize("text", [b"\xff\xfe", b'{"kind": "\xff"}'])
def test_bytes_that_are_no_utf8_are_refused(text: bytes) -> None:
    """Broken text is an error of the message, not of Python."""
    with refused():
        parse_update(text)


def test_a_deep_nesting_is_refused() -> None:
    """A message that exhausts the parser is refused like any other."""
    with refused():
        parse_update("[" * 100_000)


def test_a_naive_datetime_is_refused_as_a_value() -> None:
    """A time among plain values has a zone."""
    with pytest.raises(ValidationError, match="zone"):
        Equals(column="a", value=datetime(2026, 1, 1))


@pytest.mark.parametrize("name", ["a", "_a", "\u00e9tat", "a b", "a-b", "a$1", "a" * 255])
def test_a_plain_name_is_taken(name: str) -> None:
    """Letters of any script, digits, _, $, space and - make a name."""
    assert Empty(column=name).column == name


def test_a_table_may_have_its_schema() -> None:
    """Parts of a table's name are joined by dots."""
    assert update(table="db.analytics.events").table == "db.analytics.events"


# ---------------------------------------------------------------- lines


def test_a_broken_line_does_not_stop_the_others() -> None:
    """Lines are numbered from 1, blank ones pass, a broken one gives its reason."""
    found = list(read_updates([text_of(), "", "  \n", "{", text_of(id="2")]))

    assert [number for number, _ in found] == [1, 4, 5]
    assert [isinstance(item, MessageError) for _, item in found] == [False, True, False]


# ---------------------------------------------------------------- ids


def identify(**changes: Any) -> str:
    """The id of a small decision."""
    decision: dict[str, Any] = {
        "workspace": "w1",
        "table": "events",
        "set": {"user_id": "u1", "plan": None},
        "where": [
            Equals(column="anonymous_id", value="a1"),
            Between(column="t", start=DAY, end=DAY + timedelta(days=1)),
        ],
        "sequence": 7,
    }
    return decide_id(**{**decision, **changes})


def test_the_same_decision_has_the_same_id() -> None:
    """The id is a function of the decision; the order of the columns means nothing."""
    assert identify() == identify(set={"plan": None, "user_id": "u1"})
    assert len(identify()) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"workspace": "w2"},
        {"table": "pages"},
        {"set": {"user_id": "u2", "plan": None}},
        {"set": {"user_id": "u1"}},
        {"where": [Equals(column="anonymous_id", value="a1")]},
        {"where": [Equals(column="anonymous_id", value="a2")]},
        {"where": [Empty(column="anonymous_id")]},
        {
            "where": [
                Messages(id_column="message_id", time_column="t", refs=(("m1", DAY),)),
            ]
        },
        {"sequence": 8},
    ],
)
def test_another_decision_has_another_id(change: dict[str, Any]) -> None:
    """Every part of the decision counts."""
    assert identify(**change) != identify()


def test_the_id_does_not_depend_on_the_zone() -> None:
    """The same moment in another zone is the same decision."""
    there = DAY.astimezone(timezone(timedelta(hours=-8)))
    ids = [
        identify(where=[Messages(id_column="i", time_column="t", refs=(("m1", time),))])
        for time in (DAY, there)
    ]

    assert ids[0] == ids[1]


def test_values_of_different_types_have_different_ids() -> None:
    """A text that looks like a number is another decision."""
    assert identify(set={"user_id": "1"}) != identify(set={"user_id": 1})


# ---------------------------------------------------------------- schema

VALID: dict[str, Callable[[], str]] = {
    "example": text_of,
    "defaults": lambda: update().to_json(),
    "all criteria": lambda: where(EQUALS, ONE_OF, {"kind": "empty", "column": "x"}, MESSAGES),
    "null set": lambda: text_of(set={"user_id": None}),
    "unknown rows": lambda: text_of(expected_rows=None),
    "empty cause": lambda: update(cause=Cause()).to_json(),
}


@pytest.mark.parametrize("case", VALID)
def test_the_schema_takes_what_the_parser_takes(case: str) -> None:
    """A message that is read is valid by the published schema."""
    text = VALID[case]()
    parse_update(text)

    jsonschema.Draft202012Validator(json_schema()).validate(json.loads(text))


SHAPE_ERRORS = [
    "unknown key",
    "unknown key of a criterion",
    "unknown key of the cause",
    "unknown criterion",
    "no criterion",
    "no refs",
    "no values",
    "a list as a value",
    "null to compare with",
    "nothing set",
    "a list set",
    "empty id",
    "negative sequence",
    "negative rows",
    "no table",
    "another kind",
    "version 2",
]


@pytest.mark.parametrize("case", SHAPE_ERRORS)
def test_the_schema_refuses_what_has_the_wrong_shape(case: str) -> None:
    """What JSON schema can say, the published one says."""
    text, _ = REFUSED[case]
    validator = jsonschema.Draft202012Validator(json_schema())

    assert not validator.is_valid(json.loads(text))


def test_the_schema_knows_which_keys_are_needed() -> None:
    """A message that lacks a key is valid by the schema where, and only where, it is parsed."""
    message: dict[str, Any] = json.loads(text_of())
    valid = jsonschema.Draft202012Validator(json_schema()).is_valid
    disagree = []
    holders: list[dict[str, Any]] = [message, *message["where"], message["cause"]]
    for holder in holders:
        for key, value in list(holder.items()):
            del holder[key]
            try:
                parse_update(json.dumps(message))
            except MessageError:
                parsed = False
            else:
                parsed = True
            if valid(message) is not parsed:
                disagree.append(key)
            holder[key] = value

    assert valid(message)
    assert disagree == []


def test_the_schema_is_valid_itself() -> None:
    """The published schema obeys its own draft."""
    jsonschema.Draft202012Validator.check_schema(json_schema())

    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_the_documented_schema_is_the_one_of_the_code() -> None:
    """The file in the documentation is generated, never edited."""
    assert json.loads((DOCS / "message.schema.json").read_text("utf-8")) == json_schema()
