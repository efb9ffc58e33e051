"""The grammars that clients bring for the input of custom tools, made safe to stand inside the grammar of a turn.

A client's grammar is read token by token and written anew. What is written holds none of ``<``, ``@`` and ``%`` except
in ``%import common.NAME`` and ``%ignore``, so it can name no special token (``<|end|>``, ``<[200007]>``) and no other
grammar, however it was spelled: no text of a client can make the model emit a control token.

Syntax   Lark as llguidance reads it: rules, terminals, strings, regular expressions, ``%ignore``, ``%import common``.
         Not: lookarounds, templates, priorities, ``%declare``, ``%override`` and llguidance's own extensions.
         A regular expression is that of Rust's regex crate and matches the whole input.
Sources  OpenAI's guide to custom tools; Lark's grammar reference; llguidance docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from ossia.errors import InputError

MAX_GRAMMAR_CHARS = 50_000

# llguidance's own tokens; as there, the longest one that fits counts.
_TOKENS = {
    "blank": re.compile(r"[ \t]+|(?:#|//)[^\n]*"),
    "newline": re.compile(r"(?:\r?\n)+[ \t]*"),
    "string": re.compile(r'"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4})|[^"\\\x00-\x1f\x7f])*"i?'),
    "regex": re.compile(r"/(?:\\.|[^/\\])+/[imslux]*", re.DOTALL),
    "import": re.compile(r"%import[ \t]+common\.[A-Z][A-Z0-9_]*(?:[ \t]*->[ \t]*_?[A-Z][A-Z0-9_]*)?"),
    "ignore": re.compile(r"%ignore"),
    "rule": re.compile(r"!?[_?]?[a-z][_a-z0-9\-]*"),
    "terminal": re.compile(r"_?[A-Z][_A-Z0-9\-]*"),
    "number": re.compile(r"[+-]?[0-9]+"),
    "symbol": re.compile(r"->|\.\.|[:,(){}\[\]|&~+*?]"),
}
_REFUSED = (
    (re.compile(r"<"), "special tokens (<...>)"),
    (re.compile(r"@"), "references to other grammars (@...)"),
    (re.compile(r"%"), "directives other than %ignore and %import common.NAME"),
    (re.compile(r"="), "options of rules"),
    (re.compile(r"::"), "parameters of rules"),
    (re.compile(r"\.[ \t]*[+-]?[0-9]"), "priorities"),
)
_LOOKAROUND = re.compile(r"\(\?<?[=!]")
_NAMED_GROUP = re.compile(r"\(\?P?<")
_VERBOSE = re.compile(r"\(\?[a-zA-Z]*x")
# A bracket that closes is a character where it comes first.
_CLASS = re.compile(r"\[\^?\]?")


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def safe_lark(definition: str, param: str | None = None) -> str:
    """The client's Lark grammar, rewritten. Raises InputError for what it must not or cannot hold."""
    tokens = _read(_checked(definition, param), param)
    out = []
    for i, token in enumerate(tokens):
        if token.kind == "string":
            out.append(_string(token.text))
        elif token.kind == "regex":
            out.append(_regex_token(token, param))
        else:
            out.append(token.text)
            _check_context(tokens, i, param)
    if not any(token.kind == "rule" and token.text.lstrip("!?") == "start" for token in tokens):
        raise _error(param, "the grammar has no rule 'start'", "one: the whole input")
    return " ".join(out) + "\n"


def regex_as_lark(definition: str, param: str | None = None) -> str:
    """A grammar whose input is what the regular expression matches as a whole."""
    pattern = _checked(definition, param)
    # At the edges of a whole match they say nothing.
    pattern = pattern.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern):
        pattern = pattern[:-1]
    if not pattern:
        return 'start: ""\n'
    return f"start: /{_pattern(pattern, param, None)}/\n"


def _checked(definition: object, param: str | None) -> str:
    if not isinstance(definition, str) or not definition.strip():
        raise _error(param, "the grammar is empty", "a definition")
    if len(definition) > MAX_GRAMMAR_CHARS:
        raise _error(param, f"the grammar has {len(definition):,} characters", f"at most {MAX_GRAMMAR_CHARS:,}")
    if re.search("[\ud800-\udfff]", definition):
        raise _error(param, "the grammar has half a surrogate", "Unicode text")
    return definition


