"""A run from its folder to its end: steps, evaluations, checkpoints, a stop in good order, and the way back in.

    OUT/
        settings.json       every setting, as resolved
        metrics.jsonl       a line for each step and evaluation
        checkpoints/        the newest ones, and the best
        adapter/            of LoRA: the result, as PEFT's folder

A run that was killed at any moment and is resumed writes the same loss curve, bit for bit, as one that was not: a
checkpoint holds the parameters, the optimiser, the random states and the position in the data, and the log takes back
the lines of steps that are done again.

Several processes go through a run together: what one decides, all decide. The first alone locks the folder and writes
the log; of a checkpoint each writes what it holds.
"""

from __future__ import annotations

import fcntl
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Generic, Literal, Protocol, Self

import torch
from torch import Tensor

from ossia.errors import ConfigError, InputError
from ossia.model import memory
from ossia.train.checkpoint import Checkpoints, Snapshot, open_run_folder
from ossia.train.config import TrainConfig, as_dict, changed_settings
from ossia.train.metrics import Metrics, NoMetrics, Progress, open_sinks
from ossia.train.optimizers import MEAN
from ossia.train.parallel import Team
from ossia.train.shards import Extent, local
from ossia.train.trainer import B, StepReport, Trainer, random_state, set_random_state

Say = Callable[[str], None]
"""Takes a line for the user."""

Evaluate = Callable[[], Mapping[str, float]]
"""Numbers on held-out data; "loss" is the one that decides which checkpoint is the best."""


class Feed(Protocol[B]):
    """Passes of a run, step by step."""

    def next_step(self) -> list[B]:
        """The passes of the next step; nothing when the data is at its end."""

    @property
    def position(self) -> Mapping[str, Any]:
        """What `seek` goes on from, as JSON values: the place behind the last step that was handed out."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go on from a position."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    loss: float | None
    reason: Literal["done", "early", "interrupted"]
    best_step: int | None = None

    @property
    def is_interrupted(self) -> bool:
        return self.reason == "interrupted"


class RunFolder:
    """The folder of a run, held by one process at a time; for all of ``team`` by the first of them."""

    def __init__(
        self, settings: TrainConfig, *, resume: bool, inputs: Mapping[str, str], team: Team | None = None
    ) -> None:
        """Open or begin. ``inputs`` name the model and the data by their content, so that a change is seen.

        Raises InputError for a folder that has a run which is not to be resumed, or that another process is using,
        ConfigError naming each setting that differs from those of the run that is resumed.
        """
        self.path = Path(settings.out)
        self.settings = settings
        self.inputs = dict(inputs)
        self.team = team or Team()
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep=settings.keep, team=self.team)
        self._lock: IO[bytes] | None = None
        self.resumed: Mapping[str, Any] | None = self.team.first(lambda: self._open(resume=resume))

    def _open(self, *, resume: bool) -> Mapping[str, Any] | None:
        """The state of the checkpoint to go on from, if any."""
        steps = self.checkpoints.steps()
        if steps and not resume:
            raise InputError(
                f"{self.path} has a run that got to step {steps[-1]}. Go on with it with --resume, or give another "
                "folder as out"
            )
        open_run_folder(self.path, needed_bytes=0)
        self._lock = self._locked()
        resumed = self.checkpoints.state(steps[-1]) if steps else None
        if resumed is not None:
            self._check_same(resumed)
        text = json.dumps(as_dict(self.settings), indent=1) + "\n"
        (self.path / "settings.json").write_text(text, encoding="utf-8")
        return resumed

    def check_space(self, needed_bytes: int) -> None:
        """Raise UnavailableError unless this much can still be written."""
        self.team.first(lambda: open_run_folder(self.path, needed_bytes=needed_bytes))

    def close(self) -> None:
        """Let another process have it."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locked(self) -> IO[bytes]:
        file = open(self.path / ".lock", "wb")  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InputError(f"{self.path}: another process is training into this folder; give another one") from None
        return file

    def _check_same(self, state: Mapping[str, Any]) -> None:
        changes = changed_settings(state["settings"], self.settings)
        changes += [
            f"{name} holds something else now"
            for name, content in state["inputs"].items()
            if self.inputs.get(name) != content
        ]
        _refuse(self.path, changes)


