"""Training on tasks: every step sees new exercises, made as it goes, so that nothing is read from files or seen twice.

    copying and recall     plain texts, every token of which is learned        (share `language`)
    parts of exercises     plain texts, of which the answers are learned       (share `facts`)
    gold transcripts       of the tasks, whole ("all") or the model's own words alone ("answers")

Beside what is written there, what a teacher thinks likely can be learned (`ossia.train.taught`). Where nearly all is
known already, steps can be made of what is not: many more samples are drawn than are trained on, and those with the
lowest loss are left out (selective backpropagation, arXiv:1910.00762).

It begins from any checkpoint: random weights of a new shape, or an earlier stage. What step k draws follows from the
seed and k alone, and what it keeps of that from the weights, so that a run that was killed goes on as if nothing had
been.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ossia.errors import ConfigError, TrainingError
from ossia.harmony import (
    Channel,
    Conversation,
    Effort,
    Message,
    Role,
    SystemContent,
    Tokenizer,
    ToolNamespace,
    render_for_training,
)
from ossia.model.hub import resolve_model
from ossia.model.weights import Checkpoint
from ossia.train.config import TrainConfig, setting
from ossia.train.data import Sample, TrainBatch, to_batch
from ossia.train.expansion import TrainRules, expand
from ossia.train.fit import evaluate, fingerprint, make_trainer, open_model, set_up_team, table
from ossia.train.formats import Dialogue
from ossia.train.losses import sum_by_sequence
from ossia.train.module import Model
from ossia.train.packing import pack, pack_evenly
from ossia.train.parallel import Team, extents
from ossia.train.result import tell_nothing, write_result
from ossia.train.rollout_config import by_effort
from ossia.train.run import Outcome, Run, RunFolder, Say
from ossia.train.sft import Likelihood
from ossia.train.tasks import (
    Draw,
    Split,
    TaskMix,
    browsing,
    draw_instance,
    functions,
    gold_conversation_of_turns,
    hierarchy,
    make_mix,
    policies,
    problems,
    structured,
    sums,
)
from ossia.train.tasks.language import draw_copy, draw_recall
from ossia.train.taught import TaughtLikelihood
from ossia.train.teachings import check_vocabulary
from ossia.train.trainer import memory_errors, to_device

_HELD_OUT_SEED = 1_000_003
# Share of conversations whose earlier turns are shown as inference shows them.
_FORGETFUL_SHARE = 0.25
_NEW_WEIGHT = 0.1
_LONGEST_RUN = 9
_NUM_FACTS = 6
_SPECIAL = re.compile(r"(<\|\w+\|>)")
# The tasks that have parts, and how often each is drawn where all are trained.
_FACTS = {
    "browsing": (browsing.draw_facts, 13),
    "functions": (functions.draw_facts, 15),
    "hierarchy": (hierarchy.draw_facts, 5),
    "policies": (policies.draw_facts, 6),
    "python": (problems.draw_facts, 8),
    "structured": (structured.draw_facts, 14),
    "sums": (sums.draw_facts, 13),
}
# Tasks for which no developer says anything, and that need no tool but python: any of them may follow another.
_FREE = ("about", "python", "sums")
_USUAL_TOKENS = 64
# Passes without gradients take little memory.
_READ_AT_ONCE = 4
# The browser's description is long.
_PYTHON, _BROWSER = ToolNamespace.python(), ToolNamespace.browser()
_IDLE_TOOLS = ((_PYTHON,), (_PYTHON,), (_PYTHON, _BROWSER))


@dataclass(frozen=True, slots=True)
class PretrainConfig(TrainConfig):
    """Training on generated tasks."""

    tasks: tuple[str, ...] = setting((), "Tasks by name, each with =WEIGHT where it is not 1.", is_required=True)
    efforts: str = setting("", "How often each effort is asked for, such as low=1,high=2; empty is up to the tasks.")
    learn: Literal["all", "answers"] = setting("answers", "Every token of a transcript, or the model's own alone.")
    turns: int = setting(1, "Most exercises of one conversation, where a task has more than one for it.", low=1)
    mixed: float = setting(
        0.0,
        "Share of conversations about itself, sums and python in which any of these follow each other.",
        low=0,
        high=1,
    )
    pondering: tuple[str, ...] = setting(
        (),
        "Tasks that at low effort think as at medium effort, each with =SHARE of its conversations where it is not "
        "all: what reinforcement may find to pay, or has found.",
    )
    idle_tools: float = setting(
        0.0, "Share of conversations with python or the browser beside what they need.", low=0, high=1
    )
    language: float = setting(0.0, "Share of samples that are copying and recall, as plain texts.", low=0, high=1)
    facts: float = setting(
        0.0,
        "Share of samples that are parts of the tasks' exercises, as plain texts: steps of sums, facts of a text.",
        low=0,
        high=1,
    )
    brief: float = setting(
        0.0,
        "Share of conversations whose system message tells the effort alone: more of a step's tokens are learned.",
        low=0,
        high=1,
    )
    evenness: float = setting(
        0.0,
        "How far samples count alike, however long their answers are: 0 each token, 1 each sample.",
        low=0,
        high=1,
    )
    teacher: str = setting(
        "", "A checkpoint with the model's vocabulary, whose probabilities at every learned token are learned too."
    )
    teacher_share: float = setting(0.5, "Share of the loss that is the teacher's.", low=0, high=1)
    hardest: float = setting(
        1.0,
        "Share of the drawn tokens that a step trains on: those of the samples with the highest losses.",
        low=0.01,
        high=1,
    )
    growth: int = setting(
        0, "Copying alone, of runs that grow by a word each so many samples; 0 for all lengths, and recall.", low=0
    )
    pass_tokens: int = setting(2048, "Tokens that go through the model at once.", low=64)
    max_tokens: int = setting(2048, "Longer transcripts are left out.", low=64)
    held_out: int = setting(200, "Held-out instances whose loss an evaluation tells.", low=0)

    def check(self) -> None:
        TrainConfig.check(self)
        if not self.steps:
            raise ConfigError("steps is not set; exercises never end, so say how many steps to train")
        if self.facts + self.language > 1:
            raise ConfigError(f"facts is {self.facts} and language {self.language}; expected 1 at most together")
        if self.facts and not any(one.partition("=")[0] in _FACTS for one in self.tasks):
            raise ConfigError(
                f"facts is {self.facts}, and none of the tasks has parts to practise; expected one of "
                f"{', '.join(_FACTS)} among the tasks, or facts = 0"
            )
        if self.patience and not self.held_out:
            raise ConfigError(f"patience is {self.patience} and held_out 0: expected held-out instances to judge by")
        if self.max_tokens > self.pass_tokens:
            raise ConfigError(f"max_tokens is {self.max_tokens} and pass_tokens {self.pass_tokens}: samples must fit")
        by_effort("efforts", self.efforts)
        _pondering_shares(self)


def pretrain(settings: PretrainConfig, *, resume: bool = False, say: Say) -> tuple[Outcome, Model]:
    """Train; checkpoints and metrics go into ``settings.out``. Raises OssiaError, saying what to do."""
    with set_up_team(settings) as team:
        told = say if team.rank == 0 else tell_nothing
        path = resolve_model(settings.model)
        tokenizer = Checkpoint.open(path).tokenizer()
        mix = make_mix(list(settings.tasks), efforts=by_effort("efforts", settings.efforts) or None)
        inputs = {"model": fingerprint(path)}
        teacher = resolve_model(settings.teacher) if settings.teacher else None
        if teacher is not None:
            if team.size > 1 and not settings.replicate:
                raise ConfigError("a teacher is for models that every process has whole; expected replicate = true")
            check_vocabulary(settings.teacher, Checkpoint.open(teacher).tokenizer(), tokenizer)
            inputs["teacher"] = fingerprint(teacher)
        with RunFolder(settings, resume=resume, inputs=inputs, team=team) as folder:
            model = open_model(settings, path, team)
            table(model, told)
            team.shard(model)
            measured = Likelihood(model, settings.balance_weight)
            objective = measured if teacher is None else _taught(settings, model, teacher, team)
            held_out = _held_out(settings, mix, tokenizer)
            trainer = make_trainer(settings, model, objective, settings.steps, team)
            run = Run(
                folder,
                trainer,
                TaskFeed(settings, mix, tokenizer, lambda samples: _losses(settings, model, samples, team)),
                num_steps=settings.steps,
                parameters=model.state(),
                evaluate=(lambda: evaluate(model, measured, held_out, team)) if held_out else None,
                say=told,
                held=extents(model),
            )
            model.train()
            outcome = run.train()
            if outcome.reason == "early":
                run.load_best()
            if not outcome.is_interrupted:
                write_result(model, settings, told, team)
    return outcome, model


def _taught(settings: PretrainConfig, model: Model, teacher: Path, team: Team) -> TaughtLikelihood:
    """The objective with a teacher, which every process has whole."""
    with memory_errors():
        larger = Model.open(teacher, device=team.device, trainable="full", checkpoint_activations=False)
    larger.eval()
    return TaughtLikelihood(model, larger, settings.teacher_share, settings.balance_weight)


def _losses(settings: PretrainConfig, model: Model, samples: Sequence[Sample], team: Team) -> list[float]:
    """The loss of each sample, its tokens' together; the processes of ``team`` share the work."""
    losses = {id(one): 0.0 for one in samples}
    packs = pack_evenly(samples, _READ_AT_ONCE * settings.pass_tokens, team.size)
    was_training = model.training
    model.eval()
    with torch.no_grad(), memory_errors():
        for packed, counts in team.share(packs):
            batch = to_device(to_batch(packed), team.device)
            losses_R = -model.logprobs(batch.batch, batch.targets_R).float() * batch.weights_R
            found = sum_by_sequence(losses_R, batch.samples_R, len(packed)).tolist()
            if counts:
                losses |= {id(one): loss for one, loss in zip(packed, found, strict=True)}
    model.train(was_training)
    return team.sums(list(losses.values()))


