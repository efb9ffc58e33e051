from __future__ import annotations

import asyncio
import os
import sqlite3
import time

import pytest
from tests.tools.web.test_page_text import _pdf

from ossia.errors import ConfigError, NotFoundError, UnavailableError
from ossia.tools.browser import Browser
from ossia.tools.web.backend import Scope, backend_state, open_backend
from ossia.tools.web.guard import Domains, RefusedError
from ossia.tools.web.local_index import MAX_FILE_BYTES, LocalIndex, _files
from ossia.tools.web.parse_child import SlowError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "My Docs"
    (folder / "guide").mkdir(parents=True)
    (folder / "README.md").write_text("# Welcome\n\nThis is the [guide](guide/install.md).\n")
    (folder / "guide" / "install.md").write_text("# Installing\n\nRun `make install` to install the packages.\n")
    (folder / "guide" / "harbour.html").write_text(
        "<title>The harbour</title><p>The harbour lay still.</p>"
        "<a href='install.md'>how</a> <a href='../README.md#x'>up</a>"
    )
    (folder / "notes.txt").write_text("東京の天気は晴れです。\n")
    (folder / "paper.pdf").write_bytes(_pdf("A paper about lighthouses"))
    (folder / ".hidden.md").write_text("secret harbour")
    (folder / "picture.png").write_bytes(b"harbour")
    return folder


@pytest.fixture
def index(folder, tmp_path, parser):
    index = LocalIndex(folder, parser, path=tmp_path / "index.db")
    index.update()
    yield index
    index.close()


def paths(index, query, num_hits=10):
    return [path for path, _, _ in index.search(query, num_hits)]


def test_all_kinds_of_files_are_found_by_their_words(index):
    assert index.num_documents == 5
    assert paths(index, "installing package")[0] == "guide/install.md"
    assert paths(index, "HARBOUR")[0] == "guide/harbour.html"
    assert paths(index, "天気") == ["notes.txt"]
    assert paths(index, "lighthouse") == ["paper.pdf"]
    assert paths(index, "what is the guide for?")[0] in ("README.md", "guide/install.md")
    assert paths(index, '"harbour lay"') == ["guide/harbour.html"] and paths(index, '"lay harbour"') == []


@pytest.mark.parametrize(
    "query",
    [
        "",
        " ",
        '"',
        '""',
        "NEAR(",
        "a AND",
        "*",
        "-",
        "col:x",
        "^",
        "{",
        "'; DROP TABLE docs; --",
        "\0",
        "\ufffd",
        "a" * 4000,
    ],
)
def test_no_query_is_an_error(index, query):
    assert isinstance(index.search(query, 5), list)


def test_the_best_document_comes_first_with_the_passage_that_fits(index, folder):
    (folder / "long.txt").write_text(
        "nothing here. " * 500 + "\nThe gate of the castle opens at nine.\n" + "and more. " * 500
    )
    index.update()
    path, title, passage = index.search("when does the castle gate open", 3)[0]
    assert (path, title) == ("long.txt", "long") and passage.startswith("The gate of the castle opens at nine.")
    assert len(passage) < 300


def test_an_update_reads_only_what_has_changed(index, folder):
    assert index.update() == (0, 0, 0, 5, ())
    # A new time alone is no change of content; new content is, and a file that is gone is gone.
    os.utime(folder / "notes.txt", (1, 1))
    (folder / "guide" / "install.md").write_text("# Other words\n")
    (folder / "paper.pdf").unlink()
    (folder / "new.txt").write_text("zebra")
    update = index.update()
    assert (update.num_added, update.num_changed, update.num_removed, update.num_unchanged) == (1, 1, 1, 3)
    assert paths(index, "zebra") == ["new.txt"]
    assert paths(index, "lighthouse") == [] == paths(index, "packages")
    assert paths(index, "other") == ["guide/install.md"]


def test_a_file_that_goes_away_while_a_folder_is_read_is_left_out(folder):
    files = _files(folder)
    assert next(files)[0] == "README.md"
    (folder / "notes.txt").unlink()
    assert {path for path, _ in files} == {"guide/install.md", "guide/harbour.html", "paper.pdf"}


