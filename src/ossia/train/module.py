"""A model that learns: the weights of a checkpoint over `AutogradOps`, and the one forward pass of `model.transformer`.

Shapes: see `ossia.ops`. With "lora" the weights stay as they lie in the mapped checkpoint, experts packed, and pairs
beside them are trained; with "full" every weight is a parameter in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ossia.errors import InputError
from ossia.model import transformer
from ossia.model.config import ModelConfig
from ossia.model.transformer import Layer, Weights
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, Routing, Shared
from ossia.ops.autograd import AutogradOps, Exchange
from ossia.train.lora import LoraConfig, add_pairs, places
from ossia.train.quantize import fake_quantize

Trainable = Literal["lora", "full"]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Row(NamedTuple):
    """One line of the table of what is trained."""

    pattern: str  # layers.*.q.a
    num_tensors: int
    num_numbers: int
    share: float  # of all numbers of the model


class Model(nn.Module):
    """gpt-oss with gradients."""

    def __init__(
        self, config: ModelConfig, ops: AutogradOps, weights: Weights, *, checkpoint_activations: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.weights = weights
        self.checkpoint_activations = checkpoint_activations
        for layer in weights.layers:
            layer.router.dtype = ops.wide
        # The same modules again, so that torch knows them. A sublayer is a module of its own: what shards parameters
        # gathers those of one sublayer before it runs.
        self.embedding = weights.embedding
        self.layers = nn.ModuleList(_LayerModule(layer) for layer in weights.layers)
        self.final_norm = weights.final_norm_D
        self.unembedding = weights.unembedding

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trainable: Trainable = "lora",
        lora: LoraConfig | None = None,
        checkpoint_activations: bool = True,
        fake_quant: bool = False,
        seed: int = 0,
        exchange: Exchange | None = None,
    ) -> Self:
        """Open a checkpoint for training.

        ``dtype`` is that of matrix products and attention. With ``trainable`` "lora", new pairs after ``lora`` (its
        defaults if None) begin from ``seed``. With ``checkpoint_activations`` a layer's inputs are kept and the rest is
        computed again on the way back. With ``fake_quant`` an expert's matrix, with its pair added, is multiplied as an
        export to MXFP4 would keep it. With ``exchange`` this process holds its share of the experts alone
        (`ossia.train.parallel`). Raises NotFoundError and CheckpointError as `Checkpoint.open`, InputError for options
        that do not go together.
        """
        if trainable not in ("lora", "full"):
            raise InputError(f"trainable is {trainable!r}; expected one of: lora, full", param="trainable")
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype}; expected one of: {', '.join(map(str, DTYPES))}", param="dtype")
        if trainable == "full" and lora is not None:
            raise InputError("lora was given for a model whose weights are all trained; choose one", param="lora")
        source = Checkpoint.open(path)
        if exchange is not None and source.config.num_experts % exchange.size:
            raise InputError(
                f"{source.config.num_experts} experts cannot be shared among {exchange.size} processes alike; take a "
                "number that divides them"
            )
        ops = AutogradOps(
            dtype,
            device,
            trained=trainable == "full",
            keep_experts=not checkpoint_activations,
            fake_quant=fake_quantize if fake_quant else None,
            exchange=exchange,
        )
        model = cls(source.config, ops, load_weights(source, ops), checkpoint_activations=checkpoint_activations)
        if trainable == "lora":
            add_pairs(model.weights, lora or LoraConfig(), source.config.num_active_experts, seed)
        return model

    # Computing ------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, routing: Sequence[Routing] | None = None) -> Tensor:
        """logits_RV of the rows that the batch asks for, float32."""
        logits_RV = self.ops.linear(self._hidden(batch, routing), self.weights.unembedding)
        return logits_RV.to(self.ops.wide)

    def hidden(
        self, batch: Batch, routing: Sequence[Routing] | None = None, record: list[Routing] | None = None
    ) -> Tensor:
        """x_RD of the rows that the batch asks for, as the unembedding takes them.

        ``routing``, a choice of experts [T, A] for each layer, is taken in place of the router's own; its weights are
        not, they come from the router's logits. What was chosen is added to ``record``. A batch may hold numpy arrays.
        """
        return self._hidden(batch, routing, record)

    def _hidden(
        self, batch: Batch, routing: Sequence[Routing] | None = None, record: list[Routing] | None = None
    ) -> Tensor:
        if routing is not None and len(routing) != self.config.num_layers:
            raise InputError(f"routing is for {len(routing)} layers; the model has {self.config.num_layers}")
        ops: Any = self.ops
        if routing is not None or record is not None:
            ops = _RoutedOps(self.ops, routing, record)
        return transformer.hidden(ops, self.config, self.weights, self._on_device(batch), run=self._run)

    def logprobs(
        self,
        batch: Batch,
        targets_R: Any,
        routing: Sequence[Routing] | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """log p(targets_R) of the rows that the batch asks for, float32 [R]. All their logits never exist at once.

        ``targets_R`` are token ids, a numpy array or a tensor.
        """
        return self._logprobs(self._hidden(batch, routing), targets_R, temperature)

    def logprobs_of(self, x_RD: Tensor, targets_R: Any, temperature: float = 1.0) -> Tensor:
        """As `logprobs`, of rows that `hidden` gave."""
        return self._logprobs(x_RD, targets_R, temperature)

    # The public ones are wrapped where parameters are sharded, and must not call each other then.

    def _logprobs(self, x_RD: Tensor, targets_R: Any, temperature: float) -> Tensor:
        targets = torch.as_tensor(targets_R, dtype=torch.int64, device=self.ops.device)
        return self.ops.logprobs(x_RD, self.weights.unembedding, targets, temperature)

    def recorded_routing(self, batch: Batch) -> list[Routing]:
        """The experts that each token of the batch goes to, a routing per layer."""
        record: list[Routing] = []
        with torch.no_grad():
            self.hidden(batch, record=record)
        return record

    def _on_device(self, batch: Batch) -> Batch:
        def tensor(values: Any) -> Tensor:
            return torch.as_tensor(values, device=self.ops.device).long()

        return replace(
            batch,
            token_ids_T=tensor(batch.token_ids_T),
            positions_T=tensor(batch.positions_T),
            logit_rows_R=tensor(batch.logit_rows_R),
            shared=None if batch.shared is None else Shared(*map(tensor, batch.shared)),
        )

    def _run(self, index: int, sublayer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        is_attention = sublayer is transformer.attention
        layer: Any = self.layers[index]
        module = layer.attention if is_attention else layer.moe
        # Experts do for themselves what a checkpoint would: they keep their input and compute the rest again.
        if self.checkpoint_activations and is_attention and torch.is_grad_enabled():
            arguments, sublayer = (sublayer, *arguments), partial(checkpoint, use_reentrant=False)
        out: Tensor = module(sublayer, *arguments)
        return out

    # What is trained ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name: what a checkpoint keeps. Names are those of adapters, such as layers.3.q.a."""
        return dict(self._trained())

    def trainable_table(self) -> list[Row]:
        """What is trained, by all processes together, one row for the tensors of all layers."""
        of_experts = {
            t for layer in self.weights.layers for t in (*layer.experts.buffers(), *layer.experts.parameters())
        }
        num_holders = 1 if self.ops.exchange is None else self.ops.exchange.size

        def size(tensor: Tensor) -> int:
            return tensor.numel() * (num_holders if tensor in of_experts else 1)

        total = sum(map(size, (*self.buffers(), *self.parameters()))) + self._num_packed()
        rows: dict[str, list[int]] = {}
        for name, tensor in self._trained():
            row = rows.setdefault(_pattern(name), [0, 0])
            row[0] += 1
            row[1] += size(tensor)
        return [Row(pattern, count, numbers, numbers / total) for pattern, (count, numbers) in rows.items()]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for place in places(self.weights):
            if place.lora is not None:
                yield f"{place.name}.a", place.lora.a
                yield f"{place.name}.b", place.lora.b
        for prefix, module in _named_modules(self.weights):
            for attribute, parameter in module.named_parameters(recurse=False):
                yield prefix + _NAMES[attribute], parameter

    def _num_packed(self) -> int:
        config = self.config
        num_numbers = config.num_experts * config.hidden_size * config.intermediate_size
        experts = [layer.experts for layer in self.weights.layers]
        return num_numbers * sum(
            2 * (each.packed_gate_up is not None) + (each.packed_down is not None) for each in experts
        )


