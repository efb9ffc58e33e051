"""The tools of a request: how the model is told of them, and how its calls find their way back.

Functions stand in the developer message under ``functions``, those of a namespace under its own name; a custom tool is
a function of one text. Tools of the API's own that the client runs are functions too (`client_tools`); where the client
can search for tools, those that it defers are told when it has found them. Tools that ossia runs itself come from a
`Toolbox`. What is none of these is passed by, by name, so that the server can say so.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

from ossia.errors import InputError
from ossia.harmony import Message, ToolDescription, ToolNamespace
from ossia.harmony.grammar import TRAINED_NAMESPACES
from ossia.harmony.strict_schema import is_enforceable
from ossia.responses.client_tools import CLIENT_TOOLS
from ossia.responses.schema import Json
from ossia.tools.base import RESERVED_NAMESPACES

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")

_BUILTIN = {"code_interpreter": "python", "web_search": "browser"}
# web_search_preview_2025_03_11 and its like.
_DATED = re.compile(r"(_preview)?(_\d{4}_\d\d_\d\d)?$")


def kind_of(tool: Json) -> str:
    """The type of a declared tool, whatever its date: `web_search` for web_search_preview_2025_03_11."""
    return _DATED.sub("", str(tool.get("type")), count=1)


def without_secrets(tool: Json) -> Json:
    """A declared tool as it may be shown and kept: without what a server is to be told in secret."""
    if tool.get("type") != "mcp":
        return tool
    shown = {key: value for key, value in tool.items() if key != "authorization"}
    if isinstance(tool.get("headers"), dict):
        shown["headers"] = {str(name): "<redacted>" for name in tool["headers"]}
    return shown


@dataclass(frozen=True)
class Function:
    """A function, a custom tool, or a tool of the API's own that the client runs."""

    kind: Literal["function", "custom", "apply_patch", "shell", "local_shell", "tool_search"]
    name: str
    namespace: str | None = None
    description: str = ""
    # JSON Schema of the arguments; None for a function without any.
    parameters: Mapping[str, Any] | None = None
    # Whether arguments must match the schema; None where the request does not say.
    strict: bool | None = False
    # Of a custom tool: {"type": "text"} or {"type": "grammar", "syntax": "lark" | "regex", "definition": ...}.
    format: Mapping[str, Any] | None = None
    # The place in the request, for errors.
    param: str = "tools"

    @property
    def recipient(self) -> str:
        return f"{self.namespace or 'functions'}.{self.name}"


class ToolResult(NamedTuple):
    """What a tool that ossia runs has to say."""

    # For the model.
    text: str
    # Fields that the call's item gets when it is done, such as `action` or `outputs`.
    fields: Json
    is_failed: bool = False


class Scanner(Protocol):
    """Reads the text of one message as it comes, and finds what it cites."""

    def feed(self, text: str) -> tuple[str, Sequence[Json]]:
        """More of the message: what of it may be shown, and the annotations that are complete with it."""

    def finish(self) -> tuple[str, Sequence[Json]]:
        """The message has ended: what was held back."""


class Toolbox(Protocol):
    """Tools that ossia runs itself, for one response or a chain of them. What implements it inherits from it."""

    def namespaces(self, tools: Sequence[Json]) -> tuple[list[ToolNamespace], list[Json]]:
        """How the model is told of those of ``tools`` that are offered here, and the others."""

    def item(self, recipient: str) -> Json | None:
        """The item that shows a call while it is under way: `type` and that type's own fields; None if unknown.

        A call that a person has to approve first is an `mcp_approval_request`: it is not run, and ends the turn.
        """

    async def run(self, call: Message) -> ToolResult:
        """Run a call. What goes wrong in the tool is a result, not an exception; cancelling stops the tool."""

    def name(self, recipient: str) -> str:
        """The tool's own name for what the model has called it."""
        return recipient

    def begin(self, response_id: str) -> None:
        """The response that the next calls belong to."""

    def opening(self) -> list[Json]:
        """Items that the response shows first: the lists of tools that servers have given."""
        return []

    def ask(self, call: Message) -> Json:
        """The fields of the item that asks a person for a call."""
        return {}

    async def run_approved(self, request: Json) -> ToolResult:
        """Run the call that an `mcp_approval_request` asks for, now that it is approved."""
        return ToolResult("there is nothing that could be approved", {}, True)

    def scanner(self) -> Scanner | None:
        """What turns the citations of one message into annotations; None where nothing can be cited."""
        return None

    @property
    def wants_approval(self) -> bool:
        """Whether a person is to be asked before anything is done with what the world has said."""
        return False

    def state(self) -> Json | None:
        """What the next response of the chain goes on with, as JSON values; takes time. None for nothing."""
        return None

    async def close(self) -> None:
        """Free what no later response can come back to."""


