"""What inspect tells and what verify finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.config import ModelConfig
from ossia.model.inspection import count_parameters, inspect_checkpoint, published_shape, verify_checkpoint
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    intermediate_size=32,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    num_experts=8,
    stop_token_ids=(2,),
    pad_token_id=1,
)
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
ROUTER = "model.layers.0.mlp.router.weight"


@pytest.fixture
def folder(tmp_path):
    return write_random_checkpoint(tmp_path / "out", SMALL)


def damage(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "card"),
    [
        # MLP, attention, embed + unembed, active, total: the model card's table 1, in billions.
        ("20b", [19.12, 0.64, 1.16, 3.61, 20.91]),
        ("120b", [114.71, 0.96, 1.16, 5.13, 116.83]),
    ],
)
def test_parameters_are_those_of_the_model_card(shape, card):
    count = count_parameters(SHAPES[shape])
    parts = (count.mlp, count.attention, count.embedding, count.active, count.total)
    # The card cuts 114.715 short; a difference of half a unit in its last digit is rounding.
    assert [number / 1e9 for number in parts] == pytest.approx(card, abs=0.0051)


def test_published_shapes_are_recognised():
    assert published_shape(SHAPES["20b"]) == "gpt-oss-20b"
    assert published_shape(SHAPES["120b"]) == "gpt-oss-120b"
    assert published_shape(SHAPES["tiny"]) is None


def test_a_sound_checkpoint_is_described(folder):
    inspection = inspect_checkpoint(folder)
    assert inspection.layout == "hf"
    assert inspection.files == (folder / "model.safetensors",)
    assert inspection.config.hidden_size == 64
    assert inspection.size_bytes == (folder / "model.safetensors").stat().st_size
    assert inspection.num_tensors == 2 * 19 + 3
    assert inspection.dtype_bytes.keys() == {"BF16", "U8"}
    assert inspection.problems == ()
    assert inspection.shape is None


def test_every_problem_with_the_tensors_is_listed(folder):
    damage(folder, lambda tensors: [tensors.pop(ROUTER), tensors.update(a=np.zeros(1, np.float32))])
    problems = inspect_checkpoint(folder).problems
    assert len(problems) == 2
    assert any(ROUTER in problem for problem in problems)
    assert any("tensor a (F32 [1]) does not belong" in problem for problem in problems)


def test_a_wrong_number_of_layers_is_one_problem(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 7, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    assert len(inspect_checkpoint(folder).problems) == 1


@pytest.mark.parametrize("look", [inspect_checkpoint, verify_checkpoint])
def test_what_cannot_be_read_at_all_raises(look, folder):
    with pytest.raises(NotFoundError):
        look(folder / "nowhere")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        look(folder)


@pytest.mark.parametrize("layout", ["hf", "hf-bf16", "original"])
def test_a_sound_checkpoint_is_verified(layout, tmp_path):
    folder = write_random_checkpoint(tmp_path / "sound", SMALL, layout=layout)
    calls: list[tuple[int, int]] = []
    assert verify_checkpoint(folder, lambda *call: calls.append(call)) == ()
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_numbers_that_are_not_finite_are_found_counted_and_located(folder):
    def change(tensors):
        tensors[SCALES] = tensors[SCALES].copy()
        tensors[SCALES][3, 60, 0] = tensors[SCALES][7, 0, 0] = 255
        tensors[ROUTER] = tensors[ROUTER].copy()
        tensors[ROUTER][2, 5] = np.nan
        tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
        tensors["lm_head.weight"][299, 63] = -np.inf

    damage(folder, change)
    problems = verify_checkpoint(folder)
    path = str(folder / "model.safetensors")
    assert len(problems) == 3 and all(path in problem for problem in problems)
    found = {
        f"tensor {SCALES} has 2 MXFP4 blocks with a NaN scale, the first at [3, 60, 0]",
        f"tensor {ROUTER} has 1 values that are NaN or infinite, the first at [2, 5]",
        "tensor lm_head.weight has 1 values that are NaN or infinite, the first at [299, 63]",
    }
    assert all(any(words in problem for problem in problems) for words in found)


def test_faults_in_a_later_chunk_are_located_too(folder, monkeypatch):
    monkeypatch.setattr("ossia.model.inspection._CHUNK_VALUES", 200)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].copy()
        tensors["lm_head.weight"][[100, 299], 63] = np.nan

    damage(folder, change)
    (problem,) = verify_checkpoint(folder)
    assert "has 2 values" in problem and "the first at [100, 63]" in problem


def test_missing_tensors_and_bad_numbers_are_reported_together(folder):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors[ROUTER] = np.full_like(tensors[ROUTER], np.nan)

    damage(folder, change)
    problems = verify_checkpoint(folder)
    assert len(problems) == 2
    assert "model.norm.weight" in problems[0] and "512 values" in problems[1]


def test_a_tensor_of_one_number_without_a_shape_is_read_too(folder):
    damage(folder, lambda tensors: tensors.update(extra=np.array(np.nan, np.float32)))
    problems = verify_checkpoint(folder)
    assert "extra (F32 []) does not belong" in problems[0]
    assert "tensor extra has 1 values that are NaN or infinite, the first at [0]" in problems[1]
