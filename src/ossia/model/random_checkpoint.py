"""Checkpoints with random weights in the true layouts: for tests, for benchmarks, for trying a machine out.

Every number comes from a stream of its own, seeded by the seed and the tensor's Hugging Face name: the same seed gives
the same bytes, and the same model in every layout. Memory stays small because tensors are written in pieces.

How the weights are scaled, so that activations stay of order one through all layers and logits are of order one:

    embedding                         standard deviation 1
    norms                             mean 1, standard deviation 0.1
    q, k, v, router, unembedding, o   1 / sqrt(number of inputs): inputs of order one give outputs of order one
    experts                           the same: codes are uniform over the 16 of E2M1, scales two neighbouring powers
                                      of two, mixed so that the mean square is right
    biases                            0.1
    sinks                             1

Each of the 2 L sublayers then adds about 0.5 in root mean square to the residual stream, which ends at about
sqrt(1 + L / 2): 3.6 for 24 layers. Logits have standard deviation 1, so a sampled token is any of the vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ossia.errors import InputError
from ossia.harmony.tokenizer import Tokenizer
from ossia.model.adapter import Adapter, matrix_shape
from ossia.model.checkpoint_writer import (
    SHARD_BYTES,
    Progress,
    Tensors,
    new_path,
    plan_shards,
    tensor_bytes,
    write_index,
    write_json,
    write_safetensors,
)
from ossia.model.config import ModelConfig
from ossia.model.config_file import RANDOM_WEIGHTS, generation_config, hugging_face_config, original_config
from ossia.model.layouts import BYTES, HF, SAFETENSORS, Layout, LayoutName
from ossia.ops import LoraPair, Mxfp4
from ossia.ops.mxfp4 import E2M1_VALUES, SCALE_BIAS, dequantize

ShapeName = Literal["tiny", "20b", "120b"]
SHAPES: dict[ShapeName, ModelConfig] = {
    # The true vocabulary; embedding and unembedding are nearly all of its 25 MB.
    "tiny": ModelConfig(
        num_layers=4, hidden_size=32, intermediate_size=64, num_heads=16, num_kv_heads=2, num_experts=8
    ),
    "20b": ModelConfig(),
    "120b": ModelConfig(num_layers=36, num_experts=128),
}

# Beyond every published model; the plan of files is made before the disk is looked at, and takes memory.
_MAX_LAYERS = 1000
_CHUNK_BYTES = 16 << 20
# config.json, index, headers and tokenizer.json together stay below this.
_SIDE_FILES_BYTES = 64 << 20


def write_random_checkpoint(
    out: str | Path,
    shape: ShapeName | ModelConfig,
    *,
    num_layers: int | None = None,
    seed: int = 0,
    layout: LayoutName = "hf",
    tokenizer_json: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint folder and return it; ``out`` appears when it is complete and not before.

    ``num_layers`` replaces the shape's own. The folder gets a tokenizer.json when ``tokenizer_json`` gives its text, or
    when the vocabulary is o200k_harmony's. "original" writes ``out``/original, as in the published repositories.
    Raises InputError when the shape is unknown or ``out`` is there and not empty, UnavailableError when the disk is too
    full.
    """
    out = Path(out)
    config = _config(shape, num_layers)
    if layout not in SAFETENSORS:
        raise InputError(f"unknown layout {layout!r}; expected one of: {', '.join(SAFETENSORS)}")
    tensors = _tensors(config, SAFETENSORS[layout])
    total_bytes = sum(map(tensor_bytes, tensors.values()))
    # original/ is one file in the published repositories.
    shards = plan_shards(tensors, total_bytes if layout == "original" else SHARD_BYTES)
    with new_path(out, total_bytes + _SIDE_FILES_BYTES) as partial:
        folder = partial / "original" if layout == "original" else partial
        folder.mkdir(parents=True)
        source = _Source(config, seed)
        done_bytes = 0

        def written(size_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)

        for file_name, shard in shards.items():
            write_safetensors(folder / file_name, shard, lambda name: source.pieces(name, layout), written)
        write_index(folder, shards)
        _write_side_files(partial, folder, config, layout, tokenizer_json)
    return out


