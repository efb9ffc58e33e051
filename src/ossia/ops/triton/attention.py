"""Causal attention over paged keys and values, with sinks and windows: one kernel for prompts and for single tokens.

    store      k and v of the batch's tokens, each to its block and slot
    attend     a program has some tokens of one sequence, all query heads of one key head, and a range of the keys:
               prompts one range with all keys, single tokens several ranges ("splits"), so that one sequence fills a
               card; a window's keys are few, and one range
    merge      the splits of a token, and the sink, to its output

Prompts and sequences that have a single token are launched apart: what a single token's programs do depends on its own
number of keys alone, not on what else is in the batch.

Shapes   see `ossia.ops`. L splits; M rows of a program: tokens times the heads of a group; J keys of a tile.
Sources  FlashAttention-2, arXiv:2307.08691; Flash-Decoding (splits over keys); PagedAttention, arXiv:2309.06180; sinks:
         gpt-oss model card, arXiv:2508.10925.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.ops import Batch
from ossia.ops.triton.choice import Variant
from ossia.ops.triton.tile import TRITON_DTYPES, device, dot

# The smallest side of a matrix unit's tile.
_MIN_ROWS = 16
# Scores are counted in powers of two.
_LOG2_E = tl.constexpr(math.log2(math.e))


class LayerCache(NamedTuple):
    """Keys and values of one layer: a head's slots of a block lie beside each other."""

    k_BKSH: Tensor
    v_BKSH: Tensor


def store(k_TKH: Tensor, v_TKH: Tensor, cache: LayerCache, batch: Batch, table_NB: Tensor) -> None:
    """Write keys and values of the batch's tokens; tokens whose block is -1 are left out."""
    num_tokens, num_heads, head_dim = k_TKH.shape
    _store[(num_tokens,)](
        k_TKH,
        v_TKH,
        cache.k_BKSH,
        cache.v_BKSH,
        table_NB,
        batch.query_starts_N1,
        batch.positions_T,
        table_NB.shape[0],
        table_NB.shape[1],
        num_heads,
        cache.k_BKSH.shape[2],
        head_dim,
        N=triton.next_power_of_2(table_NB.shape[0]),
        K=triton.next_power_of_2(num_heads),
        H=triton.next_power_of_2(head_dim),
    )


