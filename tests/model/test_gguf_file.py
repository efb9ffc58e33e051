"""GGUF files as the gguf package writes them: the same model, and every fault one clear error."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ossia.errors import CheckpointError, InputError, UnavailableError
from ossia.harmony.tokenizer import Tokenizer
from ossia.model.checkpoint_files import find_files
from ossia.model.config import ModelConfig, RopeConfig
from ossia.model.gguf_file import Numbers
from ossia.model.inspection import inspect_checkpoint, verify_checkpoint
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.safetensors_file import map_file
from ossia.model.weights import Checkpoint
from ossia.ops import Q8, Mxfp4
from ossia.ops.mxfp4 import dequantize, pack_codes, unpack_codes
from ossia.train.export import export

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
IDS = np.random.default_rng(0).integers(0, 300, 30).tolist()
DENSE = {Type.F32: "F32", Type.F16: "F16", Type.BF16: "BF16", Type.Q8_0: "Q8_0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("hf") / "out", CONFIG)


def write_gguf(
    path: Path,
    source: Path,
    dense: Type = Type.F32,
    *,
    experts: Type = Type.MXFP4,
    others: Type = Type.F32,
    fused: bool = False,
    change: dict[str, Any] | None = None,
    drop: str = "",
    split_max_tensors: int = 0,
    vocabulary: Tokenizer | None = None,
) -> Path:
    """What llama.cpp's conversion makes of a checkpoint; ``change`` are metadata, None leaves one out."""
    checkpoint = Checkpoint.open(source)
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "gpt-oss", split_max_tensors=split_max_tensors)
    writer.add_file_type(38)
    for key, value in metadata(config, change or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    if vocabulary is not None:
        add_vocabulary(writer, vocabulary)
    for name, values in tensors(checkpoint, fused).items():
        if name == drop:
            continue
        if isinstance(values, Mxfp4) and experts == Type.MXFP4:
            blocks = pack_codes(unpack_codes(values.blocks), "halves")
            packed = np.concatenate([values.scales[..., None], blocks], axis=-1)
            writer.add_tensor(name, packed.reshape(*values.shape[:-1], -1), raw_dtype=experts)
            continue
        numbers = dequantize(values) if isinstance(values, Mxfp4) else values.astype(np.float32)
        kind = experts if isinstance(values, Mxfp4) else dense if is_matrix(name) else others
        kind = kind if numbers.shape[-1] % 32 == 0 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(config: ModelConfig, change: dict[str, Any]) -> dict[str, Any]:
    values = {
        "gpt-oss.block_count": config.num_layers,
        "gpt-oss.context_length": config.max_context,
        "gpt-oss.embedding_length": config.hidden_size,
        "gpt-oss.feed_forward_length": config.intermediate_size,
        "gpt-oss.expert_feed_forward_length": config.intermediate_size,
        "gpt-oss.attention.head_count": config.num_heads,
        "gpt-oss.attention.head_count_kv": config.num_kv_heads,
        "gpt-oss.attention.key_length": config.head_dim,
        "gpt-oss.attention.value_length": config.head_dim,
        "gpt-oss.attention.sliding_window": config.sliding_window,
        "gpt-oss.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "gpt-oss.expert_count": config.num_experts,
        "gpt-oss.expert_used_count": config.num_active_experts,
        "gpt-oss.rope.freq_base": config.rope.theta,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": config.rope.factor,
        "gpt-oss.rope.scaling.original_context_length": config.rope.original_context,
        "tokenizer.ggml.eos_token_id": config.stop_token_ids[0],
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }
    return {key: value for key, value in (values | change).items() if value is not None}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    document = json.loads(tokenizer.to_tokenizer_json())
    tokens = {i: token for token, i in document["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in document["added_tokens"]}
    both = tokens | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([both[i] for i in range(len(both))])
    writer.add_token_types([3 if i in special else 1 for i in range(len(both))])
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])


def tensors(checkpoint: Checkpoint, fused: bool) -> dict[str, Any]:
    outer = checkpoint.layout.outer(checkpoint.array)
    named = {
        "token_embd.weight": outer.embedding_VD,
        "output_norm.weight": outer.final_norm_D,
        "output.weight": outer.unembedding_VD,
    }
    for i in range(checkpoint.config.num_layers):
        layer = checkpoint.layout.layer(checkpoint.array, checkpoint.config, i)
        experts = layer.experts
        named |= {
            f"blk.{i}.attn_norm.weight": layer.attention_norm_D,
            f"blk.{i}.attn_sinks.weight": layer.sinks_Q,
            f"blk.{i}.post_attention_norm.weight": layer.moe_norm_D,
            f"blk.{i}.ffn_down_exps.weight": experts.down,
            f"blk.{i}.ffn_down_exps.bias": experts.down_bias_ED,
        }
        matrices = {
            "attn_q": layer.q,
            "attn_k": layer.k,
            "attn_v": layer.v,
            "attn_output": layer.o,
            "ffn_gate_inp": layer.router,
        }
        for name, (weight, bias) in matrices.items():
            named |= {f"blk.{i}.{name}.weight": weight, f"blk.{i}.{name}.bias": bias}
        gate_up = {"gate": (experts.gate, experts.gate_bias_EF), "up": (experts.up, experts.up_bias_EF)}
        if fused:
            both = Mxfp4(
                *(np.concatenate(parts, axis=1) for parts in zip(experts.gate[:2], experts.up[:2], strict=True))
            )
            gate_up = {"gate_up": (both, np.concatenate([bias for _, bias in gate_up.values()], axis=1))}
        for name, (weight, bias) in gate_up.items():
            named |= {f"blk.{i}.ffn_{name}_exps.weight": weight, f"blk.{i}.ffn_{name}_exps.bias": bias}
    return named


OLLAMA_NAMES = {
    "attn_output.": "attn_out.",
    "attn_sinks.weight": "attn_sinks",
    "post_attention_norm.": "ffn_norm.",
}


def write_ollama(path: Path, source: Path, *, original: bool, fused: bool) -> Path:
    """What Ollama's conversion makes of a checkpoint.

    Of ``original``/ q, k and v are one matrix. ``fused``, as its first versions: gate and up are one, and MXFP4 is as
    it was published; later ones have it as llama.cpp.
    """
    checkpoint = Checkpoint.open(source)
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "gptoss")
    for key, value in metadata(config, {"gpt-oss.rope.scaling.type": None}).items():
        add = {int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key.replace("gpt-oss.", "gptoss."), value)
    named = tensors(checkpoint, False)
    for i in range(config.num_layers):
        experts = checkpoint.layer(i).experts
        if original:
            for kind in ("weight", "bias"):
                parts = [named.pop(f"blk.{i}.attn_{one}.{kind}") for one in "qkv"]
                named[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(parts)
        if fused:
            both = [np.stack(pair, axis=2) for pair in zip(experts.gate[:2], experts.up[:2], strict=True)]
            bias = np.stack([named.pop(f"blk.{i}.ffn_{one}_exps.bias") for one in ("gate", "up")], axis=2)
            for one in ("gate", "up"):
                del named[f"blk.{i}.ffn_{one}_exps.weight"]
            shape = (config.num_experts, 2 * config.intermediate_size)
            named[f"blk.{i}.ffn_gate_up_exps.weight"] = Mxfp4(*(part.reshape(*shape, *part.shape[3:]) for part in both))
            named[f"blk.{i}.ffn_gate_up_exps.bias"] = bias.reshape(shape)
    rounded = []
    for name, values in named.items():
        for theirs, ours in OLLAMA_NAMES.items():
            name = name.replace(theirs, ours)
        if isinstance(values, Mxfp4):
            blocks = values.blocks if fused else pack_codes(unpack_codes(values.blocks), "halves")
            packed = np.concatenate([values.scales[..., None], blocks], axis=-1)
            writer.add_tensor(name, packed.reshape(*values.shape[:-1], -1), raw_dtype=Type.MXFP4)
            rounded.append(name)
        else:
            kind = Type.BF16 if values.ndim > 1 else Type.F32
            writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    for name in rounded if fused else []:
        # Behind a name: the number of dimensions, three of them, and the type, which the package does not know.
        at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 3 * 8
        assert data[at : at + 4] == struct.pack("<I", 39)
        data[at : at + 4] = struct.pack("<I", 4)
    path.write_bytes(data)
    return path


def is_matrix(name: str) -> bool:
    return name.endswith(".weight") and not any(word in name for word in ("norm", "sinks", "gate_inp"))


# Loading


@pytest.mark.parametrize("dense", [Type.F32, Type.BF16])
@pytest.mark.parametrize("fused", [False, True])
def test_a_file_with_exact_dense_tensors_gives_the_very_logits(dense, fused, folder, tmp_path, logits_of):
    path = write_gguf(tmp_path / "model.gguf", folder, dense, fused=fused)
    np.testing.assert_array_equal(logits_of(path, IDS), logits_of(folder, IDS))


@pytest.mark.parametrize("dense", [Type.F16, Type.Q8_0])
def test_a_file_with_rounded_dense_tensors_gives_the_logits_of_the_rounded_numbers(
    dense, folder, tmp_path, logits_of, assert_same_logits
):
    path = write_gguf(tmp_path / "model.gguf", folder, dense)
    got, exact = logits_of(path, IDS), logits_of(folder, IDS)
    # Rounding may send a token to another expert: most are near, not all.
    assert np.median(np.abs(got - exact)) < 0.02 * np.abs(exact).max()
    # The same rounded numbers in float32, as the gguf package reads them.
    rounded = write_gguf(tmp_path / "rounded.gguf", rounded_checkpoint(path, folder, tmp_path), Type.F32)
    assert_same_logits(got, logits_of(rounded, IDS), tolerance=1e-6)


@pytest.mark.parametrize("dense", [Type.Q4_0, Type.Q5_0])
def test_a_file_of_fewer_bits_gives_the_logits_of_its_numbers(dense, folder, tmp_path, logits_of, assert_same_logits):
    path = write_gguf(tmp_path / "model.gguf", folder, dense)
    rounded = write_gguf(tmp_path / "rounded.gguf", rounded_checkpoint(path, folder, tmp_path), Type.F32)
    assert_same_logits(logits_of(path, IDS), logits_of(rounded, IDS), tolerance=1e-6)


def test_a_file_of_fewer_bits_is_inspected_verified_and_exported(folder, tmp_path, logits_of):
    path = write_gguf(tmp_path / "model.gguf", folder, Type.Q5_1, vocabulary=small_vocabulary())
    inspection = inspect_checkpoint(path)
    assert inspection.problems == () and inspection.dtype_bytes["Q5_1"] > inspection.dtype_bytes["F32"]
    assert verify_checkpoint(path) == ()
    export(path, tmp_path / "again.gguf", "gguf", measure=False)
    np.testing.assert_array_equal(logits_of(tmp_path / "again.gguf", IDS), logits_of(path, IDS))
    export(path, tmp_path / "same", "merged", measure=False)
    assert (tmp_path / "same" / "model.gguf").read_bytes() == path.read_bytes()

    changed = {"layers.1.o.weight": np.zeros((CONFIG.hidden_size, CONFIG.num_heads * CONFIG.head_dim), np.float32)}
    save_file(changed, tmp_path / "changed.safetensors")
    with pytest.raises(UnavailableError, match=r"blk\.1\.attn_output\.weight is changed, and Q5_1, .* Export as gguf"):
        export(path, tmp_path / "changed", "merged", weights=tmp_path / "changed.safetensors", measure=False)
    assert not (tmp_path / "changed").exists()
    export(path, tmp_path / "changed.gguf", "gguf", weights=tmp_path / "changed.safetensors", measure=False)
    got = Checkpoint.open(tmp_path / "changed.gguf")
    assert not got.array("blk.1.attn_output.weight").values.any() and got.array("blk.0.attn_output.weight").values.any()


@pytest.mark.parametrize("options", [{"experts": Type.Q5_0}, {"others": Type.Q4_0}])
def test_what_does_not_fit_is_told_without_being_unpacked(options, folder, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", folder, **options)
    assert verify_checkpoint(path) == inspect_checkpoint(path).problems != ()


def test_matrices_are_unpacked_once(folder, tmp_path):
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder, Type.Q4_0))
    assert checkpoint.array("output.weight") is checkpoint.array("output.weight")


