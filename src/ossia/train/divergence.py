"""How far one model's answers are from another's: the Kullback-Leibler divergence of their next tokens.

    KL(before || after) = sum over tokens of p (log p - log q), in nats, at some positions of a few conversations

Both models run on the reference backend, which widens one expert, or some rows of a matrix, at a time, and lets go of
their pages in the mapped files then: a true 20b needs minutes and little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError, InputError
from ossia.harmony import Message, Role, SystemContent, render_for_completion
from ossia.model import transformer
from ossia.model.weights import Arrays, Checkpoint, load_weights
from ossia.ops import Batch
from ossia.ops.reference import ReferenceOps
from ossia.train.merged import Matrix, release

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number, and say what it costs.",
    "Ein Zug fährt um 9:40 ab und kommt um 13:05 an. Wie lange ist er unterwegs?",
    "Translate into French: 'The committee will meet again once the report has been read by everyone.'",
)
# Logits of a position are 0.8 MB for the published vocabulary; 64 of them say enough of a mean.
_MAX_ROWS = 64
# A prompt's last tokens, where it is longer; attention's scores grow with the square.
_MAX_TOKENS = 128
_RANDOM_TOKENS = 48


class Divergence(NamedTuple):
    """Over all positions looked at."""

    mean_kl: float
    max_kl: float
    same_top: float  # share of positions whose likeliest token is the same
    num_positions: int
    # What the positions come from: "prompts", or "random tokens" where there is no vocabulary to write prompts with.
    source: str


def divergence(
    before: Arrays,
    after: Arrays,
    checkpoint: Checkpoint,
    prompts: Sequence[str] = PROMPTS,
    progress: Callable[[int, int], None] | None = None,
) -> Divergence:
    """Compare two models of the same shape on prompts, in the vocabulary of ``checkpoint``."""
    sequences, source = _token_ids(checkpoint, prompts)
    batch = _batch(sequences, _MAX_ROWS)
    logits = []
    for done, model in enumerate((before, after)):
        ops = _ReadOnce()
        logits.append(transformer.forward(ops, model.config, load_weights(model, ops), batch))
        if progress is not None:
            progress(done + 1, 2)
    kl_R = np.array([_kl(p, q) for p, q in zip(*logits, strict=True)])
    same_R = logits[0].argmax(axis=-1) == logits[1].argmax(axis=-1)
    return Divergence(float(kl_R.mean()), float(kl_R.max()), float(same_R.mean()), len(kl_R), source)


class _ReadOnce(ReferenceOps):
    """The reference, for a single pass: what of a mapped file was read is let go of."""

    def _rows(self, matrix: Matrix, rows: Any) -> npt.NDArray[Any]:
        numbers = super()._rows(matrix, rows)
        release(matrix, rows)
        return numbers

    def _matrix(self, matrices: Matrix, expert: int) -> npt.NDArray[Any]:
        numbers = super()._matrix(matrices, expert)
        release(matrices, expert)
        return numbers


def _kl(before_V: npt.NDArray[Any], after_V: npt.NDArray[Any]) -> float:
    log_p_V, log_q_V = _log_softmax(before_V), _log_softmax(after_V)
    # Rounding may leave a hair below zero, which a divergence cannot be.
    return max(0.0, float(np.exp(log_p_V) @ (log_p_V - log_q_V)))


def _log_softmax(logits_V: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError where there are none, or an empty one."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError("no prompts to compare with, or an empty one. Give one prompt a line.")


def _token_ids(checkpoint: Checkpoint, prompts: Sequence[str]) -> tuple[list[list[int]], str]:
    check_prompts(prompts)
    try:
        tokenizer = checkpoint.tokenizer()
        return [
            render_for_completion([Message(Role.SYSTEM, SystemContent()), Message(Role.USER, prompt)], tokenizer)[
                -_MAX_TOKENS:
            ]
            for prompt in prompts
        ], "prompts"
    except CheckpointError:
        random = np.random.default_rng(0)
        vocab_size = checkpoint.config.vocab_size
        return [random.integers(0, vocab_size, _RANDOM_TOKENS).tolist() for _ in range(4)], "random tokens"


def _batch(sequences: Sequence[Sequence[int]], max_rows: int) -> Batch:
    lengths = np.array([len(each) for each in sequences])
    num_tokens = int(lengths.sum())
    no_table = np.zeros((len(sequences), 0), np.int32)
    return Batch(
        token_ids_T=np.concatenate([np.asarray(each, np.int32) for each in sequences]),
        positions_T=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        query_starts_N1=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        key_lengths_N=lengths.astype(np.int32),
        full_table_NB=no_table,
        window_table_NB=no_table,
        logit_rows_R=np.unique(np.linspace(0, num_tokens - 1, min(max_rows, num_tokens)).astype(np.int32)),
    )
