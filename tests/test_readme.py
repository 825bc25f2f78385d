"""What the README and the first pages show is what happens; the rest is in `test_docs.py`."""

from __future__ import annotations

import json
import re
import shlex
import sqlite3
import tomllib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recognition import Policy, installed_schemes
from recognition.cli import main
from recognition.config import Settings, load_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


EVENTS = [
    {
        "messageId": "m1",
        "type": "page",
        "anonymousId": "a1",
        "timestamp": "2026-01-01T10:00:00Z",
    },
    {
        "messageId": "m2",
        "type": "identify",
        "anonymousId": "a1",
        "userId": "u1",
        "traits": {"email": "a@example.com"},
        "timestamp": "2026-01-01T10:05:00Z",
    },
]


@pytest.fixture
def _warehouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with a file of events, and their rows as a pipeline wrote them."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"{json.dumps(event)}\n" for event in EVENTS)
    (tmp_path / "events.ndjson").write_text(lines)
    with closing(sqlite3.connect("warehouse.db")) as connection:
        connection.execute(
            "CREATE TABLE events (message_id TEXT, type TEXT, anonymous_id TEXT, user_id TEXT,"
            " timestamp TEXT, context_traits_email TEXT)"
        )
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, NULL)",
            [
                (e["messageId"], e["type"], e["anonymousId"], e.get("userId"), e["timestamp"])
                for e in EVENTS
            ],
        )
        connection.commit()


def _users() -> list[str | None]:
    with closing(sqlite3.connect("warehouse.db")) as connection:
        found = connection.execute("SELECT user_id FROM events ORDER BY message_id").fetchall()
    return [user for (user,) in found]