def test_scales_of_fewer_bits_that_are_not_finite_are_found(folder, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", folder, Type.Q5_1)
    data = bytearray(path.read_bytes())
    start = Checkpoint.open(path).tensors["output.weight"].offset
    data[start : start + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    (problem,) = verify_checkpoint(path)
    assert "output.weight has" in problem


def rounded_checkpoint(path: Path, source: Path, tmp_path: Path) -> Path:
    """The checkpoint ``source`` with the dense numbers that the gguf package reads from ``path``."""
    copy = shutil.copytree(source, tmp_path / "rounded")
    values = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    for i in range(CONFIG.num_layers):
        names |= {f"model.layers.{i}.self_attn.{x}_proj.weight": f"blk.{i}.attn_{x}.weight" for x in "qkv"}
        names[f"model.layers.{i}.self_attn.o_proj.weight"] = f"blk.{i}.attn_output.weight"
    numbers = load_file(copy / "model.safetensors")
    for ours, theirs in names.items():
        tensor = values[theirs]
        numbers[ours] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    save_file(numbers, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize(("original", "fused"), [(True, True), (False, True), (False, False)])
def test_ollama_s_own_files_give_the_very_logits(original, fused, folder, tmp_path, logits_of):
    path = write_ollama(tmp_path / "sha256-b112e727c6f1", folder, original=original, fused=fused)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.config == Checkpoint.open(write_gguf(tmp_path / "llama.gguf", folder)).config
    assert checkpoint.layout.name == "ollama"
    assert checkpoint.layer(0).experts.down.order == ("pairs" if fused else "halves")
    assert np.array_equal(logits_of(path, IDS), logits_of(folder, IDS))
    assert inspect_checkpoint(path).problems == () and list(verify_checkpoint(path)) == []
    with pytest.raises(InputError, match="Ollama's own layout, which ossia reads and does not write"):
        export(path, tmp_path / "out", "merged")
    assert np.array_equal(
        logits_of(export(path, tmp_path / "hf", "mxfp4", measure=False).path, IDS), logits_of(path, IDS)
    )


def test_a_file_of_another_kind_without_a_suffix_is_told(tmp_path):
    (tmp_path / "sha256-1").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"sha256-1 is not a checkpoint: expected a folder"):
        Checkpoint.open(tmp_path / "sha256-1")


@pytest.mark.parametrize("experts", [Type.BF16, Type.F32])
def test_experts_may_be_floats(experts, folder, tmp_path, logits_of):
    path = write_gguf(tmp_path / "model.gguf", folder, experts=experts)
    np.testing.assert_array_equal(logits_of(path, IDS), logits_of(folder, IDS))


def test_the_configuration_comes_from_the_metadata(folder, tmp_path):
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder))
    assert checkpoint.config == CONFIG
    assert checkpoint.layout.name == "gguf"


