"""Learning from rollouts: what becomes of them between the engine that sampled and the optimiser's step.

    feed       exercises -> rollouts -> advantages of their tokens -> passes, the experts of every token in them
    objective  a pass -> its loss, with the experts replayed
    trainer    one step of the run: all optimiser steps that these rollouts are good for
    run        `ossia.train.run`: checkpoints, metrics, resume - which is exact, since rollouts are made of the weights,
               the seed and the number of the step alone, and a checkpoint lies between two steps

Shapes   R sampled tokens of a pass, S sequences, T tokens, E those of all sequences, A experts per token, K likeliest
         tokens of a teacher.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ossia.harmony import Tokenizer
from ossia.ops import Batch, Routing, Shared
from ossia.train.actor import Actor
from ossia.train.advantage import Mismatch, Objective, mismatch, policy_loss, row_weights
from ossia.train.data import TrainBatch, to_batch
from ossia.train.fit import watched_router, with_balance
from ossia.train.module import Model
from ossia.train.parallel import Team
from ossia.train.rollout import Rollout, RolloutConfig
from ossia.train.rollout_config import RolloutSettings
from ossia.train.trainer import StepReport, Terms, Trainer, memory_errors, to_device

Floats = npt.NDArray[np.float32]

# A token that is only attended to once more takes a part of the memory of one that goes through the model.
_ATTENDED_WEIGHT = 0.25
# Among the numbers of a step: the share of all rows, by weight, that went through the model.
_SHARE = "trained_share"


@dataclass(frozen=True, eq=False)
class Lesson:
    """A rollout and what is learned of it: the advantage of each of its sampled tokens, in order."""

    rollout: Rollout
    advantages_R: Floats
    # The teacher's likeliest tokens at each place, if the student learns those instead.
    top_ids_RK: npt.NDArray[np.int32] | None = None
    top_logprobs_RK: Floats | None = None

    @property
    def has_gradient(self) -> bool:
        return self.top_ids_RK is not None or bool(self.advantages_R.any())


class Batched(NamedTuple):
    """What one step's rollouts came to: lessons by update, and numbers for the log."""

    updates: list[list[Lesson]]
    numbers: dict[str, float]


@dataclass(frozen=True, eq=False)
class PolicyPass:
    """Rollouts that go through the model at once. Rows are their sampled tokens."""

    batch: Batch
    targets_R: Any
    advantages_R: Any
    weights_R: Any
    sequence_R: Any
    # Log-probabilities: of the engine in what it drew from, and by the model itself; of the trainer before the first
    # update; of the reference. The last two may be empty.
    drawn_R: Any
    model_R: Any
    old_R: Any
    reference_R: Any
    # The experts [T, A] of every layer; none if they are not replayed.
    experts: tuple[Any, ...]
    # A teacher's likeliest tokens; without columns if there is none.
    top_ids_RK: Any
    top_logprobs_RK: Any
    num_sequences: int
    num_tokens: int
    # What this pass adds to the number that the loss is divided by.
    norm: float
    # Which of the step's optimiser steps it belongs to.
    update: int

    @property
    def num_rows(self) -> int:
        return len(self.targets_R)

    @property
    def routing(self) -> list[Routing] | None:
        return [Routing(experts_TA, None) for experts_TA in self.experts] or None


def make_passes(
    lessons: Sequence[Lesson], *, pass_tokens: int, average: str, update: int = 0, keep_all: bool = False
) -> list[PolicyPass]:
    """Passes of the lessons of one update. Those without a gradient are left out, but count where the loss is divided.

    What rollouts of a pass begin with alike - a group's prompt, and what its members say alike - goes through the model
    once; of ``pass_tokens`` it takes a quarter each further time. A rollout that is longer goes alone. ``keep_all``
    keeps those without a gradient, as the divergence from a reference demands.
    """
    weights = row_weights([one.rollout.num_sampled for one in lessons], "token" if average == "token" else "sequence")
    norm = float(sum(w * one.rollout.num_sampled for w, one in zip(weights, lessons, strict=True)))
    kept = [(one, w) for one, w in zip(lessons, weights, strict=True) if keep_all or one.has_gradient]
    # Those that begin alike one behind the other.
    kept.sort(key=lambda each: each[0].rollout.token_ids_L.tolist())
    passes, start = [], 0
    while start < len(kept):
        commons = _commons([one.rollout for one, _ in kept[start:]], pass_tokens)
        passes.append(_pass(kept[start : start + len(commons)], commons, update))
        start += len(commons)
    return [replace(one, norm=norm if i == 0 else 0.0) for i, one in enumerate(passes)]


