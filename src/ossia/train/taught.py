"""A teacher beside the gold tokens: what a larger model thinks likely at each of them is learned too.

    loss = (1 - share) * - log p(token)  +  share * KL(teacher || student)      summed over all trained tokens, weighted

Where the teacher thinks another token likeliest than the gold one it is not asked: share is 0 there. It reads the gold
transcript and says nothing itself, so that nothing has to be sampled: one more pass without gradients.
`ossia.train.distill` is for transcripts that the teacher or the student writes.

Shapes   R trained rows, K likeliest tokens of the teacher, D hidden size.
Sources  the sum of both losses, and of probabilities beside labels: Hinton et al., arXiv:1503.02531; by the word:
         Kim and Rush, arXiv:1606.07947.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ossia.train.data import TrainBatch
from ossia.train.distill import LOGIT_ROWS, gathered_logprobs, partial_kl
from ossia.train.fit import watched_router, with_balance
from ossia.train.module import Model
from ossia.train.sft import Likelihood
from ossia.train.trainer import Terms

# All other tokens count as one.
_TOP = 20


class TaughtLikelihood(Likelihood):
    """An `ossia.train.trainer.Objective`: trained tokens become likely, and so does what the teacher thinks likely."""

    def __init__(self, model: Model, teacher: Model, share: float, balance_weight: float = 0.0) -> None:
        """``share`` of the loss is the teacher's; it has the model's vocabulary."""
        super().__init__(model, balance_weight)
        self._teacher = teacher
        self._share = share

    def terms(self, batch: TrainBatch) -> Terms:
        with torch.no_grad():
            top_ids_RK, top_logprobs_RK = _likeliest(self._teacher, self._teacher.hidden(batch.batch))
        with watched_router(self.model, is_wanted=self.balance_weight > 0) as seen:
            x_RD = self.model.hidden(batch.batch)
        targets_R, weights_R = torch.as_tensor(batch.targets_R), torch.as_tensor(batch.weights_R)
        logprobs = gathered_logprobs(self.model, x_RD, torch.cat([top_ids_RK, targets_R[:, None]], dim=1))
        # Likeliest first.
        share_R = self._share * (top_ids_RK[:, 0] == targets_R)
        nll_R, kl_R = -logprobs[:, -1], partial_kl(top_logprobs_RK, logprobs[:, :-1])
        loss = (((1 - share_R) * nll_R + share_R * kl_R) * weights_R).sum()
        nll, kl, asked = ((one_R * weights_R).sum().item() for one_R in (nll_R, kl_R, share_R > 0))
        terms = Terms(loss, {"nll": nll, "kl": kl, "taught": asked})
        return with_balance(terms, seen, self.balance_weight, self.weight(batch)) if seen else terms


def _likeliest(model: Model, x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """ids_RK and logprobs_RK of the likeliest tokens of each row; logits exist some rows at a time."""
    ids, logprobs = [], []
    for start in range(0, len(x_RD), LOGIT_ROWS):
        logits = model.ops.linear(x_RD[start : start + LOGIT_ROWS], model.weights.unembedding).float()
        found = logits.topk(min(_TOP, logits.shape[1]), dim=1)
        ids.append(found.indices)
        logprobs.append(found.values - logits.logsumexp(dim=1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)
