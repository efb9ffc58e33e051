"""The guides and README.md are true: every block of code in them is run here, or read by what it is written for.

`CASES` has a case for each block of each page, in their order; a block without one fails. The blocks of a page share a
folder and the names of the page's programs, as they do for whoever follows it. Servers play what the guides' questions
need, under the real grammars; commands that want real weights, other machines or hours are parsed by the real parsers.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, Scripted, model
from tests.responses.tool_scripts import browser, final, make_boxes, notes, python, write_docs
from tests.server import test_adapters
from tests.server.conftest import Served
from tests.server.test_clients import Keyed, called
from tests.train.tiny import write_model

import ossia
from ossia import config
from ossia.cli import main
from ossia.cli.app import app
from ossia.engine.masks import GrammarCompiler
from ossia.evals.benchmarks import BENCHMARKS
from ossia.evals.data import read_questions
from ossia.model.adapter import write_adapter
from ossia.model.random_checkpoint import random_adapter
from ossia.model.safetensors_file import header_bytes
from ossia.model.weights import Checkpoint
from ossia.responses.constrain import Grammars
from ossia.server.store import Store
from ossia.tools.web.backend import make_page
from ossia.tools.web.page import show
from ossia.tools.web.parse_child import Parser
from ossia.train import teachings
from ossia.train.config import SftConfig, read_settings
from ossia.train.data import DataConfig, read_samples

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
COMMAND = typer.main.get_command(app)


class Block(NamedTuple):
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)]


class Place:
    """Where the blocks of a page are run: a folder, the servers that they ask, and names that they have from before."""

    def __init__(self, page: str, folder: Path, request: pytest.FixtureRequest) -> None:
        self.page, self.folder, self.names = page, folder, {"ossia": ossia}
        self._request = request

    def server(self, name: str) -> Served:
        return self._request.getfixturevalue(name)

    def tiny(self, path: str = "gpt-oss-20b") -> Path:
        """A small model of four layers with random weights."""
        made = self._request.getfixturevalue("tiny")
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(made)
        return target

    def python(self, code: str) -> str:
        self.names["__name__"] = "__main__"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, self.page, "exec", dont_inherit=True), self.names)
        return printed.getvalue()

    def shell(self, code: str) -> str:
        # The commands are those of this interpreter.
        programs = self.folder / ".bin"
        programs.mkdir(exist_ok=True)
        (programs / "ossia").write_text(f'#!/bin/sh\nexec {sys.executable} -m ossia "$@"\n')
        (programs / "ossia").chmod(0o755)
        environ = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(self.folder)}
        command = ["bash", "-euo", "pipefail", "-c", code]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, cwd=self.folder)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout


Case = Callable[[Block, Place], None]


# Cases that many blocks have ------------------------------------------------------------------------------------------


def prints(pattern: str, server: str = "served") -> Case:
    """The block is run against a server and prints what matches ``pattern``."""

    def case(block: Block, place: Place) -> None:
        code = re.sub(r"(http://127\.0\.0\.1|localhost):8000", place.server(server).url, block.code)
        # One model plays all.
        code = code.replace("gpt-oss-safeguard-20b", "gpt-oss-20b").replace('"nano"', '"gpt-oss-20b"')
        printed = place.python(code) if block.language == "python" else place.shell(code)
        assert re.search(pattern, printed, re.DOTALL), printed

    return case


def runs_as_it_stands(pattern: str) -> Case:
    """The block prints what matches ``pattern``, with nothing in its way."""

    def case(block: Block, place: Place) -> None:
        printed = place.python(block.code)
        assert re.search(pattern, printed, re.DOTALL), printed

    return case


def runs(block: Block, place: Place) -> None:
    """Each line is a command of ossia that is done in this process."""
    for words in commands(block.code):
        assert words[0] == "ossia" and main(words[1:]) == 0, words


def parses(block: Block, place: Place) -> None:
    """Each command is one that its program has."""
    found = commands(block.code)
    assert found
    for program, *words in found:
        CHECKS[program.removeprefix(".venv/bin/")](words)


def commands(code: str) -> list[list[str]]:
    """The words of each command of a script; pipes and && part them, settings of variables are left out."""
    found: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words: list[str] = []
        for word in [*reader, "&&"]:
            if word in ("&&", "|", ";", "&"):
                found += [words] if words else []
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)
    return found


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the words behind them."""
    command: Any = COMMAND
    words = list(words)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"ossia has no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    return command, words


