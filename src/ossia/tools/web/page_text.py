"""What was fetched, as text in the trained form: HTML, Markdown, plain text, PDF.

No parser survives everything that a page can be, so this runs in the child of `parse_child` alone, under its limits.
Of HTML nothing is loaded and nothing is run: images, frames and refreshes become words that the model may act on.

    # heading   two levels: ##     * item    numbered: 1. item     > quotation
    a | b       rows of a table    four blanks before code, `code` within text, 2^{10}, x_{i}, [Image 0: what it shows]

Left out is what a reader would not see: scripts, styles, what is hidden.

Source   the page text that gpt-oss was trained with; WHATWG HTML for encodings.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import NamedTuple
from xml.etree import ElementTree

from lxml import etree  # type: ignore[import-untyped]

from ossia.tools.web.page import clean, domain_of, join_url, link, merge_space, shorten

# More than any context holds.
MAX_CHARS = 2_000_000
MAX_LINKS = 10_000
_MAX_URL_CHARS = 4096


class Rendered(NamedTuple):
    """A text in the trained form, without the line that names its URL."""

    title: str
    text: str
    links: tuple[str, ...] = ()


def render(kind: str, body: bytes, url: str, charset: str, deadline_s: float) -> Rendered:
    """``kind`` is "html", "markdown", "text" or "pdf"; a PDF is read until ``deadline_s`` from now.

    Raises ValueError for a document that cannot be read.
    """
    if kind == "pdf":
        return _render_pdf(body, time.monotonic() + deadline_s)
    text = decode(body, charset, is_html=kind == "html")
    if kind == "html":
        return _cut(_Renderer(url).render(text))
    text = clean(text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.rstrip().expandtabs() for line in text.split("\n")).strip("\n")
    return _cut(Rendered(_markdown_title(text) if kind == "markdown" else "", text))


def _cut(rendered: Rendered) -> Rendered:
    if len(rendered.text) <= MAX_CHARS:
        return rendered
    end = rendered.text.rfind("\n", 0, MAX_CHARS) + 1 or MAX_CHARS
    return rendered._replace(text=rendered.text[:end] + "\n[The page goes on; it was cut here.]")


# Encodings -----------------------------------------------------------------------------------------------------------

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# Python's names of those that the web has; Python knows others, which are no encodings of text at all.
_ENCODINGS = frozenset({
    "utf-8", "utf-16", "utf-16-le", "utf-16-be", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255",
    "cp1256", "cp1257", "cp1258", "cp874", "cp866", "cp932", "cp949", "cp950", "iso8859-2", "iso8859-3",
    "iso8859-4", "iso8859-5", "iso8859-6", "iso8859-7", "iso8859-8", "iso8859-10", "iso8859-13", "iso8859-14",
    "iso8859-15", "iso8859-16", "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "gb2312", "gbk", "gb18030",
    "big5", "big5hkscs", "euc_jp", "shift_jis", "iso2022_jp", "euc_kr", "tis-620",
})  # fmt: skip
# What browsers take these names for.
_WIDER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932",
    "euc_kr": "cp949", "big5": "big5hkscs", "iso8859-9": "cp1254", "utf-16": "utf-16-le", "tis-620": "cp874",
}  # fmt: skip
_META = re.compile(rb"<meta[^>]{0,500}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)
_XML = re.compile(rb"\A\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9_:.-]{1,40})")


def decode(body: bytes, charset: str, *, is_html: bool = False) -> str:
    """Text of bytes: a byte order mark, else what the server says, else what the document says, else UTF-8 if it is
    that, else Windows-1252."""
    for mark, name in _BOMS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    if encoding := _encoding(charset):
        return body.decode(encoding, "replace")
    if is_html and (match := _XML.search(body[:1024]) or _META.search(body[:4096])):
        encoding = _encoding(match[1].decode("ascii"))
        # The name could not have been read if it were true.
        if encoding and not encoding.startswith("utf-16"):
            return body.decode(encoding, "replace")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        # A body that was cut may end within a character.
        is_cut = error.reason == "unexpected end of data" and not body[: error.start].isascii()
        return body.decode("utf-8" if is_cut else "cp1252", "replace")


def _encoding(name: str) -> str | None:
    try:
        found = codecs.lookup(name.strip()).name if name.strip() else ""
    except (LookupError, ValueError):
        return None
    found = _WIDER.get(found, found)
    return found if found in _ENCODINGS else None


# HTML ----------------------------------------------------------------------------------------------------------------

_SKIPPED = frozenset({
    "head", "script", "style", "template", "svg", "canvas", "audio", "video", "object", "select",
    "datalist", "textarea", "applet", "map", "noframes", "title",
})  # fmt: skip
# Blocks with an empty line before and after.
_APART = frozenset({
    "p", "div", "section", "article", "main", "header", "footer", "nav", "aside", "figure", "figcaption",
    "form", "fieldset", "address", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table",
    "center", "details", "dialog", "hgroup", "search",
})  # fmt: skip
# Blocks on lines of their own.
_BLOCKS = _APART | frozenset({
    "li", "dt", "dd", "tr", "td", "th", "summary", "legend", "ul", "ol", "menu", "caption", "thead", "tbody",
    "tfoot", "option", "hr",
})  # fmt: skip
_HEADINGS = {f"h{n}": "#" * n + " " for n in range(1, 7)}
_CODE = frozenset(("code", "kbd", "samp", "tt"))
_SPACE = re.compile(r"[ \t\n\r\f\v\xa0]+")
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_REFRESH = re.compile(r"^\s*[\d.]+\s*[;,]\s*url\s*=\s*[\"']?([^\"']+)", re.IGNORECASE)
_SCRIPT_TEXT = re.compile(r"[\w+−-]{1,20}")
# A line break within a block; no text has this character.
_BREAK = "\0"
_MAX_INDENT = 12
_MAX_LINK_CHARS = 1000
_MAX_COLUMNS = 50


class _Table:
    """A table that is open."""

    def __init__(self, is_layout: bool) -> None:
        # Tables that only arrange blocks are read as blocks.
        self.is_layout = is_layout
        self.row: list[str] = []
        self.num_rows = 0
        self.is_head = True
        self.num_empty = 0


class _Renderer:
    """One walk over a document, without recursion."""

    def __init__(self, url: str) -> None:
        self._url = self._base = url
        self._domain = domain_of(url)
        self._links: list[str] = []
        self._id_of: dict[str, int] = {}
        self._num_url_chars = 0
        self._num_images = 0
        # Finished lines.
        self._out: list[str] = []
        # The inline text of the block that is open.
        self._buffer: list[str] = []
        self._wants_empty_line = False
        self._heading = ""
        self._num_quotes = self._num_quotes_before = 0
        # Open lists: the number of the next item, None for bullets.
        self._lists: list[int | None] = []
        self._marker: str | None = None
        self._is_item_first = True
        self._tables: list[_Table] = []
        self._num_pre = 0
        # The open link: its URL, and where its text begins (-1: only its first words are linked). Then, where other
        # inline marks and cells begin.
        self._anchors: list[tuple[ElementTree.Element, str, int]] = []
        self._starts: list[int] = []

    def render(self, html: str) -> Rendered:
        root, is_whole = _parse(html)
        self._read_base(root)
        title = self._title(root)
        self._refresh(root)
        if root.text:
            self._text(root.text)
        # Elements that are open, and what is left of their children.
        stack = [(root, iter(root))]
        while stack:
            parent, children = stack[-1]
            element = next(children, None)
            if element is None:
                stack.pop()
                if parent is root:
                    break
                self._end(parent, parent.tag)
                element = parent
            elif not self._is_skipped(element, element.tag):
                self._start(element, element.tag)
                if element.text:
                    self._text(element.text)
                stack.append((element, iter(element)))
                continue
            if element.tail:
                self._text(element.tail)
        self._flush()
        if not is_whole:
            self._out += ["", "[The page may go on; it could not be read to its end.]"]
        return Rendered(title, "\n".join(self._out).strip("\n"), tuple(self._links))

    # Of the document as a whole --------------------------------------------------------------------------------------

    def _read_base(self, root: ElementTree.Element) -> None:
        base = root.find(".//base[@href]")
        if base is not None:
            try:
                joined = join_url(self._url, base.get("href") or "")
                if joined.startswith(("http://", "https://")):
                    self._base = joined
            except ValueError:
                pass

    def _title(self, root: ElementTree.Element) -> str:
        for path in (".//title", ".//h1"):
            element = root.find(path)
            if element is not None and (title := merge_space(clean(_words(element)))):
                return shorten(title, 300)
        return ""

    def _refresh(self, root: ElementTree.Element) -> None:
        """A page that would lead on by itself says so, and waits."""
        for meta in root.iterfind(".//meta[@http-equiv]"):
            match = _REFRESH.match(meta.get("content", ""))
            if meta.get("http-equiv", "").strip().lower() == "refresh" and match:
                target = match[1].strip()
                self._buffer.append(f"[This page leads on to {self._linked(target, clean(target))}]")
                self._flush()
                self._wants_empty_line = True
                return

    # Elements --------------------------------------------------------------------------------------------------------

    def _is_skipped(self, element: ElementTree.Element, tag: str) -> bool:
        if tag in _SKIPPED or element.get("hidden") is not None or _HIDDEN.search(element.get("style") or ""):
            return True
        if tag == "math":
            self._math(element)
            return True
        if tag in ("frame", "iframe"):
            title = element.get("title") or (element.get("name") if tag == "frame" else "") or ""
            if (source := element.get("src")) and (tag == "frame" or title):
                self._block(tag)
                self._buffer.append(f"[Frame: {self._linked(source, clean(title or 'frame'))}]")
                self._flush()
            return True
        return tag == "span" and "katex-html" in (element.get("class") or "")

    def _start(self, element: ElementTree.Element, tag: str) -> None:
        if tag in _BLOCKS:
            self._start_block(element, tag)
        elif tag == "a":
            href = element.get("href")
            if href is not None and not self._anchors:
                self._anchors.append((element, href, -1 if _is_long(element) else len(self._buffer)))
        elif tag == "br":
            self._buffer.append("\n" if self._num_pre else " " if self._is_inline() else _BREAK)
        elif tag == "img":
            self._image(element)
        elif tag in ("sup", "sub") or (tag in _CODE and not self._num_pre):
            self._starts.append(len(self._buffer))

    def _end(self, element: ElementTree.Element, tag: str) -> None:
        if tag in _BLOCKS:
            self._end_block(element, tag)
        elif tag == "a":
            if self._anchors and self._anchors[-1][0] is element:
                _, href, start = self._anchors.pop()
                if start >= 0:
                    self._end_link(href, start)
        elif tag in ("sup", "sub"):
            inner = self._taken(self._starts.pop())
            is_short = _SCRIPT_TEXT.fullmatch(inner.strip()) is not None
            sign = "^" if tag == "sup" else "_"
            self._buffer.append(f"{sign}{{{inner.strip()}}}" if is_short else inner)
        elif tag in _CODE and not self._num_pre:
            inner = self._taken(self._starts.pop())
            self._buffer.append(f"`{inner.strip()}`" if inner.strip() and "【" not in inner else inner)

    def _taken(self, start: int) -> str:
        """What the buffer has got since ``start``; nothing if a block has ended since."""
        if start > len(self._buffer):
            return ""
        inner = "".join(self._buffer[start:])
        del self._buffer[start:]
        return inner

    def _end_link(self, href: str, start: int) -> None:
        inner = self._taken(start)
        words = _SPACE.sub(" ", inner.replace(_BREAK, " ")) if not self._num_pre else inner
        if not words.strip():
            self._buffer.append(inner)
            return
        # White space at the ends belongs to what is around the link.
        before = " " if words[0].isspace() else ""
        after = " " if words[-1].isspace() else ""
        self._buffer.append(before + self._linked(href, words) + after)

    def _linked(self, href: str, words: str) -> str:
        """The words as a link, or as they are where nothing can be opened."""
        words = words.strip()
        if href.lstrip().startswith("#"):
            return words
        try:
            url = join_url(self._base, href)
        except ValueError:
            return words
        domain = domain_of(url)
        is_openable = url.startswith(("http://", "https://")) or (
            url.startswith("local://") and self._url.startswith("local://")
        )
        if not is_openable or not domain or len(url) > _MAX_URL_CHARS or clean(url) != url:
            return words
        link_id = self._id_of.get(url)
        if link_id is None:
            self._num_url_chars += len(url)
            if len(self._links) >= MAX_LINKS or self._num_url_chars > MAX_CHARS:
                return words
            link_id = self._id_of[url] = len(self._links)
            self._links.append(url)
        # A link within a link would be two brackets deep.
        words = words.replace("【", "〖").replace("】", "〗")
        return link(link_id, words, "" if domain == self._domain else clean(domain).replace("†", "‡"))

    def _image(self, element: ElementTree.Element) -> None:
        name = merge_space(clean(element.get("alt") or element.get("title") or ""))
        if name:
            self._buffer.append(f"[Image {self._num_images}: {name}]")
            self._num_images += 1

    def _math(self, element: ElementTree.Element) -> None:
        formula = element.get("alttext") or ""
        if not formula:
            notes = element.iter("annotation")
            formula = next((note.text or "" for note in notes if "tex" in (note.get("encoding") or "")), "")
        self._buffer.append(clean(formula or _words(element)))

    # Blocks ----------------------------------------------------------------------------------------------------------

    def _is_inline(self) -> bool:
        """Whether blocks do not count: within a link, or in a cell of a table."""
        return bool(self._anchors and self._anchors[-1][2] >= 0) or self._in_cells()

    def _in_cells(self) -> bool:
        return bool(self._tables) and not self._tables[-1].is_layout

    def _block(self, tag: str) -> None:
        """Before and after a block."""
        if self._is_inline():
            self._buffer.append(" ")
            return
        self._flush()
        # An item's first paragraph stands beside its mark.
        if tag in _APART and not (self._marker is not None and self._lists):
            self._wants_empty_line = True

    def _start_block(self, element: ElementTree.Element, tag: str) -> None:
        table = self._tables[-1] if self._tables else None
        if tag == "table":
            self._block(tag)
            self._tables.append(_Table(_is_layout(element) or self._is_inline()))
        elif tag in ("td", "th") and table and not table.is_layout:
            table.num_empty = _colspan(element) - 1
            table.is_head = table.is_head and tag == "th"
            self._starts.append(len(self._buffer))
        elif tag in ("ul", "ol", "menu"):
            self._block("p" if not self._lists else tag)
            start = element.get("start") or ""
            first = int(start) if re.fullmatch(r"-?\d{1,6}", start) else 1
            self._lists.append(first if tag == "ol" else None)
            self._is_item_first = True
        elif tag == "li":
            self._block(tag)
            if not self._is_inline():
                self._wants_empty_line = self._wants_empty_line and self._is_item_first and len(self._lists) <= 1
                number = self._lists[-1] if self._lists else None
                self._marker = "* " if number is None else f"{number}. "
                self._is_item_first = False
            if self._lists and self._lists[-1] is not None:
                self._lists[-1] += 1
        elif tag == "hr":
            self._block("p")
            if not self._is_inline():
                self._buffer.append("* * *")
                self._block("p")
        else:
            self._block(tag)
            if tag == "blockquote":
                self._num_quotes += 1
            elif tag == "pre":
                self._num_pre += 1
            elif tag in _HEADINGS and not self._is_inline():
                self._heading = _HEADINGS[tag]

    def _end_block(self, element: ElementTree.Element, tag: str) -> None:
        table = self._tables[-1] if self._tables else None
        if tag == "table":
            if table:
                self._end_row(table)
                self._tables.pop()
            self._block(tag)
        elif tag in ("td", "th") and table and not table.is_layout:
            cell = merge_space(self._taken(self._starts.pop()).replace(_BREAK, " "))
            if len(table.row) < _MAX_COLUMNS:
                table.row += [cell] + [""] * table.num_empty
        elif tag in ("tr", "caption") and table and not table.is_layout:
            self._end_row(table)
        elif tag in ("ul", "ol", "menu"):
            self._block(tag)
            if self._lists:
                self._lists.pop()
            self._marker = None
            if not self._lists:
                self._block("p")
        else:
            self._block(tag)
            if tag == "blockquote":
                self._num_quotes -= 1
            elif tag == "pre":
                self._num_pre -= 1
            elif tag == "li":
                self._marker = None
            elif tag in _HEADINGS:
                self._heading = ""

    def _end_row(self, table: _Table) -> None:
        """Write the row that is open, and what stands in the table beside its cells."""
        if table.is_layout:
            return
        if not self._has_outer_text():
            rest = merge_space("".join(self._buffer).replace(_BREAK, " "))
            # White space between cells too: each row would go through that of all rows before it.
            self._buffer.clear()
            if rest:
                self._write([rest])
        if any(table.row):
            self._write([" | ".join(table.row)])
            if table.num_rows == 0 and table.is_head and len(table.row) > 1:
                self._write(["|".join(["---"] * len(table.row))])
            table.num_rows += 1
        table.row = []
        table.is_head = True

    def _has_outer_text(self) -> bool:
        return bool(self._starts or self._anchors)

    def _text(self, text: str) -> None:
        text = clean(text)
        if text:
            self._buffer.append(text)
            if self._anchors and self._anchors[-1][2] < 0 and not text.isspace():
                # The first words of a link around half a page; the rest of it is text.
                _, href, _ = self._anchors.pop()
                self._buffer[-1] = self._linked(href, _SPACE.sub(" ", text)) + (" " if text[-1].isspace() else "")

    def _flush(self) -> None:
        """The open block's text becomes lines."""
        text = "".join(self._buffer)
        self._buffer.clear()
        if self._num_pre:
            lines = text.replace(_BREAK, "\n").replace("\r", "").expandtabs().split("\n")
            while lines and not lines[0].strip():
                lines.pop(0)
            while lines and not lines[-1].strip():
                lines.pop()
            self._write([f"    {line}".rstrip() for line in lines])
            return
        lines = [_SPACE.sub(" ", line).strip() for line in text.split(_BREAK)]
        while lines and not lines[-1]:
            lines.pop()
        lines = lines[next((i for i, line in enumerate(lines) if line), len(lines)) :]
        if lines and self._heading:
            lines[0] = self._heading + lines[0]
        self._write(lines)

    def _write(self, lines: list[str]) -> None:
        if not lines:
            return
        if self._wants_empty_line and self._out and self._out[-1]:
            num_common = min(self._num_quotes, self._num_quotes_before, _MAX_INDENT)
            self._out.append(("> " * num_common).rstrip())
        self._wants_empty_line = False
        self._num_quotes_before = self._num_quotes
        quote = "> " * min(self._num_quotes, _MAX_INDENT)
        indent = "  " * min(len(self._lists), _MAX_INDENT)
        for line in lines:
            is_item = self._marker is not None
            mark = self._marker if is_item else "  " if self._lists else ""
            is_bare = not line and not is_item
            self._out.append(quote.rstrip() if is_bare else f"{quote}{indent}{mark}{line}")
            self._marker = None


