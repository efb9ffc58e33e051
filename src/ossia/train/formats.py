"""Rows of training data to conversations: harmony, OpenAI's chat format, ShareGPT, and pairs of answers.

    harmony    {"messages": [...]} in the JSON form of `ossia.harmony.messages`
    openai     {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...], "reasoning_effort": "low"}
    sharegpt   {"conversations": [{"from": "human", "value": "..."}, ...], "system": "...", "tools": "[...]"}

A row becomes what our server makes of the same messages: system and developer texts at its head join into one
developer message behind our own system message; an assistant's thoughts, words and calls become messages of their own.
Of several calls in one message each is followed by its own result, for the model makes one call at a time. Arguments
that are a text are kept to the letter.

A text of the assistant's that begins with ``<think>...</think>`` is read as thoughts and an answer. A message may carry
``weight`` (a number, 0 for not trained) or ``train`` (false for not trained).

Sources  OpenAI's chat and preference fine-tuning formats; TRL's dataset formats; LLaMA-Factory's ShareGPT.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from ossia.errors import InputError
from ossia.harmony import (
    Channel,
    DeveloperContent,
    Effort,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    ToolNamespace,
)
from ossia.harmony.typescript import compact_json
from ossia.responses.schema import EFFORTS
from ossia.responses.tools import read_tools

Json = dict[str, Any]
Format = Literal["harmony", "openai", "sharegpt"]

FORMATS: tuple[Format, ...] = ("harmony", "openai", "sharegpt")

# Of a message, of a row and of a rule, which multiply: sums of them over a step are finite in float32.
MOST_WEIGHT = 1e6

_JSON_CALL = "<|constrain|>json"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Defaults(NamedTuple):
    """What the model is told where a row does not say it; a date of None leaves its line out."""

    effort: Effort = Effort.MEDIUM
    current_date: str | None = None


@dataclass(frozen=True)
class Dialogue:
    """A conversation with the loss weight of each message, which matters for those of the assistant alone."""

    messages: tuple[Message, ...]
    weights: tuple[float, ...]
    effort: Effort | None
    # Names of declared tools, and fields of messages that were passed by, for whoever looks at the data.
    tools: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


class Pair(NamedTuple):
    """Two dialogues that are equal up to their first ``num_prompt`` messages, and what their loss is multiplied by."""

    chosen: Dialogue
    rejected: Dialogue
    num_prompt: int
    weight: float = 1.0


# Where the messages of a row may stand, in the order in which they are looked for.
_PLACES = ("messages", "conversations", "conversation", "prompt", "chosen", "input")


def detect(row: object) -> Format:
    """The format that a row is written in. Raises InputError for none of them."""
    fields = _fields(row)
    messages = _first_list(fields, *_PLACES)
    if messages is None:
        if isinstance(fields.get("prompt"), str) and ("completion" in fields or "chosen" in fields):
            return "openai"
        for key in ("messages", "conversations"):
            if key in fields:
                raise InputError(f"{key} is {_shown(fields[key])}; expected a list of messages")
        raise InputError(
            f"a row with {_some(fields)}; expected 'messages' (harmony or OpenAI's chat format), 'conversations' "
            "(ShareGPT), or 'prompt' and 'completion'"
        )
    given = [one for one in messages if isinstance(one, dict) and one.keys() & {"role", "from"}]
    if not given:
        raise InputError(f"messages are {_shown(messages)}; expected objects with a 'role', or 'from'")
    for key in ("completion", "chosen", "rejected"):
        given += [one for one in _spoken(fields.get(key), Role.ASSISTANT) if isinstance(one, dict)]
    if any("from" in one and "role" not in one for one in given):
        return "sharegpt"
    if any("channel" in one or "recipient" in one or isinstance(one.get("content"), dict) for one in given):
        return "harmony"
    return "openai"


def is_pair(row: object) -> bool:
    """Whether a row holds two answers to choose from, and not one to learn."""
    fields = row if isinstance(row, dict) else {}
    return ("chosen" in fields and "rejected" in fields) or "preferred_output" in fields


def read_dialogue(row: object, form: Format, defaults: Defaults) -> Dialogue:
    """The conversation of a row. Raises InputError naming the field."""
    fields = _fields(row)
    if is_pair(fields):
        raise InputError("a row with two answers to choose from; it is for DPO, not for fine-tuning on one answer")
    if "completion" in fields and "prompt" in fields and "messages" not in fields:
        prompt, completion = _spoken(fields["prompt"], Role.USER), _spoken(fields["completion"], Role.ASSISTANT)
        untrained = [{**message, "weight": 0} if isinstance(message, dict) else message for message in prompt]
        return _dialogue(fields, "messages", [*untrained, *completion], form, defaults)
    key = next((key for key in ("messages", "conversations", "conversation") if key in fields), "messages")
    return _dialogue(fields, key, fields.get(key), form, defaults)


def read_pair(row: object, form: Format, defaults: Defaults) -> Pair:
    """The two conversations of a row with a better and a worse answer. Raises InputError naming the field."""
    fields = _fields(row)
    if "preferred_output" in fields:
        inner = fields.get("input")
        if not isinstance(inner, dict) or "non_preferred_output" not in fields:
            raise InputError("a row with preferred_output; expected 'input' and 'non_preferred_output' beside it")
        fields = {**fields, **inner}
        prompt: Any = inner.get("messages")
        chosen, rejected = fields["preferred_output"], fields["non_preferred_output"]
    elif "chosen" in fields and "rejected" in fields:
        prompt = next((fields[key] for key in ("prompt", "messages", "conversations") if key in fields), None)
        chosen, rejected = fields["chosen"], fields["rejected"]
    else:
        raise InputError(f"a row with {_some(fields)}; expected 'prompt', 'chosen' and 'rejected'")
    weight = 1.0 if fields.get("weight") is None else _weight(fields, "weight")
    if not weight:
        raise InputError("a pair of weight 0; expected a larger one, or no such row")
    # Of tokens it would change how strongly the pair's answers are told apart.
    fields = {key: value for key, value in fields.items() if key != "weight"}
    answers = [_spoken(one, Role.ASSISTANT) for one in (chosen, rejected)]
    if prompt is None:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise InputError("chosen and rejected are texts without a prompt; expected 'prompt' beside them")
        told = _common_prompt(*answers)
        rests = [one[len(told) :] for one in answers]
    else:
        told, rests = _behind_prompt(_spoken(prompt, Role.USER), answers)
    if rests[0] == rests[1]:
        raise InputError("chosen and rejected are the same; expected two different answers")
    names = ("chosen", "rejected")
    made = []
    for name, rest in zip(names, rests, strict=True):
        if not rest:
            raise InputError(f"{name} adds nothing to the prompt; expected an answer")
        untrained = [{**message, "weight": 0} if isinstance(message, dict) else message for message in told]
        made.append(_dialogue(fields, name, [*untrained, *rest], form, defaults))
    only_prompt = _dialogue(fields, "prompt", told, form, defaults)
    num_prompt = len(only_prompt.messages)
    if any(one.messages[:num_prompt] != only_prompt.messages for one in made):
        raise InputError("the answers change what the prompt says; expected the results of its calls in it")
    return Pair(made[0], made[1], num_prompt, weight)


def _dialogue(fields: Json, key: str, messages: object, form: Format, defaults: Defaults) -> Dialogue:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{key} is {_shown(messages)}; expected a list of messages")
    weight = 1.0 if fields.get("weight") is None else _weight(fields, "weight")
    found = _effort(fields)
    told = defaults._replace(effort=found or defaults.effort)
    if (date := fields.get("current_date")) is not None:
        told = told._replace(current_date=checked_date(date, "current_date") if date else None)
    if form == "harmony":
        made = _harmony(messages, key, found, told)
    else:
        turns = (
            _sharegpt(messages, key)
            if form == "sharegpt"
            else [_turn(m, f"{key}[{i}]") for i, m in enumerate(messages)]
        )
        made = _Builder().build(turns, fields, told)
    return replace(
        made,
        weights=made.weights if weight == 1.0 else tuple(weight * w for w in made.weights),
        unread=(*made.unread, *_misspelt(fields)),
    )


# A line of each system message of harmony, and how it tells the effort.
_IN_SYSTEM = "# Valid channels"
_EFFORT_IN_SYSTEM = re.compile(r"^Reasoning: (low|medium|high)\s*$", re.MULTILINE)
# What else may stand in a row is the author's own; what is spelt nearly so was to be read.
_READ_OF_ROWS = (
    *("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "system", "weight"),
    *("effort", "reasoning_effort", "current_date", "tools", "functions", "response_format", "preferred_output"),
    *("non_preferred_output", "input"),
)


def _misspelt(fields: Json) -> Iterator[str]:
    for name in sorted(fields.keys() - set(_READ_OF_ROWS)):
        if near := get_close_matches(name, _READ_OF_ROWS, n=1, cutoff=0.85):
            yield f"{name} of a row ({near[0]}?)"


# -- harmony -------------------------------------------------------------------------------------------------------


def _harmony(raw: list[Any], key: str, effort: Effort | None, told: Defaults) -> Dialogue:
    messages: list[Message] = []
    weights: list[float] = []
    for i, one in enumerate(raw):
        where = f"{key}[{i}]"
        if not isinstance(one, dict):
            raise InputError(f"{where} is {_shown(one)}; expected an object")
        plain = {k: v for k, v in one.items() if k not in ("weight", "train") and v is not None}
        message = Message.from_dict(plain, where)
        weight = _weight(one, where)
        weights.append(weight if message.role is Role.ASSISTANT else 0.0)
        if message.role is Role.SYSTEM and _is_instructions(message):
            # As in the other formats: what a developer says, behind the system message that a server writes.
            message = Message(Role.DEVELOPER, DeveloperContent(instructions=message.text))
        if message.role is Role.SYSTEM:
            message = _with_effort(message, one.get("content"), effort, where)
        if message.role is Role.ASSISTANT:
            _check_spoken(message, where)
        messages.append(message)
    if not any(message.role is Role.SYSTEM for message in messages):
        messages.insert(0, _system(told))
        weights.insert(0, 0.0)
    says = [_effort_of(part) for m in messages if m.role is Role.SYSTEM for part in m.content]
    return Dialogue(tuple(messages), tuple(weights), says[0] if says else None, _declared(messages))


def _is_instructions(message: Message) -> bool:
    """Whether a system message is a text, and not the whole one that harmony begins with."""
    return not any(isinstance(part, SystemContent) for part in message.content) and _IN_SYSTEM not in message.text


def _effort_of(part: object) -> Effort | None:
    if isinstance(part, SystemContent):
        return part.effort
    found = _EFFORT_IN_SYSTEM.search(str(part))
    return Effort(found[1]) if found else None


def _with_effort(message: Message, raw: object, effort: Effort | None, where: str) -> Message:
    """The system message with the row's own effort, unless it says another itself."""
    part = message.content[0] if message.content else ""
    if effort is None:
        return message
    if isinstance(part, SystemContent):
        says = raw.get("effort") if isinstance(raw, dict) else None
    else:
        says = _effort_of(message.text)
    if says is not None and says != effort:
        raise InputError(f"{where} says effort {str(says)!r} and the row {str(effort)!r}; expected one of them")
    if not isinstance(part, SystemContent):
        return message
    told = SystemContent(
        part.model_identity,
        part.knowledge_cutoff,
        part.current_date,
        effort,
        part.tools,
        part.channels,
        part.channel_required,
    )
    return Message(Role.SYSTEM, (told, *message.content[1:]))


