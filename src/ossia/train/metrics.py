"""What is told about a run: a JSON line for each event, curves for TensorBoard and W&B, a bar on a terminal.

    {"event": "step", "step": 12, "loss": 1.84, "learning_rate": 0.0002, "gradient_norm": 0.71, ...}

A run that is resumed takes back the lines of steps that it will do again, so that the file is that of a run which was
never interrupted.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ossia.errors import UnavailableError


class Sink(Protocol):
    """Something else that curves are sent to."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve."""

    def close(self) -> None:
        """Send what is held."""


class Metrics:
    """The log of a run: ``path`` always, ``sinks`` besides.

    Of what it holds, lines of steps behind ``last_step`` are taken back, and evaluations behind ``last_evaluation``.
    """

    def __init__(
        self, path: Path, *, last_step: int = 0, last_evaluation: int | None = None, sinks: tuple[Sink, ...] = ()
    ) -> None:
        self.path = path
        self._sinks = sinks
        lines = _lines_up_to(path, last_step, last_step if last_evaluation is None else last_evaluation)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Add a line. Numbers keep every digit; those that are not finite become null."""
        line = {"event": event, "step": step} | {key: _plain(value) for key, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritten(error) from error
        numbers = {
            f"{event}/{key}": number for key, value in line.items() if (number := _number(key, value)) is not None
        }
        for sink in self._sinks:
            sink.write(step, numbers)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> UnavailableError:
        return UnavailableError(
            f"{self.path}: cannot be written: {error.strerror}; free some space and go on with --resume"
        )

    def close(self) -> None:
        """Close the file and the sinks."""
        # What `write` could not write, it has told.
        with suppress(OSError):
            self._file.close()
        for sink in self._sinks:
            sink.close()


class NoMetrics:
    """The log of a process that keeps none, since another one does."""

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def open_sinks(folder: Path, name: str, *, tensorboard: bool, wandb: str) -> tuple[Sink, ...]:
    """The sinks that were asked for. Raises UnavailableError, saying what to install, for one that is not there."""
    sinks: list[Sink] = []
    if tensorboard:
        sinks.append(_TensorBoard(folder / "tensorboard"))
    if wandb:
        sinks.append(_Wandb(folder, wandb, name))
    return tuple(sinks)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            tensorboard = importlib.import_module("tensorboardX")
        except ImportError:
            raise UnavailableError(
                "tensorboard is set, but tensorboardX is not installed: pip install tensorboardX, or leave it out; "
                "the curves are in metrics.jsonl as well"
            ) from None
        self._writer = tensorboard.SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, project: str, name: str) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError:
            raise UnavailableError(
                "wandb names a project, but wandb is not installed: pip install wandb, or leave it out; the curves are "
                "in metrics.jsonl as well"
            ) from None
        self._run = wandb.init(project=project, name=name, dir=str(folder), resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Progress:
    """A bar on standard error with loss, speed, learning rate and time left; nothing where that is no terminal."""

    def __init__(self, num_steps: int, done: int = 0, *, is_shown: bool | None = None) -> None:
        # rich takes a part of a second to import, and a pipe has no use for it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if is_shown is None else is_shown),
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=done, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, *, loss: float, tokens_per_s: float, learning_rate: float) -> None:
        """Show a finished step."""
        note = f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  lr {learning_rate:.2e}"
        self._bar.update(self._task, completed=step, note=note)

    def describe(self, what: str) -> None:
        """Say what is being done besides steps."""
        self._bar.update(self._task, description=what)


def _lines_up_to(path: Path, last_step: int, last_evaluation: int) -> list[str]:
    if not path.exists() or not last_step:
        return []
    lines = []
    for line in read_metrics(path):
        last = min(last_step, last_evaluation) if line.get("event") == "evaluation" else last_step
        if line.get("step", 0) <= last:
            lines.append(json.dumps(line) + "\n")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _number(key: str, value: Any) -> float | None:
    """The value as a point of a curve, if it is one."""
    return float(value) if key != "step" and isinstance(value, int | float) and not isinstance(value, bool) else None
