"""What precedes attention where tokens are few, in one kernel: norm; q, k and v; rope; keys and values to the cache.

A program has some pairs of one head, and reads of the three matrices the rows of their first and of their second
numbers alone. It norms the tokens by itself: they are few, and their bytes are little beside those of the rows.

Shapes   see `ossia.ops`; each token is the last one of its sequence. M tokens, P pairs and I inputs of a tile.
Sources  `ossia.ops.triton.fused`, for norm and rope.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.ops import Batch
from ossia.ops.triton.attention import LayerCache
from ossia.ops.triton.tile import TRITON_DTYPES, dot

# The smallest tile of a matrix unit.
_TOKENS, _PAIRS = 16, 16
_INPUTS = 128


class Projection(NamedTuple):
    weight_OD: Tensor
    bias_O: Tensor | None


def qkv(
    x_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    projections: tuple[Projection, Projection, Projection],
    rope: tuple[Tensor, Tensor],
    cache: LayerCache,
    batch: Batch,
    table_NB: Tensor,
) -> Tensor:
    """q_TQH, float32, rotated; k, rotated, and v go to their blocks, those of tokens whose block is -1 nowhere.

    The three matrices have a bias and are of one dtype, in which they are multiplied.
    """
    q, k, v = projections
    (num_tokens, size), (_, num_kv_heads, block_size, head_dim) = x_TD.shape, cache.k_BKSH.shape
    num_heads, num_pairs = q.weight_OD.shape[0] // head_dim, head_dim // 2
    q_TQH = torch.empty((num_tokens, num_heads, head_dim), dtype=torch.float32, device=x_TD.device)
    grid = (num_heads + 2 * num_kv_heads, triton.cdiv(num_pairs, _PAIRS), triton.cdiv(num_tokens, _TOKENS))
    _qkv[grid](
        x_TD,
        norm_D,
        eps,
        q.weight_OD,
        k.weight_OD,
        v.weight_OD,
        q.bias_O,
        k.bias_O,
        v.bias_O,
        *rope,
        q_TQH,
        *cache,
        table_NB,
        batch.positions_T,
        num_tokens,
        size,
        num_heads,
        num_kv_heads,
        num_pairs,
        table_NB.shape[1],
        block_size,
        DTYPE=TRITON_DTYPES[q.weight_OD.dtype],
        M=_TOKENS,
        P=_PAIRS,
        I=_INPUTS,
        num_warps=4,
        num_stages=3,
    )
    return q_TQH


@triton.jit
def _qkv(
    x,
    norm,
    eps,
    q_weight,
    k_weight,
    v_weight,
    q_bias,
    k_bias,
    v_bias,
    cos,
    sin,
    q_out,
    k_cache,
    v_cache,
    table,
    positions,
    num_tokens,
    size,
    num_heads,
    num_kv_heads,
    num_pairs,
    num_blocks,
    block_size,
    DTYPE: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
):
    head = tl.program_id(0)
    p_P = tl.program_id(1) * P + tl.arange(0, P)
    t_M = tl.program_id(2) * M + tl.arange(0, M)
    is_pair_P, is_token_M = p_P < num_pairs, t_M < num_tokens
    x_row_M = x + t_M.to(tl.int64) * size
    squares_M = tl.zeros((M,), tl.float32)
    for start in range(0, size, I):
        i_I = start + tl.arange(0, I)
        x_MI = tl.load(x_row_M[:, None] + i_I[None, :], is_token_M[:, None] & (i_I < size)[None, :], other=0.0)
        squares_M += tl.sum(x_MI * x_MI, 1)
    root_M = tl.sqrt(squares_M / size + eps)

    own, weight, bias, out = head, q_weight, q_bias, k_cache
    if head >= num_heads:
        own, weight, bias = head - num_heads, k_weight, k_bias
    if head >= num_heads + num_kv_heads:
        own, weight, bias, out = head - num_heads - num_kv_heads, v_weight, v_bias, v_cache
    row_P = own * 2 * num_pairs + p_P
    first_MP = tl.zeros((M, P), tl.float32)
    second_MP = tl.zeros((M, P), tl.float32)
    # first[m,p] = x[m,i] / root[m] norm[i] w[p,i], and second likewise
    for start in range(0, size, I):
        i_I = start + tl.arange(0, I)
        x_MI = tl.load(x_row_M[:, None] + i_I[None, :], is_token_M[:, None] & (i_I < size)[None, :], other=0.0)
        x_MI = x_MI / root_M[:, None] * tl.load(norm + i_I, i_I < size, other=0.0)[None, :]
        w_IP = weight + row_P.to(tl.int64)[None, :] * size + i_I[:, None]
        is_there_IP = (i_I < size)[:, None] & is_pair_P[None, :]
        first_MP = dot(x_MI, tl.load(w_IP, is_there_IP, other=0.0), first_MP, DTYPE)
        second_MP = dot(x_MI, tl.load(w_IP + num_pairs * size, is_there_IP, other=0.0), second_MP, DTYPE)
    first_MP += tl.load(bias + row_P, is_pair_P, other=0.0)[None, :]
    second_MP += tl.load(bias + row_P + num_pairs, is_pair_P, other=0.0)[None, :]
    is_there_MP = is_token_M[:, None] & is_pair_P[None, :]
    if head < num_heads + num_kv_heads:
        angle_MP = t_M[:, None] * num_pairs + p_P[None, :]
        cos_MP = tl.load(cos + angle_MP, is_there_MP, other=0.0)
        sin_MP = tl.load(sin + angle_MP, is_there_MP, other=0.0)
        turned_MP = first_MP * cos_MP - second_MP * sin_MP
        second_MP = second_MP * cos_MP + first_MP * sin_MP
        first_MP = turned_MP
    if head < num_heads:
        q_MP = q_out + ((t_M.to(tl.int64) * num_heads + own) * 2 * num_pairs)[:, None] + p_P[None, :]
        tl.store(q_MP, first_MP, is_there_MP)
        tl.store(q_MP + num_pairs, second_MP, is_there_MP)
    else:
        position_M = tl.load(positions + t_M, is_token_M, other=0)
        block_M = tl.load(table + t_M * num_blocks + position_M // block_size, is_token_M, other=-1).to(tl.int64)
        slot_M = (block_M * num_kv_heads + own) * block_size + position_M % block_size
        cached_MP = out + (slot_M * 2 * num_pairs)[:, None] + p_P[None, :]
        is_held_MP = (block_M >= 0)[:, None] & is_pair_P[None, :]
        tl.store(cached_MP, first_MP.to(out.dtype.element_ty), is_held_MP)
        tl.store(cached_MP + num_pairs, second_MP.to(out.dtype.element_ty), is_held_MP)
