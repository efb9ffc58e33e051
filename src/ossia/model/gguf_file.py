"""The GGUF format, llama.cpp's: a file's metadata and tensors, and the configuration and vocabulary they describe.

    "GGUF", version (2 or 3), number of tensors, number of metadata pairs          little endian throughout
    metadata   key, type, value; arrays: type of the elements, count, elements
    tensors    name, dimensions (innermost first), type, offset into the data
    data       from the next multiple of general.alignment on

Quantised rows are blocks of 32 values: Q8_0 a float16 scale and 32 int8, MXFP4 an E8M0 scale and 16 bytes of codes in
the order "halves" (see `ossia.ops.Mxfp4`). Type 4 of Ollama's own files, MXFP4_PAIRS here, has them in the order
"pairs", as the model was published. The `gguf` package is not used because its reader decodes every one of a million
strings of the vocabulary before it hands out a tensor.

q, k and v are not permuted in gpt-oss files. llama.cpp rounds the ends of YaRN's correction range to whole dimensions;
the models were not trained so, and here it is not done.

Sources: docs/gguf.md of ggml; conversion of GptOssForCausalLM and LLM_ARCH_OPENAI_MOE in llama.cpp; `convert_gptoss.go`
and the loading of tensors of type 4 in ollama/ollama.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError
from ossia.harmony.tokenizer import O200K_PATTERN
from ossia.model.config import ModelConfig, RopeConfig
from ossia.model.config_file import Fields, check_consistency, sampling_fields
from ossia.model.safetensors_file import TensorEntry, refuse_lfs_pointer

ARCHITECTURE, OLLAMA_ARCHITECTURE = "gpt-oss", "gptoss"
GGUF_REMEDY = "Get a GGUF file of gpt-oss whose experts are in MXFP4, as they were published, or a safetensors one."

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}

# Type to (name, values in a block, bytes of a block).
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 4: ("MXFP4_PAIRS", 32, 17), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2),
    39: ("MXFP4", 32, 17),
}  # fmt: skip
# The same of those that dense matrices may have, which are unpacked when they are loaded: `gguf_quants.py`.
QUANTISED = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
}  # fmt: skip
QUANTISED_NAMES = frozenset(name for name, _, _ in QUANTISED.values())
# Those that are only named, to say what was found.
_OTHER_TYPES = {
    9: "Q8_1", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Strings:
    """An array of strings that is decoded when it is read."""

    data: memoryview
    start: int
    num_strings: int

    def __iter__(self) -> Iterator[str]:
        position = self.start
        for _ in range(self.num_strings):
            (size,) = _U64.unpack_from(self.data, position)
            yield str(self.data[position + 8 : position + 8 + size], "utf-8", "replace")
            position += 8 + size


@dataclass(frozen=True, slots=True, eq=False)
class Numbers:
    """An array of numbers. Unlike numpy's it can be compared with what a field should be, and is not that."""

    values: npt.NDArray[Any]

    def __repr__(self) -> str:
        return f"an array of {len(self.values)} numbers"


class GgufHeader(NamedTuple):
    metadata: dict[str, Any]  # numbers, str, Numbers, Strings
    tensors: dict[str, TensorEntry]


