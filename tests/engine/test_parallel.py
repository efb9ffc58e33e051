"""Two processes over gloo that share a model: the first one's logits and tokens are those of one process.

The first is the process of the tests. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tests.gpu  # noqa: F401
import torch
from tests.train.processes import environment

from ossia.engine import Engine, EngineConfig, Runner, SamplingParams
from ossia.engine.benchmark import made_up_batch
from ossia.engine.parallel import TeamRunner, load_team_runner
from ossia.errors import UnavailableError
from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import random_adapter, write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import load

# Of experts' three blocks one process has one and the other two; of the vocabulary one has a row more.
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=97,
    num_experts=4,
    num_active_experts=2,
    sliding_window=8,
    max_context=128,
    stop_token_ids=(1,),
)
OPTIONS = EngineConfig(block_size=4, max_batch_tokens=16, max_num_seqs=4, kv_memory_bytes=1 << 20)
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: two processes need two, or none")
WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("parallel") / "model", CONFIG)


@contextmanager
def team(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: EngineConfig = OPTIONS
) -> Iterator[tuple[TeamRunner, subprocess.Popen[str]]]:
    """The first process's runner, and the second process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    command = [sys.executable, str(WORKER), str(model), json.dumps(asdict(options))]
    other = subprocess.Popen(command, env=environment() | shared | ranks[1], stderr=subprocess.PIPE, text=True)
    for name, value in (shared | ranks[0] | {"GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, value)
    runner = load_team_runner(load("gpu", dtype="float32"), Checkpoint.open(model), options, 0, 2)
    try:
        yield runner, other
    finally:
        runner.close()
        other.wait()


def reference(model: Path, options: EngineConfig = OPTIONS) -> Runner:
    ops, checkpoint = load("reference", dtype=np.float64), Checkpoint.open(model)
    return Runner(ops, checkpoint.config, load_weights(checkpoint, ops), options)


def test_two_processes_give_the_logits_and_the_tokens_of_one(model, monkeypatch, answer):
    whole = reference(model)
    with team(model, monkeypatch) as (runner, other):
        # A prompt of two sequences, then a token of each behind what is cached.
        for starts, lengths in (([0, 0], [11, 5]), ([11, 5], [1, 1])):
            batch = made_up_batch(runner, starts, [np.arange(2, 2 + length) for length in lengths], is_last=True)
            expected = whole.run(batch)
            met = runner.to_host(runner.run(batch))
            np.testing.assert_allclose(met, expected, atol=1e-4 * np.abs(expected).max())
        # The first is read in chunks, beside the second, which goes on meanwhile; the last finds its beginning cached.
        prompts = [list(range(2, 24)), [5], list(range(2, 20))]
        engine, alone = Engine(runner), Engine(whole)
        for requests in (prompts[:2], prompts[2:]):
            requests = [(prompt, GREEDY) for prompt in requests]
            assert answer(engine, requests) == answer(alone, requests)
        engine.close()
        assert other.wait() == 0, other.stderr.read()


@pytest.mark.slow
def test_experts_of_tokens_and_adapters_are_those_of_one_process(model, monkeypatch, finish):
    options = replace(OPTIONS, record_routing=True)
    adapters = [
        random_adapter(CONFIG, rank=2, expert_rank=2, outer=True, name=name, seed=seed)
        for seed, name in enumerate(("a", "b"), start=1)
    ]

    def outputs(runner: Runner) -> list[object]:
        engine = Engine(runner)
        told: list[object] = []
        for round_ in range(2):
            engine.load_adapter(adapters[round_])
            for name in (None, *engine.adapters):
                params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, routing=True, adapter=name)
                engine.add_request(list(range(2, 14)), params)
            for tokens in finish(engine).values():
                told.append([one.token_id for one in tokens])
                told.append(tokens[-1].routing.tolist())
            if round_ == 0:
                engine.unload_adapter("a")
        return told

    expected = outputs(reference(model, options))
    with team(model, monkeypatch, options) as (runner, other):
        assert outputs(runner) == expected
        runner.close()
        assert other.wait() == 0, other.stderr.read()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_is_named(model, monkeypatch):
    batch = made_up_batch(reference(model), [0], [np.arange(2, 8)], is_last=True)
    with team(model, monkeypatch) as (runner, other):
        runner.run(batch)
        other.kill()
        other.wait()
        for _ in range(2):
            with pytest.raises(UnavailableError, match=r"process 2 of 2 has ended\. .* start the command again"):
                runner.run(batch)


@pytest.mark.slow
def test_what_fails_in_another_process_is_told_by_the_first(model, monkeypatch):
    batch = made_up_batch(reference(model), [0], [np.arange(2, 8)], is_last=True)
    with team(model, monkeypatch) as (runner, other):
        # A token that there is no row for: in the second process alone.
        told = runner._team.tell
        wrong = batch.token_ids_T.copy()
        wrong[0] = 1_000_000

        def tell(message):
            return told(message and message._replace(batch=replace(message.batch, token_ids_T=wrong)))

        monkeypatch.setattr(type(runner._team), "tell", lambda _, message: tell(message))
        with pytest.raises(UnavailableError, match=r"process 2 of 2 has ended: IndexError"):
            runner.run(batch)
        assert other.wait() == 1 and "process 2 of 2: IndexError" in other.stderr.read()


@pytest.mark.slow
def test_a_first_process_that_dies_ends_the_others(model, monkeypatch):
    with team(model, monkeypatch) as (runner, other):
        runner._team.leave()
        assert other.wait() == 1
        assert "process 2 of 2: process 1 of 2 has ended, and so does this one" in other.stderr.read()
