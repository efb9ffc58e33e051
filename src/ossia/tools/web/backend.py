"""What searches and fetches for the browser tool, behind one small protocol, chosen by a name.

    local:FOLDER    files of a folder, indexed on disk; reaches no network
    searxng:URL     a SearXNG of one's own; pages are fetched from here
    brave           Brave's index; pages are fetched from here
    exa, youcom, tavily    search and pages from the service, so that nothing else is connected to

A back end is shared by all conversations and keeps nothing of them. What a conversation may do is its `Scope`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ossia.config import Config
from ossia.errors import ConfigError, OssiaError
from ossia.tools.web.fetch import AGENT, Fetched, Fetcher, FetchError, FetchLimits
from ossia.tools.web.guard import Domains, RefusedError, Url
from ossia.tools.web.page import Hit, Page, clean, domain_of, merge_space
from ossia.tools.web.parse_child import ParseError, Parser

SOURCE_PREFIX = "view-source:"
_MAX_ROBOTS = 50
_ROBOTS_LIMITS = FetchLimits(total_s=8.0, max_bytes=500 << 10)


@dataclass
class Scope:
    """What one conversation may reach, and what it has learned of robots.txt."""

    domains: Domains = field(default_factory=Domains)
    obeys_robots: bool = True
    # By origin: the text of robots.txt, or why nothing may be fetched.
    robots: dict[str, bytes | str] = field(default_factory=dict)


class Backend(Protocol):
    """A source of hits and pages. Failures are OssiaErrors whose message may be told to the model."""

    @property
    def name(self) -> str:
        """What a setting calls it."""

    async def search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        """At most ``num_hits`` results, best first, texts of the world not yet cleaned."""

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        """The page at a URL, or its source text."""

    def describe(self) -> dict[str, Any]:
        """For those who ask after the state of this machine: JSON values, without secrets, without the network."""

    def close(self) -> None:
        """Free what it holds. More than once is harmless."""


class Web:
    """Pages from the network: robots.txt, the guarded fetcher, and the child that parses."""

    def __init__(self, fetcher: Fetcher, parser: Parser) -> None:
        self._fetcher = fetcher
        self._parser = parser

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        async def ask_robots(hop: Url) -> None:
            if scope.obeys_robots:
                await self._check_robots(str(hop), hop.origin, scope)

        fetched = await self._fetcher.get(url, scope.domains, before=ask_robots)
        if fetched.status >= 400 or fetched.status < 200:
            raise FetchError(f"the server answered with status {fetched.status}{_STATUS.get(fetched.status, '')}")
        kind = document_kind(fetched)
        if fetched.is_cut and kind == "pdf":
            raise FetchError(f"the PDF is larger than {len(fetched.body)} bytes")
        page = await make_page(self._parser, kind, fetched.body, fetched.url, fetched.charset, is_source=is_source)
        if fetched.is_cut:
            return Page(
                page.kind, page.url, page.title, f"{page.text}\n[The page goes on; it was cut here.]", page.links
            )
        return page

    async def _check_robots(self, url: str, origin: str, scope: Scope) -> None:
        rules = scope.robots.get(origin)
        if rules is None:
            rules = await self._read_robots(origin, scope)
            if len(scope.robots) >= _MAX_ROBOTS:
                scope.robots.pop(next(iter(scope.robots)))
            scope.robots[origin] = rules
        if isinstance(rules, str):
            raise RefusedError(rules)
        try:
            may = not rules.strip() or await self._parser.may_fetch(rules, url, AGENT)
        except ParseError as error:
            raise RefusedError(f"robots.txt of {origin} cannot be read: {error.message}") from None
        if not may:
            raise RefusedError(f"robots.txt of {origin} does not allow this page to be fetched by programs")

    async def _read_robots(self, origin: str, scope: Scope) -> bytes | str:
        """Source: RFC 9309, 2.3.1: absent allows all, out of order allows nothing."""
        fetched = await self._fetcher.get(f"{origin}/robots.txt", scope.domains, _ROBOTS_LIMITS)
        if fetched.status >= 500:
            return f"robots.txt of {origin} cannot be read (status {fetched.status}), so its pages are not fetched"
        return fetched.body if fetched.status == 200 else b""


_STATUS = {
    401: " (it asks for a login)",
    402: " (it asks for a payment)",
    403: " (it does not let us in)",
    404: " (there is no such page)",
    410: " (the page is gone)",
    429: " (it has had too many requests)",
    451: " (for legal reasons)",
}

_TEXT_TYPES = re.compile(
    r"text/[a-z0-9.+-]+|application/([a-z0-9.-]+\+)?(json|xml|yaml)|application/(javascript|x-yaml|toml|x-sh|ld\+json)"
)


def document_kind(fetched: Fetched) -> str:
    """How a document is read. Raises FetchError for what cannot be shown as text."""
    kind, body = fetched.content_type, fetched.body
    if body.startswith(b"%PDF-"):
        return "pdf"
    if kind in ("text/html", "application/xhtml+xml"):
        return "html"
    if kind in ("text/markdown", "text/x-markdown"):
        return "markdown"
    if kind == "application/pdf":
        raise FetchError("the server says that this is a PDF, and it is none")
    if _TEXT_TYPES.fullmatch(kind):
        return "text"
    if kind:
        raise FetchError(f"a document of type {clean(kind)[:80]!r} cannot be shown as text")
    start = body[:1024].lstrip().lower()
    if re.match(rb"<(!doctype html|!--|[a-z][a-z0-9]*[\s>])", start):
        return "html"
    if b"\0" in start:
        raise FetchError("a document without a type cannot be shown as text")
    return "text"


async def make_page(
    parser: Parser, kind: str, body: bytes, url: str, charset: str = "", *, title: str = "", is_source: bool = False
) -> Page:
    """A document as a page. Raises ParseError."""
    if is_source and kind != "pdf":
        source = f"{SOURCE_PREFIX}{url}"
        rendered = await parser.render_async("text", body, url, charset)
        return Page("source", source, source, f"\nURL: {source}\n{rendered.text}")
    rendered = await parser.render_async(kind, body, url, charset)
    title = merge_space(clean(title)) or rendered.title or domain_of(url)
    return Page("page", url, title, f"\nURL: {url}\n{rendered.text}", rendered.links)


# Which one -----------------------------------------------------------------------------------------------------------


def open_backend(
    spec: str,
    *,
    key: str = "",
    index_folder: Path | None = None,
    fetcher: Fetcher | None = None,
    parser: Parser | None = None,
    progress: Callable[[Any], None] | None = None,
) -> Backend:
    """The back end that a setting names. Raises ConfigError naming what is wrong with it.

    ``key`` is that of the service; ``index_folder`` is where indexes of local files are kept; ``progress`` is told of
    each file that is indexed.
    """
    from ossia.tools.web import local_index, search_api

    kind, _, rest = spec.partition(":")
    if kind == "local":
        if not rest:
            raise ConfigError("browser is 'local:' without a folder; expected one such as local:docs/")
        parser = parser or Parser(timeout_s=local_index.TIMEOUT_S)
        return local_index.LocalBackend(Path(rest), parser, index_folder=index_folder, progress=progress)
    parser = parser or Parser()
    service = search_api.SERVICES.get(kind)
    if service is None:
        known = ", ".join(("local:FOLDER", "searxng:URL", *(name for name in search_api.SERVICES if name != "searxng")))
        raise ConfigError(f"browser is {spec!r}; expected one of: {known}")
    try:
        return service(rest, key, parser, Web(fetcher or Fetcher(), parser))
    except RefusedError as error:
        raise ConfigError(f"browser is {spec!r}: {error.message}") from None


def backend_of(settings: Config, *, progress: Callable[[Any], None] | None = None) -> Backend | None:
    """The back end of the settings; None where they name none. Raises ConfigError."""
    return open_backend(settings.browser, key=settings.browser_key, progress=progress) if settings.browser else None


async def backend_state(backend: Backend) -> dict[str, Any]:
    """What `Backend.describe` says, whether a document can be parsed here, and what confines the parser."""
    import asyncio

    state = await asyncio.to_thread(backend.describe)
    parser = Parser(1)
    try:
        rendered = await parser.render_async("html", b"<title>a</title><p>b</p>", "https://example.com/")
        state["parsing"] = "works" if rendered.text == "b" else "does not work: it changed a text"
        state["parser"] = await asyncio.to_thread(parser.layers)
    except OssiaError as error:
        state["parsing"] = f"does not work: {error.message}"
    finally:
        parser.close()
    return state