def test_progress_is_told_file_by_file(folder, tmp_path, parser):
    told = []
    index = LocalIndex(folder, parser, path=tmp_path / "other.db")
    index.update(told.append)
    index.close()
    assert [(one.num_done, one.num_files) for one in told] == [(i, 5) for i in range(1, 6)]
    assert {one.path for one in told} == {
        "README.md",
        "guide/install.md",
        "guide/harbour.html",
        "notes.txt",
        "paper.pdf",
    }


def test_an_update_that_was_broken_off_goes_on_where_it_was(folder, tmp_path, parser):
    class Enough(Exception):
        pass

    def stop(progress):
        if progress.num_done == 3:
            raise Enough

    index = LocalIndex(folder, parser, path=tmp_path / "other.db")
    with pytest.raises(Enough):
        index.update(stop)
    assert index.num_documents == 3
    assert index.update().num_added == 2
    index.close()


class _Busy:
    """A parser that has no time until it is said to be ready, and counts."""

    def __init__(self, parser):
        self._parser, self.is_ready, self.num_jobs = parser, False, 0

    def render(self, *arguments):
        self.num_jobs += 1
        if not self.is_ready:
            raise SlowError("the document takes too long to be read")
        return self._parser.render(*arguments)


def test_a_document_that_took_too_long_is_tried_again_after_an_hour_and_at_the_next_start(
    folder, tmp_path, parser, monkeypatch
):
    busy = _Busy(parser)
    index = LocalIndex(folder, busy, path=tmp_path / "index.db")
    assert index.update().num_added == 5 and index.num_failed == 5
    assert index.update().num_unchanged == 5 and busy.num_jobs == 5
    now = time.monotonic()
    monkeypatch.setattr("ossia.tools.web.local_index.time.monotonic", lambda: now + 3700)
    assert index.update().num_unchanged == 5 and busy.num_jobs == 10
    index.close()
    busy.is_ready = True
    index = LocalIndex(folder, busy, path=tmp_path / "index.db")
    update = index.update()
    assert update.num_changed == 5 and update.failed == () and paths(index, "lighthouse") == ["paper.pdf"]
    assert index.update().num_unchanged == 5 and busy.num_jobs == 15
    index.close()


def test_a_file_that_could_not_be_read_for_a_moment_is_read_with_the_next_update(folder, tmp_path, parser, monkeypatch):
    index = LocalIndex(folder, parser, path=tmp_path / "index.db")
    with monkeypatch.context() as moment:
        moment.setattr("ossia.tools.web.local_index._read", lambda path, root: None)
        assert {why for _, why in index.update().failed} == {"it cannot be read"}
    assert index.update().num_changed == 5 and index.num_failed == 0 and paths(index, "lighthouse") == ["paper.pdf"]
    index.close()


def test_a_damaged_document_is_tried_once_in_each_process(folder, tmp_path, parser):
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    ready = _Busy(parser)
    ready.is_ready = True
    for num_jobs in (6, 7):
        index = LocalIndex(folder, ready, path=tmp_path / "index.db")
        for _ in range(2):
            assert index.update().failed == (("bad.pdf", "the PDF is damaged: PdfStreamError"),)
        assert ready.num_jobs == num_jobs
        index.close()


def test_a_document_that_cannot_be_read_is_named_and_not_tried_again(index, folder):
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    update = index.update()
    assert update.failed == (("bad.pdf", "the PDF is damaged: PdfStreamError"),)
    assert index.num_failed == 1 and index.num_documents == 5
    assert index.update().num_unchanged == 6
    (folder / "bad.pdf").write_bytes(_pdf("whole again"))
    assert index.update().failed == () and paths(index, "whole") == ["bad.pdf"]


