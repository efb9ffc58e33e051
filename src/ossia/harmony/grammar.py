"""What an assistant may emit in one turn, as a grammar: declared tools, tool choice and output format.

    turn       behind the prompt's <|start|>assistant:   (analysis | preamble)* (final | call)
    analysis   <|channel|>analysis<|message|> TEXT <|end|><|start|>assistant
    preamble   <|channel|>commentary<|message|> TEXT <|end|><|start|>assistant        only where a tool may be called
    final      <|channel|>final<|message|> OUTPUT <|return|>
    call       <|channel|>commentary to=functions.f <|constrain|>json<|message|> ARGUMENTS <|call|>
               <|channel|>analysis to=python code<|message|> TEXT <|call|>

A recipient may stand in front of the channel too (`` to=functions.f<|channel|>commentary ...``). TEXT is any UTF-8
without special tokens: a grammar over special tokens cannot be broken out of by text. Recipients that are not declared,
and those that the tool choice leaves out, cannot be sampled.

One grammar serves one generation. Its first ``<|call|>`` or ``<|return|>`` ends it; when a tool's result has been
appended the turn goes on behind a new ``<|start|>assistant`` with a fresh constraint of the same grammar, and of one
with tool choice "auto" where "required" has been met.

The result is text for llguidance (see engine/masks.py), which this module does not need.
Sources  openai/harmony docs/format.md; llguidance docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ossia.errors import InputError
from ossia.harmony.client_grammar import regex_as_lark, safe_lark
from ossia.harmony.messages import Channel, DeveloperContent, Message, SystemContent, ToolDescription, ToolNamespace
from ossia.harmony.strict_schema import any_json, enforceable, is_enforceable

MAX_TOOLS = 512
MAX_TEXT_CHARS = 2_000_000

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
# Tools that the model was trained with: in its system message, and called in its thoughts.
TRAINED_NAMESPACES = ("python", "browser")


@dataclass(frozen=True)
class Text:
    """Any text without special tokens."""


@dataclass(frozen=True)
class Json:
    """Any JSON value; ``json_type`` narrows it to one type ("object" of arguments)."""

    json_type: str | None = None


@dataclass(frozen=True)
class Schema:
    """JSON that a schema accepts, and nothing else; ``root_type`` is demanded of the whole besides."""

    schema: Mapping[str, Any]
    root_type: str | None = None


@dataclass(frozen=True)
class Lark:
    """Text that a client's Lark grammar accepts."""

    definition: str


@dataclass(frozen=True)
class Regex:
    """Text that a client's regular expression matches as a whole."""

    definition: str


Body = Text | Json | Schema | Lark | Regex


@dataclass(frozen=True)
class Tool:
    """Something that can be called: its recipient, and what its messages hold.

    ``param`` is the place in the client's request that errors name.
    """

    recipient: str
    body: Body
    channel: Channel = Channel.COMMENTARY
    param: str | None = None

    @classmethod
    def function(
        cls,
        name: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        strict: bool = True,
        namespace: str = "functions",
        param: str | None = None,
    ) -> Tool:
        """A function: arguments match the schema if ``strict``, otherwise they are any JSON object."""
        body: Body = Json("object")
        if strict:
            none = {"type": "object", "properties": {}, "additionalProperties": False}
            body = Schema(none if parameters is None else parameters, "object")
        return cls(f"{namespace}.{name}", body, param=param)

    @classmethod
    def custom(
        cls,
        name: str,
        syntax: Literal["text", "lark", "regex"] = "text",
        definition: str = "",
        *,
        namespace: str = "functions",
        param: str | None = None,
    ) -> Tool:
        """A custom tool: its input is text, free or by a grammar of the client's."""
        bodies: dict[str, Body] = {"text": Text(), "lark": Lark(definition), "regex": Regex(definition)}
        if syntax not in bodies:
            raise InputError(f"the grammar's syntax is {syntax!r}; expected one of {', '.join(bodies)}", param=param)
        return cls(f"{namespace}.{name}", bodies[syntax], param=param)

    @classmethod
    def builtin(cls, namespace: ToolNamespace, allowed: Iterable[str] | None = None) -> tuple[Tool, ...]:
        """The calls of a built-in namespace: ``python`` takes code, ``browser.search`` and its like their JSON.

        ``allowed`` names those that may be called, all by default.
        """
        if not namespace.tools:
            return (cls(namespace.name, Text(), Channel.ANALYSIS),)
        wanted = None if allowed is None else set(allowed)
        if wanted is not None and (unknown := wanted - {tool.name for tool in namespace.tools}):
            raise InputError(
                f"{namespace.name} has no {sorted(unknown)[0]!r}; it has {[tool.name for tool in namespace.tools]}"
            )
        return tuple(
            cls(
                f"{namespace.name}.{tool.name}",
                Schema({"additionalProperties": False, **(tool.parameters or {"type": "object"})}, "object"),
                Channel.ANALYSIS,
            )
            for tool in namespace.tools
            if wanted is None or tool.name in wanted
        )

    @classmethod
    def declared(cls, namespace: ToolNamespace, *, strict: bool = True, loose: Container[str] = ()) -> tuple[Tool, ...]:
        """The calls of any namespace: python and browser as they were trained, others with JSON, or with text where
        the parameters are declared as a string.

        If ``strict``, arguments match the schema where it can be enforced, and are any JSON object where it cannot,
        and of the recipients in ``loose``. Errors name the recipient.
        """
        if namespace.name in TRAINED_NAMESPACES or not namespace.tools:
            return cls.builtin(namespace)
        return tuple(cls._of(tool, namespace.name, strict, loose) for tool in namespace.tools)

    @classmethod
    def _of(cls, tool: ToolDescription, namespace: str, strict: bool, loose: Container[str]) -> Tool:
        parameters, recipient = tool.parameters, f"{namespace}.{tool.name}"
        if parameters is not None and parameters.get("type") == "string":
            return cls.custom(tool.name, namespace=namespace, param=recipient)
        is_enforced = strict and recipient not in loose and is_enforceable(parameters or {}, root_type="object")
        return cls.function(tool.name, parameters, strict=is_enforced, namespace=namespace, param=recipient)


