"""What the stages cost and what their models can do, as a page with plots and as the model's card."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ossia.errors import UnavailableError
from ossia.harmony import Effort
from ossia.train.metrics import read_metrics
from ossia.train.nano import recipe

_EFFORTS = [str(effort) for effort in Effort]


class Course(NamedTuple):
    """What one stage cost."""

    name: str
    steps: int
    tokens: int
    hours: float
    points: list[tuple[int, float]]
    """Tokens seen and loss, step by step."""
    held_out: float | None
    """The last loss on held-out exercises; None where there was none, as of a stage that learns from rewards."""
    is_supervised: bool


def write_report(out: Path, docs: Path) -> Path:
    """Write ``docs``/nano.md with its plots and ``out``/model/README.md. Raises UnavailableError without matplotlib."""
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise UnavailableError("the report needs matplotlib: pip install matplotlib") from None
    stages = [stage for stage in recipe.STAGES if stage.method in ("pretrain", "rl")]
    courses = [course(out / stage.name, stage) for stage in stages]
    results = {
        f"{stage.name}, {format}": json.loads((out / stage.name / f"measured-{format}.json").read_text())
        for stage in recipe.STAGES
        for format in stage.measured
    }
    last = list(results)[-1]
    pictures = docs / "nano"
    pictures.mkdir(parents=True, exist_ok=True)
    _draw_losses(figure_module, courses, pictures / "loss.png")
    _draw_effort(figure_module, results[last], pictures / "effort.png")
    path = docs / "nano.md"
    path.write_text(_page(courses, results, last), encoding="utf-8")
    (out / "model" / "README.md").write_text(_card(results[last]), encoding="utf-8")
    return path


def course(folder: Path, stage: recipe.Stage) -> Course:
    """What a run's metrics.jsonl says of its cost."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if line.get("event") == "step"]
    tokens = [int(line["tokens"]) for line in steps]
    pace = [float(line["tokens_per_s"]) for line in steps]
    # A pace of 0 is that of a few tokens, rounded.
    seconds = sum(
        (now - before) / speed for before, now, speed in zip([0, *tokens[:-1]], tokens, pace, strict=True) if speed
    )
    # That of step 0 is the stage's before.
    evaluations = [line for line in lines if line.get("event") == "evaluation" and line.get("step")]
    losses = [line["loss"] for line in evaluations if "loss" in line]
    points = [(count, float(line["loss"])) for count, line in zip(tokens, steps, strict=True)]
    held_out = losses[-1] if losses else None
    return Course(
        stage.name, len(steps), tokens[-1], seconds / 3600, points, held_out, is_supervised=stage.method == "pretrain"
    )


# Plots ----------------------------------------------------------------------------------------------------------------


def _draw_losses(figure_module: Any, courses: Sequence[Course], path: Path) -> None:
    figure = figure_module.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    before = 0
    for one in courses:
        if one.is_supervised:
            axes.plot([(before + x) / 1e6 for x, _ in one.points], [y for _, y in one.points], label=one.name, lw=1)
        before += one.tokens
    axes.set(xlabel="million tokens", ylabel="loss, nats per learned token", yscale="log")
    figure.legend(loc="outside lower center", ncols=8, fontsize=7)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=110)


