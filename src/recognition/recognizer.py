"""
The way in, in one place: a batch of events goes through the graph and comes back with its owners.

`Recognizer` reduces events to what the graph needs (blocked values, bots, tables), hands them
over in one call, and turns the answer into columns to be written. It holds nothing between two
calls and writes to no warehouse.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from recognition.errors import InputError
from recognition.events import BOTS, Event, Identifier, is_bot
from recognition.graph import Explanation, Graph, Observation, Owner, Receipt
from recognition.identity import is_blocked, normalise
from recognition.layouts import Row
from recognition.messages import VERSION_COLUMN
from recognition.rules import Rules, Supersede

if TYPE_CHECKING:
    from recognition.graph.showing import Picture

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognition:
    """
    A batch after `Recognizer.process`: its events in their order, and what happened.

    Whoever writes the rows gives ``receipt`` to `Recognizer.flushed` once they are visible.
    """

    events: tuple[Event, ...]
    owners: tuple[Owner | None, ...]
    """The owner of each event, as known now; ``None``: nobody yet, or a bot."""
    names_user: tuple[bool, ...]
    """Whether the event's own row holds a user id; it is stamped in a column of its own only."""
    receipt: Receipt
    versions: tuple[int, ...]
    """The version of each event's row, for tables that have ``recognition_version``; 0 where
    nobody is stamped."""
    anonymous: int
    """Events without a known identifier, bots not counted."""
    identified: int
    """Events with a known identifier that identifies somebody."""
    stamped: int
    """Anonymous events whose owner is known already."""
    bots: int
    ignored: int = 0
    """Events that ``remembers`` of the recognizer left out."""
    blocked: int
    """Identifiers that never identify anybody."""
    claims: int
    links: int
    conflicts: int
    updates: int


