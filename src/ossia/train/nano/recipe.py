"""What the small model is and how it is trained: the shape, the vocabulary, the stages.

    warm-up    copying of runs that grow from one word, so that the heads that copy appear
    recall     copying of runs of any length, values by their keys, and sums of single digits
    pretrain   gold transcripts of the tasks, every token learned
    sft        the model's own words alone; the rate begins to fall
    browse     browsing joins, with longer contexts, until the rate has fallen
    qat        a little more, computed with what MXFP4 keeps of the experts

Steps are small, since it is their number that counts: `design/nano.md`.

Sources  the order: `ossia.train.tasks.language`; Muon for the inner matrices:
         https://kellerjordan.github.io/posts/muon/; a rate that falls from the start: arXiv:2502.15938.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ossia.model.config import ModelConfig, RopeConfig
from ossia.train.export import Format

VOCAB_SIZE, NUM_COMMON_WORDS = 2048, 600
# Gold conversations that the vocabulary is made of, by the shares of their tasks, and texts of copying.
VOCABULARY_CONVERSATIONS, VOCABULARY_TEXTS = 6000, 2000

SHAPE = ModelConfig(
    num_layers=6,
    hidden_size=128,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=VOCAB_SIZE,
    num_experts=8,
    num_active_experts=2,
    sliding_window=64,
    max_context=2048,
    rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=512),
    stop_token_ids=(),
    pad_token_id=None,
)

# Shares of the tasks, of which `browsing` has long transcripts and joins later.
SHORT = {"about": 5, "sums": 30, "functions": 24, "hierarchy": 9, "policies": 14, "python": 8, "structured": 16}
ALL = {**SHORT, "browsing": 6}
VOCABULARY_SHARES = {**SHORT, "sums": 18, "python": 13, "browsing": 14}


class Stage(NamedTuple):
    """One run: its name, its method, and the settings that differ from `BASE`."""

    name: str
    method: Literal["pretrain", "rl"]
    settings: Mapping[str, Any]
    measured: tuple[Format, ...] = ()


BASE: Mapping[str, Any] = {
    "trainable": "full",
    "optimizer": "muon",
    "schedule": "constant",
    "router_balance": 0.03,
    "recompute": False,
    "threads": 1,
    "replicate": True,
    "eval_every": 1000,
    "save_every": 500,
    "keep": 1,
}


def mix(shares: Mapping[str, float]) -> tuple[str, ...]:
    """Tasks as settings name them."""
    return tuple(f"{name}={share}" for name, share in shares.items())


# Of copying, as plain texts.
_COPYING: Mapping[str, Any] = {
    "tasks": mix(SHORT),
    "max_tokens": 300,
    "step_tokens": 1024,
    "pass_tokens": 520,
    "learning_rate": 1e-2,
    "eval_every": 0,
}
# Of conversations.
_TALKING: Mapping[str, Any] = {
    "tasks": mix(SHORT),
    "turns": 4,
    "max_tokens": 640,
    "step_tokens": 1200,
    "pass_tokens": 680,
    "learning_rate": 8e-3,
}
_BROWSING: Mapping[str, Any] = {
    **_TALKING,
    "tasks": mix(ALL),
    "idle_tools": 0.1,
    "max_tokens": 1280,
    "step_tokens": 1800,
    "pass_tokens": 1300,
    "schedule": "linear",
}

STAGES: tuple[Stage, ...] = (
    Stage("warm-up", "pretrain", {**_COPYING, "language": 1.0, "growth": 8000, "warmup": 0.03, "steps": 1500}),
    Stage("recall", "pretrain", {**_COPYING, "language": 0.7, "facts": 0.3, "warmup": 0.02, "steps": 800}),
    Stage(
        "pretrain",
        "pretrain",
        {**_TALKING, "language": 0.15, "facts": 0.15, "learn": "all", "warmup": 0.02, "steps": 1500},
    ),
    Stage(
        "sft",
        "pretrain",
        {
            **_TALKING,
            "language": 0.02,
            "facts": 0.08,
            "schedule": "linear",
            "warmup": 0.005,
            "final_rate": 0.4,
            "steps": 16000,
        },
    ),
    Stage(
        "browse",
        "pretrain",
        {**_BROWSING, "facts": 0.03, "learning_rate": 3.2e-3, "warmup": 0.0, "final_rate": 0.02, "steps": 6000},
    ),
    Stage(
        "qat",
        "pretrain",
        {
            **_BROWSING,
            "fake_quant": True,
            "learning_rate": 3e-4,
            "warmup": 0.02,
            "final_rate": 0.0,
            "steps": 400,
        },
        ("mxfp4",),
    ),
)
