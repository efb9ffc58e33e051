"""A step of LoRA fine-tuning: ossia against transformers with peft, in turn, on the same weights, tokens and targets.

    python benchmarks/train.py [--targets all|attention] [--precision float32|bfloat16] [--rounds 3] [--json FILE]
    python benchmarks/train.py --shape 20b [--model FOLDER]        ossia alone, one step of the true shape
    python benchmarks/train.py --device cuda ...                   on a GPU; not run on one yet

Small: four layers of gpt-oss's proportions, 4 documents of 256 tokens, every token trained, rank 8 for all. Ossia
reads the published MXFP4 layout; transformers reads the same numbers as floats, as its own dequantisation makes them.
peft adapts the experts by `target_parameters`. Each side is a process of its own; each round gives it one warm-up step
and some that are timed: forward, backward, AdamW. Told: tokens per second (median of all timed steps), the largest
resident memory of the process, and their ratios. Tokens per second of CPU time, which other programs on the machine
disturb less, mean something with `--threads 1`. `--experts` is transformers' way to compute experts.

20b: 24 layers, 512 tokens, rank 8, and 2 for each expert; packed experts mapped from the checkpoint. Told apart: memory
of the process's own (anonymous) and pages of the mapped file, which the system can take back at any time; on a GPU the
most memory of the card that was in use.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.ops import Batch

SMALL = ModelConfig(
    num_layers=4,
    hidden_size=768,
    intermediate_size=768,
    num_heads=16,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=32_768,
    num_experts=32,
    num_active_experts=4,
    sliding_window=128,
    stop_token_ids=(32_767,),
    pad_token_id=0,
)
RANK, ALPHA = 8, 16
ATTENTION = ("q", "k", "v", "o")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["small", "20b"], default="small")
    parser.add_argument("--model", type=Path, help="a checkpoint of the 20b shape; made anew when not given")
    parser.add_argument("--layers", type=int, help="layers of a 20b checkpoint that is made anew")
    parser.add_argument("--targets", choices=["all", "attention"], default="all")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--documents", type=int, help="4, or 1 with --shape 20b")
    parser.add_argument("--tokens", type=int, help="of each document: 256, or 512 with --shape 20b")
    parser.add_argument("--experts", choices=["eager", "grouped_mm", "batched_mm"], default="grouped_mm")
    parser.add_argument("--recompute", action="store_true", help="both sides compute activations again")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--folder", type=Path, help="where the small checkpoints are kept; not kept when not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["ossia", "peft"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_small = arguments.shape == "small"
    arguments.documents = arguments.documents or (4 if is_small else 1)
    arguments.tokens = arguments.tokens or (256 if is_small else 512)
    if arguments.side:
        print(json.dumps(run_ossia(arguments) if arguments.side == "ossia" else run_peft(arguments)))
    elif arguments.shape == "20b":
        report(run_20b(arguments), arguments.json)
    else:
        report(compare(arguments), arguments.json)


def report(result: dict[str, Any], path: Path | None) -> None:
    print(json.dumps(result, indent=1))
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


# Small: both sides in turn --------------------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        models = {"ossia": folder / "packed", "peft": folder / "floats"}
        for side, layout in (("ossia", "hf"), ("peft", "hf-bf16")):
            if not models[side].exists():
                write_random_checkpoint(models[side], SMALL, layout=layout)
        rounds: dict[str, list[dict[str, Any]]] = {"ossia": [], "peft": []}
        for i in range(arguments.rounds):
            for side in sorted(rounds, reverse=i % 2 == 1):
                rounds[side].append(in_process(side, models[side], arguments))
                print(side, rounds[side][-1], file=sys.stderr)
    speed, cpu_speed = (
        {side: statistics.median(s for one in met for s in one[name]) for side, met in rounds.items()}
        for name in ("tokens_per_s", "tokens_per_cpu_s")
    )
    memory = {side: max(one["peak_bytes"] for one in met) for side, met in rounds.items()}
    losses = {side: met[0]["losses"] for side, met in rounds.items()}
    return {
        "shape": f"{SMALL.num_layers} layers of {SMALL.hidden_size}, {SMALL.num_experts} experts, "
        f"{arguments.documents} x {arguments.tokens} tokens",
        "targets": arguments.targets,
        "precision": arguments.precision,
        "device": arguments.device,
        "threads": arguments.threads,
        "recompute": arguments.recompute,
        "experts of transformers": arguments.experts,
        "tokens_per_s": {side: round(value, 1) for side, value in speed.items()},
        "speed_ratio": round(speed["ossia"] / speed["peft"], 2),
        "tokens_per_cpu_s": {side: round(value, 1) for side, value in cpu_speed.items()},
        "cpu_ratio": round(cpu_speed["ossia"] / cpu_speed["peft"], 2),
        "peak_MiB": {side: round(value / 2**20) for side, value in memory.items()},
        "memory_ratio": round(memory["ossia"] / memory["peft"], 2),
        "losses": losses,
    }


def in_process(side: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["targets", "precision", "documents", "tokens", "experts", "device", "threads", "steps"]
    command = [sys.executable, __file__, "--side", side, "--model", str(model)]
    command += [word for name in options for word in (f"--{name}", str(getattr(arguments, name)))]
    command += ["--recompute"] if arguments.recompute else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_ossia(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ossia.train.lora import LoraConfig
    from ossia.train.module import Model

    torch.set_num_threads(arguments.threads)
    targets = ATTENTION if arguments.targets == "attention" else (*ATTENTION, "experts")
    model = Model.open(
        arguments.model,
        device=arguments.device,
        dtype=getattr(torch, arguments.precision),
        lora=LoraConfig(rank=RANK, alpha=ALPHA, targets=targets, expert_rank=RANK),
        checkpoint_activations=arguments.recompute,
    )
    ids = token_ids(arguments.documents, arguments.tokens, model.config.vocab_size)
    batch, wanted = packed(ids), ids[:, 1:].reshape(-1)
    optimizer = torch.optim.AdamW(model.state().values(), lr=1e-4)

    def step() -> float:
        loss = -model.logprobs(batch, wanted).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return timed(step, ids.size, arguments.steps)


def run_peft(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    model = transformers.GptOssForCausalLM.from_pretrained(
        arguments.model,
        dtype=getattr(torch, arguments.precision),
        attn_implementation="eager",
        experts_implementation=arguments.experts,
    )
    if arguments.recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    of_experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if arguments.targets == "all" else []
    model = get_peft_model(
        model,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=of_experts or None,
        ),
    ).train()
    model.to(arguments.device)
    ids = token_ids(arguments.documents, arguments.tokens, model.config.vocab_size)
    inputs = torch.from_numpy(ids).to(arguments.device)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return timed(step, ids.size, arguments.steps)


def timed(step: Any, num_tokens: int, num_steps: int) -> dict[str, Any]:
    losses, seconds, cpu_seconds = [step()], [], []
    for _ in range(num_steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "tokens_per_s": [round(num_tokens / each, 1) for each in seconds],
        "tokens_per_cpu_s": [round(num_tokens / each, 1) for each in cpu_seconds],
        "peak_bytes": card_peak() or memory("VmHWM"),
        "losses": [round(loss, 4) for loss in losses],
    }


def card_peak() -> int:
    """Bytes of a card that were in use at most; 0 where none was used."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def token_ids(documents: int, tokens: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (documents, tokens))


