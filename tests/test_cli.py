"""The command `recognition`, as scripts and people call it."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import recognition
from recognition import cli
from recognition.cli import main
from recognition.demo import generate_events
from recognition.messages import UpdateByCriteria, json_schema, parse_update

ROOT = Path(__file__).parents[1]
GRAPH = "sqlite:///graph.db"
SINK = "sqlite:///warehouse.db"
COMMANDS = [
    "demo", "run", "plan", "apply", "worker", "replay", "outbox", "check", "explain",
    "forget", "unlink", "release", "stats", "graph",
    "schema", "sinks", "config",
]  # fmt: skip


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def cli_(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """The command, run inside an empty directory and without any setting from outside."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("RECOGNITION_"):
            monkeypatch.delenv(name)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as exc:
            code = int(exc.code or 0)
        return Result(code, *capsys.readouterr())

    return call


def event(number: int, anonymous_id: str | None = "a1", **fields: object) -> dict[str, object]:
    made: dict[str, object] = {
        "messageId": f"m{number}",
        "type": "identify" if "userId" in fields else "track",
        "timestamp": f"2026-01-01T10:{number:02}:00Z",
    }
    if anonymous_id is not None:
        made["anonymousId"] = anonymous_id
    return {**made, **fields}


def write(name: str, events: Iterable[object]) -> str:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in events]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def rows(columns: str = "message_id, user_id", database: str = "warehouse.db") -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(f"SELECT {columns} FROM events ORDER BY message_id").fetchall()


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path().iterdir()) if path.is_file()}


def test_earlier_rows_follow_when_the_visitor_is_identified(cli_: Cli) -> None:
    """Anonymous rows are loaded by one run, and carry the user after the next one."""
    first = write("1.ndjson", [event(1), event(2), event(3, "a2")])
    second = write("2.ndjson", [event(4, userId="u1", traits={"email": "a@example.com"})])

    before = cli_("run", first, "--graph", GRAPH, "--sink", SINK, "--load")
    loaded = rows()
    after = cli_("run", second, "--graph", GRAPH, "--sink", SINK, "--load", "--json")

    assert (before.code, after.code) == (0, 0)
    assert loaded == [("m1", None), ("m2", None), ("m3", None)]
    assert rows() == [("m1", "u1"), ("m2", "u1"), ("m3", None), ("m4", "u1")]
    assert after.json["rows_changed"] == 2
    assert after.json["updates_applied"] == 1
    assert after.json["rows_loaded"] == 1


def test_a_row_whose_owner_is_known_is_stamped_when_it_is_loaded(cli_: Cli) -> None:
    """No rewrite at all for an anonymous event that comes after the identify."""
    one = write("1.ndjson", [event(1, userId="u1")])
    two = write("2.ndjson", [event(2)])
    cli_("run", one, "--graph", GRAPH, "--sink", SINK, "--load")

    result = cli_("run", two, "--graph", GRAPH, "--sink", SINK, "--load", "--json")

    assert rows() == [("m1", "u1"), ("m2", "u1")]
    assert (result.json["stamped"], result.json["updates"]) == (1, 0)


def test_the_same_run_again_changes_nothing(cli_: Cli) -> None:
    """The second time every event is known, every row is there, and no update is made."""
    name = write("1.ndjson", [event(1), event(2), event(3, userId="u1")])
    arguments = ("run", name, "--graph", GRAPH, "--sink", SINK, "--load", "--json")
    cli_(*arguments, "--batch-size", "1")
    once = rows("*")

    again = cli_(*arguments)

    assert rows("*") == once
    assert (again.json["rows_loaded"], again.json["rows_changed"]) == (0, 0)


def test_without_load_the_rows_of_somebody_else_are_brought_up_to_date(cli_: Cli) -> None:
    """Rows that a pipeline wrote as they came get their owner, in one run over the same events."""
    events = [event(1), event(2, userId="u1"), event(3), event(4, "a9")]
    with closing(sqlite3.connect("warehouse.db")) as connection:
        connection.execute(
            "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT, timestamp TEXT)"
        )
        connection.executemany(
            "INSERT INTO events VALUES (?, ?, ?, ?)",
            [(e["messageId"], e["anonymousId"], e.get("userId"), e["timestamp"]) for e in events],
        )
        connection.commit()

    result = cli_("run", write("e.ndjson", events), "--graph", GRAPH, "--sink", SINK, "--json")

    assert rows() == [("m1", "u1"), ("m2", "u1"), ("m3", "u1"), ("m4", None)]
    assert (result.code, result.json["rows_changed"], result.json["stamped"]) == (0, 2, 0)


