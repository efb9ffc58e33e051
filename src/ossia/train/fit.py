"""What the methods have in common that learn from files: model, data, trainer, run, result.

read the settings and the data's first epoch       what is wrong with them is told before anything is loaded
open the model, print what is trained
train, evaluate, save                              `run.py`
write the result, and try it                       `result.py`
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ossia.errors import ConfigError, NotFoundError, UnavailableError
from ossia.harmony import Tokenizer
from ossia.model.hub import resolve_model
from ossia.model.inspection import inspect_checkpoint
from ossia.model.weights import Checkpoint
from ossia.train.checkpoint import Checkpoints
from ossia.train.config import DataSettings, TrainConfig
from ossia.train.data import DataConfig, ReadReport, TrainBatch, to_batch
from ossia.train.lora import LoraConfig
from ossia.train.losses import balance_sum
from ossia.train.module import Model
from ossia.train.optimizers import Optimizer, WeightMean
from ossia.train.parallel import Team, extents
from ossia.train.run import Outcome, Run, RunFolder, Say, available_bytes, kept_weights, load_parameters
from ossia.train.schedule import Schedule
from ossia.train.stream import PackStream
from ossia.train.trainer import B, Objective, Terms, Trainer, memory_errors, to_device

Kind = Literal["samples", "pairs"]
# A trained number, its gradient, and AdamW's two memories, in float32.
_BYTES_PER_NUMBER = 16
_CHECKPOINT_BYTES_PER_NUMBER = 12
# A float32 beside each of them.
_MEAN_BYTES = 4


class Fitted(NamedTuple):
    """A run that has ended, with what its result is made of."""

    outcome: Outcome
    model: Model
    tokenizer: Tokenizer
    kind: Kind
    held_out: list[TrainBatch]
    team: Team


def fit(
    settings: DataSettings,
    kind: Kind,
    objective: Callable[[Model, Team], Objective[TrainBatch]],
    team: Team,
    *,
    resume: bool,
    say: Say,
) -> Fitted:
    """Train as the settings say. ``objective`` is called with the model as the checkpoint has it.

    Raises the errors of the data, the model and the run, each saying what to do.
    """
    path = resolve_model(settings.model)
    tokenizer = Checkpoint.open(path).tokenizer()
    with ExitStack() as stack:
        inputs = {"model": fingerprint(path)}
        folder = stack.enter_context(RunFolder(settings, resume=resume, inputs=inputs, team=team))
        feed = stack.enter_context(closing(StepFeed(settings, kind, tokenizer)))
        if folder.resumed is not None:
            num_steps = int(folder.resumed["num_steps"])
        else:
            num_steps = settings.steps or team.first(lambda: count_steps(settings, kind, tokenizer, say))
        held_out = held_out_passes(settings, kind, tokenizer)
        if settings.step_tokens < (team.size - 1) * settings.tokens_of_pass:
            say(
                f"a step of {settings.step_tokens} tokens may have fewer passes than the {team.size} processes, "
                "some of which then compute for nothing: raise step_tokens"
            )
        model = open_model(settings, path, team)
        table(model, say)
        has_mean = settings.weight_mean is not None
        needed_bytes = num_trained(model) * (_CHECKPOINT_BYTES_PER_NUMBER + _MEAN_BYTES * has_mean)
        folder.check_space(needed_bytes * (settings.keep + 2))
        _check_memory(num_trained(model) * (_BYTES_PER_NUMBER - 4 + _MEAN_BYTES * has_mean), team, settings)
        team.shard(model)
        aim = objective(model, team)
        trainer = make_trainer(settings, model, aim, num_steps, team)
        run = Run(
            folder,
            trainer,
            feed,
            num_steps=num_steps,
            parameters=model.state(),
            evaluate=(lambda: evaluate(model, aim, held_out, team)) if held_out else None,
            say=say,
            held=extents(model),
        )
        model.train()
        outcome = run.train()
        if settings.steps:
            tell_passed_by(feed.report, say)
        if outcome.reason == "early":
            run.load_best()
    return Fitted(outcome, model, tokenizer, kind, held_out, team)


# The machine and the model --------------------------------------------------------------------------------------------


def set_up_whole(settings: TrainConfig) -> Team:
    """As `set_up_team`, for a method that needs the whole model in every process, since the policy that is trained
    samples too. Raises ConfigError where several processes would divide it.
    """
    if torch.distributed.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1 and not settings.replicate:
        raise ConfigError(
            "replicate is off; expected it on for several processes: each samples with the whole model, and trains on "
            "a part of what all have sampled"
        )
    return set_up_team(settings)


def set_up_team(settings: TrainConfig) -> Team:
    """Threads, seed and device, and the processes that torchrun started; a team of one where it started none.

    Raises ConfigError for a device that torch does not find.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.distributed.is_torchelastic_launched() and name.startswith("cuda"):
        # A GPU for each process of a machine.
        name = f"cuda:{torch.distributed.get_node_local_rank()}"
    team = Team.join(_device(name), replicates=settings.replicate)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # Each has other passes, and dropout of its own.
    torch.manual_seed(settings.seed + team.rank)
    return team


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {name!r}, where nothing can be computed: {str(error).splitlines()[0]}. Expected "
            "cpu, or cuda where torch finds a GPU"
        ) from None
    return device


