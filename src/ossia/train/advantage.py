"""From rewards to a loss: group advantages, and the clipped objectives of GRPO, DAPO and GSPO.

    advantage   A = reward - mean of its group            (/ the group's standard deviation, if asked for)
    ratio       r = exp(log p - log p_old)                of a token, or the geometric mean over a sequence (GSPO)
    surrogate   min(r A, clip(r, 1 - low, 1 + high) A)    clip-higher of DAPO: high above low
    correction  w = min(exp(log p_old - log q), cap)      q: the engine's probability of the token as it drew it
    loss        - sum of weight * w * surrogate + kl * weight * (exp(d) - d - 1),  d = log p_ref - log p

Losses come as sums over rows with weights, as everywhere in training; who divides by the weight of the whole step makes
every sampled token count alike (weights 1), or every sequence (weights 1 / its length).

Shapes   R sampled tokens of a pass, S sequences, G members of a group.
Sources  GRPO, arXiv:2402.03300; without the standard deviation, arXiv:2503.20783; DAPO (clip-higher, dynamic sampling,
         overlong shaping, token-level sum), arXiv:2503.14476; GSPO, arXiv:2507.18071; truncated importance sampling
         between engine and trainer, arXiv:2510.11370 and https://fengyao.notion.site/off-policy-rl; the estimate of the
         divergence, http://joschu.net/blog/kl-approx.html (k3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ossia.train.losses import sum_by_sequence

# Below this standard deviation of a group's rewards all are taken to be equal.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Objective:
    """Which policy gradient is taken."""

    # What is compared with the old policy: each token's probability, or each sequence's as a geometric mean (GSPO).
    ratio: Literal["token", "sequence"] = "token"
    # How far the ratio may fall, and rise, before a row has no gradient.
    clip_low: float = 0.2
    clip_high: float = 0.28
    # What is weighed for the engine having drawn from other probabilities than the trainer's: tokens, sequences, none.
    correction: Literal["token", "sequence", "none"] = "token"
    # Largest weight of that correction.
    correction_cap: float = 2.0
    # Weight of the divergence from the reference.
    kl: float = 0.0


def group_advantages(rewards_G: npt.NDArray[np.float64], *, normalize: bool = False) -> npt.NDArray[np.float64]:
    """Rewards of the members of one group to their advantages, exactly 0 where all are equal."""
    rewards_G = np.asarray(rewards_G, np.float64)
    deviation = float(rewards_G.std())
    if deviation < _EQUAL:
        return np.zeros_like(rewards_G)
    advantages_G = rewards_G - rewards_G.mean()
    return advantages_G / deviation if normalize else advantages_G


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft end: 0 up to ``max_tokens - buffer``, then a straight line down to -1 at ``max_tokens``."""
    if buffer <= 0:
        return 0.0
    return float(-min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer)))


class PolicyTerms(NamedTuple):
    """The loss, and sums over rows (weighted as the loss is) that show how far the policy has moved."""

    loss_sum: Tensor
    # Of rows whose gradient the clip has taken away, those that would have fallen further and risen further.
    num_clipped_low: float
    num_clipped_high: float
    # Of the divergence from the reference, and of that from the old policy, both by k3.
    reference_kl_sum: float
    old_kl_sum: float
    correction_sum: float


def policy_loss(
    logprobs_R: Tensor,
    old_R: Tensor,
    drawn_R: Tensor,
    advantages_R: Tensor,
    weights_R: Tensor,
    sequence_R: Tensor,
    num_sequences: int,
    objective: Objective,
    reference_R: Tensor | None = None,
) -> PolicyTerms:
    """The loss of one pass as a sum over its rows.

    ``old_R`` is the trainer's log-probability before the first update with these rollouts: on policy
    ``logprobs_R.detach()``. ``drawn_R`` is the engine's. All sequences of the pass must be whole.
    """
    logprobs_R, old_R, drawn_R = logprobs_R.float(), old_R.float(), drawn_R.float()
    change_R = logprobs_R - old_R
    if objective.ratio == "sequence":
        change_R = _means(change_R, sequence_R, num_sequences)[sequence_R]
    ratio_R = change_R.exp()
    clipped_R = ratio_R.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    surrogate_R = torch.minimum(ratio_R * advantages_R, clipped_R * advantages_R)
    correction_R = _correction(old_R - drawn_R, sequence_R, num_sequences, objective)
    loss = -(weights_R * correction_R * surrogate_R).sum()
    reference_kl = 0.0
    if reference_R is not None:
        kl_R = k3(logprobs_R, reference_R.float())
        loss = loss + objective.kl * (weights_R * kl_R).sum()
        reference_kl = float((weights_R * kl_R.detach()).sum())
    ratio_R = ratio_R.detach()
    is_low_R = (ratio_R < 1 - objective.clip_low) & (advantages_R < 0)
    is_high_R = (ratio_R > 1 + objective.clip_high) & (advantages_R > 0)
    return PolicyTerms(
        loss,
        float((weights_R * is_low_R).sum()),
        float((weights_R * is_high_R).sum()),
        reference_kl,
        float((weights_R * k3(old_R, logprobs_R.detach())).sum()),
        float((weights_R * correction_R).sum()),
    )


def k3(logprobs_R: Tensor, other_R: Tensor) -> Tensor:
    """An estimate of KL(p || other) from tokens drawn from p: unbiased, never negative."""
    difference_R = other_R - logprobs_R
    return difference_R.exp() - difference_R - 1


class Mismatch(NamedTuple):
    """How far the engine's log-probabilities of what it drew are from the trainer's."""

    mean: float
    largest: float
    # KL(engine || trainer) by k3.
    kl: float
    # Share of tokens whose probability differs by more than a tenth of itself.
    share_over_tenth: float


def mismatch(engine_R: npt.NDArray[np.float32], trainer_R: npt.NDArray[np.float32]) -> Mismatch:
    """Over all sampled tokens of a step."""
    if not len(engine_R):
        return Mismatch(0.0, 0.0, 0.0, 0.0)
    difference_R = np.asarray(trainer_R, np.float64) - np.asarray(engine_R, np.float64)
    size_R = np.abs(difference_R)
    return Mismatch(
        float(size_R.mean()),
        float(size_R.max()),
        float((np.exp(difference_R) - difference_R - 1).mean()),
        float((np.abs(np.expm1(difference_R)) > 0.1).mean()),
    )


def row_weights(lengths_S: Sequence[int], normalize: Literal["token", "sequence"]) -> list[float]:
    """The weight of each sampled token of sequences of these lengths."""
    return [1.0 if normalize == "token" else 1.0 / max(length, 1) for length in lengths_S]


def _means(values_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    counts_S = torch.bincount(sequence_R, minlength=num_sequences).clamp(min=1)
    return sum_by_sequence(values_R, sequence_R, num_sequences) / counts_S


def _correction(difference_R: Tensor, sequence_R: Tensor, num_sequences: int, objective: Objective) -> Tensor:
    """Weights without a gradient."""
    difference_R = difference_R.detach()
    if objective.correction == "none":
        return torch.ones_like(difference_R)
    if objective.correction == "sequence":
        difference_R = sum_by_sequence(difference_R, sequence_R, num_sequences)[sequence_R]
    return difference_R.exp().clamp(max=objective.correction_cap)
