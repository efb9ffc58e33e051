"""Training under MXFP4: what the experts will be once they are exported, with a gradient that passes straight through.

    forward    the number that `ossia.ops.mxfp4.quantize` and `dequantize` make of each weight, to the bit
    backward   the identity: a weight learns as if it had not been rounded (straight-through estimator)

The rounding is the same few IEEE operations in the same order as in numpy, so that a model is trained with the very
weights that `ossia export --format mxfp4` writes, on every device that keeps subnormal numbers. float32 on a CPU is
rounded by a kernel in C++, everything else by torch.

Source of the estimator: Bengio, Léonard, Courville, arXiv:1308.3432, section 4.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ossia import _kernels
from ossia.errors import InputError
from ossia.ops.mxfp4 import BLOCK, E2M1_MAX_EXPONENT, E2M1_VALUES, SCALE_BIAS, ScaleRule

# Numbers that are rounded at a time, so that temporaries stay small beside a layer's experts.
_CHUNK_VALUES = 1 << 24


def fake_quantize(weight: Tensor, rule: ScaleRule = "best") -> Tensor:
    """Weights [..., I] as MXFP4 holds them along the last axis, in the same dtype; the gradient passes unchanged.

    ``rule`` chooses scales as in `ossia.ops.mxfp4`; `ossia export` writes by "best". A block with a NaN or an infinity
    becomes NaN. Raises InputError when I is not a multiple of 32.
    """
    if weight.shape[-1] % BLOCK:
        raise InputError(f"MXFP4 needs a last axis that is a multiple of {BLOCK}, got shape {tuple(weight.shape)}")
    rounded: Tensor = _StraightThrough.apply(weight, rule)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rule: ScaleRule) -> Tensor:
        x_B32 = weight.detach().contiguous().view(-1, BLOCK)
        out_B32 = torch.empty_like(x_B32)
        if rule == "best" and weight.dtype == torch.float32 and weight.device.type == "cpu":
            _kernels_of(torch.get_num_threads()).round_mxfp4(x_B32.view(-1).numpy(), out_B32.view(-1).numpy())
            return out_B32.view(weight.shape)
        step = _CHUNK_VALUES // BLOCK
        for start in range(0, len(x_B32), step):
            chunk = x_B32[start : start + step]
            numbers = chunk if chunk.dtype == torch.float64 else chunk.float()
            out_B32[start : start + step] = rounded_by_torch(numbers, rule)
        return out_B32.reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


@cache
def _kernels_of(num_threads: int) -> _kernels.Context:
    return _kernels.Context(_kernels.best_isa(), num_threads)


def rounded_by_torch(x_B32: Tensor, rule: ScaleRule = "best") -> Tensor:
    """Blocks [B, 32] as `ossia.ops.mxfp4`, step by step; without indices that a GPU would have to wait for."""
    magnitudes = x_B32.abs()
    largest_B = magnitudes.amax(dim=-1)
    finite_B = largest_B.isfinite()
    magnitudes = magnitudes.where(finite_B[:, None], 0.0)
    largest_B = largest_B.where(finite_B, 0.0)
    floor_B = torch.frexp(largest_B).exponent - 1 - E2M1_MAX_EXPONENT
    exponent_B = floor_B.clamp(-SCALE_BIAS, SCALE_BIAS).where(largest_B != 0, -SCALE_BIAS)
    scaled = magnitudes * _power_of_two(-exponent_B, magnitudes.dtype)[:, None]
    numbers = _nearest(scaled)
    if rule == "best":
        largest_B, error_B = scaled.amax(dim=-1), _squared_error(scaled, numbers)
        chosen, chosen_error_B = numbers, error_B
        may_win = {1: largest_B > 7, -1: error_B > (largest_B - 3) * (largest_B - 3)}
        for step, may_win_B in may_win.items():
            unit = 2.0**step
            candidate = scaled / unit
            candidate_numbers = _nearest(candidate)
            candidate_error_B = _squared_error(candidate, candidate_numbers) * (unit * unit)
            inside_B = (exponent_B + step).abs() <= SCALE_BIAS
            better_B = may_win_B & inside_B & (candidate_error_B < chosen_error_B)
            # Still in the unit of the floor's scale, where every number is exact.
            chosen = torch.where(better_B[:, None], candidate_numbers * unit, chosen)
            chosen_error_B = torch.where(better_B, candidate_error_B, chosen_error_B)
        numbers = chosen
    numbers = numbers * _power_of_two(exponent_B, numbers.dtype)[:, None]
    return torch.copysign(numbers, x_B32).where(finite_B[:, None], torch.nan)


def _nearest(magnitudes: Tensor) -> Tensor:
    """The magnitude of E2M1 that is nearest, ties to the even code."""
    codes = torch.minimum((magnitudes + magnitudes).round(), magnitudes.round() + 2)
    codes = torch.minimum(codes, (magnitudes * 0.5).round() + 4).clamp(max=7)
    table = torch.from_numpy(E2M1_VALUES[:8]).to(magnitudes.device, magnitudes.dtype)
    return table[codes.int()]


def _squared_error(magnitudes: Tensor, numbers: Tensor) -> Tensor:
    difference = magnitudes - numbers
    total = difference * difference
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def _power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=dtype), exponents)
