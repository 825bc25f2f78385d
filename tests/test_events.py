"""What is read from events, files and times, and what is refused."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import os
import pickle
import re
import sys
import time as clock
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from recognition.errors import ConfigurationError, EventError, InputError
from recognition.events import (
    BOTS,
    END_OF_TIME,
    FLAT,
    FORMATS,
    JITSU_CLASSIC,
    MAX_ID_LENGTH,
    MAX_LINE_BYTES,
    SEGMENT,
    SNOWPLOW,
    Event,
    Format,
    Identifier,
    Reject,
    RejectsFile,
    detect_format,
    is_bot,
    parse_event,
    parse_paths,
    parse_time,
    read_events,
    render_time,
)

DATA = Path(__file__).parent / "data"
CAPTURE = DATA / "segment_spec_sdk_capture.ndjson"
SNOWPLOW_ROWS = DATA / "snowplow_mobile" / "thin_events.csv"

NOON = "2026-01-02T12:00:00Z"
NOON_US = 1_767_355_200_000_000


def segment(**members: Any) -> dict[str, Any]:
    """A Segment track with a message id and a time, and what is given."""
    return {"messageId": "m1", "timestamp": NOON, "type": "track", **members}


def ndjson(*bodies: Any) -> bytes:
    """Bodies as NDJSON; bytes stand for a line of their own."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in bodies]
    return b"".join(line + b"\n" for line in lines)


def read(
    content: bytes, **arguments: Any
) -> tuple[list[Event], list[tuple[int, int | None, str, bytes]]]:
    """The events and the rejects (line, index, reason, raw) of some bytes."""
    rejects: list[Reject] = []
    events = list(read_events(io.BytesIO(content), rejects=rejects.append, **arguments))
    return events, [(each.line, each.index, each.reason, each.raw) for each in rejects]


def ids(events: list[Event]) -> list[str]:
    return [event.message_id for event in events]


def short(value: object) -> str:
    """A value as the name of a test."""
    return ascii(value)[:24]


def reasons(content: bytes, **arguments: Any) -> list[tuple[int, str]]:
    """The lines that are rejected, and why."""
    return [(line, reason) for line, _, reason, _ in read(content, **arguments)[1]]


# ----------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("userId", (("userId",),)),
        ("context.traits.email", (("context", "traits", "email"),)),
        ("/eventn_ctx/user/id||/user/id", (("eventn_ctx", "user", "id"), ("user", "id"))),
        ("/a.b/c || d.e", (("a.b", "c"), ("d", "e"))),
        (["a||b", "/c"], (("a",), ("b",), ("c",))),
        (["a", "b", "a"], (("a",), ("b",))),
    ],
)
def test_paths_are_dotted_or_slashed(text: str | list[str], paths: object) -> None:
    """Dotted paths, Jitsu's slashed ones, `||` and several texts mean alternatives in order."""
    assert parse_paths(text) == paths


@pytest.mark.parametrize("text", ["", "  ", "a||", "a..b", "/", "/a//b", ".a", ["a", ""]])
def test_an_empty_path_is_refused(text: str | list[str]) -> None:
    """A path with nothing between its marks is a mistake of configuration."""
    with pytest.raises(ConfigurationError, match="is not a path"):
        parse_paths(text)


@pytest.mark.parametrize("nothing", [None, "", " \t"])
def test_the_first_path_that_exists_wins(nothing: str | None) -> None:
    """A null, an empty and a blank value are as good as absent; the next path is tried."""
    form = Format(
        label="shop",
        message_id=parse_paths("id"),
        time=parse_paths("at||made.at"),
        anonymous_id=parse_paths("visitor||device.id||cookie"),
        known={"user_id": parse_paths("customer||buyer")},
        name=parse_paths("what||which"),
    )

    event = parse_event(
        {
            "id": 7,
            "at": nothing,
            "made": {"at": NOON},
            "visitor": nothing,
            "device": {"id": "d1"},
            "cookie": "c1",
            "customer": nothing,
            "buyer": "b1",
            "what": nothing,
            "which": "Sold",
        },
        form,
    )

    assert (event.message_id, event.time, event.type) == ("7", NOON_US, "event")
    assert (event.anonymous_id, event.known, event.name) == (
        "d1",
        (Identifier("user_id", "b1"),),
        "Sold",
    )


@pytest.mark.parametrize("between", [None, "text", 7, ["d1"]])
def test_a_path_through_no_object_does_not_exist(between: object) -> None:
    """Where a path goes through something that is no object, nothing is found, nothing raised."""
    event = parse_event(segment(context=between, traits=between))

    assert (event.known, event.traits, event.user_agent) == ((), {}, None)


# --------------------------------------------------------------------------------------- segment


def test_every_captured_event_of_the_sdks_is_read() -> None:
    """All 49 events that the Segment, RudderStack and Jitsu SDKs put on the wire are read."""
    rejects: list[Reject] = []
    events = list(read_events(CAPTURE, rejects=rejects.append))

    assert rejects == []
    assert len(events) == len(set(ids(events))) == 49
    assert {event.type for event in events} == {"page", "track", "identify", "group", "alias"}
    assert ids(events) == [
        json.loads(line)["messageId"] for line in CAPTURE.read_text().splitlines()
    ]


def test_captured_identifies_carry_user_and_email() -> None:
    """Each SDK's identify gives user id and email, wherever the SDK puts the traits."""
    identifies = [event for event in read_events(CAPTURE) if event.type == "identify"]

    found = {(event.anonymous_id, tuple(i.value for i in event.known)) for event in identifies}
    assert found == {
        ("anon-1", ("u-1", "ann@example.com")),
        ("anon-2", ("u-1", "ann@example.com")),
        ("kiosk-1", ("u-2", "bob@example.com")),
        ("kiosk-1", ("u-3", "cy@example.com")),
        ("anon-js1", ("u-1", "ann@example.com")),
        ("5d44f503-92c1-4a54-b597-6304a180df1c", ("u-1", "ann@example.com")),
    }
    assert all(event.traits == {"email": event.known[1].value} for event in identifies)


def test_captured_aliases_and_groups_carry_the_user_alone() -> None:
    """An alias has the previous id; a group has neither the account's traits nor its id."""
    events = list(read_events(CAPTURE))

    user_1, user_2 = (Identifier("user_id", "u-1"),), (Identifier("user_id", "u-2"),)
    aliases = {(e.known, e.previous_id, e.anonymous_id) for e in events if e.type == "alias"}
    assert aliases == {(user_2, "u-3", None)}
    groups = [event for event in events if event.type == "group"]
    assert {event.known for event in groups} == {user_1}
    assert all(event.traits == {} for event in groups)


def test_captured_names_are_those_of_events_and_pages() -> None:
    """A track's event and a page's name both are the name; RudderStack's time is its original."""
    events = list(read_events(CAPTURE))

    assert {e.name for e in events if e.type == "track"} == {
        "Product Viewed",
        "Order Completed",
        "Browse",
        "Browse again",
    }
    assert {e.name for e in events if e.type == "page"} == {
        "p0", "p1", "p2", "mobile home", None,
    }  # fmt: skip
    rudder = next(e for e in events if e.message_id == "92805ff7-46bd-4d1d-bb3c-a859369fbd12")
    assert render_time(rudder.time) == "2026-11-22T19:44:38.108000Z"


@pytest.mark.parametrize("absent", [0, 1, 2, 3])
def test_segment_times_are_taken_in_order(absent: int) -> None:
    """`timestamp`, else `originalTimestamp`, else `sentAt`, else `receivedAt` is the time."""
    keys = ["timestamp", "originalTimestamp", "sentAt", "receivedAt"]
    body = {"messageId": "m", "type": "track"}
    body |= {key: second for second, key in enumerate(keys, 1) if second > absent}

    assert parse_event(body).time == (absent + 1) * 1_000_000


def test_an_account_is_not_a_user() -> None:
    """In a group call only what stands under context is the user's; group ids never identify."""
    body = segment(
        type="Group",
        groupId="g1",
        traits={"email": "info@acme.example", "phone": "1", "employees": 7},
        context={"traits": {"email": "ann@example.com", "plan": "pro"}},
    )

    event = parse_event(body)

    assert event.type == "group"
    assert event.known == (Identifier("email", "ann@example.com"),)
    assert event.traits == {"email": "ann@example.com", "plan": "pro"}


