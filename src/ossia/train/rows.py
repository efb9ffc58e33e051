"""Lines of JSONL files, a few at a time, from any position on; plain or gzip, one file or a folder of them.

A line that cannot be read is a `Line` with a fault and never an exception, so that whoever reads decides what becomes
of it. A position is a few numbers: a plain file goes on at a byte, a compressed one is decompressed up to there.

Several files are read side by side in proportion to their sizes, so that a folder of unlike files comes well mixed, or
one after the other.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from ossia.errors import InputError, NotFoundError

Json = dict[str, Any]

MAX_ROW_BYTES = 64 << 20
"""A longer line is a fault: it is no conversation that a model could read."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_FOREIGN_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Files that are read side by side; more wait for their turn.
_MAX_OPEN = 64


class Line(NamedTuple):
    """One line that is not blank, or what keeps it from being read."""

    file: str
    number: int
    data: bytes
    fault: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


def find_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that a path, or each of several, stands for: itself, or all JSONL files below a folder, by name.

    Raises NotFoundError for a path that is not there, InputError for a folder without such files.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    found: list[Path] = []
    for one in map(Path, paths):
        if one.is_dir():
            inside = sorted(p for p in one.rglob("*") if p.name.endswith(SUFFIXES) and not _is_hidden(p, one))
            if not inside:
                raise InputError(f"{one}: no file in this folder ends in one of: {', '.join(SUFFIXES)}")
            found += inside
        elif one.is_file():
            found.append(one)
        elif one.exists():
            raise InputError(f"{one}: no regular file; training reads its files more than once")
        else:
            raise NotFoundError(f"{one}: no such file or folder")
    if not found:
        raise InputError("no file of training data was named; expected at least one")
    return found


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def random_order(num: int, *seed: int) -> list[int]:
    """The numbers below ``num`` in an order that depends on the seed alone, whatever the versions of libraries."""
    begin = hashlib.blake2b(repr(seed).encode(), digest_size=16).digest()

    def drawn(i: int) -> bytes:
        return hashlib.blake2b(i.to_bytes(8, "little"), digest_size=16, key=begin).digest()

    return sorted(range(num), key=drawn)


