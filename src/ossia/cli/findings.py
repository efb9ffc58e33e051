"""What `ossia doctor` looks at: this machine and this installation, area by area, without loading a model, asking the
network or importing torch.

    findings = look()       each a line for people, and JSON for programs

A finding is `ok`, `info` (absent, and nothing that was asked for needs it), `warn` (something works less well, or a
tool is off) or `bad` (something that was asked for is broken). What is not well says in one sentence what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ossia import config
from ossia.config import EMBEDDED, Config
from ossia.errors import ConfigError, OssiaError
from ossia.model.memory import PROGRAM_BYTES, available_bytes, weight_bytes

State = Literal["ok", "info", "warn", "bad"]
_GIB = 1 << 30
# Of the published models: what a download takes.
_DOWNLOADS = {"gpt-oss-20b": 12.8 * _GIB, "gpt-oss-120b": 60.8 * _GIB}
_MIN_FREE_BYTES = 1 * _GIB
# How packages of the system are installed, by the program that does it.
_INSTALLERS = {
    "apt-get": "apt-get install",
    "dnf": "dnf install",
    "yum": "yum install",
    "zypper": "zypper install",
    "pacman": "pacman -S",
    "apk": "apk add",
    "emerge": "emerge",
    "xbps-install": "xbps-install",
    "nix-env": "nix-env -iA nixpkgs.",
}
# What may keep a user from namespaces.
_NAMESPACE_SWITCHES = (
    "user.max_user_namespaces",
    "kernel.unprivileged_userns_clone",
    "kernel.apparmor_restrict_unprivileged_userns",
)
# From this ABI on Landlock keeps signals and abstract sockets inside, too.
_FULL_LANDLOCK = 6
_DATA_PACKAGES = ("numpy", "pandas", "scipy", "sympy", "matplotlib")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    state: State
    words: str
    # What to do about it, in one sentence; empty where all is well.
    advice: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def look() -> list[Finding]:
    """Look at everything. A fault of one area is a finding of it."""
    findings, settings = look_at_settings(os.environ)
    areas: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("ossia", look_at_packages),
        ("processor", lambda: look_at_processor(settings)),
        ("memory", lambda: look_at_memory(settings, available_bytes())),
        ("model", lambda: look_at_models(settings)),
        ("disk", lambda: look_at_disks(settings)),
        ("python", lambda: look_at_python(settings)),
        ("browser", lambda: look_at_browser(settings)),
        ("mcp", lambda: look_at_mcp(settings)),
        ("server", lambda: look_at_port(settings)),
        ("gpu", lambda: look_at_gpu(settings)),
    ]
    for area, function in areas:
        try:
            findings += function()
        # Whatever a machine may be like: the other areas are still told.
        except Exception as error:
            words = f"could not be looked at: {type(error).__name__}: {error}"
            findings.append(Finding(area, "bad", words, "Report this; it is a fault of ossia's own."))
    return findings


# The installation ----------------------------------------------------------------------------------------------------


def look_at_settings(environ: Mapping[str, str]) -> tuple[list[Finding], Config]:
    """The settings in force and where they come from; the defaults where they cannot be read."""
    path, is_named = config.settings_file(environ)
    findings = []
    settings = Config()
    try:
        settings = config.load(environ=environ)
        known = {f"OSSIA_{one.name.upper()}" for one in dataclasses.fields(Config)} | {"OSSIA_CONFIG"}
        if path.is_file():
            findings.append(Finding("settings", "ok", f"{path} is read"))
        else:
            findings.append(Finding("settings", "info", f"{path} is not there; the defaults hold"))
        if variables := sorted(known & set(environ)):
            findings.append(Finding("settings", "ok", f"variables in force: {', '.join(variables)}"))
        for name in sorted(one for one in environ if one.startswith("OSSIA_") and one not in known):
            close = difflib.get_close_matches(name, sorted(known), n=1)
            advice = f"Call it {close[0]}, or unset it." if close else "Unset it."
            findings.append(Finding("settings", "warn", f"{name} is set and is no setting", advice))
        changed = [
            one.name for one in dataclasses.fields(Config) if getattr(settings, one.name) != getattr(Config(), one.name)
        ]
        if changed:
            shown = ", ".join(changed)
            findings.append(Finding("settings", "ok", f"not as by default: {shown}", details={"changed": changed}))
    except ConfigError as error:
        advice = f"Correct it in {path}, or in the variable that it names." if path.is_file() or is_named else ""
        findings.append(Finding("settings", "bad", error.message, advice or "Correct the variable that it names."))
    return findings, settings


def look_at_packages() -> Iterator[Finding]:
    """ossia, Python, and the packages that ossia needs, by their versions."""
    from importlib import metadata

    from packaging.requirements import Requirement

    python = f"Python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    try:
        needed = [Requirement(line) for line in metadata.requires("ossia") or ()]
        yield Finding("ossia", "ok", f"ossia {metadata.version('ossia')}, {python}")
    except metadata.PackageNotFoundError:
        yield Finding("ossia", "warn", f"ossia is not installed as a package; {python}", "Run `pip install .` in it.")
        return
    found: dict[str, str] = {}
    faults = []
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found[one.name] = metadata.version(one.name)
            if not one.specifier.contains(found[one.name], prereleases=True):
                faults.append((one, f"{one.name} is {found[one.name]}; expected {one.specifier}"))
        except metadata.PackageNotFoundError:
            faults.append((one, f"{one.name} is not installed; expected {one.specifier or 'any version'}"))
    for one, words in faults:
        yield Finding("ossia", "bad", words, f"Run `{sys.executable} -m pip install --upgrade '{one}'`.")
    if not faults:
        shown = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Finding("ossia", "ok", f"the packages that it needs are there: {shown}", details={"packages": found})


# The machine ---------------------------------------------------------------------------------------------------------


# What the slowest kernels do without, by the machine's name, and what helps.
_X86 = ("AVX2", "Use a processor with AVX2 (2013 and later), or let the virtual machine show it.")
_ARM = ("dot products (asimddp)", "Use a processor with Armv8.2's dot products (most since 2018).")
_FASTER = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}


def look_at_processor(settings: Config) -> Iterator[Finding]:
    """Cores, instruction sets, and the kernels that were chosen."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = min(settings.threads, num_cores) or num_cores
    yield Finding("processor", "ok", f"{_processor_name()}; {num_cores} cores for this process, {used} are used")
    try:
        from ossia import _kernels
        from ossia.ops.cpu import ISAS
    except ImportError as error:
        advice = "Install ossia again where there is a C++ compiler: `pip install .`; or use --backend reference."
        yield Finding("processor", "bad", f"the compiled kernels cannot be loaded: {error}", advice)
        return
    has, best = [isa for isa in ISAS if _kernels.has_isa(isa)], _kernels.best_isa()
    details = {"kernels": best, "can": has}
    others = ", ".join(isa for isa in has if isa != best)
    words = f"kernels: {best}" + (f"; {others} would run too" if others else "")
    lacks, advice = _FASTER.get(platform.machine(), ("", ""))
    if best == "portable" and lacks:
        yield Finding("processor", "warn", f"{words}; slow, since this processor shows no {lacks}", advice, details)
    else:
        yield Finding("processor", "ok", words, details=details)


