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
from ossia.train.optimizers import Optimizer
from ossia.train.parallel import Team, extents
from ossia.train.run import load_parameters
from ossia.train.shards import local, read_shards, write_shard

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
    full = options["trainable"] == "full"
    with Team.join() as team:
        model = Model.open(
            options["model"],
            trainable=options["trainable"],
            lora=None if full else LORA,
            exchange=team.exchange,
            checkpoint_activations=options.get("recompute", True),
        )
        if not full:
            disturb(model)
        team.shard(model)
        parameters, held = model.state(), extents(model)
        optimizer = Optimizer(parameters.items(), kind=options.get("optimizer", "adamw"))
        if "resume" in options:
            load_parameters(parameters, read_shards(Path(options["resume"]), "trainable", held))
            optimizer.load_state(read_shards(Path(options["resume"]), "optimizer", held))
        losses, norms = [], []
        for _ in range(options["steps"]):
            optimizer.zero_grad()
            loss = 0.0
            batches = passes(options["passes"])
            weight = sum(len(batch.logit_rows_R) for batch in batches)
            for batch, counts in team.share(batches):
                targets = np.roll(batch.token_ids_T, -1).astype(np.int64)
                total = -model.logprobs(batch, targets).sum() * float(counts) / weight
                total.backward()
                loss += total.item()
            norms.append(float(team.total_norm(each.grad for each in parameters.values() if each.grad is not None)))
            losses.append(team.sums([loss])[0])
            optimizer.step(3e-3)
        if "save" in options:
            for name, tensors in (("trainable", parameters), ("optimizer", optimizer.state())):
                write_shard(Path(options["save"]), name, tensors, held, team.rank, team.size)
        packed = model.weights.layers[0].experts.packed_down
        return {
            "losses": losses,
            "norms": norms,
            # What evaluating leaves gathered must not be taken for a part.
            "held": int(team.sums([held_after_a_look(model)])[0]),
            "packed": None if packed is None else list(packed.blocks.shape),
            "rank": team.rank,
        }


def held_after_a_look(model: Model) -> int:
    """Numbers that this process holds, once the model has computed without gradients."""
    with torch.no_grad():
        model(passes(1)[0])
    return sum(local(each).numel() for each in model.state().values())


def disturb(model: Model) -> None:
    """Pairs that do something, the same whoever holds which part."""
    whole = {name: np.random.default_rng(i) for i, name in enumerate(model.state())}
    held = extents(model)
    with torch.no_grad():
        for name, parameter in model.state().items():
            if name.endswith(".b"):
                values = torch.from_numpy(whole[name].standard_normal(held[name].shape) * 0.1)
                parameter.copy_(held[name].of(values))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    result = run(given)
    if result["rank"] == 0:
        Path(given["out"]).write_text(json.dumps(result))
