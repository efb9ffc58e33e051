"""The model held to numbers in a file, beside the script that made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint

GOLDEN = json.loads((Path(__file__).parent / "golden" / "logits.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = ModelConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in GOLDEN["config"].items()})
    return write_random_checkpoint(tmp_path_factory.mktemp("golden") / "out", config, seed=GOLDEN["seed"])


def test_a_random_checkpoint_has_the_bytes_it_always_had(folder):
    data = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN["sha256 of model.safetensors"]


def test_logits_are_those_that_transformers_gave(folder, logits_of):
    logits = logits_of(folder, GOLDEN["token_ids"])
    for position, largest in GOLDEN["five largest logits by position"].items():
        row = logits[int(position)]
        assert sorted(np.argsort(-row)[:5].tolist()) == sorted(map(int, largest))
        for token, value in largest.items():
            assert abs(row[int(token)] - value) <= 1e-4 * np.abs(logits).max()
