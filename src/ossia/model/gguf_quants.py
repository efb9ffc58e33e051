"""GGUF's quantised dense matrices other than Q8_0, turned into Q8_0 when they are loaded.

Files of gpt-oss that are called Q4_K_M and the like may hold the experts in MXFP4, as they were published: then their
names speak of attention, embedding and unembedding. The kernels compute with 8 bits, so these few are unpacked, by the
`gguf` package, to what llama.cpp's own 8-bit files hold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ossia.ops import Q8
from ossia.ops.q8 import BLOCK, quantize_q8

# Blocks of 32 values whose first two bytes are a float16 scale and whose values are whole multiples of it.
_MULTIPLES = ("Q4_0", "Q5_0", "IQ4_NL")
# Values of a matrix that one thread unpacks at a time.
_CHUNK_VALUES = 1 << 20


def to_q8(dtype: str, blocks: npt.NDArray[np.uint8], shape: Sequence[int]) -> Q8:
    """A matrix of ``shape`` [O, I] in the type ``dtype`` of GGUF, from its bytes [O, bytes of a row].

    Of Q4_0, Q5_0 and IQ4_NL the numbers are the same; of the other types they are rounded, by at most 1/254 of the
    largest magnitude among 32 neighbours. A block that is not finite gets a scale that is not.
    """
    num_rows, num_inputs = shape
    matrix = Q8(
        np.empty((num_rows, num_inputs // BLOCK, BLOCK), np.int8), np.empty((num_rows, num_inputs // BLOCK), np.float16)
    )

    def unpack(start: int) -> None:
        rows = slice(start, start + step)
        values, scales = _unpacked(dtype, blocks[rows])
        matrix.values[rows], matrix.scales[rows] = values, scales

    step = max(1, _CHUNK_VALUES // num_inputs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(unpack, range(0, num_rows, step)))
    return matrix


def _unpacked(dtype: str, blocks: npt.NDArray[np.uint8]) -> Q8:
    # Slow to import, and few files need it.
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        numbers = dequantize(blocks, GGMLQuantizationType[dtype])
        if dtype not in _MULTIPLES:
            return quantize_q8(numbers)
        block_bytes = blocks.shape[-1] * BLOCK // numbers.shape[-1]
        scales = blocks.reshape(len(blocks), -1, block_bytes)[..., :2].copy().view(np.float16)[..., 0]
        steps = np.where(scales == 0, 1, scales).astype(np.float32)[..., None]
        return Q8(np.rint(numbers.reshape(*scales.shape, BLOCK) / steps).astype(np.int8), scales)