class TaskFeed:
    """Passes of a run on tasks, a `Feed`: each step takes the next draws until it has its tokens, or more of them of
    which it keeps the hardest.
    """

    def __init__(
        self,
        settings: PretrainConfig,
        mix: TaskMix,
        tokenizer: Tokenizer,
        losses: Callable[[Sequence[Sample]], Sequence[float]] | None = None,
    ) -> None:
        """``losses`` tells how hard samples are, where ``settings.hardest`` is less than 1."""
        self._settings, self._mix, self._tokenizer = settings, mix, tokenizer
        self._losses = losses
        self._next_draw = 0

    def next_step(self) -> list[TrainBatch]:
        wanted = self._settings.step_tokens or self._settings.pass_tokens
        if self._settings.hardest == 1:
            chosen = self._draw(wanted)
        else:
            assert self._losses is not None
            samples = self._draw(round(wanted / self._settings.hardest))
            losses = self._losses(samples)
            chosen = []
            for i in sorted(range(len(samples)), key=lambda i: -losses[i]):
                if chosen and sum(map(len, chosen)) + len(samples[i]) > wanted:
                    break
                chosen.append(samples[i])
        return [to_batch(one) for one in pack_evenly(chosen, self._settings.pass_tokens)]

    def _draw(self, wanted: int) -> list[Sample]:
        """The next draws of at most ``wanted`` tokens together, one at least."""
        samples: list[Sample] = []
        num_tokens = num_left_out = 0
        while True:
            sample = draw_sample(self._settings, self._mix, self._tokenizer, "train", self._next_draw)
            if sample is not None and num_tokens + len(sample) > wanted and samples:
                break
            self._next_draw += 1
            if sample is not None:
                samples.append(sample)
                num_tokens += len(sample)
            else:
                num_left_out += 1
                if num_left_out > 1000:
                    raise TrainingError(f"1000 transcripts in a row are longer than {self._settings.max_tokens} tokens")
        return samples

    @property
    def position(self) -> Mapping[str, Any]:
        return {"next_draw": self._next_draw}

    def seek(self, position: Mapping[str, Any]) -> None:
        self._next_draw = int(position["next_draw"])


