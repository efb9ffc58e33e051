"""Runs batches on a GPU: one copy to the card, one recorded pass; of its logits come back the tokens that are drawn.

A pass in which each sequence has one token is filled up to a size of a ladder, so that a few CUDA graphs, recorded
when they are first needed, serve every such pass: of sequences by `sequence_rungs`, of blocks in a table by
`table_width`. All other passes are launched kernel by kernel. Without a card (Triton's interpreter) nothing is
recorded, and all the rest is the same.

Keys and values get what the weights and the work of the largest pass leave of the card's memory; where that holds not
even the weights, experts of some layers stay with the host (`placement.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ossia.engine.config import EngineConfig
from ossia.engine.gpu_sampler import sample_on_device, score_on_device
from ossia.engine.placement import Placement, least_kv_bytes, model_bytes, place
from ossia.engine.request import Scored
from ossia.engine.runner import Runner
from ossia.engine.sampler import Asked, Draw, Sampled
from ossia.errors import UnavailableError
from ossia.model.adapted import adapt
from ossia.model.config import ModelConfig
from ossia.model.memory import available_bytes
from ossia.model.transformer import Weights, attention, hidden
from ossia.model.weights import Arrays, Checkpoint, load_weights
from ossia.ops import AdapterOps, Batch
from ossia.ops.gpu import GpuOps
from ossia.ops.offload import OffloadOps
from ossia.ops.upload import send

_log = logging.getLogger(__name__)

# What libraries, kernels and recorded passes take beside everything that is counted.
_CONTEXT_BYTES = 768 << 20
# Of the card's memory where no bound is given: the rest is the driver's, and the screen's.
_DEFAULT_SHARE = 0.92
# Tokens of the largest pass, and the part of a card that it may take.
_MOST_TOKENS, _SHARES_FOR_WORK = 4096, 64
# Blocks of the narrowest table that passes are recorded with.
_LEAST_WIDTH = 32
# One tile of tokens: with more, each matrix would be read more than once.
_MAX_JOINED_TOKENS = 16


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    # What the graph reads: all arrays of its batch in one piece, so that one copy fills them.
    inputs: Tensor
    # The part of the logits of all recorded passes that this one writes.
    logits_RV: Tensor


class GpuRunner(Runner):
    """One model with its weights and its paged caches on a card."""

    def __init__(self, ops: GpuOps, config: ModelConfig, weights: Weights, options: EngineConfig) -> None:
        super().__init__(ops, config, weights, options)
        self._gpu = ops
        self._rungs = sequence_rungs(options.max_num_seqs)
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        # Of all recorded passes: each would hold memory of its own for as long as it can be replayed.
        self._logits_RV: Tensor | None = None

    def replace_weights(self, weights: Weights) -> None:
        # A recorded pass reads the weights that it was recorded with.
        self._recorded.clear()
        super().replace_weights(weights)

    def sample(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        return sample_on_device(logits_RV, draws)

    def score(self, logits_RV: Tensor, asked: Sequence[Asked]) -> list[Scored]:
        return score_on_device(logits_RV, asked)

    def to_host(self, array: Tensor) -> npt.NDArray[Any]:
        return array.cpu().numpy()

    def _adapted(self, batch: Batch) -> Weights:
        return adapt(self._weights, batch, self._send)

    def _logits(self, ops: AdapterOps, weights: Weights, batch: Batch) -> Tensor:
        is_plain = weights is self._weights and ops is self._ops
        rung = rung_of(batch, self._rungs) if is_plain else None
        if rung is None:
            return self._launch(ops, weights, batch)
        padded, num_sequences, rows_R = pad(batch, rung), len(batch.key_lengths_N), batch.logit_rows_R
        logits_RV = self._replay(padded) if self._gpu.device.type == "cuda" else self._launch(ops, weights, padded)
        # Nearly always all of them: no copy.
        return logits_RV[:num_sequences] if len(rows_R) == num_sequences else logits_RV[self._send(rows_R)]

    def _launch(self, ops: AdapterOps, weights: Weights, batch: Batch) -> Tensor:
        return self._forward(ops, weights, unpack(self._send(pack(batch)), batch))

    def _send(self, values: npt.NDArray[np.int32]) -> Tensor:
        return send(values, self._gpu.device)

    def _forward(self, ops: AdapterOps, weights: Weights, batch: Batch) -> Tensor:
        run = run_joined if self._can_join(ops, weights, batch) else None
        x_RD = hidden(ops, self.config, weights, batch, self._caches, run)
        logits_RV: Tensor = ops.linear(x_RD, weights.unembedding)
        return logits_RV

    def _can_join(self, ops: AdapterOps, weights: Weights, batch: Batch) -> bool:
        """Whether `run_joined` is for this pass: the model alone, and one token for each of few sequences."""
        is_plain = ops is self._ops and weights is self._weights
        return is_plain and len(batch.positions_T) == len(batch.key_lengths_N) <= _MAX_JOINED_TOKENS

    def _replay(self, batch: Batch) -> Tensor:
        """The logits of a padded batch by its recorded pass; the next one overwrites them."""
        key = batch.full_table_NB.shape
        if key not in self._recorded:
            self._recorded[key] = self._record(batch)
        recorded = self._recorded[key]
        recorded.inputs.copy_(torch.from_numpy(pack(batch)).pin_memory(), non_blocking=True)
        recorded.graph.replay()
        return recorded.logits_RV

    def _record(self, batch: Batch) -> _Recorded:
        inputs = self._send(pack(batch))
        held = unpack(inputs, batch)
        # Kernels are compiled, and libraries set up, by a pass before: neither may happen while one is recorded. What
        # it writes to the cache is what the recorded pass will write.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits_RV = self._forward(self._ops, self._weights, held)
        torch.cuda.current_stream().wait_stream(stream)
        if self._logits_RV is None:
            self._logits_RV = torch.empty((self._rungs[-1], logits_RV.shape[1]), device=logits_RV.device)
        out_RV = self._logits_RV[: len(logits_RV)]
        del logits_RV
        graph = torch.cuda.CUDAGraph()
        # One pool for all: no two recorded passes run at the same time.
        pool = next((one.graph.pool() for one in self._recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            out_RV.copy_(self._forward(self._ops, self._weights, held))
        return _Recorded(graph, inputs, out_RV)


def run_joined(layer_index: int, sublayer: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A sublayer of a pass with one token for each sequence, attention with fewer kernels where these can be joined."""
    if sublayer is not attention:
        return sublayer(*arguments)
    ops, config, layer, x_TD, rope, cache, batch, window = arguments
    if not ops.can_join(layer.q, layer.k, layer.v):
        return sublayer(*arguments)
    norm_D, eps, projections = layer.attention_norm_D, config.rms_norm_eps, (layer.q, layer.k, layer.v)
    o_TQH = ops.normed_attention(x_TD, norm_D, eps, projections, rope, layer.sinks_Q, cache, batch, window)
    out_TD: Tensor = ops.linear(o_TQH.flatten(1), layer.o)
    return out_TD


