"""Distillation: a student learns a teacher's probabilities, token by token and at every effort.

    offline    the teacher does exercises; its samples and likeliest tokens go to the disk (`teachings.py`)
               the student's    KL(teacher || student) over those K tokens and the rest as one       becomes small
    on_policy  the student does exercises, and the teacher says how likely each of its tokens is
               top      KL(student || teacher) over the teacher's K tokens and the rest as one       becomes small
               sampled  log p_teacher - log p_student of the sampled token is that token's advantage

The effort stands in the prompt, which teacher and student both read, so that what is learned of low effort is the
teacher's behaviour at low effort. Merging all other tokens into one can only make a divergence smaller: it is a lower
bound, which is tight where the teacher's K tokens hold nearly all of its probability.

Shapes   R sampled tokens of a pass, K likeliest tokens of the teacher, D hidden size.
Sources  forward KL over a teacher's samples: arXiv:1503.02531, arXiv:1606.07947; reverse KL on the student's own:
         arXiv:2306.08543, arXiv:2306.13649; as a policy gradient of each token:
         https://thinkingmachines.ai/blog/on-policy-distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ossia.errors import InputError, TrainingError
from ossia.harmony import Effort, Tokenizer
from ossia.model.hub import resolve_model
from ossia.model.weights import Checkpoint
from ossia.ops import Batch
from ossia.train.actor import Actor
from ossia.train.advantage import Objective
from ossia.train.curves import draw_curves
from ossia.train.data import to_batch
from ossia.train.fit import (
    fingerprint,
    make_trainer,
    open_model,
    set_up_whole,
    table,
    watched_router,
    with_balance,
)
from ossia.train.module import Model
from ossia.train.packing import plan
from ossia.train.parallel import Team, extents
from ossia.train.policy import (
    Batched,
    Lesson,
    PolicyFeed,
    PolicyObjective,
    PolicyPass,
    PolicyTrainer,
    describe,
    rollout_config,
    write_rollouts,
)
from ossia.train.result import tell_nothing, write_result
from ossia.train.rl import make_policy_trainer, tell_unread
from ossia.train.rollout import Exercise, Rollout, Rollouts, rollout_seed
from ossia.train.rollout_config import DistillConfig
from ossia.train.run import Outcome, Run, RunFolder, Say, check_resumed
from ossia.train.tasks import Split, TaskMix, make_mix
from ossia.train.teacher import Scores, Teacher, open_teacher
from ossia.train.teachings import Manifest, Teaching, Teachings, vocabulary_digest
from ossia.train.trainer import Terms, Trainer, memory_errors, to_device

_EFFORTS = tuple(Effort)
# Rows whose logits exist at one time: of the published vocabulary 100 MiB.
LOGIT_ROWS = 128
# The probability that all other tokens have at the least, so that its logarithm is one.
_LEAST_REST = 1e-7
_EVALUATION = -1


def distill(settings: DistillConfig, *, resume: bool, say: Say) -> Outcome:
    """Collect and train as the settings say. Raises the errors of the teacher, the tasks, the model and the run."""
    with set_up_whole(settings) as team:
        return _distill(settings, team, resume=resume, say=say if team.rank == 0 else tell_nothing)


def _distill(settings: DistillConfig, team: Team, *, resume: bool, say: Say) -> Outcome:
    tell_unread(settings, say)
    path = resolve_model(settings.model)
    if settings.method == "on_policy":
        mix = make_mix(settings.task, settings.options_of_task, settings.effort_weights)
        return _on_policy(settings, mix, path, team, resume=resume, say=say)
    tokenizer = Checkpoint.open(path).tokenizer()
    folder = Path(settings.teachings) if settings.teachings else Path(settings.out) / "teachings"
    if resume:
        # The teacher may work for hours, and what it adds is something else than what the run began with.
        check_resumed(settings)
    if settings.teacher:
        mix = make_mix(settings.task, settings.options_of_task, settings.effort_weights)
        team.first(lambda: collect(settings, mix, tokenizer, folder, say=say))
    if settings.collect_only:
        return Outcome(folder, 0, None, "done")
    return _offline(settings, folder, tokenizer, path, team, resume=resume, say=say)


# Offline -------------------------------------------------------------------------------------------------------------


def collect(settings: DistillConfig, mix: TaskMix, student: Tokenizer, folder: Path, *, say: Say) -> None:
    """Let the teacher do exercises, shard by shard; what is there already is not done again."""
    teachings = Teachings(folder)
    manifest = Manifest(
        vocabulary=vocabulary_digest(student),
        top=settings.top,
        shard=settings.shard,
        teacher=settings.teacher,
        exercises={
            "task": list(settings.task),
            "task_option": list(settings.task_option),
            "efforts": settings.efforts,
            "seed": settings.seed,
            "rollout_tokens": settings.rollout_tokens,
            "temperature": settings.temperature,
            "grammar": settings.grammar,
        },
    )
    wanted: dict[Split, int] = {"train": settings.samples, "held_out": settings.eval_prompts}
    teachings.begin(manifest)
    missing = [
        (split, number, samples)
        for split, count in wanted.items()
        for number, samples in teachings.missing(split, count, settings.shard)
    ]
    if not missing:
        return
    teacher = open_teacher(settings, student)
    try:
        source = teacher.source()
        with Rollouts(source, student, rollout_config(settings), top_logprobs=settings.top) as rollouts:
            for split, number, samples in missing:
                side = 0 if split == "train" else 1
                done = rollouts.run(
                    [Exercise(mix.draw(split, settings.seed, i), rollout_seed(settings.seed, side, i)) for i in samples]
                )
                teachings.write(split, number, done)
                told = describe(done)
                say(
                    f"{split} {samples.start + 1} to {samples.stop} of {wanted[split]}: reward {told['reward']:.3f}, "
                    f"{told['length']:.0f} tokens, {told['truncated']:.0%} truncated"
                )
    finally:
        teacher.close()


@dataclass(frozen=True, eq=False)
class TeachingPass:
    """Teachings that go through the student at once. Rows are the tokens that the teacher sampled."""

    batch: Batch
    targets_R: Any
    top_ids_RK: Any
    top_logprobs_RK: Any
    # An index into the efforts.
    efforts_R: Any
    num_tokens: int


class ForwardKl:
    """KL(teacher || student) of each token; an `ossia.train.trainer.Objective`."""

    def __init__(self, model: Model, balance_weight: float = 0.0) -> None:
        self.model = model
        self._balance_weight = balance_weight

    def weight(self, batch: TeachingPass) -> float:
        return float(len(batch.targets_R))

    def terms(self, batch: TeachingPass) -> Terms:
        with watched_router(self.model, is_wanted=self._balance_weight > 0) as seen:
            x_RD = self.model.hidden(batch.batch)
        ids = torch.cat([batch.top_ids_RK, batch.targets_R[:, None]], dim=1)
        logprobs = gathered_logprobs(self.model, x_RD, ids)
        kl_R = partial_kl(batch.top_logprobs_RK, logprobs[:, :-1])
        terms = Terms(kl_R.sum(), {"nll": float(-logprobs[:, -1].detach().sum())})
        return with_balance(terms, seen, self._balance_weight, self.weight(batch)) if seen else terms


def partial_kl(p_RK: Tensor, q_RK: Tensor) -> Tensor:
    """KL(p || q) of each row, from log-probabilities of some tokens; all others are taken as one token."""
    p_rest_R, q_rest_R = _rest(p_RK), _rest(q_RK)
    kl_R = (p_RK.exp() * (p_RK - q_RK)).sum(dim=1)
    return kl_R + p_rest_R.exp() * (p_rest_R - q_rest_R)


def _rest(logprobs_RK: Tensor) -> Tensor:
    return (1 - logprobs_RK.exp().sum(dim=1)).clamp(min=_LEAST_REST).log()


def gathered_logprobs(model: Model, x_RD: Tensor, ids_RK: Tensor) -> Tensor:
    """log p of K tokens of each row, float32 [R, K]; logits exist some rows at a time, and again on the way back."""

    def piece(x: Tensor, ids: Tensor) -> Tensor:
        logits = model.ops.linear(x, model.weights.unembedding).float()
        return logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)

    pieces = []
    for start in range(0, len(x_RD), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        if torch.is_grad_enabled():
            made: Tensor = checkpoint(piece, x_RD[rows], ids_RK[rows], use_reentrant=False)
        else:
            made = piece(x_RD[rows], ids_RK[rows])
        pieces.append(made)
    return torch.cat(pieces)


class TeachingFeed:
    """Teachings in a seeded order, another in each epoch; an `ossia.train.run.Feed`."""

    def __init__(self, teachings: Sequence[Teaching], settings: DistillConfig) -> None:
        self._teachings = teachings
        self._settings = settings
        self._num_done = 0

    @property
    def position(self) -> Mapping[str, Any]:
        return {"step": self._num_done}

    def seek(self, position: Mapping[str, Any]) -> None:
        self._num_done = position["step"]

    def next_step(self) -> list[TeachingPass]:
        if self._num_done >= self._settings.steps:
            return []
        first = self._num_done * self._settings.prompts
        self._num_done += 1
        chosen = [self._sample(first + i) for i in range(self._settings.prompts)]
        return teaching_passes(chosen, self._settings.pass_tokens)

    def _sample(self, number: int) -> Teaching:
        epoch, place = divmod(number, len(self._teachings))
        order = np.random.default_rng((self._settings.seed, epoch)).permutation(len(self._teachings))
        return self._teachings[order[place]]


def teaching_passes(teachings: Sequence[Teaching], pass_tokens: int) -> list[TeachingPass]:
    """Passes of at most ``pass_tokens`` tokens; a longer sample has one of its own."""
    lengths = [len(one) for one in teachings]
    packs = plan(lengths, max([pass_tokens, *lengths]), "best_fit")
    return [_teaching_pass([teachings[i] for i in indices]) for indices in packs]


def _teaching_pass(teachings: Sequence[Teaching]) -> TeachingPass:
    packed = to_batch([one.sample() for one in teachings])
    counts = [int(one.sampled_L.sum()) for one in teachings]
    return TeachingPass(
        batch=packed.batch,
        targets_R=packed.targets_R,
        top_ids_RK=np.concatenate([one.top_ids_RK for one in teachings]).astype(np.int64),
        top_logprobs_RK=np.concatenate([one.top_logprobs_RK for one in teachings]),
        efforts_R=np.repeat([_EFFORTS.index(one.effort) for one in teachings], counts),
        num_tokens=packed.num_tokens,
    )


def _offline(
    settings: DistillConfig,
    folder: Path,
    tokenizer: Tokenizer,
    path: Path,
    team: Team,
    *,
    resume: bool,
    say: Say,
) -> Outcome:
    teachings = Teachings(folder)
    if teachings.manifest.vocabulary != vocabulary_digest(tokenizer):
        raise InputError(
            f"the teachings in {folder} are of another vocabulary than {settings.model}'s; collect them from a teacher "
            "with the student's vocabulary"
        )
    # Without a teacher nothing is asked for, and all that is there is taken.
    counts: dict[Split, int] = (
        {"train": settings.samples, "held_out": settings.eval_prompts} if settings.teacher else {}
    )
    train = [one for one in teachings.read("train", counts.get("train")) if one.reward >= settings.min_reward]
    if not train:
        raise TrainingError(
            f"{folder} has no sample with a reward of at least {settings.min_reward}; lower min_reward, or collect more"
        )
    held_out = teachings.read("held_out", counts.get("held_out"))
    say(f"{len(train)} samples of {teachings.manifest.teacher}, {sum(len(one) for one in train)} tokens")
    inputs = {"model": fingerprint(path), "teachings": _contents(teachings, counts)}
    with RunFolder(settings, resume=resume, inputs=inputs, team=team) as run_folder:
        model = open_model(settings, path, team)
        table(model, say)
        objective = ForwardKl(model, settings.balance_weight)
        trainer: Trainer[TeachingPass] = make_trainer(settings, model, objective, settings.steps, team)
        run = Run(
            run_folder,
            trainer,
            TeachingFeed(train, settings),
            num_steps=settings.steps,
            parameters=model.state(),
            evaluate=_held_out_kl(model, held_out, settings, team.device) if held_out and settings.eval_every else None,
            say=say,
            held=extents(model),
        )
        model.train()
        outcome = run.train()
        if outcome.reason == "early":
            run.load_best()
        team.first(lambda: draw_curves(run_folder.path, say))
        if not outcome.is_interrupted:
            write_result(model, settings, say, team)
    return outcome


def _held_out_kl(
    model: Model, teachings: Sequence[Teaching], settings: DistillConfig, device: torch.device
) -> Callable[[], Mapping[str, float]]:
    """KL(teacher || student) on held-out samples, in all and by effort, in nats for each token."""

    def evaluate() -> Mapping[str, float]:
        kl: list[Tensor] = []
        efforts: list[Tensor] = []
        was_training = model.training
        model.eval()
        with torch.no_grad(), memory_errors():
            for one in teaching_passes(teachings, settings.pass_tokens):
                moved = to_device(one, device)
                logprobs_RK = gathered_logprobs(model, model.hidden(moved.batch), moved.top_ids_RK)
                kl.append(partial_kl(moved.top_logprobs_RK, logprobs_RK))
                efforts.append(moved.efforts_R)
        model.train(was_training)
        kl_R, efforts_R = torch.cat(kl), torch.cat(efforts)
        found = {f"kl_{effort}": kl_R[efforts_R == i] for i, effort in enumerate(_EFFORTS)}
        numbers = {"kl": float(kl_R.mean())} | {name: float(own.mean()) for name, own in found.items() if len(own)}
        return {"loss": numbers["kl"], **numbers}

    return evaluate


def _contents(teachings: Teachings, counts: Mapping[Split, int]) -> str:
    """The shards that are trained on, by name and size, and how many samples are read where it is not all of them."""
    shards = sorted((teachings.folder / "train").glob("shard-*"))
    parts = [f"the first {count} of {split}" for split, count in counts.items() if count < teachings.num_samples(split)]
    return " ".join([*(f"{one.name}:{one.stat().st_size}" for one in shards), *parts])


# On policy -----------------------------------------------------------------------------------------------------------


class ReverseKl(PolicyObjective):
    """KL(student || teacher) of each token that the student sampled, over the teacher's likeliest tokens."""

    def policy_terms(self, batch: PolicyPass) -> Terms:
        x_RD = self.model.hidden(batch.batch, batch.routing)
        ids = torch.cat([batch.top_ids_RK, batch.targets_R[:, None]], dim=1)
        logprobs = gathered_logprobs(self.model, x_RD, ids)
        kl_R = partial_kl(logprobs[:, :-1], batch.top_logprobs_RK)
        self.note(batch, logprobs[:, -1].detach())
        loss = (batch.weights_R * kl_R).sum()
        return Terms(loss, {"trained_share": float(batch.weights_R.sum()), "reverse_kl": float(loss.detach())})