def draw_sample(
    settings: PretrainConfig, mix: TaskMix, tokenizer: Tokenizer, split: Split, number: int
) -> Sample | None:
    """Draw ``number`` as tokens; None for one of more than ``settings.max_tokens``."""
    rng = random.Random(f"language {settings.seed} {number}")
    kind = rng.random()
    # Parts have no held-out side.
    if kind < settings.facts and split == "train":
        parts = _facts(rng, mix, tokenizer, settings.max_tokens)
        return parts and _evened(parts, settings.evenness)
    if settings.facts <= kind < settings.facts + settings.language:
        text = _text(settings, rng, split, number)
        ids = [tokenizer.special("<|startoftext|>"), *tokenizer.encode(text), tokenizer.special("<|endoftext|>")]
        token_ids_L = np.array(ids, np.int32)
        sample = Sample(token_ids_L, _repeated(token_ids_L))
        return sample if len(sample) <= settings.max_tokens else None
    draw = mix.draw(split, settings.seed, number)
    num_turns = rng.randint(1, settings.turns)
    beside = rng.choice(_IDLE_TOOLS) if rng.random() < settings.idle_tools else ()
    keeps_thoughts = rng.random() >= _FORGETFUL_SHARE
    is_brief = rng.random() < settings.brief
    free = {task: weight for task, weight in mix.tasks.items() if task.name in _FREE}
    is_mixed = draw.task in free and rng.random() < settings.mixed
    effort = draw.effort
    ponders = _pondering_shares(settings).get(draw.task.name, 0.0) if effort is Effort.LOW else 0.0
    if ponders and rng.random() < ponders:
        draw = draw._replace(effort=Effort.MEDIUM)
    while num_turns:
        if is_mixed:
            tasks = rng.choices(list(free), list(free.values()), k=num_turns - 1)
            others = [Draw(task, draw_instance(task, split, rng), draw.effort) for task in tasks]
            gold = gold_conversation_of_turns(draw, 1, rng, beside or (_PYTHON,), others)
        else:
            gold = gold_conversation_of_turns(draw, num_turns, rng, beside)
        if is_brief:
            gold = Conversation((_brief(effort), *gold.messages[1:]))
        elif effort is not draw.effort:
            gold = Conversation((_told(gold.messages[0], effort), *gold.messages[1:]))
        sample = _conversation_sample(settings, gold, tokenizer, keeps_thoughts)
        if len(sample) <= settings.max_tokens:
            return _evened(sample, settings.evenness)
        num_turns //= 2
    return None


