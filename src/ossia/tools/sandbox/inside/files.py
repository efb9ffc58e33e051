"""Files of the model's folder, handled as what they are: names and links made by an enemy.

No link is followed, nothing outside the folder is reached, nothing but an ordinary file with one name is read.
Source   openat2(2): RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from typing import Any

_OPENAT2 = 437
# BENEATH | NO_SYMLINKS | NO_MAGICLINKS | NO_XDEV
_RESOLVE = 0x08 | 0x04 | 0x02 | 0x01
_MAX_DEPTH = 24
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class Folder:
    """``root`` and what lies below it. Every method raises OSError with a text for people."""

    def __init__(self, root: str) -> None:
        self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._fd)

    def find(self, max_files: int) -> tuple[list[dict[str, Any]], bool]:
        """Ordinary files with their size and time, and whether there are more. Names that are no text are left out."""
        found: list[dict[str, Any]] = []
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            parts = waiting.pop()
            try:
                fd = self._open(parts, _FOLDER)
            except OSError:
                continue
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        if len(found) >= max_files or len(waiting) >= max_files:
                            return found, True
                        self._note(entry, parts, found, waiting)
            finally:
                os.close(fd)
        found.sort(key=lambda one: one["path"])
        return found, False

    def read(self, parts: tuple[str, ...], max_bytes: int) -> bytes:
        fd = self._open(parts, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "is no ordinary file")
            if found.st_nlink != 1:
                raise OSError(errno.EINVAL, "is a file with several names (hard links)")
            if found.st_size > max_bytes:
                raise OSError(errno.EFBIG, f"has {found.st_size} bytes; at most {max_bytes} can be fetched")
            chunks = []
            left = max_bytes + 1
            while left and (chunk := os.read(fd, min(left, 1 << 20))):
                chunks.append(chunk)
                left -= len(chunk)
            if not left:
                raise OSError(errno.EFBIG, f"grows while it is read; at most {max_bytes} bytes can be fetched")
            return b"".join(chunks)
        finally:
            os.close(fd)

    def write(self, parts: tuple[str, ...], data: bytes) -> None:
        """Put a file in place, whole or not at all; what had its name, link or FIFO, is replaced and never opened."""
        folder = self._make_folders(parts[:-1])
        temporary = f".upload-{secrets.token_hex(8)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=folder)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(folder)

    def _note(
        self,
        entry: os.DirEntry[str],
        parts: tuple[str, ...],
        found: list[dict[str, Any]],
        waiting: list[tuple[str, ...]],
    ) -> None:
        try:
            entry.name.encode("utf-8")
            info = entry.stat(follow_symlinks=False)
        except (UnicodeEncodeError, OSError):
            return
        if stat.S_ISDIR(info.st_mode) and len(parts) < _MAX_DEPTH:
            waiting.append((*parts, entry.name))
        elif stat.S_ISREG(info.st_mode):
            path = "/".join((*parts, entry.name))
            found.append({"path": path, "size": info.st_size, "modified": info.st_mtime})

    def _make_folders(self, parts: tuple[str, ...]) -> int:
        """The folder of these names, made where it is not there yet."""
        fd = os.dup(self._fd)
        for part in parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
            try:
                inner = os.open(part, _FOLDER, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def _open(self, parts: tuple[str, ...], flags: int) -> int:
        if not parts:
            return os.open(".", flags, dir_fd=self._fd)
        how = _How(flags, 0, _RESOLVE)
        path = "/".join(parts).encode("utf-8", "surrogateescape")
        fd = _libc.syscall(_OPENAT2, self._fd, path, ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number != errno.ENOSYS:
            if number in (errno.ELOOP, errno.EXDEV):
                raise OSError(number, "is a link, or lies behind one")
            raise OSError(number, os.strerror(number))
        return self._walk(parts, flags)

    def _walk(self, parts: tuple[str, ...], flags: int) -> int:
        """The same for kernels before 5.6: one name at a time, none of them a link."""
        fd = os.dup(self._fd)
        try:
            for part in parts[:-1]:
                inner = os.open(part, _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = inner
            return os.open(parts[-1], flags, dir_fd=fd)
        finally:
            os.close(fd)
