"""A checkpoint with training's changes on top: the sum of both, computed a few rows or one expert at a time.

    adapter    pairs of `ossia.model.adapter`: a matrix becomes W + scaling * b a
    tensors    weights of a full fine-tune, by the names of `ossia.train.module` or those of Hugging Face

What nothing changes stays the view of the mapped file that it was, so that whoever writes it can copy its bytes. Sums
are computed in float64 and rounded once: no library's order of additions shows in them. Shapes: see `ossia.ops`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.adapter import Adapter
from ossia.model.config import ModelConfig
from ossia.model.layouts import HF_BF16, Dense, LayerArrays, ModelArrays
from ossia.model.safetensors_file import DTYPES, map_file, read_header
from ossia.model.weights import Checkpoint
from ossia.ops import Q8, Array, ExpertArrays, LoraPair, Mxfp4
from ossia.ops.mapped import give_back
from ossia.ops.mxfp4 import dequantize
from ossia.ops.q8 import dequantize_q8

Matrix = Any
"""A numpy array, `Mxfp4`, `Q8` or `Changed`."""


class Changed:
    """A matrix [O, I], or a stack of them [E, O, I], whose numbers are computed when they are asked for."""

    def __init__(self, base: Matrix, values: Array | None, pair: LoraPair | None, *, transposed: bool = False) -> None:
        self.base = base  # what the checkpoint holds, whose bits are kept where its numbers are
        self.values = values  # what replaces it
        self.pair = pair
        self.transposed = transposed  # the pair is for the transposed matrix, as an embedding's is
        self.shape: tuple[int, ...] = tuple(base.shape)

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        """float32 numbers of some rows of a matrix, or of one matrix of a stack."""
        values = numbers(self.base if self.values is None else self.values, rows)
        return values if self.pair is None else (values + self._delta(self.pair, rows)).astype(np.float32)

    def touches(self, expert: int) -> bool:
        """Whether one matrix of a stack may differ from the checkpoint's."""
        return self.values is not None or (self.pair is not None and _is_active(self.pair, expert))

    def _delta(self, pair: LoraPair, rows: Any) -> npt.NDArray[np.float64]:
        a, b = pair.a, pair.b
        if self.transposed:
            a, b = b.T, a.T
        a, b = (a[rows], b[rows]) if len(self.shape) == 3 else (a, b[rows])
        return pair.scaling * (b.astype(np.float64) @ a.astype(np.float64))


def numbers(matrix: Matrix, rows: Any = slice(None)) -> npt.NDArray[np.float32]:
    """float32 numbers of some rows of a matrix, or of one or all matrices of a stack."""
    if isinstance(matrix, Mxfp4):
        return dequantize(Mxfp4(matrix.blocks[rows], matrix.scales[rows], matrix.order))
    if isinstance(matrix, Q8):
        return dequantize_q8(Q8(matrix.values[rows], matrix.scales[rows]))
    # Widening is exact, also of what `Changed` has in float32 already.
    return np.asarray(matrix[rows]).astype(np.float32)


def release(matrix: Matrix, rows: Any) -> None:
    """Let go of the pages of mapped files under some rows of a matrix, or under one matrix of a stack, once read."""
    for part in (matrix.base, matrix.values) if isinstance(matrix, Changed) else (matrix,):
        arrays = (part[0], part[1]) if isinstance(part, Mxfp4 | Q8) else (part,)
        for array in arrays:
            if isinstance(array, np.ndarray):
                give_back(array[rows])


