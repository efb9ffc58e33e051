"""Items to harmony messages, and messages to the tokens of a prompt.

An `Entry` is an item with the messages that it stands for; a message that the model itself sampled keeps its tokens, so
that a prompt repeats them exactly and the engine finds them in its prefix cache. What was sampled in a turn that waits
for a tool's answer is known again in three ways: from the stored response, from `TurnMemory` by call id (for clients
that send the history themselves, and drop the chain of thought), or from encrypted_content.

The chain of thought stays while a turn is under way, and is left out before the last final message: the format's rule.

Sources   openai/harmony docs/format.md; the Responses API.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ossia.errors import InputError, NotFoundError
from ossia.harmony import (
    Channel,
    DeveloperContent,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    Tokenizer,
    render_message,
    tool_message,
)
from ossia.harmony.render import developer_text
from ossia.responses.client_tools import ClientTool, arguments_of, is_call, of_call, of_output, output_text
from ossia.responses.schema import Json, PromptRequest, new_id
from ossia.responses.seal import Seal
from ossia.responses.tools import Tools, brought

_JSON_CALL = "<|constrain|>json"
# Names of servers, and what a recipient cannot hold.
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNSAYABLE = re.compile(r"[^A-Za-z0-9_-]")


class Spoken(NamedTuple):
    """A message, and the tokens as which it was sampled, opening included; () if it is to be rendered."""

    message: Message
    token_ids: tuple[int, ...] = ()

    def to_dict(self) -> Json:
        return {"message": self.message.to_dict(), "token_ids": list(self.token_ids)}

    @classmethod
    def from_dict(cls, data: Json) -> Spoken:
        return cls(Message.from_dict(data["message"]), tuple(data["token_ids"]))


class Entry(NamedTuple):
    """One item of a history, and the messages that it stands for."""

    item: Json
    spoken: tuple[Spoken, ...] = ()


@dataclass
class History:
    """What was said before, and what was left out of it."""

    entries: list[Entry] = field(default_factory=list)
    # The date that the pending turn was begun with: it stands in the prompt, and a new one would change every token.
    current_date: str | None = None
    # `input_transformations` of the response.
    transformations: list[Json] = field(default_factory=list)


class TurnMemory:
    """What was sampled up to each recent call, by call id: the latest of it, in about ``max_bytes``. For any thread."""

    def __init__(self, max_bytes: int = 64 << 20) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._num_bytes = 0
        # Token ids packed: as a tuple of numbers they would take ten times the room.
        self._turns: OrderedDict[str, tuple[tuple[Message, array[int]], ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._turns)

    def keep(self, call_id: str, turn: tuple[Spoken, ...]) -> None:
        kept = tuple((message, array("I", token_ids)) for message, token_ids in turn)
        with self._lock:
            self._forget(call_id)
            self._turns[call_id] = kept
            self._num_bytes += _num_bytes(kept)
            while self._num_bytes > self._max_bytes:
                self._forget(next(iter(self._turns)))

    def recall(self, call_id: str) -> tuple[Spoken, ...]:
        with self._lock:
            kept = self._turns.get(call_id, ())
            if kept:
                self._turns.move_to_end(call_id)
        return tuple(Spoken(message, tuple(token_ids)) for message, token_ids in kept)

    def _forget(self, call_id: str) -> None:
        self._num_bytes -= _num_bytes(self._turns.pop(call_id, ()))


# What Python takes for a message, or a turn, beside its text and its tokens, measured.
_MESSAGE_BYTES = 700


def _num_bytes(kept: tuple[tuple[Message, array[int]], ...]) -> int:
    # A character is at most four bytes; one beyond ASCII makes all of a text wide.
    inside = sum(_MESSAGE_BYTES + sys.getsizeof(message.text) + 4 * len(token_ids) for message, token_ids in kept)
    return inside + _MESSAGE_BYTES if kept else 0


class Summary(NamedTuple):
    """What stands for a part of a conversation: the content of a compaction item."""

    text: str
    # What the user had said last, which is not shortened.
    user: str = ""
    # Whether it stands for everything before it; if not, only for what was left out there.
    covers: bool = False

    def sealed(self, seal: Seal) -> str:
        return seal.seal(json.dumps(self._asdict()).encode())

    @classmethod
    def opened(cls, sealed: object, seal: Seal) -> Summary | None:
        data = seal.open(sealed) if isinstance(sealed, str) else None
        given = json.loads(data) if data is not None else None
        # What else was sealed here is no summary.
        return cls(**given) if isinstance(given, dict) and given.keys() == set(cls._fields) else None

    def spoken(self) -> tuple[Spoken, ...]:
        text = f"Summary of the conversation so far, which was shortened:\n\n{self.text}"
        said = (Spoken(Message(Role.DEVELOPER, DeveloperContent(instructions=text))),)
        return (*said, Spoken(Message(Role.USER, self.user))) if self.user else said


def left_behind(request: PromptRequest, entries: Sequence[Entry]) -> list[Json]:
    """`input_transformations` of thoughts among ``entries`` that the model does not see again: an answer followed."""
    if request.reasoning is not None and request.reasoning.context == "all_turns":
        return []
    answered = [i for i, entry in enumerate(entries) if any(_is_talk(s.message, Channel.FINAL) for s in entry.spoken)]
    return [
        {"id": entry.item["id"], "type": "reasoning", "action": "removed", "reason": "turn_boundary"}
        for entry in entries[: answered[-1] if answered else 0]
        if entry.item.get("type") == "reasoning" and entry.spoken
    ]


def uncovered(entries: Sequence[Entry], seal: Seal) -> Sequence[Entry]:
    """The entries from the last summary on that stands for everything before it."""
    for i in range(len(entries) - 1, -1, -1):
        if entries[i].item.get("type") == "compaction":
            summary = Summary.opened(entries[i].item.get("encrypted_content"), seal)
            if summary is not None and summary.covers:
                return entries[i:]
    return entries


# What may stand in a history and says nothing to the model; and each call of another server's tools, with its answer.
_PASSED_BY = re.compile(
    "[a-z0-9_]+_call(_output)?|mcp_list_tools|configuration_update|compaction_trigger|program|program_output"
)
_CONTENT = re.compile("(input|output)_(text|image|file|audio)|text|image_url|refusal|summary_text|reasoning_text")


def _check_passed_by(kind: str, item: Json, where: str) -> None:
    """Raise InputError for an item that meant something else than to be passed by."""
    if _CONTENT.fullmatch(kind):
        raise InputError(
            f"{where} is content of a message; expected "
            '{"type": "message", "role": "user", "content": [...]} around it',
            param=f"{where}.type",
        )
    if "role" in item or not _PASSED_BY.fullmatch(kind):
        raise InputError(
            f"{where}.type is {kind[:80]!r}; expected message, function_call_output or another item of the API",
            param=f"{where}.type",
        )


# Items to entries ------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """Reads the items of a request after a history.

    ``references`` are the entries that `item_reference` items name. Items of kinds that do not concern the model are
    kept, and say nothing.
    """

    history: History
    seal: Seal
    memory: TurnMemory
    references: Mapping[str, Entry] = field(default_factory=dict)

    def read(self, items: Sequence[Any]) -> list[Entry]:
        """Entries of the new items alone; they are not added to the history. Raises InputError naming the item."""
        calls = {
            entry.item["call_id"]: (entry.item, entry.spoken)
            for entry in self.history.entries
            if "call_id" in entry.item and not entry.item["type"].endswith("_output")
        }
        known = {_identity(entry.item) for entry in self.history.entries}
        out: list[Entry] = []
        for i, item in enumerate(items):
            where = f"input[{i}]"
            if not isinstance(item, dict):
                raise InputError(f"{where} is {str(item)[:80]!r}; expected an object", param=where)
            if _is_preamble(item, items[i + 1 :]):
                item = {**item, "phase": "commentary"}
            entry = self._entry(item, where, calls, out)
            if _identity(entry.item) in known:
                raise InputError(
                    f"{where}: item {entry.item['id'][:80]!r} stands there already, in this input or in what it "
                    "continues; send each item once",
                    param=where,
                )
            known.add(_identity(entry.item))
            if not isinstance(entry.item.get("call_id"), str | None):
                met = str(entry.item["call_id"])[:80]
                raise InputError(f"{where}.call_id is {met!r}; expected a text", param=f"{where}.call_id")
            if "call_id" in entry.item and not entry.item["type"].endswith("_output"):
                calls[entry.item["call_id"]] = (entry.item, entry.spoken)
            out.append(entry)
        return out

    def _entry(self, item: Json, where: str, calls: Mapping[str, Any], out: list[Entry]) -> Entry:
        kind = item.get("type") or ("message" if "role" in item else None)
        match kind:
            case "message":
                return self._message(item, where)
            case "reasoning":
                return self._reasoning(item, where)
            case "function_call" | "custom_tool_call":
                return self._call(item, kind, where, out)
            case "function_call_output" | "custom_tool_call_output":
                return self._output(item, kind, where, calls)
            case str() if (tool := of_call(kind)) is not None:
                return self._client_call(item, tool, where, out)
            case str() if (tool := of_output(kind)) is not None:
                return self._client_output(item, tool, where, calls)
            case "mcp_call" | "code_interpreter_call":
                return self._answered_call(item, kind, where)
            case "mcp_approval_request":
                return self._approval_request(item, where, out)
            case "mcp_approval_response":
                return self._approval_response(item, where, out)
            case "additional_tools":
                return self._more_tools(item, where)
            case "item_reference":
                identity = _text(item.get("id"), f"{where}.id")
                if identity in self.references:
                    return self.references[identity]
                raise NotFoundError(f"{where} refers to item {identity!r}, which is not stored", param=where)
            case "compaction":
                return self._compaction(item, where)
            case str():
                _check_passed_by(kind, item, where)
                return Entry({**item, "id": _text(item.get("id"), f"{where}.id") or new_id("item")})
            case _:
                raise InputError(f"{where} has neither a type nor a role", param=f"{where}.type")

    def _message(self, item: Json, where: str) -> Entry:
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise InputError(
                f"{where}.role is {role!r}; expected user, assistant, system or developer", param=f"{where}.role"
            )
        text = _content_text(item.get("content"), f"{where}.content")
        known: Json = {"type": "message", "role": role, "status": "completed"}
        identity = {"id": _text(item.get("id"), f"{where}.id") or new_id("msg")}
        if role == "assistant":
            known["content"] = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
            channel = Channel.COMMENTARY if item.get("phase") == "commentary" else Channel.FINAL
            known["phase"] = "commentary" if channel is Channel.COMMENTARY else "final_answer"
            return Entry(identity | known, (Spoken(Message(Role.ASSISTANT, text, channel=str(channel))),))
        known["content"] = [{"type": "input_text", "text": text}]
        if role == "user":
            return Entry(identity | known, (Spoken(Message(Role.USER, text)),))
        return Entry(identity | known, (Spoken(Message(Role.DEVELOPER, DeveloperContent(instructions=text))),))

    def _reasoning(self, item: Json, where: str) -> Entry:
        identity = _text(item.get("id"), f"{where}.id") or new_id("rs")
        content = item.get("content") or []
        text = _content_text(content, f"{where}.content")
        sealed = item.get("encrypted_content")
        kept = {"id": identity, "type": "reasoning", "summary": item.get("summary") or []}
        if isinstance(sealed, str):
            kept["encrypted_content"] = sealed
            opened = self._open(sealed)
            if opened is not None and (not text or text == opened.message.text):
                return Entry(kept | ({"content": content} if content else {}), (opened,))
            if opened is None and not text:
                self.history.transformations.append(
                    {"id": identity, "type": "reasoning", "action": "removed", "reason": "model_mismatch"}
                )
        if content:
            kept["content"] = [{"type": "reasoning_text", "text": text}]
        spoken = Spoken(Message(Role.ASSISTANT, text, channel=str(Channel.ANALYSIS)))
        return Entry(kept, (spoken,) if text else ())

    def _open(self, sealed: str) -> Spoken | None:
        data = self.seal.open(sealed)
        given = json.loads(data) if data is not None else None
        # What else was sealed here is no thought.
        return Spoken.from_dict(given) if isinstance(given, dict) and given.keys() == set(Spoken._fields) else None

    def _call(self, item: Json, kind: str, where: str, out: list[Entry]) -> Entry:
        is_function = kind == "function_call"
        field = "arguments" if is_function else "input"
        name = _required(item.get("name"), f"{where}.name")
        call_id = _required(item.get("call_id") or item.get("id"), f"{where}.call_id")
        given = _required(item.get(field), f"{where}.{field}")
        namespace = _text(item.get("namespace"), f"{where}.namespace")
        kept: Json = {
            "id": _text(item.get("id"), f"{where}.id") or new_id("fc" if is_function else "ctc"),
            "type": kind,
            "call_id": call_id,
            "name": name,
            **({"namespace": namespace} if namespace else {}),
            field: given,
            "status": "completed",
        }
        recipient = f"{namespace or 'functions'}.{name}"
        turn = self._recalled(call_id, recipient, given, out)
        if turn:
            return Entry(kept, turn)
        content_type = _JSON_CALL if is_function else None
        call = Message(
            Role.ASSISTANT, given, channel=str(Channel.COMMENTARY), recipient=recipient, content_type=content_type
        )
        return Entry(kept, (Spoken(call),))

    def _client_call(self, item: Json, tool: ClientTool, where: str, out: list[Entry]) -> Entry:
        given, call_id = arguments_of(tool.kind, item), item.get("call_id") or item.get("id")
        if given is None or not isinstance(call_id, str):
            raise InputError(f"{where} is a {tool.call_type} without call_id, or without what it calls", param=where)
        identity = _text(item.get("id"), f"{where}.id") or new_id(tool.prefix)
        kept = {**item, "id": identity, "call_id": call_id}
        recipient = f"functions.{tool.kind}"
        turn = self._recalled(call_id, recipient, given, out)
        call = Message(
            Role.ASSISTANT, given, channel=str(Channel.COMMENTARY), recipient=recipient, content_type=_JSON_CALL
        )
        return Entry(kept, turn or (Spoken(call),))

    def _client_output(self, item: Json, tool: ClientTool, where: str, calls: Mapping[str, Any]) -> Entry:
        # The output of a local shell names its call by id.
        call_id = item.get("call_id") or item.get("id")
        if tool.kind == "tool_search":
            tools = brought(item)
            text = _told_tools(tools) or "No tools were found."
        else:
            text = output_text(item) or ""
            if output_text(item) is None:
                raise InputError(f"{where}.output is no output of {tool.kind}", param=f"{where}.output")
        answered = {**item, "output": text, "call_id": call_id, "name": tool.kind}
        entry = self._output(answered, tool.output_type, where, calls)
        return Entry({**item, "id": entry.item["id"], "status": item.get("status") or "completed"}, entry.spoken)

    def _answered_call(self, item: Json, kind: str, where: str) -> Entry:
        """A call that was run here, told by the client: said again if its answer is told too."""
        kept = {**item, "id": _text(item.get("id"), f"{where}.id") or new_id("item")}
        if kind == "mcp_call":
            given, recipient, channel = item.get("arguments"), _mcp_recipient(item, where), str(Channel.COMMENTARY)
            error = item.get("error")
            answer = item.get("output") or (f"Error: {json.dumps(error)[:4_000]}" if error else None)
        else:
            given, recipient, channel = item.get("code"), "python", str(Channel.ANALYSIS)
            outputs = item.get("outputs")
            logs = [o.get("logs") for o in outputs or () if isinstance(o, dict)] if isinstance(outputs, list) else []
            answer = "".join(text for text in logs if isinstance(text, str)) or None
        if not isinstance(given, str) or not isinstance(answer, str):
            return Entry(kept)
        content_type = _JSON_CALL if kind == "mcp_call" else "code"
        call = Message(Role.ASSISTANT, given, channel=channel, recipient=recipient, content_type=content_type)
        return Entry(kept, (Spoken(call), Spoken(tool_message(recipient, channel, answer))))

    def _approval_request(self, item: Json, where: str, out: list[Entry]) -> Entry:
        identity, given = _text(item.get("id"), f"{where}.id"), item.get("arguments")
        recipient = _mcp_recipient(item, where)
        if not identity or not isinstance(given, str):
            raise InputError(f"{where} is an mcp_approval_request without id or arguments", param=where)
        turn = self._recalled(identity, recipient, given, out)
        call = Message(
            Role.ASSISTANT, given, channel=str(Channel.COMMENTARY), recipient=recipient, content_type=_JSON_CALL
        )
        return Entry(dict(item), turn or (Spoken(call),))

    def _approval_response(self, item: Json, where: str, out: list[Entry]) -> Entry:
        """An approval is run by the loop; a refusal is an answer already."""
        asked, approves = item.get("approval_request_id"), item.get("approve")
        if not isinstance(asked, str) or not isinstance(approves, bool):
            raise InputError(f"{where} is an approval without approval_request_id or approve", param=where)
        entries = [*self.history.entries, *out]
        found = [e for e in entries if e.item.get("type") == "mcp_approval_request" and e.item["id"] == asked]
        if not found:
            raise NotFoundError(
                f"{where} answers {asked[:80]!r}, which was not asked; send the request for approval before it, or "
                "continue from the response that made it",
                param=where,
            )
        if any(e.item.get("approval_request_id") == asked for e in entries):
            raise InputError(f"{where} answers {asked[:80]!r}, which was answered before", param=where)
        kept = {**item, "id": _text(item.get("id"), f"{where}.id") or new_id("mcpa")}
        if approves:
            return Entry(kept)
        called = found[-1].spoken[-1].message
        reason = item.get("reason")
        text = "Error: the user did not approve this call."
        text += f" Reason: {reason[:2_000]}" if isinstance(reason, str) and reason else ""
        return Entry(kept, (Spoken(tool_message(called.recipient or "", called.channel, text)),))

    def _more_tools(self, item: Json, where: str) -> Entry:
        identity = _text(item.get("id"), f"{where}.id") or new_id("at")
        content = DeveloperContent(None, tuple(brought(item).namespaces))
        return Entry({**item, "id": identity}, (Spoken(Message(Role.DEVELOPER, content)),))

    def _recalled(self, call_id: str, recipient: str, given: str, out: list[Entry]) -> tuple[Spoken, ...]:
        """What was sampled up to this call; the entries that show parts of it then say nothing themselves.

        A client that has changed the call or its thoughts is taken at its word: () is returned.
        """
        turn = self.memory.recall(call_id)
        if not turn or not _same_arguments(turn[-1].message.text, given):
            return ()
        if (turn[-1].message.recipient or "").rpartition(".")[2] != recipient.rpartition(".")[2]:
            return ()
        begin = len(out)
        while begin and _goes_before_call(out[begin - 1].item):
            begin -= 1
        for channel in (Channel.ANALYSIS, Channel.COMMENTARY):
            shown = [s.message.text for e in out[begin:] for s in e.spoken if _is_talk(s.message, channel)]
            sampled = [s.message.text for s in turn if _is_talk(s.message, channel)]
            # Clients and other forms of the API put their own gaps between messages.
            if _letters(shown) not in ("", _letters(sampled)):
                return ()
        out[begin:] = [Entry(entry.item) for entry in out[begin:]]
        return turn

    def _output(self, item: Json, kind: str, where: str, calls: Mapping[str, Any]) -> Entry:
        call_id = item.get("call_id")
        call, spoken = calls.get(call_id, (None, ())) if isinstance(call_id, str) else (None, ())
        name, namespace = item.get("name"), item.get("namespace")
        if call is not None:
            called = of_call(call["type"])
            name, namespace = called.kind if called else call.get("name"), call.get("namespace")
        if not isinstance(name, str):
            raise InputError(
                f"{where}: no tool call found for the output with call_id {call_id!r}; send the call before it, or "
                "continue from the response that made it",
                param=where,
            )
        text = _content_text(item.get("output"), f"{where}.output", skips=True)
        # A tool answers on the channel that it was called on, under the name it was called by.
        recipient = spoken[-1].message.recipient if spoken else f"{namespace or 'functions'}.{name}"
        channel = (spoken[-1].message.channel if spoken else None) or str(Channel.COMMENTARY)
        answer = tool_message(recipient or f"functions.{name}", channel, text)
        identity = _text(item.get("id"), f"{where}.id") or new_id("fco" if kind == "function_call_output" else "ctco")
        return Entry({**item, "id": identity, "type": kind, "status": "completed"}, (Spoken(answer),))

    def _compaction(self, item: Json, where: str) -> Entry:
        sealed = item.get("encrypted_content")
        summary = Summary.opened(sealed, self.seal)
        if summary is None:
            raise InputError(
                f"{where} is a compaction that this server did not make; send the items it stands for", param=where
            )
        return Entry({**item, "id": _text(item.get("id"), f"{where}.id") or new_id("cmp")}, summary.spoken())


def _mcp_recipient(item: Json, where: str) -> str:
    label, name = item.get("server_label"), item.get("name")
    if not isinstance(label, str) or not isinstance(name, str) or not _LABEL.fullmatch(label):
        raise InputError(f"{where} has no server_label or name; expected those of a tool", param=where)
    return f"{label}.{_UNSAYABLE.sub('_', name)[:64]}"


def _told_tools(tools: Tools) -> str:
    return developer_text(DeveloperContent(None, tuple(tools.namespaces))) if tools.functions else ""


def sealed_reasoning(spoken: Spoken, seal: Seal) -> str:
    """The `encrypted_content` that `Reader` opens to the same message and tokens."""
    return seal.seal(json.dumps(spoken.to_dict()).encode())


def _goes_before_call(item: Json) -> bool:
    """Whether the model may have said it in the turn that ends in a client's call: no other of these stands there."""
    kind = item.get("type")
    if kind == "message":
        return item.get("role") == "assistant" and item.get("phase") == "commentary"
    if is_call(kind):
        return False
    return isinstance(kind, str) and (kind == "reasoning" or kind.endswith("_call"))


