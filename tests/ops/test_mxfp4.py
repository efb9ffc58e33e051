"""MXFP4, exactly: against the definition, against a search for the nearest value, against other people's readers."""

from __future__ import annotations

import math

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossia.errors import InputError
from ossia.ops import Mxfp4
from ossia.ops.mxfp4 import dequantize, pack_codes, quantize, reorder, unpack_codes

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ORDERS = ["pairs", "halves"]
RULES = ["floor", "best"]


def value_of(code: int, scale: int) -> float:
    """The definition, in Python's own float64, where every value fits."""
    if scale == 255:
        return math.nan
    return math.copysign(MAGNITUDES[code & 7], -1 if code & 8 else 1) * 2.0 ** (scale - 127)


def random_matrix(seed: int = 0, *, order: str = "pairs", scales: tuple[int, int] = (100, 150)) -> Mxfp4:
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (3, 5, 2, 16), np.uint8)
    return Mxfp4(blocks, random.integers(*scales, (3, 5, 2), np.uint8), order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_code_with_every_scale_is_the_number_of_the_specification(dtype, order):
    codes = np.tile(np.arange(16, dtype=np.uint8), 2)
    matrix = Mxfp4(
        np.broadcast_to(pack_codes(codes, order), (256, 1, 16)), np.arange(256, dtype=np.uint8)[:, None], order
    )
    want = np.array([[value_of(code, scale) for code in codes] for scale in range(256)])
    with np.errstate(over="ignore"):
        want = want.astype(dtype)
    got = dequantize(matrix, dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[:255]), np.signbit(want[:255]))


def test_pairs_keep_neighbours_in_one_byte_and_halves_keep_them_sixteen_apart():
    codes = np.arange(32, dtype=np.uint8) % 16
    assert pack_codes(codes, "pairs")[:3].tolist() == [0x10, 0x32, 0x54]
    codes = np.concatenate([np.arange(16), np.full(16, 7)]).astype(np.uint8)
    assert pack_codes(codes, "halves")[:3].tolist() == [0x70, 0x71, 0x72]


@pytest.mark.parametrize("order", ORDERS)
def test_unpacking_what_was_packed_gives_the_same_codes(order):
    codes = np.random.default_rng(0).integers(0, 16, (4, 3, 32), np.uint8)
    np.testing.assert_array_equal(unpack_codes(pack_codes(codes, order), order), codes)
    blocks = np.random.default_rng(1).integers(0, 256, (4, 3, 16), np.uint8)
    np.testing.assert_array_equal(pack_codes(unpack_codes(blocks, order), order), blocks)


def test_a_matrix_has_the_shape_of_its_numbers():
    assert random_matrix().shape == (3, 5, 64)
    assert dequantize(random_matrix()).shape == (3, 5, 64)


def test_strided_views_are_read_as_they_are():
    matrix = random_matrix()
    np.testing.assert_array_equal(
        dequantize(Mxfp4(matrix.blocks[:, 1::2], matrix.scales[:, 1::2])), dequantize(matrix)[:, 1::2]
    )


