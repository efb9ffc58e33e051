"""Attacks a sandbox before it is trusted: what it must hold is tried from inside, with real targets outside.

A tier counts as working only when every attack of this list failed on this machine, in this process's own setting.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossia.errors import UnavailableError
from ossia.tools.sandbox.launch import Launcher
from ossia.tools.sandbox.limits import Limits
from ossia.tools.sandbox.process import ProcessSandbox

_TIMEOUT_S = 20.0
# What each attack is after, in the order of the report.
ATTACKS = {
    "file": "read a file of the host",
    "environment": "read an environment variable of ossia",
    "loopback": "connect to a port of this machine",
    "unix socket": "connect to a UNIX socket",
    "network": "open a socket to the network",
    "kill": "kill a process of the host",
    "core_pattern": "open the kernel's core_pattern for writing",
    "privileges": "hold a capability, or root's identity",
    "namespaces": "make a user namespace",
    "keyring": "use the kernel's keyring",
}
# Runs inside; answers with the names of the attacks that worked.
_CODE = """
import ctypes, json, os, socket
target = {target}
libc = ctypes.CDLL(None, use_errno=True)
worked = []
def attack(name):
    def run(function):
        try:
            if function():
                worked.append(name)
        except Exception:
            pass
    return run
@attack("file")
def _():
    # By the C library, which knows nothing of names that Python's own functions may have been made to translate.
    fd = libc.open(target["file"].encode(), os.O_RDONLY)
    return fd >= 0 and target["secret"].encode() in os.read(fd, 100)
@attack("environment")
def _():
    found = json.dumps(dict(os.environ))
    for pid in ["self", "1", *filter(str.isdigit, os.listdir("/proc"))]:
        try:
            found += open("/proc/%s/environ" % pid, "rb").read().decode("latin-1")
        except OSError:
            pass
    return target["variable"] in found
@attack("loopback")
def _():
    socket.create_connection(("127.0.0.1", target["port"]), 1)
    return True
@attack("unix socket")
def _():
    socket.socket(socket.AF_UNIX).connect(target["socket"])
    return True
@attack("network")
def _():
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9))
    return True
@attack("kill")
def _():
    # Whether it worked is seen outside.
    os.kill(target["pid"], 9)
@attack("core_pattern")
def _():
    os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    return True
@attack("privileges")
def _():
    status = open("/proc/self/status").read().split("\\n")
    held = [int(l.split()[1], 16) for l in status if l.startswith(("CapEff", "CapPrm", "CapAmb"))]
    return any(held) or 0 in os.getresuid()
@attack("namespaces")
def _():
    return libc.unshare(0x10000000) == 0
@attack("keyring")
def _():
    number = 248 if os.uname().machine == "x86_64" else 217
    return libc.syscall(number, b"user", b"ossia", b"x", 1, -3) > 0
print(json.dumps(worked))
"""


@dataclass(frozen=True)
class Proof:
    """What came of the attacks on one tier."""

    tier: str
    # Names of the attacks that worked: none, where the tier may be used.
    worked: tuple[str, ...]
    # Why nothing could be tried; empty where it was.
    error: str = ""
    # What confined the code: Landlock's ABI, seccomp, a control group, the user.
    layers: dict[str, Any] | None = None

    @property
    def holds(self) -> bool:
        return not self.worked and not self.error

    @property
    def words(self) -> str:
        """One line for people."""
        if self.error:
            return self.error
        if self.worked:
            return "not used, since code inside could " + "; ".join(ATTACKS.get(name, name) for name in self.worked)
        layers = self.layers or {}
        found = [f"Landlock ABI {layers['landlock']}" if layers.get("landlock") else "no Landlock"]
        found.append("seccomp" if layers.get("seccomp") else "no seccomp")
        found.append(
            "memory and processes bounded by " + ("a control group" if layers.get("cgroup") else "its own watch")
        )
        return f"works: {len(ATTACKS)} attacks failed ({', '.join(found)})"


async def prove(launcher: Launcher, limits: Limits, executor: Executor) -> Proof:
    """Start one sandbox and attack it."""
    loop = asyncio.get_running_loop()
    try:
        sandbox = await ProcessSandbox.start(launcher, limits, executor)
    except UnavailableError as error:
        return Proof(launcher.tier, (), error.message)
    try:
        with contextlib.ExitStack() as stack:
            target, canary = await loop.run_in_executor(executor, stack.enter_context, _targets())
            execution = await sandbox.execute(_CODE.replace("{target}", repr(target)), _TIMEOUT_S)
            printed = "".join(one.text for one in execution.outputs if one.kind == "stream")
            try:
                found = json.loads(printed)
                worked = [name for name in ATTACKS if name in found]
            except (ValueError, TypeError):
                shown = "".join(one.text for one in execution.outputs)[-500:]
                return Proof(launcher.tier, (), f"{launcher.tier}: the self-test did not run to its end: {shown}")
            if canary.poll() is not None and "kill" not in worked:
                worked.append("kill")
        return Proof(launcher.tier, tuple(worked), layers=sandbox.layers)
    finally:
        await sandbox.close()


@contextlib.contextmanager
def _targets() -> Iterator[tuple[dict[str, Any], subprocess.Popen[bytes]]]:
    """Things of the host that code inside must not reach."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ossia-proof-") as folder, contextlib.ExitStack() as stack:
        # Open to everybody, so that only the sandbox stands before it.
        os.chmod(folder, 0o755)
        path = Path(folder) / "secret"
        path.write_text(secret)
        path.chmod(0o644)
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(f"{folder}/socket")
        os.chmod(f"{folder}/socket", 0o777)
        unix.listen()
        # A process of the host whose environment holds the secret, and which runs as whoever runs the sandbox.
        canary = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            env={"OSSIA_PROOF": secret},
        )
        try:
            yield (
                {
                    "secret": secret,
                    "variable": secret,
                    "file": str(path),
                    "port": tcp.getsockname()[1],
                    "socket": f"{folder}/socket",
                    "pid": canary.pid,
                },
                canary,
            )
        finally:
            canary.kill()
            canary.wait()
