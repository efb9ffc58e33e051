"""What is installed by those who have no source: the wheel, made from the source archive, in its own environment."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
# The kernels are compiled, and every dependency is fetched.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str | Path, cwd: Path, timeout_s: float = 120, said: str = "") -> str:
    """What a command prints, away from the source tree and its settings."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OSSIA_", "PYTHON"))}
    environ |= {"XDG_DATA_HOME": str(cwd), "XDG_CONFIG_HOME": str(cwd), "HOME": str(cwd)}
    ran = subprocess.run(command, cwd=cwd, env=environ, input=said, capture_output=True, text=True, timeout=timeout_s)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def environment(folder: Path, *packages: str | Path) -> Path:
    """The programs of a new environment with ``packages``."""
    venv.create(folder, with_pip=True)
    command = [folder / "bin/python", "-m", "pip", "install", "--quiet", *packages]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if "NameResolutionError" in ran.stderr or "No matching distribution" in ran.stderr:
        pytest.skip(f"packages could not be fetched, so this did not run: {ran.stderr[-200:]}")
    assert ran.returncode == 0, ran.stderr
    return folder / "bin"


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """A folder with the source archive, and the wheel that was built from nothing else."""
    folder = tmp_path_factory.mktemp("archives")
    tools = environment(folder / "tools", "build")
    run(tools / "python", "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder, timeout_s=600)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel and what it asks for."""
    [wheel] = archives.glob("*.whl")
    return environment(tmp_path_factory.mktemp("installed") / "venv", wheel)


@pytest.fixture(scope="module")
def checkpoint(installed, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    run(installed / "ossia", "checkpoint", "new", "tiny", "--shape", "tiny", cwd=folder)
    return folder / "tiny"


def test_the_wheel_has_the_package_with_its_data_and_nothing_else(archives):
    [wheel] = archives.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.removeprefix("src/") for name in tracked} <= names
    added = {name for name in names if f"src/{name}" not in tracked and ".dist-info/" not in name}
    assert all(re.fullmatch(r"ossia/_kernels\.[\w-]+\.so", name) for name in added) and len(added) == 1, added


def test_the_source_archive_has_what_is_tracked(archives):
    [archive] = archives.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(tracked) <= names
    assert not [name for name in names if "node_modules" in name or name.startswith((".venv", "build/", "runs/"))]


def test_a_question_from_a_pipe_is_answered(installed, checkpoint, tmp_path):
    command = [installed / "ossia", "chat", "--model", checkpoint, "--max-tokens", "8", "--seed", "1"]
    run(*command, "--temperature", "0", cwd=tmp_path, said="Hello\n")


def test_the_doctor_knows_the_machine(installed, tmp_path):
    told = run(installed / "ossia", "doctor", cwd=tmp_path)
    assert "kernels" in told and str(ROOT) not in told


def test_the_server_has_its_page(installed, checkpoint, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [installed / "ossia", "serve", "--model", checkpoint, "--port", str(port), "--tools", "none"]
    environ = os.environ | {"XDG_DATA_HOME": str(tmp_path)}
    server = subprocess.Popen(command, cwd=tmp_path, env=environ)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=httpx.HTTPTransport(retries=10))
    try:
        found = re.findall(r"(?:src|href)=\"(/web/[^\"]+)\"", client.get("/").text)
        assert len(found) >= 3 and all(client.get(path).status_code == 200 for path in found)
    finally:
        server.terminate()
        server.wait(60)