@dataclass(frozen=True)
class Tools:
    """What a request declares."""

    functions: tuple[Function, ...] = ()
    # Functions that were told later than in the developer message: found by a search, or added.
    found: tuple[Function, ...] = ()
    # Descriptions of client namespaces.
    descriptions: tuple[tuple[str, str], ...] = ()
    builtin: tuple[ToolNamespace, ...] = ()
    # Tools that ossia runs and the model was not trained on: told in the developer message, as functions are.
    served: tuple[ToolNamespace, ...] = ()
    # Types of tools that are not offered here.
    ignored: tuple[str, ...] = ()

    def find(self, recipient: str) -> Function | None:
        """The function that a recipient means, also where the model has slipped in its namespace."""
        for candidate in (recipient, f"functions.{recipient}", recipient.removeprefix("functions.")):
            for function in self.callable:
                if function.recipient == candidate:
                    return function
        return None

    def settled(self, loose: Container[str] = ()) -> Tools:
        """The tools where each function is strict or not: one that does not say is if its schema can be enforced, and
        its ``param`` is not among ``loose``."""

        def decide(function: Function) -> Function:
            if function.strict is not None:
                return function
            can_be = function.param not in loose and is_enforceable(function.parameters or {}, root_type="object")
            return replace(function, strict=can_be)

        return replace(self, functions=tuple(map(decide, self.functions)), found=tuple(map(decide, self.found)))

    @property
    def callable(self) -> tuple[Function, ...]:
        """All functions that can be called."""
        return self.functions + self.found

    @property
    def namespaces(self) -> list[ToolNamespace]:
        """Declarations for the developer message."""
        groups: dict[str, list[ToolDescription]] = {}
        for function in self.functions:
            group = groups.setdefault(function.namespace or "functions", [])
            group.append(ToolDescription(function.name, _described(function), function.parameters))
        described = dict(self.descriptions)
        declared = [ToolNamespace(name, described.get(name), tuple(tools)) for name, tools in groups.items()]
        return [*declared, *self.served]

    @property
    def names(self) -> list[str]:
        """Recipients of everything that can be called."""
        own = [f"{n.name}.{t.name}" if t else n.name for n in self.builtin + self.served for t in n.tools or (None,)]
        return sorted([*(function.recipient for function in self.callable), *own])


