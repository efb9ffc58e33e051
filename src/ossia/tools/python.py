"""The python tool: a notebook for each conversation, in a sandbox, as gpt-oss was trained to use it.

`PythonSessions` holds the notebooks of all conversations by a key that the caller chooses; `PythonTool` is the tool of
one.
`ToolOutput.details` of a call:

    {"outputs": [{"type": "logs", "logs": str} | {"type": "image", "url": "data:image/png;base64,..."}],
     "status": str, "restarted": bool, "tier": str, "duration_s": float, "dropped_bytes": int}

Sources  the texts for no output and for time-out are those of OpenAI's gpt-oss repository, which the model has met.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import json
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from ossia.errors import LimitError, OssiaError, UnavailableError
from ossia.harmony import ToolNamespace
from ossia.tools.base import ToolOutput
from ossia.tools.sandbox.execution import Execution, Sandbox, SandboxFile
from ossia.tools.sandbox.limits import Limits
from ossia.tools.sandbox.tiers import SandboxKind, TierReport, report_tiers

_log = logging.getLogger(__name__)

_NO_OUTPUT = "[WARN] No output available. Use print() to output anything to stdout to receive the output"
_TIMED_OUT = "[ERROR] Timed out waiting for Jupyter kernel output."
_KEPT = "The execution was interrupted; variables and files are kept."
_LOST = "The kernel was restarted: variables and imports are lost, files in /mnt/data are kept."
_GONE = "The environment was replaced by a new one: variables, imports and the files in /mnt/data are lost."
_REASONS = {
    "memory": "[ERROR] The execution used more memory than the {memory} MiB that there are, and was ended.",
    "processes": "[ERROR] The execution started more than {processes} processes and threads, and was ended.",
    "sockets": "[ERROR] The execution opened too many sockets, and was ended.",
    "files": "[ERROR] The execution made more than {files} files, and was ended.",
    "disk": "[ERROR] The execution wrote more than the {data} MiB that there are, and was ended.",
    "interrupted": "[ERROR] The execution was interrupted.",
    "timeout": _TIMED_OUT,
    "gone": "[ERROR] The environment failed while the code ran.",
}
_IMAGES = ("image/png", "image/jpeg")
# A picture larger than this is told, not sent.
_MAX_IMAGE_BYTES = 8 << 20
_MAX_LOGS_CHARS = 4 << 20
_FENCED = re.compile(r"\s*```(?:python|py|ipython|tool_code)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL)
_MAX_FORGOTTEN = 10_000


class PythonSession:
    """One conversation's notebook. Its sandbox is started when it is first needed, and again when it was lost."""

    def __init__(self, sessions: PythonSessions, key: str) -> None:
        self.key = key
        # When it was last used, of the event loop's clock.
        self.used_at = 0.0
        self.num_users = 0
        self._sessions = sessions
        self._sandbox: Sandbox | None = None
        # Calls run one after the other.
        self._lock = asyncio.Lock()
        # Whoever finds no sandbox starts it, and the others wait for that one.
        self._starting = asyncio.Lock()
        self._is_closed = False
        # Said to the model with the next output.
        self._note = ""
        # The sandbox whose loss the model knows of.
        self._told: Sandbox | None = None

    @property
    def is_idle(self) -> bool:
        return self.num_users == 0

    async def execute(self, code: str, timeout_s: float | None = None) -> tuple[Execution, str]:
        """Run a cell; what came of it, and what the model must be told of its environment first.

        Raises UnavailableError if no sandbox can be had, or the session was ended.
        """
        async with self._use(), self._lock:
            timeout_s = timeout_s or self._sessions.limits.timeout_s
            try:
                sandbox = await self._running()
                execution = await sandbox.execute(code, timeout_s)
            except UnavailableError:
                # It went before the code ran; a new one is another's affair only if it cannot be had.
                sandbox = await self._running()
                execution = await sandbox.execute(code, timeout_s)
            note, self._note = self._note, ""
            if execution.was_lost:
                note += f"[WARN] {_LOST}\n"
            # What is lost now is told with this very call.
            if execution.status in ("gone", "files", "disk"):
                self._told = sandbox
            return execution, note

    async def list_files(self) -> list[SandboxFile]:
        """Ordinary files in /mnt/data, by path. Raises UnavailableError."""
        async with self._use():
            return await (await self._running()).list_files()

    async def read_file(self, path: str) -> bytes:
        """A file of /mnt/data. Raises NotFoundError; InputError for a link, a FIFO or a path that leads elsewhere."""
        async with self._use():
            return await (await self._running()).read_file(path)

    async def write_file(self, path: str, data: bytes) -> None:
        """Put a file into /mnt/data. Raises InputError for a path that leads elsewhere, or if there is no room."""
        async with self._use():
            await (await self._running()).write_file(path, data)

    async def close(self) -> None:
        """End it for good: a call under way ends, and what waits or comes later raises UnavailableError."""
        self._is_closed = True
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            await sandbox.close()
        async with self._starting:
            assert self._sandbox is None, "whoever was starting a sandbox has closed it"

    def tell(self, note: str) -> None:
        self._note += note

    @contextlib.asynccontextmanager
    async def _use(self) -> Any:
        self.num_users += 1
        try:
            yield
        finally:
            self.num_users -= 1
            self.used_at = asyncio.get_running_loop().time()

    async def _running(self) -> Sandbox:
        async with self._starting:
            self._check_open()
            if self._sandbox is not None and not self._sandbox.is_alive:
                lost, self._sandbox = self._sandbox, None
                self._sessions.forget(lost)
                if lost is not self._told:
                    self.tell(f"[WARN] The environment failed. {_GONE}\n")
            if self._sandbox is None:
                sandbox = await self._sessions.take_sandbox()
                if self._is_closed:
                    await sandbox.close()
                self._check_open()
                self._sandbox = sandbox
            return self._sandbox

    def _check_open(self) -> None:
        if self._is_closed:
            raise UnavailableError("this python session was ended")


