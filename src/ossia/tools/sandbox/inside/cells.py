"""Runs cells as a notebook does, and says what came of them. The model's code lives in this process and may do here
whatever it likes: nothing that it could break is of use to it.

Messages to the supervisor   token (16 bytes), kind (1), length (4), payload:
    d   a display: for each form, length of the MIME type (1), type, length (4), data
    e   an exception's text
    k   the cell has ended: "ok", "error" or "interrupted"
"""

from __future__ import annotations
import __future__

import ast
import asyncio
import builtins
import contextlib
import inspect
import io
import linecache
import os
import re
import signal
import struct
import sys
import types
from typing import Any, NoReturn

from ossia.tools.sandbox.inside import display, failure

# Bound now: what the code makes of the modules must not stop the notebook.
_read, _write, _exit, _getpid, _set_signal = os.read, os.write, os._exit, os.getpid, signal.signal
_SIGINT, _interrupt = signal.SIGINT, signal.default_int_handler
_BUILTINS = dict(vars(builtins))
COMMAND = struct.Struct("!16sI")
LENGTH = struct.Struct("!I")
MESSAGE = struct.Struct("!16scI")
_FUTURE_FLAGS = 0
for _name in __future__.all_feature_names:
    _FUTURE_FLAGS |= getattr(__future__, _name).compiler_flag
# Magics that change nothing here.
_HARMLESS = re.compile(r"\s*%(matplotlib|config|load_ext|autoreload)\b")
_REFUSALS = (
    (re.compile(r"\s*[!%]\s*pip\b|\s*!\s*(python3? -m pip|conda|apt|apt-get)\b"),
     "packages cannot be installed: there is no network and nothing may be changed; use what can be imported"),
    (re.compile(r"\s*!|\s*%%(bash|sh|script|system)\b"),
     "shell commands (lines that begin with '!') are not available; use Python, such as os, pathlib, shutil or "
     "subprocess.run"),
    (re.compile(r"\s*%"),
     "IPython magics (lines that begin with '%') are not available; use plain Python, such as time.perf_counter() "
     "instead of %time"),
    (re.compile(r"\s*\?|[^#'\"]*[\w.]\?{1,2}\s*$"),
     "IPython's help ('?') is not available; use help(name) or inspect.getsource(name)"),
)  # fmt: skip


