"""A model that cannot fit is refused with numbers, before it is loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import ossia.local
from ossia.config import Config
from ossia.errors import UnavailableError
from ossia.local import check_memory, tell_of_demonstration
from ossia.model.memory import HeldBytes, available_bytes, own_bytes, weight_bytes
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint
from ossia.model.safetensors_file import TensorEntry
from ossia.model.weights import Checkpoint
from ossia.train.export import export

GIB = 1 << 30


@pytest.fixture
def free(monkeypatch):
    return lambda size: monkeypatch.setattr(ossia.local, "available_bytes", lambda: (size, size))


def test_what_cannot_be_taken_back_must_fit(free):
    shape = SHAPES["20b"]
    own = own_bytes(shape, "q8", 1 * GIB)
    assert 2 * GIB < own < 4 * GIB
    free(own - 1)
    with pytest.raises(UnavailableError, match=r"needs 2\.\d GiB .* free.*--kv-memory or --dense bf16"):
        check_memory(Config(kv_memory=GIB), shape)
    free(own)
    check_memory(Config(kv_memory=GIB), shape)
    # Exact dense matrices lie in the file.
    free(own_bytes(shape, "bf16", GIB))
    check_memory(Config(kv_memory=GIB, dense="bf16"), shape)


def test_weights_that_will_be_read_from_the_disk_are_told(free, caplog):
    shape = SHAPES["20b"]
    free(weight_bytes(shape, "q8") // 2)
    with caplog.at_level(logging.WARNING):
        check_memory(Config(kv_memory=GIB), shape)
    assert "read from the disk" in caplog.text
    caplog.clear()
    free(weight_bytes(shape, "q8") + 2 * GIB)
    check_memory(Config(kv_memory=GIB), shape)
    assert caplog.text == ""


def test_experts_count_as_they_lie_in_the_file(free, caplog, tmp_path):
    shape = SHAPES["tiny"]
    folder = write_random_checkpoint(tmp_path / "tiny", "tiny")
    mxfp4 = Checkpoint.open(folder)
    experts = 3 * shape.num_layers * shape.num_experts * shape.hidden_size * shape.intermediate_size
    assert HeldBytes.of(mxfp4.tensors) == (experts * 17 // 32, 0)
    assert weight_bytes(shape, "q8") == weight_bytes(shape, "q8", HeldBytes.of(mxfp4.tensors))
    export(folder, tmp_path / "bf16", "bf16")
    bf16 = HeldBytes.of(Checkpoint.open(tmp_path / "bf16").tensors)
    assert bf16 == (experts * 2, 0)
    large = SHAPES["20b"]
    free(weight_bytes(large, "q8") + 2 * GIB)
    check_memory(Config(kv_memory=GIB), large)
    assert caplog.text == ""
    check_memory(Config(kv_memory=GIB), large, HeldBytes(experts=36 * GIB))
    assert "read from the disk" in caplog.text


def test_matrices_that_are_unpacked_cannot_be_taken_back():
    entry = TensorEntry(Path("m.gguf"), "Q4_K", (512, 256), 0, 0)
    held = HeldBytes.of({"blk.0.attn_q.weight": entry})
    assert held == (0, 512 * 256 * 34 // 32)
    shape = SHAPES["tiny"]
    assert own_bytes(shape, "bf16", 0, held) - own_bytes(shape, "bf16", 0) == held.unpacked


def test_the_demonstration_says_what_it_is_and_how_to_get_more(monkeypatch, caplog):
    monkeypatch.setattr(ossia.local, "downloaded", lambda: ["gpt-oss-20b"])
    tell_of_demonstration(Config())
    assert "small demonstration that comes with ossia; here are gpt-oss-20b for --model" in caplog.text
    caplog.clear()
    monkeypatch.setattr(ossia.local, "downloaded", list)
    tell_of_demonstration(Config())
    assert "`ossia pull gpt-oss-20b` fetches a real one" in caplog.text
    caplog.clear()
    tell_of_demonstration(Config(model="gpt-oss-20b"))
    assert caplog.text == ""


# Free memory ---------------------------------------------------------------------------------------------------------


def machine(root: Path, cgroup: str, **groups: dict[str, str]) -> Path:
    """The files of a system with 64 GiB, of which 60 are free, and these control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, files in groups.items():
        group = root / "sys/fs/cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (group / file).write_text(text)
    return root


def version_2(limit: int | str, used: int, of_files: int) -> dict[str, str]:
    stat = f"anon {used - of_files}\nactive_file {of_files // 3}\ninactive_file {of_files - of_files // 3}\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def test_what_a_container_keeps_of_files_is_free(tmp_path):
    # A download, or the mapped model of a process before, fills a container's memory with pages of files.
    root = machine(tmp_path, "0::/\n", **{".": version_2(16 * GIB, 16 * GIB - 4096, 13 * GIB)})
    assert available_bytes(root) == (13 * GIB + 4096, 16 * GIB)


def test_a_container_of_the_first_version_is_known_under_another_name_than_its_own(tmp_path):
    files = {
        "memory.limit_in_bytes": f"{16 * GIB}\n",
        "memory.usage_in_bytes": f"{15 * GIB}\n",
        "memory.stat": f"total_active_file {4 * GIB}\ntotal_inactive_file {8 * GIB}\nactive_file 0\n",
    }
    root = machine(tmp_path, "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n", memory=files)
    assert available_bytes(root) == (13 * GIB, 16 * GIB)


def test_the_bounds_of_the_own_group_and_of_those_above_it_hold(tmp_path):
    root = machine(
        tmp_path,
        "0::/system.slice/ossia.service\n",
        **{
            "system.slice/ossia.service": version_2(16 * GIB, 1 * GIB, 0),
            "system.slice": version_2(20 * GIB, 14 * GIB, 0),
            "other.slice": version_2(1 * GIB, 1 * GIB, 0),
        },
    )
    assert available_bytes(root) == (6 * GIB, 16 * GIB)


@pytest.mark.parametrize("cgroup", ["0::/\n", ""])
def test_without_a_bound_all_of_the_machine_may_be_taken(cgroup, tmp_path):
    root = machine(tmp_path, cgroup, **{".": version_2("max", 50 * GIB, 0)})
    assert available_bytes(root) == (60 * GIB, 64 * GIB)
