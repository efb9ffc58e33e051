"""The engine that samples for training, and how it gets the weights that were trained.

    LoRA   the checkpoint as it lies on the disk, and the pairs beside it as an adapter that is replaced after each step
    full   weights of the engine over the very memory of the trained parameters, or packed from it anew

Both take milliseconds for a small model. What was cached belongs to the old weights and is forgotten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ossia import ops as backends
from ossia.engine import Engine, EngineConfig, Runner
from ossia.harmony import Tokenizer
from ossia.model.transformer import Layer, Weights
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import AdapterOps, ExpertArrays, Ops
from ossia.train.fit import lora_config
from ossia.train.lora import to_adapter
from ossia.train.module import Model
from ossia.train.rollout_config import RolloutSettings
from ossia.train.shards import to_numpy

# The engine's name of the pairs that are trained.
_ADAPTER = "trained"


class Actor:
    """An engine with the weights of a model that is being trained; `update` makes them those of now."""

    def __init__(self, path: Path, settings: RolloutSettings, model: Model) -> None:
        checkpoint = Checkpoint.open(path)
        self.tokenizer: Tokenizer = checkpoint.tokenizer()
        self._model = model
        self._ops = make_ops(settings)
        self._lora = lora_config(settings) if settings.trainable == "lora" else None
        self.adapter = None if self._lora is None else _ADAPTER
        weights = engine_weights(model, self._ops) if self._lora is None else load_weights(checkpoint, self._ops)
        options = engine_options(settings, record_routing=settings.replay)
        runner = Runner(self._ops, checkpoint.config, weights, options)
        self.engine = Engine(runner, token_bytes=self.tokenizer.token_bytes)

    def update(self) -> None:
        """Take over the model's weights."""
        if self._lora is None:
            self.engine.replace_weights(engine_weights(self._model, self._ops))
        else:
            self.engine.load_adapter(to_adapter(self._model.weights, self._lora, _ADAPTER))


def make_ops(settings: RolloutSettings) -> AdapterOps:
    """The backend that samples."""
    if settings.backend == "reference":
        return backends.load("reference")
    # torchrun gives each of several processes its share of a machine's threads, or one.
    threads = settings.threads or (torch.get_num_threads() if torch.distributed.is_torchelastic_launched() else None)
    return backends.load("cpu", threads=threads, dense=settings.dense, kv=settings.kv)


def engine_options(settings: RolloutSettings, *, record_routing: bool) -> EngineConfig:
    """Memory and sizes of an engine for rollouts."""
    return EngineConfig(
        kv_memory_bytes=settings.kv_memory_bytes,
        max_num_seqs=settings.concurrent,
        max_batch_tokens=max(512, settings.concurrent),
        record_routing=record_routing,
    )


def engine_weights(model: Model, ops: Ops) -> Weights:
    """The weights of a fully trained model for an engine's backend; matrices stay where they are if they can."""
    trained = model.weights

    def vector(one: Any) -> Any:
        return ops.vector(_array(one.value))

    def linear(one: Any) -> Any:
        return ops.linear_weights(_array(one.weight_OI), None if one.bias_O is None else _array(one.bias_O))

    def experts(one: Any) -> Any:
        # The policy that samples computes with what the trainer computes with.
        rounded = (lambda weight: weight) if one.fake_quant is None else one.fake_quant
        gate_up, down = _array(rounded(one.gate_up_EFD)), _array(rounded(one.down_EDF))
        bias = _array(one.gate_up_bias_EF)
        size = bias.shape[1] // 2
        return ops.experts(
            ExpertArrays(
                gate=gate_up[:, :size],
                up=gate_up[:, size:],
                down=down,
                gate_bias_EF=bias[:, :size],
                up_bias_EF=bias[:, size:],
                down_bias_ED=_array(one.down_bias_ED),
            )
        )

    layers = tuple(
        Layer(
            attention_norm_D=vector(layer.attention_norm_D),
            q=linear(layer.q),
            k=linear(layer.k),
            v=linear(layer.v),
            o=linear(layer.o),
            sinks_Q=vector(layer.sinks_Q),
            moe_norm_D=vector(layer.moe_norm_D),
            router=linear(layer.router),
            experts=experts(layer.experts),
        )
        for layer in trained.layers
    )
    return Weights(
        embedding=ops.embedding(_array(trained.embedding.table_VD)),
        layers=layers,
        final_norm_D=vector(trained.final_norm_D),
        unembedding=linear(trained.unembedding),
    )


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    return to_numpy(tensor)
