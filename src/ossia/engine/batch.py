"""From scheduled sequences to the flat arrays of one forward pass. Shapes: see `ossia.ops`."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.engine.block_manager import BlockTable
from ossia.engine.request import Sequence
from ossia.ops import Batch


class Scheduled(NamedTuple):
    """A sequence's part in one step: its next ``num_tokens`` tokens are computed, and behind its last one a draft."""

    sequence: Sequence
    num_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def scored_rows(self) -> range:
        """The rows, counted from its first one, whose logits tell how likely the prompt's next token was."""
        sequence = self.sequence
        start = sequence.blocks.num_tokens
        if sequence.params.score_from is None:
            return range(0)
        first = sequence.params.score_from + len(sequence.prompt_logprobs) - 1
        return range(first - start, min(self.num_tokens, sequence.num_prompt_tokens - 1 - start))

    @property
    def is_sampled(self) -> bool:
        """Whether these are its last tokens, so that the step yields the next one."""
        return self.num_tokens == self.sequence.num_uncomputed


def make_batch(scheduled: SequenceOf[Scheduled]) -> Batch:
    """The batch of one step; its logit rows are those that are scored or sampled, in order of the sequences.

    A sequence that is sampled has a row for each token of its draft as well.
    """
    token_ids: list[int] = []
    positions: list[npt.NDArray[np.int32]] = []
    ends: list[int] = []
    for sequence, num_tokens, draft in scheduled:
        start = sequence.blocks.num_tokens
        token_ids += sequence.token_ids[start : start + num_tokens]
        token_ids += draft
        ends.append(start + num_tokens + len(draft))
        positions.append(np.arange(start, ends[-1], dtype=np.int32))
    adapters = tuple(one.sequence.adapter for one in scheduled)
    starts = [0, *accumulate(map(len, positions))]
    return Batch(
        token_ids_T=np.array(token_ids, np.int32),
        positions_T=np.concatenate(positions),
        query_starts_N1=np.array(starts, np.int32),
        key_lengths_N=np.array(ends, np.int32),
        full_table_NB=_stack([one.sequence.blocks.full for one in scheduled]),
        window_table_NB=_stack([one.sequence.blocks.window for one in scheduled]),
        logit_rows_R=np.array(
            [
                row
                for i, one in enumerate(scheduled)
                for row in (
                    *(starts[i] + row for row in one.scored_rows),
                    *(range(starts[i + 1] - 1 - len(one.draft), starts[i + 1]) if one.is_sampled else ()),
                )
            ],
            np.int32,
        ),
        adapters=adapters if any(one is not None for one in adapters) else (),
    )


def _stack(tables: list[BlockTable]) -> npt.NDArray[np.int32]:
    stacked_NB = np.full((len(tables), max(table.end for table in tables)), -1, np.int32)
    for n, table in enumerate(tables):
        stacked_NB[n, : table.end] = table.blocks[: table.end]
    return stacked_NB