def test_the_published_order_is_read_as_transformers_reads_it():
    matrix = random_matrix()
    want = convert_moe_packed_tensors(
        torch.from_numpy(matrix.blocks), torch.from_numpy(matrix.scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(dequantize(matrix), want.transpose(1, 2).numpy())


def test_the_order_of_gguf_is_read_as_the_gguf_package_reads_it():
    matrix = random_matrix(order="halves")
    packed = np.concatenate([matrix.scales[..., None], matrix.blocks], axis=-1).reshape(3, 5, 34)
    want = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(dequantize(matrix), want)


def nearest(value: float, scale: int) -> float:
    """The number of this scale that is nearest; of two equally near the one with an even mantissa."""
    candidates = [value_of(code, scale) for code in range(16)]
    distances = [abs(value - candidate) for candidate in candidates]
    near = [code for code in range(16) if distances[code] == min(distances)]
    even = [code for code in near if code % 2 == 0]
    return candidates[(even or near)[0]]


def scale_of(values: list[float]) -> int:
    """The largest power of two not above the largest magnitude, over 4, found by trying them all."""
    largest = max(map(abs, values))
    return max((scale for scale in range(255) if 4 * 2.0 ** (scale - 127) <= largest), default=0)


def assert_nearest(block: list[float]) -> None:
    quantized = quantize(np.array(block), "floor")
    scale = scale_of(block)
    assert quantized.scales.tolist() == [scale]
    got = dequantize(quantized, np.float64)
    assert got.tolist() == [nearest(value, scale) for value in block]
    assert all(np.signbit(x) == np.signbit(value) for x, value in zip(got, block, strict=True)), (
        "a negative value that rounds to zero is a negative zero"
    )


@pytest.mark.parametrize("exponent", [-120, -3, 0, 1, 100])
def test_values_on_a_midpoint_go_to_the_even_neighbour(exponent):
    midpoints = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    edges = [x for m in midpoints for x in (m, math.nextafter(m, 0), math.nextafter(m, 9))]
    block = [4.0, *edges, *(-m for m in midpoints), 6.0, 7.0, 7.99]
    assert len(block) == 32
    assert_nearest([x * 2.0**exponent for x in block])


@given(hypothesis_numpy.arrays(np.float64, 32, elements=st.floats(-1e30, 1e30, allow_subnormal=True)))
def test_any_finite_block_becomes_the_nearest_numbers(block):
    assert_nearest(block.tolist())


@pytest.mark.parametrize("deviation", [1e-45, 1e-38, 0.02, 1.0, 1e30, 1e38])
def test_random_blocks_become_the_nearest_numbers(deviation):
    for block in np.random.default_rng(0).standard_normal((50, 32)) * deviation:
        assert_nearest(block.tolist())


def test_magnitudes_beyond_the_largest_become_the_largest():
    block = np.zeros(32)
    block[:2] = 1e300, -1e300
    got = dequantize(quantize(block), np.float64)
    assert got[:2].tolist() == [6 * 2.0**127, -6 * 2.0**127]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantising_what_was_quantised_changes_no_bit(dtype, rule):
    for deviation in (1e-40, 0.02, 1.0, 1e30):
        values = (np.random.default_rng(0).standard_normal((400, 64)) * deviation).astype(dtype)
        once = quantize(values, rule)
        again = quantize(dequantize(once, dtype), rule)
        np.testing.assert_array_equal(again.scales, once.scales)
        np.testing.assert_array_equal(again.blocks, once.blocks)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0, 1, 2, 3, 126, 127, 128, 251, 252, 253, 254])
def test_every_code_of_every_scale_comes_back_with_the_same_bits(scale, rule):
    codes = np.random.default_rng(scale).permuted(np.tile(np.arange(16, dtype=np.uint8), (50, 2)), axis=1)
    matrix = Mxfp4(pack_codes(codes)[:, None], np.full((50, 1), scale, np.uint8))
    back = quantize(dequantize(matrix, np.float64), rule)
    np.testing.assert_array_equal(back.scales, matrix.scales)
    np.testing.assert_array_equal(back.blocks, matrix.blocks)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0, 1, 5, 127, 254])
def test_numbers_on_the_grid_stay_the_same_also_where_another_scale_could_write_them(scale, rule):
    random = np.random.default_rng(0)
    for largest in range(1, 8):
        codes = (random.integers(0, largest + 1, (50, 32)) | random.integers(0, 2, (50, 32)) << 3).astype(np.uint8)
        matrix = Mxfp4(pack_codes(codes)[:, None], np.full((50, 1), scale, np.uint8))
        numbers = dequantize(matrix, np.float64)
        back = dequantize(quantize(numbers, rule), np.float64)
        np.testing.assert_array_equal(back, numbers)
        np.testing.assert_array_equal(np.signbit(back), np.signbit(numbers))
        same = quantize(numbers, rule, like=matrix)
        np.testing.assert_array_equal(same.scales, matrix.scales)
        np.testing.assert_array_equal(same.blocks, matrix.blocks)


