"""One process of `test_parallel.py`: some steps on a small model, and what they came to.

python -m torch.distributed.run --nproc-per-node 2 parallel_worker.py JSON      or alone, without torchrun
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ossia.ops import Batch
from ossia.train.lora import LoraConfig
from ossia.train.module import Model
from ossia.train.parallel import Extent, Team, extents, local, read_shards, write_shard

LORA = LoraConfig(rank=4, targets=("q", "o", "experts", "router", "unembedding"), expert_rank=2)


def passes(count: int) -> list[Batch]:
    """Passes of different lengths, all rows trained."""
    made = []
    for i in range(count):
        rng = np.random.default_rng(i)
        lengths = rng.integers(5, 40, 2)
        total = int(lengths.sum())
        none = np.full((2, 0), -1, np.int32)
        made.append(
            Batch(
                rng.integers(0, 300, total).astype(np.int32),
                np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
                np.cumsum([0, *lengths]).astype(np.int32),
                lengths.astype(np.int32),
                none,
                none,
                np.arange(total, dtype=np.int32),
            )
        )
    return made


def run(options: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    team = Team.join()
    full = options["trainable"] == "full"
    model = Model.open(
        options["model"],
        trainable=options["trainable"],
        lora=None if full else LORA,
        exchange=team,
        checkpoint_activations=options.get("recompute", True),
    )
    if not full:
        disturb(model)
    if team is not None:
        team.shard(model)
    parameters = model.state()
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    if "resume" in options:
        load(Path(options["resume"]), model, optimizer)
    losses, norms = [], []
    for _ in range(options["steps"]):
        optimizer.zero_grad()
        loss = 0.0
        batches = passes(options["passes"])
        weight = sum(len(batch.logit_rows_R) for batch in batches)
        for batch, counts in [(each, True) for each in batches] if team is None else team.share(batches):
            targets = np.roll(batch.token_ids_T, -1).astype(np.int64)
            total = -model.logprobs(batch, targets).sum() * float(counts) / weight
            total.backward()
            loss += total.item()
        gradients = [each.grad for each in parameters.values() if each.grad is not None]
        if team is None:
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            losses.append(loss)
        else:
            norms.append(float(team.total_norm(gradients)))
            losses.append(team.sums([loss])[0])
        optimizer.step()
    if "save" in options:
        save(Path(options["save"]), model, optimizer, team)
    held = sum(local(each).numel() for each in parameters.values())
    packed = model.weights.layers[0].experts.packed_down
    result = {
        "losses": losses,
        "norms": norms,
        "held": held,
        "packed": None if packed is None else list(packed.blocks.shape),
    }
    if team is not None:
        result["held"] = int(team.sums([held])[0])
        team.leave()
    return result | {"rank": team.rank if team else 0}


def disturb(model: Model) -> None:
    """Pairs that do something, the same whoever holds which part."""
    whole = {name: np.random.default_rng(i) for i, name in enumerate(model.state())}
    held = extents(model)
    with torch.no_grad():
        for name, parameter in model.state().items():
            if name.endswith(".b"):
                first, shape = held[name]
                values = whole[name].standard_normal(shape) * 0.1
                parameter.copy_(torch.from_numpy(values[first : first + len(parameter)]))


def memories(model: Model, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Extent]]:
    held = extents(model)
    tensors, parts = {}, {}
    for name, parameter in model.state().items():
        for what in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}/{what}"] = optimizer.state[parameter][what]
            parts[f"{name}/{what}"] = held[name]
    return tensors, parts


def save(folder: Path, model: Model, optimizer: torch.optim.Optimizer, team: Team | None) -> None:
    alone = Team(0, 1, torch.device("cpu"), None)
    write_shard(folder, "trainable", model.state(), extents(model), team or alone)
    write_shard(folder, "optimizer", *memories(model, optimizer), team or alone)


def load(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    read_shards(folder, "trainable", model.state(), extents(model))
    for parameter in model.state().values():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(json.loads((folder / "step.json").read_text()))),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    read_shards(folder, "optimizer", *memories(model, optimizer))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = run(given)
    if result["rank"] == 0:
        Path(given["out"]).write_text(json.dumps(result))
