"""
What comes in: events, the identifiers they carry, and where both are found in JSON and CSV.

It never decides who somebody is: values are taken as seen, not normalised and not compared with
the blocked values. No error's text holds a value of an event; the raw line of a rejected event
goes to the receiver of rejects and nowhere else.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from time import time_ns
from typing import IO, Any, Literal, NamedTuple, NoReturn, Self, TypeAlias, cast

from recognition.errors import ConfigurationError, EventError, InputError

_log = logging.getLogger("recognition.events")

#: Longest identifier and message id, in characters.
MAX_ID_LENGTH = 1_024

#: Longest line of a file, in bytes, without its line end.
MAX_LINE_BYTES = 16 * 1024 * 1024

#: A time without a zone is taken as UTC, always: never as the zone of the machine.
ZONE_OF_TIMES_WITHOUT_ZONE = UTC

#: First time that is refused, in microseconds: 2262-04-11T00:00:00Z. A 64-bit count of
#: nanoseconds since 1970 ends at 23:47:16.854775807 of that day
#: (https://pandas.pydata.org/docs/reference/api/pandas.Timestamp.max.html), and with it the
#: timestamps of Parquet, Arrow and pandas; so this is the last whole day that every tool holds.
END_OF_TIME = 9_223_286_400_000_000


class Identifier(NamedTuple):
    """One typed value, as seen: not yet normalised, not yet checked against blocked values."""

    #: ``anonymous_id``, ``user_id``, ``email``, ``phone``, or any configured one.
    type: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """
    One analytics message, reduced to what recognition needs; never the whole of it.

    One that exists is valid: ids are bounded, storable text.
    """

    message_id: str
    #: Microseconds since 1970-01-01 UTC; 0 <= time < END_OF_TIME.
    time: int
    #: In lower case: ``track``, ``identify``, ``group``, ...; ``event`` where a format has none.
    type: str
    #: The device or browser; None in events of a server.
    anonymous_id: str | None
    #: Known identifiers in the order of the format's list, each type at most once. May be empty.
    known: tuple[Identifier, ...]
    #: The id that was used before; only in an ``alias``.
    previous_id: str | None
    #: A track's event name, a page's or screen's name.
    name: str | None
    #: The table that a user function chose.
    table: str | None
    #: Scalar traits of the user, as seen; never those of the account in a ``group`` call.
    traits: Mapping[str, str | int | float | bool]
    user_agent: str | None


# --------------------------------------------------------------------------------------- formats

#: Keys from the outside in: ``("context", "traits", "email")``.
Path: TypeAlias = tuple[str, ...]
#: Alternatives: the first one that exists (is present, not null, not blank) wins.
Paths: TypeAlias = tuple[Path, ...]

_TYPE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def parse_paths(text: str | Iterable[str]) -> Paths:
    """
    Read paths as people write them.

    Args:
        text: One text or several, in order. Each is dotted (``context.traits.email``) or, as in
            Jitsu, slashed (``/eventn_ctx/user/id``: a key may hold dots then). ``||`` separates
            alternatives inside of one text.

    Returns:
        The alternatives in order, without repeats.

    Raises:
        ConfigurationError: A path is empty or has an empty key.
    """
    texts = [text] if isinstance(text, str) else list(text)
    paths: dict[Path, None] = {}
    for alternative in (part.strip() for each in texts for part in each.split("||")):
        slashed = alternative.startswith("/")
        path = tuple(alternative[1:].split("/") if slashed else alternative.split("."))
        if not all(path):
            raise ConfigurationError(
                f"{alternative!r} is not a path: write context.traits.email or "
                "/context/traits/email, alternatives joined by ||"
            )
        paths[path] = None
    return tuple(paths)


# Where a value is found: (index of an object of the plan, key in it). Object 0 is the body.
_Places: TypeAlias = tuple[tuple[int, str], ...]
# Where traits are found: (index of an object, prefix of their keys, keys that are no traits).
_TraitPlaces: TypeAlias = tuple[tuple[int, str, frozenset[str]], ...]


class _Plan(NamedTuple):
    """A format made ready: each object on the way to a value is looked up once per event."""

    objects: _Places
    message_id: _Places
    time: _Places
    type: _Places
    default_type: str | None
    anonymous_id: _Places
    known: tuple[tuple[str, _Places], ...]
    traits: _TraitPlaces
    group_known: tuple[tuple[str, _Places], ...]
    group_traits: _TraitPlaces
    previous_id: _Places
    name: _Places
    table: _Places
    user_agent: _Places
    ahead: int | None
    behind: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """
    Where the parts of an event are found, as alternative paths (see `parse_paths`).

    Raises:
        ConfigurationError: There is no path for the message id or the time, or the name of an
            identifier type is not a plain word.
    """

    label: str
    message_id: Paths
    time: Paths
    type: Paths = ()
    #: The type of events that do not say one; None: such an event is refused.
    default_type: str | None = "event"
    anonymous_id: Paths = ()
    #: Known identifier types and their paths, the highest priority first.
    known: Mapping[str, Paths] = field(default_factory=dict)
    #: Objects whose scalar members are traits of the user; of two, the first one's member wins.
    traits: Paths = ()
    #: What describes the account in a ``group`` call: nothing at or below is read there.
    account: Paths = ()
    previous_id: Paths = ()
    name: Paths = ()
    table: Paths = ()
    user_agent: Paths = ()
    #: Where set, a path is also looked for flattened: ``user.id`` as ``user_id`` for "_".
    separator: str | None = None
    #: How far ahead of and behind the clock of this machine the time of an event may lie, in
    #: microseconds; an event beyond is refused. None: any time is taken.
    ahead: int | None = None
    behind: int | None = None
    _plan: _Plan = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.message_id or not self.time:
            raise ConfigurationError(
                f"format {self.label!r} needs a path for the message id and one for the time"
            )
        for kind, paths in self.known.items():
            if not _TYPE_NAME.fullmatch(kind) or kind == "anonymous_id":
                raise ConfigurationError(
                    f"{kind!r} is not a name for a known identifier type: a letter, then letters, "
                    "digits and _, 64 at most, and not anonymous_id"
                )
            if not paths:
                raise ConfigurationError(f"identifier type {kind!r} needs a path")
        object.__setattr__(self, "known", dict(self.known))
        object.__setattr__(self, "_plan", _make_plan(self))

    def with_known(
        self, known: Mapping[str, str | Iterable[str]], *, replacing: bool = False
    ) -> Self:
        """
        Return this format with more known identifiers.

        Args:
            known: Identifier type to paths, as for `parse_paths`. Paths of a type that the format
                has are tried after its own; new types come after its types in priority.
            replacing: The format's own types and paths are dropped instead.
        """
        merged = {} if replacing else dict(self.known)
        for kind, text in known.items():
            merged[kind] = tuple(dict.fromkeys((*merged.get(kind, ()), *parse_paths(text))))
        return replace(self, known=merged)

    def with_identifying_traits(self, names: Iterable[str]) -> Self:
        """
        Return this format with traits that identify a person, as `IDENTIFYING_TRAITS` of Jitsu.

        A trait is looked for in every object of traits that the format has; its name becomes an
        identifier type. A format without such objects is returned as it is.
        """
        if not self.traits:
            return self
        known = {name: ["/" + "/".join((*path, name)) for path in self.traits] for name in names}
        return self.with_known(known)


def _make_plan(form: Format) -> _Plan:
    objects: list[tuple[int, str]] = []
    separator = form.separator

    def find_object(path: Path) -> int:
        """Return the index of the object at a path; 0 is the body."""
        index = 0
        for key in path:
            if (index, key) not in objects:
                objects.append((index, key))
            index = objects.index((index, key)) + 1
        return index

    def find_places(paths: Paths) -> _Places:
        places: dict[tuple[int, str], None] = {}
        for path in paths:
            places[find_object(path[:-1]), path[-1]] = None
            if separator is not None and len(path) > 1:
                places[0, separator.join(path)] = None
        return tuple(places)

    # What stands among the traits but has a field of its own, or looks so flattened: user_agent.
    others = {*form.anonymous_id, *form.known.get("user_id", ()), *form.user_agent}

    def find_traits(paths: Paths) -> _TraitPlaces:
        places: list[tuple[int, str, frozenset[str]]] = []
        for path in paths:
            members = frozenset(other[-1] for other in others if other[:-1] == path)
            places.append((find_object(path), "", members))
            if separator is not None:
                joined = frozenset(separator.join(other) for other in others)
                places.append((0, separator.join(path) + separator, joined))
        return tuple(reversed(places))

    def of_user(paths: Paths) -> Paths:
        """Leave out what describes the account in a group call."""
        return tuple(
            path for path in paths if not any(path[: len(each)] == each for each in form.account)
        )

    return _Plan(
        message_id=find_places(form.message_id),
        time=find_places(form.time),
        type=find_places(form.type),
        default_type=form.default_type,
        anonymous_id=find_places(form.anonymous_id),
        known=tuple((kind, find_places(paths)) for kind, paths in form.known.items()),
        traits=find_traits(form.traits),
        group_known=tuple(
            (kind, find_places(of_user(paths))) for kind, paths in form.known.items()
        ),
        group_traits=find_traits(of_user(form.traits)),
        previous_id=find_places(form.previous_id),
        name=find_places(form.name),
        table=find_places(form.table),
        user_agent=find_places(form.user_agent),
        objects=tuple(objects),
        ahead=form.ahead,
        behind=form.behind,
    )


#: The Segment specification (https://www.twilio.com/docs/segment/connections/spec/common), which
#: Jitsu Next and RudderStack follow. ``timestamp`` is the one corrected for the device's clock.
SEGMENT = Format(
    label="segment",
    message_id=parse_paths("messageId"),
    time=parse_paths("timestamp||originalTimestamp||sentAt||receivedAt"),
    type=parse_paths("type"),
    default_type=None,
    anonymous_id=parse_paths("anonymousId"),
    known={
        "user_id": parse_paths("userId"),
        "email": parse_paths("traits.email||context.traits.email"),
        "phone": parse_paths("traits.phone||context.traits.phone"),
    },
    traits=parse_paths("traits||context.traits"),
    account=parse_paths("traits"),
    previous_id=parse_paths("previousId"),
    name=parse_paths("event||name"),
    # Set by a user function of Jitsu Next to choose the table.
    table=parse_paths("JITSU_TABLE_NAME"),
    user_agent=parse_paths("context.userAgent||userAgent"),
)

#: Jitsu classic, as sent (``eventn_ctx`` nested, or its members at the top) and as flattened into
#: the columns of a table. The ids are the defaults of its ``users_recognition`` section.
JITSU_CLASSIC = Format(
    label="jitsu-classic",
    message_id=parse_paths("/eventn_ctx/event_id||/event_id"),
    time=parse_paths("/eventn_ctx/utc_time||/_timestamp||/utc_time"),
    # Its track calls send the event's name as the type.
    type=parse_paths("/event_type"),
    default_type=None,
    anonymous_id=parse_paths(
        "/eventn_ctx/user/anonymous_id||/user/anonymous_id"
        "||/eventn_ctx/user/hashed_anonymous_id||/user/hashed_anonymous_id"
    ),
    known={
        "user_id": parse_paths("/eventn_ctx/user/id||/user/id"),
        "email": parse_paths("/eventn_ctx/user/email||/user/email"),
        "phone": parse_paths("/eventn_ctx/user/phone||/user/phone"),
        "internal_id": parse_paths("/eventn_ctx/user/internal_id||/user/internal_id"),
    },
    traits=parse_paths("/eventn_ctx/user||/user"),
    name=parse_paths("/event_type"),
    table=parse_paths("/__JITSU_TABLE_NAME||/JITSU_TABLE_NAME"),
    user_agent=parse_paths("/eventn_ctx/user_agent||/user_agent"),
    separator="_",
)

#: Rows of Snowplow's canonical event (https://docs.snowplow.io/docs/fundamentals/canonical-event).
#: ``network_userid`` is left out on purpose: a third-party cookie that spans sites. Its ``event``
#: is a kind of payload (page_view, struct, unstruct), not a call; so every row is an ``event``.
SNOWPLOW = Format(
    label="snowplow",
    message_id=parse_paths("event_id"),
    time=parse_paths("derived_tstamp||collector_tstamp"),
    anonymous_id=parse_paths("domain_userid"),
    known={"user_id": parse_paths("user_id")},
    name=parse_paths("event_name||event"),
    user_agent=parse_paths("useragent"),
)

#: Rows with the column names of this library and of Jitsu's single-table layout.
FLAT = Format(
    label="flat",
    message_id=parse_paths("message_id"),
    time=parse_paths("timestamp||time"),
    type=parse_paths("type"),
    anonymous_id=parse_paths("anonymous_id"),
    known={
        "user_id": parse_paths("user_id"),
        "email": parse_paths("email||context.traits.email"),
        "phone": parse_paths("phone||context.traits.phone"),
    },
    traits=parse_paths("context.traits"),
    # In the rows of a group call the columns at the top are the account's.
    account=parse_paths("email||phone"),
    previous_id=parse_paths("previous_id"),
    name=parse_paths("event||name"),
    table=parse_paths("JITSU_TABLE_NAME"),
    user_agent=parse_paths("user_agent||context.user_agent||context.userAgent"),
    separator="_",
)

#: The built-in formats by label.
FORMATS: Mapping[str, Format] = {
    each.label: each for each in (SEGMENT, JITSU_CLASSIC, SNOWPLOW, FLAT)
}


def detect_format(body: Mapping[str, object]) -> Format:
    """Return the built-in format of one event, by the names of its keys. Never fails."""
    if "messageId" in body:
        return SEGMENT
    if "eventn_ctx" in body or "eventn_ctx_event_id" in body:
        return JITSU_CLASSIC
    if "message_id" in body:
        return FLAT
    if "event_id" in body:
        if "collector_tstamp" in body or "derived_tstamp" in body:
            return SNOWPLOW
        return JITSU_CLASSIC
    # No message id under any name: the format only decides how the refusal comes about.
    return SEGMENT if "anonymousId" in body or "userId" in body else FLAT


# --------------------------------------------------------------------------------------- parsing

_NOTHING: dict[str, Any] = {}


def parse_event(body: object, format: Format | Mapping[str, Format] | None = None) -> Event:
    """
    Find the parts of one event.

    Ids may be text, whole or broken numbers, or booleans; they become text, and white space
    around them is cut off. Unknown keys are left alone. An event without any identifier is legal.

    Args:
        body: The event, as `json.loads` gives it. Nothing of it is kept but what `Event` names:
            whoever needs the whole event keeps it beside.
        format: For this event; None: detected. A mapping of label to format stands in for the
            built-in formats of those labels in the detection.

    Raises:
        EventError: The body is no object; it has no message id, time or type; the time cannot be
            read, is out of range, or lies further away than the format takes; an id is an object
            or a list, too long, or cannot be stored.
            The text is short, the same for the same fault, and holds no value.
    """
    if not isinstance(body, dict):
        if not isinstance(body, Mapping):
            raise EventError("the event is not an object")
        body = dict(body)
    if format is None:
        plan = detect_format(body)._plan
    elif isinstance(format, Format):
        plan = format._plan
    else:
        detected = detect_format(body)
        plan = format.get(detected.label, detected)._plan

    objects = [body]
    for parent, key in plan.objects:
        child = objects[parent].get(key)
        objects.append(child if isinstance(child, dict) else _NOTHING)

    message_id = _find_id(objects, plan.message_id, "message id")
    if message_id is None:
        raise EventError("no message id")
    time = _find(objects, plan.time)
    if time is None:
        raise EventError("no time")
    kind = _find(objects, plan.type)
    if kind is None:
        kind = plan.default_type
        if kind is None:
            raise EventError("no type")
    elif isinstance(kind, str):
        kind = _to_id(kind, "type").lower()
    else:
        raise EventError("the type is not text")

    if kind == "group":
        known_places, trait_places = plan.group_known, plan.group_traits
    else:
        known_places, trait_places = plan.known, plan.traits
    known = []
    for known_type, places in known_places:
        value = _find_id(objects, places, known_type)
        if value is not None:
            known.append(Identifier(known_type, value))
    traits: dict[str, str | int | float | bool] = {}
    for index, prefix, others in trait_places:
        if objects[index]:
            _take_traits(objects[index], prefix, others, traits)

    time = parse_time(time)
    if plan.ahead is not None or plan.behind is not None:
        now = time_ns() // 1_000
        if plan.ahead is not None and time > now + plan.ahead:
            raise EventError("the time lies too far ahead")
        if plan.behind is not None and time < now - plan.behind:
            raise EventError("the time lies too far back")
    return Event(
        message_id=message_id,
        time=time,
        type=kind,
        anonymous_id=_find_id(objects, plan.anonymous_id, "anonymous_id"),
        known=tuple(known),
        previous_id=_find_id(objects, plan.previous_id, "previous id") if kind == "alias" else None,
        name=_find_text(objects, plan.name),
        table=_find_text(objects, plan.table),
        traits=traits,
        user_agent=_find_text(objects, plan.user_agent),
    )


def _find(objects: list[dict[str, Any]], places: _Places) -> Any:
    """Return the first value that exists: present, not null, not blank."""
    for index, key in places:
        value = objects[index].get(key)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return value
    return None


def _find_id(objects: list[dict[str, Any]], places: _Places, what: str) -> str | None:
    for index, key in places:
        value = objects[index].get(key)
        if value is not None:
            text = _to_id(value, what)
            if text:
                return text
    return None


def _find_text(objects: list[dict[str, Any]], places: _Places) -> str | None:
    """Return the first text that exists and can be stored; anything else counts as absent."""
    for index, key in places:
        value = objects[index].get(key)
        if isinstance(value, str):
            value = value.strip()
            if value and _is_storable(value):
                return value
    return None


def _to_id(value: object, what: str) -> str:
    """Return an id as text without white space around it; empty: there is none."""
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isprintable() and len(text) <= MAX_ID_LENGTH:
            return text
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int):
        # Before it becomes text: Python refuses to write a number of more than 4,300 digits.
        if value.bit_length() > 4 * MAX_ID_LENGTH:
            raise EventError(f"{what} is longer than {MAX_ID_LENGTH} characters")
        text = str(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise EventError(f"{what} is not a finite number")
        text = str(int(value)) if value.is_integer() else repr(value)
    elif isinstance(value, (dict, list)):
        raise EventError(f"{what} is an object or a list")
    else:
        raise EventError(f"{what} is neither text nor a number")
    if len(text) > MAX_ID_LENGTH:
        raise EventError(f"{what} is longer than {MAX_ID_LENGTH} characters")
    if "\x00" in text:
        raise EventError(f"{what} holds a NUL character")
    if not _is_storable(text):
        raise EventError(f"{what} holds half of a surrogate pair")
    return text


def _is_storable(text: str) -> bool:
    """Can every database take this text? Not with a NUL character, nor with a lone surrogate."""
    if "\x00" in text:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _take_traits(
    members: dict[str, Any],
    prefix: str,
    others: frozenset[str],
    traits: dict[str, str | int | float | bool],
) -> None:
    """Add the scalar members whose key has the prefix; what cannot be stored is left alone."""
    for key, value in members.items():
        name = key[len(prefix) :]
        if not name or key in others or not key.startswith(prefix):
            continue
        if isinstance(value, str):
            if not value.strip() or not _is_storable(value):
                continue
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                continue
        elif not isinstance(value, float) or not math.isfinite(value):
            continue
        traits[name] = value


# ----------------------------------------------------------------------------------------- times

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_WITHOUT_ZONE = _EPOCH.astimezone(ZONE_OF_TIMES_WITHOUT_ZONE).replace(tzinfo=None)

_NUMBER = re.compile(r"([+-]?[0-9]{1,20})(\.[0-9]{1,20})?")
# What `datetime.fromisoformat` refuses although it is about: a zone in lower case or as a word, a
# space before the offset (Snowflake), a leap second.
_LOOSE_ISO = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}):([0-9]{2})([.,][0-9]+)?"
    r" ?(Z|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2})?)?",
    re.IGNORECASE,
)


def parse_time(value: object) -> int:
    """
    Return microseconds since 1970-01-01 UTC.

    Args:
        value: ISO 8601 text (``T`` or space, any fraction, ``Z``, ``UTC`` or an offset, or a date
            alone), a number or a text of digits since 1970, or a `datetime`. A time without a
            zone is UTC. A finer fraction is cut off at the microsecond. A leap second (``:60``)
            is the second that follows it, as in POSIX. The unit of a number follows from its
            size: below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, else
            nanoseconds.

    Raises:
        EventError: It is none of these, or not in ``0 <= time < END_OF_TIME``.
    """
    time: int | None
    if isinstance(value, str):
        # fromisoformat alone would take "1612121012345" for the year 1612, and a NUL at the end.
        if value[4:5] == "-" and value.isascii() and value.isprintable():
            try:
                moment = datetime.fromisoformat(value)
            except ValueError:
                time = _parse_loose_time(value)
            else:
                time = _count_microseconds(moment)
        else:
            time = _parse_loose_time(value)
    elif isinstance(value, bool):
        time = None
    elif isinstance(value, int):
        time = _scale(value)
    elif isinstance(value, float):
        time = _scale(value) if math.isfinite(value) else None
    elif isinstance(value, datetime):
        time = _count_microseconds(value)
    else:
        time = None
    if time is None:
        raise EventError("the time cannot be read")
    if not 0 <= time < END_OF_TIME:
        raise EventError("the time is out of range")
    return time


def render_time(time: int) -> str:
    """Return microseconds since 1970-01-01 UTC as ISO 8601, six digits of fraction and a Z."""
    moment = _EPOCH + timedelta(microseconds=time)
    return moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def _count_microseconds(moment: datetime) -> int:
    if moment.tzinfo is None:
        since = moment - _EPOCH_WITHOUT_ZONE
    elif moment.utcoffset() is None:
        since = moment.replace(tzinfo=None) - _EPOCH_WITHOUT_ZONE
    else:
        since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _scale(number: int | float) -> int:
    """Turn a number since 1970, of the unit that its size says, into microseconds."""
    size = abs(number)
    if size < 1e11:
        return round(number * 1_000_000)
    if size < 1e14:
        return round(number * 1_000)
    if size < 1e17:
        return round(number)
    return int(number // 1_000)


def _parse_loose_time(text: str) -> int | None:
    text = text.strip()
    number = _NUMBER.fullmatch(text)
    if number is not None:
        return _scale(int(text) if number[2] is None else float(text))
    loose = _LOOSE_ISO.fullmatch(text)
    after = 0
    if loose is not None:
        day, minute, second, fraction, zone = loose.groups(default="")
        if second == "60":
            second, after = "59", 1_000_000
        if zone and zone[0] not in "+-":
            zone = "Z"
        text = f"{day}T{minute}:{second}{fraction}{zone}"
    elif text[8:9] != "T":  # 20260102T120000Z
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return _count_microseconds(moment) + after


# ------------------------------------------------------------------------------------------ bots

#: User agents, in lower case, of programs that visit pages by themselves. Jitsu classic knew
#: ``bot`` and ``crawl`` only, and headless browsers polluted its recognition
#: (https://github.com/jitsucom/jitsu/issues/971). Word-safe on purpose: Cubot phones
#: (https://github.com/omrilotan/isbot/issues/29) and the in-app browser of the Phantom wallet are
#: people. HTTP clients (curl, okhttp, Go-http-client) are not in it: apps and servers send the
#: events of people with them. Each branch begins with a letter, and no case is ignored: so `re`
#: can skip ahead, and a search takes 3 microseconds instead of 40.
BOTS = re.compile(
    r"bots?(?<!\bcubot)(?![a-z])|crawl|slurp|spider(?![a-z])"
    r"|headless|phantomjs|slimerjs|puppeteer|playwright|selenium|webdriver|cypress/|jsdom/"
    r"|chrome-lighthouse|page ?speed|gtmetrix|webpagetest|ptst/|prerender"
    r"|pingdom|uptime|statuscake|site24x7|newrelicpinger|datadogsynthetics|nodeping|hetrixtools"
    r"|monitoring(?![a-z])|site[ _-]?monitor|web[ _-]?monitor|network[ _-]?monitor"
    r"|bing[ _-]?preview|link[ _-]?preview|ur[il][ _-]?preview|embedly|whatsapp/(?<=^whatsapp/)"
    r"|facebookexternalhit|facebookcatalog|ia_archiver|feedfetcher"
    r"|mediapartners-google|apis-google|google-inspectiontool|google-read-aloud"
    r"|chatgpt-user|claude-user|perplexity-user|mistralai-user"
)


# User agents repeat. Keyed by text: hashing a compiled pattern takes a microsecond.
@lru_cache(maxsize=4_096)
def _matches(user_agent: str, pattern: str, flags: int) -> bool:
    return re.search(pattern, user_agent.lower(), flags) is not None


def is_bot(user_agent: str | None, pattern: re.Pattern[str] = BOTS) -> bool:
    """
    Say whether a user agent is a bot's; None is nobody's.

    Args:
        user_agent: Only its first 1,024 characters are read.
        pattern: Searched for; case is ignored, whatever its flags say.
    """
    if user_agent is None:
        return False
    flags = pattern.flags if pattern is BOTS else pattern.flags | re.IGNORECASE
    return _matches(user_agent[:1_024], pattern.pattern, flags)


# --------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """Input that became no event, and why."""

    #: The name of the file, ``-`` for standard input.
    source: str
    #: The line it begins in, from 1; in gzip of the text inside.
    line: int
    #: A short text, the same for the same fault; holds no value of the event.
    reason: str
    #: As received, but only its beginning where it is longer than MAX_LINE_BYTES.
    raw: bytes
    #: The position in an array or a batch envelope, from 0; None: the line is one event.
    index: int | None = None


class RejectsFile:
    """
    A file of rejects, an NDJSON line each: ``source``, ``line``, ``reason``, ``raw``.

    ``index`` is there for a member of an array or a batch; ``raw_base64`` instead of ``raw`` for
    what is not UTF-8. The file is made at the first reject, in place of one that is there, and
    flushed after each; without a reject nothing is touched. It holds events as received, so it
    holds personal data.

    Hand one object to all `read_events` of a run: each object begins the file anew.

    Args:
        path: The file.
        append: Add to the file that is there; for a process that is started again and again.

    Raises:
        ConfigurationError: The file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = path
        self._mode = "ab" if append else "wb"
        #: How many rejects were written.
        self.count = 0
        self._file: IO[bytes] | None = None

    def __call__(self, reject: Reject) -> None:
        row: dict[str, object] = {
            "source": reject.source,
            "line": reject.line,
            "reason": reject.reason,
        }
        if reject.index is not None:
            row["index"] = reject.index
        try:
            row["raw"] = reject.raw.decode()
        except UnicodeDecodeError:
            row["raw_base64"] = base64.b64encode(reject.raw).decode("ascii")
        try:
            if self._file is None:
                self._file = open(self.path, self._mode)  # noqa: SIM115 - closed by close()
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise ConfigurationError(
                f"the rejects file {os.fspath(self.path)} cannot be written: {exc.strerror}"
            ) from exc
        self.count += 1

    def close(self) -> None:
        """Close the file. Called twice it does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_events(
    source: str | os.PathLike[str] | IO[bytes],
    *,
    format: Format | Mapping[str, Format] | None = None,
    rejects: Callable[[Reject], object] | str | os.PathLike[str] | None = None,
    encoding: Literal["ndjson", "csv"] | None = None,
) -> Iterator[Event]:
    """
    Yield the events of a file, in its order.

    NDJSON: one event a line; an array of events, or a batch envelope of Segment
    (``{"batch": [...]}``), may stand for one. CSV: the first row names the columns, an empty cell
    is absent, a dotted column (``context.traits.email``) is the member of an object. Either may be
    gzip, known by its first bytes. UTF-8, with or without a byte order mark; blank lines pass.

    What cannot be read becomes a `Reject`, and the rest goes on. Memory is bounded by
    MAX_LINE_BYTES, not by the file.

    Args:
        source: A path, ``-`` for standard input, or a binary file. A file handed in stays open.
        format: As for `parse_event`.
        rejects: Called with each reject, before the event that follows it is yielded; or a path
            as for `RejectsFile`. None: their number is logged as a warning.
        encoding: None: CSV if the name ends in ``.csv`` or ``.csv.gz``, else NDJSON.

    Raises:
        InputError: The source cannot be opened or read, or is a text file. Raised when it is
            iterated; the events before it stand.
    """
    with ExitStack() as stack:
        name, read = _open_source(source, stack)
        if rejects is None:
            receive: Callable[[Reject], object] = stack.enter_context(_RejectsCount(name))
        elif isinstance(rejects, (str, os.PathLike)):
            receive = stack.enter_context(RejectsFile(rejects))
        else:
            receive = rejects

        def reject(line: int, reason: str, raw: bytes, index: int | None = None) -> None:
            receive(Reject(source=name, line=line, reason=reason, raw=raw, index=index))

        lines = _split_lines(read, reject)
        if encoding is None:
            encoding = "csv" if name.lower().endswith((".csv", ".csv.gz")) else "ndjson"
        if encoding == "csv":
            yield from _read_csv(lines, format, reject)
        else:
            yield from _read_ndjson(lines, format, reject)


class _RejectsCount:
    """Counts rejects that nobody asked for, and says at the end how many there were."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def __call__(self, reject: Reject) -> None:
        self._count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._count:
            _log.warning("%d lines or events of %s were rejected", self._count, self._source)