def _draw_effort(figure_module: Any, lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against tokens of reasoning, a line per task from low to high effort."""
    figure = figure_module.Figure(figsize=(10, 4.2), layout="constrained")
    for place, title in enumerate(("sums", "the other tasks"), start=1):
        axes = figure.add_subplot(1, 2, place)
        for name, rows in _by_task(lines).items():
            if name.startswith("sums") == (title == "sums"):
                shown = [row for row in rows if not row["grammar"]]
                x, y = [row["reasoning"] for row in shown], [100 * row["exact"] for row in shown]
                # An interval from 0 on may begin a rounding above it.
                error = [
                    [100 * max(0.0, row["exact"] - row["low"]) for row in shown],
                    [100 * max(0.0, row["high"] - row["exact"]) for row in shown],
                ]
                axes.errorbar(x, y, yerr=error, marker="o", ms=4, lw=1, label=name)
        axes.set(title=title, xlabel="tokens of reasoning, mean", ylabel="right, %", ylim=(-3, 103))
        axes.legend(fontsize=7)
        axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=110)


# Text -----------------------------------------------------------------------------------------------------------------


def _page(courses: Sequence[Course], results: Mapping[str, Sequence[Mapping[str, Any]]], last: str) -> str:
    shape = recipe.SHAPE
    shipped = recipe.lineage(recipe.STAGES[-1])
    added = [stage.settings["layers"] for stage in shipped if stage.method == "deepen"]
    num_layers = shape.num_layers + sum(map(len, added))
    parts = [
        "# A small model from nothing\n",
        "`nano` is a model with the architecture of gpt-oss, trained from nothing by ossia's own "
        "code on exercises that ossia makes up. It is a demonstration: it knows an invented world, a few skills and a "
        "few sentences about itself, and says of everything else that it does not know it.\n",
        f"{num_layers} layers of {shape.hidden_size}, {shape.num_heads} query and {shape.num_kv_heads} key/value "
        f"heads of {shape.head_dim}, windows of {shape.sliding_window} in every other layer, "
        f"{shape.num_experts} experts of {shape.intermediate_size} of which {shape.num_active_experts} work for a "
        f"token, sinks, clamped SwiGLU, YaRN from {shape.rope.original_context} to {shape.max_context} tokens, "
        f"{shape.vocab_size:,} tokens of vocabulary, experts in MXFP4.\n",
        "This page is written by `make nano`, which makes the model, measures it and draws the plots; it takes hours "
        "on two cores, and goes on where it was when it is started again.\n",
        "## What it can do\n",
        "Held-out exercises: names, numbers and combinations of rules that no training has seen; where it is asked "
        "about itself, or for sums, python, calls, facts of pages and JSON, wordings of questions too. An exercise "
        "counts as right if all of it is: the answer, the call with its arguments, the cited line. Tools are the real "
        "ones, the python sandbox and the browser. Greedy decoding "
        "by the CPU engine, without a grammar; where it says so under that of the tools and the schema, as the server "
        "does it; "
        f"{_counts(_shown(results[last]))} exercises per task and effort. In brackets the 95 % interval; behind it "
        "the mean tokens of reasoning.\n",
        _table_of_results(results[last]),
        "![Accuracy against tokens of reasoning](nano/effort.png)\n",
        "The format is kept in these shares of the transcripts, to their end, or up to the 600th token where they do "
        "not end before: greedy decoding may go round in circles, whose share stands behind. With the grammar: "
        f"{_counts(row for row in results[last] if row['grammar'])} exercises.\n",
        _table_of_format(results[last]),
        *_stages(results),
        "## What it cost\n",
        _table_of_courses(courses),
        "![Loss by tokens](nano/loss.png)\n",
        "## What it cannot do\n",
        "It cannot hold a conversation, write prose or answer from knowledge. Outside its exercises it says that it "
        "does not know, or is wrong. Its verdicts show the form of policy work and are no moderation.\n",
    ]
    return "\n".join(parts)


def _shown(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the first table."""
    return [row for row in lines if not row["grammar"] or row["task"] in recipe.ENFORCED]


def _counts(lines: Iterable[Mapping[str, Any]]) -> str:
    """How many exercises were done of each line: "1,000", or from the fewest to the most."""
    counts = [int(row["num_exercises"]) for row in lines]
    return " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def _table_of_results(lines: Iterable[Mapping[str, Any]]) -> str:
    rows = [f"| task | {' | '.join(_EFFORTS)} |", "|---|" + "---|" * len(_EFFORTS)]
    for name, found in _by_task(lines).items():
        for enforced in (False, True) if name in recipe.ENFORCED else (False,):
            cells = {row["effort"]: row for row in found if row["grammar"] is enforced}
            shown = [_cell(cells[effort]) if effort in cells else "" for effort in _EFFORTS]
            rows.append(f"| {name}{', under the grammar' if enforced else ''} | {' | '.join(shown)} |")
    return "\n".join(rows) + "\n"


def _cell(row: Mapping[str, Any]) -> str:
    return (
        f"{100 * row['exact']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f}), {row['reasoning']:.0f} tokens"
    )


def _table_of_format(lines: Iterable[Mapping[str, Any]]) -> str:
    rows = ["| task | free | no end | with the grammar | no end | what broke it |", "|---|---|---|---|---|---|"]
    for name, found in _by_task(lines).items():
        cells = []
        counts: Counter[str] = Counter()
        for row in found:
            counts.update({defect: round(share * row["num_exercises"]) for defect, share in row["defects"].items()})
        for grammar in (False, True):
            shown = [row for row in found if row["grammar"] is grammar]
            unfinished = sum(row["unfinished"] for row in shown) / max(1, len(shown))
            kept = unfinished + sum(row["valid"] for row in shown) / max(1, len(shown))
            cells += [f"{100 * kept:.2f} %", f"{100 * unfinished:.2f} %"]
        told = ", ".join(f"{count} `{defect}`" for defect, count in counts.most_common())
        rows.append(f"| {name} | {' | '.join(cells)} | {told} |")
    return "\n".join(rows) + "\n"


def _stages(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What each measured stage brought; nothing where only the last one was measured."""
    if len(results) == 1:
        return []
    counts = ", ".join(
        f"{_counts(row for row in lines if not row['grammar'])} of {name}" for name, lines in results.items()
    )
    explained = (
        f"Right at {', '.join(_EFFORTS)} effort, in percent, and the mean tokens of reasoning. Exercises per task and "
        f"effort: {counts}.\n"
    )
    return ["## What each stage brought\n", explained, _table_of_stages(results)]


def _table_of_stages(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows = [f"| task | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    by_stage = {stage: _by_task(lines) for stage, lines in results.items()}
    for name in next(iter(by_stage.values())):
        cells = []
        for found in by_stage.values():
            shown = [row for row in found.get(name, ()) if not row["grammar"]]
            right = " / ".join(f"{100 * row['exact']:.1f}" for row in shown)
            reasoning = " / ".join(f"{row['reasoning']:.0f}" for row in shown)
            cells.append(f"{right}; {reasoning} tokens" if shown else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _table_of_courses(courses: Sequence[Course]) -> str:
    rows = ["| stage | steps | tokens | hours | held-out loss |", "|---|---|---|---|---|"]
    for one in courses:
        loss = "" if one.held_out is None else f"{one.held_out:.3f}"
        rows.append(f"| {one.name} | {one.steps:,} | {one.tokens / 1e6:.1f} M | {one.hours:.1f} | {loss} |")
    return "\n".join(rows) + "\n"


def _by_task(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["task"], []).append(line)
    return found


def _card(lines: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        [
            "---\nlicense: apache-2.0\nlibrary_name: transformers\ntags: [gpt-oss, mxfp4, demonstration]\n---\n",
            "# ossia nano\n",
            "A demonstration of the architecture and the chat format of gpt-oss in a few million parameters: not an "
            "assistant. It was trained from nothing, by ossia, on invented exercises: sums at three efforts, python "
            "and function calls, browsing with citations, JSON by a schema, verdicts by a policy, instructions of a "
            "developer against a user. It knows nothing of the world, and its verdicts are no moderation.\n",
            "Right on held-out exercises, with the 95 % interval and the mean tokens of reasoning:\n",
            _table_of_results(lines),
        ]
    )