def test_how_to_sample_is_what_the_metadata_names(folder, tmp_path):
    named = {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.penalty_repeat": 1.05}
    path = write_gguf(tmp_path / "a.gguf", folder, change=named)
    assert Checkpoint.open(path).sampling() == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    assert Checkpoint.open(write_gguf(tmp_path / "b.gguf", folder)).sampling() == {}


def test_metadata_that_may_differ_or_be_missing_is_followed(folder, tmp_path):
    change = {
        "gpt-oss.expert_feed_forward_length": None,
        "gpt-oss.attention.layer_norm_rms_epsilon": None,
        "gpt-oss.rope.freq_base": 10_000.0,
        "gpt-oss.rope.scaling.factor": 4.0,
        "gpt-oss.rope.scaling.yarn_beta_fast": 16.0,
        "tokenizer.ggml.padding_token_id": None,
    }
    config = Checkpoint.open(write_gguf(tmp_path / "a.gguf", folder, change=change)).config
    assert config.rope == RopeConfig(theta=10_000.0, factor=4.0, beta_fast=16.0)
    assert (config.intermediate_size, config.rms_norm_eps, config.pad_token_id) == (96, 1e-5, None)
    plain = write_gguf(tmp_path / "b.gguf", folder, change={"gpt-oss.rope.scaling.type": None})
    assert Checkpoint.open(plain).config.rope == RopeConfig(factor=1.0, original_context=131_072)


def test_arrays_are_views_of_the_mapped_file(folder, tmp_path):
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder, Type.Q8_0))
    (mapped,) = checkpoint.maps.values()
    layer = checkpoint.layout.layer(checkpoint.array, checkpoint.config, 1)
    gate, q = layer.experts.gate, layer.q.weight_OI
    assert isinstance(gate, Mxfp4) and gate.order == "halves" and gate.shape == (8, 96, 64)
    assert isinstance(q, Q8) and q.shape == (128, 64)
    assert (q.values.dtype, q.scales.dtype) == (np.int8, np.float16)
    for array in (gate.blocks, gate.scales, q.values, q.scales, layer.sinks_Q):
        assert np.shares_memory(array, mapped) and not array.flags.writeable


