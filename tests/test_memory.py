"""A model that cannot fit is refused with numbers, before it is loaded."""

from __future__ import annotations

import logging

import pytest

import ossia.local
from ossia.config import Config
from ossia.errors import UnavailableError
from ossia.local import check_memory, tell_of_demonstration
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


def test_the_demonstration_says_what_it_is_and_how_to_get_more(monkeypatch, caplog):
    monkeypatch.setattr(ossia.local, "downloaded", lambda: ["gpt-oss-20b"])
    tell_of_demonstration(Config())
    assert "small demonstration that comes with ossia; here are gpt-oss-20b for --model" in caplog.text
    caplog.clear()
    monkeypatch.setattr(ossia.local, "downloaded", list)
    tell_of_demonstration(Config())
    assert "`ossia pull gpt-oss-20b` fetches a real one" in caplog.text
    caplog.clear()
    tell_of_demonstration(Config(model="gpt-oss-20b"))
    assert caplog.text == ""