_RejectLine: TypeAlias = Callable[..., None]
_Lines: TypeAlias = Iterator[tuple[int, bytes]]

_CHUNK_BYTES = 256 * 1024
# As much of a line that is too long as its reject keeps.
_KEPT_BYTES = 4 * 1024
_BYTE_ORDER_MARK = "\ufeff"


def _open_source(
    source: str | os.PathLike[str] | IO[bytes], stack: ExitStack
) -> tuple[str, Callable[[int], bytes]]:
    """Return the name of a source and what reads at most so many bytes of its content."""
    if source == "-":
        name, stream = "-", sys.stdin.buffer
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        try:
            stream = stack.enter_context(open(source, "rb"))  # noqa: SIM115 - the stack closes it
        except OSError as exc:
            raise InputError(f"{name} cannot be opened: {exc.strerror}") from exc
    else:
        stream = source
        given = getattr(source, "name", None)
        name = given if isinstance(given, str) else "<stream>"
    # read1 hands over what a pipe holds; read would wait until the chunk is full.
    read: Callable[[int], object] = getattr(stream, "read1", stream.read)

    def read_checked(size: int) -> bytes:
        try:
            chunk = read(size)
        except OSError as exc:
            raise InputError(f"{name} cannot be read: {exc.strerror}") from exc
        if not isinstance(chunk, bytes):
            raise InputError(f"{name} gives no bytes: open it in binary, blocking mode")
        return chunk

    start = read_checked(_CHUNK_BYTES)
    while len(start) == 1 and (more := read_checked(1)):
        start += more
    rejoined = _Rejoined(start, read_checked)
    if not start.startswith(b"\x1f\x8b"):
        return name, rejoined.read
    # GzipFile asks its file for nothing but read.
    unzipped = gzip.GzipFile(fileobj=cast("IO[bytes]", rejoined), mode="rb")
    return name, stack.enter_context(unzipped).read1