def load_gpu_runner(ops: AdapterOps, checkpoint: Checkpoint, options: EngineConfig, gpu_memory: int) -> GpuRunner:
    """Put a checkpoint's weights on the card, and give keys and values what is left of ``gpu_memory`` (0: nearly all).

    Without a card keys and values get what ``options`` say. Raises UnavailableError where the card is too small.
    """
    assert isinstance(ops, GpuOps)
    placed = load_onto_card(ops, checkpoint, options, gpu_memory)
    return GpuRunner(placed.ops, checkpoint.config, placed.weights, placed.options)


class OnCard(NamedTuple):
    """Weights where they lie, the operations that know where that is, and the options with the memory that is left."""

    ops: GpuOps
    weights: Weights
    options: EngineConfig


def load_onto_card(ops: GpuOps, model: Arrays, options: EngineConfig, gpu_memory: int) -> OnCard:
    """Weights on the card, but for experts that it has no room for; keys and values get what is left.

    Without a card ``gpu_memory`` is the size of one that is made up; 0 is no bound then. Raises UnavailableError where
    the card, or the host's memory for its experts, is too small.
    """
    is_card, config = ops.device.type == "cuda", model.config
    if not is_card and not gpu_memory:
        return OnCard(ops, load_weights(model, ops), options)
    memory = card_memory(ops.device) if is_card else CardMemory(gpu_memory, gpu_memory)
    layer_bytes = ops.kv_block_bytes(options.block_size, config.num_kv_heads, config.head_dim)
    # Asked before minutes of loading.
    placement = place(
        model_bytes(model),
        config.num_layers,
        room(memory, gpu_memory, config, options),
        least_kv_bytes(config, options, layer_bytes),
        options.kv_memory_bytes,
    )
    if placement.host_bytes:
        _check_host(placement)
        ops = OffloadOps(ops, placement.is_on_card, placement.num_buffers)
    weights = load_weights(model, ops)
    left = placement.kv_bytes
    if is_card:
        torch.cuda.empty_cache()
        left = kv_memory(card_memory(ops.device), gpu_memory, config, options)
    return OnCard(ops, weights, replace(options, kv_memory_bytes=left))


