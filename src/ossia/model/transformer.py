"""The forward pass of gpt-oss, top to bottom, over any backend's operations. Shapes: see `ossia.ops`.

    x = embed(tokens)
    every layer:  x += attention(rms_norm(x));  x += mixture_of_experts(rms_norm(x))
    logits = unembed(rms_norm(x))

Source: the gpt-oss model card, arXiv:2508.10925, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ossia.model.config import ModelConfig
from ossia.ops import Array, Batch, Ops


class Layer(NamedTuple):
    """One layer's weights, each as its backend holds it."""

    attention_norm_D: Array
    q: Any
    k: Any
    v: Any
    o: Any
    sinks_Q: Array
    moe_norm_D: Array
    router: Any
    experts: Any


class Weights(NamedTuple):
    embedding: Any
    layers: tuple[Layer, ...]
    final_norm_D: Array
    unembedding: Any


def new_caches(
    ops: Ops, config: ModelConfig, num_full_blocks: int, num_window_blocks: int, block_size: int
) -> list[Any]:
    """The paged key/value memory, one per layer; full and sliding-window layers may have pools of different size."""
    return [
        ops.kv_cache(
            num_full_blocks if config.window(i) is None else num_window_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        for i in range(config.num_layers)
    ]


def forward(
    ops: Ops, config: ModelConfig, weights: Weights, batch: Batch, caches: Sequence[Any] | None = None
) -> Array:
    """logits_RV of the rows that the batch asks for; keys and values of all its tokens are added to ``caches``.

    ``caches`` None: every sequence attends to its own tokens of the batch.
    """
    return ops.linear(hidden(ops, config, weights, batch, caches), weights.unembedding)


def hidden(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    batch: Batch,
    caches: Sequence[Any] | None = None,
    run: Callable[..., Array] | None = None,
) -> Array:
    """x_RD of the rows that the batch asks for, as the unembedding takes them; the rest as in `forward`.

    Training gives ``run``: called with the number of the layer, the function of a sublayer and its arguments, it
    returns what the function would, and decides what is kept for the way back.
    """
    run = run or _run
    x_TD = ops.embed(weights.embedding, batch.token_ids_T)
    rope = ops.rope_angles(batch.positions_T, config.rope.inv_freq(config.head_dim), config.rope.concentration)
    for i, layer in enumerate(weights.layers):
        cache = None if caches is None else caches[i]
        x_TD = x_TD + run(i, attention, ops, config, layer, x_TD, rope, cache, batch, config.window(i))
        x_TD = x_TD + run(i, mixture_of_experts, ops, config, layer, x_TD)
    return ops.rms_norm(x_TD[batch.logit_rows_R], weights.final_norm_D, config.rms_norm_eps)


def _run(layer: int, sublayer: Callable[..., Array], *arguments: Any) -> Array:
    return sublayer(*arguments)


def attention(
    ops: Ops,
    config: ModelConfig,
    layer: Layer,
    x_TD: Array,
    rope: tuple[Array, Array],
    cache: Any,
    batch: Batch,
    window: int | None,
) -> Array:
    """What the first sublayer adds to x_TD."""
    num_tokens, head_dim = x_TD.shape[0], config.head_dim
    normed_TD = ops.rms_norm(x_TD, layer.attention_norm_D, config.rms_norm_eps)
    q_TQH = ops.linear(normed_TD, layer.q).reshape(num_tokens, config.num_heads, head_dim)
    k_TKH = ops.linear(normed_TD, layer.k).reshape(num_tokens, config.num_kv_heads, head_dim)
    v_TKH = ops.linear(normed_TD, layer.v).reshape(num_tokens, config.num_kv_heads, head_dim)
    q_TQH, k_TKH = ops.rope(q_TQH, *rope), ops.rope(k_TKH, *rope)
    o_TQH = ops.attention(q_TQH, k_TKH, v_TKH, layer.sinks_Q, cache, batch, window)
    return ops.linear(o_TQH.reshape(num_tokens, config.num_heads * head_dim), layer.o)


def mixture_of_experts(ops: Ops, config: ModelConfig, layer: Layer, x_TD: Array) -> Array:
    """What the second sublayer adds to x_TD."""
    normed_TD = ops.rms_norm(x_TD, layer.moe_norm_D, config.rms_norm_eps)
    routing = ops.route(ops.linear(normed_TD, layer.router), config.num_active_experts)
    return ops.moe(normed_TD, routing, layer.experts, config.swiglu_limit)
