"""What is made small: negative log-likelihood, direct preference optimisation, and the router's balance.

Every loss comes as a *sum*; the trainer divides by the weight of the whole step, so that how a step is cut into passes
changes nothing.

Shapes   R trained rows, S sequences, T tokens, E experts, A experts per token.
Sources  DPO, arXiv:2305.18290, with label smoothing as in its follow-up cDPO; the likelihood term beside it,
         arXiv:2404.19733. Balance, arXiv:2101.03961 section 2.2, for A experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def nll_sum(logprobs_R: Tensor, weights_R: Tensor) -> Tensor:
    """- sum of weight * log p, in float32."""
    return -(logprobs_R.float() * weights_R).sum()


def sum_by_sequence(values_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """sums_S of the rows of each sequence, added in the order of the rows."""
    return torch.zeros(num_sequences, dtype=values_R.dtype, device=values_R.device).index_add(0, sequence_R, values_R)


class DpoTerms(NamedTuple):
    """Sums over the pairs by their weights, and what shows whether the preferred answers gain."""

    loss_sum: Tensor
    margin_sum: float  # of reward(chosen) - reward(rejected), where reward = beta * (log p - log p of the reference)
    right_sum: float  # of pairs with a margin over 0
    chosen_reward_sum: float
    rejected_reward_sum: float


def dpo(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    weights_P: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
) -> DpoTerms:
    """Log-probabilities of P pairs' answers under the model and under the reference to the loss, summed by weights.

    ``smoothing`` is the share of pairs that are taken to be labelled the wrong way round.
    """
    chosen_reward_P = beta * (chosen_P - reference_chosen_P)
    rejected_reward_P = beta * (rejected_P - reference_rejected_P)
    margin_P = chosen_reward_P - rejected_reward_P
    loss_P = -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P)

    def weighed(value_P: Tensor) -> float:
        return float((value_P.detach() * weights_P).sum())

    return DpoTerms(
        (loss_P * weights_P).sum(),
        weighed(margin_P),
        weighed((margin_P > 0).float()),
        weighed(chosen_reward_P),
        weighed(rejected_reward_P),
    )


def balance_sum(logits_TE: Tensor, experts_TA: Tensor) -> Tensor:
    """T * E * sum over experts of (share of the choices) * (mean probability): T where all experts are used alike.

    The gradient goes through the probabilities; the choices are counted.
    """
    num_tokens, num_experts = logits_TE.shape
    counts_E = torch.bincount(experts_TA.reshape(-1).long(), minlength=num_experts).to(torch.float32)
    probabilities_E = logits_TE.float().softmax(-1).mean(0)
    return num_tokens * num_experts * (counts_E / experts_TA.numel() * probabilities_E).sum()


def kl_sum(logits_RV: Tensor, reference_RV: Tensor) -> Tensor:
    """Sum over rows of KL(reference || model), in nats."""
    reference_RV = reference_RV.float().log_softmax(-1)
    return (reference_RV.exp() * (reference_RV - logits_RV.float().log_softmax(-1))).sum()
