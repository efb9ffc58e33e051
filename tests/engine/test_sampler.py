"""How one token is chosen, against naive versions of the same."""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.engine import SamplingParams
from ossia.engine.request import Sequence
from ossia.engine.sampler import Kept, adjust, keep, log_sum_exp, sample, top_ids, uniform
from ossia.errors import InputError, OssiaError


def sequence(params: SamplingParams, prompt=(0,), answer=()) -> Sequence:
    made = Sequence(0, prompt, params, 1000, [1], None)
    for token_id in answer:
        made.append(token_id)
    return made


def random_logits(seed: int, size: int, ties: bool = False) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * 3
    return np.round(logits) if ties else logits


def naive_keep(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if top_k:
        order = order[:top_k]
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / np.float32(temperature))
    total, reached, kept = sum(float(weights[i]) for i in order), 0.0, []
    for i in order:
        kept.append(i)
        reached += float(weights[i])
        if top_p < 1 and reached >= top_p * total:
            break
    return {i for i in kept if not min_p or weights[i] >= np.float32(min_p)}


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 700),
    ties=st.booleans(),
    temperature=st.sampled_from([0.01, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 1000]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_the_kept_tokens_are_those_of_the_naive_version(seed, size, ties, temperature, top_k, top_p, min_p):
    logits = random_logits(seed, size, ties)
    kept = keep(logits, float(logits.max()), temperature, top_k, top_p, min_p)
    ids = np.arange(size) if kept.ids is None else kept.ids
    assert set(ids.tolist()) == naive_keep(logits, temperature, top_k, top_p, min_p)
    assert (np.diff(ids) > 0).all()
    assert len(kept.weights) == len(ids)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.1, 3, 12])
def test_top_p_keeps_the_fewest_tokens_of_a_large_vocabulary(top_p, spread):
    logits = random_logits(5, 201_088) * np.float32(spread / 3)
    kept = keep(logits, float(logits.max()), 1.0, 0, top_p, 0)
    descending = np.sort(np.exp((logits - logits.max()).astype(np.float32)).astype(np.float64))[::-1]
    count = int(np.searchsorted(np.cumsum(descending), top_p * descending.sum())) + 1
    assert abs(len(kept.ids) - count) <= 1
    assert kept.weights.min() >= np.delete(np.exp(logits - logits.max()), kept.ids).max()


@pytest.mark.parametrize("k", [1, 5, 20, 300, 785, 786, 787, 5000])
@pytest.mark.parametrize("ties", [False, True])
def test_the_highest_values_of_a_large_vocabulary_come_in_order(k, ties):
    values = random_logits(7, 201_088, ties)
    assert top_ids(values, k).tolist() == np.argsort(-values, kind="stable")[:k].tolist()


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = random_logits(3, 40)
    params = SamplingParams(seed=11)
    drawn = collections.Counter()
    one = sequence(params)
    for _ in range(20_000):
        one.token_ids.append(0)
        drawn[sample(logits, one).token_id] += 1
    probabilities = np.exp(logits - log_sum_exp(logits))
    expected = probabilities * 20_000
    observed = np.array([drawn[i] for i in range(40)])
    large = expected > 5
    chi_square = ((observed - expected)[large] ** 2 / expected[large]).sum()
    # 99.9 % of such draws stay below mean + 4 standard deviations of the chi-square distribution.
    assert chi_square < large.sum() + 4 * np.sqrt(2 * large.sum())


@pytest.mark.parametrize("size", [7, 1024, 1025, 5000, 201_088])
def test_a_draw_is_the_token_under_its_place_in_the_running_sum(size):
    weights = np.exp(random_logits(1, size))
    weights[::3] = 0
    sums = np.cumsum(weights, dtype=np.float64)
    for u in [0.0, 0.001, 0.3, 0.77, 1 - 2.0**-53]:
        index = Kept(None, weights).draw(u)
        assert weights[index] > 0
        # Sums in float32 runs differ from the exact one by less than this.
        assert sums[index] >= u * sums[-1] * (1 - 1e-5)
        assert sums[index] - weights[index] <= u * sums[-1] * (1 + 1e-5) + 1e-9


def test_zero_temperature_takes_the_likeliest_token_and_of_equals_the_first():
    assert sample(np.array([0, 3, 1, 3], np.float32), sequence(SamplingParams(temperature=0))).token_id == 1


