"""Direct preference optimisation: of two answers to one prompt, the better one becomes the likelier one.

    reward(answer) = beta * (log p(answer) - log p of the model that training began with)
    loss           = - log sigmoid(reward(chosen) - reward(rejected))
                     - sft_weight * log p(chosen) / its trained tokens           mean over the pairs by their weights

The model that training began with is the same model with its pairs off, so that there is no second one in memory. In
full training, where the weights themselves move, its log-probabilities are computed before the first step, and kept.

Sources: arXiv:2305.18290; the likelihood of the better answer besides, arXiv:2404.19733.
"""

from __future__ import annotations

import hashlib
from itertools import islice, pairwise

import torch
from torch import Tensor

from ossia.train.config import DpoConfig
from ossia.train.data import TrainBatch
from ossia.train.fit import reference_passes, watched_router, with_balance
from ossia.train.lora import pairs_off
from ossia.train.losses import dpo as dpo_terms
from ossia.train.losses import sum_by_sequence
from ossia.train.module import Model
from ossia.train.parallel import Team
from ossia.train.result import fit_and_try
from ossia.train.run import Outcome, Say
from ossia.train.trainer import Terms, to_device


def dpo(settings: DpoConfig, *, resume: bool = False, say: Say) -> Outcome:
    """Train on pairs, write the result into ``settings.out``, and try it. Raises OssiaError, saying what to do."""

    def objective(model: Model, team: Team) -> Preference:
        aim = Preference(
            model,
            beta=settings.beta,
            smoothing=settings.smoothing,
            sft_weight=settings.sft_weight,
            balance_weight=settings.balance_weight,
        )
        if settings.trainable == "full":
            if team.rank == 0:
                say("computing what the model thinks of the answers before it is trained")
            passes = reference_passes(settings)
            while some := list(islice(passes, team.size)):
                for one, _ in team.share(some):
                    aim.remember(to_device(one, model.ops.device))
            aim.share(team)
        return aim

    return fit_and_try(settings, "pairs", objective, resume=resume, say=say)


class Preference:
    """An `ossia.train.trainer.Objective`: chosen answers gain on rejected ones.

    The samples of a batch are pairs in order: a chosen one, then its rejected one. Only the trained tokens of each
    count, by their weights.
    """

    def __init__(
        self,
        model: Model,
        *,
        beta: float,
        smoothing: float = 0.0,
        sft_weight: float = 0.0,
        balance_weight: float = 0.0,
    ) -> None:
        self._model = model
        self._beta = beta
        self._smoothing = smoothing
        self._sft_weight = sft_weight
        self._balance_weight = balance_weight
        # Log-probabilities of answers before training, by the answer's tokens; empty where pairs can be off.
        self._remembered: dict[bytes, float] = {}

    def weight(self, batch: TrainBatch) -> float:
        return float(batch.pair_weights_P.sum())

    def terms(self, batch: TrainBatch) -> Terms:
        with watched_router(self._model, is_wanted=self._balance_weight > 0) as seen:
            logprobs_R = self._model.logprobs(batch.batch, batch.targets_R)
        answers_S = _answers(batch, logprobs_R)
        reference_S = self._reference(batch)
        found = dpo_terms(
            answers_S[0::2],
            answers_S[1::2],
            reference_S[0::2],
            reference_S[1::2],
            torch.as_tensor(batch.pair_weights_P),
            beta=self._beta,
            smoothing=self._smoothing,
        )
        shown = {
            "margin": found.margin_sum,
            "accuracy": found.right_sum,
            "chosen_reward": found.chosen_reward_sum,
            "rejected_reward": found.rejected_reward_sum,
        }
        loss_sum = found.loss_sum
        if self._sft_weight:
            # A mean over each answer, so that how a step is cut into passes changes nothing.
            weights_S = _answers(batch, torch.ones_like(logprobs_R))
            nll = -(answers_S[0::2] / weights_S[0::2] * torch.as_tensor(batch.pair_weights_P)).sum()
            loss_sum = loss_sum + self._sft_weight * nll
            shown["chosen_nll"] = nll.item()
        terms = Terms(loss_sum, shown)
        return with_balance(terms, seen, self._balance_weight, self.weight(batch)) if seen else terms

    def remember(self, batch: TrainBatch) -> None:
        """Keep what the model thinks of these answers now."""
        with torch.no_grad():
            answers = _answers(batch, self._model.logprobs(batch.batch, batch.targets_R)).tolist()
        self._remembered |= dict(zip(_names(batch), answers, strict=True))

    def share(self, team: Team) -> None:
        """Tell the other processes what this one keeps, and learn what they keep."""
        self._remembered = {name: value for kept in team.each(self._remembered) for name, value in kept.items()}

    @torch.no_grad()
    def _reference(self, batch: TrainBatch) -> Tensor:
        if self._remembered:
            found = [self._remembered[name] for name in _names(batch)]
            return torch.tensor(found, dtype=torch.float32, device=self._model.ops.device)
        with pairs_off(self._model.weights):
            return _answers(batch, self._model.logprobs(batch.batch, batch.targets_R))


def _answers(batch: TrainBatch, logprobs_R: Tensor) -> Tensor:
    """log p_S of each sample's trained tokens, by their weights."""
    weights_R, samples_R = torch.as_tensor(batch.weights_R), torch.as_tensor(batch.samples_R).long()
    return sum_by_sequence(logprobs_R * weights_R, samples_R, batch.num_samples)


def _names(batch: TrainBatch) -> list[bytes]:
    """What stands for each sample: a digest of its tokens and of which are trained."""
    held = batch.batch
    tokens_T, rows_R, samples_R = (
        torch.as_tensor(each).cpu().numpy() for each in (held.token_ids_T, held.logit_rows_R, batch.samples_R)
    )
    names = []
    for i, (start, end) in enumerate(pairwise(held.query_starts_N1.tolist())):
        digest = hashlib.blake2b(tokens_T[start:end].tobytes(), digest_size=16)
        digest.update((rows_R[samples_R == i] - start).tobytes())
        names.append(digest.digest())
    return names
