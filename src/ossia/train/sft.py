"""Supervised fine-tuning: the answers in the data become likely.

    loss = - sum of weight * log p(token | tokens before it) / sum of weights       over all trained tokens of a step

Which tokens are trained: `ossia.train.expansion`. Where routers are trained, a small loss keeps tokens spread over the
experts besides; with frozen routers it is off, whatever the checkpoint's config.json says.
"""

from __future__ import annotations

import torch

from ossia.train.config import SftConfig
from ossia.train.data import TrainBatch
from ossia.train.fit import watched_router, with_balance
from ossia.train.losses import nll_sum
from ossia.train.module import Model
from ossia.train.parallel import Team
from ossia.train.result import fit_and_try
from ossia.train.run import Outcome, Say
from ossia.train.trainer import Terms


def sft(settings: SftConfig, *, resume: bool = False, say: Say) -> Outcome:
    """Train, write the result into ``settings.out``, and try it. Raises OssiaError, saying what to do."""

    def objective(model: Model, team: Team) -> Likelihood:
        return Likelihood(model, settings.balance_weight)

    return fit_and_try(settings, "samples", objective, resume=resume, say=say)


class Likelihood:
    """An `ossia.train.trainer.Objective`: trained tokens become likely."""

    def __init__(self, model: Model, balance_weight: float = 0.0) -> None:
        self.model = model
        self.balance_weight = balance_weight

    def weight(self, batch: TrainBatch) -> float:
        return float(batch.weights_R.sum())

    def terms(self, batch: TrainBatch) -> Terms:
        with watched_router(self.model, is_wanted=self.balance_weight > 0) as seen:
            logprobs_R = self.model.logprobs(batch.batch, batch.targets_R)
        terms = Terms(nll_sum(logprobs_R, torch.as_tensor(batch.weights_R)))
        return with_balance(terms, seen, self.balance_weight, self.weight(batch)) if seen else terms