def test_the_random_number_depends_on_seed_and_place_alone():
    params = SamplingParams(seed=4)
    logits = random_logits(0, 97)
    first = [sample(logits, sequence(params, prompt=[0] * n)).token_id for n in range(1, 50)]
    again = [sample(logits, sequence(params, prompt=[0] * n)).token_id for n in range(49, 0, -1)]
    assert first == again[::-1]
    assert len(set(first)) > 5
    assert uniform(4, 1) != uniform(5, 1) != uniform(4, 2)
    assert uniform(-(2**63), 0) != uniform(2**63 - 1, 0)
    numbers = [uniform(9, position) for position in range(2000)]
    assert 0 <= min(numbers) < 0.01 and 0.99 < max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.03


def test_without_a_seed_two_requests_differ():
    assert sequence(SamplingParams()).seed != sequence(SamplingParams()).seed


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), mask=st.booleans(), min_tokens=st.sampled_from([0, 4]))
def test_adjusted_logits_are_those_of_the_naive_version(seed, mask, min_tokens):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 100))
    logits = random_logits(seed, size)
    prompt, answer = rng.integers(0, size, 7).tolist(), rng.integers(0, size, int(rng.integers(0, 80))).tolist()
    params = SamplingParams(
        presence_penalty=rng.choice([0, 0.7, -1]),
        frequency_penalty=rng.choice([0, 0.3, -0.5]),
        repetition_penalty=rng.choice([1, 1.3, 0.8]),
        logit_bias={int(rng.integers(size)): 2.5, 0: -1.0},
        banned_token_ids=tuple(rng.integers(0, size, 2).tolist()),
        min_tokens=min_tokens,
    )
    allowed = rng.random(size) < 0.6
    bits = np.zeros(-(-size // 32), np.uint32)
    for i in np.flatnonzero(allowed):
        bits[i // 32] |= np.uint32(1 << int(i % 32))

    expected = logits.astype(np.float64)
    for i in range(size):
        if i in prompt or i in answer:
            rate = params.repetition_penalty
            expected[i] = expected[i] / rate if expected[i] > 0 else expected[i] * rate
        expected[i] -= params.frequency_penalty * answer.count(i) + params.presence_penalty * (i in answer)
        expected[i] += params.logit_bias.get(i, 0)
        if i in params.banned_token_ids or (mask and not allowed[i]) or (i == 1 and len(answer) < min_tokens):
            expected[i] = -np.inf

    before = logits.copy()
    got = adjust(logits, sequence(params, prompt, answer), bits if mask else None)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)


def test_a_bias_of_every_token_takes_little_longer_than_that_of_one():
    size = 200_000
    params = SamplingParams(logit_bias={i: float(i == 7) for i in range(size)}, temperature=0)
    made = sequence(params)
    began_s = time.process_time()
    assert {sample(np.zeros(size, np.float32), made).token_id for _ in range(50)} == {7}
    # All other requests wait meanwhile; token by token it takes ten times as long.
    assert time.process_time() - began_s < 2


def test_logprobs_are_the_log_softmax_of_the_models_own_logits():
    logits = random_logits(2, 500)
    params = SamplingParams(temperature=0.3, frequency_penalty=1.0, top_p=0.5, logprobs=True, top_logprobs=7, seed=1)
    got = sample(logits, sequence(params, answer=[3, 3]))
    exact = logits.astype(np.float64)
    exact -= exact.max()
    exact -= np.log(np.exp(exact).sum())
    assert got.logprob == pytest.approx(exact[got.token_id], abs=1e-5)
    best = np.argsort(-exact, kind="stable")[:7]
    assert [token_id for token_id, _ in got.top_logprobs] == best.tolist()
    assert [value for _, value in got.top_logprobs] == pytest.approx(exact[best].tolist(), abs=1e-5)


def test_a_row_without_an_allowed_token_is_an_error():
    params = SamplingParams(banned_token_ids=(0, 1, 2))
    with pytest.raises(OssiaError, match="no token is allowed"):
        sample(np.zeros(3, np.float32), sequence(params))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_an_error(value, temperature):
    logits = np.zeros(5, np.float32)
    logits[3] = value
    with pytest.raises(OssiaError, match="not finite"):
        sample(logits, sequence(SamplingParams(temperature=temperature)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e39),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e308),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {3: 1e308}),
        ("stop_strings", ("\ud800",)),
        ("seed", 2**63),
        ("top_logprobs", -1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("stop_sequences", ((),)),
        ("stop_strings", ("",)),
    ],
)
def test_a_parameter_that_cannot_be_is_named(name, value):
    with pytest.raises(InputError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logit_bias", {50: 1.0}),
        ("banned_token_ids", (-1,)),
        ("stop_token_ids", (50,)),
        ("stop_sequences", ((3, 50),)),
        ("top_logprobs", 51),
    ],
)
def test_a_token_that_does_not_exist_is_refused(name, value):
    with pytest.raises(InputError, match=r"50|-1") as caught:
        SamplingParams(**{name: value}).check_token_ids(50)
    assert caught.value.param == name
