"""
Where an event lives: the tables that hold its rows, and what the columns there are called.

A layout answers three questions and decides nothing: in which tables the rows of an event lie, how
their id, device, user, time and trait columns are named, and what a new row of it looks like. It
never reads a database.

The built-in ones are Jitsu's data layouts, as its Bulker destination writes them
(``libs/core-functions/src/functions/bulker-destination.ts``, see ``docs/layouts.md``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from recognition.errors import ConfigurationError
from recognition.events import Event
from recognition.messages import to_text

#: A row by column; times are microseconds since 1970-01-01 UTC.
Row: TypeAlias = dict[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """
    What the columns of an event's rows are called.

    Args:
        id: The message id.
        anonymous_id: The device.
        user_id: The user that the event itself named; empty while anonymous.
        time: The event's own time, the one that claims are compared with.
        trait: The column of a trait; ``{}`` stands for the trait's name in snake case.
            ``None``: the table has no columns for the user's traits.
        event_type: The event's type; ``None``: not stored.
        name: The name of a track, page or screen; ``None``: not stored.
    """

    id: str = "message_id"
    anonymous_id: str = "anonymous_id"
    user_id: str = "user_id"
    time: str = "timestamp"
    trait: str | None = "context_traits_{}"
    event_type: str | None = "type"
    name: str | None = "event"

    def trait_column(self, trait: str) -> str | None:
        """Where the trait is, or ``None`` where this table has no column for it."""
        return None if self.trait is None else self.trait.format(snake_case(trait))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """
    One way in which a pipeline spreads events over tables.

    Args:
        name: How it is called in the settings.
        table: The table of everything that no other rule names.
        by_type: The tables of an event type, where they differ.
        per_name: A track with a name also lands in a table of that name.
        columns: What the columns are called.
        table_columns: The same for tables where it differs.
        chosen_table_wins: A table that the event itself names is used instead of all others.
    """

    name: str
    table: str = "events"
    by_type: Mapping[str, str] = field(default_factory=dict)
    type_is_table: bool = False
    per_name: bool = False
    columns: Columns = Columns()
    table_columns: Mapping[str, Columns] = field(default_factory=dict)
    chosen_table_wins: bool = True

    def tables_of(self, event: Event) -> tuple[str, ...]:
        """The tables that hold a row of this event; an update must reach each of them."""
        if self.chosen_table_wins and event.table:
            return (table_name(event.table),)
        if event.type in self.by_type:
            table = self.by_type[event.type]
        else:
            table = table_name(event.type) if self.type_is_table else self.table
        if self.per_name and event.type == "track" and event.name:
            own = table_name(event.name)
            return (table,) if own == table else (table, own)
        return (table,)

    def columns_of(self, table: str) -> Columns:
        """What the columns of this table are called."""
        return self.table_columns.get(table, self.columns)

    def row_of(self, event: Event, table: str) -> Row:
        """
        A new row of the event: its ids as the event gave them, its traits, its time.

        The time is in microseconds since 1970-01-01 UTC, traits are text. A user id that never
        identifies anybody is passed through like any other.
        """
        columns = self.columns_of(table)
        row: Row = {
            columns.id: event.message_id,
            columns.anonymous_id: event.anonymous_id,
            columns.user_id: next((i.value for i in event.known if i.type == "user_id"), None),
            columns.time: event.time,
        }
        if columns.event_type is not None:
            row[columns.event_type] = event.type
        if columns.name is not None:
            row[columns.name] = event.name
        for trait, value in event.traits.items():
            column = columns.trait_column(trait)
            if column is not None and column not in row and _COLUMN.fullmatch(column):
                row[column] = to_text(value)
        return row


_SINGLE = Layout(name="segment-single-table")

_SEGMENT = Layout(
    name="segment",
    by_type={"identify": "identifies", "page": "pages", "track": "tracks", "group": "groups"},
    type_is_table=True,
    per_name=True,
    columns=Columns(event_type=None),
    table_columns={
        # identifies holds the user's traits at the top level; groups holds the account's there,
        # and nobody's elsewhere.
        "identifies": Columns(trait="{}", event_type=None),
        "groups": Columns(trait=None, event_type=None),
    },
)

_LEGACY = Layout(
    name="jitsu-legacy",
    columns=Columns(
        id="eventn_ctx_event_id",
        anonymous_id="user_anonymous_id",
        user_id="user_id",
        time="_timestamp",
        trait="user_{}",
        event_type="event_type",
        name=None,
    ),
)

_PASSTHROUGH = Layout(
    name="passthrough",
    columns=Columns(
        id="messageId",
        anonymous_id="anonymousId",
        user_id="userId",
        time="timestamp",
        trait="context_traits_{}",
    ),
)

LAYOUTS: Final[Mapping[str, Layout]] = {
    layout.name: layout for layout in (_SINGLE, _SEGMENT, _LEGACY, _PASSTHROUGH)
}


def layout_named(name: str) -> Layout:
    """
    A built-in layout.

    Raises:
        ConfigurationError: There is none of this name; the text lists those there are.
    """
    try:
        return LAYOUTS[name]
    except KeyError:
        known = ", ".join(LAYOUTS)
        raise ConfigurationError(f"layout {name!r} is unknown; there are: {known}") from None


def single_table(name: str, table: str, columns: Columns) -> Layout:
    """A configured layout: all events in one table, with columns of its own."""
    return replace(_SINGLE, name=name, table=table, columns=columns)


_COLUMN = re.compile(r"[^\W\d][\w$-]{0,62}")
_WORD_START = re.compile(r"(?<=[A-Za-z0-9])(?=[A-Z])")
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ ", "abcdefghijklmnopqrstuvwxyz_")


def snake_case(name: str) -> str:
    """As Jitsu does it: ``_`` between a letter or digit and a capital, A to Z in lower case."""
    return _WORD_START.sub("_", name).translate(_LOWER)


_NOT_IN_TABLE = re.compile(r"[^\w $-]+")


def table_name(name: str) -> str:
    """As Bulker does it: what is no letter, digit, ``_``, space, ``$`` or ``-`` becomes ``_``."""
    cleaned = _NOT_IN_TABLE.sub("_", name.strip())[:255]
    if not cleaned:
        return "_unnamed"
    return cleaned if cleaned[0] == "_" or cleaned[0].isalpha() else f"_{cleaned}"[:255]
