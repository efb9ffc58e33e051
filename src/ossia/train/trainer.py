"""One optimiser step, exactly: passes in, a report out.

The loss of a step is that of all its trained tokens together: each pass gives the *sum* over its tokens, and the weight
of the whole step, known before the first pass, divides it. Four passes over a quarter of the tokens are therefore the
same step as one pass over all of them, however unlike the quarters are. Several processes share a
step's passes.

A step whose gradient is not finite changes nothing and is reported as skipped; too many in a row end the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ossia.errors import TrainingError, UnavailableError
from ossia.train.parallel import Team
from ossia.train.shards import local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ossia.train.optimizers import Optimizer, WeightMean
    from ossia.train.schedule import Schedule


class Pass(Protocol):
    """What goes through the model at once, such as `ossia.train.data.TrainBatch`: a dataclass of arrays."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""


B = TypeVar("B", bound=Pass)
B_contra = TypeVar("B_contra", bound=Pass, contravariant=True)


class Terms(NamedTuple):
    """What one pass adds to the step, each divided by the step's weight later.

    ``loss_sum`` is the loss that is told, ``sums`` are shown beside it, ``penalty_sum`` is made small as well but is no
    part of the loss that is told.
    """

    loss_sum: Tensor
    sums: Mapping[str, float] = {}
    penalty_sum: Tensor | None = None


class Objective(Protocol[B_contra]):
    """What a method of training makes small."""

    def weight(self, batch: B_contra) -> float:
        """What the step's loss is divided by, of this pass: trained tokens, or pairs. Known without the model."""

    def terms(self, batch: B_contra) -> Terms:
        """The pass through the model; ``batch`` holds tensors on the model's device."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    num_tokens: int
    weight: float
    is_skipped: bool
    shown: Mapping[str, float] = field(default_factory=dict)


class Trainer(Generic[B]):
    """Parameters, their optimiser and the schedule, moved one step at a time.

    ``team`` are the processes that share the passes, and the device that these are sent to; ``mean`` is told of every
    step. ``num_steps_done`` and ``num_skipped`` (in a row) are its own state; the parameters', the optimiser's and the
    mean's are saved beside it.
    """

    def __init__(
        self,
        objective: Objective[B],
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        highest_rate: float,
        clip: float = 1.0,
        max_skipped: int = 10,
        team: Team | None = None,
        mean: WeightMean | None = None,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.highest_rate = highest_rate
        self.clip = clip
        self.max_skipped = max_skipped
        self.team = team or Team()
        self.mean = mean
        self.num_steps_done = 0
        self.num_skipped = 0

    def step(self, passes: Sequence[B]) -> StepReport:
        """Gradients of all passes together, then one move. Every process is given all passes, and computes its share.

        Raises TrainingError when this was the last of ``max_skipped`` steps in a row without a finite gradient,
        UnavailableError when the memory is too small.
        """
        weight = sum(self.objective.weight(one) for one in passes)
        if not weight > 0:
            raise TrainingError(f"step {self.num_steps_done + 1} has nothing to train: all weights of its data are 0")
        self.optimizer.zero_grad()
        loss, sums = 0.0, dict[str, float]()
        with memory_errors():
            for one, counts in self.team.share(passes):
                terms = self.objective.terms(to_device(one, self.team.device))
                total = terms.loss_sum if terms.penalty_sum is None else terms.loss_sum + terms.penalty_sum
                (total * float(counts) / weight).backward()  # type: ignore[no-untyped-call]
                loss += terms.loss_sum.item() * counts / weight
                for name, value in terms.sums.items():
                    sums[name] = sums.get(name, 0.0) + value * counts
            self.team.add_gradients(self.optimizer.named.values())
            loss, *shown = self.team.sums([loss, *sums.values()])
            rate = self.highest_rate * self.schedule.factor(self.num_steps_done)
            gradient_norm = self._move(loss, rate)
        self.num_steps_done += 1
        if self.mean is not None:
            self.mean.add(self.num_steps_done)
        is_skipped = not math.isfinite(gradient_norm) or not math.isfinite(loss)
        self._count_skipped(is_skipped, loss, gradient_norm)
        return StepReport(
            self.num_steps_done,
            loss,
            gradient_norm,
            rate,
            sum(one.num_tokens for one in passes),
            weight,
            is_skipped,
            {name: value / weight for name, value in zip(sums, shown, strict=True)},
        )

    def _move(self, loss: float, rate: float) -> float:
        """The norm of the gradient; the parameters move if it and the loss are finite."""
        gradients = [local(p.grad) for p in self.optimizer.named.values() if p.grad is not None]
        norm = self.team.total_norm(gradients)
        if torch.isfinite(norm) and math.isfinite(loss):
            if self.clip:
                # As torch's own, whose small number keeps a norm of 0 from dividing.
                factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
                for gradient in gradients:
                    gradient.mul_(factor)
            self.optimizer.step(rate)
        self.optimizer.zero_grad()
        return norm.item()

    def _count_skipped(self, is_skipped: bool, loss: float, gradient_norm: float) -> None:
        self.num_skipped = self.num_skipped + 1 if is_skipped else 0
        if self.num_skipped >= self.max_skipped:
            raise TrainingError(
                f"{self.num_skipped} steps in a row, up to step {self.num_steps_done}, had no finite gradient (loss "
                f"{loss}, norm of the gradient {gradient_norm}). Resume from the last checkpoint with a lower "
                "learning_rate, a longer warmup or precision = float32"
            )


def to_device(value: Any, device: torch.device) -> Any:
    """A dataclass, or what is in one, with its numpy arrays as tensors on the device."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(to_device(one, device) for one in value)
    if isinstance(value, list):
        return [to_device(one, device) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value) if one.init]
        return dataclasses.replace(value, **{name: to_device(getattr(value, name), device) for name in names})
    return value


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn what torch raises for a memory that is too small into UnavailableError with what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        raise UnavailableError(
            f"the memory is too small for this step ({str(error).splitlines()[0]}). Lower max_tokens, the tokens of a "
            "pass (step_tokens keeps the step as large), rank or expert_rank, keep recompute = true, or train with LoRA"
        ) from error


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in ("can't allocate memory", "not enough memory", "out of memory"))


def random_state() -> dict[str, Tensor]:
    """States of torch's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore what `random_state` gave; devices that are not here are left out."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)
