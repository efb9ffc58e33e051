"""Which files a checkpoint's path stands for.

folder with config.json and   model.safetensors, or model.safetensors.index.json and its shards, or *.safetensors
folder with                   original/ as above, or one GGUF file, when it has no other weights
a .safetensors file           with config.json beside it; a shard stands for its whole checkpoint
a .gguf file                  a part of a split file stands for the whole
a file without that suffix    that begins as one does: what Ollama keeps
"""

from __future__ import annotations

import re
from pathlib import Path

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.config_file import read_json
from ossia.model.gguf_file import is_gguf


def find_files(path: Path) -> tuple[Path, ...]:
    """The weight files of the checkpoint at ``path``.

    Raises NotFoundError when there is nothing, CheckpointError when there is something else or shards are missing.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf_parts(path)
        if path.suffix != ".safetensors":
            if is_gguf(path):
                return (path,)
            raise CheckpointError(f"{path} is not a checkpoint: expected a folder, a .safetensors or a .gguf file.")
        index = path.parent / "model.safetensors.index.json"
        shards = _shards(index) if index.is_file() else ()
        return shards if path in shards else (path,)
    if not path.is_dir():
        raise NotFoundError(
            f"there is no file or folder {path}. Expected a checkpoint's folder, a .safetensors or .gguf file, or the "
            "name of a model such as gpt-oss-20b."
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
    # Parts of a split file often have a folder of their own.
    if gguf_files := sorted(path.glob("*.gguf")) or sorted(path.glob("*/*.gguf")):
        parts = _gguf_parts(gguf_files[0])
        if set(gguf_files) != set(parts):
            names = ", ".join(file.name for file in gguf_files[:8])
            raise CheckpointError(f"{path} holds several GGUF files: {names}. Give the path of one of them.")
        return parts
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


def _gguf_parts(path: Path) -> tuple[Path, ...]:
    """A file alone, or all the parts of a split one, named NAME-00001-of-00003.gguf."""
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None:
        return (path,)
    name, count = match[1], match[2]
    parts = tuple(path.parent / f"{name}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1))
    missing = [part.name for part in parts if not part.is_file()]
    if missing or path not in parts:
        raise CheckpointError(
            f"{path.parent} lacks {len(missing)} of the {int(count)} parts of {name}: {', '.join(missing[:4])}. "
            "Download them too."
        )
    return parts


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
