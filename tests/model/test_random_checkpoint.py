"""Random checkpoints: true to the published layout, repeatable, sane, and never half written."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from ossia.errors import InputError, UnavailableError
from ossia.harmony.tokenizer import Tokenizer
from ossia.model import random_checkpoint
from ossia.model.checkpoint_writer import plan_shards, tensor_bytes
from ossia.model.config import ModelConfig
from ossia.model.inspection import count_parameters, verify_checkpoint
from ossia.model.layouts import SAFETENSORS
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint
from ossia.model.weights import Checkpoint
from ossia.ops import Mxfp4
from ossia.ops.mxfp4 import dequantize

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny") / "out", "tiny")


def test_tiny_is_a_whole_repository_below_thirty_megabytes(tiny):
    assert {path.name for path in tiny.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    checkpoint = Checkpoint.open(tiny)
    assert checkpoint.size_bytes < 30e6
    assert checkpoint.config.vocab_size == 201_088
    assert checkpoint.config.stop_token_ids == (200_002, 199_999, 200_012)
    assert verify_checkpoint(tiny) == ()


def test_the_tokenizer_of_tiny_is_o200k_harmony_for_us_and_for_transformers(tiny):
    path = Checkpoint.open(tiny).tokenizer_path
    text = "Grüße, 世界! <|end|>"
    ids = Tokenizer.o200k_harmony().encode(text)
    assert Tokenizer.from_file(path).encode(text) == ids
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.encode(text, split_special_tokens=True) == ids


def test_activations_and_logits_of_tiny_are_of_order_one(tiny, logits_of):
    ids = np.random.default_rng(0).integers(0, 201_088, 100).tolist()
    logits = logits_of(tiny, ids)
    assert 0.8 < logits.std() < 1.25
    assert len(set(logits.argmax(axis=-1).tolist())) > 50


def test_the_residual_stream_stays_sane_through_as_many_layers_as_120b_has(tmp_path, logits_of):
    folder = write_random_checkpoint(tmp_path / "out", SMALL, num_layers=36)
    logits = logits_of(folder, list(range(100)))
    assert 0.8 < logits.std() < 1.25


@pytest.mark.parametrize("layout", SAFETENSORS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_others(layout, tmp_path):
    def data(name, seed):
        folder = write_random_checkpoint(tmp_path / name, SMALL, layout=layout, seed=seed)
        return Checkpoint.open(folder).files[0].read_bytes()

    assert data("a", 1) == data("b", 1)
    assert data("a2", 1) != data("c", 2)


def test_weights_have_the_deviation_that_keeps_outputs_of_order_one(tmp_path):
    config = replace(SMALL, hidden_size=256, intermediate_size=512)
    checkpoint = Checkpoint.open(write_random_checkpoint(tmp_path / "out", config))
    layer = checkpoint.layout.layer(checkpoint.array, config, 0)
    for matrix, inputs in [
        (layer.q.weight_OI, 256),
        (layer.o.weight_OI, 128),
        (dequantize(layer.experts.gate), 256),
        (dequantize(layer.experts.down), 512),
    ]:
        values = matrix.astype(np.float64)
        assert abs(values.std() * math.sqrt(inputs) - 1) < 0.02
        assert abs(values.mean()) < 0.02 * values.std()
    assert isinstance(layer.experts.gate, Mxfp4)
    assert len(np.unique(layer.experts.gate.scales)) == 2


@pytest.mark.parametrize(
    ("shape", "num_bytes", "num_shards"), [("20b", 13_761_264_768, 3), ("120b", 65_248_815_744, 15)]
)
def test_the_published_shapes_have_the_published_number_of_bytes_and_shards(shape, num_bytes, num_shards):
    # 20b: metadata.total_size of the published model.safetensors.index.json. 120b: the card's 60.8 GiB.
    tensors = random_checkpoint._tensors(SHAPES[shape], SAFETENSORS["hf"])
    assert sum(map(tensor_bytes, tensors.values())) == num_bytes
    assert len(plan_shards(tensors)) == num_shards


def test_a_large_checkpoint_is_spread_over_shards_and_read_back(tmp_path, monkeypatch, logits_of):
    whole = write_random_checkpoint(tmp_path / "whole", SMALL)
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 50_000)
    shards = write_random_checkpoint(tmp_path / "shards", SMALL)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == Checkpoint.open(whole).tensors.keys()
    assert len(Checkpoint.open(shards).files) == len(set(index["weight_map"].values())) > 2
    np.testing.assert_array_equal(logits_of(shards, [1, 2, 3]), logits_of(whole, [1, 2, 3]))
    original = write_random_checkpoint(tmp_path / "original", SMALL, layout="original")
    assert len(Checkpoint.open(original).files) == 1


@pytest.mark.parametrize("layout", SAFETENSORS)
def test_writing_needs_a_few_pieces_of_memory_and_not_the_model(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(random_checkpoint, "_CHUNK_BYTES", 1 << 16)
    # 60 MB in few tensors, so that one of them would show.
    config = replace(SMALL, num_layers=1, hidden_size=512, intermediate_size=512, num_experts=64)
    write_random_checkpoint(tmp_path / "warm", replace(config, num_experts=4), layout=layout)
    tracemalloc.start()
    write_random_checkpoint(tmp_path / "out", config, layout=layout)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12e6


def test_progress_counts_every_byte_to_the_end(tmp_path):
    calls: list[tuple[int, int]] = []
    folder = write_random_checkpoint(tmp_path / "out", SMALL, progress=lambda *call: calls.append(call))
    done = [done for done, _ in calls]
    assert done == sorted(done)
    checkpoint = Checkpoint.open(folder)
    assert calls[-1] == (done[-1], done[-1]) == (sum(t.size_bytes for t in checkpoint.tensors.values()),) * 2


def test_the_number_of_layers_can_be_chosen(tmp_path):
    folder = write_random_checkpoint(tmp_path / "out", SMALL, num_layers=5)
    assert Checkpoint.open(folder).config.num_layers == 5


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Checkpoint.open(write_random_checkpoint(tmp_path / "empty", SMALL))
    assert Checkpoint.open(write_random_checkpoint(tmp_path / "a" / "b" / "c", SMALL))


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        write_random_checkpoint(tmp_path, SMALL)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(InputError, match=r"mine\.txt is there already"):
        write_random_checkpoint(tmp_path / "mine.txt", SMALL)


def test_what_was_interrupted_leaves_nothing_behind(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(tmp_path / "out", SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_in_numbers_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * 2**30))
    with pytest.raises(UnavailableError, match=r"needs 12\.9 GiB.*has 3\.0 GiB free"):
        write_random_checkpoint(tmp_path / "out", "20b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "7b"}, "unknown shape '7b'; expected one of: tiny, 20b, 120b"),
        ({"shape": SMALL, "layout": "gguf"}, "unknown layout 'gguf'; expected one of: hf, hf-bf16, original"),
        ({"shape": SMALL, "num_layers": 0}, "num_layers is 0; expected 1 to 1000"),
        ({"shape": SMALL, "num_layers": 10**9}, "num_layers is 1000000000; expected 1 to 1000"),
        ({"shape": replace(SMALL, hidden_size=48)}, "multiples of 32, got 48 and 32"),
    ],
)
def test_what_cannot_be_written_is_refused_with_what_can(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        write_random_checkpoint(tmp_path / "out", **arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_counted_parameters_are_those_of_the_tensors(shape):
    tensors = SAFETENSORS["hf-bf16"].expected(SHAPES[shape]).values()
    assert count_parameters(SHAPES[shape]).total == sum(math.prod(expected.shape) for expected in tensors)


@pytest.mark.parametrize("layout", SAFETENSORS)
def test_a_checkpoint_says_that_its_weights_are_random(layout, tmp_path):
    folder = write_random_checkpoint(tmp_path / "out", SMALL, layout=layout)
    assert Checkpoint.open(folder).has_random_weights


def test_the_folder_that_one_is_in_is_no_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (".", "", "..", "sub/.."):
        with pytest.raises(InputError, match="names no new folder"):
            write_random_checkpoint(out, SMALL)
    assert not any(tmp_path.iterdir())