def _parse(html: str) -> tuple[ElementTree.Element, bool]:
    """The root of the tree, and whether the parser came to the document's end.

    It stops without a word where memory ends, so a mark is set behind the document. A comment or script that is never
    closed swallows it too.
    """
    mark = f"x-{secrets.token_hex(8)}"
    # The parser is told the encoding; what the document says of its own is about bytes that are gone.
    data = html.replace("\0", "").encode("utf-8", "replace")
    target = _Tree(mark)
    parser = etree.HTMLParser(
        encoding="utf-8", huge_tree=True, no_network=True, remove_comments=True, remove_pis=True, target=target
    )
    etree.fromstring(b"%b<%b>" % (data, mark.encode()), parser)
    return target.close(), target.is_whole


class _Tree:
    """Builds the tree from the parser's events: lxml's own ends at the 2048th level, and at the first `</html>`."""

    def __init__(self, mark: str) -> None:
        self.is_whole = False
        self._mark = mark
        builder = ElementTree.TreeBuilder()
        builder.start("html", {})
        self._builder = builder
        self.data = builder.data
        self._root: ElementTree.Element | None = None

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if tag == self._mark:
            self.is_whole = True
        if tag not in ("html", "body"):
            self._builder.start(tag, dict(attributes))

    def end(self, tag: str) -> None:
        if tag not in ("html", "body"):
            self._builder.end(tag)

    def close(self) -> ElementTree.Element:
        if self._root is None:
            self._builder.end("html")
            self._root = self._builder.close()
        return self._root