def read_tools(tools: Sequence[Json], toolbox: Toolbox | None = None) -> Tools:
    """Read the `tools` of a request. Raises InputError for a declaration that cannot be used.

    Tools that are deferred are left out if the client can search for them.
    """
    can_search = any(tool.get("type") == "tool_search" and _is_client_run(tool) for tool in tools)
    spaces: list[ToolNamespace] = []
    functions: list[Function] = []
    descriptions: list[tuple[str, str]] = []
    others: list[Json] = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        match tool.get("type"):
            case "function" | "custom":
                if not (can_search and tool.get("defer_loading")):
                    functions.append(_function(tool, None, where))
            # Where the client has no search every tool is told from the start; and no shell runs here.
            case "tool_search" | "shell" if not _is_client_run(tool):
                others.append(tool)
            case str(kind) if kind in CLIENT_TOOLS:
                functions.append(_client_tool(tool, where))
            case "namespace":
                name = _name(tool, where)
                if name in RESERVED_NAMESPACES:
                    raise InputError(f"{where}.name {name!r} is a name of the format; choose another", param=where)
                descriptions.append((name, str(tool.get("description") or "")))
                inner = tool.get("tools")
                for k, one in enumerate(inner if isinstance(inner, list) else ()):
                    is_deferred = can_search and isinstance(one, dict) and bool(one.get("defer_loading"))
                    if isinstance(one, dict) and one.get("type") in ("function", "custom") and not is_deferred:
                        functions.append(_function(one, name, f"{where}.tools[{k}]"))
            case str():
                others.append(tool)
            case _:
                raise InputError(f"{where} has no type; expected one such as 'function'", param=f"{where}.type")
    if toolbox is not None:
        spaces, others = toolbox.namespaces(others)
    seen: set[str] = set()
    for function in functions:
        if function.recipient in seen:
            raise InputError(f"two tools are named {function.recipient!r}; expected different names", param="tools")
        seen.add(function.recipient)
    named = {function.namespace for function in functions}
    for space in spaces:
        if space.name in named:
            raise InputError(f"a namespace and a server are both named {space.name!r}; rename one", param="tools")
    return Tools(
        tuple(functions),
        descriptions=tuple(descriptions),
        builtin=tuple(space for space in spaces if space.name in TRAINED_NAMESPACES),
        served=tuple(space for space in spaces if space.name not in TRAINED_NAMESPACES),
        ignored=tuple(dict.fromkeys(str(tool["type"]) for tool in others)),
    )


def with_found(tools: Tools, items: Sequence[Json]) -> Tools:
    """The tools, and those that a conversation's items bring: found by the client's search, or added by it."""
    known = {function.recipient for function in tools.functions}
    found: dict[str, Function] = {}
    for item in items:
        if item.get("type") in ("tool_search_output", "additional_tools"):
            for function in brought(item).functions:
                if function.recipient not in known:
                    found[function.recipient] = function
    return replace(tools, found=tuple(found.values())) if found else tools


def brought(item: Json) -> Tools:
    """The tools that an item brings. Raises InputError."""
    declared = item.get("tools")
    if not isinstance(declared, list) or not all(isinstance(tool, dict) for tool in declared):
        raise InputError(f"{item['type']} has no list of tools; expected those that can be called", param="input")
    return read_tools(declared)


class Choice(NamedTuple):
    """What `tool_choice` says: whether a call may, must or must not come, and to which recipients; None for any."""

    mode: Literal["none", "auto", "required"]
    recipients: tuple[str, ...] | None = None