def test_the_parts_of_a_split_file_are_one_checkpoint(folder, tmp_path, logits_of):
    write_gguf(tmp_path / "model.gguf", folder, split_max_tensors=25)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert find_files(parts[0]) == find_files(parts[-1]) == find_files(tmp_path) == tuple(parts)
    np.testing.assert_array_equal(logits_of(parts[1], IDS), logits_of(folder, IDS))
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the \d parts of model: model-00002-of-"):
        Checkpoint.open(parts[0])


def test_a_folder_may_hold_one_file_and_not_two(folder, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", folder)
    assert Checkpoint.open(tmp_path).files == (path,)
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        Checkpoint.open(tmp_path)


# The vocabulary


def small_vocabulary() -> Tokenizer:
    ordinary = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257, "ü".encode(): 258}
    return Tokenizer(ordinary, {f"<|{name}|>": 259 + i for i, name in enumerate(["start", "end", "message"])})


def test_the_vocabulary_in_the_file_is_the_one_that_was_put_in(folder, tmp_path):
    want = small_vocabulary()
    got = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder, vocabulary=want)).tokenizer()
    for text in ("abcabü abc\nab", "<|start|>"):
        assert got.encode(text) == want.encode(text)
    assert got.special_tokens == want.special_tokens


def test_ollama_s_vocabulary_is_split_by_its_architecture(folder, tmp_path):
    want = small_vocabulary()
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder, vocabulary=want))
    checkpoint.metadata.update({"general.architecture": "gptoss", "tokenizer.ggml.pre": "default"})
    assert checkpoint.tokenizer().encode("abcab abc\nab") == want.encode("abcab abc\nab")