def _words(element: ElementTree.Element) -> str:
    return " ".join(element.itertext())


def _is_long(element: ElementTree.Element) -> bool:
    """Whether a link has so much in it that it cannot be meant."""
    size = 0
    for text in element.itertext():
        size += len(text)
        if size > _MAX_LINK_CHARS:
            return True
    return False


def _is_layout(table: ElementTree.Element) -> bool:
    """Whether a table arranges blocks rather than data: it holds another, is one column wide, or has long cells."""
    if table.get("role") == "presentation":
        return True
    num_rows = num_cells = 0
    for element in table.iter():
        tag = element.tag
        if element is table:
            continue
        if tag in ("table", "h1", "h2", "h3", "pre", "form"):
            return True
        if tag == "tr":
            num_rows += 1
        elif tag in ("td", "th"):
            num_cells += 1
        if num_rows > 3:
            break
    return num_cells <= num_rows


def _colspan(element: ElementTree.Element) -> int:
    value = element.get("colspan") or "1"
    return min(int(value), _MAX_COLUMNS) if re.fullmatch(r"[1-9]\d{0,4}", value) else 1


# Markdown and PDF ----------------------------------------------------------------------------------------------------


def _markdown_title(text: str) -> str:
    match = re.search(r"^#{1,2}[ \t]+(.{1,300})$", text[:20_000], re.MULTILINE)
    return merge_space(match[1].rstrip("# ")) if match else ""


def _render_pdf(body: bytes, until: float) -> Rendered:
    import pypdf
    from pypdf.errors import PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(body), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("the PDF is locked by a password")
        pages: list[str] = []
        size = 0
        for number, page in enumerate(reader.pages, 1):
            if time.monotonic() > until or size > MAX_CHARS:
                pages.append(f"[The document goes on; it was read up to page {number - 1} of {len(reader.pages)}.]")
                break
            text = clean(page.extract_text())
            text = "\n".join(line.rstrip().expandtabs() for line in text.split("\n")).strip("\n")
            pages.append(f"[Page {number}]\n\n{text}" if text else f"[Page {number} has no text]")
            size += len(text)
        info = reader.metadata
        title = merge_space(clean(str(info.title or ""))) if info else ""
    except ValueError:
        raise
    # pypdf lets what a damaged file provokes pass through: any of these is a damaged file.
    except (PyPdfError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, OSError) as error:
        raise ValueError(f"the PDF is damaged: {type(error).__name__}") from None
    return Rendered(shorten(title, 300), "\n\n".join(pages))
