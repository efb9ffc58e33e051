"""Each CPU kernel at the shape of a gpt-oss-20b layer, as a percent of what this machine does at most.

    python benchmarks/kernels.py [--threads 2] [--isa avx2] [--rounds 7]

Products that read weights for a few tokens are told in GB/s and percent of the read bandwidth; products for many tokens
in GMAC/s and percent of the integer peak. Weights are random. The limits are measured in the same run, in turn with the
kernels; medians are told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ossia.ops import Batch, ExpertArrays, Mxfp4, Routing
from ossia.ops.cpu import CpuOps

D = F = 2880
E, A = 32, 4
Q, K, H = 64, 8, 64
S = 32
EXPERT_BYTES = 3 * D * F * 17 // 32
UNEMBEDDING_ROWS = 50_272  # a quarter of the vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    options = parser.parse_args()
    ops = CpuOps(options.threads, isa=options.isa)
    kernels = [kernel for kernel in all_kernels(ops) if options.only in kernel[0]]
    times: dict[str, list[float]] = {name: [] for name, *_ in kernels}
    bandwidths, peaks = [], []
    for _ in range(options.rounds):
        bandwidths.append(ops.read_bandwidth(512 << 20, 2))
        peaks.append(ops.integer_peak(10_000_000))
        for name, run, _, _ in kernels:
            run()  # other kernels have taken the caches, as the rest of a layer would
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    bandwidth, peak = statistics.median(bandwidths), statistics.median(peaks)
    print(f"isa {ops.isa}, {ops.threads} threads: read {bandwidth:.1f} GB/s, integer peak {peak:.0f} GMAC/s")
    for name, _, unit, amount in kernels:
        seconds = statistics.median(times[name])
        limit = bandwidth if unit == "GB/s" else peak
        rate = amount / seconds / 1e9
        print(f"{name:45s} {seconds * 1e3:9.3f} ms {rate:8.1f} {unit:6s} {100 * rate / limit:5.0f} %")


Kernel = tuple[str, Callable[[], Any], str, float]


def all_kernels(ops: CpuOps) -> Iterator[Kernel]:
    rng = np.random.default_rng(0)
    experts = ops.experts(random_experts(rng))
    for num_tokens in (1, 2, 4, 8, 16, 64, 512):
        yield moe_kernel(ops, rng, experts, num_tokens)
    for name, rows, cols in (("q", Q * H, D), ("k", K * H, D), ("o", D, Q * H), ("unembedding", UNEMBEDDING_ROWS, D)):
        weights = ops.linear_weights(rng.standard_normal((rows, cols), np.float32))
        for num_tokens in (1, 8, 512):
            if name != "unembedding" or num_tokens < 512:
                yield linear_kernel(ops, rng, name, weights, num_tokens)
    for num_sequences, old, new in ((1, 4096, 1), (1, 16384, 1), (8, 4096, 1), (1, 0, 512), (1, 3584, 512)):
        for window in (None, 128):
            yield attention_kernel(ops, rng, num_sequences, old, new, window)


def random_experts(rng: np.random.Generator) -> ExpertArrays:
    def matrices(rows: int, cols: int) -> Mxfp4:
        blocks = np.frombuffer(rng.bytes(E * rows * cols // 2), np.uint8).reshape(E, rows, cols // 32, 16)
        return Mxfp4(blocks, rng.integers(118, 124, (E, rows, cols // 32), dtype=np.uint8))

    both, down = matrices(2 * F, D), matrices(D, F)
    gate, up = (Mxfp4(both.blocks[:, i::2], both.scales[:, i::2]) for i in (0, 1))
    return ExpertArrays(gate, up, down, *(np.zeros((E, n), np.float32) for n in (F, F, D)))


def moe_kernel(ops: CpuOps, rng: np.random.Generator, experts: Any, num_tokens: int) -> Kernel:
    x_TD = rng.standard_normal((num_tokens, D), np.float32)
    # Other experts every time, as other layers would have, so that none are found in a cache.
    routings = [
        Routing(
            np.stack([rng.permutation(E)[:A] for _ in range(num_tokens)]).astype(np.int32),
            np.full((num_tokens, A), 0.25, np.float32),
        )
        for _ in range(1 if num_tokens > 4 else 8)
    ]
    used = statistics.mean(len(np.unique(routing.experts_TA)) for routing in routings)
    turn = iter(range(1 << 30))

    def run() -> Any:
        return ops.moe(x_TD, routings[next(turn) % len(routings)], experts, 7.0)

    if num_tokens <= 16:
        return f"moe, {num_tokens} tokens, {used:.0f} experts", run, "GB/s", used * EXPERT_BYTES
    return f"moe, {num_tokens} tokens", run, "GMAC/s", num_tokens * A * 3 * D * F


def linear_kernel(ops: CpuOps, rng: np.random.Generator, name: str, weights: Any, num_tokens: int) -> Kernel:
    matrix = weights.weight.matrix
    x_TI = rng.standard_normal((num_tokens, matrix.cols), np.float32)
    size = matrix.rows * matrix.cols

    def run() -> Any:
        return ops.linear(x_TI, weights)

    if num_tokens <= 16:
        return f"linear {name}, {num_tokens} tokens", run, "GB/s", size * 34 / 32
    return f"linear {name}, {num_tokens} tokens", run, "GMAC/s", num_tokens * size


def attention_kernel(
    ops: CpuOps, rng: np.random.Generator, num_sequences: int, old: int, new: int, window: int | None
) -> Kernel:
    num_tokens, blocks = num_sequences * new, -(-(old + new) // S)
    table = rng.permutation(num_sequences * blocks).astype(np.int32).reshape(num_sequences, blocks)
    batch = Batch(
        token_ids_T=np.zeros(num_tokens, np.int32),
        positions_T=np.tile(np.arange(old, old + new, dtype=np.int32), num_sequences),
        query_starts_N1=np.arange(0, num_tokens + 1, new, dtype=np.int32),
        key_lengths_N=np.full(num_sequences, old + new, np.int32),
        full_table_NB=table,
        window_table_NB=table,
        logit_rows_R=np.zeros(1, np.int32),
    )
    cache = ops.kv_cache(num_sequences * blocks, S, K, H)
    cache.keys_BKSH[...] = rng.integers(0x3C00, 0x3F80, cache.keys_BKSH.shape)
    cache.values_BKSH[...] = cache.keys_BKSH
    q = rng.standard_normal((num_tokens, Q, H), np.float32)
    k = rng.standard_normal((num_tokens, K, H), np.float32)
    sinks = np.zeros(Q, np.float32)

    def run() -> Any:
        return ops.attention(q, k, k, sinks, cache, batch, window)

    seen = [min(position + 1, window or position + 1) for position in range(old, old + new)]
    name = f"attention, {num_sequences} x {new} at {old}, window {window}"
    if new == 1:
        return name, run, "GB/s", num_sequences * seen[0] * K * H * 2 * 2
    return name, run, "GMAC/s", num_sequences * sum(seen) * Q * H * 2


if __name__ == "__main__":
    main()
