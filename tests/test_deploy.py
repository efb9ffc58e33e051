"""Files for those who run the server as a service say nothing that the package does not have."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ossia.cli import serve
from ossia.cli.app import app
from ossia.config import Config
from ossia.server import app as app_module

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def options(command: str) -> set[str]:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    return set(re.findall(r"--[a-z][a-z-]+", shown))


def used(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def test_the_image_installs_extras_that_there_are():
    extras = re.search(r"/source\[([a-z,]+)\]", DOCKERFILE)[1].split(",")
    there = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(there)


def test_the_image_is_of_an_ordinary_user_and_asks_for_keys():
    command = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    assert command[0] == "serve"
    assert "--key-file" in command
    assert used(command) <= options("serve")
    assert re.search(r"^USER (?!root)", DOCKERFILE, re.MULTILINE)


def test_the_health_check_asks_what_there_is():
    asked = re.search(r"127\.0\.0\.1:8000(/[a-z]+)", DOCKERFILE)[1]
    assert f'"{asked}"' in (ROOT / "src" / "ossia" / "server" / "app.py").read_text()


def test_variables_of_the_composition_are_settings():
    text = (ROOT / "compose.yaml").read_text()
    names = re.findall(r"^\s+OSSIA_([A-Z_]+):", text, re.MULTILINE)
    assert names
    assert {name.lower() for name in names} <= set(Config.__dataclass_fields__)
    assert "read_only: true" in text
    assert "127.0.0.1:8000:8000" in text


def test_the_unit_starts_a_command_that_there_is():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read_string((ROOT / "deploy" / "ossia.service").read_text())
    command = shlex.split(unit["Service"]["ExecStart"])
    assert command[1] == "serve"
    assert used(command) <= options("serve")


def test_nobody_kills_a_server_that_still_ends_its_streams():
    needed_s = serve._GRACE_S + app_module._PATIENCE_S
    unit, composed = (ROOT / name for name in ("deploy/ossia.service", "compose.yaml"))
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.MULTILINE)[1]) > needed_s
    assert int(re.search(r"stop_grace_period: (\d+)s", composed.read_text())[1]) > needed_s


def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "ossia.service"
    # The program need not be installed for the unit to be well formed.
    unit.write_text((ROOT / "deploy" / "ossia.service").read_text().replace("/opt/ossia/bin/ossia", "/bin/true"))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, text=True)
    faults = [line for line in done.stderr.splitlines() if str(unit.name) in line]
    assert faults == []