def _check_spoken(message: Message, where: str) -> None:
    if message.channel not in tuple(Channel):
        raise InputError(
            f"{where}.channel is {message.channel!r}; expected analysis, commentary or final of the assistant"
        )
    if message.channel == Channel.FINAL and message.recipient is not None:
        raise InputError(f"{where} calls {message.recipient!r} on the final channel; expected commentary or analysis")


def _declared(messages: Sequence[Message]) -> tuple[str, ...]:
    names = []
    for message in messages:
        for part in message.content:
            if isinstance(part, SystemContent | DeveloperContent):
                names += [f"{n.name}.{t.name}" if t else n.name for n in part.tools for t in n.tools or (None,)]
    return tuple(names)


# -- chat and ShareGPT ---------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    name: str
    given: str
    call_id: str | None
    is_custom: bool = False
    # Arguments that stood there as an object and not as a text.
    fields: Json | None = None


@dataclass(frozen=True)
class _Turn:
    """One message of a row, whatever its format."""

    where: str
    role: Literal["told", "user", "assistant", "tool"]
    text: str
    # Whether the row has a text here at all.
    has_text: bool = True
    thoughts: str = ""
    calls: tuple[_Call, ...] = ()
    call_id: str | None = None
    name: str | None = None
    weight: float = 1.0
    unread: tuple[str, ...] = ()