def read_tool_choice(choice: str | Json | None, tools: Tools) -> Choice:
    """Raise InputError if a choice asks for a tool that is not declared, or is none."""
    if choice is None or isinstance(choice, str):
        if choice not in (None, "none", "auto", "required"):
            raise InputError(
                f"tool_choice is {choice[:80]!r}; expected none, auto, required or an object", param="tool_choice"
            )
        if choice == "required" and not tools.names:
            raise InputError("tool_choice is 'required' and no tool is declared", param="tool_choice")
        return Choice(choice or "auto")  # type: ignore[arg-type]
    kind = choice.get("type")
    if not isinstance(kind, str):
        raise InputError(
            "tool_choice is an object without a type; expected one such as 'function'", param="tool_choice"
        )
    if kind != "allowed_tools":
        return Choice("required", _recipients(choice, tools))
    mode, wanted = choice.get("mode", "auto"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise InputError(f"tool_choice.mode is {str(mode)[:80]!r}; expected auto or required", param="tool_choice.mode")
    if not isinstance(wanted, list) or not all(isinstance(one, dict) for one in wanted):
        raise InputError("tool_choice has no list of tools; expected what may be called", param="tool_choice.tools")
    # Tools that are not offered here are passed by, as they are where they are declared.
    offered = [one for one in wanted if one.get("type") not in tools.ignored]
    found = tuple(dict.fromkeys(name for one in offered for name in _recipients(one, tools)))
    if mode == "required" and not found:
        raise InputError("tool_choice is 'required' and none of its tools is offered here", param="tool_choice")
    return Choice(mode, found)


def _recipients(wanted: Json, tools: Tools) -> tuple[str, ...]:
    """Recipients that one tool of a choice stands for."""
    kind, name = str(wanted.get("type")), wanted.get("name")
    if kind in tools.ignored:
        raise InputError(f"tool_choice asks for {kind!r}, which is not offered here", param="tool_choice")
    if kind in ("function", "custom"):
        space = wanted.get("namespace")
        of_name = [f for f in tools.callable if f.name == name and f.kind == kind]
        found = [f.recipient for f in of_name if space is None or f.namespace == space]
    elif kind == "namespace":
        found = [f.recipient for f in tools.callable if f.namespace == name]
    elif kind in CLIENT_TOOLS:
        name, found = kind, [f.recipient for f in tools.callable if f.kind == kind]
    else:
        # The namespace that a type of tool was trained under; of a server's tools, its label.
        label = wanted.get("server_label") or _BUILTIN.get(kind_of(wanted), kind)
        spaces = [space for space in tools.builtin + tools.served if space.name == label]
        found = [f"{space.name}.{tool.name}" for space in spaces for tool in space.tools if tool.name == name]
        if not isinstance(name, str):
            name, found = label, [space.name for space in spaces]
    if not found:
        raise InputError(f"tool_choice names {str(name)[:80]!r}, which tools does not declare", param="tool_choice")
    return tuple(found)


def _function(tool: Json, namespace: str | None, where: str) -> Function:
    kind: Literal["function", "custom"] = "custom" if tool["type"] == "custom" else "function"
    name = _name(tool, where)
    description = tool.get("description") or ""
    if not isinstance(description, str):
        raise InputError(f"{where}.description is {description!r}; expected a text", param=f"{where}.description")
    if kind == "custom":
        shape = tool.get("format")
        if shape is not None and not isinstance(shape, dict):
            raise InputError(f"{where}.format is {shape!r}; expected an object", param=f"{where}.format")
        return Function(kind, name, namespace, description, {"type": "string"}, format=shape, param=where)
    parameters = tool.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise InputError(f"{where}.parameters is no JSON Schema object", param=f"{where}.parameters")
    strict = None if tool.get("strict") is None else bool(tool["strict"])
    return Function(kind, name, namespace, description, parameters or None, strict, param=where)


def _is_client_run(tool: Json) -> bool:
    if tool["type"] == "tool_search":
        return tool.get("execution") == "client"
    environment = tool.get("environment")
    return not isinstance(environment, dict) or environment.get("type") == "local"


def _client_tool(tool: Json, where: str) -> Function:
    known = CLIENT_TOOLS[tool["type"]]
    description, parameters = known.description, known.parameters
    if known.kind == "tool_search":
        description = tool["description"] if isinstance(tool.get("description"), str) else description
        parameters = tool["parameters"] if isinstance(tool.get("parameters"), dict) else parameters
    # What a client looks for is its own affair.
    strict = parameters is known.parameters
    return Function(known.kind, known.kind, None, description, parameters, strict, param=where)  # type: ignore[arg-type]


def _name(tool: Json, where: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{where}.name is {str(name)[:140]!r}; expected 1 to 128 letters, digits, '_' or '-'",
            param=f"{where}.name",
        )
    return name


def _described(function: Function) -> str:
    if function.kind != "custom":
        return function.description
    notes = [function.description, "The input is free text, not JSON."]
    if function.format and function.format.get("type") == "grammar":
        notes.append(f"It follows this {function.format.get('syntax', '')} grammar:\n{function.format['definition']}"
                     if isinstance(function.format.get("definition"), str) else "")  # fmt: skip
    return "\n".join(note for note in notes if note)
