"""
A real Chromium for tests: found, started, asked, ended; and those who read Mermaid and DOT in it.

It knows no pytest and nothing of `recognition`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

#: What ``make .venv/viewers.stamp`` took from npm, by `tests/viewers.txt`.
VIEWERS = Path(sys.prefix) / "viewers"

_OPTIONS = (
    "--headless",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    # It asks its maker for nothing while the tests look at what a page asks for.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--window-size=1400,1200",
)


class MissingBrowserError(RuntimeError):
    """There is none on this machine, or what is to be loaded into it is missing."""


def find_browser() -> tuple[str, str]:
    """
    Chromium and its driver, of ``PATH``.

    Raises:
        MissingBrowserError: One of them is missing.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise MissingBrowserError(
            f"there is no {'Chromium' if browser is None else 'chromedriver'} on PATH to test with"
            " (Debian: apt-get install chromium chromium-driver)"
        )
    return browser, driver


def find_viewer(name: str) -> Path:
    """
    The file of a library that was taken from npm: ``cytoscape``, ``mermaid`` or ``viz``.

    Raises:
        MissingBrowserError: It was not taken.
    """
    path = VIEWERS / f"{name}.js"
    if not path.is_file():
        raise MissingBrowserError(
            f"there is no {path}; run: make .venv/viewers.stamp (`make test` does, where there is"
            " an npm)"
        )
    return path


class Browser:
    """Chromium with an empty profile, and a folder for pages of its own."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver = driver
        self._folder = folder
        self._pages = 0

    def open(self, page: str) -> None:
        """Write a page to a file and load it from there; the logs begin anew."""
        self._pages += 1
        path = self._folder / f"{self._pages}.html"
        path.write_bytes(page.encode("utf-8"))
        self.driver.get("about:blank")
        self.said()
        self.asked_for()
        self.driver.get(path.as_uri())

    def run(self, script: str, *values: object) -> Any:
        """What a script gives back; ``arguments`` are the values, and it may wait for promises."""
        return self.driver.execute_script(f"return (async () => {{ {script} }})()", *values)

    def said(self) -> list[str]:
        """Errors and warnings of the page since this was asked last."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked_for(self) -> list[str]:
        """
        The URLs of all requests since this was asked last.

        Without the page's own, and without those that its policy stopped: `said` tells of them.
        """
        found = {}
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            told = message["params"]
            if message["method"] == "Network.requestWillBeSent":
                url = told["request"]["url"]
                if not url.startswith(self._folder.as_uri()) and url != "about:blank":
                    found[told["requestId"]] = url
            elif told.get("blockedReason") == "csp":  # of Network.loadingFailed
                found.pop(told["requestId"], None)
        return list(found.values())


@contextmanager
def open_browser() -> Iterator[Browser]:
    """
    A new one.

    Raises:
        MissingBrowserError: There is none.
    """
    binary, driver_path = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in _OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(prefix="recognition-browser-") as folder:
        options.add_argument(f"--user-data-dir={folder}/profile")
        driver = webdriver.Chrome(options=options, service=Service(driver_path))
        try:
            driver.set_page_load_timeout(60)
            driver.set_script_timeout(60)
            yield Browser(driver, Path(folder))
        finally:
            driver.quit()


def describe() -> str:
    """Which browser the tests would get, for a report's header. Starts none and does not raise."""
    try:
        binary, _ = find_browser()
    except MissingBrowserError as error:
        return f"Chromium missing: {error}"
    said = subprocess.run(
        [binary, "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "HOME": tempfile.gettempdir()},
    ).stdout
    return f"{said.strip() or 'Chromium of unknown version'} ({binary})"
