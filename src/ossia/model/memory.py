"""What a model needs of this machine's memory, and what there is of it.

Experts in MXFP4 are read where they lie in the mapped file: their pages are the system's, which takes them back when
memory is short and reads them again. What cannot be taken back is the process's own: 8-bit copies of the dense
matrices, keys and values, the program.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ossia.model.config import ModelConfig

# Interpreter, libraries, buffers, and the two tables' pages that are in use.
PROGRAM_BYTES = 400 << 20


def weight_bytes(shape: ModelConfig, dense: str) -> int:
    """What the weights of a model take in memory: experts as they lie in the file, and the dense matrices.

    The embedding table is left out: one row is read for each token.
    """
    # MXFP4 is 17 bytes for 32 weights, and so are 34 bytes of 8-bit weights.
    expert = 3 * shape.hidden_size * shape.intermediate_size * 17 / 32
    heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    matrices = shape.num_layers * shape.hidden_size * heads + shape.vocab_size * shape.hidden_size
    routers = shape.num_layers * shape.num_experts * shape.hidden_size * 2
    return int(shape.num_layers * shape.num_experts * expert + matrices * (34 / 32 if dense == "q8" else 2) + routers)


def available_bytes() -> tuple[int, int]:
    """Free memory and all memory, bounded by the control group that this process is in."""
    available = total = 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        available, total = sizes["MemAvailable"], sizes["MemTotal"]
    except OSError:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        available = total = pages * size
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            bound = int(Path("/sys/fs/cgroup", limit).read_text())
            left = bound - int(Path("/sys/fs/cgroup", used).read_text())
            if bound < total:
                total, available = bound, min(available, max(left, 0))
    return available, total


def own_bytes(shape: ModelConfig, dense: str, kv_memory: int) -> int:
    """What a model needs that the system cannot take back."""
    experts = shape.num_layers * shape.num_experts * 3 * shape.hidden_size * shape.intermediate_size * 17 / 32
    copies = weight_bytes(shape, dense) - int(experts) if dense == "q8" else 0
    return copies + kv_memory + PROGRAM_BYTES
