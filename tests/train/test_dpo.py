"""Direct preference optimisation: where it begins, what it moves, and against what."""

from __future__ import annotations

import math
from contextlib import closing

import pytest
import torch
from tests.train.tiny import TOKENIZER, preferences, write_model, write_rows

from ossia.train import fit
from ossia.train.config import DpoConfig, read_settings
from ossia.train.data import to_batch
from ossia.train.dpo import Preference, dpo
from ossia.train.metrics import read_metrics
from ossia.train.parallel import Team
from ossia.train.trainer import Trainer, to_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", preferences(6))
    return folder


def _settings(folder, out, **flags):
    usual = {"model": str(folder / "model"), "data": str(folder / "pairs.jsonl"), "out": str(out), "threads": 1}
    usual |= {"max_tokens": 400, "prompt_tokens": 0, "current_date": ""}
    return read_settings(DpoConfig, None, usual | flags)


def _passes(settings):
    with closing(fit.open_stream(settings, "pairs", TOKENIZER, epochs=1)) as stream:
        return [to_batch(pack) for pack in stream]


def _open(settings):
    model = fit.open_model(settings, fit.resolve_model(settings.model), Team())
    return model, Preference(model, beta=settings.beta, sft_weight=settings.sft_weight)


def _logprob_of_answers(model, batch):
    """By the whole logits of the model, one row after the other."""
    logprobs_RV = model(batch.batch).log_softmax(-1)
    sums = [0.0] * batch.num_samples
    for row, (target, sample, weight) in enumerate(zip(batch.targets_R, batch.samples_R, batch.weights_R, strict=True)):
        sums[sample] += weight * logprobs_RV[row, target].item()
    return sums


def test_before_the_first_step_there_is_no_margin_and_the_loss_is_log_two(folder, tmp_path):
    settings = _settings(folder, tmp_path / "out")
    _, aim = _open(settings)
    for one in _passes(settings):
        terms = aim.terms(to_device(one, torch.device("cpu")))
        assert terms.loss_sum.item() == pytest.approx(math.log(2) * aim.weight(one), rel=1e-6)
        assert terms.sums["margin"] == pytest.approx(0, abs=1e-5)


def test_rewards_count_the_answers_alone_against_the_model_without_its_pairs(folder, tmp_path):
    settings = _settings(folder, tmp_path / "out", beta=0.3, sft_weight=0.5)
    model, aim = _open(settings)
    one = _passes(settings)[0]
    # Prompts are long, answers a few tokens each, and both sides of a pair have the same prompt.
    assert len(one.targets_R) < one.num_tokens / 5
    with torch.no_grad():
        before = _logprob_of_answers(model, one)
        for name, parameter in model.state().items():
            if name.endswith(".b"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
        after = _logprob_of_answers(model, one)
        terms = aim.terms(to_device(one, torch.device("cpu")))
    rewards = [0.3 * (a - b) for a, b in zip(after, before, strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(rewards[0::2], rewards[1::2], strict=True)]
    assert terms.sums["margin"] == pytest.approx(sum(margins), rel=1e-4)
    assert terms.sums["accuracy"] == sum(margin > 0 for margin in margins)
    nll = -sum(after[0::2]) / one.weights_R[one.samples_R % 2 == 0].sum() * len(margins)
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins) + 0.5 * nll
    assert terms.loss_sum.item() == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_a_row_multiplies_the_loss_of_its_pair(folder, tmp_path):
    rows = preferences(3)
    weights = [1.0, 4.0, 0.5]
    losses, loss = [], None
    for chosen in (*range(3), None):
        some = rows if chosen is None else rows[chosen : chosen + 1]
        given = weights if chosen is None else [1.0]
        path = write_rows(tmp_path / f"{chosen}.jsonl", [{**r, "weight": w} for r, w in zip(some, given, strict=True)])
        settings = _settings(folder, tmp_path / "out", data=str(path), beta=0.5, sft_weight=0.5)
        model, aim = _open(settings)
        with torch.no_grad():
            for name, parameter in model.state().items():
                if name.endswith(".b"):
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
            (one,) = _passes(settings)
            loss = aim.terms(to_device(one, torch.device("cpu"))).loss_sum.item()
        losses.append(loss)
    assert aim.weight(one) == pytest.approx(5.5)
    assert loss == pytest.approx(sum(w * each for w, each in zip(weights, losses[:3], strict=True)), rel=1e-4)


def test_what_is_remembered_is_what_the_model_without_pairs_says(folder, tmp_path):
    settings = _settings(folder, tmp_path / "out")
    model, aim = _open(settings)
    one = to_device(_passes(settings)[0], torch.device("cpu"))
    fresh = aim._reference(one)
    aim.remember(one)
    with torch.no_grad():
        for parameter in model.state().values():
            parameter.add_(0.05)
    assert torch.equal(aim._reference(one), fresh)


@pytest.mark.parametrize(("trainable", "rate"), [("lora", 2e-3), ("full", 2e-4)])
def test_training_raises_the_margin_also_of_pairs_that_were_held_out(folder, tmp_path, trainable, rate):
    settings = _settings(
        folder,
        tmp_path / "out",
        trainable=trainable,
        learning_rate=rate,
        steps=12,
        validation=str(write_rows(tmp_path / "held-out.jsonl", preferences(9)[6:])),
        eval_every=6,
        prompt_tokens=2,
    )
    said = []
    assert dpo(settings, say=said.append).reason == "done"
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    held_out = [line for line in lines if line["event"] == "evaluation"]
    assert held_out[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert held_out[-1]["margin"] > 0.3 and held_out[-1]["accuracy"] == 1
    assert held_out[-1]["loss"] < held_out[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    steps = [line for line in lines if line["event"] == "step"]
    assert steps[-1]["chosen_reward"] > steps[-1]["rejected_reward"]
    assert any("read again, it is the same" in text for text in said)


def test_a_step_cut_into_passes_is_the_same_step(folder, tmp_path):
    rows = preferences(6)
    for i, row in enumerate(rows):
        row["chosen"][0]["content"] += " and more" * i
    data = str(write_rows(tmp_path / "pairs.jsonl", rows))
    results = []
    for pass_tokens in (400, 4000):
        settings = _settings(folder, tmp_path / "out", data=data, pass_tokens=pass_tokens, sft_weight=0.5)
        model, aim = _open(settings)
        trainer = Trainer(aim, fit.make_optimizer(settings, model), fit.make_schedule(settings, 9), highest_rate=0.0)
        passes = _passes(settings)
        results.append((len(passes), trainer.step(passes)))
    (many, cut), (one, whole) = results
    assert many > one == 1
    assert cut.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.shown["chosen_nll"] == pytest.approx(whole.shown["chosen_nll"], rel=1e-5)
