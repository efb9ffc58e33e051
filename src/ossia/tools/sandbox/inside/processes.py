"""The processes of the model's code: find them all, weigh them, stop them, end them.

In a process namespace they are all that /proc shows; without one they are the descendants of the supervisor, which
orphans come back to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import NamedTuple

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """What a set of processes takes now."""

    num_tasks: int
    # Resident pages; those shared by several processes are counted for each.
    resident_bytes: int


class Stat(NamedTuple):
    """Of /proc/PID/stat."""

    state: str
    num_threads: int


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
            moving = [pid for pid in self.find() if (one := stat(pid)) is not None and one.state not in "TtZX"]
            if not moving:
                return True
            for pid in moving:
                send(pid, signal.SIGSTOP)
            if any((one := stat(pid)) is not None and one.state not in "TtZX" for pid in moving):
                time.sleep(0.0002)
        return False

    def thaw(self) -> None:
        for pid in self.find():
            send(pid, signal.SIGCONT)

    def kill(self) -> None:
        """End them all. Returns when none is left that runs, or after a while if the kernel holds one."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            alive = [pid for pid in self.find() if (one := stat(pid)) is not None and one.state not in "ZX"]
            if not alive:
                return
            # Stopped first, so that a bomb does not outrun its end.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in alive:
                    send(pid, number)
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


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def _resident_bytes(pid: int) -> int:
    fields = read(f"/proc/{pid}/statm").split()
    return int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0


def _proportional_bytes(pid: int) -> int:
    for line in read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes(pid)