def _read(text: str, param: str | None) -> list[_Token]:
    tokens: list[_Token] = []
    i, line = 0, 1
    while i < len(text):
        for rule, name in _REFUSED:
            if rule.match(text, i) and not _TOKENS["import"].match(text, i) and not _TOKENS["ignore"].match(text, i):
                raise _error(param, f"line {line} has {name}", "a grammar without them")
        found = [(match.end(), kind, match[0]) for kind, rule in _TOKENS.items() if (match := rule.match(text, i))]
        if not found:
            raise _error(param, f"line {line} has {text[i]!r}, which begins nothing", "Lark's grammar syntax")
        end, kind, matched = max(found, key=lambda one: one[0])
        if kind == "newline":
            # Of lines with a comment alone nothing is left: an alternative may follow on the next.
            if not tokens or tokens[-1].kind != "newline":
                tokens.append(_Token(kind, "\n", line))
        elif kind != "blank":
            tokens.append(_Token(kind, matched, line))
        line += matched.count("\n")
        i = end
    return tokens


def _check_context(tokens: list[_Token], i: int, param: str | None) -> None:
    text, line = tokens[i].text, tokens[i].line
    behind = tokens[i + 1] if i + 1 < len(tokens) else None
    if text == "~" and (behind is None or behind.kind != "number"):
        # It may match what is no UTF-8.
        raise _error(param, f"line {line} has a negation", "'~' only before a number, as a repetition")
    if tokens[i].kind in ("rule", "terminal") and behind is not None and behind.text == "[":
        rest = [token.text for token in tokens[i + 1 :]]
        closed = rest.index("]") if "]" in rest else -1
        if rest[closed + 1 : closed + 2] == [":"]:
            raise _error(param, f"line {line} has options of rules", "a grammar without them")


def _string(literal: str) -> str:
    body, flag = (literal[:-1], "i") if literal.endswith("i") else (literal, "")
    text = json.dumps(json.loads(body), ensure_ascii=True)
    for char in "<>@%":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text + flag


def _regex_token(token: _Token, param: str | None) -> str:
    body, _, flags = token.text[1:].rpartition("/")
    if set(flags) - set("is"):
        raise _error(param, f"line {token.line} has the flags {flags!r} behind a regular expression", "i or s")
    return f"/{_pattern(body, param, token.line)}/{flags}"


def _pattern(pattern: str, param: str | None, line: int | None) -> str:
    """A regular expression as it may stand between slashes."""
    where = "" if line is None else f"line {line}: "
    out = []
    # Brackets that are open: of classes, which hold others.
    i, depth = 0, 0
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            i += 1
            if i == len(pattern):
                raise _error(param, f"{where}the regular expression ends in a backslash", "one that is closed")
            if pattern[i] in "<>":
                raise _error(param, f"{where}the regular expression has a word boundary", "one without it")
            out.append(_escaped(pattern[i], "\\" + pattern[i]))
        elif opened := _CLASS.match(pattern, i):
            out.append(opened[0])
            i, depth = opened.end() - 1, depth + 1
        elif depth:
            out.append(_escaped(char, char))
            depth -= char == "]"
        elif _LOOKAROUND.match(pattern, i):
            raise _error(param, f"{where}the regular expression has a lookaround", "one without it")
        elif _VERBOSE.match(pattern, i):
            # Its line breaks and comments could not be written in one line.
            raise _error(param, f"{where}the regular expression has the flag x", "one without it")
        elif _NAMED_GROUP.match(pattern, i):
            end = pattern.find(">", i)
            if end < 0:
                raise _error(param, f"{where}the regular expression has an unclosed group name", "one that is closed")
            out.append("(?:")  # Names of groups say nothing about what is matched.
            i = end
        else:
            out.append(_escaped(char, char))
        i += 1
    return "".join(out)


def _escaped(char: str, otherwise: str) -> str:
    if char in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[char]
    if char == "/":
        return "\\/"
    return f"\\x{ord(char):02x}" if char in "<>@%" else otherwise


def _error(param: str | None, met: str, expected: str) -> InputError:
    return InputError(f"{param}: {met}; expected {expected}" if param else f"{met}; expected {expected}", param=param)
