"""How fast a model runs here, told as a share of what this machine's memory and arithmetic allow.

A pass is made up and not served: sequences of any depth are laid out in the cache without computing their prompts, and
token ids are random, so that the experts chosen are as varied as in a real batch. The bytes that a pass must read are
counted from what it did: the experts that its tokens went to, every dense matrix once, the keys and values in reach.

Sources  The method of counting is that of a roofline: Williams, Waterman, Patterson, CACM 52(4), 2009.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ossia.engine.runner import Runner
from ossia.errors import InputError
from ossia.model.config import ModelConfig
from ossia.ops import Array, Batch, Ops, Routing

# A byte of scale for 32 values of half a byte.
_MXFP4_BYTES = 17 / 32
# A float16 scale for 32 values of one byte.
_Q8_BYTES = 34 / 32
_BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the table: what was run, how fast, and how much of it is the machine's limit."""

    name: str
    num_seqs: int
    depth: int
    tokens_per_s: float
    # Bytes that one pass must read, and multiply-adds of its matrix products.
    bytes_per_pass: float
    macs_per_pass: float
    seconds_per_pass: float

    def share_of_bandwidth(self, bytes_per_s: float) -> float:
        return self.bytes_per_pass / self.seconds_per_pass / bytes_per_s

    def share_of_arithmetic(self, macs_per_s: float) -> float:
        return self.macs_per_pass / self.seconds_per_pass / macs_per_s


class CountingOps:
    """A backend that counts the experts that each pass reads, layer by layer; else the backend itself."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.num_experts_read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, logits_TE: Array, num_active: int) -> Routing:
        routing = self._ops.route(logits_TE, num_active)
        self.num_experts_read += len(np.unique(routing.experts_TA))
        return routing


def first_pass(runner: Runner, length: int = 32, *, seed: int = 0) -> None:
    """Compute a prompt up to the logits of the next token: what a fresh model must do before it can answer."""
    token_ids = np.random.default_rng(seed).integers(0, runner.config.vocab_size, length)
    runner.run(made_up_batch(runner, [0], [token_ids], is_last=True))


def measure_prefill(runner: Runner, ops: CountingOps, length: int, *, repeats: int = 3, seed: int = 0) -> Measurement:
    """Compute a prompt of ``length`` tokens in chunks of ``max_batch_tokens``; the median of ``repeats``.

    A first chunk is not timed: it maps the checkpoint's pages and takes the memory that later passes have already.
    Raises InputError, before anything is computed, if the cache is too small for it.
    """
    _check_room(runner, [length - 1], [length])
    chunk = runner.options.max_batch_tokens
    rng = np.random.default_rng(seed)
    first_pass(runner, min(chunk, length), seed=seed + 1)
    seconds = []
    for _ in range(repeats):
        token_ids = rng.integers(0, runner.config.vocab_size, length)
        ops.num_experts_read = 0
        started_s = time.perf_counter()
        for start in range(0, length, chunk):
            _finish(
                runner,
                made_up_batch(runner, [start], [token_ids[start : start + chunk]], is_last=start + chunk >= length),
            )
        seconds.append(time.perf_counter() - started_s)
    elapsed_s = statistics.median(seconds)
    config = runner.config
    macs = length * macs_per_token(config) + config.hidden_size * config.vocab_size
    num_chunks = -(-length // chunk)
    num_bytes = dense_bytes(config, ops) * num_chunks + ops.num_experts_read * expert_bytes(config)
    return Measurement(f"prefill {length}", 1, 0, length / elapsed_s, num_bytes, macs, elapsed_s)


def measure_decode(
    runner: Runner, ops: CountingOps, num_seqs: int, depth: int, *, num_steps: int = 16, seed: int = 0
) -> Measurement:
    """One token for each of ``num_seqs`` sequences that hold ``depth`` tokens already; the median of ``num_steps``.

    Raises InputError, before anything is computed, if the cache is too small for them.
    """
    last = depth + num_steps - 1
    _check_room(runner, [last], [last + 1], num_copies=num_seqs)
    rng = np.random.default_rng(seed)
    seconds, num_experts = [], []
    for step in range(num_steps):
        token_ids = rng.integers(0, runner.config.vocab_size, (num_seqs, 1))
        batch = made_up_batch(runner, [depth + step] * num_seqs, list(token_ids), is_last=True)
        ops.num_experts_read = 0
        started_s = time.perf_counter()
        _finish(runner, batch)
        seconds.append(time.perf_counter() - started_s)
        num_experts.append(ops.num_experts_read)
    elapsed_s = statistics.median(seconds)
    config = runner.config
    num_bytes = (
        dense_bytes(config, ops)
        + config.vocab_size * config.hidden_size * _dense_bytes_per_weight(ops)
        + statistics.mean(num_experts) * expert_bytes(config)
        + num_seqs * key_value_bytes(config, ops, depth)
    )
    macs = num_seqs * (macs_per_token(config) + config.hidden_size * config.vocab_size)
    name = f"decode x{num_seqs}" if num_seqs > 1 else f"decode at {depth}"
    return Measurement(name, num_seqs, depth, num_seqs / elapsed_s, num_bytes, macs, elapsed_s)


def _finish(runner: Runner, batch: Batch) -> None:
    """Run a pass to its end: a card has only then done its work when something of it has come back."""
    runner.to_host(runner.run(batch)[:, :1])


def macs_per_token(config: ModelConfig) -> int:
    """Multiply-adds of one token's matrix products in all layers; the unembedding is not among them."""
    return config.num_layers * (
        _attention_weights(config)
        + config.num_active_experts * _expert_weights(config)
        + config.num_experts * config.hidden_size
    )


