"""The wire shapes of the Responses API: what a request may hold, and the response, usage and error that go out.

A request is a pydantic model, tolerant as the API is: unknown fields are kept and echoed, never refused. What goes out
are plain JSON values in the shape of the openai package's own types (`openai.types.responses`), which the tests hold
each of them to; a response has every key of the API, null where there is nothing to say.

Items stay JSON objects: there are more kinds than any server knows. Calls of tools that are not known are passed by.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from json.encoder import encode_basestring
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ossia.errors import InputError, OssiaError, UnsupportedError
from ossia.harmony import Effort
from ossia.harmony.strict_schema import is_enforceable

Json = dict[str, Any]

MAX_ITEMS = 10_000

# gpt-oss knows three efforts. "none" is the least that the model can do: it always thinks a little.
EFFORTS: Mapping[str, Effort] = {
    "none": Effort.LOW,
    "minimal": Effort.LOW,
    "low": Effort.LOW,
    "medium": Effort.MEDIUM,
    "high": Effort.HIGH,
    "xhigh": Effort.HIGH,
    "max": Effort.HIGH,
}

Number = Annotated[float, Field(allow_inf_nan=False)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class _Tolerant(BaseModel):
    model_config = ConfigDict(extra="allow")


class Reasoning(_Tolerant):
    """How long to think, and how much of the thinking later turns see."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    max_tokens: int | None = Field(default=None, ge=0, description="Tokens after which the thinking is ended.")


class TextFormat(_Tolerant):
    """What the final answer must be."""

    type: Literal["text", "json_object", "json_schema", "grammar"] = "text"
    name: str | None = Field(default=None, max_length=64)
    description: str | None = None
    # "schema" is a method of pydantic's models.
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = Field(default=None, description="Left out: yes, if the schema can be enforced.")
    # Of a grammar, which the API has for custom tools alone.
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @cached_property
    def is_strict(self) -> bool:
        """Whether the schema is enforced; of one that does not say, where it can be."""
        return is_enforceable(self.json_schema or {}) if self.strict is None else self.strict

    def loosened(self) -> TextFormat:
        """The same format, its schema not enforced."""
        return TextFormat.model_validate({**self.model_dump(by_alias=True), "strict": False})


class Text(_Tolerant):
    """The form of the answer."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(_Tolerant):
    """How events are sent; padding against traffic analysis is added when it is asked for."""

    include_obfuscation: bool | None = None


class PromptCacheOptions(_Tolerant):
    """How prompts are kept; all that memory holds are, whatever is said here."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None
    prewarm: bool | None = Field(default=None, description="Read and keep the prompt, and generate nothing.")


class ContextManagement(_Tolerant):
    """What is done when a conversation has become long."""

    type: Literal["compaction"]
    compact_threshold: int | None = Field(
        default=None, ge=1, description="Tokens of a prompt beyond which all of it is summed up first."
    )


