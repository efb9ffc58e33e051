"""A small model of the true layout with a byte vocabulary, and a task that such a model can learn in seconds."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from ossia.engine import Engine, EngineConfig, Runner
from ossia.harmony import Effort, SystemContent, Tokenizer
from ossia.model.config import ModelConfig, RopeConfig
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Ops
from ossia.train.tasks import Instance, Reward, Task, Transcript

# On matrices as small as these, threads wait for each other longer than they compute.
torch.set_num_threads(1)

_SPECIAL = ("return", "constrain", "channel", "start", "end", "message", "call", "endoftext")
TOKENIZER = Tokenizer(
    {bytes([b]): b for b in range(256)}, {f"<|{name}|>": 256 + i for i, name in enumerate(_SPECIAL)}, name="bytes"
)
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=TOKENIZER.vocab_size,
    num_experts=4,
    num_active_experts=2,
    sliding_window=16,
    max_context=1024,
    rope=RopeConfig(theta=10_000, original_context=256, factor=4.0),
    stop_token_ids=TOKENIZER.stop_ids,
    pad_token_id=TOKENIZER.special("<|endoftext|>"),
)


def write_model(folder: Path, *, seed: int = 0, layout: str = "hf", **fields: object) -> Path:
    """A checkpoint of the small model with random weights."""
    config = replace(CONFIG, **fields)
    return write_random_checkpoint(
        folder, config, seed=seed, layout=layout, tokenizer_json=TOKENIZER.to_tokenizer_json()
    )


def make_engine(path: Path, ops: Ops, **settings: object) -> Engine:
    checkpoint = Checkpoint.open(path)
    options = EngineConfig(**({"kv_memory_bytes": 32 << 20, "record_routing": True} | settings))
    runner = Runner(ops, checkpoint.config, load_weights(checkpoint, ops), options)
    return Engine(runner, token_bytes=TOKENIZER.token_bytes)


class Brief(Task):
    """Tells the model nothing but its effort: prompts stay short."""

    def system(self, effort: Effort, tools: tuple) -> SystemContent:
        return SystemContent(None, None, effort=effort, tools=tools, channels=(), channel_required=False)


class Vowels(Brief):
    """The more of what was sampled are vowels, the better: from noise on there is something to learn."""

    name = "vowels"

    def instance(self, rng: random.Random) -> Instance:
        word = "".join(rng.choices("bcdfg", k=3))
        return Instance(word, word)

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        text = "".join(one.text for one in transcript.messages)
        share = sum(letter in "aeiou" for letter in text) / max(1, len(text))
        return Reward(share, {"exact": float(share == 1), "valid": 1.0, "malformed": 0.0})
