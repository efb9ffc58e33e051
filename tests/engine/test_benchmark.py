from __future__ import annotations

import numpy as np
import pytest

from ossia.engine.benchmark import (
    CountingOps,
    dense_bytes,
    expert_bytes,
    key_value_bytes,
    macs_per_token,
    measure_decode,
    measure_prefill,
)
from ossia.errors import InputError
from ossia.model.config import ModelConfig
from ossia.ops import load


@pytest.fixture(scope="module")
def counting(ops):
    return CountingOps(ops)


@pytest.fixture(scope="module")
def runner(counting, tiny_runner):
    return tiny_runner(counting, block_size=4, max_batch_tokens=16, max_num_seqs=4, kv_memory_bytes=1 << 20)


def test_a_prompt_is_computed_in_chunks_and_timed(runner, counting):
    measured = measure_prefill(runner, counting, 40, repeats=1)
    assert measured.tokens_per_s == pytest.approx(40 / measured.seconds_per_pass)
    assert measured.macs_per_pass > 40 * macs_per_token(runner.config)


def test_sequences_go_on_at_any_depth_without_their_prompts(runner, counting):
    shallow = measure_decode(runner, counting, 1, 0, num_steps=2)
    deep = measure_decode(runner, counting, 1, 100, num_steps=2)
    together = measure_decode(runner, counting, 4, 0, num_steps=2)
    assert deep.bytes_per_pass > shallow.bytes_per_pass
    assert together.num_seqs == 4 and together.tokens_per_s == pytest.approx(4 / together.seconds_per_pass)


def test_the_experts_that_a_pass_reads_are_counted_once_each(runner, counting):
    counting.num_experts_read = 0
    measure_decode(runner, counting, 1, 0, num_steps=1)
    config = runner.config
    assert counting.num_experts_read == config.num_layers * config.num_active_experts
    measure_decode(runner, counting, 4, 0, num_steps=1)
    assert counting.num_experts_read <= config.num_layers * config.num_experts


def test_sequences_that_the_cache_cannot_hold_are_refused(runner, counting):
    with pytest.raises(InputError, match="--kv-memory"):
        measure_decode(runner, counting, 4, 100_000, num_steps=1)


def test_what_the_cache_cannot_hold_is_refused_before_anything_is_computed(runner, counting, monkeypatch):
    def run(batch):
        raise AssertionError("a pass was computed")

    monkeypatch.setattr(runner, "run", run)
    with pytest.raises(InputError, match=f"{10**15} sequences of 16 tokens need .* --kv-memory"):
        measure_decode(runner, counting, 10**15, 0)
    # The last step is the longest.
    num_tokens = runner.num_blocks.full * runner.options.block_size
    with pytest.raises(InputError, match=f"1 sequences of {num_tokens + 1} tokens need"):
        measure_decode(runner, counting, 1, num_tokens - 1, num_steps=2)
    for length in (100_000, 10**15):
        with pytest.raises(InputError, match=f"1 sequences of {length} tokens need .* --kv-memory"):
            measure_prefill(runner, counting, length)


def test_the_bytes_of_a_token_of_gpt_oss_20b_are_those_of_its_published_shape():
    config, cpu = ModelConfig(), load("cpu", threads=1)
    # 24 layers, 4 experts of 3 x 2880 x 2880 numbers in 17 / 32 bytes; 26.5 M attention numbers in 34 / 32 bytes.
    assert 24 * 4 * expert_bytes(config) == pytest.approx(24 * 4 * 3 * 2880 * 2880 * 17 / 32)
    attention = 2880 * (64 + 8 + 8) * 64 + 64 * 64 * 2880
    assert dense_bytes(config, cpu) == pytest.approx(24 * (attention * 34 / 32 + 32 * 2880 * 2))
    # Twelve layers see everything, twelve the last 128; keys and values of 8 heads of 64 in bfloat16.
    per_token = 2 * 8 * 64 * 2
    assert key_value_bytes(config, cpu, 4096) == 12 * per_token * (4097 + 128)
    assert macs_per_token(config) == 24 * (attention + 4 * 3 * 2880 * 2880 + 32 * 2880)


def test_a_share_is_the_ratio_to_the_limit(runner, counting):
    measured = measure_decode(runner, counting, 1, 0, num_steps=1)
    limit = measured.bytes_per_pass / measured.seconds_per_pass
    assert measured.share_of_bandwidth(2 * limit) == pytest.approx(0.5)
    assert measured.share_of_arithmetic(measured.macs_per_pass / measured.seconds_per_pass) == pytest.approx(1)
    assert np.isfinite(measured.tokens_per_s)