class Shell:
    """A notebook's state: names, counters, what was shown last."""

    def __init__(self, commands: int, results: int, acks: int, max_display: int) -> None:
        self._max_display = max_display
        self._commands = commands
        self._results = results
        self._acks = acks
        self._token = b""
        self._pid = _getpid()
        self._flags = 0
        self._stdout: Any = None
        self._stderr: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.count = 0
        self.module = types.ModuleType("__main__")
        self.names: dict[str, Any] = self.module.__dict__
        self.outputs: dict[int, Any] = {}
        self.inputs = [""]

    def run(self) -> NoReturn:
        """Serve until the supervisor goes."""
        self._furnish()
        while True:
            header = self._read(COMMAND.size)
            self._token, size = COMMAND.unpack(header)
            source = self._read(size).decode("utf-8", "replace")
            status = self._cell(source)
            if _getpid() != self._pid:
                # A fork that ran to the end of the cell: there is one notebook.
                with contextlib.suppress(Exception):
                    self._stdout.flush()
                _exit(0 if status == "ok" else 1)
            with contextlib.suppress(Exception):
                self._stdout.flush()
            self._send(b"k", status.encode())

    def show(self, value: Any) -> None:
        """Hand a value to whoever shows the call, after all that was printed before it."""
        self._send_display(display.bundle(value))

    # A cell ----------------------------------------------------------------------------------------------------------

    def _cell(self, source: str) -> str:
        self.count += 1
        self.inputs.append(source)
        name = failure.cell_name(self.count)
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        status = "ok"
        # What an earlier cell took away or closed is there again: a notebook that cannot print helps nobody.
        for missing in _BUILTINS.keys() - vars(builtins).keys():
            setattr(builtins, missing, _BUILTINS[missing])
        sys.stdout, sys.stderr = self._stdout, self._stderr
        # Whatever an earlier cell made of Ctrl-C, this one can be interrupted.
        _set_signal(_SIGINT, _interrupt)
        try:
            try:
                self._execute(source, name)
            finally:
                self._show_figures()
                _set_signal(_SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt as error:
            status = "interrupted"
            self._send_error(error)
        # SystemExit too: the cell ends, the notebook does not.
        except BaseException as error:
            status = "error"
            self._send_error(error)
        return status

    def _execute(self, source: str, name: str) -> None:
        source = "\n".join("" if _HARMLESS.match(line) else line for line in source.split("\n"))
        options = {"dont_inherit": True, "flags": self._flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT}
        try:
            tree = compile(source, name, "exec", flags=options["flags"] | ast.PyCF_ONLY_AST, dont_inherit=True)
        except SyntaxError as error:
            raise _refusal(source, error, name) or error from None
        assert isinstance(tree, ast.Module)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if tree.body:
            self._evaluate(compile(tree, name, "exec", **options))  # type: ignore[call-overload]
        if isinstance(last, ast.Expr):
            value = self._evaluate(compile(ast.Expression(last.value), name, "eval", **options))  # type: ignore[call-overload]
            if value is not None and not _is_silenced(source, last):
                self._remember(value)
                self.show(value)

    def _evaluate(self, code: types.CodeType) -> Any:
        self._flags |= code.co_flags & _FUTURE_FLAGS
        made = eval(code, self.names)
        if not (code.co_flags & inspect.CO_COROUTINE):
            return made
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(made)

    def _remember(self, value: Any) -> None:
        names = self.names
        names["___"], names["__"], names["_"] = names.get("__"), names.get("_"), value
        names[f"_{self.count}"] = self.outputs[self.count] = value

    def _show_figures(self) -> None:
        """Figures that are still open are shown at the end of the cell, as notebooks do, and closed."""
        try:
            for figure in display.open_figures():
                self.show(figure)
        finally:
            display.close_figures()

    # The surroundings ------------------------------------------------------------------------------------------------

    def _furnish(self) -> None:
        # Both over one buffer, so that they stay in order; a line at a time, so that a crash loses little.
        raw = io.BufferedWriter(io.FileIO(1, "wb", closefd=False), 1 << 16)
        sys.stdout = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
        sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
        self._stdout, self._stderr = sys.stdout, sys.stderr
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)), "utf-8")
        vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
        sys.argv = [""]
        sys.modules["__main__"] = self.module
        self.names.update(__builtins__=builtins, In=self.inputs, Out=self.outputs, display=_displayer(self))
        vars(builtins).update(input=_input, display=_displayer(self), exit=sys.exit, quit=sys.exit)
        sys.meta_path.insert(0, display.Finder(self.show))
        # What the code imports by these names is not this program.
        for name in [name for name in sys.modules if name.split(".")[0] == "ossia"]:
            del sys.modules[name]

    # The pipes -------------------------------------------------------------------------------------------------------

    def _read(self, size: int) -> bytes:
        chunks = bytearray()
        while len(chunks) < size:
            chunk = _read(self._commands, size - len(chunks))
            if not chunk:
                _exit(0)
            chunks += chunk
        return bytes(chunks)

    def _send_error(self, error: BaseException) -> None:
        try:
            text = failure.describe(error)
        # The model's own exception classes take part in their description.
        except BaseException as second:
            text = f"{type(error).__name__} (it could not be described: {type(second).__name__})"
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        if _getpid() != self._pid:
            _write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
            return
        self._send(b"e", text.encode("utf-8", "backslashreplace"))

    def _send_display(self, forms: display.Bundle) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        payload = bytearray()
        for name, data in forms.items():
            mime = str(name).encode("ascii", "replace")[:200]
            if len(data) > self._max_display:
                data = b"" if mime != b"text/plain" else data[: self._max_display]
            payload += bytes([len(mime)]) + mime + LENGTH.pack(len(data)) + data
        self._send(b"d", payload)
        # What is printed next must not overtake this (of a fork it may: the answer goes to one of them).
        _read(self._acks, 1)

    def _send(self, kind: bytes, payload: bytes | bytearray) -> None:
        view = memoryview(MESSAGE.pack(self._token, kind, len(payload)) + payload)
        while view:
            view = view[_write(self._results, view) :]


def _displayer(shell: Shell) -> Any:
    def display(*values: Any, **_: Any) -> None:
        """Show values, as pictures or tables where they have such forms."""
        for value in values:
            shell.show(value)

    return display


def _input(prompt: object = "") -> str:
    raise RuntimeError("input() cannot be used here: nobody can answer; put the value into the code")


def _refusal(source: str, error: SyntaxError, name: str) -> SyntaxError | None:
    """Why a line that only IPython understands is not run."""
    lines = source.split("\n")
    at = error.lineno or 1
    # The parser stops at the first such line, or one after it.
    for number in (at, at - 1):
        if 1 <= number <= len(lines):
            line = lines[number - 1]
            for pattern, text in _REFUSALS:
                if pattern.match(line):
                    return SyntaxError(text, (name, number, len(line) - len(line.lstrip()) + 1, line))
    return None


def _is_silenced(source: str, last: ast.Expr) -> bool:
    """A semicolon after the last expression keeps it from being shown."""
    lines = source.split("\n")
    end = last.end_lineno or len(lines)
    line = lines[end - 1].encode("utf-8")[last.end_col_offset or 0 :].decode("utf-8", "replace")
    rest = "\n".join([line, *lines[end:]])
    return any(part.split("#")[0].strip() == ";" for part in rest.split("\n"))
