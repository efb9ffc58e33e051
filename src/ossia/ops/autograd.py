"""The operations over torch, differentiable: what training computes with. Shapes: see `ossia.ops`.

    experts     MXFP4 stays packed, in a mapped checkpoint or anywhere: one expert at a time becomes numbers, in a
                buffer that the next one uses again, in the forward pass and again in the backward pass
    dense       frozen matrices stay in the checkpoint's dtype and are widened where they are multiplied
    LoRA        every matrix may have a pair beside it: y = W x + scaling * b (a x); only the pair gets a gradient
    rounding    with ``fake_quant`` an expert multiplies with round(W + scaling * b a), and learns as if with the sum
    attention   exact sinks; memory grows with the number of tokens, not with its square
    precision   matrix products and attention in ``dtype``; residual stream, norms, softmax, router, SwiGLU and the
                log-probabilities in float32, and on CPUs attention to sequences that are not too long

There is no cache: each sequence of a batch attends to its own tokens. Weights are modules, so that their parameters
have owners: `Vector`, `Embedding`, `Linear`, `Experts`, each with frozen tensors as buffers and trained ones as
parameters.

Sources: LoRA, arXiv:2106.09685; FlashAttention-2, arXiv:2307.08691, whose log-sum-exp the sinks join afterwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise, zip_longest
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ossia import _kernels
from ossia.ops import Q8, SWIGLU_ALPHA, Batch, ExpertArrays, Mxfp4, Routing
from ossia.ops.cpu import hold_mxfp4
from ossia.ops.fused import Fused
from ossia.ops.mxfp4 import BLOCK, E2M1_VALUES, SCALE_BIAS

Floats = npt.NDArray[Any]
FakeQuant = Callable[[Tensor], Tensor]
"""From some rows [O, I] of a matrix to the numbers that MXFP4 would keep of them. Its gradient is taken to be the
identity (straight-through estimator)."""

# Rows of the vocabulary, and of the batch, whose logits exist at one time: 1,024 x 2,048 float32 are 8 MiB.
_VOCAB_ROWS = 1_024
_LOGIT_ROWS = 2_048
# An expert's tokens are filled up to a multiple of so many: the CPU's products are compiled and kept for every number
# of rows that occurs.
_FILLED_ROWS = {torch.bfloat16: 16, torch.float32: 16}
# The longest sequence that `Fused` attends in: beyond it the scores of a few queries leave the cache, or, in a window,
# each thread's copies of a head take more memory than they are worth.
_FUSED_TOKENS, _FUSED_WINDOWED_TOKENS = 2_048, 16_384
# Numbers of a matrix that are summed and rounded at one time: temporaries are to stay in a CPU's cache.
_ROUNDED_NUMBERS, _ROUNDED_NUMBERS_CPU = 1 << 22, 1 << 17
# Queries that see their keys at one time where torch has no kernel that needs less.
_QUERY_BLOCK = 256


class Lora(nn.Module):
    """A pair beside a matrix [.., O, I], or beside each of a stack of experts."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(a)  # [.., r, I]
        self.b = nn.Parameter(b)  # [.., O, r]
        self.scaling = scaling
        self.dropout = dropout


class Vector(nn.Module):
    """A norm's scale, a bias or the sinks, of any shape."""

    value: Tensor

    def __init__(self, value: Tensor, trained: bool) -> None:
        super().__init__()
        _hold(self, "value", value, trained)


class Embedding(nn.Module):
    table_VD: Tensor

    def __init__(self, table_VD: Tensor, trained: bool) -> None:
        super().__init__()
        _hold(self, "table_VD", table_VD, trained)
        # a [r, V], b [D, r], as for a matrix that a one-hot token is multiplied with.
        self.lora: Lora | None = None


class Linear(nn.Module):
    weight_OI: Tensor
    bias_O: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, trained: bool, dtype: torch.dtype) -> None:
        super().__init__()
        _hold(self, "weight_OI", weight_OI, trained)
        _hold(self, "bias_O", bias_O, trained)
        # What its products are computed in; a router's stay in float32.
        self.dtype = dtype
        self.lora: Lora | None = None


class Packed:
    """MXFP4 matrices [E, O, I] as torch tensors; both may be strided views of a mapped file."""

    def __init__(self, matrices: Mxfp4, device: torch.device, kernels: _kernels.Context | None) -> None:
        """``kernels`` None: numbers are made by torch, on any device."""
        self.blocks, self.scales = (as_tensor(part).to(device) for part in (matrices.blocks, matrices.scales))
        self.order = matrices.order
        self._kernels = kernels
        self._held = None if kernels is None else hold_mxfp4(matrices)

    def dequantize(self, expert: int, out_OI: Tensor) -> None:
        """Write the numbers of one matrix: exact in float32, float64 and bfloat16; a NaN scale makes its block NaN."""
        if self._kernels is None or self._held is None or out_OI.dtype == torch.float64:
            dequantize(self.blocks[expert], self.scales[expert], self.order, out_OI)
            return
        is_bfloat16 = out_OI.dtype == torch.bfloat16
        numbers = (out_OI.view(torch.int16) if is_bfloat16 else out_OI).numpy()
        self._kernels.dequantize(self._held.matrix, expert, numbers.view(np.uint16) if is_bfloat16 else numbers)


