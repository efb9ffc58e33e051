"""Advantages and policy losses against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ossia.train.advantage import (
    Objective,
    group_advantages,
    k3,
    mismatch,
    overlong_penalty,
    policy_loss,
    row_weights,
)

PLAIN = Objective(correction="none")


def loss_and_gradient(
    logprobs, old, advantages, *, objective=PLAIN, drawn=None, weights=None, sequences=None, reference=None
):
    logprobs_R = torch.tensor(logprobs, dtype=torch.float32, requires_grad=True)
    count = len(logprobs)
    sequence_R = torch.tensor(sequences or [0] * count)
    terms = policy_loss(
        logprobs_R,
        torch.tensor(old),
        torch.tensor(old if drawn is None else drawn),
        torch.tensor(advantages, dtype=torch.float32),
        torch.tensor(weights or [1.0] * count),
        sequence_R,
        int(sequence_R.max()) + 1,
        objective,
        None if reference is None else torch.tensor(reference),
    )
    terms.loss_sum.backward()
    return float(terms.loss_sum), logprobs_R.grad.tolist(), terms


# Advantages ----------------------------------------------------------------------------------------------------------


def test_an_advantage_is_the_reward_less_the_mean_of_its_group():
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.2]), [0.7, -0.3, -0.3, -0.1])


def test_with_normalisation_it_is_told_in_standard_deviations():
    np.testing.assert_allclose(group_advantages([1.0, 0.0], normalize=True), [1.0, -1.0])
    deviation = math.sqrt((0.49 + 0.09 + 0.09 + 0.01) / 4)
    np.testing.assert_allclose(group_advantages([1.0, 0.0, 0.0, 0.2], normalize=True)[0], 0.7 / deviation)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rewards", [[0.1] * 8, [0.3], [0.0, 0.0]])
def test_equal_rewards_have_no_advantage_at_all(rewards, normalize):
    assert group_advantages(rewards, normalize=normalize).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize(("length", "penalty"), [(10, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)])
def test_the_penalty_of_long_answers_grows_over_the_buffer(length, penalty):
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 0) == 0


# The objective of single tokens ---------------------------------------------------------------------------------------


def test_on_policy_the_gradient_is_that_of_advantage_times_log_probability():
    loss, gradient, terms = loss_and_gradient([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [0.5, -0.25, 0.0])
    assert loss == pytest.approx(-0.25)
    assert gradient == pytest.approx([-0.5, 0.25, 0.0])
    assert terms.num_clipped_low == terms.num_clipped_high == 0


def test_equal_rewards_give_exactly_no_gradient():
    advantages = group_advantages([0.1, 0.1]).tolist()
    _, gradient, _ = loss_and_gradient([-1.0, -2.5], [-1.3, -2.0], advantages, sequences=[0, 1])
    assert gradient == [0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        # Within the clip.
        (1.1, 1.0, -1.1, True),
        (0.9, -1.0, 0.9, True),
        # Risen too far where that is good, fallen too far where that is good: the clip holds them.
        (1.5, 1.0, -1.28, False),
        (0.5, -1.0, 0.8, False),
        # The other way round they are pulled back.
        (1.5, -1.0, 1.5, True),
        (0.5, 1.0, -0.5, True),
        # Between the clip below and the higher one above: only an unsymmetric clip lets this rise.
        (1.25, 1.0, -1.25, True),
    ],
)
def test_the_clip_is_lower_below_than_above(ratio, advantage, loss, has_gradient):
    objective = Objective(clip_low=0.2, clip_high=0.28, correction="none")
    old = -2.0
    got, gradient, terms = loss_and_gradient([old + math.log(ratio)], [old], [advantage], objective=objective)
    assert got == pytest.approx(loss, abs=1e-5)
    assert gradient[0] == pytest.approx(-ratio * advantage if has_gradient else 0.0, abs=1e-5)
    assert terms.num_clipped_low + terms.num_clipped_high == (not has_gradient)


def test_rows_of_long_sequences_count_alike_by_token_and_less_by_sequence():
    lengths = [3, 1]
    for normalize, weights in (("token", [1, 1]), ("sequence", [1 / 3, 1])):
        assert row_weights(lengths, normalize) == pytest.approx(weights)
    rows = [1 / 3, 1 / 3, 1 / 3, 1.0]
    loss, _, _ = loss_and_gradient([-1.0] * 4, [-1.0] * 4, [1, 1, 1, -1], weights=rows, sequences=[0, 0, 0, 1])
    assert loss == pytest.approx(0.0, abs=1e-6)


# GSPO ----------------------------------------------------------------------------------------------------------------


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    objective = Objective(ratio="sequence", clip_low=0.5, clip_high=0.5, correction="none")
    logprobs, old = [-1.0, -2.0, -0.5], [-1.2, -1.9, -0.7]
    weights = [0.5, 0.5, 1.0]
    first, second = math.exp((0.2 - 0.1) / 2), math.exp(0.2)
    loss, gradient, _ = loss_and_gradient(
        logprobs, old, [2.0, 2.0, -1.0], objective=objective, weights=weights, sequences=[0, 0, 1]
    )
    assert loss == pytest.approx(-(2.0 * first) + second, rel=1e-5)
    # Each token of the first sequence moves the mean by half.
    assert gradient == pytest.approx([-first, -first, second], rel=1e-5)


def test_the_clip_of_a_sequence_takes_the_gradient_of_all_its_tokens():
    objective = Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4, correction="none")
    _, gradient, terms = loss_and_gradient([-1.0, -2.0], [-1.01, -2.0], [1.0, 1.0], objective=objective)
    assert gradient == [0.0, 0.0]
    assert terms.num_clipped_high == 2


# Correction and divergence -------------------------------------------------------------------------------------------


def test_what_the_engine_drew_from_other_probabilities_is_weighed_up_to_a_cap():
    objective = Objective(correction="token", correction_cap=2.0)
    old, drawn = [-1.0, -1.0, -1.0], [-1.0 - math.log(1.5), -1.0 + math.log(2), -1.0 - math.log(5)]
    _, gradient, terms = loss_and_gradient(old, old, [1.0] * 3, objective=objective, drawn=drawn)
    assert gradient == pytest.approx([-1.5, -0.5, -2.0], rel=1e-5)
    assert terms.correction_sum == pytest.approx(4.0, rel=1e-5)


def test_the_correction_of_a_sequence_is_the_product_of_its_tokens():
    objective = Objective(correction="sequence", correction_cap=10.0)
    old, drawn = [-1.0, -1.0, -1.0], [-1.0 - math.log(1.5), -1.0 - math.log(2), -1.0 + math.log(4)]
    _, gradient, _ = loss_and_gradient(old, old, [1.0] * 3, objective=objective, drawn=drawn, sequences=[0, 0, 1])
    assert gradient == pytest.approx([-3.0, -3.0, -0.25], rel=1e-5)


def test_the_divergence_from_the_reference_pulls_back():
    objective = Objective(correction="none", kl=0.5)
    loss, gradient, terms = loss_and_gradient([-1.0], [-1.0], [0.0], objective=objective, reference=[-2.0])
    kl = math.exp(-1.0) + 1.0 - 1
    assert loss == pytest.approx(0.5 * kl, rel=1e-5)
    assert terms.reference_kl_sum == pytest.approx(kl, rel=1e-5)
    # d/dlogp (exp(ref - logp) - (ref - logp) - 1) = 1 - exp(ref - logp)
    assert gradient == pytest.approx([0.5 * (1 - math.exp(-1.0))], rel=1e-5)


def test_k3_estimates_the_divergence_without_bias():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.6, 0.3, 0.1])
    q = torch.tensor([0.3, 0.3, 0.4])
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    exact = float((p * (p / q).log()).sum())
    estimates = k3(p.log()[drawn], q.log()[drawn])
    assert (estimates >= 0).all()
    assert float(estimates.mean()) == pytest.approx(exact, rel=0.02)


def test_the_mismatch_of_engine_and_trainer_is_told_in_nats():
    told = mismatch(np.array([-1.0, -2.0], np.float32), np.array([-1.0, -2.0 + math.log(1.2)], np.float32))
    assert told.mean == pytest.approx(math.log(1.2) / 2, rel=1e-5)
    assert told.largest == pytest.approx(math.log(1.2), rel=1e-5)
    assert told.kl == pytest.approx((1.2 - math.log(1.2) - 1) / 2, rel=1e-4)
    assert told.share_over_tenth == 0.5
    assert mismatch(np.array([]), np.array([])).mean == 0
