"""Reinforcement from settings to result: rewards rise, options do what they say, a killed run goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.train.small import CONFIG, Vowels, write_model

from ossia.errors import ConfigError, InputError
from ossia.harmony import Effort
from ossia.model.adapter import read_adapter
from ossia.train.checkpoint import Checkpoints
from ossia.train.config import read_settings
from ossia.train.metrics import read_metrics
from ossia.train.rl import GroupJudge, rl
from ossia.train.rollout import Rollout
from ossia.train.rollout_config import DistillConfig, RlConfig
from ossia.train.tasks import Draw, Instance, Reward, TaskMix, Transcript
from ossia.train.trainer import Trainer

TASK = ("tests.train.small:Vowels",)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("rl") / "model")


def settings(model: Path, out: Path, **fields: object) -> RlConfig:
    made = RlConfig(
        **{
            "model": str(model),
            "out": str(out),
            "task": TASK,
            "trainable": "full",
            "learning_rate": 3e-3,
            "schedule": "constant",
            "steps": 2,
            "prompts": 4,
            "group": 4,
            "rollout_tokens": 12,
            "eval_every": 0,
            "threads": 1,
            **fields,
        }
    )
    made.check()
    return made


def quiet(_text: str) -> None: ...


def lines(out: Path, event: str = "step") -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["event"] == event]


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reward_rises(model, tmp_path):
    asked = settings(
        model, tmp_path / "run", steps=14, prompts=8, group=8, learning_rate=1e-2, eval_every=14, eval_prompts=32
    )
    outcome = rl(asked, resume=False, say=quiet)
    first, last = lines(outcome.folder, "evaluation")
    assert first["reward"] < 0.06
    assert last["reward"] > first["reward"] + 0.1
    steps = lines(outcome.folder)
    assert all(step["mismatch"] < 0.02 for step in steps)
    assert steps[-1]["entropy"] < steps[0]["entropy"]
    assert (outcome.folder / "weights.safetensors").exists()
    assert (outcome.folder / "curves.png").read_bytes()[1:4] == b"PNG"
    shown = [json.loads(text) for text in (outcome.folder / "rollouts" / "step-00000014.jsonl").open()]
    assert len(shown) == asked.show_rollouts and "<|start|>assistant" in shown[0]["text"]


def test_lora_is_learned_through_the_engines_adapter_and_is_written_as_one(model, tmp_path):
    asked = settings(
        model, tmp_path / "run", trainable="lora", targets=("q", "experts", "unembedding"), learning_rate=2e-2,
        steps=3, prompts=8, group=8,
    )  # fmt: skip
    outcome = rl(asked, resume=False, say=quiet)
    adapter = read_adapter(outcome.folder / "adapter", CONFIG)
    assert np.abs(adapter.pairs["unembedding"].b).max() > 0.01
    # The engine samples through the very pairs that the trainer has: without them the two would drift apart.
    assert all(step["mismatch"] < 0.03 for step in lines(outcome.folder))


def test_with_the_readable_backend_engine_and_trainer_have_the_same_probabilities(model, tmp_path):
    asked = settings(model, tmp_path / "run", backend="reference", learning_rate=1e-2, trainable="lora")
    for step in lines(rl(asked, resume=False, say=quiet).folder):
        assert step["mismatch_max"] < 1e-5
        assert step["correction"] == pytest.approx(1, abs=1e-4)


def test_routers_that_are_trained_are_kept_in_balance_and_others_are_not_looked_at(model, tmp_path):
    for trainable, balanced in (("full", True), ("lora", False)):
        asked = settings(model, tmp_path / trainable, trainable=trainable, steps=1, prompts=2)
        assert ("balance" in lines(rl(asked, resume=False, say=quiet).folder)[0]) is balanced


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_on_policy_no_ratio_is_clipped_and_with_several_updates_the_policy_moves(model, tmp_path):
    once = lines(rl(settings(model, tmp_path / "once"), resume=False, say=quiet).folder)
    assert all(step["kl_old"] == 0 and step["clipped_low"] == step["clipped_high"] == 0 for step in once)
    several = settings(model, tmp_path / "several", updates=2, reuse=2, learning_rate=1e-2)
    assert all(step["kl_old"] > 0 for step in lines(rl(several, resume=False, say=quiet).folder))


@pytest.mark.slow
def test_the_divergence_from_the_beginning_is_nothing_at_first(model, tmp_path):
    for trainable in ("lora", "full"):
        asked = settings(
            model, tmp_path / trainable, kl=0.1, learning_rate=2e-2, trainable=trainable, prompts=6, group=8
        )
        first, second = lines(rl(asked, resume=False, say=quiet).folder)
        assert first["kl_reference"] == pytest.approx(0, abs=1e-9)
        assert second["kl_reference"] > 1e-6


class Constant(Vowels):
    name = "constant"

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        return Reward(0.5, {"exact": 0.0, "valid": 1.0, "malformed": 0.0})


class Rare(Vowels):
    """Half of the prompts have the same reward for all."""

    name = "rare"

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        reward = super().score(instance, transcript)
        return reward if instance.key[0] in "bcd" else reward._replace(value=0.0)


def test_equal_rewards_move_nothing(model, tmp_path):
    asked = settings(model, tmp_path / "run", task=("tests.train.test_rl:Constant",))
    outcome = rl(asked, resume=False, say=quiet)
    assert all(step["groups_equal"] == 1 and step["gradient_norm"] == 0 for step in lines(outcome.folder))
    begun, ended = (
        settings(model, tmp_path / "begun", steps=1),
        Checkpoints(outcome.folder / "checkpoints", keep=1).load(2),
    )
    first = rl(replace(begun, task=asked.task), resume=False, say=quiet)
    for name, tensor in Checkpoints(first.folder / "checkpoints", keep=1).load(1).trainable.items():
        assert np.array_equal(tensor.numpy(), ended.trainable[name].numpy())


@pytest.mark.slow
def test_groups_of_equal_reward_give_way_to_others(model, tmp_path):
    task = ("tests.train.test_rl:Rare",)
    plain = lines(rl(settings(model, tmp_path / "plain", task=task), resume=False, say=quiet).folder)
    assert any(step["groups_equal"] > 0 for step in plain)
    redrawn = settings(model, tmp_path / "redrawn", task=task, redraws=6)
    for step in lines(rl(redrawn, resume=False, say=quiet).folder):
        assert step["groups_drawn"] > 4 and step["redraws"] >= 1
        # As many groups with something to learn as were asked for.
        assert step["groups_drawn"] * (1 - step["groups_equal"]) >= 4


def rollout(num_sampled: int, effort: Effort, value: float = 1.0) -> Rollout:
    sampled_L = np.array([False] * 3 + [True] * num_sampled)
    zeros_L = np.zeros(len(sampled_L), np.float32)
    draw = Draw(Vowels(), Instance("a", "a"), effort)
    reward = Reward(value, {})
    return Rollout(draw, zeros_L.astype(np.int32), sampled_L, zeros_L, zeros_L, Transcript(()), reward)


def test_length_costs_by_effort_and_a_late_end_costs_more(tmp_path):
    asked = settings(Path("m"), tmp_path, rollout_tokens=100, length_cost="low=0.4,medium=0.1", overlong=20)
    judge = GroupJudge(asked, TaskMix({Vowels(): 1}), None, tmp_path)
    assert judge.shaped(rollout(50, Effort.LOW)) == pytest.approx(0.8)
    assert judge.shaped(rollout(50, Effort.MEDIUM)) == pytest.approx(0.95)
    assert judge.shaped(rollout(50, Effort.HIGH)) == pytest.approx(1.0)
    assert judge.shaped(rollout(90, Effort.HIGH)) == pytest.approx(0.5)
    assert judge.shaped(rollout(100, Effort.HIGH, 0.1)) == pytest.approx(-0.9)


def test_what_limits_have_ended_may_be_left_out(tmp_path):
    cut = Transcript((), is_truncated=True)
    done = [rollout(4, Effort.LOW, 1.0), replace(rollout(4, Effort.LOW, 0.0), transcript=cut)]
    for drops, expected in ((False, [0.5, -0.5]), (True, [0.5, 0.0])):
        judge = GroupJudge(settings(Path("m"), tmp_path, drop_truncated=drops), TaskMix({Vowels(): 1}), None, tmp_path)
        assert [float(lesson.advantages_R[0]) for lesson in judge._group(done)] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": 1}, "group is 1; expected at least 2"),
        ({"updates": 5}, "updates is 5 and prompts 4"),
        ({"epochs": 7}, "epochs is 7; leave it out"),
        ({"patience": 2, "eval_every": 0}, "patience is 2 and eval_every 0"),
        ({"length_cost": "lo=1"}, "length_cost holds 'lo=1'"),
        ({"efforts": "low"}, "efforts holds 'low'"),
        ({"dropout": 0.1}, "dropout is 0.1; expected 0"),
        ({"fake_quant": True, "trainable": "lora"}, "fake_quant is on; expected it off with LoRA"),
        ({"weight_mean": 2.0}, "weight_mean is 2.0; expected none"),
        ({"kv_memory": "much"}, "kv_memory is 'much'"),
        ({"task_option": ("digits",)}, "expected name=value"),
        ({"task": ()}, "task is not set"),
    ],
)
def test_settings_that_cannot_be_are_named(model, tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        settings(model, tmp_path, **fields)


def test_tokens_of_a_step_are_told_not_to_be_read(model, tmp_path):
    said = []
    rl(settings(model, tmp_path, steps=1, prompts=1, group=2, step_tokens=5000), resume=False, say=said.append)
    assert said[0].startswith("step_tokens is 5000, and not read")


# Resume --------------------------------------------------------------------------------------------------------------


def curve(out: Path) -> list[dict]:
    found = read_metrics(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in found]


def test_a_run_that_is_resumed_writes_the_same_curve_and_the_same_weights(model, tmp_path, monkeypatch):
    fields = {"steps": 4, "prompts": 6, "group": 6, "updates": 2, "learning_rate": 1e-2}
    fields |= {"save_every": 1, "eval_every": 2, "eval_prompts": 4}
    whole = rl(settings(model, tmp_path / "whole", **fields), resume=False, say=quiet)
    move = Trainer._move
    moves = []

    def stopping(self, loss, rate):
        moves.append(loss)
        # In the middle of a step that shares its rollouts between two updates.
        if len(moves) == 4:
            raise KeyboardInterrupt
        return move(self, loss, rate)

    parts = settings(model, tmp_path / "parts", **fields)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_move", stopping)
        with pytest.raises(KeyboardInterrupt):
            rl(parts, resume=False, say=quiet)
    with pytest.raises(InputError, match="--resume"):
        rl(parts, resume=False, say=quiet)
    rl(parts, resume=True, say=quiet)
    assert curve(parts_out := Path(parts.out)) == curve(whole.folder)
    assert (parts_out / "weights.safetensors").read_bytes() == (whole.folder / "weights.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_by_the_command_writes_the_same_curve(model, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}

    def command(out: str, *more: str) -> list[str]:
        flags = {
            "model": model, "out": tmp_path / out, "task": TASK[0], "trainable": "full", "learning-rate": 0.01,
            "steps": 8, "prompts": 4, "group": 4, "rollout-tokens": 12, "eval-every": 3, "eval-prompts": 4,
            "save-every": 2, "threads": 1,
        }  # fmt: skip
        given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "ossia", "train", "rl", *given, *more]

    subprocess.run(command("whole"), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(command("parts"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path / "parts" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count('"step": 5')):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command("parts", "--resume"), env=environment, check=True, capture_output=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    whole, parts = (tmp_path / out / "weights.safetensors" for out in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("rl-sums", RlConfig), ("distill-sums", DistillConfig)])
def test_the_recipes_are_settings(name, kind):
    recipe = Path(__file__).parents[2] / "recipes" / f"{name}.toml"
    read = read_settings(
        kind, recipe, {"model": "a", "out": "b", **({"teacher": "c"} if kind is DistillConfig else {})}
    )
    assert read.task == ("arithmetic",)
    assert f"recipes/{name}.toml" in recipe.read_text()
