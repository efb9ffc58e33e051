"""Write a checkpoint's weights as the GGUF file that llama.cpp reads, so that both engines run the same numbers.

    python benchmarks/to_gguf.py CHECKPOINT OUT.gguf [--dense q8_0|bf16]

Experts keep their MXFP4 bits; attention, embedding and unembedding become Q8_0 or stay bfloat16; norms, biases, sinks
and router are float32, as llama.cpp's own converter has them. The vocabulary is written from the checkpoint's
tokenizer. Needs the PyPI package gguf; writes tensor by tensor in little memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from ossia.model.layouts import LayerArrays
from ossia.model.weights import Checkpoint
from ossia.ops import Mxfp4

Tensor = tuple[str, tuple[int, ...], Type, Callable[[], np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", choices=["q8_0", "bf16"], default="q8_0")
    arguments = parser.parse_args()
    convert(arguments.checkpoint, arguments.out, arguments.dense)


def convert(source: Path, out: Path, dense: str = "q8_0") -> None:
    """Write ``out`` from the checkpoint at ``source``."""
    checkpoint = Checkpoint.open(source)
    writer = gguf.GGUFWriter(out, "gpt-oss")
    _write_metadata(writer, checkpoint)
    dense_type = Type.Q8_0 if dense == "q8_0" else Type.BF16
    tensors = list(_tensors(checkpoint, dense_type))
    for name, shape, kind, _ in tensors:
        byte_shape = gguf.quant_shape_to_byte_shape(shape, kind) if kind not in (Type.F32,) else shape
        dtype = np.dtype(np.float32 if kind is Type.F32 else np.uint8)
        size_bytes = int(np.prod(byte_shape)) * dtype.itemsize
        writer.add_tensor_info(name, byte_shape, dtype, size_bytes, raw_dtype=None if kind is Type.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for *_, values in tensors:
        writer.write_tensor_data(values())
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_name(checkpoint.folder.name)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_active_experts)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope.factor)
    writer.add_rope_scaling_orig_ctx_len(config.rope.original_context)
    writer.add_vocab_size(config.vocab_size)
    assert checkpoint.tokenizer_path is not None, "the checkpoint has no tokenizer.json"
    tokenizer = json.loads(checkpoint.tokenizer_path.read_text(encoding="utf-8"))
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * config.vocab_size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(
        [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    )
    writer.add_bos_token_id(config.stop_token_ids[0])
    writer.add_eos_token_id(config.stop_token_ids[0])
    writer.add_add_bos_token(False)


def _tensors(checkpoint: Checkpoint, dense_type: Type) -> Iterator[Tensor]:
    outer = checkpoint.layout.outer(checkpoint.array)
    yield _dense("token_embd.weight", outer.embedding_VD, dense_type)
    yield _float32("output_norm.weight", outer.final_norm_D)
    yield _dense("output.weight", outer.unembedding_VD, dense_type)
    for i in range(checkpoint.config.num_layers):
        yield from _layer(f"blk.{i}.", checkpoint.layout.layer(checkpoint.array, checkpoint.config, i), dense_type)


def _layer(prefix: str, layer: LayerArrays, dense_type: Type) -> Iterator[Tensor]:
    yield _float32(prefix + "attn_norm.weight", layer.attention_norm_D)
    yield _float32(prefix + "post_attention_norm.weight", layer.moe_norm_D)
    yield _float32(prefix + "attn_sinks.weight", layer.sinks_Q)
    for name, matrix in (("q", layer.q), ("k", layer.k), ("v", layer.v), ("output", layer.o)):
        yield _dense(f"{prefix}attn_{name}.weight", matrix.weight_OI, dense_type)
        yield _float32(f"{prefix}attn_{name}.bias", matrix.bias_O)
    yield _float32(prefix + "ffn_gate_inp.weight", layer.router.weight_OI)
    yield _float32(prefix + "ffn_gate_inp.bias", layer.router.bias_O)
    experts = layer.experts
    for name, blocks, bias in (
        ("gate", experts.gate, experts.gate_bias_EF),
        ("up", experts.up, experts.up_bias_EF),
        ("down", experts.down, experts.down_bias_ED),
    ):
        assert isinstance(blocks, Mxfp4), "only checkpoints with MXFP4 experts are converted"
        yield f"{prefix}ffn_{name}_exps.weight", blocks.shape, Type.MXFP4, lambda blocks=blocks: _mxfp4(blocks)
        yield _float32(f"{prefix}ffn_{name}_exps.bias", bias)


def _float32(name: str, values: Any) -> Tensor:
    return name, values.shape, Type.F32, lambda: np.asarray(values, np.float32)


def _dense(name: str, values: Any, kind: Type) -> Tensor:
    def encode() -> np.ndarray:
        if kind is Type.BF16:
            return np.ascontiguousarray(values).view(np.uint8)
        rows = range(0, values.shape[0], 8192)
        pieces = [gguf.quants.quantize(values[i : i + 8192].astype(np.float32), kind) for i in rows]
        return np.concatenate(pieces)

    return name, values.shape, kind, encode


def _mxfp4(matrix: Mxfp4) -> np.ndarray:
    """Blocks of 17 bytes: the scale, then values 0-15 in low nibbles and 16-31 in high ones."""
    *outer, num_blocks = matrix.scales.shape
    out = np.empty((*outer, num_blocks, 17), np.uint8)
    for expert in range(outer[0]):
        blocks = matrix.blocks[expert]
        out[expert, ..., 0] = matrix.scales[expert]
        low, high = blocks & 15, blocks >> 4  # values 2i and 2i + 1
        # Byte i of GGUF holds values i and 16 + i: values 0-15 are the first 8 bytes of the published block.
        out[expert, ..., 1::2] = low[..., :8] | (low[..., 8:] << 4)
        out[expert, ..., 2::2] = high[..., :8] | (high[..., 8:] << 4)
    return out.reshape(*outer, num_blocks * 17)


if __name__ == "__main__":
    main()
