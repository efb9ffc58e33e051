"""A control group of version 2 for one sandbox, where the one that ossia runs in allows it.

It counts what nothing inside can count: tmpfs pages, kernel memory, processes of every kind. Where it cannot be had the
supervisor's own watch and the sizes of the mounts bound the same things less exactly.

Source   Linux, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from ossia.tools.sandbox.limits import Limits

# For the supervisor, the sandbox's init and what the kernel keeps for them.
_OWN_BYTES = 96 << 20


class Cgroup:
    """One group, with bounds on all that is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, limits: Limits, parents: Iterable[Path] | None = None) -> Cgroup | None:
        """A bounded group below the first of ``parents`` (by default, those of this process) that hands on the
        controllers of memory and processes; None if none does."""
        for parent in _own_groups() if parents is None else parents:
            try:
                controllers = (parent / "cgroup.subtree_control").read_text().split()
                if not {"memory", "pids"} <= set(controllers):
                    continue
                path = parent / f"ossia-python-{secrets.token_hex(8)}"
                path.mkdir()
            except OSError:
                continue
            group = cls(path)
            total = limits.memory_bytes + limits.data_bytes + 2 * limits.scratch_bytes + _OWN_BYTES
            try:
                (path / "memory.max").write_text(str(total))
                (path / "pids.max").write_text(str(limits.num_processes + 8))
            except OSError:
                group.remove()
                continue
            for name, value in (("memory.swap.max", "0"), ("cpu.max", f"{limits.num_cpus * 100_000} 100000")):
                with contextlib.suppress(OSError):
                    if (path / name).exists():
                        (path / name).write_text(value)
            return group
        return None

    def add(self, pid: int) -> None:
        """Take in a process and all its descendants. Raises OSError."""
        waiting = [pid]
        while waiting:
            one = waiting.pop()
            (self.path / "cgroup.procs").write_text(str(one))
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{one}/task"):
                    waiting += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())

    def remove(self) -> None:
        """End what is left in it and take it away."""
        with contextlib.suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _own_groups() -> list[Path]:
    """Where this process may make groups: beside its own, or below it."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    roots = [line.split()[4] for line in mounts if " - cgroup2 " in line]
    names = [line.partition("::")[2] for line in own if line.startswith("0::")]
    if not roots or not names:
        return []
    path = Path(roots[0] + names[0])
    return [one for one in (path, path.parent) if str(one).startswith(roots[0]) and os.access(one, os.W_OK)]
