"""What every backend is tested with: one line per case, and a word why it exists.

Shapes: see `ossia.ops`. Arrays are made from the case's own numbers by a seeded generator.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import ml_dtypes
import numpy as np

from ossia.ops import Q8, Batch, ExpertArrays, ExpertLoras, LoraPair, Mxfp4

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


@dataclass(frozen=True)
class Case:
    why: str

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def rng(self) -> np.random.Generator:
        numbers = [getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), int)]
        return np.random.default_rng([abs(int(n)) for n in numbers if n is not None])


@dataclass(frozen=True)
class Linear(Case):
    T: int
    O: int  # noqa: E741
    I: int  # noqa: E741
    dtype: Any = BF16  # "q8_0": GGUF's blocks, strided as in a file
    bias: bool = True
    outliers: float = 1.0  # some inputs are that much larger

    def arrays(self) -> tuple[np.ndarray, Any, np.ndarray | None]:
        rng = self.rng()
        x = rng.standard_normal((self.T, self.I)).astype(F32)
        x[:, rng.integers(self.I, size=3)] *= self.outliers
        weight = rng.standard_normal((self.O, self.I)).astype(F32) / np.sqrt(self.I)
        bias = rng.standard_normal(self.O).astype(BF16) if self.bias else None
        return x, q8_0(weight) if self.dtype == "q8_0" else weight.astype(self.dtype), bias


LINEAR = [
    Linear("T=1", 1, 320, 256),
    Linear("router, few rows, exact", 5, 32, 288),
    Linear("float32 weights", 3, 264, 96, F32),
    Linear("float16 weights", 3, 264, 96, F16),
    Linear("q8_0 weights", 4, 264, 96, "q8_0"),
    Linear("q8_0, fewer rows than a tile", 3, 5, 64, "q8_0"),
    Linear("no bias", 2, 300, 64, bias=False),
    Linear("rows not a multiple of the tile", 2, 301, 64),
    Linear("inputs not a multiple of 32", 3, 300, 45),
    Linear("fewer inputs than a vector", 3, 9, 5),
    Linear("T a little above the token tile", 67, 272, 64),
    Linear("T of two tiles and a half", 160, 258, 128),
    Linear("long rows", 2, 260, 4096),
    Linear("outliers x20", 6, 320, 256, outliers=20.0),
    Linear("one row, one input", 1, 1, 1),
]


@dataclass(frozen=True)
class Moe(Case):
    T: int
    E: int
    A: int
    D: int
    F: int
    matrices: str = "mxfp4"  # mxfp4 | halves | float32 | bfloat16 | transposed
    down: str = ""  # as `matrices` when empty
    scales: tuple[int, int] = (118, 127)
    few: int = 0  # tokens choose among so many experts only
    outliers: float = 1.0
    gain: float = 1.0
    limit: float = 7.0

    def arrays(self) -> tuple[np.ndarray, np.ndarray, ExpertArrays]:
        rng = self.rng()
        x = (rng.standard_normal((self.T, self.D)) * self.gain).astype(F32)
        x[:, rng.integers(self.D, size=2)] *= self.outliers
        logits = rng.standard_normal((self.T, self.E)).astype(F32)
        if self.few:
            logits[:, self.few :] -= 100
        gate, up = self._gate_up(rng, self.matrices)
        down = self._stack(rng, self.down or self.matrices, self.D, self.F)
        biases = (rng.standard_normal((self.E, n)).astype(BF16) for n in (self.F, self.F, self.D))
        return x, logits, ExpertArrays(gate, up, down, *biases)

    def _gate_up(self, rng: np.random.Generator, kind: str) -> tuple[Any, Any]:
        if kind == "halves":
            return self._stack(rng, kind, self.F, self.D), self._stack(rng, kind, self.F, self.D)
        both = self._stack(rng, kind, 2 * self.F, self.D)  # rows interleaved, as in the published checkpoints
        if isinstance(both, Mxfp4):
            return tuple(Mxfp4(both.blocks[:, i::2], both.scales[:, i::2], both.order) for i in (0, 1))
        return both[:, 0::2], both[:, 1::2]

    def _stack(self, rng: np.random.Generator, kind: str, rows: int, cols: int) -> Any:
        if kind in ("mxfp4", "halves"):
            shape = (self.E, rows, cols // 32)
            # As in a GGUF file: 17 bytes a block, the scale first. Both views are strided.
            file = rng.integers(0, 256, (*shape, 17), dtype=np.uint8)
            file[..., 0] = rng.integers(*self.scales, shape)
            if kind == "halves":
                return Mxfp4(file[..., 1:], file[..., 0], "halves")
            return Mxfp4(np.ascontiguousarray(file[..., 1:]), np.ascontiguousarray(file[..., 0]))
        numbers = rng.standard_normal((self.E, rows, cols)) / np.sqrt(cols)
        if kind == "transposed":
            return np.ascontiguousarray(numbers.swapaxes(1, 2)).astype(BF16).swapaxes(1, 2)
        return numbers.astype(BF16 if kind == "bfloat16" else F32)


MOE = [
    Moe("T=1", 1, 8, 2, 64, 96),
    Moe("T=2", 2, 8, 2, 64, 96),
    Moe("T=5", 5, 4, 4, 96, 64),
    Moe("one expert gets more than a token tile", 150, 4, 2, 64, 64, few=2),
    Moe("expert without tokens", 9, 16, 2, 64, 64, few=3),
    Moe("all experts active", 3, 4, 4, 64, 64),
    Moe("more tokens than a pass takes", 1030, 4, 1, 32, 32),
    Moe("blocks not a multiple of eight", 4, 4, 2, 288, 320),
    Moe("gguf order and strides", 4, 4, 2, 288, 96, "halves"),
    Moe("outliers x20", 6, 4, 2, 256, 128, outliers=20.0),
    Moe("beyond the swiglu limit", 6, 4, 2, 64, 64, gain=30.0),
    Moe("scale 0", 3, 4, 2, 64, 64, scales=(0, 2), gain=1e30),
    Moe("large scales in down", 3, 4, 2, 64, 64, "float32", "mxfp4", scales=(236, 245)),
    Moe("float32 experts", 7, 4, 2, 64, 96, "float32"),
    Moe("float32, odd sizes", 7, 4, 2, 45, 37, "float32"),
    Moe("float32, sizes below a vector", 2, 3, 2, 3, 5, "float32"),
    Moe("bfloat16 experts", 7, 4, 2, 64, 96, "bfloat16"),
    Moe("transposed experts", 7, 4, 2, 64, 96, "transposed"),
    Moe("mxfp4 gate and up, float down", 20, 4, 2, 288, 96, "mxfp4", "float32"),
    Moe("float gate and up, mxfp4 down", 20, 4, 2, 64, 288, "float32", "mxfp4"),
]


@dataclass(frozen=True)
class Lora(Case):
    """Tokens of one batch spread over adapters of these ranks; 0: an adapter without a part here."""

    T: int
    O: int  # noqa: E741
    I: int  # noqa: E741
    ranks: tuple[int, ...]
    dtype: Any = F32
    E: int = 0  # experts: each adapter has a pair for gate, up and down, gate and up sharing their a
    A: int = 2

    def pair(self, rng: np.random.Generator, outputs: int, inputs: int, rank: int) -> LoraPair:
        stack = (self.E,) if self.E else ()
        a = rng.standard_normal((*stack, rank, inputs)) / np.sqrt(inputs)
        b = rng.standard_normal((*stack, outputs, rank)) / np.sqrt(rank)
        return LoraPair(a.astype(self.dtype), b.astype(self.dtype), float(rng.uniform(0.5, 2)))

    def pairs(self) -> list[LoraPair | None]:
        rng = self.rng()
        return [self.pair(rng, self.O, self.I, rank) if rank else None for rank in self.ranks]

    def experts(self) -> list[ExpertLoras | None]:
        rng = self.rng()
        made: list[ExpertLoras | None] = []
        for rank in self.ranks:
            gate, up, down = (
                self.pair(rng, outputs, inputs, max(1, rank))
                for outputs, inputs in ((self.O, self.I), (self.O, self.I), (self.I, self.O))
            )
            up = up._replace(a=gate.a, scaling=gate.scaling)
            made.append(ExpertLoras(gate, up, down) if rank else None)
        return made

    def lora_T(self) -> np.ndarray:
        """None and each adapter by turns, in runs as sequences are."""
        turns = np.arange(self.T) % (len(self.ranks) + 1) - 1
        return np.repeat(turns, self.rng().integers(1, 5, self.T))[: self.T].astype(np.int32)


LORA = [
    Lora("one adapter", 5, 300, 64, (8,)),
    Lora("many adapters of many ranks", 70, 300, 96, (8, 1, 3, 16, 5)),
    Lora("some have no part here", 40, 257, 64, (0, 4, 0)),
    Lora("bfloat16", 30, 320, 64, (8, 2), BF16),
    Lora("float16", 30, 320, 64, (8, 2), F16),
    Lora("a router", 20, 8, 45, (4, 2)),
    Lora("rank above the inputs", 6, 300, 32, (40,)),
]
EXPERT_LORA = [
    Lora("experts", 9, 96, 64, (4,), E=4),
    Lora("experts of many adapters", 150, 96, 64, (2, 5, 1), E=3),
    Lora("experts in bfloat16", 20, 64, 96, (4, 0), BF16, E=4),
    Lora("experts of odd sizes", 12, 37, 45, (3, 2), E=4),
]


@dataclass(frozen=True)
class Attention(Case):
    """Sequences as (keys already cached, new tokens)."""

    sequences: tuple[tuple[int, int], ...]
    window: int | None = None
    S: int = 32
    Q: int = 8
    K: int = 2
    H: int = 16
    sink: float = 0.0

    def batch(self) -> Batch:
        starts = np.cumsum([0] + [new for _, new in self.sequences])
        positions = np.concatenate([np.arange(old, old + new) for old, new in self.sequences])
        lengths = np.array([old + new for old, new in self.sequences])
        width = -(-lengths.max() // self.S) + 1
        table = np.full((len(lengths), width), -1)
        free = self.rng().permutation(self.num_blocks)
        for n, length in enumerate(lengths):
            used = -(-length // self.S)
            table[n, :used], free = free[:used], free[used:]
        window_table = table.copy()
        if self.window is not None:
            for n, (old, _) in enumerate(self.sequences):
                window_table[n, : max(0, old - self.window + 1) // self.S] = -1
        return Batch(
            *(a.astype(np.int32) for a in (np.zeros_like(positions), positions, starts, lengths, table, window_table)),
            logit_rows_R=np.array([0], np.int32),
        )

    @property
    def num_blocks(self) -> int:
        return sum(-(-(old + new) // self.S) for old, new in self.sequences) + 3

    def qkv(self, num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([seed, num_tokens])
        q, k, v = (
            rng.standard_normal((num_tokens, heads, self.H)).astype(BF16).astype(F32)
            for heads in (self.Q, self.K, self.K)
        )
        return 2 * q, k, v

    def sinks(self) -> np.ndarray:
        return np.random.default_rng(7).standard_normal(self.Q).astype(F32) + F32(self.sink)


ATTENTION = [
    Attention("T=1", ((0, 1),)),
    Attention("decode", ((40, 1),)),
    Attention("prefill", ((0, 50),)),
    Attention("a prompt continued", ((37, 20),)),
    Attention("many sequences, prefill and decode", ((5, 1), (0, 33), (100, 1), (64, 3))),
    Attention("window edge, decode", ((31, 1), (32, 1), (33, 1), (200, 1)), window=32),
    Attention("window edge, prefill", ((0, 100), (70, 5)), window=32),
    Attention("window of 1", ((3, 4),), window=1),
    Attention("window longer than the sequence", ((3, 4),), window=128),
    Attention("one key more than a tile", ((32, 1),)),
    Attention("more than one split", ((1500, 2), (511, 1), (512, 1))),
    Attention("few keys, many splits, several tokens", ((1100, 9),)),
    Attention("window across a split", ((520, 3),), window=128),
    Attention("blocks of 8", ((45, 6),), S=8),
    Attention("blocks of 24", ((45, 6),), S=24),
    Attention("published head shape", ((70, 3),), Q=64, K=8, H=64),
    Attention("one query head per key head", ((20, 10),), Q=3, K=3, H=8),
    Attention("odd group and head dim", ((20, 10),), Q=6, K=2, H=10),
    Attention("group above the lanes of a piece", ((4, 3),), Q=70, K=1, H=4),
    Attention("large sink", ((9, 5),), sink=50.0),
    Attention("no sink", ((9, 5),), sink=-np.inf),
]


def q8_0(weight: np.ndarray) -> Q8:
    """Round to GGUF's Q8_0, as strided views of 34-byte blocks."""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    scales = (np.abs(blocks).max(-1) / 127).astype(F16)
    values = np.rint(blocks / np.maximum(scales.astype(F32), 1e-30)[..., None]).clip(-127, 127)
    file = np.empty((*scales.shape, 34), np.uint8)
    file[..., :2] = scales[..., None].view(np.uint8)
    file[..., 2:] = values.astype(np.int8).view(np.uint8)
    raw = file.reshape(-1)
    strides = file.strides
    return Q8(
        np.ndarray((*scales.shape, 32), np.int8, raw, 2, strides), np.ndarray(scales.shape, F16, raw, 0, strides[:2])
    )