def parse_ossia(words: list[str]) -> None:
    command, rest = command_of(words)
    # Raises for what is unknown, missing or of another type.
    command.make_context(command.name, rest)


def parse_make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


def parse_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] in ("install", "wheel") and set(re.findall(r"\[(\w+)\]", " ".join(words))) <= set(extras), words


def parse_sudo(words: list[str]) -> None:
    program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    CHECKS.get(Path(program).name, passes)(rest)


def parse_docker(words: list[str]) -> None:
    assert words[0] == "compose" and words[1] in ("build", "up", "run"), words
    if words[1] == "run":
        assert words[2:4] == ["--rm", "ossia"], words
        parse_ossia(words[4:])


def parse_torchrun(words: list[str]) -> None:
    at = words.index("-m")
    assert words[:at] == ["--nproc-per-node", "2"] and words[at + 1] == "ossia", words
    parse_ossia(words[at + 2 :])


def parse_codex(words: list[str]) -> None:
    tested = (ROOT / "tests/server/test_clients.py").read_text()
    assert all(f'"{word}"' in tested for word in words), words


def passes(words: list[str]) -> None:
    """Of the shell, or of git: nothing of ours to check."""


CHECKS = {
    "ossia": parse_ossia,
    "make": parse_make,
    "pip": parse_pip,
    "docker": parse_docker,
    "sudo": parse_sudo,
    "torchrun": parse_torchrun,
    "codex": parse_codex,
    "git": passes,
    "cd": passes,
    "echo": passes,
}


# Cases of one block ---------------------------------------------------------------------------------------------------


def a_model_is_asked(block: Block, place: Place) -> None:
    assert 'ossia.load("gpt-oss-20b")' in block.code and "max_tokens=400" in block.code
    place.tiny()
    code = block.code.replace("max_tokens=400", "max_tokens=20, seed=1")
    assert place.python(code.replace('if delta.channel == "final":', "if delta.text:"))


def the_tree_is_there(block: Block, place: Place) -> None:
    """Every file and folder of the tree; every module is named, or lies in a folder that is told of as a whole."""
    folders: list[tuple[int, Path]] = [(-1, ROOT)]
    named: set[Path] = set()
    for line in block.code.splitlines():
        indent = len(line) - len(line.lstrip())
        while folders[-1][0] >= indent:
            folders.pop()
        for name in line.strip().partition("  ")[0].split():
            if not re.search(r"[./]|^Dockerfile$", name):
                break
            path = folders[-1][1] / name
            assert path.exists(), path.relative_to(ROOT)
            named.add(path)
            if name.endswith("/"):
                folders.append((indent, path))
    whole = {path for path in named if path.is_dir() and not any(one.parent == path for one in named)}
    for path in (ROOT / "src/ossia").rglob("*.py"):
        is_told = path in named or whole & set(path.parents) or path.name in ("__init__.py", "__main__.py")
        assert is_told, f"{path.relative_to(ROOT)} is not in the tree"


def adapters_are_used(block: Block, place: Place) -> None:
    shape = Checkpoint.open(place.tiny()).config
    for name in ("polite", "terse"):
        write_adapter(place.folder / "adapters" / name, random_adapter(shape, rank=4), shape)
    place.python(block.code)