def _commons(rollouts: Sequence[Rollout], pass_tokens: int) -> list[int]:
    """Of as many rollouts as one pass takes: the tokens that each begins with as the one before does."""
    commons = [0]
    num_tokens = float(len(rollouts[0].token_ids_L))
    for before, one in pairwise(rollouts):
        common = _common(before, one)
        num_tokens += len(one.token_ids_L) - common + _ATTENDED_WEIGHT * common
        if num_tokens > pass_tokens:
            break
        commons.append(common)
    return commons


def _common(one: Rollout, other: Rollout) -> int:
    """How many tokens two rollouts begin with alike, and alike routed; of the last of either no routing is known."""
    length = min(len(one.token_ids_L), len(other.token_ids_L)) - 1
    differs_L = one.token_ids_L[:length] != other.token_ids_L[:length]
    if one.routing_LA is not None and other.routing_LA is not None:
        differs_L |= (one.routing_LA[:length] != other.routing_LA[:length]).reshape(length, -1).any(axis=1)
    return int(differs_L.argmax()) if differs_L.any() else length


def _share(packed: TrainBatch, commons: Sequence[int]) -> tuple[Batch, npt.NDArray[np.bool_]]:
    """The batch with what each sequence begins with as the one before left out, and which tokens are left in it."""
    batch = packed.batch
    starts = batch.query_starts_N1.tolist()
    is_kept_E = np.ones(packed.num_tokens, np.bool_)
    for start, common in zip(starts, commons, strict=False):
        is_kept_E[start : start + common] = False
    rows_E = np.cumsum(is_kept_E, dtype=np.int32) - 1
    for (before, start), common in zip(pairwise(starts), commons[1:], strict=False):
        rows_E[start : start + common] = rows_E[before : before + common]
    shared = replace(
        batch,
        token_ids_T=batch.token_ids_T[is_kept_E],
        positions_T=batch.positions_T[is_kept_E],
        logit_rows_R=rows_E[batch.logit_rows_R],
        shared=Shared(rows_E, np.flatnonzero(is_kept_E).astype(np.int32)),
    )
    return shared, is_kept_E


def _pass(lessons: Sequence[tuple[Lesson, float]], commons: Sequence[int], update: int) -> PolicyPass:
    rollouts = [lesson.rollout for lesson, _ in lessons]
    packed = to_batch([rollout.sample() for rollout in rollouts])
    batch, is_kept_E = _share(packed, commons)
    sampled = [rollout.sampled_L for rollout in rollouts]
    lengths = [rollout.num_sampled for rollout in rollouts]
    has_top = lessons[0][0].top_ids_RK is not None
    none_RK = np.empty((len(packed.targets_R), 0), np.float32)
    return PolicyPass(
        batch=batch,
        targets_R=packed.targets_R,
        advantages_R=np.concatenate([lesson.advantages_R for lesson, _ in lessons]).astype(np.float32),
        weights_R=np.repeat(np.array([weight for _, weight in lessons], np.float32), lengths),
        sequence_R=np.repeat(np.arange(len(lessons)), lengths),
        drawn_R=np.concatenate([r.drawn_logprobs_L[own] for r, own in zip(rollouts, sampled, strict=True)]),
        model_R=np.concatenate([r.model_logprobs_L[own] for r, own in zip(rollouts, sampled, strict=True)]),
        old_R=np.empty(0, np.float32),
        reference_R=np.empty(0, np.float32),
        experts=_experts(rollouts, is_kept_E),
        top_ids_RK=np.concatenate([lesson.top_ids_RK for lesson, _ in lessons]).astype(np.int64)
        if has_top
        else none_RK.astype(np.int64),
        top_logprobs_RK=np.concatenate([lesson.top_logprobs_RK for lesson, _ in lessons]) if has_top else none_RK,
        num_sequences=len(lessons),
        num_tokens=len(batch.token_ids_T),
        norm=0.0,
        update=update,
    )


