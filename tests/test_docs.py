"""What the documentation says is so: what is made is fresh, what is shown runs or is read."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import secrets
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pytest
import sqlglot
import yaml

from recognition.cli import _build_parser
from recognition.config import Settings, load_settings
from recognition.delivery import CIRCUIT_OPENS, Deliverer
from recognition.events import MAX_ID_LENGTH, MAX_LINE_BYTES
from recognition.graph.mongo import PERIOD, SLOTS, MongoGraph
from recognition.graph.rendering import MOST_EDGES, MOST_NODES
from recognition.identity import BLOCKED
from recognition.layouts import LAYOUTS
from recognition.messages import parse_update
from recognition.planner import plan_updates
from recognition.sinks import _BUILT_IN, open_sink

if TYPE_CHECKING:
    import mariadb as mariadb_server
    import postgres as postgres_server
    from browser import Browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

#: The pages of the databases that are here: what they show is executed.
HERE = ["clickhouse", "embedded", "mysql", "postgresql"]
#: Those of the others: sqlglot reads what they show; it has the same names for the dialects.
ELSEWHERE = ["bigquery", "databricks", "redshift", "snowflake"]
DATABASES = HERE + ELSEWHERE

#: Other programs that a block may call. What they are told is not ours.
PROGRAMS = {"docker", "install", "openssl", "sqlite3", "systemctl", "useradd"}


def ids(page: Path) -> str:
    return page.name


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block, those of list items too."""
    return re.findall(
        r"^ *```(\S*)\n(.*?)^ *```$", text_of(page), re.MULTILINE | re.DOTALL
    )  # fmt: skip


def blocks(language: str) -> list[Any]:
    """All blocks of a language, as parameters of a test."""
    return [
        pytest.param(page, text, id=f"{page.stem}-{place}")
        for page in PAGES
        for place, (kind, text) in enumerate(blocks_of(page))
        if kind == language
    ]


# ---------------------------------------------------------------------------------- what is made


