"""The browser tool, as gpt-oss was trained with it: search, open, find; one stack of pages for one conversation.

    browser = Browser(backend)                      backend: `web.backend.open_backend("local:docs/")`, shared by all
    output = await browser.run("search", '{"query": "..."}')
    browser.state() -> JSON                         kept with the conversation: Browser(backend, state=...)
    browser.scanner()                               turns `【6†L9-L11】` of the answer into url_citation annotations

Every search, open, scroll and find pushes a view, and its number is the cursor. Whatever the model writes is answered
with a text, in the words that it was trained on where there are such; what a page says is only ever text.

`ToolOutput.details`: {"action": the action of a web_search_call: {type: search, query, queries, sources} |
{type: open_page, url} | {type: find_in_page, pattern, url}, "cursor": the view that was pushed or null,
"arguments": {...} as they were understood, "results": of a search [{title, url, text}], the text as it was shown}.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from ossia.config import Config
from ossia.errors import InputError, OssiaError
from ossia.harmony import Tokenizer, ToolNamespace
from ossia.tools.base import ToolOutput
from ossia.tools.web.backend import SOURCE_PREFIX, Backend, Scope
from ossia.tools.web.citations import Citation, CitationScanner
from ossia.tools.web.guard import Domains
from ossia.tools.web.page import (
    Page,
    clean,
    find_page,
    join_url,
    line_of_passage,
    merge_space,
    search_page,
    shorten,
    show,
)

_log = logging.getLogger(__name__)

_STATE_VERSION = 1
_MAX_SEARCH_RESULTS = 20
_MAX_VIEWS = 2000
_MAX_SEEN_URLS = 50_000
# What may be a URL in a user's words, with the words behind it: https://host/path, or host.name/path.
_URL_RUN = re.compile(
    r"(?:https?://|(?<![\w@/.-])(?=(?:[a-z0-9-]+\.)+[a-z]{2,}))[^\s<>\"'`【】\]]+", re.IGNORECASE | re.ASCII
)
# Where it may have ended before: at a mark or a letter of a script without spaces.
_URL_END = re.compile(r"(?<=[!-~])[^!-~]|[。，、；：！？）」』》…]")
_BEHIND_URL = tuple(".,;:!?)*_|~\"'»”’。，、；：！？）」』》…")
_MAX_HELD_CHARS = 8_000_000


@dataclass(frozen=True)
class BrowserRules:
    """What one conversation may do."""

    # Domains that may be searched and opened; a domain stands for those below it.
    domains: Domains = field(default_factory=Domains)
    # Whether only URLs may be opened that the user, a search or a page has named.
    seen_links_only: bool = False
    # Whether pages are left alone that robots.txt keeps from programs.
    obeys_robots: bool = True
    # Pages that may be fetched, and searches that may be made, together.
    max_requests: int = 100
    # Most bytes of the state that is kept; the oldest pages lose their text first.
    max_state_bytes: int = 2 << 20

    @classmethod
    def of(cls, settings: Config, allowed_domains: Iterable[str] = ()) -> BrowserRules:
        """Those of the settings, narrowed by the domains that a request allows."""
        domains = Domains.read(settings.browser_allow.split(","), settings.browser_block.split(","))
        return cls(
            domains.within(Domains.read(allowed_domains)),
            seen_links_only=settings.browser_links == "seen",
            obeys_robots=settings.browser_robots == "yes",
            max_requests=settings.browser_requests,
        )


class _UsageError(Exception):
    """What the model asked for cannot be; the text is for it."""


class _Json(_UsageError):
    """The same in the form of an object."""

    def __init__(self, error: str) -> None:
        super().__init__(json.dumps({"error": clean(error)}, ensure_ascii=False))


class _View(NamedTuple):
    """One entry of the stack: a page and the lines of it that were shown, the last not included."""

    page: int
    first: int
    end: int


class Browser:
    """The tool of one conversation. Calls come one after the other."""

    def __init__(
        self,
        backend: Backend,
        rules: BrowserRules | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """``state`` is what `state` gave. Raises InputError for one that it cannot have given."""
        self._backend = backend
        self._rules = rules or BrowserRules()
        self._scope = Scope(self._rules.domains, self._rules.obeys_robots)
        # Windows are counted as the model was trained, whatever vocabulary answers.
        self._tokenizer = tokenizer or Tokenizer.o200k_harmony()
        self._pages: list[Page] = []
        self._views: list[_View] = []
        self._num_requests = 0
        # Digests of URLs that may be opened, the latest last.
        self._seen: dict[str, None] = {}
        # By number of a page: the URL that was asked for, from which redirects may have led away.
        self._asked: dict[int, str] = {}
        if state is not None:
            self._restore(state)

    @property
    def namespace(self) -> ToolNamespace:
        return ToolNamespace.browser()

    async def run(self, name: str, arguments: str) -> ToolOutput:
        action: dict[str, Any] = {"type": "search", "query": "", "queries": [], "sources": []}
        read: dict[str, Any] = {}
        num_views = len(self._views)
        try:
            if name not in _ARGUMENTS:
                raise _Json(f"Unknown function: {shorten(name, 100)}")
            action = dict(_ACTIONS[name])
            read = _read_arguments(name, arguments)
            if num_views >= _MAX_VIEWS:
                raise _UsageError(f"This conversation has seen {_MAX_VIEWS} views, the most that it may.")
            text = await getattr(self, f"_{name}")(action, **read)
        except _UsageError as error:
            action.pop("results", None)
            return ToolOutput(str(error), True, {"action": action, "cursor": None, "arguments": read})
        # A fault of ours must not end the conversation.
        except Exception:
            _log.exception("browser function=%s failed", name)
            text = "The browser met an error of its own; go on without it."
            return ToolOutput(text, True, {"action": action, "cursor": None, "arguments": read})
        results = action.pop("results", [])
        details = {"action": action, "cursor": num_views, "arguments": read, "results": results}
        return ToolOutput(text, False, details)

    async def close(self) -> None:
        """Nothing is held: the back end belongs to whoever opened it."""

    def note_text(self, text: str) -> None:
        """What the user has said: the URLs in it may be opened where only seen ones may."""
        for match in _URL_RUN.finditer(text):
            run = match[0] if match[0].lower().startswith("http") and "://" in match[0] else f"https://{match[0]}"
            # The next URL may stand right behind the first.
            for one in [*re.split(r"(?<=.)(?=https?://)", run, flags=re.IGNORECASE), run]:
                # Few of each, or a long text would take its square.
                for end in (len(one), *(found.start() for found in islice(_URL_END.finditer(one), 8))):
                    url = one[:end]
                    self._note(_spellings(url))
                    for _ in range(8):
                        if url.endswith(_BEHIND_URL):
                            url = url[:-1]
                            self._note(_spellings(url))

    # Citations -------------------------------------------------------------------------------------------------------

    def scanner(self, *, keeps_marks: bool = False) -> CitationScanner:
        """For the text of one answer."""
        return CitationScanner(self.cite, keeps_marks=keeps_marks)

    def cite(self, cursor: int, lines: tuple[int, int] | None) -> Citation | None:
        """The source that a cursor and lines stand for; None if there is none. Lines beyond the page count for none."""
        if not 0 <= cursor < len(self._views):
            return None
        view = self._views[cursor]
        page = self._pages[view.page]
        num_lines = len(page.lines) if page.is_whole else max(page.kept_lines or (0,), default=0) + 1
        if lines is not None and lines[0] >= num_lines:
            lines = None
        if lines is not None:
            # As many as a quotation has room for.
            lines = lines[0], min(lines[1], num_lines - 1, lines[0] + 200)
        quote = page.quote(*lines) if lines is not None else ""
        if page.kind != "search":
            url = page.url.removeprefix(SOURCE_PREFIX)
            title = self._pages[page.of].title if page.kind == "find" and page.of >= 0 else page.title
            return Citation(url, title, lines, quote) if url else None
        # A search has no URL of its own; the line's result has.
        hit = bisect_right(page.targets, lines[0]) - 1 if lines is not None else -1
        if not 0 <= hit < min(len(page.links), len(page.titles)):
            return None
        return Citation(page.links[hit], page.titles[hit], lines, quote)

    # The three functions ---------------------------------------------------------------------------------------------

    async def _search(self, action: dict[str, Any], query: str, topn: int | None) -> str:
        action |= {"query": query, "queries": [query]}
        if not query.strip():
            raise _UsageError("Error during search for ``: the query is empty")
        num_hits = min(max(topn if topn is not None else 10, 1), _MAX_SEARCH_RESULTS)
        shown = shorten(merge_space(clean(query)))
        self._count_request(f"Error during search for `{shown}`")
        try:
            hits = await self._backend.search(query, num_hits, self._scope)
        except OssiaError as error:
            raise _UsageError(f"Error during search for `{shown}`: {_said(error)}") from None
        hits = [
            hit._replace(title=clean(hit.title), snippet=clean(hit.snippet), passage=clean(hit.passage))
            for hit in hits[:num_hits]
        ]
        action["sources"] = [{"type": "url", "url": hit.url} for hit in hits]
        action["results"] = [{"title": hit.title, "url": hit.url, "text": hit.snippet} for hit in hits]
        page = search_page(shorten(clean(query)), hits)
        return self._push(self._add(page), 0, -1)

    async def _open(
        self,
        action: dict[str, Any],
        id: int | str | None,
        cursor: int | None,
        loc: int | None,
        num_lines: int | None,
        view_source: bool,
    ) -> str:
        if isinstance(id, str):
            url = self._url(id, cursor)
            action["url"] = url
            number = await self._fetch(url, view_source)
            return self._push(number, self._begin(loc), num_lines)
        number = self._page_at(cursor)
        page = self._pages[number]
        if id is None:
            action["url"] = page.url
            if page.is_whole and not (view_source and page.kind != "source"):
                return self._push(number, self._begin(loc), num_lines)
            # Scrolling a page whose text is not kept any more, or asking for its source.
            if not page.url or page.kind == "find":
                reason = "has no source" if page.is_whole else "is not kept any more; search again"
                raise _UsageError(f"The page of cursor `{self._cursor(cursor)}` {reason}.")
            number = await self._fetch(page.url, view_source, may_be_known=True)
            return self._push(number, self._begin(loc), num_lines)
        if page.kind == "find" and id < len(page.targets) and page.of >= 0 and not view_source:
            # A match leads to its place.
            number, line = page.of, page.targets[id]
            action["url"] = page.url
            if not self._pages[number].is_whole:
                number = await self._fetch(page.url, False, may_be_known=True)
            line = min(line, len(self._pages[number].lines) - 1)
            return self._push(number, self._begin(loc, line), num_lines)
        if not 0 <= id < len(page.links):
            raise _UsageError(f"Invalid link id `{id}`.")
        url = page.links[id]
        action["url"] = url
        passage = page.passages[id] if id < len(page.passages) else ""
        number = await self._fetch(url, view_source, may_be_known=True)
        place = None
        if passage and loc is None:
            place = await asyncio.to_thread(line_of_passage, self._pages[number].lines, passage)
        return self._push(number, self._begin(loc, place), num_lines)

    async def _find(self, action: dict[str, Any], pattern: str, cursor: int | None) -> str:
        number = self._page_at(cursor)
        page = self._pages[number]
        action |= {"pattern": pattern, "url": page.url}
        if page.kind in ("search", "find"):
            raise _UsageError("Cannot run `find` on search results page or find results page")
        if not pattern.strip():
            raise _UsageError("`pattern` is empty; give the words to look for")
        if not page.is_whole:
            number = await self._fetch(page.url, False, may_be_known=True)
            page = self._pages[number]
        if len(pattern) > 1000:
            raise _UsageError(f"`pattern` has {len(pattern)} characters; look for fewer than 1000")
        return self._push(self._add(await asyncio.to_thread(find_page, page, number, pattern)), 0, -1)

    # Pages and views -------------------------------------------------------------------------------------------------

    def _cursor(self, cursor: int | None) -> int:
        if not self._views:
            raise _UsageError("No pages to access!")
        last = len(self._views) - 1
        if cursor is None or cursor == -1:
            return last
        if not 0 <= cursor <= last:
            raise _UsageError(f"Cursor `{cursor}` is out of range. Available cursor indices: [0 - {last}].")
        return cursor

    def _page_at(self, cursor: int | None) -> int:
        return self._views[self._cursor(cursor)].page

    def _begin(self, loc: int | None, line: int | None = None) -> int:
        """The first line of a view: what was asked for, else a little above the line that matters."""
        if loc is not None and loc >= 0:
            return loc
        if line is None:
            return 0
        return line - 4 if line > 4 else line

    def _add(self, page: Page) -> int:
        self._pages.append(page)
        self._note(page.links)
        self._make_room()
        return len(self._pages) - 1

    def _make_room(self) -> None:
        """Hold only so much text: of the first pages what was shown stays, and they are fetched again if need be."""
        num_chars = 0
        for number in range(len(self._pages) - 1, -1, -1):
            page = self._pages[number]
            num_chars += len(page.text)
            if num_chars > _MAX_HELD_CHARS and page.text and number < len(self._pages) - 2:
                self._pages[number] = _as_linked(page, [view for view in self._views if view.page == number])

    def _push(self, number: int, first: int, num_lines: int | None) -> str:
        page = self._pages[number]
        lines = page.lines
        if first >= len(lines):
            raise _UsageError(f"Invalid location parameter: `{first}`. Cannot exceed page maximum of {len(lines) - 1}.")
        end = lines.end_of_view(first, num_lines or -1, self._tokenizer)
        self._views.append(_View(number, first, end))
        return show(len(self._views) - 1, page, first, end)

    def _url(self, text: str, cursor: int | None) -> str:
        """The URL that the model means. Raises _UsageError for what is none."""
        text = text.strip()
        if len(text) > 8192:
            raise _UsageError(f"Error fetching URL `{shorten(clean(text))}`: it has {len(text)} characters")
        prefix = SOURCE_PREFIX if text.lower().startswith(SOURCE_PREFIX) else ""
        text = text[len(prefix) :]
        base = self._pages[self._page_at(cursor)].url.removeprefix(SOURCE_PREFIX) if self._views else ""
        try:
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(?!\d+(/|$))", text):
                return prefix + join_url("", text)
            if base.startswith("local:") or (base and text.startswith(("/", "./", "../", "?"))):
                return prefix + join_url(base, text)
        except ValueError as error:
            raise _UsageError(f"Error fetching URL `{shorten(clean(text))}`: {error}") from None
        if re.match(r"[^\s/?#@.]+(\.[^\s/?#@.]+)+\.?(:\d+)?([/?#]|$)", text):
            return f"{prefix}https://{text}"
        raise _UsageError(f"Error fetching URL `{shorten(clean(text))}`: it is neither a URL nor the id of a link")

    async def _fetch(self, url: str, view_source: bool, *, may_be_known: bool = False) -> int:
        """The number of the page at a URL, fetched unless it is known and may be."""
        is_source = view_source or url.startswith(SOURCE_PREFIX)
        url = url.removeprefix(SOURCE_PREFIX)
        kind, known_url = ("source", SOURCE_PREFIX + url) if is_source else ("page", url)
        if may_be_known:
            for number, page in enumerate(self._pages):
                if page.kind == kind and page.is_whole and known_url in (page.url, self._asked.get(number)):
                    return number
        shown = shorten(clean(url))
        if self._rules.seen_links_only and _digest(url) not in self._seen:
            raise _UsageError(
                f"Error fetching URL `{shown}`: only links of search results and pages that were opened, and URLs that "
                "the user gave, can be opened here"
            )
        self._count_request(f"Error fetching URL `{shown}`")
        try:
            page = await self._backend.fetch(url, self._scope, is_source=is_source)
        except OssiaError as error:
            raise _UsageError(f"Error fetching URL `{shown}`: {_said(error)}") from None
        # Wrapping a long text takes some tenths of a second.
        await asyncio.to_thread(getattr, page, "lines")
        number = self._add(page)
        self._asked[number] = known_url
        self._note((page.url,))
        return number

    def _count_request(self, what: str) -> None:
        limit = self._rules.max_requests
        if self._num_requests >= limit:
            raise _UsageError(f"{what}: this conversation has made {limit} requests, the most that it may; answer now")
        self._num_requests += 1

    def _note(self, urls: Iterable[str]) -> None:
        if self._rules.seen_links_only:
            for url in urls:
                if len(self._seen) >= _MAX_SEEN_URLS:
                    self._seen.pop(next(iter(self._seen)))
                self._seen[_digest(url)] = None

    # State -----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The conversation's pages and views as JSON values, no larger than the rules say.

        Where there is no room, the pages that were seen longest ago lose first the lines that were not shown (they are
        fetched again when the model scrolls there), then their links, then all but their URL and title, then those.
        """
        room = self._rules.max_state_bytes - 1000
        seen: list[str] = []
        for url in reversed(self._seen):
            size = _size(url) + 2
            if size > room - self._rules.max_state_bytes * 3 // 4:
                break
            seen.append(url)
            room -= size
        views = [list(view) for view in self._views]
        room -= _size(views)
        last_view = {view.page: i for i, view in enumerate(self._views)}
        views_of: dict[int, list[_View]] = {}
        for view in self._views:
            views_of.setdefault(view.page, []).append(view)
        latest_first = sorted(range(len(self._pages)), key=lambda number: -last_view.get(number, -1))
        kept = [Page(page.kind, "", "", "", of=page.of, kept_lines={}).to_dict() for page in self._pages]
        sizes = [_size(page) + 2 for page in kept]
        room -= sum(sizes)
        for level in (_as_named, _as_shown, _as_linked, _as_whole):
            for number in latest_first:
                page = level(self._pages[number], views_of.get(number, []))
                if page is None:
                    continue
                fields = page.to_dict()
                size = _size(fields) + 2
                if size - sizes[number] <= room:
                    room -= size - sizes[number]
                    kept[number], sizes[number] = fields, size
        return {
            "version": _STATE_VERSION,
            "requests": self._num_requests,
            "views": views,
            "pages": kept,
            "seen": seen[::-1],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            if state["version"] != _STATE_VERSION:
                raise ValueError(f"version {state['version']!r}, expected {_STATE_VERSION}")
            self._num_requests = int(state["requests"])
            self._pages = [Page.from_dict(page) for page in state["pages"]]
            self._views = [_View(*map(int, view)) for view in state["views"]]
            self._seen = dict.fromkeys(map(str, state["seen"]))
            if any(not 0 <= view.page < len(self._pages) for view in self._views):
                raise ValueError("a view of no page")
            if any(not -1 <= page.of < len(self._pages) for page in self._pages):
                raise ValueError("a search in no page")
            # Pages of a turn whose rules were wider have been seen too.
            for page in self._pages:
                self._note((page.url, *page.links))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"this is no state of a browser: {type(error).__name__}: {error}") from None


