"""The experts that tokens went to, recorded beside their keys and values, and the probability of what was drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ossia.engine import LLM, SamplingParams
from ossia.errors import InputError
from ossia.model.transformer import forward, new_caches
from ossia.ops import Batch

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, routing=True, seed=3)


def routing_of_one_pass(engine, token_ids) -> np.ndarray:
    """The experts [tokens, layers, A] of a sequence that is computed alone, at once and in memory of its own."""
    runner = engine._runner
    chosen = []

    class Noting:
        def __getattr__(self, name):
            return getattr(runner._ops, name)

        def route(self, logits_TE, num_active):
            routing = runner._ops.route(logits_TE, num_active)
            chosen.append(routing.experts_TA)
            return routing

    count = len(token_ids)
    table_NB = np.arange(-(-count // 4), dtype=np.int32)[None]
    batch = Batch(
        np.array(token_ids, np.int32),
        np.arange(count, dtype=np.int32),
        np.array([0, count], np.int32),
        np.array([count], np.int32),
        table_NB,
        table_NB,
        np.array([count - 1], np.int32),
    )
    caches = new_caches(runner._ops, runner.config, table_NB.size, table_NB.size, 4)
    forward(Noting(), runner.config, runner._weights, batch, caches)
    return np.stack(chosen, axis=1)


def test_the_recorded_experts_are_those_of_one_pass_however_the_tokens_were_computed(ops, tiny):
    # Prompts that share a beginning, in chunks, in memory that is too small for all of them at once.
    prompts = [[*range(2, 30), 40 + i, *range(30, 30 + 3 * i)] for i in range(6)]
    engine = tiny(record_routing=True, max_batch_tokens=16, kv_memory_bytes=70 * ops.kv_block_bytes(4, 2, 8))
    completions = LLM(engine).generate(prompts, PARAMS)
    assert engine.stats().totals.num_preemptions > 0
    assert engine.stats().totals.num_cached_tokens > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        token_ids = [*prompt, *completion.token_ids][:-1]
        assert completion.routing.shape == (len(token_ids), 3, 2)
        np.testing.assert_array_equal(completion.routing, routing_of_one_pass(engine, token_ids))


def test_the_experts_of_tokens_that_were_found_in_the_cache_are_reported_too(tiny):
    engine = tiny(record_routing=True)
    first = LLM(engine).generate([list(range(2, 40))], PARAMS)[0]
    token_ids = [*range(2, 40), *first.token_ids, 50, 51]
    second = LLM(engine).generate([token_ids], PARAMS)[0]
    assert second.num_cached_tokens == 38 + 11
    np.testing.assert_array_equal(second.routing[:49], first.routing)
    np.testing.assert_array_equal(second.routing, routing_of_one_pass(engine, [*token_ids, *second.token_ids][:-1]))


def test_experts_are_reported_only_to_those_who_ask_and_only_by_an_engine_that_records(tiny):
    engine = tiny(record_routing=True)
    assert LLM(engine).generate([[2, 3]], SamplingParams(max_tokens=2))[0].routing is None
    with pytest.raises(InputError, match="record_routing") as caught:
        LLM(tiny()).generate([[2, 3]], PARAMS)
    assert caught.value.param == "routing"


def test_recording_changes_no_token(tiny):
    prompts = [list(range(2, 20 + i)) for i in range(4)]
    plain = SamplingParams(max_tokens=12, ignore_eos=True, seed=3)
    recorded = LLM(tiny(record_routing=True)).generate(prompts, PARAMS)
    assert [one.token_ids for one in recorded] == [one.token_ids for one in LLM(tiny()).generate(prompts, plain)]


def test_weights_that_are_replaced_count_from_the_next_request_on(tiny, tiny_runner, ops):
    engine, other = tiny(), tiny()
    runner = other._runner
    weights = runner._weights._replace(final_norm_D=ops.vector(-np.asarray(runner._weights.final_norm_D)))
    prompt = [list(range(2, 40))]
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0)
    before = LLM(engine).generate(prompt, params)[0].token_ids
    engine.replace_weights(weights)
    after = LLM(engine).generate(prompt, params)[0]
    assert after.num_cached_tokens == 0
    assert after.token_ids != before
    engine.replace_weights(runner._weights)
    assert LLM(engine).generate(prompt, params)[0].token_ids == before


# The probability of what was drawn -----------------------------------------------------------------------------------


class _Only:
    """Allows a few tokens at every place."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def fill(self, mask) -> None:
        mask[:] = 0
        for token_id in self.token_ids:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        assert token_id in self.token_ids


def test_without_changes_the_drawn_logprob_is_the_models_own(tiny):
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1, logprobs=True, drawn_logprobs=True)
    one = LLM(tiny()).generate([[5, 6, 7]], params)[0]
    np.testing.assert_allclose(one.drawn_logprobs, one.logprobs, atol=1e-6)


def test_the_drawn_logprob_is_that_of_temperature_top_k_and_mask_together(tiny):
    allowed = (4, 9, 33, 70, 96)
    params = SamplingParams(
        max_tokens=20, ignore_eos=True, seed=1, temperature=0.7, top_k=3, top_logprobs=97, drawn_logprobs=True,
        constraint=_Only(*allowed),
    )  # fmt: skip
    one = LLM(tiny()).generate([[5, 6, 7]], params)[0]
    for token_id, drawn, top in zip(one.token_ids, one.drawn_logprobs, one.top_logprobs, strict=True):
        logprobs = dict(top)
        kept = sorted((logprobs[each] for each in allowed), reverse=True)[:3]
        total = sum(math.exp(value / 0.7) for value in kept)
        assert drawn == pytest.approx(logprobs[token_id] / 0.7 - math.log(total), abs=1e-5)


def test_the_likeliest_token_is_drawn_with_certainty_at_temperature_0(tiny):
    params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0, drawn_logprobs=True)
    assert LLM(tiny()).generate([[5, 6, 7]], params)[0].drawn_logprobs == (0.0,) * 4
