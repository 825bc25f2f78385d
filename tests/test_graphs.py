"""The kit on the built-in graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recognition.graph import Graph, open_graph
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
