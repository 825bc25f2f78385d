"""
A server that speaks Snowflake's protocol, for tests: started, asked, told to fail, ended.

It is fakesnow (SQL of Snowflake on DuckDB), in a virtual environment of its own that
``make test`` builds; `fakesnow_app.py` says what was added to it, and why it lives apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

PYTHON = Path(sys.prefix) / "fakesnow" / "bin" / "python"
MISSING = (
    f"there is no fakesnow at {PYTHON.parent.parent}; run: make .venv/fakesnow.stamp "
    "(`make test` does)"
)

_APP = Path(__file__).with_name("fakesnow_app.py")


class FakesnowError(Exception):
    """The server is missing, or did not start."""


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs; databases are made when somebody logs in with their names."""

    port: int

    def url(self, database: str, schema: str = "public", **query: str) -> str:
        """For `open_sink`; `CONNECT_ARGS` go with it."""
        asked = {"account": "fake", "warehouse": "wh", "role": "loader", **query}
        shown = "&".join(f"{name}={value}" for name, value in asked.items())
        return f"snowflake://tester:s3cr3t@127.0.0.1:{self.port}/{database}/{schema}?{shown}"

    def logins(self) -> list[dict[str, Any]]:
        """What each login gave: ``parameters`` of the session, ``warehouse``, ``role``."""
        found: list[dict[str, Any]] = self._ask("logins")
        return found

    def fail(self, *faults: dict[str, Any]) -> None:
        """
        From now on, answer statements (or ``login``) that begin with a text by this.

        Args:
            faults: ``begins``, and either ``code``, and if wanted ``sqlstate`` and ``status`` of
                HTTP, or ``columns`` and ``rows`` of texts, or ``ends``, which ends the server;
                further ``times`` (1), ``after`` so many that are let pass, ``after_running`` the
                statement. They replace those before.
        """
        usual = {"message": "as the test wants it", "times": 1}
        self._ask("faults", [{**usual, **fault} for fault in faults])

    def _ask(self, what: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(f"http://127.0.0.1:{self.port}/test/{what}", data)) as answer:
            return json.load(answer)


#: The server has no certificate, and no proxy leads to it.
CONNECT_ARGS = {"protocol": "http", "use_proxy_env": False}


@contextmanager
def open_server() -> Iterator[Server]:
    """
    Start one on a free port of the loopback, in memory; it ends with the block or this process.

    Raises:
        FakesnowError: There is none, or it did not start; with the end of its log.
    """
    if not PYTHON.exists():
        raise FakesnowError(MISSING)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [PYTHON, "-W", "ignore", _APP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "TZ": "UTC"},
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            if not port:
                log.seek(0)
                end = log.read().decode(errors="replace")[-2_000:]
                raise FakesnowError(f"fakesnow did not start: {end}")
            yield Server(int(port))
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
