"""The grammar of a turn from what its request declares: what makes a malformed message impossible to sample.

Strict functions and a strict output format match their schemas, other functions take any JSON object; a custom tool's
text follows its grammar; the tool choice is enforced. Sources: `ossia.harmony.grammar`, `ossia.engine.masks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ossia.engine.masks import GrammarCompiler
from ossia.engine.request import Constraint
from ossia.errors import InputError
from ossia.harmony.grammar import Body, Lark, Regex, Schema, Tool, ToolChoice, turn_grammar
from ossia.harmony.grammar import Json as AnyJson
from ossia.responses.schema import TextFormat
from ossia.responses.tools import Choice, Function, Tools

# Where a request has the schema of its answer.
FORMAT_PARAM = "text.format.schema"


@dataclass(frozen=True)
class Turn:
    """What the model may do in one generation."""

    tools: Tools
    choice: Choice
    format: TextFormat
    # Tokens of analysis after which it is closed; None for no cap.
    max_reasoning_tokens: int | None = None


class Grammars:
    """Makes constraints of turns; the compiler keeps what it has compiled."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler

    def __call__(self, turn: Turn) -> Constraint:
        """Raises InputError naming what cannot be enforced. May take a second for a large schema."""
        tools = [_tool(function) for function in turn.tools.callable]
        for namespace in turn.tools.builtin:
            tools += Tool.builtin(namespace)
        for namespace in turn.tools.served:
            tools += [
                Tool.function(t.name, t.parameters, strict=False, namespace=namespace.name) for t in namespace.tools
            ]
        grammar = turn_grammar(
            tools,
            tool_choice=ToolChoice(*turn.choice),
            output=_output(turn.format),
            output_param="text.format.definition" if turn.format.type == "grammar" else FORMAT_PARAM,
        )
        return self._compiler.constraint(grammar, max_reasoning_tokens=turn.max_reasoning_tokens)


def _tool(function: Function) -> Tool:
    namespace = function.namespace or "functions"
    if function.kind != "custom":
        return Tool.function(
            function.name, function.parameters, strict=bool(function.strict), namespace=namespace, param=function.param
        )
    shape = function.format or {}
    syntax: Any = shape.get("syntax") if shape.get("type") == "grammar" else "text"
    definition = shape.get("definition") or ""
    if syntax not in ("text", "lark", "regex"):
        param = f"{function.param}.format.syntax"
        raise InputError(f"{param} is {str(syntax)[:80]!r}; expected lark or regex", param=param)
    if not isinstance(definition, str):
        raise InputError(f"{function.param}.format.definition is no text", param=f"{function.param}.format")
    return Tool.custom(function.name, syntax, definition, namespace=namespace, param=function.param)


def _output(shape: TextFormat) -> Body | None:
    if shape.type == "json_schema":
        return Schema(shape.json_schema or {}) if shape.is_strict else AnyJson()
    if shape.type == "grammar":
        return (Regex if shape.syntax == "regex" else Lark)(shape.definition or "")
    return AnyJson("object") if shape.type == "json_object" else None
