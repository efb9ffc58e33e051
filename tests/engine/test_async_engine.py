"""Many callers, one engine thread: nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from ossia.engine import AsyncEngine, Engine, SamplingParams
from ossia.errors import InputError, OssiaError, UnavailableError

ENDLESS = SamplingParams(temperature=0, ignore_eos=True)


async def tokens_of(engine: AsyncEngine, prompt, params) -> list[int]:
    return [output.token_id async for output in engine.generate(prompt, params)]


def slow_down(engine: Engine, step_s: float = 0.002) -> Engine:
    run = engine._runner.run

    def slow(batch):
        time.sleep(step_s)
        return run(batch)

    engine._runner.run = slow
    return engine


async def until(condition, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        await asyncio.sleep(0.005)


def is_idle(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return (
        stats.num_running == stats.num_waiting == 0
        and stats.num_free_full_blocks == stats.num_full_blocks
        and stats.num_free_window_blocks == stats.num_window_blocks
    )


def test_many_callers_get_the_answers_that_they_would_get_alone(fake, answer):
    requests = [([i % 60, *range(2, 3 + i % 17)], SamplingParams(seed=i, max_tokens=1 + i % 23)) for i in range(200)]
    alone = [answer(fake(), [request])[0] for request in requests]

    async def main() -> list[list[int]]:
        async with AsyncEngine(fake(full=40, window_blocks=20)) as engine:
            got = await asyncio.gather(*(tokens_of(engine, *request) for request in requests))
            assert is_idle(engine)
            return got

    assert asyncio.run(main()) == alone


def test_leaving_the_iterator_frees_its_blocks(fake):
    async def main() -> None:
        async with AsyncEngine(slow_down(fake())) as engine:
            stream = engine.generate([3, 4, 5], ENDLESS)
            async for _ in stream:
                break
            assert not is_idle(engine)
            await stream.aclose()
            await until(lambda: is_idle(engine))

    asyncio.run(main())


def test_a_cancelled_caller_frees_its_blocks_and_no_other_notices(fake, answer):
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    alone = answer(fake(), [([9, 8, 7], params)])[0]

    async def main() -> None:
        async with AsyncEngine(slow_down(fake())) as engine:
            leaving = [asyncio.create_task(tokens_of(engine, [i, 3], ENDLESS)) for i in range(5)]
            staying = asyncio.create_task(tokens_of(engine, [9, 8, 7], params))
            await until(lambda: engine.stats().totals.num_sampled_tokens > 10)
            for task in leaving:
                task.cancel()
            assert await staying == alone
            results = await asyncio.gather(*leaving, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            await until(lambda: is_idle(engine))

    asyncio.run(main())


def test_a_request_that_cannot_be_used_is_refused_before_anything_is_awaited(fake):
    async def main() -> None:
        async with AsyncEngine(fake()) as engine:
            with pytest.raises(InputError):
                engine.generate([], ENDLESS)

    asyncio.run(main())


def test_a_request_that_cannot_be_queued_fails_alone(fake, monkeypatch):
    async def main() -> None:
        async with AsyncEngine(fake()) as engine:
            add = engine._engine.add_request
            monkeypatch.setattr(engine._engine, "add_request", lambda *_: 1 / 0)
            with pytest.raises(OssiaError, match="ZeroDivisionError"):
                await tokens_of(engine, [3], ENDLESS)
            monkeypatch.setattr(engine._engine, "add_request", add)
            assert len(await tokens_of(engine, [3], SamplingParams(max_tokens=5, ignore_eos=True))) == 5

    asyncio.run(main())


def test_a_fault_of_one_request_is_raised_to_its_caller(fake):
    params = SamplingParams(banned_token_ids=tuple(range(64)))

    async def main() -> None:
        async with AsyncEngine(fake()) as engine:
            with pytest.raises(OssiaError, match="no token is allowed"):
                await tokens_of(engine, [3], params)
            assert is_idle(engine)

    asyncio.run(main())


def test_a_failed_step_reaches_every_caller_and_the_engine_goes_on(fake):
    inner = slow_down(fake())
    run = inner._runner.run
    fail = threading.Event()
    inner._runner.run = lambda batch: 1 / 0 if fail.is_set() else run(batch)

    async def main() -> None:
        async with AsyncEngine(inner) as engine:
            # More callers than can run at once: those that wait must hear of it as well.
            tasks = [asyncio.create_task(tokens_of(engine, [i], ENDLESS)) for i in range(12)]
            await until(lambda: engine.stats().num_running == 8)
            fail.set()
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
            assert all(isinstance(result, OssiaError) for result in results)
            assert len({id(result) for result in results}) == 12
            assert isinstance(results[0].__cause__, ZeroDivisionError)
            fail.clear()
            assert len(await tokens_of(engine, [3], SamplingParams(max_tokens=5, ignore_eos=True))) == 5

    asyncio.run(main())


def test_shutdown_answers_every_waiting_caller(fake):
    async def main() -> None:
        engine = AsyncEngine(slow_down(fake()))
        tasks = [asyncio.create_task(tokens_of(engine, [i], ENDLESS)) for i in range(20)]
        await until(lambda: engine.stats().num_running > 0)
        await asyncio.to_thread(engine.close)
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert all(isinstance(result, UnavailableError) for result in results)
        with pytest.raises(UnavailableError):
            await tokens_of(engine, [3], ENDLESS)
        engine.close()

    asyncio.run(main())


def test_a_closed_event_loop_does_not_disturb_callers_in_another(fake):
    async def abandon(engine: AsyncEngine) -> None:
        stream = engine.generate([5, 6], ENDLESS)
        await anext(stream)
        abandoned.append(stream)

    abandoned: list[object] = []
    engine = AsyncEngine(slow_down(fake()))
    # A loop that is stopped and closed without a chance to clean up.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(abandon(engine))
    loop.close()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert len(asyncio.run(tokens_of(engine, [3], params))) == 20
    asyncio.run(until(lambda: is_idle(engine)))
    engine.close()


def test_an_iterator_that_is_never_read_starts_nothing(fake):
    async def main() -> None:
        async with AsyncEngine(fake()) as engine:
            await engine.generate([3], ENDLESS).aclose()
            assert engine.stats().totals.num_prompt_tokens == 0

    asyncio.run(main())