class Recognizer:
    """
    Takes batches of events of one workspace.

    Any number of recognizers, in any number of processes, may share a graph. Threads may share a
    recognizer as far as its graph allows.

    Args:
        graph: What is remembered.
        rules: How the workspace is decided.
        bots: Which user agents are skipped: their events are passed through and not remembered.
            ``None`` skips nobody.
        remembers: Which events are remembered, for example `recognition.bulker.Stream.remembers`;
            the others are passed through as those of bots are. ``None`` remembers all.
    """

    def __init__(
        self,
        graph: Graph,
        rules: Rules | None = None,
        *,
        bots: re.Pattern[str] | None = BOTS,
        remembers: Callable[[Event], bool] | None = None,
    ) -> None:
        self._graph = graph
        self._rules = Rules() if rules is None else rules
        self._bots = bots
        self._remembers = remembers

    @property
    def rules(self) -> Rules:
        """How the workspace is decided."""
        return self._rules

    def process(self, events: Sequence[Event]) -> Recognition:
        """
        Remember a batch, decide, and leave the updates that follow in the graph's outbox.

        One call to the graph, whatever the size; from a few hundred events on it is cheap. When it
        returns all of it is durable. The second time the same events change nothing.

        Raises:
            GraphError: Nothing of the batch was written.
        """
        observations: list[Observation] = []
        skipped: set[int] = set()  # positions of bots, and of what is not remembered
        blocked = identified = ignored = 0
        pattern, remembers = self._bots, self._remembers
        agents: dict[str, bool] = {}  # those of the batch: most events share a few
        for position, event in enumerate(events):
            agent = event.user_agent
            if agent is not None and pattern is not None:
                bot = agents.get(agent)
                if bot is None:
                    bot = agents[agent] = is_bot(agent, pattern)
                if bot:
                    skipped.add(position)
                    continue
            if remembers is not None and not remembers(event):
                skipped.add(position)
                ignored += 1
                continue
            observation, refused = self._reduce(event)
            blocked += refused
            identified += bool(observation.known)
            observations.append(observation)
        outcome = self._graph.observe(self._rules, observations)
        owners, versions = list(outcome.owners), list(outcome.versions)
        names_user = [o.names_user for o in observations]
        stamped = sum(
            [
                owner is not None and not o.known
                for o, owner in zip(observations, owners, strict=True)
            ]
        )
        if skipped:
            owners = _spread(owners, skipped, None)
            versions = _spread(versions, skipped, 0)
            names_user = _spread(names_user, skipped, True)
        return Recognition(
            events=tuple(events),
            owners=tuple(owners),
            names_user=tuple(names_user),
            receipt=outcome.receipt,
            versions=tuple(versions),
            anonymous=len(observations) - identified,
            identified=identified,
            stamped=stamped,
            bots=len(skipped) - ignored,
            ignored=ignored,
            blocked=blocked,
            claims=outcome.counts.claims,
            links=outcome.counts.links,
            conflicts=outcome.counts.conflicts,
            updates=outcome.counts.updates,
        )

    def rows(self, recognition: Recognition) -> dict[str, list[Row]]:
        """
        The rows to be written, by table: as the events gave them, stamped where the owner is known.

        Times are microseconds since 1970-01-01 UTC. One track may give rows in two tables.
        """
        rules = self._rules
        found: dict[str, list[Row]] = {}
        for event, owner, names_user, version in zip(
            recognition.events,
            recognition.owners,
            recognition.names_user,
            recognition.versions,
            strict=True,
        ):
            stamp = owner if rules.stamps and (rules.has_own_column or not names_user) else None
            for table in rules.layout.tables_of(event):
                row = rules.layout.row_of(event, table)
                if rules.has_own_column:
                    row[rules.target_of(table)] = None
                versioned = rules.supersede_of(table) is Supersede.VERSION
                if versioned:
                    row[VERSION_COLUMN] = None
                if stamp is not None:
                    row.update(rules.values_of(table, stamp.id, stamp.traits, first=True))
                    if versioned:
                        row[VERSION_COLUMN] = version
                found.setdefault(table, []).append(row)
        return found

    def flushed(self, receipt: Receipt) -> int:
        """
        The rows of a batch are visible in the destination: make good what happened in between.

        A claim that another worker made after `process` and before the rows were visible may have
        sent its update too early; the graph is read again, and rows whose owner has changed get an
        update. Calling it twice emits the same updates again, which changes nothing.

        It trusts that the rows hold what `rows` gave for this very receipt. So a message that comes
        again, because its worker died before this call, must replace the stamp of the row that is
        there: an update may have been applied before that row was visible. A batch is done, and not
        to be read again, when this returns.

        Returns:
            The number of updates emitted.
        """
        return self._graph.recheck(self._rules, receipt)

    def unlink(self, one: Identifier, other: Identifier) -> int:
        """
        Take away the link between two identifiers for good, and the rows that they shared by it.

        Either both are known identifiers, or one is an ``anonymous_id``: then the device is taken
        from the identifier. What is seen later does not link them again. They stay one person where
        a third identifier is linked with both: `explain` shows the links.

        Returns:
            The number of updates emitted.

        Raises:
            InputError: Neither of the two cases; nothing was written.
        """
        return self._graph.unlink(self._rules, self._normalise(one), self._normalise(other))

    def release(self, anonymous_id: str, at: int | None = None) -> int:
        """
        Take a device from everybody: its rows until ``at`` become nobody's, and stay so.

        Args:
            anonymous_id: The device.
            at: Microseconds since 1970-01-01 UTC; now, where not given. Claims that the graph
                holds already are all taken back, later ones too.

        Returns:
            The number of updates emitted.
        """
        return self._graph.release(self._rules, anonymous_id.strip(), _at(at))

    def forget(self, identifier: Identifier, at: int | None = None) -> int:
        """
        Erase the person that has this identifier.

        Its identifiers, links and traits are deleted; what it did on shared devices stays, without
        a name. Recognised rows become unknown and are never given to the next person of the
        device. Rows that name the user themselves are the pipeline's own and are not touched,
        except in a column of recognition's own.

        Args:
            identifier: Any known identifier of the person.
            at: Microseconds since 1970-01-01 UTC; now, where not given. Events that happened until
                then and arrive later stay forgotten too.

        Returns:
            The number of updates emitted.

        Raises:
            InputError: The type is no known identifier; nothing was written.
        """
        if identifier.type not in self._rules.identity.known:
            known = ", ".join(self._rules.identity.known)
            raise InputError(
                f"{identifier.type} is no known identifier; a person is named by one of: {known}."
                " Nothing was written."
            )
        return self._graph.forget(self._rules, self._normalise(identifier), _at(at))

    def explain(self, subject: Identifier | str) -> Explanation:
        """
        Why an identifier, or a message given by its id, belongs to its person.

        Reads the graph only. For a message it reads all references: not for the hot path.
        """
        if isinstance(subject, Identifier):
            return self._graph.explain(self._rules, self._normalise(subject))
        return self._graph.explain(self._rules, subject.strip())

    def show(self, identifier: Identifier, limit: int = 50) -> Picture:
        """
        What is to be seen of an identifier: its person, the links, the devices, who owned them.

        Reads the graph only. `recognition.graph.rendering.render` makes a document of it.

        Args:
            identifier: A known identifier, or an ``anonymous_id``.
            limit: The most that is shown of each kind; what there is more of is told.

        Raises:
            ConfigurationError: The graph was decided by other rules, or the limit is less than 1.
        """
        return self._graph.show(self._rules, self._normalise(identifier), limit)

    def _normalise(self, identifier: Identifier) -> Identifier:
        """As the graph has it: by the plain value, or by the hash that rows and `explain` show."""
        return normalise(identifier, self._rules.identity, by_hash=True)

    def _reduce(self, event: Event) -> tuple[Observation, int]:
        """What the graph needs of an event, and how many of its identifiers are blocked."""
        identity = self._rules.identity
        blocked = 0
        anonymous_id = event.anonymous_id
        if anonymous_id is not None and is_blocked(anonymous_id, identity):
            anonymous_id = None
            blocked += 1
        known: tuple[Identifier, ...] = ()
        as_seen: tuple[str, ...] = ()
        names_user = False
        traits = event.traits
        if identity.hashed:
            # Beyond this line nothing holds the plain value of a hashed type.
            traits = {name: traits[name] for name in self._rules.traits if name in traits}
        if event.known:
            kept = []
            for identifier in event.known:
                names_user = names_user or identifier.type == "user_id"
                if identifier.type not in identity.known:
                    continue
                if is_blocked(identifier.value, identity):
                    blocked += 1
                else:
                    kept.append((identity.priority(identifier.type), identifier))
            kept.sort()
            known = tuple([normalise(identifier, identity) for _, identifier in kept])
            as_seen = tuple([identifier.value for _, identifier in kept])
            if identity.hashed:
                as_seen = tuple(
                    [
                        identifier.value if identifier.type in identity.hashed else seen
                        for identifier, seen in zip(known, as_seen, strict=True)
                    ]
                )
        previous = event.previous_id
        if previous is not None and (previous == anonymous_id or is_blocked(previous, identity)):
            previous = None
        return Observation(
            event.message_id,
            event.time,
            anonymous_id,
            known,
            as_seen,
            names_user,
            previous,
            self._rules.layout.tables_of(event),
            traits,
        ), blocked


def _spread(values: Sequence[_Value], skipped: Collection[int], missing: _Value) -> list[_Value]:
    """The values in their order, with ``missing`` at the positions that were skipped."""
    given = iter(values)
    count = len(values) + len(skipped)
    return [missing if position in skipped else next(given) for position in range(count)]


def _at(at: int | None) -> int:
    return time.time_ns() // 1000 if at is None else at
