"""Q8_0 as the gguf package writes and reads it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ossia.errors import InputError
from ossia.ops import Q8
from ossia.ops.q8 import dequantize_q8, quantize_q8


def packed(matrix: Q8) -> np.ndarray:
    rows = np.concatenate([matrix.scales[..., None].view(np.uint8), matrix.values.view(np.uint8)], axis=-1)
    return rows.reshape(*matrix.shape[:-1], -1)


def values(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    return {
        "normal": random.standard_normal((50, 96)),
        "halves": random.integers(-254, 255, (50, 96)) / 2 * 127 / 127,
        "zeros": np.zeros((50, 96)),
        "just below a half": np.where(np.arange(96) % 32, np.nextafter(np.float32(0.5), np.float32(0)), 127),
    }[kind].astype(np.float32) * np.ones((50, 1), np.float32)


@pytest.mark.parametrize("kind", ["normal", "halves", "zeros", "just below a half"])
def test_numbers_become_the_bytes_that_the_gguf_package_writes(kind):
    x = values(kind)
    want = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    got = quantize_q8(x)
    np.testing.assert_array_equal(packed(got), want)
    np.testing.assert_array_equal(dequantize_q8(got), gguf.quants.dequantize(want, gguf.GGMLQuantizationType.Q8_0))


def test_equal_blocks_keep_their_bits_and_others_do_not():
    random = np.random.default_rng(0)
    # Scales and values that quantising would not choose: no value is 127.
    old = Q8(random.integers(-100, 101, (4, 3, 32)).astype(np.int8), random.uniform(0.01, 1, (4, 3)).astype(np.float16))
    numbers = dequantize_q8(old)
    numbers[1, 40] += 1
    got = quantize_q8(numbers, like=old)
    same = np.ones((4, 3), bool)
    same[1, 1] = False
    assert (got.values == old.values).all(axis=-1)[same].all() and (got.scales == old.scales)[same].all()
    assert got.scales[1, 1] != old.scales[1, 1] or (got.values[1, 1] != old.values[1, 1]).any()


def test_a_row_that_is_no_multiple_of_the_block_is_refused_with_its_shape():
    with pytest.raises(InputError, match=r"multiple of 32.*\(2, 33\)"):
        quantize_q8(np.zeros((2, 33)))
