"""Runs: exact resumption after kill -9, good order at Ctrl-C, refusals, early ends, what is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.tiny import stations, write_model, write_rows

from ossia.errors import ConfigError, InputError, TrainingError, UnavailableError
from ossia.model.adapter import read_adapter
from ossia.model.weights import Checkpoint
from ossia.train import fit, run
from ossia.train.checkpoint import Checkpoints
from ossia.train.config import SftConfig, read_settings
from ossia.train.lora import take_scaling
from ossia.train.metrics import read_metrics
from ossia.train.parallel import Team
from ossia.train.sft import Likelihood, sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", stations(16))
    return folder


def _settings(folder, out, **flags):
    usual = {
        "model": str(folder / "model"),
        "data": str(folder / "rows.jsonl"),
        "out": str(out),
        "threads": 1,
        "epochs": 3,
        "max_tokens": 300,
        "step_tokens": 400,
        "validation_share": 0.2,
        "eval_every": 4,
        "save_every": 3,
        "dropout": 0.1,
        "learning_rate": 1e-3,
        "rank": 4,
        "prompt_tokens": 0,
    }
    return read_settings(SftConfig, None, usual | flags)


def _train(settings, **options):
    return sft(settings, say=lambda text: None, **options)


def _curve(out):
    """Everything that the log says but for speeds."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(out / "metrics.jsonl")]


def _parameters(out):
    checkpoints = Checkpoints(out / "checkpoints", keep=9)
    return checkpoints.load(checkpoints.steps()[-1]).trainable