def test_unknown_keys_are_left_alone() -> None:
    """What the format does not name changes nothing, whatever it holds."""
    noise = {"_received_from": {"path": "/"}, "groupId": "g", "previousId": ["x"], "user_id": "no"}

    event = parse_event(segment(anonymousId="a1", **noise))

    assert event == parse_event(segment(anonymousId="a1"))


def test_null_and_absent_are_the_same() -> None:
    """`"userId": null`, as the Python SDK sends, is no user id."""
    keys = ["userId", "anonymousId", "traits", "context", "event", "previousId"]

    event = parse_event(segment(**dict.fromkeys(keys)))

    assert event == parse_event(segment())


def test_traits_are_the_storable_scalars() -> None:
    """Own traits win over the context's; objects, blanks and the unstorable are not taken."""
    body = segment(
        type="identify",
        traits={
            "plan": "pro",
            "age": 33,
            "score": 0.5,
            "beta": False,
            "address": {"city": "Graz"},
            "tags": ["a"],
            "gone": None,
            "blank": " ",
            "nul": "a\x00b",
            "half": "\ud800",
            "huge": 2**63,
            "endless": float("inf"),
            "padded": " kept as seen ",
            "": "no name",
        },
        context={"traits": {"plan": "free", "lang": "de"}},
    )

    assert parse_event(body).traits == {
        "plan": "pro",
        "age": 33,
        "score": 0.5,
        "beta": False,
        "padded": " kept as seen ",
        "lang": "de",
    }


def test_the_table_and_user_agent_of_a_segment_event() -> None:
    """A user function's table, and the user agent of the context before the one at the top."""
    event = parse_event(
        segment(JITSU_TABLE_NAME="orders", context={"userAgent": "A"}, userAgent="B")
    )
    without = parse_event(segment(JITSU_TABLE_NAME={"not": "text"}, userAgent="B"))

    assert (event.table, event.user_agent) == ("orders", "A")
    assert (without.table, without.user_agent) == (None, "B")


def test_an_event_without_identifiers_is_legal() -> None:
    """An event of nobody passes; it just identifies nobody."""
    event = parse_event(segment())

    assert (event.anonymous_id, event.known, event.previous_id) == (None, (), None)
    assert (event.name, event.table, event.traits, event.user_agent) == (None, None, {}, None)


def test_any_mapping_is_an_event() -> None:
    """A mapping that is no dict is read like one."""
    body = segment(anonymousId="a1")

    assert parse_event(MappingProxyType(body)) == parse_event(body)


def test_texts_that_cannot_be_stored_are_no_names() -> None:
    """A name, table or user agent that no database takes counts as absent."""
    event = parse_event(segment(event="a\x00", name="b", JITSU_TABLE_NAME="\ud800", userAgent=7))

    assert (event.name, event.table, event.user_agent) == ("b", None, None)


# --------------------------------------------------------------------------------- other formats

CLASSIC = {
    "event_type": "pageview",
    "eventn_ctx": {
        "event_id": "e1",
        "user": {
            "anonymous_id": "a1",
            "hashed_anonymous_id": "h1",
            "id": "u1",
            "email": "ann@example.com",
            "internal_id": "77",
            "plan": "pro",
        },
        "user_agent": "Mozilla/5.0",
        "utc_time": NOON,
        "url": "https://shop.example/",
    },
    "src": "eventn",
}
CLASSIC_FLAT = {
    "_timestamp": "2026-01-02T12:00:09Z",
    "event_type": "pageview",
    "eventn_ctx_event_id": "e1",
    "eventn_ctx_user_anonymous_id": "a1",
    "eventn_ctx_user_hashed_anonymous_id": "h1",
    "eventn_ctx_user_id": "u1",
    "eventn_ctx_user_email": "ann@example.com",
    "eventn_ctx_user_internal_id": "77",
    "eventn_ctx_user_plan": "pro",
    "eventn_ctx_user_agent": "Mozilla/5.0",
    "eventn_ctx_utc_time": NOON,
}
CLASSIC_AT_TOP = {
    "event_type": "pageview",
    "event_id": "e1",
    "user": CLASSIC["eventn_ctx"]["user"],
    "user_agent": "Mozilla/5.0",
    "utc_time": NOON,
}


@pytest.mark.parametrize("body", [CLASSIC, CLASSIC_FLAT, CLASSIC_AT_TOP])
def test_jitsu_classic_nested_and_flattened_are_the_same(body: dict[str, Any]) -> None:
    """The three shapes of a Jitsu classic event are read as the same event."""
    event = parse_event(body)

    assert detect_format(body) is JITSU_CLASSIC
    assert event == Event(
        message_id="e1",
        time=NOON_US,
        type="pageview",
        anonymous_id="a1",
        known=(
            Identifier("user_id", "u1"),
            Identifier("email", "ann@example.com"),
            Identifier("internal_id", "77"),
        ),
        previous_id=None,
        name="pageview",
        table=None,
        traits={"email": "ann@example.com", "internal_id": "77", "plan": "pro"},
        user_agent="Mozilla/5.0",
    )


@pytest.mark.parametrize(
    ("members", "anonymous_id"),
    [
        ({"eventn_ctx": {"user": {"anonymous_id": "a"}}, "user": {"anonymous_id": "b"}}, "a"),
        ({"user": {"anonymous_id": "b", "hashed_anonymous_id": "c"}}, "b"),
        ({"eventn_ctx": {"user": {"hashed_anonymous_id": "c"}}}, "c"),
        ({"user": {"hashed_anonymous_id": "d"}}, "d"),
        ({"user_anonymous_id": "e"}, "e"),
        ({"user": {"id": "u"}}, None),
    ],
)
def test_jitsu_classic_falls_back_to_the_hashed_id(
    members: dict[str, Any], anonymous_id: str | None
) -> None:
    """The four default paths of `anonymous_id_node` are tried in their order."""
    body = {"event_id": "e1", "event_type": "x", "_timestamp": NOON, **members}

    assert parse_event(body).anonymous_id == anonymous_id


def test_the_jitsu_configuration_is_understood_as_it_is_written() -> None:
    """Node lists of Jitsu classic, copied from its configuration, replace the built-in paths."""
    form = JITSU_CLASSIC.with_known(
        {"user_id": "/eventn_ctx/ids/crm||/user/crm", "vat": ["/user/vat"]}, replacing=True
    )

    event = parse_event({**CLASSIC, "user": {"crm": 5, "vat": "AT1", "id": "x"}}, form)

    assert event.known == (Identifier("user_id", "5"), Identifier("vat", "AT1"))


def test_snowplow_rows_are_read() -> None:
    """All 130 rows of a real tracker are read, by derived time, with their own device column."""
    form = replace(SNOWPLOW, anonymous_id=parse_paths("device_user_id"))

    events = list(read_events(SNOWPLOW_ROWS, format=form))

    first = events[0]
    assert len(events) == 130
    assert first.message_id == "24b72c12-4b59-4553-b8a5-c07e2a7e5a73"
    assert render_time(first.time) == "2021-03-07T22:46:37.102000Z"
    assert first.anonymous_id == "a7208f5a-5e77-4351-8840-f28a3d2a6507"
    assert first.known == (Identifier("user_id", "long session"),)
    assert (first.type, first.name) == ("event", "application_foreground")
    assert {event.anonymous_id for event in read_events(SNOWPLOW_ROWS)} == {None}


def test_snowplow_falls_back_to_the_collector_but_not_to_the_network() -> None:
    """The collector's time stands in for the derived one; a third-party cookie is no device."""
    body = {
        "event_id": "e1",
        "collector_tstamp": "2026-01-02 12:00:00.000",
        "derived_tstamp": "",
        "network_userid": "n1",
        "event": "page_view",
        "useragent": "Mozilla/5.0",
    }

    event = parse_event(body)

    assert (event.time, event.anonymous_id, event.name) == (NOON_US, None, "page_view")
    assert event.user_agent == "Mozilla/5.0"
    assert parse_event({**body, "domain_userid": "d1"}).anonymous_id == "d1"


