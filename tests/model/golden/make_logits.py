"""Make logits.json: what transformers computes from a small random checkpoint, to be read and to be held to.

    python tests/model/golden/make_logits.py

The numbers come from transformers alone; ossia writes the checkpoint. They change when its random numbers do.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GptOssForCausalLM

from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint

CONFIG = ModelConfig(
    num_layers=4,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=500,
    num_experts=8,
    sliding_window=8,
    stop_token_ids=(2,),
    pad_token_id=1,
)
SEED = 2508
TOKEN_IDS = [(37 * i * i + 11) % 500 for i in range(24)]
POSITIONS = [0, 7, 8, 23]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_checkpoint(Path(folder) / "hf", CONFIG, seed=SEED)
        sha256 = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
        dense = write_random_checkpoint(Path(folder) / "hf-bf16", CONFIG, seed=SEED, layout="hf-bf16")
        model = GptOssForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            logits = model(torch.tensor([TOKEN_IDS])).logits[0]
    golden = {
        "made by": "tests/model/golden/make_logits.py, transformers' GptOssForCausalLM in float32",
        "config": {name: value for name, value in asdict(CONFIG).items() if name != "rope"},
        "seed": SEED,
        "sha256 of model.safetensors": sha256,
        "token_ids": TOKEN_IDS,
        "five largest logits by position": {
            position: {int(token): round(float(logits[position, token]), 6) for token in logits[position].topk(5)[1]}
            for position in POSITIONS
        },
    }
    (Path(__file__).parent / "logits.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
