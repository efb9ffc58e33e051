"""Every attempt of `escapes.py` against every tier of this machine: contained, and the tool healthy afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from tests.tools.conftest import Arena
from tests.tools.escapes import CASES, PRELUDE, Case


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.is_heavy else []) for case in CASES]
)
def test_the_attempt_is_contained_and_the_tool_works_on(arena: Arena, case: Case) -> None:
    if case.tiers and arena.tier not in case.tiers:
        pytest.skip(f"what this tries is meant for {', '.join(case.tiers)} alone")
    is_alone = case.is_alone or case.is_heavy
    key = case.name if is_alone else "attacker"
    arena.call("kept = 5", key)
    timeout_s = 0.4 if case.status == ("timeout",) else 4.0 if "timeout" in case.status else 30.0
    text, status = arena.call(f"T = {arena.targets!r}\n{PRELUDE}\n{case.code}", key, timeout_s)
    assert "ESCAPED" not in text, text
    assert status in case.status, (status, text[-2000:])
    assert case.says in text, text[-2000:]
    arena.check_the_host()
    text, status = arena.call("print(6 * 7)", key)
    assert status == "ok" and text.split("\n")[-1] == "42", text
    assert text == "42" or text.startswith("[WARN]") or is_alone, text
    if case.keeps_state:
        assert arena.call("kept", key)[0] == "5"
    if is_alone:
        arena.run(arena.sessions.end_session(key))


def test_nothing_of_a_session_outlives_it(arena: Arena) -> None:
    key = "short-lived"
    arena.call(
        "import os, time\nfor i in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
        "            time.sleep(600)\n        os._exit(0)",
        key,
    )
    session = arena.run(arena.sessions.session(key))
    pids = _descendants(session._sandbox._process.pid)
    assert len(pids) >= 4
    arena.run(arena.sessions.end_session(key))
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if _is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive
    assert not [name for name in os.listdir("/tmp") if name.startswith("ossia-python-") and key in name]


def test_processes_stand_still_between_calls(arena: Arena) -> None:
    key = "ticking"
    arena.call(
        "import os, time\nif os.fork() == 0:\n    n = 0\n    while True:\n        n += 1\n"
        "        open('/mnt/data/ticks', 'w').write(str(n))\ntime.sleep(0.3)",
        key,
    )
    time.sleep(0.2)
    first = arena.run(_read(arena, key, "ticks"))
    time.sleep(0.3)
    assert arena.run(_read(arena, key, "ticks")) == first
    arena.run(arena.sessions.end_session(key))


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["bubblewrap", "landlock"])
def test_the_same_holds_for_an_ordinary_user(tier: str) -> None:
    """The suite once more, started by root's child that has given up its identity."""
    if os.geteuid() != 0:
        pytest.skip("this run is an ordinary user's already")
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    root = Path(__file__).parents[2]
    site = sysconfig.get_paths()["purelib"]
    user, paths = 61999, [str(root / "src"), site, *(p for p in sys.path if p.endswith("site-packages"))]
    probe = [f"import pytest, numpy, ossia.tools.python; import os; os.listdir({str(root / 'tests' / 'tools')!r})"]
    run = {"user": user, "group": user, "extra_groups": [], "env": {"PYTHONPATH": ":".join(paths), "HOME": "/tmp"}}
    if (
        not os.path.exists(python)
        or subprocess.run([python, "-c", *probe], capture_output=True, cwd="/", **run).returncode
    ):
        pytest.skip(f"an ordinary user's run could not be tested: {python} or this checkout is not open to one")
    base = f"/tmp/ossia-escapes-{os.getpid()}-{tier}"
    options = ["-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-rs", "--basetemp", base]
    command = [python, "-m", "pytest", *options, "-k", tier, __file__]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600, **run)
    subprocess.run(["rm", "-rf", base], check=False)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    num_passed = int((re.search(r"(\d+) passed", found.stdout) or [0, 0])[1])
    if num_passed < 100:
        pytest.skip(f"the layer {tier!r} could not be tested as an ordinary user: {found.stdout[-1000:]}")


async def _read(arena: Arena, key: str, path: str) -> bytes:
    return await (await arena.sessions.session(key)).read_file(path)


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