def look_at_memory(settings: Config, memory: tuple[int, int]) -> Iterator[Finding]:
    """Memory against what each published model needs to answer without reading from the disk."""
    from ossia.model.random_checkpoint import SHAPES

    available, total = memory
    yield Finding(
        "memory",
        "ok",
        f"{_gib(available)} of {_gib(total)} are free for ossia",
        details={"available_bytes": available, "total_bytes": total},
    )
    for name, shape in (("gpt-oss-20b", SHAPES["20b"]), ("gpt-oss-120b", SHAPES["120b"])):
        weights = weight_bytes(shape, settings.dense)
        need = int(weights + settings.kv_memory + PROGRAM_BYTES)
        parts = f"weights {_gib(weights)}, keys and values {_gib(settings.kv_memory)}"
        words = f"{name} needs {_gib(need)} ({parts}): "
        details = {"model": name, "needed_bytes": need}
        if need <= available:
            yield Finding("memory", "ok", words + "fits", details=details)
            continue
        advice = f"Free {_gib(need - available)}, or use a machine with {_gib(need)} free; it runs, but from the disk."
        # Also gpt-oss-safeguard-20b, and gpt-oss:20b of Ollama's.
        is_wanted = "gpt-oss" in settings.model and name.rpartition("-")[2] in settings.model
        words += "does not fit; experts would be read from the disk for each token"
        yield Finding("memory", "warn" if is_wanted else "info", words, advice if is_wanted else "", details)


