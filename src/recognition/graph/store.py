"""
What a graph must be able to keep: the operations that a decision needs, one batch at a time.

A `Store` is one transaction of one workspace. `recognition.graph.decisions` reads and writes
through it and decides; a store decides nothing. Whoever keeps a graph somewhere else writes these
operations, and every rule comes along. All of them take a batch; none is called once per event.

A *handle* is the store's own short name of a timeline or of a known identifier: a positive
integer, never reused. A *subject* is whom message references belong to: ``handle`` of a timeline,
``-handle`` of a known identifier.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

from recognition.attribution import Claim
from recognition.events import Identifier
from recognition.identity import Seen
from recognition.messages import UpdateByCriteria


class Timeline(NamedTuple):
    """
    An anonymous id that is known to the graph.

    ``released_until``: claims until then are nobody's (-1: it was never released).
    """

    handle: int
    claimed: bool
    released_until: int = -1


class Known(NamedTuple):
    """
    A known identifier, as the graph holds it.

    ``component`` names the set of links that it is part of (0: no link), ``canonical`` the handle
    of the canonical identifier of its person (its own, where it stands alone).
    """

    handle: int
    seen: Seen
    component: int
    canonical: int


class StoredLink(NamedTuple):
    """A link by handles; ``refused`` is empty where it holds."""

    a: int
    b: int
    alias: bool
    time: int
    message_id: str
    unlinked: bool
    refused: str


class Trait(NamedTuple):
    """The latest value of a trait; of two the one of the greater rank is the truth."""

    time: int
    message_id: str
    value: str | int | float | bool

    @property
    def rank(self) -> tuple[int, str, str, str]:
        """Later first; of one message that came twice with two values, always the same one."""
        return self.time, self.message_id, type(self.value).__name__, repr(self.value)


class Reference(NamedTuple):
    """Where a row is: its message id and time, in these tables."""

    subject: int
    tables: tuple[str, ...]
    message_id: str
    time: int


class Day(NamedTuple):
    """That there are rows of that day (days since 1970-01-01 UTC), in these tables."""

    subject: int
    tables: tuple[str, ...]
    day: int


class Rows(NamedTuple):
    """
    What is known of the rows of a subject, by the tables that hold them.

    ``references``: message ids with their times. ``days``: the days that have rows.
    """

    references: Mapping[tuple[str, ...], Mapping[str, int]]
    days: Mapping[tuple[str, ...], Collection[int]]


class Sighting(NamedTuple):
    """Where a message was met: as a reference of a subject, or as a claim of a timeline."""

    subject: int
    time: int
    tables: tuple[str, ...]


class Store(Protocol):
    """One transaction of one workspace; what is read sees what was written in it."""

    def decided_with(self, rules: str) -> str:
        """The rules of the first decision of this workspace; these, where this is the first."""

    def timelines(self, anonymous_ids: Collection[str]) -> dict[str, Timeline]:
        """Those of the anonymous ids that are known."""

    def add_timelines(self, anonymous_ids: Collection[str]) -> dict[str, int]:
        """Make new ones; none of them may be known yet."""

    def anonymous_ids(self, timelines: Collection[int]) -> dict[int, str]:
        """The anonymous ids of claimed timelines."""

    def claims(
        self, windows: Mapping[int, tuple[int, int]], *, first: bool = False
    ) -> dict[int, list[Claim]]:
        """
        Claims by timeline, sorted: for a window ``(low, high)`` those from the last one before
        ``low`` to the first one after ``high``; ``first``: the timeline's first too. Of equal
        times all come. All claims, where one of them was forgotten. The owner of a claim
        is a handle.
        """

    def add_claims(self, claims: Mapping[str, tuple[int, Collection[Claim]]]) -> None:
        """By anonymous id, with its timeline's handle. One that is there is left as it is."""

    def replace_claims(
        self, timeline: int, gone: Collection[Claim], new: Collection[Claim]
    ) -> None:
        """Take claims away and put others there."""

    def soft_claims(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, list[Claim]]:
        """By timeline, the soft claims with ``low <= time <= high``, sorted."""

    def claimed_by(self, identifiers: Collection[int]) -> set[int]:
        """The timelines that these known identifiers ever claimed."""

    def barred(self, pairs: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those pairs of (timeline, identifier) that were unlinked and never claim again."""

    def bar(self, timeline: int, identifier: int) -> None:
        """Remember that the identifier never claims this timeline again."""

    def release(self, anonymous_id: str, until: int) -> None:
        """Remember that the timeline was released; the later of two moments holds."""

    def identifiers(self, identifiers: Collection[Identifier]) -> dict[Identifier, Known]:
        """Those of the known identifiers (normalised) that the graph holds."""

    def held(self, handles: Collection[int]) -> dict[int, tuple[Identifier, Known]]:
        """Known identifiers by handle."""

    def add_identifiers(self, seen: Mapping[Identifier, tuple[Seen, str]]) -> dict[Identifier, int]:
        """Make new ones, each with its first sighting and the value as it was seen."""

    def see(self, seen: Mapping[int, tuple[Seen, str]]) -> None:
        """Lower the first sighting of known identifiers."""

    def set_persons(self, persons: Mapping[int, tuple[int, int]]) -> None:
        """By handle: component and canonical handle."""

    def links(self, components: Collection[int]) -> dict[int, list[StoredLink]]:
        """All links of the components, refused and unlinked ones included."""

    def put_links(
        self, component: int, absorbed: Collection[int], links: Iterable[StoredLink]
    ) -> None:
        """Move the links of absorbed components here, then insert or replace these."""

    def traits(self, identifiers: Collection[int]) -> dict[int, dict[str, Trait]]:
        """The latest traits that events of these identifiers carried."""

    def put_traits(self, traits: Mapping[int, Mapping[str, Trait]]) -> None:
        """Replace them."""

    def forgotten(self, identifiers: Collection[Identifier]) -> dict[Identifier, int]:
        """Those that were forgotten, with the last moment that this is about."""

    def forget(self, identifiers: Mapping[Identifier, int], until: int) -> None:
        """Erase known identifiers (with their handles) and all that hangs on them but claims."""

    def rows(self, windows: Mapping[int, tuple[int, int]]) -> dict[int, Rows]:
        """
        What is known of the rows of subjects, ``start <= time < end``; days that touch it.

        Subjects of which nothing is known are left out. What `add_references` and `add_days` were
        given in this transaction need not be there.
        """

    def add_references(self, references: Iterable[Reference]) -> None:
        """Remember rows by message id. The second time nothing changes."""

    def add_days(self, days: Iterable[Day]) -> None:
        """Remember days that have rows. The second time nothing changes."""

    def find(self, message_id: str) -> list[Sighting]:
        """Everything that is remembered of a message. Reads all of it: not for the hot path."""

    def seen_as(self, identifiers: Collection[int]) -> dict[int, str]:
        """Known identifiers as they were first seen, before they were normalised."""

    def tables(self) -> set[str]:
        """Every table that rows of this workspace were ever seen for."""

    def note_tables(self, tables: Iterable[str]) -> None:
        """Remember tables whose rows are not referenced."""

    def page(self, after: int, limit: int, *, known: bool) -> list[int]:
        """
        The next handles of claimed timelines, or of known identifiers, that are greater than
        ``after``, in their order.
        """

    def lock(self, timelines: Collection[int], identifiers: Collection[int]) -> None:
        """
        No other transaction may decide about these between what this one read and its end.

        A store whose writers take turns has nothing to do. Claims that are added, and persons that
        are set, are locked without being named.
        """

    def last_sequence(self) -> int:
        """The number of the last update; 0 before the first."""

    def next_sequence(self) -> int:
        """The next number of an update: greater than all before, in the order of decisions."""

    def versions(self, subjects: Collection[int]) -> dict[int, int]:
        """
        What a row of each subject holds as its version when it is stamped now.

        Not less than the number of any update that was decided about it before, and less than
        those of all later ones. Asked after all else.
        """

    def emit(self, updates: Iterable[UpdateByCriteria]) -> None:
        """Put updates into the outbox."""

    def decision(self) -> int:
        """
        How many decisions have changed an owner; equal numbers mean equal owners.

        A store that cannot count them cheaply gives another number every time.
        """

    def decided(self) -> None:
        """Count one."""