def random_adapter(
    config: ModelConfig,
    *,
    rank: int = 8,
    expert_rank: int = 0,
    outer: bool = False,
    name: str = "random",
    seed: int = 0,
) -> Adapter:
    """An adapter of all attention matrices and routers, of the experts with ``expert_rank`` above 0, and with ``outer``
    of embedding and unembedding. What it adds is about a tenth of what it is added to.
    """
    parts = ["q", "k", "v", "o", "router", *(["experts.gate", "experts.up", "experts.down"] if expert_rank else [])]
    keys = [f"layers.{i}.{part}" for i in range(config.num_layers) for part in parts]
    pairs: dict[str, LoraPair] = {}
    for key in [*keys, *(["embedding", "unembedding"] if outer else [])]:
        *stack, num_outputs, num_inputs = matrix_shape(key, config) or ()
        of_key = np.random.default_rng([seed, zlib.crc32(key.encode())])
        r = expert_rank if ".experts." in key else rank
        deviation = 1.0 if key == "embedding" else 1 / math.sqrt(num_inputs)
        a = of_key.standard_normal((*stack, r, num_inputs), np.float32) * np.float32(deviation)
        if key.endswith(".up"):
            # One matrix for both, as in every adapter of PEFT's.
            a = pairs[key.removesuffix("up") + "gate"].a
        b = of_key.standard_normal((*stack, num_outputs, r), np.float32) * np.float32(0.1 / math.sqrt(r))
        pairs[key] = LoraPair(a, b, 1.0)
    return Adapter(name, rank, rank, pairs)


def _config(shape: ShapeName | ModelConfig, num_layers: int | None) -> ModelConfig:
    if isinstance(shape, str) and shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}; expected one of: {', '.join(SHAPES)}")
    config = shape if isinstance(shape, ModelConfig) else SHAPES[shape]
    if num_layers is not None:
        if not 1 <= num_layers <= _MAX_LAYERS:
            raise InputError(f"num_layers is {num_layers}; expected 1 to {_MAX_LAYERS}")
        config = replace(config, num_layers=num_layers)
    if config.hidden_size % 32 or config.intermediate_size % 32:
        raise InputError(
            f"MXFP4 needs hidden and intermediate sizes that are multiples of 32, got {config.hidden_size} and "
            f"{config.intermediate_size}"
        )
    return config


def _tensors(config: ModelConfig, layout: Layout) -> Tensors:
    return {
        name: ("U8" if expected.dtypes == BYTES else "BF16", expected.shape)
        for name, expected in layout.expected(config).items()
    }


