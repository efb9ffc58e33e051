"""The process in which everything that was fetched is parsed: with limits, warm, replaced when it hangs or breaks.

A child reads one job after the other from its standard input and writes the answers to its standard output:

    job      8 bytes: sizes of header and body, big endian; the header as JSON {kind, url, charset, ...}; the body
    answer   4 bytes: its size; JSON {title, text, links} or {error} or, for robots.txt, {allowed}

It has an empty environment, a bound on memory and on processor time, and it dies with its parent. Where the system
allows it, Landlock leaves it no file but Python's own modules, and seccomp nothing to do but to compute and to read.
Who asks waits at most so long, then the child is killed, and the next job gets another one.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ossia.errors import OssiaError

if TYPE_CHECKING:
    from ossia.tools.web.page_text import Rendered

# Wall time of one document, and memory and processor time of one child.
TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
_CPU_S = 120
_RETIRE_CPU_S = 60.0
_MAX_ANSWER_BYTES = 64 << 20
_HEAD = struct.Struct(">II")
_SIZE = struct.Struct(">I")


class ParseError(OssiaError):
    """A document could not be read: damaged, too large, or made to be slow."""


class SlowError(ParseError):
    """A document was not read in the time that it had: the fault may be the machine's, which was busy."""


class _BrokenError(ParseError):
    """The child has ended without an answer."""