def an_adapter_answers(block: Block, place: Place) -> None:
    place.names["client"] = place.server("adapted").openai
    place.python(f"made = {block.code}")
    assert place.names["made"].model == "polite"


def settings_name_an_adapter(block: Block, place: Place) -> None:
    assert settings(block, place).adapters == {"polite": "/srv/adapters/polite"}


def settings_name_servers(block: Block, place: Place) -> None:
    servers = settings(block, place).mcp
    assert sorted(servers) == ["files", "tracker"] and servers["tracker"].tools == ("search", "read")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRACKER_TOKEN", "t")
        assert config.filled_in(servers["tracker"], "tracker").headers == {"Authorization": "Bearer t"}


def settings(block: Block, place: Place) -> config.Config:
    path = place.folder / "config.toml"
    path.write_text(block.code)
    return config.load(environ={}, toml_path=path)


def a_patch_is_written(block: Block, place: Place) -> None:
    source = 'class Greeter:\n    def greet(self):\n        name = self.name\n        print("Hi")\n'
    (place.folder / "project/src").mkdir(parents=True)
    (place.folder / "project/src/app.py").write_text(source)
    (place.folder / "project/old.txt").write_text("old\n")
    place.names["patch"] = block.code


def a_patch_is_applied(block: Block, place: Place) -> None:
    async def ask(plan: Any) -> bool:
        return '+        print(f"Hi {name}")' in plan.unified_diff()

    place.names["ask"] = ask
    place.python(block.code)
    project = place.folder / "project"
    assert not place.names["output"].is_error, place.names["output"].text
    assert 'f"Hi {name}"' in (project / "src/main.py").read_text()
    assert (project / "notes/new.md").exists() and not (project / "old.txt").exists()


def a_view_looks_so(block: Block, place: Place) -> None:
    html = (
        "<title>Install guide</title><h1>Install guide</h1><ul><li><a href=/requirements>Requirements</a> and "
        "<a href=https://mirror.example.org/>a mirror</a></ul>" + "<p>more</p>" * 65
    )
    parser = Parser()
    page = asyncio.run(make_page(parser, "html", html.encode(), "https://example.com/install"))
    parser.close()
    shown = show(1, page, 0, 42)
    assert [line.rstrip() for line in shown.splitlines()][:8] == block.code.splitlines()


def a_browser_is_used(block: Block, place: Place) -> None:
    write_docs(place.folder / "docs")
    (place.folder / "docs/install.md").write_text("# Install\n\nRun make to install.\n")
    shown = place.python(block.code)
    assert "[0] install" in shown and "[1] Install (local://docs/install.md)" in shown
    assert place.names["text"] == "Run make ([docs](local://docs/install.md))."
    assert place.names["annotations"][0]["lines"] == [4, 4]
    place.names["backend"].close()


def shards_are_laid_out_so(block: Block, place: Place) -> None:
    def told(text: str) -> list[tuple[str, ...]]:
        return re.findall(r"^ +(\w+) +([IUF]\d+) +(\[.*?\])", text, re.MULTILINE)

    assert len(told(block.code)) == 7 and told(block.code) == told(teachings.__doc__)


def exports_are_made(block: Block, place: Place) -> None:
    """Each of the alternatives; what the last one wrote stays."""
    shape = Checkpoint.open(place.tiny()).config
    write_adapter(place.folder / "runs/mine/adapter", random_adapter(shape, rank=4, expert_rank=2), shape)
    weights = place.folder / "runs/full/checkpoints/step-00000200/weights.safetensors"
    weights.parent.mkdir(parents=True)
    sizes = (shape.num_heads * shape.head_dim, shape.hidden_size)
    header = header_bytes({"layers.0.q.weight": ("F32", sizes)})
    weights.write_bytes(header + bytes(4 * sizes[0] * sizes[1]))
    for words in commands(block.code):
        shutil.rmtree("out", ignore_errors=True)
        assert main(words[1:]) == 0, words
        assert Path(words[2]).exists()


