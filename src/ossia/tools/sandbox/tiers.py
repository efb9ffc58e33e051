"""Which sandbox this machine can have: the strongest whose self-test holds, or none and the reason.

    auto               bubblewrap, else landlock, else off
    bubblewrap         namespaces, Landlock, seccomp
    landlock           Landlock and seccomp
    docker:IMAGE       a container; likewise podman:IMAGE
    gvisor:IMAGE       a container of Docker's whose kernel is gVisor (runtime runsc)
    jupyter:URL        a Jupyter server or kernel gateway elsewhere, with its token as ?token=
    off                no python tool

There is one more, no sandbox at all, which no choice names: only the flag --unsafe-python gives it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from ossia.errors import ConfigError, UnavailableError
from ossia.tools.sandbox.execution import Sandbox
from ossia.tools.sandbox.jupyter import JupyterSandbox, JupyterServer
from ossia.tools.sandbox.launch import (
    BubblewrapLauncher,
    ContainerLauncher,
    LandlockLauncher,
    Launcher,
    UnsafeLauncher,
)
from ossia.tools.sandbox.limits import Limits
from ossia.tools.sandbox.process import ProcessSandbox
from ossia.tools.sandbox.proof import Proof, prove

CHOICES = "auto, bubblewrap, landlock, docker:IMAGE, podman:IMAGE, gvisor:IMAGE, jupyter:URL or off"


@dataclass(frozen=True)
class TierReport:
    """One tier on this machine, for people."""

    tier: str
    works: bool
    # What protects, or what is missing and how to get it.
    words: str
    # Whether `auto` takes it.
    is_chosen: bool


class SandboxKind:
    """What a choice stands for; makes sandboxes once `check` has found one that holds."""

    def __init__(self, choice: str, limits: Limits, executor: Executor, unsafe_python: bool = False) -> None:
        """Raises ConfigError for a choice that is none."""
        self._choice = choice
        self._limits = limits
        self._executor = executor
        self._candidates = candidates(choice)
        self._chosen: Launcher | JupyterServer | None = UnsafeLauncher() if unsafe_python else None
        self._failure = ""
        self._lock = asyncio.Lock()

    @property
    def tier(self) -> str:
        """What was chosen; empty before the first check and where there is none."""
        return self._chosen.tier if self._chosen is not None else ""

    async def check(self) -> None:
        """Find the strongest sandbox that holds, once. Raises UnavailableError with what to install if none does."""
        async with self._lock:
            if self._chosen is not None:
                return
            if self._failure:
                raise UnavailableError(self._failure)
            reasons = []
            for candidate in self._candidates:
                if isinstance(candidate, JupyterServer):
                    self._chosen = candidate
                    return
                proof = await prove(candidate, self._limits, self._executor)
                if proof.holds:
                    self._chosen = candidate
                    return
                reasons.append(_reason(proof))
            self._failure = _no_sandbox(self._choice, reasons)
            raise UnavailableError(self._failure)

    async def start(self) -> Sandbox:
        """A new sandbox. Raises UnavailableError."""
        await self.check()
        if isinstance(self._chosen, JupyterServer):
            return await JupyterSandbox.start(self._chosen, self._limits)
        assert self._chosen is not None
        return await ProcessSandbox.start(self._chosen, self._limits, self._executor)


def candidates(choice: str) -> Sequence[Launcher | JupyterServer]:
    """The kinds that a choice allows, strongest first. Raises ConfigError."""
    name, _, rest = choice.partition(":")
    match name, rest:
        case "auto", "":
            return (BubblewrapLauncher(), LandlockLauncher())
        case "bubblewrap", "":
            return (BubblewrapLauncher(),)
        case "landlock", "":
            return (LandlockLauncher(),)
        case "off", "":
            return ()
        case (("docker" | "podman"), image) if image:
            return (ContainerLauncher(name, image),)
        case "gvisor", image if image:
            return (ContainerLauncher("docker", image, runtime="runsc"),)
        case "jupyter", url if url:
            return (JupyterServer.parse(url),)
    raise ConfigError(f"python_sandbox is {choice!r}; expected {CHOICES}")


async def report_tiers(limits: Limits, executor: Executor, choice: str = "auto") -> list[TierReport]:
    """The state of every tier of this machine, and of ``choice`` if it is another; each that can be is attacked."""
    chosen = ""
    reports = []
    wanted = [*candidates("auto"), *(() if choice in ("auto", "bubblewrap", "landlock", "off") else candidates(choice))]
    for candidate in wanted:
        if isinstance(candidate, JupyterServer):
            words = await candidate.probe()
            reports.append(TierReport("jupyter", words.startswith("works"), words, choice != "auto"))
            continue
        proof = await prove(candidate, limits, executor)
        is_named = choice.partition(":")[0] == candidate.tier
        is_chosen = proof.holds and (is_named or (choice == "auto" and not chosen))
        chosen = candidate.tier if is_chosen else chosen
        reports.append(TierReport(candidate.tier, proof.holds, _reason(proof), is_chosen))
    return reports


def _reason(proof: Proof) -> str:
    """A proof's words, with what to do where the launcher's own words are known."""
    words = proof.words
    if not proof.error:
        return words
    if not sys.platform.startswith("linux"):
        return f"{proof.tier}: needs Linux; use docker:IMAGE, podman:IMAGE or jupyter:URL"
    hints = {
        "setting up uid map": "user namespaces are restricted here; on Ubuntu 23.10 and later allow them for bwrap "
        "with an AppArmor profile (package apparmor-profiles: bwrap-userns-restrict), or with "
        "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`",
        "RTM_NEWADDR": "user namespaces are restricted here by AppArmor; see package apparmor-profiles",
        "No permissions to create": "user namespaces are switched off; "
        "`sysctl kernel.unprivileged_userns_clone=1` allows them",
        "Creating new namespace failed": "user namespaces are not allowed here, as in most containers; a container "
        "needs --security-opt seccomp=unconfined, or let ossia use landlock",
        "Can't mount proc": "this container forbids a /proc of one's own; run it with "
        "--security-opt systempaths=unconfined",
    }
    for sign, hint in hints.items():
        if sign in words:
            return f"{words} ({hint})"
    return words


def _no_sandbox(choice: str, reasons: Sequence[str]) -> str:
    if choice == "off":
        return "the python tool is switched off (python_sandbox is 'off')"
    found = "; ".join(reasons)
    return (
        f"the python tool is off, since no sandbox works here: {found}. Install bubblewrap, or use Linux 6.12 or later "
        "with Landlock, or choose docker:IMAGE, podman:IMAGE or jupyter:URL. Code of a model is run without a sandbox "
        "only with --unsafe-python"
    )
