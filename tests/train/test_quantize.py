"""Training under MXFP4 sees the very numbers that an export writes, and learns straight through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ossia.errors import InputError
from ossia.ops import Mxfp4
from ossia.ops.mxfp4 import dequantize, pack_codes, quantize
from ossia.train import quantize as train_quantize
from ossia.train.quantize import fake_quantize

KINDS = ["normal", "heavy", "tiny", "huge", "coarse", "zeros", "subnormal", "one large"]


def numbers(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    shape = (3, 40, 96)
    return {
        "normal": lambda: random.standard_normal(shape) * 0.02,
        "heavy": lambda: random.standard_t(2, shape),
        "tiny": lambda: random.standard_normal(shape) * 1e-37,
        "huge": lambda: random.standard_normal(shape) * 5e37,
        "coarse": lambda: random.integers(-16, 17, shape) / 8,
        "zeros": lambda: np.zeros(shape) * np.where(random.integers(0, 2, shape), 1.0, -1.0),
        "subnormal": lambda: random.standard_normal(shape) * 1e-40,
        "one large": lambda: np.where(np.arange(96) % 32 == 0, random.uniform(4, 5, shape), 0.25),
    }[kind]().astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["floor", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_forward_pass_sees_exactly_what_an_export_writes(dtype, rule, kind):
    weight = torch.from_numpy(numbers(kind)).to(dtype)
    got = fake_quantize(weight, rule)
    wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
    want = dequantize(quantize(wide, rule), wide.dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.to(torch.from_numpy(want).dtype).numpy(), want)
    np.testing.assert_array_equal(np.signbit(got.double().numpy()), np.signbit(want))


def test_both_rules_are_exercised_by_those_numbers():
    assert any(
        (quantize(numbers(kind), "floor").scales != quantize(numbers(kind), "best").scales).any() for kind in KINDS
    )
    assert (quantize(numbers("one large"), "best").scales < quantize(numbers("one large"), "floor").scales).any()
    assert (quantize(numbers("normal"), "best").scales > quantize(numbers("normal"), "floor").scales).any()


def test_the_gradient_passes_straight_through():
    weight = torch.from_numpy(numbers("normal")).requires_grad_()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    fake_quantize(weight).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_a_weight_that_cannot_be_written_exactly_still_learns_towards_its_target():
    # No step of the grid is as small as one of these updates, and yet they add up.
    weight = torch.full((1, 32), 0.1, requires_grad=True)
    target = torch.linspace(-1, 1, 32)
    optimizer = torch.optim.SGD([weight], lr=0.002)
    losses = []
    for _ in range(1000):
        optimizer.zero_grad()
        loss = ((fake_quantize(weight) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 10 and losses[-1] < 0.3, "as near as the grid allows"


def test_what_is_on_the_grid_stays_what_it_is():
    random = np.random.default_rng(0)
    matrix = Mxfp4(
        pack_codes(random.integers(0, 16, (4, 3, 32)).astype(np.uint8)), random.integers(1, 252, (4, 3), np.uint8)
    )
    weight = torch.from_numpy(dequantize(matrix))
    assert torch.equal(fake_quantize(weight), weight)


def test_pieces_of_a_large_matrix_are_rounded_as_the_whole(monkeypatch):
    weight = torch.from_numpy(numbers("heavy"))
    whole = fake_quantize(weight)
    monkeypatch.setattr(train_quantize, "_CHUNK_VALUES", 64)
    assert torch.equal(fake_quantize(weight), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_becomes_nan_as_in_numpy(bad):
    weight = torch.ones(1, 64)
    weight[0, 3] = bad
    got = fake_quantize(weight)
    assert got[0, :32].isnan().all() and torch.equal(got[0, 32:], weight[0, 32:])


def test_a_row_that_is_no_multiple_of_the_block_is_refused_with_its_shape():
    with pytest.raises(InputError, match=r"multiple of 32.*\(2, 33\)"):
        fake_quantize(torch.zeros(2, 33))
