"""From logits to one token, one row at a time.

Each row is worked on alone and draws its random number from (seed, position) alone, so a token never depends on what
else is in the batch; at vocabulary width there is nothing to gain from working on several rows at once either.

Shapes   V vocabulary.
Sources  top-p: arXiv:1904.09751; min-p: arXiv:2407.01082; repetition penalty: arXiv:1909.05858; presence and frequency
         penalties: OpenAI's API reference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.engine.request import Scored, Sequence
from ossia.errors import OssiaError

Floats = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.uint32]

# Below this, dividing by the temperature would leave the range of float32.
GREEDY_BELOW = 1e-5
# Values that are summed or compared as one before a closer look: about the square root of the vocabulary.
_RUN = 256
# What to add to eight logits for each value of a mask's byte: 0 where the bit is set, -inf where it is not.
_MASK_BYTES = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


class Sampled(NamedTuple):
    """A token with, if asked for, the log-softmax of the model's own logits."""

    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    # The log-probability in the distribution that it was drawn from, if asked for.
    drawn_logprob: float | None = None


class Draw(NamedTuple):
    """A row of a pass's logits whose token is wanted."""

    row: int
    sequence: Sequence
    # Filled beside the pass; see `Constraint.fill`.
    mask: Future[Mask] | None = None
    # What the pass computed behind it: if the first of these is drawn, the next row has the logits of what follows.
    draft: tuple[int, ...] = ()


class Asked(NamedTuple):
    """A row of a pass's logits, the token whose log-probability is wanted, and how many of the likeliest are."""

    row: int
    token_id: int
    num_top: int


def sample_row(logits_RV: Floats, draw: Draw) -> Sampled | Exception:
    """The token of one row, or why it has none: a fault of one sequence must not end others."""
    try:
        return sample(logits_RV[draw.row], draw.sequence, None if draw.mask is None else draw.mask.result())
    # A constraint is the caller's code, which may raise anything.
    except Exception as error:
        return error


def score_rows(logits_RV: Floats, asked: SequenceOf[Asked]) -> list[Scored]:
    """How likely given tokens were."""
    return [score(logits_RV[one.row], one.token_id, one.num_top) for one in asked]


def sample(logits_V: Floats, sequence: Sequence, mask: Mask | None = None) -> Sampled:
    """The next token of a sequence. ``logits_V`` is float32 and is not changed; ``mask``: see `Constraint.fill`.

    Raises OssiaError if the logits are not finite or no token is allowed.
    """
    params = sequence.params
    adjusted_V = adjust(logits_V, sequence, mask)
    likeliest = int(adjusted_V.argmax())
    peak = float(adjusted_V[likeliest])
    if not math.isfinite(peak):
        raise _no_peak(logits_V)
    drawn_logprob = None
    if params.temperature < GREEDY_BELOW:
        token_id = likeliest
        drawn_logprob = 0.0 if params.drawn_logprobs else None
    else:
        kept = keep(adjusted_V, peak, params.temperature, params.top_k, params.top_p, params.min_p)
        token_id = kept.draw(uniform(sequence.seed, len(sequence.token_ids)))
        drawn_logprob = kept.logprob(token_id) if params.drawn_logprobs else None
    if not params.logprobs and not params.top_logprobs:
        return Sampled(token_id, None, (), drawn_logprob)
    return Sampled(token_id, *score(logits_V, token_id, params.top_logprobs), drawn_logprob)


def score(logits_V: Floats, token_id: int, num_top: int) -> Scored:
    """The log-probability of a token by the model itself, and the likeliest tokens in its place."""
    log_total = log_sum_exp(logits_V)
    top = top_ids(logits_V, num_top) if num_top else ()
    return Scored(float(logits_V[token_id]) - log_total, tuple((int(i), float(logits_V[i]) - log_total) for i in top))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that belongs to one place of one seed's text: 53 bits of a hash of both."""
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little"), digest_size=8
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def adjust(logits_V: Floats, sequence: Sequence, mask: Mask | None) -> Floats:
    """The logits after penalties, bias, bans and mask; the same array if there is nothing to do."""
    params, counts = sequence.params, sequence.token_counts
    banned = banned_ids(sequence)
    if counts is None and mask is None and not params.logit_bias and not len(banned):
        return logits_V
    if mask is None:
        out_V = logits_V.copy()
    else:
        # Plain bytes of a little-endian word are its bits in order.
        allowed_V = np.take(_MASK_BYTES, mask.astype("<u4", copy=False).view(np.uint8), axis=0).reshape(-1)
        out_V = logits_V + allowed_V[: len(logits_V)]
    if counts is not None:
        penalised, times = counts.token_ids, counts.counts
        values = out_V[penalised]
        penalty = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / penalty, values * penalty)
        values -= np.float32(params.frequency_penalty) * times
        values -= np.float32(params.presence_penalty) * (times > 0)
        out_V[penalised] = values
    out_V[sequence.biased_token_ids] += sequence.biases
    out_V[banned] = -np.inf
    return out_V


def banned_ids(sequence: Sequence) -> Ids:
    """Tokens that the next one may not be: the request's, and those that end an answer which is too short yet."""
    if sequence.num_output_tokens >= sequence.params.min_tokens:
        return sequence.banned_token_ids
    return np.concatenate([sequence.banned_token_ids, sequence.eos_token_ids])


