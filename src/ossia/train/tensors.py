"""From the arrays of a model to the tensors of a layout: the way back of `ossia.model.layouts`.

A tensor is made in pieces that follow each other in its file, some rows or one expert at a time. What a checkpoint
holds in the form that is asked for passes with its bits; what is changed, or of another form, is computed. A number
that is not finite, or that the form cannot hold, is refused by the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError
from ossia.model.layouts import Gguf, Layout
from ossia.model.safetensors_file import DTYPES
from ossia.ops import Q8, Mxfp4
from ossia.ops.mxfp4 import SCALE_NAN, dequantize, quantize, reorder
from ossia.ops.q8 import quantize_q8
from ossia.train.merged import HUGGING_FACE_LAYER, HUGGING_FACE_OUTER, Changed, Matrix, Merged, numbers, release

Bytes = npt.NDArray[Any]

# Rows of a dense matrix that are computed at a time, in numbers.
_CHUNK_VALUES = 8 << 20


class Source(NamedTuple):
    """What a tensor is made of: keys of `Merged.parts`, whose rows follow each other or alternate.

    dense        vectors, or matrices                     biases   [E, F] each
    whole        one matrix per expert                    transposed   the same, inputs before outputs
    blocks, scales   the two tensors of MXFP4
    """

    keys: tuple[str, ...]
    form: Literal["dense", "biases", "whole", "transposed", "blocks", "scales"] = "dense"
    alternate: bool = False


@dataclass
class Rounding:
    """What rounding a matrix's numbers to MXFP4 changed.

    Numbers of a published checkpoint lie on the grid. A change that is small beside the grid's steps is rounded away
    again, and one that is not is kept on average: ``kept`` is the part of it along which the rounded numbers moved.
    """

    squared_error: float = 0.0
    squared_numbers: float = 0.0
    change_dot_moved: float = 0.0
    squared_change: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root of the squared errors over the squared numbers."""
        return float(np.sqrt(self.squared_error / self.squared_numbers)) if self.squared_numbers else 0.0

    @property
    def kept(self) -> float | None:
        """<change, moved> / <change, change>; None where nothing was changed."""
        return self.change_dot_moved / self.squared_change if self.squared_change else None

    def add(self, base: npt.NDArray[Any] | None, wanted: npt.NDArray[Any], rounded: npt.NDArray[Any]) -> None:
        """Count one matrix: the numbers that it had, that it should have, and that it has."""
        error = rounded - wanted
        self.squared_error += float(np.vdot(error, error))
        self.squared_numbers += float(np.vdot(wanted, wanted))
        if base is not None:
            change = wanted - base
            self.change_dot_moved += float(np.vdot(change, rounded - base))
            self.squared_change += float(np.vdot(change, change))