def _pondering_shares(settings: PretrainConfig) -> dict[str, float]:
    """How often each task thinks at low effort. Raises ConfigError."""
    names = {one.partition("=")[0] for one in settings.tasks}
    shares = {}
    for one in settings.pondering:
        name, equals, share = one.partition("=")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError:
            shares[name] = -1.0
        if name not in names or not 0 <= shares[name] <= 1:
            raise ConfigError(
                f"pondering holds {one!r}; expected one of the tasks ({', '.join(sorted(names))}), with =SHARE from 0 "
                "to 1 where it is not always",
                param="pondering",
            )
    return shares


def _brief(effort: Effort) -> Message:
    return Message(Role.SYSTEM, SystemContent(model_identity=None, knowledge_cutoff=None, effort=effort, channels=()))


def _told(system: Message, effort: Effort) -> Message:
    """A system message with another effort."""
    (content,) = system.content
    assert isinstance(content, SystemContent)
    return replace(system, content=(replace(content, effort=effort),))


def _evened(sample: Sample, evenness: float) -> Sample:
    """Short answers weigh more by the token, long ones less; those of `_USUAL_TOKENS` as before."""
    total = float(sample.weights_L.sum())
    if not evenness or not total:
        return sample
    return replace(sample, weights_L=sample.weights_L * np.float32((_USUAL_TOKENS / total) ** evenness))


