"""Anthropic's Messages over HTTP, as far as its coding clients use them: the same loop in other words.

The chain of thought is a `thinking` block, signed with what this server sealed, so that it comes back exactly.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import InputError
from ossia.responses.convert import part_text
from ossia.responses.events import Event
from ossia.responses.loop import Extras, Run
from ossia.responses.schema import Json, Number, ResponseRequest, dumps, new_id
from ossia.server.chat import valid
from ossia.server.effort import budget_of, effort_of
from ossia.server.places import named_as
from ossia.server.service import Service
from ossia.server.stream import EventStream, JSONResponse, caller_of, opened, while_there

_HINTS = frozenset({"metadata", "output_config", "service_tier"})
_ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error",
}  # fmt: skip


class CountRequest(BaseModel):
    """The body of POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[Json], Field(min_length=1, max_length=10_000)]
    system: str | list[Json] | None = None
    tools: list[Json] | None = Field(default=None, max_length=1024)
    tool_choice: Json | None = None
    thinking: Json | None = None


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages. Names of models and adapters that are not served mean the model that is."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    stop_sequences: list[str] | None = Field(default=None, max_length=64)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: int | None = Field(default=None, ge=0)


class Message(BaseModel):
    """A message of the model's."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Json]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: dict[str, int]


class Counted(BaseModel):
    """How many tokens the model would read."""

    input_tokens: int


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Messages"], default_response_class=JSONResponse)

    @routes.post("/messages", responses={200: {"model": Message}}, summary="Create a message")
    async def create(body: MessagesRequest, request: Request) -> HttpResponse:
        sampling = {"top_k": body.top_k} if body.top_k else {}
        stops = tuple(text for text in body.stop_sequences or () if text)
        with named_as(_FIELDS, lambda: [place for place, _ in _read(body)]):
            asked = _to_response_request(body, service)
            run = await service.begin(asked, Extras(sampling, stops), owner=caller_of(request), can_ask=False)
        headers = service.ignored(body, run.tools.ignored, _HINTS)
        if body.stream:
            return EventStream(await opened(request, _stream(service, run, body.model)), headers)
        await while_there(request, service.finish([run]))
        return JSONResponse(_whole(run, run.response, body.model or service.model.name), headers=headers)

    @routes.post("/messages/count_tokens", responses={200: {"model": Counted}}, summary="Count the tokens of a message")
    async def count(body: CountRequest, request: Request) -> HttpResponse:
        with named_as(_FIELDS, lambda: [place for place, _ in _read(body)]):
            _, read = await service.prepared(_to_response_request(body, service), caller_of(request))
        return JSONResponse({"input_tokens": len(read.prompt.token_ids)})

    return routes


def error_body(status: int, message: str) -> Json:
    """An error in Anthropic's shape."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


# To items --------------------------------------------------------------------------------------------------------


def _to_response_request(body: CountRequest, service: Service) -> ResponseRequest:
    given = {**(body.model_extra or {}), "thinking": body.thinking}
    return valid(
        {
            "model": body.model if body.model in service.names else None,
            "instructions": _text(body.system, "system") or None,
            "input": [item for _, item in _read(body)],
            "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
            "tool_choice": _choice(body.tool_choice),
            "text": _format(given.get("output_config")),
            "reasoning": {"effort": effort_of(given), "max_tokens": budget_of(given)},
            "max_output_tokens": getattr(body, "max_tokens", None),
            "temperature": getattr(body, "temperature", None),
            "top_p": getattr(body, "top_p", None),
            "include": ["reasoning.encrypted_content"],
            "store": False,
        }
    )


# What the Responses API's places are called here.
_FIELDS = [
    (r"(messages\[\d+\]\.content\[\d+\])\.call_id", r"\1.tool_use_id"),
    (r"(messages\[\d+\]\.content\[\d+\])\.content", r"\1.text"),
    (r"tools\[(\d+)\]\.parameters", r"tools[\1].input_schema"),
    (r"text\.format", "output_config.format"),
    (r"reasoning\.effort", "output_config.effort"),
    ("max_output_tokens", "max_tokens"),
    ("instructions", "system"),
    ("input", "messages"),
]


def _read(body: CountRequest) -> Iterator[tuple[str, Json]]:
    """The items of all messages, each with its place."""
    for i, message in enumerate(body.messages):
        yield from _items(message, f"messages[{i}]")


def _items(message: Json, where: str) -> Iterator[tuple[str, Json]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise InputError(f"{where}.role is {role!r}; expected user or assistant", param=f"{where}.role")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InputError(f"{where}.content is no text and no list of blocks", param=f"{where}.content")
    has_calls = any(block.get("type") == "tool_use" for block in blocks)
    for i, block in enumerate(blocks):
        place = f"{where}.content[{i}]"
        match block.get("type"):
            case "text":
                phase = {"phase": "commentary" if has_calls else "final_answer"} if role == "assistant" else {}
                yield place, {"type": "message", "role": role, "content": block.get("text"), **phase}
            case "thinking":
                text = block.get("thinking")
                parts = [{"type": "reasoning_text", "text": text}] if text else []
                yield place, {"type": "reasoning", "summary": [], "content": parts,
                              "encrypted_content": block.get("signature")}  # fmt: skip
            case "redacted_thinking":
                yield place, {"type": "reasoning", "summary": [], "encrypted_content": block.get("data")}
            case "tool_use":
                arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
                yield place, {"type": "function_call", "call_id": block.get("id"), "name": block.get("name"),
                              "arguments": arguments}  # fmt: skip
            case "tool_result":
                text = _answer(block.get("content"), f"{place}.content")
                output = f"Error: {text}" if block.get("is_error") else text
                yield place, {"type": "function_call_output", "call_id": block.get("tool_use_id"), "output": output}
            case other:
                raise InputError(
                    f"{place} is a block of type {other!r}; this model reads text only",
                    param=place,
                )


def _answer(content: object, where: str) -> str:
    """What a tool has said. The model is told of a block that it cannot read: a picture must not end a conversation."""
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list):
        raise InputError(f"{where} is {str(content)[:80]!r}; expected a text or a list of blocks", param=where)
    return "\n".join(part_text(block, f"{where}[{i}]", skips=True) for i, block in enumerate(content))


