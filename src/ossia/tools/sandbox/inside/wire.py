"""Frames between ossia and the supervisor: two lengths, a JSON header, a body of bytes.

Source of the rules  the side outside believes no length and no field: see `process.py`.
"""

from __future__ import annotations

import json
import struct
from typing import Any

PREFIX = struct.Struct("!II")
# No header is longer than a list of the most files that are told, each with a name of the greatest length.
MAX_HEADER_BYTES = 8 << 20


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """One frame."""
    encoded = json.dumps(header, separators=(",", ":")).encode("ascii")
    return PREFIX.pack(len(encoded), len(body)) + encoded + body


class Frames:
    """Bytes as they come in, frames as they are whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[dict[str, Any], bytes]]:
        self._buffer += data
        frames = []
        while len(self._buffer) >= PREFIX.size:
            num_header, num_body = PREFIX.unpack_from(self._buffer)
            end = PREFIX.size + num_header + num_body
            if len(self._buffer) < end:
                break
            start = PREFIX.size + num_header
            frames.append((json.loads(self._buffer[PREFIX.size : start]), bytes(self._buffer[start:end])))
            del self._buffer[:end]
        return frames
