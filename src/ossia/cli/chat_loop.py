"""The loop of `ossia chat`: read a text, answer it or obey a command, until the input ends.

Ctrl-C stops what is under way and keeps the conversation; at the prompt it drops what was typed. From a pipe the exit
code is 1 if any line was not answered, 130 if it was interrupted.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ossia.cli.chat_input import Input, quiet_keys
from ossia.cli.chat_screen import Screen
from ossia.cli.chat_session import EFFORTS, ChatSession, Ending
from ossia.errors import ContextLengthError, InputError, OssiaError
from ossia.responses.schema import Json
from ossia.tools.apply_patch import DESCRIPTION

WhenFull = Literal["ask", "drop", "compact"]

_TICK_S = 0.25


class ToolSet(NamedTuple):
    """A tool that can be switched on: what declares it in a request, and what it does, in a line."""

    declaration: Json
    what: str


BROWSER = ToolSet({"type": "web_search"}, "searches and opens pages")
PYTHON = ToolSet(
    {"type": "code_interpreter", "container": {"type": "auto"}}, "runs the model's code, as --python-sandbox says"
)
PATCHES = ToolSet(
    {"type": "custom", "name": "apply_patch", "description": DESCRIPTION},
    "changes files of the patch root; you are asked before each change",
)


def server_tools(label: str, *, is_asked: bool) -> ToolSet:
    """The tools of an MCP server of the settings."""
    asked = "you are asked before each call" if is_asked else "called unasked, as its settings say"
    return ToolSet({"type": "mcp", "server_label": label}, f"tools of the server [mcp.{label}]; {asked}")


class _Quit(Exception):
    """The user wants to leave."""


class ChatLoop:
    """One chat of one person."""

    def __init__(
        self,
        session: ChatSession,
        source: Input,
        screen: Screen,
        *,
        when_full: WhenFull = "ask",
        tools: dict[str, ToolSet] | None = None,
        tools_on: Sequence[str] = (),
        file: Path | None = None,
    ) -> None:
        """``tools`` are there to be switched on, ``tools_on`` of them from the start; /save writes ``file`` again."""
        self._session, self._source, self._screen = session, source, screen
        self._when_full = when_full
        self._tools = tools or {}
        self._first_tools = list(tools_on)
        self._code = 0
        self._file = file
        # Of the conversation, as the next prompt has it; None when it must be counted.
        self._num_tokens: int | None = None
        self._runner = asyncio.Runner()
        self._quiet = ExitStack()

    def run(self) -> int:
        """Chat until the input ends; the exit code."""
        try:
            with self._runner:
                try:
                    self._runner.run(self._start())
                    return self._chat()
                finally:
                    if self._session.boxes is not None:
                        self._runner.run(self._session.boxes.close())
        finally:
            self._quiet.close()

    def _chat(self) -> int:
        while True:
            try:
                text = self._source.read(self._runner)
                if text is None:
                    return self._code
                if text.strip():
                    self._obey(text)
            # At a question of ours Ctrl-C is a key, and cancels without a signal.
            except (KeyboardInterrupt, asyncio.CancelledError):
                if not self._source.is_interactive:
                    return 130
            except _Quit:
                return self._code
            except OssiaError as error:
                self._fail(error.message)
            except OSError as error:
                if isinstance(error, BrokenPipeError):
                    raise
                named = f"{error.filename}: " if error.filename is not None else ""
                self._fail(f"{named}{error.strerror or error}")

    async def _start(self) -> None:
        if self._session.boxes is not None:
            names = [name.partition(":")[0] for name in self._first_tools if name != "apply_patch"]
            on, _ = await self._session.boxes.start(names)
            if self._source.is_interactive:
                self._screen.note(f"tools: {', '.join(on)}")
        await self.set_tools(self._first_tools)

    def status(self) -> str:
        """One line: the model, how it thinks, and how full its context is."""
        session = self._session
        parts = [session.name, f"effort {session.effort}", self._context()]
        if session.tools:
            parts.append("tools " + ", ".join(self._tools_on()))
        if session.meter.tokens_per_s:
            parts.append(f"{session.meter.tokens_per_s:.1f} tokens/s")
        return " · ".join([*parts, "/help"])

    async def approve(self, plan: Any) -> bool:
        """Show a patch, and ask whether it may be applied."""
        if not self._source.is_interactive:
            return False
        return await self._ask("Apply this patch? [y/N]", plan.unified_diff()) in ("y", "yes")

    async def approve_call(self, request: Json) -> bool:
        """Show a call of an MCP server, and ask whether it may be made."""
        called = f"{request['server_label']}.{request['name']}"
        if not self._source.is_interactive:
            self._screen.note(
                f'{called} was not called, since nobody is here to approve it; approval = "never" in its settings '
                "lets it be called unasked",
                is_warning=True,
            )
            return False
        return await self._ask(f"Call {called}? [y/N]", _indented(request["arguments"])) in ("y", "yes")

    # One text --------------------------------------------------------------------------------------------------------

    def _obey(self, text: str) -> None:
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            command = COMMANDS.get({"exit": "quit", "?": "help"}.get(name, name))
            if command is None:
                close = difflib.get_close_matches(name, COMMANDS, n=1)
                hint = f"did you mean /{close[0]}?" if close else "/help tells what there is"
                raise InputError(f"there is no command /{name[:40]}; {hint} (a question may begin with // instead)")
            done = command.do(self, rest.strip())
            if inspect.isawaitable(done):
                self._run(done)
            return
        self._num_tokens = None
        self._run(self._answer(text[1:] if text.startswith("//") else text))

    def _run(self, work: Any) -> None:
        self._quiet.enter_context(quiet_keys())
        try:
            self._runner.run(work)
        finally:
            self._quiet.close()
            self._screen.end()

    async def _answer(self, question: str) -> None:
        when_full = self._when_full
        while True:
            self._screen.begin()
            ticks = asyncio.create_task(self._tick())
            try:
                ending = await self._session.ask(question, self._screen.show)
                break
            except ContextLengthError as error:
                self._screen.end()
                when_full = await self._make_room(error, when_full)
            finally:
                ticks.cancel()
                self._screen.end()
        self._told(ending)

    def _told(self, ending: Ending) -> None:
        session, meter = self._session, self._session.meter
        self._num_tokens = None
        if ending == "stopped":
            kept = "; what was said is kept" if session.keeps_last_asked else ""
            self._screen.note(f"stopped{kept}", is_warning=True)
            if not self._source.is_interactive:
                raise KeyboardInterrupt
        elif ending == "failed":
            error = session.error or OssiaError("the answer failed")
            self._fail(error.message)
            if isinstance(error, ContextLengthError):
                self._screen.note("/compact sums the conversation up, /drop forgets its oldest turn, /clear all of it")
        elif ending == "cut":
            is_full = meter.num_context_tokens >= meter.max_context
            why = "the context is full: /compact, /drop or /clear make room" if is_full else "--max-tokens was reached"
            self._screen.note(f"the answer was cut off: {why}", is_warning=True)
            if not (self._source.is_interactive or (session.last is not None and session.last.answer)):
                self._code = 1
        if self._source.is_interactive:
            self._screen.note(
                f"{meter.num_tokens:,} tokens, {meter.tokens_per_s:.1f} tokens/s, first after "
                f"{meter.first_token_s:.1f} s · {self._context()}"
            )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._screen.tick()

    async def _ask(self, question: str, shown: str = "") -> str:
        """Ask in the middle of an answer; the answer in small letters."""
        self._screen.end()
        self._quiet.close()
        if shown:
            self._screen.diff(shown)
        try:
            return (await self._source.ask(question)).strip().lower()
        finally:
            self._quiet.enter_context(quiet_keys())
            self._screen.begin()

    # Room ------------------------------------------------------------------------------------------------------------

    async def _make_room(self, error: ContextLengthError, when_full: WhenFull) -> WhenFull:
        """Make room as the user chooses; what to do if it is not enough. Raises the error if nothing is to be done."""
        session = self._session
        if not session.turns:
            raise ContextLengthError(f"the question does not fit: {error.message}") from None
        if when_full == "ask":
            if not self._source.is_interactive:
                raise ContextLengthError(
                    f"{error.message}. Nothing was left out: --when-full drop forgets the oldest turns, --when-full "
                    "compact sums them up"
                ) from None
            self._screen.note(f"The context is full: {error.message}.", is_warning=True)
            asked = "[d]rop the oldest turns, [s]um them up, [n]ew conversation, or [c]ancel the question?"
            answer = (await self._ask(asked))[:1]
            self._screen.end()
            if answer == "n":
                session.clear()
                return "ask"
            if answer not in ("d", "s"):
                raise InputError("the question was not asked; /retry asks it again")
            when_full = "drop" if answer == "d" else "compact"
        if when_full == "compact":
            await self._compact()
            # If the summary and the question do not fit, there is nothing to be summed up again.
            return "drop"
        self._drop()
        return "drop"

    def _drop(self) -> None:
        question = self._session.turns[0].question
        self._session.drop_oldest()
        self._num_tokens = None
        self._screen.note(f"forgotten: {_first_line(question)}", is_warning=True)

    async def _compact(self) -> None:
        before = self._session.num_tokens
        self._screen.note("summing the conversation up")
        ending, num_left_out = await self._session.compact()
        if ending == "stopped":
            raise KeyboardInterrupt
        self._num_tokens = None
        if num_left_out:
            self._screen.note(
                f"there was no room to sum up all: nothing of the oldest turns ({num_left_out}) is in it",
                is_warning=True,
            )
        self._screen.note(f"summed up: {before:,} tokens became {self._session.num_tokens:,}", is_warning=True)

    def _context(self) -> str:
        if self._num_tokens is None:
            self._num_tokens = self._session.num_tokens
        limit = self._session.meter.max_context
        return f"context {self._num_tokens:,} of {limit:,} ({self._num_tokens / limit:.0%})"

    def _fail(self, message: str) -> None:
        self._screen.note(message, is_warning=True)
        if not self._source.is_interactive:
            self._code = 1

    # Commands --------------------------------------------------------------------------------------------------------

    def help(self, _: str) -> None:
        lines = [f"{f'/{name} {command.arguments}'.rstrip():<24} {command.what}" for name, command in COMMANDS.items()]
        lines += [
            "",
            'A line that ends in \\ goes on in the next one; """ begins a text of several lines and ends it.',
            "Ctrl-C stops the answer, Ctrl-D leaves. A question may begin with // for a single /.",
        ]
        self._screen.print("\n".join(lines))

    def effort(self, given: str) -> None:
        if given:
            if given not in EFFORTS:
                raise InputError(f"the effort is {given[:40]!r}; expected one of: {', '.join(EFFORTS)}")
            self._session.effort = given
            self._num_tokens = None
        self._screen.note(f"effort: {self._session.effort}")

    def system(self, given: str) -> None:
        if given:
            self._session.instructions = None if given in ("-", "off") else given
            self._num_tokens = None
        self._screen.note(f"system: {self._session.instructions or '(nothing)'}")

    async def tools(self, given: str) -> None:
        if given:
            await self.set_tools([] if given in ("-", "off", "none") else re.split(r"[,\s]+", given))
        if not self._tools:
            self._screen.note("no tools: none was set up; see ossia chat --help")
            return
        on = self._tools_on()
        for name, tool in self._tools.items():
            self._screen.note(f"{name:<12} {'on ' if name in on else 'off'}  {tool.what}")

    async def set_tools(self, names: Sequence[str]) -> None:
        """Switch on exactly these. Raises InputError for one that is not there."""
        for name in names:
            if name not in self._tools:
                known = f"expected some of: {', '.join(self._tools)}" if self._tools else "none was set up"
                raise InputError(f"there is no tool {name[:40]!r}; {known}")
        await self._session.set_tools([self._tools[name].declaration for name in dict.fromkeys(names)])
        self._num_tokens = None

    def _tools_on(self) -> list[str]:
        return [name for name, tool in self._tools.items() if tool.declaration in self._session.tools]

    def reasoning(self, given: str) -> None:
        if given in ("on", "off"):
            self._screen.shows_reasoning = given == "on"
            self._screen.note(f"reasoning is {'shown' if given == 'on' else 'folded'}")
        elif given:
            raise InputError(f"/reasoning takes on, off or nothing; met {given[:40]!r}")
        else:
            last = self._session.last
            self._screen.note((last.reasoning.strip() if last else "") or "there is no reasoning to show")

    def save(self, given: str) -> Any:
        path = _path(given) or self._file
        if path is None:
            raise InputError("where to? /save FILE.json, or FILE.md to read")
        return self._save(path)

    async def _save(self, path: Path) -> None:
        replaces = path == self._file
        if not replaces and path.exists():
            if not self._source.is_interactive or await self._ask(f"Replace {path}? [y/N]") not in ("y", "yes"):
                raise InputError(f"{path}: there is such a file already; it was left alone")
            replaces = True
        self._session.save(path, replaces=replaces)
        if path.suffix != ".md":
            self._file = path
        self._screen.end()
        self._screen.note(f"saved: {path}")

    def load(self, given: str) -> None:
        path = _path(given)
        if path is None:
            raise InputError("which one? /load FILE.json")
        self._session.load(path)
        self._file = path
        self._num_tokens = None
        self._screen.note(f"loaded: {len(self._session.turns)} turns, {self._context()}")
        if self._session.question is not None:
            self._screen.note(f"last asked: {_first_line(self._session.question)}")

    def retry(self, _: str) -> Any:
        return self._answer(self._session.take_back())

    def copy(self, _: str) -> None:
        answer = self._session.last.answer if self._session.last else ""
        if not answer.strip():
            raise InputError("there is no answer to copy")
        if problem := self._screen.copy(answer):
            raise InputError(f"the answer was not copied: {problem}")
        self._screen.note(f"copied: {len(answer):,} characters, if the terminal allows it")

    def tokens(self, _: str) -> None:
        meter, self._num_tokens = self._session.meter, None
        lines = [
            self._context(),
            f"turns: {len(self._session.turns)}",
            f"last answer: {meter.num_tokens:,} tokens, {meter.tokens_per_s:.1f} tokens/s",
        ]
        self._screen.print("\n".join(lines))

    def compact(self, _: str) -> Any:
        return self._compact()

    def drop(self, _: str) -> None:
        if not self._session.turns:
            raise InputError("there is no turn to forget")
        self._drop()
        self._screen.note(self._context())

    def clear(self, _: str) -> None:
        self._session.clear()
        self._num_tokens, self._file = None, None
        self._screen.note("a new conversation")

    def quit(self, _: str) -> None:
        raise _Quit


