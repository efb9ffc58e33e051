"""Q8_0, GGUF's format for dense matrices: 32 values of 8 bits share one float16 scale.

    number = value * scale        scale = largest magnitude / 127, values rounded to nearest, halves away from zero

Source: quantize_row_q8_0_ref of ggml.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ossia.errors import InputError
from ossia.ops import Q8

BLOCK = 32


def dequantize_q8(matrix: Q8, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The numbers [..., O, I] of a Q8_0 matrix."""
    numbers = matrix.values.astype(dtype) * matrix.scales.astype(dtype)[..., None]
    return numbers.reshape(matrix.shape)


def quantize_q8(values: npt.NDArray[Any], *, like: Q8 | None = None) -> Q8:
    """Numbers [..., I] as Q8_0 along the last axis. Blocks whose numbers equal those of ``like`` get its very bits.

    Numbers must be finite; a block beyond float16's range gets an infinite scale. Raises InputError when I is not a
    multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise InputError(f"Q8_0 needs a last axis that is a multiple of {BLOCK}, got shape {tuple(values.shape)}")
    x = values.astype(np.float32).reshape(*values.shape[:-1], -1, BLOCK)
    scales = np.abs(x).max(axis=-1) / np.float32(127)
    # The values are those of the scale before it is rounded to float16, as in ggml.
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    scaled = x * inverse[..., None]
    rounded = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
    # 0.5 is added exactly but for the number just below 0.5, which ggml's roundf takes down.
    rounded[np.abs(scaled) < 0.5] = 0
    with np.errstate(over="ignore"):
        quantized = Q8(rounded.astype(np.int8), scales.astype(np.float16))
    if like is None:
        return quantized
    same = (x == dequantize_q8(like).reshape(x.shape)).all(axis=-1)
    return Q8(np.where(same[..., None], like.values, quantized.values), np.where(same, like.scales, quantized.scales))
