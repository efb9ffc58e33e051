"""Compile every kernel of the GPU backend for a card that is not there: python -m tests.ops.compile_kernels 9.0

Prints, for each compiled kernel, its name and its bytes of shared memory. Nothing is run: outputs stay unwritten.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton
from tests.ops import cases
from triton.backends.compiler import GPUTarget

from ossia.ops import Adapted, Batch, Routing, gpu
from ossia.ops.triton import sampling
from ossia.ops.triton.choice import choose
from ossia.ops.triton.fetch import fetch

CAPABILITY = tuple(int(number) for number in sys.argv[1].split("."))
T, E, A, D, F = 3, 8, 2, 320, 288


class NoCard:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_alone(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = run(kernel, *args, grid=grid, warmup=True, **options)
    print(kernel.fn.__name__, compiled.metadata.shared, flush=True)
    return compiled


run = triton.runtime.jit.JITFunction.run
triton.runtime.jit.JITFunction.run = compile_alone
triton.runtime.driver.set_active(NoCard())
gpu.find_device = lambda: torch.device("cpu")
ops = gpu.GpuOps(variant=choose(CAPABILITY))


def compile_experts(num_tokens: int, kind: str) -> None:
    _, _, arrays = cases.Moe("", T, E, A, D, F, kind).arrays()
    held = ops.experts(arrays)
    x_TD = torch.zeros(num_tokens, D)
    routing = Routing(torch.zeros(num_tokens, A, dtype=torch.int32), torch.zeros(num_tokens, A))
    ops.moe(x_TD, routing, held, 7.0)
    if kind == "mxfp4":
        [lora] = cases.Lora("", T, F, D, (8,), E=E).experts()
        ops.moe(x_TD, routing, Adapted(held, (ops.expert_loras(lora),), np.zeros(num_tokens, np.int32)), 7.0)


def compile_attention(window: int | None, new: int, cached: bool) -> None:
    case = cases.Attention("", ((0 if not cached else 70, new),), window, Q=64, K=8, H=64)
    batch: Batch = case.batch()
    cache = ops.kv_cache(case.num_blocks, case.S, case.K, case.H) if cached else None
    q, k, v = (torch.from_numpy(one) for one in case.qkv(new))
    ops.attention(q, k, v, ops.vector(case.sinks()), cache, batch, window)


def compile_qkv(dtype: torch.dtype) -> None:
    case = cases.Attention("", ((70, 1),) * T, Q=64, K=8, H=64)
    dtype = ops.dtype if dtype == torch.bfloat16 else dtype
    projections = [
        gpu.Linear(torch.zeros(heads * 64, 2880, dtype=dtype), torch.zeros(heads * 64)) for heads in (64, 8, 8)
    ]
    angles = torch.zeros(T, 32)
    cache = ops.kv_cache(case.num_blocks, case.S, case.K, case.H)
    x, norm, sinks = torch.zeros(T, 2880), torch.zeros(2880), torch.zeros(64)
    ops.normed_attention(x, norm, 1e-5, projections, (angles, angles), sinks, cache, case.batch(), None)


for num_tokens in (T, E * ops.variant.prefill.tokens):
    for kind in ("mxfp4", "halves", "bfloat16"):
        compile_experts(num_tokens, kind)
for window in (None, 128):
    for new, cached in ((1, True), (9, True), (9, False)):
        compile_attention(window, new, cached)
fetch(
    torch.zeros(E, F, D // 32, 16, dtype=torch.uint8),
    torch.zeros(4, F, D // 32, 16, dtype=torch.uint8),
    torch.zeros(4, dtype=torch.int64),
)
ops.rms_norm(torch.zeros(T, 2880), torch.zeros(2880), 1e-5)
ops.rope(torch.zeros(T, 64, 64), torch.zeros(T, 32), torch.zeros(T, 32))
ops.route(torch.zeros(T, 128), 4)
for kind in ("bfloat16", "float32"):
    compile_qkv(getattr(torch, kind))
sampling.choose(
    torch.zeros(T, 201_088), torch.zeros(T, 7, dtype=torch.float64), torch.zeros(1, 6284, dtype=torch.int32)
)