class _Command(NamedTuple):
    do: Callable[[ChatLoop, str], Any]
    arguments: str
    what: str


COMMANDS = {
    "effort": _Command(ChatLoop.effort, "low|medium|high", "how long the model thinks before it answers"),
    "system": _Command(ChatLoop.system, "TEXT", "what the developer asks of the model; - for nothing"),
    "tools": _Command(ChatLoop.tools, "NAMES|off", "which tools the model may call"),
    "reasoning": _Command(
        ChatLoop.reasoning, "on|off", "show or fold the chain of thought; alone: that of the last answer"
    ),
    "retry": _Command(ChatLoop.retry, "", "forget the last answer and ask again"),
    "copy": _Command(ChatLoop.copy, "", "put the last answer into the clipboard (OSC 52)"),
    "save": _Command(ChatLoop.save, "FILE", "keep the conversation: .json to go on, .md to read"),
    "load": _Command(ChatLoop.load, "FILE", "go on with a conversation that was saved"),
    "tokens": _Command(ChatLoop.tokens, "", "how full the context is"),
    "compact": _Command(ChatLoop.compact, "", "let the model sum the conversation up, to make room"),
    "drop": _Command(ChatLoop.drop, "", "forget the oldest turn, to make room"),
    "clear": _Command(ChatLoop.clear, "", "begin a new conversation"),
    "help": _Command(ChatLoop.help, "", "this"),
    "quit": _Command(ChatLoop.quit, "", "leave"),
}


def _indented(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return arguments


def _path(given: str) -> Path | None:
    if not given:
        return None
    try:
        parts = shlex.split(given)
    except ValueError:
        parts = [given]
    if len(parts) != 1:
        parts = [given]
    return Path(os.path.expanduser(parts[0]))


def _first_line(text: str) -> str:
    line = text.strip().split("\n")[0]
    return line if len(line) <= 60 and line == text.strip() else line[:59] + "…"
