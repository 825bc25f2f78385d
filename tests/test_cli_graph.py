"""The commands `recognition graph ...`: make, check, count, move and compact."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from recognition.cli import main
from recognition.errors import RecognitionError
from recognition.graph.memory import MemoryGraph
from recognition.graph.sqlite import SqliteGraph
from test_cli import GRAPH, ROOT, SINK, Result, event, files, rows, write

OTHER = "sqlite:///other.db"
COMMANDS = ["init", "check", "stats", "show", "export", "import", "compact"]

Cli = Callable[..., Result]


@pytest.fixture
def graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Cli:
    """`recognition graph`, run inside an empty directory and without any setting from outside."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("RECOGNITION_"):
            monkeypatch.delenv(name)

    def call(*arguments: str, command: str = "graph") -> Result:
        capsysbinary.readouterr()
        try:
            code = main([command, *arguments])
        except SystemExit as exc:
            code = int(exc.code or 0)
        out, err = capsysbinary.readouterr()
        return Result(code, out.decode(), err.decode())

    return call


def fill(graph: Cli, url: str = GRAPH) -> None:
    events = [
        event(1),
        event(2, userId="u1", traits={"email": "Zo\u00eb@example.com"}),
        event(3, "a2"),
    ]
    assert graph(write("e.ndjson", events), "--graph", url, command="run").code == 0


def counts(graph: Cli, url: str) -> dict[str, Any]:
    found: dict[str, Any] = graph("stats", "--graph", url, "--json").json
    return {**found, "bytes": 0}


def test_init_makes_a_graph_once(graph: Cli) -> None:
    """The file is there afterwards, and the second time nothing of it changes."""
    first = graph("init", "--graph", GRAPH)
    before = files()
    again = graph("init", "--graph", GRAPH, "--json")

    assert (first.code, first.out) == (0, "the graph is ready\n")
    assert again.json == {"graph": GRAPH, "lines": ["the graph is ready"]}
    assert files() == before
    assert graph("check", "--graph", GRAPH).code == 0


def test_init_that_only_says_what_it_would_do_makes_nothing(graph: Cli) -> None:
    """With --print nothing is made."""
    result = graph("init", "--print", "--graph", GRAPH)

    assert result.code == 0
    assert result.out
    assert files() == {}


def test_init_of_a_file_has_no_shards(graph: Cli) -> None:
    """--sharded is refused where there are none, and nothing is made."""
    result = graph("init", "--sharded", "--graph", GRAPH)

    assert result.code == 2
    assert "no shards" in result.err
    assert files() == {}