class _RoutedOps:
    """The operations of one pass whose experts are given, or noted, layer by layer."""

    def __init__(self, ops: AutogradOps, routing: Sequence[Routing] | None, record: list[Routing] | None) -> None:
        self._ops = ops
        self._routing = None if routing is None else iter(routing)
        self._record = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, logits_TE: Tensor, num_active: int) -> Routing:
        if self._routing is None:
            routing = self._ops.route(logits_TE, num_active)
        else:
            experts = next(self._routing).experts_TA
            experts_TA = torch.as_tensor(
                experts.astype(np.int64) if isinstance(experts, np.ndarray) else experts, device=self._ops.device
            ).long()
            if experts_TA.shape != (len(logits_TE), num_active):
                raise InputError(
                    f"routing has shape {list(experts_TA.shape)}; expected {num_active} experts for each of the "
                    f"batch's {len(logits_TE)} tokens"
                )
            routing = self._ops.replay(logits_TE, experts_TA)
        if self._record is not None:
            self._record.append(Routing(routing.experts_TA, routing.weights_TA.detach()))
        return routing


class _Sublayer(nn.Module):
    """The parameters of one sublayer, which are needed together."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, sublayer: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return sublayer(*arguments)


class _LayerModule(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.attention = _Sublayer(
            norm=layer.attention_norm_D, q=layer.q, k=layer.k, v=layer.v, o=layer.o, sinks=layer.sinks_Q
        )
        self.moe = _Sublayer(norm=layer.moe_norm_D, router=layer.router, experts=layer.experts)


# What a module's own parameters add to its name.
_NAMES = {
    "value": "",
    "table_VD": "",
    "weight_OI": ".weight",
    "bias_O": ".bias",
    "gate_up_EFD": ".gate_up",
    "down_EDF": ".down",
    "gate_up_bias_EF": ".gate_up_bias",
    "down_bias_ED": ".down_bias",
}


def _named_modules(weights: Weights) -> Iterator[tuple[str, nn.Module]]:
    yield "embedding", weights.embedding
    for i, layer in enumerate(weights.layers):
        for field, module in zip(Layer._fields, layer, strict=True):
            yield f"layers.{i}.{field.rpartition('_')[0] or field}", module
    yield "final_norm", weights.final_norm_D
    yield "unembedding", weights.unembedding


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
