"""Experts that lie with the host give what experts on the device give, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tests.gpu  # noqa: F401
import torch
from tests.ops import cases

from ossia.ops import Adapted, load
from ossia.ops.offload import HostExperts, OffloadOps

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = load("gpu", dtype="float32")
F, D, E, A = 96, 64, 8, 2


def a_pass(ops, layers, x_TD, logits_TE, adapters=()):
    """x through several layers of experts."""
    if adapters:
        of_rows = np.arange(len(x_TD), dtype=np.int32) % (len(adapters) + 1) - 1
        layers = [Adapted(layer, adapters, of_rows) for layer in layers]
    sums = []
    for layer in layers:
        x_TD = x_TD + ops.moe(x_TD, ops.route(logits_TE, A), layer, 7.0)
        sums.append(x_TD)
    return torch.stack(sums)


@pytest.mark.parametrize(("kind", "num_buffers"), [("mxfp4", 2), ("halves", 1), ("bfloat16", 2)])
def test_passes_of_few_and_many_tokens_give_the_same_bits(kind, num_buffers):
    made = [cases.Moe(f"layer {i}", 5, E, A, D, F, kind).arrays() for i in range(3)]
    ops = OffloadOps(EXACT, [False, True, False], num_buffers)
    host, card = ([each.experts(arrays) for *_, arrays in made] for each in (ops, EXACT))
    assert [isinstance(layer, HostExperts) for layer in host] == [True, False, True]
    x_TD, logits_TE = (torch.from_numpy(one).to(ops.device) for one in made[0][:2])
    # Pairs of token and expert: 10, more than experts; 4, fewer, over what many left behind.
    for num_tokens in (5, 2):
        given = x_TD[:num_tokens], logits_TE[:num_tokens]
        assert torch.equal(a_pass(ops, host, *given), a_pass(EXACT, card, *given))


def test_experts_of_the_host_go_through_adapters():
    x_TD, logits_TE, arrays = cases.Moe("", 3, E, A, D, F).arrays()
    [loras] = cases.Lora("", 3, F, D, (4,), E=E).experts()
    ops = OffloadOps(EXACT, [False], 1)
    given = [torch.from_numpy(one).to(ops.device) for one in (x_TD, logits_TE)]
    held = EXACT.expert_loras(loras)
    met, expected = (a_pass(each, [each.experts(arrays)], *given, (held,)) for each in (ops, EXACT))
    assert torch.equal(met, expected)
    assert not torch.equal(met, a_pass(EXACT, [EXACT.experts(arrays)], *given))


def test_a_pass_that_was_left_amid_its_copies_spoils_nothing():
    made = [cases.Moe(f"layer {i}", 5, E, A, D, F).arrays() for i in range(2)]
    ops = OffloadOps(EXACT, [False] * 2, 2)
    host, card = ([each.experts(arrays) for *_, arrays in made] for each in (ops, EXACT))
    given = [torch.from_numpy(one).to(ops.device) for one in made[0][:2]]
    a_pass(ops, host[:1], *given)
    few = [one[:1] for one in given]
    assert torch.equal(a_pass(ops, host, *few), a_pass(EXACT, card, *few))
    assert torch.equal(a_pass(ops, host, *given), a_pass(EXACT, card, *given))
