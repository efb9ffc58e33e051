"""The operations in numpy: the specification that every other backend is tested against, and itself a backend.

Written to be read. Everything is computed in one dtype, float32 for use and float64 for tests; weights stay as they
are in the checkpoint and are widened a piece at a time, so that a 20b checkpoint runs within 16 GB. Shapes: see
`ossia.ops`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.ops import Q8, SWIGLU_ALPHA, Adapted, Batch, ExpertArrays, ExpertLoras, LoraPair, Mxfp4, Routing
from ossia.ops.mxfp4 import dequantize

Floats = npt.NDArray[Any]

# Rows of a dense matrix that are widened at a time: 16,384 rows of 2,880 float32 are 180 MiB.
_LINEAR_ROWS = 16_384


class Linear(NamedTuple):
    weight_OI: Floats | Q8
    bias_O: Floats | None


class LayerCache(NamedTuple):
    k_BSKH: Floats
    v_BSKH: Floats


class ReferenceOps:
    """`ossia.ops.Ops` in numpy. ``dtype`` is that of activations, cache and sums."""

    name = "reference"

    def __init__(self, dtype: npt.DTypeLike = np.float32) -> None:
        self.dtype = np.dtype(dtype)

    # Holding weights ------------------------------------------------------------------------------------------------

    def vector(self, values: Floats) -> Floats:
        return np.asarray(values).astype(self.dtype)

    def embedding(self, table_VD: Floats | Q8) -> Floats | Q8:
        return table_VD

    def linear_weights(self, weight_OI: Floats | Q8, bias_O: Floats | None = None) -> Linear:
        return Linear(weight_OI, None if bias_O is None else self.vector(bias_O))

    def experts(self, arrays: ExpertArrays) -> ExpertArrays:
        return arrays._replace(
            gate_bias_EF=self.vector(arrays.gate_bias_EF),
            up_bias_EF=self.vector(arrays.up_bias_EF),
            down_bias_ED=self.vector(arrays.down_bias_ED),
        )

    def lora(self, pair: LoraPair) -> LoraPair:
        return pair._replace(a=np.array(pair.a, self.dtype), b=np.array(pair.b, self.dtype))

    def expert_loras(self, loras: ExpertLoras) -> ExpertLoras:
        return ExpertLoras(*(None if pair is None else self.lora(pair) for pair in loras))

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return LayerCache(np.zeros(shape, self.dtype), np.zeros(shape, self.dtype))

    def kv_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * block_size * num_kv_heads * head_dim * self.dtype.itemsize

    # Arithmetic -----------------------------------------------------------------------------------------------------

    def embed(self, embedding: Floats | Q8 | Adapted, token_ids_T: npt.NDArray[np.int32]) -> Floats:
        if isinstance(embedding, Adapted):
            x_TD = self.embed(embedding.weights, token_ids_T)
            for pair, rows in _rows_by_lora(embedding):
                x_TD[rows] += pair.scaling * (pair.a[:, token_ids_T[rows]].T @ pair.b.T)
            return x_TD
        return self._rows(embedding, token_ids_T)

    def rms_norm(self, x_TD: Floats, scale_D: Floats, eps: float) -> Floats:
        mean_square_T1 = np.mean(x_TD * x_TD, axis=-1, keepdims=True)
        return x_TD / np.sqrt(mean_square_T1 + eps) * scale_D

    def linear(self, x_TI: Floats, weights: Linear | Adapted) -> Floats:
        if isinstance(weights, Adapted):
            out_TO = self.linear(x_TI, weights.weights)
            for pair, own in _rows_by_lora(weights):
                out_TO[own] += pair.scaling * (x_TI[own] @ pair.a.T @ pair.b.T)
            return out_TO
        weight_OI, bias_O = weights
        out_TO = np.empty((x_TI.shape[0], weight_OI.shape[0]), self.dtype)
        for start in range(0, weight_OI.shape[0], _LINEAR_ROWS):
            rows = slice(start, start + _LINEAR_ROWS)
            out_TO[:, rows] = x_TI @ self._rows(weight_OI, rows).T
        return out_TO if bias_O is None else out_TO + bias_O

    def rope_angles(
        self, positions_T: npt.NDArray[np.int32], inv_freq_P: Floats, concentration: float
    ) -> tuple[Floats, Floats]:
        # The models were trained with this product rounded to float32; the cosine is then taken exactly.
        angles_TP = positions_T.astype(np.float32)[:, None] * inv_freq_P.astype(np.float32)
        angles_TP = angles_TP.astype(np.float64)
        cos_TP, sin_TP = np.cos(angles_TP) * concentration, np.sin(angles_TP) * concentration
        return cos_TP.astype(self.dtype), sin_TP.astype(self.dtype)

    def rope(self, x_TQH: Floats, cos_TP: Floats, sin_TP: Floats) -> Floats:
        first_TQP, second_TQP = np.split(x_TQH, 2, axis=-1)
        cos_T1P, sin_T1P = cos_TP[:, None], sin_TP[:, None]
        return np.concatenate(
            [first_TQP * cos_T1P - second_TQP * sin_T1P, second_TQP * cos_T1P + first_TQP * sin_T1P], axis=-1
        )

    def attention(
        self,
        q_TQH: Floats,
        k_TKH: Floats,
        v_TKH: Floats,
        sinks_Q: Floats,
        cache: LayerCache | None,
        batch: Batch,
        window: int | None,
    ) -> Floats:
        out_TQH = np.empty_like(q_TQH)
        table_NB = batch.full_table_NB if window is None else batch.window_table_NB
        for n in range(len(batch.key_lengths_N)):
            own = slice(batch.query_starts_N1[n], batch.query_starts_N1[n + 1])
            positions_T = batch.positions_T[own]
            if cache is None:
                first_key = int(positions_T[0])
                k_JKH, v_JKH = k_TKH[own], v_TKH[own]
            else:
                _store(cache, table_NB[n], positions_T, k_TKH[own], v_TKH[own])
                first_key = 0 if window is None else max(0, int(positions_T[0]) - window + 1)
                k_JKH, v_JKH = _fetch(cache, table_NB[n], first_key, int(batch.key_lengths_N[n]))
            key_positions_J = first_key + np.arange(k_JKH.shape[0])
            visible_TJ = key_positions_J <= positions_T[:, None]
            if window is not None:
                visible_TJ &= key_positions_J > positions_T[:, None] - window
            out_TQH[own] = _attend(q_TQH[own], k_JKH, v_JKH, sinks_Q, visible_TJ)
        return out_TQH

    def route(self, logits_TE: Floats, num_active: int) -> Routing:
        # A stable sort gives equal logits to the lower index.
        experts_TA = np.argsort(-logits_TE, axis=-1, kind="stable")[:, :num_active]
        chosen_TA = np.take_along_axis(logits_TE, experts_TA, axis=-1)
        weights_TA = np.exp(chosen_TA - chosen_TA[:, :1])
        weights_TA /= weights_TA.sum(axis=-1, keepdims=True)
        return Routing(experts_TA.astype(np.int32), weights_TA)

    def moe(self, x_TD: Floats, routing: Routing, experts: ExpertArrays | Adapted, limit: float) -> Floats:
        held: ExpertArrays = experts.weights if isinstance(experts, Adapted) else experts
        changes = _rows_by_lora(experts) if isinstance(experts, Adapted) else []
        # Results are kept by slot and added in the order of the routing, whatever the order of the experts.
        out_TAD = np.zeros((*routing.experts_TA.shape, x_TD.shape[1]), self.dtype)
        for expert in np.unique(routing.experts_TA):
            tokens, slots = np.nonzero(routing.experts_TA == expert)
            gate = x_TD[tokens] @ self._matrix(held.gate, expert).T + held.gate_bias_EF[expert]
            up = x_TD[tokens] @ self._matrix(held.up, expert).T + held.up_bias_EF[expert]
            for loras, rows in changes:
                own = np.isin(tokens, rows)
                gate[own] += _expert_change(x_TD[tokens[own]], loras.gate, expert)
                up[own] += _expert_change(x_TD[tokens[own]], loras.up, expert)
            hidden = swiglu(gate, up, limit)
            out = hidden @ self._matrix(held.down, expert).T + held.down_bias_ED[expert]
            for loras, rows in changes:
                own = np.isin(tokens, rows)
                out[own] += _expert_change(hidden[own], loras.down, expert)
            out_TAD[tokens, slots] = out
        return np.einsum("tad,ta->td", out_TAD, routing.weights_TA)

    def _rows(self, matrix: Floats | Q8, rows: Any) -> Floats:
        if isinstance(matrix, Q8):
            numbers = matrix.values[rows].astype(self.dtype) * matrix.scales[rows].astype(self.dtype)[..., None]
            return numbers.reshape(-1, matrix.shape[-1])
        return matrix[rows].astype(self.dtype)

    def _matrix(self, matrices: Mxfp4 | Floats, expert: int) -> Floats:
        if isinstance(matrices, Mxfp4):
            one = Mxfp4(matrices.blocks[expert], matrices.scales[expert], matrices.order)
            return dequantize(one, self.dtype)
        return matrices[expert].astype(self.dtype)


def _rows_by_lora(adapted: Adapted) -> list[tuple[Any, npt.NDArray[np.intp]]]:
    """Each low-rank change, with the rows that go through it."""
    return [
        (lora, np.flatnonzero(adapted.lora_T == index))
        for index, lora in enumerate(adapted.loras)
        if lora is not None and (adapted.lora_T == index).any()
    ]


def _expert_change(x_TI: Floats, pair: LoraPair | None, expert: int) -> Floats:
    return np.zeros(1) if pair is None else pair.scaling * (x_TI @ pair.a[expert].T @ pair.b[expert].T)


def swiglu(gate: Floats, up: Floats, limit: float) -> Floats:
    """gate sigmoid(1.702 gate) (up + 1) of clamped values: gate from above only, up from both sides."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    # exp may overflow to infinity for a very negative gate: the sigmoid is then 0, as it should be.
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-SWIGLU_ALPHA * gate)) * (up + 1)