def open_model(settings: TrainConfig, path: Path, team: Team) -> Model:
    """The model with what is to be trained, not sharded yet. Raises UnavailableError where it cannot fit."""
    is_lora = settings.trainable == "lora"
    if not is_lora:
        _check_memory(inspect_checkpoint(path).parameters.total * _BYTES_PER_NUMBER, team, settings)
    with memory_errors():
        model = Model.open(
            path,
            device=team.device,
            dtype=_dtype(settings, team.device),
            trainable=settings.trainable,
            lora=lora_config(settings) if is_lora else None,
            checkpoint_activations=settings.recompute,
            fake_quant=settings.fake_quant,
            seed=settings.seed,
            exchange=team.exchange,
        )
    if settings.begin_with:
        begin_with(model, Path(settings.begin_with))
    return model


def begin_with(model: Model, folder: Path) -> None:
    """Put the last weights of the run in ``folder`` in place. Raises NotFoundError where it has no checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    steps = checkpoints.steps()
    if not steps:
        raise NotFoundError(f"{folder} has no checkpoint of a run to begin with")
    load_parameters(model.state(), kept_weights(checkpoints.load(steps[-1], extents(model))))


def lora_config(settings: TrainConfig) -> LoraConfig:
    """The pairs that the settings ask for."""
    return LoraConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        expert_rank=settings.expert_rank,
        dropout=settings.dropout,
    )


def make_optimizer(settings: TrainConfig, model: Model, team: Team | None = None) -> Optimizer:
    """The optimiser of all that is trained, by the processes of ``team``."""
    return Optimizer(
        model.state().items(),
        kind=settings.optimizer,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        epsilon=settings.epsilon,
        momentum=settings.momentum,
        team=team,
    )


def make_schedule(settings: TrainConfig, num_steps: int) -> Schedule:
    """The learning rate over the run."""
    return Schedule.of_shares(settings.schedule, num_steps, settings.warmup, settings.decay, settings.final_rate)


def make_trainer(
    settings: TrainConfig, model: Model, objective: Objective[B], num_steps: int, team: Team
) -> Trainer[B]:
    """What moves all that is trained, towards an objective."""
    return Trainer(
        objective,
        make_optimizer(settings, model, team),
        make_schedule(settings, num_steps),
        highest_rate=settings.highest_rate,
        clip=settings.clip,
        max_skipped=settings.max_skipped,
        team=team,
        mean=WeightMean(model.state(), settings.weight_mean) if settings.weight_mean is not None else None,
    )


def num_trained(model: Model) -> int:
    """Numbers that are trained, by all processes together."""
    return sum(row.num_numbers for row in model.trainable_table())


def table(model: Model, say: Say) -> None:
    """Say what is trained, a line for the tensors of all layers."""
    rows = model.trainable_table()
    width = max(len(row.pattern) for row in rows)
    say(f"{'trained':<{width}}  tensors       numbers   share of all")
    for row in rows:
        say(f"{row.pattern:<{width}}  {row.num_tensors:>7}  {row.num_numbers:>12,}   {row.share:.4%}")
    num_tensors, num_numbers = sum(row.num_tensors for row in rows), sum(row.num_numbers for row in rows)
    say(f"{'together':<{width}}  {num_tensors:>7}  {num_numbers:>12,}   {sum(row.share for row in rows):.4%}")


def fingerprint(path: Path) -> str:
    """A digest of a checkpoint: names and sizes of its files, and their first and last bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for file in Checkpoint.open(path).files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(1 << 20))
            opened.seek(max(0, size - (1 << 20)))
            digest.update(opened.read())
    return digest.hexdigest()


