"""The CPU kernels against the specification, for every instruction set that this machine runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
from typing import Any

import numpy as np
import pytest
from tests.ops import cases

from ossia.errors import ConfigError
from ossia.ops import Q8, Adapted, Batch, ExpertArrays, Mxfp4, Routing, cpu, load, mxfp4
from ossia.ops.cpu import CpuOps
from ossia.ops.reference import ReferenceOps, swiglu

ISAS = [isa for isa in cpu.ISAS if cpu._kernels.has_isa(isa)]
REFERENCE = ReferenceOps(np.float64)
OPS = {(isa, dense, kv): CpuOps(2, dense, kv, isa) for isa in ISAS for dense in ("q8", "bf16") for kv in ("bf16", "q8")}

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dense = pytest.mark.parametrize("dense", ["q8", "bf16"])


def assert_close(met: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """The largest error, measured by the root mean square of what is expected."""
    assert met.shape == expected.shape
    assert np.abs(met - expected).max() / (root_mean_square(expected) + 1e-30) < tolerance


def root_mean_square(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(numbers, dtype=np.float64))))


# Linear --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.LINEAR, ids=str)
@each_dense
@each_isa
def test_linear(isa: str, dense: str, case: cases.Linear) -> None:
    x, weight, bias = case.arrays()
    ops = OPS[isa, dense, "bf16"]
    met = ops.linear(x, ops.linear_weights(weight, bias))
    as_held, quantized = held_numbers(weight, dense)
    expected = REFERENCE.linear(x.astype(np.float64), REFERENCE.linear_weights(weight, bias))
    # Weights and activations move by at most half a step, 1/254 of their block's largest number; in the mean by a
    # third of a percent of it, and the largest is three times the mean (outliers: more, by their size).
    assert root_mean_square(met - expected) / root_mean_square(expected) < (0.02 * case.outliers if quantized else 1e-5)
    x_held = eight_bits(x) if quantized else x
    exactly = REFERENCE.linear(x_held.astype(np.float64), REFERENCE.linear_weights(as_held, bias))
    assert_close(met, exactly, 1e-5)


def held_numbers(weight: Any, dense: str) -> tuple[np.ndarray, bool]:
    """What the backend holds of a matrix, and whether products with it are in 8 bits."""
    if isinstance(weight, Q8):
        return weight.values.astype(np.float32).reshape(weight.shape) * np.repeat(
            weight.scales.astype(np.float32), 32, axis=-1
        ), True
    numbers = weight.astype(np.float32)
    if dense == "bf16" or weight.shape[0] <= 256 or weight.shape[1] % 32:
        return numbers, False
    return held_numbers(cases.q8_0(numbers), dense)


def eight_bits(x: np.ndarray) -> np.ndarray:
    """Activations rounded as the kernels do: 32 share the scale max/127."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    steps = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    return (np.rint(blocks * inverse).astype(np.float64) * steps).reshape(x.shape)


@each_dense
@each_isa
def test_linear_of_a_token_is_the_same_bits_in_any_batch_by_any_threads(isa: str, dense: str) -> None:
    for dtype in (cases.BF16, cases.F32, "q8_0"):
        x, weight, bias = cases.Linear("", 131, 300, 288, dtype).arrays()
        ops = OPS[isa, dense, "bf16"]
        held = ops.linear_weights(weight, bias)
        whole = ops.linear(x, held)
        for tokens in (slice(0, 1), slice(70, 71), slice(3, 5), slice(10, 13), slice(20, 24), slice(1, 90)):
            np.testing.assert_array_equal(ops.linear(x[tokens], held), whole[tokens])
        for threads in (1, 3):
            other = CpuOps(threads, dense, isa=isa)
            np.testing.assert_array_equal(other.linear(x, other.linear_weights(weight, bias)), whole)


@each_isa
def test_a_number_that_is_not_finite_is_seen_in_the_result(isa: str) -> None:
    for dense in ("q8", "bf16"):
        x, weight, _ = cases.Linear("", 3, 300, 64).arrays()
        ops = OPS[isa, dense, "bf16"]
        x[0, 3], x[1, 40] = np.nan, np.inf
        out = ops.linear(x, ops.linear_weights(weight))
        assert not np.isfinite(out[:2]).any()
        assert np.isfinite(out[2]).all()


