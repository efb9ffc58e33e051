"""What training under MXFP4 costs: a step whose experts are rounded against a plain one, in turn.

    python benchmarks/rounding.py [--threads 1] [--rounds 5] [--json FILE]

    small    the embedded model, all of it trained, 4 documents of 256 tokens
    wide     one layer of half the width of gpt-oss-20b, 8 experts, LoRA, 1 document of 512 tokens

Steps are timed in turn: forward and backward. Told: seconds (the median of the rounds), their ratio, and for a million
numbers the seconds of the rounding alone, by the kernel and by torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ossia.model.config import ModelConfig
from ossia.model.hub import resolve_model
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.ops.mxfp4 import BLOCK
from ossia.train.module import Model, Trainable
from ossia.train.quantize import fake_quantize, rounded_by_torch
from train import packed, token_ids

WIDE = ModelConfig(
    num_layers=1,
    hidden_size=1440,
    intermediate_size=1440,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=8192,
    num_experts=8,
    num_active_experts=4,
    sliding_window=128,
    stop_token_ids=(8191,),
    pad_token_id=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        wide = write_random_checkpoint(Path(folder) / "wide", WIDE)
        result = {
            "threads": arguments.threads,
            "small": compare(resolve_model("nano"), "full", token_ids(4, 256, 2040), arguments.rounds),
            "wide": compare(wide, "lora", token_ids(1, 512, WIDE.vocab_size), arguments.rounds),
            "a million numbers": of_a_million(arguments.rounds),
        }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def compare(path: Path, trainable: Trainable, ids: np.ndarray, num_rounds: int) -> dict[str, float]:
    models = {
        name: Model.open(path, trainable=trainable, fake_quant=name == "rounded", checkpoint_activations=False)
        for name in ("plain", "rounded")
    }
    batch, wanted = packed(ids), ids[:, 1:].reshape(-1)

    def step(model: Model) -> None:
        (-model.logprobs(batch, wanted).mean()).backward()
        model.zero_grad()

    return in_turn({name: lambda model=model: step(model) for name, model in models.items()}, num_rounds)


def of_a_million(num_rounds: int) -> dict[str, float]:
    weight = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).view(-1, BLOCK)
    return in_turn({"kernel": lambda: fake_quantize(weight), "torch": lambda: rounded_by_torch(weight)}, num_rounds)


def in_turn(sides: dict[str, Callable[[], Any]], num_rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(num_rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    first, second = (statistics.median(met) for met in seconds.values())
    return {
        **{name: round(statistics.median(met), 5) for name, met in seconds.items()},
        "ratio": round(second / first, 2),
    }


if __name__ == "__main__":
    main()
