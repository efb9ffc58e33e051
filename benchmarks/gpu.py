"""A GPU: decoding, batches and prompts, as tokens/s and as a share of what the card was measured to do; and a peer.

    ossia checkpoint new FOLDER --shape 20b
    python benchmarks/gpu.py --model FOLDER [--peer] [--batch 1,8,64,256] [--depth 1024] [--prefill 512,4096]

The limits are measured first, in the same run: a copy within the card's memory, whose bytes are read and written, and a
product of square matrices in the card's 16-bit type. A token's bytes are its active experts in MXFP4, dense matrices in
16 bits, and the keys and values that it sees; how many experts a batch reads is counted by a pass of its own, over
random tokens. ``--peer`` adds transformers in a process of its own before: the same file, its experts as bfloat16.

With TRITON_INTERPRET=1 the script can be tried without a card, on a tiny model; its numbers then mean nothing.
It has not been run on a card yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ossia.engine import EngineConfig, Runner
from ossia.engine.benchmark import (
    CountingOps,
    Measurement,
    expert_bytes,
    made_up_batch,
    measure_decode,
    measure_prefill,
)
from ossia.engine.gpu_runner import GpuRunner, load_onto_card
from ossia.model.weights import Checkpoint
from ossia.ops.gpu import GpuOps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=numbers, default=numbers("1,2,4,8,16,32,64,128,256"), help="sequences together")
    parser.add_argument("--depth", type=int, default=1024, help="tokens that each sequence holds already")
    parser.add_argument("--prefill", type=numbers, default=numbers("512,4096"), help="lengths of prompts")
    parser.add_argument("--steps", type=int, default=32, help="passes whose median is told")
    parser.add_argument("--peer", action="store_true", help="transformers too")
    parser.add_argument("--kv-memory", type=int, default=1 << 30, help="bytes, without a card")
    parser.add_argument("--copy", type=int, default=1 << 30, help="bytes that are copied for the limit of memory")
    parser.add_argument(
        "--side", type=int, default=8192, help="of the matrices that are multiplied for the other limit"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_peer:
        print(json.dumps(run_transformers(arguments)))
        return
    peer = json.loads(in_process(arguments)) if arguments.peer else {}
    result = run_ossia(arguments)
    for name, row in result["passes"].items():
        row |= {"transformers_tokens_per_s": peer[name]} if name in peer else {}
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def in_process(arguments: argparse.Namespace) -> str:
    command = [
        sys.executable,
        __file__,
        "--only-peer",
        "--model",
        str(arguments.model),
        "--depth",
        str(arguments.depth),
    ]
    command += ["--batch", ",".join(map(str, arguments.batch)), "--prefill", ",".join(map(str, arguments.prefill))]
    command += ["--steps", str(arguments.steps)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


# Ossia ----------------------------------------------------------------------------------------------------------------


def run_ossia(arguments: argparse.Namespace) -> dict[str, Any]:
    ops = GpuOps()
    limits = {
        "copy_bytes_per_s": 2 * arguments.copy / seconds(copying(ops, arguments.copy), 10),
        "macs_per_s": arguments.side**3 / seconds(multiplying(ops, arguments.side), 10),
    }
    options = EngineConfig(max_num_seqs=max(arguments.batch), kv_memory_bytes=arguments.kv_memory)
    started_s = time.perf_counter()
    placed = load_onto_card(ops, Checkpoint.open(arguments.model), options, 0)
    config = Checkpoint.open(arguments.model).config
    finish()
    loaded_s = time.perf_counter() - started_s
    # A little of the memory is for the passes that count experts.
    left = placed.options.kv_memory_bytes
    runner = GpuRunner(placed.ops, config, placed.weights, replace(placed.options, kv_memory_bytes=left * 7 // 8))
    counted = replace(placed.options, kv_memory_bytes=left // 8, record_routing=True)
    counter = GpuRunner(placed.ops, config, placed.weights, counted)
    counting = CountingOps(placed.ops)
    passes: dict[str, Any] = {}
    for num_seqs in arguments.batch:
        # Kernels are compiled, and the pass recorded, before it is timed.
        measure_decode(runner, counting, num_seqs, arguments.depth, num_steps=2)
        one = measure_decode(runner, counting, num_seqs, arguments.depth, num_steps=arguments.steps)
        num_experts = experts_read(counter, num_seqs)
        one = replace(one, bytes_per_pass=one.bytes_per_pass + num_experts * expert_bytes(config))
        share = one.share_of_bandwidth(limits["copy_bytes_per_s"])
        passes[f"decode x{num_seqs}"] = told(one) | {"of_copy_bandwidth": round(share, 3), "experts_read": num_experts}
    for length in arguments.prefill:
        one = measure_prefill(runner, counting, length)
        rate, share = 2 * one.macs_per_pass / one.seconds_per_pass, one.share_of_arithmetic(limits["macs_per_s"])
        passes[f"prefill {length}"] = told(one) | {
            "tflop_per_s": round(rate / 1e12, 2),
            "of_matrix_rate": round(share, 3),
        }
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: Triton's interpreter",
        "variant": ops.variant.name,
        "model": f"{config.num_layers} layers of {config.hidden_size}, {config.num_experts} experts",
        "depth": arguments.depth,
        "copy_gb_per_s": round(limits["copy_bytes_per_s"] / 1e9, 1),
        "matrix_tflop_per_s": round(2 * limits["macs_per_s"] / 1e12, 2),
        "loaded_s": round(loaded_s, 2),
        "passes": passes,
    }


def told(one: Measurement) -> dict[str, Any]:
    return {"tokens_per_s": round(one.tokens_per_s, 1), "ms": round(1000 * one.seconds_per_pass, 3)}


def experts_read(counter: Runner, num_seqs: int) -> int:
    """How many experts of all layers one token of each of so many sequences reads."""
    token_ids = np.random.default_rng(0).integers(0, counter.config.vocab_size, (num_seqs, 1))
    batch = made_up_batch(counter, [0] * num_seqs, list(token_ids), is_last=True)
    counter.run(batch)
    experts_NLA = np.stack([counter.routing(table_B, 1)[0] for table_B in batch.full_table_NB])
    return sum(len(np.unique(experts_NLA[:, layer])) for layer in range(counter.config.num_layers))


def copying(ops: GpuOps, num_bytes: int) -> Callable[[], Any]:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=ops.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def multiplying(ops: GpuOps, side: int) -> Callable[[], Any]:
    a, b = (torch.randn(side, side, device=ops.device).to(ops.dtype) for _ in "ab")
    return lambda: a @ b


# The peer -------------------------------------------------------------------------------------------------------------


def run_transformers(arguments: argparse.Namespace) -> dict[str, float]:
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.GptOssForCausalLM.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    ).to(device)
    rng, vocab_size = np.random.default_rng(0), model.config.vocab_size

    def some(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, vocab_size, shape)).to(device)

    speeds = {}
    with torch.inference_mode():
        for num_seqs in arguments.batch:
            cache = transformers.DynamicCache(config=model.config)
            if arguments.depth:
                model(some(num_seqs, arguments.depth), past_key_values=cache, use_cache=True, logits_to_keep=1)

            def step(num_seqs: int = num_seqs, cache: Any = cache) -> None:
                model(some(num_seqs, 1), past_key_values=cache, use_cache=True)

            speeds[f"decode x{num_seqs}"] = round(num_seqs / seconds(step, arguments.steps), 1)
        for length in arguments.prefill:
            prompt = some(1, length)
            speeds[f"prefill {length}"] = round(
                length / seconds(lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1), 3), 1
            )
    return speeds


# Both -----------------------------------------------------------------------------------------------------------------


def seconds(action: Callable[[], Any], repeats: int) -> float:
    """The median; the first time does not count."""
    taken = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        action()
        finish()
        taken.append(time.perf_counter() - started_s)
    return statistics.median(taken[1:])


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
