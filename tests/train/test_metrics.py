"""The log of a run, its curves elsewhere, and the bar."""

from __future__ import annotations

import json
import sys

import pytest

from ossia.errors import UnavailableError
from ossia.train.metrics import Metrics, Progress, open_sinks, read_metrics


def test_lines_keep_every_digit_and_numbers_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write("step", 1, {"loss": 0.1 + 0.2, "gradient_norm": float("nan"), "skipped": True})
    metrics.write("step", 2, {"loss": float("inf")})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"event": "step", "step": 1, "loss": 0.30000000000000004, "gradient_norm": None, "skipped": True},
        {"event": "step", "step": 2, "loss": None},
    ]


def test_a_resumed_run_takes_back_what_it_will_do_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (1, 2, 3):
        metrics.write("step", step, {"loss": step / 10})
    metrics.close()
    with open(path, "a") as file:
        file.write('{"event": "step", "step": 4, "lo')
    metrics = Metrics(path, last_step=2)
    metrics.write("step", 3, {"loss": 0.9})
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_a_full_disk_is_told_with_what_to_do_and_not_once_more_at_the_end(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics._file.close()
    metrics._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UnavailableError, match="free some space and go on with --resume"):
        metrics.write("step", 1, {"loss": 0.5})
    metrics.close()


def test_numbers_go_to_the_other_sinks(tmp_path):
    class Sink:
        points, closed = [], False

        def write(self, step, values):
            self.points.append((step, values))

        def close(self):
            self.closed = True

    sink = Sink()
    metrics = Metrics(tmp_path / "metrics.jsonl", sinks=(sink,))
    metrics.write("evaluation", 5, {"loss": 1.5, "note": "text", "skipped": False})
    metrics.close()
    assert sink.points == [(5, {"evaluation/loss": 1.5})] and sink.closed


@pytest.mark.parametrize(("settings", "package"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")])
def test_a_sink_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch, settings, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnavailableError, match=f"pip install {package}"):
        open_sinks(tmp_path, "run", **({"tensorboard": False, "wandb": ""} | settings))


def test_tensorboard_gets_the_curves(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path / "m.jsonl", sinks=open_sinks(tmp_path, "run", tensorboard=True, wandb=""))
    metrics.write("step", 1, {"loss": 2.5})
    metrics.close()
    [written] = (tmp_path / "tensorboard").iterdir()
    assert b"step/loss" in written.read_bytes()


def test_the_bar_is_quiet_in_a_pipe_and_tells_the_state_on_a_terminal(capsys):
    with Progress(10) as progress:
        progress.advance(3, loss=1.25, tokens_per_s=1234, learning_rate=2e-4)
    assert capsys.readouterr() == ("", "")
    with Progress(10, done=2, is_shown=True) as progress:
        progress.advance(3, loss=1.25, tokens_per_s=1234, learning_rate=2e-4)
    shown = capsys.readouterr().err
    assert "3/10" in shown and "loss 1.2500" in shown and "1,234 tokens/s" in shown and "2.00e-04" in shown
