"""`ossia train`: fine-tune a model. A recipe (TOML) says how; every setting is a flag as well.

A method of training is a class of settings and a function; its command, with all flags and their help, is made of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from ossia.errors import ConfigError, UnavailableError
from ossia.train.config import DpoConfig, Settings, SftConfig, read_settings
from ossia.train.rollout_config import DistillConfig, RlConfig, by_effort, read_options

if TYPE_CHECKING:
    from ossia.train.measure import Measured
    from ossia.train.run import Outcome

app = typer.Typer(help="Fine-tune a model; `recipes/` has examples.", no_args_is_help=True)

_INTERRUPTED = 130


def command(kind: type[Settings], train: Callable[..., Outcome], text: str) -> Callable[..., None]:
    """A command of ``train(settings, resume=..., say=...)`` with a flag for each setting of ``kind``."""

    def run(recipe: Path | None = None, resume: bool = False, **flags: Any) -> None:
        settings = read_settings(kind, recipe, flags)
        _require_torch()
        from ossia.train.parallel import end_process

        outcome = train(settings, resume=resume, say=_say)
        status = _INTERRUPTED if outcome.is_interrupted else 0
        end_process(status)
        raise typer.Exit(status)

    hints = get_type_hints(kind)
    flags = {field.name: _flag(field, hints[field.name]) for field in dataclasses.fields(kind)}
    annotations: dict[str, Any] = {
        "recipe": Annotated[Path | None, typer.Argument(help="TOML file with settings; flags stand above it.")],
        "resume": Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")],
        **flags,
    }
    defaults = {"resume": False}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, keyword, default=defaults.get(n), annotation=a) for n, a in annotations.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    run.__doc__ = text
    return run


def _flag(field: dataclasses.Field[Any], hint: Any) -> Any:
    """The option of a setting; None where it is not given, so that the recipe keeps its say."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [one for one in get_args(hint) if one is not type(None)]
    name = f"--{field.name.replace('_', '-')}"
    names = (f"{name}/--no-{field.name.replace('_', '-')}",) if hint is bool else (name,)
    if hint == tuple[str, ...]:
        hint = str
    shown = _shown(field.default)
    text = field.metadata["text"] + (f" [default: {shown}]" if shown else "")
    return Annotated[hint | None, typer.Option(*names, help=text, rich_help_panel=field.metadata["group"] or "Run")]


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None else str(default)


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise UnavailableError("training needs PyTorch, which is not installed: pip install 'ossia[train]'")


def _listed(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split(",")) if part]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sft(settings: SftConfig, **options: Any) -> Outcome:
    from ossia.train.sft import sft

    return sft(settings, **options)


def _dpo(settings: DpoConfig, **options: Any) -> Outcome:
    from ossia.train.dpo import dpo

    return dpo(settings, **options)


def _rl(settings: RlConfig, **options: Any) -> Outcome:
    from ossia.train.rl import rl

    return rl(settings, **options)


def _distill(settings: DistillConfig, **options: Any) -> Outcome:
    from ossia.train.distill import distill

    return distill(settings, **options)


app.command("sft")(
    command(
        SftConfig,
        _sft,
        """Fine-tune on conversations: answers become likely.

        Give a recipe, flags, or both. The result is in --out: of LoRA the folder adapter/, which `ossia serve` and PEFT
        load. Ctrl-C ends in good order, and --resume goes on exactly.

        Example: ossia train sft --model gpt-oss-20b --data conversations.jsonl --out runs/mine
        """,
    )
)
app.command("dpo")(
    command(
        DpoConfig,
        _dpo,
        """Fine-tune on pairs of answers: the better one becomes the likelier one.

        A row of the data has a chosen and a rejected answer to one prompt; the rest is as for `ossia train sft`.

        Example: ossia train dpo --model gpt-oss-20b --data pairs.jsonl --out runs/mine
        """,
    )
)
app.command("rl")(
    command(
        RlConfig,
        _rl,
        """Reinforce: the model does exercises, with tools, and what is rewarded more than its group becomes likelier.

        A task makes exercises and judges answers: arithmetic, calculator, or a class of your own as module:Class.
        Rewards, lengths and how far engine and trainer are apart go to OUT/metrics.jsonl, and as curves to
        OUT/curves.png.

        Example: ossia train rl --model gpt-oss-20b --task arithmetic --out runs/sums
        """,
    )
)
app.command("distill")(
    command(
        DistillConfig,
        _distill,
        """Distil: a student learns a teacher's probabilities, from the teacher's answers or on its own.

        The teacher is a checkpoint or a server (`ossia serve`, vLLM) with the student's vocabulary.

        Example: ossia train distill --model small --teacher http://127.0.0.1:8000/v1 --task arithmetic --out runs/small
        """,
    )
)


