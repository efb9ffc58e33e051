"""Write GGUF files of gpt-oss, as llama.cpp's own converter has them; the format stands in `gguf_file.py`.

Written here, and not by the `gguf` package, because a file is ninety lines of packing and this one is streamed: its
reader is ours as well. The package is what the tests compare with.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ossia.errors import UnavailableError
from ossia.model.checkpoint_writer import Tensors, sync, write_pieces
from ossia.model.config import ModelConfig
from ossia.model.gguf_file import ARCHITECTURE, SAMPLING_KEYS, TYPES

_ALIGNMENT = 32
_VERSION = 3
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _INT32 = 4, 6, 7, 8, 9, 5
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
# LLAMA_FTYPE_MOSTLY_MXFP4_MOE, which is shown as the file's type.
_FILE_TYPE = 38
_TYPE_NUMBERS = {name: (number, values, size) for number, (name, values, size) in TYPES.items()}


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    pieces: Callable[[str], Iterable[npt.NDArray[Any]]],
    written: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """A file of these tensors (dtypes F32, F16, BF16, Q8_0, MXFP4; shapes outermost first), in this order.

    ``pieces`` gives the parts of a tensor that follow each other, ``written`` hears of each. Metadata are int (32
    bits, not negative), float, bool, str, lists of str and int32 arrays.
    """
    with open(path, "wb") as file:
        header = gguf_header(metadata, tensors)
        file.write(header)
        for name, tensor in tensors.items():
            size_bytes = write_pieces(file, pieces(name), written)
            assert size_bytes == gguf_bytes(tensor), f"{name}: {size_bytes} bytes, expected {gguf_bytes(tensor)}"
            file.write(b"\0" * (-size_bytes % _ALIGNMENT))
        sync(file)


def gguf_header(metadata: Mapping[str, Any], tensors: Tensors) -> bytes:
    """All before the data."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, (dtype, shape) in tensors.items():
        innermost_first = shape[::-1]
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *innermost_first))
        parts.append(struct.pack("<IQ", _TYPE_NUMBERS[dtype][0], offset))
        offset += gguf_bytes((dtype, shape)) + -gguf_bytes((dtype, shape)) % _ALIGNMENT
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % _ALIGNMENT)


def gguf_bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    """The bytes of a tensor of this dtype and shape in a GGUF file, without what fills up to the alignment."""
    dtype, shape = tensor
    _, block_values, block_bytes = _TYPE_NUMBERS[dtype]
    return math.prod(shape) // block_values * block_bytes


def gpt_oss_metadata(
    config: ModelConfig,
    tokenizer: Mapping[str, Any],
    name: str,
    chat_template: str | None = None,
    sampling: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What a file says of a model of this shape with this vocabulary (a tokenizer.json), and of how it is sampled
    (fields of `SamplingParams`).

    Raises UnavailableError when llama.cpp could not compute the model: it knows the published models' alternation of
    windows and their limit of the gate alone.
    """
    if any((config.window(i) is not None) != (i % 2 == 0) for i in range(config.num_layers)):
        raise UnavailableError(
            "this model's sliding windows are not on every second layer from the first on, which is all that GGUF can "
            "say of gpt-oss. Export it as mxfp4 or bf16."
        )
    if config.swiglu_limit != 7.0:
        raise UnavailableError(
            f"this model's swiglu_limit is {config.swiglu_limit}, and llama.cpp computes gpt-oss with 7.0 alone. "
            "Export it as mxfp4 or bf16."
        )
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_active_experts,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(config.rope.theta),
    }
    if config.rope.factor > 1:
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.rope.factor),
            "rope.scaling.original_context_length": config.rope.original_context,
            "rope.scaling.yarn_beta_fast": float(config.rope.beta_fast),
            "rope.scaling.yarn_beta_slow": float(config.rope.beta_slow),
        }
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPE,
        "general.quantization_version": 2,
        **{f"{ARCHITECTURE}.{key}": value for key, value in fields.items()},
        **_vocabulary(config, tokenizer),
        **({} if chat_template is None else {"tokenizer.chat_template": chat_template}),
        **{SAMPLING_KEYS[key]: value if key == "top_k" else float(value) for key, value in (sampling or {}).items()},
    }


def _vocabulary(config: ModelConfig, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = np.full(config.vocab_size, _UNUSED, np.int32)
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], _CONTROL
    special = {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    stop = config.stop_token_ids[0] if config.stop_token_ids else None
    ids = {
        "bos_token_id": special.get("<|startoftext|>", stop),
        "eos_token_id": stop,
        "padding_token_id": config.pad_token_id,
    }
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [
            pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]
        ],
        **{f"tokenizer.ggml.{key}": value for key, value in ids.items() if value is not None},
        "tokenizer.ggml.add_bos_token": False,
    }


def _value(value: Any) -> bytes:
    # A bool is an int to Python.
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        assert value.dtype == np.int32, f"an array of {value.dtype} has no place here"
        return struct.pack("<IIQ", _ARRAY, _INT32, len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
