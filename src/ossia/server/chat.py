"""Chat Completions and Models over HTTP: the first a mapping of messages to items and of events to chunks.

The chain of thought goes out as `reasoning` and as `reasoning_content`, equal texts, and is taken back under either
name, or `thinking`. A client that drops it loses nothing while a turn waits for a tool: it is known by call id.

`{"type": "code_interpreter"}` and `{"type": "web_search"}` among the tools, or web_search_options, are run here as in
the Responses API: the client sees the answer, with its citations as `annotations`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionDeleted
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import InputError, ModelNotFoundError, OssiaError, UnsupportedError
from ossia.responses.client_tools import CLIENT_TOOLS
from ossia.responses.events import DONE, Event, padding
from ossia.responses.loop import Extras, Run
from ossia.responses.schema import Json, Metadata, ResponseRequest, dumps, new_id, quoted
from ossia.responses.tools import without_secrets
from ossia.server.adapters import card
from ossia.server.conversations import NewMetadata
from ossia.server.effort import budget_of, effort_of
from ossia.server.lists import After, Limit, envelope, page
from ossia.server.places import named_as
from ossia.server.sampled import HINTS, Sampled
from ossia.server.service import Service
from ossia.server.stream import EventStream, JSONResponse, caller_of, error_chunk, opened, while_there

_log = logging.getLogger(__name__)


class ChatRequest(Sampled):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Json], Field(min_length=1, max_length=10_000)]
    tools: list[Json] | None = Field(default=None, max_length=1024)
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    response_format: Json | None = None
    reasoning_effort: str | None = None
    reasoning: Json | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: Json | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    store: bool | None = None
    metadata: Metadata | None = None
    modalities: list[str] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    web_search_options: Json | None = None
    # As other servers have them.
    think: bool | str | None = None
    thinking: Json | None = None
    guided_json: str | Json | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: Json | None = None


class ModelList(BaseModel):
    """Every name of the model that is served."""

    object: Literal["list"]
    data: list[Model]


class CompletionList(BaseModel):
    """One page of stored completions."""

    object: Literal["list"]
    data: list[ChatCompletion]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MessageList(BaseModel):
    """One page of the messages of a stored completion."""

    object: Literal["list"]
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


_EFFORT_FIELDS = {"reasoning_effort", "chat_template_kwargs", "reasoning", "think", "thinking"}
_COMPLETION: dict[int | str, dict[str, Any]] = {200: {"model": ChatCompletion}}
Ascending = Annotated[Literal["asc", "desc"], Query()]
_METADATA_QUERY = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "Only completions with these metadata: metadata[key]=value.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Chat Completions"], default_response_class=JSONResponse)
    store = service.store

    @routes.post("/chat/completions", responses={200: {"model": ChatCompletion}}, summary="Create a chat completion")
    async def chat(body: ChatRequest, request: Request) -> HttpResponse:
        owner = caller_of(request)
        extras = [Extras(body.sampling(i), body.stops) for i in range(body.n or 1)]
        with named_as(_fields(body), lambda: [place for place, _ in _read(body)]):
            asked = to_response_request(body)
            runs = [await service.begin(asked, one, owner=owner, can_ask=False) for one in extras]
        frame = _Frame(runs[0].response["model"], body)
        headers = service.ignored(body, runs[0].tools.ignored, HINTS)

        async def keep() -> OssiaError | None:
            """Store the completion if it is to be; why that could not be done."""
            if not body.store:
                return None
            kept = stored_completion(frame.whole([run.response for run in runs]), body)
            try:
                await service.store.run(service.store.save_chat, kept, body.messages, owner)
            except Exception:
                _log.exception("completion=%s could not be kept", kept["id"])
                return OssiaError("the completion could not be stored; the server's log tells more")
            return None

        async def whole() -> Json:
            await service.finish(runs)
            if (error := await keep()) is not None:
                raise error
            return frame.whole([run.response for run in runs])

        if body.stream:
            return EventStream(await opened(request, _chunks(service, runs, frame, keep)), headers)
        return JSONResponse(await while_there(request, whole()), headers=headers)

    @routes.get("/chat/completions", responses={200: {"model": CompletionList}}, summary="List stored completions",
                openapi_extra=_METADATA_QUERY)  # fmt: skip
    async def list_stored(
        request: Request, limit: Limit = 20, after: After = None, order: Ascending = "asc", model: str | None = None
    ) -> HttpResponse:
        wanted = {name[9:-1]: value for name, value in request.query_params.items() if _METADATA.fullmatch(name)}
        found = await store.run(store.chats, limit + 1, after, order, model, wanted, caller_of(request))
        return JSONResponse(envelope(found[:limit], has_more=len(found) > limit))

    @routes.get("/chat/completions/{completion_id}", responses=_COMPLETION, summary="Retrieve a stored completion")
    async def retrieve(request: Request, completion_id: str) -> HttpResponse:
        return JSONResponse(await store.run(store.chat, completion_id, caller_of(request)))

    @routes.post("/chat/completions/{completion_id}", responses=_COMPLETION, summary="Update its metadata")
    async def update(request: Request, completion_id: str, body: NewMetadata) -> HttpResponse:
        metadata = body.metadata or {}
        return JSONResponse(await store.run(store.update_chat, completion_id, metadata, caller_of(request)))

    @routes.delete(
        "/chat/completions/{completion_id}",
        responses={200: {"model": ChatCompletionDeleted}},
        summary="Delete a stored completion",
    )
    async def delete(request: Request, completion_id: str) -> HttpResponse:
        await store.run(store.delete_chat, completion_id, caller_of(request))
        return JSONResponse({"id": completion_id, "object": "chat.completion.deleted", "deleted": True})

    @routes.get(
        "/chat/completions/{completion_id}/messages",
        responses={200: {"model": MessageList}},
        summary="List the messages that a stored completion answered",
    )
    async def messages(
        request: Request, completion_id: str, limit: Limit = 20, after: After = None, order: Ascending = "asc"
    ) -> HttpResponse:
        given = await store.run(store.chat_messages, completion_id, caller_of(request))
        shown = [_stored_message(f"{completion_id}-{i}", message) for i, message in enumerate(given)]
        return JSONResponse(page(shown, limit, after, order))

    @routes.get("/models", tags=["Models"], responses={200: {"model": ModelList}}, summary="List the models")
    async def models() -> HttpResponse:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in sorted(service.names)]})

    @routes.get("/models/{name:path}", tags=["Models"], responses={200: {"model": Model}}, summary="Retrieve a model")
    async def model(name: str) -> HttpResponse:
        if name not in service.names:
            raise ModelNotFoundError(f"model {name[:80]!r} is not served here", param="model")
        return JSONResponse(_model(service, name))

    return routes


def _model(service: Service, name: str) -> Json:
    if service.adapters is not None and (offered := service.adapters.offered.get(name)) is not None:
        return card(offered, service.model.name)
    return {"id": name, "object": "model", "created": service.created_at, "owned_by": "openai"}


# Messages to items -----------------------------------------------------------------------------------------------


def to_response_request(body: ChatRequest) -> ResponseRequest:
    """The same request in the Responses API's words. Raises InputError."""
    if "audio" in (body.modalities or ()):
        raise UnsupportedError("gpt-oss speaks no audio; leave modalities out", param="modalities")
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if (body.model_extra or {}).get(name) is not None:
            raise UnsupportedError(f"{name} is of an older API and not offered; send {instead}", param=name)
    asked = body.model_dump(include=_EFFORT_FIELDS) | (body.model_extra or {})
    tools = [_flat(tool) for tool in body.tools or ()]
    for i, tool in enumerate(tools):
        if tool.get("type") == "function":
            # Here a function that does not say is not strict; in the Responses API it is, if it can be.
            tools[i] = {**tool, "strict": bool(tool.get("strict"))}
        if isinstance(tool.get("type"), str) and tool["type"] in CLIENT_TOOLS:
            raise InputError(
                f"tools[{i}] is of type {tool['type']!r}, which only the Responses API can call; declare a function",
                param=f"tools[{i}].type",
            )
    if body.web_search_options is not None:
        tools.append({**body.web_search_options, "type": "web_search"})
    form = _format(body)
    text = {"format": form, "verbosity": body.verbosity} if form or body.verbosity else None
    given = {
        "model": body.model,
        "input": [item for _, item in _read(body)],
        "tools": tools or None,
        "tool_choice": _flat_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "text": text,
        "reasoning": {"effort": effort_of(asked), "max_tokens": budget_of(asked)},
        "max_output_tokens": body.max_completion_tokens or body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs if body.logprobs else None,
        "include": ["message.output_text.logprobs"] if body.logprobs else None,
        "metadata": body.metadata,
        "store": False,
    }
    return valid(given)


