"""`ossia serve` as a person starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from ossia.cli.listening import listen, take_address
from ossia.config import Config
from ossia.errors import UnavailableError
from ossia.model.adapter import write_adapter
from ossia.model.random_checkpoint import random_adapter, write_random_checkpoint
from ossia.model.weights import Checkpoint


@pytest.fixture
def environ(tmp_path):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OSSIA_")}
    return clean | {"XDG_CONFIG_HOME": "/nonexistent", "XDG_DATA_HOME": str(tmp_path / "data")}


def _ossia(environ, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "ossia", "serve", *arguments], capture_output=True, text=True, timeout=60, env=environ
    )


def test_a_served_model_answers_a_client_and_remembers(tmp_path, environ):
    folder = write_random_checkpoint(tmp_path / "gpt-oss-tiny", "tiny")
    key = _ossia(environ, "--key-file", str(tmp_path / "keys"), "--new-key", "me").stdout.strip()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "docs").mkdir()
    config = Checkpoint.open(folder).config
    for name in ("polite", "late"):
        write_adapter(tmp_path / "shelf" / name, random_adapter(config, rank=2, expert_rank=1), config)
    arguments = ["--model", str(folder), "--backend", "reference", "--port", str(port), "--key-file", tmp_path / "keys"]
    arguments += ["--tools", "browser", "--browser-root", tmp_path / "docs"]
    arguments += ["--adapter", f"polite={tmp_path}/shelf/polite", "--adapter-dir", tmp_path / "shelf"]
    command = [sys.executable, "-m", "ossia", "serve", *map(str, arguments)]
    server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/ready").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key)
        assert "openai/gpt-oss-tiny" in [model.id for model in client.models.list()]
        assert client.completions.create(model="polite", prompt="Hi", max_tokens=2).model == "polite"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="x").post("/load_lora_adapter", body={}, cast_to=object)
        client.post("/load_lora_adapter", body={"lora_name": "late", "lora_path": "late"}, cast_to=object)
        assert client.completions.create(model="late", prompt="Hi", max_tokens=2).model == "late"
        asked = {"model": "gpt-oss-tiny", "input": "Hi", "max_output_tokens": 3}
        assert [tool.type for tool in client.responses.create(**asked, tools=[{"type": "web_search"}]).tools] == [
            "web_search"
        ]
        made = client.responses.create(**asked)
        assert made.status == "incomplete" and made.usage.output_tokens == 3
        assert client.responses.retrieve(made.id).id == made.id
        assert (tmp_path / "data" / "ossia" / "responses.db").exists()
    finally:
        server.send_signal(signal.SIGINT)
        told = server.communicate(timeout=30)[1]
    assert "random" in told
    assert f"ossia: tools: browser (local:{tmp_path}" in told
    assert "ossia: adapters: polite" in told
    assert "is off" not in told
    assert re.search(r"request=req_\w+ method=POST route=/v1/responses status=200 key=me .* output_tokens=3", told)


def test_a_free_port_is_told_and_one_that_is_taken_is_refused_before_a_model_is_read(environ):
    command = [sys.executable, "-m", "ossia", "serve", "--port", "0", "--tools", "none"]
    server = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        told = next(line for line in server.stderr if "serving" in line)
        url = re.search(r"serving nano on (http://127\.0\.0\.1:[1-9]\d*)/v1, and a page to chat on at \1/$", told)[1]
        for _ in range(100):
            try:
                assert httpx.get(f"{url}/").headers["content-type"].startswith("text/html")
                assert "small demonstration" in httpx.get(f"{url}/v1/served").json()["notice"]
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        listed = subprocess.run(
            [sys.executable, "-m", "ossia", "ps"], capture_output=True, text=True, timeout=60, env=environ
        )
        assert url in listed.stdout and "0 under way" in listed.stdout
        refused = _ossia(environ, "--model", "nowhere", "--port", url.rpartition(":")[2], "--tools", "none")
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=30)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "cannot be listened on: Address already in use" in refused.stderr and "--port" in refused.stderr


def test_an_address_is_one_servers_before_it_listens_and_free_as_soon_as_it_has_ended():
    taken, _ = take_address(Config(port=0))
    port = taken.getsockname()[1]
    with pytest.raises(UnavailableError, match="cannot be listened on"):
        take_address(Config(port=port))
    listen(taken)
    # The end that closes first keeps the address for a minute.
    with socket.create_connection(("127.0.0.1", port)) as client, taken.accept()[0] as answering:
        answering.close()
        assert client.recv(1) == b""
    taken.close()
    again, _ = take_address(Config(port=port))
    listen(again)
    with pytest.raises(UnavailableError, match="cannot be listened on"):
        take_address(Config(port=port))
    again.close()


@pytest.mark.parametrize("command", ["serve", "mcp"])
def test_a_port_that_is_none_is_refused_in_words(environ, command):
    refused = subprocess.run(
        [sys.executable, "-m", "ossia", command, "--port", "70000"], capture_output=True, text=True, env=environ
    )
    assert refused.returncode == 2 and "than or equal to 65535" in refused.stderr and "Traceback" not in refused.stderr


def test_an_adapter_that_cannot_be_served_ends_the_start(tmp_path, environ):
    folder = write_random_checkpoint(tmp_path / "tiny", "tiny")
    for arguments, said in (
        (["--adapter", f"a={tmp_path}/nowhere"], f"there is no folder {tmp_path}/nowhere"),
        (["--adapter", f"tiny={tmp_path}"], "'tiny' is a name of the model itself"),
        (["--adapter", "a"], "is 'a'; expected NAME=PATH"),
        (["--adapter-dir", f"{tmp_path}/nowhere"], "which is no folder"),
    ):
        refused = _ossia(environ, "--model", str(folder), "--tools", "none", *arguments)
        assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr


def test_a_server_that_others_reach_needs_a_key(environ):
    refused = _ossia(environ, "--model", "x", "--host", "0.0.0.0")
    assert refused.returncode == 1 and "--open-to-all" in refused.stderr


def test_a_new_key_needs_a_file(environ):
    refused = _ossia(environ, "--new-key", "me")
    assert refused.returncode == 1 and "--key-file" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tools", "browser"], "say where it searches"),
        (["--tools", "pythn"], "tools names 'pythn'"),
        (["--browser-root", "docs", "--browser", "brave"], "exclude each other"),
        (["--browser", "brave"], "browser_key is empty"),
        (["--python-sandbox", "chroot"], "python_sandbox is 'chroot'"),
        (["--audit-log", "/proc/nowhere/audit.jsonl"], "the audit log cannot be written"),
    ],
)
def test_tools_that_cannot_be_are_refused_before_a_model_is_loaded(environ, arguments, said):
    refused = _ossia(environ, "--model", "nowhere", *arguments)
    assert refused.returncode != 0 and said in refused.stderr
