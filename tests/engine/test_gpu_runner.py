"""The engine over the GPU's operations, whole passes and padded ones; without a card in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import tests.gpu  # noqa: F401
import torch
from tests.engine.conftest import TINY, tiny_weights

from ossia.engine import Engine, EngineConfig, Runner, SamplingParams
from ossia.engine.gpu_runner import (
    CardMemory,
    GpuRunner,
    kv_memory,
    load_gpu_runner,
    pack,
    pad,
    pass_tokens,
    room,
    rung_of,
    sequence_rungs,
    table_width,
    unpack,
    work_bytes,
)
from ossia.engine.placement import least_kv_bytes, model_bytes
from ossia.errors import UnavailableError
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, load
from ossia.ops.gpu import GpuOps
from ossia.ops.offload import HostExperts

GIB = 1 << 30
OPTIONS = EngineConfig(block_size=4, max_batch_tokens=32, max_num_seqs=6, kv_memory_bytes=1 << 20)
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def engine_of(name: str, options: EngineConfig = OPTIONS) -> Engine:
    ops = load(name, **({"dtype": "float32"} if name == "gpu" else {"dtype": np.float64}))
    kind = GpuRunner if name == "gpu" else Runner
    return Engine(kind(ops, TINY, tiny_weights(ops, TINY), options))


def test_greedy_tokens_are_those_of_the_reference(answer):
    # One is read in two steps, beside others that answer already.
    prompts = [[5], list(range(2, 36))]
    requests = [(prompt, GREEDY) for prompt in prompts]
    expected = answer(engine_of("reference"), requests)
    assert answer(engine_of("gpu"), requests) == expected
    assert len({tuple(tokens) for tokens in expected}) == 2


def test_a_padded_pass_gives_the_logits_of_the_pass_itself():
    batch = Batch(
        token_ids_T=np.array([3, 4, 5], np.int32),
        positions_T=np.array([0, 0, 0], np.int32),
        query_starts_N1=np.array([0, 1, 2, 3], np.int32),
        key_lengths_N=np.array([1, 1, 1], np.int32),
        full_table_NB=np.array([[4], [2], [9]], np.int32),
        window_table_NB=np.array([[1], [7], [0]], np.int32),
        logit_rows_R=np.array([0, 2], np.int32),
    )
    ops = load("gpu", dtype="float32")
    runner = GpuRunner(ops, TINY, tiny_weights(ops, TINY), OPTIONS)
    before = [cache.k_BKSH.clone() for cache in runner._caches]
    met = runner.to_host(runner.run(batch))
    expected = Runner(load("reference"), TINY, tiny_weights(load("reference"), TINY), OPTIONS).run(batch)
    assert met.shape == (2, TINY.vocab_size)
    np.testing.assert_allclose(met, expected, atol=1e-4 * np.abs(expected).max())
    # Rows that fill up leave nothing behind.
    for cache, old, window in zip(runner._caches, before, map(TINY.window, range(TINY.num_layers)), strict=True):
        used = batch.full_table_NB[:, 0] if window is None else batch.window_table_NB[:, 0]
        changed = (cache.k_BKSH != old).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == sorted(used.tolist())


def test_the_experts_of_each_token_are_kept(answer):
    options = EngineConfig(
        block_size=4, max_batch_tokens=32, max_num_seqs=6, kv_memory_bytes=1 << 20, record_routing=True
    )
    routes = []
    for name in ("gpu", "reference"):
        engine = engine_of(name, options)
        engine.add_request([2, 3, 4], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, routing=True))
        outputs = [output for _ in range(2) for output in engine.step()]
        routes.append(outputs[-1].routing)
    np.testing.assert_array_equal(*routes)


def test_padded_batches_travel_in_one_piece():
    batch = pad(
        Batch(
            *(
                np.array(one, np.int32)
                for one in ([7, 8], [3, 9], [0, 1, 2], [4, 10], [[1, -1, -1], [2, 3, 4]], [[5], [6]])
            ),
            logit_rows_R=np.array([1], np.int32),
        ),
        4,
    )
    assert batch.full_table_NB[:, :4].tolist() == [[1, -1, -1, -1], [2, 3, 4, -1], [-1] * 4, [-1] * 4]
    assert (
        batch.full_table_NB.shape == batch.window_table_NB.shape == (4, 32) and (batch.full_table_NB[:, 4:] < 0).all()
    )
    assert batch.key_lengths_N.tolist() == [4, 10, 0, 0]
    back = unpack(torch.from_numpy(pack(batch)), batch)
    for name in ("token_ids_T", "positions_T", "query_starts_N1", "key_lengths_N", "full_table_NB", "logit_rows_R"):
        np.testing.assert_array_equal(getattr(back, name), getattr(batch, name))


def test_the_ladder_ends_at_the_most_sequences():
    assert sequence_rungs(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert sequence_rungs(6) == (1, 2, 4, 6)
    assert sequence_rungs(1) == (1,)


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "expected"),
    [(1, 1, 1), (3, 3, 4), (9, 9, 16), (20, 20, 20), (21, 21, None), (4, 3, None), (2000, 1, None)],
)
def test_passes_of_single_tokens_are_filled_up_to_the_next_rung(num_tokens, num_sequences, expected):
    batch = Batch(*(np.zeros(num_tokens if i < 2 else num_sequences, np.int32) for i in range(7)))
    assert rung_of(batch, sequence_rungs(20)) == expected


def test_tables_have_few_widths_and_are_never_too_narrow():
    widths = [table_width(num_blocks) for num_blocks in range(1, 4097)]
    assert sorted(set(widths)) == [32, 128, 512, 2048, 8192]
    assert all(num_blocks <= width for num_blocks, width in enumerate(widths, start=1))


@pytest.mark.parametrize(("allowed", "most"), [(0, 80 * GIB), (70 * GIB, 70 * GIB)])
def test_keys_and_values_get_what_weights_and_work_leave(allowed, most):
    shape, options = SHAPES["120b"], EngineConfig()
    memory = CardMemory(free=18 * GIB, total=80 * GIB)
    left = kv_memory(memory, allowed, shape, options)
    assert 62 * GIB + left + work_bytes(shape, options) < most
    assert left > 4 * GIB


@pytest.mark.parametrize(("size", "name", "tokens"), [(16, "20b", 512), (48, "20b", 1024), (80, "120b", 2048)])
def test_passes_are_larger_on_larger_cards(size, name, tokens):
    options = EngineConfig()
    assert pass_tokens(size * GIB, SHAPES[name], options) == tokens
    assert pass_tokens(1000 * GIB, SHAPES[name], options) == 4096
    # What was asked for is the least.
    assert pass_tokens(size * GIB, SHAPES[name], EngineConfig(max_batch_tokens=3000)) == 3000


def test_a_card_of_16_gib_holds_20b_and_the_keys_of_thousands_of_tokens():
    shape, options = SHAPES["20b"], EngineConfig()
    weights = int(12.9 * GIB)
    left = kv_memory(CardMemory(16 * GIB - weights, 16 * GIB), 0, shape, options)
    per_token = 2 * shape.num_kv_heads * shape.head_dim * 2 * shape.num_layers // 2
    assert left > 10_000 * per_token


def test_a_card_that_the_weights_fill_is_refused_with_numbers():
    with pytest.raises(UnavailableError, match=r"62\.0 GiB are in use .* 16\.0 of 80\.0 GiB.*--gpu-memory"):
        kv_memory(CardMemory(18 * GIB, 80 * GIB), 16 * GIB, SHAPES["120b"], EngineConfig())


# Where there is a card, its own memory counts.
on_a_card_that_is_made_up = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card of another size")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    return Checkpoint.open(write_random_checkpoint(tmp_path_factory.mktemp("card") / "model", TINY))


def card_with(room_bytes: int) -> int:
    """The size of a card that has this much beside the work of a pass."""
    return room_bytes - room(CardMemory(0, 0), 1, TINY, OPTIONS)


def card_for_two_layers(ops: GpuOps, checkpoint: Checkpoint) -> int:
    """The size of a card that has this model's dense weights, buffers for two of three layers and the least keys."""
    dense, layer = model_bytes(checkpoint)
    layer_kv = ops.kv_block_bytes(OPTIONS.block_size, TINY.num_kv_heads, TINY.head_dim)
    return card_with(dense + 2 * layer + least_kv_bytes(TINY, OPTIONS, layer_kv))