def valid(given: Json) -> ResponseRequest:
    """A request of the Responses API. Raises InputError."""
    try:
        return ResponseRequest(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {first['msg']}", param=where) from None


def _fields(body: ChatRequest) -> list[tuple[str, str]]:
    """What the Responses API's places are called here."""
    fields = [
        (r"(messages\[\d+\])\.output", r"\1.content"),
        (r"(messages\[\d+\])\.call_id", r"\1.tool_call_id"),
        (r"(messages\[\d+\]\.tool_calls\[\d+\])\.call_id", r"\1.id"),
        (r"(messages\[\d+\]\.tool_calls\[\d+\])\.(name|arguments)", r"\1.function.\2"),
        (r"(messages\[\d+\]\.tool_calls\[\d+\])\.input", r"\1.custom.input"),
        (r"tools\[(\d+)\]\.(name|description|parameters)", r"tools[\1].function.\2"),
        (r"tools\[(\d+)\]\.format", r"tools[\1].custom.format"),
        (r"reasoning\.effort", "reasoning_effort"),
        ("max_output_tokens", "max_completion_tokens" if body.max_completion_tokens else "max_tokens"),
        ("input", "messages"),
    ]
    shape = body.response_format
    if shape is None:
        given = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
        named = next((name for name in given if getattr(body, name)), "response_format")
        return [*fields, (r"text\.format(\.\w+)?", named)]
    inner = "json_schema." if shape.get("type") == "json_schema" else ""
    schema = r"text\.format\.(name|description|schema|strict)"
    return [*fields, (schema, rf"response_format.{inner}\1"), (r"text\.format", "response_format")]


def _read(body: ChatRequest) -> Iterator[tuple[str, Json]]:
    """The items of all messages, each with its place."""
    for i, message in enumerate(body.messages):
        yield from _items(message, f"messages[{i}]")


def _items(message: Json, where: str) -> Iterator[tuple[str, Json]]:
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        yield where, {"type": "function_call_output", "call_id": message.get("tool_call_id"), "output": content}
        return
    if role != "assistant":
        yield where, {"type": "message", "role": role, "content": content}
        return
    thoughts = message.get("reasoning") or message.get("reasoning_content") or message.get("thinking")
    if isinstance(thoughts, str):
        yield where, {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thoughts}]}
    calls = message.get("tool_calls") or []
    if content or not calls:
        # Without calls, the message behind it tells: another of the assistant's may have them.
        phase = {"phase": "commentary"} if calls else {}
        yield where, {"type": "message", "role": "assistant", "content": content or "", **phase}
    for i, call in enumerate(calls if isinstance(calls, list) else ()):
        kind = (call.get("type") or "function") if isinstance(call, dict) else None
        called = call.get(kind) if isinstance(call, dict) and kind in ("function", "custom") else None
        if not isinstance(called, dict):
            raise InputError(
                f"{where}.tool_calls holds {str(call)[:80]!r}; expected a call", param=f"{where}.tool_calls"
            )
        identity = {"call_id": call.get("id"), "name": called.get("name")}
        if kind == "function":
            item = {"type": "function_call", **identity, "arguments": called.get("arguments") or "{}"}
        else:
            item = {"type": "custom_tool_call", **identity, "input": called.get("input") or ""}
        yield f"{where}.tool_calls[{i}]", item