def test_flat_rows_are_read() -> None:
    """Columns of the single-table layout give identifiers, traits and the rest."""
    event = parse_event(
        {
            "message_id": "m1",
            "time": 1,
            "type": "alias",
            "anonymous_id": "a1",
            "user_id": "u1",
            "email": "",
            "phone": "0316",
            "previous_id": "u0",
            "event": "Sold",
            "context_traits_email": "ann@example.com",
            "context_traits_plan": "pro",
            "context_user_agent": "Mozilla/5.0",
        }
    )

    assert event.known == (
        Identifier("user_id", "u1"),
        Identifier("email", "ann@example.com"),
        Identifier("phone", "0316"),
    )
    assert (event.time, event.previous_id, event.name) == (1_000_000, "u0", "Sold")
    assert event.traits == {"email": "ann@example.com", "plan": "pro"}
    assert event.user_agent == "Mozilla/5.0"


def test_a_flat_group_row_has_the_accounts_columns() -> None:
    """In the row of a group call the email at the top is the account's; the user id is not."""
    row = {"message_id": "m", "time": 1, "user_id": "u1", "email": "info@acme.example"}

    assert len(parse_event({**row, "type": "track"}).known) == 2
    assert parse_event({**row, "type": "group"}).known == (Identifier("user_id", "u1"),)


@pytest.mark.parametrize(
    ("body", "type"),
    [
        ({"message_id": "m", "time": 1}, "event"),
        ({"event_id": "e", "derived_tstamp": 1, "type": "x"}, "event"),
        ({"messageId": "m", "timestamp": 1, "type": " Identify "}, "identify"),
    ],
)
def test_the_type_is_lower_case_or_event(body: dict[str, Any], type: str) -> None:
    """A type is trimmed and in lower case; where a format can do without, it is `event`."""
    assert parse_event(body).type == type


@pytest.mark.parametrize("body", [segment(type=None), {**CLASSIC, "event_type": ""}])
def test_segment_and_classic_events_need_a_type(body: dict[str, Any]) -> None:
    """Where the format has types, an event without one is refused."""
    with pytest.raises(EventError, match="no type"):
        parse_event(body)


def test_one_file_may_mix_formats() -> None:
    """Each event's format is told by its own keys."""
    row = {"event_id": "s1", "collector_tstamp": NOON}
    flat = {"message_id": "f1", "time": NOON}

    events, rejects = read(ndjson(segment(), CLASSIC, row, flat, CLASSIC_FLAT, segment()))

    assert rejects == []
    assert ids(events) == ["m1", "e1", "s1", "f1", "e1", "m1"]


def test_a_given_format_is_used_for_all() -> None:
    """With a format given nothing is detected: events of another shape are refused."""
    events, rejects = read(ndjson(segment(), {"message_id": "f1", "time": 1}), format=FLAT)

    assert ids(events) == ["f1"]
    assert [each[:3] for each in rejects] == [(1, None, "no message id")]


def test_configured_formats_take_part_in_the_detection() -> None:
    """A mapping of label to format stands in for those built-in formats, and for no others."""
    mine = {"segment": SEGMENT.with_known({"crm": "traits.crm"})}

    events, _ = read(ndjson(segment(traits={"crm": 9}), CLASSIC), format=mine)

    assert events[0].known == (Identifier("crm", "9"),)
    assert events[1].known[0] == Identifier("user_id", "u1")


def test_the_built_in_formats_are_listed_by_label() -> None:
    """Four formats are built in, each under its own label."""
    assert list(FORMATS) == ["segment", "jitsu-classic", "snowplow", "flat"]
    assert all(form.label == label for label, form in FORMATS.items())


# ------------------------------------------------------------------------- configured identifiers


def test_known_identifiers_are_added_after_the_formats_own() -> None:
    """New types come last; new paths of a type are tried after its own; the format is unchanged."""
    form = SEGMENT.with_known({"crm": ["/traits/crm||crm"], "email": "mail"})

    event = parse_event(segment(userId="u", mail="m@x.example", traits={"crm": "c"}), form)
    both = parse_event(segment(mail="m@x.example", traits={"email": "t@x.example"}), form)

    assert [each.type for each in event.known] == ["user_id", "email", "crm"]
    assert event.known[1:] == (Identifier("email", "m@x.example"), Identifier("crm", "c"))
    assert both.known == (Identifier("email", "t@x.example"),)
    assert "crm" not in SEGMENT.known


def test_identifying_traits_are_found_wherever_traits_are() -> None:
    """A trait named as identifying is looked for in every traits object, but not the account's."""
    form = SEGMENT.with_identifying_traits(["company_id", "email"])
    account = segment(type="group", traits={"company_id": "acme"})

    own = parse_event(segment(traits={"company_id": 1}), form)
    outer = parse_event(segment(context={"traits": {"company_id": 2}}), form)
    flat = parse_event(
        {"message_id": "m", "time": 1, "context_traits_company_id": "3"},
        FLAT.with_identifying_traits(["company_id"]),
    )

    assert [each.known for each in (own, outer, flat)] == [
        (Identifier("company_id", value),) for value in ("1", "2", "3")
    ]
    assert parse_event(account, form).known == ()
    assert SNOWPLOW.with_identifying_traits(["company_id"]) is SNOWPLOW


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"anonymous_id": "x"}, "not a name for a known identifier type"),
        ({"e mail": "x"}, "not a name for a known identifier type"),
        ({"1st": "x"}, "not a name for a known identifier type"),
        ({"mail": ""}, "is not a path"),
        ({"mail": []}, "needs a path"),
    ],
)
def test_a_wrong_identifier_type_is_refused(known: dict[str, Any], message: str) -> None:
    """A type has a plain name, is not the anonymous id, and has a path."""
    with pytest.raises(ConfigurationError, match=message):
        SEGMENT.with_known(known)


def test_a_format_does_not_change_with_what_it_was_made_of() -> None:
    """The mapping of identifier types may be changed afterwards; the format stays."""
    known = {"user_id": parse_paths("userId")}
    form = replace(SEGMENT, known=known)

    known.clear()

    assert list(form.known) == ["user_id"]


@pytest.mark.parametrize("missing", ["message_id", "time"])
def test_a_format_needs_message_id_and_time(missing: str) -> None:
    """A format that could never read an event is refused when it is made."""
    with pytest.raises(ConfigurationError, match="needs a path for the message id"):
        replace(SEGMENT, **{missing: ()})


def test_formats_and_events_travel_between_processes() -> None:
    """A format and an event are the same after pickling, and the format still reads."""
    form = pickle.loads(pickle.dumps(SEGMENT.with_known({"crm": "crm"})))
    event = parse_event(segment(crm="c1"), form)

    assert event.known == (Identifier("crm", "c1"),)
    assert pickle.loads(pickle.dumps(event)) == event


# ------------------------------------------------------------------------------ what ids may be


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("u1", "u1"),
        ("  u1\t\n", "u1"),
        ("\u00a0u1\u2003", "u1"),
        ("ann b", "ann b"),
        ("Zoë 🦊", "Zoë 🦊"),
        (123, "123"),
        (-1, "-1"),
        (0, "0"),
        (12.0, "12"),
        (1e16, "10000000000000000"),
        (12.5, "12.5"),
        (True, "true"),
        (False, "false"),
        ("a\x01b", "a\x01b"),
        ("x" * MAX_ID_LENGTH, "x" * MAX_ID_LENGTH),
        (" " * 2_000 + "x", "x"),
        (10**1_023, "1" + "0" * 1_023),
        ("undefined", "undefined"),
    ],
    ids=short,
)
def test_ids_become_text(value: object, text: str) -> None:
    """Text is trimmed, numbers and booleans become text; the same for every kind of id."""
    body = segment(messageId=value, anonymousId=value, userId=value, type="alias", previousId=value)

    event = parse_event({**body, "traits": {"email": value}})

    assert (event.message_id, event.anonymous_id, event.previous_id) == (text, text, text)
    assert event.known == (Identifier("user_id", text), Identifier("email", text))


