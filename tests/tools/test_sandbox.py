"""The parts of the sandbox: filter, launchers, the self-test, what is believed of a supervisor, control groups."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import itertools
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.tools.conftest import SMALL

from ossia.errors import ConfigError, UnavailableError
from ossia.tools.python import PythonSessions
from ossia.tools.sandbox import launch as launching
from ossia.tools.sandbox import process as process_module
from ossia.tools.sandbox.cgroup import Cgroup
from ossia.tools.sandbox.inside import seccomp, wire
from ossia.tools.sandbox.inside.recording import Recording
from ossia.tools.sandbox.interpreter import find_interpreter
from ossia.tools.sandbox.launch import (
    BubblewrapLauncher,
    ContainerLauncher,
    LandlockLauncher,
    Launch,
    UnsafeLauncher,
    Users,
)
from ossia.tools.sandbox.limits import Limits
from ossia.tools.sandbox.process import ProcessSandbox
from ossia.tools.sandbox.proof import ATTACKS, prove
from ossia.tools.sandbox.tiers import candidates, report_tiers

IS_LINUX = sys.platform.startswith("linux")


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    made = ThreadPoolExecutor(1)
    yield made
    made.shutdown()


# The filter of system calls ------------------------------------------------------------------------------------------


def _decide(
    program: seccomp.Program, number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E
) -> int | str:
    """Run a filter as the kernel does: "allow", "kill", or the error number."""
    words = {0: number, 4: arch}
    for i, value in enumerate((*arguments, *(0,) * (6 - len(arguments)))):
        words[16 + 8 * i], words[20 + 8 * i] = value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
    at, accumulator = 0, 0
    while True:
        code, yes, no, operand = program[at]
        at += 1
        if code == 0x20:
            accumulator = words[operand]
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            at += operand
        elif code == 0x06:
            return "allow" if operand == 0x7FFF0000 else "kill" if operand == 0x80000000 else operand & 0xFFFF
        else:
            test = {0x15: accumulator == operand, 0x25: accumulator > operand, 0x35: accumulator >= operand,
                    0x45: bool(accumulator & operand)}[code]  # fmt: skip
            at += yes if test else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_decides_every_number_as_its_table_says(machine: str) -> None:
    program = seccomp.build(machine, hide_metadata=False)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    numbers = {n: int(v) for n, v in (p.split("=") for p in seccomp._NUMBERS[machine].split())}
    plain = set(seccomp._PLAIN.split())
    by_number = {v: n for n, v in numbers.items()}
    special = seccomp._special(hide_metadata=False)
    for number in range(600):
        found = _decide(program, number, arch=arch)
        name = by_number.get(number)
        if name is None:
            assert found == errno.EPERM, number
        elif name in plain and name not in special:
            assert found == "allow", name
    assert _decide(program, numbers["openat"], arch=1) == "kill"
    assert len(program) < 4096


@pytest.mark.parametrize(
    ("call", "arguments", "found"),
    [
        ("clone", (0x1200011,), "allow"),
        ("clone", (0x3D0F00,), "allow"),
        ("clone", (0x10000000 | 17,), errno.EPERM),
        ("clone", (0x20000,), errno.EPERM),
        ("clone", (1 << 63 | 0x40000000,), errno.EPERM),
        ("clone3", (), errno.ENOSYS),
        ("socket", (2, 1), errno.EACCES),
        ("socket", (1, 1), errno.EACCES),
        ("socketpair", (1, 1), "allow"),
        ("socketpair", (1, 1 | 0o2000000), "allow"),
        ("socketpair", (1, 2), errno.EAFNOSUPPORT),
        ("socketpair", (1, 5), errno.EAFNOSUPPORT),
        ("socketpair", (16, 1), errno.EAFNOSUPPORT),
        ("sendto", (3, 1, 1, 0, 0), "allow"),
        ("sendto", (3, 1, 1, 0, 0x7FFF0000), errno.EPERM),
        ("sendto", (3, 1, 1, 0, 1 << 40), errno.EPERM),
        ("kill", (5, 9), "allow"),
        ("kill", (0xFFFFFFFF, 9), errno.EPERM),
        ("kill", ((1 << 64) - 1, 9), errno.EPERM),
        ("ioctl", (0, 0x5412), errno.ENOTTY),
        ("ioctl", (0, 0x541C), errno.ENOTTY),
        ("ioctl", (0, 0x5401), "allow"),
        ("prctl", (15,), "allow"),
        ("prctl", (4,), errno.EPERM),
        ("prctl", (22,), errno.EPERM),
        ("fcntl", (0, 3), "allow"),
        ("fcntl", (0, 8), errno.EPERM),
        ("fcntl", (0, 1026), errno.EPERM),
        ("prlimit64", (0,), "allow"),
        ("prlimit64", (7,), errno.EPERM),
        ("setpriority", (0, 0), "allow"),
        ("setpriority", (2, 0), errno.EPERM),
        ("mknodat", (0, 0, stat.S_IFIFO | 0o600), "allow"),
        ("mknodat", (0, 0, stat.S_IFBLK | 0o600), errno.EPERM),
        ("mknodat", (0, 0, stat.S_IFSOCK), errno.EPERM),
        ("memfd_create", (), errno.ENOSYS),
        ("fchmodat", (), "allow"),
    ],
)
def test_calls_with_conditions_are_decided_by_their_arguments(
    call: str, arguments: tuple[int, ...], found: Any
) -> None:
    number = next(int(v) for n, v in (p.split("=") for p in seccomp._NUMBERS["x86_64"].split()) if n == call)
    assert _decide(seccomp.build("x86_64", hide_metadata=False), number, arguments) == found


def test_where_the_hosts_tree_is_in_sight_modes_and_times_stay() -> None:
    program = seccomp.build("x86_64", hide_metadata=True)
    for number in (90, 91, 268, 452, 132, 235, 261, 280):
        assert _decide(program, number) == 0
    assert _decide(program, 0x40000000 + 1) == errno.ENOSYS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_only_computes_may_make_change_send_and_start_nothing(machine: str) -> None:
    program = seccomp.build_computing(machine)
    arch = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    numbers = {n: int(v) for n, v in (p.split("=") for p in seccomp._NUMBERS[machine].split())}
    allowed = {name for name, number in numbers.items() if _decide(program, number, arch=arch) == "allow"}
    assert allowed >= {"read", "write", "mmap", "munmap", "futex", "exit_group", "openat"}
    refused = """clone clone3 execve socket socketpair sendto kill tgkill tkill prctl unlinkat mkdirat renameat linkat
        symlinkat truncate ftruncate fchmodat mknodat setsid memfd_create pidfd_open io_uring_setup timer_create
        copy_file_range sendfile pipe2 dup3 utimensat setpriority chdir flock fallocate sync"""
    assert not allowed & set(refused.split()) and set(refused.split()) <= set(numbers)
    for flags, found in ((0, "allow"), (0o2000000 | 0o100000, "allow"), (1, errno.EPERM), (2, errno.EPERM),
                         (0o100, errno.EPERM), (0o1000, errno.EPERM), (0o20200000, errno.EPERM)):  # fmt: skip
        assert _decide(program, numbers["openat"], (0, 0, flags), arch) == found, oct(flags)
    assert _decide(program, numbers["prlimit64"], (0, 7, 0x7FFF0000), arch) == errno.EPERM


def test_an_unknown_machine_has_no_filter() -> None:
    with pytest.raises(OSError, match="riscv64; expected x86_64 or aarch64"):
        seccomp.build("riscv64", hide_metadata=False)


# Command lines -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
def test_bubblewrap_shares_no_namespace_and_binds_nothing_of_anybodys() -> None:
    made = BubblewrapLauncher("/usr/bin/true").launch(Limits())
    arguments = made.data[0].decode().split("\0")
    for needed in (
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--die-with-parent",
        "--new-session",
    ):
        assert needed in arguments
    assert not any(one.startswith("--share") or one in ("--bind", "--dev", "--setenv") for one in arguments)
    bound = [arguments[i + 1] for i, one in enumerate(arguments) if one == "--ro-bind"]
    home = os.path.expanduser("~")
    for path in bound:
        assert path not in ("/", "/etc", "/home", "/root", "/var", "/proc", "/sys", "/tmp", "/usr", home), path
    assert made.argv[-1] == "compiled" and "--remount-ro" in made.argv
    sizes = [arguments[i + 1] for i, one in enumerate(arguments) if one == "--size"]
    assert sizes == [str(256 << 20), str(64 << 20), str(64 << 20)]
    if os.geteuid() == 0:
        assert made.settings["user"] >= 61184 and "--unshare-user" not in arguments
        caps = {arguments[i + 1] for i, one in enumerate(arguments) if one == "--cap-add"}
        assert caps == {"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"}
    else:
        assert "--unshare-user" in arguments and "--cap-add" not in arguments


def test_a_missing_bubblewrap_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_SEARCH_PATH", "/nowhere")
    with pytest.raises(UnavailableError, match="apt-get install bubblewrap"):
        BubblewrapLauncher().launch(Limits())


@pytest.fixture
def fake_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs in the place of docker and podman that write down their arguments."""
    record = tmp_path / "record"
    for name in ("docker", "podman"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/sh\nfor a in "$0" "$@"; do printf \'%s\\0\' "$a" >> {record}; done\nprintf \'\\n\' >> {record}\n'
            "echo 'docker: Error response from daemon: unknown or invalid runtime name' >&2\nexit 125\n"
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return record


@pytest.mark.parametrize(
    ("choice", "program", "tier"),
    [
        ("docker:python:3.12-slim", "docker", "docker"),
        ("podman:localhost/py@sha256:abc", "podman", "podman"),
        ("gvisor:python:3.12", "docker", "gvisor"),
    ],
)
def test_containers_start_with_everything_taken_away(
    fake_docker: Path, executor: ThreadPoolExecutor, choice: str, program: str, tier: str
) -> None:
    (launcher,) = candidates(choice)
    assert launcher.tier == tier
    proof = asyncio.run(prove(launcher, SMALL, executor))  # type: ignore[arg-type]
    assert not proof.holds and "unknown or invalid runtime name" in proof.error
    argv, removed = (line.split("\0") for line in fake_docker.read_text().split("\0\n") if line)
    assert argv[0].endswith(f"/bin/{program}") and argv[1] == "run"
    image = choice.partition(":")[2]
    options, inner = argv[2 : argv.index(image)], argv[argv.index(image) + 1 :]
    pairs = dict(itertools.pairwise(options))
    expected = {
        "--network": "none", "--cap-drop": "ALL", "--security-opt": "no-new-privileges", "--user": "65534:65534",
        "--pids-limit": "44", "--ipc": "private", "--log-driver": "none", "--pull": "never", "--entrypoint": "python3",
    }  # fmt: skip
    assert {key: pairs[key] for key in expected} == expected
    for flag in ("--rm", "--interactive", "--read-only"):
        assert flag in options
    assert pairs["--memory"] == pairs["--memory-swap"]
    for bad in (
        "--privileged",
        "--volume",
        "-v",
        "--mount",
        "--device",
        "--env",
        "-e",
        "--publish",
        "--pid",
        "--userns",
    ):
        assert bad not in options
    assert (pairs.get("--runtime") == "runsc") is (tier == "gvisor")
    assert inner[:3] == ["-I", "-S", "-B"] and inner[-1] == "source"
    name = pairs["--name"]
    assert re.fullmatch(r"ossia-python-[0-9a-f]{16}", name)
    assert removed[1:] == ["rm", "--force", name]


@pytest.mark.parametrize("image", ["--privileged", "-v/:/host", "a b", "", "x;y", "x\ny"])
def test_an_image_that_is_no_name_is_refused(image: str) -> None:
    with pytest.raises(ConfigError):
        ContainerLauncher("docker", image)


def test_a_missing_docker_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnavailableError, match="docker is not installed"):
        ContainerLauncher("docker", "x").launch(Limits())


