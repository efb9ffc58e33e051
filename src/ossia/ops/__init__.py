"""The arithmetic of gpt-oss as one small set of operations, with several implementations of the same signatures.

    reference   numpy, the specification (`reference.py`)
    cpu         C++ kernels (`cpu.py`, `csrc/`)
    gpu         Triton kernels and torch (`gpu.py`, `triton/`)
    autograd    torch, differentiable, for training (`autograd.py`)

Legend for shapes, used in every file that touches tensors
    T  tokens of the batch, all sequences one after the other      N  sequences of the batch
    D  hidden size     F  intermediate size     V  vocabulary      R  rows whose logits are wanted
    Q  query heads     K  key/value heads       H  head dim        G  query heads per key/value head, Q / K
    E  experts         A  experts per token     O, I  outputs and inputs of a matrix
    B  cache blocks    S  slots (tokens) in a block                J  keys that a query may see
    P  pairs of a rotated head, H / 2

Arrays are numpy arrays for `reference` and `cpu` (bfloat16 by `ml_dtypes`), torch tensors for the others. Activations
are float32 unless a backend says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from ossia.errors import ConfigError, UnavailableError

Array = Any
"""A numpy array or a torch tensor, depending on the backend."""


class Mxfp4(NamedTuple):
    """A matrix [..., O, I] in MXFP4: 32 values along I share one scale (OCP Microscaling Formats v1.0).

    Both arrays may be strided views of a mapped file. With ``order`` "pairs" (the published checkpoints) byte i of a
    block holds value 2i in its low nibble and value 2i+1 in its high one; with "halves" (GGUF) values i and 16+i.
    """

    blocks: Array  # uint8 [..., O, I/32, 16]
    scales: Array  # uint8 [..., O, I/32], E8M0
    order: Literal["pairs", "halves"] = "pairs"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix as numbers: (..., O, I)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * 32)


class Q8(NamedTuple):
    """A matrix [..., O, I] in GGUF's Q8_0: 32 values along I share one float16 scale, number = value * scale.

    Both arrays may be strided views of a mapped file.
    """

    values: Array  # int8 [..., O, I/32, 32]
    scales: Array  # float16 [..., O, I/32]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix as numbers: (..., O, I)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * 32)


class ExpertArrays(NamedTuple):
    """The experts of one layer as a checkpoint holds them; matrices are `Mxfp4` or float arrays, views allowed.

    Checkpoints that interleave gate and up rows give two strided views of one tensor.
    """

    gate: Mxfp4 | Array  # [E, F, D]
    up: Mxfp4 | Array  # [E, F, D]
    down: Mxfp4 | Array  # [E, D, F]
    gate_bias_EF: Array
    up_bias_EF: Array
    down_bias_ED: Array


class LoraPair(NamedTuple):
    """A low-rank change of one matrix, or of each of a stack of experts: y += scaling * b (a x)."""

    a: Array  # [.., r, I]
    b: Array  # [.., O, r]
    scaling: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    def delta(self) -> Array:
        """What merging adds, float32 [.., O, I]."""
        return np.float32(self.scaling) * (self.b.astype(np.float32) @ self.a.astype(np.float32))


class ExpertLoras(NamedTuple):
    """The low-rank changes of the experts of one layer."""

    gate: LoraPair | None  # [E, r, D], [E, F, r]
    up: LoraPair | None  # [E, r, D], [E, F, r]
    down: LoraPair | None  # [E, r, F], [E, D, r]


class Adapted(NamedTuple):
    """Held weights for one batch, some of whose rows go through a low-rank change as well.

    It stands for what `linear_weights`, `embedding` or `experts` made; ``loras`` are made by `lora` or `expert_loras`,
    and row t goes through ``loras[lora_T[t]]``: none if that number is -1, or that entry is None.
    """

    weights: Any
    loras: tuple[Any, ...]
    lora_T: Array  # int32


class Routing(NamedTuple):
    """Which experts a token goes to, best first, and with what weight."""

    experts_TA: Array  # int32
    weights_TA: Array  # float32, rows sum to 1


class Shared(NamedTuple):
    """How sequences attend of which some begin alike, where training computes what they have in common once.

    ``rows_E`` are the tokens of all sequences, each whole and behind the one before, as places in the batch;
    ``places_T`` says of each token of the batch where in ``rows_E`` its output is taken from.
    """

    rows_E: Array
    places_T: Array


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass over N sequences in flat arrays, all int32.

    Sequence n owns the tokens ``query_starts_N1[n] : query_starts_N1[n + 1]``; they are its *last* ones: after this
    pass it has ``key_lengths_N[n]`` keys. Position p of a sequence lives in block ``table[n, p // S]``, slot ``p % S``.
    Layers with full attention and sliding-window layers have pools and tables of their own. The window's table is
    valid from the block of the first key that any query of this pass may see; before that it may hold -1, and unused
    ends of both tables hold -1. A pass without a cache (training) needs no tables: each sequence attends to
    its own tokens. ``adapters`` holds, for each sequence, the adapter that its tokens go through, or None; empty means
    that no sequence has one. Operations do not read it: see `ossia.model.adapted`. With ``shared`` (training alone)
    ``query_starts_N1`` counts in its ``rows_E``.
    """

    token_ids_T: Array
    positions_T: Array
    query_starts_N1: Array
    key_lengths_N: Array
    full_table_NB: Array
    window_table_NB: Array
    logit_rows_R: Array
    adapters: tuple[Any, ...] = ()
    shared: Shared | None = None