class Experts(nn.Module):
    """The experts of a layer. The rows of gate come before those of up, whatever their order in the checkpoint."""

    gate_up_EFD: Tensor
    down_EDF: Tensor
    gate_up_bias_EF: Tensor
    down_bias_ED: Tensor

    def __init__(
        self,
        gate_up: tuple[Packed, Packed] | Tensor,
        down: Packed | Tensor,
        gate_up_bias_EF: Tensor,
        down_bias_ED: Tensor,
        trained: bool,
        fake_quant: FakeQuant | None,
        num_experts: int,
        first: int,
    ) -> None:
        """``num_experts`` of the whole layer, of which this process holds those from ``first`` on."""
        super().__init__()
        self.num_experts, self.first = num_experts, first
        self.packed_gate_up = gate_up if isinstance(gate_up, tuple) else None
        self.packed_down = down if isinstance(down, Packed) else None
        _hold(self, "gate_up_EFD", None if isinstance(gate_up, tuple) else gate_up, trained)  # [E, 2F, D]
        _hold(self, "down_EDF", None if isinstance(down, Packed) else down, trained)
        _hold(self, "gate_up_bias_EF", gate_up_bias_EF, trained)  # [E, 2F]
        _hold(self, "down_bias_ED", down_bias_ED, trained)
        self.fake_quant = fake_quant
        self.gate_up_lora: Lora | None = None  # one a for both
        self.down_lora: Lora | None = None

    @property
    def is_merged(self) -> bool:
        """Whether pairs are added to the matrices before these are multiplied, and not to what comes out."""
        return self.fake_quant is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts that this process holds, 2F, D)."""
        return (*self.gate_up_bias_EF.shape, self.down_bias_ED.shape[1])


class Exchange(Protocol):
    """Processes that hold a share of every layer's experts each: this one's number, and how tokens travel."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, rows_SD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows sorted by expert, ``counts_E`` for each, to the processes that hold these.

        Gives the rows that came here, which of this process's experts each is for, and what `give_back` wants to know.
        """

    def give_back(self, rows_RD: Tensor, sent: Any) -> Tensor:
        """Results of the rows that came, to where they came from; those of the rows that were sent, in their order."""


class AutogradOps:
    """`ossia.ops.Ops` over torch.

    ``dtype`` is that of matrix products and attention, ``trained`` whether the weights themselves are parameters (in
    float32, or in float64 with that dtype) rather than frozen. ``fake_quant`` is applied to every expert matrix that an
    export would have to round: one that is trained, has a pair, or is not in MXFP4. With ``exchange`` only this
    process's share of the experts is held. float64 is for tests.
    """

    name = "autograd"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        trained: bool = False,
        keep_experts: bool = True,
        fake_quant: FakeQuant | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.dtype = dtype
        self.exchange = exchange
        self.device = torch.device(device)
        self.trained = trained
        # Whether the experts' activations are kept for the backward pass, or computed again in it.
        self.keep_experts = keep_experts
        self.fake_quant = fake_quant
        is_cpu = self.device.type == "cpu"
        self._kernels = _kernels.Context(_kernels.best_isa(), torch.get_num_threads()) if is_cpu else None
        fused = None if self._kernels is None or dtype == torch.float64 else Fused(self._kernels)
        self._elementwise: Elementwise = fused or Plain()
        # Called with the logits_TE and the chosen experts_TA of each router, for losses that look at them.
        self.on_route: Callable[[Tensor, Tensor], None] | None = None
        # Of all that is not in ``dtype``.
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    # Holding weights ------------------------------------------------------------------------------------------------

    def vector(self, values: Floats) -> Vector:
        return Vector(self._tensor(values, self.wide), self.trained)

    def embedding(self, table_VD: Floats | Q8) -> Embedding:
        return Embedding(self._matrix(table_VD), self.trained)

    def linear_weights(self, weight_OI: Floats | Q8, bias_O: Floats | None = None) -> Linear:
        bias = None if bias_O is None else self._tensor(bias_O, self.wide)
        return Linear(self._matrix(weight_OI), bias, self.trained, self.dtype)

    def experts(self, arrays: ExpertArrays) -> Experts:
        num_experts, first = len(arrays.down_bias_ED), 0
        if self.exchange is not None:
            first = num_experts // self.exchange.size * self.exchange.rank
            arrays = _share(arrays, slice(first, first + num_experts // self.exchange.size))
        gate, up, down = arrays.gate, arrays.up, arrays.down
        if isinstance(gate, Mxfp4) and isinstance(up, Mxfp4) and not self.trained:
            gate_up: tuple[Packed, Packed] | Tensor = (self._packed(gate), self._packed(up))
        else:
            gate_up = torch.cat([self._expert_matrices(gate), self._expert_matrices(up)], dim=1)
        packed_down = isinstance(down, Mxfp4) and not self.trained
        biases = [self._tensor(bias, self.wide) for bias in (arrays.gate_bias_EF, arrays.up_bias_EF)]
        return Experts(
            gate_up,
            self._packed(down) if packed_down else self._expert_matrices(down),
            torch.cat(biases, dim=1),
            self._tensor(arrays.down_bias_ED, self.wide),
            self.trained,
            self.fake_quant,
            num_experts,
            first,
        )

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> Any:
        raise NotImplementedError("training attends to the tokens of its batch and keeps no cache")

    def kv_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        raise NotImplementedError("training attends to the tokens of its batch and keeps no cache")

    # Arithmetic -----------------------------------------------------------------------------------------------------

    def embed(self, embedding: Embedding, token_ids_T: Tensor) -> Tensor:
        x_TD = F.embedding(token_ids_T, embedding.table_VD).to(self.wide)
        lora = embedding.lora
        return x_TD if lora is None else x_TD + lora.scaling * (F.embedding(token_ids_T, lora.a.T) @ lora.b.T)

    def rms_norm(self, x_TD: Tensor, scale_D: Vector, eps: float) -> Tensor:
        return _apply(_RmsNorm, x_TD, scale_D.value, eps, self._elementwise)

    def linear(self, x_TI: Tensor, weights: Linear) -> Tensor:
        x_TI = x_TI.to(weights.dtype)
        out_TO: Tensor = _apply(_Linear, x_TI, weights.weight_OI, weights.bias_O)
        lora = weights.lora
        if lora is None:
            return out_TO
        if lora.dropout:
            x_TI = F.dropout(x_TI, lora.dropout, lora.training)
        inner_Tr = F.linear(x_TI, lora.a.to(weights.dtype)) * lora.scaling
        return out_TO + F.linear(inner_Tr, lora.b.to(weights.dtype))

    def rope_angles(self, positions_T: Tensor, inv_freq_P: Floats, concentration: float) -> tuple[Tensor, Tensor]:
        # The models were trained with this product rounded to float32; the cosine is then taken exactly.
        inv_freq = torch.from_numpy(np.array(inv_freq_P, np.float32)).to(positions_T.device)
        angles_TP = (positions_T.to(torch.float32)[:, None] * inv_freq).to(torch.float64)
        return (angles_TP.cos() * concentration).to(self.wide), (angles_TP.sin() * concentration).to(self.wide)

    def rope(self, x_TQH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        return _apply(_Rope, x_TQH, cos_TP, sin_TP, self._elementwise)

    def attention(
        self,
        q_TQH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_Q: Vector,
        cache: None,
        batch: Batch,
        window: int | None,
    ) -> Tensor:
        assert cache is None, "training keeps no cache"
        if batch.shared is not None:
            q_TQH, k_TKH, v_TKH = (x.index_select(0, batch.shared.rows_E) for x in (q_TQH, k_TKH, v_TKH))
        starts = [int(start) for start in batch.query_starts_N1]
        longest = max((end - start for start, end in pairwise(starts)), default=0)
        is_long = longest > (_FUSED_TOKENS if window is None else _FUSED_WINDOWED_TOKENS)
        elementwise = Plain() if is_long else self._elementwise
        out_TQH = _apply(_Attention, q_TQH, k_TKH, v_TKH, sinks_Q.value, starts, window, elementwise)
        return out_TQH if batch.shared is None else out_TQH.index_select(0, batch.shared.places_T)

    def route(self, logits_TE: Tensor, num_active: int) -> Routing:
        # A stable sort gives equal logits to the lower index.
        experts_TA = logits_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :num_active]
        return self.replay(logits_TE, experts_TA)

    def replay(self, logits_TE: Tensor, experts_TA: Tensor) -> Routing:
        """The routing to experts that were chosen before, weighted after these logits."""
        if self.on_route is not None:
            self.on_route(logits_TE, experts_TA)
        weights_TA = logits_TE.gather(1, experts_TA).to(self.wide).softmax(dim=-1)
        return Routing(experts_TA, weights_TA)

    def moe(self, x_TD: Tensor, routing: Routing, experts: Experts, limit: float) -> Tensor:
        if self.exchange is None:
            return self._moe(x_TD, routing, experts, limit)
        sorted_S = routing.experts_TA.reshape(-1).argsort(stable=True)
        tokens_S = sorted_S // routing.experts_TA.shape[1]
        counts_E = torch.bincount(routing.experts_TA.reshape(-1), minlength=experts.num_experts)
        came_RD, expert_R, sent = self.exchange.send(x_TD[tokens_S], counts_E)
        alone = Routing(expert_R[:, None], torch.ones_like(came_RD[:, :1]))
        out_SD = self.exchange.give_back(self._moe(came_RD, alone, experts, limit), sent)
        weights_S1 = routing.weights_TA.reshape(-1)[sorted_S][:, None]
        return torch.zeros_like(x_TD).index_add(0, tokens_S, out_SD * weights_S1)

    def _moe(self, x_TD: Tensor, routing: Routing, experts: Experts, limit: float) -> Tensor:
        loras = [experts.gate_up_lora, experts.down_lora]
        pairs = [tensor for lora in loras for tensor in ((None, None) if lora is None else (lora.a, lora.b))]
        weights = [experts.gate_up_EFD, experts.down_EDF, experts.gate_up_bias_EF, experts.down_bias_ED]
        keep = self.keep_experts and torch.is_grad_enabled()
        settings = (experts, limit, self.dtype, keep, self._elementwise)
        return _apply(_Moe, x_TD, routing.weights_TA, routing.experts_TA, *settings, *weights, *pairs)

    def logprobs(self, x_RD: Tensor, weights: Linear, targets_R: Tensor, temperature: float = 1.0) -> Tensor:
        """log softmax(unembed(x) / temperature)[target] of each row, float32 [R]. Logits exist a piece at a time."""
        lora = weights.lora
        pair = (None, None, 0.0) if lora is None else (lora.a, lora.b, lora.scaling)
        logprobs_R: Tensor = _apply(
            _Logprobs,
            x_RD,
            targets_R,
            weights.weight_OI,
            *pair,
            1.0 / temperature,
            weights.dtype,
            torch.is_grad_enabled(),
        )
        return logprobs_R

    # Arrays of a checkpoint to tensors --------------------------------------------------------------------------------

    def _matrix(self, values: Floats | Q8) -> Tensor:
        dtype = self.wide if self.trained or self.dtype == torch.float64 else None
        if not isinstance(values, Q8):
            return self._tensor(values, dtype)
        numbers = values.values.astype(np.float32) * values.scales.astype(np.float32)[..., None]
        return self._tensor(numbers.reshape(values.shape), dtype)

    def _tensor(self, values: Floats, dtype: torch.dtype | None = None) -> Tensor:
        tensor = as_tensor(values).to(self.device, dtype)
        # A parameter must not lie in the read-only file.
        return tensor.clone() if self.trained and _shares_memory(tensor, values) else tensor

    def _packed(self, matrices: Mxfp4) -> Packed:
        return Packed(matrices, self.device, self._kernels)

    def _expert_matrices(self, matrices: Mxfp4 | Floats) -> Tensor:
        dtype = self.wide if self.trained or self.dtype == torch.float64 else None
        if not isinstance(matrices, Mxfp4):
            return self._tensor(matrices, dtype)
        packed = self._packed(matrices)
        numbers = torch.empty(matrices.shape, dtype=dtype or torch.bfloat16, device=self.device)
        for expert in range(len(numbers)):
            packed.dequantize(expert, numbers[expert])
        return numbers


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    out: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def dequantize(blocks: Tensor, scales: Tensor, order: Literal["pairs", "halves"], out_OI: Tensor) -> None:
    """The numbers of an MXFP4 matrix, blocks uint8 [O, I/32, 16] and scales uint8 [O, I/32], by torch on any device."""
    values, powers = _tables(out_OI.device, out_OI.dtype)
    out = out_OI.view(*scales.shape, BLOCK)
    scale = powers[scales.int()][..., None]
    low_places, high_places = (slice(0, None, 2), slice(1, None, 2)) if order == "pairs" else (slice(16), slice(16, 32))
    torch.mul(values[(blocks & 15).int()], scale, out=out[..., low_places])
    torch.mul(values[(blocks >> 4).int()], scale, out=out[..., high_places])


def _share(arrays: ExpertArrays, own: slice) -> ExpertArrays:
    """Some of the experts."""

    def matrices(values: Mxfp4 | Floats) -> Mxfp4 | Floats:
        if isinstance(values, Mxfp4):
            return values._replace(blocks=values.blocks[own], scales=values.scales[own])
        return values[own]

    return ExpertArrays(*(matrices(values) for values in arrays))


# Kept: the host would wait for a card to have them, matrix by matrix.
@cache
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    powers = torch.from_numpy(np.append(np.ldexp(1.0, np.arange(255) - SCALE_BIAS), np.nan))
    return torch.from_numpy(E2M1_VALUES).to(device, dtype), powers.to(device, dtype)


def _hold(module: nn.Module, name: str, tensor: Tensor | None, trained: bool) -> None:
    if trained and tensor is not None:
        # A transposed view, as bfloat16 checkpoints give of experts, would keep its strides through all of training,
        # and optimisers that walk a parameter and its state as one run of memory would pair the wrong numbers.
        setattr(module, name, nn.Parameter(tensor.contiguous()))
    else:
        module.register_buffer(name, tensor, persistent=False)


def as_tensor(values: Floats) -> Tensor:
    """A tensor over the memory of an array, a read-only mapped file too: frozen weights are never written."""
    is_bfloat16 = values.dtype == ml_dtypes.bfloat16
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(values.view(np.int16) if is_bfloat16 else values)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


def _shares_memory(tensor: Tensor, values: Floats) -> bool:
    return tensor.device.type == "cpu" and tensor.data_ptr() == values.__array_interface__["data"][0]


# Elementwise ----------------------------------------------------------------------------------------------------------


class Plain:
    """What `Fused` does, by torch: on any device, in any dtype."""

    def rms_norm(self, x_TD: Tensor, scale_D: Tensor, eps: float) -> Tensor:
        return x_TD * _inverse_rms(x_TD, eps) * scale_D

    def rms_norm_backward(self, g_TD: Tensor, x_TD: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse_T1 = _inverse_rms(x_TD, eps)
        normed_TD, scaled_TD = x_TD * inverse_T1, g_TD * scale_D
        dx_TD = (scaled_TD - normed_TD * (scaled_TD * normed_TD).mean(dim=-1, keepdim=True)) * inverse_T1
        return dx_TD, (g_TD * normed_TD).sum(dim=0)

    def rope(self, x_TQH: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
        cos_T1P, sin_T1P = cos_TP[:, None], sin_TP[:, None]
        first_TQP, second_TQP = x_TQH.chunk(2, dim=-1)
        out_TQH = torch.empty_like(x_TQH, memory_format=torch.contiguous_format)
        half = first_TQP.shape[-1]
        out_TQH[..., :half] = first_TQP * cos_T1P - second_TQP * sin_T1P
        out_TQH[..., half:] = second_TQP * cos_T1P + first_TQP * sin_T1P
        return out_TQH

    def attention(
        self, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, sinks_Q: Tensor, starts: Sequence[int], window: int | None
    ) -> tuple[Tensor, Tensor]:
        out_TQH = torch.empty_like(q_TQH, memory_format=torch.contiguous_format)
        lse_TQ = torch.empty(q_TQH.shape[:2], dtype=sinks_Q.dtype, device=q_TQH.device)
        for own in _sequences(starts):
            kernel = _kernel(own, window)
            out, lse = kernel.forward(q_TQH[own], k_TKH[own], v_TKH[own])
            torch.mul(out, torch.sigmoid(lse - sinks_Q)[..., None], out=out_TQH[own])
            lse_TQ[own] = torch.logaddexp(lse, sinks_Q)
        return out_TQH, lse_TQ

    def attention_backward(
        self,
        g_TQH: Tensor,
        q_TQH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_Q: Tensor,
        out_TQH: Tensor,
        lse_TQ: Tensor,
        starts: Sequence[int],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dq_TQH, dk_TKH, dv_TKH = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_TQH, k_TKH, v_TKH)
        )
        for own in _sequences(starts):
            kernel = _kernel(own, window)
            dq_TQH[own], dk_TKH[own], dv_TKH[own] = kernel.backward(
                g_TQH[own], q_TQH[own], k_TKH[own], v_TKH[own], out_TQH[own], lse_TQ[own]
            )
        dots_TQ = (g_TQH.to(lse_TQ.dtype) * out_TQH).sum(dim=-1)
        return dq_TQH, dk_TKH, dv_TKH, dots_TQ

    def swiglu(self, gate_up_SF: Tensor, limit: float) -> Tensor:
        return _swiglu(gate_up_SF, limit).to(gate_up_SF.dtype)

    def swiglu_backward(
        self, gate_up_SF: Tensor, dinner_SF: Tensor, weights_S: Tensor, limit: float
    ) -> tuple[Tensor, Tensor]:
        inner_SF, slope_gate_SF, slope_up_SF = _swiglu_slopes(gate_up_SF, limit)
        dots_S = (inner_SF * dinner_SF).sum(dim=-1)
        weighted_SF = dinner_SF.to(inner_SF.dtype) * weights_S[:, None]
        dpre_SF = torch.cat([slope_gate_SF.mul_(weighted_SF), slope_up_SF.mul_(weighted_SF)], dim=1)
        return dpre_SF.to(gate_up_SF.dtype), dots_S

    def take_rows(
        self, source_TD: Tensor, indices_S: Tensor, num_rows: int, dtype: torch.dtype, weights_S: Tensor | None = None
    ) -> Tensor:
        rows_SD = source_TD[indices_S]
        rows_SD = rows_SD if weights_S is None else rows_SD * weights_S[:, None]
        return F.pad(rows_SD.to(dtype), (0, 0, 0, num_rows - len(rows_SD)))

    def add_rows(self, out_TD: Tensor, indices_S: Tensor, rows_SD: Tensor, weights_S: Tensor | None = None) -> None:
        rows_SD = rows_SD[: len(indices_S)].to(out_TD.dtype)
        out_TD.index_add_(0, indices_S, rows_SD if weights_S is None else rows_SD * weights_S[:, None])


Elementwise = Plain | Fused


def _inverse_rms(x_TD: Tensor, eps: float) -> Tensor:
    return (x_TD.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


# Norm, linear, rope ---------------------------------------------------------------------------------------------------


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, scale_D: Tensor, eps: float, elementwise: Elementwise) -> Tensor:
        ctx.save_for_backward(x_TD, scale_D)
        ctx.eps, ctx.elementwise = eps, elementwise
        return elementwise.rms_norm(x_TD, scale_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, scale_D = ctx.saved_tensors
        dx_TD, dscale_D = ctx.elementwise.rms_norm_backward(g_TD, x_TD, scale_D, ctx.eps)
        return dx_TD, dscale_D if ctx.needs_input_grad[1] else None, None, None


class _Linear(torch.autograd.Function):
    """x W^T + b in the dtype of x, whatever that of W; a widened W is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.dtype = x_TI.dtype
        return _product(x_TI, weight_OI.to(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx_TI = _product(g_TO, weight_OI.to(ctx.dtype).T) if needs_x else None
        dweight_OI = (g_TO.T @ x_TI).to(weight_OI.dtype) if needs_weight else None
        dbias_O = g_TO.sum(dim=0, dtype=weight_OI.dtype) if needs_bias else None
        return dx_TI, dweight_OI, dbias_O


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, without a gradient of its own. On CPUs float32 goes to oneDNN as bfloat16 does by itself: torch's
    other library uses half of what an AMD processor can do.
    """
    if x_TI.dtype == torch.float32 and x_TI.device.type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        out_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
        return out_TO
    return F.linear(x_TI, weight_OI, bias_O)


class _Rope(torch.autograd.Function):
    """The first half of each head against the second half; the way back turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_TQH: Tensor, cos_TP: Tensor, sin_TP: Tensor, elementwise: Elementwise) -> Tensor:
        ctx.save_for_backward(cos_TP, sin_TP)
        ctx.elementwise = elementwise
        return elementwise.rope(x_TQH, cos_TP, sin_TP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TQH: Tensor) -> tuple[Tensor | None, ...]:
        cos_TP, sin_TP = ctx.saved_tensors
        return ctx.elementwise.rope(g_TQH, cos_TP, -sin_TP), None, None, None


# Attention ------------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Causal attention of each sequence over its own tokens, with sinks.

    A kernel that knows no sinks gives its output O and the log-sum-exp L of its scores. With the sink s the output is
    O' = O sigmoid(L - s) and the log-sum-exp L' = log(e^L + e^s); the kernel's own backward pass, given these two, then
    yields the gradients of q, k and v, and that of the sink is -sum e^(s - L') (dO' . O').
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_TQH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        sinks_Q: Tensor,
        starts: Sequence[int],
        window: int | None,
        elementwise: Elementwise,
    ) -> Tensor:
        out_TQH, lse_TQ = elementwise.attention(q_TQH, k_TKH, v_TKH, sinks_Q, starts, window)
        ctx.save_for_backward(q_TQH, k_TKH, v_TKH, sinks_Q, out_TQH, lse_TQ)
        ctx.starts, ctx.window, ctx.elementwise = starts, window, elementwise
        return out_TQH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TQH: Tensor) -> tuple[Tensor | None, ...]:
        # Once: a checkpoint unpacks what was saved a single time.
        *saved, sinks_Q, out_TQH, lse_TQ = ctx.saved_tensors
        dq_TQH, dk_TKH, dv_TKH, dots_TQ = ctx.elementwise.attention_backward(
            g_TQH, *saved, sinks_Q, out_TQH, lse_TQ, ctx.starts, ctx.window
        )
        dsinks_Q = -(torch.exp(sinks_Q - lse_TQ) * dots_TQ).sum(dim=0) if ctx.needs_input_grad[3] else None
        return dq_TQH, dk_TKH, dv_TKH, dsinks_Q, None, None, None