def parse(line: Line) -> Any:
    """The JSON value of a line. Raises InputError, without the place, for what is no clean JSON."""
    if line.fault:
        raise InputError(line.fault)
    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {line.data[error.start]:#04x} at position {error.start} is no UTF-8; convert the file, such as with "
            "`iconv -f latin1 -t utf-8`"
        ) from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        half = _half_character(value) if _HALF_CHARACTER.search(text) else ""
    except json.JSONDecodeError as error:
        raise InputError(f"no JSON: {error.msg} at character {error.pos + 1}{_hint(text)}") from None
    except RecursionError:
        raise InputError("no JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        # What the hooks raise; and numbers of more digits than Python converts.
        raise InputError(f"no clean JSON: {error}") from None
    if half:
        raise InputError(f"half a character ({half!r}) stands in a text; expected whole ones")
    return value


class RowStream:
    """The lines of files in order; with a ``seed`` files in a random order, side by side in groups.

    ``position`` is what `seek` goes on from, as JSON values. After the last line ``next`` gives None.
    """

    def __init__(self, files: Sequence[Path], *, seed: Sequence[int] | None = None) -> None:
        order = range(len(files)) if seed is None else random_order(len(files), *seed)
        ordered = [files[i] for i in order]
        size = 1 if seed is None else _MAX_OPEN
        self._groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        self._sizes = [sum(_kind(path).size for path in group) for group in self._groups]
        self._group = 0
        self._open: list[_File] = []
        self._enter(0, None)

    @property
    def position(self) -> Json:
        return {"group": self._group, "files": [file.position for file in self._open]}

    def seek(self, position: Json) -> None:
        self._enter(position["group"], position["files"])

    def next(self) -> Line | None:
        while self._group < len(self._groups):
            rest = [file for file in self._open if not file.is_done]
            if not rest:
                self._enter(self._group + 1, None)
                continue
            line = min(rest, key=lambda file: file.progress).next()
            if line is not None:
                return line
        return None

    @property
    def fraction(self) -> float:
        """About how much of all lines is read, by bytes."""
        before = sum(self._sizes[: self._group])
        return (before + sum(file.num_bytes for file in self._open)) / sum(self._sizes)

    def close(self) -> None:
        for file in self._open:
            file.close()

    def __iter__(self) -> Iterator[Line]:
        while (line := self.next()) is not None:
            yield line

    def _enter(self, group: int, positions: Sequence[Sequence[int]] | None) -> None:
        self.close()
        self._group = group
        paths = self._groups[group] if group < len(self._groups) else []
        self._open = [_File(path) for path in paths]
        for file, position in zip(self._open, positions or (), strict=False):
            file.seek(*position)


class _File:
    """One file, opened when its first line is wanted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = str(path)
        self._file: IO[bytes] | None = None
        self._offset = 0
        self._number = 0
        self._num_rows = 0
        self.is_done = False
        self._is_gzip, self._size = _kind(path)

    @property
    def position(self) -> list[int]:
        return [self._offset, self._number, self._num_rows, int(self.is_done)]

    @property
    def progress(self) -> float:
        return self._offset / self._size

    @property
    def num_bytes(self) -> int:
        """Bytes that are read, of ``_kind``'s size."""
        return self._size if self.is_done else min(self._offset, self._size)

    def seek(self, offset: int, number: int, num_rows: int, is_done: int) -> None:
        self.close()
        self._offset, self._number, self._num_rows, self.is_done = offset, number, num_rows, bool(is_done)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def next(self) -> Line | None:
        """The next line that is not blank; None at the end."""
        try:
            if self._file is None:
                self._file = self._opened()
            while True:
                data = self._file.readline(MAX_ROW_BYTES + 1)
                if not data:
                    return self._end("" if self._num_rows else "the file is empty; expected a JSON object on each line")
                self._number += 1
                self._offset += len(data)
                if len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):
                    self._num_rows += 1
                    length = self._skip_rest(len(data))
                    return self._line(b"", f"a line of {length} bytes; at most {MAX_ROW_BYTES} are read")
                if self._number == 1:
                    if foreign := _FOREIGN_BOMS.get(data[:2]):
                        return self._end(
                            f"the file is {foreign}; convert it, such as with `iconv -f {foreign} -t utf-8`"
                        )
                    data = data.removeprefix(_UTF8_BOM)
                if data := data.strip():
                    self._num_rows += 1
                    return self._line(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return self._end(f"the compressed data is damaged after this line: {error}")
        except OSError as error:
            return self._end(f"the file cannot be read: {error.strerror or error}")

    def _opened(self) -> IO[bytes]:
        file = cast("IO[bytes]", gzip.GzipFile(self._path) if self._is_gzip else self._path.open("rb"))
        file.seek(self._offset)
        return file

    def _skip_rest(self, length: int) -> int:
        assert self._file is not None
        while data := self._file.readline(MAX_ROW_BYTES):
            length += len(data)
            self._offset += len(data)
            if data.endswith(b"\n"):
                break
        return length

    def _line(self, data: bytes, fault: str = "") -> Line:
        return Line(self._name, self._number, data, fault)

    def _end(self, fault: str) -> Line | None:
        self.is_done = True
        self.close()
        return self._line(b"", fault) if fault else None


class _Kind(NamedTuple):
    is_gzip: bool
    # About how many bytes of lines it holds: the measure of its progress.
    size: int


def _kind(path: Path) -> _Kind:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(2) != _GZIP_MAGIC:
                return _Kind(False, max(size, 1))
            # gzip ends in the size of what was compressed, modulo 2^32 and of the last member alone.
            file.seek(-min(size, 4), 2)
            return _Kind(True, max(int.from_bytes(file.read(4), "little"), size))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _object(pairs: list[tuple[str, Any]]) -> Json:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def _half_character(value: Any) -> str:
    """The first text with half of a surrogate pair in a JSON value, shortened; "" for none."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return value[max(error.start - 10, 0) : error.start + 10]
        return ""
    if isinstance(value, Mapping):
        return next((half for pair in value.items() for one in pair if (half := _half_character(one))), "")
    return next((half for one in value if (half := _half_character(one))), "") if isinstance(value, list) else ""


def _hint(text: str) -> str:
    if text in ("[", "{") or text.endswith((",", "[", "{")):
        return "; the file seems to be JSON over several lines; make it one object a line, such as with `jq -c '.[]'`"
    return ""
