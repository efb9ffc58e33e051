"""What control groups leave of a machine, from files as the system has them. Memory: tests/test_memory.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ossia.ops.control_group import processors


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{file}": files[file] for file in files}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n", "c/cpu.max": "1000 100000\n"}, 4),
        ("3:cpuacct,cpu:/docker/ab\n", {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_the_least_quota_of_a_process_groups_is_what_it_may_use(cgroup, files, expected, tmp_path):
    assert processors(machine(tmp_path, cgroup, files)) == expected