@pytest.mark.skipif(not IS_LINUX or os.geteuid() != 0, reason="for root alone")
def test_root_gives_each_sandbox_an_identity_that_nobody_has() -> None:
    source = Users()
    users = {source.take() for _ in range(50)}
    assert len(users) == 50
    named = {int(line.split(":")[2]) for line in Path("/etc/passwd").read_text().splitlines()}
    assert not users & named and all(user is not None and user >= 61184 for user in users)


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
def test_the_interpreter_is_of_this_minor_version_and_reachable() -> None:
    python = find_interpreter(None, is_bound=False)
    found = subprocess.run([python.executable, "-I", "-S", "-c", "import sys; print(sys.version_info[:2])"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert found.stdout.strip() == str(tuple(sys.version_info[:2]))
    assert all(os.path.isabs(path) for path in (*python.read, *python.site))


# The self-test -------------------------------------------------------------------------------------------------------


class _Open:
    """A launcher that has forgotten its protection; as root it still gives up root's identity."""

    tier = "open"

    def launch(self, limits: Limits) -> Launch:
        made = LandlockLauncher().launch(limits)
        return dataclasses.replace(
            made, settings=made.settings | {"landlock_abi": 0, "min_landlock_abi": 0, "seccomp": "off"}
        )


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
def test_the_self_test_sees_a_sandbox_that_does_not_hold(executor: ThreadPoolExecutor) -> None:
    proof = asyncio.run(prove(_Open(), SMALL, executor))
    assert not proof.holds and not proof.error
    assert {"file", "loopback", "unix socket", "network", "keyring"} <= set(proof.worked)
    if os.geteuid() != 0:
        assert "kill" in proof.worked
    assert proof.words.startswith("not used, since code inside could read a file of the host; ")


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
def test_a_sandbox_that_fails_its_self_test_is_never_used() -> None:
    async def run() -> str:
        async with PythonSessions("landlock", num_warm=0) as sessions:
            sessions._kind._candidates = (_Open(),)
            with pytest.raises(UnavailableError) as caught:
                await sessions.check()
            assert (await sessions.tool("k").run("", "1")).text.startswith("[ERROR] the python tool is off")
            return caught.value.message

    message = asyncio.run(run())
    assert "no sandbox works here: not used, since code inside could" in message
    assert "Install bubblewrap" in message and "--unsafe-python" in message


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
def test_each_tiers_state_is_told_in_words(executor: ThreadPoolExecutor) -> None:
    reports = asyncio.run(report_tiers(SMALL, executor, "docker:x"))
    assert [one.tier for one in reports] == ["bubblewrap", "landlock", "docker"]
    for one in reports:
        assert one.words and "\n" not in one.words
        if one.works:
            assert one.words.startswith(f"works: {len(ATTACKS)} attacks failed (")
    reports = asyncio.run(report_tiers(SMALL, executor))
    assert sum(one.is_chosen for one in reports) == (1 if any(one.works for one in reports) else 0)


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
@pytest.mark.parametrize("max_abi", [1, 2, 3, 4, 5])
def test_an_older_landlock_is_used_only_where_root_can_give_an_identity(
    executor: ThreadPoolExecutor, max_abi: int
) -> None:
    proof = asyncio.run(prove(LandlockLauncher(max_abi), SMALL, executor))
    if proof.error and "too old" not in proof.error:
        pytest.skip(f"Landlock could not be tested on this machine: {proof.error}")
    if os.geteuid() == 0 and max_abi >= 3:
        assert proof.holds and proof.layers is not None and proof.layers["landlock"] == max_abi
    else:
        assert f"Landlock ABI {max_abi} is too old" in proof.error


@pytest.mark.skipif(not IS_LINUX, reason="Linux alone")
def test_modules_travel_as_source_to_another_python(executor: ThreadPoolExecutor) -> None:
    class Source:
        tier = "bubblewrap"

        def launch(self, limits: Limits) -> Launch:
            made = BubblewrapLauncher().launch(limits)
            return dataclasses.replace(made, argv=(*made.argv[:-1], "source"), is_source=True)

    proof = asyncio.run(prove(Source(), SMALL, executor))
    if proof.error:
        pytest.skip(f"bubblewrap could not be tested on this machine: {proof.error}")
    assert proof.holds


@pytest.mark.skipif(not IS_LINUX or os.geteuid() == 0, reason="never without a sandbox as root")
def test_unsafe_python_runs_as_the_user_and_says_its_tier() -> None:
    async def run() -> None:
        async with PythonSessions("off", unsafe_python=True, num_warm=0) as sessions:
            assert await sessions.check() == "unsafe"
            output = await sessions.tool("k").run("", "import os\nos.getuid()")
            assert output.text == str(os.getuid()) and output.details["tier"] == "unsafe"

    asyncio.run(run())


def test_unsafe_python_is_what_its_name_says() -> None:
    made = UnsafeLauncher().launch(Limits())
    made.clean_up()
    settings = made.settings
    assert settings["seccomp"] == "off" and settings["landlock_abi"] == 0 and settings["user"] is None


# What is believed of a supervisor ------------------------------------------------------------------------------------


class _Liar:
    """A "supervisor" that says what a test wants."""

    tier = "liar"

    def __init__(self, words: bytes) -> None:
        self._words = words

    def launch(self, limits: Limits) -> Launch:
        hello = wire.pack({"op": "hello"}) + wire.pack({"op": "ready", "landlock": 1})
        code = (
            f"import os, sys\nos.write(1, {hello!r})\nos.read(0, 1)\n"
            f"import time; time.sleep(0.3)\nos.write(1, {self._words!r})\ntime.sleep(60)"
        )
        return Launch((sys.executable, "-I", "-S", "-c", code), {"op": "configure"})


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (wire.PREFIX.pack(1 << 31, 0), "gone"),
        (wire.PREFIX.pack(5, 1 << 31), "gone"),
        (wire.PREFIX.pack(5, 0) + b"nojsn", "gone"),
        (wire.PREFIX.pack(100_000, 0) + b"[" * 100_000, "gone"),
        (wire.pack({"id": 1})[:8] + b"[1, 2, 3]", "gone"),
        (b"".join(map(wire.pack, ({"id": "1"}, {"id": [1]}, {"x": 1}, {"x": 1}, {"x": 1}, {"x": 1}))), "gone"),
        (wire.pack({"id": 1, "status": "root", "parts": "x", "exit_status": [], "wall_s": {}}), "died"),
        (wire.pack({"id": 1, "status": "ok", "parts": [["stream", 9999], ["display", -1], [], 5]}, b"abc"), "ok"),
        (wire.pack({"id": 1, "status": "ok", "parts": [["display", 9], ["evil", 1]]}, b"\xffabc\0\0\0\0\0z"), "ok"),
    ],
    ids=range(9),
)  # fmt: skip
def test_nothing_that_a_supervisor_says_breaks_the_host(
    executor: ThreadPoolExecutor, words: bytes, status: str
) -> None:
    async def run() -> str:
        sandbox = await ProcessSandbox.start(_Liar(words), SMALL, executor)
        try:
            execution = await sandbox.execute("1", 3)
            assert all(isinstance(one.text, str) for one in execution.outputs)
            return execution.status
        finally:
            await sandbox.close()

    assert asyncio.run(run()) == status


