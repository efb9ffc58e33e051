"""How fast a model runs on a GPU, told as a share of what the card was measured to do in the same run.

The limits are a copy within the card's memory, whose bytes are read and written, and a product of square matrices in
the card's 16-bit type. A token's bytes are its active experts in MXFP4, dense matrices in 16 bits, and the keys and
values that it sees. How many experts a batch reads is counted by a pass of its own, over random tokens, since a pass
that is recorded for replay tells nothing of its routing.

Without a card it runs in Triton's interpreter, on tiny models; its numbers then mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ossia.engine.benchmark import (
    CountingOps,
    Measurement,
    expert_bytes,
    made_up_batch,
    measure_decode,
    measure_prefill,
)
from ossia.engine.config import EngineConfig
from ossia.engine.gpu_runner import GpuRunner, load_onto_card
from ossia.model.weights import Checkpoint
from ossia.ops.gpu import GpuOps

_REPEATS = 10


class CardBench:
    """A model on the card, and its passes timed."""

    def __init__(self, ops: GpuOps, checkpoint: Checkpoint, options: EngineConfig, gpu_memory: int = 0) -> None:
        """``gpu_memory``: most bytes of the card to take, 0 for nearly all. Raises UnavailableError if too small."""
        placed = load_onto_card(ops, checkpoint, options, gpu_memory)
        self._config = checkpoint.config
        # A little of the memory is for the passes that count experts.
        left = placed.options.kv_memory_bytes
        self._runner = GpuRunner(
            placed.ops, self._config, placed.weights, replace(placed.options, kv_memory_bytes=left * 7 // 8)
        )
        counted = replace(placed.options, kv_memory_bytes=left // 8, record_routing=True)
        self._counter = GpuRunner(placed.ops, self._config, placed.weights, counted)
        self._counting = CountingOps(placed.ops)
        _finish(ops.device)

    def decode(self, num_seqs: int, depth: int, *, num_steps: int) -> Measurement:
        """A token for each of ``num_seqs`` sequences that hold ``depth`` tokens.

        Raises InputError if the cache is too small for them.
        """
        # Kernels are compiled, and the pass recorded, before it is timed.
        measure_decode(self._runner, self._counting, num_seqs, depth, num_steps=2)
        one = measure_decode(self._runner, self._counting, num_seqs, depth, num_steps=num_steps)
        read = self._experts_read(num_seqs) * expert_bytes(self._config)
        return replace(one, bytes_per_pass=one.bytes_per_pass + read)

    def prefill(self, length: int, *, repeats: int) -> Measurement:
        """A prompt of ``length`` tokens; of its bytes the dense matrices alone are counted."""
        return measure_prefill(self._runner, self._counting, length, repeats=repeats)

    def _experts_read(self, num_seqs: int) -> int:
        """How many experts of all layers one token of each of so many sequences reads."""
        token_ids = np.random.default_rng(0).integers(0, self._config.vocab_size, (num_seqs, 1))
        batch = made_up_batch(self._counter, [0] * num_seqs, list(token_ids), is_last=True)
        self._counter.run(batch)
        experts_NLA = np.stack([self._counter.routing(table_B, 1)[0] for table_B in batch.full_table_NB])
        return sum(len(np.unique(experts_NLA[:, layer])) for layer in range(self._config.num_layers))


def card_limits(ops: GpuOps) -> dict[str, Any]:
    """The card by name, the kernels that it gets, and its measured limits in bytes and multiply-adds a second."""
    is_card = ops.device.type == "cuda"
    num_bytes, side = (1 << 30, 8192) if is_card else (1 << 24, 256)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=ops.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=ops.device).to(ops.dtype) for _ in "ab")
    return {
        "processor": torch.cuda.get_device_name(ops.device) if is_card else "no card: Triton's interpreter",
        "variant": ops.variant.name,
        "copy_bytes_per_s": 2 * num_bytes / _seconds(lambda: target.copy_(source), ops.device),
        "matrix_macs_per_s": side**3 / _seconds(lambda: a @ b, ops.device),
    }


def _seconds(action: Callable[[], Any], device: torch.device) -> float:
    """The median of some times; the first does not count."""
    taken = []
    for _ in range(_REPEATS + 1):
        started_s = time.perf_counter()
        action()
        _finish(device)
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken[1:])


def _finish(device: torch.device) -> None:
    """Wait for what the card still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
