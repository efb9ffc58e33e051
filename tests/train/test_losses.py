"""Losses against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ossia.train.losses import balance_sum, dpo, kl_sum, nll_sum, sum_by_sequence


def test_the_likelihood_is_weighted_row_by_row():
    logprobs = torch.tensor([-1.0, -2.0, -4.0])
    assert nll_sum(logprobs, torch.tensor([1.0, 0.0, 0.5])).item() == 3.0


def test_rows_are_summed_by_their_sequence():
    sums = sum_by_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 0]), 3)
    assert sums.tolist() == [9.0, 0.0, 6.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_is_the_formula_of_its_paper(smoothing):
    chosen, rejected = torch.tensor([-10.0, -5.0]), torch.tensor([-11.0, -3.0])
    terms = dpo(
        chosen,
        rejected,
        torch.tensor([-12.0, -5.0]),
        torch.tensor([-10.0, -4.0]),
        torch.tensor([1.0, 3.0]),
        beta=0.5,
        smoothing=smoothing,
    )
    margins = [0.5 * ((-10 + 12) - (-11 + 10)), 0.5 * ((-5 + 5) - (-3 + 4))]
    assert margins == [1.5, -0.5]

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    losses = [-(1 - smoothing) * log_sigmoid(m) - smoothing * log_sigmoid(-m) for m in margins]
    assert terms.loss_sum.item() == pytest.approx(losses[0] + 3 * losses[1], rel=1e-6)
    assert terms.margin_sum == pytest.approx(1.5 - 3 * 0.5)
    assert terms.right_sum == 1
    assert (terms.chosen_reward_sum, terms.rejected_reward_sum) == (pytest.approx(1.0), pytest.approx(1.0))


def test_dpo_raises_the_chosen_and_lowers_the_rejected():
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    dpo(chosen, rejected, torch.tensor([-1.0]), torch.tensor([-1.0]), torch.ones(1), beta=0.1).loss_sum.backward()
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)


def test_the_balance_is_one_per_token_where_all_experts_are_used_alike_and_grows_where_not():
    even = balance_sum(torch.zeros(8, 4), torch.tensor([[0, 1], [2, 3]] * 4))
    assert even.item() == pytest.approx(8.0)
    logits = torch.tensor([[9.0, 9.0, 0.0, 0.0]] * 8)
    assert balance_sum(logits, torch.tensor([[0, 1]] * 8)).item() == pytest.approx(16.0, rel=1e-3)


def test_the_balance_pushes_down_the_logits_of_experts_that_are_used_too_much():
    logits = torch.zeros(6, 3, requires_grad=True)
    balance_sum(logits, torch.tensor([[0], [0], [0], [0], [1], [2]])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_kl_is_zero_for_equal_logits_and_the_sum_by_hand_for_others():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert kl_sum(p.log() + 3, p.log()).item() == pytest.approx(0, abs=1e-6)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_sum(q.log(), p.log()).item() == pytest.approx(expected, rel=1e-5)
