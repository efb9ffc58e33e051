"""A page as the model was trained to see one: wrapped and numbered lines, numbered links, windows counted in tokens.

    L0:
    L1: URL: https://example.com/a
    L2: # A heading
    L4:   * 【0†a link to the same domain】 and 【1†one to another†example.org】

A text is wrapped at 80 characters. A window is 1024 tokens of o200k with the numbers of the lines counted in, rounded
up to a line. Nothing here parses what was fetched: `page_text` made these texts, and `clean` has been over them.

Source   the display that gpt-oss was trained with (openai/gpt-oss, its browser tool).
"""

from __future__ import annotations

import re
import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

from ossia.harmony import Tokenizer

WIDTH = 80
# Of a window that the model did not size itself, and of one that it did.
VIEW_TOKENS = 1024
MAX_VIEW_TOKENS = 8192

Kind = Literal["page", "search", "find", "source"]


class Hit(NamedTuple):
    """One result of a search."""

    url: str
    title: str
    # What the search page shows of it.
    snippet: str = ""
    # Words of the document at which to open it; the snippet where there is none.
    passage: str = ""


@dataclass(frozen=True)
class Page:
    """One page of a conversation; many views may show it."""

    kind: Kind
    # Where it is from: "" for a search, the searched page's URL for what was found on it.
    url: str
    title: str
    text: str
    # URL of each link id.
    links: tuple[str, ...] = ()
    # Of a search: the passage that each link leads to.
    passages: tuple[str, ...] = ()
    # The line of each link: of a search, where its result begins here; of what was found, where it stands on the page
    # that was looked through, whose place among the conversation's pages is `of`.
    targets: tuple[int, ...] = ()
    of: int = -1
    # What stands in the head of the view, where it is not the URL.
    shown_url: str = ""
    # Lines that were shown, by number, once the text itself is no longer kept.
    kept_lines: Mapping[int, str] | None = None
    # Of a search: the title of each result.
    titles: tuple[str, ...] = ()

    @cached_property
    def lines(self) -> Lines:
        """The text in lines; takes time for a long one."""
        return Lines(self.text)

    @property
    def is_whole(self) -> bool:
        return self.kept_lines is None

    def quote(self, first: int, last: int) -> str:
        """The text of some lines without the marks of links, for people."""
        if self.kept_lines is not None:
            return strip_links("".join(self.kept_lines.get(n, "") for n in range(first, last + 1))).strip()
        return "".join(
            self.lines.plain(n) + "\n" * self.lines.ends_paragraph(n) for n in range(first, last + 1)
        ).strip()

    def to_dict(self) -> dict[str, Any]:
        """JSON values without the fields that are empty."""
        fields: dict[str, Any] = {"kind": self.kind, "url": self.url, "title": self.title}
        if self.kept_lines is None:
            fields["text"] = self.text
        else:
            fields["kept_lines"] = {str(n): line for n, line in self.kept_lines.items()}
        for name in ("links", "passages", "targets", "titles"):
            if getattr(self, name):
                fields[name] = list(getattr(self, name))
        if self.of >= 0:
            fields["of"] = self.of
        if self.shown_url:
            fields["shown_url"] = self.shown_url
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Page:
        """Raises KeyError, TypeError or ValueError for what `to_dict` does not write."""
        kept = fields.get("kept_lines")
        if fields["kind"] not in ("page", "search", "find", "source"):
            raise ValueError(f"no kind of page: {fields['kind']!r}")
        return cls(
            fields["kind"],
            str(fields["url"]),
            str(fields["title"]),
            "" if kept is not None else str(fields["text"]),
            tuple(map(str, fields.get("links", ()))),
            tuple(map(str, fields.get("passages", ()))),
            tuple(map(int, fields.get("targets", ()))),
            int(fields.get("of", -1)),
            str(fields.get("shown_url", "")),
            None if kept is None else {int(n): str(line) for n, line in kept.items()},
            tuple(map(str, fields.get("titles", ()))),
        )