def test_without_a_sink_updates_wait_in_the_outbox(cli_: Cli) -> None:
    """They are announced, counted by `stats`, and applied by the next run that names a sink."""
    load = ("--graph", GRAPH, "--sink", SINK, "--load")
    cli_("run", write("1.ndjson", [event(1)]), *load)
    waiting = cli_("run", write("2.ndjson", [event(2, userId="u1")]), "--graph", GRAPH)
    pending = cli_("stats", "--graph", GRAPH, "--json").json["pending_updates"]

    cli_("run", write("3.ndjson", []), *load)

    assert "outbox" in waiting.err
    assert pending > 0
    assert rows() == [("m1", "u1")]


def test_a_target_column_of_its_own_is_created_and_filled_for_every_owned_row(cli_: Cli) -> None:
    """`--target-column` receives the owner of all rows; the user column stays as it came."""
    name = write("e.ndjson", [event(1), event(2, userId="u1"), event(3, "a2")])

    cli_(
        "run", name, "--graph", GRAPH, "--sink", SINK, "--load",
        "--target-column", "stitched_user_id", "--policy", "last_login",
    )  # fmt: skip

    assert rows("message_id, user_id, stitched_user_id") == [
        ("m1", None, "u1"),
        ("m2", "u1", "u1"),
        ("m3", None, None),
    ]


def test_traits_are_written_beside_the_user(cli_: Cli) -> None:
    """`--traits` names traits that an update sets too."""
    load = ("--graph", GRAPH, "--sink", SINK, "--load", "--traits", "email, plan")
    cli_("run", write("1.ndjson", [event(1)]), *load)

    cli_("run", write("2.ndjson", [event(2, userId="u1", traits={"email": "a@x.com"})]), *load)

    assert rows("user_id, context_traits_email, context_traits_plan")[0] == ("u1", "a@x.com", None)


def test_plan_shows_updates_and_sql_and_writes_nothing(cli_: Cli) -> None:
    """The same arguments as `run`: every file is byte for byte as before, and none is new."""
    arguments = ("--graph", GRAPH, "--sink", SINK, "--load")
    cli_("run", write("1.ndjson", [event(1), event(2)]), *arguments)
    second = write("2.ndjson", [event(3, userId="u1"), "broken"])
    before = files()

    plan = cli_("plan", second, *arguments)

    updates, sql = plan.out.split("\n\n", 1)
    assert files() == before
    assert plan.code == 1  # one line was rejected, though nothing was written
    assert parse_update(updates).set == {"user_id": "u1"}
    assert sql.lstrip().startswith("UPDATE events SET user_id=")
    assert "nothing was written" in plan.err


def test_plan_over_nothing_creates_nothing(cli_: Cli) -> None:
    """Neither the graph nor the warehouse need exist, and after `plan` they still do not."""
    name = write("e.ndjson", [event(1), event(2, userId="u1")])

    plain = cli_("plan", name, "--graph", GRAPH, "--sink", SINK)
    loading = cli_("plan", name, "--graph", GRAPH, "--sink", SINK, "--load", "--json")

    assert (plain.code, loading.code) == (0, 0)
    assert list(files()) == ["e.ndjson"]
    assert loading.json["stamped"] == 1


def test_plan_decides_what_run_then_does(cli_: Cli) -> None:
    """The planned updates are those of the run: same id, same columns, same criteria."""
    arguments = ("--graph", GRAPH, "--load", "--sink", SINK)
    cli_("run", write("1.ndjson", [event(1), event(2)]), *arguments)
    second = write("2.ndjson", [event(3, userId="u1")])

    planned = cli_("plan", second, *arguments, "--json").json
    run = cli_("run", second, *arguments, "--json", "--show-sql").json

    assert run["updates_applied"] == planned["updates"] == len(planned["update_messages"]) == 1
    assert run["sql"] == planned["sql"]