class TeacherJudge:
    """The student's rollouts, and what the teacher thinks of them."""

    def __init__(
        self, settings: DistillConfig, mix: TaskMix, rollouts: Rollouts, teacher: Teacher, folder: Path, team: Team
    ) -> None:
        self._settings = settings
        self._mix = mix
        self._rollouts = rollouts
        self._teacher = teacher
        self._folder = folder
        self._team = team

    def __call__(self, step: int) -> Batched:
        settings = self._settings
        exercises = [
            Exercise(
                self._mix.draw("train", settings.seed, step * settings.prompts + number),
                rollout_seed(settings.seed, step, number, member),
            )
            for number in range(settings.prompts)
            for member in range(settings.group)
        ]
        done = self._rollouts.run(exercises)
        scores = self._team.deal(done, lambda own: self._teacher.score(own, settings.top))
        lessons = [self._lesson(*pair) for pair in zip(done, scores, strict=True)]
        if self._team.rank == 0:
            write_rollouts(self._folder, step + 1, lessons, self._rollouts.tokenizer, settings.show_rollouts)
        return Batched([lessons], describe(done) | divergences(done, scores))

    def _lesson(self, rollout: Rollout, scores: Scores) -> Lesson:
        # What the teacher likes more than the student does is to become likelier: minus the reverse KL, in expectation.
        advantages_R = scores.logprobs_R - rollout.model_logprobs_L[rollout.sampled_L]
        if self._settings.estimate == "sampled":
            return Lesson(rollout, advantages_R)
        return Lesson(rollout, advantages_R, scores.top_ids_RK, scores.top_logprobs_RK)