def read_gguf(path: Path, mapped: npt.NDArray[np.uint8]) -> GgufHeader:
    """The metadata and the tensors of a mapped file; shapes outermost first, as numbers.

    Raises CheckpointError when the file is no GGUF file, is cut off, or contradicts itself.
    """
    refuse_lfs_pointer(path, mapped[:64].tobytes())
    try:
        return _Reader(path, mapped.data).read()
    except (struct.error, OverflowError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is cut off or damaged within its header. Download it again.") from None


# Of `SamplingParams`, as llama.cpp spells them.
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def gguf_sampling(path: Path, metadata: Mapping[str, Any]) -> dict[str, float]:
    """How to sample where a request does not say: fields of `SamplingParams`. Raises CheckpointError."""
    return sampling_fields(Fields(path, dict(metadata), remedy=GGUF_REMEDY), SAMPLING_KEYS)


def gguf_config(path: Path, header: GgufHeader) -> ModelConfig:
    """The configuration that a file's metadata describes.

    Raises CheckpointError when it is of another architecture or a field is missing.
    """
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in (ARCHITECTURE, OLLAMA_ARCHITECTURE):
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}; ossia runs GGUF files of {ARCHITECTURE!r} alone. "
            f"{GGUF_REMEDY}"
        )
    fields = Fields(path, metadata, remedy=GGUF_REMEDY)
    default = ModelConfig()

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    fields.must_be(key("attention.sliding_window_pattern"), 2, "in gpt-oss every second layer slides")
    embedding = header.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding else fields.integer(key("vocab_size"))
    config = ModelConfig(
        num_layers=fields.integer(key("block_count")),
        hidden_size=fields.integer(key("embedding_length")),
        intermediate_size=fields.integer(key("expert_feed_forward_length"), key("feed_forward_length")),
        num_heads=fields.integer(key("attention.head_count")),
        num_kv_heads=fields.integer(key("attention.head_count_kv")),
        head_dim=fields.integer(key("attention.key_length")),
        vocab_size=vocab_size,
        num_experts=fields.integer(key("expert_count")),
        num_active_experts=fields.integer(key("expert_used_count")),
        sliding_window=fields.integer(key("attention.sliding_window")),
        max_context=fields.integer(key("context_length")),
        rms_norm_eps=fields.number(key("attention.layer_norm_rms_epsilon"), default=default.rms_norm_eps),
        rope=_rope(fields, key),
        stop_token_ids=_stop_token_ids(metadata, vocab_size, default),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    check_consistency(fields, config)
    return config


def tokenizer_document(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The vocabulary in a file's metadata, in the form of a tokenizer.json; None when it holds none.

    Raises CheckpointError for a vocabulary that is not byte-level BPE with o200k's splitting pattern.
    """
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    if not isinstance(tokens, Strings) or not isinstance(merges, Strings):
        return None
    kind, pattern = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    # Ollama splits by the architecture, whatever is named.
    is_ollama = metadata.get("general.architecture") == OLLAMA_ARCHITECTURE
    if kind != "gpt2" or (pattern != "gpt-4o" and not is_ollama):
        raise CheckpointError(
            f"{path}: the tokenizer is of kind {kind!r} with pattern {pattern!r}, expected 'gpt2' with 'gpt-4o'. "
            f"{GGUF_REMEDY}"
        )
    types = metadata.get("tokenizer.ggml.token_type")
    is_ordinary = np.ones(tokens.num_strings if types is None else 0, bool)
    if isinstance(types, Numbers):
        is_ordinary = types.values == _NORMAL_TOKEN
    if len(is_ordinary) != tokens.num_strings:
        raise CheckpointError(
            f"{path}: {tokens.num_strings} tokens, but {len(is_ordinary)} types of tokens. {GGUF_REMEDY}"
        )
    numbered = list(enumerate(tokens))
    return {
        "added_tokens": [{"id": i, "content": token} for i, token in numbered if not is_ordinary[i]],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": O200K_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "model": {
            "type": "BPE",
            "ignore_merges": False,
            "vocab": {token: i for i, token in numbered if is_ordinary[i]},
            "merges": list(merges),
        },
    }


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_NORMAL_TOKEN = 1


class _Reader:
    """Walks through a header; whatever lies outside the file raises struct.error or OverflowError."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def read(self) -> GgufHeader:
        if bytes(self.data[:4]) != _MAGIC:
            raise self.error(f"is not a GGUF file: it begins with {bytes(self.data[:4])!r}")
        self.position = 4
        version = self.number("<u4")
        if version not in (2, 3):
            raise self.error(f"has version {version} of GGUF, little endian; expected 2 or 3")
        num_tensors, num_pairs = self.number("<u8"), self.number("<u8")
        metadata = {}
        for _ in range(num_pairs):
            key = self.string()
            metadata[key] = self.value(self.number("<u4"))
        infos = [self.tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise self.error(f"has general.alignment {alignment!r}, expected a multiple of 8")
        data_start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, type_number, offset in infos:
            if name in tensors:
                raise self.error(f"describes tensor {name} twice")
            if offset % alignment:
                raise self.error(f"has tensor {name} at byte {offset:,} of its data, not a multiple of {alignment}")
            tensors[name] = self.entry(name, shape, type_number, data_start + offset)
        self.check_overlaps(tensors)
        return GgufHeader(metadata, tensors)

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        num_dimensions = self.number("<u4")
        if num_dimensions > 4:
            raise self.error(f"describes tensor {name} with {num_dimensions} dimensions, at most 4 are possible")
        if not num_dimensions:
            raise self.error(f"describes tensor {name} without a dimension")
        innermost_first = [self.number("<u8") for _ in range(num_dimensions)]
        return name, tuple(reversed(innermost_first)), self.number("<u4"), self.number("<u8")

    def entry(self, name: str, shape: tuple[int, ...], type_number: int, offset: int) -> TensorEntry:
        known = TYPES.get(type_number) or QUANTISED.get(type_number)
        if known is None:
            return TensorEntry(self.path, _OTHER_TYPES.get(type_number, f"type {type_number}"), shape, offset, 0)
        dtype, block_values, block_bytes = known
        if shape and shape[-1] % block_values:
            raise self.error(
                f"describes tensor {name} as {dtype} {list(shape)}, which is not whole blocks of {block_values}"
            )
        size_bytes = math.prod(shape) // block_values * block_bytes
        if offset + size_bytes > len(self.data):
            raise self.error(
                f"is cut off: tensor {name} ends at byte {offset + size_bytes:,}, the file has {len(self.data):,}"
            )
        return TensorEntry(self.path, dtype, shape, offset, size_bytes)

    def check_overlaps(self, tensors: dict[str, TensorEntry]) -> None:
        end, previous = 0, ""
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
            if entry.offset < end:
                raise self.error(f"has tensor {name} begin at byte {entry.offset:,}, within {previous}")
            end, previous = entry.offset + entry.size_bytes, name

    def value(self, type_number: int) -> Any:
        if type_number == _STRING:
            return self.string()
        if type_number != _ARRAY:
            return self.number(self.number_format(type_number))
        element_type, count = self.number("<u4"), self.number("<u8")
        if element_type == _STRING:
            return self.strings(count)
        start, dtype = self.position, np.dtype(self.number_format(element_type))
        self.advance(count * dtype.itemsize)
        return Numbers(np.frombuffer(self.data[start : self.position], dtype))

    def number_format(self, type_number: int) -> str:
        if type_number not in _NUMBERS:
            raise self.error(f"has a metadata value of the unknown type {type_number}")
        return _NUMBERS[type_number]

    def number(self, dtype: str) -> Any:
        start = self.position
        self.advance(np.dtype(dtype).itemsize)
        value = np.frombuffer(self.data[start : self.position], dtype)[0]
        # The shortest spelling of a float32 is what was meant: 1e-05 and not 9.999999747378752e-06.
        return float(str(value)) if dtype == "<f4" else value.item()

    def string(self) -> str:
        size = self.number("<u8")
        start = self.position
        self.advance(size)
        return str(self.data[start : self.position], "utf-8")

    def strings(self, count: int) -> Strings:
        start = position = self.position
        for _ in range(count):
            position += 8 + _U64.unpack_from(self.data, position)[0]
        self.advance(position - start)
        return Strings(self.data, start, count)

    def advance(self, size_bytes: int) -> None:
        self.position += size_bytes
        if self.position > len(self.data):
            raise struct.error

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {message}. Download it again.")


def is_gguf(path: Path) -> bool:
    """Whether a file is called, or begins, as one of GGUF does: Ollama's have no suffix. Raises OSError."""
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def _rope(fields: Fields, key: Any) -> RopeConfig:
    default = RopeConfig()
    theta = fields.number(key("rope.freq_base"), default=default.theta)
    # Ollama names the factor alone.
    usual = "yarn" if fields.get("general.architecture") == OLLAMA_ARCHITECTURE else "none"
    kind = fields.get(key("rope.scaling.type")) or usual
    if kind == "none":
        return RopeConfig(theta, factor=1.0, original_context=fields.integer(key("context_length")))
    if kind != "yarn":
        raise fields.error(f"{key('rope.scaling.type')} is {kind!r}, expected 'yarn' or 'none'")
    return RopeConfig(
        theta=theta,
        factor=fields.number(key("rope.scaling.factor")),
        original_context=fields.integer(key("rope.scaling.original_context_length")),
        beta_fast=fields.number(key("rope.scaling.yarn_beta_fast"), default=default.beta_fast),
        beta_slow=fields.number(key("rope.scaling.yarn_beta_slow"), default=default.beta_slow),
    )


def _stop_token_ids(metadata: Mapping[str, Any], vocab_size: int, default: ModelConfig) -> tuple[int, ...]:
    # llama.cpp knows the further stops of the published vocabulary by their text; the file names one.
    ids = [metadata.get("tokenizer.ggml.eos_token_id")]
    ids += default.stop_token_ids if vocab_size == default.vocab_size else ()
    return tuple(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < vocab_size))