def _identity(item: Json) -> tuple[str, str]:
    # The output of a local shell has the id of its call.
    return item["type"], item["id"]


def _is_preamble(item: Json, following: Sequence[Any]) -> bool:
    """Whether a message of the assistant, of which nobody says so, is what it said before a call of the same turn."""
    if item.get("role") != "assistant" or item.get("type", "message") != "message" or item.get("phase") is not None:
        return False
    kinds = (one.get("type") for one in following if isinstance(one, dict))
    return is_call(next((kind for kind in kinds if kind != "reasoning"), None))


def _is_talk(message: Message, channel: Channel) -> bool:
    return message.role is Role.ASSISTANT and message.channel == channel and message.recipient is None


def _letters(texts: Sequence[str]) -> str:
    return "".join("".join(texts).split())


def _same_arguments(sampled: str, given: str) -> bool:
    if sampled == given:
        return True
    try:
        return bool(json.loads(sampled) == json.loads(given))
    except (ValueError, RecursionError):
        return False


def _required(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    met = "missing" if value is None else repr(str(value)[:80])
    raise InputError(f"{where} is {met}; expected a text", param=where)


def _text(value: object, where: str) -> str:
    if value is None:
        return ""
    # A database holds no half characters, and not every one NULs.
    if not isinstance(value, str) or len(value) > 512 or not value.isprintable():
        raise InputError(f"{where} is {str(value)[:80]!r}; expected a short text", param=where)
    return value


_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "reasoning_text", "summary_text"})


