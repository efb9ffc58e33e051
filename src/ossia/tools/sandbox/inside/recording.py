"""What a call shows, within bounds: the first and the last bytes printed, and displays in their places."""

from __future__ import annotations

_MAX_DISPLAYS = 100
_MAX_ERROR_BYTES = 1 << 18


class Recording:
    """At most ``max_output`` bytes of print, half of them from the start, and ``max_display`` bytes of displays."""

    def __init__(self, max_output: int, max_display: int) -> None:
        self._head_left = max_output // 2
        self._max_tail = max_output - max_output // 2
        self._display_left = max_display
        self._num_displays = 0
        self._before: list[tuple[str, bytes]] = []
        self._tail = bytearray()
        self._num_past_head = 0
        # What is shown after the head was full; its place within the tail is not kept.
        self._after: list[tuple[str, bytes]] = []
        self.num_displays_dropped = 0

    def print(self, data: bytes) -> None:
        head, rest = data[: self._head_left], data[self._head_left :]
        self._head_left -= len(head)
        if head:
            if self._before and self._before[-1][0] == "stream":
                head = self._before.pop()[1] + head
            self._before.append(("stream", head))
        if rest:
            self._num_past_head += len(rest)
            self._tail += rest[-self._max_tail :] if self._max_tail else b""
            if len(self._tail) > 2 * self._max_tail:
                del self._tail[: -self._max_tail]

    def show(self, kind: str, data: bytes) -> None:
        """A "display" or an "error"."""
        if kind == "error":
            data = data[:_MAX_ERROR_BYTES]
        if self._num_displays >= _MAX_DISPLAYS or len(data) > self._display_left:
            self.num_displays_dropped += 1
            return
        self._num_displays += 1
        self._display_left -= len(data)
        (self._after if self._num_past_head else self._before).append((kind, data))

    def parts(self) -> tuple[list[tuple[str, bytes]], int]:
        """Kinds and their bytes in order, "gap" where bytes were left out, and the number of these."""
        tail = bytes(self._tail[-self._max_tail :]) if self._max_tail else b""
        num_dropped = self._num_past_head - len(tail)
        parts = list(self._before)
        if num_dropped:
            parts.append(("gap", b""))
        if tail:
            parts.append(("stream", tail))
        return parts + self._after, num_dropped
