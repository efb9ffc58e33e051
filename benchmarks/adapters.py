"""What an adapter costs: tokens/s of a model with and without, passes in turn, medians told.

    python benchmarks/adapters.py --model build/bench/shape-20b-4 [--threads 2] [--rounds 30] [--only decode]

Adapters have random numbers, rank 8 for attention and rank 4 for the experts. "own" gives each sequence of a batch an
adapter of its own. Passes are made up as those of `ossia bench` are: sequences of some depth, random tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np

from ossia.engine import EngineConfig, Runner
from ossia.engine.benchmark import made_up_batch
from ossia.model.adapted import HeldAdapter
from ossia.model.random_checkpoint import random_adapter
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops.cpu import CpuOps

DEPTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--only", default="", help="passes whose name holds this text")
    options = parser.parse_args()
    ops = CpuOps(options.threads)
    checkpoint = Checkpoint.open(options.model)
    config = checkpoint.config
    runner = Runner(
        ops, config, load_weights(checkpoint, ops), EngineConfig(max_batch_tokens=max(512, options.prefill))
    )

    def held(expert_rank: int, seed: int) -> HeldAdapter:
        adapter = random_adapter(config, rank=8, expert_rank=expert_rank, seed=seed)
        pairs = {key: pair for key, pair in adapter.pairs.items() if not key.endswith("router")}
        return runner.hold(replace(adapter, pairs=pairs))

    attention, both = [held(0, seed) for seed in range(8)], [held(4, seed) for seed in range(8)]
    cases: dict[str, dict[str, Any]] = {
        "decode x1": {"num_seqs": 1, "length": 1, "depth": DEPTH, "rounds": options.rounds},
        "decode x8": {"num_seqs": 8, "length": 1, "depth": DEPTH, "rounds": options.rounds},
        f"prefill {options.prefill}": {
            "num_seqs": 1, "length": options.prefill, "depth": 0, "rounds": max(3, options.rounds // 6)
        },
    }  # fmt: skip
    print(f"isa {ops.isa}, {ops.threads} threads, {config.num_layers} layers; an adapter of attention takes "
          f"{attention[0].size_bytes / 2**20:.1f} MiB, with experts {both[0].size_bytes / 2**20:.1f} MiB")  # fmt: skip
    for name, case in cases.items():
        if options.only not in name:
            continue
        kinds = {"none": (), "attention": attention[:1], "attention and experts": both[:1]}
        if case["num_seqs"] > 1:
            kinds |= {"attention, own": attention, "attention and experts, own": both}
        speeds = measure(runner, kinds, **case)
        for kind, speed in speeds.items():
            print(f"{name:14s} {kind:28s} {speed:9.1f} tokens/s {speed / speeds['none']:6.3f}", flush=True)


def measure(
    runner: Runner, kinds: dict[str, Any], num_seqs: int, length: int, depth: int, rounds: int
) -> dict[str, float]:
    """Tokens/s of each kind; a round is one pass of each over the same tokens."""
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    # A long prompt touches every expert: later passes find all pages of the checkpoint mapped.
    runner.run(made_up_batch(runner, [0], [rng.integers(0, runner.config.vocab_size, 512)], is_last=True))
    order = list(kinds.items())
    for number in range(rounds + 1):
        token_ids = list(rng.integers(0, runner.config.vocab_size, (num_seqs, length)))
        batch = made_up_batch(runner, [depth] * num_seqs, token_ids, is_last=True)
        order.append(order.pop(0))
        for kind, adapters in order:
            own = tuple(adapters[n % len(adapters)] for n in range(num_seqs)) if adapters else ()
            started_s = time.perf_counter()
            runner.run(replace(batch, adapters=own))
            # The first round takes memory that later ones have.
            if number:
                seconds[kind].append(time.perf_counter() - started_s)
    return {kind: num_seqs * length / statistics.median(own) for kind, own in seconds.items()}


if __name__ == "__main__":
    main()
