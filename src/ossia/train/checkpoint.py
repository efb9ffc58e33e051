"""Checkpoints of a run: written whole or not at all, found again, and pruned.

    OUT/checkpoints/step-00000200/
        state.json              step, settings, position in the data, counters
        trainable.safetensors   what is trained, by name: of LoRA the pairs alone
        optimizer.safetensors   what the optimiser remembers, as NAME/WHAT
        random.safetensors      states of the random generators

Where several processes train, each writes what it holds of them, as trainable-00001-of-00002.safetensors
(`ossia.train.shards`), and any number of processes reads it.

A checkpoint is written beside its place, synced to the disk, and renamed: a folder with that name is complete, whenever
the machine stops. What an interrupted write left behind is removed by the next one.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ossia.errors import CheckpointError, InputError, UnavailableError
from ossia.train.parallel import Team
from ossia.train.shards import Extent, read_shards, shard_name, write_shard, write_tensors

_NAME = re.compile(r"step-(\d{8})")
_FILES = ("trainable", "optimizer", "random")


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to go on: JSON in ``state`` (with "step"), tensors by name in the rest.

    Of several processes each has its own parts of the tensors, and all the same state.
    """

    state: Mapping[str, Any]
    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    random: Mapping[str, Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for name in _FILES for t in getattr(self, name).values())


class Checkpoints:
    """The checkpoints of one run. All processes of ``team`` save and load together."""

    def __init__(self, folder: Path, *, keep: int, team: Team | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.team = team or Team()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step lies."""
        return self.folder / f"step-{step:08}"

    def save(
        self, snapshot: Snapshot, *, best_step: int | None = None, held: Mapping[str, Extent] | None = None
    ) -> Path:
        """Write a checkpoint, then remove the oldest beyond ``keep``; that of ``best_step`` is kept besides.

        ``held`` tells which rows of what is trained this process has; None: all. Raises UnavailableError when the disk
        is full or refuses; the checkpoints before are untouched then.
        """
        place = self.path(snapshot.state["step"])
        partial = self.folder / f".{place.name}.partial"
        try:
            self.team.first(lambda: self._begin(partial))
            self._write(partial, snapshot, held or {})
            self.team.wait()
            self.team.first(lambda: self._finish(partial, place, snapshot.state, best_step))
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._unwritten(place, error) from error
        return place

    def load(self, step: int, held: Mapping[str, Extent] | None = None) -> Snapshot:
        """What ``held`` names of a checkpoint's tensors, all if None.

        Raises CheckpointError when a file is missing or damaged.
        """
        path = self.path(step)
        state = read_state(path)
        # Random states are a process's own: another number of processes begins with new ones.
        has_own = state.get("processes", 1) == self.team.size
        try:
            trainable, optimizer = (read_shards(path, name, held or {}) for name in ("trainable", "optimizer"))
            random = read_shards(path, self._own("random"), {}) if has_own else {}
        except CheckpointError as error:
            before = [one for one in self.steps() if one < step]
            remedy = f"--resume then goes on after step {before[-1]}" if before else "the run has to begin anew then"
            met = error.message.removesuffix(".").removesuffix("Download it again").rstrip(". ")
            raise CheckpointError(f"{met}. Remove {path}; {remedy}.") from None
        return Snapshot(state, trainable, optimizer, random)

    def state(self, step: int) -> dict[str, Any]:
        """The state of a checkpoint alone. Raises CheckpointError as `load`."""
        return read_state(self.path(step))

    def _begin(self, partial: Path) -> None:
        self._clear()
        partial.mkdir(parents=True)

    def _write(self, partial: Path, snapshot: Snapshot, held: Mapping[str, Extent]) -> None:
        team = self.team
        for name in ("trainable", "optimizer"):
            if team.size == 1:
                write_tensors(partial / f"{name}.safetensors", getattr(snapshot, name))
            else:
                write_shard(partial, name, getattr(snapshot, name), held, team.rank, team.size)
        write_tensors(partial / f"{self._own('random')}.safetensors", snapshot.random)

    def _own(self, name: str) -> str:
        return name if self.team.size == 1 else shard_name(name, self.team.rank, self.team.size)

    def _finish(self, partial: Path, place: Path, state: Mapping[str, Any], best_step: int | None) -> None:
        with open(partial / "state.json", "w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
        sync_tree(partial)
        if place.exists():
            self._remove(place)
        partial.rename(place)
        sync_folder(self.folder)
        self._prune(best_step)

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


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises CheckpointError when it is missing or damaged."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("no step in it")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path / 'state.json'} cannot be read: {error}; remove {path} to resume before it"
        ) from None
    return state


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
