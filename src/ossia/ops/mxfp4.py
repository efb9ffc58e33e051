"""MXFP4, the number format of the experts: pack, unpack, quantise, exactly as the OCP specification says.

A block is 32 values of E2M1 (4 bits: sign, 2 exponent bits, 1 mantissa bit) and one scale of E8M0 (8 bits):

    value = (-1)^sign * {0, 0.5, 1, 1.5, 2, 3, 4, 6}[code & 7] * 2^(scale - 127)        scale 255 = NaN

Numbers are rounded to the nearest value, ties to the even code, magnitudes beyond the largest to the largest. What is
left to choose is a block's scale, by one of two rules:

    "floor"   the specification's: the largest power of two not above the block's largest magnitude, divided by 4.
              Magnitudes above 6 (up to 8) are then cut to 6
    "best"    the scale with the least sum of squared errors. It is the floor's, the next or the one before: further up
              the grid is a part of the next one's, further down more is cut off than rounding can give back

Relative error (root of squared errors over squared numbers) of a million numbers: normally distributed 0.1150 by
"floor" and 0.1116 by "best"; uniform up to a power of two 0.144 and 0.0988; Laplace 0.1269 and 0.1227. What was on the
grid comes back unchanged by both.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (E2M1), 5.4.1 (E8M0) and 6.3 (conversion).
"""

from __future__ import annotations

from typing import Any, Literal

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


ScaleRule = Literal["floor", "best"]

# Numbers that are rounded at a time: their temporaries stay in a core's cache.
_CHUNK_BLOCKS = 4096


def quantize(values: npt.NDArray[Any], rule: ScaleRule = "best", *, like: Mxfp4 | None = None) -> Mxfp4:
    """Round numbers [..., I] to MXFP4 blocks along the last axis, in the order "pairs".

    Blocks whose rounded numbers equal those of ``like``, a matrix of the same shape, get its very bits: the same
    numbers can often be written with two scales, and zeros with two signs. A block that holds a NaN or an infinity gets
    the NaN scale, a block of zeros scale 0. Raises InputError when I is not a multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise InputError(f"MXFP4 needs a last axis that is a multiple of {BLOCK}, got shape {tuple(values.shape)}")
    if like is not None and like.shape != values.shape:
        raise InputError(f"numbers of shape {tuple(values.shape)} cannot be like MXFP4 of shape {like.shape}")
    shape = (*values.shape[:-1], values.shape[-1] // BLOCK)
    x_B32 = values.reshape(-1, BLOCK)
    blocks, scales = np.empty((len(x_B32), BLOCK // 2), np.uint8), np.empty(len(x_B32), np.uint8)
    for start in range(0, len(x_B32), _CHUNK_BLOCKS):
        chunk = slice(start, start + _CHUNK_BLOCKS)
        # bfloat16 and float16 widen without a loss.
        numbers_B32 = x_B32[chunk].astype(np.float64 if x_B32.dtype == np.float64 else np.float32)
        codes, scales[chunk] = _quantize(numbers_B32, rule)
        blocks[chunk] = pack_codes(codes)
    quantized = Mxfp4(blocks.reshape(*shape, BLOCK // 2), scales.reshape(shape))
    return quantized if like is None else _keep_equal_blocks(quantized, like)


def reorder(matrix: Mxfp4, order: Literal["pairs", "halves"]) -> Mxfp4:
    """The same matrix with its nibbles in another order."""
    if matrix.order == order:
        return matrix
    low, high = matrix.blocks & 15, matrix.blocks >> 4
    blocks = np.empty_like(low)
    if order == "halves":
        # The first eight bytes hold values 0 to 15: the even ones in low nibbles, the odd ones in high nibbles.
        blocks[..., 0::2] = low[..., :8] | (low[..., 8:] << 4)
        blocks[..., 1::2] = high[..., :8] | (high[..., 8:] << 4)
    else:
        blocks[..., :8] = low[..., 0::2] | (low[..., 1::2] << 4)
        blocks[..., 8:] = high[..., 0::2] | (high[..., 1::2] << 4)
    return Mxfp4(blocks, matrix.scales, order)


def _quantize(x_B32: npt.NDArray[Any], rule: ScaleRule) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Codes [B, 32] and scales [B] of float32 or float64 numbers. Every step is one rounding-free or elementwise IEEE
    operation in a fixed order, so that `ossia.train.quantize` reaches the same bits in torch."""
    magnitudes_B32 = np.abs(x_B32)
    largest_B = magnitudes_B32.max(axis=-1)
    finite_B = np.isfinite(largest_B)
    if not finite_B.all():
        magnitudes_B32[~finite_B] = 0
        largest_B = np.where(finite_B, largest_B, 0)
    # frexp: largest = m 2^e with m in [0.5, 1), so floor(log2(largest)) is e - 1, exactly.
    floor_B = np.frexp(largest_B)[1] - 1 - E2M1_MAX_EXPONENT
    exponent_B = np.where(largest_B == 0, -SCALE_BIAS, np.clip(floor_B, -SCALE_BIAS, SCALE_BIAS))
    scaled_B32 = _scaled(magnitudes_B32, exponent_B)
    codes = _nearest_codes(scaled_B32)
    if rule == "best":
        # Numbers beyond the largest scale have errors that may overflow: there is nothing to choose for them.
        with np.errstate(over="ignore"):
            _choose_better_scales(scaled_B32, codes, exponent_B)
    codes |= np.signbit(x_B32).view(np.uint8) << 3
    codes[~finite_B] &= 8
    return codes, np.where(finite_B, exponent_B + SCALE_BIAS, SCALE_NAN).astype(np.uint8)


