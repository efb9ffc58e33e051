"""Which kernels a card gets, without a card, Triton or torch."""

from __future__ import annotations

import pytest

from ossia.errors import UnavailableError
from ossia.ops.triton.choice import choose


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "unpacking"),
    [
        ((7, 5), "turing", "float16", "sums"),
        ((8, 0), "ampere", "bfloat16", "registers"),
        ((8, 6), "ampere", "bfloat16", "registers"),
        ((8, 9), "ampere", "bfloat16", "registers"),
        ((9, 0), "hopper", "bfloat16", "registers"),
        ((10, 0), "blackwell", "bfloat16", "dot_scaled"),
        ((12, 0), "blackwell-rtx", "bfloat16", "dot_scaled"),
    ],
)
def test_each_generation_gets_its_own_kernels(capability, name, dtype, unpacking):
    variant = choose(capability)
    assert (variant.name, variant.dtype, variant.unpacking) == (name, dtype, unpacking)


@pytest.mark.parametrize("capability", [(6, 1), (7, 0)])
def test_a_card_before_turing_is_refused_by_its_number(capability):
    with pytest.raises(UnavailableError, match=rf"capability {capability[0]}\.{capability[1]}.*7\.5.*--backend cpu"):
        choose(capability)


# Bytes of shared memory that one program may have: CUDA C++ Programming Guide, technical specifications.
@pytest.mark.parametrize(
    ("capability", "shared_bytes"),
    [
        ((7, 5), 64 << 10),
        ((8, 0), 163 << 10),
        ((8, 6), 99 << 10),
        ((9, 0), 227 << 10),
        ((10, 0), 227 << 10),
        ((12, 0), 99 << 10),
    ],
)
def test_tiles_fit_the_shared_memory(capability, shared_bytes):
    variant = choose(capability)
    for tiling in (variant.decode, variant.prefill):
        # A tile of float32 inputs and two of packed matrices with scales, once for each stage, and the unpacked ones.
        stage = tiling.tokens * tiling.inputs * 4 + 2 * tiling.outputs * tiling.inputs * 17 // 32
        unpacked = (tiling.tokens + tiling.outputs) * tiling.inputs * 2
        assert (tiling.num_stages - 1) * stage + unpacked <= shared_bytes
        assert tiling.inputs % 32 == 0 and tiling.tokens >= 16 <= tiling.outputs


def test_tokens_are_taken_together_where_experts_have_many():
    variant = choose((9, 0))
    assert variant.tiling(4, 32) is variant.tiling(64 * 4, 32) is variant.decode
    assert variant.tiling(512 * 4, 32) is variant.tiling(8192 * 4, 128) is variant.prefill
