"""What a conversation is made of: messages, system and developer content, tool declarations. Frozen, and JSON.

The JSON form, which ``to_dict``/``from_dict`` and ``to_json``/``from_json`` speak (fields that are absent take their
default; unknown ones are refused):

    {"messages": [
      {"role": "system", "content": {"effort": "high", "current_date": "2025-06-28", "tools": [{"name": "python"}]}},
      {"role": "developer", "content": {"instructions": "Be brief.",
        "tools": [{"name": "functions", "tools": [{"name": "f", "description": "...", "parameters": {}}]}],
        "response_formats": [{"name": "answer", "schema": {"type": "object"}}]}},
      {"role": "user", "content": "What is 2 + 2?"},
      {"role": "assistant", "channel": "analysis", "content": "Easy."},
      {"role": "assistant", "channel": "commentary", "recipient": "functions.f", "content_type": "<|constrain|>json",
       "content": "{}"},
      {"role": "tool", "name": "functions.f", "recipient": "assistant", "channel": "commentary", "content": "4"}]}

``content`` is a text, an object (system or developer content, by the role), or a list of those. A namespace that is
only a name, "browser" or "python", means the tool that the model was trained on.

Source   openai/harmony docs/format.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeVar

from ossia.errors import InputError
from ossia.harmony.builtin_tools import BROWSER_DESCRIPTION, BROWSER_TOOLS, PYTHON_DESCRIPTION

MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


class Role(StrEnum):
    """Who speaks, from most to least authority."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Channel(StrEnum):
    """What an assistant message is for: thinking (not for users), calls and preambles, the answer."""

    ANALYSIS = "analysis"
    COMMENTARY = "commentary"
    FINAL = "final"


class Effort(StrEnum):
    """How long the model is asked to think."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True)
class ToolDescription:
    """One function of a namespace; ``parameters`` is a JSON Schema, None for a function without arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ToolNamespace:
    """A named group of tools. Without ``tools`` the description stands alone and the name itself is the recipient."""

    name: str
    description: str | None = None
    tools: tuple[ToolDescription, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tuple(self.tools))

    @classmethod
    def functions(cls, tools: Sequence[ToolDescription]) -> ToolNamespace:
        """The user's own functions, under the name that the model was trained on."""
        return cls("functions", None, tuple(tools))

    @classmethod
    def browser(cls) -> ToolNamespace:
        """The trained browsing tool: browser.search, browser.open, browser.find."""
        return cls("browser", BROWSER_DESCRIPTION, tuple(ToolDescription(*tool) for tool in BROWSER_TOOLS))

    @classmethod
    def python(cls) -> ToolNamespace:
        """The trained python tool; its recipient is ``python``."""
        return cls("python", PYTHON_DESCRIPTION)


@dataclass(frozen=True)
class ResponseFormat:
    """The JSON Schema that the final answer is asked to follow."""

    name: str
    schema: Mapping[str, Any]
    description: str | None = None


@dataclass(frozen=True)
class SystemContent:
    """The system message: who the model is, when it is, how long to think, built-in tools. None leaves a line out."""

    model_identity: str | None = MODEL_IDENTITY
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF
    current_date: str | None = None
    effort: Effort | None = Effort.MEDIUM
    tools: tuple[ToolNamespace, ...] = ()
    channels: tuple[str, ...] = tuple(Channel)
    channel_required: bool = True

    def __post_init__(self) -> None:
        if self.effort is not None:
            object.__setattr__(self, "effort", _member(Effort, self.effort, "effort"))
        object.__setattr__(self, "tools", _namespaces(self.tools))
        object.__setattr__(self, "channels", tuple(self.channels))


