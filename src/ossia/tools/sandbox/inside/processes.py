"""The processes of the model's code: find them all, weigh them, stop them, end them.

In a process namespace they are all that /proc shows; without one they are the descendants of the supervisor, which
orphans come back to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """What a set of processes takes now."""

    num_tasks: int
    # Resident pages; those shared by several processes are counted for each.
    resident_bytes: int


class Stat(NamedTuple):
    """Of /proc/PID/stat. A process whose first thread has ended looks like a zombie while its other threads run."""

    state: str
    num_threads: int

    @property
    def has_ended(self) -> bool:
        return self.state in "ZX" and self.num_threads <= 1


class Processes:
    """All processes of the sandbox but its init and this one."""

    def __init__(self, has_namespace: bool) -> None:
        self._has_namespace = has_namespace
        self._self = os.getpid()

    def find(self) -> list[int]:
        if self._has_namespace:
            return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, self._self)]
        found: list[int] = []
        waiting = [self._self]
        while waiting:
            children = _children(waiting.pop())
            found += children
            waiting += children
        return found

    def usage(self) -> Usage:
        pids = self.find()
        stats = [one for one in map(stat, pids) if one is not None]
        return Usage(sum(one.num_threads for one in stats), sum(map(_resident_bytes, pids)))

    def proportional_bytes(self) -> int:
        """Memory with every shared page counted once; slower."""
        return sum(map(_proportional_bytes, self.find()))

    def freeze(self) -> bool:
        """Let them all stand still; False if they breed faster than they can be stopped."""
        for _ in range(200):
            moving = [pid for pid in self.find() if _moves(pid)]
            if not moving:
                return True
            for pid in moving:
                send(pid, signal.SIGSTOP)
            if any(map(_moves, moving)):
                time.sleep(0.0002)
        return False

    def thaw(self) -> None:
        for pid in self.find():
            send(pid, signal.SIGCONT)

    def kill(self) -> None:
        """End them all. Returns when none is left that runs, or after a while if the kernel holds one."""
        deadline = time.monotonic() + 10
        num_empty = 0
        # Twice, since what is born or orphaned while /proc is read can be missed.
        while num_empty < 2 and time.monotonic() < deadline:
            alive = [pid for pid in self.find() if (one := stat(pid)) is not None and not one.has_ended]
            num_empty = 0 if alive else num_empty + 1
            # Stopped first, so that a bomb does not outrun its end.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in alive:
                    send(pid, number)
            if alive:
                time.sleep(0.0005)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def stat(pid: int) -> Stat | None:
    """None for a process that has gone."""
    data = read(f"/proc/{pid}/stat")
    # The name, in parentheses, may itself hold blanks and parentheses.
    fields = data[data.rfind(b")") + 2 :].split()
    if len(fields) < 18:
        return None
    return Stat(fields[0].decode(), int(fields[17]))


def read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _moves(pid: int) -> bool:
    found = stat(pid)
    if found is None or found.state in "Tt" or found.has_ended:
        return False
    if found.state in "ZX":
        # The first thread has ended; the others answer for themselves.
        others = (read(f"/proc/{pid}/task/{thread}/stat") for thread in _threads(pid))
        return any(one[one.rfind(b")") + 2 :][:1] not in (b"T", b"t", b"Z", b"X", b"") for one in others)
    return True


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in _threads(pid):
        found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def _resident_bytes(pid: int) -> int:
    return _of_any_thread(pid, "statm", lambda data: int(data.split()[1]) * _PAGE_BYTES if data else 0)


def _proportional_bytes(pid: int) -> int:
    def read_pss(data: bytes) -> int:
        return sum(int(line.split()[1]) * 1024 for line in data.splitlines() if line.startswith(b"Pss:"))

    # Without the right to look, what is resident has to do.
    return _of_any_thread(pid, "smaps_rollup", read_pss) or _resident_bytes(pid)


def _of_any_thread(pid: int, name: str, number: Callable[[bytes], int]) -> int:
    """A number of the process's memory: a first thread that has ended has none, the others tell of the same one."""
    found = number(read(f"/proc/{pid}/{name}"))
    if not found:
        found = max((number(read(f"/proc/{pid}/task/{thread}/{name}")) for thread in _threads(pid)), default=0)
    return found
