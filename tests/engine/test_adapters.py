"""Requests that go through adapters: each gets the answer that it would get alone, whatever else goes on."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import TINY, tiny_weights
from tests.engine.test_schedules import random_requests

from ossia.engine import AsyncEngine, Engine, EngineConfig, Runner, SamplingParams
from ossia.errors import ConfigError, NotFoundError
from ossia.model.adapter import Adapter
from ossia.model.random_checkpoint import random_adapter
from ossia.ops import load

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
NAMES = ("one", "two", "three")


def adapters() -> list[Adapter]:
    """Of several ranks, with and without experts, embedding and unembedding."""
    return [
        random_adapter(TINY, rank=2, name="one", seed=1),
        random_adapter(TINY, rank=5, expert_rank=2, outer=True, name="two", seed=2),
        random_adapter(TINY, rank=1, expert_rank=3, name="three", seed=3),
    ]


def with_adapters(engine: Engine) -> Engine:
    for adapter in adapters():
        engine.load_adapter(adapter)
    return engine


def spread(rng: random.Random, requests: list) -> list:
    """The same requests through adapters or none; some prompts come again through another."""
    chosen = [(prompt, replace(params, adapter=rng.choice([None, *NAMES]))) for prompt, params in requests]
    again = [(prompt, replace(params, adapter=rng.choice([None, *NAMES]))) for prompt, params in chosen[::2]]
    return chosen + again


def test_an_adapter_changes_the_answer(tiny, answer):
    engine = with_adapters(tiny())
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, adapter=name) for name in (None, *NAMES)]
    answers = answer(engine, [(PROMPT, one) for one in params])
    assert len({tuple(tokens) for tokens in answers}) == 4


@pytest.mark.parametrize("max_batch_tokens", [1, 3, 8, 200])
def test_the_size_of_a_step_changes_no_token(tiny, answer, assert_all_free, max_batch_tokens):
    rng = random.Random(1)
    requests = spread(rng, random_requests(rng, 6))
    alone = [answer(with_adapters(tiny()), [request])[0] for request in requests]
    engine = with_adapters(tiny(max_batch_tokens=max_batch_tokens))
    assert answer(engine, requests) == alone
    assert answer(engine, requests[::-1]) == alone[::-1]
    assert_all_free(engine)


def test_random_schedules_over_a_model_change_no_token(tiny, ops, answer, assert_all_free):
    for seed in range(2):
        rng = random.Random(seed)
        requests = spread(rng, random_requests(rng, 5))
        alone = [answer(with_adapters(tiny()), [request])[0] for request in requests]
        # Little memory: sequences are preempted, and computed again in other company.
        engine = with_adapters(
            tiny(
                max_batch_tokens=rng.randint(1, 40),
                max_num_seqs=rng.randint(1, 8),
                kv_memory_bytes=rng.randint(400, 900) * ops.kv_block_bytes(1, 1, 8),
            )
        )
        got = run_at_random_times(rng, engine, requests)
        assert got == alone
        assert_all_free(engine)


def test_the_number_of_threads_changes_no_token(answer):
    rng = random.Random(5)
    requests = spread(rng, random_requests(rng, 4))

    def engine(threads: int) -> Engine:
        ops = load("cpu", threads=threads)
        return with_adapters(Engine(Runner(ops, TINY, tiny_weights(ops, TINY), EngineConfig(block_size=4))))

    assert answer(engine(3), requests) == [answer(engine(1), [request])[0] for request in requests]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_schedules_find_no_key_of_another_adapter(fake, answer, assert_all_free, seed):
    rng = random.Random(seed)
    requests = spread(rng, random_requests(rng, rng.randint(1, 8)))
    alone = [answer(with_adapters(fake(max_batch_tokens=512)), [request])[0] for request in requests]
    engine = with_adapters(
        fake(
            full=rng.randint(24, 60),
            window_blocks=rng.randint(3, 20),
            max_batch_tokens=rng.randint(1, 40),
            max_num_seqs=rng.randint(1, 10),
        )
    )
    assert run_at_random_times(rng, engine, requests) == alone
    assert_all_free(engine)


def run_at_random_times(rng: random.Random, engine: Engine, requests: list) -> list[list[int]]:
    waiting, index_of = list(enumerate(requests)), {}
    got: list[list[int]] = [[] for _ in requests]
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.4:
            index, request = waiting.pop(0)
            index_of[engine.add_request(*request)] = index
        for output in engine.step():
            got[index_of[output.request_id]].append(output.token_id)
    return got


# The prefix cache ----------------------------------------------------------------------------------------------------


def num_cached(engine: Engine, finish, adapter: str | None) -> int:
    request_id = engine.add_request(PROMPT, SamplingParams(max_tokens=1, adapter=adapter))
    return finish(engine)[request_id][0].num_cached_tokens


def test_a_prompt_is_found_again_by_its_own_adapter_alone(fake, finish):
    engine = with_adapters(fake())
    assert [num_cached(engine, finish, name) for name in (None, *NAMES)] == [0, 0, 0, 0]
    assert [num_cached(engine, finish, name) for name in (*NAMES, None)] == [12, 12, 12, 12]


def test_a_part_full_block_is_found_again_by_its_own_adapter_alone(fake, finish):
    engine = with_adapters(fake(block_size=32))
    assert [num_cached(engine, finish, name) for name in (None, "one", "two")] == [0, 0, 0]
    assert [num_cached(engine, finish, name) for name in (None, "one", "two")] == [12, 12, 12]


def test_an_adapter_that_is_loaded_again_finds_nothing_of_the_old_one(tiny, finish):
    engine = with_adapters(tiny())
    num_cached(engine, finish, "one")
    engine.load_adapter(adapters()[0])
    assert num_cached(engine, finish, "one") == 0
    assert num_cached(engine, finish, "one") == 12


# Coming and going ----------------------------------------------------------------------------------------------------


def test_a_sequence_whose_adapter_is_unloaded_or_replaced_finishes_with_it(tiny, finish, answer):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, adapter="one")
    alone = answer(with_adapters(tiny()), [(PROMPT, params)])[0]
    for change in (
        lambda engine: engine.unload_adapter("one"),
        lambda engine: engine.load_adapter(random_adapter(TINY, rank=3, name="one", seed=9)),
    ):
        engine = with_adapters(tiny())
        request_id = engine.add_request(PROMPT, params)
        waiting_id = engine.add_request(PROMPT[::-1], params)
        tokens = [output.token_id for _ in range(5) for output in engine.step() if output.request_id == request_id]
        change(engine)
        outputs = finish(engine)
        assert tokens + [output.token_id for output in outputs[request_id]] == alone
        assert outputs[waiting_id][-1].finish_reason == "length"


def test_a_request_for_an_adapter_that_is_not_there_is_refused(tiny):
    engine = with_adapters(tiny())
    engine.unload_adapter("two")
    for name in ("two", "four"):
        with pytest.raises(NotFoundError, match=f"there is no adapter '{name}'; loaded are: one, three"):
            engine.add_request(PROMPT, SamplingParams(adapter=name))
    with pytest.raises(NotFoundError, match="there is no adapter 'two'"):
        engine.unload_adapter("two")


def test_memory_of_adapters_is_counted_and_bounded(tiny, finish):
    first, second = (random_adapter(TINY, rank=4, name=name) for name in ("first", "second"))
    size = 4 * first.num_parameters
    engine = tiny(adapter_memory_bytes=int(1.5 * size))
    assert engine.stats().adapter_bytes == engine.stats().num_adapters == 0
    engine.load_adapter(first)
    assert (engine.stats().adapter_bytes, engine.stats().num_adapters) == (size, 1)
    with pytest.raises(ConfigError, match=r"adapter 'second' takes .* MiB beside .* MiB of others; adapter_memory is"):
        engine.load_adapter(second)
    assert engine.adapters == ("first",)
    # The old one of a name gives its room to the new one, unless it still answers.
    engine.load_adapter(first)
    assert engine.stats().adapter_bytes == size
    request_id = engine.add_request(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True, adapter="first"))
    engine.unload_adapter("first")
    assert (engine.stats().adapter_bytes, engine.stats().num_adapters) == (size, 0)
    with pytest.raises(ConfigError):
        engine.load_adapter(second)
    assert finish(engine)[request_id][-1].finish_reason == "length"
    engine.load_adapter(second)
    assert engine.stats().adapter_bytes == size


def test_adapters_survive_a_step_that_fails(tiny, answer):
    engine = with_adapters(tiny())
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, adapter="two")
    before = answer(engine, [(PROMPT, params)])
    engine.reset()
    assert answer(engine, [(PROMPT, params)]) == before


def test_adapters_come_and_go_while_others_answer(tiny):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    async def ask(engine: AsyncEngine, name: str | None) -> list[int]:
        source = engine.through(name) if name else engine
        return [output.token_id async for output in source.generate(PROMPT, params)]

    async def main() -> None:
        engine = AsyncEngine(tiny())
        async with engine:
            expected = {None: await ask(engine, None)}
            for adapter in adapters():
                await asyncio.to_thread(engine.load_adapter, adapter)
                expected[adapter.name] = await ask(engine, adapter.name)

            async def change() -> None:
                for _ in range(10):
                    for adapter in adapters():
                        await asyncio.to_thread(engine.load_adapter, adapter)

            async def keep_asking(name: str | None) -> None:
                for _ in range(5):
                    assert await ask(engine, name) == expected[name]

            await asyncio.gather(change(), *(keep_asking(name) for name in expected))
            engine.unload_adapter("two")
            with pytest.raises(NotFoundError):
                await ask(engine, "two")
            assert await ask(engine, "one") == expected["one"]

    asyncio.run(main())


def test_random_adapters_are_the_same_for_a_seed_and_fit_their_model():
    first, again, other = (random_adapter(TINY, expert_rank=2, outer=True, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first.pairs[key].b, again.pairs[key].b) for key in first.pairs)
    assert not np.array_equal(first.pairs["layers.0.q"].a, other.pairs["layers.0.q"].a)