class Ops(Protocol):
    """What a backend must offer. The model file calls nothing else.

    `linear_weights`, `embedding`, `vector`, `experts` and `kv_cache` turn arrays of a checkpoint into whatever the
    backend wants to hold and are called once; their results are opaque to everyone else.
    """

    name: str

    def vector(self, values: Array) -> Array:
        """Hold a bias, norm scale or sinks array of any shape (float32 in all backends but autograd)."""

    def embedding(self, table_VD: Array | Q8) -> Any:
        """Hold an embedding table; rows are read one by one."""

    def linear_weights(self, weight_OI: Array | Q8, bias_O: Array | None = None) -> Any:
        """Hold a dense matrix."""

    def experts(self, arrays: ExpertArrays) -> Any:
        """Hold the experts of a layer; MXFP4 stays MXFP4 and is not copied."""

    def kv_cache(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> Any:
        """The paged key/value memory of one layer."""

    def kv_block_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        """Bytes that one block of such a cache takes."""

    def embed(self, embedding: Any, token_ids_T: Array) -> Array:
        """x_TD = table[token_ids]."""

    def rms_norm(self, x_TD: Array, scale_D: Array, eps: float) -> Array:
        """x / sqrt(mean(x^2) + eps) * scale over the last axis."""

    def linear(self, x_TI: Array, weights: Any) -> Array:
        """x_TO = x W^T + b."""

    def rope_angles(self, positions_T: Array, inv_freq_P: Array, concentration: float) -> tuple[Array, Array]:
        """(cos_TP, sin_TP) of positions times frequencies (the product in float32), times the concentration."""

    def rope(self, x_TQH: Array, cos_TP: Array, sin_TP: Array) -> Array:
        """Rotate the first half of each head against the second half. May overwrite x."""

    def attention(
        self,
        q_TQH: Array,
        k_TKH: Array,
        v_TKH: Array,
        sinks_Q: Array,
        cache: Any,
        batch: Batch,
        window: int | None,
    ) -> Array:
        """Store k and v in the cache, then o_TQH = causal attention of each sequence over all its keys.

        The scale is 1/sqrt(H); the sink of a head joins the maximum and the denominator of its softmax and adds no
        value. With a window, a query sees the last ``window`` positions, itself included, and the cache is addressed
        by the batch's window table. ``cache`` None: the keys are those of the batch.
        """

    def route(self, logits_TE: Array, num_active: int) -> Routing:
        """The top experts of each token, equal logits by lower index, softmax over those chosen alone."""

    def moe(self, x_TD: Array, routing: Routing, experts: Any, limit: float) -> Array:
        """o_TD = sum over chosen experts of weight * (down(swiglu(gate(x), up(x)))), in the order of ``routing``.

        swiglu(g, u) = g' sigmoid(1.702 g') (u' + 1) with g' = min(g, limit), u' = clip(u, -limit, limit).
        """


class AdapterOps(Ops, Protocol):
    """A backend that also computes adapters beside the weights: `embed`, `linear` and `moe` take `Adapted` ones."""

    def lora(self, pair: LoraPair) -> Any:
        """Hold a low-rank change of a dense matrix or an embedding table, in memory of its own."""

    def expert_loras(self, loras: ExpertLoras) -> Any:
        """Hold the low-rank changes of the experts of a layer, in memory of its own."""


SWIGLU_ALPHA = 1.702


def load(name: str, **options: Any) -> AdapterOps:
    """Make a backend: "reference" (option ``dtype``), "cpu" or "gpu" (options of `CpuOps`, `ossia.ops.gpu.GpuOps`).

    Raises ConfigError for another name, UnavailableError where a GPU, or what drives it, is not there.
    """
    # Each backend brings its own heavy imports (an extension, torch): they are paid only by whoever asks for it.
    if name == "reference":
        from ossia.ops.reference import ReferenceOps

        return ReferenceOps(**options)
    if name == "cpu":
        from ossia.ops.cpu import CpuOps

        return CpuOps(**options)
    if name == "gpu":
        return _gpu(**options)
    raise ConfigError(f"unknown backend {name!r}; expected one of: reference, cpu, gpu")


def _gpu(**options: Any) -> AdapterOps:
    try:
        from ossia.ops.gpu import GpuOps
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "triton"):
            raise
        raise UnavailableError(
            f"backend gpu needs the package {error.name}, which is not installed. Run `pip install 'ossia[gpu]'`, or "
            "use --backend cpu."
        ) from error
    return GpuOps(**options)
