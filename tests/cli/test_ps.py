"""`ossia ps`: who is listed, who is not any more, and what is told of each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from tests.responses.scripts import FINAL, Scripted, model
from tests.server.conftest import Served
from typer.testing import CliRunner

from ossia.cli.app import app
from ossia.cli.ps import listed, servers
from ossia.server.store import Store


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "ossia" / "servers" / socket.gethostname()


def ps(*words: str) -> str:
    done = CliRunner().invoke(app, ["ps", *words])
    assert done.exit_code == 0
    return done.output


def test_without_a_server_it_says_how_to_start_one():
    assert "ossia serve --model" in ps()
    assert json.loads(ps("--json")) == []


def test_a_server_is_listed_while_it_runs_with_what_it_does(tmp_path, monkeypatch):
    # A name that the process's own command line has, as a server's has "ossia".
    monkeypatch.setattr("ossia.cli.ps._is_server", lambda pid: pid == os.getpid())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    served = Served(model(engine=Scripted(FINAL)), Store(f"sqlite:///{tmp_path / 'db'}"))
    try:
        with listed(served.url, "gpt-oss-20b"):
            (told,) = json.loads(ps("--json"))
            shown = ps()
    finally:
        served.stop()
    assert told["pid"] == os.getpid()
    assert told["model"] == "gpt-oss-20b"
    assert told["num_running"] == told["num_queued"] == 0
    assert told["memory_bytes"] > 10 << 20
    assert served.url in shown
    assert "0 under way" in shown
    assert list(servers()) == []


def test_a_server_that_was_killed_is_forgotten(data):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    data.mkdir(parents=True)
    note = data / f"{gone.pid}.json"
    note.write_text(json.dumps({"url": "http://127.0.0.1:1", "model": "m", "began": 0}))
    # Another process has its number now, and is none of ours.
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    alien = data / f"{other.pid}.json"
    alien.write_text(note.read_text())
    (data / "torn.json").write_text("{")
    try:
        assert list(servers()) == []
    finally:
        other.communicate(b"\n")
    assert not note.exists()
    assert not alien.exists()


def test_a_machine_that_shares_the_folder_touches_no_servers_of_another(monkeypatch):
    monkeypatch.setattr("ossia.cli.ps._is_server", lambda pid: socket.gethostname() == "one")
    monkeypatch.setattr("socket.gethostname", lambda: "one")
    with listed("http://127.0.0.1:1", "m"):
        monkeypatch.setattr("socket.gethostname", lambda: "other")
        assert list(servers()) == []
        monkeypatch.setattr("socket.gethostname", lambda: "one")
        assert [one.model for one in servers()] == ["m"]


def test_a_folder_that_cannot_be_written_keeps_no_server_from_running(data):
    data.parent.mkdir(parents=True)
    data.write_text("in the way")
    with listed("http://127.0.0.1:1", "m"):
        pass
