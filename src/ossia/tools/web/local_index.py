"""A folder of HTML, Markdown, text and PDF as a back end: indexed on disk, searched by BM25, no network at all.

    local://docs/guide/start.md     the URL of docs/guide/start.md, where docs is the folder that was named

An index is one SQLite file. It is brought up to date before a search, at most every minute, and only files whose size
or time has changed are read; only those whose content has changed are parsed again. An interrupted run goes on where
it was. Links of symbolic kind, hidden files and files beyond a size are passed by.

Source   SQLite FTS5: contentless tables, bm25().
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ossia.config import data_folder
from ossia.errors import ConfigError, NotFoundError, UnavailableError
from ossia.tools.web.backend import Scope, make_page
from ossia.tools.web.fetch import FetchError
from ossia.tools.web.guard import RefusedError
from ossia.tools.web.page import Hit, Page, clean, merge_space, strip_links
from ossia.tools.web.parse_child import ParseError, Parser, SlowError

T = TypeVar("T")

KINDS = {
    ".html": "html", ".htm": "html", ".xhtml": "html", ".md": "markdown", ".markdown": "markdown", ".txt": "text",
    ".text": "text", ".rst": "text", ".adoc": "text", ".pdf": "pdf",
}  # fmt: skip
MAX_FILE_BYTES = 128 << 20
# Wall time of one document, which is read once, and nobody waits for it as for a page.
TIMEOUT_S = 60.0
_REFRESH_S = 60.0
_RETRY_S = 3600.0
_VERSION = "2"
_COMMIT_EVERY = 100


class Progress(NamedTuple):
    """How far an update is: files looked at, of how many, and the one that was."""

    num_done: int
    num_files: int
    path: str


class Update(NamedTuple):
    """What an update has done."""

    num_added: int
    num_changed: int
    num_removed: int
    num_unchanged: int
    # Files that cannot be read, and why.
    failed: tuple[tuple[str, str], ...]


class LocalIndex:
    """The index of one folder. Its methods block, and may be called from any thread."""

    def __init__(self, root: Path, parser: Parser, *, path: Path | None = None) -> None:
        """``path`` is the file of the index.

        Raises ConfigError if ``root`` is no folder, UnavailableError without FTS5.
        """
        self.root = Path(os.path.abspath(os.path.expanduser(root)))
        if not self.root.is_dir():
            raise ConfigError(f"{root} is not a folder; browser 'local:' expects one with HTML, Markdown, text or PDF")
        if path is None:
            mark = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
            path = data_folder() / "browser" / f"{mark}.db"
        self.path = path
        self._parser = parser
        self._lock = threading.Lock()
        # When a file that failed is tried again, by its path, of the monotonic clock; at once what is not in here.
        self._again_at: dict[str, float] = {}
        # The index holds the documents' words.
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._database = self._open()

    def update(self, progress: Callable[[Progress], None] | None = None) -> Update:
        """Bring the index up to date with the folder."""
        with self._lock:
            return self._update(progress)

    def search(self, query: str, num_hits: int) -> list[tuple[str, str, str]]:
        """Path, title and the passage that fits best, of the documents that do."""
        expression, words = _expression(query)
        if not expression:
            return []
        with self._lock:
            rows = self._database.execute(
                "SELECT docs.path, docs.title, docs.text FROM words JOIN docs ON docs.id = words.rowid "
                "WHERE words MATCH ? ORDER BY bm25(words, 6.0, 1.0, 2.0) LIMIT ?",
                (expression, num_hits),
            ).fetchall()
        return [(path, title, _passage(text, words)) for path, title, text in rows]

    def page(self, path: str) -> tuple[str, str, tuple[str, ...]] | None:
        """Title, text and links of a document; None if it is not in the index."""
        with self._lock:
            row = self._database.execute("SELECT title, text, links FROM docs WHERE path = ?", (path,)).fetchone()
        return None if row is None else (row[0], row[1], tuple(json.loads(row[2])))

    def read_file(self, path: str) -> bytes | None:
        """The bytes of an indexed file; None if it is not there any more."""
        with self._lock:
            known = self._database.execute("SELECT 1 FROM docs WHERE path = ?", (path,)).fetchone()
        return _read(self.root / path, self.root) if known else None

    @property
    def num_documents(self) -> int:
        with self._lock:
            return int(self._database.execute("SELECT count(*) FROM docs WHERE error = ''").fetchone()[0])

    @property
    def num_failed(self) -> int:
        with self._lock:
            return int(self._database.execute("SELECT count(*) FROM docs WHERE error != ''").fetchone()[0])

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.parent.glob(f"{self.path.name}*"))

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # The database ----------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        try:
            database = self._connect()
        except sqlite3.DatabaseError as error:
            if "no such module" in str(error):
                raise UnavailableError(
                    "this Python's SQLite has no FTS5, which indexes need; use another Python"
                ) from None
            if isinstance(error, sqlite3.OperationalError):
                raise UnavailableError(f"{self.path}: the index cannot be opened: {error}") from None
            # A damaged file is no loss: it is made anew from the folder.
            for file in self.path.parent.glob(f"{self.path.name}*"):
                file.unlink()
            database = self._connect()
        return database

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, int(_VERSION)):
                for table in ("docs", "words"):
                    database.execute(f"DROP TABLE IF EXISTS {table}")
            database.executescript(
                "CREATE TABLE IF NOT EXISTS docs (id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, size INTEGER, "
                "mtime_ns INTEGER, hash BLOB, title TEXT, text TEXT, links TEXT, error TEXT);"
                "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(title, text, path, content='', "
                "tokenize='porter unicode61 remove_diacritics 2');"
                f"PRAGMA user_version = {_VERSION};"
            )
        except BaseException:
            database.close()
            raise
        return database

    def _update(self, progress: Callable[[Progress], None] | None) -> Update:
        database = self._database
        files = dict(_files(self.root))
        now = time.monotonic()
        known = {
            path: (size, mtime_ns) if not error or now < self._again_at.get(path, 0.0) else None
            for path, size, mtime_ns, error in database.execute("SELECT path, size, mtime_ns, error FROM docs")
        }
        gone = known.keys() - files.keys()
        stale = [path for path, state in files.items() if known.get(path) != state]
        counts = {"added": 0, "changed": 0, "unchanged": len(files) - len(stale)}
        if gone or stale:
            database.execute("BEGIN IMMEDIATE")
            try:
                for path in gone:
                    self._remove(path)
                for i, path in enumerate(stale, 1):
                    counts[self._take(path, *files[path])] += 1
                    if i % _COMMIT_EVERY == 0:
                        database.execute("COMMIT")
                        database.execute("BEGIN IMMEDIATE")
                    if progress is not None:
                        progress(Progress(i, len(stale), path))
                if len(stale) + len(gone) > 1000:
                    database.execute("INSERT INTO words(words) VALUES ('optimize')")
            finally:
                # What was done is kept, also when the rest was broken off.
                database.execute("COMMIT")
        failed = database.execute("SELECT path, error FROM docs WHERE error != '' ORDER BY path").fetchall()
        return Update(counts["added"], counts["changed"], len(gone), counts["unchanged"], tuple(failed))

    def _take(self, path: str, size: int, mtime_ns: int) -> str:
        """Read a file that is new, seems changed or is tried again."""
        before = self._database.execute("SELECT hash, error FROM docs WHERE path = ?", (path,)).fetchone()
        body = _read(self.root / path, self.root) if size <= MAX_FILE_BYTES else None
        digest = hashlib.sha256(body or b"").digest()
        title, text, error = Path(path).stem, "", ""
        links: tuple[str, ...] = ()
        self._again_at.pop(path, None)
        if body is None:
            is_large = size > MAX_FILE_BYTES
            error = f"it has more than {MAX_FILE_BYTES >> 20} MiB" if is_large else "it cannot be read"
        elif before != (digest, ""):
            try:
                rendered = self._parser.render(KINDS[Path(path).suffix.lower()], body, self.url(path))
                title, text, links = rendered.title or title, rendered.text, rendered.links
            except ParseError as fault:
                error = fault.message
                self._again_at[path] = time.monotonic() + _RETRY_S if isinstance(fault, SlowError) else math.inf
        if before == (digest, error):
            self._database.execute("UPDATE docs SET size = ?, mtime_ns = ? WHERE path = ?", (size, mtime_ns, path))
            return "unchanged"
        self._remove(path)
        cursor = self._database.execute(
            "INSERT INTO docs (path, size, mtime_ns, hash, title, text, links, error) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (path, size, mtime_ns, digest, title, text, json.dumps(links), error),
        )
        if not error:
            self._database.execute(
                "INSERT INTO words (rowid, title, text, path) VALUES (?, ?, ?, ?)",
                (cursor.lastrowid, *_indexed(title, text, path)),
            )
        return "added" if before is None else "changed"

    def _remove(self, path: str) -> None:
        row = self._database.execute("SELECT id, title, text, error FROM docs WHERE path = ?", (path,)).fetchone()
        if row is None:
            return
        number, title, text, error = row
        if not error:
            # A table without content is told what it had.
            self._database.execute(
                "INSERT INTO words (words, rowid, title, text, path) VALUES ('delete', ?, ?, ?, ?)",
                (number, *_indexed(title, text, path)),
            )
        self._database.execute("DELETE FROM docs WHERE id = ?", (number,))

    # URLs ------------------------------------------------------------------------------------------------------------

    @property
    def domain(self) -> str:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.root.name).strip("-.").lower() or "files"

    @property
    def origin(self) -> str:
        return f"local://{self.domain}"

    def url(self, path: str) -> str:
        return f"{self.origin}/{quote(path)}"

    def path_of(self, url: str) -> str | None:
        """The path of a document's URL; None for another's."""
        base, _, _ = url.partition("#")
        if not base.startswith(f"{self.origin}/"):
            return None
        return unquote(urlsplit(base).path).removeprefix("/")


class LocalBackend:
    """Search and pages of a folder."""

    def __init__(
        self,
        root: Path,
        parser: Parser,
        *,
        index_folder: Path | None = None,
        progress: Callable[[Any], None] | None = None,
    ) -> None:
        self._parser = parser
        path = None
        if index_folder is not None:
            mark = hashlib.sha256(os.fsencode(os.path.abspath(os.path.expanduser(root)))).hexdigest()[:16]
            path = index_folder / f"{mark}.db"
        self.index = LocalIndex(root, parser, path=path)
        self._progress = progress
        self._fresh_until = 0.0
        self._refreshing = threading.Lock()
        self._threads = ThreadPoolExecutor(2, "ossia-index")

    @property
    def name(self) -> str:
        return f"local:{self.index.root}"

    def refresh(self) -> Update | None:
        """Bring the index up to date; None if that was done within the last minute. Blocks."""
        with self._refreshing:
            if time.monotonic() < self._fresh_until:
                return None
            update = self.index.update(self._progress)
            self._fresh_until = time.monotonic() + _REFRESH_S
            return update

    async def search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        if not scope.domains.has(self.index.domain):
            return []
        return await self._beside(self._search, query, num_hits)

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        scope.domains.check(self.index.domain)
        await self._beside(self.refresh)
        path = self.index.path_of(url)
        if path is None:
            raise RefusedError(f"only documents of {self.index.origin}/ can be opened here")
        found = await self._beside(self.index.page, path)
        if found is None and (path == "" or path.endswith("/")):
            for name in ("index.html", "index.md", "README.md", "index.htm"):
                if (found := await self._beside(self.index.page, path + name)) is not None:
                    path += name
                    break
        if found is None:
            raise NotFoundError(f"there is no document {path!r}")
        url = self.index.url(path)
        if is_source:
            body = await self._beside(self.index.read_file, path)
            if body is None:
                raise FetchError(f"{path!r} is not there any more")
            return await make_page(self._parser, KINDS[Path(path).suffix.lower()], body, url, is_source=True)
        title, text, links = found
        return Page("page", url, title, f"\nURL: {url}\n{text}", links)

    def describe(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "key": "not needed",
            "pages": "from the index; no network",
            "index": str(self.index.path),
            "index_bytes": self.index.size_bytes,
            "documents": self.index.num_documents,
            "unreadable": self.index.num_failed,
        }

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._parser.close()
        self.index.close()

    async def _beside(self, run: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)
        except sqlite3.Error as error:
            raise UnavailableError(f"the index cannot be read: {error}") from None

    def _search(self, query: str, num_hits: int) -> list[Hit]:
        self.refresh()
        return [
            Hit(self.index.url(path), title, merge_space(passage), passage)
            for path, title, passage in self.index.search(query, num_hits)
        ]


def _files(root: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path below the root, size and time of each file that is indexed; in order, so that progress can be read."""
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        try:
            with closing(os.scandir(folder)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in found:
            if entry.name.startswith(".") or entry.name != clean(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif Path(entry.name).suffix.lower() in KINDS and entry.is_file(follow_symlinks=False):
                try:
                    state = entry.stat(follow_symlinks=False)
                # It has just gone away.
                except FileNotFoundError:
                    continue
                yield os.path.relpath(entry.path, root), (state.st_size, state.st_mtime_ns)


def _read(path: Path, root: Path) -> bytes | None:
    """A regular file within the root, also if somebody has just put a link in its place; None if it is none."""
    try:
        if os.path.realpath(path) != os.path.join(os.path.realpath(root), os.path.relpath(path, root)):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            body = file.read(MAX_FILE_BYTES + 1)
        except OSError:
            return None
        return body if len(body) <= MAX_FILE_BYTES else None


# Words ---------------------------------------------------------------------------------------------------------------

# Written without blanks, or with endings: each character is a word, and a query's run of them a phrase.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f]"
                       "|[\U00020000-\U0003ffff])")  # fmt: skip
_COMMON = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "do", "does", "for", "from", "how", "i", "in", "is",
    "it", "of", "on", "or", "that", "the", "this", "to", "was", "what", "when", "where", "which", "who", "why",
    "will", "with", "you",
})  # fmt: skip
_MAX_WORDS = 32
_PASSAGE_CHARS = 280


