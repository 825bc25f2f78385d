"""
The statements of each database, beside the code: a change of SQL is seen in a diff.

``RECOGNITION_TEST_WRITE_GOLDEN=1`` writes the files anew.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import sqlglot
from sqlglot import exp

from recognition.messages import Equals, Messages, UpdateByCriteria
from recognition.planner import plan_updates
from recognition.sinks import open_sink
from recognition.sinks.sql import SqlSink
from recognition.testing import SinkTests
from recognition.testing.sinks import at, between, device, unknown, update

FOLDER = Path(__file__).parent / "golden"

#: By the name of a file, what sqlglot calls the dialect.
DIALECTS = {
    "duckdb": "duckdb",
    "mysql": "mysql",
    "postgresql": "postgres",
    "redshift": "redshift",
    "snowflake": "snowflake",
    "sqlite": "sqlite",
}

_NAMED = Messages(
    id_column="message_id", time_column="timestamp", refs=(("m1", at(1)), ("m2", at(2.5)))
)
_OWNER = {"user_id": "u1", "context_traits_email": "a@example.com"}

#: Updates of the shapes that matter, with what each is about; one after the other.
WINDOWS: dict[str, list[UpdateByCriteria]] = {
    "a device's rows in an interval, where nobody is known": [
        update(1, _OWNER, device("a1"), unknown(), between(0, 9))
    ],
    "the same, in a table with versions": [
        update(2, _OWNER, device("a1"), unknown(), between(0, 9), versioned=True)
    ],
    "a column of recognition's own, set whatever it holds": [
        update(3, {"stitched_user_id": "u1"}, device("a1"))
    ],
    "messages of a device": [update(4, {"stitched_user_id": "u1"}, device("a1"), _NAMED)],
    "a device's interval, of which a later update named messages": [
        update(3, {"stitched_user_id": "u2"}, device("a1"), between(0, 9))
    ],
    "the first one again, which changes nothing": [
        update(1, _OWNER, device("a1"), unknown(), between(0, 9))
    ],
    "the first one again, beside one of another device": [
        update(1, _OWNER, device("a1"), unknown(), between(0, 9)),
        update(7, _OWNER, device("a2"), unknown(), between(0, 9)),
    ],
    "a user who became another": [
        update(6, {"user_id": "u2"}, Equals(column="user_id", value="u1"), versioned=True)
    ],
}

Opened = Callable[..., SqlSink]


@pytest.fixture(params=sorted(DIALECTS))
def dialect(request: pytest.FixtureRequest) -> str:
    """Each of the databases."""
    return str(request.param)


@pytest.fixture
def opened(dialect: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Open sinks of one database, of which nobody else knows."""
    with ExitStack() as stack:
        options: dict[str, object] = {}
        if dialect in ("duckdb", "sqlite"):
            url = f"{dialect}:///{tmp_path}/warehouse.db"
        elif dialect == "mysql":
            server = request.getfixturevalue("mariadb")
            url = server.url(stack.enter_context(server.database()))
        elif dialect == "snowflake":
            server = request.getfixturevalue("fakesnow")
            url = server.url(f"golden_{os.getpid()}_{request.node.name[:8]}")
            options = {"connect_args": {"protocol": "http", "use_proxy_env": False}}
        else:
            server = request.getfixturevalue("postgres")
            name = stack.enter_context(server.database())
            url = server.url(name)
            if dialect == "redshift":
                url = server.url(name, scheme="redshift+psycopg2", sslmode="disable")
                options = {"settings": {}}

        def open_it(**more: object) -> SqlSink:
            sink = stack.enter_context(closing(open_sink(url, **options, **more)))
            assert isinstance(sink, SqlSink)
            return sink

        yield open_it


def _sent(sink: SqlSink) -> list[str]:
    """The texts of all statements that the sink sends from now on, COMMIT among them."""
    texts: list[str] = []

    @sa.event.listens_for(sink._engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *rest: Any) -> None:
        texts.append(statement)

    @sa.event.listens_for(sink._engine, "commit")
    def committed(_: Any) -> None:
        texts.append("COMMIT")

    return texts


def _check(text: str, dialect: str) -> None:
    """It is a statement of the dialect; and MySQL takes it, because it names no stage twice."""
    marks = r"('(?:[^']|'')*')|%(?:\(\w+\))?s|(?<![:\w]):\w+|\?"
    plain = re.sub(marks, lambda found: found[1] or "'x'", text)
    # What sqlglot does not know within JSON_TABLE.
    plain = re.sub(r" CHARACTER SET \w+ COLLATE \w+| ERROR ON ERROR", "", plain)
    (parsed,) = sqlglot.parse(plain, read=DIALECTS[dialect])
    assert parsed is not None
    assert not isinstance(parsed, exp.Command), text
    stages = [t.name for t in parsed.find_all(exp.Table) if "_stage_" in t.name]
    assert len(stages) == len(set(stages)), text


def _show(sink: SqlSink, dialect: str, how: str, most: int) -> Iterator[str]:
    sent = _sent(sink)
    for about, wanted in [*WINDOWS.items()][:most]:
        sent.clear()
        assert sink.apply(plan_updates(wanted)).rejected == ()
        yield f"-- {how}: {about}\n" + "".join(f"{text};\n" for text in sent)
        for text in sent:
            if re.match("SELECT|INSERT|UPDATE|MERGE|CREATE|DELETE|DROP", text):
                _check(text, dialect)


def test_statements_are_those_of_the_file(
    dialect: str, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is sent for a window with a stage; some without one, and some by MERGE."""
    sink = opened()
    sink.load("events", [], key="message_id", columns=SinkTests.columns)
    ways = [("a stage", sink, 0, len(WINDOWS))]
    if sink.inline_rows:
        ways.append(("rows inside", sink, sink.inline_rows, 2))
    if dialect == "snowflake":
        ways.append(("merge", opened(statement="merge"), 0, 2))
    shown = []
    for how, by, rows, most in ways:
        monkeypatch.setattr(by, "inline_rows", rows)
        by.apply(plan_updates([update(0, {"stitched_user_id": "u"}, device("a0"))]))  # made once
        shown += _show(by, dialect, how, most)

    found = "\n".join(shown)
    file = FOLDER / f"{dialect}.sql"
    if os.environ.get("RECOGNITION_TEST_WRITE_GOLDEN") == "1":
        file.write_text(found, encoding="utf-8")

    assert found == file.read_text(encoding="utf-8")