def _experts(rollouts: Sequence[Rollout], is_kept_E: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], ...]:
    """The recorded experts of every token that goes through the model, layer by layer."""
    recorded = [rollout.routing_LA for rollout in rollouts]
    if any(experts is None for experts in recorded):
        return ()
    pieces = []
    for experts in recorded:
        assert experts is not None
        # The last token was never computed, and nothing that is trained depends on it: any experts will do.
        last = np.broadcast_to(np.arange(experts.shape[-1], dtype=experts.dtype), (1, *experts.shape[1:]))
        pieces += [experts, last]
    experts_TLA = np.concatenate(pieces)[is_kept_E].astype(np.int64)
    return tuple(np.ascontiguousarray(experts_TLA[:, layer]) for layer in range(experts_TLA.shape[1]))


# What is made small --------------------------------------------------------------------------------------------------


class Noted(NamedTuple):
    """Log-probabilities of what the engine drew: the engine's, and the trainer's own before it moved."""

    engine_R: Floats
    trainer_R: Floats


class PolicyObjective:
    """The clipped policy gradient; an `ossia.train.trainer.Objective`. ``noted`` gathers what a step has seen."""

    def __init__(self, model: Model, objective: Objective, *, temperature: float, balance_weight: float = 0.0) -> None:
        self.model = model
        self.objective = objective
        self.temperature = temperature
        self.balance_weight = balance_weight
        self.noted: list[Noted] = []

    def weight(self, batch: PolicyPass) -> float:
        return batch.norm

    def terms(self, batch: PolicyPass) -> Terms:
        with watched_router(self.model, is_wanted=self.balance_weight > 0) as seen:
            terms = self.policy_terms(batch)
        # Counted as the rows are that go through the model, of all that the step's loss is divided by.
        return with_balance(terms, seen, self.balance_weight, float(batch.weights_R.sum())) if seen else terms

    def policy_terms(self, batch: PolicyPass) -> Terms:
        """The terms without the balance of the routers."""
        logprobs_R = self.model.logprobs(batch.batch, batch.targets_R, batch.routing, self.temperature)
        # With the rollouts' only update the old policy is this very one, exactly.
        old_R = batch.old_R if len(batch.old_R) else logprobs_R.detach()
        self.note(batch, old_R)
        terms = policy_loss(
            logprobs_R,
            old_R,
            batch.drawn_R,
            batch.advantages_R,
            batch.weights_R,
            batch.sequence_R,
            batch.num_sequences,
            self.objective,
            batch.reference_R if len(batch.reference_R) else None,
        )
        sums = {
            _SHARE: float(batch.weights_R.sum()),
            "clipped_low": terms.num_clipped_low,
            "clipped_high": terms.num_clipped_high,
            "kl_old": terms.old_kl_sum,
            "correction": terms.correction_sum,
        }
        if len(batch.reference_R):
            sums["kl_reference"] = terms.reference_kl_sum
        return Terms(terms.loss_sum, sums)

    def note(self, batch: PolicyPass, old_R: Tensor) -> None:
        """At temperature 1 the model's own probabilities are compared, which a grammar does not change."""
        engine_R = batch.model_R if self.temperature == 1 else batch.drawn_R
        self.noted.append(Noted(engine_R.cpu().numpy(), old_R.cpu().numpy()))

    def take_notes(self, team: Team) -> tuple[Mismatch, float]:
        """How far engine and trainer are apart, and the entropy, since the last time; both over the sampled tokens of
        all processes.
        """
        noted = [one for notes in team.each(self.noted) for one in notes]
        self.noted = []
        engine_R = np.concatenate([one.engine_R for one in noted]) if noted else np.empty(0, np.float32)
        trainer_R = np.concatenate([one.trainer_R for one in noted]) if noted else np.empty(0, np.float32)
        # The mean of - log p over what was drawn from p is an estimate of its entropy.
        return mismatch(engine_R, trainer_R), float(-trainer_R.mean()) if len(trainer_R) else 0.0

    def logprobs(self, batch: PolicyPass, device: torch.device) -> Floats:
        """The log-probabilities of a pass under the model as it is, without a gradient."""
        with torch.no_grad(), memory_errors():
            moved = to_device(batch, device)
            return self.model.logprobs(moved.batch, moved.targets_R, moved.routing, self.temperature).cpu().numpy()