@each_isa
def test_zeros_and_extremes_pass_through_eight_bits(isa: str) -> None:
    ops = OPS[isa, "q8", "bf16"]
    held = ops.linear_weights(np.ones((257, 64), np.float32))
    x = np.zeros((4, 64), np.float32)
    x[1], x[2], x[3] = 1e36, 1e-30, 1e-44
    out = ops.linear(x, held)
    np.testing.assert_allclose(out[:3], x[:3, :1] * 64 * np.ones(257), rtol=1e-3)
    np.testing.assert_array_equal(out[3], 0)


@each_isa
def test_rounding_weights_gives_back_the_pages_of_a_mapped_file(isa: str, tmp_path: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((2048, 2048)).astype(cases.BF16)
    path = tmp_path / "weight"
    path.write_bytes(weight.tobytes())
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped = np.frombuffer(mapping, np.uint16).view(cases.BF16).reshape(weight.shape)
    ops = OPS[isa, "q8", "bf16"]
    held = ops.linear_weights(mapped)
    x = np.ones((1, 2048), np.float32)
    np.testing.assert_array_equal(ops.linear(x, held), ops.linear(x, ops.linear_weights(weight)))
    with open("/proc/self/smaps") as smaps:
        of_file = smaps.read().split(str(path))[1]
    resident_kb = int(next(line for line in of_file.splitlines() if line.startswith("Rss")).split()[1])
    assert resident_kb < 64
    np.testing.assert_array_equal(mapped, weight)


# Mixture of experts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.MOE, ids=str)
@each_isa
def test_moe(isa: str, case: cases.Moe) -> None:
    x, logits, arrays = case.arrays()
    ops = OPS[isa, "bf16", "bf16"]
    routing = REFERENCE.route(logits.astype(np.float64), case.A)
    routing = Routing(routing.experts_TA, routing.weights_TA.astype(np.float32))
    met = ops.moe(x, routing, ops.experts(arrays), case.limit)
    expected = REFERENCE.moe(x.astype(np.float64), routing, REFERENCE.experts(arrays), case.limit)
    in_8_bits = isinstance(arrays.gate, Mxfp4), isinstance(arrays.down, Mxfp4)
    assert root_mean_square(met - expected) / root_mean_square(expected) < (
        0.03 * case.outliers if any(in_8_bits) else 2e-5
    )
    exactly = moe_in_eight_bits(x, routing, arrays, case.limit, *in_8_bits)
    errors = np.abs(met - exactly) / np.sqrt(np.mean(exactly**2))
    if in_8_bits[1]:
        # A hidden number between two steps may be rounded the other way: then one step is lost, 1/127 of the largest.
        assert np.quantile(errors, 0.9) < 2e-5
        assert errors.max() < 0.05
    else:
        assert errors.max() < 2e-5


def moe_in_eight_bits(
    x: np.ndarray, routing: Routing, arrays: ExpertArrays, limit: float, x_in_8_bits: bool, h_in_8_bits: bool
) -> np.ndarray:
    if x_in_8_bits:
        x = eight_bits(x)
    out = np.zeros((len(x), arrays.down_bias_ED.shape[1]))
    for t, a in np.ndindex(routing.experts_TA.shape):
        e = routing.experts_TA[t, a]
        gate, up, down = (REFERENCE._matrix(m, e) for m in (arrays.gate, arrays.up, arrays.down))
        biases = [b[e].astype(np.float64) for b in (arrays.gate_bias_EF, arrays.up_bias_EF, arrays.down_bias_ED)]
        h = swiglu(gate @ x[t] + biases[0], up @ x[t] + biases[1], limit)
        if h_in_8_bits:
            h = eight_bits(h)
        out[t] += routing.weights_TA[t, a] * (down @ h + biases[2])
    return out


@each_isa
def test_every_code_and_scale_is_multiplied_exactly(isa: str) -> None:
    """Each of the 16 codes by itself, times scales from one end to the other, by activations that 8 bits hold."""
    ops = OPS[isa, "q8", "bf16"]
    for order in ("pairs", "halves"):
        for scale in (0, 1, 64, 127, 128, 200, 253, 254, 255):
            # Row r of `down` holds code r % 16 at input r and code 0 elsewhere; h is 127/128 where x is 127.
            codes = np.zeros((1, 32, 32), np.uint8)
            codes[0, np.arange(32), np.arange(32)] = np.arange(32) % 16
            down = Mxfp4(mxfp4.pack_codes(codes[:, :, None], order), np.full((1, 32, 1), scale, np.uint8), order)
            # gate = 7 exactly and up = x - 1: h = 7 sigmoid(11.9) x, the same factor for all.
            up = np.eye(32, dtype=np.float32)[None]
            zero = np.zeros((1, 32), np.float32)
            arrays = ExpertArrays(0 * up, up, down, zero + 7, zero - 1, zero)
            x = (np.arange(32, dtype=np.float32) - 16)[None] / 4
            x[0, 0] = 127 / 32  # |x| <= 127/32, steps of 1/32
            routing = Routing(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32))
            met = ops.moe(x, routing, ops.experts(arrays), 7.0)
            h = x[0] * np.float32(7 / (1 + np.exp(-1.702 * 7)))
            values = mxfp4.E2M1_VALUES[np.arange(32) % 16].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                expected = (h * values * 2.0 ** (scale - 127)).astype(np.float32)
                if scale == 255:
                    expected[:] = np.nan
            np.testing.assert_allclose(met[0], expected, rtol=1e-5, atol=1e-44)


