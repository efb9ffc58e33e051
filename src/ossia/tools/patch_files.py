"""A patch applied to a folder: all of it or nothing, and nothing outside of the folder.

    folder = PatchFolder(Path("project"))
    plan = folder.plan(patch_text)      reads, changes nothing; plan.changes is what a person is shown
    plan.commit()                       writes exactly that, or raises and leaves every file as it was

Every path is opened part by part below an open descriptor of the folder and no symbolic link is followed, so that a
link put there between two looks leads nowhere. New contents are written beside their files, old ones are kept by a
hard link, and a journal says how to go back; what a killed process left half done is undone when the folder is next
patched. One patch at a time: an advisory lock on the folder keeps others waiting.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ossia.errors import NotFoundError
from ossia.tools.patch_format import Add, Delete, Operation, PatchError, Update, check_path, parse_patch
from ossia.tools.patch_match import apply_hunks, split_lines

MAX_FILE_BYTES = 16 << 20
# Names that are ossia's own while a patch is under way.
_OURS = ".ossia-patch-"
# Git runs what lies here.
_PROTECTED = (".git",)
_LOCK_WAIT_S = 20.0
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DIFF_LINES = 20_000


class Identity(NamedTuple):
    """What a file was when it was read; anything else in its place is another file."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Change:
    """What happens to one file: A comes, M changes (and may move), D goes."""

    kind: Literal["A", "M", "D"]
    path: str
    before: bytes | None
    after: bytes | None
    move_to: str | None = None

    @property
    def final_path(self) -> str:
        return self.move_to or self.path

    def unified_diff(self) -> str:
        """The change for people, as `diff -u` writes it."""
        old, new = (self.path if self.before is not None else None), (self.final_path if self.kind != "D" else None)
        head = f"--- {'a/' + old if old else '/dev/null'}\n+++ {'b/' + new if new else '/dev/null'}\n"
        if self.move_to is not None:
            head = f"rename from {self.path}\nrename to {self.move_to}\n" + (head if self.before != self.after else "")
        if self.before == self.after:
            return head
        try:
            before, after = ((data or b"").decode("utf-8") for data in (self.before, self.after))
        except UnicodeDecodeError:
            return head + "Binary files differ\n"
        if "\0" in before or "\0" in after:
            return head + "Binary files differ\n"
        here, there = ([line.text + line.ending for line in split_lines(text)] for text in (before, after))
        if len(here) + len(there) > _MAX_DIFF_LINES:
            return head + f"({len(here):,} lines become {len(there):,}; too many to compare here)\n"
        body = list(difflib.unified_diff(here, there))[2:]
        return head + "".join(
            line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in body
        )


