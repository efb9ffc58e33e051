"""Tools of ours for tests, and what a model says to call them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ossia.config import McpServer
from ossia.responses.toolbox import Toolboxes
from ossia.tools.mcp import McpPool
from ossia.tools.python import PythonSessions
from ossia.tools.web.backend import open_backend

SEARCH = {"type": "web_search"}
INTERPRETER = {"type": "code_interpreter", "container": {"type": "auto"}}
NOTES = {"type": "mcp", "server_label": "notes"}


def python(code: str) -> str:
    return f"<|channel|>analysis to=python code<|message|>{code}<|call|>"


def browser(name: str, **arguments: Any) -> str:
    return f"<|channel|>analysis to=browser.{name} code<|message|>{json.dumps(arguments)}<|call|>"


def notes(name: str, **arguments: Any) -> str:
    said = json.dumps(arguments)
    return f"<|channel|>commentary to=notes.{name} <|constrain|>json<|message|>{said}<|call|>"


def final(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def write_docs(folder: Path) -> Path:
    """A folder to browse: one long page on rivers that links to one on lakes."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = [f"<p>Fact {i}: the river number {i} is {i * 10} kilometres long and flows slowly." for i in range(200)]
    rivers = "<title>Rivers</title><h1>Rivers</h1><p>See <a href=lakes.html>lakes</a>." + "".join(facts)
    (folder / "rivers.html").write_text(rivers)
    (folder / "lakes.html").write_text("<title>Lakes</title><h1>Lakes</h1><p>A lake is a body of standing water.")
    return folder


def make_boxes(folder: Path, *, approval: str = "never", **fields: Any) -> Toolboxes:
    """Python in a sandbox, a browser of a folder, and a server of tools."""
    docs = write_docs(folder / "docs")
    environ = {"PYTHONPATH": os.pathsep.join(sys.path)}
    server = McpServer(command=sys.executable, args=(str(Path(__file__).with_name("mcp_notes.py")),), env=environ,
                       approval=approval)  # fmt: skip
    made = {
        "python": PythonSessions(num_warm=0),
        "browser": open_backend(f"local:{docs}", index_folder=folder / "index"),
        "mcp": {"notes": server},
        "mcp_pool": McpPool(),
    }
    return Toolboxes(**{**made, **fields})


PYTHON_LOOP = [python(f"total = globals().get('total', 0) + {i}\ntotal") for i in range(12)]
BROWSER_LOOP = [
    browser("search", query="rivers"),
    browser("open", id=0),
    browser("open", loc=40),
    browser("open", cursor=1, loc=80),
    browser("find", pattern="river number 7 "),
    browser("open", id=0),
    browser("open", id=0, cursor=1),
    browser("find", pattern="standing"),
    browser("search", query="standing water"),
    browser("open", cursor=2),
    browser("open", cursor=1, loc=0),
]
NOTES_LOOP = [notes("add", a=i, b=1) for i in range(10)]