_ROLES: Mapping[str, Literal["told", "user", "assistant", "tool"]] = {
    "system": "told",
    "developer": "told",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_THOUGHTS = ("reasoning", "reasoning_content", "thinking")
_READ = frozenset(
    {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "weight", "train", *_THOUGHTS}
)
# They say nothing to the model, and are in every answer of the API.
_SILENT = frozenset({"id", "refusal", "annotations", "audio", "phase", "status", "type"})


def _turn(message: object, where: str) -> _Turn:
    """One message of OpenAI's chat format."""
    if not isinstance(message, dict):
        raise InputError(f"{where} is {_shown(message)}; expected an object")
    role = _ROLES.get(message["role"]) if isinstance(message.get("role"), str) else None
    if role is None:
        raise InputError(f"{where}.role is {_shown(message.get('role'))}; expected one of: {', '.join(_ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant" and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if content is None and role != "assistant":
        raise InputError(f"{where} has no content; expected a text or a list of parts")
    call_id, name = message.get("tool_call_id"), message.get("name")
    calls = _calls(message, where) if role == "assistant" else ()
    known = _READ | _SILENT
    text, thoughts = _text(content, f"{where}.content"), ""
    if role == "assistant":
        thoughts, text = _parted(_thoughts(message, where), text)
    return _Turn(
        where,
        role,
        text,
        content is not None,
        thoughts,
        calls,
        call_id if isinstance(call_id, str) else None,
        name if isinstance(name, str) else None,
        _weight(message, where),
        tuple(key for key, value in message.items() if key not in known and value not in (None, "", [], {})),
    )


def _thoughts(message: Json, where: str) -> str:
    for key in _THOUGHTS:
        if value := message.get(key):
            if not isinstance(value, str):
                raise InputError(f"{where}.{key} is {_shown(value)}; expected a text")
            return value
    return ""


_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def _parted(thoughts: str, text: str) -> tuple[str, str]:
    """Thoughts and the text behind them, where a text begins with thoughts between the tags of other models."""
    found = None if thoughts else _THINK.fullmatch(text)
    return (found[1].strip(), found[2]) if found else (thoughts, text)


def _calls(message: Json, where: str) -> tuple[_Call, ...]:
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        legacy = message.get("function_call")
        return (_call(legacy, None, f"{where}.function_call"),) if legacy else ()
    if not isinstance(calls, list):
        raise InputError(f"{where}.tool_calls is {_shown(calls)}; expected a list of calls")
    made = []
    for i, call in enumerate(calls):
        here = f"{where}.tool_calls[{i}]"
        kind = (call.get("type") or "function") if isinstance(call, dict) else None
        if kind not in ("function", "custom"):
            raise InputError(f"{here} is {_shown(call)}; expected a call of type function or custom")
        call_id = call.get("id")
        # Some write the function's fields beside the type.
        called = call.get(kind, call)
        made.append(_call(called, call_id if isinstance(call_id, str) else None, here, is_custom=kind == "custom"))
    return tuple(made)


def _call(called: object, call_id: str | None, where: str, *, is_custom: bool = False) -> _Call:
    if not isinstance(called, dict):
        raise InputError(f"{where} is {_shown(called)}; expected an object with a name and arguments")
    name, given = called.get("name"), called.get("input" if is_custom else "arguments")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{where} calls {_shown(name)}; expected a name of 1 to 128 letters, digits, '_' or '-'")
    if given is None or given == "":
        given = "" if is_custom else "{}"
    if not isinstance(given, str):
        if is_custom or not isinstance(given, dict):
            raise InputError(f"{where} gives {name} {_shown(given)}; expected a text")
        return _Call(name, compact_json(given), call_id, fields=given)
    return _Call(name, given, call_id, is_custom)


_FROM: Mapping[str, Literal["told", "user", "assistant", "tool", "call"]] = {
    "system": "told",
    "developer": "told",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}


def _sharegpt(raw: list[Any], key: str) -> list[_Turn]:
    """Turns of ShareGPT; a call that follows a word of the assistant's own belongs to the same message."""
    turns: list[_Turn] = []
    known = frozenset({"from", "value", "weight", "train", "name", *_THOUGHTS, *_SILENT})
    for i, one in enumerate(raw):
        where = f"{key}[{i}]"
        if not isinstance(one, dict):
            raise InputError(f"{where} is {_shown(one)}; expected an object with 'from' and 'value'")
        speaker = one.get("from")
        role = _FROM.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise InputError(f"{where}.from is {_shown(speaker)}; expected one of: {', '.join(_FROM)}")
        value, name = one.get("value"), one.get("name")
        weight = _weight(one, where)
        unread = tuple(k for k, v in one.items() if k not in known and v not in (None, "", [], {}))
        thoughts = _thoughts(one, where) if role in ("assistant", "call") else ""
        if role != "call":
            has_text = value is not None
            if not isinstance(value, str) and not (role == "assistant" and thoughts and not has_text):
                raise InputError(f"{where}.value is {_shown(value)}; expected a text")
            text = value if isinstance(value, str) else ""
            if role == "assistant":
                thoughts, text = _parted(thoughts, text)
            named = name if isinstance(name, str) else None
            turns.append(_Turn(where, role, text, has_text, thoughts, name=named, weight=weight, unread=unread))
            continue
        calls = _sharegpt_calls(value, f"{where}.value")
        last = turns[-1] if turns else None
        if last and last.role == "assistant" and not last.calls and not thoughts and last.weight == weight:
            turns[-1] = replace(last, calls=calls, unread=last.unread + unread)
        else:
            turns.append(_Turn(where, "assistant", "", False, thoughts, calls, None, None, weight, unread))
    return turns


def _sharegpt_calls(value: object, where: str) -> tuple[_Call, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(f"{where} is {_shown(value)}; expected JSON with a name and arguments") from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise InputError(f"{where} is an empty list; expected a call")
    return tuple(_call(call, None, where) for call in calls)


class _Open(NamedTuple):
    """A call that waits for its result, and where it stands."""

    call: _Call
    message: Message


@dataclass
class _Builder:
    """Turns to messages, as the server tells them to the model."""

    messages: list[Message] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    waiting: list[_Open] = field(default_factory=list)
    # From here on there are calls and their results alone.
    block: int = 0
    # The parameters of each function.
    parameters: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def build(self, turns: Sequence[_Turn], fields: Json, told: Defaults) -> Dialogue:
        namespaces = _namespaces(fields)
        self.parameters = {
            tool.name: frozenset(known if isinstance(known := (tool.parameters or {}).get("properties"), dict) else ())
            for space in namespaces
            for tool in space.tools
        }
        texts = []
        if system := fields.get("system"):
            texts.append(_text(system, "system"))
        num_leading = next((i for i, turn in enumerate(turns) if turn.role != "told"), len(turns))
        texts += [turn.text for turn in turns[:num_leading]]
        self._add(_system(told), 0.0)
        joined = "\n\n".join(text for text in texts if text)
        developer = DeveloperContent(joined or None, namespaces, _response_formats(fields))
        if developer != DeveloperContent():
            self._add(Message(Role.DEVELOPER, developer), 0.0)
        rest = turns[num_leading:]
        for i, turn in enumerate(rest):
            if turn.role == "told":
                self._add(Message(Role.DEVELOPER, DeveloperContent(instructions=turn.text)), 0.0)
            elif turn.role == "user":
                self._add(Message(Role.USER, turn.text), 0.0)
            elif turn.role == "tool":
                self._answer(turn)
            else:
                behind = list(takewhile(lambda one: one.role == "assistant", rest[i + 1 :]))
                self._assistant(turn, bool(behind), calls_later=any(one.calls for one in behind))
        unread = tuple(key for turn in turns for key in turn.unread)
        names = tuple(f"{n.name}.{tool.name}" for n in namespaces for tool in n.tools)
        return Dialogue(tuple(self.messages), tuple(self.weights), told.effort, names, unread)

    def _assistant(self, turn: _Turn, goes_on: bool, *, calls_later: bool) -> None:
        if turn.thoughts:
            self._say(turn.thoughts, Channel.ANALYSIS, turn.weight)
        if turn.text or (turn.has_text and not turn.calls and not turn.thoughts):
            # What is said before a call of the same turn does not end the turn.
            is_preamble = turn.calls or calls_later
            self._say(turn.text, Channel.COMMENTARY if is_preamble else Channel.FINAL, turn.weight)
        elif not turn.calls and not (turn.thoughts and goes_on):
            met = "only thoughts" if turn.thoughts else "neither content nor tool_calls"
            raise InputError(f"{turn.where} has {met}; expected an answer or a call of the assistant")
        self.block = len(self.messages)
        for call in turn.calls:
            message = Message(
                Role.ASSISTANT,
                self._given(call),
                channel=str(Channel.COMMENTARY),
                recipient=f"functions.{call.name}",
                content_type=None if call.is_custom else _JSON_CALL,
            )
            self.waiting.append(_Open(call, message))
            self.messages.append(message)
            self.weights.append(turn.weight)

    def _given(self, call: _Call) -> str:
        """The arguments of a call without what a table of all rows has put in: nulls of other functions."""
        declared = self.parameters.get(call.name)
        if call.fields is None or declared is None:
            return call.given
        return compact_json({key: value for key, value in call.fields.items() if value is not None or key in declared})

    def _answer(self, turn: _Turn) -> None:
        """A tool's result goes right behind its call where nothing else has been said since."""
        found = self._called(turn)
        self.waiting.remove(found)
        result = Message(
            Role.TOOL,
            turn.text,
            name=found.message.recipient,
            recipient="assistant",
            channel=found.message.channel,
        )
        at = next(
            (i + 1 for i in range(self.block, len(self.messages)) if self.messages[i] is found.message),
            len(self.messages),
        )
        self.messages.insert(at, result)
        self.weights.insert(at, 0.0)

    def _called(self, turn: _Turn) -> _Open:
        if turn.call_id is not None and any(one.call.call_id is not None for one in self.waiting):
            found = [one for one in self.waiting if one.call.call_id == turn.call_id]
        elif turn.name is not None:
            found = [one for one in self.waiting if one.call.name == turn.name]
        else:
            found = self.waiting
        if not found:
            which = turn.call_id or turn.name
            what = f"the call {which!r}" if which else "a call"
            raise InputError(
                f"{turn.where} is the result of {what}, which was not made before or has its result already"
            )
        return found[0]

    def _say(self, text: str, channel: Channel, weight: float) -> None:
        self._add(Message(Role.ASSISTANT, text, channel=str(channel)), weight)

    def _add(self, message: Message, weight: float) -> None:
        self.messages.append(message)
        self.weights.append(weight)
        self.block = len(self.messages)


# -- what rows share -----------------------------------------------------------------------------------------------


def _fields(row: object) -> Json:
    if isinstance(row, list):
        if row and isinstance(row[0], dict) and not row[0].keys() & {"role", "from"}:
            raise InputError("a list of rows on one line; expected one row a line, such as made by `jq -c '.[]'`")
        return {"messages": row}
    if not isinstance(row, dict):
        raise InputError(f"a row that is {_shown(row)}; expected an object")
    return row


def _first_list(fields: Json, *keys: str) -> list[Any] | None:
    for key in keys:
        value = fields.get(key)
        if key == "input" and isinstance(value, dict):
            value = value.get("messages")
        if isinstance(value, list):
            return value
    return None


def _spoken(value: object, role: Role) -> list[Any]:
    """Messages of a prompt or an answer, which may be a text, one message or a list of them."""
    if isinstance(value, str):
        return [{"role": str(role), "content": value}]
    return [value] if isinstance(value, dict) else value if isinstance(value, list) else []


def _behind_prompt(prompt: list[Any], answers: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """All messages that come before both answers, and the answers without them.

    The prompt may stand in the answers too: at their beginning, or behind messages that it lacks, or its last messages
    alone, and with other blanks around its texts. Raises InputError where they begin with another one.
    """
    holds = [one[: len(prompt)] == prompt for one in answers]
    rests = [one[len(prompt) :] if is_held else one for one, is_held in zip(answers, holds, strict=True)]
    if all(holds) or not any(rest and _kind(rest[0]) in ("told", "user") for rest in rests):
        return prompt, rests
    common = _common_prompt(*answers)
    ours, theirs = [_gist(message) for message in prompt], [_gist(message) for message in common]
    behind = [one[len(common) :] for one in answers]
    if any(theirs[k : k + len(ours)] == ours for k in range(len(theirs))):
        return common, behind
    for k in range(1, len(ours)):
        if theirs[: len(ours) - k] == ours[k:]:
            return prompt[:k] + common, behind
    if any(_kind(message) == "user" for message in prompt):
        raise InputError(
            "chosen and rejected begin with other messages than the prompt; expected the same prompt in all"
        )
    return prompt, rests


def _kind(message: object) -> str | None:
    """Who speaks, in the words of `_Turn.role`."""
    if not isinstance(message, dict):
        return None
    kinds, speaker = (_ROLES, message["role"]) if "role" in message else (_FROM, message.get("from"))
    return kinds.get(speaker) if isinstance(speaker, str) else None


def _gist(message: object) -> object:
    """What is equal of two messages that say the same."""
    if not isinstance(message, dict):
        return message
    said = {key: value.strip() if isinstance(value, str) else value for key, value in message.items()}
    kind = _kind(message)
    if kind in ("told", "user"):
        return kind, said.get("content", said.get("value"))
    return {key: value for key, value in said.items() if value is not None}


def _common_prompt(chosen: list[Any], rejected: list[Any]) -> list[Any]:
    """The messages that both begin with, and that an answer follows."""
    num = 0
    while num < min(len(chosen), len(rejected)) and chosen[num] == rejected[num]:
        num += 1
    if not num:
        raise InputError("chosen and rejected begin with different messages; expected the same prompt in both")
    return chosen[:num]


def _system(told: Defaults) -> Message:
    return Message(Role.SYSTEM, SystemContent(current_date=told.current_date, effort=told.effort))


def _effort(fields: Json) -> Effort | None:
    for key in ("effort", "reasoning_effort"):
        value = fields.get(key)
        if value is not None:
            if not isinstance(value, str) or value not in EFFORTS:
                raise InputError(f"{key} is {_shown(value)}; expected one of: {', '.join(EFFORTS)}")
            return EFFORTS[value]
    return None


def _weight(message: Json, where: str) -> float:
    weight, trains = message.get("weight"), message.get("train")
    if trains is not None and not isinstance(trains, bool):
        raise InputError(f"{where}.train is {_shown(trains)}; expected true or false")
    if weight is None:
        return 1.0 if trains is not False else 0.0
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= MOST_WEIGHT:
        raise InputError(f"{where}.weight is {_shown(weight)}; expected a number from 0 to {MOST_WEIGHT:,.0f}")
    return float(weight) if trains is not False else 0.0


def _namespaces(fields: Json) -> tuple[ToolNamespace, ...]:
    """The tools of a row, which some write as a text of JSON, or without the type."""
    key = "tools" if fields.get("tools") else "functions"
    given = fields.get(key)
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else []
        except (ValueError, RecursionError):
            raise InputError(f"{key} is {_shown(given)}; expected a list of tools") from None
    if not given:
        return ()
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise InputError(f"{key} is {_shown(given)}; expected a list of tools")
    tools = read_tools([_flat(tool) for tool in given])
    if tools.ignored:
        raise InputError(
            f"{key} declares {', '.join(tools.ignored)}, which a row cannot; write rows with trained tools in the "
            "harmony format"
        )
    return tuple(tools.namespaces)


def _flat(tool: Json) -> Json:
    kind = tool.get("type") or ("function" if tool.get("name") or "function" in tool else None)
    inner = tool.get(kind) if isinstance(kind, str) else None
    flat = {**inner, "type": kind} if isinstance(inner, dict) else {**tool, "type": kind}
    shape = flat.get("format")
    if isinstance(shape, dict) and isinstance(shape.get("grammar"), dict):
        flat["format"] = {"type": "grammar", **shape["grammar"]}
    return flat


def _response_formats(fields: Json) -> tuple[ResponseFormat, ...]:
    shape = fields.get("response_format")
    if shape is None:
        return ()
    kind = shape.get("type") if isinstance(shape, dict) else None
    if kind == "text":
        return ()
    if kind == "json_object":
        return (ResponseFormat("answer", {"type": "object"}),)
    inner = shape.get("json_schema") if isinstance(shape, dict) and kind == "json_schema" else None
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise InputError(f"response_format is {_shown(shape)}; expected text, json_object, or a json_schema")
    return (ResponseFormat(inner.get("name") or "answer", inner["schema"], inner.get("description")),)


_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def _text(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} is {_shown(content)}; expected a text or a list of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else part
        if not isinstance(text, str) or not (kind in _TEXT_PARTS or isinstance(part, str)):
            met = f"a part of type {kind!r}" if kind else _shown(part)
            raise InputError(f"{where}[{i}] is {met}; this model reads text only")
        texts.append(text)
    return "".join(texts)


def checked_date(text: object, where: str) -> str:
    """A date as the model is told it. Raises InputError unless it is YYYY-MM-DD."""
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InputError(f"{where} is {_shown(text)}; expected YYYY-MM-DD") from None


def _shown(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _some(fields: Json) -> str:
    names = sorted(map(str, fields))
    return f"the fields {', '.join(names[:8])}" if names else "no fields"