class Tensors:
    """The tensors of a model in a layout, by name. ``rounding`` tells what was rounded to MXFP4, by key."""

    def __init__(self, model: Merged, layout: Layout) -> None:
        self.model = model
        self.layout = layout
        self.rounding: dict[str, Rounding] = {}
        # Scales of a tensor of blocks that was just made: the tensor of scales is next, as a rule.
        self._scales: dict[tuple[str, ...], list[Bytes]] = {}

    def keys(self, name: str) -> frozenset[str]:
        """What the tensor is made of, by the keys of `Merged.changed`."""
        source, layer = source_of(self.layout, name)
        return frozenset(key if layer is None else f"layers.{layer}.{key}" for key in source.keys)

    def pieces(self, name: str, dtype: str) -> Iterator[Bytes]:
        """The tensor's bytes, as arrays that follow each other."""
        source, layer = source_of(self.layout, name)
        arrays = self.model.parts(layer)
        parts = {key if layer is None else f"layers.{layer}.{key}": arrays[key] for key in source.keys}
        if source.form == "dense":
            for part in parts.values():
                yield from _dense(name, part, dtype)
        elif source.form == "biases":
            biases = [_checked(name, numbers(part)) for part in parts.values()]
            yield _cast(name, _joined(biases, source.alternate, axis=1), dtype)
        elif source.form == "scales" and tuple(parts) in self._scales:
            yield from self._scales.pop(tuple(parts))
        else:
            yield from self._stack(name, source, parts, dtype)

    def _stack(self, name: str, source: Source, parts: dict[str, Matrix], dtype: str) -> Iterator[Bytes]:
        all_scales = []
        for expert in range(next(iter(parts.values())).shape[0]):
            if source.form in ("whole", "transposed") and dtype != "MXFP4":
                matrices = [_checked(name, numbers(part, expert)) for part in parts.values()]
                matrix = _joined(matrices, source.alternate)
                yield _cast(name, matrix.T if source.form == "transposed" else matrix, dtype)
            else:
                order: Literal["pairs", "halves"] = "halves" if source.form == "whole" else "pairs"
                packed = [self._mxfp4(name, key, part, expert, order) for key, part in parts.items()]
                blocks = _joined([matrix.blocks for matrix in packed], source.alternate)
                scales = _joined([matrix.scales for matrix in packed], source.alternate)
                if source.form == "whole":
                    yield np.concatenate([scales[..., None], blocks], axis=-1)
                else:
                    yield blocks if source.form == "blocks" else scales
                    all_scales.append(scales)
            for part in parts.values():
                release(part, expert)
        if source.form == "blocks":
            self._scales = {tuple(parts): all_scales}

    def _mxfp4(self, name: str, key: str, part: Matrix, expert: int, order: Literal["pairs", "halves"]) -> Mxfp4:
        base = part.base if isinstance(part, Changed) else part
        held = Mxfp4(base.blocks[expert], base.scales[expert], base.order) if isinstance(base, Mxfp4) else None
        if held is not None and not (isinstance(part, Changed) and part.touches(expert)):
            return reorder(held, order)
        values = _checked(name, numbers(part, expert))
        quantized = quantize(values, like=held)
        if (quantized.scales == SCALE_NAN).any():
            raise _not_finite(name)
        before = numbers(base, expert) if base is not part else None
        self.rounding.setdefault(key, Rounding()).add(before, values, dequantize(quantized))
        return reorder(quantized, order)


