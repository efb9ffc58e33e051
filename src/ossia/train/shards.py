"""Trained tensors in safetensors files: whole, or each process of a run the rows that it holds.

    NAME.safetensors                                    all rows
    NAME-00001-of-00002.safetensors, .json              the rows of the first of two, and which rows of what these are

Any number of processes reads what any other number wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ossia.errors import CheckpointError
from ossia.model.safetensors_file import DTYPES, TensorEntry, header_bytes, map_file, read_header

_TORCH_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


class Extent(NamedTuple):
    """Which rows of a whole tensor a process holds."""

    first: int
    num_rows: int
    shape: tuple[int, ...]  # of the whole

    def of(self, whole: Tensor) -> Tensor:
        """These rows."""
        return whole[self.first : self.first + self.num_rows]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing these, which takes a second."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    part: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of torch tensors on any device, one copied at a time; it is on the disk when this returns."""
    # Wider numbers first, so that all are aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    with open(path, "wb") as file:
        file.write(header_bytes({name: (_TORCH_NAMES[t.dtype], tuple(t.shape)) for name, t in ordered.items()}))
        for tensor in ordered.values():
            file.write(to_numpy(tensor).tobytes())
        file.flush()
        os.fsync(file.fileno())


def shard_name(name: str, rank: int, size: int) -> str:
    """The name of what one process of several writes."""
    return f"{name}-{rank + 1:05}-of-{size:05}"


def write_shard(
    folder: Path, name: str, tensors: Mapping[str, Tensor], held: Mapping[str, Extent], rank: int, size: int
) -> Path:
    """Write what this process, ``rank`` of ``size``, holds of some tensors.

    ``held`` tells the rows of each, and with them those of what an optimiser remembers of it as TENSOR/WHAT. Tensors
    that every process holds whole are written by the first alone.
    """
    path = folder / f"{shard_name(name, rank, size)}.safetensors"
    own, first, whole = dict[str, Tensor](), dict[str, int](), dict[str, list[int]]()
    for key, tensor in tensors.items():
        part = local(tensor)
        extent = _extent(held, key, part.ndim)
        is_whole = extent is None or tuple(part.shape) == extent.shape
        if part.numel() and (not is_whole or rank == 0):
            own[key] = part
            first[key] = 0 if extent is None else extent.first
            whole[key] = list(part.shape if extent is None else extent.shape)
    write_tensors(path, own)
    index = {"files": size, "first": first, "shape": whole}
    path.with_suffix(".json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    return path


def read_shards(folder: Path, name: str, held: Mapping[str, Extent]) -> dict[str, Tensor]:
    """What ``held`` names of tensors, whatever the number of processes that wrote them; others whole. On the CPU.

    Raises CheckpointError when files are missing or damaged, or a tensor is not whole.
    """
    shards = _open(folder, name)
    shapes = {key: shape for shard in shards for key, shape in shard.shapes.items()}
    return {key: _rows(folder, shards, key, shape, _extent(held, key, len(shape))) for key, shape in shapes.items()}


class _Shard(NamedTuple):
    entries: Mapping[str, TensorEntry]
    data: np.ndarray[Any, Any]
    first: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]


def _open(folder: Path, name: str) -> list[_Shard]:
    paths = sorted(folder.glob(f"{name}-*-of-*.json"))
    try:
        if not paths:
            path = folder / f"{name}.safetensors"
            entries = read_header(path)
            return [_Shard(entries, map_file(path), {}, {key: entry.shape for key, entry in entries.items()})]
        indices = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if any(index["files"] != len(paths) for index in indices):
            raise CheckpointError(f"{folder} holds {len(paths)} shards of {name}; expected {indices[0]['files']}.")
        files = [path.with_suffix(".safetensors") for path in paths]
        return [
            _Shard(read_header(file), map_file(file), index["first"], {k: tuple(s) for k, s in index["shape"].items()})
            for file, index in zip(files, indices, strict=True)
        ]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from None


def _rows(folder: Path, shards: list[_Shard], key: str, shape: tuple[int, ...], extent: Extent | None) -> Tensor:
    """The rows of one tensor, from all files that have some of them."""
    if not shape:
        return next(from_numpy(_values(shard, key)) for shard in shards if key in shard.entries)
    begin, num_rows = (0, shape[0]) if extent is None else extent[:2]
    pieces = []
    for shard in shards:
        if key in shard.entries:
            values, first = _values(shard, key), shard.first.get(key, 0)
            low = min(max(begin - first, 0), len(values))
            pieces.append(values[low : max(low, begin + num_rows - first)])
    filled = sum(map(len, pieces))
    if filled != num_rows:
        raise CheckpointError(f"{folder}: {filled} of {num_rows} rows of {key} are there. Copy it again")
    return from_numpy(np.concatenate(pieces))


def _values(shard: _Shard, key: str) -> np.ndarray[Any, Any]:
    """A tensor of a file, where it lies."""
    entry = shard.entries[key]
    return shard.data[entry.offset : entry.offset + entry.size_bytes].view(DTYPES[entry.dtype]).reshape(entry.shape)


def _extent(held: Mapping[str, Extent], key: str, num_axes: int) -> Extent | None:
    """Which rows of a tensor are held; None: all of it, as of the numbers that count an optimiser's steps."""
    extent = held.get(key) or held.get(key.rpartition("/")[0])
    return extent if extent is not None and len(extent.shape) == num_axes else None


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The numbers of a tensor, bfloat16 by `ml_dtypes`."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """A tensor with a copy of the array's numbers."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