BAD_IDS = [
    ({"x": "secret"}, "is an object or a list"),
    ({}, "is an object or a list"),
    (["secret"], "is an object or a list"),
    ("sec\x00ret", "holds a NUL character"),
    ("sec\ud800ret", "holds half of a surrogate pair"),
    ("\udc00", "holds half of a surrogate pair"),
    ("secret" * 171, "is longer than 1024 characters"),
    ("ü" * 1_025, "is longer than 1024 characters"),
    (10**1_024, "is longer than 1024 characters"),
    (10**5_000, "is longer than 1024 characters"),
    (float("nan"), "is not a finite number"),
    (float("-inf"), "is not a finite number"),
    (b"secret", "is neither text nor a number"),
]


@pytest.mark.parametrize(("value", "reason"), BAD_IDS, ids=range(len(BAD_IDS)))
@pytest.mark.parametrize(
    ("what", "members"),
    [
        ("message id", {"messageId": ...}),
        ("anonymous_id", {"anonymousId": ...}),
        ("user_id", {"userId": ...}),
        ("email", {"traits": {"email": ...}}),
        ("phone", {"context": {"traits": {"phone": ...}}}),
        ("previous id", {"type": "alias", "previousId": ...}),
    ],
)
def test_garbage_in_an_id_is_refused(
    what: str, members: dict[str, Any], value: object, reason: str
) -> None:
    """An id that is nested, unstorable or too long refuses the event, in the same words always."""

    def fill(member: Any) -> Any:
        if isinstance(member, dict):
            return {key: fill(each) for key, each in member.items()}
        return value if member is ... else member

    with pytest.raises(EventError) as caught:
        parse_event(segment(**fill(members)))

    assert str(caught.value) == f"{what} {reason}"
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "the event is not an object"),
        ([], "the event is not an object"),
        ("secret", "the event is not an object"),
        ({}, "no message id"),
        (segment(messageId=" "), "no message id"),
        ({"userId": "secret", "timestamp": NOON}, "no message id"),
        (segment(timestamp=None), "no time"),
        (segment(timestamp="secret"), "the time cannot be read"),
        (segment(timestamp=["secret"]), "the time cannot be read"),
        (segment(timestamp="1969-12-31T23:59:59Z"), "the time is out of range"),
        (segment(type=7), "the type is not text"),
        (segment(type={"secret": 1}), "the type is not text"),
        (segment(type="sec\x00ret"), "type holds a NUL character"),
    ],
)
def test_what_is_no_event_is_refused(body: object, reason: str) -> None:
    """What every event needs is refused in short stable words that never hold a value."""
    with pytest.raises(EventError) as caught:
        parse_event(body)

    assert str(caught.value) == reason
    assert "secret" not in str(caught.value)
    assert caught.value.written is False


def test_nested_garbage_beside_the_ids_is_no_reason_to_refuse() -> None:
    """Only what stands where an id is looked for has to be an id."""
    body = segment(
        userId="u1", traits={"name": {"first": "Ann"}}, previousId=["x"], properties={"email": []}
    )

    assert parse_event(body).known == (Identifier("user_id", "u1"),)


ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
    | st.sampled_from(["", " ", "a\x00b", "\ud800", "x" * 1_025, NOON, "track", "group", "alias"])
)
JSON = st.recursive(
    ATOMS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [
        "messageId", "message_id", "event_id", "eventn_ctx", "eventn_ctx_event_id", "timestamp",
        "time", "_timestamp", "collector_tstamp", "type", "event_type", "anonymousId",
        "anonymous_id", "userId", "user_id", "user", "traits", "context", "previousId", "event",
        "name", "id", "email", "phone", "userAgent", "context_traits_x", "user_x",
    ]
)  # fmt: skip


@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON)) | JSON)
@settings(max_examples=250, deadline=None)
def test_no_json_breaks_the_parser(body: object) -> None:
    """Whatever JSON comes, it becomes a valid event or an EventError, nothing else."""
    try:
        event = parse_event(body)
    except EventError as exc:
        refused: str | None = str(exc)
    else:
        refused = None

    if refused is not None:
        assert re.fullmatch(r"[a-zA-Z0-9_ ]{5,60}", refused)
        return
    every_id = [event.message_id, event.anonymous_id, event.previous_id]
    every_id += [each.value for each in event.known]
    for text in every_id:
        assert text is None or (text == text.strip() and 0 < len(text.encode()) <= 4_096)
    assert 0 <= event.time < END_OF_TIME
    assert len({each.type for each in event.known}) == len(event.known)
    for value in (event.name, event.table, event.user_agent, *event.traits.values()):
        assert not isinstance(value, str) or (value.strip() and b"\x00" not in value.encode())


def expected_of_segment(body: dict[str, Any]) -> tuple[object, ...] | None:
    """The ids, known identifiers and traits of a Segment event, said in another way; None: no."""

    def inside(value: Any, key: str) -> Any:
        return value.get(key) if isinstance(value, dict) else None

    def first(*values: Any) -> Any:
        return next((v for v in values if v is not None and str(v).strip() != ""), None)

    def is_garbage(value: Any) -> bool:
        return isinstance(value, (dict, list)) or "\x00" in str(value) or len(str(value)) > 1_024

    def as_text(value: Any) -> str | None:
        if isinstance(value, bool):
            return str(value).lower()
        return None if value is None else str(value).strip()

    own, outer = body.get("traits"), inside(body.get("context"), "traits")
    if body.get("type") == "group":
        own = None
    alias = body.get("type") == "alias"
    found = [
        first(body.get("messageId")),
        first(body.get("anonymousId")),
        first(body.get("previousId")) if alias else None,
        first(body.get("userId")),
        first(inside(own, "email"), inside(outer, "email")),
        first(inside(own, "phone"), inside(outer, "phone")),
    ]
    if found[0] is None or any(map(is_garbage, found)):
        return None
    texts = [as_text(each) for each in found]
    known = zip(["user_id", "email", "phone"], texts[3:], strict=True)
    merged: dict[str, Any] = {}
    for traits in (outer, own):
        for key, value in traits.items() if isinstance(traits, dict) else ():
            if isinstance(value, (str, int)) and str(value).strip() and "\x00" not in str(value):
                merged[key] = value
    return (*texts[:3], tuple((kind, text) for kind, text in known if text), merged)


VALUES = st.sampled_from(
    [None, "", " ", "x", " y ", 7, True, ["l"], {"o": 1}, "n\x00", "z" * 1_025, "é"]
)
TRAITS = VALUES | st.fixed_dictionaries(
    {}, optional={"email": VALUES, "phone": VALUES, "p": VALUES}
)


@given(
    st.fixed_dictionaries(
        {
            "messageId": VALUES | st.just("m1"),
            "timestamp": st.just(NOON),
            "type": st.sampled_from(["track", "identify", "group", "alias"]),
        },
        optional={
            "anonymousId": VALUES,
            "userId": VALUES,
            "previousId": VALUES,
            "traits": TRAITS,
            "context": VALUES | st.fixed_dictionaries({}, optional={"traits": TRAITS}),
        },
    )
)
@settings(max_examples=600, deadline=None)
def test_segment_events_are_read_as_an_oracle_reads_them(body: dict[str, Any]) -> None:
    """A second reading of the Segment rules, written separately, finds the same or refuses too."""
    expected = expected_of_segment(body)

    try:
        event = parse_event(body)
    except EventError:
        assert expected is None
        return
    found = (event.message_id, event.anonymous_id, event.previous_id, event.known, event.traits)
    assert found == expected