def test_a_program_that_cannot_be_started_is_named(executor: ThreadPoolExecutor) -> None:
    class Missing:
        tier = "missing"

        def launch(self, limits: Limits) -> Launch:
            return Launch(("/nowhere/python",), {})

    with pytest.raises(UnavailableError, match="/nowhere/python cannot be started: No such file"):
        asyncio.run(ProcessSandbox.start(Missing(), SMALL, executor))


class _Slow:
    """A launcher that takes as long as a test wants."""

    tier = "slow"

    def __init__(self) -> None:
        self.has_begun, self.may_go_on, self.is_clean = threading.Event(), threading.Event(), threading.Event()

    def launch(self, limits: Limits) -> Launch:
        self.has_begun.set()
        self.may_go_on.wait(10)
        code = "import sys; sys.stdin.read()"
        return Launch((sys.executable, "-I", "-S", "-c", code), {}, clean_up=self.is_clean.set)


@pytest.mark.parametrize("is_started", [False, True])
def test_a_start_that_is_cancelled_leaves_no_process_and_no_folder(
    executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, is_started: bool
) -> None:
    launcher = _Slow()
    started: list[subprocess.Popen[bytes]] = []
    spawn = process_module._spawn

    def spawning(*arguments: Any) -> Any:
        launch, process = spawn(*arguments)
        started.append(process)
        return launch, process

    monkeypatch.setattr(process_module, "_spawn", spawning)

    async def run() -> None:
        task = asyncio.create_task(ProcessSandbox.start(launcher, SMALL, executor))
        await asyncio.to_thread(launcher.has_begun.wait, 10)
        if is_started:
            launcher.may_go_on.set()
            # The loop is held until the thread is done: the process is there, and the task does not know it yet.
            executor.submit(lambda: None).result()
        task.cancel()
        await asyncio.sleep(0)
        launcher.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert launcher.is_clean.is_set() and [process.poll() for process in started] == [-9]