class Lines(Sequence[str]):
    """A text in wrapped lines, each a slice of it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._lines: list[str] = []
        self._starts: list[int] = []
        # Whether the line is the last of its paragraph in the text.
        self._is_last: list[bool] = []
        at = 0
        for line in text.split("\n"):
            pieces = [line] if len(line) <= WIDTH else _wrap(line)
            self._lines += pieces
            self._starts += accumulate(map(len, pieces[:-1]), initial=at)
            self._is_last += [False] * (len(pieces) - 1) + [True]
            at += len(line) + 1

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, at: Any) -> Any:
        return self._lines[at]

    def line_of(self, offset: int) -> int:
        """The line that holds a character of the text."""
        return bisect_right(self._starts, offset) - 1

    def ends_paragraph(self, line: int) -> bool:
        return self._is_last[line]

    def plain(self, line: int) -> str:
        """A line without the marks of its links, also of one that goes on from the line before."""
        begin = self._starts[line]
        return self._plain.slice(begin, begin + len(self._lines[line]))

    def numbered(self, first: int, end: int) -> str:
        return "\n".join(f"L{n}: {self._lines[n]}" for n in range(first, end))

    def end_of_view(self, first: int, num_lines: int, tokenizer: Tokenizer) -> int:
        """The line after the last that a window from ``first`` shows; ``num_lines`` of 0 or less fills a window."""
        if num_lines > 0:
            wanted = min(first + num_lines, len(self))
            return min(wanted, self._end_of_tokens(first, wanted, MAX_VIEW_TOKENS, tokenizer))
        return self._end_of_tokens(first, len(self), VIEW_TOKENS, tokenizer)

    def find(self, pattern: str, max_matches: int, num_shown: int) -> list[int]:
        """Lines in which a match begins, ``num_shown`` lines apart at least.

        Letter case and the kind and length of white space do not count, nor where lines were broken.
        """
        words = pattern.split()
        if not words:
            return []
        found: list[int] = []
        expression = re.compile(r"\s++".join(map(re.escape, words)), re.IGNORECASE)
        plain = self._plain
        for match in expression.finditer(plain.text):
            line = self.line_of(plain.origin(match.start()))
            if found and line < found[-1] + num_shown:
                continue
            found.append(line)
            if len(found) == max_matches:
                break
        return found

    @cached_property
    def _plain(self) -> _Plain:
        return _Plain(self.text)

    def _end_of_tokens(self, first: int, end: int, max_tokens: int, tokenizer: Tokenizer) -> int:
        # Tokens at the end of a cut text may be others than in the whole of it.
        margin = 16
        size = max(max_tokens // 8, 64)
        while True:
            upto = min(first + size, end)
            token_ids = tokenizer.encode(self.numbered(first, upto))
            if len(token_ids) > max_tokens + (margin if upto < end else 0):
                return min(first + tokenizer.decode_bytes(token_ids[:max_tokens]).count(b"\n") + 1, end)
            if upto == end:
                return end
            size *= 2


class _Plain:
    """A text without the marks of links, and where each of its characters stood."""

    def __init__(self, text: str) -> None:
        self._begins: list[int] = []
        self._origins: list[int] = []
        pieces = []
        size = 0
        for begin, end in _outside_marks(text):
            pieces.append(text[begin:end])
            self._begins.append(size)
            self._origins.append(begin)
            size += end - begin
        self.text = "".join(pieces)

    def origin(self, offset: int) -> int:
        """The place in the whole text of a character of the plain one."""
        piece = bisect_right(self._begins, offset) - 1
        return self._origins[piece] + offset - self._begins[piece]

    def slice(self, begin: int, end: int) -> str:
        """What is left of a slice of the whole text."""
        return self.text[self._place(begin) : self._place(end)]

    def _place(self, origin: int) -> int:
        piece = bisect_right(self._origins, origin) - 1
        if piece < 0:
            return 0
        size = (self._begins[piece + 1] if piece + 1 < len(self._begins) else len(self.text)) - self._begins[piece]
        return self._begins[piece] + min(origin - self._origins[piece], size)


# A whole link: its text is what stays. No other text of a page has these brackets.
_LINK = re.compile(r"【(\d+†)([^†】]*)((?:†[^†】]*)?】)")


def _outside_marks(text: str) -> Iterator[tuple[int, int]]:
    at = 0
    for match in _LINK.finditer(text):
        yield at, match.start()
        yield match.start(2), match.end(2)
        at = match.end()
    yield at, len(text)


def strip_links(text: str) -> str:
    """The text with links as their words alone."""
    return _LINK.sub(r"\2", text)


def link(link_id: int, text: str, domain: str = "") -> str:
    """A link as the model sees it; ``domain`` is left out for one of the page's own."""
    text = merge_space(text).replace("†", "‡")
    return f"【{link_id}†{text}†{domain}】" if domain else f"【{link_id}†{text}】"


def search_page(query: str, hits: Sequence[Hit]) -> Page:
    """The page that a search shows."""
    items = [
        f"  * {link(i, hit.title or hit.url, domain_of(hit.url))} {merge_space(hit.snippet)}".rstrip()
        for i, hit in enumerate(hits)
    ]
    head = "\nURL: \n# Search Results\n\n"
    text = head + ("\n".join(items) or "No results found.")
    lines = Lines(text)
    starts = list(accumulate((len(item) + 1 for item in items), initial=len(head)))[:-1]
    return Page(
        "search",
        "",
        merge_space(query),
        text,
        tuple(hit.url for hit in hits),
        tuple(hit.passage or hit.snippet for hit in hits),
        tuple(map(lines.line_of, starts)),
        titles=tuple(shorten(merge_space(hit.title or hit.url), 300) for hit in hits),
    )


