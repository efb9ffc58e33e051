"""Files of a checkpoint: bounded shards, whole or not at all, nothing replaced that is not one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from ossia.errors import InputError, UnavailableError
from ossia.model.checkpoint_writer import new_path, plan_shards, tensor_bytes, write_safetensors

OLD = json.dumps({"model_type": "gpt_oss", "text": "old"})


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
        (partial / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "text": text}))


def made(out):
    return json.loads((out / "config.json").read_text())["text"]


def test_what_is_made_appears_when_it_is_whole_and_leaves_nothing_else(tmp_path):
    make(tmp_path / "deep" / "out")
    assert made(tmp_path / "deep" / "out") == "new"
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
    assert made(out) == "new"
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    with pytest.raises(InputError, match="is not a checkpoint alone, so it is not replaced"):
        make(home, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


@pytest.mark.parametrize(
    "files",
    [
        {"a.gguf": "", "b.gguf": ""},
        {"a.gguf": "", "notes.txt": "dear"},
        {"config.json": '{"name": "web app"}', "app.py": ""},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": ""},
        {"config.json": "[]"},
        {"config.json": '{"model_type": "gpt_oss"}', "deep/notes.txt": "dear"},
        {"config.json": '{"model_type": "gpt_oss"}', "README.md/notes.txt": "dear"},
    ],
)
def test_a_folder_with_anything_else_in_it_is_never_replaced(files, tmp_path):
    for name, text in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(InputError, match="is not a checkpoint alone"):
        make(tmp_path / "out", replace=True)
    assert all((tmp_path / "out" / name).read_text() == text for name, text in files.items())


def test_a_split_file_and_an_adapter_are_replaced(tmp_path):
    for name, text in (("m-00001-of-00002.gguf", ""), ("adapter_config.json", '{"peft_type": "LORA"}')):
        out = tmp_path / name[0]
        out.mkdir()
        (out / name).write_text(text)
        make(out, replace=True)
        assert made(out) == "new"


def test_what_another_process_of_the_same_number_left_is_removed(tmp_path):
    (tmp_path / f".out.{os.getpid()}.partial").mkdir()
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_takes_the_place_of_an_empty_folder(tmp_path):
    (tmp_path / "out.gguf").mkdir()
    with new_path(tmp_path / "out.gguf", 10) as partial:
        partial.write_text("new")
    assert (tmp_path / "out.gguf").read_text() == "new"


def test_what_is_there_stays_when_its_replacement_fails(tmp_path):
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(RuntimeError), new_path(out, 10, replace=True) as partial:
        partial.mkdir()
        raise RuntimeError
    assert made(out) == "old"
    with pytest.raises(FileNotFoundError), new_path(out, 10, replace=True):
        pass  # nothing was made
    assert made(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_left_is_removed_or_put_back_and_what_a_living_one_writes_is_not(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    out, gone = tmp_path / "out[1]", child.pid
    for name in (f".out[1].{gone}.partial", ".out[1].1.partial", ".out[1].notes"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out[1].{gone}.old").mkdir()
    (tmp_path / f".out[1].{gone}.old" / "config.json").write_text(OLD)
    with pytest.raises(InputError, match="is there already"):
        make(out)
    assert made(out) == "old"
    make(out, replace=True)
    assert made(out) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out[1].1.partial", ".out[1].notes", "out[1]"]


@pytest.mark.parametrize("target", ["absent", "empty", "checkpoint"])
def test_behind_a_link_it_is_made_where_the_link_points(target, tmp_path):
    disk, link = tmp_path / "disk", tmp_path / "link"
    disk.mkdir()
    link.symlink_to(disk / "out")
    if target != "absent":
        (disk / "out").mkdir()
    if target == "checkpoint":
        (disk / "out" / "config.json").write_text(OLD)
    make(link, replace=True)
    assert link.is_symlink() and made(disk / "out") == "new"
    assert [path.name for path in disk.iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(5))
    with pytest.raises(UnavailableError, match=r"needs 0.0 GiB.*Free some space"):
        make(tmp_path / "out")
    assert not list(tmp_path.iterdir())
