"""What a checkpoint is, and whether its numbers are sound.

`inspect_checkpoint` reads headers alone; `verify_checkpoint` reads every number that can be wrong.

Parameters are counted as in the gpt-oss model card, arXiv:2508.10925, table 1:

    MLP               experts and routers                  attention   q, k, v, o and sinks
    embed + unembed   both tables                          total       the three together
    active            what one token is multiplied by: everything but the experts that it is not sent to and the
                      embedding table, of which it reads one row

Norms, which the card does not mention, count with what follows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ossia.model.config import ModelConfig
from ossia.model.gguf_file import QUANTISED_NAMES
from ossia.model.layouts import FLOATS
from ossia.model.weights import Checkpoint
from ossia.ops.mxfp4 import SCALE_NAN

_CHUNK_VALUES = 8 << 20


@dataclass(frozen=True, slots=True)
class ParameterCount:
    mlp: int
    attention: int
    embedding: int
    active: int

    @property
    def total(self) -> int:
        return self.mlp + self.attention + self.embedding


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `ossia checkpoint inspect` shows."""

    folder: Path
    files: tuple[Path, ...]
    layout: str
    # The published model of this shape, None when there is none.
    shape: str | None
    config: ModelConfig
    parameters: ParameterCount
    size_bytes: int
    num_tensors: int
    # Bytes of each dtype, most first.
    dtype_bytes: dict[str, int]
    problems: tuple[str, ...]


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Look at a checkpoint without reading its weights.

    Problems with single tensors are listed; raises as `Checkpoint.open` does when the checkpoint cannot be read at all.
    """
    checkpoint = Checkpoint.open_unchecked(path)
    dtype_bytes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        dtype_bytes[entry.dtype] += entry.size_bytes
    return Inspection(
        folder=checkpoint.folder,
        files=checkpoint.files,
        layout=checkpoint.layout.name,
        shape=published_shape(checkpoint.config),
        config=checkpoint.config,
        parameters=count_parameters(checkpoint.config),
        size_bytes=checkpoint.size_bytes,
        num_tensors=len(checkpoint.tensors),
        dtype_bytes=dict(dtype_bytes.most_common()),
        problems=tuple(checkpoint.problems()),
    )


def verify_checkpoint(path: str | Path, progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
    """Everything that is wrong with a checkpoint, one sentence each; empty when it is sound.

    Tensors that are missing or do not fit, numbers that are NaN or infinite, MXFP4 blocks whose scale is NaN. The
    nibbles of MXFP4 are not read: each of them is a number. ``progress`` gets (bytes done, bytes in all).
    Raises as `Checkpoint.open` does when the checkpoint cannot be read at all.
    """
    checkpoint = Checkpoint.open_unchecked(path)
    problems = checkpoint.problems()
    parts = {
        name: part
        for name, entry in checkpoint.tensors.items()
        if (part := _part_that_can_be_wrong(checkpoint, name, entry.dtype)) is not None
    }
    total_bytes = sum(part.nbytes for part in parts.values())
    done_bytes = 0
    for name, part in parts.items():
        num_wrong = 0
        first: tuple[int, ...] = ()
        for start, chunk in _chunks(np.atleast_1d(part)):
            wrong = chunk == SCALE_NAN if chunk.dtype == np.uint8 else ~np.isfinite(chunk)
            if wrong.any():
                first = first or _position(wrong, start)
                num_wrong += int(np.count_nonzero(wrong))
            done_bytes += chunk.nbytes
            if progress is not None:
                progress(done_bytes, total_bytes)
        if num_wrong:
            what = "MXFP4 blocks with a NaN scale" if part.dtype == np.uint8 else "values that are NaN or infinite"
            problems.append(
                f"{checkpoint.tensors[name].file}: tensor {name} has {num_wrong:,} {what}, the first at "
                f"{list(first)}. Download it again."
            )
    return tuple(problems)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The parameters of a model of this shape."""
    D, F, E = config.hidden_size, config.intermediate_size, config.num_experts
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    expert = (D + 1) * 2 * F + (F + 1) * D
    mlp = E * expert + (D + 1) * E + D
    attention = (D + 1) * (q_rows + 2 * kv_rows) + (q_rows + 1) * D + config.num_heads + D
    table = config.vocab_size * D
    unused_experts = config.num_layers * (E - config.num_active_experts) * expert
    counts = (config.num_layers * mlp, config.num_layers * attention, 2 * table + D)
    return ParameterCount(*counts, active=sum(counts) - unused_experts - table)


def published_shape(config: ModelConfig) -> str | None:
    """ "gpt-oss-20b" or "gpt-oss-120b" for a model of that shape (also safeguard's), else None."""
    sizes = (config.num_layers, config.num_experts, config.hidden_size, config.intermediate_size, config.vocab_size)
    return {
        (24, 32, 2880, 2880, 201_088): "gpt-oss-20b",
        (36, 128, 2880, 2880, 201_088): "gpt-oss-120b",
    }.get(sizes)


def _part_that_can_be_wrong(checkpoint: Checkpoint, name: str, dtype: str) -> npt.NDArray[Any] | None:
    if dtype in FLOATS or (dtype == "U8" and name.endswith("scales")):
        return checkpoint.array(name)
    shape = checkpoint.tensors[name].shape
    # Of another shape it is no matrix of the model, which is told already, and cannot be unpacked.
    if dtype in ("MXFP4", "MXFP4_PAIRS", "Q8_0") or (dtype in QUANTISED_NAMES and len(shape) == 2 and all(shape)):
        return checkpoint.array(name).scales
    return None


def _chunks(values: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Groups of rows, with the index of their first."""
    rows = max(1, _CHUNK_VALUES * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]


def _position(wrong: npt.NDArray[np.bool_], start: int) -> tuple[int, ...]:
    row, *rest = (int(i) for i in np.unravel_index(np.argmax(wrong), wrong.shape))
    return (start + row, *rest)
