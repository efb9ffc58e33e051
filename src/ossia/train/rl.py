"""Reinforcement: a model does exercises, and what is rewarded more than the rest of its group becomes likelier.

    every step    the engine takes over the weights
                  prompts x group rollouts, tools in the loop                       `rollout.py`
                  reward - cost of length - penalty of the end, less the group's mean
                  passes with the experts that the engine chose                     `policy.py`
                  clipped policy gradient                                           `advantage.py`

The result is as that of supervised training: of LoRA the folder adapter/, else a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ossia.model.hub import resolve_model
from ossia.train.actor import Actor
from ossia.train.advantage import Objective, group_advantages, overlong_penalty
from ossia.train.curves import draw_curves
from ossia.train.fit import fingerprint, make_optimizer, make_schedule, open_model, set_up_whole, table
from ossia.train.lora import pairs_off
from ossia.train.module import Model
from ossia.train.parallel import Team, extents
from ossia.train.policy import (
    Batched,
    Floats,
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
from ossia.train.rollout import Exercise, Rollout, Rollouts, rollout_seed
from ossia.train.rollout_config import RlConfig, RolloutSettings, by_effort
from ossia.train.run import Outcome, Run, RunFolder, Say
from ossia.train.tasks import TaskMix, make_mix

# Seeds of evaluations are apart from those of all steps.
_EVALUATION = -1


def rl(settings: RlConfig, *, resume: bool, say: Say) -> Outcome:
    """Train as the settings say. Raises the errors of the tasks, the model and the run, each saying what to do."""
    with ExitStack() as stack:
        team = stack.enter_context(set_up_whole(settings))
        say = say if team.rank == 0 else tell_nothing
        tell_unread(settings, say)
        mix = make_mix(settings.task, settings.options_of_task, settings.effort_weights)
        path = resolve_model(settings.model)
        inputs = {"model": fingerprint(path)}
        folder = stack.enter_context(RunFolder(settings, resume=resume, inputs=inputs, team=team))
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
        objective = PolicyObjective(
            model,
            objective_of(settings),
            temperature=settings.temperature,
            balance_weight=settings.balance_weight,
        )
        feed = PolicyFeed(
            actor,
            GroupJudge(settings, mix, rollouts, folder.path / "rollouts" if team.rank == 0 else None),
            objective,
            settings,
            average=settings.average,
            reuse=settings.reuse,
            reference=reference_logprobs(settings, path, model, objective, team) if settings.kl else None,
            team=team,
        )
        trainer = make_policy_trainer(settings, model, objective, team)
        trainer.numbers = lambda: feed.numbers
        run = Run(
            folder,
            trainer,
            feed,
            num_steps=settings.steps,
            parameters=model.state(),
            evaluate=held_out(settings, mix, actor, rollouts) if settings.eval_every else None,
            say=say,
            held=extents(model),
        )
        # There is no dropout, and the policy that is trained is the one that samples.
        model.eval()
        outcome = run.train()
        if outcome.reason == "early":
            run.load_best()
        team.first(lambda: draw_curves(folder.path, say))
        if not outcome.is_interrupted:
            write_result(model, settings, say, team)
    return outcome


def tell_unread(settings: RolloutSettings, say: Say) -> None:
    """Say that the size of a step is not told in tokens, where it is."""
    if settings.step_tokens:
        say(f"step_tokens is {settings.step_tokens}, and not read: prompts and group say how much a step sees")


def make_policy_trainer(
    settings: RolloutSettings, model: Model, objective: PolicyObjective, team: Team
) -> PolicyTrainer:
    return PolicyTrainer(
        objective,
        make_optimizer(settings, model, team),
        make_schedule(settings, settings.steps),
        highest_rate=settings.highest_rate,
        clip=settings.clip,
        max_skipped=settings.max_skipped,
        team=team,
    )


def objective_of(settings: RlConfig) -> Objective:
    """The policy gradient that the settings ask for."""
    return Objective(
        ratio=settings.ratio,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        correction=settings.correction,
        correction_cap=settings.correction_cap,
        kl=settings.kl,
    )


def reference_logprobs(
    settings: RolloutSettings, path: Path, model: Model, objective: PolicyObjective, team: Team
) -> Callable[[PolicyPass], Floats]:
    """Log-probabilities under the model that training began with: LoRA's without the pairs, else a second model."""
    if settings.trainable == "lora":

        def without(batch: PolicyPass) -> Floats:
            with pairs_off(model.weights):
                return objective.logprobs(batch, team.device)

        return without
    frozen = open_model(settings, path, team).requires_grad_(False)
    reference = PolicyObjective(frozen, objective.objective, temperature=objective.temperature)
    return lambda batch: reference.logprobs(batch, team.device)


