"""GGUF's matrices of fewer than 8 bits: the numbers that the gguf package reads, as Q8_0."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ossia.model.gguf_file import QUANTISED, TYPES
from ossia.model.gguf_quants import to_q8
from ossia.ops.q8 import dequantize_q8

NAMES = sorted(name for name, _, _ in QUANTISED.values())
EXACT = {"Q4_0", "Q5_0", "IQ4_NL"}
# Where a block keeps its float16 scales; IQ1_M has its own scattered in 4 bits each.
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
SCALES |= {"Q6_K": (208,), "IQ1_M": ()}


def random_blocks(name: str, num_rows: int, num_inputs: int) -> np.ndarray:
    """Any bytes are values of a block; only its scales have to be numbers."""
    random = np.random.default_rng(NAMES.index(name))
    values, size = gguf.GGML_QUANT_SIZES[Type[name]]
    blocks = random.integers(0, 256, (num_rows, num_inputs // values, size), np.uint8)
    for at in SCALES.get(name, (0,)):
        scales = random.uniform(-0.02, 0.02, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    if name == "IQ1_M":
        # The exponent's bits lie in the last of the four: of 0x2nnn the scale is below 0.02.
        blocks[..., 55] = (blocks[..., 55] & 0x0F) | 0x20
    return blocks.reshape(num_rows, -1)


def test_sizes_and_numbers_of_the_types_are_the_gguf_package_s():
    for number, (name, values, size) in (TYPES | QUANTISED).items():
        if name != "MXFP4_PAIRS":
            assert Type[name] == number and gguf.GGML_QUANT_SIZES[Type[name]] == (values, size)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_kept_or_rounded_to_8_bits(name):
    # More rows than one thread unpacks at a time.
    shape = (700, 2048)
    blocks = random_blocks(name, *shape)
    wanted = gguf.quants.dequantize(blocks, Type[name])
    assert wanted.shape == shape and np.isfinite(wanted).all() and np.abs(wanted).max() > 1e-3
    got = dequantize_q8(to_q8(name, blocks, shape))
    if name in EXACT:
        np.testing.assert_array_equal(got, wanted)
    largest = np.abs(wanted).reshape(700, -1, 32).max(axis=-1).repeat(32, axis=-1)
    # Half a step, and the rounding of the scale to float16: 2^-11 of the value, or half its smallest step of 2^-24.
    assert (np.abs(got - wanted) <= largest / 254 + largest * 2**-11 + 127 * 2**-25 + 1e-9).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K"])
def test_blocks_of_nothing_stay_nothing_and_what_is_not_finite_is_told_by_the_scale(name):
    shape = (3, 256)
    blocks = random_blocks(name, *shape)
    blocks[0] = 0
    blocks[2, :2] = np.float16(np.nan).reshape(1).view(np.uint8)
    got = to_q8(name, blocks, shape)
    assert (dequantize_q8(got)[0] == 0).all()
    assert np.isfinite(got.scales[:2]).all() and not np.isfinite(got.scales[2]).all()