def an_export_is_made(block: Block, place: Place) -> None:
    shutil.rmtree("out", ignore_errors=True)
    place.tiny("gpt-oss-20b-folder")
    assert place.python(block.code)


def differences_are_told(block: Block, place: Place) -> None:
    place.tiny("build/random-tiny")
    question, *answer = block.code.splitlines()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(commands(question.removeprefix("$ "))[0][1:]) == 1

    def form(line: str) -> str:
        return re.sub(r"[\d.]+(e-\d+)?", "N", " ".join(line.split()))

    assert {form(line) for line in answer} <= {form(line) for line in printed.getvalue().splitlines()}


def a_function_is_a_tool(block: Block, place: Place) -> None:
    place.python(block.code)
    weather = place.names["weather"]
    assert weather.parameters["required"] == ["city"] and weather("Oslo")["city"] == "Oslo"


def a_task_makes_exercises(block: Block, place: Place) -> None:
    import random

    place.python(block.code)
    task = place.names["Shout"]()
    one = task.instance(random.Random(1))
    assert one.prompt.endswith(one.key) and task.check(one, one.answer) == 1 and task.check(one, "?") == 0


def questions_are_written(block: Block, place: Place) -> None:
    """With rows of the published form in place of the hub's."""
    row = {"id": "x", "question": "What is 7?", "answer": "7", "image": "", "category": "Math", "rationale": "So."}
    datasets = types.ModuleType("datasets")
    datasets.load_dataset = lambda name, split: _Rows([row])  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(place.folder):
        patch.setitem(sys.modules, "datasets", datasets)
        exec(compile(block.code, "evaluation.md", "exec"), {})
    (question,) = read_questions(BENCHMARKS["hle"], [place.folder / "hle.jsonl"])
    assert (question.answer, question.group) == ("7", "Math")


class _Rows(list[dict[str, Any]]):
    def select_columns(self, names: list[str]) -> _Rows:
        return _Rows({name: row[name] for name in names} for row in self)

    def to_json(self, path: str) -> None:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in self))


def requests_are_logged_so(block: Block, place: Place) -> None:
    served = place.server("served")
    caplog = place._request.getfixturevalue("caplog")
    caplog.set_level("INFO")
    served.openai.responses.create(model="gpt-oss-20b", input="text")
    [line] = [one.getMessage() for one in caplog.records if "route=/v1/responses " in one.getMessage()]
    assert re.findall(r"(\w+)=", line) == re.findall(r"(\w+)=", block.code)


def tools_are_asked_for(block: Block, place: Place) -> None:
    tooled = place.server("tooled")
    if tooled.service.tools.python is None:
        pytest.skip(f"no sandbox works on this machine: {tooled.service.tools.off['python']}")
    tooled.play(browser("search", query="rivers"), python("6 * 7"), notes("add", a=1, b=2), final("Three."))
    place.names["client"] = client = tooled.openai
    place.python(block.code)
    made = place.names["response"]
    kinds = ["mcp_list_tools", "web_search_call", "code_interpreter_call", "mcp_approval_request"]
    assert [item.type for item in made.output] == kinds
    answer = {"type": "mcp_approval_response", "approval_request_id": made.output[-1].id, "approve": True}
    tooled.play(final("Three."))
    tools = [{"type": "mcp", "server_label": "notes"}]
    done = client.responses.create(model="gpt-oss-20b", input=[answer], previous_response_id=made.id, tools=tools)
    assert [item.type for item in done.output] == ["mcp_call", "message"] and done.output[0].output == "3"


def endpoints_are_there(block: Block, place: Place) -> None:
    paths = place.server("served").http.get("/openapi.json").json()["paths"]
    known = {(method.upper(), re.sub(r"\{\w+\}", "{}", path)) for path, one in paths.items() for method in one}
    named = re.findall(r"^(GET|POST) +(\S+)", block.code, re.MULTILINE)
    assert len(named) == len(block.code.splitlines())
    assert {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in named} <= known


