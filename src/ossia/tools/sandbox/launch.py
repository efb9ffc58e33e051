"""Command lines that start a supervisor: what each kind of sandbox takes away before the first line of Python runs.

The environment is empty, the arguments of bubblewrap go through a pipe (so that no list of processes tells of the
host's folders), and the modules of `inside` are sent over the control pipe, so that nothing of ossia's need be readable
inside.

Sources  bwrap(1); docker-run(1). What one must know of bubblewrap: parents that it makes are closed to others;
         `--clearenv` leaves the caller's variables in /proc/1/environ; a process that root starts keeps root's identity
         under any user namespace, so that root drops it first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ossia.errors import ConfigError, UnavailableError
from ossia.tools.sandbox.inside import MODULES
from ossia.tools.sandbox.interpreter import Interpreter, find_interpreter
from ossia.tools.sandbox.limits import Limits

# Reads modules from standard input and runs the supervisor; argv[1] says whether they come as source or compiled.
_BOOT = """\
import builtins, marshal, os, sys, types
def read(n):
    b = b""
    while len(b) < n:
        c = os.read(0, n - len(b))
        if not c:
            os._exit(0)
        b += c
    return b
def take():
    return read(int.from_bytes(read(4), "big"))
parent = "ossia.tools.sandbox.inside"
path = []
for part in parent.split("."):
    path.append(part)
    made = sys.modules[".".join(path)] = types.ModuleType(".".join(path))
    made.__path__ = []
for _ in range(int.from_bytes(read(4), "big")):
    name, code = take().decode(), take()
    code = marshal.loads(code) if sys.argv[1] == "compiled" else compile(code, "<ossia>/%s.py" % name, "exec")
    module = sys.modules[parent + "." + name] = types.ModuleType(parent + "." + name)
    setattr(made, name, module)
    # Builtins of its own: the code may take away those that it shares with everyone.
    module.__builtins__ = dict(vars(builtins))
    exec(code, module.__dict__)
module.main()
"""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# Identities that nobody has by convention (systemd, "Users, Groups, UIDs and GIDs"); fewer where few are mapped.
_USERS = (0x7000_0000, 0x7EFF_FFFF)
_NOBODY = 65534
# Landlock alone must keep signals inside; with an identity of its own, the kernel's old rules do that.
_MIN_ABI, _MIN_ABI_WITH_OWN_USER = 6, 3


@dataclass(frozen=True)
class Launch:
    """How to start one sandbox."""

    argv: tuple[str, ...]
    # What the supervisor is told.
    settings: dict[str, Any]
    # Arguments for bwrap's --args, and contents for its --ro-bind-data; "{0}", "{1}", ... in argv stand for their
    # descriptors.
    data: tuple[bytes, ...] = ()
    # Killing the first process kills all; otherwise the supervisor is asked to.
    dies_with_parent: bool = True
    # Called when the sandbox has ended.
    clean_up: Callable[[], None] = field(default=lambda: None)
    is_source: bool = False


class Launcher(Protocol):
    """One kind of sandbox on this machine."""

    @property
    def tier(self) -> str: ...

    def launch(self, limits: Limits) -> Launch:
        """Raises UnavailableError, saying what to install or change."""


@cache
def modules(is_source: bool) -> bytes:
    """The supervisor's modules, as its bootstrap reads them."""
    parts = [len(MODULES).to_bytes(4, "big")]
    for name in MODULES:
        spec = importlib.util.find_spec(f"ossia.tools.sandbox.inside.{name}")
        assert spec is not None and spec.origin is not None
        code = Path(spec.origin).read_bytes()
        if not is_source:
            code = marshal.dumps(compile(code, f"<ossia>/{name}.py", "exec", dont_inherit=True))
        for one in (name.encode(), code):
            parts += [len(one).to_bytes(4, "big"), one]
    return b"".join(parts)