def _sequences(starts: Sequence[int]) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(starts) if end > start)


def _kernel(own: slice, window: int | None) -> _Causal | _Banded:
    return _Causal() if window is None or own.stop - own.start <= window else _Banded(window)


class _Causal:
    """One sequence, every key up to the query's own. Without sinks: (o_TQH, lse_TQ)."""

    def forward(self, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        num_kv_heads = k_TKH.shape[1]
        q_KGTH = _grouped(q_TQH, num_kv_heads)
        k_KGTH, v_KGTH = (_repeated(x, q_KGTH.shape[1]) for x in (k_TKH, v_TKH))
        out_KGTH, lse_KGT = _scores_forward(q_KGTH, k_KGTH, v_KGTH, None)
        return out_KGTH.permute(2, 0, 1, 3).reshape(q_TQH.shape), lse_KGT.permute(2, 0, 1).reshape(q_TQH.shape[:2])

    def backward(
        self, g_TQH: Tensor, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TQH: Tensor, lse_TQ: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_kv_heads = k_TKH.shape[1]
        g_KGTH, q_KGTH, out_KGTH = (_grouped(x, num_kv_heads) for x in (g_TQH, q_TQH, out_TQH))
        k_KGTH, v_KGTH = (_repeated(x, q_KGTH.shape[1]) for x in (k_TKH, v_TKH))
        lse_KGT = _grouped(lse_TQ[..., None], num_kv_heads)[..., 0]
        dq, dk, dv = _scores_backward(g_KGTH, q_KGTH, k_KGTH, v_KGTH, out_KGTH, lse_KGT, None)
        return (
            dq.permute(2, 0, 1, 3).reshape(q_TQH.shape),
            dk.sum(dim=1).permute(1, 0, 2),
            dv.sum(dim=1).permute(1, 0, 2),
        )


class _Banded:
    """One sequence longer than its window: block i of ``window`` queries sees the keys of blocks i - 1 and i."""

    def __init__(self, window: int) -> None:
        self.window = window

    def forward(self, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        num_kv_heads = k_TKH.shape[1]
        q_XGWH = self._query_blocks(q_TQH, num_kv_heads)
        k_XGJH, v_XGJH = (self._key_blocks(x, q_XGWH.shape[1]) for x in (k_TKH, v_TKH))
        out_XGWH, lse_XGW = _scores_forward(q_XGWH, k_XGJH, v_XGJH, self._mask(q_XGWH, num_kv_heads))
        return self._from_blocks(out_XGWH, q_TQH.shape), self._from_blocks(lse_XGW[..., None], (*q_TQH.shape[:2], 1))[
            ..., 0
        ]

    def backward(
        self, g_TQH: Tensor, q_TQH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TQH: Tensor, lse_TQ: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_kv_heads = k_TKH.shape[1]
        g, q, out, lse = (self._query_blocks(x, num_kv_heads) for x in (g_TQH, q_TQH, out_TQH, lse_TQ[..., None]))
        k, v = (self._key_blocks(x, q.shape[1]) for x in (k_TKH, v_TKH))
        dq, dk, dv = _scores_backward(g, q, k, v, out, lse[..., 0], self._mask(q, num_kv_heads))
        return self._from_blocks(dq, q_TQH.shape), self._from_key_blocks(dk, k_TKH), self._from_key_blocks(dv, v_TKH)

    def _query_blocks(self, x_TQH: Tensor, num_kv_heads: int) -> Tensor:
        """[blocks x K, G, window, H], with zeros behind the last query."""
        num_tokens, num_heads, head_dim = x_TQH.shape
        padded = F.pad(x_TQH, (0, 0, 0, 0, 0, -num_tokens % self.window))
        blocks = padded.view(-1, self.window, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return blocks.permute(0, 2, 3, 1, 4).reshape(-1, num_heads // num_kv_heads, self.window, head_dim)

    def _from_blocks(self, x_XGWH: Tensor, shape: Sequence[int]) -> Tensor:
        num_tokens, num_heads, head_dim = shape
        group = x_XGWH.shape[1]
        blocks = x_XGWH.view(-1, num_heads // group, group, self.window, head_dim).permute(0, 3, 1, 2, 4)
        return blocks.reshape(-1, num_heads, head_dim)[:num_tokens]

    def _key_blocks(self, x_TKH: Tensor, group: int) -> Tensor:
        """[blocks x K, G, 2 window, H]: a block's own keys behind those of the block before."""
        padded = F.pad(x_TKH, (0, 0, 0, 0, self.window, -x_TKH.shape[0] % self.window))
        pairs = padded.unfold(0, 2 * self.window, self.window)  # [blocks, K, H, 2 window]
        return pairs.permute(0, 1, 3, 2).flatten(0, 1)[:, None].expand(-1, group, -1, -1)

    def _from_key_blocks(self, dx_XGJH: Tensor, like_TKH: Tensor) -> Tensor:
        num_tokens, num_kv_heads, head_dim = like_TKH.shape
        pairs = dx_XGJH.sum(dim=1).view(-1, num_kv_heads, 2, self.window, head_dim)
        blocks = pairs[:, :, 1].clone()
        blocks[:-1] += pairs[1:, :, 0]
        return blocks.permute(0, 2, 1, 3).reshape(-1, num_kv_heads, head_dim)[:num_tokens]

    def _mask(self, q_XGWH: Tensor, num_kv_heads: int) -> Tensor:
        """0 where a query sees a key, else -inf: [blocks x K, 1, window, 2 window]."""
        window, device = self.window, q_XGWH.device
        distance = torch.arange(window, 2 * window, device=device)[:, None] - torch.arange(2 * window, device=device)
        is_seen = ((distance >= 0) & (distance < window)).repeat(len(q_XGWH), 1, 1)
        # Nothing is before the first block.
        is_seen[:num_kv_heads, :, :window] = False
        mask = torch.zeros(is_seen.shape, dtype=q_XGWH.dtype, device=device).masked_fill_(~is_seen, -math.inf)
        return mask[:, None]


def _grouped(x_TQH: Tensor, num_kv_heads: int) -> Tensor:
    num_tokens, num_heads, head_dim = x_TQH.shape
    return x_TQH.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(1, 2, 0, 3)


def _repeated(x_TKH: Tensor, group: int) -> Tensor:
    return x_TKH.permute(1, 0, 2)[:, None].expand(-1, group, -1, -1)


def _scores_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(H)) v and its log-sum-exp, [X, G, T, H] and [X, G, T]; causal where there is no mask."""
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, mask is None, attn_mask=mask
        )
        return out, lse
    return blocked_forward(q, k, v, mask)


def _scores_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), those of the keys still with the axis of the group."""
    if q.device.type == "cpu":
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask
        )
        return dq, dk, dv
    return blocked_backward(g, q, k, v, out, lse, mask)


def blocked_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_scores_forward` by matrix products on any device, some queries at a time."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=_wide(q), device=q.device)
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        scores, keys = _scores(q, k, mask, rows)
        lse[:, :, rows] = scores.logsumexp(dim=-1)
        out[:, :, rows] = (scores - lse[:, :, rows, None]).exp().to(q.dtype) @ v[:, :, keys]
    return out, lse


def blocked_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_scores_backward` by matrix products on any device; the weights of some queries at a time are computed again."""
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=_wide(q), device=q.device) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1])
    for start in range(0, q.shape[2], _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        scores, keys = _scores(q, k, mask, rows)
        weights = (scores - lse[:, :, rows, None]).exp()
        dv[:, :, keys] += weights.to(q.dtype).transpose(2, 3) @ g[:, :, rows]
        per_row = (g[:, :, rows].to(dk.dtype) * out[:, :, rows]).sum(dim=-1, keepdim=True)
        dscores = (weights * (g[:, :, rows] @ v[:, :, keys].transpose(2, 3) - per_row) * scale).to(q.dtype)
        dq[:, :, rows] = dscores @ k[:, :, keys]
        dk[:, :, keys] += dscores.transpose(2, 3) @ q[:, :, rows]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice) -> tuple[Tensor, slice]:
    """The scores of some queries, and which keys they are for."""
    last = min(rows.stop, q.shape[2])
    keys = slice(0, last if mask is None else k.shape[2])
    scores = (q[:, :, rows] @ k[:, :, keys].transpose(2, 3)).to(_wide(q)) / math.sqrt(q.shape[-1])
    if mask is not None:
        return scores + mask[:, :, rows], keys
    is_hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(rows.start + 1)
    return scores.masked_fill(is_hidden, -math.inf), keys


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Experts --------------------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """The tokens of one expert, and where they stand among all that are sorted by expert."""

    expert: int
    rows: slice
    tokens: Tensor


class _Moe(torch.autograd.Function):
    """Tokens sorted by expert; an expert's matrices are numbers while its tokens are computed and no longer."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TA: Tensor,
        experts_TA: Tensor,
        experts: Experts,
        limit: float,
        dtype: torch.dtype,
        keep: bool,
        elementwise: Elementwise,
        *tensors: Tensor | None,
    ) -> Tensor:
        num_active = experts_TA.shape[1]
        sorted_S = experts_TA.reshape(-1).argsort(stable=True)
        counts = torch.bincount(experts_TA.reshape(-1), minlength=experts.shape[0]).tolist()
        tokens_S = sorted_S // num_active
        weights_S = weights_TA.reshape(-1)[sorted_S]
        buffers = _Buffers(experts, dtype)
        out_TD = torch.zeros_like(x_TD)
        kept = []
        for group in _groups(counts, tokens_S):
            x = elementwise.take_rows(x_TD, group.tokens, _filled_rows(group, dtype), dtype)
            gate_up = _gate_up(x, group.expert, experts, buffers)
            if keep:
                kept.append(gate_up)
            out = _down(elementwise.swiglu(gate_up, limit), group.expert, experts, buffers)
            elementwise.add_rows(out_TD, group.tokens, out, weights_S[group.rows])
        ctx.save_for_backward(x_TD, weights_S, sorted_S, *tensors, *kept)
        ctx.experts, ctx.limit, ctx.dtype, ctx.counts, ctx.num_active = experts, limit, dtype, counts, num_active
        ctx.elementwise, ctx.num_tensors = elementwise, len(tensors)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_S, sorted_S, *tensors = ctx.saved_tensors
        tensors, kept = tensors[: ctx.num_tensors], tensors[ctx.num_tensors :]
        experts, dtype, elementwise = ctx.experts, ctx.dtype, ctx.elementwise
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        gradients = [
            torch.zeros_like(tensor) if needed and tensor is not None else None
            for tensor, needed in zip(tensors, ctx.needs_input_grad[8:], strict=True)
        ]
        d_gate_up, d_down, d_gate_up_bias, d_down_bias, *d_pairs = gradients
        dx_TD = torch.zeros_like(x_TD) if needs_x else None
        dweights_S = torch.zeros_like(weights_S)
        buffers = _Buffers(experts, dtype)
        for group, gate_up in zip_longest(_groups(ctx.counts, sorted_S // ctx.num_active), kept):
            expert, rows, tokens = group
            num_rows = _filled_rows(group, dtype)
            weights = F.pad(weights_S[rows], (0, num_rows - len(tokens)))
            x = elementwise.take_rows(x_TD, tokens, num_rows, dtype)
            g = elementwise.take_rows(g_TD, tokens, num_rows, g_TD.dtype)
            gate_up_OI = buffers.gate_up(expert)
            gate_up = _gate_up(x, expert, experts, buffers) if gate_up is None else gate_up
            inner = elementwise.swiglu(gate_up, ctx.limit)
            # Through down, at first without the routing weight, whose own gradient is g . out.
            g_narrow, g_weighted = g.to(dtype), elementwise.take_rows(g_TD, tokens, num_rows, dtype, weights_S[rows])
            dinner = _product(g_narrow, buffers.down(expert).T)
            if experts.down_lora is not None:
                through = _lora_backward(
                    experts.down_lora, expert, inner, g_narrow, g_weighted, weights[:, None].to(dtype), d_pairs[2:]
                )
                dinner = dinner if experts.is_merged else dinner + through
            dpre, dots = elementwise.swiglu_backward(gate_up, dinner, weights, ctx.limit)
            if needs_weights:
                dweights_S[rows] = (dots + g @ experts.down_bias_ED[expert])[: len(tokens)]
            if d_down is not None:
                d_down[expert] = g_weighted.T @ inner
            if d_down_bias is not None:
                d_down_bias[expert] = g_weighted.sum(dim=0)
            if d_gate_up is not None:
                d_gate_up[expert] = dpre.T @ x
            if d_gate_up_bias is not None:
                d_gate_up_bias[expert] = dpre.sum(dim=0)
            dx = _product(dpre, gate_up_OI.T) if needs_x else None
            if experts.gate_up_lora is not None:
                through = _lora_backward(experts.gate_up_lora, expert, x, dpre, dpre, None, d_pairs[:2])
                dx = dx if dx is None or experts.is_merged else dx + through
            if dx_TD is not None and dx is not None:
                elementwise.add_rows(dx_TD, tokens, dx)
        dweights_TA = torch.empty_like(dweights_S)
        dweights_TA[sorted_S] = dweights_S
        return dx_TD, dweights_TA.view(-1, ctx.num_active), *[None] * 6, *gradients


def _filled_rows(group: _Group, dtype: torch.dtype) -> int:
    """The rows of a group and the zeros behind them, up to the multiple that products in ``dtype`` want."""
    multiple = _FILLED_ROWS.get(dtype, 1)
    return -(-len(group.tokens) // multiple) * multiple


class _Buffers:
    """The matrices of one expert as the numbers that are multiplied with, in room that the next expert's take again."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        self.experts, self.dtype = experts, dtype
        self._rooms: dict[str, Tensor] = {}
        self._holds: dict[str, int] = {}

    def gate_up(self, expert: int) -> Tensor:
        """[2F, D]."""
        own = self.experts
        _, rows, columns = own.shape
        return self._numbers("gate_up", (rows, columns), expert, own.packed_gate_up, own.gate_up_EFD, own.gate_up_lora)

    def down(self, expert: int) -> Tensor:
        """[D, F]."""
        own = self.experts
        _, rows, columns = own.shape
        packed = None if own.packed_down is None else (own.packed_down,)
        return self._numbers("down", (columns, rows // 2), expert, packed, own.down_EDF, own.down_lora)

    def _numbers(
        self,
        name: str,
        shape: tuple[int, int],
        expert: int,
        packed: tuple[Packed, ...] | None,
        matrices: Tensor,
        lora: Lora | None,
    ) -> Tensor:
        fake_quant = self.experts.fake_quant
        if packed is None and fake_quant is None:
            return matrices[expert].to(self.dtype)
        if name not in self._rooms:
            self._rooms[name] = torch.empty(shape, dtype=self.dtype, device=self.experts.down_bias_ED.device)
        room_OI = self._rooms[name]
        if self._holds.get(name) != expert:
            if packed is not None:
                for part, out_OI in zip(packed, room_OI.chunk(len(packed)), strict=True):
                    part.dequantize(expert, out_OI)
            # What is packed, and has no pair, is what rounding would make of it.
            if fake_quant is not None and (packed is None or lora is not None):
                _round_sum(matrices[expert] if packed is None else room_OI, lora, expert, fake_quant, room_OI)
            self._holds[name] = expert
        return room_OI


def _round_sum(matrix_OI: Tensor, lora: Lora | None, expert: int, fake_quant: FakeQuant, out_OI: Tensor) -> None:
    """Write what MXFP4 keeps of W + scaling b a: summed in float64 and rounded once before, as an export does it."""
    wide = _wide(matrix_OI)
    a, b = (None, None) if lora is None else (lora.a[expert].double(), lora.b[expert].double() * lora.scaling)
    num_numbers = _ROUNDED_NUMBERS_CPU if matrix_OI.device.type == "cpu" else _ROUNDED_NUMBERS
    for rows in _pieces(len(matrix_OI), max(1, num_numbers // matrix_OI.shape[1])):
        numbers = matrix_OI[rows]
        if a is not None and b is not None:
            numbers = torch.addmm(numbers.double(), b[rows], a)
        out_OI[rows] = fake_quant(numbers.to(wide))


def _groups(counts: Sequence[int], tokens_S: Tensor) -> Iterator[_Group]:
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            yield _Group(expert, rows, tokens_S[rows])
        start += count


def _gate_up(x: Tensor, expert: int, experts: Experts, buffers: _Buffers) -> Tensor:
    out = _product(x, buffers.gate_up(expert), experts.gate_up_bias_EF[expert].to(x.dtype))
    lora = experts.gate_up_lora
    return out if lora is None or experts.is_merged else out + _lora_forward(lora, expert, x)


def _down(x: Tensor, expert: int, experts: Experts, buffers: _Buffers) -> Tensor:
    out = _product(x, buffers.down(expert), experts.down_bias_ED[expert].to(x.dtype))
    lora = experts.down_lora
    return out if lora is None or experts.is_merged else out + _lora_forward(lora, expert, x)


def _swiglu(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def _swiglu_slopes(gate_up: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """(`_swiglu`, its derivatives by gate and by up)."""
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, dim=-1)
    gate_inside, up_inside = gate <= limit, up.abs() <= limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit).add_(1)
    sigmoid = torch.sigmoid(SWIGLU_ALPHA * gate)
    glu = gate * sigmoid
    # d (g s(a g)) / dg = s + a g s (1 - s)
    slope_gate = (1 - sigmoid).mul_(glu).mul_(SWIGLU_ALPHA).add_(sigmoid).mul_(up).mul_(gate_inside)
    return glu * up, slope_gate, glu * up_inside


def _lora_forward(lora: Lora, expert: int, x: Tensor) -> Tensor:
    inner = F.linear(x, lora.a[expert].to(x.dtype)) * lora.scaling
    return F.linear(inner, lora.b[expert].to(x.dtype))


def _lora_backward(
    lora: Lora,
    expert: int,
    x: Tensor,
    g: Tensor,
    g_weighted: Tensor,
    weights: Tensor | None,
    gradients: Sequence[Tensor | None],
) -> Tensor:
    """What ``g`` gives x through the pair; the pair's own gradients are those of ``g_weighted``."""
    a, b = lora.a[expert].to(x.dtype), lora.b[expert].to(x.dtype)
    dinner = g @ b * lora.scaling
    da, db = gradients
    if da is not None:
        da[expert] = (dinner if weights is None else dinner * weights).T @ x
    if db is not None:
        db[expert] = g_weighted.T @ (F.linear(x, a) * lora.scaling)
    return dinner @ a


# Log-probabilities ----------------------------------------------------------------------------------------------------


class _Logprobs(torch.autograd.Function):
    """Some rows of x against some rows of the vocabulary at a time.

    d log p(target) / dx = W[target] - sum_v p(v) W[v]: where the unembedding is frozen, the sum is taken beside the
    log-sum-exp, as attention does it over keys, and the way back costs no matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        targets_R: Tensor,
        weight_VD: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        scaling: float,
        sharpness: float,
        dtype: torch.dtype,
        has_backward: bool,
    ) -> Tensor:
        wide = _wide(x_RD)
        head = _Head(weight_VD, a, b, scaling, sharpness, dtype)
        needs_x, _, *needs_weights = ctx.needs_input_grad[:5]
        lse_R, logprobs_R = (torch.empty(len(x_RD), dtype=wide, device=x_RD.device) for _ in range(2))
        slope_RD = torch.empty_like(x_RD) if has_backward and needs_x and not any(needs_weights) else None
        for rows in _pieces(len(x_RD), _LOGIT_ROWS):
            x, targets = x_RD[rows].to(dtype), targets_R[rows]
            inner = head.inner(x)
            top = torch.full((len(x), 1), -math.inf, dtype=wide, device=x.device)
            total, picked = torch.zeros_like(top), torch.zeros_like(top[:, 0])
            mean = None if slope_RD is None else torch.zeros(x.shape, dtype=wide, device=x.device)
            for piece in _pieces(len(weight_VD), _VOCAB_ROWS):
                weight, logits = head.logits(x, inner, piece)
                new_top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
                picked = _pick(logits, targets, piece, picked)
                powers, shrink = logits.sub_(new_top).exp_(), (top - new_top).exp()
                total, top = total * shrink + powers.sum(dim=-1, keepdim=True), new_top
                if mean is not None:
                    mean = mean.mul_(shrink).add_(head.back(powers.to(dtype), weight, piece))
            top, log_total = top[:, 0], total.log()[:, 0]
            # The top is subtracted first: the difference of two large numbers is then exact.
            logprobs_R[rows], lse_R[rows] = (picked - top) - log_total, top + log_total
            if slope_RD is not None and mean is not None:
                slope_RD[rows] = (head.rows(targets) - mean / total) * sharpness
        ctx.save_for_backward(x_RD, targets_R, weight_VD, a, b, lse_R, slope_RD)
        ctx.scaling, ctx.sharpness, ctx.dtype = scaling, sharpness, dtype
        return logprobs_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_R: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, targets_R, weight_VD, a, b, lse_R, slope_RD = ctx.saved_tensors
        if slope_RD is not None:
            return g_R[:, None] * slope_RD, *[None] * 8
        head = _Head(weight_VD, a, b, ctx.scaling, ctx.sharpness, ctx.dtype)
        needs_x, _, needs_weight, needs_a, needs_b = ctx.needs_input_grad[:5]
        dx_RD = torch.zeros_like(x_RD)
        dweight, da, db = (
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in ((weight_VD, needs_weight), (a, needs_a), (b, needs_b))
        )
        for rows in _pieces(len(x_RD), _LOGIT_ROWS):
            x, targets, g = x_RD[rows].to(ctx.dtype), targets_R[rows], g_R[rows, None]
            inner = head.inner(x)
            dinner = None if inner is None else torch.zeros_like(inner)
            for piece in _pieces(len(weight_VD), _VOCAB_ROWS):
                weight, logits = head.logits(x, inner, piece)
                dlogits = logits.sub_(lse_R[rows, None]).exp_().mul_(-g)
                is_here = (targets >= piece.start) & (targets < piece.stop)
                dlogits[is_here, targets[is_here] - piece.start] += g[is_here, 0]
                dlogits = dlogits.mul_(ctx.sharpness).to(ctx.dtype)
                dx_RD[rows] += _product(dlogits, weight.T)
                if dweight is not None:
                    dweight[piece] += dlogits.T @ x
                if b is not None and dinner is not None and inner is not None:
                    dinner += dlogits @ b[piece].to(ctx.dtype)
                    if db is not None:
                        db[piece] += dlogits.T @ inner
            if a is not None and dinner is not None:
                dinner *= ctx.scaling
                dx_RD[rows] += dinner @ a.to(ctx.dtype)
                if da is not None:
                    da += dinner.T @ x
        return dx_RD if needs_x else None, None, dweight, da, db, None, None, None, None


class _Head(NamedTuple):
    """An unembedding with its pair, and what its logits are multiplied with."""

    weight_VD: Tensor
    a: Tensor | None
    b: Tensor | None
    scaling: float
    sharpness: float
    dtype: torch.dtype

    def inner(self, x: Tensor) -> Tensor | None:
        return None if self.a is None else F.linear(x, self.a.to(self.dtype)) * self.scaling

    def logits(self, x: Tensor, inner: Tensor | None, piece: slice) -> tuple[Tensor, Tensor]:
        """(the piece of the matrix, its logits)."""
        weight = self.weight_VD[piece].to(self.dtype)
        logits = _product(x, weight)
        if inner is not None and self.b is not None:
            logits = logits + F.linear(inner, self.b[piece].to(self.dtype))
        logits = logits.to(_wide(logits))
        return weight, logits if self.sharpness == 1 else logits.mul_(self.sharpness)

    def back(self, dlogits: Tensor, weight: Tensor, piece: slice) -> Tensor:
        dx = _product(dlogits, weight.T)
        if self.a is not None and self.b is not None:
            dx = dx + dlogits @ self.b[piece].to(self.dtype) @ self.a.to(self.dtype) * self.scaling
        return dx

    def rows(self, targets: Tensor) -> Tensor:
        rows = self.weight_VD[targets].to(self.dtype)
        if self.a is not None and self.b is not None:
            rows = rows + self.b[targets].to(self.dtype) @ self.a.to(self.dtype) * self.scaling
        return rows


def _pieces(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _pick(logits: Tensor, targets: Tensor, piece: slice, before: Tensor) -> Tensor:
    """The logits of the targets that are in this piece; others stay as they were."""
    is_here = (targets >= piece.start) & (targets < piece.stop)
    place = (targets - piece.start).clamp(0, logits.shape[1] - 1)
    return torch.where(is_here, logits.gather(1, place[:, None])[:, 0], before)