def _store(cache: LayerCache, table_B: Floats, positions_T: Floats, k_TKH: Floats, v_TKH: Floats) -> None:
    block_size = cache.k_BSKH.shape[1]
    blocks_T, slots_T = table_B[positions_T // block_size], positions_T % block_size
    cache.k_BSKH[blocks_T, slots_T] = k_TKH
    cache.v_BSKH[blocks_T, slots_T] = v_TKH


def _fetch(cache: LayerCache, table_B: Floats, start: int, end: int) -> tuple[Floats, Floats]:
    block_size = cache.k_BSKH.shape[1]
    first = start // block_size
    blocks = table_B[first : -(-end // block_size)]
    keys = slice(start - first * block_size, end - first * block_size)
    shape = (-1, *cache.k_BSKH.shape[2:])
    return cache.k_BSKH[blocks].reshape(shape)[keys], cache.v_BSKH[blocks].reshape(shape)[keys]


def _attend(q_TQH: Floats, k_JKH: Floats, v_JKH: Floats, sinks_Q: Floats, visible_TJ: Floats) -> Floats:
    num_tokens, num_heads, head_dim = q_TQH.shape
    num_kv_heads = k_JKH.shape[1]
    q_TKGH = q_TQH.reshape(num_tokens, num_kv_heads, -1, head_dim)
    scores_KGTJ = np.einsum("tkgh,jkh->kgtj", q_TKGH, k_JKH, optimize=True) / np.sqrt(head_dim)
    scores_KGTJ = np.where(visible_TJ, scores_KGTJ, -np.inf)
    sinks_KG11 = sinks_Q.reshape(num_kv_heads, -1, 1, 1)
    # The sink joins the maximum: a row that may see nothing must not overflow.
    top_KGT1 = np.maximum(scores_KGTJ.max(axis=-1, keepdims=True), sinks_KG11)
    weights_KGTJ = np.exp(scores_KGTJ - top_KGT1)
    weights_KGTJ /= weights_KGTJ.sum(axis=-1, keepdims=True) + np.exp(sinks_KG11 - top_KGT1)
    out_TKGH = np.einsum("kgtj,jkh->tkgh", weights_KGTJ, v_JKH, optimize=True)
    return out_TKGH.reshape(num_tokens, num_heads, head_dim).astype(q_TQH.dtype)
