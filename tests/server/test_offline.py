"""Serving needs no network: where there is none it works, and where there is one it is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ossia.model.random_checkpoint import write_random_checkpoint

# Runs in a process of its own: serves a checkpoint, asks it as clients do, and stops it.
_SERVED = """
import json, signal, socket, subprocess, sys, time
import httpx, openai

def bring_loopback_up():
    import fcntl, struct
    with socket.socket() as one:
        fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS: up, running

checkpoint, *guard = sys.argv[1:]
if not guard:
    bring_loopback_up()
    try:
        socket.create_connection(("192.0.2.1", 80), timeout=2)
        raise SystemExit("there is a network")
    except OSError as error:
        assert "unreachable" in str(error), error
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
command = [sys.executable, *(guard or ["-m", "ossia"]), "serve", "--model", checkpoint, "--port", str(port)]
server = subprocess.Popen(command)
url = f"http://127.0.0.1:{port}"
try:
    for _ in range(600):
        try:
            httpx.get(f"{url}/ready").raise_for_status()
            break
        except httpx.HTTPError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    model = api.models.list().data[0].id
    assert httpx.get(f"{url}/docs").status_code == httpx.get(f"{url}/openapi.json").status_code == 200
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}
    shape = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    reasoning = {"max_tokens": 4}
    made = api.responses.create(model=model, input="Hi", text=shape, extra_body={"reasoning": reasoning})
    assert type(json.loads(api.responses.retrieve(made.id).output_text)["a"]) is bool
    with api.responses.stream(model=model, input="Hi", max_output_tokens=8) as stream:
        for event in stream:
            pass
    chat = api.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=8)
    assert chat.usage.completion_tokens == 8
finally:
    server.send_signal(signal.SIGINT)
    assert server.wait(60) in (0, 130)
print("served")
"""

# An interpreter that cannot look up a name or reach another machine, and says what tried to.
_GUARDED = """
import runpy, sys
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        name = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1] if len(arguments) > 1 else None
        name = address[0] if isinstance(address, tuple) else "localhost"
    else:
        return
    if name not in ("127.0.0.1", "::1", "localhost", None, b"127.0.0.1"):
        print(f"REACHED OUT: {event} {arguments}", file=sys.stderr, flush=True)
        raise OSError(f"no network: {event} {name}")
sys.addaudithook(hook)
sys.argv[0] = "ossia"
runpy.run_module("ossia", run_name="__main__", alter_sys=True)
"""


def _run(command: list[str], folder: Path) -> str:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("OSSIA_", "HF_"))}
    environ |= {"XDG_CONFIG_HOME": "/nonexistent", "XDG_DATA_HOME": str(folder / "data"), "HF_HOME": str(folder)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.strip() == "served"
    # Stopped in good order: nothing was left to the interpreter's end.
    assert "leaked" not in ran.stderr and "Traceback" not in ran.stderr
    return ran.stderr


def _has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _has_namespaces(), reason="this machine lets nobody make a network namespace")
def test_a_machine_without_any_network_serves(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path / "tiny", "tiny")
    _run(["unshare", "-rn", sys.executable, "-c", _SERVED, str(checkpoint)], tmp_path)


@pytest.mark.slow
def test_a_server_looks_up_no_name_and_reaches_no_other_machine(tmp_path):
    checkpoint = write_random_checkpoint(tmp_path / "tiny", "tiny")
    guard = tmp_path / "guarded.py"
    guard.write_text(_GUARDED)
    said = _run([sys.executable, "-c", _SERVED, str(checkpoint), str(guard)], tmp_path)
    assert "REACHED OUT" not in said
