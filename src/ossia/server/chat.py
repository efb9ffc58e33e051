"""Chat Completions, Completions and Models over HTTP: the first a mapping of messages to items and of events to chunks.

The chain of thought goes out as `reasoning` and as `reasoning_content`, equal texts, and is taken back under either
name, or `thinking`. A client that drops it loses nothing while a turn waits for a tool: it is known by call id.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.engine.request import NO_TOKEN, SamplingParams
from ossia.errors import InputError, NotFoundError, UnsupportedError
from ossia.responses.events import DONE, Event
from ossia.responses.loop import Extras, Run
from ossia.responses.schema import Json, Metadata, Number, ResponseRequest, dumps, error_object, new_id
from ossia.server.responses import ignored_header
from ossia.server.service import Service
from ossia.server.stream import EventStream, JSONResponse, opened, while_there

_MAX_CHOICES = 16

Stops = str | Annotated[list[str], Field(max_length=16)] | None


class StreamOptions(BaseModel):
    """How chunks are sent."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = None


class _Sampled(BaseModel):
    """What Chat Completions and Completions share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    stop: Stops = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Number] | None = None
    # As other servers have them.
    top_k: int | None = Field(default=None, ge=-1)
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    def sampling(self, choice: int) -> Json:
        """Fields of SamplingParams that were given; every choice draws its own."""
        bias = {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isdecimal():
                raise InputError(f"logit_bias names token {token[:40]!r}; expected a token id", param="logit_bias")
            bias[int(token)] = value
        fields = {
            "seed": None if self.seed is None else (self.seed + choice) % 2**63,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": bias or None,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
        }
        return {name: value for name, value in fields.items() if value is not None}


class ChatRequest(_Sampled):
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
    metadata: Metadata | None = None
    modalities: list[str] | None = None


class CompletionRequest(_Sampled):
    """The body of POST /v1/completions: a raw prompt, as text or as token ids."""

    prompt: str | list[int] | list[str] | list[list[int]] = ""
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Chat Completions"], default_response_class=JSONResponse)

    @routes.post("/chat/completions", responses={200: {"model": ChatCompletion}}, summary="Create a chat completion")
    async def chat(body: ChatRequest, request: Request) -> HttpResponse:
        asked = to_response_request(body)
        num = body.n or 1
        runs = [await service.begin(asked, Extras(body.sampling(i), body.stops)) for i in range(num)]
        frame = _Frame(new_id("chatcmpl"), service.model.name, _shows_reasoning(body))
        headers = ignored_header(runs[0])
        if body.stream:
            counts = bool(body.stream_options and body.stream_options.include_usage)
            chunks = _chunks(service, runs, frame, counts)
            return EventStream(await opened(request, chunks), headers)
        made = await while_there(request, _all(service, runs))
        choices = [frame.choice(i, response, body.logprobs) for i, response in enumerate(made)]
        return JSONResponse(frame.whole(choices, _usage([run.response["usage"] for run in runs])), headers=headers)

    @routes.post("/completions", responses={200: {"model": Completion}}, summary="Complete a raw prompt")
    async def complete(body: CompletionRequest, request: Request) -> HttpResponse:
        service.check_model(body.model)
        made = [_Raw(service, body, prompt, i) for prompt in _prompts(service, body) for i in range(body.n or 1)]
        frame: Json = {"id": new_id("cmpl"), "created": int(time.time()), "model": service.model.name}
        frame["object"] = "text_completion"
        if body.stream:
            return EventStream(await opened(request, _raw_chunks(made, frame, body)))

        async def whole() -> None:
            await _together([one.finish() for one in made])

        await while_there(request, whole())
        choices = [one.choice(i) for i, one in enumerate(made)]
        return JSONResponse({**frame, "choices": choices, "usage": _raw_usage(made)})

    @routes.get("/models", tags=["Models"], summary="List the models")
    async def models() -> HttpResponse:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in sorted(service.names)]})

    @routes.get("/models/{name:path}", tags=["Models"], responses={200: {"model": Model}}, summary="Retrieve a model")
    async def model(name: str) -> HttpResponse:
        if name not in service.names:
            raise NotFoundError(f"model {name[:80]!r} is not served here", param="model")
        return JSONResponse(_model(service, name))

    return routes


def _model(service: Service, name: str) -> Json:
    return {"id": name, "object": "model", "created": service.created_at, "owned_by": "openai"}


# Messages to items -----------------------------------------------------------------------------------------------


def to_response_request(body: ChatRequest) -> ResponseRequest:
    """The same request in the Responses API's words. Raises InputError."""
    if "audio" in (body.modalities or ()):
        raise UnsupportedError("gpt-oss speaks no audio; leave modalities out", param="modalities")
    given = {
        "model": body.model,
        "input": [item for i, message in enumerate(body.messages) for item in _items(message, f"messages[{i}]")],
        "tools": [_flat(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _flat_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "text": {"format": _format(body.response_format)} if body.response_format else None,
        "reasoning": {"effort": _effort(body), "max_tokens": (body.reasoning or {}).get("max_tokens")},
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


def _items(message: Json, where: str) -> Iterator[Json]:
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        yield {"type": "function_call_output", "call_id": message.get("tool_call_id"), "output": content}
        return
    if role != "assistant":
        yield {"type": "message", "role": role, "content": content}
        return
    thoughts = message.get("reasoning") or message.get("reasoning_content") or message.get("thinking")
    if isinstance(thoughts, str):
        yield {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thoughts}]}
    calls = message.get("tool_calls") or []
    if content or not calls:
        phase = "commentary" if calls else "final_answer"
        yield {"type": "message", "role": "assistant", "content": content or "", "phase": phase}
    for call in calls if isinstance(calls, list) else ():
        kind = (call.get("type") or "function") if isinstance(call, dict) else None
        called = call.get(kind) if isinstance(call, dict) and kind in ("function", "custom") else None
        if not isinstance(called, dict):
            raise InputError(
                f"{where}.tool_calls holds {str(call)[:80]!r}; expected a call", param=f"{where}.tool_calls"
            )
        identity = {"call_id": call.get("id"), "name": called.get("name")}
        if kind == "function":
            yield {"type": "function_call", **identity, "arguments": called.get("arguments") or "{}"}
        else:
            yield {"type": "custom_tool_call", **identity, "input": called.get("input") or ""}


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


def _format(shape: Json) -> Json:
    inner = shape.get("json_schema")
    return {**inner, "type": "json_schema"} if shape.get("type") == "json_schema" and isinstance(inner, dict) else shape


def _effort(body: ChatRequest) -> Any:
    """The effort, from wherever clients of other servers put it."""
    for place in (body.chat_template_kwargs or {}, body.reasoning or {}):
        found = place.get("reasoning_effort") or place.get("effort")
        if found and not body.reasoning_effort:
            return found
    return body.reasoning_effort


def _shows_reasoning(body: ChatRequest) -> bool:
    return body.include_reasoning is not False and not (body.reasoning or {}).get("exclude")


# Events to chunks ------------------------------------------------------------------------------------------------


class _Frame:
    """What all chunks of one completion share."""

    def __init__(self, completion_id: str, model: str, shows_reasoning: bool) -> None:
        self._shows_reasoning = shows_reasoning
        self._common = {"id": completion_id, "created": int(time.time()), "model": model, "system_fingerprint": None,
                        "service_tier": "default"}  # fmt: skip

    def chunk(self, choices: list[Json], usage: Json | None = None, *, counts: bool = False) -> bytes:
        fields = {"usage": usage} if counts else {}
        return b"data: %b\n\n" % dumps(
            {**self._common, "object": "chat.completion.chunk", "choices": choices, **fields}
        )

    def whole(self, choices: list[Json], usage: Json) -> Json:
        return {**self._common, "object": "chat.completion", "choices": choices, "usage": usage}

    def delta(self, index: int, event: Event, calls: dict[int, int]) -> Json | None:
        """The choice of a chunk for one event; ``calls`` numbers the calls by output index."""
        fields = event.fields
        logprobs = None
        match event.type:
            case "response.reasoning_text.delta" if self._shows_reasoning:
                delta: Json = {"reasoning": fields["delta"], "reasoning_content": fields["delta"]}
            case "response.output_text.delta":
                delta = {"content": fields["delta"]}
                if fields["logprobs"]:
                    logprobs = {"content": fields["logprobs"], "refusal": None}
            case "response.output_item.added" if fields["item"]["type"] in _CALLS:
                place = calls[fields["output_index"]] = len(calls)
                delta = {"tool_calls": [{"index": place, **_call(fields["item"])}]}
            case "response.function_call_arguments.delta":
                delta = _more(calls, fields, "function", "arguments")
            case "response.custom_tool_call_input.delta":
                delta = _more(calls, fields, "custom", "input")
            case _:
                return None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def choice(self, index: int, response: Json, wants_logprobs: bool | None) -> Json:
        """The whole choice of a response that has ended."""
        parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
        thoughts = "\n".join(
            part["text"] for item in response["output"] if item["type"] == "reasoning" for part in item["content"]
        )
        calls = [_call(item) for item in response["output"] if item["type"] in _CALLS]
        text = "".join(part["text"] for part in parts)
        # Only a call may stand without a text: clients fail on null otherwise.
        message: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if thoughts and self._shows_reasoning:
            message |= {"reasoning": thoughts, "reasoning_content": thoughts}
        if calls:
            message["tool_calls"] = calls
        logprobs = {"content": [one for part in parts for one in part["logprobs"]], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs if wants_logprobs else None,
            "finish_reason": _finish_reason(response),
        }


_CALLS = ("function_call", "custom_tool_call")


def _call(item: Json) -> Json:
    if item["type"] == "function_call":
        called = {"type": "function", "function": {"name": item["name"], "arguments": item["arguments"]}}
    else:
        called = {"type": "custom", "custom": {"name": item["name"], "input": item["input"]}}
    return {"id": item["call_id"], **called}


def _more(calls: dict[int, int], fields: Json, kind: str, name: str) -> Json:
    return {"tool_calls": [{"index": calls[fields["output_index"]], kind: {name: fields["delta"]}}]}


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


async def _all(service: Service, runs: list[Run]) -> list[Json]:
    made: list[Json] = await _together([service.finish(run) for run in runs])
    return made


async def _together(work: list[Any]) -> list[Any]:
    """All at once; when one fails, or nobody waits any more, all end."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _chunks(service: Service, runs: list[Run], frame: _Frame, counts: bool) -> AsyncGenerator[bytes, None]:
    merged: AsyncGenerator[tuple[int, Event], None] = (
        _numbered(service.events(runs[0])) if len(runs) == 1 else _merged([service.events(run) for run in runs])
    )
    calls: list[dict[int, int]] = [{} for _ in runs]
    async with aclosing(merged):
        async for index, event in merged:
            if event.type == "response.created":
                begin = {"role": "assistant", "content": "", "refusal": None}
                choice: Json | None = {"index": index, "delta": begin, "logprobs": None, "finish_reason": None}
            elif event.is_terminal:
                response = event.fields["response"]
                error = runs[index].error
                if error is not None:
                    yield b"data: %b\n\n" % dumps({"error": {**error_object(error), "type": error.type, "param": None}})
                    yield DONE
                    return
                choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": _finish_reason(response)}
            else:
                choice = frame.delta(index, event, calls[index])
            if choice is not None:
                yield frame.chunk([choice], counts=counts)
    if counts:
        yield frame.chunk([], _usage([run.response["usage"] for run in runs]), counts=True)
    yield DONE


async def _numbered(events: AsyncGenerator[Event, None]) -> AsyncGenerator[tuple[int, Event], None]:
    async with aclosing(events):
        async for event in events:
            yield 0, event


async def _merged(sources: list[AsyncGenerator[Any, None]]) -> AsyncGenerator[tuple[int, Any], None]:
    """What several generators yield, as it comes. Raises what one of them raises."""
    queue: asyncio.Queue[tuple[int, Any, BaseException | None]] = asyncio.Queue(64)
    over = object()

    async def read(index: int) -> None:
        try:
            async with aclosing(sources[index]) as source:
                async for item in source:
                    await queue.put((index, item, None))
            await queue.put((index, over, None))
        except Exception as error:
            await queue.put((index, over, error))

    tasks = [asyncio.ensure_future(read(index)) for index in range(len(sources))]
    try:
        num_open = len(tasks)
        while num_open:
            index, item, error = await queue.get()
            if error is not None:
                raise error
            if item is over:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Raw prompts -----------------------------------------------------------------------------------------------------


def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    if body.suffix:
        raise UnsupportedError("suffix is not offered: gpt-oss does not fill in the middle", param="suffix")
    given = body.prompt
    encode = service.model.tokenizer.encode
    if isinstance(given, str):
        return [encode(given)]
    if all(isinstance(one, int) for one in given):
        return [[one for one in given if isinstance(one, int)]]
    if len(given) > 64:
        raise InputError(f"{len(given)} prompts in one request; expected at most 64", param="prompt")
    return [encode(one) if isinstance(one, str) else one for one in given if not isinstance(one, int)]


class _Raw:
    """One prompt being completed."""

    def __init__(self, service: Service, body: CompletionRequest, prompt: list[int], choice: int) -> None:
        self._service, self._body, self.prompt = service, body, prompt
        self.num_output, self.num_cached = 0, 0
        self.finish_reason: str | None = None
        self.text = ""
        self.logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        wanted = body.logprobs is not None
        self._params = SamplingParams(
            **{
                "temperature": 1.0 if body.temperature is None else body.temperature,
                "top_p": 1.0 if body.top_p is None else body.top_p,
                "max_tokens": 16 if body.max_tokens is None else max(body.max_tokens, 1),
                "stop_strings": body.stops,
                "logprobs": wanted,
                "top_logprobs": body.logprobs or 0,
                **body.sampling(choice),
            }
        )
        if body.max_tokens != 0:
            # Fails before anything is sent.
            service.model.engine.check(prompt, self._params)

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The text as it comes; the text of a stop is not part of it."""
        tokenizer = self._service.model.tokenizer
        if self._body.echo:
            self.text = tokenizer.decode(self.prompt)
            yield self.text
        if self._body.max_tokens == 0:
            self.finish_reason = "length"
            return
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        data, num_told = b"", 0
        source = self._service.model.engine.generate(self.prompt, self._params)
        async with self._service.admission.slot(), aclosing(source) as outputs:
            async for output in outputs:
                if output.token_id == NO_TOKEN:
                    continue
                self.num_output += 1
                self.num_cached = output.num_cached_tokens
                end = None
                if output.stop is not None:
                    end = output.stop.num_bytes if isinstance(output.stop.match, str) else len(data)
                data += tokenizer.token_bytes(output.token_id)
                if output.logprob is not None:
                    self._note(output.token_id, output.logprob, output.top_logprobs)
                if output.finish_reason is not None:
                    self.finish_reason = "length" if output.finish_reason == "length" else "stop"
                known = len(data) - output.held_bytes if end is None else end
                piece = utf8.decode(data[num_told:known], final=output.finish_reason is not None)
                num_told = max(num_told, known)
                self.text += piece
                if piece:
                    yield piece

    async def finish(self) -> None:
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass

    def choice(self, index: int) -> Json:
        logprobs = self.logprobs if self._body.logprobs is not None else None
        return {"index": index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _note(self, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> None:
        decode = self._service.model.tokenizer.decode
        self.logprobs["tokens"].append(decode([token_id]))
        self.logprobs["token_logprobs"].append(logprob)
        self.logprobs["top_logprobs"].append({decode([one]): value for one, value in top})
        self.logprobs["text_offset"].append(len(self.text))


def _raw_usage(made: list[_Raw]) -> Json:
    num_prompt, num_output = sum(len(one.prompt) for one in made), sum(one.num_output for one in made)
    details = {"cached_tokens": sum(one.num_cached for one in made)}
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": details}  # fmt: skip


async def _raw_chunks(made: list[_Raw], frame: Json, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    def chunk(choices: list[Json], **fields: Any) -> bytes:
        return b"data: %b\n\n" % dumps({**frame, "choices": choices, **fields})

    async with aclosing(_merged([one.pieces() for one in made])) as merged:
        async for index, piece in merged:
            yield chunk([{"index": index, "text": piece, "logprobs": None, "finish_reason": None}])
    for index, one in enumerate(made):
        yield chunk([{**one.choice(index), "text": ""}])
    if body.stream_options and body.stream_options.include_usage:
        yield chunk([], usage=_raw_usage(made))
    yield DONE