@pytest.mark.usefixtures("_warehouse")
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_library_examples_do_what_they_say(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example runs as it stands, and the anonymous row has the user afterwards."""
    (example,) = _blocks(ROOT / page, "python")

    exec(compile(example, page, "exec"), {})

    assert _users() == ["u1", "u1"]
    assert capsys.readouterr().out.split()[0] == "1"


WEEK = {
    "monday": [("m1", "a1", None)],
    "tuesday": [("m2", "a1", "u1"), ("m3", "a2", None)],
    "wednesday": [("m4", "a2", None), ("m5", "a3", None)],
    "thursday": [("m6", "a2", "u2"), ("m7", "a1", None)],
    "friday": [("m8", "a3", "u3"), ("m9", "a3", None)],
}


def _lines(day: str) -> list[str]:
    """A day's events as NDJSON, a second apart."""
    return [
        json.dumps(
            {
                "messageId": message_id,
                "type": "page" if user_id is None else "identify",
                "anonymousId": anonymous_id,
                "userId": user_id,
                "timestamp": f"2026-01-01T10:00:{message_id[1:]:0>2}Z",
            }
        )
        for message_id, anonymous_id, user_id in WEEK[day]
    ]


def test_the_blocks_of_the_embedding_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other they take a week of events, and each row has its user in the end."""
    monkeypatch.chdir(tmp_path)
    for day in WEEK:
        Path(f"{day}.ndjson").write_text("\n".join(_lines(day)) + "\n")
    with closing(sqlite3.connect("warehouse.db")) as connection:
        connection.execute(
            "CREATE TABLE events (message_id TEXT PRIMARY KEY, type TEXT, anonymous_id TEXT,"
            " user_id TEXT, timestamp INTEGER)"
        )
    names: dict[str, Any] = {}
    calls, awaited, partitions = [
        compile(block, "embed.md", "exec")
        for block in _blocks(ROOT / "docs" / "embed.md", "python")
    ]
    exec(calls, names)
    after_tuesday = _users()
    exec(awaited, names)
    after_thursday = _users()
    exec(partitions, names)
    names["take_partition"](SimpleNamespace(value=line) for line in _lines("friday"))
    names["deliver"](names["graph"], names["sink"])
    names["warehouse"].close()
    names["sink"].close()
    names["graph"].close()

    assert capsys.readouterr().out == "1 rows changed\n"
    assert after_tuesday == ["u1", "u1", None]
    assert after_thursday == ["u1", "u1", "u2", "u2", None, "u2", "u1"]
    assert _users() == ["u1", "u1", "u2", "u2", "u3", "u2", "u1", "u3", "u3"]


def test_the_commands_of_the_embedding_page_name_examples_that_exist() -> None:
    """They are there; tests/test_spark.py and tests/test_dagster.py run them."""
    text = (ROOT / "docs" / "embed.md").read_text(encoding="utf-8")
    named = set(re.findall(r"examples/\w+\.py", text))

    assert named == {"examples/spark_foreach_batch.py", "examples/dagster_recognition.py"}
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_example_of_the_readme_is_short() -> None:
    """Fifteen lines at most."""
    (example,) = _blocks(ROOT / "README.md", "python")

    assert len(example.strip().splitlines()) <= 15


@pytest.mark.usefixtures("_warehouse")
def test_the_commands_of_the_readme_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `recognition ...` line of the README runs as it stands, and they work together."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^recognition (.*?)(?: +#.*)?$", text, re.MULTILINE)

    codes = [main(shlex.split(command)) for command in commands]

    assert len(commands) == 3
    assert codes == [0, 0, 0]
    assert _users() == ["u1", "u1"]
    assert "user_id:u1: u1" in capsys.readouterr().out


def test_the_two_commands_of_the_readme_are_targets() -> None:
    """`make demo` and `make test` are on the first screen, and the Makefile knows them."""
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = [line.split()[1] for line in first_screen if line.startswith("make ")]

    assert shown == ["demo", "test"]
    for target in shown:
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)


def test_the_table_of_sinks_tells_the_truth() -> None:
    """What is called here is installed, and what is installed is called here."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    rows = re.findall(r"^\| \w+ \| (`.*) \| here(?:, [^|]*)? \|$", text, re.MULTILINE)
    here = [scheme for row in rows for scheme in re.findall(r"`(\w+):", row)]

    assert sorted(here) == sorted(installed_schemes())


@pytest.mark.parametrize("page", ["README.md", "docs/how-it-decides.md"])
def test_the_tables_of_policies_are_complete(page: str) -> None:
    """Every policy stands in them, and no other."""
    text = (ROOT / page).read_text(encoding="utf-8")

    shown = re.findall(r"^\| `(\w+)`(?: \(default\))? \|", text, re.MULTILINE)

    assert [name for name in shown if name in set(Policy)] == list(Policy)


def test_the_example_of_the_configuration_page_is_valid(tmp_path: Path) -> None:
    """The file that is shown is one that is read."""
    (example,) = _blocks(ROOT / "docs" / "configuration.md", "toml")
    file = tmp_path / "recognition.toml"
    file.write_text(example, encoding="utf-8")

    settings = load_settings({}, {}, file)

    assert settings.identifiers[0].type == "account"
    assert settings != Settings()


def test_the_test_files_of_authors_are_complete() -> None:
    """The pages' examples define a subclass of the kit with its fixtures."""
    (sink,) = _blocks(ROOT / "docs" / "write-a-sink.md", "python")
    (graph,) = _blocks(ROOT / "docs" / "write-a-graph.md", "python")
    names: dict[str, object] = {"__name__": "example"}

    exec(compile(sink, "write-a-sink.md", "exec"), names)
    exec(compile(graph, "write-a-graph.md", "exec"), names)

    assert {"sink", "write_rows", "read_rows"} <= set(vars(names["TestMySink"]))
    assert {"graph", "reopen"} <= set(vars(names["TestMyGraph"]))


def test_pages_are_reached_from_the_readme() -> None:
    """Every page of docs/ is linked from the README."""
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))

    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(links)


def test_one_list_of_python_versions() -> None:
    """The oldest Python that pyproject.toml allows is the one that the Makefile asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert project["requires-python"] == ">=3.11"
    assert "sys.version_info < (3, 11)" in makefile