def _facts(rng: random.Random, mix: TaskMix, tokenizer: Tokenizer, most: int) -> Sample | None:
    """Parts of exercises of one of the tasks, one below the other, as many as ``most`` tokens hold; the answers are
    learned. None where not even one fits.
    """
    parts = [(tokenizer.special("<|startoftext|>"), 0.0)]
    draws, weights = zip(*(_FACTS[task.name] for task in mix.tasks if task.name in _FACTS), strict=True)
    (draw,) = rng.choices(draws, weights)
    for number in range(_NUM_FACTS):
        part: list[tuple[int, float]] = []
        for text, is_answer in (*draw(rng), ("\n", False)):
            for piece in _SPECIAL.split(text):
                ids = [tokenizer.special(piece)] if _SPECIAL.fullmatch(piece) else tokenizer.encode(piece)
                part += [(one, float(is_answer)) for one in ids]
        if len(parts) + len(part) > most:
            if not number:
                return None
            break
        parts += part
    token_ids, learned = zip(*parts, strict=True)
    return Sample(np.array(token_ids, np.int32), np.array(learned, np.float32))


def _text(settings: PretrainConfig, rng: random.Random, split: Split, number: int) -> str:
    is_held_out = split == "held_out"
    if settings.growth:
        return draw_copy(rng, is_held_out, min(_LONGEST_RUN, 1 + number // settings.growth))
    return draw_copy(rng, is_held_out, _LONGEST_RUN) if rng.random() < 0.5 else draw_recall(rng, is_held_out)


def _conversation_sample(
    settings: PretrainConfig, conversation: Conversation, tokenizer: Tokenizer, keeps_thoughts: bool
) -> Sample:
    """All turns with all their thoughts; or the last turn alone, behind earlier ones without thoughts as inference
    shows them.
    """
    if keeps_thoughts:
        rendered = render_for_training(conversation, tokenizer, drop_analysis="never")
        token_ids_L, spans = np.array(rendered.token_ids, np.int32), tuple(rendered.spans)
        weights_L = np.array(rendered.sampled_mask(), np.float32)
    else:
        dialogue = Dialogue(conversation.messages, (1.0,) * len(conversation.messages), None)
        (expanded,) = expand(dialogue, tokenizer, TrainRules("all"), turns="last")
        token_ids_L, weights_L, spans = expanded.token_ids_L, expanded.weights_L, expanded.spans
    if settings.learn == "all":
        # History spells <|return|> as <|end|>, which nobody is to learn.
        is_respelled_L = np.zeros(len(weights_L), np.bool_)
        for span in spans:
            if span.channel == Channel.FINAL and not span.sampled and span.end - span.start == 1:
                is_respelled_L[span.start] = True
        weights_L = np.where(is_respelled_L, 0, np.maximum(weights_L, _repeated(token_ids_L))).astype(np.float32)
    return Sample(token_ids_L, weights_L, spans=spans)


def _repeated(token_ids_L: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Weights of tokens that are all learned: 1 where a token follows another as it did before, else little.

    The first time an invented name stands somewhere, nobody could have known it.
    """
    weights_L = np.full(len(token_ids_L), _NEW_WEIGHT, np.float32)
    weights_L[0] = 0
    seen: set[tuple[int, int]] = set()
    for i, pair in enumerate(pairwise(token_ids_L.tolist()), start=1):
        if pair in seen:
            weights_L[i] = 1
        seen.add(pair)
    return weights_L


def _held_out(settings: PretrainConfig, mix: TaskMix, tokenizer: Tokenizer) -> list[TrainBatch]:
    def samples() -> Iterator[Sample]:
        for number in range(settings.held_out):
            sample = draw_sample(settings, mix, tokenizer, "held_out", _HELD_OUT_SEED + number)
            if sample is not None:
                yield sample

    return [to_batch(one) for one in pack(list(samples()), settings.pass_tokens)]
