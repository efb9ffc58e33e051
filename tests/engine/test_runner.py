"""How memory is divided between the two kinds of layers."""

from __future__ import annotations

import dataclasses

import pytest

from ossia.engine import EngineConfig
from ossia.engine.block_manager import blocks_in_window
from ossia.engine.runner import divide_memory
from ossia.errors import ConfigError
from ossia.model.config import ModelConfig

# gpt-oss-20b in bfloat16: a block of 32 tokens of one layer.
LAYER_BYTES = 2 * 32 * 8 * 64 * 2
MIB = 1 << 20


@pytest.mark.parametrize("kv_memory_bytes", [5 * MIB, 64 * MIB, 1 << 30, 40 << 30])
def test_both_pools_together_fill_the_memory_and_never_exceed_it(kv_memory_bytes):
    num_blocks = divide_memory(ModelConfig(), EngineConfig(kv_memory_bytes=kv_memory_bytes), LAYER_BYTES)
    used = 12 * LAYER_BYTES * sum(num_blocks)
    assert kv_memory_bytes - 12 * LAYER_BYTES < used <= kv_memory_bytes
    assert num_blocks.window >= blocks_in_window(128, 32) == 5


def test_a_gibibyte_holds_thirty_thousand_tokens_of_the_20b_model_and_all_windows():
    num_blocks = divide_memory(ModelConfig(), EngineConfig(), LAYER_BYTES)
    assert num_blocks.full * 32 > 30_000
    assert num_blocks.window >= 64 * 5


def test_memory_for_not_even_one_sequence_is_refused_with_the_least_that_is_needed():
    with pytest.raises(ConfigError, match=f"at least {6 * 12 * LAYER_BYTES}") as caught:
        divide_memory(ModelConfig(), EngineConfig(kv_memory_bytes=6 * 12 * LAYER_BYTES - 1), LAYER_BYTES)
    assert caught.value.param == "kv_memory_bytes"
    assert divide_memory(ModelConfig(), EngineConfig(kv_memory_bytes=6 * 12 * LAYER_BYTES), LAYER_BYTES) == (1, 5)


def test_a_model_with_one_kind_of_layer_gives_it_all_the_memory():
    full = dataclasses.replace(ModelConfig(), layer_types=("full_attention",) * 24)
    sliding = dataclasses.replace(ModelConfig(), layer_types=("sliding_attention",) * 24)
    options = EngineConfig(kv_memory_bytes=100 * 24 * LAYER_BYTES)
    assert divide_memory(full, options, LAYER_BYTES) == (100, 100)
    assert divide_memory(sliding, options, LAYER_BYTES).window == 100
    assert divide_memory(sliding, options, LAYER_BYTES).full * 32 >= 131_072


@pytest.mark.parametrize("name", ["kv_memory_bytes", "block_size", "max_batch_tokens", "max_num_seqs", "max_context"])
def test_a_setting_that_cannot_be_is_named(name):
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        EngineConfig(**{name: 0})