def pass_tokens(memory: int, config: ModelConfig, options: EngineConfig) -> int:
    """Tokens of a pass on a card with so many bytes: as ``options`` say, or twice as many, and so on up to 4096.

    A prompt's pass reads nearly all experts: the more tokens, the fewer passes. Its work takes a 64th of the card's
    memory at most, if ``options`` leave it the choice.
    """
    tokens = options.max_batch_tokens
    while 2 * tokens <= _MOST_TOKENS:
        if _SHARES_FOR_WORK * work_bytes(config, replace(options, max_batch_tokens=2 * tokens)) > memory:
            break
        tokens *= 2
    return tokens


def _check_host(placement: Placement) -> None:
    """Raise UnavailableError unless the host has memory for the experts that it is to hold; say that it does."""
    num_layers = len(placement.is_on_card)
    num_on_host = num_layers - sum(placement.is_on_card)
    available, _ = available_bytes()
    if placement.host_bytes > available:
        raise UnavailableError(
            f"experts of {num_on_host} of {num_layers} layers do not fit the GPU and take "
            f"{placement.host_bytes / 2**30:.1f} GiB of the host's memory, of which {available / 2**30:.1f} GiB are "
            "free. Give more with --gpu-memory, free some, or use --backend cpu, which reads them from the disk."
        )
    _log.warning(
        "experts of %d of %d layers do not fit the GPU and stay in the host's memory, %.1f GiB: each pass fetches them",
        num_on_host,
        num_layers,
        placement.host_bytes / 2**30,
    )