class PromptRequest(_Tolerant):
    """What decides the prompt: the part of a request that token counting shares with creating."""

    model: str | None = Field(default=None, description="A name of the served model; empty takes it.")
    input: str | Annotated[list[Json], Field(max_length=MAX_ITEMS)] | None = Field(
        default=None, description="A user's text, or items as the Responses API defines them."
    )
    instructions: str | None = Field(default=None, description="Goes first into the developer message; not inherited.")
    previous_response_id: str | None = None
    conversation: str | Json | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    tools: list[Json] | None = Field(default=None, max_length=1024)
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def effort(self) -> Effort:
        return EFFORTS[(self.reasoning and self.reasoning.effort) or "medium"]

    @property
    def max_reasoning_tokens(self) -> int | None:
        return self.reasoning.max_tokens if self.reasoning else None

    @property
    def format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat()

    @property
    def conversation_id(self) -> str | None:
        named = self.conversation
        if isinstance(named, dict):
            named = named.get("id")
            if not isinstance(named, str):
                raise InputError("conversation has no id; expected a text or {'id': text}", param="conversation")
        return named

    @property
    def input_items(self) -> list[Json]:
        """The input as items; a text is one user message, an empty one none."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}] if self.input else []
        return self.input or []


class ResponseRequest(PromptRequest):
    """The body of POST /v1/responses."""

    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    max_tool_calls: int | None = Field(default=None, ge=0)
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    context_management: list[ContextManagement] | None = Field(default=None, max_length=16)
    service_tier: str | None = None

    @field_validator("include")
    @classmethod
    def _known_includes(cls, include: list[str] | None) -> list[str] | None:
        if unknown := unknown_include(include):
            raise ValueError(unknown)
        return include

    @property
    def prewarms(self) -> bool:
        return bool(self.prompt_cache_options and self.prompt_cache_options.prewarm)

    @property
    def compact_threshold(self) -> int | None:
        given = [one.compact_threshold for one in self.context_management or () if one.compact_threshold]
        return min(given, default=None)

    @property
    def wants_padding(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_obfuscation)

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())


Request = TypeVar("Request", bound=PromptRequest)

# `reasoning.usage` is an addition to OpenAI's.
INCLUDES = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "message.output_text.logprobs",
        "reasoning.encrypted_content",
        "reasoning.usage",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)


def unknown_include(include: Iterable[str] | None) -> str | None:
    """What is wrong with an `include`; None for nothing."""
    unknown = sorted(set(include or ()) - INCLUDES)
    return f"{unknown[0][:80]!r} is not one of {', '.join(sorted(INCLUDES))}" if unknown else None


def check_request(request: PromptRequest) -> None:
    """Raise InputError for what cannot be together, or is not offered."""
    shape = request.format
    if request.previous_response_id is not None and request.conversation is not None:
        raise InputError(
            "previous_response_id and conversation exclude each other; give one", param="previous_response_id"
        )
    if "json_schema" in (shape.model_extra or {}):
        raise InputError(
            "text.format.json_schema is of Chat Completions; put its name, schema and strict beside type",
            param="text.format.json_schema",
        )
    if (request.model_extra or {}).get("prompt") is not None:
        raise UnsupportedError("prompt templates are not stored here; send the text as input", param="prompt")
    if request.input is None and request.previous_response_id is None and request.conversation is None:
        raise InputError("there is nothing to answer; give input, a text or items", param="input")
    if isinstance(request, ResponseRequest) and request.background and request.store is False:
        raise InputError("background needs store; leave store out or set it to true", param="background")
    if shape.type == "json_schema" and shape.json_schema is None:
        raise InputError("text.format is json_schema without a schema; expected one", param="text.format.schema")
    if shape.type == "grammar" and (shape.definition is None or shape.syntax is None):
        raise InputError("text.format is grammar without a syntax or definition; expected both", param="text.format")


def configured(request: Request, items: Iterable[Json]) -> Request:
    """The request under the latest `configuration_update` of a conversation, where it does not speak for itself."""
    updates: Json = {}
    for item in items:
        if item.get("type") == "configuration_update":
            for name in ("reasoning", "text"):
                if isinstance(item.get(name), dict):
                    updates[name] = item[name]
    changed: Json = {}
    try:
        if "reasoning" in updates and not (request.reasoning and request.reasoning.effort):
            given = request.reasoning.model_dump() if request.reasoning else {}
            changed["reasoning"] = Reasoning(**{**given, "effort": updates["reasoning"].get("effort")})
        if "text" in updates and not (request.text and request.text.format):
            given = request.text.model_dump(by_alias=True) if request.text else {}
            changed["text"] = Text(**{**given, "format": updates["text"].get("format")})
    except ValidationError as error:
        raise InputError(f"configuration_update: {error.errors()[0]['msg']}", param="input") from None
    return request.model_copy(update=changed) if changed else request


# What goes out ---------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """Tokens of one response; of several generations in it, the sums."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def to_dict(self) -> Json:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


def new_id(prefix: str) -> str:
    """A fresh id such as ``resp_0f3a...``: 24 random bytes, so one cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(24)}"


def new_response(request: ResponseRequest, model: str, sampled: Mapping[str, Any]) -> Json:
    """The response as it begins: every key of the API, the request's parameters and how it is ``sampled`` echoed."""
    shape: Json = {"type": request.format.type}
    if request.format.type == "json_schema":
        shape |= {
            "name": request.format.name or "answer",
            "description": request.format.description,
            "schema": request.format.json_schema,
            "strict": request.format.is_strict,
        }
    if request.format.type == "grammar":
        shape |= {"syntax": request.format.syntax, "definition": request.format.definition}
    conversation_id = request.conversation_id
    effort = (request.reasoning and request.reasoning.effort) or "medium"
    echoed = {key: value for key, value in (request.model_extra or {}).items() if key in _ECHOED}
    if request.prompt_cache_options is not None:
        asked = request.prompt_cache_options.model_dump(exclude_none=True)
        echoed["prompt_cache_options"] = {"mode": "implicit", "ttl": "30m", **asked}
    if request.prompt_cache_retention is not None:
        echoed["prompt_cache_retention"] = request.prompt_cache_retention
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued" if request.background else "in_progress",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "conversation": {"id": conversation_id} if conversation_id else None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "summary": None,
            **(request.reasoning.model_dump(exclude_none=True) if request.reasoning else {}),
            "effort": effort,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": sampled.get("temperature", 1.0),
        "text": {"format": shape, "verbosity": (request.text and request.text.verbosity) or "medium"},
        "tool_choice": request.tool_choice or "auto",
        "tools": [{"strict": None, "parameters": None, **t} if t.get("type") == "function" else t
                  for t in request.tools or ()],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampled.get("top_p", 1.0),
        "truncation": request.truncation or "disabled",
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "usage": None,
        "user": request.user,
        "metadata": request.metadata or {},
        **echoed,
    }  # fmt: skip


_ECHOED = frozenset({"background_options"})
# Fields that are taken without a word: they change nothing here, and need not.
HINTS = _ECHOED | {"access_programs", "client_metadata", "image"}


def error_object(error: OssiaError) -> Json:
    """The `error` of a response that failed; the API's codes are few, ours stands in the message."""
    code = error.code if error.code in ("rate_limit_exceeded", "invalid_prompt") else "server_error"
    if error.status == 400:
        code = "invalid_prompt"
    return {"code": code, "message": error.message}


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8. Half characters, which JSON lets clients send, become question marks."""
    return _encode(value).encode("utf-8", "replace")


def quoted(text: str) -> bytes:
    """A text as `dumps` writes it."""
    return encode_basestring(text).encode("utf-8", "replace")


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
