"""The differentiable operations: values against the specification, gradients against float64 finite differences."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tests.ops import cases
from torch.autograd import gradcheck

from ossia import _kernels
from ossia.ops import Mxfp4, mxfp4
from ossia.ops import autograd as torch_ops
from ossia.ops.autograd import AutogradOps, Lora
from ossia.ops.cpu import ISAS
from ossia.ops.reference import ReferenceOps
from ossia.train.quantize import fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = ReferenceOps(np.float64)
OPS = AutogradOps(torch.float64)
FULL = AutogradOps(torch.float64, trained=True)
F64 = torch.float64


def assert_close(met: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-12) -> None:
    assert met.shape == expected.shape
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    np.testing.assert_allclose(met.detach().double().numpy(), expected, rtol=0, atol=tolerance * scale)


def variable(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=F64) * scale).requires_grad_()


def pair(rank: int, shape: tuple[int, ...], seed: int = 5) -> Lora:
    *stack, rows, columns = shape
    a, b = variable(*stack, rank, columns, seed=seed).detach(), variable(*stack, rows, rank, seed=seed + 1).detach()
    return Lora(a, b, scaling=0.7)


# Embedding, norm, linear, rope ----------------------------------------------------------------------------------------


def test_embedding_takes_rows_and_learns_by_table_or_by_pair() -> None:
    table = np.random.default_rng(0).standard_normal((9, 6))
    ids = np.array([3, 0, 3, 8], np.int32)
    assert_close(OPS.embed(OPS.embedding(table), torch.from_numpy(ids)), REFERENCE.embed(table, ids))
    full, frozen = FULL.embedding(table), OPS.embedding(table)
    frozen.lora = pair(2, (6, 9))
    delta = frozen.lora.scaling * (frozen.lora.b @ frozen.lora.a).detach().numpy()
    assert_close(OPS.embed(frozen, torch.from_numpy(ids)), table[ids] + delta.T[ids])
    for embedding, parameters in ((full, [full.table_VD]), (frozen, list(frozen.lora.parameters()))):
        assert gradcheck(lambda *_, e=embedding: OPS.embed(e, torch.from_numpy(ids)), parameters)


def test_rms_norm_and_its_gradients() -> None:
    x, scale = variable(5, 12, scale=3), np.random.default_rng(1).standard_normal(12)
    vector = FULL.vector(scale)
    assert_close(OPS.rms_norm(x, vector, 1e-5), REFERENCE.rms_norm(x.detach().numpy(), scale, 1e-5))
    assert gradcheck(lambda *_: OPS.rms_norm(x, vector, 1e-5), [x, vector.value])


@pytest.mark.parametrize("case", cases.LINEAR, ids=str)
def test_linear(case: cases.Linear) -> None:
    x, weight, bias = case.arrays()
    expected = REFERENCE.linear(x.astype(np.float64), REFERENCE.linear_weights(weight, bias))
    assert_close(OPS.linear(torch.from_numpy(x), OPS.linear_weights(weight, bias)), expected)
    single = AutogradOps()
    assert_close(single.linear(torch.from_numpy(x), single.linear_weights(weight, bias)), expected, 1e-5)
    half = AutogradOps(torch.bfloat16)
    assert_close(half.linear(torch.from_numpy(x), half.linear_weights(weight, bias)), expected, 3e-2)


def test_linear_has_the_gradients_of_input_weight_bias_and_pair() -> None:
    x, weight = variable(4, 6), np.random.default_rng(0).standard_normal((5, 6))
    bias = np.random.default_rng(1).standard_normal(5)
    full = FULL.linear_weights(weight, bias)
    assert gradcheck(lambda *_: OPS.linear(x, full), [x, full.weight_OI, full.bias_O])
    frozen = OPS.linear_weights(weight, bias)
    frozen.lora = pair(2, (5, 6))
    assert gradcheck(lambda *_: OPS.linear(x, frozen), [x, *frozen.lora.parameters()])
    merged = weight + frozen.lora.scaling * (frozen.lora.b @ frozen.lora.a).detach().numpy()
    assert_close(OPS.linear(x, frozen), x.detach().numpy() @ merged.T + bias)


def test_frozen_weights_get_no_gradient_and_are_not_copied() -> None:
    weight = np.ones((300, 64), cases.BF16)
    held = AutogradOps().linear_weights(weight)
    assert not list(held.parameters())
    assert held.weight_OI.data_ptr() == weight.__array_interface__["data"][0]


def test_rope_and_its_gradient() -> None:
    x, positions = variable(4, 3, 8), np.array([0, 5, 4000, 131_000], np.int32)
    inv_freq = np.geomspace(1, 1e-4, 4).astype(np.float32)
    angles = OPS.rope_angles(torch.from_numpy(positions), inv_freq, 1.3)
    expected = REFERENCE.rope_angles(positions, inv_freq, 1.3)
    for met, one in zip(angles, expected, strict=True):
        assert_close(met, one)
    assert_close(OPS.rope(x, *angles), REFERENCE.rope(x.detach().numpy(), *expected))
    assert gradcheck(lambda *_: OPS.rope(x, *angles), [x])


# Attention ------------------------------------------------------------------------------------------------------------

SEQUENCES = {
    "T=1": ((1,), None),
    "one sequence": ((7,), None),
    "documents": ((3, 1, 5), None),
    "window of 1": ((4,), 1),
    "window longer than the sequence": ((5,), 8),
    "as long as the window": ((3,), 3),
    "one more than the window": ((4,), 3),
    "two windows": ((6,), 3),
    "two windows and one": ((7,), 3),
    "documents beyond and within the window": ((5, 1, 2, 3), 2),
    "empty document": ((3, 0, 2), None),
}


def packed_batch(lengths: tuple[int, ...]) -> Any:
    case = cases.Attention("", tuple((0, length) for length in lengths if length))
    return dataclasses.replace(case.batch(), query_starts_N1=np.cumsum([0, *lengths]).astype(np.int32))


@pytest.mark.parametrize("name", SEQUENCES)
def test_attention_and_its_gradients(name: str) -> None:
    lengths, window = SEQUENCES[name]
    batch, num_tokens = packed_batch(lengths), sum(lengths)
    q, k, v = variable(num_tokens, 4, 2), variable(num_tokens, 2, 2, seed=1), variable(num_tokens, 2, 2, seed=2)
    sinks = FULL.vector(np.random.default_rng(3).standard_normal(4))
    met = OPS.attention(q, k, v, sinks, None, batch, window)
    whole = dataclasses.replace(batch, query_starts_N1=np.unique(batch.query_starts_N1))
    arrays = [x.detach().numpy() for x in (q, k, v, sinks.value)]
    assert_close(met, REFERENCE.attention(*arrays, None, whole, window))
    inputs = [q, k, v, sinks.value]
    assert gradcheck(lambda *_: OPS.attention(q, k, v, sinks, None, batch, window), inputs)


@pytest.mark.parametrize("window", [None, 16, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_equals_an_eager_softmax_over_scores_and_sink(dtype: torch.dtype, window: int | None) -> None:
    lengths = (150, 40, 300)
    batch, num_tokens = packed_batch(lengths), sum(lengths)
    q, k, v = (variable(num_tokens, heads, 64, seed=i) for i, heads in enumerate((16, 2, 2)))
    sinks = FULL.vector(2 * np.random.default_rng(3).standard_normal(16))
    direction = variable(num_tokens, 16, 64, seed=9).detach()
    wanted = eager_attention(q, k, v, sinks.value, batch.query_starts_N1, window)
    inputs = [q, k, v, sinks.value]
    expected = [wanted, *torch.autograd.grad((wanted * direction).sum(), inputs)]

    ops = AutogradOps(dtype, trained=True)
    half = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    sinks_of = ops.vector(sinks.value.detach().numpy())
    met = ops.attention(*half, sinks_of, None, batch, window)
    gradients = torch.autograd.grad((met * direction.to(dtype)).sum(), [*half, sinks_of.value])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip([met, *gradients], expected, strict=True):
        assert_close(one, other.detach().numpy(), tolerance)


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, starts: Any, window: int | None
) -> torch.Tensor:
    """Scores of everything with everything, the sink as one more column, one softmax."""
    num_tokens, num_heads, head_dim = q.shape
    k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("tqh,jqh->qtj", q, k) / head_dim**0.5
    place = torch.arange(num_tokens)
    document = torch.bucketize(place, torch.as_tensor(starts[1:].astype(np.int64)), right=True)
    distance = place[:, None] - place
    seen = (distance >= 0) & (document[:, None] == document)
    if window is not None:
        seen &= distance < window
    scores = scores.masked_fill(~seen, -torch.inf)
    columns = torch.cat([scores, sinks[:, None, None].expand(-1, num_tokens, 1)], dim=-1)
    return torch.einsum("qtj,jqh->tqh", columns.softmax(dim=-1)[..., :-1], v)


@pytest.mark.parametrize("window", [None, 128])
def test_attention_by_matrix_products_equals_that_of_the_kernel(window: int | None, monkeypatch: Any) -> None:
    batch = packed_batch((600, 30))
    inputs = [variable(630, heads, 16, seed=i) for i, heads in enumerate((4, 2, 2))]
    sinks = FULL.vector(np.array([0.5, -1, 2, 0]))
    direction = variable(630, 4, 16, seed=9).detach()

    def run() -> list[torch.Tensor]:
        out = OPS.attention(*inputs, sinks, None, batch, window)
        return [out, *torch.autograd.grad((out * direction).sum(), [*inputs, sinks.value])]

    expected = run()
    monkeypatch.setattr(torch_ops, "_scores_forward", torch_ops.blocked_forward)
    monkeypatch.setattr(torch_ops, "_scores_backward", torch_ops.blocked_backward)
    for met, one in zip(run(), expected, strict=True):
        assert_close(met, one.detach().numpy())


def test_a_key_just_outside_the_window_has_no_influence_and_one_just_inside_has() -> None:
    batch = packed_batch((40,))
    q, k, v = variable(40, 2, 8), variable(40, 1, 8, seed=1), variable(40, 1, 8, seed=2)
    sinks = OPS.vector(np.zeros(2))
    out = OPS.attention(q, k, v, sinks, None, batch, 16)
    dk, dv = torch.autograd.grad(out[30].sum(), [k, v])
    seen = (dv.abs().sum(dim=(1, 2)) > 0).nonzero()[:, 0].tolist()
    assert seen == list(range(15, 31))
    assert (dk.abs().sum(dim=(1, 2)) > 0).nonzero()[:, 0].tolist() == seen


def test_attention_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    sizes: list[int] = []

    def kept(num_tokens: int, window: int | None) -> int:
        sizes.clear()
        q, k, v = variable(num_tokens, 4, 8), variable(num_tokens, 1, 8), variable(num_tokens, 1, 8)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            OPS.attention(q, k, v, OPS.vector(np.zeros(4)), None, packed_batch((num_tokens,)), window)
        return sum(sizes)

    for window in (None, 32):
        assert kept(2048, window) < 2.1 * kept(1024, window)


# Routing and experts --------------------------------------------------------------------------------------------------


def test_route_breaks_ties_by_lower_index_and_weighs_the_chosen_alone() -> None:
    logits = np.array([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0], [5, -1, 4, 4, 2]])
    met, expected = OPS.route(torch.from_numpy(logits), 3), REFERENCE.route(logits, 3)
    np.testing.assert_array_equal(met.experts_TA.numpy(), expected.experts_TA)
    assert_close(met.weights_TA, expected.weights_TA)


def test_replayed_experts_are_used_and_weighed_by_the_logits_of_now() -> None:
    logits = variable(2, 5)
    chosen = torch.tensor([[4, 0], [1, 2]])
    routing = OPS.replay(logits, chosen)
    assert (routing.experts_TA == chosen).all()
    expected = torch.softmax(logits.gather(1, chosen), dim=-1).detach().numpy()
    assert_close(routing.weights_TA, expected)
    assert gradcheck(lambda x: OPS.replay(x, chosen).weights_TA, [logits])


@pytest.mark.parametrize("case", cases.MOE, ids=str)
def test_moe(case: cases.Moe) -> None:
    x, logits, arrays = case.arrays()
    expected = REFERENCE.moe(
        x.astype(np.float64), REFERENCE.route(logits.astype(np.float64), case.A), REFERENCE.experts(arrays), case.limit
    )
    routing = OPS.route(torch.from_numpy(logits).double(), case.A)
    for ops in (OPS, FULL):
        with np.errstate(over="ignore"):
            assert_close(ops.moe(torch.from_numpy(x).double(), routing, ops.experts(arrays), case.limit), expected)
    single = AutogradOps()
    met = single.moe(
        torch.from_numpy(x), routing._replace(weights_TA=routing.weights_TA.float()), single.experts(arrays), case.limit
    )
    assert_close(met, expected, 1e-5)


GRADIENT_CASES = {
    "mxfp4": ("mxfp4", False),
    "gguf order": ("halves", False),
    "float32": ("float32", False),
    "trained": ("float32", True),
    "trained, from mxfp4": ("mxfp4", True),
}


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kind", GRADIENT_CASES)
def test_moe_has_the_gradients_of_everything_that_may_learn(kind: str, keeps: bool) -> None:
    matrices, is_trained = GRADIENT_CASES[kind]
    # One expert of four gets no token.
    case = cases.Moe("", 3, 4, 2, 32, 32, matrices, scales=(122, 125), few=3)
    x, logits, arrays = case.arrays()
    ops = AutogradOps(F64, trained=is_trained, keep_experts=keeps)
    experts = ops.experts(arrays)
    if not is_trained:
        experts.gate_up_lora, experts.down_lora = pair(1, (4, 64, 32)), pair(2, (4, 32, 32), seed=8)
    x_TD = torch.from_numpy(x).double().requires_grad_()
    logits_TE = torch.from_numpy(logits).double()
    chosen = OPS.route(logits_TE, 2).experts_TA
    weights = OPS.route(logits_TE, 2).weights_TA.detach().requires_grad_()

    def run(*_: Any) -> torch.Tensor:
        return ops.moe(x_TD, torch_ops.Routing(chosen, weights), experts, 7.0)

    parameters = list(experts.parameters())
    assert parameters
    assert gradcheck(run, [x_TD, weights, *parameters], fast_mode=True)


@pytest.mark.parametrize("keeps", [True, False])
def test_moe_has_every_single_gradient(keeps: bool) -> None:
    x, logits, arrays = cases.Moe("", 2, 3, 2, 2, 3, "float32").arrays()
    ops = AutogradOps(F64, trained=True, keep_experts=keeps)
    experts = ops.experts(arrays)
    experts.gate_up_lora, experts.down_lora = pair(1, (3, 6, 2)), pair(1, (3, 2, 3), seed=8)
    x_TD, logits_TE = torch.from_numpy(x).double().requires_grad_(), torch.from_numpy(logits).double().requires_grad_()

    def run(*_: Any) -> torch.Tensor:
        return ops.moe(x_TD, ops.route(logits_TE, 2), experts, 7.0)

    assert gradcheck(run, [x_TD, logits_TE, *experts.parameters()])


@pytest.mark.parametrize("piece", [1 << 17, 1 << 11])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("matrices", ["mxfp4", "halves", "bfloat16"])
def test_under_rounding_experts_multiply_with_the_rounded_sum_and_learn_straight_through(
    matrices: str, keeps: bool, piece: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch_ops, "_ROUNDED_NUMBERS_CPU", piece)
    x, logits, arrays = cases.Moe("", 5, 4, 2, 64, 32, matrices, few=3).arrays()
    base = FULL.experts(arrays)
    chosen = OPS.route(torch.from_numpy(logits).double(), 2).experts_TA
    gate_up, down = pair(2, (4, 64, 64)), pair(2, (4, 64, 32), seed=8)
    weights_TA = variable(5, 2, seed=1)
    variables = [torch.from_numpy(x).double().requires_grad_(), weights_TA, gate_up.a, gate_up.b, down.a, down.b]
    g_TD = variable(5, 64, seed=2).detach()

    def by_hand(rounded: Any) -> torch.Tensor:
        out_TD = torch.zeros_like(g_TD)
        for token, row in enumerate(chosen):
            for slot, expert in enumerate(row):
                first = rounded(base.gate_up_EFD[expert].detach() + 0.7 * gate_up.b[expert] @ gate_up.a[expert])
                second = rounded(base.down_EDF[expert].detach() + 0.7 * down.b[expert] @ down.a[expert])
                pre = variables[0][token] @ first.T + base.gate_up_bias_EF[expert].detach()
                out = torch_ops._swiglu(pre, 7.0) @ second.T + base.down_bias_ED[expert].detach()
                out_TD = out_TD.index_add(0, torch.tensor([token]), weights_TA[token, slot] * out[None])
        return out_TD

    ops = AutogradOps(F64, keep_experts=keeps, fake_quant=fake_quantize)
    experts = ops.experts(arrays)
    experts.gate_up_lora, experts.down_lora = gate_up, down
    met = ops.moe(variables[0], torch_ops.Routing(chosen, weights_TA), experts, 7.0)
    expected = by_hand(fake_quantize)
    assert_close(met, expected.detach().numpy())
    assert (by_hand(lambda sum_OI: sum_OI) - expected).abs().max() > 0.01 * expected.abs().max(), "rounding is seen"
    for one, other in zip(
        torch.autograd.grad(met, variables, g_TD), torch.autograd.grad(expected, variables, g_TD), strict=True
    ):
        assert other.abs().max() > 0
        assert_close(one, other.numpy())


def test_what_lies_on_the_grid_and_has_no_pair_is_the_same_under_rounding() -> None:
    x, logits, arrays = cases.Moe("", 5, 4, 2, 64, 32).arrays()
    routing = OPS.route(torch.from_numpy(logits).double(), 2)
    rounding = AutogradOps(F64, fake_quant=fake_quantize)
    outs = [ops.moe(torch.from_numpy(x).double(), routing, ops.experts(arrays), 7.0) for ops in (OPS, rounding)]
    assert torch.equal(*outs)


def test_swiglu_has_no_gradient_beyond_its_limits() -> None:
    pre = torch.tensor([[8.0, 6, 1, 1, 8.0, 6, -8, 0]], dtype=F64, requires_grad=True)
    out = torch_ops._swiglu(pre, 7.0)
    (gradient,) = torch.autograd.grad(out.sum(), pre)
    gate, up = gradient[0].chunk(2)
    assert [bool(g) for g in gate != 0] == [False, True, True, True]
    assert [bool(u) for u in up != 0] == [False, True, False, True]
    assert gradcheck(lambda x: torch_ops._swiglu(x, 7.0), [pre])
    inner, slope_gate, slope_up = torch_ops._swiglu_slopes(pre.detach(), 7.0)
    assert torch.equal(inner, out)
    torch.testing.assert_close(torch.cat([slope_gate, slope_up], dim=1), gradient)


@pytest.mark.parametrize("order", ["pairs", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("isa", [None, *(isa for isa in ISAS if _kernels.has_isa(isa))])
def test_every_code_under_every_scale_becomes_its_number(dtype: torch.dtype, order: Any, isa: str | None) -> None:
    # Byte b of the blocks holds the codes b & 15 and b >> 4: 16 bytes a block, 16 blocks, 256 scales.
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 256, 16, 16))
    scales = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 16))[None]
    context = _kernels.Context(isa, 2) if isa else None
    packed = torch_ops.Packed(Mxfp4(blocks, scales, order), torch.device("cpu"), context)
    out = torch.empty(256, 512, dtype=dtype)
    packed.dequantize(0, out)
    expected = mxfp4.dequantize(Mxfp4(blocks[0], scales[0], order), np.float64)
    if dtype != F64:
        # Numbers beyond the largest of the dtype.
        expected = torch.from_numpy(expected).to(dtype).double().numpy()
    np.testing.assert_array_equal(out.double().numpy(), expected)
    # Zeros keep their signs.
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.signbit(out.double().numpy())[finite], np.signbit(expected)[finite])


# Log-probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["frozen", "trained", "pair"])
def test_logprobs_and_their_gradients_are_those_of_a_log_softmax(
    kind: str, temperature: float, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch_ops, "_VOCAB_ROWS", 5)
    monkeypatch.setattr(torch_ops, "_LOGIT_ROWS", 3)
    ops = FULL if kind == "trained" else OPS
    head = ops.linear_weights(np.random.default_rng(0).standard_normal((17, 6)) * 2)
    if kind == "pair":
        head.lora = pair(2, (17, 6))
    x, targets = variable(7, 6), torch.tensor([0, 16, 4, 5, 9, 10, 16])

    def eager() -> torch.Tensor:
        return (OPS.linear(x, head) / temperature).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]

    inputs = [x, *head.parameters()]
    met, expected = ops.logprobs(x, head, targets, temperature), eager()
    assert_close(met, expected.detach().numpy())
    direction = variable(7, seed=4).detach()
    for one, other in zip(
        torch.autograd.grad((met * direction).sum(), inputs),
        torch.autograd.grad((expected * direction).sum(), inputs),
        strict=True,
    ):
        assert_close(one, other.numpy())
    assert gradcheck(lambda *_: ops.logprobs(x, head, targets, temperature), inputs)


def test_logprobs_of_large_logits_do_not_overflow() -> None:
    ops = AutogradOps()
    head = ops.linear_weights(np.array([[1000.0], [-1000.0], [999.0]], np.float32))
    logprobs = ops.logprobs(torch.tensor([[1.0], [1.0]]), head, torch.tensor([0, 1]))
    np.testing.assert_allclose(logprobs.numpy(), [-0.3132617, -2000.3132617], rtol=1e-6)
