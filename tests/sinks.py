"""What the tests of sinks on servers share: the kit on a database, and how plans are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeVar

import pytest

from recognition.errors import TableError
from recognition.planner import plan_updates
from recognition.sinks import Applied, Sink, open_sink
from recognition.sinks.sql import SqlSink
from recognition.testing import SinkTests

Rows = Sequence[Mapping[str, object]]

_Kind = TypeVar("_Kind", bound=SqlSink)


class ServerKit(SinkTests):
    """The kit on what the fixture ``database`` gives: it has a URL, writes rows and reads them."""

    @pytest.fixture
    def sink(self, database: Any) -> Iterator[Sink]:
        with closing(open_sink(database.url)) as sink:
            yield sink

    @pytest.fixture
    def write_rows(self, database: Any) -> Callable[[str, Rows], None]:
        write: Callable[[str, Rows], None] = database.write
        return write

    @pytest.fixture
    def read_rows(self, database: Any) -> Callable[[str], list[dict[str, object]]]:
        read: Callable[[str], list[dict[str, object]]] = database.read
        return read


@contextmanager
def opening(kind: type[_Kind], url: str, **usual: object) -> Iterator[Callable[..., _Kind]]:
    """Open sinks, of this URL where none is given, that are closed at the end."""
    with ExitStack() as stack:

        def open_it(to: str = "", **options: object) -> _Kind:
            sink = stack.enter_context(closing(open_sink(to or url, **{**usual, **options})))
            assert isinstance(sink, kind)
            return sink

        yield open_it


def apply(sink: Sink, *updates: Any) -> Applied:
    """Apply the updates as one plan."""
    return sink.apply(plan_updates(updates))


def spoken(error: BaseException | None) -> str:
    """All that an error and those that led to it say, as a log with its traceback would."""
    shown = []
    while error is not None:
        shown += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


def refusal(applied: Applied) -> str:
    """The one reason of a plan that was refused."""
    ((_, error),) = applied.rejected
    assert isinstance(error, TableError)
    return str(error)
