"""Stream events: what a response tells while it grows, and the bytes in which it travels.

    event: response.output_text.delta
    data: {"type":"response.output_text.delta","sequence_number":7,"item_id":"msg_...",...}

Source   the Responses API; `event` always equals the `type` in the data, and the stream ends in `data: [DONE]`.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from ossia.responses.schema import Json, dumps, quoted

DONE = b"data: [DONE]\n\n"

# A response that was cancelled ends its stream with `incomplete`, and the status "cancelled" in it: the API names no
# event of its own.
TERMINAL = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "cancelled": "response.incomplete",
}
TERMINAL_EVENTS = frozenset(TERMINAL.values())


class Event(NamedTuple):
    """One event; ``fields`` are its own, beside type and number, and are not changed after it was made."""

    type: str
    sequence_number: int
    fields: Json
    # Of a delta: all its bytes up to the number, which every delta of its item begins with.
    head: bytes = b""

    @property
    def is_terminal(self) -> bool:
        return self.type in TERMINAL_EVENTS

    def to_dict(self) -> Json:
        return {"type": self.type, "sequence_number": self.sequence_number, **self.fields}


def sse(event: Event, *, pads: bool = False) -> bytes:
    """The event as it goes over the wire; with ``pads`` the sizes of deltas say little about their text."""
    if event.head and not pads:
        # Three times as fast as the whole JSON, and nine of ten events are deltas.
        logprobs = event.fields.get("logprobs")
        more = b"" if logprobs is None else b',"logprobs":%b' % (dumps(logprobs) if logprobs else b"[]")
        return b'%b%d,"delta":%b%b}\n\n' % (event.head, event.sequence_number, quoted(event.fields["delta"]), more)
    told = event.to_dict()
    if pads and "delta" in told:
        told["obfuscation"] = padding(len(told["delta"]))
    return b"event: %b\ndata: %b\n\n" % (event.type.encode(), dumps(told))


def delta_head(kind: str, place: Json) -> bytes:
    """The beginning of the bytes of every delta of one item."""
    return b'event: %b\ndata: %b,"sequence_number":' % (kind.encode(), dumps({"type": kind, **place})[:-1])


def padding(num_chars: int) -> str:
    """Random letters that fill ``num_chars`` up to a multiple of 32."""
    return secrets.token_urlsafe(24)[: 32 - num_chars % 32]
