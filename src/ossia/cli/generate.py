"""`ossia generate`: one prompt, one streamed answer."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossia.cli import options
from ossia.cli.prompts import argument_or_stdin, printable
from ossia.cli.team import follows
from ossia.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from ossia.harmony import Delta, StreamDecoder, Tokenizer
    from ossia.local import Generation


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; `-` reads standard input.")],
    model: options.Model = None,
    effort: options.Effort = "medium",
    instructions: Annotated[
        str | None, typer.Option(help="What the developer asks of the model, before the prompt.")
    ] = None,
    schema: Annotated[
        Path | None, typer.Option(help="A file with the JSON Schema that the answer is made to match.")
    ] = None,
    show_reasoning: options.ShowReasoning = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    adapter: options.Adapter = None,
    date: options.Date = None,
    raw: Annotated[bool, typer.Option("--raw", help="Show every token as it comes, special ones too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end, for programs.")] = False,
    backend: options.Backend = None,
    threads: options.Threads = None,
    dense: options.Dense = None,
    kv: options.KeysAndValues = None,
    kv_memory: options.KvMemory = None,
    gpu_memory: options.GpuMemory = None,
    tp: options.Tp = None,
    max_context: options.MaxContext = None,
) -> None:
    """Ask a model and print its answer as it comes.

    Thoughts are hidden unless `--show-reasoning` is given. Settings may also come from OSSIA_* variables and
    ~/.config/ossia/config.toml.

    Ends with 1 where no answer came, as where the model called a tool instead.

    Example: ossia generate "Why is the sky blue?" --model gpt-oss-20b --effort low
    """
    settings = options.settings_of(locals())
    # The engine and its libraries take a part of a second to import; `ossia --help` does not wait for them.
    from rich.console import Console

    from ossia.local import LocalModel

    if follows(settings):
        return
    prompt = argument_or_stdin(prompt)
    if not prompt.strip():
        raise InputError("the prompt is empty; give what to ask, or `-` and a text in standard input")
    output_schema = None if schema is None else _read_schema(schema)
    settings, adapter_name = options.with_adapter(settings, adapter)
    console = Console(stderr=True)
    with console.status("loading"):
        local = LocalModel.open(settings)
    if local.checkpoint.has_random_weights:
        console.print(
            "The weights of this checkpoint are random: what follows is noise, not an answer.", style="yellow"
        )
    generation = local.generate(
        prompt,
        effort=effort,
        instructions=instructions,
        output_schema=output_schema,
        current_date=date,
        max_tokens=max_tokens,
        seed=seed,
        adapter=adapter_name,
        **options.sampling(temperature, top_p),
    )
    with contextlib.closing(local.engine), generation:
        if as_json:
            for _ in generation:
                pass
            print(json.dumps(_as_json(generation)))
        elif raw:
            _stream_raw(generation, local.tokenizer)
        else:
            _stream(generation, console, show_reasoning)
    if not as_json:
        _print_summary(generation, console)
    if not raw and not generation.text:
        if generation.finish_reason == "stop":
            console.print(_without_answer(generation), style="yellow", highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--schema {path} cannot be read: {error.strerror or error}", param="schema") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--schema {path} is not JSON: {error}", param="schema") from None
    if not isinstance(read, dict):
        raise InputError(
            f"--schema {path} holds {type(read).__name__}; expected an object, a JSON Schema", param="schema"
        )
    return read


def _stream(generation: Generation, notes: Console, show_reasoning: bool) -> None:
    """Print what a reader wants to see; until there is any, tell on a terminal how the thinking goes."""
    from rich.console import Console
    from rich.segment import Segment, Segments
    from rich.style import Style

    answer = Console()
    status = notes.status("reading the prompt")
    status.start()
    shown: Delta | None = None
    try:
        for delta in generation:
            if not show_reasoning and _is_aside(delta):
                # The speed of a model that is not seen writing is all there is to see.
                status.update(f"thinking: {len(generation.token_ids)} tokens, {generation.tokens_per_s:.1f} tokens/s")
                continue
            status.stop()
            gap = "\n\n" if shown is not None and shown.header is not delta.header else ""
            # A segment is printed as it is: as text, rich would widen tabs, drop returns and turn :heart: into a heart.
            segment = Segment(gap + printable(delta.text, answer.is_terminal), Style(dim=_is_aside(delta)))
            answer.print(Segments([segment]), end="", soft_wrap=True)
            shown = delta
    finally:
        status.stop()
    if shown is not None:
        print(flush=True)


def _stream_raw(generation: Generation, tokenizer: Tokenizer) -> None:
    from ossia.harmony import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    done = 0
    for _ in generation:
        done = _print_tokens(generation, decoder, done)
    _print_tokens(generation, decoder, done)
    print(decoder.finish(), flush=True)


def _print_tokens(generation: Generation, decoder: StreamDecoder, start: int) -> int:
    text = "".join(map(decoder.feed, generation.token_ids[start:]))
    print(printable(text, sys.stdout.isatty()), end="", flush=True)
    return len(generation.token_ids)


def _is_aside(delta: Delta) -> bool:
    """Whether a delta is not for end users: of a thought, or of a call."""
    return delta.channel == "analysis" or delta.recipient is not None


def _without_answer(generation: Generation) -> str:
    recipient = generation.messages[-1].recipient if generation.messages else None
    if recipient is None:
        return "The model ended without an answer."
    return (
        f"The answer ended in a call of {recipient}, which nothing runs here; `ossia chat` and `ossia serve` run tools."
    )


def _as_json(generation: Generation) -> dict[str, Any]:
    return {
        "text": generation.text,
        "reasoning": generation.reasoning,
        "messages": [message.to_dict() for message in generation.messages],
        "finish_reason": generation.finish_reason,
        "usage": {
            "prompt_tokens": len(generation.prompt_token_ids),
            "cached_tokens": generation.num_cached_tokens,
            "completion_tokens": len(generation.token_ids),
        },
        "first_token_s": round(generation.first_token_s - generation.started_s, 4),
        "tokens_per_s": round(generation.tokens_per_s, 2),
    }


def _print_summary(generation: Generation, notes: Console) -> None:
    if generation.finish_reason == "length":
        notes.print("The answer was cut off: --max-tokens or the context is used up.", style="yellow")
    first_s = generation.first_token_s - generation.started_s
    notes.print(
        f"{len(generation.prompt_token_ids)} tokens read in {first_s:.2f} s, {len(generation.token_ids)} written, "
        f"{generation.tokens_per_s:.1f} tokens/s",
        style="dim",
        highlight=False,
    )
