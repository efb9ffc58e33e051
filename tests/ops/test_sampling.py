"""Tokens that a GPU draws are those of the host's sampler; without a card in Triton's interpreter."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import tests.gpu  # noqa: F401
import torch

from ossia.engine import SamplingParams
from ossia.engine.gpu_sampler import sample_on_device, score_on_device
from ossia.engine.request import Sequence
from ossia.engine.sampler import Asked, Draw, Sampled, sample_row, score_rows
from ossia.errors import InputError, OssiaError
from ossia.ops.gpu import find_device

V = 2500
# What is no number, or infinite, is divided and rooted on its way to be found.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def logits_of(num_rows: int, *, ties: bool = False, size: int = V) -> np.ndarray:
    logits = np.random.default_rng(num_rows).standard_normal((num_rows, size)).astype(np.float32) * 3
    return np.round(logits) if ties else logits


def draw(row: int, mask: np.ndarray | Exception | None = None, **params: Any) -> Draw:
    sequence = Sequence(0, [5] * (row + 1), SamplingParams(**({"seed": row} | params)), 1000, [1], None)
    future: Future[Any] = Future()
    if isinstance(mask, Exception):
        future.set_exception(mask)
    else:
        future.set_result(mask)
    return Draw(row, sequence, None if mask is None else future)


def on_device(logits: np.ndarray, draws: list[Draw]) -> list[Sampled | Exception]:
    return sample_on_device(torch.from_numpy(logits).to(find_device()), draws)


def assert_as_on_the_host(logits: np.ndarray, draws: list[Draw]) -> list[Sampled]:
    met, expected = on_device(logits, draws), [sample_row(logits, one) for one in draws]
    assert [one.token_id for one in met] == [one.token_id for one in expected]
    for own, other in zip(met, expected, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert own.drawn_logprob == pytest.approx(other.drawn_logprob, abs=1e-5)
        assert [token_id for token_id, _ in own.top_logprobs] == [token_id for token_id, _ in other.top_logprobs]
        values, others = ([value for _, value in one.top_logprobs] for one in (own, other))
        assert values == pytest.approx(others, abs=1e-5)
    return met


def bits(allowed: np.ndarray) -> np.ndarray:
    padded = np.zeros(-(-V // 32) * 32, np.uint8)
    padded[:V] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1e-6},
    {},
    {"temperature": 0.3},
    {"temperature": 4.0, "min_p": 0.05},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": V},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.1, "temperature": 2.0},
]


@pytest.mark.parametrize("ties", [False, True])
def test_tokens_are_those_of_the_host(ties: bool) -> None:
    draws = [draw(row, drawn_logprobs=True, **kind) for row, kind in enumerate(KINDS)]
    assert_as_on_the_host(logits_of(len(KINDS), ties=ties), draws)


def test_each_token_is_drawn_where_its_part_of_the_sum_lies() -> None:
    """Six tokens with most of the weight; every place of a text gets its own random number."""
    logits = np.repeat(logits_of(1, size=6), 40, 0)
    met = assert_as_on_the_host(logits, [draw(row, seed=3, min_p=0.01, temperature=2.0) for row in range(40)])
    assert len({one.token_id for one in met}) >= 4


def test_a_token_does_not_depend_on_the_batch() -> None:
    logits = logits_of(3)
    draws = [draw(row, top_p=0.9 + 0.1 * (row == 1), logprobs=True) for row in range(3)]
    alone = [on_device(logits, [one])[0] for one in draws]
    assert on_device(logits, draws[::-1])[::-1] == alone


def test_masks_bias_and_bans_are_heeded() -> None:
    logits = logits_of(6)
    allowed = np.random.default_rng(0).random(V) < 0.01
    likeliest = int(logits[3].argmax())
    draws = [
        draw(0, bits(allowed), logprobs=True, top_logprobs=3),
        draw(1, bits(allowed), top_k=5),
        draw(2),
        draw(3, temperature=0, banned_token_ids=(likeliest, likeliest)),
        draw(4, temperature=0, logit_bias={7: 50.0, 1: 60.0}, min_tokens=1),
        draw(5, bits(np.arange(V) == V - 1)),
    ]
    met = assert_as_on_the_host(logits, draws)
    assert allowed[[one.token_id for one in met[:2]]].all()
    # Token 1 would end the answer.
    assert met[3].token_id != likeliest and met[4].token_id == 7 and met[5].token_id == V - 1


def test_penalties_are_left_to_the_host() -> None:
    logits = np.zeros((3, V), np.float32)
    logits[:, 5], logits[:, 8] = 3, 2.5
    draws = [draw(row, temperature=0, repetition_penalty=2.0 if row == 1 else 1.0) for row in range(3)]
    assert [one.token_id for one in assert_as_on_the_host(logits, draws)] == [5, 8, 5]


def test_log_probabilities_of_equal_tokens_come_by_lower_id() -> None:
    logits = logits_of(4, ties=True)
    met = assert_as_on_the_host(logits, [draw(row, logprobs=row == 0, top_logprobs=3 * row) for row in range(4)])
    assert [len(one.top_logprobs) for one in met] == [0, 3, 6, 9]
    assert met[0].logprob is not None


def test_prompts_are_scored_as_on_the_host() -> None:
    logits = logits_of(70, ties=True, size=50)
    asked = [Asked(row, row % 50, row % 3) for row in range(69, -1, -1)]
    met = score_on_device(torch.from_numpy(logits).to(find_device()), asked)
    for own, other in zip(met, score_rows(logits, asked), strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [one[0] for one in own.top_logprobs] == [one[0] for one in other.top_logprobs]


def test_a_row_without_a_token_says_why_and_ends_no_other() -> None:
    logits = logits_of(6)
    logits[0, 3], logits[1, 2000], logits[2] = np.nan, np.inf, -np.inf
    none = np.zeros(-(-V // 32), np.uint32)
    draws = [draw(0), draw(1), draw(2, temperature=0), draw(3, none), draw(4, InputError("too complex")), draw(5)]
    *faults, last = on_device(logits, draws)
    assert all(isinstance(one, OssiaError) for one in faults)
    assert ["finite" in str(one) for one in faults] == [True, True, True, False, False]
    assert "no token is allowed" in str(faults[3]) and str(faults[4]) == "too complex"
    assert last == sample_row(logits, draws[5])
