"""What `ossia chat` shows while an answer comes: plainly, for pipes and simple terminals, or drawn.

Both read the events of a response. A screen knows no conversation; what it shows of the speed it reads from the meter.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, Protocol

from ossia.cli.chat_session import Meter
from ossia.cli.chat_text import Harmless, MarkdownStream, Tail, harmless, markdown
from ossia.responses.events import Event
from ossia.responses.schema import Json

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Lines and characters of a tool's output that are shown.
_MAX_OUTPUT_LINES = 12
_MAX_OUTPUT_CHARS = 2_000
# A block longer than this is shown plainly while it grows: drawing it again and again would take the model's time.
_MAX_LIVE_CHARS = 20_000
_MIN_DRAW_S = 0.06
# Drawing takes at most this share of the time.
_DRAWING_SHARE = 10
# Terminals drop what is longer.
_MAX_COPIED_BYTES = 74_994


class Screen(Protocol):
    """Where an answer is shown, and what is said about it."""

    shows_reasoning: bool

    def begin(self) -> None:
        """An answer is under way."""

    def show(self, event: Event) -> None: ...

    def tick(self) -> None:
        """Some tenths of a second have passed."""

    def end(self) -> None:
        """The answer has ended, in whatever way."""

    def note(self, text: str, *, is_warning: bool = False) -> None:
        """A word of ossia's own."""

    def print(self, text: str) -> None:
        """What a command was asked for."""

    def diff(self, text: str) -> None:
        """A change of files, as a unified diff."""

    def copy(self, text: str) -> str | None:
        """Put a text into the clipboard; why not, or None."""


class PlainScreen:
    """Text as it comes: answers to standard output, everything else to standard error."""

    def __init__(
        self, meter: Meter, *, shows_reasoning: bool, out: IO[str] | None = None, notes: IO[str] | None = None
    ) -> None:
        self.shows_reasoning = shows_reasoning
        self._meter = meter
        self._out = out or sys.stdout
        self._notes = notes or sys.stderr
        # Text for a program is left as it is.
        self._clean: Callable[[str], str] = harmless if self._out.isatty() else lambda text: text
        self._item = ""
        self._has_shown = False
        self._ends_line = True

    def begin(self) -> None:
        self._item, self._has_shown, self._ends_line = "", False, True

    def show(self, event: Event) -> None:
        if event.type in ("response.output_text.delta", "response.reasoning_text.delta"):
            if event.type == "response.output_text.delta" or self.shows_reasoning:
                self._write(event.fields["item_id"], event.fields["delta"])
        elif event.type == "response.output_item.done" and (told := told_call(event.fields["item"])):
            for line in told.lines():
                self.note(line)

    def tick(self) -> None:
        pass

    def end(self) -> None:
        if not self._ends_line:
            self._out.write("\n")
            self._ends_line = True
        self._out.flush()

    def note(self, text: str, *, is_warning: bool = False) -> None:
        print(f"ossia: {harmless(text)}" if is_warning else harmless(text), file=self._notes, flush=True)

    def print(self, text: str) -> None:
        print(self._clean(text), file=self._out, flush=True)

    def diff(self, text: str) -> None:
        self.note(text)

    def copy(self, text: str) -> str | None:
        if not (self._out.isatty() and sys.stdin.isatty()):
            return "there is no terminal whose clipboard could take it"
        return _copy(text, self._out)

    def _write(self, item_id: str, text: str) -> None:
        if item_id != self._item:
            text = "\n\n" * self._has_shown + text
            self._item, self._has_shown = item_id, True
        if text:
            self._out.write(self._clean(text))
            self._out.flush()
            self._ends_line = text.endswith("\n")