def _dense(name: str, part: Matrix, dtype: str) -> Iterator[Bytes]:
    num_rows = part.shape[0]
    step = max(1, _CHUNK_VALUES * num_rows // max(1, int(np.prod(part.shape))))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        if dtype == "Q8_0":
            yield _q8_bytes(_q8(name, part, rows))
        elif isinstance(part, np.ndarray) and part.dtype == DTYPES[dtype]:
            yield _checked(name, part[rows])
        else:
            yield _cast(name, _checked(name, numbers(part, rows)), dtype)
        release(part, rows)


def _q8(name: str, part: Matrix, rows: slice) -> Q8:
    base = part.base if isinstance(part, Changed) else part
    held = Q8(base.values[rows], base.scales[rows]) if isinstance(base, Q8) else None
    if held is not None and base is part:
        return held
    quantized = quantize_q8(_checked(name, numbers(part, rows)), like=held)
    if not np.isfinite(quantized.scales).all():
        raise CheckpointError(f"tensor {name} holds numbers beyond the range of Q8_0. Export it with bf16 matrices.")
    return quantized


def _q8_bytes(matrix: Q8) -> Bytes:
    scales = np.ascontiguousarray(matrix.scales)[..., None].view(np.uint8)
    return np.concatenate([scales, matrix.values.view(np.uint8)], axis=-1)


def _cast(name: str, values: npt.NDArray[Any], dtype: str) -> Bytes:
    if values.dtype == DTYPES[dtype]:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(DTYPES[dtype])
    # What is finite may be too large for a narrower float.
    return _checked(name, cast)


def _checked(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise _not_finite(name)
    return values


def _not_finite(name: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name} would hold a NaN or an infinity: the training has diverged, or the checkpoint is damaged. "
        "Export an earlier checkpoint; `ossia checkpoint verify` looks for them in the base."
    )


def _joined(parts: list[npt.NDArray[Any]], alternate: bool, axis: int = 0) -> npt.NDArray[Any]:
    """Rows of gate and up, one after the other or in turn."""
    if len(parts) == 1 or not alternate:
        return np.concatenate(parts, axis=axis)
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return np.stack(parts, axis=axis + 1).reshape(shape)


# Which arrays a tensor is made of -----------------------------------------------------------------------------------


def source_of(layout: Layout, name: str) -> tuple[Source, int | None]:
    """What a tensor of a layout is made of, and the layer that it belongs to, None for those outside."""
    before, after = layout.layer_prefix(0).split("0")
    table = _GGUF if isinstance(layout, Gguf) else _ORIGINAL if layout.name == "original" else _HUGGING_FACE
    if name in table:
        return table[name], None
    layer, _, inner = name.removeprefix(before).partition(after)
    return table[inner], int(layer)


_GATE_UP = ("experts.gate", "experts.up")
_GATE_UP_BIAS = ("experts.gate_bias", "experts.up_bias")

_HUGGING_FACE = {
    **{theirs: Source((ours,)) for ours, theirs in (HUGGING_FACE_LAYER | HUGGING_FACE_OUTER).items()},
    "mlp.experts.gate_up_proj_bias": Source(_GATE_UP_BIAS, "biases", alternate=True),
    "mlp.experts.gate_up_proj_blocks": Source(_GATE_UP, "blocks", alternate=True),
    "mlp.experts.gate_up_proj_scales": Source(_GATE_UP, "scales", alternate=True),
    "mlp.experts.gate_up_proj": Source(_GATE_UP, "transposed", alternate=True),
    "mlp.experts.down_proj_blocks": Source(("experts.down",), "blocks"),
    "mlp.experts.down_proj_scales": Source(("experts.down",), "scales"),
    "mlp.experts.down_proj": Source(("experts.down",), "transposed"),
}

_ORIGINAL = {
    "embedding.weight": Source(("embedding",)),
    "norm.scale": Source(("final_norm",)),
    "unembedding.weight": Source(("unembedding.weight",)),
    "attn.norm.scale": Source(("attention_norm",)),
    "attn.qkv.weight": Source(("q.weight", "k.weight", "v.weight")),
    "attn.qkv.bias": Source(("q.bias", "k.bias", "v.bias")),
    "attn.out.weight": Source(("o.weight",)),
    "attn.out.bias": Source(("o.bias",)),
    "attn.sinks": Source(("sinks",)),
    "mlp.norm.scale": Source(("moe_norm",)),
    "mlp.gate.weight": Source(("router.weight",)),
    "mlp.gate.bias": Source(("router.bias",)),
    "mlp.mlp1_bias": Source(_GATE_UP_BIAS, "biases", alternate=True),
    "mlp.mlp2_bias": Source(("experts.down_bias",)),
    "mlp.mlp1_weight.blocks": Source(_GATE_UP, "blocks", alternate=True),
    "mlp.mlp1_weight.scales": Source(_GATE_UP, "scales", alternate=True),
    "mlp.mlp2_weight.blocks": Source(("experts.down",), "blocks"),
    "mlp.mlp2_weight.scales": Source(("experts.down",), "scales"),
}

_GGUF = {
    "token_embd.weight": Source(("embedding",)),
    "output_norm.weight": Source(("final_norm",)),
    "output.weight": Source(("unembedding.weight",)),
    "attn_norm.weight": Source(("attention_norm",)),
    "post_attention_norm.weight": Source(("moe_norm",)),
    "attn_sinks.weight": Source(("sinks",)),
    **{
        f"{theirs}.{kind}": Source((f"{ours}.{kind}",))
        for ours, theirs in {
            "q": "attn_q",
            "k": "attn_k",
            "v": "attn_v",
            "o": "attn_output",
            "router": "ffn_gate_inp",
        }.items()
        for kind in ("weight", "bias")
    },
    "ffn_gate_exps.weight": Source(("experts.gate",), "whole"),
    "ffn_up_exps.weight": Source(("experts.up",), "whole"),
    "ffn_down_exps.weight": Source(("experts.down",), "whole"),
    "ffn_gate_exps.bias": Source(("experts.gate_bias",)),
    "ffn_up_exps.bias": Source(("experts.up_bias",)),
    "ffn_down_exps.bias": Source(("experts.down_bias",)),
    "ffn_gate_up_exps.weight": Source(_GATE_UP, "whole"),
    "ffn_gate_up_exps.bias": Source(_GATE_UP_BIAS, "biases"),
}