def data_is_inspected(block: Block, place: Place) -> None:
    rows = [json.loads(one.code) for one in blocks(place.page) if one.language == "json"]
    (place.folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    runs(block, place)


def a_row_is_read(block: Block, place: Place) -> None:
    path = place.folder / "row.jsonl"
    path.write_text(json.dumps(json.loads(block.code)) + "\n")
    [sample] = read_samples(path, DataConfig(), TOKENIZER)
    assert sample.weights_L.any()


def samples_are_read(block: Block, place: Place) -> None:
    place.python(block.code)
    assert place.names["state"] and place.names["batch"]


def a_run_is_begun(block: Block, place: Place) -> None:
    place.tiny("build/random-tiny")
    assert read_settings(SftConfig, Path("recipes/first.toml"), {}).steps > 20
    code = block.code.replace('"steps": 20', '"steps": 2')
    assert code != block.code and "done 2 " in place.python(code)


def a_row_is_of_the_data(block: Block, place: Place) -> None:
    assert json.loads(block.code) in [json.loads(line) for line in (ROOT / "recipes/first.jsonl").open()]


def the_first_run_is_done(block: Block, place: Place) -> None:
    """On a model with a small vocabulary, in place of the one that the first line writes."""
    parses(block, place)
    place.tiny("build/random-tiny")
    assert main(commands(block.code)[-1][1:]) == 0


def what_was_learnt_is_said(block: Block, place: Place) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runs(block, place)
    assert printed.getvalue() == "A small bird.\n"


def what_was_learnt_is_served(block: Block, place: Place) -> None:
    served, engine = test_adapters.serve(
        place.folder / "build/random-tiny", {"first": place.folder / "runs/first/adapter"}, today=lambda: "2026-01-01"
    )
    try:
        assert place.python(block.code.replace("http://127.0.0.1:8000", served.url)) == "A small bird.\n"
    finally:
        served.stop()
        engine.close()


def rows_are_made(block: Block, place: Place) -> None:
    runs(block, place)
    assert len((place.folder / "policies.jsonl").read_text().splitlines()) == 200


CASES: dict[str, list[Case]] = {
    "README.md": [parses, prints("5758"), parses, a_model_is_asked, parses, the_tree_is_there],
    "adapters.md": [
        parses,
        adapters_are_used,
        settings_name_an_adapter,
        parses,
        an_adapter_answers,
        prints("", server="adapted"),
    ],
    "architecture.md": [],
    "apply_patch.md": [a_patch_is_written, a_patch_is_applied],
    "browser.md": [a_view_looks_so, a_browser_is_used],
    "chat.md": [parses],
    "clients.md": [
        prints("The answer is 4.24\nThe answer is 4.\n2 and 2 make 4."),
        prints("The answer is 4."),
        parses,
        prints("The answer is 4.\nThe answer is 4."),
        prints(r'event: response.created.*"delta":" is".*data: \[DONE\].*"content":"The answer is 4.".*"gpt-oss-20b"'),
    ],
    "deploying.md": [parses, parses, parses, parses],
    "distillation.md": [parses, shards_are_laid_out_so, parses],
    "evaluation.md": [parses, parses, parses, questions_are_written, parses],
    "export.md": [exports_are_made, an_export_is_made, differences_are_told],
    "fine-tuning.md": [
        a_row_is_of_the_data,
        runs,
        the_first_run_is_done,
        what_was_learnt_is_said,
        parses,
        what_was_learnt_is_served,
        runs,
        parses,
    ],
    "functions.md": [a_function_is_a_tool],
    "mcp.md": [settings_name_servers, parses],
    "page.md": [parses],
    "python.md": [
        runs_as_it_stands(r"^5758\nstop, \d+ tokens\n$"),
        runs_as_it_stands(r'^\{"kind": ?"(bug|wish)", ?"urgent": ?(true|false)\}\n$'),
        runs_as_it_stands(r"^Done.*functions.close_valve \{.*65.*tool commentary assistant \{.*65.*final None"),
    ],
    "reinforcement.md": [parses, a_task_makes_exercises, parses],
    "safeguard.md": [
        parses,
        prints("1 R3 A gift card is paid outside.\n"),
        prints("1 and the other label is not among"),
        rows_are_made,
    ],
    "sandbox.md": [],
    "nano.md": [],
    "serving.md": [
        parses,
        prints("It is 8. 7"),
        parses,
        parses,
        prints("Done."),
        prints("ossia-.{43}"),
        parses,
        prints(r'{"status":"ok"}ossia_time_to_first_token_seconds_count \d'),
        requests_are_logged_so,
    ],
    "structured-outputs.md": [
        prints("high\n\\[7\\]"),
        prints(r'"text":"{\\"yes\\": true}"'),
        prints("celsius\n21 degrees."),
        prints("SELECT name FROM users"),
        prints(""),
    ],
    "tools.md": [parses, tools_are_asked_for, endpoints_are_there],
    "training-data.md": [data_is_inspected, a_row_is_read, a_row_is_read, samples_are_read],
    "training.md": [parses, parses, a_run_is_begun],
}


def test_every_page_and_every_block_of_it_has_its_case():
    assert set(CASES) == set(PAGES)
    for page, text in PAGES.items():
        found = blocks(page)
        assert len(CASES[page]) == len(found), page
        assert text.count("```") == 2 * len(found), f"{page}: a fence that is not closed"
        assert all(block.language for block in found), f"{page}: a block that does not say its language"
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"\n\n {4}\S", outside), f"{page}: a block without a fence"


