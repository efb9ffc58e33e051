"""Where experts, keys and values lie, by arithmetic alone: the published models on cards of many sizes."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest

from ossia.engine import EngineConfig
from ossia.engine.placement import ModelBytes, least_kv_bytes, model_bytes, place
from ossia.engine.runner import divide_memory
from ossia.errors import UnavailableError
from ossia.model.layouts import HF
from ossia.model.random_checkpoint import SHAPES
from ossia.model.share import Share

GB, GIB = 10**9, 1 << 30
OPTIONS = EngineConfig()


class Shape:
    """The arrays of a published checkpoint without its bytes."""

    def __init__(self, name: str) -> None:
        self.config = SHAPES[name]
        self._expected = HF.expected(self.config)

    def _get(self, name: str) -> np.ndarray:
        shape, dtypes = self._expected[name]
        return np.broadcast_to(np.zeros((), np.uint8 if dtypes == ("U8",) else ml_dtypes.bfloat16), shape)

    def outer(self):
        return HF.outer(self._get)

    def layer(self, i):
        return HF.layer(self._get, self.config, i)


@cache
def bytes_of(name: str) -> ModelBytes:
    return model_bytes(Shape(name))


def layer_kv_bytes(config) -> int:
    return 2 * OPTIONS.block_size * config.num_kv_heads * config.head_dim * 2


def placed(name: str, room: int, wanted: int = GIB):
    config = SHAPES[name]
    least = least_kv_bytes(config, OPTIONS, layer_kv_bytes(config))
    return place(bytes_of(name), config.num_layers, room, least, wanted)


def test_bytes_are_those_of_the_published_files():
    # 12.8 and 60.8 GiB on the hub; biases, norms and routers are twice as wide on a card.
    for name, published in (("20b", 12.8), ("120b", 60.8)):
        dense, layer = bytes_of(name)
        assert dense + SHAPES[name].num_layers * layer == pytest.approx(published * GIB, rel=0.01)
        assert layer == SHAPES[name].num_experts * 3 * 2880 * 2880 * 17 // 32


def test_two_processes_need_half_but_for_what_is_whole():
    whole = bytes_of("120b")
    shares = [model_bytes(Share(Shape("120b"), rank, 2)) for rank in range(2)]
    assert sum(share.layer_experts for share in shares) == whole.layer_experts
    embedding = 201_088 * 2880 * 2
    assert shares[0].dense == pytest.approx((whole.dense + embedding) / 2, rel=0.03)


@pytest.mark.parametrize(("name", "room"), [("20b", 15 * GB), ("20b", 80 * GB), ("120b", 78 * GB)])
def test_a_card_that_holds_all_keeps_all(name, room):
    place = placed(name, room)
    assert all(place.is_on_card) and (place.num_buffers, place.host_bytes) == (0, 0)
    dense, layer = bytes_of(name)
    assert dense + len(place.is_on_card) * layer + place.kv_bytes == room


@pytest.mark.parametrize("name", ["20b", "120b"])
@pytest.mark.parametrize("room", [6.5 * GB, 8 * GB, 10 * GB, 14 * GB, 22 * GB, 40 * GB, 60 * GB])
def test_what_does_not_fit_lies_with_the_host_and_nothing_is_lost(name, room):
    place, (dense, layer) = placed(name, int(room)), bytes_of(name)
    config, on_card = SHAPES[name], sum(place.is_on_card)
    assert len(place.is_on_card) == config.num_layers
    assert dense + (on_card + place.num_buffers) * layer + place.kv_bytes == int(room)
    assert place.host_bytes == (config.num_layers - on_card) * layer
    least = least_kv_bytes(config, OPTIONS, layer_kv_bytes(config))
    assert place.kv_bytes >= least
    if on_card < config.num_layers:
        # One more would leave keys and values less than they were to have.
        assert place.num_buffers and (on_card == config.num_layers - 1 or place.kv_bytes - layer < GIB)
        # Between two layers on the card lie as many of the host's, but for one.
        gaps = np.diff([-1, *np.flatnonzero(place.is_on_card), config.num_layers])
        assert gaps[:-1].max(initial=0) - gaps[:-1].min(initial=99) <= 1 or on_card == 0


def test_more_room_never_puts_more_with_the_host():
    counts = [sum(placed("120b", room * GB).is_on_card) for room in range(7, 80)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 36


def test_keys_and_values_take_what_they_were_to_have_before_experts_do():
    assert placed("120b", 20 * GB, wanted=8 * GIB).kv_bytes >= 8 * GIB
    assert sum(placed("120b", 20 * GB, wanted=8 * GIB).is_on_card) < sum(placed("120b", 20 * GB).is_on_card)
    # More than there is room for is not waited for.
    assert placed("120b", 10 * GB, wanted=80 * GIB).kv_bytes < 6 * GIB


def test_a_second_buffer_is_there_where_it_has_room():
    dense, layer = bytes_of("120b")
    least = least_kv_bytes(SHAPES["120b"], OPTIONS, layer_kv_bytes(SHAPES["120b"]))
    assert placed("120b", dense + 2 * layer + least).num_buffers == 2
    assert placed("120b", dense + 2 * layer + least - 1).num_buffers == 1
    assert placed("120b", dense + layer + least).kv_bytes == least
    with pytest.raises(UnavailableError, match=r"dense weights take 4\.\d GiB, one layer's experts 1\.6 .*--gpu-mem"):
        placed("120b", dense + layer + least - 1)


@pytest.mark.parametrize("name", ["20b", "120b"])
def test_the_least_keys_and_values_are_enough_for_one_sequence(name):
    config = SHAPES[name]
    layer_bytes = layer_kv_bytes(config)
    blocks = divide_memory(
        config, EngineConfig(kv_memory_bytes=least_kv_bytes(config, OPTIONS, layer_bytes)), layer_bytes
    )
    assert blocks.full * OPTIONS.block_size >= 4096
    # Not what they would take if all layers kept all tokens.
    assert least_kv_bytes(config, OPTIONS, layer_bytes) < config.num_layers * layer_bytes * 4096 // OPTIONS.block_size


def test_a_bound_below_the_work_of_a_pass_is_told_as_no_room():
    with pytest.raises(UnavailableError, match=r"there are 0\.0 GiB"):
        place(ModelBytes(4 * GB, GB), 24, -GB, GB, GB)
