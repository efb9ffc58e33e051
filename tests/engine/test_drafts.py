"""Drafts of what may come next: found where it stands earlier, and of no influence on what is sampled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.test_schedules import random_requests, run_random_schedule

from ossia.config import Config
from ossia.engine import Engine, SamplingParams
from ossia.engine.drafts import Drafts
from ossia.local import LocalModel
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.ops import load

# What is found


def longest_match(token_ids: list[int], limit: int) -> list[int]:
    """The specification: behind the last place that the last three tokens stand at, the more the longer the run is."""
    for place in range(len(token_ids) - 1, 2, -1):
        matched = 0
        while matched < place and token_ids[place - 1 - matched] == token_ids[-1 - matched]:
            matched += 1
        if matched >= 3:
            longer = list(token_ids)
            for i in range(min(limit, matched - 2)):
                longer.append(longer[place + i])
            return longer[len(token_ids) :]
    return []


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_drafts_are_those_of_the_specification(seed):
    rng = random.Random(seed)
    token_ids = [rng.randrange(rng.choice([1, 2, 4])) for _ in range(rng.randrange(200))]
    drafts = Drafts(token_ids)
    for _ in range(20):
        limit = rng.randrange(8)
        assert drafts.propose(limit) == longest_match(token_ids, limit)
        token_ids += [rng.randrange(3) for _ in range(rng.choice([0, 1, 1, 2, 5, 100]))]


def test_the_last_place_counts_and_a_long_run_gives_more():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert Drafts([*text, 90, 1, 2, 3]).propose(8) == [4]
    assert Drafts([*text, 90, 1, 2, 3, 4, 5]).propose(8) == [6, 7, 8]
    assert Drafts([*text, 90, 1, 2, 3, 4, 5]).propose(2) == [6, 7]
    assert Drafts([*text, 2, 3, 4, 80, 2, 3, 4]).propose(8) == [80]
    assert Drafts([*text, 90, 1, 2]).propose(8) == []
    assert Drafts([1, 2] * 9).propose(5) == [1, 2, 1, 2, 1]
    assert Drafts([*text, 90, 1, 2, 3]).propose(0) == Drafts([1, 2]).propose(8) == []
    assert Drafts([201_087, 201_086, 201_085] * 2).propose(8) == [201_087]


# What is sampled


@pytest.fixture
def tiny(tiny_runner) -> Callable[..., Engine]:
    """As everywhere, over the one backend that takes drafts."""
    ops = load("cpu", threads=2)
    defaults = {"block_size": 4, "max_batch_tokens": 32, "max_num_seqs": 8, "kv_memory_bytes": 1 << 20}
    return lambda **settings: Engine(tiny_runner(ops, **(defaults | settings)))


class Oracle:
    """Drafts of answers that are known, many of their tokens wrong."""

    def __init__(self, texts: list[list[int]], rng: random.Random) -> None:
        self._texts, self._rng = texts, rng

    def propose(self, token_ids: list[int], limit: int) -> list[int]:
        n = len(token_ids)
        draft: list[int] = next((text[n:] for text in self._texts if text[:n] == token_ids), [])
        draft += [self._rng.randrange(64) for _ in range(self._rng.randrange(4))]
        return [t if self._rng.random() < 0.8 else self._rng.randrange(64) for t in draft][: max(0, limit)]


@pytest.fixture
def oracle(monkeypatch) -> Iterator[list[list[int]]]:
    """The texts that drafts are taken from; empty at first."""
    texts: list[list[int]] = []
    one = Oracle(texts, random.Random(0))
    monkeypatch.setattr(Drafts, "propose", lambda self, limit: one.propose(self._token_ids, limit))
    yield texts


@pytest.mark.parametrize("seed", range(12))
def test_random_schedules_with_good_and_bad_drafts_change_no_token(seed, fake, answer, assert_all_free, oracle):
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randint(1, 12))
    alone = [answer(fake(max_batch_tokens=512, draft_tokens=0), [request])[0] for request in requests]
    oracle += [[*prompt, *tokens] for (prompt, _), tokens in zip(requests, alone, strict=True)]
    engines: list[Engine] = []

    def kept(**options: int) -> Engine:
        engines.append(fake(**options))
        return engines[-1]

    run_random_schedule(rng, kept, answer, assert_all_free, requests)
    assert sum(engine.stats().totals.num_accepted_tokens for engine in engines) > 0
    assert not oracle or answer(fake(draft_tokens=64), requests) == alone


def test_a_model_answers_the_same_with_drafts_in_fewer_steps(tiny, finish, assert_all_free, oracle):
    requests = random_requests(random.Random(5), 6, longest=40)
    requests = [(prompt, SamplingParams(temperature=p.temperature, seed=p.seed, max_tokens=40, top_logprobs=2,
                                        logprobs=True, drawn_logprobs=True, ignore_eos=True))
                for prompt, p in requests]  # fmt: skip
    plain, drafting = tiny(draft_tokens=0), tiny(draft_tokens=30)
    ids = [plain.add_request(*request) for request in requests]
    wanted = finish(plain)
    oracle += [[*prompt, *(o.token_id for o in wanted[i])] for i, (prompt, _) in zip(ids, requests, strict=True)]
    assert [drafting.add_request(*request) for request in requests] == ids
    # Log-probabilities are the same bits, and so is all else.
    assert finish(drafting) == wanted
    before, after = plain.stats().totals, drafting.stats().totals
    assert before.num_drafted_tokens == before.num_accepted_tokens == 0
    assert 0 < after.num_accepted_tokens < after.num_drafted_tokens
    assert after.num_steps < before.num_steps and after.num_sampled_tokens == before.num_sampled_tokens
    assert (
        after.num_computed_tokens == before.num_computed_tokens + after.num_drafted_tokens - after.num_accepted_tokens
    )
    assert_all_free(drafting)


def test_what_drafts_left_in_memory_serves_the_next_turn(tiny, answer, oracle):
    """Keys and values of accepted tokens are found again, those of others are written over."""
    prompt, params = [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    (first,) = answer(tiny(draft_tokens=0), [(prompt, params)])
    longer = [*prompt, *first[:-1], 9]
    (wanted,) = answer(tiny(draft_tokens=0), [(longer, params)])
    oracle += [[*prompt, *first]]
    engine = tiny()
    assert answer(engine, [(prompt, params)]) == [first]
    assert engine.stats().totals.num_accepted_tokens > 20
    before = engine.stats().totals.num_cached_tokens
    assert answer(engine, [(longer, params)]) == [wanted]
    # All of the first turn but what a step had computed when it ended.
    assert engine.stats().totals.num_cached_tokens - before > len(longer) - 20


def test_masks_are_those_of_each_token(fake, finish, oracle):
    """A constraint is filled and told in turn, whatever was drafted, and a token that it forbids is no draft's."""

    class EvenThenOdd:
        def __init__(self) -> None:
            self.calls: list[object] = []

        def fill(self, mask: np.ndarray) -> None:
            parity = sum(call != "fill" for call in self.calls) % 2
            self.calls.append("fill")
            mask[:] = 0x55555555 << parity

        def accept(self, token_id: int) -> None:
            self.calls.append(token_id)

    def run(draft_tokens: int) -> tuple[list[int], list[object], int]:
        constraint, engine = EvenThenOdd(), fake(draft_tokens=draft_tokens)
        params = SamplingParams(seed=3, max_tokens=30, ignore_eos=True, constraint=constraint)
        request_id = engine.add_request([4, 5, 6], params)
        tokens = [output.token_id for output in finish(engine)[request_id]]
        return tokens, constraint.calls, engine.stats().totals.num_accepted_tokens

    tokens, calls, accepted = run(0)
    assert [token % 2 for token in tokens] == [0, 1] * 15 and accepted == 0
    oracle += [[4, 5, 6, *tokens]]
    again, calls_again, accepted = run(15)
    assert again == tokens and calls_again == calls and accepted > 5