@dataclass(frozen=True)
class ToolChoice:
    """Whether a call may, must or must not come, and to whom.

    ``recipients`` narrows the declared tools: recipients as they are declared, or whole namespaces ("browser"). A named
    choice is ``ToolChoice("required", ("functions.f",))``; allowed tools are their mode and their recipients.
    """

    mode: Literal["none", "auto", "required"] = "auto"
    recipients: tuple[str, ...] | None = None

    def callable(self, tools: Sequence[Tool]) -> list[Tool]:
        """The tools that may be called. Raises InputError for a recipient that is not declared."""
        for name in self.recipients or ():
            if not any(_is_of(tool, name) for tool in tools):
                declared = ", ".join(tool.recipient for tool in tools) or "none"
                raise InputError(
                    f"tool_choice names {name!r}, which is not declared; the declared tools are: {declared}",
                    param="tool_choice",
                )
        if self.mode == "none":
            return []
        return [t for t in tools if self.recipients is None or any(_is_of(t, name) for name in self.recipients)]


@dataclass(frozen=True)
class Part:
    """One piece of the grammar that came from a client: its name, its source for llguidance, where it stood."""

    name: str
    source: Mapping[str, Any]
    param: str | None


@dataclass(frozen=True)
class TurnGrammar:
    """Text for llguidance: ``text`` of a turn, ``rest`` of what follows when its reasoning has been ended.

    ``rest`` begins with ``<|start|>assistant`` and allows no more analysis. ``parts`` are what clients brought, to say
    in an error which of them it was.
    """

    text: str
    rest: str
    parts: tuple[Part, ...]


AUTO = ToolChoice()


def turn_grammar(
    tools: Sequence[Tool] = (),
    *,
    tool_choice: ToolChoice = AUTO,
    output: Body | None = None,
    output_param: str = "text.format",
    reasoning: bool = True,
) -> TurnGrammar:
    """The grammar of the next assistant turn, behind ``<|start|>assistant``.

    ``output`` binds the final message alone and is any text by default; ``reasoning`` false leaves out plain analysis.
    Raises InputError for tools, choices, schemas and grammars that cannot be enforced, with their ``param``.
    """
    if len(tools) > MAX_TOOLS:
        raise InputError(f"{len(tools)} tools are declared; expected at most {MAX_TOOLS}", param="tools")
    _check_recipients(tools)
    called = tool_choice.callable(tools)
    if tool_choice.mode == "required" and not called:
        raise InputError("tool_choice demands a call, but no tool is declared; declare one", param="tool_choice")
    frame = _Frame()
    calls = [frame.call(tool) for tool in called]
    ends = [] if tool_choice.mode == "required" else [frame.final(output or Text(), output_param)]
    before = ["preamble"] if called else []
    grammar = TurnGrammar(
        frame.text(["analysis", *before] if reasoning else before, [*ends, *calls], behind_start=True),
        frame.text(before, [*ends, *calls], behind_start=False),
        tuple(frame.parts),
    )
    if len(grammar.text) > MAX_TEXT_CHARS:
        raise InputError(
            f"the tools and formats make a grammar of {len(grammar.text):,} characters; at most {MAX_TEXT_CHARS:,} "
            "can be enforced; declare fewer or smaller ones",
            param="tools",
        )
    return grammar


