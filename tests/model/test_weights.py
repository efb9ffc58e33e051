"""Checkpoints in files: every layout gives the same logits, and every fault one clear error."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GptOssForCausalLM

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.checkpoint_files import find_files
from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Mxfp4
from ossia.ops.reference import ReferenceOps

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
    stop_token_ids=(2, 5),
    pad_token_id=1,
)
IDS = np.random.default_rng(0).integers(0, 300, 30).tolist()
LAYOUTS = ["hf", "hf-bf16", "original"]
ROUTER = "model.layers.1.mlp.router.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for layout in LAYOUTS:
        write_random_checkpoint(folder / layout, CONFIG, layout=layout)
    return folder


@pytest.fixture
def copy(checkpoints, tmp_path) -> Path:
    """A checkpoint in the layout "hf" to be damaged."""
    return shutil.copytree(checkpoints / "hf", tmp_path / "copy")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file, or the tensors of a safetensors file."""
    if path.suffix == ".json":
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def shard(folder: Path) -> None:
    """Spread model.safetensors over two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_saved_by_transformers_gives_its_logits(
    dtype, tmp_path, hugging_face_model, hugging_face_logits, logits_of, assert_same_logits
):
    hugging_face_model(0).to(dtype).save_pretrained(tmp_path)
    # The weights are rounded by the dtype; sums are in float32 on both sides.
    model = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert_same_logits(logits_of(tmp_path, IDS), hugging_face_logits(model, IDS))


def test_a_model_saved_by_transformers_in_shards_gives_its_logits(
    tmp_path, hugging_face_model, hugging_face_logits, logits_of, assert_same_logits
):
    model = hugging_face_model(0)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(Checkpoint.open(tmp_path).files) > 2
    assert_same_logits(logits_of(tmp_path, IDS), hugging_face_logits(model, IDS))


def test_the_three_layouts_of_the_same_weights_give_the_same_logits(checkpoints, logits_of):
    # In float64: libraries of matrix products may add up in an order that depends on where an array lies.
    want, *others = (
        logits_of(checkpoints / layout, IDS, ops=ReferenceOps(np.float64)) for layout in ("hf", "hf-bf16", "original")
    )
    for got in others:
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_transformers_gives_the_same_logits_for_our_bfloat16_layout(
    checkpoints, hugging_face_logits, logits_of, assert_same_logits
):
    model = GptOssForCausalLM.from_pretrained(checkpoints / "hf-bf16", dtype=torch.float32, attn_implementation="eager")
    assert_same_logits(logits_of(checkpoints / "hf", IDS), hugging_face_logits(model, IDS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_and_the_configuration_are_recognised(layout, checkpoints):
    checkpoint = Checkpoint.open(checkpoints / layout)
    assert checkpoint.layout.name == layout
    config = checkpoint.config
    assert [config.window(i) for i in range(3)] == [8, None, 8]
    assert (config.hidden_size, config.num_experts, config.num_active_experts) == (64, 8, 4)
    assert config.rope == CONFIG.rope and config.max_context == 131_072


def test_arrays_are_views_of_the_mapped_file(checkpoints):
    class Recorder(ReferenceOps):
        def linear_weights(self, weight_OI: Any, bias_O: Any = None) -> Any:
            arrays.append(weight_OI)
            return super().linear_weights(weight_OI, bias_O)

        def experts(self, experts: Any) -> Any:
            arrays.extend((experts.gate.blocks, experts.up.scales, experts.down.blocks))
            return super().experts(experts)

    for layout in ("hf", "original"):
        arrays: list[Any] = []
        checkpoint = Checkpoint.open(checkpoints / layout)
        load_weights(checkpoint, Recorder())
        (mapped,) = checkpoint.maps.values()
        assert len(arrays) == 3 * (5 + 3) + 1
        assert all(np.shares_memory(array, mapped) for array in arrays)
        assert not any(array.flags.writeable for array in arrays)


def test_gate_and_up_are_every_second_row(checkpoints):
    checkpoint = Checkpoint.open(checkpoints / "hf")
    experts = checkpoint.layout.layer(checkpoint.array, checkpoint.config, 0).experts
    blocks = checkpoint.array("model.layers.0.mlp.experts.gate_up_proj_blocks")
    assert isinstance(experts.gate, Mxfp4) and experts.gate.shape == (8, 96, 64)
    np.testing.assert_array_equal(experts.gate.blocks, blocks[:, 0::2])
    np.testing.assert_array_equal(experts.up.blocks, blocks[:, 1::2])


def test_shards_and_a_single_file_are_the_same_checkpoint(copy, logits_of):
    want = logits_of(copy, IDS)
    shard(copy)
    assert len(Checkpoint.open(copy).files) == 2
    np.testing.assert_array_equal(logits_of(copy, IDS), want)


def test_shards_without_an_index_are_read_as_the_original_code_does(copy, logits_of):
    want = logits_of(copy, IDS)
    shard(copy)
    (copy / "model.safetensors.index.json").unlink()
    np.testing.assert_array_equal(logits_of(copy, IDS), want)


def test_a_path_may_be_the_folder_the_original_subfolder_or_a_file(checkpoints, copy):
    folder = checkpoints / "original"
    assert find_files(folder) == find_files(folder / "original") == (folder / "original" / "model.safetensors",)
    assert Checkpoint.open(checkpoints / "hf" / "model.safetensors").layout.name == "hf"
    shard(copy)
    assert find_files(copy / "model-00001-of-00002.safetensors") == find_files(copy)


def test_a_tensor_at_an_odd_byte_is_still_read(copy, logits_of):
    want = logits_of(copy, IDS)
    path = copy / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    path.write_bytes((size + 1).to_bytes(8, "little") + data[8 : 8 + size] + b" " + data[8 + size :])
    assert Checkpoint.open(copy).array("model.norm.weight").flags.aligned
    np.testing.assert_array_equal(logits_of(copy, IDS), want)


def test_the_tokenizer_lies_beside_the_weights_or_above_the_original_folder(tmp_path, checkpoints):
    assert Checkpoint.open(checkpoints / "hf").tokenizer_path is None
    for layout in ("hf", "original"):
        folder = write_random_checkpoint(tmp_path / layout, CONFIG, layout=layout, tokenizer_json="{}")
        assert Checkpoint.open(folder).tokenizer_path == folder / "tokenizer.json"


# Faults: what is done to a sound checkpoint, and the words that the one error must hold.

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 4792272488\n"


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(POINTER)


def config_pointer(folder: Path) -> None:
    (folder / "config.json").write_bytes(POINTER)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def index_without_map(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def index_that_leaves_the_folder(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')


def empty_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def corrupt_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ')


def tensor_in_two_files(folder: Path) -> None:
    no_index = folder / "model.safetensors"
    shutil.copy(no_index, folder / "a.safetensors")
    no_index.rename(folder / "b.safetensors")


def missing_tensor(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(ROUTER))


def missing_tensors(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: [tensors.pop(ROUTER), tensors.pop(BLOCKS)])


def extra_tensor(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(extra=np.zeros((2, 3), np.float32)))


def wrong_shape(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({ROUTER: tensors[ROUTER][:, :32].copy()}))


def wrong_dtype(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({ROUTER: np.zeros((8, 64), np.int32)}))


def wrong_dtype_of_blocks(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({BLOCKS: np.zeros((8, 64, 3, 16), np.int8)}))


def more_layers_promised(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config.update(num_hidden_layers=5, layer_types=None))


def fewer_layers_promised(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config.update(num_hidden_layers=2, layer_types=None))


def another_model(folder: Path) -> None:
    tensors = {"transformer.h.0.attn.weight": np.zeros(2, np.float32)}
    save_file(tensors, folder / "model.safetensors")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def larger_vocabulary_promised(folder: Path) -> None:
    rewrite(folder / "config.json", lambda config: config.update(vocab_size=301))


FAULTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "a git-lfs pointer instead of weights": (pointer, ["model.safetensors", "git-lfs pointer", "git lfs pull"]),
    "a git-lfs pointer instead of config.json": (config_pointer, ["config.json", "git-lfs pointer"]),
    "an empty folder": (empty, ["no weights", "nothing", "ossia pull"]),
    "a folder without weights": (no_weights, ["no weights", "config.json, generation_config.json"]),
    "a LoRA adapter": (adapter, ["LoRA adapter"]),
    "no config.json": (no_config, ["no config.json"]),
    "a missing shard": (missing_shard, ["lacks 1 of its 2 shards", "model-00002-of-00002.safetensors"]),
    "an index without a map": (index_without_map, ["model.safetensors.index.json", "weight_map"]),
    "an index that leaves the folder": (index_that_leaves_the_folder, ["model.safetensors.index.json", "weight_map"]),
    "an empty index": (empty_index, ["model.safetensors.index.json", "weight_map"]),
    "a corrupt index": (corrupt_index, ["model.safetensors.index.json", "not valid JSON"]),
    "a tensor in two files": (tensor_in_two_files, ["a.safetensors", "b.safetensors"]),
    "a missing tensor": (missing_tensor, [ROUTER, "lacks", "BF16 or F16 or F32 [8, 64]"]),
    "two missing tensors": (missing_tensors, ["(1 more: `ossia checkpoint inspect`"]),
    "an extra tensor": (extra_tensor, ["extra", "F32 [2, 3]", "does not belong"]),
    "a wrong shape": (wrong_shape, ["model.safetensors", ROUTER, "BF16 [8, 32]", "[8, 64]"]),
    "a wrong dtype": (wrong_dtype, [ROUTER, "I32 [8, 64]", "BF16 or F16 or F32"]),
    "blocks of a wrong dtype": (wrong_dtype_of_blocks, [BLOCKS, "I8 [8, 64, 3, 16]", "U8 [8, 64, 3, 16]"]),
    "fewer layers than promised": (more_layers_promised, ["holds 3 layers", "says 5", "num_hidden_layers"]),
    "more layers than promised": (fewer_layers_promised, ["holds 3 layers", "says 2"]),
    "another model": (another_model, ["transformer.h.0.attn.weight", "gpt-oss"]),
    "a truncated file": (truncated, ["model.safetensors is cut off", "Download it again"]),
    "a vocabulary of another size": (larger_vocabulary_promised, ["embed_tokens", "[300, 64]", "[301, 64]"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_one_error_that_names_it(fault, copy):
    damage, words = FAULTS[fault]
    damage(copy)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(copy)
    message = caught.value.message
    assert all(word in message for word in words), message
    assert str(copy) in message and len(message.splitlines()) == 1


def test_a_path_where_nothing_is_gives_a_not_found_error_that_names_it(tmp_path):
    with pytest.raises(NotFoundError, match=r"no file or folder .*nothing.*gpt-oss-20b"):
        Checkpoint.open(tmp_path / "nothing")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"model.bin is not a checkpoint"):
        Checkpoint.open(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_may_not_be_read_is_named(name, copy, monkeypatch):
    may_open = builtins.open

    def refuse(file, *arguments, **options):
        if str(file).endswith(name):
            raise PermissionError(13, "Permission denied", str(file))
        return may_open(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: Permission denied"):
        Checkpoint.open(copy)


def test_how_to_sample_lies_beside_the_weights_or_beside_the_original_folder(checkpoints, copy, tmp_path):
    assert Checkpoint.open(copy).sampling() == {}
    rewrite(copy / "generation_config.json", lambda fields: fields.update(temperature=0.6))
    original = shutil.copytree(checkpoints / "original" / "original", copy / "original")
    assert Checkpoint.open(copy).sampling() == Checkpoint.open(original).sampling() == {"temperature": 0.6}
