"""What is asked for and is not here: a word on what to use instead.

Clients of OpenAI know more endpoints than a server of one language model has. They get a 404 in the API's shape, since
anything from 500 on would be asked again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from starlette.routing import BaseRoute, Match

_OFFERED = (
    "it offers Responses, Conversations, Chat Completions, Completions, Containers, Files, Models and Anthropic's "
    "Messages; see /docs"
)
# First part of a path below /v1 -> what it would be, and what there is instead.
_ABSENT = {
    "assistants": ("Assistants", "use /v1/responses with previous_response_id or a conversation"),
    "audio": ("speech and transcription", "gpt-oss reads and writes text alone"),
    "batches": ("batches", "send requests together, or /v1/responses with background: true"),
    "chatkit": ("ChatKit", "use /v1/responses"),
    "decisions": ("decisions", "use /v1/responses with text.format json_schema and an enum"),
    "embeddings": ("embeddings", "gpt-oss writes text and has no embedding of one"),
    "evals": ("evals", "`ossia --help` tells what runs here"),
    "fine_tuning": ("fine-tuning over HTTP", "`ossia --help` tells what runs here"),
    "images": ("images", "gpt-oss reads and writes text alone"),
    "moderations": ("moderations", "ask the model under a policy of yours, with text.format json_schema"),
    "organization": ("organizations", "keys are lines of the server's key file: `ossia serve --new-key NAME`"),
    "realtime": ("realtime sessions", "use /v1/responses with stream: true"),
    "skills": ("skills", "use tools of /v1/responses"),
    "threads": ("Assistants", "use /v1/responses with previous_response_id or a conversation"),
    "uploads": ("uploads in parts", "send the whole file to /v1/files"),
    "vector_stores": ("vector stores", "the browser tool searches a folder: `ossia serve --browser-root FOLDER`"),
    "videos": ("videos", "gpt-oss reads and writes text alone"),
}


class Absent(NamedTuple):
    """The answer to a request that no route takes."""

    status: int
    message: str
    code: str
    # Methods that the path does take.
    allow: str = ""


def absent(method: str, path: str, routes: Iterable[BaseRoute]) -> Absent:
    shown = f"{method} {path[:200]}"
    routes = list(routes)
    if allowed := _methods(path, routes):
        return Absent(
            405, f"{shown} is not offered; this path takes {' and '.join(allowed)}; see /docs", "method_not_allowed",
            ", ".join(allowed),
        )  # fmt: skip
    part = re.match(r"(?:/v1)?/([a-z_]+)", path)
    if part is not None and part[1] in _ABSENT and not _methods(f"/v1/{part[1]}", routes):
        what, instead = _ABSENT[part[1]]
        return Absent(404, f"{shown}: ossia has no {what}: {instead}; {_OFFERED}", "unsupported_endpoint")
    if not path.startswith("/v1/") and _methods(f"/v1{path}", routes):
        return Absent(404, f"{shown} is not offered; /v1{path[:200]} is: let the base URL end in /v1", "unknown_url")
    if path.startswith("/v1/v1/"):
        return Absent(404, f"{shown} is not offered; /v1 stands in it twice: for Anthropic's clients the base URL "
                      "ends before it", "unknown_url")  # fmt: skip
    return Absent(404, f"{shown} is not offered by ossia; {_OFFERED}", "unknown_url")


def _methods(path: str, routes: Iterable[BaseRoute]) -> list[str]:
    """The methods that a path takes."""
    scope = {"type": "http", "path": path, "root_path": "", "headers": []}
    return [
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]