# ----------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-02T12:00:00Z",
        "2026-01-02t12:00:00z",
        "2026-01-02 12:00:00",
        "2026-01-02T12:00:00",
        "2026-01-02T12:00:00.0Z",
        "2026-01-02 12:00:00.000",
        "2026-01-02 12:00:00.000000000",
        "2026-01-02T12:00:00,000Z",
        "2026-01-02T13:00:00+01:00",
        "2026-01-02T13:00:00+0100",
        "2026-01-02T13:00:00+01",
        "2026-01-02T13:00:00.000+0100",
        "2026-01-02 13:00:00.000 +0100",
        "2026-01-02 13:00:00 +01:00",
        "2026-01-02T06:30:00-05:30",
        "2026-01-02T12:00:00-00:00",
        "2026-01-02 12:00:00 UTC",
        "2026-01-02 12:00:00.000 utc",
        "2026-01-02T12:00",
        "2026-01-02T12",
        "20260102T120000Z",
        "  2026-01-02T12:00:00Z ",
        "1767355200",
        "1767355200.0",
        "1767355200000",
        "+1767355200",
        1767355200,
        1767355200.0,
        1767355200_000,
        1767355200_000_000,
        1767355200_000_000_000,
        1767355200e6,
        datetime(2026, 1, 2, 12),
        datetime(2026, 1, 2, 12, tzinfo=UTC),
        datetime(2026, 1, 2, 13, tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_times_of_every_shape_are_the_same(text: object) -> None:
    """Noon of one day is the same number however it is written."""
    assert parse_time(text) == NOON_US


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("2026-01-02", NOON_US - 12 * 3_600_000_000),
        ("2026-01-02T12:00:00.1Z", NOON_US + 100_000),
        ("2026-01-02T12:00:00.12Z", NOON_US + 120_000),
        ("2026-01-02T12:00:00.1234Z", NOON_US + 123_400),
        ("2026-01-02T12:00:00.12345Z", NOON_US + 123_450),
        ("2026-01-02T12:00:00.1234567Z", NOON_US + 123_456),
        ("2026-01-02T12:00:00.12345678+00:00", NOON_US + 123_456),
        ("2026-01-02T12:00:00.123456999Z", NOON_US + 123_456),
        ("2026-01-02 12:00:00.123456999 UTC", NOON_US + 123_456),
        ("2026-01-02 12:00:00.5 +0000", NOON_US + 500_000),
        (1767355200.25, NOON_US + 250_000),
        (1113726542.646319, 1_113_726_542_646_319),
        ("1767355200.123456", NOON_US + 123_456),
        (1767355200000.5, NOON_US + 500),
        (1767355200_000_000_999, NOON_US),
        (0, 0),
        (1, 1_000_000),
        ("1", 1_000_000),
        (99_999_999_999 // 20, 4_999_999_999_000_000),
        (10**11, 10**14),
        (10**14, 10**14),
        (10**17, 10**14),
    ],
)
def test_fractions_and_units(value: object, time: int) -> None:
    """Fractions are cut at the microsecond; a number's unit follows from its size."""
    assert parse_time(value) == time


@pytest.mark.parametrize("second", ["59.999999", "60", "60.5"])
def test_a_leap_second_is_the_following_second(second: str) -> None:
    """23:59:60 is midnight, as POSIX counts; the second before it is not moved."""
    midnight = parse_time("2017-01-01T00:00:00Z")

    moved = {"59.999999": -1, "60": 0, "60.5": 500_000}[second]
    assert parse_time(f"2016-12-31T23:59:{second}Z") == midnight + moved
    assert parse_time(f"2016-12-31 23:59:{second}") == midnight + moved


@pytest.mark.parametrize(
    "value",
    [
        "", "now", "2026-01", "2026-13-01", "2026-02-30", "2026-01-02T25:00:00Z",
        "2026-01-02T12:61:00Z", "2026-01-02T12:00:61Z", "2026-01-02T12:00:00+25:00",
        "2026-01-02T12:00:00 CET", "01/02/2026", "0x10", "1e9", "١٢٣", "1767355200 s", "1" * 21,
        "1" * 5_000, "2026-01-02T12:00:00\x00", "2026-01-02é12:00:00", "\ud800",
        "2026-01-02T12:00:00Z\x00", True, False, None, [], {}, b"2026-01-02",
        float("nan"), float("inf"),
    ],
    ids=short,
)  # fmt: skip
def test_what_is_no_time_is_refused(value: object) -> None:
    """What cannot be read as a time is refused, never guessed."""
    with pytest.raises(EventError, match=r"^the time cannot be read$"):
        parse_time(value)


@pytest.mark.parametrize(
    "value",
    [
        "1969-12-31T23:59:59.999999Z", "1970-01-01T00:00:00+00:01", "2262-04-11", "9999-12-31",
        "0001-01-01T00:00:00+23:59", -1, -0.001, "-5", 9_223_286_400, END_OF_TIME, 10**30,
        -(10**30), 1e300, datetime.max, datetime.min,
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))),
    ],
    ids=short,
)  # fmt: skip
def test_times_out_of_range_are_refused(value: object) -> None:
    """A time before 1970 or from 2262-04-11 on is out of range."""
    with pytest.raises(EventError, match=r"^the time is out of range$"):
        parse_time(value)


def test_the_end_of_time_is_that_of_64_bit_nanoseconds() -> None:
    """The last time that is accepted fits 64-bit nanoseconds; a day later does not."""
    day = 86_400_000_000

    assert parse_time("2262-04-10T23:59:59.999999Z") == END_OF_TIME - 1
    assert END_OF_TIME * 1_000 < 2**63 < (END_OF_TIME + day) * 1_000


def test_a_time_without_zone_is_utc_wherever_the_machine_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The zone of the machine changes nothing."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        clock.tzset()
        there = [parse_time("2026-01-02 12:00:00"), parse_time(datetime(2026, 1, 2, 12))]
    clock.tzset()

    assert there == [NOON_US, NOON_US]


def test_a_zone_that_knows_no_offset_counts_as_none() -> None:
    """A datetime whose zone has no offset is without a zone, as Python sees it."""

    class Nowhere(tzinfo):
        def utcoffset(self, moment: datetime | None) -> None:
            return None

    assert parse_time(datetime(2026, 1, 2, 12, tzinfo=Nowhere())) == NOON_US


@given(st.integers(0, END_OF_TIME - 1))
@settings(max_examples=200, deadline=None)
def test_a_rendered_time_is_read_back(time: int) -> None:
    """Rendering and reading are each other's inverse, and the text has one shape."""
    text = render_time(time)

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    assert parse_time(text) == time


@given(st.integers(0, END_OF_TIME - 1), st.integers(-1_439, 1_439), st.sampled_from("T t"))
@settings(max_examples=200, deadline=None)
def test_an_offset_is_subtracted(time: int, minutes: int, separator: str) -> None:
    """The same moment in any zone is the same number."""
    zone = timezone(timedelta(minutes=minutes))
    local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time)).astimezone(zone)

    assert parse_time(local) == time
    assert parse_time(local.isoformat(sep=separator)) == time