class PythonSessions:
    """The notebooks of a server or a program, few at a time.

    ``sandbox`` is one of `tiers.CHOICES`; ``unsafe_python`` runs the model's code with no sandbox at all. A session
    that was not used for ``idle_s`` seconds ends. At most ``max_sessions`` live: the longest idle one makes room, and
    if none is idle the model is told so. ``num_warm`` sandboxes are kept ready, so that a first call need not wait.
    Used in one event loop; close with `aclose` or `async with`.
    """

    def __init__(
        self,
        sandbox: str = "auto",
        *,
        limits: Limits | None = None,
        unsafe_python: bool = False,
        idle_s: float = 1200.0,
        max_sessions: int = 16,
        num_warm: int = 1,
    ) -> None:
        """Raises ConfigError for a choice that is none."""
        self.limits = limits or Limits()
        # bubblewrap's processes die with the thread that started them: one that lives as long as this object.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="ossia-python")
        self._choice = sandbox
        self._kind = SandboxKind(sandbox, self.limits, self._executor, unsafe_python)
        self._idle_s = idle_s
        self._max_sessions = max_sessions
        self._num_warm = num_warm
        self._sessions: dict[str, PythonSession] = {}
        # Keys of sessions that ended by themselves, and why; the oldest are forgotten.
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._warm: list[Sandbox] = []
        self._warming: asyncio.Task[None] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def tier(self) -> str:
        """What confines the code; empty before `check`."""
        return self._kind.tier

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def check(self) -> str:
        """Prove the sandbox by attacking it, once, and name its tier. Raises UnavailableError with what to install."""
        await self._kind.check()
        self._keep_warm()
        return self.tier

    async def report(self) -> list[TierReport]:
        """The state of every tier on this machine, in words."""
        return await report_tiers(self.limits, self._executor, self._choice)

    def tool(self, key: str) -> PythonTool:
        """The tool of the conversation ``key``."""
        return PythonTool(self, key)

    def own_tool(self) -> PythonTool:
        """The tool of a conversation that nobody comes back to: its session ends with the tool."""
        return PythonTool(self, secrets.token_hex(16), is_own=True)

    async def session(self, key: str) -> PythonSession:
        """The conversation's session, new or again. Raises LimitError if all are in use, UnavailableError if closed."""
        if self._is_closed:
            raise UnavailableError("the python tool is shut down")
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = await self._make_room(key)
            if why := self._ended.pop(key, ""):
                session.tell(f"[WARN] {why} {_GONE}\n")
        session.used_at = asyncio.get_running_loop().time()
        return session

    def has_session(self, key: str) -> bool:
        return key in self._sessions

    def expect(self, key: str) -> None:
        """The conversation has used its session before; if that is not here any more, the model is told so."""
        if key not in self._sessions:
            self._ended.setdefault(key, "The server was started anew.")

    async def end_session(self, key: str) -> None:
        """End a conversation's session for good; unknown keys are no error."""
        self._ended.pop(key, None)
        if session := self._sessions.pop(key, None):
            await session.close()

    async def aclose(self) -> None:
        """End every session."""
        self._is_closed = True
        tasks = [task for task in (self._sweeper, self._warming) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        closing = [one.close() for one in self._sessions.values()] + [one.close() for one in self._warm]
        self._sessions.clear()
        self._warm.clear()
        await asyncio.gather(*closing, *self._closing, return_exceptions=True)
        self._executor.shutdown(wait=False)

    async def take_sandbox(self) -> Sandbox:
        """A fresh sandbox, ready if one was kept warm. Raises UnavailableError."""
        while self._warm:
            sandbox = self._warm.pop()
            if sandbox.is_alive:
                self._keep_warm()
                return sandbox
            self.forget(sandbox)
        sandbox = await self._kind.start()
        self._keep_warm()
        return sandbox

    def forget(self, lost: Sandbox) -> None:
        """Clear away what is left of a sandbox, while nobody waits for it."""
        self._in_background(lost.close())

    # Room and time ---------------------------------------------------------------------------------------------------

    async def _make_room(self, key: str) -> PythonSession:
        if len(self._sessions) >= self._max_sessions:
            idle = [one for one in self._sessions.values() if one.is_idle]
            if not idle:
                raise LimitError(
                    f"all {self._max_sessions} python sessions are in use; try again later", retry_after_s=10.0
                )
            oldest = min(idle, key=lambda one: one.used_at)
            self._end(oldest, "This session was ended to make room for others.")
        return PythonSession(self, key)

    def _end(self, session: PythonSession, why: str) -> None:
        del self._sessions[session.key]
        self._ended[session.key] = why
        while len(self._ended) > _MAX_FORGOTTEN:
            self._ended.popitem(last=False)
        _log.info("python session=%s ended: %s", session.key, why)
        self._in_background(session.close())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(30.0, self._idle_s / 4))
            now = asyncio.get_running_loop().time()
            for session in list(self._sessions.values()):
                if session.is_idle and now - session.used_at > self._idle_s:
                    self._end(session, f"This session was not used for {self._idle_s:.0f} seconds.")

    def _keep_warm(self) -> None:
        if self._is_closed or len(self._warm) >= self._num_warm:
            return
        if self._warming is None or self._warming.done():
            self._warming = asyncio.get_running_loop().create_task(self._warm_up())

    async def _warm_up(self) -> None:
        while len(self._warm) < self._num_warm and not self._is_closed:
            try:
                self._warm.append(await self._kind.start())
            except UnavailableError as error:
                # The call that needs one will meet the same and say so.
                _log.warning("no python sandbox could be kept ready: %s", error.message)
                return