# What is kept of a page ----------------------------------------------------------------------------------------------


def _as_named(page: Page, views: list[_View]) -> Page:
    title = shorten(page.title, 300)
    return Page(page.kind, page.url, title, "", of=page.of, shown_url=page.shown_url, kept_lines={})


def _as_shown(page: Page, views: list[_View]) -> Page:
    if page.is_whole:
        lines = page.lines
        kept = {n: lines[n] + "\n" * lines.ends_paragraph(n) for view in views for n in range(view.first, view.end)}
    else:
        kept = dict(page.kept_lines or {})
    return replace(_as_named(page, views), kept_lines=kept)


def _as_linked(page: Page, views: list[_View]) -> Page:
    return replace(
        _as_shown(page, views), links=page.links, passages=page.passages, targets=page.targets, titles=page.titles
    )


def _as_whole(page: Page, views: list[_View]) -> Page | None:
    return page if page.is_whole else None


def _size(value: Any) -> int:
    return len(json.dumps(value))


# What the model wrote ------------------------------------------------------------------------------------------------

_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "search": ("query", "topn", "source"),
    "open": ("id", "cursor", "loc", "num_lines", "view_source", "source"),
    "find": ("pattern", "cursor"),
}
_ALIASES: Mapping[tuple[str, str], str] = {("search", "top_n"): "topn", ("open", "url"): "id", ("find", "source"): ""}
_REQUIRED = {"search": "query", "find": "pattern"}
_ACTIONS: Mapping[str, Mapping[str, Any]] = {
    "search": {"type": "search", "query": "", "queries": [], "sources": []},
    "open": {"type": "open_page", "url": ""},
    "find": {"type": "find_in_page", "pattern": "", "url": ""},
}
_MAX_NUMBER = 10**9
_MAX_QUERY_CHARS = 4000
_SURROGATE = re.compile("[\ud800-\udfff]")