def _flat(tool: Json) -> Json:
    kind = tool.get("type")
    inner = tool.get(kind) if isinstance(kind, str) else None
    if kind not in ("function", "custom") or not isinstance(inner, dict):
        return tool
    shape = inner.get("format")
    if isinstance(shape, dict) and isinstance(shape.get("grammar"), dict):
        inner = {**inner, "format": {"type": "grammar", **shape["grammar"]}}
    return {**inner, "type": kind}


def _flat_choice(choice: str | Json | None) -> str | Json | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("allowed_tools"), dict):
        allowed = choice["allowed_tools"]
        tools = allowed.get("tools")
        flat = [_flat(tool) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "mode": allowed.get("mode"), "tools": flat}
    return _flat(choice)


# Fields of vLLM's `structured_outputs` that say nothing of what the answer must be.
_STYLE = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback", "whitespace_pattern")


def _format(body: ChatRequest) -> Json | None:
    """What the answer must be, in the Responses API's words and those of other servers. Raises InputError."""
    shape = body.response_format
    if shape is not None:
        kind, inner = shape.get("type"), shape.get("json_schema")
        if kind == "json_schema" and isinstance(inner, dict):
            shape = {**inner, "type": "json_schema"}
        elif kind == "json_object" and isinstance(shape.get("schema"), dict):
            shape = {"type": "json_schema", "name": "answer", "schema": shape["schema"], "strict": True}
    guided = {
        "guided_json": body.guided_json,
        "guided_regex": body.guided_regex,
        "guided_choice": body.guided_choice,
        "guided_grammar": body.guided_grammar,
        **{f"structured_outputs.{name}": value for name, value in (body.structured_outputs or {}).items()},
    }
    for name in _STYLE:
        guided.pop(f"structured_outputs.{name}", None)
    asked = {name: value for name, value in guided.items() if value is not None and value is not False}
    if len(asked) + (shape is not None) > 1:
        names = ["response_format"] * (shape is not None) + list(asked)
        raise InputError(f"{' and '.join(names)} each say what the answer must be; give one", param=names[-1])
    return next((_guided(name, value) for name, value in asked.items()), shape)