@given(st.text(max_size=30) | st.from_regex(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.{0,12}"))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_reading_of_times(text: str) -> None:
    """Any text is a time in range or an EventError."""
    try:
        time = parse_time(text)
    except EventError:
        return

    assert 0 <= time < END_OF_TIME


# ----------------------------------------------------------------------------------------- files

THREE = [segment(messageId=f"m{number}") for number in (1, 2, 3)]


@pytest.mark.parametrize(
    "content",
    [
        ndjson(*THREE),
        ndjson(*THREE)[:-1],
        ndjson(*THREE).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + ndjson(*THREE),
        b"\n \n" + ndjson(*THREE).replace(b"\n", b"\n\n\r\n\t\n"),
        gzip.compress(ndjson(*THREE)),
        gzip.compress(b"\xef\xbb\xbf" + ndjson(*THREE)),
        gzip.compress(ndjson(*THREE[:1])) + gzip.compress(ndjson(*THREE[1:])),
        gzip.compress(ndjson(*THREE)[:70]) + gzip.compress(ndjson(*THREE)[70:]),
        gzip.compress(ndjson(*THREE)) + bytes(512),
        ndjson(THREE[0]) + b"\xef\xbb\xbf" + ndjson(*THREE[1:]) + b"\xef\xbb\xbf\n",
    ],
    ids=[
        "plain", "no last newline", "CRLF", "mark", "blank lines", "gzip", "gzip and mark",
        "gzip members", "a line over two members", "gzip with padding", "joined files with marks",
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, 1, 2, 7])
def test_ndjson_is_read_in_every_wrapping(content: bytes, size: int | None) -> None:
    """Line ends, byte order marks, gzip and the size of what a pipe holds change nothing."""

    class Pipe(io.BytesIO):
        def read1(self, wanted: int | None = -1) -> bytes:
            return super().read1(wanted if size is None or wanted is None else min(wanted, size))

    rejects: list[Reject] = []
    events = list(read_events(Pipe(content), rejects=rejects.append))

    assert ids(events) == ["m1", "m2", "m3"]
    assert rejects == []


@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
@pytest.mark.parametrize("encoding", ["ndjson", "csv"])
def test_an_empty_file_has_no_events(content: bytes, encoding: str) -> None:
    """A file of nothing gives nothing, and is no error."""
    assert read(content, encoding=encoding) == ([], [])


def test_a_file_is_known_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    """Gzip under any name, and plain text named .gz, are read; a path may be text or a Path."""
    packed, plain = tmp_path / "events.ndjson", tmp_path / "events.gz"
    packed.write_bytes(gzip.compress(ndjson(*THREE)))
    plain.write_bytes(ndjson(*THREE))

    assert (
        ids(list(read_events(packed))) == ids(list(read_events(str(plain)))) == ["m1", "m2", "m3"]
    )


def test_standard_input_is_read_and_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` is standard input; rejects name it so."""
    buffer = io.BytesIO(ndjson(b"{", *THREE))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(buffer))
    rejects: list[Reject] = []

    events = list(read_events("-", rejects=rejects.append))

    assert ids(events) == ["m1", "m2", "m3"]
    assert [each.source for each in rejects] == ["-"]
    assert not buffer.closed


def test_a_file_handed_in_stays_open(tmp_path: Path) -> None:
    """The caller's file is not closed, and its name is the source of rejects."""
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson(b"{"))
    rejects: list[Reject] = []
    with path.open("rb") as file:
        list(read_events(file, rejects=rejects.append))

        assert not file.closed
    assert [each.source for each in rejects] == [str(path)]


def test_a_line_of_a_pipe_is_an_event_at_once() -> None:
    """An event is yielded when its line is there, not when the pipe ends or a buffer is full."""
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb", buffering=0) as writer:
        events = read_events(pipe)
        writer.write(ndjson(THREE[0]))
        first = next(events)
        writer.write(ndjson(THREE[1]))
        second = next(events)

    assert ids([first, second]) == ["m1", "m2"]


BAD_LINES = [
    (b"{", "not JSON"),
    (b'{"messageId": }', "not JSON"),
    (b"hello secret", "not JSON"),
    (b"{} {}", "not JSON"),
    (b'{"a": NaN}', "not JSON"),
    (b'{"a": Infinity}', "not JSON"),
    (b'{"a": -Infinity}', "not JSON"),
    (b'{"a": "\x01"}', "not JSON"),
    (b'{"a": ' + b"9" * 5_000 + b"}", "not JSON"),
    (b'{"a": "\xff"}', "not UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"a": ' * 100_000, "nested too deeply"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    (b"7", "the event is not an object"),
    (b'"secret"', "the event is not an object"),
    (b'{"timestamp": 1}', "no message id"),
    (b'{"messageId": "m"}', "no time"),
    (b'{"messageId": "m", "timestamp": "secret", "type": "track"}', "the time cannot be read"),
    (b'{"messageId": "\\u0000", "timestamp": 1}', "message id holds a NUL character"),
    (b'{"messageId": "\\ud800"}', "message id holds half of a surrogate pair"),
    (b'{"messageId": {"a": []}}', "message id is an object or a list"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_never_stops_the_run(line: bytes, reason: str) -> None:
    """A line that is no event is rejected as it came, with number and reason; others stand."""
    events, rejects = read(ndjson(THREE[0], b"", line + b" \r", THREE[1]))

    assert ids(events) == ["m1", "m2"]
    assert rejects == [(3, None, reason, line.strip())]


def test_rejects_come_in_the_order_of_the_file() -> None:
    """A reject is handed over before the event that follows it is yielded."""
    seen: list[object] = []
    content = io.BytesIO(ndjson(THREE[0], b"{", THREE[1], b"[", b"]"))

    for event in read_events(content, rejects=lambda reject: seen.append(reject.line)):
        seen.append(event.message_id)

    assert seen == ["m1", 2, "m2", 4, 5]


class Endless(io.RawIOBase):
    """A file of one line of many bytes, then an event, that holds none of it."""

    def __init__(self, length: int) -> None:
        self._left = length
        self._end = b"\n" + ndjson(THREE[0])

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        if self._left:
            size = min(size, self._left)
            self._left -= size
            return b"x" * size
        end, self._end = self._end, b""
        return end


def test_a_line_that_is_too_long_is_not_loaded() -> None:
    """A line of 200 MiB is rejected with its beginning, in bounded memory; the rest goes on."""
    rejects: list[Reject] = []
    tracemalloc.start()
    events = list(read_events(Endless(200 * 1024 * 1024), rejects=rejects.append))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert ids(events) == ["m1"]
    assert [(each.line, each.reason) for each in rejects] == [(1, "the line is longer than 16 MiB")]
    assert rejects[0].raw == b"x" * len(rejects[0].raw)
    assert 0 < len(rejects[0].raw) <= 64 * 1024
    assert peak < 3 * MAX_LINE_BYTES


@pytest.mark.parametrize("extra", [0, 1])
def test_the_longest_line_is_16_mib(extra: int) -> None:
    """A line of exactly 16 MiB is read, one byte more is not; also at the end of the file."""
    body = json.dumps(segment(properties="")).encode()
    line = body.replace(b'""', b'"' + b"x" * (MAX_LINE_BYTES - len(body) + extra) + b'"')
    assert len(line) == MAX_LINE_BYTES + extra

    middle, middle_rejects = read(ndjson(line, THREE[1]))
    end, end_rejects = read(ndjson(THREE[1]) + line)

    assert ids(middle) == ["m1", "m2"][extra:]
    assert ids(end) == ["m2", "m1"][: 2 - extra]
    assert len(middle_rejects) == len(end_rejects) == extra


def test_an_array_line_is_its_events() -> None:
    """Each member of an array is an event of its own; a bad one is rejected with its index."""
    events, rejects = read(ndjson([], [THREE[0], {"a": 1}, 5, [THREE[2]], THREE[1]], THREE[2]))

    assert ids(events) == ["m1", "m2", "m3"]
    assert [each[:3] for each in rejects] == [
        (2, 1, "no message id"),
        (2, 2, "the event is not an object"),
        (2, 3, "the event is not an object"),
    ]
    assert [json.loads(each[3]) for each in rejects] == [{"a": 1}, 5, [THREE[2]]]


def test_depth_at_the_edge_of_what_python_reads_is_no_crash() -> None:
    """Members nested almost too deeply to be read, and too deeply to be written, are rejected."""
    depths = range(900, 1_010)

    events, rejects = read(ndjson(*(b"[" * depth + b"]" * depth for depth in depths), THREE[0]))

    assert ids(events) == ["m1"]
    assert [each[0] for each in rejects] == list(range(1, len(depths) + 1))


def test_a_batch_envelope_is_its_events() -> None:
    """The envelope's context and sent time reach its events, whose own members win."""
    envelope = {
        "writeKey": "k",
        "sentAt": NOON,
        "context": {"userAgent": "A", "traits": {"email": "ann@example.com"}},
        "batch": [
            {"messageId": "b1", "type": "track"},
            {"messageId": "b2", "type": "track", "sentAt": 5, "context": {"userAgent": "B"}},
            {"messageId": "b3", "type": "track", "context": "none"},
            "secret",
        ],
    }

    events, rejects = read(ndjson(envelope, {"batch": []}))

    assert ids(events) == ["b1", "b2", "b3"]
    assert [event.time for event in events] == [NOON_US, 5_000_000, NOON_US]
    assert [event.user_agent for event in events] == ["A", "B", None]
    email = (Identifier("email", "ann@example.com"),)
    assert [event.known for event in events] == [email, email, ()]
    assert [each[:3] for each in rejects] == [(1, 3, "the event is not an object")]


def test_an_event_may_have_a_member_named_batch() -> None:
    """A message id makes it an event; a batch that is no list makes it a bad one."""
    events, rejects = read(ndjson(segment(batch=[1, 2]), {"batch": "x"}))

    assert ids(events) == ["m1"]
    assert [each[2] for each in rejects] == ["no message id"]


@pytest.mark.parametrize("cut", [1, 8, 20, 300])
def test_a_truncated_gzip_gives_what_it_holds(cut: int) -> None:
    """The events before the cut are delivered, then the rest is one reject that says so."""
    bodies = [segment(messageId=os.urandom(30).hex()) for _ in range(200)]
    packed = gzip.compress(ndjson(*bodies))

    events, rejects = read(packed[:-cut])

    assert ids(events) == [body["messageId"] for body in bodies][: len(events)]
    assert len(events) > 150
    line, _, reason, raw = rejects[0]
    assert (len(rejects), line) == (1, len(events) + 1)
    assert reason == "the gzip stream ends too early"
    assert ndjson(*bodies).startswith(ndjson(*bodies[: len(events)]) + raw)


def test_a_damaged_gzip_gives_what_came_before() -> None:
    """Damage inside, a wrong checksum or foreign bytes after it end the file with a reject."""
    packed = gzip.compress(ndjson(*THREE))
    wrong_sum = packed[:-8] + bytes(8)
    foreign = packed + b"no gzip"
    inside = packed[:10] + b"\xff" * 40 + packed[50:]

    found = [read(each) for each in (wrong_sum, foreign, inside)]

    assert [ids(events) for events, _ in found] == [["m1", "m2", "m3"], ["m1", "m2", "m3"], []]
    for _, rejects in found:
        assert [each[2] for each in rejects] == ["the gzip stream is damaged"]


# ------------------------------------------------------------------------------------------- CSV


def test_csv_rows_are_events() -> None:
    """The first row names the columns, an empty cell is absent, a quoted cell may span lines."""
    content = (
        b"message_id,timestamp,type,anonymous_id,user_id,context_traits_note\r\n"
        b'm1,2026-01-02 12:00:00,identify,a1,u1,"two\r\nlines, and a ""quote"""\r\n'
        b"\r\n"
        b"m2,2026-01-02 12:00:00,track,a1,,\r\n"
        b",,,,,\r\n"
        b"m3,1767355200,track,,u1,"
    )

    events, rejects = read(b"\xef\xbb\xbf" + content, encoding="csv")

    assert rejects == []
    assert ids(events) == ["m1", "m2", "m3"]
    assert {event.time for event in events} == {NOON_US}
    assert events[0].traits == {"note": 'two\r\nlines, and a "quote"'}
    assert (events[1].anonymous_id, events[1].known) == ("a1", ())
    assert (events[2].anonymous_id, events[2].known) == (None, (Identifier("user_id", "u1"),))


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "ROWS.CSV"])
def test_csv_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    """A name that ends in .csv or .csv.gz is CSV; whether it is gzip its bytes say."""
    content = b"message_id,time\nm1,1\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

    assert ids(list(read_events(path))) == ["m1"]
    assert reasons(path.read_bytes(), encoding="ndjson") == [(1, "not JSON"), (2, "not JSON")]


def test_dotted_columns_are_members_of_objects() -> None:
    """Columns named by dotted paths, as json_normalize writes them, make the nested event again."""
    content = (
        b"messageId,timestamp,type,context.traits.email,context.userAgent,a,a.b,a.b.c,.x\n"
        b"m1,1,identify,ann@example.com,A,1,2,3,4\n"
        b"m2,1,track,,,,2,,\n"
    )

    events, rejects = read(content, encoding="csv")

    assert rejects == []
    assert events[0].known == (Identifier("email", "ann@example.com"),)
    assert events[0].user_agent == "A"
    assert (events[1].type, events[1].known, events[1].user_agent) == ("track", (), None)


def test_a_bad_row_never_stops_the_run() -> None:
    """Rows of another width, foreign bytes and endless quotes are rejected as they came."""
    endless = b'm5,"' + b"x" * 200_000
    rows = [
        b"m1,1,u1", b"m2,1", b"m3,1,u1,more", b"m4,1,\xff", endless, b"m6,1,u1",
        b'm7,1,"u\n1\x00"', b"m8,never,u1", b"m9,1,u1", b'm10,1,"u1', b"",
    ]  # fmt: skip
    content = b"message_id,time,user_id\n" + b"\n".join(rows)

    events, rejects = read(content, encoding="csv")

    assert ids(events) == ["m1", "m6", "m9", "m10"]
    assert [(line, reason) for line, _, reason, _ in rejects] == [
        (3, "the row has another number of cells than the header"),
        (4, "the row has another number of cells than the header"),
        (5, "not UTF-8"),
        (6, "not CSV"),
        (8, "user_id holds a NUL character"),
        (10, "the time cannot be read"),
    ]
    assert [raw for *_, raw in rejects][:4] == [b"m2,1", b"m3,1,u1,more", b"m4,1,\xff", endless]
    assert rejects[4][3] == b'm7,1,"u\n1\x00"'


@pytest.mark.parametrize("header", [b"message_id,time,time", b"message_id,,time"])
def test_an_ambiguous_header_is_refused(header: bytes) -> None:
    """A column that is there twice or has no name makes the file unreadable: that is an error."""
    with pytest.raises(InputError, match="header"):
        read(header + b"\nm1,1,2\n", encoding="csv")


# --------------------------------------------------------------------------------------- rejects


def test_rejects_are_written_as_ndjson(tmp_path: Path) -> None:
    """Each reject is a line with source, line, reason and raw text, or base64 of what is none."""
    path, source = tmp_path / "rejects.ndjson", tmp_path / "events.ndjson"
    source.write_bytes(ndjson(THREE[0], "é", b'{"a": "\xff"}', [{"b": 1}]))

    list(read_events(source, rejects=path))

    where = {"source": str(source)}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            **where,
            "line": 2,
            "reason": "the event is not an object",
            "raw": '"\\u00e9"',
        },
        {
            **where,
            "line": 3,
            "reason": "not UTF-8",
            "raw_base64": base64.b64encode(b'{"a": "\xff"}').decode(),
        },
        {**where, "line": 4, "index": 0, "reason": "no message id", "raw": '{"b": 1}'},
    ]


def test_the_rejects_file_is_made_when_there_is_something_to_write(tmp_path: Path) -> None:
    """Without a reject a file of an earlier run is left alone; at the first one it begins anew."""
    path = tmp_path / "rejects.ndjson"
    for _ in range(2):
        list(read_events(io.BytesIO(ndjson(b"{", b"}")), rejects=str(path)))
        assert len(path.read_bytes().splitlines()) == 2
    list(read_events(io.BytesIO(ndjson(*THREE)), rejects=str(path)))
    list(read_events(io.BytesIO(ndjson(*THREE)), rejects=tmp_path / "none"))

    assert len(path.read_bytes().splitlines()) == 2
    assert not (tmp_path / "none").exists()


def test_a_reject_is_on_disk_at_once(tmp_path: Path) -> None:
    """A crash after a reject does not lose it: it is flushed before reading goes on."""
    path = tmp_path / "rejects.ndjson"
    events = read_events(io.BytesIO(ndjson(b"{", THREE[0])), rejects=path)

    next(events)

    assert json.loads(path.read_bytes())["reason"] == "not JSON"


def test_one_rejects_file_serves_several_sources(tmp_path: Path) -> None:
    """One object handed to all reads of a run collects and counts all their rejects."""
    path = tmp_path / "rejects.ndjson"
    with RejectsFile(path) as rejects:
        for _ in range(3):
            list(read_events(io.BytesIO(ndjson(b"{")), rejects=rejects))

        assert rejects.count == 3
    rejects.close()
    assert len(path.read_bytes().splitlines()) == 3


def test_a_rejects_file_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    """Rejects are never lost quietly: without a place for them the run ends with an error."""
    with pytest.raises(ConfigurationError, match=r"rejects file .* cannot be written"):
        list(read_events(io.BytesIO(ndjson(b"{")), rejects=tmp_path / "no" / "such" / "folder"))


def test_rejects_that_nobody_takes_are_counted_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a receiver one warning says how many there were, and shows none of them."""
    with caplog.at_level(logging.WARNING, "recognition.events"):
        list(read_events(io.BytesIO(ndjson(b"secret", *THREE, b"secret"))))

    assert caplog.messages == ["2 lines or events of <stream> were rejected"]


@pytest.mark.parametrize("name", ["missing.ndjson", "."])
def test_a_source_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    """A missing file and a folder are refused when the events are asked for."""
    with pytest.raises(InputError, match="cannot be opened"):
        list(read_events(tmp_path / name))


def test_a_text_file_is_refused() -> None:
    """A file opened as text is a mistake that is named."""
    with pytest.raises(InputError, match="binary"):
        list(read_events(io.StringIO("{}")))


def test_a_disk_that_fails_is_an_error() -> None:
    """An error of the device in the middle is raised after the events before it."""

    class Failing(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            chunk = super().read1(size)
            if not chunk:
                raise OSError(5, "Input/output error")
            return chunk

    events = read_events(Failing(ndjson(*THREE)))

    assert ids([next(events), next(events), next(events)]) == ["m1", "m2", "m3"]
    with pytest.raises(InputError, match="cannot be read: Input/output error"):
        next(events)


def lines_of_anything() -> st.SearchStrategy[bytes]:
    bodies = st.dictionaries(KEYS, JSON) | JSON
    return st.lists(
        bodies.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=20), max_size=5
    ).map(b"\n".join)


@given(lines_of_anything(), st.sampled_from(["ndjson", "csv"]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_line_becomes_an_event_or_a_reject(
    content: bytes, encoding: str, zipped: bool
) -> None:
    """Whatever a file holds, reading ends, and raises nothing but an InputError of its header."""
    content = b"message_id,time\n" + content if encoding == "csv" else content
    assume(not content.startswith(b"\x1f\x8b"))  # that is no text, but the start of a gzip file

    events, rejects = read(gzip.compress(content) if zipped else content, encoding=encoding)

    filled = [line for line in content.split(b"\n") if line.strip() not in (b"", b"[]")]
    assert all(1 <= line <= content.count(b"\n") + 1 for line, *_ in rejects)
    assert encoding == "csv" or len(events) + len(rejects) >= len(filled)


# ------------------------------------------------------------------------------------------ bots

MACHINES = [
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "Mozilla/5.0 (Linux; Android 6.0.1; Nexus 5X Build/MMB29P) AppleWebKit/537.36 (KHTML, like "
    "Gecko) Chrome/120.0.0.0 Mobile Safari/537.36 (compatible; Googlebot/2.1; "
    "+http://www.google.com/bot.html)",
    "Googlebot-Image/1.0",
    "AdsBot-Google (+http://www.google.com/adsbot.html)",
    "Mediapartners-Google",
    "Mozilla/5.0 (compatible; bingbot/2.0; +http://www.bing.com/bingbot.htm)",
    "Mozilla/5.0 (compatible; YandexBot/3.0; +http://yandex.com/bots)",
    "Mozilla/5.0 (compatible; Baiduspider/2.0; +http://www.baidu.com/search/spider.html)",
    "Mozilla/5.0 (compatible; Yahoo! Slurp; http://help.yahoo.com/help/us/ysearch/slurp)",
    "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)",
    "Mozilla/5.0 (compatible; MJ12bot/v1.4.8; http://mj12bot.com/)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; "
    "+https://openai.com/gptbot)",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko); compatible; ChatGPT-User/1.0; "
    "+https://openai.com/bot",
    "CCBot/2.0 (https://commoncrawl.org/faq/)",
    "Mozilla/5.0 (Linux; Android 5.0) AppleWebKit/537.36 (KHTML, like Gecko) Mobile Safari/537.36 "
    "(compatible; Bytespider; spider-feedback@bytedance.com)",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "HeadlessChrome/91.0.4472.114 Safari/537.36 Prerender (+https://github.com/prerender/prerender)",
    "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "HeadlessChrome/100.0.4889.0 Safari/537.36",
    "Mozilla/5.0 (Unknown; Linux x86_64) AppleWebKit/538.1 (KHTML, like Gecko) PhantomJS/2.1.1 "
    "Safari/538.1",
    "Mozilla/5.0 (linux) AppleWebKit/537.36 (KHTML, like Gecko) jsdom/20.0.3",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/109.0.0.0 Safari/537.36 Chrome-Lighthouse",
    "Mozilla/5.0 (compatible; Pingdom.com_bot_version_1.4_(http://www.pingdom.com/))",
    "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 Chrome/61 Safari/537.36 PingdomTMS/2.2",
    "Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)",
    "jetmon/1.0 (Jetpack Site Uptime Monitor by WordPress.com)",
    "Mozilla/5.0 (compatible; monitis - premium monitoring service; http://www.monitis.com)",
    "Mozilla/5.0 (compatible; PRTG Network Monitor (www.paessler.com); Windows)",
    "facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)",
    "Twitterbot/1.0",
    "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)",
    "WhatsApp/2.21.12.21 A",
    "ia_archiver (+http://www.alexa.com/site/help/webmasters; crawler@alexa.com)",
]
PEOPLE = [
    "Mozilla/5.0 (Linux; Android 8.0.0; CUBOT_P20) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/70.0.3538.110 Mobile Safari/537.36",
    "Mozilla/5.0 (Linux; U; Android 8.0.0; CUBOT_X18_Plus Build/O00623; wv) AppleWebKit/537.36 "
    "(KHTML, like Gecko) Version/4.0 Chrome/71.0.3578.99 Mobile Safari/537.36 OPR/37.6.2254.134291",
    "Mozilla/5.0 (Linux; Android 9; Cubot X19) AppleWebKit/537.36 Chrome/90.0 Mobile Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:97.0) Gecko/20100101 Firefox/97.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/119.0.0.0 Safari/537.36 Edg/119.0.0.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like "
    "Gecko) Version/17.1 Mobile/15E148 Safari/604.1",
    "Mozilla/5.0 (Linux; Android 13; Pixel 6) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/104.0.0.0 Mobile Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 16_0 like Mac OS X) AppleWebKit/605.1.15 Phantom/ios/23.4",
    "Mozilla/5.0 (Linux; Android 12; SM-G991B; wv) AppleWebKit/537.36 Chrome/100 Mobile "
    "Safari/537.36 [FB_IAB/FB4A;FBAV/415.0.0.34.107;]",
    "Mozilla/5.0 (Linux; Android 11) AppleWebKit/537.36 Chrome/99 Mobile Safari/537.36 Botim/2.8",
    "GlucoseMonitor/3.1 CFNetwork/1335.0.3 Darwin/21.6.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_1 like Mac OS X) AppleWebKit/605.1.15 WhatsApp/23.20",
    "okhttp/4.9.3",
    "Go-http-client/1.1",
    "Dalvik/2.1.0 (Linux; U; Android 9; ROBOTTO Build/PPR1)",
    "",
]


@pytest.mark.parametrize("user_agent", MACHINES)
def test_bots_are_known_by_their_user_agent(user_agent: str) -> None:
    """Crawlers, headless browsers, monitors and link previews are bots, in any case."""
    assert is_bot(user_agent)
    assert is_bot(user_agent.upper())


@pytest.mark.parametrize("user_agent", [*PEOPLE, None])
def test_people_are_no_bots(user_agent: str | None) -> None:
    """Browsers, apps and HTTP clients are not bots, though their names may look like it."""
    assert not is_bot(user_agent)


def test_the_bot_pattern_is_configurable() -> None:
    """Another pattern stands in for the built-in one, in any case; only the beginning is read."""
    mine = re.compile("Acme-Probe")

    assert is_bot("acme-probe/1", mine)
    assert not is_bot("Googlebot/2.1", mine)
    assert not is_bot("x" * 1_024 + "Googlebot")
    assert BOTS.search("googlebot")


# --------------------------------------------------------------------------------------- streams


def test_events_are_read_one_by_one(tmp_path: Path) -> None:
    """Reading a file of 20,000 events holds a few hundred kilobytes, not the file."""
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson(*THREE) * 7_000)

    def consume() -> Iterator[int]:
        for event in read_events(path):
            yield event.time

    tracemalloc.start()
    count = sum(1 for _ in consume())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert count == 21_000
    assert path.stat().st_size > 1_500_000
    assert peak < path.stat().st_size
