"""The pipeline of the small model, with a shape and stages that take seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.train import tiny

import ossia
from ossia.errors import UnavailableError
from ossia.train.data import Sample, to_batch
from ossia.train.module import Model
from ossia.train.nano import __main__ as program
from ossia.train.nano import make as pipeline
from ossia.train.nano import recipe
from ossia.train.nano.make import make
from ossia.train.nano.recipe import Stage, mix
from ossia.train.nano.report import write_report
from ossia.train.tasks import make as make_task

SHARES = {"sums": 1, "about": 1}


@pytest.fixture
def small(monkeypatch):
    shape = replace(
        recipe.SHAPE,
        num_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        vocab_size=400,
        num_experts=4,
    )
    monkeypatch.setattr(recipe, "SHAPE", shape)
    monkeypatch.setattr(recipe, "VOCAB_SIZE", 400)
    monkeypatch.setattr(recipe, "VOCABULARY_CONVERSATIONS", 60)
    monkeypatch.setattr(recipe, "VOCABULARY_TEXTS", 60)
    base = {**recipe.BASE, "step_tokens": 1200, "pass_tokens": 600, "save_every": 1, "eval_every": 0}
    monkeypatch.setattr(recipe, "BASE", base)
    supervised = {"tasks": mix(SHARES), "max_tokens": 500, "steps": 2, "held_out": 4}
    learned = {"task": mix(SHARES), "steps": 1, "prompts": 2, "group": 2, "rollout_tokens": 16, "fake_quant": True}
    stages = (
        Stage("sft", "pretrain", supervised, ("bf16",)),
        Stage("anneal", "pretrain", {**supervised, "fake_quant": True}, ("mxfp4",)),
        Stage("rl", "rl", {**learned, "learning_rate": 1e-4, "optimizer": "adamw"}, ("mxfp4",)),
        Stage("between", "average", {"sft": 0.25, "rl": 0.75}, ("mxfp4",)),
        Stage("deeper", "deepen", {"layers": (0, 1)}, ("mxfp4",)),
        Stage("on", "pretrain", {**supervised, "learning_rate": 1e-4, "fake_quant": True}, ("mxfp4",)),
        Stage("learns", "pretrain", {**supervised, "learning_rate": 1e-4, "teacher": "on"}, ("mxfp4",), after="rl"),
        Stage("goes", "pretrain", {**supervised, "learning_rate": 1e-4}, ("mxfp4",), after="between"),
    )
    monkeypatch.setattr(recipe, "STAGES", stages)
    tasks = {"sums": make_task("sums", {"digits": 2}), "about": make_task("about")}
    monkeypatch.setattr(pipeline, "measured_tasks", lambda: tasks)
    monkeypatch.setattr(pipeline, "_MOST_TOKENS", 12)


def test_the_pipeline_makes_a_model_a_report_and_nothing_twice(small, tmp_path):
    said: list[str] = []
    model = make(tmp_path / "out", count=3, say=said.append)
    assert [line for line in said if line.startswith("stage ")] == [
        "stage sft",
        "stage anneal",
        "stage rl",
        "stage between",
        "stage deeper",
        "stage on",
        "stage learns",
        "stage goes",
    ]
    local = ossia.load(model, kv_memory="16MiB", threads=1)
    assert local.checkpoint.config.num_layers == 2
    assert ossia.load(tmp_path / "out" / "on" / "mxfp4", threads=1).checkpoint.config.num_layers == 4
    assert local.sampling == {"temperature": recipe.TEMPERATURE}
    lines = json.loads((tmp_path / "out" / "rl" / "measured-mxfp4.json").read_text())
    assert {(line["task"], line["effort"], line["grammar"]) for line in lines} == {
        (task, effort, grammar) for task in SHARES for effort in ("low", "medium", "high") for grammar in (False, True)
    }
    sft, rl, between = (load_file(tmp_path / "out" / name / "weights.safetensors") for name in ("sft", "rl", "between"))
    assert between.keys() == rl.keys()
    assert any((sft[key] != rl[key]).any() for key in rl)
    for key, tensor in between.items():
        torch.testing.assert_close(tensor, 0.25 * sft[key] + 0.75 * rl[key])
    deeper, on, learns = (
        load_file(tmp_path / "out" / name / "weights.safetensors") for name in ("deeper", "on", "learns")
    )
    assert 0 < max((deeper[key] - on[key]).abs().max() for key in on) < 0.01
    assert 0 < max((rl[key] - learns[key]).abs().max() for key in rl) < 0.01
    learns_with, sft_with, goes_with = (
        json.loads((tmp_path / "out" / name / "settings.json").read_text()) for name in ("learns", "sft", "goes")
    )
    assert str(tmp_path / "out" / "on" / "mxfp4") in json.dumps(learns_with)
    # No stage draws what another one has drawn.
    assert len({one["seed"] for one in (learns_with, sft_with, goes_with)}) == 3
    # What is behind an average goes on from what that is in MXFP4.
    goes = load_file(tmp_path / "out" / "goes" / "weights.safetensors")
    rounded = Model.open(tmp_path / "out" / "between" / "mxfp4", trainable="full").state()
    assert 0 < max((goes[key] - rounded[key]).abs().max() for key in rounded) < 0.01
    page = write_report(tmp_path / "out", tmp_path / "docs").read_text()
    assert "| sft | 2 |" in page
    assert re.search(r"^\| task \| free \|.*\| what broke it \|$", page, re.MULTILINE)
    assert re.search(r"^\| sums \|.*\| (\d+ `\w+`(, )?)* \|$", page, re.MULTILINE)
    # Each measured stage with its three efforts.
    cell = r" \d+\.\d / \d+\.\d / \d+\.\d; \d+ / \d+ / \d+ tokens \|"
    assert re.search(
        r"^\| task \| sft, bf16 \| anneal, mxfp4 \| rl, mxfp4 \| between, mxfp4 \| deeper, mxfp4 \| on, mxfp4 "
        r"\| learns, mxfp4 \| goes, mxfp4 \|$",
        page,
        re.MULTILINE,
    )
    assert re.search(rf"^\| sums \|({cell}){{8}}$", page, re.MULTILINE)
    assert (tmp_path / "docs" / "nano" / "loss.png").stat().st_size > 5000
    assert "| sums |" in (model / "README.md").read_text()
    said.clear()
    make(tmp_path / "out", count=3, say=said.append)
    assert not [line for line in said if line.startswith("stage ")]


@pytest.mark.parametrize("layers", [(0, 1), (1,), (2, 3), (0, 3)])
def test_a_deeper_model_computes_the_same_and_learns_in_its_new_layers(tmp_path, layers):
    model = Model.open(tiny.write_model(tmp_path / "four", num_layers=4), trainable="full")
    shape, weights = pipeline.deepen(model, layers)
    assert shape.num_layers == 4 + len(layers)
    types = model.config.layer_types
    end = max(layers) + 1
    assert shape.layer_types == (*types[:end], *(types[i] for i in layers), *types[end:])
    pipeline._write_start(tmp_path / "more", shape, tiny.TOKENIZER.to_tokenizer_json(), lambda _: weights)
    deeper = Model.open(tmp_path / "more", trainable="full")
    token_ids_L = np.arange(40, dtype=np.int32)
    one = to_batch([Sample(token_ids_L, (token_ids_L > 0).astype(np.float32))])
    torch.testing.assert_close(deeper(one.batch), model(one.batch))
    deeper.logprobs(one.batch, one.targets_R).sum().backward()
    for place in range(end, end + len(layers)):
        for part in ("o.weight", "experts.down"):
            gradient = deeper.state()[f"layers.{place}.{part}"].grad
            assert gradient is not None and gradient.abs().max() > 0


def test_an_interrupt_waits_for_the_processes_of_a_stage_and_says_how_to_go_on(tmp_path, monkeypatch):
    script = tmp_path / "processes"
    script.write_text(f"#!/bin/sh\nsleep 1\ntouch {tmp_path / 'saved'}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(UnavailableError, match="stage sft was interrupted; the same command goes on with it"):
        pipeline._run_together("sft", tmp_path, 2)
    assert (tmp_path / "saved").exists()


def test_an_interrupt_between_stages_ends_in_a_sentence(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "make", interrupted)
    monkeypatch.setattr(sys, "argv", ["nano", str(tmp_path)])
    assert program.main() == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from what is there\n"


def test_a_stage_that_was_interrupted_says_how_to_go_on(small, tmp_path, monkeypatch):
    real = pipeline.pretrain

    def interrupted(settings, **options):
        outcome, model = real(replace(settings, steps=1), **options)
        return replace(outcome, reason="interrupted"), model

    monkeypatch.setattr(pipeline, "pretrain", interrupted)
    with pytest.raises(UnavailableError, match="stage sft was interrupted; the same command goes on"):
        make(tmp_path / "out", count=1, say=lambda _: None)