class BubblewrapLauncher:
    """Namespaces by bubblewrap, then Landlock and seccomp inside: a file tree of its own, no network, no other process.

    Started by root, the namespaces are made by root (the interpreter may lie where only root can look), and the
    supervisor leaves root's identity before it does anything else.
    """

    tier = "bubblewrap"

    def __init__(self, program: str | None = None) -> None:
        self._program = program
        self._users = Users()

    def launch(self, limits: Limits) -> Launch:
        program = self._program or shutil.which("bwrap", path=_SEARCH_PATH)
        if program is None:
            raise UnavailableError(
                "bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap; "
                "Fedora: dnf install bubblewrap)"
            )
        user = self._users.take()
        python = find_interpreter(user, is_bound=True)
        inner = _NOBODY if user is None else user
        passwd = f"sandbox:x:{inner}:{inner}::/mnt/data:/bin/sh\n".encode()
        group = f"sandbox:x:{inner}:\n".encode()
        arguments = self._arguments(python, limits, user)
        settings = _settings(limits, python) | {
            "user": user,
            "has_pid_namespace": True,
            "has_own_mounts": True,
            "has_own_network": True,
            "write": ["/mnt/data", "/tmp", "/dev/shm"],
            # The count is of an identity, or a user namespace, that only this sandbox has.
            "limits": _limits(limits, limits.num_processes + 4),
        }
        # The mounts say what there is.
        settings["read"] = ["/"]
        return Launch(
            (program, "--args", "{0}", "--perms", "0444", "--ro-bind-data", "{1}", "/etc/passwd",
             "--perms", "0444", "--ro-bind-data", "{2}", "/etc/group", "--remount-ro", "/",
             "--", *_python(python.executable, "compiled")),
            settings,
            ("\0".join(arguments).encode() + b"\0", passwd, group),
            clean_up=lambda: self._users.give_back(user),
        )  # fmt: skip

    def _arguments(self, python: Interpreter, limits: Limits, user: int | None) -> list[str]:
        arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        arguments += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--cap-drop", "ALL"]
        if user is None:
            arguments += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY)]
        else:
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
                arguments += ["--cap-add", capability]
        arguments += ["--perms", "0755", "--tmpfs", "/"]
        made: set[str] = {"/"}
        # First, since what is read may lie below, as a virtual environment in /tmp does.
        sizes = {"/mnt/data": limits.data_bytes, "/tmp": limits.scratch_bytes, "/dev/shm": limits.scratch_bytes}
        for path, size in sizes.items():
            arguments += [*_parents(path, made), "--perms", "1777", "--size", str(size), "--tmpfs", path]
            made.add(path)
        for path in python.read:
            arguments += _parents(path, made)
            if os.path.islink(path) and path.count("/") == 1:
                arguments += ["--symlink", os.readlink(path), path]
            else:
                arguments += ["--ro-bind", path, path]
        arguments += ["--perms", "0755", "--dir", "/etc", "--perms", "0755", "--dir", "/dev", "--proc", "/proc"]
        for device in _DEVICES:
            arguments += ["--dev-bind", device, device]
        for target, name in (("", "fd"), ("/0", "stdin"), ("/1", "stdout"), ("/2", "stderr")):
            arguments += ["--symlink", f"/proc/self/fd{target}", f"/dev/{name}"]
        return [*arguments, "--chdir", "/"]


class LandlockLauncher:
    """No namespace: Landlock and seccomp keep a process of the host's from everything but the system's programs, its
    Python and a folder of its own. The host's file names, sizes and times stay in sight, its contents do not."""

    tier = "landlock"

    def __init__(self, max_abi: int = 99) -> None:
        self._max_abi = max_abi
        self._users = Users()

    def launch(self, limits: Limits) -> Launch:
        user = self._users.take()
        python = find_interpreter(user, is_bound=False)
        home, own = _own_folders(user)
        settings = _settings(limits, python) | {
            "user": user,
            "min_landlock_abi": _MIN_ABI if user is None else _MIN_ABI_WITH_OWN_USER,
            "landlock_abi": self._max_abi,
            "seccomp": "shared-tree",
            "limits": _limits(limits, limits.num_processes + 4 + (_num_own_tasks() if user is None else 0)),
            **own,
        }
        settings["environment"] |= _environment(own)

        def clean_up() -> None:
            if user is not None:
                _kill_user(python.executable, user)
            _remove(home)
            self._users.give_back(user)

        argv = tuple(_python(python.executable, "compiled"))
        return Launch(argv, settings, dies_with_parent=False, clean_up=clean_up)