def _dtype(settings: TrainConfig, device: torch.device) -> torch.dtype:
    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if settings.precision == "bfloat16" else torch.float32


def _check_memory(all_bytes: int, team: Team, settings: TrainConfig) -> None:
    """Raise UnavailableError where parameters, gradients and the optimiser alone are more than there is."""
    device = team.device
    needed_bytes = all_bytes // (team.size if device.type == "cuda" else team.num_machines)
    free_bytes = available_bytes(device)
    if needed_bytes > free_bytes:
        remedy = (
            "lower rank or expert_rank, or name fewer targets"
            if settings.trainable == "lora"
            else "train with LoRA (trainable = lora), or on a machine with more"
        )
        raise UnavailableError(
            f"what is trained needs {needed_bytes / 2**30:.1f} GiB with its gradients and the optimiser's memory; "
            f"{device} has {free_bytes / 2**30:.1f} GiB free: {remedy}"
        )


# The data -------------------------------------------------------------------------------------------------------------


def data_config(settings: DataSettings) -> DataConfig:
    """The settings in the words of the reader."""
    return DataConfig(
        format=settings.format,
        train=settings.train,
        turns=settings.turns,
        effort=settings.effort,
        current_date=settings.current_date,
        max_tokens=settings.max_tokens,
        overlong=settings.overlong,
        skip_bad_rows=settings.skip_bad_rows,
        validation_share=settings.validation_share,
        buffer_rows=settings.buffer_rows,
        packing=settings.packing,
        seed=settings.seed,
    )


