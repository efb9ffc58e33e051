"""Adapters against PEFT: what it writes is read and computes the same, and what is written here it loads."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.model.peft_adapters import CASES, EXPERTS, ROUTER, save, trained

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.adapter import Adapter, LoraPair, matrix_shape, read_adapter, write_adapter
from ossia.model.config import ModelConfig
from ossia.model.weights import Checkpoint


def merged(model, adapter: Adapter):
    """The model with an adapter's deltas added to its own weights, by this test's own table."""
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
    with torch.no_grad():
        for key, pair in adapter.pairs.items():
            delta = torch.from_numpy(pair.delta().astype(np.float32))
            if key == "embedding":
                model.model.embed_tokens.weight += delta.T
                continue
            if key == "unembedding":
                model.lm_head.weight += delta
                continue
            _, layer, part = key.split(".", 2)
            own = model.model.layers[int(layer)]
            if part in names:
                own.get_submodule(names[part]).weight += delta
            elif part == "router":
                own.mlp.router.weight += delta
            elif part == "experts.down":
                own.mlp.experts.down_proj += delta.transpose(1, 2)
            else:
                own.mlp.experts.gate_up_proj[..., part == "experts.up" :: 2] += delta.transpose(1, 2)
    return model


# PEFT looks for patterns among modules alone, and warns of those that match parameters.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (r"The following (rank|alpha)_pattern keys", "`is_gradient_checkpointing` is deprecated")
]
IDS = np.random.default_rng(0).integers(0, 300, 40).tolist()


@pytest.mark.parametrize("case", CASES)
def test_what_peft_writes_computes_what_peft_computes(case, base, tmp_path, hugging_face_logits, assert_same_logits):
    make, _, config = base
    wrapped = trained(make(), **CASES[case])
    save(wrapped, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", config)
    got = hugging_face_logits(merged(make(), adapter), IDS)
    assert_same_logits(got, hugging_face_logits(wrapped, IDS))
    assert np.abs(got - hugging_face_logits(make(), IDS)).max() > 0.01 * np.abs(got).max()
    assert adapter.name == "adapter"


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_what_is_written_and_computes_the_same(
    case, base, tmp_path, hugging_face_logits, assert_same_logits
):
    make, folder, config = base
    wrapped = trained(make(), **CASES[case])
    save(wrapped, tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs", config)
    write_adapter(tmp_path / "ours", adapter, config, str(folder))
    with warnings.catch_warnings():
        # A name that is missing or too many is told by a warning alone.
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert_same_logits(hugging_face_logits(loaded.eval(), IDS), hugging_face_logits(wrapped, IDS))
    again = read_adapter(tmp_path / "ours", config)
    assert list(again.pairs) == list(adapter.pairs)
    for key, pair in adapter.pairs.items():
        assert np.array_equal(again.pairs[key].a, pair.a) and np.array_equal(again.pairs[key].b, pair.b)
        assert again.pairs[key].scaling == pytest.approx(pair.scaling, rel=1e-12)


def test_gate_and_up_of_different_matrices_and_scalings_are_written_as_one(
    base, tmp_path, hugging_face_logits, assert_same_logits
):
    make, folder, config = base
    rng = np.random.default_rng(0)

    def pair(key: str, rank: int, scaling: float) -> LoraPair:
        *stack, outputs, inputs = matrix_shape(key, config)
        a, b = rng.normal(0, 0.3, (*stack, rank, inputs)), rng.normal(0, 0.3, (*stack, outputs, rank))
        return LoraPair(a.astype(np.float32), b.astype(np.float32), scaling)

    pairs = {
        "layers.0.experts.gate": pair("layers.0.experts.gate", 2, 0.5),
        "layers.0.experts.up": pair("layers.0.experts.up", 3, 1.25),
        "layers.1.experts.up": pair("layers.1.experts.up", 2, 1.0),
        "layers.1.experts.down": pair("layers.1.experts.down", 1, 2.0),
        "layers.2.q": pair("layers.2.q", 5, 1 / 3),
    }
    adapter = Adapter("mixed", 2, 2, pairs)
    write_adapter(tmp_path / "ours", adapter, config, str(folder))
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    want = hugging_face_logits(merged(make(), adapter), IDS)
    assert_same_logits(hugging_face_logits(loaded, IDS), want)
    assert_same_logits(hugging_face_logits(merged(make(), read_adapter(tmp_path / "ours", config)), IDS), want)


def test_bfloat16_is_read_as_it_is_and_written_as_it_was(base, tmp_path, hugging_face_logits, assert_same_logits):
    make, folder, config = base
    wrapped = trained(make(), dtype=torch.bfloat16, **CASES["all"])
    save(wrapped, tmp_path / "wide")
    tensors = load_file(tmp_path / "wide/adapter_model.safetensors")
    (tmp_path / "narrow").mkdir()
    save_file(
        {name: values.to(torch.bfloat16) for name, values in tensors.items()},
        tmp_path / "narrow/adapter_model.safetensors",
    )
    (tmp_path / "narrow/adapter_config.json").write_text((tmp_path / "wide/adapter_config.json").read_text())
    adapter = read_adapter(tmp_path / "narrow", config)
    assert {pair.a.dtype for pair in adapter.pairs.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_logits(hugging_face_logits(merged(make(), adapter), IDS), hugging_face_logits(wrapped, IDS))
    write_adapter(tmp_path / "ours", adapter, config, str(folder))
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    narrow = load_file(tmp_path / "narrow/adapter_model.safetensors")
    assert ours.keys() == narrow.keys()
    assert all(torch.equal(ours[name], narrow[name]) and ours[name].dtype is torch.bfloat16 for name in ours)


def test_shards_are_read_as_one(base, tmp_path):
    make, _, config = base
    save(trained(make(), **CASES["all"]), tmp_path / "whole")
    tensors = load_file(tmp_path / "whole/adapter_model.safetensors")
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "adapter_config.json").write_text((tmp_path / "whole/adapter_config.json").read_text())
    files = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    got, want = read_adapter(folder, config), read_adapter(tmp_path / "whole", config)
    assert got.pairs.keys() == want.pairs.keys()
    assert all(np.array_equal(got.pairs[key].a, want.pairs[key].a) for key in want.pairs)
    (folder / files[1]).unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of its 2 shards: adapter_model-00002-of-00002"):
        read_adapter(folder, config)


def exchange_inputs_and_outputs(path, num_experts: int) -> None:
    exchanged = {}
    tensors = load_file(path)
    for name in tensors:
        other = tensors[name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B")]
        if "lora_A" in name:
            # [r E, I] from [O, r E]: its inputs are the outputs.
            exchanged[name] = other.reshape(other.shape[0], -1, num_experts).permute(2, 1, 0).reshape(-1, len(other))
        else:
            exchanged[name] = (
                other.reshape(num_experts, -1, other.shape[1]).permute(2, 1, 0).reshape(other.shape[1], -1)
            )
    save_file({name: values.contiguous() for name, values in exchanged.items()}, path)


@pytest.mark.parametrize(
    ("intermediate_size", "targets"),
    # 64 is as square as the published models: down_proj alone would not tell which way round it is.
    [(96, EXPERTS), (96, EXPERTS[:1]), (96, EXPERTS[1:]), (64, EXPERTS), (64, EXPERTS[:1])],
)
def test_experts_that_peft_took_the_other_way_round_are_read_the_right_way(
    intermediate_size, targets, hugging_face_model, tmp_path
):
    model = hugging_face_model(0, intermediate_size=intermediate_size)
    model.save_pretrained(tmp_path / "base")
    config = Checkpoint.open(tmp_path / "base").config
    save(trained(model, r=2, lora_alpha=6, target_modules=[], target_parameters=targets), tmp_path / "adapter")
    want = read_adapter(tmp_path / "adapter", config)
    exchange_inputs_and_outputs(tmp_path / "adapter/adapter_model.safetensors", config.num_experts)
    got = read_adapter(tmp_path / "adapter", config)
    assert got.pairs.keys() == want.pairs.keys()
    for key, pair in want.pairs.items():
        np.testing.assert_allclose(got.pairs[key].delta(), pair.delta(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("intermediate_size", [32, 64, 128])
def test_experts_of_every_shape_are_taken_as_they_are(
    intermediate_size, hugging_face_model, tmp_path, hugging_face_logits, assert_same_logits
):
    def make():
        return hugging_face_model(0, intermediate_size=intermediate_size)

    make().save_pretrained(tmp_path / "base")
    wrapped = trained(make(), r=2, lora_alpha=6, target_modules=[], target_parameters=EXPERTS)
    save(wrapped, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", Checkpoint.open(tmp_path / "base").config)
    assert_same_logits(hugging_face_logits(merged(make(), adapter), IDS), hugging_face_logits(wrapped, IDS))


def cut_into_modules(folder, num_experts: int) -> None:
    """The same adapter as if every expert, and the router, were a module of its own."""
    path = folder / "adapter_model.safetensors"
    cut = {}
    for name, values in load_file(path).items():
        if ".mlp.experts." not in name:
            cut[name.replace("mlp.router.", "mlp.router.linear.")] = values
            continue
        parameter = "gate_up_projs" if ".base_layer." in name else "down_projs"
        whole = name.replace(".base_layer", "")
        for e in range(num_experts):
            if "lora_A" in name:
                own = values.reshape(num_experts, -1, values.shape[1])[e]
            else:
                own = values.reshape(len(values), -1, num_experts)[..., e]
            cut[whole.replace("mlp.experts.", f"mlp.experts.{parameter}.{e}.")] = own.contiguous()
    save_file(cut, path)


def test_experts_that_were_cut_into_modules_are_read_as_one(base, tmp_path):
    make, _, config = base
    save(trained(make(), r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=[*EXPERTS, *ROUTER]),
         tmp_path / "adapter")  # fmt: skip
    want = read_adapter(tmp_path / "adapter", config)
    cut_into_modules(tmp_path / "adapter", config.num_experts)
    got = read_adapter(tmp_path / "adapter", config)
    assert list(got.pairs) == list(want.pairs)
    for key, pair in want.pairs.items():
        assert np.array_equal(got.pairs[key].delta(), pair.delta())
    # An expert that was not adapted stays as it is.
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: values for name, values in load_file(path).items() if "projs.3." not in name}, path)
    some = read_adapter(tmp_path / "adapter", config)
    delta, whole = (one.pairs["layers.1.experts.up"].delta() for one in (some, want))
    assert not delta[3].any() and np.array_equal(np.delete(delta, 3, 0), np.delete(whole, 3, 0))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("projs.7.", "projs.8.", r"adapts model\.layers\.0\.mlp\.experts.*and one of 3 layers and 8 experts"),
        ("layers.2.", "layers.3.", r"adapts model\.layers\.3.*one of 3 layers"),
        ("gate_up_projs.5.", "down_projs.9.", "and 8 experts"),
        ("gate_up_projs", "up_projs", "which ossia does not adapt"),
    ],
)
def test_modules_that_are_no_experts_of_this_model_are_refused(old, new, words, base, tmp_path):
    make, _, config = base
    save(trained(make(), r=2, lora_alpha=6, target_modules=[], target_parameters=EXPERTS), tmp_path / "adapter")
    cut_into_modules(tmp_path / "adapter", config.num_experts)
    rename(tmp_path / "adapter", old, new)
    with pytest.raises(CheckpointError, match=words):
        read_adapter(tmp_path / "adapter", config)


def test_copies_of_the_embedding_are_kept_apart_from_the_pairs(base, tmp_path):
    make, _, config = base
    wrapped = trained(make(), **CASES["embedding"])
    save(wrapped, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", config)
    assert "embedding" in adapter.pairs
    for copy in adapter.base_copies.values():
        assert copy.shape == (config.vocab_size, config.hidden_size)


def test_number_of_parameters_counts_shared_matrices_once(base, tmp_path):
    make, _, config = base
    wrapped = trained(make(), **CASES["all"])
    save(wrapped, tmp_path / "adapter")
    num_trained = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    assert read_adapter(tmp_path / "adapter", config).num_parameters == num_trained


# What cannot be used --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(base, tmp_path):
    """(folder of an adapter of q and v, shape of its model, a function that changes its settings)"""
    make, _, config = base
    save(trained(make(), r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"

    def change(**fields: Any) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return tmp_path / "adapter", config, change


def rename(folder, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): values.clone() for name, values in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "does not run DoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\].*Merge it"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; ossia runs adapters of type 'LORA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"trainable_token_indices": [1, 2]}, "does not know what trainable_token_indices may change"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"a_new_invention": 3}, "a_new_invention"),
        ({"r": 3}, r"expected \(3, 64\) and \(128, 3\) for this model and the rank in adapter_config.json"),
        ({"r": "eight"}, 'r is "eight"; expected a number above 0'),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"target_parameters": True}, "target_parameters is true; expected a list of names"),
        ({"target_parameters": ["experts", 1]}, "target_parameters is .*; expected a list of names"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_computed_are_refused_by_name(fields, words, small):
    folder, config, change = small
    change(**fields)
    with pytest.raises(CheckpointError, match=words):
        read_adapter(folder, config)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "self_attn.q_proj",
            "mlp.shared_expert",
            "adapts model.layers.0.mlp.shared_expert, which ossia does not adapt",
        ),
        ("layers.2.", "layers.7.", "adapts model.layers.7.self_attn.*this model has 3 layers"),
        ("q_proj.lora_A.weight", "q_proj.lora_magnitude_vector.weight", "belongs to DoRA"),
        ("q_proj.lora_A.weight", "q_proj.lora_B.bias", "changes a bias"),
        ("base_model.model.", "", "is no part of a LoRA adapter of GptOssForCausalLM"),
        ("q_proj.lora_A.weight", "q_proj.weight", "is no part of a LoRA adapter"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(old, new, words, small):
    folder, config, _ = small
    rename(folder, old, new)
    with pytest.raises(CheckpointError, match=words):
        read_adapter(folder, config)


def test_half_a_pair_is_refused(small):
    folder, config, _ = small
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj lacks its lora_B"):
        read_adapter(folder, config)


def test_an_adapter_of_another_model_is_refused_with_that_models_name(small):
    folder, _, change = small
    change(base_model_name_or_path="openai/gpt-oss-20b")
    with pytest.raises(CheckpointError, match=r"expected \(2, 2880\).*It was made for 'openai/gpt-oss-20b'"):
        read_adapter(folder, ModelConfig())


def test_experts_of_another_number_are_refused(base, tmp_path):
    make, _, config = base
    save(trained(make(), **CASES["experts"]), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="for this model's 16 experts"):
        read_adapter(tmp_path / "adapter", replace(config, num_experts=16))


def test_numbers_that_are_none_are_refused(small):
    folder, config, _ = small
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"][0, 0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj holds a NaN or an infinity"):
        read_adapter(folder, config)


def test_missing_files_are_named(small, tmp_path):
    folder, config, _ = small
    with pytest.raises(NotFoundError, match="there is no folder"):
        read_adapter(tmp_path / "nowhere", config)
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json.*It holds a model"):
        read_adapter(tmp_path / "base", config)
    # The folder of a run that was trained.
    shutil.copytree(folder, tmp_path / "run" / "adapter")
    with pytest.raises(CheckpointError, match=r"That of this run is .*run/adapter"):
        read_adapter(tmp_path / "run", config)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"a pickle.*safe_serialization"):
        read_adapter(folder, config)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"but no adapter_model.safetensors"):
        read_adapter(folder, config)


def test_damaged_files_are_refused(small):
    folder, config, _ = small
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="is cut off"):
        read_adapter(folder, config)
    path.write_bytes(data)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_adapter(folder, config)


def test_a_write_that_fails_leaves_the_old_adapter(small, monkeypatch):
    folder, config, _ = small
    adapter = read_adapter(folder, config)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_adapter(folder, adapter, config)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
