"""Search services over HTTP: Exa, You.com, Brave, Tavily, and a SearXNG of one's own.

Each is one class of two calls. Their addresses come from the operator alone, as do keys.

Sources  the services' own references: exa.ai/docs/reference, you.com/docs/api-reference,
         api-dashboard.search.brave.com/api-reference, docs.tavily.com/documentation/api-reference,
         docs.searxng.org/dev/search_api.html.
"""

from __future__ import annotations

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ossia.errors import ConfigError
from ossia.tools.web.backend import Backend, Scope, Web, make_page
from ossia.tools.web.fetch import FetchError, JsonClient
from ossia.tools.web.guard import check_literal, read_url
from ossia.tools.web.page import Hit, Page, clean, domain_of, merge_space, shorten
from ossia.tools.web.parse_child import Parser

_SNIPPET_CHARS = 300


class _Service(ABC):
    """What the services have in common."""

    name = ""
    base_url = ""

    def __init__(self, base_url: str, key: str, parser: Parser, web: Web) -> None:
        """Raises ConfigError without a key where one is needed."""
        self._base_url = base_url or self.base_url
        self._key = key
        self._parser = parser
        self._web = web
        if not self._base_url:
            raise ConfigError(
                f"browser is {self.name!r} without a URL; expected one such as {self.name}:http://host:port"
            )
        if self._needs_key() and not key:
            raise ConfigError(
                f"browser is {self.name!r} and browser_key is empty; set OSSIA_BROWSER_KEY to its API key"
            )
        self._client = JsonClient(self._base_url, self._headers(), name=self.name)

    async def search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        hits = []
        for hit in await self._search(query, num_hits, scope):
            host = domain_of(hit.url).rpartition(":")[0] or domain_of(hit.url)
            if re.fullmatch(r"https?://\S+", hit.url) and clean(hit.url) == hit.url and scope.domains.has(host.lower()):
                hits.append(hit)
        return hits[:num_hits]

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        return await self._web.fetch(url, scope, is_source=is_source)

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "service": self._base_url,
            "key": "present" if self._key else "not needed" if not self._needs_key() else "missing",
            "pages": "from the service" if type(self).fetch is not _Service.fetch else "fetched from here",
        }

    def close(self) -> None:
        self._parser.close()

    def _needs_key(self) -> bool:
        return True

    def _headers(self) -> Mapping[str, str]:
        return {}

    @abstractmethod
    async def _search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        """What the service finds, not yet held to the scope."""

    def _check(self, url: str, scope: Scope) -> str:
        """A service is not asked for what may not be opened: URLs of this network would tell it something too."""
        read = read_url(url)
        scope.domains.check(read.host)
        check_literal(read)
        return str(read)


class Exa(_Service):
    name = "exa"
    base_url = "https://api.exa.ai"

    def _headers(self) -> Mapping[str, str]:
        return {"x-api-key": self._key}

    async def _search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        asked: dict[str, Any] = {"query": query, "numResults": num_hits, "contents": {"highlights": True}}
        if scope.domains.allowed:
            asked["includeDomains"] = list(scope.domains.allowed)
        elif scope.domains.blocked:
            asked["excludeDomains"] = list(scope.domains.blocked)
        hits = []
        for result in _objects(await self._client.post("/search", asked), "results"):
            highlights = [_text(one) for one in _list(result, "highlights")]
            text = _text(result.get("summary")) or " ... ".join(highlights) or _text(result.get("text"))
            passage = highlights[0] if highlights else text
            hits.append(Hit(_text(result.get("url")), _text(result.get("title")), _snippet(text), passage[:2000]))
        return hits

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        url = self._check(url, scope)
        answer = await self._client.post("/contents", {"urls": [url], "text": {"includeHtmlTags": True}})
        for result in _objects(answer, "results"):
            body = _text(result.get("text")).encode("utf-8", "replace")
            title = _text(result.get("title"))
            return await make_page(self._parser, "html", body, url, "utf-8", title=title, is_source=is_source)
        reasons = [_text(_object(one.get("error")).get("tag")) for one in _objects(answer, "statuses")]
        raise FetchError(f"exa has no contents of this page: {', '.join(filter(None, reasons)) or 'no reason given'}")


