"""`ossia export` as a person uses it."""

from __future__ import annotations

import json

import pytest
from tests.cli.test_cli import ossia
from tests.train.test_export import CONFIG, EXPERTS, VOCABULARY, adapter_of, write_adapter

from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_random_checkpoint(folder / "base", CONFIG, tokenizer_json=VOCABULARY.to_tokenizer_json())
    write_adapter(folder / "adapter", adapter_of(EXPERTS[3:], size=0.001), CONFIG)
    return folder


def test_the_report_names_errors_by_layer_and_says_when_little_is_kept(folder):
    (folder / "prompts.txt").write_text("One.\n\nTwo.\n")
    result = ossia(
        *("export", folder / "out", "--base", folder / "base", "--adapter", folder / "adapter"),
        *("--prompts", folder / "prompts.txt"),
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{folder / 'out'}  0.00 GiB") and "of them with the base's bytes" in lines[0]
    assert lines[2].split()[:2] == ["layer", "1"] and lines[3].split()[:2] == ["layer", "2"]
    assert "KL to the unrounded model, over 64 positions of prompts: mean" in result.stdout
    assert "rounded away" in result.stdout
    assert Checkpoint.open(folder / "out").layout.name == "hf"
    again = ossia("export", folder / "out", "--base", folder / "base")
    assert again.returncode == 1 and "is there already and not empty" in again.stderr


def test_programs_get_json(folder):
    result = ossia(
        *("export", folder / "json", "--base", folder / "base", "--adapter", folder / "adapter", "--json", "--no-kl"),
        *("--format", "merged"),
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["rounding"].keys() == set(EXPERTS[3:]) and report["divergence"] is None
    assert report["rounding"][EXPERTS[3]]["kept"] < 0.5
    assert report["path"] == str(folder / "json")


def test_what_cannot_be_meant_is_refused_in_words(folder):
    (folder / "binary").write_bytes(b"\xff\xfe")
    for arguments, code, said in (
        (["--prompts", folder / "binary"], 1, "cannot be read as UTF-8 text"),
        (["--prompts", folder / "nowhere"], 1, "no such file"),
        (["--shard-gb", "inf"], 2, "or equal to"),
        (["--shard-gb", "nan"], 2, "or equal to"),
    ):
        refused = ossia("export", folder / "never", "--base", folder / "base", *arguments)
        assert refused.returncode == code and said in refused.stderr and "Traceback" not in refused.stderr
    assert not (folder / "never").exists()


def test_export_explains_itself():
    result = ossia("export", "--help")
    assert result.returncode == 0 and "Usage: ossia export" in result.stdout
    for option in ("--base", "--adapter", "--weights", "--format", "--no-kl", "--force"):
        assert option in result.stdout


def test_diff_lists_what_differs_between_two_layouts_of_a_model(folder):
    bf16 = folder / "bf16"
    assert ossia("export", bf16, "--base", folder / "base", "--format", "bf16").returncode == 0
    same = ossia("checkpoint", "diff", folder / "base", bf16)
    assert (same.returncode, same.stdout.strip()) == (0, "no number differs")
    write_adapter(folder / "q", adapter_of(["layers.2.q"]), CONFIG)
    assert (
        ossia("export", folder / "new", "--base", folder / "base", "--adapter", folder / "q", "--no-kl").returncode == 0
    )
    other = ossia("checkpoint", "diff", bf16, folder / "new")
    assert other.returncode == 1
    assert [line.split()[0] for line in other.stdout.splitlines()] == ["layers.2.q.weight"]