class UnsafeLauncher:
    """No sandbox at all: the model's code runs as whoever started ossia. For a machine that is itself thrown away."""

    tier = "unsafe"

    def launch(self, limits: Limits) -> Launch:
        python = find_interpreter(None, is_bound=False)
        home, own = _own_folders(None)
        settings = _settings(limits, python) | {"landlock_abi": 0, "seccomp": "off", **own}
        settings["environment"] |= _environment(own)
        argv = tuple(_python(python.executable, "compiled"))
        return Launch(argv, settings, dies_with_parent=False, clean_up=lambda: _remove(home))


class ContainerLauncher:
    """Docker or podman with everything taken away that they can take away; with runsc as runtime it is gVisor, which
    answers system calls itself, so that a fault of the kernel is out of reach."""

    def __init__(self, program: str, image: str, runtime: str | None = None) -> None:
        self._program = program
        self._image = image
        self._runtime = runtime
        # A name that begins with a dash would be an option.
        if not re.fullmatch(r"[A-Za-z0-9][\w.:/@-]*", image):
            raise ConfigError(f"{image!r} is no name of an image; expected one such as python:3.12-slim")

    @property
    def tier(self) -> str:
        return "gvisor" if self._runtime == "runsc" else self._program

    def launch(self, limits: Limits) -> Launch:
        program = shutil.which(self._program)
        if program is None:
            raise UnavailableError(f"{self._program} is not installed, or not on the PATH of ossia")
        name = f"ossia-python-{secrets.token_hex(8)}"
        settings = _settings(limits, None) | {
            "has_pid_namespace": True,
            "has_own_mounts": True,
            "has_own_network": True,
            "write": ["/mnt/data", "/tmp", "/dev/shm"],
            # The container's own rules are these; the image's Python is where the image put it.
            "read": ["/usr", "/bin", "/lib", "/lib64", "/opt", "/etc", "/home", "/root", "/srv", "/var"],
            "limits": _limits(limits, None),
        }

        def clean_up() -> None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([program, "rm", "--force", name], capture_output=True, timeout=30, check=False)

        return Launch((program, *self._arguments(name, limits)), settings, clean_up=clean_up, is_source=True)

    def _arguments(self, name: str, limits: Limits) -> list[str]:
        total = limits.memory_bytes + limits.data_bytes + 2 * limits.scratch_bytes + (64 << 20)
        scratch = f"rw,nosuid,nodev,mode=1777,size={limits.scratch_bytes}"
        arguments = [
            *("run", "--rm", "--interactive", "--name", name, "--network", "none", "--read-only"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", f"{_NOBODY}:{_NOBODY}"),
            *("--pids-limit", str(limits.num_processes + 4), "--memory", str(total), "--memory-swap", str(total)),
            *("--cpus", str(limits.num_cpus), "--ulimit", "core=0", "--ulimit", "nofile=512:512"),
            *("--tmpfs", f"/mnt/data:rw,nosuid,nodev,mode=1777,size={limits.data_bytes}", "--tmpfs", f"/tmp:{scratch}"),
            *("--shm-size", str(limits.scratch_bytes), "--ipc", "private", "--hostname", "sandbox"),
            *("--log-driver", "none", "--pull", "never", "--workdir", "/", "--entrypoint", "python3"),
        ]
        if self._runtime is not None:
            arguments += ["--runtime", self._runtime]
        return [*arguments, self._image, *_python("python3", "source")[1:]]


_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/run/current-system/sw/bin"


class Users:
    """Identities for sandboxes, one each, so that limits, keys and signals are each one's own. Only root can give them:
    for anybody else the identity is None, his own."""

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def take(self) -> int | None:
        if os.geteuid() != 0:
            return None
        lowest, highest = _mapped_users()
        while True:
            user = lowest + secrets.randbelow(highest - lowest + 1)
            if user not in self._taken:
                self._taken.add(user)
                return user

    def give_back(self, user: int | None) -> None:
        if user is not None:
            self._taken.discard(user)


def _mapped_users() -> tuple[int, int]:
    highest = 0
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, num = map(int, line.split())
        highest = max(highest, inside + num - 1)
    if highest >= _USERS[1]:
        return _USERS
    if highest >= _NOBODY:
        # As systemd's dynamic users, which a container has none of.
        return 61184, 65519
    raise UnavailableError(
        f"root of this user namespace has only {highest + 1} identities and can give none to a sandbox; "
        "start ossia as an ordinary user"
    )


def _own_folders(user: int | None) -> tuple[Path, dict[str, Any]]:
    """A folder for what has no mounts, and the settings that name its parts."""
    home = Path(tempfile.mkdtemp(prefix="ossia-python-"))
    places = {"/mnt/data": str(home / "data"), "/tmp": str(home / "tmp")}
    for path in (str(home), *places.values()):
        os.makedirs(path, mode=0o700, exist_ok=True)
        if user is not None:
            os.chown(path, user, user)
    return home, {"data": places["/mnt/data"], "places": places, "write": list(places.values())}


def _environment(own: dict[str, Any]) -> dict[str, str]:
    data, scratch = own["places"]["/mnt/data"], own["places"]["/tmp"]
    return {"HOME": data, "TMPDIR": scratch, "MPLCONFIGDIR": scratch, "XDG_CACHE_HOME": scratch}


def _remove(home: Path) -> None:
    # Trees of any depth and with any names: Python's own removal recurses.
    subprocess.run(["rm", "-rf", "--one-file-system", "--", str(home)], check=False, capture_output=True)


def _settings(limits: Limits, python: Interpreter | None) -> dict[str, Any]:
    threads = str(limits.num_cpus)
    return {
        "op": "configure",
        "user": None,
        "has_pid_namespace": False,
        "has_own_mounts": False,
        "has_own_network": False,
        "landlock_abi": 99,
        "min_landlock_abi": 0,
        "seccomp": "own-tree",
        "data": "/mnt/data",
        "places": {},
        "read": list(python.read) if python else [],
        "write": [],
        "devices": list(_DEVICES),
        "site": list(python.site) if python else [],
        "environment": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": "/mnt/data",
            "LANG": "C.UTF-8",
            "USER": "sandbox",
            "MPLBACKEND": "module://ossia_figures",
            "MPLCONFIGDIR": "/tmp",
            "XDG_CACHE_HOME": "/tmp/.cache",
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        },
        "limits": _limits(limits, None),
    }


