"""Where an answer ends: stop tokens, runs of tokens, and texts that may begin and end inside tokens.

Texts are looked for as if the answer came byte by byte: the stop that is complete first counts, of several that are
complete at the same byte the longest. So where the tokens happen to be cut makes no difference.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import AnyStr, NamedTuple

from ossia.errors import InputError


class Stop(NamedTuple):
    """What ended an answer, and how much of the answer stands before it."""

    # A stop string, or the tokens of a stop sequence; a stop token is a sequence of one.
    match: str | tuple[int, ...]
    # Tokens of the answer that lie wholly before the match.
    num_tokens: int
    # Bytes of the answer before the match; None where the request has no stop strings.
    num_bytes: int | None


class StopMatcher:
    """Follows one answer token by token.

    ``held_bytes`` tells how many bytes at the end of the answer so far may be the beginning of a stop string: whoever
    shows text while it comes keeps them back until more is known.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        sequences: Sequence[tuple[int, ...]],
        strings: Sequence[str],
        token_bytes: Callable[[int], bytes] | None,
    ) -> None:
        if strings and token_bytes is None:
            raise InputError(
                "stop_strings need an engine that knows the bytes of tokens; give it token_bytes", param="stop_strings"
            )
        self._token_ids = frozenset(token_ids)
        self._sequences = sorted(sequences, key=len, reverse=True)
        self._strings = [(text, text.encode()) for text in strings]
        self._token_bytes = token_bytes
        self._recent_ids: list[int] = []
        self._num_recent = max(map(len, sequences), default=0)
        # The end of the answer, as much as may be the beginning of a stop string.
        self._tail = b""
        # ends[i]: bytes of the first i + 1 tokens.
        self._ends: list[int] = []
        self._num_tokens = 0
        self.held_bytes = 0

    def feed(self, token_id: int) -> Stop | None:
        """Take the next token of the answer; the stop that it completes, if any."""
        self._num_tokens += 1
        text_stop = self._feed_text(token_id) if self._strings else None
        if token_id in self._token_ids:
            return self._stop_of_tokens((token_id,))
        if self._sequences:
            self._recent_ids = [*self._recent_ids, token_id][-self._num_recent :]
            for sequence in self._sequences:
                if tuple(self._recent_ids[-len(sequence) :]) == sequence:
                    return self._stop_of_tokens(sequence)
        return text_stop

    def _stop_of_tokens(self, token_ids: tuple[int, ...]) -> Stop:
        num_tokens = self._num_tokens - len(token_ids)
        num_bytes = None
        if self._strings:
            num_bytes = self._ends[num_tokens - 1] if num_tokens else 0
        return Stop(token_ids, num_tokens, num_bytes)

    def _feed_text(self, token_id: int) -> Stop | None:
        assert self._token_bytes is not None
        new = self._token_bytes(token_id)
        start = (self._ends[-1] if self._ends else 0) - len(self._tail)
        known = len(self._tail)
        text = self._tail + new
        self._ends.append(start + len(text))
        self.held_bytes = max(_overlap(text, stop) for _, stop in self._strings)
        self._tail = text[len(text) - self.held_bytes :]

        found = []
        for string, stop in self._strings:
            # A match that was complete before this token has been reported, or came too early.
            begin = text.find(stop, max(0, known - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, string))
        if not found:
            return None
        _, begin, string = min(found)
        num_bytes = start + begin
        return Stop(string, bisect_right(self._ends, num_bytes), num_bytes)


class TextStops:
    """Texts that end an answer which comes piece by piece, as it is shown, without thoughts and headers."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        # The one that has ended the answer.
        self.stopped: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown, now that ``text`` has come too: what may begin a stop is held back, a stop is left out."""
        if not self._stops:
            return text
        if self.stopped is not None:
            return ""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            begin, self.stopped = min(found)
            self._held = ""
            return text[:begin]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def end(self) -> str:
        """What was held back of an answer that has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: AnyStr, stop: AnyStr) -> int:
    """The longest end of ``text`` that is a beginning of ``stop``, not the whole of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