class PatchFolder:
    """A folder that patches are applied to."""

    def __init__(self, root: Path | str, *, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        """Opens the folder, also through a symbolic link: it was named by whoever runs ossia, not by the model.

        Raises NotFoundError if it is none.
        """
        self.root = Path(root)
        self._max_file_bytes = max_file_bytes
        try:
            self._fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(
                f"{self.root}: {error.strerror}; expected a folder that patches are applied to"
            ) from None

    def close(self) -> None:
        """Free the folder. More than once is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> PatchFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plan(self, patch: str | Sequence[Operation]) -> Plan:
        """What the patch would do. Raises PatchError with everything that does not fit."""
        operations = parse_patch(patch) if isinstance(patch, str) else patch
        _check_paths(operations)
        with self._locked():
            self._recover()
        steps: list[_Step] = []
        faults: list[str] = []
        for operation in operations:
            try:
                steps.append(self._step(operation))
            except PatchError as error:
                faults.append(error.message)
        if faults:
            raise PatchError("\n".join(faults) + "\nNo file was changed.")
        return Plan(self, tuple(operations), tuple(steps))

    # -- reading -----------------------------------------------------------------------------------

    def _step(self, operation: Operation) -> _Step:
        if isinstance(operation, Add):
            self._refuse_existing(operation.path, "add")
            return _Step(Change("A", operation.path, None, _encode(operation.text, operation.path)), None, 0)
        data, status = self._read(operation.path)
        identity = Identity.of(status)
        if isinstance(operation, Delete):
            return _Step(Change("D", operation.path, data, None), identity, status.st_mode)
        after = data
        if operation.hunks:
            text = apply_hunks(_decode(data, operation.path), operation.hunks, operation.path)
            after = _encode(text, operation.path)
        if operation.move_to is not None:
            self._refuse_existing(operation.move_to, "move")
        elif after == data:
            raise PatchError(f"{operation.path}: the update changes nothing; is it done already?")
        change = Change("M", operation.path, data, after, operation.move_to)
        return _Step(change, identity, status.st_mode)

    def _read(self, path: str) -> tuple[bytes, os.stat_result]:
        try:
            with self._parent(path) as (folder, name):
                if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    raise PatchError(f"{path}: is a folder; expected a file")
                # A FIFO must not keep us waiting.
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            raise self._unusable(path, error) from None
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise PatchError(f"{path}: is no ordinary file")
            if status.st_size > self._max_file_bytes:
                raise PatchError(
                    f"{path}: has {status.st_size:,} bytes; expected at most {self._max_file_bytes:,} to be patched"
                )
            return file.read(), status

    def _refuse_existing(self, path: str, what: Literal["add", "move"]) -> None:
        try:
            with self._parent(path) as (folder, name):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise PatchError(f"{path}: {error.strerror}") from None
        hint = "update it, or delete it in a patch of its own" if what == "add" else "choose another name"
        raise PatchError(f"{path}: exists already, and would be overwritten; {hint}")

    @contextlib.contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder that a path stands in, and the file's name.

        Raises FileNotFoundError if the folder is not there, PatchError if the way leads through something else.
        """
        *parts, name = path.split("/")
        fd = os.dup(self._fd)
        try:
            for i, part in enumerate(parts):
                try:
                    inner = os.open(part, _FOLDER_FLAGS, dir_fd=fd)
                except FileNotFoundError:
                    raise
                except OSError as error:
                    raise self._unusable("/".join(parts[: i + 1]), error, of=path) from None
                os.close(fd)
                fd = inner
            yield fd, name
        finally:
            os.close(fd)

    def _unusable(self, path: str, error: OSError, of: str | None = None) -> PatchError:
        shown = f"{of}: {path}" if of else f"{path}:"
        if error.errno == errno.ENOENT:
            return PatchError(f"{shown} does not exist{self._neighbours(path)}")
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            with contextlib.suppress(OSError, PatchError), self._parent(path) as (folder, name):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    return PatchError(f"{shown} is a symbolic link, which is not followed; name the file itself")
            return PatchError(f"{shown} is a file; expected a folder")
        return PatchError(f"{of or path}: {error.strerror}")

    def _neighbours(self, path: str) -> str:
        """Names like the one that is not there."""
        try:
            with self._parent(path) as (folder, name):
                names = os.listdir(folder)
        except (OSError, PatchError):
            return ""
        close = difflib.get_close_matches(name, names[:5_000], n=3)
        above = path.rpartition("/")[0]
        return "; is it " + " or ".join(f"{above}/{one}" if above else one for one in close) + "?" if close else ""

    # -- writing -----------------------------------------------------------------------------------

    def _commit(self, steps: Sequence[_Step], is_cancelled: Callable[[], bool]) -> None:
        with self._locked():
            try:
                self._recover()
                journal = _Journal.begin(steps, self._missing_folders(steps))
            except (OSError, PatchError) as error:
                raise _cannot_write(error) from None
            try:
                # First of all, so that no crash leaves a file that nobody knows of.
                os.close(self._write_new(journal.name, journal.to_bytes(), self._fd))
                for folder in journal.folders:
                    with self._parent(folder) as (above, name):
                        os.mkdir(name, dir_fd=above)
                for i, step in enumerate(steps):
                    self._stage(journal, i, step)
                for i, step in enumerate(steps):
                    if is_cancelled():
                        raise PatchError("the patch was cancelled")
                    self._swap(journal, i, step)
                os.fsync(self._fd)
                # From here on the patch is done: a crash now is only tidied up.
                os.rename(journal.name, journal.done_name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except BaseException as error:
                try:
                    self._undo(journal)
                except PatchError as undone:
                    raise PatchError(f"{error}; and going back failed as well:\n{undone.message}") from error
                if isinstance(error, OSError | PatchError):
                    raise _cannot_write(error) from None
                raise
            self._tidy(journal)

    def _missing_folders(self, steps: Sequence[_Step]) -> list[str]:
        """Folders to be made, outer before inner."""
        missing: dict[str, None] = {}
        for step in steps:
            if step.change.kind == "D" or (step.change.kind == "M" and step.change.move_to is None):
                continue
            parts = step.change.final_path.split("/")[:-1]
            for k in range(1, len(parts) + 1):
                folder = "/".join(parts[:k])
                try:
                    with self._parent(folder + "/x"):
                        pass
                except FileNotFoundError:
                    missing[folder] = None
        return list(missing)

    def _stage(self, journal: _Journal, i: int, step: _Step) -> None:
        """Write what comes beside its place, and keep what goes under a second name."""
        change = step.change
        if step.identity is not None:
            with self._parent(change.path) as (folder, name):
                try:
                    self._keep(name, journal.old_name(i), folder, step)
                except FileNotFoundError:
                    raise PatchError(f"{change.path}: was deleted meanwhile") from None
        if change.after is not None:
            with self._parent(change.final_path) as (folder, _):
                # What replaces a file is no more readable than that, at no time.
                mode = None if step.identity is None else 0o600
                fd = self._write_new(journal.new_name(i), change.after, folder, mode)
                try:
                    if step.identity is not None:
                        self._copy_attributes(change.path, fd, step.mode)
                finally:
                    os.close(fd)

    def _keep(self, name: str, old_name: str, folder: int, step: _Step) -> None:
        path = step.change.path
        try:
            os.link(name, old_name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                raise
            # A file system without hard links keeps a copy, under the same modes.
            assert step.change.before is not None
            os.close(self._write_new(old_name, step.change.before, folder, step.mode & 0o777))
        if self._read(path)[0] != step.change.before:
            raise PatchError(f"{path}: was changed meanwhile; read it again")

    def _swap(self, journal: _Journal, i: int, step: _Step) -> None:
        """Put one change in its place."""
        change = step.change
        if step.identity is not None:
            with self._parent(change.path) as (folder, name):
                if Identity.of(os.stat(name, dir_fd=folder, follow_symlinks=False)) != step.identity:
                    raise PatchError(f"{change.path}: was changed meanwhile; read it again")
                if change.kind == "M" and change.move_to is None:
                    os.rename(journal.new_name(i), name, src_dir_fd=folder, dst_dir_fd=folder)
                    return
        if change.after is not None:
            with self._parent(change.final_path) as (folder, name):
                try:
                    # Unlike a rename, this replaces nothing that came there meanwhile.
                    os.link(journal.new_name(i), name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
                except FileExistsError:
                    raise PatchError(f"{change.final_path}: came into being meanwhile") from None
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
                        raise
                    os.close(self._write_new(name, change.after, folder, step.mode & 0o777 if step.mode else None))
        if step.identity is not None:
            with self._parent(change.path) as (folder, name):
                os.unlink(name, dir_fd=folder)

    def _write_new(self, name: str, data: bytes, folder: int, mode: int | None = None) -> int:
        """Write a file that was not there; returns its descriptor. ``mode`` None is that of any new file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            if mode is not None:
                os.fchmod(fd, mode)
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _copy_attributes(self, path: str, fd: int, mode: int) -> None:
        """Mode, owner and extended attributes of the file that is replaced, as far as we may set them."""
        with self._parent(path) as (folder, name):
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            status, ours = os.fstat(source), os.fstat(fd)
            if (status.st_uid, status.st_gid) != (ours.st_uid, ours.st_gid):
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, status.st_uid, status.st_gid)
            with contextlib.suppress(OSError):
                for key in os.listxattr(source):
                    os.setxattr(fd, key, os.getxattr(source, key))
        finally:
            os.close(source)
        # Last: a change of owner clears bits, and set-user-id is not handed on to other contents.
        os.fchmod(fd, mode & 0o777)

    # -- going back --------------------------------------------------------------------------------

    def _undo(self, journal: _Journal) -> None:
        """Put everything back. Raises PatchError, and keeps the journal, if something cannot be."""
        faults = []
        for i in reversed(range(len(journal.entries))):
            path, final_path, kind = journal.entries[i]
            try:
                if kind in ("A", "R"):
                    with _absent(), self._parent(final_path) as (folder, name):
                        if self._is_same(journal.new_name(i), name, folder):
                            os.unlink(name, dir_fd=folder)
                if kind != "A":
                    with _absent(), self._parent(path) as (folder, name):
                        self._restore(journal.old_name(i), name, folder)
                with _absent(), self._parent(final_path) as (folder, _):
                    os.unlink(journal.new_name(i), dir_fd=folder)
            except (OSError, PatchError) as error:
                faults.append(f"{path}: cannot be put back from {journal.old_name(i)} beside it: {error}")
        if faults:
            raise PatchError("\n".join(faults) + f"\nPut these back by hand, then delete {journal.name}.")
        for made in reversed(journal.folders):
            # Not ours any more if somebody has put something there.
            with contextlib.suppress(OSError, PatchError), self._parent(made) as (above, name):
                os.rmdir(name, dir_fd=above)
        with _absent():
            os.unlink(journal.name, dir_fd=self._fd)

    def _restore(self, old_name: str, name: str, folder: int) -> None:
        old = os.stat(old_name, dir_fd=folder, follow_symlinks=False)
        with _absent():
            here = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if (here.st_dev, here.st_ino) == (old.st_dev, old.st_ino):
                # It was not replaced yet. Two names of one file: a rename would do nothing and leave both.
                os.unlink(old_name, dir_fd=folder)
                return
        os.rename(old_name, name, src_dir_fd=folder, dst_dir_fd=folder)

    def _is_same(self, new_name: str, name: str, folder: int) -> bool:
        """Whether a file is there because of us: the staged one under a second name, or its copy."""
        new, here = (os.stat(one, dir_fd=folder, follow_symlinks=False) for one in (new_name, name))
        if (here.st_dev, here.st_ino) == (new.st_dev, new.st_ino):
            return True
        return here.st_size == new.st_size and _contents(new_name, folder) == _contents(name, folder)

    def _tidy(self, journal: _Journal) -> None:
        """Remove what kept the way back. The patch is done: what cannot be removed stays for the next time."""
        is_tidy = True
        for i, (path, final_path, _) in enumerate(journal.entries):
            for there, name in ((path, journal.old_name(i)), (final_path, journal.new_name(i))):
                try:
                    with _absent(), self._parent(there) as (folder, _):
                        os.unlink(name, dir_fd=folder)
                except (OSError, PatchError):
                    is_tidy = False
        if is_tidy:
            with contextlib.suppress(OSError):
                os.unlink(journal.done_name, dir_fd=self._fd)

    def _recover(self) -> None:
        """Undo, or tidy up after, a patch whose process has died."""
        for name in os.listdir(self._fd):
            if not name.startswith(_OURS) or not name.endswith((".journal", ".done")):
                continue
            journal = self._read_journal(name)
            if journal is None:
                # Cut short while it was written: nothing had been done.
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._fd)
            elif name == journal.name:
                self._undo(journal)
            else:
                self._tidy(journal)

    def _read_journal(self, name: str) -> _Journal | None:
        try:
            return _Journal.from_bytes(name, self._read(name)[0])
        except (PatchError, ValueError, KeyError, TypeError):
            return None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # An own description of the folder: locks are held by it, not by the process.
        try:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise _cannot_write(error) from None
        try:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise PatchError("another patch of the folder is under way; try again") from None
                    time.sleep(0.01)
                except OSError:
                    # A file system without locks: patches at the same time are the user's to avoid.
                    break
            yield
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Plan:
    """A patch that fits: what it would do, and the way to do it."""

    folder: PatchFolder
    operations: tuple[Operation, ...]
    steps: tuple[_Step, ...]

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(step.change for step in self.steps)

    def unified_diff(self) -> str:
        return "".join(change.unified_diff() for change in self.changes)

    def summary(self) -> str:
        """What the model is told when it is done."""
        listed = sorted(self.changes, key=lambda change: "AMD".index(change.kind))
        return "Success. Updated the following files:\n" + "\n".join(f"{c.kind} {c.final_path}" for c in listed)

    def commit(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Do it. Raises PatchError, every file being as it was, if a file was changed since, or cannot be written."""
        self.folder._commit(self.steps, is_cancelled)


@dataclass(frozen=True)
class _Step:
    change: Change
    # Of the file that is replaced; None for a new one.
    identity: Identity | None
    mode: int


@dataclass(frozen=True)
class _Journal:
    """How to go back: for each step the path, where it ends and what it is (A, M, D, or R for a move)."""

    key: str
    entries: tuple[tuple[str, str, str], ...]
    folders: tuple[str, ...]

    @classmethod
    def begin(cls, steps: Sequence[_Step], folders: Sequence[str]) -> _Journal:
        entries = [
            (step.change.path, step.change.final_path, "R" if step.change.move_to else step.change.kind)
            for step in steps
        ]
        return cls(secrets.token_hex(8), tuple(entries), tuple(folders))

    @property
    def name(self) -> str:
        return f"{_OURS}{self.key}.journal"

    @property
    def done_name(self) -> str:
        return f"{_OURS}{self.key}.done"

    def new_name(self, i: int) -> str:
        return f"{_OURS}{self.key}-{i}.new"

    def old_name(self, i: int) -> str:
        return f"{_OURS}{self.key}-{i}.old"

    def to_bytes(self) -> bytes:
        return json.dumps({"entries": self.entries, "folders": self.folders}).encode()

    @classmethod
    def from_bytes(cls, name: str, data: bytes) -> _Journal:
        """Raises PatchError, ValueError, KeyError or TypeError for what is no journal."""
        raw: Any = json.loads(data)
        key = name.removeprefix(_OURS).rpartition(".")[0]
        entries = tuple((str(path), str(final), str(kind)) for path, final, kind in raw["entries"])
        folders = tuple(str(folder) for folder in raw["folders"])
        for path in [*(p for entry in entries for p in entry[:2]), *folders]:
            check_path(path)
        return cls(key, entries, folders)


def _cannot_write(error: OSError | PatchError) -> PatchError:
    reason = f"cannot write: {error.strerror or error}" if isinstance(error, OSError) else error.message
    return PatchError(f"{reason}; every file is as it was")


def _absent() -> contextlib.suppress:
    """For what may be missing, and then needs nothing done."""
    return contextlib.suppress(FileNotFoundError)


def _contents(name: str, folder: int) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder), "rb") as f:
        return f.read()


def _check_paths(operations: Sequence[Operation]) -> None:
    """Refuse names that are not to be touched, and a path that has a part in two operations."""
    seen: dict[str, str] = {}
    for operation in operations:
        paths = [operation.path]
        if isinstance(operation, Update) and operation.move_to is not None:
            if operation.move_to == operation.path:
                raise PatchError(f"{operation.path}: is moved onto itself; leave out '*** Move to:'")
            paths.append(operation.move_to)
        for path in paths:
            if check_path(path) != path:
                raise PatchError(f"{path}: expected {check_path(path)}")
            for part in path.split("/"):
                if part.startswith(_OURS) or part.casefold() in _PROTECTED:
                    raise PatchError(f"{path}: {part!r} is not to be patched")
            if path in seen:
                raise PatchError(f"{path}: has two operations in one patch; expected one, with all of its hunks")
            seen[path] = path
    for path in seen:
        parts = path.split("/")
        for k in range(1, len(parts)):
            if "/".join(parts[:k]) in seen:
                raise PatchError(
                    f"{path}: {'/'.join(parts[:k])} is a file of the same patch; expected a file or a folder, not both"
                )


def _decode(data: bytes, path: str) -> str:
    if b"\0" in data:
        raise PatchError(f"{path}: is binary (it has a zero byte); only UTF-8 text can be patched")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PatchError(
            f"{path}: is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); only UTF-8 text can be patched"
        ) from None


def _encode(text: str, path: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PatchError(f"{path}: {text[error.start]!r} is half a character; expected whole ones") from None