class YouCom(_Service):
    name = "youcom"
    base_url = "https://ydc-index.io"

    def _headers(self) -> Mapping[str, str]:
        return {"X-API-Key": self._key}

    async def _search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        asked: dict[str, Any] = {"query": query, "count": num_hits}
        if scope.domains.allowed:
            asked["include_domains"] = list(scope.domains.allowed)
        elif scope.domains.blocked:
            asked["exclude_domains"] = list(scope.domains.blocked)
        found = _object(_object(await self._client.post("/v1/search", asked)).get("results"))
        hits = []
        for result in [*_objects(found, "web"), *_objects(found, "news")]:
            snippets = [_text(one) for one in _list(result, "snippets")]
            text = " ... ".join(snippets) or _text(result.get("description"))
            passage = snippets[0] if snippets else text
            hits.append(Hit(_text(result.get("url")), _text(result.get("title")), _snippet(text), passage[:2000]))
        return hits

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        url = self._check(url, scope)
        answer = await self._client.post("/v1/contents", {"urls": [url], "formats": ["html", "markdown"]})
        for result in answer if isinstance(answer, list) else ():
            result = _object(result)
            kind = "html" if _text(result.get("html")) else "markdown"
            body = _text(result.get(kind)).encode("utf-8", "replace")
            if body:
                title = _text(result.get("title"))
                return await make_page(self._parser, kind, body, url, "utf-8", title=title, is_source=is_source)
        raise FetchError("youcom has no contents of this page")


class Tavily(_Service):
    name = "tavily"
    base_url = "https://api.tavily.com"

    def _headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self._key}"}

    async def _search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        asked: dict[str, Any] = {"query": query, "max_results": min(num_hits, 20), "search_depth": "basic"}
        if scope.domains.allowed:
            asked["include_domains"] = list(scope.domains.allowed)
        if scope.domains.blocked:
            asked["exclude_domains"] = list(scope.domains.blocked)
        return [
            Hit(
                _text(result.get("url")),
                _text(result.get("title")),
                _snippet(_text(result.get("content"))),
                _text(result.get("content"))[:2000],
            )
            for result in _objects(await self._client.post("/search", asked), "results")
        ]

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        url = self._check(url, scope)
        answer = await self._client.post("/extract", {"urls": [url], "format": "markdown"})
        for result in _objects(answer, "results"):
            body = _text(result.get("raw_content")).encode("utf-8", "replace")
            return await make_page(self._parser, "markdown", body, url, "utf-8", is_source=is_source)
        reasons = [_text(one.get("error")) for one in _objects(answer, "failed_results")]
        raise FetchError(
            f"tavily has no contents of this page: {', '.join(filter(None, reasons)) or 'no reason given'}"
        )


class Brave(_Service):
    name = "brave"
    base_url = "https://api.search.brave.com"

    def _headers(self) -> Mapping[str, str]:
        return {"X-Subscription-Token": self._key}

    async def _search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        # More is refused by the service: 400 characters, 50 words, 20 results.
        if len(scope.domains.allowed) == 1:
            query = f"site:{scope.domains.allowed[0]} {query}"
        query = " ".join(query.split()[:50])[:400]
        asked = {"q": query, "count": str(min(num_hits, 20)), "extra_snippets": "true"}
        found = _object(_object(await self._client.get("/res/v1/web/search", asked)).get("web"))
        hits = []
        for result in _objects(found, "results"):
            extra = [_plain(_text(one)) for one in _list(result, "extra_snippets")]
            text = _plain(_text(result.get("description")))
            title = _plain(_text(result.get("title")))
            hits.append(Hit(_text(result.get("url")), title, _snippet(text), extra[0] if extra else text))
        return hits


class SearXNG(_Service):
    name = "searxng"

    def _needs_key(self) -> bool:
        return False

    async def _search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        if len(scope.domains.allowed) == 1:
            query = f"site:{scope.domains.allowed[0]} {query}"
        try:
            answer = await self._client.get("/search", {"q": query, "format": "json"})
        except FetchError as error:
            if "status 403" in error.message:
                raise FetchError(
                    "searxng does not give JSON; its settings.yml needs search.formats: [html, json]"
                ) from None
            raise
        return [
            Hit(_text(result.get("url")), _text(result.get("title")), _snippet(_text(result.get("content"))))
            for result in _objects(answer, "results")
        ]


SERVICES: Mapping[str, Callable[[str, str, Parser, Web], Backend]] = {
    service.name: service for service in (Exa, YouCom, Brave, Tavily, SearXNG)
}


# What a service says may have any shape ------------------------------------------------------------------------------


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any, name: str) -> list[Any]:
    found = _object(value).get(name)
    return found if isinstance(found, list) else []


def _objects(value: Any, name: str) -> Iterator[dict[str, Any]]:
    return (one for one in _list(value, name) if isinstance(one, dict))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _snippet(text: str) -> str:
    return shorten(merge_space(text), _SNIPPET_CHARS)


def _plain(text: str) -> str:
    """Without the marks that Brave sets around the words that were searched for."""
    return html.unescape(re.sub(r"</?(?:strong|b|em|i)>", "", text))
