"""What is exported is the model that was trained, in every layout, for every reader, and nothing else is touched."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.model.conftest import one_sequence
from transformers import GptOssForCausalLM

from ossia.errors import CheckpointError, InputError, NotFoundError, OssiaError, UnavailableError
from ossia.harmony.tokenizer import Tokenizer
from ossia.model import transformer
from ossia.model.adapter import Adapter, LoraPair, matrix_shape, read_adapter, write_adapter
from ossia.model.config import ModelConfig
from ossia.model.config_file import RANDOM_WEIGHTS, read_json
from ossia.model.inspection import verify_checkpoint
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Mxfp4
from ossia.ops.mxfp4 import dequantize, quantize
from ossia.ops.reference import ReferenceOps
from ossia.train import export as export_module
from ossia.train import tensors as tensors_module
from ossia.train.divergence import divergence
from ossia.train.export import export
from ossia.train.merged import Merged, numbers, read_tensors

logging.getLogger("transformers").setLevel(logging.ERROR)

CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    num_experts=8,
    sliding_window=8,
    stop_token_ids=(2,),
    pad_token_id=1,
)
IDS = np.random.default_rng(0).integers(0, 300, 40).tolist()
SPECIAL = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
]
SPECIAL += ["<|constrain|>", *(f"<|reserved_{i}|>" for i in range(35))]
VOCABULARY = Tokenizer({bytes([b]): b for b in range(256)}, {name: 256 + i for i, name in enumerate(SPECIAL)})
EXPERTS = [f"layers.{i}.experts.{part}" for i in range(3) for part in ("gate", "up", "down")]
DENSE = [f"layers.{i}.{part}" for i in range(3) for part in ("q", "k", "v", "o", "router")]
LAYOUTS = ["hf", "hf-bf16", "original", "gguf"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """One model in four layouts, with a vocabulary and what else a repository holds."""
    folder = tmp_path_factory.mktemp("bases")
    for layout in ("hf", "hf-bf16", "original"):
        write_random_checkpoint(folder / layout, CONFIG, layout=layout, tokenizer_json=VOCABULARY.to_tokenizer_json())
    (folder / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "hf" / "tokenizer_config.json").write_text("{}")
    (folder / "hf" / "notes.txt").write_text("not of the model")
    export(folder / "hf", folder / "model.gguf", "gguf", dense="bf16", measure=False)
    return folder


def base_of(bases: Path, layout: str) -> Path:
    return bases / ("model.gguf" if layout == "gguf" else layout)


def adapter_of(keys: list[str], config: ModelConfig = CONFIG, size: float = 0.3, seed: int = 0) -> Adapter:
    random = np.random.default_rng(seed)

    def pair(key: str) -> LoraPair:
        *stack, num_outputs, num_inputs = matrix_shape(key, config)
        a = random.standard_normal((*stack, 4, num_inputs)) / num_inputs**0.5
        b = random.standard_normal((*stack, num_outputs, 4)) * size
        return LoraPair(a.astype(np.float32), b.astype(np.float32), 0.5)

    return Adapter("trained", 4, 2.0, {key: pair(key) for key in keys})


@pytest.fixture
def adapter_folder(tmp_path):
    """make(keys, ...): the folder of an adapter of these matrices."""
    return lambda keys, **options: write_adapter(tmp_path / "adapter", adapter_of(keys, **options), CONFIG)


def logits(model: Any, dtype: Any = np.float32) -> np.ndarray:
    model = Checkpoint.open(model) if isinstance(model, Path) else model
    ops = ReferenceOps(dtype)
    return transformer.forward(ops, model.config, load_weights(model, ops), one_sequence(IDS))


class Unmerged(ReferenceOps):
    """The reference with pairs beside the weights: y = W x + s b (a x). Knows nothing of `Merged`."""

    def linear_weights(self, weight_OI, bias_O=None):
        return super().linear_weights(weight_OI, bias_O), self.pairs.pop(0)

    def linear(self, x_TI, weights):
        held, pair = weights
        out = super().linear(x_TI, held)
        return out if pair is None else out + pair.scaling * (x_TI @ pair.a.T.astype(self.dtype)) @ pair.b.T

    def experts(self, arrays):
        return super().experts(arrays), self.pairs.pop(0)

    def moe(self, x_TD, routing, experts, limit):
        held, pairs = experts
        deltas = {
            part: 0 if pair is None else pair.scaling * (pair.b.astype(self.dtype) @ pair.a)
            for part, pair in pairs.items()
        }
        wide = {part: np.stack([numbers(getattr(held, part), e) for e in range(8)]) + deltas[part] for part in deltas}
        return super().moe(x_TD, routing, held._replace(**wide), limit)


def unmerged_logits(path: Path, adapter: Adapter) -> np.ndarray:
    """Float64, weights as they are, pairs beside them."""
    checkpoint, ops, pairs = Checkpoint.open(path), Unmerged(np.float64), adapter.pairs
    ops.pairs = [
        each
        for i in range(3)
        for each in (
            *(pairs.get(f"layers.{i}.{name}") for name in ("q", "k", "v", "o", "router")),
            {part: pairs.get(f"layers.{i}.experts.{part}") for part in ("gate", "up", "down")},
        )
    ] + [pairs.get("unembedding")]
    weights = load_weights(checkpoint, ops)
    embedding = weights.embedding.astype(np.float64)
    if pair := pairs.get("embedding"):
        embedding = embedding + pair.scaling * (pair.b.astype(np.float64) @ pair.a).T
    return transformer.forward(ops, checkpoint.config, weights._replace(embedding=embedding), one_sequence(IDS))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is merged is what was trained


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "keys", [EXPERTS, DENSE, ["embedding", "unembedding"], [*EXPERTS, *DENSE, "embedding"]], ids=str
)
def test_the_merged_model_computes_what_the_adapter_does_beside_the_weights(keys, layout, bases):
    path, adapter = base_of(bases, layout), adapter_of(keys)
    want = unmerged_logits(path, adapter)
    got = logits(Merged(Checkpoint.open(path), adapter), np.float64)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(logits(path) - want).max() > 0.05 * np.abs(want).max(), "the adapter changes something"


def float32_base(bases: Path, tmp_path: Path) -> Path:
    """The base in float32: nothing that is merged into it is rounded on the way out."""
    folder = shutil.copytree(bases / "hf-bf16", tmp_path / "float32")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: values.astype(np.float32) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def test_merging_into_float32_files_gives_the_logits_of_the_adapter_beside_them(bases, tmp_path, adapter_folder):
    base, adapter = float32_base(bases, tmp_path), adapter_folder([*EXPERTS, *DENSE, "embedding", "unembedding"])
    done = export(base, tmp_path / "out", "merged", adapter=adapter, prompts=["One."])
    want = unmerged_logits(base, read_adapter(adapter, CONFIG))
    assert np.abs(logits(tmp_path / "out", np.float64) - want).max() < 1e-5 * np.abs(want).max()
    assert done.divergence.max_kl < 1e-9 and done.divergence.same_top == 1
    assert not done.rounding
    assert {entry.dtype for entry in Checkpoint.open(tmp_path / "out").tensors.values()} == {"F32"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", ["mxfp4", "bf16", "gguf", "merged"])
def test_every_number_that_is_written_is_the_trained_one_rounded_once(format, layout, bases, tmp_path, adapter_folder):
    base, adapter = base_of(bases, layout), adapter_folder([*EXPERTS, *DENSE, "embedding"])
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    export(base, out, format, adapter=adapter, dense="bf16", measure=False)
    model, written = Merged(Checkpoint.open(base), read_adapter(adapter, CONFIG)), Checkpoint.open(out)
    assert written.layout.name == {"mxfp4": "hf", "bf16": "hf-bf16", "gguf": "gguf", "merged": layout}[format]
    again = Merged(written)
    for layer in (None, 0, 1, 2):
        for key, wanted in model.parts(layer).items():
            got = again.parts(layer)[key]
            for row in range(wanted.shape[0]) if key.startswith("experts") else [slice(None)]:
                want = numbers(wanted, row)
                if isinstance(got, Mxfp4):
                    want = dequantize(quantize(want))
                else:
                    want = want.astype(got.dtype).astype(np.float32)
                np.testing.assert_array_equal(numbers(got, row), want, err_msg=f"{layer} {key}")
    assert verify_checkpoint(out) == ()


# What is untouched keeps its bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", ["none", "of zeros"])
def test_an_export_without_a_change_has_the_hash_of_the_base(pairs, layout, bases, tmp_path, adapter_folder):
    base = base_of(bases, layout)
    adapter = None if pairs == "none" else adapter_folder([*EXPERTS, *DENSE, "embedding", "unembedding"], size=0.0)
    done = export(base, tmp_path / "out", "merged", adapter=adapter)
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert [sha256(file) for file in after.files] == [sha256(file) for file in before.files]
    assert [file.name for file in after.files] == [file.name for file in before.files]
    assert done.num_copied == done.num_tensors and done.divergence is None


def test_mxfp4_from_the_published_layout_keeps_the_files_too(bases, tmp_path):
    export(bases / "hf", tmp_path / "out", "mxfp4")
    assert sha256(tmp_path / "out/model.safetensors") == sha256(bases / "hf/model.safetensors")
    export(bases / "hf-bf16", tmp_path / "bf16", "bf16")
    assert sha256(tmp_path / "bf16/model.safetensors") == sha256(bases / "hf-bf16/model.safetensors")


@pytest.mark.parametrize("format", ["mxfp4", "merged"])
def test_only_tensors_that_were_trained_change_and_only_their_bytes(format, bases, tmp_path, adapter_folder):
    done = export(
        bases / "hf",
        tmp_path / "out",
        format,
        adapter=adapter_folder(["layers.1.experts.down", "layers.2.q"]),
        measure=False,
    )
    before, after = load_file(bases / "hf/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        "model.layers.1.mlp.experts.down_proj_blocks",
        "model.layers.1.mlp.experts.down_proj_scales",
        "model.layers.2.self_attn.q_proj.weight",
    }
    assert done.num_copied == done.num_tensors - 3
    assert list(done.rounding) == ["layers.1.experts.down"]
    assert 0.05 < done.rounding["layers.1.experts.down"].relative_error < 0.15


def test_experts_that_a_pair_leaves_alone_keep_their_bits_within_a_tensor_that_changes(bases, tmp_path):
    adapter = adapter_of(["layers.0.experts.gate"])
    b = adapter.pairs["layers.0.experts.gate"].b
    b[[0, 1, 2, 4, 5, 6, 7]] = 0
    b[3, 10:] = 0  # of the expert that changes, ten rows
    folder = write_adapter(tmp_path / "adapter", adapter, CONFIG)
    export(bases / "hf", tmp_path / "out", "mxfp4", adapter=folder, measure=False)
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    differs = load_file(bases / "hf/model.safetensors")[name] != load_file(tmp_path / "out/model.safetensors")[name]
    experts, rows = np.nonzero(differs.any(axis=(2, 3)))
    assert set(experts) == {3} and set(rows) == set(range(0, 20, 2))


@pytest.mark.parametrize(
    "path", [["bf16", "mxfp4"], ["gguf", "mxfp4"], ["bf16", "gguf", "mxfp4"], ["gguf", "bf16", "gguf", "mxfp4"]]
)
@pytest.mark.parametrize("start", ["hf", "original"])
def test_through_other_layouts_and_back_every_tensor_is_what_it_was(start, path, bases, tmp_path):
    current = bases / start
    for i, format in enumerate(path):
        out = tmp_path / (f"{i}.gguf" if format == "gguf" else f"{i}")
        export(current, out, format, dense="bf16", measure=False)
        current = out
    before, after = load_file(bases / "hf/model.safetensors"), load_file(current / "model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        if not name.endswith(("_blocks", "_scales")):
            np.testing.assert_array_equal(after[name], values, err_msg=name)
    for name in (name for name in before if name.endswith("_blocks")):
        scales = name.replace("_blocks", "_scales")
        was, now = Mxfp4(before[name], before[scales]), Mxfp4(after[name], after[scales])
        np.testing.assert_array_equal(dequantize(now), dequantize(was), err_msg=name)
        if path == ["gguf", "mxfp4"]:
            np.testing.assert_array_equal(now.blocks, was.blocks)
            np.testing.assert_array_equal(now.scales, was.scales)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(
        st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 128]), st.integers(1, 3), st.integers(4, 6)
    ),
    seed=st.integers(0, 1000),
)
def test_models_of_any_shape_come_back_through_bf16_and_gguf(sizes, seed, tmp_path_factory):
    hidden, intermediate, num_layers, num_experts = sizes
    config = replace(
        CONFIG, hidden_size=hidden, intermediate_size=intermediate, num_layers=num_layers, num_experts=num_experts
    )
    folder = tmp_path_factory.mktemp("shape")
    base = write_random_checkpoint(folder / "a", config, seed=seed, tokenizer_json=VOCABULARY.to_tokenizer_json())
    # In float64: libraries of matrix products may add up in an order that depends on where an array lies.
    want = logits(base, np.float64)
    export(base, folder / "b", "bf16", measure=False)
    export(folder / "b", folder / "c.gguf", "gguf", dense="bf16", measure=False)
    export(folder / "c.gguf", folder / "d", "mxfp4", measure=False)
    for path in (folder / "b", folder / "c.gguf", folder / "d"):
        assert replace(Checkpoint.open(path).config, layer_types=()) == config
        np.testing.assert_allclose(logits(path, np.float64), want, rtol=0, atol=1e-12)


# Full fine-tunes


def test_trained_weights_replace_those_of_the_base_under_either_name(bases, tmp_path):
    random = np.random.default_rng(0)
    E, D, F = 8, 64, 96
    gate_up, bias = random.standard_normal((E, 2 * F, D)) * 0.2, random.standard_normal((E, 2 * F))
    down, q = random.standard_normal((E, D, F)) * 0.2, random.standard_normal((128, 64)) * 0.1
    norm, table = random.standard_normal(64), random.standard_normal((300, 64))
    ours = {
        "layers.1.experts.gate_up": gate_up,
        "layers.1.experts.gate_up_bias": bias,
        "layers.1.experts.down": down,
        "layers.2.q.weight": q,
        "layers.0.moe_norm": norm,
        "embedding": table,
        "unembedding.weight": table,
    }
    # Hugging Face: gate and up in turn, inputs before outputs.
    turns = np.stack([gate_up[:, :F], gate_up[:, F:]], axis=2).reshape(E, 2 * F, D)
    theirs = {
        "model.layers.1.mlp.experts.gate_up_proj": turns.swapaxes(1, 2),
        "model.layers.1.mlp.experts.gate_up_proj_bias": np.stack([bias[:, :F], bias[:, F:]], axis=2).reshape(E, 2 * F),
        "model.layers.1.mlp.experts.down_proj": down.swapaxes(1, 2),
        "model.layers.2.self_attn.q_proj.weight": q,
        "model.layers.0.post_attention_layernorm.weight": norm,
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
    }
    for name, tensors in (("ours", ours), ("theirs", theirs)):
        tensors = {key: np.ascontiguousarray(values, np.float32) for key, values in tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        weights = tmp_path / f"{name}.safetensors"
        done = export(bases / "hf", tmp_path / name, "mxfp4", weights=weights, measure=False)
        assert set(done.rounding) == {f"layers.1.experts.{part}" for part in ("gate", "up", "down")}
        # What was trained as a whole is random no more.
        assert not Checkpoint.open(tmp_path / name).has_random_weights
    assert sha256(tmp_path / "ours/model.safetensors") == sha256(tmp_path / "theirs/model.safetensors")
    layer = Checkpoint.open(tmp_path / "ours").layer(1)
    np.testing.assert_array_equal(
        dequantize(layer.experts.gate), dequantize(quantize(gate_up[:, :F].astype(np.float32)))
    )
    np.testing.assert_array_equal(layer.experts.up_bias_EF, bias[:, F:].astype(np.float32).astype(ml_dtypes.bfloat16))
    export(bases / "hf", tmp_path / "bf16", "bf16", weights=tmp_path / "ours.safetensors", measure=False)
    assert not Checkpoint.open(tmp_path / "bf16").has_random_weights
    written = load_file(tmp_path / "bf16/model.safetensors")
    for name, values in theirs.items():
        np.testing.assert_array_equal(written[name], values.astype(np.float32).astype(ml_dtypes.bfloat16), err_msg=name)


def test_weights_that_training_did_not_move_keep_the_bits_of_the_base(bases, tmp_path):
    parts = {
        f"layers.{i}.{key}": values
        for i in range(3)
        for key, values in Merged(Checkpoint.open(bases / "hf")).parts(i).items()
    }
    save_file({key: np.ascontiguousarray(numbers(values)) for key, values in parts.items()}, tmp_path / "w.safetensors")
    done = export(bases / "hf", tmp_path / "out", "mxfp4", weights=tmp_path / "w.safetensors", prompts=["One."])
    assert sha256(tmp_path / "out/model.safetensors") == sha256(bases / "hf/model.safetensors")
    assert done.divergence.max_kl == 0


def test_a_runs_checkpoint_is_read_by_its_trainable_file(bases, tmp_path):
    (tmp_path / "step").mkdir()
    save_file({"layers.0.sinks": np.arange(8, dtype=np.float32)}, tmp_path / "step/trainable.safetensors")
    save_file({"layers.0.sinks/mean": np.arange(8, dtype=np.float32)}, tmp_path / "step/optimizer.safetensors")
    assert list(read_tensors(tmp_path / "step", CONFIG)) == ["layers.0.sinks"]
    export(bases / "hf", tmp_path / "out", "merged", weights=tmp_path / "step", measure=False)
    assert Checkpoint.open(tmp_path / "out").layer(0).sinks_Q.tolist() == list(range(8))
    assert Checkpoint.open(tmp_path / "out").has_random_weights


# Other programs


def hugging_face_logits(folder: Path) -> np.ndarray:
    model = GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("format", ["mxfp4", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_loads_what_is_exported_and_gives_its_logits(layout, format, bases, tmp_path, adapter_folder):
    adapter = adapter_folder([*EXPERTS, *DENSE, "embedding", "unembedding"])
    export(base_of(bases, layout), tmp_path / "out", format, adapter=adapter, shard_bytes=100_000, measure=False)
    want = logits(tmp_path / "out")
    got = hugging_face_logits(tmp_path / "out")
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


# The folder


def test_a_folder_is_a_whole_repository(bases, tmp_path):
    export(bases / "hf", tmp_path / "out", "bf16", shard_bytes=100_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 2
    assert names - shards == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    limit = 100_000
    for name in shards:
        tensors = load_file(tmp_path / "out" / name)
        assert sum(values.nbytes for values in tensors.values()) <= limit or len(tensors) == 1
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert index["metadata"]["total_size"] == sum(
        entry.size_bytes for entry in Checkpoint.open(tmp_path / "out").tensors.values()
    )


def test_the_configuration_says_how_the_experts_are_written_and_keeps_what_else_it_said(bases, tmp_path):
    base = shutil.copytree(bases / "hf", tmp_path / "base")
    fields = read_json(base / "config.json") | {
        "custom": 7,
        "architectures": ["FSDPGptOssForCausalLM"],
        "dtype": "float32",
    }
    (base / "config.json").write_text(json.dumps(fields))
    export(base, tmp_path / "bf16", "bf16")
    export(tmp_path / "bf16", tmp_path / "mxfp4", "mxfp4", measure=False)
    bf16, mxfp4 = read_json(tmp_path / "bf16/config.json"), read_json(tmp_path / "mxfp4/config.json")
    assert "quantization_config" not in bf16 and mxfp4["quantization_config"]["quant_method"] == "mxfp4"
    for config in (bf16, mxfp4):
        assert config["architectures"] == ["GptOssForCausalLM"]
        assert (config["torch_dtype"], config["custom"]) == ("bfloat16", 7) and "dtype" not in config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_vocabulary_and_the_mark_of_random_weights_travel_along(layout, bases, tmp_path):
    export(base_of(bases, layout), tmp_path / "out", "mxfp4", measure=False)
    checkpoint = Checkpoint.open(tmp_path / "out")
    text = "Grüße <|end|>"
    assert checkpoint.tokenizer().encode(text) == VOCABULARY.encode(text)
    assert checkpoint.tokenizer().special("<|end|>") == VOCABULARY.special("<|end|>")
    # original/ does not say which tokens end a generation.
    silent = {"stop_token_ids": (), "pad_token_id": None} if layout == "original" else {}
    assert checkpoint.config == replace(CONFIG, layer_types=checkpoint.config.layer_types, **silent)
    assert checkpoint.has_random_weights or layout == "gguf"
    if layout in ("hf", "gguf"):
        assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_vocabulary_is_one_that_others_load(layout, bases, tmp_path):
    export(base_of(bases, layout), tmp_path / "out", "mxfp4", measure=False)
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "Grüße <|end|>"
    assert loaded.decode(loaded.encode(text).ids, skip_special_tokens=False) == text
    assert loaded.token_to_id("<|end|>") == VOCABULARY.special("<|end|>")


def test_what_lies_beside_a_gguf_file_is_not_taken_for_its_own(bases, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copyfile(bases / "model.gguf", models / "model.gguf")
    (models / "config.json").write_text(json.dumps({"model_type": "llama", RANDOM_WEIGHTS: True}))
    (models / "generation_config.json").write_text('{"temperature": 0.1}')
    (models / "chat_template.jinja").write_text("foreign")
    other = Tokenizer({b"a": 0}, {"<|x|>": 1})
    (models / "tokenizer.json").write_text(other.to_tokenizer_json())
    checkpoint = Checkpoint.open(models / "model.gguf")
    assert checkpoint.tokenizer().encode("Grüße") == VOCABULARY.encode("Grüße")
    for format in ("bf16", "mxfp4", "merged"):
        export(models / "model.gguf", tmp_path / format, format, measure=False)
        written = Checkpoint.open(tmp_path / format)
        assert written.tokenizer().vocab_size == VOCABULARY.vocab_size and written.sampling() == {}
    assert read_json(tmp_path / "bf16/config.json")["model_type"] == "gpt_oss"
    assert (tmp_path / "bf16/chat_template.jinja").read_text() == "{{ messages }}"
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 40}, {"temperature": 0.6, "top_p": 0.9, "top_k": 40}),
        ({"do_sample": False}, {"temperature": 0.0}),
    ],
)
def test_how_a_model_is_sampled_travels_through_gguf_and_back(said, sampling, bases, tmp_path):
    base = shutil.copytree(bases / "hf", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(said))
    export(base, tmp_path / "model.gguf", "gguf", measure=False)
    export(tmp_path / "model.gguf", tmp_path / "back", "mxfp4", measure=False)
    assert Checkpoint.open(tmp_path / "model.gguf").sampling() == sampling
    assert Checkpoint.open(tmp_path / "back").sampling() == sampling


@pytest.mark.parametrize(
    ("file", "template"),
    [
        ("tokenizer_config.json", "{{ old }}"),
        ("tokenizer_config.json", [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ old }}"}]),
        ("chat_template.json", "{{ old }}"),
    ],
)
def test_a_template_in_an_older_place_goes_into_a_gguf_file(file, template, bases, tmp_path):
    base = shutil.copytree(bases / "hf", tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (base / file).write_text(json.dumps({"chat_template": template}))
    export(base, tmp_path / "model.gguf", "gguf", measure=False)
    assert Checkpoint.open(tmp_path / "model.gguf").metadata["tokenizer.chat_template"] == "{{ old }}"


def test_a_gguf_file_without_a_suffix_gets_one(bases, tmp_path):
    shutil.copyfile(bases / "model.gguf", tmp_path / "sha256-abc")
    export(tmp_path / "sha256-abc", tmp_path / "out", "merged", measure=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sha256-abc.gguf"]
    assert sha256(tmp_path / "out" / "sha256-abc.gguf") == sha256(bases / "model.gguf")


# Adapters


def test_an_adapter_is_written_again_for_peft(bases, tmp_path, adapter_folder):
    folder = adapter_folder([*EXPERTS, *DENSE])
    done = export(bases / "hf", tmp_path / "out", "adapter", adapter=folder)
    before, after = read_adapter(folder, CONFIG), read_adapter(tmp_path / "out", CONFIG)
    assert before.pairs.keys() == after.pairs.keys()
    assert all(np.array_equal(pair.b, after.pairs[key].b) for key, pair in before.pairs.items())
    assert done.num_tensors == 2 * len(before.pairs)
    with pytest.raises(InputError, match="for an adapter alone"):
        export(bases / "hf", tmp_path / "other", "adapter")


# How much is lost


def test_merging_into_a_gguf_file_looks_at_nothing_beside_it(bases, tmp_path, adapter_folder):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copyfile(bases / "model.gguf", models / "model.gguf")
    (models / "config.json").write_text(json.dumps({RANDOM_WEIGHTS: True}))
    folder = adapter_folder(["layers.0.q"])
    export(models / "model.gguf", tmp_path / "out", "merged", adapter=folder, measure=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_an_adapter_with_an_embedding_of_its_own_is_refused(bases, tmp_path, adapter_folder):
    folder = adapter_folder(["embedding"])
    tensors = load_file(folder / "adapter_model.safetensors")
    other = {"base_model.model.model.embed_tokens.base_layer.weight": np.ones((300, 64), np.float32)}
    save_file(tensors | other, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="brings another embedding"):
        export(bases / "hf", tmp_path / "out", "mxfp4", adapter=folder)
    assert not (tmp_path / "out").exists()


def test_a_change_beside_the_steps_of_the_grid_is_told_to_be_rounded_away(bases, tmp_path):
    kept = {}
    for size in (1e-4, 0.3):
        folder = write_adapter(tmp_path / f"a{size}", adapter_of(EXPERTS, size=size), CONFIG)
        done = export(bases / "hf", tmp_path / f"out{size}", "mxfp4", adapter=folder, measure=False)
        kept[size] = np.mean([each.kept for each in done.rounding.values()])
    assert kept[1e-4] < 0.01 and 0.8 < kept[0.3] < 1.1
    before, after = load_file(bases / "hf/model.safetensors"), load_file(tmp_path / "out0.0001/model.safetensors")
    changed = [np.mean(before[name] != after[name]) for name in before if name.endswith("_blocks")]
    assert np.mean(changed) < 0.01, "what is rounded away keeps the bits of the base"


def test_the_divergence_is_that_of_the_files_from_the_unrounded_sum(bases, tmp_path, adapter_folder):
    adapter = adapter_folder([*EXPERTS, *DENSE])
    rounded = export(bases / "hf", tmp_path / "a", "mxfp4", adapter=adapter, prompts=["One."]).divergence
    finer = export(bases / "hf", tmp_path / "b", "bf16", adapter=adapter, prompts=["One."]).divergence
    assert rounded.source == "prompts" and rounded.num_positions == 64
    assert 0 < finer.mean_kl < 0.3 * rounded.mean_kl < rounded.max_kl
    assert 0 < rounded.same_top <= finer.same_top <= 1
    assert export(bases / "hf", tmp_path / "c", "mxfp4", adapter=adapter, measure=False).divergence is None
    other = export(bases / "hf", tmp_path / "d", "mxfp4", adapter=adapter, prompts=["Two."]).divergence
    assert other.mean_kl != rounded.mean_kl
    with pytest.raises(InputError, match="no prompts"):
        export(bases / "hf", tmp_path / "e", "mxfp4", adapter=adapter, prompts=())


def test_without_a_vocabulary_the_divergence_is_over_random_tokens(tmp_path):
    base = write_random_checkpoint(tmp_path / "base", CONFIG)
    folder = write_adapter(tmp_path / "adapter", adapter_of(EXPERTS), CONFIG)
    assert export(base, tmp_path / "out", "mxfp4", adapter=folder).divergence.source == "random tokens"


# Memory, disk, and what goes wrong


@pytest.mark.parametrize("format", ["mxfp4", "bf16", "gguf"])
def test_writing_needs_a_few_experts_of_memory_and_not_the_model(format, tmp_path, monkeypatch):
    config = replace(CONFIG, hidden_size=128, intermediate_size=128, num_experts=24, num_layers=2)
    base = write_random_checkpoint(tmp_path / "base", config, tokenizer_json=VOCABULARY.to_tokenizer_json())
    folder = write_adapter(tmp_path / "adapter", adapter_of(EXPERTS[:6], config), config)
    monkeypatch.setattr(export_module, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(tensors_module, "_CHUNK_VALUES", 1 << 14)
    export(base, tmp_path / "first", "bf16", adapter=folder, measure=False)  # imports and caches
    tracemalloc.start()
    export(base, tmp_path / f"out{'.gguf' * (format == 'gguf')}", format, adapter=folder, measure=False)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 * (128 * 128 * 8), f"{peak_bytes / (128 * 128 * 8):.1f} experts"


def resident_bytes(folder: Path) -> int:
    """Of the files of a folder that this process has mapped."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_inside = str(folder) in line
        elif is_inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell which pages are resident")
