"""Experts that do not fit a card: some layers' lie in pinned host memory and come over the bus when they are needed.

    few tokens      fewer pairs of token and expert than a layer has experts: the chosen experts alone are read, by a
                    kernel that learns on the device which they are, so that such a pass can be recorded
    many tokens     the whole layer is copied, into one buffer while the products read the other
    adapters        likewise the whole layer: their pairs go by the layer's own numbers

What is computed is what `GpuOps` computes, in the same order: only the place that weights are read from differs.
Shapes: see `ossia.ops`; C chosen experts, at most as many as there are pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ossia.ops import Adapted, Array, ExpertArrays, Routing
from ossia.ops.autograd import as_tensor
from ossia.ops.gpu import Experts, GpuOps
from ossia.ops.triton.fetch import fetch
from ossia.ops.triton.moe import Matrices


class HostExperts(NamedTuple):
    """The experts of a layer in the host's memory; biases are on the card."""

    # Among the layers that lie there.
    number: int
    held: Experts


class _Buffer(NamedTuple):
    """Room on the card for the experts of one layer."""

    gate: Matrices
    up: Matrices
    down: Matrices
    arrived: torch.cuda.Event | None


class OffloadOps(GpuOps):
    """`GpuOps` that keep the experts of some layers with the host.

    ``is_on_card`` tells of each layer, in the order in which `experts` is called; ``num_buffers`` is 2, or 1 where the
    card has no room for a second: then products wait for each copy.
    """

    def __init__(self, ops: GpuOps, is_on_card: Sequence[bool], num_buffers: int) -> None:
        super().__init__(
            cast(Literal["bfloat16", "float16", "float32"], str(ops.dtype).removeprefix("torch.")), ops.variant
        )
        self._is_on_card = tuple(is_on_card)
        self._num_held = 0
        self._num_buffers = num_buffers
        self._buffers: list[_Buffer] = []
        self._layers: list[HostExperts] = []
        self._copying = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        # The layer whose copy into its buffer was begun ahead of its products.
        self._coming: int | None = None

    def experts(self, arrays: ExpertArrays) -> Experts | HostExperts:  # type: ignore[override]
        is_on_card = self._is_on_card[self._num_held]
        self._num_held += 1
        if is_on_card:
            return super().experts(arrays)
        gate, up, down = (self._matrices(each, self._on_host) for each in (arrays.gate, arrays.up, arrays.down))
        biases = (self.vector(each) for each in (arrays.gate_bias_EF, arrays.up_bias_EF, arrays.down_bias_ED))
        layer = HostExperts(len(self._layers), Experts(gate, up, down, *biases))
        self._layers.append(layer)
        if len(self._buffers) < self._num_buffers:
            event = None if self._copying is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._buffers.append(_Buffer(self._like(gate), self._like(up), self._like(down), event))
        return layer

    def moe(self, x_TD: Tensor, routing: Routing, experts: Any, limit: float) -> Tensor:
        layer = experts.weights if isinstance(experts, Adapted) else experts
        if not isinstance(layer, HostExperts):
            return super().moe(x_TD, routing, experts, limit)
        if isinstance(experts, Adapted):
            return super().moe(x_TD, routing, experts._replace(weights=self._whole(layer)), limit)
        if routing.experts_TA.numel() < len(layer.held.down_bias_ED):
            return super().moe(x_TD, *self._chosen(routing, layer.held), limit)
        return super().moe(x_TD, routing, self._whole(layer), limit)

    # Few tokens -----------------------------------------------------------------------------------------------------

    def _chosen(self, routing: Routing, host: Experts) -> tuple[Routing, Experts]:
        """The experts that some token goes to, one after the other on the card, and the routing by their places."""
        experts_TA = routing.experts_TA.long()
        num_experts, num_places = len(host.down_bias_ED), experts_TA.numel()
        is_chosen_E = torch.zeros(num_experts, dtype=torch.int64, device=self.device)
        is_chosen_E.scatter_(0, experts_TA.flatten(), 1)
        place_E = is_chosen_E.cumsum(0) - 1
        # Experts that no token goes to share a place behind all others.
        chosen_C = torch.full((num_places + 1,), -1, dtype=torch.int64, device=self.device)
        chosen_C.scatter_(
            0, torch.where(is_chosen_E > 0, place_E, num_places), torch.arange(num_experts, device=self.device)
        )
        chosen_C = chosen_C[:num_places]
        room, of_bias_C = self._buffers[0], chosen_C.clamp(min=0)
        chosen = Experts(
            self._fetched(host.gate, room.gate, chosen_C),
            self._fetched(host.up, room.up, chosen_C),
            self._fetched(host.down, room.down, chosen_C),
            *(bias[of_bias_C] for bias in host[3:]),
        )
        return Routing(place_E[experts_TA].int(), routing.weights_TA), chosen

    def _fetched(self, host: Matrices, room: Matrices, chosen_C: Tensor) -> Matrices:
        values, scales = room.values[: len(chosen_C)], None
        fetch(host.values, values, chosen_C)
        if host.scales is not None and room.scales is not None:
            scales = room.scales[: len(chosen_C)]
            fetch(host.scales, scales, chosen_C)
        return Matrices(values, scales, host.is_halves)

    # Many tokens ----------------------------------------------------------------------------------------------------

    def _whole(self, layer: HostExperts) -> Experts:
        """All experts of a layer on the card; those of the next layer begin to come."""
        if self._coming != layer.number:
            self._bring(layer)
        self._coming = None
        following = layer.number + 1
        if self._num_buffers > 1 and following < len(self._layers):
            self._bring(self._layers[following])
            self._coming = following
        gate, up, down, arrived = self._buffers[layer.number % self._num_buffers]
        if arrived is not None:
            torch.cuda.current_stream().wait_event(arrived)
        return Experts(gate, up, down, *layer.held[3:])

    def _bring(self, layer: HostExperts) -> None:
        """Begin to copy a layer into its buffer, once what was launched before has read that."""
        gate, up, down, arrived = self._buffers[layer.number % self._num_buffers]
        if self._copying is not None:
            self._copying.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copying) if self._copying is not None else nullcontext():
            for room, host in zip((gate, up, down), layer.held[:3], strict=True):
                room.values.copy_(host.values, non_blocking=True)
                if room.scales is not None and host.scales is not None:
                    room.scales.copy_(host.scales, non_blocking=True)
            if arrived is not None:
                arrived.record(self._copying)

    # Memory ---------------------------------------------------------------------------------------------------------

    def _on_host(self, values: Array, dtype: torch.dtype) -> Tensor:
        source = as_tensor(np.asarray(values))
        held = torch.empty(source.shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        return held.copy_(source)

    def _like(self, matrices: Matrices) -> Matrices:
        values = torch.empty_like(matrices.values, device=self.device)
        scales = None if matrices.scales is None else torch.empty_like(matrices.scales, device=self.device)
        return Matrices(values, scales, matrices.is_halves)
