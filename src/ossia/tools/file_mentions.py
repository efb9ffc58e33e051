"""Files of a container that an answer names, as annotations, while the answer streams.

    scanner = FileScanner(container_id, {"plot.png": "cfile_1"}, citations)
    text, annotations = scanner.feed(piece)     ... for each piece; then scanner.finish()

The model writes `/mnt/data/plot.png`, or `sandbox:/mnt/data/plot.png` in a link. The text stays as it is; what names a
file that is there gets

    {"type": "container_file_citation", "container_id", "file_id", "filename", "start_index", "end_index"}

with indices that count characters of the text that comes out and span the path, `sandbox:` included. A name that only
begins like a file's is none of it: `a.csv.gz` does not name `a.csv`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from ossia.tools.web.citations import CitationScanner

_FOLDER, _SCHEME = "/mnt/data/", "sandbox:"
# What would go on with the name, or with the ending of it.
_GOES_ON = re.compile(r"[\w/-]|\.\w")
_NUM_BEHIND = 2


class FileScanner:
    """Reads the text of one answer, behind the scanner of its other citations if there is one."""

    def __init__(self, container_id: str, files: Mapping[str, str], inner: CitationScanner | None = None) -> None:
        """``files`` are ids by their paths below /mnt/data."""
        self._container_id = container_id
        # A link may have them escaped.
        self._files = {written: (path, files[path]) for path in files for written in (quote(path), path)}
        self._sizes = sorted({len(written) for written in self._files}, reverse=True)
        self._inner = inner
        # What may yet become, or go on with, a path; and where it begins in the text.
        self._held, self._begin = "", 0

    def feed(self, text: str) -> tuple[str, Sequence[dict[str, Any]]]:
        """More of the answer: what of it may be shown, and the annotations that are complete with it."""
        annotations: list[dict[str, Any]] = []
        if self._inner is not None:
            text, annotations = self._inner.feed(text)
        return text, [*annotations, *self._find(text, is_end=False)]

    def finish(self) -> tuple[str, Sequence[dict[str, Any]]]:
        """The answer has ended: what was held back."""
        text, annotations = self._inner.finish() if self._inner is not None else ("", [])
        return text, [*annotations, *self._find(text, is_end=True)]

    def _find(self, text: str, *, is_end: bool) -> list[dict[str, Any]]:
        if not self._files:
            return []
        text = self._held + text
        found = []
        at, kept = 0, len(text)
        while (place := text.find(_FOLDER, at)) >= 0:
            begin = place + len(_FOLDER)
            if not is_end and len(text) - begin < self._sizes[0] + _NUM_BEHIND:
                kept = place
                break
            at = begin
            size = next((size for size in self._sizes if self._is_named(text, begin, size)), None)
            if size is not None:
                at = begin + size
                is_link = text.endswith(_SCHEME, 0, place)
                first = self._begin + place - (len(_SCHEME) if is_link else 0)
                found.append(self._annotation(text[begin:at], first, self._begin + at))
        # Half of the folder's name, and the scheme that may stand before it.
        kept = max(at, min(kept - len(_SCHEME), len(text) - len(_FOLDER) - len(_SCHEME)))
        self._held, self._begin = text[kept:], self._begin + kept
        return found

    def _is_named(self, text: str, begin: int, size: int) -> bool:
        return text[begin : begin + size] in self._files and not _GOES_ON.match(text, begin + size)

    def _annotation(self, written: str, begin: int, end: int) -> dict[str, Any]:
        path, file_id = self._files[written]
        return {
            "type": "container_file_citation",
            "container_id": self._container_id,
            "file_id": file_id,
            "filename": path.rpartition("/")[2],
            "start_index": begin,
            "end_index": end,
        }