def dense_bytes(config: ModelConfig, ops: Any) -> float:
    """Bytes of the dense matrices of all layers: attention, and the router, which stays bfloat16."""
    router = config.num_experts * config.hidden_size * _BF16_BYTES
    return config.num_layers * (_attention_weights(config) * _dense_bytes_per_weight(ops) + router)


def expert_bytes(config: ModelConfig) -> float:
    """Bytes of one expert of one layer in MXFP4."""
    return _expert_weights(config) * _MXFP4_BYTES


def key_value_bytes(config: ModelConfig, ops: Any, depth: int) -> float:
    """Bytes of the keys and values that the token at position ``depth`` of a sequence looks at."""
    per_token = ops.kv_block_bytes(1, config.num_kv_heads, config.head_dim)
    windows = (config.window(i) for i in range(config.num_layers))
    return float(sum(per_token * min(depth + 1, window or depth + 1) for window in windows))


def _attention_weights(config: ModelConfig) -> int:
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.hidden_size * (2 * q_rows + 2 * kv_rows)


def _expert_weights(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def _dense_bytes_per_weight(ops: Any) -> float:
    return _Q8_BYTES if getattr(ops, "dense", "bf16") == "q8" else _BF16_BYTES


def made_up_batch(runner: Runner, starts: Sequence[int], token_ids: Sequence[Any], *, is_last: bool) -> Batch:
    """A pass over sequences that already hold ``starts`` tokens each; blocks are dealt out anew for every pass.

    Raises InputError if the cache is too small for them.
    """
    size = runner.options.block_size
    lengths = [len(own) for own in token_ids]
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    _check_room(runner, starts, ends)
    num_columns = -(-max(ends) // size)
    window = runner.config.sliding_window
    full_table = np.full((len(starts), num_columns), -1, np.int32)
    window_table = np.full((len(starts), num_columns), -1, np.int32)
    next_full = next_window = 0
    for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
        columns = np.arange(-(-end // size))
        full_table[n, : len(columns)] = next_full + columns
        next_full += len(columns)
        seen = columns[max(0, start - window + 1) // size :]
        window_table[n, seen] = next_window + np.arange(len(seen))
        next_window += len(seen)
    query_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    return Batch(
        token_ids_T=np.concatenate(token_ids).astype(np.int32),
        positions_T=positions.astype(np.int32),
        query_starts_N1=query_starts,
        key_lengths_N=np.array(ends, np.int32),
        full_table_NB=full_table,
        window_table_NB=window_table,
        logit_rows_R=query_starts[1:] - 1 if is_last else np.empty(0, np.int32),
    )


def _check_room(runner: Runner, starts: Sequence[int], ends: Sequence[int], num_copies: int = 1) -> None:
    """Raises InputError if the cache is too small for so many copies of sequences from ``starts`` to ``ends``."""
    size, window = runner.options.block_size, runner.config.sliding_window
    num_full = num_copies * sum(-(-end // size) for end in ends)
    num_window = num_full - num_copies * sum(max(0, start - window + 1) // size for start in starts)
    if num_full > runner.num_blocks.full or num_window > runner.num_blocks.window:
        raise InputError(
            f"{len(starts) * num_copies} sequences of {max(ends)} tokens need {num_full} blocks of {size} tokens; the "
            f"cache has {runner.num_blocks.full}. Give more with --kv-memory."
        )