def _text(content: str | list[Json] | None, where: str) -> str:
    if isinstance(content, str) or content is None:
        return content or ""
    for block in content if isinstance(content, list) else [{}]:
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            raise InputError(f"{where} holds {str(block)[:80]!r}; this model reads text only", param=where)
    return "\n".join(block["text"] for block in content)


def _format(output_config: object) -> Json | None:
    shape = output_config.get("format") if isinstance(output_config, dict) else None
    if not isinstance(shape, dict) or shape.get("type") != "json_schema":
        return None
    return {"format": {"type": "json_schema", "name": "answer", "schema": shape.get("schema"), "strict": True}}


def _tool(tool: Json) -> Json:
    if tool.get("type") not in (None, "custom"):
        return {"type": str(tool["type"])}  # A tool of Anthropic's own: passed by, and said so.
    described = {key: tool.get(key) for key in ("name", "description")}
    return {"type": "function", **described, "parameters": tool.get("input_schema"), "strict": bool(tool.get("strict"))}


def _choice(choice: Json | None) -> str | Json | None:
    kind = (choice or {}).get("type")
    if kind == "tool":
        return {"type": "function", "name": (choice or {}).get("name")}
    return {"any": "required", "none": "none"}.get(str(kind), "auto")


# From events -----------------------------------------------------------------------------------------------------


def _whole(run: Run, response: Json, model: str) -> Json:
    blocks = [block for item in response["output"] if (block := _block(item)) is not None]
    return {**_frame(model), "content": blocks, **_ending(run, response), "usage": _usage(response["usage"])}


def _block(item: Json) -> Json | None:
    match item["type"]:
        case "reasoning":
            return {
                "type": "thinking",
                "thinking": "".join(part["text"] for part in item["content"]),
                "signature": item.get("encrypted_content") or "",
            }
        case "message":
            return {"type": "text", "text": "".join(part["text"] for part in item["content"])}
        case "function_call":
            return {"type": "tool_use", "id": item["call_id"], "name": item["name"], "input": _json(item["arguments"])}
    return None


def _json(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return {}


def _frame(model: str | None) -> Json:
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "model": model}


def _ending(run: Run, response: Json) -> Json:
    stopped = run.stopped
    reason = "stop_sequence" if stopped is not None else "end_turn"
    if run.is_pending:
        reason = "tool_use"
    if response["status"] == "incomplete":
        reason = "max_tokens"
    return {"stop_reason": reason, "stop_sequence": stopped}


def _usage(usage: Json | None) -> Json:
    cached = usage["input_tokens_details"]["cached_tokens"] if usage else 0
    return {
        "input_tokens": usage["input_tokens"] - cached if usage else 0,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage["output_tokens"] if usage else 0,
    }


def _sse(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), dumps({"type": kind, **fields}))


_STARTS: dict[str, Json] = {
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
    "message": {"type": "text", "text": ""},
}
_DELTAS = {
    "response.reasoning_text.delta": ("thinking_delta", "thinking"),
    "response.output_text.delta": ("text_delta", "text"),
    "response.function_call_arguments.delta": ("input_json_delta", "partial_json"),
}


async def _stream(service: Service, run: Run, model: str | None) -> AsyncGenerator[bytes, None]:
    index = -1
    async with aclosing(service.choices([run])) as events:
        async for _, event in events:
            if event.type == "response.created":
                usage = {"input_tokens": run.num_prompt_tokens, "output_tokens": 0}
                begun: Json = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                yield _sse("message_start", message={**_frame(model or service.model.name), **begun})
                yield _sse("ping")
            elif event.type == "response.output_item.added" and (start := _start(event)) is not None:
                index += 1
                yield _sse("content_block_start", index=index, content_block=start)
            elif event.type in _DELTAS:
                kind, name = _DELTAS[event.type]
                yield _sse("content_block_delta", index=index, delta={"type": kind, name: event.fields["delta"]})
            elif event.type == "response.output_item.done" and _start(event) is not None:
                if signature := event.fields["item"].get("encrypted_content"):
                    signed = {"type": "signature_delta", "signature": signature}
                    yield _sse("content_block_delta", index=index, delta=signed)
                yield _sse("content_block_stop", index=index)
            elif event.is_terminal:
                if run.error is not None:
                    yield _sse("error", error=error_body(run.error.status, run.error.message)["error"])
                    return
                response = event.fields["response"]
                yield _sse("message_delta", delta=_ending(run, response), usage=_usage(response["usage"]))
                yield _sse("message_stop")


def _start(event: Event) -> Json | None:
    item = event.fields["item"]
    if item["type"] == "function_call":
        return {"type": "tool_use", "id": item["call_id"], "name": item["name"], "input": {}}
    return _STARTS.get(item["type"])
