"""Files that an answer names become annotations, however the text is cut, and nothing else does."""

from __future__ import annotations

import pytest
from openai.types.responses.response_output_text import AnnotationContainerFileCitation

from ossia.tools.file_mentions import FileScanner
from ossia.tools.web.citations import Citation, CitationScanner

FILES = {
    "plot.png": "cfile_1",
    "a.csv": "cfile_2",
    "a.csv.gz": "cfile_3",
    "of mine/täble 1.txt": "cfile_4",
    "a": "cfile_5",
}
ESCAPED = "sandbox:/mnt/data/of%20mine/t%C3%A4ble%201.txt"

# What is said, and what of it is cited: text and id.
CASES = [
    ("See [the plot](sandbox:/mnt/data/plot.png).", [("sandbox:/mnt/data/plot.png", "cfile_1")]),
    ("It is in `/mnt/data/a.csv`", [("/mnt/data/a.csv", "cfile_2")]),
    ("/mnt/data/a.csv.gz, /mnt/data/a.csv.", [("/mnt/data/a.csv.gz", "cfile_3"), ("/mnt/data/a.csv", "cfile_2")]),
    ("/mnt/data/a.csv.bz2 /mnt/data/a.csvs /mnt/data/a.csv/b /mnt/data/plot.pngs", []),
    (f"[x]({ESCAPED})", [(ESCAPED, "cfile_4")]),
    ("/mnt/data/of mine/täble 1.txt", [("/mnt/data/of mine/täble 1.txt", "cfile_4")]),
    ("/mnt/data/a", [("/mnt/data/a", "cfile_5")]),
    ("/mnt/data/a-b /mnt/data/ab /mnt/data/", []),
    ("/mnt/data/none.txt, plot.png and /mnt/plot.png", []),
    ("🌊 sandbox:/mnt/data//mnt/data/a.", [("/mnt/data/a", "cfile_5")]),
    ("/mnt/data/plot.png" * 2, [("/mnt/data/plot.png", "cfile_1")]),
    ("/mnt/data/plot.png\n" * 3, [("/mnt/data/plot.png", "cfile_1")] * 3),
    ("", []),
]


def scan(scanner, pieces):
    text, found = "", []
    for piece in pieces:
        more, annotations = scanner.feed(piece)
        text, found = text + more, [*found, *annotations]
    more, annotations = scanner.finish()
    return text + more, [*found, *annotations]


@pytest.mark.parametrize(("said", "cited"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_file_is_cited_where_it_is_named_however_the_text_is_cut(said, cited, size):
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    text, found = scan(FileScanner("cntr_1", FILES), pieces)
    assert text == said
    assert [(text[one["start_index"] : one["end_index"]], one["file_id"]) for one in found] == cited


def test_the_sdk_takes_the_annotation():
    _, found = scan(FileScanner("cntr_1", FILES), ["/mnt/data/of mine/täble 1.txt"])
    read = AnnotationContainerFileCitation.model_validate(found[0])
    assert (read.container_id, read.filename) == ("cntr_1", "täble 1.txt")


def test_text_is_shown_at_once_and_places_count_what_citations_have_become():
    inner = CitationScanner(lambda cursor, lines: Citation("https://example.org/x", "X"))
    scanner = FileScanner("cntr_1", FILES, inner)
    assert scanner.feed("so /mnt/data/plo") == ("so /mnt/data/plo", [])
    text, found = scan(scanner, ["t.png says【1†L2】 and /mnt/data/a.csv"])
    text = "so /mnt/data/plo" + text
    assert "([example.org](https://example.org/x))" in text
    assert sorted((one["type"], text[one["start_index"] : one["end_index"]]) for one in found) == [
        ("container_file_citation", "/mnt/data/a.csv"),
        ("container_file_citation", "/mnt/data/plot.png"),
        ("url_citation", "([example.org](https://example.org/x))"),
    ]


def test_without_files_nothing_is_looked_for():
    assert scan(FileScanner("cntr_1", {}), ["/mnt/data/a"]) == ("/mnt/data/a", [])
