"""The three questions that `codex --oss` asks an Ollama before it speaks the Responses API."""

from __future__ import annotations

import datetime

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response as HttpResponse

from ossia.errors import ModelNotFoundError
from ossia.responses.schema import Json
from ossia.server.service import Service
from ossia.server.stream import JSONResponse

# The version of Ollama from which on clients trust it with the Responses API.
_VERSION = "0.13.4"


class ShowRequest(BaseModel):
    """The body of POST /api/show."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    name: str | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/api", tags=["Ollama"], default_response_class=JSONResponse)
    details = {"format": "safetensors", "family": "gptoss", "families": ["gptoss"], "parameter_size": "",
               "quantization_level": "MXFP4"}  # fmt: skip
    modified_at = datetime.datetime.fromtimestamp(service.created_at, datetime.UTC).isoformat()

    @routes.get("/version", responses={200: {"model": dict[str, str]}}, summary="A version that clients accept")
    async def version() -> HttpResponse:
        return JSONResponse({"version": _VERSION})

    @routes.get("/tags", summary="List the models")
    async def tags() -> HttpResponse:
        return JSONResponse({"models": [_tag(name) for name in sorted(service.names)]})

    def _tag(name: str) -> Json:
        return {"name": name, "model": name, "modified_at": modified_at, "size": 0, "digest": "", "details": details}

    @routes.post("/show", summary="Tell of a model")
    async def show(body: ShowRequest) -> HttpResponse:
        name = body.model or body.name or ""
        if name not in service.names:
            raise ModelNotFoundError(f"model {name[:80]!r} is not served here", param="model")
        capabilities = ["completion", "tools", "thinking"]
        shown = {"details": details, "capabilities": capabilities, "modified_at": modified_at}
        return JSONResponse({**shown, "model_info": {"general.architecture": "gptoss"}})

    return routes