# A step --------------------------------------------------------------------------------------------------------------


class PolicyTrainer(Trainer[PolicyPass]):
    """A step is all that is learned of one step's rollouts: one optimiser step for each update."""

    numbers: Callable[[], Mapping[str, float]] = dict
    """What the log is told of the rollouts besides."""

    def step(self, passes: Sequence[PolicyPass]) -> StepReport:
        assert isinstance(self.objective, PolicyObjective)
        began_s = time.perf_counter()
        done = self.num_steps_done
        reports: list[StepReport] = []
        for update in sorted({one.update for one in passes}):
            part = [one for one in passes if one.update == update and one.num_rows]
            if part:
                # All updates of a step have the step's learning rate.
                self.num_steps_done = done
                reports.append(super().step(part))
                if not self.team.share(part)[-1][1]:
                    # It was computed for the others' sake alone.
                    self.objective.noted.pop()
        self.num_steps_done = done + 1
        shown: dict[str, float] = {}
        for report in reports:
            for name, value in report.shown.items():
                shown[name] = shown.get(name, 0.0) + value / len(reports)
        # Rows that have no gradient were left out; what is shown is of those that were not.
        share = shown.get(_SHARE, 1.0)
        shown = {name: value if name == _SHARE else value / share for name, value in shown.items()}
        apart, entropy = self.objective.take_notes(self.team)
        shown |= {"entropy": entropy, "mismatch": apart.mean, "mismatch_max": apart.largest}
        shown |= {"mismatch_kl": apart.kl, "mismatch_tenth": apart.share_over_tenth}
        shown |= dict(self.numbers())
        shown["train_s"] = round(time.perf_counter() - began_s, 4)
        count = max(1, len(reports))
        return StepReport(
            step=done + 1,
            loss=sum(one.loss for one in reports) / count,
            gradient_norm=sum(one.gradient_norm for one in reports) / count,
            learning_rate=self.highest_rate * self.schedule.factor(done),
            num_tokens=sum(one.num_tokens for one in passes),
            weight=sum(one.weight for one in reports),
            is_skipped=any(one.is_skipped for one in reports),
            shown=shown,
        )


class Judge(Protocol):
    """Makes the rollouts of a step, and says what is to be learned of them."""

    def __call__(self, step: int) -> Batched:
        """Rollouts of step ``step`` (from 0), by the engine as it is now."""


class PolicyFeed:
    """The passes of each step; an `ossia.train.run.Feed`. Its position is the number of steps handed out."""

    def __init__(
        self,
        actor: Actor,
        judge: Judge,
        objective: PolicyObjective,
        settings: RolloutSettings,
        *,
        average: str = "token",
        reuse: int = 1,
        reference: Callable[[PolicyPass], Floats] | None = None,
        team: Team,
    ) -> None:
        self._actor = actor
        self._judge = judge
        self._objective = objective
        self._settings = settings
        self._average = average
        self._reuse = reuse
        self._reference = reference
        self._team = team
        self._num_done = 0
        self.numbers: dict[str, float] = {}

    @property
    def position(self) -> Mapping[str, Any]:
        return {"step": self._num_done}

    def seek(self, position: Mapping[str, Any]) -> None:
        self._num_done = position["step"]

    def next_step(self) -> list[PolicyPass]:
        if self._num_done >= self._settings.steps:
            return []
        began_s = time.perf_counter()
        self._actor.update()
        handed_s = time.perf_counter()
        batched = self._judge(self._num_done)
        self.numbers = {**batched.numbers, "handover_s": round(handed_s - began_s, 4)}
        self.numbers["rollout_s"] = round(time.perf_counter() - handed_s, 4)
        self._num_done += 1
        passes = self._passes(batched.updates)
        # A step in which all groups are equal teaches nothing, and is a step all the same.
        return passes or [EMPTY]

    def _passes(self, updates: Sequence[Sequence[Lesson]]) -> list[PolicyPass]:
        made: list[list[PolicyPass]] = []
        for lessons in updates:
            passes = make_passes(
                lessons,
                pass_tokens=self._settings.pass_tokens,
                average=self._average,
                keep_all=self._reference is not None,
            )
            if self._reference is not None:
                found = self._of_all(passes, self._reference)
                passes = [replace(one, reference_R=logprobs_R) for one, logprobs_R in zip(passes, found, strict=True)]
            made.append(passes)
        if len(made) * self._reuse > 1:
            # Once the policy has moved, it is compared with what it was when it sampled.
            for passes in made:
                found = self._of_all(passes, lambda one: self._objective.logprobs(one, self._team.device))
                passes[:] = [replace(one, old_R=logprobs_R) for one, logprobs_R in zip(passes, found, strict=True)]
        numbered = [one for _ in range(self._reuse) for one in made]
        return [replace(one, update=update) for update, passes in enumerate(numbered) for one in passes]

    def _of_all(self, passes: Sequence[PolicyPass], compute: Callable[[PolicyPass], Floats]) -> list[Floats]:
        return self._team.deal(passes, lambda own: [compute(one) for one in own])


