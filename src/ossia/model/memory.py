"""What a model needs of this machine's memory, and what there is of it.

Experts in MXFP4 are read where they lie in the mapped file: their pages are the system's, which takes them back when
memory is short and reads them again. What cannot be taken back is the process's own: 8-bit copies of the dense
matrices, keys and values, the program.
"""

from __future__ import annotations

import os
from pathlib import Path

from ossia.model.config import ModelConfig
from ossia.ops.control_group import memory_bounds

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


def own_bytes(shape: ModelConfig, dense: str, kv_memory: int) -> int:
    """What a model needs that the system cannot take back."""
    experts = shape.num_layers * shape.num_experts * 3 * shape.hidden_size * shape.intermediate_size * 17 / 32
    copies = weight_bytes(shape, dense) - int(experts) if dense == "q8" else 0
    return copies + kv_memory + PROGRAM_BYTES