class _Job:
    """A document that is being parsed, and may be given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._is_cancelled = False

    def begin(self, child: _Child) -> None:
        """Raises ParseError if the job was given up before."""
        with self._lock:
            self._child = child
            if self._is_cancelled:
                raise ParseError("the document is not read any more")

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            if self._child is not None:
                self._child.interrupt()


class Parser:
    """Children that parse, at most ``num_children`` at once. May be used from any thread and any event loop."""

    def __init__(
        self, num_children: int = 2, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self.timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._room = threading.BoundedSemaphore(num_children)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._is_closed = False
        # Threads of its own: who waits for a child takes none from the rest of the process.
        self._threads = ThreadPoolExecutor(num_children, "ossia-parse")

    def render(self, kind: str, body: bytes, url: str, charset: str = "", job: _Job | None = None) -> Rendered:
        """A document as text, see `page_text.render`. Blocks; raises ParseError."""
        from ossia.tools.web.page_text import Rendered

        answer = self._ask({"kind": kind, "url": url, "charset": charset, "seconds": self.timeout_s * 0.7}, body, job)
        return Rendered(answer["title"], answer["text"], tuple(answer["links"]))

    async def render_async(self, kind: str, body: bytes, url: str, charset: str = "") -> Rendered:
        """The same beside the event loop. Being cancelled, it ends the child."""
        job = _Job()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self.render, kind, body, url, charset, job)
        except asyncio.CancelledError:
            job.cancel()
            raise

    def layers(self) -> dict[str, Any]:
        """What confines a child here: {"landlock": the ABI, 0 for none, "seccomp": bool}. Blocks; raises ParseError."""
        answer = self._ask({"kind": "layers"}, b"")
        return {name: answer[name] for name in ("landlock", "seccomp")}

    async def may_fetch(self, robots: bytes, url: str, agent: str) -> bool:
        """Whether a robots.txt lets ``agent`` fetch a URL. Raises ParseError."""
        header = {"kind": "robots", "url": url, "agent": agent}
        answer = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, header, robots)
        return bool(answer["allowed"])

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, header: dict[str, Any], body: bytes, job: _Job | None = None) -> dict[str, Any]:
        job = job or _Job()
        with self._room:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            try:
                if child is not None:
                    job.begin(child)
                    try:
                        answer = child.ask(header, body, self.timeout_s)
                    except _BrokenError:
                        # It may have died of what came before, or with the thread that started it.
                        child.kill()
                        child = None
                if child is None:
                    child = _Child(self._memory_bytes)
                    job.begin(child)
                    answer = child.ask(header, body, self.timeout_s)
            except BaseException:
                if child is not None:
                    child.kill()
                raise
            with self._lock:
                is_kept = not self._is_closed and not answer.pop("is_spent")
                if is_kept:
                    self._idle.append(child)
            if not is_kept:
                child.kill()
        if "error" in answer:
            raise ParseError(answer["error"])
        return answer


class _Child:
    def __init__(self, memory_bytes: int) -> None:
        # The child finds its modules where this process does, and takes nothing else of it.
        start = (
            "import sys; sys.path[:] = sys.argv[2:]; "
            "from ossia.tools.web.parse_child import main; main(int(sys.argv[1]))"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", start, str(memory_bytes), *(path for path in sys.path if path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    def ask(self, header: dict[str, Any], body: bytes, timeout_s: float) -> dict[str, Any]:
        until = time.monotonic() + timeout_s
        head = json.dumps(header).encode()
        self._write(_HEAD.pack(len(head), len(body)) + head + body, until)
        (size,) = _SIZE.unpack(self._read(_SIZE.size, until))
        if size > _MAX_ANSWER_BYTES:
            raise ParseError("the document is too large to be read")
        answer = json.loads(self._read(size, until))
        assert isinstance(answer, dict)
        return answer

    def interrupt(self) -> None:
        """From another thread: whoever asks meets the end of the child."""
        self._process.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                # What was still to be written is for nobody.
                with suppress(BrokenPipeError):
                    pipe.close()

    def _write(self, data: bytes, until: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._in, select.POLLOUT, until)
            try:
                view = view[os.write(self._in, view[: 1 << 16]) :]
            except BrokenPipeError:
                raise self._broken() from None
            except BlockingIOError:
                continue

    def _read(self, size: int, until: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._out, select.POLLIN, until)
            try:
                more = os.read(self._out, min(size - len(data), 1 << 20))
            except BlockingIOError:
                continue
            if not more:
                raise self._broken()
            data += more
        return bytes(data)

    def _wait(self, fd: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise SlowError("the document takes too long to be read")

    def _broken(self) -> _BrokenError:
        return _BrokenError("the document is too large or too deeply nested to be read")


# In the child --------------------------------------------------------------------------------------------------------


def main(memory_bytes: int) -> None:
    """Answer jobs until standard input ends."""
    import resource

    # Loaded before files are out of reach.
    import protego
    import pypdf  # noqa: F401

    from ossia.tools.web import page_text

    _die_with_parent()
    jobs, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    page_text.render("html", b"<p>warm", "", "", 1)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (value, value))
    layers = confine()
    while len(head := jobs.read(_HEAD.size)) == _HEAD.size:
        num_header, num_body = _HEAD.unpack(head)
        header = json.loads(jobs.read(num_header))
        body = jobs.read(num_body)
        answer: dict[str, Any]
        try:
            if header["kind"] == "robots":
                rules = protego.Protego.parse(body.decode("utf-8", "replace"))
                answer = {"allowed": rules.can_fetch(header["url"], header["agent"])}
            elif header["kind"] == "layers":
                answer = dict(layers)
            else:
                rendered = page_text.render(header["kind"], body, header["url"], header["charset"], header["seconds"])
                answer = rendered._asdict()
        except ValueError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "the document is too large to be read"}
            # Another child begins with all of it.
            answer["is_spent"] = True
        used = resource.getrusage(resource.RUSAGE_SELF)
        answer["is_spent"] = answer.get("is_spent", False) or used.ru_utime + used.ru_stime > _RETIRE_CPU_S
        data = json.dumps(answer).encode()
        answers.write(_SIZE.pack(len(data)) + data)
        answers.flush()


def confine() -> dict[str, Any]:
    """Give up, for ever, whatever parsing does not take; what the system has taken, as `Parser.layers` tells it."""
    layers: dict[str, Any] = {"landlock": 0, "seccomp": False}
    if not sys.platform.startswith("linux"):
        return layers
    from ossia.tools.sandbox.inside import landlock, seccomp

    # Codecs, and what the libraries import when they first need it.
    with suppress(OSError):
        layers["landlock"] = landlock.restrict(_module_folders(), [], [])
    with suppress(OSError):
        seccomp.install_computing()
        layers["seccomp"] = True
    return layers


def _module_folders() -> list[str]:
    """Where Python and the parsers are installed; not the whole of sys.path, in which a folder of the user's may be."""
    import sysconfig

    import lxml  # type: ignore[import-untyped]
    import protego
    import pypdf

    import ossia

    packages = {os.path.dirname(os.path.dirname(str(one.__file__))) for one in (lxml, protego, pypdf)}
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(str(ossia.__file__))}
    system = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/nix/store"}
    return sorted(packages | own | system)


def _die_with_parent() -> None:
    """Where the system offers it; without, a child ends with its standard input, or with its processor time."""
    import ctypes
    import signal

    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is not None:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGKILL)
