"""A checkpoint in its published layout, memory-mapped: open it, check it, hand its arrays to a backend.

Opening reads headers alone; weights are views of the mapped files and are read from disk when they are first used.
Which files: `checkpoint_files.py`. Names, shapes and views: `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError
from ossia.harmony.tokenizer import Tokenizer
from ossia.model.checkpoint_files import find_files
from ossia.model.config import ModelConfig
from ossia.model.config_file import CONFIG_REMEDY, RANDOM_WEIGHTS, read_config, read_json, read_sampling
from ossia.model.gguf_file import (
    GGUF_REMEDY,
    QUANTISED_NAMES,
    GgufHeader,
    gguf_config,
    gguf_sampling,
    is_gguf,
    read_gguf,
    tokenizer_document,
)
from ossia.model.gguf_quants import to_q8
from ossia.model.layouts import Dense, Expected, LayerArrays, Layout, ModelArrays, detect_layout
from ossia.model.safetensors_file import DTYPES, TensorEntry, map_file, read_header
from ossia.model.transformer import Layer, Weights
from ossia.ops import Q8, Array, Mxfp4, Ops


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: everything about it but the weights themselves."""

    folder: Path
    layout: Layout
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    maps: Mapping[Path, npt.NDArray[np.uint8]] = field(repr=False, compare=False)
    # The metadata of a GGUF file; nothing for safetensors.
    metadata: Mapping[str, Any] = field(repr=False, compare=False)
    _unpacked: dict[str, Q8] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder or file; less than a second for any size.

        Raises NotFoundError when there is nothing at ``path``, CheckpointError when what is there is damaged,
        incomplete, or not a gpt-oss model.
        """
        checkpoint = cls.open_unchecked(path)
        problems = checkpoint.problems()
        if problems:
            more = f" ({len(problems) - 1} more: `ossia checkpoint inspect` lists them.)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)
        return checkpoint

    @classmethod
    def open_unchecked(cls, path: str | Path) -> Checkpoint:
        """As `open`, but tensors that are missing, of a wrong shape, or too many are left to `problems`."""
        try:
            return cls._open(Path(path))
        except OSError as error:
            raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error

    @classmethod
    def _open(cls, path: Path) -> Checkpoint:
        files = find_files(path)
        maps = {file: map_file(file) for file in files}
        if is_gguf(files[0]):
            headers = [read_gguf(file, mapped) for file, mapped in maps.items()]
            tensors = _merge(header.tensors for header in headers)
            metadata = headers[0].metadata
            config = gguf_config(files[0], GgufHeader(metadata, tensors))
        else:
            tensors = _merge(map(read_header, files))
            metadata = {}
            config = read_config(files[0].parent)
        layout = detect_layout(tensors, files[0].parent)
        return cls(files[0].parent, layout, config, files, tensors, maps, metadata)

    def problems(self) -> list[str]:
        """What keeps the checkpoint from being loaded, one sentence each."""
        num_layers = self._num_layers()
        if num_layers != self.config.num_layers:
            # One sentence in place of hundreds.
            return [
                f"{self.folder} holds {num_layers} layers, {self._settings} says {self.config.num_layers} "
                f"({'block_count' if self.metadata else 'num_hidden_layers'}). Download it again, all from one place."
            ]
        expected = self.layout.expected(self.config)
        return [
            *(
                f"{entry.file}: tensor {name} {fault}. {self._remedy}"
                for name, entry in self.tensors.items()
                if (fault := self._misfit(entry, expected.get(name)))
            ),
            *(
                f"{self.folder} lacks the tensor {name}: expected {_described(expected[name])} in {self._file_list()}. "
                "Download the checkpoint again."
                for name in expected
                if name not in self.tensors
            ),
        ]

    def array(self, name: str) -> Array:
        """A tensor as a read-only numpy view of the mapped file, bfloat16 by `ml_dtypes`; GGUF's as `Mxfp4` or `Q8`.

        GGUF's matrices of fewer than 8 bits are unpacked to a `Q8` in memory, and kept for as long as the checkpoint.
        """
        file, dtype, shape, offset, size_bytes = self.tensors[name]
        values = self.maps[file][offset : offset + size_bytes]
        if dtype in ("MXFP4", "MXFP4_PAIRS"):
            blocks = values.reshape(*shape[:-1], shape[-1] // 32, 17)
            return Mxfp4(blocks[..., 1:], blocks[..., 0], "halves" if dtype == "MXFP4" else "pairs")
        if dtype == "Q8_0":
            blocks = values.reshape(*shape[:-1], shape[-1] // 32, 34)
            return Q8(blocks[..., 2:].view(np.int8), blocks[..., :2].view(np.float16)[..., 0])
        if dtype in QUANTISED_NAMES:
            if name not in self._unpacked:
                self._unpacked[name] = to_q8(dtype, values.reshape(shape[0], -1), shape)
            return self._unpacked[name]
        if offset % DTYPES[dtype].itemsize:
            # A file is free to put a tensor at an odd byte; kernels are not made for that.
            values = values.copy()
        return values.view(DTYPES[dtype]).reshape(shape)

    def outer(self) -> ModelArrays:
        """The arrays outside the layers."""
        return self.layout.outer(self.array)

    def layer(self, i: int) -> LayerArrays:
        """The arrays of a layer."""
        return self.layout.layer(self.array, self.config, i)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json that belongs to the checkpoint: beside it, or beside its original/ folder."""
        # A GGUF file has its own; what lies beside it may be another model's.
        return None if "tokenizer.ggml.tokens" in self.metadata else self._beside("tokenizer.json")

    def sampling(self) -> dict[str, float]:
        """How those who published it would have it sampled, as fields of `SamplingParams`; of any, or none.

        Of generation_config.json, or of the GGUF metadata. Raises CheckpointError for a number that cannot be.
        """
        if self.metadata:
            return gguf_sampling(self.files[0], self.metadata)
        path = self._beside("generation_config.json")
        return {} if path is None else read_sampling(path)

    @property
    def has_random_weights(self) -> bool:
        """Whether `ossia checkpoint new` made the weights: the model answers with noise."""
        path = self.folder / "config.json"
        # What lies beside a GGUF file may be another model's.
        return not self.metadata and path.is_file() and bool(read_json(path).get(RANDOM_WEIGHTS))

    @property
    def size_bytes(self) -> int:
        """The bytes of all its weight files."""
        return sum(len(values) for values in self.maps.values())

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's vocabulary: of its tokenizer.json, of its GGUF metadata, else gpt-oss's own.

        Raises CheckpointError when what is there is damaged, or nothing is and the vocabulary is not gpt-oss's.
        """
        if self.tokenizer_path is not None:
            return Tokenizer.from_file(self.tokenizer_path)
        document = tokenizer_document(self.files[0], self.metadata)
        if document is not None:
            return Tokenizer.from_document(document, str(self.files[0]))
        tokenizer = Tokenizer.o200k_harmony()
        if tokenizer.vocab_size != self.config.vocab_size:
            raise CheckpointError(
                f"{self.folder} has no tokenizer.json, and its vocabulary of {self.config.vocab_size} tokens is not "
                f"o200k_harmony's {tokenizer.vocab_size}. Put the tokenizer.json that belongs to it in the folder."
            )
        return tokenizer

    def _beside(self, name: str) -> Path | None:
        folders = [self.folder, self.folder.parent] if self.folder.name == "original" else [self.folder]
        return next((path for folder in folders if (path := folder / name).is_file()), None)

    def _num_layers(self) -> int:
        numbers = (_layer_number(name, self.layout) for name in self.tensors)
        return 1 + max((number for number in numbers if number is not None), default=-1)

    def _misfit(self, entry: TensorEntry, expected: Expected | None) -> str | None:
        found = f"{entry.dtype} {list(entry.shape)}"
        if expected is None:
            return f"({found}) does not belong to the model that {self._settings} describes"
        if entry.dtype in expected.dtypes and entry.shape == expected.shape:
            return None
        return f"is {found}, expected {_described(expected)} after {self._settings}"

    @property
    def _settings(self) -> str:
        return "its metadata" if self.metadata else "its config.json"

    @property
    def _remedy(self) -> str:
        return GGUF_REMEDY if self.metadata else CONFIG_REMEDY

    def _file_list(self) -> str:
        names = [file.name for file in self.files]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


class Arrays(Protocol):
    """A model's arrays: a checkpoint's, or those of something that stands on one."""

    @property
    def config(self) -> ModelConfig: ...

    def outer(self) -> ModelArrays: ...

    def layer(self, i: int) -> LayerArrays: ...


def load_weights(model: Arrays, ops: Ops) -> Weights:
    """Hand every array of a checkpoint to a backend, as views of the mapped files."""

    def linear(dense: Dense) -> object:
        return ops.linear_weights(dense.weight_OI, dense.bias_O)

    layers = []
    for i in range(model.config.num_layers):
        arrays = model.layer(i)
        layers.append(
            Layer(
                attention_norm_D=ops.vector(arrays.attention_norm_D),
                q=linear(arrays.q),
                k=linear(arrays.k),
                v=linear(arrays.v),
                o=linear(arrays.o),
                sinks_Q=ops.vector(arrays.sinks_Q),
                moe_norm_D=ops.vector(arrays.moe_norm_D),
                router=linear(arrays.router),
                experts=ops.experts(arrays.experts),
            )
        )
    outer = model.outer()
    return Weights(
        embedding=ops.embedding(outer.embedding_VD),
        layers=tuple(layers),
        final_norm_D=ops.vector(outer.final_norm_D),
        unembedding=ops.linear_weights(outer.unembedding_VD),
    )


def _merge(headers: Iterable[dict[str, TensorEntry]]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for header in headers:
        if twin := next((name for name in header if name in tensors), None):
            raise CheckpointError(
                f"tensor {twin} is in {tensors[twin].file} and in {header[twin].file}. Keep the files of one "
                "checkpoint alone in their folder."
            )
        tensors |= header
    return tensors


def _layer_number(name: str, layout: Layout) -> int | None:
    before, after = layout.layer_prefix(0).split("0")
    number, separator, _ = name.removeprefix(before).partition(after)
    return int(number) if name.startswith(before) and separator and number.isdecimal() else None


def _described(expected: Expected) -> str:
    dtypes = [dtype for dtype in expected.dtypes if dtype not in QUANTISED_NAMES]
    others = ["one of Q4_0 to Q6_K and IQ1 to IQ4"] if len(dtypes) < len(expected.dtypes) else []
    return f"{' or '.join(dtypes + others)} {list(expected.shape)}"
