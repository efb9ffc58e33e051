"""The mixture of experts as two grouped products: pairs of token and expert, sorted by expert, times packed matrices.

    sort            pairs by expert, and which tile of which expert a program computes: no word of it to the host
    gate and up     h[s,f] = swiglu(gate[e,f,d] x[s/A,d] + gate_bias, up[e,f,d] x[s/A,d] + up_bias)     e = expert of s
    down            y[s,d] = down[e,d,f] h[s,f] + down_bias[e,d]
    combine         o[t,d] = sum over a of w[t,a] y[t A + a,d]

Matrices are read where they lie: MXFP4 as the checkpoint's bytes, numbers in any strides. A byte holds two values. They
are not brought beside each other: the inputs that meet low nibbles and those that meet high nibbles are two tiles of x,
whose products are added.

Shapes   S pairs of token and expert ("slots"), s = t A + a; the rest in `ossia.ops`. M, O, I: tokens, outputs and
         inputs of a tile; B blocks of 32 inputs in it, I / 32; C bytes of a block, 16.
Sources  MXFP4: `ossia.ops.mxfp4`. SwiGLU: `ossia.ops.Ops.moe`. Grouped products over sorted tokens: MegaBlocks,
         arXiv:2211.15841.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.ops import SWIGLU_ALPHA
from ossia.ops.triton.choice import Tiling, Unpacking
from ossia.ops.triton.tile import TRITON_DTYPES, device, dot, e2m1, e8m0

_ALPHA = tl.constexpr(SWIGLU_ALPHA)
# Slots that are sorted at a time: as many times the experts are compared at once.
_SORTED_SLOTS = 64


class Matrices(NamedTuple):
    """A stack of matrices [E, O, I] on the device: numbers, or MXFP4's bytes."""

    values: Tensor  # [E, O, I], or uint8 [E, O, I/32, 16]
    scales: Tensor | None = None  # uint8 [E, O, I/32]
    # Whether a block's low nibbles are its first half (GGUF), and not its even values.
    is_halves: bool = False

    @property
    def num_outputs(self) -> int:
        return self.values.shape[1]

    @property
    def num_inputs(self) -> int:
        return self.values.shape[2] * (1 if self.scales is None else 32)


class Schedule(NamedTuple):
    """Slots in the order of their experts, and the tiles that cover them."""

    slots_S: Tensor
    # Of each program's tile: expert (-1: none), and the first and the last but one place in `slots_S`.
    tiles_3N: Tensor
    tiling: Tiling
    num_active: int


def schedule(experts_TA: Tensor, num_experts: int, tiling: Tiling) -> Schedule:
    """Sort the slots of a batch. Launches one program; as many tiles are planned as the worst routing needs."""
    num_slots = experts_TA.numel()
    # Each expert that has tokens may have one tile that is not full.
    num_tiles = num_slots // tiling.tokens + min(num_slots, num_experts)
    slots_S = torch.empty(num_slots, dtype=torch.int32, device=experts_TA.device)
    tiles_3N = torch.empty((3, num_tiles), dtype=torch.int32, device=experts_TA.device)
    _sort[(1,)](
        experts_TA,
        slots_S,
        tiles_3N,
        num_slots,
        num_tiles,
        TOKENS=tiling.tokens,
        E=triton.next_power_of_2(num_experts),
        S=_SORTED_SLOTS,
    )
    return Schedule(slots_S, tiles_3N, tiling, experts_TA.shape[1])


