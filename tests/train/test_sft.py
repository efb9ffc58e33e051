"""Supervised fine-tuning: the loss by hand, what is trained, and that what was learnt is what is served."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing

import numpy as np
import pytest
from tests.train.tiny import TOKENIZER, asked, riddles, stations, write_model, write_rows

import ossia
from ossia import ops as backends
from ossia.harmony import Message, Role, SystemContent
from ossia.model.adapter import read_adapter
from ossia.model.transformer import forward
from ossia.model.weights import Checkpoint, load_weights
from ossia.train import fit
from ossia.train.config import SftConfig, read_settings
from ossia.train.data import to_batch
from ossia.train.metrics import read_metrics
from ossia.train.module import Model
from ossia.train.parallel import Team
from ossia.train.sft import Likelihood, sft
from ossia.train.trainer import Trainer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sft") / "model")


def _settings(model_path, out, rows, **flags):
    data = write_rows(out.parent / f"{out.name}.jsonl", rows)
    usual = {"model": str(model_path), "data": str(data), "out": str(out), "threads": 1, "max_tokens": 1024}
    usual |= {"prompt_tokens": 0, "current_date": "2026-01-02"}
    return read_settings(SftConfig, None, usual | flags)


def _packs(settings):
    with closing(fit.open_stream(settings, "samples", TOKENIZER, epochs=1)) as stream:
        return list(stream)


def _trainer(settings, model):
    aim = Likelihood(model, settings.balance_weight)
    return Trainer(aim, fit.make_optimizer(settings, model), fit.make_schedule(settings, 10), highest_rate=0.0)


ROWS = [
    asked("One?", "Just one."),
    {
        "messages": [
            {"role": "user", "content": "Two and two?"},
            {"role": "assistant", "reasoning_content": "2 + 2", "content": "Four, as ever."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
    },
    asked("Three?", "Three of them, and a few more words."),
]


def test_the_loss_is_that_of_the_readable_model_computed_by_hand(model_path, tmp_path):
    settings = _settings(model_path, tmp_path / "out", ROWS, train="final,analysis=0.25", max_tokens=420)
    packs = _packs(settings)
    assert len(packs) > 1 and any(len(pack) > 1 for pack in packs)
    reference = backends.load("reference")
    checkpoint = Checkpoint.open(model_path)
    weights = load_weights(checkpoint, reference)
    total, weight_sum, weights_seen = 0.0, 0.0, set()
    for sample in (sample for pack in packs for sample in pack):
        # Each sample alone, every row, straight from the tokens and their weights.
        batch = to_batch([sample]).batch
        rows = np.arange(len(sample) - 1, dtype=np.int32)
        logits_RV = forward(reference, checkpoint.config, weights, _with_rows(batch, rows)).astype(np.float64)
        logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(-1, keepdims=True))
        for row, (token, weight) in enumerate(zip(sample.token_ids_L[1:], sample.weights_L[1:], strict=True)):
            total -= weight * logprobs_RV[row, token]
            weight_sum += weight
            weights_seen.add(float(weight))
    assert weights_seen == {0.0, 0.25, 1.0}
    model = fit.open_model(settings, model_path, Team())
    report = _trainer(settings, model).step([to_batch(pack) for pack in packs])
    assert report.loss == pytest.approx(total / weight_sum, rel=1e-5)
    assert report.weight == pytest.approx(weight_sum)


def _with_rows(batch, rows):
    return type(batch)(**{name: getattr(batch, name) for name in batch.__slots__} | {"logit_rows_R": rows})


def test_the_last_trained_token_of_every_sample_ends_its_message(model_path, tmp_path):
    stops = {TOKENIZER.special(f"<|{name}|>") for name in ("return", "call", "end")}
    num_samples = 0
    for pack in _packs(_settings(model_path, tmp_path / "out", ROWS)):
        one = to_batch(pack)
        for sample in range(one.num_samples):
            assert one.targets_R[one.samples_R == sample][-1] in stops
            num_samples += 1
    assert num_samples == 4


def test_a_pass_without_dropout_gives_the_same_loss_and_gradients_with_and_without_recomputing(model_path, tmp_path):
    norms = []
    for recompute in (True, False):
        settings = _settings(model_path, tmp_path / "out", ROWS, recompute=recompute)
        model = fit.open_model(settings, model_path, Team())
        report = _trainer(settings, model).step([to_batch(pack) for pack in _packs(settings)])
        norms.append((report.loss, report.gradient_norm))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_the_balance_of_the_experts_is_never_read_from_the_checkpoint(model_path, tmp_path):
    curves = []
    for coefficient in (0.0, 0.9):
        folder = write_model(tmp_path / f"model-{coefficient}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"router_aux_loss_coef": coefficient}))
        settings = _settings(folder, tmp_path / f"out-{coefficient}", ROWS, steps=2, targets="q,router")
        sft(settings, say=lambda text: None)
        curves.append(
            [(line["loss"], line["balance"]) for line in read_metrics(tmp_path / settings.out / "metrics.jsonl")]
        )
    assert curves[0] == curves[1] and len(curves[0]) == 2
    # Four experts, two of them used: 1 where all are used alike.
    assert all(1 <= balance < 2 for _, balance in curves[0])


def test_the_balance_loss_moves_routers_only_where_they_are_trained(model_path, tmp_path):
    def gradient(**flags):
        settings = _settings(model_path, tmp_path / "out", ROWS, targets="router", **flags)
        model = fit.open_model(settings, model_path, Team())
        trainer = _trainer(settings, model)
        return trainer.step([to_batch(pack) for pack in _packs(settings)])

    plain, balanced = gradient(router_balance=0.0), gradient(router_balance=0.5)
    assert plain.loss == pytest.approx(balanced.loss, rel=1e-6)
    assert plain.gradient_norm != pytest.approx(balanced.gradient_norm, rel=1e-3)
    assert "balance" in balanced.shown and "balance" not in plain.shown


def _digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_lora_on_packed_experts_learns_rows_by_heart_and_the_server_answers_with_them(tmp_path):
    model_path = write_model(tmp_path / "model")
    before = _digest(model_path)
    rows = riddles()
    settings = _settings(
        model_path,
        tmp_path / "out",
        rows,
        current_date="",
        targets="q,k,v,o,experts,unembedding",
        rank=16,
        expert_rank=8,
        learning_rate=5e-3,
        warmup=0.1,
        steps=70,
        # Every step sees all rows.
        pass_tokens=4096,
        prompt_tokens=12,
        save_every=0,
    )
    said = []
    outcome = sft(settings, say=said.append)
    assert outcome.loss < 0.05
    assert any("read again, it is the same" in text for text in said)
    assert sum("<|return|>" in text for text in said if text.startswith("answers")) >= 3
    model = Model.open(model_path)
    assert all(layer.experts.packed_gate_up is not None for layer in model.weights.layers)
    assert _digest(model_path) == before
    served = ossia.load(model_path, threads=1)
    served.engine.load_adapter(read_adapter(tmp_path / "out" / "adapter", served.checkpoint.config, "mine"))
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        # The data told the model no date, and so is the prompt.
        system = Message(Role.SYSTEM, SystemContent(current_date=None))
        reply = served.generate([system, Message(Role.USER, question)], temperature=0.0, max_tokens=20, adapter="mine")
        for _ in reply:
            pass
        assert (reply.text, reply.finish_reason) == (answer, "stop")


def test_an_adapter_trained_under_rounding_is_tried_as_it_was_trained_and_told_to_be_exported(model_path, tmp_path):
    said = []
    settings = _settings(model_path, tmp_path / "out", riddles(), steps=1, fake_quant=True, prompt_tokens=2)
    sft(settings, say=said.append)
    assert any("ossia export NEW" in text for text in said) and not any("ossia serve" in text for text in said)
    assert any("read again, it is the same" in text for text in said)
    assert any(text.startswith("answers") for text in said)


def test_full_training_learns_too_and_its_result_is_read_again(model_path, tmp_path):
    said = []
    for optimizer in ("adamw", "muon"):
        settings = _settings(
            model_path,
            tmp_path / optimizer,
            stations(4),
            steps=12,
            trainable="full",
            optimizer=optimizer,
            learning_rate=3e-3,
            prompt_tokens=3,
        )
        sft(settings, say=said.append)
        losses = [line["loss"] for line in read_metrics(tmp_path / optimizer / "metrics.jsonl")]
        assert losses[-1] < 0.6 * losses[0]
        assert (tmp_path / optimizer / "weights.safetensors").exists()
    assert sum("read again, it is the same" in text for text in said) == 2


def test_where_there_are_validation_files_all_rows_of_the_data_are_trained(model_path, tmp_path):
    files = {"validation": str(write_rows(tmp_path / "held-out.jsonl", riddles())), "validation_share": 0.3}
    told = {}
    for name, flags in {"share": {"validation_share": 0.3}, "files": files}.items():
        said = told[name] = []
        settings = _settings(model_path, tmp_path / name, stations(30), **flags)
        fit.count_steps(settings, "samples", TOKENIZER, said.append)
        num_trained = sum(map(len, _packs(settings)))
        with closing(fit.open_stream(settings, "samples", TOKENIZER, epochs=1, is_held_out=True)) as stream:
            num_held_out = sum(map(len, stream))
        if name == "files":
            assert (num_trained, num_held_out) == (30, len(riddles()))
        else:
            assert num_trained + num_held_out == 30 and said == [f"held out: {num_held_out} of 30 rows that were read"]
    assert not told["files"]


def test_the_model_before_is_that_of_the_run_that_training_began_with(model_path, tmp_path):
    usual = {"steps": 3, "trainable": "full", "schedule": "constant", "warmup": 0}
    sft(_settings(model_path, tmp_path / "first", stations(4), learning_rate=1e-2, **usual), say=lambda text: None)
    said = []
    following = _settings(
        model_path, tmp_path / "next", stations(4), learning_rate=0, begin_with=str(tmp_path / "first"), **usual
    )
    sft(following, say=said.append)
    assert any("KL to the model before, on rows of the data: 0.0000 nats" in text for text in said)
