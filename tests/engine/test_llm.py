"""Many prompts at once, offline."""

from __future__ import annotations

import pytest

from ossia.engine import LLM, SamplingParams
from ossia.errors import InputError, OssiaError


@pytest.mark.parametrize("progress", [False, True])
def test_answers_come_in_the_order_of_their_prompts(tiny, answer, progress):
    prompts = [list(range(2, 5 + 3 * i)) for i in range(12)]
    each = [SamplingParams(seed=i, max_tokens=20 - i, logprobs=True, top_logprobs=2) for i in range(12)]
    completions = LLM(tiny()).generate(prompts, each, progress=progress)
    alone = [answer(tiny(), [request])[0] for request in zip(prompts, each, strict=True)]
    assert [list(completion.token_ids) for completion in completions] == alone
    for completion in completions:
        assert len(completion.logprobs) == len(completion.top_logprobs) == len(completion.token_ids)
        assert completion.finish_reason in ("stop", "length")


def test_one_set_of_parameters_serves_all_prompts(fake):
    completions = LLM(fake()).generate([[2], [3]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert [len(completion.token_ids) for completion in completions] == [3, 3]
    assert completions[0].logprobs == completions[0].top_logprobs == ()


def test_no_prompts_have_no_answers(fake):
    assert LLM(fake()).generate([], SamplingParams()) == []


def test_a_prompt_that_cannot_be_used_is_refused_before_anything_is_computed(fake):
    engine = fake()
    with pytest.raises(InputError):
        LLM(engine).generate([[2], []], SamplingParams(max_tokens=3))
    with pytest.raises(InputError, match="2 prompts and 1 params"):
        LLM(engine).generate([[2], [3]], [SamplingParams(max_tokens=3)])
    assert engine.stats().totals.num_steps == 0
    assert not engine.has_work


def test_a_request_that_fails_is_raised_and_the_others_are_aborted(fake, assert_all_free):
    engine = fake()
    llm = LLM(engine)
    with pytest.raises(OssiaError, match="no token is allowed"):
        llm.generate([[2], [3]], [SamplingParams(), SamplingParams(banned_token_ids=tuple(range(64)))])
    assert_all_free(engine)
    assert len(llm.generate([[2]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