class _Rejoined:
    """A stream whose beginning was read already, to see what it is."""

    def __init__(self, start: bytes, read: Callable[[int], bytes]) -> None:
        self._start = start
        self._read = read

    def read(self, size: int) -> bytes:
        if self._start:
            start, self._start = self._start[:size], self._start[size:]
            return start
        return self._read(size)


def _split_lines(read: Callable[[int], bytes], reject: _RejectLine) -> _Lines:
    """Yield each line with its number, from 1, without its ``\\n``; blank ones too."""
    number = 0
    parts: list[bytes] = []  # of the line that is not at its end yet
    size = 0
    while True:
        try:
            chunk = read(_CHUNK_BYTES)
        except EOFError:
            reject(number + 1, "the gzip stream ends too early", b"".join(parts))
            return
        except (gzip.BadGzipFile, zlib.error):
            reject(number + 1, "the gzip stream is damaged", b"".join(parts))
            return
        lines = chunk.split(b"\n")
        if chunk and len(lines) == 1:
            size += len(chunk)
            if size <= MAX_LINE_BYTES:
                parts.append(chunk)
            else:
                parts = [b"".join(parts)[:_KEPT_BYTES] or chunk[:_KEPT_BYTES]]
            continue
        size += len(lines[0])
        first = b"".join(parts) + lines[0]
        number += 1
        if size > MAX_LINE_BYTES:
            reject(number, "the line is longer than 16 MiB", first[:_KEPT_BYTES])
        elif chunk or first:
            yield number, first
        if not chunk:
            return
        rest = lines.pop()
        parts, size = [rest], len(rest)
        for line in lines[1:]:
            number += 1
            yield number, line


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