def find_page(page: Page, of: int, pattern: str, max_matches: int = 50, num_shown: int = 4) -> Page:
    """The page that shows where ``pattern`` stands on ``page``, which is number ``of`` of the conversation."""
    lines = page.lines
    matches = lines.find(pattern, max_matches, num_shown)
    shown = [
        f"# 【{i}†match at L{n}】\n" + "\n".join(lines.plain(k) for k in range(n, min(n + num_shown, len(lines))))
        for i, n in enumerate(matches)
    ]
    pattern = merge_space(clean(pattern).lower())
    text = "\n\n".join(shown) or f"No `find` results for pattern: `{pattern}`"
    title = f"Find results for text: `{pattern}` in `{page.title}`"
    shown_url = f"{page.shown_url or page.url}/find?pattern={pattern}"
    return Page("find", page.url, title, text, (page.url,) * len(matches), (), tuple(matches), of, shown_url)


def line_of_passage(lines: Lines, passage: str) -> int | None:
    """The line at which a search's passage stands on its page; None where it is not found word for word."""
    fragments = [fragment.split() for fragment in re.split(r"\.\.\.|…|\[|\]|\n", strip_links(passage))]
    for words in sorted(fragments, key=len, reverse=True)[:5]:
        if len(words) < 3:
            break
        # A passage may have been shortened at both ends, within a word too.
        for part in (words[:12], words[1:9], words[len(words) // 2 :][:6]):
            found = lines.find(" ".join(part), 1, 1) if len(part) >= 3 else []
            if found:
                return found[0]
    return None


def show(cursor: int, page: Page, first: int, end: int) -> str:
    """The display of a view."""
    url = _shown(page.shown_url or page.url)
    title = shorten(merge_space(clean(page.title)), 300)
    head = f"{title} ({url})" if url else title
    return (
        f"[{cursor}] {head}\n**viewing lines [{first} - {end - 1}] of {len(page.lines) - 1}**\n\n"
        f"{page.lines.numbered(first, end)}"
    )


# Texts ---------------------------------------------------------------------------------------------------------------

# The brackets are links' alone. The rest cannot be seen: zero width, soft hyphen, directions, control characters. The
# joiners within words and emoji are kept, and so are tags in a flag.
_REPLACED = {ord("【"): "〖", ord("】"): "〗", ord("◼"): "◾", 0x2028: "\n", 0x2029: "\n", 0x85: "\n"}
_REMOVED = [0x200B, 0x2060, 0xFEFF, 0xAD, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x7F,
            *(n for n in range(0x20) if chr(n) not in "\n\t"), *range(0x80, 0xA0)]  # fmt: skip
_TABLE = dict.fromkeys(_REMOVED) | _REPLACED
_DIRTY = re.compile(f"[{re.escape(''.join(map(chr, _TABLE)))}\ud800-\udfff\U000e0000-\U000e007f]")
_LOOSE_TAGS = re.compile("(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Text of the world with nothing in it that looks like a mark of ours or cannot be seen."""
    if not _DIRTY.search(text):
        return text
    # Surrogates first: half a character cannot be encoded.
    return _LOOSE_TAGS.sub("", _SURROGATE.sub("\ufffd", text).translate(_TABLE))


def merge_space(text: str) -> str:
    return " ".join(text.split())


def shorten(text: str, max_chars: int = 1024) -> str:
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def domain_of(url: str) -> str:
    """Host and port as they are shown; "" where there is none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return ""


def join_url(base: str, reference: str) -> str:
    """A reference on a page as a whole URL. Raises ValueError for what is none."""
    reference = re.sub(r"[\t\r\n]", "", reference.strip()).replace(" ", "%20")
    # urljoin knows no scheme but the web's.
    if base.startswith("local:") and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", reference):
        return "local" + urljoin("http" + base.removeprefix("local"), reference).removeprefix("http")
    return urljoin(base, reference)


def _shown(url: str) -> str:
    """A URL for the head of a view: readable, unless what it hides would break the head."""
    readable = unquote(url)
    is_plain = clean(readable) == readable and not re.search(r"[\s†()\ufffd]", readable)
    return shorten(readable if is_plain else url)


_WRAPPER = textwrap.TextWrapper(width=WIDTH, replace_whitespace=False, drop_whitespace=False)
# textwrap takes the square of a word's length.
_LONG_WORD = re.compile(r"\S{2000}(?=\S)")


def _wrap(line: str) -> list[str]:
    pieces = []
    at = 0
    for match in _LONG_WORD.finditer(line):
        pieces.append(line[at : match.end()])
        at = match.end()
    pieces.append(line[at:])
    return [wrapped for piece in pieces for wrapped in _WRAPPER.wrap(piece)]
