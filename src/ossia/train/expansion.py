"""One conversation to the samples that inference would have made of it.

Where the model is asked anew, its prompt is rendered anew: the answer before is closed by ``<|end|>`` and not
``<|return|>``, and the thoughts of earlier turns are gone. A sample is therefore one user turn: the prompt as inference
renders it, and all that the model samples until it has answered, with its calls, their results and the thoughts between
them. A sample goes on over a tool's result exactly as long as the next prompt repeats it token for token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.errors import ConfigError
from ossia.harmony import Channel, DropAnalysis, Message, Role, Tokenizer, TokenSpan, render_message
from ossia.harmony.render import has_function_tools, kept_indices, training_spans
from ossia.train.formats import MOST_WEIGHT, Dialogue

TRAINABLE = ("analysis", "commentary", "final", "calls")


class Rule(NamedTuple):
    """What a part of the setting ``train`` says: the weight of one kind of message, of calls to some recipients."""

    kind: str
    recipients: str
    weight: float


class TrainRules:
    """The setting ``train``, such as "final", "all,analysis=0.5" or "all,calls:browser.*=0": the last that fits holds.

    Raises ConfigError for a part that is no rule.
    """

    def __init__(self, text: str) -> None:
        self.rules = tuple(_read_rule(part.strip()) for part in text.split(","))
        if not any(rule.weight for rule in self.rules):
            raise ConfigError(f"train is {text!r}, under which nothing is trained; give something a weight")

    def weight(self, channel: str | None, recipient: str | None) -> float:
        """The weight of a message of the assistant."""
        kind = channel if recipient is None else "calls"
        for rule in reversed(self.rules):
            if rule.kind in ("all", kind) and (not rule.recipients or fnmatchcase(recipient or "", rule.recipients)):
                return rule.weight
        return 0.0


def _read_rule(text: str) -> Rule:
    name, has_weight, weight = text.partition("=")
    kind, has_pattern, pattern = name.partition(":")
    try:
        value = float(weight) if has_weight else 1.0
    except ValueError:
        value = -1.0
    if (
        kind not in ("all", *TRAINABLE)
        or (has_pattern and (kind != "calls" or not pattern))
        or not 0 <= value <= MOST_WEIGHT
    ):
        raise ConfigError(
            f"train has {text!r}; expected all, {', '.join(TRAINABLE)} or calls:PATTERN, each perhaps with =WEIGHT "
            f"of at most {MOST_WEIGHT:,.0f}, comma between"
        )
    return Rule(kind, pattern, value)


@dataclass(frozen=True)
class Expanded:
    """Tokens of one sample, or with ``num_too_many`` the number of tokens of one that is too long."""

    token_ids_L: npt.NDArray[np.int32]
    weights_L: npt.NDArray[np.float32]
    spans: tuple[TokenSpan, ...]
    # Tokens of the prompt, up to the first one that the model samples.
    num_prompt: int = 0
    num_too_many: int = 0


def expand(
    dialogue: Dialogue,
    tokenizer: Tokenizer,
    rules: TrainRules,
    *,
    drop_analysis: DropAnalysis = "past_turns",
    turns: Literal["all", "last"] = "all",
    max_tokens: int = 0,
    cut: bool = False,
) -> Iterator[Expanded]:
    """The samples of a conversation that train anything, in order.

    One of more than ``max_tokens`` (0 for no bound) is too long; with ``cut`` the oldest turns before its own are left
    out as far as needed.
    """
    rendered = _Rendered(dialogue.messages, tokenizer)
    stretches = _stretches(dialogue.messages, drop_analysis)
    for stretch in stretches[-1:] if turns == "last" else stretches:
        weights = [
            dialogue.weights[i] * rules.weight(message.channel, message.recipient)
            if i >= stretch.begin and message.role is Role.ASSISTANT
            else 0.0
            for i, message in ((i, dialogue.messages[i]) for i in stretch.indices)
        ]
        # As a float32 a very small weight is 0.
        if np.array(weights, np.float32).any():
            yield rendered.sample(stretch, weights, max_tokens, cut)


class _Stretch(NamedTuple):
    """Messages of one sample: those of its prompt, and from ``begin`` on those that follow without a gap."""

    indices: list[int]
    begin: int
    has_functions: bool


def _stretches(messages: Sequence[Message], drop_analysis: DropAnalysis) -> list[_Stretch]:
    out: list[_Stretch] = []
    at = 0
    is_closed = True
    while at < len(messages):
        if messages[at].role is not Role.ASSISTANT:
            at += 1
            continue
        end = _run_end(messages, at)
        prompt = kept_indices(messages[:at], drop_analysis)
        has_functions = has_function_tools(messages[:at])
        if not is_closed:
            last = out[-1]
            so_far = [*last.indices, *range(last.indices[-1] + 1, at)]
            is_closed = so_far != prompt or last.has_functions != has_functions
        if is_closed:
            out.append(_Stretch([*prompt, *range(at, end)], at, has_functions))
        else:
            out[-1] = _Stretch([*prompt, *range(at, end)], out[-1].begin, has_functions)
        is_closed = messages[end - 1].channel == Channel.FINAL
        at = end
    return out


def _run_end(messages: Sequence[Message], begin: int) -> int:
    """Where the model stops that begins to sample at ``begin``: behind an answer, a call, or all it has to say."""
    at = begin
    while at < len(messages) and messages[at].role is Role.ASSISTANT:
        at += 1
        if messages[at - 1].channel == Channel.FINAL or messages[at - 1].recipient is not None:
            break
    return at


class _Rendered:
    """Messages of one conversation, each rendered once for all its samples."""

    def __init__(self, messages: Sequence[Message], tokenizer: Tokenizer) -> None:
        self._messages = messages
        self._tokenizer = tokenizer
        self._pieces: dict[tuple[int, bool], npt.NDArray[np.int32]] = {}
        # <|start|>assistant, which the prompt ends in.
        self._num_opening = 1 + len(tokenizer.encode(str(Role.ASSISTANT)))

    def sample(self, stretch: _Stretch, weights: list[float], max_tokens: int, cut: bool) -> Expanded:
        indices = stretch.indices
        pieces = [self._piece(i, stretch.has_functions) for i in indices]
        num_tokens = sum(map(len, pieces))
        if max_tokens and num_tokens > max_tokens:
            kept = self._shortened(stretch, [len(piece) for piece in pieces], max_tokens) if cut else None
            if kept is None:
                return Expanded(np.empty(0, np.int32), np.empty(0, np.float32), (), num_too_many=num_tokens)
            indices, weights, pieces = ([column[k] for k in kept] for column in (indices, weights, pieces))  # type: ignore[assignment]
        token_ids_L = np.concatenate(pieces)
        messages = [self._messages[i] for i in indices]
        if messages[-1].channel == Channel.FINAL:
            token_ids_L[-1] = self._tokenizer.special("<|return|>")
        lengths = [len(piece) for piece in pieces]
        spans = training_spans(messages, lengths, self._tokenizer)
        weights_L = np.zeros(len(token_ids_L), np.float32)
        starts = list(accumulate(lengths, initial=0))
        for span in spans:
            if span.sampled:
                weights_L[span.start : span.end] = weights[bisect_right(starts, span.start) - 1]
        begin = starts[indices.index(stretch.begin)]
        num_prompt = begin + self._num_opening
        weights_L[begin:num_prompt] = 0
        return Expanded(token_ids_L, weights_L, tuple(spans), num_prompt)

    def _shortened(self, stretch: _Stretch, lengths: list[int], max_tokens: int) -> list[int] | None:
        """Places of the messages that are left when the oldest turns go until the rest fits; None if it never does.

        The head, system and developer messages, stays; a turn begins with a user's message.
        """
        roles = [self._messages[i].role for i in stretch.indices]
        head = next((k for k, role in enumerate(roles) if role not in (Role.SYSTEM, Role.DEVELOPER)), len(roles))
        own = next(k for k, i in enumerate(stretch.indices) if i == stretch.begin)
        total = sum(lengths)
        for k in range(head + 1, own):
            if roles[k] is Role.USER and total - sum(lengths[head:k]) <= max_tokens:
                return [*range(head), *range(k, len(roles))]
        return None

    def _piece(self, i: int, has_functions: bool) -> npt.NDArray[np.int32]:
        key = (i, has_functions and self._messages[i].role is Role.SYSTEM)
        if key not in self._pieces:
            token_ids = render_message(self._messages[i], self._tokenizer, has_functions=has_functions)
            self._pieces[key] = np.array(token_ids, np.int32)
        return self._pieces[key]
