"""One token from each row of logits, so that no row leaves the device: `ossia.engine.sampler` in Triton.

    choose      mask, temperature, top_k, top_p, min_p, and the token under a random number that is given
    score       log-probabilities of given tokens and of the likeliest ones

One program has one row, which it walks tile by tile; it does not know of the others. top_k and top_p keep all tokens up
to one that stands last in order of likelihood. Its value is found by the four next bits at a time, its id by counting
its equals: a walk adds up what each of the 16 ranges holds, and no row is sorted.

Shapes   R rows, V vocabulary, W tokens of a tile, C tiles of a row, P values of four bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ossia.ops.triton.tile import device

_TILE = 1024
# Rows whose likeliest tokens are looked for at a time: what it takes is three times as large as their logits.
_SCORED_ROWS = 64


class Settings(NamedTuple):
    """How the token of one row is chosen; see `ossia.engine.request.SamplingParams`. A row of float64, each exact."""

    row: int
    # The row of its mask; -1: all tokens are allowed.
    mask: int
    # 0: the likeliest.
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    # In [0, 1).
    u: float


def choose(logits_RV: Tensor, settings_N7: Tensor, masks: Tensor) -> Tensor:
    """float64 [N, 3]: the token, the highest logit that is allowed, and the log-probability that it was drawn with.

    ``settings_N7`` is float64, a `Settings` a row; ``masks`` int32 [.., V/32], as `Constraint.fill` writes them. A row
    whose highest logit is not finite has no token.
    """
    (num_rows, size), num_draws = logits_RV.shape, len(settings_N7)
    assert logits_RV.stride(1) == 1 and num_rows
    out_N3 = torch.empty((num_draws, 3), dtype=torch.float64, device=logits_RV.device)
    width = min(_TILE, triton.next_power_of_2(size))
    _choose[(num_draws,)](
        logits_RV,
        settings_N7,
        masks,
        out_N3,
        size,
        logits_RV.stride(0),
        masks.shape[1],
        W=width,
        C=triton.next_power_of_2(triton.cdiv(size, width)),
        num_warps=16,
    )
    return out_N3


def score(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> Tensor:
    """float64 [R, 1 + 2 num_top]: the log-softmax of a token of each row, then ids and log-softmax of the likeliest.

    Of equal logits the lower id comes first.
    """
    parts = zip(logits_RV.split(_SCORED_ROWS), token_ids_R.long().split(_SCORED_ROWS), strict=True)
    return torch.cat([_score(*part, num_top) for part in parts])


def _score(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> Tensor:
    log_total_R1 = logits_RV.logsumexp(1, keepdim=True)
    columns = [logits_RV.gather(1, token_ids_R[:, None]) - log_total_R1]
    if num_top:
        # Numbers whose order is that of the logits, and backwards that of the ids: `topk` knows no order of equals.
        bits_RV = (logits_RV + 0.0).view(torch.int32).long()
        back_V = torch.arange(logits_RV.shape[1] - 1, -1, -1, device=logits_RV.device)
        order_RV = ((bits_RV ^ ((bits_RV >> 63) & 0x7FFFFFFF)) << 32) + back_V
        ids = logits_RV.shape[1] - 1 - (order_RV.topk(num_top, 1).values & 0xFFFFFFFF)
        columns += [ids, logits_RV.gather(1, ids) - log_total_R1]
    return torch.cat([column.double() for column in columns], 1)


@triton.jit
def _choose(logits, settings, masks, out, size, stride, num_words, W: tl.constexpr, C: tl.constexpr):
    draw = tl.program_id(0)
    settings += draw * 7
    mask = tl.load(settings + 1).to(tl.int64)
    temperature = tl.load(settings + 2).to(tl.float32)
    logits += tl.load(settings).to(tl.int64) * stride
    masks += tl.maximum(mask, 0) * num_words

    peak_W = tl.full((W,), float("-inf"), tl.float32)
    best_W = tl.zeros((W,), tl.int32)
    faults_W = tl.zeros((W,), tl.int32)
    for start in range(0, size, W):
        id_W, logit_W = _logits(logits, masks, mask, start, size, W)
        best_W = tl.where(logit_W > peak_W, id_W, best_W)
        peak_W = tl.where(logit_W > peak_W, logit_W, peak_W)
        faults_W += (logit_W != logit_W).to(tl.int32)
    peak = tl.max(peak_W, 0)
    token = tl.min(tl.where(peak_W == peak, best_W, size), 0)
    peak = tl.where(tl.sum(faults_W, 0) > 0, float("nan"), peak)
    logprob = tl.full((), 0.0, tl.float32)
    if temperature > 0:
        at = (logits, masks, mask, size, peak, temperature)
        top_k, top_p = tl.load(settings + 3), tl.load(settings + 4)
        min_p = tl.load(settings + 5).to(tl.float32)
        # Of tokens with the edge's value those are kept that have no higher id.
        edge_k, last_k = tl.full((), 0, tl.uint32), size
        if (top_k > 0) & (top_k < size):
            edge_k, last_k = _edge(at, edge_k, last_k, top_k, False, W)
        edge_p, last_p = tl.full((), 0, tl.uint32), size
        if top_p < 1:
            edge_p, last_p = _edge(at, edge_k, last_k, top_p, True, W)
        c_C = tl.arange(0, C)
        sums_C = tl.zeros((C,), tl.float64)
        for start in range(0, size, W):
            _, _, weight_W = _kept(at, start, edge_k, last_k, edge_p, last_p, min_p, W)
            sums_C = tl.where(c_C == start // W, tl.sum(weight_W, 0).to(tl.float64), sums_C)
        ends_C = tl.cumsum(sums_C, 0)
        total = tl.max(ends_C, 0)
        target = tl.load(settings + 6) * total
        # Sums in another order may round below the target: the last tile, and token, with a weight is meant.
        last_tile = tl.max(tl.where(sums_C > 0, c_C, 0), 0)
        tile = tl.minimum(tl.sum((ends_C <= target).to(tl.int32), 0), last_tile)
        before = tl.sum(tl.where(c_C == tile, ends_C - sums_C, 0.0), 0)
        id_W, logit_W, weight_W = _kept(at, tile * W, edge_k, last_k, edge_p, last_p, min_p, W)
        is_above_W = before + tl.cumsum(weight_W.to(tl.float64), 0) > target
        first = tl.min(tl.where(is_above_W & (weight_W > 0), id_W, size), 0)
        token = tl.where(first < size, first, tl.max(tl.where(weight_W > 0, id_W, 0), 0))
        logit = tl.sum(tl.where(id_W == token, logit_W, 0.0), 0)
        logprob = (logit - peak) / temperature - tl.log(total.to(tl.float32))
    out += draw * 3
    tl.store(out, token.to(tl.float64))
    tl.store(out + 1, peak.to(tl.float64))
    tl.store(out + 2, logprob.to(tl.float64))


@device
def _logits(logits, masks, mask, start, size, W: tl.constexpr):
    """Ids and logits of a tile; -inf where the mask has no bit, and behind the end."""
    id_W = start + tl.arange(0, W)
    logit_W = tl.load(logits + id_W, id_W < size, other=float("-inf"))
    word_W = tl.load(masks + id_W // 32, id_W < tl.where(mask >= 0, size, 0), other=-1)
    # A sum, and no choice: what is not a number stays so, and -0 becomes 0, which it equals.
    return id_W, logit_W + tl.where((word_W >> (id_W % 32)) & 1 != 0, 0.0, float("-inf"))


@device
def _weights(at, start, W: tl.constexpr):
    """Ids, logits and weights of a tile; the likeliest token has weight 1."""
    logits, masks, mask, size, peak, temperature = at
    id_W, logit_W = _logits(logits, masks, mask, start, size, W)
    return id_W, logit_W, tl.exp((logit_W - peak) / temperature)


@device
def _kept(at, start, edge_k, last_k, edge_p, last_p, min_p, W: tl.constexpr):
    """As `_weights`; tokens that are not kept have weight 0."""
    id_W, logit_W, weight_W = _weights(at, start, W)
    is_kept_W = _is_before(_order(logit_W), id_W, edge_k, last_k) & (weight_W >= min_p)
    is_kept_W = is_kept_W & _is_before(weight_W.to(tl.uint32, bitcast=True), id_W, edge_p, last_p)
    return id_W, logit_W, tl.where(is_kept_W, weight_W, 0.0)


@device
def _order(logit_W):
    """Numbers without a sign whose order is that of the logits."""
    bits_W = logit_W.to(tl.int32, bitcast=True)
    return (bits_W ^ ((bits_W >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@device
def _is_before(value_W, id_W, edge, last):
    return (value_W > edge) | ((value_W == edge) & (id_W <= last))


@device
def _edge(at, edge_k, last_k, goal, BY_WEIGHT: tl.constexpr, W: tl.constexpr):
    """Value and id of the last of the foremost tokens that reach the goal: a number of them, or a share of the weight.

    ``edge_k`` and ``last_k``: of the last token that is looked at.
    """
    size = at[3]
    p_P = tl.arange(0, 16)
    edge, above = tl.full((), 0, tl.uint32), tl.full((), 0.0, tl.float64)
    for level in range(8):
        shift = 28 - 4 * level
        sums_P = tl.zeros((16,), tl.float64)
        for start in range(0, size, W):
            _, value_W, measure_W = _measured(at, start, edge_k, last_k, BY_WEIGHT, W)
            # Those whose bits so far are the edge's, by their next four.
            is_in_W = ((value_W ^ edge) >> shift >> 4) == 0
            digit_W = ((value_W >> shift) & 15).to(tl.int32)
            is_in_WP = is_in_W[:, None] & (digit_W[:, None] == p_P[None, :])
            sums_P += tl.sum(tl.where(is_in_WP, measure_W[:, None], 0.0), 0).to(tl.float64)
        if BY_WEIGHT:
            # At least the likeliest is kept.
            goal = tl.where(level == 0, tl.maximum(goal * tl.sum(sums_P, 0), 1e-30), goal)
        reach_P = above + tl.sum(sums_P, 0) - tl.cumsum(sums_P, 0) + sums_P
        digit = tl.maximum(tl.sum((reach_P >= goal).to(tl.int32), 0) - 1, 0)
        above += tl.sum(tl.where(p_P > digit, sums_P, 0.0), 0)
        edge = edge | (digit.to(tl.uint32) << shift)
    each = tl.full((), 1.0, tl.float64)
    if BY_WEIGHT:
        each = tl.maximum(edge.to(tl.float32, bitcast=True), 1e-38).to(tl.float64)
    num_equal = tl.maximum(tl.minimum(tl.ceil((goal - above) / each), size), 1).to(tl.int32)
    last, num_seen = size, 0
    for start in range(0, size, W):
        id_W, value_W, measure_W = _measured(at, start, edge_k, last_k, BY_WEIGHT, W)
        is_equal_W = ((value_W == edge) & (measure_W > 0)).to(tl.int32)
        rank_W = num_seen + tl.cumsum(is_equal_W, 0)
        last = tl.minimum(last, tl.min(tl.where((is_equal_W > 0) & (rank_W == num_equal), id_W, size), 0))
        num_seen += tl.sum(is_equal_W, 0)
    return edge, last


@device
def _measured(at, start, edge_k, last_k, BY_WEIGHT: tl.constexpr, W: tl.constexpr):
    """Ids of a tile, what orders them, and what adds up to the goal; 0 behind the last token that is looked at."""
    id_W, logit_W, weight_W = _weights(at, start, W)
    order_W = _order(logit_W)
    if BY_WEIGHT:
        is_seen_W = _is_before(order_W, id_W, edge_k, last_k)
        return id_W, weight_W.to(tl.uint32, bitcast=True), tl.where(is_seen_W, weight_W, 0.0)
    else:
        return id_W, order_W, (id_W < at[3]).to(tl.float32)
