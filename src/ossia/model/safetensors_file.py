"""The safetensors format: read a file's header, check it against the file, map the data without copying it.

    8 bytes   N, little endian
    N bytes   JSON: {name: {"dtype": "BF16", "shape": [..], "data_offsets": [start, end]}, ..., "__metadata__": {..}}
    the rest  the tensors, row by row; offsets count from here; together they cover every byte exactly once

The `safetensors` package is not used because its numpy side knows no bfloat16 view of a mapped file: it copies.

Source: https://github.com/huggingface/safetensors, section Format.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_SIZE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# The same limit as the safetensors package has; real headers are below 1 MB.
_MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class TensorEntry(NamedTuple):
    """Where a tensor lies: the byte offset counts from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name; reads the header alone.

    Raises CheckpointError when the file is a git-lfs pointer, is cut off, or contradicts itself.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        refuse_lfs_pointer(path, head)
        size_bytes = path.stat().st_size
        if size_bytes < 8:
            raise CheckpointError(f"{path} has {size_bytes} bytes, too few for a safetensors file. {_DOWNLOAD_AGAIN}")
        header_bytes = int.from_bytes(head[:8], "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is not a safetensors file: its first 8 bytes announce a header of {header_bytes:,} bytes, "
                f"at most {_MAX_HEADER_BYTES:,} are possible. {_DOWNLOAD_AGAIN}"
            )
        if 8 + header_bytes > size_bytes:
            raise CheckpointError(
                f"{path} is cut off: its header needs {8 + header_bytes:,} bytes, the file has {size_bytes:,}. "
                f"{_DOWNLOAD_AGAIN}"
            )
        file.seek(8)
        header = _parse_header(path, file.read(header_bytes))
    data_start = 8 + header_bytes
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items() if name != "__metadata__"}
    _check_cover(path, entries, data_start, size_bytes)
    return entries


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file that holds tensors of these dtypes and shapes in this order, data excluded."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces fill up to a multiple of 8, so that the data is aligned.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file as a read-only array that reads from disk on first use."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Raise CheckpointError when a file begins as git-lfs pointers do."""
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the file itself: the repository was cloned without git-lfs. "
            "Run `git lfs pull` there, or download with `ossia pull`."
        )


_DOWNLOAD_AGAIN = "Download it again."


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_refuse_twins)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is not valid JSON ({error}). {_DOWNLOAD_AGAIN}"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object. {_DOWNLOAD_AGAIN}")
    return header


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        if not sound or not isinstance(dtype, str):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {name} is described by {json.dumps(value)[:200]}; expected dtype, shape and two "
            f"data_offsets. {_DOWNLOAD_AGAIN}"
        ) from None
    if dtype not in _SIZE_BITS:
        raise CheckpointError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; expected one of {[*DTYPES]}.")
    expected_bytes = -(-math.prod(shape) * _SIZE_BITS[dtype] // 8)
    if end - start != expected_bytes:
        raise CheckpointError(
            f"{path}: tensor {name} occupies {end - start:,} bytes, expected {expected_bytes:,} for {dtype} {shape}. "
            f"{_DOWNLOAD_AGAIN}"
        )
    return TensorEntry(path, dtype, shape, data_start + start, end - start)


def _check_cover(path: Path, entries: dict[str, TensorEntry], data_start: int, size_bytes: int) -> None:
    position, previous = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != position:
            fault = "overlaps" if entry.offset < position else "leaves a gap after"
            raise CheckpointError(
                f"{path}: tensor {name} begins at byte {entry.offset:,} and {fault} {previous}, which ends at byte "
                f"{position:,}. {_DOWNLOAD_AGAIN}"
            )
        position, previous = entry.offset + entry.size_bytes, f"tensor {name}"
        if position > size_bytes:
            raise CheckpointError(
                f"{path} is cut off: tensor {name} ends at byte {position:,}, the file has {size_bytes:,}. "
                f"{_DOWNLOAD_AGAIN}"
            )
    if position != size_bytes:
        raise CheckpointError(
            f"{path} has {size_bytes - position:,} bytes after {previous}, where its header says that it ends. "
            f"{_DOWNLOAD_AGAIN}"
        )