def _guided(param: str, value: object) -> Json:
    name = re.sub(r"guided_|structured_outputs\.", "", param)
    match name, value:
        case "json", str():
            try:
                return _guided(param, json.loads(value))
            except (ValueError, RecursionError):
                raise InputError(f"the schema of {param} is no JSON", param=param) from None
        case "json", dict():
            return {"type": "json_schema", "name": "answer", "schema": value, "strict": True}
        case "json_object", True:
            return {"type": "json_object"}
        case "regex", str():
            return {"type": "grammar", "syntax": "regex", "definition": value}
        case "grammar", str():
            return {"type": "grammar", "syntax": "lark", "definition": value}
        case "choice", [_, *_] if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return {"type": "grammar", "syntax": "lark", "definition": "start: " + " | ".join(map(json.dumps, value))}
    raise InputError(f"{param} is {str(value)[:80]!r}, which is not offered", param=param)


# Events to chunks ------------------------------------------------------------------------------------------------


class _Frame:
    """What all chunks of one completion share."""

    def __init__(self, model: str, body: ChatRequest) -> None:
        self.counts = bool(body.stream_options and body.stream_options.include_usage)
        self._pads = bool(body.stream_options and body.stream_options.include_obfuscation)
        self._wants_logprobs = body.logprobs
        self._shows_reasoning = body.include_reasoning is not False and not (body.reasoning or {}).get("exclude")
        # What is to be parsed must stand alone: what the model says on the way is then told with its thoughts.
        self._is_parsed = _format(body) is not None
        self._common = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model,
                        "system_fingerprint": None, "service_tier": "default"}  # fmt: skip
        begin = dumps({**self._common, "object": "chat.completion.chunk", "choices": []}).removesuffix(b"]}")
        self._head = b'data: %b{"index":' % begin

    def delta(self, choice: Json) -> bytes:
        """The chunk of one choice. Those of plain text, nine of ten, are written without the whole JSON."""
        delta = choice["delta"]
        name = "content" if "content" in delta else "reasoning" if "reasoning" in delta else ""
        if not name or "role" in delta or choice["logprobs"] is not None or self._pads:
            return self.chunk([choice])
        text = quoted(delta[name])
        said = b'"content":%b' % text if name == "content" else b'"reasoning":%b,"reasoning_content":%b' % (text, text)
        return b'%b%d,"delta":{%b},"logprobs":null,"finish_reason":null}]%b' % (
            self._head, choice["index"], said, b',"usage":null}\n\n' if self.counts else b"}\n\n",
        )  # fmt: skip

    def chunk(self, choices: list[Json], usage: Json | None = None) -> bytes:
        fields: Json = {"usage": usage} if self.counts else {}
        if self._pads:
            fields["obfuscation"] = padding(len(dumps(choices)))
        return b"data: %b\n\n" % dumps(
            {**self._common, "object": "chat.completion.chunk", "choices": choices, **fields}
        )

    def whole(self, responses: list[Json]) -> Json:
        choices = [self._choice(index, response) for index, response in enumerate(responses)]
        usage = _usage([response["usage"] for response in responses])
        return {**self._common, "object": "chat.completion", "choices": choices, "usage": usage}

    def deltas(self, index: int) -> _Deltas:
        return _Deltas(index, self._shows_reasoning, self._is_parsed)

    def _choice(self, index: int, response: Json) -> Json:
        """The whole choice of a response that has ended."""
        thoughts, parts = [], []
        for item in response["output"]:
            if _is_thought(item, self._is_parsed):
                thoughts.append("".join(part["text"] for part in item["content"]))
            elif item["type"] == "message":
                # One that was cut before it said anything leaves no gap.
                parts += [part for part in item["content"] if part["text"]]
        calls = [_call(item) for item in response["output"] if item["type"] in _CALLS]
        text, thought = _GAP.join(part["text"] for part in parts), _GAP.join(filter(None, thoughts))
        # Only a call may stand without a text: clients fail on null otherwise.
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        begin = 0
        annotations = []
        for part in parts:
            annotations += [_annotation(one, begin) for one in part["annotations"]]
            begin += len(part["text"]) + len(_GAP)
        if annotations:
            message["annotations"] = annotations
        if thought and self._shows_reasoning:
            message |= {"reasoning": thought, "reasoning_content": thought}
        if calls:
            message["tool_calls"] = calls
        logprobs = {"content": [one for part in parts for one in part["logprobs"]], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs if self._wants_logprobs else None,
            "finish_reason": _finish_reason(response),
        }


