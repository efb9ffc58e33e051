"""Parsed harmony to stream events, while the response grows.

    header              item
    analysis            reasoning            content_part reasoning_text
    commentary          message, phase commentary
    final               message, phase final_answer
    to=functions.f      function_call, custom_tool_call, or the call of a tool of the API's own
    to=browser.search   what the toolbox says: web_search_call, code_interpreter_call, mcp_call, mcp_approval_request
    anything else       reasoning: a call of a tool that nobody declared is a thought of the model's, until answered

An item gets its id and index when its header is read and keeps them; its dicts in events are never changed afterwards.
A token whose text is held back (half a character) gives its log-probability to the next delta. Citations of a message
become links and annotations on the way out (`Toolbox.scanner`); the model's own words keep them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ossia.engine.stops import TextStops
from ossia.errors import OssiaError
from ossia.harmony import Channel, Header, Role
from ossia.responses.client_tools import CLIENT_TOOLS, call_fields
from ossia.responses.events import TERMINAL, Event, delta_head
from ossia.responses.schema import Json, Usage, error_object, new_id
from ossia.responses.tools import Function, Scanner, Toolbox, Tools


class _Kind(NamedTuple):
    """How the text of an item is told: names of its events and of the field that holds it."""

    name: str
    prefix: str
    text_event: str
    # The part of a content, or the item's own field.
    part: str | None = None
    field: str | None = None


_REASONING = _Kind("reasoning", "rs", "response.reasoning_text", part="reasoning_text")
_MESSAGE = _Kind("message", "msg", "response.output_text", part="output_text")
_FUNCTION = _Kind("function_call", "fc", "response.function_call_arguments", field="arguments")
_CUSTOM = _Kind("custom_tool_call", "ctc", "response.custom_tool_call_input", field="input")
_PYTHON = _Kind("code_interpreter_call", "ci", "response.code_interpreter_call_code", field="code")
_MCP = _Kind("mcp_call", "mcp", "response.mcp_call_arguments", field="arguments")
_SEARCH = _Kind("web_search_call", "ws", "")
_APPROVAL = _Kind("mcp_approval_request", "mcpr", "")
# What these call is a structure, not a text: they are told when it is complete.
_WHOLE = {kind: _Kind(tool.call_type, tool.prefix, "") for kind, tool in CLIENT_TOOLS.items()}
_BUILTIN = {kind.name: kind for kind in (_PYTHON, _MCP, _SEARCH)}
_BUILTIN[_APPROVAL.name] = _APPROVAL
_WHOLE_NAMES = frozenset(kind.name for kind in (*_WHOLE.values(), _APPROVAL))
# What the API gives no status.
_ANNOTATED = "response.output_text.annotation.added"
_WITHOUT_STATUS = frozenset({_APPROVAL.name})
# Events before a tool's text, and between its text and its end.
_BEGINS = {_PYTHON: ("in_progress",), _MCP: ("in_progress",), _SEARCH: ("in_progress", "searching")}
_RUNS = {_PYTHON: ("interpreting",), _MCP: (), _SEARCH: ()}


class Builder:
    """Grows ``response`` from the events of a parser, and tells each step.

    ``stops`` are texts that end the answer: what might be the beginning of one is held back, and `stopped` is set when
    one is complete.
    """

    def __init__(
        self,
        response: Json,
        tools: Tools,
        *,
        toolbox: Toolbox | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        self.response = response
        # Of the item that is open, or was last: what it calls.
        self.function: Function | None = None
        self._tools = tools
        self._toolbox = toolbox
        self._stops = TextStops(stops)
        self._num_events = 0
        # The open item.
        self._kind: _Kind | None = None
        self._item: Json = {}
        self._is_open = False
        self._is_answer = False
        self._is_compacting = False
        # Whether the text of the open item is complete, while its tool runs.
        self._is_text_told = False
        self._texts: list[str] = []
        self._logprobs: list[Json] = []
        self._scanner: Scanner | None = None
        self._annotations: list[Json] = []
        self._waiting_logprobs: list[Json] = []
        # Fields that repeat in every delta of the open item, and the bytes that do.
        self._place: Json = {}
        self._head = b""

    # The response as a whole ---------------------------------------------------------------------------------------

    def begin(self) -> list[Event]:
        """The response exists; if it has to wait, it is queued until `run`."""
        events = [self._lifecycle("response.created")]
        if self.response["status"] == "queued":
            events.append(self._lifecycle("response.queued"))
        return events

    def run(self) -> list[Event]:
        self.response["status"] = "in_progress"
        return [self._lifecycle("response.in_progress")]

    def end(
        self, status: str, usage: Usage | None, *, reason: str | None = None, error: OssiaError | None = None
    ) -> list[Event]:
        """Close what is open, as incomplete unless the response is complete, and end the response."""
        events = self.compacted("") if self._is_compacting else []
        events += self.close("completed" if status == "completed" else "incomplete")
        self.response["status"] = status
        self.response["usage"] = usage.to_dict() if usage is not None else None
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        if reason is not None:
            self.response["incomplete_details"] = {"reason": reason}
        if error is not None:
            self.response["error"] = error_object(error)
        return [*events, self._lifecycle(TERMINAL[status])]

    def fail(self, error: OssiaError) -> Event:
        """The response has failed after all: the event in place of the one that ended it, which nobody was told."""
        self._num_events -= 1
        failed = {"status": "failed", "error": error_object(error), "completed_at": None, "incomplete_details": None}
        self.response.update(failed)
        return self._lifecycle(TERMINAL["failed"])

    # Items -----------------------------------------------------------------------------------------------------------

    @property
    def item(self) -> Json:
        """The item that is open, or was last."""
        return self._item

    @property
    def stopped(self) -> str | None:
        """The stop text that ended the answer."""
        return self._stops.stopped

    @property
    def is_open(self) -> bool:
        return self._is_open

    def is_call(self, header: Header) -> bool:
        """Whether a message is for a tool, known or not."""
        return header.role is Role.ASSISTANT and header.recipient not in (None, "assistant", "user", "all")

    def open(self, header: Header) -> list[Event]:
        """A message begins."""
        return self.close("incomplete") + self._open(*self._kind_of(header))

    def open_approved(self, request: Json) -> list[Event]:
        """A call begins that a person has approved."""
        self.function = None
        fields: Json = {name: request[name] for name in ("server_label", "name")}
        fields |= {"output": None, "error": None, "approval_request_id": request["id"]}
        return [*self._open(_MCP, fields), *self.delta(request["arguments"])]

    def listed(self, item: Json) -> list[Event]:
        """A server has told its tools, or has failed to."""
        index = len(self.response["output"])
        self.response["output"].append(item)
        return [self._event(name, fields) for name, fields in _told_list(item, index)]

    def _open(self, kind: _Kind, fields: Json) -> list[Event]:
        events: list[Event] = []
        self._kind, self._is_open = kind, True
        self._is_answer = kind is _MESSAGE and fields["phase"] == "final_answer"
        self._texts, self._logprobs, self._waiting_logprobs = [], [], []
        self._annotations, self._scanner = [], None
        if kind is _MESSAGE and self._toolbox is not None:
            self._scanner = self._toolbox.scanner()
        index = len(self.response["output"])
        begun = {"id": new_id(kind.prefix), "type": kind.name, "status": "in_progress", **fields}
        if kind.name in _WITHOUT_STATUS:
            del begun["status"]
        if kind.part is not None:
            begun["content"] = []
        elif kind.field is not None:
            begun[kind.field] = ""
        self._item = begun
        self._place = {"item_id": begun["id"], "output_index": index}
        if kind.name in _WHOLE_NAMES:
            return events
        self.response["output"].append(begun)
        events.append(self._event("response.output_item.added", {"output_index": index, "item": begun}))
        if kind.part is not None:
            self._place["content_index"] = 0
            events.append(self._event("response.content_part.added", {**self._place, "part": _part(kind, "", ())}))
        if kind.text_event:
            self._head = delta_head(f"{kind.text_event}.delta", self._place)
        events += self._steps(_BEGINS.get(kind, ()))
        return events

    def delta(self, text: str, logprobs: Sequence[Json] = ()) -> list[Event]:
        """More text of the open item."""
        self._waiting_logprobs += logprobs
        if self._is_answer:
            text = self._stops.feed(text)
        return self._tell(text) if text else []

    def close(self, status: str = "completed", *, fields: Json | None = None, text: str | None = None) -> list[Event]:
        """The open item ends; nothing if none is open. ``fields`` are what its end adds, such as a tool's outputs.

        Half a call of a tool of the API's own is no item at all: there is nothing that could be shown of it.
        """
        if not self._is_open or self._kind is None:
            return []
        if self._kind.name in _WHOLE_NAMES:
            return self._close_whole(status, fields or {})
        events = []
        if held := self._stops.end():
            events += self._tell(held)
        events += self._end_text()
        done = self._whole(status) | (fields or {})
        self._item = done
        self._is_open = False
        self.response["output"][self._place["output_index"]] = done
        events.append(
            self._event("response.output_item.done", {"output_index": self._place["output_index"], "item": done})
        )
        return events

    def begin_tool(self) -> list[Event]:
        """The text of a call that ossia runs is complete, and its tool starts."""
        assert self._kind is not None
        events = self._end_text()
        self._is_text_told = True
        return events + self._steps(_RUNS.get(self._kind, ()))

    def compacting(self) -> list[Event]:
        """What was said is being summed up."""
        index = len(self.response["output"])
        item = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": ""}
        self.response["output"].append(item)
        self._is_compacting = True
        return [
            self._event("response.output_item.added", {"output_index": index, "item": item}),
            self._event("response.compaction.compacting", {"output_index": index, "item_id": item["id"]}),
        ]

    def compacted(self, encrypted_content: str) -> list[Event]:
        """The summary is there; an empty one never comes back."""
        self._is_compacting = False
        index = len(self.response["output"]) - 1
        item = self._item = {**self.response["output"][index], "encrypted_content": encrypted_content}
        self.response["output"][index] = item
        return [self._event("response.output_item.done", {"output_index": index, "item": item})]

    def end_tool(self, fields: Json, *, is_failed: bool) -> list[Event]:
        """The tool is done."""
        assert self._kind is not None
        events = self._steps(_ends(self._kind, is_failed=is_failed))
        return events + self.close("failed" if is_failed else "completed", fields=fields)

    # Parts of these ------------------------------------------------------------------------------------------------

    def _close_whole(self, status: str, added: Json) -> list[Event]:
        assert self._kind is not None
        self._is_open = False
        if status != "completed":
            return []
        text, index = "".join(self._texts), self._place["output_index"]
        if self._kind is _APPROVAL:
            done = self._item = {**self._item, **added}
            self.response["output"].append(done)
            return [self._event(name, told) for name, told in _told_whole(done, index)]
        assert self.function is not None
        fields = call_fields(self.function.kind, text)
        if fields is None:
            # Only where nothing is enforced: shown as it was said.
            self._kind = _FUNCTION
            fields = {"name": self.function.name, "arguments": text}
        done = self._item = {**self._item, "type": self._kind.name, "status": "completed", **fields, **added}
        self.response["output"].append(done)
        return [self._event(name, told) for name, told in _told_whole(done, index)]

    def _kind_of(self, header: Header) -> tuple[_Kind, Json]:
        self.function = None
        if self.is_call(header):
            recipient = header.recipient or ""
            function = self.function = self._tools.find(recipient)
            if function is not None:
                called: Json = {"call_id": new_id("call"), "name": function.name}
                if function.namespace is not None:
                    called["namespace"] = function.namespace
                if function.kind in _WHOLE:
                    return _WHOLE[function.kind], {"call_id": called["call_id"]}
                return (_FUNCTION if function.kind == "function" else _CUSTOM), called
            item = self._toolbox.item(recipient) if self._toolbox is not None else None
            if item is not None:
                return _BUILTIN[item["type"]], {key: value for key, value in item.items() if key != "type"}
            return _REASONING, {"summary": []}
        if header.role is not Role.ASSISTANT or header.channel == Channel.ANALYSIS:
            return _REASONING, {"summary": []}
        phase = "commentary" if header.channel == Channel.COMMENTARY else "final_answer"
        return _MESSAGE, {"role": "assistant", "phase": phase}

    def _tell(self, text: str) -> list[Event]:
        kind = self._kind
        assert kind is not None
        if self._scanner is not None:
            return self._tell_scanned(*self._scanner.feed(text))
        self._texts.append(text)
        if not kind.text_event:
            return []
        fields = {**self._place, "delta": text}
        if kind is _MESSAGE:
            fields["logprobs"] = self._waiting_logprobs
            self._logprobs += self._waiting_logprobs
            self._waiting_logprobs = []
        event = Event(f"{kind.text_event}.delta", self._num_events, fields, self._head)
        self._num_events += 1
        return [event]

    def _tell_scanned(self, text: str, annotations: Sequence[Json]) -> list[Event]:
        """Text of a message, in which citations have become links."""
        events = []
        if text:
            scanner, self._scanner = self._scanner, None
            events = self._tell(text)
            self._scanner = scanner
        for annotation in annotations:
            fields = {**self._place, "annotation_index": len(self._annotations), "annotation": annotation}
            self._annotations.append(annotation)
            events.append(self._event(_ANNOTATED, fields))
        return events

    def _end_text(self) -> list[Event]:
        kind = self._kind
        assert kind is not None
        if self._is_text_told or not kind.text_event:
            self._is_text_told = False
            return []
        held = self._tell_scanned(*self._scanner.finish()) if self._scanner is not None else []
        self._scanner = None
        text = "".join(self._texts)
        if kind.part is not None:
            spoken: Json = {**self._place, "text": text}
            if kind is _MESSAGE:
                spoken["logprobs"] = self._logprobs
            part = _part(kind, text, self._logprobs, self._annotations)
            return [
                *held,
                self._event(f"{kind.text_event}.done", spoken),
                self._event("response.content_part.done", {**self._place, "part": part}),
            ]
        assert kind.field is not None
        fields = {**self._place, kind.field: text}
        if kind is _FUNCTION:
            fields["name"] = self._item["name"]
        return [self._event(f"{kind.text_event}.done", fields)]

    def _whole(self, status: str) -> Json:
        """The item with its text, as it stays."""
        kind = self._kind
        assert kind is not None
        done = {**self._item, "status": status}
        text = "".join(self._texts)
        if kind.part is not None:
            done["content"] = [_part(kind, text, self._logprobs, self._annotations)]
        elif kind.field is not None:
            done[kind.field] = text
        return done

    def _steps(self, names: Sequence[str]) -> list[Event]:
        if not names or self._kind is None:
            return []
        return [self._event(f"response.{self._kind.name}.{name}", dict(self._place)) for name in names]

    def _lifecycle(self, name: str) -> Event:
        return self._event(name, {"response": {**self.response, "output": list(self.response["output"])}})

    def _event(self, name: str, fields: Json) -> Event:
        event = Event(name, self._num_events, fields)
        self._num_events += 1
        return event


def _part(kind: _Kind, text: str, logprobs: Sequence[Json], annotations: Sequence[Json] = ()) -> Json:
    if kind is _REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": list(annotations), "logprobs": list(logprobs)}


def _ends(kind: _Kind, *, is_failed: bool) -> tuple[str, ...]:
    # The API has an event for a failure of MCP alone.
    return ("failed",) if kind is _MCP and is_failed else ("completed",)


def _told_list(item: Json, index: int) -> Iterator[tuple[str, Json]]:
    """The events of a list of tools."""
    place = {"item_id": item["id"], "output_index": index}
    yield "response.output_item.added", {"output_index": index, "item": {**item, "tools": [], "error": None}}
    yield "response.mcp_list_tools.in_progress", place
    yield f"response.mcp_list_tools.{'failed' if item.get('error') else 'completed'}", place
    yield "response.output_item.done", {"output_index": index, "item": item}


def _told_whole(item: Json, index: int) -> Iterator[tuple[str, Json]]:
    """The events of an item that is told when it is complete."""
    begun: Json = item if item["type"] in _WITHOUT_STATUS else {**item, "status": "in_progress"}
    commands = item["action"]["commands"] if item["type"] == "shell_call" else []
    if item["type"] == "shell_call":
        begun["action"] = {**item["action"], "commands": []}
    elif item["type"] == "function_call":
        begun["arguments"] = ""
    yield "response.output_item.added", {"output_index": index, "item": begun}
    for number, command in enumerate(commands):
        place = {"output_index": index, "command_index": number}
        yield "response.shell_call_command.added", {**place, "command": ""}
        if command:
            yield "response.shell_call_command.delta", {**place, "delta": command}
        yield "response.shell_call_command.done", {**place, "command": command}
    if item["type"] == "function_call":
        place = {"item_id": item["id"], "output_index": index}
        yield f"{_FUNCTION.text_event}.delta", {**place, "delta": item["arguments"]}
        yield f"{_FUNCTION.text_event}.done", {**place, "arguments": item["arguments"], "name": item["name"]}
    yield "response.output_item.done", {"output_index": index, "item": item}


def replayed(response: Json) -> Iterator[Event]:
    """The events of a response that has ended, in their order, each text in one piece."""
    events: list[tuple[str, Any]] = []
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "completed_at": None, "error": None,
             "incomplete_details": None}  # fmt: skip
    events += [("response.created", {"response": begun}), ("response.in_progress", {"response": begun})]
    kinds = {kind.name: kind for kind in (_REASONING, _MESSAGE, _FUNCTION, _CUSTOM, _PYTHON, _MCP, _SEARCH)}
    for index, item in enumerate(response["output"]):
        if item["type"] in _WHOLE_NAMES:
            events += _told_whole(item, index)
            continue
        if item["type"] == "mcp_list_tools":
            events += _told_list(item, index)
            continue
        kind = kinds.get(item["type"])
        place: Json = {"item_id": item["id"], "output_index": index}
        added: Json = {**item, "status": "in_progress"}
        if kind and kind.part:
            added["content"] = []
        elif kind and kind.field:
            added[kind.field] = ""
        events.append(("response.output_item.added", {"output_index": index, "item": added}))
        for name in _BEGINS.get(kind, ()) if kind else ():
            events.append((f"response.{item['type']}.{name}", place))
        for i, part in enumerate(item.get("content", ()) if kind and kind.part else ()):
            assert kind is not None
            at = {**place, "content_index": i}
            told = {"logprobs": part.get("logprobs", [])} if kind is _MESSAGE else {}
            events += [
                ("response.content_part.added", {**at, "part": _part(kind, "", ())}),
                *([(f"{kind.text_event}.delta", {**at, "delta": part["text"], **told})] if part["text"] else []),
                *(
                    (_ANNOTATED, {**at, "annotation_index": n, "annotation": annotation})
                    for n, annotation in enumerate(part.get("annotations", ()))
                ),
                (f"{kind.text_event}.done", {**at, "text": part["text"], **told}),
                ("response.content_part.done", {**at, "part": part}),
            ]
        if kind and kind.field:
            named = {"name": item["name"]} if kind is _FUNCTION else {}
            text = item[kind.field]
            events += [(f"{kind.text_event}.delta", {**place, "delta": text})] if text else []
            events.append((f"{kind.text_event}.done", {**place, kind.field: text, **named}))
        is_failed = item.get("status") == "failed"
        for name in (*_RUNS[kind], *_ends(kind, is_failed=is_failed)) if kind in _RUNS and kind else ():
            events.append((f"response.{item['type']}.{name}", place))
        events.append(("response.output_item.done", {"output_index": index, "item": item}))
    events.append((TERMINAL[response["status"]], {"response": response}))
    for number, (name, fields) in enumerate(events):
        yield Event(name, number, fields)
