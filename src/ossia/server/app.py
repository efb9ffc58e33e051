"""The application: routes, and the gate in front of them - keys, rates, size, request id, errors, the log line.

Errors have OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, for Anthropic's endpoints theirs. What is
wrong with a request is a 4xx: clients ask again after a 5xx, and would be wrong again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ossia.errors import LimitError, OssiaError, TooLargeError
from ossia.responses.schema import Json
from ossia.server import (
    adapters,
    chat,
    completions,
    containers,
    conversations,
    files,
    messages,
    ollama,
    responses,
    webpage,
)
from ossia.server.absent import absent
from ossia.server.document import openapi, page
from ossia.server.limits import check_page
from ossia.server.metrics import log_fields, log_request
from ossia.server.service import Service
from ossia.server.stream import ClientGone, JSONResponse
from ossia.server.tracing import current_trace

_log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What may be asked without a key.
_OPEN_PATHS = frozenset({"/", "/health", "/ready"})
# How the validator names the options of a field that may be of several types.
_TYPES = frozenset({"str", "int", "bool", "float", "list", "dict"})
# Responses that are still under way when the server is told to stop get this long.
_PATIENCE_S = 20.0


def create_app(service: Service) -> FastAPI:
    """The application that serves ``service``; it closes the store when it ends."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        num_failed = await service.store.run(service.store.fail_orphans)
        await service.store.run(service.store.sweep)
        if num_failed:
            _log.warning("responses that an earlier server left undone: %d", num_failed)
        on, off = await service.tools.start()
        _log.info("tools=%s", ", ".join(on) or "none")
        for name, reason in off.items():
            _log.info("tool=%s off=%s", name, reason)
        yield
        await service.stop(_PATIENCE_S)

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,
        redirect_slashes=False,
    )
    document: Json | None = None
    app.include_router(adapters.router(service.adapters, service.model))
    for part in (webpage, responses, conversations, chat, completions, containers, files, messages, ollama):
        app.include_router(part.router(service))

    @app.get("/health", tags=["Server"], summary="Whether the server runs")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/ready",
        tags=["Server"],
        summary="Whether the server takes requests",
        responses={200: {"model": dict[str, str]}, 503: {"description": "It stops.", "model": dict[str, str]}},
    )
    async def ready() -> Response:
        is_ready = not service.is_stopping
        return JSONResponse({"status": "ready" if is_ready else "stopping"}, status_code=200 if is_ready else 503)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        return JSONResponse(await documented())

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return HTMLResponse(page(await documented(), service.model.name, str(request.base_url)))

    async def documented() -> Json:
        # Seconds of work at the first time: beside the event loop, and not for a server that nobody asks.
        nonlocal document
        if document is None:
            document = await asyncio.to_thread(openapi, app)
        return document

    @app.get(
        "/metrics",
        tags=["Server"],
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_exception_handler(OssiaError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(ClientGone, _on_error)
    app.add_middleware(Gate, service=service)
    return app


def _on_error(request: Request, error: Exception) -> Response:
    """Every error, decided in one place."""
    headers: dict[str, str] = {}
    kind, code, param = "invalid_request_error", None, None
    match error:
        case OssiaError():
            status, message, kind, code, param = error.status, error.message, error.type, error.code, error.param
            if isinstance(error, LimitError):
                headers["retry-after"] = str(math.ceil(error.retry_after_s))
            if status == 401:
                headers["www-authenticate"] = "Bearer"
        case RequestValidationError():
            status, (message, param) = 400, _fault(request, error)
        case HTTPException() if error.status_code in (404, 405):
            status, message, code, allow = absent(request.method, request.scope["path"], request.app.routes)
            if allow:
                headers["allow"] = allow
        case HTTPException():
            status, message = error.status_code, str(error.detail)
            headers |= dict(error.headers or {})
            if error.__cause__ is not None:
                # Read by no more than the framework: it says that something was wrong, the cause says what.
                message = f"the body cannot be read as JSON: {str(error.__cause__)[:200]}"
        case ClientGone():
            # Nobody reads this; the number is for the log.
            status, message = 499, "the client left"
        case _:
            _log.error("request failed", exc_info=error)
            status, message, kind = 500, "the server met an error of its own; its log tells more", "server_error"
    if request.scope["path"].startswith("/v1/messages"):
        return JSONResponse(messages.error_body(status, message), status_code=status, headers=headers)
    body: Json = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)


def _fault(request: Request, error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with the fields of a request, and with which."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}", None
    if first["loc"] == ("body",):
        kind = request.headers.get("content-type", "")
        if first["type"] == "missing":
            return "the request has no body; send a JSON object", None
        if "json" not in kind:
            return f"the body came as {kind[:80]!r}; send JSON, with the header 'Content-Type: application/json'", None
    # Of a field that may be of several types each says what it misses; what came furthest was meant.
    field = first["loc"][:2]
    faults = [(_place(one["loc"]), one["msg"]) for one in error.errors() if one["loc"][:2] == field]
    param = max((place for place, _ in faults), key=len)
    says = " or ".join(dict.fromkeys(message for place, message in faults if place == param))
    return f"{param or 'the body'}: {says}"[:1_000], param or None


def _place(loc: tuple[str | int, ...]) -> str:
    """A field as people write it; between its names the validator names types, which are left out."""
    place = ""
    for part in loc[1:]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in _TYPES and "[" not in part:
            place += f".{part}" if place else part
    return place[:200]


class Gate:
    """In front of every request: an id, the key, the rate, the size; behind it: the log line and the counts."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        # A slash too many is no other place, and HEAD asks for what GET answers with; the server sends no body then.
        path = re.sub("//+", "/", scope["path"]).rstrip("/") or "/"
        scope = {**scope, "path": path, "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        given = request.headers.get("x-request-id", "")
        # A proxy's or client's own id, where it is one that a log can hold.
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        began_s = time.perf_counter()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        caller: str | None = None
        fields: Json = {}
        log_fields.set(fields)
        tracing = self._service.tracing
        trace = None if tracing is None else tracing.begin(request.method, dict(request.headers))
        current_trace.set(trace)
        try:
            try:
                caller = scope["ossia.caller"] = self._admit(request, path)
                await self._app(scope, _bounded(receive, self._service.max_request_bytes), answer)
            except OssiaError as error:
                await _on_error(request, error)(scope, receive, answer)
            # Here and not further out, so that a fault of ours has an id, a log line and a count like every answer.
            except Exception as error:
                if status:
                    raise
                await _on_error(request, error)(scope, receive, answer)
        finally:
            elapsed_s = time.perf_counter() - began_s
            route = getattr(scope.get("route"), "path", None) or "none"
            self._service.metrics.requests.labels(route, str(status)).inc()
            self._service.metrics.duration_s.labels(route).observe(elapsed_s)
            seconds = round(elapsed_s, 4)
            if trace is not None:
                trace.end(f"{request.method} {route}", status, {"request": request_id, "key": caller, **fields})
                fields["trace"] = trace.id
            log_request(
                request=request_id,
                method=request.method,
                route=route,
                status=status,
                key=caller,
                seconds=seconds,
                **fields,
            )

    def _admit(self, request: Request, path: str) -> str | None:
        """The caller's name. Raises what stands against the request."""
        if path in _OPEN_PATHS or path.startswith(webpage.ASSETS_PATH):
            return None
        if self._service.refuses_pages:
            check_page(request.headers.get("host"), request.headers.get("origin"))
        caller = self._service.keys.check(request.headers.get("authorization"), request.headers.get("x-api-key"))
        if request.method == "POST":
            self._service.rates.take(caller or (request.client.host if request.client else "local"))
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._service.max_request_bytes:
            raise _too_large(self._service.max_request_bytes)
        return caller


def _too_large(limit: int) -> TooLargeError:
    return TooLargeError(f"the request's body is larger than {limit} bytes; send less, or raise max_request")


def _bounded(receive: Receive, limit: int) -> Receive:
    """Of a body that does not tell its length, no more is read than is allowed."""
    num_bytes = 0

    async def read() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > limit:
            error = _too_large(limit)
            raise HTTPException(error.status, error.message)
        return message

    return read
