"""Codex CLI against the server: it runs a tool and gets its answer.

Runs where `codex` is on the PATH: npm install -g @openai/codex@0.169.0
"""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, Scripted, model
from tests.server.conftest import Served

from ossia.engine.masks import GrammarCompiler
from ossia.responses.constrain import Grammars
from ossia.server.store import Store

_COMMAND = '{"cmd": "echo made-by-codex > out.txt"}'
_CALL = f"<|channel|>commentary to=functions.exec_command <|constrain|>json<|message|>{_COMMAND}<|call|>"


@pytest.mark.slow
def test_codex_runs_a_tool_and_tells_the_answer(tmp_path):
    codex = shutil.which("codex")
    if codex is None:
        pytest.skip("codex is not installed: npm install -g @openai/codex@0.169.0")
    engine = Scripted(REASONED + _CALL, REASONED + FINAL)
    # All that Codex declares must be enforceable.
    constrain = Grammars(GrammarCompiler(TOKENIZER))
    served = Served(model(engine=engine, constrain=constrain), Store("sqlite://"))
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CODEX_HOME": str(home),
        "CODEX_OSS_BASE_URL": f"{served.url}/v1",
    }
    arguments = ["--oss", "--local-provider", "ollama", "-m", "gpt-oss:20b", "--skip-git-repo-check", "-C", str(work)]
    bypass = "--dangerously-bypass-approvals-and-sandbox"
    ran = subprocess.run(
        [codex, "exec", *arguments, bypass, "Write out.txt"],
        env=environ, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    served.stop()
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "The answer is 4."
    assert (work / "out.txt").read_text() == "made-by-codex\n"
    prompt, after = engine.prompts
    assert after[: len(prompt) + len(engine.scripts[0])] == prompt + engine.scripts[0]
