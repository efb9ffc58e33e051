"""Two processes over gloo do what one does, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.processes import environment, launch

from ossia.errors import CheckpointError, InputError
from ossia.train.module import Model
from ossia.train.parallel import Team, end_process
from ossia.train.shards import Extent, read_shards, write_shard

WORKER = Path(__file__).with_name("parallel_worker.py")


def run(tmp_path: Path, num_processes: int, **options: Any) -> dict[str, Any]:
    out = tmp_path / f"out-{num_processes}-{len(list(tmp_path.iterdir()))}.json"
    command = [*launch(num_processes), str(WORKER), json.dumps(options | {"out": str(out)})]
    # Without a time limit: on a machine that others use, starting alone may take minutes.
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_two_processes_have_the_losses_of_one(trainable, recompute, small_model, tmp_path):
    # Three passes: one of the processes computes one for nothing.
    options = {"model": str(small_model()), "trainable": trainable, "steps": 3, "passes": 3, "recompute": recompute}
    one, two = (run(tmp_path, count, **options) for count in (1, 2))
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    np.testing.assert_allclose(two["norms"], one["norms"], rtol=1e-4)
    assert one["losses"][-1] < one["losses"][0]
    # Together they hold every trained number once, and half of the packed experts each.
    assert two["held"] == one["held"]
    if trainable == "lora":
        assert (one["packed"][0], two["packed"][0]) == (8, 4)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_matrices_whose_rows_lie_with_two_processes_are_made_orthogonal_as_a_whole(trainable, small_model, tmp_path):
    options = {"model": str(small_model()), "trainable": trainable, "steps": 3, "passes": 2, "optimizer": "muon"}
    one, two = (run(tmp_path, count, **options) for count in (1, 2))
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_run_goes_on_with_another_number_of_processes(trainable, small_model, tmp_path):
    options = {"model": str(small_model()), "trainable": trainable, "passes": 2}
    whole = run(tmp_path, 1, steps=4, **options)
    for before, after in ((2, 1), (1, 2)):
        folder = tmp_path / f"saved-{before}"
        folder.mkdir()
        first = run(tmp_path, before, steps=2, save=str(folder), **options)
        rest = run(tmp_path, after, steps=2, resume=str(folder), **options)
        np.testing.assert_allclose(first["losses"] + rest["losses"], whole["losses"], rtol=1e-5)


def test_passes_are_shared_so_that_all_processes_compute_as_many():
    teams = [Team(rank, 3) for rank in range(3)]
    shared = [team.share(list("abcd")) for team in teams]
    assert shared == [[("a", True), ("d", True)], [("b", True), ("a", False)], [("c", True), ("b", False)]]
    assert [team.share([]) for team in teams] == [[], [], []]


def test_a_process_that_torchrun_did_not_start_is_a_team_of_one():
    with Team.join() as team:
        assert (team.rank, team.size, team.exchange) == (0, 1, None)
        assert team.share("ab") == [("a", True), ("b", True)]
        assert (team.sums([1.5]), team.each("a"), team.first(lambda: "b")) == ([1.5], ["a"], "b")
        assert team.total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]) == 5


def test_experts_that_cannot_be_shared_alike_are_refused(small_model):
    with pytest.raises(InputError, match="8 experts cannot be shared among 3 processes"):
        Model.open(small_model(), exchange=Team(0, 3))


def test_shards_are_read_back_by_any_number_of_processes_and_damage_is_told(tmp_path):
    values = torch.arange(35, dtype=torch.float32).view(7, 5)
    shared, count = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    for rank, rows in enumerate((slice(0, 4), slice(4, 7), slice(7, 7))):
        held = {"w": Extent(rows.start, rows.stop - rows.start, (7, 5)), "s": Extent(0, 2, (2,))}
        # What an optimiser remembers of a tensor lies as the tensor does, but for the number of its steps.
        tensors = {"w": values[rows], "s": shared, "w/momentum": values[rows] / 2, "w/step": count}
        write_shard(tmp_path, "trainable", tensors, held, rank, 3)
    for rows in (slice(0, 7), slice(3, 6), slice(0, 2), slice(5, 5)):
        read = read_shards(tmp_path, "trainable", {"w": Extent(rows.start, rows.stop - rows.start, (7, 5))})
        assert torch.equal(read["w"], values[rows]) and torch.equal(read["w/momentum"], values[rows] / 2)
        assert torch.equal(read["s"], shared) and torch.equal(read["w/step"], count)
    with pytest.raises(CheckpointError, match="7 of 8 rows of w are there"):
        read_shards(tmp_path, "trainable", {"w": Extent(0, 8, (8, 5))})
    (tmp_path / "trainable-00002-of-00003.json").unlink()
    with pytest.raises(CheckpointError, match="2 shards of trainable; expected 3"):
        read_shards(tmp_path, "trainable", {})
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors cannot be read: No such file"):
        read_shards(tmp_path, "optimizer", {})


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_of_a_run_ends_with_its_status_and_all_that_it_said(status):
    """Also where a thread would keep the interpreter from its end."""
    program = (
        "import sys, threading, time\n"
        "from ossia.train.parallel import end_process\n"
        "threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        "print('told')\n"
        "print('warned', end='', file=sys.stderr)\n"
        f"end_process({status})\n"
    )
    as_one_of_several = environment() | {"TORCHELASTIC_RUN_ID": "x"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=as_one_of_several)
    assert (done.returncode, done.stdout, done.stderr) == (status, "told\n", "warned")


def test_a_process_that_was_started_alone_goes_on():
    assert end_process(3) is None