def test_updates_of_a_plan_can_be_applied(cli_: Cli) -> None:
    """`plan` without a sink gives update messages alone; `apply` takes them, twice as once."""
    name = write("e.ndjson", [event(1), event(2, userId="u1")])
    with closing(sqlite3.connect("warehouse.db")) as connection:
        connection.execute(
            "CREATE TABLE events (message_id TEXT, anonymous_id TEXT, user_id TEXT, timestamp TEXT)"
        )
        connection.execute("INSERT INTO events VALUES ('m1', 'a1', NULL, '2026-01-01T10:01:00Z')")
        connection.commit()
    Path("updates.ndjson").write_text(cli_("plan", name, "--graph", GRAPH).out)

    first = cli_("apply", "updates.ndjson", "--sink", SINK, "--json", "--show-sql")
    second = cli_("apply", "updates.ndjson", "--sink", SINK, "--json")

    assert rows() == [("m1", "u1")]
    assert (first.code, first.json["rows_matched"], first.json["rows_changed"]) == (0, 1, 1)
    assert (second.code, second.json["rows_matched"], second.json["rows_changed"]) == (0, 1, 0)
    assert first.json["sql"][0].startswith("UPDATE events")


def test_updates_that_cannot_be_read_are_rejected_and_the_rest_is_applied(cli_: Cli) -> None:
    """Broken, of another version, unbounded: each is told with its line, exit code 1."""
    cli_("run", write("1.ndjson", [event(1)]), "--graph", GRAPH, "--sink", SINK, "--load")
    name = write("2.ndjson", [event(2, userId="u1")])
    good = cli_("plan", name, "--graph", GRAPH, "--load").out.strip()
    body = json.loads(good)
    unbounded = {**body, "where": [{"kind": "empty", "column": "user_id"}]}
    write("updates.ndjson", ["broken", {**body, "version": 2}, unbounded, good])

    result = cli_("apply", "updates.ndjson", "--sink", SINK)

    assert result.code == 1
    assert rows() == [("m1", "u1")]
    assert re.search(r"updates rejected +3\n", result.out)
    for line, reason in (1, "not a JSON object"), (2, "version 2"), (3, "every row"):
        assert re.search(rf"rejected: updates\.ndjson:{line}: .*{reason}", result.err)


def test_events_that_cannot_be_read_are_rejected_and_the_rest_goes_on(cli_: Cli) -> None:
    """Exit code 1; the first 20 are listed, all are counted, all are in the rejects file."""
    name = write("e.ndjson", [event(1), *["broken"] * 30, event(2, userId="u1")])

    result = cli_("run", name, "--graph", GRAPH, "--sink", SINK, "--load", "--rejects", "no.ndjson")

    kept = [json.loads(line) for line in Path("no.ndjson").read_text().splitlines()]
    assert result.code == 1
    assert rows() == [("m1", "u1"), ("m2", "u1")]
    assert re.search(r"rejected +30\n", result.out)
    assert result.err.count("rejected: e.ndjson:") == 20
    assert "rejected: e.ndjson:2: not JSON" in result.err
    assert "rejected: 10 more" in result.err
    assert [reject["line"] for reject in kept] == list(range(2, 32))
    assert kept[0]["raw"] == "broken"


def test_the_rejects_file_is_named_where_nothing_is_said(cli_: Cli) -> None:
    """`rejects.ndjson` in the working directory, and only if there is a reject."""
    cli_("run", write("good.ndjson", [event(1)]), "--graph", GRAPH)
    without = set(files())

    result = cli_("run", write("bad.ndjson", ["broken"]), "--graph", GRAPH, "--json")

    assert "rejects.ndjson" not in without
    assert "rejects.ndjson" in files()
    assert result.json["rejects_file"] == "rejects.ndjson"


