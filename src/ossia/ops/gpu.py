"""The operations on a GPU: Triton's kernels (`triton/`) and torch's dense products, on tensors of one device.

    weights      experts keep the checkpoint's bytes; dense matrices are of the card's own 16-bit type, the router's and
                 norms are float32
    activations  float32 between operations; products in 16 bits with float32 sums
    keys, values the 16-bit type, paged

No operation waits for the card: sizes that depend on the routing stay on the device, so that a pass can be recorded as
a CUDA graph. Dense products are the vendor's library's, which may add in another order for another number of tokens.
Shapes: see `ossia.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ossia.errors import UnavailableError
from ossia.ops import Q8, Adapted, Batch, ExpertArrays, ExpertLoras, LoraPair, Mxfp4, Routing
from ossia.ops.triton import attention, fused, moe, qkv
from ossia.ops.triton.attention import LayerCache
from ossia.ops.triton.choice import INTERPRETED, Variant, choose
from ossia.ops.triton.moe import Matrices, Schedule
from ossia.ops.triton.tile import INTERPRETED as IS_INTERPRETED
from ossia.ops.upload import Uploader, send

Array = npt.NDArray[Any]

# Matrices with fewer rows are routers, whose choice must not depend on rounding.
_MAX_EXACT_ROWS = 256


class Linear(NamedTuple):
    weight_OI: Tensor
    bias_O: Tensor | None


class Experts(NamedTuple):
    gate: Matrices
    up: Matrices
    down: Matrices
    gate_bias_EF: Tensor
    up_bias_EF: Tensor
    down_bias_ED: Tensor


class Lora(NamedTuple):
    a: Tensor  # float32 [r, I]; of the 16-bit type [E, r, I]
    b: Tensor  # float32 [O, r]; of the 16-bit type [E, O, r]
    scaling: float


class GpuOps:
    """`ossia.ops.Ops` in Triton and torch.

    ``dtype`` is that of products, dense weights, keys and values: the card's own by default; float32 is for tests.
    ``variant`` None: chosen for the card. With TRITON_INTERPRET=1 in the environment the kernels run in numpy on the
    CPU, slowly. Raises UnavailableError where there is neither a card nor the interpreter.
    """

    name = "gpu"

    def __init__(
        self,
        dtype: Literal["bfloat16", "float16", "float32"] | None = None,
        variant: Variant | None = None,
    ) -> None:
        self.device = find_device()
        if variant is None:
            variant = choose(torch.cuda.get_device_capability()) if self.device.type == "cuda" else INTERPRETED
        self.variant = variant
        self.dtype: torch.dtype = getattr(torch, dtype or variant.dtype)
        self._uploader = Uploader(self.device)
        # Frequencies by their bytes: a recorded pass must not copy from the host.
        self._inv_freq: dict[bytes, Tensor] = {}

    # Holding weights ------------------------------------------------------------------------------------------------

    def vector(self, values: Array) -> Tensor:
        return self._tensor(values, torch.float32)

    def embedding(self, table_VD: Array | Q8) -> Tensor:
        return self._matrix(table_VD, self.dtype)

    def linear_weights(self, weight_OI: Array | Q8, bias_O: Array | None = None) -> Linear:
        dtype = torch.float32 if weight_OI.shape[0] <= _MAX_EXACT_ROWS else self.dtype
        return Linear(self._matrix(weight_OI, dtype), None if bias_O is None else self.vector(bias_O))

    def experts(self, arrays: ExpertArrays) -> Experts:
        gate, up, down = (self._matrices(each) for each in (arrays.gate, arrays.up, arrays.down))
        biases = (self.vector(each) for each in (arrays.gate_bias_EF, arrays.up_bias_EF, arrays.down_bias_ED))
        return Experts(gate, up, down, *biases)

    def lora(self, pair: LoraPair) -> Lora:
        return self._lora(pair, torch.float32)

    def expert_loras(self, loras: ExpertLoras) -> tuple[Lora | None, ...]:
        # Matrix units have no float32: experts' pairs are multiplied as experts are.
        return tuple(None if pair is None else self._lora(pair, self.dtype) for pair in loras)

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        try:
            return LayerCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv"))
        except RuntimeError as error:  # torch's word for too little memory, on a card and on the CPU
            raise MemoryError(str(error)) from error

    def kv_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        return 2 * block_size * num_kv_heads * head_dim * self.dtype.itemsize

    # Arithmetic -----------------------------------------------------------------------------------------------------

    def embed(self, embedding: Tensor | Adapted, token_ids_T: Array | Tensor) -> Tensor:
        ids_T = self._indices(token_ids_T)
        if not isinstance(embedding, Adapted):
            return F.embedding(ids_T, embedding).float()
        x_TD = F.embedding(ids_T, embedding.weights).float()
        for lora, own_T1 in self._loras(embedding):
            x_TD += lora.scaling * F.linear(lora.a.T[ids_T.long()] * own_T1, lora.b)
        return x_TD

    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        return fused.rms_norm(x_TD, scale_D, eps)

    def linear(self, x_TI: Tensor, weights: Linear | Adapted) -> Tensor:
        held: Linear = weights.weights if isinstance(weights, Adapted) else weights
        out_TO = _product(x_TI, held.weight_OI)
        if held.bias_O is not None:
            out_TO += held.bias_O
        if isinstance(weights, Adapted):
            for lora, own_T1 in self._loras(weights):
                out_TO += lora.scaling * F.linear(F.linear(x_TI, lora.a) * own_T1, lora.b)
        return out_TO

    def rope_angles(
        self, positions_T: Array | Tensor, inv_freq_P: Array, concentration: float
    ) -> tuple[Tensor, Tensor]:
        inv_freq_P = np.ascontiguousarray(inv_freq_P, np.float32)
        key = inv_freq_P.tobytes()
        if key not in self._inv_freq:
            self._inv_freq[key] = torch.from_numpy(inv_freq_P.copy()).to(self.device)
        # The models were trained with this product rounded to float32; the cosine is then taken exactly.
        angles_TP = (self._indices(positions_T).float()[:, None] * self._inv_freq[key]).double()
        return (angles_TP.cos() * concentration).float(), (angles_TP.sin() * concentration).float()

    def rope(self, x_TQH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        return fused.rope(x_TQH, cos_TP, sin_TP)

    def attention(
        self,
        q_TQH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_Q: Tensor,
        cache: LayerCache | None,
        batch: Batch,
        window: int | None,
    ) -> Tensor:
        batch = self.on_device(batch)
        table_NB = batch.full_table_NB if window is None else batch.window_table_NB
        if cache is not None:
            attention.store(k_TKH, v_TKH, cache, batch, table_NB)
        keys = (k_TKH, v_TKH) if cache is None else cache
        return attention.attend(q_TQH, keys, sinks_Q, batch, table_NB, window, self.variant, self.dtype)

    def normed_attention(
        self,
        x_TD: Tensor,
        norm_D: Tensor,
        eps: float,
        projections: tuple[Linear, Linear, Linear],
        rope: tuple[Tensor, Tensor],
        sinks_Q: Tensor,
        cache: LayerCache,
        batch: Batch,
        window: int | None,
    ) -> Tensor:
        """o_TQH of `rms_norm`, three `linear` (q, k, v), `rope` and `attention`; each token is its sequence's only one.

        The projections must be ones that `can_join` says can be joined.
        """
        batch = self.on_device(batch)
        table_NB = batch.full_table_NB if window is None else batch.window_table_NB
        q, k, v = (qkv.Projection(*each) for each in projections)
        q_TQH = qkv.qkv(x_TD, norm_D, eps, (q, k, v), rope, cache, batch, table_NB)
        return attention.attend(q_TQH, cache, sinks_Q, batch, table_NB, window, self.variant, self.dtype)

    def can_join(self, *projections: Linear) -> bool:
        """Whether one kernel can compute these: all with a bias, and matrices of one dtype."""
        has_biases = all(one.bias_O is not None for one in projections)
        return has_biases and len({one.weight_OI.dtype for one in projections}) == 1

    def route(self, logits_TE: Tensor, num_active: int) -> Routing:
        return Routing(*fused.route(logits_TE, num_active))

    def moe(self, x_TD: Tensor, routing: Routing, experts: Experts | Adapted, limit: float) -> Tensor:
        held: Experts = experts.weights if isinstance(experts, Adapted) else experts
        num_experts = len(held.down_bias_ED)
        tiling = self.variant.tiling(routing.experts_TA.numel(), num_experts)
        plan = moe.schedule(routing.experts_TA, num_experts, tiling)
        unpacking, dtype = self.variant.unpacking, self.dtype
        loras = []
        if isinstance(experts, Adapted):
            num_active = routing.experts_TA.shape[1]
            loras = [(each, own_T1.repeat_interleave(num_active, 0)) for each, own_T1 in self._loras(experts)]
        gate_change, up_change = (
            self._expert_changes(x_TD, plan, [(each[i], own_S1) for each, own_S1 in loras], by_token=True)
            for i in (0, 1)
        )
        changes = None
        if gate_change is not None:
            changes = gate_change, torch.zeros_like(gate_change) if up_change is None else up_change
        elif up_change is not None:
            changes = torch.zeros_like(up_change), up_change
        hidden_SF = moe.gate_up(
            x_TD, plan, held.gate, held.up, held.gate_bias_EF, held.up_bias_EF, limit, unpacking, dtype, changes
        )
        y_SD = moe.grouped(hidden_SF, plan, held.down, held.down_bias_ED, unpacking, dtype)
        change = self._expert_changes(hidden_SF, plan, [(each[2], own_S1) for each, own_S1 in loras], by_token=False)
        return moe.combine(y_SD if change is None else y_SD + change, routing.weights_TA)

    # Tensors --------------------------------------------------------------------------------------------------------

    def on_device(self, batch: Batch) -> Batch:
        """The batch with its arrays as tensors of the device; the same one if they are already."""
        if isinstance(batch.token_ids_T, Tensor):
            return batch
        return replace(
            batch,
            token_ids_T=self._indices(batch.token_ids_T),
            positions_T=self._indices(batch.positions_T),
            query_starts_N1=self._indices(batch.query_starts_N1),
            key_lengths_N=self._indices(batch.key_lengths_N),
            full_table_NB=self._indices(batch.full_table_NB),
            window_table_NB=self._indices(batch.window_table_NB),
            logit_rows_R=self._indices(batch.logit_rows_R),
        )

    def _indices(self, values: Array | Tensor) -> Tensor:
        if isinstance(values, Tensor):
            return values.to(self.device, torch.int32)
        return send(values.astype(np.int32, copy=False), self.device)

    def _tensor(self, values: Array, dtype: torch.dtype) -> Tensor:
        return self._uploader.upload(np.asarray(values), dtype)

    def _lora(self, pair: LoraPair, dtype: torch.dtype) -> Lora:
        return Lora(self._tensor(pair.a, dtype), self._tensor(pair.b, dtype), pair.scaling)

    def _matrix(self, matrix: Array | Q8, dtype: torch.dtype) -> Tensor:
        if not isinstance(matrix, Q8):
            return self._tensor(matrix, dtype)
        values, scales = self._tensor(matrix.values, torch.float32), self._tensor(matrix.scales, torch.float32)
        return (values * scales[..., None]).reshape(matrix.shape).to(dtype)

    def _matrices(
        self, matrices: Mxfp4 | Array, hold: Callable[[Array, torch.dtype], Tensor] | None = None
    ) -> Matrices:
        hold = hold or self._tensor
        if not isinstance(matrices, Mxfp4):
            return Matrices(hold(matrices, self.dtype))
        values, scales = (hold(part, torch.uint8) for part in (matrices.blocks, matrices.scales))
        return Matrices(values, scales, matrices.order == "halves")

    def _loras(self, adapted: Adapted) -> Iterator[tuple[Any, Tensor]]:
        """Each low-rank change of a batch, and 1 for the rows that go through it, else 0."""
        lora_T = self._indices(adapted.lora_T)
        for index, lora in enumerate(adapted.loras):
            if lora is not None:
                yield lora, (lora_T == index).float()[:, None]

    def _expert_changes(
        self, x: Tensor, plan: Schedule, loras: list[tuple[Lora | None, Tensor]], *, by_token: bool
    ) -> Tensor | None:
        """What low-rank changes add to one product of each slot, float32 [S, O]."""
        change_SO = None
        for lora, own_S1 in loras:
            if lora is None:
                continue
            inner_Sr = moe.grouped(x, plan, Matrices(lora.a), None, "registers", self.dtype, by_token=by_token)
            inner_Sr *= lora.scaling * own_S1
            outer_SO = moe.grouped(inner_Sr, plan, Matrices(lora.b), None, "registers", self.dtype)
            change_SO = outer_SO if change_SO is None else change_SO + outer_SO
        return change_SO


def find_device() -> torch.device:
    """The card, or the CPU where Triton's interpreter runs. Raises UnavailableError where there is neither."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if IS_INTERPRETED:
        return torch.device("cpu")
    why = "finds no GPU" if torch.version.cuda else "is built for processors alone"
    raise UnavailableError(
        f"backend gpu needs an NVIDIA GPU; torch {torch.__version__} {why}. `ossia doctor` tells what there is. Use "
        "--backend cpu, or TRITON_INTERPRET=1 to run the kernels slowly without a GPU."
    )


def _product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T with operands in the weights' dtype and sums and result in float32."""
    if weight_OI.dtype == torch.float32:
        return F.linear(x_TI, weight_OI)
    x_TI = x_TI.to(weight_OI.dtype)
    if x_TI.is_cuda:
        return torch.mm(x_TI, weight_OI.T, out_dtype=torch.float32)
    # The same numbers: products of 16 bits are exact in float32.
    return F.linear(x_TI.float(), weight_OI.float())