# Control groups ------------------------------------------------------------------------------------------------------


def _fake_group(path: Path, controllers: str) -> Path:
    path.mkdir()
    (path / "cgroup.subtree_control").write_text(controllers)
    return path


def test_a_control_group_is_made_where_memory_and_processes_are_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor, rich = _fake_group(tmp_path / "poor", "cpu"), _fake_group(tmp_path / "rich", "cpu memory pids")
    group = Cgroup.make(SMALL, [poor, rich])
    assert group is not None and group.path.parent == rich
    total = SMALL.memory_bytes + SMALL.data_bytes + 2 * SMALL.scratch_bytes + (96 << 20)
    assert (group.path / "memory.max").read_text() == str(total)
    assert (group.path / "pids.max").read_text() == str(SMALL.num_processes + 8)
    group.add(os.getpid())
    assert (group.path / "cgroup.procs").exists()


def test_without_a_writable_group_there_is_none(tmp_path: Path) -> None:
    assert Cgroup.make(SMALL, [_fake_group(tmp_path / "poor", ""), tmp_path / "missing"]) is None


# What is kept of output ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3], [10], [4, 4, 4], [1] * 30, [100, 1], [7, 50, 2]])
def test_a_recording_keeps_the_first_and_the_last_bytes(sizes: list[int]) -> None:
    recording = Recording(max_output=10, max_display=100)
    sent = b""
    for i, size in enumerate(sizes):
        chunk = bytes([65 + i % 26]) * size
        sent += chunk
        recording.print(chunk)
    parts, num_dropped = recording.parts()
    kept = b"".join(data for kind, data in parts if kind == "stream")
    assert num_dropped == max(0, len(sent) - 10)
    assert kept == (sent if len(sent) <= 10 else sent[:5] + sent[-5:])
    assert ("gap" in [kind for kind, _ in parts]) is (len(sent) > 10)


def test_displays_beyond_the_bound_are_counted() -> None:
    recording = Recording(max_output=10, max_display=100)
    for _ in range(3):
        recording.show("display", b"x" * 40)
    parts, _ = recording.parts()
    assert len(parts) == 2 and recording.num_displays_dropped == 1


def test_frames_survive_any_cut() -> None:
    frames = [({"a": 1}, b""), ({"b": "ü"}, b"body"), ({"c": [1, 2]}, bytes(1000))]
    whole = b"".join(wire.pack(header, body) for header, body in frames)
    for step in (1, 3, 7, 50, len(whole)):
        reader = wire.Frames()
        found = [one for i in range(0, len(whole), step) for one in reader.feed(whole[i : i + step])]
        assert found == frames
    assert json.loads(json.dumps(frames[0][0])) == {"a": 1}
