"""LoRA: which matrices get a pair, how pairs begin, and how they come and go as an adapter's folder.

    y = W x + scaling * b (a x)     a [.., r, I] random, b [.., O, r] zero: training begins at the model as it is

    target        matrices                                            pair's rank
    q k v o       of every attention                                  rank
    experts       gate and up (one a for both) and down, per expert   expert_rank
    router        the choice of experts                               rank
    embedding     tokens in                                           rank
    unembedding   tokens out                                          rank

Source: LoRA, arXiv:2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ossia.errors import InputError
from ossia.model.adapter import Adapter
from ossia.model.transformer import Weights
from ossia.ops import LoraPair
from ossia.ops.autograd import Embedding, Experts, Linear, Lora

TARGETS = ("q", "k", "v", "o", "experts", "router", "embedding", "unembedding")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Which matrices get a pair, and of what size."""

    # Columns of a pair of a dense matrix.
    rank: int = 8
    # A pair's product is multiplied by alpha / rank, its own rank.
    alpha: float = 16.0
    # Some of q, k, v, o, experts, router, embedding, unembedding.
    targets: tuple[str, ...] = ("q", "k", "v", "o", "experts")
    # Columns of the pair of each expert, of which there are many; None: rank / experts per token, at least 1.
    expert_rank: int | None = None
    # The share of a dense pair's inputs that is dropped at each step; experts have none.
    dropout: float = 0.0
    # The layers whose matrices get one; None: all.
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.expert_rank is not None and self.expert_rank < 1):
            raise InputError(
                f"rank is {self.rank} and expert_rank {self.expert_rank}; expected at least 1", param="rank"
            )
        if not self.alpha > 0 or not math.isfinite(self.alpha):
            raise InputError(f"alpha is {self.alpha}; expected a number above 0", param="alpha")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; expected 0 up to below 1", param="dropout")
        if not self.targets:
            raise InputError(f"targets is empty; expected some of: {', '.join(TARGETS)}", param="targets")
        if unknown := [target for target in self.targets if target not in TARGETS]:
            raise InputError(
                f"target {', '.join(map(repr, unknown))} matches nothing; expected some of: {', '.join(TARGETS)}",
                param="targets",
            )

    def rank_of_experts(self, num_active: int) -> int:
        return max(1, self.rank // num_active) if self.expert_rank is None else self.expert_rank


class Place(NamedTuple):
    """Where a pair may stand: its name, the target that it belongs to, and the shape (.., O, I) of the matrix."""

    name: str
    target: str
    layer: int | None
    owner: nn.Module
    attribute: str
    shape: tuple[int, ...]

    @property
    def lora(self) -> Lora | None:
        return getattr(self.owner, self.attribute)


def places(weights: Weights) -> Iterator[Place]:
    """Every matrix that may have a pair, in the order of the forward pass."""
    embedding: Embedding = weights.embedding
    num_rows, width = embedding.table_VD.shape
    yield Place("embedding", "embedding", None, embedding, "lora", (width, num_rows))
    for i, layer in enumerate(weights.layers):
        for target in ("q", "k", "v", "o", "router"):
            linear: Linear = getattr(layer, target)
            yield Place(f"layers.{i}.{target}", target, i, linear, "lora", tuple(linear.weight_OI.shape))
        experts: Experts = layer.experts
        _, rows, width = experts.shape
        num_experts = experts.num_experts
        name = f"layers.{i}.experts"
        yield Place(f"{name}.gate_up", "experts", i, experts, "gate_up_lora", (num_experts, rows, width))
        yield Place(f"{name}.down", "experts", i, experts, "down_lora", (num_experts, width, rows // 2))
    unembedding: Linear = weights.unembedding
    yield Place("unembedding", "unembedding", None, unembedding, "lora", tuple(unembedding.weight_OI.shape))


def add_pairs(weights: Weights, config: LoraConfig, num_active_experts: int, seed: int = 0) -> None:
    """Put new pairs beside the matrices that ``config`` names; the model computes what it did before.

    Raises InputError when a target or a layer matches nothing.
    """
    num_layers = len(weights.layers)
    if config.layers is not None and (wrong := [i for i in config.layers if not 0 <= i < num_layers]):
        raise InputError(f"layers names {wrong}; expected numbers from 0 to {num_layers - 1}", param="layers")
    chosen = [place for place in places(weights) if _is_chosen(place, config)]
    found = {place.target for place in chosen}
    if missing := [target for target in config.targets if target not in found]:
        raise InputError(f"target {', '.join(missing)} matches no matrix in layers {config.layers}", param="targets")
    generator = torch.Generator().manual_seed(seed)
    for place in chosen:
        is_experts = place.target == "experts"
        rank = config.rank_of_experts(num_active_experts) if is_experts else config.rank
        *stack, num_outputs, num_inputs = place.shape
        # As a linear layer of the field begins: uniform with variance 1 / (3 inputs). A token picks one column of an
        # embedding's a, which has no inputs to add up.
        bound = 1.0 if place.target == "embedding" else 1 / math.sqrt(num_inputs)
        a = torch.empty(*stack, rank, num_inputs).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(*stack, num_outputs, rank)
        set_pair(place, a, b, config.alpha / rank, 0.0 if is_experts else config.dropout)


def set_pair(place: Place, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float = 0.0) -> None:
    """Put a pair beside a matrix, on the matrix's device, in float32; in float64 where the matrix is.

    The pair of a stack of experts is that of all of them; what belongs to experts of other processes is left out.
    """
    held = [tensor for tensor in (*place.owner.buffers(), *place.owner.parameters()) if tensor.is_floating_point()]
    dtype = torch.float64 if held[0].dtype == torch.float64 else torch.float32
    if isinstance(place.owner, Experts):
        own = slice(place.owner.first, place.owner.first + place.owner.shape[0])
        a, b = a[own].clone(), b[own].clone()
    a, b = (tensor.to(held[0].device, dtype) for tensor in (a, b))
    setattr(place.owner, place.attribute, Lora(a, b, scaling, dropout))


@contextmanager
def pairs_off(weights: Weights) -> Iterator[None]:
    """The model without its pairs, as it was before they were added."""
    held = [(place, place.lora) for place in places(weights) if place.lora is not None]
    try:
        for place, _ in held:
            setattr(place.owner, place.attribute, None)
        yield
    finally:
        for place, lora in held:
            setattr(place.owner, place.attribute, lora)


def to_adapter(
    weights: Weights, config: LoraConfig, name: str, whole: Mapping[str, torch.Tensor] | None = None
) -> Adapter:
    """The pairs as they are now, as float32 arrays of their own.

    ``whole`` are the pairs' tensors by their names in `Model.state`, where this process has but a part of them.
    """
    pairs: dict[str, LoraPair] = {}
    for place in places(weights):
        if place.lora is None:
            continue
        pair = (place.lora.a, place.lora.b) if whole is None else (whole[f"{place.name}.a"], whole[f"{place.name}.b"])
        a, b = (tensor.detach().to("cpu", torch.float32, copy=True).numpy() for tensor in pair)
        experts, _, part = place.name.rpartition(".")
        if part == "gate_up":
            for half, rows in zip(("gate", "up"), np.split(b, 2, axis=1), strict=True):
                pairs[f"{experts}.{half}"] = LoraPair(a, rows, place.lora.scaling)
        else:
            pairs[place.name] = LoraPair(a, b, place.lora.scaling)
    return Adapter(name, config.rank, config.alpha, pairs)


def set_adapter(weights: Weights, adapter: Adapter, dropout: float = 0.0) -> None:
    """Put the pairs of an adapter beside their matrices, to train on from there, and no others.

    Gate and up of an expert get one pair for both, whose rank is that of both together where each has an ``a`` of its
    own.
    """
    for place, pair in _placed(weights, adapter):
        setattr(place.owner, place.attribute, None)
        if pair is not None:
            a, b = (torch.from_numpy(np.array(values, np.float32)) for values in (pair.a, pair.b))
            assert (*b.shape[:-1], a.shape[-1]) == place.shape, f"{place.name} is {place.shape}"
            set_pair(place, a, b, pair.scaling, 0.0 if place.target == "experts" else dropout)


def take_scaling(weights: Weights, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The numbers of an adapter by their names in `Model.state`; their scaling is put beside the pairs that are there.

    For pairs that must stay the same objects, since what shards or moves them knows them. Raises InputError where the
    adapter has other pairs than the model.
    """
    numbers = {}
    for place, pair in _placed(weights, adapter):
        if (pair is None) != (place.lora is None):
            raise InputError(f"adapter {adapter.name} and this model do not both have a pair for {place.name}")
        if pair is not None and place.lora is not None:
            place.lora.scaling = pair.scaling
            for part, values in (("a", pair.a), ("b", pair.b)):
                numbers[f"{place.name}.{part}"] = torch.from_numpy(np.array(values, np.float32))
    return numbers


def _placed(weights: Weights, adapter: Adapter) -> Iterator[tuple[Place, LoraPair | None]]:
    """Every place with the adapter's pair for it. Raises InputError at the end where pairs are left."""
    rest = dict(adapter.pairs)
    for place in places(weights):
        experts, _, part = place.name.rpartition(".")
        if part == "gate_up":
            yield place, _gate_up(rest.pop(f"{experts}.gate", None), rest.pop(f"{experts}.up", None))
        else:
            yield place, rest.pop(place.name, None)
    if rest:
        raise InputError(f"adapter {adapter.name} has pairs that match nothing in this model: {', '.join(rest)}")


def _gate_up(gate: LoraPair | None, up: LoraPair | None) -> LoraPair | None:
    if gate is None or up is None:
        one = gate or up
        if one is None:
            return None
        rows = [one.b.astype(np.float32), np.zeros(one.b.shape, np.float32)]
        return LoraPair(one.a, np.concatenate(rows if up is None else rows[::-1], axis=1), one.scaling)
    if gate.scaling == up.scaling and np.array_equal(gate.a, up.a):
        return LoraPair(gate.a, np.concatenate([gate.b, up.b], axis=1), gate.scaling)
    num_experts, num_rows = gate.b.shape[:2]
    b = np.zeros((num_experts, 2 * num_rows, gate.rank + up.rank), np.float32)
    b[:, :num_rows, : gate.rank], b[:, num_rows:, gate.rank :] = gate.b, up.b * np.float32(up.scaling / gate.scaling)
    return LoraPair(np.concatenate([gate.a, up.a], axis=1), b, gate.scaling)


def _is_chosen(place: Place, config: LoraConfig) -> bool:
    in_layers = place.layer is None or config.layers is None or place.layer in config.layers
    return place.target in config.targets and in_layers
