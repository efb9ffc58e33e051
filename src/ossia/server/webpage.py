"""The chat page at `/`, and the two things that it asks besides the public API: what is served, and exact tokens.

The page is files beside this module (`web/`, built from the `web/` of the repository): nothing comes from elsewhere.
Its policy lets no script run but its own, and nothing be loaded or sent but from and to this server; what a model
writes is sanitised before it is shown, besides.
"""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ossia.errors import NotFoundError
from ossia.responses.schema import Json, PromptRequest
from ossia.server.service import Service
from ossia.server.stream import JSONResponse, caller_of

# What a browser may load for the page itself, before it has a key.
ASSETS_PATH = "/web/"

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        # Formulas are laid out by style attributes; a style cannot run anything or, with these sources, load anything.
        "style-src 'self'",
        "style-src-attr 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class Served(BaseModel):
    """What this server offers, for a page that shows it."""

    version: str
    model: str
    # Names of adapters that a request may give in place of the model's.
    adapters: list[str]
    context: int
    # What people should know of the model before they ask it.
    notice: str
    # Tools that run here, by name, with what says more of each; and why others do not.
    tools: dict[str, str]
    off: dict[str, str]


class Token(BaseModel):
    """One token of a prompt."""

    id: int
    text: str
    is_special: bool


class Tokens(BaseModel):
    """A prompt as the model reads it."""

    object: Literal["response.tokens"]
    data: list[Token]


def router(service: Service) -> APIRouter:
    routes = APIRouter(default_response_class=JSONResponse)

    @routes.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _file(request, "index.html")

    @routes.get(ASSETS_PATH + "{name:path}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        return _file(request, name)

    @routes.get("/v1/served", tags=["Server"], responses={200: {"model": Served}}, summary="What is served")
    async def served() -> Response:
        on, off = await service.tools.start()
        tools = dict(_named(text) for text in on)
        facts = Served(
            version=version("ossia"),
            model=service.model.name,
            adapters=sorted(service.adapters.offered) if service.adapters is not None else [],
            context=service.context,
            notice=service.notice,
            tools=tools,
            off=dict(off),
        )
        return JSONResponse(facts.model_dump())

    @routes.post(
        "/v1/responses/tokens",
        tags=["Responses"],
        responses={200: {"model": Tokens}},
        summary="The prompt of a request, token by token",
        description="With `reasoning.context` all_turns, earlier thoughts too. An addition to OpenAI's API.",
    )
    async def tokens(body: PromptRequest, request: Request) -> Response:
        _, read = await service.prepared(body, caller_of(request))
        tokenizer = service.model.tokenizer
        data: list[Json] = [
            {"id": one, "text": tokenizer.decode([one]), "is_special": one in tokenizer.special_ids}
            for one in read.prompt.token_ids
        ]
        return JSONResponse({"object": "response.tokens", "data": data})

    return routes


def _named(text: str) -> tuple[str, str]:
    """A tool's name, and what stands in parentheses behind it."""
    name, _, more = text.partition(" (")
    return name, more.removesuffix(")")


def _file(request: Request, name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise NotFoundError(f"the page has no file {name[:80]!r}")
    data, media_type, tag = found
    headers = {**_HEADERS, "etag": tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=media_type, headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Every file of the page by name: its bytes, type and tag. A megabyte or two, read once."""
    files: dict[str, tuple[bytes, str, str]] = {}
    for entry in resources.files("ossia.server").joinpath("web").iterdir():
        if entry.is_file():
            data = entry.read_bytes()
            # Types of the machine's own tables differ.
            media_type = {"js": "text/javascript", "woff2": "font/woff2", "svg": "image/svg+xml"}.get(
                entry.name.rpartition(".")[2]
            ) or str(mimetypes.guess_type(entry.name)[0] or "application/octet-stream")
            files[entry.name] = (data, media_type, f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"')
    return files
