"""Curves of a run as a picture, OUT/curves.png, where matplotlib is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ossia.train.metrics import read_metrics
from ossia.train.run import Say

# A panel each: its title, and the numbers of "step" lines that it shows; those that a run has not are left out.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward", "reward_shaped", "part_exact", "part_malformed")),
    ("reward by effort", ("reward_low", "reward_medium", "reward_high")),
    ("tokens by effort", ("length", "length_low", "length_medium", "length_high")),
    ("entropy", ("entropy",)),
    ("divergence", ("kl_old", "kl_reference", "kl", "reverse_kl")),
    ("engine against trainer", ("mismatch", "mismatch_max")),
    ("loss", ("loss",)),
    ("norm of the gradient", ("gradient_norm",)),
)


def draw_curves(folder: Path, say: Say) -> Path | None:
    """Draw the numbers of metrics.jsonl; None, and nothing but a word, without matplotlib or without steps."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if line.get("event") == "step"]
    if not steps:
        return None
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        say("no curves were drawn: matplotlib is not installed; the numbers are in metrics.jsonl")
        return None
    panels = [(title, found) for title, names in _PANELS if (found := _found(steps, names))]
    num_rows = -(-len(panels) // 2)
    figure = figure_module.Figure(figsize=(11, 2.6 * num_rows), layout="constrained")
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    for number, (title, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, 2, number)
        for name in names:
            axes.plot(*_points(steps, name), label=name, linewidth=1)
        if title == "reward" and (points := _points(evaluations, "reward"))[0]:
            axes.plot(*points, "o", label="held out", markersize=4)
        axes.set_title(title, fontsize=10)
        axes.grid(visible=True, alpha=0.3)
        if len(names) > 1 or title == "reward":
            axes.legend(fontsize=7)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    say(f"curves: {path}")
    return path


def _found(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(line.get(name) is not None for line in lines)]


def _points(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [line for line in lines if line.get(name) is not None]
    return [line["step"] for line in found], [line[name] for line in found]
