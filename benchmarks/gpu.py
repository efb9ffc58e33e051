"""A GPU: `ossia bench` beside transformers, the same file on the same card in turn.

    ossia checkpoint new FOLDER --shape 20b
    python benchmarks/gpu.py --model FOLDER [--batch 1,8,64,256] [--prefill 512,4096]

Each side is a process of its own. Ossia's shares are of limits that its process measures first: a copy within the
card's memory, and a product of matrices in the card's 16-bit type. Transformers reads the same file, its experts as
bfloat16.

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
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=numbers, default=numbers("1,2,4,8,16,32,64,128,256"), help="sequences together")
    parser.add_argument("--prefill", type=numbers, default=numbers("512,4096"), help="lengths of prompts")
    parser.add_argument("--steps", type=int, default=32, help="passes whose median is told")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_peer:
        print(json.dumps(run_transformers(arguments)))
        return
    shape = ["--model", str(arguments.model), "--batch", ",".join(map(str, arguments.batch))]
    shape += ["--prefill", ",".join(map(str, arguments.prefill)), "--steps", str(arguments.steps)]
    peer = in_process([__file__, "--only-peer", *shape])
    ours = in_process(["-m", "ossia", "bench", "--backend", "gpu", "--json", "--depth", "", *shape])
    result = {
        **ours["machine"],
        "passes": {one["name"]: told(one, ours["machine"], peer) for one in ours["measurements"]},
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def in_process(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def told(one: dict[str, Any], machine: dict[str, Any], peer: dict[str, float]) -> dict[str, Any]:
    name = "decode x1" if one["name"] == "decode at 0" else one["name"]
    row = {"tokens_per_s": round(one["tokens_per_s"], 1), "ms": round(1000 * one["seconds_per_pass"], 3)}
    row["of_copy_bandwidth"] = round(one["bytes_per_pass"] / one["seconds_per_pass"] / machine["copy_bytes_per_s"], 3)
    row["tflop_per_s"] = round(2 * one["macs_per_pass"] / one["seconds_per_pass"] / 1e12, 2)
    row["of_matrix_rate"] = round(one["macs_per_pass"] / one["seconds_per_pass"] / machine["matrix_macs_per_s"], 3)
    row["transformers_tokens_per_s"] = peer[name]
    return row


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

            def step(num_seqs: int = num_seqs, cache: Any = cache) -> None:
                model(some(num_seqs, 1), past_key_values=cache, use_cache=True)

            speeds[f"decode x{num_seqs}"] = round(num_seqs / seconds(step, arguments.steps), 1)
        for length in arguments.prefill:
            prompt = some(1, length)
            speeds[f"prefill {length}"] = round(
                length / seconds(lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1), 3), 1
            )
    return speeds


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
