"""What travels through the engine: the parameters of a request, its sequence of tokens, the tokens that come out.

Sources  The parameters follow OpenAI's API and, where that has none, vLLM's SamplingParams.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ossia.engine.block_manager import SequenceBlocks
from ossia.engine.drafts import Drafts
from ossia.engine.stops import Stop, StopMatcher
from ossia.errors import InputError, OssiaError
from ossia.model.adapted import HeldAdapter

FinishReason = Literal["stop", "length", "abort", "error"]
NO_TOKEN = -1


# What is done to logits must leave numbers of 32 bits.
_LARGEST = 1e30


class Constraint(Protocol):
    """Says which tokens may come next in one sequence: a grammar, a cap on reasoning, or both.

    The engine calls ``fill`` once before each token and ``accept`` once after it, in turn. ``fill`` runs in another
    thread than ``accept``, beside the forward pass as a rule, and never at the same time. An exception from either ends
    this sequence, and no other, with finish_reason "error".
    """

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        """Set bit i % 32 of word i // 32 for each token i that may come next; clear all others.

        ``mask`` is uint32 [ceil(V / 32)] with undefined content.
        """

    def accept(self, token_id: int) -> None:
        """Take note of the token that was sampled."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Order of work: penalties, logit_bias, bans and the constraint's mask, temperature, top_k, top_p, min_p, draw.
    Raises InputError with ``param`` set to the field that cannot be.
    """

    # 0 (below 1e-5) always takes the likeliest token.
    temperature: float = 1.0
    # The likeliest tokens that together reach this probability are kept.
    top_p: float = 1.0
    # This many of the likeliest tokens are kept, equal ones by lower id; 0 keeps all.
    top_k: int = 0
    # Tokens less likely than this share of the likeliest are dropped.
    min_p: float = 0.0
    # Subtracted from the logit of each token that the answer holds already.
    presence_penalty: float = 0.0
    # Subtracted from the logit of a token once for each time that the answer holds it.
    frequency_penalty: float = 0.0
    # Divides positive and multiplies negative logits of tokens in the prompt or the answer.
    repetition_penalty: float = 1.0
    # Added to the logits of single tokens.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # Tokens that are never sampled.
    banned_token_ids: tuple[int, ...] = ()
    # The same seed, prompt and parameters give the same tokens; None draws a fresh seed.
    seed: int | None = None
    # Report the log-probability of each sampled token.
    logprobs: bool = False
    # Report this many of the likeliest tokens at each place, with their log-probabilities.
    top_logprobs: int = 0
    # Report the log-probabilities of the prompt's tokens from this place on, with top_logprobs of the likeliest.
    score_from: int | None = None
    # Report the log-probability of each sampled token in the distribution that it was drawn from.
    drawn_logprobs: bool = False
    # Report the experts that the tokens of prompt and answer went to; the engine must be set up to record them.
    routing: bool = False
    # Tokens after which the answer ends; None: as many as context and memory hold.
    max_tokens: int | None = None
    # No stop token is sampled and no stop looked for before the answer has this many tokens.
    min_tokens: int = 0
    # Tokens that end the answer, besides the model's own.
    stop_token_ids: tuple[int, ...] = ()
    # Runs of tokens that end the answer.
    stop_sequences: tuple[tuple[int, ...], ...] = ()
    # Texts that end the answer, found across tokens; they need an engine that knows the bytes of tokens.
    stop_strings: tuple[str, ...] = ()
    # Let the answer go on after the model's own stop tokens.
    ignore_eos: bool = False
    # The adapter that all tokens of prompt and answer go through, by its name in the engine; None: the model alone.
    adapter: str | None = None
    # What the next token may be, for this request alone: a constraint has a state and serves one sequence.
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self._check("temperature", 0 <= self.temperature <= _LARGEST, f"between 0 and {_LARGEST:g}")
        self._check("top_p", 0 <= self.top_p <= 1, "between 0 and 1")
        self._check("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        self._check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        is_usable = 1 / _LARGEST <= self.repetition_penalty <= _LARGEST
        self._check("repetition_penalty", is_usable, f"above 0 and at most {_LARGEST:g}")
        biases = self.logit_bias.values()
        self._check("logit_bias", all(abs(bias) <= _LARGEST for bias in biases), f"within {_LARGEST:g} for each token")
        self._check("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits")
        self._check("top_logprobs", self.top_logprobs >= 0, "at least 0")
        self._check("score_from", self.score_from is None or self.score_from >= 1, "at least 1: nothing precedes 0")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("min_tokens", self.min_tokens >= 0, "at least 0")
        is_bound = self.constraint is not None and self.min_tokens > 0
        self._check("min_tokens", not is_bound, "0 beside a grammar, which says itself where an answer ends")
        self._check("stop_sequences", all(self.stop_sequences), "sequences of at least one token")
        self._check("stop_strings", all(map(_is_text, self.stop_strings)), "texts of at least one whole character")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise InputError(f"{name} is {getattr(self, name)!r}; it must be {expected}", param=name)

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise InputError if a field names a token that the vocabulary does not have."""
        named: dict[str, SequenceOf[int]] = {
            "logit_bias": tuple(self.logit_bias),
            "banned_token_ids": self.banned_token_ids,
            "stop_token_ids": self.stop_token_ids,
            "stop_sequences": [token_id for sequence in self.stop_sequences for token_id in sequence],
        }
        for name, token_ids in named.items():
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise InputError(
                        f"{name} names token {token_id}; this model has tokens 0 to {vocab_size - 1}", param=name
                    )
        if self.top_logprobs > vocab_size:
            raise InputError(
                f"top_logprobs is {self.top_logprobs}; this model has {vocab_size} tokens", param="top_logprobs"
            )


