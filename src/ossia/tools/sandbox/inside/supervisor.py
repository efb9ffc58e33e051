"""Holds the pipes to ossia, starts the worker that runs the model's code, and believes nothing that it says.

This process cannot be inspected by the worker (not dumpable), nor, with Landlock, be sent signals by it. The worker has
no descriptor of it but three pipes; each call has a token of its own, so that what an earlier call left in the pipes is
no answer to a later one. Between calls every process of the worker stands still.

Operations   configure (first), run, interrupt, list, read, write; answers carry the operation's `id`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import secrets
import select
import signal
import stat
import sys
import time
import traceback
from typing import Any, NoReturn

from ossia.tools.sandbox.inside import cells, files, landlock, paths, seccomp, wire
from ossia.tools.sandbox.inside.processes import Processes, read
from ossia.tools.sandbox.inside.recording import Recording

_WATCH_S = 0.05
# How long code may take to end after it was interrupted.
_GRACE_S = 1.0
_MAX_PATH = 3500
_MAX_IDLE_DEATHS = 3
# Each holds up to half a megabyte of the kernel's memory, which no process is charged for.
_MAX_SOCKETS = 256
_MAX_MESSAGE_BYTES = 64 << 20
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 4, 36, 24, 28

_KEYCTL = {"x86_64": 250, "aarch64": 219}

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Serve until the other end of the control pipe is closed."""
    control = Control()
    control.send({"op": "hello", "python": list(sys.version_info[:3])})
    settings, _ = control.wait()
    try:
        supervisor = Supervisor(control, settings)
    except OSError as error:
        control.send({"op": "failed", "error": str(error)})
        os._exit(1)
    try:
        supervisor.serve()
    # A fault of this program: its words go to the log outside.
    except BaseException:
        traceback.print_exc()
    supervisor.processes.kill()
    os._exit(0)


class Control:
    """The pipes to ossia, on the standard descriptors moved out of the way of the worker's."""

    def __init__(self) -> None:
        self.input = _away(0)
        self.output = _away(1)
        self._frames = wire.Frames()
        self._waiting: list[tuple[dict[str, Any], bytes]] = []

    def receive(self) -> list[tuple[dict[str, Any], bytes]]:
        """Frames that have come. Raises EOFError when there will be none any more."""
        if self._waiting:
            taken, self._waiting = self._waiting, []
            return taken
        data = os.read(self.input, 1 << 20)
        if not data:
            raise EOFError
        return self._frames.feed(data)

    def wait(self) -> tuple[dict[str, Any], bytes]:
        while True:
            frames = self.receive()
            if frames:
                self._waiting = frames[1:]
                return frames[0]

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        view = memoryview(wire.pack(header, body))
        while view:
            view = view[os.write(self.output, view) :]


class Worker:
    """The process that runs cells, seen from here."""

    def __init__(self, pid: int, commands: int, results: int, acks: int, output: int) -> None:
        self.pid = pid
        self.commands = commands
        self.results = results
        self.acks = acks
        self.output = output
        self.has_died = False
        self.exit_status = 0
        for fd in (commands, results, acks, output):
            os.set_blocking(fd, False)

    def close(self) -> None:
        for fd in (self.commands, self.results, self.acks, self.output):
            os.close(fd)


class Call:
    """A cell that is being run."""

    def __init__(self, number: int, timeout_s: float, recording: Recording) -> None:
        self.number = number
        self.token = secrets.token_bytes(16)
        self.recording = recording
        self.deadline = time.monotonic() + timeout_s
        # Set with the interrupt: what for, and when patience ends.
        self.reason = ""
        self.kill_at = float("inf")