@pytest.mark.parametrize("layout", ["hf", "hf-bf16"])
def test_the_divergence_lets_go_of_the_pages_of_both_checkpoints(layout, tmp_path):
    # Few layers of large matrices: the system maps pages around those that are read.
    config = replace(CONFIG, hidden_size=1024, intermediate_size=1024, num_experts=4, num_layers=2)
    bases = [write_random_checkpoint(tmp_path / f"base-{i}", config, layout=layout, seed=i) for i in range(2)]
    first, second = map(Checkpoint.open, bases)
    pair = LoraPair(np.ones((4, 1, 1024), np.float32), np.ones((4, 1024, 1), np.float32), 1.0)
    found = divergence(Merged(first, Adapter("a", 1, 1.0, {"layers.1.experts.down": pair})), second, first)
    assert found.mean_kl > 0
    for base, checkpoint in zip(bases, (first, second), strict=True):
        assert resident_bytes(base) < 0.25 * checkpoint.size_bytes


def test_the_same_export_gives_the_same_bytes_however_it_is_cut(bases, tmp_path, adapter_folder, monkeypatch):
    adapter = adapter_folder([*EXPERTS, *DENSE, "embedding"])
    export(bases / "original", tmp_path / "a", "mxfp4", adapter=adapter, measure=False)
    monkeypatch.setattr(tensors_module, "_CHUNK_VALUES", 1000)
    monkeypatch.setattr(export_module, "_COPY_BYTES", 777)
    export(bases / "original", tmp_path / "b", "mxfp4", adapter=adapter, measure=False)
    assert sha256(tmp_path / "a/model.safetensors") == sha256(tmp_path / "b/model.safetensors")


