"""Speed of the browser tool: rendering pages, opening them, and the index of a folder, on pages made up here.

    python benchmarks/browser.py [--rounds 5] [--documents 3000] [--json]

rendering   HTML to text in the trained form: in this process, and through the child with its limits. *prose* has few
            elements, *links* a link in each line, *tables* a cell for each few letters.
view        what one open costs of a page that is there: wrapping, counting the window's tokens, the display.
citations   an answer of 2,000 characters with 20 marks, fed by four characters.
index       a folder of Markdown, HTML and text of about 7 kB each: the first update, one without changes, one with a
            changed file in a hundred, and queries of three words (median and worst of 200).

Times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ossia.harmony import Tokenizer
from ossia.tools.web.citations import Citation, CitationScanner
from ossia.tools.web.local_index import LocalIndex
from ossia.tools.web.page import Lines, Page, show
from ossia.tools.web.page_text import render
from ossia.tools.web.parse_child import Parser

URL = "https://example.com/dir/page.html"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--documents", type=int, default=3000)
    arguments.add_argument("--json", action="store_true", help="print the results as JSON")
    options = arguments.parse_args()
    words = Words()
    results = [
        *bench_rendering(words, options.rounds),
        *bench_view(words, options.rounds),
        *bench_index(words, options.rounds, options.documents),
    ]
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for row in results:
        print(f"{row['what']:<44} {row['value']:>10.4g} {row['unit']}")


class Words:
    """Made-up prose whose words have the frequencies of a language's."""

    def __init__(self) -> None:
        self._draw = random.Random(1)
        letters = "etaoinshrdlucmfwypvbgkqjxz"
        self.all = ["".join(self._draw.choices(letters, k=self._draw.randrange(2, 11))) for _ in range(20_000)]
        self._weights = [1 / (rank + 1) for rank in range(len(self.all))]

    def prose(self, num_words: int) -> str:
        chosen = self._draw.choices(self.all, self._weights, k=num_words)
        return ". ".join(" ".join(chosen[i : i + 14]).capitalize() for i in range(0, num_words, 14)) + "."

    def rare(self, num_words: int) -> str:
        return " ".join(self._draw.choices(self.all[200:5000], k=num_words))


def page(kind: str, words: Words, num_bytes: int) -> bytes:
    parts = ["<html><head><title>A page</title></head><body>"]
    size = 0
    while size < num_bytes:
        i = len(parts)
        if kind == "prose":
            part = f"<h2>{words.prose(4)}</h2><p>{words.prose(120)} <b>{words.prose(3)}</b></p>\n"
        elif kind == "links":
            part = f'<li><a href="/wiki/page-{i}">{words.prose(4)}</a> {words.prose(6)}</li>\n'
        else:
            cells = "".join(f"<td>{words.prose(2)}</td>" for _ in range(8))
            part = f"{'<table>' if i % 50 == 1 else ''}<tr>{cells}</tr>{'</table>' if i % 50 == 0 else ''}\n"
        parts.append(part)
        size += len(part)
    return "".join(parts).encode()


def median_s(rounds: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def bench_rendering(words: Words, rounds: int) -> list[dict[str, Any]]:
    results = []
    parser = Parser(1)
    begun = time.perf_counter()
    parser.render("html", b"<p>x", URL)
    results.append({"what": "child, first document", "value": (time.perf_counter() - begun) * 1e3, "unit": "ms"})
    small = median_s(rounds * 20, lambda: parser.render("html", b"<p>x", URL))
    results.append({"what": "child, a document of one word", "value": small * 1e3, "unit": "ms"})
    for kind in ("prose", "links", "tables"):
        body = page(kind, words, 1_000_000)
        here = median_s(rounds, lambda body=body: render("html", body, URL, "utf-8", 10))
        child = median_s(rounds, lambda body=body: parser.render("html", body, URL, "utf-8"))
        results.append({"what": f"render {kind}, here", "value": len(body) / here / 1e6, "unit": "MB/s"})
        results.append({"what": f"render {kind}, in the child", "value": len(body) / child / 1e6, "unit": "MB/s"})
    parser.close()
    return results


def bench_view(words: Words, rounds: int) -> list[dict[str, Any]]:
    tokenizer = Tokenizer.o200k_harmony()
    text = render("html", page("prose", words, 100_000), URL, "utf-8", 10).text
    wrap = median_s(rounds, lambda: Lines(text))
    shown = Page("page", URL, "A page", text)

    def view() -> str:
        return show(0, shown, 40, shown.lines.end_of_view(40, -1, tokenizer))

    view()
    answer = "".join(f"{words.prose(14)[:88]}【{i % 7}†L{i}-L{i + 2}】" for i in range(20))

    def scan() -> None:
        scanner = CitationScanner(lambda cursor, lines: Citation("https://example.com/a", "A", lines, "quote"))
        for at in range(0, len(answer), 4):
            scanner.feed(answer[at : at + 4])
        scanner.finish()

    return [
        {"what": "view, wrapping 100 kB", "value": wrap * 1e3, "unit": "ms"},
        {"what": "view, a window of 1024 tokens", "value": median_s(rounds * 10, view) * 1e3, "unit": "ms"},
        {"what": "find in 100 kB", "value": median_s(rounds * 5, lambda: shown.lines.find("no such words", 9, 4)) * 1e3,
         "unit": "ms"},
        {"what": "citations, an answer", "value": median_s(rounds * 5, scan) * 1e3, "unit": "ms"},
    ]  # fmt: skip


def bench_index(words: Words, rounds: int, num_documents: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "docs"
        size = 0
        for i in range(num_documents):
            path = root / f"part{i % 30}" / f"doc{i}{('.md', '.html', '.txt')[i % 3]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            prose = words.prose(1000)
            text = f"<title>{words.rare(3)}</title><p>{prose}</p>" if i % 3 == 1 else f"# {words.rare(3)}\n\n{prose}\n"
            path.write_text(text)
            size += len(text)
        parser = Parser(1)
        index = LocalIndex(root, parser, path=Path(folder) / "index.db")
        begun = time.perf_counter()
        index.update()
        build = time.perf_counter() - begun
        again = median_s(rounds, index.update)
        for i in range(0, num_documents, 100):
            path = root / f"part{i % 30}" / f"doc{i}{('.md', '.html', '.txt')[i % 3]}"
            path.write_text(words.prose(1000))
        begun = time.perf_counter()
        update = index.update()
        changed = time.perf_counter() - begun
        assert update.num_changed == len(range(0, num_documents, 100))
        times = []
        for _ in range(200):
            query = words.rare(3)
            begun = time.perf_counter()
            index.search(query, 10)
            times.append(time.perf_counter() - begun)
        results = [
            {"what": f"index {num_documents} documents, {size / 1e6:.1f} MB", "value": build, "unit": "s"},
            {"what": "index, size on disk", "value": index.size_bytes / 1e6, "unit": "MB"},
            {"what": "update without changes", "value": again * 1e3, "unit": "ms"},
            {"what": "update of one file in a hundred", "value": changed * 1e3, "unit": "ms"},
            {"what": "query of three words, 10 hits, median", "value": statistics.median(times) * 1e3, "unit": "ms"},
            {"what": "query of three words, 10 hits, worst", "value": max(times) * 1e3, "unit": "ms"},
        ]
        index.close()
        parser.close()
    return results


if __name__ == "__main__":
    main()