def test_init_hands_on_what_a_graph_of_its_own_says(
    graph: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph class with `initialise` is asked, and its lines are printed; no password is."""
    asked = []

    def initialise(url: str, *, sharded: bool, run: bool) -> list[str]:
        asked.append((url, sharded, run))
        return ["sh.shardCollection(...)", "done"]

    monkeypatch.setattr(MemoryGraph, "initialise", staticmethod(initialise), raising=False)
    url = "memory://ann:secret@host/db"
    told = graph("init", "--sharded", "--print", "--graph", url)
    document = graph("init", "--graph", url, "--json")

    assert told.out == "sh.shardCollection(...)\ndone\n"
    assert asked == [(url, True, False), (url, False, True)]
    assert document.json["lines"] == ["sh.shardCollection(...)", "done"]
    assert "secret" not in document.out


def test_init_takes_the_graph_of_the_settings(graph: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """File and environment name the graph, as they do for every command."""
    Path("recognition.toml").write_text('graph = "sqlite:///from-file.db"\n')
    graph("init")
    monkeypatch.setenv("RECOGNITION_GRAPH", "sqlite:///from-variable.db")
    graph("init")

    assert {"from-file.db", "from-variable.db"} <= files().keys()


def test_check_says_what_is_wrong(graph: Cli) -> None:
    """A sound graph is exit code 0; one line a problem and exit code 1 where there is one."""
    fill(graph)
    sound = graph("check", "--graph", GRAPH)
    sound_document = graph("check", "--graph", GRAPH, "--json")
    with closing(sqlite3.connect("graph.db")) as connection, connection:
        connection.execute("DELETE FROM identifiers WHERE key = 'u1'")
    wrong = graph("check", "--graph", GRAPH)
    document = graph("check", "--graph", GRAPH, "--json")

    assert (sound.code, sound.out) == (0, "nothing is wrong with the graph\n")
    assert sound_document.json == {"sound": True, "problems": []}
    assert wrong.code == document.code == 1
    assert "claims name identifiers that are not there" in wrong.out
    assert document.json == {"sound": False, "problems": wrong.out.splitlines()}


def test_stats_count_as_the_command_of_that_name_does(graph: Cli) -> None:
    """As a table, and as one JSON document."""
    fill(graph)
    table, document = graph("stats", "--graph", GRAPH), graph("stats", "--graph", GRAPH, "--json")
    other = graph("--graph", GRAPH, "--json", command="stats")

    assert document.json == other.json
    assert document.json["claims"] == 1
    assert re.search(r"anonymous ids +2\n", table.out)


@pytest.mark.parametrize("asked", ["u1", "user_id:u1", "email:ZO\u00cb@example.com"])
def test_show_takes_any_identifier(graph: Cli, asked: str) -> None:
    """`TYPE:VALUE` in any spelling; a bare value is a user id. The text goes to stdout alone."""
    fill(graph)
    result = graph("show", asked, "--graph", GRAPH)

    assert (result.code, result.err) == (0, "")
    assert "identifier email:zo\u00eb@example.com" in result.out
    assert ", as Zo\u00eb@example.com\n" in result.out
    assert re.search(r"claim 2026-01-01T10:02:00Z by user_id:u1, message m2\n", result.out)


def test_show_of_a_device(graph: Cli) -> None:
    """An anonymous id shows its timeline."""
    fill(graph)
    result = graph("show", "anonymous_id:a1", "--graph", GRAPH)

    assert result.code == 0
    assert "device a1\n" in result.out
    assert "span from 2025-12-02T10:02:00Z: user_id:u1\n" in result.out


@pytest.mark.parametrize(
    ("format", "begins"),
    [
        ("text", "user_id:u1 in"),
        ("json", '{\n  "kind"'),
        ("mermaid", "flowchart LR\n"),
        ("dot", "digraph recognition {\n"),
        ("html", "<!DOCTYPE html>\n"),
    ],
)
def test_show_has_formats(graph: Cli, format: str, begins: str) -> None:
    """Each to stdout or, with -o, the same into a file that its owner alone may read."""
    fill(graph)
    shown = graph("show", "u1", "--graph", GRAPH, "--format", format)
    written = graph("show", "u1", "--graph", GRAPH, "--format", format, "-o", "shown")

    assert (shown.code, written.code, written.out) == (0, 0, "")
    assert shown.out.startswith(begins)
    assert Path("shown").read_text("utf-8") == shown.out
    assert stat.S_IMODE(Path("shown").stat().st_mode) == 0o600
    assert "shown: as secret as the graph" in written.err


def test_show_takes_json_as_every_command(graph: Cli) -> None:
    """--json is --format json; beside another format it is refused."""
    fill(graph)
    shown = graph("show", "u1", "--graph", GRAPH, "--json")
    both = graph("show", "u1", "--graph", GRAPH, "--json", "--format", "html")

    assert shown.json["kind"] == "graph_picture"
    assert graph("show", "u1", "--graph", GRAPH, "--json", "--format", "json") == shown
    assert (both.code, both.out) == (2, "")
    assert "--json and --format html" in both.err


def test_show_of_what_is_not_there_is_exit_code_1(graph: Cli) -> None:
    """It says so in the format that was asked for."""
    fill(graph)
    text = graph("show", "nobody", "--graph", GRAPH)
    document = graph("show", "nobody", "--graph", GRAPH, "--json")
    other = graph("show", "u1", "--graph", GRAPH, "--workspace", "other")

    assert (text.code, text.out) == (1, "user_id:nobody: never seen in workspace default\n")
    assert (document.code, document.json["found"]) == (1, False)
    assert (other.code, other.out) == (1, "user_id:u1: never seen in workspace other\n")


def test_show_has_a_limit(graph: Cli) -> None:
    """What is left out is said; less than one is wrong usage."""
    fill(graph)
    result = graph("show", "u1", "--graph", GRAPH, "--limit", "1")

    assert "1 of 2 identifiers of user_id:u1 are left out\n" in result.out
    assert graph("show", "u1", "--graph", GRAPH, "--limit", "0").code == 2


def test_show_follows_the_rules_that_the_graph_was_decided_with(graph: Cli) -> None:
    """As `explain`: without being asked; another policy is refused."""
    events = [event(1, userId="u1"), event(2, userId="u2")]
    policy = ("--policy", "first_claim")
    graph(write("e.ndjson", events), "--graph", GRAPH, *policy, command="run")
    result = graph("show", "anonymous_id:a1", "--graph", GRAPH)
    other = graph("show", "u1", "--graph", GRAPH, "--policy", "last_login")

    assert "policy first_claim" in result.out
    assert "span from 2025-12-02T10:01:00Z: user_id:u1\n" in result.out
    assert other.code == 2


@pytest.mark.parametrize("name", ["moved.ndjson", "moved.ndjson.gz"])
def test_graph_moves_by_a_file(graph: Cli, name: str) -> None:
    """Exported, imported, and gone on with: the same counts, and rows follow in the new place."""
    load = ("--sink", SINK, "--load")
    graph(write("1.ndjson", [event(1), event(3, "a2")]), "--graph", GRAPH, *load, command="run")
    exported = graph("export", "--graph", GRAPH, "-o", name)
    imported = graph("import", name, "--graph", OTHER)
    graph(write("2.ndjson", [event(4, userId="u1")]), "--graph", OTHER, *load, command="run")
    raw = Path(name).read_bytes()
    lines = (gzip.decompress(raw) if name.endswith(".gz") else raw).splitlines()

    assert (exported.code, imported.code) == (0, 0)
    assert re.search(rf"lines +{len(lines)}\n", exported.out)
    assert re.search(rf"records +{len(lines) - 1}\n", imported.out)
    assert json.loads(lines[0])["kind"] == "graph"
    assert rows() == [("m1", "u1"), ("m3", None), ("m4", "u1")]
    assert stat.S_IMODE(Path(name).stat().st_mode) == 0o600
    assert not Path(f"{name}.part").exists()


def test_export_of_the_same_graph_is_the_same_file(graph: Cli) -> None:
    """Twice the same bytes, compressed or not."""
    fill(graph)
    for name in ("a.ndjson", "b.ndjson", "a.gz", "b.gz"):
        graph("export", "--graph", GRAPH, "--output", name)
    found = files()

    assert found["a.ndjson"] == found["b.ndjson"] == gzip.decompress(found["a.gz"])
    assert found["a.gz"] == found["b.gz"]


def test_export_goes_to_stdout_and_import_comes_from_stdin(
    graph: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines and nothing else are on stdout, in UTF-8; `-` reads them."""
    fill(graph)
    exported = graph("export", "--graph", GRAPH)
    stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(exported.out.encode())))
    monkeypatch.setattr("sys.stdin", stdin)
    imported = graph("import", "-", "--graph", OTHER, "--json")

    assert exported.code == 0
    assert "Zo\u00eb@example.com" in exported.out
    assert [json.loads(line)["kind"] for line in exported.out.splitlines()][-1] == "end"
    assert "as secret as the graph" in exported.err
    assert imported.json["records"] == len(exported.out.splitlines()) - 1
    assert counts(graph, OTHER) == counts(graph, GRAPH)