def _limits(limits: Limits, user_processes: int | None) -> dict[str, Any]:
    return {
        "memory_bytes": limits.memory_bytes,
        "data_bytes": limits.data_bytes,
        "scratch_bytes": limits.scratch_bytes,
        "files": limits.num_files,
        "processes": limits.num_processes,
        # For RLIMIT_NPROC, which counts what a whole identity runs.
        "user_processes": user_processes,
        "cpus": limits.num_cpus,
        "output_bytes": limits.output_bytes,
        "display_bytes": limits.display_bytes,
    }


def _python(executable: str, form: str) -> list[str]:
    return [executable, "-I", "-S", "-B", "-X", "utf8", "-c", _BOOT, form]


def _parents(path: str, made: set[str]) -> list[str]:
    """Make the folders above a mount point, open to others, which bubblewrap would not do."""
    arguments = []
    for parent in reversed(PurePosixPath(path).parents):
        if str(parent) not in made:
            made.add(str(parent))
            arguments += ["--perms", "0755", "--dir", str(parent)]
    return arguments


def _num_own_tasks() -> int:
    """Processes and threads of this user now."""
    count = 0
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if path.stat().st_uid == os.geteuid():
                    count += len(os.listdir(path / "task"))
    return count


def _kill_user(executable: str, user: int) -> None:
    """End whatever runs under an identity that only one sandbox had."""
    with contextlib.suppress(OSError):
        subprocess.run(
            [executable, "-I", "-S", "-c", "import os; os.kill(-1, 9)"],
            user=user,
            group=user,
            extra_groups=[],
            env={},
            capture_output=True,
            check=False,
        )
