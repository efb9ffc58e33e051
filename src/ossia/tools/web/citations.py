"""Citations in an answer, `【6†L9-L11】`, to the annotations that clients read, while the answer streams.

    scanner = CitationScanner(browser.cite)
    text, annotations = scanner.feed(piece)     ... for each piece; then scanner.finish()

The mark does not stay: it becomes a link in Markdown, `([example.com](https://example.com/a))`, as OpenAI's own answers
have it, so that the text reads well where annotations are not shown. `start_index` and `end_index` count characters
(code points) of the text that comes out, and span the link with its parentheses. What is no citation that can be
resolved - another cursor, brackets of another language - stays as the model wrote it.

An annotation:  {"type": "url_citation", "start_index", "end_index", "url", "title",
                 "cursor": 6, "lines": [9, 11] | null, "quote": "the cited text"}    the last three are ours

Read beside the trained form: `【6】`, `【 6†L9 】`, `【6†L9–11】`, `【6†L9-L11, 8†L3】`, `【6†L3,L9】` and
`【6†L9†example.org】`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

from ossia.tools.web.page import domain_of

Annotation = dict[str, Any]

_MAX_MARK_CHARS = 120
_MAX_QUOTE_CHARS = 1000


class Citation(NamedTuple):
    """What a cursor and lines lead to."""

    url: str
    title: str
    # None for the page as a whole.
    lines: tuple[int, int] | None = None
    quote: str = ""


Resolve = Callable[[int, tuple[int, int] | None], Citation | None]


class CitationScanner:
    """Reads the text of one answer."""

    def __init__(self, resolve: Resolve, *, keeps_marks: bool = False) -> None:
        """``resolve`` gives the source of a cursor and lines, or None; ``keeps_marks`` leaves the text as it is, and
        the annotations span the marks."""
        self._resolve = resolve
        self._keeps_marks = keeps_marks
        # A mark that is not complete.
        self._held = ""
        self._size = 0
        self._last = ""

    def feed(self, text: str) -> tuple[str, list[Annotation]]:
        """More of the answer: what of it may be shown, and the annotations that are in it."""
        text = self._held + text
        self._held = ""
        annotations: list[Annotation] = []
        out: list[str] = []
        at = 0
        while (begin := text.find("【", at)) >= 0:
            self._put(out, text[at:begin])
            match = _MARK.match(text, begin, begin + _MAX_MARK_CHARS)
            if match:
                self._cite(out, match[0], annotations)
                at = match.end()
            elif len(text) - begin < _MAX_MARK_CHARS and _MAY_BE_MARK.fullmatch(text, begin):
                self._held = text[begin:]
                at = len(text)
                break
            else:
                self._put(out, "【")
                at = begin + 1
        self._put(out, text[at:])
        return "".join(out), annotations

    def finish(self) -> tuple[str, list[Annotation]]:
        """The answer has ended: what was held back."""
        out: list[str] = []
        self._put(out, self._held)
        self._held = ""
        return "".join(out), []

    def _put(self, out: list[str], text: str) -> None:
        if text:
            out.append(text)
            self._size += len(text)
            self._last = text[-1]

    def _cite(self, out: list[str], mark: str, annotations: list[Annotation]) -> None:
        found = [(cursor, self._resolve(cursor, lines)) for cursor, lines in read_mark(mark)]
        cited = [(cursor, citation) for cursor, citation in found if citation is not None]
        if not cited:
            self._put(out, mark)
            return
        if self._keeps_marks:
            begin = self._size
            self._put(out, mark)
            annotations += [_annotation(begin, self._size, cursor, citation) for cursor, citation in cited]
            return
        links: dict[str, tuple[int, int]] = {}
        for cursor, citation in cited:
            # Two places of one page are one link, and two annotations.
            if citation.url not in links:
                if self._last and not self._last.isspace():
                    self._put(out, " ")
                begin = self._size
                self._put(out, _link(citation))
                links[citation.url] = (begin, self._size)
            annotations.append(_annotation(*links[citation.url], cursor, citation))


def annotate(text: str, resolve: Resolve, *, keeps_marks: bool = False) -> tuple[str, list[Annotation]]:
    """A whole answer at once."""
    scanner = CitationScanner(resolve, keeps_marks=keeps_marks)
    shown, annotations = scanner.feed(text)
    return shown + scanner.finish()[0], annotations


# Possessive and atomic throughout: a mark is read in one way or in none, whatever the model wrote.
_GAP = r"[^\S\n]*+"
_DASH = rf"{_GAP}[-–—‐‑−~]{_GAP}"
_NUMBERS = rf"\d{{1,7}}+(?:{_DASH}L?{_GAP}\d{{1,7}}+)?"
_ONE = (
    rf"\[?{_GAP}\d{{1,7}}+{_GAP}\]?{_GAP}(?:†{_GAP}(?:L?{_GAP}{_NUMBERS}|source|page)?{_GAP}(?:†[^†【】\n]{{0,80}}+)?)?"
)
_MARK = re.compile(
    rf"【{_GAP}(?>{_ONE})(?>{_GAP}[,;，、；]{_GAP}(?>{_ONE}|L{_GAP}{_NUMBERS}))*+{_GAP}】", re.IGNORECASE
)
# What may yet become a mark: it must begin with a number.
_MAY_BE_MARK = re.compile(r"【[^\S\n]*(?:\[?[^\S\n]*(?:\d[^【】\n]*)?)?")
_NUMBERED = re.compile(r"\[?\s*(\d+)\s*\]?\s*(?:†\s*([^†]*?)\s*(?:†.*)?)?", re.DOTALL)
_RANGE = re.compile(rf"L?\s*+(\d++)(?:{_DASH}L?\s*+(\d++))?", re.IGNORECASE)


def read_mark(mark: str) -> list[tuple[int, tuple[int, int] | None]]:
    """Cursors and lines of a mark; [] if it is none."""
    if not _MARK.fullmatch(mark):
        return []
    read: list[tuple[int, tuple[int, int] | None]] = []
    for part in re.split(r"[,;，、；]", mark[1:-1]):
        part = part.strip()
        # `6†L9, L11` goes on with the same page; `6†L9, 8†L3` and `6, 8` do not.
        if read and part[:1] in "Ll":
            read.append((read[-1][0], _range(part)))
        elif match := _NUMBERED.fullmatch(part):
            read.append((int(match[1]), _range(match[2] or "")))
    return read


def _range(text: str) -> tuple[int, int] | None:
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2] or first)
    return min(first, last), max(first, last)


def _annotation(begin: int, end: int, cursor: int, citation: Citation) -> Annotation:
    return {
        "type": "url_citation",
        "start_index": begin,
        "end_index": end,
        "url": citation.url,
        "title": citation.title,
        "cursor": cursor,
        "lines": None if citation.lines is None else list(citation.lines),
        "quote": citation.quote[:_MAX_QUOTE_CHARS],
    }


def _link(citation: Citation) -> str:
    # Nothing in a URL or a domain can end the link or begin another.
    url = quote(citation.url, safe="/%:@!$&'*+,;=~-._?#")
    domain = re.sub(r"[^\w.:-]", "", domain_of(citation.url)) or "source"
    return f"([{domain}]({url}))"