def test_events_come_from_several_files_gzip_csv_and_stdin(
    cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sources of one run are one set of events."""
    Path("1.ndjson.gz").write_bytes(gzip.compress(json.dumps(event(1)).encode()))
    Path("2.csv").write_text(
        "message_id,type,anonymous_id,user_id,timestamp\nm2,identify,a1,u1,2026-01-01T10:02:00Z\n"
    )
    stdin = io.TextIOWrapper(io.BytesIO(json.dumps(event(3)).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)

    result = cli_("run", "1.ndjson.gz", "2.csv", "-", "--graph", GRAPH, "--sink", SINK, "--load")

    assert result.code == 0
    assert rows() == [("m1", "u1"), ("m2", "u1"), ("m3", "u1")]


def test_show_sql_prints_the_statements_that_were_sent(cli_: Cli) -> None:
    """After the counts; each ends with a semicolon, before its remarks."""
    arguments = ("--graph", GRAPH, "--sink", SINK, "--load", "--show-sql")
    cli_("run", write("1.ndjson", [event(1)]), *arguments)

    result = cli_("run", write("2.ndjson", [event(2, userId="u1")]), *arguments)

    assert re.search(r"^UPDATE events SET user_id=.*;$", result.out, re.MULTILINE)


def test_references_older_than_the_retention_are_dropped_by_a_run(
    cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days of references that no claim can reach any more leave the graph; recent ones stay."""
    today = datetime.now(UTC).isoformat()
    name = write("e.ndjson", [event(1), event(2), event(3, timestamp=today)])
    cli_("run", name, "--graph", GRAPH)
    kept = cli_("stats", "--graph", GRAPH, "--json").json["references"]
    monkeypatch.setenv("RECOGNITION_RETENTION_DAYS", "40")

    cli_("run", name, "--graph", GRAPH)

    assert kept == 3
    assert cli_("stats", "--graph", GRAPH, "--json").json["references"] == 1


def test_settings_of_the_file_hold_for_every_command(cli_: Cli) -> None:
    """Graph, sink and traits come from recognition.toml; an argument wins over it."""
    Path("recognition.toml").write_text(f'graph = "{GRAPH}"\nsink = "{SINK}"\nworkspace = "w"\n')

    cli_("run", write("e.ndjson", [event(1), event(2, userId="u1")]), "--load")
    same = cli_("explain", "user_id:u1")
    other = cli_("explain", "user_id:u1", "--workspace", "other")

    assert rows() == [("m1", "u1"), ("m2", "u1")]
    assert (same.code, other.code) == (0, 1)


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        ("m1", "device_split gives the event to a claim of its device"),
        ("user_id:u1", "email:a@example.com = user_id:u1, seen, message m2, holds"),
        ("email:A@Example.com ", "identifier user_id:u1"),
        ("anonymous_id:a1", "until 2025-12-02T10:02:00.000000Z nobody"),
    ],
)
def test_explain_says_why(cli_: Cli, subject: str, told: str) -> None:
    """A message, a known identifier in any form, a device: the chain of events and rules."""
    name = write("e.ndjson", [event(1), event(2, userId="u1", traits={"email": "a@example.com"})])
    cli_("run", name, "--graph", GRAPH)

    plain = cli_("explain", subject, "--graph", GRAPH)
    document = cli_("explain", subject, "--graph", GRAPH, "--json").json

    assert plain.code == 0
    assert plain.out.startswith(f"{subject}: u1\n")
    assert told in plain.out
    assert document["owner"] == "u1"
    assert document["because"]


def test_explain_of_something_never_seen_is_exit_code_1(cli_: Cli) -> None:
    """What is not there is told, and can be tested by a script."""
    cli_("run", write("e.ndjson", [event(1)]), "--graph", GRAPH)

    result = cli_("explain", "user_id:nobody", "--graph", GRAPH, "--json")

    assert result.code == 1
    assert result.json["found"] is False


def test_forget_takes_the_person_out_of_the_rows(cli_: Cli) -> None:
    """Recognised rows fall back to unknown, and the next person of the device does not get them."""
    load = ("--graph", GRAPH, "--sink", SINK, "--load")
    cli_("run", write("1.ndjson", [event(1)]), *load)
    cli_("run", write("2.ndjson", [event(2, userId="u1")]), *load)

    result = cli_("forget", "u1", "--graph", GRAPH, "--sink", SINK, "--json")
    cli_("run", write("3.ndjson", [event(3, userId="u2")]), *load)

    assert (result.code, result.json["rows_changed"]) == (0, 1)
    assert rows() == [("m1", None), ("m2", "u1"), ("m3", "u2")]


def test_unlink_parts_two_identifiers(cli_: Cli) -> None:
    """Rows that one of them had only by the link fall to what is left of it."""
    load = ("--graph", GRAPH, "--sink", SINK, "--load")
    mail = {"email": "a@example.com"}
    cli_("run", write("1.ndjson", [event(1), event(2, type="identify", traits=mail)]), *load)
    cli_("run", write("2.ndjson", [event(3, "a2", userId="u1", traits=mail)]), *load)
    linked = rows()

    result = cli_("unlink", "email:a@example.com", "user_id:u1", "--graph", GRAPH, "--sink", SINK)

    assert result.code == 0
    assert linked == [("m1", "u1"), ("m2", "u1"), ("m3", "u1")]
    assert rows() == [("m1", "a@example.com"), ("m2", "a@example.com"), ("m3", "u1")]


