"""What a card alone can show: passes are recorded, the host waits for tokens alone, recorded passes share memory.

Skipped where there is no card; none of this has been run on one yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tests.gpu  # noqa: F401
import torch
from tests.engine.conftest import TINY, tiny_weights
from tests.ops.test_sampling import draw

from ossia.engine import EngineConfig
from ossia.engine.benchmark import made_up_batch
from ossia.engine.gpu_runner import GpuRunner
from ossia.model.random_checkpoint import random_adapter
from ossia.ops import Batch, load

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no NVIDIA GPU: recorded passes, and what waits for a card, are not tested"
)
OPTIONS = EngineConfig(block_size=4, max_batch_tokens=32, max_num_seqs=6, kv_memory_bytes=1 << 20)


@pytest.fixture
def runner() -> GpuRunner:
    ops = load("gpu")
    return GpuRunner(ops, TINY, tiny_weights(ops, TINY), OPTIONS)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def tokens_behind(runner: GpuRunner, *lengths: int) -> Batch:
    """One token for each sequence, behind what it is said to hold."""
    return made_up_batch(runner, lengths, [np.array([n + 2]) for n in range(len(lengths))], is_last=True)


@pytest.mark.parametrize("lengths", [(0,), (9, 3, 0), (0, 1, 2, 3, 4, 5), (130, 2)])
def test_a_recorded_pass_gives_what_its_kernels_launched_one_by_one_give(runner, lengths):
    batch = tokens_behind(runner, *lengths)
    expected = runner._launch(runner._ops, runner._weights, batch).clone()
    for _ in range(3):
        torch.testing.assert_close(runner.run(batch), expected, rtol=1e-2, atol=1e-2)
    assert len(runner._recorded) == 1


def test_recorded_passes_write_to_the_same_logits(runner):
    for lengths in ((0,), (1, 2), (3,) * 6, (140,)):
        runner.run(tokens_behind(runner, *lengths))
    assert len(runner._recorded) == 4
    assert {one.logits_RV.data_ptr() for one in runner._recorded.values()} == {runner._logits_RV.data_ptr()}


def test_the_host_waits_for_no_pass(runner, no_waiting):
    prompts = made_up_batch(runner, [0, 0], [np.arange(2, 22), np.arange(2, 7)], is_last=True)
    held = runner.hold(random_adapter(TINY, rank=2, expert_rank=2, outer=True, seed=1))
    single = tokens_behind(runner, 3, 5)
    passes = [prompts, single, *(replace(one, adapters=(held, None)) for one in (prompts, single))]
    # Kernels are compiled, and passes recorded, at first.
    for batch in passes:
        runner.run(batch)
    torch.cuda.set_sync_debug_mode("error")
    for batch in passes:
        runner.run(batch)


def test_tokens_are_waited_for_once(runner, no_waiting):
    logits = runner.run(tokens_behind(runner, 3, 5, 7))
    draws = [draw(0, top_p=0.9), draw(1, logprobs=True, top_logprobs=2), draw(2, temperature=0, logit_bias={3: 1.0})]
    runner.sample(logits, draws)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        runner.sample(logits, draws)
    assert sum("synchronizing" in str(one.message) for one in told) == 1
