"""`ossia data`: look at training data before it costs a night."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ossia.cli.prompts import AsJson, Model, load_tokenizer, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ossia.harmony import Tokenizer
    from ossia.train.inspect import Inspection, Run, Shown

app = typer.Typer(help="Look at training data.", no_args_is_help=True)

# Longer texts of one message are shortened, unless all is asked for.
_MAX_SHOWN = 1_500
_COLORS = {"analysis": "yellow", "commentary": "blue", "final": "green", "call": "magenta"}
_BAR_WIDTH = 40


@app.callback()
def _root() -> None: ...


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="JSONL files, plain or .gz, or folders of them.")],
    form: Annotated[
        Literal["auto", "harmony", "openai", "sharegpt"], typer.Option("--format", help="How the rows are written.")
    ] = "auto",
    train: Annotated[
        str,
        typer.Option(
            help="What is trained: all, analysis, commentary, final, calls or calls:PATTERN, each with =WEIGHT, comma "
            "between; the last one that fits holds."
        ),
    ] = "all",
    turns: Annotated[Literal["all", "last"], typer.Option(help="Which answers become samples.")] = "all",
    effort: Annotated[
        str, typer.Option(help="Effort of rows that name none, or shares such as low=1,medium=2.")
    ] = "medium",
    date: Annotated[
        str | None,
        typer.Option(help="Date that the model is told: YYYY-MM-DD, two with .. between, or '' for none."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Most tokens of a sample; 0 for no bound.")] = 4096,
    batch_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of a batch that samples are packed into; 0 for --max-tokens.")
    ] = 0,
    packing: Annotated[Literal["best_fit", "buckets", "none"], typer.Option(help="How they are packed.")] = "best_fit",
    show: Annotated[int, typer.Option(min=0, help="Rows whose samples are shown.")] = 1,
    line: Annotated[int | None, typer.Option(min=1, help="Show the samples of this line of the first file.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Show texts to their end, however long.")] = False,
    model: Model = "",
    as_json: AsJson = False,
) -> None:
    """Show what is trained in some rows, token by token, and count what all of them hold.

    Trained tokens are marked and coloured by their channel, all others are dim. Exit code 1 means that there are bad
    rows, of which the first hundred are listed.
    """
    from ossia.train.data import DataConfig
    from ossia.train.inspect import inspect_data

    config = DataConfig(format=form, train=train, turns=turns, effort=effort, max_tokens=max_tokens, packing=packing)
    if date is not None:
        config = dataclasses.replace(config, current_date=date)
    tokenizer = load_tokenizer(model)
    with _progress() as progress:
        found = inspect_data(
            paths,
            config,
            tokenizer,
            batch_tokens=batch_tokens,
            num_shown_rows=show,
            line=line,
            progress=progress,
        )
    if as_json:
        print(json.dumps(_plain(found, tokenizer), ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        for shown in found.shown:
            _print_sample(console, shown, tokenizer, full)
        _print_counts(console, found)
    raise typer.Exit(int(bool(found.bad_rows)))


# -- samples -------------------------------------------------------------------------------------------------------


def _print_sample(console: Console, shown: Shown, tokenizer: Tokenizer, full: bool) -> None:
    from rich.text import Text

    place = f"{shown.file}:{shown.line}, {shown.which}"
    facts = f"{shown.num_tokens} tokens, {shown.num_trained} trained, effort {shown.effort or 'not said'}"
    console.print(Text(f"{place}: {facts}", style="bold"))
    width = max(len(_label(run)) for run in shown.runs)
    for run in shown.runs:
        style = "dim" if not run.weight else _COLORS.get(run.speaker.partition(" ")[0], "")
        body = _body(run, tokenizer, style, full, console.is_terminal)
        for number, one in enumerate(body.split("\n", allow_blank=True)):
            label = _label(run) if number == 0 else ""
            bar = "┃" if run.weight else "┊"
            console.print(Text(f"{label:<{width}} {bar} ", style=style).append_text(one))
    console.print()


def _label(run: Run) -> str:
    if not run.weight:
        return run.speaker
    return f"train {run.speaker}" + ("" if run.weight == 1 else f" x{run.weight:g}")


def _body(run: Run, tokenizer: Tokenizer, style: str, full: bool, is_terminal: bool) -> Text:
    """The text of a run; special tokens stand out, and text that only spells one has a backslash in it."""
    from rich.text import Text

    out = Text(style=style)
    special = "reverse" if run.weight else "dim"
    ordinary: list[int] = []

    def flush() -> None:
        text = _SPELLED.sub(r"<\\|\1|>", tokenizer.decode(ordinary))
        if len(text) > _MAX_SHOWN and not full:
            cut = len(text) - _MAX_SHOWN
            text = f"{text[: _MAX_SHOWN // 2]} [... {cut} more characters ...] {text[-_MAX_SHOWN // 2 :]}"
        out.append(printable(text, is_terminal))
        ordinary.clear()

    for token_id in run.token_ids:
        if token_id in tokenizer.special_ids:
            flush()
            out.append(tokenizer.decode([token_id]), style=special)
        else:
            ordinary.append(token_id)
    flush()
    return out


_SPELLED = re.compile(r"<\|([a-z_0-9]+)\|>")


# -- counts --------------------------------------------------------------------------------------------------------


def _print_counts(console: Console, found: Inspection) -> None:
    from rich.text import Text

    names = found.files if len(found.files) <= 3 else [*found.files[:2], f"and {len(found.files) - 2} more"]
    formats = [f"{name} ({num})" if len(found.formats) > 1 else name for name, num in found.formats.items()]
    too_long = f", {found.too_long:,} of more than {found.max_tokens:,} tokens" if found.too_long else ""
    share = _percent(found.trained_tokens, found.tokens)
    rows: list[tuple[str, str]] = [
        ("files", ", ".join(names)),
        ("format", ", ".join(formats)),
        ("rows", _row_counts(found)),
        (found.kind, f"{found.samples:,}{too_long}"),
        ("tokens", f"{found.tokens:,}, {found.trained_tokens:,} trained ({share})"),
    ]
    for name, num in found.trained.items():
        rows.append((f"  trained {name}", f"{num:,} ({_percent(num, found.trained_tokens)})"))
    rows += [(f"  not trained, {name}", f"{num:,}") for name, num in found.untrained.items()]
    if found.length_percentiles:
        rows.append(("lengths", ", ".join(f"{name} {num:,}" for name, num in found.length_percentiles.items())))
        most = max(found.length_histogram.values())
        for bound, num in found.length_histogram.items():
            rows.append((f"  up to {bound:,}", f"{num:>9,} {'█' * round(_BAR_WIDTH * num / most)}"))
    if (packed := found.packing) is not None:
        told = f"{packed.packs:,} batches of {packed.max_tokens:,} tokens, {100 * packed.efficiency:.1f} % filled"
        rows.append(("packing", told))
    num_samples = sum(found.efforts.values())
    efforts = [f"{name} {_percent(num, num_samples)}" for name, num in found.efforts.items()]
    rows.append(("efforts", ", ".join(efforts)))
    names_of_tools = list(dict.fromkeys([*found.tools_called, *found.tools_declared]))
    for name in names_of_tools[:20]:
        called, declared = found.tools_called.get(name, 0), found.tools_declared.get(name, 0)
        rows.append((f"  tool {name}", f"declared by {declared:,} rows, called {called:,} times"))
    if len(names_of_tools) > 20:
        rows.append(("  more tools", f"{len(names_of_tools) - 20:,}"))
    width = max(len(name) for name, _ in rows) + 2
    for name, value in rows:
        if value:
            console.print(Text(f"{name:<{width}}{printable(value, console.is_terminal)}"))
    for warning in found.warnings:
        console.print(Text(f"look at: {printable(warning, console.is_terminal)}", style="yellow"))
    for problem in found.problems:
        print(f"bad row: {printable(problem, sys.stderr.isatty())}", file=sys.stderr)
    if found.bad_rows > len(found.problems):
        print(f"and {found.bad_rows - len(found.problems):,} more bad rows", file=sys.stderr)


def _row_counts(found: Inspection) -> str:
    parts = [f"{found.rows:,}"]
    for num, what in (
        (found.bad_rows, "bad"),
        (found.duplicate_rows, "that repeat another"),
        (found.untrained_rows, "with nothing that is trained"),
    ):
        if num:
            parts.append(f"{num:,} {what}")
    return ", ".join(parts)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _plain(found: Inspection, tokenizer: Tokenizer) -> dict[str, Any]:
    values = dataclasses.asdict(found)
    values["packing"] = None if found.packing is None else found.packing._asdict()
    values["shown"] = [
        {**shown._asdict(), "runs": [{**run._asdict(), "text": tokenizer.decode(run.token_ids)} for run in shown.runs]}
        for shown in found.shown
    ]
    return values


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """A bar over the share that is read, on standard error, shown on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda share: bar.update(task, completed=share)
