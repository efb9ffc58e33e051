"""Which Python runs inside, and which folders it needs to see."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from ossia.errors import UnavailableError

# Programs and libraries of the system; nothing of anybody's own.
SYSTEM = (
    *("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/share"),
    *("/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/fonts"),
)


@dataclass(frozen=True)
class Interpreter:
    """A Python of this process's own minor version, so that compiled code and packages fit it."""

    executable: str
    # Folders and files to read, as absolute names.
    read: tuple[str, ...]
    # Folders of packages.
    site: tuple[str, ...]


def find_interpreter(user: int | None, is_bound: bool) -> Interpreter:
    """The Python that a sandbox runs as ``user`` (None: as whoever runs ossia).

    ``is_bound``: the folders are mounted into a new root, so that the way to them need not be open to the user.
    Raises UnavailableError.
    """
    minor = f"python3.{sys.version_info.minor}"
    own = os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)
    tried = []
    for executable in dict.fromkeys((own, f"/usr/bin/{minor}", f"/usr/local/bin/{minor}")):
        prefix = Path(sys.base_prefix if executable == own else executable).parent.parent
        prefix = Path(sys.base_prefix) if executable == own else prefix
        stdlib = prefix / "lib" / minor
        if _reaches(executable, user, is_bound) and _reaches(str(stdlib), user, is_bound):
            site = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages") and os.path.isdir(p)]
            site = [os.path.abspath(p) for p in site if _reaches(os.path.abspath(p), user, is_bound)]
            own_folders = _folders(prefix, executable)
            read = [path for path in dict.fromkeys((*SYSTEM, *own_folders, *site)) if os.path.exists(path)]
            return Interpreter(executable, tuple(read), tuple(site))
        tried.append(executable)
    raise UnavailableError(
        f"no Python 3.{sys.version_info.minor} that the sandbox's user may read (tried {', '.join(tried)}); install "
        f"one under /usr (Debian, Ubuntu: apt-get install {minor}), or start ossia as an ordinary user"
    )


def _folders(prefix: Path, executable: str) -> list[str]:
    if str(prefix).startswith("/nix/store"):
        return ["/nix/store"]
    folders = [str(prefix / "bin"), str(prefix / "lib"), str(prefix / "lib64")]
    return folders if str(prefix) != "/usr" else []


def _reaches(path: str, user: int | None, is_bound: bool) -> bool:
    """Whether the sandbox's user may read and enter ``path``."""
    if user is None:
        return os.access(path, os.R_OK | os.X_OK)
    try:
        # The user owns nothing and is in no group.
        if (os.stat(path).st_mode & 0o005) != 0o005:
            return False
        return is_bound or all(os.stat(parent).st_mode & stat.S_IXOTH for parent in Path(path).resolve().parents)
    except OSError:
        return False
