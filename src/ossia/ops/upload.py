"""Arrays to a device: large ones of a mapped file, and the small ones of a pass.

A file's arrays go through two buffers of the host that take turns: while one travels to the card, the next piece is
read from the file into the other. Only pinned memory travels by itself, and a file's pages cannot be pinned. On a
device without pinning the buffers are plain memory, and all else is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ossia.ops.autograd import as_tensor

_BUFFER_BYTES = 32 << 20


def send(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A small array on the device. The host does not wait: what travels is a pinned copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Uploader:
    """Copies arrays to one device. May be used from any thread, one array at a time."""

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._device = device
        self._buffer_bytes = buffer_bytes
        self._lock = threading.Lock()
        self._turns: Iterator[_Buffer] | None = None

    def upload(self, values: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
        """The array, in any strides, as a contiguous tensor of the device; numbers become ``dtype`` there."""
        source = as_tensor(values)
        held = torch.empty(source.shape, dtype=dtype, device=self._device)
        with self._lock:
            if self._turns is None:
                self._turns = cycle([_Buffer(self._buffer_bytes, self._device) for _ in range(2)])
            for piece, place in _pieces(source, held, self._buffer_bytes):
                next(self._turns).send(piece, place)
        return held


class _Buffer:
    """Memory of the host through which one piece at a time travels."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        is_card = device.type == "cuda"
        self._bytes = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=is_card)
        # Whether the last piece has arrived.
        self._arrived = torch.cuda.Event() if is_card else None  # type: ignore[no-untyped-call]

    def send(self, piece: Tensor, place: Tensor) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()
        staged = self._bytes[: piece.nbytes].view(piece.dtype).view(piece.shape)
        staged.copy_(piece)
        # Of another dtype it would be converted on the host, which waits for it.
        place.copy_(staged if piece.dtype == place.dtype else staged.to(place.device, non_blocking=True), True)
        if self._arrived is not None:
            self._arrived.record()


def _pieces(source: Tensor, held: Tensor, limit_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both that belong together, each of at most so many bytes of the source."""
    if source.nbytes <= limit_bytes:
        yield source, held
    elif num_rows := limit_bytes * len(source) // source.nbytes:
        yield from zip(torch.split(source, num_rows), torch.split(held, num_rows), strict=True)
    else:
        for row, place in zip(source, held, strict=True):
            yield from _pieces(row, place, limit_bytes)