class StepFeed:
    """The passes of each step, in an order that the seed decides. A `ossia.train.run.Feed`."""

    def __init__(self, settings: DataSettings, kind: Kind, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._kind = kind
        self._tokenizer = tokenizer
        self._stream = self._open(None)

    def next_step(self) -> list[TrainBatch]:
        passes: list[TrainBatch] = []
        num_tokens = 0
        while not passes or num_tokens < self._settings.step_tokens:
            pack = next(self._stream, None)
            if pack is None:
                break
            passes.append(to_batch(pack))
            num_tokens += passes[-1].num_tokens
        return passes

    @property
    def position(self) -> Mapping[str, Any]:
        return self._stream.state()

    @property
    def report(self) -> ReadReport:
        """What was read so far, and what was passed by."""
        return self._stream.report

    def seek(self, position: Mapping[str, Any]) -> None:
        self._stream.close()
        self._stream = self._open(dict(position))

    def close(self) -> None:
        """Stop reading ahead."""
        self._stream.close()

    def _open(self, state: dict[str, Any] | None) -> PackStream:
        # With a number of steps, the data is gone through as often as they need.
        epochs = 0 if self._settings.steps else self._settings.epochs
        return open_stream(self._settings, self._kind, self._tokenizer, epochs=epochs, state=state)


def count_steps(settings: DataSettings, kind: Kind, tokenizer: Tokenizer, say: Say) -> int:
    """Steps of all epochs, told by the first one; reads every row, so that a bad one is told before the start.

    Efforts and dates are drawn for a row once, so that every epoch has the same samples; only how they are shuffled
    differs, and with it a pass here and there.
    """
    stream = open_stream(settings, kind, tokenizer, epochs=1)
    with closing(stream):
        lengths = [sum(map(len, pack)) for pack in stream]
    tell_passed_by(stream.report, say)
    num_steps, num_tokens = 0, 0
    for length in lengths * settings.epochs:
        num_tokens += length
        if num_tokens >= settings.step_tokens:
            num_steps, num_tokens = num_steps + 1, 0
    return num_steps + (num_tokens > 0)


def tell_passed_by(report: ReadReport, say: Say) -> None:
    """Say how many rows are held out, and how many rows, samples and fields left out, the first with their lines."""
    if report.held_back:
        say(f"held out: {report.held_back} of {report.rows} rows that were read")
    if report.bad_rows or report.too_long:
        say(f"passed by: {report.bad_rows} rows that cannot be used, {report.too_long} samples that are too long")
    if report.unread_fields:
        say(f"passed by: {report.unread_fields} fields that are not read; `ossia data inspect` names them all")
    for problem in report.problems[:3]:
        say(f"  {problem}")


def held_out_passes(settings: DataSettings, kind: Kind, tokenizer: Tokenizer) -> list[TrainBatch]:
    """Held-out rows as passes, of at most ``eval_tokens`` tokens together; nothing where no rows are held out."""
    if not settings.has_validation or not settings.eval_every:
        return []
    passes: list[TrainBatch] = []
    num_tokens = 0
    with closing(open_stream(settings, kind, tokenizer, epochs=1, is_held_out=True)) as stream:
        for pack in stream:
            one = to_batch(pack)
            num_tokens += one.num_tokens
            if passes and num_tokens > settings.eval_tokens:
                break
            passes.append(one)
    return passes


def sample_passes(settings: DataSettings, kind: Kind, tokenizer: Tokenizer) -> list[TrainBatch]:
    """The first pass of what is trained."""
    with closing(open_stream(settings, kind, tokenizer, epochs=1)) as stream:
        return [to_batch(next(stream))]


def open_stream(
    settings: DataSettings,
    kind: Kind,
    tokenizer: Tokenizer,
    *,
    epochs: int,
    is_held_out: bool = False,
    state: dict[str, Any] | None = None,
) -> PackStream:
    """What is trained, or what is held out, as packs. A pair is two samples, and may have twice the tokens."""
    paths = settings.validation if is_held_out and settings.validation else settings.data
    split: Literal["all", "train", "validation"] = "all"
    if settings.validation_share and not settings.validation:
        split = "validation" if is_held_out else "train"
    config = replace(data_config(settings), split=split, shuffle=not is_held_out)
    max_tokens = settings.tokens_of_pass * (2 if kind == "pairs" else 1)
    return PackStream(paths, config, tokenizer, max_tokens, kind=kind, epochs=epochs, state=state)


def reference_passes(settings: DataSettings) -> Iterator[TrainBatch]:
    """Every pair that a run will see, once: one epoch, then what is held out."""
    tokenizer = Checkpoint.open(resolve_model(settings.model)).tokenizer()
    with closing(open_stream(settings, "pairs", tokenizer, epochs=1)) as stream:
        for pack in stream:
            yield to_batch(pack)
    yield from held_out_passes(settings, "pairs", tokenizer)


# The objective --------------------------------------------------------------------------------------------------------


def evaluate(
    model: Model, objective: Objective[TrainBatch], passes: Sequence[TrainBatch], team: Team
) -> dict[str, float]:
    """The objective on held-out passes, without dropout: the loss, and what else it shows."""
    weight = sum(objective.weight(one) for one in passes)
    loss, sums = 0.0, dict[str, float]()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), memory_errors():
            for one, counts in team.share(passes):
                terms = objective.terms(to_device(one, team.device))
                loss += terms.loss_sum.item() * counts
                for name, value in terms.sums.items():
                    sums[name] = sums.get(name, 0.0) + value * counts
    finally:
        model.train(was_training)
    names = ("loss", *sums)
    return {name: value / weight for name, value in zip(names, team.sums([loss, *sums.values()]), strict=True)}


@contextmanager
def watched_router(model: Model, *, is_wanted: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Logits and choices of each layer's router, in the passes that are made meanwhile; nothing if not wanted."""
    seen: list[tuple[Tensor, Tensor]] = []
    before = model.ops.on_route
    model.ops.on_route = (lambda logits_TE, experts_TA: seen.append((logits_TE, experts_TA))) if is_wanted else None
    try:
        yield seen
    finally:
        model.ops.on_route = before


def with_balance(
    terms: Terms, seen: Sequence[tuple[Tensor, Tensor]], balance_weight: float, pass_weight: float
) -> Terms:
    """The terms of a pass, and the loss that spreads its tokens over the experts that ``seen`` tells of.

    ``balance`` is 1 where every layer uses its experts alike, more where not; it counts by ``pass_weight``.
    """
    per_layer = [balance_sum(logits_TE, experts_TA) / len(logits_TE) for logits_TE, experts_TA in seen]
    balance = torch.stack(per_layer).mean()
    sums = {**terms.sums, "balance": balance.item() * pass_weight}
    return Terms(terms.loss_sum, sums, balance_weight * balance * pass_weight)