def declared_grammar(
    messages: Iterable[Message],
    *,
    tool_choice: ToolChoice = AUTO,
    strict: bool = True,
    loose: Container[str] = (),
    output_param: str = "text.format",
) -> TurnGrammar:
    """The grammar of the next turn of a conversation, by what its system and developer messages declare.

    Calls are those of `Tool.declared`, with ``strict`` and ``loose``. The answer matches the response format where
    there is one; of several nobody knows which is meant, and none is enforced. Raises InputError for what cannot be
    enforced.
    """
    # Of a tool that is declared again, as a later developer message may do, the last is meant.
    tools: dict[str, Tool] = {}
    schemas: list[Mapping[str, Any]] = []
    for part in (part for message in messages for part in message.content):
        if isinstance(part, SystemContent | DeveloperContent):
            declared = [tool for space in part.tools for tool in Tool.declared(space, strict=strict, loose=loose)]
            _check_recipients(declared)
            tools |= {tool.recipient: tool for tool in declared}
        if isinstance(part, DeveloperContent):
            schemas += [one.schema for one in part.response_formats]
    output = Schema(schemas[0]) if len(schemas) == 1 else None
    return turn_grammar(list(tools.values()), tool_choice=tool_choice, output=output, output_param=output_param)


class _Frame:
    """Collects rules of the turn's own grammar, and the parts that it refers to."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._rules: dict[str, str] = {}

    def call(self, tool: Tool) -> str:
        recipient = f" to={tool.recipient}"
        body = self._body(tool.body, tool.param)
        contents = [f"<|message|> {body} <|call|>"]
        if tool.channel == Channel.ANALYSIS:
            contents = [f"{_quoted(' code')} {content}" for content in contents]
        elif isinstance(tool.body, Json | Schema):
            contents = [f'" " <|constrain|> "json" {content}' for content in contents]
        else:
            # No spelling of these was trained: with the word for code, or without.
            contents += [f"{_quoted(' code')} {content}" for content in contents]
        content = f"({' | '.join(contents)})"
        return self._rule(
            f"call-{len(self._rules)}",
            f"<|channel|> {_quoted(tool.channel + recipient)} {content}",
            f"{_quoted(recipient)} <|channel|> {_quoted(tool.channel)} {content}",
        )

    def final(self, output: Body, param: str) -> str:
        body = self._body(output, param)
        spellings = [f'<|channel|> "final" <|message|> {body} <|return|>']
        if isinstance(output, Json | Schema):
            spellings.append(f'<|channel|> "final " <|constrain|> "json" <|message|> {body} <|return|>')
        return self._rule("final", *spellings)

    def text(self, before: list[str], ends: list[str], *, behind_start: bool) -> str:
        """The whole grammar, in llguidance's JSON form: the turn first, then the parts by name."""
        turn = f"({' | '.join(before)})* ({' | '.join(ends)})" if before else f"({' | '.join(ends)})"
        start = f"start: {turn}" if behind_start else f'start: <|start|> "assistant" {turn}'
        messages = {"analysis": Channel.ANALYSIS, "preamble": Channel.COMMENTARY}
        rules = [
            f'{name}: <|channel|> {_quoted(messages[name])} <|message|> TEXT <|end|> <|start|> "assistant"'
            for name in before
        ]
        rules += [f"{name}: {rule}" for name, rule in self._rules.items()]
        lark = "\n".join([start, *rules, r"TEXT: /(?s:.*)/"]) + "\n"
        grammars = [{"name": "turn", "lark_grammar": lark}]
        return json.dumps({"grammars": [*grammars, *({"name": p.name, **p.source} for p in self.parts)]})

    def _rule(self, name: str, *spellings: str) -> str:
        self._rules[name] = " | ".join(spellings)
        return name

    def _body(self, body: Body, param: str | None) -> str:
        match body:
            case Text():
                return "TEXT"
            case Json():
                source: dict[str, Any] = {"json_schema": any_json(body.json_type)}
            case Schema():
                source = {"json_schema": enforceable(body.schema, param, root_type=body.root_type)}
            case Lark():
                source = {"lark_grammar": safe_lark(body.definition, param)}
            case Regex():
                source = {"lark_grammar": regex_as_lark(body.definition, param)}
        # Tools with equal arguments share one part.
        for part in self.parts:
            if part.source == source:
                return f"@{part.name}"
        self.parts.append(Part(f"part{len(self.parts)}", source, param))
        return f"@{self.parts[-1].name}"


def _check_recipients(tools: Sequence[Tool]) -> None:
    seen: set[str] = set()
    for tool in tools:
        if not all(_NAME.fullmatch(name) for name in tool.recipient.split(".")) or len(tool.recipient) > 256:
            raise InputError(
                f"a tool is named {tool.recipient!r}; expected letters, digits, '_' and '-', with dots in between",
                param=tool.param or "tools",
            )
        if tool.recipient in seen:
            raise InputError(f"two tools are named {tool.recipient!r}; rename one", param=tool.param or "tools")
        seen.add(tool.recipient)


def _is_of(tool: Tool, name: str) -> bool:
    return tool.recipient == name or tool.recipient.startswith(f"{name}.")


def _quoted(text: str) -> str:
    return json.dumps(text)
