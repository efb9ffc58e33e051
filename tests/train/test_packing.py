"""Packs hold every sample once, never too much, and little air; a packed batch keeps its documents apart."""

from __future__ import annotations

import numpy as np
import pytest

from ossia.errors import InputError
from ossia.train.data import KINDS, PairSample, Sample, to_batch
from ossia.train.packing import pack, pack_evenly, plan

PACKINGS = ["best_fit", "buckets", "none"]


def _lengths(seed: int, num: int, longest: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(5.0, 1.0, num)
    return [int(n) for n in np.clip(drawn, 1, longest)]


def _sample(token_ids: list[int], weights: list[float]) -> Sample:
    return Sample(np.array(token_ids, np.int32), np.array(weights, np.float32))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seed", range(20))
def test_every_sample_is_in_exactly_one_pack_and_no_pack_is_too_large(packing, seed):
    lengths = _lengths(seed, 1 + 37 * seed, 1024)
    packs = plan(lengths, 1024, packing)
    assert sorted(i for indices in packs for i in indices) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in indices) <= 1024 for indices in packs)


def test_best_fit_leaves_less_than_two_percent_of_the_room_empty():
    lengths = _lengths(1, 4096, 2048)
    packs = plan(lengths, 2048)
    assert sum(lengths) / (2048 * len(packs)) > 0.98


def test_buckets_put_samples_of_like_length_together():
    lengths = _lengths(2, 2000, 1024)
    spreads = {
        packing: np.mean([max(n) - min(n) for n in ([lengths[i] for i in p] for p in plan(lengths, 4096, packing))])
        for packing in ("best_fit", "buckets")
    }
    assert spreads["buckets"] < 0.1 * spreads["best_fit"]


def test_packs_come_a_buffer_at_a_time():
    taken = []

    def samples():
        for i in range(100):
            taken.append(i)
            yield [i] * 10

    packs = pack(samples(), 40, buffer=8)
    assert [len(one) for one in next(packs)] == [10] * 4
    assert len(taken) == 8
    assert sum(len(one) for one in packs) == 96


@pytest.mark.parametrize("seed", range(10))
def test_even_packs_are_few_and_of_like_size(seed):
    samples = [[0] * n for n in _lengths(seed, 20 + seed, 300)]
    packs = pack_evenly(samples, 1024)
    sizes = [sum(map(len, one)) for one in packs]
    assert sorted(len(one) for packed in packs for one in packed) == sorted(map(len, samples))
    assert max(sizes) <= 1024 and max(sizes) - min(sizes) <= 150
    assert len(packs) <= -(-sum(sizes) // 1024) + 1


def test_even_packs_can_be_as_many_for_each_of_some_processes():
    samples = [[0] * length for length in (5, 4, 3, 2)]
    assert [sum(map(len, packed)) for packed in pack_evenly(samples, 20, multiple=2)] == [7, 7]
    assert len(pack_evenly(samples, 5, multiple=2)) == 4
    # No pack is empty.
    assert len(pack_evenly(samples, 20, multiple=8)) == 4


def test_even_packs_of_long_samples_do_not_overflow():
    assert sorted(map(sum, ([len(one) for one in packed] for packed in pack_evenly([[0] * 7] * 3, 10)))) == [7, 7, 7]
    with pytest.raises(InputError, match="41"):
        pack_evenly([[0] * 41], 40)


def test_a_sample_that_is_longer_than_a_pack_is_an_error_that_says_both_numbers():
    with pytest.raises(InputError, match=r"sample of 41 tokens .* batch of 40"):
        plan([3, 41], 40)


def test_a_batch_holds_its_documents_side_by_side_with_positions_of_their_own():
    made = to_batch([_sample([5, 6, 7], [0, 0, 1]), _sample([8, 9], [0, 0.5])])
    batch = made.batch
    assert batch.token_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.query_starts_N1.tolist() == [0, 3, 5]
    assert batch.key_lengths_N.tolist() == [3, 2]
    assert batch.logit_rows_R.tolist() == [1, 3]
    assert made.targets_R.tolist() == [7, 9] and made.targets_R.dtype == np.int64
    assert made.weights_R.tolist() == [1.0, 0.5]
    assert made.samples_R.tolist() == [0, 1]
    assert (made.num_tokens, made.num_samples) == (5, 2)
    integers = (batch.token_ids_T, batch.positions_T, batch.query_starts_N1, batch.key_lengths_N, batch.logit_rows_R)
    assert {array.dtype for array in integers} == {np.dtype(np.int32)}
    assert KINDS[made.kinds_R[0]] == "other"


def test_of_a_pair_the_chosen_answer_comes_first():
    pair = PairSample(_sample([1, 2], [0, 1]), _sample([1, 3, 4], [0, 1, 1]))
    made = to_batch([pair, pair])
    assert made.batch.key_lengths_N.tolist() == [2, 3, 2, 3]
    assert made.samples_R.tolist() == [0, 1, 1, 2, 3, 3]
