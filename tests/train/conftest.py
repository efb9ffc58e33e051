"""Small checkpoints of the true layout, and batches of random tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harmony.conftest import oracle, published_vocabulary

from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.ops import Batch

__all__ = ["oracle", "published_vocabulary"]

SMALL = ModelConfig(
    num_layers=3,
    hidden_size=64,
    intermediate_size=64,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    num_experts=8,
    num_active_experts=2,
    sliding_window=16,
    stop_token_ids=(299,),
    pad_token_id=0,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Any:
    """Arrays this small gain nothing from a second thread, and lose much where other programs hold the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: Any) -> Callable[..., Path]:
    """make(layout="hf", seed=0, **fields of ModelConfig): a checkpoint, made once for each set of arguments."""
    made: dict[str, Path] = {}

    def make(layout: str = "hf", seed: int = 0, **fields: Any) -> Path:
        key = repr((layout, seed, sorted(fields.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "small"
            made[key] = write_random_checkpoint(folder, replace(SMALL, **fields), layout=layout, seed=seed)
        return made[key]

    return make


@pytest.fixture
def documents() -> Callable[..., Batch]:
    """make(*lengths, seed=0, rows=None): sequences of random tokens; logits of every row unless ``rows`` names them."""

    def make(*lengths: int, seed: int = 0, rows: Any = None, vocab_size: int = SMALL.vocab_size) -> Batch:
        num_tokens = sum(lengths)
        ids = np.random.default_rng(seed).integers(0, vocab_size, num_tokens)
        none = np.full((len(lengths), 0), -1, np.int32)
        return Batch(
            token_ids_T=ids.astype(np.int32),
            positions_T=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
            query_starts_N1=np.cumsum([0, *lengths]).astype(np.int32),
            key_lengths_N=np.array(lengths, np.int32),
            full_table_NB=none,
            window_table_NB=none,
            logit_rows_R=np.arange(num_tokens, dtype=np.int32) if rows is None else np.asarray(rows, np.int32),
        )

    return make
