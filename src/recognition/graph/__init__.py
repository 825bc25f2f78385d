"""
What is remembered: identifiers, persons, timelines, message references and the outbox.

`Graph` is what everybody else sees; `open_graph` finds the right one for a URL. A graph never
decides who somebody is (`recognition.identity`, `recognition.attribution`) and never talks to a
warehouse: it makes a decision and the updates that follow from it durable in one step.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

from recognition.errors import (
    ConfigurationError,
    GraphError,
    MissingDependencyError,
    UnknownSchemeError,
)
from recognition.events import Identifier
from recognition.graph import decisions
from recognition.graph.decisions import Observation, Outcome, Owner, Receipt
from recognition.graph.explaining import Explanation, explain
from recognition.graph.store import Store
from recognition.messages import UpdateByCriteria
from recognition.rules import Rules

if TYPE_CHECKING:
    from recognition.graph.moving import Record
    from recognition.graph.showing import Picture

__all__ = [
    "Backlog",
    "Delivery",
    "Explanation",
    "Graph",
    "GraphStats",
    "Observation",
    "Outcome",
    "Owner",
    "Receipt",
    "StoredGraph",
    "initialise_graph",
    "open_graph",
]


_Result = TypeVar("_Result")


class Delivery(NamedTuple):
    """An update on its way out, leased until it is acknowledged, returned or the lease ends."""

    position: int
    update: UpdateByCriteria
    attempts: int
    """How often it was leased before."""
    applied: bool = False
    """It was applied before, and held until its rows had settled: this is the time after that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What a destination has not done yet, in numbers of updates."""

    waiting: int
    """Never applied: those that are leased now among them."""
    held: int
    """Applied, and held until they are applied again."""
    dead: int
    oldest: datetime | None
    """When the oldest of those that wait was decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStats:
    """Numbers of things that a graph holds, over all workspaces; ``bytes`` is its size on disk."""

    anonymous_ids: int
    identifiers: int
    persons: int
    claims: int
    links: int
    conflicts: int
    references: int
    pending_updates: int
    dead_updates: int
    bytes: int


