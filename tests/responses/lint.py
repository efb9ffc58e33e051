"""What every stream of events must be, as one function."""

from __future__ import annotations

import json
from typing import Any, get_args

from openai.types.responses import Response, ResponseStreamEvent

# The union as a table: pydantic tries every member of a union otherwise.
EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(ResponseStreamEvent)[0])
}
# Steps of a call that runs here, in their order; of the last, one.
_STEPS = {
    "web_search_call": [("in_progress",), ("searching",), ("completed",)],
    "code_interpreter_call": [("in_progress",), ("interpreting",), ("completed",)],
    "mcp_call": [("in_progress",), ("completed", "failed")],
    "mcp_list_tools": [("in_progress",), ("completed", "failed")],
}
TERMINAL = ("response.completed", "response.failed", "response.incomplete")
_TEXTS = {
    "response.output_text": "text",
    "response.reasoning_text": "text",
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
    "response.code_interpreter_call_code": "code",
    "response.mcp_call_arguments": "arguments",
    "response.shell_call_command": "command",
}


def lint(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Check a whole stream and return its last response."""
    for event in events:
        EVENTS[event["type"]].model_validate(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events))), "numbers are dense"
    assert events[0]["type"] == "response.created"
    assert [e["type"] for e in events if e["type"] in TERMINAL] == [events[-1]["type"]], "one terminal event, last"
    ids = {event["response"]["id"] for event in events if "response" in event}
    assert len(ids) == 1
    items: dict[int, dict[str, Any]] = {}
    open_items: dict[int, dict[str, Any]] = {}
    open_parts: set[tuple[int, int]] = set()
    annotations: dict[tuple[int, int], list[dict[str, Any]]] = {}
    steps: dict[int, list[str]] = {}
    texts: dict[tuple[str, int, int | None], str] = {}
    for event in events:
        kind, index = event["type"], event.get("output_index")
        if kind == "response.output_item.added":
            assert index == len(items), "indices are given in order, once"
            assert not open_items, "one item at a time"
            items[index] = open_items[index] = event["item"]
            assert event["item"]["id"] not in {item["id"] for i, item in items.items() if i != index}
        elif kind == "response.output_item.done":
            begun = open_items.pop(index)
            for key in ("id", "type", "call_id", "name"):
                assert begun.get(key) == event["item"].get(key)
            assert not open_parts, "parts end before their item"
            assert event["item"].get("status") != "in_progress"
            if event["item"].get("status") != "incomplete":
                expected = _STEPS.get(event["item"]["type"], [])
                assert len(steps.get(index, [])) == len(expected)
                assert all(step in one for step, one in zip(steps.get(index, []), expected, strict=True))
            items[index] = event["item"]
        elif index is not None:
            prefix, _, step = kind.rpartition(".")
            assert index in open_items
            assert event.get("item_id") == (None if prefix == "response.shell_call_command" else items[index]["id"])
            if prefix.removeprefix("response.") in _STEPS:
                steps.setdefault(index, []).append(step)
            if kind == "response.output_text.annotation.added":
                told = annotations.setdefault((index, event["content_index"]), [])
                assert event["annotation_index"] == len(told)
                told.append(event["annotation"])
            if kind == "response.content_part.added":
                open_parts.add((index, event["content_index"]))
            elif kind == "response.content_part.done":
                open_parts.remove((index, event["content_index"]))
                told = annotations.get((index, event["content_index"]), [])
                assert event["part"].get("annotations", []) == told
                for one in told:
                    assert 0 <= one["start_index"] < one["end_index"] <= len(event["part"]["text"])
            elif "content_index" in event:
                assert (index, event["content_index"]) in open_parts
            if prefix in _TEXTS and step == "delta":
                assert event["delta"]
                place = (prefix, index, event.get("command_index"))
                texts[place] = texts.get(place, "") + event["delta"]
            elif prefix in _TEXTS and step == "done":
                assert event[_TEXTS[prefix]] == texts.get((prefix, index, event.get("command_index")), "")
    assert not open_items and not open_parts
    last = events[-1]["response"]
    Response.model_validate(last)
    assert last["output"] == [items[i] for i in range(len(items))]
    assert (last["status"] == "completed") == (events[-1]["type"] == "response.completed")
    return last


def read_sse(text: str) -> list[dict[str, Any]]:
    """Events of a response body; each event's name is its type, and the body ends in [DONE]."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    events = []
    for block in blocks[:-1]:
        name, data = block.split("\n", 1)
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert "error" not in event
        events.append(event)
    return events