def test_a_tokenizer_json_beside_a_file_counts_where_that_has_no_vocabulary(folder, tmp_path):
    own = small_vocabulary()
    other = Tokenizer({bytes([i]): i for i in range(256)}, {"<|start|>": 256})
    (tmp_path / "tokenizer.json").write_text(other.to_tokenizer_json(), encoding="utf-8")
    for name, vocabulary, want in (("with.gguf", own, own), ("without.gguf", None, other)):
        path = write_gguf(tmp_path / name, folder, **({"vocabulary": vocabulary} if vocabulary else {}))
        assert Checkpoint.open(path).tokenizer().encode("abc") == want.encode("abc")


def test_without_any_vocabulary_gpt_oss_s_own_is_taken_when_the_size_agrees(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"vocabulary of 300 tokens is not o200k_harmony's 201088"):
        Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder)).tokenizer()
    large = write_random_checkpoint(tmp_path / "large", "tiny", num_layers=1, tokenizer_json="{}")
    (large / "tokenizer.json").unlink()
    assert Checkpoint.open(large).tokenizer() is Tokenizer.o200k_harmony()
    path = write_gguf(tmp_path / "large.gguf", large)
    assert Checkpoint.open(path).config.stop_token_ids == (200_002, 199_999, 200_012)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.ggml.pre", "llama-bpe", "pattern 'llama-bpe'"),
        ("tokenizer.ggml.model", "llama", "kind 'llama'"),
        ("tokenizer.ggml.pre", Numbers(np.ones(2, np.int32)), "pattern an array of 2 numbers"),
        ("tokenizer.ggml.token_type", Numbers(np.ones(5, np.int32)), "262 tokens, but 5 types"),
        ("tokenizer.ggml.token_type", 1, "262 tokens, but 0 types"),
        ("tokenizer.ggml.merges", None, "vocabulary of 300 tokens is not"),
    ],
)
def test_another_kind_of_vocabulary_is_told(key, value, words, folder, tmp_path):
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder, vocabulary=small_vocabulary()))
    checkpoint.metadata[key] = value
    with pytest.raises(CheckpointError, match=words):
        checkpoint.tokenizer()