def _is_text(value: str) -> bool:
    return bool(value) and not any(0xD800 <= ord(one) <= 0xDFFF for one in value)


class Scored(NamedTuple):
    """How likely a token of the prompt was, and what was likeliest in its place; as in `TokenOutput`."""

    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token, or the end of a request that has none.

    Log-probabilities are those of the model itself: the log-softmax of its logits before any parameter changed them;
    ``drawn_logprob`` alone is that after penalties, bias, bans, mask, temperature, top_k, top_p and min_p.
    """

    request_id: int
    # NO_TOKEN where the request ends by "abort" or "error".
    token_id: int
    logprob: float | None = None
    # (token id, log-probability), likeliest first, equal ones by lower id.
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    # What ended the answer, and where in it, with finish_reason "stop".
    stop: Stop | None = None
    # Bytes at the end of the answer so far that may be the beginning of a stop string: not to be shown yet.
    held_bytes: int = 0
    # Tokens of the prompt that were not computed, since an earlier request left their keys and values.
    num_cached_tokens: int = 0
    # With finish_reason "error".
    error: OssiaError | None = None
    # With the first token, if asked for: of each token of the prompt from ``score_from`` on.
    prompt_logprobs: tuple[Scored, ...] = ()
    # In the distribution that the token was drawn from, if asked for.
    drawn_logprob: float | None = None
    # With the last token, if asked for: the experts [tokens, layers, A] of every token of prompt and answer but the
    # last, which is not computed. Best expert first.
    routing: npt.NDArray[np.uint16] | None = None


class Sequence:
    """A request under way: the tokens of its prompt and answer and all that belongs to them alone."""

    __slots__ = (
        "adapter",
        "banned_token_ids",
        "biased_token_ids",
        "biases",
        "blocks",
        "constraint",
        "drafts",
        "eos_token_ids",
        "max_tokens",
        "num_cached_tokens",
        "num_prompt_tokens",
        "params",
        "prompt_logprobs",
        "request_id",
        "seed",
        "stops",
        "token_counts",
        "token_ids",
    )

    def __init__(
        self,
        request_id: int,
        token_ids: SequenceOf[int],
        params: SamplingParams,
        max_tokens: int,
        model_stop_token_ids: SequenceOf[int],
        token_bytes: Callable[[int], bytes] | None,
        adapter: HeldAdapter | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(map(int, token_ids))
        self.num_prompt_tokens = len(self.token_ids)
        self.drafts = Drafts(self.token_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        # Held until the sequence ends, also where the engine has let go of it meanwhile.
        self.adapter = adapter
        self.blocks = SequenceBlocks(adapter.cache_key if adapter is not None else b"")
        # None until the request is first admitted: later hits are of its own tokens, after a preemption.
        self.num_cached_tokens: int | None = None
        self.constraint = params.constraint
        eos = () if params.ignore_eos else tuple(model_stop_token_ids)
        self.stops = StopMatcher(
            (*eos, *params.stop_token_ids), params.stop_sequences, params.stop_strings, token_bytes
        )
        self.eos_token_ids = np.array(sorted({*eos, *params.stop_token_ids}), np.int64)
        self.banned_token_ids = np.array(params.banned_token_ids, np.int64)
        self.biased_token_ids = np.array([*params.logit_bias], np.int64)
        self.biases = np.array([*params.logit_bias.values()], np.float32)
        self.token_counts = TokenCounts(self.token_ids) if _needs_counts(params) else None
        self.prompt_logprobs: list[Scored] = []

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.blocks.num_tokens

    @property
    def num_reusable(self) -> int:
        """Tokens that need not be computed if their keys and values are known: all but the last, or up to where the
        prompt's tokens are still to be scored."""
        last = self.num_prompt_tokens if self.params.score_from is None else self.params.score_from
        last += len(self.prompt_logprobs)
        return len(self.token_ids) - 1 if last >= self.num_prompt_tokens else last - 1

    def append(self, token_id: int) -> tuple[FinishReason | None, Stop | None]:
        """Add a sampled token and say whether it ends the answer."""
        self.token_ids.append(token_id)
        if self.token_counts is not None:
            self.token_counts.add(token_id)
        stop = self.stops.feed(token_id)
        if stop is not None and self.num_output_tokens >= self.params.min_tokens:
            return "stop", stop
        return ("length" if self.num_output_tokens >= self.max_tokens else None), None


class TokenCounts:
    """How often the answer holds each token that stands in prompt or answer: what penalties need, ready for numpy."""

    def __init__(self, prompt_token_ids: SequenceOf[int]) -> None:
        unique = np.unique(np.asarray(prompt_token_ids, np.int64))
        self._index = {int(token_id): i for i, token_id in enumerate(unique)}
        self._token_ids = unique
        self._counts = np.zeros(len(unique), np.float32)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        return self._token_ids[: len(self._index)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """Times that the answer holds each of ``token_ids``; 0 for tokens of the prompt alone."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        i = self._index.setdefault(token_id, len(self._index))
        if i == len(self._counts):
            self._token_ids = np.concatenate([self._token_ids, np.zeros(max(64, i), np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(max(64, i), np.float32)])
        self._token_ids[i] = token_id
        self._counts[i] += 1


def _needs_counts(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
