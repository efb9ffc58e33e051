"""Draws tokens on a GPU: what rows ask for goes to the card in a few small arrays, tokens and log-probabilities back.

The same random numbers as on the host, and the same tokens but where rounding decides. What the card does not do, each
such row alone, is done by `ossia.engine.sampler` on a copy of it: penalties, whose list of tokens grows with the text
and would travel anew for each token; and rows without a token, to say why.

Shapes   V vocabulary, R rows of logits, N rows that are drawn from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ossia.engine.request import Scored
from ossia.engine.sampler import GREEDY_BELOW, Asked, Draw, Mask, Sampled, banned_ids, sample_row, uniform
from ossia.ops.triton import sampling
from ossia.ops.triton.sampling import Settings
from ossia.ops.upload import send


def sample_on_device(logits_RV: Tensor, draws: SequenceOf[Draw]) -> list[Sampled | Exception]:
    """The next tokens of sequences, or why one has none; ``logits_RV`` is not changed."""
    results: dict[int, Sampled | Exception] = {}
    masks: dict[int, Mask] = {}
    for i, draw in enumerate(draws):
        try:
            if draw.mask is not None:
                masks[i] = draw.mask.result()
        # A constraint is the caller's code, which may raise anything.
        except Exception as error:
            results[i] = error
    here = [i for i, draw in enumerate(draws) if i not in results and draw.sequence.token_counts is None]
    if here:
        results |= _sample(logits_RV, {i: draws[i] for i in here}, masks)
    return [results[i] if i in results else _on_host(logits_RV, draw) for i, draw in enumerate(draws)]


def score_on_device(logits_RV: Tensor, asked: SequenceOf[Asked]) -> list[Scored]:
    """How likely given tokens were."""
    rows_R, token_ids_R = (send(values, logits_RV.device) for values in np.array([one[:2] for one in asked]).T)
    num_top = max(one.num_top for one in asked)
    scored = sampling.score(logits_RV[rows_R], token_ids_R, num_top).cpu().numpy()
    return [_scored(own, one.num_top) for own, one in zip(scored, asked, strict=True)]


def _sample(logits_RV: Tensor, draws: Mapping[int, Draw], masks: Mapping[int, Mask]) -> dict[int, Sampled]:
    """Tokens by the draws' numbers; of those whose highest logit is not finite, none."""
    used = [i for i in draws if i in masks]
    settings = [_settings(draw, used.index(i) if i in masks else -1) for i, draw in draws.items()]
    packed = np.stack([masks[i] for i in used]) if used else np.zeros((1, 1), np.uint32)
    device = logits_RV.device
    chosen_N3 = sampling.choose(
        _adjusted(logits_RV, draws.values()),
        send(np.array(settings, np.float64), device),
        send(packed.view(np.int32), device),
    )
    params = [draw.sequence.params for draw in draws.values()]
    asked = [n for n, one in enumerate(params) if one.logprobs or one.top_logprobs]
    num_top = max(one.top_logprobs for one in params)
    parts = [chosen_N3.flatten()]
    if asked:
        rows, places = np.array([settings[n].row for n in asked]), np.array(asked)
        token_ids = chosen_N3[send(places, device), 0]
        parts.append(sampling.score(logits_RV[send(rows, device)], token_ids, num_top).flatten())
    # The one time that the host waits for the card.
    values = torch.cat(parts).cpu().numpy()
    chosen = values[: chosen_N3.numel()].reshape(-1, 3).tolist()
    scored = dict(zip(asked, values[chosen_N3.numel() :].reshape(len(asked), 1 + 2 * num_top), strict=True))
    results = {}
    for n, (i, one, (token_id, peak, drawn_logprob)) in enumerate(zip(draws, params, chosen, strict=True)):
        if math.isfinite(peak):
            logprob, top = _scored(scored[n], one.top_logprobs) if n in scored else (None, ())
            results[i] = Sampled(int(token_id), logprob, top, drawn_logprob if one.drawn_logprobs else None)
    return results


def _settings(draw: Draw, mask: int) -> Settings:
    params, sequence = draw.sequence.params, draw.sequence
    return Settings(
        row=draw.row,
        mask=mask,
        temperature=0 if params.temperature < GREEDY_BELOW else params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        u=uniform(sequence.seed, len(sequence.token_ids)),
    )


def _adjusted(logits_RV: Tensor, draws: Iterable[Draw]) -> Tensor:
    """The logits after bias and bans; the same tensor if there are none."""
    edits = [
        (draw.row, token_id, value)
        for draw in draws
        for token_id, value in (
            *draw.sequence.params.logit_bias.items(),
            *((token_id, -np.inf) for token_id in banned_ids(draw.sequence)),
        )
    ]
    if not edits:
        return logits_RV
    rows, token_ids, values = np.array(edits, np.float64).T
    places = send((rows * logits_RV.shape[1] + token_ids).astype(np.int64), logits_RV.device)
    # Sums of a token's bias and bans are the same in any order.
    changes = send(values.astype(np.float32), logits_RV.device)
    return logits_RV.flatten().index_add(0, places, changes).view_as(logits_RV)


def _on_host(logits_RV: Tensor, draw: Draw) -> Sampled | Exception:
    return sample_row(logits_RV[draw.row : draw.row + 1].cpu().numpy(), draw._replace(row=0))


def _scored(values: npt.NDArray[np.float64], num_top: int) -> Scored:
    """A row of `sampling.score`, which may have more of the likeliest than are wanted."""
    ids, logprobs = np.split(values[1:], 2)
    top = zip(ids[:num_top].astype(int).tolist(), logprobs[:num_top].tolist(), strict=True)
    return Scored(float(values[0]), tuple(top))
