"""One engine, step by step: what requests cost, how they end, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from ossia.engine import NO_TOKEN, SamplingParams
from ossia.errors import ContextLengthError, InputError, OssiaError

LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def num_computed(engine) -> int:
    return engine.stats().totals.num_computed_tokens


# Reuse ---------------------------------------------------------------------------------------------------------------


def test_the_turns_of_a_tool_loop_compute_only_their_new_tokens(tiny, finish):
    engine = tiny()
    tokens = list(range(2, 21))
    # The last token that was sampled has never been computed.
    num_old = 0
    for turn in range(5):
        before = num_computed(engine)
        request_id = engine.add_request(tokens, SamplingParams(seed=turn, max_tokens=7, ignore_eos=True))
        outputs = finish(engine)[request_id]
        assert outputs[0].num_cached_tokens == num_old
        assert num_computed(engine) - before == len(tokens) - num_old + len(outputs) - 1
        tokens += [output.token_id for output in outputs]
        num_old = len(tokens) - 1
        tokens += [50 + turn] * 3


def test_copies_of_a_prompt_queued_together_compute_it_once(fake, finish):
    engine = fake(max_batch_tokens=64)
    prompt = list(range(2, 35))
    for seed in range(4):
        engine.add_request(prompt, SamplingParams(seed=seed, max_tokens=1))
    finish(engine)
    # 8 whole blocks once; the last token of the prompt by each.
    assert num_computed(engine) == 32 + 4


def test_an_aborted_prompt_that_others_wait_for_leaves_them_what_it_computed(fake, finish):
    engine = fake(max_batch_tokens=8)
    prompt = list(range(2, 35))
    first, second = [engine.add_request(prompt, LONG) for _ in range(2)]
    engine.step()
    engine.abort(first)
    outputs = finish(engine)
    assert outputs[second][0].num_cached_tokens == 8
    assert outputs[second][-1].finish_reason == "length"


def test_nothing_is_found_after_a_reset(fake, finish):
    engine = fake()
    for _ in range(2):
        request_id = engine.add_request(list(range(2, 20)), LONG)
        assert finish(engine)[request_id][0].num_cached_tokens == 0
        engine.reset()


# Memory and order ----------------------------------------------------------------------------------------------------


def test_an_aborted_request_has_freed_its_blocks_before_the_next_step(fake, assert_all_free):
    engine = fake()
    request_id = engine.add_request(list(range(2, 30)), LONG)
    engine.step()
    assert engine.stats().num_free_full_blocks < engine.stats().num_full_blocks
    engine.abort(request_id)
    assert_all_free(engine)
    assert [(o.request_id, o.token_id, o.finish_reason) for o in engine.step()] == [(request_id, NO_TOKEN, "abort")]
    assert not engine.has_work
    engine.abort(request_id)
    engine.abort(12345)
    assert engine.step() == []


def test_a_waiting_request_can_be_aborted(fake, finish):
    engine = fake(max_num_seqs=1)
    first, second = (engine.add_request([2, 3, 4 + i], LONG) for i in range(2))
    engine.step()
    engine.abort(second)
    outputs = finish(engine)
    assert len(outputs[first]) == 19
    assert outputs[second][0].finish_reason == "abort"


def test_no_step_exceeds_its_tokens_or_its_sequences(fake, finish):
    engine = fake(max_batch_tokens=10, max_num_seqs=3)
    for i in range(9):
        engine.add_request(list(range(i + 2, 5 * i + 3)), LONG)
    finish(engine)
    for batch in engine._runner.batches:
        assert len(batch.token_ids_T) <= 10
        assert len(batch.key_lengths_N) <= 3


def test_a_decoding_sequence_gets_a_token_in_every_step_while_prompts_come_in(fake):
    engine = fake(max_batch_tokens=8, full=200, window_blocks=50)
    first = engine.add_request([5, 6], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    engine.step()
    for i in range(30):
        engine.add_request(list(range(i, i + 30)), SamplingParams(max_tokens=1))
        assert first in [output.request_id for output in engine.step()]


def test_a_short_prompt_is_not_held_up_by_a_long_one_before_it(fake):
    engine = fake(max_batch_tokens=16, full=200, window_blocks=50)
    engine.add_request([3] * 400, SamplingParams(max_tokens=1))
    engine.step()
    short = engine.add_request([4, 5, 6, 7], SamplingParams(max_tokens=1))
    assert short in [output.request_id for output in engine.step()]


def test_a_prompt_leaves_memory_for_the_decodes_behind_it(fake):
    engine = fake(max_batch_tokens=64, full=200, window_blocks=8)
    engine.add_request([3] * 400, SamplingParams(max_tokens=1))
    engine.step()
    short = engine.add_request([4, 5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
    for _ in range(12):
        assert short in [output.request_id for output in engine.step()]
    assert engine.stats().totals.num_preemptions == 0


def test_what_a_short_prompt_leaves_of_a_step_goes_to_the_long_one(fake):
    engine = fake(max_batch_tokens=16, full=200, window_blocks=50)
    engine.add_request([3] * 400, SamplingParams(max_tokens=1))
    engine.add_request([4], SamplingParams(max_tokens=1))
    engine.step()
    assert [len(batch.token_ids_T) for batch in engine._runner.batches] == [16]


def test_an_early_request_ends_however_many_come_after_it(fake):
    engine = fake(full=20, window_blocks=8, max_batch_tokens=6, max_num_seqs=4)
    early = engine.add_request(list(range(2, 42)), LONG)
    for step in range(200):
        engine.add_request([step % 60, 3, 4], SamplingParams(max_tokens=10, ignore_eos=True))
        outputs = engine.step()
        if any(output.request_id == early and output.finish_reason for output in outputs):
            return
    pytest.fail("the early request starves")


def test_the_request_that_came_last_is_preempted_first(fake, finish):
    engine = fake(full=20, window_blocks=20)
    ids = [engine.add_request([i] * 18, LONG) for i in (2, 3, 4)]
    outputs: dict[int, int] = {}
    order = []
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] = outputs.get(output.request_id, 0) + 1
            if output.finish_reason:
                order.append(output.request_id)
    assert engine.stats().totals.num_preemptions > 0
    assert order == ids
    assert set(outputs.values()) == {20}


def test_the_caches_of_a_model_take_no_more_than_their_memory(tiny, finish, assert_all_free):
    engine = tiny(kv_memory_bytes=100_000)
    caches = engine._runner._caches
    assert 0 < sum(getattr(array, "nbytes", 0) for cache in caches for array in cache) <= 100_000
    for i in range(6):
        engine.add_request(list(range(2, 50 + i)), LONG)
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        assert 0 <= stats.num_free_full_blocks <= stats.num_full_blocks
        assert 0 <= stats.num_free_window_blocks <= stats.num_window_blocks
    assert_all_free(engine)


def test_a_long_sequence_needs_few_window_blocks(fake, finish):
    engine = fake(full=128, window_blocks=3, max_batch_tokens=64)
    request_id = engine.add_request([7] * 200, SamplingParams(temperature=0, ignore_eos=True, max_tokens=300))
    assert len(finish(engine)[request_id]) == 300


@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 9])
def test_every_window_gives_the_same_answers_in_little_memory(fake, answer, window):
    requests = [([i, *range(2, 10 + 7 * i)], LONG) for i in range(5)]
    least = 24 if window is None else 4
    alone = [answer(fake(window=window), [request])[0] for request in requests]
    assert answer(fake(full=24, window_blocks=least, window=window, max_batch_tokens=5), requests) == alone


# Refused -------------------------------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_at_once_with_numbers(fake, tiny):
    with pytest.raises(ContextLengthError, match=r"10 tokens .* 300, together 310; the context window holds 256"):
        tiny().add_request([2] * 10, SamplingParams(max_tokens=300))
    with pytest.raises(ContextLengthError, match=r"30 tokens .* 52, together 82; the memory for keys and .* holds 81"):
        fake(full=20).add_request([2] * 30, SamplingParams(max_tokens=52))
    with pytest.raises(ContextLengthError, match="together 51; the context window holds 50") as caught:
        fake(max_context=50).add_request([2] * 50, SamplingParams())
    assert caught.value.param == "token_ids"


def test_without_max_tokens_the_answer_goes_to_the_end_of_context_or_memory(fake, finish):
    for engine, limit in ((fake(max_context=50), 50), (fake(full=10), 41)):
        engine.add_request([2] * 30, SamplingParams(ignore_eos=True, seed=1))
        (outputs,) = finish(engine).values()
        assert len(outputs) == limit - 30
        assert outputs[-1].finish_reason == "length"


def test_a_request_that_fills_the_memory_to_the_last_slot_runs(fake, finish):
    engine = fake(full=10, window_blocks=3)
    request_id = engine.add_request([2] * 30, SamplingParams(max_tokens=11, ignore_eos=True))
    assert len(finish(engine)[request_id]) == 11


@pytest.mark.parametrize(
    ("token_ids", "params", "param"),
    [
        ([], {}, "token_ids"),
        ([3, 64], {}, "token_ids"),
        ([3, -1], {}, "token_ids"),
        ([3], {"banned_token_ids": (64,)}, "banned_token_ids"),
    ],
)
def test_a_request_that_cannot_be_used_is_refused(fake, token_ids, params, param):
    engine = fake()
    with pytest.raises(InputError) as caught:
        engine.add_request(token_ids, SamplingParams(**params))
    assert caught.value.param == param
    assert not engine.has_work


def test_stop_strings_are_refused_where_the_bytes_of_tokens_are_not_known(tiny):
    with pytest.raises(InputError, match="token_bytes"):
        tiny().add_request([3], SamplingParams(stop_strings=("x",)))


# Ends ----------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_at_the_models_stop_token_unless_told_otherwise(fake, finish):
    bias = {1: 5.0}
    engine = fake()
    short = engine.add_request([3], SamplingParams(temperature=0, logit_bias=bias, max_tokens=30))
    long = engine.add_request([3], SamplingParams(temperature=0, logit_bias=bias, max_tokens=30, ignore_eos=True))
    outputs = finish(engine)
    last = outputs[short][-1]
    assert (last.token_id, last.finish_reason) == (1, "stop")
    assert last.stop == ((1,), len(outputs[short]) - 1, None)
    assert len(outputs[long]) == 30
    assert 1 in [output.token_id for output in outputs[long][:-1]]


def test_an_answer_ends_at_stop_tokens_runs_and_strings_of_its_request(fake, answer, finish):
    (tokens,) = answer(fake(), [([9, 8], LONG)])
    text = b"".join(bytes([97 + t % 26]) * (1 + t % 3) for t in tokens)
    first = len(text) - len(text[:1] * (1 + tokens[0] % 3))
    assert first > 4
    string = text[4:8].decode()
    for stop in (
        {"stop_token_ids": (tokens[5],)},
        {"stop_sequences": (tuple(tokens[4:6]),)},
        {"stop_strings": (string,)},
    ):
        engine = fake()
        engine.add_request([9, 8], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, **stop))
        (outputs,) = finish(engine).values()
        assert outputs[-1].finish_reason == "stop"
        got = [output.token_id for output in outputs]
        assert got == tokens[: len(got)]
        if "stop_strings" in stop:
            assert outputs[-1].stop.match == string
            assert outputs[-1].stop.num_bytes == text.find(string.encode())
            assert outputs[-1].held_bytes == 0
        else:
            assert got[: outputs[-1].stop.num_tokens] + list(outputs[-1].stop.match) == got


def test_no_stop_counts_before_the_least_number_of_tokens(fake, finish):
    engine = fake()
    params = SamplingParams(
        temperature=0, min_tokens=6, max_tokens=20, logit_bias={1: 100.0}, stop_strings=("a", "b", "c", "d", "e")
    )
    request_id = engine.add_request([3], params)
    outputs = finish(engine)[request_id]
    assert len(outputs) == 7
    assert [output.token_id for output in outputs].index(1) == 6


def test_logprobs_come_with_every_token_if_asked_for(tiny, finish):
    engine = tiny()
    engine.add_request([5, 6], SamplingParams(seed=1, logprobs=True, top_logprobs=3, max_tokens=4, ignore_eos=True))
    (outputs,) = finish(engine).values()
    for output in outputs:
        assert output.logprob < 0
        assert len(output.top_logprobs) == 3
        assert dict(output.top_logprobs).get(output.token_id, output.logprob) == output.logprob
        assert np.exp([value for _, value in output.top_logprobs]).sum() <= 1


# Constraints ---------------------------------------------------------------------------------------------------------


class Only:
    """Allows given tokens in turn."""

    def __init__(self, token_ids: list[int]) -> None:
        self.left = list(token_ids)

    def fill(self, mask: np.ndarray) -> None:
        mask[:] = 0
        mask[self.left[0] // 32] = 1 << (self.left[0] % 32)

    def accept(self, token_id: int) -> None:
        assert token_id == self.left.pop(0)


def test_a_constraint_decides_what_may_come_next_also_after_preemption(fake, finish):
    wanted = [[(7 * i + j) % 64 for j in range(30)] for i in range(4)]
    engine = fake(full=20, window_blocks=20)
    ids = [
        engine.add_request([i + 2] * 18, SamplingParams(constraint=Only(tokens), max_tokens=30, ignore_eos=True))
        for i, tokens in enumerate(wanted)
    ]
    outputs = finish(engine)
    assert [[output.token_id for output in outputs[i]] for i in ids] == wanted
    assert engine.stats().totals.num_preemptions > 0
    engine.close()


class Broken(Only):
    def __init__(self, where: str) -> None:
        super().__init__([3] * 30)
        self.where = where

    def fill(self, mask: np.ndarray) -> None:
        if self.where == "fill":
            raise ZeroDivisionError("no grammar")
        super().fill(mask)
        if self.where == "empty":
            mask[:] = 0

    def accept(self, token_id: int) -> None:
        if self.where == "accept":
            raise InputError("not in the grammar")


@pytest.mark.parametrize(
    ("where", "message"),
    [("fill", "ZeroDivisionError: no grammar"), ("accept", "not in the grammar"), ("empty", "no token is allowed")],
)
def test_a_broken_constraint_ends_its_own_request_alone(fake, finish, assert_all_free, where, message):
    engine = fake()
    broken = engine.add_request([3, 4], SamplingParams(constraint=Broken(where)))
    sound = engine.add_request([3, 5], LONG)
    outputs = finish(engine)
    (end,) = outputs[broken]
    assert (end.finish_reason, end.token_id) == ("error", NO_TOKEN)
    assert isinstance(end.error, OssiaError)
    assert message in str(end.error)
    assert len(outputs[sound]) == 20
    assert_all_free(engine)
    engine.close()


def test_after_a_failed_step_new_requests_are_answered(fake, answer, assert_all_free):
    engine = fake()
    engine.add_request([3, 4, 5, 6, 7, 8], LONG)
    run, engine._runner.run = engine._runner.run, lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine._runner.run = run
    assert not engine.has_work
    assert_all_free(engine)
    assert answer(engine, [([9, 8], LONG)]) == answer(fake(), [([9, 8], LONG)])