@runtime_checkable
class Graph(Protocol):
    """
    What is remembered, shared by any number of recognizers.

    Every call is one transaction: when it returns, all of it is durable; when it raises, nothing
    of it happened. Only where the rows of a batch are (message references, days) may be known of
    one that failed: a graph over a network writes that before it decides, and the rows are named
    again when the batch comes again. All times are microseconds since 1970-01-01 UTC.
    """

    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        """
        Take a batch of one workspace in, decide, and put the updates that follow into the outbox.

        The same batch a second time changes nothing and emits nothing.

        Raises:
            GraphUnavailableError: Locked or gone; nothing was written, a retry may help.
            GraphReadOnlyError: Nothing was written.
        """

    def recheck(self, rules: Rules, receipt: Receipt) -> int:
        """Emit updates for rows that were stamped with an owner who has changed since."""

    def unlink(self, rules: Rules, one: Identifier, other: Identifier) -> int:
        """Part two identifiers, or a device and an identifier, for good; gives updates emitted."""

    def release(self, rules: Rules, anonymous_id: str, at: int) -> int:
        """Take a device from everybody up to ``at``; gives the number of updates emitted."""

    def forget(self, rules: Rules, identifier: Identifier, at: int) -> int:
        """Erase a person up to ``at``; gives the number of updates emitted."""

    def explain(self, rules: Rules, subject: Identifier | str) -> Explanation:
        """Why an identifier, or a message (given by its id), belongs to its person."""

    def show(self, rules: Rules, identifier: Identifier, limit: int) -> Picture:
        """What is to be seen of an identifier, as `recognition.graph.showing` defines it."""

    def decided_with(self, workspace: str) -> str | None:
        """`Rules.fingerprint` of the workspace's first decision; ``None`` before it."""

    def tables(self, workspace: str) -> set[str]:
        """Every table that rows of the workspace were ever seen for."""

    def lease_updates(self, limit: int, seconds: float, destination: str = "") -> list[Delivery]:
        """
        Take up to ``limit`` updates out, oldest first, hidden from others for ``seconds``.

        An update whose lease ended without an acknowledgement comes again. Every destination that
        is registered gets every update, each at its own pace; where none is, whoever names none is
        the only one.

        Raises:
            ConfigurationError: Such a destination is not registered; or none is named, and some
                are. Nothing was written.
        """

    def acknowledge(self, positions: Collection[int], destination: str = "") -> None:
        """
        The destination has applied those updates; one that all have applied leaves the outbox.

        A position that is gone already is left alone.
        """

    def hold_updates(
        self, positions: Collection[int], seconds: float, *, applied: bool, destination: str = ""
    ) -> None:
        """
        Nobody gets those updates for so many seconds from now; then they come again.

        A lease is made longer by this, or given back for later. What is acknowledged, or dead, is
        left alone.

        Args:
            applied: They were applied, and are held until their rows have settled: `Delivery` says
                so when they come. They stay so, whatever happens to them later.
        """

    def return_updates(
        self, positions: Collection[int], reason: str, *, dead: bool, destination: str = ""
    ) -> None:
        """Give leases back; ``dead``: never lease them again, keep them with the reason."""

    def dead_updates(self, limit: int, destination: str = "") -> list[tuple[Delivery, str]]:
        """Updates that were given up for a destination, oldest first, with the reason."""

    def destinations(self) -> dict[str, bool]:
        """Those that are registered, each with whether it was filled; see `add_destination`."""

    def add_destination(self, name: str, *, filled: bool = False) -> None:
        """
        From now on the outbox serves this destination too. The second time only ``filled`` counts.

        It gets what is in the outbox, and everything later. What left the outbox before it did not
        get: `restate` says who owns what now.

        Args:
            name: Small letters, digits, ``_`` and ``-``, 63 at most.
            filled: Everything of before is there by now.
        """

    def drop_destination(self, name: str) -> None:
        """Forget a destination and what it has not done; one that is not there is left alone."""

    def backlog(self, destination: str = "") -> Backlog:
        """What a destination has not done. Reads all of it: now and then, not for each window."""

    def restate(self, rules: Rules, size: int = 200) -> Iterator[list[UpdateByCriteria]]:
        """
        All that the graph knows about rows of a workspace, as updates that say it once more.

        For a destination that was added later; rows that hold another owner are set too. Nothing is
        put into the outbox. Read while it is taken, ``size`` devices or identifiers in a
        transaction: what is decided meanwhile has greater numbers than what was given before.
        """

    def stats(self) -> GraphStats:
        """Count what is there. Reads all of it: not for the hot path."""

    def expire(self, before: int) -> int:
        """Drop message references older than ``before``; gives the number of days dropped."""

    def rehearse(self) -> Graph:
        """A graph over this one that keeps all it writes to itself; close it when done."""

    def export(self) -> Iterator[Record]:
        """
        Everything that the graph holds, as `recognition.graph.moving` defines it, of one moment.

        It is read while it is taken, in bounded memory. Others may write meanwhile; what they
        write is not in it. Leases are not: what is leased is told as waiting.

        Raises:
            GraphError: This kind of graph cannot be exported.
        """

    def take_in(self, records: Iterable[Record], *, restart: bool = False) -> int:
        """
        Fill an empty graph with what another one has exported.

        It is written in parts of bounded size. Until the last of them the graph refuses everything
        else: also in other processes, and also when this call ended half-way.

        Args:
            records: As `export` gives them.
            restart: Begin anew where an earlier call did not come to its end.

        Returns:
            The number of records.

        Raises:
            ConfigurationError: The graph is not empty, or an earlier call did not come to its end
                and ``restart`` is not set. Nothing was written.
            InputError: A record is wrong, or some are missing; ``written`` says whether a part is
                in the graph by now.
            GraphError: This kind of graph takes none in.
        """

    def check(self) -> list[str]:
        """What is wrong with what is stored, a sentence each. Reads all of it, writes nothing."""

    def compact(self) -> int:
        """
        Drop what nothing needs any more, and give its space back; gives the bytes that came free.

        Changes no answer. It may take long, and keeps writers waiting where the storage does.
        """

    def close(self) -> None:
        """Let go of what is open. The second time does nothing."""


