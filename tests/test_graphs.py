"""The kit on the built-in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from oracle import make_event
from recognition.events import Identifier
from recognition.graph import Graph, open_graph
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from recognition.testing import GraphTests


class TestMemory(GraphTests):
    @pytest.fixture
    def graph(self) -> Iterator[Graph]:
        graph = open_graph("memory:")
        yield graph
        graph.close()


class TestSqlite(GraphTests):
    @pytest.fixture
    def graph(self, tmp_path: Path) -> Iterator[Graph]:
        graph = open_graph(f"sqlite:///{tmp_path}/graph.db")
        yield graph
        graph.close()

    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Iterator[Callable[[], Graph]]:
        opened: list[Graph] = []

        def reopen() -> Graph:
            opened.append(open_graph(f"sqlite:///{tmp_path}/graph.db"))
            return opened[-1]

        yield reopen
        for graph in opened:
            graph.close()


class TestSqliteInMemory(GraphTests):
    @pytest.fixture
    def graph(self) -> Iterator[Graph]:
        graph = open_graph("sqlite:///:memory:")
        yield graph
        graph.close()


class TestRehearsal(GraphTests):
    @pytest.fixture
    def graph(self, tmp_path: Path) -> Iterator[Graph]:
        below = open_graph(f"sqlite:///{tmp_path}/graph.db")
        graph = below.rehearse()
        yield graph
        graph.close()
        below.close()


@pytest.mark.parametrize("url", ["memory:", "sqlite:///:memory:"])
def test_message_may_come_again_with_a_trait_of_another_type(url: str) -> None:
    """A message whose trait was a number, and is text when it comes again, stops nobody."""
    with closing(open_graph(url)) as graph:
        recognizer = Recognizer(graph, Rules(traits=("plan",)))
        for plan in (1, "pro", 2.5, True):
            done = recognizer.process(
                [make_event("c", 1, "d1", user_id="u1", traits={"plan": plan})]
            )

        assert done.owners[0] is not None


@pytest.mark.parametrize("url", ["memory:", "sqlite:///:memory:"])
def test_everybody_of_a_conflict_can_be_forgotten(url: str) -> None:
    """Who was left without a link, because the other side was forgotten, is forgotten as well."""
    with closing(open_graph(url)) as graph:
        recognizer = Recognizer(graph)
        recognizer.process(
            [
                make_event("a", 1, "d1", user_id="u1", email="a@example.com"),
                make_event("b", 2, "d2", user_id="u2", email="a@example.com"),
            ]
        )
        for user in ("u1", "u2"):
            recognizer.forget(Identifier("user_id", user))

        assert graph.stats().identifiers == 0
        assert not recognizer.explain(Identifier("user_id", "u2")).found
