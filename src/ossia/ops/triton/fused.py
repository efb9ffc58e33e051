"""Elementwise kernels: root mean square norm, rotary positions, the top experts. One program for one token.

Shapes   see `ossia.ops`.
Sources  RMSNorm, arXiv:1910.07467; rotary embedding, arXiv:2104.09864; router: gpt-oss model card, arXiv:2508.10925.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale, float32."""
    num_tokens, size = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    _rms_norm[(num_tokens,)](x_TD, scale_D, out_TD, size, eps, D=triton.next_power_of_2(size))
    return out_TD


def rope(x_TQH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate the first half of each head against the second half, in place."""
    num_tokens, num_heads, head_dim = x_TQH.shape
    heads, pairs = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim // 2)
    _rope[(num_tokens,)](x_TQH, cos_TP, sin_TP, num_heads, head_dim // 2, Q=heads, P=pairs)
    return x_TQH


def route(logits_TE: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    """(experts_TA int32, weights_TA float32): the highest logits, equal ones by lower index, NaN last."""
    num_tokens, num_experts = logits_TE.shape
    experts_TA = torch.empty((num_tokens, num_active), dtype=torch.int32, device=logits_TE.device)
    weights_TA = torch.empty((num_tokens, num_active), dtype=torch.float32, device=logits_TE.device)
    experts, active = triton.next_power_of_2(num_experts), triton.next_power_of_2(num_active)
    _route[(num_tokens,)](logits_TE, experts_TA, weights_TA, num_experts, num_active, E=experts, A=active)
    return experts_TA, weights_TA


@triton.jit
def _rms_norm(x, scale, out, size, eps, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size
    d_D = tl.arange(0, D)
    x_D = tl.load(x + row + d_D, d_D < size, other=0.0)
    scale_D = tl.load(scale + d_D, d_D < size, other=0.0)
    mean_square = tl.sum(x_D * x_D, 0) / size
    tl.store(out + row + d_D, x_D / tl.sqrt(mean_square + eps) * scale_D, d_D < size)


@triton.jit
def _rope(x, cos, sin, num_heads, num_pairs, Q: tl.constexpr, P: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    q_Q, p_P = tl.arange(0, Q), tl.arange(0, P)
    cos_P = tl.load(cos + token * num_pairs + p_P, p_P < num_pairs, other=0.0)[None, :]
    sin_P = tl.load(sin + token * num_pairs + p_P, p_P < num_pairs, other=0.0)[None, :]
    first = x + (token * num_heads + q_Q[:, None]) * 2 * num_pairs + p_P[None, :]
    is_there = (q_Q[:, None] < num_heads) & (p_P[None, :] < num_pairs)
    first_QP = tl.load(first, is_there, other=0.0)
    second_QP = tl.load(first + num_pairs, is_there, other=0.0)
    tl.store(first, first_QP * cos_P - second_QP * sin_P, is_there)
    tl.store(first + num_pairs, second_QP * cos_P + first_QP * sin_P, is_there)


@triton.jit
def _route(logits, experts, weights, num_experts, num_active, E: tl.constexpr, A: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    e_E, a_A = tl.arange(0, E), tl.arange(0, A)
    logit_E = tl.load(logits + token * num_experts + e_E, e_E < num_experts, other=float("-inf"))
    # What is not a number comes behind all that is, and before what was taken already.
    rank_E = tl.where((logit_E == logit_E) & (logit_E > -3.0e38), logit_E, -3.0e38)
    rank_E = tl.where(e_E < num_experts, rank_E, float("-inf"))
    expert_A = tl.zeros((A,), tl.int32)
    chosen_A = tl.full((A,), float("-inf"), tl.float32)
    for a in range(num_active):
        best = tl.argmax(rank_E, 0, tie_break_left=True)
        expert_A = tl.where(a_A == a, best, expert_A)
        chosen_A = tl.where(a_A == a, tl.sum(tl.where(e_E == best, logit_E, 0.0), 0), chosen_A)
        rank_E = tl.where(e_E == best, float("-inf"), rank_E)
    weight_A = tl.exp(chosen_A - tl.max(chosen_A, 0))
    weight_A = tl.where(a_A < num_active, weight_A, 0.0)
    weight_A = weight_A / tl.sum(weight_A, 0)
    tl.store(experts + token * num_active + a_A, expert_A, a_A < num_active)
    tl.store(weights + token * num_active + a_A, weight_A, a_A < num_active)
