"""`/mnt/data` and `/tmp` where no mount can put them: the names that Python's own functions take are translated.

A convenience, and no part of the protection: what the code may open is decided by the kernel. Libraries that open files
in C see the true paths; relative names work everywhere.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

_OF_ONE_PATH = (
    *("open", "stat", "lstat", "listdir", "scandir", "mkdir", "rmdir", "remove", "unlink", "access", "chdir"),
    *("readlink", "truncate", "utime", "chmod", "statvfs", "mkfifo"),
)
_OF_TWO_PATHS = ("rename", "replace", "link", "symlink")


def translate(places: dict[str, str], kept: Sequence[str] = ()) -> None:
    """Let names below a key of ``places`` mean the same below its value; those below ``kept`` stay what they are."""
    untouched = (*places.values(), *kept)

    def real(path: Any) -> Any:
        if isinstance(path, str):
            name = path
        elif isinstance(path, os.PathLike):
            found = os.fspath(path)
            if not isinstance(found, str):
                return path
            name = found
        else:
            return path
        if any(name == place or name.startswith(place + "/") for place in untouched):
            return path
        for shown, place in places.items():
            if name == shown or name.startswith(shown + "/"):
                return place + name[len(shown) :]
        return path

    def wrap(function: Callable[..., Any], num_paths: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            # os.listdir and its kin also stand without a path.
            args = tuple(real(one) if i < num_paths else one for i, one in enumerate(args))
            for name in ("file", "path", "src", "dst"):
                if name in options:
                    options[name] = real(options[name])
            return function(*args, **options)

        return wrapped

    for names, num_paths in ((_OF_ONE_PATH, 1), (_OF_TWO_PATHS, 2)):
        for name in names:
            setattr(os, name, wrap(getattr(os, name), num_paths))
    io.open = builtins.open = wrap(builtins.open, 1)
