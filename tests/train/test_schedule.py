"""Learning rates over a run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from ossia.train.schedule import Schedule

KINDS = ["cosine", "wsd", "linear", "constant"]


def _factors(schedule):
    return [schedule.factor(step) for step in range(schedule.num_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_rises_from_above_zero_to_the_top(kind):
    factors = _factors(Schedule(kind, 100, warmup_steps=9, decay_steps=20, floor=0.1))
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_last_step_has_the_floor_and_the_fall_never_rises(kind):
    factors = _factors(Schedule(kind, 100, warmup_steps=9, decay_steps=20, floor=0.1))
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[9:]))


def test_cosine_is_halfway_in_the_middle_and_constant_stays():
    assert Schedule("cosine", 101, floor=0.2).factor(50) == pytest.approx(0.6)
    assert Schedule("cosine", 101).factor(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert set(_factors(Schedule("constant", 50))) == {1.0}


def test_wsd_holds_the_top_until_its_fall():
    factors = _factors(Schedule("wsd", 20, warmup_steps=2, decay_steps=5))
    assert factors[2:15] == [1.0] * 13
    assert factors[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_short_runs_have_a_rate_at_every_step(kind, num_steps, share):
    schedule = Schedule.of_shares(kind, num_steps, warmup=share, decay=share, floor=0.1)
    factors = _factors(schedule)
    assert all(0.1 <= factor <= 1 for factor in factors)


def test_a_run_that_goes_on_after_its_last_step_stays_at_the_floor():
    assert Schedule("linear", 10, floor=0.1).factor(99) == pytest.approx(0.1)