# Inspecting


def test_a_file_is_inspected_and_verified(folder, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", folder, Type.Q8_0)
    inspection = inspect_checkpoint(path)
    assert inspection.layout == "gguf" and inspection.problems == ()
    assert inspection.dtype_bytes.keys() == {"MXFP4", "Q8_0", "F32"}
    assert inspection.parameters == inspect_checkpoint(folder).parameters
    assert verify_checkpoint(path) == ()


def test_scales_that_are_not_finite_are_found(folder, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", folder, Type.Q8_0)
    entries = Checkpoint.open(path).tensors
    data = bytearray(path.read_bytes())
    data[entries["blk.1.ffn_up_exps.weight"].offset + 17] = 255
    start = entries["output.weight"].offset + 34
    data[start : start + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    problems = verify_checkpoint(path)
    assert len(problems) == 2
    assert any("blk.1.ffn_up_exps.weight has 1 MXFP4 blocks" in p and "[0, 0, 1]" in p for p in problems)
    assert any("output.weight has 1 values" in p and "[0, 1]" in p for p in problems)


# Faults

FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": (
        {"change": {"general.architecture": "llama"}},
        ["general.architecture is 'llama'", "'gpt-oss'"],
    ),
    "a missing field": ({"change": {"gpt-oss.block_count": None}}, ["field gpt-oss.block_count is missing"]),
    "another rope": (
        {"change": {"gpt-oss.rope.scaling.type": "linear"}},
        ["gpt-oss.rope.scaling.type is 'linear'", "'yarn'"],
    ),
    "another pattern of windows": (
        {"change": {"gpt-oss.attention.sliding_window_pattern": 6}},
        ["sliding_window_pattern is 6"],
    ),
    "another number of layers": ({"change": {"gpt-oss.block_count": 7}}, ["holds 3 layers", "its metadata says 7"]),
    "another number of experts": (
        {"change": {"gpt-oss.expert_count": 9}},
        ["MXFP4 [8, 64, 96], expected MXFP4 or BF16 or F16 or F32 [9, 64, 96]", "after its metadata"],
    ),
    "another size of heads": ({"change": {"gpt-oss.attention.key_length": 15}}, ["head_dim 15 is odd"]),
    "a missing tensor": ({"drop": "blk.1.attn_q.weight"}, ["lacks the tensor blk.1.attn_q.weight", "[128, 64]"]),
    "an unsupported quantisation": (
        {"dense": Type.MXFP4},
        ["is MXFP4 [", "F32 or Q8_0 or one of Q4_0 to Q6_K and IQ1 to IQ4 [", "Get a GGUF file"],
    ),
    "experts in 8 bits": ({"experts": Type.Q8_0}, ["is Q8_0 [8,", "expected MXFP4"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_one_error_that_names_it(fault, folder, tmp_path):
    options, words = FAULTS[fault]
    path = write_gguf(tmp_path / "model.gguf", folder, **options)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    message = caught.value.message
    assert str(tmp_path) in message and all(word in message for word in words), message


def header(*, version: int = 3, tensors: int = 0, pairs: bytes = b"", num_pairs: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, num_pairs) + pairs + rest


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


DAMAGE = {
    "nothing": (b"", "not a GGUF file"),
    "another format": (b"PK\x03\x04" + bytes(50), "not a GGUF file: it begins with b'PK"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs pointer"),
    "an old version": (header(version=1), "has version 1 of GGUF"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "has version 50331648 of GGUF, little endian"),
    "no dimension": (header(tensors=1, rest=info("a", (), 0, 0)), "describes tensor a without a dimension"),
    "cut off at once": (b"GGUF\x03", "cut off or damaged within its header"),
    "cut off in a string": (header(num_pairs=1, pairs=struct.pack("<Q", 2**63)), "cut off or damaged"),
    "no UTF-8": (header(num_pairs=1, pairs=struct.pack("<Q", 1) + b"\xff" + bytes(4)), "cut off or damaged"),
    "an unknown type of value": (header(num_pairs=1, pairs=pair("a", 13, b"")), "unknown type 13"),
    "an array of arrays": (
        header(num_pairs=1, pairs=pair("a", 9, struct.pack("<IQ", 9, 1))),
        "unknown type 9",
    ),
    "an endless array": (header(num_pairs=1, pairs=pair("a", 9, struct.pack("<IQ", 12, 2**60))), "cut off or damaged"),
    "an endless array of strings": (
        header(num_pairs=1, pairs=pair("a", 9, struct.pack("<IQ", 8, 2**60))),
        "cut off or damaged",
    ),
    "endless tensors": (header(tensors=2**60), "cut off or damaged"),
    "an odd alignment": (
        header(num_pairs=1, pairs=pair("general.alignment", 4, struct.pack("<I", 3))),
        "general.alignment 3",
    ),
    "five dimensions": (header(tensors=1, rest=info("x", (1,) * 5, 0, 0)), "tensor x with 5 dimensions"),
    "a tensor beyond the end": (header(tensors=1, rest=info("x", (64,), 0, 0)), "is cut off: tensor x ends at byte"),
    "a tensor off the raster": (header(tensors=1, rest=info("x", (1,), 0, 7)), "not a multiple of 32"),
    "half a block": (header(tensors=1, rest=info("x", (48,), 8, 0)), "tensor x as Q8_0 [48], which is not whole"),
    "a name twice": (
        header(tensors=2, rest=info("x", (1,), 0, 0) + info("x", (1,), 0, 32) + bytes(200)),
        "describes tensor x twice",
    ),
    "overlapping tensors": (
        header(tensors=2, rest=info("x", (16,), 0, 0) + info("y", (1,), 0, 32) + bytes(200)),
        "has tensor y begin at byte",
    ),
    "no architecture": (header(), "general.architecture is None"),
    "an array for a name": (
        header(num_pairs=1, pairs=pair("general.architecture", 9, struct.pack("<IQ", 4, 2) + bytes(8))),
        "general.architecture is an array of 2 numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_gives_one_error_that_names_the_file(damage, tmp_path):
    data, words = DAMAGE[damage]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(path) in caught.value.message and words in caught.value.message, caught.value.message


@pytest.fixture(scope="module")
def sound_file(folder, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("sound") / "model.gguf", folder)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_no_change_of_the_header_makes_the_reader_fail_otherwise(sound_file, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    broken = bytearray(sound_file.read_bytes())
    start = Checkpoint.open(sound_file).tensors["token_embd.weight"].offset
    for position in data.draw(st.lists(st.integers(0, start - 1), min_size=1, max_size=4)):
        broken[position] = data.draw(st.integers(0, 255))
    path.write_bytes(broken[: data.draw(st.integers(0, len(broken)))])
    try:
        Checkpoint.open(path)
    except CheckpointError as error:
        assert str(path.parent) in error.message


def test_an_empty_file_is_mapped_to_nothing(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert map_file(tmp_path / "x").size == 0


def test_bfloat16_tensors_come_as_bfloat16(folder, tmp_path):
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "model.gguf", folder, Type.BF16))
    assert checkpoint.array("blk.0.attn_q.weight").dtype == ml_dtypes.bfloat16