def sequence_rungs(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of sequences that passes are filled up to: 1, 2, 4, then multiples of 8, the last one at the bound."""
    rungs = [rung for rung in (1, 2, 4, *range(8, max_num_seqs, 8)) if rung < max_num_seqs]
    return (*rungs, max_num_seqs)


def rung_of(batch: Batch, rungs: Sequence[int]) -> int | None:
    """The number of sequences that a pass is filled up to; None where one has several tokens, or they are too many."""
    num_sequences = len(batch.key_lengths_N)
    if len(batch.positions_T) > num_sequences:
        return None
    return next((rung for rung in rungs if rung >= num_sequences), None)


def table_width(num_blocks: int) -> int:
    """Blocks that tables are widened to: 32, 128, 512 and so on, since a pass is recorded for each width."""
    width = _LEAST_WIDTH
    while width < num_blocks:
        width *= 4
    return width


def pad(batch: Batch, num_sequences: int) -> Batch:
    """A batch of one token for each sequence, filled up with sequences without keys; every row's logits are asked for.

    The tables become one of the widths that there are graphs for; -1 stands where there is no block, so that tokens
    that fill up are stored nowhere.
    """
    num_more = num_sequences - len(batch.key_lengths_N)
    num_blocks = table_width(max(batch.full_table_NB.shape[1], batch.window_table_NB.shape[1]))

    def fill(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.pad(values, (0, num_more))

    def widen(table_NB: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.pad(table_NB, ((0, num_more), (0, num_blocks - table_NB.shape[1])), constant_values=-1)

    return replace(
        batch,
        token_ids_T=fill(batch.token_ids_T),
        positions_T=fill(batch.positions_T),
        query_starts_N1=np.arange(num_sequences + 1, dtype=np.int32),
        key_lengths_N=fill(batch.key_lengths_N),
        full_table_NB=widen(batch.full_table_NB),
        window_table_NB=widen(batch.window_table_NB),
        logit_rows_R=np.arange(num_sequences, dtype=np.int32),
    )


def pack(batch: Batch) -> npt.NDArray[np.int32]:
    """All arrays of a batch one after the other."""
    return np.concatenate([array.ravel() for array in _arrays(batch)])


def unpack(packed: Tensor, like: Batch) -> Batch:
    """The batch whose arrays are views of `packed`, with the shapes of another."""
    arrays = _arrays(like)
    pieces = torch.split(packed, [array.size for array in arrays])
    token_ids, positions, starts, lengths, full_table, window_table, logit_rows = (
        piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)
    )
    return Batch(token_ids, positions, starts, lengths, full_table, window_table, logit_rows)


def _arrays(batch: Batch) -> list[npt.NDArray[np.int32]]:
    return [
        batch.token_ids_T,
        batch.positions_T,
        batch.query_starts_N1,
        batch.key_lengths_N,
        batch.full_table_NB,
        batch.window_table_NB,
        batch.logit_rows_R,
    ]


class CardMemory(NamedTuple):
    """Bytes of a card: free, and all."""

    free: int
    total: int


def kv_memory(memory: CardMemory, allowed: int, config: ModelConfig, options: EngineConfig) -> int:
    """Bytes that keys and values may take once the weights are on the card; ``allowed`` 0: nearly all of it.

    Raises UnavailableError, with numbers, where the weights leave nothing.
    """
    left = room(memory, allowed, config, options)
    if left <= 0:
        used, limit = memory.total - memory.free, _limit(memory, allowed)
        raise UnavailableError(
            f"the model does not fit the GPU: {used / 2**30:.1f} GiB are in use with its weights, a pass needs "
            f"{(limit - used - left) / 2**30:.1f} GiB, and ossia may take {limit / 2**30:.1f} of "
            f"{memory.total / 2**30:.1f} GiB. Free the card of other programs, give more with --gpu-memory, or use "
            "--backend cpu."
        )
    return left


def room(memory: CardMemory, allowed: int, config: ModelConfig, options: EngineConfig) -> int:
    """Bytes of a card that are left beside what is in use and the largest pass; negative if there are too few."""
    used = memory.total - memory.free
    return _limit(memory, allowed) - used - work_bytes(config, options) - _CONTEXT_BYTES


def _limit(memory: CardMemory, allowed: int) -> int:
    return min(allowed, memory.total) if allowed else int(_DEFAULT_SHARE * memory.total)


def work_bytes(config: ModelConfig, options: EngineConfig) -> int:
    """Bytes of the largest pass: activations of its tokens, and logits of all sequences, computed and kept."""
    widths = config.num_heads * config.head_dim + config.hidden_size
    # Gate and up become hidden numbers of 2 bytes and come back as float32, for each expert of a token.
    of_experts = config.num_active_experts * (2 * config.intermediate_size + 4 * config.hidden_size)
    splits = 16 * 4 * config.num_heads * config.head_dim * options.max_num_seqs
    logits = 2 * 4 * config.vocab_size * options.max_num_seqs
    return options.max_batch_tokens * (8 * 4 * widths + 2 * of_experts) + splits + logits


def card_memory(device: torch.device) -> CardMemory:
    return CardMemory(*torch.cuda.mem_get_info(device))