class Supervisor:
    """Raises OSError, with words for people, if a layer that ``settings`` ask for cannot be had."""

    def __init__(self, control: Control, settings: dict[str, Any]) -> None:
        self._control = control
        self._settings = settings
        self._limits = settings["limits"]
        self._call: Call | None = None
        self._received = bytearray()
        self._to_worker = bytearray()
        self._next_look = 0.0
        self._next_walk = 0.0
        # The state went between two calls, as when the machine ran out of memory.
        self._was_lost = False
        self._num_idle_deaths = 0
        self._drop_privileges()
        self.processes = Processes(settings["has_pid_namespace"])
        self._abi = self._confine_self()
        self._files = files.Folder(settings["data"])
        self._poll = select.poll()
        self._poll.register(control.input, select.POLLIN)
        self._worker = self._spawn()
        control.send(
            {"op": "ready", "landlock": self._abi, "seccomp": settings["seccomp"] != "off", "uid": os.getuid()}
        )

    def serve(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                self._step()

    def _step(self) -> None:
        if self._call is None:
            wait_s = None
        else:
            wait_s = max(0.0, min(self._next_look, self._call.deadline, self._call.kill_at) - time.monotonic())
        ready = dict(self._poll.poll(0 if self._control.has_waiting else wait_s and wait_s * 1000))
        if self._control.input in ready or self._control.has_waiting:
            for header, body in self._control.receive():
                self._operate(header, body)
        if self._worker.output in ready:
            self._read_output(1)
        if self._to_worker and self._worker.commands in ready:
            self._write_commands()
        if self._worker.results in ready:
            self._read_results()
        self._look_after_worker()

    # Operations ------------------------------------------------------------------------------------------------------

    def _operate(self, header: dict[str, Any], body: bytes) -> None:
        number = header["id"]
        try:
            if header["op"] == "run":
                self._begin(number, float(header["timeout_s"]), body)
            elif header["op"] == "interrupt":
                if self._call is not None and self._call.number == header["call"]:
                    self._interrupt("interrupted")
            elif header["op"] == "list":
                found, has_more = self._files.find(int(header["max_files"]))
                self._control.send({"id": number, "files": found, "has_more": has_more})
            elif header["op"] == "read":
                self._control.send({"id": number}, self._files.read(tuple(header["parts"]), int(header["max_bytes"])))
            elif header["op"] == "write":
                self._files.write(tuple(header["parts"]), body)
                self._control.send({"id": number})
        except OSError as error:
            self._control.send({"id": number, "error": error.strerror or str(error), "errno": error.errno or 0})

    def _begin(self, number: int, timeout_s: float, source: bytes) -> None:
        if self._call is not None:
            raise OSError(errno.EBUSY, "another one runs")
        self._drain()
        self._call = Call(number, timeout_s, Recording(self._limits["output_bytes"], self._limits["display_bytes"]))
        self._next_look = time.monotonic() + _WATCH_S
        self.processes.thaw()
        self._to_worker += cells.COMMAND.pack(self._call.token, len(source)) + source
        self._write_commands()

    def _interrupt(self, reason: str) -> None:
        assert self._call is not None
        if not self._call.reason:
            self._call.reason = reason
            self._call.kill_at = time.monotonic() + _GRACE_S
            # Its group, as a terminal does, so that programs which it started end as well.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._worker.pid, signal.SIGINT)

    # What the worker says --------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Forget what was left in the pipes since the last call."""
        self._received.clear()
        for fd in (self._worker.results, self._worker.output):
            with contextlib.suppress(BlockingIOError):
                while os.read(fd, 1 << 20):
                    pass

    def _read_output(self, max_reads: int) -> None:
        """Take what was printed; without a bound a flood would keep everything else waiting."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(max_reads):
                data = os.read(self._worker.output, 1 << 20)
                if not data:
                    self._forget(self._worker.output)
                    return
                if self._call is not None:
                    self._call.recording.print(data)

    def _write_commands(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            del self._to_worker[: os.write(self._worker.commands, self._to_worker)]
        if self._to_worker:
            self._poll.register(self._worker.commands, select.POLLOUT)
        else:
            # A pipe that nobody reads any more would wake the poll for ever.
            self._forget(self._worker.commands)

    def _read_results(self) -> None:
        try:
            data = os.read(self._worker.results, 1 << 20)
        except BlockingIOError:
            return
        if not data:
            # Every holder of the pipe has closed it: the worker can say nothing any more.
            self._forget(self._worker.results)
            self._end_by_force("died")
            return
        self._received += data
        while self._call is not None and len(self._received) >= cells.MESSAGE.size:
            token, kind, size = cells.MESSAGE.unpack_from(self._received)
            if size > _MAX_MESSAGE_BYTES:
                self._end_by_force("died")
                return
            end = cells.MESSAGE.size + size
            if len(self._received) < end:
                return
            payload = bytes(self._received[cells.MESSAGE.size : end])
            del self._received[:end]
            if secrets.compare_digest(token, self._call.token):
                self._take(kind, payload)
        if self._call is None:
            self._received.clear()

    def _take(self, kind: bytes, payload: bytes) -> None:
        assert self._call is not None
        # A pipe holds at most a megabyte; more than a few reads are a flood by another process.
        self._read_output(4)
        if kind == b"d":
            self._call.recording.show("display", payload)
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self._worker.acks, b"\0")
        elif kind == b"e":
            self._call.recording.show("error", payload)
        elif kind == b"k":
            said = payload.decode("ascii", "replace")
            status = self._call.reason or (said if said in ("ok", "error", "interrupted") else "error")
            self._end(status)

    def _forget(self, fd: int) -> None:
        with contextlib.suppress(KeyError):
            self._poll.unregister(fd)

    # Watching --------------------------------------------------------------------------------------------------------

    def _look_after_worker(self) -> None:
        self._reap()
        call = self._call
        if call is None:
            return
        now = time.monotonic()
        if self._worker.has_died:
            self._read_output(4)
            self._end_by_force("died")
        elif now >= call.kill_at:
            self._end_by_force(call.reason)
        elif now >= call.deadline:
            self._interrupt("timeout")
            call.deadline = float("inf")
        elif now >= self._next_look:
            self._next_look = now + _WATCH_S
            if reason := self._excess(now):
                self._end_by_force(reason)

    def _excess(self, now: float) -> str:
        """Which bound is passed, or nothing."""
        limits = self._limits
        usage = self.processes.usage()
        if usage.num_tasks > limits["processes"]:
            return "processes"
        if (
            usage.resident_bytes > limits["memory_bytes"]
            and self.processes.proportional_bytes() > limits["memory_bytes"]
        ):
            return "memory"
        if self._settings["has_own_network"] and _num_sockets() > _MAX_SOCKETS:
            return "sockets"
        if self._settings["has_own_mounts"]:
            for path in self._settings["write"]:
                found = os.statvfs(path)
                if found.f_files - found.f_ffree > limits["files"]:
                    return "files"
        elif now >= self._next_walk:
            num_files, num_bytes, num_sockets = self._walk()
            # A fifth of the time at most.
            self._next_walk = time.monotonic() + max(0.1, 4 * (time.monotonic() - now))
            if num_files > limits["files"]:
                return "files"
            if num_bytes > limits["data_bytes"] + limits["scratch_bytes"]:
                return "disk"
            if num_sockets > _MAX_SOCKETS:
                return "sockets"
        return ""

    def _walk(self) -> tuple[int, int, int]:
        """Files of the writable folders, their bytes (also of what is open and has no name any more), and sockets."""
        seen: dict[tuple[int, int], int] = {}
        num_names = 0
        waiting = list(self._settings["write"])
        while waiting and num_names <= self._limits["files"]:
            folder = waiting.pop()
            if len(folder) > _MAX_PATH:
                # Deeper than can be looked into is more than is allowed.
                return self._limits["files"] + 1, 0, 0
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    num_names += 1
                    with contextlib.suppress(OSError):
                        info = entry.stat(follow_symlinks=False)
                        seen[info.st_dev, info.st_ino] = info.st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
        own = {os.stat(path).st_dev for path in self._settings["write"]}
        sockets: set[int] = set()
        for pid in self.processes.find():
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        info = os.stat(f"/proc/{pid}/fd/{fd}")
                        if stat.S_ISSOCK(info.st_mode):
                            sockets.add(info.st_ino)
                        if info.st_dev in own and not info.st_nlink:
                            seen[info.st_dev, info.st_ino] = info.st_blocks * 512
        return num_names, sum(seen.values()), len(sockets)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._worker.pid:
                    self._worker.has_died = True
                    self._worker.exit_status = os.waitstatus_to_exitcode(status)

    # The end of a call -----------------------------------------------------------------------------------------------

    def _end_by_force(self, reason: str) -> None:
        """Kill everything of the worker, say so, and start another."""
        self.processes.kill()
        self._reap()
        self._read_output(4)
        for fd in (self._worker.results, self._worker.output, self._worker.commands):
            self._forget(fd)
        exit_status = self._worker.exit_status
        self._worker.close()
        self._received.clear()
        self._to_worker.clear()
        self._worker = self._spawn()
        if self._call is None:
            self._was_lost = True
            self._num_idle_deaths += 1
            if self._num_idle_deaths > _MAX_IDLE_DEATHS:
                raise RuntimeError(f"no worker lives (the last one ended with {exit_status})")
        else:
            self._answer(reason, is_restarted=True, exit_status=exit_status)

    def _end(self, status: str) -> None:
        if not self.processes.freeze():
            self._end_by_force("processes")
            return
        self._answer(status, is_restarted=False)

    def _answer(self, status: str, is_restarted: bool, exit_status: int = 0) -> None:
        assert self._call is not None
        call, self._call = self._call, None
        parts, num_dropped = call.recording.parts()
        header = {
            "id": call.number,
            "status": status,
            "restarted": is_restarted,
            "exit_status": exit_status,
            "was_lost": self._was_lost,
            "parts": [[kind, len(data)] for kind, data in parts],
            "dropped_bytes": num_dropped,
            "dropped_displays": call.recording.num_displays_dropped,
        }
        self._was_lost = False
        self._num_idle_deaths = 0
        self._control.send(header, b"".join(data for _, data in parts))

    # Starting --------------------------------------------------------------------------------------------------------

    def _drop_privileges(self) -> None:
        # The first to go when the machine itself runs out of memory.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("900")
        if self._settings["user"] is not None:
            become(self._settings["user"])
        # Neither /proc/PID/mem nor ptrace; and orphans come here, where they are found.
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        # A session keyring of its own (KEYCTL_JOIN_SESSION_KEYRING), not that of whoever started ossia.
        if os.uname().machine in _KEYCTL:
            _libc.syscall(_KEYCTL[os.uname().machine], 1, None)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        os.environ.clear()
        for key, value in self._settings["environment"].items():
            os.environ[key] = value
        sys.path += self._settings["site"]

    def _confine_self(self) -> int:
        abi = min(landlock.abi(), self._settings["landlock_abi"])
        if abi < self._settings["min_landlock_abi"]:
            raise OSError(
                f"Landlock ABI {abi} is too old: expected {self._settings['min_landlock_abi']} or newer "
                "(ABI 6 is Linux 6.12; ABI 3 is Linux 6.2, enough when ossia is started by root)"
            )
        if self._settings["seccomp"] != "off" and not seccomp.is_supported():
            raise OSError("the filter of system calls is not written for this processor; expected x86_64 or aarch64")
        if abi == 0:
            return 0
        return landlock.restrict(
            ["/proc", *self._settings["read"]], self._settings["write"], self._settings["devices"], abi
        )

    def _spawn(self) -> Worker:
        commands_r, commands_w = os.pipe()
        results_r, results_w = os.pipe()
        acks_r, acks_w = os.pipe()
        output_r, output_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_worker({0: os.devnull, 1: output_w, 2: output_w}, (commands_r, results_w, acks_r))
            except BaseException as error:
                os.write(2, f"the worker could not be confined: {error}\n".encode())
            os._exit(70)
        for fd in (commands_r, results_w, acks_r, output_w):
            os.close(fd)
        worker = Worker(pid, commands_w, results_r, acks_w, output_r)
        self._poll.register(results_r, select.POLLIN)
        self._poll.register(output_r, select.POLLIN)
        return worker

    def _become_worker(self, standard: dict[int, int | str], pipes: tuple[int, int, int]) -> NoReturn:
        """In the child: give up everything, then run what the model writes."""
        for number, source in standard.items():
            fd = os.open(source, os.O_RDONLY) if isinstance(source, str) else source
            os.dup2(fd, number)
        kept = [_duplicate(fd, 100 + i) for i, fd in enumerate(pipes)]
        os.closerange(3, min(kept))
        os.closerange(max(kept) + 1, 4096)
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self._limit_worker()
        try:
            os.chdir(self._settings["data"])
        # The code may have closed its own folder to itself.
        except OSError:
            os.chdir("/")
        # Its own entries of /proc are its own again.
        _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        if self._abi:
            own_proc = ["/proc"] if self._settings["has_pid_namespace"] else [f"/proc/{os.getpid()}"]
            system = ["/proc/meminfo", "/proc/cpuinfo", "/proc/stat"]
            readable = [*own_proc, *system, *self._settings["read"]]
            landlock.restrict(readable, self._settings["write"], self._settings["devices"], self._abi)
        if self._settings["seccomp"] != "off":
            seccomp.install(hide_metadata=self._settings["seccomp"] == "shared-tree")
        if self._settings["places"]:
            paths.translate(self._settings["places"], self._settings["read"])
        cells.Shell(kept[0], kept[1], kept[2], self._limits["display_bytes"]).run()

    def _limit_worker(self) -> None:
        limits = self._limits
        bounds = {
            # Not 0: that forbids files, and still starts a core handler that is a program. 1 forbids both.
            resource.RLIMIT_CORE: 1,
            resource.RLIMIT_NOFILE: 512,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_FSIZE: limits["data_bytes"],
            # So that a list too long is a MemoryError and no killed worker; mapped libraries do not count.
            resource.RLIMIT_DATA: limits["memory_bytes"],
            resource.RLIMIT_AS: 4 * limits["memory_bytes"] + (8 << 30),
        }
        if limits["user_processes"] is not None:
            bounds[resource.RLIMIT_NPROC] = limits["user_processes"]
        for name in ("RLIMIT_MSGQUEUE", "RLIMIT_SIGPENDING"):
            if hasattr(resource, name):
                bounds[getattr(resource, name)] = 256 if name == "RLIMIT_SIGPENDING" else 0
        for kind, bound in bounds.items():
            hard = resource.getrlimit(kind)[1]
            bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
            resource.setrlimit(kind, (bound, bound))
        os.nice(5)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, secrets.SystemRandom().sample(cores, min(len(cores), limits["cpus"])))


def _num_sockets() -> int:
    """Sockets of this network namespace."""
    fields = read("/proc/net/sockstat").split()
    return int(fields[2]) if len(fields) > 2 else 0


def become(user: int) -> None:
    """From root to a user that owns nothing, with no way back. Raises OSError."""
    os.setgroups([])
    # SECBIT_NOROOT, SECBIT_NO_SETUID_FIXUP off, both locked: a uid of 0 would mean nothing, if there were a way to one.
    _libc.prctl(_PR_SET_SECUREBITS, 0x3, 0, 0, 0)
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if 0 in (*os.getresuid(), *os.getresgid()):
        raise OSError("root's identity could not be given up")


def _duplicate(fd: int, lowest: int) -> int:
    # Closed in programs that the code starts.
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)


def _away(fd: int) -> int:
    moved = _duplicate(fd, 10)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd)
    os.close(null)
    return moved
