"""What every test run says and shares."""

from __future__ import annotations

import sqlite3
from importlib.metadata import PackageNotFoundError, version

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