def test_export_that_fails_leaves_the_file_as_it_was(
    graph: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a whole export takes the place of an older one."""
    fill(graph)
    Path("kept.ndjson").write_text("older")

    def failing(self: SqliteGraph) -> Any:
        yield from ()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SqliteGraph, "export", failing)
    result = graph("export", "--graph", GRAPH, "-o", "kept.ndjson")

    assert result.code == 2
    assert "kept.ndjson cannot be written: No space left on device" in result.err
    assert files()["kept.ndjson"] == b"older"
    assert "kept.ndjson.part" not in files()


def test_import_that_was_not_finished_is_begun_again(graph: Cli) -> None:
    """A cut file is exit code 3, with its line; then nothing goes but --restart."""
    fill(graph)
    graph("export", "--graph", GRAPH, "-o", "whole.ndjson")
    lines = Path("whole.ndjson").read_text("utf-8").splitlines(keepends=True)
    Path("cut.ndjson").write_text("".join(lines[:-2]), "utf-8")
    cut = graph("import", "cut.ndjson", "--graph", OTHER)
    unusable = graph("stats", "--graph", OTHER)
    check = graph("check", "--graph", OTHER)
    again = graph("import", "whole.ndjson", "--graph", OTHER)
    restarted = graph("import", "whole.ndjson", "--graph", OTHER, "--restart")

    assert cut.code == 3
    assert f"cut.ndjson: the file ends after line {len(lines) - 2}" in cut.err
    assert "A part of it was written." in cut.err
    assert "--restart" in cut.err
    assert unusable.code == 3
    assert "not finished" in unusable.err
    assert (check.code, again.code) == (1, 2)
    assert "--restart" in again.err
    assert restarted.code == 0
    assert counts(graph, OTHER) == counts(graph, GRAPH)


@pytest.mark.parametrize(
    ("kind", "arguments", "owner"),
    [
        ("sqlite", (), "u4"),
        ("sqlite", ("--restored",), "u5"),
        ("mongodb", ("--restored",), "u5"),  # without, it depends on how many numbers were left out
    ],
)
def test_backup_goes_on_beyond_what_was_delivered_since(
    graph: Cli, kind: str, arguments: Sequence[str], owner: str, request: pytest.FixtureRequest
) -> None:
    """An older graph gives numbers again, and its updates change nothing; --restored skips them."""
    url = OTHER if kind == "sqlite" else request.getfixturevalue("mongodb_url")
    write("page.ndjson", [event(9)])
    login = [write(f"{n}.ndjson", [event(9 - n, userId=f"u{n}")]) for n in range(1, 6)]
    sink = ("--sink", SINK, "--load")
    last = ("--policy", "first_claim")  # the earliest login takes the row
    graph("page.ndjson", login[0], "--graph", GRAPH, *sink, *last, command="run")
    graph("export", "--graph", GRAPH, "-o", "backup.ndjson")
    for file in login[1:4]:
        graph(file, "--graph", GRAPH, *sink, *last, command="run")
    before = dict(rows())["m9"]

    restored = graph("import", "backup.ndjson", "--graph", url, *arguments)
    again = graph(*login[1:4], "--graph", url, *sink, *last, command="run")
    after = graph(login[4], "--graph", url, *sink, *last, command="run")

    assert (restored.code, again.code, after.code) == (0, 0, 0)
    assert before == "u4"
    assert dict(rows())["m9"] == owner
    assert graph("check", "--graph", url).code == 0


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("events.ndjson", b'{"messageId": "m1"}\n', "line 1: this is no exported graph"),
        ("empty.ndjson", b"", "the file is empty"),
        ("cut.gz", gzip.compress(b'{"kind":"graph"}\n' * 99, mtime=0)[:-9], "line 1"),
        ("damaged.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 99, "line 1 cannot be read"),
    ],
    ids=["events", "empty", "cut", "damaged"],
)
def test_import_of_something_else_is_exit_code_2(
    graph: Cli, name: str, text: bytes, says: str
) -> None:
    """A file that is no exported graph is refused, with its name; the graph can still be used."""
    Path(name).write_bytes(text)
    result = graph("import", name, "--graph", OTHER)

    assert result.code == 2
    assert f"{name}: {says}" in result.err
    assert "Nothing was written" in result.err
    assert graph("check", "--graph", OTHER).code == 0


def test_import_needs_a_file_and_an_empty_graph(graph: Cli) -> None:
    """A missing file makes no graph; a graph that holds something is left as it is."""
    fill(graph)
    graph("export", "--graph", GRAPH, "-o", "moved.ndjson")
    missing = graph("import", "nothing.ndjson", "--graph", OTHER)
    made = Path("other.db").exists()
    before = counts(graph, GRAPH)
    full = graph("import", "moved.ndjson", "--graph", GRAPH)

    assert (missing.code, made) == (2, False)
    assert "nothing.ndjson is not there" in missing.err
    assert full.code == 2
    assert "not empty" in full.err
    assert counts(graph, GRAPH) == before


def test_compact_says_what_came_free(graph: Cli) -> None:
    """After a retention has dropped days, the file gets smaller by what is said."""
    events = [event(n % 60, f"device-{n}", messageId=f"message {n}") for n in range(3_000)]
    graph(write("e.ndjson", events), "--graph", GRAPH, command="run")
    retention = ("--graph", GRAPH)
    Path("recognition.toml").write_text("retention_days = 30\n")
    graph(write("none.ndjson", []), *retention, command="run")
    before = Path("graph.db").stat().st_size
    result = graph("compact", "--graph", GRAPH, "--json")
    after = Path("graph.db").stat().st_size

    assert result.code == 0
    assert result.json["bytes"] == after < before / 2
    assert result.json["bytes_freed"] >= before - after > 0
    assert counts(graph, GRAPH)["anonymous_ids"] == 0


@pytest.mark.parametrize("command", ["check", "stats", "show u1", "export", "compact"])
def test_commands_that_read_make_no_graph(graph: Cli, command: str) -> None:
    """Where there is no graph, none is made: exit code 2."""
    result = graph(*command.split(), "--graph", GRAPH)

    assert result.code == 2
    assert "there is no graph" in result.err
    assert files() == {}


@pytest.mark.parametrize("command", ["export", "import"])
def test_graph_in_memory_does_not_move(graph: Cli, command: str) -> None:
    """A graph that keeps nothing says so."""
    fill(graph)
    graph("export", "--graph", GRAPH, "-o", "moved.ndjson")
    result = graph(
        command, *(["moved.ndjson"] if command == "import" else []), "--graph", "memory:"
    )

    assert result.code == 3
    assert "MemoryGraph" in result.err
    assert "Nothing was written" in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(graph: Cli, command: str) -> None:
    """Each has help, --json, --quiet and --graph, and a line of its own in docs/command-line.md."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    help = graph(command, "--help")

    assert help.code == 0
    for option in ("--json", "--quiet", "--graph"):
        assert option in help.out
    assert f"\nrecognition graph {command}" in page


def test_no_command_is_missing_from_these_tests(graph: Cli) -> None:
    """The list that the tests go through is the list that the command knows."""
    known = re.findall(r"^    ([a-z]+)  ", graph("--help").out, re.MULTILINE)

    assert known == COMMANDS


def test_interrupted_import_says_how_it_goes_on(tmp_path: Path, graph: Cli) -> None:
    """Ctrl-C in the middle: one line, exit code 130, and --restart brings it to its end."""
    fill(graph)
    graph("export", "--graph", GRAPH, "-o", "whole.ndjson")
    lines = Path("whole.ndjson").read_bytes().splitlines(keepends=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "recognition", "graph", "import", "-", "--graph", OTHER],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdin is not None
    process.stdin.write(b"".join(lines[:3]))
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with SqliteGraph("other.db") as other:
                if other.check():
                    break
        except RecognitionError:  # not made yet
            pass
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    restarted = graph("import", "whole.ndjson", "--graph", OTHER, "--restart")

    assert process.returncode == 130, err
    assert b"--restart" in err
    assert b"Traceback" not in err
    assert restarted.code == 0
    assert counts(graph, OTHER) == counts(graph, GRAPH)
