"""Commands whose model several processes share, as a person starts them: over gloo, kernels in Triton's interpreter."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time

import httpx
import pytest
import tests.gpu  # noqa: F401
from tests.train.processes import environment, launch

from ossia.model.random_checkpoint import write_random_checkpoint

ASK = (
    "generate",
    "Hi",
    "--backend",
    "gpu",
    "--temperature",
    "0",
    "--max-tokens",
    "2",
    "--date",
    "2026-01-01",
    "--json",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_random_checkpoint(tmp_path_factory.mktemp("team") / "tiny", "tiny"))


def ossia(num_processes, *arguments):
    command = [*launch(num_processes), "-m", "ossia", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def test_tp_without_torchrun_says_the_command(model):
    done = ossia(1, *ASK, "--model", model, "--tp", "2")
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2 -m ossia ... --backend gpu --tp 2" in done.stderr


def test_processors_do_not_share_a_model(model):
    done = ossia(1, "generate", "Hi", "--model", model, "--tp", "2")
    assert done.returncode == 1 and "only GPUs share a model: give --backend gpu" in done.stderr


@pytest.mark.slow
def test_two_processes_answer_once_as_one_does(model):
    one, two = (ossia(count, *ASK, "--model", model, "--tp", str(count)) for count in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr[-3000:]
    met, expected = json.loads(two.stdout), json.loads(one.stdout)
    for name in ("text", "reasoning", "messages", "usage", "finish_reason"):
        assert met[name] == expected[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp", "num_processes", "message"),
    [(2, 3, "tp is 2, and torchrun started 3 process"), (0, 3, "2 key/value heads cannot be shared among 3 processes")],
)
def test_what_does_not_fit_the_processes_is_refused(tp, num_processes, message, model):
    done = ossia(num_processes, *ASK, "--model", model, "--tp", str(tp))
    assert done.returncode != 0 and message in done.stderr and not done.stdout


@pytest.mark.slow
def test_a_server_of_two_processes_answers_and_ends_in_good_order(model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = environment() | {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    arguments = ["serve", "--model", model, "--backend", "gpu", "--port", str(port), "--tools", "none"]
    server = subprocess.Popen([*launch(2), "-m", "ossia", *arguments], env=environ, stderr=subprocess.PIPE, text=True)
    try:
        while server.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/ready").raise_for_status()
                break
            time.sleep(0.2)
        asked = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=600).json()
    finally:
        server.send_signal(signal.SIGINT)
        told = server.communicate()[1]
    assert answer["usage"]["completion_tokens"] == 2
    # Both have ended by themselves: nothing of a process that another one misses.
    assert "has ended" not in told and told.count("ossia: serving tiny") == 1