def test_progress_ends_at_the_whole(bases, tmp_path):
    for format, name in (("mxfp4", "a"), ("bf16", "b"), ("gguf", "c.gguf"), ("merged", "d")):
        heard: list[tuple[int, int]] = []

        def hear(done: int, total: int, heard: list[tuple[int, int]] = heard) -> None:
            heard.append((done, total))

        export(
            bases / "original",
            tmp_path / name,
            format,
            progress=hear,
            measure=False,
        )
        assert heard[-1][0] == heard[-1][1] > 0
        assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_what_is_there_is_not_overwritten_unless_asked(bases, tmp_path):
    for format, name in (("mxfp4", "a"), ("gguf", "a.gguf"), ("merged", "c")):
        export(bases / "hf", tmp_path / name, format, measure=False)
        with pytest.raises(InputError, match="is there already"):
            export(bases / "hf", tmp_path / name, format, measure=False)
        export(bases / "hf", tmp_path / name, format, measure=False, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.gguf", "c"]


@pytest.mark.parametrize("out", ["base", ".", "base/model.safetensors"])
def test_the_base_is_never_the_output(out, bases, tmp_path):
    base = shutil.copytree(bases / "hf", tmp_path / "base")
    with pytest.raises(InputError, match="which the export reads"):
        export(base, tmp_path / out, "mxfp4", replace=True)
    assert sha256(base / "model.safetensors") == sha256(bases / "hf/model.safetensors")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("key", "format", "tensor"),
    [
        ("layers.1.experts.gate", "mxfp4", "model.layers.1.mlp.experts.gate_up_proj_blocks"),
        ("layers.1.experts.down", "bf16", "model.layers.1.mlp.experts.down_proj"),
        ("layers.2.k.bias", "mxfp4", "model.layers.2.self_attn.k_proj.bias"),
        ("layers.0.o.weight", "gguf", "blk.0.attn_output.weight"),
        ("layers.0.experts.up_bias", "merged", "model.layers.0.mlp.experts.gate_up_proj_bias"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_its_tensors_name_and_leaves_nothing(
    key, format, tensor, bad, bases, tmp_path
):
    layer, _, inner = key.removeprefix("layers.").partition(".")
    values = np.array(numbers(Merged(Checkpoint.open(bases / "hf")).parts(int(layer))[inner]))
    values.flat[5] = bad
    save_file({key: values}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {tensor} would hold a NaN or an infinity"):
        export(bases / "hf", tmp_path / "out.gguf", format, weights=tmp_path / "w.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_number_that_the_form_cannot_hold_is_refused_too(bases, tmp_path):
    values = np.array(numbers(Merged(Checkpoint.open(bases / "hf")).parts(0)["q.weight"]))
    values[3, 3] = 3.4e38  # finite in float32, beyond bfloat16's largest
    save_file({"layers.0.q.weight": values}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn.q_proj.weight would hold"):
        export(bases / "hf", tmp_path / "out", "mxfp4", weights=tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight holds numbers beyond the range of Q8_0"):
        export(bases / "hf", tmp_path / "out.gguf", "gguf", weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.3.sinks": (8,)}, r"is of layer 3; the base has 3 layers"),
        ({"layers.0.sinks": (9,)}, r"layers.0.sinks is \[9\], expected \[8\] for this base"),
        ({"layers.0.experts.gate_up": (8, 96, 64)}, r"is \[8, 96, 64\], expected \[8, 192, 64\]"),
        ({"layers.0.q.a": (4, 64)}, r"belongs to a LoRA adapter.*Give the adapter's folder"),
        ({"vision.weight": (4, 64)}, r"vision.weight is no part of a gpt-oss model"),
        ({"layers.0.attn.weight": (4, 64)}, r"layers.0.attn.weight is no part of a gpt-oss model"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_reason(tensors, message, bases, tmp_path):
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        export(bases / "hf", tmp_path / "out", "mxfp4", weights=tmp_path / "w.safetensors")


def test_inputs_that_are_missing_or_of_no_use_are_named(bases, tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match="there is no file or folder"):
        export(bases / "hf", tmp_path / "out", "mxfp4", weights=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        export(bases / "hf", tmp_path / "out", "mxfp4", weights=tmp_path)
    with pytest.raises(InputError, match=r"ends in \.gguf, and .*out does not"):
        export(bases / "hf", tmp_path / "out", "gguf")
    with pytest.raises(OssiaError, match="expected one of: mxfp4, bf16"):
        export(bases / "hf", tmp_path / "out", "onnx")
    with pytest.raises(InputError, match="no prompts to compare with"):
        export(bases / "hf", tmp_path / "out", "mxfp4", prompts=["Hi", " "])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20))
    for format in ("mxfp4", "bf16", "merged"):
        with pytest.raises(UnavailableError, match="Free some space"):
            export(bases / "hf", tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_what_llamacpp_cannot_compute_is_not_written_for_it(tmp_path):
    for changes, message in (
        ({"layer_types": ("full_attention",) * 3}, "sliding windows are not on every second layer"),
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5.0"),
    ):
        base = write_random_checkpoint(
            tmp_path / message[:8], replace(CONFIG, **changes), tokenizer_json=VOCABULARY.to_tokenizer_json()
        )
        with pytest.raises(UnavailableError, match=message):
            export(base, tmp_path / "out.gguf", "gguf")


def test_an_export_needs_neither_torch_nor_peft_nor_gguf(bases, tmp_path, adapter_folder):
    program = """
import sys
for name in ("torch", "peft", "gguf", "transformers", "safetensors"):
    sys.modules[name] = None
from ossia.train.divergence import divergence
from ossia.train.export import export
for format, name in (("mxfp4", "a"), ("bf16", "b"), ("gguf", "c.gguf")):
    export(sys.argv[1], f"{sys.argv[2]}/{name}", format, adapter=sys.argv[3], prompts=["One."])
"""
    folder = adapter_folder(EXPERTS[:1])
    arguments = [sys.executable, "-c", program, str(bases / "hf"), str(tmp_path), str(folder)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