class Kept(NamedTuple):
    """The tokens that may be drawn, by ascending id (None: all of the vocabulary), and their unscaled weights."""

    ids: Ids | None
    weights: Floats

    def draw(self, u: float) -> int:
        """The token under the part ``u`` of the weights' sum, counted from the lowest id."""
        index = _index_at(self.weights, u)
        return index if self.ids is None else int(self.ids[index])

    def logprob(self, token_id: int) -> float:
        """The log-probability of drawing a token that is among them."""
        index = token_id if self.ids is None else int(np.searchsorted(self.ids, token_id))
        return math.log(float(self.weights[index])) - math.log(float(self.weights.sum(dtype=np.float64)))


def keep(logits_V: Floats, peak: float, temperature: float, top_k: int, top_p: float, min_p: float) -> Kept:
    """Apply temperature, then top_k, then top_p to what is left, then min_p.

    ``peak`` is the highest logit. Of equal tokens at the edge of top_k or top_p those with lower ids are kept.
    """
    ids: Ids | None = None
    if 0 < top_k < len(logits_V):
        ids = np.sort(top_ids(logits_V, top_k))
        logits_V = logits_V[ids]
    # The likeliest token has weight 1.
    weights = logits_V - np.float32(peak)
    with np.errstate(over="ignore", under="ignore"):
        if temperature != 1:
            weights /= np.float32(temperature)
        np.exp(weights, out=weights)
    if top_p >= 1 and min_p <= 0:
        return Kept(ids, weights)
    chosen = _nucleus(weights, top_p) if top_p < 1 else np.flatnonzero(weights >= np.float32(min_p))
    if top_p < 1 and min_p > 0:
        chosen = chosen[weights[chosen] >= np.float32(min_p)]
    return Kept(chosen if ids is None else ids[chosen], weights[chosen])


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Indices of the fewest, heaviest weights that reach ``top_p`` of the sum, ascending."""
    goal = top_p * float(weights.sum(dtype=np.float64))
    # All weights below this bound weigh less than half of 1 - top_p together: none of them can be needed.
    candidates = np.flatnonzero(weights >= (1 - top_p) * goal / len(weights) / 2)
    weights = weights[candidates]
    # The first bits of a positive float order it: of the 32 ranges in each octave only one needs to be sorted.
    ranges = (weights.view(np.uint32) >> 18).astype(np.int64)
    sums = np.cumsum(np.bincount(ranges, weights)[::-1])
    place = min(int(np.searchsorted(sums, goal)), len(sums) - 1)
    edge_range = len(sums) - 1 - place
    at_edge = np.flatnonzero(ranges == edge_range)
    descending = at_edge[np.argsort(-weights[at_edge], kind="stable")]
    before = float(sums[place - 1]) if place else 0.0
    count = int(np.searchsorted(np.cumsum(weights[descending], dtype=np.float64), goal - before)) + 1
    kept = ranges > edge_range
    kept[descending[:count]] = True
    return candidates[kept]


def top_ids(values_V: Floats, k: int) -> Ids:
    """The indices of the ``k`` highest values, highest first, equal ones by lower index."""
    candidates = np.arange(len(values_V))
    if k < len(values_V):
        # The k-th highest of the maxima of k or more runs is a lower bound: at least k values reach it.
        runs = np.arange(0, len(values_V), _RUN)
        bounding = np.maximum.reduceat(values_V, runs) if k <= len(runs) else values_V
        candidates = np.flatnonzero(values_V >= np.partition(bounding, -k)[-k])
    # A stable sort gives equal values to the lower index.
    order = np.argsort(-values_V[candidates], kind="stable")
    return candidates[order[:k]]


def log_sum_exp(logits_V: Floats) -> float:
    peak = logits_V.max()
    return float(peak) + math.log(float(np.exp(logits_V - peak).sum(dtype=np.float64)))


def _index_at(weights: Floats, u: float) -> int:
    """The first index at which the running sum of the weights exceeds ``u`` times their sum; never of weight 0."""
    if len(weights) > 4 * _RUN:
        # First the run, then the place in it: a running sum over all is several times as slow.
        starts = np.arange(0, len(weights), _RUN)
        sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
        target = u * sums[-1]
        run = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
        before = float(sums[run - 1]) if run else 0.0
        within = weights[run * _RUN : (run + 1) * _RUN]
        return run * _RUN + _first_above(np.cumsum(within, dtype=np.float64), within, target - before)
    sums = np.cumsum(weights, dtype=np.float64)
    return _first_above(sums, weights, u * float(sums[-1]))


def _first_above(sums: Floats, weights: Floats, target: float) -> int:
    index = int(np.searchsorted(sums, target, side="right"))
    # Sums in another order may round below the target: the last token with a weight is meant.
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])


def _no_peak(logits_V: Floats) -> OssiaError:
    if math.isfinite(float(logits_V.max())):
        return OssiaError("no token is allowed here: bans, bias and constraint exclude the whole vocabulary")
    return OssiaError("the model's logits are not finite; its weights or an adapter's are damaged")
