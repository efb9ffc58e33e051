"""Which matrices of two checkpoints of one model differ, whatever their layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ossia.errors import InputError
from ossia.model.weights import Checkpoint
from ossia.train.merged import Merged, numbers, release

# Rows of a dense matrix that are compared at a time, in numbers.
_CHUNK_VALUES = 8 << 20


class Difference(NamedTuple):
    """One matrix or vector, by its key, such as layers.3.experts.gate."""

    key: str
    relative: float  # root of the squared differences over the squared numbers of the first
    share: float  # of its numbers that differ


def differences(
    first: Checkpoint, second: Checkpoint, progress: Callable[[int, int], None] | None = None
) -> Iterator[Difference]:
    """What differs, in the order of the forward pass; equal numbers in other bits do not.

    ``progress`` gets (layers done, layers in all). Raises InputError when the two are of different shapes.
    """
    layers = [None, *range(first.config.num_layers)]
    a, b = Merged(first), Merged(second)
    for done, layer in enumerate(layers):
        if layer is not None and layer >= second.config.num_layers:
            raise _other_shape(first, second, f"{first.config.num_layers} and {second.config.num_layers} layers")
        ours, theirs = a.parts(layer), b.parts(layer)
        for key, matrix in ours.items():
            if tuple(matrix.shape) != tuple(theirs[key].shape):
                raise _other_shape(first, second, f"{key} is {list(matrix.shape)} and {list(theirs[key].shape)}")
            name = key if layer is None else f"layers.{layer}.{key}"
            found = _difference(name, matrix, theirs[key])
            if found.share:
                yield found
        if progress is not None:
            progress(done + 1, len(layers))
    if second.config.num_layers > first.config.num_layers:
        raise _other_shape(first, second, f"{first.config.num_layers} and {second.config.num_layers} layers")


def _difference(key: str, first: Any, second: Any) -> Difference:
    squared = squared_first = 0.0
    num_changed = num_values = 0
    is_stack = len(first.shape) == 3
    step = 1 if is_stack else max(1, _CHUNK_VALUES // max(1, int(np.prod(first.shape[1:]))))
    for start in range(0, first.shape[0], step):
        rows: Any = start if is_stack else slice(start, start + step)
        ours, theirs = numbers(first, rows), numbers(second, rows)
        # What is not finite on either side is equal to itself alone, and does not drown the rest.
        differs = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
        num_changed += int(np.count_nonzero(differs))
        num_values += ours.size
        with np.errstate(invalid="ignore", over="ignore"):
            change = np.where(differs, theirs - ours, 0).astype(np.float64)
            squared += float(np.vdot(change, change))
            squared_first += float(np.vdot(ours, ours))
        for matrix in (first, second):
            release(matrix, rows)
    relative = np.sqrt(squared / squared_first) if squared_first else float("inf") if squared else 0.0
    return Difference(key, float(relative), num_changed / max(1, num_values))


def _other_shape(first: Checkpoint, second: Checkpoint, what: str) -> InputError:
    return InputError(
        f"{first.folder} and {second.folder} are of different shapes: {what}. Compare two checkpoints of one model."
    )