@each_isa
def test_moe_of_a_token_is_the_same_bits_in_any_batch_by_any_threads(isa: str) -> None:
    for kind in ("mxfp4", "halves", "float32", "bfloat16"):
        case = cases.Moe("", 150, 4, 2, 96, 64, kind, few=3)
        x, logits, arrays = case.arrays()
        ops = OPS[isa, "q8", "bf16"]
        held, routing = ops.experts(arrays), ops.route(logits, case.A)
        whole = ops.moe(x, routing, held, 7.0)
        for tokens in (slice(0, 1), slice(149, 150), slice(5, 7), slice(20, 31), slice(1, 120)):
            part = Routing(routing.experts_TA[tokens].copy(), routing.weights_TA[tokens].copy())
            np.testing.assert_array_equal(ops.moe(x[tokens], part, held, 7.0), whole[tokens])
        for threads in (1, 3):
            other = CpuOps(threads, isa=isa)
            np.testing.assert_array_equal(other.moe(x, routing, other.experts(arrays), 7.0), whole)


# Adapters ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.LORA, ids=str)
def test_the_reference_gives_each_token_the_matrix_that_its_adapter_would_make(case: cases.Lora) -> None:
    x, weight, bias = (array.astype(np.float64) for array in cases.Linear("", case.T, case.O, case.I).arrays())
    lora_T, pairs = case.lora_T(), case.pairs()
    held = REFERENCE.linear_weights(weight, bias)
    met = REFERENCE.linear(x, Adapted(held, tuple(p and REFERENCE.lora(p) for p in pairs), lora_T))
    for t, index in enumerate(lora_T):
        pair = pairs[index] if index >= 0 else None
        merged = weight if pair is None else weight + pair.scaling * np.float64(pair.b) @ np.float64(pair.a)
        np.testing.assert_allclose(met[t], merged @ x[t] + bias, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", cases.EXPERT_LORA, ids=str)
def test_the_reference_gives_each_token_the_experts_that_its_adapter_would_make(case: cases.Lora) -> None:
    x, logits, arrays = cases.Moe("", case.T, case.E, case.A, case.I, case.O, "float32").arrays()
    routing = REFERENCE.route(logits, case.A)
    lora_T, loras = case.lora_T(), case.experts()
    adapted = Adapted(REFERENCE.experts(arrays), tuple(one and REFERENCE.expert_loras(one) for one in loras), lora_T)
    met = REFERENCE.moe(x.astype(np.float64), routing, adapted, 7.0)
    for index in range(-1, len(loras)):
        rows, one = lora_T == index, loras[index] if index >= 0 else None
        changed = arrays
        if one is not None:
            own = zip(arrays[:3], one, strict=True)
            changed = arrays._replace(
                **{
                    name: m + pair.scaling * np.float64(pair.b) @ np.float64(pair.a)
                    for name, (m, pair) in zip(("gate", "up", "down"), own, strict=True)
                }
            )
        part = Routing(routing.experts_TA[rows], routing.weights_TA[rows])
        want = REFERENCE.moe(x[rows].astype(np.float64), part, REFERENCE.experts(changed), 7.0)
        np.testing.assert_allclose(met[rows], want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", cases.LORA, ids=str)
@each_dense
@each_isa
def test_linear_with_adapters(isa: str, dense: str, case: cases.Lora) -> None:
    x, weight, bias = cases.Linear("", case.T, case.O, case.I).arrays()
    ops, lora_T, pairs = OPS[isa, dense, "bf16"], case.lora_T(), case.pairs()
    held = ops.linear_weights(weight, bias)
    met = ops.linear(x, Adapted(held, tuple(p and ops.lora(p) for p in pairs), lora_T))
    nothing = REFERENCE.linear_weights(np.zeros_like(weight))
    change = Adapted(nothing, tuple(p and REFERENCE.lora(p) for p in pairs), lora_T)
    without = ops.linear(x, held)
    assert_close(met - without, REFERENCE.linear(x.astype(np.float64), change), 1e-5)
    np.testing.assert_array_equal(met[lora_T < 0], without[lora_T < 0])


@pytest.mark.parametrize("case", cases.EXPERT_LORA, ids=str)
@pytest.mark.parametrize("matrices", ["float32", "mxfp4"])
@each_isa
def test_moe_with_adapters(isa: str, matrices: str, case: cases.Lora) -> None:
    if matrices == "mxfp4" and (case.I % 32 or case.O % 32):
        pytest.skip("MXFP4 has blocks of 32")
    x, logits, arrays = cases.Moe("", case.T, case.E, case.A, case.I, case.O, matrices).arrays()
    ops, lora_T, loras = OPS[isa, "bf16", "bf16"], case.lora_T(), case.experts()
    routing = ops.route(logits, case.A)
    held = ops.experts(arrays)
    met = ops.moe(x, routing, Adapted(held, tuple(one and ops.expert_loras(one) for one in loras), lora_T), 7.0)
    change = tuple(one and REFERENCE.expert_loras(one) for one in loras)
    adapted = Adapted(REFERENCE.experts(arrays), change, lora_T)
    expected = REFERENCE.moe(x.astype(np.float64), routing, adapted, 7.0)
    tolerance = 2e-5 if matrices == "float32" else 0.03
    assert root_mean_square(met - expected) / root_mean_square(expected) < tolerance
    without = ops.moe(x, routing, held, 7.0)
    np.testing.assert_array_equal(met[lora_T < 0], without[lora_T < 0])
    changed = [t for t, index in enumerate(lora_T) if index >= 0 and loras[index] is not None]
    assert root_mean_square(met[changed] - without[changed]) > 0.1 * root_mean_square(expected)


@each_isa
def test_experts_with_only_some_of_their_matrices_adapted(isa: str) -> None:
    case = cases.Lora("", 12, 64, 96, (3,), E=4)
    x, logits, arrays = cases.Moe("", case.T, case.E, case.A, case.I, case.O, "float32").arrays()
    (whole,) = case.experts()
    other_a = whole._replace(up=whole.up._replace(a=whole.up.a[:, :2] + 1, b=whole.up.b[..., :2]))
    for one in (
        whole._replace(gate=None),
        whole._replace(up=None),
        whole._replace(down=None),
        whole._replace(gate=None, up=None),
        whole._replace(gate=None, down=None),
        other_a,
        whole._replace(up=whole.up._replace(scaling=3.0)),
    ):
        ops, lora_T = OPS[isa, "bf16", "bf16"], np.zeros(case.T, np.int32)
        routing = ops.route(logits, case.A)
        met = ops.moe(x, routing, Adapted(ops.experts(arrays), (ops.expert_loras(one),), lora_T), 7.0)
        adapted = Adapted(REFERENCE.experts(arrays), (REFERENCE.expert_loras(one),), lora_T)
        expected = REFERENCE.moe(x.astype(np.float64), routing, adapted, 7.0)
        assert_close(met, expected, 1e-4)


@pytest.mark.parametrize("dtype", [cases.F32, cases.BF16])
@each_isa
def test_embedding_with_adapters(isa: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((50, 45)).astype(cases.BF16)
    ids, lora_T = rng.integers(0, 50, 9).astype(np.int32), np.array([0, 0, -1, 1, 1, 1, 2, -1, 0], np.int32)
    pairs = [cases.Lora("", 1, 45, 50, (r,), dtype).pairs()[0] for r in (3, 4)]
    ops = OPS[isa, "q8", "bf16"]
    met = ops.embed(Adapted(ops.embedding(table), (*map(ops.lora, pairs), None), lora_T), ids)
    exact = ReferenceOps(np.float64)
    expected = exact.embed(Adapted(table, (*map(exact.lora, pairs), None), lora_T), ids)
    np.testing.assert_allclose(met, expected, rtol=1e-5, atol=1e-5)


@each_dense
@each_isa
def test_a_token_with_an_adapter_is_the_same_bits_in_any_batch_by_any_threads(isa: str, dense: str) -> None:
    case = cases.Lora("", 131, 300, 288, (8, 3, 0, 17))
    x, weight, bias = cases.Linear("", case.T, case.O, case.I).arrays()
    ops, lora_T = OPS[isa, dense, "bf16"], case.lora_T()

    def run(ops: CpuOps, tokens: slice, order: list[int]) -> np.ndarray:
        pairs = case.pairs()
        loras = tuple(pairs[i] and ops.lora(pairs[i]) for i in order)
        places = np.array([order.index(i) if i >= 0 else -1 for i in lora_T[tokens]], np.int32)
        return ops.linear(x[tokens], Adapted(ops.linear_weights(weight, bias), loras, places))

    whole = run(ops, slice(None), [0, 1, 2, 3])
    for tokens in (slice(0, 1), slice(70, 71), slice(3, 5), slice(10, 13), slice(20, 24), slice(1, 90)):
        np.testing.assert_array_equal(run(ops, tokens, [3, 1, 0, 2]), whole[tokens])
    for threads in (1, 3):
        np.testing.assert_array_equal(run(CpuOps(threads, dense, isa=isa), slice(None), [0, 1, 2, 3]), whole)


@pytest.mark.parametrize("matrices", ["mxfp4", "float32"])
@each_isa
def test_experts_of_a_token_with_an_adapter_are_the_same_bits_in_any_batch_by_any_threads(
    isa: str, matrices: str
) -> None:
    case = cases.Lora("", 150, 64, 96, (4, 1, 0, 6), E=4)
    x, logits, arrays = cases.Moe("", 150, 4, 2, 96, 64, matrices, few=3).arrays()
    lora_T, loras = case.lora_T(), case.experts()
    routing = OPS[isa, "q8", "bf16"].route(logits, case.A)

    def run(ops: CpuOps, tokens: slice) -> np.ndarray:
        part = Routing(routing.experts_TA[tokens].copy(), routing.weights_TA[tokens].copy())
        held = tuple(one and ops.expert_loras(one) for one in loras)
        return ops.moe(x[tokens], part, Adapted(ops.experts(arrays), held, lora_T[tokens]), 7.0)

    whole = run(OPS[isa, "q8", "bf16"], slice(None))
    for tokens in (slice(0, 1), slice(149, 150), slice(5, 7), slice(20, 31), slice(1, 120)):
        np.testing.assert_array_equal(run(OPS[isa, "q8", "bf16"], tokens), whole[tokens])
    for threads in (1, 3):
        np.testing.assert_array_equal(run(CpuOps(threads, isa=isa), slice(None)), whole)


def test_adapters_that_do_not_fit_are_refused() -> None:
    ops = OPS[ISAS[0], "bf16", "bf16"]
    x, weight, _ = cases.Linear("", 3, 300, 64, cases.F32).arrays()
    held, pair = ops.linear_weights(weight), cases.Lora("", 3, 300, 64, (2,)).pairs()[0]
    lora = ops.lora(pair)
    for loras, lora_T in (
        ((ops.lora(pair._replace(a=pair.a[:, :32])),), [0, 0, 0]),
        ((ops.lora(pair._replace(b=pair.b[:200])),), [0, 0, 0]),
        ((lora,), [0, 1, 0]),
        ((lora,), [0, -2, 0]),
        ((lora,), [0, 0]),
    ):
        with pytest.raises(ValueError, match="adapter"):
            ops.linear(x, Adapted(held, loras, np.array(lora_T, np.int32)))


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.ATTENTION, ids=str)
@pytest.mark.parametrize("kv", ["bf16", "q8"])
@each_isa
def test_attention(isa: str, kv: str, case: cases.Attention) -> None:
    met = attend(OPS[isa, "q8", kv], case, kv)
    expected = attend(REFERENCE, case, kv)
    assert_close(met, expected, 2e-5)


def attend(ops: Any, case: cases.Attention, kv: str) -> np.ndarray:
    """The cache is filled by a pass over the older keys, then the case's own tokens are attended to."""
    batch, cache = case.batch(), ops.kv_cache(case.num_blocks, case.S, case.K, case.H)
    sinks = ops.vector(case.sinks())
    older = [(n, old) for n, (old, _) in enumerate(case.sequences) if old]
    for n, old in older:
        one = Batch(
            np.zeros(old, np.int32),
            np.arange(old, dtype=np.int32),
            np.array([0, old], np.int32),
            np.array([old], np.int32),
            *[batch.full_table_NB[n : n + 1]] * 2,
            logit_rows_R=np.array([0], np.int32),
        )
        ops.attention(*rounded(case.qkv(old, seed=n), kv), sinks, cache, one, None)
    q, k, v = rounded(case.qkv(len(batch.positions_T), seed=99), kv)
    if ops is REFERENCE:
        q = q.astype(np.float64)
    return ops.attention(q, k, v, sinks, cache, batch, case.window)


def rounded(qkv: tuple[np.ndarray, ...], kv: str) -> tuple[np.ndarray, ...]:
    """Numbers that the cache holds exactly."""
    if kv == "bf16":
        return qkv
    q, *held = qkv
    steps = [np.abs(x).max(-1, keepdims=True) / np.float32(127) for x in held]
    return q, *(np.rint(x / step).astype(np.float32) * step for x, step in zip(held, steps, strict=True))


@pytest.mark.parametrize("window", [None, 32, 128])
@pytest.mark.parametrize("kv", ["bf16", "q8"])
@each_isa
def test_attention_of_a_token_is_the_same_bits_however_the_prompt_is_cut(isa: str, kv: str, window: int | None) -> None:
    case = cases.Attention("", ((0, 1200),), window=window)
    q, k, v = case.qkv(1200)
    ops = OPS[isa, "q8", kv]
    cache = ops.kv_cache(case.num_blocks, case.S, case.K, case.H)
    whole = ops.attention(q, k, v, case.sinks(), cache, case.batch(), window)
    for threads, cuts in ((1, [0, 1, 2, 33, 520, 1199, 1200]), (2, [0, 600, 1200]), (5, [0, 7, 1193, 1200])):
        ops = CpuOps(threads, kv=kv, isa=isa)
        cache = ops.kv_cache(case.num_blocks, case.S, case.K, case.H)
        for start, end in itertools.pairwise(cuts):
            batch = dataclasses.replace(
                case.batch(),
                positions_T=np.arange(start, end, dtype=np.int32),
                query_starts_N1=np.array([0, end - start], np.int32),
                key_lengths_N=np.array([end], np.int32),
            )
            part = slice(start, end)
            out = ops.attention(q[part], k[part], v[part], case.sinks(), cache, batch, window)
            np.testing.assert_array_equal(out, whole[part])


@each_isa
def test_attention_without_a_cache_sees_the_tokens_of_the_batch(isa: str) -> None:
    case = cases.Attention("", ((0, 40), (0, 7)))
    batch = case.batch()
    q, k, v = case.qkv(47)
    for window in (None, 16):
        met = OPS[isa, "q8", "bf16"].attention(q, k, v, case.sinks(), None, batch, window)
        expected = REFERENCE.attention(q.astype(np.float64), k, v, case.sinks(), None, batch, window)
        assert_close(met, expected, 1e-5)


@each_isa
def test_a_table_that_misses_a_needed_block_is_refused(isa: str) -> None:
    case = cases.Attention("", ((70, 1),))
    batch, ops = case.batch(), OPS[isa, "q8", "bf16"]
    batch.full_table_NB[0, 1] = -1
    cache = ops.kv_cache(case.num_blocks, case.S, case.K, case.H)
    with pytest.raises(ValueError, match="misses a block"):
        ops.attention(*case.qkv(1), case.sinks(), cache, batch, None)


# Elementwise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "D"), [(1, 2880), (3, 7), (40, 1024), (2, 1)])
@each_isa
def test_rms_norm(isa: str, T: int, D: int) -> None:
    rng = np.random.default_rng(D)
    x, scale = rng.standard_normal((T, D)).astype(np.float32), rng.standard_normal(D).astype(np.float32)
    met = OPS[isa, "q8", "bf16"].rms_norm(x, scale, 1e-5)
    assert_close(met, REFERENCE.rms_norm(x.astype(np.float64), scale, 1e-5), 3e-6)


@pytest.mark.parametrize(("T", "Q", "H"), [(1, 64, 64), (3, 2, 6), (50, 8, 20)])
@each_isa
def test_rope(isa: str, T: int, Q: int, H: int) -> None:
    rng, ops = np.random.default_rng(H), OPS[isa, "q8", "bf16"]
    x, positions = rng.standard_normal((T, Q, H)).astype(np.float32), rng.integers(0, 131072, T).astype(np.int32)
    inv_freq = 150000.0 ** (-np.arange(0, H, 2) / H)
    angles = REFERENCE.rope_angles(positions, inv_freq, 1.3)
    met = ops.rope_angles(positions, inv_freq, 1.3)
    for part, expected in zip(met, angles, strict=True):
        assert_close(part, expected, 1e-6)
    assert_close(ops.rope(x.copy(), *met), REFERENCE.rope(x.astype(np.float64), *angles), 1e-6)


@each_isa
def test_route_prefers_larger_then_earlier_and_leaves_nan_to_the_end(isa: str) -> None:
    logits = np.array([[1, 3, 3, 2], [0, 0, 0, 0], [np.nan, 1, np.nan, 2], [np.nan] * 4], np.float32)
    routing = OPS[isa, "q8", "bf16"].route(logits, 2)
    np.testing.assert_array_equal(routing.experts_TA, [[1, 2], [0, 1], [3, 1], [0, 1]])
    expected = REFERENCE.route(logits[:3].astype(np.float64), 2)
    np.testing.assert_allclose(routing.weights_TA[:3], expected.weights_TA, rtol=1e-6)
    np.testing.assert_array_equal(routing.experts_TA[:3], expected.experts_TA)


@pytest.mark.parametrize("dtype", [cases.BF16, cases.F16, cases.F32, "q8_0"])
@each_isa
def test_embed(isa: str, dtype: Any) -> None:
    _, table, _ = cases.Linear("", 1, 50, 96, dtype).arrays()
    ids = np.array([0, 49, 7, 7], np.int32)
    ops = OPS[isa, "q8", "bf16"]
    met = ops.embed(ops.embedding(table), ids)
    np.testing.assert_array_equal(met, ReferenceOps(np.float32).embed(table, ids))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ops.embed(ops.embedding(table), np.array([50], np.int32))


@each_isa
def test_all_finite_halves_are_read_exactly(isa: str) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves[~np.isfinite(halves)] = 1
    ops = OPS[isa, "bf16", "bf16"]
    met = ops.linear(np.ones((1, 1), np.float32), ops.linear_weights(halves[:, None]))
    np.testing.assert_array_equal(met[0], halves.astype(np.float32))
    eight = np.eye(16, dtype=np.float32)
    met = ops.linear(eight, ops.linear_weights(halves.reshape(-1, 16)))
    np.testing.assert_array_equal(met.T, halves.reshape(-1, 16).astype(np.float32))


# The whole -----------------------------------------------------------------------------------------------------------


def test_what_the_machine_lacks_is_a_config_error() -> None:
    missing = [isa for isa in cpu.ISAS if isa not in ISAS]
    for isa in [*missing, "mmx"]:
        with pytest.raises(ConfigError, match="cannot run"):
            CpuOps(isa=isa)  # type: ignore[arg-type]
    for options in ({"dense": "q4"}, {"kv": "f8"}, {"threads": 0}):
        with pytest.raises(ConfigError):
            load("cpu", **options)


def test_threads_are_as_many_as_cores_or_as_a_container_may_use(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_cores", lambda: 4)
    for bound, threads in ((0.1, 1), (1.0, 1), (1.5, 2), (64.0, 4), (math.inf, 4)):
        monkeypatch.setattr(cpu, "processors", lambda bound=bound: bound)
        assert CpuOps().threads == threads


@each_isa
def test_the_limits_of_the_machine_can_be_measured(isa: str) -> None:
    ops = OPS[isa, "q8", "bf16"]
    assert ops.read_bandwidth(1 << 24, 2) > 0
    assert ops.integer_peak(20_000) > 0
