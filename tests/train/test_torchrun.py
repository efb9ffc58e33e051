"""`torchrun -m ossia train`: two processes have the curve and the weights of one, and each other's checkpoints."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from tests.train.processes import environment, launch
from tests.train.small import write_model as write_speaker
from tests.train.tiny import preferences, stations, write_model, write_rows

from ossia.errors import CheckpointError, ConfigError
from ossia.model.adapter import read_adapter
from ossia.model.weights import Checkpoint
from ossia.train.checkpoint import Checkpoints
from ossia.train.config import DpoConfig, SftConfig, read_settings
from ossia.train.distill import distill
from ossia.train.dpo import dpo
from ossia.train.merged import read_tensors
from ossia.train.metrics import read_metrics
from ossia.train.rl import rl
from ossia.train.rollout_config import DistillConfig, RlConfig
from ossia.train.sft import sft
from ossia.train.shards import read_shards

METHODS = {"sft": (SftConfig, sft), "dpo": (DpoConfig, dpo)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    write_model(folder / "model")
    write_rows(folder / "sft.jsonl", stations(16))
    write_rows(folder / "dpo.jsonl", preferences(16))
    return folder


def flags_of(folder, method, out, **flags):
    usual = {
        "model": str(folder / "model"),
        "data": str(folder / f"{method}.jsonl"),
        "out": str(folder / out),
        "threads": 1,
        "steps": 6,
        "max_tokens": 300,
        # Three passes or so: one of two processes computes one for nothing.
        "step_tokens": 800,
        "validation_share": 0.2,
        "eval_every": 3,
        "save_every": 2,
        "rank": 4,
        "learning_rate": 1e-3,
        "prompt_tokens": 4,
    }
    return usual | flags


def alone(folder, method, out, *, resume=False, **flags):
    """A run of this process; its folder."""
    kind, train = METHODS[method]
    outcome = train(
        read_settings(kind, None, flags_of(folder, method, out, **flags)), resume=resume, say=lambda text: None
    )
    assert outcome.reason == "done"
    return outcome.folder


def start(folder, method, out, *more, **flags):
    """The command of two processes, running."""
    words = []
    for name, value in flags_of(folder, method, out, **flags).items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    command = [*launch(2), "-m", "ossia", "train", method, *words, *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())


def together(folder, method, out, *more, **flags):
    """A run of two processes; its folder and what was said."""
    process = start(folder, method, out, *more, **flags)
    _, said = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return folder / out, said


def curve(out):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(out / "metrics.jsonl")]


def trained(out, model):
    """The numbers of the result, by name."""
    if (out / "adapter").exists():
        pairs = read_adapter(out / "adapter", Checkpoint.open(model).config).pairs
        return {f"{name}.{part}": getattr(pair, part) for name, pair in pairs.items() for part in "ab"}
    return {name: tensor.numpy() for name, tensor in read_shards(out, "weights", {}).items()}


def assert_alike(ours, theirs, model, rtol=1e-5):
    assert [line.keys() for line in curve(ours)] == [line.keys() for line in curve(theirs)]
    for our, their in zip(curve(ours), curve(theirs), strict=True):
        for name, value in their.items():
            close = {"rtol": 1e-4 if name == "gradient_norm" else rtol, "atol": 1e-6}
            if isinstance(value, float):
                np.testing.assert_allclose(our[name], value, **close, err_msg=f"{name} of step {their['step']}")
            else:
                assert our[name] == value
    our, their = trained(ours, model), trained(theirs, model)
    assert our.keys() == their.keys()
    for name, values in their.items():
        # A hundredth of what a step moves a number by.
        np.testing.assert_allclose(our[name], values, atol=1e-5, err_msg=name)


def test_two_processes_have_the_curve_and_the_adapter_of_one(folder):
    flags = {"targets": "q,k,v,o,experts,router,embedding,unembedding", "steps": 4, "weight_mean": 1.0}
    two, said = together(folder, "sft", "short-two", **flags)
    assert_alike(two, alone(folder, "sft", "short-one", **flags), folder / "model")
    for told_once in ("share of all", "the adapter is in", "read again, it is the same"):
        assert said.count(told_once) == 1
    names = sorted(path.name for path in (two / "checkpoints" / "step-00000004").iterdir())
    assert "trainable-00002-of-00002.safetensors" in names and "trainable.safetensors" not in names
    with pytest.raises(CheckpointError, match=r"several processes.*give the run's weights\.safetensors"):
        read_tensors(two / "checkpoints" / "step-00000004", Checkpoint.open(folder / "model").config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("sft", {"trainable": "full", "weight_mean": 2.0}),
        ("sft", {"trainable": "full", "optimizer": "muon", "recompute": False}),
        ("sft", {"trainable": "full", "optimizer": "muon", "replicate": True}),
        ("sft", {"targets": "q,o,experts,unembedding", "replicate": True}),
        ("dpo", {"targets": "q,o,experts,unembedding"}),
        ("dpo", {"trainable": "full", "sft_weight": 0.1}),
    ],
    ids=["sft-full", "sft-full-muon", "sft-full-replicated", "sft-lora-replicated", "dpo-lora", "dpo-full"],
)
def test_two_processes_train_in_every_way_as_one_does(method, flags, folder, request):
    name, flags = request.node.callspec.id, {"learning_rate": 1e-4} | flags
    two, _ = together(folder, method, f"{name}-two", **flags)
    assert_alike(two, alone(folder, method, f"{name}-one", **flags), folder / "model")


def workers(process):
    """The processes that torchrun started."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(child) for children in tasks for child in children.read_text().split()]


