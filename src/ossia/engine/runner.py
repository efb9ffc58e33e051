"""Runs batches over any backend's operations: holds the weights and the memory of keys and values.

The memory is divided once, at the start. A window block is needed only near the end of a sequence, so the window pool
gets what all running sequences can need at once plus an eighth of the memory, for windows to be found again, but never
more than a quarter; the rest is for full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.engine.block_manager import blocks_in_window
from ossia.engine.config import EngineConfig
from ossia.engine.request import Scored
from ossia.engine.sampler import Asked, Draw, Sampled, sample_row, score_rows
from ossia.errors import ConfigError
from ossia.model.adapted import HeldAdapter, adapt, hold_adapter
from ossia.model.adapter import Adapter
from ossia.model.config import ModelConfig
from ossia.model.transformer import Weights, forward, new_caches
from ossia.ops import AdapterOps, Array, Batch, Routing


class NumBlocks(NamedTuple):
    """Blocks of the layers with full attention, and of those with a sliding window."""

    full: int
    window: int


class Runner:
    """One model with its weights and its paged caches."""

    # Whether a few tokens more cost less than passes of their own, and have the same bits as alone.
    takes_drafts = False

    def __init__(self, ops: AdapterOps, config: ModelConfig, weights: Weights, options: EngineConfig) -> None:
        self.config = config
        self.options = options
        layer_bytes = ops.kv_block_bytes(options.block_size, config.num_kv_heads, config.head_dim)
        self.num_blocks = divide_memory(config, options, layer_bytes)
        # None if no layer has one.
        self.window = config.sliding_window if num_window_layers(config) else None
        self._ops = ops
        # numpy's products round otherwise beside other rows, and a card's recorded passes are those of single tokens.
        self.takes_drafts = ops.name == "cpu"
        self._weights = weights
        try:
            self._caches = new_caches(ops, config, self.num_blocks.full, self.num_blocks.window, options.block_size)
        # numpy's word for more than memory or addresses hold differs with the size.
        except (MemoryError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"kv_memory_bytes is {options.kv_memory_bytes}; this machine cannot give as much memory",
                param="kv_memory_bytes",
            ) from error
        self._experts_BSLA: npt.NDArray[np.uint16] | None = None
        if options.record_routing:
            shape = (self.num_blocks.full, options.block_size, config.num_layers, config.num_active_experts)
            self._experts_BSLA = np.zeros(shape, np.uint16)

    def run(self, batch: Batch) -> Array:
        """logits_RV, float32, of the rows that the batch asks for, where the backend leaves them until the next pass.

        The keys and values of all its tokens are kept.
        """
        weights = self._adapted(batch)
        if self._experts_BSLA is None:
            return self._logits(self._ops, weights, batch)
        recorder: Any = _RoutingRecorder(self._ops)
        logits_RV = self._logits(recorder, weights, batch)
        sequences_T = np.repeat(np.arange(len(batch.key_lengths_N)), np.diff(batch.query_starts_N1))
        size = self.options.block_size
        blocks_T = batch.full_table_NB[sequences_T, batch.positions_T // size]
        self._experts_BSLA[blocks_T, batch.positions_T % size] = np.stack(
            [self.to_host(experts_TA) for experts_TA in recorder.experts_LTA], axis=1
        )
        return logits_RV

    def _adapted(self, batch: Batch) -> Weights:
        return adapt(self._weights, batch)

    def _logits(self, ops: AdapterOps, weights: Weights, batch: Batch) -> Array:
        return np.asarray(forward(ops, self.config, weights, batch, self._caches), np.float32)

    def sample(self, logits_RV: Array, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        """The next tokens of sequences, or why one has none, from what `run` gave."""
        return [sample_row(logits_RV, draw) for draw in draws]

    def score(self, logits_RV: Array, asked: Sequence[Asked]) -> list[Scored]:
        """How likely given tokens were, from what `run` gave."""
        return score_rows(logits_RV, asked)

    def to_host(self, array: Array) -> npt.NDArray[Any]:
        """What the backend computed as a numpy array; returns when it is finished."""
        return np.asarray(array)

    def routing(self, full_table_B: npt.NDArray[np.int32], num_tokens: int) -> npt.NDArray[np.uint16]:
        """The experts [tokens, layers, A] of a sequence's first tokens, which its blocks hold."""
        assert self._experts_BSLA is not None
        positions_T = np.arange(num_tokens)
        size = self.options.block_size
        return self._experts_BSLA[full_table_B[positions_T // size], positions_T % size]

    def replace_weights(self, weights: Weights) -> None:
        """Go on with other weights of the same shape. Keys and values of the old ones are of no use any more."""
        self._weights = weights

    def hold(self, adapter: Adapter) -> HeldAdapter:
        """An adapter as a batch names it. May be called from any thread."""
        return hold_adapter(self._ops, adapter)

    def close(self) -> None:
        """Let go of what is beside this process; of a runner that is alone there is nothing."""


class _RoutingRecorder:
    """A backend that keeps a note of the experts that `route` chose, layer by layer; else the backend itself."""

    def __init__(self, ops: AdapterOps) -> None:
        self._ops = ops
        self.experts_LTA: list[Array] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, logits_TE: Array, num_active: int) -> Routing:
        routing = self._ops.route(logits_TE, num_active)
        self.experts_LTA.append(routing.experts_TA)
        return routing


def divide_memory(config: ModelConfig, options: EngineConfig, layer_bytes: int) -> NumBlocks:
    """How many blocks of both kinds fit, where one block of one layer takes ``layer_bytes``.

    Raises ConfigError if not even one sequence could run.
    """
    num_windowed = num_window_layers(config)
    full_bytes = (config.num_layers - num_windowed) * layer_bytes
    window_bytes = num_windowed * layer_bytes
    memory, context = options.kv_memory_bytes, max_context(config, options)
    # Blocks of no layer take no memory: as many as could ever be asked for.
    no_limit = options.max_num_seqs * -(-context // options.block_size)

    num_window = no_limit
    if window_bytes:
        per_sequence = blocks_in_window(config.sliding_window, options.block_size)
        in_use = options.max_num_seqs * per_sequence + -(-options.max_batch_tokens // options.block_size)
        share = min(in_use * window_bytes + memory // 8, memory // 4) if full_bytes else memory
        num_window = max(per_sequence, share // window_bytes)
        memory -= num_window * window_bytes
    num_full = memory // full_bytes if full_bytes else no_limit
    if memory < 0 or num_full < 1:
        least = full_bytes + num_window * window_bytes
        raise ConfigError(
            f"kv_memory_bytes is {options.kv_memory_bytes}; this model with block_size {options.block_size} needs at "
            f"least {least}",
            param="kv_memory_bytes",
        )
    # Without windows the window pool mirrors the full one.
    return NumBlocks(num_full, num_window if window_bytes else num_full)


def max_context(config: ModelConfig, options: EngineConfig) -> int:
    """Tokens of prompt and answer together: what was asked for, at most what the model was made for."""
    return min(config.max_context, options.max_context or config.max_context)


def num_window_layers(config: ModelConfig) -> int:
    """Layers whose tokens see a window."""
    return sum(config.window(i) is not None for i in range(config.num_layers))
