"""`ossia eval`: the model card's evaluations, asked of a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from ossia.cli.progress import count_progress
from ossia.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ossia.evals.asking import Question
    from ossia.evals.benchmarks import Benchmark
    from ossia.evals.run import How, Score


def eval(
    benchmark: Annotated[
        str,
        typer.Argument(
            help="aime24, aime25, gpqa, mmlu, mmmlu, bbq, simpleqa, hle, healthbench (-hard, -consensus) or ih."
        ),
    ],
    model: Annotated[str, typer.Option(help="The model's name at the server.")] = "gpt-oss-20b",
    url: Annotated[
        str, typer.Option(help="The server's API; `ossia serve` has it there.")
    ] = "http://127.0.0.1:8000/v1",
    api: Annotated[str, typer.Option(help="responses, or chat for servers without Responses.")] = "responses",
    efforts: Annotated[str, typer.Option(help="Efforts, commas between.")] = "low,medium,high",
    python: Annotated[bool, typer.Option("--python", help="Let the model use the server's python tool.")] = False,
    count: Annotated[int, typer.Option(min=0, help="Ask this many questions, the same ones each time; 0: all.")] = 0,
    repeats: Annotated[int, typer.Option(min=0, help="Ask each so many times; 0: as OpenAI's own runs do.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions that are asked at once.")] = 16,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="The card's scores are drawn at 1.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, its reasoning included.")] = 131_072,
    data: Annotated[
        list[Path] | None, typer.Option(help="The questions' files; by default they are downloaded.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A folder to keep all answers in, and to go on from.")] = None,
    judge: Annotated[
        str, typer.Option(help="The model that judges simpleqa, hle and healthbench, by its name at its server.")
    ] = "",
    judge_url: Annotated[str, typer.Option(help="The judge's API; by default the same server's.")] = "",
    judge_key: Annotated[
        str, typer.Option(envvar="OSSIA_JUDGE_KEY", help="The key of the judge's server, where it is another.")
    ] = "",
    key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="The server's key.")] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on a benchmark of the model card, through the API of ossia's server or any other.

    Scores are printed beside those that the card and others report.

    Example: ossia eval aime25 --model gpt-oss-20b --efforts low --out runs/aime25
    """
    import asyncio
    import json
    import random

    from ossia.evals.benchmarks import BENCHMARKS
    from ossia.evals.card import EFFORTS
    from ossia.evals.data import read_questions
    from ossia.evals.run import Api, How

    if (asked := BENCHMARKS.get(benchmark)) is None:
        raise ConfigError(f"there is no benchmark {benchmark!r}; expected one of: {', '.join(BENCHMARKS)}")
    form = next((one for one in get_args(Api) if one == api), None)
    if form is None or (python and api == "chat"):
        raise ConfigError(f"--api is {api!r}; expected responses, or chat, which has no python tool of the server's")
    wanted = [one.strip() for one in efforts.split(",") if one.strip()]
    if not wanted or set(wanted) - set(EFFORTS):
        raise ConfigError(f"--efforts is {efforts!r}; expected some of: {', '.join(EFFORTS)}")
    if asked.judge is not None and not judge:
        raise ConfigError(f"{asked.title} needs a model that judges its answers: name it with --judge")
    if asked.judge is None and judge:
        raise ConfigError(f"{asked.title} is marked without a judge; leave --judge out")
    questions = read_questions(asked, data or ())
    if count and count < len(questions):
        questions = random.Random(0).sample(questions, count)
    elif len(questions) != asked.num_questions:
        typer.echo(f"{asked.title} has {asked.num_questions:,} questions, {len(questions):,} are here", err=True)
    judged_by = f"{judge} at {judge_url or url}" if judge else ""
    hows = [How(asked.name, url, model, effort, form, python, temperature, max_tokens, judged_by) for effort in wanted]
    # One server's key is no other's business.
    judging = (judge, judge_url or url, judge_key or ("none" if judge_url else key)) if judge else None
    scores = asyncio.run(_ask(asked, questions, hows, key, out, repeats or asked.num_repeats, concurrency, judging))
    if as_json:
        print(json.dumps({effort: one._asdict() for effort, one in scores.items()}, indent=1))
    else:
        _print(hows[0], scores)


async def _ask(
    benchmark: Benchmark,
    questions: Sequence[Question],
    hows: Sequence[How],
    key: str,
    out: Path | None,
    num_repeats: int,
    concurrency: int,
    judging: tuple[str, str, str] | None,
) -> dict[str, Score]:
    from contextlib import AsyncExitStack

    from openai import AsyncOpenAI

    from ossia.evals.run import Log, make_judge, run

    scores = {}
    async with AsyncExitStack() as stack:
        # A long thought takes hours on a laptop.
        client = await stack.enter_async_context(
            AsyncOpenAI(base_url=hows[0].url, api_key=key, timeout=86_400, max_retries=4)
        )
        judge = None
        if judging is not None:
            model, url, judge_key = judging
            theirs = await stack.enter_async_context(
                AsyncOpenAI(base_url=url, api_key=judge_key, timeout=86_400, max_retries=4)
            )
            judge = make_judge(theirs, model, hows[0].api, concurrency)
        for how in hows:
            name = f"{how.benchmark}{'-python' if how.python else ''}-{how.effort}.jsonl"
            with count_progress(f"{how.benchmark} {how.effort}") as progress:
                scores[how.effort] = await run(
                    client,
                    benchmark,
                    questions,
                    how,
                    num_repeats=num_repeats,
                    concurrency=concurrency,
                    log=Log(None if out is None else out / name, how),
                    judge=judge,
                    progress=progress,
                )
    return scores


def _print(how: How, scores: Mapping[str, Score]) -> None:
    """The scores, beside those that were reported of the same model."""
    from rich.console import Console
    from rich.table import Table

    from ossia.evals.card import EFFORTS, REPORTED, size_of

    reported = REPORTED.get((how.benchmark, how.python, size_of(how.model) or ""), ())
    names = ("effort", "score", "95 %", "cut off", "tokens", *(one.by for one in reported))
    table = Table(*names, box=None, padding=(0, 2, 0, 0))
    for effort, one in scores.items():
        others = [each.scores[EFFORTS.index(effort)] for each in reported]
        table.add_row(
            effort,
            f"{one.mean:.1f} %",
            f"± {one.half_width:.1f}",
            f"{one.unfinished:.1f} %",
            f"{one.output_tokens:,.0f}",
            *("" if value is None else f"{value:.1f}" for value in others),
        )
    console = Console()
    console.print(table)
    # Languages, kinds of questions, verdicts: what a mean hides.
    for title, columns in (("of which", "groups"), ("judged", "verdicts")):
        names_of = sorted({name for one in scores.values() for name in getattr(one, columns)})
        if names_of:
            parts = Table(title, *scores, box=None, padding=(0, 2, 0, 0))
            for name in names_of:
                parts.add_row(name, *(f"{getattr(one, columns).get(name, 0):.1f} %" for one in scores.values()))
            console.print()
            console.print(parts)
