"""What README.md and the pages on tools say can be done is done here: blocks run, commands and options are there."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

import openai
import pytest
import typer
from tests.responses.scripts import FINAL, REASONED, Scripted, model
from tests.responses.tool_scripts import browser, final, make_boxes, notes, python, write_docs
from tests.server.conftest import Served

from ossia import config
from ossia.cli.app import app
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.server.store import Store

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "<docs>", "exec"), names)
    return names


def commands() -> list[tuple[str, str]]:
    """Commands of ossia in blocks and between backticks, by their page."""
    found = []
    for page, text in PAGES.items():
        lines = re.findall(r"^ {4}(?:.*\| )?(?:\.venv/bin/)?(ossia .*)$", text, re.MULTILINE)
        lines += re.findall(r"`(?:\.venv/bin/)?(ossia [^`]+)`", text)
        found += [(page, line.partition(" #")[0].partition("    ")[0].strip()) for line in lines]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_and_its_options_are_there(page, line):
    words = shlex.split(line.replace("...", ""))[1:]
    command: Any = typer.main.get_command(app)
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        name = words.pop(0)
        if re.fullmatch(r"[a-z-]+", name):
            assert name in command.commands, f"{page}: {line}"
            command = command.commands[name]
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(options) <= known, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_links_to_other_files_lead_there(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", PAGES[page]):
        # An example of a citation's link is none.
        assert ":" in target or (folder / target).exists(), target


def test_every_page_of_the_docs_is_named_somewhere():
    for page in PAGES:
        assert page == "README.md" or any(page in text for name, text in PAGES.items() if name != page), page


def test_settings_that_the_docs_show_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKER_TOKEN", "t")
    path = tmp_path / "config.toml"
    path.write_text(blocks("mcp.md", "toml")[0])
    servers = config.load(environ={}, toml_path=path).mcp
    assert sorted(servers) == ["files", "tracker"] and servers["tracker"].tools == ("search", "read")
    assert config.filled_in(servers["tracker"], "tracker").headers == {"Authorization": "Bearer t"}


def test_settings_in_the_docs_have_those_names():
    fields = set(config.Config.__dataclass_fields__)
    for page in ("browser.md", "tools.md", "mcp.md", "sandbox.md"):
        named = re.findall(r"`((?:browser|max_tool|audit|python|ask|patch|store)_[a-z_]+)(?: = [^`]*)?`", PAGES[page])
        tools = {f"browser_{name}" for name in ("search", "open", "find")}
        assert set(named) <= fields | tools, (page, set(named) - fields)


def test_five_lines_of_python_answer(tmp_path, capsys):
    path = write_random_checkpoint(tmp_path / "tiny", "tiny")
    code = blocks("README.md", "python")[1]
    assert 'ossia.load("gpt-oss-20b")' in code and "max_tokens=400" in code
    code = code.replace('"gpt-oss-20b"', repr(str(path))).replace("max_tokens=400", "max_tokens=20, seed=1")
    run(code.replace('if delta.channel == "final":', "if delta.text:"))
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def tooled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    boxes = make_boxes(folder, approval="always")
    store = Store(f"sqlite:///{folder / 'ossia.db'}")
    served = Served(model(engine=Scripted(REASONED + FINAL)), store, tools=boxes)
    yield served
    served.stop()


def test_a_client_is_answered(tooled, capsys):
    code = blocks("README.md", "python")[0]
    assert 'base_url="http://127.0.0.1:8000/v1"' in code
    tooled.play(REASONED + FINAL)
    run(code.replace("http://127.0.0.1:8000", tooled.url))
    assert capsys.readouterr().out == "The answer is 4.\n"


def test_a_request_with_all_tools_is_answered(tooled):
    if tooled.service.tools.python is None:
        pytest.skip(f"no sandbox works on this machine: {tooled.service.tools.off['python']}")
    tooled.play(browser("search", query="rivers"), python("6 * 7"), notes("add", a=1, b=2), final("Three."))
    made = run(blocks("tools.md", "python")[0], client=tooled.openai)["response"]
    kinds = ["mcp_list_tools", "web_search_call", "code_interpreter_call", "mcp_approval_request"]
    assert [item.type for item in made.output] == kinds
    answer = {"type": "mcp_approval_response", "approval_request_id": made.output[-1].id, "approve": True}
    tooled.play(final("Three."))
    client: openai.OpenAI = tooled.openai
    tools = [{"type": "mcp", "server_label": "notes"}]
    done = client.responses.create(model="gpt-oss-20b", input=[answer], previous_response_id=made.id, tools=tools)
    assert [item.type for item in done.output] == ["mcp_call", "message"] and done.output[0].output == "3"


def test_a_browser_is_used_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    write_docs(tmp_path / "docs")
    (tmp_path / "docs" / "install.md").write_text("# Install\n\nRun make to install.\n")
    names = run(blocks("browser.md", "python")[0])
    shown = capsys.readouterr().out
    assert "[0] install" in shown and "[1] Install (local://docs/install.md)" in shown
    assert names["text"] == "Run make ([docs](local://docs/install.md))." and names["annotations"][0]["lines"] == [4, 4]
    names["backend"].close()


def test_a_function_becomes_a_tool():
    names = run(blocks("functions.md", "python")[0])
    assert names["weather"].parameters["required"] == ["city"] and names["weather"]("Oslo")["city"] == "Oslo"


def test_a_patch_is_applied_when_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").mkdir()

    async def ask(plan: Any) -> bool:
        await asyncio.sleep(0)
        return "+hello" in plan.unified_diff()

    patch = "*** Begin Patch\n*** Add File: a.txt\n+hello\n*** End Patch"
    names = run(blocks("apply_patch.md", "python")[0], ask=ask, patch=patch)
    assert not names["output"].is_error and (tmp_path / "project" / "a.txt").read_text() == "hello\n"
