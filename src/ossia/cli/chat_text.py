"""Text of a model on a terminal: nothing in it can steer the terminal, and Markdown is shown as it grows.

A block of Markdown that another has followed can no longer change: it is printed once, and only the last block is
drawn again and again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Heading, Markdown
from rich.segment import Segment
from rich.text import Text

from ossia.cli.prompts import printable

# Marks that change the order in which a line is read: with them code can look like other code.
_REORDERING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029], 0xFFFD)

_MAX_BLOCK_CHARS = 100_000


def harmless(text: str) -> str:
    """The text with every sign made visible that could steer a terminal, or show its letters in another order."""
    return printable(text.replace("\r\n", "\n"), True).translate(_REORDERING)


class Harmless:
    """What another renderable draws, harmless: entities of Markdown may have become signs that were not in the text."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(harmless(segment.text), segment.style)


class _Trimmed:
    """What another renderable draws, without the empty lines around it."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._inner, options.update(height=None), pad=False)
        shown = [i for i, line in enumerate(lines) if "".join(segment.text for segment in line).strip()]
        for line in lines[shown[0] : shown[-1] + 1] if shown else ():
            yield from line
            yield Segment.line()


class Tail:
    """As many of the last lines of ``inner`` as the terminal has room for, and a line of status below."""

    def __init__(self, inner: RenderableType | None, status: str) -> None:
        self._inner = inner
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._inner is not None:
            lines = console.render_lines(self._inner, options.update(height=None), pad=False)
            for line in lines[-max(1, console.height - 3) :]:
                yield from line
                yield Segment.line()
        yield Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")


class _LeftHeading(Heading):
    """A heading where the eye is, at the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold")
        yield self.text


class _ChatMarkdown(Markdown):
    elements = {**Markdown.elements, "heading_open": _LeftHeading}  # noqa: RUF012


def markdown(text: str) -> RenderableType:
    """Markdown as a renderable. A link shows where it leads, and is none: its text could say another thing."""
    return _Trimmed(Harmless(_ChatMarkdown(harmless(text), code_theme="ansi_dark", hyperlinks=False)))


class MarkdownStream:
    """Markdown that is still being written: `open` is the block that may change, `feed` returns what is finished."""

    def __init__(self) -> None:
        self.open = ""
        self._parser = MarkdownIt().enable("strikethrough").enable("table")

    def feed(self, text: str) -> list[str]:
        self.open += text
        if "\n" not in text:
            return []
        # A block without end would be read again with each of its lines.
        end = self._end_of_finished() if len(self.open) < _MAX_BLOCK_CHARS else self.open.rfind("\n") + 1
        done, self.open = self.open[:end], self.open[end:]
        return [done] if done.strip() else []

    def finish(self) -> list[str]:
        done, self.open = self.open, ""
        return [done] if done.strip() else []

    def _end_of_finished(self) -> int:
        """Where the last block begins. The last line counts only when it is whole: `***` may become bold or a rule."""
        whole = self.open[: self.open.rfind("\n") + 1]
        # As it will be drawn: the parser counts a lone return as the end of a line, which none is there.
        starts = _block_lines(self._parser.parse(harmless(whole)))
        if len(starts) < 2:
            return 0
        at = 0
        for _ in range(starts[-1]):
            at = whole.index("\n", at) + 1
        return at


def _block_lines(tokens: Iterable[Any]) -> list[int]:
    return [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
