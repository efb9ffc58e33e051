"""What the tests of the model share: random models of transformers, batches, a paged run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from ossia.model import transformer
from ossia.model.config import ModelConfig
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, Ops
from ossia.ops.reference import ReferenceOps

torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)

Logits = npt.NDArray[np.float32]
SMALL: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "vocab_size": 300,
    "sliding_window": 8,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def int32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def one_sequence(token_ids: Sequence[int], first_position: int = 0) -> Batch:
    """A whole sequence without a cache, logits of every token."""
    num_tokens = len(token_ids)
    no_table = np.zeros((1, 0), np.int32)
    return Batch(
        token_ids_T=np.asarray(token_ids, np.int32),
        positions_T=np.arange(first_position, first_position + num_tokens, dtype=np.int32),
        query_starts_N1=int32(0, num_tokens),
        key_lengths_N=int32(num_tokens),
        full_table_NB=no_table,
        window_table_NB=no_table,
        logit_rows_R=np.arange(num_tokens, dtype=np.int32),
    )


@pytest.fixture(name="one_sequence")
def one_sequence_fixture() -> Callable[..., Batch]:
    return one_sequence


@pytest.fixture
def hugging_face_model() -> Callable[..., GptOssForCausalLM]:
    """make(seed, deviation=0.3, **fields of GptOssConfig): a float32 model with normally distributed weights."""

    def make(seed: int, deviation: float = 0.3, **fields: Any) -> GptOssForCausalLM:
        model = GptOssForCausalLM(GptOssConfig(**SMALL | fields, attn_implementation="eager")).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
        return model

    return make


@pytest.fixture
def hugging_face_logits() -> Callable[..., Logits]:
    def run(model: GptOssForCausalLM, token_ids: Sequence[int], first_position: int = 0) -> Logits:
        positions = torch.arange(first_position, first_position + len(token_ids))[None]
        with torch.no_grad():
            return model(torch.tensor([list(token_ids)]), position_ids=positions).logits[0].numpy()

    return run


@pytest.fixture
def logits_of() -> Callable[..., Logits]:
    """run(path, token_ids, first_position=0, ops=ReferenceOps(), **fields of ModelConfig): logits, from files."""

    def run(
        path: Any, token_ids: Sequence[int], first_position: int = 0, ops: Ops | None = None, **changes: Any
    ) -> Logits:
        checkpoint, ops = Checkpoint.open(path), ops or ReferenceOps()
        config, weights = replace(checkpoint.config, **changes), load_weights(checkpoint, ops)
        return transformer.forward(ops, config, weights, one_sequence(token_ids, first_position))

    return run


@pytest.fixture
def paged_logits() -> Callable[..., Logits]:
    """run(ops, config, weights, token_ids, chunks, block_size): the logits of every token, a chunk at a time."""

    def run(
        ops: ReferenceOps,
        config: ModelConfig,
        weights: transformer.Weights,
        token_ids: Sequence[int],
        chunks: Sequence[int],
        block_size: int,
    ) -> Logits:
        num_blocks = -(-len(token_ids) // block_size)
        # Blocks out of order, and another order in the window's pool, so that a mixed-up table shows.
        full_table, window_table = np.arange(num_blocks)[::-1], np.roll(np.arange(num_blocks), 1)
        caches = transformer.new_caches(ops, config, num_blocks, num_blocks, block_size)
        rows, start = [], 0
        for size in chunks:
            end = start + size
            first_seen = max(0, start - config.sliding_window + 1) // block_size
            used = -(-end // block_size)
            trimmed = np.full(num_blocks, -1, np.int32)
            trimmed[first_seen:used] = window_table[first_seen:used]
            batch = Batch(
                token_ids_T=np.asarray(token_ids[start:end], np.int32),
                positions_T=np.arange(start, end, dtype=np.int32),
                query_starts_N1=int32(0, size),
                key_lengths_N=int32(end),
                full_table_NB=np.where(np.arange(num_blocks) < used, full_table, -1).astype(np.int32)[None],
                window_table_NB=trimmed[None],
                logit_rows_R=np.arange(size, dtype=np.int32),
            )
            rows.append(transformer.forward(ops, config, weights, batch, caches))
            start = end
        assert start == len(token_ids)
        return np.concatenate(rows)

    return run


@pytest.fixture
def assert_same_logits() -> Callable[..., None]:
    """The issue's measure: the largest difference against the scale of the logits."""

    def check(got: Logits, want: Logits, tolerance: float = 1e-4) -> None:
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()

    return check


@pytest.fixture
def base(hugging_face_model, tmp_path):
    """(a function that makes the model afresh, its folder, its shape)"""

    def make():
        return hugging_face_model(0)

    make().save_pretrained(tmp_path / "base")
    return make, tmp_path / "base", Checkpoint.open(tmp_path / "base").config
