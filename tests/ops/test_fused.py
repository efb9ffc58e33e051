"""The kernels between training's matrix products against the same operations in torch, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.ops import cases
from torch import Tensor

from ossia import _kernels
from ossia.ops.autograd import AutogradOps, Plain
from ossia.ops.cpu import ISAS
from ossia.ops.fused import Fused

PLAIN = Plain()
LIMIT = 7.0
# Half of the last bit of a result's numbers, and what float32 loses on the way to it, as a share of the largest.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}

usable = pytest.mark.parametrize("isa", [isa for isa in ISAS if _kernels.has_isa(isa)])
widths = pytest.mark.parametrize("width", [1, 7, 16, 33, 192])
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def fused(isa: str) -> Fused:
    return Fused(_kernels.Context(isa, 2))


def numbers(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_close(met: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """``expected`` is in float64; ``dtype`` that of the result, or of what it was made of."""
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(met.double(), expected, rtol=0, atol=TOLERANCE[dtype] * largest)


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


@usable
@pytest.mark.parametrize("width", [7, 16, 33, 192])  # of one number the norm has no slope but by eps
@pytest.mark.parametrize("num_tokens", [0, 1, 65, 300])
def test_rms_norm_and_its_gradients_are_those_of_torch(isa: str, width: int, num_tokens: int) -> None:
    x, g, scale = numbers(num_tokens, width, scale=3), numbers(num_tokens, width, seed=1), numbers(width, seed=2)
    assert_close(fused(isa).rms_norm(x, scale, 1e-5), PLAIN.rms_norm(*double(x, scale), 1e-5))
    met = fused(isa).rms_norm_backward(g, x, scale, 1e-5)
    for one, expected in zip(met, PLAIN.rms_norm_backward(*double(g, x, scale), 1e-5), strict=True):
        assert_close(one, expected)


@usable
@dtypes
@pytest.mark.parametrize("head_dim", [2, 14, 32, 64])
def test_rope_is_that_of_torch_and_turns_back(isa: str, dtype: torch.dtype, head_dim: int) -> None:
    x, angles = numbers(33, 5, head_dim, dtype=dtype), numbers(33, head_dim // 2, seed=1, scale=9)
    cos, sin = angles.cos(), angles.sin()
    turned = fused(isa).rope(x, cos, sin)
    assert turned.dtype == dtype
    assert_close(turned, PLAIN.rope(*double(x, cos, sin)), dtype)
    assert_close(fused(isa).rope(turned.float(), cos, -sin), x.double(), dtype)


SEQUENCES = {
    "one token": ([0, 1], None),
    "one sequence over tiles of queries": ([0, 77], None),
    "documents, one of them empty": ([0, 33, 33, 34, 100], None),
    "window of one": ([0, 40], 1),
    "window": ([0, 90, 93], 17),
    "window longer than a tile": ([0, 150], 70),
    "window longer than the sequence": ([0, 20], 64),
    "no tokens": ([0, 0], None),
}


@usable
@dtypes
@pytest.mark.parametrize("head_dim", [2, 32, 40])
@pytest.mark.parametrize("name", SEQUENCES)
def test_attention_and_its_gradients_are_those_of_torch(isa: str, dtype: torch.dtype, head_dim: int, name: str) -> None:
    starts, window = SEQUENCES[name]
    q, g = (numbers(starts[-1], 6, head_dim, seed=seed, dtype=dtype) for seed in (0, 1))
    k, v = (numbers(starts[-1], 2, head_dim, seed=seed, scale=2, dtype=dtype) for seed in (2, 3))
    sinks = numbers(6, seed=4, scale=3)
    met = fused(isa).attention(q, k, v, sinks, starts, window)
    expected = PLAIN.attention(*double(q, k, v, sinks), starts, window)
    assert met[0].dtype == dtype
    assert_close(met[0], expected[0], dtype)
    assert_close(met[1], expected[1])
    out, lse = expected[0].to(dtype), expected[1].float()
    slopes = fused(isa).attention_backward(g, q, k, v, sinks, out, lse, starts, window)
    expected_slopes = PLAIN.attention_backward(*double(g, q, k, v, sinks, out, lse), starts, window)
    assert [each.dtype for each in slopes] == [dtype] * 3 + [torch.float32]
    for one, each in zip(slopes, expected_slopes, strict=True):
        # A key that one query sees alone has the difference of two equal numbers for its slope.
        size = torch.maximum(each.abs().max(), g.double().abs().max()) if each.numel() else torch.tensor(0.0)
        torch.testing.assert_close(one.double(), each, rtol=0, atol=4 * TOLERANCE[dtype] * size.item())


@usable
def test_attention_with_large_scores_or_sinks_does_not_overflow(isa: str) -> None:
    q, k, v = numbers(40, 2, 16, scale=100), numbers(40, 1, 16, seed=1, scale=100), numbers(40, 1, 16, seed=2)
    for sinks in (torch.tensor([1e4, -1e4]), torch.zeros(2)):
        met = fused(isa).attention(q, k, v, sinks, [0, 40], None)
        for one, expected in zip(met, PLAIN.attention(*double(q, k, v, sinks), [0, 40], None), strict=True):
            torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=1e-4)


def gates_at_the_limits(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    gate_up = numbers(num_rows, 2 * width, scale=4, dtype=dtype)
    for i, special in enumerate((LIMIT, -LIMIT, 7.25, -7.25, 100.0, -100.0, 1e30, -1e30, 0.0)):
        gate_up[i % num_rows, i % (2 * width)] = special
        gate_up[(i + 1) % num_rows, -1 - i % (2 * width)] = special
    return gate_up


@usable
@dtypes
@widths
@pytest.mark.parametrize("num_rows", [1, 19, 400])
def test_swiglu_and_its_gradients_are_those_of_torch(isa: str, dtype: torch.dtype, width: int, num_rows: int) -> None:
    gate_up, dinner = gates_at_the_limits(num_rows, width, dtype), numbers(num_rows, width, seed=1, dtype=dtype)
    weights = numbers(num_rows, seed=2).abs()
    inner = fused(isa).swiglu(gate_up, LIMIT)
    assert inner.dtype == dtype
    assert_close(inner, PLAIN.swiglu(gate_up.double(), LIMIT), dtype)
    dpre, dots = fused(isa).swiglu_backward(gate_up, dinner, weights, LIMIT)
    expected_dpre, expected_dots = PLAIN.swiglu_backward(*double(gate_up, dinner, weights), LIMIT)
    assert dpre.dtype == dtype
    assert_close(dpre, expected_dpre, dtype)
    # What goes into a dot product is not rounded to bfloat16.
    assert_close(dots, expected_dots)


@usable
def test_swiglu_keeps_nan(isa: str) -> None:
    gate_up, ones = torch.zeros(2, 40), torch.ones(2, 20)
    gate_up[0, 3] = gate_up[1, 39] = torch.nan
    expected = torch.zeros(2, 20, dtype=torch.bool)
    expected[0, 3] = expected[1, 19] = True
    assert torch.equal(fused(isa).swiglu(gate_up, LIMIT).isnan(), expected)
    dpre, dots = fused(isa).swiglu_backward(gate_up, ones, torch.ones(2), LIMIT)
    assert dpre[0, 3].isnan() and dpre[1, 19].isnan() and dots.isnan().all()
    half = fused(isa).swiglu(gate_up.bfloat16(), LIMIT)
    assert torch.equal(half.isnan(), expected)


@usable
@widths
@pytest.mark.parametrize(("num_indices", "num_rows"), [(0, 0), (0, 16), (5, 5), (17, 32), (300, 304)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_taken_and_added_as_torch_does(
    isa: str, width: int, num_indices: int, num_rows: int, weighted: bool
) -> None:
    indices = torch.randperm(311, generator=torch.Generator().manual_seed(3))[:num_indices]
    weights = numbers(num_indices, seed=4) if weighted else None
    wide = None if weights is None else weights.double()
    for source_dtype in TOLERANCE:
        source = numbers(311, width, dtype=source_dtype)
        for dtype in TOLERANCE:
            met = fused(isa).take_rows(source, indices, num_rows, dtype, weights)
            assert met.dtype == dtype
            assert_close(met, PLAIN.take_rows(source.double(), indices, num_rows, torch.float64, wide), dtype)
        rows, out = numbers(num_rows, width, seed=5, dtype=source_dtype), numbers(311, width, seed=6)
        expected = out.double()
        PLAIN.add_rows(expected, indices, rows.double(), wide)
        fused(isa).add_rows(out, indices, rows, weights)
        assert_close(out, expected)


def test_a_number_is_rounded_to_bfloat16_as_torch_rounds_it() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 4_000, dtype=np.uint32)
    bits[:6] = (0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001)
    source = torch.from_numpy(bits.view(np.float32))[:, None].repeat(1, 17)
    expected = source.bfloat16()
    for isa in ISAS:
        if not _kernels.has_isa(isa):
            continue
        met = fused(isa).take_rows(source, torch.arange(len(source)), len(source), torch.bfloat16)
        torch.testing.assert_close(met, expected, rtol=0, atol=0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("trained", [True, False], ids=["full", "frozen"])
def test_experts_learn_the_same_by_kernels_and_by_torch(dtype: torch.dtype, keeps: bool, trained: bool) -> None:
    # One expert of five gets no token.
    x, logits, arrays = cases.Moe("", 45, 5, 2, 64, 96, few=4, gain=3.0).arrays()
    results: list[list[Tensor]] = []
    for by_torch in (False, True):
        ops = AutogradOps(dtype, trained=trained, keep_experts=keeps)
        if by_torch:
            ops._elementwise = Plain()
        experts = ops.experts(arrays)
        x_TD, logits_TE = (torch.from_numpy(array).requires_grad_() for array in (x, logits))
        out_TD = ops.moe(x_TD, ops.route(logits_TE, 2), experts, LIMIT)
        learners = [x_TD, logits_TE, *experts.parameters()]
        results.append([out_TD.detach(), *torch.autograd.grad(out_TD, learners, numbers(*x.shape, seed=3))])
    for met, expected in zip(*results, strict=True):
        assert_close(met, expected.double(), dtype)


def test_rows_that_do_not_fit_are_refused() -> None:
    kernels = fused(_kernels.best_isa())
    rows: Any = numbers(4, 8)
    with pytest.raises(ValueError, match="an index is outside the rows"):
        kernels.take_rows(rows, torch.tensor([4]), 1, torch.float32)
    with pytest.raises(ValueError, match="an index is outside the rows"):
        kernels.add_rows(rows, torch.tensor([-1]), numbers(1, 8))
    with pytest.raises(ValueError, match="every index needs a weight"):
        kernels.take_rows(rows, torch.tensor([1, 2]), 2, torch.float32, numbers(3))
    with pytest.raises(ValueError, match="shapes differ"):
        kernels.add_rows(rows, torch.tensor([1, 2]), numbers(1, 8))
    with pytest.raises(ValueError, match="shapes differ"):
        kernels.swiglu_backward(rows, numbers(4, 5), numbers(4), LIMIT)
    with pytest.raises(ValueError, match="shapes differ"):
        kernels.rope(numbers(3, 2, 4), numbers(2, 2), numbers(2, 2))