def _assert_same(out, expected):
    assert _curve(out) == _curve(expected)
    ours, theirs = _parameters(out), _parameters(expected)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that nothing interrupts."""
    out = folder / "whole"
    outcome = _train(_settings(folder, out))
    assert outcome.reason == "done" and outcome.step > 8
    return out


def _command(settings, *more):
    flags = ["model", "out", "threads", "epochs", "max_tokens", "step_tokens", "validation_share", "eval_every"]
    flags += ["save_every", "dropout", "learning_rate", "rank", "prompt_tokens"]
    words = [word for name in flags for word in (f"--{name.replace('_', '-')}", str(getattr(settings, name)))]
    return [sys.executable, "-m", "ossia", "train", "sft", "--data", settings.data[0], *words, *more]


def _kill_after(settings, num_lines, delay_s, *more):
    """Start the command, and kill it a moment after its log has this many lines; whether it was killed."""
    log = Path(settings.out) / "metrics.jsonl"
    process = subprocess.Popen(_command(settings, *more), stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if log.exists() and log.read_text().count("\n") >= num_lines:
                time.sleep(delay_s)
                break
            time.sleep(0.002)
    finally:
        process.kill()
    return process.wait() == -signal.SIGKILL


def test_a_run_that_was_killed_goes_on_to_the_same_curve_bit_for_bit(folder, whole):
    settings = _settings(folder, folder / "killed")
    assert _kill_after(settings, 6, 0.01)
    outcome = _train(settings, resume=True)
    assert outcome.reason == "done"
    _assert_same(folder / "killed", whole)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_at_random_moments_ends_in_the_same_curve(folder, whole):
    settings = _settings(folder, folder / "killed-often")
    generator = np.random.default_rng()
    num_killed = 0
    for _ in range(6):
        log = folder / "killed-often" / "metrics.jsonl"
        num_lines = len(read_metrics(log)) if log.exists() else 0
        num_killed += _kill_after(
            settings, num_lines + int(generator.integers(0, 5)), generator.uniform(0, 0.1), "--resume"
        )
    assert num_killed >= 3
    assert _train(settings, resume=True).reason == "done"
    _assert_same(folder / "killed-often", whole)


def test_an_interrupt_ends_the_step_and_saves_and_the_run_goes_on_to_the_same_curve(folder, whole, monkeypatch):
    settings = _settings(folder, folder / "interrupted")
    weight = Likelihood.weight
    calls = []

    def interrupting(self, batch):
        calls.append(batch)
        if len(calls) == 9:
            signal.raise_signal(signal.SIGINT)
        return weight(self, batch)

    monkeypatch.setattr(Likelihood, "weight", interrupting)
    said = []
    outcome = sft(settings, say=said.append)
    monkeypatch.undo()
    assert outcome.is_interrupted
    assert Checkpoints(folder / "interrupted" / "checkpoints", keep=2).steps()[-1] == outcome.step
    assert any("finishing this step" in text for text in said) and "--resume goes on" in said[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert _train(settings, resume=True).reason == "done"
    _assert_same(folder / "interrupted", whole)


@pytest.mark.parametrize("passed_on", [0, 1])
def test_a_second_interrupt_ends_at_once_and_the_same_one_passed_on_by_torchrun_does_not(passed_on, monkeypatch):
    if passed_on:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(KeyboardInterrupt), run.Interrupts(lambda text: None) as interrupts:
        for _ in range(1 + passed_on):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.is_wanted
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("nothing ended")


def test_a_run_that_is_resumed_at_its_end_changes_nothing(folder, whole):
    before = _curve(whole)
    assert _train(_settings(folder, whole), resume=True).reason == "done"
    assert _curve(whole) == before


def _last_state(out):
    checkpoints = Checkpoints(out / "checkpoints", keep=9)
    return checkpoints.state(checkpoints.steps()[-1])


def test_a_last_evaluation_behind_the_last_checkpoint_is_kept_with_it(folder, tmp_path):
    settings = _settings(folder, tmp_path / "out", steps=4, eval_every=3, save_every=4)
    first = _train(settings)
    before, state = _curve(tmp_path / "out"), _last_state(tmp_path / "out")
    held_out = {line["step"]: line["loss"] for line in before if line["event"] == "evaluation"}
    assert list(held_out) == [0, 3, 4] and held_out[4] < held_out[3]
    assert first.best_step == 4 and state["best"] == [held_out[4], 4]
    assert _train(settings, resume=True) == first
    assert _curve(tmp_path / "out") == before and _last_state(tmp_path / "out") == state


def test_a_run_that_was_killed_behind_its_last_evaluation_has_it_once(folder, tmp_path, monkeypatch):
    settings = _settings(folder, tmp_path / "out", steps=4, eval_every=3, save_every=4)
    with monkeypatch.context() as patch:
        finish = run.Run._finish

        def killed(self, *args):
            patch.setattr(run.Run, "_save", _raise_interrupt)
            return finish(self, *args)

        patch.setattr(run.Run, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            _train(settings)
    assert _last_state(tmp_path / "out")["evaluated_step"] == 3
    before = _curve(tmp_path / "out")
    assert before[-1]["event"] == "evaluation" and before[-1]["step"] == 4
    assert _train(settings, resume=True).best_step == 4
    assert _curve(tmp_path / "out") == before


def _raise_interrupt(*args):
    raise KeyboardInterrupt


def test_patience_that_ends_with_the_last_evaluation_keeps_the_best_step(folder, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5])
    monkeypatch.setattr(fit, "evaluate", lambda *args: {"loss": next(losses)})
    settings = _settings(folder, tmp_path / "out", steps=3, eval_every=2, save_every=3, patience=1)
    first = _train(settings)
    assert (first.reason, first.step, first.best_step) == ("early", 3, 2)
    assert _train(settings, resume=True) == first


def test_a_folder_with_a_run_is_not_overwritten(folder, whole):
    with pytest.raises(InputError, match=r"has a run that got to step \d+\. Go on with it with --resume"):
        _train(_settings(folder, whole))


def test_changed_settings_are_named_and_refused_but_not_those_that_cannot_matter(folder, whole):
    with pytest.raises(ConfigError) as caught:
        _train(_settings(folder, whole, rank=8, learning_rate=1.0, save_every=99), resume=True)
    message = caught.value.message
    assert "rank was 4, now 8" in message and "learning_rate was 0.001, now 1.0" in message
    assert "save_every" not in message


def test_changed_data_and_another_model_are_refused(folder, tmp_path):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", stations(24))
    settings = _settings(tmp_path, tmp_path / "out", steps=3, validation_share=0.0)
    _train(settings)
    write_rows(tmp_path / "rows.jsonl", stations(23))
    with pytest.raises(InputError, match="the files changed"):
        _train(settings, resume=True)
    (tmp_path / "model").rename(tmp_path / "old")
    write_model(tmp_path / "model", seed=1)
    with pytest.raises(ConfigError, match="model holds something else now"):
        _train(settings, resume=True)


def test_two_processes_cannot_train_into_one_folder(folder, tmp_path):
    settings = _settings(folder, tmp_path / "out")
    with (
        run.RunFolder(settings, resume=False, inputs={}),
        pytest.raises(InputError, match="another process is training into this folder"),
    ):
        _train(settings)


def test_the_newest_checkpoints_and_the_best_are_kept(whole):
    steps = Checkpoints(whole / "checkpoints", keep=2).steps()
    held_out = {line["step"]: line["loss"] for line in _curve(whole) if line["event"] == "evaluation"}
    best = min((step for step in held_out if step), key=held_out.get)
    assert best in steps and len(steps) <= 3


def test_the_loss_falls_on_the_data_and_the_curve_begins_with_the_model_as_it_is(whole):
    lines = _curve(whole)
    assert lines[0]["event"] == "evaluation" and lines[0]["step"] == 0
    steps = [line for line in lines if line["event"] == "step"]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert all(line["tokens"] > 0 and line["trained"] > 0 for line in steps)


def test_a_held_out_loss_that_does_not_fall_ends_the_run_early_with_the_best_parameters(folder, tmp_path):
    out = tmp_path / "early"
    said = []
    settings = _settings(folder, out, epochs=60, learning_rate=0.05, eval_every=2, patience=3)
    outcome = sft(settings, say=said.append)
    assert outcome.reason == "early" and any("ended early" in text for text in said)
    held_out = {line["step"]: line["loss"] for line in _curve(out) if line["event"] == "evaluation" and line["step"]}
    assert outcome.best_step == min(held_out, key=held_out.get)
    assert outcome.step == outcome.best_step + 6
    again = _train(settings, resume=True)
    assert (again.reason, again.step) == ("early", outcome.step)


def test_a_mean_of_the_weights_is_what_is_judged_and_what_an_early_end_keeps(folder, tmp_path):
    out = tmp_path / "early"
    settings = _settings(folder, out, epochs=60, learning_rate=0.05, eval_every=2, patience=2, weight_mean=1.0)
    outcome = _train(settings)
    assert outcome.reason == "early"
    held_out = {line["step"]: line["loss"] for line in _curve(out) if line["event"] == "evaluation"}
    best = Checkpoints(out / "checkpoints", keep=9).load(outcome.best_step)
    model = fit.open_model(settings, folder / "model", Team())
    kept = take_scaling(model.weights, read_adapter(out / "adapter", model.config))
    assert all(torch.equal(kept[name], value) for name, value in run.means_of(best).items())
    assert not all(torch.equal(kept[name], value) for name, value in best.trainable.items())
    run.load_parameters(model.state(), run.kept_weights(best))
    tokenizer = Checkpoint.open(folder / "model").tokenizer()
    passes = fit.held_out_passes(settings, "samples", tokenizer)
    found = fit.evaluate(model, Likelihood(model), passes, Team())
    assert found["loss"] == pytest.approx(held_out[outcome.best_step], rel=1e-5)


def test_a_run_whose_numbers_leave_the_finite_ends_with_a_clear_error(folder, tmp_path):
    settings = _settings(folder, tmp_path / "out", learning_rate=1e20, max_skipped=3, clip=0, dropout=0)
    with pytest.raises(TrainingError, match=r"3 steps in a row.*lower learning_rate"):
        _train(settings)
    skipped = [line for line in _curve(tmp_path / "out") if line.get("skipped")]
    assert len(skipped) == 2 and skipped[0]["loss"] is None


def test_too_little_memory_is_told_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(UnavailableError, match=r"needs 0\.0 GiB .* train with LoRA"):
        _train(_settings(folder, tmp_path / "full", trainable="full"))
    with pytest.raises(UnavailableError, match="lower rank or expert_rank"):
        _train(_settings(folder, tmp_path / "lora", rank=512))


def test_free_memory_is_known_on_this_system():
    assert 1 << 20 < run.available_bytes(torch.device("cpu")) < 1 << 50


def test_a_device_that_is_not_there_is_told(folder, tmp_path):
    for name in ("cuda:99", "quantum"):
        with pytest.raises(ConfigError, match=f"device is '{name}'.*Expected cpu"):
            _train(_settings(folder, tmp_path / "out", device=name))


def test_a_bad_row_is_told_with_its_line_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", stations(3))
    rows.write_text(rows.read_text() + '{"messages": [{"role": "robot"}]}\n')
    monkeypatch.setattr(fit, "open_model", lambda *a: pytest.fail("the model was opened"))
    with pytest.raises(InputError, match=r"rows\.jsonl:4"):
        _train(_settings(folder, tmp_path / "out", data=str(rows)))


def test_rows_that_are_passed_by_are_told_with_their_lines(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", stations(3))
    rows.write_text(rows.read_text() + '{"messages": [{"role": "robot"}]}\n')
    said = []
    settings = _settings(folder, tmp_path / "out", data=str(rows), validation_share=0.0, skip_bad_rows=True, epochs=1)
    sft(settings, say=said.append)
    at = next(i for i, text in enumerate(said) if text.startswith("passed by: 1 rows"))
    assert "rows.jsonl:4" in said[at + 1]


def test_fields_that_nothing_reads_are_told_with_their_lines(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", stations(2))
    answer = {"role": "assistant", "content": "b", "thinkng": "c"}
    row = {"messages": [{"role": "user", "content": "a"}, answer], "reasoning_efort": "high", "id": 7, "source": "d"}
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    said = []
    settings = _settings(folder, tmp_path / "out", data=str(rows), validation_share=0.0, epochs=1)
    sft(settings, say=said.append)
    at = next(i for i, text in enumerate(said) if text.startswith("passed by: 2 fields"))
    assert "rows.jsonl:3: the field thinkng is not read" in said[at + 1]
    assert "rows.jsonl:3: the field reasoning_efort of a row (reasoning_effort?) is not read" in said[at + 2]


def test_a_target_that_matches_nothing_is_an_error(folder, tmp_path):
    with pytest.raises(InputError, match="target 'gate' matches nothing"):
        _train(_settings(folder, tmp_path / "out", targets="q,gate"))
