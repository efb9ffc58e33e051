"""Sandboxes under attack, one for each tier that this machine has; and a web site, well-behaved and not."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tools.web.site import Site, add_bad_pages, serving

from ossia.tools.python import PythonSessions, describe
from ossia.tools.sandbox.limits import Limits
from ossia.tools.web.parse_child import Parser

TIERS = ("bubblewrap", "landlock")
SMALL = Limits(
    memory_bytes=256 << 20,
    data_bytes=32 << 20,
    scratch_bytes=16 << 20,
    num_files=3000,
    num_processes=40,
    output_bytes=256 << 10,
    display_bytes=4 << 20,
)


class Arena:
    """One tier's sessions on an event loop of their own, and the host's things around them."""

    def __init__(self, tier: str, limits: Limits = SMALL) -> None:
        self.tier = tier
        self.runner = asyncio.Runner()
        self.sessions = PythonSessions(tier, limits=limits, num_warm=0)
        self.targets: dict[str, Any] = {}
        self._open: list[Any] = []

    def run(self, what: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(what)

    def call(self, code: str, key: str = "attacker", timeout_s: float = 30.0) -> tuple[str, str]:
        """Run a cell: what the model reads, and how it ended."""

        async def run() -> tuple[str, str]:
            execution, note = await (await self.sessions.session(key)).execute(code, timeout_s)
            return note + describe(execution, self.sessions.limits), execution.status

        return self.run(run())

    def build(self) -> None:
        # Not below /tmp, whose name may mean another place inside.
        self._folder = folder = Path(tempfile.mkdtemp(prefix="ossia-arena-", dir="/var/tmp"))
        secret = os.urandom(12).hex()
        folder.chmod(0o755)
        (folder / "secret").write_text(secret)
        (folder / "secret").chmod(0o644)
        (folder / "own").write_text(secret)
        (folder / "own").chmod(0o600)
        open_folder = folder / "open"
        open_folder.mkdir()
        open_folder.chmod(0o777)
        (open_folder / "victim").write_text(secret)
        tcp = socket.create_server(("127.0.0.1", 0))
        sockets = [tcp]
        for name, kind, address in (
            ("socket", socket.SOCK_STREAM, f"{folder}/s"),
            ("datagram", socket.SOCK_DGRAM, f"{folder}/d"),
            ("abstract", socket.SOCK_STREAM, f"\0ossia-{secret}"),
        ):
            made = socket.socket(socket.AF_UNIX, kind)
            made.bind(address)
            if kind == socket.SOCK_STREAM:
                made.listen()
            if not address.startswith("\0"):
                os.chmod(address, 0o777)
            sockets.append(made)
            self.targets[name] = address.lstrip("\0")
        canary = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()", f"canary-{secret}"],
            stdin=subprocess.PIPE,
            env={"OSSIA_TEST_SECRET": secret},
        )
        self._open = [*sockets, canary.stdin]
        self.canary = canary
        self.targets |= {
            "secret": secret,
            "file": str(folder / "secret"),
            "own_file": str(folder / "own"),
            "open_folder": str(open_folder),
            "port": tcp.getsockname()[1],
            "canary": canary.pid,
            "canary_word": f"canary-{secret}",
            "tmp_device": os.stat("/tmp").st_dev,
            "host": os.getpid(),
            "hostname": socket.gethostname(),
        }
        os.environ["OSSIA_TEST_SECRET"] = secret
        self._own_stat = self._stat()

    def check_the_host(self) -> None:
        """Nothing outside has changed."""
        assert self.canary.poll() is None, "a process of the host was ended"
        assert self._stat() == self._own_stat, "a file of the host was changed"
        assert sorted(os.listdir(self.targets["open_folder"])) == ["victim"]
        for path in ("/tmp/escape", "/var/tmp/escape", "/dev/shm/escape", "/x", "/usr/lib/x"):
            assert not os.path.exists(path), f"{path} was made on the host"

    def close(self) -> None:
        self.run(self.sessions.aclose())
        self.runner.close()
        self.canary.kill()
        self.canary.wait()
        for one in self._open:
            one.close()
        os.environ.pop("OSSIA_TEST_SECRET", None)
        shutil.rmtree(self._folder)

    def _stat(self) -> list[Any]:
        found: list[Any] = []
        for path in (self.targets["own_file"], self.targets["file"], self.targets["open_folder"] + "/victim"):
            info = os.stat(path)
            xattrs = tuple(os.listxattr(path))
            found.append((info.st_mode, info.st_uid, info.st_mtime, info.st_size, xattrs, Path(path).read_text()))
        return found


def prove_or_skip(runner: asyncio.Runner, sessions: PythonSessions, tier: str) -> None:
    """Skip, in plain words, what this machine has no layer for."""
    from ossia.errors import UnavailableError

    try:
        runner.run(sessions.check())
    except UnavailableError as error:
        runner.run(sessions.aclose())
        runner.close()
        pytest.skip(f"the layer {tier!r} could not be tested on this machine: {error.message[:400]}")


@pytest.fixture(scope="module", params=TIERS)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    made = Arena(request.param)
    prove_or_skip(made.runner, made.sessions, request.param)
    made.build()
    yield made
    made.close()


@pytest.fixture(scope="session")
def parser():
    parser = Parser(2)
    yield parser
    parser.close()


@pytest.fixture
def site():
    with serving() as site:
        yield site


@pytest.fixture(scope="session")
def bad_site() -> Site:
    with serving() as site:
        add_bad_pages(site)
        yield site
