"""What is handed to operators is what their tools take."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recognition.cli import _build_parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing, apart from where the program is."""
    unit = (DEPLOY / "recognition.service").read_text(encoding="utf-8")
    copy = tmp_path / "recognition.service"
    copy.write_text(unit.replace("/opt/recognition/bin/recognition", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(copy)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    copy.write_text(copy.read_text().replace("Restart=always", "Restart=sometimes"))
    broken = subprocess.run(
        ["systemd-analyze", "verify", str(copy)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    # Other units of the machine may have faults of their own.
    assert "recognition.service" not in done.stderr, done.stderr
    assert "recognition.service" in broken.stderr


def test_commands_of_unit_and_compose_file_are_commands() -> None:
    """Each line that starts a worker is one that the command line takes."""
    unit = (DEPLOY / "recognition.service").read_text(encoding="utf-8")
    compose = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    started = [
        line.split("bin/recognition ")[1].split() for line in unit.splitlines() if "=/opt" in line
        or "=-/opt" in line
    ]  # fmt: skip
    started += [
        line.split("exec recognition ")[1].split()
        for line in compose.splitlines()
        if "exec recognition" in line
    ]

    assert [command[0] for command in started] == ["check", "worker", "worker"]
    for command in started:
        assert callable(_build_parser().parse_args(command).command)


def test_compose_file_stops_a_worker_gently() -> None:
    """It is YAML of the form that compose reads; the worker gets its minute."""
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))

    assert set(compose["services"]) == {"mongo", "worker"}
    assert compose["services"]["worker"]["stop_grace_period"] == "60s"
    assert compose["services"]["worker"]["depends_on"] == {
        "mongo": {"condition": "service_healthy"}
    }
    assert all("image" in service for service in compose["services"].values())


def test_dashboard_is_what_grafana_imports() -> None:
    """Panels have their own numbers and places, and ask the data source that is chosen."""
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}

    assert len({panel["id"] for panel in panels}) == len(places) == len(panels) == 10
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
    assert all(target["expr"] for panel in panels for target in panel["targets"])
