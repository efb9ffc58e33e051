from __future__ import annotations

import asyncio
import json
import random

import pytest

from ossia.tools.browser import Browser
from ossia.tools.web.citations import Citation, CitationScanner, annotate, read_mark
from ossia.tools.web.page import Hit, Page

URLS = {
    6: "https://example.com/six",
    8: "https://other.org/eight",
    7: "https://en.wikipedia.org/wiki/A_(b) c",
    9: "local://docs/a.md",
}


def resolve(cursor, lines):
    return Citation(URLS[cursor], f"Title {cursor}", lines, f"quoted {lines}") if cursor in URLS else None


SIX, EIGHT = "([example.com](https://example.com/six))", "([other.org](https://other.org/eight))"

CASES = [
    # The trained forms.
    ("A fact【6†L9-L11】.", f"A fact {SIX}.", [(6, [9, 11])]),
    ("A fact【8†L3】.", f"A fact {EIGHT}.", [(8, [3, 3])]),
    ("A fact 【6†L9-L11】 and", f"A fact {SIX} and", [(6, [9, 11])]),
    ("【6†L1】", SIX, [(6, [1, 1])]),
    ("a【6†L1】【8†L2】b", f"a {SIX} {EIGHT}b", [(6, [1, 1]), (8, [2, 2])]),
    # What models write too.
    ("x【6】", f"x {SIX}", [(6, None)]),
    ("x【 6†L9】", f"x {SIX}", [(6, [9, 9])]),
    ("x【6 † L9 - L11 】", f"x {SIX}", [(6, [9, 11])]),
    ("x【6†L9–L11】", f"x {SIX}", [(6, [9, 11])]),
    ("x【6†L9-11】", f"x {SIX}", [(6, [9, 11])]),
    ("x【6†9-11】", f"x {SIX}", [(6, [9, 11])]),
    ("x【6†l9】", f"x {SIX}", [(6, [9, 9])]),
    ("x【6†L11-L9】", f"x {SIX}", [(6, [9, 11])]),
    ("x【[6]†L9】", f"x {SIX}", [(6, [9, 9])]),
    ("x【6†source】", f"x {SIX}", [(6, None)]),
    ("x【6†L9†example.com】", f"x {SIX}", [(6, [9, 9])]),
    ("x【6†】", f"x {SIX}", [(6, None)]),
    ("x【6†L9-L11, 8†L3】", f"x {SIX} {EIGHT}", [(6, [9, 11]), (8, [3, 3])]),
    ("x【6†L9; 8†L3】", f"x {SIX} {EIGHT}", [(6, [9, 9]), (8, [3, 3])]),
    ("x【6†L9, L12-L14】", f"x {SIX}", [(6, [9, 9]), (6, [12, 14])]),
    ("x【6, 8】", f"x {SIX} {EIGHT}", [(6, None), (8, None)]),
    # One of two is known.
    ("x【6†L1, 99†L2】", f"x {SIX}", [(6, [1, 1])]),
    # A URL cannot end the link.
    ("x【7†L1】", "x ([en.wikipedia.org](https://en.wikipedia.org/wiki/A_%28b%29%20c))", [(7, [1, 1])]),
    ("x【9†L1】", "x ([docs](local://docs/a.md))", [(9, [1, 1])]),
    # What is no citation, or leads nowhere, stays.
    ("x【99†L1】", "x【99†L1】", []),
    ("x【turn0search3】", "x【turn0search3】", []),
    ("注意【重要】です", "注意【重要】です", []),
    ("x【3†a title†domain】", "x【3†a title†domain】", []),
    ("x【】【", "x【】【", []),
    ("x【6†L9", "x【6†L9", []),
    ("x【【6†L9】", f"x【 {SIX}", [(6, [9, 9])]),
    ("x【6\n†L9】", "x【6\n†L9】", []),
    ("x【6†L" + "9" * 200 + "】", "x【6†L" + "9" * 200 + "】", []),
    ("x【" + "6, " * 100 + "6】y", "x【" + "6, " * 100 + "6】y", []),
    ("a] [b](c) 〖6†L1〗", "a] [b](c) 〖6†L1〗", []),
    ("", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "shown", "cited"), CASES, ids=[case[0][:40] or "nothing" for case in CASES])
def test_a_mark_becomes_a_link_and_an_annotation(text, shown, cited):
    out, annotations = annotate(text, resolve)
    assert out == shown
    assert [(one["cursor"], one["lines"]) for one in annotations] == cited
    for one in annotations:
        span = out[one["start_index"] : one["end_index"]]
        assert span.startswith("([") and span.endswith("))") and one["url"] == URLS[one["cursor"]]
        assert one["type"] == "url_citation" and one["title"] == f"Title {one['cursor']}" and one["quote"]