_decode_json = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode


def _read_ndjson(
    lines: _Lines, format: Format | Mapping[str, Format] | None, reject: _RejectLine
) -> Iterator[Event]:
    for number, line in lines:
        line = line.strip()
        if not line:
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError:
            reject(number, "not UTF-8", line)
            continue
        if text[0] == _BYTE_ORDER_MARK:
            text = text[1:].lstrip()
            if not text:
                continue
        try:
            body, end = _decode_json(text)
        except ValueError:
            reject(number, "not JSON", line)
            continue
        except RecursionError:
            reject(number, "nested too deeply", line)
            continue
        if end != len(text):
            reject(number, "not JSON", line)
            continue
        members = None if isinstance(body, dict) and "batch" not in body else expand_batch(body)
        if members is None:
            try:
                event = parse_event(body, format)
            except EventError as exc:
                reject(number, str(exc), line)
            else:
                yield event
            continue
        for index, member in enumerate(members):
            try:
                event = parse_event(member, format)
            except EventError as exc:
                reject(number, str(exc), _render(member), index)
            else:
                yield event


def _render(member: object) -> bytes:
    try:
        return json.dumps(member).encode()
    except RecursionError:
        return b"(nested too deeply)"


# Members of the context of an envelope, over all of its events: a hundred megabytes.
_MOST_COPIED = 1_000_000


