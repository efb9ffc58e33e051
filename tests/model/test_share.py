"""Shares of a model: together they are the whole, and what their sublayers add is what the whole adds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ossia.errors import ConfigError
from ossia.model.adapted import adapt, hold_adapter
from ossia.model.config import ModelConfig
from ossia.model.layouts import SAFETENSORS
from ossia.model.random_checkpoint import SHAPES, random_adapter, write_random_checkpoint
from ossia.model.share import Share, part
from ossia.model.transformer import forward, hidden
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, load

# Three blocks of experts' intermediate numbers, and a vocabulary that two cannot share alike.
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=97,
    num_experts=4,
    num_active_experts=2,
    sliding_window=4,
    max_context=64,
    stop_token_ids=(1,),
)


def one_sequence(num_tokens: int, adapter: object = None) -> Batch:
    numbers = np.arange(num_tokens, dtype=np.int32)
    none = np.full((1, 0), -1, np.int32)
    ends = np.array([num_tokens], np.int32)
    adapters = () if adapter is None else (adapter,)
    return Batch(numbers + 2, numbers, np.array([0, num_tokens], np.int32), ends, none, none, numbers, adapters)


@pytest.mark.parametrize("layout", SAFETENSORS)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_what_shares_add_is_what_the_whole_adds(layout, adapted, tmp_path):
    checkpoint = Checkpoint.open(
        write_random_checkpoint(tmp_path / "model", CONFIG, layout=layout)
        / ("original" if layout == "original" else "")
    )
    ops = load("reference", dtype=np.float64)
    adapter = random_adapter(CONFIG, rank=2, expert_rank=2, outer=True) if adapted else None

    def weights_of(model, own):
        batch = one_sequence(9, None if own is None else hold_adapter(ops, own))
        return batch, adapt(load_weights(model, ops), batch)

    batch, whole = weights_of(checkpoint, adapter)
    expected = forward(ops, CONFIG, whole, batch)
    shares = [Share(checkpoint, rank, 2) for rank in range(2)]
    loaded = [weights_of(share, None if adapter is None else share.adapter(adapter)) for share in shares]

    def run(i, sublayer, _ops, _config, _layer, x_TD, *rest):
        # Each process's part of the sublayer, over the same x.
        return sum(
            sublayer(ops, share.config, own.layers[i], x_TD, *rest)
            for share, (_, own) in zip(shares, loaded, strict=True)
        )

    x_RD = hidden(ops, CONFIG, whole, batch, run=run)
    met = np.concatenate([ops.linear(x_RD, own.unembedding) for _, own in loaded], axis=1)
    np.testing.assert_allclose(met, expected, atol=1e-10 * np.abs(expected).max())


def test_shares_are_views_of_the_mapped_file_and_divide_it(tmp_path):
    checkpoint = Checkpoint.open(write_random_checkpoint(tmp_path / "model", CONFIG))
    shares = [Share(checkpoint, rank, 2) for rank in range(2)]
    assert [share.config.intermediate_size for share in shares] == [32, 64]
    assert {(share.config.num_heads, share.config.num_kv_heads) for share in shares} == {(4, 1)}
    whole, parts = checkpoint.layer(1), [share.layer(1) for share in shares]
    for name in ("gate", "up", "down"):
        blocks = [getattr(own.experts, name).blocks for own in parts]
        assert sum(one.nbytes for one in blocks) == getattr(whole.experts, name).blocks.nbytes
        assert all(np.shares_memory(one, getattr(whole.experts, name).blocks) for one in blocks)
    assert sum(share.outer().unembedding_VD.nbytes for share in shares) == checkpoint.outer().unembedding_VD.nbytes


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_published_models_are_shared_within_a_block_alike(size):
    class Shape:
        config = SHAPES["120b"]

    widths = [Share(Shape(), rank, size).config.intermediate_size for rank in range(size)]
    assert sum(widths) == 2880 and max(widths) - min(widths) in (0, 32)
    assert all(width % 32 == 0 for width in widths)


@pytest.mark.parametrize(
    ("changed", "size", "message"),
    [
        ({}, 3, "2 key/value heads cannot be shared among 3 processes alike; start 2"),
        ({"num_kv_heads": 1}, 2, "1 key/value heads .* start 1"),
        (
            {"intermediate_size": 32},
            2,
            r"experts of 32 numbers are 1 block\(s\), .* among 2 processes; start at most 1",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_with_numbers(changed, size, message):
    class Shape:
        config = replace(CONFIG, **changed)

    with pytest.raises(ConfigError, match=message):
        Share(Shape(), 0, size)


def test_parts_are_in_order_and_leave_nothing_out():
    parts = [part(10, rank, 4) for rank in range(4)]
    assert [i for one in parts for i in range(10)[one]] == list(range(10))
