"""The patch language that gpt-oss and Codex write: text to operations and back.

    *** Begin Patch
    *** Add File: path              every line that follows begins with +
    *** Delete File: path
    *** Update File: path
    *** Move to: new path           optional
    @@ class A                      optional headers, nested from outer to inner: each names a line of the file
    @@     def f(self):
     context                        ' ' stays, '-' goes, '+' comes
    -old
    +new
    *** End of File                 optional: the hunk is at the file's end
    *** End Patch

Read leniently where the meaning is plain: a heredoc or a code fence around the patch, blanks around its markers, CRLF
from the way it took, git's line numbers in a header and its "\\ No newline at end of file". Everything else is a
PatchError that names the line.

Sources  Codex, apply_patch_tool_instructions.md; the Responses API's `apply_patch_call`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ossia.errors import InputError

MAX_PATCH_CHARS = 4_000_000

BEGIN = "*** Begin Patch"
END = "*** End Patch"
_ADD = "*** Add File:"
_DELETE = "*** Delete File:"
_UPDATE = "*** Update File:"
_MOVE = "*** Move to:"
_END_OF_FILE = "*** End of File"
_FILE_MARKERS = (_ADD, _DELETE, _UPDATE)
_NO_NEWLINE = re.compile(r"\\ No newline at end of file\s*")
_GIT_RANGE = re.compile(r"-\d+(?:,\d+)? \+\d+(?:,\d+)? @@ ?")
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1\s*")
_FENCE = re.compile(r"(`{3,}|~{3,})[\w-]*\s*")
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class PatchError(InputError):
    """The patch cannot be read or does not fit the files; the message is for whoever wrote it."""

    code = "invalid_patch"


class HunkLine(NamedTuple):
    """One line of a hunk: ' ' stays, '-' goes, '+' comes."""

    kind: Literal[" ", "-", "+"]
    text: str


@dataclass(frozen=True)
class Hunk:
    """One place of a file and what changes there."""

    lines: tuple[HunkLine, ...]
    # Lines of the file above the hunk, outer before inner.
    headers: tuple[str, ...] = ()
    is_at_end: bool = False
    # Whether the file then ends with a line break; None keeps what it has.
    final_newline: bool | None = None
    # Where the hunk begins in the patch, counted from 1; 0 if it was not read from one.
    line: int = 0

    @property
    def old(self) -> list[str]:
        """The lines that have to be there."""
        return [line.text for line in self.lines if line.kind != "+"]


@dataclass(frozen=True)
class Add:
    """A new file."""

    path: str
    lines: tuple[str, ...]
    final_newline: bool = True

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + ("\n" if self.lines and self.final_newline else "")


@dataclass(frozen=True)
class Delete:
    """A file that goes."""

    path: str


@dataclass(frozen=True)
class Update:
    """A file that changes, or moves, or both."""

    path: str
    hunks: tuple[Hunk, ...]
    move_to: str | None = None


Operation = Add | Delete | Update


def parse_patch(text: str) -> tuple[Operation, ...]:
    """The operations of a patch, in order; at least one. Raises PatchError."""
    if len(text) > MAX_PATCH_CHARS:
        raise PatchError(f"the patch has {len(text):,} characters; expected at most {MAX_PATCH_CHARS:,}; split it")
    return _Reader(_body(text)).read()


def patch_argument(arguments: str) -> str:
    """The patch in what a model sent as its call's arguments: the patch itself, or JSON around it."""
    stripped = arguments.strip()
    if stripped[:1] not in ("{", '"', "["):
        return arguments
    try:
        value = json.loads(stripped, strict=False)
    except (ValueError, RecursionError):
        raise PatchError(
            f"the arguments are not valid JSON; send the patch alone, from {BEGIN!r} to {END!r}, or as a JSON string"
        ) from None
    texts = list(_texts(value))
    patches = [one for one in texts if BEGIN in one] or texts
    if len(patches) != 1:
        raise PatchError(f"the arguments hold {len(patches)} texts that could be the patch; expected one")
    return patches[0]


def render_patch(operations: Iterable[Operation]) -> str:
    """The patch that says the operations."""
    out = [BEGIN]
    for operation in operations:
        if isinstance(operation, Delete):
            out.append(f"{_DELETE} {operation.path}")
        elif isinstance(operation, Add):
            out += [f"{_ADD} {operation.path}", *_added(operation)]
        else:
            out.append(f"{_UPDATE} {operation.path}")
            if operation.move_to is not None:
                out.append(f"{_MOVE} {operation.move_to}")
            out += _hunk_lines(operation.hunks)
    return "\n".join([*out, END]) + "\n"


# The Responses API -----------------------------------------------------------------------------------------------


def to_call_operation(operation: Operation) -> dict[str, str]:
    """The `operation` of an `apply_patch_call`. Raises PatchError for a move, which the API does not have."""
    if isinstance(operation, Delete):
        return {"type": "delete_file", "path": operation.path}
    if isinstance(operation, Add):
        return {"type": "create_file", "path": operation.path, "diff": "\n".join(_added(operation))}
    if operation.move_to is not None:
        raise PatchError(
            f"{operation.path}: files cannot be moved here; delete it and add {operation.move_to} with its whole text"
        )
    return {"type": "update_file", "path": operation.path, "diff": "\n".join(_hunk_lines(operation.hunks))}


