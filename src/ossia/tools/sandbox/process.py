"""A sandbox on this machine, from outside: starts the supervisor, asks it, and believes nothing that it says.

What comes over the control pipe was in the worst case written by the model's code: lengths, types and names are
checked, and an answer that is not one ends the sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import struct
import subprocess
import time
from concurrent.futures import CancelledError, Executor, Future
from typing import IO, Any, get_args

from ossia.errors import InputError, NotFoundError, UnavailableError
from ossia.tools.sandbox.cgroup import Cgroup
from ossia.tools.sandbox.execution import Execution, Output, SandboxFile, Status
from ossia.tools.sandbox.inside import wire
from ossia.tools.sandbox.launch import Launch, Launcher, modules
from ossia.tools.sandbox.limits import Limits

_START_S = 30.0
_FILE_S = 60.0
# After a call's time is up: for the interrupt, for the kill, for a machine under load.
_PATIENCE_S = 8.0
_MAX_FILES = 10_000
_MAX_NAME_BYTES = 4096
_MAX_ERROR_BYTES = 1 << 19
_MIME = re.compile(r"[a-z0-9.+-]{1,60}/[a-z0-9.+-]{1,60}")
_LENGTH = struct.Struct("!I")
# What a pipe takes and gives at once, at the most.
_MAX_READ_BYTES, _MAX_WRITE_BYTES = 1 << 18, 1 << 16

_log = logging.getLogger(__name__)

Answer = tuple[dict[str, Any], bytes]


class ProcessSandbox:
    """One supervisor and its worker. Made by `start`, in the event loop that uses it."""

    def __init__(
        self, launch: Launch, tier: str, limits: Limits, process: subprocess.Popen[bytes], executor: Executor
    ) -> None:
        self.tier = tier
        # What the supervisor reached: Landlock's ABI, seccomp, its user.
        self.layers: dict[str, Any] = {}
        self._launch = launch
        self._limits = limits
        self._process = process
        self._executor = executor
        self._entering: Future[Cgroup | None] | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._greetings: asyncio.Queue[Answer] = asyncio.Queue()
        # The call that was cancelled and has not ended yet.
        self._leftover: asyncio.Future[Answer] | None = None
        # Variables were lost, and no call has told so yet.
        self._was_lost = False
        self._pipes: _Pipes | None = None
        self._listener: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._last_words = ""

    @classmethod
    async def start(cls, launcher: Launcher, limits: Limits, executor: Executor) -> ProcessSandbox:
        """Start a sandbox. ``executor`` is a thread that lives as long as the sandbox: bubblewrap dies with the thread
        that started it. Raises UnavailableError with what the launcher printed."""
        loop = asyncio.get_running_loop()
        spawning = executor.submit(_spawn, launcher, limits)
        try:
            launch, process = await asyncio.wrap_future(spawning)
        except asyncio.CancelledError:
            # The thread goes on, and nobody else knows of what it starts.
            await asyncio.shield(loop.run_in_executor(None, _discard, spawning))
            raise
        sandbox = cls(launch, launcher.tier, limits, process, executor)
        try:
            await asyncio.wait_for(sandbox._greet(), _START_S)
        except BaseException as error:
            await asyncio.shield(sandbox.close())
            if isinstance(error, asyncio.TimeoutError):
                raise UnavailableError(f"{launcher.tier}: the sandbox did not start within {_START_S:.0f} s") from None
            raise
        return sandbox

    @property
    def is_alive(self) -> bool:
        return self._ending is None

    async def execute(self, code: str, timeout_s: float) -> Execution:
        await self._settle()
        if not self.is_alive:
            raise UnavailableError("the python sandbox has ended")
        header = {"op": "run", "timeout_s": timeout_s}
        started = time.monotonic()
        number, answer = self._ask(header, code.encode("utf-8", "replace"))
        try:
            got = await asyncio.wait_for(asyncio.shield(answer), timeout_s + _PATIENCE_S)
        except TimeoutError:
            # The supervisor itself does not answer.
            await self.close()
            return Execution("gone", is_restarted=True)
        except asyncio.CancelledError:
            self._ask({"op": "interrupt", "call": number}, is_answered=False)
            self._leftover = answer
            raise
        except UnavailableError:
            return Execution("gone", is_restarted=True)
        if "error" in got[0]:
            raise UnavailableError(f"the python sandbox does not take the call: {str(got[0]['error'])[:300]}")
        execution = _execution(*got)
        execution = dataclasses.replace(
            execution, was_lost=execution.was_lost or self._was_lost, wall_s=time.monotonic() - started
        )
        self._was_lost = False
        if execution.status in ("files", "disk"):
            # The folders themselves are full, so that a new worker would not help.
            self._end()
        return execution

    async def list_files(self) -> list[SandboxFile]:
        header, _ = await self._file_operation({"op": "list", "max_files": _MAX_FILES}, "")
        found = header.get("files")
        files = []
        for one in found if isinstance(found, list) else ():
            path, size, modified = (one.get(key) for key in ("path", "size", "modified"))
            is_file = isinstance(path, str) and isinstance(size, int) and isinstance(modified, float | int)
            # A name with control characters or half a character is for no list.
            if is_file and path.isprintable():
                files.append(SandboxFile(path, size, float(modified)))
        return files

    async def read_file(self, path: str) -> bytes:
        header = {"op": "read", "parts": split_path(path), "max_bytes": self._limits.data_bytes}
        return (await self._file_operation(header, path))[1]

    async def write_file(self, path: str, data: bytes) -> None:
        if len(data) > self._limits.data_bytes:
            raise InputError(
                f"{path!r} has {len(data)} bytes; expected at most {self._limits.data_bytes}, what /mnt/data holds"
            )
        await self._file_operation({"op": "write", "parts": split_path(path)}, path, data)

    async def close(self) -> None:
        """End every process and forget the files. Returns when they have ended."""
        self._end()
        assert self._ending is not None
        await asyncio.shield(self._ending)

    # Start -----------------------------------------------------------------------------------------------------------

    async def _greet(self) -> None:
        reader = asyncio.StreamReader(limit=1 << 20)
        self._pipes = _Pipes(self._process, reader)
        self._listener = asyncio.get_running_loop().create_task(self._listen(reader))
        self._pipes.write(modules(self._launch.is_source))
        hello, _ = await self._next_greeting()
        if hello.get("op") != "hello":
            raise UnavailableError(f"{self.tier}: unexpected words at the start of the sandbox")
        self._entering = self._executor.submit(self._enter_cgroup)
        cgroup = await asyncio.wrap_future(self._entering)
        self._pipes.write(wire.pack(self._launch.settings))
        ready, _ = await self._next_greeting()
        if ready.get("op") != "ready":
            raise UnavailableError(f"{self.tier}: {str(ready.get('error', 'the sandbox did not start'))[:2000]}")
        self.layers = {key: ready.get(key) for key in ("landlock", "seccomp", "uid")} | {"cgroup": cgroup is not None}

    async def _next_greeting(self) -> Answer:
        got = await self._greetings.get()
        if got[0]:
            return got
        # The pipe has ended; the launcher's own words say why.
        await self.close()
        raise UnavailableError(f"{self.tier}: {self._last_words or 'the sandbox ended while it started'}")

    def _enter_cgroup(self) -> Cgroup | None:
        group = Cgroup.make(self._limits)
        if group is not None:
            try:
                group.add(self._process.pid)
            except OSError:
                group.remove()
                return None
        return group

    # Questions and answers -------------------------------------------------------------------------------------------

    def _ask(
        self, header: dict[str, Any], body: bytes = b"", is_answered: bool = True
    ) -> tuple[int, asyncio.Future[Answer]]:
        number = next(self._numbers)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self._ending is not None or self._pipes is None:
            answer.set_exception(UnavailableError("the python sandbox has ended"))
            return number, answer
        if is_answered:
            self._answers[number] = answer
        self._pipes.write(wire.pack(header | {"id": number}, body))
        return number, answer

    async def _settle(self) -> None:
        """Let the call that was cancelled come to its end, or end the sandbox."""
        if self._leftover is None:
            return
        done, _ = await asyncio.wait([self._leftover], timeout=_PATIENCE_S)
        # Not before: who is cancelled while it waits leaves it to the next call.
        leftover, self._leftover = self._leftover, None
        if not done:
            await self.close()
        elif leftover.exception() is None:
            header, _ = leftover.result()
            self._was_lost = self._was_lost or bool(header.get("restarted") or header.get("was_lost"))

    async def _file_operation(self, header: dict[str, Any], path: str, body: bytes = b"") -> Answer:
        _, answer = self._ask(header, body)
        try:
            header, body = await asyncio.wait_for(answer, _FILE_S)
        except TimeoutError:
            await self.close()
            raise UnavailableError("the python sandbox did not answer, and was ended") from None
        error = header.get("error")
        if error is None:
            return header, body
        if header.get("errno") == 2:
            raise NotFoundError(f"/mnt/data/{path} does not exist")
        raise InputError(f"/mnt/data/{path}: {str(error)[:300]}")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                num_header, num_body = wire.PREFIX.unpack(await reader.readexactly(wire.PREFIX.size))
                if num_header > wire.MAX_HEADER_BYTES or num_body > self._max_body:
                    break
                header = json.loads(await reader.readexactly(num_header))
                body = await reader.readexactly(num_body)
                if not isinstance(header, dict) or not header:
                    break
                answer = self._answers.pop(header["id"], None) if isinstance(header.get("id"), int) else None
                if answer is None:
                    if self._greetings.qsize() > 2:
                        break
                    self._greetings.put_nowait((header, body))
                elif not answer.done():
                    answer.set_result((header, body))
        except (asyncio.IncompleteReadError, ValueError, RecursionError):
            pass
        self._greetings.put_nowait(({}, b""))
        self._end()

    @property
    def _max_body(self) -> int:
        limits = self._limits
        return max(limits.data_bytes, limits.output_bytes + limits.display_bytes + _MAX_ERROR_BYTES)

    # The end ---------------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """At once, and without waiting: nothing is answered any more."""
        if self._ending is not None:
            return
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(UnavailableError("the python sandbox has ended"))
                answer.exception()
        self._answers.clear()
        if self._launch.dies_with_parent:
            self._process.kill()
        if self._pipes is not None:
            self._pipes.close()
        else:
            _close(self._process.stdin, self._process.stdout)
        if self._listener is not None and self._listener is not asyncio.current_task():
            self._listener.cancel()
        self._ending = asyncio.get_running_loop().run_in_executor(None, self._wait_for_end)

    def _wait_for_end(self) -> None:
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        text = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip()
        self._process.stderr.close()
        self._last_words = " ".join(text.splitlines()[-3:])[-600:]
        if self._last_words:
            _log.warning("sandbox=%s pid=%d ended with words=%r", self.tier, self._process.pid, self._last_words)
        self._launch.clean_up()
        # Also one that was entered for a start that was cancelled.
        with contextlib.suppress(CancelledError):
            group = self._entering.result() if self._entering is not None else None
            if group is not None:
                group.remove()


class _Pipes:
    """Standard input and output of a process, watched by the event loop and closed by nobody else, once.

    The event loop's own transports are no choice: those of uvloop close the number of a pipe a second time, when it may
    be that of another thread's file already.
    """

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._files = process.stdin, process.stdout
        self._in, self._out = process.stdin.fileno(), process.stdout.fileno()
        self._reader = reader
        # What the pipe had no room for.
        self._waiting = bytearray()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        for fd in (self._in, self._out):
            os.set_blocking(fd, False)
        self._loop.add_reader(self._out, self._read)

    def write(self, data: bytes) -> None:
        """Send ``data``, now or when there is room; if the other end is gone, its silence tells so."""
        if self._is_closed:
            return
        is_waiting = bool(self._waiting)
        self._waiting += data
        if not is_waiting:
            self._flush()
            if self._waiting:
                self._loop.add_writer(self._in, self._flush)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._loop.remove_reader(self._out)
        self._loop.remove_writer(self._in)
        self._waiting.clear()
        _close(*self._files)

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._in, self._waiting[:_MAX_WRITE_BYTES])]
        except BlockingIOError:
            return
        except OSError:
            self._waiting.clear()
        self._loop.remove_writer(self._in)

    def _read(self) -> None:
        try:
            data = os.read(self._out, _MAX_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._reader.feed_data(data)
        else:
            self._loop.remove_reader(self._out)
            self._reader.feed_eof()


def _close(*files: IO[bytes] | None) -> None:
    for file in files:
        # What was still to be written is for nobody.
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()


def split_path(path: str) -> list[str]:
    """The names in a path below /mnt/data, which may be said or not. Raises InputError for any other path."""
    inner = path.removeprefix("/mnt/data/")
    parts = inner.split("/")
    try:
        encoded = inner.encode("utf-8")
    except UnicodeEncodeError:
        encoded = b"\0"
    is_name = all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 255 for part in parts)
    if not is_name or b"\0" in encoded or len(encoded) > _MAX_NAME_BYTES:
        raise InputError(f"{path[:200]!r} is no path of a file in /mnt/data; expected one such as results/table.csv")
    return parts


def _spawn(launcher: Launcher, limits: Limits) -> tuple[Launch, subprocess.Popen[bytes]]:
    launch = launcher.launch(limits)
    readers = []
    try:
        for data in launch.data:
            readers.append(_pipe_with(data))
        argv = [f"{readers[int(one[1:-1])]}" if re.fullmatch(r"\{\d\}", one) else one for one in launch.argv]
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Nothing of ours, not even where no one should look: /proc/1/environ.
            env={},
            pass_fds=readers,
            start_new_session=True,
            cwd="/",
        )
    except OSError as error:
        launch.clean_up()
        raise UnavailableError(f"{launcher.tier}: {launch.argv[0]} cannot be started: {error.strerror}") from None
    finally:
        for fd in readers:
            os.close(fd)
    return launch, process


def _discard(spawning: Future[tuple[Launch, subprocess.Popen[bytes]]]) -> None:
    """End what `_spawn` has started, or is about to, before it was told anything. Blocks."""
    try:
        launch, process = spawning.result()
    except (CancelledError, UnavailableError):
        return
    process.kill()
    _close(process.stdin, process.stdout, process.stderr)
    process.wait()
    launch.clean_up()


def _pipe_with(data: bytes) -> int:
    """The end of a pipe that reads ``data``, which must fit one."""
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        assert os.write(writer, data) == len(data)
    finally:
        os.close(writer)
    return reader


def _execution(header: dict[str, Any], body: bytes) -> Execution:
    """An answer of the supervisor, read with suspicion: what does not fit is left out."""
    said = header.get("status")
    status: Status = next((one for one in get_args(Status) if one == said), "died")
    outputs: list[Output] = []
    at = 0
    parts = header.get("parts")
    for part in parts if isinstance(parts, list) else ():
        if not (isinstance(part, list) and len(part) == 2 and isinstance(part[1], int) and part[1] >= 0):
            break
        kind, data = part[0], body[at : at + part[1]]
        at += part[1]
        if kind == "display":
            outputs.append(Output("display", forms=_forms(data)))
        elif kind in ("stream", "error", "gap"):
            outputs.append(Output(kind, data.decode("utf-8", "replace")))
    numbers = {key: value if isinstance(value := header.get(key), int) else 0
               for key in ("exit_status", "dropped_bytes", "dropped_displays")}  # fmt: skip
    return Execution(
        status,
        tuple(outputs),
        bool(header.get("restarted")),
        numbers["exit_status"],
        bool(header.get("was_lost")),
        numbers["dropped_bytes"],
        numbers["dropped_displays"],
    )


def _forms(data: bytes) -> dict[str, bytes]:
    forms: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        mime = data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
        if at + 4 > len(data):
            break
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4 + size
        name = mime.decode("ascii", "replace")
        if _MIME.fullmatch(name) and at <= len(data):
            forms[name] = data[at - size : at]
    forms.setdefault("text/plain", b"")
    return forms