def _write_side_files(
    root: Path,
    folder: Path,
    config: ModelConfig,
    layout: LayoutName,
    tokenizer_json: str | None,
) -> None:
    if layout == "original":
        write_json(folder / "config.json", original_config(config) | {RANDOM_WEIGHTS: True})
    else:
        fields = hugging_face_config(config, mxfp4=layout == "hf")
        write_json(folder / "config.json", fields | {RANDOM_WEIGHTS: True})
        write_json(folder / "generation_config.json", generation_config(config))
    tokenizer = Tokenizer.o200k_harmony()
    if tokenizer_json is None and config.vocab_size == tokenizer.vocab_size:
        tokenizer_json = tokenizer.to_tokenizer_json()
    if tokenizer_json is not None:
        (root / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")


class _Source:
    """The random numbers of a model's tensors, in pieces that follow each other in the file."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.shapes = {name: expected.shape for name, expected in HF.expected(config).items()}

    def pieces(self, name: str, layout: LayoutName) -> Iterator[npt.NDArray[np.generic]]:
        if layout == "original":
            for hugging_face_name in _hugging_face_names(name):
                yield from self._pieces(hugging_face_name)
        elif name in self.shapes:
            yield from self._pieces(name)
        else:
            yield from self._transposed_experts(name)

    def _pieces(self, name: str) -> Iterator[npt.NDArray[np.generic]]:
        num_values = math.prod(self.shapes[name])
        if name.endswith("_blocks"):
            yield from self._bytes(name, num_values)
        elif name.endswith("_scales"):
            low_scale, share = _scales_for(1 / math.sqrt(self.shapes[name][-1] * 32))
            for random in self._bytes(name, num_values):
                yield low_scale + (random < share).astype(np.uint8)
        else:
            table = _bfloat16_table(*self._mean_and_deviation(name))
            for random in self._bytes(name, num_values * 2):
                yield table[random.view(np.uint16)]

    def _transposed_experts(self, name: str) -> Iterator[npt.NDArray[np.generic]]:
        """The MXFP4 experts of the same seed as bfloat16 [E, I, O]; bfloat16 holds their values exactly."""
        blocks_shape, scales_shape = self.shapes[f"{name}_blocks"][1:], self.shapes[f"{name}_scales"][1:]
        per_expert = zip(
            _regroup(self._pieces(f"{name}_blocks"), math.prod(blocks_shape)),
            _regroup(self._pieces(f"{name}_scales"), math.prod(scales_shape)),
            strict=True,
        )
        for blocks, scales in per_expert:
            values_OI = dequantize(Mxfp4(blocks.reshape(blocks_shape), scales.reshape(scales_shape)))
            yield values_OI.T.astype(ml_dtypes.bfloat16)

    def _mean_and_deviation(self, name: str) -> tuple[float, float]:
        if "norm" in name:
            return 1.0, 0.1
        if name.endswith("sinks") or name.startswith("model.embed_tokens"):
            return 0.0, 1.0
        if name.endswith("bias"):
            return 0.0, 0.1
        return 0.0, 1 / math.sqrt(self.shapes[name][-1])

    def _bytes(self, name: str, num_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        # The raw stream of a bit generator stays the same in all versions of numpy; other methods may change.
        stream = np.random.PCG64(np.random.SeedSequence([self.seed, zlib.crc32(name.encode())]))
        for start in range(0, num_bytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, num_bytes - start)
            yield stream.random_raw(-(-size // 8)).astype("<u8", copy=False).view(np.uint8)[:size]


def _hugging_face_names(name: str) -> list[str]:
    """What an original/ tensor is made of: one tensor of the Hugging Face layout, or q, k and v."""
    outer = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "unembedding.weight": "lm_head.weight",
    }
    if name in outer:
        return [outer[name]]
    _, layer, rest = name.split(".", 2)
    inner = {
        "attn.norm.scale": ["input_layernorm.weight"],
        "attn.qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
        "attn.qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
        "attn.out.weight": ["self_attn.o_proj.weight"],
        "attn.out.bias": ["self_attn.o_proj.bias"],
        "attn.sinks": ["self_attn.sinks"],
        "mlp.norm.scale": ["post_attention_layernorm.weight"],
        "mlp.gate.weight": ["mlp.router.weight"],
        "mlp.gate.bias": ["mlp.router.bias"],
        "mlp.mlp1_bias": ["mlp.experts.gate_up_proj_bias"],
        "mlp.mlp2_bias": ["mlp.experts.down_proj_bias"],
        "mlp.mlp1_weight.blocks": ["mlp.experts.gate_up_proj_blocks"],
        "mlp.mlp1_weight.scales": ["mlp.experts.gate_up_proj_scales"],
        "mlp.mlp2_weight.blocks": ["mlp.experts.down_proj_blocks"],
        "mlp.mlp2_weight.scales": ["mlp.experts.down_proj_scales"],
    }
    return [f"model.layers.{layer}.{part}" for part in inner[rest]]


def _scales_for(deviation: float) -> tuple[int, int]:
    """(the lower scale byte, how many of 256 blocks have the next one) for uniform codes of this root mean square."""
    mean_square = (deviation / np.sqrt(np.mean(E2M1_VALUES.astype(np.float64) ** 2))) ** 2
    exponent = math.floor(math.log2(mean_square) / 2)
    # Blocks with the next scale have four times the square: 4^e (1 + 3 share) is to be the mean.
    share = (mean_square / 4.0**exponent - 1) / 3
    return exponent + SCALE_BIAS, round(256 * share)


@cache
def _normal_quantiles() -> npt.NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65_536) for i in range(65_536)])


def _bfloat16_table(mean: float, deviation: float) -> npt.NDArray[np.uint16]:
    """16 random bits to those of a normally distributed bfloat16, whose mantissa could not show more of the curve."""
    return (mean + deviation * _normal_quantiles()).astype(ml_dtypes.bfloat16).view(np.uint16)


def _regroup(pieces: Iterator[npt.NDArray[np.generic]], size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """The same bytes in groups of ``size``."""
    held = np.empty(0, np.uint8)
    for piece in pieces:
        held = np.concatenate([held, piece.view(np.uint8)])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