def from_call_operation(operation: Mapping[str, Any], param: str = "operation") -> Operation:
    """The operation that an `apply_patch_call` of the API carries. Raises InputError with ``param``."""
    kind, path, diff = operation.get("type"), operation.get("path"), operation.get("diff")
    if kind not in ("create_file", "update_file", "delete_file"):
        raise InputError(
            f"{param}.type is {kind!r}; expected create_file, update_file or delete_file", param=f"{param}.type"
        )
    if not isinstance(path, str):
        raise InputError(f"{param}.path is {path!r}; expected a text", param=f"{param}.path")
    if kind != "delete_file" and not isinstance(diff, str):
        raise InputError(f"{param}.diff is {diff!r}; expected a text", param=f"{param}.diff")
    try:
        path = check_path(path)
        if kind == "delete_file":
            return Delete(path)
        lines = _without_carriage_returns(str(diff).split("\n"))
        marker = _ADD if kind == "create_file" else _UPDATE
        if lines and lines[-1] == "":
            lines.pop()
        read, *more = _Reader([BEGIN, f"{marker} {path}", *lines, END], first_line=-1).read()
        if more:
            raise PatchError(f"the diff goes on to {more[0].path!r}; expected {path!r} alone")
        return read
    except PatchError as error:
        raise InputError(f"{param}: {error.message}", param=f"{param}.diff") from error


def call_output_text(item: Mapping[str, Any]) -> str:
    """What the model is told of an `apply_patch_call_output`."""
    output = item.get("output")
    if isinstance(output, str) and output:
        return output
    return "Done!" if item.get("status") == "completed" else "Error: the patch was not applied."


# Reading ---------------------------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, lines: Sequence[str], first_line: int = 1) -> None:
        self._lines = lines
        self._first_line = first_line
        # The first line is the Begin marker, the last the End marker.
        self._at = 1
        self._end = len(lines) - 1

    def read(self) -> tuple[Operation, ...]:
        operations: list[Operation] = []
        while self._at < self._end:
            line = self._lines[self._at].strip()
            if not line:
                self._at += 1
            elif line.startswith(_ADD):
                operations.append(self._add(self._marked_path(_ADD)))
            elif line.startswith(_DELETE):
                operations.append(Delete(self._marked_path(_DELETE)))
            elif line.startswith(_UPDATE):
                operations.append(self._update(self._marked_path(_UPDATE)))
            else:
                raise self._error(
                    f"{_short(line)} is no operation; expected '{_ADD} <path>', '{_UPDATE} <path>' or "
                    f"'{_DELETE} <path>'"
                )
        if not operations:
            raise PatchError(f"the patch is empty; expected an operation such as '{_UPDATE} <path>'")
        return tuple(operations)

    def _marked_path(self, marker: str) -> str:
        path = check_path(self._lines[self._at].strip().removeprefix(marker), self._number)
        self._at += 1
        return path

    def _add(self, path: str) -> Add:
        lines = []
        final_newline = True
        while self._at < self._end and (line := self._lines[self._at]).startswith("+"):
            lines.append(line[1:])
            self._at += 1
        if self._at < self._end and lines and _NO_NEWLINE.fullmatch(self._lines[self._at]):
            final_newline = False
            self._at += 1
        if self._at < self._end and self._lines[self._at].rstrip() == _END_OF_FILE:
            self._at += 1
        if (rest := self._next_text()) is not None and not rest.strip().startswith(_FILE_MARKERS):
            raise self._error(f"{_short(rest)} in a new file; expected every line of {path} to begin with '+'")
        return Add(path, tuple(lines), final_newline)

    def _update(self, path: str) -> Update:
        move_to = None
        if self._at < self._end and self._lines[self._at].strip().startswith(_MOVE):
            move_to = self._marked_path(_MOVE)
        hunks: list[Hunk] = []
        while (line := self._next_text()) is not None and not self._is_file_marker(line, in_hunk=bool(hunks)):
            hunks.append(self._hunk())
        if not hunks and move_to is None:
            raise self._error(f"the update of {path} has no hunk; expected '@@' and lines with ' ', '-' or '+'")
        return Update(path, tuple(hunks), move_to)

    def _hunk(self) -> Hunk:
        start = self._number
        headers = []
        while self._at < self._end and (line := self._lines[self._at]).startswith("@@"):
            # The indentation behind "@@ " belongs to the line of the file.
            header = line.removeprefix("@@").removeprefix(" ")
            if git_range := _GIT_RANGE.match(header):
                header = header[git_range.end() :]
            if header.strip():
                headers.append(header)
            self._at += 1
        lines: list[HunkLine] = []
        is_at_end = False
        old_newline = new_newline = True
        while self._at < self._end:
            line = self._lines[self._at]
            if line.startswith("@@") or self._is_file_marker(line, in_hunk=True):
                break
            if line.rstrip() == _END_OF_FILE:
                is_at_end = True
                self._at += 1
                break
            if _NO_NEWLINE.fullmatch(line) and lines:
                old_newline = old_newline and lines[-1].kind == "+"
                new_newline = new_newline and lines[-1].kind == "-"
            elif line == "":
                lines.append(HunkLine(" ", ""))
            elif line[0] in " -+":
                lines.append(HunkLine(line[0], line[1:]))  # type: ignore[arg-type]  # one of the three
            else:
                raise self._error(
                    f"{_short(line)} begins with {line[0]!r}; expected ' ' (context), '-' (goes), '+' (comes), "
                    "'@@' or a line with '*** '"
                )
            self._at += 1
        if not lines:
            raise self._error("the hunk has no lines; expected lines that begin with ' ', '-' or '+'", start)
        final_newline = None if old_newline and new_newline else new_newline
        return Hunk(tuple(lines), tuple(headers), is_at_end, final_newline, start)

    def _is_file_marker(self, line: str, *, in_hunk: bool) -> bool:
        # Inside a hunk a leading blank makes a line of context of it.
        return (line if in_hunk else line.strip()).startswith(_FILE_MARKERS)

    def _next_text(self) -> str | None:
        """The next line that is not blank, where the reader then stands; None at the end."""
        while self._at < self._end and not self._lines[self._at].strip():
            self._at += 1
        return self._lines[self._at] if self._at < self._end else None

    @property
    def _number(self) -> int:
        return self._at + self._first_line

    def _error(self, message: str, line: int | None = None) -> PatchError:
        return PatchError(f"line {line or self._number} of the patch: {message}")