class PythonTool:
    """The tool of one conversation."""

    def __init__(self, sessions: PythonSessions, key: str, *, is_own: bool = False) -> None:
        self._sessions = sessions
        self._key = key
        self._is_own = is_own

    @property
    def namespace(self) -> ToolNamespace:
        return ToolNamespace.python()

    async def run(self, name: str, arguments: str) -> ToolOutput:
        if name:
            return ToolOutput(
                f"[ERROR] python has no function {name[:100]!r}; send the code as the message to python itself", True
            )
        try:
            session = await self._sessions.session(self._key)
            execution, note = await session.execute(read_code(arguments))
        except OssiaError as error:
            return ToolOutput(f"[ERROR] {error.message}", True, {"outputs": [], "status": "unavailable"})
        except asyncio.CancelledError:
            raise
        # A fault of ours is the model's to know and the log's to explain.
        except Exception:
            _log.exception("python session=%s failed", self._key)
            return ToolOutput(
                "[ERROR] The python tool met an error of its own.", True, {"outputs": [], "status": "failed"}
            )
        text = note + describe(execution, self._sessions.limits)
        return ToolOutput(text, execution.status != "ok", _details(execution, self._sessions.tier))

    async def close(self) -> None:
        """End the session if it is the tool's own; else it is the conversation's, and ends when it is idle."""
        if self._is_own:
            await self._sessions.end_session(self._key)