def kill_a_worker(process, out, num_lines, rank):
    """SIGKILL to one of two processes, once the log has this many lines; what was said."""
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= num_lines):
        time.sleep(0.01)
    os.kill(workers(process)[rank], signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode != 0
    return said


@pytest.mark.slow
@pytest.mark.parametrize(("trainable", "rank"), [("lora", 0), ("full", 1)])
def test_a_run_of_which_a_process_was_killed_goes_on_to_the_same_curve(trainable, rank, folder):
    flags = {"trainable": trainable, "dropout": 0.1 if trainable == "lora" else 0.0, "steps": 24}
    whole, _ = together(folder, "sft", f"whole-{trainable}", **flags)
    out = folder / f"killed-{trainable}"
    said = kill_a_worker(start(folder, "sft", out.name, **flags), out, 5, rank)
    assert rank == 0 or "another process of the run has ended" in said
    assert 0 < read_metrics(out / "metrics.jsonl")[-1]["step"] < 24
    together(folder, "sft", out.name, "--resume", **flags)
    assert curve(out) == curve(whole)
    ours, theirs = trained(out, folder / "model"), trained(whole, folder / "model")
    assert all(np.array_equal(ours[name], values) for name, values in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_one_process_goes_on_where_two_were_and_two_where_one_was(trainable, folder):
    flags = {"trainable": trainable, "steps": 6, "optimizer": "muon", "weight_mean": 1.0}
    whole = alone(folder, "sft", f"alone-{trainable}", **flags)
    for before, after in ((2, 1), (1, 2)):
        out = folder / f"first-{before}-{trainable}"
        if before == 2:
            together(folder, "sft", out.name, **flags)
        else:
            shutil.copytree(whole, out)
        # As if it had been killed after step 4.
        shutil.rmtree(out / "checkpoints" / "step-00000006")
        if after == 2:
            _, said = together(folder, "sft", out.name, "--resume", **flags)
            assert "processes was 1, now 2" in said and "going on after step 4 of 6" in said
        else:
            alone(folder, "sft", out.name, resume=True, **flags)
        assert_alike(out, whole, folder / "model")


@pytest.mark.slow
def test_what_is_sent_to_every_process_and_passed_on_besides_ends_the_step_and_saves(folder):
    out = folder / "interrupted"
    # Steps that take longer than torchrun to pass it on; nothing is saved on the way.
    process = start(folder, "sft", out.name, steps=2000, step_tokens=40_000, save_every=0, eval_every=0)
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 1):
        time.sleep(0.01)
    for one in (*workers(process), process.pid):
        os.kill(one, signal.SIGINT)
    _, said = process.communicate()
    assert said.count("finishing this step and saving") == 1 and "--resume goes on" in said
    (step,) = Checkpoints(out / "checkpoints", keep=1).steps()
    assert 1 <= step < 2000


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_and_is_told(folder):
    write_rows(folder / "bad.jsonl", [*stations(2), {"messages": [{"role": "robot"}]}])
    process = start(folder, "sft", "bad", data=str(folder / "bad.jsonl"), steps=0, validation_share=0.0)
    _, said = process.communicate()
    assert process.returncode != 0
    assert said.count("process 1 of 2: ") == 1 and "bad.jsonl:3" in said
    assert "process 2 of 2: the first process has ended with an error" in said
    assert "Traceback" not in said.partition("torch/distributed")[0]


# Methods that sample --------------------------------------------------------------------------------------------------

SAMPLING = {
    "rl": (RlConfig, rl, {"updates": 2, "kl": 0.1}),
    "distill": (DistillConfig, distill, {"method": "on_policy"}),
    "offline": (DistillConfig, distill, {"samples": 12, "min_reward": 0.0}),
}


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    write_speaker(folder / "model")
    write_speaker(folder / "teacher", seed=1)
    return folder


def sampling(folder, name, out, **more):
    usual = {
        "model": str(folder / "model"),
        "out": str(folder / out),
        "task": "tests.train.small:Vowels",
        "trainable": "full",
        "learning_rate": 3e-3,
        "steps": 3,
        "prompts": 3,
        "rollout_tokens": 12,
        "pass_tokens": 120,
        "eval_every": 3,
        "save_every": 2,
        "eval_prompts": 5,
        "threads": 1,
        "replicate": True,
        **({"teacher": str(folder / "teacher")} if name != "rl" else {"group": 3}),
    }
    return usual | SAMPLING[name][2] | more


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("rl", "full"),
        pytest.param("rl", "lora", marks=pytest.mark.slow),
        ("distill", "full"),
        pytest.param("offline", "full", marks=pytest.mark.slow),
    ],
)
def test_two_processes_sample_and_learn_what_one_does(name, trainable, sampler):
    kind, train, _ = SAMPLING[name]
    flags = sampling(sampler, name, f"{name}-{trainable}-1", trainable=trainable)
    outcome = train(read_settings(kind, None, flags), resume=False, say=lambda text: None)
    flags["out"] = str(sampler / f"{name}-{trainable}-2")
    words = []
    for key, value in flags.items():
        flag = key.replace("_", "-")
        words += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    command = [*launch(2), "-m", "ossia", "train", "rl" if name == "rl" else "distill", *words]
    process = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert process.returncode == 0, process.stderr[-3000:]
    ours, theirs = (read_metrics(Path(out) / "metrics.jsonl") for out in (outcome.folder, flags["out"]))
    assert [line["event"] for line in ours] == ["evaluation", "step", "step", "step", "evaluation"]
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        for key in our.keys() - {"event", "tokens_per_s", "handover_s", "rollout_s", "train_s"}:
            assert their[key] == pytest.approx(our[key], rel=1e-3, abs=1e-5), f"{key} of {our['event']} {our['step']}"
    our, their = (trained(Path(out), sampler / "model") for out in (outcome.folder, flags["out"]))
    for key, tensor in our.items():
        np.testing.assert_allclose(their[key], tensor, rtol=1e-3, atol=2e-5, err_msg=key)
    if name != "offline":
        shown = [(Path(out) / "rollouts" / "step-00000001.jsonl").read_text() for out in (outcome.folder, flags["out"])]
        assert shown[0] == shown[1]
    # One goes on where two were, as if these had been killed after step 2.
    shutil.rmtree(Path(flags["out"]) / "checkpoints" / "step-00000003")
    train(read_settings(kind, None, flags), resume=True, say=lambda text: None)
    for key, tensor in trained(Path(flags["out"]), sampler / "model").items():
        np.testing.assert_allclose(tensor, our[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_several_processes_that_sample_need_the_whole_model(sampler, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = sampling(sampler, "rl", "divided", replicate=False)
    with pytest.raises(ConfigError, match="replicate is off; expected it on for several processes"):
        rl(read_settings(RlConfig, None, flags), resume=False, say=lambda text: None)