def look_at_models(settings: Config) -> Iterator[Finding]:
    """The model of the settings, and which published ones are here."""
    from ossia.model.hub import downloaded, resolve_model
    from ossia.model.inspection import inspect_checkpoint

    here = downloaded()
    if here:
        yield Finding("model", "ok", f"downloaded: {', '.join(here)}", details={"downloaded": here})
    elif settings.model == EMBEDDED:
        yield Finding("model", "info", "no gpt-oss model is downloaded", "Run `ossia pull gpt-oss-20b`.")
    try:
        found = inspect_checkpoint(resolve_model(settings.model))
    except OssiaError as error:
        yield Finding("model", "bad", error.message, "Name another with --model, or fetch one with `ossia pull`.")
        return
    words = f"{settings.model}: {found.shape or 'no published shape'}, {found.layout}, {_gib(found.size_bytes)}"
    if found.problems:
        advice = "Download it again; `ossia checkpoint inspect` lists all that is wrong."
        yield Finding("model", "bad", f"{words}: {found.problems[0]}", advice)
    else:
        yield Finding("model", "ok", words)


def look_at_disks(settings: Config) -> Iterator[Finding]:
    """Room for models and for what ossia keeps, and how much its caches take."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = _free_bytes(cache)
    fits = [name for name, size in _DOWNLOADS.items() if size <= free]
    room = f"room for {' and '.join(fits)}" if fits else "no room for a published model"
    words = f"models: {cache}, {_gib(free)} free, {room}"
    held = sum(_folder_bytes(one) for one in cache.glob("models--openai--gpt-oss*"))
    details = {"folder": str(cache), "free_bytes": free, "held_bytes": held}
    advice = "" if fits else "Free 12.8 GiB for gpt-oss-20b, or set HF_HOME to a folder on another disk."
    yield Finding(
        "disk", "ok" if fits else "info", words + (f"; gpt-oss takes {_gib(held)}" if held else ""), advice, details
    )
    folder = config.data_folder()
    free, held = _free_bytes(folder), _folder_bytes(folder)
    details = {"folder": str(folder), "free_bytes": free, "held_bytes": held}
    words = f"ossia's own: {folder}, {_gib(free)} free; responses, indexes and history take {_mib(held)}"
    if not _may_write(folder):
        advice = "Make it writable, or set XDG_DATA_HOME to another folder."
        yield Finding("disk", "bad", f"{folder} cannot be written", advice, details)
    elif free < _MIN_FREE_BYTES:
        advice = f"Free some space, delete {folder / 'browser'} (it is made again), or set XDG_DATA_HOME."
        yield Finding("disk", "warn", words, advice, details)
    else:
        yield Finding("disk", "ok", words, details=details)


# Tools ---------------------------------------------------------------------------------------------------------------


def look_at_python(settings: Config) -> list[Finding]:
    """Each kind of sandbox, attacked; the one that the python tool gets; and the packages that code can import."""
    from ossia.tools.python import PythonSessions

    async def report() -> list[Any]:
        sessions = PythonSessions(settings.python_sandbox, num_warm=0)
        try:
            return await sessions.report()
        finally:
            await sessions.aclose()

    try:
        tiers = asyncio.run(report())
    except ConfigError as error:
        return [Finding("python", "bad", error.message, "Correct python_sandbox in the settings.")]
    findings = []
    chosen = next((one.tier for one in tiers if one.is_chosen and one.works), "")
    is_asked = settings.python_sandbox not in ("auto", "off") or "python" in settings.tools.split(",")
    for one in tiers:
        words = one.words.removeprefix(f"{one.tier}: ")
        details = {"tier": one.tier, "works": one.works, "chosen": one.tier == chosen}
        if one.works:
            findings.append(Finding("python", "ok", f"{one.tier}: {words}", details=details))
        else:
            state: State = "info" if chosen else "warn"
            advice = _sandbox_advice(one.tier, words)
            findings.append(Finding("python", state, f"{one.tier}: {words}", advice, details))
    if settings.python_sandbox == "off":
        findings.append(Finding("python", "info", "the tool is switched off (python_sandbox is 'off')"))
    elif chosen:
        findings.append(Finding("python", "ok", f"the tool runs in {chosen}", details={"tier": chosen}))
    else:
        words = "the tool is off, since no sandbox works here"
        advice = f"Make one of these work; the usual one is bubblewrap: {install_step('bubblewrap')}."
        if any(one.works for one in tiers):
            words = f"the tool is off, since python_sandbox is {settings.python_sandbox!r} and that does not work here"
            advice = "Set python_sandbox to auto, or make it work."
        findings.append(Finding("python", "bad" if is_asked else "warn", words, advice))
    return [*findings, *look_at_layers(sandboxed=chosen), *_look_at_data_packages()]


def look_at_layers(*, sandboxed: str = "") -> Iterator[Finding]:
    """What a sandbox is made of, layer by layer, as this kernel has it; ``sandboxed`` is the kind that works."""
    from ossia.tools.sandbox.cgroup import Cgroup
    from ossia.tools.sandbox.inside import landlock, seccomp
    from ossia.tools.sandbox.limits import Limits

    if not sys.platform.startswith("linux"):
        return
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    who = "root, whose identity each sandbox gives up first" if root else "an ordinary user, whose identity it keeps"
    yield Finding("python", "ok", f"layer identity: ossia runs as {who}", details={"root": root})
    if sandboxed == "bubblewrap":
        yield Finding("python", "ok", "layer namespaces: by bubblewrap, proven")
    else:
        limits = {name: value for name in _NAMESPACE_SWITCHES if (value := _sysctl(name)) is not None}
        shown = ", ".join(f"{name} = {value}" for name, value in limits.items())
        words = f"layer namespaces: not proven ({shown or 'the kernel has no switch for them'})"
        yield Finding("python", "info", words, _sandbox_advice("bubblewrap", ""), limits)
    abi = landlock.abi()
    words = f"layer Landlock: ABI {abi}" if abi else "layer Landlock: the kernel has none, or it is switched off"
    if abi >= _FULL_LANDLOCK:
        yield Finding("python", "ok", words, details={"abi": abi})
    else:
        lacking = "; signals to other processes are not scoped" if abi else ""
        yield Finding("python", "info", words + lacking, _sandbox_advice("landlock", ""), {"abi": abi})
    if seccomp.is_supported() and "Seccomp:" in _read("/proc/self/status"):
        yield Finding(
            "python", "ok", "layer seccomp: the filter is written for this processor, and the kernel takes it"
        )
    else:
        words = f"layer seccomp: no filter for {platform.machine()}, or a kernel without it"
        yield Finding("python", "info", words, "Use x86_64 or aarch64, and a kernel with CONFIG_SECCOMP_FILTER.")
    group = Cgroup.make(Limits())
    if group is not None:
        group.remove()
        yield Finding("python", "ok", "layer control group: memory and processes are bounded by one of version 2")
    else:
        words = "layer control group: none of version 2 can be made here; the sandbox's own watch stands in for it"
        advice = "Start it where systemd gives it a group, such as `systemd-run --user --scope ossia serve ...`."
        yield Finding("python", "info", words, advice)


def install_step(package: str, search_path: str | None = None) -> str:
    """How this system's package manager installs a package."""
    for program, words in _INSTALLERS.items():
        if shutil.which(program, path=search_path):
            separator = "" if words.endswith(".") else " "
            root = "" if program == "nix-env" or (hasattr(os, "geteuid") and os.geteuid() == 0) else "sudo "
            return f"`{root}{words}{separator}{package}`"
    return f"install the package {package} of this system"


