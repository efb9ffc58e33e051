"""Find the place that a hunk means in a file, and put its lines there.

Lines are what lies between line feeds; a form feed or U+2028 breaks none, and a CR before the line feed belongs to the
line break. A line of the file that a hunk only shows stays as it is, however loosely it was matched; a line that comes
gets the line break of its neighbours.

A place is looked for in four degrees: exactly, without trailing blanks, without leading ones, with typographic
punctuation read as ASCII. The first degree that finds it decides. Two places are an error, never a guess.

Source   Codex, codex-rs/apply-patch (the degrees and what `*** End of File` means).
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ossia.tools.patch_format import Hunk, PatchError

# Windows programs put it at a file's beginning; models leave it out.
_BOM = "\ufeff"
_PUNCTUATION = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
    | dict.fromkeys("\u2018\u2019\u201a\u201b", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
    | dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " ")
)
_DEGREES: tuple[Callable[[str], str], ...] = (
    lambda line: line,
    lambda line: line.removeprefix(_BOM).rstrip(),
    lambda line: line.removeprefix(_BOM).strip(),
    lambda line: line.removeprefix(_BOM).translate(_PUNCTUATION).strip(),
)
# Shown to the model when a place is not found.
_NUM_SHOWN_LINES = 8
_MAX_SHOWN_CHARS = 160
_MAX_SHOWN_PLACES = 5
# A line that occurs more often says nothing about the place.
_MAX_VOTES = 200
_MAX_COMPARED_LINES = 4_000


class Line(NamedTuple):
    """One line of a file and what ends it: a line feed, CR and line feed, or nothing at the file's end."""

    text: str
    ending: str


def split_lines(text: str) -> list[Line]:
    """The lines of a text; joined they are the text again."""
    pieces = text.split("\n")
    lines = [
        Line(piece[:-1], "\r\n") if piece.endswith("\r") else Line(piece, "\n")
        for piece in pieces[:-1]
    ]  # fmt: skip
    return [*lines, Line(pieces[-1], "")] if pieces[-1] else lines


def apply_hunks(text: str, hunks: Sequence[Hunk], path: str) -> str:
    """The text with all hunks applied, in order. Raises PatchError naming the hunk and what was found instead."""
    lines = split_lines(text)
    has_final_newline = not lines or lines[-1].ending != ""
    finder = _Finder([line.text for line in lines])
    common = Counter(line.ending for line in lines if line.ending).most_common(1)
    default_ending = common[0][0] if common else "\n"
    out: list[Line] = []
    done = 0
    for number, hunk in enumerate(hunks, start=1):
        where = f"{path}, hunk {number} of {len(hunks)}" + (f" (line {hunk.line} of the patch)" if hunk.line else "")
        # Hunks of one file follow one another.
        hunk, start = _placed(finder, hunk, done, where)
        out += lines[done:start]
        done = _merge(hunk, lines, start, out, default_ending)
        if hunk.final_newline is not None:
            if done != len(lines):
                raise PatchError(
                    f"{where}: 'No newline at end of file' stands where the file goes on with line {done + 1}"
                )
            has_final_newline = hunk.final_newline
    out += lines[done:]
    # Only the last line may lack its break.
    out = [line if line.ending else Line(line.text, default_ending) for line in out]
    if out and not has_final_newline:
        out[-1] = Line(out[-1].text, "")
    changed = "".join(line.text + line.ending for line in out)
    return _BOM + changed if text.startswith(_BOM) and not changed.startswith(_BOM) else changed


def _merge(hunk: Hunk, lines: Sequence[Line], at: int, out: list[Line], default_ending: str) -> int:
    """Append to ``out`` what the hunk makes of the lines from ``at``; returns where the next line is."""
    # A replaced line hands its ending to the one that takes its place.
    endings: list[str] = []
    for kind, text in hunk.lines:
        if kind == "+":
            if endings:
                ending = endings.pop(0)
            else:
                neighbour = out[-1].ending if out else ""
                ending = neighbour or (lines[at].ending if at < len(lines) else "") or default_ending
            out.append(Line(text.removesuffix("\r"), ending or default_ending))
        elif kind == "-":
            endings.append(lines[at].ending)
            at += 1
        else:
            endings.clear()
            out.append(lines[at])
            at += 1
    return at