def expand_batch(body: object) -> list[object] | None:
    """
    Return the events of an array or of a batch envelope; None: the body is one event itself.

    The envelope's ``context`` is merged into that of its events, whose own members win
    (https://www.twilio.com/docs/segment/connections/sources/catalog/libraries/server/http-api).
    Its ``sentAt`` is when they were sent. An envelope whose context has so many members, for so
    many events, that it would fill the memory, is no batch.
    """
    if isinstance(body, list):
        return body
    if not isinstance(body, dict) or "messageId" in body or not isinstance(body["batch"], list):
        return None
    sent_at, outer = body.get("sentAt"), body.get("context")
    copied = 0
    for member in body["batch"]:
        if isinstance(member, dict):
            if sent_at is not None and member.get("sentAt") is None:
                member["sentAt"] = sent_at
            inner = member.get("context")
            if isinstance(outer, dict) and (inner is None or isinstance(inner, dict)):
                if inner:
                    copied += len(outer)
                    if copied > _MOST_COPIED:
                        return None
                member["context"] = {**outer, **inner} if inner else outer
    return list(body["batch"])


def _read_csv(
    lines: _Lines, format: Format | Mapping[str, Format] | None, reject: _RejectLine
) -> Iterator[Event]:
    taken: list[tuple[int, bytes]] = []  # the lines of the row that is being read

    def feed() -> Iterator[str]:
        for number, line in lines:
            taken.append((number, line))
            text = line.decode(errors="surrogateescape") + "\n"
            yield text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text

    rows = csv.reader(feed())
    header: list[Path] | None = None
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            reject(taken[0][0], "not CSV", b"\n".join(line for _, line in taken))
            continue
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = _parse_header(row)
            continue
        if len(row) != len(header):
            reason = "the row has another number of cells than the header"
        elif not all(line.isascii() or _is_utf8(line) for _, line in taken):
            reason = "not UTF-8"
        else:
            try:
                event = parse_event(_nest(header, row), format)
            except EventError as exc:
                reason = str(exc)
            else:
                yield event
                continue
        reject(taken[0][0], reason, b"\n".join(line for _, line in taken))


def _parse_header(row: list[str]) -> list[Path]:
    names = [name.strip() for name in row]
    if len(set(names)) != len(names) or not all(names):
        raise InputError("the header of the CSV file has a column twice or one without a name")
    return [tuple(name.split(".")) if all(name.split(".")) else (name,) for name in names]


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _nest(header: list[Path], row: list[str]) -> dict[str, object]:
    """Make one object of a row; empty cells are left out."""
    body: dict[str, object] = {}
    for path, cell in zip(header, row, strict=True):
        if not cell:
            continue
        inner: Any = body
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                break
        if isinstance(inner, dict):
            inner[path[-1]] = cell
        else:
            body[".".join(path)] = cell
    return body
