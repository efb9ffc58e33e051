"""`ossia chat` with tools that really run - python in its sandbox, a browser of a folder, a server of tools - on a
terminal and in a pipe, while a script says what the model says."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.test_chat import ROOT, Terminal
from tests.responses.scripts import Scripted, model
from tests.responses.test_toolbox import sleepers
from tests.responses.tool_scripts import notes, write_docs

from ossia.cli.chat import _with_servers
from ossia.cli.chat_session import ChatSession
from ossia.config import Config, McpServer
from ossia.errors import ConfigError, UnavailableError
from ossia.tools.python import PythonSessions

PROGRAM = """
import json, sys
from pathlib import Path
from tests.responses.scripts import Scripted, TOKENIZER, model
from tests.responses.tool_scripts import BROWSER_LOOP, browser, final, notes, python
from ossia import config
from ossia.cli.chat import _with_servers, converse
from ossia.cli.serve import open_tools
folder, scripts, names = Path(sys.argv[1]), eval(sys.argv[2]), json.loads(sys.argv[3])
settings = config.load({"browser": f"local:{folder / 'docs'}"}, toml_path=folder / "config.toml")
names = _with_servers(names, settings)
boxes = open_tools(settings, list(dict.fromkeys(one.partition(":")[0] for one in names)), False)
engine = Scripted(*scripts)
code = converse(model(engine=engine), data_folder=folder / "data", tools=names, boxes=boxes)
(folder / "prompts").write_text(json.dumps([TOKENIZER.decode(one) for one in engine.prompts]))
print("left", code, flush=True)
"""
WORK = """[
    browser("search", query="rivers"), browser("open", id=0), browser("find", pattern="river number 7 "),
    python("x = 6 * 7\\nprint('from', 'python', x)"), python("x + 1"), python("open('/etc/shadow').read()"),
    final("It is 43【1†L8】."), python("x * 2"), browser("open", cursor=1, loc=40), final("Still there."),
]"""


@pytest.fixture
def folder(tmp_path):
    write_docs(tmp_path / "docs")
    server = {"command": sys.executable, "args": [str(ROOT / "tests" / "responses" / "mcp_notes.py")]}
    lines = [f"{key} = {json.dumps(value)}" for key, value in server.items()]
    path = json.dumps(os.pathsep.join(path for path in sys.path if path))
    (tmp_path / "config.toml").write_text("\n".join(["[mcp.notes]", *lines, f"env = {{ PYTHONPATH = {path} }}"]))
    return tmp_path


@pytest.fixture
def environ(folder):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OSSIA_") and key != "NO_COLOR"}
    path = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    here = {"XDG_CONFIG_HOME": "/nonexistent", "XDG_DATA_HOME": str(folder / "data"), "TERM": "xterm-256color"}
    return clean | here | {"PYTHONPATH": path}


def command(folder: Path, scripts: str, *names: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(folder), scripts, json.dumps(names)]


@pytest.fixture(scope="module")
def sandbox():
    async def check() -> None:
        async with PythonSessions(num_warm=0) as sessions:
            await sessions.check()

    try:
        asyncio.run(check())
    except UnavailableError as error:
        pytest.skip(f"no sandbox works on this machine: {error.message[:300]}")


def test_python_and_browser_answer_in_a_pipe_and_the_next_line_finds_them_as_they_were(sandbox, folder, environ):
    done = subprocess.run(
        command(folder, WORK, "python", "browser"), input=b"one\ntwo\n", capture_output=True, timeout=120, env=environ
    )
    said, told = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and "left 0" in said, told
    assert "It is 43 ([docs](local://docs/rivers.html))." in said and "Still there." in said
    assert "search rivers" in told and "open local://docs/rivers.html" in told and "find river number 7" in told
    assert "from python 42" in told and "python (failed)" in told
    prompts = json.loads((folder / "prompts").read_text())
    assert len(prompts) == 10
    assert "<|start|>python to=assistant<|channel|>analysis<|message|>84" in prompts[8]
    assert "[3] Rivers (local://docs/rivers.html)\n**viewing lines [40 - " in prompts[9]
    assert "root:" not in prompts[9]


# The line of status below the prompt begins so; what is typed before it is drawn may be lost.
_PROMPT = "gpt-oss-20b · effort medium"


def test_tools_are_shown_on_a_terminal_and_ctrl_c_stops_the_code_that_runs(sandbox, folder, environ):
    slow = "import subprocess; print(subprocess.run(['sleep', '775.5']))"
    scripts = f"[browser('search', query='rivers'), python('6 * 7'), python({slow!r}), final('On we go.')]"
    terminal = Terminal(command(folder, scripts, "python", "browser"), environ)
    told = terminal.until("tools python, browser · /help")
    assert "tools: python (" in told and "(local:" in told
    time.sleep(0.3)
    terminal.type("work\r")
    terminal.until("search rivers.*?python.*?42.*?running python")
    for _ in range(500):
        if sleepers("775.5"):
            break
        time.sleep(0.02)
    assert sleepers("775.5"), terminal.text
    terminal.type("\x03")
    terminal.until("stopped; what was said is kept")
    for _ in range(500):
        if not sleepers("775.5"):
            break
        time.sleep(0.02)
    assert not sleepers("775.5")
    terminal.until(_PROMPT)
    time.sleep(0.3)
    terminal.type("go on\r")
    terminal.until("On we go.*?" + _PROMPT)
    time.sleep(0.3)
    terminal.type("\x04")
    terminal.until("left 0")
    assert terminal.leave() == 0


@pytest.mark.parametrize("approves", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_call_of_a_server_is_shown_and_made_when_it_is_approved(folder, environ, approves):
    terminal = Terminal(command(folder, "[notes('add', a=20, b=3), final('Done so.')]", "mcp"), environ)
    terminal.until(_PROMPT + ".*?tools mcp:notes")
    time.sleep(0.3)
    terminal.type("add\r")
    told = terminal.until(r"Call notes.add\? \[y/N\]")
    assert '"a": 20' in told
    time.sleep(0.3)
    terminal.type("y\r" if approves else "\r")
    told = terminal.until("Done so.")
    assert ("notes.add {" in told) is approves
    terminal.until(_PROMPT)
    time.sleep(0.3)
    terminal.type("/tools\r")
    terminal.until(r"mcp:notes\s+on\s+tools of the server \[mcp.notes\]; you are asked before each call")
    terminal.until(_PROMPT)
    time.sleep(0.3)
    terminal.type("\x04")
    terminal.until("left 0")
    assert terminal.leave() == 0
    last = json.loads((folder / "prompts").read_text())[-1]
    answer = "23" if approves else "Error: the user did not approve this call."
    assert f"<|start|>notes.add to=assistant<|channel|>commentary<|message|>{answer}<|end|>" in last


@pytest.mark.parametrize("approval", [pytest.param("always", marks=pytest.mark.slow), "never"])
def test_in_a_pipe_only_calls_that_need_no_approval_are_made(folder, environ, approval):
    with (folder / "config.toml").open("a") as file:
        file.write('\n[mcp.gone]\ncommand = "false"\n')
    text = (folder / "config.toml").read_text().replace("[mcp.notes]", f'[mcp.notes]\napproval = "{approval}"')
    (folder / "config.toml").write_text(text)
    scripts = "[notes('add', a=20, b=3), final('Done so.')]"
    done = subprocess.run(
        command(folder, scripts, "mcp"), input=b"add\n", capture_output=True, timeout=120, env=environ
    )
    told = done.stderr.decode()
    assert done.returncode == 0 and b"Done so." in done.stdout, told
    assert "the tools of gone cannot be had" in told
    last = json.loads((folder / "prompts").read_text())[-1]
    if approval == "never":
        assert 'notes.add {"a": 20, "b": 3}\n23' in told and "<|message|>23<|end|>" in last
    else:
        assert "notes.add was not called, since nobody is here to approve it" in told
        assert "Error: the user did not approve this call." in last


def test_a_question_for_approval_that_is_left_stops_the_turn_and_answers_the_call(tmp_path):
    async def main() -> None:
        from tests.responses.tool_scripts import make_boxes

        boxes = make_boxes(tmp_path, python=None, approval="always")
        engine = Scripted(notes("add", a=1, b=2), "<|channel|>final<|message|>Well.<|return|>")
        session = ChatSession(model(engine=engine), boxes=boxes)

        async def leave(request: object) -> bool:
            raise asyncio.CancelledError

        session.approve = leave
        try:
            await session.set_tools([{"type": "mcp", "server_label": "notes"}])
            assert await session.ask("add", lambda event: None) == "stopped"
            assert [entry.item["type"] for entry in session.turns[0].entries][-2:] == [
                "mcp_approval_request",
                "mcp_approval_response",
            ]
            assert await session.ask("and now?", lambda event: None) == "completed"
        finally:
            await boxes.close()

    asyncio.run(main())


SERVERS = Config(mcp={"a": McpServer(command="x"), "b": McpServer(command="x")})


def test_servers_are_named_one_by_one_or_all_together():
    assert _with_servers(["mcp:b", "python", "mcp"], SERVERS) == ["mcp:b", "python", "mcp:a"]


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["mcp"], Config(), r"the settings have no server; expected a table \[mcp.NAME\]"),
        (["mcp:c"], SERVERS, "expected one of the settings' servers: mcp:a, mcp:b"),
        (["mcp:"], SERVERS, "expected one of the settings' servers"),
        (["shell"], SERVERS, "expected some of: python, browser, apply_patch, mcp, mcp:NAME"),
    ],
)
def test_a_tool_that_is_not_there_is_refused_by_name(names, settings, said):
    with pytest.raises(ConfigError, match=said):
        _with_servers(names, settings)