def test_only_blocks_that_are_alike_get_the_bits_of_what_they_are_like():
    matrix = Mxfp4(np.full((2, 2, 16), 0x11, np.uint8), np.full((2, 2), 100, np.uint8))
    numbers = dequantize(matrix)
    numbers[1, 40] *= 2
    got = quantize(numbers, like=matrix)
    assert got.scales.tolist() == [[100, 100], [100, 98]]
    np.testing.assert_array_equal(got.blocks[:, 0], matrix.blocks[:, 0])
    np.testing.assert_array_equal(dequantize(got), numbers)
    halves = reorder(matrix, "halves")
    np.testing.assert_array_equal(quantize(numbers, like=halves).blocks, got.blocks)
    # What rounds to the same numbers is the same, and so is a zero of the other sign, which a sum makes of it.
    nudged = dequantize(matrix) * np.linspace(0.98, 1.02, 64, dtype=np.float32)
    np.testing.assert_array_equal(quantize(nudged, like=matrix).scales, matrix.scales)
    negative = Mxfp4(np.full((1, 1, 16), 0x88, np.uint8), np.full((1, 1), 77, np.uint8))
    again = quantize(dequantize(negative) + np.float32(0), like=negative)
    assert again.scales.tolist() == [[77]] and again.blocks.tolist() == negative.blocks.tolist()
    with pytest.raises(InputError, match=r"\(2, 64\) cannot be like MXFP4 of shape \(1, 32\)"):
        quantize(numbers, like=negative)


def squared_error(block: np.ndarray, scale: int) -> float:
    return sum((value - nearest(value, scale)) ** 2 for value in block.tolist())


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "small beside one large", "coarse"])
def test_the_best_scale_has_the_least_error_of_all(kind):
    random = np.random.default_rng(0)
    num_changed = 0
    for _ in range(12):
        block = {
            "normal": lambda: random.standard_normal(32),
            "uniform": lambda: random.uniform(-1, 1, 32) * random.uniform(1, 2),
            "heavy": lambda: random.standard_t(2, 32),
            "small beside one large": lambda: np.append(np.full(31, 0.25), random.uniform(4, 5)),
            "coarse": lambda: random.integers(-15, 16, 32) / 8,
        }[kind]()
        got, floor = quantize(block, "best"), quantize(block, "floor")
        scale = int(got.scales[0])
        errors = [squared_error(block, other) for other in range(115, 140)]
        assert squared_error(block, scale) <= min(errors) * (1 + 1e-12)
        assert dequantize(got, np.float64).tolist() == [nearest(value, scale) for value in block.tolist()]
        assert scale == floor.scales[0] or squared_error(block, scale) < squared_error(block, int(floor.scales[0]))
        num_changed += scale != floor.scales[0]
    assert num_changed > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_narrower_floats_become_the_same_bits_as_in_float64(dtype, rule):
    values = np.random.default_rng(0).standard_normal((300, 64)).astype(dtype)
    got, want = quantize(values, rule), quantize(values.astype(np.float64), rule)
    np.testing.assert_array_equal(got.scales, want.scales)
    np.testing.assert_array_equal(got.blocks, want.blocks)


def test_reordering_nibbles_there_and_back_keeps_every_number():
    for order, other in (ORDERS, reversed(ORDERS)):
        matrix = random_matrix(order=order)
        turned = reorder(matrix, other)
        np.testing.assert_array_equal(turned.blocks, pack_codes(unpack_codes(matrix.blocks, order), other))
        np.testing.assert_array_equal(dequantize(turned), dequantize(matrix))
        np.testing.assert_array_equal(reorder(turned, order).blocks, matrix.blocks)
        assert reorder(matrix, order) is matrix


def test_a_block_of_zeros_has_scale_zero_and_stays_zero():
    quantized = quantize(np.zeros((2, 64)))
    assert not quantized.scales.any() and not quantized.blocks.any()
    assert not dequantize(quantized).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_nan_or_infinity_becomes_nan_and_its_neighbours_do_not(bad):
    values = np.ones((2, 64), np.float32)
    values[0, 40] = bad
    quantized = quantize(values)
    assert quantized.scales.tolist() == [[125, 255], [125, 125]]
    got = dequantize(quantized)
    assert np.isnan(got[0, 32:]).all()
    np.testing.assert_array_equal(got[0, :32], 1.0)
    np.testing.assert_array_equal(got[1], 1.0)


def test_a_row_that_is_no_multiple_of_the_block_is_refused_with_its_shape():
    with pytest.raises(InputError, match=r"multiple of 32.*\(2, 33\)"):
        quantize(np.zeros((2, 33)))