def _spaced(text: str) -> str:
    return _UNSPACED.sub(r" \1 ", text)


def _indexed(title: str, text: str, path: str) -> tuple[str, str, str]:
    return _spaced(title), _spaced(strip_links(text)), _spaced(re.sub(r"[/._-]", " ", path))


def _expression(query: str) -> tuple[str, list[str]]:
    """A query as FTS5 reads it, and its words: quoted phrases must be there, of the rest any."""
    phrases = re.findall(r'"([^"]+)"', query)
    words = re.findall(r"\w+", re.sub(r'"[^"]*"', " ", query))
    telling = [word for word in words if word.lower() not in _COMMON] or words
    any_of = [_quoted(word) for word in dict.fromkeys(telling[:_MAX_WORDS])]
    all_of = [quoted for phrase in phrases[:8] if (quoted := _quoted(phrase)) != '""']
    expression = " AND ".join(all_of)
    if any_of and not all_of:
        expression = " OR ".join(any_of)
    return expression, [*telling[:_MAX_WORDS], *(word for phrase in phrases for word in re.findall(r"\w+", phrase))]


def _quoted(text: str) -> str:
    return '"' + " ".join(re.findall(r"\w+", _spaced(text))) + '"'


def _passage(text: str, words: list[str]) -> str:
    """The lines of a document with most of the words in them."""
    plain = strip_links(text)
    # As the index does, words count by their beginnings.
    stems = {word.lower()[: max(4, len(word) - 3)] for word in words if word}
    if not stems:
        return merge_space(plain[:_PASSAGE_CHARS])
    expression = re.compile("|".join(re.escape(stem) for stem in sorted(stems, key=len, reverse=True)), re.IGNORECASE)
    places: list[tuple[int, str]] = []
    for match in expression.finditer(plain):
        places.append((match.start(), match[0].lower()))
        if len(places) >= 2000:
            break
    best, begin = -1, 0
    first = 0
    within: dict[str, int] = {}
    for at, stem in places:
        within[stem] = within.get(stem, 0) + 1
        while places[first][0] < at - _PASSAGE_CHARS * 2 // 3:
            left = places[first][1]
            within[left] -= 1
            if not within[left]:
                del within[left]
            first += 1
        if len(within) > best:
            best, begin = len(within), places[first][0]
    # From the start of the sentence or line, if that is near.
    start = max(plain.rfind("\n", max(begin - 80, 0), begin) + 1, plain.rfind(". ", max(begin - 80, 0), begin) + 2)
    begin = start if start > 1 else max(begin - 40, 0)
    passage = plain[begin : begin + _PASSAGE_CHARS]
    if begin + _PASSAGE_CHARS < len(plain):
        passage = passage.rpartition(" ")[0] or passage
    return passage.strip()
