"""How the learning rate goes over a run: a rise, then one of four ways down.

cosine    half a cosine from the top to the floor
wsd       held at the top, then a straight line to the floor ("warm-up, stable, decay", arXiv:2404.06395)
linear    a straight line from the top to the floor
constant  held at the top
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of each step as a factor of the highest one; step 0 is the first."""

    kind: Literal["cosine", "wsd", "linear", "constant"]
    num_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    floor: float = 0.0

    @classmethod
    def of_shares(
        cls,
        kind: Literal["cosine", "wsd", "linear", "constant"],
        num_steps: int,
        warmup: float,
        decay: float,
        floor: float,
    ) -> Schedule:
        """A schedule whose rise and fall are shares of all steps."""
        return cls(kind, num_steps, round(warmup * num_steps), round(decay * num_steps), floor)

    def factor(self, step: int) -> float:
        """Over 0 up to 1. The first step after the rise has 1, the last step of all has the floor."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        begin = max(self.warmup_steps, self.num_steps - self.decay_steps) if self.kind == "wsd" else self.warmup_steps
        last = self.num_steps - 1
        # The first step of the fall is one step below the top for wsd, and the top itself for the others.
        begin -= self.kind == "wsd"
        if step <= begin or last <= begin:
            return 1.0
        done = min(1.0, (step - begin) / (last - begin))
        height = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.floor + (1 - self.floor) * height
