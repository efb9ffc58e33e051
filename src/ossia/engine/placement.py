"""What of a model lies on a card and what with the host, from sizes and a bound alone.

    everything fits     experts of all layers on the card; keys and values get the rest
    else                experts of some layers with the host, spread evenly, so that copying them has time between; on
                        the card buffers for two of these, or for one; keys and values get what was asked for

Experts give way and not keys and values where a card holds all but a few tokens of these.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ossia.engine.block_manager import blocks_in_window
from ossia.engine.config import EngineConfig
from ossia.engine.runner import max_context, num_window_layers
from ossia.errors import UnavailableError
from ossia.model.config import ModelConfig
from ossia.model.layouts import Dense
from ossia.model.weights import Arrays
from ossia.ops import Q8, Mxfp4

# Tokens of one sequence that a card must hold to be of use.
_LEAST_TOKENS = 4096
_NUMBER_BYTES, _VECTOR_BYTES = 2, 4


class ModelBytes(NamedTuple):
    """Bytes of a model on a card: all but the experts' matrices, and those of one layer."""

    dense: int
    layer_experts: int


class Placement(NamedTuple):
    """Where things lie."""

    # Of each layer.
    is_on_card: tuple[bool, ...]
    # Layers of experts that there is room for besides.
    num_buffers: int
    kv_bytes: int
    host_bytes: int


def place(model: ModelBytes, num_layers: int, room: int, least_kv: int, wanted_kv: int) -> Placement:
    """Where the experts of each layer lie, with ``room`` bytes on the card for weights, keys and values together.

    Keys and values get no less than ``least_kv`` bytes, and ``wanted_kv`` if there are as many. Raises UnavailableError
    where dense weights, one layer's experts and the least keys and values do not fit.
    """
    left = room - model.dense
    if left >= num_layers * model.layer_experts + least_kv:
        return Placement((True,) * num_layers, 0, left - num_layers * model.layer_experts, 0)
    for num_buffers in (2, 1):
        over = left - num_buffers * model.layer_experts
        if over >= least_kv:
            for_kv = min(max(least_kv, wanted_kv), over)
            num_on_card = min((over - for_kv) // model.layer_experts, num_layers - 1)
            is_on_card = tuple(
                (i + 1) * num_on_card // num_layers > i * num_on_card // num_layers for i in range(num_layers)
            )
            return Placement(
                is_on_card,
                num_buffers,
                over - num_on_card * model.layer_experts,
                (num_layers - num_on_card) * model.layer_experts,
            )
    needed = model.dense + model.layer_experts + least_kv
    raise UnavailableError(
        f"the model does not fit the GPU, even with its experts in the host's memory: dense weights take "
        f"{_gib(model.dense)}, one layer's experts {_gib(model.layer_experts)}, and keys and values at least "
        f"{_gib(least_kv)}; that is {_gib(needed)}, and beside the work of a pass there are {_gib(max(room, 0))}. Free "
        "the card of other programs, give more with --gpu-memory, or use --backend cpu."
    )


def model_bytes(model: Arrays) -> ModelBytes:
    """The bytes that `ossia.ops.gpu.GpuOps` holds a model in; no weight is read."""
    outer = model.outer()
    dense = _matrix(outer.embedding_VD) + _matrix(outer.unembedding_VD) + _vector(outer.final_norm_D)
    experts = 0
    for i in range(model.config.num_layers):
        layer = model.layer(i)
        experts = sum(_matrix(each) for each in layer.experts[:3])
        dense += sum(_vector(each) for each in layer.experts[3:])
        dense += sum(_dense(each) for each in (layer.q, layer.k, layer.v, layer.o))
        # Routers are float32.
        dense += 2 * _dense(layer.router)
        dense += sum(_vector(each) for each in (layer.attention_norm_D, layer.sinks_Q, layer.moe_norm_D))
    return ModelBytes(dense, experts)


def least_kv_bytes(config: ModelConfig, options: EngineConfig, layer_bytes: int) -> int:
    """Keys and values of one sequence of 4096 tokens, or of the context if that is shorter, however they are divided.

    ``layer_bytes`` are those of a block of one layer.
    """
    num_blocks = -(-min(_LEAST_TOKENS, max_context(config, options)) // options.block_size)
    num_windows = num_window_layers(config)
    full = num_blocks * (config.num_layers - num_windows) * layer_bytes
    window = blocks_in_window(config.sliding_window, options.block_size) * num_windows * layer_bytes
    # Windows may get a quarter of the memory.
    return max(full + window, -(-4 * full // 3))


def _dense(dense: Dense) -> int:
    return _matrix(dense.weight_OI) + _vector(dense.bias_O)


def _matrix(matrix: Any) -> int:
    if isinstance(matrix, Mxfp4):
        return int(matrix.blocks.nbytes + matrix.scales.nbytes)
    if isinstance(matrix, Q8):
        return _NUMBER_BYTES * int(np.prod(matrix.shape))
    return _NUMBER_BYTES * int(matrix.size)


def _vector(values: Any) -> int:
    return _VECTOR_BYTES * int(values.size)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