class RichScreen:
    """Drawn on a terminal: finished blocks once, the open block and a line of status below them."""

    def __init__(self, meter: Meter, *, shows_reasoning: bool, console: Console | None = None) -> None:
        from rich.console import Console

        self.shows_reasoning = shows_reasoning
        self._meter = meter
        self._console = console or Console(highlight=False)
        self._live: Any = None
        self._doing = ""
        # What the open item says: Markdown of an answer, or the plain text of a thought or call.
        self._kind = ""
        self._stream = MarkdownStream()
        self._text = ""
        self._item_began_s = self._tokens_before = 0.0
        self._drawn_s = self._drawing_s = 0.0

    def begin(self) -> None:
        from rich.live import Live

        self._kind, self._doing, self._text = "", "reading the prompt", ""
        self._stream = MarkdownStream()
        self._item_began_s = time.perf_counter()
        self._tokens_before = 0.0
        # Everything is drawn in this thread, when there is something to draw.
        self._live = Live(
            Tail(None, ""),
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._draw(is_due=True)

    def show(self, event: Event) -> None:
        fields = event.fields
        match event.type:
            case "response.output_item.added":
                self._open(fields["item"]["type"])
            case "response.output_text.delta":
                for block in self._stream.feed(fields["delta"]):
                    self._print(markdown(block), gap=True)
                self._draw()
            case "response.reasoning_text.delta":
                self._text += fields["delta"]
                self._draw()
            case "response.code_interpreter_call.interpreting":
                self._doing = "running python"
                self._draw(is_due=True)
            case "response.output_item.done":
                self._close(fields["item"])
            case _ if event.type.endswith(".delta") and isinstance(fields.get("delta"), str):
                self._text += fields["delta"]
                self._draw()

    def tick(self) -> None:
        if self._live is not None:
            self._draw(is_due=True)

    def end(self) -> None:
        if self._live is None:
            return
        for block in self._stream.finish():
            self._print(markdown(block), gap=True)
        live, self._live = self._live, None
        live.stop()

    def note(self, text: str, *, is_warning: bool = False) -> None:
        from rich.text import Text

        self._print(Text(harmless(text), style="yellow" if is_warning else "dim"))

    def print(self, text: str) -> None:
        from rich.text import Text

        self._print(Text(harmless(text)))

    def diff(self, text: str) -> None:
        from rich.text import Text

        out = Text()
        for line in harmless(text).splitlines():
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
            out.append(line + "\n", style=style)
        self._print(out)

    def copy(self, text: str) -> str | None:
        return _copy(text, self._console.file)

    # Items -----------------------------------------------------------------------------------------------------------

    def _open(self, kind: str) -> None:
        self._kind, self._text = kind, ""
        self._item_began_s, self._tokens_before = time.perf_counter(), self._meter.num_tokens
        self._doing = {"reasoning": "thinking", "message": "answering", "web_search_call": "searching"}.get(
            kind, "calling a tool"
        )
        self._draw()

    def _close(self, item: Json) -> None:
        for block in self._stream.finish():
            self._print(markdown(block), gap=True)
        if item["type"] == "reasoning":
            self._print_thought(item)
        elif told := told_call(item):
            self._print_call(told)
        self._kind, self._text, self._doing = "", "", "going on"
        self._item_began_s, self._tokens_before = time.perf_counter(), self._meter.num_tokens
        self._draw()

    def _print_thought(self, item: Json) -> None:
        from rich.text import Text

        num = int(self._meter.num_tokens - self._tokens_before)
        if self.shows_reasoning and self._text.strip():
            self._print(Text(harmless(self._text.strip()), style="dim italic"))
        self._print(Text(f"thought for {time.perf_counter() - self._item_began_s:.1f} s, {num:,} tokens", style="dim"))
        self._console.print()

    def _print_call(self, told: ToldCall) -> None:
        from rich.syntax import Syntax
        from rich.text import Text

        self._print(Text(harmless(told.head), style="dim bold"))
        if told.code:
            self._print(Harmless(Syntax(harmless(told.code), "python", theme="ansi_dark", word_wrap=True)))
        for line in told.output:
            self._print(Text("  " + harmless(line), style="dim"))
        self._console.print()

    # Drawing ---------------------------------------------------------------------------------------------------------

    def _print(self, what: RenderableType, *, gap: bool = False) -> None:
        self._console.print(what)
        if gap:
            self._console.print()

    def _draw(self, *, is_due: bool = False) -> None:
        began_s = time.perf_counter()
        wait_s = max(_MIN_DRAW_S, self._drawing_s * _DRAWING_SHARE)
        if self._live is None or (began_s - self._drawn_s < wait_s and not (is_due and self._drawing_s < _MIN_DRAW_S)):
            return
        self._live.update(Tail(self._growing(), self._status()), refresh=True)
        self._drawn_s = time.perf_counter()
        self._drawing_s = self._drawn_s - began_s

    def _growing(self) -> RenderableType | None:
        from rich.text import Text

        if self._kind == "reasoning":
            text = self._text[-_MAX_LIVE_CHARS:].strip() if self.shows_reasoning else ""
            return Text(harmless(text), style="dim italic") if text else None
        if self._kind == "message":
            growing = self._stream.open
            if len(growing) > _MAX_LIVE_CHARS:
                return Text(harmless(growing[-_MAX_LIVE_CHARS // 10 :]))
            return markdown(growing) if growing.strip() else None
        return Text(harmless(self._text[-_MAX_LIVE_CHARS // 10 :]), style="dim") if self._text else None

    def _status(self) -> str:
        meter = self._meter
        elapsed_s = time.perf_counter() - self._item_began_s
        parts = [f"{self._doing} {elapsed_s:.0f} s"]
        if self._kind == "reasoning":
            parts.append(f"{int(meter.num_tokens - self._tokens_before):,} tokens")
        if meter.tokens_per_s:
            parts.append(f"{meter.tokens_per_s:.1f} tokens/s")
        return " · ".join([*parts, "Ctrl-C stops"])


class ToldCall:
    """A call of a tool, and what came of it, as a person is told."""

    def __init__(self, head: str, code: str = "", output: str = "") -> None:
        self.head = head
        self.code = code.rstrip()
        lines = output[:_MAX_OUTPUT_CHARS].rstrip("\n").split("\n") if output.strip() else []
        self.output = lines[:_MAX_OUTPUT_LINES]
        if len(lines) > _MAX_OUTPUT_LINES or len(output) > _MAX_OUTPUT_CHARS:
            self.output.append(f"({output.count(chr(10)) + 1:,} lines, {len(output):,} characters; the model has all)")

    def lines(self) -> list[str]:
        return [self.head, *(f"  {line}" for line in self.code.split("\n") if self.code), *self.output]


def told_call(item: Json) -> ToldCall | None:
    """The call that an item shows; None for another item."""
    failed = " (failed)" if item.get("status") == "failed" else ""
    match item["type"]:
        case "code_interpreter_call":
            return ToldCall(f"python{failed}", item.get("code") or "", _outputs(item.get("outputs")))
        case "web_search_call":
            action = item.get("action") or {}
            return ToldCall(_browsed(action) + failed, output=_sources(action))
        case "mcp_call":
            head = f"{item.get('server_label', 'mcp')}.{item.get('name', '')}{failed}"
            said = item.get("output") or _words_of(item.get("error"))
            return ToldCall(f"{head} {_short(item.get('arguments'))}", output=said)
        case "mcp_list_tools" if item.get("error"):
            return ToldCall(f"the tools of {item.get('server_label')} cannot be had: {_short(item['error'])}")
        case "function_call" | "custom_tool_call":
            return ToldCall(f"{item.get('name', '')}{failed} {_short(item.get('arguments', ''))}".rstrip())
    return None


def _browsed(action: Json) -> str:
    match action.get("type"):
        case "open_page":
            return f"open {_short(action.get('url'))}"
        case "find_in_page" | "find":
            return f"find {_short(action.get('pattern'))} in {_short(action.get('url'))}"
    return f"search {_short(action.get('query') or '; '.join(map(str, action.get('queries') or ())))}"


def _sources(action: Json) -> str:
    return "\n".join(str(source.get("url", "")) for source in action.get("sources") or () if isinstance(source, dict))


def _outputs(outputs: object) -> str:
    told = []
    for one in outputs if isinstance(outputs, list) else ():
        told.append(str(one.get("logs", "")) if one.get("type") == "logs" else f"[{one.get('type', 'output')}]")
    return "\n".join(told)


def _words_of(error: object) -> str:
    parts = error.get("content") if isinstance(error, dict) else None
    return "\n".join(str(part.get("text", "")) for part in parts or () if isinstance(part, dict))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"


def _copy(text: str, terminal: IO[str]) -> str | None:
    """Hand a text to the terminal's clipboard by OSC 52, in letters that can steer nothing."""
    data = text.encode("utf-8", "replace")
    if len(data) > _MAX_COPIED_BYTES:
        return f"it has {len(data):,} bytes, and terminals take {_MAX_COPIED_BYTES:,}; /save it instead"
    terminal.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\a")
    terminal.flush()
    return None