# Between two thoughts, and between two messages, of one turn.
_GAP = "\n\n"
_CALLS = ("function_call", "custom_tool_call")


class _Deltas:
    """The choices of chunks for the events of one response."""

    def __init__(self, index: int, shows_reasoning: bool, is_parsed: bool) -> None:
        self._index, self._shows_reasoning, self._is_parsed = index, shows_reasoning, is_parsed
        # Places of the calls by output index.
        self._calls: dict[int, int] = {}
        self._is_thought = False
        # What has been said so far, by kind, and whether the open item has said something.
        self._has_said = {True: False, False: False}
        self._has_begun = False
        # Characters of the content, and where the open message begins in it.
        self._num_chars = self._begin = 0
        self._annotations: list[Json] = []

    def of(self, event: Event) -> Json | None:
        """The choice for one event; None if it says nothing."""
        fields = event.fields
        logprobs = None
        match event.type:
            case "response.reasoning_text.delta" | "response.output_text.delta":
                text = self._spaced(fields["delta"])
                if not self._is_thought:
                    delta: Json = {"content": text}
                    self._num_chars += len(text)
                    if fields["logprobs"]:
                        logprobs = {"content": fields["logprobs"], "refusal": None}
                elif self._shows_reasoning:
                    delta = {"reasoning": text, "reasoning_content": text}
                else:
                    return None
            case "response.output_item.added":
                item = fields["item"]
                self._is_thought, self._has_begun = _is_thought(item, self._is_parsed), False
                if item["type"] not in _CALLS:
                    return None
                place = self._calls[fields["output_index"]] = len(self._calls)
                delta = {"tool_calls": [{"index": place, **_call(item)}]}
            case "response.output_text.annotation.added" if not self._is_thought:
                self._annotations.append(_annotation(fields["annotation"], self._begin))
                return None
            case "response.function_call_arguments.delta":
                delta = self._more(fields, "function", "arguments")
            case "response.custom_tool_call_input.delta":
                delta = self._more(fields, "custom", "input")
            case _:
                return None
        return self._choice(delta, logprobs)

    def cited(self) -> Json | None:
        """The choice for all citations of the answer: clients add up what a list has in one chunk alone."""
        return self._choice({"annotations": self._annotations}) if self._annotations else None

    def _choice(self, delta: Json, logprobs: Json | None = None) -> Json:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _spaced(self, text: str) -> str:
        if not self._has_begun:
            self._has_begun = True
            num_chars = len(text)
            if self._has_said[self._is_thought]:
                text = _GAP + text
            self._has_said[self._is_thought] = True
            self._begin = self._num_chars + len(text) - num_chars
        return text

    def _more(self, fields: Json, kind: str, name: str) -> Json:
        return {"tool_calls": [{"index": self._calls[fields["output_index"]], kind: {name: fields["delta"]}}]}


