"""What a model needs of this machine's memory, and what there is of it.

Experts in MXFP4 are read where they lie in the mapped file: their pages are the system's, which takes them back when
memory is short and reads them again. What cannot be taken back is the process's own: 8-bit copies of the dense
matrices, keys and values, the program.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

from ossia.model.config import ModelConfig
from ossia.model.gguf_file import QUANTISED_NAMES
from ossia.model.safetensors_file import TensorEntry
from ossia.ops.control_group import memory_bounds

# Interpreter, libraries, buffers, and the two tables' pages that are in use.
PROGRAM_BYTES = 400 << 20


class HeldBytes(NamedTuple):
    """What the file of a checkpoint says of its size in memory."""

    # Its experts, None for MXFP4; and what of its dense matrices is unpacked to 8 bits, whatever is asked for.
    experts: int | None = None
    unpacked: int = 0

    @classmethod
    def of(cls, tensors: Mapping[str, TensorEntry]) -> Self:
        # The stacks of all experts of a layer are the tensors with more than two dimensions.
        experts = sum(one.size_bytes for one in tensors.values() if len(one.shape) > 2)
        packed = [prod(one.shape) for one in tensors.values() if one.dtype in QUANTISED_NAMES]
        return cls(experts, sum(packed) * 34 // 32)


MXFP4_EXPERTS = HeldBytes()


def weight_bytes(shape: ModelConfig, dense: str, held: HeldBytes = MXFP4_EXPERTS) -> int:
    """What the weights of a model take in memory: experts as they lie in the file, and the dense matrices.

    The embedding table is left out: one row is read for each token.
    """
    return _expert_bytes(shape, held) + _dense_bytes(shape, dense, held)


def _expert_bytes(shape: ModelConfig, held: HeldBytes) -> int:
    if held.experts is not None:
        return held.experts
    # MXFP4 is 17 bytes for 32 weights.
    return shape.num_layers * shape.num_experts * 3 * shape.hidden_size * shape.intermediate_size * 17 // 32


def _dense_bytes(shape: ModelConfig, dense: str, held: HeldBytes) -> int:
    heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    matrices = shape.num_layers * shape.hidden_size * heads + shape.vocab_size * shape.hidden_size
    routers = shape.num_layers * shape.num_experts * shape.hidden_size * 2
    # 8-bit weights are 34 bytes for 32.
    return int(matrices * (34 / 32 if dense == "q8" or held.unpacked else 2)) + routers


def available_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Free memory and all memory, bounded by the control groups that this process is in.

    What the system keeps of files in memory counts as free. ``root`` is where the system's files are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        available, total = sizes["MemAvailable"], sizes["MemTotal"]
    except OSError:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        available = total = pages * size
    for bound in memory_bounds(root):
        total, available = min(total, bound.limit), min(available, max(bound.left, 0))
    return available, total


def own_bytes(shape: ModelConfig, dense: str, kv_memory: int, held: HeldBytes = MXFP4_EXPERTS) -> int:
    """What a model needs that the system cannot take back."""
    copies = _dense_bytes(shape, dense, held) if dense == "q8" else held.unpacked
    return copies + kv_memory + PROGRAM_BYTES