def test_release_takes_a_device_from_everybody(cli_: Cli) -> None:
    """Its rows become nobody's; without a sink the updates wait, and that is said."""
    load = ("--graph", GRAPH, "--sink", SINK, "--load")
    cli_("run", write("1.ndjson", [event(1), event(2, userId="u1")]), *load)

    result = cli_("release", "a1", "--graph", GRAPH)
    cli_("run", write("2.ndjson", []), *load)

    assert "outbox" in result.err
    assert rows() == [("m1", None), ("m2", "u1")]


def test_stats_count_what_the_graph_holds(cli_: Cli) -> None:
    """As a table, and as one JSON document."""
    cli_("run", write("e.ndjson", [event(1), event(2, userId="u1")]), "--graph", GRAPH)

    document = cli_("stats", "--graph", GRAPH, "--json").json
    table = cli_("stats", "--graph", GRAPH).out

    assert (document["anonymous_ids"], document["persons"], document["claims"]) == (1, 1, 1)
    assert re.search(r"anonymous ids +1\n", table)


def test_schema_is_the_schema_of_the_message(cli_: Cli) -> None:
    """`schema` prints what docs and other languages validate with."""
    assert cli_("schema").json == json_schema()


def test_sinks_are_listed_with_what_they_lack(cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite is always ready; a sink without its driver names the command that installs it."""
    monkeypatch.setitem(sys.modules, "duckdb", None)
    monkeypatch.delitem(sys.modules, "recognition.sinks.duckdb", raising=False)

    plain = cli_("sinks")
    document = {row["scheme"]: row["missing"] for row in cli_("sinks", "--json").json}

    assert re.search(r"^sqlite +ready$", plain.out, re.MULTILINE)
    assert document["sqlite"] is None
    assert 'pip install "recognition[duckdb]"' in document["duckdb"]


def test_config_shows_the_settings_in_force_without_passwords(cli_: Cli) -> None:
    """What holds is printed; the password in a URL is not."""
    result = cli_("config", "--sink", "x://ann:hunter2@host/db", "--policy", "first_claim")
    document = cli_("config", "--sink", "x://ann:hunter2@host/db", "--json").json

    assert 'sink = "x://ann:***@host/db"' in result.out
    assert 'policy = "first_claim"' in result.out
    assert document["sink"] == "x://ann:***@host/db"


def test_what_a_sink_is_told_comes_from_the_settings(
    cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File and environment reach the sink of every command; a secret among them is not shown."""
    write("e.ndjson", [event(1, userId=None), event(2)])
    assert cli_("run", "e.ndjson", "--load", "--sink", SINK).code == 0
    Path("recognition.toml").write_text('[sink_options]\nconnect_args = {password = "hunter2"}\n')
    monkeypatch.setenv("RECOGNITION_SINK_OPTIONS__TIMEOUT", "60")

    shown = cli_("config", "--sink", SINK)
    commands = [
        cli_(*command, "--sink", SINK)
        for command in (("run", "e.ndjson"), ("apply", "e.ndjson"), ("forget", "u1"))
    ]
    Path("recognition.toml").unlink()

    assert 'sink_options = {"connect_args": {"password": "***"}, "timeout": "60"}' in shown.out
    assert {each.code for each in commands} == {2}
    assert all("takes no option 'connect_args'" in each.err for each in commands)
    assert cli_("run", "e.ndjson", "--sink", SINK).code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("run", "e.ndjson", "--sink", "nosuch://ann:hunter2@host/db"),
            "installed: bigquery, ",
        ),
        (("run", "e.ndjson", "--sink", "//ann:hunter2@host"), "scheme"),
        (("run", "e.ndjson", "--graph", "nosuch://ann:hunter2@host/db"), "memory, mongodb, sqlite"),
        (("run", "e.ndjson", "--load"), "--sink URL"),
        (("run", "e.ndjson", "--layout", "segments"), "there are: segment-single-table"),
        (("run", "e.ndjson", "--format", "segments"), "there are: segment"),
        (("run", "e.ndjson", "--lookback-days", "-1"), "--lookback-days"),
        (("run", "e.ndjson", "--policy", "newest"), "invalid choice"),
        (("run", "e.ndjson", "--config", "none.toml"), "none.toml cannot be read"),
        (("run", "none.ndjson"), "none.ndjson is not there"),
        (("apply", "none.ndjson", "--sink", SINK), "none.ndjson is not there"),
        (("apply", "e.ndjson"), "--sink URL"),
        (("stats", "--graph", "sqlite:///none.db"), "there is no graph"),
        (("forget", "anonymous_id:a1", "--graph", "memory:"), "no known identifier"),
        (("nosuch",), "invalid choice"),
        ((), "required"),
    ],
)
def test_wrong_usage_and_configuration_are_exit_code_2(
    cli_: Cli, arguments: tuple[str, ...], told: str
) -> None:
    """One paragraph on stderr says what is wrong; nothing is written, no secret is shown."""
    write("e.ndjson", [event(1)])

    result = cli_(*arguments)

    assert result.code == 2
    assert result.out == ""
    assert told in result.err
    assert "Traceback" not in result.err
    assert "hunter2" not in result.err
    assert list(files()) == ["e.ndjson"]


