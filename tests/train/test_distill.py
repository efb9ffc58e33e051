"""Distillation: teachings on the disk, teachers here and behind a server, and a student that comes nearer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.server.conftest import Served
from tests.train.small import TOKENIZER, write_model

from ossia.config import Config
from ossia.engine import AsyncEngine
from ossia.errors import CheckpointError, ConfigError, InputError, TrainingError, UnavailableError
from ossia.harmony import Tokenizer
from ossia.local import LocalModel
from ossia.responses.loop import Model as ServedModel
from ossia.server.limits import Admission
from ossia.server.store import Store
from ossia.train.distill import collect, distill, gathered_logprobs, partial_kl, teaching_passes
from ossia.train.metrics import read_metrics
from ossia.train.module import Model
from ossia.train.policy import rollout_config
from ossia.train.rollout import Exercise, Rollouts, rollout_seed
from ossia.train.rollout_config import DistillConfig
from ossia.train.tasks import make_mix
from ossia.train.teacher import LocalTeacher, ServerTeacher, open_teacher
from ossia.train.teachings import Teachings, vocabulary_digest

TASK = ("tests.train.small:Vowels",)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("student") / "model", seed=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "model", seed=2)


@pytest.fixture(scope="module")
def server(teacher) -> Iterator[Served]:
    """`ossia serve` over the teacher, on loopback."""
    local = LocalModel.open(Config(model=str(teacher), dense="bf16", threads=1))
    engine = AsyncEngine(local.engine)
    served = Served(ServedModel("teacher", engine, local.tokenizer), Store("sqlite://"), admission=Admission(64, 64))
    yield served
    served.stop()
    engine.close()


def settings(student: Path, teacher: object, out: Path, **fields: object) -> DistillConfig:
    made = DistillConfig(
        **{
            "model": str(student),
            "teacher": str(teacher),
            "out": str(out),
            "task": TASK,
            "trainable": "full",
            "learning_rate": 1e-2,
            "schedule": "constant",
            "steps": 4,
            "prompts": 8,
            "group": 1,
            "rollout_tokens": 12,
            "samples": 10,
            "shard": 4,
            "eval_prompts": 4,
            "top": 8,
            "threads": 1,
            **fields,
        }
    )
    made.check()
    return made


def quiet(_text: str) -> None: ...


def metrics(out: Path, event: str) -> list[dict]:
    return [line for line in read_metrics(out / "metrics.jsonl") if line["event"] == event]


# The divergence ------------------------------------------------------------------------------------------------------


def test_the_partial_divergence_is_that_of_the_named_tokens_and_the_rest_as_one():
    p, q = torch.tensor([[0.5, 0.2, 0.2, 0.1]]), torch.tensor([[0.3, 0.3, 0.1, 0.3]])
    by_hand = 0.5 * math.log(0.5 / 0.3) + 0.2 * math.log(0.2 / 0.3) + 0.3 * math.log(0.3 / 0.4)
    assert float(partial_kl(p.log()[:, :2], q.log()[:, :2])) == pytest.approx(by_hand, rel=1e-5)
    exact = float((p * (p / q).log()).sum())
    assert by_hand < exact
    assert float(partial_kl(p.log()[:, :3], q.log()[:, :3])) == pytest.approx(exact, rel=1e-5)
    assert float(partial_kl(p.log(), p.log())) == pytest.approx(0, abs=1e-6)


def test_gathered_log_probabilities_are_those_of_the_logits_and_so_is_their_gradient(student):
    model = Model.open(student, trainable="full")
    x_RD = torch.randn(300, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids_RK = torch.randint(0, TOKENIZER.vocab_size, (300, 3), generator=torch.Generator().manual_seed(1))
    got = gathered_logprobs(model, x_RD, ids_RK)
    expected = model.ops.linear(x_RD, model.weights.unembedding).log_softmax(-1).gather(1, ids_RK)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = (torch.autograd.grad(one.square().sum(), x_RD, retain_graph=True)[0] for one in (got, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# Teachings -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collected(student, teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "teachings"
    asked = settings(student, teacher, folder.parent / "run")
    collect(asked, make_mix(TASK), TOKENIZER, folder, say=quiet)
    return folder


def test_teachings_are_what_the_teacher_sampled_with_its_likeliest_tokens(student, teacher, collected):
    read = Teachings(collected).read("train")
    assert len(read) == 10
    assert sorted(path.name for path in (collected / "train").iterdir()) == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    asked = settings(student, teacher, collected.parent / "run")
    own = LocalTeacher(asked, TOKENIZER)
    with Rollouts(own.source(), TOKENIZER, rollout_config(asked), top_logprobs=8) as rollouts:
        mix = make_mix(TASK)
        again = rollouts.run([Exercise(mix.draw("train", 0, i), rollout_seed(0, 0, i)) for i in range(10)])
    for one, rollout in zip(read, again, strict=True):
        np.testing.assert_array_equal(one.token_ids_L, rollout.token_ids_L)
        np.testing.assert_array_equal(one.sampled_L, rollout.sampled_L)
        np.testing.assert_array_equal(one.top_ids_RK, rollout.top_ids_RK)
        np.testing.assert_allclose(one.top_logprobs_RK, rollout.top_logprobs_RK, rtol=1e-3)
        assert one.effort == rollout.draw.effort
        assert one.reward == pytest.approx(rollout.reward.value)


def test_the_held_out_samples_are_of_other_instances(collected):
    def texts(split):
        return {TOKENIZER.decode(one.token_ids_L[: (~one.sampled_L).sum()].tolist()) for one in read.read(split)}

    read = Teachings(collected)
    assert len(read.read("held_out")) == 4
    prompts = {text.partition("<|start|>user")[2] for text in texts("train")}
    assert not prompts & {text.partition("<|start|>user")[2] for text in texts("held_out")}


def test_collecting_goes_on_with_the_shards_that_are_missing(student, teacher, tmp_path):
    folder, said = tmp_path / "t", []
    asked = settings(student, teacher, tmp_path / "run")
    collect(asked, make_mix(TASK), TOKENIZER, folder, say=said.append)
    whole = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert len(said) == 4
    lost = folder / "train" / "shard-00001.safetensors"
    lost.rename(lost.with_name(".shard-00001.safetensors.partial"))
    said.clear()
    collect(asked, make_mix(TASK), TOKENIZER, folder, say=said.append)
    assert len(said) == 1 and said[0].startswith("train 5 to 8 of 10")
    assert {path: path.read_bytes() for path in folder.rglob("shard-*.safetensors")} == whole
    with pytest.raises(ConfigError, match="holds other teachings: top was 8, now 5"):
        collect(replace(asked, top=5), make_mix(TASK), TOKENIZER, folder, say=quiet)


def test_more_samples_than_before_are_collected_without_a_gap(student, teacher, collected, tmp_path):
    folder, said = tmp_path / "t", []
    for samples, eval_prompts in ((2, 1), (6, 3), (10, 4)):
        asked = settings(student, teacher, tmp_path / "run", samples=samples, eval_prompts=eval_prompts)
        collect(asked, make_mix(TASK), TOKENIZER, folder, say=said.append)
    assert [text.partition(":")[0] for text in said] == [
        "train 1 to 2 of 2", "held_out 1 to 1 of 1",
        "train 1 to 4 of 6", "train 5 to 6 of 6", "held_out 1 to 3 of 3",
        "train 5 to 8 of 10", "train 9 to 10 of 10", "held_out 1 to 4 of 4",
    ]  # fmt: skip
    at_once = {path.relative_to(collected): path.read_bytes() for path in collected.rglob("shard-*")}
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("shard-*")} == at_once


def test_fewer_samples_than_were_collected_are_the_first_ones(student, teacher, collected, tmp_path):
    fewer = {"samples": 5, "eval_prompts": 2, "steps": 1, "eval_every": 1}
    own = settings(student, teacher, tmp_path / "own", **fewer)
    shared = settings(student, teacher, tmp_path / "shared", teachings=str(collected), **fewer)
    said = []
    for asked in (own, shared):
        distill(asked, resume=False, say=said.append)
    assert sum(text.startswith("5 samples of") for text in said) == 2
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("own", "shared"))
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    without = settings(student, "", tmp_path / "without", teachings=str(collected), **fewer)
    distill(without, resume=False, say=said.append)
    assert any(text.startswith("10 samples of") for text in said)


def test_a_damaged_shard_is_named(collected, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "teachings.json").write_text((collected / "teachings.json").read_text())
    shard = (collected / "train" / "shard-00000.safetensors").read_bytes()
    (tmp_path / "train" / "shard-00000.safetensors").write_bytes(shard[: len(shard) // 2])
    with pytest.raises(CheckpointError, match="shard-00000"):
        Teachings(tmp_path).read("train")


def test_teachings_that_are_not_there_are_asked_for(student, tmp_path):
    asked = settings(student, "", tmp_path / "run", teachings=str(tmp_path / "nothing"), step_tokens=5000)
    said = []
    with pytest.raises(InputError, match="holds no teachings"):
        distill(asked, resume=False, say=said.append)
    assert said == ["step_tokens is 5000, and not read: prompts and group say how much a step sees"]


# Teachers ------------------------------------------------------------------------------------------------------------


def some_rollouts(student: Path, teacher: Path, out: Path):
    asked = settings(student, teacher, out)
    own = LocalTeacher(asked, TOKENIZER)
    with Rollouts(own.source(), TOKENIZER, rollout_config(asked), top_logprobs=8) as rollouts:
        return own, rollouts.run([Exercise(make_mix(TASK).draw("train", 3, i), i) for i in range(4)])


def test_what_a_teacher_thinks_of_its_own_rollouts_is_what_it_sampled_them_with(student, teacher, tmp_path):
    own, rollouts = some_rollouts(student, teacher, tmp_path)
    for rollout, scores in zip(rollouts, own.score(rollouts, 8), strict=True):
        np.testing.assert_allclose(scores.logprobs_R, rollout.model_logprobs_L[rollout.sampled_L], atol=1e-5)
        np.testing.assert_array_equal(scores.top_ids_RK, rollout.top_ids_RK)


def test_a_server_teaches_what_the_same_model_teaches_here(student, teacher, server, tmp_path):
    own, rollouts = some_rollouts(student, teacher, tmp_path)
    asked = settings(student, f"{server.url}/v1", tmp_path)
    remote = open_teacher(asked, TOKENIZER)
    assert isinstance(remote, ServerTeacher)
    for here, there in zip(own.score(rollouts, 8), remote.score(rollouts, 8), strict=True):
        np.testing.assert_allclose(here.logprobs_R, there.logprobs_R, atol=1e-4)
        np.testing.assert_array_equal(here.top_ids_RK, there.top_ids_RK)
        np.testing.assert_allclose(here.top_logprobs_RK, there.top_logprobs_RK, atol=1e-4)
    with Rollouts(remote.source(), TOKENIZER, rollout_config(asked), top_logprobs=8) as sampling:
        again = sampling.run([Exercise(make_mix(TASK).draw("train", 3, i), i) for i in range(4)])
    for rollout, other in zip(rollouts, again, strict=True):
        np.testing.assert_array_equal(rollout.token_ids_L, other.token_ids_L)
        np.testing.assert_allclose(rollout.top_logprobs_RK, other.top_logprobs_RK, atol=1e-4)


def other_vocabulary() -> Tokenizer:
    ordinary = {bytes([b]): (b + 1) % 256 for b in range(256)}
    return Tokenizer(ordinary, TOKENIZER.special_tokens, name="shifted")


def test_a_teacher_with_another_vocabulary_is_refused_with_the_difference(student, teacher, server, tmp_path):
    assert vocabulary_digest(other_vocabulary()) != vocabulary_digest(TOKENIZER)
    with pytest.raises(ConfigError, match="another vocabulary than the student: token 0 is") as caught:
        open_teacher(settings(student, teacher, tmp_path), other_vocabulary())
    assert caught.value.param == "teacher"
    with pytest.raises(ConfigError, match="another vocabulary than the student: its token 0 of a probe"):
        open_teacher(settings(student, f"{server.url}/v1", tmp_path), other_vocabulary())


def test_a_server_that_cannot_be_reached_or_asked_for_so_much_is_told(student, server, tmp_path):
    with pytest.raises(UnavailableError, match="cannot be reached"):
        open_teacher(settings(student, "http://127.0.0.1:9/v1", tmp_path), TOKENIZER)
    with pytest.raises(ConfigError, match="at most"):
        open_teacher(settings(student, f"{server.url}/v1", tmp_path, top=30), TOKENIZER)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        open_teacher(settings(student, f"{server.url}/v1", tmp_path, teacher_key="NO_SUCH_KEY"), TOKENIZER)


# The student ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_student_comes_nearer_to_its_teacher_offline(student, teacher, tmp_path, trainable):
    asked = settings(
        student, teacher, tmp_path / "run", samples=48, steps=12, prompts=16, eval_every=12, trainable=trainable,
        top=20, eval_prompts=8, targets=("q", "k", "v", "o", "experts", "unembedding"),
    )  # fmt: skip
    outcome = distill(asked, resume=False, say=quiet)
    first, last = metrics(outcome.folder, "evaluation")
    assert last["kl"] < 0.8 * first["kl"]
    assert any(name in last for name in ("kl_low", "kl_medium", "kl_high"))
    assert all(("balance" in step) is (trainable == "full") for step in metrics(outcome.folder, "step"))
    assert (outcome.folder / ("adapter" if trainable == "lora" else "weights.safetensors")).exists()


@pytest.mark.parametrize("estimate", ["top", pytest.param("sampled", marks=pytest.mark.slow)])
def test_a_student_comes_nearer_to_its_teacher_on_policy(student, teacher, tmp_path, estimate):
    asked = settings(
        student, teacher, tmp_path / "run", method="on_policy", estimate=estimate, steps=12, prompts=16, group=2,
        eval_every=12, eval_prompts=32, top=64,
    )  # fmt: skip
    outcome = distill(asked, resume=False, say=quiet)
    first, last = metrics(outcome.folder, "evaluation")
    assert last["kl"] < 0.85 * first["kl"]
    steps = metrics(outcome.folder, "step")
    assert steps[-1]["kl"] < steps[0]["kl"]
    assert all(step["mismatch"] < 0.02 and 1 <= step["balance"] < 2 for step in steps)


@pytest.mark.slow
def test_a_server_teaches_a_student_on_policy(student, server, tmp_path):
    asked = settings(student, f"{server.url}/v1", tmp_path / "run", method="on_policy", steps=2, eval_every=0)
    outcome = distill(asked, resume=False, say=quiet)
    assert outcome.step == 2
    assert all(np.isfinite(step["reverse_kl"]) for step in metrics(outcome.folder, "step"))


def test_samples_below_the_least_reward_are_not_learned_from(student, teacher, collected, tmp_path):
    asked = settings(student, "", tmp_path / "run", teachings=str(collected), min_reward=1.0, task=())
    with pytest.raises(TrainingError, match="no sample with a reward of at least"):
        distill(asked, resume=False, say=quiet)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher": ""}, "teacher is not set"),
        ({"task": ()}, "task is not set"),
        ({"epochs": 2}, "epochs is 2; leave it out"),
        ({"method": "on_policy", "temperature": 0.5}, "temperature is 0.5"),
        ({"method": "on_policy", "dropout": 0.1}, "dropout is 0.1"),
        ({"method": "on_policy", "weight_mean": 1.0}, "weight_mean is 1.0"),
        ({"method": "on_policy", "fake_quant": True, "trainable": "lora"}, "fake_quant is on"),
    ],
)
def test_settings_of_distillation_that_cannot_be_are_named(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **({"teacher": "t", "out": tmp_path} | fields))


def test_a_run_that_is_resumed_writes_the_same_curve(student, teacher, collected, tmp_path):
    def run(out: str, steps: int, resume: bool = False) -> list[dict]:
        asked = settings(student, "", tmp_path / out, teachings=str(collected), steps=6, save_every=1, eval_every=2)
        if steps < 6:
            with pytest.MonkeyPatch.context() as patch:
                stop_after(patch, steps)
                with pytest.raises(KeyboardInterrupt):
                    distill(asked, resume=resume, say=quiet)
        else:
            distill(asked, resume=resume, say=quiet)
        lines = read_metrics(tmp_path / out / "metrics.jsonl")
        return [{key: value for key, value in line.items() if not key.endswith("_s")} for line in lines]

    whole = run("whole", 6)
    run("parts", 3)
    assert json.dumps(run("parts", 6, resume=True)) == json.dumps(whole)


def test_more_samples_are_not_collected_for_a_run_that_had_fewer(student, teacher, tmp_path):
    fewer = {"samples": 6, "steps": 2, "save_every": 1}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            distill(settings(student, teacher, tmp_path / "run", **fewer), resume=False, say=quiet)
    files = sorted((tmp_path / "run" / "teachings").rglob("*.safetensors"))
    before = [path.read_bytes() for path in files]
    with pytest.raises(ConfigError, match=r"samples was 6, now 12\. Change them back"):
        distill(settings(student, teacher, tmp_path / "run", **fewer | {"samples": 12}), resume=True, say=quiet)
    assert files and [path.read_bytes() for path in files] == before
    assert distill(settings(student, teacher, tmp_path / "run", **fewer), resume=True, say=quiet).reason == "done"


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the process be taken away in the middle of a step, as far as a test in the same process can."""
    from ossia.train.trainer import Trainer

    step = Trainer.step

    def stopping(self, passes):
        if self.num_steps_done == steps:
            raise KeyboardInterrupt
        return step(self, passes)

    patch.setattr(Trainer, "step", stopping)


def test_passes_of_teachings_hold_every_sampled_token_once(collected):
    read = Teachings(collected).read("train")
    for pass_tokens in (1, 10_000):
        passes = teaching_passes(read, pass_tokens)
        assert sum(len(one.targets_R) for one in passes) == sum(int(one.sampled_L.sum()) for one in read)
        for one in passes:
            assert one.top_ids_RK.shape == one.top_logprobs_RK.shape == (len(one.targets_R), 8)
