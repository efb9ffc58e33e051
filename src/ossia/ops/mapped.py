"""Memory of a mapped file: give back what has been read, so that a pass over a large file stays small in memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def give_back(array: npt.NDArray[Any]) -> None:
    """Let go of the resident pages under a view of a read-only file mapping; they stay in the system's page cache.

    Of a strided view also those between its rows. Other arrays are left alone.
    """
    if array.flags.writeable or not array.size:
        return
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap):
        return
    steps = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    address: int = array.__array_interface__["data"][0]
    start: int = np.frombuffer(owner, np.uint8).__array_interface__["data"][0]
    low = address + sum(step for step in steps if step < 0) - start
    high = address + sum(step for step in steps if step > 0) + array.itemsize - start
    first = -(-low // mmap.PAGESIZE) * mmap.PAGESIZE
    length = high // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        owner.madvise(mmap.MADV_DONTNEED, first, length)
