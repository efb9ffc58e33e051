"""How likely the tokens of a prompt were."""

from __future__ import annotations

import numpy as np
import pytest

from ossia.engine import LLM, SamplingParams
from ossia.errors import InputError


def expected(engine, prompt) -> np.ndarray:
    """log p of each token of a prompt behind the first, each asked for by the sampling of a longer prompt."""
    found = []
    for end in range(1, len(prompt)):
        params = SamplingParams(max_tokens=1, ignore_eos=True, top_logprobs=97)
        [one] = LLM(engine).generate([prompt[:end]], params)
        found.append(dict(one.top_logprobs[0]))
    return found


def asked(start: int, top: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=1, ignore_eos=True, score_from=start, top_logprobs=top)


PROMPT = [5, 9, 33, 70, 2, 96, 8, 8, 51, 7, 12, 60, 61, 62, 3, 17, 18, 19, 90, 91, 44]


@pytest.mark.parametrize("start", [1, 4, 13, 20])
def test_the_log_probabilities_of_a_prompt_are_those_of_sampling_its_tokens(tiny, start):
    engine = tiny()
    logprobs = expected(tiny(), PROMPT)[start - 1 :]
    # A second time, when the prompt is in the cache.
    for _ in range(2):
        [one] = LLM(engine).generate([PROMPT], asked(start, top=3))
        assert len(one.prompt_logprobs) == len(PROMPT) - start
        for token_id, scored, all_of_them in zip(PROMPT[start:], one.prompt_logprobs, logprobs, strict=True):
            assert scored.logprob == pytest.approx(all_of_them[token_id], abs=1e-5)
            assert scored.top_logprobs[0][1] == pytest.approx(max(all_of_them.values()), abs=1e-5)
            assert len(scored.top_logprobs) == 3
    assert one.num_cached_tokens <= start - 1


def test_many_prompts_in_chunks_and_in_little_memory_are_scored_alike(ops, tiny):
    prompts = [[*PROMPT, *range(3, 10 + 3 * i), *PROMPT] for i in range(6)]
    apart = [LLM(tiny()).generate([prompt], asked(5))[0] for prompt in prompts]
    engine = tiny(max_batch_tokens=16, kv_memory_bytes=80 * ops.kv_block_bytes(4, 2, 8))
    params = SamplingParams(max_tokens=60, ignore_eos=True, score_from=5, seed=1)
    together = LLM(engine).generate(prompts, params)
    assert engine.stats().totals.num_preemptions > 0
    for one, other in zip(apart, together, strict=True):
        assert len(other.token_ids) == 60
        np.testing.assert_allclose(
            [s.logprob for s in one.prompt_logprobs], [s.logprob for s in other.prompt_logprobs], atol=1e-5
        )


def test_what_is_cached_before_the_scored_part_is_not_computed_again(tiny):
    engine = tiny()
    LLM(engine).generate([PROMPT], SamplingParams(max_tokens=1))
    [one] = LLM(engine).generate([PROMPT], asked(17))
    assert one.num_cached_tokens == 16


def test_the_sampled_tokens_are_those_without_scoring(tiny):
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=4, logprobs=True)
    scored = SamplingParams(max_tokens=8, ignore_eos=True, seed=4, logprobs=True, score_from=2)
    assert LLM(tiny()).generate([PROMPT], params)[0].token_ids == LLM(tiny()).generate([PROMPT], scored)[0].token_ids


@pytest.mark.parametrize("start", [0, -1, len(PROMPT)])
def test_a_place_that_the_prompt_does_not_have_is_refused(tiny, start):
    with pytest.raises(InputError, match="score_from") as caught:
        LLM(tiny()).generate([PROMPT], asked(start))
    assert caught.value.param == "score_from"