def look_at_browser(settings: Config) -> Iterator[Finding]:
    """Where the browser searches, whether documents can be parsed here, and what confines the parser."""
    from ossia.tools.web.backend import backend_of, backend_state
    from ossia.tools.web.parse_child import Parser

    try:
        sqlite3.connect(":memory:").execute("CREATE VIRTUAL TABLE t USING fts5(x)")
        yield Finding("browser", "ok", f"folders can be indexed (SQLite {sqlite3.sqlite_version} with FTS5)")
    except sqlite3.OperationalError:
        advice = "Use a Python whose SQLite has FTS5, such as that of python.org or of the system."
        yield Finding("browser", "warn", "folders cannot be indexed: this Python's SQLite has no FTS5", advice)
    parser = Parser(1)
    try:
        is_pdf_read = "ossia" in parser.render("pdf", _small_pdf(), "https://example.com/a.pdf").text
        layers = parser.layers()
        if is_pdf_read:
            yield Finding("browser", "ok", "HTML and PDF are read, in a process of their own")
        else:
            advice = f"Run `{sys.executable} -m pip install --upgrade pypdf`."
            yield Finding("browser", "warn", "the text of a PDF was not found in it", advice)
        yield _parser_layers(layers)
    except OssiaError as error:
        advice = f"Run `{sys.executable} -m pip install --force-reinstall lxml pypdf protego`."
        yield Finding("browser", "bad", f"documents cannot be parsed: {error.message}", advice)
    finally:
        parser.close()
    if not settings.browser:
        words = "no place to search is set"
        yield Finding(
            "browser", "info", words, "Give --browser-root FOLDER, or set `browser` to a service of docs/browser.md."
        )
        return
    try:
        backend = backend_of(settings)
        assert backend is not None
    except OssiaError as error:
        yield Finding("browser", "bad", error.message, "Correct `browser` (and `browser_key`) in the settings.")
        return
    try:
        yield _backend_finding(asyncio.run(backend_state(backend)))
    finally:
        backend.close()