def generator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """`python docs/generate.py --check`, of this folder."""
    spec = spec_from_file_location("generate", folder / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    main: Callable[[], int] = module.main
    return main


def test_what_is_made_of_the_code_is_fresh(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python docs/generate.py` would change nothing: references, schema and pictures."""
    code = generator(DOCS, monkeypatch)()

    assert capsys.readouterr().out == "", "run: python docs/generate.py"
    assert code == 0


def test_stale_pages_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy in which a default is another one is reported, and nothing is written."""
    for path in (*DOCS.glob("*.md"), *DOCS.glob("*.json"), DOCS / "generate.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page = tmp_path / "configuration.md"
    stale = text_of(page).replace("| `batch_size` | `1000` |", "| `batch_size` | `500` |")
    page.write_text(stale, encoding="utf-8")
    code = generator(tmp_path, monkeypatch)()
    said = capsys.readouterr().out

    assert code == 1
    assert f"{tmp_path.name}/configuration.md differs" in said
    assert f"{tmp_path.name}/img/policies.svg differs" in said
    assert "messages.md" not in said
    assert text_of(page) == stale
    assert not (tmp_path / "img").exists()


# ------------------------------------------------------------------------------------- the links


def anchors_of(page: Path) -> set[str]:
    """As GitHub and as Python-Markdown name the headings; a link has to be right in both."""
    outside = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    found = []
    for names in (lambda s: s.replace(" ", "-"), lambda s: re.sub(r"[-\s]+", "-", s)):
        found.append(
            {
                names(re.sub(r"[^\w\s-]", "", heading).strip().lower())
                for heading in re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
            }
        )
    return found[0] & found[1]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    """Every relative link, and every picture, names a file that exists, and a heading in it."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.is_file() or (anchor and anchor not in anchors_of(path)):
            broken.append(target)

    assert broken == []


def test_pages_are_reached_from_everywhere() -> None:
    """Each page is in the navigation of the site and in the table of its first page, once."""
    site = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))

    def leaves(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        else:
            for below in node.values() if isinstance(node, dict) else node:
                yield from leaves(below)

    pages = [page.name for page in PAGES[1:]]
    table = re.findall(r"^\| \[[^]]+\]\(([\w-]+\.md)\)", text_of(DOCS / "index.md"), re.MULTILINE)

    assert sorted(leaves(site["nav"])) == pages
    assert sorted(["index.md", *table]) == pages
    assert [name for name in leaves(site["nav"]) if name != "index.md"] == table


# ---------------------------------------------------------------------------------- the examples


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_says_its_language(page: Path) -> None:
    """So that none escapes these tests; what is `text` is no example."""
    kinds = {kind for kind, _ in blocks_of(page)}

    assert kinds <= {"python", "sh", "sql", "toml", "json", "text"}
    for kind, text in blocks_of(page):
        if kind == "text":
            assert not re.search(r"^(pip|make|python|[$>]) ", text, re.MULTILINE)


@cache
def _tests() -> str:
    return "\n".join(
        text_of(path) for path in Path(__file__).parent.glob("test_*.py") if "docs" not in path.name
    )


#: One test of `test_readme.py` runs both.
TOGETHER = {"README.md", "quickstart.md"}


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)], ids=ids)
def test_every_page_with_python_is_run_by_a_test(page: Path) -> None:
    """Where the subject's server is. A page that is new has to have a test of its own."""
    named = re.search(rf'compile\(.*"{re.escape(page.name)}", "exec"', _tests())

    assert named or page.name in TOGETHER


@cache
def _extras() -> set[str]:
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    return set(project["optional-dependencies"])


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a script, without comments; pipes and lists are taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        for word in lexer:
            if set(word) <= set("|&;"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


@pytest.mark.parametrize(("page", "text"), blocks("sh"))
def test_commands_are_commands(
    page: Path, text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The shell reads them; ours are taken by the real parser, extras, targets and files exist."""
    script = tmp_path / "script"
    script.write_text(text, encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)
    makefile = text_of(ROOT / "Makefile")
    for words in _commands(text):
        program, *rest = words
        program = program.rpartition("/")[2]
        if program == "recognition":
            try:
                parsed = _parser().parse_args(rest)
            except SystemExit:
                pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
            assert callable(parsed.command)
        elif program == "pip":
            assert rest[0] == "install"
            for name in rest[1:]:
                package, extras = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?", name).groups()  # type: ignore[union-attr]
                if package == "recognition":
                    assert set(extras.split(",") if extras else []) <= _extras()
        elif program == "make":
            assert re.search(rf"^{rest[0]}: ", makefile, re.MULTILINE)
        elif program in ("python", "python3", "spark-submit"):
            assert rest[0] == "-m" or (ROOT / rest[0]).is_file()
        else:
            assert program in PROGRAMS
        for word in rest:
            if word.startswith(("examples/", "docs/", "benchmarks/")):
                assert (ROOT / word).exists()


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_inside_sentences_exist(page: Path) -> None:
    """Each `recognition ...` names a command, and its options are options of that command."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    unknown = []
    for code in re.findall(r"`recognition ([a-z][^`]*)`", prose):
        words = code.partition("|")[0].rstrip("\\").split()
        parser = _parser()
        while (below := _subparsers(parser)) and words:
            name = words.pop(0)
            if name not in below:
                unknown.append(code)
                break
            parser = below[name]
        known = {name for action in parser._actions for name in action.option_strings}
        unknown += [code for word in words if word.startswith("-") and word not in {*known, "-"}]

    assert unknown == []


@cache
def _parser() -> argparse.ArgumentParser:
    return _build_parser()


def _subparsers(parser: Any) -> dict[str, Any]:
    for action in parser._actions:
        if isinstance(action.choices, dict):
            return action.choices
    return {}


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_settings_are_settings(page: Path, text: str, tmp_path: Path) -> None:
    """A TOML block is a `recognition.toml` that is read, or says in its first line what else."""
    if other := re.match(r"# (\S+\.toml)\n", text):
        assert other[1] != "recognition.toml"
        assert tomllib.loads(text)
        return
    file = tmp_path / "recognition.toml"
    file.write_text(text, encoding="utf-8")

    assert load_settings({}, {}, file) != Settings()


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_messages_are_messages(page: Path, text: str) -> None:
    """Each JSON block is an update message that this release reads."""
    assert json.loads(text)["kind"] == "update_by_criteria"
    assert parse_update(text).version == 1


def statements_of(name: str) -> list[str]:
    """What a page shows in SQL: first what makes tables and users, then the rest."""
    text = "".join(text for kind, text in blocks_of(DOCS / f"{name}.md") if kind == "sql")
    found = re.sub(r" *--.*", "", text).split(";")
    return sorted(filter(None, map(str.strip, found)), key=lambda sql: sql[:6] != "CREATE")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_sql_is_of_that_database(name: str) -> None:
    """A parser of its dialect reads each statement; what it knows by the first word are grants."""
    for statement in statements_of(name):
        (parsed,) = sqlglot.parse(statement, dialect=name)
        assert parsed is not None
        if parsed.key == "command":
            assert re.match(r"(GRANT|CREATE ROLE|CALL) ", statement)


def test_only_pages_of_databases_show_sql() -> None:
    """Whose SQL it is has to be known."""
    shown = {page.values[0].stem for page in blocks("sql")}

    assert shown == set(DATABASES)
    assert all(len(statements_of(name)) >= 1 for name in DATABASES)


UPDATE = """{"kind": "update_by_criteria", "version": 1, "id": "u", "workspace": "w",
    "table": "events", "set": {"user_id": "u1", "context_traits_email": "a@example.com"%s},
    "where": [{"kind": "equals", "column": "anonymous_id", "value": "a1"},
              {"kind": "empty", "column": "user_id"}],
    "sequence": %d, "created_at": "2026-01-01T00:00:00Z"}"""
ROW = (
    "INSERT INTO events (message_id, anonymous_id, timestamp)"
    " VALUES ('m1', 'a1', '2026-01-01 00:00:00')"
)


def apply_to_page(url: str) -> int:
    """Rows that an update changes, with a version, and without, which needs the ledger."""
    with closing(open_sink(url)) as sink:
        first = sink.apply(plan_updates([parse_update(UPDATE % ("", 1))]))
        again = sink.apply(plan_updates([parse_update(UPDATE % (', "recognition_version": 2', 2))]))
        refused = (*first.rejected, *again.rejected)
        assert refused == (), str(refused)  # said also where no pytest rewrites it
        return first.rows_changed


def test_tables_and_grants_of_postgresql_suffice(postgres: postgres_server.GivenServer) -> None:
    """They are made as the page says, and that role may apply updates, the first with a ledger."""
    with postgres.database() as database, postgres.new_role(database) as (role, password):
        for statement in statements_of("postgresql"):
            named = statement.replace("analytics", database).replace("TO recognition", f"TO {role}")
            postgres.run(named, database=database)
        postgres.run(ROW, database=database)

        assert apply_to_page(postgres.url(database, user=role, password=password)) == 1


def test_tables_and_grants_of_mariadb_suffice(mariadb: mariadb_server.GivenServer) -> None:
    """They are made as the page says, and that user may apply updates, the first with a ledger."""
    user = f"u_{secrets.token_hex(6)}"
    with mariadb.database() as database:
        try:
            for statement in statements_of("mysql"):
                named = statement.replace("analytics", database).replace("loader@", f"{user}@")
                mariadb.run(named.replace("%", "%%"), database=database)
            mariadb.run(ROW, database=database)

            assert apply_to_page(mariadb.url(database, user=user, password="...")) == 1
        finally:
            mariadb.run(f"DROP USER IF EXISTS {user}@'%%'")


@pytest.mark.parametrize("scheme", ["sqlite", "duckdb"])
def test_table_of_files_suffices(scheme: str, tmp_path: Path) -> None:
    """It is made as the page says, and takes updates."""
    driver = sqlite3 if scheme == "sqlite" else duckdb
    with closing(driver.connect(tmp_path / "warehouse")) as connection:
        for statement in [*statements_of("embedded"), ROW]:
            connection.execute(statement)
        connection.commit()

    assert apply_to_page(f"{scheme}:///{tmp_path}/warehouse") == 1


CLICKHOUSE = """
import json, sys
import clickhouse_connect
from test_docs import ROW, apply_to_page

statements, folder = json.load(sys.stdin), sys.argv[1]
client = clickhouse_connect.get_client(interface="chdb", path=folder)
client.command("CREATE DATABASE analytics")
client.command("USE analytics")
for statement in statements:
    if statement.startswith("CREATE"):
        client.command(statement)
    else:
        client.command("SELECT formatQuery({sql:String})", parameters={"sql": statement})
client.command(ROW)
client.close()
print(apply_to_page(f"chdb://{folder}?database=analytics"))
"""


def test_table_of_clickhouse_suffices(tmp_path: Path) -> None:
    """The engine makes it as the page says and takes updates; its own parser reads the grants."""
    done = subprocess.run(  # apart, because a process can have one directory of the engine open
        [sys.executable, "-c", CLICKHOUSE, str(tmp_path)],
        input=json.dumps(statements_of("clickhouse")),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == "1\n", done.stderr


# --------------------------------------------------------------------------------- the databases


def test_every_database_has_a_page() -> None:
    """Each scheme of a sink is shown on the page of its database."""
    shown = {
        scheme
        for name in DATABASES
        for scheme in re.findall(r"\b([a-z]+)(?:\+\w+)?:(?://|`)", text_of(DOCS / f"{name}.md"))
    }

    assert set(_BUILT_IN) - shown == set()


HEADINGS = {
    "grants": r"(Grants|Permissions)",
    "table": r"(The table.*|Tables)",
    "costs": r"(What a window costs|How a window is applied)",
    "limits": r"(Limits|Replicated and distributed tables)",
    "tests": r"How it is tested.*",
}


@pytest.mark.parametrize("name", DATABASES)
@pytest.mark.parametrize("heading", HEADINGS)
def test_a_page_of_a_database_says_all(name: str, heading: str) -> None:
    """Grants, tables, costs, limits, and how it was tested."""
    assert re.search(rf"^## {HEADINGS[heading]}$", text_of(DOCS / f"{name}.md"), re.MULTILINE)


OPTIONS = [(name, name) for name in DATABASES if name != "embedded"] + [
    ("embedded", "sqlite"),
    ("embedded", "duckdb"),
]


@pytest.mark.parametrize(("page", "sink"), OPTIONS)
def test_options_of_sinks_have_the_defaults_that_are_said(page: str, sink: str) -> None:
    """Each option of the constructor is in the table of its page, with its default."""
    module = import_module(f"recognition.sinks.{sink}")
    constructor = getattr(module, f"{sink.capitalize()}Sink").__init__
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    said = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| ", text_of(DOCS / f"{page}.md"), re.MULTILINE))
    differ = {}
    for name, default in options.items():
        text = said.get(name, "missing")
        match default:
            case bool():
                same = text == "on" if default else text in ("off", "no", "false")
            case int() | float():
                number = re.match(r"[\d,.]+", text)
                same = number is not None and float(number[0].replace(",", "")) == default
            case None:
                same = text in ("none", "unset") or text.startswith("the cluster's")
            case str():
                same = text == f"`{default}`"
            case _:
                same = all(f"`{part}`" in text for pair in default.items() for part in pair)
        if not same:
            differ[name] = (text, default)

    assert differ == {}


# -------------------------------------------------------------------------------------- the facts


def test_blocked_values_are_all_listed() -> None:
    """docs/how-it-decides.md names each of them, and no other."""
    page = text_of(DOCS / "how-it-decides.md")
    listed = page[page.index("Blank values;") : page.index("in any case and in quotes")]

    assert {value.lower() for value in re.findall(r"`([^`]+)`", listed)} == BLOCKED


def test_layouts_are_as_the_table_says() -> None:
    """Each layout has a row with the columns that it has, under the heading of each."""
    page = text_of(DOCS / "layouts.md")
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\|[^|]*\|(.*)\|$", page, re.MULTILINE)
    shown: dict[str, list[str]] = {}
    for name, cells in rows:
        texts = [cell.strip() for cell in cells.split("|")]
        above = shown.get("segment-single-table", [])
        shown[name] = [
            above[place] if text == "the same" else re.findall(r"`(.*?)`", text)[0]
            for place, text in enumerate(texts)
        ]

    assert shown == {
        name: [c.id, c.anonymous_id, c.user_id, c.time, str(c.trait).format("x")]
        for name, c in ((name, layout.columns) for name, layout in LAYOUTS.items())
    }


def _default(callable: Any, name: str) -> Any:
    return inspect.signature(callable).parameters[name].default


def facts() -> Iterator[tuple[str, str]]:
    """Pages, and sentences in them with the numbers of the code."""
    first, longest = _default(Deliverer, "pauses")
    settings = Settings()
    ordinal = {3: "third"}[CIRCUIT_OPENS]
    yield "README.md", f"An event is at most {MAX_LINE_BYTES >> 20} MiB"
    yield "README.md", f"an identifier at most {MAX_ID_LENGTH:,} characters"
    yield "README.md", f"a person at most {settings.max_identifiers:,} identifiers"
    yield "README.md", f"at most {settings.lookback_days} days (`lookback_days`)"
    yield "how-it-decides.md", f"`lookback_days` ({settings.lookback_days})"
    yield "how-it-decides.md", f"`max_identifiers` ({settings.max_identifiers:,})"
    yield "how-it-decides.md", f"settle_seconds = {settings.delivery.settle_seconds:g}"
    yield "delivery.md", f"`settle_seconds = {settings.delivery.settle_seconds:g}` (twice"
    yield "delivery.md", f"after {first:g} s, {2 * first:g} s, {4 * first:g} s, up to"
    yield "delivery.md", f"up to {longest / 60:g} minutes, less a random part"
    yield "delivery.md", f"from the {ordinal} failure in a row"
    yield "delivery.md", {60.0: "loses it after a minute"}[_default(Deliverer, "lease")]
    yield "delivery.md", {3600.0: "come back within an hour"}[_default(Deliverer, "longest")]
    yield "mongodb.md", f"(default {_default(MongoGraph, 'timeout'):g} s)"
    yield "mongodb.md", f"each holds {PERIOD} days, { {6: 'six'}[SLOTS] } take turns"
    yield "mongodb.md", {10.0: "after ten seconds"}[_default(MongoGraph, "grace")]
    yield "command-line.md", f"A drawing holds up to\n{MOST_NODES[0]} identifiers"
    yield "command-line.md", f"and {MOST_EDGES} edges"


@pytest.mark.parametrize(("page", "sentence"), list(facts()))
def test_numbers_are_those_of_the_code(page: str, sentence: str) -> None:
    """The sentence is on the page; where it was written anew, it is written anew here, too."""
    (path,) = [path for path in PAGES if path.name == page]

    assert " ".join(sentence.split()) in " ".join(text_of(path).split())


# ----------------------------------------------------------------------------------- the operator


def test_alerts_ask_for_metrics_that_are_served_and_are_explained() -> None:
    """Each rule has an expression, and a line in the table of docs/operations.md."""
    rules = yaml.safe_load(text_of(ROOT / "examples" / "deploy" / "alerts.yaml"))
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    page = text_of(DOCS / "operations.md")
    explained = re.findall(r"^\| `(Recognition\w+)` \|", page, re.MULTILINE)

    assert [alert["alert"] for alert in alerts] == explained
    for alert in alerts:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.search(r"recognition_\w+", alert["expr"])


# --------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` makes it: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--config-file",
         str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)],
        check=True,
    )  # fmt: skip
    return folder


def test_site_has_all_pages(site: Path) -> None:
    """Each is there, with the pictures, and the generator is not."""
    made = {path.name for path in site.rglob("*")}

    assert {f"{page.stem}.html" for page in PAGES[1:]} <= made
    assert {path.name for path in (DOCS / "img").iterdir()} <= made
    assert "generate.py" not in made


def test_site_loads_nothing_from_elsewhere(site: Path, browser: Browser) -> None:
    """Opened from a folder, its pages ask for their own files alone, and find them."""
    asked = []
    for name in ("index", "how-it-decides", "clickhouse"):
        browser.driver.get("about:blank")
        browser.said()
        browser.asked_for()
        browser.driver.get((site / f"{name}.html").as_uri())
        asked += browser.asked_for()
        broken = browser.run(
            "return [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
        )
        assert broken == []

    assert [url for url in asked if not url.startswith((site.as_uri(), "data:"))] == []
    assert len(asked) > 10