def check_resumed(settings: TrainConfig) -> None:
    """Raise ConfigError where the run in the settings' folder, if any, had others; before what would be lost then."""
    checkpoints = Checkpoints(Path(settings.out) / "checkpoints", keep=settings.keep)
    if steps := checkpoints.steps():
        _refuse(Path(settings.out), changed_settings(checkpoints.state(steps[-1])["settings"], settings))


def _refuse(path: Path, changes: Sequence[str]) -> None:
    if changes:
        raise ConfigError(
            f"the run in {path} cannot go on with changed settings: {'; '.join(changes)}. Change them back, or give "
            "another folder as out"
        )


class Run(Generic[B]):
    """Steps until the end, with what goes on beside them."""

    def __init__(
        self,
        folder: RunFolder,
        trainer: Trainer[B],
        feed: Feed[B],
        *,
        num_steps: int,
        parameters: Mapping[str, Tensor],
        evaluate: Evaluate | None,
        say: Say,
        held: Mapping[str, Extent] | None = None,
    ) -> None:
        """``held`` tells which rows of the parameters this process has; None: all."""
        self.folder = folder
        self.team = folder.team
        self.settings = folder.settings
        self.trainer = trainer
        self.feed = feed
        self.num_steps = num_steps
        self.parameters = parameters
        self.held = held
        self.evaluate = evaluate
        self.say = say
        self.num_tokens = 0
        self.best: tuple[float, int] | None = None
        self.num_worse = 0
        self.loss: float | None = None
        self._evaluated_step = self._saved_step = -1
        if folder.resumed is not None:
            self._restore(folder.checkpoints.load(folder.resumed["step"], held))

    def train(self) -> Outcome:
        """Go on to the last step, an early end, or an interruption; the last step is saved in each case.

        The parameters are then what is to be kept: those of the last step, or their mean over the steps.

        Raises TrainingError, UnavailableError; the checkpoints before are whole then.
        """
        with ExitStack() as stack:
            interrupts = stack.enter_context(Interrupts(self.say))
            metrics = self._open_metrics()
            stack.callback(metrics.close)
            is_shown = None if self.team.rank == 0 else False
            progress = stack.enter_context(Progress(self.num_steps, self.trainer.num_steps_done, is_shown=is_shown))
            reason = self._loop(metrics, progress, interrupts)
        if self.trainer.mean is not None and self.trainer.num_steps_done and reason != "interrupted":
            self.trainer.mean.exchange()
        step = self.trainer.num_steps_done
        return Outcome(self.folder.path, step, self.loss, reason, self.best[1] if self.best else None)

    @property
    def _has_lost_patience(self) -> bool:
        return bool(self.settings.patience) and self.num_worse >= self.settings.patience

    def load_best(self) -> None:
        """Put the parameters of the best checkpoint in place, if any evaluation was finite."""
        if self.best is None:
            return
        snapshot = self.folder.checkpoints.load(self.best[1], self.held)
        load_parameters(self.parameters, kept_weights(snapshot))

    def _open_metrics(self) -> Metrics | NoMetrics:
        if self.team.rank:
            return NoMetrics()
        path, settings = self.folder.path, self.settings
        sinks = open_sinks(path, path.name, tensorboard=settings.tensorboard, wandb=settings.wandb)
        return Metrics(
            path / "metrics.jsonl",
            last_step=self.trainer.num_steps_done,
            last_evaluation=self._evaluated_step,
            sinks=sinks,
        )

    def _loop(
        self, metrics: Metrics | NoMetrics, progress: Progress, interrupts: Interrupts
    ) -> Literal["done", "early", "interrupted"]:
        if self.trainer.num_steps_done == 0 and self.evaluate is not None:
            # What the model can do before: the curve's first point.
            self._evaluate(metrics, progress)
        if self._has_lost_patience:
            # A run that had ended early is resumed: it has.
            return "early"
        # Epochs end with the data, whatever was counted beforehand.
        while not self.settings.steps or self.trainer.num_steps_done < self.num_steps:
            began_s = time.perf_counter()
            passes = self.feed.next_step()
            if not passes:
                break
            report = self.trainer.step(passes)
            tokens_per_s = report.num_tokens / (time.perf_counter() - began_s)
            self.loss = report.loss
            self.num_tokens += report.num_tokens
            metrics.write("step", report.step, _line(report, self.num_tokens, tokens_per_s))
            progress.advance(
                report.step, loss=report.loss, tokens_per_s=tokens_per_s, learning_rate=report.learning_rate
            )
            if report.is_skipped:
                self.say(
                    f"step {report.step} was skipped: loss {report.loss}, norm of the gradient {report.gradient_norm}"
                )
            if reason := self._after_step(metrics, progress, interrupts):
                return reason
        return self._finish(metrics, progress)

    def _after_step(
        self, metrics: Metrics | NoMetrics, progress: Progress, interrupts: Interrupts
    ) -> Literal["early", "interrupted"] | None:
        step = self.trainer.num_steps_done
        is_better = False
        if self.evaluate is not None and self.settings.eval_every and step % self.settings.eval_every == 0:
            is_better = self._evaluate(metrics, progress)
        is_early = self._has_lost_patience
        is_due = bool(self.settings.save_every) and step % self.settings.save_every == 0
        # A signal reaches one process sooner than another.
        is_interrupted = any(self.team.sums([interrupts.is_wanted]))
        if is_due or is_better or is_early or is_interrupted:
            self._save(metrics, progress)
        if is_interrupted:
            self.say(f"stopped after step {step} of {self.num_steps}; the same command with --resume goes on")
            return "interrupted"
        return self._end_early() if is_early else None

    def _finish(self, metrics: Metrics | NoMetrics, progress: Progress) -> Literal["done", "early"]:
        step = self.trainer.num_steps_done
        is_unmeasured = self.evaluate is not None and self._evaluated_step != step
        if is_unmeasured:
            self._evaluate(metrics, progress)
        # A checkpoint of this step, if there is one, does not know of the evaluation.
        if is_unmeasured or self._saved_step != step:
            self._save(metrics, progress)
        return self._end_early() if self._has_lost_patience else "done"

    def _end_early(self) -> Literal["early"]:
        than = f"than that of step {self.best[1]}" if self.best else "that is finite"
        self.say(f"ended early at step {self.trainer.num_steps_done}: no better held-out loss {than}")
        return "early"

    def _evaluate(self, metrics: Metrics | NoMetrics, progress: Progress) -> bool:
        """Whether the held-out loss is the lowest so far, of any step but the first state."""
        assert self.evaluate is not None
        progress.describe("evaluating")
        mean = self.trainer.mean
        with mean.in_place() if mean is not None and self.trainer.num_steps_done else nullcontext():
            numbers = self.evaluate()
        progress.describe("training")
        step = self._evaluated_step = self.trainer.num_steps_done
        metrics.write("evaluation", step, numbers)
        self.say(f"step {step}: held-out " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        if step == 0:
            return False
        is_better = math.isfinite(numbers["loss"]) and (self.best is None or numbers["loss"] < self.best[0])
        self.num_worse = 0 if is_better else self.num_worse + 1
        if is_better:
            self.best = (numbers["loss"], step)
        return is_better

    def _save(self, metrics: Metrics | NoMetrics, progress: Progress) -> None:
        progress.describe("saving")
        metrics.sync()
        trainer = self.trainer
        state = {
            "step": trainer.num_steps_done,
            "settings": as_dict(self.settings),
            "inputs": self.folder.inputs,
            "position": self.feed.position,
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "num_skipped": trainer.num_skipped,
            "loss": self.loss,
            "best": self.best,
            "num_worse": self.num_worse,
            "evaluated_step": self._evaluated_step,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processes": self.team.size,
        }
        remembered = trainer.optimizer.state() | (trainer.mean.state() if trainer.mean else {})
        snapshot = Snapshot(state, self.parameters, remembered, random_state())
        self.folder.checkpoints.save(snapshot, best_step=self.best[1] if self.best else None, held=self.held)
        self._saved_step = trainer.num_steps_done
        progress.describe("training")

    def _restore(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        load_parameters(self.parameters, snapshot.trainable)
        means = means_of(snapshot)
        if self.trainer.mean is not None:
            self.trainer.mean.load(means)
        own = {key: value for key, value in snapshot.optimizer.items() if not key.endswith(MEAN)}
        self.trainer.optimizer.load_state(own)
        self.trainer.num_steps_done = self._saved_step = state["step"]
        self.trainer.num_skipped = state["num_skipped"]
        self.feed.seek(state["position"])
        self.num_tokens, self.loss = state["num_tokens"], state["loss"]
        self.best = tuple(state["best"]) if state["best"] else None
        self.num_worse, self._evaluated_step = state["num_worse"], state["evaluated_step"]
        set_random_state(snapshot.random)
        here = {"threads": torch.get_num_threads(), "torch": torch.__version__, "processes": self.team.size}
        before = {"processes": 1, **state}
        for name, value in here.items():
            if before[name] != value:
                self.say(f"{name} was {before[name]}, now {value}: the last digits of the loss may differ")
        self.say(f"going on after step {state['step']} of {self.num_steps}")


def kept_weights(snapshot: Snapshot) -> Mapping[str, Tensor]:
    """What a run that ended there would have kept: the mean of the weights, or where there is none the weights."""
    return means_of(snapshot) or snapshot.trainable


def means_of(snapshot: Snapshot) -> dict[str, Tensor]:
    """Means of the weights by the parameters' names; nothing of a run without."""
    return {key.removesuffix(MEAN): value for key, value in snapshot.optimizer.items() if key.endswith(MEAN)}


def load_parameters(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Put saved numbers into what this process holds of parameters of the same names.

    Raises ConfigError where they are others.
    """
    own = {name: local(parameter) for name, parameter in parameters.items()}
    if set(saved) != set(own) or any(saved[name].shape != own[name].shape for name in saved):
        odd = sorted(set(saved) ^ set(own)) or sorted(n for n in saved if saved[n].shape != own[n].shape)
        raise ConfigError(f"the checkpoint trains other parameters than these settings do, such as {odd[0]}")
    with torch.no_grad():
        for name, values in saved.items():
            own[name].copy_(values)


class Interrupts:
    """SIGINT (Ctrl-C) and SIGTERM ask for an end after the step; a second one ends at once.

    Of torchrun's processes a third one: what is sent to all of them, as schedulers do, torchrun passes on besides.
    """

    def __init__(self, say: Say) -> None:
        self.is_wanted = False
        self._is_passed_on = torch.distributed.is_torchelastic_launched()
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_wanted:
            if not self._is_passed_on:
                raise KeyboardInterrupt
            self._is_passed_on = False
            return
        self.is_wanted = True
        self._say("finishing this step and saving; once more ends at once")


def _line(report: StepReport, num_tokens: int, tokens_per_s: float) -> dict[str, Any]:
    line = {
        "loss": report.loss,
        "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm,
        "tokens": num_tokens,
        "trained": report.weight,
        "tokens_per_s": round(tokens_per_s, 1),
    }
    line |= report.shown
    return line | {"skipped": True} if report.is_skipped else line


def available_bytes(device: torch.device) -> int:
    """Memory that a process may still take there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available_bytes()[0]
