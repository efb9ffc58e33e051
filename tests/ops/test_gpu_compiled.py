"""Every kernel compiles for every kind of card, within its shared memory: the compiler needs no card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: the kernels of the GPU backend are not compiled")
KERNELS = {
    "_sort",
    "_gate_up",
    "_grouped",
    "_combine",
    "_store",
    "_attend",
    "_merge",
    "_rms_norm",
    "_rope",
    "_route",
    "_fetch",
    "_choose",
    "_qkv",
}


# Bytes of shared memory that a program may have: CUDA C++ Programming Guide, technical specifications.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shared_bytes"),
    [
        ("7.5", 64 << 10),
        ("8.0", 163 << 10),
        ("8.6", 99 << 10),
        ("9.0", 227 << 10),
        ("10.0", 227 << 10),
        ("12.0", 99 << 10),
    ],
)
def test_kernels_compile_and_fit_the_shared_memory(capability, shared_bytes, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "tests.ops.compile_kernels", capability]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environ, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in shared} == KERNELS
    assert max(int(size) for _, size in shared) <= shared_bytes