def test_a_file_that_is_too_large_is_named(index, folder):
    with open(folder / "large.pdf", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    assert index.update().failed == (("large.pdf", "it has more than 128 MiB"),)
    (folder / "large.pdf").write_bytes(_pdf("smaller now"))
    assert index.update().failed == () and paths(index, "smaller") == ["large.pdf"]


def test_nothing_outside_the_folder_is_read(folder, tmp_path, index):
    secret = tmp_path / "secret.txt"
    secret.write_text("topsecret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.txt").write_text("topsecret")
    (folder / "link.txt").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe.txt")
    assert index.update().num_added == 0
    assert paths(index, "topsecret") == []
    # Swapped for a link between the look at the folder and the reading.
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to(secret)
    assert index.read_file("notes.txt") is None
    assert index.read_file("../secret.txt") is None


def test_an_index_that_is_damaged_is_made_anew(folder, tmp_path, parser):
    path = tmp_path / "broken.db"
    path.write_bytes(b"no database at all" * 1000)
    index = LocalIndex(folder, parser, path=path)
    assert index.update().num_added == 5
    index.close()
    again = LocalIndex(folder, parser, path=path)
    assert again.update().num_unchanged == 5
    again.close()


def test_two_processes_may_index_at_once(folder, tmp_path, parser, index):
    other = LocalIndex(folder, parser, path=index.path)
    (folder / "new.txt").write_text("zebra")
    assert index.update().num_added == 1 and other.update().num_added == 0
    assert paths(other, "zebra") == ["new.txt"]
    other.close()
    assert sqlite3.connect(index.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_no_folder_is_refused(tmp_path, parser):
    with pytest.raises(ConfigError, match="is not a folder"):
        LocalIndex(tmp_path / "none", parser)


def test_a_sqlite_without_fts5_says_so(folder, tmp_path, parser, monkeypatch):
    def connect(self):
        raise sqlite3.OperationalError("no such module: fts5")

    monkeypatch.setattr(LocalIndex, "_connect", connect)
    with pytest.raises(UnavailableError, match="no FTS5"):
        LocalIndex(folder, parser, path=tmp_path / "x.db")


# As a back end -------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(folder, tmp_path, parser):
    backend = open_backend(f"local:{folder}", parser=parser, index_folder=tmp_path / "indexes")
    yield backend
    backend.index.close()


def run(browser, name, **arguments):
    import json

    return asyncio.run(browser.run(name, json.dumps(arguments))).text


def test_the_model_browses_a_folder(backend):
    browser = Browser(backend)
    assert "L4:   * 【0†The harbour†my-docs】 The harbour lay still." in run(browser, "search", query="harbour still")
    opened = run(browser, "open", id=0)
    assert opened.startswith("[1] The harbour (local://my-docs/guide/harbour.html)")
    assert "【0†how】 【1†up】" in opened
    assert run(browser, "open", id=0).startswith("[2] Installing (local://my-docs/guide/install.md)")
    assert run(browser, "open", id=1, cursor=1).startswith("[3] Welcome (local://my-docs/README.md)")
    # As it stands in Markdown, and as people write.
    assert run(browser, "open", id="guide/install.md").startswith("[4] Installing")
    assert run(browser, "open", id="local://my-docs/").startswith("[5] Welcome")
    assert "match at L" in run(browser, "find", pattern="guide")
    assert "<title>The harbour</title>" in run(browser, "open", cursor=1, view_source=True)
    assert browser.cite(1, (2, 2)).url == "local://my-docs/guide/harbour.html"


def test_only_documents_of_the_index_are_opened(backend, tmp_path):
    (tmp_path / "secret.txt").write_text("topsecret")
    for url in ("local://my-docs/../secret.txt", "local://my-docs/%2e%2e/secret.txt", "local://my-docs//etc/passwd",
                "local://my-docs/.hidden.md", "local://my-docs/none.md"):  # fmt: skip
        with pytest.raises(NotFoundError, match="there is no document"):
            asyncio.run(backend.fetch(url, Scope()))
    for url in ("local://other/a.md", "file:///etc/passwd", "https://example.com/", "local://my-docs.evil.org/"):
        with pytest.raises(RefusedError, match="only documents of"):
            asyncio.run(backend.fetch(url, Scope()))


def test_domains_hold_for_a_folder_too(backend):
    scope = Scope(Domains.read(["example.com"]))
    assert asyncio.run(backend.search("harbour", 5, scope)) == []
    with pytest.raises(RefusedError):
        asyncio.run(backend.fetch("local://my-docs/README.md", scope))


def test_the_state_of_a_folder_is_told_without_its_words(backend):
    backend.refresh()
    state = asyncio.run(backend_state(backend))
    assert (state["documents"], state["unreadable"], state["key"], state["parsing"]) == (5, 0, "not needed", "works")
    assert set(state["parser"]) == {"landlock", "seccomp"}
    assert state["index_bytes"] > 10_000 and state["backend"].startswith("local:")
