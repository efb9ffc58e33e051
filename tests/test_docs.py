"""The guides are true: what stands in their code blocks is run, against a server under the real grammars.

The model plays what the guides' questions need. A block behind `<!-- not run here: why -->` needs a program that is not
there; everything else in ```python or ```sh runs as it is, but for the address of the server.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, model
from tests.server.conftest import Served
from tests.server.test_clients import Keyed, called

from ossia.engine.masks import GrammarCompiler
from ossia.responses.constrain import Grammars
from ossia.server.store import Store

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = ("clients.md", "serving.md", "structured-outputs.md", "../README.md")
_BLOCK = re.compile(r"^(<!-- not run here: .+ -->\n)?```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ANSWER = REASONED + FINAL


def said(text: str) -> str:
    return REASONED + f"<|channel|>final<|message|>{text}<|return|>"


TURNS = {
    "text": (ANSWER,),
    "What is 2 + 2?": (ANSWER,),
    "Why is the sky blue?": (ANSWER,),
    "And twice that?": (said("It is 8."),),
    "Think long.": (said("Done."),),
    "Report the bug in line 7.": (said('{"title": "Off by one", "severity": "high", "lines": [7]}'),),
    "Yes or no?": (said('{"yes": true}'),),
    "How warm is it in Zürich?": (called("get_weather", {"city": "Zürich", "unit": "celsius"}), said("21 degrees.")),
    "Names of all users.": ("<|channel|>commentary to=functions.query<|message|>SELECT name FROM users<|call|>",),
    "Add 2 and 2.": (REASONED + called("add", {"a": 2, "b": 2}), ANSWER),
}
# What the blocks of a guide print, in their order.
PRINTED = {
    "clients.md": [
        "The answer is 4.24\nThe answer is 4.\n2 and 2 make 4.",
        "The answer is 4.",
        "The answer is 4.\nThe answer is 4.",
        r'event: response.created.*"delta":" is".*data: \[DONE\].*"content":"The answer is 4.".*"id":"gpt-oss-20b"',
    ],
    "serving.md": ["It is 8. 7", "Done.", "ossia-.{43}", r'{"status":"ok"}ossia_time_to_first_token_seconds_count \d'],
    "../README.md": ["The answer is 4."],
    "structured-outputs.md": [
        "high\n\\[7\\]",
        r'"text":"{\\"yes\\": true}"',
        "celsius\n21 degrees.",
        "SELECT name FROM users",
        "",
    ],
}


def blocks(guide: str) -> list[tuple[str, str]]:
    """Language and code of the blocks that are run."""
    found = _BLOCK.findall((DOCS / guide).read_text(encoding="utf-8"))
    # What loads a model itself is no matter of the server's.
    return [(language, code) for skipped, language, code in found if not skipped and "ossia.load(" not in code]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    constrain = Grammars(GrammarCompiler(TOKENIZER))
    served = Served(model(engine=Keyed(TURNS), constrain=constrain), Store("sqlite://"), refuses_pages=True)
    yield served
    served.until_idle()
    served.stop()


@pytest.mark.parametrize(("guide", "number"), [(guide, i) for guide in GUIDES for i in range(len(blocks(guide)))])
def test_a_block_of_a_guide_does_what_it_says(served, tmp_path, monkeypatch, guide, number):
    language, code = blocks(guide)[number]
    code = code.replace("http://127.0.0.1:8000", served.url)
    for name in os.environ:
        if name.startswith(("OSSIA_", "OPENAI_", "ANTHROPIC_")):
            monkeypatch.delenv(name)
    printed = in_python(code) if language == "python" else in_shell(code, tmp_path)
    assert re.search(PRINTED[guide][number], printed, re.DOTALL), printed


def in_python(code: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "block", "exec", dont_inherit=True), {"__name__": "__main__"})
    return printed.getvalue()


def in_shell(code: str, folder: Path) -> str:
    # The commands are those of this interpreter.
    (folder / "ossia").write_text(f'#!/bin/sh\nexec {sys.executable} -m ossia "$@"\n')
    (folder / "ossia").chmod(0o755)
    environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "XDG_DATA_HOME": str(folder), "HOME": str(folder)}
    command = ["bash", "-euo", "pipefail", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=folder)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_block_is_run_or_says_why_not():
    for guide in GUIDES:
        text = (DOCS / guide).read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(_BLOCK.findall(text)), guide
        assert len(PRINTED[guide]) == len(blocks(guide))


def test_links_between_the_guides_lead_somewhere():
    for guide in (*DOCS.glob("*.md"), DOCS.parent / "README.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", guide.read_text(encoding="utf-8")):
            assert (guide.parent / target).exists(), f"{guide.name}: {target}"


def test_the_guide_names_every_metric_and_only_these(served):
    told = served.http.get("/metrics").text
    known = set(re.findall(r"^# TYPE (ossia_\w+)", told, re.MULTILINE))
    # The engine's are added by `ossia serve`.
    known |= {"ossia_engine_running", "ossia_engine_waiting", "ossia_kv_blocks", "ossia_kv_blocks_free"}
    named = set(re.findall(r"`(ossia_\w+)", (DOCS / "serving.md").read_text(encoding="utf-8")))
    assert named == {name for name in known if not name.endswith(("_created", "ossia_tasks"))}


def test_the_guide_names_every_endpoint(served):
    text = (DOCS / "serving.md").read_text(encoding="utf-8")
    for path in served.http.get("/openapi.json").json()["paths"]:
        collection = path.partition("/{")[0]
        parent, _, last = collection.rpartition("/")
        named = f"{collection}`" in text or (f"{parent}`" in text and f"`/{last}`" in text)
        assert named or path.startswith("/api/"), path
