"""Tools of the API's own that the client runs: apply_patch, shell, local_shell, and tool_search.

The model calls each as a function under ``functions``; the client sees the item that the API has for it, and answers
with another. A tool search answers with tools: those can be called from there on.

    declared      {"type": "shell"}
    to the model  functions.shell(_: {commands: string[], ...})
    called        shell_call {call_id, action: {commands, ...}}
    answered      shell_call_output {call_id, output: [{stdout, stderr, outcome}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ossia.responses.schema import Json


class ClientTool(NamedTuple):
    """How one of them is called."""

    kind: str
    # Of ids.
    prefix: str
    description: str
    parameters: Mapping[str, Any]

    @property
    def call_type(self) -> str:
        return f"{self.kind}_call"

    @property
    def output_type(self) -> str:
        return "tool_search_output" if self.kind == "tool_search" else f"{self.kind}_call_output"


_STRINGS = {"type": "array", "items": {"type": "string"}}
_TIMEOUT = {"type": "integer", "minimum": 1, "description": "Milliseconds after which it is stopped."}


def _object(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


CLIENT_TOOLS: Mapping[str, ClientTool] = {
    tool.kind: tool
    for tool in (
        ClientTool(
            "apply_patch",
            "apc",
            "Create, update or delete one file. The diff holds for create_file each line of the file behind a '+'; for "
            "update_file sections that begin with '@@' and a line that tells where, then lines behind ' ' (stays), '-' "
            "(goes) or '+' (comes); for delete_file nothing.",
            _object(
                ["type", "path", "diff"],
                type={"type": "string", "enum": ["create_file", "update_file", "delete_file"]},
                path={"type": "string", "description": "Relative to the workspace."},
                diff={"type": "string"},
            ),
        ),
        ClientTool(
            "shell",
            "sh",
            "Run shell commands and return what they print.",
            _object(
                ["commands"],
                commands=_STRINGS,
                timeout_ms=_TIMEOUT,
                max_output_length={"type": "integer", "minimum": 1, "description": "Characters kept of the output."},
            ),
        ),
        ClientTool(
            "local_shell",
            "lsh",
            "Run a command on the user's machine and return what it prints.",
            _object(
                ["command"],
                command={**_STRINGS, "description": "The program and its arguments."},
                working_directory={"type": "string"},
                timeout_ms=_TIMEOUT,
            ),
        ),
        ClientTool(
            "tool_search",
            "tsc",
            "Search for tools that are not listed here. Those that are found can be called.",
            _object(["query"], query={"type": "string"}),
        ),
    )
}
_BY_CALL = {tool.call_type: tool for tool in CLIENT_TOOLS.values()}
_BY_OUTPUT = {tool.output_type: tool for tool in CLIENT_TOOLS.values()}


def of_call(item_type: object) -> ClientTool | None:
    """The tool that an item of this type calls."""
    return _BY_CALL.get(str(item_type))


def is_call(item_type: object) -> bool:
    """Whether the client answers an item of this type: a call of its own functions or tools, or of one of these."""
    return item_type in ("function_call", "custom_tool_call") or of_call(item_type) is not None


def of_output(item_type: object) -> ClientTool | None:
    """The tool that an item of this type answers for."""
    return _BY_OUTPUT.get(str(item_type))


def call_fields(kind: str, arguments: str) -> Json | None:
    """The fields of a call's item; None for arguments that are not what the tool takes."""
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or any(name not in given for name in CLIENT_TOOLS[kind].parameters["required"]):
        return None if kind != "tool_search" or not isinstance(given, dict) else _search(given)
    match kind:
        case "apply_patch":
            shown = ("type", "path") if given["type"] == "delete_file" else ("type", "path", "diff")
            return {"operation": {name: given[name] for name in shown}}
        case "shell":
            limits = {name: given.get(name) for name in ("timeout_ms", "max_output_length")}
            return {"action": {"commands": given["commands"], **limits}, "environment": {"type": "local"}}
        case "local_shell":
            limits = {name: given.get(name) for name in ("timeout_ms", "working_directory")}
            return {"action": {"type": "exec", "command": given["command"], "env": {}, "user": None, **limits}}
    return _search(given)


def _search(arguments: Json) -> Json:
    return {"arguments": arguments, "execution": "client"}


def arguments_of(kind: str, item: Mapping[str, Any]) -> str | None:
    """The model's arguments of a call's item; None for an item that is none."""
    place = item.get({"apply_patch": "operation", "tool_search": "arguments"}.get(kind, "action"))
    if isinstance(place, str) and kind == "tool_search":
        return place
    if not isinstance(place, Mapping):
        return None
    if kind == "tool_search":
        given = dict(place)
    else:
        names = CLIENT_TOOLS[kind].parameters["properties"]
        given = {name: place[name] for name in names if place.get(name) is not None}
        if kind == "apply_patch":
            given.setdefault("diff", "")
    return json.dumps(given, ensure_ascii=False)


def output_text(item: Mapping[str, Any]) -> str | None:
    """What the model reads of an output; None for an item that is none, or holds tools instead."""
    output = item.get("output")
    if item.get("type") == "apply_patch_call_output" and output is None:
        return "Done." if item.get("status") == "completed" else "Failed."
    if isinstance(output, str):
        return f"Failed: {output}" if item.get("status") == "failed" else output
    if not isinstance(output, list) or not all(isinstance(one, Mapping) for one in output):
        return None
    return "\n".join(_printed(one) for one in output)


def _printed(one: Mapping[str, Any]) -> str:
    outcome = one.get("outcome")
    outcome = outcome if isinstance(outcome, Mapping) else {}
    ended = "timed out" if outcome.get("type") == "timeout" else f"exit code {outcome.get('exit_code', 'unknown')}"
    printed = [ended, str(one.get("stdout") or "")]
    if one.get("stderr"):
        printed += ["stderr:", str(one["stderr"])]
    return "\n".join(part for part in printed if part)