def _read_arguments(name: str, text: str) -> dict[str, Any]:
    """The arguments of a call, in the types that the functions take. Raises _UsageError."""
    try:
        raw = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        raise _Json("Invalid function arguments") from None
    if not isinstance(raw, dict):
        raise _Json("Invalid function arguments")
    known = _ARGUMENTS[name]
    given: dict[str, Any] = {}
    for key, value in raw.items():
        meant: str = _ALIASES.get((name, key), key)
        if meant not in known and meant:
            raise _Json(
                f"Invalid function arguments: unknown argument `{shorten(key, 100)}`; "
                f"the arguments of {name} are: {', '.join(known)}"
            )
        if value is not None:
            given.setdefault(meant, _SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value)
    required = _REQUIRED.get(name)
    if required and required not in given:
        raise _Json(f"Invalid function arguments: `{required}` is missing")
    if name == "search":
        return {"query": _words("query", given["query"]), "topn": _integer("topn", given.get("topn"))}
    cursor = _integer("cursor", given.get("cursor"))
    if name == "find":
        return {"pattern": _words("pattern", given["pattern"]), "cursor": cursor}
    return {
        "id": _link_id(given.get("id")),
        "cursor": cursor,
        "loc": _integer("loc", given.get("loc")),
        "num_lines": _integer("num_lines", given.get("num_lines")),
        "view_source": _flag("view_source", given.get("view_source", False)),
    }