def _is_thought(item: Json, is_parsed: bool) -> bool:
    return item["type"] == "reasoning" or (is_parsed and item.get("phase") == "commentary")


def _annotation(annotation: Json, begin: int) -> Json:
    """A citation in the words of Chat Completions; its message begins at a place of the content."""
    cited = {key: value for key, value in annotation.items() if key != "type"}
    cited |= {key: annotation[key] + begin for key in ("start_index", "end_index")}
    return {"type": annotation["type"], "url_citation": cited}


def _call(item: Json) -> Json:
    if item["type"] == "function_call":
        called = {"type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
    else:
        called = {"type": "custom", "custom": {"name": item["name"], "input": item["input"]}}
    return {"id": item["call_id"], **called}


def _finish_reason(response: Json) -> str:
    if response["status"] == "incomplete":
        return "length"
    return "tool_calls" if any(item["type"] in _CALLS for item in response["output"]) else "stop"


def _usage(usages: list[Json | None]) -> Json:
    """Of several choices, the sum; they share a prompt, which counts once."""
    given = [usage for usage in usages if usage]
    num_prompt = given[0]["input_tokens"] if given else 0
    num_output = sum(usage["output_tokens"] for usage in given)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {
            "cached_tokens": given[0]["input_tokens_details"]["cached_tokens"] if given else 0,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(usage["output_tokens_details"]["reasoning_tokens"] for usage in given),
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def _chunks(
    service: Service, runs: list[Run], frame: _Frame, keep: Callable[[], Awaitable[OssiaError | None]]
) -> AsyncGenerator[bytes, None]:
    deltas = [frame.deltas(index) for index in range(len(runs))]
    num_open = len(runs)
    async with aclosing(service.choices(runs)) as events:
        async for index, event in events:
            if event.type == "response.created":
                begin = {"role": "assistant", "content": "", "refusal": None}
                choice: Json | None = {"index": index, "delta": begin, "logprobs": None, "finish_reason": None}
            elif event.is_terminal:
                error = runs[index].error
                num_open -= 1
                if error is None and not num_open:
                    # Before the last word: what a client has seen the end of is stored.
                    error = await keep()
                if error is not None:
                    yield error_chunk(error)
                    yield DONE
                    return
                if (cited := deltas[index].cited()) is not None:
                    yield frame.delta(cited)
                ended = _finish_reason(event.fields["response"])
                choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": ended}
            else:
                choice = deltas[index].of(event)
            if choice is not None:
                yield frame.delta(choice)
    if frame.counts:
        yield frame.chunk([], _usage([run.response["usage"] for run in runs]))
    yield DONE


# Stored completions ----------------------------------------------------------------------------------------------

# Query parameters such as metadata[topic]=sums.
_METADATA = re.compile(r"metadata\[.{1,64}\]", re.DOTALL)
_ECHOED = (
    "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "tools", "tool_choice", "response_format",
)  # fmt: skip


def stored_completion(made: Json, body: ChatRequest) -> Json:
    """A completion as it is kept: with its metadata and what it was asked with."""
    echoed = body.model_dump(include=set(_ECHOED))
    if body.tools is not None:
        echoed["tools"] = [without_secrets(tool) for tool in body.tools]
    return {**made, **{name: echoed[name] for name in _ECHOED}, "metadata": body.metadata or {}}


def _stored_message(message_id: str, message: Json) -> Json:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    if parts is not None:
        content = "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    return {**message, "id": message_id, "content": content, "content_parts": parts}