@dataclass(frozen=True)
class DeveloperContent:
    """The developer message: what elsewhere is called the system prompt, function tools, output formats."""

    instructions: str | None = None
    tools: tuple[ToolNamespace, ...] = ()
    response_formats: tuple[ResponseFormat, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", _namespaces(self.tools))
        object.__setattr__(self, "response_formats", tuple(self.response_formats))


Content = str | SystemContent | DeveloperContent


@dataclass(frozen=True, init=False)
class Message:
    """One message. ``content`` may be given as one part and is kept as a tuple of parts.

    ``name`` is the author's: required of tools ("functions.f"), optional elsewhere. ``content_type`` is what stands
    behind the channel: "code", "json", or with the marker in front, "<|constrain|>json".
    """

    role: Role
    content: tuple[Content, ...]
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None

    def __init__(
        self,
        role: Role | str,
        content: Content | Sequence[Content] = (),
        *,
        channel: str | None = None,
        recipient: str | None = None,
        content_type: str | None = None,
        name: str | None = None,
    ) -> None:
        role = role if type(role) is Role else _member(Role, role, "role")
        parts = (content,) if isinstance(content, str | SystemContent | DeveloperContent) else tuple(content)
        for part in parts:
            if isinstance(part, SystemContent) and role is not Role.SYSTEM:
                raise InputError(f"system content in a {role} message; it belongs in a system message")
            if isinstance(part, DeveloperContent) and role is not Role.DEVELOPER:
                raise InputError(f"developer content in a {role} message; it belongs in a developer message")
        if role is Role.TOOL and not name:
            raise InputError("a tool message without a name; expected the tool's recipient, such as 'functions.f'")
        set_field = object.__setattr__
        set_field(self, "role", role)
        set_field(self, "content", parts)
        set_field(self, "channel", channel)
        set_field(self, "recipient", recipient)
        set_field(self, "content_type", content_type)
        set_field(self, "name", name)

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.content if isinstance(part, str))

    def to_dict(self) -> dict[str, Any]:
        parts = [part if isinstance(part, str) else _plain(part) for part in self.content]
        out: dict[str, Any] = {"role": str(self.role)}
        for key in ("name", "channel", "recipient", "content_type"):
            if (value := getattr(self, key)) is not None:
                out[key] = str(value)
        out["content"] = parts[0] if len(parts) == 1 else parts
        return out

    @classmethod
    def from_dict(cls, data: object, where: str = "message") -> Message:
        """Read the JSON form; ``where`` is the name of the place that an InputError gives."""
        raw = _object(data, where, {"role", "name", "channel", "recipient", "content_type", "content"}, {"role"})
        role = _member(Role, raw["role"], f"{where}.role")
        content = raw.get("content", [])
        if isinstance(content, list):
            parts = [_read_content(part, role, f"{where}.content[{i}]") for i, part in enumerate(content)]
        else:
            parts = [_read_content(content, role, f"{where}.content")]
        optional = {
            key: _text_or_none(raw.get(key), f"{where}.{key}")
            for key in ("name", "channel", "recipient", "content_type")
        }
        try:
            return cls(role, parts, **optional)
        except InputError as error:
            raise InputError(f"{where}: {error.message}", param=where) from error


def tool_message(name: str, channel: str | None, text: str) -> Message:
    """A tool's answer to the assistant; ``name`` is the recipient of the call, and ``channel`` its channel."""
    return Message(Role.TOOL, text, name=name, recipient="assistant", channel=channel)


@dataclass(frozen=True)
class Conversation:
    """Messages in order."""

    messages: tuple[Message, ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)

    def to_dict(self) -> dict[str, Any]:
        return {"messages": [message.to_dict() for message in self.messages]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, data: object) -> Conversation:
        """Read the JSON form: ``{"messages": [...]}``, or the list alone."""
        raw = data if isinstance(data, list) else _object(data, "conversation", {"messages"}, {"messages"})["messages"]
        if not isinstance(raw, list):
            raise _mismatch("messages", raw, "a list of messages")
        return cls(tuple(Message.from_dict(message, f"messages[{i}]") for i, message in enumerate(raw)))

    @classmethod
    def from_json(cls, text: str | bytes) -> Conversation:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the conversation is not JSON: {error}; expected an object with 'messages'") from error
        return cls.from_dict(data)


# -- writing ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A content dataclass as JSON values, without the fields that have their default."""
    if isinstance(value, SystemContent | DeveloperContent | ToolNamespace | ToolDescription | ResponseFormat):
        out = {}
        for f in fields(value):
            item = getattr(value, f.name)
            if f.default is MISSING or item != f.default:
                out[f.name] = _plain(item)
        return out
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


# -- reading ---------------------------------------------------------------------------------------

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


def _read_content(raw: object, role: Role, where: str) -> Content:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, dict) and raw.get("type") == "text":
        return _text(_object(raw, where, {"type", "text"}, {"text"})["text"], f"{where}.text")
    if role is Role.SYSTEM:
        return _read_system(raw, where)
    if role is Role.DEVELOPER:
        return _read_developer(raw, where)
    raise _mismatch(where, raw, "a text")


