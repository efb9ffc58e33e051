"""MXFP4, the number format of the experts: pack, unpack, quantise, exactly as the OCP specification says.

A block is 32 values of E2M1 (4 bits: sign, 2 exponent bits, 1 mantissa bit) and one scale of E8M0 (8 bits):

    value = (-1)^sign * {0, 0.5, 1, 1.5, 2, 3, 4, 6}[code & 7] * 2^(scale - 127)        scale 255 = NaN

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.3 (conversion).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ossia.errors import InputError
from ossia.ops import Mxfp4

BLOCK = 32
SCALE_BIAS = 127
SCALE_NAN = 255

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)
# The exponent of the largest power of two in E2M1, 4 = 2^2.
E2M1_MAX_EXPONENT = 2
# Midpoints between neighbouring magnitudes, and which neighbour has an even mantissa bit (0, 1, 2, 4 do): a value on a
# midpoint goes down when the lower neighbour is even, up when the upper one is.
_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float64)
_MIDPOINT_GOES_UP = np.array([False, True, False, True, False, True, False])

# Two float32 in one word, low nibble first: one look-up gives both values of a byte.
_BYTE_TO_PAIR = (
    np.stack([E2M1_VALUES[np.arange(256) & 15], E2M1_VALUES[np.arange(256) >> 4]], axis=1).view(np.uint64).squeeze(1)
)
_SCALES = np.append(np.ldexp(1.0, np.arange(SCALE_NAN) - SCALE_BIAS), np.nan)


def unpack_codes(blocks: npt.NDArray[np.uint8], order: str = "pairs") -> npt.NDArray[np.uint8]:
    """Nibbles uint8 [..., 16] of packed blocks to codes uint8 [..., 32]; see `Mxfp4` for the order."""
    low, high = blocks & 15, blocks >> 4
    if order == "pairs":
        return np.stack([low, high], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    return np.concatenate([low, high], axis=-1)


def pack_codes(codes: npt.NDArray[np.uint8], order: str = "pairs") -> npt.NDArray[np.uint8]:
    """Codes uint8 [..., 32] to packed blocks uint8 [..., 16]; the inverse of `unpack_codes`."""
    if order == "pairs":
        return np.bitwise_or(codes[..., 0::2], codes[..., 1::2] << 4, dtype=np.uint8)
    return np.bitwise_or(codes[..., :16], codes[..., 16:] << 4, dtype=np.uint8)


def dequantize(matrix: Mxfp4, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """The numbers [..., O, I] of an MXFP4 matrix, in float32 or float64.

    Exact, but for the values above float32's largest number, which become infinite there. A NaN scale makes its block
    NaN.
    """
    if matrix.order == "pairs":
        values = _BYTE_TO_PAIR[matrix.blocks].view(np.float32)
    else:
        values = E2M1_VALUES[unpack_codes(matrix.blocks, matrix.order)]
    # Exact also where a scale is subnormal in float32: a code has two significant bits.
    scales = _SCALES.astype(dtype)[matrix.scales]
    with np.errstate(over="ignore"):
        numbers = values.reshape(*matrix.scales.shape, BLOCK) * scales[..., None]
    return numbers.reshape(matrix.shape)


def quantize(values: npt.NDArray[np.floating]) -> Mxfp4:
    """Round numbers [..., I] to MXFP4 blocks along the last axis: to nearest, ties to even, magnitudes above 6 to 6.

    The scale is the largest power of two not above the block's largest magnitude, divided by 4. A block that holds a
    NaN or an infinity gets the NaN scale; a block of zeros scale 0. Raises InputError when I is not a multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise InputError(f"MXFP4 needs a last axis that is a multiple of {BLOCK}, got shape {tuple(values.shape)}")
    x = values.astype(np.float64).reshape(*values.shape[:-1], -1, BLOCK)
    largest = np.abs(x).max(axis=-1)
    finite = np.isfinite(largest)
    # frexp: largest = m 2^e with m in [0.5, 1), so floor(log2(largest)) is e - 1, exactly.
    exponent = np.frexp(np.where(finite, largest, 1.0))[1] - 1 - E2M1_MAX_EXPONENT
    exponent = np.where(largest == 0, -SCALE_BIAS, np.clip(exponent, -SCALE_BIAS, SCALE_BIAS))
    scaled = np.ldexp(np.where(finite[..., None], x, 0.0), -exponent[..., None])
    codes = _nearest_codes(np.abs(scaled)) | (np.signbit(scaled).astype(np.uint8) << 3)
    scales = np.where(finite, exponent + SCALE_BIAS, SCALE_NAN).astype(np.uint8)
    return Mxfp4(pack_codes(codes), scales)


def _nearest_codes(magnitudes: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    codes = np.zeros(magnitudes.shape, dtype=np.uint8)
    for midpoint, goes_up in zip(_MIDPOINTS, _MIDPOINT_GOES_UP, strict=True):
        codes += (magnitudes >= midpoint) if goes_up else (magnitudes > midpoint)
    return codes
