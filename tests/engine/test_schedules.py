"""Whatever is computed together, in whatever pieces, every request gets the answer that it would get alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.engine import SamplingParams


def random_requests(rng: random.Random, count: int, longest: int = 60) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, half of them beginning like another one, with all ways of sampling."""
    prompts: list[list[int]] = []
    for _ in range(count):
        prompt = [rng.randrange(64) for _ in range(rng.randint(1, longest))]
        if prompts and rng.random() < 0.5:
            other = rng.choice(prompts)
            prompt = (other[: rng.randint(1, len(other))] + prompt)[:longest]
        prompts.append(prompt)
    return [
        (
            prompt,
            SamplingParams(
                temperature=rng.choice([0, 0.7, 1.0]),
                top_p=rng.choice([1.0, 0.9]),
                frequency_penalty=rng.choice([0, 0.5]),
                seed=rng.randrange(1000),
                max_tokens=rng.randint(1, 30),
                ignore_eos=rng.random() < 0.5,
            ),
        )
        for prompt in prompts
    ]


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 3, 5, 8, 13, 200])
def test_the_size_of_a_step_changes_no_token(tiny, answer, assert_all_free, max_batch_tokens):
    requests = random_requests(random.Random(1), 5)
    alone = [answer(tiny(), [request])[0] for request in requests]
    engine = tiny(max_batch_tokens=max_batch_tokens)
    assert answer(engine, requests) == alone
    assert_all_free(engine)


def test_a_prompt_that_is_found_again_gives_the_same_answer(tiny, answer):
    requests = random_requests(random.Random(2), 6)
    engine = tiny()
    first = answer(engine, requests)
    before = engine.stats().totals
    assert answer(engine, requests) == first
    after = engine.stats().totals
    num_prompt_tokens = sum(len(prompt) for prompt, _ in requests)
    assert after.num_cached_tokens - before.num_cached_tokens > num_prompt_tokens / 2


def test_a_preempted_sequence_continues_with_the_same_tokens(tiny, ops, answer, assert_all_free):
    rng = random.Random(3)
    params = SamplingParams(seed=5, max_tokens=60, ignore_eos=True)
    requests = [([rng.randrange(97) for _ in range(60)], params) for _ in range(4)]
    alone = [answer(tiny(), [request])[0] for request in requests]
    # Two prompts fit, two whole answers do not: memory for 480 tokens' keys and values in one layer.
    engine = tiny(kv_memory_bytes=480 * ops.kv_block_bytes(1, 1, 8))
    assert answer(engine, requests) == alone
    assert engine.stats().totals.num_preemptions > 0
    assert_all_free(engine)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_schedules_change_no_token(fake, answer, assert_all_free, seed):
    rng = random.Random(seed)
    run_random_schedule(rng, fake, answer, assert_all_free, random_requests(rng, rng.randint(1, 12)))


@pytest.mark.slow
def test_two_thousand_random_requests_in_little_memory(fake, answer, assert_all_free):
    rng = random.Random(4)
    run_random_schedule(rng, fake, answer, assert_all_free, random_requests(rng, 2000))


def run_random_schedule(rng: random.Random, fake, answer, assert_all_free, requests) -> None:
    """Queue requests at random times, abort some, in little memory; every answer must be the one given alone."""
    alone = [answer(fake(max_batch_tokens=512), [request])[0] for request in requests]
    engine = fake(
        full=rng.randint(24, 60),
        window_blocks=rng.randint(3, 20),
        max_batch_tokens=rng.randint(1, 40),
        max_num_seqs=rng.randint(1, 10),
    )
    waiting = list(enumerate(requests))
    index_of: dict[int, int] = {}
    got: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    aborted: set[int] = set()
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.4:
            index, request = waiting.pop(0)
            index_of[engine.add_request(*request)] = index
        if index_of and rng.random() < 0.05:
            request_id = rng.choice(list(index_of)[-10:])
            engine.abort(request_id)
            aborted.add(index_of[request_id])
        for output in engine.step():
            if output.finish_reason != "abort":
                got[index_of[output.request_id]].append(output.token_id)
    for index, tokens in enumerate(alone):
        assert got[index] == (tokens[: len(got[index])] if index in aborted else tokens)
    assert_all_free(engine)
