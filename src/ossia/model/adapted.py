"""A model's weights for one batch in which some tokens go through adapters: what the forward pass then reads.

    held = hold_adapter(ops, read_adapter(path, config))        once
    forward(ops, config, adapt(weights, batch), batch, caches)              for a batch whose `adapters` name it

Only what an adapter changes is replaced, by `ossia.ops.Adapted`; a batch without adapters takes the weights as they
are.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ossia.errors import CheckpointError
from ossia.model.adapter import Adapter
from ossia.model.transformer import Layer, Weights
from ossia.model.weights import Checkpoint
from ossia.ops import Q8, Adapted, AdapterOps, Array, Batch, ExpertLoras, LoraPair

_DENSE = ("q", "k", "v", "o", "router")
_COMPARED_ROWS = 16_384
_EXPERTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class HeldAdapter:
    """An adapter as a backend holds it."""

    name: str
    # By "layers.3.q" and so on; the experts of a layer are one, "layers.3.experts".
    loras: Mapping[str, Any]
    size_bytes: int
    # Keys and values are this adapter's own: one that is read again under the same name may be another.
    cache_key: bytes


def hold_adapter(ops: AdapterOps, adapter: Adapter) -> HeldAdapter:
    """Copy an adapter into a backend's memory."""
    loras: dict[str, Any] = {}
    for key, pair in adapter.pairs.items():
        layer, _, part = key.rpartition(".experts.")
        if part not in _EXPERTS:
            loras[key] = ops.lora(pair)
        elif f"{layer}.experts" not in loras:
            of_layer: list[LoraPair | None] = [adapter.pairs.get(f"{layer}.experts.{name}") for name in _EXPERTS]
            loras[f"{layer}.experts"] = ops.expert_loras(ExpertLoras(*of_layer))
    return HeldAdapter(adapter.name, loras, held_bytes(adapter), secrets.token_bytes(16))


def held_bytes(adapter: Adapter) -> int:
    """The memory that an adapter takes when it is held: 2 bytes a number where a pair is bfloat16, else 4."""
    arrays: dict[int, int] = {}
    for pair in adapter.pairs.values():
        width = 2 if all(array.dtype.name == "bfloat16" for array in (pair.a, pair.b)) else 4
        # Gate and up of one file share their a.
        arrays |= {id(array): array.size * width for array in (pair.a, pair.b)}
    return sum(arrays.values())


def adapt(weights: Weights, batch: Batch, send: Callable[[Array], Array] = lambda rows: rows) -> Weights:
    """The weights for a batch whose sequences go through the adapters that it names.

    ``send`` takes the number of each row's adapter to where the weights are.
    """
    adapters = list(dict.fromkeys(one for one in batch.adapters if one is not None))
    if not adapters:
        return weights
    index_N = np.array([-1 if one is None else adapters.index(one) for one in batch.adapters], np.int32)
    adapter_T = np.repeat(index_N, np.diff(batch.query_starts_N1))
    # Once for all layers.
    sent_T, sent_R = send(adapter_T), send(adapter_T[batch.logit_rows_R])

    def change(held: Any, key: str, lora_T: Array = sent_T) -> Any:
        loras = tuple(adapter.loras.get(key) for adapter in adapters)
        return Adapted(held, loras, lora_T) if any(lora is not None for lora in loras) else held

    def layer(i: int, own: Layer) -> Layer:
        prefix = f"layers.{i}."
        changed = {name: change(getattr(own, name), prefix + name) for name in (*_DENSE, "experts")}
        return own._replace(**changed)

    return weights._replace(
        embedding=change(weights.embedding, "embedding"),
        layers=tuple(layer(i, own) for i, own in enumerate(weights.layers)),
        unembedding=change(weights.unembedding, "unembedding", sent_R),
    )


def check_base_copies(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where an adapter brings an embedding or unembedding other than its model's own.

    PEFT writes these into the adapter's file whenever they are among its targets.
    """
    if not adapter.base_copies:
        return
    outer = checkpoint.layout.outer(checkpoint.array)
    for key, copy in adapter.base_copies.items():
        own = outer.embedding_VD if key == "embedding" else outer.unembedding_VD
        if isinstance(own, Q8):
            raise CheckpointError(
                f"adapter {adapter.name!r} brings a copy of the model's {key}, which cannot be compared with this "
                "model's 8 bits. Save it with PEFT's save_embedding_layers=False."
            )
        for start in range(0, len(copy), _COMPARED_ROWS):
            rows = slice(start, start + _COMPARED_ROWS)
            if not np.allclose(copy[rows].astype(np.float32), own[rows].astype(np.float32), rtol=1e-2, atol=1e-5):
                raise CheckpointError(
                    f"adapter {adapter.name!r} brings another {key} than the model's own (rows from {start}): it was "
                    "made for another model, or trained the whole matrix. Merge it into its model with PEFT."
                )
