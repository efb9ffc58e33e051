"""The Triton kernels against the specification: compiled on a card, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tests.gpu  # noqa: F401
import torch
from tests.ops import cases
from torch import Tensor

from ossia.ops import Adapted, ExpertArrays, Mxfp4, Routing, load, mxfp4
from ossia.ops.gpu import Linear
from ossia.ops.reference import ReferenceOps
from ossia.ops.triton.choice import INTERPRETED, choose

# The exponential of a very negative gate is infinite, and its sigmoid then 0, as it should be.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
REFERENCE = ReferenceOps(np.float64)
EXACT = load("gpu", dtype="float32")
# Operands of 16 bits: 8 bits of mantissa, or 11.
HALVES = {"bfloat16": load("gpu", dtype="bfloat16"), "float16": load("gpu", dtype="float16")}
BY_VARIANT = {
    name: load("gpu", variant=dataclasses.replace(INTERPRETED, name=name, unpacking=name, dtype="bfloat16"))
    for name in ("registers", "sums", "dot_scaled")
}

# Without a card the tiles of all of them are tried.
GENERATIONS = [torch.cuda.get_device_capability()] if torch.cuda.is_available() else [(7, 5), (8, 0), (9, 0), (10, 0)]


def quickly(table: list[Any], *names: str) -> list[Any]:
    """The cases of a table; only the named ones are run by `make test`, since the interpreter takes its time."""
    return [pytest.param(case, id=str(case), marks=() if case.why in names else pytest.mark.slow) for case in table]


def on_device(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(values, order="C")).to(EXACT.device)


def numbers(met: Tensor) -> np.ndarray:
    return met.double().cpu().numpy()


def assert_close(met: Tensor | np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """The largest error, measured by the root mean square of what is expected."""
    met = numbers(met) if isinstance(met, Tensor) else met
    assert met.shape == expected.shape
    assert np.abs(met - expected).max() / (root_mean_square(expected) + 1e-30) < tolerance


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


# Linear --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.LINEAR, ids=str)
def test_linear(case: cases.Linear) -> None:
    x, weight, bias = case.arrays()
    expected = REFERENCE.linear(x.astype(np.float64), REFERENCE.linear_weights(weight, bias))
    for ops, tolerance in ((EXACT, 2e-5), (HALVES["bfloat16"], 0.05), (HALVES["float16"], 0.01)):
        met = ops.linear(on_device(x), ops.linear_weights(weight, bias))
        assert_close(met, expected, tolerance * case.outliers)


# Mixture of experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", quickly(cases.MOE, *(case.why for case in cases.MOE if case.T < 1000)))
def test_moe(case: cases.Moe) -> None:
    assert_moe(EXACT, case, 3e-5)


@pytest.mark.parametrize("case", quickly(cases.MOE, "T=2", "float32, odd sizes"))
@pytest.mark.parametrize("kind", [*BY_VARIANT, "float16"])
def test_moe_in_16_bits(case: cases.Moe, kind: str) -> None:
    if kind == "float16":
        if case.gain > 1 or case.scales[1] > 127:
            pytest.skip("made of numbers beyond float16")
        assert_moe(HALVES["float16"], case, 0.02 * case.outliers)
    else:
        assert_moe(BY_VARIANT[kind], case, 0.1 * case.outliers)


@pytest.mark.parametrize("capability", GENERATIONS, ids=str)
@pytest.mark.parametrize(("num_tokens", "kind"), [(3, "decode"), (130, "prefill")])
def test_moe_in_the_tiles_of_each_card_where_nothing_fills_them(
    capability: tuple[int, int], num_tokens: int, kind: str
) -> None:
    variant = choose(capability)
    assert variant.tiling(num_tokens, 2) is getattr(variant, kind)
    for case in (cases.Moe("", num_tokens, 2, 1, 96, 32), cases.Moe("", num_tokens, 2, 1, 45, 37, "float32")):
        assert_moe(load("gpu", variant=variant), case, 0.02 if variant.dtype == "float16" else 0.1)


@pytest.mark.parametrize("unpacking", ["registers", "sums", "dot_scaled"])
@pytest.mark.parametrize("order", ["pairs", "halves"])
def test_every_code_and_scale_is_multiplied_exactly(order: str, unpacking: str) -> None:
    """Each of the 16 codes at each of the 32 places of a block, times scales from one end to the other."""
    codes = np.zeros((9, 32, 32), np.uint8)
    codes[:, np.arange(32), np.arange(32)] = np.arange(32) % 16
    scales = np.array([0, 1, 64, 127, 128, 200, 250, 254, 255], np.uint8)
    down = Mxfp4(mxfp4.pack_codes(codes[:, :, None], order), np.repeat(scales[:, None, None], 32, 1), order)
    # gate = 7 and up = 0: h is 7 sigmoid(11.9) for all, in 16 bits 6.96875.
    zero = np.zeros((9, 32), np.float32)
    arrays = ExpertArrays(
        np.zeros((9, 32, 32), np.float32), np.zeros((9, 32, 32), np.float32), down, zero + 7, zero, zero
    )
    routing = Routing(on_device(np.arange(9, dtype=np.int32)[:, None]), on_device(np.ones((9, 1), np.float32)))
    ops = BY_VARIANT[unpacking]
    met = ops.moe(on_device(zero), routing, ops.experts(arrays), 7.0).cpu().numpy()
    values = mxfp4.E2M1_VALUES[np.arange(32) % 16].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (np.float64(6.96875) * values * 2.0 ** (scales.astype(np.float64) - 127)[:, None]).astype(np.float32)
        # A weight beyond the largest bfloat16 is infinite, as is the product of one.
        expected[scales == 255] = np.nan
    # The interpreter writes a bfloat16 below 2^-126 as zero.
    np.testing.assert_allclose(met, expected, rtol=1e-2, atol=7e-38)


# Adapters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.LORA, ids=str)
def test_linear_with_adapters(case: cases.Lora) -> None:
    x, weight, bias = cases.Linear("", case.T, case.O, case.I).arrays()
    lora_T, pairs = case.lora_T(), case.pairs()
    held = EXACT.linear_weights(weight, bias)
    met = EXACT.linear(on_device(x), Adapted(held, tuple(p and EXACT.lora(p) for p in pairs), lora_T))
    change = tuple(p and REFERENCE.lora(p) for p in pairs)
    adapted = Adapted(REFERENCE.linear_weights(weight, bias), change, lora_T)
    assert_close(met, REFERENCE.linear(x.astype(np.float64), adapted), 2e-5)
    without = EXACT.linear(on_device(x), held)
    np.testing.assert_array_equal(met[lora_T < 0].cpu(), without[lora_T < 0].cpu())


@pytest.mark.parametrize("case", cases.EXPERT_LORA, ids=str)
def test_moe_with_adapters(case: cases.Lora) -> None:
    # Published experts where the sizes are whole blocks, and the tokens few, since the interpreter takes its time.
    kind = "float32" if case.T > 100 or case.I % 32 or case.O % 32 else "mxfp4"
    x, logits, arrays = cases.Moe("", case.T, case.E, case.A, case.I, case.O, kind).arrays()
    lora_T, loras = case.lora_T(), case.experts()
    # One that has only some of the three.
    loras[0] = loras[0]._replace(up=None)
    routing = REFERENCE.route(logits.astype(np.float64), case.A)
    on_card = Routing(on_device(routing.experts_TA), on_device(routing.weights_TA.astype(np.float32)))
    held = tuple(one and EXACT.expert_loras(one) for one in loras)
    met = EXACT.moe(on_device(x), on_card, Adapted(EXACT.experts(arrays), held, lora_T), 7.0)
    change = tuple(one and REFERENCE.expert_loras(one) for one in loras)
    expected = REFERENCE.moe(x.astype(np.float64), routing, Adapted(REFERENCE.experts(arrays), change, lora_T), 7.0)
    assert_close(met, expected, 5e-5)


def test_embedding_with_adapters() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((50, 45)).astype(cases.BF16)
    ids, lora_T = rng.integers(0, 50, 9).astype(np.int32), np.array([0, 0, -1, 1, 1, 1, 2, -1, 0], np.int32)
    pairs = [cases.Lora("", 1, 45, 50, (rank,)).pairs()[0] for rank in (3, 4)]
    met = EXACT.embed(Adapted(EXACT.embedding(table), (*map(EXACT.lora, pairs), None), lora_T), ids)
    expected = REFERENCE.embed(Adapted(table, (*map(REFERENCE.lora, pairs), None), lora_T), ids)
    np.testing.assert_allclose(met.cpu(), expected, rtol=1e-5, atol=1e-5)


def assert_moe(ops: Any, case: cases.Moe, tolerance: float) -> None:
    x, logits, arrays = case.arrays()
    routing = REFERENCE.route(logits.astype(np.float64), case.A)
    held = Routing(on_device(routing.experts_TA), on_device(routing.weights_TA.astype(np.float32)))
    met = ops.moe(on_device(x), held, ops.experts(arrays), case.limit)
    expected = REFERENCE.moe(x.astype(np.float64), routing, REFERENCE.experts(arrays), case.limit)
    assert_close(met, expected, tolerance)


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
def test_attention(case: cases.Attention) -> None:
    assert_close(attend(EXACT, case), attend(REFERENCE, case), 2e-5)


@pytest.mark.parametrize("case", quickly(cases.ATTENTION, "decode", "window of 1", "odd group and head dim"))
def test_attention_in_16_bits(case: cases.Attention) -> None:
    for ops in HALVES.values():
        assert_close(attend(ops, case), attend(REFERENCE, case), 0.03)


@pytest.mark.parametrize("capability", GENERATIONS, ids=str)
@pytest.mark.parametrize("window", [None, 32])
def test_attention_in_the_tiles_and_splits_of_each_card(capability: tuple[int, int], window: int | None) -> None:
    case = cases.Attention("", ((300, 1), (0, 20), (33, 1)), window, Q=6, K=2, H=10)
    assert_close(attend(load("gpu", variant=choose(capability)), case), attend(REFERENCE, case), 0.03)


def attend(ops: Any, case: cases.Attention) -> Any:
    """The older keys are in the cache already, then the case's own tokens are attended to."""
    batch, cache = case.batch(), filled_cache(ops, case)
    qkv = map(holder(ops), case.qkv(len(batch.positions_T), seed=99))
    return ops.attention(*qkv, ops.vector(case.sinks()), cache, batch, case.window)


