"""Files of a checkpoint: bounded shards, whole or not at all, nothing replaced that is not one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from ossia.errors import InputError, UnavailableError
from ossia.model.checkpoint_writer import new_path, plan_shards, tensor_bytes, write_safetensors


def test_shards_are_bounded_and_hold_every_tensor_once_in_order():
    tensors = {f"t{i}": ("BF16" if i % 3 else "U8", (i, 10)) for i in range(1, 30)}
    shards = plan_shards(tensors, 1000)
    names = [name for shard in shards.values() for name in shard]
    assert sorted(names, key=lambda name: int(name[1:])) == list(tensors)
    assert all(sum(map(tensor_bytes, shard.values())) <= 1000 for shard in shards.values())
    assert next(iter(shards)) == f"model-00001-of-{len(shards):05}.safetensors"


def test_a_tensor_larger_than_a_shard_has_one_for_itself():
    shards = plan_shards({"a": ("U8", (10,)), "b": ("U8", (5000,)), "c": ("U8", (10,))}, 100)
    assert [list(shard) for shard in shards.values()] == [["a"], ["b"], ["c"]]


def test_a_file_is_what_the_safetensors_package_reads(tmp_path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.uint8)}
    heard = []
    tensors = {"a": ("F32", (2, 3)), "b": ("U8", (4,))}
    write_safetensors(tmp_path / "x.safetensors", tensors, lambda name: iter(values[name]), heard.append)
    read = load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(read[name], values[name]) for name in values)
    assert sum(heard) == 28


def make(out, text="new", **options):
    with new_path(out, 10, **options) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(text)


def test_what_is_made_appears_when_it_is_whole_and_leaves_nothing_else(tmp_path):
    make(tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "config.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(RuntimeError), new_path(tmp_path / "deep" / "half", 10) as partial:
        partial.mkdir()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_what_is_there_is_replaced_only_when_asked_and_only_when_it_is_a_checkpoint(tmp_path):
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(InputError, match="is there already and not empty"):
        make(out)
    make(out, replace=True)
    assert (out / "config.json").read_text() == "new"
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(InputError, match="holds no checkpoint, so it is not replaced"):
        make(home, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_what_is_there_stays_when_its_replacement_fails(tmp_path):
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(RuntimeError), new_path(out, 10, replace=True) as partial:
        partial.mkdir()
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"
    with pytest.raises(FileNotFoundError), new_path(out, 10, replace=True):
        pass  # nothing was made
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_or_put_back_and_what_a_living_one_writes_is_not(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    out, gone = tmp_path / "out[1]", child.pid
    for name in (f".out[1].{gone}.partial", ".out[1].1.partial", ".out[1].notes"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out[1].{gone}.old").mkdir()
    (tmp_path / f".out[1].{gone}.old" / "config.json").write_text("old")
    with pytest.raises(InputError, match="is there already"):
        make(out)
    assert (out / "config.json").read_text() == "old"
    make(out, replace=True)
    assert (out / "config.json").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out[1].1.partial", ".out[1].notes", "out[1]"]


@pytest.mark.parametrize("target", ["absent", "empty", "checkpoint"])
def test_behind_a_link_it_is_made_where_the_link_points(target, tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "out")
    if target != "absent":
        (disk / "out").mkdir()
    if target == "checkpoint":
        (disk / "out" / "config.json").write_text("old")
    make(link, replace=True)
    assert link.is_symlink() and (disk / "out" / "config.json").read_text() == "new"
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(5))
    with pytest.raises(UnavailableError, match=r"needs 0.0 GiB.*Free some space"):
        make(tmp_path / "out")
    assert not list(tmp_path.iterdir())