def _placed(finder: _Finder, hunk: Hunk, start: int, where: str) -> tuple[Hunk, int]:
    """The hunk and the index of its first line; without context at its end that only stood for the file's end."""
    while True:
        places = finder.places(hunk, start)
        if len(places) == 1:
            return hunk, places[0]
        if len(places) > 1:
            raise PatchError(f"{where}: {finder.ambiguous(hunk, places)}")
        last = hunk.lines[-1] if len(hunk.lines) > 1 else None
        if last is None or last.kind != " " or last.text.strip() or len(hunk.old) < 2:
            raise PatchError(f"{where}: {finder.missing(hunk, start)}")
        hunk = Hunk(hunk.lines[:-1], hunk.headers, hunk.is_at_end, hunk.final_newline, hunk.line)


class _Finder:
    """The lines of one file, looked up in four degrees of looseness."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines
        # For each degree the lines as it reads them, and where each stands.
        self._read: dict[int, tuple[list[str], dict[str, list[int]]]] = {}

    def places(self, hunk: Hunk, start: int) -> list[int]:
        """Where the hunk's first line may be, from ``start`` on: one place, none, or several that fit as well."""
        if not hunk.headers:
            if not hunk.old:
                return [len(self._lines)]
            return self._find(hunk.old, start, hunk.is_at_end)
        found = set()
        for below in self._below_headers(hunk.headers):
            if not hunk.old:
                found.add(len(self._lines) if hunk.is_at_end else below)
            # A header above the place reached is that of an earlier hunk, repeated.
            elif places := self._find(hunk.old, max(below, start), hunk.is_at_end):
                # A header is there to choose among places: the first below it is meant.
                found.add(places[0])
        return sorted(place for place in found if place >= start)

    def _below_headers(self, headers: Sequence[str]) -> list[int]:
        """Where the file goes on below the headers: for each line that may be the outermost, the nearest others."""
        outer, *inner = headers
        found = []
        for at in self._find_header(outer, 0):
            below = at + 1
            for header in inner:
                at = min(self._find_header(header, below), default=-1)
                if at < 0:
                    break
                below = at + 1
            else:
                found.append(below)
        return found

    def _find_header(self, header: str, start: int) -> list[int]:
        if found := self._find([header], start, False):
            return found
        # Half a line, as git cuts it and as models quote it.
        text = header.strip()
        return [i for i in range(start, len(self._lines)) if self._lines[i].strip().startswith(text)]

    def _find(self, wanted: Sequence[str], start: int, is_at_end: bool) -> list[int]:
        for degree, read in enumerate(_DEGREES):
            pattern = [read(line) for line in wanted]
            lines, index = self._at_degree(degree)
            if is_at_end:
                at = len(lines) - len(pattern)
                if at >= start and lines[at:] == pattern:
                    return [at]
                continue
            # Look where the rarest of the lines stands.
            rarest = min(range(len(pattern)), key=lambda k: len(index.get(pattern[k], ())))
            found = [
                i - rarest
                for i in index.get(pattern[rarest], ())
                if i - rarest >= start and lines[i - rarest : i - rarest + len(pattern)] == pattern
            ]
            if found:
                return found
        return []

    def _at_degree(self, degree: int) -> tuple[list[str], dict[str, list[int]]]:
        if degree not in self._read:
            lines = [_DEGREES[degree](line) for line in self._lines]
            index: dict[str, list[int]] = {}
            for i, line in enumerate(lines):
                index.setdefault(line, []).append(i)
            self._read[degree] = lines, index
        return self._read[degree]

    # -- what went wrong ---------------------------------------------------------------------------

    def ambiguous(self, hunk: Hunk, places: Sequence[int]) -> str:
        shown = ", ".join(str(place + 1) for place in places[:_MAX_SHOWN_PLACES])
        more = f" and {len(places) - _MAX_SHOWN_PLACES} more" if len(places) > _MAX_SHOWN_PLACES else ""
        return (
            f"its lines fit {len(places)} places, at lines {shown}{more} of the file; add lines of context, or a "
            "header such as '@@ class A' and '@@ def f' that is above the one you mean"
        )

    def missing(self, hunk: Hunk, start: int) -> str:
        """Why the hunk has no place, with the lines of the file that are nearest."""
        headers = hunk.headers
        for i, header in enumerate(headers):
            if not self._find_header(header, 0):
                return f"no line of the file is the header {_shown(header)}{self._nearest([header])}"
            if i and not self._below_headers(headers[: i + 1]):
                return f"below {_shown(headers[i - 1])} no line of the file is the header {_shown(header)}"
        if not hunk.old:
            return f"the header {_shown(headers[-1])} stands above an earlier hunk; expected hunks in the file's order"
        if hunk.is_at_end and (elsewhere := self._find(hunk.old, 0, False)):
            return (
                f"'*** End of File' follows, but its lines are at line {elsewhere[0] + 1} and the file has "
                f"{len(self._lines)}; leave out the marker or give the last lines"
            )
        if elsewhere := self._find(hunk.old, 0, False):
            return (
                f"its lines are at line {elsewhere[0] + 1} of the file, above "
                + (f"the header {_shown(headers[-1])}" if headers and elsewhere[0] >= start else "an earlier hunk")
                + "; expected hunks in the file's order, each below its header"
            )
        below = f" below the header {_shown(headers[-1])}" if headers else ""
        return f"its lines are not in the file{below}{self._nearest(hunk.old)}"

    def _nearest(self, wanted: Sequence[str]) -> str:
        if not self._lines:
            return "; the file is empty"
        at = self._most_alike(wanted)
        if at is None:
            return f"; nothing like it is there. The file has {len(self._lines)} lines; look at it again"
        window = self._lines[at : at + len(wanted)]
        wrong = next((k for k, line in enumerate(window) if line.strip() != wanted[k].strip()), None)
        if wrong is None:
            said = f"; the file ends after line {at + len(window)}, where {_shown(wanted[len(window)])} was expected"
        else:
            said = f"; expected {_shown(wanted[wrong])}, line {at + wrong + 1} is {_shown(window[wrong])}"
        first = max(0, at + (wrong or 0) - _NUM_SHOWN_LINES // 2)
        near = self._lines[first : first + _NUM_SHOWN_LINES]
        listing = "".join(f"\n{first + k + 1:6}: {line[:_MAX_SHOWN_CHARS]}" for k, line in enumerate(near))
        return f"{said}. The nearest lines of the file:{listing}"

    def _most_alike(self, wanted: Sequence[str]) -> int | None:
        """Where most of the wanted lines stand as wanted; else where the line most like one of them stands."""
        _, index = self._at_degree(len(_DEGREES) - 1)
        votes: Counter[int] = Counter()
        for k, line in enumerate(wanted):
            key = _DEGREES[-1](line)
            here = index.get(key, ())
            if key and len(here) <= _MAX_VOTES:
                votes.update(i - k for i in here if i >= k)
        if votes:
            return min(votes, key=lambda at: (-votes[at], at))
        known = [line for line in index if line and len(line) <= _MAX_SHOWN_CHARS][:_MAX_COMPARED_LINES]
        for k, line in enumerate(wanted[:_NUM_SHOWN_LINES]):
            if close := difflib.get_close_matches(_DEGREES[-1](line)[:_MAX_SHOWN_CHARS], known, n=1):
                return max(0, index[close[0]][0] - k)
        return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…")
