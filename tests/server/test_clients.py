"""The clients that people have, each a program of its own, against a server: openai-python of several versions, the
Agents SDK, Codex CLI.

What is not installed is fetched into build/clients, once; where the network does not allow it, the test says so and is
skipped. Every request is under the real grammar of its turn, so that all that these clients declare is enforceable.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path

import openai
import pytest
from pydantic import BaseModel
from tests.responses.scripts import CALL, FINAL, PREAMBLE, REASONED, TOKENIZER, Scripted, model, tokens
from tests.server.conftest import Served

from ossia.engine.masks import GrammarCompiler
from ossia.responses.constrain import Grammars
from ossia.server.store import Store

ROOT = Path(__file__).parents[2]
SCENARIOS = Path(__file__).with_name("sdk_scenarios.py")
CODEX = "0.169.0"


def called(name: str, arguments: object, channel: str = "commentary") -> str:
    return f"<|channel|>{channel} to=functions.{name} <|constrain|>json<|message|>{json.dumps(arguments)}<|call|>"


ANSWER = REASONED + FINAL
JSON_ANSWER = REASONED + '<|channel|>final<|message|>{"value": 4}<|return|>'
# What is said by the last words of the user, first and behind each tool's answer.
TURNS = {
    "text": (ANSWER,),
    "slow": (ANSWER,),
    "sum": (REASONED + PREAMBLE + CALL, ANSWER),
    "custom": ("<|channel|>commentary to=functions.say<|message|>hello<|call|>",),
    "shell": (REASONED + called("shell", {"commands": ["ls"]}), ANSWER),
    "apply_patch": (called("apply_patch", {"type": "delete_file", "path": "a.py", "diff": ""}), ANSWER),
    "json": (JSON_ANSWER,),
    "json after a silent sum": (REASONED + CALL, JSON_ANSWER),
    "json after a sum": (REASONED + PREAMBLE + CALL, JSON_ANSWER),
}


class Keyed(Scripted):
    """Plays the turns of the last user message that names one; "slow" ones slowly."""

    def __init__(self, turns: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(FINAL)
        self._turns = turns

    async def _read(self, prompt, params):
        said = TOKENIZER.decode(prompt)
        found = [match for match in re.finditer(r"<\|start\|>user<\|message\|>(.*?)<\|end\|>", said, re.DOTALL)]
        key, behind = next(((m[1], said[m.end() :]) for m in reversed(found) if m[1] in self._turns), ("text", ""))
        self.delay_s = 0.01 if key == "slow" else 0
        scripts = self._turns[key]
        self.scripts = [tokens(scripts[min(behind.count(" to=assistant<|channel|>"), len(scripts) - 1)])]
        async for output in super()._read(prompt, params):
            yield output


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(GrammarCompiler(TOKENIZER))


@pytest.fixture
def keyed(grammars) -> Iterator[Served]:
    served = Served(model(engine=Keyed(TURNS), constrain=grammars), Store("sqlite://"))
    yield served
    served.until_idle()
    served.stop()


def fetched(name: str, fetch) -> Path:
    """The folder of a client, fetched into it if it is not there."""
    folder = ROOT / "build" / "clients" / name
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            fetch(folder)
        except (subprocess.CalledProcessError, OSError) as error:
            said = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"{name} could not be fetched, so this did not run: {said[-200:]}")
        (folder / "complete").touch()
    return folder


def _pip(requirement: str):
    def fetch(folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        command = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", requirement]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)

    return fetch


def _codex(folder: Path) -> None:
    if shutil.which("npm") is None:
        raise OSError("npm is not installed")
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, f"@openai/codex@{CODEX}"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def scenarios(python: str | Path, served: Served) -> str:
    environ = {"PATH": os.environ["PATH"]}
    ran = subprocess.run(
        [python, SCENARIOS, served.url], capture_output=True, text=True, timeout=120, env=environ, cwd="/"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_openai_package_does_all_that_people_do_with_it(keyed):
    told = scenarios(sys.executable, keyed)
    assert told.split()[::2] == [openai.__version__] * 13


@pytest.mark.slow
@pytest.mark.parametrize("version", ["==3.3.1", ""])
def test_other_versions_of_the_openai_package_do_so_too(keyed, version):
    folder = fetched(f"openai{version or '-latest'}", _pip(f"openai{version}"))
    python = folder / "venv" / "bin" / "python"
    if not version:
        # The latest of today, not of the day when it was fetched; without a network, that.
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--upgrade", "openai"], capture_output=True, timeout=300
        )
    told = scenarios(python, keyed)
    assert len(told.splitlines()) == 13
    assert not version or told.startswith(version.removeprefix("=="))


# The Agents SDK --------------------------------------------------------------------------------------------------


class Sum(BaseModel):
    value: int


def test_the_agents_sdk_runs_tools_hands_over_and_remembers(keyed):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    ran: list[str] = []

    @agents.function_tool
    def add(a: int, b: int) -> str:
        """Add."""
        ran.append("add")
        return str(a + b)

    async def run_shell(request) -> str:
        ran.append(" ".join(request.data.action.commands))
        return "a.py"

    class Editor:
        def create_file(self, operation): ...

        update_file = create_file

        def delete_file(self, operation):
            ran.append(f"delete {operation.path}")

    async def go() -> None:
        client = openai.AsyncOpenAI(base_url=f"{keyed.url}/v1", api_key="none", max_retries=0)
        responses = agents.OpenAIResponsesModel(model="gpt-oss-20b", openai_client=client)
        chat = agents.OpenAIChatCompletionsModel(model="gpt-oss-20b", openai_client=client)
        for asked in (responses, chat):
            agent = agents.Agent(name="Adder", instructions="Add.", model=asked, tools=[add])
            assert (await agents.Runner.run(agent, "sum")).final_output == "The answer is 4."
            streamed = agents.Runner.run_streamed(agent, "sum")
            async for _ in streamed.stream_events():
                pass
            assert streamed.final_output == "The answer is 4."
            typed = agents.Agent(name="Typed", model=asked, tools=[add], output_type=Sum)
            assert (await agents.Runner.run(typed, "json after a sum")).final_output == Sum(value=4)
        own = agents.Agent(
            name="Own", model=responses, tools=[agents.ShellTool(run_shell), agents.ApplyPatchTool(Editor())]
        )
        for task in ("shell", "apply_patch"):
            assert (await agents.Runner.run(own, task)).final_output == "The answer is 4."
        remembering = agents.OpenAIConversationsSession(openai_client=client)
        for _ in range(2):
            await agents.Runner.run(agents.Agent(name="Plain", model=responses), "text", session=remembering)
        assert len(await remembering.get_items()) == 6
        first = agents.Agent(name="First", model=responses, handoffs=[agents.Agent(name="Second", model=responses)])
        assert (await agents.Runner.run(first, "hand over")).last_agent.name == "Second"
        await client.close()

    keyed.engine._turns = {**TURNS, "hand over": (called("transfer_to_second", {}), ANSWER)}
    asyncio.run(go())
    assert ran == ["add"] * 6 + ["ls", "delete a.py"]


# Codex -----------------------------------------------------------------------------------------------------------

_COMMAND = {"cmd": "echo made-by-codex > out.txt"}
_CODEX_TURNS = {
    "Write out.txt": (REASONED + called("exec_command", _COMMAND), ANSWER),
    "And now?": (ANSWER.replace("4", "5"),),
    "As JSON, after a command": (REASONED + PREAMBLE + called("exec_command", {"cmd": "true"}), JSON_ANSWER),
}


@pytest.fixture(scope="module")
def codex() -> Path:
    found = shutil.which("codex")
    return Path(found) if found else fetched(f"codex-{CODEX}", _codex) / "node_modules" / ".bin" / "codex"


@pytest.mark.slow
def test_codex_runs_tools_goes_on_and_answers_in_a_schema(codex, grammars, tmp_path):
    served = Served(model(engine=Keyed(_CODEX_TURNS), constrain=grammars), Store("sqlite://"))
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir(), home.mkdir()
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CODEX_HOME": str(home),
        "CODEX_OSS_BASE_URL": f"{served.url}/v1",
    }
    common = ["--oss", "--local-provider", "ollama", "-m", "gpt-oss:20b", "--skip-git-repo-check"]
    bypass = "--dangerously-bypass-approvals-and-sandbox"

    def run(*arguments: str) -> str:
        ran = subprocess.run(
            [codex, "exec", *arguments],
            env=environ, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, cwd=work,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    assert run(*common, bypass, "Write out.txt") == "The answer is 4."
    assert (work / "out.txt").read_text() == "made-by-codex\n"
    prompt, after = served.engine.prompts
    sampled = tokens(_CODEX_TURNS["Write out.txt"][0])
    assert after[: len(prompt) + len(sampled)] == prompt + sampled
    assert run(*common, bypass, "resume", "--last", "And now?") == "The answer is 5."
    resumed = TOKENIZER.decode(served.engine.prompts[-1])
    assert resumed.index("Write out.txt") < resumed.index("The answer is 4.") < resumed.index("And now?")
    schema = {"type": "object", "properties": {"value": {"type": "integer"}}, "required": ["value"],
              "additionalProperties": False}  # fmt: skip
    (work / "schema.json").write_text(json.dumps(schema))
    answer = run(*common, bypass, "--output-schema", "schema.json", "As JSON, after a command")
    assert json.loads(answer) == {"value": 4}
    served.until_idle()
    served.stop()
