"""What the control groups that this process is in leave it: a container's bounds, a service's, a scheduler's.

A bound of any group from the process's own up to the topmost holds. A container often sees its own group as the topmost
one, and then not by the name that the process has it by.

Sources  Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; Documentation/scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class MemoryBound(NamedTuple):
    """Bytes that a group may take, and how many of them are left."""

    limit: int
    left: int


# Limit, use, and what stands before the names of pages that belong to files, in versions 2 and 1.
_MEMORY = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


def memory_bounds(root: Path = Path("/")) -> Iterator[MemoryBound]:
    """The bounds of memory that hold for this process; ``root`` is where the system's files are."""
    for group in _groups("memory", root):
        for limit, used, prefix in _MEMORY:
            # "max" is no number, and no bound.
            with contextlib.suppress(OSError, ValueError):
                bound = int((group / limit).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Pages of files, a mapped model's among them, are the system's to take back.
                files = sum(int(stat.get(f"{prefix}{which}_file", 0)) for which in ("active", "inactive"))
                yield MemoryBound(bound, bound - int((group / used).read_text()) + files)


def processors(root: Path = Path("/")) -> float:
    """How many processors' time this process may use, infinite without a bound; ``root`` as in `memory_bounds`."""
    least = math.inf
    for group in _groups("cpu", root):
        # Version 2 has both numbers in one file, and "max" for no quota; version 1 has -1.
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):
                quota, period = (int(part) for file in files for part in (group / file).read_text().split())
                least = min(least, quota / period if quota > 0 else math.inf)
    return least


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the groups that this process is in, its own first; some may not be there."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        # Version 2 names no controllers.
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = Path(name.lstrip("/"))
        yield from (top / group for group in (own, *own.parents))
