"""A model that cannot fit is refused with numbers, before it is loaded."""

from __future__ import annotations

import logging

import pytest

import ossia.local
from ossia.config import Config
from ossia.errors import NotFoundError, UnavailableError
from ossia.local import check_memory, require_model
from ossia.model.memory import own_bytes, weight_bytes
from ossia.model.random_checkpoint import SHAPES

GIB = 1 << 30


@pytest.fixture
def free(monkeypatch):
    return lambda size: monkeypatch.setattr(ossia.local, "available_bytes", lambda: (size, size))


def test_what_cannot_be_taken_back_must_fit(free):
    shape = SHAPES["20b"]
    own = own_bytes(shape, "q8", 1 * GIB)
    assert 2 * GIB < own < 4 * GIB
    free(own - 1)
    with pytest.raises(UnavailableError, match=r"needs 2\.\d GiB .* free.*--kv-memory or --dense bf16"):
        check_memory(Config(kv_memory=GIB), shape)
    free(own)
    check_memory(Config(kv_memory=GIB), shape)
    # Exact dense matrices lie in the file.
    free(own_bytes(shape, "bf16", GIB))
    check_memory(Config(kv_memory=GIB, dense="bf16"), shape)


def test_weights_that_will_be_read_from_the_disk_are_told(free, caplog):
    shape = SHAPES["20b"]
    free(weight_bytes(shape, "q8") // 2)
    with caplog.at_level(logging.WARNING):
        check_memory(Config(kv_memory=GIB), shape)
    assert "read from the disk" in caplog.text
    caplog.clear()
    free(weight_bytes(shape, "q8") + 2 * GIB)
    check_memory(Config(kv_memory=GIB), shape)
    assert caplog.text == ""


def test_without_a_model_those_that_are_here_are_named(monkeypatch):
    monkeypatch.setattr(ossia.local, "downloaded", lambda: ["gpt-oss-20b", "me/tuned"])
    with pytest.raises(
        NotFoundError, match=r"Here already: gpt-oss-20b, me/tuned\. Take one with `--model gpt-oss-20b`"
    ):
        require_model(Config())
    monkeypatch.setattr(ossia.local, "downloaded", list)
    with pytest.raises(NotFoundError, match=r"none is here\. Fetch one with `ossia pull gpt-oss-20b`"):
        require_model(Config())
