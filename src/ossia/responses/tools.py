"""The tools of a request: how the model is told of them, and how its calls find their way back.

Functions stand in the developer message under ``functions``, those of a namespace under its own name; a custom tool is
a function of one text. Tools that ossia runs itself come from a `Toolbox`. What is neither is passed by, by name, so
that the server can say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from ossia.errors import InputError
from ossia.harmony import Message, ToolDescription, ToolNamespace
from ossia.responses.schema import Json
from ossia.tools.base import RESERVED_NAMESPACES

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class Function:
    """A function or a custom tool that the client runs."""

    kind: Literal["function", "custom"]
    name: str
    namespace: str | None = None
    description: str = ""
    # JSON Schema of the arguments; None for a function without any.
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
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


class Toolbox(Protocol):
    """Tools that ossia runs itself, for one response or a chain of them."""

    def namespaces(self, tools: Sequence[Json]) -> tuple[list[ToolNamespace], list[Json]]:
        """How the model is told of those of ``tools`` that are offered here, and the others."""

    def item(self, recipient: str) -> Json | None:
        """The item that shows a call while it is under way: `type` and that type's own fields; None if unknown."""

    async def run(self, call: Message) -> ToolResult:
        """Run a call. What goes wrong in the tool is a result, not an exception; cancelling stops the tool."""


@dataclass(frozen=True)
class Tools:
    """What a request declares."""

    functions: tuple[Function, ...] = ()
    # Descriptions of client namespaces.
    descriptions: tuple[tuple[str, str], ...] = ()
    builtin: tuple[ToolNamespace, ...] = ()
    # Types of tools that are not offered here.
    ignored: tuple[str, ...] = ()

    def find(self, recipient: str) -> Function | None:
        """The function that a recipient means, also where the model has slipped in its namespace."""
        for candidate in (recipient, f"functions.{recipient}", recipient.removeprefix("functions.")):
            for function in self.functions:
                if function.recipient == candidate:
                    return function
        return None

    @property
    def namespaces(self) -> list[ToolNamespace]:
        """Declarations for the developer message."""
        groups: dict[str, list[ToolDescription]] = {}
        for function in self.functions:
            group = groups.setdefault(function.namespace or "functions", [])
            group.append(ToolDescription(function.name, _described(function), function.parameters))
        described = dict(self.descriptions)
        return [ToolNamespace(name, described.get(name), tuple(tools)) for name, tools in groups.items()]


def read_tools(tools: Sequence[Json], toolbox: Toolbox | None = None) -> Tools:
    """Read the `tools` of a request. Raises InputError for a declaration that cannot be used."""
    builtin: list[ToolNamespace] = []
    functions: list[Function] = []
    descriptions: list[tuple[str, str]] = []
    others: list[Json] = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        match tool.get("type"):
            case "function" | "custom":
                functions.append(_function(tool, None, where))
            case "namespace":
                name = _name(tool, where)
                if name in RESERVED_NAMESPACES:
                    raise InputError(f"{where}.name {name!r} is a name of the format; choose another", param=where)
                descriptions.append((name, str(tool.get("description") or "")))
                inner = tool.get("tools")
                for k, one in enumerate(inner if isinstance(inner, list) else ()):
                    if isinstance(one, dict) and one.get("type") in ("function", "custom"):
                        functions.append(_function(one, name, f"{where}.tools[{k}]"))
            case str():
                others.append(tool)
            case _:
                raise InputError(f"{where} has no type; expected one such as 'function'", param=f"{where}.type")
    if toolbox is not None:
        builtin, others = toolbox.namespaces(others)
    seen: set[str] = set()
    for function in functions:
        if function.recipient in seen:
            raise InputError(f"two tools are named {function.recipient!r}; expected different names", param="tools")
        seen.add(function.recipient)
    ignored = tuple(dict.fromkeys(str(tool["type"]) for tool in others))
    return Tools(tuple(functions), tuple(descriptions), tuple(builtin), ignored)


def check_tool_choice(choice: str | Json | None, tools: Tools) -> None:
    """Raise InputError if a choice asks for a tool that is not declared, or is none."""
    if choice is None or choice in ("none", "auto", "required"):
        if choice == "required" and not (tools.functions or tools.builtin):
            raise InputError("tool_choice is 'required' and no tool is declared", param="tool_choice")
        return
    if isinstance(choice, str):
        raise InputError(f"tool_choice is {choice!r}; expected none, auto, required or an object", param="tool_choice")
    kind = choice.get("type")
    wanted = choice.get("tools") if kind == "allowed_tools" else [choice]
    for one in wanted if isinstance(wanted, list) else ():
        if isinstance(one, dict) and one.get("type") in ("function", "custom"):
            name = one.get("name")
            if not any(name == f.name and one["type"] == f.kind for f in tools.functions):
                raise InputError(f"tool_choice names {name!r}, which tools does not declare", param="tool_choice")
        elif isinstance(one, dict) and one.get("type") in tools.ignored and kind != "allowed_tools":
            raise InputError(f"tool_choice asks for {one['type']!r}, which is not offered here", param="tool_choice")
    if not isinstance(kind, str) or (kind == "allowed_tools" and not isinstance(wanted, list)):
        raise InputError("tool_choice is an object without a type or tools", param="tool_choice")


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
    return Function(kind, name, namespace, description, parameters or None, bool(tool.get("strict")), param=where)


def _name(tool: Json, where: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{where}.name is {str(name)[:140]!r}; expected 1 to 128 letters, digits, '_' or '-'",
            param=f"{where}.name",
        )
    return name


def _described(function: Function) -> str:
    if function.kind == "function":
        return function.description
    notes = [function.description, "The input is free text, not JSON."]
    if function.format and function.format.get("type") == "grammar":
        notes.append(f"It follows this {function.format.get('syntax', '')} grammar:\n{function.format['definition']}"
                     if isinstance(function.format.get("definition"), str) else "")  # fmt: skip
    return "\n".join(note for note in notes if note)
