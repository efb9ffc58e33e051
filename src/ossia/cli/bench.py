"""`ossia bench`: how fast a model runs on this machine, beside what the machine allows."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossia.cli import options

if TYPE_CHECKING:
    from ossia.engine.benchmark import CountingOps, Measurement
    from ossia.engine.runner import Runner

_READ_BYTES = 1 << 30


def bench(
    model: options.Model = None,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, in tokens; empty for none.")] = "32,512,4096",
    depth: Annotated[str, typer.Option(help="Tokens that a single sequence holds already.")] = "0,4096,16384",
    batch: Annotated[str, typer.Option(help="Numbers of sequences that go on together.")] = "2,4,8,16",
    steps: Annotated[int, typer.Option(min=1, help="Passes per line of decoding; the median counts.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Passes per line of prefill; the median counts.")] = 3,
    threads: options.Threads = None,
    dense: options.Dense = None,
    kv: options.KeysAndValues = None,
    kv_memory: options.KvMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure prefill, decoding and batches, as tokens per second and as a share of this machine's limits.

    Memory's limit is how fast these threads read a gigabyte; arithmetic's is how fast they multiply 8-bit integers in
    registers. Both are measured first, in the same run: other work on the machine lowers all numbers.
    """
    settings = options.settings_of(locals())
    from rich.console import Console

    from ossia import local
    from ossia import ops as backends
    from ossia.engine import EngineConfig
    from ossia.engine.benchmark import CountingOps, first_pass
    from ossia.engine.runner import Runner
    from ossia.model.hub import resolve_model
    from ossia.model.weights import Checkpoint, load_weights

    lengths, depths, batches = _numbers("--prefill", prefill), _numbers("--depth", depth), _numbers("--batch", batch)
    settings = replace(settings, backend="cpu")
    local.tell_of_demonstration(settings)
    notes = Console(stderr=True, highlight=False)
    cpu = backends.load("cpu", **local.backend_options(settings))
    with notes.status("measuring this machine"):
        machine = _machine(cpu)
    started_s = time.perf_counter()
    with notes.status("loading"):
        checkpoint = Checkpoint.open(resolve_model(settings.model))
        ops = CountingOps(cpu)
        weights = load_weights(checkpoint, ops)
        runner = Runner(ops, checkpoint.config, weights, EngineConfig(kv_memory_bytes=settings.kv_memory))
    machine["load_s"] = time.perf_counter() - started_s
    # The first pass of all reads the weights from disk, or maps them.
    with notes.status("first token"):
        first_pass(runner)
    machine["first_token_s"] = time.perf_counter() - started_s
    measurements = []
    for title, measure in _plan(runner, ops, lengths, depths, batches, steps, repeats):
        with notes.status(title):
            measurements.append(measure())
    machine["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if as_json:
        print(json.dumps({"machine": machine, "measurements": [asdict(one) for one in measurements]}))
    else:
        _print_table(machine, measurements)


def _plan(
    runner: Runner,
    ops: CountingOps,
    lengths: list[int],
    depths: list[int],
    batches: list[int],
    num_steps: int,
    repeats: int,
) -> Iterator[tuple[str, Callable[[], Measurement]]]:
    from ossia.engine.benchmark import measure_decode, measure_prefill

    for length in lengths:
        yield f"prefill {length}", partial(measure_prefill, runner, ops, length, repeats=repeats)
    for depth in depths:
        yield f"decode at {depth}", partial(measure_decode, runner, ops, 1, depth, num_steps=num_steps)
    for num_seqs in batches:
        yield f"decode x{num_seqs}", partial(measure_decode, runner, ops, num_seqs, 0, num_steps=num_steps)


def _machine(cpu: Any) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "threads": cpu.threads,
        "isa": cpu.isa,
        "dense": cpu.dense,
        "kv": cpu.kv,
        "read_bytes_per_s": cpu.read_bandwidth(_READ_BYTES) * 1e9,
        "integer_macs_per_s": cpu.integer_peak() * 1e9,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise typer.BadParameter(
            f"{text!r}; expected whole numbers with commas between, such as 32,512", param_hint=flag
        )
    return numbers


def _print_table(machine: dict[str, Any], measurements: list[Measurement]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{machine['processor']}, {machine['threads']} thread(s), {machine['isa']}, dense {machine['dense']}")
    print(
        f"memory reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s, integers multiply "
        f"{machine['integer_macs_per_s'] / 1e9:.0f} GMAC/s, loaded in {machine['load_s']:.1f} s, first token of a "
        f"32-token prompt after {machine['first_token_s']:.1f} s, peak memory {machine['peak_memory_gib']:.1f} GiB"
    )
    table = Table("", "tokens/s", "of memory's limit", "of arithmetic's limit")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in measurements:
        table.add_row(
            one.name,
            f"{one.tokens_per_s:.1f}",
            f"{one.share_of_bandwidth(machine['read_bytes_per_s']):.0%}",
            f"{one.share_of_arithmetic(machine['integer_macs_per_s']):.0%}",
        )
    Console(highlight=False, file=sys.stdout).print(table)