def divergences(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> dict[str, float]:
    """KL(student || teacher) as the sampled tokens tell it, in all and by effort, in nats for each token."""
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    for rollout, one in zip(rollouts, scores, strict=True):
        apart_R = rollout.model_logprobs_L[rollout.sampled_L] - one.logprobs_R
        for name in ("kl", f"kl_{rollout.draw.effort}"):
            found.setdefault(name, []).append(apart_R)
    return {name: float(np.concatenate(values).mean()) for name, values in found.items()}


def _on_policy(settings: DistillConfig, mix: TaskMix, path: Path, team: Team, *, resume: bool, say: Say) -> Outcome:
    with ExitStack() as stack:
        inputs = {"model": fingerprint(path)}
        folder = stack.enter_context(RunFolder(settings, resume=resume, inputs=inputs, team=team))
        teacher = open_teacher(settings, Checkpoint.open(path).tokenizer())
        stack.callback(teacher.close)
        model = open_model(settings, path, team)
        table(model, say)
        actor = Actor(path, settings, model)
        rollouts = stack.enter_context(
            Rollouts(
                actor.engine,
                actor.tokenizer,
                rollout_config(settings),
                routing=settings.replay,
                adapter=actor.adapter,
                team=team,
            )
        )
        kind = ReverseKl if settings.estimate == "top" else PolicyObjective
        objective = kind(
            model,
            Objective(clip_high=math.inf),
            temperature=settings.temperature,
            balance_weight=settings.balance_weight,
        )
        judge = TeacherJudge(settings, mix, rollouts, teacher, folder.path / "rollouts", team)
        feed = PolicyFeed(actor, judge, objective, settings, team=team)
        trainer: PolicyTrainer = make_policy_trainer(settings, model, objective, team)
        trainer.numbers = lambda: feed.numbers
        run = Run(
            folder,
            trainer,
            feed,
            num_steps=settings.steps,
            parameters=model.state(),
            evaluate=_student_kl(settings, mix, actor, rollouts, teacher, team) if settings.eval_every else None,
            say=say,
            held=extents(model),
        )
        model.eval()
        outcome = run.train()
        if outcome.reason == "early":
            run.load_best()
        team.first(lambda: draw_curves(folder.path, say))
        if not outcome.is_interrupted:
            write_result(model, settings, say, team)
    return outcome


def _student_kl(
    settings: DistillConfig, mix: TaskMix, actor: Actor, rollouts: Rollouts, teacher: Teacher, team: Team
) -> Callable[[], Mapping[str, float]]:
    """The student on held-out prompts, the same ones each time, as its teacher and the tasks judge it."""

    def evaluate() -> Mapping[str, float]:
        actor.update()
        done = rollouts.run(
            [
                Exercise(mix.draw("held_out", settings.seed, i), rollout_seed(settings.seed, _EVALUATION, i))
                for i in range(settings.eval_prompts)
            ]
        )
        numbers = divergences(done, team.deal(done, lambda own: teacher.score(own, 1))) | describe(done)
        return {"loss": numbers["kl"], **numbers}

    return evaluate
