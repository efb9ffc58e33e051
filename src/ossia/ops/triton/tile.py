"""What kernels share: products of tiles, and MXFP4 as numbers.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)
TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
Function = TypeVar("Function", bound=Callable[..., Any])


def device(function: Function) -> Function:
    """A function that kernels call."""
    # Interpreted it is called as it is: the interpreter would prepare its language anew for each call.
    return function if INTERPRETED else triton.jit(function)


@device
def dot(a, b, sums, DTYPE: tl.constexpr):
    """sums + a b, with operands rounded to DTYPE and sums in float32."""
    a, b = a.to(DTYPE), b.to(DTYPE)
    if _INTERPRETED:
        # The interpreter would multiply the bits of bfloat16 as integers.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@device
def e2m1(codes):
    """Codes of 4 bits (sign, 2 bits of exponent, 1 of mantissa) as float16, exactly."""
    # At the same places of a float16 the bits mean 2^-14 times as much, zero and the half included.
    bits = ((codes & 8).to(tl.uint16) << 12) | ((codes & 7).to(tl.uint16) << 9)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@device
def e8m0(scales):
    """Scale bytes as float32: 2^(byte - 127), NaN for 255."""
    bits = scales.to(tl.uint32) << 23
    # 2^-127 is no normal number.
    bits = tl.where(scales == 0, 0x00400000, bits)
    bits = tl.where(scales == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)
