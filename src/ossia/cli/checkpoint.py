"""`ossia checkpoint`: look at a checkpoint, check it, compare two, make one with random weights."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ossia.cli.progress import bytes_progress

app = typer.Typer(
    help="Look at a checkpoint, check it, compare two, or make one with random weights.", no_args_is_help=True
)

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint folder, a .gguf file, or a name such as gpt-oss-20b.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def inspect(path: Checkpoint, as_json: AsJson = False) -> None:
    """Show a checkpoint's shape, parameters, bytes and layout, from its headers alone.

    Exit code 1 means that something keeps it from being loaded.
    """
    from ossia.model.hub import resolve_model
    from ossia.model.inspection import inspect_checkpoint

    found = inspect_checkpoint(resolve_model(path))
    if as_json:
        print(json.dumps(_plain(found)))
        raise typer.Exit(int(bool(found.problems)))
    config, parameters = found.config, found.parameters
    rows = [
        ("folder", str(found.folder)),
        ("model", found.shape or "no published shape"),
        ("layout", f"{found.layout}, {len(found.files)} file(s), {found.num_tensors} tensors"),
        ("size", f"{found.size_bytes / 2**30:.2f} GiB"),
        ("dtypes", ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in found.dtype_bytes.items())),
        ("layers", f"{config.num_layers}, window {config.sliding_window}"),
        ("hidden, intermediate", f"{config.hidden_size}, {config.intermediate_size}"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, of {config.head_dim}"),
        ("experts", f"{config.num_experts}, {config.num_active_experts} active"),
        ("vocabulary, context", f"{config.vocab_size}, {config.max_context}"),
        ("parameters", f"{_billions(parameters.total)}, active {_billions(parameters.active)}"),
        ("  experts and routers", _billions(parameters.mlp)),
        ("  attention", _billions(parameters.attention)),
        ("  embed and unembed", _billions(parameters.embedding)),
    ]
    for name, value in rows:
        print(f"{name:<24}{value}")
    _report(found.problems, "no problems found in the headers; `ossia checkpoint verify` reads the numbers")


@app.command()
def verify(path: Checkpoint, as_json: AsJson = False) -> None:
    """Read every number that can be wrong: all tensors there, all scales finite, no NaN or infinity.

    Exit code 1 means that problems were found; all of them are listed.
    """
    from ossia.model.hub import resolve_model
    from ossia.model.inspection import verify_checkpoint

    with bytes_progress("reading") as progress:
        problems = verify_checkpoint(resolve_model(path), progress=progress)
    if as_json:
        print(json.dumps({"problems": list(problems)}))
        raise typer.Exit(int(bool(problems)))
    _report(problems, "no problems found")


@app.command()
def diff(
    first: Checkpoint,
    second: Annotated[str, typer.Argument(help="Another checkpoint of the same model, in any layout.")],
    as_json: AsJson = False,
) -> None:
    """List the matrices of two checkpoints that differ, number by number, whatever their layouts.

    Exit code 1 means that something differs.
    """
    from ossia.model.hub import resolve_model
    from ossia.model.weights import Checkpoint
    from ossia.train.differences import differences

    found = list(differences(Checkpoint.open(resolve_model(first)), Checkpoint.open(resolve_model(second))))
    if as_json:
        print(json.dumps([each._asdict() for each in found]))
    else:
        width = max((len(each.key) for each in found), default=0)
        for each in found:
            print(f"{each.key:<{width}}  relative {each.relative:.2e}  {each.share:.2%} of the numbers")
        if not found:
            print("no number differs")
    raise typer.Exit(int(bool(found)))


@app.command()
def new(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    shape: Annotated[
        Literal["tiny", "20b", "120b"], typer.Option(help="tiny (25 MB), or the true shape of a published model.")
    ] = "tiny",
    layers: Annotated[int | None, typer.Option(min=1, help="Another number of layers than the shape's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    layout: Annotated[
        Literal["hf", "hf-bf16", "original"],
        typer.Option(help="Hugging Face with MXFP4 experts, or with bfloat16 experts, or the original/ folder."),
    ] = "hf",
) -> None:
    """Write a checkpoint with random weights, for tests and for trying a machine out.

    Its files are those of a published checkpoint in every respect but the numbers: it answers with noise.
    """
    from ossia.model.random_checkpoint import write_random_checkpoint

    with bytes_progress("writing") as progress:
        folder = write_random_checkpoint(out, shape, num_layers=layers, seed=seed, layout=layout, progress=progress)
    print(folder)


def _report(problems: tuple[str, ...], all_well: str) -> None:
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(f"{len(problems)} problem(s) found" if problems else all_well)
    raise typer.Exit(int(bool(problems)))


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
