"""
What is remembered: identifiers, persons, timelines, message references and the outbox.

`Graph` is what everybody else sees; `open_graph` finds the right one for a URL. A graph never
decides who somebody is (`recognition.identity`, `recognition.attribution`) and never talks to a
warehouse: it makes a decision and the updates that follow from it durable in one step.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

    def lease_updates(self, limit: int, seconds: float) -> list[Delivery]:
        """
        Take up to ``limit`` updates out, oldest first, hidden from others for ``seconds``.

        An update whose lease ended without an acknowledgement comes again.
        """

    def acknowledge(self, positions: Collection[int]) -> None:
        """Those updates are applied. A position that is gone already is left alone."""

    def return_updates(self, positions: Collection[int], reason: str, *, dead: bool) -> None:
        """Give leases back; ``dead``: never lease them again, keep them with the reason."""

    def dead_updates(self, limit: int) -> list[tuple[Delivery, str]]:
        """Updates that were given up, oldest first, with the reason."""

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

    def show(self, rules: Rules, identifier: Identifier, limit: int) -> Picture:
        """See `Graph.show`."""
        from recognition.graph.showing import show

        with self._reader(rules.workspace) as store:
            return show(store, rules, identifier, limit)

    def decided_with(self, workspace: str) -> str | None:
        """See `Graph.decided_with`."""
        with self._reader(workspace) as store:
            return store.decided_with("") or None

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