# Rollouts to lessons -------------------------------------------------------------------------------------------------


class GroupJudge:
    """Groups of rollouts of one prompt; a rollout's advantage is its reward less the group's mean.

    Some of each step are written into ``folder``, if there is one.
    """

    def __init__(self, settings: RlConfig, mix: TaskMix, rollouts: Rollouts, folder: Path | None) -> None:
        self._settings = settings
        self._mix = mix
        self._rollouts = rollouts
        self._folder = folder
        self._costs = by_effort("length_cost", settings.length_cost)

    def __call__(self, step: int) -> Batched:
        settings = self._settings
        groups: list[list[Lesson]] = []
        seen: list[Rollout] = []
        num_equal = num_drawn = num_rounds = 0
        while len(groups) < settings.prompts and num_rounds <= settings.redraws:
            missing = settings.prompts - len(groups)
            for group in self._draw(step, num_drawn, missing):
                seen += [lesson.rollout for lesson in group]
                is_equal = not any(lesson.has_gradient for lesson in group)
                num_equal += is_equal
                if not (is_equal and settings.redraws):
                    groups.append(group)
            num_drawn += missing
            num_rounds += 1
        lessons = [lesson for group in groups for lesson in group]
        if self._folder is not None:
            write_rollouts(self._folder, step + 1, lessons, self._rollouts.tokenizer, settings.show_rollouts)
        numbers = describe(seen) | {
            "reward_shaped": float(np.mean([self.shaped(one) for one in seen])),
            "groups_equal": num_equal / num_drawn,
            "groups_drawn": float(num_drawn),
            "redraws": float(num_rounds - 1),
        }
        return Batched(_divided(groups, settings.updates), numbers)

    def shaped(self, rollout: Rollout) -> float:
        """The task's reward less what its length costs at its effort, and less the penalty of a late end."""
        settings = self._settings
        cost = self._costs.get(rollout.draw.effort, 0.0) * rollout.num_sampled / settings.rollout_tokens
        penalty = overlong_penalty(rollout.num_sampled, settings.rollout_tokens, settings.overlong)
        return rollout.reward.value - cost + penalty

    def _draw(self, step: int, first: int, count: int) -> list[list[Lesson]]:
        """``count`` groups, from the prompt ``first`` of the step on."""
        settings = self._settings
        most = settings.prompts * (1 + settings.redraws)
        exercises = [
            Exercise(
                self._mix.draw("train", settings.seed, step * most + number),
                rollout_seed(settings.seed, step, number, member),
            )
            for number in range(first, first + count)
            for member in range(settings.group)
        ]
        done = self._rollouts.run(exercises)
        return [self._group(done[i : i + settings.group]) for i in range(0, len(done), settings.group)]

    def _group(self, rollouts: Sequence[Rollout]) -> list[Lesson]:
        rewards_G = np.array([self.shaped(one) for one in rollouts])
        advantages_G = group_advantages(rewards_G, normalize=self._settings.advantage == "normalized")
        if self._settings.drop_truncated:
            advantages_G = np.where([one.transcript.is_truncated for one in rollouts], 0.0, advantages_G)
        return [
            Lesson(one, np.full(one.num_sampled, advantage, np.float32))
            for one, advantage in zip(rollouts, advantages_G, strict=True)
        ]


def _divided(groups: Sequence[list[Lesson]], num_parts: int) -> list[list[Lesson]]:
    """Whole groups, dealt out to parts in turn."""
    return [[lesson for group in groups[part::num_parts] for lesson in group] for part in range(num_parts)]


def held_out(
    settings: RolloutSettings, mix: TaskMix, actor: Actor, rollouts: Rollouts
) -> Callable[[], Mapping[str, float]]:
    """Means over held-out prompts, the same ones each time; ``loss`` is the reward that is missing to 1."""

    def evaluate() -> Mapping[str, float]:
        actor.update()
        draws = [mix.draw("held_out", settings.seed, number) for number in range(settings.eval_prompts)]
        done = rollouts.run(
            [Exercise(draw, rollout_seed(settings.seed, _EVALUATION, number)) for number, draw in enumerate(draws)]
        )
        numbers = describe(done)
        return {"loss": 1 - numbers["reward"], **numbers}

    return evaluate
