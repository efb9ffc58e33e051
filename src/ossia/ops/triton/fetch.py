"""Some rows of a stack that lies in the host's memory, chosen on the device: no word of which to the host.

The card reads pinned memory through its bus, by the pointer that the host has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of a program: as many loads are under way at once as hide the way to the host.
_BYTES = 16_384


def fetch(host: Tensor, out: Tensor, chosen_P: Tensor) -> None:
    """out[p] = host[chosen[p]] where that is not -1; both are contiguous and alike behind their first axis."""
    source, target = (stack.view(torch.uint8).view(len(stack), -1) for stack in (host, out))
    size = source.shape[1]
    _fetch[(len(chosen_P), triton.cdiv(size, _BYTES))](source, target, chosen_P, size, BYTES=_BYTES, num_warps=8)


@triton.jit
def _fetch(source, target, chosen, size, BYTES: tl.constexpr):
    row = tl.load(chosen + tl.program_id(0)).to(tl.int64)
    if row >= 0:
        byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
        values = tl.load(source + row * size + byte, byte < size, other=0)
        tl.store(target + tl.program_id(0).to(tl.int64) * size + byte, values, byte < size)