def _body(text: str) -> list[str]:
    """The lines from Begin to End, both included, out of whatever was wrapped around them."""
    lines = _without_carriage_returns(text.split("\n"))
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise PatchError(f"the patch is empty; expected {BEGIN!r}, operations and {END!r}")
    last = max(i for i, line in enumerate(lines) if line.strip())
    # From the outside in: ```; apply_patch <<'EOF' ... EOF.
    for _ in range(3):
        if first < last and _wraps(lines[first].strip(), lines[last].strip()):
            first, last = _inner(lines, first, last)
    if lines[first].strip() != BEGIN:
        raise PatchError(f"the patch begins with {_short(lines[first])}; expected the line {BEGIN!r}")
    if lines[last].strip() != END or last == first:
        raise PatchError(f"the patch ends with {_short(lines[last])}; expected the line {END!r}: was it cut off?")
    return lines[first : last + 1]


def _wraps(opening: str, closing: str) -> bool:
    if fence := _FENCE.fullmatch(opening):
        return closing == fence[1]
    heredoc = _HEREDOC.search(opening)
    return heredoc is not None and closing == heredoc[2]


def _inner(lines: Sequence[str], first: int, last: int) -> tuple[int, int]:
    inner = [i for i in range(first + 1, last) if lines[i].strip()]
    return (inner[0], inner[-1]) if inner else (last, last)


def _without_carriage_returns(lines: list[str]) -> list[str]:
    """The lines of a text whose every line break is CRLF without the CR; others as they are."""
    broken = lines[:-1] if lines[-1] == "" or not lines[-1].endswith("\r") else lines
    if broken and all(line.endswith("\r") for line in broken):
        return [line.removesuffix("\r") for line in lines]
    return lines


def check_path(written: str, line: int = 0) -> str:
    """A path as it is shown and used: relative, without '.', '..' and empty parts. Raises PatchError."""
    path = written.strip()
    where = f"line {line} of the patch: " if line else ""
    if not path:
        raise PatchError(f"{where}the path is missing")
    if _CONTROL.search(path):
        raise PatchError(f"{where}the path {path!r} has a control character; expected none")
    if path.startswith("/") or re.match(r"[A-Za-z]:[\\/]", path):
        raise PatchError(f"{where}the path {path!r} is absolute; expected one relative to the folder")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PatchError(f"{where}the path {path!r} has '..'; expected one that stays within the folder")
    if path.endswith("/") or not parts or path.endswith("/."):
        raise PatchError(f"{where}the path {path!r} is a folder; expected a file")
    return "/".join(parts)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def _added(operation: Add) -> list[str]:
    tail = [] if operation.final_newline or not operation.lines else ["\\ No newline at end of file"]
    return ["+" + line for line in operation.lines] + tail


def _hunk_lines(hunks: Iterable[Hunk]) -> list[str]:
    out = []
    for hunk in hunks:
        out += [f"@@ {header}" for header in hunk.headers] or ["@@"]
        # The marker stands behind the last line of the side that has no final line break.
        marked = {True: "-", False: " +"}.get(hunk.final_newline, "")  # type: ignore[arg-type]
        last = max((i for i, line in enumerate(hunk.lines) if line.kind in marked), default=-1)
        for i, line in enumerate(hunk.lines):
            out.append(line.kind + line.text)
            if i == last:
                out.append("\\ No newline at end of file")
        if hunk.is_at_end:
            out.append(_END_OF_FILE)
    return out


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "…")