def holder(ops: Any) -> Callable[[np.ndarray], Any]:
    return on_device if ops is not REFERENCE else lambda values: values.astype(np.float64)


def filled_cache(ops: Any, case: cases.Attention) -> Any:
    hold, batch, cache = holder(ops), case.batch(), ops.kv_cache(case.num_blocks, case.S, case.K, case.H)
    for n, (old, _) in enumerate(case.sequences):
        _, *keys_and_values = case.qkv(old, seed=n)
        blocks, slots = batch.full_table_NB[n, np.arange(old) // case.S], np.arange(old) % case.S
        for held, new in zip(cache, map(hold, keys_and_values), strict=True):
            if ops is REFERENCE:
                held[blocks, slots] = new
            else:
                held[on_device(blocks).long(), :, on_device(slots)] = new.to(held.dtype)
    return cache


@pytest.mark.parametrize("case", quickly(cases.ATTENTION, "decode", "window of 1", "odd group and head dim"))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_norm_projections_and_rope_join_attention(case: cases.Attention, dtype: str) -> None:
    """Of each sequence of a case the last token alone; in 16 bits against the same kernels one by one."""
    case = dataclasses.replace(case, sequences=tuple((old + new - 1, 1) for old, new in case.sequences))
    ops, batch, rng = (EXACT if dtype == "float32" else HALVES[dtype]), case.batch(), np.random.default_rng(3)
    x, norm = (rng.standard_normal(shape).astype(np.float32) for shape in ((len(case.sequences), 160), 160))
    matrices = [rng.standard_normal((heads * case.H, 160)) / np.sqrt(160) for heads in (case.Q, case.K, case.K)]
    biases = [rng.standard_normal(len(matrix)) for matrix in matrices]
    inv_freq = 150000.0 ** (-np.arange(0, case.H, 2) / case.H)

    def projections(ops: Any) -> list[Any]:
        if ops is REFERENCE:
            return [ops.linear_weights(*pair) for pair in zip(matrices, biases, strict=True)]
        return [Linear(on_device(m).to(ops.dtype), ops.vector(bias)) for m, bias in zip(matrices, biases, strict=True)]

    def attended(ops: Any, joined: bool) -> tuple[Any, Any]:
        cache, held, sinks = filled_cache(ops, case), holder(ops)(x), ops.vector(case.sinks())
        rope = ops.rope_angles(batch.positions_T, inv_freq, 1.3)
        if joined:
            arguments = ops.vector(norm), 1e-5, projections(ops), rope, sinks, cache, batch, case.window
            return ops.normed_attention(held, *arguments), cache
        normed = ops.rms_norm(held, ops.vector(norm), 1e-5)
        q, k, v = (ops.linear(normed, each).reshape(len(x), -1, case.H) for each in projections(ops))
        return ops.attention(ops.rope(q, *rope), ops.rope(k, *rope), v, sinks, cache, batch, case.window), cache

    assert ops.can_join(*projections(ops)) and not ops.can_join(Linear(on_device(x), None))
    met, cache = attended(ops, True)
    expected, expected_cache = attended(REFERENCE if ops is EXACT else ops, False)
    for own, other in ((met, expected), *zip(cache, expected_cache, strict=True)):
        if ops is not EXACT:
            assert_close(own, numbers(other), 0.02)
        else:
            assert_close(own if own is met else own.movedim(1, 2), other, 3e-5)


def test_attention_without_a_cache_sees_the_tokens_of_the_batch() -> None:
    case = cases.Attention("", ((0, 40), (0, 7)))
    batch, qkv, sinks = case.batch(), case.qkv(47), case.sinks()
    for window in (None, 16):
        met = EXACT.attention(*map(on_device, qkv), EXACT.vector(sinks), None, batch, window)
        expected = REFERENCE.attention(*(one.astype(np.float64) for one in qkv), sinks, None, batch, window)
        assert_close(met, expected, 1e-5)


@pytest.mark.parametrize("window", [None, 32])
def test_attention_of_a_single_token_does_not_depend_on_the_prompts_beside_it(window: int | None) -> None:
    """Bit for bit: it is computed by the same programs as in a batch of single tokens alone."""
    beside = cases.Attention("", ((300, 1), (0, 20), (70, 1)), window)
    batch, qkv, sinks = beside.batch(), beside.qkv(22), EXACT.vector(beside.sinks())
    rows, sequences = [0, 21], [0, 2]
    alone = dataclasses.replace(
        batch,
        token_ids_T=batch.token_ids_T[rows],
        positions_T=batch.positions_T[rows],
        query_starts_N1=np.array([0, 1, 2], np.int32),
        key_lengths_N=batch.key_lengths_N[sequences],
        full_table_NB=batch.full_table_NB[sequences],
        window_table_NB=batch.window_table_NB[sequences],
    )
    cache = filled_cache(EXACT, beside)
    met = EXACT.attention(*map(on_device, qkv), sinks, cache, batch, window)
    expected = EXACT.attention(*(on_device(one[rows]) for one in qkv), sinks, cache, alone, window)
    assert torch.equal(met[rows], expected)


def test_keys_of_tokens_without_a_block_are_stored_nowhere() -> None:
    case = cases.Attention("", ((0, 3),))
    batch, cache = case.batch(), EXACT.kv_cache(case.num_blocks, case.S, case.K, case.H)
    missing = dataclasses.replace(
        batch, full_table_NB=np.full_like(batch.full_table_NB, -1), key_lengths_N=np.zeros_like(batch.key_lengths_N)
    )
    met = EXACT.attention(*map(on_device, case.qkv(3)), EXACT.vector(case.sinks()), cache, missing, None)
    assert not cache.k_BKSH.any() and not cache.v_BKSH.any() and not met.any()


# Elementwise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "D"), [(1, 2880), (3, 7), (40, 1024), (2, 1)])
def test_rms_norm(T: int, D: int) -> None:
    rng = np.random.default_rng(D)
    x, scale = rng.standard_normal((T, D)).astype(np.float32), rng.standard_normal(D).astype(np.float32)
    met = EXACT.rms_norm(on_device(x), EXACT.vector(scale), 1e-5)
    assert_close(met, REFERENCE.rms_norm(x.astype(np.float64), scale, 1e-5), 3e-6)


@pytest.mark.parametrize(("T", "Q", "H"), [(1, 64, 64), (3, 2, 6), (50, 8, 20)])
def test_rope(T: int, Q: int, H: int) -> None:
    rng = np.random.default_rng(H)
    x, positions = rng.standard_normal((T, Q, H)).astype(np.float32), rng.integers(0, 131072, T).astype(np.int32)
    inv_freq = 150000.0 ** (-np.arange(0, H, 2) / H)
    angles = REFERENCE.rope_angles(positions, inv_freq, 1.3)
    met = EXACT.rope_angles(positions, inv_freq, 1.3)
    for part, expected in zip(met, angles, strict=True):
        assert_close(part, expected, 1e-6)
    assert_close(EXACT.rope(on_device(x), *met), REFERENCE.rope(x.astype(np.float64), *angles), 1e-6)


def test_route_prefers_larger_then_earlier_and_leaves_nan_to_the_end() -> None:
    logits = np.array([[1, 3, 3, 2], [0, 0, 0, 0], [np.nan, 1, np.nan, 2], [np.nan] * 4], np.float32)
    routing = EXACT.route(on_device(logits), 2)
    np.testing.assert_array_equal(routing.experts_TA.cpu(), [[1, 2], [0, 1], [3, 1], [0, 1]])
    expected = REFERENCE.route(logits[:3].astype(np.float64), 2)
    np.testing.assert_allclose(routing.weights_TA[:3].cpu(), expected.weights_TA, rtol=1e-6)


@pytest.mark.parametrize(("T", "E", "A"), [(1, 32, 4), (40, 128, 4), (3, 5, 3), (2, 4, 4), (2, 7, 1)])
def test_route(T: int, E: int, A: int) -> None:
    logits = np.random.default_rng(E).standard_normal((T, E)).astype(np.float32)
    routing, expected = EXACT.route(on_device(logits), A), REFERENCE.route(logits.astype(np.float64), A)
    np.testing.assert_array_equal(routing.experts_TA.cpu(), expected.experts_TA)
    np.testing.assert_allclose(routing.weights_TA.cpu(), expected.weights_TA, rtol=1e-5)


@pytest.mark.parametrize("dtype", [cases.BF16, cases.F16, cases.F32, "q8_0"])
def test_embed(dtype: Any) -> None:
    _, table, _ = cases.Linear("", 1, 50, 96, dtype).arrays()
    ids = np.array([0, 49, 7, 7], np.int32)
    met = EXACT.embed(EXACT.embedding(table), ids)
    np.testing.assert_array_equal(met.cpu(), ReferenceOps(np.float32).embed(table, ids))
