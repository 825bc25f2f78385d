"""What every test run says and shares."""

from __future__ import annotations

import os
import sqlite3
from importlib.metadata import PackageNotFoundError, version

from hypothesis import settings

# The same examples in every run, so that a change is judged by its own tests. To look for more:
# HYPOTHESIS_PROFILE=default.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

_ENGINES = ("pydantic", "sqlalchemy", "duckdb", "pyarrow", "hypothesis")


def pytest_report_header() -> str:
    """So that a log says what was tested."""
    found = [f"SQLite {sqlite3.sqlite_version}"]
    for package in _ENGINES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} missing")
    return f"engines: {', '.join(found)}"