def _integer(name: str, value: Any) -> int | None:
    """A whole number, also as 3.0 or "3"."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,12}(\.0+)?\s*", value):
        number = int(float(value))
    elif isinstance(value, float) and value.is_integer() and math.isfinite(value):
        number = int(value)
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool):
        raise _UsageError(f"`{name}` should be an integer, not `{type(value).__name__}`")
    if abs(number) > _MAX_NUMBER:
        raise _UsageError(f"`{name}` should be an integer of at most {_MAX_NUMBER}")
    return number


def _link_id(value: Any) -> int | str | None:
    """The id of a link, a URL, or None for the page itself; "3" and "【3†words】" are ids too."""
    if isinstance(value, str):
        value = value.strip()
        if match := re.fullmatch(r"【?\s*(\d{1,9})(\.0+)?\s*(?:†[^†】]*)*】?", value):
            return int(match[1])
        return None if value in ("", "-1") else value
    if isinstance(value, float) and not value.is_integer():
        raise _UsageError(f"Invalid link id `{value}`.")
    number = _integer("id", value)
    if number is not None and number < -1:
        raise _UsageError(f"Invalid link id `{number}`.")
    return None if number == -1 else number


def _words(name: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _UsageError(f"`{name}` should be a string, not `{type(value).__name__}`")
    if len(value) > _MAX_QUERY_CHARS:
        raise _UsageError(f"`{name}` has {len(value)} characters; use fewer than {_MAX_QUERY_CHARS}")
    return value


def _flag(name: str, value: Any) -> bool:
    named = {"true": True, "false": False, "1": True, "0": False}.get(str(value).strip().lower())
    if named is None:
        raise _UsageError(f"`{name}` should be a boolean, not `{type(value).__name__}`")
    return named


def _spellings(url: str) -> Iterator[str]:
    """A URL as it stands, and as a model may write the same one."""
    yield url
    with suppress(ValueError):
        parts = urlsplit(url)
        plain = parts._replace(scheme=parts.scheme.lower(), netloc=parts.netloc.lower(), path=parts.path or "/")
        for one in (plain, plain._replace(fragment=""), plain._replace(path=parts.path)):
            yield one.geturl()
            yield quote(one.geturl(), safe="%/:?#[]@!$&'()*+,;=~")


def _digest(url: str) -> str:
    """A URL for comparison: its fragment does not count, nor the case of its host."""
    try:
        parts = urlsplit(url.removeprefix(SOURCE_PREFIX))
        url = urlunsplit((parts.scheme.lower(), parts.netloc.lower(), parts.path or "/", parts.query, ""))
    except ValueError:
        # It cannot be opened anyway.
        pass
    return hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=12).hexdigest()


def _said(error: OssiaError) -> str:
    return shorten(merge_space(clean(error.message)))