def gate_up(
    x_TD: Tensor,
    plan: Schedule,
    gate: Matrices,
    up: Matrices,
    gate_bias_EF: Tensor,
    up_bias_EF: Tensor,
    limit: float,
    unpacking: Unpacking,
    dtype: torch.dtype,
    changes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """hidden_SF in ``dtype``. ``changes``: what adapters add to gate and up of each slot, float32 [S, F]."""
    assert gate.values.stride() == up.values.stride() and gate.is_halves == up.is_halves
    hidden_SF = torch.empty((len(plan.slots_S), gate.num_outputs), dtype=dtype, device=x_TD.device)
    tiling = plan.tiling
    grid = (plan.tiles_3N.shape[1], triton.cdiv(gate.num_outputs, tiling.outputs))
    _gate_up[grid](
        x_TD,
        hidden_SF,
        plan.slots_S,
        plan.tiles_3N,
        gate.values,
        _scales(gate),
        up.values,
        _scales(up),
        gate_bias_EF,
        up_bias_EF,
        *(changes or (hidden_SF, hidden_SF)),
        grid[0],
        gate.num_inputs,
        gate.num_outputs,
        plan.num_active,
        limit,
        *_strides(gate),
        CHANGED=changes is not None,
        UNPACKING=_unpacking(gate, unpacking),
        HALVES=gate.is_halves,
        DTYPE=TRITON_DTYPES[dtype],
        TOKENS=tiling.tokens,
        OUTPUTS=tiling.outputs,
        INPUTS=_tile_inputs(gate, unpacking, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return hidden_SF


def grouped(
    x: Tensor,
    plan: Schedule,
    matrices: Matrices,
    bias_EO: Tensor | None,
    unpacking: Unpacking,
    dtype: torch.dtype,
    *,
    by_token: bool = False,
) -> Tensor:
    """y_SO, float32: each slot's row of x [S, I], or its token's row of x [T, I], times its expert's matrix."""
    out_SO = torch.empty((len(plan.slots_S), matrices.num_outputs), dtype=torch.float32, device=x.device)
    tiling = plan.tiling
    grid = (plan.tiles_3N.shape[1], triton.cdiv(matrices.num_outputs, tiling.outputs))
    _grouped[grid](
        x,
        out_SO,
        plan.slots_S,
        plan.tiles_3N,
        matrices.values,
        _scales(matrices),
        out_SO if bias_EO is None else bias_EO,
        grid[0],
        matrices.num_inputs,
        matrices.num_outputs,
        plan.num_active if by_token else 1,
        *_strides(matrices),
        BIASED=bias_EO is not None,
        UNPACKING=_unpacking(matrices, unpacking),
        HALVES=matrices.is_halves,
        DTYPE=TRITON_DTYPES[dtype],
        TOKENS=tiling.tokens,
        OUTPUTS=tiling.outputs,
        INPUTS=_tile_inputs(matrices, unpacking, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out_SO


def combine(y_SD: Tensor, weights_TA: Tensor) -> Tensor:
    """out_TD, float32: the weighted results of a token's experts, added in the order of its routing."""
    (num_tokens, num_active), size = weights_TA.shape, y_SD.shape[1]
    out_TD = torch.empty((num_tokens, size), dtype=torch.float32, device=y_SD.device)
    width = min(1024, triton.next_power_of_2(size))
    _combine[(num_tokens, triton.cdiv(size, width))](y_SD, weights_TA, out_TD, size, num_active, D=width)
    return out_TD


def _scales(matrices: Matrices) -> Tensor:
    # A kernel of numbers takes no scales, but some pointer.
    return matrices.values if matrices.scales is None else matrices.scales


def _strides(matrices: Matrices) -> tuple[int, ...]:
    """Of the values by expert, output and input (or block), then of the scales."""
    return (*matrices.values.stride()[:3], *_scales(matrices).stride()[:3])


def _unpacking(matrices: Matrices, wanted: Unpacking) -> str:
    if matrices.scales is None:
        return "none"
    # The matrix units know the published order of nibbles alone.
    return "registers" if wanted == "dot_scaled" and matrices.is_halves else wanted


def _tile_inputs(matrices: Matrices, unpacking: Unpacking, tiling: Tiling) -> int:
    return 32 if _unpacking(matrices, unpacking) == "sums" else tiling.inputs


@triton.jit
def _sort(experts, slots, tiles, num_slots, num_tiles, TOKENS: tl.constexpr, E: tl.constexpr, S: tl.constexpr):
    e_E, s_S = tl.arange(0, E), tl.arange(0, S)
    count_E = tl.zeros((E,), tl.int32)
    for start in range(0, num_slots, S):
        # An expert beyond the last stands for the slots beyond the last.
        expert_S = tl.load(experts + start + s_S, start + s_S < num_slots, other=E)
        count_E += tl.sum((expert_S[:, None] == e_E[None, :]).to(tl.int32), 0)
    first_E = tl.cumsum(count_E, 0) - count_E
    place_E = first_E
    for start in range(0, num_slots, S):
        expert_S = tl.load(experts + start + s_S, start + s_S < num_slots, other=E)
        hit_SE = (expert_S[:, None] == e_E[None, :]).to(tl.int32)
        place_SE = place_E[None, :] + tl.cumsum(hit_SE, 0) - hit_SE
        place_S = tl.sum(hit_SE * place_SE, 1)
        tl.store(slots + place_S, start + s_S, start + s_S < num_slots)
        place_E += tl.sum(hit_SE, 0)
    num_tiles_E = (count_E + TOKENS - 1) // TOKENS
    tile_end_E = tl.cumsum(num_tiles_E, 0)
    for start in range(0, num_tiles, S):
        tile_S = start + s_S
        is_own_SE = (tile_S[:, None] < tile_end_E[None, :]) & (tile_S[:, None] >= (tile_end_E - num_tiles_E)[None, :])
        own_SE = is_own_SE.to(tl.int32)
        expert_S = tl.sum(own_SE * (e_E[None, :] + 1), 1) - 1
        nth_SE = tile_S[:, None] - (tile_end_E - num_tiles_E)[None, :]
        first_S = tl.sum(own_SE * (first_E[None, :] + nth_SE * TOKENS), 1)
        end_S = tl.minimum(first_S + TOKENS, tl.sum(own_SE * (first_E + count_E)[None, :], 1))
        is_there = tile_S < num_tiles
        tl.store(tiles + tile_S, expert_S, is_there)
        tl.store(tiles + num_tiles + tile_S, first_S, is_there)
        tl.store(tiles + 2 * num_tiles + tile_S, end_S, is_there)


@triton.jit
def _gate_up(
    x,
    hidden,
    slots,
    tiles,
    gate,
    gate_scales,
    up,
    up_scales,
    gate_bias,
    up_bias,
    gate_change,
    up_change,
    num_tiles,
    num_inputs,
    num_outputs,
    num_active,
    limit,
    stride_e,
    stride_o,
    stride_i,
    scale_stride_e,
    scale_stride_o,
    scale_stride_i,
    CHANGED: tl.constexpr,
    UNPACKING: tl.constexpr,
    HALVES: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    expert = tl.load(tiles + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        slot_M, is_row_M = _slots(slots, tiles, num_tiles, TOKENS)
        token_M = slot_M // num_active
        o_O = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        is_output_O = o_O < num_outputs
        row_O = expert * stride_e + o_O * stride_o
        scale_row_O = expert * scale_stride_e + o_O * scale_stride_o
        gate_MO = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        up_MO = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        # gate[m,o] = x[m,i] w[o,i], and up likewise, of one tile of x
        for start in range(0, num_inputs, INPUTS):
            low_MI, high_MI = _inputs(x, token_M, is_row_M, start, num_inputs, UNPACKING, HALVES, TOKENS, INPUTS)
            at = (is_output_O, start, num_inputs, stride_i, scale_stride_i)
            gate_MO = _add(gate_MO, low_MI, high_MI, gate + row_O, gate_scales + scale_row_O, at, UNPACKING, DTYPE)
            up_MO = _add(up_MO, low_MI, high_MI, up + row_O, up_scales + scale_row_O, at, UNPACKING, DTYPE)
        gate_MO += tl.load(gate_bias + expert * num_outputs + o_O, is_output_O, other=0.0)[None, :]
        up_MO += tl.load(up_bias + expert * num_outputs + o_O, is_output_O, other=0.0)[None, :]
        place_MO = slot_M[:, None] * num_outputs + o_O[None, :]
        is_there_MO = is_row_M[:, None] & is_output_O[None, :]
        if CHANGED:
            gate_MO += tl.load(gate_change + place_MO, is_there_MO, other=0.0)
            up_MO += tl.load(up_change + place_MO, is_there_MO, other=0.0)
        # A comparison lets NaN pass, where a minimum would hide it.
        gate_MO = tl.where(gate_MO > limit, limit, gate_MO)
        up_MO = tl.where(up_MO > limit, limit, up_MO)
        up_MO = tl.where(up_MO < -limit, -limit, up_MO)
        hidden_MO = gate_MO / (1 + tl.exp(gate_MO * -_ALPHA)) * (up_MO + 1)
        tl.store(hidden + place_MO, hidden_MO.to(DTYPE), is_there_MO)


@triton.jit
def _grouped(
    x,
    out,
    slots,
    tiles,
    weights,
    scales,
    bias,
    num_tiles,
    num_inputs,
    num_outputs,
    slots_per_row,
    stride_e,
    stride_o,
    stride_i,
    scale_stride_e,
    scale_stride_o,
    scale_stride_i,
    BIASED: tl.constexpr,
    UNPACKING: tl.constexpr,
    HALVES: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    expert = tl.load(tiles + tl.program_id(0)).to(tl.int64)
    if expert >= 0:
        slot_M, is_row_M = _slots(slots, tiles, num_tiles, TOKENS)
        row_M = slot_M // slots_per_row
        o_O = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        is_output_O = o_O < num_outputs
        row_O = weights + expert * stride_e + o_O * stride_o
        scale_row_O = scales + expert * scale_stride_e + o_O * scale_stride_o
        out_MO = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        # out[m,o] = x[m,i] w[o,i]
        for start in range(0, num_inputs, INPUTS):
            low_MI, high_MI = _inputs(x, row_M, is_row_M, start, num_inputs, UNPACKING, HALVES, TOKENS, INPUTS)
            at = (is_output_O, start, num_inputs, stride_i, scale_stride_i)
            out_MO = _add(out_MO, low_MI, high_MI, row_O, scale_row_O, at, UNPACKING, DTYPE)
        if BIASED:
            out_MO += tl.load(bias + expert * num_outputs + o_O, is_output_O, other=0.0)[None, :]
        place_MO = slot_M[:, None] * num_outputs + o_O[None, :]
        tl.store(out + place_MO, out_MO, is_row_M[:, None] & is_output_O[None, :])


@triton.jit
def _combine(y, weights, out, size, num_active, D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * D + tl.arange(0, D)
    out_D = tl.zeros((D,), tl.float32)
    # out[t,d] = w[t,a] y[t A + a,d]
    for a in range(num_active):
        slot = token * num_active + a
        out_D += tl.load(weights + slot) * tl.load(y + slot * size + d_D, d_D < size, other=0.0)
    tl.store(out + token * size + d_D, out_D, d_D < size)


# Tiles ---------------------------------------------------------------------------------------------------------------


@device
def _slots(slots, tiles, num_tiles, TOKENS: tl.constexpr):
    """The slots of this program's tile, and which of its rows there are."""
    first = tl.load(tiles + num_tiles + tl.program_id(0))
    end = tl.load(tiles + 2 * num_tiles + tl.program_id(0))
    place_M = first + tl.arange(0, TOKENS)
    return tl.load(slots + place_M, place_M < end, other=0).to(tl.int64), place_M < end


@device
def _inputs(
    x,
    row_M,
    is_row_M,
    start,
    num_inputs,
    UNPACKING: tl.constexpr,
    HALVES: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A tile of x: inputs that meet the low nibbles and those that meet the high ones of bytes; else all, twice."""
    if UNPACKING == "none" or UNPACKING == "dot_scaled":
        i_I = start + tl.arange(0, INPUTS)
        is_there_MI = is_row_M[:, None] & (i_I < num_inputs)[None, :]
        x_MI = tl.load(x + row_M[:, None] * num_inputs + i_I[None, :], is_there_MI, other=0.0)
        return x_MI, x_MI
    else:
        b_B, c_C = start // 32 + tl.arange(0, INPUTS // 32), tl.arange(0, 16)
        low_BC = 32 * b_B[:, None] + (c_C if HALVES else 2 * c_C)[None, :]
        low = x + row_M[:, None, None] * num_inputs + low_BC[None, :, :]
        is_there_MBC = is_row_M[:, None, None] & (low_BC < num_inputs)[None, :, :]
        low_MBC = tl.load(low, is_there_MBC, other=0.0)
        high_MBC = tl.load(low + (16 if HALVES else 1), is_there_MBC, other=0.0)
        return tl.reshape(low_MBC, (TOKENS, INPUTS // 2)), tl.reshape(high_MBC, (TOKENS, INPUTS // 2))


@device
def _add(sums_MO, low_MI, high_MI, row_O, scale_row_O, at, UNPACKING: tl.constexpr, DTYPE: tl.constexpr):
    """sums[m,o] + x[m,i] w[o,i] of one tile; ``row_O`` and ``scale_row_O`` point to rows of the matrix."""
    # Triton goes on behind a branch that returned: only branches that exclude each other end a function.
    if UNPACKING == "none":
        return _add_numbers(sums_MO, low_MI, row_O, at, DTYPE)
    elif UNPACKING == "dot_scaled":
        return _add_scaled(sums_MO, low_MI, row_O, scale_row_O, at)
    else:
        return _add_packed(sums_MO, low_MI, high_MI, row_O, scale_row_O, at, UNPACKING, DTYPE)


@device
def _add_numbers(sums_MO, x_MI, row_O, at, DTYPE: tl.constexpr):
    is_output_O, start, num_inputs, stride_i, _ = at
    i_I = start + tl.arange(0, x_MI.shape[1])
    is_there_IO = (i_I < num_inputs)[:, None] & is_output_O[None, :]
    w_IO = tl.load(row_O[None, :] + i_I[:, None] * stride_i, is_there_IO, other=0.0)
    return dot(x_MI, w_IO, sums_MO, DTYPE)


@device
def _add_packed(sums_MO, low_MI, high_MI, row_O, scale_row_O, at, UNPACKING: tl.constexpr, DTYPE: tl.constexpr):
    is_output_O, start, num_inputs, stride_b, scale_stride_b = at
    OUTPUTS: tl.constexpr = sums_MO.shape[1]
    HALF: tl.constexpr = low_MI.shape[1]
    b_B, c_C = start // 32 + tl.arange(0, HALF // 16), tl.arange(0, 16)
    is_there_OB = is_output_O[:, None] & (b_B < num_inputs // 32)[None, :]
    packed = row_O[:, None, None] + b_B[None, :, None] * stride_b + c_C[None, None, :]
    bytes_OBC = tl.load(packed, is_there_OB[:, :, None], other=0)
    scale_OB = e8m0(tl.load(scale_row_O[:, None] + b_B[None, :] * scale_stride_b, is_there_OB, other=0))
    low_OBC, high_OBC = e2m1(bytes_OBC & 15), e2m1(bytes_OBC >> 4)
    if UNPACKING == "sums":
        # Codes are exact in every dtype; the one scale of a row's 32 inputs is applied to their sum.
        products_MO = dot(low_MI, tl.trans(tl.reshape(low_OBC, (OUTPUTS, HALF))), tl.zeros_like(sums_MO), DTYPE)
        products_MO = dot(high_MI, tl.trans(tl.reshape(high_OBC, (OUTPUTS, HALF))), products_MO, DTYPE)
        return sums_MO + products_MO * tl.reshape(scale_OB, (OUTPUTS,))[None, :]
    else:
        low_w_OBC = low_OBC.to(tl.float32) * scale_OB[:, :, None]
        high_w_OBC = high_OBC.to(tl.float32) * scale_OB[:, :, None]
        sums_MO = dot(low_MI, tl.trans(tl.reshape(low_w_OBC, (OUTPUTS, HALF))), sums_MO, DTYPE)
        return dot(high_MI, tl.trans(tl.reshape(high_w_OBC, (OUTPUTS, HALF))), sums_MO, DTYPE)


@device
def _add_scaled(sums_MO, x_MI, row_O, scale_row_O, at):
    is_output_O, start, num_inputs, stride_b, scale_stride_b = at
    # Two values in each byte, the even one in its low nibble.
    byte_I = start // 2 + tl.arange(0, x_MI.shape[1] // 2)
    is_there_IO = (byte_I < num_inputs // 2)[:, None] & is_output_O[None, :]
    bytes_IO = tl.load(row_O[None, :] + (byte_I // 16 * stride_b + byte_I % 16)[:, None], is_there_IO, other=0)
    b_B = start // 32 + tl.arange(0, x_MI.shape[1] // 32)
    is_there_OB = is_output_O[:, None] & (b_B < num_inputs // 32)[None, :]
    scale_OB = tl.load(scale_row_O[:, None] + b_B[None, :] * scale_stride_b, is_there_OB, other=0)
    return tl.dot_scaled(x_MI.to(tl.bfloat16), None, "bf16", bytes_IO, scale_OB, "e2m1", sums_MO)
