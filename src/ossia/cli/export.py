"""`ossia export`: write a model, with what was trained, in the layouts that other programs read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ossia.cli.progress import bytes_progress
from ossia.cli.prompts import read_text

if TYPE_CHECKING:
    from ossia.train.export import Exported


def export(
    out: Annotated[Path, typer.Argument(help="Folder to make; for gguf a file whose name ends in .gguf.")],
    base: Annotated[str, typer.Option("--base", help="The model that was trained: a folder, a .gguf file, or a name.")],
    format: Annotated[
        Literal["mxfp4", "bf16", "gguf", "merged", "adapter"],
        typer.Option(
            help="mxfp4, bf16: Hugging Face's layout. gguf: llama.cpp's file. merged: the base's own files, changed "
            "where it was trained. adapter: PEFT's folder."
        ),
    ] = "mxfp4",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter's folder, to be merged.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of a full fine-tune: a checkpoint's folder, or a safetensors file.")
    ] = None,
    dense: Annotated[
        Literal["q8_0", "bf16"], typer.Option(help="gguf: how attention, embedding and unembedding are written.")
    ] = "q8_0",
    shard_gb: Annotated[float, typer.Option(min=0.001, max=1e6, help="Largest weight file, in 10^9 bytes.")] = 5.0,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    kl: Annotated[
        bool, typer.Option("--kl/--no-kl", help="Measure what rounding did to the answers; minutes for a true 20b.")
    ] = True,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line to measure on, in place of four of ossia's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Write a model in a layout that transformers, vLLM, llama.cpp or PEFT reads, with what was trained merged in.

    What training did not touch keeps its bits. Experts that it touched are rounded to MXFP4 again; the error is printed
    for each layer, and how far the answers of the rounded model are from those of the unrounded one.
    """
    from ossia.model.hub import resolve_model
    from ossia.train.divergence import PROMPTS
    from ossia.train.export import export as write

    lines = PROMPTS if prompts is None else tuple(filter(None, read_text(prompts).splitlines()))
    with bytes_progress("writing") as progress:
        done = write(
            resolve_model(base),
            out,
            format,
            adapter=adapter,
            weights=weights,
            dense=dense,
            shard_bytes=int(shard_gb * 1e9),
            replace=force,
            measure=kl,
            prompts=lines,
            progress=progress,
        )
    print(_as_json(done) if as_json else _as_text(done))


# Mean share of the experts' change that survives rounding, below which a user is told.
_LITTLE_KEPT = 0.5


def _as_json(done: Exported) -> str:
    found = None if done.divergence is None else done.divergence._asdict()
    rounding = {key: {"relative_error": each.relative_error, "kept": each.kept} for key, each in done.rounding.items()}
    changed = {"path": str(done.path), "divergence": found, "rounding": rounding}
    return json.dumps(dataclasses.asdict(done) | changed)


def _as_text(done: Exported) -> str:
    lines = [f"{done.path}  {done.size_bytes / 2**30:.2f} GiB, {done.num_tensors} tensors"]
    if done.num_copied:
        lines[0] += f", {done.num_copied} of them with the base's bytes"
    layers: dict[str, list[str]] = {}
    for key, each in done.rounding.items():
        _, layer, _, name = key.split(".")
        kept = "" if each.kept is None else f" ({each.kept:.0%})"
        layers.setdefault(layer, []).append(f"{name} {each.relative_error:.4f}{kept}")
    if layers:
        lines.append("experts rounded to MXFP4: relative error (and how much of their change is kept)")
        lines += [f"  layer {layer:>3}  {'  '.join(layers[layer])}" for layer in sorted(layers, key=int)]
    shares = [each.kept for each in done.rounding.values() if each.kept is not None]
    if shares and sum(shares) / len(shares) < _LITTLE_KEPT:
        lines.append(
            "Most of what training changed in the experts is smaller than the steps of MXFP4 and is rounded away. "
            "Serve the adapter un-merged (ossia serve --adapter), export it as bf16, or train with fake_quant."
        )
    if done.divergence is not None:
        found = done.divergence
        lines.append(
            f"KL to the unrounded model, over {found.num_positions} positions of {found.source}: mean "
            f"{found.mean_kl:.2e}, largest {found.max_kl:.2e} nats; the same likeliest token at {found.same_top:.0%}"
        )
    return "\n".join(lines)
