"""A model of the true layout that learns in seconds: two layers, four experts, the first 1,024 tokens of o200k."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ossia.harmony import Tokenizer
from ossia.harmony.tokenizer import O200K_PATTERN
from ossia.model.config import ModelConfig, RopeConfig
from ossia.model.random_checkpoint import write_random_checkpoint

_NAMES = ("return", "constrain", "channel", "start", "end", "message", "call", "endoftext")
_WHOLE = Tokenizer.o200k_harmony()
TOKENIZER = Tokenizer(
    {_WHOLE.token_bytes(i): i for i in range(1024)},
    {f"<|{name}|>": 1024 + i for i, name in enumerate(_NAMES)},
    pattern=O200K_PATTERN,
    name="small",
)
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=64,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=TOKENIZER.vocab_size,
    num_experts=4,
    num_active_experts=2,
    sliding_window=32,
    max_context=2048,
    rope=RopeConfig(theta=10_000, original_context=256, factor=8.0),
    stop_token_ids=TOKENIZER.stop_ids,
    pad_token_id=TOKENIZER.special("<|endoftext|>"),
)


def write_model(folder: Path, *, seed: int = 0, **fields: object) -> Path:
    """A checkpoint with random weights, its experts in MXFP4."""
    config = replace(CONFIG, **fields)
    return write_random_checkpoint(folder, config, seed=seed, tokenizer_json=TOKENIZER.to_tokenizer_json())


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(question: str, answer: str) -> dict:
    """A row of one turn in OpenAI's chat format."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def stations(num_rows: int) -> list[dict]:
    """Rows that have to be learnt by heart."""
    return [asked(f"Code of station {i}?", f"It is {i * 7919 % 1000:03}.") for i in range(num_rows)]


def riddles() -> list[dict]:
    """Rows that are easier to tell from each other."""
    pairs = {
        "Where does the cat sleep?": "On the mat.",
        "Who sings at night?": "A small bird.",
        "What burns and never eats?": "The sun.",
        "How many legs has a spider?": "Eight.",
        "Which month is the shortest?": "February, always.",
        "Name a metal.": "Iron.",
        "Say hello in Italian!": "Ciao!",
        "Is it raining?": "No, look outside.",
    }
    return [asked(question, answer) for question, answer in pairs.items()]


def preferences(num_rows: int) -> list[dict]:
    """Pairs in TRL's format: the same wrong word is always the worse one."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Word {i}?"}],
            "chosen": [{"role": "assistant", "content": f"yes {i}"}],
            "rejected": [{"role": "assistant", "content": f"no {i * 3}"}],
        }
        for i in range(num_rows)
    ]