class Merged:
    """A checkpoint and its changes, as one model: arrays for `ossia.model.weights.load_weights` and for an export."""

    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter | None = None, tensors: Mapping[str, Array] | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self._pairs = {} if adapter is None else {k: pair for k, pair in adapter.pairs.items() if _is_active(pair)}
        self._tensors = tensors or {}

    @property
    def changed(self) -> frozenset[str]:
        """The keys of what is changed, such as layers.3.q.weight or layers.3.experts.gate."""
        return frozenset(self._tensors) | {_key_of_pair(key) for key in self._pairs}

    @property
    def is_random(self) -> bool:
        """Whether these are a random checkpoint's weights still; a full training gives all of them anew."""
        return self.checkpoint.has_random_weights and "embedding" not in self._tensors

    def outer(self) -> ModelArrays:
        """The arrays outside the layers."""
        base = self.checkpoint.outer()
        return ModelArrays(
            self._matrix("embedding", base.embedding_VD, transposed=True),
            self._vector("final_norm", base.final_norm_D),
            self._matrix("unembedding.weight", base.unembedding_VD),
        )

    def layer(self, i: int) -> LayerArrays:
        """The arrays of a layer."""
        base, prefix = self.checkpoint.layer(i), f"layers.{i}."

        def dense(name: str, own: Dense) -> Dense:
            weight = self._matrix(f"{prefix}{name}.weight", own.weight_OI)
            return Dense(weight, self._vector(f"{prefix}{name}.bias", own.bias_O))

        experts = base.experts
        return LayerArrays(
            attention_norm_D=self._vector(f"{prefix}attention_norm", base.attention_norm_D),
            q=dense("q", base.q),
            k=dense("k", base.k),
            v=dense("v", base.v),
            o=dense("o", base.o),
            sinks_Q=self._vector(f"{prefix}sinks", base.sinks_Q),
            moe_norm_D=self._vector(f"{prefix}moe_norm", base.moe_norm_D),
            router=dense("router", base.router),
            experts=ExpertArrays(
                self._matrix(f"{prefix}experts.gate", experts.gate),
                self._matrix(f"{prefix}experts.up", experts.up),
                self._matrix(f"{prefix}experts.down", experts.down),
                self._vector(f"{prefix}experts.gate_bias", experts.gate_bias_EF),
                self._vector(f"{prefix}experts.up_bias", experts.up_bias_EF),
                self._vector(f"{prefix}experts.down_bias", experts.down_bias_ED),
            ),
        )

    def parts(self, layer: int | None) -> dict[str, Matrix]:
        """The arrays of a layer, or those outside the layers, by the last part of their keys."""
        if layer is None:
            outer = self.outer()
            return {
                "embedding": outer.embedding_VD,
                "final_norm": outer.final_norm_D,
                "unembedding.weight": outer.unembedding_VD,
            }
        arrays = self.layer(layer)
        experts = arrays.experts
        dense = {"q": arrays.q, "k": arrays.k, "v": arrays.v, "o": arrays.o, "router": arrays.router}
        return {
            "attention_norm": arrays.attention_norm_D,
            "sinks": arrays.sinks_Q,
            "moe_norm": arrays.moe_norm_D,
            **{f"{name}.weight": each.weight_OI for name, each in dense.items()},
            **{f"{name}.bias": each.bias_O for name, each in dense.items()},
            "experts.gate": experts.gate,
            "experts.up": experts.up,
            "experts.down": experts.down,
            "experts.gate_bias": experts.gate_bias_EF,
            "experts.up_bias": experts.up_bias_EF,
            "experts.down_bias": experts.down_bias_ED,
        }

    def _matrix(self, key: str, base: Matrix, *, transposed: bool = False) -> Matrix:
        values, pair = self._tensors.get(key), self._pairs.get(key.removesuffix(".weight"))
        if values is None and pair is None:
            return base
        return Changed(base, values, pair, transposed=transposed)

    def _vector(self, key: str, base: Array) -> Array:
        return self._tensors.get(key, base)