@app.command("gold")
def gold(
    out: Annotated[Path, typer.Argument(help="JSONL file to write; it must not be there yet.")],
    task: Annotated[str, typer.Option(help="Tasks: names, or module:Class, each with =WEIGHT; commas between.")],
    count: Annotated[int, typer.Option(min=1, help="Conversations to write.")] = 1000,
    task_option: Annotated[str, typer.Option(help="Arguments of a single task, name=value; commas between.")] = "",
    efforts: Annotated[str, typer.Option(help="How often each effort is asked for, such as low=1,high=2.")] = "",
    split: Annotated[str, typer.Option(help="Which instances: train, or held_out.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same conversations.")] = 0,
) -> None:
    """Write gold transcripts of tasks as conversations for `ossia train sft`.

    Example: ossia train gold sums.jsonl --task arithmetic --count 5000
    """
    from ossia.train.tasks import SPLITS, gold_conversations, make_mix

    sides = [one for one in SPLITS if one == split]
    if not sides:
        raise ConfigError(f"--split is {split!r}; expected one of: {', '.join(SPLITS)}")
    if out.exists():
        raise ConfigError(f"{out} is there already; give another name")
    mix = make_mix(_listed(task), read_options(_listed(task_option)), by_effort("efforts", efforts) or None)
    with open(out, "x", encoding="utf-8") as file:
        for row in gold_conversations(mix, sides[0], seed, count):
            file.write(row.to_json() + "\n")
    _say(f"{count} conversations are in {out}")


@app.command("measure")
def measure(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder, a .gguf file, or a name.")],
    task: Annotated[str, typer.Option(help="Tasks: names, or module:Class; commas between.")],
    count: Annotated[int, typer.Option(min=1, help="Held-out exercises of each task at each effort.")] = 200,
    task_option: Annotated[str, typer.Option(help="Arguments of a single task, name=value; commas between.")] = "",
    efforts: Annotated[str, typer.Option(help="Efforts, commas between; by default those that a task has.")] = "",
    adapter: Annotated[Path | None, typer.Option(help="Measure with the LoRA adapter in this folder.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest tokens.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one exercise may sample.")] = 512,
    grammar: Annotated[
        bool, typer.Option("--grammar", help="Exclude malformed messages, and answers off their schema, by a grammar.")
    ] = False,
    unsafe_python: Annotated[bool, typer.Option("--unsafe-python", help="Run code with no sandbox at all.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same exercises.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 takes all cores.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep each exercise in this file, as a JSON line; what it holds is not done again."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a model can do: the share of held-out exercises that are right, with its 95 % interval.

    Exercises are done by the engine, with the tasks' tools. Needs no PyTorch.

    Example: ossia train measure gpt-oss-20b --task arithmetic --efforts low,high --count 500
    """
    from ossia.train.measure import Log, open_rollouts
    from ossia.train.measure import measure as measured
    from ossia.train.rollout import RolloutConfig
    from ossia.train.tasks import make

    names, options = _listed(task), read_options(_listed(task_option))
    if not names or (options and len(names) > 1):
        raise ConfigError(f"--task names {len(names)} tasks; expected one or more, and one alone with --task-option")
    wanted = by_effort("efforts", ",".join(f"{one}=1" for one in _listed(efforts)))
    tasks = [make(name, options) for name in names]
    config = RolloutConfig(max_tokens=max_tokens, temperature=temperature, grammar=grammar, unsafe_python=unsafe_python)
    how = {
        "model": model,
        "adapter": adapter and str(adapter),
        "task_option": task_option,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "grammar": grammar,
        "seed": seed,
    }
    log = None if out is None else Log(out, how)
    found: list[Measured] = []
    try:
        with open_rollouts(model, config, adapter=adapter, threads=threads, kv_memory="512MiB") as rollouts:
            for one in tasks:
                for effort in wanted or one.efforts:
                    result = measured(rollouts, one, effort, count, seed=seed, log=log)
                    found.append(result)
                    _say(f"{one.name} {effort}: {100 * result.exact:.1f} %")
                    if result.defects:
                        _say(
                            "the format was broken by "
                            + ", ".join(f"{n} ({100 * s:.1f} %)" for n, s in result.defects.items())
                        )
                    if result.unfinished:
                        _say(f"{100 * result.unfinished:.1f} % were cut off by --max-tokens {max_tokens}; give more")
    finally:
        # Also when the rest is broken off.
        if found:
            _print_measured(found, as_json=as_json)


def _print_measured(found: Sequence[Measured], *, as_json: bool) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps([one._asdict() for one in found], indent=1))
        return
    names = ("task", "effort", "right", "95 % interval", "valid", "cut off", "tokens", "thought")
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for one in found:
        interval = f"{100 * one.low:.1f}-{100 * one.high:.1f}"
        right, valid, cut_off = (f"{100 * share:.1f} %" for share in (one.exact, one.valid, one.unfinished))
        means = f"{one.sampled:.0f}", f"{one.reasoning:.0f}"
        table.add_row(one.task, one.effort, right, interval, valid, cut_off, *means)
    Console().print(table)