def _read_system(raw: object, where: str) -> SystemContent:
    data = _object(raw, where, {f.name for f in fields(SystemContent)})
    known: dict[str, Any] = {}
    for key in data.keys() & {"model_identity", "knowledge_cutoff", "current_date"}:
        known[key] = _text_or_none(data[key], f"{where}.{key}")
    if "effort" in data:
        known["effort"] = None if data["effort"] is None else _member(Effort, data["effort"], f"{where}.effort")
    if "tools" in data:
        known["tools"] = _read_namespaces(data["tools"], f"{where}.tools")
    if "channels" in data:
        known["channels"] = _read_list(data["channels"], f"{where}.channels", _text)
    if "channel_required" in data:
        if not isinstance(data["channel_required"], bool):
            raise _mismatch(f"{where}.channel_required", data["channel_required"], "true or false")
        known["channel_required"] = data["channel_required"]
    return SystemContent(**known)


def _read_developer(raw: object, where: str) -> DeveloperContent:
    data = _object(raw, where, {f.name for f in fields(DeveloperContent)})
    return DeveloperContent(
        instructions=_text_or_none(data.get("instructions"), f"{where}.instructions"),
        tools=_read_namespaces(data.get("tools", []), f"{where}.tools"),
        response_formats=_read_list(data.get("response_formats", []), f"{where}.response_formats", _read_format),
    )


def _read_namespaces(raw: object, where: str) -> tuple[ToolNamespace, ...]:
    namespaces = _read_list(raw, where, _read_namespace)
    try:
        return _namespaces(namespaces)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", param=where) from error


def _read_namespace(raw: object, where: str) -> ToolNamespace:
    data = _object(raw, where, {"name", "description", "tools"}, {"name"})
    if data == {"name": "browser"}:
        return ToolNamespace.browser()
    if data == {"name": "python"}:
        return ToolNamespace.python()
    return ToolNamespace(
        _text(data["name"], f"{where}.name"),
        _text_or_none(data.get("description"), f"{where}.description"),
        _read_list(data.get("tools", []), f"{where}.tools", _read_tool),
    )


def _read_tool(raw: object, where: str) -> ToolDescription:
    data = _object(raw, where, {"name", "description", "parameters"}, {"name"})
    parameters = data.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise _mismatch(f"{where}.parameters", parameters, "a JSON Schema object or null")
    return ToolDescription(
        _text(data["name"], f"{where}.name"),
        _text(data.get("description", ""), f"{where}.description"),
        parameters,
    )


def _read_format(raw: object, where: str) -> ResponseFormat:
    data = _object(raw, where, {"name", "schema", "description"}, {"name", "schema"})
    if not isinstance(data["schema"], dict):
        raise _mismatch(f"{where}.schema", data["schema"], "a JSON Schema object")
    return ResponseFormat(
        _text(data["name"], f"{where}.name"),
        data["schema"],
        _text_or_none(data.get("description"), f"{where}.description"),
    )


def _read_list(raw: object, where: str, read: Callable[[object, str], T]) -> tuple[T, ...]:
    if not isinstance(raw, list):
        raise _mismatch(where, raw, "a list")
    return tuple(read(item, f"{where}[{i}]") for i, item in enumerate(raw))


def _object(raw: object, where: str, known: set[str], required: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _mismatch(where, raw, "an object")
    if missing := sorted((required or set()) - raw.keys()):
        raise InputError(f"{where} has no {missing[0]!r}; expected it beside {sorted(raw)}", param=where)
    if unknown := sorted(raw.keys() - known):
        raise InputError(f"{where} has {unknown[0]!r}; expected only {sorted(known)}", param=f"{where}.{unknown[0]}")
    return raw


def _text(raw: object, where: str) -> str:
    if not isinstance(raw, str):
        raise _mismatch(where, raw, "a text")
    return raw


def _text_or_none(raw: object, where: str) -> str | None:
    return None if raw is None else _text(raw, where)


def _member(kind: type[E], raw: object, where: str) -> E:
    try:
        return kind(raw)  # type: ignore[arg-type]  # any value may be asked for
    except ValueError:
        raise _mismatch(where, raw, "one of " + ", ".join(kind)) from None


def _namespaces(namespaces: Sequence[ToolNamespace]) -> tuple[ToolNamespace, ...]:
    seen: set[str] = set()
    for namespace in namespaces:
        if namespace.name in seen:
            raise InputError(f"two tool namespaces are named {namespace.name!r}; join their tools into one")
        seen.add(namespace.name)
    return tuple(namespaces)


def _mismatch(where: str, met: object, expected: str) -> InputError:
    return InputError(f"{where} is {repr(met)[:80]}; expected {expected}", param=where)
