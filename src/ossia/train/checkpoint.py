"""Checkpoints of a run: written whole or not at all, found again, and pruned.

    OUT/checkpoints/step-00000200/
        state.json              step, settings, position in the data, counters
        trainable.safetensors   what is trained, by name: of LoRA the pairs alone
        optimizer.safetensors   what the optimiser remembers, as NAME/WHAT
        random.safetensors      states of the random generators

A checkpoint is written beside its place, synced to the disk, and renamed: a folder with that name is complete, whenever
the machine stops. What an interrupted write left behind is removed by the next one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ossia.errors import CheckpointError, InputError, UnavailableError
from ossia.model.safetensors_file import DTYPES, header_bytes, map_file, read_header

_NAME = re.compile(r"step-(\d{8})")
_FILES = ("trainable", "optimizer", "random")
_TORCH_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to go on: JSON in ``state`` (with "step"), tensors by name in the rest."""

    state: Mapping[str, Any]
    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for name in _FILES for t in getattr(self, name).values())


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step lies."""
        return self.folder / f"step-{step:08}"

    def save(
        self, snapshot: Snapshot, *, best_step: int | None = None, more: Callable[[Path], None] | None = None
    ) -> Path:
        """Write a checkpoint, then remove the oldest beyond ``keep``; that of ``best_step`` is kept besides.

        ``more`` may write further files into the folder that it is given. Raises UnavailableError when the disk is
        full or refuses; the checkpoints before are untouched then.
        """
        place = self.path(snapshot.state["step"])
        partial = self.folder / f".{place.name}.partial"
        try:
            self._clear()
            partial.mkdir(parents=True)
            for name in _FILES:
                write_tensors(partial / f"{name}.safetensors", getattr(snapshot, name))
            with open(partial / "state.json", "w", encoding="utf-8") as file:
                json.dump(snapshot.state, file, indent=1)
            if more is not None:
                more(partial)
            sync_tree(partial)
            if place.exists():
                self._remove(place)
            partial.rename(place)
            sync_folder(self.folder)
            self._prune(best_step)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._unwritten(place, error) from error
        return place

    def load(self, step: int) -> Snapshot:
        """Raises CheckpointError when a file is missing or damaged."""
        return read_snapshot(self.path(step))

    def _clear(self) -> None:
        """Remove what interrupted writes and removals left."""
        if self.folder.is_dir():
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path)

    def _prune(self, best_step: int | None) -> None:
        for step in self.steps()[: -self.keep]:
            if step != best_step:
                self._remove(self.path(step))

    def _remove(self, path: Path) -> None:
        # Renamed first: a folder that is half removed must not look like a checkpoint.
        doomed = path.rename(path.with_name(f".{path.name}.removed"))
        shutil.rmtree(doomed)

    def _unwritten(self, place: Path, error: OSError) -> UnavailableError:
        kept = self.steps()
        last = f"the last complete one is {self.path(kept[-1])}" if kept else "there is none before it"
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        return UnavailableError(
            f"{place}: the checkpoint could not be written: {error.strerror or error}; {last}. "
            f"Then {remedy} and go on with --resume."
        )


def read_snapshot(path: Path) -> Snapshot:
    """A checkpoint's content. Raises CheckpointError when a file is missing or damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("no step in it")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'state.json'} cannot be read: {error}; remove {path} to resume before it"
        ) from None
    tensors = [read_tensors(path / f"{name}.safetensors") for name in _FILES]
    return Snapshot(state, *tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of torch tensors on any device, one copied at a time."""
    # Wider numbers first, so that all are aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    with open(path, "wb") as file:
        file.write(header_bytes({name: (_TORCH_NAMES[t.dtype], tuple(t.shape)) for name, t in ordered.items()}))
        for tensor in ordered.values():
            file.write(to_numpy(tensor).tobytes())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError."""
    try:
        entries, data = read_header(path), map_file(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; remove {path.parent} to resume before it"
        ) from None
    tensors = {}
    for name, (_, dtype, shape, offset, size_bytes) in entries.items():
        array = np.frombuffer(data[offset : offset + size_bytes].tobytes(), DTYPES[dtype]).reshape(shape)
        tensors[name] = from_numpy(array)
    return tensors


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


def sync_tree(folder: Path) -> None:
    """Wait until the files of a folder, and their names, are on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_run_folder(folder: Path, *, needed_bytes: int) -> None:
    """Make the folder of a run, and see that checkpoints can be written there.

    Raises InputError when it is no folder or cannot be written to, UnavailableError when the disk is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}; give another folder as out") from None
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UnavailableError(
            f"{folder}: the disk has {free_bytes / 2**30:.2f} GiB free, the checkpoints of this run need "
            f"{needed_bytes / 2**30:.2f} GiB; free some space, lower keep, or give another folder as out"
        )
