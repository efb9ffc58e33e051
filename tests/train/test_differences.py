"""Two checkpoints compared number by number."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.train.test_export import CONFIG

from ossia.errors import InputError
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint
from ossia.train import differences as module
from ossia.train.differences import differences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    for layout in ("hf", "hf-bf16", "original"):
        write_random_checkpoint(folder / layout, CONFIG, layout=layout)
    return folder


def open_(path):
    return Checkpoint.open(path)


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "original"])
def test_one_model_in_two_layouts_does_not_differ(layout, folder):
    heard = []
    assert not list(differences(open_(folder / "hf"), open_(folder / layout), lambda *done: heard.append(done)))
    assert heard[-1] == (4, 4)


def test_what_differs_is_told_with_its_size_and_its_share(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_VALUES", 1000)
    (tmp_path / "config.json").write_bytes((folder / "hf-bf16/config.json").read_bytes())
    tensors = load_file(folder / "hf-bf16/model.safetensors")
    sinks, down = "model.layers.1.self_attn.sinks", "model.layers.2.mlp.experts.down_proj"
    tensors[sinks] = (tensors[sinks].astype(np.float32) * 2).astype(tensors[sinks].dtype)
    tensors[down][3, :48] = 0
    tensors["lm_head.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    found = {each.key: each for each in differences(open_(folder / "hf"), open_(tmp_path))}
    assert list(found) == ["unembedding.weight", "layers.1.sinks", "layers.2.experts.down"]
    assert found["layers.1.sinks"].relative == pytest.approx(1) and found["layers.1.sinks"].share == 1
    # Half of one of eight experts, less what was zero before: two of sixteen codes.
    assert 0.05 < found["layers.2.experts.down"].share < 0.0625
    assert found["unembedding.weight"].share == 1 / (300 * 64)


def test_models_of_different_shapes_are_refused(folder, tmp_path):
    for i, (changes, message) in enumerate(
        (({"num_layers": 2}, "3 and 2 layers"), ({"num_layers": 4}, "3 and 4 layers"), ({"num_experts": 9}, "router"))
    ):
        other = write_random_checkpoint(tmp_path / f"{i}", replace(CONFIG, **changes))
        with pytest.raises(InputError, match=message):
            list(differences(open_(folder / "hf"), open_(other)))