def _choose_better_scales(
    scaled_B32: npt.NDArray[Any], codes: npt.NDArray[np.uint8], exponent_B: npt.NDArray[np.int32]
) -> None:
    """Give blocks the neighbouring scale where it is strictly better; an exact block keeps its scale.

    Everything is counted in the unit of the floor's scale. The next scale can only win where its 8 is nearer to the
    largest number than 6 is, the one before only where the largest, cut to its 6 = 3, does not lose all by itself.
    """
    largest_B = scaled_B32.max(axis=-1)
    error_B = _squared_error(scaled_B32, codes)
    may_win = {1: largest_B > 7, -1: error_B > (largest_B - 3) * (largest_B - 3)}
    for step, may_win_B in may_win.items():
        (rows,) = np.nonzero(may_win_B & (np.abs(exponent_B + step) <= SCALE_BIAS))
        # Powers of two: exact in either direction.
        unit = scaled_B32.dtype.type(2.0**step)
        candidate = scaled_B32[rows] / unit
        candidate_codes = _nearest_codes(candidate)
        candidate_error = _squared_error(candidate, candidate_codes) * (unit * unit)
        better = candidate_error < error_B[rows]
        codes[rows[better]] = candidate_codes[better]
        exponent_B[rows[better]] += step
        error_B[rows[better]] = candidate_error[better]


def _scaled(magnitudes_B32: npt.NDArray[Any], exponent_B: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    return magnitudes_B32 * np.ldexp(magnitudes_B32.dtype.type(1), -exponent_B)[:, None]


def _nearest_codes(magnitudes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Codes are steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6: the least of the three counts is the right one, and
    rounding halves to even counts rounds ties to even codes."""
    codes = np.rint(magnitudes + magnitudes)
    np.minimum(codes, np.rint(magnitudes) + 2, out=codes)
    np.minimum(codes, np.rint(magnitudes * 0.5) + 4, out=codes)
    return np.minimum(codes, 7, out=codes).astype(np.uint8)


def _squared_error(magnitudes_B32: npt.NDArray[Any], codes: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    difference = magnitudes_B32 - E2M1_VALUES[codes]
    total = difference * difference
    # Halves are added to halves: an order of additions that every library keeps.
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def _keep_equal_blocks(quantized: Mxfp4, like: Mxfp4) -> Mxfp4:
    # In float64 no number of either is infinite.
    same = dequantize(quantized, np.float64) == dequantize(like, np.float64)
    same = same.reshape(*quantized.scales.shape, BLOCK).all(axis=-1)
    blocks = np.where(same[..., None], reorder(like, "pairs").blocks, quantized.blocks)
    return Mxfp4(blocks, np.where(same, like.scales, quantized.scales))
