"""`ossia bench`: how fast a model runs on this machine, beside what the machine allows."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from ossia.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from ossia.config import Config
    from ossia.engine.benchmark import Measurement
    from ossia.model.weights import Checkpoint

_READ_BYTES = 1 << 30


class _Plan(NamedTuple):
    """What is measured: the machine, how its limits are called, and each line of the table with its title."""

    machine: dict[str, Any]
    bytes_per_s: float
    macs_per_s: float
    heading: str
    lines: Iterable[tuple[str, Callable[[], Measurement]]]


def bench(
    model: options.Model = None,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, in tokens; empty for none.")] = "32,512,4096",
    depth: Annotated[str, typer.Option(help="Tokens that a single sequence holds already.")] = "0,4096,16384",
    batch: Annotated[
        str | None,
        typer.Option(help="Numbers of sequences that go on together. [default: 2,4,8,16; up to 256 on a GPU]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Passes per line of decoding; the median counts.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Passes per line of prefill; the median counts.")] = 3,
    backend: Annotated[
        Literal["cpu", "gpu"] | None, typer.Option(help="C++ kernels, or Triton kernels on a GPU. [default: cpu]")
    ] = None,
    threads: options.Threads = None,
    dense: options.Dense = None,
    kv: options.KeysAndValues = None,
    kv_memory: options.KvMemory = None,
    gpu_memory: options.GpuMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure prefill, decoding and batches, as tokens per second and as a share of this machine's limits.

    Memory's limit is how fast these threads read a gigabyte, or a GPU copies one; arithmetic's is how fast they
    multiply 8-bit integers in registers, or a GPU matrices of its 16-bit type. Both are measured first, in the same
    run: other work on the machine lowers all numbers.
    """
    settings = options.settings_of(locals())
    from rich.console import Console

    from ossia import local
    from ossia.model.hub import resolve_model
    from ossia.model.weights import Checkpoint

    is_gpu = settings.backend == "gpu"
    if batch is None:
        batch = "2,4,8,16,32,64,128,256" if is_gpu else "2,4,8,16"
    settings = replace(settings, backend="gpu" if is_gpu else "cpu")
    asked = _Asked(
        _numbers("--prefill", prefill, at_least=1),
        _numbers("--depth", depth, at_least=0),
        _numbers("--batch", batch, at_least=1),
        steps,
        repeats,
    )
    local.tell_of_demonstration(settings)
    notes = Console(stderr=True, highlight=False)
    checkpoint = Checkpoint.open(resolve_model(settings.model))
    plan = (_on_card if is_gpu else _on_cpu)(settings, checkpoint, asked, notes)
    measurements = []
    for title, measure in plan.lines:
        with notes.status(title):
            measurements.append(measure())
    plan.machine["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if as_json:
        print(json.dumps({"machine": plan.machine, "measurements": [asdict(one) for one in measurements]}))
    else:
        _print_table(plan, measurements)


class _Asked(NamedTuple):
    lengths: list[int]
    depths: list[int]
    batches: list[int]
    num_steps: int
    repeats: int

    def lines(
        self, prefill: Callable[[int], Measurement], decode: Callable[[int, int], Measurement]
    ) -> Iterator[tuple[str, Callable[[], Measurement]]]:
        """``prefill`` of a length; ``decode`` with so many sequences at a depth."""
        for length in self.lengths:
            yield f"prefill {length}", partial(prefill, length)
        for depth in self.depths:
            yield f"decode at {depth}", partial(decode, 1, depth)
        for num_seqs in self.batches:
            yield f"decode x{num_seqs}", partial(decode, num_seqs, 0)


def _on_cpu(settings: Config, checkpoint: Checkpoint, asked: _Asked, notes: Console) -> _Plan:
    from ossia import local
    from ossia import ops as backends
    from ossia.engine import EngineConfig
    from ossia.engine.benchmark import CountingOps, first_pass, measure_decode, measure_prefill
    from ossia.engine.runner import Runner
    from ossia.model.weights import load_weights

    cpu: Any = backends.load("cpu", **local.backend_options(settings))
    with notes.status("measuring this machine"):
        bytes_per_s, macs_per_s = cpu.read_bandwidth(_READ_BYTES) * 1e9, cpu.integer_peak() * 1e9
    started_s = time.perf_counter()
    with notes.status("loading"):
        ops = CountingOps(cpu)
        weights = load_weights(checkpoint, ops)
        runner = Runner(ops, checkpoint.config, weights, EngineConfig(kv_memory_bytes=settings.kv_memory))
    loaded_s = time.perf_counter()
    # The first pass of all reads the weights from disk, or maps them.
    with notes.status("first token"):
        first_pass(runner)
    machine = {
        "processor": _processor(),
        "threads": cpu.threads,
        "isa": cpu.isa,
        "dense": cpu.dense,
        "kv": cpu.kv,
        "read_bytes_per_s": bytes_per_s,
        "integer_macs_per_s": macs_per_s,
        "load_s": loaded_s - started_s,
        "first_token_s": time.perf_counter() - started_s,
    }
    heading = (
        f"{machine['processor']}, {cpu.threads} thread(s), {cpu.isa}, dense {cpu.dense}\n"
        f"memory reads {bytes_per_s / 1e9:.1f} GB/s, integers multiply {macs_per_s / 1e9:.0f} GMAC/s, loaded in "
        f"{machine['load_s']:.1f} s, first token of a 32-token prompt after {machine['first_token_s']:.1f} s"
    )
    lines = asked.lines(
        lambda length: measure_prefill(runner, ops, length, repeats=asked.repeats),
        lambda num_seqs, depth: measure_decode(runner, ops, num_seqs, depth, num_steps=asked.num_steps),
    )
    return _Plan(machine, bytes_per_s, macs_per_s, heading, lines)


def _on_card(settings: Config, checkpoint: Checkpoint, asked: _Asked, notes: Console) -> _Plan:
    from ossia import ops as backends
    from ossia.engine import EngineConfig

    gpu: Any = backends.load("gpu")
    from ossia.engine.gpu_benchmark import CardBench, card_limits

    with notes.status("measuring this card"):
        machine = card_limits(gpu)
    started_s = time.perf_counter()
    with notes.status("loading"):
        config = EngineConfig(max_num_seqs=max(asked.batches, default=1), kv_memory_bytes=settings.kv_memory)
        card = CardBench(gpu, checkpoint, config, settings.gpu_memory)
    machine["load_s"] = time.perf_counter() - started_s
    bytes_per_s, macs_per_s = machine["copy_bytes_per_s"], machine["matrix_macs_per_s"]
    heading = (
        f"{machine['processor']}, kernels of {machine['variant']}\n"
        f"memory copies {bytes_per_s / 1e9:.1f} GB/s, matrices multiply {2 * macs_per_s / 1e12:.1f} TFLOP/s, loaded in "
        f"{machine['load_s']:.1f} s"
    )
    lines = asked.lines(
        lambda length: card.prefill(length, repeats=asked.repeats),
        lambda num_seqs, depth: card.decode(num_seqs, depth, num_steps=asked.num_steps),
    )
    return _Plan(machine, bytes_per_s, macs_per_s, heading, lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _numbers(flag: str, text: str, *, at_least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1]
    if any(number < at_least for number in numbers):
        expected = f"expected whole numbers, {at_least} or more, with commas between, such as 32,512"
        raise typer.BadParameter(f"{text!r}; {expected}", param_hint=flag)
    return numbers


def _print_table(plan: _Plan, measurements: list[Measurement]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"{plan.heading}, peak memory {plan.machine['peak_memory_gib']:.1f} GiB")
    table = Table("", "tokens/s", "of memory's limit", "of arithmetic's limit")
    for column in table.columns[1:]:
        column.justify = "right"
    for one in measurements:
        table.add_row(
            one.name,
            f"{one.tokens_per_s:.1f}",
            f"{one.share_of_bandwidth(plan.bytes_per_s):.0%}",
            f"{one.share_of_arithmetic(plan.macs_per_s):.0%}",
        )
    Console(highlight=False, file=sys.stdout).print(table)