def look_at_mcp(settings: Config) -> Iterator[Finding]:
    """The protocol's package, and the servers of the settings; none is started or asked."""
    version = _version_of("mcp")
    is_needed = bool(settings.mcp) or "mcp" in settings.tools.split(",")
    if version is None:
        step = f"Run `{sys.executable} -m pip install 'ossia[mcp]'`."
        yield Finding("mcp", "bad" if is_needed else "info", "the package mcp is not installed", step)
    else:
        yield Finding("mcp", "ok", f"the package mcp {version} is there")
    for name, server in settings.mcp.items():
        asked = "asked before each call" if server.approval == "always" else "called unasked"
        try:
            filled = config.filled_in(server, name)
        except ConfigError as error:
            yield Finding("mcp", "bad", error.message, "Set the variable where ossia is started.")
            continue
        if filled.command and shutil.which(filled.command, path=filled.env.get("PATH")) is None:
            words = f"[mcp.{name}]: the program {filled.command!r} is not found"
            yield Finding("mcp", "bad", words, "Install it, or give its whole path as `command`.")
        else:
            where = f"starts {Path(filled.command).name}" if filled.command else "is reached by HTTP"
            yield Finding("mcp", "ok", f"[mcp.{name}] {where}, {asked}")


# Server and GPU ------------------------------------------------------------------------------------------------------


def look_at_port(settings: Config) -> Iterator[Finding]:
    """Whether `ossia serve` could listen."""
    where = f"{settings.host}:{settings.port}" if settings.port else f"a port of {settings.host}"
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.create_server((settings.host, settings.port), family=family):
            pass
        yield Finding("server", "ok", f"{where} is free to listen on")
    except OSError as error:
        words = f"{where} cannot be listened on: {error.strerror or error}"
        yield Finding("server", "warn", words, "Stop what listens there, or give another --port or --host.")


def look_at_gpu(settings: Config) -> Iterator[Finding]:
    """The GPUs of this machine, and whether what is installed could use them; torch is not imported."""
    gpus, torch, triton = _gpus(), _version_of("torch"), _version_of("triton")
    built = "torch is not installed" if torch is None else f"torch {torch}"
    if torch is not None and torch.endswith("+cpu"):
        built += " (for processors alone)"
    details = {"gpus": gpus, "torch": torch, "triton": triton}
    words = f"{'; '.join(gpus) or 'no NVIDIA GPU (nvidia-smi finds none)'}; {built}"
    missing: State = "bad" if settings.backend == "gpu" else "info"
    if not gpus:
        advice = "Set backend to cpu, or install the driver of the GPU." if missing == "bad" else ""
        yield Finding("gpu", missing, words, advice, details)
    elif torch is None or torch.endswith("+cpu"):
        advice = "Install the torch of pytorch.org that fits the driver, if ossia is to compute on the GPU."
        yield Finding("gpu", missing, words, advice, details)
    elif triton is None:
        advice = "Run `pip install 'ossia[gpu]'`, if ossia is to compute on the GPU."
        yield Finding("gpu", missing, f"{words}; triton is not installed", advice, details)
    else:
        words += f"; triton {triton}: --backend gpu can be used, which has been run in Triton's interpreter alone"
        yield Finding("gpu", "ok", words, details=details)


