"""A checkpoint in its published layout, memory-mapped: open it, check it, hand its arrays to a backend.

    folder with config.json and   model.safetensors, or model.safetensors.index.json and its shards, or *.safetensors
    folder with                   original/ as above, when it has no weights of its own
    one .safetensors file         with config.json beside it; a shard stands for its whole checkpoint

Opening reads headers alone; weights are views of the mapped files and are read from disk when they are first used.
Names, shapes and views: `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.config import ModelConfig
from ossia.model.config_file import RANDOM_WEIGHTS, read_config, read_json
from ossia.model.layouts import Dense, Expected, Layout, detect_layout
from ossia.model.safetensors_file import DTYPES, TensorEntry, map_file, read_header
from ossia.model.transformer import Layer, Weights
from ossia.ops import Array, Ops


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: everything about it but the weights themselves."""

    folder: Path
    layout: Layout
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]
    maps: Mapping[Path, npt.NDArray[np.uint8]] = field(repr=False, compare=False)

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
        files = find_files(Path(path))
        folder = files[0].parent
        tensors: dict[str, TensorEntry] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"tensor {name} is in {tensors[name].file} and in {file}. Keep the files of one checkpoint "
                        "alone in their folder."
                    )
                tensors[name] = entry
        config = read_config(folder)
        layout = detect_layout(tensors, folder)
        return cls(folder, layout, config, files, tensors, {file: map_file(file) for file in files})

    def problems(self) -> list[str]:
        """What keeps the checkpoint from being loaded, one sentence each."""
        num_layers = self._num_layers()
        if num_layers != self.config.num_layers:
            # One sentence in place of hundreds.
            return [
                f"{self.folder} holds {num_layers} layers, its config.json says {self.config.num_layers} "
                "(num_hidden_layers). Download config.json and the weights again from one place."
            ]
        expected = self.layout.expected(self.config)
        return [
            *(message for name, entry in self.tensors.items() if (message := _misfit(name, entry, expected.get(name)))),
            *(
                f"{self.folder} lacks the tensor {name}: expected {_described(expected[name])} in {self._file_list()}. "
                "Download the checkpoint again."
                for name in expected
                if name not in self.tensors
            ),
        ]

    def array(self, name: str) -> Array:
        """A tensor as a read-only numpy view of the mapped file, bfloat16 by `ml_dtypes`."""
        file, dtype, shape, offset, size_bytes = self.tensors[name]
        values = self.maps[file][offset : offset + size_bytes]
        if offset % DTYPES[dtype].itemsize:
            # A file is free to put a tensor at an odd byte; kernels are not made for that.
            values = values.copy()
        return values.view(DTYPES[dtype]).reshape(shape)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json that belongs to the checkpoint: beside it, or beside its original/ folder."""
        folders = [self.folder, self.folder.parent] if self.folder.name == "original" else [self.folder]
        return next((path for folder in folders if (path := folder / "tokenizer.json").is_file()), None)

    @property
    def has_random_weights(self) -> bool:
        """Whether `ossia checkpoint new` made the weights: the model answers with noise."""
        path = self.folder / "config.json"
        return path.is_file() and bool(read_json(path).get(RANDOM_WEIGHTS))

    @property
    def size_bytes(self) -> int:
        """The bytes of all its weight files."""
        return sum(len(values) for values in self.maps.values())

    def _num_layers(self) -> int:
        numbers = (_layer_number(name, self.layout) for name in self.tensors)
        return 1 + max((number for number in numbers if number is not None), default=-1)

    def _file_list(self) -> str:
        names = [file.name for file in self.files]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def load_weights(checkpoint: Checkpoint, ops: Ops) -> Weights:
    """Hand every array of a checkpoint to a backend, as views of the mapped files."""
    get, config, layout = checkpoint.array, checkpoint.config, checkpoint.layout

    def linear(dense: Dense) -> object:
        return ops.linear_weights(dense.weight_OI, dense.bias_O)

    layers = []
    for i in range(config.num_layers):
        arrays = layout.layer(get, config, i)
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
    outer = layout.outer(get)
    return Weights(
        embedding=ops.embedding(outer.embedding_VD),
        layers=tuple(layers),
        final_norm_D=ops.vector(outer.final_norm_D),
        unembedding=ops.linear_weights(outer.unembedding_VD),
    )


def find_files(path: Path) -> tuple[Path, ...]:
    """The weight files of the checkpoint at ``path``.

    Raises NotFoundError when there is nothing, CheckpointError when there is something else or shards are missing.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a checkpoint: expected a folder or a .safetensors file.")
        index = path.parent / "model.safetensors.index.json"
        shards = _shards(index) if index.is_file() else ()
        return shards if path in shards else (path,)
    if not path.is_dir():
        raise NotFoundError(
            f"there is no file or folder {path}. Expected a checkpoint's folder, a .safetensors file, or the name of a "
            "model such as gpt-oss-20b."
        )
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return (single,)
    if index.is_file():
        return _shards(index)
    if files := sorted(path.glob("*.safetensors")):
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(f"{path} holds a LoRA adapter, not a model. Give the model that it was trained for.")
        return tuple(files)
    if (path / "original").is_dir():
        return find_files(path / "original")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} holds no weights: expected model.safetensors, or model.safetensors.index.json and its shards; found "
        f"{found}. Download a model with `ossia pull gpt-oss-20b`."
    )


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{index}: weight_map is not an object of tensors and their files. Download it again.")
    files = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of its {len(files)} shards: {', '.join(missing[:4])}. "
            "Download the checkpoint again; what is complete is not downloaded twice."
        )
    return files


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


def _layer_number(name: str, layout: Layout) -> int | None:
    before, after = layout.layer_prefix(0).split("0")
    number, separator, _ = name.removeprefix(before).partition(after)
    return int(number) if name.startswith(before) and separator and number.isdecimal() else None


def _misfit(name: str, entry: TensorEntry, expected: Expected | None) -> str | None:
    if expected is None:
        return (
            f"{entry.file}: tensor {name} ({entry.dtype} {list(entry.shape)}) does not belong to the model that its "
            "config.json describes. Use the config.json that was published with the weights."
        )
    if entry.dtype in expected.dtypes and entry.shape == expected.shape:
        return None
    return (
        f"{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}, expected {_described(expected)} after "
        "config.json. Use the config.json that was published with the weights."
    )


def _described(expected: Expected) -> str:
    return f"{' or '.join(expected.dtypes)} {list(expected.shape)}"