def attend(
    q_TQH: Tensor,
    keys: LayerCache | tuple[Tensor, Tensor],
    sinks_Q: Tensor,
    batch: Batch,
    table_NB: Tensor,
    window: int | None,
    variant: Variant,
    dtype: torch.dtype,
) -> Tensor:
    """o_TQH, float32. ``keys``: a cache, which has those of the batch already, or (k_TKH, v_TKH), which are all.

    Each sequence has a token or more in the batch.
    """
    (num_tokens, num_heads, head_dim), num_sequences = q_TQH.shape, len(batch.key_lengths_N)
    is_paged = isinstance(keys, LayerCache)
    k, v = keys
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    heads = triton.next_power_of_2(group)
    out_TQH = torch.empty_like(q_TQH)
    num_splits = variant.attention_splits if window is None else 1
    parts, sums = out_TQH, (out_TQH, out_TQH)
    if num_splits > 1:
        parts = q_TQH.new_empty((num_splits, num_sequences, num_heads, head_dim))
        sums = q_TQH.new_empty(parts.shape[:3]), q_TQH.new_empty(parts.shape[:3])

    def launch(is_single: bool, num_tiles: int, tokens: int, heads: int, splits: int) -> None:
        _attend[(num_tiles, num_kv_heads, splits)](
            q_TQH,
            k,
            v,
            sinks_Q,
            out_TQH if splits == 1 else parts,
            *sums,
            table_NB,
            batch.query_starts_N1,
            batch.key_lengths_N,
            num_sequences,
            table_NB.shape[1],
            num_heads,
            group,
            head_dim,
            k.shape[2] if is_paged else 0,
            # Of keys and values alike: between blocks, between heads, between slots.
            *(k.stride()[:3] if is_paged else (0, head_dim, num_kv_heads * head_dim)),
            0 if window is None else window,
            _LOG2_E.value / math.sqrt(head_dim),
            SINGLE=is_single,
            PAGED=is_paged,
            WINDOWED=window is not None,
            SPLITS=splits,
            DTYPE=TRITON_DTYPES[dtype],
            N=triton.next_power_of_2(num_sequences),
            TOKENS=tokens,
            HEADS=heads,
            H=max(_MIN_ROWS, triton.next_power_of_2(head_dim)),
            J=variant.attention_keys,
            num_warps=4,
        )

    launch(True, num_sequences, 1, max(_MIN_ROWS, heads), num_splits)
    if num_tokens > num_sequences:
        tokens = max(1, max(_MIN_ROWS, variant.attention_rows) // heads)
        launch(False, num_tokens // tokens + num_sequences, tokens, heads, 1)
    if num_splits > 1:
        _merge[(num_sequences, num_heads)](
            parts,
            *sums,
            sinks_Q,
            out_TQH,
            batch.query_starts_N1,
            num_sequences,
            num_heads,
            head_dim,
            L=num_splits,
            H=triton.next_power_of_2(head_dim),
        )
    return out_TQH


@triton.jit
def _store(
    k,
    v,
    k_cache,
    v_cache,
    table,
    starts,
    positions,
    num_sequences,
    num_blocks,
    num_heads,
    block_size,
    head_dim,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
):
    token = tl.program_id(0)
    n_N = tl.arange(0, N)
    # Sequences without tokens end where they start, and are passed.
    end_N = tl.load(starts + 1 + n_N, n_N < num_sequences, other=2**31 - 1)
    sequence = tl.sum((end_N <= token).to(tl.int32), 0)
    position = tl.load(positions + token)
    block = tl.load(table + sequence * num_blocks + position // block_size).to(tl.int64)
    k_K, h_H = tl.arange(0, K), tl.arange(0, H)
    is_there_KH = (k_K < tl.where(block < 0, 0, num_heads))[:, None] & (h_H < head_dim)[None, :]
    own_KH = (token.to(tl.int64) * num_heads + k_K)[:, None] * head_dim + h_H[None, :]
    place_KH = ((block * num_heads + k_K) * block_size + position % block_size)[:, None] * head_dim + h_H[None, :]
    key_KH, value_KH = tl.load(k + own_KH, is_there_KH, other=0.0), tl.load(v + own_KH, is_there_KH, other=0.0)
    tl.store(k_cache + place_KH, key_KH.to(k_cache.dtype.element_ty), is_there_KH)
    tl.store(v_cache + place_KH, value_KH.to(v_cache.dtype.element_ty), is_there_KH)


@triton.jit
def _attend(
    q,
    k,
    v,
    sinks,
    out,
    peaks,
    totals,
    table,
    starts,
    lengths,
    num_sequences,
    num_blocks,
    num_heads,
    group,
    head_dim,
    block_size,
    stride_block,
    stride_head,
    stride_slot,
    window,
    scale,
    SINGLE: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLITS: tl.constexpr,
    DTYPE: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
):
    kv_head, split = tl.program_id(1), tl.program_id(2)
    sequence, first = _own_tokens(starts, num_sequences, SINGLE, TOKENS, N)
    if sequence < num_sequences:
        start = tl.load(starts + sequence)
        num_new = tl.load(starts + sequence + 1) - start
        length = tl.load(lengths + sequence)
        old = length - num_new
        # Row m is one head of one token of the tile. A sequence's tokens are its last ones.
        m_M, h_H = tl.arange(0, TOKENS * HEADS), tl.arange(0, H)
        new_M, head_M = first + m_M // HEADS, kv_head * group + m_M % HEADS
        is_row_M = (new_M < num_new) & (m_M % HEADS < group)
        is_query_MH = is_row_M[:, None] & (h_H < head_dim)[None, :]
        row_M = (start + new_M).to(tl.int64) * num_heads + head_M
        q_MH = tl.load(q + row_M[:, None] * head_dim + h_H[None, :], is_query_MH, other=0.0)

        # Keys of this program: from the first that its first token sees to the last that its last token sees.
        low, high = 0, tl.minimum(length, old + first + TOKENS)
        if not PAGED:
            low = old
        if WINDOWED:
            low = tl.maximum(low, old + first - window + 1)
        if SPLITS > 1:
            split_keys = ((length + SPLITS - 1) // SPLITS + J - 1) // J * J
            low = tl.maximum(low, split * split_keys)
            high = tl.minimum(high, (split + 1) * split_keys)
        at = (table + sequence * num_blocks, start - old, block_size, stride_block, stride_slot, head_dim)
        k += kv_head * stride_head
        v += kv_head * stride_head
        out_MH, peak_M, total_M = _walk(
            q_MH, old + new_M, k, v, low, high, at, window, scale, PAGED, WINDOWED, DTYPE, J
        )

        if SPLITS == 1:
            # The sink joins the maximum: a row that may see nothing must not overflow.
            sink_M = tl.load(sinks + head_M, is_row_M, other=0.0) * _LOG2_E
            top_M = tl.maximum(peak_M, sink_M)
            shrink_M = tl.exp2(peak_M - top_M)
            out_MH = out_MH * (shrink_M / (total_M * shrink_M + tl.exp2(sink_M - top_M)))[:, None]
        else:
            row_M = (split * num_sequences + sequence).to(tl.int64) * num_heads + head_M
            tl.store(peaks + row_M, peak_M, is_row_M)
            tl.store(totals + row_M, total_M, is_row_M)
        tl.store(out + row_M[:, None] * head_dim + h_H[None, :], out_MH, is_query_MH)


@triton.jit
def _merge(
    parts, peaks, totals, sinks, out, starts, num_sequences, num_heads, head_dim, L: tl.constexpr, H: tl.constexpr
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + sequence)
    if tl.load(starts + sequence + 1) - start == 1:
        l_L, h_H = tl.arange(0, L), tl.arange(0, H)
        part_L = (l_L.to(tl.int64) * num_sequences + sequence) * num_heads + head
        peak_L, total_L = tl.load(peaks + part_L), tl.load(totals + part_L)
        sink = tl.load(sinks + head) * _LOG2_E
        top = tl.maximum(tl.max(peak_L, 0), sink)
        shrink_L = tl.exp2(peak_L - top)
        total = tl.sum(total_L * shrink_L, 0) + tl.exp2(sink - top)
        part_LH = tl.load(parts + part_L[:, None] * head_dim + h_H[None, :], (h_H < head_dim)[None, :], other=0.0)
        # o[h] = sum over l of shrink[l] part[l,h] / total
        out_H = tl.sum(part_LH * shrink_L[:, None], 0) / total
        tl.store(out + (start.to(tl.int64) * num_heads + head) * head_dim + h_H, out_H, h_H < head_dim)


# Tiles ---------------------------------------------------------------------------------------------------------------


@device
def _own_tokens(starts, num_sequences, SINGLE: tl.constexpr, TOKENS: tl.constexpr, N: tl.constexpr):
    """This program's sequence, and the first of its tokens there; ``num_sequences`` and 0 where it has none.

    ``SINGLE``: among sequences that have one token, else among those that have more.
    """
    tile, n_N = tl.program_id(0), tl.arange(0, N)
    start_N = tl.load(starts + n_N, n_N < num_sequences, other=0)
    num_new_N = tl.load(starts + 1 + n_N, n_N < num_sequences, other=0) - start_N
    is_own_N = (num_new_N == 1) if SINGLE else (num_new_N > 1)
    num_tiles_N = tl.where(is_own_N, (num_new_N + TOKENS - 1) // TOKENS, 0)
    end_tile_N = tl.cumsum(num_tiles_N, 0)
    sequence = tl.sum(((end_tile_N <= tile) & (n_N < num_sequences)).to(tl.int32), 0)
    return sequence, (tile - tl.sum(tl.where(n_N < sequence, num_tiles_N, 0), 0)) * TOKENS


@device
def _walk(
    q_MH,
    position_M,
    k,
    v,
    low,
    high,
    at,
    window,
    scale,
    PAGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    DTYPE: tl.constexpr,
    J: tl.constexpr,
):
    """What queries see of the keys from ``low`` to ``high``: out_MH times total_M, the highest score, total_M.

    Scores are in powers of two; ``k`` and ``v`` point to the keys' and values' head.
    """
    M: tl.constexpr = q_MH.shape[0]
    H: tl.constexpr = q_MH.shape[1]
    head_dim = at[5]
    j_J, is_number_H = tl.arange(0, J), tl.arange(0, H) < head_dim
    peak_M = tl.full((M,), float("-inf"), tl.float32)
    total_M = tl.zeros((M,), tl.float32)
    out_MH = tl.zeros((M, H), tl.float32)
    # Tiles of keys begin at multiples of their size, wherever a window begins.
    for key in range(low // J * J, high, J):
        key_J = key + j_J
        is_key_J = (key_J >= low) & (key_J < high)
        place_JH = _places(key_J, is_key_J, at, PAGED)[:, None] + tl.arange(0, H)[None, :]
        is_there_JH = is_key_J[:, None] & is_number_H[None, :]
        k_JH = tl.load(k + place_JH, is_there_JH, other=0.0)
        v_JH = tl.load(v + place_JH, is_there_JH, other=0.0)
        # s[m,j] = q[m,h] k[j,h]
        score_MJ = dot(q_MH, tl.trans(k_JH), tl.zeros((M, J), tl.float32), DTYPE) * scale
        is_seen_MJ = is_key_J[None, :] & (key_J[None, :] <= position_M[:, None])
        if WINDOWED:
            is_seen_MJ = is_seen_MJ & (key_J[None, :] > position_M[:, None] - window)
        score_MJ = tl.where(is_seen_MJ, score_MJ, float("-inf"))
        new_peak_M = tl.maximum(peak_M, tl.max(score_MJ, 1))
        # A row that has seen nothing yet has no finite peak to count from.
        base_M = tl.where(new_peak_M == float("-inf"), 0.0, new_peak_M)
        weight_MJ = tl.exp2(score_MJ - base_M[:, None])
        shrink_M = tl.exp2(peak_M - base_M)
        total_M = total_M * shrink_M + tl.sum(weight_MJ, 1)
        # o[m,h] = p[m,j] v[j,h]
        out_MH = dot(weight_MJ, v_JH, out_MH * shrink_M[:, None], DTYPE)
        peak_M = new_peak_M
    return out_MH, peak_M, total_M


@device
def _places(key_J, is_key_J, at, PAGED: tl.constexpr):
    """Where keys lie behind the first number of their head: by their blocks, or by their tokens in the batch."""
    table, first, block_size, stride_block, stride_slot, _ = at
    if PAGED:
        block_J = tl.load(table + key_J // block_size, is_key_J, other=0).to(tl.int64)
        return block_J * stride_block + key_J % block_size * stride_slot
    else:
        return (first + key_J).to(tl.int64) * stride_slot
