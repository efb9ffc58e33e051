"""Checkpoints: exact, whole or absent, pruned, and refused where damaged."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from ossia.errors import CheckpointError, InputError, UnavailableError
from ossia.train import checkpoint
from ossia.train.checkpoint import Checkpoints, Snapshot, open_run_folder
from ossia.train.shards import from_numpy, to_numpy


def _snapshot(step, size=8, **state):
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        {"step": step, "settings": {"rank": 8}} | state,
        {
            "layers.0.q.a": torch.randn(4, size, generator=generator),
            "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        },
        {"layers.0.q.a/exp_avg": torch.randn(4, size, generator=generator), "layers.0.q.a/step": torch.tensor(3.0)},
        {"torch": generator.get_state()},
    )


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    saved = _snapshot(7, position={"epoch": 1, "pack": 3})
    checkpoints.save(saved)
    loaded = Checkpoints(tmp_path / "checkpoints", keep=2).load(7)
    assert loaded.state == saved.state
    for part in ("trainable", "optimizer", "random"):
        before, after = getattr(saved, part), getattr(loaded, part)
        assert set(before) == set(after)
        for name in before:
            assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
            assert torch.equal(before[name], after[name]), name


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(_snapshot(step), best_step=2)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.save(_snapshot(6), best_step=6)
    assert checkpoints.steps() == [5, 6]
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000006"]


def test_an_interrupted_write_is_no_checkpoint_and_is_removed_by_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(_snapshot(1))
    left = tmp_path / ".step-00000002.partial"
    left.mkdir()
    (left / "state.json").write_text("{}")
    assert checkpoints.steps() == [1]
    checkpoints.save(_snapshot(3))
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def test_a_process_that_is_killed_while_it_writes_leaves_only_whole_checkpoints(tmp_path):
    program = f"""
import torch
from ossia.train.checkpoint import Checkpoints, Snapshot
checkpoints = Checkpoints(__import__("pathlib").Path({str(tmp_path)!r}), keep=3)
print("begin", flush=True)
step = 0
while True:
    step += 1
    big = torch.full((1 << 18,), float(step))
    checkpoints.save(Snapshot({{"step": step}}, {{"w": big}}, {{"w/m": big}}, {{}}))
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        while (line := process.stdout.readline()) and line.strip() != "4":
            pass
    finally:
        process.kill()
        process.wait()
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.steps()[-1] >= 4
    for step in checkpoints.steps():
        loaded = checkpoints.load(step)
        assert loaded.state["step"] == step
        assert (loaded.trainable["w"] == step).all() and (loaded.optimizer["w/m"] == step).all()


def test_a_full_disk_is_told_and_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(_snapshot(1))

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UnavailableError) as caught:
        checkpoints.save(_snapshot(2))
    message = caught.value.message
    assert "No space left" in message and "step-00000001" in message and "--resume" in message
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_file_that_may_not_grow_further_is_told(tmp_path):
    """The same by the system itself: a bound on the size of files, in a process of its own."""
    program = f"""
import pathlib, resource, signal, torch
from ossia.errors import UnavailableError
from ossia.train.checkpoint import Checkpoints, Snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
checkpoints = Checkpoints(pathlib.Path({str(tmp_path)!r}), keep=1)
try:
    checkpoints.save(Snapshot({{"step": 1}}, {{"w": torch.ones(9999)}}, {{}}, {{}}))
except UnavailableError as error:
    print(error.message)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "could not be written: File too large" in result.stdout
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_damaged_checkpoints_are_refused_with_the_file_and_a_way_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for place in (checkpoints.save(_snapshot(1)), checkpoints.save(_snapshot(2))):
        (place / "optimizer.safetensors").write_bytes((place / "optimizer.safetensors").read_bytes()[:-3])
    with pytest.raises(
        CheckpointError, match=r"safetensors is cut off.*Remove .*2; --resume then goes on after step 1\."
    ):
        checkpoints.load(2)
    (checkpoints.path(1) / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.* Remove .*1; the run has to begin anew then") as caught:
        checkpoints.load(1)
    assert "ownload" not in caught.value.message and caught.value.message.lower().count("remove") == 1
    place = checkpoints.path(1)
    (place / "state.json").write_text(json.dumps({"no": "step"}))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read: no step in it"):
        checkpoints.load(1)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to: Not a directory; give another folder"):
        open_run_folder(tmp_path / "file" / "run", needed_bytes=0)
    with pytest.raises(UnavailableError, match=r"GiB free, the checkpoints of this run need 1048576\.00 GiB"):
        open_run_folder(tmp_path / "run", needed_bytes=1 << 50)
    open_run_folder(tmp_path / "run", needed_bytes=1)
    assert os.listdir(tmp_path / "run") == []


def test_bfloat16_goes_through_numpy_unchanged():
    tensor = torch.randn(7, 3).to(torch.bfloat16).T
    array = to_numpy(tensor)
    assert array.dtype == ml_dtypes.bfloat16
    assert torch.equal(from_numpy(array), tensor)
    assert to_numpy(torch.zeros(2, dtype=torch.uint8)).dtype == np.uint8