@pytest.mark.parametrize(("text", "shown", "cited"), CASES, ids=[case[0][:40] or "nothing" for case in CASES])
def test_it_is_the_same_however_the_text_is_cut(text, shown, cited):
    draw = random.Random(5)
    for size in (1, 2, 3, 7, 0):
        scanner = CitationScanner(resolve)
        out, annotations, at = "", [], 0
        while at < len(text):
            step = size or draw.randrange(1, 9)
            more, found = scanner.feed(text[at : at + step])
            # An annotation comes with its text, never before.
            assert all(len(out) <= one["start_index"] and one["end_index"] <= len(out + more) for one in found)
            out, annotations, at = out + more, annotations + found, at + step
        more, found = scanner.finish()
        assert (out + more, annotations + found) == annotate(text, resolve) == (shown, annotate(text, resolve)[1])


def test_only_what_may_become_a_mark_is_held_back():
    scanner = CitationScanner(resolve)
    for piece, out in [
        ("注意【", "注意"),
        ("重", "【重"),
        ("x【6", "x"),
        ("†L9", ""),
        ("】.", f" {SIX}."),
        ("【1", ""),
        ("a" * 200, "【1" + "a" * 200),
    ]:
        assert scanner.feed(piece)[0] == out
    assert scanner.finish() == ("", [])


def test_marks_may_be_kept():
    text, annotations = annotate("é😀【6†L9】 x【6†L1, 8†L2】", resolve, keeps_marks=True)
    assert text == "é😀【6†L9】 x【6†L1, 8†L2】"
    assert [text[a["start_index"] : a["end_index"]] for a in annotations] == [
        "【6†L9】",
        "【6†L1, 8†L2】",
        "【6†L1, 8†L2】",
    ]


def test_a_long_run_of_brackets_takes_no_time():
    assert annotate("【6" * 100_000, resolve)[0] == "【6" * 100_000
    assert read_mark("【6†" + "," * 100 + "】") == []


def test_the_sdk_takes_the_annotations():
    from openai.types.responses.response_output_text import AnnotationURLCitation

    for one in annotate("x【6†L9】", resolve)[1]:
        assert AnnotationURLCitation.model_validate(one).url == URLS[6]


# What a cursor and lines lead to -------------------------------------------------------------------------------------


class Backend:
    name = "scripted"

    async def search(self, query, num_hits, scope):
        return [
            Hit("https://one.org/", "One", "a long snippet " * 12),
            Hit("https://two.org/", "Two", "short"),
        ]

    async def fetch(self, url, scope, *, is_source=False):
        text = (
            "First line.\n"
            + "A paragraph that is wrapped 【0†by a link over†x.org】 the end of its line. " * 3
            + "\nLast."
        )
        return Page(
            "source" if is_source else "page",
            f"view-source:{url}" if is_source else url,
            "The page",
            f"\nURL: {url}\n{text}",
            ("https://x.org/",),
        )

    def describe(self):
        return {}

    def close(self):
        pass


@pytest.fixture
def browser():
    browser = Browser(Backend())
    for name, arguments in [
        ("search", {"query": "q"}),
        ("open", {"id": "https://page.org/"}),
        ("find", {"pattern": "last"}),
        ("open", {"id": "https://page.org/", "view_source": True}),
    ]:
        assert not asyncio.run(browser.run(name, json.dumps(arguments))).is_error
    return browser


def test_lines_are_quoted_as_words(browser):
    cited = browser.cite(1, (2, 2))
    assert cited == Citation("https://page.org/", "The page", (2, 2), "First line.")
    quote = browser.cite(1, (3, 5)).quote
    assert "【" not in quote and quote.startswith(
        "A paragraph that is wrapped by a link over the end of its line. A paragraph"
    )
    assert browser.cite(1, None) == Citation("https://page.org/", "The page", None, "")


def test_lines_beyond_the_page_count_for_none(browser):
    assert browser.cite(1, (900, 901)) == Citation("https://page.org/", "The page", None, "")
    last = len(browser._pages[1].lines) - 1
    assert browser.cite(1, (last, 10**9)).lines == (last, last)
    assert browser.cite(4, (0, 0)) is None and browser.cite(-1, None) is None


def test_a_search_page_cites_the_result_of_the_line(browser):
    lines = browser._pages[0].lines
    second = next(n for n in range(len(lines)) if "【1†" in lines[n])
    assert browser.cite(0, (4, 4)).url == browser.cite(0, (second - 1, second - 1)).url == "https://one.org/"
    assert browser.cite(0, (second, second))[:2] == ("https://two.org/", "Two")
    assert browser.cite(0, (2, 2)) is None and browser.cite(0, None) is None


def test_a_find_page_cites_the_page_that_was_searched(browser):
    cited = browser.cite(2, (1, 1))
    assert cited == Citation("https://page.org/", "The page", (1, 1), "Last.")


def test_a_page_of_source_cites_the_page(browser):
    assert browser.cite(3, (2, 2)).url == "https://page.org/"


def test_an_answer_is_annotated_from_the_conversation_also_when_it_was_stored(browser):
    later = Browser(Backend(), state=json.loads(json.dumps(browser.state())))
    for one in (browser, later):
        text, annotations = one.scanner().feed("It is last【2†L1】, and first【1†L2】.")
        assert text == "It is last ([page.org](https://page.org/)), and first ([page.org](https://page.org/))."
        assert [a["quote"] for a in annotations] == ["Last.", "First line."]
