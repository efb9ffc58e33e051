"""`ossia train`: recipes, flags, exit codes, and what is printed where."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
import tomllib
from pathlib import Path

import pytest
from tests.train.tiny import stations, write_model, write_rows

from ossia.cli import main
from ossia.train.config import DpoConfig, SftConfig, read_settings
from ossia.train.rollout_config import DistillConfig, RlConfig
from ossia.train.sft import Likelihood

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", stations(6))
    return folder


def _recipe(folder, **settings):
    lines = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "threads": 1, "steps": 2}
    lines |= {"prompt_tokens": 2} | settings
    path = folder / "recipe.toml"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in lines.items()))
    return str(path)


def test_a_recipe_with_a_flag_on_top_trains_and_leaves_an_adapter(folder, tmp_path, capsys):
    assert main(["train", "sft", _recipe(folder), "--out", str(tmp_path / "run"), "--rank", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    # The table comes before the result; a pipe sees no bar.
    assert (
        err.index("layers.*.experts.gate_up.a")
        < err.index("the adapter is in")
        < err.index("read again, it is the same")
    )
    assert "━" not in err and "\x1b" not in err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert '"rank": 3' in (tmp_path / "run" / "settings.json").read_text()


def test_an_unknown_setting_is_an_error_with_a_suggestion(folder, tmp_path, capsys):
    assert main(["train", "sft", _recipe(folder, expert_ranks=4), "--out", str(tmp_path / "run")]) == 1
    assert "unknown setting 'expert_ranks'; did you mean 'expert_rank'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_leaves_with_130_and_says_how_to_go_on(folder, tmp_path, capsys, monkeypatch):
    weight = Likelihood.weight

    def interrupting(self, batch):
        signal.raise_signal(signal.SIGINT)
        return weight(self, batch)

    monkeypatch.setattr(Likelihood, "weight", interrupting)
    assert main(["train", "sft", _recipe(folder), "--out", str(tmp_path / "run"), "--steps", "5"]) == 130
    err = capsys.readouterr().err
    assert (
        "finishing this step and saving" in err and "stopped after step 1 of 5; the same command with --resume" in err
    )
    monkeypatch.undo()
    assert main(["train", "sft", _recipe(folder), "--out", str(tmp_path / "run"), "--steps", "5", "--resume"]) == 0
    assert "going on after step 1 of 5" in capsys.readouterr().err


def test_without_torch_the_command_says_what_to_install(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["train", "sft", _recipe(folder), "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'ossia[train]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "kind"), [("sft", SftConfig), ("dpo", DpoConfig), ("rl", RlConfig), ("distill", DistillConfig)]
)
def test_the_help_tells_every_setting_with_its_sentence(method, kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERMINAL_WIDTH", "400")
    assert main(["train", method, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--resume" in shown and "--no-recompute" in shown
    for field in dataclasses.fields(kind):
        assert f"--{field.name.replace('_', '-')}" in shown, field.name
        assert field.metadata["text"] in shown, field.name


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_says_how_to_run_it(path):
    text = path.read_text()
    command = next(line for line in text.splitlines() if f"recipes/{path.name}" in line)
    kinds = {"sft": SftConfig, "dpo": DpoConfig}
    method = command.split("ossia train ")[1].split()[0]
    assert f"ossia train {method} recipes/{path.name}" in command
    if method in kinds:
        settings = read_settings(kinds[method], path, {})
        assert settings.out == tomllib.loads(text)["out"]


def test_a_model_is_measured_on_held_out_exercises(folder, capsys, monkeypatch):
    # PyTorch is for training; measuring must not want it.
    monkeypatch.setitem(sys.modules, "torch", None)
    words = [
        "train",
        "measure",
        str(folder / "model"),
        "--task",
        "arithmetic,sums",
        "--count",
        "3",
        "--max-tokens",
        "4",
    ]
    assert main([*words, "--efforts", "low,high", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [(one["task"], one["effort"], one["num_exercises"]) for one in found] == [
        (task, effort, 3) for task in ("arithmetic", "sums") for effort in ("low", "high")
    ]
    assert "arithmetic low: 0.0 %" in err
    assert re.search(r"the format was broken by \w+ \(\d+\.\d %\)", err)
    kept = ["--efforts", "low", "--out", str(folder / "measured.jsonl")]
    assert main([*words, *kept]) == 0
    out, err = capsys.readouterr()
    assert "95 % interval" in out and "cut off" in out and "arithmetic low: 0.0 %" in err
    assert len((folder / "measured.jsonl").read_text().splitlines()) == 1 + 2 * 3
    assert main([*words, *kept, "--seed", "1"]) == 1
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert (
        main(["train", "measure", "nano", "--task", "sums", "--count", "2", "--efforts", "high", "--max-tokens", "9"])
        == 0
    )
    assert "100.0 % were cut off by --max-tokens 9; give more" in capsys.readouterr().err


def test_measuring_names_what_cannot_be_measured(folder, capsys):
    assert main(["train", "measure", str(folder / "model"), "--task", "sum"]) == 1
    assert "there is no task 'sum'; expected one of: about, arithmetic" in capsys.readouterr().err
    assert main(["train", "measure", str(folder / "model"), "--task", "a,b", "--task-option", "digits=2"]) == 1
    assert "--task names 2 tasks" in capsys.readouterr().err
    assert main(["train", "measure", str(folder / "model"), "--task", "sums", "--efforts", "extreme"]) == 1
    assert "extreme" in capsys.readouterr().err
