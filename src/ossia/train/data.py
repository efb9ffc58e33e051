"""What training reads: samples of tokens with a loss weight for each, pairs of them, and batches.

A sample is one stretch of a conversation as inference sees it: the prompt that the server would render, then what the
model is to sample. Nothing here needs torch; arrays are numpy's, and the trainer moves them.

Legend for shapes: see `ossia.ops`; L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ossia.harmony import DropAnalysis, Effort, TokenSpan
from ossia.ops import Batch

KINDS = ("other", "analysis", "commentary", "final", "call")
"""What a trained token belongs to: thoughts, words on the way, the answer, a call of a tool; by `TrainBatch.kinds_R`."""


@dataclass(frozen=True)
class DataConfig:
    """How conversations become samples, and in which order they come."""

    # Format of the rows; auto looks at the first row of each file.
    format: Literal["auto", "harmony", "openai", "sharegpt"] = "auto"
    # What is trained: all, analysis, commentary, final, calls or calls:PATTERN, each with =WEIGHT; the last one holds.
    train: str = "all"
    # Which answers of a conversation become samples.
    turns: Literal["all", "last"] = "all"
    # Reasoning effort of rows that name none: one, or shares such as low=1,medium=2,high=1.
    effort: str = "medium"
    # Date that the model is told: YYYY-MM-DD, two of them with .. between for one of that range, or empty for none.
    current_date: str = "2025-01-01..2026-12-31"
    # Which thoughts of earlier turns a prompt leaves out, in the words of `ossia.harmony.DropAnalysis`.
    drop_analysis: DropAnalysis = "past_turns"
    # Most tokens of a sample, 0 for no bound.
    max_tokens: int = 4096
    # What becomes of a longer sample: an error, left out, or its oldest turns left out as the server does.
    overlong: Literal["refuse", "skip", "cut"] = "refuse"
    # Whether rows that cannot be used are counted and passed by; otherwise the first one is an error.
    skip_bad_rows: bool = False
    # Share of the rows, chosen by a hash of each, that is held back for validation.
    validation_share: float = 0.0
    # Which side of that division is read.
    split: Literal["all", "train", "validation"] = "all"
    # Rows that are held at once to be shuffled and packed.
    buffer_rows: int = 4096
    # Whether samples come in a seeded random order, other in each epoch; otherwise in the order of the files.
    shuffle: bool = True
    # How samples share a batch: whichever fill it best, those of like length, or each alone.
    packing: Literal["best_fit", "buckets", "none"] = "best_fit"
    # Seed of the order, of efforts and of dates.
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens of one sample; ``weights_L[i]`` is the loss weight of predicting token i from those before it.

    The first token is never trained, and the last one with a weight ends a message: return, call or end.
    """

    token_ids_L: npt.NDArray[np.int32]
    weights_L: npt.NDArray[np.float32]
    effort: Effort | None = None
    line: int | None = None
    origin: str = ""
    # Which message each token belongs to; () where that is not known.
    spans: tuple[TokenSpan, ...] = ()

    @property
    def num_trained(self) -> int:
        return int(np.count_nonzero(self.weights_L))

    def __len__(self) -> int:
        return len(self.token_ids_L)


@dataclass(frozen=True, eq=False)
class PairSample:
    """Two answers to one prompt, of which ``chosen`` is the better; both begin with the same tokens."""

    chosen: Sample
    rejected: Sample
    line: int | None = None
    origin: str = ""

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class TrainBatch:
    """Samples as one batch without padding; the rows of ``logits_RV`` are those with something to predict."""

    batch: Batch
    targets_R: npt.NDArray[np.int64]
    weights_R: npt.NDArray[np.float32]
    # Which sample of the batch a row belongs to.
    samples_R: npt.NDArray[np.int32]
    # What the target belongs to, as an index into KINDS.
    kinds_R: npt.NDArray[np.uint8]
    num_tokens: int

    @property
    def num_samples(self) -> int:
        return len(self.batch.key_lengths_N)


def to_batch(samples: Sequence[Sample | PairSample]) -> TrainBatch:
    """One batch of the samples, in order; of a pair first the chosen one, then the rejected one."""
    flat: list[Sample] = []
    for one in samples:
        flat += [one] if isinstance(one, Sample) else [one.chosen, one.rejected]
    assert flat, "a batch of no samples"
    lengths_N = np.array([len(sample) for sample in flat], np.int32)
    starts_N1 = np.concatenate(([0], np.cumsum(lengths_N))).astype(np.int32)
    num_tokens = int(starts_N1[-1])
    token_ids_T = np.concatenate([sample.token_ids_L for sample in flat]).astype(np.int32, copy=False)
    weights_T = np.concatenate([sample.weights_L for sample in flat]).astype(np.float32, copy=False)
    assert not weights_T[starts_N1[:-1]].any(), "the first token of a sample has nothing before it to be predicted from"
    documents_T = np.repeat(np.arange(len(flat), dtype=np.int32), lengths_N)
    targets_at = np.flatnonzero(weights_T)
    no_blocks_NB = np.empty((len(flat), 0), np.int32)
    batch = Batch(
        token_ids_T=token_ids_T,
        positions_T=np.arange(num_tokens, dtype=np.int32) - starts_N1[documents_T],
        query_starts_N1=starts_N1,
        key_lengths_N=lengths_N,
        full_table_NB=no_blocks_NB,
        window_table_NB=no_blocks_NB,
        logit_rows_R=(targets_at - 1).astype(np.int32),
    )
    return TrainBatch(
        batch,
        targets_R=token_ids_T[targets_at].astype(np.int64),
        weights_R=weights_T[targets_at],
        samples_R=documents_T[targets_at],
        kinds_R=np.concatenate([_kinds(sample) for sample in flat])[targets_at],
        num_tokens=num_tokens,
    )


def kind_of(span: TokenSpan) -> str:
    """Which of KINDS the tokens of a span are, once they are trained."""
    if not span.sampled:
        return "other"
    if span.recipient is not None:
        return "call"
    return span.channel if span.channel in KINDS else "other"


def _kinds(sample: Sample) -> npt.NDArray[np.uint8]:
    kinds_L = np.zeros(len(sample), np.uint8)
    for span in sample.spans:
        kinds_L[span.start : span.end] = KINDS.index(kind_of(span))
    return kinds_L