def _content_text(content: object, where: str, *, skips: bool = False) -> str:
    """The text of a content: a text, or a list of parts. gpt-oss reads nothing else.

    With ``skips`` the model is told of a part that it cannot read: a tool's picture must not end a conversation.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} is {str(content)[:80]!r}; expected a text or a list of parts", param=where)
    return "".join(part_text(part, f"{where}[{i}]", skips=skips) for i, part in enumerate(content))


def part_text(part: object, where: str, *, skips: bool = False) -> str:
    """The text of one part of a content. Raises InputError, with ``skips`` only for what is no part."""
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type")
    if isinstance(kind, str):
        is_text = kind in _TEXT_PARTS or kind == "refusal"
        text = fields.get("refusal" if kind == "refusal" else "text")
        if is_text and isinstance(text, str):
            return text
        if skips and not is_text:
            left_out = kind.removeprefix("input_").removesuffix("_url")[:40]
            return f"[{left_out} left out: this model reads text only]"
    met = f"a part of type {str(kind)[:80]!r}" if kind else str(part)[:80]
    raise InputError(f"{where} is {met}; this model reads text only", param=where)


# Entries to a prompt ---------------------------------------------------------------------------------------------


class Prompt:
    """The tokens of a prompt, by message, so that the oldest can be left out.

    ``extend`` is for the loop: what was sampled, and a tool's answer, behind all that stands there already.
    """

    def __init__(
        self,
        request: PromptRequest,
        entries: Sequence[Entry],
        tools: Tools,
        tokenizer: Tokenizer,
        current_date: str | None,
    ) -> None:
        spoken = [one for entry in entries for one in entry.spoken]
        num_leading = next((i for i, s in enumerate(spoken) if not _is_instructions(s.message)), len(spoken))
        given = [_instructions(s.message) for s in spoken[:num_leading]]
        texts = [text for text in [request.instructions, *given] if text]
        has_functions = any(function.namespace is None for function in tools.functions)
        self._tokenizer = tokenizer
        self._opening = [tokenizer.special("<|start|>"), *tokenizer.encode(str(Role.ASSISTANT))]
        self._head: list[int] = []
        for message in _head_messages(request, tools, texts, current_date):
            self._head += render_message(message, tokenizer, has_functions=has_functions)
        keeps_all = request.reasoning is not None and request.reasoning.context == "all_turns"
        kept = spoken[num_leading:] if keeps_all else _without_old_analysis(spoken[num_leading:])
        self._is_user = [one.message.role is Role.USER for one in kept]
        self._pieces = [list(one.token_ids) or render_message(one.message, tokenizer) for one in kept]
        self._num_dropped = 0

    @property
    def opening(self) -> tuple[int, ...]:
        """``<|start|>assistant``: the end of the prompt, and what precedes the first sampled token."""
        return tuple(self._opening)

    @property
    def token_ids(self) -> list[int]:
        out = list(self._head)
        for piece in self._pieces[self._num_dropped :]:
            out += piece
        return out + self._opening

    @property
    def num_left_out(self) -> int:
        """Turns that `shorten_until` has left out, in whole or in part."""
        return sum(self._is_user[: self._num_dropped])

    def extend(self, sampled: Sequence[int]) -> None:
        """The model has said ``sampled`` behind the opening."""
        self._pieces.append(self._opening + list(sampled))
        self._is_user.append(False)

    def extend_answer(self, answer: Message) -> int:
        """A tool has answered; in how many tokens."""
        self._pieces.append(render_message(answer, self._tokenizer))
        self._is_user.append(False)
        return len(self._pieces[-1])

    def drop_last(self) -> None:
        """Take back what was said last."""
        self._pieces.pop()
        self._is_user.pop()

    def shorten_until(self, fits: Callable[[list[int]], bool]) -> bool:
        """Leave out the oldest turns until it ``fits``; False if not even the last message alone does.

        A turn begins with a user's message; only when the last turn itself is too long, single messages go.
        """
        last = len(self._pieces) - 1
        turns = [i for i in range(1, last + 1) if self._is_user[i]]
        for cuts in (turns, range((turns or [0])[-1] + 1, last + 1)):
            low, high = 0, len(cuts)
            while low < high:
                middle = (low + high) // 2
                self._num_dropped = cuts[middle]
                low, high = (low, middle) if fits(self.token_ids) else (middle + 1, high)
            if low < len(cuts):
                self._num_dropped = cuts[low]
                return True
        self._num_dropped = 0
        return False


def _is_instructions(message: Message) -> bool:
    """Whether it may be told with the request's own instructions: a developer's message that declares nothing."""
    part = message.content[0]
    return message.role is Role.DEVELOPER and not (isinstance(part, DeveloperContent) and part.tools)


def _instructions(message: Message) -> str:
    part = message.content[0]
    return (part.instructions or "") if isinstance(part, DeveloperContent) else message.text


def _head_messages(request: PromptRequest, tools: Tools, texts: list[str], current_date: str | None) -> list[Message]:
    system = SystemContent(current_date=current_date, effort=request.effort, tools=tools.builtin)
    shape = request.format
    formats = []
    if shape.type == "json_schema":
        formats = [ResponseFormat(shape.name or "answer", shape.json_schema or {}, shape.description)]
    elif shape.type == "json_object":
        formats = [ResponseFormat("answer", {"type": "object"})]
    developer = DeveloperContent("\n\n".join(texts) or None, tuple(tools.namespaces), tuple(formats))
    head = [Message(Role.SYSTEM, system)]
    if developer != DeveloperContent():
        head.append(Message(Role.DEVELOPER, developer))
    return head


def _without_old_analysis(spoken: list[Spoken]) -> list[Spoken]:
    finals = [i for i, one in enumerate(spoken) if _is_talk(one.message, Channel.FINAL)]
    boundary = finals[-1] if finals else 0
    return [one for i, one in enumerate(spoken) if i >= boundary or one.message.channel != Channel.ANALYSIS]