def read_tensors(path: str | Path, config: ModelConfig) -> dict[str, Array]:
    """The tensors of a full fine-tune by the keys of `Merged`, as views of the mapped file or files.

    ``path``: a safetensors file, or a folder of them; of a run's checkpoint its trainable.safetensors. Names and shapes
    may be those of `ossia.train.module.Model.state` or of the Hugging Face layout in bfloat16; the dtype is free.
    Raises NotFoundError when there is nothing, CheckpointError when a tensor belongs to no gpt-oss model of this shape.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"there is no file or folder {path}. Expected a safetensors file of trained weights.")
    if path.is_dir():
        if any(path.glob("trainable-*-of-*.safetensors")):
            raise CheckpointError(
                f"{path} is a checkpoint of several processes, with a part of the weights from each. Expected whole "
                "weights: give the run's weights.safetensors, which is written at its end"
            )
        trainable = path / "trainable.safetensors"
        files = [trainable] if trainable.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path} holds no safetensors files. Give the folder or file of trained weights.")
    else:
        files = [path]
    tensors: dict[str, Array] = {}
    for file in files:
        mapped = map_file(file)
        for name, entry in read_header(file).items():
            if entry.dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(f"{file}: tensor {name} is {entry.dtype}; expected F32, F16 or BF16.")
            values = mapped[entry.offset : entry.offset + entry.size_bytes]
            if entry.offset % DTYPES[entry.dtype].itemsize:
                values = values.copy()
            tensors |= _by_key(file, name, values.view(DTYPES[entry.dtype]).reshape(entry.shape), config)
    return tensors


def _is_active(pair: LoraPair, expert: int | None = None) -> bool:
    a, b = (pair.a, pair.b) if expert is None else (pair.a[expert], pair.b[expert])
    return bool(pair.scaling) and bool(b.any()) and bool(a.any())


def _key_of_pair(key: str) -> str:
    return key if key == "embedding" or ".experts." in key else f"{key}.weight"


# Our names to those of Hugging Face, of what is the same in both.
HUGGING_FACE_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "moe_norm": "post_attention_layernorm.weight",
    "sinks": "self_attn.sinks",
    "router.weight": "mlp.router.weight",
    "router.bias": "mlp.router.bias",
    **{f"{x}.{kind}": f"self_attn.{x}_proj.{kind}" for x in "qkvo" for kind in ("weight", "bias")},
    "experts.down_bias": "mlp.experts.down_proj_bias",
}
HUGGING_FACE_OUTER = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}
_HF_TO_OURS = {hugging_face: ours for ours, hugging_face in (HUGGING_FACE_LAYER | HUGGING_FACE_OUTER).items()}


def _by_key(file: Path, name: str, values: Array, config: ModelConfig) -> dict[str, Array]:
    """One tensor of a file as one or two of ours, after a look at its shape."""
    if name.endswith((".a", ".b")):
        raise CheckpointError(
            f"{file}: tensor {name} belongs to a LoRA adapter, not to a full fine-tune. Give the adapter's folder, "
            "which was written beside it, as the adapter."
        )
    match = re.fullmatch(r"(model\.)?layers\.(\d+)\.(.+)", name)
    if match is None:
        key = _HF_TO_OURS.get(name, name)
        if key not in HUGGING_FACE_OUTER:
            raise _unknown(file, name)
        return {key: _checked(file, name, values, HUGGING_FACE_OUTER[key], config)}
    is_hugging_face, layer, inner = match[1] is not None, int(match[2]), match[3]
    if layer >= config.num_layers:
        raise CheckpointError(f"{file}: tensor {name} is of layer {layer}; the base has {config.num_layers} layers.")
    ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
    inner = _HF_TO_OURS.get(inner, inner) if is_hugging_face else inner
    if inner in HUGGING_FACE_LAYER:
        return {ours + inner: _checked(file, name, values, theirs + HUGGING_FACE_LAYER[inner], config)}
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
    # Shape, and how to find gate and up (or down) as [E, O, I] in it.
    forms: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "mlp.experts.gate_up_proj": (
            (E, D, 2 * F),
            {"gate": lambda x: x.swapaxes(1, 2)[:, 0::2], "up": lambda x: x.swapaxes(1, 2)[:, 1::2]},
        ),
        "mlp.experts.down_proj": ((E, F, D), {"down": lambda x: x.swapaxes(1, 2)}),
        "mlp.experts.gate_up_proj_bias": (
            (E, 2 * F),
            {"gate_bias": lambda x: x[:, 0::2], "up_bias": lambda x: x[:, 1::2]},
        ),
    }
    if not is_hugging_face:
        forms = {
            "experts.gate_up": ((E, 2 * F, D), {"gate": lambda x: x[:, :F], "up": lambda x: x[:, F:]}),
            "experts.gate": ((E, F, D), {"gate": lambda x: x}),
            "experts.up": ((E, F, D), {"up": lambda x: x}),
            "experts.down": ((E, D, F), {"down": lambda x: x}),
            "experts.gate_up_bias": ((E, 2 * F), {"gate_bias": lambda x: x[:, :F], "up_bias": lambda x: x[:, F:]}),
            "experts.gate_bias": ((E, F), {"gate_bias": lambda x: x}),
            "experts.up_bias": ((E, F), {"up_bias": lambda x: x}),
        }
    if inner not in forms:
        raise _unknown(file, name)
    shape, views = forms[inner]
    _check_shape(file, name, values, shape)
    return {f"{ours}experts.{part}": view(values) for part, view in views.items()}


def _checked(file: Path, name: str, values: Array, hugging_face_name: str, config: ModelConfig) -> Array:
    _check_shape(file, name, values, HF_BF16.expected(config)[hugging_face_name].shape)
    return values


def _check_shape(file: Path, name: str, values: Array, shape: tuple[int, ...]) -> None:
    if values.shape != shape:
        raise CheckpointError(
            f"{file}: tensor {name} is {list(values.shape)}, expected {list(shape)} for this base. Give the checkpoint "
            "that the training began from."
        )


def _unknown(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: tensor {name} is no part of a gpt-oss model; expected names such as layers.0.q.weight or "
        "model.layers.0.self_attn.q_proj.weight."
    )
