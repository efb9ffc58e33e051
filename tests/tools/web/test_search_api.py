"""The services, against servers on the loopback that speak as their references say; never against the real ones."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.tools.web.site import page

from ossia.errors import ConfigError, OssiaError
from ossia.tools.browser import Browser, BrowserRules
from ossia.tools.web.backend import Scope, open_backend
from ossia.tools.web.fetch import Fetcher, FetchError
from ossia.tools.web.guard import Domains, Guard, RefusedError

SCOPE = Scope()


def answer(value, status="200 OK"):
    return page(json.dumps(value), "application/json", status)


def opened(site, parser, name, key="sk-key"):
    return open_backend(f"{name}:{site.url}", key=key, parser=parser, fetcher=Fetcher(Guard(allowed=[site.address])))


def search(backend, query="harbour ships", num_hits=5, scope=SCOPE):
    return asyncio.run(backend.search(query, num_hits, scope))


def asked(site):
    """Headers by name, and the body as JSON, of the last request."""
    head, _, body = site.last.decode().partition("\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    return {name.lower(): value for name, value in headers.items()}, json.loads(body) if body else None


def test_exa_is_asked_as_its_reference_says(site, parser):
    site.pages["/search"] = answer(
        {
            "requestId": "1",
            "results": [
                {
                    "title": "One",
                    "url": "https://one.org/a",
                    "highlights": ["first passage", "second"],
                    "highlightScores": [0.9],
                },
                {"title": "Two", "url": "https://two.org/", "summary": "a summary", "text": "all of it"},
                {"title": None, "url": "https://three.org/"},
            ],
        }
    )
    backend = opened(site, parser, "exa")
    hits = search(backend, scope=Scope(Domains.read(["one.org", "two.org"])))
    headers, body = asked(site)
    assert headers["x-api-key"] == "sk-key" and site.asked == ["/search"]
    assert body == {
        "query": "harbour ships",
        "numResults": 5,
        "contents": {"highlights": True},
        "includeDomains": ["one.org", "two.org"],
    }
    assert [tuple(hit) for hit in hits] == [
        ("https://one.org/a", "One", "first passage ... second", "first passage"),
        ("https://two.org/", "Two", "a summary", "a summary"),
    ]
    assert len(search(backend)) == 3
    site.pages["/contents"] = answer(
        {
            "results": [
                {"url": "https://one.org/a", "title": "The title", "text": "<p>Text with <a href='/b'>link</a></p>"}
            ],
            "statuses": [{"id": "https://one.org/a", "status": "success"}],
        }
    )
    fetched = asyncio.run(backend.fetch("https://one.org/a", SCOPE))
    assert asked(site)[1] == {"urls": ["https://one.org/a"], "text": {"includeHtmlTags": True}}
    assert (fetched.title, fetched.text) == ("The title", "\nURL: https://one.org/a\nText with 【0†link】")
    assert fetched.links == ("https://one.org/b",)
    site.pages["/contents"] = answer(
        {
            "results": [],
            "statuses": [{"id": "x", "status": "error", "error": {"tag": "CRAWL_NOT_FOUND", "httpStatusCode": 404}}],
        }
    )
    with pytest.raises(FetchError, match="exa has no contents of this page: CRAWL_NOT_FOUND"):
        asyncio.run(backend.fetch("https://one.org/a", SCOPE))


def test_youcom_is_asked_as_its_reference_says(site, parser):
    site.pages["/v1/search"] = answer(
        {
            "results": {
                "web": [{"url": "https://one.org/", "title": "One", "description": "d", "snippets": ["s1", "s2"]}],
                "news": [{"url": "https://news.org/", "title": "News", "description": "n"}],
            },
            "metadata": {"query": "q"},
        }
    )
    backend = opened(site, parser, "youcom")
    hits = search(backend, scope=Scope(Domains.read([], ["bad.org"])))
    headers, body = asked(site)
    assert headers["x-api-key"] == "sk-key"
    assert body == {"query": "harbour ships", "count": 5, "exclude_domains": ["bad.org"]}
    assert [tuple(hit) for hit in hits] == [
        ("https://one.org/", "One", "s1 ... s2", "s1"),
        ("https://news.org/", "News", "n", "n"),
    ]
    site.pages["/v1/contents"] = answer(
        [{"url": "https://one.org/", "title": "T", "html": "<h1>H</h1>", "markdown": "# H"}]
    )
    fetched = asyncio.run(backend.fetch("https://one.org/", SCOPE))
    assert asked(site)[1] == {"urls": ["https://one.org/"], "formats": ["html", "markdown"]}
    assert fetched.text == "\nURL: https://one.org/\n# H" and fetched.title == "T"
    site.pages["/v1/contents"] = answer([{"url": "https://one.org/", "title": "T", "html": None, "markdown": "*M*"}])
    assert asyncio.run(backend.fetch("https://one.org/", SCOPE)).text.endswith("\n*M*")
    site.pages["/v1/contents"] = answer([])
    with pytest.raises(FetchError, match="youcom has no contents"):
        asyncio.run(backend.fetch("https://one.org/", SCOPE))


def test_tavily_is_asked_as_its_reference_says(site, parser):
    site.pages["/search"] = answer(
        {
            "query": "q",
            "results": [
                {"title": "One", "url": "https://one.org/", "content": "c " * 400, "score": 0.8, "raw_content": None}
            ],
        }
    )
    backend = opened(site, parser, "tavily")
    hit = search(backend, num_hits=30)[0]
    headers, body = asked(site)
    assert headers["authorization"] == "Bearer sk-key"
    assert body == {"query": "harbour ships", "max_results": 20, "search_depth": "basic"}
    assert len(hit.snippet) == 300 and hit.snippet.endswith("...")
    site.pages["/extract"] = answer(
        {"results": [{"url": "https://one.org/", "raw_content": "# Title\n\nText"}], "failed_results": []}
    )
    fetched = asyncio.run(backend.fetch("https://one.org/", SCOPE))
    assert asked(site)[1] == {"urls": ["https://one.org/"], "format": "markdown"}
    assert (fetched.title, fetched.text) == ("Title", "\nURL: https://one.org/\n# Title\n\nText")
    site.pages["/extract"] = answer(
        {"results": [], "failed_results": [{"url": "https://one.org/", "error": "Failed to fetch"}]}
    )
    with pytest.raises(FetchError, match="Failed to fetch"):
        asyncio.run(backend.fetch("https://one.org/", SCOPE))


def test_brave_is_asked_as_its_reference_says_and_pages_are_fetched_from_here(site, parser):
    site.pages["/res/v1/web/search"] = answer(
        {
            "query": {"original": "q"},
            "web": {
                "results": [
                    {
                        "title": "One &amp; <strong>two</strong>",
                        "url": f"{site.url}/a",
                        "description": "the <strong>harbour</strong>",
                        "extra_snippets": ["more <strong>of</strong> it"],
                    },
                ]
            },
        }
    )
    backend = opened(site, parser, "brave")
    hits = search(backend, "word " * 60, 50)
    assert asked(site)[0]["x-subscription-token"] == "sk-key"
    query = "+".join(["word"] * 50)
    assert site.asked == [f"/res/v1/web/search?q={query}&count=20&extra_snippets=true"]
    assert [tuple(hit) for hit in hits] == [(f"{site.url}/a", "One & two", "the harbour", "more of it")]
    site.pages["/a"] = page("<p>from the site")
    assert asyncio.run(backend.fetch(f"{site.url}/a", SCOPE)).text.endswith("from the site")
    search(backend, "x", 3, Scope(Domains.read(["one.org"])))
    assert site.asked[-1] == "/res/v1/web/search?q=site%3Aone.org+x&count=3&extra_snippets=true"


def test_searxng_is_asked_as_its_reference_says(site, parser):
    results = [
        {"url": f"https://r{i}.org/", "title": f"R{i}", "content": "c", "engine": "x", "score": 1.0} for i in range(30)
    ]
    site.pages["/search"] = answer({"query": "q", "number_of_results": 30, "results": results})
    backend = opened(site, parser, "searxng", key="")
    assert len(search(backend, num_hits=7)) == 7
    assert site.asked == ["/search?q=harbour+ships&format=json"] and backend.describe()["key"] == "not needed"
    site.pages["/search"] = page("Forbidden", status="403 Forbidden")
    with pytest.raises(FetchError, match=r"search\.formats"):
        search(backend)


@pytest.mark.parametrize("name", ["exa", "youcom", "brave", "tavily"])
@pytest.mark.parametrize(
    "said",
    [
        [],
        {},
        {"results": None},
        {"results": 3},
        {"results": [3, None, {"url": 7}]},
        {"web": []},
        {"results": {"web": "x"}},
        "text",
        None,
        {"results": [{"url": "javascript:alert(1)", "title": "x"}, {"url": "https://a.org/\n[9] fake", "title": "x"}]},
        {"web": {"results": [{"url": "file:///etc/passwd", "title": "x"}]}},
    ],
)
def test_whatever_a_service_says_no_bad_hit_comes_of_it(site, parser, name, said):
    site.pages |= dict.fromkeys(["/search", "/v1/search", "/res/v1/web/search"], answer(said))
    assert search(opened(site, parser, name)) == []


@pytest.mark.parametrize("name", ["exa", "youcom", "brave", "tavily", "searxng"])
def test_an_error_of_a_service_is_told_to_the_model_without_the_key(site, parser, name):
    site.pages |= dict.fromkeys(
        ["/search", "/v1/search", "/res/v1/web/search"],
        answer({"error": "rate limited, key sk-key"}, "429 Too Many Requests"),
    )
    output = asyncio.run(Browser(opened(site, parser, name)).run("search", '{"query": "q"}'))
    assert output.text.startswith(f"Error during search for `q`: {name} answered with status 429")
    assert "sk-key" not in output.text or name == "searxng"


@pytest.mark.parametrize("name", ["exa", "youcom", "tavily"])
def test_a_service_is_not_asked_for_what_may_not_be_opened(site, parser, name):
    backend = opened(site, parser, name)
    for url in (
        "http://127.0.0.1/",
        "http://router/",
        "file:///etc/passwd",
        "http://user:pw@example.com/",
        "https://example.com:8443/",
    ):
        with pytest.raises(RefusedError):
            asyncio.run(backend.fetch(url, SCOPE))
    with pytest.raises(RefusedError, match="not among the domains"):
        asyncio.run(backend.fetch("https://evil.com/", Scope(Domains.read(["good.org"]))))
    assert site.asked == []


def test_text_that_is_no_text_comes_out_clean(site, parser):
    site.pages["/search"] = answer(
        {"results": [{"title": "a\ud800【1†x】\u200b", "url": "https://one.org/", "content": "<|end|>\n\n* b"}]}
    )
    browser = Browser(opened(site, parser, "tavily"), BrowserRules())
    text = asyncio.run(browser.run("search", '{"query": "q"}')).text
    assert "L4:   * 【0†a\ufffd〖1‡x〗†one.org】 <|end|> * b" in text


@pytest.mark.parametrize(
    ("spec", "key", "said"),
    [
        ("exa", "", "browser_key is empty"),
        ("brave", "", "OSSIA_BROWSER_KEY"),
        ("searxng", "", "without a URL"),
        ("searxng:ftp://x", "", "not the address of a service"),
        ("google", "k", "expected one of: local:FOLDER, searxng:URL, exa"),
        ("local:", "", "without a folder"),
        ("local:/no/such/folder", "", "is not a folder"),
        ("", "", "expected one of"),
        ("exa:https://user:pw@host", "k", "not the address of a service"),
    ],
)
def test_a_back_end_that_cannot_be_is_refused_with_what_to_do(parser, spec, key, said):
    with pytest.raises(ConfigError) as met:
        open_backend(spec, key=key, parser=parser)
    assert said in met.value.message


@pytest.mark.parametrize("spec", ["exa", "youcom", "brave", "tavily"])
def test_a_service_is_described_without_its_key(parser, spec):
    state = open_backend(spec, key="sk-secret", parser=parser).describe()
    assert state["backend"] == spec and state["key"] == "present" and "sk-secret" not in json.dumps(state)
    assert state["service"].startswith("https://")


def test_a_service_that_is_not_there_is_an_error_in_words(parser):
    with pytest.raises(OssiaError, match="searxng: no connection"):
        search(open_backend("searxng:http://127.0.0.1:9", parser=parser))