_NONE_R = np.empty(0, np.float32)
_NONE_I = np.empty(0, np.int32)
EMPTY = PolicyPass(
    Batch(_NONE_I, _NONE_I, _NONE_I, _NONE_I, _NONE_I, _NONE_I, _NONE_I),
    targets_R=_NONE_R,
    advantages_R=_NONE_R,
    weights_R=_NONE_R,
    sequence_R=_NONE_R,
    drawn_R=_NONE_R,
    model_R=_NONE_R,
    old_R=_NONE_R,
    reference_R=_NONE_R,
    experts=(),
    top_ids_RK=_NONE_R,
    top_logprobs_RK=_NONE_R,
    num_sequences=0,
    num_tokens=0,
    norm=0.0,
    update=0,
)


def rollout_config(settings: RolloutSettings) -> RolloutConfig:
    """The settings in the words of the rollouts."""
    return RolloutConfig(
        max_tokens=settings.rollout_tokens,
        max_calls=settings.max_calls,
        tool_timeout_s=settings.tool_seconds,
        temperature=settings.temperature,
        grammar=settings.grammar,
        python_sandbox=settings.python_sandbox,
        unsafe_python=settings.unsafe_python,
        max_python=settings.max_python,
    )


def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over rollouts for the log: rewards and their parts, lengths, all of it by effort and by task as well."""
    numbers: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        numbers.setdefault(name, []).append(float(value))

    has_tasks = len({one.draw.task.name for one in rollouts}) > 1
    for one in rollouts:
        note("reward", one.reward.value)
        note("length", one.num_sampled)
        note("truncated", one.transcript.is_truncated)
        note("calls", one.num_calls)
        for name, value in one.reward.parts.items():
            note(f"part_{name}", value)
        note(f"reward_{one.draw.effort}", one.reward.value)
        note(f"length_{one.draw.effort}", one.num_sampled)
        if has_tasks:
            note(f"reward_{one.draw.task.name}", one.reward.value)
    return {name: sum(values) / len(values) for name, values in numbers.items()}


def write_rollouts(folder: Path, step: int, lessons: Sequence[Lesson], tokenizer: Tokenizer, count: int) -> None:
    """The first rollouts of a step as text, a JSON line each."""
    if not count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"step-{step:08}.jsonl", "w", encoding="utf-8") as file:
        for lesson in lessons[:count]:
            rollout = lesson.rollout
            line = {
                "task": rollout.draw.task.name,
                "effort": str(rollout.draw.effort),
                "instance": rollout.draw.instance.key,
                "reward": rollout.reward.value,
                "parts": dict(rollout.reward.parts),
                "advantage": float(lesson.advantages_R.mean()),
                "truncated": rollout.transcript.is_truncated,
                "defects": list(rollout.transcript.defects),
                "text": tokenizer.decode(rollout.token_ids_L.tolist()),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