def packed(ids: np.ndarray) -> Batch:
    """The documents one after the other; the logits of all rows but the last of each."""
    documents, tokens = ids.shape
    rows = np.arange(ids.size).reshape(ids.shape)[:, :-1].reshape(-1)
    none = np.full((documents, 0), -1, np.int32)
    return Batch(
        ids.reshape(-1).astype(np.int32),
        np.tile(np.arange(tokens, dtype=np.int32), documents),
        np.arange(0, ids.size + 1, tokens, dtype=np.int32),
        np.full(documents, tokens, np.int32),
        none,
        none,
        rows.astype(np.int32),
    )


# The true shape -------------------------------------------------------------------------------------------------------


def run_20b(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.model:
        return step_20b(arguments, arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        return step_20b(arguments, write_random_checkpoint(Path(folder) / "20b", "20b", num_layers=arguments.layers))


def step_20b(arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    import torch

    from ossia.train.lora import LoraConfig
    from ossia.train.module import Model

    torch.set_num_threads(arguments.threads)
    watch = MemoryWatch()
    start = time.perf_counter()
    model = Model.open(
        path,
        device=arguments.device,
        dtype=getattr(torch, arguments.precision),
        lora=LoraConfig(rank=RANK, alpha=ALPHA),
    )
    opened_s = time.perf_counter() - start
    # As many tokens as asked for, in one document.
    ids = token_ids(
        1, arguments.documents * arguments.tokens if arguments.documents != 4 else 512, model.config.vocab_size
    )
    batch, wanted = packed(ids), ids[:, 1:].reshape(-1)
    optimizer = torch.optim.AdamW(model.state().values(), lr=1e-4)
    start = time.perf_counter()
    loss = -model.logprobs(batch, wanted).mean()
    loss.item()
    forward_s = time.perf_counter() - start
    loss.backward()
    backward_s = time.perf_counter() - start - forward_s
    optimizer.step()
    if card_peak():
        torch.cuda.synchronize()
    step_s = time.perf_counter() - start
    peaks = watch.stop() | ({"card": card_peak()} if card_peak() else {})
    return {
        "shape": f"{model.config.num_layers} layers of gpt-oss-20b, {ids.size} tokens",
        "precision": arguments.precision,
        "threads": arguments.threads,
        "trained numbers": sum(parameter.numel() for parameter in model.state().values()),
        "loss": loss.item(),
        "seconds": {
            "open": round(opened_s, 1),
            "forward": round(forward_s, 1),
            "backward": round(backward_s, 1),
            "step": round(step_s, 1),
        },
        "tokens_per_s": round(ids.size / step_s, 2),
        "peak_GiB": {name: round(value / 2**30, 2) for name, value in peaks.items()},
    }


MEMORY = {"total": "VmRSS", "anonymous": "RssAnon", "mapped files": "RssFile"}


class MemoryWatch:
    """The largest values of resident memory while something runs: all, the process's own, pages of mapped files."""

    def __init__(self) -> None:
        self._peaks = dict.fromkeys(MEMORY, 0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stopped.set()
        self._thread.join()
        return self._peaks | {"high-water mark": memory("VmHWM")}

    def _watch(self) -> None:
        while not self._stopped.wait(0.05):
            for name, field in MEMORY.items():
                self._peaks[name] = max(self._peaks[name], memory(field))


def memory(field: str) -> int:
    """Bytes of a line of this process's status."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