def read_code(arguments: str) -> str:
    """The code in a call, also where the model wrapped it in a fence or in JSON, as it does for functions."""
    if fenced := _FENCED.fullmatch(arguments):
        return fenced[1]
    if arguments.lstrip().startswith("{"):
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        if isinstance(found, dict) and len(found) == 1:
            (name, value), *_ = found.items()
            if name in ("code", "script", "source", "input") and isinstance(value, str) and _is_code(value):
                return value
    return arguments


def describe(execution: Execution, limits: Limits) -> str:
    """A call as the model reads it."""
    pieces: list[str] = []
    for output in execution.outputs:
        if output.kind == "gap":
            pieces.append(f"\n[... {execution.num_dropped_bytes} bytes of output left out ...]\n")
            continue
        text = output.forms["text/plain"].decode("utf-8", "replace") if output.kind == "display" else output.text
        # Printed text stands as it is; a value and an exception have lines of their own.
        if output.kind != "stream" and pieces and not pieces[-1].endswith("\n"):
            pieces.append("\n")
        pieces.append(text if output.kind == "stream" else text + "\n")
    text = _shortened("".join(pieces).rstrip("\n"), limits.output_chars)
    remarks = _remarks(execution, limits)
    if not text and not remarks:
        return _NO_OUTPUT
    return "\n".join(part for part in (text, *remarks) if part)


def _remarks(execution: Execution, limits: Limits) -> list[str]:
    remarks = []
    if execution.num_dropped_displays:
        remarks.append(f"[WARN] {execution.num_dropped_displays} displays were left out: too many or too large.")
    status = execution.status
    if status == "died":
        remarks.append(f"[ERROR] The kernel died{_cause(execution.exit_status)}.")
    elif status in _REASONS:
        sizes = {"memory": limits.memory_bytes >> 20, "data": limits.data_bytes >> 20}
        counts = {"processes": limits.num_processes, "files": limits.num_files}
        remarks.append(_REASONS[status].format(**sizes, **counts))
    if status in ("gone", "files", "disk"):
        remarks.append(_GONE)
    elif execution.is_restarted:
        remarks.append(_LOST)
    elif status == "timeout":
        remarks.append(_KEPT)
    return remarks


def _cause(exit_status: int) -> str:
    names = {
        -11: " (segmentation fault)",
        -6: " (abort)",
        -9: " (killed)",
        -7: " (bus error)",
        -4: " (illegal instruction)",
    }
    if exit_status in names:
        return names[exit_status]
    return f" (exit status {exit_status})" if exit_status else ""


def _shortened(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _details(execution: Execution, tier: str) -> Mapping[str, Any]:
    outputs: list[dict[str, str]] = []

    def log(text: str) -> None:
        if text and outputs and outputs[-1]["type"] == "logs":
            outputs[-1]["logs"] += text
        elif text:
            outputs.append({"type": "logs", "logs": text})

    for output in execution.outputs:
        if output.kind == "display":
            image = next((mime for mime in _IMAGES if mime in output.forms), None)
            if image is not None and len(output.forms[image]) <= _MAX_IMAGE_BYTES:
                data = base64.b64encode(output.forms[image]).decode()
                outputs.append({"type": "image", "url": f"data:{image};base64,{data}"})
            else:
                log(output.forms["text/plain"].decode("utf-8", "replace") + "\n")
        elif output.kind == "gap":
            log(f"\n[... {execution.num_dropped_bytes} bytes of output left out ...]\n")
        else:
            log(output.text)
    for shown in outputs:
        if shown["type"] == "logs":
            shown["logs"] = _shortened(shown["logs"], _MAX_LOGS_CHARS)
    return {
        "outputs": outputs,
        "status": execution.status,
        "restarted": execution.is_restarted,
        "tier": tier,
        "duration_s": execution.wall_s,
        "dropped_bytes": execution.num_dropped_bytes,
    }


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    # Hostile nesting too: then it is run as it stands, and the sandbox says what is wrong.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
