"""From rollouts to the optimiser: the trainer sees what the engine saw, and learns from what was sampled alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.small import TOKENIZER, Vowels, make_engine, write_model

from ossia import ops as backends
from ossia.train.actor import engine_weights
from ossia.train.advantage import Objective
from ossia.train.module import Model
from ossia.train.optimizers import Optimizer
from ossia.train.policy import EMPTY, Lesson, PolicyObjective, PolicyTrainer, make_passes
from ossia.train.rollout import Exercise, Rollout, RolloutConfig, Rollouts
from ossia.train.schedule import Schedule
from ossia.train.tasks import TaskMix
from ossia.train.trainer import to_device


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("policy") / "model")


def sampled(path: Path, backend: str = "reference", count: int = 6, **settings: object) -> list[Rollout]:
    config = RolloutConfig(**({"max_tokens": 40} | settings))
    with Rollouts(make_engine(path, backends.load(backend)), TOKENIZER, config, routing=True) as rollouts:
        mix = TaskMix({Vowels(): 1})
        return rollouts.run([Exercise(mix.draw("train", 0, i), i) for i in range(count)])


@pytest.fixture(scope="module")
def rollouts(path) -> list[Rollout]:
    return sampled(path)


def lessons(rollouts: list[Rollout], advantage: float = 1.0) -> list[Lesson]:
    return [Lesson(one, np.full(one.num_sampled, advantage, np.float32)) for one in rollouts]


def passes(rollouts: list[Rollout], advantage: float = 1.0, **settings: object):
    return make_passes(lessons(rollouts, advantage), **({"pass_tokens": 400, "average": "token"} | settings))


def with_a_tools_answer(rollout: Rollout) -> Rollout:
    """The same tokens, of which some in the middle were a tool's and not the model's."""
    sampled_L = rollout.sampled_L.copy()
    first = int(np.flatnonzero(sampled_L)[0])
    sampled_L[first + 3 : first + 9] = False
    return replace(rollout, sampled_L=sampled_L)


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_trainers_log_probabilities_are_those_of_the_rollout(path, rollouts, trainable):
    model = Model.open(path, trainable=trainable)
    largest = 0.0
    for one in passes(rollouts):
        logprobs = PolicyObjective(model, Objective(), temperature=1.0).logprobs(one, torch.device("cpu"))
        largest = max(largest, np.abs(logprobs - one.model_R).max())
        np.testing.assert_allclose(logprobs, one.drawn_R, atol=1e-5)
    assert largest < 1e-5


def test_they_are_so_at_another_temperature_too(path):
    model = Model.open(path, trainable="full")
    for one in passes(sampled(path, temperature=0.7)):
        logprobs = PolicyObjective(model, Objective(), temperature=0.7).logprobs(one, torch.device("cpu"))
        np.testing.assert_allclose(logprobs, one.drawn_R, atol=2e-5)
        assert np.abs(logprobs - one.model_R).max() > 0.01


def test_the_kernels_log_probabilities_are_near_the_trainers(path):
    """Keys and values in bfloat16 and activations of 8 bits are what they differ by."""
    model = Model.open(path, trainable="full")
    for one in passes(sampled(path, "cpu")):
        logprobs = PolicyObjective(model, Objective(), temperature=1.0).logprobs(one, torch.device("cpu"))
        assert np.abs(logprobs - one.model_R).mean() < 0.02


def test_the_trainer_by_itself_chooses_the_experts_that_the_engine_recorded(path, rollouts):
    model = Model.open(path, trainable="full")
    for one in passes(rollouts):
        chosen = model.recorded_routing(one.batch)
        is_last = np.zeros(one.num_tokens, bool)
        is_last[one.batch.shared.rows_E[one.batch.query_starts_N1[1:] - 1]] = True
        for recorded_TA, layer in zip(one.experts, chosen, strict=True):
            np.testing.assert_array_equal(recorded_TA[~is_last], layer.experts_TA.numpy()[~is_last])


def test_recorded_experts_are_taken_in_place_of_the_routers_own(path, rollouts):
    model = Model.open(path, trainable="full")
    one = passes(rollouts)[0]
    objective = PolicyObjective(model, Objective(), temperature=1.0)
    others = replace(one, experts=tuple((experts + 1) % 4 for experts in one.experts))
    as_recorded, as_other, by_itself = (
        objective.logprobs(each, torch.device("cpu")) for each in (one, others, replace(one, experts=()))
    )
    np.testing.assert_allclose(as_recorded, by_itself, atol=1e-6)
    assert np.abs(as_other - by_itself).max() > 0.01


def test_the_engine_with_trained_weights_is_the_engine_of_the_checkpoint(path):
    model = Model.open(path, trainable="full")
    for backend in ("reference", "cpu"):
        ops = backends.load(backend)
        one, other = make_engine(path, ops), make_engine(path, ops)
        other.replace_weights(engine_weights(model, ops))
        with (
            Rollouts(one, TOKENIZER, RolloutConfig(max_tokens=16)) as first,
            Rollouts(other, TOKENIZER, RolloutConfig(max_tokens=16)) as second,
        ):
            exercise = Exercise(TaskMix({Vowels(): 1}).draw("train", 0, 0), 1)
            a, b = first.run([exercise])[0], second.run([exercise])[0]
        np.testing.assert_allclose(a.model_logprobs_L[:30], b.model_logprobs_L[:30], atol=2e-2)


def test_under_rounding_the_engine_samples_from_what_is_trained(path):
    model = Model.open(path, trainable="full", fake_quant=True)
    with torch.no_grad():
        for name, tensor in model.state().items():
            if name.endswith((".gate_up", ".down")):
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    engine = make_engine(path, backends.load("reference"))
    engine.replace_weights(engine_weights(model, backends.load("reference")))
    with Rollouts(engine, TOKENIZER, RolloutConfig(max_tokens=16), routing=True) as done:
        one = passes(done.run([Exercise(TaskMix({Vowels(): 1}).draw("train", 0, 0), 1)]))[0]
    met = PolicyObjective(model, Objective(), temperature=1.0).logprobs(one, torch.device("cpu"))
    np.testing.assert_allclose(met, one.model_R, atol=1e-4)


# What rollouts have in common ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(path) -> list[Rollout]:
    """Two prompts, three rollouts of each, and one of them twice."""
    with Rollouts(
        make_engine(path, backends.load("reference")), TOKENIZER, RolloutConfig(max_tokens=40), routing=True
    ) as rollouts:
        draws = [TaskMix({Vowels(): 1}).draw("train", 0, i) for i in range(2)]
        done = rollouts.run([Exercise(draws[i % 2], i) for i in range(6)])
    return [*done, done[2]]


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_what_rollouts_begin_with_alike_is_computed_once_and_learned_from_as_if_it_was_not(path, group, trainable):
    model = Model.open(path, trainable=trainable)
    random = np.random.default_rng(0)
    mixed = [Lesson(one, random.standard_normal(one.num_sampled).astype(np.float32)) for one in group]
    mixed[-1] = replace(mixed[-1], advantages_R=mixed[2].advantages_R)
    gradients, logprobs, sizes = [], [], []
    for pass_tokens in (1, 100_000):
        made = make_passes(mixed, pass_tokens=pass_tokens, average="token")
        objective = PolicyObjective(model, Objective(), temperature=1.0)
        model.zero_grad()
        for one in made:
            objective.terms(to_device(one, torch.device("cpu")))[0].backward()
        gradients.append({name: one.grad.clone() for name, one in model.state().items() if one.grad is not None})
        logprobs.append(np.concatenate([objective.logprobs(one, torch.device("cpu")) for one in made]))
        sizes.append((len(made), sum(one.num_tokens for one in made)))
    (num_alone, tokens_alone), (num_together, tokens_together) = sizes
    assert (num_alone, num_together) == (len(group), 1)
    prompts = {tuple(one.token_ids_L[: int(one.sampled_L.argmax())].tolist()) for one in group}
    saved = sum(int(one.sampled_L.argmax()) for one in group) - sum(map(len, prompts))
    assert tokens_alone == sum(len(one.token_ids_L) for one in group)
    assert tokens_together <= tokens_alone - saved - (len(group[2].token_ids_L) - int(group[2].sampled_L.argmax()) - 1)
    np.testing.assert_allclose(logprobs[1], logprobs[0], atol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-5, rtol=1e-4)


def test_where_two_rollouts_were_routed_otherwise_they_have_nothing_in_common(group):
    one = group[2]
    first = int(one.sampled_L.argmax())
    assert one.routing_LA is not None
    routing_LA = one.routing_LA.copy()
    routing_LA[first - 5] = (routing_LA[first - 5] + 1) % 4
    [together] = make_passes(lessons([one, one]), pass_tokens=100_000, average="token")
    [apart] = make_passes(lessons([one, replace(one, routing_LA=routing_LA)]), pass_tokens=100_000, average="token")
    length = len(one.token_ids_L)
    assert together.num_tokens == length + 1
    assert apart.num_tokens == 2 * length - (first - 5)


def test_a_pass_has_no_more_tokens_than_it_may(rollouts):
    for pass_tokens in (200, 400, 800):
        made = make_passes(lessons(rollouts), pass_tokens=pass_tokens, average="token")
        assert sum(one.num_sequences for one in made) == len(rollouts)
        assert all(one.num_tokens <= pass_tokens or one.num_sequences == 1 for one in made)


# What is learned from ------------------------------------------------------------------------------------------------


def test_a_tools_tokens_carry_no_gradient(path, rollouts):
    model = Model.open(path, trainable="full")
    rollout = with_a_tools_answer(rollouts[0])
    [one] = passes([rollout])
    assert one.targets_R.tolist() == rollout.token_ids_L[rollout.sampled_L].tolist()
    PolicyObjective(model, Objective(correction="none"), temperature=1.0).terms(to_device(one, torch.device("cpu")))[
        0
    ].backward()
    got = {name: parameter.grad.clone() for name, parameter in model.state().items()}
    model.zero_grad()
    # By hand: the log-probability of each token that was sampled, and of no other.
    rows = np.flatnonzero(rollout.sampled_L) - 1
    logits_RV = model(replace(one.batch, logit_rows_R=rows.astype(np.int32)))
    targets = torch.from_numpy(rollout.token_ids_L[rows + 1]).long()
    (-logits_RV.log_softmax(-1).gather(1, targets[:, None]).sum()).backward()
    for name, parameter in model.state().items():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_rollouts_without_an_advantage_are_left_out_and_still_count(rollouts):
    mixed = lessons(rollouts[:2], 0.5) + lessons(rollouts[2:], 0.0)
    made = make_passes(mixed, pass_tokens=4000, average="token")
    assert sum(one.num_sequences for one in made) == 2
    assert sum(one.norm for one in made) == sum(one.num_sampled for one in rollouts)
    everything = make_passes(mixed, pass_tokens=4000, average="token", keep_all=True)
    assert sum(one.num_sequences for one in everything) == len(rollouts)


def test_by_sequence_every_rollout_counts_alike(rollouts):
    made = passes(rollouts, average="sequence")
    assert sum(one.norm for one in made) == pytest.approx(len(rollouts))
    assert sum(float(one.weights_R.sum()) for one in made) == pytest.approx(len(rollouts), rel=1e-5)


def test_how_rollouts_are_packed_changes_no_gradient(path, rollouts):
    model = Model.open(path, trainable="full")
    gradients = []
    for pass_tokens in (1, 100_000):
        objective = PolicyObjective(model, Objective(ratio="sequence"), temperature=1.0)
        made = passes(rollouts, pass_tokens=pass_tokens, average="sequence")
        model.zero_grad()
        for one in made:
            objective.terms(to_device(one, torch.device("cpu"))).loss_sum.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.state().values()]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_the_balance_is_that_of_the_experts_that_were_replayed_and_is_no_part_of_the_loss_that_is_told(path, rollouts):
    model = Model.open(path, trainable="full")
    one = passes(rollouts, pass_tokens=100_000)[0]
    logits = []
    model.ops.on_route = lambda logits_TE, experts_TA: logits.append(logits_TE)
    PolicyObjective(model, Objective(), temperature=1.0).logprobs(one, torch.device("cpu"))
    model.ops.on_route = None
    by_hand = 0.0
    for logits_TE, experts_TA in zip(logits, one.experts, strict=True):
        shares_E = np.bincount(experts_TA.reshape(-1), minlength=4) / experts_TA.size
        by_hand += 4 * (shares_E * logits_TE.softmax(-1).mean(0).numpy()).sum() / len(logits)
    moved = to_device(one, torch.device("cpu"))
    plain = PolicyObjective(model, Objective(), temperature=1.0).terms(moved)
    balanced = PolicyObjective(model, Objective(), temperature=1.0, balance_weight=0.5).terms(moved)
    assert "balance" not in plain.sums and plain.penalty_sum is None
    assert balanced.loss_sum.item() == plain.loss_sum.item()
    assert balanced.sums["balance"] == pytest.approx(by_hand * one.num_rows, rel=1e-5)
    assert balanced.penalty_sum.item() == pytest.approx(0.5 * by_hand * one.num_rows, rel=1e-5)
    balanced.penalty_sum.backward()
    assert all(model.state()[f"layers.{i}.router.weight"].grad.abs().max() > 0 for i in range(2))


# Steps ---------------------------------------------------------------------------------------------------------------


def make_trainer(model: Model, objective: Objective | None = None, balance_weight: float = 0.0) -> PolicyTrainer:
    return PolicyTrainer(
        PolicyObjective(model, objective or Objective(), temperature=1.0, balance_weight=balance_weight),
        Optimizer(model.state().items()),
        Schedule("constant", 10),
        highest_rate=1e-3,
    )


def parameters(model: Model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.state().values()])


def test_a_step_of_equal_rewards_changes_nothing(path, rollouts):
    model = Model.open(path, trainable="full")
    before = parameters(model)
    assert passes(rollouts, 0.0) == []
    report = make_trainer(model).step([EMPTY])
    assert report.step == 1 and report.loss == report.gradient_norm == 0 and not report.is_skipped
    assert torch.equal(parameters(model), before)


def test_what_is_told_of_the_balance_is_of_the_rows_that_were_trained(path, rollouts):
    made = make_passes([*lessons(rollouts), *lessons(rollouts, 0.0)], pass_tokens=100_000, average="token")
    report = make_trainer(Model.open(path, trainable="full"), balance_weight=1e-3).step(made)
    assert report.shown["trained_share"] == pytest.approx(0.5)
    # Of four experts two are used: 1 where all are used alike.
    assert 1 <= report.shown["balance"] < 2


def test_a_step_makes_rewarded_tokens_likelier(path, rollouts):
    model = Model.open(path, trainable="full")
    trainer = make_trainer(model)
    made = passes(rollouts)
    before = trainer.objective.logprobs(made[0], torch.device("cpu")).mean()
    report = trainer.step(made)
    assert trainer.objective.logprobs(made[0], torch.device("cpu")).mean() > before + 0.01
    assert report.shown["mismatch_max"] < 1e-5
    assert report.shown["entropy"] == pytest.approx(-before, abs=0.3)
    assert report.shown["kl_old"] == pytest.approx(0, abs=1e-9)


def test_a_step_of_several_updates_counts_once_and_compares_with_the_policy_that_sampled(path, rollouts):
    model = Model.open(path, trainable="full")
    trainer = make_trainer(model)
    made = passes(rollouts)
    made = [replace(one, old_R=trainer.objective.logprobs(one, torch.device("cpu"))) for one in made]
    report = trainer.step([replace(one, update=update) for update in range(3) for one in made])
    assert report.step == trainer.num_steps_done == 1
    assert report.shown["kl_old"] > 0
    assert report.num_tokens == 3 * sum(one.num_tokens for one in made)
