"""The operations on a CPU, by the C++ kernels of `csrc/`. Shapes: see `ossia.ops`; activations are float32 arrays.

    experts     MXFP4 is multiplied where it lies, in a mapped checkpoint or anywhere, with activations rounded to 8
                bits per 32; float experts stay in the checkpoint's dtype and are multiplied in float32
    dense       "q8": rounded once to 8 bits per 32 weights (float16 scale); "bf16": the checkpoint's own bytes, float32
                products. Q8_0 matrices of GGUF files are taken as they are in both
    routers     every matrix of at most 256 rows is kept as with "bf16": a router's choice of experts must not depend on
                rounding, and no other matrix of a published model is as small
    adapters    bfloat16 stays, float16 becomes float32; multiplied in float32 with the activations as they are
    cache       keys and values in bfloat16, or in 8 bits with a scale per key and head ("q8")

A token's results are the same bits whatever else is in the batch, however a prompt is split into passes, and whatever
the number of threads; the exact rules stand in `csrc/kernels.h`. Instruction sets may differ in the last bits.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ossia import _kernels
from ossia.errors import ConfigError
from ossia.ops import Q8, Adapted, Batch, ExpertArrays, ExpertLoras, LoraPair, Mxfp4, Routing
from ossia.ops.control_group import processors
from ossia.ops.mapped import give_back

Floats = npt.NDArray[np.float32]
Isa = Literal["portable", "avx2", "avxvnni", "avx512vnni", "dotprod", "i8mm"]

ISAS: tuple[Isa, ...] = ("portable", "avx2", "avxvnni", "avx512vnni", "dotprod", "i8mm")
BLOCK = 32
# Twice the hardware threads of the largest machines; a system that cannot start as many ends the process.
MAX_THREADS = 1024
# The largest number of experts of a published model is 128.
_MAX_EXACT_ROWS = 256
# Rows are rounded to 8 bits a piece at a time, and the pages that they came from given back.
_PACK_BYTES = 64 << 20

# As in csrc/kernels.h.
_MXFP4 = {"pairs": 0, "halves": 1}
_Q8 = 2
_FLOATS = {np.dtype(ml_dtypes.bfloat16): 3, np.dtype(np.float16): 4, np.dtype(np.float32): 5}
_KV_BF16, _KV_Q8 = 0, 1


class Held(NamedTuple):
    """A matrix as the kernels know it, and the arrays whose memory it points into."""

    matrix: _kernels.Matrix
    arrays: tuple[Any, ...]


class Linear(NamedTuple):
    weight: Held
    bias_O: Floats | None


class Experts(NamedTuple):
    experts: _kernels.Experts
    arrays: tuple[Any, ...]


class Lora(NamedTuple):
    """As the kernels know it: a [.., r, I], and b in pieces of 32 rows [.., O / 32, r, 32]."""

    lora: _kernels.Lora
    a: npt.NDArray[Any]
    b_pieces: npt.NDArray[Any]
    num_rows: int
    scaling: float


class ExpertLora(NamedTuple):
    lora: _kernels.ExpertLora
    loras: tuple[Lora | None, ...]


class LayerCache(NamedTuple):
    """Keys and values [B, K, S, H] of one layer: uint16 (bfloat16's bits), or int8 with float32 scales [B, K, S]."""

    cache: _kernels.Cache
    keys_BKSH: npt.NDArray[Any]
    values_BKSH: npt.NDArray[Any]
    scales_2BKS: Floats | None


class CpuOps:
    """`ossia.ops.Ops` in C++.

    ``threads`` None: all cores that this process may use. ``isa`` None: the best instruction set of this machine.
    Raises ConfigError for an instruction set that the machine lacks, and for unknown values.
    """

    name = "cpu"

    def __init__(
        self,
        threads: int | None = None,
        dense: Literal["q8", "bf16"] = "q8",
        kv: Literal["bf16", "q8"] = "bf16",
        isa: Isa | None = None,
    ) -> None:
        if dense not in ("q8", "bf16"):
            raise ConfigError(f"dense is {dense!r}; expected one of: q8, bf16", param="dense")
        if kv not in ("bf16", "q8"):
            raise ConfigError(f"kv is {kv!r}; expected one of: bf16, q8", param="kv")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise ConfigError(f"threads is {threads}; expected 1 to {MAX_THREADS}", param="threads")
        if isa is not None and not _kernels.has_isa(isa):
            usable = ", ".join(each for each in ISAS if _kernels.has_isa(each))
            raise ConfigError(f"this machine cannot run isa {isa!r}; it runs: {usable}", param="isa")
        self.threads = available_cores() if threads is None else threads
        self.dense, self.kv = dense, kv
        self.isa = _kernels.best_isa() if isa is None else isa
        self._context = _kernels.Context(self.isa, self.threads)

    # Holding weights ------------------------------------------------------------------------------------------------

    def vector(self, values: npt.ArrayLike) -> Floats:
        return np.ascontiguousarray(np.asarray(values).astype(np.float32))

    def embedding(self, table_VD: npt.NDArray[Any] | Q8) -> Held:
        if isinstance(table_VD, Q8):
            return _hold_q8_0(table_VD)
        return _hold_floats(table_VD)

    def linear_weights(self, weight_OI: npt.NDArray[Any] | Q8, bias_O: npt.ArrayLike | None = None) -> Linear:
        num_rows, num_inputs = weight_OI.shape
        small = num_rows <= _MAX_EXACT_ROWS or num_inputs % BLOCK != 0
        if isinstance(weight_OI, Q8) or (self.dense == "q8" and not small):
            held = self._pack_q8(weight_OI)
        else:
            held = _hold_floats(weight_OI)
        return Linear(held, None if bias_O is None else self.vector(bias_O))

    def experts(self, arrays: ExpertArrays) -> Experts:
        gate, up, down = (
            hold_mxfp4(each) if isinstance(each, Mxfp4) else _hold_floats(each)
            for each in (arrays.gate, arrays.up, arrays.down)
        )
        biases = tuple(self.vector(each) for each in (arrays.gate_bias_EF, arrays.up_bias_EF, arrays.down_bias_ED))
        held = _kernels.Experts(
            len(biases[0]), gate.matrix, up.matrix, down.matrix, *(_address(bias) for bias in biases)
        )
        return Experts(held, (gate, up, down, *biases))

    def lora(self, pair: LoraPair) -> Lora:
        return _hold_lora(_one_dtype(pair))

    def expert_loras(self, loras: ExpertLoras) -> ExpertLora:
        gate, up, down = (None if pair is None else _one_dtype(pair) for pair in loras)
        if gate and up and loras.gate and loras.up and loras.gate.a is loras.up.a and gate.a.dtype == up.a.dtype:
            # Gate and up of one file share their a, and its product with a token.
            up = up._replace(a=gate.a)
        held = tuple(None if pair is None else _hold_lora(pair) for pair in (gate, up, down))
        return ExpertLora(_kernels.ExpertLora(*(one and one.lora for one in held)), held)

    def kv_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        per_head = 2 * head_dim if self.kv == "bf16" else head_dim + 4
        return 2 * block_size * num_kv_heads * per_head

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> LayerCache:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        dtype, scales = (np.uint16, None) if self.kv == "bf16" else (np.int8, np.zeros((2, *shape[:3]), np.float32))
        keys, values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        cache = _kernels.Cache(
            _KV_BF16 if self.kv == "bf16" else _KV_Q8,
            num_blocks,
            block_size,
            num_kv_heads,
            head_dim,
            _address(keys),
            _address(values),
            0 if scales is None else _address(scales[0]),
            0 if scales is None else _address(scales[1]),
        )
        return LayerCache(cache, keys, values, scales)

    # Arithmetic -----------------------------------------------------------------------------------------------------

    def embed(self, embedding: Held | Adapted, token_ids_T: npt.NDArray[np.int32]) -> Floats:
        if isinstance(embedding, Adapted):
            return self._embed_adapted(embedding, token_ids_T)
        out_TD = np.empty((len(token_ids_T), embedding.matrix.cols), np.float32)
        self._context.embed(embedding.matrix, token_ids_T, out_TD)
        return out_TD

    def rms_norm(self, x_TD: Floats, scale_D: Floats, eps: float) -> Floats:
        out_TD = np.empty(x_TD.shape, np.float32)
        self._context.rms_norm(x_TD, scale_D, eps, out_TD)
        return out_TD

    def linear(self, x_TI: Floats, weights: Linear | Adapted) -> Floats:
        held: Linear = weights.weights if isinstance(weights, Adapted) else weights
        out_TO = np.empty((x_TI.shape[0], held.weight.matrix.rows), np.float32)
        self._context.linear(x_TI, held.weight.matrix, held.bias_O, out_TO, *_loras(weights))
        return out_TO

    def rope_angles(
        self, positions_T: npt.NDArray[np.int32], inv_freq_P: npt.NDArray[Any], concentration: float
    ) -> tuple[Floats, Floats]:
        inv_freq_P = np.ascontiguousarray(inv_freq_P, np.float32)
        cos_TP = np.empty((len(positions_T), len(inv_freq_P)), np.float32)
        sin_TP = np.empty_like(cos_TP)
        self._context.rope_angles(positions_T, inv_freq_P, concentration, cos_TP, sin_TP)
        return cos_TP, sin_TP

    def rope(self, x_TQH: Floats, cos_TP: Floats, sin_TP: Floats) -> Floats:
        self._context.rope(x_TQH, cos_TP, sin_TP, x_TQH)
        return x_TQH

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
        out_TQH = np.empty(q_TQH.shape, np.float32)
        self._context.attention(
            q_TQH,
            k_TKH,
            v_TKH,
            sinks_Q,
            None if cache is None else cache.cache,
            batch.positions_T,
            batch.query_starts_N1,
            batch.key_lengths_N,
            batch.full_table_NB if window is None else batch.window_table_NB,
            0 if window is None else window,
            out_TQH,
        )
        return out_TQH

    def route(self, logits_TE: Floats, num_active: int) -> Routing:
        experts_TA = np.empty((logits_TE.shape[0], num_active), np.int32)
        weights_TA = np.empty(experts_TA.shape, np.float32)
        self._context.route(logits_TE, experts_TA, weights_TA)
        return Routing(experts_TA, weights_TA)

    def moe(self, x_TD: Floats, routing: Routing, experts: Experts | Adapted, limit: float) -> Floats:
        held: Experts = experts.weights if isinstance(experts, Adapted) else experts
        out_TD = np.empty(x_TD.shape, np.float32)
        routed = routing.experts_TA, routing.weights_TA
        self._context.moe(x_TD, *routed, held.experts, limit, out_TD, *_loras(experts))
        return out_TD

    # What this machine can do at most -------------------------------------------------------------------------------

    def read_bandwidth(self, num_bytes: int = 1 << 30, num_rounds: int = 5) -> float:
        """GB/s that the threads read from memory together, the best of some rounds over a buffer of ``num_bytes``."""
        return self._context.read_bandwidth(num_bytes, num_rounds)

    def integer_peak(self, num_rounds: int = 20_000_000) -> float:
        """Multiply-accumulates of bytes per second, in G, that the threads do in registers."""
        return self._context.integer_peak(num_rounds)

    def _embed_adapted(self, embedding: Adapted, token_ids_T: npt.NDArray[np.int32]) -> Floats:
        x_TD = self.embed(embedding.weights, token_ids_T)
        for index, lora in enumerate(embedding.loras):
            rows = np.flatnonzero(embedding.lora_T == index)
            if lora is None or not len(rows):
                continue
            # A token's column of a is what the matrix gives for it; the kernel adds up its ranks in order.
            h_Tr = np.ascontiguousarray(lora.a[:, token_ids_T[rows]].T, np.float32)
            b_Dr = lora.b_pieces.swapaxes(-1, -2).reshape(-1, h_Tr.shape[1])[: lora.num_rows]
            x_TD[rows] += np.float32(lora.scaling) * self.linear(h_Tr, Linear(_hold_floats(b_Dr), None))
        return x_TD

    def _pack_q8(self, weight_OI: npt.NDArray[Any] | Q8) -> Held:
        num_rows, num_inputs = weight_OI.shape
        tile = self._context.tile_rows
        num_padded = -(-num_rows // tile) * tile
        values = np.empty(num_padded * num_inputs, np.int8)
        scales = np.empty(num_padded * num_inputs // BLOCK, np.uint16)
        step = max(1, _PACK_BYTES // (4 * num_inputs) // tile) * tile
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            if isinstance(weight_OI, Q8):
                piece = Q8(weight_OI.values[rows], weight_OI.scales[rows])
                self._context.pack_q8(_hold_q8_0(piece).matrix, start, values, scales)
                give_back(piece.values)
            else:
                held = _hold_floats(weight_OI[rows])
                self._context.pack_q8(held.matrix, start, values, scales)
                give_back(weight_OI[rows])
        matrix = _kernels.Matrix(_Q8, num_rows, num_inputs, _address(values), _address(scales))
        return Held(matrix, (values, scales))


def available_cores() -> int:
    """The cores that this process may use; two hardware threads of one core count once.

    Where a container may use the time of fewer, they are so many: more threads would wait for each other.
    """
    return max(1, math.ceil(min(_cores(), processors())))


def _cores() -> int:
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as siblings:
                cores.add(siblings.read())
        except OSError:
            return len(cpus)
    return len(cores)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _loras(weights: Any) -> tuple[Any, ...]:
    """The last arguments of a kernel: the low-rank changes as it knows them, and each row's."""
    if not isinstance(weights, Adapted):
        return ()
    return tuple(one and one.lora for one in weights.loras), weights.lora_T


def _one_dtype(pair: LoraPair) -> LoraPair:
    """A copy whose matrices are of the one dtype that their kernel reads."""
    exact = all(array.dtype == ml_dtypes.bfloat16 for array in (pair.a, pair.b))
    dtype = ml_dtypes.bfloat16 if exact else np.float32
    return pair._replace(a=np.array(pair.a, dtype, order="C"), b=np.array(pair.b, dtype, order="C"))


def _hold_lora(pair: LoraPair) -> Lora:
    a, b, scaling = pair
    *stack, num_rows, rank = b.shape
    num_pieces = -(-num_rows // BLOCK)
    padded = np.zeros((*stack, num_pieces * BLOCK, rank), b.dtype)
    padded[..., :num_rows, :] = b
    pieces = np.ascontiguousarray(padded.reshape(*stack, num_pieces, BLOCK, rank).swapaxes(-1, -2))
    stack_stride = pieces.strides[0] if stack else 0
    lora = _kernels.Lora(_hold_floats(a).matrix, num_rows, _address(pieces), stack_stride, scaling)
    return Lora(lora, a, pieces, num_rows, scaling)


def hold_mxfp4(matrices: Mxfp4) -> Held:
    """MXFP4 matrices [E, O, I] as the kernels know them."""
    blocks, scales = matrices.blocks, matrices.scales
    if blocks.strides[-1] != 1:
        blocks = np.ascontiguousarray(blocks)
    num_rows, num_inputs = matrices.shape[-2:]
    matrix = _kernels.Matrix(
        _MXFP4[matrices.order],
        num_rows,
        num_inputs,
        _address(blocks),
        _address(scales),
        *blocks.strides[-4:-1],
        *scales.strides[-3:],
    )
    return Held(matrix, (blocks, scales))


def _hold_q8_0(matrix: Q8) -> Held:
    values, scales = matrix.values, matrix.scales
    num_rows, num_inputs = matrix.shape
    held = _kernels.Matrix(
        _Q8,
        num_rows,
        num_inputs,
        _address(values),
        _address(scales),
        row_stride=values.strides[0],
        block_stride=values.strides[1],
        scale_row_stride=scales.strides[0],
        scale_block_stride=scales.strides[1],
    )
    return Held(held, (values, scales))


def _hold_floats(array: npt.NDArray[Any]) -> Held:
    """A matrix [O, I] or a stack [E, O, I] whose rows must lie in one piece; transposed views are copied."""
    if array.dtype not in _FLOATS:
        array = array.astype(np.float32)
    if array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array)
    num_rows, num_inputs = array.shape[-2:]
    stack_stride = array.strides[0] if array.ndim == 3 else 0
    matrix = _kernels.Matrix(
        _FLOATS[array.dtype], num_rows, num_inputs, _address(array), 0, stack_stride, array.strides[-2]
    )
    return Held(matrix, (array,))