def test_an_unknown_setting_is_exit_code_2_with_the_nearest_known_one(
    cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for file and environment."""
    monkeypatch.setenv("RECOGNITION_LOOKBACK", "3")

    result = cli_("config")

    assert result.code == 2
    assert "RECOGNITION_LOOKBACK_DAYS" in result.err


def test_a_graph_that_is_none_is_exit_code_3(cli_: Cli) -> None:
    """A database of somebody else is not touched, and the text says so."""
    with closing(sqlite3.connect("other.db")) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = files()

    result = cli_("run", write("e.ndjson", [event(1)]), "--graph", "sqlite:///other.db")

    assert result.code == 3
    assert "no recognition graph" in result.err
    assert "Nothing was written" in result.err
    assert {name: before[name] for name in before} == {"other.db": files()["other.db"]}


def test_a_failure_on_the_way_says_what_was_done_before(cli_: Cli) -> None:
    """The first file is done, the second cannot be read: the counts of the first are told."""
    good = write("good.ndjson", [event(1), event(2)])
    Path("directory").mkdir()

    result = cli_("run", good, "directory", "--graph", GRAPH, "--batch-size", "1")

    assert result.code == 2
    assert "directory cannot be opened" in result.err
    assert "2 events went into the graph" in result.err


def test_a_fault_of_our_own_is_exit_code_3_and_shows_no_value(
    cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody foresaw is one line without its text; --traceback shows all."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError("ann@example.com")

    monkeypatch.setattr(cli, "json_schema", fail)

    result = cli_("schema")

    assert result.code == 3
    assert "ZeroDivisionError" in result.err
    assert "ann@example.com" not in result.err
    with pytest.raises(ZeroDivisionError):
        cli_("schema", "--traceback")


def test_traceback_shows_where_an_error_comes_from(cli_: Cli) -> None:
    """For whoever looks for the cause; otherwise an error is one paragraph."""
    with pytest.raises(recognition.ConfigurationError):
        cli_("stats", "--graph", "sqlite:///none.db", "--traceback")


def test_quiet_says_nothing_but_rejects(cli_: Cli) -> None:
    """Results are on stdout, so that stderr is empty where nothing is wrong."""
    name = write("e.ndjson", [event(1), event(2, userId="u1")])

    good = cli_("run", name, "--graph", GRAPH, "--quiet")
    bad = cli_("run", write("b.ndjson", ["broken"]), "--graph", GRAPH, "--quiet")

    assert good.err == ""
    assert bad.err == "rejected: b.ndjson:1: not JSON\n"


def test_progress_without_a_terminal_is_a_line_now_and_then(
    cli_: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With count and rate, on stderr."""
    monkeypatch.setattr(cli._Progress, "_EVERY", 0.0)

    result = cli_("run", write("e.ndjson", [event(1)]), "--graph", GRAPH)

    assert re.search(r"recognition: 1 events, [0-9,]+/s\n", result.err)


def test_progress_on_a_terminal_is_a_bar(cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by rich on stderr, gone at the end; stdout holds the results alone."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    result = cli_("run", write("e.ndjson", [event(1), event(2)]), "--graph", GRAPH, "--json")

    assert result.json["events"] == 2
    assert "2 events" in terminal.getvalue()


def test_version_is_the_version_of_the_package(cli_: Cli) -> None:
    """`--version` prints it."""
    assert cli_("--version").out == f"recognition {recognition.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(cli_: Cli, command: str) -> None:
    """Each has help, --json and --quiet, and a heading of its own in docs/command-line.md."""
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")

    help = cli_(command, "--help")

    assert help.code == 0
    assert "--json" in help.out
    assert "--quiet" in help.out
    assert f"\n## {command}\n" in page


def test_no_command_is_missing_from_these_tests(cli_: Cli) -> None:
    """The list that the tests go through is the list that the command knows."""
    known = re.findall(r"^    ([a-z]+)  ", cli_("--help").out, re.MULTILINE)

    assert known == COMMANDS


# ------------------------------------------------------------------------------ as a real process


def _process(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "recognition", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """`recognition schema | head -1`: no traceback, no complaint."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "recognition", "schema"],
        stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path, check=False,
    )  # fmt: skip
    os.close(writing)

    assert process.returncode == 141
    assert process.stderr == b""


def test_an_interrupt_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """Ctrl-C while events come from stdin: exit code 130, and what was decided is in the graph."""
    with _process("run", "-", "--graph", GRAPH, "--batch-size", "1", cwd=tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(event(1)) + "\n" + json.dumps(event(2)) + "\n")
        process.stdin.flush()
        _wait_for(lambda: _events_in(tmp_path / "graph.db") >= 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)

    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert "stopped" in err


def _events_in(graph: Path) -> int:
    if not graph.exists():
        return 0
    with closing(sqlite3.connect(graph)) as connection:
        try:
            found = connection.execute("SELECT count(*) FROM timelines").fetchone()
        except sqlite3.OperationalError:  # the file is there, its tables are not yet
            return 0
        return int(found[0])


def _wait_for(reached: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "the process did not get there in 30 s"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- demo


def test_demo_tells_the_story_of_its_rows(cli_: Cli) -> None:
    """Counts before and after, one visitor's rows, the SQL, the files, and where to go on."""
    result = cli_("demo", "--visitors", "120", "--dir", "demo")

    assert result.code == 0
    assert re.search(r"with a user, as the events came +[0-9,]+ +[0-9]+%", result.out)
    assert re.search(r"\n  2026-01-.* -  .* user-[0-9]{6}\n", result.out)
    assert re.search(r"^UPDATE events\n  SET user_id=", result.out, re.MULTILINE)
    assert "demo/warehouse.db" in result.out
    assert re.search(r"Go on: cd demo && .*recognition explain [0-9a-f-]{36}\n", result.out)


def test_demo_of_one_visitor_who_never_signs_in_has_little_to_tell(cli_: Cli) -> None:
    """No user, no update, no SQL: the counts say so, and nothing fails."""
    result = cli_("demo", "--visitors", "1")

    assert result.code == 0
    assert re.search(r"with a user now +0 +0%", result.out)


@pytest.mark.parametrize("sink", ["sqlite", "duckdb"])
def test_demo_counts_what_the_warehouse_holds(cli_: Cli, sink: str) -> None:
    """Its numbers are the warehouse's own, and more rows have a user than had one before."""
    result = cli_("demo", "--visitors", "120", "--sink", sink, "--json", "--quiet")
    counts = result.json
    came = {made["messageId"]: "userId" in made for made in generate_events(visitors=120)}

    assert result.err == ""
    assert counts["rows"] == len(came)
    assert counts["with_user_in_event"] == sum(came.values())
    assert counts["with_user_now"] > counts["with_user_when_written"]
    assert counts["with_user_when_written"] > counts["with_user_in_event"]
    if sink == "sqlite":
        users = rows("count(*), count(user_id)", "recognition-demo/warehouse.db")
        assert users == [(counts["rows"], counts["with_user_now"])]


def test_demo_replaces_what_a_demo_has_written(cli_: Cli) -> None:
    """The second demo in the same directory starts anew and gives the same."""
    first = cli_("demo", "--visitors", "60", "--json").json
    second = cli_("demo", "--visitors", "60", "--json").json

    volatile = ("seconds", "files")
    assert {k: v for k, v in first.items() if k not in volatile} == {
        k: v for k, v in second.items() if k not in volatile
    }


def test_demo_leaves_other_directories_alone(cli_: Cli) -> None:
    """A directory with files of somebody else is refused, and stays as it is."""
    Path("mine").mkdir()
    Path("mine/graph.db").write_text("precious")

    result = cli_("demo", "--dir", "mine")

    assert result.code == 2
    assert Path("mine/graph.db").read_text() == "precious"
    assert os.listdir("mine") == ["graph.db"]


def test_what_a_demo_leaves_behind_can_be_used(cli_: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its directory holds settings with which every other command works."""
    subject = cli_("demo", "--visitors", "60").out.rsplit(" ", 1)[1].strip()
    monkeypatch.chdir("recognition-demo")

    explained = cli_("explain", subject)
    again = cli_("run", "events.ndjson", "--load", "--json").json

    assert explained.code == 0
    assert "policy device_split gives the event to a claim of its device" in explained.out
    assert (again["rows_loaded"], again["rows_changed"]) == (0, 0)


def test_made_up_events_are_the_same_for_the_same_seed() -> None:
    """Byte for byte, and others for another seed."""
    first = [json.dumps(made) for made in generate_events(50, seed=1)]

    assert first == [json.dumps(made) for made in generate_events(50, seed=1)]
    assert first != [json.dumps(made) for made in generate_events(50, seed=2)]


def test_made_up_events_have_the_habits_and_faults_of_real_ones() -> None:
    """All kinds of calls, shared devices, repeats, late ones, bots, blocked ids, servers."""
    made = list(generate_events(1500))
    bodies = [json.dumps(one) for one in made]
    users: dict[object, set[object]] = {}
    for one in made:
        if "userId" in one and "anonymousId" in one:
            users.setdefault(one["anonymousId"], set()).add(one["userId"])
    ids = Counter(one["messageId"] for one in made)
    late = [one for one in made if str(one["receivedAt"])[:13] > str(one["timestamp"])[:13]]

    assert {one["type"] for one in made} == {"page", "track", "identify", "group", "alias"}
    assert sum(len(found) > 1 for found in users.values()) >= 5
    assert sum(times > 1 for times in ids.values()) >= len(made) // 200
    assert len(late) >= len(made) // 100
    assert sum("Googlebot" in body for body in bodies) >= 10
    assert any('"userId": "undefined"' in body for body in bodies)
    assert any("anonymousId" not in one for one in made)
    received = [str(one["receivedAt"]) for one in made]
    assert received == sorted(received)


def test_update_messages_of_a_plan_are_what_the_schema_says(cli_: Cli) -> None:
    """What `plan --json` shows validates against what `schema` prints."""
    import jsonschema

    cli_("run", write("1.ndjson", [event(1)]), "--graph", GRAPH)
    planned = cli_("plan", write("2.ndjson", [event(2, userId="u1")]), "--graph", GRAPH, "--json")
    messages = planned.json["update_messages"]

    assert messages
    for message in messages:
        jsonschema.validate(message, cli_("schema").json)
        assert UpdateByCriteria.model_validate(message).set == {"user_id": "u1"}


# -------------------------------------------------------------------- what a graph was decided with


def test_undo_goes_by_the_rules_that_the_graph_was_decided_with(cli_: Cli) -> None:
    """forget after a run with another policy and column needs neither of them said again."""
    Path("e.ndjson").write_text(
        "".join(
            json.dumps(
                {"messageId": f"m{n}", "type": "track", "anonymousId": "d", "userId": user}
                | {"timestamp": f"2026-01-01T0{n}:00:00Z"}
            )
            + "\n"
            for n, user in enumerate(["u1", None, "u2"])
        )
    )
    target = ["--graph", GRAPH, "--sink", "sqlite:///own.db"]
    ran = cli_(
        *("run", "e.ndjson", "--load", "--policy", "last_login", "--target-column", "stitched"),
        *target,
    )
    refused = cli_("run", "e.ndjson", "--policy", "first_claim", *target)
    explained = cli_("explain", "m1", "--graph", GRAPH)
    forgot = cli_("forget", "u2", *target)
    with closing(sqlite3.connect("own.db")) as connection:
        rows = connection.execute("SELECT user_id, stitched FROM events ORDER BY message_id")
        left = rows.fetchall()

    assert (ran.code, refused.code, explained.code, forgot.code) == (0, 2, 0, 0)
    assert "policy last_login; asked for is policy first_claim" in refused.err
    assert explained.out.startswith("m1: u2")
    assert left == [("u1", None), (None, None), ("u2", None)]
