"""The way of the data is the way of the imports, and nothing heavy is on it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "recognition"

# Each stage and the stages before it, of which it may import. A package is one stage.
_PURE = {"errors", "events", "attribution", "identity", "messages", "layouts", "rules"}
_WAY_IN = _PURE | {"graph", "recognizer"}
_WAY_OUT = {"errors", "events", "messages", "planner", "sinks"}
STAGES: dict[str, set[str]] = {
    "errors": set(),
    "events": {"errors"},
    "attribution": {"errors", "events"},
    "identity": {"errors", "events"},
    "messages": {"errors"},
    "layouts": {"errors", "events", "messages"},
    "rules": {"errors", "attribution", "identity", "layouts"},
    "graph": _PURE,
    "recognizer": _PURE | {"graph"},
    "planner": {"errors", "messages"},
    "sinks": {"errors", "events", "messages", "planner"},
    "tracing": set(),
    "delivery": _WAY_IN | _WAY_OUT | {"tracing"},
    "worker": _WAY_IN | {"delivery", "tracing"},
    "metrics": {"errors", "graph", "delivery", "worker"},
    "aio": _WAY_IN | _WAY_OUT | {"delivery"},
    "bulker": _WAY_IN | _WAY_OUT,
    "receiver": {"errors", "events"},
    "kafka": _WAY_IN | _WAY_OUT | {"delivery"},
    "config": _WAY_IN | {"delivery"},
    "parts": _WAY_IN | _WAY_OUT | {"delivery", "worker", "bulker", "receiver", "kafka", "config"},
    "check": _WAY_IN | _WAY_OUT | {"delivery", "receiver", "kafka", "config", "parts"},
    "demo": set(),
    "cli": _WAY_IN
    | _WAY_OUT
    | {"delivery", "worker", "metrics", "config", "parts", "check", "demo"},
    "__main__": {"cli"},
    "testing": _WAY_IN | _WAY_OUT | {"delivery"},
    "__init__": _WAY_IN | _WAY_OUT | {"delivery"},
}

PURE_MODULES = ["attribution", "identity", "layouts", "messages", "planner", "rules"]

# What a module that only decides may import from elsewhere: nothing that opens, waits or asks.
HARMLESS = {
    "__future__", "bisect", "collections", "dataclasses", "datetime", "enum", "functools",
    "hashlib", "heapq", "hmac", "itertools", "json", "math", "operator", "re", "typing",
}  # fmt: skip

DRIVERS = {
    "clickhouse_connect", "confluent_kafka", "databricks", "duckdb", "duckdb_engine", "google",
    "hjson", "numpy", "opentelemetry", "pandas", "prometheus_client", "psycopg", "psycopg2", "py4j",
    "pyarrow", "pymongo", "pyspark", "redshift_connector", "rich", "snowflake", "sqlalchemy",
    "sqlalchemy_bigquery", "sqlalchemy_redshift", "sqlite3", "starlette", "urllib3", "uvicorn",
    "yaml",
}  # fmt: skip

PYDANTIC = {
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_extensions",
    "typing_inspection",
}


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at its top or inside a function, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            if node.module == "recognition":
                for alias in node.names:
                    yield f"recognition.{alias.name}", node.lineno
            elif node.module is not None:
                yield node.module, node.lineno


def _stage(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _loaded_by(statement: str) -> set[str]:
    """The names of all modules that a fresh interpreter holds after the statement."""
    code = f"import sys; {statement}; print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=_stage)
def test_imports_only_earlier_stages(path: Path) -> None:
    """A module imports only stages that come before it on the way of the data."""
    stage = _stage(path)

    late = [
        f"{path.name}:{line} imports {name}"
        for name, line in _imports(path)
        if name.startswith("recognition.") and name.split(".")[1] not in STAGES[stage] | {stage}
    ]

    assert late == []


@pytest.mark.parametrize("stage", PURE_MODULES)
def test_pure_modules_open_nothing(stage: str) -> None:
    """A module that decides imports nothing by which it could read, wait or ask."""
    foreign = {
        name.split(".")[0]
        for name, _ in _imports(SOURCE / f"{stage}.py")
        if not name.startswith("recognition.")
    }

    assert foreign - HARMLESS - {"pydantic"} == set()


def test_events_of_the_demo_know_nothing_of_the_library() -> None:
    """The made-up events come from the standard library alone."""
    names = {name.split(".")[0] for name, _ in _imports(SOURCE / "demo.py")}

    assert names <= set(sys.stdlib_module_names)


def test_importing_the_library_loads_no_driver() -> None:
    """`import recognition` loads no database driver, not even the standard library's."""
    loaded = {name.split(".")[0] for name in _loaded_by("import recognition")}

    assert "recognition" in loaded
    assert loaded & DRIVERS == set()


def test_what_needs_the_callers_spark_or_loop_is_imported_without_a_driver() -> None:
    """`recognition.aio` and `recognition.sinks.spark` load neither drivers nor Spark."""
    statement = "import recognition.aio, recognition.sinks.spark"
    loaded = {name.split(".")[0] for name in _loaded_by(statement)}

    assert loaded & DRIVERS == set()


def test_importing_the_library_costs_little_beside_pydantic() -> None:
    """Beside itself, `import recognition` adds only a few modules of the standard library."""
    before = _loaded_by("import pydantic; pydantic.BaseModel; pydantic.TypeAdapter(int)")

    added = _loaded_by("import recognition") - before

    foreign = {name for name in added if name.split(".")[0] not in PYDANTIC | {"recognition"}}
    assert {name.split(".")[0] for name in foreign} <= set(sys.stdlib_module_names)
    assert len(foreign) <= 40


def test_the_command_line_starts_without_a_driver() -> None:
    """Asking for help or the version loads no driver."""
    loaded = {name.split(".")[0] for name in _loaded_by("import recognition.cli")}

    assert loaded & DRIVERS == set()


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("receiver", "starlette", "server"), ("kafka", "confluent_kafka", "kafka")],
)
def test_a_missing_package_names_the_command(module: str, package: str, extra: str) -> None:
    """A module whose driver is not installed says what to install, and nothing else happens."""
    code = f"import sys; sys.modules[{package!r}] = None; import recognition.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "MissingDependencyError" in done.stderr
    assert f'pip install "recognition[{extra}]"' in done.stderr
