"""The forward pass against transformers' GptOssForCausalLM, in float32, and against itself in pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ossia.model import transformer
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops.reference import ReferenceOps

SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "one layer": {"num_hidden_layers": 1},
    "groups of 8, as published": {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64},
    "one head per key": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "one expert per token": {"num_experts_per_tok": 1},
    "all experts": {"num_local_experts": 4},
    "narrow inside": {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 2},
    "window of one": {"sliding_window": 1},
    "layers in another order": {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "plain rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "truncated yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
        }
    },
}


class RecordingOps(ReferenceOps):
    """Remembers which experts were used."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def moe(self, x_TD: Any, routing: Any, experts: Any, limit: float) -> Any:
        self.used |= set(routing.experts_TA.ravel().tolist())
        return super().moe(x_TD, routing, experts, limit)


def tokens(num: int, vocab_size: int = 300, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, num).tolist()


@pytest.fixture
def saved(tmp_path, hugging_face_model):
    """(transformers' model, path) of a small random model."""

    def make(seed: int = 0, **options: Any):
        model = hugging_face_model(seed, **options)
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return make


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape, seed, saved, hugging_face_logits, logits_of, assert_same_logits):
    model, path = saved(seed, **SHAPES[shape])
    ids = tokens(50, seed=seed)
    assert_same_logits(logits_of(path, ids), hugging_face_logits(model, ids))


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 17, 100])
def test_logits_are_those_of_transformers_on_both_sides_of_the_window(
    num_tokens, saved, hugging_face_logits, logits_of, assert_same_logits
):
    model, path = saved()
    ids = tokens(num_tokens)
    assert_same_logits(logits_of(path, ids), hugging_face_logits(model, ids))


@pytest.mark.parametrize("first_position", [4080, 40_000, 131_000])
def test_logits_are_those_of_transformers_beyond_the_context_before_yarn(
    first_position, saved, hugging_face_logits, logits_of, assert_same_logits
):
    model, path = saved(head_dim=64)
    ids = tokens(40)
    want = hugging_face_logits(model, ids, first_position)
    assert_same_logits(logits_of(path, ids, first_position), want)


def test_logits_are_those_of_transformers_on_a_sequence_longer_than_the_context_before_yarn(
    saved, hugging_face_logits, logits_of, assert_same_logits
):
    model, path = saved(
        num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1, layer_types=["full_attention"]
    )
    ids = tokens(4200)
    assert_same_logits(logits_of(path, ids), hugging_face_logits(model, ids))


def test_logits_are_those_of_transformers_when_the_clamp_bites(
    saved, hugging_face_logits, logits_of, assert_same_logits
):
    model, path = saved(deviation=3.0)
    ids = tokens(50)
    # In float64: weights three times as wide widen what float32 rounds.
    got = logits_of(path, ids, ops=ReferenceOps(np.float64))
    # The grouped products that transformers prefers are not made for it.
    model.set_experts_implementation("eager")
    assert_same_logits(got, hugging_face_logits(model.double(), ids))

    without = logits_of(path, ids, swiglu_limit=1e9)
    assert np.abs(without - got).max() > 0.1 * np.abs(got).max()


@pytest.mark.parametrize("unused", [None, 3])
def test_logits_are_those_of_transformers_whether_every_expert_is_used_or_one_never(
    unused, saved, hugging_face_logits, logits_of, assert_same_logits
):
    model, path = saved()
    if unused is not None:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.router.bias[unused] = -1e4
        model.save_pretrained(path)
    ids = tokens(64)
    ops = RecordingOps()
    assert_same_logits(logits_of(path, ids, ops=ops), hugging_face_logits(model, ids))
    assert ops.used == set(range(8)) - {unused}


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    "chunks",
    [[1] * 40, [40], [17, 1, 1, 1, 20], [8, 8, 8, 8, 8], [39, 1]],
    ids=["decode", "one", "mixed", "8s", "last"],
)
def test_chunked_prefill_and_paged_decode_equal_one_full_pass(
    chunks, block_size, saved, logits_of, paged_logits, assert_same_logits
):
    _, path = saved()
    ids = tokens(40)
    checkpoint, ops = Checkpoint.open(path), ReferenceOps()
    got = paged_logits(ops, checkpoint.config, load_weights(checkpoint, ops), ids, chunks, block_size)
    assert_same_logits(got, logits_of(path, ids), tolerance=1e-5)


def test_greedy_decode_gives_the_tokens_of_transformers(saved, paged_logits):
    model, path = saved()
    prompt = tokens(12)
    with torch.no_grad():
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None
        )
    want = generated[0].tolist()
    checkpoint, ops = Checkpoint.open(path), ReferenceOps()
    weights = load_weights(checkpoint, ops)
    logits = paged_logits(ops, checkpoint.config, weights, want[:-1], [12] + [1] * 19, 4)
    assert logits[11:].argmax(axis=-1).tolist() == want[12:]


def test_sequences_of_one_batch_do_not_see_each_other(saved, logits_of, one_sequence, assert_same_logits):
    _, path = saved()
    first, second = tokens(20, seed=1), tokens(9, seed=2)
    checkpoint, ops = Checkpoint.open(path), ReferenceOps()
    both = replace(
        one_sequence(first + second),
        positions_T=np.concatenate([np.arange(20), np.arange(9)]).astype(np.int32),
        query_starts_N1=np.array([0, 20, 29], np.int32),
        key_lengths_N=np.array([20, 9], np.int32),
    )
    got = transformer.forward(ops, checkpoint.config, load_weights(checkpoint, ops), both)
    want = np.concatenate([logits_of(path, first), logits_of(path, second)])
    assert_same_logits(got, want, tolerance=1e-5)


def test_float64_and_float32_agree(saved, logits_of, assert_same_logits):
    _, path = saved()
    ids = tokens(30)
    want = logits_of(path, ids, ops=ReferenceOps(np.float64))
    assert want.dtype == np.float64
    assert_same_logits(logits_of(path, ids), want, tolerance=1e-5)