# Parts of these ------------------------------------------------------------------------------------------------------


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""


def _sysctl(name: str) -> str | None:
    return _read(f"/proc/sys/{name.replace('.', '/')}").strip() or None


def _processor_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _sandbox_advice(tier: str, words: str) -> str:
    if not sys.platform.startswith("linux"):
        return "Use docker:IMAGE, podman:IMAGE or jupyter:URL as python_sandbox."
    if tier == "bubblewrap" and "not installed" in words:
        return f"Install it: {install_step('bubblewrap')}."
    if tier == "bubblewrap":
        return "Allow it user namespaces, as docs/sandbox.md says for this system, or use landlock."
    if tier == "landlock":
        return "Start a kernel of 6.12 or later with Landlock among its security modules, or use bubblewrap."
    if tier == "jupyter":
        return "Start that server, and give its address and token as jupyter:URL."
    return f"Install and start {'Docker with the runtime runsc' if tier == 'gvisor' else tier}, and pull the image."


def _look_at_data_packages() -> Iterator[Finding]:
    found = {name: version for name in _DATA_PACKAGES if (version := _version_of(name)) is not None}
    missing = [name for name in _DATA_PACKAGES if name not in found]
    words = f"code can import {', '.join(f'{name} {version}' for name, version in found.items())}"
    if not missing:
        yield Finding("python", "ok", words, details={"packages": found})
        return
    step = f"Run `{sys.executable} -m pip install 'ossia[data]'`."
    yield Finding("python", "info", f"{words}; not {', '.join(missing)}", step, {"packages": found})


def _parser_layers(layers: Mapping[str, Any]) -> Finding:
    landlock, seccomp = layers["landlock"], layers["seccomp"]
    found = [f"Landlock ABI {landlock}" if landlock else "no Landlock", "seccomp" if seccomp else "no seccomp"]
    words = f"the process that parses is confined by limits, {' and '.join(found)}"
    if landlock and seccomp:
        return Finding("browser", "ok", words, details=layers)
    advice = "Use a Linux of 5.13 or later with Landlock switched on, and a container that allows both."
    return Finding("browser", "info", words, advice, layers)


def _backend_finding(state: Mapping[str, Any]) -> Finding:
    name, details = state["backend"], dict(state)
    if state.get("key") == "missing":
        return Finding("browser", "bad", f"{name}: its key is missing", "Set OSSIA_BROWSER_KEY.", details)
    if "documents" not in state:
        return Finding("browser", "ok", f"{name} is set ({state['service']}); it was not asked", details=details)
    words = f"{name}: {state['documents']:,} documents indexed in {_mib(state['index_bytes'])}"
    if state["unreadable"]:
        words += f", {state['unreadable']:,} unreadable"
    return Finding("browser", "ok", words + "; brought up to date with the next search", details=details)


def _gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.split(", ") for line in done.stdout.splitlines() if done.returncode == 0 and line.count(", ") == 2]
    return [f"{name}, {memory}, driver {driver}" for name, memory, driver in lines]


def _version_of(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _small_pdf() -> bytes:
    """A PDF of one page that says "ossia"."""
    content = b"BT /F1 12 Tf 20 100 Td (ossia) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    rows = b"".join(b"%010d 00000 n \n" % place for place in places)
    table = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, rows)
    return data + table + b"trailer\n<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))


def _free_bytes(folder: Path) -> int:
    there = next(one for one in (folder, *folder.parents) if one.is_dir())
    return shutil.disk_usage(there).free


def _folder_bytes(folder: Path) -> int:
    return sum(
        status.st_size
        for parent, _, names in os.walk(folder)
        for name in names
        if (status := _status(os.path.join(parent, name))) is not None
    )


def _status(path: str) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.lstat(path)
    return None


def _may_write(folder: Path) -> bool:
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