def test_an_answer_that_repeats_itself_takes_fewer_steps(tiny, answer):
    """Without an oracle: greedy answers of random weights run in circles."""
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    requests = [([i, i + 1, i + 2], params) for i in range(3, 9)]
    plain, drafting = tiny(draft_tokens=0), tiny()
    assert answer(drafting, requests) == answer(plain, requests)
    assert drafting.stats().totals.num_accepted_tokens > 0
    assert drafting.stats().totals.num_steps < plain.stats().totals.num_steps


def test_numpy_takes_none(tmp_path):
    """Its products of several rows need not have the bits of one."""
    folder = write_random_checkpoint(tmp_path / "model", "tiny")
    for backend, takes in (("reference", False), ("cpu", True)):
        model = LocalModel.open(Config(model=str(folder), backend=backend))
        model.engine.add_request([5, 6, 7] * 9, SamplingParams(max_tokens=3, logit_bias={5: 100}))
        while model.engine.has_work:
            model.engine.step()
        assert (model.engine.stats().totals.num_drafted_tokens > 0) == takes


def test_drafts_keep_to_the_step_the_answer_and_their_number(fake, finish, oracle):
    oracle += [[5, 5, 5]]
    engine = fake(draft_tokens=7, max_batch_tokens=6)
    for i in range(3):
        engine.add_request([5, 5, 5, i], SamplingParams(seed=i, max_tokens=3, ignore_eos=True))
    outputs = finish(engine)
    assert all(len(own) == 3 and own[-1].finish_reason == "length" for own in outputs.values())
    for batch in engine._runner.batches:
        assert len(batch.token_ids_T) <= 6
        # Sequences of three tokens each, of whose answers two may be drafted.
        assert len(batch.logit_rows_R) <= 3 * 3
