"""Rules of the tree that matter are tests: who may import whom, and that the CPU path lives without torch."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import ossia

PACKAGE = Path(ossia.__file__).parent

# From the top down; an import may only point to a lower line, or stay within its own package.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"server", "scale"},
    {"train", "evals", "safeguard"},
    {"responses", "agent"},
    {"tools", "local"},
    {"engine"},
    {"model"},
    {"ops", "harmony"},
    {"config", "kept_lines"},
    {"errors"},
]
# The package's own `__init__` loads its public names lazily and is above everything.
HEIGHT = {name: len(LAYERS) - i for i, layer in enumerate(LAYERS) for name in layer} | {"ossia": len(LAYERS) + 1}

MAY_IMPORT_TORCH = (
    "ops/gpu.py",
    "ops/autograd.py",
    "ops/fused.py",
    "ops/offload.py",
    "ops/triton/",
    "ops/upload.py",
    "engine/gpu_benchmark.py",
    "engine/gpu_runner.py",
    "engine/gpu_sampler.py",
    "engine/parallel.py",
    "train/",
)


@functools.cache
def _modules() -> list[tuple[str, ast.Module]]:
    return [
        (str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def _unit(relative: str) -> str:
    first = relative.split("/")[0].removesuffix(".py")
    return "ossia" if first == "__init__" else first


def _imported(tree: ast.Module) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            # `from ossia import x` may name a subpackage.
            names += [f"ossia.{alias.name}" for alias in node.names] if module == "ossia" else [module]
    return names


def test_imports_point_downwards_only():
    faults = []
    for relative, tree in _modules():
        importer = _unit(relative)
        for name in _imported(tree):
            if not name.startswith("ossia."):
                continue
            imported = name.split(".")[1]
            if imported == importer or imported not in HEIGHT:
                continue
            if HEIGHT[imported] >= HEIGHT[importer]:
                faults.append(f"{relative} imports {name}")
    assert not faults


def test_every_part_of_the_package_has_its_place_in_the_layers():
    units = {_unit(relative) for relative, _ in _modules()}
    assert units <= set(HEIGHT)


def test_torch_triton_and_vllm_are_imported_only_where_the_design_says():
    faults = []
    for relative, tree in _modules():
        for name in _imported(tree):
            root = name.split(".")[0]
            if root in ("torch", "triton") and not relative.startswith(MAY_IMPORT_TORCH):
                faults.append(f"{relative} imports {name}")
            if root == "vllm" and relative != "scale/vllm.py":
                faults.append(f"{relative} imports {name}")
    assert not faults


def test_a_home_that_is_not_there_is_no_error_anywhere():
    """`Path.expanduser` raises for `~nobody` and for a user without a home; `os.path.expanduser` keeps such a path."""
    calls = (
        (relative, node.func)
        for relative, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "expanduser"
    )
    assert not [relative for relative, called in calls if ast.unparse(called) != "os.path.expanduser"]


def test_a_model_generates_on_the_cpu_without_torch(tmp_path):
    program = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
import ossia
from ossia.model.random_checkpoint import write_random_checkpoint
out = Path({str(tmp_path)!r}) / "tiny"
write_random_checkpoint(out, "tiny")
model = ossia.load(out)
deltas = list(model.generate("Hello", max_tokens=5, seed=1))
assert deltas, "no answer came"
print(deltas)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