# A run of 150 steps.
SLOW = ("fine-tuning.md",)


@pytest.mark.parametrize("page", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in PAGES])
def test_the_blocks_of_a_page_do_what_they_say(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    for name in os.environ:
        if name.startswith(("OSSIA_", "OPENAI_", "ANTHROPIC_")):
            monkeypatch.delenv(name)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    place = Place(page, tmp_path, request)
    for number, (block, case) in enumerate(zip(blocks(page), CASES[page], strict=True), 1):
        try:
            case(block, place)
        except Exception as error:
            error.add_note(f"block {number} of {page}:\n{block.code}")
            raise


# What the blocks ask --------------------------------------------------------------------------------------------------

ANSWER = REASONED + FINAL


def said(text: str) -> str:
    return REASONED + f"<|channel|>final<|message|>{text}<|return|>"


TURNS = {
    "text": (ANSWER,),
    "What is 2 + 2?": (ANSWER,),
    "Why is the sky blue?": (ANSWER,),
    "And twice that?": (said("It is 8."),),
    "What is 4821 + 937?": (said("5758"),),
    "Think long.": (said("Done."),),
    "Report the bug in line 7.": (said('{"title": "Off by one", "severity": "high", "lines": [7]}'),),
    "Yes or no?": (said('{"yes": true}'),),
    "How warm is it in Zürich?": (called("get_weather", {"city": "Zürich", "unit": "celsius"}), said("21 degrees.")),
    "Names of all users.": ("<|channel|>commentary to=functions.query<|message|>SELECT name FROM users<|call|>",),
    "Lamp for sale. Send a gift card to hold it.": (
        said('{"violation": 1, "rule": "R3", "rationale": "A gift card is paid outside."}'),
    ),
    "Pay me by gift card, please.": (said("1"),),
    "Add 2 and 2.": (REASONED + called("add", {"a": 2, "b": 2}), ANSWER),
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Plays `TURNS`."""
    constrain = Grammars(GrammarCompiler(TOKENIZER))
    served = Served(model(engine=Keyed(TURNS), constrain=constrain), Store("sqlite://"), refuses_pages=True)
    yield served
    served.until_idle()
    served.stop()


@pytest.fixture(scope="module")
def tooled(tmp_path_factory) -> Iterator[Served]:
    """Runs tools, and asks before it calls those of others."""
    folder = tmp_path_factory.mktemp("docs")
    boxes = make_boxes(folder, approval="always")
    store = Store(f"sqlite:///{folder / 'ossia.db'}")
    served = Served(model(engine=Scripted(REASONED + FINAL)), store, tools=boxes)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Iterator[Served]:
    """A model with adapters, which clients may load."""
    folder = test_adapters.write_shelf(tmp_path_factory.mktemp("docs"))
    shelf = test_adapters.of_shelf(folder)
    served, engine = test_adapters.serve(folder / "tiny", shelf, folder / "shelf", max_context=128)
    yield served
    served.stop()
    engine.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("docs") / "tiny", num_layers=4)


# What stands between the blocks ---------------------------------------------------------------------------------------


def mentions() -> list[tuple[str, str]]:
    """Commands of ossia between backticks, by their page."""
    return [
        (page, line) for page, text in PAGES.items() for line in re.findall(r"`(?:\.venv/bin/)?ossia ([^`]+)`", text)
    ]


@pytest.mark.parametrize(("page", "line"), mentions())
def test_a_command_and_its_options_are_there(page, line):
    names = line.partition(" / ")[0]
    command, words = command_of(shlex.split(names.replace("...", "")))
    known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)} | {"--help"}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(options) <= known, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_links_to_other_files_lead_there(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", PAGES[page]):
        # An example of a citation's link is none.
        assert ":" in target or (folder / target).exists(), target


@pytest.mark.parametrize("page", ["DESIGN.md", "docs/architecture.md"])
def test_files_that_the_design_names_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    there = [str(path.relative_to(ROOT)) for path in ROOT.glob("[dst]*/**/*") if "__pycache__" not in path.parts]
    for name in re.findall(r"`([\w/.]+(?:\.py|\.md|/))`", text):
        assert any(f"/{path}/".endswith(f"/{name.strip('/')}/") for path in [*there, "web"]), name


def test_every_page_of_the_docs_is_named_somewhere():
    for page in PAGES:
        assert page == "README.md" or any(page in text for name, text in PAGES.items() if name != page), page


def test_settings_in_the_docs_have_those_names():
    fields = set(config.Config.__dataclass_fields__)
    for page in ("browser.md", "tools.md", "mcp.md", "sandbox.md"):
        named = re.findall(r"`((?:browser|max_tool|audit|python|ask|patch|store)_[a-z_]+)(?: = [^`]*)?`", PAGES[page])
        tools = {f"browser_{name}" for name in ("search", "open", "find")}
        assert set(named) <= fields | tools, (page, set(named) - fields)


def test_the_guide_names_every_metric_and_only_these(served):
    told = served.http.get("/metrics").text
    known = set(re.findall(r"^# TYPE (ossia_\w+)", told, re.MULTILINE))
    # The engine's are added by `ossia serve`.
    known |= {"ossia_engine_running", "ossia_engine_waiting", "ossia_kv_blocks", "ossia_kv_blocks_free"}
    known |= {"ossia_drafted_tokens_total", "ossia_accepted_tokens_total"}
    named = set(re.findall(r"`(ossia_\w+)", PAGES["serving.md"]))
    assert named == {name for name in known if not name.endswith(("_created", "ossia_tasks"))}


def test_the_guide_names_every_endpoint(served):
    text = PAGES["serving.md"]
    for path in served.http.get("/openapi.json").json()["paths"]:
        collection = path.partition("/{")[0]
        parent, _, last = collection.rpartition("/")
        named = f"{collection}`" in text or (f"{parent}`" in text and f"`/{last}`" in text)
        assert named or path.startswith("/api/"), path
