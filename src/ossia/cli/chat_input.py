"""What a person types, or a pipe brings, to `ossia chat`.

A line that ends in a backslash goes on in the next one; three quotation marks begin a text of several lines, and three
more end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ossia.errors import InputError

QUOTES = '"""'
_MAX_LINE_BYTES = 8 << 20


class Input(Protocol):
    """Where texts come from. `is_interactive` tells whether somebody is there to be asked."""

    is_interactive: bool

    def read(self, runner: asyncio.Runner) -> str | None:
        """The next text; None at the end. Raises KeyboardInterrupt for Ctrl-C, and InputError for one that cannot be
        read; later ones may be."""

    async def ask(self, question: str) -> str:
        """One line that answers a question; "" if there is none. Raises CancelledError for Ctrl-C."""


class Joiner:
    """Joins lines to texts."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._is_quoted = False

    @property
    def is_open(self) -> bool:
        return self._is_quoted or bool(self._lines)

    def feed(self, line: str) -> str | None:
        """The text that ``line`` completes; None if it goes on."""
        if self._is_quoted:
            if not line.rstrip().endswith(QUOTES):
                self._lines.append(line)
                return None
            return self._end(line.rstrip().removesuffix(QUOTES))
        if not self._lines and line.lstrip().startswith(QUOTES):
            inner = line.lstrip().removeprefix(QUOTES)
            if inner.rstrip().endswith(QUOTES):
                return inner.rstrip().removesuffix(QUOTES)
            self._is_quoted = True
            self._lines = [inner] if inner.strip() else []
            return None
        if line.endswith("\\"):
            self._lines.append(line[:-1])
            return None
        return self._end(line)

    def finish(self) -> str | None:
        """The input has ended: what was begun."""
        return self._end("").rstrip("\n") if self.is_open else None

    def _end(self, line: str) -> str:
        text = "\n".join([*self._lines, *([line] if line.strip() or not self._is_quoted else [])])
        self._lines, self._is_quoted = [], False
        return text


def joined(text: str) -> tuple[str, bool]:
    """The text that its lines make, and whether more must follow."""
    joiner = Joiner()
    lines = text.split("\n")
    out: list[str] = []
    for line in lines:
        if (whole := joiner.feed(line)) is not None:
            out.append(whole)
    is_open = joiner.is_open
    if (rest := joiner.finish()) is not None:
        out.append(rest)
    return "\n".join(out), is_open


class PipeInput:
    """Lines of a pipe or a file."""

    is_interactive = False

    def __init__(self, file: BinaryIO | None = None) -> None:
        if file is None and sys.stdin is None:
            raise InputError("standard input is closed; give questions there, one a line")
        self._file = file or sys.stdin.buffer
        self._joiner = Joiner()
        self._num_lines = 0

    def read(self, runner: asyncio.Runner) -> str | None:
        while True:
            line = self._file.readline(_MAX_LINE_BYTES + 1)
            self._num_lines += 1
            if not line:
                return self._joiner.finish()
            if len(line) > _MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = self._file.readline(_MAX_LINE_BYTES)
                raise InputError(
                    f"line {self._num_lines} is longer than {_MAX_LINE_BYTES >> 20} MiB, and was passed by"
                )
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"line {self._num_lines} is not UTF-8 text, and was passed by: {error.reason} at byte {error.start}"
                ) from None
            if (whole := self._joiner.feed(text.rstrip("\r\n"))) is not None:
                return whole

    async def ask(self, question: str) -> str:
        return ""


class LineInput:
    """A person at a terminal that is not to be drawn on: one line at a time."""

    is_interactive = True

    def __init__(self) -> None:
        self._joiner = Joiner()

    def read(self, runner: asyncio.Runner) -> str | None:
        return runner.run(self._read())

    async def ask(self, question: str) -> str:
        return await self._line(question + " ") or ""

    async def _read(self) -> str | None:
        try:
            while True:
                line = await self._line("... " if self._joiner.is_open else "> ")
                if line is None:
                    return self._joiner.finish()
                if (whole := self._joiner.feed(line)) is not None:
                    return whole
        except asyncio.CancelledError:
            self._joiner = Joiner()
            raise

    async def _line(self, prompt: str) -> str | None:
        print(prompt, end="", file=sys.stderr, flush=True)
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        fd = sys.stdin.fileno()
        # Reading itself would keep Ctrl-C waiting.
        loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        except asyncio.CancelledError:
            print(file=sys.stderr)
            raise
        finally:
            loop.remove_reader(fd)
        line = sys.stdin.buffer.readline(_MAX_LINE_BYTES)
        if not line:
            print(file=sys.stderr)
            return None
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"what was typed is not UTF-8 text: {error.reason}; is the terminal set to it?") from None


class TerminalInput:
    """A person at a terminal: editing, completion of commands, history across runs."""

    is_interactive = True

    def __init__(self, history: Path | None, commands: list[str], status: Callable[[], str]) -> None:
        """``history`` None keeps none; ``status`` is the line at the bottom."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.document import Document
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        class Commands(Completer):
            def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
                typed = document.text
                if typed.startswith("/") and " " not in typed:
                    for name in commands:
                        if name.startswith(typed):
                            yield Completion(name, start_position=-len(typed))

        class History(FileHistory):
            def store_string(self, string: str) -> None:
                # On a full disk what was typed is still asked.
                with contextlib.suppress(OSError):
                    super().store_string(string)

        self._session: PromptSession[str] = PromptSession(
            history=History(str(history)) if history is not None else InMemoryHistory(),
            completer=Commands(),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: "." * (width - 1) + " ",
            bottom_toolbar=status,
            # Ctrl-Z and Ctrl-X Ctrl-E as in a shell.
            enable_suspend=True,
            enable_open_in_editor=True,
        )
        self._question: PromptSession[str] = PromptSession(history=InMemoryHistory())

    def read(self, runner: asyncio.Runner) -> str | None:
        try:
            typed = runner.run(self._session.prompt_async("> "))
        except EOFError:
            return None
        # What a terminal sends is decoded with its errors kept.
        return joined(typed.encode("utf-8", "replace").decode("utf-8"))[0]

    async def ask(self, question: str) -> str:
        try:
            return await self._question.prompt_async(question + " ")
        except EOFError:
            return ""
        except KeyboardInterrupt:
            raise asyncio.CancelledError from None


def _key_bindings() -> Any:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None
        elif joined(buffer.text)[1]:
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _alt_enter(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings


def private_file(path: Path) -> Path | None:
    """The file, made if need be, for its owner alone; None if there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(path, flags, 0o600)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(fd, 0o600)
        return path
    finally:
        os.close(fd)


@contextlib.contextmanager
def quiet_keys() -> Iterator[None]:
    """What is typed while an answer comes does not appear in it; the next question has it."""
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (OSError, ValueError, AttributeError, termios.error):
        yield
        return
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