@on_a_card_that_is_made_up
def test_experts_that_a_card_has_no_room_for_change_no_token(checkpoint, answer, caplog):
    ops = load("gpu", dtype="float32")
    runner = load_gpu_runner(ops, checkpoint, OPTIONS, card_for_two_layers(ops, checkpoint))
    assert all(isinstance(layer.experts, HostExperts) for layer in runner._weights.layers)
    assert "experts of 3 of 3 layers do not fit the GPU and stay in the host's memory" in caplog.text
    reference = load("reference", dtype=np.float64)
    alone = Runner(reference, TINY, load_weights(checkpoint, reference), OPTIONS)
    # One is read in two steps, beside another that answers already: passes of many tokens, and of few.
    requests = [(prompt, GREEDY) for prompt in ([5], list(range(2, 36)))]
    assert answer(Engine(runner), requests) == answer(Engine(alone), requests)


@on_a_card_that_is_made_up
def test_a_bound_that_leaves_room_for_all_keeps_all_on_the_card(checkpoint):
    dense, layer = model_bytes(checkpoint)
    bound = card_with(dense + TINY.num_layers * layer + OPTIONS.kv_memory_bytes)
    runner = load_gpu_runner(load("gpu", dtype="float32"), checkpoint, OPTIONS, bound)
    assert not any(isinstance(layer.experts, HostExperts) for layer in runner._weights.layers)
    assert runner.options.kv_memory_bytes == OPTIONS.kv_memory_bytes


@on_a_card_that_is_made_up
def test_a_bound_below_dense_weights_and_one_layer_is_told_with_its_parts(checkpoint):
    with pytest.raises(UnavailableError, match=r"even with its experts in the host's memory: dense weights take .*GiB"):
        load_gpu_runner(load("gpu", dtype="float32"), checkpoint, OPTIONS, card_with(model_bytes(checkpoint).dense))


@on_a_card_that_is_made_up
def test_a_host_without_the_memory_for_experts_is_told(checkpoint, monkeypatch):
    monkeypatch.setattr("ossia.engine.gpu_runner.available_bytes", lambda: (1000, 1 << 40))
    ops = load("gpu", dtype="float32")
    with pytest.raises(UnavailableError, match=r"experts of 3 of 3 layers do not fit the GPU and take .* are free"):
        load_gpu_runner(ops, checkpoint, OPTIONS, card_for_two_layers(ops, checkpoint))