class StoredGraph(ABC):
    """A graph that decides inside a transaction of its `Store`; the rest is up to the backend."""

    @abstractmethod
    def _run(self, rules: Rules, work: Callable[[Store], _Result]) -> _Result:
        """
        Do the work in one transaction of the workspace of the rules: committed at its end, undone
        by an exception.

        The work may be done again from the start, where somebody else was in the way.
        """

    @abstractmethod
    def _reader(self, workspace: str) -> AbstractContextManager[Store]:
        """A transaction that only reads, and sees one moment for as long as it is open."""

    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        """See `Graph.observe`."""
        return self._run(rules, lambda store: decisions.observe(store, rules, observations))

    def recheck(self, rules: Rules, receipt: Receipt) -> int:
        """See `Graph.recheck`."""
        return self._run(rules, lambda store: decisions.recheck(store, rules, receipt))

    def unlink(self, rules: Rules, one: Identifier, other: Identifier) -> int:
        """See `Graph.unlink`."""
        return self._run(rules, lambda store: decisions.unlink(store, rules, one, other))

    def release(self, rules: Rules, anonymous_id: str, at: int) -> int:
        """See `Graph.release`."""
        return self._run(rules, lambda store: decisions.release(store, rules, anonymous_id, at))

    def forget(self, rules: Rules, identifier: Identifier, at: int) -> int:
        """See `Graph.forget`."""
        return self._run(rules, lambda store: decisions.forget(store, rules, identifier, at))

    def explain(self, rules: Rules, subject: Identifier | str) -> Explanation:
        """See `Graph.explain`."""
        with self._reader(rules.workspace) as store:
            return explain(store, rules, subject)

    def restate(self, rules: Rules, size: int = 200) -> Iterator[list[UpdateByCriteria]]:
        """See `Graph.restate`."""

        def page(after: int, known: bool) -> tuple[list[int], list[UpdateByCriteria]]:
            def work(store: Store) -> tuple[list[int], list[UpdateByCriteria]]:
                handles = store.page(after, size, known=known)
                devices, people = ([], handles) if known else (handles, [])
                return handles, decisions.restate(store, rules, devices, people)

            return self._run(rules, work)

        for known in (False, True):
            handles, updates = page(0, known)
            while handles:
                if updates:
                    yield updates
                handles, updates = page(handles[-1], known)

    def show(self, rules: Rules, identifier: Identifier, limit: int) -> Picture:
        """See `Graph.show`."""
        from recognition.graph.showing import show

        with self._reader(rules.workspace) as store:
            return show(store, rules, identifier, limit)

    def decided_with(self, workspace: str) -> str | None:
        """See `Graph.decided_with`."""
        with self._reader(workspace) as store:
            return store.decided_with("") or None

    def tables(self, workspace: str) -> set[str]:
        """See `Graph.tables`."""
        with self._reader(workspace) as store:
            return store.tables()

    def rehearse(self) -> Graph:
        """See `Graph.rehearse`."""
        from recognition.graph.memory import MemoryGraph

        return MemoryGraph(below=self._reader)

    def export(self) -> Iterator[Record]:
        """See `Graph.export`."""
        raise GraphError(f"a {type(self).__name__} cannot be exported. Nothing was written.")

    def take_in(self, records: Iterable[Record], *, restart: bool = False) -> int:
        """See `Graph.take_in`."""
        raise GraphError(f"a {type(self).__name__} takes no other graph in. Nothing was written.")

    def check(self) -> list[str]:
        """See `Graph.check`."""
        return []

    def compact(self) -> int:
        """See `Graph.compact`."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """See `Graph.close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_DESTINATION = re.compile(r"[a-z0-9_][a-z0-9_-]{0,62}")


def check_name(destination: str) -> None:
    """Refuse what cannot be the name of a destination."""
    if not _DESTINATION.fullmatch(destination):
        raise ConfigurationError(
            "the name of a destination is small letters, digits, _ and -, 63 at most, and begins"
            " with no -. Nothing was written."
        )


def check_destination(destination: str, registered: Collection[str]) -> None:
    """Refuse to lease for a destination that the outbox does not serve."""
    if destination == "" and registered:
        raise ConfigurationError(
            f"the outbox serves {', '.join(sorted(registered))}; updates are applied to these, by"
            " `recognition worker`, and not to a sink beside them. Nothing was applied."
        )
    if destination and destination not in registered:
        raise ConfigurationError(
            f"the outbox serves no destination {destination!r}. Nothing was applied."
        )


_BUILT_IN = {
    "memory": "recognition.graph.memory:MemoryGraph",
    "mongodb": "recognition.graph.mongo:MongoGraph",
    "sqlite": "recognition.graph.sqlite:SqliteGraph",
}


def open_graph(url: str, **options: object) -> Graph:
    """
    Open the graph that a URL names; it is made where there is none.

    ``memory:`` keeps nothing, ``sqlite:///path`` is one file (``sqlite:////path`` absolute).
    Others are found through the entry-point group ``recognition.graphs``: a class whose
    ``from_url(url, **options)`` opens it.

    Raises:
        UnknownSchemeError: No such graph is installed; the text lists those that are.
        MissingDependencyError: Its driver is not installed; the text has the command.
    """
    graph: Graph = _find(url).from_url(url, **options)
    return graph


def initialise_graph(url: str, *, sharded: bool = False, run: bool = True) -> list[str]:
    """
    Make what the graph of a URL needs before it is used; what is there already is left alone.

    A graph that has something to prepare says so by a class method ``initialise(url, *, sharded,
    run)``, which gives the lines to be shown; all others are made by opening them.

    Args:
        url: As `open_graph` takes it.
        sharded: Spread it over the shards of a cluster.
        run: Do it. Otherwise it is only said what would be done.

    Returns:
        What was done, or would be, in lines for people.

    Raises:
        ConfigurationError: This kind of graph cannot be sharded; nothing was written.
    """
    found = _find(url)
    if hasattr(found, "initialise"):
        lines: list[str] = found.initialise(url, sharded=sharded, run=run)
        return lines
    if sharded:
        raise ConfigurationError("this kind of graph has no shards. Nothing was written.")
    if not run:
        return ["the graph is made when it is opened first; nothing else is needed"]
    found.from_url(url).close()
    return ["the graph is ready"]


def _find(url: str) -> Any:
    """The class that opens a URL."""
    scheme = url.split(":", 1)[0].split("+", 1)[0].lower()
    installed = {point.name: point for point in entry_points(group="recognition.graphs")}
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        try:
            opener = getattr(__import__(module, fromlist=[name]), name)
        except ImportError as exc:
            raise MissingDependencyError(
                f'graph {scheme!r} needs: pip install "recognition[mongo]" ({exc.name})'
            ) from exc
    elif scheme in installed:
        try:
            opener = installed[scheme].load()
        except ImportError as exc:
            raise MissingDependencyError(
                f'graph {scheme!r} needs: pip install "recognition[{scheme}]" ({exc.name})'
            ) from exc
    else:
        names = sorted({*_BUILT_IN, *installed})
        close = difflib.get_close_matches(scheme, names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UnknownSchemeError(
            f"no graph is installed for the scheme {scheme!r}{hint}; there are: {', '.join(names)}"
        )
    return opener
