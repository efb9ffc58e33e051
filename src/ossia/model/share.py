"""What one of several processes holds of a model that they compute together: views of the same mapped checkpoint.

    attention       query heads with their key/value heads and sinks: rows of q, k and v, inputs of o
    experts         a part of every expert's intermediate size: rows of gate and up, inputs of down
    unembedding     rows of the vocabulary
    the rest        whole: norms, router, and the embedding, of which a token reads one row

What all processes' sublayers add to x is then a sum over the processes. Biases of that sum belong to the first.

Experts are not dealt out whole: a token's few experts seldom fall to all processes alike, and one that got most of
them keeps the others waiting. Parts of the intermediate size are whole blocks of MXFP4 (32 numbers): 2880 are 90
blocks, of which four processes have 22 or 23.

Shapes  see `ossia.ops`.
Source  Megatron-LM, arXiv:1909.08053, section 3: columns of the first matrix, rows of the second, one sum.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ossia.errors import ConfigError
from ossia.model.adapter import Adapter
from ossia.model.config import ModelConfig
from ossia.model.layouts import Dense, LayerArrays, ModelArrays
from ossia.model.weights import Arrays
from ossia.ops import Q8, Array, ExpertArrays, LoraPair, Mxfp4

# Numbers along an input that share a scale.
_BLOCK = 32


class Share:
    """The arrays of process ``rank`` of ``size``; an `ossia.model.weights.Arrays`.

    ``config`` is that of the share: its heads and intermediate size are this process's. Raises ConfigError where the
    model cannot be shared among so many.
    """

    def __init__(self, model: Arrays, rank: int, size: int) -> None:
        self.whole = model.config
        self.rank, self.size = rank, size
        self._model = model
        _check(self.whole, size)
        self._num_heads = self.whole.num_heads // size
        self._num_kv_heads = self.whole.num_kv_heads // size
        # Numbers that are not in blocks may be of any count.
        block = math.gcd(_BLOCK, self.whole.intermediate_size)
        blocks = part(self.whole.intermediate_size // block, rank, size)
        self._inner = slice(blocks.start * block, blocks.stop * block)

    @property
    def config(self) -> ModelConfig:
        return replace(
            self.whole,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            intermediate_size=self._inner.stop - self._inner.start,
        )

    def outer(self) -> ModelArrays:
        arrays = self._model.outer()
        return arrays._replace(unembedding_VD=_rows(arrays.unembedding_VD, self._vocabulary))

    def layer(self, i: int) -> LayerArrays:
        arrays = self._model.layer(i)
        heads = self._heads(self._num_heads)
        experts = arrays.experts
        return arrays._replace(
            q=_dense_rows(arrays.q, heads),
            k=_dense_rows(arrays.k, self._heads(self._num_kv_heads)),
            v=_dense_rows(arrays.v, self._heads(self._num_kv_heads)),
            o=Dense(_inputs(arrays.o.weight_OI, heads), self._of_first(arrays.o.bias_O)),
            sinks_Q=arrays.sinks_Q[self.rank * self._num_heads : (self.rank + 1) * self._num_heads],
            experts=ExpertArrays(
                gate=_rows(experts.gate, self._inner),
                up=_rows(experts.up, self._inner),
                down=_inputs(experts.down, self._inner),
                gate_bias_EF=experts.gate_bias_EF[:, self._inner],
                up_bias_EF=experts.up_bias_EF[:, self._inner],
                down_bias_ED=self._of_first(experts.down_bias_ED),
            ),
        )

    def adapter(self, adapter: Adapter) -> Adapter:
        """The low-rank changes of this process's part of each matrix."""
        return replace(adapter, pairs={key: self._pair(key, pair) for key, pair in adapter.pairs.items()})

    def _pair(self, key: str, pair: LoraPair) -> LoraPair:
        name = key.rpartition(".")[2]
        if name in ("o", "down"):
            inputs = self._inner if name == "down" else self._heads(self._num_heads)
            return pair._replace(a=pair.a[..., inputs])
        rows = {
            "q": self._heads(self._num_heads),
            "k": self._heads(self._num_kv_heads),
            "v": self._heads(self._num_kv_heads),
            "gate": self._inner,
            "up": self._inner,
            "unembedding": self._vocabulary,
        }.get(name)
        return pair if rows is None else pair._replace(b=pair.b[..., rows, :])

    @property
    def _vocabulary(self) -> slice:
        return part(self.whole.vocab_size, self.rank, self.size)

    def _heads(self, num_heads: int) -> slice:
        """The rows of this process's heads, of which each has as many."""
        width = num_heads * self.whole.head_dim
        return slice(self.rank * width, (self.rank + 1) * width)

    def _of_first(self, bias: Array) -> Array:
        return bias if self.rank == 0 else np.zeros_like(bias)


def part(count: int, rank: int, size: int) -> slice:
    """Which of ``count`` things are of process ``rank``: as many for each as can be, in order."""
    return slice(count * rank // size, count * (rank + 1) // size)


def _check(config: ModelConfig, size: int) -> None:
    if config.num_kv_heads % size:
        counts = [str(n) for n in range(2, config.num_kv_heads + 1) if config.num_kv_heads % n == 0]
        raise ConfigError(
            f"{config.num_kv_heads} key/value heads cannot be shared among {size} processes alike; start "
            f"{' or '.join(counts) or '1'}",
            param="tp",
        )
    num_blocks = config.intermediate_size // math.gcd(_BLOCK, config.intermediate_size)
    if num_blocks < size:
        raise ConfigError(
            f"experts of {config.intermediate_size} numbers are {num_blocks} block(s), which cannot be shared among "
            f"{size} processes; start at most {num_blocks}",
            param="tp",
        )


def _dense_rows(dense: Dense, rows: slice) -> Dense:
    return Dense(_rows(dense.weight_OI, rows), dense.bias_O[rows])


def _rows(matrix: Mxfp4 | Q8 | Array, rows: slice) -> Mxfp4 | Q8 | Array:
    """Some outputs of a matrix [.., O, I], as a view."""
    if isinstance(matrix, Mxfp4):
        return matrix._replace(blocks=matrix.blocks[..., rows, :, :], scales=matrix.scales[..., rows, :])
    if isinstance(matrix, Q8):
        return Q8(matrix.values[..., rows, :, :], matrix.scales[..., rows, :])
    return matrix[..., rows, :]


def _inputs(matrix: Mxfp4 | Q8 | Array, inputs: slice) -> Mxfp4 | Q8 | Array:
    """Some inputs of a matrix [.., O, I], as a view."""
    if not isinstance(matrix, Mxfp4 | Q8):
        return matrix[..., inputs]
    if inputs.start % _BLOCK or inputs.stop % _BLOCK:
        raise ConfigError(
            f"heads that are {inputs.stop - inputs.start} numbers wide cut through the blocks of {_BLOCK} that this "
            "file keeps its matrices in; start fewer processes, or take a checkpoint in bfloat16",
            param="tp",
        )
    blocks = slice(inputs.start // _BLOCK, inputs.stop // _BLOCK)
    if isinstance(matrix, Mxfp4):
        return matrix._replace(blocks=matrix.blocks[..., blocks, :], scales=matrix.scales[..., blocks])
    return Q8(matrix.values[..., blocks, :], matrix.scales[..., blocks])
